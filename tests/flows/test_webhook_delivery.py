"""From a provider's post to a subscriber's socket, through HTTP: signed, rotated, paused, and disabled once it is gone."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.models import AuditRecord
from tests.broker.far_side import OK, FarSide, Line, answering, far_side
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.webhook_senders import PUSH, deliveries_of, github_fields, new_source, post, rows

GONE = b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
async def rig(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    """Give a broker with a worker, on SQLite and on PostgreSQL."""
    async with open_rig(tmp_path, database_url=database_url, worker=True) as made:
        yield made


async def subscribe(rig: Rig, far: FarSide, *event_types: str, **fields: Any) -> dict[str, Any]:
    body = {"url": f"http://127.0.0.1:{far.port}/hooks", "event_types": list(event_types), **fields}
    made = await rig.call("POST", "/v1/subscriptions", body)
    assert made.status_code == 201, made.text
    return dict(made.json())


async def push(rig: Rig, source_id: str, body: bytes = PUSH) -> str:
    """Post a push as its provider does; return the event's id."""
    answer = await post(rig, f"/webhooks/{source_id}", github_fields(body), body)
    assert answer.status in {200, 202}, answer.body
    (event,) = (await rig.call("GET", f"/v1/events?source_id={source_id}&limit=1")).json()["data"]
    return str(event["id"])


def field(request: bytes, name: str) -> str:
    said = re.search(rb"\r\n" + name.encode() + rb": ([^\r]*)\r\n", request)
    return said[1].decode() if said else ""


def is_signed_by(request: bytes, secret: str) -> bool:
    body = request.partition(b"\r\n\r\n")[2]
    signed = f"{field(request, 'webhook-id')}.{field(request, 'webhook-timestamp')}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    made = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    return f"v1,{made}" in field(request, "webhook-signature").split(" ")


async def is_delivered(rig: Rig, event_id: str) -> bool:
    found = await deliveries_of(rig, event_id)
    return bool(found) and all(one.state == "delivered" for one in found)


async def test_an_event_arrives_as_it_came_and_a_rotated_secret_signs_beside_the_old_one(rig: Rig) -> None:
    async with far_side(answering(OK)) as far:
        source_id = await new_source(rig)
        made = await subscribe(rig, far, "github.**")
        event_id = await push(rig, source_id)
        await eventually(lambda: is_delivered(rig, event_id))
        (request,) = far.requests
        assert request.endswith(b"\r\n\r\n" + PUSH)
        assert field(request, "webhook-id") == event_id
        assert field(request, "x-broker-source") == source_id
        assert field(request, "x-broker-event-type") == "github.push"
        assert is_signed_by(request, made["secret"])
        rotated = await rig.call("POST", f"/v1/subscriptions/{made['id']}/rotate-secret", {})
        assert rotated.status_code == 200, rotated.text
        later = await push(rig, source_id, b'{"ref": "refs/heads/next"}')
        await eventually(lambda: is_delivered(rig, later))
        assert is_signed_by(far.requests[-1], made["secret"])
        assert is_signed_by(far.requests[-1], rotated.json()["secret"])


async def test_a_pause_holds_what_comes_and_a_resume_delivers_it(rig: Rig) -> None:
    async with far_side(answering(OK)) as far:
        source_id = await new_source(rig)
        made = await subscribe(rig, far, "github.push")
        path = f"/v1/subscriptions/{made['id']}"
        paused = await rig.call("PATCH", path, {"active": False})
        assert paused.status_code == 200, paused.text
        event_id = await push(rig, source_id)
        listed = (await rig.call("GET", f"/v1/deliveries?subscription_id={made['id']}")).json()["data"]
        assert [one["status"] for one in listed] == ["held"]
        assert far.requests == []
        await rig.call("PATCH", path, {"active": True})
        await eventually(lambda: is_delivered(rig, event_id))
        assert len(far.requests) == 1


async def test_a_subscriber_that_is_gone_is_disabled_and_others_are_told(rig: Rig) -> None:
    async def play(line: Line) -> None:
        while True:
            request = await line.request()
            await line.say(GONE if b"github.push" in request else OK)

    async with far_side(play) as far:
        source_id = await new_source(rig)
        made = await subscribe(rig, far, "github.push")
        await subscribe(rig, far, "broker.subscription.disabled")
        event_id = await push(rig, source_id)

        async def told() -> bool:
            return any(field(one, "x-broker-event-type") == "broker.subscription.disabled" for one in far.requests)

        await eventually(told)
        shown = (await rig.call("GET", f"/v1/subscriptions/{made['id']}")).json()
        assert (shown["active"], shown["disabled_reason"]) == (False, "gone")
        (dead,) = await deliveries_of(rig, event_id)
        assert (dead.state, dead.reason) == ("dead", "gone")
        (entry,) = await rows(rig, AuditRecord, action="subscription.disabled")
        assert entry.detail["subscription_id"] == made["id"]
        telling = next(one for one in far.requests if b"broker.subscription.disabled" in one)
        assert made["id"].encode() in telling.partition(b"\r\n\r\n")[2]
