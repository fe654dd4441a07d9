"""What of HTTP is let in, against raw sockets: client libraries would repair what is sent here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any, Literal

import pytest
import pytest_asyncio
import uvicorn

from broker.listening import (
    COUNT_REFUSED,
    GONE,
    LEAVING,
    LOOK_SECONDS,
    MAX_HEAD_BYTES,
    RAW_TARGET,
    BoundedHttp,
    Exchange,
)
from tests.flows.rig import reserved_socket

START = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"


class Hurried(BoundedHttp):
    """The same with little patience."""

    head_seconds = 0.3
    body_seconds = 0.3


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
async def served(
    protocol: type[asyncio.Protocol] = BoundedHttp, app: Any = echo, lifespan: Literal["on", "off"] = "off"
) -> AsyncIterator[int]:
    """Serve ``app``; yield the port."""
    listener = reserved_socket()
    config = uvicorn.Config(
        app, http=protocol, access_log=False, log_config=None, lifespan=lifespan, proxy_headers=False
    )
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


async def test_a_caller_of_http_1_0_gets_no_chunks() -> None:
    async with served(app=pieces) as port:
        for path, length in (
            ("/unmeasured", b""),
            ("/whole", b"content-length: 4\r\n"),
            ("/pieces", b"content-length: 4\r\n"),
        ):
            heard = await said(port, [f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode()])
            assert heard.endswith(b"x-one: 1\r\n" + length + b"connection: close\r\n\r\nbody<closed>")


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


# --- Requests that could mean two things: sections 1 and 5 of the list of threats, U2, H4, H5, H6


async def told(scope: Any, receive: Any, send: Any) -> None:
    """Answer with what came: method, target, fields and body, each on a line."""
    body, more = b"", True
    while more:
        event = await receive()
        body, more = body + event.get("body", b""), event.get("more_body", False)
    fields = [name + b"=" + value for name, value in scope["headers"]]
    said_back = b"\n".join([scope["method"].encode(), scope[RAW_TARGET], b",".join(fields), body])
    headers = [(b"content-length", str(len(said_back)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": said_back})


def framed(*fields: str, body: bytes = b"", start: str = "POST /x HTTP/1.1", host: str = "Host: x") -> bytes:
    """Return a request of these fields, written as they are."""
    return "\r\n".join([start, *([host] if host else []), *fields, "", ""]).encode("latin-1") + body


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
THREE = b"3\r\nabc\r\n0\r\n\r\n"
TE = "Transfer-Encoding: chunked"
FRAMING = {
    "both lengths": framed("Content-Length: 3", TE, body=THREE),
    "both lengths, the other way round": framed(TE, "Content-Length: 3", body=THREE),
    "two lengths": framed("Content-Length: 3", "Content-Length: 4", body=b"abcd"),
    "two equal lengths": framed("Content-Length: 3", "Content-Length: 3", body=b"abc"),
    "two lengths in one field": framed("Content-Length: 3, 3", body=b"abc"),
    "a length with a sign": framed("Content-Length: +3", body=b"abc"),
    "a negative length": framed("Content-Length: -3", body=b"abc"),
    "a hexadecimal length": framed("Content-Length: 0x3", body=b"abc"),
    "an underscore in a length": framed("Content-Length: 1_0", body=b"abc"),
    "a length beyond 64 bits": framed("Content-Length: 18446744073709551619", body=b"abc"),
    "an empty length": framed("Content-Length: ", body=b"abc"),
    "identity": framed("Transfer-Encoding: identity", body=THREE),
    "identity, chunked": framed("Transfer-Encoding: identity, chunked", body=THREE),
    "gzip, chunked": framed("Transfer-Encoding: gzip, chunked", body=THREE),
    "chunked, gzip": framed("Transfer-Encoding: chunked, gzip", body=THREE),
    "chunked, chunked": framed("Transfer-Encoding: chunked, chunked", body=THREE),
    "chunked twice": framed(TE, TE, body=THREE),
    "an empty coding": framed("Transfer-Encoding: , chunked", body=THREE),
    "a coding with a parameter": framed("Transfer-Encoding: chunked;a=b", body=THREE),
    "a quoted coding": framed('Transfer-Encoding: "chunked"', body=THREE),
    "another coding": framed("Transfer-Encoding: xchunked", body=THREE),
    "a vertical tab before the coding": framed("Transfer-Encoding:\x0bchunked", body=THREE),
    "a vertical tab after the coding": framed("Transfer-Encoding: chunked\x0b", body=THREE),
    "a space after the name": framed("Transfer-Encoding : chunked", body=THREE),
    "a space before the name": framed(f" {TE}", body=THREE),
    "a folded coding": framed("Transfer-Encoding:\r\n chunked", body=THREE),
    "a coding in HTTP/1.0": framed(TE, body=THREE, start="POST /x HTTP/1.0"),
    "a chunk with a sign": framed(TE, body=b"+3\r\nabc\r\n0\r\n\r\n"),
    "a chunk with 0x": framed(TE, body=b"0x3\r\nabc\r\n0\r\n\r\n"),
    "a chunk that ends in a line feed": framed(TE, body=b"3\nabc\n0\n\n"),
    "a chunk that is longer than it says": framed(TE, body=b"2\r\nabc\r\n0\r\n\r\n"),
    "a chunk beyond 64 bits": framed(TE, body=b"10000000000000003\r\nabc\r\n0\r\n\r\n"),
}
HEADS = {
    "absolute form": framed(start="GET http://evil.test/x HTTP/1.1"),
    "absolute form in capitals": framed(start="GET HTTP://x/x HTTP/1.1"),
    "absolute form without a path": framed(start="GET http://evil.test HTTP/1.1"),
    "authority form": framed(start="GET evil.test:443 HTTP/1.1"),
    "asterisk form": framed(start="OPTIONS * HTTP/1.1"),
    "no slash": framed(start="GET x HTTP/1.1"),
    "backslashes": framed(start="GET \\\\evil.test\\x HTTP/1.1"),
    "a fragment": framed(start="GET /x#y HTTP/1.1"),
    "a fragment after the query": framed(start="GET /x?y#z HTTP/1.1"),
    "a space in the target": framed(start="GET /x y HTTP/1.1"),
    "a raw byte in the target": framed(start="GET /x\xff HTTP/1.1"),
    "a NUL in the target": framed(start="GET /x\0 HTTP/1.1"),
    "CONNECT": framed(start="CONNECT evil.test:443 HTTP/1.1"),
    "CONNECT to a path": framed(start="CONNECT /x HTTP/1.1"),
    "TRACE": framed(start="TRACE /x HTTP/1.1"),
    "HTTP/0.9": b"GET /x\r\n\r\n",
    "HTTP/2.0": framed(start="GET /x HTTP/2.0"),
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no Host": framed(host="X-A: 1"),
    "no Host in HTTP/1.0": framed(host="X-A: 1", start="GET /x HTTP/1.0"),
    "two Hosts": framed("Host: y"),
    "two equal Hosts": framed("HOST: x"),
    "an empty Host": framed(host="Host:"),
    "user information in Host": framed(host="Host: a@evil.test"),
    "a comma in Host": framed(host="Host: x, evil.test"),
    "a path in Host": framed(host="Host: x/y"),
    "a word in Host's port": framed(host="Host: x:http"),
    "a scheme in Host": framed(host="Host: http://x"),
    "a letter beyond ASCII in Host": framed(host="Host: \xe9.test"),
    "a NUL in a value": framed("X-A: 1\x002"),
    "a carriage return in a value": framed("X-A: 1\rX-B: 2"),
    "a line feed in a value": framed("X-A: 1\nX-B: 2"),
    "a folded value": framed("X-A: 1", " 2"),
    "a space in a name": framed("X A: 1"),
    "a name that begins with a colon": framed(":authority: evil.test"),
    "no name": framed(": 1"),
    "no colon": framed("X-A"),
}


class Told:
    """The application ``told``, and the paths that it was asked for."""

    def __init__(self) -> None:
        """Begin with none; the port is known when it is served."""
        self.seen: list[str] = []
        self.port = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Note the path, and answer unless the body never comes whole."""
        self.seen.append(scope["path"])
        with contextlib.suppress(KeyError):
            await told(scope, receive, send)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_server() -> AsyncIterator[Told]:
    """Serve one application for all the rows."""
    app = Told()
    async with served(app=app) as app.port:
        yield app


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("request_bytes", [*FRAMING.values(), *HEADS.values()], ids=[*FRAMING, *HEADS])
async def test_a_request_that_could_mean_two_things_is_refused_and_nothing_after_it_is_read(
    one_server: Told, request_bytes: bytes
) -> None:
    heard = await said(one_server.port, [request_bytes + SMUGGLED])
    assert heard.startswith(b"HTTP/1.1 400 "), heard
    assert b"\r\nx-broker-error: invalid_request\r\n" in heard
    assert heard.count(b"HTTP/1.1 ") == 1
    assert heard.endswith(b"<closed>")
    assert "/smuggled" not in one_server.seen


@pytest.mark.parametrize(
    ("request_bytes", "told_back"),
    [
        (framed(start="GET /a%2Fb/./..//x?q=a+b%20c&q=?/ HTTP/1.1"), b"GET\n/a%2Fb/./..//x?q=a+b%20c&q=?/\nhost=x\n"),
        (framed(host="Host: api_1.good.test:8443", start="GET / HTTP/1.1"), b"GET\n/\nhost=api_1.good.test:8443\n"),
        (framed(host="Host: [::1]:80", start="DELETE / HTTP/1.1"), b"DELETE\n/\nhost=[::1]:80\n"),
        (framed(host="Host:\tx \t", start="GET / HTTP/1.1"), b"GET\n/\nhost=x \t\n"),
        (framed("Content-Length: 003", body=b"abc"), b"POST\n/x\nhost=x,content-length=003\nabc"),
        (framed("Transfer-Encoding: Chunked", body=THREE), b"POST\n/x\nhost=x,transfer-encoding=Chunked\nabc"),
        (framed(TE, body=b"3;a=b\r\nabc\r\n0\r\n\r\n"), b"POST\n/x\nhost=x,transfer-encoding=chunked\nabc"),
        (framed("X-A: caf\xe9", start="GET / HTTP/1.1"), b"GET\n/\nhost=x,x-a=caf\xe9\n"),
        (framed(start="GET / HTTP/1.0"), b"GET\n/\nhost=x\n"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_of_one_meaning_comes_through_byte_for_byte(
    one_server: Told, request_bytes: bytes, told_back: bytes
) -> None:
    heard = await said(one_server.port, [request_bytes], patience_seconds=0.2)
    assert heard.startswith(b"HTTP/1.1 200 ")
    assert heard.removesuffix(b"<closed>").endswith(b"\r\n\r\n" + told_back)


async def test_trailers_do_not_become_fields_of_the_head() -> None:
    trailers = b"3\r\nabc\r\n0\r\nAuthorization: Bearer x\r\nHost: evil.test\r\n\r\n"
    slow = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    async with served(app=told) as port:
        heard = await said(port, [slow + framed(TE, body=trailers)], patience_seconds=0.3)
    assert heard.endswith(b"POST\n/x\nhost=x,transfer-encoding=chunked\nabc")


async def test_a_refused_request_does_not_answer_an_earlier_one() -> None:
    slow = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    async with served() as port:
        assert await said(port, [slow, HEADS["no Host"]], pause_seconds=0.1) == b"<closed>"
        assert await said(port, [slow + slow + HEADS["no Host"]]) == b"<closed>"
        assert (await said(port, [slow, slow[:-2]], pause_seconds=0.1)).startswith(b"HTTP/1.1 200 ")


UPGRADE = ("Connection: Upgrade", "Upgrade: h2c")


@pytest.mark.parametrize("fields", [UPGRADE, ("Connection: keep-alive, upgrade", "Upgrade: websocket")])
async def test_a_request_for_an_upgrade_is_served_without_it_and_is_the_last_one(fields: tuple[str, ...]) -> None:
    async with served(app=told) as port:
        for more in ([], ["Content-Length: 0"]):
            head = framed(*fields, *more, start="GET /x HTTP/1.1")
            heard = await said(port, [head + SMUGGLED, SMUGGLED], pause_seconds=0.1)
            assert heard.startswith(b"HTTP/1.1 200 ")
            assert heard.count(b"HTTP/1.1 ") == 1
            assert b"smuggled" not in heard
            assert heard.endswith(b"<closed>")


@pytest.mark.parametrize("framing", ["Content-Length: 35", TE])
async def test_a_request_for_an_upgrade_with_a_body_is_refused_for_its_body_would_be_the_next_request(
    framing: str,
) -> None:
    async with served(app=told) as port:
        heard = await said(port, [framed(*UPGRADE, framing), SMUGGLED], pause_seconds=0.1)
    assert heard.startswith(b"HTTP/1.1 501 ")
    assert b"upgrade_unsupported" in heard
    assert heard.count(b"HTTP/1.1 ") == 1
    assert heard.endswith(b"<closed>")


async def test_what_is_refused_is_counted() -> None:
    counted: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await told(scope, receive, send)
            return
        await receive()
        scope["state"][COUNT_REFUSED] = counted.append
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async with served(app=app, lifespan="on") as port:
        for request_bytes in (framed(), HEADS["no Host"], FRAMING["two lengths"], framed(*UPGRADE, TE)):
            await said(port, [request_bytes], patience_seconds=0.2)
    assert counted == [400, 400, 501]


# --- Clients that leave


class Lasting:
    """An application whose answers last until their client is gone; it never calls ``receive``."""

    def __init__(self, *, ticks: bool = False) -> None:
        """Begin with no request. ``ticks``: it sends on and on, else it is quiet after its first word."""
        self.ticks = ticks
        self.begun: list[str] = []
        self.gone: list[str] = []
        self.ended = asyncio.Event()

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        """Answer with a first word and wait."""
        left = asyncio.Event()
        self.begun.append(scope["path"])
        scope[GONE].append(lambda: self.gone.append(scope["path"]))
        scope[GONE].append(left.set)
        if scope["path"] != "/silent":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"word", "more_body": True})
        while not left.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(left.wait(), 0.02 if self.ticks else None)
            if self.ticks:
                await send({"type": "http.response.body", "body": b"tick", "more_body": True})
        await send({"type": "http.response.body", "body": b"to nobody", "more_body": False})
        self.ended.set()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.mark.parametrize("ticks", [True, False], ids=["talking", "quiet"])
async def test_a_client_that_leaves_is_noticed_behind_its_pipelined_requests_and_those_are_not_begun(
    caplog: pytest.LogCaptureFixture, *, ticks: bool
) -> None:
    app = Lasting(ticks=ticks)
    async with served(app=app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get("/first"))
        await reader.readuntil(b"word")
        writer.write(get("/second") + get("/third"))
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        async with asyncio.timeout(3):
            await app.ended.wait()
    assert app.begun == app.gone == ["/first"]
    warned = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert warned == []  # asyncio and uvicorn log what is written to nobody


async def test_a_client_that_leaves_amid_its_body_is_noticed_though_nobody_reads_that() -> None:
    app = Lasting()
    async with served(app=app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /silent HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 200_000)
        await writer.drain()
        await asyncio.sleep(0.2)
        assert app.begun == ["/silent"]
        assert app.gone == []
        writer.transport.abort()
        async with asyncio.timeout(3):
            await app.ended.wait()
    assert app.gone == ["/silent"]


async def test_a_client_that_waits_behind_a_body_that_nobody_reads_is_not_taken_for_gone() -> None:
    app = Lasting()
    async with served(app=app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /first HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 200_000)
        await reader.readuntil(b"word")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(app.ended.wait(), 2 * LOOK_SECONDS + 0.2)
        assert not reader.at_eof()
        writer.transport.abort()


async def test_of_an_answer_that_is_whole_nobody_is_told_that_its_client_left() -> None:
    told_of: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope[GONE].append(lambda: told_of.append(scope["path"]))
        await echo(scope, receive, send)

    async with served(app=app) as port:
        assert (await said(port, [get("/a")], patience_seconds=0.1)).endswith(b"0")
        await asyncio.sleep(0.1)
    assert told_of == []


async def test_the_server_ends_though_clients_left_behind_their_pipelined_requests() -> None:
    app = Lasting(ticks=True)
    async with asyncio.timeout(5):
        async with served(app=app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get("/first"))
            await reader.readuntil(b"word")
            writer.write(get("/second"))
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.transport.abort()
    assert app.begun == ["/first"]


@pytest.mark.parametrize("whole", [True, False])
async def test_a_status_that_is_nobodys_is_sent_without_a_reason(*, whole: bool) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 999, "headers": [(b"content-length", b"2")]})
        if not whole:
            await send({"type": "http.response.body", "body": b"n", "more_body": True})
        await send({"type": "http.response.body", "body": b"no" if whole else b"o"})

    async with served(app=app) as port:
        heard = await said(port, [get("/a")], patience_seconds=0.2)
    assert heard.startswith(b"HTTP/1.1 999 \r\n")
    assert heard.endswith(b"content-length: 2\r\n\r\nno")


# --- bodies that stop coming


async def test_a_body_that_stops_coming_ends_its_connection_and_one_that_comes_slowly_does_not() -> None:
    async with served(Hurried) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(START + b"Content-Length: 6\r\n\r\n")
        for _ in range(6):
            await asyncio.sleep(0.15)
            writer.write(b"x")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert await reader.readexactly(1) == b"6"
        writer.write(START + b"Content-Length: 6\r\n\r\nxxx")
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()


async def test_a_body_that_we_do_not_read_is_waited_for() -> None:
    reading = asyncio.Event()

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await reading.wait()
        await echo(scope, receive, send)

    async with served(Hurried, late) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(START + b"Content-Length: 1000000\r\n\r\n" + b"x" * 999_999)
        await asyncio.sleep(0.8)
        reading.set()
        await asyncio.sleep(0.1)
        writer.write(b"x")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()


# --- a process that is about to end


class Leaving:
    """Says that the process is about to end."""

    begun = False


async def test_from_then_on_each_answer_ends_its_connection_and_what_was_sent_is_served() -> None:
    leaving = Leaving()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await echo(scope, receive, send)
            return
        for kind in ("startup", "shutdown"):
            await receive()
            scope["state"][LEAVING] = leaving
            await send({"type": f"lifespan.{kind}.complete"})

    request = START + b"Content-Length: 0\r\n\r\n"
    async with served(app=app, lifespan="on") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        assert b"connection: close" not in await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(1) == b"0"
        other_writer.write(request[:20])
        await asyncio.sleep(0.1)
        leaving.begun = True
        writer.write(request)
        heard = await reader.read()
        assert b"connection: close" in heard
        assert heard.endswith(b"\r\n\r\n0")
        writer.close()
        ending = asyncio.create_task(_rest_of(other_reader, other_writer, request[20:]))
    assert (await ending).startswith(b"HTTP/1.1 200 ")


async def _rest_of(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rest: bytes) -> bytes:
    """Send the rest of a request once the server has begun to end; return what comes."""
    await asyncio.sleep(0.5)
    writer.write(rest)
    heard = await reader.read()
    writer.close()
    return heard


class Idling(BoundedHttp):
    """Lets a connection be idle for a fifth of a second."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.timeout_keep_alive = 0.2  # type: ignore[assignment] # uvicorn says int, and counts with it


async def test_an_idle_connection_ends_so_long_after_its_last_answer_and_not_after_its_first() -> None:
    async with served(Idling) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = asyncio.get_running_loop().time()
        for _ in range(5):  # longer than it may be idle, and never that long at once
            writer.write(get("/"))
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n0")
            await asyncio.sleep(0.1)
        assert not reader.at_eof()
        assert await asyncio.wait_for(reader.read(), 2) == b""
        assert asyncio.get_running_loop().time() - began >= 0.6
        writer.close()


class Straight:
    """An application with a lane for one path, that answers whole."""

    def __init__(self) -> None:
        self.long_way: list[str] = []

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        self.long_way.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"long"})

    def lane(self, method: bytes, target: bytes, fields: Any) -> Any:
        assert (b"host", b"x") in fields
        return self.serve if (method, target) == (b"GET", b"/lane") else None

    async def serve(self, exchange: Exchange) -> None:
        """Answer with what came."""
        exchange.request_id = b"req_1"
        message = await exchange.receive()
        assert message["type"] == "http.request"
        await exchange.answer(200, b"x-way: lane\r\n", b"lane")


async def test_a_lane_serves_what_it_is_for_and_the_application_everything_else() -> None:
    app = Straight()
    async with served(app=app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get("/lane") + get("/other") + get("/lane"))
        answers = [await reader.readuntil(end) for end in (b"\r\n\r\nlane", b"long", b"\r\n\r\nlane")]
        writer.close()
    assert [b"x-way: lane\r\ncontent-length: 4\r\nx-request-id: req_1\r\n\r\nlane" in one for one in answers] == [
        True,
        False,
        True,
    ]
    assert app.long_way == ["/other"]


@pytest.mark.parametrize(
    ("request_line", "end"),
    [(b"GET /lane HTTP/1.1\r\nConnection: close\r\n", b"lane<closed>"), (b"GET /lane HTTP/1.0\r\n", b"lane<closed>")],
)
async def test_a_lanes_answer_that_is_the_last_of_its_connection_says_so(request_line: bytes, end: bytes) -> None:
    async with served(app=Straight()) as port:
        heard = await said(port, [request_line + b"Host: x\r\n\r\n"])
    assert b"connection: close\r\n" in heard
    assert heard.endswith(end)
    assert b"x-request-id: req_1\r\n" in heard
