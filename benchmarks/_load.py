"""A load generator for one core: keep-alive connections that each send the next request when the last one was answered."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast


@dataclass(frozen=True)
class Measured:
    """What one round gave: answers a second, their statuses, and latency quantiles in milliseconds."""

    per_second: float
    statuses: dict[int, int]
    p50_ms: float
    p99_ms: float


class _Connection(asyncio.Protocol):
    """One keep-alive connection; answers are cut by Content-Length."""

    def __init__(self, next_request: Callable[[], bytes], note: Callable[[int, float], None]) -> None:
        self._next_request = next_request
        self._note = note
        self._buffer = bytearray()
        self._sent_at = 0.0
        self._stopped = False
        self._transport: asyncio.Transport | None = None
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        self._sent_at = time.perf_counter()
        self._transport.write(self._next_request())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        if not separator:
            return
        lowered = head.lower()
        length = int(lowered.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        if len(rest) < length:
            return
        self._buffer.clear()
        self._note(int(head[9:12]), time.perf_counter() - self._sent_at)
        if self._stopped:
            assert self._transport is not None
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        if not self.closed.done():
            self.closed.set_result(None)

    def stop(self) -> None:
        """End after the answer that is awaited."""
        self._stopped = True


async def measure(port: int, next_request: Callable[[], bytes], *, connections: int, seconds: float) -> Measured:
    """Load ``127.0.0.1:port`` for ``seconds``; only answers that came in that time are counted."""
    latencies: list[float] = []
    statuses: dict[int, int] = {}

    def note(status: int, latency: float) -> None:
        statuses[status] = statuses.get(status, 0) + 1
        latencies.append(latency)

    loop = asyncio.get_running_loop()
    opened = [
        (await loop.create_connection(lambda: _Connection(next_request, note), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    elapsed, count = time.perf_counter() - started, len(latencies)
    for connection in opened:
        connection.stop()
    await asyncio.wait([connection.closed for connection in opened], timeout=30)
    quantiles = statistics.quantiles(latencies, n=100)
    return Measured(count / elapsed, statuses, quantiles[49] * 1000, quantiles[98] * 1000)
