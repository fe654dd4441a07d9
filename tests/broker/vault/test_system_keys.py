"""Root keys of the broker: processes agree on one, a next one waits, one that does not open harms no other."""

from __future__ import annotations

import asyncio
import base64

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select
from structlog.testing import capture_logs

from broker.database import Database
from broker.errors import SecretStoreUnavailable
from broker.models import DataKey, SystemKey
from broker.vault.floor import KeyRetired
from broker.vault.keyring import Keyring, Sealer, open_sealer, parse_keys, wrap_data_key
from broker.vault.system_keys import SystemKeys, insert_key

KEK = "kek-1:" + base64.b64encode(bytes(range(32))).decode()
ROWS: sa.Table = SystemKey.__table__  # type: ignore[attr-defined]


def a_keyring() -> Keyring:
    return Keyring(parse_keys(KEK, setting="BROKER_KEYRING"))


@pytest.fixture
async def sealer(database: Database) -> Sealer:
    return await open_sealer(database, a_keyring())


async def loaded(database: Database, sealer: Sealer, purpose: str = "session") -> SystemKeys:
    keys = SystemKeys(database, sealer, purpose)
    await keys.load()
    return keys


async def added(database: Database, keys: SystemKeys, state: str) -> str:
    row = keys.new_row(state)
    await database.transaction(lambda session: insert_key(session, row))
    return row.id


async def moved(database: Database, key_id: str, state: str) -> None:
    change = sa.update(ROWS).where(ROWS.c.id == key_id).values(state=state)
    await database.transaction(lambda session: session.execute(change) and None)


async def rows(database: Database) -> dict[str, SystemKey]:
    return await database.read(lambda session: {row.id: row for row in session.exec(select(SystemKey))})


async def test_starts_at_once_end_with_one_key_a_purpose(database: Database, sealer: Sealer) -> None:
    found = await asyncio.gather(*(loaded(database, sealer, purpose) for purpose in ("session", "audit") * 4))
    assert {(keys.purpose, keys.current.id) for keys in found} == {
        (row.purpose, row.id) for row in (await rows(database)).values()
    }
    assert len(await rows(database)) == 2
    roots = {keys.current.root for keys in found}
    assert len(roots) == 2
    assert all(root.hex() not in repr(keys.current) and len(root) == 32 for keys in found for root in roots)


async def test_keys_come_by_state_next_current_previous_and_retired_ones_are_gone(
    database: Database, sealer: Sealer
) -> None:
    keys = await loaded(database, sealer)
    first = keys.current.id
    second = await added(database, keys, "next")
    await keys.refresh()
    assert [(key.id, key.state) for key in keys.all] == [(second, "next"), (first, "current")]
    made = await rows(database)
    assert made[first].activated_at == made[first].created_at
    assert made[second].activated_at is None
    await moved(database, first, "previous")
    await moved(database, second, "current")
    await keys.refresh()
    assert (keys.current.id, [key.state for key in keys.all]) == (second, ["current", "previous"])
    await moved(database, first, "retired")
    await keys.refresh()
    assert keys.get(first) is None
    assert [key.id for key in keys.all] == [second]


async def test_a_second_current_key_is_refused(database: Database, sealer: Sealer) -> None:
    keys = await loaded(database, sealer)
    with pytest.raises(IntegrityError):
        await added(database, keys, "current")


async def test_a_key_that_does_not_open_is_left_out_and_the_others_serve(database: Database, sealer: Sealer) -> None:
    keys = await loaded(database, sealer)
    first, second = keys.current.id, await added(database, keys, "previous")
    stolen = (await rows(database))[first].sealed_key
    change = sa.update(ROWS).where(ROWS.c.id == second).values(sealed_key=stolen)
    await database.transaction(lambda session: session.execute(change) and None)
    with capture_logs() as logs:
        await keys.refresh()
        await keys.refresh()
    assert [(line["event"], line["key"]) for line in logs] == [("system_key.unreadable", second)], "once"
    assert [key.id for key in keys.all] == [first]
    change = sa.update(ROWS).where(ROWS.c.id == first).values(sealed_key=b"noise")
    await database.transaction(lambda session: session.execute(change) and None)
    keys = await loaded(database, sealer)
    assert keys.all == ()
    with pytest.raises(SecretStoreUnavailable, match="session key does not open"):
        _ = keys.current


async def test_a_key_that_is_known_stays_when_it_does_not_open_any_more_in_the_state_of_its_row(
    database: Database, sealer: Sealer
) -> None:
    keys = await loaded(database, sealer)
    known = keys.current
    change = sa.update(ROWS).where(ROWS.c.id == known.id).values(sealed_key=b"noise")
    await database.transaction(lambda session: session.execute(change) and None)
    await keys.refresh()
    assert (keys.current.id, keys.current.root) == (known.id, known.root)
    await moved(database, known.id, "previous")
    await keys.refresh()
    assert [(key.id, key.state) for key in keys.all] == [(known.id, "previous")]
    await moved(database, known.id, "retired")
    await keys.refresh()
    assert keys.all == ()


def succession(session: Session) -> None:
    """Retire every data key and let a new one take their place."""
    old = sa.update(DataKey.__table__).values(current=False, retired_at=1.0)  # type: ignore[attr-defined]
    session.execute(old)
    wrapped = wrap_data_key(a_keyring().newest, "dk_new", b"n" * 32)
    session.add(DataKey(id="dk_new", wrapped_by="kek-1", wrapped=wrapped, current=True, created_at=4e9))


async def test_a_root_key_sealed_under_a_data_key_that_was_retired_meanwhile_is_not_written(
    database: Database, sealer: Sealer
) -> None:
    keys = await loaded(database, sealer)
    row = keys.new_row("next")
    await database.transaction(succession)
    with pytest.raises(KeyRetired):
        await database.transaction(lambda session: insert_key(session, row))
    assert row.id not in await rows(database)


async def test_a_root_key_under_a_data_key_of_another_process_opens_after_a_refresh(
    database: Database, sealer: Sealer
) -> None:
    here = await loaded(database, sealer)
    wrapped = wrap_data_key(a_keyring().newest, "dk_new", b"n" * 32)
    new = DataKey(id="dk_new", wrapped_by="kek-1", wrapped=wrapped, current=True, created_at=4e9)
    await database.transaction(lambda session: session.add(new))
    there = SystemKeys(database, await open_sealer(database, a_keyring()), "session")
    made = await added(database, there, "next")
    assert Sealer.key_id_of((await rows(database))[made].sealed_key) == "dk_new"
    await here.refresh()
    assert here.get(made) is not None
