"""What became of calls: in groups, behind the calls, nothing lost while the audit is away, and never without bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import sqlalchemy as sa
import structlog

from broker.audit import Audit
from broker.database import Database
from broker.models import AuditRecord
from broker.proxy.outcomes import ACTION, AT_ONCE, EVERY_SECONDS, MOST_WAITING, CallOutcome, Outcomes
from tests.flows.rig import eventually


def outcome(number: int) -> CallOutcome:
    return CallOutcome(f"aud_{number}", 200, None, 1, number)


@pytest.fixture
async def audit(database: Database) -> AsyncIterator[Audit]:
    opened = Audit(database, bytes(32), sinks=("database",), checkpoints=())
    yield opened
    await opened.aclose()


async def written(database: Database) -> list[list[str]]:
    """Return the calls of each record, in order."""
    query = sa.select(AuditRecord).where(sa.column("action") == ACTION).order_by(sa.column("number"))
    found = await database.read(lambda session: list(session.scalars(query)))
    return [one.detail["calls"] for one in found]


async def execute(database: Database, statement: str) -> None:
    await database.transaction(lambda session: session.execute(sa.text(statement)))


def numbers(records: list[list[str]]) -> list[int]:
    return [int(call.split()[4]) for record in records for call in record]


async def test_outcomes_of_a_moment_share_a_record_that_names_their_intents(audit: Audit, database: Database) -> None:
    made = Outcomes(audit)
    made.note(CallOutcome("aud_a", 201, None, 1, 12))
    made.note(CallOutcome("aud_b", None, "upstream_timeout", 3, 60_000))
    assert await eventually(lambda: written(database)) == [["aud_a 201 - 1 12", "aud_b - upstream_timeout 3 60000"]]
    made.note(outcome(3))
    await made.aclose()
    assert (await written(database))[1:] == [["aud_3 200 - 1 3"]]
    assert (await audit.verify()).ok


async def test_closing_writes_at_once_what_is_noted(audit: Audit, database: Database) -> None:
    made = Outcomes(audit)
    for number in range(3):
        made.note(outcome(number))
    async with asyncio.timeout(5):
        await made.aclose()
    assert numbers(await written(database)) == [0, 1, 2]
    await Outcomes(audit).aclose()
    assert len(await written(database)) == 1, "nothing noted, nothing written"


async def test_a_record_holds_so_many_and_the_rest_comes_in_order(audit: Audit, database: Database) -> None:
    made = Outcomes(audit)
    for number in range(2 * AT_ONCE + 7):
        made.note(outcome(number))
    await made.aclose()
    records = await written(database)
    assert [len(one) for one in records] == [AT_ONCE, AT_ONCE, 7]
    assert numbers(records) == list(range(2 * AT_ONCE + 7))


async def test_an_audit_that_is_away_loses_nothing(audit: Audit, database: Database) -> None:
    made = Outcomes(audit)
    await execute(database, "ALTER TABLE audit_records RENAME TO gone")
    for number in range(5):
        made.note(outcome(number))
        await asyncio.sleep(EVERY_SECONDS / 3)  # a try fails, and more comes behind it
    await execute(database, "ALTER TABLE gone RENAME TO audit_records")
    await eventually(lambda: written(database))
    await made.aclose()
    assert numbers(await written(database)) == list(range(5))


async def test_closing_without_an_audit_does_not_wait_for_it_and_says_what_is_lost(
    audit: Audit, database: Database
) -> None:
    made = Outcomes(audit)
    await execute(database, "ALTER TABLE audit_records RENAME TO gone")
    for number in range(3):
        made.note(outcome(number))
    with structlog.testing.capture_logs() as logs:
        async with asyncio.timeout(5):
            await made.aclose()
    assert {"event": "audit.outcomes_lost", "log_level": "warning", "calls": 3} in logs
    await execute(database, "ALTER TABLE gone RENAME TO audit_records")


async def test_what_waits_is_bounded_and_what_is_lost_is_named(audit: Audit, database: Database) -> None:
    made = Outcomes(audit)
    with structlog.testing.capture_logs() as logs:
        for number in range(MOST_WAITING + 2):
            made.note(outcome(number))
    lost = [one["intent_id"] for one in logs if one["event"] == "audit.outcome_lost"]
    assert lost == [f"aud_{MOST_WAITING}", f"aud_{MOST_WAITING + 1}"]
    await made.aclose()
    assert numbers(await written(database)) == list(range(MOST_WAITING))
