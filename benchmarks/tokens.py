"""Token hand-outs a second on one core against a bare Litestar route, and with 100,000 connections against 1,000.

`make bench-tokens`. Servers on core 0 with all of their threads; load and PostgreSQL on core 1; 64 connections; uniformly
random ids. The broker runs as in production (JSON log lines, SQLite with ``synchronous=FULL``, PostgreSQL as it comes), and
every answer's audit record is durable before it: the number of audit rows has to equal the number of answers, those of the
warm-up too. Variants are interleaved, so that a drifting machine hurts all alike. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa
from _fill import fill
from _load import Measured, measure
from _servers import Server, broker_server, peer_server, postgres, stay_on_load_core
from sqlmodel import Session

from broker.callers import mint_key
from broker.database import opened
from broker.settings import load_settings

CONNECTIONS, ROUNDS, SECONDS, WARM_SECONDS, POPULATION, FEW, MANY = 64, 5, 3.0, 3.0, 10_000, 1_000, 100_000
BARS = {"sqlite_vs_litestar": 0.35, "postgresql_vs_litestar": 0.25}
MOST_GROWTH, MOST_P99_GROWTH = 1.2, 2.0
HANDED_OUT = sa.text("SELECT count(*) FROM audit_records WHERE action = 'connection.token'")


@dataclass
class Variant:
    """A server under load, and what its rounds gave."""

    name: str
    server: Server
    next_request: Callable[[], bytes]
    database_url: str | None = None
    rounds: list[Measured] = field(default_factory=list)
    answers: int = 0
    bad: int = 0
    cpu_us: list[float] = field(default_factory=list)

    def run(self, seconds: float, *, counts: bool = True) -> None:
        """Load it; ``counts``: this round is one of those that are reported."""
        before = self.server.cpu_seconds()
        round_ = measure(self.server.port, self.next_request, connections=CONNECTIONS, seconds=seconds)
        answered = sum(round_.statuses.values())
        self.answers += round_.statuses.get(200, 0)
        self.bad += answered - round_.statuses.get(200, 0)
        if counts:
            self.rounds.append(round_)
            self.cpu_us.append((self.server.cpu_seconds() - before) / answered * 1e6)

    def median(self, name: str) -> float:
        """Return the median over the rounds of one field of ``Measured``."""
        return statistics.median(getattr(one, name) for one in self.rounds)


@contextlib.contextmanager
def broker(name: str, count: int, database_url: str | None = None) -> Iterator[Variant]:
    """Fill a new database with ``count`` connections and serve it."""
    with tempfile.TemporaryDirectory(prefix="broker-bench-") as directory:
        key = mint_key()[1].reveal()
        environment = {
            "BROKER_ENV": "production",
            "BROKER_PUBLIC_URL": "https://broker.example",
            "BROKER_KEYRING": f"bench:{base64.b64encode(os.urandom(32)).decode()}",
            "BROKER_DATA_DIR": directory,
            "BROKER_DATABASE_URL": database_url or f"sqlite:///{directory}/broker.db",
        }
        settings = load_settings({**environment, "BROKER_ADMIN_KEY": key}, directory=Path(directory))
        started = time.monotonic()
        ids = asyncio.run(fill(settings, count))
        print(f"{name}: {count:,} connections made in {time.monotonic() - started:.1f} s", flush=True)
        with broker_server(environment) as server:
            yield Variant(name, server, token_requests(ids, key), environment["BROKER_DATABASE_URL"])


def token_requests(ids: Sequence[str], key: str) -> Callable[[], bytes]:
    """Return a function that makes the next request for a random connection."""
    head, tail = b"POST /v1/connections/", f"/token HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
    rest = tail.encode() + b"Content-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"
    raw, count = [one.encode() for one in ids], len(ids)
    return lambda: head + raw[int(random.random() * count)] + rest  # noqa: S311 - load, not secrecy


def bare() -> contextlib.AbstractContextManager[Server]:
    """Serve the peer."""
    return peer_server("litestar_bare", "/token")


async def audited(database_url: str) -> int:
    """Count the hand-outs in the audit table."""
    async with opened(database_url, migrate=False) as database:

        def count(session: Session) -> int:
            return int(session.connection().execute(HANDED_OUT).scalar_one())

        return await database.read(count)


def interleaved(variants: Sequence[Variant]) -> None:
    """Warm all of them, then run them in turn."""
    for one in variants:
        one.run(WARM_SECONDS, counts=False)
    for _ in range(ROUNDS):
        for one in variants:
            one.run(SECONDS)
    for one in variants:
        print(
            f"{one.name:20s} {one.median('per_second'):9,.0f} a second   p50 {one.median('p50_ms'):6.2f} ms   "
            f"p99 {one.median('p99_ms'):6.2f} ms   {statistics.median(one.cpu_us):5.0f} µs of the core each   "
            f"{one.server.memory_bytes() / 2**20:4.0f} MiB",
            flush=True,
        )


def proven(variants: Sequence[Variant]) -> None:
    """End here, with an error, when an answer was no hand-out or the audit does not have exactly the answers."""
    for one in variants:
        rows = asyncio.run(audited(one.database_url)) if one.database_url is not None else one.answers
        print(f"{one.name}: {one.answers:,} answers, {rows:,} audit rows, {one.bad} other answers")
        if one.bad or rows != one.answers:
            sys.exit(f"{one.name}: not every answer was a hand-out with its audit record")


def speed(new_database: Callable[[str], str]) -> dict[str, float]:
    """Measure both databases against the peer."""
    with (
        bare() as peer,
        broker("SQLite", POPULATION) as sqlite,
        broker("PostgreSQL", POPULATION, new_database("speed")) as postgresql,
    ):
        plain = Variant("Litestar, bare", peer, lambda: b"GET /token HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        interleaved([plain, sqlite, postgresql])
        proven([sqlite, postgresql])
    rate = plain.median("per_second")
    return {
        "sqlite_vs_litestar": round(sqlite.median("per_second") / rate, 3),
        "postgresql_vs_litestar": round(postgresql.median("per_second") / rate, 3),
    }


def growth() -> tuple[float, float]:
    """Return how the worse of p50 and memory grows from few connections to many, and how p99 does."""
    with broker(f"SQLite, {FEW:,}", FEW) as few, broker(f"SQLite, {MANY:,}", MANY) as many:
        interleaved([few, many])
        memory = many.server.memory_bytes() / few.server.memory_bytes()
        proven([few, many])
    p50, p99 = (many.median(name) / few.median(name) for name in ("p50_ms", "p99_ms"))
    print(f"from {FEW:,} to {MANY:,} connections: p50 x {p50:.2f}, memory x {memory:.2f}, p99 x {p99:.2f}")
    return round(max(p50, memory), 3), p99


def main() -> None:
    """Run everything; print the table, what was missed, and the JSON line."""
    stay_on_load_core()
    with postgres() as new_database:
        ratios = speed(new_database)
    ratios["growth_1k_to_100k"], p99_growth = growth()
    for name, bar in BARS.items():
        print(f"{name}: {ratios[name]} ({'meets' if ratios[name] >= bar else 'MISSES'} the bar of {bar})")
    met = ratios["growth_1k_to_100k"] <= MOST_GROWTH and p99_growth <= MOST_P99_GROWTH
    print(
        f"growth: {'meets' if met else 'MISSES'} the bars of {MOST_GROWTH} for p50 and memory, {MOST_P99_GROWTH} for p99"
    )
    print(json.dumps({"benchmark": "tokens", "ratios": ratios}))


if __name__ == "__main__":
    main()
