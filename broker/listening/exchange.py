"""One request and its answer, as the application sees them: uvicorn's cycle, made and written in fewer steps."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HEADER_RE, HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle

RAW_TARGET: Final = "broker.raw_target"  # in the scope: the request target, byte for byte
CUT: Final = "broker.cut"  # a message type: end the connection amid an answer, so that it cannot pass as whole
BARE: Final = "broker.bare"  # in the start of an answer: it brings its own Date
GONE: Final = "broker.gone"  # in the scope: a list of what to call, without arguments, when the client is gone
NAMES_ITSELF: Final = "broker_names_itself"  # in a request's state: the answer has its request id already
UNUSUAL: Final = frozenset({b"connection", b"transfer-encoding"})
START: Final = "http.response.start"
BODY: Final = "http.response.body"

Fields = list[tuple[bytes, bytes]]


def raw_target(scope: Any) -> bytes:  # noqa: ANN401 - ASGI's own shape
    """Return the request target byte for byte; put together where the server does not tell it."""
    raw = scope.get(RAW_TARGET)
    if raw is not None:
        return bytes(raw)
    query = scope["query_string"]
    return bytes(scope["raw_path"] + (b"?" + query if query else b""))


class Exchange(RequestResponseCycle):
    """Writes an answer that comes with its whole body at once, with one write and one look at its fields: 8 µs less.

    All others go uvicorn's way but for their head, which waits for the first piece of the body, for HTTP/1.0, and for a
    status above 599, which is nobody's but is sent (LinkedIn's 999). To a client that is gone nothing is said.

    ``status``: of the answer, 500 before there is one. ``request_id``: sent along with the answer as ``X-Request-Id`` where
    it is set and the scope's state does not say ``NAMES_ITSELF``.
    """

    # What holds until something happens stands here, and so is not set for each request.
    access_log = disconnected = response_started = response_complete = _until_close = False
    more_body = True
    chunked_encoding: bool | None = None
    expected_content_length = 0
    status = 500
    request_id = b""
    task: asyncio.Task[None] | None = None
    _start: Any = None

    def __init__(
        self,
        scope: Any,  # noqa: ANN401 - ASGI's own shape
        protocol: Any,  # noqa: ANN401 - uvicorn's, which has what its cycle needs
        *,
        keep_alive: bool,
        on_response: Callable[..., None],
    ) -> None:
        """Begin with a request's head; ``on_response`` is called once all of the answer was written."""
        self.scope = scope
        self.transport = protocol.transport
        self.flow = protocol.flow
        self.logger = protocol.logger
        self.default_headers = protocol.server_state.default_headers
        self.message_event = asyncio.Event()
        self.on_response = on_response
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = protocol.expect_100_continue
        self.body = bytearray()

    async def run_asgi(self, app: Any) -> None:  # noqa: ANN401 - as in uvicorn, whose types are its own
        """Have the request answered, if there is still somebody to be answered."""
        if not self.disconnected:
            await super().run_asgi(app)

    def leave(self) -> None:
        """Note that the client is gone: wake whoever waits for more of the request, and call what asked for it, once."""
        if self.disconnected or self.response_complete:
            return
        self.disconnected = True
        self.message_event.set()
        for call in self.scope[GONE]:  # type: ignore[typeddict-item] # ours, beside the framework's
            call()

    async def answer(self, status: int, lines: bytes, body: bytes) -> None:
        """Answer with a whole body, of a status that has one. ``lines``: fields as they are sent, which are not looked at.

        The length is told here, and the request's id.
        """
        self.status = status
        if not self.keep_alive or self.flow.write_paused or self.scope["method"] == "HEAD":
            fields = [tuple(line.split(b": ", 1)) for line in lines.splitlines()]
            await self.send(
                {"type": START, "status": status, "headers": [*fields, (b"content-length", b"%d" % len(body))]}
            )
            await self.send({"type": BODY, "body": body, "more_body": False})
        elif not self.disconnected:
            own = b"".join([b"%b: %b\r\n" % field for field in self.default_headers])
            self._write_whole(
                b"%b%b%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n%b"
                % (STATUS_LINE[status], own, lines, len(body), self.request_id, body)
            )

    async def send(self, message: Any) -> None:  # noqa: ANN401
        """Take the next message of the application; of a client that is gone it does nothing."""
        if message["type"] == START and not self.response_started:
            self._begin(message)
            return
        if self.disconnected:
            return
        if message["type"] == CUT:
            self._cut()
            return
        start, self._start = self._start, None
        if start is None:
            await self._send_on(message)
            return
        answer = None if message.get("more_body") else self._whole(start, message.get("body", b""))
        if answer is None or self.flow.write_paused:
            self._measure(start)
            await super().send(start)
            await self._send_on(message)
        else:
            self._write_whole(answer)

    def _begin(self, start: Any) -> None:  # noqa: ANN401
        self._start = start
        self.status = status = start["status"]
        if status > 599:
            STATUS_LINE.setdefault(status, b"HTTP/1.1 %d \r\n" % status)  # uvicorn has the lines up to 599
        if start.get(BARE):
            self.default_headers = []
        if self.request_id and NAMES_ITSELF not in self.scope["state"]:
            start["headers"] = [*start["headers"], (b"x-request-id", self.request_id)]

    def _write_whole(self, answer: bytes) -> None:
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(answer)
        self.message_event.set()
        self.on_response()

    def _measure(self, start: Any) -> None:  # noqa: ANN401
        """Let an answer to HTTP/1.0 without a length last until the connection ends, as chunks are not known there."""
        if self.scope["http_version"] == "1.0" and all(
            name.lower() != b"content-length" for name, _ in start["headers"]
        ):
            self.chunked_encoding, self.expected_content_length, self._until_close = False, sys.maxsize, True

    async def _send_on(self, message: Any) -> None:  # noqa: ANN401
        if self._until_close and not message.get("more_body"):
            self.expected_content_length = len(message.get("body", b""))  # uvicorn looks whether all of it came
        await super().send(message)

    def _cut(self) -> None:
        self.disconnected = self.response_started = self.response_complete = True
        self.transport.abort()

    def _whole(self, start: Any, body: bytes) -> bytes | None:  # noqa: ANN401
        """Return the whole answer, None for one that is not quite ordinary."""
        status, headers = start["status"], [*self.default_headers, *start["headers"]]
        if not self.keep_alive or self.scope["method"] == "HEAD" or status in {204, 304}:
            return None
        names = [name for name, _ in headers]
        all_names = b"".join(names)
        if not all_names.islower() or HEADER_RE.search(all_names) or not UNUSUAL.isdisjoint(names):
            return None
        if HEADER_VALUE_RE.search(b"".join([value for _, value in headers])):
            return None
        if [value for name, value in headers if name == b"content-length"] != [b"%d" % len(body)]:
            return None
        lines = b"".join([b"%b: %b\r\n" % one for one in headers])
        return b"%b%b\r\n%b" % (STATUS_LINE[status], lines, body)
