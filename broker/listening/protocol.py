"""uvicorn's HTTP protocol, with limits on a request's head and its time, and stricter: ``BoundedHttp``."""

from __future__ import annotations

import asyncio
import json
import random
import re
import select
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn, TypeAlias, cast
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from broker.errors import BrokerError, InvalidRequest, UpgradeUnsupported
from broker.listening.exchange import GONE, RAW_TARGET, Exchange

MAX_HEAD_BYTES: Final = 64 * 1024
HEAD_SECONDS: Final = 20.0
BODY_SECONDS: Final = 60.0  # between two pieces of a body
TOO_LARGE: Final = "The request's head is too large."
NO_HOST: Final = "The request must have one Host field, of a host name and perhaps a port."
UNSPOKEN_METHODS: Final = frozenset({b"CONNECT", b"TRACE"})
WATCHED: Final = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})
AUTHORITY: Final = re.compile(rb"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
COUNT_REFUSED: Final = "count_refused"  # in the lifespan's state: called for each request that is refused here
LEAVING: Final = "leaving"  # in the lifespan's state: its ``begun`` says that the process is about to end
LOOK_SECONDS: Final = 1.0
_GONE_EVENTS: Final = getattr(select, "POLLRDHUP", 0)  # beside an error and the end of both ways, which always tell

# Serves one request, past ASGI's layers: an application may have a ``lane(method, target, fields)`` that finds one, or None.
Lane: TypeAlias = Callable[[Exchange], Awaitable[None]]


class BoundedHttp(HttpToolsProtocol):
    """Refuses requests that could mean two things, and those whose head is over 64 KiB or takes more than 20 s.

    A body of which nothing comes for 60 s ends its connection, unless it is we who do not read.

    The parser keeps whatever comes, and copies it at each read. Framing between chunks of a body counts like a head.

    It refuses two lengths by itself, but not: a target that is no path, TRACE and CONNECT, none or two or an odd ``Host``,
    another transfer coding than ``chunked`` (RFC 9112 6.1), versions that nobody speaks. It drops the body of a request that
    asks for an upgrade, which would be read as the next request, so that is refused where there is a body, and is the last
    of its connection where there is none. Trailers (RFC 9110 6.5) are dropped. The target is in the scope as it came
    (``RAW_TARGET``): bytes that begin with a slash and hold no ``#``.

    A client that left is noticed without anybody calling ``receive``, within a second also where nothing is read from it:
    each request that was not answered whole then counts as disconnected, the ones that were not begun never are, and what
    an application put into the list ``scope[GONE]`` is called once, in order, in the loop's thread; it must not raise.
    Not noticed is a client that left behind more than the kernel takes, until somebody reads that or writes to it.
    """

    head_seconds: float = HEAD_SECONDS
    body_seconds: float = BODY_SECONDS

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Begin before the first request."""
        super().__init__(config, server_state, app_state, _loop)
        self._in_head = True
        self._ended = False  # a request was complete, and nothing came after it
        self._field_bytes = 0  # of this request, in whole fields
        self._idle_bytes = 0  # since the parser last got anywhere
        self._advanced = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._heard_at = 0.0  # when the last piece of a body came that is not whole
        self._has_host = self._has_body = False
        self._last = False  # nothing may follow this request
        self._refusal: BrokerError | None = None
        self._running: Exchange | None = None  # the request that is being answered; ``cycle`` is the newest one
        self._look_timer: asyncio.TimerHandle | None = None
        self._poll: select.poll | None = None
        self._idle_at: float | None = None  # since when everything is answered and nothing comes
        self._idle_timer: asyncio.TimerHandle | None = None
        self._lane: Callable[[bytes, bytes, Sequence[tuple[bytes, bytes]]], Lane | None] | None
        self._lane = None if self.root_path else getattr(self.app, "lane", None)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Start the clock of the first head: a connection that says nothing is closed too."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and tell every request that is not answered whole: uvicorn tells the newest alone."""
        self._stop_clock()
        for timer in (self._look_timer, self._body_timer, self._idle_timer):
            if timer is not None:
                timer.cancel()
        while self.pipeline:
            self.pipeline.pop()[0].disconnected = True  # and it is not begun
        try:
            if self._running is not None:
                self._running.leave()
        finally:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse (400, closed) what is too much without getting anywhere.

        The clock of a head starts when it does not come whole in one piece, as nearly all do.
        """
        if self._last:
            return  # it may be meant for a protocol that was not agreed on
        self._advanced = self._ended = False
        self._idle_at = None
        super().data_received(data)
        if self._in_head and not self._ended and self._head_timer is None:
            self._start_clock()
        if not self._in_head:
            self._await_body()
        self._idle_bytes = 0 if self._advanced else self._idle_bytes + len(data)
        if self._idle_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(TOO_LARGE)

    def on_message_begin(self) -> None:
        """Begin to count."""
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._field_bytes, self._ended = 0, False
        self._has_host = self._has_body = False

    def on_url(self, url: bytes) -> None:
        """Count the target, which may come in pieces."""
        self._field_bytes += len(url)
        if self._field_bytes > MAX_HEAD_BYTES:
            self._refuse(TOO_LARGE)
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a field, of the head or a trailer, and keep those of the head: uvicorn's way would add a trailer to them."""
        self._field_bytes += len(name) + len(value) + 4
        if self._field_bytes > MAX_HEAD_BYTES:
            self._refuse(TOO_LARGE)
        if not self._in_head:
            return
        name = name.lower()
        if name in WATCHED:
            self._watch(name, value.strip(b" \t"))
        self.headers.append((name, value))

    def _watch(self, name: bytes, value: bytes) -> None:
        if name == b"host":
            if self._has_host or AUTHORITY.fullmatch(value) is None:
                self._refuse(NO_HOST)
            self._has_host = True
        elif name == b"expect":
            self.expect_100_continue = self.expect_100_continue or value.lower() == b"100-continue"
        else:
            self._has_body = value != b"0"
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                self._refuse("The request has a transfer coding other than chunked.")

    def on_headers_complete(self) -> None:
        """Stop the clock: the head is whole."""
        self._check_head()
        self._in_head, self._advanced = False, True
        self._stop_clock()
        exchange = self._exchange()
        lane = None if self._lane is None else self._lane(self.parser.get_method(), self.url, self.headers)
        app = self.app if lane is None else lambda *_: lane(exchange)
        before, self.cycle = self.cycle, exchange
        if self._last or self._is_leaving():
            exchange.keep_alive = False
        if before is None or before.response_complete:
            self._start_asgi_task(exchange, app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, app))
        if self.flow.read_paused:
            self._look_later()

    def _exchange(self) -> Exchange:
        """Return the exchange of the request whose head is whole."""
        parser, target = self.parser, self.url
        version, parts = parser.get_http_version(), httptools.parse_url(target)
        path = parts.path.decode("ascii")
        scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
            "headers": self.headers,
            "state": self.app_state.copy(),
            "method": parser.get_method().decode("ascii"),
            "path": self.root_path + (unquote(path) if "%" in path else path),
            "raw_path": self.root_path.encode("ascii") + parts.path,
            "query_string": parts.query or b"",
            RAW_TARGET: target,
            GONE: [],
        }
        keep_alive = version != "1.0" and parser.should_keep_alive()
        return Exchange(scope, self, keep_alive=keep_alive, on_response=self.on_response_complete)

    def _is_leaving(self) -> bool:
        leaving = self.app_state.get(LEAVING)
        return leaving is not None and leaving.begun

    def shutdown(self) -> None:
        """Close an idle connection, as uvicorn does when the process ends, but not one on which a request has come.

        That one is answered, and ends with it.
        """
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._is_leaving() and (self._idle_bytes or self._has_unread()):
            return
        super().shutdown()

    def _has_unread(self) -> bool:
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401
        self._running = exchange = cast("Exchange", cycle)
        exchange.task = task = self.loop.create_task(self._run(exchange, app))
        self.tasks.add(task)

    async def _run(self, exchange: Exchange, app: Any) -> None:  # noqa: ANN401
        """Have a request answered; the task takes itself out, which is cheaper than a callback of its own."""
        try:
            await exchange.run_asgi(app)
        finally:
            task, exchange.task = exchange.task, None
            if task is not None:
                self.tasks.discard(task)

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for one: one timer for the connection, not one for each request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_at = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_for_request)

    def _look_for_request(self) -> None:
        """End a connection that was idle for as long as one may be."""
        self._idle_timer = None
        if self._idle_at is None:
            return  # the timer starts again when all is answered
        left_seconds = self._idle_at + self.timeout_keep_alive - self.loop.time()
        if left_seconds > 0:
            self._idle_timer = self.loop.call_later(left_seconds, self._look_for_request)
        else:
            self.timeout_keep_alive_handler()

    def on_body(self, body: bytes) -> None:
        """Note that the body goes on."""
        self._advanced = True
        super().on_body(body)
        if self.flow.read_paused:
            self._look_later()

    def on_message_complete(self) -> None:
        """Expect the next head; its clock starts with its first byte."""
        self._in_head = self._advanced = self._ended = True
        super().on_message_complete()

    def _check_head(self) -> None:
        """Refuse a head that is well-formed by itself but not for us; the parser stops then, and the body is not read."""
        if self.url[:1] != b"/" or b"#" in self.url:
            self._refuse("The request's target must be a path, with or without a query.")
        if not self._has_host:
            self._refuse(NO_HOST)
        parser = self.parser
        if parser.get_method() in UNSPOKEN_METHODS:
            self._refuse("TRACE and CONNECT are not spoken here.")
        if (version := parser.get_http_version()) != "1.1":
            self._check_version(version)
        if parser.should_upgrade():
            self._last = True
            if self._has_body:
                self._refusal = UpgradeUnsupported("A request with a body may not ask for an upgrade.")
                raise ValueError(self._refusal.detail)

    def _check_version(self, version: str) -> None:
        if version != "1.0":
            self._refuse("This version of HTTP is not spoken here.")
        if any(name == b"transfer-encoding" for name, _ in self.headers):
            self._refuse("HTTP/1.0 has no transfer codings.")

    def _refuse(self, why: str) -> NoReturn:
        self._refusal = InvalidRequest(why)
        raise ValueError(why)  # the parser stops, and ``data_received`` asks for a 400

    def _should_upgrade(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: it is answered as a request that asked for no upgrade, or with 501."""

    def send_400_response(self, msg: str) -> None:
        """Answer with what was wrong, and close; a request that is being answered would be given this as its answer.

        There the connection is closed alone, and so it is in the middle of an answer.
        """
        refusal, self._refusal = self._refusal or InvalidRequest(msg), None
        self.app_state.get(COUNT_REFUSED, _ignore)(refusal.status)
        idle = self.cycle is None or self.cycle.response_complete
        own_body = not self._in_head and not self.pipeline and not idle and not self.cycle.response_started
        if idle or own_body:
            self.transport.write(_problem(refusal))
        self.transport.close()

    def _look_later(self) -> None:
        """Look at the socket from time to time while it is not read: its end would not be heard."""
        if self._look_timer is None:
            self._look_timer = self.loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._look_timer = None
        if not self.flow.read_paused or self.transport.is_closing():
            return
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.transport.get_extra_info("socket").fileno(), _GONE_EVENTS)
        if self._poll.poll(0):
            self.transport.abort()
        else:
            self._look_later()

    def _start_clock(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _stop_clock(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_body(self) -> None:
        self._heard_at = self.loop.time()
        if self._body_timer is None:
            self._body_timer = self.loop.call_later(self.body_seconds, self._look_for_body)

    def _look_for_body(self) -> None:
        """End a connection whose body does not come; one timer for all its pieces."""
        self._body_timer = None
        if self._in_head:
            return
        left_seconds = self._heard_at + self.body_seconds - self.loop.time()
        if self.flow.read_paused or left_seconds > 0:
            wait_seconds = self.body_seconds if self.flow.read_paused else left_seconds
            self._body_timer = self.loop.call_later(wait_seconds, self._look_for_body)
        else:
            self.transport.abort()

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_clock()  # an earlier request of this connection is still being answered
        else:
            self.transport.close()


def _ignore(_: int) -> None:
    """Count nothing: the application gave nothing to count with."""


def _problem(error: BrokerError) -> bytes:
    """Return a whole answer, as ``app.problem`` would make it."""
    request_id = f"req_{random.getrandbits(104):026x}"  # no secret
    document = {"type": f"urn:broker:error:{error.code}", "title": error.title, "status": error.status}
    document |= {"detail": error.detail, "code": error.code, "request_id": request_id}
    body = json.dumps(document).encode()
    fields = (
        ("content-type", "application/problem+json"),
        ("content-length", str(len(body))),
        ("cache-control", "no-store"),
        ("x-request-id", request_id),
        ("x-broker-error", error.code),
        ("connection", "close"),
    )
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return STATUS_LINE[error.status] + head.encode() + b"\r\n" + body
