"""Hand a credential out as it is, or renewed first: a token that fits what the caller asked for."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from broker.credentials.refreshing import Refreshing
from broker.credentials.snapshots import Snapshot
from broker.credentials.stored_secrets import StoredSecrets, bearer_of, sha256_hex
from broker.credentials.usable import Standing, read_row, require_pinned, require_usable
from broker.database import Database
from broker.errors import BrokerError, Conflict, ProviderUnavailable
from broker.integrations import Configured
from broker.models import Connection
from broker.refresh import Ask, Held, after_failure, decide
from providers.spec import Secret

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Lent:
    """An opened credential for one call that this process makes itself: its fields by name, as ``spec.Material`` has them.

    ``marker`` is the digest of what a provider would refuse: to be named as ``not_token_sha256`` when it did.
    """

    fields: Mapping[str, Secret]
    credential_type: str
    marker: str


@dataclass(frozen=True, slots=True)
class Handout:
    """A credential on its way to a backend."""

    access_token: Secret
    token_type: str
    expires_at: float | None
    scopes: tuple[str, ...]
    connection_id: str
    stale: bool


class HandingOut:
    """Hands tokens out."""

    def __init__(
        self,
        database: Database,
        stored: StoredSecrets,
        refreshing: Refreshing,
        *,
        wait_seconds: float,
        live_wait_seconds: float,
    ) -> None:
        """Keep the parts; the seconds are those of ``Credentials``."""
        self._database = database
        self._stored = stored
        self._refreshing = refreshing
        self._wait_seconds = wait_seconds
        self._live_wait_seconds = live_wait_seconds

    async def fresh(self, row: Standing, configured: Configured, ask: Ask, at: float) -> Handout:
        """Return a token that fits ``ask``. See ``Credentials.fresh``."""
        row, value, stale = await self._fresh(row, configured, ask, at)
        return handout_of(row, value, stale=stale)

    async def lend(self, row: Standing, configured: Configured, ask: Ask, at: float) -> Lent:
        """Return an opened credential that fits ``ask``. See ``Credentials.lend``."""
        return lent_of((await self._fresh(row, configured, ask, at))[1])

    async def lend_last(self, row: Connection, configured: Configured) -> Lent:
        """Return the opened credential of a row that is about to end. See ``Credentials.lend_last``."""
        require_pinned(row, configured)
        return lent_of(await self._stored.open(row))

    async def _fresh(
        self, row: Standing, configured: Configured, ask: Ask, at: float
    ) -> tuple[Standing, dict[str, Any], bool]:
        """Return the row, its secret, and whether that is stale."""
        require_usable(row)
        require_pinned(row, configured)
        row, value = await self._opened(row)
        held = held_from(row, value)
        choice = decide(held, ask, at)
        if choice == "renew":
            return await self._renewed(row, held, ask, at)
        return row, value, choice == "stale"

    async def _renewed(self, row: Standing, held: Held, ask: Ask, at: float) -> tuple[Standing, dict[str, Any], bool]:
        """Return a newer token than the one that is held, or that one if it can be served although no newer one came."""
        servable = held.live(at) and not ask.force and not held.refused(ask)
        patience_seconds = self._live_wait_seconds if servable else self._wait_seconds
        failure: BrokerError | None = None
        for _ in range(ROUNDS):  # a version can move without a new token, after a crash: then once more
            try:
                await self._refreshing.once(row.id, row.secret_version, patience_seconds)
            except BrokerError as error:
                failure = error
            row, at = await read_row(self._database, row.id)
            require_usable(row)
            row, value = await self._opened(row)
            if row.refreshed_at != held.refreshed_at or held_from(row, value).token_sha256 != held.token_sha256:
                return row, value, False
            if failure is not None:
                break
        after_failure(held, ask, at, failure or ProviderUnavailable("the refresh brought no token; try again"))
        return row, value, True

    async def _opened(self, row: Standing) -> tuple[Standing, dict[str, Any]]:
        """Return the row and its secret; both anew if the secret moved on since the row was read."""
        sealed = row.sealed if isinstance(row, Snapshot) else None
        value = await self._stored.content(row.id, row.secret_version, sealed=sealed)
        if value is not None:
            return row, value
        current, _ = await read_row(self._database, row.id)
        require_usable(current)
        return current, await self._stored.open(current)


def held_from(row: Standing, value: Mapping[str, Any]) -> Held:
    """Return what ``decide`` needs of a row and its opened secret (pure)."""
    token = bearer_of(value)
    return Held(
        token=token,
        expires_at=row.token_expires_at,
        lifetime_seconds=value.get("lifetime_seconds"),
        refreshable=row.refreshable,
        refreshed_at=row.refreshed_at,
        not_before_at=row.refresh_not_before_at,
        jitter=zlib.crc32(row.id.encode()) / 0x1_0000_0000,
        has_token=bool(token),
    )


def handout_of(row: Standing, value: Mapping[str, Any], *, stale: bool) -> Handout:
    """Return what the caller gets (pure). ProviderUnavailable where there is no token: imported anew meanwhile.

    Conflict for a credential that signs calls and is no token: it never leaves the broker.
    """
    if value["type"] == "aws":
        raise Conflict("this credential is a key pair that signs calls, not a token: call through the proxy")
    token, kind = bearer_of(value), "Basic" if value["type"] == "basic" else "Bearer"
    if not token:
        raise ProviderUnavailable("there is no token yet; try again")
    return Handout(Secret(token), kind, row.token_expires_at, tuple(row.scopes), row.id, stale)


LENT: Mapping[str, tuple[str, ...]] = {
    "api_key": ("api_key",),
    "basic": ("username", "password"),
    "aws": ("access_key_id", "secret_access_key", "session_token"),
}


def lent_of(value: Mapping[str, Any]) -> Lent:
    """Return what a signer may use of an opened secret (pure): never a refresh token, nor what tokens are minted with.

    ProviderUnavailable where there is no token: imported anew meanwhile.
    """
    kind = value["type"]
    names = LENT.get(kind, ("access_token",))
    fields = {name: Secret(str(value[name])) for name in names if value.get(name)}
    if not fields:
        raise ProviderUnavailable("there is no token yet; try again")
    return Lent(fields, kind, sha256_hex(bearer_of(value)))
