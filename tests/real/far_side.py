"""The far side of a proxied call: a server that checks the credential as the vendor does, and remembers each raw request."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

import httpx2

from tests.flows.rig import reserved_socket, serving

NOT_FORWARDED = frozenset({b"connection", b"transfer-encoding", b"content-length", b"accept-encoding"})
NOT_ANSWERED = frozenset({"connection", "transfer-encoding", "content-length", "date", "keep-alive"})


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it came: the target's raw path and query, and the fields in order, names in lower case."""

    method: str
    raw_path: bytes
    raw_query: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def all_of(self, name: str) -> list[str]:
        """Return the values of each field of that name."""
        return [value.decode("latin-1") for key, value in self.fields if key == name.encode()]

    def one(self, name: str) -> str:
        """Return the value of a field; ``""`` when it is not there, an error when it is there twice."""
        values = self.all_of(name)
        assert len(values) <= 1, f"{name} came {len(values)} times"
        return values[0] if values else ""

    @property
    def path(self) -> str:
        """The decoded path, which cannot tell a slash from ``%2F``."""
        return unquote(self.raw_path.decode("ascii"))

    @property
    def query(self) -> dict[str, str]:
        """The decoded query; the last of equal names counts."""
        return dict(parse_qsl(self.raw_query.decode("ascii"), keep_blank_values=True))

    @property
    def raw(self) -> bytes:
        """All of it in one text, to be searched."""
        fields = b"\r\n".join(name + b": " + value for name, value in self.fields)
        return b"\r\n".join((self.method.encode(), self.raw_path, self.raw_query, fields, b"", self.body))


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; a body that is an iterator goes out piece by piece."""

    status: int
    body: bytes | AsyncIterator[bytes] = b""
    headers: Sequence[tuple[str, str]] = ()


def said(status: int, value: Any, headers: Mapping[str, str] | None = None) -> Answer:
    """Answer with JSON."""
    return Answer(status, json.dumps(value).encode(), [("content-type", "application/json"), *(headers or {}).items()])


Handler = Callable[[Seen], Awaitable[Answer]]
Check = Callable[[Seen], bool]


@dataclass
class FarSide:
    """A running far side. ``seen``: what came with the right credential; ``refused``: everything else."""

    base: str
    check: Check
    handler: Handler
    refusal: Answer
    open_paths: tuple[str, ...] = ()  # what the vendor answers without a credential
    seen: list[Seen] = field(default_factory=list)
    refused: list[Seen] = field(default_factory=list)

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one request (ASGI)."""
        pieces, more = [], True
        while more:
            message = await receive()
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        fields = tuple((name, value) for name, value in scope["headers"])
        seen = Seen(scope["method"], scope["raw_path"], scope["query_string"], fields, b"".join(pieces))
        may_pass = seen.path.startswith(self.open_paths) if self.open_paths else False
        if may_pass or self.check(seen):
            self.seen.append(seen)
            answer = await self.handler(seen)
        else:
            self.refused.append(seen)
            answer = self.refusal
        await _send(answer, send)


async def _send(answer: Answer, send: Any) -> None:
    headers = [(name.encode(), value.encode("latin-1")) for name, value in answer.headers]
    headers.append((b"set-cookie", b"sid=of-the-far-side; Path=/"))  # which must not come back through the broker
    if isinstance(answer.body, bytes):
        named = any(name == b"content-length" for name, _ in headers)  # as an answer to HEAD does
        headers += [] if named else [(b"content-length", str(len(answer.body)).encode())]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})
        return
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    async for piece in answer.body:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def bearer(token: str) -> Check:
    """Check for exactly one ``Authorization`` with that bearer token."""
    return lambda seen: seen.all_of("authorization") == [f"Bearer {token}"]


def address_of(listener: socket.socket) -> str:
    """Return the base URL of what listens there."""
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.asynccontextmanager
async def far_side(
    make: Callable[[str], Handler],
    *,
    check: Check,
    refusal: Answer,
    open_paths: tuple[str, ...] = (),
    listener: socket.socket | None = None,
) -> AsyncIterator[FarSide]:
    """Run a far side; ``make`` gets its address and returns what answers. ``listener``: where, if that is settled."""
    with listener or reserved_socket() as listening:
        base = address_of(listening)
        side = FarSide(base, check, make(base), refusal, open_paths)
        async with serving(side, listening):
            yield side


@contextlib.asynccontextmanager
async def handing_on(target: str) -> AsyncIterator[Handler]:
    """Give a handler that hands requests on to another server, which believes to be asked at the address in ``Host``."""
    async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:

        async def hand_on(seen: Seen) -> Answer:
            raw_target = seen.raw_path + (b"?" + seen.raw_query if seen.raw_query else b"")
            headers = [(name, value) for name, value in seen.fields if name not in NOT_FORWARDED]
            url = httpx2.URL(target).copy_with(raw_path=raw_target)
            answer = await http.request(seen.method, url, headers=headers, content=seen.body)
            kept = [(name, value) for name, value in answer.headers.multi_items() if name not in NOT_ANSWERED]
            return Answer(answer.status_code, answer.content, kept)

        yield hand_on
