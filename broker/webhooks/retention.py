"""Removes events with their deliveries: old ones, too many, and those of an erased person; and old marks of posts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col

from broker.database import Database, now
from broker.models import WebhookSeen, WebhookState
from broker.webhooks.history import DELIVERIES, EVENTS, OPEN, SUBSCRIPTIONS
from broker.webhooks.matching import EventBody

BATCH: Final = 200
BATCHES_IN_A_PASS: Final = 50
HELD_FACTOR: Final = 2.0
DAY_SECONDS: Final = 86_400.0
DELETED: Final = "broker.connection.deleted"
PAUSE_SECONDS: Final = 0.01  # in which those who take events in get at the database
log = structlog.get_logger()


class _Looked(NamedTuple):
    removed: int
    last: int | None  # the number that the batch reached, None at the end


class Retention:
    """Keeps events for ``days``, and the newest ``count`` of them.

    An event with a delivery that is still to be made stays, whatever its age; one that is only held for a subscription that is
    not active stays until twice the age. One that is parked goes with its age. Any number of processes may run this.
    """

    def __init__(self, database: Database, *, days: float, count: int) -> None:
        """Keep the limits."""
        self._database = database
        self._seconds = days * DAY_SECONDS
        self._count = count
        self._after = 0  # where the next pass goes on: what stays is not looked at each time

    async def sweep(self) -> int:
        """Remove what is due, in small batches, and not more than so many in a pass; return how many events went."""
        removed = await self._database.transaction(self._remove_parked)
        for _ in range(BATCHES_IN_A_PASS):
            looked = await self._database.transaction(self._remove_some)
            removed += looked.removed
            self._after = looked.last or 0
            if looked.last is None:
                break
            await asyncio.sleep(PAUSE_SECONDS)
        await self._forget_seen()
        if removed:
            log.info("events.removed", count=removed)
        return removed

    def _remove_some(self, session: Session) -> _Looked:
        """Remove the next events that are due; their rows are held, so that nobody replays one meanwhile.

        Numbers go with time, so behind a batch of which nothing is due nothing is looked at: on SQLite others wait to write.
        """
        at = now(session)
        newest = session.execute(sa.select(col(WebhookState.number))).scalar_one()
        of = (EVENTS.c.id, EVENTS.c.number, EVENTS.c.received_at)
        query = sa.select(*of).where(EVENTS.c.number > self._after).order_by(EVENTS.c.number)
        looked = session.execute(query.limit(BATCH)).all()
        due = [row.id for row in looked if row.received_at < at - self._seconds or row.number <= newest - self._count]
        held_here = sa.select(*of).where(EVENTS.c.id.in_(due)).order_by(EVENTS.c.number)
        rows = session.execute(held_here.with_for_update(skip_locked=True)).all()
        open_for, held = _open(session, [row.id for row in rows])
        too_old = at - HELD_FACTOR * self._seconds
        going = [row.id for row in rows if row.id not in open_for and (row.id not in held or row.received_at < too_old)]
        remove_events(session, going)
        return _Looked(len(going), looked[-1].number if due and len(looked) == BATCH else None)

    def _remove_parked(self, session: Session) -> int:
        old = now(session) - self._seconds
        query = sa.select(EVENTS.c.id).where(EVENTS.c.number.is_(None), EVENTS.c.parked, EVENTS.c.received_at < old)
        query = query.order_by(EVENTS.c.received_at).limit(BATCH).with_for_update(skip_locked=True)
        going = list(session.execute(query).scalars())
        remove_events(session, going)
        return len(going)

    async def _forget_seen(self) -> None:
        for _ in range(BATCHES_IN_A_PASS):
            if await self._database.transaction(_forget_some_seen) < BATCH:
                return
            await asyncio.sleep(PAUSE_SECONDS)


def _open(session: Session, event_ids: Sequence[str]) -> tuple[set[str], set[str]]:
    """Return (the events with a delivery that is to be made, those with one that is held)."""
    joined = DELIVERIES.outerjoin(SUBSCRIPTIONS, SUBSCRIPTIONS.c.id == DELIVERIES.c.subscription_id)
    query = sa.select(DELIVERIES.c.event_id, SUBSCRIPTIONS.c.active).select_from(joined)
    rows = session.execute(query.where(OPEN, DELIVERIES.c.event_id.in_(event_ids)).distinct()).all()
    return {row.event_id for row in rows if row.active}, {row.event_id for row in rows if not row.active}


def remove_events(session: Session, event_ids: Sequence[str]) -> None:
    """Delete events and their deliveries; one under way ends without a record of it."""
    if not event_ids:
        return
    # First the events, as whoever replays them, then deliveries in order, as whoever records outcomes: none waits crosswise.
    events, deliveries = EVENTS.c.id.in_(event_ids), DELIVERIES.c.event_id.in_(event_ids)
    for key, mine in ((EVENTS.c.id, events), (DELIVERIES.c.id, deliveries)):
        session.execute(sa.select(key).where(mine).order_by(key).with_for_update()).all()
    session.execute(sa.delete(DELIVERIES).where(deliveries))
    session.execute(sa.delete(EVENTS).where(events))


def remove_events_of(
    session: Session, connections: sa.Select[Any], subject: str, *, told_since: float, limit: int = BATCH
) -> int:
    """Delete some events of a person, sent or not: of these connections (a query of ids), and of earlier ones.

    Earlier ones are found by what the broker itself said of their end, which goes last. What it said since ``told_since`` of
    the end of these stays: it names nobody. Returns how many went; 0: there are none left.
    """
    kept = sa.and_(EVENTS.c.type == DELETED, EVENTS.c.received_at >= told_since)
    query = sa.select(EVENTS.c.id).where(EVENTS.c.connection_id.in_(connections), ~kept)
    going = list(session.execute(query.limit(limit)).scalars())
    if not going:
        ends = _ends_of(session, subject)
        earlier = (EVENTS.c.connection_id.in_(set(ends.values())), EVENTS.c.id.not_in(ends))
        going = list(session.execute(sa.select(EVENTS.c.id).where(*earlier).limit(limit)).scalars()) or list(ends)
    remove_events(session, going)
    return len(going)


def _ends_of(session: Session, subject: str) -> dict[str, str]:
    """Return the events that tell of the end of a connection of this subject, each with the connection."""
    told = (EVENTS.c.source_id.is_(None), EVENTS.c.type == DELETED)
    rows = session.execute(sa.select(EVENTS.c.id, EVENTS.c.connection_id, EVENTS.c.body).where(*told))
    pointer = "/data/subject"
    return {row.id: row.connection_id for row in rows if EventBody(row.body or b"", None).at(pointer) == subject}


def _forget_some_seen(session: Session) -> int:
    seen = sa.select(col(WebhookSeen.source_id), col(WebhookSeen.digest)).where(
        col(WebhookSeen.expires_at) < now(session)
    )
    rows = session.execute(seen.limit(BATCH)).all()
    key = sa.tuple_(col(WebhookSeen.source_id), col(WebhookSeen.digest))
    if rows:
        session.execute(sa.delete(WebhookSeen).where(key.in_([tuple(row) for row in rows])))
    return len(rows)
