"""Requests to a webhook source: proven on the raw bytes, stored before the 2xx, told from their twins, refused in one shape."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import hmac
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from broker.models import WebhookDelivery, WebhookEvent
from broker.telemetry import render
from broker.webhooks.routes import WebhookRoute
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.webhook_senders import (
    PUSH,
    SECRET,
    Answered,
    Fields,
    deliveries_of,
    events_of,
    exchange,
    execute,
    github_fields,
    new_source,
    new_subscription,
    post,
    raw_request,
    read_answer,
    rejections_of,
    rows,
    seen_of,
    with_field,
)

MOST_BYTES = 65_536
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give one broker to the whole file; its tests keep apart by sources of their own."""
    folder = tmp_path_factory.mktemp("inbox")
    async with open_rig(folder, trusted_proxies="127.0.0.0/8", webhook_most_bytes=MOST_BYTES) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def each_rig(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    """Give a broker of this test's own, on SQLite and on PostgreSQL."""
    async with open_rig(tmp_path, database_url=database_url) as made:
        yield made


def is_refusal(answer: Answered) -> bool:
    """Whether an answer is the one shape of a refusal: only the request's id differs."""
    told = answer.json()
    told.pop("request_id")
    return answer.status == 401 and told == {
        "type": "urn:broker:error:unauthenticated",
        "title": "A valid caller key is required",
        "status": 401,
        "detail": "The request is not proven to come from the provider",
        "code": "unauthenticated",
    }


# What is proven is kept


async def test_a_proven_event_is_stored_as_it_came_before_it_is_acknowledged(each_rig: Rig) -> None:
    source_id = await new_source(each_rig)
    body = b'{"zen": "Keep  it logically awesome.",\n "\xc3\xa9": 1}\r\n'
    fields = [*github_fields(body, delivery="d-1"), ("Authorization", "Bearer canary"), ("Cookie", "a=canary")]
    answer = await post(each_rig, f"/webhooks/{source_id}?canary=1", fields, body)
    (event,) = await events_of(each_rig, source_id)
    assert (answer.status, answer.json()) == (202, {"event_id": event.id, "duplicate": False})
    assert answer.headers["x-request-id"]
    assert (event.body, event.size, event.type, event.provider) == (body, len(body), "github.push", "github")
    assert (event.provider_event_id, event.content_type, event.parked) == ("d-1", "application/json", False)
    assert event.number is not None
    assert dict(event.headers)["x-github-event"] == "push"
    assert "canary" not in json.dumps(event.headers)
    assert not {"x-hub-signature-256", "authorization", "cookie", "host", "content-length"} & dict(event.headers).keys()
    secret_id = event.verdict.pop("secret_id")
    assert secret_id is not None
    assert event.verdict == {
        "covers": ["body"],
        "event_type_signed": False,
        "delivery_id_signed": False,
        "signed_at": None,
        "fresh": False,
    }


async def test_an_event_goes_to_those_who_want_it_in_the_same_transaction(each_rig: Rig) -> None:
    source_id = await new_source(each_rig)
    every = await new_subscription(each_rig, "**")
    pushes = await new_subscription(each_rig, "github.push", filter={"/ref": ["refs/heads/main"]}, order_key="/ref")
    await new_subscription(each_rig, "github.push", filter={"/ref": ["refs/heads/other"]})
    await new_subscription(each_rig, "github.issues.*")
    held = await new_subscription(each_rig, "github.**", source_id=source_id, active=False)
    answer = await post(each_rig, f"/webhooks/{source_id}", github_fields(PUSH), PUSH)
    event_id = answer.json()["event_id"]
    made = {one.subscription_id: one for one in await deliveries_of(each_rig, event_id)}
    assert made.keys() == {every, pushes, held}
    (event,) = await events_of(each_rig, source_id)
    assert {one.number for one in made.values()} == {event.number}
    assert {one.state for one in made.values()} == {"pending"}
    assert (made[pushes].order_key, made[every].order_key) == ("refs/heads/main", None)


async def test_a_sealed_source_keeps_no_byte_of_the_body_in_the_clear(each_rig: Rig) -> None:
    source_id = await new_source(each_rig, config={"seal": True})
    answer = await post(each_rig, f"/webhooks/{source_id}", github_fields(PUSH), PUSH)
    (event,) = await events_of(each_rig, source_id)
    assert answer.status == 202
    assert event.body is None
    assert event.sealed_body is not None
    assert PUSH not in event.sealed_body
    opened = each_rig.parts.sealer.open(event.sealed_body, owner=event.id, purpose="event", version=1)
    assert opened == PUSH


async def test_numbers_have_no_gap_and_follow_the_order_of_arrival(each_rig: Rig) -> None:
    source_id = await new_source(each_rig)
    bodies = [json.dumps({"n": number}).encode() for number in range(40)]
    answers = await asyncio.gather(
        *(post(each_rig, f"/webhooks/{source_id}", github_fields(body), body) for body in bodies)
    )
    assert {answer.status for answer in answers} == {202}
    events = await events_of(each_rig, source_id)
    assert [event.number for event in events] == list(range(1, 41))
    assert {event.body for event in events} == set(bodies)


# Twins


async def test_the_same_bytes_twice_are_one_event_delivered_once(each_rig: Rig) -> None:
    source_id = await new_source(each_rig)
    await new_subscription(each_rig, "**")
    first = await post(each_rig, f"/webhooks/{source_id}", github_fields(PUSH, delivery="one"), PUSH)
    # The delivery's id is not signed, so another one makes it no other delivery.
    second = await post(each_rig, f"/webhooks/{source_id}", github_fields(PUSH, delivery="two"), PUSH)
    other = await post(each_rig, f"/webhooks/{source_id}", github_fields(PUSH + b" ", delivery="one"), PUSH + b" ")
    assert (first.json()["duplicate"], second.status, second.json()["duplicate"]) == (False, 202, True)
    assert second.json()["event_id"] == first.json()["event_id"] != other.json()["event_id"]
    assert len(await events_of(each_rig, source_id)) == 2
    assert len(await deliveries_of(each_rig, first.json()["event_id"])) == 1


async def test_a_signed_delivery_id_is_the_same_delivery_in_other_bytes(each_rig: Rig) -> None:
    source_id = await new_source(each_rig, "stripe", secret="whsec_made_up")
    answers = []
    for at in (time.time(), time.time() - 60, time.time() - 60):  # the provider signs each try anew; the last is a copy
        body = json.dumps({"id": "evt_1", "type": "charge.succeeded"}).encode()
        answers.append(await post(each_rig, f"/webhooks/{source_id}", stripe_fields(body, at), body))
    assert [answer.status for answer in answers] == [answers[0].status] * 3
    (event,) = await events_of(each_rig, source_id)
    assert event.type == "stripe.charge.succeeded"
    assert {one.event_id for one in await seen_of(each_rig, source_id)} == {event.id}
    assert {one.digest.partition(":")[0] for one in await seen_of(each_rig, source_id)} == {"id", "bytes"}


async def test_the_same_bytes_at_two_sources_are_two_events(rig: Rig) -> None:
    sources = [await new_source(rig), await new_source(rig)]
    answers = [await post(rig, f"/webhooks/{one}", github_fields(PUSH), PUSH) for one in sources]
    assert [answer.json()["duplicate"] for answer in answers] == [False, False]


async def test_of_twins_that_race_one_is_stored_and_all_are_told_its_id(each_rig: Rig) -> None:
    source_id = await new_source(each_rig)
    answers = await asyncio.gather(
        *(post(each_rig, f"/webhooks/{source_id}", github_fields(PUSH), PUSH) for _ in range(20))
    )
    assert sorted(answer.json()["duplicate"] for answer in answers) == [False] + [True] * 19
    assert len({answer.json()["event_id"] for answer in answers}) == 1
    assert len(await events_of(each_rig, source_id)) == 1


@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
async def test_a_twin_waits_for_one_that_another_process_has_not_committed(
    each_rig: Rig, database_url: str, ending: str
) -> None:
    source_id = await new_source(each_rig)
    digest = f"bytes:{hashlib.sha256(PUSH).hexdigest()}"
    async with begun(database_url, source_id, digest) as end:
        twin = asyncio.create_task(post(each_rig, f"/webhooks/{source_id}", github_fields(PUSH), PUSH))
        done, _ = await asyncio.wait({twin}, timeout=0.3)
        assert not done, "acknowledged what may still be lost"
        await end(ending)
        answer = await twin
    stored = await events_of(each_rig, source_id)
    assert answer.status == 202
    assert answer.json()["duplicate"] == (ending == "COMMIT")
    assert (answer.json()["event_id"] == "evt_of_another") == (ending == "COMMIT")
    assert len(stored) == (0 if ending == "COMMIT" else 1)


@asynccontextmanager
async def begun(url: str, source_id: str, digest: str) -> AsyncIterator[Callable[[str], Awaitable[object]]]:
    """Be another process in the middle of its transaction; give what ends it."""
    insert = f"INSERT INTO webhook_seen VALUES ('{source_id}', '{digest}', 'evt_of_another', 9e9)"  # noqa: S608 - made here
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as driver:
            driver.execute("BEGIN IMMEDIATE")
            driver.execute(insert)
            yield lambda ending: asyncio.sleep(0, driver.execute(ending))
        return
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.execute(sa.text("BEGIN"))
        await connection.execute(sa.text(insert))
        yield lambda ending: connection.execute(sa.text(ending))


# What proves nothing


def changed_signature(change: Callable[[str], list[str]]) -> Callable[[bytes], tuple[Fields, bytes]]:
    def made(body: bytes) -> tuple[Fields, bytes]:
        fields = github_fields(body)
        return with_field(fields, "X-Hub-Signature-256", *change(dict(fields)["X-Hub-Signature-256"])), body

    return made


THREATS: dict[str, tuple[str, Callable[[bytes], tuple[Fields, bytes]]]] = {
    "missing": ("header_missing", changed_signature(lambda _: [])),
    "empty": ("header_missing", changed_signature(lambda _: [""])),
    "good and then bad": ("header_repeated", changed_signature(lambda good: [good, f"sha256={'0' * 64}"])),
    "bad and then good": ("header_repeated", changed_signature(lambda good: [f"sha256={'0' * 64}", good])),
    "good twice": ("header_repeated", changed_signature(lambda good: [good, good])),
    "wrong prefix": ("prefix_wrong", changed_signature(lambda good: [good.replace("sha256=", "sha512=")])),
    "no prefix": ("prefix_wrong", changed_signature(lambda good: [good.removeprefix("sha256=")])),
    "upper-case hex": ("encoding_wrong", changed_signature(lambda good: ["sha256=" + good[7:].upper()])),
    "one digit less": ("encoding_wrong", changed_signature(lambda good: [good[:-1]])),
    "one byte less": ("signature_mismatch", changed_signature(lambda good: [good[:-2]])),
    "one byte more": ("signature_mismatch", changed_signature(lambda good: [good + "00"])),
    "no hex": ("encoding_wrong", changed_signature(lambda _: ["sha256=" + "z" * 64])),
    "of another secret": ("signature_mismatch", lambda body: (github_fields(body, secret="other"), body)),
    "serialised anew": (
        "signature_mismatch",
        lambda body: (github_fields(body), json.dumps(json.loads(body), indent=1).encode()),
    ),
    "with a byte order mark": ("signature_mismatch", lambda body: (github_fields(body), b"\xef\xbb\xbf" + body)),
    "in another charset": ("signature_mismatch", lambda body: (github_fields(body), body.decode().encode("utf-16"))),
    "cut": ("signature_mismatch", lambda body: (github_fields(body), body[:-1])),
    "emptied": ("signature_mismatch", lambda body: (github_fields(body), b"")),
}


@pytest.mark.parametrize("threat", THREATS)
async def test_what_is_not_proven_is_refused_in_one_shape_and_nothing_of_it_is_kept(rig: Rig, threat: str) -> None:
    step, make = THREATS[threat]
    source_id = await new_source(rig)
    await new_subscription(rig, "**", source_id=source_id)
    refused = await post(rig, f"/webhooks/{source_id}", *make(PUSH))
    assert is_refusal(refused), refused.body
    assert await events_of(rig, source_id) == []
    assert await seen_of(rig, source_id) == []
    good = await post(rig, f"/webhooks/{source_id}", github_fields(PUSH), PUSH)
    assert (good.status, good.json()["duplicate"]) == (202, False)
    (rejection,) = await eventually(lambda: rejections_of(rig, source_id))
    assert (rejection.step, rejection.method, rejection.count) == (step, "POST", 1)


def stripe_fields(body: bytes, at: float | str) -> Fields:
    written = at if isinstance(at, str) else str(int(at))
    digest = hmac.new(b"whsec_made_up", f"{written}.".encode() + body, hashlib.sha256).hexdigest()
    return [("Content-Type", "application/json"), ("Stripe-Signature", f"t={written},v1={digest}")]


@pytest.mark.parametrize(
    ("step", "written"),
    [
        ("timestamp_stale", lambda: time.time() - 310),
        ("timestamp_ahead", lambda: time.time() + 310),
        ("timestamp_malformed", lambda: "soon"),
        ("timestamp_malformed", lambda: "-1700000000"),
        ("timestamp_malformed", lambda: "1e9"),
        ("timestamp_malformed", lambda: f"{int(time.time())}.5"),
    ],
)
async def test_a_signed_time_outside_its_window_or_no_number_is_refused(
    rig: Rig, step: str, written: Callable[[], float | str]
) -> None:
    source_id = await new_source(rig, "stripe", secret="whsec_made_up")
    body = b'{"id": "evt_1", "type": "charge.failed"}'
    refused = await post(rig, f"/webhooks/{source_id}", stripe_fields(body, written()), body)
    assert is_refusal(refused)
    good = await post(rig, f"/webhooks/{source_id}", stripe_fields(body, time.time() - 200), body)
    assert 200 <= good.status < 300
    assert len(await events_of(rig, source_id)) == 1
    (rejection,) = await eventually(lambda: rejections_of(rig, source_id))
    assert rejection.step == step


async def test_any_byte_changed_in_what_is_signed_gives_one_shape_of_refusal(rig: Rig) -> None:
    source_id = await new_source(rig)
    fields = github_fields(PUSH)
    for at in range(len(PUSH)):
        changed = PUSH[:at] + bytes([PUSH[at] ^ (1 + at % 255)]) + PUSH[at + 1 :]
        assert is_refusal(await post(rig, f"/webhooks/{source_id}", fields, changed)), at
    signature = dict(fields)["X-Hub-Signature-256"]
    for at in range(len(signature)):
        letter = chr((ord(signature[at]) ^ 1) & 127)
        changed_field = with_field(fields, "X-Hub-Signature-256", signature[:at] + letter + signature[at + 1 :])
        assert is_refusal(await post(rig, f"/webhooks/{source_id}", changed_field, PUSH)), at
    assert await events_of(rig, source_id) == []
    assert (await post(rig, f"/webhooks/{source_id}", fields, PUSH)).status == 202


async def test_rejections_are_counted_by_kind_and_address_and_never_quote_the_request(rig: Rig) -> None:
    source_id = await new_source(rig)
    fields = [
        *with_field(github_fields(PUSH), "X-Hub-Signature-256", "sha256=canary"),
        ("X-Forwarded-For", "192.0.2.7"),
    ]
    for _ in range(30):
        assert (await post(rig, f"/webhooks/{source_id}?canary", fields, PUSH)).status == 401

    async def counted() -> bool:
        found = await rejections_of(rig, source_id)
        return sum(one.count for one in found) == 30

    await eventually(counted)
    found = await rejections_of(rig, source_id)
    assert len(found) <= 5
    assert {(one.step, one.method, one.address, one.size) for one in found} == {
        ("encoding_wrong", "POST", "192.0.2.7", len(PUSH))
    }
    metrics = render(rig.parts.metrics).decode()
    assert f'broker_webhook_rejects_total{{source="{source_id}",step="encoding_wrong"}} 30.0' in metrics
    assert f'broker_webhook_requests_total{{outcome="unauthenticated",source="{source_id}"}} 30.0' in metrics


# Where nothing is read


@pytest.mark.parametrize(
    "path", ["/webhooks/", "/webhooks", "/webhooks/x/y", "/webhooks/src_x", "/webhooks/../health/live"]
)
async def test_what_is_no_source_is_not_found(rig: Rig, path: str) -> None:
    answer = await post(rig, path, github_fields(PUSH), PUSH)
    assert (answer.status, answer.json()["code"]) == (404, "not_found")
    assert answer.headers["content-type"].startswith("application/problem+json")


async def test_a_source_that_is_unknown_disabled_or_deeper_is_not_found(rig: Rig) -> None:
    source_id = await new_source(rig)
    fields = github_fields(PUSH)
    assert (await post(rig, f"/webhooks/{source_id}", fields, PUSH)).status == 202
    unlike = source_id[:-1] + ("a" if source_id[-1] != "a" else "b")
    escaped = f"%{ord(source_id[0]):x}{source_id[1:]}"
    for path in (unlike, f"{source_id}/", f"{source_id}/more", f"/{source_id}", escaped, source_id.upper()):
        assert (await post(rig, f"/webhooks/{path}", fields, PUSH)).status == 404, path
    assert (await rig.call("PATCH", f"/v1/webhook-sources/{source_id}", {"enabled": False})).status_code == 200
    assert (await post(rig, f"/webhooks/{source_id}", fields, PUSH)).status == 404
    assert len(await events_of(rig, source_id)) == 1


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_a_method_that_the_provider_never_uses_is_refused_unread(rig: Rig, method: str) -> None:
    source_id = await new_source(rig)
    answer = await post(rig, f"/webhooks/{source_id}", [], b"", method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    (rejection,) = await eventually(lambda: rejections_of(rig, source_id))
    assert (rejection.step, rejection.method) == ("method_refused", method)


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_came(rig: Rig) -> None:
    source_id = await new_source(rig)
    head = raw_request(f"/webhooks/{source_id}", [], b"").replace(b"Length: 0", b"Length: %d" % (MOST_BYTES + 1))
    answer = await exchange(rig, head)
    assert (answer.status, answer.json()["code"]) == (413, "payload_too_large")
    assert answer.headers["connection"] == "close"


async def test_a_body_of_unknown_length_is_cut_where_it_gets_too_large(rig: Rig) -> None:
    source_id = await new_source(rig)
    fitting, too_large = b"x" * MOST_BYTES, b"x" * (MOST_BYTES + 1)
    for body, status in ((fitting, 202), (too_large, 413)):
        head = raw_request(f"/webhooks/{source_id}", github_fields(body), b"")
        head = head.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        pieces = [body[at : at + 10_000] for at in range(0, len(body), 10_000)]
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        assert (await exchange(rig, head + chunked)).status == status
    (event,) = await events_of(rig, source_id)
    assert event.body == fitting


async def test_a_body_in_many_pieces_is_one_event(rig: Rig) -> None:
    source_id = await new_source(rig)
    raw, place = raw_request(f"/webhooks/{source_id}", github_fields(PUSH), PUSH), urlsplit(rig.base)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    for at in range(0, len(raw), 25):
        writer.write(raw[at : at + 25])
        await writer.drain()
        await asyncio.sleep(0)
    assert (await read_answer(reader)).status == 202
    writer.close()
    await writer.wait_closed()
    (event,) = await events_of(rig, source_id)
    assert event.body == PUSH


async def test_a_sender_that_leaves_in_the_middle_leaves_nothing_behind(rig: Rig) -> None:
    source_id = await new_source(rig)
    raw, place = raw_request(f"/webhooks/{source_id}", github_fields(PUSH), PUSH), urlsplit(rig.base)
    _, writer = await asyncio.open_connection(place.hostname, place.port)
    writer.write(raw[:-10])
    await writer.drain()
    writer.transport.abort()
    assert (await post(rig, f"/webhooks/{source_id}", github_fields(b"{}"), b"{}")).status == 202
    assert len(await events_of(rig, source_id)) == 1


async def test_one_address_may_send_so_much_in_a_minute(tmp_path: Path) -> None:
    async with open_rig(tmp_path, webhooks_per_minute=3, trusted_proxies="127.0.0.0/8") as rig:
        source_id = await new_source(rig)

        async def from_address(address: str) -> Answered:
            return await post(rig, f"/webhooks/{source_id}", [*github_fields(PUSH), ("X-Forwarded-For", address)], PUSH)

        assert [(await from_address("192.0.2.1")).status for _ in range(3)] == [202, 202, 202]
        over = await from_address("192.0.2.1")
        assert (over.status, over.json()["code"]) == (429, "rate_limited")
        assert 1 <= int(over.headers["retry-after"]) <= 60
        assert (await from_address("192.0.2.2")).status == 202
        within = [(await from_address(f"2001:db8::{part}")).status for part in range(1, 5)]
        assert within == [202, 202, 202, 429]  # one network of IPv6 is one client


async def test_one_address_cannot_hold_so_many_bytes_that_others_are_turned_away(tmp_path: Path) -> None:
    async with open_rig(tmp_path, trusted_proxies="127.0.0.0/8") as rig:
        target, large = f"/webhooks/{await new_source(rig)}", 20 * 1024**2
        slow, other = (("X-Forwarded-For", address) for address in ("192.0.2.1", "192.0.2.2"))
        head = raw_request(target, [slow], b"").replace(b"Length: 0", b"Length: %d" % large)
        place = urlsplit(rig.base)
        held: list[asyncio.StreamWriter] = []

        async def is_turned_away() -> bool:
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
            held.append(writer)
            writer.write(head)
            with contextlib.suppress(TimeoutError):
                return (await asyncio.wait_for(read_answer(reader), 0.2)).status == 503
            return False

        try:
            _, writer = await asyncio.open_connection(place.hostname, place.port)
            held.append(writer)
            writer.write(head + b"x" * (large - 1))  # and the last byte never comes
            await writer.drain()
            assert await eventually(is_turned_away)
            assert (await post(rig, target, [*github_fields(PUSH), other], PUSH)).status == 202
            assert (await post(rig, target, [*github_fields(b"{}"), slow], b"{}")).status == 202, (
                "a small one still fits"
            )
        finally:
            for one in held:
                one.transport.abort()


async def test_of_an_address_that_a_proxy_tells_at_length_nothing_long_is_kept(rig: Rig) -> None:
    target = f"/webhooks/{await new_source(rig)}"
    before = _kept_addresses()
    for number in range(5):
        made_up = ("X-Forwarded-For", f"x{number}" * 1000 + ", 192.0.2.9")
        answer = await post(rig, target, with_field([*github_fields(PUSH), made_up], "X-Hub-Signature-256", "x"), PUSH)
        assert is_refusal(answer)
    assert _kept_addresses() == before
    (rejection,) = await eventually(lambda: rejections_of(rig, target.rpartition("/")[2]))
    assert rejection.address == "192.0.2.9"


def _kept_addresses() -> list[int]:
    """Return the sizes of the caches of addresses that there are."""
    gc.collect()  # those of other brokers
    routes = [one for one in gc.get_objects() if isinstance(one, WebhookRoute)]
    return [one._address.cache_info().currsize for one in routes]  # memory is seen from inside alone


# What cannot be made durable


async def test_what_cannot_be_stored_is_never_acknowledged_and_comes_again(each_rig: Rig) -> None:
    source_id = await new_source(each_rig)
    await new_subscription(each_rig, "**")
    assert (await post(each_rig, f"/webhooks/{source_id}", github_fields(b"{}"), b"{}")).status == 202
    for table in ("webhook_events", "webhook_deliveries", "webhook_seen"):
        body = f'{{"lacks": "{table}"}}'.encode()
        await execute(each_rig, f"ALTER TABLE {table} RENAME TO away")
        failed = await post(each_rig, f"/webhooks/{source_id}", github_fields(body), body)
        await execute(each_rig, f"ALTER TABLE away RENAME TO {table}")
        assert (failed.status, failed.json()["code"]) == (503, "database_unavailable"), table
        assert int(failed.headers["retry-after"]) >= 1
        assert len(await events_of(each_rig, source_id)) == len(await seen_of(each_rig, source_id))
        again = await post(each_rig, f"/webhooks/{source_id}", github_fields(body), body)
        assert (again.status, again.json()["duplicate"]) == (202, False), "nothing was half-written"
    assert len(await rows(each_rig, WebhookEvent)) == len(await rows(each_rig, WebhookDelivery)) == 4


# What every route does


async def test_the_route_is_counted_by_its_template_and_its_query_is_in_no_log(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    source_id = await new_source(rig)
    await post(rig, f"/webhooks/{source_id}?token=canary-in-query", github_fields(PUSH), PUSH)
    metrics = render(rig.parts.metrics).decode()
    assert 'broker_http_requests_total{method="POST",route="/webhooks/{source_id}",status="2xx"}' in metrics
    assert f'broker_webhook_requests_total{{outcome="stored",source="{source_id}"}} 1.0' in metrics
    assert "broker_webhook_ack_seconds_count" in metrics
    printed = "".join(capfd.readouterr())
    assert "canary-in-query" not in printed


async def test_a_process_without_the_public_routes_has_no_sources(tmp_path: Path) -> None:
    async with open_rig(tmp_path, routes="private,admin") as rig:
        source_id = await new_source(rig)
        assert (await post(rig, f"/webhooks/{source_id}", github_fields(PUSH), PUSH)).status == 404


async def test_the_secret_that_matched_is_recorded_while_two_live_side_by_side(rig: Rig) -> None:
    source_id = await new_source(rig)
    added = await rig.call("POST", f"/v1/webhook-sources/{source_id}/secrets", {"secret": "the next secret"})
    assert added.status_code == 201, added.text
    for secret in (SECRET, "the next secret"):
        body = secret.encode()
        assert (await post(rig, f"/webhooks/{source_id}", github_fields(body, secret=secret), body)).status == 202
    matched = [event.verdict["secret_id"] for event in await events_of(rig, source_id)]
    assert len(set(matched)) == 2
    assert matched[1] == added.json()["id"]
