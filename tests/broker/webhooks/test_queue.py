"""The leased table on both databases: who holds what, in which order, and whose word counts."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import Session, col

from broker.database import Database
from broker.models import WebhookDelivery, WebhookEvent, WebhookSubscription
from broker.webhooks.backoff import FAILING_ATTEMPTS, FAILING_SECONDS, Attempt, next_of
from broker.webhooks.queue import _IN_SQLITE, Outcome, Taken, claim, events_of, extend, last_number, record, soonest
from tests.broker.webhooks.deliveries import change, queued, row, states, subscribed, subscription

DAY = 86_400.0


class Disabled:
    """Notes who was disabled, and does it as the subscriptions do."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self.calls: list[tuple[str, str]] = []

    def __call__(self, session: Session, subscription_id: str, reason: str) -> None:
        self.calls.append((subscription_id, reason))
        of = col(WebhookSubscription.id) == subscription_id
        session.execute(sa.update(WebhookSubscription).where(of).values(active=False, disabled_reason=reason))


async def take(database: Database, *subscription_ids: str, free: int = 10, by: str = "clm_1") -> list[Taken]:
    wanted = dict.fromkeys(subscription_ids, free)
    return await database.transaction(partial(claim, wanted=wanted, claim_id=by, lease_seconds=30.0))


def tried(taken: Taken, status: int | None) -> Outcome:
    then = next_of(Attempt(status, None if status else "timeout"), taken.attempts + 1, random_share=0.5)
    return Outcome(taken, then, {"at": taken.taken_at, "status": status, "error": None, "ms": 3})


async def write(database: Database, *outcomes: Outcome, disable: Any = None) -> list[bool]:
    work = partial(record, outcomes=outcomes, disable=disable or Disabled())
    return await database.transaction(work)


async def test_a_claim_takes_what_was_due_first_and_no_more_than_there_is_room_for(database: Database) -> None:
    one, other, paused = [await subscribed(database) for _ in range(3)]
    ids = await queued(database, [one], 5)
    await queued(database, [other, paused], 2)
    await change(database, ids[3], due_at=1.0)
    await change(database, ids[0], due_at=4e9)
    found = await database.transaction(partial(claim, wanted={one: 2, other: 1}, claim_id="clm_1", lease_seconds=30.0))
    assert [taken.id for taken in found if taken.subscription_id == one] == [ids[3], ids[1]]
    assert [taken.subscription_id for taken in found].count(other) == 1
    assert await states(database, paused) == ["pending", "pending"]
    kept = await row(database, ids[3])
    assert (kept.state, kept.claim) == ("delivering", "clm_1")
    assert kept.due_at == pytest.approx(found[0].taken_at + 30.0, abs=1)
    assert found[0].size == 2


async def test_what_is_claimed_is_nobody_elses_until_the_lease_is_over(database: Database) -> None:
    one = await subscribed(database)
    (delivery_id,) = await queued(database, [one])
    (first,) = await take(database, one, by="clm_1")
    assert await take(database, one, by="clm_2") == []
    await change(database, delivery_id, due_at=1.0)  # the lease is over
    (second,) = await take(database, one, by="clm_2")
    assert await write(database, tried(first, 200)) == [False]  # the late holder's word
    kept = await row(database, delivery_id)
    assert (kept.state, kept.attempts, kept.claim) == ("delivering", 0, "clm_2")
    assert await write(database, tried(second, 200)) == [True]
    kept = await row(database, delivery_id)
    assert (kept.state, kept.attempts, kept.claim, kept.tries[0]["status"]) == ("delivered", 1, None, 200)


async def test_claims_at_the_same_time_never_share_a_delivery(database: Database) -> None:
    one = await subscribed(database)
    ids = await queued(database, [one], 40)
    found = await asyncio.gather(*(take(database, one, free=7, by=f"clm_{turn}") for turn in range(8)))
    taken = [each.id for group in found for each in group]
    assert len(taken) == len(set(taken))
    rest = await take(database, one, free=40, by="clm_last")
    assert sorted([*taken, *(each.id for each in rest)]) == ids


async def test_a_heartbeat_extends_only_what_is_still_held(database: Database) -> None:
    one = await subscribed(database)
    ids = await queued(database, [one], 2)
    found = await take(database, one)
    await change(database, *ids, due_at=1.0)
    await change(database, ids[1], claim="clm_other")
    held = {taken.id: taken.claim for taken in found}
    assert await database.transaction(partial(extend, held=held, lease_seconds=30.0)) == 1
    assert (await row(database, ids[0])).due_at > found[0].taken_at
    assert (await row(database, ids[1])).due_at == 1.0
    assert await database.transaction(partial(extend, held={}, lease_seconds=30.0)) == 0


async def test_what_is_given_back_is_due_as_before_and_costs_no_attempt(database: Database) -> None:
    one = await subscribed(database)
    ids = await queued(database, [one], 2)
    before = (await row(database, ids[0])).due_at
    first, second = await take(database, one)
    assert await write(database, Outcome(first, None), Outcome(second, None, delay_seconds=10.0)) == [True, True]
    kept, later = await row(database, ids[0]), await row(database, ids[1])
    assert (kept.state, kept.attempts, kept.tries, kept.due_at) == ("pending", 0, [], before)
    assert later.due_at == pytest.approx(second.taken_at + 10.0, abs=2)


async def test_a_failed_attempt_waits_its_time_and_the_eighth_is_the_last(database: Database) -> None:
    one = await subscribed(database)
    (delivery_id,) = await queued(database, [one])
    for attempt in range(1, 9):
        await change(database, delivery_id, due_at=1.0)
        (taken,) = await take(database, one, by=f"clm_{attempt}")
        await write(database, tried(taken, 500))
        kept = await row(database, delivery_id)
        assert kept.attempts == attempt == len(kept.tries)
        assert kept.state == ("retrying" if attempt < 8 else "dead")
    assert (kept.reason, kept.ended_at is None) == ("attempts_exhausted", False)


async def test_order_holds_within_a_key_and_nowhere_else(database: Database) -> None:
    one = await subscribed(database)
    a = [(await queued(database, [one], order_key="a"))[0] for _ in range(3)]
    (b,) = await queued(database, [one], order_key="b")
    (plain,) = await queued(database, [one])
    found = {taken.id: taken for taken in await take(database, one)}
    assert set(found) == {a[0], b, plain}
    assert await take(database, one) == []
    await write(database, tried(found[a[0]], 500))
    assert await take(database, one) == []  # it waits for its retry, and those behind it with it
    await change(database, a[0], due_at=1.0)
    (again,) = await take(database, one)
    assert again.id == a[0]
    await write(database, tried(again, 200))
    (second,) = await take(database, one)
    assert second.id == a[1]
    await write(database, Outcome(second, next_of(Attempt(410), 1, random_share=0.5), None))  # dead: the line goes on
    (third,) = await take(database, one)
    assert third.id == a[2]


async def test_those_behind_in_a_line_are_not_looked_at_again_and_again(database: Database) -> None:
    one = await subscribed(database)
    for _ in range(3):
        await queued(database, [one], order_key="a")
    (first,) = await take(database, one)
    at, due = await database.query(partial(soonest, subscription_ids=[one]))
    assert due[one] > at
    await write(database, tried(first, 200))
    at, due = await database.query(partial(soonest, subscription_ids=[one]))
    assert due[one] <= at


async def test_replays_stand_outside_of_the_order(database: Database) -> None:
    one = await subscribed(database)
    ids = [(await queued(database, [one], order_key="a", replay=bool(turn % 2)))[0] for turn in range(4)]
    assert {taken.id for taken in await take(database, one)} == {ids[0], ids[1], ids[3]}


async def test_the_soonest_of_each_subscription_is_known_without_a_lock(database: Database) -> None:
    one, other, empty = [await subscribed(database) for _ in range(3)]
    ids = await queued(database, [one], 2)
    await queued(database, [other], state="delivered")
    await change(database, ids[0], due_at=4e9)
    await change(database, ids[1], due_at=5e9)
    at, due = await database.query(partial(soonest, subscription_ids=[one, other, empty]))
    assert due == {one: 4e9}
    assert at == pytest.approx((await row(database, ids[0])).created_at, abs=60)
    assert await database.query(last_number) == 3


async def test_events_come_with_their_bodies_and_one_that_is_gone_is_none(database: Database) -> None:
    one = await subscribed(database)
    first, second = [await row(database, each) for each in await queued(database, [one], 2, body=b"\x00\xff")]
    await database.transaction(
        lambda session: session.execute(sa.delete(WebhookEvent).where(col(WebhookEvent.id) == second.event_id))
    )
    asked = [first.event_id, second.event_id, first.event_id]
    found = await database.query(partial(events_of, event_ids=asked))
    assert found[1] is None
    assert found[0] is found[2]
    assert found[0] is not None
    assert (found[0].body, found[0].type) == (b"\x00\xff", "github.push")
    taken = {each.event_id: each for each in await take(database, one)}
    assert taken[second.event_id].size is None


async def test_a_410_disables_the_subscription_at_once(database: Database) -> None:
    one, disabled = await subscribed(database), Disabled()
    await queued(database, [one], 2)
    first, second = await take(database, one)
    await write(database, tried(first, 410), tried(second, 500), disable=disabled)
    assert disabled.calls == [(one, "gone")]
    assert (await row(database, first.id)).reason == "gone"
    assert (await row(database, second.id)).state == "retrying"


async def test_failing_since_is_set_by_the_first_failure_and_ended_by_any_success(database: Database) -> None:
    one = await subscribed(database)
    await queued(database, [one], 3)
    first, second, third = await take(database, one)
    await write(database, tried(first, 500))
    since = (await subscription(database, one)).failing_since
    assert since is not None
    await write(database, tried(second, None))
    assert (await subscription(database, one)).failing_since == since
    await write(database, tried(third, 204))
    assert (await subscription(database, one)).failing_since is None


@pytest.mark.parametrize(
    ("days", "attempts", "ends"),
    [(4.9, 50, False), (5.1, FAILING_ATTEMPTS - 2, False), (5.1, FAILING_ATTEMPTS - 1, True)],
)
async def test_a_subscription_is_disabled_after_days_without_one_success(
    database: Database, *, days: float, attempts: int, ends: bool
) -> None:
    one, disabled = await subscribed(database), Disabled()
    (dead,) = await queued(database, [one], state="dead", attempts=attempts - 1)
    await queued(database, [one], attempts=1)
    (taken,) = await take(database, one)
    at = taken.taken_at
    await change(database, dead, ended_at=at)
    since = at - days * DAY
    of = col(WebhookSubscription.id) == one
    await database.transaction(
        lambda session: session.execute(sa.update(WebhookSubscription).where(of).values(failing_since=since))
    )
    await write(database, tried(taken, 500), disable=disabled)
    assert disabled.calls == ([(one, "failing")] if ends else [])
    assert FAILING_SECONDS == 5 * DAY


async def test_a_claim_uses_the_index_over_what_is_open(database: Database) -> None:
    """Delivered rows are most of the table: looking for what is due must not walk over them."""
    one = await subscribed(database)
    await queued(database, [one], 3)
    looked: list[str] = []

    def explain(connection: sa.Connection) -> None:
        values = {"subscription_id": one, "at": 1.0, "free": 3}
        query = _IN_SQLITE.params(values).compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
        word = "EXPLAIN QUERY PLAN"
        if connection.dialect.name != "sqlite":
            word = "EXPLAIN"
            connection.exec_driver_sql("SET enable_seqscan = off")
        looked.extend(str(line) for line in connection.exec_driver_sql(f"{word} {query}"))

    await database.query(explain)
    assert any("ix_webhook_deliveries_open" in line for line in looked)
    assert any("ix_webhook_deliveries_ordered" in line for line in looked)


async def test_a_delivery_that_vanished_is_no_error(database: Database) -> None:
    one = await subscribed(database)
    await queued(database, [one])
    (taken,) = await take(database, one)
    await database.transaction(lambda session: session.execute(sa.delete(WebhookDelivery)))
    assert await write(database, tried(taken, 200)) == [False]


async def test_two_words_on_one_delivery_in_a_group_are_told_apart(database: Database) -> None:
    """The word of the claim that holds it is written, and what came of an attempt goes before giving it back."""
    one = await subscribed(database)
    (delivery_id,) = await queued(database, [one])
    (lost,) = await take(database, one)
    await change(database, delivery_id, due_at=1.0)
    (held,) = await take(database, one, by="clm_2")
    assert await write(database, tried(held, 200), Outcome(held, None), tried(lost, 500)) == [True, True, False]
    kept = await row(database, delivery_id)
    assert (kept.state, [each["status"] for each in kept.tries]) == ("delivered", [200])


DUE_AT = sa.select(col(WebhookDelivery.due_at)).where(col(WebhookDelivery.state) == "pending")


async def test_a_long_line_that_waits_hides_no_other_for_long(database: Database) -> None:
    one = await subscribed(database)
    head, *_ = await queued(database, [one], 300, order_key="a")
    (other,) = await queued(database, [one])
    assert [taken.id for taken in await take(database, one)] == [head]
    assert [taken.id for taken in await take(database, one, by="clm_2")] == [other]
    behind = await database.read(lambda session: session.execute(DUE_AT).scalars().all())
    assert len(behind) == 299
    assert min(behind) > (await row(database, head)).created_at + 30
