"""Device flows (RFC 8628) through HTTP: what the backend sees, how often the provider is polled, and how they end."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import col

from broker.app import new_worker
from broker.database import now
from broker.models import DeviceFlow, Flow, WebhookEvent
from broker.oauth.device import AT_ONCE_FOR_ONE, Pace, after_refusal
from broker.token_endpoint import TokenRefusal
from tests.fakes import Reply, Seen, listening
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.shared import rows
from tests.flows.time_passes import audited

GRANT = "urn:ietf:params:oauth:grant-type:device_code"
CODES = {  # RFC 8628 3.2
    "device_code": "GmRhmhcxhwAzkoEqiMEg_DnyEysNkuNhszIySk9eS",
    "user_code": "WDJB-MJHT",
    "verification_uri": "https://example.com/device",
    "verification_uri_complete": "https://example.com/device?user_code=WDJB-MJHT",
    "expires_in": 1800,
    "interval": 5,
}
TOKENS = {"access_token": "device-token-1", "refresh_token": "device-refresh-1", "expires_in": 3600}
PENDING, SLOW = (400, {"error": "authorization_pending"}), (400, {"error": "slow_down"})


@dataclass
class Provider:
    """A provider with a device endpoint whose polls are answered by a script; it remembers who came."""

    script: list[Reply] = field(default_factory=list)
    codes: Reply = (200, CODES)
    account: str = "user-1"
    base: str = ""
    polls: list[Seen] = field(default_factory=list)
    asked: list[Seen] = field(default_factory=list)

    def answer(self, seen: Seen) -> Reply:
        if seen.path == "/device":
            self.asked.append(seen)
            return self.codes
        if seen.path == "/token":
            self.polls.append(seen)
            return self.script.pop(0) if self.script else PENDING
        return (200, {"sub": self.account, "name": "Ada"})


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    made = Provider()
    async with listening(made.answer) as fake:
        made.base = fake.base
        yield made


@pytest.fixture
async def rig(tmp_path: Path, provider: Provider) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as made:
        base = provider.base
        urls = {name: f"{base}/{name.removesuffix('_url')}" for name in ("authorize_url", "token_url", "jwks_url")}
        config = {**urls, "device_url": f"{base}/device", "userinfo_url": f"{base}/userinfo"}
        body = {
            "name": "tv",
            "provider": "oidc",
            "client_id": "tv",
            "client_secret": "tv-secret",
            "scopes": ["read", "write"],
        }
        made_ = await made.call("POST", "/v1/integrations", {**body, "config": config})
        assert made_.status_code == 201, made_.text
        yield made


async def start(rig: Rig, **fields: Any) -> dict[str, Any]:
    answer = await rig.call("POST", "/v1/device-flows", {"integration": "tv", "subject": "acme:42", **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def poll(rig: Rig, device_id: str) -> dict[str, Any]:
    """Let the time of the next poll come, poll once, and return what the backend sees."""
    due = sa.update(DeviceFlow).where(col(DeviceFlow.id) == device_id).values(poll_at=0.0)
    await rig.parts.database.transaction(lambda session: session.execute(due))
    await rig.parts.device_flows.poll_due()
    return dict((await rig.call("GET", f"/v1/device-flows/{device_id}")).json())


async def row_of(rig: Rig, device_id: str) -> DeviceFlow:
    row = await rig.parts.database.read(lambda session: session.get(DeviceFlow, device_id))
    assert row is not None
    return row


async def test_a_code_that_the_user_typed_in_becomes_an_active_connection(rig: Rig, provider: Provider) -> None:
    made = await start(rig, scopes=["read"])
    assert re.fullmatch(r"dev_[a-z0-9]{26}", made["id"])
    assert made["user_code"] == "WDJB-MJHT"
    assert (made["verification_uri"], made["interval"], made["status"]) == ("https://example.com/device", 5, "pending")
    assert made["verification_uri_complete"].endswith("user_code=WDJB-MJHT")
    assert "device_code" not in made
    assert provider.asked[0].form == {"client_id": "tv", "scope": "read"}
    provider.script = [PENDING, (200, TOKENS)]
    assert (await poll(rig, made["id"]))["status"] == "pending"
    seen = await poll(rig, made["id"])
    assert seen["status"] == "connected"
    assert provider.polls[0].form == {"client_id": "tv", "grant_type": GRANT, "device_code": CODES["device_code"]}
    assert provider.polls[0].headers["authorization"].startswith("Basic ")
    connection = (await rig.call("GET", f"/v1/connections/{seen['connection_id']}")).json()
    assert (connection["status"], connection["subject"], connection["account"]["id"]) == ("active", "acme:42", "user-1")
    assert connection["scopes"] == ["read"]
    assert (await rig.token(connection["id"])).json()["access_token"] == "device-token-1"
    assert len(await audited(rig.parts.database, "device.connected")) == 1
    assert [event.type for event in await rows(rig, WebhookEvent)] == ["broker.connection.created"]


async def test_the_same_account_again_updates_its_connection(rig: Rig, provider: Provider) -> None:
    ids = []
    for number in (1, 2):
        made = await start(rig)
        provider.script = [(200, {**TOKENS, "access_token": f"token-{number}"})]
        ids.append((await poll(rig, made["id"]))["connection_id"])
    assert ids[0] == ids[1]
    assert (await rig.token(ids[0])).json()["access_token"] == "token-2"


async def test_an_account_with_another_kind_of_credential_ends_the_flow_at_once_and_keeps_that(
    rig: Rig, provider: Provider
) -> None:
    credentials = {"type": "client_credentials"}
    body = {"integration": "tv", "subject": "acme:42", "credentials": credentials, "account": {"id": "user-1"}}
    imported = await rig.call("POST", "/v1/connections", body)
    assert imported.status_code == 201, imported.text
    made = await start(rig)
    provider.script = [(200, TOKENS)]
    seen = await poll(rig, made["id"])
    assert (seen["status"], seen["status_reason"]) == ("failed", "other_credential_type")
    assert (await poll(rig, made["id"]))["status"] == "failed"
    assert len(provider.polls) == 1
    provider.script = [(200, {"access_token": "minted", "expires_in": 600})]
    assert (await rig.token(imported.json()["id"])).json()["access_token"] == "minted"


@pytest.mark.parametrize(
    ("reply", "status", "reason"),
    [
        ((400, {"error": "access_denied"}), "denied", "access_denied"),
        ((400, {"error": "expired_token"}), "expired", "expired_token"),
        ((400, {"error": "invalid_grant"}), "failed", "invalid_grant"),
        ((401, {"error": "invalid_client"}), "failed", "invalid_client"),
        ((200, {"access_token": 7}), "failed", "invalid_answer"),
    ],
)
async def test_a_refusal_ends_the_flow_and_nothing_is_stored(
    rig: Rig, provider: Provider, reply: Reply, status: str, reason: str
) -> None:
    made = await start(rig)
    provider.script = [reply]
    seen = await poll(rig, made["id"])
    assert (seen["status"], seen["status_reason"], seen["connection_id"]) == (status, reason, None)
    assert (await row_of(rig, made["id"])).sealed_device_code is None
    await poll(rig, made["id"])
    assert len(provider.polls) == 1  # never again
    assert (await rig.call("GET", "/v1/connections?integration=tv")).json()["data"] == []


async def test_slow_down_makes_every_later_poll_five_seconds_slower(rig: Rig, provider: Provider) -> None:
    made = await start(rig)
    provider.script = [SLOW, PENDING, SLOW]
    for interval in (10.0, 10.0, 15.0):
        await poll(rig, made["id"])
        row, at = await row_of(rig, made["id"]), await rig.parts.database.read(now)
        assert row.interval_seconds == interval
        assert interval - 2 < row.poll_at - at <= interval


async def test_a_provider_in_trouble_is_polled_ever_more_seldom_and_the_flow_lives(
    rig: Rig, provider: Provider
) -> None:
    made = await start(rig)
    provider.script = [(503, {}), (429, {}), (500, b"<html>"), PENDING, (200, TOKENS)]
    pauses = []
    for _ in range(4):
        assert (await poll(rig, made["id"]))["status"] == "pending"
        pauses.append((await row_of(rig, made["id"])).poll_at - await rig.parts.database.read(now))
    assert [round(pause / 5) for pause in pauses] == [2, 4, 8, 1]
    assert (await poll(rig, made["id"]))["status"] == "connected"


async def test_a_flow_whose_time_is_over_ends_without_a_poll(rig: Rig, provider: Provider) -> None:
    made = await start(rig)
    over = sa.update(DeviceFlow).where(col(DeviceFlow.id) == made["id"]).values(expires_at=1.0)
    await rig.parts.database.transaction(lambda session: session.execute(over))
    assert (await poll(rig, made["id"]))["status"] == "expired"
    assert provider.polls == []


async def test_a_flow_whose_plan_is_gone_ends_as_expired_and_both_are_counted(rig: Rig, provider: Provider) -> None:
    lost, late = await start(rig), await start(rig)
    gone = sa.delete(Flow).where(col(Flow.id) == (await row_of(rig, lost["id"])).flow_id)
    over = sa.update(DeviceFlow).where(col(DeviceFlow.id) == late["id"]).values(expires_at=1.0)
    for change in (gone, over):
        await rig.parts.database.transaction(lambda session, change=change: session.execute(change))  # type: ignore[misc]
    assert [(await poll(rig, one["id"]))["status"] for one in (lost, late)] == ["expired", "expired"]
    assert provider.polls == []
    counted = rig.parts.metrics.registry.get_sample_value
    assert counted("broker_flows_total", {"provider": "oidc", "outcome": "expired"}) == 1.0


@pytest.mark.parametrize("again", [False, True])
async def test_a_crash_before_the_end_is_recorded_still_ends_as_connected(
    rig: Rig,
    provider: Provider,
    again: bool,  # noqa: FBT001
) -> None:
    if again:
        provider.script = [(200, TOKENS)]
        await poll(rig, (await start(rig))["id"])
    made = await start(rig)
    provider.script = [(200, {**TOKENS, "access_token": "newest"})]
    ended = await poll(rig, made["id"])
    undone = sa.update(DeviceFlow).where(col(DeviceFlow.id) == made["id"]).values(status="pending")
    await rig.parts.database.transaction(lambda session: session.execute(undone))
    assert await poll(rig, made["id"]) == ended
    assert ended["status"] == "connected"
    assert (await rig.token(ended["connection_id"])).json()["access_token"] == "newest"


async def test_an_activation_that_another_worker_has_begun_is_awaited(rig: Rig, provider: Provider) -> None:
    made = await start(rig)
    provider.script = [(200, TOKENS)]
    flow_id = (await row_of(rig, made["id"])).flow_id
    claimed_at = await rig.parts.database.read(now)
    for at, status in ((claimed_at, "pending"), (claimed_at - 61, "connected")):
        claim = sa.update(Flow).where(col(Flow.id) == flow_id).values(confirm_claimed_at=at)
        await rig.parts.database.transaction(lambda session, claim=claim: session.execute(claim))  # type: ignore[misc]
        assert (await poll(rig, made["id"]))["status"] == status


async def test_a_burnt_flow_ends_as_failed(rig: Rig, provider: Provider) -> None:
    made = await start(rig)
    provider.script = [(200, TOKENS)]
    burnt = sa.update(Flow).where(col(Flow.id) == (await row_of(rig, made["id"])).flow_id).values(burnt_at=1.0)
    await rig.parts.database.transaction(lambda session: session.execute(burnt))
    assert (await poll(rig, made["id"]))["status"] == "failed"


async def test_a_provider_that_hangs_keeps_no_other_waiting(rig: Rig, provider: Provider) -> None:
    async with hanging() as (base, came):
        config = {"authorize_url": f"{base}/a", "jwks_url": f"{base}/j", "userinfo_url": f"{base}/u"}
        urls = {"device_url": f"{provider.base}/device", "token_url": f"{base}/token", "timeout_seconds": 1}
        body = {
            "name": "slow",
            "provider": "oidc",
            "client_id": "c",
            "client_secret": "s",
            "config": {**config, **urls},
        }
        assert (await rig.call("POST", "/v1/integrations", body)).status_code == 201
        slow = [await start(rig, integration="slow", scopes=None) for _ in range(AT_ONCE_FOR_ONE + 3)]
        fine = await start(rig)
        due = sa.update(DeviceFlow).values(poll_at=0.0)
        await rig.parts.database.transaction(lambda session: session.execute(due))
        flows = rig.parts.device_flows
        await flows.begin_polls()
        await flows.begin_polls()

        async def all_have_come() -> bool:
            return len(provider.polls) == 1 and len(came) == AT_ONCE_FOR_ONE

        await eventually(all_have_come)
        claimed = [await row_of(rig, one["id"]) for one in slow]
        at = await rig.parts.database.read(now)
        assert sum(row.poll_at > at + 60 for row in claimed) == len(came) == AT_ONCE_FOR_ONE
        assert (await row_of(rig, fine["id"])).failures == 0
        await flows.finish()
        assert {(await row_of(rig, one["id"])).status for one in slow} == {"pending"}


@asynccontextmanager
async def hanging() -> AsyncIterator[tuple[str, list[int]]]:
    """Serve a provider that takes every request and answers none."""
    came: list[int] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(1)
        await reader.read()  # until the broker gives up
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", came


async def test_before_its_time_nobody_polls_and_of_many_workers_one_does(rig: Rig, provider: Provider) -> None:
    made = await start(rig)
    assert await rig.parts.device_flows.poll_due() == 0
    due = sa.update(DeviceFlow).where(col(DeviceFlow.id) == made["id"]).values(poll_at=0.0)
    await rig.parts.database.transaction(lambda session: session.execute(due))
    assert sum(await asyncio.gather(*(rig.parts.device_flows.poll_due() for _ in range(8)))) == 1
    assert len(provider.polls) == 1


async def test_the_worker_polls_by_itself(tmp_path: Path, provider: Provider, rig: Rig) -> None:
    assert any(job.__name__ == "begin_polls" for _, job in _jobs(rig))


def _jobs(rig: Rig) -> Iterator[Any]:
    yield from new_worker(rig.parts).jobs


async def test_a_caller_who_lost_its_right_meanwhile_gets_no_connection(rig: Rig, provider: Provider) -> None:
    grant = {"integrations": ["tv"], "may": ["connect", "read", "token"], "subjects": ["acme:*"]}
    key = await rig.caller(grant)
    made = (await rig.call("POST", "/v1/device-flows", {"integration": "tv", "subject": "acme:42"}, key=key)).json()
    caller = next(one for one in (await rig.call("GET", "/v1/callers")).json()["data"] if one["name"] == "app")
    await rig.call("DELETE", f"/v1/callers/{caller['id']}")
    provider.script = [(200, TOKENS)]
    seen = await poll(rig, made["id"])
    assert (seen["status"], seen["status_reason"]) == ("failed", "access_denied")
    active = (await rig.call("GET", "/v1/connections?integration=tv&status=active")).json()["data"]
    assert active == []


async def test_grants_decide_who_starts_and_who_sees_a_device_flow(rig: Rig) -> None:
    made = await start(rig)
    other = await rig.caller({"integrations": ["tv"], "may": ["connect"], "subjects": ["other:*"]})
    reader = await rig.caller({"integrations": ["tv"], "may": ["read"], "subjects": ["acme:*"]})
    body = {"integration": "tv", "subject": "acme:42"}
    assert (await rig.call("POST", "/v1/device-flows", body, key=other)).status_code == 404
    assert (await rig.call("POST", "/v1/device-flows", body, key=reader)).status_code == 403
    assert (await rig.call("GET", f"/v1/device-flows/{made['id']}", key=other)).status_code == 404
    assert (await rig.call("GET", f"/v1/device-flows/{made['id']}", key=reader)).status_code == 403
    assert (await rig.call("GET", "/v1/device-flows/dev_unknown")).status_code == 404


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"scopes": ["admin"]}, "/scopes"),
        ({"integration": "sandbox"}, "/integration"),
        ({"variables": {"x": "y"}}, "/variables"),
        ({"extra": 1}, "/extra"),
    ],
)
async def test_what_cannot_be_started_is_refused_by_field(rig: Rig, fields: dict[str, Any], pointer: str) -> None:
    body = {"integration": "tv", "subject": "acme:42", **fields}
    answer = await rig.call("POST", "/v1/device-flows", body)
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    ("codes", "status", "code"),
    [
        ((503, {}), 502, "provider_unavailable"),
        ((400, {"error": "unauthorized_client"}), 502, "upstream_invalid"),
        ((200, {"error": "device_flow_disabled"}), 502, "upstream_invalid"),
        ((200, {**CODES, "verification_uri": "javascript:alert(1)"}), 502, "upstream_invalid"),
        ((200, {**CODES, "verification_uri_complete": "https://a@b.test/"}), 502, "upstream_invalid"),
        ((200, {**CODES, "user_code": "a\nb"}), 502, "upstream_invalid"),
        ((200, {**CODES, "device_code": 7}), 502, "upstream_invalid"),
        ((200, {**CODES, "expires_in": 0}), 502, "upstream_invalid"),
        ((200, {"access_token": "t"}), 502, "upstream_invalid"),
        ((200, b"[]"), 502, "upstream_invalid"),
    ],
)
async def test_an_answer_that_is_no_device_code_starts_nothing(
    rig: Rig, provider: Provider, codes: Reply, status: int, code: str
) -> None:
    provider.codes = codes
    answer = await rig.call("POST", "/v1/device-flows", {"integration": "tv", "subject": "acme:42"})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (
        await rig.parts.database.read(
            lambda session: session.execute(sa.select(sa.func.count(col(DeviceFlow.id)))).scalar()
        )
        == 0
    )


async def test_no_browser_can_finish_a_device_flows_row(rig: Rig) -> None:
    made = await start(rig)
    row = await row_of(rig, made["id"])
    flow = await rig.parts.database.read(lambda session: session.get(Flow, row.flow_id))
    assert flow is not None
    assert flow.consumed_at is not None
    answer = await rig.browser().get("/oauth/tv/callback?code=x&state=")
    assert answer.status_code == 400


async def test_the_device_code_is_sealed(rig: Rig) -> None:
    made = await start(rig)
    row = await row_of(rig, made["id"])
    assert row.sealed_device_code is not None
    assert CODES["device_code"].encode() not in row.sealed_device_code  # type: ignore[attr-defined]


def test_the_pace_never_exceeds_a_minute_unless_the_provider_wants_more() -> None:
    transient = TokenRefusal("transient", "temporarily_unavailable")
    pace = after_refusal(transient, interval_seconds=5, failures=30)
    assert isinstance(pace, Pace)
    assert pace.pause_seconds == 60.0
    assert Pace(90.0, 3).pause_seconds == 90.0
