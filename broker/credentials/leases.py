"""The rows of leases: one writer of a connection's secret at a time, and a fencing number that refuses a late one.

Plain functions over a session. A lease ends by the database's clock; its row stays, so that the number only grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlmodel import Session, col

from broker.database import now
from broker.errors import Conflict
from broker.models import Connection, RefreshJournal, RefreshLease


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write one connection's secret until it is over or somebody claims it after its end."""

    connection_id: str
    fence: int


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim found under its lease."""

    lease: Lease
    row: Connection
    journal: RefreshJournal | None
    now: float


class LeaseLost(Conflict):
    """Somebody else holds the lease now: this writer was too slow, its write is refused."""

    def __init__(self) -> None:
        """Say it in a caller's words."""
        super().__init__("the connection was changed at the same moment; try again")


def is_free(at: float) -> sa.ColumnElement[bool]:
    """Return the condition that a lease can be claimed at that time."""
    return col(RefreshLease.owner).is_(None) | (col(RefreshLease.expires_at) < at)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one who waits has to know of a connection. ``free``: its lease can be claimed."""

    integration: str
    status: str
    secret_version: int
    free: bool


def see(session: Session, connection_ids: Sequence[str]) -> dict[str, Seen]:
    """Return what there is of these connections, in one query; nothing of those that are not there."""
    rows, leases = col(Connection.id), col(RefreshLease.connection_id)
    held = leases.is_not(None) & ~is_free(now(session))
    query = (
        sa.select(rows, col(Connection.integration), col(Connection.status), col(Connection.secret_version), held)
        .select_from(sa.outerjoin(Connection, RefreshLease, rows == leases))
        .where(rows.in_(connection_ids))
    )
    found = session.execute(query)
    return {
        one: Seen(integration, status, version, free=not taken) for one, integration, status, version, taken in found
    }


def take_lease(session: Session, connection_id: str, owner: str, at: float, lease_seconds: float) -> Lease | None:
    """Claim a lease that is free, with the next fencing number; None when it is not.

    Of two first claims at once one raises IntegrityError: there is no row yet that could decide between them.
    """
    ends_at = at + lease_seconds
    claim = (
        sa.update(RefreshLease)
        .where(col(RefreshLease.connection_id) == connection_id, is_free(at))
        .values(owner=owner, fence=RefreshLease.fence + 1, expires_at=ends_at)
        .returning(col(RefreshLease.fence))
    )
    fence = session.execute(claim).scalar_one_or_none()
    if fence is not None:
        return Lease(connection_id, fence)
    if session.get(RefreshLease, connection_id) is not None:
        return None
    session.add(RefreshLease(connection_id=connection_id, owner=owner, fence=1, expires_at=ends_at))
    session.flush()
    return Lease(connection_id, 1)


def require_lease(session: Session, lease: Lease) -> None:
    """Refuse a late holder (LeaseLost). Locks the lease row, so that nobody claims it before this commit."""
    touch = _row_of(lease).values(fence=lease.fence)
    if session.execute(touch).rowcount != 1:  # type: ignore[attr-defined]
        raise LeaseLost


def extend_lease(session: Session, lease: Lease, *, ends_at: float) -> None:
    """Let a lease that ``require_lease`` has just locked last until then."""
    session.execute(_row_of(lease).values(expires_at=ends_at))


def release_lease(session: Session, lease: Lease) -> None:
    """Give a lease back; one that is another's by now is left alone."""
    session.execute(_row_of(lease).values(owner=None, expires_at=0.0))


def _row_of(lease: Lease) -> sa.Update:
    same = (col(RefreshLease.connection_id) == lease.connection_id) & (col(RefreshLease.fence) == lease.fence)
    return sa.update(RefreshLease).where(same)
