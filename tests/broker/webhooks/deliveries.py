"""Subscriptions and queued deliveries as rows, and what tests ask of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.database import Database, now
from broker.models import WebhookDelivery, WebhookEvent, WebhookState, WebhookSubscription, new_id, new_ordered_ids

T = TypeVar("T")


async def until(look: Callable[[], Awaitable[T]], fits: Callable[[T], bool]) -> T:
    """Look until what is seen fits; return it."""
    async with asyncio.timeout(10):
        while True:
            if fits(found := await look()):
                return found
            await asyncio.sleep(0.01)


async def subscribed(database: Database, url: str = "http://127.0.0.1:9/hook", **fields: Any) -> str:
    """Insert a subscription; return its id."""
    subscription_id = new_id("sub")

    def work(session: Session) -> None:
        at = now(session)
        times: dict[str, Any] = {"created_at": at, "updated_at": at}
        session.add(WebhookSubscription(id=subscription_id, url=url, event_types=["**"], **times, **fields))
        session.execute(sa.update(WebhookState).values(revision=WebhookState.revision + 1))

    await database.transaction(work)
    return subscription_id


async def queued(
    database: Database, subscription_ids: Sequence[str], count: int = 1, *, body: bytes = b"{}", **fields: Any
) -> list[str]:
    """Store events with a delivery to each subscription, in one transaction; return the deliveries' ids in order."""

    def work(session: Session) -> list[str]:
        at = now(session)
        step = sa.text("UPDATE webhook_state SET number = number + :count RETURNING number")
        first = int(session.execute(step, {"count": count}).scalar_one()) - count + 1
        ids = sorted(new_ordered_ids("dlv", count * len(subscription_ids), at))
        for number, event_id in enumerate(new_ordered_ids("evt", count, at), start=first):
            session.add(_event(event_id, number, at, body))
            for subscription_id in subscription_ids:
                same = {"number": number, "due_at": at, "created_at": at, **fields}
                one = ids[(number - first) * len(subscription_ids) + subscription_ids.index(subscription_id)]
                session.add(WebhookDelivery(id=one, subscription_id=subscription_id, event_id=event_id, **same))
        return ids

    return await database.transaction(work)


def _event(event_id: str, number: int, at: float, body: bytes) -> WebhookEvent:
    told: dict[str, Any] = {
        "type": "github.push",
        "source_id": "src_1",
        "provider": "github",
        "provider_event_id": f"p{number}",
    }
    kept: dict[str, Any] = {"received_at": at, "content_type": "application/json", "size": len(body), "body": body}
    return WebhookEvent(id=event_id, number=number, **told, **kept)


async def row(database: Database, delivery_id: str) -> WebhookDelivery:
    """Return a delivery as it is now."""
    found = await database.read(lambda session: session.get(WebhookDelivery, delivery_id))
    assert found is not None
    return found


async def states(database: Database, *subscription_ids: str) -> list[str]:
    """Return the states of deliveries in the order of their ids; of all, or of these subscriptions."""
    query = select(WebhookDelivery.state).order_by(col(WebhookDelivery.id))
    if subscription_ids:
        query = query.where(col(WebhookDelivery.subscription_id).in_(subscription_ids))
    return list(await database.read(lambda session: session.exec(query).all()))


async def change(database: Database, *delivery_ids: str, **values: Any) -> None:
    """Write into deliveries behind everybody's back: for example to let time pass."""
    of = col(WebhookDelivery.id).in_(delivery_ids)
    await database.transaction(lambda session: session.execute(sa.update(WebhookDelivery).where(of).values(**values)))


async def subscription(database: Database, subscription_id: str) -> WebhookSubscription:
    """Return a subscription as it is now."""
    found = await database.read(lambda session: session.get(WebhookSubscription, subscription_id))
    assert found is not None
    return found
