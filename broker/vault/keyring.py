"""Keys and envelopes: the keyring's keys wrap data keys, data keys seal values with AES-256-GCM for one owner and version.

Three rings, each opened by the one outside it::

    key-encryption keys   from the operator (keyring, or a ``Wrapping`` elsewhere), never in the database
      └── data keys       random, in table ``data_keys``, wrapped by a key-encryption key
            └── values    envelopes in ``sealed_*`` columns (``broker.vault.sealed_places``)

Every key can be replaced while the broker runs. A data key is next, then current, then previous, then retired, and a day
later shredded; what is written is under a live one, which ``Sealer.write`` has looked up in the same transaction
(``broker.vault.floor``).

A key is never used for two things: what wraps, seals, checks or authenticates is derived from it by HKDF-SHA256 (RFC 5869).
An envelope is ``format (1) | length of key id (1) | key id | version (8) | nonce (12) | ciphertext | tag (16)``; the
associated data binds format, owner, purpose, version and key id, each with its length in front, so that no two different
sets of them have the same bytes. Nonces are random: seal at most 2^32 values under one data key, then rotate.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hmac
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlmodel import Session, select

from broker.database import Database, now
from broker.errors import SecretStoreUnavailable
from broker.models import DataKey, KeyCheck, new_id
from broker.settings import Settings, SettingsError
from broker.vault import SecretUnreadable
from broker.vault.floor import KeyRetired, require_live_key, require_live_wrapping_key

FORMAT = 1
KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
VERSION_BYTES = 8
LARGEST_KEYRING_BYTES = 64 * 1024
DATA_KEYS_LOCK = 0x4B455953  # "KEYS": one process at a time makes the first data key on PostgreSQL
DEVELOPMENT_FILE = "keyring"
EITHER = "BROKER_KEYRING or BROKER_KEYRING_FILE"
_ENTRY = re.compile(r"([a-z0-9-]{1,32}):([A-Za-z0-9+/]{43}=)")
T = TypeVar("T")


class Wrapping(Protocol):
    """Key-encryption keys, wherever they are: what wraps and unwraps data keys. Calls may run at once.

    An id names one key for ever.
    """

    @property
    def ids(self) -> tuple[str, ...]:
        """Every key that can unwrap, newest first, as of the start or the last ``reload``."""

    @property
    def newest_id(self) -> str:
        """The key that wraps what is new."""

    def check_value(self, key_id: str) -> str | None:
        """Return what the database keeps, to tell another key under the same id; None for an id that is not here.

        ``""`` where there is one place for the key, so that no replica can have another.
        """

    async def wrap(self, data_key_id: str, data_key: bytes) -> tuple[str, bytes]:
        """Return (key id, wrapped) by the newest key, bound to both ids. Raises ``SecretStoreUnavailable``."""

    async def unwrap(self, wrapped_by: str, data_key_id: str, wrapped: bytes) -> bytes:
        """Return the data key.

        Raises ``SecretUnreadable`` unless it was wrapped by exactly this key, which is here, for exactly this id, and
        ``SecretStoreUnavailable`` when that cannot be found out now.
        """

    async def reload(self) -> bool:
        """Look which keys there are by now; return whether anything changed.

        Raises ``SettingsError`` or ``SecretStoreUnavailable``: then nothing changes.
        """


class Seal(Protocol):
    """Seals bytes as ``Sealer.seal`` does, under one data key that was live when it was given."""

    def __call__(self, plaintext: bytes, *, owner: str, purpose: str, version: int) -> bytes:
        """Return an envelope."""


@dataclass(frozen=True, slots=True, eq=False)
class KeyEncryptionKey:
    """One key of the keyring: 32 bytes that cannot print themselves."""

    id: str
    key: bytes = field(repr=False)


class Keyring:
    """The operator's keys, newest first: a ``Wrapping``. ``repr`` shows ids only. Reading is safe while ``reload`` runs."""

    __slots__ = ("_keys", "_read_again")

    def __init__(
        self, keys: Sequence[KeyEncryptionKey], read_again: Callable[[], tuple[KeyEncryptionKey, ...]] | None = None
    ) -> None:
        """Keep at least one key, newest first; ``read_again`` reads the source anew (None: it cannot change)."""
        if not keys:
            raise ValueError("a keyring needs a key")
        self._keys = {key.id: key for key in keys}
        self._read_again = read_again

    @property
    def newest(self) -> KeyEncryptionKey:
        """The key that wraps new data keys."""
        return next(iter(self._keys.values()))

    @property
    def ids(self) -> tuple[str, ...]:
        """Every key id, newest first."""
        return tuple(self._keys)

    @property
    def newest_id(self) -> str:
        """See ``Wrapping``."""
        return self.newest.id

    def get(self, key_id: str) -> KeyEncryptionKey | None:
        """Return the key of that id, None when the keyring lacks it."""
        return self._keys.get(key_id)

    def check_value(self, key_id: str) -> str | None:
        """See ``Wrapping``."""
        key = self.get(key_id)
        return None if key is None else check_value(key)

    async def wrap(self, data_key_id: str, data_key: bytes) -> tuple[str, bytes]:
        """See ``Wrapping``. Nothing is awaited."""
        key = self.newest
        return key.id, wrap_data_key(key, data_key_id, data_key)

    async def unwrap(self, wrapped_by: str, data_key_id: str, wrapped: bytes) -> bytes:
        """See ``Wrapping``. Nothing is awaited."""
        key = self.get(wrapped_by)
        if key is None:
            raise SecretUnreadable("the data key does not open")
        return unwrap_data_key(key, data_key_id, wrapped)

    async def reload(self) -> bool:
        """Read the file again, on a thread, and take its keys and their order; return whether anything changed.

        Raises ``SettingsError`` when the file is refused or has another key under a known id: then nothing changes.
        A keyring from ``BROKER_KEYRING`` cannot change: False.
        """
        if self._read_again is None:
            return False
        keys = {key.id: key for key in await asyncio.to_thread(self._read_again)}
        for key_id in keys.keys() & self._keys.keys():
            if not hmac.compare_digest(keys[key_id].key, self._keys[key_id].key):
                raise SettingsError(f"BROKER_KEYRING_FILE: the key {key_id} changed; give a new key a new id")
        changed = tuple(keys) != self.ids
        self._keys = keys
        return changed

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self.ids)})"


def parse_keys(text: str, *, setting: str) -> tuple[KeyEncryptionKey, ...]:
    """Return the keys of ``id:base64,id:base64`` or one per line, newest first.

    Ids are 1 to 32 of a-z, 0-9, ``-``; keys are 32 bytes in standard base64; neither may occur twice. Anything else raises
    ``SettingsError`` with the ``setting``'s name and the entry's position, never with the text: it may be a misplaced key.
    """
    lines = [line for line in text.strip().splitlines() if line.strip()]
    keys = tuple(
        _parse_entry(entry.strip(), f"{setting}: entry {position}")
        for position, entry in enumerate((entry for line in lines for entry in line.split(",")), start=1)
    )
    if not keys:
        raise SettingsError(f"{setting} holds no key; write id:base64 with 32 bytes (openssl rand -base64 32)")
    if len({key.id for key in keys}) < len(keys):
        raise SettingsError(f"{setting}: two entries have the same id")
    if len({key.key for key in keys}) < len(keys):
        raise SettingsError(f"{setting}: two entries have the same key")
    return keys


def _parse_entry(entry: str, place: str) -> KeyEncryptionKey:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise SettingsError(f"{place} is not id:base64 with an id of 1 to 32 of a-z, 0-9, - and a key of 32 bytes")
    key = base64.b64decode(match[2], validate=True)
    if base64.b64encode(key).decode() != match[2]:
        raise SettingsError(f"{place} ends in base64 bits that belong to no byte: is it cut or mistyped?")
    return KeyEncryptionKey(match[1], key)


def load_keyring(settings: Settings) -> Keyring:
    """Return the keyring of ``BROKER_KEYRING`` or ``BROKER_KEYRING_FILE``; in development one is made in the data directory.

    Raises ``SettingsError`` for a missing, unreadable or malformed keyring, and in production for a file that others may
    read or the group may write (a Kubernetes secret needs ``defaultMode: 0440`` or stricter). The made file is 0600 and
    complete from its first moment; of several processes that start at once one makes it and all read the same.
    """
    if settings.keyring is not None:
        return Keyring(parse_keys(settings.keyring.reveal(), setting="BROKER_KEYRING"))
    path = settings.keyring_file
    if path is None:
        if not settings.development:
            raise SettingsError(f"{EITHER} is required in production")
        path = settings.data_dir / DEVELOPMENT_FILE
        _make_keyring_file(path)
    read = partial(_read_keys, path, strict=not settings.development)
    return Keyring(read(), read)


def has_keyring(settings: Settings) -> bool:
    """Return whether there is a keyring, be it one that was made in development; nothing is made."""
    made = settings.development and (settings.data_dir / DEVELOPMENT_FILE).exists()
    return made or settings.keyring is not None or settings.keyring_file is not None


def _make_keyring_file(path: Path) -> None:
    """Write a fresh key beside ``path``, then link it there: nobody ever sees half a file, and the first one wins."""
    if path.exists():
        return
    entry = f"dev-{secrets.token_hex(4)}:{base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".keyring-")  # mode 0600
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(entry)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process was first: its keys count
                os.link(draft, path)
        finally:
            Path(draft).unlink()
    except OSError:
        raise SettingsError("BROKER_DATA_DIR: the keyring cannot be written there; set BROKER_KEYRING_FILE") from None


def _read_keys(path: Path, *, strict: bool) -> tuple[KeyEncryptionKey, ...]:
    setting = "BROKER_KEYRING_FILE"
    try:
        if not path.is_file():  # a pipe would block, a directory cannot be read
            raise SettingsError(f"{setting} is not a file")
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(LARGEST_KEYRING_BYTES + 1)
    except OSError:
        raise SettingsError(f"{setting} cannot be read") from None
    if strict and mode & 0o037:
        raise SettingsError(f"{setting} is open to others: its mode is {mode:04o}, allowed are 0600, 0400 and 0440")
    if len(content) > LARGEST_KEYRING_BYTES:
        raise SettingsError(f"{setting} is larger than {LARGEST_KEYRING_BYTES} bytes")
    return parse_keys(content.decode("utf-8", "replace"), setting=setting)


def derive_key(root: bytes, purpose: str) -> bytes:
    """Return 32 bytes for one purpose, by HKDF-SHA256 (RFC 5869) from at least 32 random bytes (else ValueError).

    Two purposes give unrelated keys, and none says anything about the root. No purpose gives a key that this module uses.
    """
    return _derive(root, b"purpose", purpose)


def _derive(root: bytes, area: bytes, purpose: str) -> bytes:
    if len(root) < KEY_BYTES:
        raise ValueError("a root key has at least 32 bytes")
    info = _joined(b"credential-broker", area, _encoded(purpose))
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(root)


def check_value(key: KeyEncryptionKey) -> str:
    """Return what the database keeps to tell whether a replica has the same key: hex, one-way, bound to the id."""
    return _derive(key.key, b"key check", key.id).hex()


def wrap_data_key(key: KeyEncryptionKey, data_key_id: str, data_key: bytes) -> bytes:
    """Return the data key sealed by a key-encryption key, bound to both ids: ``format | nonce | ciphertext | tag``."""
    nonce = os.urandom(NONCE_BYTES)
    bound = _joined(bytes([FORMAT]), _encoded(data_key_id), _encoded(key.id))
    return bytes([FORMAT]) + nonce + AESGCM(_derive(key.key, b"wrap", "")).encrypt(nonce, data_key, bound)


def unwrap_data_key(key: KeyEncryptionKey, data_key_id: str, wrapped: bytes) -> bytes:
    """Return the data key; ``SecretUnreadable`` unless it was wrapped by exactly this key for exactly this id."""
    if not isinstance(wrapped, bytes) or wrapped[:1] != bytes([FORMAT]):
        raise SecretUnreadable("the data key does not open")
    bound = _joined(bytes([FORMAT]), _encoded(data_key_id), _encoded(key.id))
    nonce, ciphertext = wrapped[1 : 1 + NONCE_BYTES], wrapped[1 + NONCE_BYTES :]
    if len(ciphertext) != KEY_BYTES + TAG_BYTES:
        raise SecretUnreadable("the data key does not open")
    try:
        return AESGCM(_derive(key.key, b"wrap", "")).decrypt(nonce, ciphertext, bound)
    except InvalidTag:
        raise SecretUnreadable("the data key does not open") from None


class Sealer:
    """Seals and opens bytes under the data keys. Calls may run at once, also from several threads.

    ``repr`` shows key ids only. Made by ``open_sealer``.
    """

    __slots__ = ("_current", "_keys", "_wrapping")

    def __init__(self, wrapping: Wrapping, data_keys: Mapping[str, bytes], current_key_id: str) -> None:
        """Keep opened data keys by id; ``current_key_id`` (one of them, else ValueError) seals what is new."""
        if current_key_id not in data_keys:
            raise ValueError("the current data key is not among the opened ones")
        self._wrapping = wrapping
        self._keys = {key_id: _cipher_of(root) for key_id, root in data_keys.items()}
        self._current = current_key_id

    @property
    def current_key_id(self) -> str:
        """The data key that seals what is new."""
        return self._current

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Every data key that is loaded here."""
        return tuple(self._keys)

    def seal(self, plaintext: bytes, *, owner: str, purpose: str, version: int) -> bytes:
        """Return an envelope that opens for exactly this owner, purpose and version (0 to 2^63-1, else ValueError).

        Whoever writes it to a row asks ``require_live_key`` in the same transaction; ``write`` does both. Raises
        ``SecretStoreUnavailable`` when the current key was retired and its successor could not be loaded.
        """
        return self._sealed(self._current, plaintext, owner=owner, purpose=purpose, version=version)

    def _sealed(self, key_id: str, plaintext: bytes, *, owner: str, purpose: str, version: int) -> bytes:
        if not 0 <= version < 1 << 63:
            raise ValueError("a version is between 0 and 2^63-1")
        key = self._keys.get(key_id)
        if key is None:
            raise SecretStoreUnavailable("the current data key is not loaded here")
        nonce = os.urandom(NONCE_BYTES)
        bound = _bound(owner, purpose, version, key_id)
        return _header(key_id, version) + nonce + key.encrypt(nonce, plaintext, bound)

    async def write(self, database: Database, work: Callable[[Session, Seal], T]) -> T:
        """Run ``work`` in one transaction; what it seals with the function that it is given is under a live data key.

        Where this process did not know that its current key was retired, it loads the new one and begins once more, before
        ``work`` has begun. Raises ``KeyRetired`` when there is none, and what ``Database.transaction`` and ``refresh`` raise.
        """
        with contextlib.suppress(KeyRetired):
            return await database.transaction(partial(self._above_the_floor, work))
        await self.refresh(database)
        return await database.transaction(partial(self._above_the_floor, work))

    def _above_the_floor(self, work: Callable[[Session, Seal], T], session: Session) -> T:
        key_id = self._current
        require_live_key(session, key_id)
        return work(session, partial(self._sealed, key_id))

    def open(self, sealed: bytes, *, owner: str, purpose: str, version: int) -> bytes:
        """Return the plaintext; ``SecretUnreadable``, in one shape whatever is wrong, and never another exception.

        A key id that is unknown here may be a new one of another replica: ``open_fresh`` loads it.
        """
        return self._opened(_parsed(sealed), owner, purpose, version)

    def _opened(self, parts: tuple[str, int, bytes, bytes], owner: str, purpose: str, version: int) -> bytes:
        key_id, sealed_version, nonce, ciphertext = parts
        key = self._keys.get(key_id)
        if key is None or sealed_version != version:
            raise SecretUnreadable("the sealed value does not open")
        try:
            return key.decrypt(nonce, ciphertext, _bound(owner, purpose, sealed_version, key_id))
        except InvalidTag:
            raise SecretUnreadable("the sealed value does not open") from None

    async def open_fresh(self, database: Database, sealed: bytes, *, owner: str, purpose: str, version: int) -> bytes:
        """Do what ``open`` does, after one ``refresh`` when the envelope names a data key that is not loaded here.

        Raises ``SecretUnreadable``, and what ``refresh`` raises when it was needed and failed.
        """
        parts = _parsed(sealed)
        if parts[0] not in self._keys:
            await self.refresh(database)
        return self._opened(parts, owner, purpose, version)

    @staticmethod
    def key_id_of(sealed: bytes) -> str:
        """Return the data-key id that an envelope names, unverified; ``SecretUnreadable`` when it is no envelope."""
        return _parsed(sealed)[0]

    def knows(self, sealed: bytes) -> bool:
        """Return whether the data key that the envelope names is loaded; True for what is no envelope at all."""
        try:
            return self.key_id_of(sealed) in self._keys
        except SecretUnreadable:
            return True

    async def refresh(self, database: Database) -> None:
        """Load data keys that other replicas made since, see which one is current, and drop what was retired.

        Key-encryption keys are looked for anew if need be. A data key that does not unwrap is left out: what it sealed stays
        unreadable, everything else goes on. What was retired does not open here from now on. May run at once with every
        other call. Raises ``DatabaseUnavailable``, and ``SecretStoreUnavailable`` when a data key could not be asked for:
        after everything else was done; the keys known stay usable.
        """
        rows = await database.read(_data_key_rows)
        live = [row for row in rows if row.retired_at is None]
        fresh = [row for row in live if row.id not in self._keys]
        failure = await self._look_for_keys(fresh)
        found: dict[str, AESGCM] = {}
        for row in fresh:
            try:
                with contextlib.suppress(SecretUnreadable):
                    found[row.id] = _cipher_of(await self._wrapping.unwrap(row.wrapped_by, row.id, row.wrapped))
            except SecretStoreUnavailable as error:
                failure = error
        retired = {row.id for row in rows} - {row.id for row in live}
        keys = {key_id: key for key_id, key in {**self._keys, **found}.items() if key_id not in retired}
        self._keys, self._current = keys, _current_id(row for row in live if row.id in keys) or self._current
        if failure is not None:
            raise failure

    async def _look_for_keys(self, fresh: Iterable[DataKey]) -> SecretStoreUnavailable | None:
        """Reload the key-encryption keys where one that wraps a fresh data key is not known; return what failed."""
        known = set(self._wrapping.ids)
        try:
            if any(row.wrapped_by not in known for row in fresh):
                with contextlib.suppress(SettingsError):  # a broken file must not take away the keys that we have
                    await self._wrapping.reload()
        except SecretStoreUnavailable as error:
            return error
        return None

    def __repr__(self) -> str:
        return f"Sealer(current={self._current}, keys={len(self._keys)})"


def _cipher_of(root: bytes) -> AESGCM:
    """Return a data key's cipher, to be kept: making one costs as much as sealing a kilobyte. The key itself is not kept."""
    return AESGCM(_derive(root, b"seal", ""))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # every str has its own bytes, and none raises


def _joined(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _bound(owner: str, purpose: str, version: int, key_id: str) -> bytes:
    """Return the associated data of a value: format, owner, purpose, version and key id, each behind its length."""
    owned, number = _encoded(owner), version.to_bytes(VERSION_BYTES, "big")
    return b"".join(
        (_FORMAT_PART, len(owned).to_bytes(4, "big"), owned, _part(purpose), _VERSION_LENGTH, number, _part(key_id))
    )


@functools.lru_cache(256)  # purposes and key ids are few
def _part(text: str) -> bytes:
    return _joined(_encoded(text))


_FORMAT_PART = _joined(bytes([FORMAT]))
_VERSION_LENGTH = VERSION_BYTES.to_bytes(4, "big")


def _header(key_id: str, version: int) -> bytes:
    return envelope_prefix(key_id) + version.to_bytes(VERSION_BYTES, "big")


def envelope_prefix(key_id: str) -> bytes:
    """Return what every envelope under this data key begins with, and no other."""
    name = _encoded(key_id)
    return bytes([FORMAT, len(name)]) + name


def sealed_version(sealed: bytes) -> int:
    """Return the version that an envelope names, unverified; ``SecretUnreadable`` when it is no envelope."""
    return _parsed(sealed)[1]


def _parsed(sealed: bytes) -> tuple[str, int, bytes, bytes]:
    """Return (key id, version, nonce, ciphertext with tag) of an envelope; nothing of it is verified yet."""
    # SQLite gives back text where somebody wrote text, whatever the column's type is.
    if not isinstance(sealed, bytes) or len(sealed) < 2 or sealed[0] != FORMAT:
        raise SecretUnreadable("the sealed value does not open")
    version_at = 2 + sealed[1]
    nonce_at = version_at + VERSION_BYTES
    ciphertext_at = nonce_at + NONCE_BYTES
    if len(sealed) < ciphertext_at + TAG_BYTES:
        raise SecretUnreadable("the sealed value does not open")
    key_id = sealed[2:version_at].decode("utf-8", "replace")
    version = int.from_bytes(sealed[version_at:nonce_at], "big")
    return key_id, version, sealed[nonce_at:ciphertext_at], sealed[ciphertext_at:]


async def open_sealer(database: Database, wrapping: Wrapping) -> Sealer:
    """Check the key-encryption keys against the database, make the first data key if there is none, and open all of them.

    Raises ``SettingsError`` with the key id when the keyring lacks a key that wraps a data key or has another one under its
    id, when a data key is damaged, or when one would have to be wrapped by a key that was retired; then nothing was written.
    Keys that nothing uses are fine. Processes that start at once end with the same current data key. Raises
    ``DatabaseUnavailable``, and ``SecretStoreUnavailable`` when the keys are elsewhere and cannot be asked for.
    """
    while True:
        rows, known_checks = await database.read(_known)
        _refuse_lacking(wrapping, rows)
        _refuse_wrong_keys(wrapping, known_checks)
        data_keys = {row.id: await _unwrapped(wrapping, row) for row in rows}
        current, made = _current_id(rows), None
        if current is None:
            made, root = await new_data_key(wrapping)
            current, data_keys[made.id] = made.id, root
        in_use = {row.wrapped_by for row in (*rows, *filter(None, (made,)))}
        checks = _new_checks(wrapping, in_use, known_checks)
        if await _recorded(database, made, checks):
            return Sealer(wrapping, data_keys, current)


async def new_data_key(wrapping: Wrapping) -> tuple[DataKey, bytes]:
    """Return a random data key as a row that is not in the database yet, and as bytes: a next one, without times.

    Who inserts it asks ``require_live_wrapping_key`` in the same transaction. Raises ``SecretStoreUnavailable``.
    """
    data_key_id, data_key = new_id("dk"), secrets.token_bytes(KEY_BYTES)
    wrapped_by, wrapped = await wrapping.wrap(data_key_id, data_key)
    return DataKey(id=data_key_id, wrapped_by=wrapped_by, wrapped=wrapped, current=False), data_key


def _data_key_rows(session: Session) -> list[DataKey]:
    return list(session.exec(select(DataKey)))


def _known(session: Session) -> tuple[list[DataKey], dict[str, str]]:
    """Return the data keys that were not retired, and the check values by key-encryption key."""
    rows = [row for row in _data_key_rows(session) if row.retired_at is None]
    return rows, {row.key_id: row.check_value for row in session.exec(select(KeyCheck))}


def _current_id(rows: Iterable[DataKey]) -> str | None:
    """Return the data key that became current last; equal times are decided by the id, the same everywhere."""
    marked = [(row.activated_at or row.created_at, row.id) for row in rows if row.current]
    return max(marked)[1] if marked else None


def _refuse_lacking(wrapping: Wrapping, rows: Iterable[DataKey]) -> None:
    lacking = sorted({row.wrapped_by for row in rows} - set(wrapping.ids))
    if lacking:
        raise SettingsError(f"{EITHER} lacks the key {', '.join(lacking)}, which wraps data keys of the database")


def _refuse_wrong_keys(wrapping: Wrapping, known_checks: Mapping[str, str]) -> None:
    for key_id, known in known_checks.items():
        here = wrapping.check_value(key_id)
        if here is not None and not hmac.compare_digest(here.encode(), known.encode()):
            raise SettingsError(f"{EITHER}: the key {key_id} is not the one that the database knows by this id")


async def _unwrapped(wrapping: Wrapping, row: DataKey) -> bytes:
    try:
        return await wrapping.unwrap(row.wrapped_by, row.id, row.wrapped)
    except SecretUnreadable:
        raise SettingsError(
            f"{EITHER}: the data key {row.id} does not open with the key {row.wrapped_by}: "
            "that key is another one, or the row is damaged"
        ) from None


def _new_checks(wrapping: Wrapping, in_use: Iterable[str], known_checks: Mapping[str, str]) -> dict[str, str]:
    """Return the check values that the database lacks: of the keys in use, and of the newest."""
    wanted = {*in_use, wrapping.newest_id} - known_checks.keys()
    return {key_id: wrapping.check_value(key_id) or "" for key_id in wanted}


async def _recorded(database: Database, made: DataKey | None, checks: Mapping[str, str]) -> bool:
    """Write what a start found missing; False when another process was first with any of it: then all is read again."""
    if made is None and not checks:
        return True
    return await database.transaction(partial(_record, made, checks))


def _record(made: DataKey | None, checks: Mapping[str, str], session: Session) -> bool:
    if session.get_bind().dialect.name == "postgresql":  # SQLite's write transactions run one at a time anyway
        session.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": DATA_KEYS_LOCK})
    rows, known_checks = _known(session)
    if checks.keys() & known_checks.keys() or (made is not None and _current_id(rows) is not None):
        return False
    at = now(session)
    if made is not None:
        _refuse_retired(session, made.wrapped_by)
        made.current, made.created_at, made.activated_at = True, at, at
        session.add(made)
    session.add_all(KeyCheck(key_id=key_id, check_value=value, created_at=at) for key_id, value in checks.items())
    return True


def _refuse_retired(session: Session, key_id: str) -> None:
    try:
        require_live_wrapping_key(session, key_id)
    except KeyRetired:
        raise SettingsError(f"{EITHER}: the newest key {key_id} was retired; put a newer one in front of it") from None
