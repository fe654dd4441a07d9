"""Where secrets live: one protocol, versioned and compare-and-set, with one implementation per store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import sqlalchemy as sa

from broker.settings import Settings, SettingsError

if TYPE_CHECKING:
    from broker.database import Database
    from broker.vault.keyring import Sealer


class VaultConflict(Exception):
    """Another writer was first; ``current`` is the version that the owner has now (0: none)."""

    def __init__(self, current: int) -> None:
        """Keep the version found."""
        self.current = current
        super().__init__(f"the secret is at version {current}")


class SecretNotFound(Exception):
    """The owner has no secret at that version."""


class SecretUnreadable(Exception):
    """There is a ciphertext, but it does not open: moved, rolled back, damaged, or under an unknown key."""


class Vault(Protocol):
    """Secrets by owner (``connections/con_…``, ``integrations/…``) and version. Fits HashiCorp's KV v2 one to one.

    A value is a flat JSON object. Every method may raise ``SecretStoreUnavailable`` in bounded time; calls may run at
    once. Versions of an owner grow by one and are never reused while the owner exists; at least the newest three are kept.
    """

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """Store the next version if the newest one is ``expected_version`` (0: the owner must not exist); return it.

        Raises ``VaultConflict`` with the version found otherwise; then nothing was written.
        """

    def ahead(self, connection: sa.Connection, wanted: Sequence[tuple[str, int]]) -> Sequence[bytes | None]:
        """Return what the broker's own database holds of these (owner, version), still sealed, to go with ``get``.

        It is read with the caller's connection, beside what the caller reads there. None where nothing is, where ``get`` needs
        no database, and from a store of its own.
        """

    async def get(
        self, owner: str, version: int | None = None, *, sealed: bytes | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Return (version, value) of one version, the newest for None; ``sealed`` (of ``ahead``) spares reading it.

        Raises ``SecretNotFound``, or ``SecretUnreadable`` when the bytes do not open for exactly this owner and version.
        """

    async def destroy(self, owner: str) -> None:
        """Delete every version for good; an owner that does not exist is fine."""

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        """Return (owner, time of its newest version) below ``prefix``: for the sweeper and the doctor, not for hot paths."""


async def open_vault(settings: Settings, database: Database, sealer: Sealer) -> Vault:
    """Return the store that ``BROKER_VAULT`` names, ready for use (``SettingsError`` for one that is not known)."""
    if settings.vault != "local":
        raise SettingsError("BROKER_VAULT names a store that this version does not have")
    from broker.vault.sealed_rows import SealedRows  # noqa: PLC0415 - only the chosen store is loaded; it imports us

    return SealedRows(database, sealer)
