"""Accepting breaks: afterwards the audit works, says what was accepted by whom and why, and checks everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from broker.audit import Audit
from broker.database import Database, opened
from broker.errors import AuditUnavailable
from tests.broker.audit.test_retention import FLOOR, chain_of
from tests.broker.test_audit import (
    CHECKPOINTS,
    HEAD,
    MOVED,
    OTHER_KEY,
    RECORDS,
    an_audit,
    entry,
    execute,
    rows_of,
    verdict,
    write,
)

COUNT = 8


def edit(which: int, **values: Any) -> sa.Executable:
    return sa.update(RECORDS).where(RECORDS.c.number == which).values(values)


def remove(*numbers: int) -> sa.Executable:
    return sa.delete(RECORDS).where(RECORDS.c.number.in_(numbers))


def swapped(one: int, other: int) -> list[sa.Executable]:
    return [edit(old, number=new) for old, new in ((one, MOVED), (other, one), (MOVED, other))]


# what was done, and the spans that an acceptance names
BREAKS: dict[str, tuple[list[sa.Executable], list[tuple[str, int, int]]]] = {
    "an edited record": ([edit(3, actor="x")], [("edited", 3, 3)]),
    "another subject": ([edit(3, subject="acme:9")], [("subject_mismatch", 3, 3)]),
    "an edited last record": ([edit(COUNT, actor="x")], [("edited", COUNT, COUNT)]),
    "a changed link": ([edit(3, chain="f" * 64)], [("edited", 3, 4)]),
    "a removed record": ([remove(3)], [("removed", 3, 4)]),
    "the first record removed": ([remove(1)], [("removed", 1, 2)]),
    "two swapped records": (swapped(2, 6), [("reordered", 2, 3), ("reordered", 6, 7)]),
    "a cut tail": ([remove(7, 8)], [("cut_tail", 7, 8)]),
    "everything removed": ([sa.delete(RECORDS)], [("cut_tail", 1, 8)]),
    "two breaks": ([edit(2, actor="x"), remove(5)], [("removed", 2, 2), ("removed", 5, 6)]),
    "a forged head": ([sa.update(HEAD).values(mac="x")], []),
    "a deleted head": ([sa.delete(HEAD)], []),
    "a forged head over a cut tail": ([remove(8), sa.update(HEAD).values(count=7)], []),
}


@pytest.mark.parametrize("name", BREAKS)
async def test_an_accepted_break_is_told_and_everything_else_is_still_checked(database: Database, name: str) -> None:
    audit = an_audit(database)
    statements, spans = BREAKS[name]
    for number in range(COUNT):
        await write(audit, database, entry(number, subject="acme:1"))
    await execute(database, *statements)
    assert not (await audit.verify()).ok
    record_id = await audit.accept(by="olga", reason="a restore went wrong")
    found = await audit.verify()
    assert found.ok, found
    [told] = found.accepted
    assert (told["by"], told["reason"], told["actor"]) == ("olga", "a restore went wrong", "cli")
    assert [(one["problem"], one["first"], one["last"]) for one in told["breaks"]] == spans
    [record] = [row for row in await rows_of(database, RECORDS) if row["action"] == "audit.accepted"]
    assert (record["id"], record["number"]) == (record_id, told["number"])
    await audit.record(entry(9))
    await audit.checkpoint(force=True)
    assert (await audit.verify()).ok
    await execute(database, edit(told["number"] + 1, actor="x"))
    assert verdict(await audit.verify()) == ("edited", told["number"] + 1)


async def test_a_whole_chain_has_nothing_to_accept(database: Database) -> None:
    audit = an_audit(database)
    assert await audit.accept(by="olga", reason="none") is None
    await chain_of(audit, database, 4)
    assert await audit.accept(by="olga", reason="none") is None
    assert len(await rows_of(database, RECORDS)) == 4


async def test_a_span_that_changes_again_is_a_new_break(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, COUNT)
    await execute(database, edit(3, actor="x"))
    await audit.accept(by="olga", reason="one")
    await execute(database, edit(3, actor="y"))
    assert verdict(await audit.verify()) == ("edited", 3)
    await audit.accept(by="olga", reason="two")
    found = await audit.verify()
    assert (found.ok, [told["reason"] for told in found.accepted]) == (True, ["one", "two"])
    assert await audit.accept(by="olga", reason="three") is None


async def test_a_break_that_is_put_right_afterwards_is_whole(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, COUNT)
    await execute(database, edit(3, actor="x"))
    await audit.accept(by="olga", reason="one")
    await execute(database, edit(3, actor="clr_3"))
    assert (await audit.verify()).ok


Forgery = Callable[[dict[str, Any]], dict[str, Any]]
FORGERIES: dict[str, Forgery] = {
    "moved": lambda row: row | {"number": MOVED, "id": "aud_x"},
    "edited": lambda row: row | {"detail": row["detail"] | {"breaks": []}},
    "of another place": lambda row: row | {"detail": row["detail"] | {"after": {"number": 1, "link": "0" * 64}}},
}


@pytest.mark.parametrize("name", FORGERIES)
async def test_an_acceptance_that_we_did_not_write_accepts_nothing(database: Database, name: str) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, COUNT)
    await execute(database, edit(3, actor="x"))
    await audit.accept(by="olga", reason="one")
    row = (await rows_of(database, RECORDS))[-1]
    await execute(database, remove(row["number"]), sa.insert(RECORDS).values(FORGERIES[name](row)))
    assert verdict(await audit.verify()) == ("edited", 3)


async def test_an_acceptance_by_who_has_no_key_accepts_nothing(database: Database) -> None:
    audit, other = an_audit(database), Audit(database, OTHER_KEY, sinks=["database"], checkpoints=[])
    await chain_of(audit, database, 3)
    await other.accept(by="mallory", reason="trust me")
    assert (await audit.verify()).problem is not None
    assert (await audit.verify()).accepted == ()


async def test_a_tail_that_only_the_second_place_knows_of_is_accepted_with_its_checkpoints(
    database: Database, tmp_path: Path
) -> None:
    audit = an_audit(database, places=[f"file:{tmp_path / 'points'}"])
    await chain_of(audit, database, 3, every=1)
    older = (await rows_of(database, HEAD))[0]
    await chain_of(audit, database, 3, every=1)
    cut = [remove(4, 5, 6), sa.update(HEAD).values(older), sa.delete(CHECKPOINTS).where(CHECKPOINTS.c.count > 3)]
    await execute(database, *cut)
    await audit.accept(by="olga", reason="an old backup")
    found = await audit.verify()
    assert found.ok, found
    assert [(one["problem"], one["first"], one["last"]) for one in found.accepted[0]["breaks"]] == [("cut_tail", 4, 6)]
    assert [row["number"] for row in await rows_of(database, RECORDS)] == [1, 2, 3, 7]


async def test_a_tail_that_grew_again_is_accepted_and_no_later_one(database: Database, tmp_path: Path) -> None:
    audit = an_audit(database, places=[f"file:{tmp_path / 'points'}"])
    await chain_of(audit, database, 3, every=1)
    older = (await rows_of(database, HEAD))[0]
    await chain_of(audit, database, 3, every=1)
    cut = [remove(4, 5, 6), sa.update(HEAD).values(older), sa.delete(CHECKPOINTS).where(CHECKPOINTS.c.count > 3)]
    await execute(database, *cut)
    await write(audit, database, *map(entry, range(5)))
    assert verdict(await audit.verify()) == ("cut_tail", 4)
    await audit.accept(by="olga", reason="an old backup")
    assert (await audit.verify()).ok
    await execute(database, sa.delete(RECORDS).where(RECORDS.c.number > 6), *cut[1:])
    assert not (await audit.verify()).ok


async def test_lines_that_are_no_checkpoints_of_ours_are_accepted_one_by_one(
    database: Database, tmp_path: Path
) -> None:
    place = tmp_path / "points"
    audit = an_audit(database, places=[f"file:{place}"])
    await chain_of(audit, database, 3)
    place.write_text(place.read_text() + json.dumps({"count": 9}) + "\n[1]\n")
    assert verdict(await audit.verify()) == ("checkpoint_forged", None)
    await audit.accept(by="olga", reason="a test of the shipper")
    found = await audit.verify()
    assert (found.ok, found.accepted[0]["forged_checkpoints"]) == (True, 2)
    place.write_text(place.read_text() + json.dumps({"count": 10}) + "\n")
    assert verdict(await audit.verify()) == ("checkpoint_forged", None)


async def test_a_forged_floor_is_accepted_and_the_chain_begins_at_its_first_record(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 8)
    await audit.cut(older_than_days=0)
    await execute(database, sa.update(FLOOR).values(mac="x"))
    await audit.accept(by="olga", reason="the floor was lost")
    found = await audit.verify()
    assert (found.ok, found.floor) == (True, 0)
    assert [(one["problem"], one["first"], one["last"]) for one in found.accepted[0]["breaks"]] == [("removed", 1, 7)]
    assert await rows_of(database, FLOOR) == []


async def test_a_row_that_cannot_be_read_is_accepted_too(sqlite_url: str) -> None:
    async with opened(sqlite_url, migrate=False) as database:
        audit = an_audit(database)
        await chain_of(audit, database, 8)
        await execute(database, "UPDATE audit_records SET actor = CAST(X'FF' AS TEXT) WHERE number = 3")
        await audit.accept(by="olga", reason="a broken disk")
        assert (await audit.verify()).ok


async def test_a_record_before_the_first_has_to_be_deleted_by_hand(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 2)
    row = (await rows_of(database, RECORDS))[0]
    await execute(database, sa.insert(RECORDS).values(row | {"number": -3, "id": "aud_x"}))
    with pytest.raises(AuditUnavailable, match="delete that row"):
        await audit.accept(by="olga", reason="x")


async def test_retention_goes_past_an_accepted_break(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 8)
    await execute(database, remove(4))
    await audit.accept(by="olga", reason="x")
    await chain_of(audit, database, 3, every=1)
    assert await audit.cut(older_than_days=0) > 0
    assert (await audit.verify()).ok
