"""A small load balancer for HTTP/1.1: round robin over the replicas whose readiness says yes, kept connections either way.

It asks each replica's `/health/ready` all the time. It sends a request again only where none of it was ever sent; what was sent
and not answered is the client's to hear of (502), and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

PROBE_SECONDS = 0.1
PATIENCE_SECONDS = 60.0
LOST = b"HTTP/1.1 502 Sent And Not Answered\r\nContent-Length: 0\r\n\r\n"
NOBODY = b"HTTP/1.1 503 Nobody Is Ready\r\nRetry-After: 1\r\nX-Balancer: nobody\r\nContent-Length: 0\r\n\r\n"
PROBE = b"GET /health/ready HTTP/1.1\r\nHost: balancer\r\nConnection: close\r\n\r\n"


@dataclass
class Upstream:
    """A kept connection to a replica."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def is_usable(self) -> bool:
        """Whether nobody has ended it, as far as is known here."""
        return not self.reader.at_eof() and not self.writer.is_closing()


@dataclass
class Balancer:
    """``ready``: the ports of the replicas that are in; ``counts``: what did not go well, by kind.

    ``panics``: where none is ready it asks any, as large ones do, so that clients see the replicas' own errors.
    """

    port: int = 0
    panics: bool = False
    ready: set[int] = field(default_factory=set)
    idle: dict[int, list[Upstream]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    _turns: Iterator[int] = field(default_factory=itertools.count)
    _probes: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    def watch(self, port: int) -> None:
        """Let a replica in as soon as it is ready, whenever it is."""
        if port not in self._probes:
            self._probes[port] = asyncio.create_task(self._probe(port))

    async def forget(self, port: int) -> None:
        """Have nothing to do with a replica any more."""
        task = self._probes.pop(port)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._take_out(port)

    async def has(self, *ports: int, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until these are in."""
        async with asyncio.timeout(seconds):
            while not self.ready.issuperset(ports):  # noqa: ASYNC110 - what is waited for is another process
                await asyncio.sleep(0.02)

    async def aclose(self) -> None:
        """Ask no more, and hang up."""
        for task in self._probes.values():
            task.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        for port in list(self.idle):
            self._take_out(port)

    async def _probe(self, port: int) -> None:
        """Ask one replica over and over, each time on a connection of its own."""
        while True:
            (self.ready.add if await _is_ready(port) else self._take_out)(port)
            await asyncio.sleep(PROBE_SECONDS)

    def _take_out(self, port: int) -> None:
        self.ready.discard(port)
        for upstream in self.idle.pop(port, []):
            upstream.writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what one client asks, request by request."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(_length(head) or 0)
                await self._answer(head + body, writer)
        except (OSError, EOFError):
            pass  # the client left, or an answer was cut
        finally:
            writer.close()

    async def _answer(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        found = await self._upstream()
        if found is None:
            self.counts["nobody"] += 1
            writer.write(NOBODY)
            return
        port, upstream = found
        started = keeps = False
        try:
            upstream.writer.write(request)
            async with asyncio.timeout(PATIENCE_SECONDS):
                head = await upstream.reader.readuntil(b"\r\n\r\n")
            started = True
            writer.write(_without_connection(head))
            await _pass_body(head, upstream.reader, writer)
            keeps = b"connection: close" not in head.lower()
        except (OSError, EOFError, TimeoutError):
            self.counts["cut" if started else "lost"] += 1
            if started:
                raise
            writer.write(LOST)
        finally:
            self._give_back(port, upstream, keeps=keeps)

    async def _upstream(self) -> tuple[int, Upstream] | None:
        """Return a connection to a ready replica; a replica that does not take one is asked no more until it is ready again."""
        refused: set[int] = set()
        while ports := sorted((self.ready or (self._probes.keys() if self.panics else set())) - refused):
            port = ports[next(self._turns) % len(ports)]
            while self.idle.get(port):
                upstream = self.idle[port].pop()
                if upstream.is_usable:
                    return port, upstream
                upstream.writer.close()
            try:
                return port, Upstream(*await asyncio.open_connection("127.0.0.1", port))
            except OSError:
                self.counts["refused"] += 1
                self._take_out(port)
                refused.add(port)
        return None

    def _give_back(self, port: int, upstream: Upstream, *, keeps: bool) -> None:
        if keeps and port in self.ready:
            self.idle.setdefault(port, []).append(upstream)
        else:
            upstream.writer.close()


async def _is_ready(port: int) -> bool:
    try:
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(PROBE)
                return (await reader.readuntil(b"\r\n"))[9:12] == b"200"
            finally:
                writer.close()
    except (OSError, EOFError, TimeoutError):
        return False


def _length(head: bytes) -> int | None:
    _, found, rest = head.lower().partition(b"content-length:")
    return int(rest.partition(b"\r\n")[0]) if found else None


def _without_connection(head: bytes) -> bytes:
    return b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:"))


async def _pass_body(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass a body on, of a length or in chunks, as it comes."""
    if b"transfer-encoding: chunked" not in head.lower():
        writer.write(await reader.readexactly(_length(head) or 0))
        return
    size = -1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line, 16)
        writer.write(line + await reader.readexactly(size + 2))
        await writer.drain()


@contextlib.asynccontextmanager
async def open_balancer(*ports: int) -> AsyncIterator[Balancer]:
    """Serve in front of these replicas until the block ends; the first answers may come before any is ready."""
    balancer, clients = Balancer(), set[asyncio.Task[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        clients.add(task)
        task.add_done_callback(clients.discard)
        with contextlib.suppress(asyncio.CancelledError):
            await balancer.serve(reader, writer)

    for port in ports:
        balancer.watch(port)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    balancer.port = server.sockets[0].getsockname()[1]
    try:
        yield balancer
    finally:
        server.close()
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await balancer.aclose()
