"""Every sealed column is on the list, what is on it can be counted, checked and sealed anew, and damage is named."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import Session, SQLModel

from broker.database import Database
from broker.models import Connection, DataKey, DeviceFlow, Flow, RefreshJournal, SealedSecret, SystemKey, WebhookEvent
from broker.vault.floor import KeyRetired
from broker.vault.keyring import Keyring, Sealer, open_sealer, parse_keys, wrap_data_key
from broker.vault.scan import find_misnamed, find_unreadable
from broker.vault.sealed_places import PLACES, Place, Row

KEK = "kek-1:" + base64.b64encode(bytes(range(32))).decode()
BY_NAME = {place.name: place for place in PLACES}
NAMES = sorted(BY_NAME)


def a_keyring() -> Keyring:
    return Keyring(parse_keys(KEK, setting="BROKER_KEYRING"))


@pytest.fixture
async def sealer(database: Database) -> Sealer:
    return await open_sealer(database, a_keyring())


def test_every_sealed_column_is_on_the_list() -> None:
    columns = [column for table in SQLModel.metadata.tables.values() for column in table.columns]
    sealed = {f"{one.table.name}.{one.name}" for one in columns if one.name.startswith("sealed")}
    assert sealed == set(BY_NAME)
    assert all(isinstance(BY_NAME[name].table.c[BY_NAME[name].column].type, sa.LargeBinary) for name in sealed)
    binary = {f"{one.table.name}.{one.name}" for one in columns if isinstance(one.type, sa.LargeBinary)}
    assert binary - sealed == {
        "data_keys.wrapped",
        "webhook_events.body",
    }  # what a provider posted, unless it is sealed


def rows_of(sealer: Sealer, n: int) -> list[SQLModel]:
    """Return a row for each table, with a sealed value in each place, as those seal it who write there."""

    def seal(owner: str, purpose: str, version: int = 1) -> bytes:
        return sealer.seal(f"plain {owner}".encode(), owner=owner, purpose=purpose, version=version)

    common: dict[str, Any] = {"created_at": 1.0, "expires_at": 1.0}
    flow = Flow(id=f"flo_{n}", integration="i", state_digest=f"s{n}", cookie_name="", cookie_digest="", **common)
    flow.redirect_uri = ""
    flow.sealed_verifier, flow.sealed_outcome = seal(flow.id, "verifier"), seal(flow.id, "outcome")
    device = DeviceFlow(id=f"dev_{n}", flow_id="f", integration="i", subject="s", status="pending", **common)
    device.user_code = device.verification_uri = ""
    device.interval_seconds, device.poll_at = 1.0, 1.0
    device.sealed_device_code = seal(device.id, "device")
    answer = seal(f"connections/con_{n}", "journal", 7 + n)
    journal = RefreshJournal(connection_id=f"con_{n}", fence=7 + n, token_digest="", sealed_answer=answer)
    journal.received_at = 1.0
    root = SystemKey(id=f"key_{n}", purpose=f"p{n}", sealed_key=seal(f"system_keys/key_{n}", f"p{n}"), created_at=1.0)
    owner, key_id = f"connections/con_{n}", sealer.current_key_id
    secrets = [
        SealedSecret(owner=owner, version=v, key_id=key_id, sealed=seal(owner, "secret", v), created_at=1.0)
        for v in (1, 2)
    ]
    event = WebhookEvent(id=f"evt_{n}", type="t", provider="p", received_at=1.0, sealed_body=seal(f"evt_{n}", "event"))
    return [flow, device, journal, root, event, *secrets]


async def filled(database: Database, sealer: Sealer, *, rows: int = 3) -> None:
    made = [one for n in range(rows) for one in rows_of(sealer, n)]
    await database.transaction(lambda session: session.add_all(made))


async def batch(database: Database, place: Place, key_id: str | None, after: Any = None, limit: int = 500) -> list[Row]:
    return await database.read(lambda session: place.batch(session, key_id, after, limit))


async def a_next_key(database: Database, sealer: Sealer) -> Sealer:
    """Add a data key to the database; return a sealer that seals under it."""
    wrapped = wrap_data_key(a_keyring().newest, "dk_new", b"n" * 32)
    row = DataKey(id="dk_new", wrapped_by="kek-1", wrapped=wrapped, current=True, created_at=4e9)
    await database.transaction(lambda session: session.add(row))
    made = await open_sealer(database, a_keyring())
    assert made.current_key_id == "dk_new" != sealer.current_key_id
    return made


@pytest.mark.parametrize("name", NAMES)
async def test_each_value_is_found_under_its_key_and_opens_for_what_the_place_says(
    database: Database, sealer: Sealer, name: str
) -> None:
    await filled(database, sealer)
    place, expected = BY_NAME[name], 6 if name == "sealed_secrets.sealed" else 3
    found = await batch(database, place, sealer.current_key_id)
    assert len(found) == expected
    for row in found:
        opened = sealer.open(row.sealed, owner=row.owner, purpose=row.purpose, version=row.version)
        assert opened == f"plain {row.owner}".encode()
    assert await database.read(lambda session: place.count_under(session, sealer.current_key_id)) == expected
    assert await database.read(lambda session: place.count_under(session, "dk_other")) == 0
    assert await batch(database, place, "dk_other") == []
    assert await batch(database, place, None) == found


@pytest.mark.parametrize("name", NAMES)
async def test_batches_go_through_all_values_once(database: Database, sealer: Sealer, name: str) -> None:
    await filled(database, sealer)
    place, after, seen = BY_NAME[name], None, []
    while part := await batch(database, place, sealer.current_key_id, after, 2):
        assert len(part) <= 2
        seen += [row.pk for row in part]
        after = part[-1].pk
    assert seen == [row.pk for row in await batch(database, place, sealer.current_key_id)]
    assert len(set(seen)) == len(seen) > 2


@pytest.mark.parametrize("name", NAMES)
async def test_a_value_sealed_anew_leaves_the_old_key_and_opens_as_before(
    database: Database, sealer: Sealer, name: str
) -> None:
    await filled(database, sealer)
    new, place, old_key = await a_next_key(database, sealer), BY_NAME[name], sealer.current_key_id
    for row in await batch(database, place, old_key):
        bound: Mapping[str, Any] = {"owner": row.owner, "purpose": row.purpose, "version": row.version}
        anew = new.seal(sealer.open(row.sealed, **bound), **bound)
        assert await database.transaction(lambda session, row=row, anew=anew: place.replace(session, row, anew))  # type: ignore[misc]
        assert not await database.transaction(lambda session, row=row, anew=anew: place.replace(session, row, anew))  # type: ignore[misc]
    assert await database.read(lambda session: place.count_under(session, old_key)) == 0
    assert await find_unreadable(database, new) == []
    others = sum([len(await batch(database, one, old_key)) for one in PLACES if one is not place])
    assert others > 0, "only this place was rewritten"


async def test_nothing_is_sealed_anew_under_a_key_that_was_retired_meanwhile(
    database: Database, sealer: Sealer
) -> None:
    await filled(database, sealer)
    new, place = await a_next_key(database, sealer), BY_NAME["sealed_secrets.sealed"]
    [row, *_] = await batch(database, place, sealer.current_key_id)
    anew = new.seal(b"x", owner=row.owner, purpose=row.purpose, version=row.version)
    gone = sa.update(_of(DataKey)).where(_of(DataKey).c.id == "dk_new").values(retired_at=1.0, wrapped=b"")
    await tamper(database, gone)
    with pytest.raises(KeyRetired):
        await database.transaction(lambda session: place.replace(session, row, anew))
    assert await database.read(lambda session: place.one(session, row.pk)) == row


# --- the scan -----------------------------------------------------------------------------------------------------------


def _of(model: type[SQLModel]) -> sa.Table:
    table: sa.Table = model.__table__  # type: ignore[attr-defined]
    return table


SECRETS = _of(SealedSecret)


async def tamper(database: Database, statement: sa.Executable) -> None:
    """Do what somebody does who can write to the database."""
    await database.transaction(lambda session: session.execute(statement) and None)


def damage(name: str, n: int, **values: Any) -> sa.Update:
    """Return an update of the nth row of a place."""
    place = BY_NAME[name]
    key = next(iter(place.table.primary_key.columns))
    prefix = {"flows": "flo", "device_flows": "dev", "system_keys": "key", "webhook_events": "evt"}.get(
        place.table.name, "con"
    )
    named = f"connections/con_{n}" if place.table is SECRETS else f"{prefix}_{n}"
    return sa.update(place.table).where(key == named).values(**values)


@pytest.mark.parametrize("name", NAMES)
async def test_a_flipped_byte_is_found_and_named_wherever_it_is(database: Database, sealer: Sealer, name: str) -> None:
    await filled(database, sealer)
    assert await find_unreadable(database, sealer) == []
    place = BY_NAME[name]
    row = (await batch(database, place, None))[-1]
    flipped = row.sealed[:-1] + bytes([row.sealed[-1] ^ 1])
    where = [column == value for column, value in zip(place.table.primary_key.columns, row.pk, strict=True)]
    await tamper(database, sa.update(place.table).where(*where).values({place.column: flipped}))
    found = await find_unreadable(database, sealer)
    assert found == [(name, row.owner, row.version, "was sealed for another row, or was changed")]


@pytest.mark.parametrize("name", NAMES)
async def test_a_ciphertext_copied_from_another_row_is_found(database: Database, sealer: Sealer, name: str) -> None:
    await filled(database, sealer, rows=2)
    place = BY_NAME[name]
    stolen = (await batch(database, place, None))[0].sealed
    await tamper(database, damage(name, 1, **{place.column: stolen}))
    found = await find_unreadable(database, sealer)
    assert {(one.place, one.owner) for one in found} == {(name, (await batch(database, place, None))[-1].owner)}


async def test_an_old_version_under_a_newer_number_is_found_and_said_to_be_one(
    database: Database, sealer: Sealer
) -> None:
    await filled(database, sealer)
    old = (await batch(database, BY_NAME["sealed_secrets.sealed"], None))[0]
    newest = (SECRETS.c.owner == old.owner) & (SECRETS.c.version == 2)
    await tamper(database, sa.update(SECRETS).where(newest).values(sealed=old.sealed))
    why = "is version 1 of this secret in the place of version 2"
    assert await find_unreadable(database, sealer) == [("sealed_secrets.sealed", old.owner, 2, why)]


async def test_a_row_under_an_unknown_data_key_is_found_by_its_name(database: Database, sealer: Sealer) -> None:
    await filled(database, sealer)
    stranger = Sealer(a_keyring(), {"dk_stranger": b"s" * 32}, "dk_stranger")
    forged = stranger.seal(b"{}", owner="connections/con_1", purpose="secret", version=2)
    newest = (SECRETS.c.owner == "connections/con_1") & (SECRETS.c.version == 2)
    await tamper(database, sa.update(SECRETS).where(newest).values(sealed=forged, key_id="dk_stranger"))
    [found] = await find_unreadable(database, sealer)
    assert found[:3] == ("sealed_secrets.sealed", "connections/con_1", 2)
    assert "dk_stranger" in found.why


async def test_a_row_filed_under_another_data_key_than_its_own_is_found(database: Database, sealer: Sealer) -> None:
    """Whoever looks by the column alone would not find it."""
    await filled(database, sealer)
    await tamper(database, damage("sealed_secrets.sealed", 0, key_id="dk_other"))
    found = await find_unreadable(database, sealer)
    assert [(one.owner, one.version) for one in found] == [("connections/con_0", 1), ("connections/con_0", 2)]
    assert all("filed under another data key" in one.why for one in found)


@pytest.mark.parametrize(
    "noise", [b"", b"\x01", b"\xff" * 80, b"plain text that nobody sealed, and long enough for one"]
)
async def test_what_is_no_sealed_value_is_found(database: Database, sealer: Sealer, noise: bytes) -> None:
    await filled(database, sealer)
    await tamper(database, damage("refresh_journal.sealed_answer", 1, sealed_answer=noise))
    found = await find_unreadable(database, sealer)
    assert found == [("refresh_journal.sealed_answer", "connections/con_1", 8, "is no sealed value")]


async def test_what_another_process_sealed_under_a_new_key_is_no_finding(database: Database, sealer: Sealer) -> None:
    new = await a_next_key(database, sealer)
    await filled(database, new)
    assert await find_unreadable(database, sealer) == []


async def test_a_root_key_that_was_retired_and_emptied_is_no_finding(database: Database, sealer: Sealer) -> None:
    await filled(database, sealer)
    await tamper(database, damage("system_keys.sealed_key", 1, state="retired", sealed_key=b""))
    assert await find_unreadable(database, sealer) == []
    await tamper(database, damage("system_keys.sealed_key", 1, state="previous"))
    assert [one.owner for one in await find_unreadable(database, sealer)] == ["system_keys/key_1"]


async def test_a_value_is_under_the_key_of_its_bytes_and_under_the_key_of_its_column(
    database: Database, sealer: Sealer
) -> None:
    await filled(database, sealer)
    place, key_id = BY_NAME["sealed_secrets.sealed"], sealer.current_key_id
    await tamper(database, damage(place.name, 0, key_id="dk_other"))
    for under, by_column, expected in ((key_id, False, 6), (key_id, True, 4), ("dk_other", False, 2)):
        count = partial(place.count_under, key_id=under, by_column=by_column)
        assert await database.read(count) == expected
    assert len(await batch(database, place, key_id)) == 6


# --- rows that name a version -------------------------------------------------------------------------------------------


async def connected(database: Database, *named: tuple[str, int]) -> None:
    def work(session: Session) -> None:
        for connection_id, version in named:
            row = Connection(id=connection_id, integration="i", provider="p", status="active", created_at=1.0)
            row.secret_version = version
            session.add(row)

    await database.transaction(work)


async def test_a_row_that_names_another_version_than_the_newest_is_found(database: Database, sealer: Sealer) -> None:
    await filled(database, sealer, rows=4)
    await connected(database, ("con_0", 2), ("con_1", 1), ("con_2", 3), ("con_9", 1), ("con_none", 0))
    found = await find_misnamed(database)
    assert found == [("con_1", 1, 2), ("con_2", 3, 2), ("con_9", 1, None)]
    assert [one.lost for one in found] == [False, True, True]


async def test_a_deleted_connection_names_nothing(database: Database, sealer: Sealer) -> None:
    await filled(database, sealer)
    await connected(database, ("con_9", 1))
    await tamper(database, sa.update(_of(Connection)).values(deleted_at=1.0))
    assert await find_misnamed(database) == []
