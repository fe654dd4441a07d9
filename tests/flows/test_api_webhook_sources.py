"""Webhook sources through HTTP: made, changed, deleted, with several secrets, and what requests to them then see."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx2
import pytest

from broker.models import SealedSecret, WebhookRejection, WebhookSecret, WebhookSource
from broker.webhooks.configured import Source
from broker.webhooks.revision import Revision
from broker.webhooks.sources import Sources
from providers.receiving import sign_sample
from providers.spec import Sample, Secret
from tests.flows.api_calls import check_problem, imported, unused
from tests.flows.rig import Rig, eventually
from tests.flows.shared import audited, rewritten, rows

pytestmark = pytest.mark.asyncio(loop_scope="module")
SHOWN = {
    *("id", "name", "provider", "url", "connection_id", "register", "tolerance_seconds", "config", "scheme", "covers"),
    *("registration", "enabled", "status", "status_reason", "secrets", "created_at", "updated_at"),
}


async def made(rig: Rig, **fields: Any) -> dict[str, Any]:
    """Return a new source, with the secret that was made for it."""
    answer = await rig.call("POST", "/v1/webhook-sources", {"name": unused("hooks-"), "provider": "github", **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def refused(rig: Rig, *pointers: str, **fields: Any) -> dict[str, Any]:
    """Check that a source cannot be made, and for which fields; return the problem."""
    body = {"name": unused("hooks-"), "provider": "github", **fields}
    return check_problem(await rig.call("POST", "/v1/webhook-sources", body), 400, "invalid_request", *pointers)


async def patched(rig: Rig, source_id: str, body: Any) -> Any:
    return await rig.call("PATCH", f"/v1/webhook-sources/{source_id}", body)


async def vault_owners(rig: Rig) -> set[str]:
    return {row.owner for row in await rows(rig, SealedSecret) if row.owner.startswith("webhook_")}


async def known(rig: Rig, source_id: str) -> Source:
    found = await rig.parts.webhooks.sources.known(source_id)
    assert found is not None
    return found


async def signed(rig: Rig, source: dict[str, Any], secret: str) -> httpx2.Response:
    """Post an event to a source's address, signed with a secret."""
    webhook = (await known(rig, source["id"])).webhook
    sample = sign_sample(webhook, Sample("push", source["url"], time.time(), unused("delivery-")), Secret(secret))
    headers = {name.decode(): value.decode() for name, value in sample.headers}
    return await rig.backend.post(source["url"], content=sample.body, headers=headers)


# Made and shown


async def test_a_source_is_shown_whole_and_its_secret_once(shared: Rig) -> None:
    source = await made(shared)
    secret = source.pop("secret")
    assert source.keys() == SHOWN
    assert source["url"] == f"{shared.base}/webhooks/{source['id']}"
    assert (source["status"], source["covers"], source["config"]) == ("active", ["body"], {"kind": ""})
    assert [one["origin"] for one in source["secrets"]] == ["generated"]
    again = await shared.call("GET", f"/v1/webhook-sources/{source['id']}")
    assert again.json() == source
    listed = await shared.call("GET", "/v1/webhook-sources?limit=200")
    assert source in listed.json()["data"]
    assert secret not in again.text + listed.text + repr(await rows(shared, WebhookSecret))
    assert (await signed(shared, source, secret)).status_code < 300


async def test_a_secret_that_was_given_is_not_shown(shared: Rig) -> None:
    answer = await shared.call(
        "POST", "/v1/webhook-sources", {"name": unused("hooks-"), "provider": "github", "secret": "CANARY-of-hooks"}
    )
    assert answer.status_code == 201
    assert "CANARY" not in answer.text
    assert [one["origin"] for one in answer.json()["secrets"]] == ["given"]
    assert (await signed(shared, answer.json(), "CANARY-of-hooks")).status_code < 300
    assert (await signed(shared, answer.json(), "another")).status_code == 401


async def test_a_repeated_request_does_not_show_the_secret_again(shared: Rig) -> None:
    body = {"name": unused("hooks-"), "provider": "github"}
    first = await shared.call("POST", "/v1/webhook-sources", body, Idempotency_Key=body["name"])
    assert first.status_code == 201
    again = await shared.call("POST", "/v1/webhook-sources", body, Idempotency_Key=body["name"])
    assert check_problem(again, 409, "idempotency_conflict")["made_id"] == first.json()["id"]
    assert first.json()["secret"] not in again.text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"provider": "github", "secret": None}, "a secret is needed"),
        ({"provider": "discord"}, "a secret is needed"),
        ({"provider": "asana"}, "the provider's first request brings the secret"),
    ],
)
async def test_a_source_without_its_secret_refuses_everything_and_says_so(
    shared: Rig, fields: dict[str, Any], reason: str
) -> None:
    source = await made(shared, **fields)
    assert "secret" not in source
    assert (source["status"], source["status_reason"], source["secrets"]) == ("configuring", reason, [])
    assert (await shared.backend.post(source["url"], content=b"{}")).status_code == 401


async def test_a_name_is_taken_once(shared: Rig) -> None:
    source = await made(shared)
    before = await vault_owners(shared)
    again = await shared.call("POST", "/v1/webhook-sources", {"name": source["name"], "provider": "github"})
    check_problem(again, 409, "conflict")
    assert await vault_owners(shared) == before
    other = await made(shared)
    check_problem(await patched(shared, other["id"], {"name": source["name"]}), 409, "conflict")


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"name": "A B"}, "/name"),
        ({"provider": "nowhere"}, "/provider"),
        ({"provider": "oidc"}, "/provider"),
        ({"tolerance_seconds": 0}, "/tolerance_seconds"),
        ({"config": {"kind": "other"}}, "/config/kind"),
        ({"config": {"CANARY": 1}}, "/config"),
        ({"config": {"seal": "yes"}}, "/config/seal"),
        ({"config": {"settings": {"verify_token": "x"}}}, "/config/settings"),
        ({"config": {"public_url": "https://u:p@hooks.example.test/"}}, "/config/public_url"),
        ({"config": {"public_url": "https://hooks.example.test/x?y=1"}}, "/config/public_url"),
        ({"config": {"public_url": "https://hooks.example.test/#x"}}, "/config/public_url"),
        ({"config": {"public_url": "ftp://hooks.example.test/"}}, "/config/public_url"),
        ({"connection_id": "con_nobody"}, "/connection_id"),
        ({"register": True}, "/connection_id"),
        ({"provider": "google", "config": {"kind": "pubsub"}}, "/config/settings"),
        ({"provider": "facebook"}, "/config/settings"),
        ({"provider": "discord", "secret": "private:00"}, "/secret"),
        ({"provider": "svix", "secret": "whsec_***"}, "/secret"),
    ],
)
async def test_what_no_source_can_be_is_refused_by_field(shared: Rig, fields: dict[str, Any], pointer: str) -> None:
    before = await vault_owners(shared)
    problem = await refused(shared, pointer, **fields)
    assert "CANARY" not in str(problem)
    assert await vault_owners(shared) == before


async def test_a_kind_that_needs_no_secret_takes_none(shared: Rig) -> None:
    config = {"kind": "pubsub", "settings": {"audience": "https://a.test", "account": "a@b.test"}}
    source = await made(shared, provider="google", config=config)
    assert (source["status"], source["config"]) == ("active", config)
    assert "secret" not in source
    await refused(shared, "/secret", provider="google", config=config, secret="x" * 32)


async def test_only_operators_write_and_auditors_read(shared: Rig) -> None:
    source = await made(shared)
    auditor, service = await shared.caller(roles=("auditor",)), await shared.caller()
    operator = await shared.caller(roles=("operator",))
    path = f"/v1/webhook-sources/{source['id']}"
    assert (await shared.call("GET", path, key=auditor)).status_code == 200
    for key, method, to, body in (
        (auditor, "PATCH", path, {"enabled": False}),
        (auditor, "POST", f"{path}/secrets", {}),
        (service, "GET", path, None),
        (service, "GET", "/v1/webhook-sources", None),
        (service, "GET", f"{path}/rejections", None),
        (service, "DELETE", path, None),
    ):
        check_problem(await shared.call(method, to, body, key=key), 403, "forbidden")
    assert (await shared.call("PATCH", path, {"enabled": False}, key=operator)).status_code == 200


async def test_what_is_not_there_is_not_found(shared: Rig) -> None:
    path = "/v1/webhook-sources/src_" + "a" * 26
    source = await made(shared)
    for method, to, body in (
        ("GET", path, None),
        ("PATCH", path, {"enabled": False}),
        ("DELETE", path, None),
        ("GET", f"{path}/secrets", None),
        ("POST", f"{path}/secrets", {}),
        ("GET", f"{path}/rejections", None),
        ("DELETE", f"/v1/webhook-sources/{source['id']}/secrets/key_x", None),
    ):
        check_problem(await shared.call(method, to, body), 404, "not_found")


async def test_sources_are_listed_newest_first_in_pages(shared: Rig) -> None:
    ids = [(await made(shared))["id"] for _ in range(3)]
    first = (await shared.call("GET", "/v1/webhook-sources?limit=2")).json()
    assert [one["id"] for one in first["data"]] == [ids[2], ids[1]]
    second = (await shared.call("GET", f"/v1/webhook-sources?limit=2&cursor={first['next_cursor']}")).json()
    assert second["data"][0]["id"] == ids[0]


async def test_every_write_is_in_the_audit(shared: Rig) -> None:
    source = await made(shared)
    path = f"/v1/webhook-sources/{source['id']}"
    assert (await patched(shared, source["id"], {"tolerance_seconds": 60})).status_code == 200
    added = (await shared.call("POST", f"{path}/secrets", {})).json()
    assert (await shared.call("DELETE", f"{path}/secrets/{added['id']}")).status_code == 204
    assert (await shared.call("DELETE", path)).status_code == 204
    for what in ("created", "updated", "secret_added", "secret_deleted", "deleted"):
        found = [
            one for one in await audited(shared, f"webhook_source.{what}") if one.detail["source_id"] == source["id"]
        ]
        assert len(found) == 1, what


async def test_the_catalog_says_what_a_source_needs(shared: Rig) -> None:
    google = (await shared.call("GET", "/v1/providers/google")).json()["webhooks"]
    pubsub = next(one for one in google if one["kind"] == "pubsub")
    assert [(one["name"], one["needed"], one["secret"]) for one in pubsub["settings"]] == [
        ("audience", True, False),
        ("account", True, False),
    ]
    assert (pubsub["needs_secret"], pubsub["covers"]) == (False, [])
    (github,) = (await shared.call("GET", "/v1/providers/github")).json()["webhooks"]
    assert (github["kind"], github["covers"], github["needs_secret"]) == ("", ["body"], True)
    assert "repository" in [one["name"] for one in github["registration"]]


# Changed


async def test_a_change_is_a_merge_patch_and_reaches_requests(shared: Rig) -> None:
    url = "https://hooks.example.test/in"
    source = await made(shared, config={"public_url": url, "seal": True})
    assert source["url"] == url
    assert (await known(shared, source["id"])).public_url == url
    changed = await patched(shared, source["id"], {"config": {"public_url": None}, "tolerance_seconds": 30})
    assert changed.status_code == 200, changed.text
    assert changed.json()["config"] == {"kind": "", "seal": True}
    seen = await known(shared, source["id"])
    assert (seen.public_url, seen.tolerance_seconds, seen.seal) == (None, 30.0, True)
    back = (await patched(shared, source["id"], {"config": None, "tolerance_seconds": None})).json()
    assert (back["config"], back["tolerance_seconds"]) == ({"kind": ""}, None)


async def test_provider_and_kind_stay(shared: Rig) -> None:
    source = await made(shared, provider="gitlab")
    check_problem(await patched(shared, source["id"], {"provider": "github"}), 400, "invalid_request", "/provider")
    kinds = sorted(shared.parts.integrations.catalog["gitlab"].webhooks)
    assert kinds[0] == ""
    answer = await patched(shared, source["id"], {"config": {"kind": kinds[1]}})
    check_problem(answer, 400, "invalid_request", "/config/kind")


async def test_a_disabled_source_answers_as_if_it_were_not_there(shared: Rig) -> None:
    source = await made(shared)
    assert (await signed(shared, source, source["secret"])).status_code < 300
    assert (await patched(shared, source["id"], {"enabled": False})).json()["status"] == "inactive"
    assert (await shared.backend.post(source["url"], content=b"{}")).status_code == 404
    assert (await patched(shared, source["id"], {"enabled": True})).json()["status"] == "active"
    assert (await signed(shared, source, source["secret"])).status_code < 300


async def test_secret_settings_are_kept_by_the_vault_alone(shared: Rig) -> None:
    config = {"settings": {"verify_token": "CANARY-token"}}
    source = await made(shared, provider="facebook", config=config, secret="app-secret")
    assert source["config"] == {"kind": "", "secret_settings": ["verify_token"]}
    assert source["status"] == "active"
    assert "CANARY" not in repr(await rows(shared, WebhookSource))
    hello = f"{source['url']}?hub.mode=subscribe&hub.challenge=42&hub.verify_token="
    assert (await shared.backend.get(hello + "CANARY-token")).text == "42"
    changed = await patched(shared, source["id"], {"config": {"settings": {"verify_token": "CANARY-newer"}}})
    assert changed.status_code == 200, changed.text
    assert "CANARY" not in changed.text
    assert (await shared.backend.get(hello + "CANARY-token")).status_code == 401
    assert (await shared.backend.get(hello + "CANARY-newer")).text == "42"
    kept = await patched(shared, source["id"], {"config": {"seal": True}})
    assert kept.json()["config"]["secret_settings"] == ["verify_token"]
    gone = await patched(shared, source["id"], {"config": {"settings": {"verify_token": None}}})
    check_problem(gone, 400, "invalid_request", "/config/settings")
    assert (await shared.call("DELETE", f"/v1/webhook-sources/{source['id']}")).status_code == 204
    assert not [one for one in await vault_owners(shared) if source["id"] in one]


async def test_a_body_that_carries_the_secret_is_sealed_by_itself(shared: Rig) -> None:
    told = await made(shared, provider="microsoft")
    assert (await known(shared, told["id"])).seal
    signs = await made(shared)
    assert not (await known(shared, signs["id"])).seal
    open_one = await made(shared, provider="microsoft", config={"seal": False})
    assert not (await known(shared, open_one["id"])).seal


async def test_a_connection_is_one_that_is_there(shared: Rig) -> None:
    connection = await imported(shared, unused("acme:"))
    source = await made(shared, connection_id=connection["id"])
    assert source["connection_id"] == connection["id"]
    assert (await known(shared, source["id"])).connection_id == connection["id"]
    assert (await patched(shared, source["id"], {"connection_id": None})).json()["connection_id"] is None


# Secrets


async def test_secrets_overlap_and_which_one_matched_is_recorded(shared: Rig) -> None:
    source = await made(shared)
    path = f"/v1/webhook-sources/{source['id']}/secrets"
    added = await shared.call("POST", path, {"secret": "the next one"})
    assert added.status_code == 201, added.text
    assert added.json().keys() == {"id", "origin", "created_at", "expires_at", "last_used_at"}
    listed = (await shared.call("GET", path)).json()["data"]
    assert [one["id"] for one in listed] == [added.json()["id"], source["secrets"][0]["id"]]
    assert (await signed(shared, source, source["secret"])).status_code < 300

    async def used() -> list[bool]:
        held = (await shared.call("GET", path)).json()["data"]
        return [one["last_used_at"] is not None for one in held] if any(one["last_used_at"] for one in held) else []

    assert await eventually(used) == [False, True]
    assert (await signed(shared, source, "the next one")).status_code < 300
    assert (await shared.call("DELETE", f"{path}/{listed[1]['id']}")).status_code == 204
    assert (await signed(shared, source, source["secret"])).status_code == 401
    assert f"webhook_secrets/{listed[1]['id']}" not in await vault_owners(shared)


async def test_an_old_secret_ends_when_it_was_told_to(shared: Rig) -> None:
    source = await made(shared)
    path = f"/v1/webhook-sources/{source['id']}/secrets"
    added = (await shared.call("POST", path, {"expires_old_in": 0.4})).json()
    assert (await signed(shared, source, source["secret"])).status_code < 300
    assert (await signed(shared, source, added["secret"])).status_code < 300

    async def over() -> bool:
        return (await signed(shared, source, source["secret"])).status_code == 401

    assert await eventually(over)
    assert [one["id"] for one in (await shared.call("GET", path)).json()["data"]] == [added["id"]]
    assert await shared.parts.webhooks.sources.expire_secrets() >= 1
    owners = await vault_owners(shared)
    assert f"webhook_secrets/{source['secrets'][0]['id']}" not in owners
    assert f"webhook_secrets/{added['id']}" in owners


async def test_a_secret_that_is_there_is_not_added_again(shared: Rig) -> None:
    source = await made(shared, secret="the same text")
    path = f"/v1/webhook-sources/{source['id']}/secrets"
    before = await vault_owners(shared)
    again = await shared.call("POST", path, {"secret": "the same text"})
    assert again.json()["id"] == source["secrets"][0]["id"]
    assert await vault_owners(shared) == before


async def test_there_are_ten_secrets_at_most(shared: Rig) -> None:
    source = await made(shared)
    path = f"/v1/webhook-sources/{source['id']}/secrets"
    for _ in range(9):
        assert (await shared.call("POST", path, {})).status_code == 201
    before = await vault_owners(shared)
    check_problem(await shared.call("POST", path, {}), 409, "conflict")
    assert await vault_owners(shared) == before


async def test_only_the_provider_makes_the_key_of_a_public_key_scheme(shared: Rig) -> None:
    source = await made(shared, provider="discord")
    path = f"/v1/webhook-sources/{source['id']}/secrets"
    check_problem(await shared.call("POST", path, {}), 400, "invalid_request", "/secret")
    pair = (await known(shared, source["id"])).webhook.scheme.pair
    assert pair is not None
    public, private = pair(b"\x07" * 32)
    assert (await shared.call("POST", path, {"secret": public.reveal()})).status_code == 201
    answer = await signed(shared, source, private.reveal())
    assert answer.status_code < 300, answer.text


async def test_of_two_secrets_that_handshakes_bring_one_is_kept(shared: Rig) -> None:
    source = await made(shared, provider="asana")
    sources, seen = shared.parts.webhooks.sources, await known(shared, source["id"])
    texts = ["first-of-the-two", "other-of-the-two"]
    kept = await asyncio.gather(*(sources.learn(seen, Secret(text)) for text in texts))
    assert sorted(kept) == [False, True]
    winner = texts[kept.index(True)]
    now_seen = await known(shared, source["id"])
    assert [one.value.reveal() for one in now_seen.secrets] == [winner]
    assert await sources.learn(now_seen, Secret(winner))
    assert not await sources.learn(now_seen, Secret("a third secret"))
    held = (await shared.call("GET", f"/v1/webhook-sources/{source['id']}/secrets")).json()["data"]
    assert [one["origin"] for one in held] == ["learned"]
    assert len(await audited(shared, "webhook_source.secret_learned")) == 1
    rows_of = [one.id for one in await rows(shared, WebhookSecret)]
    assert {one for one in await vault_owners(shared) if one.startswith("webhook_secrets/")} == {
        f"webhook_secrets/{one}" for one in rows_of
    }


# Gone


async def test_a_deleted_source_is_gone_with_its_secrets_and_its_log(shared: Rig) -> None:
    source = await made(shared)
    assert (await shared.backend.post(source["url"], content=b"{}")).status_code == 401
    assert (await shared.call("DELETE", f"/v1/webhook-sources/{source['id']}")).status_code == 204
    assert (await signed_elsewhere(shared, source)).status_code == 404
    assert f"webhook_secrets/{source['secrets'][0]['id']}" not in await vault_owners(shared)
    check_problem(await shared.call("GET", f"/v1/webhook-sources/{source['id']}"), 404, "not_found")


async def signed_elsewhere(rig: Rig, source: dict[str, Any]) -> httpx2.Response:
    """Post something to a source's address."""
    return await rig.backend.post(source["url"], content=b"{}", headers={"x-hub-signature-256": "sha256=00"})


async def test_another_process_forgets_a_deleted_source_within_half_a_second(shared: Rig) -> None:
    source = await made(shared)
    parts = shared.parts
    of_process = (parts.database, parts.vault, parts.audit, parts.integrations.catalog, parts.settings)
    other = Sources(*of_process, revision=Revision(parts.database))
    assert await other.known(source["id"]) is not None
    assert (await shared.call("DELETE", f"/v1/webhook-sources/{source['id']}")).status_code == 204
    async with asyncio.timeout(0.75):
        while await other.known(source["id"]) is not None:  # noqa: ASYNC110 - what is waited for is another's belief
            await asyncio.sleep(0.02)


async def test_what_was_refused_is_listed_newest_first_in_pages(shared: Rig) -> None:
    source = await made(shared)

    def work(session: Any) -> None:
        for number in range(3):
            row = WebhookRejection(
                source_id=source["id"], at=1_700_000_000.0 + number, step="header_missing", method="POST"
            )
            session.add(row)

    await shared.parts.database.transaction(work)
    path = f"/v1/webhook-sources/{source['id']}/rejections"
    first = (await shared.call("GET", f"{path}?limit=2")).json()
    assert [one["at"] for one in first["data"]] == ["2023-11-14T22:13:22.000Z", "2023-11-14T22:13:21.000Z"]
    assert first["data"][0].keys() == {"id", "at", "step", "method", "size", "address", "count"}
    second = (await shared.call("GET", f"{path}?limit=2&cursor={first['next_cursor']}")).json()
    assert ([one["at"] for one in second["data"]], second["next_cursor"]) == (["2023-11-14T22:13:20.000Z"], None)


async def test_a_source_that_its_providers_file_no_longer_configures_verifies_nothing(shared: Rig) -> None:
    source = await made(shared)
    await rewritten(shared, WebhookSource, source["id"], kind="of_an_older_version")
    await made(shared)  # any change tells every process to look again
    answer = await signed_elsewhere(shared, source)
    assert answer.status_code == 503, answer.text
    shown = (await shared.call("GET", f"/v1/webhook-sources/{source['id']}")).json()
    assert (shown["status"], shown["scheme"]) == ("error", None)
