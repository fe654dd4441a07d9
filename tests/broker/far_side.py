"""A raw HTTP server for tests: each connection is played by a coroutine that reads requests and writes any bytes."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Line:
    """One connection as its server sees it."""

    def __init__(self, far: FarSide, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.far = far
        self.reader = reader
        self.writer = writer

    async def head(self) -> bytes:
        """Read a request's head and note it."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        self.far.requests.append(head)
        self.far.changed.set()
        return head

    async def request(self) -> bytes:
        """Read a whole request, its body as it stands on the wire, and note it."""
        head = await self.head()
        body = b""
        if said := re.search(rb"\r\ncontent-length: ([0-9]+)\r\n", head):
            body = await self.reader.readexactly(int(said[1]))
        elif b"\r\ntransfer-encoding: chunked\r\n" in head:
            while not body.endswith(b"0\r\n\r\n"):
                body += await self.reader.readuntil(b"\r\n")
        self.far.requests[-1] = head + body
        return head + body

    async def say(self, answer: bytes) -> None:
        self.writer.write(answer)
        await self.writer.drain()

    def reset(self) -> None:
        """End it with a reset."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Play = Callable[[Line], Awaitable[None]]


class FarSide:
    """What a server saw: whole requests, the local address of each connection, how many are open."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.port = 0
        self.requests: list[bytes] = []
        self.dialled: list[str] = []
        self.open = 0
        self.changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.dialled.append(writer.get_extra_info("sockname")[0])
        self.open += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
                await self.play(Line(self, reader, writer))
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()
            self.changed.set()

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                self.changed.clear()
                await self.changed.wait()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@contextlib.asynccontextmanager
async def far_side(
    play: Play, *, tls: ssl.SSLContext | None = None, hosts: Sequence[str] = ("127.0.0.1",)
) -> AsyncIterator[FarSide]:
    """Serve on the same port of all ``hosts``."""
    far = FarSide(play)
    async with contextlib.AsyncExitStack() as stack:
        for host in hosts:
            server = await asyncio.start_server(far.serve, host, far.port, ssl=tls)
            stack.callback(server.close)
            far.port = server.sockets[0].getsockname()[1]
        yield far
        await far.stop()


def answering(*answers: bytes) -> Play:
    """Answer each request of a connection with the next of these, the last one for ever."""

    async def play(line: Line) -> None:
        turn = 0
        while True:
            await line.request()
            await line.say(answers[min(turn, len(answers) - 1)])
            turn += 1

    return play


def once(answer: bytes) -> Play:
    """Answer one request and end the connection."""

    async def play(line: Line) -> None:
        await line.request()
        await line.say(answer)

    return play


async def silence(line: Line) -> None:
    """Read one request and answer nothing."""
    await line.request()
    await line.reader.read()
