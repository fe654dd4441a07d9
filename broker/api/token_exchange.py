"""``POST /v1/token-exchange``: a key or an issuer's token for a short-lived, narrowed token of ours (RFC 8693)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
from litestar import Router, post
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, Reference, RequestBody, Schema

from broker.api import answers
from broker.api.requests import MAX_BODY_BYTES, AnyRequest, Shape, problems
from broker.callers import Callers, presented_keys
from broker.callers.narrowing import wanted_grants
from broker.errors import BrokerError, FieldError, InvalidRequest, PayloadTooLarge, Unauthenticated
from broker.policy import grant_json
from broker.settings import Settings
from providers.spec import Secret

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a name
JWT = "urn:ietf:params:oauth:token-type:jwt"
SUBJECT_TYPES = frozenset({ACCESS_TOKEN, JWT, "urn:ietf:params:oauth:token-type:id_token"})
ISSUED_TYPES = frozenset({ACCESS_TOKEN, JWT})
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
KNOWN = {
    "grant_type": {GRANT_TYPE},
    "subject_token_type": SUBJECT_TYPES,
    "requested_token_type": ISSUED_TYPES,
}
LONGEST_TEXT = 32_768
MAX_FIELDS = 16
NARROWING = ("scope", "authorization_details")
T = TypeVar("T")
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_TEXT)]


class ExchangeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What RFC 8693 (2.1) and RFC 9396 name, as far as it is known here; the same as JSON or as a form."""

    grant_type: Text
    subject_token: Text
    subject_token_type: Text
    requested_token_type: Text | None = None
    scope: Text | msgspec.UnsetType = msgspec.UNSET
    authorization_details: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    audience: Text | None = None


def _documented(details: Schema) -> OpenAPIMediaType:
    text = Schema(type=OpenAPIType.STRING, min_length=1, max_length=LONGEST_TEXT)
    kinds = {name: Schema(type=OpenAPIType.STRING, enum=sorted(values)) for name, values in KNOWN.items()}
    plain = dict.fromkeys(("subject_token", "scope", "audience"), text)
    required = ["grant_type", "subject_token", "subject_token_type"]
    members: dict[str, Reference | Schema] = {**kinds, **plain, "authorization_details": details}
    closed = Schema(type=OpenAPIType.OBJECT, properties=members, required=required, additional_properties=False)
    return OpenAPIMediaType(schema=closed)


@dataclass
class ExchangeOperation(Operation):
    """The route in the OpenAPI document: it reads its body itself, so the framework knows none."""

    def __post_init__(self) -> None:
        """Say what the body is, as JSON and as a form, whose fields are texts."""
        objects = Schema(type=OpenAPIType.ARRAY, items=Schema(type=OpenAPIType.OBJECT))
        form = _documented(Schema(type=OpenAPIType.STRING, description="A JSON array of objects"))
        self.request_body = RequestBody(required=True, content={JSON: _documented(objects), FORM: form})


@post("/token-exchange", status_code=200, operation_class=ExchangeOperation, responses=problems(403, 413, 415))
async def exchange_token(
    request: AnyRequest, callers: NamedDependency[Callers], settings: NamedDependency[Settings]
) -> answers.IssuedToken:
    """Exchange a caller key, or a token of a trusted issuer, for a token that ends soon and may less."""
    try:
        return await _exchanged(request, callers, settings)
    except BrokerError as error:
        error.members = {**error.members, "error": _oauth_error(error)}
        raise


async def _exchanged(request: AnyRequest, callers: Callers, settings: Settings) -> answers.IssuedToken:
    body = _decoded(await request.body(), request.headers.get("content-type", ""))
    _require_known(body, settings)
    shown = presented_keys(request.scope["headers"])
    if shown and shown != [body.subject_token]:
        raise InvalidRequest("Two different caller keys were sent")
    wanted = wanted_grants(_given(body.scope), _given(body.authorization_details))
    token, told = await callers.exchange(Secret(body.subject_token), wanted)
    answer: answers.IssuedToken = {
        "access_token": token.reveal(),
        "issued_token_type": body.requested_token_type or ACCESS_TOKEN,
        "token_type": "Bearer",
        "expires_in": told.seconds,
    }
    if told.grants is not None:
        answer["authorization_details"] = [grant_json(grant) for grant in told.grants]
    return answer


def _given(value: T | msgspec.UnsetType) -> T | None:
    return None if isinstance(value, msgspec.UnsetType) else value


def _decoded(raw: bytes, content_type: str) -> ExchangeBody:
    """Return the body of either kind (PayloadTooLarge, UnsupportedMediaType, InvalidRequest that quotes nothing)."""
    if len(raw) > MAX_BODY_BYTES:
        raise PayloadTooLarge
    if content_type.partition(";")[0].strip().lower() != FORM:
        found: ExchangeBody = Shape(ExchangeBody).decoded(raw, content_type)
        return found
    return Shape(ExchangeBody).decoded(msgspec.json.encode(_fields(raw)), "application/json")  # type: ignore[no-any-return]


def _fields(raw: bytes) -> dict[str, Any]:
    """Return a form's fields (RFC 6749 3.2: none twice, an empty one is left out); a list of details is JSON in one."""
    try:
        pairs = parse_qsl(
            raw.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=MAX_FIELDS
        )
        fields: dict[str, Any] = dict(pairs)
        if len(fields) < len(pairs):
            raise InvalidRequest("A field is given twice")
        if not all(fields.get(name, "given") for name in NARROWING):
            raise InvalidRequest("An empty scope or authorization_details would not narrow; leave it out")
        fields = {name: value for name, value in fields.items() if value}
        if "authorization_details" in fields:
            fields["authorization_details"] = msgspec.json.decode(fields["authorization_details"])
    except (ValueError, msgspec.DecodeError, RecursionError):
        raise InvalidRequest("The form is malformed") from None
    return fields


def _require_known(body: ExchangeBody, settings: Settings) -> None:
    if body.grant_type != GRANT_TYPE:
        raise InvalidRequest(errors=[FieldError("/grant_type", f"must be {GRANT_TYPE}")])
    if body.subject_token_type not in SUBJECT_TYPES:
        raise InvalidRequest(errors=[FieldError("/subject_token_type", "must be an access_token, jwt or id_token")])
    if body.requested_token_type not in {None, *ISSUED_TYPES}:
        raise InvalidRequest(errors=[FieldError("/requested_token_type", "must be an access_token or jwt")])
    if body.audience not in {None, "broker", settings.public_url}:
        raise InvalidRequest(errors=[FieldError("/audience", "must be broker, the only one that there is")])


def _oauth_error(error: BrokerError) -> str:
    """Return RFC 6749's name (5.2) for one of our errors, for clients that know no other."""
    if isinstance(error, Unauthenticated):
        return "invalid_grant"
    if isinstance(error, InvalidRequest):
        pointers = {item.pointer for item in error.errors if item.detail != "is required"}
        if "/grant_type" in pointers:
            return "unsupported_grant_type"
        return "invalid_target" if "/audience" in pointers else "invalid_request"
    return (
        "invalid_scope"
        if error.status == 403
        else "temporarily_unavailable"
        if error.status >= 500
        else "invalid_request"
    )


def routes() -> Router:
    """Return the route. Who asks is shown in the body, so it stands outside of ``Authentication``."""
    headers = [ResponseHeader(name="Cache-Control", value="no-store")]
    return Router(path="/v1", route_handlers=[exchange_token], tags=["callers"], response_headers=headers)
