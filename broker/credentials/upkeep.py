"""What the worker asks for: connections due for a refresh or cut off by a crash, and secrets that nobody names."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.credentials.claims import Claims
from broker.credentials.freezes import being_ended
from broker.credentials.leases import is_free
from broker.credentials.stored_secrets import secret_owner
from broker.database import Database, now
from broker.errors import NotFound
from broker.integrations import Integrations
from broker.models import Connection, RefreshAttempt, RefreshJournal, RefreshLease
from broker.refresh import IDLE_SHARE, USED_WITHIN_SECONDS
from broker.vault import Vault

MARGIN_SECONDS = 240.0  # more than the soft margin, so that callers seldom wait
LIFETIME_SHARE = 0.2
LONGEST_LATE_SECONDS = 86_400.0
LEFT_BEHIND_AT_ONCE = 100
SWEEP_BATCH = 500
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Backlog:
    """How many connections in use one integration has to refresh, and how long ago the first of their tokens ended."""

    integration: str
    provider: str
    count: int
    late_seconds: float


class Upkeep:
    """Finds what has to be done without a request. Only the sweep changes anything."""

    def __init__(self, database: Database, vault: Vault, integrations: Integrations, claims: Claims) -> None:
        """Keep the parts."""
        self._database = database
        self._vault = vault
        self._integrations = integrations
        self._claims = claims

    async def due(
        self, integration: str, *, idle: bool, limit: int, after: tuple[float, str] | None = None
    ) -> list[Connection]:
        """Return connections of one integration to refresh now. See ``Credentials.due``."""
        ends_at = sa.func.coalesce(Connection.token_expires_at, 0.0)

        def work(session: Session) -> list[Connection]:
            mine = _unindexed(Connection.integration) == integration
            query = select(Connection).where(mine, *self._due(now(session), idle))
            if after is not None:
                query = query.where(sa.tuple_(ends_at, col(Connection.id)) > after)
            return list(session.exec(query.order_by(ends_at, col(Connection.id)).limit(limit)))

        return await self._database.read(work)

    async def backlog(self) -> list[Backlog]:
        """Return what is due of the connections in use. See ``Credentials.backlog``."""
        counted = (sa.func.count(), sa.func.min(Connection.token_expires_at))
        grouped = (col(Connection.integration), col(Connection.provider))

        def work(session: Session) -> list[Backlog]:
            at = now(session)
            query = sa.select(*grouped, *counted).where(*self._due(at, idle=False)).group_by(*grouped)
            return [
                Backlog(name, provider, count, max(0.0, at - oldest))
                for name, provider, count, oldest in session.execute(query)
            ]

        return await self._database.read(work)

    async def idle_integrations(self) -> list[str]:
        """Return the integrations with refresh tokens that would die of idleness. See ``Credentials.idle_integrations``."""

        def work(session: Session) -> list[str]:
            query = sa.select(col(Connection.integration)).where(*self._due(now(session), idle=True)).distinct()
            return list(session.execute(query).scalars())

        return await self._database.read(work)

    def _due(self, at: float, idle: bool) -> list[sa.ColumnElement[bool]]:  # noqa: FBT001 - which of two kinds
        waits = col(Connection.refresh_not_before_at)
        return [
            _unindexed(Connection.status) == "active",
            col(Connection.refreshable).is_(True),
            col(Connection.deleted_at).is_(None),
            waits.is_(None) | (waits < at),
            self._dies_of_idleness(at) if idle else _ends_soon(at),
        ]

    def _dies_of_idleness(self, at: float) -> sa.ColumnElement[bool]:
        """Return the condition that most of the time has passed in which the provider wants to see a refresh token."""
        since = _since()
        ends: list[sa.ColumnElement[bool]] = []
        for name, provider in self._integrations.catalog.items():
            if provider.oauth2 is None:
                continue
            refresh, mine = provider.oauth2.refresh, col(Connection.provider) == name
            if refresh.idle_seconds is not None:
                ends.append(mine & (since < at - IDLE_SHARE * refresh.idle_seconds))
            if refresh.sliding:
                dies_at = col(Connection.refresh_expires_at)
                ends.append(mine & (since + IDLE_SHARE * (dies_at - since) < at))
        return sa.or_(sa.false(), *ends)

    async def left_behind(self, *, older_than_seconds: float) -> list[str]:
        """Return connections whose deletion a crash cut off. See ``Credentials.left_behind``."""

        def work(session: Session) -> list[str]:
            query = select(Connection.id).where(col(Connection.deleted_at) < now(session) - older_than_seconds)
            query = query.where(~being_ended(col(Connection.id)))
            return list(session.exec(query.limit(LEFT_BEHIND_AT_ONCE)))

        return await self._database.read(work)

    async def unsettled(self, *, limit: int) -> list[str]:
        """Return connections whose refresh a crash cut off. See ``Credentials.unsettled``."""

        def work(session: Session) -> list[str]:
            free = is_free(now(session))
            found: set[str] = set()
            for table in (RefreshJournal, RefreshAttempt):
                same = col(RefreshLease.connection_id) == col(table.connection_id)
                found.update(
                    session.exec(select(table.connection_id).join(RefreshLease, same).where(free).limit(limit))
                )
            return sorted(found)

        return await self._database.read(work)

    async def sweep_unreferenced(self, *, older_than_seconds: float, at: float | None) -> int:
        """Destroy secrets that no row names; return how many. See ``Credentials.sweep_unreferenced``."""
        now_at = await self._database.read(now) if at is None else at
        found = await self._vault.owners("connections/")
        old = [owner for owner, made_at in found if made_at < now_at - older_than_seconds]
        swept = 0
        for start in range(0, len(old), SWEEP_BATCH):
            for owner in await self._unreferenced(old[start : start + SWEEP_BATCH]):
                swept += await self._destroyed(owner)
        if swept:
            log.warning("credential.swept", count=swept)
        return swept + await self._integrations.sweep_unreferenced(older_than_seconds=older_than_seconds, at=now_at)

    async def _unreferenced(self, owners: Sequence[str]) -> list[str]:
        """Return the owners without a row, or whose row says that its secret was destroyed (no version above 0).

        Of such a one a copy may be left in the store that secrets are moved to.
        """
        ids = [owner.removeprefix("connections/") for owner in owners]
        query = select(Connection.id).where(col(Connection.id).in_(ids), col(Connection.secret_version) > 0)
        naming = await self._database.read(lambda session: set(session.exec(query)))
        return [secret_owner(connection_id) for connection_id in ids if connection_id not in naming]

    async def _destroyed(self, owner: str) -> bool:
        """Destroy what no row names; False, until the next sweep, where somebody writes a secret just now.

        A row without a secret gets one again by an import or a consent: both hold its lease, so it is held here too.
        """
        connection_id = owner.removeprefix("connections/")
        row = await self._database.read(lambda session: session.get(Connection, connection_id))
        if row is None:
            await self._vault.destroy(owner)
            return True
        with contextlib.suppress(NotFound):
            claimed = await self._claims.claim(connection_id)
            if claimed is None:
                return False
            async with self._claims.released(claimed.lease):
                if claimed.row.secret_version <= 0:
                    await self._vault.destroy(owner)
                    return True
        return False


def _unindexed(column: Any) -> sa.ColumnElement[str]:  # noqa: ANN401 - a model's attribute
    """Return a column of text as SQLite finds no rows by: it takes any equality for choosier than a range of times.

    Without this the worker walked over every active connection every two seconds: 0.2 s for 100,000, on the event loop.
    """
    return sa.func.coalesce(column, "")


def _since() -> sa.ColumnElement[float]:
    """Return the time from which the token at hand is."""
    return sa.func.coalesce(Connection.refreshed_at, Connection.created_at)


def _ends_soon(at: float) -> sa.ColumnElement[bool]:
    """In use, and within the margin or the last fifth of its life: a token of a minute is not renewed all the time."""
    ends_at = col(Connection.token_expires_at)
    used = col(Connection.last_used_at) > at - USED_WITHIN_SECONDS
    # What ended long ago is renewed when somebody asks: so the index gives a day's rows, not all that ever ended.
    return (
        used
        & (ends_at > at - LONGEST_LATE_SECONDS)
        & (ends_at < at + MARGIN_SECONDS)
        & (ends_at - at < LIFETIME_SHARE * (ends_at - _since()))
    )
