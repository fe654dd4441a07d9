"""Exports: whoever has the public keys can tell that nothing was added, changed or left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from broker.audit import Audit, ExportVerification, check_export
from broker.database import Database
from broker.errors import AuditUnavailable
from tests.broker.audit.test_retention import FLOOR, chain_of
from tests.broker.test_audit import HEAD, KEY, OTHER_KEY, RECORDS, an_audit, entry, execute, rows_of, write


async def lines_of(audit: Audit, since: float | None = None, until: float | None = None) -> list[bytes]:
    text = "".join([part async for part in audit.export(since=since, until=until)])
    return [line + b"\n" for line in text.encode().split(b"\n")[:-1]]


def whole(count: int, first: int, last: int, *, links_checked: bool = False) -> ExportVerification:
    return ExportVerification(ok=True, count=count, first=first, last=last, links_checked=links_checked)


async def test_an_export_holds_every_record_with_its_subject_and_checks_with_and_without_the_root_keys(
    database: Database,
) -> None:
    audit = an_audit(database)
    detail = {"text": "é\n\u2028", "float": 0.1 + 0.2, "nested": [{"a": None}]}
    await write(audit, database, *(entry(number, subject=f"acme:{number}", detail=detail) for number in range(2_100)))
    lines = await lines_of(audit)
    told = [json.loads(line) for line in lines]
    assert [line for line in told if "seal" not in line][1:] == await rows_of(database, RECORDS)
    assert [line["seal"]["last"] for line in told if "seal" in line] == [1_000, 2_000, 2_100]
    assert check_export(lines, audit.checkpoint_keys()) == whole(2_100, 1, 2_100)
    assert audit.check_export(lines) == whole(2_100, 1, 2_100, links_checked=True)


async def test_an_empty_chain_exports_as_a_whole_file(database: Database) -> None:
    audit = an_audit(database)
    lines = await lines_of(audit)
    assert len(lines) == 2
    assert check_export(lines, audit.checkpoint_keys()) == ExportVerification(ok=True, count=0)
    assert audit.check_export(lines).ok


async def test_an_export_is_the_stretch_between_two_times(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 6)
    times = [row["at"] for row in await rows_of(database, RECORDS)]
    lines = await lines_of(audit, since=times[1], until=times[4])
    assert [json.loads(line)["number"] for line in lines[1:-1]] == [2, 3, 4]
    assert audit.check_export(lines) == whole(3, 2, 4, links_checked=True)
    nothing = await lines_of(audit, since=times[5] + 1)
    assert audit.check_export(nothing).count == 0
    assert len(nothing) == 2


async def test_an_export_behind_the_floor_and_over_two_keys_checks(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 6)
    await audit.cut(older_than_days=0)
    rotated = Audit(database, OTHER_KEY, sinks=["database"], checkpoints=[], previous_keys=[KEY])
    await chain_of(rotated, database, 3)
    lines = await lines_of(rotated)
    assert rotated.check_export(lines) == whole(4, 7, 10, links_checked=True)
    assert check_export(lines, audit.checkpoint_keys()).problem == "forged", (
        "its seal is of a key that is not known there"
    )


async def test_records_that_retention_removes_meanwhile_are_no_break_but_end_the_export(database: Database) -> None:
    audit = an_audit(database)
    await chain_of(audit, database, 8)
    lines = audit.export()
    await anext(lines)
    assert await audit.cut(older_than_days=0) == 6
    with pytest.raises(AuditUnavailable, match="removed while"):
        await anext(lines)


Change = Callable[[list[bytes]], list[bytes]]
CHANGES: dict[str, tuple[Change, str, int]] = {
    "an edit": (lambda lines: [line.replace(b'"clr_3"', b'"clr_4"') for line in lines], "forged", 1_001),
    "an edit after the first seal": (
        lambda lines: [line.replace(b'"clr_1200"', b'"clr_1"') for line in lines], "forged", 1_303,
    ),
    "a line removed": (lambda lines: lines[:5] + lines[6:], "removed", 6),
    "two lines swapped": (lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]], "removed", 6),
    "a line added": (lambda lines: [*lines, lines[-2]], "forged", 1_304),
    "the end cut": (lambda lines: lines[:1_100], "cut", 1_100),
    "the end cut at a seal": (lambda lines: lines[:1_002], "cut", 1_002),
    "the seal cut": (lambda lines: lines[:-1], "cut", 1_302),
    "the beginning cut": (lambda lines: lines[1:], "not_an_export", 1),
    "no JSON": (lambda lines: [*lines[:7], b"hello\n", *lines[7:]], "forged", 8),
    "another number": (lambda lines: [line.replace(b'"number":7,', b'"number":9,') for line in lines], "removed", 8),
    "nothing": (lambda _: [], "not_an_export", 0),
    "another file": (lambda _: [b"{}\n"], "not_an_export", 1),
    "another signature": (
        lambda lines: [line.replace(b'"signature":"', b'"signature":"00') for line in lines], "forged", 1_002,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
async def test_a_changed_file_is_named_by_who_has_only_the_public_keys(database: Database, name: str) -> None:
    audit = an_audit(database)
    await write(audit, database, *map(entry, range(1_300)))
    change, problem, line = CHANGES[name]
    found = check_export(change(await lines_of(audit)), audit.checkpoint_keys())
    assert (found.ok, found.problem) == (False, problem)
    assert found.line == (line if name != "an edit" else 1_002)
    assert found.count in {0, 1_000, 1_300}


async def test_with_the_root_keys_an_edit_is_named_at_its_line(database: Database) -> None:
    audit = an_audit(database)
    await write(audit, database, *map(entry, range(20)))
    lines = [line.replace(b'"clr_3"', b'"clr_4"') for line in await lines_of(audit)]
    found = audit.check_export(lines)
    assert (found.problem, found.line) == ("edited", 5)


async def test_an_export_of_a_chain_that_was_tampered_with_says_what_stands_there_and_is_never_complete(
    database: Database,
) -> None:
    audit = an_audit(database)
    await write(audit, database, *map(entry, range(5)))
    await execute(
        database,
        sa.update(RECORDS).where(RECORDS.c.number == 2).values(actor="x"),
        "UPDATE audit_records SET detail = '[1e999]' WHERE number = 4",
    )
    lines = await lines_of(audit)
    told = check_export(lines, audit.checkpoint_keys())
    assert (told.ok, told.problem, told.line, told.count) == (False, "broken", 7, 0)
    assert told.broken == {"problem": "edited", "number": 2}
    found = audit.check_export(lines)
    assert (found.problem, found.line) == ("edited", 3)
    assert json.loads(lines[4])["detail"] == "[1e999]"


def record(number: int) -> sa.ColumnElement[bool]:
    return RECORDS.c.number == number


def seal_of(lines: list[bytes]) -> dict[str, Any]:
    """Return the last seal."""
    return dict(json.loads(lines[-1])["seal"])


SEEN: dict[str, tuple[list[sa.Executable], str, int | None]] = {
    "another subject": ([sa.update(RECORDS).where(record(3)).values(subject="alice")], "subject_mismatch", 3),
    "a removed record": ([sa.delete(RECORDS).where(record(3))], "removed", 3),
    "a removed first record": ([sa.delete(RECORDS).where(record(1))], "removed", 1),
    "a cut tail": ([sa.delete(RECORDS).where(RECORDS.c.number > 4)], "cut_tail", 5),
    "everything removed": ([sa.delete(RECORDS)], "cut_tail", 1),
    "a forged head": ([sa.update(HEAD).values(mac="x")], "head_forged", None),
    "a deleted head": ([sa.delete(HEAD)], "head_forged", None),
    "a forged floor": (
        [
            sa.delete(RECORDS).where(RECORDS.c.number < 3),
            sa.insert(FLOOR).values(id=1, number=2, chain="f" * 64, mac="x", key_id="x", cut_at=1.0),
        ],
        "floor_forged",
        None,
    ),
}


@pytest.mark.parametrize("name", SEEN)
async def test_what_the_broker_sees_broken_is_named_to_who_has_only_the_public_keys(
    database: Database, name: str
) -> None:
    audit = an_audit(database)
    await write(audit, database, *(entry(number, subject="mallory") for number in range(6)))
    statements, problem, number = SEEN[name]
    await execute(database, *statements)
    lines = await lines_of(audit)
    told = check_export(lines, audit.checkpoint_keys())
    assert seal_of(lines)["break"] == {"problem": problem, "number": number}
    assert not seal_of(lines)["complete"]
    if problem == "removed":  # shows by the numbers, before the seal is read
        assert told.problem == problem
    else:
        assert (told.problem, told.broken) == ("broken", seal_of(lines)["break"])
    assert not audit.check_export(lines).ok


async def test_a_break_is_named_in_every_seal_behind_it(database: Database) -> None:
    audit = an_audit(database)
    await write(audit, database, *map(entry, range(2_300)))
    await execute(database, sa.update(RECORDS).where(record(1_500)).values(actor="x"))
    lines = await lines_of(audit)
    seals = [json.loads(line)["seal"] for line in lines if b'{"seal":' in line]
    assert [seal.get("break") for seal in seals] == [None, *[{"problem": "edited", "number": 1_500}] * 2]
    assert [seal["complete"] for seal in seals] == [False] * 3
    told = check_export(lines, audit.checkpoint_keys())
    assert (told.problem, told.count, told.first, told.last) == ("broken", 1_000, 1, 1_000)
    assert len(lines) == 1 + 2_300 + 3, "what is behind the break is there to be looked at"


async def test_a_gap_longer_than_a_batch_keeps_nobody_from_the_records_behind_it(database: Database) -> None:
    audit = an_audit(database)
    await write(audit, database, *map(entry, range(1_300)))
    await execute(database, sa.delete(RECORDS).where(RECORDS.c.number.between(2, 1_200)))
    lines = await lines_of(audit)
    assert json.loads(lines[-2])["number"] == 1_300
    assert json.loads(lines[-1])["seal"]["break"] == {"problem": "removed", "number": 2}


async def test_a_record_whose_subject_was_changed_is_named_with_the_root_keys_and_an_erased_one_is_not(
    database: Database,
) -> None:
    audit = an_audit(database)
    await write(audit, database, *(entry(number, subject="mallory") for number in range(3)))
    lines = await lines_of(audit)
    found = audit.check_export(
        [line.replace(b'"mallory"', b'"alice"', 1) if b"mallory" in line else line for line in lines]
    )
    assert (found.problem, found.line) == ("edited", 2)
    await audit.erase("mallory")
    assert audit.check_export(await lines_of(audit)) == whole(3, 1, 3, links_checked=True)


ACCEPTED: dict[str, list[sa.Executable]] = {
    "an edit": [sa.update(RECORDS).where(record(3)).values(actor="x")],
    "a changed link": [sa.update(RECORDS).where(record(3)).values(chain="f" * 64)],
    "a removed record": [sa.delete(RECORDS).where(record(3))],
    "a cut tail": [sa.delete(RECORDS).where(RECORDS.c.number > 5)],
    "two breaks": [sa.update(RECORDS).where(record(2)).values(actor="x"), sa.delete(RECORDS).where(record(5))],
}


@pytest.mark.parametrize("name", ACCEPTED)
async def test_an_export_over_an_accepted_break_is_complete_until_that_changes_again(
    database: Database, name: str
) -> None:
    audit = an_audit(database)
    await write(audit, database, *(entry(number, subject="acme:1") for number in range(8)))
    await execute(database, *ACCEPTED[name])
    await audit.accept(by="olga", reason="looked at it")
    await audit.record(entry(9))
    times = {row["number"]: row["at"] for row in await rows_of(database, RECORDS)}
    for since in (None, times[4], times[max(times)]):
        lines = await lines_of(audit, since=since)
        assert check_export(lines, audit.checkpoint_keys()).ok
        assert audit.check_export(lines).ok
    text = b'"accepted":{"first":'
    forged = [line.replace(text, b'"accepted":{"first":1') for line in await lines_of(audit)]
    assert check_export(forged, audit.checkpoint_keys()).problem == "forged"
    await execute(database, sa.update(RECORDS).where(record(4)).values(actor="again"))
    again = await lines_of(audit)
    assert not check_export(again, audit.checkpoint_keys()).ok
    assert (seal_of(again)["complete"], "break" in seal_of(again)) == (False, True)


@pytest.mark.parametrize(
    "told", ["1", "[]", "{}", '{"first":1,"last":0,"link":""}', '{"first":"x","last":1,"link":""}']
)
async def test_a_line_of_an_accepted_break_that_makes_no_sense_is_forged(database: Database, told: str) -> None:
    audit = an_audit(database)
    await write(audit, database, entry())
    lines = await lines_of(audit)
    found = audit.check_export([lines[0], f'{{"accepted":{told}}}\n'.encode(), *lines[1:]])
    assert (found.problem, found.line) == ("forged", 2)


async def test_a_record_that_is_no_json_of_ours_is_an_edit_to_who_has_the_root_keys(database: Database) -> None:
    audit = an_audit(database)
    await write(audit, database, entry())
    lines = await lines_of(audit)
    found = audit.check_export([lines[0], lines[1].replace(b'{"n":0}', b"NaN"), *lines[2:]])
    assert (found.problem, found.line) == ("edited", 2)
