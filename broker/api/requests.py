"""What every `/v1` route shares: who calls, strict queries and bodies, pages, and Idempotency-Key."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

import sqlalchemy as sa
from litestar.connection import ASGIConnection, Request
from litestar.handlers import BaseRouteHandler
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker.callers import Callers
from broker.database import Database, now
from broker.errors import (
    Conflict,
    FieldError,
    IdempotencyConflict,
    InvalidRequest,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from broker.models import IdempotentAnswer, new_id
from broker.policy import Principal

AnyRequest = Request[Any, Any, Any]
MAX_BODY_BYTES = 1_048_576
KEPT_SECONDS = 86_400.0
IN_PROGRESS_SECONDS = 60.0
LONGEST_KEY = 255
NOT_KEPT = "broker_not_kept"
MADE_ID = "broker_made_id"


# Who calls


class Authentication:
    """Middleware: finds the caller of a `/v1` request before its body is read (Unauthenticated otherwise)."""

    def __init__(self, app: ASGIApp, callers: Callers) -> None:
        """Wrap the routes."""
        self._app = app
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Put the Principal where ``principal_of`` finds it."""
        scope["state"]["principal"] = await self._callers.authenticate(scope["headers"])
        await self._app(scope, receive, send)


async def principal_of(request: AnyRequest) -> Principal:
    """Return who sent this request (a Litestar dependency)."""
    principal = request.scope["state"]["principal"]
    assert isinstance(principal, Principal)  # noqa: S101 - Authentication ran first, or the wiring is wrong
    return principal


async def strict_request(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Guard: refuse unknown or repeated query parameters and bodies that are not JSON."""
    names = [name for name, _ in parse_qsl(connection.scope["query_string"].decode("latin-1"), keep_blank_values=True)]
    known = handler.parsed_fn_signature.parameters.keys() - connection.path_params.keys() - {"data", "request"}
    problems = [FieldError(f"?{name}", "is not a parameter here") for name in sorted(set(names) - known)]
    problems += [FieldError(f"?{name}", "is given twice") for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise InvalidRequest(errors=problems)
    kind = connection.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind not in {"application/json", "application/merge-patch+json"}:
        raise UnsupportedMediaType


# Pages


def cursor_of(position: tuple[float, str]) -> str:
    """Return an opaque cursor for a row's (created_at, id)."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode().rstrip("=")


def position_of(cursor: str | None) -> tuple[float, str] | None:
    """Return what ``cursor_of`` was given (InvalidRequest for anything that it did not make)."""
    if cursor is None:
        return None
    try:
        at, row_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return float(at), str(row_id)
    except (ValueError, TypeError):
        raise InvalidRequest(errors=[FieldError("?cursor", "is not a cursor of this list")]) from None


def checked_limit(limit: int) -> int:
    """Return a page size from 1 to 200 (InvalidRequest)."""
    if not 1 <= limit <= 200:
        raise InvalidRequest(errors=[FieldError("?limit", "must be from 1 to 200")])
    return limit


def page(data: Sequence[Mapping[str, Any]], next_position: tuple[float, str] | None) -> dict[str, Any]:
    """Return a list answer."""
    return {"data": list(data), "next_cursor": cursor_of(next_position) if next_position is not None else None}


# Idempotency-Key


def show_once(request: AnyRequest, made_id: str) -> None:
    """Say that this answer shows a secret: it is not kept, a repeat gets 409 with the id of what was made."""
    request.scope["state"][MADE_ID] = made_id


def never_keep(request: AnyRequest) -> None:
    """Say that this answer carries a credential and repeating the request is harmless."""
    request.scope["state"][NOT_KEPT] = True


class Idempotency:
    """Middleware: a POST with an Idempotency-Key acts once per caller, key and body within 24 hours.

    Only answers below 300 are kept; after an error the key may be used again. The key is claimed by a row before the
    route runs, so of two at once one waits its turn with 409 ``conflict``.
    """

    def __init__(self, app: ASGIApp, database: Database) -> None:
        """Wrap the routes; must stand behind ``Authentication``."""
        self._app = app
        self._database = database

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replay, refuse, or run and keep."""
        key = dict(scope["headers"]).get(b"idempotency-key")
        if key is None or scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        if not 0 < len(key) <= LONGEST_KEY:
            raise InvalidRequest("Idempotency-Key must have 1 to 255 characters")
        body = await _read(receive)
        principal: Principal = scope["state"]["principal"]
        claim = _new_claim(principal, key, scope, body)
        kept = await self._claim(claim)
        if kept is not None:
            await _replay(kept, send)
            return
        await self._run(claim, scope, body, send)

    async def _run(self, claim: IdempotentAnswer, scope: Scope, body: bytes, send: Send) -> None:
        answer = _Captured(send)
        try:
            await self._app(scope, _receive_of(body), answer)
        finally:
            await self._keep(claim, scope["state"], answer)

    async def _claim(self, claim: IdempotentAnswer) -> IdempotentAnswer | None:
        """Claim the key; return the kept answer of an earlier request, or raise what stands against both."""

        def work(session: Session) -> IdempotentAnswer | None:
            claim.created_at = now(session)
            same = (
                IdempotentAnswer.caller_id == claim.caller_id,
                IdempotentAnswer.key_digest == claim.key_digest,
            )
            found = session.exec(select(IdempotentAnswer).where(*same)).first()
            if found is not None and _is_over(found, claim.created_at):
                session.delete(found)
                session.flush()
                found = None
            if found is None:
                session.add(claim)
                session.flush()
            return found

        try:
            found = await self._database.transaction(work)
        except IntegrityError:
            raise Conflict("a request with this Idempotency-Key is still running") from None
        if found is None:
            return None
        if found.request_digest != claim.request_digest:
            raise IdempotencyConflict("This Idempotency-Key was used with another request")
        if found.made_id is not None:
            raise IdempotencyConflict("The first answer showed a secret and is not kept", made_id=found.made_id)
        if found.status is None:
            raise Conflict("a request with this Idempotency-Key is still running")
        return found

    async def _keep(self, claim: IdempotentAnswer, state: Mapping[str, Any], answer: _Captured) -> None:
        mine = col(IdempotentAnswer.id) == claim.id
        good = answer.status is not None and answer.status < 300 and not state.get(NOT_KEPT)
        if not good:
            await self._database.transaction(lambda session: session.execute(sa.delete(IdempotentAnswer).where(mine)))
            return
        made_id = state.get(MADE_ID)
        text = None if made_id is not None else answer.body.decode()
        values = {"status": answer.status, "made_id": made_id, "answer": text}
        update = sa.update(IdempotentAnswer).where(mine).values(**values)
        await self._database.transaction(lambda session: session.execute(update))


class _Captured:
    """Passes an answer on and keeps a copy."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.body += message["body"]
        await self._send(message)


def _new_claim(principal: Principal, key: bytes, scope: Scope, body: bytes) -> IdempotentAnswer:
    request = b"\n".join([scope["raw_path"], scope["query_string"], body])
    return IdempotentAnswer(
        id=new_id("idk"),
        caller_id=principal.caller_id,
        key_digest=hashlib.sha256(key).hexdigest(),
        request_digest=hashlib.sha256(request).hexdigest(),
        created_at=0.0,
    )


def _is_over(found: IdempotentAnswer, at: float) -> bool:
    age = at - found.created_at
    return age > KEPT_SECONDS or (found.status is None and age > IN_PROGRESS_SECONDS)


async def _read(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body
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
