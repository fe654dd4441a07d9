"""The audit's root keys: a rotation reaches every process, and what earlier keys made stays verifiable."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa
from sqlmodel import Session

from broker.audit import Audit, open_audit
from broker.database import Database, now, open_database
from broker.errors import AuditUnavailable
from broker.models import SystemKey
from tests.broker.test_audit import HEAD, RECORDS, a_sealer, entry, execute, rows_of, the_settings, write

KEYS: sa.Table = SystemKey.__table__  # type: ignore[attr-defined]


async def publish(audit: Audit, database: Database) -> str:
    """Do what a rotation does first: a next key is there."""
    row = audit.system_keys.new_row("next")

    def work(session: Session) -> None:
        row.created_at = now(session)
        session.add(row)

    await database.transaction(work)
    return row.id


async def switch(database: Database, key_id: str) -> None:
    await execute(
        database,
        sa.update(KEYS).where(KEYS.c.state == "current").values(state="previous"),
        sa.update(KEYS).where(KEYS.c.id == key_id).values(state="current"),
    )


async def two(database: Database) -> tuple[Audit, Audit]:
    sealer = await a_sealer(database)
    return await open_audit(database, sealer, the_settings()), await open_audit(database, sealer, the_settings())


async def test_after_a_heartbeat_a_process_writes_with_the_new_key(database: Database) -> None:
    audit, _ = await two(database)
    await audit.record(entry(0, subject="acme:1"))
    await audit.checkpoint(force=True)
    key_id = await publish(audit, database)
    await audit.system_keys.refresh()
    await audit.record(entry(1))
    assert list(audit.checkpoint_keys())[1] == key_id, "known before it is used"
    await switch(database, key_id)
    await audit.system_keys.refresh()
    await audit.record(entry(2))
    await write(audit, database, entry(3, subject="acme:1"))
    await audit.checkpoint(force=True)
    used = [row["key_id"] for row in await rows_of(database, RECORDS)]
    assert used[0] == used[1] != key_id
    assert used[2:] == [key_id, key_id]
    assert next(iter(audit.checkpoint_keys())) == key_id
    found = await audit.verify()
    assert (found.ok, found.count, found.checked_checkpoints) == (True, 4, 2)


async def test_a_process_that_lags_behind_accepts_the_head_of_a_next_key_and_writes_on(database: Database) -> None:
    one, other = await two(database)
    key_id = await publish(one, database)
    await asyncio.gather(one.system_keys.refresh(), other.system_keys.refresh())
    await switch(database, key_id)
    await one.system_keys.refresh()
    for number in range(3):
        await one.record(entry(number))
        await other.record(entry(number))
    assert {row["key_id"] for row in await rows_of(database, RECORDS)} == set(one.checkpoint_keys())
    assert (await one.verify()).ok


async def test_a_process_that_missed_a_rotation_reads_the_keys_before_it_says_forged(database: Database) -> None:
    one, other = await two(database)
    await other.record(entry(0))
    key_id = await publish(one, database)
    await switch(database, key_id)
    await one.refresh_keys()
    await one.record(entry(1))
    await asyncio.gather(*(other.record(entry(number)) for number in range(5)))
    await other.checkpoint(force=True)
    assert (await rows_of(database, RECORDS))[-1]["key_id"] == key_id
    assert (await other.verify()).ok


async def test_a_checkpoint_and_verify_learn_of_new_keys_by_themselves(database: Database) -> None:
    one, other = await two(database)
    key_id = await publish(one, database)
    await switch(database, key_id)
    await one.refresh_keys()
    await one.record(entry(1))
    await other.checkpoint(force=True)
    assert (await (await two(database))[0].verify()).ok


async def test_a_forged_head_is_still_forged_and_does_not_ask_for_keys_again_and_again(database: Database) -> None:
    audit, _ = await two(database)
    await audit.record(entry(0))
    await execute(database, sa.update(HEAD).values(mac="x"))
    failed = await asyncio.gather(*(audit.record(entry(number)) for number in range(20)), return_exceptions=True)
    assert {type(one) for one in failed} == {AuditUnavailable}
    assert not await audit.refresh_keys(), "it was asked a moment ago"


async def test_a_key_that_does_not_open_leaves_the_ones_before_in_force(database: Database) -> None:
    audit, _ = await two(database)
    await audit.record(entry(0))
    key_id = await publish(audit, database)
    await execute(database, sa.update(KEYS).where(KEYS.c.id == key_id).values(sealed_key=b"x"))
    await switch(database, key_id)
    await audit.system_keys.refresh()
    await audit.record(entry(1))
    assert (await rows_of(database, RECORDS))[-1]["key_id"] != key_id


async def test_an_audit_with_keys_for_good_has_none_to_rotate(database: Database) -> None:
    audit = Audit(database, bytes(32), sinks=["database"], checkpoints=[])
    with pytest.raises(RuntimeError):
        assert audit.system_keys
    assert not await audit.refresh_keys()


async def test_processes_rotate_under_load_and_leave_one_chain(database_url: str) -> None:
    databases = [open_database(database_url) for _ in range(3)]
    sealer = await a_sealer(databases[0])
    audits = [await open_audit(one, sealer, the_settings()) for one in databases]

    async def keep_writing(audit: Audit) -> None:
        for number in range(30):
            await audit.record(entry(number))

    writing = [asyncio.create_task(keep_writing(audit)) for audit in audits]
    for _ in range(3):
        key_id = await publish(audits[0], databases[0])
        await asyncio.gather(*(audit.system_keys.refresh() for audit in audits))
        await switch(databases[0], key_id)
        await audits[0].system_keys.refresh()
    await asyncio.gather(*writing)
    found = await audits[1].verify()
    assert (found.ok, found.count) == (True, 90)
    for audit, one in zip(audits, databases, strict=True):
        await audit.aclose()
        await one.aclose()
