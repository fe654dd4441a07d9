"""An API in trouble, on raw sockets: of each request it keeps what arrived, and by chance it does not answer as it should.

What it does to a request follows from the seed, the request's nonce and how many times that came before, so a run can be had
again. Every answer that it gives as a whole says whose it is, and which bytes its body must have.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

SHARES: Mapping[str, float] = {  # of all requests; the rest is answered as it should be
    "reset": 0.05,  # read, and then reset
    "shut": 0.03,  # read, and then closed
    "deaf": 0.02,  # reset before the body was read
    "stall": 0.03,  # no answer at all
    "error": 0.05,  # 500
    "limit": 0.04,  # 429
    "rest": 0.002,  # 429, with a Retry-After
    "early": 0.02,  # 413, and closed, before the body was read
    "garbage": 0.04,
    "two lengths": 0.02,
    "folded": 0.01,
    "endless head": 0.01,
    "cut": 0.05,  # half of the body, then closed
    "torn": 0.03,  # half of the body, then reset
    "bad chunk": 0.03,
    "freeze": 0.02,  # half of the body, then nothing
    "leave": 0.05,  # a right answer, and then the kept connection is closed without a word
    "early hints": 0.03,  # 103 before a right answer
    "drip": 0.02,  # a right answer, byte by byte in its head
}
HALVED = ("cut", "torn", "bad chunk", "freeze")
RIGHT = ("fine", "leave", "early hints", "drip")
NO_HEAD = ("reset", "shut", "deaf", "stall", "garbage", "two lengths", "folded", "endless head")
EVENTS, EVENT_SECONDS = 8, 0.02
LARGE_BYTES = 300_000


@dataclass(frozen=True)
class Arrival:
    """One request as it arrived. ``whole``: its body came to its end."""

    method: str
    fate: str
    authorization: str
    whole: bool


@dataclass
class Trouble:
    """What arrived, by nonce, and who is connected. ``seed`` None: everything is answered as it should be."""

    port: int = 0
    seed: int | None = None
    arrivals: dict[str, list[Arrival]] = field(default_factory=dict)
    busy: int = 0
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def fate(self, nonce: str) -> str:
        """Return what happens to a request that arrives now."""
        if self.seed is None:
            return "fine"
        drawn = random.Random(f"{self.seed} {nonce} {len(self.arrivals.get(nonce, ()))}").random()  # noqa: S311 - repeatable
        for name, share in SHARES.items():
            drawn -= share
            if drawn < 0:
                return name
        return "fine"

    def close_idle(self) -> None:
        """Close every connection, as a server does that restarts."""
        for writer in tuple(self.writers):
            writer.close()


def body_of(path: str, nonce: str) -> bytes:
    """Return the body of the right answer to a request."""
    if path == "/large":
        return (nonce.encode() + b" ") * (LARGE_BYTES // (len(nonce) + 1))
    if path == "/events":
        return b"".join(event(nonce, number) for number in range(EVENTS))
    return b'{"nonce": "%b"}' % nonce.encode()


def event(nonce: str, number: int) -> bytes:
    """Return one server-sent event."""
    return b"data: %d of %b\n\n" % (number, nonce.encode())


@asynccontextmanager
async def trouble() -> AsyncIterator[Trouble]:
    """Serve the API until the block ends."""
    state = Trouble()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        state.writers.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while await _one(state, reader, writer):
                    pass
        finally:
            state.writers.discard(writer)
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 20)
    async with server:
        state.port = server.sockets[0].getsockname()[1]
        yield state
        state.close_idle()


async def _one(state: Trouble, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Serve one request; False: the connection is over."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    state.busy += 1
    try:
        method, target, _ = head[0].split(" ")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        nonce = fields["x-nonce"]
        fate = state.fate(nonce)
        whole = False
        try:
            if fate not in {"deaf", "early"}:
                await _read_body(reader, fields)
                whole = True
        finally:
            arrival = Arrival(method, fate, fields.get("authorization", ""), whole)
            state.arrivals.setdefault(nonce, []).append(arrival)
        return await _answer(fate, method, target.rpartition("?")[0] or target, nonce, reader, writer)
    finally:
        state.busy -= 1


async def _read_body(reader: asyncio.StreamReader, fields: Mapping[str, str]) -> None:
    if "transfer-encoding" not in fields:
        await reader.readexactly(int(fields.get("content-length", "0")))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        await reader.readexactly(size + 2)
    await reader.readuntil(b"\r\n")


async def _answer(
    fate: str, method: str, path: str, nonce: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    body = body_of(path, nonce)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nX-From: {nonce}\r\n".encode()
    if fate in NO_HEAD:
        await _none(fate, head, body, reader, writer)
        return False
    if fate in {"error", "limit", "rest", "early"}:
        return await _refusal(fate, nonce, writer)
    if fate in HALVED:
        await _half(fate, head, body, reader, writer)
        return False
    if fate == "early hints":
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)
    await _right(fate, method, path, nonce, head, body, writer)
    return fate != "leave"


async def _right(
    fate: str, method: str, path: str, nonce: str, head: bytes, body: bytes, writer: asyncio.StreamWriter
) -> None:
    if path == "/events":
        writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for number in range(EVENTS):
            await asyncio.sleep(EVENT_SECONDS)
            writer.write(_chunk(event(nonce, number)))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
    else:
        head += b"Content-Length: %d\r\n\r\n" % len(body)
        if fate == "drip":
            for at in range(0, len(head), 7):
                writer.write(head[at : at + 7])
                await asyncio.sleep(0.001)
            head = b""
        writer.write(head + (body if method != "HEAD" else b""))
    await writer.drain()


async def _refusal(fate: str, nonce: str, writer: asyncio.StreamWriter) -> bool:
    status = {"error": b"500 Oops", "early": b"413 Too Large"}.get(fate, b"429 Slow Down")
    more = b"Retry-After: 1\r\n" if fate == "rest" else b""
    closes = b"Connection: close\r\n" if fate == "early" else b""
    body = b"no: " + nonce.encode()
    head = b"HTTP/1.1 %b\r\nX-From: %b\r\n%b%bContent-Length: %d\r\n\r\n"
    writer.write(head % (status, nonce.encode(), more, closes, len(body)) + body)
    await writer.drain()
    return fate != "early"


async def _none(
    fate: str, head: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Give no answer that could be read."""
    wrong = {
        "garbage": b"\x16\x03\x01\x00\xff\x00 this is no HTTP\r\n\r\n",
        "two lengths": head + b"Content-Length: 3\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        "folded": head + b"X-Folded: one\r\n two\r\nContent-Length: 0\r\n\r\n",
        "endless head": head + b"X-More: %b\r\n" % (b"x" * 500_000),
    }
    if fate == "stall":
        await _gone(reader)
    elif fate in {"reset", "deaf"}:
        writer.transport.abort()
    elif fate in wrong:
        writer.write(wrong[fate])
        await writer.drain()
        await _gone(reader)


async def _half(
    fate: str, head: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Give half of a right answer."""
    half = body[: len(body) // 2]
    if fate == "bad chunk":
        writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + _chunk(half) + b"zz\r\n" + body)
    else:
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + half)
    await writer.drain()
    if fate == "torn":
        await asyncio.sleep(0.01)  # a reset may overtake what was sent
        writer.transport.abort()
    elif fate in {"freeze", "bad chunk"}:
        await _gone(reader)


async def _gone(reader: asyncio.StreamReader) -> None:
    """Wait until the other side has left."""
    while await reader.read(65_536):
        pass


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
