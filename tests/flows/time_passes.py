"""How a flow test lets time pass or a provider differ: by the row's times and the catalog's data, never by patching."""

from __future__ import annotations

import dataclasses
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.app import Parts
from broker.credentials import Handout
from broker.database import Database, now
from broker.models import AuditRecord, Connection, RefreshAttempt, RefreshJournal, RefreshLease
from broker.refresh import Ask
from providers.spec import OAuth2, Refresh


async def row_of(database: Database, connection_id: str) -> Connection:
    row = await database.read(lambda session: session.get(Connection, connection_id))
    assert row is not None
    return row


async def set_row(database: Database, connection_id: str, **values: Any) -> None:
    change = sa.update(Connection).where(col(Connection.id) == connection_id).values(**values)
    await database.transaction(lambda session: session.execute(change))


async def ends_in(database: Database, connection_id: str, seconds: float) -> None:
    """Let the access token end that many seconds from now, as the broker sees it."""
    at = await database.read(now)
    await set_row(database, connection_id, token_expires_at=at + seconds)


async def wait_is_over(database: Database, connection_id: str) -> None:
    """Let the time pass that a failed refresh has to wait."""
    await set_row(database, connection_id, refresh_not_before_at=0.0)


async def lease_is_over(database: Database, connection_id: str) -> None:
    """Let the lease end while its holder is still at work."""
    change = sa.update(RefreshLease).where(col(RefreshLease.connection_id) == connection_id).values(expires_at=0.0)
    await database.transaction(lambda session: session.execute(change))


async def left_over(database: Database, connection_id: str) -> tuple[bool, bool, bool]:
    """Return whether there is an attempt, a journal, a held lease."""

    def work(session: Session) -> tuple[bool, bool, bool]:
        lease = session.get(RefreshLease, connection_id)
        found = [session.get(table, connection_id) is not None for table in (RefreshAttempt, RefreshJournal)]
        return found[0], found[1], lease is not None and lease.owner is not None

    return await database.read(work)


async def audited(database: Database, action: str) -> list[dict[str, Any]]:
    query = select(AuditRecord).where(AuditRecord.action == action)
    return [record.detail for record in await database.read(lambda session: list(session.exec(query)))]


def behaves(parts: Parts, refresh: Refresh) -> None:
    """Say in the generic provider's file how its refresh tokens behave."""
    known = parts.integrations.catalog["oidc"]
    assert isinstance(known.oauth2, OAuth2)
    changed = dataclasses.replace(known, oauth2=dataclasses.replace(known.oauth2, refresh=refresh))
    parts.integrations.catalog = {**parts.integrations.catalog, "oidc": changed}


async def fresh(parts: Parts, connection_id: str, **ask: Any) -> Handout:
    """Ask for a token beneath HTTP: what a second process does."""

    def work(session: Session) -> tuple[Connection | None, float]:
        return session.get(Connection, connection_id), now(session)

    row, at = await parts.database.read(work)
    assert row is not None
    configured = await parts.integrations.configured(row.integration)
    return await parts.credentials.fresh(row, configured, Ask(**ask), at)
