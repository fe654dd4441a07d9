"""How requests come in: uvicorn's HTTP protocol, with limits on the size of a request's head and its time, made cheaper."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

MAX_HEAD_BYTES: Final = 64 * 1024
HEAD_SECONDS: Final = 20.0
UNUSUAL: Final = frozenset({b"connection", b"transfer-encoding"})


class WholeAnswers(RequestResponseCycle):
    """Writes an answer that comes with its whole body at once, with one write and one look at its fields: 8 µs less.

    All others go uvicorn's way, unchanged, but for their head, which waits for the first piece of the body.
    """

    _start: Any = None

    async def send(self, message: Any) -> None:  # noqa: ANN401 - as in uvicorn, whose types are its own
        """Take the next message of the application."""
        if message["type"] == "http.response.start" and not self.response_started:
            self._start = message
            return
        start, self._start = self._start, None
        if start is None:
            await super().send(message)
            return
        answer = None if message.get("more_body") else self._whole(start, message.get("body", b""))
        if answer is None or self.disconnected or self.flow.write_paused:
            await super().send(start)
            await super().send(message)
            return
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(answer)
        self.message_event.set()
        self.on_response()

    def _whole(self, start: Any, body: bytes) -> bytes | None:  # noqa: ANN401
        """Return the whole answer, None for one that is not quite ordinary."""
        status, headers = start["status"], [*self.default_headers, *start["headers"]]
        if not self.keep_alive or self.scope["method"] == "HEAD" or status in {204, 304}:
            return None
        if HEADER_RE.search(b"".join([name for name, _ in headers])):
            return None
        if HEADER_VALUE_RE.search(b"".join([value for _, value in headers])):
            return None
        has_length, content = False, [STATUS_LINE[status]]
        for name, value in headers:
            if name == b"content-length":
                has_length = value == b"%d" % len(body)
            elif name.lower() in UNUSUAL:
                return None
            content += (name, b": ", value, b"\r\n")
        return b"".join((*content, b"\r\n", body)) if has_length else None


class BoundedHttp(HttpToolsProtocol):
    """Closes a connection whose request line and fields, trailers too, are over 64 KiB or take more than 20 s.

    The parser keeps whatever comes, and copies it at each read. Framing between chunks of a body counts like a head.
    """

    head_seconds: float = HEAD_SECONDS

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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Start the clock of the first head: a connection that says nothing is closed too."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse (400, closed) what is too much without getting anywhere.

        The clock of a head starts when it does not come whole in one piece, as nearly all do.
        """
        self._advanced = self._ended = False
        super().data_received(data)
        if self._in_head and not self._ended and self._head_timer is None:
            self._start_clock()
        self._idle_bytes = 0 if self._advanced else self._idle_bytes + len(data)
        if self._idle_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The request's head is too large.")

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._field_bytes, self._ended = 0, False

    def on_url(self, url: bytes) -> None:
        """Count the target, which may come in pieces."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a field, of the head or a trailer."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the clock: the head is whole."""
        self._in_head, self._advanced = False, True
        self._stop_clock()
        super().on_headers_complete()
        if type(self.cycle) is RequestResponseCycle:  # made just now; its task has not begun
            self.cycle.__class__ = WholeAnswers

    def on_body(self, body: bytes) -> None:
        """Note that the body goes on."""
        self._advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect the next head; its clock starts with its first byte."""
        self._in_head = self._advanced = self._ended = True
        super().on_message_complete()

    def _count(self, count: int) -> None:
        self._field_bytes += count
        if self._field_bytes > MAX_HEAD_BYTES:
            raise ValueError("the request's head is too large")  # the parser stops, and uvicorn answers 400

    def _start_clock(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _stop_clock(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_clock()  # an earlier request of this connection is still being answered
        else:
            self.transport.close()
