"""The limits on a request's head, against raw sockets: client libraries would repair what is sent here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
import uvicorn

from broker.listening import MAX_HEAD_BYTES, BoundedHttp
from tests.flows.rig import reserved_socket

START = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"


class Hurried(BoundedHttp):
    """The same with little patience."""

    head_seconds = 0.3


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the length of the body, after a while where the path asks for it."""
    length, more = 0, True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        length, more = length + len(event.get("body", b"")), event.get("more_body", False)
    await asyncio.sleep(0.8 if scope["path"] == "/slow" else 0)
    body = str(length).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def served(protocol: type[asyncio.Protocol] = BoundedHttp, app: Any = echo) -> AsyncIterator[int]:
    """Serve ``app``; yield the port."""
    listener = reserved_socket()
    config = uvicorn.Config(app, http=protocol, access_log=False, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined] # the test owns them
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110 - uvicorn has a flag, no event
        await asyncio.sleep(0.005)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def said(
    port: int, pieces: Iterable[bytes], *, pause_seconds: float = 0.0, patience_seconds: float = 2.0
) -> bytes:
    """Send pieces until the server hangs up or they are over; return all that it says in that time at most."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_seconds)
    heard = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(patience_seconds):
            while piece := await reader.read(65_536):
                heard += piece
            heard += b"<closed>"
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return heard


def endless(start: bytes, piece: bytes) -> Iterable[bytes]:
    """Yield a beginning and then 300 pieces."""
    yield start
    for _ in range(300):
        yield piece


@pytest.mark.parametrize(
    "pieces",
    [
        endless(b"GET /", b"a" * 1024),
        endless(START + b"X-A: ", b"a" * 1024),
        endless(START, b"X-A: " + b"a" * 1024 + b"\r\n"),
        endless(CHUNKED + b"0\r\nX-A: ", b"a" * 1024),
        endless(CHUNKED + b"0\r\n", b"X-A: " + b"a" * 1024 + b"\r\n"),
        endless(CHUNKED + b"1;", b"a" * 1024),
        [START + b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n"],
    ],
    ids=["target", "field", "fields", "trailer", "trailers", "chunk extension", "all at once"],
)
async def test_an_endless_head_is_refused_and_the_server_goes_on(pieces: Iterable[bytes]) -> None:
    async with served() as port:
        heard = await said(port, pieces, pause_seconds=0.001)
        assert b"200 OK" not in heard
        assert heard == b"" or b" 400 " in heard
        assert b"200 OK" in await said(port, [START + b"Content-Length: 1\r\nConnection: close\r\n\r\n", b"a"])


async def test_a_long_head_within_the_limit_and_a_long_body_pass() -> None:
    size = 600_000
    head = START + b"Connection: close\r\nX-A: " + b"a" * 60_000 + b"\r\nContent-Length: " + str(size).encode()
    async with served() as port:
        assert (await said(port, [head + b"\r\n\r\n", b"b" * size])).endswith(b"\r\n\r\n600000<closed>")
        one_by_one = [CHUNKED, *[b"1\r\nb\r\n" * 1000] * 30, b"0\r\n\r\n"]
        assert b"\r\n\r\n30000" in await said(port, one_by_one)


async def test_each_request_of_a_connection_has_a_limit_of_its_own() -> None:
    one = START + b"X-A: " + b"a" * 40_000 + b"\r\nContent-Length: 0\r\n\r\n"
    async with served() as port:
        assert (await said(port, [one] * 5, pause_seconds=0.05)).count(b"200 OK") == 5


@pytest.mark.parametrize("beginning", [b"", b"G", START])
async def test_a_head_that_does_not_end_in_time_closes_the_connection(beginning: bytes) -> None:
    async with served(Hurried) as port:
        assert await said(port, [beginning]) == b"<closed>"
        complete = START + b"Content-Length: 0\r\n\r\n"
        heard = await said(port, [complete, beginning], pause_seconds=0.05) if beginning else b"200 OK<closed>"
        assert b"200 OK" in heard
        assert heard.endswith(b"<closed>")


async def test_the_clock_of_a_second_head_does_not_cut_the_first_answer() -> None:
    first = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    async with served(Hurried) as port:
        heard = await said(port, [first, b"GET / HT"], pause_seconds=0.05)
        assert b"200 OK" in heard
        assert heard.endswith(b"<closed>")


async def pieces(scope: Any, _receive: Any, send: Any) -> None:
    """Answer in the way that the path names."""
    fields = [(b"x-one", b"1"), (b"content-length", b"4")]
    fields += [(b"Connection", b"close")] if scope["path"] == "/closing" else []
    fields = [(b"x-one", b"1\r\nx-two: 2"), *fields] if scope["path"] == "/forged" else fields
    fields = fields[:1] if scope["path"] == "/unmeasured" else fields
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    if scope["path"] == "/pieces":
        await send({"type": "http.response.body", "body": b"bo", "more_body": True})
    if scope["path"] != "/nothing":
        await send({"type": "http.response.body", "body": b"body" if scope["path"] != "/pieces" else b"dy"})


@pytest.mark.parametrize(
    ("path", "status", "rest"),
    [
        ("GET /whole", b"200 OK", b"content-length: 4\r\n\r\nbody"),
        ("GET /pieces", b"200 OK", b"content-length: 4\r\n\r\nbody"),
        ("GET /closing", b"200 OK", b"connection: close\r\n\r\nbody<closed>"),
        ("GET /unmeasured", b"200 OK", b"transfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"),
        ("HEAD /whole", b"200 OK", b"content-length: 4\r\n\r\n"),
        ("GET /forged", b"", b"<closed>"),
        ("GET /nothing", b"500 ", b"Internal Server Error<closed>"),
    ],
)
async def test_an_answer_is_the_same_however_its_parts_come(path: str, status: bytes, rest: bytes) -> None:
    async with served(app=pieces) as port:
        heard = await said(port, [f"{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()], patience_seconds=0.3)
    assert heard.startswith(b"HTTP/1.1 " + status if status else rest)
    assert heard.endswith(rest)
    assert b"x-two" not in heard


async def test_a_connection_serves_one_request_after_the_other() -> None:
    request = START + b"Content-Length: 3\r\n\r\nabc"
    async with served(Hurried) as port:
        heard = await said(port, [request] * 3 + [request * 2], pause_seconds=0.2)
    assert heard.count(b"\r\n\r\n3") == 5
