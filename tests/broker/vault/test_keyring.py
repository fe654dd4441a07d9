"""The keyring refuses what is wrong by name, envelopes open for what they were sealed for, and starts agree on one key."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlmodel import Session, select

from broker.database import Database, now
from broker.errors import SecretStoreUnavailable
from broker.models import DataKey, KeyCheck
from broker.settings import Secret, Settings, SettingsError
from broker.vault import SecretUnreadable
from broker.vault.floor import KeyRetired, require_live_key, require_live_wrapping_key
from broker.vault.keyring import (
    LARGEST_KEYRING_BYTES,
    KeyEncryptionKey,
    Keyring,
    Seal,
    Sealer,
    check_value,
    derive_key,
    load_keyring,
    new_data_key,
    open_sealer,
    parse_keys,
    unwrap_data_key,
    wrap_data_key,
)

ROOT = Path(__file__).resolve().parents[3]


def material(seed: int) -> bytes:
    """Return 32 bytes that differ from those of every other seed."""
    return bytes((seed + 7 * n) % 256 for n in range(32))


def entry(key_id: str, seed: int) -> str:
    return f"{key_id}:{base64.b64encode(material(seed)).decode()}"


def a_keyring(*entries: str) -> Keyring:
    return Keyring(parse_keys(",".join(entries or (entry("k1", 1),)), setting="BROKER_KEYRING"))


def a_sealer(key_id: str = "dk_one", seed: int = 9) -> Sealer:
    return Sealer(a_keyring(), {key_id: material(seed)}, key_id)


SEALER = a_sealer()
SEALED_FOR = {"owner": "connections/con_a", "purpose": "secret", "version": 3}


def sealed(plaintext: bytes = b"hello") -> bytes:
    return SEALER.seal(plaintext, owner="connections/con_a", purpose="secret", version=3)


def unsealed(envelope: bytes) -> bytes:
    return SEALER.open(envelope, owner="connections/con_a", purpose="secret", version=3)


@contextmanager
def refused() -> Iterator[None]:
    """Expect the one shape of refusal: same type, same words, no cause that says more."""
    with pytest.raises(SecretUnreadable) as refusal:
        yield
    assert refusal.type is SecretUnreadable
    assert str(refusal.value) == "the sealed value does not open"
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None


# --- the keyring's text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"{entry('new', 2)},{entry('old', 1)}",
        f"{entry('new', 2)}\n{entry('old', 1)}\n",
        f"\r\n  {entry('new', 2)}  \r\n\r\n{entry('old', 1)}",
        f"{entry('new', 2)} , {entry('old', 1)}",
    ],
    ids=["comma", "lines", "blank lines", "blanks"],
)
def test_keys_come_newest_first_by_comma_or_by_line(text: str) -> None:
    keyring = Keyring(parse_keys(text, setting="BROKER_KEYRING"))
    assert keyring.ids == ("new", "old")
    assert keyring.newest.key == material(2)
    old = keyring.get("old")
    assert old is not None
    assert old.key == material(1)
    assert keyring.get("other") is None


SHORT = base64.b64encode(b"x" * 31).decode()
LONG = base64.b64encode(b"x" * 33).decode()
GOOD = base64.b64encode(material(1)).decode()
REFUSED_TEXTS = {
    "nothing": "",
    "blank lines": " \n \n",
    "no id": GOOD,
    "an empty id": f":{GOOD}",
    "a long id": f"{'a' * 33}:{GOOD}",
    "an upper-case id": f"Key:{GOOD}",
    "an id with another sign": f"key_1:{GOOD}",
    "another digit": f"k\u0661:{GOOD}",
    "the key first": f"{GOOD}:k1",
    "31 bytes": f"k1:{SHORT}",
    "33 bytes": f"k1:{LONG}",
    "no padding": f"k1:{GOOD[:-1]}",
    "the url alphabet": f"k1:{'-' * 43}=",
    "bits that belong to no byte": f"k1:{GOOD[:-2]}{chr(ord(GOOD[-2]) + 1)}=",
    "a comma too many": f"{entry('k1', 1)},",
    "two commas": f"{entry('k1', 1)},,{entry('k2', 2)}",
    "a comment": f"# mine\n{entry('k1', 1)}",
    "words behind": f"{entry('k1', 1)} # mine",
    "the same id twice": f"{entry('k1', 1)},{entry('k1', 2)}",
    "the same key twice": f"{entry('k1', 1)},{entry('k2', 1)}",
    "a NUL": f"{entry('k1', 1)}\0",
}


@pytest.mark.parametrize("text", REFUSED_TEXTS.values(), ids=REFUSED_TEXTS.keys())
def test_any_other_text_is_refused_by_the_settings_name_and_never_shown(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^BROKER_KEYRING\b") as refusal:
        parse_keys(text, setting="BROKER_KEYRING")
    shown = f"{refusal.value!r} {refusal.value.__cause__!r}"
    assert [part for part in (GOOD[:-4], SHORT[:12], LONG[:12]) if part in shown] == []
    assert refusal.value.__context__ is None


def test_a_keyring_is_not_empty() -> None:
    with pytest.raises(ValueError, match="needs a key"):
        Keyring(())


def test_no_repr_shows_a_key() -> None:
    keyring, sealer = a_keyring(entry("k1", 1)), a_sealer(seed=1)
    shown = f"{keyring!r} {keyring} {keyring.newest!r} {sealer!r} {sealer._keys!r}"
    assert repr(keyring) == "Keyring(k1)"
    assert repr(sealer) == "Sealer(current=dk_one, keys=1)"
    for form in (repr(material(1))[2:-1], material(1).hex(), GOOD):
        assert form not in shown


# --- where the keyring comes from -------------------------------------------------------------------------------------


def production(keyring_file: Path) -> Settings:
    return Settings(public_url="https://broker.test", keyring_file=keyring_file)


def written(path: Path, *entries: str, mode: int = 0o600) -> Path:
    path.write_text("\n".join(entries) + "\n")
    path.chmod(mode)
    return path


async def test_a_keyring_in_the_environment_is_taken_and_never_changes() -> None:
    keyring = load_keyring(Settings(env="development", keyring=Secret(entry("k1", 1))))
    assert keyring.ids == ("k1",)
    assert await keyring.reload() is False


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_a_keyring_file_that_only_its_owner_and_group_read_is_taken(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "keys", entry("k1", 1), mode=mode)
    assert load_keyring(production(path)).ids == ("k1",)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602, 0o601, 0o620, 0o610, 0o666, 0o777])
def test_a_keyring_file_that_others_may_read_or_change_is_refused_in_production(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "keys", entry("k1", 1), mode=mode)
    with pytest.raises(SettingsError, match=r"^BROKER_KEYRING_FILE .* mode is 0\d{3}"):
        load_keyring(production(path))
    assert load_keyring(Settings(env="development", keyring_file=path)).ids == ("k1",)


def test_a_mounted_keyring_is_read_through_its_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "..data").mkdir()
    written(tmp_path / "..data" / "keys", entry("k1", 1), mode=0o440)
    (tmp_path / "keys").symlink_to(tmp_path / "..data" / "keys")
    assert load_keyring(production(tmp_path / "keys")).ids == ("k1",)


def test_a_keyring_file_that_is_no_readable_text_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large").write_bytes(b"\n" * (LARGEST_KEYRING_BYTES + 1))
    (tmp_path / "binary").write_bytes(b"\xff\xfe" + material(1))
    for name in ("absent", "pipe", "loop", "large", "binary", "."):
        with pytest.raises(SettingsError, match=r"^BROKER_KEYRING_FILE\b"):
            load_keyring(Settings(env="development", keyring_file=tmp_path / name))


def test_a_file_that_the_system_will_not_open_is_refused_by_name() -> None:
    unreadable = Path("/proc/self/mem")  # a regular file by its kind, and an I/O error for whoever reads it
    with pytest.raises(SettingsError, match=r"^BROKER_KEYRING_FILE\b"):
        load_keyring(Settings(env="development", keyring_file=unreadable))


def test_production_makes_no_keyring_by_itself(tmp_path: Path) -> None:
    settings = Settings(env="development", data_dir=tmp_path).model_copy(update={"env": "production"})
    with pytest.raises(SettingsError, match="required in production"):
        load_keyring(settings)
    assert list(tmp_path.iterdir()) == []


def test_development_makes_one_private_keyring_and_keeps_it(tmp_path: Path) -> None:
    settings = Settings(env="development", data_dir=tmp_path / "data")
    first = load_keyring(settings)
    again = load_keyring(settings)
    assert first.ids == again.ids
    assert first.newest.key == again.newest.key
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    [made] = (tmp_path / "data").iterdir()
    assert made.name == "keyring"
    assert made.stat().st_mode & 0o777 == 0o600


def test_of_many_starts_at_once_all_read_the_keyring_that_one_made(tmp_path: Path) -> None:
    settings = Settings(env="development", data_dir=tmp_path / "data")
    with ThreadPoolExecutor(max_workers=8) as threads:
        keyrings = list(threads.map(lambda _: load_keyring(settings), range(32)))
    assert len({(keyring.ids, keyring.newest.key) for keyring in keyrings}) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["keyring"]


def test_a_data_directory_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(SettingsError, match=r"^BROKER_DATA_DIR\b"):
        load_keyring(Settings(env="development", data_dir=tmp_path / "data"))


# --- reading it again -------------------------------------------------------------------------------------------------


async def test_a_key_added_to_the_file_is_the_newest_after_a_reload(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", entry("k1", 1))
    keyring = load_keyring(production(path))
    assert await keyring.reload() is False
    written(path, entry("k2", 2), entry("k1", 1))
    assert keyring.newest.id == "k1"
    assert await keyring.reload() is True
    assert keyring.ids == ("k2", "k1")
    assert keyring.newest.key == material(2)


async def test_a_reload_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", entry("k1", 1))
    keyring = load_keyring(production(path))
    written(path, entry("k2", 2), entry("k1", 3))
    with pytest.raises(SettingsError, match="the key k1 changed"):
        await keyring.reload()
    path.write_text("half a li")
    with pytest.raises(SettingsError, match="BROKER_KEYRING_FILE"):
        await keyring.reload()
    written(path, entry("k2", 2), mode=0o644)
    with pytest.raises(SettingsError, match="mode is 0644"):
        await keyring.reload()
    assert keyring.ids == ("k1",)
    assert keyring.newest.key == material(1)


# --- derived keys, check values, wrapped data keys --------------------------------------------------------------------


def test_derived_keys_are_the_same_every_time_and_differ_by_purpose_and_root() -> None:
    keys = [derive_key(material(root), purpose) for root in (1, 2) for purpose in ("audit", "session", "", "wrap")]
    assert [len(key) for key in keys] == [32] * 8
    assert len(set(keys)) == 8
    assert derive_key(material(1), "audit") == keys[0]


def test_a_derived_key_is_the_hkdf_of_rfc_5869_over_lengths_and_names() -> None:
    info = b"".join(len(part).to_bytes(4, "big") + part for part in (b"credential-broker", b"purpose", b"audit"))
    extracted = hmac.digest(bytes(32), material(1), "sha256")
    assert derive_key(material(1), "audit") == hmac.digest(extracted, info + b"\x01", "sha256")


def test_no_purpose_reaches_the_keys_that_wrap_and_check() -> None:
    key = KeyEncryptionKey("k1", material(1))
    assert check_value(key) != derive_key(key.key, "k1").hex()
    assert check_value(key) != derive_key(key.key, "key check").hex()


def test_a_root_that_is_too_short_derives_nothing() -> None:
    with pytest.raises(ValueError, match="at least 32 bytes"):
        derive_key(b"x" * 31, "audit")


def test_a_check_value_depends_on_key_and_id_and_shows_neither() -> None:
    values = {check_value(KeyEncryptionKey(key_id, material(seed))) for key_id in ("k1", "k2") for seed in (1, 2)}
    assert len(values) == 4
    assert all(len(value) == 64 and material(1).hex()[:8] not in value for value in values)


def test_a_wrapped_data_key_opens_for_its_own_key_and_id_only() -> None:
    key, other = KeyEncryptionKey("k1", material(1)), KeyEncryptionKey("k1", material(2))
    renamed = KeyEncryptionKey("k2", material(1))
    wrapped = wrap_data_key(key, "dk_a", material(5))
    assert unwrap_data_key(key, "dk_a", wrapped) == material(5)
    for wrong_key, wrong_id in ((other, "dk_a"), (renamed, "dk_a"), (key, "dk_b")):
        with pytest.raises(SecretUnreadable):
            unwrap_data_key(wrong_key, wrong_id, wrapped)


def test_every_byte_of_a_wrapped_data_key_counts() -> None:
    key = KeyEncryptionKey("k1", material(1))
    wrapped = wrap_data_key(key, "dk_a", material(5))
    damaged = [wrapped[:n] + bytes([wrapped[n] ^ 1]) + wrapped[n + 1 :] for n in range(len(wrapped))]
    for one in (*damaged, *(wrapped[:n] for n in range(len(wrapped))), wrapped + b"\0"):
        with pytest.raises(SecretUnreadable):
            unwrap_data_key(key, "dk_a", one)


# --- envelopes --------------------------------------------------------------------------------------------------------


@given(plaintext=st.binary(max_size=4096), owner=st.text(), purpose=st.text(), version=st.integers(0, 2**63 - 1))
def test_any_bytes_come_back(plaintext: bytes, owner: str, purpose: str, version: int) -> None:
    envelope = SEALER.seal(plaintext, owner=owner, purpose=purpose, version=version)
    assert SEALER.open(envelope, owner=owner, purpose=purpose, version=version) == plaintext


names = st.text(st.characters(), max_size=6)  # lone surrogates too
targets = st.tuples(names, names, st.integers(0, 4))


@given(made_for=targets, tried=targets)
def test_an_envelope_opens_for_exactly_what_it_was_sealed_for(
    made_for: tuple[str, str, int], tried: tuple[str, str, int]
) -> None:
    envelope = SEALER.seal(b"hello", owner=made_for[0], purpose=made_for[1], version=made_for[2])
    if tried == made_for:
        assert SEALER.open(envelope, owner=tried[0], purpose=tried[1], version=tried[2]) == b"hello"
        return
    with refused():
        SEALER.open(envelope, owner=tried[0], purpose=tried[1], version=tried[2])


@given(text=st.text(min_size=1, max_size=8), cut=st.integers(0, 8))
def test_owner_and_purpose_do_not_run_into_each_other(text: str, cut: int) -> None:
    envelope = SEALER.seal(b"hello", owner=text, purpose="", version=1)
    owner, purpose = text[: min(cut, len(text) - 1)], text[min(cut, len(text) - 1) :]
    with refused():
        SEALER.open(envelope, owner=owner, purpose=purpose, version=1)


@pytest.mark.parametrize("version", [-1, 0, 2, 4, 2**63, 2**64 + 3, 2**200])
def test_no_other_version_opens_it(version: int) -> None:
    with refused():
        SEALER.open(sealed(), owner="connections/con_a", purpose="secret", version=version)


def test_every_bit_of_an_envelope_counts() -> None:
    envelope = sealed()
    for place in range(len(envelope) * 8):
        damaged = bytearray(envelope)
        damaged[place // 8] ^= 1 << place % 8
        with refused():
            unsealed(bytes(damaged))


@given(place=st.integers(0, 200), byte=st.integers(0, 255))
def test_every_byte_changed_is_refused(place: int, byte: int) -> None:
    envelope = bytearray(sealed(b"x" * 120))
    place %= len(envelope)
    unchanged = envelope[place] == byte
    envelope[place] = byte
    if unchanged:
        assert unsealed(bytes(envelope)) == b"x" * 120
        return
    with refused():
        unsealed(bytes(envelope))


def test_an_envelope_cut_or_lengthened_anywhere_is_refused() -> None:
    envelope = sealed()
    for damaged in (*(envelope[:n] for n in range(len(envelope))), envelope + b"\0", b"\0" + envelope, envelope * 2):
        with refused():
            unsealed(damaged)


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_in_the_same_shape(noise: bytes) -> None:
    for damaged in (noise, b"\x01" + noise, b"\x01\x06dk_one" + noise):
        with refused():
            unsealed(damaged)


@pytest.mark.parametrize("odd", ["text", 7, None, 1.5])
def test_what_is_not_even_bytes_is_refused_in_the_same_shape(odd: bytes) -> None:
    with refused():
        unsealed(odd)


def test_the_same_value_sealed_twice_looks_different() -> None:
    assert len({sealed() for _ in range(100)}) == 100


def test_an_envelope_shows_its_data_key_and_version_and_nothing_else() -> None:
    envelope = sealed()
    assert SEALER.key_id_of(envelope) == SEALER.current_key_id == "dk_one"
    assert envelope.startswith(b"\x01\x06dk_one" + (3).to_bytes(8, "big"))
    assert b"con_a" not in envelope
    with refused():
        SEALER.key_id_of(b"\x02" + envelope[1:])


@pytest.mark.parametrize("version", [-1, 2**63])
def test_a_version_out_of_range_is_not_sealed(version: int) -> None:
    with pytest.raises(ValueError, match="version"):
        SEALER.seal(b"", owner="o", purpose="p", version=version)


def test_another_data_key_under_the_same_id_does_not_open_it() -> None:
    with refused():
        a_sealer(seed=8).open(sealed(), owner="connections/con_a", purpose="secret", version=3)


def test_an_unknown_data_key_is_refused_and_told_apart_by_knows() -> None:
    envelope = a_sealer("dk_two").seal(b"hello", owner="connections/con_a", purpose="secret", version=3)
    with refused():
        unsealed(envelope)
    assert not SEALER.knows(envelope)
    assert SEALER.knows(sealed())
    assert SEALER.knows(b"no envelope, so no key to load")


def test_a_sealer_needs_its_current_key() -> None:
    with pytest.raises(ValueError, match="current data key"):
        Sealer(a_keyring(), {"dk_one": material(1)}, "dk_two")


# --- opening a sealer over the database -------------------------------------------------------------------------------


async def data_keys(database: Database) -> list[DataKey]:
    return await database.read(lambda session: list(session.exec(select(DataKey))))


async def checks(database: Database) -> dict[str, str]:
    return await database.read(lambda session: {row.key_id: row.check_value for row in session.exec(select(KeyCheck))})


def a_data_key(data_key_id: str, keyring: Keyring, *, seed: int = 5, created_at: float = 4e9) -> DataKey:
    wrapped = wrap_data_key(keyring.newest, data_key_id, material(seed))
    return DataKey(id=data_key_id, wrapped_by=keyring.newest.id, wrapped=wrapped, current=True, created_at=created_at)


async def test_the_first_start_makes_one_wrapped_data_key_and_a_check_value(database: Database) -> None:
    keyring = a_keyring(entry("k2", 2), entry("k1", 1))
    sealer = await open_sealer(database, keyring)
    [row] = await data_keys(database)
    assert (row.id, row.wrapped_by, row.current) == (sealer.current_key_id, "k2", True)
    assert len(unwrap_data_key(keyring.newest, row.id, row.wrapped)) == 32
    assert await checks(database) == {"k2": check_value(keyring.newest)}


async def test_a_later_start_opens_what_an_earlier_one_sealed(database: Database) -> None:
    envelope = (await open_sealer(database, a_keyring())).seal(b"hello", owner="o", purpose="p", version=1)
    later = await open_sealer(database, a_keyring(entry("k2", 2), entry("k1", 1)))
    assert later.open(envelope, owner="o", purpose="p", version=1) == b"hello"
    assert len(await data_keys(database)) == 1
    assert set(await checks(database)) == {"k1", "k2"}


async def test_a_start_without_a_key_that_is_in_use_is_refused_by_its_id(database: Database) -> None:
    await open_sealer(database, a_keyring(entry("k1", 1)))
    with pytest.raises(SettingsError, match=r"^BROKER_KEYRING or BROKER_KEYRING_FILE.*\bk1\b"):
        await open_sealer(database, a_keyring(entry("k2", 2)))
    assert set(await checks(database)) == {"k1"}


async def test_a_start_with_another_key_under_a_known_id_is_refused_by_its_id(database: Database) -> None:
    await open_sealer(database, a_keyring(entry("k1", 1)))
    with pytest.raises(SettingsError, match=r"^BROKER_KEYRING or BROKER_KEYRING_FILE.*\bk1\b"):
        await open_sealer(database, a_keyring(entry("k1", 2)))


async def test_a_start_whose_newest_key_differs_from_another_replicas_is_refused(database: Database) -> None:
    await open_sealer(database, a_keyring(entry("k1", 1)))
    await open_sealer(database, a_keyring(entry("k2", 2), entry("k1", 1)))
    with pytest.raises(SettingsError, match=r"\bk2\b"):
        await open_sealer(database, a_keyring(entry("k2", 3), entry("k1", 1)))


async def test_without_its_check_value_a_wrong_key_is_found_all_the_same(database: Database) -> None:
    await open_sealer(database, a_keyring(entry("k1", 1)))
    await database.transaction(lambda session: session.execute(sa.text("DELETE FROM key_checks")) and None)
    with pytest.raises(SettingsError, match=r"\bk1\b"):
        await open_sealer(database, a_keyring(entry("k1", 2)))
    assert await checks(database) == {}
    await open_sealer(database, a_keyring(entry("k1", 1)))
    assert set(await checks(database)) == {"k1"}


async def test_keys_that_nothing_uses_are_fine(database: Database) -> None:
    await open_sealer(database, a_keyring(entry("k1", 1)))
    keyring = a_keyring(entry("k1", 1), entry("older", 7), entry("oldest", 8))
    assert (await open_sealer(database, keyring)).current_key_id
    assert set(await checks(database)) == {"k1"}


async def test_a_damaged_data_key_stops_the_start_and_is_named(database: Database) -> None:
    first = await open_sealer(database, a_keyring())
    await database.transaction(_damage)
    with pytest.raises(SettingsError, match=first.current_key_id):
        await open_sealer(database, a_keyring())


def _damage(session: Session) -> None:
    for row in session.exec(select(DataKey)):
        row.wrapped = row.wrapped[:-1] + bytes([row.wrapped[-1] ^ 1])
        session.add(row)


async def test_a_data_key_moved_to_another_id_stops_the_start(database: Database) -> None:
    await open_sealer(database, a_keyring())
    await database.transaction(lambda session: session.execute(sa.text("UPDATE data_keys SET id = 'dk_x'")) and None)
    with pytest.raises(SettingsError, match="dk_x"):
        await open_sealer(database, a_keyring())


async def test_where_no_data_key_is_current_a_new_one_is_made_and_the_old_ones_open(database: Database) -> None:
    first = await open_sealer(database, a_keyring())
    envelope = first.seal(b"hello", owner="o", purpose="p", version=1)
    await database.transaction(lambda session: session.execute(sa.update(DataKey).values(current=False)) and None)
    second = await open_sealer(database, a_keyring())
    assert second.current_key_id != first.current_key_id
    assert second.open(envelope, owner="o", purpose="p", version=1) == b"hello"


async def test_many_starts_at_once_end_with_one_data_key(database: Database) -> None:
    sealers = await asyncio.gather(*(open_sealer(database, a_keyring()) for _ in range(8)))
    [row] = await data_keys(database)
    assert {sealer.current_key_id for sealer in sealers} == {row.id}


START = """
import asyncio, json, sys
from pathlib import Path
from broker.database import open_database
from broker.settings import Settings
from broker.vault.keyring import load_keyring, open_sealer

async def main():
    settings = Settings(env="development", data_dir=Path(sys.argv[1]))
    database = open_database(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    keyring = load_keyring(settings)
    sealer = await open_sealer(database, keyring)
    sealed = sealer.seal(b"hello", owner="o", purpose="p", version=1)
    print(json.dumps([keyring.ids, sealer.current_key_id, sealed.hex()]))
    await database.aclose()

asyncio.run(main())
"""


async def test_two_processes_that_start_at_once_agree_on_keyring_and_data_key(sqlite_url: str, tmp_path: Path) -> None:
    pipe = asyncio.subprocess.PIPE
    data_dir = tmp_path / "data"
    starts = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", START, str(data_dir), sqlite_url, stdin=pipe, stdout=pipe, cwd=ROOT
        )
        for _ in range(2)
    ]
    for start in starts:
        assert start.stdout is not None
        assert await start.stdout.readline() == b"ready\n"
    answers = await asyncio.gather(*(start.communicate(b"go\n") for start in starts))
    assert [start.returncode for start in starts] == [0, 0]
    (ids, current, first), (other_ids, other_current, second) = (json.loads(out) for out, _ in answers)
    assert (ids, current) == (other_ids, other_current)
    assert first != second
    assert [path.name for path in data_dir.iterdir()] == ["keyring"]


# --- other replicas, while running ------------------------------------------------------------------------------------


async def test_a_refresh_loads_what_another_replica_made(database: Database) -> None:
    keyring = a_keyring()
    here = await open_sealer(database, keyring)
    old = here.seal(b"old", owner="o", purpose="p", version=1)
    await database.transaction(lambda session: session.add(a_data_key("dk_new", keyring)))
    there = await open_sealer(database, keyring)
    new = there.seal(b"new", owner="o", purpose="p", version=2)
    with refused():
        here.open(new, owner="o", purpose="p", version=2)
    await here.refresh(database)
    assert here.current_key_id == "dk_new"
    assert here.open(new, owner="o", purpose="p", version=2) == b"new"
    assert here.open(old, owner="o", purpose="p", version=1) == b"old"


async def test_a_refresh_reads_the_keyring_file_again_for_a_key_that_it_lacks(
    database: Database, tmp_path: Path
) -> None:
    path = written(tmp_path / "keys", entry("k1", 1))
    here = await open_sealer(database, load_keyring(production(path)))
    written(path, entry("k2", 2), entry("k1", 1))
    await database.transaction(lambda session: session.add(a_data_key("dk_new", load_keyring(production(path)))))
    await here.refresh(database)
    assert here.current_key_id == "dk_new"


async def test_a_refresh_leaves_out_what_does_not_unwrap_and_keeps_the_rest(database: Database, tmp_path: Path) -> None:
    path = written(tmp_path / "keys", entry("k1", 1))
    keyring = load_keyring(production(path))
    here = await open_sealer(database, keyring)
    current = here.current_key_id
    damaged = a_data_key("dk_damaged", keyring)
    damaged.wrapped = b"\0" + damaged.wrapped
    lacking = a_data_key("dk_lacking", a_keyring(entry("k9", 9)))
    good = a_data_key("dk_good", keyring, created_at=1.0)
    await database.transaction(lambda session: session.add_all([damaged, lacking, good]))
    path.write_text("being written")
    await here.refresh(database)
    assert here.current_key_id == current
    named: dict[str, Any] = {"owner": "o", "purpose": "p", "version": 1}
    assert here.open(a_sealer("dk_good", 5).seal(b"value", **named), **named) == b"value"
    for absent in ("dk_damaged", "dk_lacking"):
        with pytest.raises(SecretUnreadable):
            here.open(a_sealer(absent, 5).seal(b"value", **named), **named)


async def test_a_refresh_without_a_current_data_key_keeps_the_one_it_has(database: Database) -> None:
    here = await open_sealer(database, a_keyring())
    current = here.current_key_id
    await database.transaction(lambda session: session.execute(sa.update(DataKey).values(current=False)) and None)
    await here.refresh(database)
    assert here.current_key_id == current


# --- one data key after the other -------------------------------------------------------------------------------------


async def added(database: Database, wrapping: Keyring) -> str:
    """Add a next data key and return its id."""
    row, _ = await new_data_key(wrapping)

    def work(session: Session) -> None:
        require_live_wrapping_key(session, row.wrapped_by)
        row.created_at = now(session)
        session.add(row)

    await database.transaction(work)
    return row.id


async def switched(database: Database, key_id: str) -> None:
    def work(session: Session) -> None:
        for row in session.exec(select(DataKey)):
            row.current = row.id == key_id
            row.activated_at = now(session) if row.current else row.activated_at
            session.add(row)

    await database.transaction(work)


async def retired(database: Database, key_id: str) -> None:
    """Retire and shred a data key, as a rotation does once nothing is left under it."""

    def work(session: Session) -> None:
        row = session.exec(select(DataKey).where(DataKey.id == key_id).with_for_update()).one()
        row.current, row.retired_at, row.wrapped = False, now(session), b""
        session.add(row)

    await database.transaction(work)


async def sealed_by(sealer: Sealer, database: Database) -> bytes:
    """Return what a write of this sealer came to."""

    def work(session: Session, seal: Seal) -> bytes:
        session.connection()
        return seal(b"hello", owner="o", purpose="p", version=1)

    return await sealer.write(database, work)


async def test_a_next_data_key_opens_everywhere_before_it_seals_anywhere(database: Database) -> None:
    keyring = a_keyring()
    here = await open_sealer(database, keyring)
    first = here.current_key_id
    following = await added(database, keyring)
    await here.refresh(database)
    started_now = await open_sealer(database, keyring)
    for sealer in (here, started_now):
        assert sealer.current_key_id == first
        assert set(sealer.key_ids) == {first, following}
    await switched(database, following)
    envelope = await sealed_by(here, database)
    assert Sealer.key_id_of(envelope) == first, "it has not heard of the switch, and the old key is still live"
    await here.refresh(database)
    assert here.current_key_id == following
    assert here.open(envelope, owner="o", purpose="p", version=1) == b"hello"


async def test_of_two_data_keys_the_one_that_was_switched_to_last_is_current(database: Database) -> None:
    keyring = a_keyring()
    here = await open_sealer(database, keyring)
    made_last = a_data_key("dk_made_last", keyring, created_at=3e9)
    switched_to_last = a_data_key("dk_switched_to_last", keyring, created_at=1.0)
    made_last.activated_at, switched_to_last.activated_at = 3e9, 4e9
    await database.transaction(lambda session: session.add_all([made_last, switched_to_last]))
    await here.refresh(database)
    assert here.current_key_id == "dk_switched_to_last"


async def test_what_is_under_a_retired_data_key_opens_no_more(database: Database) -> None:
    keyring = a_keyring()
    here = await open_sealer(database, keyring)
    first, envelope = here.current_key_id, await sealed_by(here, database)
    await switched(database, await added(database, keyring))
    await retired(database, first)
    assert here.open(envelope, owner="o", purpose="p", version=1) == b"hello"
    await here.refresh(database)
    with refused():
        here.open(envelope, owner="o", purpose="p", version=1)
    assert first not in here.key_ids
    assert first not in (await open_sealer(database, keyring)).key_ids


async def test_a_process_that_slept_through_a_rotation_writes_under_the_new_key(database: Database) -> None:
    keyring = a_keyring()
    asleep = await open_sealer(database, keyring)
    first = asleep.current_key_id
    following = await added(database, keyring)
    await switched(database, following)
    await retired(database, first)
    assert asleep.current_key_id == first
    assert Sealer.key_id_of(await sealed_by(asleep, database)) == following
    assert asleep.current_key_id == following


async def test_nothing_is_written_where_every_data_key_was_retired(database: Database) -> None:
    here = await open_sealer(database, a_keyring())
    await retired(database, here.current_key_id)
    ran: list[str] = []

    def work(_session: Session, _seal: Seal) -> None:
        ran.append("work")

    with pytest.raises(KeyRetired):
        await here.write(database, work)
    with pytest.raises(SecretStoreUnavailable):
        here.seal(b"hello", owner="o", purpose="p", version=1)
    assert ran == []


async def test_a_data_key_that_is_not_in_the_database_seals_nothing(database: Database) -> None:
    await open_sealer(database, a_keyring())
    with pytest.raises(KeyRetired):
        await database.transaction(lambda session: require_live_key(session, "dk_made_up"))


async def test_a_retired_key_encryption_key_wraps_no_data_key(database: Database) -> None:
    keyring = a_keyring(entry("k1", 1))
    await open_sealer(database, keyring)
    await added(database, keyring)
    await database.transaction(lambda session: session.execute(sa.update(KeyCheck).values(retired_at=1.0)) and None)
    with pytest.raises(KeyRetired):
        await added(database, keyring)
    await open_sealer(database, keyring)  # it still opens, for what was restored


async def test_a_start_that_would_wrap_the_first_data_key_by_a_retired_key_is_refused(database: Database) -> None:
    old = KeyCheck(key_id="k1", check_value=check_value(a_keyring().newest), created_at=1.0, retired_at=2.0)
    await database.transaction(lambda session: session.add(old))
    with pytest.raises(SettingsError, match=r"\bk1 was retired"):
        await open_sealer(database, a_keyring())
    assert await data_keys(database) == []


# --- key-encryption keys that are elsewhere ---------------------------------------------------------------------------


class Elsewhere:
    """Key-encryption keys behind a door: a keyring that can be out of reach."""

    def __init__(self, *entries: str) -> None:
        self.keyring = a_keyring(*entries)
        self.out_of_reach = False

    ids = property(lambda self: self.keyring.ids)
    newest_id = property(lambda self: self.keyring.newest_id)

    def check_value(self, key_id: str) -> str | None:
        return "" if key_id in self.keyring.ids else None

    async def wrap(self, data_key_id: str, data_key: bytes) -> tuple[str, bytes]:
        await self._reached()
        return await self.keyring.wrap(data_key_id, data_key)

    async def unwrap(self, wrapped_by: str, data_key_id: str, wrapped: bytes) -> bytes:
        await self._reached()
        return await self.keyring.unwrap(wrapped_by, data_key_id, wrapped)

    async def reload(self) -> bool:
        await self._reached()
        return False

    async def _reached(self) -> None:
        await asyncio.sleep(0)
        if self.out_of_reach:
            raise SecretStoreUnavailable


async def test_a_start_while_the_keys_are_out_of_reach_fails_and_writes_nothing(database: Database) -> None:
    elsewhere = Elsewhere()
    elsewhere.out_of_reach = True
    with pytest.raises(SecretStoreUnavailable):
        await open_sealer(database, elsewhere)
    assert await data_keys(database) == []
    elsewhere.out_of_reach = False
    here = await open_sealer(database, elsewhere)
    assert await checks(database) == {"k1": ""}
    elsewhere.out_of_reach = True
    with pytest.raises(SecretStoreUnavailable):
        await open_sealer(database, elsewhere)
    assert Sealer.key_id_of(await sealed_by(here, database)) == here.current_key_id


async def test_a_refresh_while_the_keys_are_out_of_reach_says_so_and_keeps_and_drops_what_it_can(
    database: Database,
) -> None:
    elsewhere = Elsewhere()
    here = await open_sealer(database, elsewhere)
    first, older = here.current_key_id, await added(database, elsewhere.keyring)
    await here.refresh(database)
    newer = await added(database, elsewhere.keyring)
    await retired(database, older)
    elsewhere.out_of_reach = True
    with pytest.raises(SecretStoreUnavailable):
        await here.refresh(database)
    assert here.key_ids == (first,)
    elsewhere.out_of_reach = False
    await here.refresh(database)
    assert set(here.key_ids) == {first, newer}


async def test_a_refresh_that_cannot_look_for_a_new_key_encryption_key_says_so(database: Database) -> None:
    elsewhere = Elsewhere()
    here = await open_sealer(database, elsewhere)
    first, _ = here.current_key_id, await added(database, a_keyring(entry("k2", 2)))
    elsewhere.out_of_reach = True
    with pytest.raises(SecretStoreUnavailable):
        await here.refresh(database)
    assert (here.key_ids, here.current_key_id) == ((first,), first)


async def test_starts_at_once_agree_on_one_data_key_also_where_wrapping_takes_a_while(database: Database) -> None:
    sealers = await asyncio.gather(*(open_sealer(database, Elsewhere()) for _ in range(8)))
    [row] = await data_keys(database)
    assert {sealer.current_key_id for sealer in sealers} == {row.id}


async def test_two_starts_at_once_with_different_keys_under_one_id_do_not_both_succeed(database: Database) -> None:
    starts = [open_sealer(database, a_keyring(entry("k1", seed))) for seed in (1, 2)]
    refusals = [one for one in await asyncio.gather(*starts, return_exceptions=True) if isinstance(one, SettingsError)]
    assert len(refusals) == 1
    assert len(await data_keys(database)) == 1
