"""Keys are replaced while everybody works: nothing stays under the old key, nobody writes under it again, no crash matters."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel import Session, col, select
from structlog.testing import capture_logs

from broker.audit import Audit, open_audit
from broker.audit.chain import keys_of
from broker.database import Database, now, open_database
from broker.errors import Conflict, InternalError, NotFound, SecretStoreUnavailable
from broker.models import AuditRecord, DataKey, Flow, KeyCheck, Replica, Rotation, SealedSecret, SystemKey, new_id
from broker.replicas import Replicas
from broker.rotation import Rotations, progress
from broker.rotation.data import BATCH, DataKeys
from broker.rotation.encryption import EncryptionKeys
from broker.rotation.passes import after_pass
from broker.rotation.retired import SHRED_AFTER_SECONDS
from broker.rotation.steps import KeyClass, Record
from broker.rotation.system import SKEW_SECONDS, SystemKeyClass
from broker.settings import load_settings
from broker.vault import SecretUnreadable
from broker.vault.floor import KeyRetired, require_live_key
from broker.vault.keyring import Keyring, Sealer, load_keyring, open_sealer, parse_keys
from broker.vault.sealed_places import PLACES
from broker.vault.sealed_rows import SealedRows
from broker.vault.system_keys import SystemKeys

LIVES = {"session": 86_400.0, "jwt-signing": 900.0, "webhook-signing": 86_400.0, "audit": None}
SYSTEM = tuple(LIVES)


def entry(key_id: str, seed: int) -> str:
    return f"{key_id}:{base64.b64encode(bytes((seed + 7 * n) % 256 for n in range(32))).decode()}"


@dataclass
class Process:
    """What one process of the broker has: its own keys in memory, its own engine, its own heartbeat."""

    database: Database
    wrapping: Keyring
    sealer: Sealer
    audit: Audit
    system: dict[str, SystemKeys]
    replicas: Replicas
    rotations: Rotations
    vault: SealedRows

    async def store(self, count: int, prefix: str = "connections") -> list[str]:
        """Store secrets of new owners."""
        owners = [f"{prefix}/{new_id('con')}" for _ in range(count)]
        for owner in owners:
            await self.vault.put(owner, {"value": owner}, expected_version=0)
        return owners

    async def row(self, rotation_id: str) -> Rotation:
        return await self.rotations.get(rotation_id)

    async def until(self, rotation_id: str, *steps: str) -> Rotation:
        """Advance until the rotation is at one of these steps, or is over."""
        for _ in range(200):
            row = await self.rotations.advance(rotation_id)
            if row.step in steps or row.state != "running":
                return row
        raise AssertionError(f"still at {row.step}: {row.detail}")

    async def finish(self, rotation_id: str) -> Rotation:
        return await self.until(rotation_id)

    async def finish_or_wait(self, rotation_id: str) -> Rotation:
        """Advance until nothing gets on any more."""
        row = await self.row(rotation_id)
        while row.state == "running":
            before, row = progress(row), await self.rotations.advance(rotation_id)
            if progress(row) == before:
                break
        return row

    async def rotate(self, key_class: str) -> Rotation:
        row = await self.rotations.start(key_class, actor="tests")
        return await self.finish(row.id)

    async def under(self, key_id: str) -> int:
        """Return how many values are under a data key."""
        return await self.database.read(lambda session: sum(place.count_under(session, key_id) for place in PLACES))


async def open_process(database: Database, place: Path, **options: Any) -> Process:
    """Do what a start does, over a database that is open."""
    given = {"env": "development", "data_dir": place, "keyring_file": place / "keyring"}
    settings = load_settings({}, directory=place, **given)
    wrapping = load_keyring(settings)
    sealer = await open_sealer(database, wrapping)
    audit = await open_audit(database, sealer, settings)
    system = {one: SystemKeys(database, sealer, one) for one in SYSTEM if one != "audit"}
    system["audit"] = SystemKeys(database, sealer, "audit", id_of=lambda root: keys_of(root).id)
    for keys in system.values():
        await keys.load()
    replicas = Replicas(database, sealer, wrapping, tuple(system.values()))
    classes: list[KeyClass] = [
        EncryptionKeys(database, wrapping),
        DataKeys(database, sealer, wrapping, settle_seconds=0.0),
        *(SystemKeyClass(database, system[one], life_seconds=LIVES[one]) for one in SYSTEM),
    ]
    rotations = Rotations(database, audit, classes, **options)
    return Process(database, wrapping, sealer, audit, system, replicas, rotations, SealedRows(database, sealer))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    put_keys(tmp_path, entry("k1", 1))
    return tmp_path


def put_keys(place: Path, *entries: str) -> None:
    path = place / "keyring"
    path.write_text("\n".join(entries) + "\n")
    path.chmod(0o600)


@pytest.fixture
async def one(database: Database, place: Path) -> AsyncIterator[Process]:
    process = await open_process(database, place)
    yield process
    await process.audit.aclose()


@pytest.fixture
async def other(database: Database, place: Path, one: Process) -> AsyncIterator[Process]:
    process = await open_process(database, place)
    yield process
    await process.audit.aclose()


async def all_of(database: Database, query: Any) -> list[Any]:
    return await database.read(lambda session: list(session.exec(query)))


async def actions(database: Database) -> list[str]:
    rows = await all_of(database, select(AuditRecord).order_by(col(AuditRecord.number)))
    return [row.action for row in rows if row.action.startswith(("rotation.", "key."))]


# --- data keys ------------------------------------------------------------------------------------------------------------


async def sealed_value(one: Process, purpose: str = "verifier") -> str:
    """Store a value in a place without an index over its key; return its row's id."""
    flow_id = new_id("flw")
    sealed = one.sealer.seal(b"verifier", owner=flow_id, purpose=purpose, version=1)
    facts: Any = {"integration": "x", "cookie_name": "c", "cookie_digest": "d", "redirect_uri": "u"}

    def work(session: Session) -> None:
        times: Any = {"created_at": now(session), "expires_at": now(session) + 60}
        session.add(Flow(id=flow_id, state_digest=flow_id, sealed_verifier=sealed, **facts, **times))

    await one.database.transaction(work)
    return flow_id


async def test_every_value_is_sealed_anew_and_the_old_key_is_refused_from_then_on(one: Process) -> None:
    owners = await one.store(5)
    flow_id = await sealed_value(one)
    old = one.sealer.current_key_id
    aside = one.sealer.seal(b"kept aside", owner="x", purpose="secret", version=1)
    started = await one.rotations.start("data", actor="clr_me")
    assert (started.state, started.total, started.old_key) == ("running", 6 + len(SYSTEM), old)
    row = await one.finish(started.id)
    assert (row.state, row.done, row.failed) == ("done", row.total, 0)
    assert row.total == 6 + len(SYSTEM), "the broker's own root keys are sealed too"
    assert await one.under(old) == 0
    await one.sealer.refresh(one.database)
    assert one.sealer.current_key_id == row.new_key != old
    with pytest.raises(SecretUnreadable):
        one.sealer.open(aside, owner="x", purpose="secret", version=1)
    for owner in owners:
        assert await one.vault.get(owner) == (1, {"value": owner})
    flow = await one.database.read(lambda session: session.get_one(Flow, flow_id))
    assert one.sealer.open(flow.sealed_verifier or b"", owner=flow_id, purpose="verifier", version=1) == b"verifier"
    (gone,) = await all_of(one.database, select(DataKey).where(DataKey.id == old))
    assert not gone.current
    assert gone.retired_at is not None
    events = ("started", "published", "acknowledged", "switched", "retired", "done")
    assert await actions(one.database) == [f"rotation.{name}" for name in events]
    fresh = await open_sealer(one.database, one.wrapping)
    assert fresh.key_ids == (row.new_key,), "a start knows nothing of the old one"


async def test_more_than_a_batch_is_rewritten_batch_by_batch(one: Process) -> None:
    await one.store(3)
    await many(one, 2 * BATCH)
    started = await one.rotations.start("data", actor="tests")
    row, batches = await one.until(started.id, "rewrite"), []
    while row.step == "rewrite":
        before, row = row.done, await one.rotations.advance(started.id)
        batches.append(row.done - before)
    assert max(batches) == BATCH
    assert (await one.finish(started.id)).done == 2 * BATCH + 3 + len(SYSTEM)


async def many(one: Process, count: int) -> None:
    """Store many secrets in one transaction."""
    rows = [f"connections/{new_id('con')}" for _ in range(count)]
    sealed = [one.sealer.seal(b'{"value":1}', owner=owner, purpose="secret", version=1) for owner in rows]
    key_id, facts = one.sealer.current_key_id, {"version": 1, "created_at": 1.0}
    values = [
        {"owner": owner, "sealed": each, "key_id": key_id, **facts} for owner, each in zip(rows, sealed, strict=True)
    ]
    await one.database.transaction(lambda session: session.execute(sa.insert(SealedSecret), values))


async def test_a_replica_that_lags_behind_cannot_write_under_the_old_key_after_the_floor(
    one: Process, other: Process
) -> None:
    old = other.sealer.current_key_id
    late = other.sealer.seal(b"{}", owner="connections/con_late", purpose="secret", version=1)
    assert (await one.rotate("data")).state == "done"
    assert other.sealer.current_key_id == old, "it has slept through all of it"

    def write(session: Session) -> None:
        session.add(SealedSecret(owner="connections/con_late", version=1, key_id=old, sealed=late, created_at=1.0))
        require_live_key(session, old)

    with pytest.raises(KeyRetired):
        await other.database.transaction(write)
    (owner,) = await other.store(1)
    assert await one.under(old) == 0, "its store learns of the new key by the refusal"
    assert await one.vault.get(owner) == (1, {"value": owner})


async def test_what_is_written_under_the_old_key_between_the_last_look_and_the_floor_is_rewritten(
    one: Process, other: Process
) -> None:
    old = other.sealer.current_key_id
    started = await one.rotations.start("data", actor="tests")
    assert (await one.until(started.id, "floor")).step == "floor"
    (owner,) = await other.store(1)
    assert await one.under(old) == 1, "the other one does not know of the new key yet"
    row = await one.rotations.advance(started.id)
    assert (row.state, row.step) == ("running", "rewrite")
    assert (await one.finish(started.id)).state == "done"
    assert await one.under(old) == 0
    assert await other.vault.get(owner) == (1, {"value": owner}), "and it can read what was rewritten"


async def test_secrets_are_handed_out_and_stored_at_every_step(one: Process, other: Process) -> None:
    owners = await one.store(4)
    started = await one.rotations.start("data", actor="tests")
    steps, row = [], started
    while row.state == "running":
        row = await one.rotations.advance(started.id)
        steps.append(row.step)
        for process in (one, other):
            owners += await process.store(1)
            for owner in owners:
                assert (await process.vault.get(owner))[1] == {"value": owner}, row.step
    assert set(steps) >= {"acknowledge", "switch", "rewrite", "floor"}
    assert await one.under(str(started.old_key)) == 0


async def test_an_update_that_meets_the_rewriting_wins_over_it(one: Process, other: Process) -> None:
    (owner,) = await one.store(1)

    async def update() -> None:
        if (await one.vault.get(owner))[0] == 1:
            await other.vault.put(owner, {"value": "newer"}, expected_version=1)

    hooked = await hooked_process(one, update, at="rewrite")
    assert (await hooked.rotate("data")).state == "done"
    assert await one.vault.get(owner) == (2, {"value": "newer"})
    assert await one.vault.get(owner, 1) == (1, {"value": owner})


async def test_between_the_last_look_and_the_floor_there_is_time_for_who_has_just_read(one: Process) -> None:
    keys = DataKeys(one.database, one.sealer, one.wrapping, settle_seconds=0.5)
    calm = replace(one, rotations=Rotations(one.database, one.audit, [keys]))
    started = await calm.rotations.start("data", actor="tests")
    row = await calm.until(started.id, "floor")
    looked_at = row.detail["clean_at"]
    async with asyncio.timeout(10):
        while row.state == "running":
            row = await calm.rotations.advance(started.id)
    assert row.ended_at is not None
    assert row.ended_at >= looked_at + 0.5


async def test_a_process_that_cannot_open_the_keys_calls_nothing_unreadable(
    one: Process, place: Path, database: Database, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    put_keys(elsewhere, entry("k1", 1))
    other = await open_process(database, elsewhere)
    put_keys(place, entry("k2", 2), entry("k1", 1))
    await one.wrapping.reload()
    started = await one.rotations.start("data", actor="tests")
    await one.until(started.id, "rewrite")
    with pytest.raises(SecretStoreUnavailable):
        await other.rotations.advance(started.id)
    row = await one.finish(started.id)
    assert (row.state, row.failed) == ("done", 0)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_the_floor_sees_who_committed_while_it_waited_whatever_the_server_begins_with(
    postgres_url: str, place: Path, level: str
) -> None:
    name = sa.make_url(postgres_url).database
    engine = create_async_engine(postgres_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'"))
    database, elsewhere = open_database(postgres_url), open_database(postgres_url)
    one, other = await open_process(database, place), await open_process(elsewhere, place)
    started = await one.rotations.start("data", actor="tests")
    await one.until(started.id, "floor")
    owner, old = "connections/con_late", str(started.old_key)
    late = other.sealer.seal(b'{"value":1}', owner=owner, purpose="secret", version=1)
    async with engine.connect() as writer:  # a transaction that takes its time to commit
        await writer.execute(sa.text("BEGIN"))
        await writer.execute(sa.text("SELECT 1 FROM data_keys WHERE id = :id FOR KEY SHARE"), {"id": old})
        values = {"owner": owner, "version": 1, "key_id": old, "sealed": late, "created_at": 1.0}
        await writer.execute(sa.insert(SealedSecret), values)
        floor = asyncio.create_task(one.rotations.advance(started.id))
        async with asyncio.timeout(10):
            while not await waits_for_a_lock(database):  # noqa: ASYNC110 - in the server
                await asyncio.sleep(0.01)
        await writer.execute(sa.text("COMMIT"))
    assert (await floor).step == "rewrite", "it counted the value that was committed while it waited"
    assert (await one.finish(started.id)).state == "done"
    assert await one.vault.get(owner) == (1, {"value": 1})
    for process in (one, other):
        await process.audit.aclose()
        await process.database.aclose()
    await engine.dispose()


async def waits_for_a_lock(database: Database) -> bool:
    query = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    return bool(await database.read(lambda session: session.execute(query).scalar_one()))


# --- after the floor ------------------------------------------------------------------------------------------------------


async def as_it_was(one: Process, owner: str) -> Callable[[Session], object]:
    """Return what puts an owner's row back as it is now, as a process writes it that asks no floor."""
    row = await one.database.read(lambda session: session.get_one(SealedSecret, (owner, 1)))
    values = {"sealed": row.sealed, "key_id": row.key_id}
    late = sa.update(SealedSecret).where(col(SealedSecret.owner) == owner).values(**values)
    return lambda session: session.execute(late) and None


async def a_day_passes(one: Process) -> None:
    earlier = sa.update(DataKey).values(retired_at=DataKey.retired_at - SHRED_AFTER_SECONDS)  # type: ignore[operator]
    await one.database.transaction(lambda session: session.execute(earlier) and None)


async def test_a_retired_key_is_shredded_a_day_later_and_not_before(one: Process) -> None:
    await one.store(2)
    old = (await one.rotate("data")).old_key
    assert await one.rotations.retire_due() == 0
    (kept,) = await all_of(one.database, select(DataKey).where(DataKey.id == old))
    assert kept.wrapped
    await a_day_passes(one)
    assert [await one.rotations.retire_due() for _ in range(2)] == [1, 0]
    (gone,) = await all_of(one.database, select(DataKey).where(DataKey.id == old))
    assert gone.wrapped == b""
    assert (await actions(one.database))[-1] == "key.shredded"


async def test_a_key_under_which_somebody_writes_after_the_floor_is_live_again(one: Process, other: Process) -> None:
    (owner,) = await one.store(1)
    write_late = await as_it_was(one, owner)
    old = (await one.rotate("data")).old_key
    await one.database.transaction(write_late)
    await one.sealer.refresh(one.database)
    with pytest.raises(SecretUnreadable):
        await one.vault.get(owner)
    with capture_logs() as logs:
        await one.rotations.retire_due()
    assert [(line["event"], line["log_level"], line["key"]) for line in logs] == [("key.revived", "critical", old)]
    assert (await actions(one.database))[-1] == "key.revived"
    for process in (one, other):
        assert await process.vault.get(owner) == (1, {"value": owner})
    states = {
        key.id: key.state for each in await one.rotations.report() if each.key_class == "data" for key in each.keys
    }
    assert states[str(old)] == "previous"
    assert (await one.rotate("data")).state == "done"
    assert await one.under(str(old)) == 0, "the next rotation takes it along"
    assert await one.vault.get(owner) == (1, {"value": owner})


async def test_a_value_whose_bytes_alone_came_back_revives_the_key_before_it_is_shredded(one: Process) -> None:
    (owner,) = await one.store(1)
    row = await one.database.read(lambda session: session.get_one(SealedSecret, (owner, 1)))
    await one.rotate("data")
    await only_bytes(one, owner, row.sealed)
    await a_day_passes(one)
    assert await one.rotations.retire_due() == 0
    assert await one.vault.get(owner) == (1, {"value": owner})


async def only_bytes(one: Process, owner: str, sealed: bytes) -> None:
    """Do what an operator does who restores the bytes from a backup, and leaves the column with the key's id as it is."""
    restore = sa.update(SealedSecret).where(col(SealedSecret.owner) == owner).values(sealed=sealed)
    await one.database.transaction(lambda session: session.execute(restore) and None)


async def test_the_floor_counts_by_the_bytes_and_they_are_rewritten(one: Process) -> None:
    (owner,) = await one.store(1)
    row = await one.database.read(lambda session: session.get_one(SealedSecret, (owner, 1)))
    started = await one.rotations.start("data", actor="tests")
    await one.until(started.id, "floor")
    await only_bytes(one, owner, row.sealed)
    assert (await one.rotations.advance(started.id)).step == "rewrite"
    assert (await one.finish(started.id)).state == "done"
    row = await one.database.read(lambda session: session.get_one(SealedSecret, (owner, 1)))
    assert Sealer.key_id_of(row.sealed) == row.key_id != started.old_key
    assert await one.vault.get(owner) == (1, {"value": owner})


async def test_what_was_abandoned_revives_no_key(one: Process) -> None:
    (lost,) = await one.store(1)
    await broken(one, lost)
    row = await one.rotate("data")
    await one.rotations.resume(row.id, actor="tests", abandon_unreadable=True)
    assert (await one.finish(row.id)).state == "done"
    assert await one.rotations.retire_due() == 0
    await a_day_passes(one)
    assert await one.rotations.retire_due() == 1
    assert "key.revived" not in await actions(one.database)


async def test_a_retired_key_that_does_not_open_here_is_kept_while_something_is_under_it(one: Process) -> None:
    (owner,) = await one.store(1)
    write_late = await as_it_was(one, owner)
    old = (await one.rotate("data")).old_key
    await one.database.transaction(write_late)
    damage = sa.update(DataKey).where(col(DataKey.id) == old).values(wrapped=b"\x01" + bytes(60))
    await one.database.transaction(lambda session: session.execute(damage) and None)
    await a_day_passes(one)
    with capture_logs() as logs:
        assert await one.rotations.retire_due() == 0
    assert [line["event"] for line in logs] == ["key.retired_unreadable"]
    (kept,) = await all_of(one.database, select(DataKey).where(DataKey.id == old))
    assert kept.wrapped
    assert kept.retired_at is not None, "a key that does not open would keep processes from starting"


# --- acknowledging --------------------------------------------------------------------------------------------------------


async def test_a_live_replica_without_the_new_key_is_waited_for_by_name(one: Process, other: Process) -> None:
    await other.replicas.beat()
    started = await one.rotations.start("data", actor="tests")
    row = await one.finish_or_wait(started.id)
    assert (row.state, row.step) == ("running", "acknowledge")
    (name,) = row.detail["waiting_for"]
    assert other.replicas.id in name
    assert one.sealer.current_key_id == row.old_key, "nobody seals with a key that not everybody has"
    await other.replicas.beat()
    row = await one.finish(started.id)
    assert row.state == "done"
    assert "waiting_for" not in row.detail


async def test_a_replica_that_is_dead_is_not_waited_for(one: Process, other: Process) -> None:
    await other.replicas.beat()
    dead = sa.update(Replica).values(seen_at=Replica.seen_at - 16)
    await one.database.transaction(lambda session: session.execute(dead))
    assert (await one.rotate("data")).state == "done"


# --- crashes, pauses, two at once -----------------------------------------------------------------------------------------


class Hooked(DataKeys):
    """Does something of its own between what a step does without a transaction and its record."""

    hook: Callable[[], Awaitable[object]]
    at: str

    async def act(self, rotation: Rotation) -> Record:
        record = await super().act(rotation)
        if rotation.step == self.at:
            await self.hook()
        return record


async def hooked_process(one: Process, hook: Callable[[], Awaitable[object]], *, at: str, **options: Any) -> Process:
    keys = Hooked(one.database, one.sealer, one.wrapping, settle_seconds=0.0)
    keys.hook, keys.at = hook, at
    return replace(one, rotations=Rotations(one.database, one.audit, [keys], **options))


async def test_a_pause_counts_before_the_batch_under_way_is_recorded(one: Process) -> None:
    await one.store(3)
    started = await one.rotations.start("data", actor="tests")

    async def pause() -> None:
        assert (await one.rotations.pause(started.id, actor="clr_me")).state == "paused"

    hooked = await hooked_process(one, pause, at="rewrite")
    row = await hooked.finish(started.id)
    assert (row.state, row.done) == ("paused", 0)
    for _ in range(3):
        assert (await one.rotations.advance(started.id)).state == "paused"
    assert await one.under(str(started.old_key)) == 3 + len(SYSTEM), "nothing changes any more"
    assert (await one.rotations.pause(started.id, actor="clr_me")).state == "paused"
    assert (await one.rotations.resume(started.id, actor="clr_me")).state == "running"
    row = await one.finish(started.id)
    assert (row.state, row.done) == ("done", 3 + len(SYSTEM))
    events = ("switched", "paused", "resumed", "retired", "done")
    assert (await actions(one.database))[-5:] == [f"rotation.{event}" for event in events]
    for change in (one.rotations.pause, one.rotations.resume):
        with pytest.raises(Conflict):
            await change(started.id, actor="clr_me")


async def test_who_lost_the_lease_records_nothing(one: Process, other: Process) -> None:
    await one.store(3)
    started = await one.rotations.start("data", actor="tests")
    await one.until(started.id, "rewrite")

    async def overtake() -> None:
        await asyncio.sleep(0.1)
        await other.sealer.refresh(other.database)
        assert (await other.rotations.advance(started.id)).done == 3

    slow = await hooked_process(one, overtake, at="rewrite", lease_seconds=0.05)
    assert (await slow.rotations.advance(started.id)).done == 3
    row = await one.finish(started.id)
    assert (row.state, row.done) == ("done", 3 + len(SYSTEM))


async def test_a_process_that_dies_in_a_batch_holds_it_up_until_its_lease_ends(one: Process, other: Process) -> None:
    await one.store(3)
    started = await one.rotations.start("data", actor="tests")
    await one.until(started.id, "rewrite")

    async def die() -> None:
        raise asyncio.CancelledError

    dying = await hooked_process(one, die, at="rewrite", lease_seconds=1.0)
    with pytest.raises(asyncio.CancelledError):
        await dying.rotations.advance(started.id)
    assert (await other.rotations.advance(started.id)).done == 0
    async with asyncio.timeout(10):
        while (row := await other.rotations.advance(started.id)).done == 0:  # noqa: ASYNC110 - far away
            await asyncio.sleep(0.05)
    assert row.done == 3
    assert (await other.finish(started.id)).state == "done"


@pytest.mark.parametrize("seed", range(3))
async def test_two_engines_and_writers_at_once_rewrite_each_value_once(one: Process, other: Process, seed: int) -> None:
    await many(one, 300)
    started = await one.rotations.start("data", actor="tests")
    known: list[str] = []
    chance = random.Random(seed)  # noqa: S311 - a test's dice

    async def drive(process: Process) -> None:
        while (await process.rotations.advance(started.id)).state == "running":  # noqa: ASYNC110 - far away
            await asyncio.sleep(chance.random() / 100)

    async def write(process: Process) -> None:
        while (await one.row(started.id)).state == "running":
            known.extend(await process.store(1))
            if chance.random() < 0.2:
                await process.vault.destroy(known.pop(chance.randrange(len(known))))
            if chance.random() < 0.1:
                await process.sealer.refresh(process.database)

    async with asyncio.timeout(60):
        await asyncio.gather(drive(one), drive(other), write(one), write(other))
    row = await one.row(started.id)
    assert row.state == "done"
    assert row.done >= 300 + len(SYSTEM)
    names = await actions(one.database)
    assert [names.count(f"rotation.{event}") for event in ("switched", "retired", "done")] == [1, 1, 1]
    assert await one.under(str(started.old_key)) == 0
    for owner in known:
        assert (await one.vault.get(owner))[1] == {"value": owner}


@pytest.mark.parametrize("seed", range(3))
async def test_no_interleaving_leaves_a_row_under_a_retired_key(one: Process, other: Process, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - a test's dice
    started = await one.rotations.start("data", actor="tests")
    known: dict[str, int] = {}

    async def put(process: Process) -> None:
        owner = chance.choice([*known, new_id("con")])
        known[owner] = await process.vault.put(owner, {"value": owner}, expected_version=known.get(owner, 0))

    async def destroy(process: Process) -> None:
        if known:
            owner = chance.choice([*known])
            await process.vault.destroy(owner)
            del known[owner]

    async def advance(process: Process) -> None:
        with contextlib.suppress(SecretStoreUnavailable):  # this process has not got the key yet
            await process.rotations.advance(started.id)

    async def beat(process: Process) -> None:
        await process.replicas.beat()

    retired = 0
    for _ in range(150):
        process = chance.choice([one, other])
        await chance.choice([put, put, put, destroy, advance, advance, beat])(process)
        if (await one.row(started.id)).state == "done":
            retired += 1
            started = await one.rotations.start("data", actor="tests")
        dead = await all_of(one.database, select(DataKey.id).where(col(DataKey.retired_at).is_not(None)))
        assert await one.database.read(_secrets_under(dead)) == 0, "a row under a retired key"
    assert retired > 0
    for owner, version in known.items():
        assert await one.vault.get(owner) == (version, {"value": owner})


def _secrets_under(key_ids: Sequence[str]) -> Callable[[Session], int]:
    query = select(sa.func.count()).select_from(SealedSecret).where(col(SealedSecret.key_id).in_(key_ids))
    return lambda session: session.exec(query).one()


# --- what does not open -----------------------------------------------------------------------------------------------------


async def broken(one: Process, owner: str) -> None:
    """Flip the last byte of an owner's secret."""

    def work(session: Session) -> None:
        row = session.get_one(SealedSecret, (owner, 1))
        row.sealed = row.sealed[:-1] + bytes([row.sealed[-1] ^ 1])
        session.add(row)

    await one.database.transaction(work)


async def test_a_value_that_does_not_open_stops_the_floor_and_is_named(one: Process) -> None:
    owners = await one.store(3)
    await broken(one, owners[1])
    row = await one.rotate("data")
    assert (row.state, row.failed) == ("failed", 1)
    assert row.detail["unreadable"] == [f"sealed_secrets.sealed {owners[1]}/1"]
    assert "1 under the old key" in row.detail["reason"]
    assert row.ended_at is not None
    assert await one.under(str(row.old_key)) == 1, "everything else was rewritten"
    with pytest.raises(Conflict) as refusal:
        await one.rotations.start("data", actor="tests")
    assert refusal.value.members == {"made_id": row.id}
    assert (await one.rotations.resume(row.id, actor="tests")).failed == 0
    assert (await one.finish(row.id)).state == "failed", "nothing was repaired"
    await one.vault.destroy(owners[1])
    await one.rotations.resume(row.id, actor="tests")
    row = await one.finish(row.id)
    assert (row.state, row.failed) == ("done", 0)
    assert (await one.vault.get(owners[0]))[1] == {"value": owners[0]}


async def test_only_what_does_not_open_is_abandoned(one: Process, other: Process) -> None:
    lost, kept = await one.store(2)
    await broken(one, lost)
    row = await one.rotate("data")
    await one.rotations.resume(row.id, actor="tests", abandon_unreadable=True)
    await one.until(row.id, "floor")
    (late,) = await other.store(1)
    row = await one.rotations.advance(row.id)
    assert row.step == "rewrite", "a value that opens came meanwhile"
    row = await one.finish(row.id)
    assert (row.state, row.detail["abandoned"]) == ("done", 1)
    for owner in (kept, late):
        assert (await one.vault.get(owner))[1] == {"value": owner}
    with pytest.raises(SecretUnreadable):
        await one.vault.get(lost)


@pytest.mark.parametrize(
    ("left", "rewritten", "unreadable", "following"),
    [
        (0, 5, 0, "floor"),
        (0, 0, 1, "floor"),
        (1, 5, 0, "rewrite"),
        (2, 1, 2, "rewrite"),
        (2, 0, 2, "failed"),
        (1, 0, 0, "rewrite"),
    ],
)
def test_what_follows_a_pass(left: int, rewritten: int, unreadable: int, following: str) -> None:
    assert after_pass(left=left, rewritten=rewritten, unreadable=unreadable) == following


# --- key-encryption keys --------------------------------------------------------------------------------------------------


async def test_every_data_key_is_wrapped_by_the_new_key_and_the_old_one_wraps_nothing_again(
    one: Process, place: Path
) -> None:
    (owner,) = await one.store(1)
    await one.rotate("data")
    put_keys(place, entry("k2", 2), entry("k1", 1))
    row = await one.rotate("encryption")
    assert (row.state, row.old_key, row.new_key, row.done) == ("done", "k1", "k2", 1)
    assert "backup" in row.detail["note"]
    checks = {one.key_id: one.retired_at for one in await all_of(one.database, select(KeyCheck))}
    assert checks["k2"] is None
    assert checks["k1"] is not None
    put_keys(place, entry("k2", 2))
    fresh = await open_process(one.database, place)
    assert (await fresh.vault.get(owner))[1] == {"value": owner}
    put_keys(place, entry("k1", 1), entry("k2", 2))
    assert await one.wrapping.reload()
    with pytest.raises(KeyRetired):
        await one.until((await one.rotations.start("data", actor="tests")).id, "switch")
    with pytest.raises(Conflict, match="was retired"):
        await one.rotations.start("encryption", actor="tests")


async def test_a_new_key_must_be_first_in_the_keyring(one: Process, place: Path) -> None:
    with pytest.raises(Conflict, match="put a new key in front"):
        await one.rotations.start("encryption", actor="tests")
    put_keys(place, entry("k1", 1), entry("k2", 2))
    with pytest.raises(Conflict, match="put a new key in front"):
        await one.rotations.start("encryption", actor="tests", dry_run=True)


async def test_a_process_that_has_not_got_the_new_key_does_no_step_and_is_waited_for(
    one: Process, place: Path, database: Database, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    put_keys(elsewhere, entry("k1", 1))
    other = await open_process(database, elsewhere)
    await other.replicas.beat()
    put_keys(place, entry("k2", 2), entry("k1", 1))
    planned = await one.rotations.start("encryption", actor="tests", dry_run=True)
    assert [other.replicas.id in name for name in planned.detail["waiting_for"]] == [True]
    started = await one.rotations.start("encryption", actor="tests")
    with pytest.raises(SecretStoreUnavailable):
        await other.rotations.advance(started.id)
    assert "newest" in (await one.row(started.id)).detail["trouble"]
    assert (await one.finish_or_wait(started.id)).step == "acknowledge"
    put_keys(elsewhere, entry("k2", 2), entry("k1", 1))
    await other.replicas.beat()
    row = await other.finish(started.id)
    assert row.state == "done"
    assert not {"trouble", "waiting_for"} & row.detail.keys()


async def test_a_data_key_that_was_wrapped_by_the_old_key_before_the_floor_is_wrapped_anew(
    one: Process, place: Path, database: Database, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    put_keys(elsewhere, entry("k1", 1), entry("k2", 2))
    other = await open_process(database, elsewhere)
    put_keys(place, entry("k2", 2), entry("k1", 1))
    started = await one.rotations.start("encryption", actor="tests")
    await one.until(started.id, "floor")
    beside = await other.rotations.start("data", actor="tests")
    await other.until(beside.id, "switch")
    row = await one.rotations.advance(started.id)
    assert (row.state, row.step) == ("running", "rewrite")
    assert (await one.finish(started.id)).done == 2
    assert {key.wrapped_by for key in await all_of(database, select(DataKey))} == {"k2"}
    states = {key.id: key.state for key in (await one.rotations.report())[0].keys}
    assert states == {"k2": "current", "k1": "retired"}


async def test_a_data_key_that_does_not_open_is_named_and_cannot_be_abandoned(one: Process, place: Path) -> None:
    (owner,) = await one.store(1)
    old = one.sealer.current_key_id
    damage = sa.update(DataKey).values(wrapped=b"\x01" + bytes(60))
    await one.database.transaction(lambda session: session.execute(damage))
    put_keys(place, entry("k2", 2), entry("k1", 1))
    row = await one.rotate("encryption")
    assert (row.state, row.detail["unreadable"]) == ("failed", [old])
    with pytest.raises(Conflict):
        await one.rotations.resume(row.id, actor="tests", abandon_unreadable=True)
    assert (await one.rotate("data")).state == "done", "this process still has it in memory"
    await one.rotations.resume(row.id, actor="tests")
    assert (await one.finish(row.id)).state == "done"
    assert (await one.vault.get(owner))[1] == {"value": owner}


class Elsewhere(Keyring):
    """Keys that are made by their store, as Transit's are."""

    __slots__ = ("made",)

    async def rotate(self) -> None:
        """Make a new newest key."""
        number = len(self.ids) + 1
        (fresh,) = parse_keys(entry(f"v{number}", number), setting="test")
        self._keys = {fresh.id: fresh, **self._keys}


async def test_where_keys_are_made_elsewhere_the_rotation_has_the_new_one_made(database: Database) -> None:
    wrapping = Elsewhere(parse_keys(entry("v1", 1), setting="test"))
    sealer = await open_sealer(database, wrapping)
    keys = EncryptionKeys(database, wrapping, wrapping.rotate)
    audit = Audit(database, bytes(32), sinks=("database",), checkpoints=())
    rotations = Rotations(database, audit, [keys])
    planned = await rotations.start("encryption", actor="tests", dry_run=True)
    assert (planned.old_key, planned.new_key, wrapping.ids) == ("v1", None, ("v1",))
    row = await rotations.start("encryption", actor="tests")
    while row.state == "running":
        row = await rotations.advance(row.id)
    assert (row.state, row.old_key, row.new_key) == ("done", "v1", "v2")
    assert (await open_sealer(database, wrapping)).key_ids == sealer.key_ids
    await audit.aclose()


# --- root keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", SYSTEM)
async def test_a_root_key_is_next_then_current_and_the_old_one_stays_for_as_long_as_it_is_needed(
    one: Process, other: Process, purpose: str
) -> None:
    mine, theirs = one.system[purpose], other.system[purpose]
    old = mine.current
    await other.replicas.beat()
    started = await one.rotations.start(purpose, actor="tests")
    row = await one.finish_or_wait(started.id)
    assert row.step == "acknowledge"
    await other.replicas.beat()
    assert theirs.current.id == old.id
    assert [key.state for key in theirs.all] == ["next", "current"]
    row = await one.finish(started.id)
    assert row.state == "done"
    await mine.refresh()
    assert theirs.get(mine.current.id) is not None, "who has not heard of the switch knows the new key all the same"
    assert (mine.current.id, [key.state for key in mine.all]) == (row.new_key, ["current", "previous"])
    (kept,) = [key for key in mine.all if key.state == "previous"]
    assert (kept.id, kept.root) == (old.id, old.root)
    (previous,) = await all_of(one.database, select(SystemKey).where(SystemKey.id == old.id))
    life = LIVES[purpose]
    if life is None:
        assert previous.retire_at is None
    else:
        at = await one.database.read(now)
        assert previous.retire_at == pytest.approx(at + life + SKEW_SECONDS, abs=10)
    assert (row.detail["retire_at"] is None) == (life is None)


async def test_a_previous_root_key_is_destroyed_when_its_time_has_come_and_not_before(one: Process) -> None:
    old = {purpose: one.system[purpose].current.id for purpose in SYSTEM}
    for purpose in SYSTEM:
        await one.rotate(purpose)
    assert await one.rotations.retire_due() == 0
    shift = sa.update(SystemKey).where(col(SystemKey.id) == old["session"]).values(retire_at=1.0)
    await one.database.transaction(lambda session: session.execute(shift))
    assert await one.rotations.retire_due() == 1
    assert await one.rotations.retire_due() == 0
    (gone,) = await all_of(one.database, select(SystemKey).where(SystemKey.id == old["session"]))
    assert (gone.state, gone.sealed_key) == ("retired", b"")
    for keys in one.system.values():
        await keys.refresh()
    assert one.system["session"].get(old["session"]) is None
    assert one.system["audit"].get(old["audit"]) is not None
    assert (await actions(one.database))[-1] == "key.retired"


async def test_a_root_key_is_made_after_the_data_keys_were_rotated(one: Process, other: Process) -> None:
    assert (await one.rotate("data")).state == "done"
    old = other.sealer.current_key_id
    assert (await other.rotate("webhook-signing")).state == "done"
    assert await one.under(old) == 0
    await one.system["webhook-signing"].refresh()
    assert one.system["webhook-signing"].current.state == "current"


@pytest.mark.parametrize(("key_class", "table"), [("session", SystemKey), ("data", DataKey)])
async def test_a_published_key_that_vanishes_switches_nothing(one: Process, key_class: str, table: Any) -> None:
    started = await one.rotations.start(key_class, actor="tests")
    row = await one.until(started.id, "switch")
    taken = sa.delete(table).where(col(table.id) == row.new_key)
    await one.database.transaction(lambda session: session.execute(taken))
    with pytest.raises(InternalError):
        await one.rotations.advance(started.id)
    assert (await one.row(started.id)).step == "switch"
    await one.system["session"].refresh()
    await one.sealer.refresh(one.database)
    assert one.system["session"].current.state == "current"
    assert await one.store(1)


async def test_a_defect_in_a_step_stops_neither_the_worker_nor_other_rotations(one: Process) -> None:
    async def fail() -> None:
        raise ValueError

    hooked = await hooked_process(one, fail, at="publish")
    started = await hooked.rotations.start("data", actor="tests")
    with capture_logs() as logs:
        await hooked.rotations.move()
    assert [line["event"] for line in logs] == ["worker.defect"]
    row = await one.row(started.id)
    assert (row.state, row.lease_owner, row.detail["trouble"]) == ("running", None, "internal_error")


async def test_what_is_no_class_of_keys_is_left_to_its_own_runner(one: Process) -> None:
    times: Any = {"created_at": 1.0, "updated_at": 1.0}
    canary = Rotation(id="rot_canary", key_class="client-secret", step="canary", **times)
    await one.database.transaction(lambda session: session.add(canary))
    await one.rotations.move()
    row = await one.rotations.advance("rot_canary")
    assert (row.state, row.step, row.lease_owner) == ("running", "canary", None)
    over = sa.update(Rotation).values(state="failed")
    await one.database.transaction(lambda session: session.execute(over))
    with pytest.raises(Conflict):
        await one.rotations.resume("rot_canary", actor="tests")


# --- starting and reading -----------------------------------------------------------------------------------------------------


async def test_a_dry_run_says_what_would_happen_and_changes_nothing(one: Process) -> None:
    await one.store(2)
    for key_class in ("data", *SYSTEM):
        row = await one.rotations.start(key_class, actor="tests", dry_run=True)
        assert (row.id, row.state) == ("", "planned")
        assert row.total == (2 + len(SYSTEM) if key_class == "data" else 0)
    assert await all_of(one.database, select(Rotation)) == []
    assert await actions(one.database) == []
    assert len(await all_of(one.database, select(DataKey))) == 1
    assert len(await all_of(one.database, select(SystemKey))) == len(SYSTEM)


async def test_of_starts_at_once_one_begins_and_classes_do_not_hold_each_other_up(one: Process, other: Process) -> None:
    starts = [process.rotations.start("data", actor="tests") for process in (one, other) for _ in range(5)]
    results = await asyncio.gather(*starts, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Conflict"] * 9 + ["Rotation"]
    assert (await one.rotate("session")).state == "done"
    with pytest.raises(NotFound):
        await one.rotations.start("nothing", actor="tests")


async def test_the_worker_moves_what_is_running_and_a_trouble_of_one_stops_no_other(one: Process, place: Path) -> None:
    put_keys(place, entry("k2", 2), entry("k1", 1))
    await one.rotations.start("encryption", actor="tests")
    put_keys(place, entry("k1", 1))
    await one.wrapping.reload()
    await many(one, 3 * BATCH)
    await one.rotations.start("data", actor="tests")
    async with asyncio.timeout(30):
        while (await one.rotations.active("data")) is not None:
            await one.rotations.move()
    stuck = await one.rotations.active("encryption")
    assert stuck is not None
    assert (stuck.state, stuck.step) == ("running", "publish")
    assert "newest" in stuck.detail["trouble"]


async def test_rotations_are_listed_newest_first(one: Process) -> None:
    made = [(await one.rotate(purpose)).id for purpose in SYSTEM]
    first = await one.rotations.page(limit=2)
    rest = await one.rotations.page(limit=10, before=(first[-1].created_at, first[-1].id))
    assert [row.id for row in (*first, *rest)] == made[::-1]
    with pytest.raises(NotFound):
        await one.rotations.get("rot_none")
    with pytest.raises(NotFound):
        await one.rotations.advance("rot_none")


async def test_the_report_says_what_is_under_each_key(one: Process) -> None:
    await one.store(3)
    started = await one.rotations.start("data", actor="tests")
    await one.until(started.id, "rewrite")
    report = {each.key_class: each for each in await one.rotations.report()}
    assert list(report) == ["encryption", "data", *SYSTEM]
    assert report["data"].rotation_id == started.id
    states = {key.state: sum((key.places or {}).values()) for key in report["data"].keys}
    assert states == {"current": 0, "previous": 3 + len(SYSTEM)}
    (wrapping,) = report["encryption"].keys
    assert (wrapping.id, wrapping.state, wrapping.places) == ("k1", "current", {"data_keys.wrapped": 2})
    await one.finish(started.id)
    report = {each.key_class: each for each in await one.rotations.report()}
    assert report["data"].rotation_id is None
    assert {key.state: key.places and sum(key.places.values()) for key in report["data"].keys} == {
        "current": 3 + len(SYSTEM),
        "retired": None,
    }
    assert [key.state for key in report["session"].keys] == ["current"]
