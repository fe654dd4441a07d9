"""Tells the metrics what waits in the queue: how much of it, and for how long the oldest."""

from __future__ import annotations

from typing import Final, NamedTuple

import sqlalchemy as sa
from sqlmodel import Session

from broker.database import Database, now
from broker.telemetry import Metrics
from broker.webhooks.history import DELIVERIES, EVENTS, OPEN, SUBSCRIPTIONS

EVERY_SECONDS: Final = 15.0


class Backlog(NamedTuple):
    """What waits. ``oldest_seconds``: how long ago the oldest delivery was made that is still to be made, 0 without one."""

    open: int
    held: int
    dead: int
    waiting: int
    parked: int
    oldest_seconds: float


async def measure(database: Database, metrics: Metrics) -> None:
    """Show what waits now: for the worker, every ``EVERY_SECONDS``."""
    found = await database.read_aside(backlog)
    counts = {"open": found.open, "held": found.held, "dead": found.dead}
    metrics.webhook_backlog(counts, waiting=found.waiting, parked=found.parked, oldest_seconds=found.oldest_seconds)


def backlog(session: Session) -> Backlog:
    """Count by what the indexes of the queue hold. Ids are in the order of their times, so the first one is the oldest."""
    grouped = (
        sa.select(
            DELIVERIES.c.subscription_id, sa.func.count().label("many"), sa.func.min(DELIVERIES.c.id).label("first")
        )
        .where(OPEN)
        .group_by(DELIVERIES.c.subscription_id)
        .subquery()
    )
    joined = grouped.outerjoin(SUBSCRIPTIONS, SUBSCRIPTIONS.c.id == grouped.c.subscription_id)
    rows = session.execute(sa.select(grouped.c.many, grouped.c.first, SUBSCRIPTIONS.c.active).select_from(joined)).all()
    first = min((row.first for row in rows if row.active), default=None)
    made_at = session.execute(sa.select(DELIVERIES.c.created_at).where(DELIVERIES.c.id == first)).scalar_one_or_none()
    dead = sa.select(sa.func.count()).select_from(DELIVERIES).where(sa.text("webhook_deliveries.state = 'dead'"))
    unnumbered = sa.select(EVENTS.c.parked, sa.func.count()).where(EVENTS.c.number.is_(None)).group_by(EVENTS.c.parked)
    waiting = {row[0]: int(row[1]) for row in session.execute(unnumbered)}
    return Backlog(
        open=sum(row.many for row in rows if row.active),
        held=sum(row.many for row in rows if not row.active),
        dead=int(session.execute(dead).scalar_one()),
        waiting=waiting.get(False, 0),
        parked=waiting.get(True, 0),
        oldest_seconds=max(0.0, now(session) - made_at) if made_at is not None else 0.0,
    )
