"""The history of events over `/v1`: pages, filters, pulling, bodies, who sees what, replays, erasure; on both databases."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import col

from broker.models import AuditRecord, Connection, WebhookDelivery, WebhookEvent, WebhookSubscription, rfc3339
from tests.flows import events_made as made
from tests.flows.api_calls import check_problem, grant, imported, same_but_for_the_request_id
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.shared import audited, rows


@pytest.fixture
async def rig(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, database_url=database_url) as opened:
        yield opened


async def listed(rig: Rig, query: str = "", *, limit: int = 2, key: str | None = None) -> list[dict[str, Any]]:
    """Follow the cursors to the end; return all rows."""
    found, cursor = [], ""
    for _ in range(200):
        answer = await rig.call("GET", f"/v1/events?limit={limit}{query}{cursor}", key=key)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert len(body["data"]) <= limit
        found += body["data"]
        if body["next_cursor"] is None:
            return found
        cursor = f"&cursor={body['next_cursor']}"
    raise AssertionError("the list has no end")


def ids(found: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in found]


async def change(rig: Rig, statement: Any) -> None:
    await rig.parts.database.transaction(lambda session: session.execute(statement) and None)


async def test_pages_hold_every_event_once_those_that_wait_first_then_the_newest(rig: Rig) -> None:
    database = rig.parts.database
    numbered = [*await made.events(database, 3), *await made.events(database, 4)]
    parked = await made.unnumbered(database, parked=True)
    waiting = await made.unnumbered(database)
    expected = [waiting, parked, *reversed(numbered)]
    for limit in (1, 2, 3, 9, 10):
        assert ids(await listed(rig, limit=limit)) == expected, limit
    [first, second, *_] = await listed(rig, limit=9)
    assert (first["status"], first["number"]) == ("waiting", None)
    assert (second["status"], second["number"]) == ("parked", None)
    assert ids(await listed(rig, "&status=parked")) == [parked]
    assert ids(await listed(rig, "&status=waiting")) == [waiting]


async def test_each_filter_leaves_what_fits(rig: Rig) -> None:
    database = rig.parts.database
    one = await made.event(database, type="sender.push")
    two = await made.event(database, type="sender.issue.opened", source_id="src_2")
    three = await made.event(database, type="sender.issue.closed", received_at=1_000_000.0)
    assert ids(await listed(rig, "&source_id=src_2")) == [two]
    for glob, fitting in (
        ("sender.push", [one]),
        ("sender.*", [one]),
        ("sender.issue.*", [three, two]),
        ("sender.**", [three, two, one]),
        ("other.**", []),
    ):
        assert ids(await listed(rig, f"&type={glob}")) == fitting, glob
    assert ids(await listed(rig, "&since=2000-01-01T00:00:00Z")) == [two, one]
    assert ids(await listed(rig, "&until=2000-01-01T00:00:00Z")) == [three]
    for query, pointer in (
        ("status=sold", "?status"),
        ("type=a..b", "?type"),
        ("since=yesterday", "?since"),
        ("cursor=x", "?cursor"),
        ("limit=0", "?limit"),
        ("colour=red", "?colour"),
        ("order=oldest_first&status=parked", "?status"),
    ):
        check_problem(await rig.call("GET", f"/v1/events?{query}"), 400, "invalid_request", pointer)


async def test_an_event_shows_the_worst_of_its_deliveries(rig: Rig) -> None:
    database = rig.parts.database
    unrouted = await made.event(database)
    first, second = await made.subscription(database), await made.subscription(database)
    event_id = await made.event(database)

    async def status_with(state: str, *, active: bool = True) -> str:
        mine = (col(WebhookDelivery.event_id) == event_id, col(WebhookDelivery.subscription_id) == second)
        await change(rig, sa.update(WebhookDelivery).where(*mine).values(state=state))
        await change(
            rig, sa.update(WebhookSubscription).where(col(WebhookSubscription.id) == second).values(active=active)
        )
        shown = (await rig.call("GET", f"/v1/events/{event_id}")).json()["status"]
        assert ids(await listed(rig, f"&status={shown}")) == [event_id]
        return str(shown)

    other = col(WebhookDelivery.subscription_id) == first
    await change(rig, sa.update(WebhookDelivery).where(other).values(state="delivered"))
    states = ("delivered", "pending", "delivering", "retrying", "dead")
    assert [await status_with(state) for state in states] == list(states)
    assert await status_with("pending", active=False) == "held"
    assert await status_with("delivered", active=False) == "delivered"
    assert ids(await listed(rig, "&status=unrouted")) == [unrouted]


async def test_who_pulls_oldest_first_goes_on_from_where_it_was_and_never_gets_to_an_end(rig: Rig) -> None:
    database = rig.parts.database
    first = await rig.call("GET", "/v1/events?order=oldest_first&type=sender.b")
    cursor = first.json()["next_cursor"]
    assert (first.json()["data"], cursor is None) == ([], False)
    seen: list[str] = []
    sent: list[str] = []
    for round_ in range(4):
        await made.events(database, 3, type="sender.a")
        sent += await made.events(database, 3 * (round_ % 2), type="sender.b")
        for _ in range(3):
            path = f"/v1/events?order=oldest_first&type=sender.b&limit=2&cursor={cursor}"
            answer = (await rig.call("GET", path)).json()
            seen += ids(answer["data"])
            cursor = answer["next_cursor"]
    assert seen == sent
    newest = (await rig.call("GET", "/v1/events?limit=1")).json()["next_cursor"]
    for query in (f"order=oldest_first&cursor={newest}", f"cursor={cursor}"):
        check_problem(await rig.call("GET", f"/v1/events?{query}"), 400, "invalid_request", "?cursor")


async def test_one_page_looks_at_so_many_rows_and_the_cursor_goes_on(rig: Rig) -> None:
    database = rig.parts.database
    rare = await made.event(database, type="sender.rare")
    await made.events(database, 2_500, type="sender.common")
    for query in ("type=sender.rare", "type=sender.r.**"):
        first = (await rig.call("GET", f"/v1/events?{query}")).json()
        assert first["data"] == []
        assert first["next_cursor"] is not None
    assert ids(await listed(rig, "&type=sender.rare")) == [rare]


async def test_a_body_comes_whole_sealed_or_not_and_the_audit_says_who_had_it(rig: Rig) -> None:
    database, raw = rig.parts.database, b"\x00\xff not JSON"
    plain = await made.event(database, body=raw, content_type=None)
    sealed = await made.event(database)
    value = rig.parts.sealer.seal(raw, owner=sealed, purpose="event", version=1)
    await change(
        rig, sa.update(WebhookEvent).where(col(WebhookEvent.id) == sealed).values(body=None, sealed_body=value)
    )
    for event_id in (plain, sealed):
        answer = await rig.call("GET", f"/v1/events/{event_id}")
        assert base64.b64decode(answer.json()["body"]) == raw
        assert answer.json()["headers"] == [["X-Kind", "thing"]]
        assert answer.headers["cache-control"] == "no-store"
    read = await audited(rig, "webhook_event.read")
    assert [record.detail["event_id"] for record in read] == [plain, sealed]
    auditor = await rig.caller(roles=("auditor",))
    shown = (await rig.call("GET", f"/v1/events/{plain}", key=auditor)).json()
    assert (shown["id"], shown["body"]) == (plain, None)
    assert len(await audited(rig, "webhook_event.read")) == 2
    check_problem(await rig.call("POST", f"/v1/events/{plain}/replay", key=auditor), 403, "forbidden")


async def test_no_body_leaves_without_its_record(rig: Rig) -> None:
    event_id = await made.event(rig.parts.database)
    await change(rig, sa.text("ALTER TABLE audit_head RENAME TO audit_head_gone"))
    check_problem(await rig.call("GET", f"/v1/events/{event_id}"), 503, "audit_unavailable")


async def test_a_service_sees_the_events_of_the_connections_that_its_grants_cover_and_no_others(rig: Rig) -> None:
    database = rig.parts.database
    mine, tagged, other = [
        (await imported(rig, subject, tags=tags))["id"]
        for subject, tags in (("acme:1", {}), ("beta:1", {"team": "a"}), ("beta:2", {}))
    ]
    of_mine, of_tagged, of_other, of_none = [
        await made.event(database, connection_id=connection_id) for connection_id in (mine, tagged, other, None)
    ]
    subscription_id = await made.subscription(database)
    for event_id in (of_mine, of_other):
        await rig.call("POST", f"/v1/events/{event_id}/replay", {"subscription_id": subscription_id})
    by_subject = await rig.caller(grant("events", subjects=["acme:*"]))
    by_tag = await rig.caller(grant("events", tags={"team": "a"}))
    everything = await rig.caller(grant("events", integrations=("*",)))
    reader = await rig.caller(grant("read"))
    for key, expected in (
        (by_subject, [of_mine]),
        (by_tag, [of_tagged]),
        (everything, [of_none, of_other, of_tagged, of_mine]),
        (reader, []),
        (await rig.caller(roles=("security",)), []),
        (await rig.caller(roles=("operator",)), [of_none, of_other, of_tagged, of_mine]),
    ):
        assert ids(await listed(rig, "&type=sender.**", key=key)) == expected
        assert (
            ids((await rig.call("GET", "/v1/events?order=oldest_first&type=sender.**", key=key)).json()["data"])
            == (expected[::-1])
        )
    deliveries = (await rig.call("GET", "/v1/deliveries", key=by_subject)).json()["data"]
    assert [row["event_id"] for row in deliveries] == [of_mine]
    outside = await rig.call("GET", f"/v1/events/{of_other}", key=by_subject)
    absent = await rig.call("GET", f"/v1/events/{of_other[:-1]}0", key=by_subject)
    assert same_but_for_the_request_id(outside, absent)
    check_problem(outside, 404, "not_found")
    check_problem(await rig.call("GET", f"/v1/events/{of_mine}", key=reader), 403, "forbidden")
    check_problem(await rig.call("POST", f"/v1/events/{of_other}/replay", key=by_subject), 404, "not_found")
    assert (await rig.call("POST", f"/v1/events/{of_mine}/replay", key=by_subject)).status_code == 202
    other_delivery = (await rig.call("GET", f"/v1/deliveries?event_id={of_other}")).json()["data"][0]["id"]
    check_problem(await rig.call("GET", f"/v1/deliveries/{other_delivery}", key=by_subject), 404, "not_found")
    check_problem(await rig.call("POST", f"/v1/deliveries/{other_delivery}/retry", key=by_subject), 404, "not_found")
    bulk = {"filter": {"status": "delivered"}, "dry_run": True}
    await change(rig, sa.update(WebhookDelivery).values(state="delivered"))
    counted = [
        (await rig.call("POST", "/v1/deliveries/replay", bulk, key=key)).json()["total"] for key in (by_subject, reader)
    ]
    assert counted == [1, 0], "of what was delivered twice one counts"


async def test_a_service_with_grants_over_many_connections_sees_its_events_too(rig: Rig) -> None:
    database = rig.parts.database
    one = (await imported(rig, "acme:1"))["id"]
    row = (await rows(rig, Connection))[0].model_dump()
    many = [{**row, "id": f"con_{n:026}", "subject": f"acme:{n + 2}", "account_id": None} for n in range(600)]
    given = [{"metadata" if name == "extra" else name: value for name, value in each.items()} for each in many]
    await change(rig, sa.insert(Connection).values(given[:50]))
    for start in range(50, 600, 50):
        await change(rig, sa.insert(Connection).values(given[start : start + 50]))
    of_one = await made.event(database, connection_id=one)
    of_many = await made.event(database, connection_id=many[7]["id"])
    await made.event(database)
    key = await rig.caller(grant("events", subjects=["acme:*"]))
    assert ids(await listed(rig, "&type=sender.**", key=key)) == [of_many, of_one]


async def test_a_replay_goes_to_those_that_want_the_event_now(rig: Rig) -> None:
    database = rig.parts.database
    event_id = await made.event(database, body=made.body_of(kind="a", line="x"))
    wanting = await made.subscription(database, "sender.thing.*", filter={"/kind": ["a"]}, order_key="/line")
    held = await made.subscription(database, "**", active=False)
    not_wanting = await made.subscription(database, "sender.**", filter={"/kind": ["b"]})
    answer = await rig.call("POST", f"/v1/events/{event_id}/replay")
    assert answer.status_code == 202, answer.text
    found = {row.subscription_id: row for row in await rows(rig, WebhookDelivery)}
    assert found.keys() == {wanting, held}
    assert sorted(answer.json()["delivery_ids"]) == sorted(row.id for row in found.values())
    assert {(row.event_id, row.replay, row.state, row.number) for row in found.values()} == {
        (event_id, True, "pending", 1)
    }
    assert found[wanting].order_key == "x"
    named = await rig.call("POST", f"/v1/events/{event_id}/replay", {"subscription_id": wanting})
    assert len(named.json()["delivery_ids"]) == 1
    for body, status, code in (
        ({"subscription_id": not_wanting}, 409, "conflict"),
        ({"subscription_id": "sub_absent"}, 404, "not_found"),
        ({"subscription": wanting}, 400, "invalid_request"),
    ):
        check_problem(await rig.call("POST", f"/v1/events/{event_id}/replay", body), status, code)
    parked = await made.unnumbered(database, parked=True)
    check_problem(
        await rig.call("POST", f"/v1/events/{parked}/replay", {"subscription_id": not_wanting}), 409, "conflict"
    )
    released = (await rig.call("POST", f"/v1/events/{parked}/replay")).json()
    assert released == {"event_id": parked, "delivery_ids": [], "released": True}
    assert (await rig.call("GET", f"/v1/events/{parked}")).json()["status"] == "waiting"
    check_problem(await rig.call("POST", f"/v1/events/{parked}/replay"), 409, "conflict")
    check_problem(await rig.call("POST", "/v1/events/evt_absent/replay"), 404, "not_found")
    [first, second] = await audited(rig, "webhook_event.replayed")
    assert (first.detail, second.detail["deliveries"]) == ({"event_id": event_id, "deliveries": 2}, 1)


async def test_erasing_a_person_erases_the_events_of_their_connections_of_earlier_ones_too(rig: Rig) -> None:
    database = rig.parts.database
    await made.subscription(database, "sender.**")
    gone = (await imported(rig, "acme:gone"))["id"]
    of_earlier = await made.events(database, 2, connection_id=gone)
    assert (await rig.call("DELETE", f"/v1/connections/{gone}?revoke=false")).status_code == 200
    live = (await imported(rig, "acme:gone"))["id"]
    await made.events(database, 450, connection_id=live)
    parked = await made.unnumbered(database, connection_id=live, parked=True)
    stays = await made.event(database, connection_id=(await imported(rig, "acme:stays"))["id"])
    none = await made.event(database)
    answer = await rig.call("DELETE", "/v1/subjects/acme%3Agone?revoke=false")
    assert answer.status_code == 202, answer.text

    async def left() -> set[str] | None:
        await rig.parts.revocations.advance()
        found = {row.id for row in await rows(rig, WebhookEvent) if row.provider == "sender"}
        return found if found == {stays, none} else None

    assert await eventually(left)
    assert {row.event_id for row in await rows(rig, WebhookDelivery)} == {stays, none}
    for event_id in (*of_earlier, parked):
        check_problem(await rig.call("GET", f"/v1/events/{event_id}"), 404, "not_found")
    told = [row for row in await rows(rig, WebhookEvent) if row.type == "broker.connection.deleted"]
    assert [row.connection_id for row in told] == [live], "that it is gone is still told"
    assert not any(b"acme:gone" in (row.body or b"") for row in await rows(rig, WebhookEvent))
    assert [record for record in await rows(rig, AuditRecord) if "acme:gone" in str(record.detail)] == []


async def test_a_list_shows_what_is_documented(rig: Rig) -> None:
    event_id = await made.event(rig.parts.database, provider_event_id="p-1", received_at=1_700_000_000.5)
    [shown] = await listed(rig)
    assert shown == {
        "id": event_id,
        "number": 1,
        "type": "sender.thing.made",
        "source_id": "src_1",
        "provider": "sender",
        "connection_id": None,
        "provider_event_id": "p-1",
        "verdict": {"scheme": "hmac"},
        "status": "unrouted",
        "received_at": rfc3339(1_700_000_000.5),
        "size": 8,
        "content_type": "application/json",
    }
