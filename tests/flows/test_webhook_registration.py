"""Hooks at providers through HTTP: made, taken over after a lost answer, looked after, renewed, and removed in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from sqlmodel import Session, col

from broker.models import AuditRecord, Connection, Integration, WebhookRegistration, WebhookSecret, WebhookSource
from tests.flows.hook_providers import (
    FakeGoogle,
    FakeHub,
    FakeStripe,
    HookApi,
    connect,
    registered_source,
    run_until_idle,
    serving_hooks,
)
from tests.flows.rig import Rig, open_rig
from tests.flows.shared import audited, rows

pytestmark = pytest.mark.asyncio(loop_scope="module")
Api = TypeVar("Api", bound=HookApi)
KEY = {"type": "api_key", "api_key": "ghp_of-the-connection"}
STRIPE_KEY = {"type": "api_key", "api_key": "sk_of-the-connection"}
GOOGLE = {"type": "oauth2", "access_token": "ya29.first", "refresh_token": "1//refresh"}
REPOSITORY = {"repository": "acme/widgets", "events": "push"}


@asynccontextmanager
async def at(place: Path | Rig, api: Api, database_url: str = "") -> AsyncIterator[tuple[Rig, Api]]:
    """Give a broker without a worker, a new one or the one at hand, and a provider's API; what it made goes at the end."""
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(serving_hooks(api))
        if isinstance(place, Rig):
            stack.push_async_callback(_emptied, place)
            yield place, api
        else:
            yield await stack.enter_async_context(open_rig(place, database_url=database_url)), api


async def _emptied(rig: Rig) -> None:
    """Forget integrations, sources and hooks, so that the next test may use the same names."""

    def work(session: Session) -> None:
        for table in (WebhookRegistration, WebhookSecret, WebhookSource, Connection):
            session.execute(sa.delete(table))
        session.execute(sa.delete(Integration).where(col(Integration.name) != "sandbox"))

    await rig.parts.database.transaction(work)


def hub() -> FakeHub:
    return FakeHub({"ghp_of-the-connection"})


def stripe() -> FakeStripe:
    return FakeStripe({"sk_of-the-connection"})


def google() -> FakeGoogle:
    return FakeGoogle({"ya29.first"})


async def moved(rig: Rig, **seconds: float) -> None:
    """Let time pass for every registration: these columns are moved by so many seconds."""
    values: dict[str, Any] = {name: sa.column(name) + by for name, by in seconds.items()}
    await rig.parts.database.transaction(
        lambda session: session.execute(sa.update(WebhookRegistration).values(**values))
    )


async def actions(rig: Rig) -> list[tuple[str, str]]:
    """Return action and outcome of what the audit knows of hooks, in order."""
    records = sorted(await rows(rig, AuditRecord), key=lambda record: record.number)
    return [(one.action, one.outcome) for one in records if one.action.startswith("webhook.")]


# --- Made.


async def test_a_source_is_registered_at_the_provider_and_posts_that_its_hook_signs_are_believed(
    tmp_path: Path, database_url: str
) -> None:
    async with at(tmp_path, hub(), database_url) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        assert source.answer["registration"]["state"] == "wanted"
        assert api.lines == []  # nothing is sent in the request that asks for it
        await run_until_idle(rig)
        assert await source.state() == ("active", None)
        [hook] = api.hooks.values()
        assert hook["config"] == {
            "url": source.url,
            "content_type": "json",
            "insecure_ssl": "0",
            "secret": source.answer["secret"],
        }
        assert (hook["events"], hook["active"]) == (["push"], True)
        assert (await source.registration() or {})["remote_id"] == "1"
        assert await actions(rig) == [("webhook.registration", "intent"), ("webhook.registered", "ok")]


async def test_the_audit_knows_before_the_credential_is_used_and_never_what_it_is(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api):
        connection_id = await connect(rig, api, "github", KEY)
        source = await registered_source(rig, "github", connection_id, REPOSITORY)
        await run_until_idle(rig)
        [intent] = await audited(rig, "webhook.registration", connection_id)
        assert (intent.actor, intent.subject, intent.integration) == ("system", "acme:42", "github")
        everything = repr([record.model_dump() for record in await rows(rig, AuditRecord)])
        registrations = repr([row.model_dump() for row in await rows(rig, WebhookRegistration)])
        for secret in (KEY["api_key"], source.answer["secret"]):
            assert secret not in everything + registrations


async def test_a_lost_answer_leaves_one_hook(tmp_path: Path, database_url: str) -> None:
    async with at(tmp_path, hub(), database_url) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        api.lose_next = True
        await run_until_idle(rig)
        assert await source.state() == ("failed", "provider_unavailable")
        assert len(api.hooks) == 1
        await moved(rig, due_at=-60)
        await run_until_idle(rig)
        assert (await source.state(), len(api.hooks), api.made) == (("active", None), 1, 1)


@pytest.mark.parametrize("before", [True, False], ids=["before it was sent", "after it was sent"])
async def test_a_process_that_dies_between_claim_and_record_leaves_one_hook(
    tmp_path: Path,
    database_url: str,
    before: bool,  # noqa: FBT001 - which of two
) -> None:
    async with at(tmp_path, hub(), database_url) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        await _die(rig, api, before=before)
        assert len(api.hooks) == (0 if before else 1)
        assert await run_until_idle(rig) == 0  # the claim still holds
        await moved(rig, due_at=-300)
        await run_until_idle(rig)
        assert (await source.state(), len(api.hooks), api.made) == (("active", None), 1, 1)


async def _die(rig: Rig, api: HookApi, *, before: bool) -> None:
    """Cut the job off: before its first request is answered, or once the hook is made and its answer on the way."""
    usual, reached = api.reply, asyncio.Event()

    def reply(seen: Any) -> Any:
        if before or seen.method != "GET":
            if not before:
                usual(seen)
            reached.set()
            raise ConnectionResetError
        return usual(seen)

    api.reply = reply  # type: ignore[method-assign]
    task = asyncio.create_task(rig.parts.webhooks.registering.run_due())
    await asyncio.wait_for(reached.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    api.reply = usual  # type: ignore[method-assign]


async def test_the_secret_that_an_endpoint_brings_is_the_sources(tmp_path: Path, database_url: str) -> None:
    async with at(tmp_path, stripe(), database_url) as (rig, api):
        source = await registered_source(rig, "stripe", await connect(rig, api, "stripe", STRIPE_KEY), {})
        assert "secret" not in source.answer  # nobody but the provider has one yet
        await run_until_idle(rig)
        known = await rig.parts.webhooks.sources.known(source.id)
        assert known is not None
        assert [one.value.reveal() for one in known.secrets] == [api.secret_of(1)]
        assert [one.origin for one in await rows(rig, WebhookSecret)] == ["learned"]


async def test_an_endpoint_whose_secret_was_lost_is_replaced(shared: Rig) -> None:
    async with at(shared, stripe()) as (rig, api):
        source = await registered_source(rig, "stripe", await connect(rig, api, "stripe", STRIPE_KEY), {})
        api.lose_next = True
        await run_until_idle(rig)
        await moved(rig, due_at=-60)
        await run_until_idle(rig)
        assert list(api.hooks) == ["we_2"]
        known = await rig.parts.webhooks.sources.known(source.id)
        assert known is not None
        assert [one.value.reveal() for one in known.secrets] == [api.secret_of(2)]


# --- Refused.


@pytest.mark.parametrize(
    ("refuse", "error"),
    [
        ((403, {"message": "Resource not accessible by integration"}), "permission_missing"),
        (
            (404, {"message": "Not Found"}, {"X-OAuth-Scopes": "read:user", "X-Accepted-OAuth-Scopes": "repo"}),
            "permission_missing",
        ),
        ((404, {"message": "Not Found"}), "not_found"),
        ((500, {}), "provider_unavailable"),
        ((200, b"<html>"), "upstream_invalid"),
    ],
)
async def test_what_stands_against_a_hook_is_said_at_the_source_and_tried_again(
    shared: Rig, refuse: Any, error: str
) -> None:
    async with at(shared, hub()) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        api.refuse = refuse
        assert await run_until_idle(rig) == 1
        assert await source.state() == ("failed", error)
        assert ("webhook.registration_failed", "failed") in await actions(rig)
        api.refuse = None
        await moved(rig, due_at=-2 * 3600)
        await run_until_idle(rig)
        assert await source.state() == ("active", None)


async def test_a_frozen_connection_makes_no_hook_until_the_freeze_is_lifted(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        freeze = {"action": "freeze", "selector": {"integration": "github"}, "reason": "looking into it"}
        frozen = await rig.call("POST", "/v1/revocations", freeze)
        await run_until_idle(rig)
        assert (await source.state(), api.lines) == (("failed", "connection_frozen"), [])
        assert (await rig.call("DELETE", f"/v1/revocations/{frozen.json()['id']}")).status_code in {200, 202, 204}
        await moved(rig, due_at=-2 * 3600)
        await run_until_idle(rig)
        assert await source.state() == ("active", None)


async def test_nothing_is_sent_to_an_api_that_the_connection_is_not_pinned_to(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api), serving_hooks(hub()) as elsewhere:
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        patch = {"config": {"api_base_url": elsewhere.fake.base}}
        assert (await rig.call("PATCH", "/v1/integrations/github", patch)).status_code == 200
        await run_until_idle(rig)
        assert await source.state() == ("failed", "origin_changed")
        assert (api.lines, elsewhere.lines) == ([], [])


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"config": {"registration": {}}}, "/config/registration"),
        ({"config": {"registration": {"repository": "../x"}}}, "/config/registration"),
        ({"config": {"registration": {**REPOSITORY, "organisation": "acme"}}}, "/config/registration"),
        ({"config": {"registration": {**REPOSITORY, "branch": "main"}}}, "/config/registration"),
        ({"provider": "stripe", "config": {}}, "/connection_id"),
        ({"provider": "slack", "config": {}}, "/register"),
        ({"connection_id": None}, "/connection_id"),
    ],
)
async def test_a_hook_that_cannot_be_is_refused_with_the_source(
    shared: Rig, changes: dict[str, Any], pointer: str
) -> None:
    async with at(shared, hub()) as (rig, api):
        body = {"name": "events", "provider": "github", "register": True, "config": {"registration": REPOSITORY}}
        body["connection_id"] = await connect(rig, api, "github", KEY)
        refused = await rig.call("POST", "/v1/webhook-sources", {**body, **changes})
        assert (refused.status_code, [one["pointer"] for one in refused.json()["errors"]]) == (400, [pointer])
        assert await rows(rig, WebhookRegistration) == []


async def test_a_hook_is_made_only_for_who_might_have_the_token_that_makes_it(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api):
        connection_id = await connect(rig, api, "github", KEY)
        operator = await rig.caller(roles=("operator",))
        may_call = {"integrations": ["*"], "may": ["read", "proxy", "events"]}
        caller = await rig.caller(may_call, roles=("operator", "service"))
        token = await rig.caller({"integrations": ["github"], "may": ["token"]}, roles=("operator", "service"))
        body = {"name": "events", "provider": "github", "connection_id": connection_id}
        hook = {"register": True, "config": {"registration": REPOSITORY}}
        for key in (operator, caller):
            refused = await rig.call("POST", "/v1/webhook-sources", {**body, **hook}, key=key)
            assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert await rows(rig, WebhookSource) == []
        made = await rig.call("POST", "/v1/webhook-sources", body, key=operator)
        path = f"/v1/webhook-sources/{made.json()['id']}"
        assert (await rig.call("PATCH", path, hook, key=operator)).status_code == 403
        assert (await rows(rig, WebhookRegistration), await run_until_idle(rig)) == ([], 0)
        assert (await rig.call("PATCH", path, hook, key=token)).status_code == 200
        await run_until_idle(rig)
        # What stands may be looked after by who looks after sources, and is pointed nowhere else.
        elsewhere = {"config": {"public_url": "https://elsewhere.test/in"}}
        assert (await rig.call("PATCH", path, elsewhere, key=operator)).status_code == 403
        assert (await rig.call("PATCH", path, {"config": {"park_unmatched": True}}, key=operator)).status_code == 200
        assert (await rig.call("POST", f"{path}/secrets", key=operator)).status_code == 201
        assert (await rig.call("PATCH", path, {"register": False}, key=operator)).status_code == 200
        await run_until_idle(rig)
        assert api.hooks == {}


# --- Looked after.


async def test_a_hook_that_is_gone_or_changed_is_made_again_within_a_day_or_so(
    tmp_path: Path, database_url: str
) -> None:
    async with at(tmp_path, hub(), database_url) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        await run_until_idle(rig)
        assert await run_until_idle(rig) == 0
        await moved(rig, due_at=-1.3 * 86_400)
        await run_until_idle(rig)
        assert (api.made, await source.state()) == (1, ("active", None))  # looked at, and well
        for spoil in (api.hooks.clear, lambda: api.hooks[next(iter(api.hooks))].update(active=False)):
            spoil()
            await moved(rig, due_at=-1.3 * 86_400)
            await run_until_idle(rig)
            [hook] = api.hooks.values()
            assert (hook["active"], hook["config"]["url"], hook["config"]["secret"]) == (
                True,
                source.url,
                source.answer["secret"],
            )
            assert await source.state() == ("active", None)
        assert [one for one, _ in await actions(rig)].count("webhook.repaired") == 2


async def test_while_the_provider_cannot_be_asked_the_hook_is_believed_and_the_reason_shown(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        await run_until_idle(rig)
        api.refuse = (503, {})
        await moved(rig, due_at=-1.3 * 86_400)
        await run_until_idle(rig)
        assert await source.state() == ("active", "provider_unavailable")


async def test_a_disabled_endpoint_is_replaced_and_its_old_secret_counts_for_a_day_more(shared: Rig) -> None:
    async with at(shared, stripe()) as (rig, api):
        source = await registered_source(rig, "stripe", await connect(rig, api, "stripe", STRIPE_KEY), {})
        await run_until_idle(rig)
        api.hooks["we_1"]["status"] = "disabled"
        await moved(rig, due_at=-1.3 * 86_400)
        await run_until_idle(rig)
        assert list(api.hooks) == ["we_2"]
        known = await rig.parts.webhooks.sources.known(source.id)
        assert known is not None
        assert [one.value.reveal() for one in known.secrets] == [api.secret_of(2), api.secret_of(1)]
        ends = {row.id: row.expires_at for row in await rows(rig, WebhookSecret)}
        assert [ends[one.id] is None for one in known.secrets] == [True, False]


async def test_another_newest_secret_is_told_to_the_provider(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        await run_until_idle(rig)
        added = await rig.call("POST", f"/v1/webhook-sources/{source.id}/secrets", {})
        assert added.status_code == 201, added.text
        await run_until_idle(rig)
        [hook] = api.hooks.values()
        assert hook["config"]["secret"] == added.json()["secret"] != source.answer["secret"]


async def test_other_events_are_wanted_of_the_same_hook_and_another_repository_of_another_one(
    tmp_path: Path, database_url: str
) -> None:
    async with at(tmp_path, hub(), database_url) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        await run_until_idle(rig)
        patch = {"config": {"registration": {"events": "push,issues"}}}
        changed = await rig.call("PATCH", f"/v1/webhook-sources/{source.id}", patch)
        assert changed.status_code == 200, changed.text
        await run_until_idle(rig)
        assert [hook["events"] for hook in api.hooks.values()] == [["issues", "push"]]
        assert (await source.state(), api.made) == (("active", None), 1)
        assert len(await rows(rig, WebhookRegistration)) == 1


# --- Leases.


async def test_a_channel_is_renewed_before_it_ends_and_both_are_there_for_a_while(
    tmp_path: Path, database_url: str
) -> None:
    async with at(tmp_path, google(), database_url) as (rig, api):
        connection_id = await connect(rig, api, "google", GOOGLE)
        source = await registered_source(rig, "google", connection_id, {"calendar": "primary"})
        await run_until_idle(rig)
        [first] = api.hooks
        shown = await source.registration()
        assert shown is not None
        assert shown["expires_at"] is not None
        week = 7 * 86_400
        await moved(rig, due_at=-week, expires_at=-(week - 3 * 3600), created_at=-week)
        await run_until_idle(rig)
        assert len(api.hooks) == 2  # the overlap: the next one, and still the first
        assert {hook["token"] for hook in api.hooks.values()} == {source.answer["secret"]}
        assert await source.state() == ("active", None)
        await moved(rig, due_at=-120)
        await run_until_idle(rig)
        assert first not in api.hooks
        assert len(api.hooks) == 1
        assert len(await rows(rig, WebhookRegistration)) == 1
        assert [one for one, _ in await actions(rig)].count("webhook.renewed") == 1


async def test_while_the_next_channel_cannot_be_opened_the_old_one_stays_to_its_end(shared: Rig) -> None:
    async with at(shared, google()) as (rig, api):
        connection_id = await connect(rig, api, "google", GOOGLE)
        source = await registered_source(rig, "google", connection_id, {"calendar": "primary"})
        await run_until_idle(rig)
        week = 7 * 86_400
        await moved(rig, due_at=-week, expires_at=-(week - 3 * 3600), created_at=-week)
        api.refuse = (503, {})
        await run_until_idle(rig)
        assert (len(api.hooks), await source.state()) == (1, ("active", None))
        await moved(rig, due_at=-4 * 3600, expires_at=-4 * 3600)
        await run_until_idle(rig)
        assert await source.state() == ("failed", "provider_unavailable")  # it has ended: what is left is the next one
        api.refuse = None
        await moved(rig, due_at=-4 * 3600)
        await run_until_idle(rig)
        assert await source.state() == ("active", None)


async def test_a_channel_whose_answer_was_lost_does_not_stay_beside_the_next_try(shared: Rig) -> None:
    async with at(shared, google()) as (rig, api):
        connection_id = await connect(rig, api, "google", GOOGLE)
        source = await registered_source(rig, "google", connection_id, {"calendar": "primary"})
        api.lose_next = True
        await run_until_idle(rig)
        await moved(rig, due_at=-60)
        await run_until_idle(rig)
        assert (len(api.hooks), api.made, await source.state()) == (1, 2, ("active", None))


async def test_a_token_that_the_provider_refuses_is_refreshed_once(shared: Rig) -> None:
    async with at(shared, google()) as (rig, api):
        connection_id = await connect(rig, api, "google", GOOGLE)
        source = await registered_source(rig, "google", connection_id, {"calendar": "primary"})
        api.tokens = set()  # the stored one has ended without notice
        await run_until_idle(rig)
        assert (api.refreshed, await source.state()) == (1, ("active", None))


# --- Removed.


async def test_with_its_source_a_hook_goes(tmp_path: Path, database_url: str) -> None:
    async with at(tmp_path, hub(), database_url) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        await run_until_idle(rig)
        assert (await rig.call("DELETE", f"/v1/webhook-sources/{source.id}")).status_code == 204
        await run_until_idle(rig)
        assert (api.hooks, await rows(rig, WebhookRegistration)) == ({}, [])
        assert (await actions(rig))[-1] == ("webhook.removed", "ok")


async def test_a_hook_whose_making_was_not_heard_of_goes_with_its_source_too(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        api.lose_next = True
        await run_until_idle(rig)
        assert len(api.hooks) == 1
        assert (await rig.call("DELETE", f"/v1/webhook-sources/{source.id}")).status_code == 204
        await run_until_idle(rig)
        assert api.hooks == {}


async def test_a_source_that_is_deleted_before_anything_was_sent_asks_nobody(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        assert (await rig.call("DELETE", f"/v1/webhook-sources/{source.id}")).status_code == 204
        assert (await run_until_idle(rig), api.lines) == (0, [])


async def test_a_source_that_is_not_to_be_registered_any_more_loses_its_hook(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        await run_until_idle(rig)
        await rig.call("PATCH", f"/v1/webhook-sources/{source.id}", {"register": False})
        await run_until_idle(rig)
        assert (api.hooks, await source.state()) == ({}, None)


async def test_a_removal_that_fails_is_tried_again(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api):
        source = await registered_source(rig, "github", await connect(rig, api, "github", KEY), REPOSITORY)
        await run_until_idle(rig)
        await rig.call("DELETE", f"/v1/webhook-sources/{source.id}")
        api.refuse = (502, {})
        await run_until_idle(rig)
        assert len(api.hooks) == 1
        api.refuse = None
        await moved(rig, due_at=-60)
        await run_until_idle(rig)
        assert api.hooks == {}


@pytest.mark.parametrize("revoke", ["true", "false"])
async def test_when_a_connection_is_deleted_its_hooks_go_before_its_credential(
    tmp_path: Path, database_url: str, revoke: str
) -> None:
    async with at(tmp_path, hub(), database_url) as (rig, api):
        credentials = {"type": "oauth2", "access_token": "ghp_of-the-connection"}
        connection_id = await connect(rig, api, "github", credentials)
        source = await registered_source(rig, "github", connection_id, REPOSITORY)
        await run_until_idle(rig)
        assert len(api.hooks) == 1
        _let_in_the_client(api)
        answer = await rig.call("DELETE", f"/v1/connections/{connection_id}?revoke={revoke}")
        assert answer.status_code == 200, answer.text
        assert (api.hooks, await source.state()) == ({}, ("gone", "connection_gone"))
        if revoke == "true":
            assert answer.json()["revocation"] == "revoked"
            assert api.revoked == [0]  # when the token was revoked no hook was left
        assert (await run_until_idle(rig), (await actions(rig))[-1]) == (0, ("webhook.removed", "ok"))


def _let_in_the_client(api: FakeHub) -> None:
    """Let the client itself in, which revokes with its own credential."""
    api.tokens.add("Basic aHViOmh1Yi1zZWNyZXQ=")


async def test_an_incident_removes_the_hooks_before_it_revokes(tmp_path: Path, database_url: str) -> None:
    async with at(tmp_path, hub(), database_url) as (rig, api):
        credentials = {"type": "oauth2", "access_token": "ghp_of-the-connection"}
        connection_id = await connect(rig, api, "github", credentials)
        source = await registered_source(rig, "github", connection_id, REPOSITORY)
        await run_until_idle(rig)
        _let_in_the_client(api)
        incident = {"action": "revoke", "selector": {"integration": "github"}, "reason": "a leak"}
        assert (await rig.call("POST", "/v1/revocations", incident)).status_code in {200, 201, 202}
        for _ in range(20):
            await rig.parts.revocations.advance()
            if api.revoked:
                break
        assert (api.hooks, api.revoked) == ({}, [0])
        assert await source.state() == ("gone", "connection_gone")


async def test_a_provider_that_does_not_answer_keeps_no_credential_alive(shared: Rig) -> None:
    async with at(shared, hub()) as (rig, api):
        connection_id = await connect(rig, api, "github", KEY)
        source = await registered_source(rig, "github", connection_id, REPOSITORY)
        await run_until_idle(rig)
        api.refuse = (502, {})
        answer = await rig.call("DELETE", f"/v1/connections/{connection_id}")
        assert answer.status_code == 200, answer.text
        assert await source.state() == ("gone", "left_at_provider")
        assert (await actions(rig))[-1] == ("webhook.removed", "failed")
        assert (await rig.call("GET", f"/v1/connections/{connection_id}")).status_code == 404


async def test_a_hook_that_is_being_made_while_its_connection_is_deleted_does_not_stay(
    tmp_path: Path, database_url: str
) -> None:
    async with at(tmp_path, hub(), database_url) as (rig, api):
        connection_id = await connect(rig, api, "github", KEY)
        await registered_source(rig, "github", connection_id, REPOSITORY)
        usual, begun = api.reply, asyncio.Event()

        def reply(seen: Any) -> Any:
            begun.set()
            return usual(seen)

        api.reply = reply  # type: ignore[method-assign]
        making = asyncio.create_task(rig.parts.webhooks.registering.run_due())
        await asyncio.wait_for(begun.wait(), 10)
        answer = await rig.call("DELETE", f"/v1/connections/{connection_id}")
        await making
        assert (answer.status_code, api.made, api.hooks) == (200, 1, {})
