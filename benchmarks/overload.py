"""Hand-outs at four times what one core can serve: how many still come through, how late, and who is told to come later.

`make bench-overload`. The broker runs as in production on SQLite, on core 0; the load is on core 1. First the best: 64
connections that each ask as soon as they are answered. Then 2,000 connections of one caller offer four times that, each at its
own pace, and stay silent for as long as a 503 tells them to; beside them another caller asks 25 times a second, and one asks
`/health/live`. Bars: 0.8 of the best still handed out, p99 of what is handed out under 5 times that at the best, once the 3 s
are over in which a burst is let in. The last line is JSON.
"""

from __future__ import annotations

import heapq
import json
import resource
import select
import socket
import statistics
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _load import MOST_READ, status_of
from _servers import Server, stay_on_load_core
from tokens import Variant, broker

POPULATION, CONNECTIONS, QUIET, TIMES = 1_000, 2_000, 4, 4.0
WARM_SECONDS, BEST_SECONDS, SETTLE_SECONDS, SECONDS = 3.0, 5.0, 18.0, 15.0
QUIET_PER_SECOND, LIVE_SECONDS = 25.0, 0.2
MOST_BYTES_MORE = 64 * 2**20
BARS = {"goodput_vs_best": 0.8}
MOST = {"p99_vs_normal": 5.0}


@dataclass
class Client:
    """A connection that asks at its pace, one request at a time, and does what a 503 says."""

    one: socket.socket
    next_request: Callable[[], bytes]
    pace_seconds: float
    due: float
    sent_at: float = 0.0
    partial: bytes = b""


@dataclass
class Heard:
    """What came back while it was counted."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)

    def p99_ms(self, of: list[float]) -> float:
        """Return a quantile."""
        return statistics.quantiles(of, n=100)[98] * 1000 if len(of) > 1 else 0.0


class Crowd:
    """All clients, in one thread without coroutines."""

    def __init__(self, server: Server) -> None:
        """Begin with none."""
        self._server = server
        self._poller = select.epoll()
        self._clients: dict[int, Client] = {}
        self._heard: dict[Callable[[], bytes], Heard] = {}
        self._due: list[tuple[float, int]] = []

    def add(self, count: int, next_request: Callable[[], bytes], per_second: float) -> Heard:
        """Add clients that together offer so much; return where what they hear is kept."""
        now, pace_seconds = time.perf_counter(), count / per_second
        for number in range(count):
            one = socket.create_connection(("127.0.0.1", self._server.port), timeout=30)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            due = now + pace_seconds * number / count
            self._clients[one.fileno()] = Client(one, next_request, pace_seconds, due)
            self._poller.register(one.fileno(), select.EPOLLIN)
            heapq.heappush(self._due, (due, one.fileno()))
        return self._heard.setdefault(next_request, Heard())

    def run(self, seconds: float) -> None:
        """Let them ask; what was heard before is forgotten."""
        for heard in self._heard.values():
            heard.statuses.clear()
            heard.latencies.clear()
            heard.refusals.clear()
        ends_at = time.perf_counter() + seconds
        while (now := time.perf_counter()) < ends_at:
            for _ in range(200):  # what is late waits for the answers that came
                if not self._due or self._due[0][0] > now:
                    break
                self._ask(self._clients[heapq.heappop(self._due)[1]])
            for number, _ in self._poller.poll(0.001):
                self._hear(number, self._clients[number])

    def _ask(self, client: Client) -> None:
        client.sent_at = time.perf_counter()
        client.one.send(client.next_request())

    def _hear(self, number: int, client: Client) -> None:
        read = client.one.recv(MOST_READ)
        if not read:
            raise RuntimeError("the server closed a connection")
        data = client.partial + read
        status = status_of(data)
        client.partial = data if status is None else b""
        if status is None:
            return
        now, heard = time.perf_counter(), self._heard[client.next_request]
        heard.statuses[status] += 1
        client.due = max(client.due + client.pace_seconds, now)
        if status == 200:
            heard.latencies.append(now - client.sent_at)
        else:
            heard.refusals.append(now - client.sent_at)
            client.due = now + retry_after(data)
        heapq.heappush(self._due, (client.due, number))


def retry_after(answer: bytes) -> float:
    """Return what a refusal says (RuntimeError when it says nothing)."""
    _, found, rest = answer.lower().partition(b"retry-after: ")
    if not found:
        raise RuntimeError(f"a refusal without Retry-After: {answer[:200]!r}")
    return float(rest.partition(b"\r\n")[0])


class Live(threading.Thread):
    """Asks `/health/live` over and over."""

    def __init__(self, server: Server) -> None:
        """Begin."""
        super().__init__(daemon=True)
        self._url = f"http://127.0.0.1:{server.port}/health/live"
        self.seconds: list[float] = []
        self.failed: list[str] = []

    def run(self) -> None:
        """Ask until the process ends."""
        while True:
            began = time.monotonic()
            try:
                urllib.request.urlopen(self._url, timeout=5).close()  # noqa: S310 - a loopback URL of ours
                self.seconds.append(time.monotonic() - began)
            except OSError as error:
                self.failed.append(str(error))
            time.sleep(LIVE_SECONDS)


def quiet_requests(variant: Variant, key: str, ids_request: Callable[[], bytes]) -> Callable[[], bytes]:
    """Make another caller that may have tokens; return what makes its requests."""
    body = {"name": "quiet", "roles": ["service"], "grants": [{"integrations": ["*"], "may": ["token"]}]}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    url = f"http://127.0.0.1:{variant.server.port}/v1/callers"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        made = json.load(answer)
    old, new = f"Bearer {key}".encode(), f"Bearer {made['key']}".encode()
    return lambda: ids_request().replace(old, new)


def measured(variant: Variant) -> dict[str, float]:
    """Measure the best, then the overload; return what the bars are about."""
    key = variant.next_request().partition(b"Bearer ")[2].partition(b"\r\n")[0].decode()
    variant.run(WARM_SECONDS, counts=False)
    variant.run(BEST_SECONDS)
    best, before = variant.rounds[-1], variant.server.memory_bytes()
    crowd, live = Crowd(variant.server), Live(variant.server)
    quiet = crowd.add(QUIET, quiet_requests(variant, key, variant.next_request), QUIET_PER_SECOND)
    noisy = crowd.add(CONNECTIONS, variant.next_request, TIMES * best.per_second)
    live.start()
    crowd.run(SETTLE_SECONDS)
    spent = variant.server.cpu_seconds()
    crowd.run(SECONDS)
    spent = variant.server.cpu_seconds() - spent
    more = peak_bytes(variant.server) - before
    good = noisy.statuses[200] / SECONDS
    print(f"the best: {best.per_second:,.0f} a second, p99 {best.p99_ms:.1f} ms, {before / 2**20:.0f} MiB")
    print(
        f"offered {TIMES:.0f} times that: {good:,.0f} a second, p99 {noisy.p99_ms(noisy.latencies):.1f} ms, and "
        f"{noisy.statuses[503] / SECONDS:,.0f} refusals, p99 {noisy.p99_ms(noisy.refusals):.1f} ms; "
        f"at most {more / 2**20:.0f} MiB more"
    )
    print(
        f"the core was ours for {spent:.1f} of {SECONDS:.0f} s: on a machine with other work only goodput_by_core_time tells"
    )
    print(
        f"another caller meanwhile: {dict(quiet.statuses)}, p99 {quiet.p99_ms(quiet.latencies):.1f} ms; /health/live: "
        f"{len(live.seconds)} answers, {max(live.seconds) * 1000:.0f} ms at most, failures: {live.failed}"
    )
    return {
        "goodput_vs_best": round(good / best.per_second, 3),
        "goodput_by_core_time": round(noisy.statuses[200] / spent * variant.cpu_us[-1] / 1e6, 3),
        "p99_vs_normal": round(noisy.p99_ms(noisy.latencies) / best.p99_ms, 2),
        "mib_more": round(more / 2**20, 1),
        "quiet_served": round(quiet.statuses[200] / max(1, sum(quiet.statuses.values())), 3),
        "live_failures": len(live.failed),
        "other_statuses": sum(noisy.statuses.values()) - noisy.statuses[200] - noisy.statuses[503],
    }


def peak_bytes(server: Server) -> int:
    """Return the most resident memory that it has had."""
    status = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def judged(ratios: dict[str, float]) -> Iterator[str]:
    """Say of each bar whether it is met."""
    for name, bar in BARS.items():
        yield f"{name}: {ratios[name]} ({'meets' if ratios[name] >= bar else 'MISSES'} the bar of {bar})"
    for name, bar in MOST.items():
        yield f"{name}: {ratios[name]} ({'meets' if ratios[name] < bar else 'MISSES'} the bar of {bar})"


def main() -> None:
    """Run everything; print the table, what was missed, and the JSON line."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    stay_on_load_core()
    with broker("SQLite", POPULATION) as variant:
        ratios = measured(variant)
    print("\n".join(judged(ratios)))
    print(json.dumps({"benchmark": "overload", "ratios": ratios}))
    wrong: list[Any] = [ratios["live_failures"], ratios["other_statuses"], ratios["mib_more"] * 2**20 > MOST_BYTES_MORE]
    if any(wrong):
        sys.exit("something was answered neither with a token nor with 503, or not at all, or memory grew too much")


if __name__ == "__main__":
    main()
