"""The client of proxied calls over real sockets, on both event loops: exact bytes, strict answers, kept connections, ends."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.egress import Calls, NoRoom, NotSent, OutcomeUnknown, UploadStalled, WireAnswer, WireRequest
from broker.errors import BrokerError, EgressDenied, InternalError
from tests.broker.far_side import OK, FarSide, Line, Play, answering, far_side, once, silence
from tests.broker.test_egress import (
    ALLOWED,
    CANARY,
    OUTSIDE,
    Authority,
    Resolver,
    assert_says_nothing,
    development,
    free_port,
    production,
)

HOST = ((b"host", b"api.good.test"),)


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on asyncio's own event loop and on uvloop, which serves in production."""

    def run(new_loop: Callable[[], asyncio.AbstractEventLoop], **given: Any) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(test(**given))

    signature = inspect.signature(test)
    extra = inspect.Parameter("new_loop", inspect.Parameter.KEYWORD_ONLY)
    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    loops = [asyncio.new_event_loop, uvloop.new_event_loop]
    marked: Callable[..., None] = pytest.mark.parametrize("new_loop", loops, ids=["asyncio", "uvloop"])(run)
    return marked


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


class Near:
    """Our side: calls to one far side."""

    def __init__(self, calls: Calls, port: int, scheme: str) -> None:
        self.calls = calls
        self.port = port
        self.scheme = scheme

    def request(self, method: bytes = b"GET", target: bytes = b"/x", **given: Any) -> WireRequest:
        port = given.pop("port", self.port)
        headers = given.pop("headers", HOST)
        return WireRequest(self.scheme, given.pop("host", "api.good.test"), port, method, target, headers, **given)

    async def open(
        self,
        method: bytes = b"GET",
        target: bytes = b"/x",
        *,
        connect_seconds: float = 5,
        headers_seconds: float = 5,
        idle_seconds: float = 5,
        **given: Any,
    ) -> WireAnswer:
        return await self.calls.open(
            self.request(method, target, **given),
            connect_seconds=connect_seconds,
            headers_seconds=headers_seconds,
            idle_seconds=idle_seconds,
        )

    async def call(self, method: bytes = b"GET", target: bytes = b"/x", **given: Any) -> tuple[int, bytes]:
        answer = await self.open(method, target, **given)
        try:
            return answer.status, await body_of(answer)
        finally:
            await answer.aclose()


async def body_of(answer: WireAnswer, idle_seconds: float = 5) -> bytes:
    found = bytearray()
    while piece := await answer.read(idle_seconds):
        assert len(piece) <= 262_144
        found += piece
    return bytes(found)


@contextlib.asynccontextmanager
async def calls_of(
    configured: Any, resolve: Callable[[str, int], Awaitable[list[str]]] | None = None, **given: int
) -> AsyncIterator[Calls]:
    calls = Calls(configured, resolve=resolve, **given)
    try:
        yield calls
    finally:
        await calls.aclose()


@contextlib.asynccontextmanager
async def plain(play: Play) -> AsyncIterator[tuple[Near, FarSide]]:
    async with far_side(play) as far, calls_of(development(), Resolver(["127.0.0.1"])) as calls:
        yield Near(calls, far.port, "http"), far


async def pieces(*given: bytes, then: Exception | None = None) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece
    if then is not None:
        raise then


# --- the bytes that go out


@on_both_loops
async def test_the_request_line_and_the_fields_go_out_byte_for_byte() -> None:
    target = b"/repos/acme/a%2Fb/%7Eme/caf%C3%A9;v=2,3/x%2C/?"
    headers = ((b"Host", b"api.good.test"), (b"x-ODD_Name", b"a  b\xe9"), (b"X-Twice", b"1"), (b"x-twice", b""))
    async with plain(answering(OK)) as (near, far):
        assert await near.call(b"GET", target, headers=headers) == (200, b"{}")
    assert far.requests == [
        b"GET "
        + target
        + b" HTTP/1.1\r\nHost: api.good.test\r\nx-ODD_Name: a  b\xe9\r\nX-Twice: 1\r\nx-twice: \r\n\r\n"
    ]


@pytest.mark.parametrize(
    ("method", "given_body", "sent"),
    [
        (b"GET", {}, b"\r\n"),
        (b"DELETE", {}, b"\r\n"),
        (b"POST", {}, b"content-length: 0\r\n\r\n"),
        (b"PUT", {}, b"content-length: 0\r\n\r\n"),
        (b"PATCH", {"body": b""}, b"content-length: 0\r\n\r\n"),
        (b"POST", {"body": b"abc"}, b"content-length: 3\r\n\r\nabc"),
        (b"DELETE", {"body": b"abc"}, b"content-length: 3\r\n\r\nabc"),
        (b"PUT", {"body": b"y" * 300_000}, b"content-length: 300000\r\n\r\n" + b"y" * 300_000),
    ],
)
@on_both_loops
async def test_the_framing_of_a_body_that_is_known_is_its_length(method: bytes, given_body: Any, sent: bytes) -> None:
    async with plain(answering(OK)) as (near, far):
        assert await near.call(method, **given_body) == (200, b"{}")
        assert await near.call(method, **given_body) == (200, b"{}")
    assert far.requests == [method + b" /x HTTP/1.1\r\nhost: api.good.test\r\n" + sent] * 2
    assert len(far.dialled) == 1


@pytest.mark.parametrize(
    ("length", "sent"),
    [
        (5, b"content-length: 5\r\n\r\nabcde"),
        (None, b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"),
    ],
)
@on_both_loops
async def test_a_streamed_body_goes_out_by_its_length_or_in_chunks(length: int | None, sent: bytes) -> None:
    async with plain(answering(OK)) as (near, far):
        for _ in range(2):
            assert await near.call(b"POST", body=pieces(b"abc", b"", b"de"), length=length) == (200, b"{}")
    assert far.requests == [b"POST /x HTTP/1.1\r\nhost: api.good.test\r\n" + sent] * 2
    assert len(far.dialled) == 1


@pytest.mark.parametrize("length", [4, 6])
@on_both_loops
async def test_a_streamed_body_of_another_length_than_said_breaks_the_call(length: int) -> None:
    async with plain(silence) as (near, far):
        with pytest.raises(OutcomeUnknown) as unknown:
            await near.open(b"POST", body=pieces(b"abc", b"de"), length=length, idempotent=True)
        assert_says_nothing(unknown.value)
        await far.until(lambda: far.open == 0)
    assert len(far.dialled) == 1


@on_both_loops
async def test_what_the_iterator_raises_is_raised_and_closes_the_connection() -> None:
    fault = LookupError("mine")
    async with plain(silence) as (near, far):
        with pytest.raises(LookupError) as raised:
            await near.open(b"POST", body=pieces(b"abc", then=fault))
        assert raised.value is fault
        await far.until(lambda: far.open == 0)


@pytest.mark.parametrize(
    "bad",
    [
        {"target": b"/a b"},
        {"target": b"http://evil.test/"},
        {"target": b"/x HTTP/1.1\r\nX-Evil: 1"},
        {"target": b"/\xe9"},
        {"method": b"GET /y"},
        {"method": b""},
        {"headers": ((b"x", b"a\r\nX-Evil: 1"),)},
        {"headers": ((b"x", b"a\n"),)},
        {"headers": ((b"x", b"a\0"),)},
        {"headers": ((b"x", b" a"),)},
        {"headers": ((b"x: y", b"a"),)},
        {"headers": ((b"", b"a"),)},
        {"headers": ((b"Content-Length", b"3"),)},
        {"headers": ((b"transfer-encoding", b"chunked"),)},
        {"headers": ((b"Connection", b"close"),)},
        {"headers": ((b"Expect", b"100-continue"),)},
    ],
)
@on_both_loops
async def test_a_request_that_would_not_be_one_request_is_not_sent(bad: dict[str, Any]) -> None:
    async with plain(answering(OK)) as (near, far):
        with pytest.raises(InternalError) as refused:
            await near.open(**bad)
        assert "evil" not in str(refused.value).lower()
        assert far.dialled == []


# --- the answers that are taken


@pytest.mark.parametrize(
    ("answer", "body", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc", True),
        (b"HTTP/1.1 200\r\nContent-Length:3\r\n\r\nabc", b"abc", True),
        (b"HTTP/1.1 200 \r\nContent-Length: \t3 \t\r\n\r\nabc", b"abc", True),
        (b"HTTP/1.1 200 OK\r\nX: \xe9\r\nY:\r\nContent-Length: 3\r\n\r\nabc", b"abc", True),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", b"abc", True),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\n\r\n", b"abc", True),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: y\r\n\r\n", b"abc", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: Close\r\n\r\nabc", b"abc", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\nabc", b"abc", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nKeep-Alive: timeout=5, max=9\r\n\r\nabc", b"abc", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nKeep-Alive: timeout=1\r\n\r\nabc", b"abc", False),
        (b"HTTP/1.1 200 OK\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc", b"abc", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc", False),
        (b"HTTP/1.1 204 None\r\n\r\n", b"", True),
        (b"HTTP/1.1 204 None\r\nContent-Length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 204 None\r\nContent-Length: 3\r\n\r\n", b"", False),
        (b"HTTP/1.1 304 Same\r\nContent-Length: 3\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 100 Go on\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK, b"{}", True),
        (b"HTTP/1.1 100 Go on\r\n\r\n" * 10 + OK, b"{}", True),
        (OK + b"HTTP/1.1 200 OK\r\n", b"{}", False),
        (OK + b"\n", b"{}", False),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nc\r\n0\r\n\r\n\r\n", b"c", False),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nc\r\n0\r\n\r\nHTTP/1.1 2", b"c", False),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nc\r\n0\r\n\r\nxyz", b"c", False),
    ],
)
@pytest.mark.parametrize("drips", [False, True])
@on_both_loops
async def test_a_good_answer_is_read_and_only_a_clean_one_keeps_its_connection(
    answer: bytes,
    body: bytes,
    kept: bool,  # noqa: FBT001 - a table
    drips: bool,  # noqa: FBT001 - a table
) -> None:
    async def dripping(line: Line) -> None:
        while True:
            await line.request()
            for i in range(len(answer)):
                await line.say(answer[i : i + 1])
                await asyncio.sleep(0)

    async with plain(dripping if drips else answering(answer)) as (near, far):
        opened = await near.open()
        assert opened.whole == body or drips
        assert await body_of(opened) == body
        await opened.aclose()
        if not kept and not drips:
            await far.until(lambda: far.open == 0)
        elif kept:
            assert (await near.call())[1] == body
            assert len(far.dialled) == 1


@on_both_loops
async def test_fields_come_as_received_with_names_in_lower_case() -> None:
    async with plain(
        answering(b"HTTP/1.1 201 Made\r\nSet-Cookie: a\r\nset-cookie: B \r\nContent-Length: 0\r\n\r\n")
    ) as (
        near,
        _,
    ):
        answer = await near.open(b"POST")
        await answer.aclose()
    assert (answer.status, answer.length, answer.whole) == (201, 0, b"")
    assert answer.headers == ((b"set-cookie", b"a"), (b"set-cookie", b"B"), (b"content-length", b"0"))


@on_both_loops
async def test_the_answer_to_head_has_no_body_whatever_it_announces() -> None:
    async with plain(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n")) as (near, far):
        assert await near.call(b"HEAD") == (200, b"")
        assert await near.call(b"HEAD") == (200, b"")
    assert len(far.dialled) == 1


@on_both_loops
async def test_an_answer_may_end_with_its_connection() -> None:
    async with plain(once(b"HTTP/1.1 200 OK\r\n\r\nabc")) as (near, far):
        answer = await near.open()
        assert (answer.length, answer.whole) == (None, None)
        assert await body_of(answer) == b"abc"
        await answer.aclose()
        assert await near.call() == (200, b"abc")
    assert len(far.dialled) == 2


@on_both_loops
async def test_a_redirect_is_an_answer_and_a_coded_body_stays_coded() -> None:
    fields = b"Location: https://evil.test/\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n"
    coded = b"HTTP/1.1 302 Moved\r\n" + fields + b"\r\n\x1f\x8b\x00"
    async with plain(answering(coded)) as (near, far):
        assert await near.call() == (302, b"\x1f\x8b\x00")
        assert len(far.requests) == 1


# --- the answers that are none: S4


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"Content-Length: 2, 2\r\n\r\nab",
        HEAD + b"Content-Length: +2\r\n\r\nab",
        HEAD + b"Content-Length: 0x2\r\n\r\nab",
        HEAD + b"Content-Length:\r\n\r\nab",
        HEAD + b"Content-Length: 3\r\n\r\nab",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: identity\r\n\r\nab",
        HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab",
        HEAD + b"A: b\nContent-Length: 2\r\n\r\nab",
        HEAD + b"A: b\rc\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"A: b\r\n c\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b" A: b\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"A: b\0c\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"A : b\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"A\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b": b\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 O\0K\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 O\rK\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 099 OK\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"A: b\x01c\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"A b: c\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/0.9 200 OK\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nab",
        b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 100 Go on\r\n\r\n" * 11 + OK,
        HEAD + b"A: b\r\n" * 201 + b"Content-Length: 2\r\n\r\nab",
        HEAD + b"A: " + b"b" * 66_000 + b"\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"A: " + b"b" * 66_000,
        CHUNKED + b"2\r\nabc\r\n0\r\n\r\n",
        CHUNKED + b"2\r\nab0\r\n\r\n",
        CHUNKED + b"2\nab\r\n0\r\n\r\n",
        CHUNKED + b"2\r\nab\n0\r\n\r\n",
        CHUNKED + b" 2\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"2 \r\nab\r\n0\r\n\r\n",
        CHUNKED + b"+2\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"0x2\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"FFFFFFFFFFFFFFFFF\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"-1\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"2\r\nab\r\n0\r\n",
        CHUNKED + b"2\r\nab\r\n",
        CHUNKED + b"2\r\nab\r\n0\r\nX: y\n\r\n",
        CHUNKED + b"2\r\nab\r\n0\r\nContent-Length: 9\r\n\r\n",
        CHUNKED + b"2;" + b"a" * 400_000,
        CHUNKED + b"2\r\nab\r\n0\r\nX: " + b"a" * 400_000,
        b"",
    ],
)
@pytest.mark.parametrize("drips", [False, True])
@on_both_loops
async def test_after_an_answer_that_is_none_the_connection_is_closed_and_not_used_again(
    answer: bytes,
    drips: bool,  # noqa: FBT001 - a table
) -> None:
    served = 0

    async def play(line: Line) -> None:
        nonlocal served
        served += 1
        await line.request()
        step = max(1, len(answer) // 50) if drips else len(answer) or 1
        for i in range(0, len(answer), step):
            await line.say(answer[i : i + step])
            await asyncio.sleep(0)
        if len(answer) < 60 or b"h: 3\r\n" in answer or answer.endswith(b"\r\n"):
            line.writer.write_eof()
        await line.reader.read()

    async with plain(play) as (near, far):
        for _ in range(2):
            with pytest.raises(OutcomeUnknown) as unknown:
                await near.call()
            assert not unknown.value.timed_out
            assert_says_nothing(unknown.value)
        await far.until(lambda: far.open == 0)
    assert served == len(far.requests) == 2


@on_both_loops
async def test_bytes_that_nobody_asked_for_end_a_kept_connection_before_the_next_request() -> None:
    """A server that says 408 to an idle connection: that is no answer to the next request, even one already on its way."""
    idle, said = threading.Event(), threading.Event()

    def serve(listener: socket.socket) -> None:
        first, _ = listener.accept()
        with first:
            first.recv(65536)
            first.sendall(OK)
            idle.wait(10)
            first.sendall(b"HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\n")
            said.set()
            second, _ = listener.accept()
            with second:
                second.recv(65536)
                second.sendall(OK)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        async with calls_of(development(), Resolver(["127.0.0.1"])) as calls:
            near = Near(calls, listener.getsockname()[1], "http")
            assert await near.call() == (200, b"{}")
            idle.set()
            said.wait(10)  # the loop is held: it has not heard of those bytes
            assert await near.call() == (200, b"{}")
        await asyncio.to_thread(thread.join)


# --- kept connections


async def nothing_open(calls: Calls) -> None:
    """Wait until every connection is gone."""
    async with asyncio.timeout(5):
        await asyncio.gather(*(wire.ended for wire in calls._wires))
        await asyncio.sleep(0)
    assert calls._hosts == {}


async def idle_for(near: Near, seconds: float) -> None:
    """Make the idle connections look as old as that."""
    for host in near.calls._hosts.values():
        for wire in host.idle:
            wire.idle_since -= seconds


@on_both_loops
async def test_the_newest_idle_connection_is_taken_first_and_closed_ones_are_forgotten() -> None:
    release = asyncio.Event()

    async def play(line: Line) -> None:
        number = len(line.far.dialled)
        while True:
            await line.request()
            await release.wait()
            await line.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)

    async with plain(play) as (near, far):
        both = [asyncio.ensure_future(near.call()) for _ in range(2)]
        await far.until(lambda: len(far.requests) == 2)
        release.set()
        await asyncio.gather(*both)
        newest = await near.call()
        assert [await near.call() for _ in range(3)] == [newest] * 3
        await far.stop()
        await far.until(lambda: far.open == 0)
        await nothing_open(near.calls)
        assert near.calls._idle == 0


@on_both_loops
async def test_a_request_that_may_not_be_repeated_takes_only_a_connection_that_was_in_use_just_now() -> None:
    async with plain(answering(OK)) as (near, far):
        await near.call(b"POST")
        await near.call(b"POST")
        assert len(far.dialled) == 1
        await idle_for(near, 2)
        await near.call(b"GET", idempotent=True)
        assert len(far.dialled) == 1
        await idle_for(near, 2)
        await near.call(b"POST")
        assert len(far.dialled) == 2


@on_both_loops
async def test_an_idle_connection_is_closed_after_fifteen_seconds_or_what_the_server_grants() -> None:
    async with plain(answering(OK)) as (near, far):
        await near.call()
        await idle_for(near, 14)
        near.calls._sweep()
        assert near.calls._idle == 1
        await idle_for(near, 1)
        near.calls._sweep()
        await far.until(lambda: far.open == 0)
        assert near.calls._idle == 0
    async with plain(answering(b"HTTP/1.1 200 OK\r\nKeep-Alive: max=3, timeout=4\r\nContent-Length: 0\r\n\r\n")) as (
        near,
        far,
    ):
        await near.call(idempotent=True)
        await idle_for(near, 3.1)
        await near.call(idempotent=True)
        assert len(far.dialled) == 2


@on_both_loops
async def test_an_idempotent_request_on_a_kept_connection_that_dies_is_sent_once_more_on_a_new_one() -> None:
    async def play(line: Line) -> None:
        if len(line.far.dialled) == 1:
            await line.request()
            await line.say(OK)
        await line.request()  # and hang up

    async with plain(play) as (near, far):
        assert await near.call() == (200, b"{}")
        with pytest.raises(OutcomeUnknown):
            await near.call(b"PUT", body=b"abc", idempotent=True)
        assert len(far.dialled) == 2
        assert [request[:3] for request in far.requests] == [b"GET", b"PUT", b"PUT"]


@pytest.mark.parametrize("dies", ["end", "reset", "some bytes"])
@pytest.mark.parametrize("idempotent", [True, False])
@on_both_loops
async def test_only_what_may_be_repeated_is_and_only_when_no_byte_of_an_answer_came(
    dies: str,
    idempotent: bool,  # noqa: FBT001 - a table
) -> None:
    async def play(line: Line) -> None:
        await line.request()
        await line.say(OK)
        await line.request()
        if len(line.far.dialled) == 1:
            if dies == "reset":
                line.reset()
            elif dies == "some bytes":
                await line.say(b"H")
            return
        await line.say(OK)

    async with plain(play) as (near, far):
        assert await near.call() == (200, b"{}")
        if idempotent and dies != "some bytes":
            assert await near.call(b"PUT", body=b"abc", idempotent=True) == (200, b"{}")
            assert len(far.requests) == 3
        else:
            with pytest.raises(OutcomeUnknown) as unknown:
                await near.call(b"PUT", body=b"abc", idempotent=idempotent)
            assert not unknown.value.timed_out
            assert_says_nothing(unknown.value)
            assert len(far.requests) == 2


@on_both_loops
async def test_a_streamed_body_is_never_sent_twice() -> None:
    async def play(line: Line) -> None:
        await line.request()
        await line.say(OK)
        await line.request()

    async with plain(play) as (near, far):
        await near.call()
        with pytest.raises(OutcomeUnknown):
            await near.call(b"PUT", body=pieces(b"abc"), idempotent=True)
        assert len(far.requests) == 2


@on_both_loops
async def test_a_second_sending_that_cannot_be_dialled_leaves_the_outcome_unknown() -> None:
    async def play(line: Line) -> None:
        await line.request()
        await line.say(OK)
        await line.request()

    resolver = Resolver(["127.0.0.1"], OSError("no such name"))
    async with far_side(play) as far, calls_of(development(), resolver) as calls:
        near = Near(calls, far.port, "http")
        await near.call()
        with pytest.raises(OutcomeUnknown) as unknown:
            await near.call(b"PUT", idempotent=True)
        assert_says_nothing(unknown.value)


@on_both_loops
async def test_at_most_so_many_requests_run_at_once_and_who_waits_is_served_in_order() -> None:
    most = 100  # of the true number both ends would be more sockets than a shell grants
    release = asyncio.Event()

    async def play(line: Line) -> None:
        while True:
            await line.request()
            await release.wait()
            await line.say(OK)

    async with far_side(play) as far, calls_of(development(), Resolver(["127.0.0.1"]), most_in_use=most) as calls:
        near = Near(calls, far.port, "http")
        first = [asyncio.ensure_future(near.call()) for _ in range(most)]
        await far.until(lambda: len(far.requests) == most)
        with pytest.raises(NoRoom) as not_sent:
            await near.call(connect_seconds=0.01)
        assert "waiting" in not_sent.value.detail
        later = [asyncio.ensure_future(near.call(b"GET", b"/%d" % i)) for i in range(20)]
        await asyncio.sleep(0)
        later.pop(3).cancel()
        release.set()
        await asyncio.gather(*first, *later)
        assert len(far.dialled) == most
        waited = [request.split(b" ")[1] for request in far.requests[most:]]
        assert sorted(waited) == sorted(b"/%d" % i for i in range(20) if i != 3)
        assert all(host.in_use == 0 for host in near.calls._hosts.values())
        assert near.calls._idle <= 100


# --- dialling: D1, D2, D5, D7, law 3


@pytest.mark.parametrize("answer", [["127.0.0.1", "10.0.0.1"], ["169.254.169.254"], ["::ffff:10.0.0.1"], ["nonsense"]])
@on_both_loops
async def test_one_bad_address_refuses_the_whole_answer(answer: list[str]) -> None:
    async with far_side(answering(OK)) as far, calls_of(development(), Resolver(answer)) as calls:
        with pytest.raises(EgressDenied):
            await Near(calls, far.port, "http").open()
        assert far.dialled == []
        assert calls._hosts == {}


@on_both_loops
async def test_a_kept_connection_is_not_resolved_again_and_every_new_one_is_checked() -> None:
    resolver = Resolver(["127.0.0.1"], ["10.0.0.1"])
    async with far_side(answering(OK)) as far, calls_of(development(), resolver) as calls:
        near = Near(calls, far.port, "http")
        assert await near.call() == (200, b"{}")
        assert await near.call() == (200, b"{}")
        assert len(resolver.asked) == 1
        await far.stop()
        await nothing_open(calls)
        with pytest.raises(EgressDenied):
            await near.call()
        assert len(resolver.asked) == 2
        assert len(far.dialled) == 1


@on_both_loops
async def test_the_second_sending_is_checked_like_the_first() -> None:
    async def play(line: Line) -> None:
        await line.request()
        await line.say(OK)
        await line.request()

    resolver = Resolver(["127.0.0.1"], ["127.0.0.1", "169.254.169.254"])
    async with far_side(play) as far, calls_of(development(), resolver) as calls:
        near = Near(calls, far.port, "http")
        await near.call()
        with pytest.raises(EgressDenied):
            await near.call(idempotent=True)
        assert len(far.dialled) == 1


@on_both_loops
async def test_production_speaks_https_only() -> None:
    async with far_side(answering(OK)) as far, calls_of(production(), Resolver(["127.0.0.1"])) as calls:
        with pytest.raises(EgressDenied):
            await Near(calls, far.port, "http").open()
        assert far.dialled == []


@on_both_loops
async def test_the_next_address_is_tried_when_one_refuses_and_ipv6_is_dialled() -> None:
    async with far_side(answering(OK), hosts=["::1"]) as far:
        async with calls_of(development(), Resolver(["127.0.0.5", "::1"])) as calls:
            assert await Near(calls, far.port, "http").call() == (200, b"{}")
        async with calls_of(development()) as calls:
            assert await Near(calls, far.port, "http").call(host="::1") == (200, b"{}")
        assert far.dialled == ["::1", "::1"]


FATES = ["keep", "die", "mute"]


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(ALLOWED * 3 + OUTSIDE), max_size=4), st.sampled_from(FATES)), min_size=1
    )
)
@settings(max_examples=40, deadline=None)
def test_each_address_dialled_was_allowed_in_that_same_dial(authority: Authority, turns: list[Any]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if len(turns) % 2 else asyncio.new_event_loop) as runner:
        runner.run(_play(authority, turns))


async def _play(authority: Authority, turns: list[tuple[list[str], str]]) -> None:
    """Law 3: for each lookup one dial at most, to an address of that very lookup; none when any of it may not be dialled.

    Production, so that loopback is open by exception only, and what listens outside of it would tell. A connection keeps
    serving, or dies under its second request, so that the client dials anew within a call, or hangs up at once.
    """
    resolver = Resolver(*(answer for answer, _ in turns))
    dialled: list[str] = []

    async def play(line: Line) -> None:
        fate = turns[len(line.far.dialled) % len(turns)][1]
        if fate != "mute":
            await line.request()
            await line.say(OK)
        while fate != "mute":
            await line.request()
            if fate == "die":
                return
            await line.say(OK)

    trusting = production(egress_ca_file=authority.file, egress_allow="127.0.0.0/29")
    hosts = ["127.0.0.1", "127.0.0.2", "127.0.1.1"]
    async with (
        far_side(play, tls=authority.context("api.good.test"), hosts=hosts) as far,
        calls_of(trusting, resolver) as calls,
    ):
        for _ in turns:
            with contextlib.suppress(BrokerError):
                await Near(calls, far.port, "https").call(idempotent=True)
        for answer, _ in (turns[min(i, len(turns) - 1)] for i in range(len(resolver.asked))):
            listening = [address for address in answer if address in {"127.0.0.1", "127.0.0.2"}]
            dialled += listening[:1] if set(answer) <= set(ALLOWED) else []
        await far.until(lambda: len(far.dialled) >= len(dialled))
        assert far.dialled == dialled


# --- TLS


@contextlib.asynccontextmanager
async def secured(play: Play, authority: Authority, **overrides: Any) -> AsyncIterator[tuple[Near, FarSide]]:
    trusting = production(egress_ca_file=authority.file, egress_allow="127.0.0.1/32", **overrides)
    async with (
        far_side(play, tls=authority.context("api.good.test")) as far,
        calls_of(trusting, Resolver(["127.0.0.1"])) as calls,
    ):
        yield Near(calls, far.port, "https"), far


@on_both_loops
async def test_https_verifies_the_name_and_keeps_its_connection(authority: Authority) -> None:
    async with secured(answering(OK), authority) as (near, far):
        assert await near.call() == (200, b"{}")
        assert await near.call(b"POST", body=pieces(b"a" * 100_000, b"b" * 300_000), length=400_000) == (200, b"{}")
        assert len(far.dialled) == 1
        with pytest.raises(NotSent) as not_sent:
            await near.call(host="other.good.test", body=CANARY.encode())
        assert "certificate" in not_sent.value.detail
        assert_says_nothing(not_sent.value, "good")
        assert len(far.requests) == 2


@on_both_loops
async def test_an_unknown_authority_is_not_sent_and_the_variables_change_nothing(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.log"
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    monkeypatch.setenv("SSL_CERT_DIR", str(authority.file.parent))
    monkeypatch.setenv("SSLKEYLOGFILE", str(keys))
    async with far_side(answering(OK), tls=authority.context("api.good.test")) as far:
        async with calls_of(development(), Resolver(["127.0.0.1"])) as calls:
            with pytest.raises(NotSent) as not_sent:
                await Near(calls, far.port, "https").call()
            assert "certificate" in not_sent.value.detail
        async with calls_of(development(egress_ca_file=authority.file), Resolver(["127.0.0.1"])) as calls:
            await Near(calls, far.port, "https").call()
        assert len(far.requests) == 1
    assert not keys.exists()


@on_both_loops
async def test_proxy_variables_and_netrc_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with far_side(answering(OK)) as evil, plain(answering(OK)) as (near, far):
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{evil.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".netrc").write_text(f"default login u password {CANARY}\n")
        assert await near.call() == (200, b"{}")
        with pytest.raises(NotSent):
            await Near(near.calls, free_port(), "https").call()
        assert evil.dialled == []
        assert far.requests == [b"GET /x HTTP/1.1\r\nhost: api.good.test\r\n\r\n"]


@on_both_loops
async def test_a_plain_server_behind_https_is_not_sent() -> None:
    async def play(line: Line) -> None:
        await line.reader.read(1)
        await line.say(b"HTTP/1.1 400 Bad\r\n\r\n")

    async with plain(play) as (near, _):
        with pytest.raises(NotSent) as not_sent:
            await Near(near.calls, near.port, "https").call()
        assert "TLS" in not_sent.value.detail


@pytest.mark.parametrize("proper_end", [True, False])
@on_both_loops
async def test_an_answer_that_ends_with_its_connection_needs_a_proper_end_of_tls(
    authority: Authority,
    proper_end: bool,  # noqa: FBT001 - a table
) -> None:
    context = authority.context("api.good.test")

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with context.wrap_socket(connection, server_side=True) as far:
            far.recv(65536)
            far.sendall(b"HTTP/1.1 200 OK\r\n\r\naccess_token=abc")
            if proper_end:
                with contextlib.suppress(OSError):
                    far.unwrap()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        async with calls_of(development(egress_ca_file=authority.file), Resolver(["127.0.0.1"])) as calls:
            calling = Near(calls, listener.getsockname()[1], "https").call()
            if proper_end:
                assert await calling == (200, b"access_token=abc")
            else:
                with pytest.raises(OutcomeUnknown) as unknown:
                    await calling
                assert_says_nothing(unknown.value)
        await asyncio.to_thread(thread.join)


# --- sent or not, late, stalled, cancelled


@on_both_loops
async def test_what_fails_before_the_first_byte_is_not_sent() -> None:
    async with calls_of(development(), Resolver(["127.0.0.1"])) as calls:
        with pytest.raises(NotSent) as refused:
            await Near(calls, free_port(), "http").call()
        assert_says_nothing(refused.value)
    for resolver in (Resolver(OSError("no such name")), Resolver([])):
        async with calls_of(development(), resolver) as calls:
            with pytest.raises(NotSent) as unresolved:
                await Near(calls, 80, "http").call()
            assert_says_nothing(unresolved.value)
            assert calls._hosts == {}

    async def hangs(_host: str, _port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    async with calls_of(development(), hangs) as calls:
        with pytest.raises(NotSent):
            await Near(calls, 80, "http").call(connect_seconds=0.05)
    await calls.aclose()
    with pytest.raises(NotSent):
        await Near(calls, 80, "http").call()


@on_both_loops
async def test_a_handshake_that_hangs_is_not_sent_and_its_connection_is_closed() -> None:
    async def play(line: Line) -> None:
        await line.reader.read()

    async with plain(play) as (near, far):
        with pytest.raises(NotSent) as not_sent:
            await Near(near.calls, near.port, "https").call(connect_seconds=0.1)
        assert "TLS" in not_sent.value.detail
        await far.until(lambda: far.open == 0)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\n\r", b"HTTP/1.1 100 Go on\r\n\r\n"])
@on_both_loops
async def test_a_head_that_does_not_come_in_time_leaves_the_outcome_unknown(answer: bytes) -> None:
    async def play(line: Line) -> None:
        await line.request()
        await line.say(answer)
        await line.reader.read()

    async with plain(play) as (near, far):
        with pytest.raises(OutcomeUnknown) as unknown:
            await near.call(headers_seconds=0.1, idempotent=True)
        assert unknown.value.timed_out
        await far.until(lambda: far.open == 0)
        assert len(far.requests) == 1


@on_both_loops
async def test_a_body_that_stalls_is_given_up_after_the_idle_time_and_what_came_is_read_first() -> None:
    async def play(line: Line) -> None:
        await line.request()
        await line.say(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
        await line.reader.read()

    async with plain(play) as (near, far):
        answer = await near.open(headers_seconds=60)
        assert (answer.length, answer.whole) == (9, None)
        assert await answer.read(0.1) == b"abc"
        began = time.monotonic()
        with pytest.raises(OutcomeUnknown) as unknown:
            await answer.read(0.1)
        assert unknown.value.timed_out
        assert 0.05 < time.monotonic() - began < 2
        with pytest.raises(OutcomeUnknown):
            await answer.read(0.1)
        await answer.aclose()
        await answer.aclose()
        await far.until(lambda: far.open == 0)
        assert all(host.in_use == 0 for host in near.calls._hosts.values())


@on_both_loops
async def test_a_slow_answer_passes_as_long_as_it_comes_on() -> None:
    async def play(line: Line) -> None:
        await line.request()
        await line.say(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(6):
            await asyncio.sleep(0.05)
            await line.say(b"8\r\ndata: 1\n\r\n")
        await line.say(b"0\r\n\r\n")

    async with plain(play) as (near, _):
        answer = await near.open(headers_seconds=0.2)
        events = [await answer.read(0.2) for _ in range(7)]
        assert events == [b"data: 1\n"] * 6 + [b""]
        await answer.aclose()


@on_both_loops
async def test_a_caller_who_does_not_go_on_with_the_body_stalls_the_upload() -> None:
    async def late() -> AsyncIterator[bytes]:
        yield b"abc"
        await asyncio.sleep(60)

    async with plain(silence) as (near, far):
        with pytest.raises(UploadStalled):
            await near.open(b"POST", body=late(), idle_seconds=0.1)
        await far.until(lambda: far.open == 0)
        assert len(asyncio.all_tasks()) <= 2


@on_both_loops
async def test_a_server_that_does_not_take_the_body_stalls_the_call() -> None:
    async def play(line: Line) -> None:
        await line.head()
        line.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(60)

    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 65_536
            yield b"a" * 65_536

    for body in (endless(), b"a" * 50_000_000):
        async with plain(play) as (near, _):
            with pytest.raises(OutcomeUnknown) as unknown:
                await near.open(b"POST", body=body, idle_seconds=0.2)
            assert unknown.value.timed_out
            assert not isinstance(unknown.value, UploadStalled)
    assert taken < 20_000_000


@on_both_loops
async def test_an_early_answer_comes_while_the_upload_goes_on() -> None:
    async def play(line: Line) -> None:
        await line.head()
        await line.reader.readexactly(8)
        await line.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while (size := int(await line.reader.readline(), 16)) > 0:
            await line.say(b"%x\r\n%b" % (size, await line.reader.readexactly(size + 2)))
        await line.reader.readexactly(2)
        await line.say(b"0\r\n\r\n")
        await line.reader.read()

    said: asyncio.Queue[bytes] = asyncio.Queue()

    async def conversation() -> AsyncIterator[bytes]:
        yield b"abc"
        while piece := await said.get():
            yield piece

    async with plain(play) as (near, far):
        answer = await near.open(b"POST", body=conversation())
        for word in (b"one", b"two"):
            said.put_nowait(word)
            assert await answer.read(5) == word
        said.put_nowait(b"")
        assert await answer.read(5) == b""
        await answer.aclose()
        assert near.calls._idle == far.open == 1


@on_both_loops
async def test_a_refusal_before_the_upload_is_through_is_an_answer_and_ends_upload_and_connection() -> None:
    async def play(line: Line) -> None:
        await line.head()
        await line.say(b"HTTP/1.1 413 Large\r\nContent-Length: 2\r\n\r\nno")
        await line.reader.read()

    ended = False

    async def endless() -> AsyncIterator[bytes]:
        nonlocal ended
        try:
            while True:
                yield b"a"
                await asyncio.sleep(0.01)
        finally:
            ended = True

    async with plain(play) as (near, far):
        answer = await near.open(b"POST", body=endless())
        assert (answer.status, answer.whole) == (413, b"no")
        assert await body_of(answer) == b"no"
        await answer.aclose()
        assert ended
        await far.until(lambda: far.open == 0)
        assert near.calls._idle == 0


@on_both_loops
async def test_aclose_ends_what_is_not_read_and_wakes_who_reads() -> None:
    async def play(line: Line) -> None:
        await line.request()
        await line.say(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        await line.reader.read()

    async with plain(play) as (near, far):
        answer = await near.open()
        reading = asyncio.ensure_future(answer.read(60))
        await asyncio.sleep(0)
        await answer.aclose()
        with pytest.raises(OutcomeUnknown):
            await reading
        await far.until(lambda: far.open == 0)
        answer = await near.open()
        await near.calls.aclose()
        with pytest.raises(OutcomeUnknown):
            await answer.read(60)
        await answer.aclose()


@pytest.mark.parametrize("scheme", ["http", "https"])
@on_both_loops
async def test_hundreds_of_calls_cancelled_anywhere_leak_nothing(authority: Authority, scheme: str) -> None:
    chance = random.Random(6)  # noqa: S311 - a script, no secret

    async def play(line: Line) -> None:
        while True:
            await line.request()
            await asyncio.sleep(chance.random() / 100)
            await line.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
            await asyncio.sleep(chance.random() / 100)
            await line.say(b"0\r\n\r\n")

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"abc"
            await asyncio.sleep(chance.random() / 200)

    async def one(near: Near) -> None:
        body: Any = chance.choice([None, b"abc", b"a" * 200_000, slow()])
        calling = asyncio.ensure_future(near.call(b"POST", body=body))
        await asyncio.sleep(chance.random() / 25)
        calling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            assert await calling == (200, b"abc")

    tls = authority.context("api.good.test") if scheme == "https" else None
    trusting = development(egress_ca_file=authority.file)
    async with far_side(play, tls=tls) as far, calls_of(trusting, Resolver(["127.0.0.1"])) as calls:
        near = Near(calls, far.port, scheme)
        files, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())  # noqa: PTH208 - as many as there are
        for _ in range(10):
            await asyncio.gather(*(one(near) for _ in range(40)))
        assert all(host.in_use == 0 and not host.waiters for host in calls._hosts.values())
        assert await near.call() == (200, b"abc")
        await calls.aclose()
        await far.until(lambda: far.open == 0)
        assert calls._hosts == {}
        assert not calls._wires
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) <= tasks
        assert len(os.listdir("/proc/self/fd")) <= files  # noqa: PTH208 - as above


# --- back-pressure


@on_both_loops
async def test_a_reader_who_waits_holds_the_server_back_and_loses_nothing() -> None:
    sent = 0

    async def play(line: Line) -> None:
        nonlocal sent
        await line.request()
        await line.say(b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n")
        for _ in range(500):
            await line.say(b"a" * 100_000)
            sent += 100_000

    async with plain(play) as (near, _):
        answer = await near.open()
        before = -1
        while sent != before:  # until the server gets nowhere
            before = sent
            await asyncio.sleep(0.1)
        assert answer._bytes_waiting < 1_000_000
        assert sent < 25_000_000
        assert len(await body_of(answer)) == 50_000_000
        await answer.aclose()
        assert near.calls._idle == 1


@on_both_loops
async def test_a_body_of_tiny_chunks_waits_and_is_read_in_large_pieces() -> None:
    async def play(line: Line) -> None:
        await line.request()
        await line.say(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"2\r\nab\r\n" * 100_000 + b"0\r\n\r\n"
        )

    async with plain(play) as (near, _):
        answer = await near.open()
        await asyncio.sleep(0.1)
        assert len(answer._pieces) < 100
        found = []
        while piece := await answer.read(5):
            assert len(piece) <= 262_144
            found.append(piece)
        assert b"".join(found) == b"ab" * 100_000
        assert len(found) < 200
        await answer.aclose()


@on_both_loops
async def test_what_comes_in_tiny_pieces_is_joined_and_counts_with_what_it_costs() -> None:
    async def play(line: Line) -> None:
        await line.request()
        await line.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        await line.request()

    async with plain(play) as (near, _):
        answer = await near.open()
        held_back = [answer.add(b"x") for _ in range(5_000)]
        assert held_back.index(True) == 262_144 // 61  # a piece costs some sixty bytes besides its own
        assert await answer.read(5) == b"x" * 5_000
        assert answer._bytes_waiting == 0
        for size in (40_000, 25_000, 1_000, 300_000, 1):
            answer.add(b"y" * size)
        assert [len(await answer.read(5)) for _ in range(4)] == [65_000, 1_000, 262_144, 37_857]
        assert answer._bytes_waiting == 0
        await answer.aclose()
