"""The audit chain: every change is named, every sink has the record before it is released, and outages heal."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import stat
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlmodel import Session

from broker.audit import GENESIS, STRETCH, Audit, Entry, Verification, open_audit
from broker.audit.chain import keys_of
from broker.audit.checkpoints import signed
from broker.audit.head import Head
from broker.audit.records import HANDED_OUT, newest
from broker.database import Database, DriverFault, PostgresDatabase, SqliteDatabase, now, open_database, opened
from broker.errors import AuditUnavailable, DatabaseUnavailable
from broker.models import AuditCheckpoint, AuditHead, AuditRecord, SystemKey
from broker.settings import Secret, Settings
from broker.vault.keyring import Sealer, load_keyring, open_sealer

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
RECORDS: sa.Table = AuditRecord.__table__  # type: ignore[attr-defined]
HEAD: sa.Table = AuditHead.__table__  # type: ignore[attr-defined]
CHECKPOINTS: sa.Table = AuditCheckpoint.__table__  # type: ignore[attr-defined]
MOVED = 1_000_000  # a number that no test's chain reaches


def entry(number: int = 0, **changes: Any) -> Entry:
    return Entry(**{"action": "connection.token", "actor": f"clr_{number}", "detail": {"n": number}} | changes)


def an_audit(database: Database, *, sinks: Sequence[str] = ("database",), places: Sequence[str] = ()) -> Audit:
    return Audit(database, KEY, sinks=sinks, checkpoints=places)


@pytest.fixture
async def audit(database: Database) -> AsyncIterator[Audit]:
    opened = an_audit(database)
    yield opened
    await opened.aclose()


async def write(audit: Audit, database: Database, *entries: Entry) -> None:
    await database.transaction(lambda session: audit.append(session, *entries))


async def execute(database: Database, *statements: sa.Executable | str) -> None:
    """Do what an attacker with write access to the database, but without a key, can do."""

    def work(session: Session) -> None:
        for one in statements:
            session.connection().execute(sa.text(one) if isinstance(one, str) else one)

    await database.transaction(work)


async def rows_of(database: Database, table: sa.Table) -> list[dict[str, Any]]:
    query = sa.select(table).order_by(next(iter(table.primary_key)))
    found = await database.read(lambda session: session.connection().execute(query).mappings().all())
    return [dict(row) for row in found]


async def empty(database: Database) -> None:
    await execute(database, sa.delete(RECORDS), sa.delete(HEAD), sa.delete(CHECKPOINTS))


def verdict(found: Verification) -> tuple[str | None, int | None]:
    assert found.ok == (found.problem is None)
    return found.problem, found.first_broken


# --- writing ---------------------------------------------------------------------------------------------------------------


async def test_a_record_is_in_the_chain_when_its_id_comes_back(audit: Audit, database: Database) -> None:
    record_id = await audit.record(
        entry(7, subject="acme:42", integration="i", connection_id="con_1", outcome="intent")
    )
    [row] = await rows_of(database, RECORDS)
    assert record_id.startswith("aud_")
    assert len(record_id) == 30
    assert row | {"at": 0, "chain": "", "key_id": ""} == {
        "number": 1, "id": record_id, "at": 0, "action": "connection.token", "outcome": "intent", "actor": "clr_7",
        "connection_id": "con_1", "integration": "i", "subject": "acme:42",
        "subject_digest": audit.subject_digest("acme:42"), "detail": {"n": 7}, "key_id": "", "chain": "",
    }  # fmt: skip
    assert await audit.verify() == Verification(ok=True, count=1)


async def test_groups_one_after_the_other_make_one_chain(audit: Audit, database: Database) -> None:
    for number in range(4):  # from the third on, the head is known to this process
        await asyncio.gather(*(audit.record(entry(number)) for _ in range(3)))
    await write(audit, database, entry(5))  # behind its back
    for number in range(4):
        await asyncio.gather(*(audit.record(entry(number)) for _ in range(3)))
    assert await audit.verify() == Verification(ok=True, count=25)
    times = [row["at"] for row in await rows_of(database, RECORDS)]
    assert max(times) - min(times) < 60
    assert abs(times[-1] - await database.read(now)) < 5


async def test_two_processes_that_write_in_turn_make_one_chain(database: Database) -> None:
    one, other = (Audit(database, bytes(32), sinks=["database"], checkpoints=[]) for _ in range(2))
    for turn in (one, one, one, other, one, one, one, other, other, other, one):
        await turn.record(entry(1))
    await asyncio.gather(*(audit.record(entry(2)) for audit in (one, other) * 10))
    assert await one.verify() == Verification(ok=True, count=31)


async def test_a_head_that_was_changed_is_never_written_on_by_who_knew_it(audit: Audit, database: Database) -> None:
    for _ in range(3):
        await audit.record(entry(1))
    await execute(database, "UPDATE audit_head SET mac = 'x'")
    for _ in range(2):
        with pytest.raises(AuditUnavailable):
            await audit.record(entry(1))
    assert len(await rows_of(database, RECORDS)) == 3


async def test_an_empty_chain_verifies(audit: Audit) -> None:
    assert await audit.verify() == Verification(ok=True, count=0)


async def test_records_that_wait_together_are_linked_one_after_the_other(audit: Audit, database: Database) -> None:
    ids = await asyncio.gather(*(audit.record(entry(number)) for number in range(300)))
    rows = await rows_of(database, RECORDS)
    assert [row["number"] for row in rows] == list(range(1, 301))
    assert {row["id"] for row in rows} == set(ids)
    assert (await audit.verify()).count == 300


async def test_appended_entries_are_committed_or_rolled_back_with_their_transaction(
    audit: Audit, database: Database
) -> None:
    def fails(session: Session) -> None:
        audit.append(session, entry(1))
        raise LookupError

    await write(audit, database, entry(0), entry(1))
    with pytest.raises(LookupError):
        await database.transaction(fails)
    await write(audit, database)
    await write(audit, database, entry(2))
    assert [row["actor"] for row in await rows_of(database, RECORDS)] == ["clr_0", "clr_1", "clr_2"]
    assert await audit.verify() == Verification(ok=True, count=3)


async def test_entries_inside_a_savepoint_are_refused(audit: Audit, database: Database) -> None:
    def work(session: Session) -> None:
        session.connection().execute(sa.select(1))
        with session.begin_nested():
            audit.append(session, entry())

    with pytest.raises(RuntimeError, match="savepoint"):
        await database.transaction(work)


async def test_the_callers_own_conflict_surfaces_as_it_is(audit: Audit, database: Database) -> None:
    def work(session: Session) -> None:
        session.add(SystemKey(id="k", purpose="x", sealed_key=b"", created_at=0.0))
        audit.append(session, entry())

    await database.transaction(work)
    with pytest.raises(sa.exc.IntegrityError):
        await database.transaction(work)
    assert (await audit.verify()).count == 1


async def test_processes_that_begin_the_chain_at_once_share_one_head(database_url: str) -> None:
    databases = [open_database(database_url) for _ in range(4)]
    audits = [an_audit(one) for one in databases]
    await asyncio.gather(*(audit.record(entry(number)) for number in range(10) for audit in audits))
    assert await audits[0].verify() == Verification(ok=True, count=40)
    for one in databases:
        await one.aclose()


# --- what an entry may hold -----------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('abé\n"', max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
details = st.dictionaries(st.text("xyz\u2028'", max_size=3), json_values, max_size=3)
ON_ONE_DATABASE = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@ON_ONE_DATABASE
@given(found=st.lists(details, min_size=1, max_size=8))
async def test_every_json_detail_comes_back_as_it_was_linked(
    audit: Audit, database: Database, found: list[dict[str, Any]]
) -> None:
    await empty(database)
    await write(audit, database, *(entry(detail=one) for one in found))
    assert await audit.verify() == Verification(ok=True, count=len(found))
    stored = [row["detail"] for row in await rows_of(database, RECORDS)]
    assert [json.dumps(one) for one in stored] == [json.dumps(one) for one in found]


async def test_floats_come_back_exactly(audit: Audit, database: Database) -> None:
    hard = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 1e22, 1e23, 1.0, 2**53 + 2.0]
    await write(audit, database, entry(detail={"floats": hard}))
    [row] = await rows_of(database, RECORDS)
    assert list(map(repr, row["detail"]["floats"])) == list(map(repr, hard))
    assert (await audit.verify()).ok


@pytest.mark.parametrize(
    "detail",
    [
        {"x": float("nan")}, {"x": float("inf")}, {"x": b"bytes"}, {1: "x"}, {None: 1}, {"x": {2: 1}}, {"x": {1, 2}},
        {"x": "\ud800"}, {"x": "\0"}, {"\0": 1}, {"x": 2**63}, {"x": ...}, ["x"], "x", None,
    ],
    ids=repr,
)  # fmt: skip
def test_a_detail_that_is_not_plain_json_is_refused(detail: Any) -> None:
    with pytest.raises(ValueError, match=r"^an audit "):
        entry(detail=detail)


@pytest.mark.parametrize(
    "changes",
    [
        {"action": ""}, {"action": "Connection"}, {"action": "a..b"}, {"action": "a\n"}, {"outcome": "fine"},
        {"actor": "a\0"}, {"actor": None}, {"actor": 3}, {"subject": "\udfff"}, {"connection_id": b"x"},
        {"integration": "\0"},
    ],
    ids=repr,
)  # fmt: skip
def test_an_entry_that_could_not_be_stored_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        entry(**changes)


def test_a_detail_that_is_nested_without_end_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(ValueError, match="too deeply"):
        entry(detail=endless)


def test_an_entry_keeps_its_own_copy_of_the_detail() -> None:
    detail: dict[str, Any] = {"scopes": ("a", "b"), "flag": True}
    kept = entry(detail=detail)
    detail["flag"] = False
    assert kept.detail == {"scopes": ["a", "b"], "flag": True}


# --- digests --------------------------------------------------------------------------------------------------------------


async def test_digests_are_keyed_and_differ_by_purpose(database: Database) -> None:
    one, other = an_audit(database), Audit(database, OTHER_KEY, sinks=["database"], checkpoints=[])
    found = [one.digest("s"), one.subject_digest("s"), other.digest("s"), other.subject_digest("s"), one.digest("t")]
    assert len(set(found)) == len(found)
    assert one.digest("s") == an_audit(database).digest("s")
    both = Audit(database, OTHER_KEY, sinks=["database"], checkpoints=[], previous_keys=[KEY])
    assert both.digests("s") == {one.digest("s"), other.digest("s")}


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
async def test_a_root_key_of_another_length_is_refused(database: Database, key: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Audit(database, key, sinks=["database"], checkpoints=[])


@pytest.mark.parametrize("name", ["", "file", "file:", "syslog", "stdout:x", "database:x"])
async def test_an_unknown_place_is_refused(database: Database, name: str) -> None:
    with pytest.raises(ValueError, match="audit place"):
        Audit(database, KEY, sinks=["database", name], checkpoints=[])


async def test_nothing_of_the_audit_prints_its_key(database: Database) -> None:
    audit = an_audit(database)
    shown = repr(audit) + repr(vars(audit))
    for form in (KEY.hex(), repr(KEY), base64.b64encode(KEY).decode()):
        assert form not in shown


# --- any single change is named -------------------------------------------------------------------------------------------

entries = st.builds(
    Entry,
    action=st.sampled_from(["connection.token", "caller.created"]),
    actor=st.sampled_from(["clr_1", "worker"]),
    outcome=st.sampled_from(["ok", "denied", "intent", "failed"]),
    connection_id=st.none() | st.just("con_1"),
    integration=st.none() | st.just("example"),
    subject=st.none() | st.sampled_from(["acme:1", "é:2"]),
    detail=details,
)
chains = st.lists(entries, min_size=1, max_size=6)
OTHER_VALUES: Mapping[str, Any] = {
    "id": "aud_forged", "at": 1.5, "action": "nothing.happened", "outcome": "other", "actor": "somebody",
    "connection_id": "con_forged", "integration": "other", "subject": "acme:9", "subject_digest": "0" * 64,
    "detail": {"forged": True}, "key_id": "audit-0000", "chain": "f" * 64, "number": MOVED,
}  # fmt: skip


def test_the_attack_covers_every_column() -> None:
    assert set(OTHER_VALUES) == {column.name for column in RECORDS.c}


def expected_after_edit(column: str, number: int, last: int) -> tuple[str, int]:
    if column == "number":
        return ("cut_tail" if number == last else "removed"), number
    return ("subject_mismatch" if column == "subject" else "edited"), number


@ON_ONE_DATABASE
@given(data=st.data(), chain=chains, column=st.sampled_from(sorted(OTHER_VALUES)))
async def test_an_edit_of_any_column_of_any_record_is_named(
    audit: Audit, database: Database, data: st.DataObject, chain: list[Entry], column: str
) -> None:
    await empty(database)
    await write(audit, database, *chain)
    number = data.draw(st.integers(1, len(chain)))
    await execute(database, sa.update(RECORDS).where(RECORDS.c.number == number).values({column: OTHER_VALUES[column]}))
    found = await audit.verify()
    assert verdict(found) == expected_after_edit(column, number, len(chain))
    assert found.count == number - 1


@ON_ONE_DATABASE
@given(data=st.data(), chain=chains, gap=st.sampled_from(["left", "closed"]))
async def test_a_removed_record_is_named(
    audit: Audit, database: Database, data: st.DataObject, chain: list[Entry], gap: str
) -> None:
    await empty(database)
    await write(audit, database, *chain)
    number = data.draw(st.integers(1, len(chain)))
    await execute(database, sa.delete(RECORDS).where(RECORDS.c.number == number))
    if gap == "closed":
        for later in range(number + 1, len(chain) + 1):
            await execute(database, sa.update(RECORDS).where(RECORDS.c.number == later).values(number=later - 1))
    expected = "cut_tail" if number == len(chain) else "removed"
    assert verdict(await audit.verify()) == (expected, number)


@ON_ONE_DATABASE
@given(
    data=st.data(), chain=st.lists(entries, min_size=2, max_size=6), links=st.sampled_from(["moved", "left in place"])
)
async def test_two_swapped_records_are_named(
    audit: Audit, database: Database, data: st.DataObject, chain: list[Entry], links: str
) -> None:
    await empty(database)
    await write(audit, database, *chain)
    one, other = sorted(data.draw(st.lists(st.integers(1, len(chain)), min_size=2, max_size=2, unique=True)))
    before = {row["number"]: row["chain"] for row in await rows_of(database, RECORDS)}
    for old, new in ((one, MOVED), (other, one), (MOVED, other)):
        await execute(database, sa.update(RECORDS).where(RECORDS.c.number == old).values(number=new))
    for number in (one, other) if links == "left in place" else ():
        await execute(database, sa.update(RECORDS).where(RECORDS.c.number == number).values(chain=before[number]))
    assert verdict(await audit.verify()) == ("reordered", one)


@ON_ONE_DATABASE
@given(data=st.data(), chain=chains, fix=st.sampled_from(["nothing", "count and link", "delete the head"]))
async def test_a_cut_tail_is_named_with_the_head_fixed_as_far_as_it_goes_without_a_key(
    audit: Audit, database: Database, data: st.DataObject, chain: list[Entry], fix: str
) -> None:
    await empty(database)
    await write(audit, database, *chain)
    first_cut = data.draw(st.integers(1, len(chain)))
    links = [GENESIS, *(row["chain"] for row in await rows_of(database, RECORDS))]
    await execute(database, sa.delete(RECORDS).where(RECORDS.c.number >= first_cut))
    if fix == "count and link":
        await execute(database, sa.update(HEAD).values(count=first_cut - 1, chain=links[first_cut - 1]))
    if fix == "delete the head":
        await execute(database, sa.delete(HEAD))
    if fix == "delete the head" and first_cut == 1:  # everything is gone: only a second place could tell
        assert await audit.verify() == Verification(ok=True, count=0)
    else:
        expected = "cut_tail" if fix == "nothing" else "head_forged"
        assert verdict(await audit.verify()) == (expected, first_cut)


async def test_an_inserted_record_is_named(audit: Audit, database: Database) -> None:
    await write(audit, database, *map(entry, range(3)))
    rows = await rows_of(database, RECORDS)
    await execute(database, sa.update(RECORDS).where(RECORDS.c.number == 3).values(number=4))
    await execute(database, sa.insert(RECORDS).values(rows[1] | {"number": 3, "id": "aud_x"}))
    assert verdict(await audit.verify()) == ("edited", 3)


@pytest.mark.parametrize("number", [0, -3])
async def test_a_record_before_the_first_is_named(audit: Audit, database: Database, number: int) -> None:
    await write(audit, database, entry())
    [row] = await rows_of(database, RECORDS)
    await execute(database, sa.insert(RECORDS).values(row | {"number": number, "id": "aud_x"}))
    assert verdict(await audit.verify()) == ("edited", number)


async def test_a_record_behind_the_last_is_named(audit: Audit, database: Database) -> None:
    await write(audit, database, entry())
    [row] = await rows_of(database, RECORDS)
    await execute(database, sa.insert(RECORDS).values(row | {"number": 2, "id": "aud_x"}))
    assert verdict(await audit.verify()) == ("head_forged", 2)


@pytest.mark.parametrize("change", [{"mac": "0" * 64}, {"mac": "é"}, {"count": 1}, {"count": 9}, {"chain": GENESIS}])
async def test_a_changed_head_is_named_and_never_written_on(
    audit: Audit, database: Database, change: dict[str, Any]
) -> None:
    await write(audit, database, entry(0), entry(1))
    genuine = (await rows_of(database, HEAD))[0]
    await execute(database, sa.update(HEAD).values(change))
    assert verdict(await audit.verify()) == ("head_forged", 3)
    with pytest.raises(AuditUnavailable, match="head of the audit chain"):
        await audit.record(entry(2))
    with pytest.raises(AuditUnavailable, match="head of the audit chain"):
        await write(audit, database, entry(2))
    with pytest.raises(AuditUnavailable, match="head of the audit chain"):
        await audit.checkpoint(force=True)
    await execute(database, sa.update(HEAD).values(genuine))
    await audit.record(entry(2))
    assert await audit.verify() == Verification(ok=True, count=3)


async def test_a_deleted_head_is_named_and_the_chain_is_not_begun_again_over_its_records(
    audit: Audit, database: Database
) -> None:
    await write(audit, database, entry(0), entry(1))
    await execute(database, sa.delete(HEAD))
    assert verdict(await audit.verify()) == ("head_forged", 3)
    with pytest.raises(AuditUnavailable):
        await audit.record(entry(2))
    with pytest.raises(AuditUnavailable):
        await write(audit, database, entry(2))
    assert len(await rows_of(database, RECORDS)) == 2


async def test_an_older_head_over_newer_records_is_named(audit: Audit, database: Database) -> None:
    await write(audit, database, entry(0))
    older = (await rows_of(database, HEAD))[0]
    await write(audit, database, entry(1), entry(2))
    await execute(database, sa.update(HEAD).values(older))
    assert verdict(await audit.verify()) == ("head_forged", 2)


async def test_a_head_of_another_branch_of_the_chain_is_named(audit: Audit, database: Database) -> None:
    await write(audit, database, entry(0))
    older, kept = (await rows_of(database, HEAD))[0], await rows_of(database, RECORDS)
    await write(audit, database, entry(1))
    branch = (await rows_of(database, HEAD))[0]
    await execute(database, sa.delete(RECORDS).where(RECORDS.c.number > 1), sa.update(HEAD).values(older))
    await write(audit, database, entry(2))
    await execute(database, sa.update(HEAD).values(branch))
    assert verdict(await audit.verify()) == ("head_forged", 3)
    assert (await rows_of(database, RECORDS))[:1] == kept


async def test_a_chain_of_another_key_is_named_at_its_first_record(audit: Audit, database: Database) -> None:
    await write(Audit(database, OTHER_KEY, sinks=["database"], checkpoints=[]), database, entry())
    assert verdict(await audit.verify()) == ("edited", 1)


async def test_records_of_a_previous_key_stay_verifiable(audit: Audit, database: Database) -> None:
    await write(audit, database, entry(0, subject="acme:1"))
    await audit.checkpoint(force=True)
    rotated = Audit(database, OTHER_KEY, sinks=["database"], checkpoints=[], previous_keys=[KEY])
    await write(rotated, database, entry(1, subject="acme:1"))
    await rotated.checkpoint(force=True)
    assert await rotated.verify() == Verification(ok=True, count=2, checked_checkpoints=2)


@pytest.mark.parametrize(
    "text", ["[1]", "null", '{"n":NaN}', '{"n":1e999}', '{"n":1,"n":0}', "{not json", '"\\ud800"', "[" * 5_000, ""]
)
async def test_a_detail_that_we_never_write_is_an_edit_and_no_crash(sqlite_url: str, text: str) -> None:
    database = open_database(sqlite_url)
    audit = an_audit(database)
    await write(audit, database, entry(0), entry(1))
    await execute(database, sa.text("UPDATE audit_records SET detail = :text WHERE number = 2").bindparams(text=text))
    assert verdict(await audit.verify()) == ("edited", 2)
    await database.aclose()


@pytest.mark.parametrize("column", ["at", "actor", "detail", "chain", "key_id", "subject", "subject_digest"])
async def test_bytes_in_any_column_are_a_change_and_no_crash(sqlite_url: str, column: str) -> None:
    database = open_database(sqlite_url)
    audit = an_audit(database)
    await write(audit, database, entry(0, subject="a"), entry(1, subject="a"))
    await execute(database, f"UPDATE audit_records SET {column} = X'6162' WHERE number = 2")  # noqa: S608 - a constant
    assert (await audit.verify()).first_broken == 2
    await database.aclose()


@pytest.mark.parametrize("column", ["at", "actor", "detail", "chain", "key_id", "subject", "subject_digest"])
async def test_text_that_is_no_text_is_an_edit_and_no_crash(sqlite_url: str, column: str) -> None:
    database = open_database(sqlite_url)
    audit = an_audit(database)
    await write(audit, database, *(entry(number, subject="a") for number in range(4)))
    await execute(database, f"UPDATE audit_records SET {column} = CAST(X'FF' AS TEXT) WHERE number = 3")  # noqa: S608 - a constant
    assert verdict(await audit.verify()) == ("edited", 3)
    await execute(database, "UPDATE audit_records SET actor = 'x' WHERE number = 2")
    assert verdict(await audit.verify()) == ("edited", 2)
    await database.aclose()


async def test_verify_without_its_table_finds_no_verdict(audit: Audit, database: Database) -> None:
    await audit.record(entry())
    await execute(database, "ALTER TABLE audit_records RENAME TO gone")
    with pytest.raises(DatabaseUnavailable):
        await audit.verify()


async def test_a_chain_longer_than_a_batch_verifies_and_its_breaks_are_named(audit: Audit, database: Database) -> None:
    await write(audit, database, *map(entry, range(2_100)))
    assert await audit.verify() == Verification(ok=True, count=2_100)
    for old, new in ((1_000, MOVED), (2_001, 1_000), (MOVED, 2_001)):
        await execute(database, sa.update(RECORDS).where(RECORDS.c.number == old).values(number=new))
    assert verdict(await audit.verify()) == ("reordered", 1_000)
    await execute(database, sa.delete(RECORDS).where(RECORDS.c.number == 999))
    assert verdict(await audit.verify()) == ("removed", 999)


async def test_verify_is_not_disturbed_by_writers(audit: Audit, database: Database) -> None:
    async def keep_writing() -> None:
        for number in range(60):
            await audit.record(entry(number))
            await audit.checkpoint(force=True)

    writing = asyncio.create_task(keep_writing())
    found = []
    while not writing.done():
        found.append(await audit.verify())
        await asyncio.sleep(0)
    await writing
    assert found
    assert all(one.ok for one in found)
    assert await audit.verify() == Verification(ok=True, count=60, checked_checkpoints=60)


# --- checkpoints ----------------------------------------------------------------------------------------------------------


async def test_a_checkpoint_is_written_at_once_then_after_a_thousand_records(audit: Audit, database: Database) -> None:
    await audit.checkpoint(force=True)
    assert await rows_of(database, CHECKPOINTS) == []
    for more, expected in ((1, [1]), (999, [1]), (1, [1, 1_001]), (0, [1, 1_001])):
        await write(audit, database, *map(entry, range(more)))
        await audit.checkpoint()
        assert [row["count"] for row in await rows_of(database, CHECKPOINTS)] == expected
    assert await audit.verify() == Verification(ok=True, count=1_001, checked_checkpoints=2)


@pytest.mark.parametrize("seconds", [-61, +3600])
async def test_a_checkpoint_is_written_a_minute_after_the_last_or_when_the_clock_was_set_back(
    audit: Audit, database: Database, seconds: int
) -> None:
    await write(audit, database, entry(0))
    [record] = await rows_of(database, RECORDS)
    older = signed(keys_of(KEY), Head(1, record["chain"], genuine=True), record["at"] + seconds)
    await execute(database, sa.insert(CHECKPOINTS).values(older))
    await audit.checkpoint()
    assert len(await rows_of(database, CHECKPOINTS)) == 1, "no record since"
    await write(audit, database, entry(1))
    await audit.checkpoint()
    assert [row["count"] for row in await rows_of(database, CHECKPOINTS)] == [1, 2]


async def test_force_writes_a_checkpoint_for_any_new_record(audit: Audit, database: Database) -> None:
    for number in range(3):
        await write(audit, database, entry(number))
        await audit.checkpoint()
        await audit.checkpoint(force=True)
    assert [row["count"] for row in await rows_of(database, CHECKPOINTS)] == [1, 2, 3]


async def test_a_forged_checkpoint_is_named_and_does_not_hold_off_the_next(audit: Audit, database: Database) -> None:
    await write(audit, database, entry(0))
    await audit.checkpoint()
    [row] = await rows_of(database, CHECKPOINTS)
    await execute(database, sa.insert(CHECKPOINTS).values(row | {"count": MOVED}))
    assert verdict(await audit.verify()) == ("checkpoint_forged", None)
    await execute(database, sa.update(CHECKPOINTS).where(CHECKPOINTS.c.count == MOVED).values(count=2))
    await write(audit, database, entry(1), entry(2))
    await audit.checkpoint()
    assert [row["count"] for row in await rows_of(database, CHECKPOINTS)] == [1, 2, 3]


@pytest.mark.parametrize(
    "change", [{"chain": "f" * 64}, {"at": 1.0}, {"key_id": "x"}, {"signature": "00" * 64}, {"signature": "é"}]
)
async def test_an_edit_of_any_column_of_a_checkpoint_is_named(
    audit: Audit, database: Database, change: dict[str, Any]
) -> None:
    await write(audit, database, entry(0))
    await audit.checkpoint()
    await execute(database, sa.update(CHECKPOINTS).values(change))
    assert await audit.verify() == Verification(ok=False, count=1, problem="checkpoint_forged", checked_checkpoints=1)


async def cut_to_the_first(database: Database, head: Mapping[str, Any], *, checkpoints_too: bool) -> None:
    """Cut the tail the best way there is without a key: with the older copy of the head row."""
    await execute(database, sa.delete(RECORDS).where(RECORDS.c.number > 1), sa.update(HEAD).values(head))
    if checkpoints_too:
        await execute(database, sa.delete(CHECKPOINTS).where(CHECKPOINTS.c.count > 1))


async def three_records(audit: Audit, database: Database) -> dict[str, Any]:
    """Write three records, each with a checkpoint; return the head row as it was after the first."""
    heads = []
    for number in range(3):
        await write(audit, database, entry(number))
        await audit.checkpoint(force=True)
        heads.append((await rows_of(database, HEAD))[0])
    return heads[0]


async def test_a_tail_cut_with_an_older_head_shows_by_the_checkpoints_in_the_database(
    audit: Audit, database: Database
) -> None:
    await cut_to_the_first(database, await three_records(audit, database), checkpoints_too=False)
    assert verdict(await audit.verify()) == ("cut_tail", 2)


async def test_a_tail_cut_with_its_checkpoints_shows_only_by_the_second_place(
    database: Database, tmp_path: Path
) -> None:
    audit = an_audit(database, places=[f"file:{tmp_path / 'checkpoints'}"])
    await cut_to_the_first(database, await three_records(audit, database), checkpoints_too=True)
    assert (await an_audit(database).verify()).ok, "nothing in the database contradicts"
    assert await audit.verify() == Verification(
        ok=False, count=1, first_broken=2, problem="cut_tail", checked_checkpoints=4
    )


async def test_everything_deleted_shows_only_by_the_second_place(database: Database, tmp_path: Path) -> None:
    audit = an_audit(database, places=[f"file:{tmp_path / 'checkpoints'}"])
    await three_records(audit, database)
    await empty(database)
    assert (await an_audit(database).verify()).ok
    assert verdict(await audit.verify()) == ("cut_tail", 1)


async def test_a_tail_that_was_cut_and_grew_again_shows_by_the_second_place(database: Database, tmp_path: Path) -> None:
    audit = an_audit(database, places=[f"file:{tmp_path / 'checkpoints'}"])
    await cut_to_the_first(database, await three_records(audit, database), checkpoints_too=True)
    await write(audit, database, *map(entry, range(5)))
    assert (await an_audit(database).verify()).ok
    assert verdict(await audit.verify()) == ("cut_tail", 2)


async def test_a_cut_tail_under_a_forged_head_is_named_by_its_checkpoint(audit: Audit, database: Database) -> None:
    await three_records(audit, database)
    await cut_to_the_first(database, {"count": 1}, checkpoints_too=False)
    assert verdict(await audit.verify()) == ("cut_tail", 2)


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"1", b'{"count":1,"chain":"","at":1,"key_id":[],"signature":""}', b'{"at":NaN}']
)
async def test_a_line_in_the_second_place_that_we_did_not_sign_is_named(
    database: Database, tmp_path: Path, line: bytes
) -> None:
    place = tmp_path / "checkpoints"
    audit = an_audit(database, places=[f"file:{place}"])
    await write(audit, database, entry())
    await audit.checkpoint()
    place.write_bytes(place.read_bytes() + line)
    assert verdict(await audit.verify()) == ("checkpoint_forged", None)


@pytest.mark.parametrize("torn", [b'{"at":1', b"\xff\xfe", b"x" * 10_000, b"[" * 3_000])
async def test_a_line_that_was_cut_while_it_was_written_is_passed_over_and_spoils_no_other(
    database: Database, tmp_path: Path, torn: bytes
) -> None:
    place = tmp_path / "checkpoints"
    audit = an_audit(database, places=[f"file:{place}"])
    await write(audit, database, entry(0))
    await audit.checkpoint()
    place.write_bytes(place.read_bytes() + torn)
    await write(audit, database, entry(1))
    await audit.checkpoint(force=True)
    assert place.read_bytes().endswith(b"}\n")
    assert await audit.verify() == Verification(ok=True, count=2, checked_checkpoints=4)


async def test_a_second_place_that_fails_is_tried_again(database: Database, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    place.mkdir()
    audit = an_audit(database, places=[f"file:{place}"])
    await write(audit, database, entry())
    for _ in range(2):
        with pytest.raises(AuditUnavailable):
            await audit.checkpoint()
    with pytest.raises(AuditUnavailable):
        await audit.verify()
    assert len(await rows_of(database, CHECKPOINTS)) == 1, "it holds up no other place"
    place.rmdir()
    assert (await audit.verify()).ok
    await audit.checkpoint()
    assert await audit.verify() == Verification(ok=True, count=1, checked_checkpoints=2)


async def test_checkpoints_go_to_standard_output(database: Database, capfd: pytest.CaptureFixture[str]) -> None:
    audit = an_audit(database, places=["stdout"])
    await write(audit, database, entry())
    await audit.checkpoint()
    [row] = await rows_of(database, CHECKPOINTS)
    assert json.loads(capfd.readouterr().out) == row | {"public_key": audit.checkpoint_keys()[row["key_id"]]}
    assert await audit.verify() == Verification(ok=True, count=1, checked_checkpoints=1)


async def test_workers_that_write_the_same_checkpoint_do_not_collide(database: Database) -> None:
    audits = [an_audit(database) for _ in range(4)]
    await write(audits[0], database, entry())
    await asyncio.gather(*(audit.checkpoint() for audit in audits))
    assert len(await rows_of(database, CHECKPOINTS)) == 1


def check_alone(line: str, public_key: str) -> None:
    """Check a line as somebody does who has nothing of ours but the public key (`InvalidSignature` otherwise)."""
    covered, _, _ = line.partition(',"public_key"')
    signature = bytes.fromhex(json.loads(line)["signature"])
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    key.verify(signature, f"broker audit checkpoint 1\n{covered}}}".encode())


async def test_a_third_party_can_check_the_second_place_with_the_public_key_alone(
    database: Database, tmp_path: Path
) -> None:
    place = tmp_path / "checkpoints"
    audit = an_audit(database, places=[f"file:{place}"])
    await three_records(audit, database)
    [(key_id, public_key)] = audit.checkpoint_keys().items()
    lines = place.read_text("ascii").splitlines()
    assert len(lines) == 3
    for line in lines:
        assert json.loads(line) | {"key_id": key_id, "public_key": public_key} == json.loads(line)
        check_alone(line, public_key)
        with pytest.raises(InvalidSignature):
            check_alone(line.replace('"count":', '"count":1'), public_key)


async def test_the_public_keys_of_earlier_root_keys_stay_known_behind_the_current_one(database: Database) -> None:
    one = an_audit(database)
    other = Audit(database, OTHER_KEY, sinks=["database"], checkpoints=[])
    rotated = Audit(database, OTHER_KEY, sinks=["database"], checkpoints=[], previous_keys=[KEY])
    assert list(rotated.checkpoint_keys().items()) == [*other.checkpoint_keys().items(), *one.checkpoint_keys().items()]


@pytest.mark.parametrize("put", ["00" * 32, "", None, []])
async def test_a_line_with_another_public_key_is_named(database: Database, tmp_path: Path, put: object) -> None:
    place = tmp_path / "checkpoints"
    audit = an_audit(database, places=[f"file:{place}"])
    await write(audit, database, entry())
    await audit.checkpoint()
    place.write_text(json.dumps(json.loads(place.read_text()) | {"public_key": put}))
    assert verdict(await audit.verify()) == ("checkpoint_forged", None)


# --- other sinks ----------------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


async def test_every_record_is_copied_to_the_file_without_its_subject(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = an_audit(database, sinks=["database", f"file:{path}"])
    await audit.record(entry(0, subject="acme:42", detail={"text": "é\n\u2028"}))
    await write(audit, database, entry(1), entry(2))
    await asyncio.gather(*(audit.record(entry(number)) for number in range(3, 40)))
    rows = [{name: row[name] for name in row if name != "subject"} for row in await rows_of(database, RECORDS)]
    assert lines_of(path) == rows
    assert len(rows) == 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "acme" not in path.read_text("utf-8")


async def test_several_appends_of_one_transaction_are_copied_once(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = an_audit(database, sinks=["database", f"file:{path}"])

    def work(session: Session) -> None:
        audit.append(session, entry(0))
        audit.append(session, entry(1), entry(2))

    for _ in range(2):
        await database.transaction(work)
    await audit.aclose()
    assert [line["number"] for line in lines_of(path)] == [1, 2, 3, 4, 5, 6]


async def test_what_was_rolled_back_is_not_copied(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = an_audit(database, sinks=["database", f"file:{path}"])

    def fails(session: Session) -> None:
        audit.append(session, entry(0))
        raise LookupError

    with pytest.raises(LookupError):
        await database.transaction(fails)
    await audit.aclose()
    assert not path.exists()


async def test_every_record_is_copied_to_standard_output(database: Database, capfd: pytest.CaptureFixture[str]) -> None:
    audit = an_audit(database, sinks=["database", "stdout"])
    record_id = await audit.record(entry(0))
    assert json.loads(capfd.readouterr().out)["id"] == record_id


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_full_device(path: Path) -> None:
    path.symlink_to("/dev/full")


OBSTACLES: list[tuple[Callable[[Path], None], Callable[[Path], None]]] = [
    (Path.mkdir, Path.rmdir),
    (a_full_device, Path.unlink),
    (a_pipe, Path.unlink),
]


@pytest.mark.parametrize(("obstruct", "clear"), OBSTACLES, ids=["directory", "full device", "pipe"])
async def test_a_copy_that_cannot_be_written_holds_up_nothing_and_catches_up_in_order(
    database: Database, tmp_path: Path, obstruct: Callable[[Path], None], clear: Callable[[Path], None]
) -> None:
    path = tmp_path / "audit.jsonl"
    audit = an_audit(database, sinks=["database", f"file:{path}"])
    obstruct(path)
    await asyncio.gather(*(audit.record(entry(number)) for number in range(5)))
    await write(audit, database, entry(5))
    assert audit.failing_copies == 1
    assert await audit.verify() == Verification(ok=True, count=6), "each once, none written again"
    clear(path)
    await audit.record(entry(6))
    await until_healed(audit)
    await audit.record(entry(7))
    assert [line["number"] for line in lines_of(path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    await audit.aclose()


async def until_healed(audit: Audit) -> None:
    async with asyncio.timeout(20):
        while audit.failing_copies:  # noqa: ASYNC110 - nothing announces it but the log
            await asyncio.sleep(0.05)


async def test_a_device_that_takes_lines_is_a_sink(database: Database) -> None:
    audit = an_audit(database, sinks=["database", "file:/dev/null"])
    assert await audit.record(entry())


async def test_a_standard_output_that_is_closed_or_full_lacks_nothing_once_it_heals(
    database: Database, capfd: pytest.CaptureFixture[str]
) -> None:
    audit = an_audit(database, sinks=["database", "stdout"])
    closed = io.StringIO()
    closed.close()
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"))
    for stream in (closed, full):
        with contextlib.redirect_stdout(stream), structlog.testing.capture_logs():
            await audit.record(entry())
            assert audit.failing_copies == 1
    with contextlib.suppress(OSError):
        full.close()
    with structlog.testing.capture_logs() as told:
        await until_healed(audit)
        await asyncio.sleep(0)
    assert [line["event"] for line in told] == ["audit.copy_healed"]
    await audit.record(entry())
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2, 3]
    await audit.aclose()


async def test_whatever_could_not_be_written_is_counted_once(database: Database, tmp_path: Path) -> None:
    path, failures = tmp_path / "audit.jsonl", [0]

    def count() -> None:
        failures[0] += 1

    places = ["database", f"file:{path}"]
    audit = Audit(database, KEY, sinks=places, checkpoints=places, on_failure=count)
    await audit.record(entry())
    await write(audit, database, entry())
    await audit.checkpoint()
    assert failures == [0]
    path.unlink()
    path.mkdir()
    await asyncio.gather(*(audit.record(entry()) for _ in range(3)))
    assert failures == [1], "the copy began to fail"
    await write(audit, database, entry(), entry())
    await audit.record(entry())
    assert failures == [1], "and still does"
    with pytest.raises(AuditUnavailable):
        await audit.checkpoint(force=True)
    assert failures == [2]
    with pytest.raises(AuditUnavailable):
        await audit.verify()
    assert failures == [2], "reading is not writing"
    await execute(database, sa.update(HEAD).values(mac="00"))
    with pytest.raises(AuditUnavailable, match="changed from outside"):
        await audit.record(entry())
    with pytest.raises(AuditUnavailable, match="changed from outside"):
        await write(audit, database, entry())
    with pytest.raises(AuditUnavailable, match="changed from outside"):
        await audit.checkpoint(force=True)
    assert failures == [5]
    await audit.aclose()


# --- outages of the database ----------------------------------------------------------------------------------------------


async def test_a_dropped_table_makes_the_audit_unavailable_and_it_heals(audit: Audit, database: Database) -> None:
    await audit.record(entry(0))
    for table in ("audit_records", "audit_head"):
        await execute(database, f"ALTER TABLE {table} RENAME TO gone")
        failed = await asyncio.gather(*(audit.record(entry(number)) for number in range(3)), return_exceptions=True)
        assert [type(one) for one in failed] == [AuditUnavailable] * 3
        with pytest.raises(AuditUnavailable):
            await write(audit, database, entry(1))
        await execute(database, f"ALTER TABLE gone RENAME TO {table}")
    await execute(database, "ALTER TABLE audit_checkpoints RENAME TO gone")
    with pytest.raises(AuditUnavailable):
        await audit.checkpoint(force=True)
    await execute(database, "ALTER TABLE gone RENAME TO audit_checkpoints")
    await audit.record(entry(1))
    await audit.checkpoint(force=True)
    assert await audit.verify() == Verification(ok=True, count=2, checked_checkpoints=1)


async def test_a_locked_table_makes_the_audit_unavailable_in_bounded_time_and_it_heals(database_url: str) -> None:
    database, other = impatient(database_url), open_database(database_url)
    audit = an_audit(database)
    await audit.record(entry(0))
    locked, release = threading.Event(), threading.Event()
    holding = asyncio.create_task(hold_the_lock(other, locked, release))
    await asyncio.to_thread(locked.wait)
    async with asyncio.timeout(5):
        failed = await asyncio.gather(*(audit.record(entry(number)) for number in range(50)), return_exceptions=True)
        with pytest.raises((AuditUnavailable, DatabaseUnavailable)):  # on SQLite the transaction itself does not begin
            await write(audit, database, entry())
    assert {type(one) for one in failed} == {AuditUnavailable}
    release.set()
    await holding
    await audit.record(entry(1))
    assert await audit.verify() == Verification(ok=True, count=2)
    await database.aclose()
    await other.aclose()


def impatient(url: str) -> SqliteDatabase | PostgresDatabase:
    if url.startswith("sqlite"):
        return SqliteDatabase(Path(url.removeprefix("sqlite:///")), busy_timeout_seconds=0.3)
    return PostgresDatabase(url, busy_timeout_seconds=0.3)


async def hold_the_lock(database: Database, locked: threading.Event, release: threading.Event) -> None:
    """Hold the head's lock from a connection of its own until released."""

    def work(session: Session) -> None:
        session.connection().execute(sa.text(HOLD[database.dialect]))
        locked.set()
        while not release.is_set():
            session.connection().execute(sa.text(WAIT[database.dialect]))

    await database.transaction(work)


HOLD = {"sqlite": "SELECT 1", "postgresql": "LOCK TABLE audit_head IN ACCESS EXCLUSIVE MODE"}
WAIT = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT max(i) FROM n",
    "postgresql": "SELECT pg_sleep(0.05)",
}


# --- search and erase -----------------------------------------------------------------------------------------------------


async def test_search_is_newest_first_and_filters_by_every_field(audit: Audit, database: Database) -> None:
    one = entry(1, actor="a", action="x.y", connection_id="con_1", integration="i", subject="s")
    await write(audit, database, one)
    await write(audit, database, *(entry(number) for number in range(2, 6)))
    first = (await rows_of(database, RECORDS))[0]
    later = (await rows_of(database, RECORDS))[1]["at"]

    async def numbers(**filters: Any) -> list[int]:
        return [record.number for record in await audit.search(**{"limit": 10} | filters)]

    assert await numbers() == [5, 4, 3, 2, 1]
    assert await numbers(limit=2) == [5, 4]
    assert await numbers(limit=2, before_number=4) == [3, 2]
    for name in ("actor", "action", "connection_id", "integration", "subject"):
        assert await numbers(**{name: first[name]}) == [1]
        assert await numbers(**{name: "nothing"}) == []
    assert await numbers(since=later) == [5, 4, 3, 2]
    assert await numbers(until=later) == [1]
    assert await numbers(since=first["at"], until=later, actor="a") == [1]


async def test_search_walks_past_records_that_do_not_fit(audit: Audit, database: Database) -> None:
    await write(audit, database, entry(1, action=HANDED_OUT, actor="a"), entry(2, action="x.y", actor="a"))
    for _ in range(3):
        await write(audit, database, *(entry(0, action=HANDED_OUT, actor="b") for _ in range(STRETCH // 2)))

    async def numbers(**filters: Any) -> list[int]:
        return [record.number for record in await audit.search(**{"limit": 10} | filters)]

    newest = 2 + 3 * (STRETCH // 2)
    assert await numbers(actor="a") == [2, 1]
    assert await numbers(actor="a", action=HANDED_OUT, limit=1) == [1]
    assert await numbers(action="x.y") == [2]
    assert await numbers(actor="a", before_number=2) == [1]
    assert await numbers(actor="nobody") == []
    assert (await numbers())[0] == newest
    assert await numbers(limit=1, before_number=newest - STRETCH - 5) == [newest - STRETCH - 6]


async def test_other_actions_than_hand_outs_are_found_by_their_index(sqlite_url: str) -> None:
    async with opened(sqlite_url) as database:
        query = newest({"action": "x.y"}, since=None, until=None)
        text = str(query.compile(compile_kwargs={"literal_binds": True}))
        plan = await database.read(
            lambda session: str(session.connection().execute(sa.text(f"EXPLAIN QUERY PLAN {text}")).all())
        )
    assert "ix_audit_records_rare" in plan


async def test_an_erased_subject_is_gone_and_the_chain_still_verifies(audit: Audit, database: Database) -> None:
    await write(audit, database, entry(0, subject="acme:1"), entry(1, subject="acme:2"), entry(2, subject="acme:1"))
    assert await audit.erase("acme:1") == 2
    assert await audit.erase("acme:1") == 0
    assert [row["subject"] for row in await rows_of(database, RECORDS)] == [None, "acme:2", None]
    assert (await rows_of(database, RECORDS))[0]["subject_digest"] == audit.subject_digest("acme:1")
    assert await audit.verify() == Verification(ok=True, count=3)


async def test_erasing_goes_through_every_stretch_while_others_write(audit: Audit, database: Database) -> None:
    for _ in range(3):
        group = [entry(number, subject=f"acme:{number % 4}") for number in range(STRETCH // 2)]
        await write(audit, database, *group)
    erased, *_ = await asyncio.gather(audit.erase("acme:1"), *(audit.record(entry(number)) for number in range(20)))
    assert erased == 3 * (STRETCH // 8)
    assert await audit.search(subject="acme:1", limit=1) == []
    assert len(await audit.search(subject="acme:2", limit=5)) == 5
    assert await audit.verify() == Verification(ok=True, count=3 * (STRETCH // 2) + 20)


# --- the root key ---------------------------------------------------------------------------------------------------------


def the_settings(**changes: Any) -> Settings:
    key = base64.b64encode(bytes(32)).decode()
    return Settings(env="development", keyring=Secret(f"k1:{key}"), **changes)


async def a_sealer(database: Database) -> Sealer:
    return await open_sealer(database, load_keyring(the_settings()))


async def test_the_root_key_is_made_once_sealed_and_loaded_again(database: Database, tmp_path: Path) -> None:
    sealer = await a_sealer(database)
    chosen = the_settings(
        audit_sinks=("database", f"file:{tmp_path / 'a'}"), audit_checkpoints=(f"file:{tmp_path / 'c'}",)
    )
    first = await open_audit(database, sealer, chosen)
    await first.record(entry())
    await first.checkpoint()
    again = await open_audit(database, sealer, chosen)
    assert await again.verify() == Verification(ok=True, count=1, checked_checkpoints=2)
    assert again.digest("x") == first.digest("x")
    assert len(lines_of(tmp_path / "a")) == 1
    [row] = await rows_of(database, SystemKey.__table__)  # type: ignore[attr-defined]
    assert (row["purpose"], row["state"]) == ("audit", "current")
    assert (await rows_of(database, RECORDS))[0]["key_id"] == row["id"]
    await first.aclose()
    await again.aclose()


async def test_an_opened_audit_counts_what_it_could_not_write(database: Database, tmp_path: Path) -> None:
    failures: list[str] = []
    chosen = the_settings(audit_sinks=("database", f"file:{tmp_path}"))
    audit = await open_audit(database, await a_sealer(database), chosen, on_failure=partial(failures.append, "once"))
    await audit.record(entry())
    assert failures == ["once"]
    await audit.aclose()


async def test_processes_that_start_at_once_end_with_one_root_key(database_url: str) -> None:
    databases = [open_database(database_url) for _ in range(6)]
    sealer = await a_sealer(databases[0])
    audits = await asyncio.gather(*(open_audit(one, sealer, the_settings()) for one in databases))
    assert len({audit.digest("x") for audit in audits}) == 1
    for one in databases:
        await one.aclose()


async def test_a_root_key_that_does_not_open_makes_the_audit_unavailable(database: Database) -> None:
    sealer = await a_sealer(database)
    await open_audit(database, sealer, the_settings())
    await execute(database, "UPDATE system_keys SET id = 'audit-moved'")
    with pytest.raises(AuditUnavailable, match="does not open"):
        await open_audit(database, sealer, the_settings())


async def test_previous_root_keys_are_loaded_too_and_one_that_does_not_open_is_left_out(database: Database) -> None:
    sealer = await a_sealer(database)
    await (await open_audit(database, sealer, the_settings())).record(entry(0))
    await execute(database, "UPDATE system_keys SET state = 'previous'")
    await execute(
        database,
        sa.insert(SystemKey.__table__).values(  # type: ignore[attr-defined]
            id="audit-damaged", purpose="audit", state="previous", sealed_key=b"x", created_at=0.0
        ),
    )
    rotated = await open_audit(database, sealer, the_settings())
    await rotated.record(entry(1))
    assert len({row["key_id"] for row in await rows_of(database, RECORDS)}) == 2
    assert await rotated.verify() == Verification(ok=True, count=2)


async def test_what_a_failing_append_raises_quotes_no_value(audit: Audit, database: Database) -> None:
    await write(audit, database, entry(0))
    await execute(database, sa.delete(HEAD))
    with pytest.raises(AuditUnavailable) as caught:
        await write(audit, database, entry(1, subject=KEY.hex(), actor=KEY.hex()))
    assert KEY.hex() not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None
    assert isinstance(caught.value.__cause__, DriverFault)


async def test_without_the_table_of_keys_the_audit_is_unavailable(database: Database) -> None:
    sealer = await a_sealer(database)
    await execute(database, "ALTER TABLE system_keys RENAME TO gone")
    with pytest.raises(AuditUnavailable):
        await open_audit(database, sealer, the_settings())
