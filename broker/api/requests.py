"""What every `/v1` route shares: who calls, strict queries and bodies, pages, and Idempotency-Key."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
import sqlalchemy as sa
import structlog
from litestar.connection import ASGIConnection, Request
from litestar.handlers import BaseRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker.api.answers import Page
from broker.callers import Callers
from broker.database import Database, now
from broker.errors import (
    BrokerError,
    Conflict,
    FieldError,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from broker.limits import Room
from broker.models import IdempotentAnswer, epoch_of, new_id
from broker.policy import Principal
from broker.vault.keyring import derive_key
from broker.vault.system_keys import RootKey, SystemKeys

T = TypeVar("T")
AnyRequest = Request[Any, Any, Any]
MAX_BODY_BYTES = 1_048_576
KEPT_SECONDS = 86_400.0
IN_PROGRESS_SECONDS = 180.0  # longer than any route takes: only a crash leaves a claim that old
LONGEST_CURSOR = 512
IDEMPOTENCY_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
DEEPEST = 32
JSON_TYPES = frozenset({"application/json", "application/merge-patch+json"})
JSON_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[][{}]')
PATH_PART = r"[A-Za-z0-9_.-]{1,128}"
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
EXPECTED = re.compile(r"Expected `[a-z0-9| ]+`(, got `[a-z]+`| of length (>=|<=) \d+| (>=|<=|<|>) [\d.]+)?")
PLAIN = "^[^\\x00-\\x1f\\x7f]*(?![\\s\\S])"  # not $, which a line feed may follow
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=512, pattern=PLAIN)]
TAG_NAME = r"[!#-9;-\[\]-~]{1,64}"  # visible ASCII without colon, quote and backslash: SQLite finds it by a JSON path
TagName = Annotated[str, msgspec.Meta(pattern=f"^{TAG_NAME}(?![\\s\\S])")]
TagValue = Annotated[str, msgspec.Meta(max_length=512, pattern=PLAIN)]
FAILED = "broker_failed"  # in a request's state: the error of the express lane (``lean``), to be answered
NOT_KEPT = "broker_not_kept"
MADE_ID = "broker_made_id"
log = structlog.get_logger()


# Who calls


class Authentication:
    """Middleware: finds the caller of a `/v1` request before its body is read (Unauthenticated otherwise)."""

    def __init__(self, app: ASGIApp, callers: Callers, room: Room) -> None:
        """Wrap the routes. ``room``: where each caller gets a place (Overloaded)."""
        self._app = app
        self._callers = callers
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Put the Principal where ``principal_of`` finds it. What failed already is raised: it gets nowhere unauthenticated."""
        if (failed := scope["state"].pop(FAILED, None)) is not None:
            raise failed
        principal = await self._callers.authenticate(scope["headers"], peer=peer_of(scope))
        scope["state"]["principal"] = principal
        with self._room.place(principal.caller_id):
            await self._app(scope, receive, send)


def peer_of(scope: Scope) -> str | None:
    """Return the address at the other end of the TCP connection; no header has a say in it. None for a Unix socket."""
    client = scope.get("client")
    return client[0] if client else None


async def principal_of(request: AnyRequest) -> Principal:
    """Return who sent this request (a Litestar dependency)."""
    principal = request.scope["state"]["principal"]
    assert isinstance(principal, Principal)  # noqa: S101 - Authentication ran first, or the wiring is wrong
    return principal


# Strict requests


async def strict_request(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Guard: refuse unknown, repeated or garbled query parameters, and a body that is not exactly what the route takes.

    A path part that can be no id or name is NotFound: PostgreSQL fails on a NUL instead of finding nothing.
    """
    require_path_parts(connection.path_params)
    problems = query_problems(connection.scope["query_string"], known_parameters(connection, handler))
    if problems:
        raise InvalidRequest(errors=problems)
    if isinstance(connection, Request) and connection.method in {"POST", "PATCH", "PUT", "DELETE"}:
        await _check_body(connection, handler)


def require_path_parts(path_params: Mapping[str, Any]) -> None:
    """Raise NotFound for a part of the path that can be no id or name. A subject is any text: its route looks at it."""
    if not all(re.fullmatch(PATH_PART, str(part)) for name, part in path_params.items() if name != "subject"):
        raise NotFound


def known_parameters(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> set[str]:
    """Return the query parameters that a route takes: its arguments without those that come from elsewhere."""
    elsewhere = {*connection.path_params, *handler.resolve_dependencies(), "data", "request", "scope"}
    return {*handler.parsed_fn_signature.parameters} - elsewhere


def query_problems(query_string: bytes, known: Collection[str]) -> list[FieldError]:
    """Return what is wrong with the names of a query and with the characters of its values (pure)."""
    try:
        pairs = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True, errors="strict", max_num_fields=64)
    except ValueError:
        return [FieldError("?", "must be UTF-8 and at most 64 parameters")]
    counted = Counter(name for name, _ in pairs)
    problems = [FieldError(f"?{shown_name(name)}", "is not a parameter here") for name in counted if name not in known]
    problems += [FieldError(f"?{shown_name(name)}", "is given twice") for name, count in counted.items() if count > 1]
    garbled = dict.fromkeys(name for name, value in pairs if name in known and CONTROL.search(value))
    return problems + [FieldError(f"?{name}", "must not hold control characters") for name in garbled]


def shown_name(name: str) -> str:
    """Return a field's name if it can hardly be anything else: a key pasted in the wrong place is not echoed."""
    return name if re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) else ""


async def _check_body(request: AnyRequest, handler: BaseRouteHandler) -> None:
    """Decode the body strictly: the framework's own decoding afterwards takes "60" for 60."""
    body = await request.body()
    field = handler.parsed_data_field
    if not body and (field is None or field.is_optional):
        return
    kind = request.headers.get("content-type", "application/json")
    Shape(field.annotation if field is not None else None).decoded(body, kind)


class _NoFields(msgspec.Struct, forbid_unknown_fields=True):
    """What a route without a body takes: an empty object, which some clients always send."""


class Shape:
    """What a route takes as its body. ``kind`` None: nothing, or an empty object. ``optional``: there may be no body."""

    def __init__(self, kind: Any, *, optional: bool = False) -> None:  # noqa: ANN401 - a type
        """Prepare to decode."""
        self.optional = optional
        self._decode = msgspec.json.Decoder(_NoFields if kind is None else kind).decode

    def decoded(self, body: bytes, content_type: str) -> Any:  # noqa: ANN401 - an object of the type
        """Return the body as JSON of this shape (UnsupportedMediaType; InvalidRequest points at what is wrong).

        Nothing of the body is quoted.
        """
        if content_type.partition(";")[0].strip().lower() not in JSON_TYPES:
            raise UnsupportedMediaType
        problem: FieldError | None
        try:
            value = self._decode(body)
        except msgspec.ValidationError as error:
            problem = field_error(str(error))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise InvalidRequest("the body is not valid JSON, or nested too deeply") from None
        else:
            problem = FieldError("", f"is nested more than {DEEPEST} deep") if _deeper_than(body, DEEPEST) else None
        if problem is not None:
            raise InvalidRequest(errors=[problem])  # outside the handler: the decoder's text may quote the body
        return value


def _deeper_than(json_text: bytes, most: int) -> bool:
    """Return whether valid JSON nests deeper than ``most``: later code walks it recursively."""
    if json_text.count(b"[") + json_text.count(b"{") <= most:
        return False
    depth = 0
    for token in JSON_MARKS.finditer(json_text):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > most:
            return True
    return False


def field_error(message: str) -> FieldError:
    """Return pointer and text for one of msgspec's messages; values and names that it quotes are dropped (pure)."""
    what, _, where = message.partition(" - at `")
    pointer = "".join(f"/{part.strip('.[]')}" for part in re.findall(r"\.\w+|\[\d+\]", where.rstrip("`")))
    named = re.search("field `(.*)`$", what, re.DOTALL)
    name = f"/{shown_name(named[1])}" if named is not None and shown_name(named[1]) else ""
    if what.startswith("Object contains unknown field"):
        return FieldError(pointer + name, "is not a field here")
    if what.startswith("Object missing required field"):
        return FieldError(pointer + name, "is required")
    if "matching regex" in what:
        return FieldError(pointer, "holds characters that are not allowed here")
    return FieldError(pointer, what if EXPECTED.fullmatch(what) else "is not valid")


# What the OpenAPI document says of errors


class ProblemField(msgspec.Struct, kw_only=True):
    """One refused field: ``pointer`` is a JSON Pointer into the body, or ``?name`` for a query parameter."""

    pointer: str
    detail: str


class Problem(msgspec.Struct, kw_only=True):
    """An RFC 9457 problem document; ``code`` is stable and documented in docs/errors.md."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[ProblemField] | msgspec.UnsetType = msgspec.UNSET
    made_id: str | msgspec.UnsetType = msgspec.UNSET


def problems(*statuses: int) -> dict[int, ResponseSpec]:
    """Return the documentation of a route's errors: these besides those that every `/v1` route can answer."""
    return {
        status: ResponseSpec(
            Problem,
            generate_examples=False,
            description=HTTPStatus(status).phrase,
            media_type="application/problem+json",
        )
        for status in sorted({400, 401, 500, 503, *statuses})
    }


def also(status: int, answer: type[Any]) -> dict[int, ResponseSpec]:
    """Return the documentation of a further answer of a route, such as that of a dry run."""
    return {status: ResponseSpec(answer, generate_examples=False, description=HTTPStatus(status).phrase)}


# Pages


def cursor_of(position: tuple[float, str]) -> str:
    """Return an opaque cursor for a row's (created_at, id)."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode().rstrip("=")


def position_of(cursor: str | None) -> tuple[float, str] | None:
    """Return what ``cursor_of`` was given (InvalidRequest for anything that it cannot have made)."""
    if cursor is None:
        return None
    try:
        text = base64.b64decode(cursor[:LONGEST_CURSOR] + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        at, row_id = msgspec.json.decode(text, type=tuple[float, str])
    except (ValueError, msgspec.MsgspecError):
        at, row_id = -1.0, ""
    if not (0 <= at < 2**53 and re.fullmatch(PATH_PART, row_id)):
        raise InvalidRequest(errors=[FieldError("?cursor", "is not a cursor of this list")])
    return at, row_id


def checked_limit(limit: int) -> int:
    """Return a page size from 1 to 200 (InvalidRequest)."""
    if not 1 <= limit <= 200:
        raise InvalidRequest(errors=[FieldError("?limit", "must be from 1 to 200")])
    return limit


def page(data: Sequence[T], next_position: tuple[float, str] | None) -> Page[T]:
    """Return a list answer."""
    return {"data": list(data), "next_cursor": cursor_of(next_position) if next_position is not None else None}


def short_page(data: Sequence[T], *, limit: int, cursor: str | None) -> Page[T]:
    """Return a page of a list that is short enough to be held whole; its cursor counts rows."""
    position = position_of(cursor)
    start = 0 if position is None else int(position[0])
    end = start + checked_limit(limit)
    return page(data[start:end], (float(end), "row") if end < len(data) else None)


def checked_time(pointer: str, text: str | None) -> float | None:
    """Return seconds since 1970 of an RFC 3339 time (InvalidRequest at ``pointer``), None for None."""
    if text is None:
        return None
    seconds = epoch_of(text)
    if seconds is None:
        raise InvalidRequest(errors=[FieldError(pointer, "must be an RFC 3339 time from 1970 on")])
    return seconds


# Idempotency-Key


def show_once(request: AnyRequest, made_id: str) -> None:
    """Say that this answer shows a secret: it is not kept, a repeat gets 409 with the id of what was made."""
    request.scope["state"][MADE_ID] = made_id


def never_keep(scope: Scope) -> None:
    """Say that this answer carries a credential and repeating the request is harmless."""
    scope["state"][NOT_KEPT] = True


class Idempotency:
    """Middleware: a POST with an Idempotency-Key acts once per caller, key and request within 24 hours.

    Only answers below 300 are kept; after an error the key may be used again. The key is claimed by a row before the
    route runs, so of two at once one waits its turn with 409 ``conflict``; the answer is kept before it is sent, so that
    whoever has it can rely on it. After a crash in between nobody knows what happened: for three minutes the key answers
    ``conflict``, then the request acts anew.
    """

    def __init__(self, app: ASGIApp, database: Database, keys: SystemKeys) -> None:
        """Wrap the routes; must stand behind ``Authentication``. ``keys`` (loaded) key the digests of requests."""
        self._app = app
        self._database = database
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replay, refuse, or run and keep."""
        keys = [value for name, value in scope["headers"] if name == b"idempotency-key"]
        if not keys or scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        if len(keys) > 1 or IDEMPOTENCY_KEY.fullmatch(keys[0]) is None:
            raise InvalidRequest("Idempotency-Key must be one value of 1 to 255 visible ASCII characters")
        body = await read_body(receive)
        if body is None:
            return  # the client left in the middle of its body: nobody waits for an answer
        request = b"\n".join([scope["raw_path"], scope["query_string"], body])
        claim = _new_claim(scope["state"]["principal"], keys[0], _fingerprint(self._keys.current, request))
        kept = await self._claim(claim, request)
        if kept is not None:
            await _replay(kept, send)
            return
        await self._run(claim, scope, body, send)

    async def _is_same(self, request: bytes, stored: str) -> bool:
        """Whether a digest is this request's; not when its key is gone: rather a conflict than a second action."""
        key_id = stored.partition(":")[0]
        key = self._keys.get(key_id)
        if key is None:
            await self._keys.refresh()  # another replica may have rotated a moment ago
            key = self._keys.get(key_id)
        return key is not None and hmac.compare_digest(_fingerprint(key, request), stored)

    async def _run(self, claim: IdempotentAnswer, scope: Scope, body: bytes, send: Send) -> None:
        """Run the route, keep its answer, send it. An answer that could not be kept is sent all the same."""
        answer = _Captured()
        try:
            await self._app(scope, _receive_of(body), answer)
        except Exception:
            await self._forget(claim)  # a lean route raises its errors; the others' become answers before they get here
            raise
        try:
            await self._keep(claim, scope["state"], answer)
        except BrokerError as error:
            log.warning("idempotency.not_kept", code=error.code)
        for message in answer.messages:
            await send(message)

    async def _claim(self, claim: IdempotentAnswer, request: bytes) -> IdempotentAnswer | None:
        """Claim the key; return the kept answer of an earlier request, or raise what stands against both."""
        try:
            found = await self._database.transaction(lambda session: _claimed(session, claim))
        except IntegrityError:
            raise Conflict("a request with this Idempotency-Key is still running") from None
        if found is None:
            return None
        if not await self._is_same(request, found.request_digest):
            raise IdempotencyConflict("This Idempotency-Key was used with another request")
        if found.made_id is not None:
            raise IdempotencyConflict("The first answer showed a secret and is not kept", made_id=found.made_id)
        if found.status is None:
            raise Conflict("a request with this Idempotency-Key is still running")
        return found

    async def _keep(self, claim: IdempotentAnswer, state: Mapping[str, Any], answer: _Captured) -> None:
        if answer.status >= 300 or state.get(NOT_KEPT):
            await self._forget(claim)
            return
        made_id = state.get(MADE_ID)
        text = None if made_id is not None else answer.body.decode()
        values = {"status": answer.status, "made_id": made_id, "answer": text}
        update = sa.update(IdempotentAnswer).where(col(IdempotentAnswer.id) == claim.id).values(**values)
        await self._database.transaction(lambda session: session.execute(update))

    async def _forget(self, claim: IdempotentAnswer) -> None:
        mine = sa.delete(IdempotentAnswer).where(col(IdempotentAnswer.id) == claim.id)
        await self._database.transaction(lambda session: session.execute(mine))


class _Captured:
    """Holds an answer back until it is kept."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.status = 500
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.body += message["body"]
        self.messages.append(message)


def _fingerprint(key: RootKey, request: bytes) -> str:
    """Return a keyed digest: a request can hold a password, which a plain hash would let anybody guess."""
    keyed = hmac.new(derive_key(key.root, "idempotency"), request, hashlib.sha256)
    return f"{key.id}:{keyed.hexdigest()}"


def _new_claim(principal: Principal, key: bytes, fingerprint: str) -> IdempotentAnswer:
    # A narrowed token of the caller gets its own answers only: it may not be allowed to see the others.
    narrowed = f"{principal.key_id} ".encode() if principal.key_id.startswith("tok_") else b""
    return IdempotentAnswer(
        id=new_id("idk"),
        caller_id=principal.caller_id,
        key_digest=hashlib.sha256(narrowed + key).hexdigest(),
        request_digest=fingerprint,
        created_at=0.0,
    )


def _claimed(session: Session, claim: IdempotentAnswer) -> IdempotentAnswer | None:
    """Write the claim, over one that is too old; return the row that stands against it."""
    claim.created_at = now(session)
    same = (IdempotentAnswer.caller_id == claim.caller_id, IdempotentAnswer.key_digest == claim.key_digest)
    found = session.exec(select(IdempotentAnswer).where(*same)).first()
    if found is not None and not _is_over(found, claim.created_at):
        return found
    if found is not None:
        session.delete(found)
        session.flush()
    session.add(claim)
    session.flush()
    return None


def _is_over(found: IdempotentAnswer, at: float) -> bool:
    age = at - found.created_at
    return age > KEPT_SECONDS or (found.status is None and age > IN_PROGRESS_SECONDS)


async def read_body(receive: Receive) -> bytes | None:
    """Return the whole body (PayloadTooLarge), or None when the client left before its end."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message["body"]
        if len(body) > MAX_BODY_BYTES:
            raise PayloadTooLarge
        if not message["more_body"]:
            return body


def _receive_of(body: bytes) -> Receive:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:  # noqa: ANN401 - an ASGI message
        return waiting.pop() if waiting else {"type": "http.disconnect"}

    return receive


async def _replay(kept: IdempotentAnswer, send: Send) -> None:
    body = (kept.answer or "").encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"idempotent-replayed", b"true"),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": kept.status or 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
