"""Keeps opened secrets in this process for a few seconds, the last version read of each owner; a vault before a vault."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from broker.vault import Store

MOST_BYTES = 20 * 1024**2  # of values, with what Python needs to hold each
ENTRY_BYTES = 350
MOST_GONE = 10_000
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class _Opened(NamedTuple):
    until: float
    version: int
    value: bytes  # as JSON: smaller than a map, and reading it is cheaper than copying that


class CachedVault:
    """Answers ``get`` of an exact version from memory for at most ``seconds``; everything else goes through.

    A version never changes its value, so an entry cannot be wrong, only too long alive: sealing or losing the store, or a
    destroy in another process, takes effect after ``seconds``. A destroy in this process takes effect at once, also on
    reads that are under way. Memory holds ``MOST_BYTES``, the newest. What is returned is the caller's own copy.
    """

    def __init__(self, vault: Store, *, seconds: float, timer: Callable[[], float] = time.monotonic) -> None:
        """Wrap ``vault``; ``seconds`` 0 keeps nothing. ``timer`` is for tests."""
        self._vault = vault
        self._seconds = seconds
        self._timer = timer
        # In the order in which they are over: all live equally long. The first of a plain dict, whose first ones are taken
        # out again and again, is found by walking over all the gaps.
        self._opened: OrderedDict[str, _Opened] = OrderedDict()
        self._bytes = 0
        # Destroyed here lately, and up to which version what was read ahead of them counts no more.
        self._gone: OrderedDict[str, float] = OrderedDict()
        self._destroyed = 0  # counts; a read that began before the last one does not keep what it found

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """See ``Vault``. Other versions stay what they are, so nothing is dropped."""
        version = await self._vault.put(owner, value, expected_version=expected_version)
        self._written(owner, version)
        return version

    async def put_as(self, owner: str, value: Mapping[str, Any], *, expected_version: int, version: int) -> None:
        """See ``Store``; otherwise as ``put``."""
        await self._vault.put_as(owner, value, expected_version=expected_version, version=version)
        self._written(owner, version)

    def _written(self, owner: str, version: int) -> None:
        """Let this version and later ones be read ahead again: numbers go on after a destroy, so older ones stay gone."""
        if owner in self._gone:
            self._gone[owner] = min(self._gone[owner], version - 1)

    def ahead(self, connection: sa.Connection, wanted: Sequence[tuple[str, int]]) -> Sequence[bytes | None]:
        """See ``Vault``. Only what is not in memory is read."""
        missing = [one for one in wanted if self._known(*one) is None]
        if not missing:
            return [None] * len(wanted)
        found = dict(zip(missing, self._vault.ahead(connection, missing), strict=True))
        return [found.get(one) for one in wanted]

    async def get(
        self, owner: str, version: int | None = None, *, sealed: bytes | None = None
    ) -> tuple[int, dict[str, Any]]:
        """See ``Vault``. The newest version is always asked for; an exact one may come from memory."""
        known = None if version is None else self._known(owner, version)
        if version is not None and known is not None:
            return version, _decode(known.value)
        before = self._destroyed
        gone = version is not None and version <= self._gone.get(owner, 0)
        found, value = await self._vault.get(owner, version, sealed=None if gone else sealed)
        if self._seconds > 0 and before == self._destroyed:
            self._keep(owner, found, _encode(value))
        return found, value

    def _known(self, owner: str, version: int) -> _Opened | None:
        known = self._opened.get(owner)
        return known if known is not None and known.version == version and self._timer() < known.until else None

    def _keep(self, owner: str, version: int, value: bytes) -> None:
        at = self._timer()
        self._let_go(owner)
        self._opened[owner] = _Opened(at + self._seconds, version, value)
        self._bytes += ENTRY_BYTES + len(value)
        while self._opened and (self._bytes > MOST_BYTES or next(iter(self._opened.values())).until <= at):
            self._let_go(next(iter(self._opened)))

    def _let_go(self, owner: str) -> None:
        known = self._opened.pop(owner, None)
        if known is not None:
            self._bytes -= ENTRY_BYTES + len(known.value)

    async def destroy(self, owner: str) -> None:
        """See ``Vault``."""
        self._lose(owner)
        try:
            await self._vault.destroy(owner)
        finally:
            self._lose(owner)  # again: a read or a write may have begun meanwhile

    def _lose(self, owner: str) -> None:
        self._drop(owner)
        self._gone[owner] = math.inf
        if len(self._gone) > MOST_GONE:
            self._gone.popitem(last=False)

    def _drop(self, owner: str) -> None:
        self._destroyed += 1
        self._let_go(owner)

    def clear(self) -> None:
        """Drop everything at once; reads that are under way keep nothing of what they find."""
        self._destroyed += 1
        self._opened.clear()
        self._bytes = 0

    def forget(self, owner: str, version: int) -> None:
        """Drop one entry at once."""
        known = self._opened.get(owner)
        if known is not None and known.version == version:
            self._drop(owner)

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        """See ``Vault``."""
        return await self._vault.owners(prefix)
