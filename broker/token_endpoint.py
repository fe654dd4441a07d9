"""The OAuth dialogue: builds its requests, and parses the answers strictly; no I/O, so every function is pure.

Requests are built on Authlib; its parsing is not used, because it takes a 429, a missing or numeric ``access_token`` and
``token_type: N_A`` for tokens. Random are only ``new_verifier`` and what a client's assertion needs to be unique.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Final, Literal, NoReturn, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from authlib.common.urls import add_params_to_qs, add_params_to_uri
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri, prepare_token_request
from authlib.oauth2.rfc7636 import create_s256_code_challenge

from broker.egress import NotSent, origin_of
from broker.models import epoch_of
from providers import implied_by
from providers.client_auth import client_authentication
from providers.spec import RESERVED_AUTHORIZE_PARAMS, ClientAuth, Incoming, OAuth2, Outgoing, Secret

T = TypeVar("T")
DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"
Outcome = Literal["transient", "permanent", "client_refused", "invalid"]

MAX_TOKEN_LENGTH: Final = 16 * 1024
MAX_ID_TOKEN_LENGTH: Final = 64 * 1024
MAX_LIFETIME_SECONDS: Final = 10 * 365 * 86_400
MAX_RETRY_AFTER_SECONDS: Final = 3600.0
# VSCHAR of RFC 6749 A.12, and no space at either end: a header field would lose it on the way.
_TOKEN: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_SCOPE: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")  # scope-token of RFC 6749 3.3
_USER_CODE: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,62}[\x21-\x7e])?")
_DEFAULT_OUTCOMES: Final[Mapping[str, Outcome]] = {
    "invalid_grant": "permanent",
    "invalid_client": "client_refused",
    "server_error": "transient",
    "temporarily_unavailable": "transient",
    "slow_down": "transient",
}
_KNOWN_ERRORS: Final = frozenset(  # RFC 6749 4.1.2.1 and 5.2, 7009 2.2.1, 8628 3.5, 8707 2, 9449 5
    {"invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type"}
    | {"invalid_scope", "access_denied", "unsupported_response_type", "server_error", "temporarily_unavailable"}
    | {"unsupported_token_type", "authorization_pending", "slow_down", "expired_token", "invalid_target"}
    | {"invalid_dpop_proof", "use_dpop_nonce", "redirect_uri_mismatch"}
)
_DISCOVERED: Final = {  # OpenID Connect Discovery 3, RFC 8414 2: their names and ours
    "authorization_endpoint": "authorize_url",
    "token_endpoint": "token_url",
    "jwks_uri": "jwks_url",
    "revocation_endpoint": "revoke_url",
    "device_authorization_endpoint": "device_url",
    "userinfo_endpoint": "userinfo_url",
}
_REQUIRED: Final = ("authorization_endpoint", "token_endpoint", "jwks_uri")
_AUTH_METHODS: Final[tuple[ClientAuth, ...]] = (
    "client_secret_basic",
    "client_secret_post",
    "none",
    "private_key_jwt",
)


# --- Requests


@dataclass(frozen=True, slots=True)
class Client:
    """An OAuth client: its secrets in the order in which they are tried, and how it proves itself.

    ``secret_ids`` name the secrets, one each; without them nobody is told which one was refused.
    """

    client_id: str
    secrets: tuple[Secret, ...]
    auth: ClientAuth
    secret_ids: tuple[str, ...] = ()

    def requests(self, build: Callable[[Secret | None], Outgoing]) -> tuple[Outgoing, ...]:
        """Return what ``build`` makes of each secret, in their order; of None where there is no secret."""
        return tuple(build(secret) for secret in self.secrets or (None,))


def new_verifier() -> Secret:
    """Return a fresh PKCE verifier: 43 unreserved characters, 256 random bits (RFC 7636 4.1)."""
    return Secret(secrets.token_urlsafe(32))


def challenge(verifier: Secret) -> str:
    """Return the S256 challenge of a verifier (RFC 7636 4.2)."""
    return str(create_s256_code_challenge(verifier.reveal()))


def authorize_url(
    oauth2: OAuth2,
    *,
    authorize_url: str,
    client_id: str,
    redirect_uri: str,
    scopes: Sequence[str],
    state: str,
    verifier_challenge: str,
    nonce: str | None,
    extra: Mapping[str, str],
) -> str:
    """Return where to send the browser: code flow, PKCE S256 where the provider's file allows (RFC 6749 4.1.1, 7636 4.3).

    A query that ``authorize_url`` has is kept, but for what is set here: no parameter comes twice. Without ``scopes`` there
    is no ``scope``. ``ValueError`` when a parameter is empty, or ``extra`` has one that the flow itself sets.
    """
    reserved = RESERVED_AUTHORIZE_PARAMS | {oauth2.client_id_param}
    if reserved & extra.keys():
        raise ValueError("an extra parameter is one that the flow itself sets")
    if not (client_id and redirect_uri and state and verifier_challenge) or nonce == "":
        raise ValueError("a parameter is empty, and would be left out silently")
    own = {"code_challenge": verifier_challenge, "code_challenge_method": "S256"} if oauth2.pkce else {}
    own.update({"nonce": nonce} if nonce is not None else {})
    own.update({oauth2.scope_param: oauth2.scope_separator.join(scopes)} if oauth2.scope_param and scopes else {})
    base = _without_parameters(authorize_url, reserved | extra.keys() | own.keys())
    url = prepare_grant_uri(base, client_id, "code", redirect_uri=redirect_uri, state=state, **own)
    return str(add_params_to_uri(_with_client_id_as(url, oauth2.client_id_param), list(extra.items())))


def _with_client_id_as(url: str, name: str) -> str:
    if name == "client_id":
        return url
    parts = urlsplit(url)
    pairs = [(name if one == "client_id" else one, value) for one, value in parse_qsl(parts.query)]
    return urlunsplit(parts._replace(query=urlencode(pairs)))


def _without_parameters(url: str, names: frozenset[str]) -> str:
    parts = urlsplit(url)
    kept = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if name not in names]
    return urlunsplit(parts._replace(query=urlencode(kept), fragment=""))


def exchange_request(
    oauth2: OAuth2,
    *,
    token_url: str,
    client: Client,
    secret: Secret | None,
    code: Secret,
    redirect_uri: str,
    verifier: Secret,
    now: float,
) -> Outgoing:
    """Build the request that exchanges a code (RFC 6749 4.1.3, RFC 7636 4.5) with one client secret.

    When the answer is ``client_refused`` the caller tries the next secret. ``now``: for a client that signs an assertion.
    Raises NotSent when the client cannot prove itself, ValueError for an empty code, redirect_uri or verifier.
    """
    if not (code.reveal() and redirect_uri and verifier.reveal()):
        raise ValueError("a parameter is empty, and would be left out silently")
    more = {**oauth2.exchange_params, **({"code_verifier": verifier.reveal()} if oauth2.pkce else {})}
    body = prepare_token_request("authorization_code", redirect_uri=redirect_uri, code=code.reveal(), **more)
    return _post(oauth2, token_url, client, secret, body, now=now)


def refresh_request(
    oauth2: OAuth2,
    *,
    token_url: str,
    client: Client,
    secret: Secret | None,
    refresh_token: Secret,
    redirect_uri: str,
    now: float,
    refresh_url: str = "",
) -> Outgoing:
    """Build a refresh (RFC 6749 6) with one client secret; without ``scope``, so the scopes stay. Raises as above.

    It goes to ``refresh_url`` where there is one; ``redirect_uri`` is sent only where the provider's file wants it.
    """
    if not refresh_token.reveal():
        raise ValueError("the refresh token is empty, and would be left out silently")
    more = {**oauth2.refresh.params, **({"redirect_uri": redirect_uri} if oauth2.refresh.redirect_uri else {})}
    body = prepare_token_request("refresh_token", refresh_token=refresh_token.reveal(), **more)
    return _post(oauth2, refresh_url or token_url, client, secret, body, now=now, audience=token_url)


def device_request(
    oauth2: OAuth2, *, device_url: str, client: Client, secret: Secret | None, scopes: Sequence[str], now: float
) -> Outgoing:
    """Build a device authorization request (RFC 8628 3.1) with one client secret. Raises as above."""
    fields = {"client_id": client.client_id}
    fields.update({oauth2.device_scope_param: oauth2.scope_separator.join(scopes)} if scopes else {})
    return _post(oauth2, device_url, _device_client(oauth2, client), secret, urlencode(fields), now=now)


def device_token_request(
    oauth2: OAuth2, *, token_url: str, client: Client, secret: Secret | None, device_code: Secret, now: float
) -> Outgoing:
    """Build a poll for the token of a device authorization (RFC 8628 3.4) with one client secret. Raises as above."""
    fields = {"grant_type": DEVICE_GRANT, "device_code": device_code.reveal(), "client_id": client.client_id}
    return _post(oauth2, token_url, _device_client(oauth2, client), secret, urlencode(fields), now=now)


def _device_client(oauth2: OAuth2, client: Client) -> Client:
    return client if oauth2.device_auth is None else replace(client, auth=oauth2.device_auth)


def _post(
    oauth2: OAuth2, url: str, client: Client, secret: Secret | None, body: str, *, now: float, audience: str = ""
) -> Outgoing:
    """Add the client's proof to a form, and write it as the provider wants it. ``audience``: of an assertion."""
    unique = secrets.token_urlsafe(16)
    try:
        headers, fields = client_authentication(
            client.client_id, secret, client.auth, audience=audience or url, now=now, unique=unique
        )
    except ValueError as error:
        why = str(error)
    else:
        given = dict(parse_qsl(body))
        proof = {oauth2.client_id_param if name == "client_id" else name: value for name, value in fields.items()}
        whole = str(add_params_to_qs(body, {name: value for name, value in proof.items() if name not in given}))
        kind = "application/x-www-form-urlencoded"
        if oauth2.token_format == "json":  # noqa: S105 - a format
            whole, kind = json.dumps(dict(parse_qsl(whole, keep_blank_values=True))), "application/json"
        common = {"Content-Type": kind, "Accept": "application/json"}
        return Outgoing("POST", url, {**common, **oauth2.token_headers, **headers}, whole.encode())
    raise NotSent(f"The integration's client cannot prove itself: {why}")


@dataclass(frozen=True, slots=True)
class Heard:
    """The last answer of ``first_not_refused``. ``refused``: how many secrets were, counted from the first one.

    ``taken``: the answer shows that the next secret was accepted; after trouble at the provider nobody knows.
    """

    answer: Incoming
    refused: int
    taken: bool


async def first_not_refused(
    oauth2: OAuth2, requests: Sequence[Outgoing], send: Callable[[Outgoing], Awaitable[Incoming]]
) -> Heard:
    """Send one request for each client secret in turn, until an answer does not refuse the client.

    ``requests`` has at least one. What ``send`` raises passes. The only place where secrets are tried one after the other.
    """
    for refused, request in enumerate(requests):
        answer = await send(request)
        parsed = parse_answer(oauth2, answer, received_at=0.0)
        if not (isinstance(parsed, TokenRefusal) and parsed.outcome == "client_refused"):
            return Heard(answer, refused, isinstance(parsed, TokenAnswer) or parsed.outcome == "permanent")
    return Heard(answer, len(requests), taken=False)


# --- Answers


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """Tokens that passed the parser. Times are seconds since 1970, on the clock that ``received_at`` was read from.

    ``scopes`` None: the answer names none, which means all that was asked for (RFC 6749 5.1); but where ``scopes_apply`` is
    False, this token has no scopes at all, and so none is missing. ``id_token`` is not verified yet. ``odd`` names members
    that were malformed and count as absent: a grant is not given up for them. ``variables`` are what the provider's file
    learns from an answer; whether they fit their patterns is not checked.
    """

    access_token: Secret
    token_type: str
    expires_at: float | None
    refresh_token: Secret | None
    refresh_expires_at: float | None
    scopes: tuple[str, ...] | None
    id_token: Secret | None
    scopes_apply: bool = True
    odd: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenRefusal:
    """No tokens. ``error`` is a known OAuth code or one of ours, never the provider's text.

    ``transient``: try again later. ``permanent``: the grant is dead. ``client_refused``: this client secret is not
    accepted. ``invalid``: anything else, so misconfigured or against the protocol; the grant may well be alive.
    """

    outcome: Outcome
    error: str
    retry_after_seconds: float | None = None


def parse_answer(oauth2: OAuth2, answer: Incoming, *, received_at: float) -> TokenAnswer | TokenRefusal:
    """Read an answer of the token endpoint (RFC 6749 5); never raises, whatever came.

    408, 429 and 5xx are transient whatever they carry. Only a JSON object without duplicate keys is read, in 200 or 201 for
    tokens, in those or a 4xx for an error. The content type is not checked.
    """
    retry_after_seconds = _retry_after_seconds(answer, received_at)
    if answer.status in {408, 429} or answer.status >= 500:
        return TokenRefusal("transient", "temporarily_unavailable", retry_after_seconds)
    good = answer.status in {200, 201}
    if not good and not 400 <= answer.status < 500:
        return TokenRefusal("invalid", "invalid_answer")
    try:
        body = _reshaped(oauth2, strict_object(answer.body))
        if good and body.get("error") is None:
            return _token_answer(oauth2, body, received_at)
    except ValueError:
        return TokenRefusal("invalid", "invalid_answer")
    return _refusal(oauth2, body.get("error"), retry_after_seconds)


@dataclass(frozen=True, slots=True)
class DeviceAnswer:
    """What the user needs, and what polls are made with (RFC 8628 3.2). Times are spans in seconds."""

    device_code: Secret
    user_code: str
    verification_uri: str
    verification_uri_complete: str | None
    lifetime_seconds: float
    interval_seconds: float


def parse_device_answer(
    oauth2: OAuth2, answer: Incoming, *, received_at: float, development: bool = False
) -> DeviceAnswer | TokenRefusal:
    """Read an answer of the device authorization endpoint (RFC 8628 3.2); never raises, whatever came.

    ``verification_url`` is read where ``verification_uri`` is missing: some use the draft's name. An address that is not
    https is refused (http is for ``development``): a user is sent there. Errors are judged as the token endpoint's.
    """
    if answer.status not in {200, 201}:
        return _as_refusal(parse_answer(oauth2, answer, received_at=received_at))
    try:
        body = strict_object(answer.body)
        if body.get("error") is not None:
            return _as_refusal(parse_answer(oauth2, answer, received_at=received_at))
        return _device_answer(body, development=development)
    except ValueError:
        return TokenRefusal("invalid", "invalid_answer")


def _as_refusal(parsed: TokenAnswer | TokenRefusal) -> TokenRefusal:
    return parsed if isinstance(parsed, TokenRefusal) else TokenRefusal("invalid", "invalid_answer")


def _device_answer(body: Mapping[str, Any], *, development: bool) -> DeviceAnswer:
    device_code, user_code = _token(body, "device_code", MAX_TOKEN_LENGTH), body.get("user_code")
    uri = body.get("verification_uri", body.get("verification_url"))
    complete = body.get("verification_uri_complete")
    lifetime, interval = _seconds(body.get("expires_in")), _seconds(body.get("interval", 5))
    if device_code is None or not isinstance(user_code, str) or not _USER_CODE.fullmatch(user_code) or not lifetime:
        raise ValueError("a part is missing or malformed")
    for address in (uri, complete) if complete is not None else (uri,):
        if not isinstance(address, str) or not _good_url(address, development=development):
            raise ValueError("an address is missing or malformed")
    return DeviceAnswer(device_code, user_code, str(uri), complete, lifetime, max(interval or 0.0, 1.0))


def strict_object(raw: bytes) -> dict[str, Any]:
    """Decode a JSON object in UTF-8; ``ValueError`` for anything else, for a key named twice, and for NaN and Infinity."""
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - one kind of error for every malformed document
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is named twice")
    return found


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError("not a JSON number")


def _reshaped(oauth2: OAuth2, body: dict[str, Any]) -> Mapping[str, Any]:
    if oauth2.parse_token is None:
        return body
    try:
        reshaped = oauth2.parse_token(body)
    except Exception:  # noqa: BLE001 - a provider's function stumbled over the answer: whatever it raises, it is not valid
        reshaped = None
    if not isinstance(reshaped, Mapping):
        raise ValueError("the answer could not be reshaped")  # noqa: TRY004 - as in strict_object
    return reshaped


def _token_answer(oauth2: OAuth2, body: Mapping[str, Any], received_at: float) -> TokenAnswer:
    token_type = body.get("token_type")  # some leave it out; then Bearer, the only kind that can be used here
    if token_type is not None and (not isinstance(token_type, str) or token_type.lower() != "bearer"):
        raise ValueError("not a bearer token")
    access_token = _token(body, "access_token", MAX_TOKEN_LENGTH)
    if access_token is None:
        raise ValueError("there is no access token")
    applies = not access_token.reveal().startswith(oauth2.unscoped_prefixes)
    odd: list[str] = []
    lifetime = _lenient(body, "expires_in", _seconds, odd)
    expires_at = _lenient(body, "expires_at", _moment, odd) if lifetime is None else received_at + lifetime
    refresh_lifetime = _lenient(body, "refresh_token_expires_in", _seconds, odd)
    scopes = _lenient(body, "scope", lambda value: _scopes(oauth2, value), odd) if applies else None
    return TokenAnswer(
        access_token=access_token,
        token_type="Bearer",  # noqa: S106 - a kind
        expires_at=None if expires_at is None else min(expires_at, received_at + MAX_LIFETIME_SECONDS),
        refresh_token=_token(body, "refresh_token", MAX_TOKEN_LENGTH),
        refresh_expires_at=None if refresh_lifetime is None else received_at + refresh_lifetime,
        scopes=scopes,
        id_token=_lenient_token(body, "id_token", odd) if oauth2.openid else None,
        scopes_apply=applies,
        odd=tuple(odd),
        variables=_variables(oauth2, body),
    )


def _variables(oauth2: OAuth2, body: Mapping[str, Any]) -> dict[str, str]:
    found = {name: body.get(member) for name, member in oauth2.token_variables.items()}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _lenient(body: Mapping[str, Any], name: str, read: Callable[[object], T | None], odd: list[str]) -> T | None:
    """Read an optional member; a malformed one counts as absent, and its name is added to ``odd``.

    The provider has spent the old refresh token by now: to refuse the answer would cost the grant.
    """
    try:
        return read(body.get(name))
    except ValueError:
        odd.append(name)
        return None


def _lenient_token(body: Mapping[str, Any], name: str, odd: list[str]) -> Secret | None:
    try:
        return _token(body, name, MAX_ID_TOKEN_LENGTH)
    except ValueError:
        odd.append(name)
        return None


def _token(body: Mapping[str, Any], name: str, most: int) -> Secret | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > most or not _TOKEN.fullmatch(value):
        raise ValueError("a token is malformed")
    return Secret(value)


def _seconds(value: object, most: float = MAX_LIFETIME_SECONDS) -> float | None:
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError("a lifetime is malformed")
    return float(min(value, most))


def _moment(value: object) -> float | None:
    """Read a point in time: RFC 3339, or seconds since 1970."""
    if isinstance(value, str) and (found := epoch_of(value)) is not None:
        return found
    return _seconds(value, most=float("inf"))


def _scopes(oauth2: OAuth2, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = (
            re.split(f"[{re.escape(oauth2.scope_separators_in)}]", value) if len(value) <= MAX_TOKEN_LENGTH else None
        )
    if not isinstance(value, list) or not all(isinstance(scope, str) for scope in value):
        raise ValueError("the scopes are malformed")
    found = tuple(dict.fromkeys(scope for scope in value if scope))
    if not all(_SCOPE.fullmatch(scope) for scope in found):
        raise ValueError("a scope is malformed")
    return found


def _refusal(oauth2: OAuth2, error: object, retry_after_seconds: float | None) -> TokenRefusal:
    outcomes: Mapping[str, Outcome] = {**_DEFAULT_OUTCOMES, **oauth2.error_outcomes}
    code = error if isinstance(error, str) and error in _KNOWN_ERRORS | outcomes.keys() else "unknown_error"
    outcome = outcomes.get(code, "invalid")
    return TokenRefusal(outcome, code, retry_after_seconds if outcome == "transient" else None)


def _retry_after_seconds(answer: Incoming, received_at: float) -> float | None:
    """Read Retry-After, seconds or an HTTP date (RFC 9110 10.2.3), at most an hour; None when it is neither."""
    value = answer.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,20}", value):
        seconds = float(value)
    else:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError, IndexError, TypeError):  # what the library is known to raise
            return None
        seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - received_at
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


# --- Scopes


def granted_scopes(oauth2: OAuth2, asked: Sequence[str], answer: TokenAnswer) -> tuple[str, ...]:
    """Return what was granted, under the names that were asked for where the provider has several for one scope.

    All that was asked for when the answer names none (RFC 6749 5.1); nothing where scopes do not apply to the token.
    """
    if not answer.scopes_apply:
        return ()
    if answer.scopes is None:
        return tuple(dict.fromkeys(asked))
    names = {_canonical(oauth2, scope): scope for scope in asked}
    return tuple(dict.fromkeys(names.get(_canonical(oauth2, scope), scope) for scope in answer.scopes))


def missing_scopes(oauth2: OAuth2, asked: Sequence[str], granted: Sequence[str] | None) -> tuple[str, ...]:
    """Return what was asked for and not granted, not even as a part of a wider scope.

    ``granted`` is ``TokenAnswer.scopes`` (not what ``granted_scopes`` returned): None means that nothing is missing.
    """
    if granted is None:
        return ()
    held = {_canonical(oauth2, scope) for scope in granted}
    held = held.union(*(implied_by(oauth2.implied_scopes, scope) for scope in held))
    return tuple(dict.fromkeys(scope for scope in asked if _canonical(oauth2, scope) not in held))


def _canonical(oauth2: OAuth2, scope: str) -> str:
    return oauth2.scope_aliases.get(scope, scope)


# --- Discovery


def discovery_url(issuer: str) -> str:
    """Return where an issuer's metadata lies (OpenID Connect Discovery 4.1)."""
    return f"{issuer.rstrip('/')}/.well-known/openid-configuration"


def parse_discovery(document: object, *, issuer: str, development: bool = False) -> Mapping[str, str | bool]:
    """Read an issuer's metadata (OpenID Connect Discovery 3, RFC 8414 2); everything unknown is ignored.

    Returns ``issuer``, the URLs under our names, ``client_auth`` unless the server takes none of those that we know, and
    ``iss_in_callback`` (RFC 9207 3). ``ValueError`` when the issuer is not exactly the configured one (RFC 8414 3.3), an
    endpoint that OpenID Connect requires is missing, or a URL is not https; http is for ``development``.
    """
    if not isinstance(document, Mapping) or document.get("issuer") != issuer:
        raise ValueError("the metadata is not this issuer's")
    found: dict[str, str | bool] = {"issuer": issuer}
    for theirs, ours in _DISCOVERED.items():
        url = document.get(theirs)
        if url is None and theirs not in _REQUIRED:
            continue
        if not isinstance(url, str) or not _good_url(url, development=development):
            raise ValueError("an endpoint of the metadata is missing or malformed")
        found[ours] = url
    found["iss_in_callback"] = document.get("authorization_response_iss_parameter_supported") is True
    auth = _client_auth(document.get("token_endpoint_auth_methods_supported"))
    found.update({"client_auth": auth} if auth is not None else {})
    return found


def _good_url(url: str, *, development: bool) -> bool:
    origin = origin_of(url)  # raises ValueError for what two parsers could read in two ways
    return origin.startswith("https://") or development


def _client_auth(methods: object) -> ClientAuth | None:
    if methods is None:
        return "client_secret_basic"  # the default of both specifications
    supported = methods if isinstance(methods, list) else []
    return next((method for method in _AUTH_METHODS if method in supported), None)
