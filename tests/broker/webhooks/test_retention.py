"""What retention removes, and what it never does; and the figures of what waits."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import Session, SQLModel, col, select

from broker.database import Database, now
from broker.models import WebhookDelivery, WebhookEvent, WebhookSeen
from broker.telemetry import new_metrics, render
from broker.webhooks.backlog import measure
from broker.webhooks.retention import BATCH, Retention
from tests.flows import events_made as made

DAY = 86_400.0


async def clock(database: Database) -> float:
    return await database.read(now)


async def kept(database: Database, table: type[Any] = WebhookEvent) -> set[str]:
    query = sa.select(table.id)
    return set(await database.read(lambda session: session.execute(query).scalars().all()))


async def set_all(database: Database, table: type[SQLModel], *conditions: Any, **values: Any) -> None:
    change = sa.update(table).where(*conditions).values(**values)
    await database.transaction(lambda session: session.execute(change) and None)


async def test_old_events_go_with_their_deliveries_and_young_ones_stay(database: Database) -> None:
    at = await clock(database)
    await made.subscription(database)
    old = await made.events(database, 2 * BATCH + 3, received_at=at - 3 * DAY)
    young = await made.events(database, 3, received_at=at - DAY)
    await set_all(database, WebhookDelivery, state="delivered")
    assert await Retention(database, days=2, count=1_000_000).sweep() == len(old)
    assert await kept(database) == set(young)
    rows = await database.read(lambda session: list(session.exec(select(WebhookDelivery))))
    assert {row.event_id for row in rows} == set(young)


async def test_the_newest_so_many_stay(database: Database) -> None:
    events = await made.events(database, 30)
    assert await Retention(database, days=2, count=12).sweep() == 18
    assert await kept(database) == set(events[18:])


async def test_what_is_still_to_be_delivered_stays_and_what_is_held_until_twice_the_age(database: Database) -> None:
    at = await clock(database)
    active = await made.subscription(database, "sender.a")
    await made.subscription(database, "sender.b", active=False)
    to_be_made = await made.event(database, type="sender.a", received_at=at - 9 * DAY)
    held = await made.event(database, type="sender.b", received_at=at - 3 * DAY)
    held_too_long = await made.event(database, type="sender.b", received_at=at - 5 * DAY)
    dead = await made.event(database, type="sender.a", received_at=at - 3 * DAY)
    await set_all(database, WebhookDelivery, col(WebhookDelivery.event_id) == dead, state="dead")
    retention = Retention(database, days=2, count=1_000_000)
    assert await retention.sweep() == 2
    assert await kept(database) == {to_be_made, held}
    assert held_too_long not in await kept(database)
    mine = col(WebhookDelivery.subscription_id) == active
    await set_all(database, WebhookDelivery, mine, state="delivered")
    assert await retention.sweep() == 1, "it is looked at again"
    assert await kept(database) == {held}


async def test_what_stays_does_not_hide_what_is_behind_it(database: Database) -> None:
    at = await clock(database)
    await made.subscription(database, "sender.a")
    stays = await made.events(database, BATCH + 5, type="sender.a", received_at=at - 9 * DAY)
    await made.events(database, 4, type="sender.b", received_at=at - 9 * DAY)
    assert await Retention(database, days=2, count=1_000_000).sweep() == 4
    assert await kept(database) == set(stays)


async def test_parked_events_go_with_their_age_and_waiting_ones_never(database: Database) -> None:
    parked = await made.unnumbered(database, parked=True)
    old = await made.unnumbered(database, parked=True)
    waiting = await made.unnumbered(database)
    ago = await clock(database) - 3 * DAY
    await set_all(database, WebhookEvent, col(WebhookEvent.id).in_([old, waiting]), received_at=ago)
    assert await Retention(database, days=2, count=1_000).sweep() == 1
    assert await kept(database) == {parked, waiting}


async def test_marks_of_earlier_posts_go_when_they_end(database: Database) -> None:
    at = await clock(database)

    def work(session: Session) -> None:
        for n in range(BATCH + 3):
            session.add(WebhookSeen(source_id="src_1", digest=f"d{n}", event_id="evt_1", expires_at=at - 1))
        session.add(WebhookSeen(source_id="src_1", digest="live", event_id="evt_1", expires_at=at + 60))

    await database.transaction(work)
    await Retention(database, days=2, count=1_000).sweep()
    left = await database.read(lambda session: [row.digest for row in session.exec(select(WebhookSeen))])
    assert left == ["live"]


def figure(text: str, name: str) -> float:
    [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize("with_events", [False, True])
async def test_the_figures_say_what_waits(database: Database, *, with_events: bool) -> None:
    metrics = new_metrics()
    if with_events:
        await made.subscription(database, "sender.a")
        await made.subscription(database, "sender.b", active=False)
        await made.events(database, 3, type="sender.a")
        await made.events(database, 2, type="sender.b")
        dead = await made.event(database, type="sender.a")
        mine = col(WebhookDelivery.event_id) == dead
        await set_all(database, WebhookDelivery, mine, state="dead")
        at = await clock(database)
        await set_all(database, WebhookDelivery, col(WebhookDelivery.state) == "pending", created_at=at - 100)
        await made.unnumbered(database, parked=True)
        await made.unnumbered(database)
    await measure(database, metrics)
    text = render(metrics).decode()
    expected = {
        'broker_webhook_deliveries{state="open"}': 3,
        'broker_webhook_deliveries{state="held"}': 2,
        'broker_webhook_deliveries{state="dead"}': 1,
        'broker_webhook_events_waiting{why="parked"}': 1,
        'broker_webhook_events_waiting{why="waiting"}': 1,
    }
    assert {name: figure(text, name) for name in expected} == {name: n * with_events for name, n in expected.items()}
    oldest = figure(text, "broker_webhook_oldest_undelivered_seconds")
    assert 100 <= oldest < 160 if with_events else oldest == 0


async def test_a_pass_ends_at_the_first_batch_of_which_nothing_is_due(database: Database) -> None:
    """Else each pass would read all that is kept, while others wait to write; what came late goes with those around it."""
    at = await clock(database)
    young = await made.events(database, BATCH)
    late = await made.event(database, received_at=at - 9 * DAY)
    assert await Retention(database, days=2, count=1_000_000).sweep() == 0
    assert await kept(database) == {*young, late}
    await set_all(database, WebhookEvent, col(WebhookEvent.id) == young[-1], received_at=at - 3 * DAY)
    assert await Retention(database, days=2, count=1_000_000).sweep() == 2
    assert await kept(database) == {*young[:-1]}
