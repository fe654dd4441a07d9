"""Lets a secret go on under its own version numbers in a store that counts from 1: a vault before a vault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from broker.errors import SecretStoreUnavailable
from broker.vault import SecretNotFound, SecretUnreadable, Vault, VaultConflict

NUMBER = "broker:version"  # beside the value, only where it differs from the store's own number


@dataclass(frozen=True, slots=True)
class Numbered:
    """Adds ``put_as`` (see ``Store``) to a vault whose versions it cannot choose, such as KV v2.

    Rows name versions, so a secret that was renewed 8,760 times elsewhere has to be version 8,760 here too: written 8,760
    times that would take 15 seconds of a Vault, for each connection. Instead each version says its number, where it is not
    the store's own. The number is part of what one compare-and-set writes, so no crash and no race parts them. Numbers grow
    with the store's own, and what is asked for is nearly always the newest: so that is read first, and one read is enough.
    """

    vault: Vault

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """See ``Vault``."""
        await self.put_as(owner, value, expected_version=expected_version, version=expected_version + 1)
        return expected_version + 1

    async def put_as(self, owner: str, value: Mapping[str, Any], *, expected_version: int, version: int) -> None:
        """See ``Store``. One read more than the store's own ``put``, but for an owner that is new."""
        own, newest = (0, 0) if expected_version == 0 else await self._newest(owner)
        if newest != expected_version:
            raise VaultConflict(newest)
        marked = dict(value) if version == own + 1 else {**value, NUMBER: version}
        try:
            await self.vault.put(owner, marked, expected_version=own)
        except VaultConflict:
            raise VaultConflict((await self._newest(owner))[1]) from None

    async def _newest(self, owner: str) -> tuple[int, int]:
        """Return the store's number of the newest version, and its number here; zeros where there is none."""
        try:
            own, value = await self.vault.get(owner)
            return own, _number(own, value)
        except SecretNotFound:
            return 0, 0
        except SecretUnreadable:
            raise SecretStoreUnavailable("the newest version of this secret does not open") from None

    def ahead(
        self,
        connection: sa.Connection,  # noqa: ARG002 - the protocol's
        wanted: Sequence[tuple[str, int]],
    ) -> Sequence[bytes | None]:
        """See ``Vault``. Nothing: what is asked for goes by numbers that the store does not know."""
        return [None] * len(wanted)

    async def get(
        self,
        owner: str,
        version: int | None = None,
        *,
        sealed: bytes | None = None,  # noqa: ARG002 - ``ahead`` gives none
    ) -> tuple[int, dict[str, Any]]:
        """See ``Vault``. Reads from the newest version back to the wanted one; stores keep few."""
        own, value = await self.vault.get(owner)
        number = _number(own, value)
        while version is not None and version < number and own > 1:
            own, value = await self.vault.get(owner, own - 1)
            number = _number(own, value)
        if version is not None and number != version:
            raise SecretNotFound("there is no such version")
        value.pop(NUMBER, None)
        return number, value

    async def destroy(self, owner: str) -> None:
        """See ``Vault``."""
        await self.vault.destroy(owner)

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        """See ``Vault``."""
        return await self.vault.owners(prefix)


def _number(own: int, value: Mapping[str, Any]) -> int:
    number = value.get(NUMBER, own)
    if not isinstance(number, int) or number < own:
        raise SecretUnreadable("the version says a number that it cannot have")
    return number
