"""Where secrets live: one protocol, versioned and compare-and-set, with one implementation per store."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import sqlalchemy as sa

from broker.errors import SecretStoreUnavailable
from broker.settings import Settings, SettingsError

if TYPE_CHECKING:
    from broker.database import Database
    from broker.vault.hashicorp import Session
    from broker.vault.keyring import Sealer, Wrapping


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
    A vault forgets the numbers of what it destroyed: who writes such an owner again numbers on (``Store.put_as``).
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


class Store(Vault, Protocol):
    """A vault whose writer may choose a version's number: that secrets can be moved to, and numbered on after a destroy."""

    async def put_as(self, owner: str, value: Mapping[str, Any], *, expected_version: int, version: int) -> None:
        """Store as ``put`` does, but under this number, which is greater than ``expected_version``."""


async def open_server(settings: Settings) -> Session | None:
    """Return the session with HashiCorp Vault that store and Transit share, logged in; None where neither is used.

    Close it last. A server that does not answer now is asked again by the first call; one that answers and does not let us in
    is a ``SettingsError``.
    """
    if "hashicorp" not in {settings.vault, settings.vault_fallback} and settings.vault_transit_key is None:
        return None
    from broker.vault.hashicorp import new_session  # noqa: PLC0415 - it imports us; and only what is chosen is loaded

    session = new_session(settings)
    try:
        await session.start()
    except BaseException:
        await session.aclose()
        raise
    return session


async def open_wrapping(settings: Settings, server: Session | None) -> Wrapping:
    """Return the key-encryption keys: Transit's where ``BROKER_VAULT_TRANSIT_KEY`` names one, else the keyring.

    With both, Transit wraps what is new, and the keyring opens what it wrapped before. Raises ``SettingsError``, and
    ``SecretStoreUnavailable`` when Transit cannot be asked: without it no data key opens.
    """
    from broker.vault.keyring import has_keyring, load_keyring  # noqa: PLC0415 - it imports us

    if settings.vault_transit_key is None or server is None:
        return load_keyring(settings)
    from broker.vault.hashicorp import Transit, TransitBeforeKeyring  # noqa: PLC0415 - only what is chosen is loaded

    transit = Transit(server, mount=settings.vault_transit_mount, key=settings.vault_transit_key)
    await transit.reload()
    return TransitBeforeKeyring(transit, load_keyring(settings)) if has_keyring(settings) else transit


async def open_vault(settings: Settings, database: Database, sealer: Sealer, server: Session | None = None) -> Store:
    """Return the store that ``BROKER_VAULT`` names, with that of ``BROKER_VAULT_FALLBACK`` behind it, ready for use.

    ``server``, and what is raised: see ``open_store``.
    """
    new = await open_store(settings, settings.vault, database, sealer, server)
    if settings.vault_fallback is None:
        return new
    from broker.vault.moving import MovingVault  # noqa: PLC0415 - it imports us; and only what is chosen is loaded

    return MovingVault(new, await open_store(settings, settings.vault_fallback, database, sealer, server))


async def open_store(
    settings: Settings, kind: str, database: Database, sealer: Sealer, server: Session | None
) -> Store:
    """Return the store of that kind.

    ``server`` is what ``open_server`` gave; it stays the caller's to close. Raises ``SettingsError`` for a store that is not
    known, has no server, or is not the right engine. A server that cannot be asked now is fine: every use asks again.
    """
    if kind == "local":
        from broker.vault.sealed_rows import SealedRows  # noqa: PLC0415 - only the chosen store is loaded; it imports us

        return SealedRows(database, sealer)
    if kind != "hashicorp" or server is None:
        raise SettingsError("BROKER_VAULT names a store that this version does not have, or that has no server")
    from broker.vault.hashicorp import HashicorpVault  # noqa: PLC0415 - as above
    from broker.vault.numbering import Numbered  # noqa: PLC0415 - as above

    vault = HashicorpVault(server, mount=settings.vault_mount, prefix=settings.vault_prefix)
    with contextlib.suppress(SecretStoreUnavailable):
        await vault.check()
    return Numbered(vault)
