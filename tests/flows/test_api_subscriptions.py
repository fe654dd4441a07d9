"""Subscriptions through HTTP: made, changed, deleted, their secrets in turn, and what deliveries then see."""

from __future__ import annotations

import base64
import time
from typing import Any

import pytest
import sqlalchemy as sa

from broker.models import SealedSecret, SystemKey, WebhookDelivery, WebhookSecret, WebhookSubscription
from broker.webhooks.configured import Receiver
from broker.webhooks.subscriptions import AT_ONCE
from tests.flows.api_calls import check_problem, unused
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.shared import audited, rewritten, rows

pytestmark = pytest.mark.asyncio(loop_scope="module")
SHOWN = {
    *("id", "url", "description", "event_types", "source_id", "filter", "active", "order_key", "signature"),
    *("max_per_second", "max_concurrent", "timeout_seconds", "failing_since", "disabled_reason", "secrets"),
    *("public_keys", "created_at", "updated_at"),
}
BODY = {"url": "http://127.0.0.1:9/in", "event_types": ["github.**"]}


async def made(rig: Rig, **fields: Any) -> dict[str, Any]:
    """Return a new subscription, with its secret."""
    answer = await rig.call("POST", "/v1/subscriptions", {**BODY, **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def patched(rig: Rig, subscription_id: str, body: Any) -> Any:
    return await rig.call("PATCH", f"/v1/subscriptions/{subscription_id}", body)


async def rotated(rig: Rig, subscription_id: str, body: Any = None) -> Any:
    return await rig.call("POST", f"/v1/subscriptions/{subscription_id}/rotate-secret", body)


async def receiver(rig: Rig, subscription_id: str) -> Receiver | None:
    return (await rig.parts.webhooks.subscriptions.receivers()).get(subscription_id)


async def signing(rig: Rig, subscription_id: str) -> list[str]:
    """Return the secrets that a delivery would be signed with."""
    found = await receiver(rig, subscription_id)
    assert found is not None
    return [one.reveal() for one in found.secrets]


async def vault_owners(rig: Rig) -> set[str]:
    return {row.owner for row in await rows(rig, SealedSecret) if row.owner.startswith("webhook_secrets/")}


async def queued(rig: Rig, subscription_id: str, *states: str) -> None:
    """Put deliveries in these states into the queue."""

    def row(state: str) -> dict[str, Any]:
        given = {"id": unused("dlv_"), "subscription_id": subscription_id, "event_id": "evt_1", "number": 1}
        kept = {"state": state, "due_at": time.time() + 3600, "attempts": 0, "replay": False, "tries": []}
        return {**given, **kept, "created_at": 0.0}

    work = [row(state) for state in states]
    await rig.parts.database.transaction(lambda session: session.execute(sa.insert(WebhookDelivery), work))


async def states(rig: Rig, subscription_id: str) -> dict[tuple[str, str | None], int]:
    """Return how many deliveries a subscription has by state and reason."""
    counted: dict[tuple[str, str | None], int] = {}
    for one in await rows(rig, WebhookDelivery):
        if one.subscription_id == subscription_id:
            counted[one.state, one.reason] = counted.get((one.state, one.reason), 0) + 1
    return counted


# Made and shown


async def test_a_subscription_is_shown_whole_and_its_secret_once(shared: Rig) -> None:
    subscription = await made(shared, filter={"/repository/full_name": ["a/b"]}, order_key="/repository/id")
    secret = subscription.pop("secret")
    assert subscription.keys() == SHOWN
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    path = f"/v1/subscriptions/{subscription['id']}"
    again = await shared.call("GET", path)
    assert again.json() == subscription
    listed = await shared.call("GET", "/v1/subscriptions?limit=200")
    assert subscription in listed.json()["data"]
    assert secret not in again.text + listed.text + repr(await rows(shared, WebhookSecret))
    assert await signing(shared, subscription["id"]) == [secret]


async def test_a_secret_may_be_brought_along(shared: Rig) -> None:
    own = "whsec_" + base64.b64encode(b"\x01" * 24).decode()
    subscription = await made(shared, secret=own)
    assert subscription["secret"] == own
    assert await signing(shared, subscription["id"]) == [own]


@pytest.mark.parametrize(
    "text", ["whsec_A", "whsec_AAAA", "whsec_*", base64.b64encode(b"\x01" * 32).decode(), "whsk_" + "A" * 44]
)
async def test_a_secret_is_in_the_form_of_standard_webhooks(shared: Rig, text: str) -> None:
    before = await vault_owners(shared)
    answer = await shared.call("POST", "/v1/subscriptions", {**BODY, "secret": text})
    assert text not in str(check_problem(answer, 400, "invalid_request", "/secret"))
    assert await vault_owners(shared) == before


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"url": "https://user:pass@example.test/"}, "/url"),
        ({"url": "https://example.test/#part"}, "/url"),
        ({"url": "https://example.test/" + "a" * 2040}, "/url"),
        ({"url": "ftp://example.test/"}, "/url"),
        ({"url": "https://"}, "/url"),
        ({"url": "https://169.254.169.254/latest"}, "/url"),
        ({"url": "https://10.0.0.1/"}, "/url"),
        ({"url": "https://[fd00::1]/"}, "/url"),
        ({"event_types": []}, "/event_types"),
        ({"event_types": ["github.**.x"]}, "/event_types"),
        ({"event_types": ["git*"]}, "/event_types"),
        ({"event_types": ["*"] * 101}, "/event_types"),
        ({"filter": {"repository": ["a"]}}, "/filter"),
        ({"filter": {"/a": []}}, "/filter"),
        ({"filter": {"/a": [{}]}}, "/filter"),
        ({"filter": {"/a~2": ["x"]}}, "/filter"),
        ({"order_key": "id"}, "/order_key"),
        ({"order_key": ""}, "/order_key"),
        ({"max_per_second": 0}, "/max_per_second"),
        ({"max_concurrent": 0}, "/max_concurrent"),
        ({"timeout_seconds": 61}, "/timeout_seconds"),
        ({"source_id": "src_nothing"}, "/source_id"),
        ({"signature": "v1a", "secret": "whsec_" + "A" * 44}, "/secret"),
        ({"signature": "v2"}, "/signature"),
        ({"tenant": "x"}, "/tenant"),
    ],
)
async def test_what_no_subscription_can_be_is_refused_by_field(
    shared: Rig, fields: dict[str, Any], pointer: str
) -> None:
    before = await vault_owners(shared)
    answer = await shared.call("POST", "/v1/subscriptions", {**BODY, **fields})
    check_problem(answer, 400, "invalid_request", pointer)
    assert await vault_owners(shared) == before
    if "secret" not in fields and pointer != "/tenant":
        subscription = await made(shared)
        check_problem(await patched(shared, subscription["id"], fields), 400, "invalid_request", pointer)


async def test_in_production_a_url_is_https_and_a_private_address_needs_its_network_allowed(tmp_path: Any) -> None:
    from broker.settings import load_settings  # noqa: PLC0415 - for this test only
    from broker.webhooks.subscription_config import url_problem  # noqa: PLC0415

    strict = load_settings({}, directory=tmp_path, env="development").model_copy(update={"env": "production"})
    allowing = load_settings({"BROKER_DELIVERY_ALLOW": "10.0.0.0/8"}, directory=tmp_path, env="development")
    allowing = allowing.model_copy(update={"env": "production"})
    assert url_problem("https://example.test/in", strict) is None
    assert url_problem("http://example.test/in", strict) == "must be https"
    assert url_problem("https://127.0.0.1/in", strict) is not None
    assert url_problem("https://10.1.2.3/in", strict) is not None
    assert url_problem("https://10.1.2.3/in", allowing) is None
    assert url_problem("http://10.1.2.3/in", allowing) == "must be https"
    assert url_problem("https://192.168.0.1/in", allowing) is not None


async def test_only_operators_write_and_auditors_read(shared: Rig) -> None:
    subscription = await made(shared)
    path = f"/v1/subscriptions/{subscription['id']}"
    auditor, service = await shared.caller(roles=("auditor",)), await shared.caller()
    operator = await shared.caller(roles=("operator",))
    assert (await shared.call("GET", path, key=auditor)).status_code == 200
    for key, method, to, body in (
        (auditor, "PATCH", path, {"active": False}),
        (auditor, "POST", f"{path}/rotate-secret", {}),
        (auditor, "POST", "/v1/subscriptions", BODY),
        (service, "GET", path, None),
        (service, "GET", "/v1/subscriptions", None),
        (service, "DELETE", path, None),
    ):
        check_problem(await shared.call(method, to, body, key=key), 403, "forbidden")
    assert (await shared.call("DELETE", path, key=operator)).status_code == 204


async def test_what_is_not_there_is_not_found(shared: Rig) -> None:
    path = "/v1/subscriptions/sub_" + "a" * 26
    for method, to, body in (
        ("GET", path, None),
        ("PATCH", path, {"active": False}),
        ("DELETE", path, None),
        ("POST", f"{path}/rotate-secret", {}),
    ):
        check_problem(await shared.call(method, to, body), 404, "not_found")


async def test_subscriptions_are_listed_newest_first_in_pages(shared: Rig) -> None:
    ids = [(await made(shared))["id"] for _ in range(3)]
    first = (await shared.call("GET", "/v1/subscriptions?limit=2")).json()
    assert [one["id"] for one in first["data"]] == [ids[2], ids[1]]
    second = (await shared.call("GET", f"/v1/subscriptions?limit=2&cursor={first['next_cursor']}")).json()
    assert second["data"][0]["id"] == ids[0]


async def test_every_write_is_in_the_audit_without_the_path_of_the_url(shared: Rig) -> None:
    subscription = await made(shared, url="https://example.test/CANARY")
    assert (await patched(shared, subscription["id"], {"description": "x"})).status_code == 200
    assert (await rotated(shared, subscription["id"])).status_code == 200
    assert (await shared.call("DELETE", f"/v1/subscriptions/{subscription['id']}")).status_code == 204
    for what in ("created", "updated", "secret_rotated", "deleted"):
        found = await audited(shared, f"subscription.{what}")
        found = [one for one in found if one.detail["subscription_id"] == subscription["id"]]
        assert len(found) == 1, what
        assert "CANARY" not in str(found[0].detail)


# Changed


async def test_a_change_is_a_merge_patch(shared: Rig) -> None:
    subscription = await made(shared, filter={"/a": ["x"], "/b": [1]}, max_per_second=5, description="for a test")
    changed = await patched(shared, subscription["id"], {"filter": {"/a": None, "/c": [True]}, "max_per_second": None})
    assert changed.status_code == 200, changed.text
    assert changed.json()["filter"] == {"/b": [1], "/c": [True]}
    assert (changed.json()["max_per_second"], changed.json()["description"]) == (None, "for a test")
    cleared = (await patched(shared, subscription["id"], {"filter": None, "max_concurrent": None})).json()
    assert (cleared["filter"], cleared["max_concurrent"]) == ({}, 16)


async def test_a_pause_takes_it_out_of_delivery_and_its_end_forgets_failures(shared: Rig) -> None:
    subscription = await made(shared)
    assert await receiver(shared, subscription["id"]) is not None
    assert not (await patched(shared, subscription["id"], {"active": False})).json()["active"]
    assert await receiver(shared, subscription["id"]) is None
    told = {"failing_since": 1_700_000_000.0, "disabled_reason": "gone"}
    await rewritten(shared, WebhookSubscription, subscription["id"], **told)
    back = (await patched(shared, subscription["id"], {"active": True})).json()
    assert (back["active"], back["failing_since"], back["disabled_reason"]) == (True, None, None)
    assert await receiver(shared, subscription["id"]) is not None


async def test_what_deliveries_see_is_what_was_configured(shared: Rig) -> None:
    fields = {"max_per_second": 2.5, "max_concurrent": 3, "timeout_seconds": 7}
    subscription = await made(shared, **fields)
    seen = await receiver(shared, subscription["id"])
    assert seen is not None
    assert (seen.url, seen.signature, seen.failing_since) == (BODY["url"], "v1", None)
    assert (seen.max_per_second, seen.max_concurrent, seen.timeout_seconds) == (2.5, 3, 7.0)
    assert subscription["secret"] not in repr(seen)


# Secrets


async def test_the_old_secret_signs_too_until_its_end(shared: Rig) -> None:
    subscription = await made(shared)
    answer = await rotated(shared, subscription["id"], {"overlap_seconds": 0.5})
    assert answer.status_code == 200, answer.text
    new = answer.json()["secret"]
    assert await signing(shared, subscription["id"]) == [new, subscription["secret"]]

    async def only_the_new_one() -> bool:
        return await signing(shared, subscription["id"]) == [new]

    assert await eventually(only_the_new_one)
    shown = (await shared.call("GET", f"/v1/subscriptions/{subscription['id']}")).json()
    assert [one["id"] for one in shown["secrets"]] == [answer.json()["id"]]


async def test_a_rotation_without_overlap_ends_the_old_secret_at_once(shared: Rig) -> None:
    subscription = await made(shared)
    new = (await rotated(shared, subscription["id"], {"overlap_seconds": 0})).json()["secret"]
    assert await signing(shared, subscription["id"]) == [new]
    newest = (await rotated(shared, subscription["id"])).json()["secret"]  # a day, by itself
    assert await signing(shared, subscription["id"]) == [newest, new]
    bad = await rotated(shared, subscription["id"], {"overlap_seconds": -1})
    check_problem(bad, 400, "invalid_request", "/overlap_seconds")


async def test_only_a_few_secrets_sign_at_once(shared: Rig) -> None:
    subscription = await made(shared)
    for _ in range(4):
        assert (await rotated(shared, subscription["id"])).status_code == 200
    before = await vault_owners(shared)
    check_problem(await rotated(shared, subscription["id"]), 409, "conflict")
    assert await vault_owners(shared) == before
    assert (await rotated(shared, subscription["id"], {"overlap_seconds": 0})).status_code == 200


async def test_a_rotated_secret_is_shown_once(shared: Rig) -> None:
    subscription = await made(shared)
    path, key = f"/v1/subscriptions/{subscription['id']}/rotate-secret", unused("rotate-")
    first = await shared.call("POST", path, {}, Idempotency_Key=key)
    again = await shared.call("POST", path, {}, Idempotency_Key=key)
    assert check_problem(again, 409, "idempotency_conflict")["made_id"] == first.json()["id"]


async def test_v1a_signs_with_the_brokers_own_keys(shared: Rig) -> None:
    subscription = await made(shared, signature="v1a")
    assert "secret" not in subscription
    assert subscription["secrets"] == []
    published = await shared.backend.get("/.well-known/webhook-keys.json")
    assert published.headers["cache-control"] == "public, max-age=60"
    assert subscription["public_keys"] == [one["key"] for one in published.json()["keys"]]
    assert [one["state"] for one in published.json()["keys"]] == ["current"]
    keys = shared.parts.webhooks.signing_keys.signing()
    assert [key.public for key in keys] == subscription["public_keys"]
    seen = await receiver(shared, subscription["id"])
    assert seen is not None
    assert (seen.signature, list(seen.secrets)) == ("v1a", [])


async def test_a_change_to_v1_needs_a_secret_first(shared: Rig) -> None:
    subscription = await made(shared, signature="v1a")
    check_problem(await patched(shared, subscription["id"], {"signature": "v1"}), 409, "conflict")
    secret = (await rotated(shared, subscription["id"])).json()["secret"]
    changed = (await patched(shared, subscription["id"], {"signature": "v1"})).json()
    assert (changed["signature"], changed["public_keys"]) == ("v1", [])
    assert await signing(shared, subscription["id"]) == [secret]


async def test_previous_keys_sign_too_and_the_next_one_is_only_published(tmp_path: Any) -> None:
    async with open_rig(tmp_path) as rig:
        keys, mine = rig.parts.webhooks.signing_keys, SystemKey.purpose == "webhook-signing"

        async def becomes(state: str) -> list[str]:
            """Let the current key become something else; a fresh one takes its place."""
            update = sa.update(SystemKey).where(mine, SystemKey.state == "current").values(state=state)  # type: ignore[arg-type]
            await rig.parts.database.transaction(lambda session: session.execute(update))
            await keys._keys.load()
            return [key.public for key in keys.signing()]

        first = [key.public for key in keys.signing()]
        second = await becomes("previous")
        assert second[1:] == first
        third = await becomes("next")
        assert third[1:] == first
        published = (await rig.backend.get("/.well-known/webhook-keys.json")).json()["keys"]
        assert [one["state"] for one in published] == ["next", "current", "previous"]
        assert [one["key"] for one in published] == [second[0], third[0], first[0]]
        subscription = await made(rig, signature="v1a")
        assert subscription["public_keys"] == [one["key"] for one in published]


# Gone


async def test_a_deleted_subscription_ends_its_deliveries_and_its_secrets(shared: Rig) -> None:
    subscription, other = await made(shared), await made(shared)
    await queued(shared, subscription["id"], "pending", "retrying", "delivering", "delivered", *["pending"] * AT_ONCE)
    await queued(shared, other["id"], "pending")
    assert (await shared.call("DELETE", f"/v1/subscriptions/{subscription['id']}")).status_code == 204
    ended = ("dead", "subscription_deleted")
    assert await states(shared, subscription["id"]) == {ended: AT_ONCE + 3, ("delivered", None): 1}
    assert await states(shared, other["id"]) == {("pending", None): 1}
    assert await receiver(shared, subscription["id"]) is None
    assert f"webhook_secrets/{subscription['secrets'][0]['id']}" not in await vault_owners(shared)


async def test_what_was_matched_while_its_subscription_was_deleted_ends_too(shared: Rig) -> None:
    subscription, other = await made(shared), await made(shared)
    assert (await shared.call("DELETE", f"/v1/subscriptions/{subscription['id']}")).status_code == 204
    await queued(shared, subscription["id"], "pending", "retrying")
    await queued(shared, other["id"], "pending")
    assert await shared.parts.webhooks.subscriptions.end_orphaned() == 2
    assert await states(shared, subscription["id"]) == {("dead", "subscription_deleted"): 2}
    assert await states(shared, other["id"]) == {("pending", None): 1}
