"""Tells how long a secret store takes to answer, and which of its answers are failures; a vault around a vault."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa

from broker.errors import SecretStoreUnavailable
from broker.vault import Store

Answered = Callable[[str, float, bool], None]


class TimedVault:
    """Passes everything through, and tells ``on_answer`` of each call.

    It is given ``get``, ``put``, ``destroy`` or ``owners``, the seconds that it took, and whether the store was available; it
    must neither wait nor raise. What is found missing, or does not open, is an answer like any other. A ``get`` of a value that
    was read ahead costs opening it only, and counts as such.
    """

    def __init__(self, vault: Store, on_answer: Answered) -> None:
        """Wrap ``vault``."""
        self._vault = vault
        self._on_answer = on_answer

    @asynccontextmanager
    async def _timed(self, operation: str) -> AsyncIterator[None]:
        began_at, available = time.monotonic(), True
        try:
            yield
        except SecretStoreUnavailable:
            available = False
            raise
        finally:
            self._on_answer(operation, time.monotonic() - began_at, available)

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """See ``Vault``."""
        async with self._timed("put"):
            return await self._vault.put(owner, value, expected_version=expected_version)

    async def put_as(self, owner: str, value: Mapping[str, Any], *, expected_version: int, version: int) -> None:
        """See ``Store``."""
        async with self._timed("put"):
            await self._vault.put_as(owner, value, expected_version=expected_version, version=version)

    def ahead(self, connection: sa.Connection, wanted: Sequence[tuple[str, int]]) -> Sequence[bytes | None]:
        """See ``Vault``."""
        return self._vault.ahead(connection, wanted)

    async def get(
        self, owner: str, version: int | None = None, *, sealed: bytes | None = None
    ) -> tuple[int, dict[str, Any]]:
        """See ``Vault``. By hand, because every hand-out comes here: a context manager would cost twice as much."""
        began_at, available = time.monotonic(), True
        try:
            return await self._vault.get(owner, version, sealed=sealed)
        except SecretStoreUnavailable:
            available = False
            raise
        finally:
            self._on_answer("get", time.monotonic() - began_at, available)

    async def destroy(self, owner: str) -> None:
        """See ``Vault``."""
        async with self._timed("destroy"):
            await self._vault.destroy(owner)

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        """See ``Vault``."""
        async with self._timed("owners"):
            return await self._vault.owners(prefix)
