"""Stopping, lifting and ending many connections on both databases: races, sizes, crashes, and the law of what is selected."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel import Session, col, select

from broker.credentials.freezes import Selector
from broker.database import Database, opened
from broker.demo.sandbox import SandboxOptions
from broker.errors import BrokerError
from broker.imports import Import
from broker.models import AuditRecord, BrowserSession, Connection, Revocation, RevocationResult, SealedSecret, new_ids
from broker.revocations.stopping import selected
from tests.crash.processes import ADMIN, Site, import_expired, open_site
from tests.flows.time_passes import row_of

MANY = 100_000 if os.environ.get("TEST_LONG") == "1" else 3_000
PAIRS: Any = st.sampled_from(["a", "b", "ä", "a.b", "", "é'"])
NAMES: Any = PAIRS.filter(bool)


@pytest.fixture
async def on_postgres(postgres_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path, postgres_url, SandboxOptions()) as opened_site:
        yield opened_site


@pytest.fixture
async def site(database_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path, database_url, SandboxOptions()) as made:
        yield made


def connection(**fields: Any) -> Connection:
    plain = {"integration": "sandbox", "provider": "oidc", "status": "active", "created_at": 1.0, "secret_version": 1}
    return Connection(**{"id": new_ids("con", 1)[0], **plain, **fields})


async def add(database: Database, rows: Sequence[Connection]) -> None:
    await insert(database, [stored(row) for row in rows])


def stored(row: Connection) -> dict[str, Any]:
    return {("metadata" if name == "extra" else name): value for name, value in row.model_dump().items()}


async def insert(database: Database, values: Sequence[dict[str, Any]]) -> None:
    table: sa.Table = Connection.__table__  # type: ignore[attr-defined]
    for start in range(0, len(values), 10_000):
        some = values[start : start + 10_000]
        await database.transaction(lambda session, some=some: session.connection().execute(sa.insert(table), some))  # type: ignore[misc]


async def statuses(database: Database) -> dict[str, int]:
    counted = sa.select(col(Connection.status), sa.func.count()).group_by(col(Connection.status))
    return {status: count for status, count in await database.read(lambda s: s.execute(counted).all())}  # noqa: C416 - rows


async def freeze(site: Site, **parts: Any) -> Revocation:
    return await site.parts.revocations.start("freeze", Selector(**parts), "a test", ADMIN)


async def revoke(site: Site, **parts: Any) -> Revocation:
    return await site.parts.revocations.start("revoke", Selector(**parts), "a test", ADMIN)


# What is selected

ROWS = st.builds(
    connection,
    integration=NAMES,
    subject=st.none() | NAMES,
    tags=st.dictionaries(NAMES, PAIRS, max_size=2),
    scopes=st.lists(NAMES, max_size=2),
    created_at=st.floats(0, 3),
    status=st.sampled_from(["active", "error", "reauthorization_required"]),
)
SELECTORS = st.builds(
    Selector,
    integration=st.none() | NAMES,
    subject=st.none() | NAMES,
    tag=st.none() | st.tuples(NAMES, PAIRS),
    scope=st.none() | NAMES,
    issued_before=st.none() | st.floats(0.5, 3),
).filter(lambda selector: bool(selector.stored())) | st.just(Selector(all=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, min_size=1, max_size=6), selector=SELECTORS)
def test_the_database_selects_what_the_rule_says(database_url: str, rows: list[Connection], selector: Selector) -> None:
    expected = {row.id for row in rows if selector.fits(row)}

    def work(session: Session) -> set[str]:
        return set(session.exec(select(Connection.id).where(*selected(session, "freeze", selector))))

    async def both() -> set[str]:
        async with opened(database_url, migrate=False) as database:
            await database.transaction(lambda session: session.execute(sa.delete(Connection)))
            await add(database, rows)
            return await database.read(work)

    assert asyncio.run(both()) == expected
    assert Selector.of(selector.stored()) == selector


def test_nothing_is_not_everything() -> None:
    assert not Selector().fits(connection())
    with pytest.raises(ValueError, match="empty"):
        Selector().conditions("sqlite")
    assert Selector.of({"erased": True}) is None


# Many at once


@pytest.mark.timeout(600)
async def test_many_connections_are_frozen_and_lifted_in_one_transaction_each_in_bounded_time(site: Site) -> None:
    database = site.parts.database
    one, ids = (
        stored(connection(tags={"a": "b"}, pins={"token": "https://example.com"}, scopes=["x", "y"])),
        new_ids("con", MANY),
    )
    await insert(database, [{**one, "id": ids[n], "subject": f"s{n}", "account_id": f"a{n}"} for n in range(MANY)])
    began = time.monotonic()
    row = await freeze(site, integration="sandbox")
    frozen_at = time.monotonic()
    assert (row.total, await statuses(database)) == (MANY, {"frozen": MANY})
    await site.parts.revocations.work_on(row)
    while (row := await site.parts.revocations.get(row.id)).state == "running":
        await site.parts.revocations.work_on(row)
    recorded_at = time.monotonic()
    await site.parts.revocations.lift(row.id, ADMIN)
    lifted_at = time.monotonic()
    assert await statuses(database) == {"active": MANY}
    shown = f"frozen in {frozen_at - began:.2f} s, recorded in {recorded_at - frozen_at:.2f} s"
    print(f"\n{database.dialect}, {MANY} connections: {shown}, lifted in {lifted_at - recorded_at:.2f} s")  # noqa: T201 - figures
    records = sa.select(sa.func.count()).where(col(AuditRecord.action) == "connection.frozen")
    assert await database.read(lambda session: session.execute(records).scalar_one()) == MANY
    assert frozen_at - began < 60.0
    assert lifted_at - recorded_at < 60.0


async def test_no_connection_becomes_usable_past_a_freeze_that_begins_at_the_same_moment(site: Site) -> None:
    async def bring(number: int) -> None:
        credentials = {"type": "oauth2", "access_token": f"token-{number}"}
        await site.parts.connections.import_(Import("sandbox", f"s{number}", credentials), ADMIN)

    bringing = [asyncio.create_task(bring(number)) for number in range(40)]
    await asyncio.sleep(0.02)
    row = await freeze(site, integration="sandbox")
    await asyncio.gather(*bringing)
    assert await statuses(site.parts.database) == {"frozen": 40}
    row = await site.parts.revocations.get(row.id)
    assert row.total == 40, "those that came later are counted too"
    await site.parts.revocations.lift(row.id, ADMIN)
    assert await statuses(site.parts.database) == {"active": 40}


async def test_freezes_and_lifts_at_once_end_with_nothing_frozen(site: Site) -> None:
    await add(site.parts.database, [connection(subject="s", account_id=f"a{n}") for n in range(50)])

    async def there_and_back() -> None:
        row = await freeze(site, subject="s")
        await site.parts.revocations.lift(row.id, ADMIN)

    await asyncio.gather(*(there_and_back() for _ in range(6)))
    assert await statuses(site.parts.database) == {"active": 50}


# Refreshes under way


def slow(site: Site) -> None:
    """Let the provider take its time from now on."""
    state = site.sandbox.state
    state.options = msgspec.structs.replace(state.options, latency_seconds=0.5)


async def test_a_refresh_that_ends_after_the_freeze_hands_out_nothing_and_does_not_unfreeze(site: Site) -> None:
    connection_id = await import_expired(site, "ada")
    before = await row_of(site.parts.database, connection_id)
    slow(site)
    refreshing = asyncio.create_task(site.parts.credentials.refresh(before))
    await asyncio.sleep(0.2)
    row = await freeze(site, subject="acme:ada")
    await refreshing
    after = await row_of(site.parts.database, connection_id)
    assert (after.status, after.status_reason) == ("frozen", row.id)
    assert after.secret_version > before.secret_version, "what the provider has given is kept"


async def test_a_refresh_under_way_is_waited_for_and_its_new_token_is_the_one_that_is_revoked(site: Site) -> None:
    connection_id = await import_expired(site, "ada")
    before = await row_of(site.parts.database, connection_id)
    slow(site)
    refreshing = asyncio.create_task(site.parts.credentials.refresh(before))
    await asyncio.sleep(0.2)
    row = await revoke(site, subject="acme:ada")
    await site.parts.revocations.work_on(row)
    await refreshing
    view = await site.parts.revocations.view(row.id)
    assert (view.row.state, view.counts) == ("done", {"revoked": 1})
    assert [visit.outcome for visit in site.sandbox.state.visits if visit.endpoint == "revoke"]
    assert (await row_of(site.parts.database, connection_id)).secret_version == -before.secret_version - 1


# Crashes, and several at work


async def test_two_processes_end_each_connection_once(site: Site, database_url: str) -> None:
    ids = [await import_expired(site, "ada") for _ in range(12)]
    row = await revoke(site, subject="acme:ada")
    async with contextlib.AsyncExitStack() as stack:
        other = await stack.enter_async_context(other_process(site))
        await asyncio.gather(*(one.work_on(row) for one in (site.parts.revocations, other)))
    for _ in range(20):
        await site.parts.revocations.advance()
    view = await site.parts.revocations.view(row.id)
    assert (view.row.state, view.row.done, view.counts) == ("done", 12, {"revoked": 12})
    records = select(AuditRecord).where(AuditRecord.action == "connection.revocation")
    told = await site.parts.database.read(lambda session: list(session.exec(records)))
    assert sorted(record.connection_id or "" for record in told) == sorted(ids)


@contextlib.asynccontextmanager
async def other_process(site: Site) -> AsyncIterator[Any]:
    """Open the parts once more on the same database."""
    from broker.app import open_parts  # noqa: PLC0415 - only here

    async with open_parts(site.settings) as parts:
        yield parts.revocations


async def test_a_claim_that_a_crash_left_is_taken_up_when_it_is_over(site: Site) -> None:
    connection_id = await import_expired(site, "ada")
    row = await revoke(site, subject="acme:ada")
    database = site.parts.database
    result = sa.update(RevocationResult).where(col(RevocationResult.connection_id) == connection_id)
    far = result.values(not_before_at=4e9, attempts=1, at=1.0)
    await database.transaction(lambda session: session.execute(far))
    await site.parts.revocations.work_on(row)
    assert (await site.parts.revocations.view(row.id)).counts == {"pending": 1}
    await database.transaction(lambda session: session.execute(result.values(not_before_at=1.0)))
    await site.parts.revocations.work_on(row)
    assert (await site.parts.revocations.view(row.id)).counts == {"revoked": 1}


async def test_one_provider_that_is_down_holds_up_no_other(site: Site) -> None:
    working = await import_expired(site, "ada")
    await add(
        site.parts.database,
        [connection(integration="gone", subject=f"s{n}", account_id="a") for n in range(5)],
    )
    row = await revoke(site, all=True)
    await site.parts.revocations.work_on(row)
    results = {
        one.connection_id: one for one in await site.parts.revocations.results(row.id, result=None, limit=9, after=None)
    }
    assert results.pop(working).result == "revoked"
    assert {(one.result, one.attempts) for one in results.values()} == {("pending", 1)}


async def hurry(site: Site) -> None:
    """Let the time be over until the next try of all that is pending."""
    due = sa.update(RevocationResult).values(not_before_at=0.0)
    await site.parts.database.transaction(lambda session: session.execute(due))
    site.parts.revocations._ending._lanes.clear()


async def ends(site: Site, row: Revocation) -> dict[str, tuple[str, int]]:
    found = await site.parts.revocations.results(row.id, result=None, limit=99, after=None)
    return {one.connection_id: (one.result, one.attempts) for one in found}


@pytest.mark.parametrize("action", ["revoke", "erase"])
async def test_an_outage_of_the_secret_store_uses_up_no_try(site: Site, action: str) -> None:
    ids = [await import_expired(site, "ada") for _ in range(3)]
    if action == "erase":
        row = await site.parts.revocations.erase("acme:ada", ADMIN, revoke=True)
    else:
        row = await revoke(site, subject="acme:ada")
    database = site.parts.database
    await database.transaction(lambda s: s.execute(sa.text("ALTER TABLE sealed_secrets RENAME TO gone")))
    for _ in range(8):
        await site.parts.revocations.advance()
        await hurry(site)
    assert await ends(site, row) == dict.fromkeys(ids, ("pending", 0))
    await database.transaction(lambda s: s.execute(sa.text("ALTER TABLE gone RENAME TO sealed_secrets")))
    await site.parts.revocations.advance()
    assert await ends(site, row) == dict.fromkeys(ids, ("revoked", 1))


async def test_a_secret_that_does_not_open_is_no_outage_and_holds_up_no_other(site: Site) -> None:
    damaged, fine = await import_expired(site, "ada"), await import_expired(site, "ada")
    damage = sa.update(SealedSecret).where(col(SealedSecret.owner) == f"connections/{damaged}").values(sealed=b"?")
    await site.parts.database.transaction(lambda session: session.execute(damage))
    row = await revoke(site, subject="acme:ada")
    await site.parts.revocations.advance()
    assert await ends(site, row) == {damaged: ("pending", 1), fine: ("revoked", 1)}


async def test_an_erasure_and_a_lift_at_once_both_come_through(on_postgres: Site, postgres_url: str) -> None:
    site = on_postgres  # SQLite has one writer
    await add(site.parts.database, [connection(subject="s", account_id=f"a{n}") for n in range(3)])
    await freeze(site, subject="s")
    row = await freeze(site, subject="s")
    session_row = BrowserSession(
        id="ses_x", token_digest="x", caller_id="c", subject="s", created_at=1.0, expires_at=9e9
    )
    await site.parts.database.transaction(lambda session: session.add(session_row))
    engine = create_async_engine(postgres_url, poolclass=NullPool)
    async with engine.begin() as holder:  # the erasure waits for this row, in its midst
        await holder.execute(sa.text("SELECT 1 FROM sessions WHERE id = 'ses_x' FOR UPDATE"))
        erasing = asyncio.create_task(site.parts.revocations.erase("s", ADMIN, revoke=False))
        await waiters(engine, 1)
        lifting = asyncio.create_task(site.parts.revocations.lift(row.id, ADMIN))
        await waiters(engine, 2)
    await engine.dispose()
    await asyncio.gather(erasing, lifting)
    assert (await site.parts.revocations.get(row.id)).state == "lifting"


async def test_a_lift_and_the_records_of_another_process_at_once_both_come_through(
    on_postgres: Site, postgres_url: str
) -> None:
    site = on_postgres  # SQLite has one writer
    await add(site.parts.database, [connection(subject="s", account_id=f"a{n}") for n in range(3)])
    row = await freeze(site, subject="s")
    await site.parts.revocations.work_on(row)
    unrecorded = sa.update(RevocationResult).values(at=None)
    await site.parts.database.transaction(lambda session: session.execute(unrecorded))
    engine = create_async_engine(postgres_url, poolclass=NullPool)
    async with other_process(site) as other:
        async with engine.begin() as holder:
            await holder.execute(sa.text("SELECT 1 FROM revocations FOR UPDATE"))
            lifting = asyncio.create_task(site.parts.revocations.lift(row.id, ADMIN))
            await waiters(engine, 1)
            recording = asyncio.create_task(other.work_on(row))
            await waiters(engine, 2)
        await asyncio.gather(lifting, recording)
    await engine.dispose()
    assert await statuses(site.parts.database) == {"active": 3}


async def waiters(engine: AsyncEngine, count: int) -> None:
    """Wait until so many transactions of this database wait for a lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(10), engine.connect() as connection:
        while await connection.scalar(sa.text(waiting)) < count:
            await connection.rollback()  # or the view stays as it was
            await asyncio.sleep(0.02)


async def test_a_revocation_of_nothing_is_through_at_once(site: Site) -> None:
    row = await revoke(site, subject="nobody")
    await site.parts.revocations.advance()
    assert (await site.parts.revocations.get(row.id)).state == "done"
    with pytest.raises(BrokerError, match="only a freeze"):
        await site.parts.revocations.lift(row.id, ADMIN)


async def test_opened_secrets_leave_the_memory_with_a_freeze(site: Site) -> None:
    vault: Any = site.parts.vault
    await vault.put("connections/con_x", {"type": "oauth2"}, expected_version=0)
    await vault.get("connections/con_x", 1)
    assert vault._known("connections/con_x", 1) is not None
    await freeze(site, subject="nobody")
    assert vault._known("connections/con_x", 1) is None
