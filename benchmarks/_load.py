"""A load generator for one core: keep-alive connections that each send the next request when the last one was answered.

Plain sockets and epoll instead of an event loop of coroutines: 10 µs of a core for each request, so that the generator is
not what is measured, not even with a bare route behind it, and leaves room for a database on its core.
"""

from __future__ import annotations

import select
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

LAST_ANSWERS_SECONDS = 30.0
MOST_READ = 65_536


@dataclass(frozen=True, slots=True)
class Measured:
    """What one round gave: answers a second, answers by status, and latency quantiles in milliseconds.

    ``statuses`` counts every answer, also those that came when the time was over.
    """

    per_second: float
    statuses: dict[int, int]
    p50_ms: float
    p99_ms: float


def measure(port: int, next_request: Callable[[], bytes], *, connections: int, seconds: float) -> Measured:
    """Load ``127.0.0.1:port`` for ``seconds`` with whole requests; return when each one sent was answered.

    Answers must have a Content-Length. RuntimeError for a connection that is closed by the server or never answered.
    """
    poller = select.epoll()
    opened = {one.fileno(): one for one in (_connected(port) for _ in range(connections))}
    sent_at: dict[int, float] = {}
    started = time.perf_counter()
    for number, one in opened.items():
        poller.register(number, select.EPOLLIN)
        sent_at[number] = time.perf_counter()
        one.sendall(next_request())
    try:
        return _loaded(poller, opened, sent_at, next_request, started, seconds)
    finally:
        poller.close()
        for one in opened.values():
            one.close()


def _connected(port: int) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port), timeout=LAST_ANSWERS_SECONDS)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one


def _loaded(
    poller: select.epoll,
    opened: dict[int, socket.socket],
    sent_at: dict[int, float],
    next_request: Callable[[], bytes],
    started: float,
    seconds: float,
) -> Measured:
    latencies: list[float] = []
    statuses: dict[int, int] = {}
    in_time = 0
    partial: dict[int, bytes] = {}
    clock, ends_at = time.perf_counter, started + seconds
    while sent_at:
        events = poller.poll(LAST_ANSWERS_SECONDS)
        if not events:
            raise RuntimeError("a request was never answered")
        for number, _ in events:
            read = opened[number].recv(MOST_READ)
            if not read:
                raise RuntimeError("the server closed a connection")
            data = partial.pop(number, b"") + read
            status = status_of(data)
            if status is None:
                partial[number] = data
                continue
            at = clock()
            latencies.append(at - sent_at[number])
            statuses[status] = statuses.get(status, 0) + 1
            if at < ends_at:
                in_time += 1
                sent_at[number] = at
                opened[number].send(next_request())
            else:
                del sent_at[number]
    quantiles = statistics.quantiles(latencies, n=100)
    return Measured(in_time / seconds, statuses, quantiles[49] * 1000, quantiles[98] * 1000)


def status_of(data: bytes) -> int | None:
    """Return the status of an answer, None while it is not whole."""
    head_ends = data.find(b"\r\n\r\n")
    if head_ends < 0:
        return None
    at = data.find(b"ontent-", 0, head_ends)
    while at >= 0 and data[at + 7 : at + 14].lower() != b"length:":
        at = data.find(b"ontent-", at + 7, head_ends)
    if at < 0:
        raise RuntimeError("an answer without a Content-Length")
    length = int(data[at + 14 : data.index(b"\r\n", at)])
    return int(data[9:12]) if len(data) - head_ends - 4 >= length else None
