"""Providers' events meet connections: whose they are, which wait for one, and those that end a grant at once."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from broker.database import now
from broker.models import Connection, RevocationResult, WebhookDelivery, WebhookEvent, rfc3339
from broker.webhooks.attributing import release
from providers import load_catalog
from providers.receiving import sign_sample
from providers.spec import Sample, Secret
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.shared import audited, rewritten, rows

SECRET = "whsec_" + "a1" * 16
CLIENT = "ca_ours"
NUMBERS = itertools.count(1)
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Site:
    """A broker with an integration and a source of the same provider. ``#`` in names is this test's own number."""

    rig: Rig
    provider: str
    source: Mapping[str, Any]
    secret: str
    number: int

    def named(self, text: str) -> str:
        return text.replace("#", str(self.number))

    async def connect(self, account: str, owner: str = "acme:1", integration: str | None = None) -> str:
        """Import a token of an account; return the connection's id."""
        body = {
            "integration": integration or self.provider,
            "subject": owner,
            "credentials": {"type": "oauth2", "access_token": f"token-of-{account}-{owner}"},
            "account": {"id": self.named(account)},
        }
        answer = await self.rig.call("POST", "/v1/connections", body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    async def post(self, event: str, body: Any, *, headers: Mapping[str, str] | None = None) -> str:
        """Post an event as the provider does; return its id."""
        webhook = load_catalog()[self.provider].webhooks[""]
        at = await self.rig.parts.database.read(now)
        raw = self.named(json.dumps(body)).encode()
        sample = Sample(event, self.source["url"], at, "evt_1", raw)
        request = sign_sample(webhook, sample, Secret(self.secret))
        fields = [(name.decode(), value.decode()) for name, value in request.headers]
        async with httpx2.AsyncClient(trust_env=False) as http:
            sent = [*fields, *(headers or {}).items()]
            answer = await http.post(self.source["url"], content=request.body, headers=sent)
        assert answer.status_code < 300, answer.text
        mine = [one for one in await rows(self.rig, WebhookEvent) if one.source_id == self.source["id"]]
        return max(mine, key=lambda one: one.received_at).id

    async def stored(self, event_id: str) -> WebhookEvent:
        return next(one for one in await rows(self.rig, WebhookEvent) if one.id == event_id)

    async def work(self) -> None:
        """Do what the worker does about what waits."""
        for name in ("release_parked", "fan_out_waiting"):
            await next(job for _, job in self.rig.parts.webhooks.jobs if job.__name__ == name)()

    async def status(self, connection_id: str) -> tuple[str, str | None]:
        shown = (await self.rig.call("GET", f"/v1/connections/{connection_id}")).json()
        return shown["status"], shown["status_reason"]

    async def own(self, connection_id: str) -> list[str]:
        """Return what the broker's own events say of a connection."""
        found = [one for one in await rows(self.rig, WebhookEvent) if one.provider == "broker"]
        found = sorted((one for one in found if one.connection_id == connection_id), key=lambda one: one.received_at)
        return [one.type.removeprefix("broker.connection.") for one in found]


async def site_of(rig: Rig, provider: str = "stripe", client_id: str = CLIENT, **source: Any) -> Site:
    """Configure an integration and a source."""
    body = {"name": provider, "provider": provider, "client_id": client_id, "client_secret": "s" * 32, "scopes": []}
    made = await rig.call("POST", "/v1/integrations", body)
    assert made.status_code in {201, 409}, made.text
    number = next(NUMBERS)
    wanted = {"name": f"{provider}-{number}", "provider": provider, "secret": SECRET, **source}
    answer = await rig.call("POST", "/v1/webhook-sources", wanted)
    assert answer.status_code == 201, answer.text
    return Site(rig, provider, answer.json(), SECRET, number)


@pytest_asyncio.fixture(loop_scope="module")
async def either(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    """Give a broker on SQLite and on PostgreSQL: for what the database decides."""
    async with open_rig(tmp_path, database_url=database_url) as made:
        yield made


def gone(account: str, at: float, client: str = CLIENT) -> dict[str, Any]:
    """Return what Stripe says when an account has disconnected an app."""
    return {
        "id": f"evt_{account}",
        "created": int(at),
        "account": account,
        "type": "account.application.deauthorized",
        "data": {"object": {"id": client, "object": "application"}},
    }


# Whose an event is


async def test_an_event_belongs_to_the_connection_of_its_account(shared: Rig) -> None:
    site = await site_of(shared)
    mine = await site.connect("acct_#1")
    await site.connect("acct_#2")
    event = await site.stored(
        await site.post("invoice.paid", {"type": "invoice.paid", "id": "e#1", "account": "acct_#1"})
    )
    assert (event.connection_id, event.account_id, event.parked) == (mine, site.named("acct_#1"), False)
    assert event.number is not None


async def test_an_account_that_two_subjects_have_is_nobodys_and_keeps_its_name(shared: Rig) -> None:
    site = await site_of(shared, config={"park_unmatched": True})
    await site.connect("acct_#1", "acme:1")
    await site.connect("acct_#1", "acme:2")
    event = await site.stored(
        await site.post("invoice.paid", {"type": "invoice.paid", "id": "e#1", "account": "acct_#1"})
    )
    assert (event.connection_id, event.account_id, event.parked) == (None, site.named("acct_#1"), False)


async def test_the_connection_of_a_source_has_the_last_word(shared: Rig) -> None:
    site = await site_of(shared)
    mine, other = await site.connect("acct_#1"), await site.connect("acct_#2")
    changed = await shared.call("PATCH", f"/v1/webhook-sources/{site.source['id']}", {"connection_id": mine})
    assert changed.status_code == 200, changed.text
    event = await site.stored(
        await site.post("invoice.paid", {"type": "invoice.paid", "id": "e#1", "account": "acct_#2"})
    )
    assert (event.connection_id, event.account_id) == (mine, site.named("acct_#2"))
    assert other != mine


async def test_an_event_of_no_account_is_nobodys_and_does_not_wait(shared: Rig) -> None:
    site = await site_of(shared, config={"park_unmatched": True})
    event = await site.stored(await site.post("balance.available", {"type": "balance.available", "id": "e#1"}))
    assert (event.connection_id, event.account_id, event.parked) == (None, None, False)


async def test_an_unmatched_event_waits_for_its_connection_and_is_sent_then(either: Rig) -> None:
    site = await site_of(either, config={"park_unmatched": True})
    wanted = {"url": "https://127.0.0.1:1/hook", "event_types": ["stripe.**"]}
    assert (await either.call("POST", "/v1/subscriptions", wanted)).status_code == 201
    ids = [
        await site.post("invoice.paid", {"type": "invoice.paid", "id": f"e#{n}", "account": f"acct_#{n}"})
        for n in (1, 2)
    ]
    await site.work()
    assert [(one.parked, one.number) for one in [await site.stored(one) for one in ids]] == [(True, None)] * 2
    mine = await site.connect("acct_#1")
    await site.work()
    first, second = [await site.stored(one) for one in ids]
    assert (first.parked, first.connection_id, first.number is not None) == (False, mine, True)
    assert (second.parked, second.number) == (True, None)
    assert [one.event_id for one in await rows(either, WebhookDelivery)] == [first.id]


async def test_a_parked_event_can_be_let_go_by_hand(shared: Rig) -> None:
    site = await site_of(shared, config={"park_unmatched": True})
    parked = await site.post("invoice.paid", {"type": "invoice.paid", "id": "e#1", "account": "acct_#1"})
    assert await shared.parts.database.transaction(lambda session: release(session, [parked])) == 1
    assert await shared.parts.database.transaction(lambda session: release(session, [parked])) == 0
    await site.work()
    event = await site.stored(parked)
    assert (event.connection_id, event.number is not None) == (None, True)


# What ends a grant


async def test_an_app_that_was_disconnected_stops_hand_outs_at_once(either: Rig) -> None:
    site = await site_of(either)
    mine, other = await site.connect("acct_#1"), await site.connect("acct_#2")
    assert (await either.token(mine)).status_code == 200
    at = await either.parts.database.read(now)
    event_id = await site.post("account.application.deauthorized", gone("acct_#1", at))
    await site.work()
    assert await site.status(mine) == ("revoked", "stripe.account.application.deauthorized")
    refused = await either.token(mine)
    assert (refused.status_code, refused.json()["code"]) == (409, "connection_revoked")
    assert (await either.token(other)).status_code == 200
    assert await site.own(mine) == ["created", "revoked"]
    (record,) = await audited(either, "connection.revoked", mine)
    assert (record.actor, record.detail["event_id"]) == ("system", event_id)
    event = await site.stored(event_id)
    assert (event.number is not None, event.connection_id) == (True, mine)


async def test_the_workers_job_does_so_within_a_second(tmp_path: Path) -> None:
    async with open_rig(tmp_path, worker=True) as rig:
        site = await site_of(rig)
        mine = await site.connect("acct_#1")
        await site.post("account.application.deauthorized", gone("acct_#1", await rig.parts.database.read(now)))

        async def is_over() -> bool:
            return (await rig.token(mine)).status_code == 409

        await eventually(is_over, seconds=1.0)


async def test_a_copy_of_the_event_or_another_worker_changes_nothing_more(either: Rig) -> None:
    site = await site_of(either)
    mine = await site.connect("acct_#1")
    at = await either.parts.database.read(now)
    for number in (1, 2):
        await site.post("account.application.deauthorized", {**gone("acct_#1", at), "id": f"evt_#{number}"})
    await asyncio.gather(*(site.work() for _ in range(3)))
    assert await site.own(mine) == ["created", "revoked"]
    assert len(await audited(either, "connection.revoked", mine)) == 1


async def test_what_was_granted_after_the_event_is_untouched(shared: Rig) -> None:
    site = await site_of(shared)
    mine = await site.connect("acct_#1")
    at = await shared.parts.database.read(now) - 60
    await site.post("account.application.deauthorized", gone("acct_#1", at))
    await site.work()
    assert (await site.status(mine))[0] == "active"


async def test_a_connection_that_was_renewed_after_the_event_is_untouched(shared: Rig) -> None:
    site = await site_of(shared)
    mine = await site.connect("acct_#1")
    at = await shared.parts.database.read(now) - 60
    await rewritten(shared, Connection, mine, created_at=at - 3600)
    assert await site.connect("acct_#1") == mine
    await site.post("account.application.deauthorized", gone("acct_#1", at))
    await site.work()
    assert (await site.status(mine))[0] == "active"
    at = await shared.parts.database.read(now)
    await site.post("account.application.deauthorized", {**gone("acct_#1", at), "id": "evt_#2"})
    await site.work()
    assert (await site.status(mine))[0] == "revoked"
    assert await site.connect("acct_#1") == mine
    assert (await shared.token(mine)).status_code == 200


async def test_another_clients_grant_is_untouched(shared: Rig) -> None:
    site = await site_of(shared)
    mine = await site.connect("acct_#1")
    at = await shared.parts.database.read(now)
    await site.post("account.application.deauthorized", gone("acct_#1", at, client="ca_other"))
    await site.work()
    assert (await site.status(mine))[0] == "active"


async def test_a_forged_event_ends_nothing(shared: Rig) -> None:
    site = await site_of(shared)
    mine = await site.connect("acct_#1")
    forged = Site(shared, "stripe", site.source, "whsec_" + "b2" * 16, site.number)
    with pytest.raises(AssertionError, match="401"):
        await forged.post("account.application.deauthorized", gone("acct_#1", await shared.parts.database.read(now)))
    await site.work()
    assert (await site.status(mine))[0] == "active"


async def test_a_frozen_connection_stays_frozen_and_is_lifted_into_its_end(either: Rig) -> None:
    site = await site_of(either)
    mine = await site.connect("acct_#1")
    body = {"action": "freeze", "selector": {"subject": "acme:1"}, "reason": "leak"}
    freeze = (await either.call("POST", "/v1/revocations", body)).json()["id"]
    await either.parts.revocations.advance()
    await site.post("account.application.deauthorized", gone("acct_#1", await either.parts.database.read(now)))
    await site.work()
    assert (await site.status(mine))[0] == "frozen"
    (result,) = await rows(either, RevocationResult)
    assert result.status_before == "revoked"
    await either.call("DELETE", f"/v1/revocations/{freeze}")
    assert await site.status(mine) == ("revoked", "stripe.account.application.deauthorized")


async def test_tokens_of_some_users_end_and_those_of_the_workspace_with_the_app(either: Rig) -> None:
    site = await site_of(either, "slack", "123.456")
    ada, ben, elsewhere = [await site.connect(one) for one in ("T#1/UADA", "T#1/UBEN", "T#2/UADA")]
    at = int(await either.parts.database.read(now))
    wrapped = {"type": "event_callback", "team_id": "T#1", "event_time": at}
    revoked = {"type": "tokens_revoked", "tokens": {"oauth": ["UADA"], "bot": []}}
    await site.post("tokens_revoked", {**wrapped, "event": revoked, "event_id": "Ev#1"})
    await site.work()
    assert [(await site.status(one))[0] for one in (ada, ben, elsewhere)] == ["revoked", "active", "active"]
    await site.post("app_uninstalled", {**wrapped, "event": {"type": "app_uninstalled"}, "event_id": "Ev#2"})
    await site.work()
    assert [(await site.status(one))[0] for one in (ada, ben, elsewhere)] == ["revoked", "revoked", "active"]


async def test_tokens_of_very_many_users_end_at_once(either: Rig) -> None:
    site = await site_of(either, "slack", "123.456")
    ada, cy = [await site.connect(f"T#1/{user}", user) for user in ("U7", "UCY")]
    users = [f"U{number}" for number in range(1000)]
    told = {"type": "event_callback", "team_id": "T#1", "event_time": int(await either.parts.database.read(now))}
    told["event"] = {"type": "tokens_revoked", "tokens": {"oauth": users, "bot": [f"B{one}" for one in users]}}
    event_id = await site.post("tokens_revoked", {**told, "event_id": "Ev#1"})
    await site.work()
    assert [(await site.status(one))[0] for one in (ada, cy)] == ["revoked", "active"]
    assert (await site.stored(event_id)).number is not None


async def test_an_unsigned_type_asks_for_consent_again_and_is_judged_by_its_time(shared: Rig) -> None:
    site = await site_of(shared, "shopify", "key")
    number = 548380000 + site.number
    mine = await site.connect(str(number))
    body = {"id": number, "myshopify_domain": "toys.myshopify.com"}
    at = await shared.parts.database.read(now)
    early = {"x-shopify-triggered-at": rfc3339(at - 3600) or ""}
    await site.post("app/uninstalled", body, headers=early)
    await site.work()
    assert (await site.status(mine))[0] == "active"
    await site.post(
        "app/uninstalled", {**body, "name": "Toys"}, headers={"x-shopify-triggered-at": rfc3339(at + 1) or ""}
    )
    await site.work()
    assert await site.status(mine) == ("reauthorization_required", "shopify.app.uninstalled")


async def test_of_two_clients_none_ends_unless_the_source_says_whose_it_is(shared: Rig) -> None:
    site = await site_of(shared, "slack", "123.456")
    other = {"name": "slack2", "provider": "slack", "client_id": "789.1", "client_secret": "s" * 32, "scopes": []}
    assert (await shared.call("POST", "/v1/integrations", other)).status_code == 201
    mine, theirs = await site.connect("T#1/U1"), await site.connect("T#1/U1", integration="slack2")
    wrapped = {"type": "event_callback", "team_id": "T#1", "event": {"type": "app_uninstalled"}}
    wrapped["event_time"] = int(await shared.parts.database.read(now))  # type: ignore[assignment]
    await site.post("app_uninstalled", {**wrapped, "event_id": "Ev#1"})
    await site.work()
    assert [(await site.status(one))[0] for one in (mine, theirs)] == ["active", "active"]
    told = {"config": {"integration": "slack2"}}
    assert (await shared.call("PATCH", f"/v1/webhook-sources/{site.source['id']}", told)).status_code == 200
    await site.post("app_uninstalled", {**wrapped, "event_id": "Ev#2"})
    await site.work()
    assert [(await site.status(one))[0] for one in (mine, theirs)] == ["active", "revoked"]


async def test_an_app_that_has_no_connection_of_the_account_ends_no_other_apps_grant(either: Rig) -> None:
    site = await site_of(either, "slack", "123.456")
    other = {"name": "slack2", "provider": "slack", "client_id": "789.1", "client_secret": "s" * 32, "scopes": []}
    assert (await either.call("POST", "/v1/integrations", other)).status_code == 201
    theirs = await site.connect("T#1/U1", integration="slack2")
    wrapped = {"type": "event_callback", "team_id": "T#1", "event": {"type": "app_uninstalled"}}
    wrapped["event_time"] = int(await either.parts.database.read(now))  # type: ignore[assignment]
    await site.post("app_uninstalled", {**wrapped, "event_id": "Ev#1"})
    await site.work()
    assert (await site.status(theirs))[0] == "active"
    told = {"config": {"integration": "slack"}}
    assert (await either.call("PATCH", f"/v1/webhook-sources/{site.source['id']}", told)).status_code == 200
    await site.post("app_uninstalled", {**wrapped, "event_id": "Ev#2"})
    await site.work()
    assert (await site.status(theirs))[0] == "active"


async def test_the_events_of_a_source_with_an_integration_are_of_its_connections_alone(either: Rig) -> None:
    site = await site_of(either, config={"integration": "stripe", "park_unmatched": True})
    other = {"name": "second", "provider": "stripe", "client_id": "ca_2", "client_secret": "s" * 32, "scopes": []}
    assert (await either.call("POST", "/v1/integrations", other)).status_code == 201
    theirs = await site.connect("acct_#1", integration="second")
    paid = {"type": "invoice.paid", "account": "acct_#1"}
    parked = await site.post("invoice.paid", {**paid, "id": "e#1"})
    await site.work()
    assert ((await site.stored(parked)).parked, (await site.stored(parked)).connection_id) == (True, None)
    mine = await site.connect("acct_#1")
    await site.work()
    assert (await site.stored(parked)).connection_id == mine
    at_once = await site.post("invoice.paid", {**paid, "id": "e#2"})
    assert (await site.stored(at_once)).connection_id == mine
    told = {"config": {"integration": "second"}}
    assert (await either.call("PATCH", f"/v1/webhook-sources/{site.source['id']}", told)).status_code == 200
    assert (await site.stored(await site.post("invoice.paid", {**paid, "id": "e#3"}))).connection_id == theirs


async def test_sealed_bodies_are_read_and_end_grants_too(shared: Rig) -> None:
    site = await site_of(shared, config={"seal": True})
    mine = await site.connect("acct_#1")
    event_id = await site.post(
        "account.application.deauthorized", gone("acct_#1", await shared.parts.database.read(now))
    )
    assert (await site.stored(event_id)).body is None
    await site.work()
    assert (await site.status(mine))[0] == "revoked"


async def test_a_body_that_does_not_open_holds_up_nothing(shared: Rig) -> None:
    site = await site_of(shared, config={"seal": True})
    mine = await site.connect("acct_#1")
    at = await shared.parts.database.read(now)
    damaged = await site.post("account.application.deauthorized", gone("acct_#1", at))
    await rewritten(shared, WebhookEvent, damaged, sealed_body=b"damaged")
    await site.connect("acct_#2")
    await site.work()
    assert not [one.id for one in await rows(shared, WebhookEvent) if one.number is None and not one.parked]
    assert (await site.status(mine))[0] == "active"
