"""Numbers in the order of commits, and a delivery for each subscription that wants an event."""

from __future__ import annotations

import asyncio

from sqlmodel import Session, col, select

from broker.database import Database, now
from broker.models import WebhookDelivery, WebhookEvent, WebhookState, new_id
from broker.webhooks.configured import Rule
from broker.webhooks.fanning_out import NewDelivery, ToFanOut, fan_out, insert_deliveries, wanting
from broker.webhooks.matching import EventBody


def rule(subscription_id: str, *event_types: str, order_key: str | None = None) -> Rule:
    return Rule(subscription_id, event_types, None, {}, order_key)


def event(type_: str, body: bytes = b"{}") -> ToFanOut:
    return ToFanOut(new_id("evt"), type_, "src_a", EventBody(body, "application/json"))


def insert(session: Session, events: list[ToFanOut]) -> None:
    session.add_all(
        WebhookEvent(id=one.event_id, type=one.type, provider="p", source_id="src_a", received_at=now(session))
        for one in events
    )
    session.flush()


async def test_events_get_numbers_without_a_gap_and_deliveries_for_those_who_want_them(database: Database) -> None:
    events = [event("github.push", b'{"ref": "main"}'), event("github.issues.opened"), event("stripe.charge")]
    rules = [rule("sub_all", "**"), rule("sub_push", "github.push", order_key="/ref")]

    def work(session: Session) -> int:
        insert(session, events)
        return fan_out(session, events, rules)

    assert await database.transaction(work) == 4
    rows = await database.read(
        lambda session: list(session.exec(select(WebhookEvent).order_by(col(WebhookEvent.number))))
    )
    assert [(row.id, row.number) for row in rows] == [(one.event_id, at) for at, one in enumerate(events, 1)]
    made = await database.read(lambda session: list(session.exec(select(WebhookDelivery))))
    assert {(one.subscription_id, one.event_id, one.number, one.order_key) for one in made} == {
        ("sub_all", events[0].event_id, 1, None),
        ("sub_all", events[1].event_id, 2, None),
        ("sub_all", events[2].event_id, 3, None),
        ("sub_push", events[0].event_id, 1, "main"),
    }
    assert {(one.state, one.attempts, one.replay, one.claim, tuple(one.tries)) for one in made} == {
        ("pending", 0, False, None, ())
    }
    assert all(one.due_at == one.created_at for one in made)


async def test_no_events_take_no_number_and_no_lock(database: Database) -> None:
    assert await database.transaction(lambda session: fan_out(session, [], [rule("sub_all", "**")])) == 0
    state = await database.read(lambda session: session.exec(select(WebhookState)).one())
    assert state.number == 0


async def test_what_is_rolled_back_leaves_no_gap(database: Database) -> None:
    lost, kept = event("github.push"), event("github.push")

    def fails(session: Session) -> None:
        insert(session, [lost])
        fan_out(session, [lost], [])
        raise KeyError

    failures = await asyncio.gather(database.transaction(fails), return_exceptions=True)
    assert isinstance(failures[0], KeyError)

    def works(session: Session) -> None:
        insert(session, [kept])
        fan_out(session, [kept], [])

    await database.transaction(works)
    rows = await database.read(lambda session: list(session.exec(select(WebhookEvent))))
    assert [(row.id, row.number) for row in rows] == [(kept.event_id, 1)]


async def test_many_at_once_keep_their_numbers_apart(database: Database) -> None:
    groups = [[event("github.push") for _ in range(5)] for _ in range(12)]

    def work(session: Session, group: list[ToFanOut]) -> None:
        insert(session, group)
        fan_out(session, group, [rule("sub_all", "**")])

    await asyncio.gather(
        *(database.transaction(lambda session, group=group: work(session, group)) for group in groups)  # type: ignore[misc]
    )
    numbers = await database.read(lambda session: list(session.exec(select(WebhookDelivery.number))))
    assert sorted(numbers) == list(range(1, 61))


async def test_more_deliveries_than_a_statement_takes_are_all_there(database: Database) -> None:
    given = [NewDelivery(f"sub_{at}", "evt_a", 7, None, replay=True) for at in range(100)]
    await database.transaction(lambda session: insert_deliveries(session, given, 5.0))
    rows = await database.read(lambda session: list(session.exec(select(WebhookDelivery))))
    assert {row.subscription_id for row in rows} == {one.subscription_id for one in given}
    assert {(row.number, row.replay, row.due_at) for row in rows} == {(7, True, 5.0)}


def test_who_wants_an_event_is_decided_by_each_rule() -> None:
    rules = [rule("sub_a", "github.*"), rule("sub_b", "stripe.**"), rule("sub_c", "**", order_key="/id")]
    assert wanting(event("github.push", b'{"id": 9}'), rules) == [("sub_a", None), ("sub_c", "9")]
