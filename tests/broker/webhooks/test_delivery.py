"""Deliveries over real sockets: what arrives, what a failure leads to, and that no subscriber slows another."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import time
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlmodel import col

from broker.database import Database, opened
from broker.limits import Rate, Rates
from broker.models import WebhookEvent
from broker.telemetry import render
from broker.webhooks.backoff import Attempt
from broker.webhooks.lanes import Bounds, Lane, Load, may_start
from broker.webhooks.sending import Sending
from broker.webhooks.signing import V1aKey
from tests.broker.far_side import OK, Line, answering, far_side, silence
from tests.broker.test_egress import Authority, Resolver, development, production
from tests.broker.virtual_time import Clock
from tests.broker.webhooks.deliveries import change, queued, row, states, subscribed, until
from tests.broker.webhooks.delivering import KEYS, OLD_SECRET, SECRET, Worker, worker

NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
BODY = b'{"a": 1}\r\n\x00\xff'


def status(code: int, *fields: str) -> bytes:
    lines = "".join(f"{one}\r\n" for one in fields)
    return f"HTTP/1.1 {code} Said\r\n{lines}Content-Length: 2\r\n\r\n{{}}".encode()


def field(request: bytes, name: str) -> str | None:
    said = re.search(rb"\r\n" + name.encode() + rb": ([^\r]*)\r\n", request.partition(b"\r\n\r\n")[0] + b"\r\n")
    return said[1].decode() if said else None


def body_of(request: bytes) -> bytes:
    return request.partition(b"\r\n\r\n")[2]


def expect_signed(request: bytes, *secrets: str) -> None:
    """Assert that each secret's own signature is there, over exactly what arrived."""
    signed = f"{field(request, 'webhook-id')}.{field(request, 'webhook-timestamp')}.".encode() + body_of(request)
    keys = [base64.b64decode(one.removeprefix("whsec_")) for one in secrets]
    wanted = [base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in keys]
    assert (field(request, "webhook-signature") or "").split(" ") == [f"v1,{one}" for one in wanted]


async def due_now(database: Database, *ids: str) -> None:
    await change(database, *ids, due_at=1.0)


# --- What arrives.


async def test_the_providers_bytes_arrive_signed_under_the_events_id(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near:
        one = await subscribed(database)
        near.active(one, f"http://127.0.0.1:{far.port}/hook?x=%2F&y", SECRET, OLD_SECRET)
        (delivery_id,) = await queued(database, [one], body=BODY)
        await near.all_delivered()
        (request,) = far.requests
        kept = await row(database, delivery_id)
        assert request.startswith(b"POST /hook?x=%2F&y HTTP/1.1\r\n")
        assert body_of(request) == BODY
        assert field(request, "content-type") == "application/json"
        assert field(request, "webhook-id") == kept.event_id
        assert abs(int(field(request, "webhook-timestamp") or 0) - time.time()) < 60
        expect_signed(request, SECRET, OLD_SECRET)
        assert (field(request, "x-broker-event-type"), field(request, "x-broker-source")) == ("github.push", "src_1")
        assert (field(request, "x-broker-provider-event-id"), field(request, "x-broker-replay")) == ("p1", None)
        assert (kept.attempts, kept.claim, kept.tries[0]["status"]) == (1, None, 200)
        figures = render(near.metrics).decode()
        assert 'broker_webhook_attempts_total{outcome="delivered"} 1.0' in figures
        assert "broker_webhook_first_attempt_seconds_count 1.0" in figures


async def test_a_v1a_subscriber_gets_a_signature_of_each_live_key(database: Database) -> None:
    async with far_side(answering(NO_CONTENT)) as far, worker(database) as near:
        one = await subscribed(database)
        near.active(one, f"http://127.0.0.1:{far.port}/", signature="v1a", secrets=())
        await queued(database, [one], replay=True)
        await near.all_delivered()
        (request,) = far.requests
        signatures = (field(request, "webhook-signature") or "").split(" ")
        signed = f"{field(request, 'webhook-id')}.{field(request, 'webhook-timestamp')}.{{}}".encode()
        assert len(signatures) == len(KEYS)
        for key, signature in zip(KEYS, signatures, strict=True):
            key.private.public_key().verify(base64.b64decode(signature.removeprefix("v1a,")), signed)
        assert field(request, "x-broker-replay") == "true"


async def test_a_sealed_body_arrives_opened(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        event_id = (await row(database, delivery_id)).event_id
        sealed = near.sealer.seal(BODY, owner=event_id, purpose="event", version=1)
        of = col(WebhookEvent.id) == event_id
        values = {"body": None, "sealed_body": sealed}
        await database.transaction(lambda session: session.execute(sa.update(WebhookEvent).where(of).values(values)))
        near.active(one, f"http://127.0.0.1:{far.port}/")
        await near.all_delivered()
        assert body_of(far.requests[0]) == BODY


async def postponed(database: Database, delivery_id: str) -> None:
    """Wait until a delivery was given back, due later, and assert that this was no attempt."""
    made_at = (await row(database, delivery_id)).created_at
    look = partial(row, database, delivery_id)
    kept = await until(look, lambda kept: kept.claim is None and kept.due_at >= made_at + 5)
    assert (kept.state, kept.attempts, kept.tries) == ("pending", 0, [])


async def test_a_body_that_does_not_open_waits_without_an_attempt(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        values = {"body": None, "sealed_body": near.sealer.seal(BODY, owner="evt_other", purpose="event", version=1)}
        await database.transaction(lambda session: session.execute(sa.update(WebhookEvent).values(values)))
        near.active(one, f"http://127.0.0.1:{far.port}/")
        await postponed(database, delivery_id)
        assert far.requests == []


async def test_what_cannot_be_signed_does_not_leave(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database, keys=list) as near:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        near.active(one, f"http://127.0.0.1:{far.port}/", signature="v1a", secrets=())
        await postponed(database, delivery_id)
        assert far.requests == []


async def test_an_event_that_was_erased_is_dead_with_its_reason(database: Database) -> None:
    async with worker(database) as near:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        await database.transaction(lambda session: session.execute(sa.delete(WebhookEvent)))
        near.active(one, "http://127.0.0.1:1/")
        await near.until(lambda found: found == ["dead"])
        assert (await row(database, delivery_id)).reason == "event_erased"


# --- What failures lead to.


async def test_it_is_tried_again_under_the_same_id_until_it_arrives(database: Database) -> None:
    async with far_side(answering(status(500), status(404), OK)) as far, worker(database) as near:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        near.active(one, f"http://127.0.0.1:{far.port}/")
        for attempts, delay in ((1, 5.0), (2, 300.0)):
            await near.until(lambda found: found == ["retrying"])
            kept = await row(database, delivery_id)
            assert (kept.attempts, kept.claim) == (attempts, None)
            assert kept.due_at - kept.tries[-1]["at"] == pytest.approx(delay, abs=3)
            await due_now(database, delivery_id)
            await far.until(lambda seen=attempts: len(far.requests) > seen)  # type: ignore[misc]
        await near.all_delivered()
        assert len({field(request, "webhook-id") for request in far.requests}) == 1
        assert [one["status"] for one in (await row(database, delivery_id)).tries] == [500, 404, 200]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_is_a_failure_and_not_followed(sqlite_url: str, code: int) -> None:
    async with opened(sqlite_url, migrate=False) as database, far_side(answering(OK)) as evil:
        answer = status(code, f"Location: http://127.0.0.1:{evil.port}/")
        async with far_side(answering(answer)) as far, worker(database) as near:
            one = await subscribed(database)
            (delivery_id,) = await queued(database, [one])
            near.active(one, f"http://127.0.0.1:{far.port}/")
            await near.until(lambda found: found == ["retrying"])
            assert (await row(database, delivery_id)).tries[0]["status"] == code
            assert evil.dialled == []


async def test_a_subscriber_that_is_gone_gets_no_more(database: Database) -> None:
    async with far_side(answering(status(410))) as far, worker(database) as near:
        one = await subscribed(database)
        near.active(one, f"http://127.0.0.1:{far.port}/", max_concurrent=1)
        (first,) = await queued(database, [one])
        await near.until(lambda found: found == ["dead"])
        await queued(database, [one])
        assert near.disabled == [(one, "gone")]
        assert (await row(database, first)).reason == "gone"
        await near.until(lambda found: sorted(found) == ["dead", "pending"])  # held, not dropped
        assert len(far.requests) == 1


async def test_retry_after_of_a_429_puts_the_delivery_and_its_lane_off(database: Database) -> None:
    async with far_side(answering(status(429, "Retry-After: 120"))) as far, worker(database) as near:
        one = await subscribed(database)
        near.active(one, f"http://127.0.0.1:{far.port}/", max_concurrent=1)
        (first,) = await queued(database, [one])
        await near.until(lambda found: found == ["retrying"])
        kept = await row(database, first)
        assert kept.due_at - kept.tries[0]["at"] == pytest.approx(120, abs=3)
        (second,) = await queued(database, [one])
        await due_now(database, first)
        for _ in range(5):
            await near.delivery._round()
        assert len(far.requests) == 1
        assert (await row(database, second)).state == "pending"


async def test_no_answer_in_time_is_a_failure(database: Database) -> None:
    async with far_side(silence) as far, worker(database) as near:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        near.active(one, f"http://127.0.0.1:{far.port}/", timeout_seconds=0.1)
        await near.until(lambda found: found == ["retrying"])
        assert (await row(database, delivery_id)).tries[0]["error"] == "timeout"


async def test_nobody_there_and_no_whole_answer_are_failures_with_a_word_of_ours(database: Database) -> None:
    async def cut(line: Line) -> None:
        await line.request()

    async with far_side(cut) as far, worker(database) as near:
        one, other = await subscribed(database), await subscribed(database)
        (unreachable,), (torn,) = await queued(database, [one]), await queued(database, [other])
        near.active(one, "http://127.0.0.1:1/")
        near.active(other, f"http://127.0.0.1:{far.port}/")
        await near.until(lambda found: found == ["retrying", "retrying"])
        assert (await row(database, unreachable)).tries[0]["error"] == "unreachable"
        assert (await row(database, torn)).tries[0]["error"] == "no_answer"


async def test_an_answers_body_is_not_waited_for(database: Database) -> None:
    async def endless(line: Line) -> None:
        await line.request()
        await line.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await line.say(b"400\r\n" + b"x" * 1024 + b"\r\n")

    async with far_side(endless) as far, worker(database) as near:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        near.active(one, f"http://127.0.0.1:{far.port}/")
        await near.all_delivered()
        assert "xxx" not in str(await row(database, delivery_id))


# --- Where it may go.


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "fd00:ec2::254", "::ffff:10.0.0.1", "127.0.0.1"])
async def test_a_private_or_metadata_address_is_refused_when_it_is_dialled(sqlite_url: str, address: str) -> None:
    async with opened(sqlite_url, migrate=False) as database, far_side(answering(OK)) as far:
        resolver = Resolver([address])
        async with worker(database, production(egress_allow="10.0.0.0/8,127.0.0.0/8"), resolve=resolver) as near:
            one = await subscribed(database)
            (delivery_id,) = await queued(database, [one])
            near.active(one, f"https://app.good.test:{far.port}/")
            await near.until(lambda found: found == ["retrying"])
            tried = (await row(database, delivery_id)).tries[0]
            assert (tried["error"], tried["status"]) == ("egress_denied", None)
            assert (far.dialled, len(resolver.asked)) == ([], 1)


async def test_a_name_that_turns_private_between_two_attempts_is_refused(database: Database) -> None:
    answer = b"HTTP/1.1 500 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    resolver = Resolver(["127.0.0.1"], ["10.0.0.1"])
    async with far_side(answering(answer)) as far, worker(database, development(), resolve=resolver) as near:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        near.active(one, f"http://app.good.test:{far.port}/")
        await near.until(lambda found: found == ["retrying"])
        await due_now(database, delivery_id)
        tries = (await until(partial(row, database, delivery_id), lambda kept: kept.attempts == 2)).tries
        assert [one["error"] for one in tries] == [None, "egress_denied"]
        assert len(far.dialled) == 1


async def test_a_named_exception_opens_exactly_its_network(database: Database, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    settings = production(egress_ca_file=authority.file, delivery_allow="127.0.0.0/29")
    hosts = ["127.0.0.1", "127.0.1.1"]
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    async with (
        far_side(answering(answer), tls=authority.context("app.good.test"), hosts=hosts) as far,
        worker(database, settings, resolve=Resolver(["127.0.0.1"], ["127.0.1.1"])) as near,
    ):
        one = await subscribed(database)
        near.active(one, f"https://app.good.test:{far.port}/")
        await queued(database, [one])
        await near.all_delivered()
        (outside,) = await queued(database, [one])
        await near.until(lambda found: "retrying" in found)
        assert (await row(database, outside)).tries[0]["error"] == "egress_denied"
        assert far.dialled == ["127.0.0.1"]


async def test_production_speaks_no_http(database: Database) -> None:
    async with far_side(answering(OK)) as far:
        settings = production(delivery_allow="127.0.0.0/8")
        async with worker(database, settings, resolve=Resolver(["127.0.0.1"])) as near:
            one = await subscribed(database)
            (delivery_id,) = await queued(database, [one])
            near.active(one, f"http://app.good.test:{far.port}/")
            await near.until(lambda found: found == ["retrying"])
            assert (await row(database, delivery_id)).tries[0]["error"] == "egress_denied"
            assert far.dialled == []


# --- That no subscriber slows another.


@given(
    own=st.integers(0, 20),
    others=st.lists(st.integers(0, 20), max_size=15),
    most=st.integers(32, 64),
)
def test_a_lane_below_its_share_may_always_begin(own: int, others: list[int], most: int) -> None:
    """However the others came to what they hold, by these very rules."""
    bounds, lanes = Bounds(most, 10**6), len(others) + 1
    share = max(1, most // 2 // lanes)
    together = 0
    for wanted in others:
        held = 0
        while held < wanted and may_start(Load(held, 0), Load(together, 0), 0, lanes, bounds):
            held, together = held + 1, together + 1
    assert together <= most
    mine = 0
    while mine < own and may_start(Load(mine, 0), Load(together, 0), 0, lanes, bounds):
        mine, together = mine + 1, together + 1
    assert mine >= min(own, share)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 120)), max_size=60))
def test_bodies_under_way_stay_within_the_bound_but_for_one_that_is_larger(asked: list[tuple[int, int]]) -> None:
    bounds, lanes, together = Bounds(1000, 100), {one: Load() for one in range(4)}, Load()
    for lane, size in asked:
        if may_start(lanes[lane], together, size, 4, bounds):
            lanes[lane] = Load(lanes[lane].attempts + 1, lanes[lane].body_bytes + size)
            together = Load(together.attempts + 1, together.body_bytes + size)
    assert together.body_bytes <= 100 or together.attempts == 1


async def test_one_that_hangs_one_that_fails_and_one_that_refuses_slow_no_other(database: Database) -> None:
    """The hanging one never answers, so that every other delivery that arrives has overtaken it."""
    hangs, fails = far_side(silence), far_side(answering(status(500)))
    refuses, well = far_side(answering(status(429, "Retry-After: 3"))), far_side(answering(OK))
    bounds = Bounds(attempts=8, body_bytes=10**6)
    async with (
        hangs as hanging,
        fails as failing,
        refuses as refusing,
        well as healthy,
        worker(database, bounds=bounds, grace_seconds=0.0) as near,
    ):
        bad = [await subscribed(database) for _ in range(3)]
        good = [await subscribed(database) for _ in range(4)]
        await queued(database, bad, 20)
        for one, far in zip(bad, (hanging, failing, refusing), strict=True):
            near.active(one, f"http://127.0.0.1:{far.port}/")
        await hanging.until(lambda: len(hanging.requests) >= 2)
        await queued(database, good, 20)
        for one in good:
            near.active(one, f"http://127.0.0.1:{healthy.port}/")
        await near.all_delivered(*good)
        assert hanging.open <= bounds.attempts // 2
        assert set(await states(database, bad[0])) <= {"pending", "delivering"}
        assert len(refusing.requests) <= 16  # held back as a whole, as it asked
        assert len(failing.requests) <= 16  # its breaker opened
        assert len(healthy.requests) == 80


async def test_no_more_attempts_than_a_subscriber_takes_at_once(database: Database) -> None:
    most = open_now = 0

    async def slow(line: Line) -> None:
        nonlocal most, open_now
        while True:
            await line.request()
            open_now += 1
            most = max(most, open_now)
            await asyncio.sleep(0.01)
            open_now -= 1
            await line.say(OK)

    async with far_side(slow) as far, worker(database) as near:
        one = await subscribed(database)
        await queued(database, [one], 30)
        near.active(one, f"http://127.0.0.1:{far.port}/", max_concurrent=3)
        await near.all_delivered()
        assert most == 3


async def test_a_rate_holds_from_the_first_attempt_on(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near:
        one = await subscribed(database)
        await queued(database, [one], 6)
        began = time.monotonic()
        near.active(one, f"http://127.0.0.1:{far.port}/", max_per_second=5.0)
        await near.all_delivered()
        assert time.monotonic() - began >= 0.9
        assert len(far.requests) == 6


async def test_an_open_breaker_burns_no_attempts_and_one_probe_closes_it(database: Database) -> None:
    well = False

    async def play(line: Line) -> None:
        while True:
            await line.request()
            await line.say(OK if well else status(500))

    clock = Clock()
    async with far_side(play) as far, worker(database, monotonic=clock.monotonic) as near:
        one = await subscribed(database)
        ids = await queued(database, [one], 20)
        near.active(one, f"http://127.0.0.1:{far.port}/", max_concurrent=1)
        await near.until(lambda found: found.count("retrying") == 5 and found.count("pending") == 15)
        assert len(far.requests) == 5
        clock.elapsed += 31.0
        await near.until(lambda found: found.count("retrying") == 6 and found.count("pending") == 14)
        assert len(far.requests) == 6  # one probe
        well = True
        clock.elapsed += 31.0
        await near.until(lambda found: found.count("delivered") == 14)
        assert [(await row(database, each)).attempts for each in ids].count(1) == 20


# --- Order, pauses, and several workers.


async def test_events_with_one_key_arrive_in_order_over_a_failure(database: Database) -> None:
    async with far_side(answering(status(500), OK)) as far, worker(database) as near:
        one = await subscribed(database)
        ids = [(await queued(database, [one], order_key="a"))[0] for _ in range(4)]
        near.active(one, f"http://127.0.0.1:{far.port}/")
        await near.until(lambda found: "retrying" in found)
        assert len(far.requests) == 1
        await due_now(database, ids[0])
        await near.all_delivered()
        arrived = [field(request, "x-broker-provider-event-id") for request in far.requests]
        assert arrived == ["p1", "p1", "p2", "p3", "p4"]


async def test_a_paused_subscription_holds_its_deliveries_and_loses_none(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near:
        one, other = await subscribed(database), await subscribed(database)
        await queued(database, [one, other], 3)
        near.active(other, f"http://127.0.0.1:{far.port}/")
        await near.all_delivered(other)
        assert await states(database, one) == ["pending"] * 3
        near.active(one, f"http://127.0.0.1:{far.port}/")
        await near.all_delivered()


async def test_what_waits_in_a_lane_is_given_back_when_its_subscription_is_paused(database: Database) -> None:
    go_on = asyncio.Event()

    async def play(line: Line) -> None:
        await line.request()
        await go_on.wait()
        await line.say(OK)

    async with far_side(play) as far, worker(database) as near:
        one = await subscribed(database)
        await queued(database, [one], 4)
        near.active(one, f"http://127.0.0.1:{far.port}/", max_concurrent=1)
        await far.until(lambda: len(far.requests) == 1)
        near.receivers.clear()
        await near.until(lambda found: sorted(found) == ["delivering", "pending", "pending", "pending"])
        go_on.set()
        await near.until(lambda found: sorted(found) == ["delivered", "pending", "pending", "pending"])
        assert len(far.requests) == 1


async def test_several_workers_never_attempt_the_same_delivery_at_once(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near, worker(database) as beside:
        one = await subscribed(database)
        for each in (near, beside):
            each.active(one, f"http://127.0.0.1:{far.port}/")
        await queued(database, [one], 100)
        await near.all_delivered()
        ids = [field(request, "webhook-id") for request in far.requests]
        assert len(ids) == len(set(ids)) == 100


async def test_another_worker_takes_over_what_a_dead_one_held_and_a_late_word_is_not_heard(database: Database) -> None:
    released: dict[int, asyncio.Event] = {0: asyncio.Event()}
    turns = iter(range(10))

    async def play(line: Line) -> None:
        turn = next(turns)
        await line.request()
        if turn in released:
            await released[turn].wait()
            await line.say(status(500))
        else:
            await line.say(OK)

    async with far_side(play) as far, worker(database) as late:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        late.active(one, f"http://127.0.0.1:{far.port}/")
        await far.until(lambda: len(far.requests) == 1)
        late.receivers.clear()
        await due_now(database, delivery_id)  # its lease is over
        async with worker(database) as next_one:
            next_one.active(one, f"http://127.0.0.1:{far.port}/")
            await next_one.all_delivered()
        released[0].set()
        await until(partial(asyncio.sleep, 0), lambda _: not late.delivery._held)
        kept = await row(database, delivery_id)
        assert (kept.state, kept.attempts, [one["status"] for one in kept.tries]) == ("delivered", 1, [200])


async def test_a_heartbeat_keeps_a_long_attempt_from_being_taken_over(database: Database) -> None:
    go_on = asyncio.Event()

    async def play(line: Line) -> None:
        await line.request()
        await go_on.wait()
        await line.say(OK)

    leased = partial(worker, database, lease_seconds=0.6)
    async with far_side(play) as far, leased() as near, leased() as beside:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        near.active(one, f"http://127.0.0.1:{far.port}/")
        await far.until(lambda: len(far.requests) == 1)
        beside.active(one, f"http://127.0.0.1:{far.port}/")
        first_end = (await row(database, delivery_id)).due_at
        await until(partial(row, database, delivery_id), lambda kept: kept.due_at >= first_end + 1.0)
        go_on.set()
        await near.all_delivered()
        assert len(far.requests) == 1


async def test_a_stop_finishes_what_is_under_way_and_gives_the_rest_back(database: Database) -> None:
    go_on = asyncio.Event()

    async def play(line: Line) -> None:
        await line.request()
        await go_on.wait()
        await line.say(OK)

    async with far_side(play) as far:
        async with worker(database) as near:
            one = await subscribed(database)
            await queued(database, [one], 3)
            near.active(one, f"http://127.0.0.1:{far.port}/", max_concurrent=1)
            await far.until(lambda: len(far.requests) == 1)
            near.delivery.stop()
            go_on.set()
        assert sorted(await states(database)) == ["delivered", "pending", "pending"]
        assert len(far.requests) == 1


async def test_an_attempt_beyond_the_grace_time_is_given_back(database: Database) -> None:
    async with far_side(silence) as far:
        async with worker(database, grace_seconds=0.0) as near:
            one = await subscribed(database)
            (delivery_id,) = await queued(database, [one])
            near.active(one, f"http://127.0.0.1:{far.port}/")
            await far.until(lambda: len(far.requests) == 1)
        kept = await row(database, delivery_id)
        assert (kept.state, kept.attempts, kept.claim) == ("pending", 0, None)


async def test_what_another_process_stores_is_noticed(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near:
        one = await subscribed(database)
        near.active(one, f"http://127.0.0.1:{far.port}/")
        await queued(database, [one])
        await until(partial(states, database), lambda found: found == ["delivered"])  # nobody wakes it
        assert len(far.requests) == 1


async def test_a_second_worker_of_the_same_process_changes_nothing(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near:
        one = await subscribed(database)
        near.active(one, f"http://127.0.0.1:{far.port}/")
        async with near.delivery.running():
            pass
        await queued(database, [one])
        await near.all_delivered()
        assert len(far.requests) == 1


@pytest.mark.parametrize("key", ["a", ""])
async def test_a_line_goes_on_at_once_when_the_one_before_has_ended(database: Database, key: str) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near:
        one = await subscribed(database)
        near.active(one, f"http://127.0.0.1:{far.port}/")
        began = time.monotonic()
        await queued(database, [one], 8, order_key=key)
        await until(partial(states, database), lambda found: set(found) == {"delivered"})  # nobody wakes it
        assert time.monotonic() - began < 6  # 1 s each, were the next one only noticed


async def test_a_defect_before_the_request_leaves_keeps_no_delivery(database: Database) -> None:
    broken = [True]

    def keys() -> list[V1aKey]:
        if broken:
            raise KeyError("a defect")
        return KEYS

    async with far_side(answering(OK)) as far, worker(database, keys=keys) as near:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        near.active(one, f"http://127.0.0.1:{far.port}/", signature="v1a", secrets=())
        await postponed(database, delivery_id)
        await until(partial(asyncio.sleep, 0), lambda _: not near.delivery._held)
        assert far.requests == []
        broken.clear()
        await due_now(database, delivery_id)
        await near.all_delivered()


class DefectiveSending(Sending):
    """Posts nothing."""

    def __init__(self, whole: Sending) -> None:
        """Have the parts of a whole one."""
        self.__dict__.update(whole.__dict__)

    async def post(self, request: object, seconds: float) -> Attempt:
        """Fail as no code should."""
        raise KeyError(request, seconds)


class DefectiveRates(Rates):
    """Count nothing."""

    async def take(self, key: str, rate: Rate | None, *, caller: str, wait_seconds: float) -> None:
        """Fail as no code should."""
        raise KeyError(key, rate, caller, wait_seconds)


async def test_a_defect_behind_the_request_counts_as_an_attempt(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near:
        one = await subscribed(database)
        (delivery_id,) = await queued(database, [one])
        near.delivery._sending = DefectiveSending(near.delivery._sending)
        near.active(one, f"http://127.0.0.1:{far.port}/")
        await near.until(lambda found: found == ["retrying"])
        kept = await row(database, delivery_id)
        assert (kept.attempts, kept.claim, kept.tries[0]["error"]) == (1, None, "defect")


async def test_a_defect_of_a_lane_gives_its_deliveries_back_and_it_goes_on_later(database: Database) -> None:
    async with far_side(answering(OK)) as far, worker(database) as near:
        one = await subscribed(database)
        ids = await queued(database, [one], 3)
        whole, near.delivery._rates = near.delivery._rates, DefectiveRates()
        near.active(one, f"http://127.0.0.1:{far.port}/", max_per_second=100.0)
        await until(partial(lane_of, near, one), lambda lane: lane is not None and lane.held_until > 0)
        for each in ids:
            await until(partial(row, database, each), lambda kept: kept.claim is None)
        assert far.requests == []
        near.delivery._rates = whole
        await near.all_delivered()


async def lane_of(near: Worker, subscription_id: str) -> Lane | None:
    return near.delivery._lanes.get(subscription_id)
