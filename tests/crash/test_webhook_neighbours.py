"""A hundred subscribers of which one hangs, one answers 500 and one 429: the others get theirs as if those were not there.

The quick run looks at the structure: everybody else has everything while the one that hangs has answered nothing yet.
``TEST_LONG=1`` also compares delays with those of a broker whose hundred are all well, turn by turn in one run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlmodel import col

from broker.demo.sandbox import SandboxOptions
from broker.models import WebhookDelivery
from tests.crash.campaign import open_forks
from tests.crash.processes import Site, open_site
from tests.crash.webhook_campaign import show
from tests.crash.webhook_parties import (
    Arrival,
    Line,
    Provider,
    Receiver,
    make_source,
    open_receiver,
    operator,
    push_body,
    push_request,
    subscribe,
)

LONG = os.environ.get("TEST_LONG") == "1"
SUBSCRIBERS = 100
HANGS, FAILS, LIMITS = "/0", "/1", "/2"
OTHERS = [f"/{number}" for number in range(3, SUBSCRIBERS)]
EVENTS = 10
PATIENCE_SECONDS = 60.0
ROUNDS, A_ROUND = 40, 3  # turns of each broker, and the events of a turn
MOST_SLOWER = 1.5


async def is_trouble(arrival: Arrival) -> int:
    """Hang, fail, limit, or take it, by who it is for."""
    if arrival.path == HANGS:
        await asyncio.Event().wait()
    return {FAILS: 500, LIMITS: 429}.get(arrival.path, 204)


@dataclass
class Broker:
    """A broker with a hundred subscribers."""

    site: Site
    provider: Provider
    receiver: Receiver
    subscriptions: dict[str, str]  # path → id
    events: int = 0

    async def post(self, count: int) -> dict[str, float]:
        """Post that many, one after the other; return when each was acknowledged, by its id."""
        acknowledged = {}
        async with Line(self.provider) as line:
            for _ in range(count):
                nonce = str(uuid.uuid4())
                answer = await line.ask(push_request(self.provider.target, nonce, push_body(nonce)))
                assert answer is not None
                assert answer[0] == 202, answer
                acknowledged[nonce] = time.monotonic()
        self.events += count
        return acknowledged

    async def all_others_have(self) -> None:
        """Wait until everybody but the three has everything that was posted."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.of_others()) < self.events * len(OTHERS):  # noqa: ASYNC110 - they are other processes' work
                await asyncio.sleep(0.05)

    async def ended_attempts(self, path: str) -> int:
        """Return how many attempts at a subscriber have ended, either way."""
        mine = col(WebhookDelivery.subscription_id) == self.subscriptions[path]
        query = sa.select(sa.func.sum(col(WebhookDelivery.attempts))).where(mine)
        return int(await self.site.parts.database.read(lambda session: session.execute(query).scalar_one()))

    def of_others(self) -> list[Arrival]:
        """Return what arrived at others than the three."""
        return [arrival for arrival in self.receiver.arrivals if arrival.path not in {HANGS, FAILS, LIMITS}]


@contextlib.asynccontextmanager
async def open_broker(place: Path, database_url: str, *, trouble: bool) -> AsyncIterator[Broker]:
    """Run `broker serve` and `broker worker`, and subscribe a hundred."""
    await asyncio.to_thread(place.mkdir, exist_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(open_receiver(is_trouble) if trouble else open_receiver())
        site = await stack.enter_async_context(open_site(place, database_url, SandboxOptions()))
        forks = await stack.enter_async_context(open_forks(site, BROKER_WEBHOOKS_PER_MINUTE="10000000"))
        serving, _ = await forks.fork("--no-worker"), await forks.fork_worker()
        client = await stack.enter_async_context(operator(serving.port, site.admin_key))
        provider = Provider(await make_source(client), "neighbours", serving.port)
        paths = [HANGS, FAILS, LIMITS, *OTHERS]
        ids = await asyncio.gather(*(subscribe(client, receiver, path) for path in paths))
        yield Broker(site, provider, receiver, dict(zip(paths, ids, strict=True)))


@pytest.mark.timeout(1200 if LONG else 180)
@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
async def test_three_subscribers_in_trouble_hold_nobody_up(
    tmp_path: Path, dialect: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue({"sqlite": "sqlite_url", "postgresql": "postgres_url"}[dialect])
    async with open_broker(tmp_path, url, trouble=True) as troubled:
        posted = await troubled.post(EVENTS)
        await troubled.all_others_have()
        assert await troubled.ended_attempts(HANGS) == 0
        check(troubled, posted)
        if LONG:
            place = tmp_path / "well"
            url = (
                f"sqlite:///{place}/broker.db" if dialect == "sqlite" else request.getfixturevalue("empty_postgres_url")
            )
            async with open_broker(place, url, trouble=False) as well:
                await compare(well, troubled)


def check(broker: Broker, posted: Collection[str]) -> None:
    """Everybody was asked, and everybody but the three has everything once."""
    arrived = broker.receiver.arrivals
    assert {arrival.path for arrival in arrived} == broker.subscriptions.keys()
    assert {arrival.problem for arrival in arrived} == {""}
    got = sorted((arrival.path, arrival.nonce) for arrival in broker.of_others())
    assert got == sorted((path, nonce) for path in OTHERS for nonce in posted)


async def compare(well: Broker, troubled: Broker) -> None:
    """Compare the delays of the same 97, turn by turn."""
    delays: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for broker in (well, troubled):
            delays[broker is well] += await delays_of(broker)
    p95_well, p95_troubled = (p95(delays[one]) for one in (True, False))
    show(
        f"-- p95 of {len(delays[True])} deliveries each: {p95_well * 1000:.0f} ms, beside three in trouble "
        f"{p95_troubled * 1000:.0f} ms; {len(troubled.receiver.arrivals) - len(troubled.of_others())} attempts at those"
    )
    assert p95_troubled <= MOST_SLOWER * p95_well


async def delays_of(broker: Broker) -> list[float]:
    """Post a few and return how long after the acknowledgement each of the others had each of them, in seconds."""
    acknowledged = await broker.post(A_ROUND)
    await broker.all_others_have()
    return [one.at - acknowledged[one.nonce] for one in broker.of_others() if one.nonce in acknowledged]


def p95(delays: list[float]) -> float:
    """Return the 95th percentile."""
    return statistics.quantiles(delays, n=20)[-1]
