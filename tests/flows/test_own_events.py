"""The broker's own events: each change of a connection's status that comes through HTTP is told, once, without a secret."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from broker.database import now
from broker.models import CallerKey, WebhookDelivery, WebhookEvent, rfc3339
from tests.flows.api_calls import import_body, imported
from tests.flows.rig import APP, Rig, landed
from tests.flows.shared import bearer, connected, flow, person, row, rows, subject

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def told(rig: Rig, connection_id: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (what happened, what is said of it) of a connection, oldest first."""
    found = [event for event in await rows(rig, WebhookEvent) if event.connection_id == connection_id]
    found.sort(key=lambda event: (event.received_at, event.id))
    bodies = [json.loads(event.body or b"") for event in found]
    assert [one["id"] for one in bodies] == [event.id for event in found]
    return [(one["type"].removeprefix("broker.connection."), one["data"]) for one in bodies]


async def changes(rig: Rig, connection_id: str) -> list[str]:
    return [what for what, _ in await told(rig, connection_id)]


async def atonce(rig: Rig) -> None:
    """Configure an integration ``atonce`` whose session-bound flows need no confirm."""
    await rig.integration("atonce", config={"confirm": "without_session"})
    rig.sandbox.state.add_client("at-once", [], [f"{rig.base}/oauth/atonce/callback"], auth_methods=["none"])
    client = {"client_id": "at-once", "config": {"client_auth": "none"}}
    assert (await rig.call("PATCH", "/v1/integrations/atonce", client)).status_code == 200


async def stop(rig: Rig, action: str, owner: str) -> str:
    """Freeze or revoke what a subject has, and do what the worker does; return the revocation's id."""
    body = {"action": action, "selector": {"subject": owner}, "reason": "leak"}
    answer = await rig.call("POST", "/v1/revocations", body)
    assert answer.status_code == 201, answer.text
    await rig.parts.revocations.advance()
    return str(answer.json()["id"])


async def test_a_confirm_tells_and_what_is_pending_does_not(shared: Rig) -> None:
    owner, account = subject(), person()
    came = landed(await flow(shared, user=account))
    assert await changes(shared, came["connection_id"]) == []
    connection = (await shared.confirm(came, owner, return_to=APP)).json()
    ((what, said),) = await told(shared, connection["id"])
    assert what == "confirmed"
    assert said == {
        "connection_id": connection["id"],
        "integration": "sandbox",
        "provider": "oidc",
        "subject": owner,
        "account_id": connection["account"]["id"],
        "status": "active",
        "status_reason": None,
        "tags": {},
    }


async def test_a_merge_tells_of_the_one_that_survives(shared: Rig) -> None:
    owner, account = subject(), person()
    connection = await connected(shared, owner, account)
    again = landed(await flow(shared, user=account))
    assert (await shared.confirm(again, owner, return_to=APP)).json()["id"] == connection["id"]
    assert await changes(shared, connection["id"]) == ["confirmed", "confirmed"]
    assert await changes(shared, again["connection_id"]) == []


async def test_a_flow_without_a_confirm_tells_that_a_connection_was_created(shared: Rig) -> None:
    await atonce(shared)
    session = await shared.session(subject(), integrations=["atonce"], return_to=APP)
    came = landed(await flow(shared, user=person(), integration="atonce", session=session["token"]))
    assert await changes(shared, came["connection_id"]) == ["created"]


async def test_an_import_tells_and_so_does_the_one_that_updates_it(shared: Rig) -> None:
    owner = subject()
    made = await imported(shared, owner, account="A1", tags={"team": "blue"})
    again = await shared.call("POST", "/v1/connections", import_body(owner, account="A1"))
    assert again.json()["id"] == made["id"]
    (_, created), (_, updated) = await told(shared, made["id"])
    assert await changes(shared, made["id"]) == ["created", "confirmed"]
    assert (created["tags"], updated["tags"]) == ({"team": "blue"}, {"team": "blue"})


async def test_a_grant_that_its_provider_ended_tells_once(shared: Rig) -> None:
    owner, account = subject(), person()
    connection = await connected(shared, owner, account)
    shared.sandbox.state.kill_account(account)
    for _ in range(2):
        answer = await shared.token(connection["id"], force_refresh=True)
        assert (answer.status_code, answer.json()["code"]) == (409, "reauthorization_required")
    what, said = (await told(shared, connection["id"]))[-1]
    assert await changes(shared, connection["id"]) == ["confirmed", "reauthorization_required"]
    assert (what, said["status"], said["status_reason"]) == (
        "reauthorization_required",
        "reauthorization_required",
        "invalid_grant",
    )


async def test_a_freeze_and_its_end_tell_of_each_connection(shared: Rig) -> None:
    owner = subject()
    made = [await imported(shared, owner, account=f"A{number}") for number in range(3)]
    freeze = await stop(shared, "freeze", owner)
    for one in made:
        _, (what, said) = await told(shared, one["id"])
        assert (what, said["status"], said["status_reason"]) == ("frozen", "frozen", freeze)
    assert (await shared.call("DELETE", f"/v1/revocations/{freeze}")).status_code in {200, 202, 204}
    await shared.parts.revocations.advance()
    for one in made:
        assert await changes(shared, one["id"]) == ["created", "frozen", "unfrozen"]
        assert (await told(shared, one["id"]))[-1][1]["status"] == "active"


async def test_what_becomes_usable_under_a_freeze_tells_that_it_is_frozen(shared: Rig) -> None:
    owner = subject()
    body = {"action": "freeze", "selector": {"subject": owner}, "reason": "leak"}
    assert (await shared.call("POST", "/v1/revocations", body)).status_code == 201
    made = await imported(shared, owner)
    assert await changes(shared, made["id"]) == ["created", "frozen"]


async def test_a_bulk_revocation_tells_of_what_was_usable_only(shared: Rig) -> None:
    owner = subject()
    session = await shared.session(owner, return_to=APP)
    pending = landed(await flow(shared, user=person(), session=session["token"]))["connection_id"]
    made = await imported(shared, owner)
    revocation = await stop(shared, "revoke", owner)
    what, said = (await told(shared, made["id"]))[-1]
    assert (what, said["status"], said["status_reason"]) == ("revoked", "revoked", revocation)
    assert await changes(shared, pending) == []


async def test_a_deletion_tells_and_that_of_a_pending_one_does_not(shared: Rig) -> None:
    made = await imported(shared, subject())
    pending = landed(await flow(shared, user=person()))["connection_id"]
    for one in (made["id"], pending):
        assert (await shared.call("DELETE", f"/v1/connections/{one}")).status_code == 200
        assert await row(shared, one) is None
    assert await changes(shared, made["id"]) == ["created", "deleted"]
    assert await changes(shared, pending) == []


async def test_an_erasure_tells_without_naming_anybody(shared: Rig) -> None:
    owner = subject()
    made = await imported(shared, owner, account="A1", tags={"mail": f"{owner}@example.test"})
    assert (await shared.call("DELETE", f"/v1/subjects/{owner}")).status_code == 202
    what, said = (await told(shared, made["id"]))[-1]
    assert (what, said["subject"], said["account_id"], said["tags"]) == ("deleted", None, None, {})
    assert said["status_reason"] == "erased"


async def test_a_key_that_ends_soon_tells_before_it_does(shared: Rig) -> None:
    body = {"name": "short", "roles": ["service"], "grants": []}
    caller = (await shared.call("POST", "/v1/callers", body)).json()
    keys = [key for key in await rows(shared, CallerKey) if key.caller_id == caller["id"]]
    soon = rfc3339(await shared.parts.database.read(now) + 80_000)
    made = await shared.call("POST", f"/v1/callers/{caller['id']}/keys", {"expires_at": soon})
    assert made.status_code == 201, made.text
    await shared.parts.caller_upkeep.warn()
    await shared.parts.caller_upkeep.warn()
    bodies = [json.loads(one.body or b"") for one in await rows(shared, WebhookEvent)]
    (event,) = [one for one in bodies if one["type"] == "broker.key.expiring"]
    assert (event["data"]["caller_id"], event["data"]["days"]) == (caller["id"], 1)
    assert event["data"]["key_id"] not in {key.id for key in keys}
    assert made.json()["key"] not in json.dumps(event)


async def test_no_body_holds_a_secret_or_a_persons_name(shared: Rig) -> None:
    owner, account = subject(), person()
    connection = await connected(shared, owner, account)
    token = await bearer(shared, connection["id"])
    secret = import_body(subject())
    assert (await shared.call("POST", "/v1/connections", secret)).status_code == 201
    everything = b"".join([one.body or b"" for one in await rows(shared, WebhookEvent)])
    names = [connection["account"][name] for name in ("name", "email") if connection["account"][name]]
    assert names
    for text in (token, secret["credentials"]["access_token"], *names):
        assert text.encode() not in everything


async def test_a_worker_fans_them_out_in_their_order_to_those_who_want_them(shared: Rig) -> None:
    waiting = shared.parts.webhooks.jobs
    fan_out = next(job for _, job in waiting if job.__name__ == "fan_out_waiting")
    await fan_out()
    wanted = {"url": "https://127.0.0.1:1/own", "event_types": ["broker.connection.**"]}
    made = await shared.call("POST", "/v1/subscriptions", wanted)
    assert made.status_code == 201, made.text
    other = {**wanted, "event_types": ["github.**"]}
    assert (await shared.call("POST", "/v1/subscriptions", other)).status_code == 201
    ids = [(await imported(shared, subject()))["id"] for _ in range(3)]
    await fan_out()
    mine = [one for one in await rows(shared, WebhookEvent) if one.connection_id in ids]
    assert all(one.number for one in mine)
    assert [one.connection_id for one in sorted(mine, key=lambda one: one.number or 0)] == ids
    found = [one for one in await rows(shared, WebhookDelivery) if one.event_id in {event.id for event in mine}]
    assert {one.subscription_id for one in found} == {made.json()["id"]}
    assert sorted(one.number for one in found) == sorted(one.number or 0 for one in mine)
    assert await fan_out() == 0


async def test_two_workers_at_once_fan_each_out_once(shared: Rig) -> None:
    fan_out = next(job for _, job in shared.parts.webhooks.jobs if job.__name__ == "fan_out_waiting")
    ids = [(await imported(shared, subject()))["id"] for _ in range(5)]
    await asyncio.gather(*(fan_out() for _ in range(4)))
    mine = {one.id for one in await rows(shared, WebhookEvent) if one.connection_id in ids}
    found = [one for one in await rows(shared, WebhookDelivery) if one.event_id in mine]
    assert len(found) == len({(one.subscription_id, one.event_id) for one in found}) == len(ids)
