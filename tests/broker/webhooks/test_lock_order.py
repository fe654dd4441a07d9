"""On PostgreSQL whoever touches deliveries takes locks in one order: nobody is ended as the victim of a deadlock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from broker.database import Database, opened
from broker.models import new_id
from broker.webhooks.backoff import Next
from broker.webhooks.history import DELIVERIES, EVENTS
from broker.webhooks.queue import Outcome, claim, record
from broker.webhooks.replaying import _held_events, _locked_state, _revive
from broker.webhooks.retention import remove_events
from broker.webhooks.subscriptions import _end_some
from tests.broker.webhooks.deliveries import queued, subscribed

ROUNDS = 6
TRIED = {"at": 1.0, "status": 200, "error": None, "ms": 1}
CHANCE = random.Random(7)  # noqa: S311 - no secret


async def recorded(database: Database, subscription_id: str) -> None:
    states: list[Any] = ["delivered", "dead", "retrying"]
    for _ in range(6):
        wanted = {subscription_id: 40}
        work = partial(claim, wanted=wanted, claim_id=new_id("clm"), lease_seconds=30.0)
        taken = await database.transaction(work)
        outcomes = [Outcome(one, Next(CHANCE.choice(states)), TRIED) for one in taken]
        CHANCE.shuffle(outcomes)
        await database.transaction(partial(record, outcomes=outcomes, disable=lambda *_: None))


async def revived(database: Database, ids: Sequence[str]) -> None:
    for _ in range(6):
        some, state = CHANCE.sample(ids, 80), CHANCE.choice(["dead", "retrying"])
        await database.transaction(partial(_revive, delivery_ids=some, state=state))


async def retried(database: Database, ids: Sequence[str]) -> None:
    def work(session: Session, delivery_id: str) -> None:
        event = sa.select(DELIVERIES.c.event_id).where(DELIVERIES.c.id == delivery_id)
        if _held_events(session, event):
            _locked_state(session, delivery_id)

    for _ in range(10):
        await database.transaction(partial(work, delivery_id=CHANCE.choice(ids)))


async def removed(database: Database) -> None:
    events = await database.read(lambda session: list(session.execute(sa.select(EVENTS.c.id)).scalars()))
    for _ in range(4):
        await database.transaction(partial(remove_events, event_ids=CHANCE.sample(events, min(40, len(events)))))


async def test_those_who_record_retry_end_and_remove_at_once_all_get_through(postgres_url: str) -> None:
    """A victim of a deadlock would raise DatabaseUnavailable."""
    async with opened(postgres_url) as database:
        for line in [None, "a"] * (ROUNDS // 2):
            one = await subscribed(database)
            ids = await queued(database, [one], 150, order_key=line)
            recording = [recorded(database, one) for _ in range(3)]
            reviving = [revived(database, ids) for _ in range(2)]
            ending = database.transaction(partial(_end_some, subscription_id=one))
            await asyncio.gather(*recording, *reviving, retried(database, ids), removed(database), ending)
        left = await database.read(lambda session: session.execute(sa.select(DELIVERIES.c.state)).scalars().all())
        assert left
