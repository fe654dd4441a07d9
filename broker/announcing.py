"""The broker's own events: what happened to a connection, a key or a subscription, for those who subscribe to it.

An event is a row, written in the transaction of the change that it tells of: neither is there without the other. It has no
number yet; the worker numbers it and makes its deliveries (``broker.webhooks.waiting``), as it does with providers' events.
A body names things and says what became of them. It holds no secret, no account's name and no e-mail address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec
import sqlalchemy as sa
from sqlmodel import Session

from broker.database import now
from broker.models import Connection, WebhookEvent, new_ordered_ids, rfc3339

PROVIDER: Final = "broker"
CONTENT_TYPE: Final = "application/json"
Change = Literal["created", "confirmed", "reauthorization_required", "frozen", "unfrozen", "revoked", "deleted"]
Kind = Literal["broker.key.expiring", "broker.subscription.disabled"]
COLUMNS: Final = ("id", "integration", "provider", "subject", "account_id", "status", "status_reason", "tags")


def announce_connection(session: Session, change: Change, row: Connection) -> None:
    """Write ``broker.connection.<change>`` in the caller's transaction; ``row`` as it is after the change.

    A pending connection is outside of events: nobody can use it, so nothing is written of it but that it was confirmed.
    """
    announce_connections(session, change, [row])


def announce_connections(session: Session, change: Change, rows: Sequence[Connection], **known: Any) -> None:  # noqa: ANN401 - JSON values
    """As ``announce_connection``, of many in one statement; rows of the ``COLUMNS`` do.

    ``known``: what became of all of them, in place of what the rows say.
    """
    told = [{**_fields(row), **known} for row in rows if row.status != "pending"]
    _write(session, f"{PROVIDER}.connection.{change}", told)


def announce(session: Session, kind: Kind, data: Mapping[str, Any]) -> None:
    """Write an event that is about no connection, in the caller's transaction. ``data`` is JSON, without a secret."""
    _write(session, kind, [data])


def _fields(row: Connection) -> dict[str, Any]:
    return {
        "connection_id": row.id,
        "integration": row.integration,
        "provider": row.provider,
        "subject": row.subject,
        "account_id": row.account_id,
        "status": row.status,
        "status_reason": row.status_reason,
        "tags": dict(row.tags),
    }


def _write(session: Session, event_type: str, told: Sequence[Mapping[str, Any]]) -> None:
    if not told:
        return
    session.flush()  # what the caller has changed stands before what tells of it
    at = now(session)
    ids = new_ordered_ids("evt", len(told), at)
    rows = [_row(event_id, event_type, data, at) for event_id, data in zip(ids, told, strict=True)]
    session.execute(sa.insert(WebhookEvent), rows)


def _row(event_id: str, event_type: str, data: Mapping[str, Any], at: float) -> dict[str, Any]:
    body = msgspec.json.encode({"id": event_id, "type": event_type, "created_at": rfc3339(at), "data": data})
    return {
        "id": event_id,
        "type": event_type,
        "provider": PROVIDER,
        "connection_id": data.get("connection_id"),
        "parked": False,
        "verdict": {},
        "received_at": at,
        "content_type": CONTENT_TYPE,
        "headers": [],
        "size": len(body),
        "body": body,
    }
