"""The embedded vault keeps the contract, and whoever writes to its table cannot make a secret open elsewhere."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import Session

from broker.database import Database, SqliteDatabase, open_database, opened
from broker.errors import SecretStoreUnavailable
from broker.models import DataKey, SealedSecret
from broker.settings import Secret, Settings, SettingsError
from broker.vault import SecretNotFound, SecretUnreadable, Vault, VaultConflict, open_vault
from broker.vault.keyring import Keyring, Seal, Sealer, open_sealer, parse_keys, wrap_data_key
from broker.vault.sealed_rows import SealedRows
from tests.broker.vault.vault_contract import CONTRACT, an_owner

KEK = "kek-1:" + base64.b64encode(bytes(range(32))).decode()
ROWS = SealedSecret.__table__  # type: ignore[attr-defined]
KEYS = DataKey.__table__  # type: ignore[attr-defined]
CANARY = "CANARY-9f3e71c0d2b84a65"


def a_keyring() -> Keyring:
    return Keyring(parse_keys(KEK, setting="BROKER_KEYRING"))


@pytest.fixture
async def sealer(database: Database) -> Sealer:
    return await open_sealer(database, a_keyring())


@pytest.fixture
async def vault(database: Database, sealer: Sealer) -> Vault:
    settings = Settings(env="development", keyring=Secret(KEK))
    return await open_vault(settings, database, sealer)


@pytest.mark.parametrize("check_law", CONTRACT, ids=lambda check: str(check.__name__).removeprefix("check_"))
async def test_sealed_rows_keep_the_contract(vault: Vault, check_law: Callable[[Vault], Awaitable[None]]) -> None:
    await check_law(vault)


async def rows_of(database: Database, owner: str) -> list[sa.Row[Any]]:
    wanted = sa.select(ROWS).where(ROWS.c.owner == owner).order_by(ROWS.c.version)
    return await database.read(lambda session: list(session.execute(wanted)))


async def tamper(database: Database, statement: sa.Executable) -> None:
    """Do what somebody does who can write to the database."""
    await database.transaction(lambda session: session.execute(statement) and None)


async def filled(vault: Vault, *owners: str, versions: int = 1) -> None:
    for owner in owners:
        for version in range(versions):
            await vault.put(owner, {"of": owner, "n": version + 1}, expected_version=version)


# --- what this store promises beyond the contract ---------------------------------------------------------------------


async def test_exactly_the_newest_three_versions_are_kept(vault: Vault, database: Database) -> None:
    owner = an_owner()
    await filled(vault, owner, versions=6)
    assert [row.version for row in await rows_of(database, owner)] == [4, 5, 6]
    with pytest.raises(SecretNotFound):
        await vault.get(owner, 3)


async def test_a_row_names_the_data_key_that_sealed_it(vault: Vault, database: Database, sealer: Sealer) -> None:
    owner = an_owner()
    await filled(vault, owner)
    [row] = await rows_of(database, owner)
    assert row.key_id == sealer.current_key_id == sealer.key_id_of(row.sealed)


@pytest.mark.parametrize("value", [{"n": float("nan")}, {"n": float("inf")}, {"n": b"bytes"}, {"n": object()}])
async def test_what_is_no_json_is_refused_before_anything_is_written(
    vault: Vault, database: Database, value: dict[str, Any]
) -> None:
    owner = an_owner()
    with pytest.raises((ValueError, TypeError)):
        await vault.put(owner, value, expected_version=0)
    assert await rows_of(database, owner) == []


async def test_equal_values_have_equal_bytes_whatever_the_order_of_their_names(
    vault: Vault, database: Database, sealer: Sealer
) -> None:
    first, second = an_owner(), an_owner()
    await vault.put(first, {"a": "ä", "b": 1}, expected_version=0)
    await vault.put(second, {"b": 1, "a": "ä"}, expected_version=0)
    for owner in (first, second):
        [row] = await rows_of(database, owner)
        assert sealer.open(row.sealed, owner=owner, purpose="secret", version=1) == b'{"a":"\\u00e4","b":1}'


async def test_a_writer_without_the_lock_still_loses_by_the_primary_key(postgres_url: str) -> None:
    database = open_database(postgres_url)
    vault = SealedRows(database, await open_sealer(database, a_keyring()))
    owner, written = an_owner(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def write_and_linger(session: Session) -> None:
        session.execute(sa.insert(ROWS).values(owner=owner, version=1, key_id="x", sealed=b"x", created_at=1.0))
        loop.call_soon_threadsafe(written.set)
        session.execute(sa.text("SELECT pg_sleep(0.3)"))

    other = asyncio.create_task(database.transaction(write_and_linger))
    await written.wait()
    with pytest.raises(VaultConflict) as conflict:
        await vault.put(owner, {"n": 1}, expected_version=0)
    await other
    assert conflict.value.current == 1
    await database.aclose()


async def test_a_destroy_among_puts_leaves_nothing_behind(vault: Vault) -> None:
    for _ in range(5):
        owner = an_owner()
        await filled(vault, owner, versions=3)
        puts = [vault.put(owner, {"n": 4}, expected_version=3), vault.put(owner, {"n": 5}, expected_version=4)]
        await asyncio.gather(*puts, vault.destroy(owner), return_exceptions=True)
        with pytest.raises(SecretNotFound):
            await vault.get(owner)


# --- somebody writes to the table -------------------------------------------------------------------------------------


async def test_a_ciphertext_moved_to_another_owner_does_not_open_and_harms_no_other(
    vault: Vault, database: Database
) -> None:
    mine, theirs, bystander = an_owner(), an_owner(), an_owner()
    await filled(vault, mine, theirs, bystander)
    [stolen] = await rows_of(database, theirs)
    await tamper(database, sa.update(ROWS).where(ROWS.c.owner == mine).values(sealed=stolen.sealed))
    with pytest.raises(SecretUnreadable):
        await vault.get(mine)
    assert await vault.get(theirs) == (1, {"of": theirs, "n": 1})
    assert await vault.get(bystander) == (1, {"of": bystander, "n": 1})


async def test_a_row_renamed_to_another_owner_does_not_open(vault: Vault, database: Database) -> None:
    mine, theirs = an_owner(), an_owner()
    await filled(vault, theirs)
    await tamper(database, sa.update(ROWS).where(ROWS.c.owner == theirs).values(owner=mine))
    with pytest.raises(SecretUnreadable):
        await vault.get(mine)
    with pytest.raises(SecretNotFound):
        await vault.get(theirs)


async def test_an_old_ciphertext_under_the_newest_version_number_does_not_open(
    vault: Vault, database: Database
) -> None:
    owner, bystander = an_owner(), an_owner()
    await filled(vault, owner, bystander, versions=3)
    old = (await rows_of(database, owner))[1]
    await tamper(database, sa.update(ROWS).where(ROWS.c.owner == owner, ROWS.c.version == 3).values(sealed=old.sealed))
    for version in (None, 3):
        with pytest.raises(SecretUnreadable):
            await vault.get(owner, version)
    assert await vault.get(owner, 2) == (2, {"of": owner, "n": 2})
    assert await vault.get(bystander) == (3, {"of": bystander, "n": 3})


async def test_an_old_row_with_a_new_version_number_does_not_open(vault: Vault, database: Database) -> None:
    owner = an_owner()
    await filled(vault, owner, versions=3)
    await tamper(database, sa.update(ROWS).where(ROWS.c.owner == owner, ROWS.c.version == 1).values(version=4))
    with pytest.raises(SecretUnreadable):
        await vault.get(owner)
    assert await vault.get(owner, 3) == (3, {"of": owner, "n": 3})


async def test_a_newest_version_that_was_deleted_is_missed_by_whoever_names_it(
    vault: Vault, database: Database
) -> None:
    owner = an_owner()
    await filled(vault, owner, versions=2)
    await tamper(database, sa.delete(ROWS).where(ROWS.c.owner == owner, ROWS.c.version == 2))
    with pytest.raises(SecretNotFound):
        await vault.get(owner, 2)


async def test_a_row_under_an_unknown_data_key_does_not_open_and_harms_no_other(
    vault: Vault, database: Database
) -> None:
    stranger = Sealer(a_keyring(), {"dk_stranger": b"s" * 32}, "dk_stranger")
    owner, bystander = an_owner(), an_owner()
    await filled(vault, owner, bystander)
    forged = stranger.seal(b'{"of":"x"}', owner=owner, purpose="secret", version=1)
    await tamper(database, sa.update(ROWS).where(ROWS.c.owner == owner).values(sealed=forged, key_id="dk_stranger"))
    for _ in range(2):
        with pytest.raises(SecretUnreadable):
            await vault.get(owner)
    assert await vault.get(bystander) == (1, {"of": bystander, "n": 1})


@pytest.mark.parametrize(
    "damage",
    [b"", b"\x01", b"\xff" * 80, b"\x01\x00" + bytes(40), b'{"of":"x"}'],
    ids=["nothing", "one byte", "noise", "an empty key id", "plaintext"],
)
async def test_a_row_that_is_no_envelope_does_not_open(vault: Vault, database: Database, damage: bytes) -> None:
    owner = an_owner()
    await filled(vault, owner)
    await tamper(database, sa.update(ROWS).where(ROWS.c.owner == owner).values(sealed=damage))
    with pytest.raises(SecretUnreadable):
        await vault.get(owner)


async def test_text_in_the_column_of_bytes_does_not_open(sqlite_url: str) -> None:
    database = open_database(sqlite_url)
    vault = SealedRows(database, await open_sealer(database, a_keyring()))
    owner = an_owner()
    await filled(vault, owner)
    for damage in ("'text'", "7", "1.5"):
        await tamper(database, sa.text(f"UPDATE sealed_secrets SET sealed = {damage}"))  # noqa: S608 - the words above
        with pytest.raises(SecretUnreadable):
            await vault.get(owner)
    await database.aclose()


async def test_an_envelope_for_another_purpose_does_not_open_as_a_secret(
    vault: Vault, database: Database, sealer: Sealer
) -> None:
    owner = an_owner()
    await filled(vault, owner)
    other = sealer.seal(b'{"of":"x"}', owner=owner, purpose="journal", version=1)
    await tamper(database, sa.update(ROWS).where(ROWS.c.owner == owner).values(sealed=other))
    with pytest.raises(SecretUnreadable):
        await vault.get(owner)


async def test_an_envelope_that_holds_no_object_is_unreadable(vault: Vault, database: Database, sealer: Sealer) -> None:
    owner = an_owner()
    await filled(vault, owner)
    sealed = sealer.seal(b"[]", owner=owner, purpose="secret", version=1)
    await tamper(database, sa.update(ROWS).where(ROWS.c.owner == owner).values(sealed=sealed))
    with pytest.raises(SecretUnreadable):
        await vault.get(owner)


# --- replicas, and a database that fails ------------------------------------------------------------------------------


async def test_a_secret_under_a_data_key_that_another_replica_made_opens(
    vault: Vault, database: Database, sealer: Sealer
) -> None:
    await database.transaction(lambda session: session.add(a_successor()))
    replica = SealedRows(database, await open_sealer(database, a_keyring()))
    owner = an_owner()
    await filled(replica, owner)
    assert [row.key_id for row in await rows_of(database, owner)] == ["dk_new"]
    assert sealer.current_key_id != "dk_new"
    assert await vault.get(owner) == (1, {"of": owner, "n": 1})
    assert sealer.current_key_id == "dk_new"


def a_successor() -> DataKey:
    wrapped = wrap_data_key(a_keyring().newest, "dk_new", b"n" * 32)
    return DataKey(id="dk_new", wrapped_by="kek-1", wrapped=wrapped, current=True, created_at=4e9)


def retire_if_unused(session: Session, key_id: str) -> int:
    """Do what the end of a rotation does: hold the key, count what is left under it, retire it only at zero."""
    session.execute(sa.select(KEYS.c.id).where(KEYS.c.id == key_id).with_for_update())
    left = session.execute(sa.select(sa.func.count()).select_from(ROWS).where(ROWS.c.key_id == key_id)).scalar_one()
    if not left:
        session.execute(sa.update(KEYS).where(KEYS.c.id == key_id).values(current=False, retired_at=1.0, wrapped=b""))
    return int(left)


async def test_a_put_by_a_process_that_slept_through_a_rotation_is_under_the_new_key(
    vault: Vault, database: Database, sealer: Sealer
) -> None:
    owner, old = an_owner(), sealer.current_key_id
    await database.transaction(lambda session: session.add(a_successor()))
    assert await database.transaction(lambda session: retire_if_unused(session, old)) == 0
    await filled(vault, owner)
    assert [row.key_id for row in await rows_of(database, owner)] == ["dk_new"]
    assert await vault.get(owner) == (1, {"of": owner, "n": 1})


async def test_a_put_where_no_data_key_is_left_is_refused_and_writes_nothing(
    vault: Vault, database: Database, sealer: Sealer
) -> None:
    owner = an_owner()
    await database.transaction(lambda session: retire_if_unused(session, sealer.current_key_id))
    with pytest.raises(SecretStoreUnavailable):
        await filled(vault, owner)
    assert await rows_of(database, owner) == []


async def test_a_key_is_not_retired_past_a_put_that_is_under_way(postgres_url: str) -> None:
    async with opened(postgres_url) as database:
        sealer = await open_sealer(database, a_keyring())
        old, writing, loop = sealer.current_key_id, asyncio.Event(), asyncio.get_running_loop()

        def work(session: Session, seal: Seal) -> None:
            loop.call_soon_threadsafe(writing.set)
            session.execute(sa.text("SELECT pg_sleep(0.3)"))
            sealed = seal(b"{}", owner="a", purpose="secret", version=1)
            session.execute(sa.insert(ROWS).values(owner="a", version=1, key_id=old, sealed=sealed, created_at=1.0))

        put = asyncio.create_task(sealer.write(database, work))
        await writing.wait()
        assert await database.transaction(lambda session: retire_if_unused(session, old)) == 1
        await put


async def test_a_put_waits_for_the_retirement_of_its_key_and_takes_the_next(postgres_url: str) -> None:
    async with opened(postgres_url) as database:
        sealer = await open_sealer(database, a_keyring())
        old, retiring, loop = sealer.current_key_id, asyncio.Event(), asyncio.get_running_loop()
        await database.transaction(lambda session: session.add(a_successor()))

        def retire_slowly(session: Session) -> int:
            left = retire_if_unused(session, old)
            loop.call_soon_threadsafe(retiring.set)
            session.execute(sa.text("SELECT pg_sleep(0.3)"))
            return left

        retirement = asyncio.create_task(database.transaction(retire_slowly))
        await retiring.wait()
        await filled(SealedRows(database, sealer), "a")
        assert await retirement == 0
        assert [row.key_id for row in await rows_of(database, "a")] == ["dk_new"]


async def test_a_database_without_its_table_is_a_store_that_is_not_available(vault: Vault, database: Database) -> None:
    await tamper(database, sa.text("DROP TABLE sealed_secrets"))
    for attempt in (
        vault.put("a", {"n": 1}, expected_version=0),
        vault.get("a"),
        vault.destroy("a"),
        vault.owners(""),
    ):
        with pytest.raises(SecretStoreUnavailable) as failure:
            await attempt
        assert "sealed_secrets" not in str(failure.value)


async def test_a_refresh_that_fails_is_a_store_that_is_not_available(vault: Vault, database: Database) -> None:
    stranger = Sealer(a_keyring(), {"dk_stranger": b"s" * 32}, "dk_stranger")
    owner = an_owner()
    await filled(vault, owner)
    forged = stranger.seal(b'{"of":"x"}', owner=owner, purpose="secret", version=1)
    await tamper(database, sa.update(ROWS).where(ROWS.c.owner == owner).values(sealed=forged))
    await tamper(database, sa.text("DROP TABLE data_keys"))
    with pytest.raises(SecretStoreUnavailable):
        await vault.get(owner)


async def test_an_unknown_store_is_refused_by_name(database: Database, sealer: Sealer) -> None:
    settings = Settings(env="development", keyring=Secret(KEK)).model_copy(update={"vault": "elsewhere"})
    with pytest.raises(SettingsError, match="BROKER_VAULT"):
        await open_vault(settings, database, sealer)


# --- what lies on the disk --------------------------------------------------------------------------------------------


async def test_the_database_file_never_holds_the_plaintext(sqlite_url: str, tmp_path: Path) -> None:
    database = open_database(sqlite_url)
    assert isinstance(database, SqliteDatabase)
    vault = SealedRows(database, await open_sealer(database, a_keyring()))
    for version in range(5):
        await vault.put("connections/con_canary", {"access_token": CANARY}, expected_version=version)
    written = _content(tmp_path)  # with the write-ahead log
    await database.aclose()
    written += _content(tmp_path)
    plain = CANARY.encode()
    assert b"con_canary" in written
    alignments = [base64.b64encode(b"\0" * n + plain)[4 * bool(n) : -4] for n in range(3)]
    forms = [plain, plain.hex().encode(), plain.hex().upper().encode(), bytes(range(32)), *alignments]
    assert [form for form in forms if form in written] == []


def _content(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.iterdir())
