"""Retention: old records go up to a signed checkpoint, and what is left verifies from there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from broker.audit import Audit, Verification
from broker.audit.retention import PIECE
from broker.database import Database, SqliteDatabase
from broker.errors import AuditUnavailable
from broker.models import AuditFloor
from tests.broker.test_audit import (
    CHECKPOINTS,
    KEY,
    OTHER_KEY,
    RECORDS,
    an_audit,
    entry,
    execute,
    lines_of,
    rows_of,
    verdict,
    write,
)

FLOOR: sa.Table = AuditFloor.__table__  # type: ignore[attr-defined]


async def chain_of(audit: Audit, database: Database, count: int, *, every: int = 3) -> None:
    """Write so many records, with a checkpoint behind every third."""
    for number in range(1, count + 1):
        await write(audit, database, entry(number, subject="acme:1"))
        if number % every == 0:
            await audit.checkpoint(force=True)


async def test_records_before_the_newest_old_checkpoint_go_and_the_rest_verifies(
    database: Database, tmp_path: Path
) -> None:
    audit = an_audit(database, places=[f"file:{tmp_path / 'points'}"])
    await chain_of(audit, database, 8)
    before = await rows_of(database, RECORDS)
    assert await audit.cut(older_than_days=1) == 0, "nothing is that old"
    assert await audit.cut(older_than_days=0) == 6
    rows = await rows_of(database, RECORDS)
    assert [row["number"] for row in rows] == [7, 8, 9]
    assert (rows[-1]["action"], rows[-1]["actor"]) == ("audit.cut", "worker")
    assert rows[-1]["detail"] == {"first": 1, "last": 6, "link": before[5]["chain"], "count": 6}
    assert [row["count"] for row in await rows_of(database, CHECKPOINTS)] == [6]
    found = await audit.verify()
    assert (found.ok, found.count, found.floor) == (True, 3, 6)
    assert found.checked_checkpoints == 3, "two of them in the second place, of which one is before the floor"
    await chain_of(audit, database, 3)
    assert await audit.cut(older_than_days=0) == 6
    assert (await audit.verify()).floor == 12


async def test_without_a_setting_nothing_is_removed(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 6)
    assert await audit.cut() == 0
    assert len(await rows_of(database, RECORDS)) == 6


async def test_the_age_is_that_of_the_database(tmp_path: Path, sqlite_template: bytes) -> None:
    path, at = tmp_path / "broker.db", [1_000_000.0]
    path.write_bytes(sqlite_template)
    database = SqliteDatabase(path, clock=lambda: at[0])
    audit = Audit(database, KEY, sinks=["database"], checkpoints=[], retention_days=2)
    for removed in (0, 0, 2, 2):
        await chain_of(audit, database, 2, every=2)
        assert await audit.cut() == removed
        at[0] += 86_401
    await database.aclose()


async def test_much_is_removed_in_pieces_each_with_its_record(database: Database) -> None:
    audit = an_audit(database)
    for _ in range(2):
        await write(audit, database, *map(entry, range(PIECE // 2 + 10)))
    await audit.checkpoint(force=True)
    assert await audit.cut(older_than_days=0) == PIECE + 20
    assert [row["action"] for row in await rows_of(database, RECORDS)] == ["audit.cut"] * 2
    assert (await audit.verify()).ok


async def test_several_workers_that_cut_at_once_do_it_once(database: Database) -> None:
    audits = [an_audit(database) for _ in range(4)]
    await chain_of(audits[0], database, 6)
    removed = await asyncio.gather(*(audit.cut(older_than_days=0) for audit in audits))
    assert sum(removed) == 6
    assert [row["action"] for row in await rows_of(database, RECORDS)] == ["audit.cut"]


async def test_writers_and_verifiers_are_not_disturbed(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 30)

    async def keep_writing() -> None:
        for number in range(40):
            await audit.record(entry(number))
            await audit.checkpoint(force=True)

    async def keep_cutting() -> None:
        while not writing.done():
            await audit.cut(older_than_days=0)
            await asyncio.sleep(0)

    writing = asyncio.create_task(keep_writing())
    cutting = asyncio.create_task(keep_cutting())
    while not writing.done():
        found = await audit.verify()
        assert found.ok, found
    await asyncio.gather(writing, cutting)
    assert (await audit.verify()).ok


async def test_a_broken_stretch_is_evidence_and_stays(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 6)
    await execute(database, sa.update(RECORDS).where(RECORDS.c.number == 2).values(actor="x"))
    with pytest.raises(AuditUnavailable, match="broken"):
        await audit.cut(older_than_days=0)
    assert len(await rows_of(database, RECORDS)) == 6


async def test_a_checkpoint_that_is_not_ours_takes_nothing_with_it(database: Database) -> None:
    audit, other = an_audit(database), Audit(database, OTHER_KEY, sinks=["database"], checkpoints=[])
    await chain_of(audit, database, 3)
    [point] = await rows_of(database, CHECKPOINTS)
    await execute(database, sa.update(CHECKPOINTS).values(at=point["at"] - 1e6))
    assert await audit.cut(older_than_days=1) == 0
    await execute(database, sa.update(CHECKPOINTS).values(point))
    assert await other.cut(older_than_days=0) == 0


@pytest.mark.parametrize("change", [{"number": 7}, {"number": 5}, {"chain": "f" * 64}, {"mac": "0" * 64}])
async def test_a_forged_floor_is_named_and_never_built_on(database: Database, change: dict[str, Any]) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 8)
    await audit.cut(older_than_days=0)
    await audit.checkpoint(force=True)
    await execute(database, sa.update(FLOOR).values(change))
    assert verdict(await audit.verify()) == ("floor_forged", None)
    with pytest.raises(AuditUnavailable, match="floor"):
        await audit.cut(older_than_days=0)


async def test_records_cut_by_other_hands_show(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 6)
    await audit.cut(older_than_days=0)
    await chain_of(audit, database, 6)
    [older] = await rows_of(database, FLOOR)
    await execute(database, sa.delete(RECORDS).where(RECORDS.c.number == 7))
    assert verdict(await audit.verify()) == ("removed", 7)
    await execute(database, sa.delete(FLOOR))
    assert verdict(await audit.verify()) == ("removed", 1)
    await execute(database, sa.insert(FLOOR).values(older))


async def test_an_old_record_put_back_below_the_floor_shows(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 6)
    rows = await rows_of(database, RECORDS)
    await audit.cut(older_than_days=0)
    await execute(database, sa.insert(RECORDS).values(rows[3]))
    assert verdict(await audit.verify()) == ("edited", 4)


async def test_the_record_of_a_cut_is_copied_too(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = an_audit(database, sinks=["database", f"file:{path}"])
    await chain_of(audit, database, 3)
    await audit.cut(older_than_days=0)
    await audit.aclose()
    assert [line["number"] for line in lines_of(path)] == [1, 2, 3, 4]


async def test_a_floor_outlives_its_key(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 3)
    await audit.cut(older_than_days=0)
    rotated = Audit(database, OTHER_KEY, sinks=["database"], checkpoints=[], previous_keys=[KEY])
    await chain_of(rotated, database, 3)
    assert await rotated.cut(older_than_days=0) == 4
    assert await rotated.verify() == Verification(ok=True, count=1, checked_checkpoints=1, floor=7)
