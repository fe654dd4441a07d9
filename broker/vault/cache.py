"""Keeps opened secrets in this process for a few seconds, the last version read of each owner; a vault before a vault."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

from cachetools import TTLCache

from broker.vault import Vault

LARGEST = 10_000


class CachedVault:
    """Answers ``get`` of an exact version from memory for at most ``seconds``; everything else goes through.

    A version never changes its value, so an entry cannot be wrong, only too long alive: sealing or losing the store, or a
    destroy in another process, takes effect after ``seconds``. A destroy in this process takes effect at once, also on
    reads that are under way. Memory holds ``LARGEST`` owners. What is returned is the caller's own copy.
    """

    def __init__(self, vault: Vault, *, seconds: float, timer: Callable[[], float] = time.monotonic) -> None:
        """Wrap ``vault``; ``seconds`` 0 keeps nothing. ``timer`` is for tests."""
        self._vault = vault
        self._keeps = seconds > 0
        self._opened: TTLCache[str, tuple[int, dict[str, Any]]] = TTLCache(LARGEST, max(seconds, 1e-9), timer)
        self._destroyed = 0  # counts; a read that began before the last one does not keep what it found

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """See ``Vault``. Other versions stay what they are, so nothing is dropped."""
        return await self._vault.put(owner, value, expected_version=expected_version)

    async def get(self, owner: str, version: int | None = None) -> tuple[int, dict[str, Any]]:
        """See ``Vault``. The newest version is always asked for; an exact one may come from memory."""
        known = self._opened.get(owner) if version is not None else None
        if known is not None and known[0] == version:
            return version, copy.deepcopy(known[1])
        before = self._destroyed
        found, value = await self._vault.get(owner, version)
        if self._keeps and before == self._destroyed:
            self._opened[owner] = (found, copy.deepcopy(value))
        return found, value

    async def destroy(self, owner: str) -> None:
        """See ``Vault``."""
        self._drop(owner)
        try:
            await self._vault.destroy(owner)
        finally:
            self._drop(owner)  # again: a read may have begun meanwhile

    def _drop(self, owner: str) -> None:
        self._destroyed += 1
        self._opened.pop(owner, None)

    def forget(self, owner: str, version: int) -> None:
        """Drop one entry at once."""
        known = self._opened.get(owner)
        if known is not None and known[0] == version:
            self._drop(owner)

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        """See ``Vault``."""
        return await self._vault.owners(prefix)
