"""Keeps opened secrets in this process for a few seconds, by owner and version; a vault in front of a vault."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cachetools import TTLCache

from broker.vault import Vault

LARGEST = 10_000


class CachedVault:
    """Answers ``get`` of an exact version from memory for at most ``seconds``; everything else goes through.

    A version never changes its value, so an entry cannot be wrong, only too long alive: sealing or losing the store
    takes effect after ``seconds``. Entries of an owner are dropped when this process writes or destroys it.
    """

    def __init__(self, vault: Vault, *, seconds: float) -> None:
        """Wrap ``vault``; ``seconds`` 0 keeps nothing."""
        self._vault = vault
        self._opened: TTLCache[tuple[str, int], dict[str, Any]] = TTLCache(LARGEST, max(seconds, 1e-9))

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """See ``Vault``."""
        self.forget(owner, expected_version)
        return await self._vault.put(owner, value, expected_version=expected_version)

    async def get(self, owner: str, version: int | None = None) -> tuple[int, dict[str, Any]]:
        """See ``Vault``. The newest version is always asked for; an exact one may come from memory."""
        known = self._opened.get((owner, version)) if version is not None else None
        if known is not None and version is not None:
            return version, dict(known)
        found, value = await self._vault.get(owner, version)
        self._opened[owner, found] = dict(value)
        return found, value

    async def destroy(self, owner: str) -> None:
        """See ``Vault``."""
        for key in [key for key in list(self._opened) if key[0] == owner]:
            self.forget(*key)
        await self._vault.destroy(owner)

    def forget(self, owner: str, version: int) -> None:
        """Drop one entry at once."""
        self._opened.pop((owner, version), None)

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        """See ``Vault``."""
        return await self._vault.owners(prefix)
