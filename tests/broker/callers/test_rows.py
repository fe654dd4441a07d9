"""Rows of callers authenticate themselves: who can write to the database, and has no keyring, makes nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import Session, col, select
from structlog.testing import capture_logs

from broker.audit import Audit, Entry
from broker.callers import Callers, mint_key, parse_key
from broker.callers.keys import key_row
from broker.callers.rows import MARKED, TAKEN_OVER
from broker.callers.upkeep import Upkeep
from broker.database import Database
from broker.errors import Conflict, SecretStoreUnavailable, Unauthenticated
from broker.models import AuditCheckpoint, AuditFloor, AuditHead, AuditRecord, Caller, CallerKey, SystemKey, new_id
from providers.spec import Secret
from tests.broker.callers.made import made_callers, row_macs

GRANT: dict[str, Any] = {"integrations": ["mail"], "may": ["read"]}


@pytest.fixture
async def audit(database: Database) -> AsyncIterator[Audit]:
    """Give a real audit chain over the test's database."""
    made = Audit(database, bytes(32), sinks=("database",), checkpoints=())
    yield made
    await made.aclose()


@dataclass
class Replicas:
    """Opens callers as processes that start one after the other do."""

    database: Database
    audit: Audit
    forgeries: list[int] = field(default_factory=list)
    opened: list[Callers] = field(default_factory=list)

    async def start(self) -> Callers:
        """Start one more."""
        made = await made_callers(self.database, self.audit, on_forgery=lambda: self.forgeries.append(1))
        self.opened.append(made)
        return made


@pytest.fixture
async def replicas(database: Database, audit: Audit) -> AsyncIterator[Replicas]:
    """Give a way to start processes; they are closed afterwards."""
    made = Replicas(database, audit)
    yield made
    for one in made.opened:
        await one.aclose()


async def is_let_in(callers: Callers, key: Secret) -> bool:
    try:
        await callers.identify(key)
    except Unauthenticated:
        return False
    return True


async def service(callers: Callers) -> tuple[Caller, Secret]:
    return await callers.add("backend", ["service"], [GRANT], actor="test")


async def test_without_any_key_of_the_rows_nobody_is_called_forged(database: Database, replicas: Replicas) -> None:
    _, key = await service(await replicas.start())
    rows: Any = SystemKey.__table__  # type: ignore[attr-defined]
    mine = rows.c.purpose == "rows"
    sealed = await database.read(lambda session: session.execute(sa.select(rows.c.sealed_key).where(mine)).scalar_one())
    await write(database, sa.update(rows).where(mine).values(sealed_key=b"noise"))
    with pytest.raises(SecretStoreUnavailable):
        await (await replicas.start()).identify(key)
    assert replicas.forgeries == []
    await write(database, sa.update(rows).where(mine).values(sealed_key=sealed))
    assert await is_let_in(await replicas.start(), key)


async def write(database: Database, *statements: sa.Executable) -> None:
    """Write to the database as somebody without the keyring does."""

    def work(session: Session) -> None:
        for statement in statements:
            session.execute(statement)

    await database.transaction(work)


async def written(database: Database, *rows: Caller | CallerKey) -> None:
    def work(session: Session) -> None:
        session.add_all(rows)

    await database.transaction(work)


async def of_older_version(replicas: Replicas, caller: Caller, key: CallerKey) -> None:
    """Write rows and the record of them as a version without MACs did."""
    await written(replicas.database, caller, key)
    detail = {"caller_id": caller.id, "key_id": key.id, "name": caller.name}
    await replicas.audit.record(Entry(action="caller.created", actor="cli", detail=detail))


def old_rows(*, roles: tuple[str, ...] = ("service",)) -> tuple[Caller, CallerKey, Secret]:
    """Return rows as a version without MACs wrote them."""
    key_id, key = mint_key()
    caller = Caller(id=new_id("clr"), name="old", roles=list(roles), grants=[GRANT], created_at=5.0)
    return caller, key_row(caller.id, key_id, key, 5.0), key


async def test_a_caller_that_was_written_into_the_database_is_nobody(replicas: Replicas) -> None:
    callers = await replicas.start()
    await service(callers)
    forged, its_key, key = old_rows(roles=("admin",))
    await written(replicas.database, forged, its_key)
    for one in (callers, await replicas.start()):
        assert not await is_let_in(one, key)
    assert len(replicas.forgeries) == 2


CHANGES: list[tuple[type[Caller | CallerKey], dict[str, Any]]] = [
    (Caller, {"roles": ["admin"]}),
    (Caller, {"grants": [{"integrations": ["*"], "may": ["token"]}]}),
    (Caller, {"name": "another"}),
    (Caller, {"expires_at": 9e9}),
    (CallerKey, {"created_at": 1.0}),
    (Caller, {"mac": None}),
    (Caller, {"mac": ""}),
    (Caller, {"mac": ":"}),
    (Caller, {"mac": "key_x:" + "0" * 64}),
    (CallerKey, {"expires_at": 9e9}),
    (CallerKey, {"mac": None}),
    (CallerKey, {"mac": "é"}),
]


@pytest.mark.parametrize(("table", "values"), CHANGES)
async def test_a_row_that_was_changed_is_nobodys(
    replicas: Replicas, table: type[Caller | CallerKey], values: dict[str, Any]
) -> None:
    callers = await replicas.start()
    _, key = await service(callers)
    other, other_key = await service(callers)
    named = table.id if table is Caller else CallerKey.caller_id
    await write(replicas.database, sa.update(table).where(col(named) != other.id).values(**values))
    assert not await is_let_in(callers, key)
    assert await is_let_in(callers, other_key)


async def test_a_key_that_was_moved_to_another_caller_is_nobodys(replicas: Replicas) -> None:
    callers = await replicas.start()
    root, _ = await callers.add("root", ["admin"], actor="test")
    _, key = await service(callers)
    await write(replicas.database, sa.update(CallerKey).values(caller_id=root.id))
    assert not await is_let_in(callers, key)


async def test_a_mac_of_another_row_does_not_fit(replicas: Replicas) -> None:
    callers = await replicas.start()
    caller, key = await service(callers)
    another, _ = await service(callers)
    mac = sa.select(col(Caller.mac)).where(col(Caller.id) == another.id).scalar_subquery()
    await write(replicas.database, sa.update(Caller).where(col(Caller.id) == caller.id).values(mac=mac))
    assert not await is_let_in(callers, key)


async def test_what_decides_nothing_may_change_without_a_mac(replicas: Replicas) -> None:
    callers = await replicas.start()
    _, key = await service(callers)
    await write(replicas.database, sa.update(CallerKey).values(last_used_at=7.0, warned_at=8.0))
    await write(replicas.database, sa.update(Caller).values(created_at=9.0))
    assert await is_let_in(callers, key)


async def test_a_forged_caller_is_not_made_genuine_by_a_change_and_can_be_deleted(replicas: Replicas) -> None:
    callers = await replicas.start()
    forged, its_key, key = old_rows()
    await written(replicas.database, forged, its_key)
    for work in (
        callers.update(forged.id, {"name": "new"}, actor="test"),
        callers.add_key(forged.id, actor="test"),
    ):
        with pytest.raises(Conflict):
            await work
    assert not await is_let_in(callers, key)
    await callers.delete(forged.id, actor="test")
    assert await callers.page(limit=10) == []


async def test_a_forged_admin_does_not_count_as_the_last_one(replicas: Replicas) -> None:
    callers = await replicas.start()
    forged, its_key, _ = old_rows(roles=("admin",))
    await written(replicas.database, forged, its_key)
    root, _ = await callers.add("root", ["admin"], actor="test")
    with pytest.raises(Conflict):
        await callers.delete(root.id, actor="test")
    assert await (await replicas.start()).ensure_admin(mint_key()[1]) is False


# --- taking over rows of an older version ---------------------------------------------------------------------------------


async def actions(database: Database) -> list[str]:
    query = select(AuditRecord.action).order_by(col(AuditRecord.number))
    return list(await database.read(lambda session: session.exec(query).all()))


async def test_rows_of_an_older_version_are_taken_over_at_the_first_start_and_never_again(replicas: Replicas) -> None:
    old, its_key, key = old_rows()
    await of_older_version(replicas, old, its_key)
    callers = await replicas.start()
    assert await is_let_in(callers, key)
    late, late_key, late_secret = old_rows()
    await written(replicas.database, late, late_key)
    again = await replicas.start()
    assert await is_let_in(again, key)
    assert not await is_let_in(again, late_secret)
    assert (await actions(replicas.database)).count(TAKEN_OVER) == 1


async def test_processes_that_start_at_once_take_over_once(replicas: Replicas) -> None:
    old, its_key, key = old_rows()
    await of_older_version(replicas, old, its_key)
    callers = await asyncio.gather(*(replicas.start() for _ in range(4)))
    assert [await is_let_in(one, key) for one in callers] == [True] * 4
    assert (await actions(replicas.database)).count(TAKEN_OVER) == 1


NO_MACS = (sa.update(Caller).values(mac=None), sa.update(CallerKey).values(mac=None))
NO_KEYS = sa.delete(SystemKey).where(col(SystemKey.purpose) == "rows")
RETIRED = sa.update(SystemKey).where(col(SystemKey.purpose) == "rows").values(state="retired")


@pytest.mark.parametrize(
    "statements", [NO_MACS, (*NO_MACS, NO_KEYS), (*NO_MACS, RETIRED)], ids=["macs", "macs and keys", "keys retired"]
)
async def test_who_takes_all_macs_away_does_not_get_rows_taken_over_again(
    replicas: Replicas, statements: tuple[Any, ...]
) -> None:
    _, key = await service(await replicas.start())
    forged, its_key, forged_key = old_rows(roles=("admin",))
    await written(replicas.database, forged, its_key)
    await write(replicas.database, *statements)
    callers = await replicas.start()
    assert not await is_let_in(callers, forged_key)
    assert not await is_let_in(callers, key)
    fresh = mint_key()[1]  # the way back: the operator's setting makes a new admin
    assert await callers.ensure_admin(fresh)
    assert await is_let_in(callers, fresh)


RECORDS = sa.delete(AuditRecord)
TAKING_OVER = RECORDS.where(col(AuditRecord.action) == TAKEN_OVER)
CHAIN = (RECORDS, *(sa.delete(one) for one in (AuditHead, AuditCheckpoint, AuditFloor)))


@pytest.mark.parametrize(
    "statements", [(TAKING_OVER,), (RECORDS,), CHAIN], ids=["its record", "all records", "the chain"]
)
@pytest.mark.parametrize("others_stay", [True, False])
async def test_who_takes_the_record_of_the_taking_over_away_too_makes_no_admin(
    replicas: Replicas, statements: tuple[Any, ...], *, others_stay: bool
) -> None:
    _, key = await service(await replicas.start())
    if not others_stay:
        statements = (*statements, sa.delete(Caller), sa.delete(CallerKey))
    await write(replicas.database, *NO_MACS, NO_KEYS, *statements)
    forged, its_key, forged_key = old_rows(roles=("admin",))
    await written(replicas.database, forged, its_key)
    for _ in range(2):
        with capture_logs() as lines:
            callers = await replicas.start()
        assert [
            line for line in lines if line["event"] == "caller.rows_key_missing" and "BROKER_ADMIN_KEY" in line["help"]
        ]
        assert not await is_let_in(callers, forged_key)
        assert not await is_let_in(callers, key)
        await write(replicas.database, NO_KEYS)


async def test_a_new_audit_after_the_way_back_does_not_let_rows_be_taken_over(replicas: Replicas) -> None:
    await service(await replicas.start())
    await write(replicas.database, *NO_MACS, NO_KEYS, *CHAIN)
    callers = await replicas.start()
    fresh = mint_key()[1]
    assert await callers.ensure_admin(fresh)  # the chain is whole again, and knows this caller
    await write(replicas.database, *NO_MACS, NO_KEYS)
    assert not await is_let_in(await replicas.start(), fresh)


async def test_rows_that_the_older_version_did_not_record_are_not_taken_over(replicas: Replicas) -> None:
    await of_older_version(replicas, *old_rows()[:2])
    forged, its_key, forged_key = old_rows()
    await written(replicas.database, forged, its_key)
    assert not await is_let_in(await replicas.start(), forged_key)


async def test_what_retention_or_an_operator_made_whole_takes_nothing_over(replicas: Replicas) -> None:
    old, its_key, key = old_rows()
    await of_older_version(replicas, old, its_key)
    await write(replicas.database, RECORDS.where(col(AuditRecord.number) == 1))
    await replicas.audit.accept(by="test", reason="looked")
    assert (await replicas.audit.verify()).ok
    assert not await is_let_in(await replicas.start(), key)


async def test_a_row_with_a_mac_before_there_is_a_key_stops_the_taking_over(replicas: Replicas) -> None:
    old, its_key, key = old_rows()
    old.mac = "key_x:" + "0" * 64
    await of_older_version(replicas, old, its_key)
    assert not await is_let_in(await replicas.start(), key)


# --- older versions put back ----------------------------------------------------------------------------------------------


async def upkeep_of(replicas: Replicas) -> Upkeep:
    return Upkeep(replicas.database, replicas.audit, await row_macs(replicas.database, replicas.audit))


async def copied(database: Database, table: type[Any]) -> list[dict[str, Any]]:
    rows = await database.read(lambda session: session.exec(select(table)).all())
    return [row.model_dump() for row in rows]


async def test_a_revoked_key_that_is_put_back_is_revoked_again(replicas: Replicas) -> None:
    callers = await replicas.start()
    caller, key = await service(callers)
    upkeep = await upkeep_of(replicas)
    await upkeep.undo_put_back()
    (before,) = await copied(replicas.database, CallerKey)
    await callers.revoke_key(caller.id, _key_id(key), actor="test")
    await write(replicas.database, sa.update(CallerKey).values(**before))
    assert await is_let_in(callers, key)  # a genuine MAC: what it says was true once
    for one in (upkeep, await upkeep_of(replicas)):
        await one.undo_put_back()
    callers._known.clear()
    assert not await is_let_in(callers, key)
    assert (await actions(replicas.database)).count("caller.row_put_back") == 1


async def test_a_deleted_caller_that_is_put_back_is_deleted_again(replicas: Replicas) -> None:
    callers = await replicas.start()
    caller, key = await service(callers)
    rows = await copied(replicas.database, Caller), await copied(replicas.database, CallerKey)
    await callers.delete(caller.id, actor="test")
    await write(replicas.database, sa.insert(Caller).values(rows[0]), sa.insert(CallerKey).values(rows[1]))
    await (await upkeep_of(replicas)).undo_put_back()
    assert await callers.page(limit=10) == []
    assert not await is_let_in(await replicas.start(), key)


async def test_roles_that_are_put_back_end_the_caller(replicas: Replicas) -> None:
    callers = await replicas.start()
    caller, key = await callers.add("x", ["security", "service"], [GRANT], actor="test")
    (before,) = await copied(replicas.database, Caller)
    await callers.update(caller.id, {"roles": ["service"]}, actor="test")
    await write(replicas.database, sa.update(Caller).values(**before))
    await (await upkeep_of(replicas)).undo_put_back()
    assert not await is_let_in(await replicas.start(), key)


async def cut_all(replicas: Replicas) -> int:
    await replicas.audit.checkpoint(force=True)
    await asyncio.sleep(0.01)  # the checkpoint has to be older than now
    return await replicas.audit.cut(older_than_days=0)


async def test_what_was_put_back_is_found_after_retention_removed_the_records_of_its_revocation(
    replicas: Replicas,
) -> None:
    callers = await replicas.start()
    caller, key = await service(callers)
    gone, gone_key = await service(callers)
    _, good = await service(callers)
    rows, keys = await copied(replicas.database, Caller), await copied(replicas.database, CallerKey)
    await callers.revoke_key(caller.id, _key_id(key), actor="test")
    await callers.delete(gone.id, actor="test")
    assert await cut_all(replicas) == 0, "the first record of all rows stays until there is another"
    keeping = Upkeep(
        replicas.database, replicas.audit, await row_macs(replicas.database, replicas.audit), retention_days=0
    )
    await keeping.undo_put_back()
    assert await cut_all(replicas) == 6
    assert "caller.key_revoked" not in await actions(replicas.database)
    await write(
        replicas.database,
        *(sa.delete(table).where(col(table.id).is_not(None)) for table in (CallerKey, Caller)),
        sa.insert(Caller).values(rows),
        sa.insert(CallerKey).values(keys),
    )
    again = await replicas.start()
    assert await is_let_in(again, key)
    await (await upkeep_of(replicas)).undo_put_back()
    after = await replicas.start()
    assert [await is_let_in(after, one) for one in (key, gone_key, good)] == [False, False, True]
    assert (await replicas.audit.verify()).ok


async def test_rows_are_stated_anew_each_half_of_the_retention_period(replicas: Replicas) -> None:
    callers = await replicas.start()
    _, key = await service(callers)
    macs = await row_macs(replicas.database, replicas.audit)
    for days, stated in ((None, 0), (30, 0), (1e-9, 1), (30, 1)):
        await Upkeep(replicas.database, replicas.audit, macs, retention_days=days).undo_put_back()
        assert (await actions(replicas.database)).count(MARKED) == stated
    assert await is_let_in(await replicas.start(), key)


async def test_rows_whose_macs_cannot_be_checked_while_rows_are_stated_are_not_forgotten(replicas: Replicas) -> None:
    callers = await replicas.start()
    _, key = await service(callers)
    macs = await row_macs(replicas.database, replicas.audit)
    macs._keys._by_id = {}
    await Upkeep(replicas.database, replicas.audit, macs, retention_days=0).undo_put_back()
    await cut_all(replicas)
    assert "caller.created" not in await actions(replicas.database)
    await (await upkeep_of(replicas)).undo_put_back()
    assert await is_let_in(await replicas.start(), key)


async def test_rows_as_the_audit_knows_them_are_left_alone(replicas: Replicas) -> None:
    old, its_key, old_key = old_rows()
    await of_older_version(replicas, old, its_key)
    callers = await replicas.start()
    caller, key = await service(callers)
    await callers.update(caller.id, {"expires_at": 9_000_000_000, "name": "naïve ☃"}, actor="test")
    row, second = await callers.add_key(caller.id, actor="test", expires_at=8_000_000_000)
    await callers.revoke_key(caller.id, _key_id(key), actor="test")
    upkeep = await upkeep_of(replicas)
    for _ in range(2):
        await upkeep.undo_put_back()
    assert await is_let_in(callers, second)
    assert await is_let_in(callers, old_key)
    assert row.expires_at == 8e9
    assert "caller.row_put_back" not in await actions(replicas.database)


def _key_id(key: Secret) -> str:
    parsed = parse_key(key.reveal())
    assert parsed is not None
    return parsed.key_id
