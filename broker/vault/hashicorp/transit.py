"""Key-encryption keys in Vault's Transit: data keys are wrapped there, so the database alone opens nothing."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re

import structlog

from broker.errors import SecretStoreUnavailable
from broker.settings import SettingsError
from broker.vault import SecretUnreadable
from broker.vault.hashicorp.adapter import Refused
from broker.vault.hashicorp.session import NOT_MOUNTED, Session
from broker.vault.keyring import Keyring

PREFIX = "transit:"
SETTING = "BROKER_VAULT_TRANSIT_KEY"
TYPES = frozenset({"aes128-gcm96", "aes256-gcm96", "chacha20-poly1305"})  # those that bind associated data
_CIPHERTEXT = re.compile(r"vault:v([1-9][0-9]{0,8}):[A-Za-z0-9+/]{38,}={0,2}")
log = structlog.get_logger()


class Transit:
    """A ``Wrapping`` of ``broker.vault.keyring``: the versions of one Transit key, ``transit:<key>:v<N>``. ``reload`` first.

    The id of a data key is bound as associated data. Calls may run at once. ``repr`` shows names only.
    """

    def __init__(self, session: Session, *, mount: str, key: str) -> None:
        """Use the key ``key`` of the engine at ``mount``; the session stays the caller's to close."""
        self._session = session
        self._mount = mount
        self._key = key
        self._versions: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """See ``Wrapping``. Versions below the key's ``min_decryption_version`` are none any more."""
        return tuple(map(self._id, self._versions))

    @property
    def newest_id(self) -> str:
        """See ``Wrapping``."""
        return self._id(self._versions[0])

    def check_value(self, key_id: str) -> str | None:
        """See ``Wrapping``."""
        return "" if key_id in self.ids else None

    def _id(self, version: int) -> str:
        return f"{PREFIX}{self._key}:v{version}"

    async def wrap(self, data_key_id: str, data_key: bytes) -> tuple[str, bytes]:
        """See ``Wrapping``. The id is that of the version which Vault took."""
        plaintext, bound = _base64(data_key), _base64(data_key_id.encode())
        try:
            answer = await self._session.call(
                lambda api: api.transit.encrypt_data(
                    self._key, plaintext=plaintext, associated_data=bound, mount_point=self._mount
                )
            )
            ciphertext = str(answer["data"]["ciphertext"])
        except (Refused, KeyError, TypeError):
            ciphertext = ""
        match = _CIPHERTEXT.fullmatch(ciphertext)
        if match is None:
            raise SecretStoreUnavailable("The secret store does not wrap data keys")
        return self._id(int(match[1])), ciphertext.encode("ascii")

    async def unwrap(self, wrapped_by: str, data_key_id: str, wrapped: bytes) -> bytes:
        """See ``Wrapping``."""
        ciphertext = wrapped.decode("ascii", "replace") if isinstance(wrapped, bytes) else ""
        match = _CIPHERTEXT.fullmatch(ciphertext)
        if match is None or wrapped_by != self._id(int(match[1])):
            raise SecretUnreadable("the data key does not open")
        bound = _base64(data_key_id.encode())
        try:
            answer = await self._session.call(
                lambda api: api.transit.decrypt_data(
                    self._key, ciphertext=ciphertext, associated_data=bound, mount_point=self._mount
                )
            )
            return base64.b64decode(answer["data"]["plaintext"], validate=True)
        except (Refused, KeyError, TypeError, binascii.Error):
            raise SecretUnreadable("the data key does not open") from None

    async def reload(self) -> bool:
        """See ``Wrapping``. ``SettingsError`` when there is no such key, or it is of another kind."""
        told = None
        try:
            answer = await self._session.call(lambda api: api.transit.read_key(self._key, mount_point=self._mount))
            told = answer["data"]
        except Refused:
            pass  # nothing there
        except SecretStoreUnavailable as error:
            if error.detail != NOT_MOUNTED:
                raise
        if told is None:
            raise SettingsError(f"{SETTING}: there is no such key at BROKER_VAULT_TRANSIT_MOUNT")
        if told["type"] not in TYPES or told["derived"]:
            raise SettingsError(f"{SETTING}: the key must be of type {', '.join(sorted(TYPES))}, and not derived")
        if not self._versions and (told["exportable"] or told["allow_plaintext_backup"]):
            log.warning("transit.key_can_be_exported", key=self._key)
        newest, oldest = int(told["latest_version"]), int(told["min_decryption_version"])
        before, self._versions = self._versions, tuple(range(newest, max(oldest, 1) - 1, -1))
        return before != self._versions

    async def rotate(self) -> str:
        """Make the next version in Vault, which wraps what is new from now on; return its id.

        Raises ``SecretStoreUnavailable``, also where the policy leaves rotation to somebody else.
        """
        with contextlib.suppress(Refused):
            await self._session.call(lambda api: api.transit.rotate_key(self._key, mount_point=self._mount))
            await self.reload()
            return self.newest_id
        raise SecretStoreUnavailable("The secret store does not rotate its key")

    async def rewrap(self, wrapped_by: str, data_key_id: str, wrapped: bytes) -> tuple[str, bytes]:
        """Return (id, wrapped) of the same data key under the newest version; raises what ``unwrap`` and ``wrap`` raise.

        Transit's own ``rewrap`` takes no associated data, in Vault 1.14 as in OpenBao.
        """
        return await self.wrap(data_key_id, await self.unwrap(wrapped_by, data_key_id, wrapped))

    def __repr__(self) -> str:
        return f"Transit({', '.join(self.ids)})"


class TransitBeforeKeyring:
    """A ``Wrapping`` for the way from the keyring to Transit: Transit wraps, both unwrap. ``repr`` shows ids only."""

    def __init__(self, transit: Transit, keyring: Keyring) -> None:
        """Keep both; ``transit`` knows its versions."""
        self._transit = transit
        self._keyring = keyring

    @property
    def ids(self) -> tuple[str, ...]:
        """See ``Wrapping``."""
        return self._transit.ids + self._keyring.ids

    @property
    def newest_id(self) -> str:
        """See ``Wrapping``."""
        return self._transit.newest_id

    def _of(self, key_id: str) -> Transit | Keyring:
        return self._transit if key_id.startswith(PREFIX) else self._keyring  # no id of a keyring has a colon

    def check_value(self, key_id: str) -> str | None:
        """See ``Wrapping``."""
        return self._of(key_id).check_value(key_id)

    async def wrap(self, data_key_id: str, data_key: bytes) -> tuple[str, bytes]:
        """See ``Wrapping``."""
        return await self._transit.wrap(data_key_id, data_key)

    async def unwrap(self, wrapped_by: str, data_key_id: str, wrapped: bytes) -> bytes:
        """See ``Wrapping``."""
        return await self._of(wrapped_by).unwrap(wrapped_by, data_key_id, wrapped)

    async def reload(self) -> bool:
        """See ``Wrapping``."""
        changed = await self._keyring.reload()
        return await self._transit.reload() or changed

    async def rotate(self) -> str:
        """See ``Transit``."""
        return await self._transit.rotate()

    def __repr__(self) -> str:
        return f"TransitBeforeKeyring({', '.join(self.ids)})"


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
