"""Marks connections whose grant is over by their provider's own word, as an event of its webhook tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.announcing import announce_connection
from broker.audit import Audit
from broker.credentials.freezes import active_freezes
from broker.credentials.outcomes import system_entry
from broker.database import Database
from broker.models import Connection, Integration, RevocationResult

WHOLE_SECOND: Final = 1.0  # providers cut their times off
NOT_GRANTED: Final = ("api_key", "basic", "aws")  # keys that a person made: no app was ever granted anything
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class GrantOver:
    """What is over by the provider's word.

    ``which``: conditions of the connections that are meant, by provider and account. ``client_id``: the client that was
    granted this; None: the event does not say. ``only_client_of``: a provider whose integrations have to be of one client all,
    since nothing says which of them is meant; None: something does. ``at``: when, seconds since 1970; what was granted later
    is meant by nobody.
    ``reason``: the event's type, which becomes ``status_reason``.
    """

    which: Sequence[sa.ColumnElement[bool]]
    then: Literal["revoked", "reauthorization_required"]
    client_id: str | None
    at: float
    reason: str
    event_id: str
    only_client_of: str | None = None


class Marking:
    """Marks connections. Calls may run at once, and be repeated."""

    def __init__(self, database: Database, audit: Audit) -> None:
        """Keep the parts."""
        self._database = database
        self._audit = audit

    async def mark_ended(self, over: GrantOver) -> list[str]:
        """Mark what is over, in one transaction with its records and events. See ``Credentials.mark_ended``."""

        def work(session: Session) -> list[Connection]:
            active_freezes(session)  # no freeze begins or is lifted meanwhile: both remember what a status was before
            rows = _meant(session, over)
            marked = [row for row in rows if _mark(session, row, over)]
            for row in marked:
                announce_connection(session, over.then, row)
            detail = {"reason": over.reason, "event_id": over.event_id}
            self._audit.append(session, *(system_entry(f"connection.{over.then}", row, **detail) for row in marked))
            return marked

        marked = await self._database.transaction(work)
        for row in marked:
            log.warning("connection.ended_by_provider", connection_id=row.id, then=over.then, event_type=over.reason)
        return [row.id for row in marked]


def _meant(session: Session, over: GrantOver) -> list[Connection]:
    """Return the connections that are meant, locked; none where several clients may be meant and nothing says which."""
    live = (col(Connection.status).not_in(("pending", "revoked")), col(Connection.deleted_at).is_(None))
    query = select(Connection).where(*over.which, *live, col(Connection.credential_type).not_in(NOT_GRANTED))
    if over.client_id is not None:
        query = query.where(Connection.client_id == over.client_id)
    rows = list(session.exec(query.order_by(col(Connection.id)).with_for_update()))
    clients = {row.client_id for row in rows}
    if over.only_client_of is not None:  # an app without a connection of this account may be the one that ended
        of_provider = select(Integration.client_id).where(Integration.provider == over.only_client_of)
        clients |= set(session.exec(of_provider)) - {""}
    if len(clients) > 1:
        log.warning("connection.lifecycle_ambiguous", event_id=over.event_id, event_type=over.reason, found=len(rows))
        return []
    return [row for row in rows if (row.granted_at or row.created_at) <= over.at + WHOLE_SECOND]


def _mark(session: Session, row: Connection, over: GrantOver) -> bool:
    """Change a row; False where it says so already. What is frozen stays frozen, and is lifted into what it has become."""
    if row.status != "frozen":
        if row.status == over.then:
            return False
        row.status, row.status_reason = over.then, over.reason
        return True
    held = (col(RevocationResult.connection_id) == row.id, col(RevocationResult.result) == "frozen")
    before = col(RevocationResult.status_before)
    changed = sa.update(RevocationResult).where(*held, before.not_in((over.then, "revoked")))
    changed = changed.values(status_before=over.then, status_reason_before=over.reason)
    return bool(session.execute(changed).rowcount)  # type: ignore[attr-defined]
