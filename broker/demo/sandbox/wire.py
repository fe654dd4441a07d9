"""What goes over the sandbox's wire: a request read whole, an answer, and the connection that can be made to fail."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias
from urllib.parse import unquote_plus

import msgspec

from broker.demo.sandbox.options import Fault, Visit

LARGEST_BODY: Final = 1 << 20
DROP: Final = "sandbox.drop"  # our own ASGI extension: a function that hangs up
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


@dataclass(slots=True)
class Answer:
    """What goes back over the wire. ``document`` is the JSON body, if it is one."""

    status: int
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)
    location: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(slots=True)
class Request:
    """One HTTP request, read whole. ``parameters`` are the query at ``/authorize``, else the form."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    malformed: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)
    visit: Visit = field(default_factory=lambda: Visit(number=0, at=0, endpoint=""))
    fault: Fault | None = None


def json_answer(document: Any, status: int = 200, headers: Sequence[tuple[str, str]] = ()) -> Answer:  # noqa: ANN401 - any JSON
    """Make an answer of JSON that nobody stores."""
    known = [*headers] or [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
    kept = document if isinstance(document, dict) else {}
    return Answer(status, msgspec.json.encode(document), known, document=kept)


def refusal(status: int, error: str, *headers: tuple[str, str]) -> Answer:
    """Make an error answer in the manner of OAuth; the code is ours, never input."""
    return json_answer({"error": error}, status, [("Content-Type", "application/json"), *headers])


def basic_credentials(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Read HTTP Basic, both parts form-encoded (RFC 6749 2.3.1; Authlib leaves ``+`` as it is). None for anything else."""
    scheme, _, encoded = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        client_id, _, client_secret = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return unquote_plus(client_id), unquote_plus(client_secret)


def bearer_token(request: Request) -> str | None:
    """Return the token of the Authorization header (RFC 6750 2.1), the only place where one is looked for."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return value if scheme.lower() == "bearer" and value else None


class Channel:
    """The caller's connection for one request. ``gone`` once the caller was seen to hang up."""

    def __init__(
        self, receive: Receive, send: Send, drop: Callable[[bool], None] | None, date: Callable[[], str]
    ) -> None:
        self.gone = False
        self._receive = receive
        self._send = send
        self._drop = drop
        self._date = date

    async def stays(self, seconds: float) -> bool:
        """Wait; False as soon as the caller hangs up."""
        if seconds <= 0:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hang_up()
        return not self.gone

    async def answer(self, answer: Answer) -> None:
        """Send the whole answer."""
        await self._begin(answer)
        await self._send({"type": "http.response.body", "body": answer.body})

    async def cut(self, answer: Answer) -> None:
        """Send all headers and half of the body, then hang up."""
        await self._begin(answer)
        half = answer.body[: len(answer.body) // 2]
        await self._send({"type": "http.response.body", "body": half, "more_body": True})
        await self.drop(reset=False)

    async def drop(self, *, reset: bool) -> None:
        """Hang up. RuntimeError under a server that does not hand its connection in (see ``DroppableProtocol``)."""
        if self._drop is None:
            raise RuntimeError("this server cannot drop a connection: use serve_sandbox")
        self._drop(reset)
        await self._hang_up()  # an application that returns without an answer would be given one by the server

    async def _begin(self, answer: Answer) -> None:
        headers = [*answer.headers, ("content-length", str(len(answer.body))), ("date", self._date())]
        if answer.location is not None:
            headers.append(("location", answer.location))
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": answer.status, "headers": raw})

    async def _hang_up(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass  # what is left of the request
        self.gone = True


async def inflict(wanted: Fault, channel: Channel) -> bool:
    """Do what the fault says at this point; True when the request goes on as usual."""
    if wanted.kind == "stall":
        return await channel.stays(wanted.seconds)
    if wanted.kind == "drop":
        await channel.drop(reset=wanted.reset)
        return False
    if wanted.kind == "answer":
        body = wanted.body.encode() if isinstance(wanted.body, str) else msgspec.json.encode(wanted.body)
        headers = {
            "content-type": "application/json",
            **{name.lower(): value for name, value in wanted.headers.items()},
        }
        await channel.answer(Answer(wanted.status, body, list(headers.items())))
        return False
    return True


async def read_request(scope: Message, receive: Receive) -> Request | None:
    """Read the request whole; None when it is too large or its sender left before its end: half a request has no effect."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY or message["type"] == "http.disconnect":
            return None
        if not message.get("more_body"):
            break
    names = [name.decode("latin-1") for name, _ in scope["headers"]]
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    query = scope["query_string"].decode("latin-1")
    return Request(scope["method"], scope["path"], query, headers, bytes(body), names.count("authorization") > 1)
