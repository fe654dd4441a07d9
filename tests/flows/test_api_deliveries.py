"""Deliveries over `/v1`: lists, sending one again, many by a filter with a count first, and what a subscription missed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import col, select

from broker.models import WebhookDelivery, WebhookSubscription, rfc3339
from broker.policy import Principal
from broker.webhooks.replaying import BulkFilter, Replaying
from tests.flows import events_made as made
from tests.flows.api_calls import check_problem
from tests.flows.rig import Rig, open_rig
from tests.flows.shared import audited, rewritten

ADMIN = Principal("clr_test", "test", frozenset({"admin"}), (), "key_test")


@pytest.fixture
async def rig(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, database_url=database_url) as opened:
        yield opened


async def listed(rig: Rig, query: str = "", *, limit: int = 2) -> list[dict[str, Any]]:
    found, cursor = [], ""
    for _ in range(100):
        answer = await rig.call("GET", f"/v1/deliveries?limit={limit}{query}{cursor}")
        assert answer.status_code == 200, answer.text
        found += answer.json()["data"]
        if answer.json()["next_cursor"] is None:
            return found
        cursor = f"&cursor={answer.json()['next_cursor']}"
    raise AssertionError("the list has no end")


async def of(rig: Rig, subscription_id: str | None = None) -> list[WebhookDelivery]:
    """Return the rows of a subscription, in the order of their ids."""
    query = select(WebhookDelivery).order_by(col(WebhookDelivery.id))
    found = await rig.parts.database.read(lambda session: list(session.exec(query)))
    return [row for row in found if subscription_id in {None, row.subscription_id}]


async def set_all(rig: Rig, *conditions: Any, **values: Any) -> None:
    change = sa.update(WebhookDelivery).where(*conditions).values(**values)
    await rig.parts.database.transaction(lambda session: session.execute(change) and None)


async def test_pages_hold_every_delivery_once_and_filters_leave_what_fits(rig: Rig) -> None:
    database = rig.parts.database
    one, two = await made.subscription(database), await made.subscription(database)
    events = [await made.event(database) for _ in range(5)]
    everything = [row.id for row in await of(rig)][::-1]
    for limit in (1, 3, 10, 50):
        assert [row["id"] for row in await listed(rig, limit=limit)] == everything, limit
    for query, expected in (
        (f"&subscription_id={one}", [row.id for row in await of(rig, one)][::-1]),
        (f"&event_id={events[2]}", [row.id for row in await of(rig) if row.event_id == events[2]][::-1]),
        ("&event_id=evt_absent", []),
    ):
        assert [row["id"] for row in await listed(rig, query, limit=1)] == expected
    [first, second, third, fourth, fifth] = await of(rig, two)
    for row, state in ((first, "dead"), (second, "delivered"), (third, "retrying"), (fourth, "delivering")):
        await rewritten(rig, WebhookDelivery, row.id, state=state)
    by_status = {"dead": first, "delivered": second, "retrying": third, "delivering": fourth, "pending": fifth}
    for status, row in by_status.items():
        assert [each["id"] for each in await listed(rig, f"&status={status}&subscription_id={two}")] == [row.id]
    await rewritten(rig, WebhookSubscription, two, active=False)
    held = await listed(rig, "&status=held", limit=1)
    assert [(row["id"], row["status"]) for row in held] == [(row.id, "held") for row in (fifth, fourth, third)]
    assert [row["id"] for row in await listed(rig, f"&status=pending&subscription_id={two}")] == []
    for query, pointer in (("status=unrouted", "?status"), ("limit=201", "?limit"), ("cursor=x", "?cursor")):
        check_problem(await rig.call("GET", f"/v1/deliveries?{query}"), 400, "invalid_request", pointer)


async def test_a_delivery_shows_its_attempts(rig: Rig) -> None:
    subscription_id = await made.subscription(rig.parts.database)
    event_id = await made.event(rig.parts.database)
    [row] = await of(rig)
    tries = [{"at": 1_700_000_000.5, "status": 500, "error": None, "ms": 12}]
    await rewritten(rig, WebhookDelivery, row.id, state="dead", attempts=1, tries=tries, reason="gone", ended_at=5.0)
    shown = (await rig.call("GET", f"/v1/deliveries/{row.id}")).json()
    assert shown == {
        "id": row.id,
        "event_id": event_id,
        "event_type": "sender.thing.made",
        "subscription_id": subscription_id,
        "connection_id": None,
        "status": "dead",
        "reason": "gone",
        "attempts": 1,
        "tries": [{"at": "2023-11-14T22:13:20.500Z", "status": 500, "error": None, "ms": 12}],
        "replay": False,
        "next_attempt_at": None,
        "created_at": rfc3339(row.created_at),
        "ended_at": rfc3339(5.0),
    }
    check_problem(await rig.call("GET", "/v1/deliveries/dlv_absent"), 404, "not_found")


async def test_a_retry_revives_a_dead_one_replays_a_delivered_one_and_refuses_one_under_way(rig: Rig) -> None:
    database = rig.parts.database
    subscription_id = await made.subscription(database)
    event_id = await made.event(database)
    [row] = await of(rig)

    async def retried(**values: Any) -> Any:
        await rewritten(rig, WebhookDelivery, row.id, **values)
        return await rig.call("POST", f"/v1/deliveries/{row.id}/retry")

    dead = await retried(state="dead", attempts=8, due_at=9e9, claim="c", reason="gave up", ended_at=5.0)
    assert (dead.status_code, dead.json()["id"], dead.json()["status"]) == (202, row.id, "pending")
    [revived] = await of(rig)
    assert (revived.attempts, revived.claim, revived.reason, revived.ended_at) == (0, None, None, None)
    assert revived.due_at < 9e9
    waiting = await retried(state="retrying", attempts=3, due_at=9e9)
    assert (waiting.status_code, waiting.json()["attempts"]) == (202, 3)
    assert (await of(rig))[0].due_at < 9e9
    for state in ("delivering", "pending"):
        check_problem(await retried(state=state), 409, "conflict")
    again = await retried(state="delivered", ended_at=5.0)
    assert (again.json()["event_id"], again.json()["replay"], again.json()["status"]) == (event_id, True, "pending")
    assert again.json()["id"] != row.id
    assert [one.state for one in await of(rig)] == ["delivered", "pending"]
    assert len(await audited(rig, "webhook_delivery.retried")) == 3
    await database.transaction(
        lambda session: (
            session.execute(sa.delete(WebhookSubscription).where(col(WebhookSubscription.id) == subscription_id))
            and None
        )
    )
    check_problem(await rig.call("POST", f"/v1/deliveries/{row.id}/retry"), 409, "conflict")


async def replay(rig: Rig, *, dry_run: bool = False, cursor: str | None = None, **wanted: Any) -> dict[str, Any]:
    body = {"filter": wanted, "dry_run": dry_run, **({"cursor": cursor} if cursor else {})}
    answer = await rig.call("POST", "/v1/deliveries/replay", body)
    assert answer.status_code == (200 if dry_run else 202), answer.text
    return dict(answer.json())


async def test_many_are_counted_first_and_then_sent_again(rig: Rig) -> None:
    database = rig.parts.database
    one, two = await made.subscription(database), await made.subscription(database)
    await made.events(database, 3, type="sender.a")
    await made.events(database, 600, type="sender.b.c")
    await set_all(rig, state="dead", ended_at=5.0)
    await set_all(rig, col(WebhookDelivery.subscription_id) == two, state="delivered")
    for wanted, total in (
        ({"status": "dead"}, 603),
        ({"status": "delivered", "subscription_id": two}, 603),
        ({"status": "delivered", "subscription_id": one}, 0),
        ({"type": "sender.a"}, 3),
        ({"type": "sender.*.c"}, 600),
        ({"source_id": "src_2"}, 0),
        ({"since": "2099-01-01T00:00:00Z"}, 0),
        ({"until": "2099-01-01T00:00:00Z"}, 603),
    ):
        assert (await replay(rig, dry_run=True, **wanted))["total"] == total, wanted
    assert {row.state for row in await of(rig)} == {"dead", "delivered"}, "counting changes nothing"
    done = await replay(rig, subscription_id=one, type="sender.b.**")
    assert done == {"dry_run": False, "total": 600, "retried": 600, "replayed": 0, "next_cursor": None}
    assert sorted(row.state for row in await of(rig, one)) == ["dead"] * 3 + ["pending"] * 600
    done = await replay(rig, status="delivered", type="sender.a")
    assert (done["replayed"], done["retried"]) == (3, 0)
    assert [row.replay for row in await of(rig, two)].count(True) == 3
    assert (await replay(rig, status="dead"))["retried"] == 3
    records = await audited(rig, "webhook_deliveries.replayed")
    assert [record.outcome for record in records] == ["intent", "ok"] * 3


async def test_what_names_nothing_or_nonsense_is_refused(rig: Rig) -> None:
    for wanted, pointer in (
        ({}, "/filter"),
        ({"status": "pending"}, "/filter/status"),
        ({"type": "a..b"}, "/filter/type"),
        ({"since": "now"}, "/filter/since"),
        ({"colour": "red"}, "/filter/colour"),
    ):
        answer = await rig.call("POST", "/v1/deliveries/replay", {"filter": wanted})
        check_problem(answer, 400, "invalid_request", pointer)
    for cursor in ("x", "WzAuMCwgImFiYyJd"):
        answer = await rig.call("POST", "/v1/deliveries/replay", {"filter": {"status": "dead"}, "cursor": cursor})
        check_problem(answer, 400, "invalid_request", "/cursor")
    auditor = await rig.caller(roles=("auditor",))
    seen = await rig.call("POST", "/v1/deliveries/replay", {"filter": {"status": "dead"}}, key=auditor)
    assert seen.json()["total"] == 0


async def test_an_order_that_is_too_large_for_one_call_goes_on_and_does_not_find_what_it_made(rig: Rig) -> None:
    database = rig.parts.database
    subscription_id = await made.subscription(database)
    await made.events(database, 1_200)
    await set_all(rig, state="delivered")
    replaying = Replaying(database, rig.parts.webhooks.history, rig.parts.audit, most_at_once=500)
    wanted, position, replayed, rounds = BulkFilter(status="delivered"), None, 0, 0
    while rounds == 0 or position is not None:
        done = await replaying.replay_many(wanted, ADMIN, dry_run=False, position=position)
        await set_all(rig, state="delivered")  # the worker is quick
        position, replayed, rounds = done.next, replayed + done.replayed, rounds + 1
    assert (replayed, rounds) == (1_200, 3)
    assert len(await of(rig, subscription_id)) == 2_400


async def test_recovering_makes_what_a_subscription_never_got_and_revives_what_is_dead(rig: Rig) -> None:
    database = rig.parts.database
    await made.event(database, received_at=1_000_000.0, body=made.body_of(kind="a"))
    await made.events(database, 2, body=made.body_of(kind="a", line="x"))
    await made.event(database, body=made.body_of(kind="b"))
    await made.event(database, source_id="src_2", body=made.body_of(kind="a"))
    await made.unnumbered(database, parked=True, body=made.body_of(kind="a"))
    late = await made.subscription(
        database, "sender.**", source_id="src_1", filter={"/kind": ["a"]}, order_key="/line", active=False
    )
    await made.event(database, body=made.body_of(kind="a"))
    await set_all(rig, state="dead", ended_at=5.0)

    async def recover(*, dry_run: bool) -> Any:
        body = {"since": "2001-01-01T00:00:00Z", "dry_run": dry_run}
        answer = await rig.call("POST", f"/v1/subscriptions/{late}/recover", body)
        assert answer.status_code == (200 if dry_run else 202), answer.text
        return answer.json()

    assert (await recover(dry_run=True))["total"] == 3
    done = await recover(dry_run=False)
    assert (done["total"], done["retried"], done["replayed"], done["next_cursor"]) == (3, 1, 2, None)
    found = await of(rig, late)
    assert sorted((row.number, row.order_key, row.replay) for row in found) == [
        (2, "x", True),
        (3, "x", True),
        (6, None, False),
    ]
    assert {row.state for row in found} == {"pending"}
    assert (await recover(dry_run=False))["total"] == 0, "asking again does no harm"
    auditor = await rig.caller(roles=("auditor",))
    body = {"since": "2001-01-01T00:00:00Z"}
    refused = await rig.call("POST", f"/v1/subscriptions/{late}/recover", body, key=auditor)
    check_problem(refused, 403, "forbidden")
    check_problem(await rig.call("POST", "/v1/subscriptions/sub_absent/recover", body), 404, "not_found")
    bad = await rig.call("POST", f"/v1/subscriptions/{late}/recover", {"since": "then"})
    check_problem(bad, 400, "invalid_request", "/since")
    assert [record.outcome for record in await audited(rig, "subscription.recovered")] == ["intent", "ok"] * 2


async def test_a_large_recovery_goes_on_from_the_number_that_it_reached(rig: Rig) -> None:
    database = rig.parts.database
    await made.events(database, 1_100)
    late = await made.subscription(database)
    replaying = Replaying(database, rig.parts.webhooks.history, rig.parts.audit, most_at_once=500)
    after, rounds = 0, 0
    while rounds == 0 or after:
        done = await replaying.recover(late, 0.0, ADMIN, dry_run=False, after=after)
        after, rounds = int(done.next[0]) if done.next is not None else 0, rounds + 1
    assert rounds == 3
    assert sorted(row.number for row in await of(rig, late)) == list(range(1, 1_101))


async def test_orders_that_follow_each_other_do_not_double_what_they_find(rig: Rig) -> None:
    subscription_id = await made.subscription(rig.parts.database)
    await made.events(rig.parts.database, 3)
    for _ in range(4):
        await set_all(rig, state="delivered")
        assert (await replay(rig, status="delivered"))["replayed"] == 3
    assert len(await of(rig, subscription_id)) == 3 + 4 * 3
    await set_all(rig, state="delivered")
    await set_all(rig, col(WebhookDelivery.replay).is_(False), created_at=1.0)
    since = {"status": "delivered", "since": "2001-01-01T00:00:00Z"}
    assert (await replay(rig, dry_run=True, **since))["total"] == 3, "the first one within the time counts"
    until = {"status": "delivered", "until": "2001-01-01T00:00:00Z"}
    assert (await replay(rig, dry_run=True, **until))["total"] == 3


async def test_what_is_sent_again_by_hand_wakes_the_worker(rig: Rig) -> None:
    database, woken = rig.parts.database, asyncio.Event()
    subscription_id = await made.subscription(database)
    event_id = await made.event(database)
    await set_all(rig, state="dead", ended_at=5.0)
    [row] = await of(rig)
    replaying = Replaying(database, rig.parts.webhooks.history, rig.parts.audit, wake=woken.set)
    late = await made.subscription(database)
    for act in (
        lambda: replaying.retry(row.id, ADMIN),
        lambda: replaying.replay(event_id, ADMIN, subscription_id=subscription_id),
        lambda: replaying.replay_many(BulkFilter(status="dead"), ADMIN, dry_run=False),
        lambda: replaying.recover(late, 0.0, ADMIN, dry_run=False),
    ):
        await set_all(rig, state="dead", ended_at=5.0)
        woken.clear()
        await act()
        assert woken.is_set()
    woken.clear()
    await replaying.replay_many(BulkFilter(status="dead"), ADMIN, dry_run=True)
    assert not woken.is_set()


async def test_a_retry_by_hand_goes_out_at_once(rig: Rig) -> None:
    """The process's own worker is told: it would look by itself after a second only."""
    database = rig.parts.database
    woken = rig.parts.webhooks.delivery._awake
    await made.subscription(database)
    await made.event(database)
    await set_all(rig, state="dead", ended_at=5.0)
    [row] = await of(rig)
    woken.clear()
    assert (await rig.call("POST", f"/v1/deliveries/{row.id}/retry")).status_code == 202
    assert woken.is_set()
