"""One connection of proxied calls: writes a request, takes the answer's bytes as they come, and knows how far both got."""

from __future__ import annotations

import asyncio
import select
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final, Literal, TypeAlias, cast

import httptools

from broker.egress.dialing import OutcomeUnknown, not_sent
from broker.egress.messages import MAX_HEAD_BYTES, AnswerHead, Fields, MalformedAnswer, read_head, refuse_hopeless

BUFFER_BYTES: Final = 262_144
PIECE_BYTES: Final = 65_536
PIECE_OVERHEAD_BYTES: Final = 60  # what a piece that waits costs beside its bytes
MAX_INTERIM_ANSWERS: Final = 10
_CHUNKED: Final = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
_CUT: Final = "The provider's answer did not come complete"
_MALFORMED: Final = "The provider's answer is malformed"
_LATE: Final = "The provider did not answer in time"

Waiting: TypeAlias = Literal["nothing", "answer", "drain", "caller"]


class UploadStalled(OutcomeUnknown):
    """The caller's own pieces did not come in time: no fault of the provider's. A part of the request was sent."""

    def __init__(self) -> None:
        """Count as a time-out."""
        super().__init__("The request's body did not come in time", timed_out=True)


class WireAnswer:
    """An answer whose head has come. Exactly one task reads it; ``aclose`` has to follow, and may come at any time.

    ``headers``: as received, names in lower case, framing and hop-by-hop fields included. ``length``: the whole body's
    where the head says it, else None. ``whole``: all of the body where it came with the head, else None.
    """

    __slots__ = (
        "_bytes_waiting",
        "_ended",
        "_error",
        "_pieces",
        "_waiter",
        "_wire",
        "headers",
        "length",
        "status",
        "whole",
    )

    def __init__(self, wire: Wire, head: AnswerHead) -> None:
        """Begin with no body; the connection adds it."""
        self.status: int = head.status
        self.headers: Fields = head.headers
        self.length: int | None = head.length
        self.whole: bytes | None = None
        self._wire: Wire | None = wire
        self._pieces: deque[bytes] = deque()
        self._bytes_waiting = 0
        self._ended = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self, idle_seconds: float) -> bytes:
        """Return what has come, at least a byte and not more than 256 KiB, ``b""`` at the end.

        What came in small pieces is joined, up to 64 KiB.
        Raises ``OutcomeUnknown`` when nothing comes for ``idle_seconds`` (``timed_out``), when the body is cut or malformed;
        what the request's own iterator raises, as it is.
        """
        if self._wire is not None and not self._pieces and not self._ended and self._error is None:
            await self._more(self._wire, idle_seconds)
        if self._pieces:
            return self._next_piece()
        if self._error is not None:
            raise self._error
        return b""

    async def _more(self, wire: Wire, idle_seconds: float) -> None:
        self._waiter = wire.loop.create_future()
        wire.expect("answer", idle_seconds)
        try:
            await self._waiter
        finally:
            self._waiter = None
            wire.expect_nothing()

    def _next_piece(self) -> bytes:
        pieces = self._pieces
        piece = pieces.popleft()
        if len(piece) > BUFFER_BYTES:
            pieces.appendleft(piece[BUFFER_BYTES:])
            piece = piece[:BUFFER_BYTES]
            self._bytes_waiting -= len(piece)
        else:
            taken, room = [piece], PIECE_BYTES - len(piece)
            while pieces and len(pieces[0]) <= room:
                taken.append(pieces.popleft())
                room -= len(taken[-1])
            piece = b"".join(taken)
            self._bytes_waiting -= len(piece) + len(taken) * PIECE_OVERHEAD_BYTES
        if self._wire is not None and self._bytes_waiting < BUFFER_BYTES // 2:
            self._wire.resume_reading()
        return piece

    async def aclose(self) -> None:
        """Keep the connection if request and answer are complete, else end it. Twice does no harm; never raises."""
        wire, self._wire = self._wire, None
        if wire is not None:
            self.end(OutcomeUnknown(_CUT))
            self._pieces.clear()
            await wire.finish()

    # What the connection does to it.

    def add(self, piece: bytes) -> bool:
        """Take a piece of the body; true when more wait unread than should."""
        self._pieces.append(piece)
        self._bytes_waiting += len(piece) + PIECE_OVERHEAD_BYTES
        self._wake()
        return self._bytes_waiting > BUFFER_BYTES

    def end(self, error: BaseException | None = None) -> None:
        """Note that nothing more comes, and why; what was noted first stays."""
        if self._ended or self._error is not None:
            return
        self._ended, self._error = error is None, error
        self._wake()

    def gather(self) -> None:
        """Make ``whole`` of what has come, which is all."""
        self.whole = b"".join(self._pieces)

    def let_go(self) -> None:
        """Forget the connection: it is another request's from now on."""
        self._wire = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Wire(asyncio.Protocol):
    """One connection. One exchange at a time: ``send``, then ``finish``; the loop's thread only.

    ``at_end`` is called when an exchange is over, ``at_loss`` when the connection is gone. ``kept`` tells whether it has
    served before, ``untouched`` whether not a byte of the present answer has come, ``idle_since`` is the loop's clock.
    """

    def __init__(self, at_end: Callable[[Wire], None], at_loss: Callable[[Wire], None]) -> None:
        """Wait for a transport."""
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self.kept = False
        self.untouched = True
        self.idle_since = 0.0
        self.keep_seconds = 0.0
        self._at_end = at_end
        self._at_loss = at_loss
        self._transport: asyncio.Transport | None = None
        self._poll = select.poll()
        # the exchange
        self._asking = False
        self._sent = False
        self._complete = False
        self._method = b""
        self._interim = 0
        self._buffer = bytearray()
        self._head_waiter: asyncio.Future[WireAnswer] | None = None
        self._answer: WireAnswer | None = None
        self._left: int | None = None
        self._chunks: httptools.HttpResponseParser | None = None
        self._chunks_ended = False
        self._unchunked: list[bytes] = []
        self._tail = b""
        self._overhead = 0
        self._reading_paused = False
        # the upload
        self._upload: asyncio.Task[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._writing_paused = False
        # the clock: one timer, moved on lazily
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._deadline: float | None = None
        self._waiting: Waiting = "nothing"
        self._unwritten = 0
        self._idle_seconds = 0.0

    # --- An exchange.

    def usable(self) -> bool:
        """Say whether it is open and the other side has sent nothing since the last answer, not even its end.

        The socket itself is asked: what already waits there would be taken for the next answer.
        """
        return self.alive and not self._poll.poll(0)

    async def send(
        self,
        method: bytes,
        head: bytes,
        body: bytes | AsyncIterator[bytes] | None,
        length: int | None,
        *,
        headers_seconds: float,
        idle_seconds: float,
    ) -> WireAnswer:
        """Write the request and return its answer when its head has come. Raises as ``Calls.open`` says."""
        transport = self._begin(method)
        waiter: asyncio.Future[WireAnswer] = self.loop.create_future()
        self._head_waiter = waiter
        if body is None or (isinstance(body, bytes) and len(body) <= PIECE_BYTES):
            transport.write(head + body if body else head)
            self._sent = True
            self.expect("answer", headers_seconds)
        else:
            transport.write(head)
            self._idle_seconds = idle_seconds
            self._upload = self.loop.create_task(self._send_body(body, length, headers_seconds))
        try:
            return await waiter
        finally:
            self._head_waiter = None
            self.expect_nothing()
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # retrieved, should a cancellation have come in the same moment

    def _begin(self, method: bytes) -> asyncio.Transport:
        self.untouched = True
        self._asking, self._sent, self._complete = True, False, False
        transport = self._transport
        if transport is None or transport.is_closing():
            raise not_sent("ready")
        self._method, self._interim, self._answer = method, 0, None
        return transport

    async def finish(self) -> None:
        """End the exchange: keep the connection if request and answer are complete, else close it."""
        upload, self._upload = self._upload, None
        try:
            if upload is not None and not upload.done():
                upload.cancel()
                self.abort()
                await asyncio.wait({upload})
        finally:
            self.over()

    def over(self) -> None:
        """End an exchange without an upload that still runs; twice does no harm."""
        if not self._asking:
            return
        if not (self._complete and self._sent and self.keep_seconds > 0):
            self.abort()
        if self._answer is not None:
            self._answer.let_go()
        self._asking, self._answer, self.kept = False, None, True
        self.idle_since = self.loop.time()
        if self._reading_paused:
            self.resume_reading()
        self._at_end(self)

    @property
    def alive(self) -> bool:
        """Whether it is open, as far as the loop has heard."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def complete(self) -> bool:
        """Whether both the request and its answer are through."""
        return self._complete and self._sent

    def close(self) -> None:
        """Close it in order (TLS says goodbye)."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()

    # --- The upload.

    async def _send_body(self, body: bytes | AsyncIterator[bytes], length: int | None, headers_seconds: float) -> None:
        try:
            if isinstance(body, bytes):
                await self._send_bytes(body)
            elif length is None:
                await self._send_chunks(body)
            else:
                await self._send_pieces(body, length)
        except Exception as error:  # noqa: BLE001 - what the caller's iterator raises is the caller's to see
            self._fail(error)
            return
        self._sent = True
        self._expect_in_upload("answer", headers_seconds)

    async def _send_bytes(self, body: bytes) -> None:
        view = memoryview(body)
        for start in range(0, len(body), PIECE_BYTES):
            await self._write(view[start : start + PIECE_BYTES])

    async def _send_chunks(self, body: AsyncIterator[bytes]) -> None:
        self._expect_in_upload("caller", self._idle_seconds)
        async for piece in body:
            if piece:
                await self._write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self._expect_in_upload("caller", self._idle_seconds)
        await self._write(b"0\r\n\r\n")

    async def _send_pieces(self, body: AsyncIterator[bytes], length: int) -> None:
        left = length
        self._expect_in_upload("caller", self._idle_seconds)
        async for piece in body:
            left -= len(piece)
            if left < 0:
                break
            await self._write(piece)
            self._expect_in_upload("caller", self._idle_seconds)
        if left != 0:
            raise OutcomeUnknown("The request's body is not as long as it was said to be")

    async def _write(self, piece: bytes | memoryview) -> None:
        if self._transport is None or self._transport.is_closing():
            raise OutcomeUnknown(_CUT)
        self._transport.write(piece)  # what is closed while this waits is noticed at the next piece, or by who reads
        if self._writing_paused:
            self._unwritten = self._transport.get_write_buffer_size()
            self._expect_in_upload("drain", self._idle_seconds)
            self._drained = self.loop.create_future()
            await self._drained

    def pause_writing(self) -> None:
        """Hold the upload back (asyncio calls this)."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """Let the upload go on (asyncio calls this)."""
        self._writing_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # --- What comes in.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin (asyncio calls this)."""
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's is registered as none
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        """Take bytes (asyncio calls this)."""
        try:
            if self._complete or not self._asking:
                self.abort()  # nobody asked for these: the next answer would not be the next request's
            elif self._answer is None:
                self._take_head(data)
            else:
                self._take_body(self._answer, data)
        except MalformedAnswer:
            self._fail(OutcomeUnknown(_MALFORMED))

    def _take_head(self, data: bytes) -> None:
        self.untouched = False
        buffer = self._buffer
        searched = max(len(buffer) - 3, 0)
        whole: bytes | bytearray = data
        if buffer:
            buffer += data
            whole = buffer
        end = whole.find(b"\r\n\r\n", searched) + 4
        if end < 4 or end > MAX_HEAD_BYTES:
            refuse_hopeless(whole, searched)
            if not buffer:
                buffer += data
            return
        rest = bytes(whole[end:])
        head = read_head(whole, end, self._method)
        self._buffer = bytearray()
        if head.status < 200:
            self._skip_interim(head, rest)
        else:
            self._start_answer(head, rest)

    def _skip_interim(self, head: AnswerHead, rest: bytes) -> None:
        self._interim += 1
        if head.status == 101 or self._interim > MAX_INTERIM_ANSWERS:
            raise MalformedAnswer
        if rest:
            self._take_head(rest)

    def _start_answer(self, head: AnswerHead, rest: bytes) -> None:
        self._answer = answer = WireAnswer(self, head)
        self.keep_seconds = head.keep_seconds
        self._left, self._overhead = head.length, 0
        if head.framing == "chunked":
            self._chunks, self._chunks_ended = httptools.HttpResponseParser(self), False
            self._chunks.feed_data(_CHUNKED)
        else:
            self._chunks = None
        if rest or head.length == 0:
            self._take_body(answer, rest)
        if self._complete:
            answer.gather()
        waiter = self._head_waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(answer)

    def _take_body(self, answer: WireAnswer, data: bytes) -> None:
        if self._chunks is not None:
            self._take_chunks(self._chunks, data)
        elif self._left is None:
            self._add(data)
        elif len(data) < self._left:
            self._left -= len(data)
            self._add(data)
        else:
            self._take_last(answer, data, self._left)

    def _take_last(self, answer: WireAnswer, data: bytes, left: int) -> None:
        if len(data) > left:
            self.keep_seconds = 0.0  # more than was announced
            data = data[:left]
        if data:
            self._add(data)
        self._end(answer)

    def _take_chunks(self, parser: httptools.HttpResponseParser, data: bytes) -> None:
        self._overhead += len(data)
        self._tail = data[-5:] if len(data) >= 5 else (self._tail + data)[-5:]
        broken = False
        try:
            parser.feed_data(data)
        except httptools.HttpParserError:
            self.keep_seconds = 0.0
            broken = not self._chunks_ended
        if self._unchunked:  # at once: chunks may be of two bytes each
            self._add(b"".join(self._unchunked))
            self._unchunked.clear()
        if broken or self._overhead > MAX_HEAD_BYTES:
            raise MalformedAnswer
        if self._chunks_ended and self._answer is not None:
            if self._tail != b"0\r\n\r\n":
                self.keep_seconds = 0.0  # trailers, or something behind the end
            self._end(self._answer)

    def on_body(self, piece: bytes) -> None:
        """Take a piece out of its chunk (httptools calls this), unless it is behind the last one."""
        self._overhead = 0
        if not self._chunks_ended:
            self._unchunked.append(piece)

    def on_message_begin(self) -> None:
        """Note what looks like another answer behind the last chunk (httptools calls this): it is nobody's."""
        if self._chunks_ended:
            self.keep_seconds = 0.0

    def on_message_complete(self) -> None:
        """Note the last chunk (httptools calls this)."""
        self._chunks_ended = True

    def _add(self, piece: bytes) -> None:
        if self._answer is not None and self._answer.add(piece) and not self._reading_paused:
            self._reading_paused = True
            if self._transport is not None:
                self._transport.pause_reading()

    def _end(self, answer: WireAnswer) -> None:
        self._complete = True
        self._chunks = None
        answer.end()

    def resume_reading(self) -> None:
        """Let the other side go on, where it was held back."""
        if self._reading_paused and self._transport is not None:
            self._reading_paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    # --- Its end.

    def eof_received(self) -> None:
        """Take the other side's end (asyncio calls this)."""
        answer = self._answer
        if answer is not None and not self._complete and self._chunks is None and self._left is None and self._is_end():
            self._end(answer)
        self._fail(OutcomeUnknown(_CUT))

    def _is_end(self) -> bool:
        """Say whether TLS ended with its closing alert (RFC 9112 9.8): a cut does not end an answer.

        uvloop calls ``eof_received`` for the alert alone, asyncio for a cut too: the TLS object itself knows.
        """
        secured = None if self._transport is None else self._transport.get_extra_info("ssl_object")
        if secured is None:
            return True
        try:
            return not secured.read(1)  # b"" again after the alert
        except ssl.SSLError:
            return False

    def connection_lost(self, _error: Exception | None) -> None:
        """Note the end (asyncio calls this)."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail(OutcomeUnknown(_CUT))
        self._transport = None
        self.ended.set_result(None)
        self._at_loss(self)

    def _fail(self, error: BaseException) -> None:
        self.abort()
        if self._head_waiter is not None and not self._head_waiter.done():
            self._head_waiter.set_exception(error)
        elif self._answer is not None and not self._complete:
            self._answer.end(error)
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # --- The clock.

    def _expect_in_upload(self, waiting: Waiting, seconds: float) -> None:
        if self._head_waiter is not None:
            self.expect(waiting, seconds)

    def expect(self, waiting: Waiting, seconds: float) -> None:
        """Fail the exchange when what is waited for has not come in ``seconds``."""
        self._waiting = waiting
        self._deadline = deadline = self.loop.time() + seconds
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        self._set_timer(deadline)

    def _set_timer(self, at: float) -> None:
        self._timer_at = at
        self._timer = self.loop.call_at(at, self._tick)

    def expect_nothing(self) -> None:
        """Stop the clock."""
        self._deadline = None

    def _tick(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self.loop.time() < self._deadline:
            self._set_timer(self._deadline)
        elif self._waiting == "drain" and self._progressed():
            self.expect("drain", self._idle_seconds)
        elif self._waiting == "caller":
            self._fail(UploadStalled())
        else:
            self._fail(OutcomeUnknown(_LATE, timed_out=True))

    def _progressed(self) -> bool:
        before = self._unwritten
        self._unwritten = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self._unwritten < before
