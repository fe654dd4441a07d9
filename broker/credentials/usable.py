"""Whether a connection may be used: its row read anew, its status, and what its credential is pinned to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from sqlmodel import Session

from broker.credentials.snapshots import Snapshot
from broker.database import Database, now
from broker.errors import (
    BrokerError,
    ConfirmationRequired,
    Conflict,
    ConnectionFrozen,
    ConnectionRevoked,
    NotFound,
    OriginChanged,
    ReauthorizationRequired,
)
from broker.integrations import Configured
from broker.models import Connection

Standing: TypeAlias = Connection | Snapshot  # a row, or what is read of it for a hand-out


async def read_row(database: Database, connection_id: str) -> tuple[Connection, float]:
    """Return the row as it is now, and the database's time (NotFound)."""

    def work(session: Session) -> tuple[Connection | None, float]:
        return session.get(Connection, connection_id), now(session)

    row, at = await database.read(work)
    if row is None:
        raise NotFound
    return row, at


_REFUSALS: Mapping[str, type[BrokerError]] = {
    "pending": ConfirmationRequired,
    "reauthorization_required": ReauthorizationRequired,
    "frozen": ConnectionFrozen,
    "revoked": ConnectionRevoked,
}


def require_usable(row: Standing) -> None:
    """Raise what stands against using the connection, by its status."""
    if row.deleted_at is not None:
        raise NotFound
    if row.status in _REFUSALS:
        error = _REFUSALS[row.status]()
        error.members = {"status_reason": row.status_reason} if row.status_reason is not None else {}
        raise error
    if row.status != "active":
        raise Conflict("the connection is in error; see status_reason")


def require_pinned(row: Standing, configured: Configured) -> None:
    """Raise OriginChanged when a place that the credential goes to is not the one it was made with.

    A host that the provider's file gained later changes nothing: it is not pinned, so nothing is sent there. Where refresh
    tokens go is judged whatever it is called: a refresh endpoint that came later is another home, unless its origin is the
    same.
    """
    current = configured.endpoints.origins
    if row.pins == current:
        return
    moved = any(name in current and current[name] != origin for name, origin in row.pins.items())
    home = renewal_home(current)
    if moved or ("token" in current and "token" not in row.pins) or home not in {None, renewal_home(row.pins)}:
        raise OriginChanged


def renewal_home(origins: Mapping[str, str]) -> str | None:
    """Return the origin that refresh tokens go to, of pins or of today's origins: the token endpoint's without another."""
    return origins.get("refresh") or origins.get("token")


def require_same_client(row: Standing, configured: Configured) -> None:
    """Raise OriginChanged when the integration is another client by now than the one that the grant was given to.

    The provider answers ``invalid_grant`` to a refresh token of another client, which would end the connection for good.
    """
    if configured.row.client_id != row.client_id:
        raise OriginChanged("the integration's client_id changed since this connection was made")
