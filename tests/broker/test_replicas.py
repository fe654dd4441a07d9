"""A process says that it is alive and which keys it has, and what it says is true."""

from __future__ import annotations

import asyncio
import base64
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlmodel import Session, select
from structlog.testing import capture_logs

from broker.database import Database, now, open_database, opened
from broker.errors import DatabaseUnavailable
from broker.models import DataKey, KeyCheck, Replica, Revocation, new_id
from broker.replicas import DATA, ENCRYPTION, LIVE_SECONDS, Replicas, lacking, live
from broker.settings import Settings
from broker.vault.keyring import Keyring, Sealer, load_keyring, new_data_key, open_sealer, parse_keys
from broker.vault.system_keys import SystemKeys, insert_key
from tests.commands import PATIENCE_SECONDS, free_port, running


def entry(key_id: str, seed: int) -> str:
    return f"{key_id}:{base64.b64encode(bytes((seed + n) % 256 for n in range(32))).decode()}"


def a_keyring(*entries: str) -> Keyring:
    return Keyring(parse_keys(",".join(entries or (entry("k1", 1),)), setting="BROKER_KEYRING"))


class World:
    """A process's keys, and a replica over them."""

    def __init__(self, database: Database, wrapping: Keyring, sealer: Sealer, *purposes: str) -> None:
        self.database = database
        self.wrapping = wrapping
        self.sealer = sealer
        self.system_keys = [SystemKeys(database, sealer, purpose) for purpose in purposes]
        self.hooked: list[str] = []
        self.seconds = 100.0
        self.replica = Replicas(
            database,
            sealer,
            wrapping,
            self.system_keys,
            on_revocation=(lambda: self.hooked.append("cleared"),),
            monotonic=lambda: self.seconds,
        )


async def a_world(database: Database, *purposes: str, keyring: Keyring | None = None) -> World:
    wrapping = keyring or a_keyring()
    world = World(database, wrapping, await open_sealer(database, wrapping), *purposes)
    for keys in world.system_keys:
        await keys.load()
    return world


async def rows(database: Database) -> Sequence[Replica]:
    return await database.read(lambda session: session.exec(select(Replica)).all())


async def living(database: Database) -> list[str]:
    return [one.id for one in await database.read(live)]


async def those_lacking(database: Database, key_class: str, key_id: str) -> list[str]:
    return [one.id for one in await database.read(lambda session: lacking(session, key_class, key_id))]


async def test_a_process_tells_all_its_keys_before_it_serves(database: Database) -> None:
    world = await a_world(database, "session", "audit")
    async with world.replica.beating("serve"):
        [row] = await rows(database)
    assert (row.id, row.kind, row.version) == (world.replica.id, "serve", "0.1.0")
    assert row.host
    assert row.started_at == row.seen_at
    assert row.keys == {
        "encryption": ["k1"],
        "data": [world.sealer.current_key_id],
        "session": [world.system_keys[0].current.id],
        "audit": [world.system_keys[1].current.id],
    }


async def test_an_orderly_end_takes_the_row_away(database: Database) -> None:
    world = await a_world(database)
    async with world.replica.beating("worker"):
        assert await living(database) == [world.replica.id]
    assert await rows(database) == []


async def test_a_process_that_was_not_seen_for_15_seconds_is_not_waited_for(database: Database) -> None:
    world = await a_world(database)
    await world.replica.beat()
    for age_seconds, counted in ((LIVE_SECONDS - 5, True), (LIVE_SECONDS + 1, False)):
        await database.transaction(lambda session, age=age_seconds: _aged(session, age))  # type: ignore[misc]
        assert bool(await living(database)) is counted
        assert bool(await those_lacking(database, DATA, "dk_other")) is counted
    await world.replica.beat()
    assert await living(database) == [world.replica.id]


def _aged(session: Session, seconds: float) -> None:
    session.execute(sa.update(Replica).values(seen_at=now(session) - seconds))


async def test_rows_of_processes_that_died_are_forgotten_after_a_day(database: Database) -> None:
    dead, world = await a_world(database), await a_world(database)
    await dead.replica.beat()
    await database.transaction(lambda session: _aged(session, 80_000))
    await world.replica.beat()
    assert len(await rows(database)) == 2
    await database.transaction(lambda session: _aged(session, 90_000))
    await world.replica.beat()
    assert [row.id for row in await rows(database)] == [world.replica.id]


async def test_a_process_whose_row_somebody_deleted_is_there_again_with_the_next_beat(database: Database) -> None:
    world = await a_world(database)
    await world.replica.beat()
    [before] = await rows(database)
    await database.transaction(lambda session: session.execute(sa.delete(Replica)) and None)
    await world.replica.beat()
    [after] = await rows(database)
    assert (after.id, after.started_at) == (before.id, before.started_at)


# --- the word that a key is here ---------------------------------------------------------------------------------------


async def test_a_new_data_key_is_lacking_until_each_process_has_opened_it(database: Database) -> None:
    first, second = await a_world(database), await a_world(database)
    await first.replica.beat()
    await second.replica.beat()
    row, _ = await new_data_key(first.wrapping)
    row.created_at = 1.0
    await database.transaction(lambda session: session.add(row))
    assert set(await those_lacking(database, DATA, row.id)) == {first.replica.id, second.replica.id}
    await second.replica.beat()
    assert await those_lacking(database, DATA, row.id) == [first.replica.id]
    assert row.id in second.sealer.key_ids
    await first.replica.beat()
    assert await those_lacking(database, DATA, row.id) == []


async def test_a_data_key_that_does_not_open_here_is_never_said_to_be(database: Database) -> None:
    world = await a_world(database)
    row, _ = await new_data_key(a_keyring(entry("k9", 9)))
    row.created_at = 1.0
    await database.transaction(lambda session: session.add(row))
    await world.replica.beat()
    assert await those_lacking(database, DATA, row.id) == [world.replica.id]


async def test_a_key_added_to_the_keyring_file_is_told_with_the_next_beat(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(entry("k1", 1))
    keyring = load_keyring(Settings(env="development", keyring_file=path))
    world = await a_world(database, keyring=keyring)
    await world.replica.beat()
    assert await those_lacking(database, ENCRYPTION, "k2") == [world.replica.id]
    path.write_text(f"{entry('k2', 2)}\n{entry('k1', 1)}")
    await world.replica.beat()
    assert await those_lacking(database, ENCRYPTION, "k2") == []


async def test_a_key_with_other_bytes_under_the_same_id_does_not_count_as_that_key(database: Database) -> None:
    first = await a_world(database, keyring=a_keyring(entry("k1", 1)))
    other = await a_world(database, keyring=a_keyring(entry("k2", 99), entry("k1", 1)))
    true_key = a_keyring(entry("k2", 2))

    def publish(session: Session) -> None:
        session.merge(KeyCheck(key_id="k2", check_value=str(true_key.check_value("k2")), created_at=now(session)))

    await database.transaction(publish)
    for world in (first, other):
        await world.replica.beat()
    assert set(await those_lacking(database, ENCRYPTION, "k2")) == {first.replica.id, other.replica.id}
    assert await those_lacking(database, ENCRYPTION, "k1") == []


async def test_a_root_key_is_lacking_until_it_was_read(database: Database) -> None:
    world, other = await a_world(database, "session"), await a_world(database)
    await world.replica.beat()
    await other.replica.beat()
    row = world.system_keys[0].new_row("next")
    await database.transaction(lambda session: insert_key(session, row))
    assert set(await those_lacking(database, "session", row.id)) == {world.replica.id, other.replica.id}
    later = SystemKeys(database, other.sealer, "session")
    other.replica.watch(later)
    await world.replica.beat()
    await other.replica.beat()
    assert await those_lacking(database, "session", row.id) == []
    assert later.get(row.id) is not None


async def test_a_broken_keyring_file_takes_no_key_away_and_the_process_stays_alive(
    database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    path.write_text(entry("k1", 1))
    keyring = load_keyring(Settings(env="development", keyring_file=path))
    world = await a_world(database, keyring=keyring)
    path.write_text(f"{entry('k1', 3)}")
    with capture_logs() as lines:
        await world.replica.beat()
    [row] = await rows(database)
    assert row.keys["encryption"] == ["k1"]
    [line] = [line for line in lines if line["event"] == "replica.keys_not_read"]
    assert "k1 changed" in line["why"]
    assert entry("k1", 3).partition(":")[2] not in str(lines)


# --- failing and coming back --------------------------------------------------------------------------------------------


async def test_a_start_without_a_database_is_refused(sqlite_url: str) -> None:
    database = open_database(sqlite_url)
    world = await a_world(database)
    await database.aclose()
    with pytest.raises(DatabaseUnavailable):
        async with world.replica.beating("serve"):
            pytest.fail("it began to serve")


async def test_beats_go_on_after_one_that_failed(database: Database) -> None:
    world = await a_world(database)
    with capture_logs() as lines:
        async with world.replica.beating("serve"):
            await database.transaction(
                lambda session: session.execute(sa.text("ALTER TABLE replicas RENAME TO away")) and None
            )
            async with asyncio.timeout(10):
                while not any(line["event"] == "replica.beat_failed" for line in lines):  # noqa: ASYNC110 - a list has no event
                    await asyncio.sleep(0.05)
            await database.transaction(
                lambda session: session.execute(sa.text("ALTER TABLE away RENAME TO replicas")) and None
            )
            await database.transaction(lambda session: _aged(session, 60))
            async with asyncio.timeout(10):
                while not await living(database):  # noqa: ASYNC110 - what is waited for is far away
                    await asyncio.sleep(0.05)
    assert await rows(database) == []


# --- revocations --------------------------------------------------------------------------------------------------------


async def a_revocation(database: Database, *, age_seconds: float = 0.0) -> None:
    def work(session: Session) -> None:
        at = now(session) - age_seconds
        session.add(Revocation(id=new_id("rev"), action="freeze", reason="test", created_at=at))

    await database.transaction(work)


async def test_a_new_revocation_clears_what_is_kept_once(database: Database) -> None:
    world = await a_world(database)
    await a_revocation(database)
    await world.replica.beat()
    assert world.hooked == [], "there was nothing to clear before the start"
    await a_revocation(database)
    await world.replica.beat()
    assert world.hooked == ["cleared"]
    await world.replica.beat()
    assert world.hooked == ["cleared"]


async def test_a_revocation_that_was_committed_after_a_later_one_is_noticed(database: Database) -> None:
    world = await a_world(database)
    await world.replica.beat()
    await a_revocation(database)
    await world.replica.beat()
    await a_revocation(database, age_seconds=30)
    await world.replica.beat()
    assert world.hooked == ["cleared", "cleared"]


async def test_a_process_that_was_away_clears_what_it_kept(database: Database) -> None:
    world = await a_world(database)
    await world.replica.beat()
    world.seconds += LIVE_SECONDS - 1
    await world.replica.beat()
    assert world.hooked == []
    world.seconds += LIVE_SECONDS + 1
    await world.replica.beat()
    assert world.hooked == ["cleared"]


async def test_a_retired_data_key_is_told_no_more(database: Database) -> None:
    world = await a_world(database)
    row, _ = await new_data_key(world.wrapping)
    row.created_at = 1.0
    await database.transaction(lambda session: session.add(row))
    await world.replica.beat()
    assert row.id in world.replica.keys["data"]
    gone = sa.update(DataKey).where(DataKey.id == row.id).values(retired_at=2.0, wrapped=b"")  # type: ignore[arg-type]
    await database.transaction(lambda session: session.execute(gone) and None)
    await world.replica.beat()
    assert row.id not in world.replica.keys["data"]


# --- as processes of their own ------------------------------------------------------------------------------------------


async def check_running(database: Database, *command: str, place: Path, kinds: list[str]) -> None:
    """Run a command until it has told of itself, stop it in an orderly way, and see that it has said goodbye."""
    variables = {"BROKER_ENV": "development", "BROKER_DATA_DIR": str(place)}
    with running(sys.executable, "-m", "broker", *command, place=place, variables=variables) as process:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(found := await rows(database)) < len(kinds):  # noqa: ASYNC110 - another process's
                await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = await asyncio.to_thread(process.communicate, timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
    assert [row.kind for row in found] == kinds
    assert all(row.keys["data"] and row.keys["encryption"] and row.keys["session"] for row in found)
    assert await rows(database) == []


async def test_every_process_of_a_server_is_one_and_a_worker_is_one(sqlite_url: str, tmp_path: Path) -> None:
    async with opened(sqlite_url) as database:
        serve = ("serve", "--port", str(free_port()), "--workers", "2", "--no-worker")
        await check_running(database, *serve, place=tmp_path, kinds=["serve", "serve"])
        await check_running(database, "worker", place=tmp_path, kinds=["worker"])
