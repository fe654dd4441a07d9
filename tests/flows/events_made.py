"""Events and deliveries as the inbox leaves them, made by its own statements: for tests of what comes behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlmodel import Session

from broker.database import Database, now
from broker.models import WebhookEvent, WebhookSubscription, new_id, new_ordered_ids
from broker.webhooks.fanning_out import ToFanOut, fan_out
from broker.webhooks.matching import EventBody
from broker.webhooks.receivers import rules


def event_row(at: float, **fields: Any) -> WebhookEvent:
    """Return an event of a source ``src_1``, received at ``at``, not numbered yet."""
    given = {
        "type": "sender.thing.made",
        "source_id": "src_1",
        "provider": "sender",
        "verdict": {"scheme": "hmac"},
        "received_at": at,
        "content_type": "application/json",
        "headers": [["X-Kind", "thing"]],
        "body": b'{"n": 1}',
        **fields,
    }
    return WebhookEvent(id=new_ordered_ids("evt", 1, at)[0], size=len(given["body"] or b""), **given)


def put(session: Session, rows: Sequence[WebhookEvent]) -> list[str]:
    """Insert events and fan them out; return their ids."""
    session.add_all(rows)
    session.flush()
    events = [ToFanOut(row.id, row.type, row.source_id, EventBody(row.body or b"", row.content_type)) for row in rows]
    fan_out(session, events, rules(session)[1])
    return [row.id for row in rows]


async def event(database: Database, **fields: Any) -> str:
    """Receive one event now; return its id."""
    return (await events(database, 1, **fields))[0]


async def events(database: Database, count: int, **fields: Any) -> list[str]:
    """Receive so many events in one transaction; return their ids in the order of their numbers."""

    def work(session: Session) -> list[str]:
        at = fields.pop("received_at", None) or now(session)
        return put(session, [event_row(at, **fields) for _ in range(count)])

    return await database.transaction(work)


async def unnumbered(database: Database, **fields: Any) -> str:
    """Keep an event that nobody is told of yet; return its id."""

    def work(session: Session) -> str:
        row = event_row(now(session), **fields)
        session.add(row)
        return row.id

    return await database.transaction(work)


async def subscription(database: Database, *event_types: str, **fields: Any) -> str:
    """Make a subscription of a server that nobody calls; return its id."""

    def work(session: Session) -> str:
        at = now(session)
        given = {"url": "http://127.0.0.1:9/", "created_at": at, "updated_at": at, **fields}
        row = WebhookSubscription(id=new_id("sub"), event_types=list(event_types or ("**",)), **given)
        session.add(row)
        return row.id

    return await database.transaction(work)


def body_of(**members: Any) -> bytes:
    """Return JSON."""
    return json.dumps(members).encode()
