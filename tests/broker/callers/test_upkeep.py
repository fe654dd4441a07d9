"""Warnings before a caller's key ends: one 14 days and one a day before, and what the metrics show."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import col, select

from broker.audit import Audit
from broker.callers import Callers
from broker.callers.upkeep import DAY_SECONDS, Upkeep, due_warning
from broker.database import Database, now
from broker.models import AuditRecord, CallerKey
from broker.telemetry import new_metrics, render
from tests.broker.callers.made import made_callers, row_macs

GRANT: dict[str, Any] = {"integrations": ["mail"], "may": ["read"]}
DAY = DAY_SECONDS


@pytest.fixture
async def audit(database: Database) -> AsyncIterator[Audit]:
    """Give a real audit chain over the test's database."""
    made = Audit(database, bytes(32), sinks=("database",), checkpoints=())
    yield made
    await made.aclose()


@pytest.fixture
async def callers(database: Database, audit: Audit) -> AsyncIterator[Callers]:
    """Give one replica's callers."""
    made = await made_callers(database, audit)
    yield made
    await made.aclose()


@pytest.mark.parametrize(
    ("days_left", "warned_days_before_end", "due"),
    [
        (15, None, None),
        (14, None, 14),
        (2, None, 14),
        (2, 13.9, None),
        (2, 20, 14),
        (1, None, 1),
        (1, 13, 1),
        (0.5, 0.9, None),
        (0, None, None),
        (-1, None, None),
    ],
)
def test_each_warning_comes_once(days_left: float, warned_days_before_end: float | None, due: int | None) -> None:
    ends_at = 1000 * DAY
    warned_at = None if warned_days_before_end is None else ends_at - warned_days_before_end * DAY
    assert due_warning(ends_at, warned_at, ends_at - days_left * DAY) == due


async def warnings(database: Database) -> list[tuple[str, int]]:
    query = select(AuditRecord).where(AuditRecord.action == "broker.key.expiring").order_by(col(AuditRecord.number))
    rows = await database.read(lambda session: session.exec(query).all())
    return [(row.detail["key_id"], row.detail["days"]) for row in rows]


async def test_a_key_that_ends_soon_is_warned_of_once_by_any_number_of_workers(
    callers: Callers, database: Database, audit: Audit
) -> None:
    at = await database.read(now)
    caller, _ = await callers.add("lasting", ["service"], [GRANT], actor="test")
    soon, _ = await callers.add_key(caller.id, expires_at=at + 10 * DAY, actor="test")
    ending, _ = await callers.add("ending", ["service"], [GRANT], at + 0.5 * DAY, actor="test")
    (its_key,) = (await callers.keys_of([ending.id]))[ending.id]
    ends: list[float | None] = []
    macs = await row_macs(database, audit)
    for _ in range(2):
        await Upkeep(database, audit, macs, on_next_end=ends.append).warn()
    assert sorted(await warnings(database)) == sorted([(soon.id, 14), (its_key.id, 1)])
    assert ends == [ending.expires_at] * 2
    await database.transaction(
        lambda session: session.execute(sa.update(CallerKey).values(warned_at=at - 20 * DAY))
    )  # a warning of an earlier end
    await Upkeep(database, audit, macs).warn()
    assert len(await warnings(database)) == 4


async def test_dead_and_forged_keys_are_not_warned_of(callers: Callers, database: Database, audit: Audit) -> None:
    at = await database.read(now)
    caller, _ = await callers.add("x", ["service"], [GRANT], actor="test")
    revoked, _ = await callers.add_key(caller.id, expires_at=at + DAY / 2, actor="test")
    await callers.revoke_key(caller.id, revoked.id, actor="test")
    await callers.add_key(caller.id, expires_at=at - 1, actor="test")
    forged, _ = await callers.add_key(caller.id, expires_at=9e9, actor="test")
    statement = sa.update(CallerKey).where(col(CallerKey.id) == forged.id).values(expires_at=at + DAY / 2)
    await database.transaction(lambda session: session.execute(statement))
    ends: list[float | None] = []
    await Upkeep(database, audit, await row_macs(database, audit), on_next_end=ends.append).warn()
    assert await warnings(database) == []
    assert ends == [None]


def test_the_metrics_show_the_next_end_and_count_forgeries() -> None:
    metrics = new_metrics()
    metrics.caller_key_ends(5.0)
    metrics.caller_row_forged()
    text = render(metrics).decode()
    assert "broker_caller_key_end_timestamp_seconds 5.0" in text
    assert "broker_caller_rows_forged_total 1.0" in text
    metrics.caller_key_ends(None)
    assert "broker_caller_key_end_timestamp_seconds +Inf" in render(metrics).decode()
