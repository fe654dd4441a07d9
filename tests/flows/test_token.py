"""The hand-out through HTTP: what is served, what is renewed first, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy as sa

from broker.demo.sandbox.options import Fault
from broker.models import Connection
from tests.flows.rig import Rig
from tests.flows.time_passes import audited, ends_in, row_of, set_row, wait_is_over


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


async def imported(rig: Rig, **credentials: object) -> str:
    """Return a connection whose credential existed already."""
    body = {"integration": "sandbox", "subject": "acme:9", "credentials": {"type": "oauth2", **credentials}}
    made = await rig.call("POST", "/v1/connections", body)
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def test_a_valid_token_is_served_again_without_asking_the_provider(rig: Rig) -> None:
    connection = await rig.connected()
    first, second = [(await rig.token(connection["id"])).json() for _ in range(2)]
    assert first == second
    assert first["expires_at"] is not None
    assert rig.sandbox.state.counters.refreshes == 0


@pytest.mark.parametrize(("left_seconds", "renewed"), [(90, True), (150, False)])
async def test_a_token_near_its_end_is_renewed_early(rig: Rig, left_seconds: float, renewed: bool) -> None:  # noqa: FBT001
    connection = await rig.connected()
    await ends_in(rig.parts.database, connection["id"], left_seconds)
    answer = (await rig.token(connection["id"], min_ttl=0)).json()
    assert rig.sandbox.state.counters.refreshes == int(renewed)
    assert (await rig.whoami(answer["access_token"])).status_code == 200


async def test_a_longer_min_ttl_renews_and_one_that_no_token_can_have_does_not_renew_every_time(rig: Rig) -> None:
    connection = await rig.connected()
    await ends_in(rig.parts.database, connection["id"], 1000)
    assert (await rig.token(connection["id"], min_ttl=1200)).status_code == 200
    assert rig.sandbox.state.counters.refreshes == 1
    for _ in range(3):
        assert (await rig.token(connection["id"], min_ttl=7200)).status_code == 200, "what there is is handed out"
    assert rig.sandbox.state.counters.refreshes == 1


async def test_a_refused_token_is_renewed_only_while_it_is_still_the_current_one(rig: Rig) -> None:
    connection = await rig.connected()
    old = (await rig.token(connection["id"])).json()["access_token"]
    new = (await rig.token(connection["id"], not_token_sha256=sha256(old).upper())).json()["access_token"]
    again = (await rig.token(connection["id"], not_token_sha256=sha256(old))).json()["access_token"]
    assert old != new == again
    assert rig.sandbox.state.counters.refreshes == 1


async def test_naming_each_new_token_as_refused_does_not_refresh_all_the_time(rig: Rig) -> None:
    connection = await rig.connected()
    old = (await rig.token(connection["id"])).json()["access_token"]
    new = (await rig.token(connection["id"], not_token_sha256=sha256(old))).json()["access_token"]
    paced = await rig.token(connection["id"], not_token_sha256=sha256(new))
    assert (paced.status_code, paced.json()["code"]) == (429, "rate_limited")
    assert 1 <= int(paced.headers["retry-after"]) <= 6
    assert (await rig.token(connection["id"], not_token_sha256=sha256(old))).json()["access_token"] == new
    at = (await row_of(rig.parts.database, connection["id"])).refreshed_at or 0
    await set_row(rig.parts.database, connection["id"], refreshed_at=at - 6)
    assert (await rig.token(connection["id"], not_token_sha256=sha256(new))).status_code == 200
    assert rig.sandbox.state.counters.refreshes == 2


async def test_an_odd_optional_member_of_an_answer_does_not_cost_the_grant(rig: Rig) -> None:
    connection = await rig.connected()
    minted = rig.sandbox.state.mint("ada", "openid")
    body = {**minted, "expires_in": "3600.0", "refresh_token_expires_in": -1, "scope": 7}
    rig.sandbox.state.add_fault(Fault(kind="answer", status=200, body=body, grant_type="refresh_token"))
    answer = await rig.token(connection["id"], force_refresh=True)
    assert (answer.status_code, answer.json()["access_token"]) == (200, minted["access_token"])
    assert (answer.json()["expires_at"], answer.json()["scopes"]) == (None, connection["scopes"])


async def test_force_refresh_works_once_in_thirty_seconds(rig: Rig) -> None:
    connection = await rig.connected()
    assert (await rig.token(connection["id"], force_refresh=True)).status_code == 200
    refused = await rig.token(connection["id"], force_refresh=True)
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 31
    at = (await row_of(rig.parts.database, connection["id"])).refreshed_at or 0
    await set_row(rig.parts.database, connection["id"], refreshed_at=at - 31)
    assert (await rig.token(connection["id"], force_refresh=True)).status_code == 200
    assert rig.sandbox.state.counters.refreshes == 2


async def test_a_token_without_a_refresh_token_is_served_until_its_end(rig: Rig) -> None:
    minted = rig.sandbox.state.mint("grace", "openid")
    connection_id = await imported(rig, access_token=minted["access_token"])
    served = (await rig.token(connection_id)).json()
    assert (served["access_token"], served["expires_at"]) == (minted["access_token"], None)
    forced = await rig.token(connection_id, force_refresh=True)
    assert (forced.status_code, forced.json()["code"]) == (409, "not_refreshable")
    await ends_in(rig.parts.database, connection_id, 30)
    assert (await rig.token(connection_id, min_ttl=600)).status_code == 200, "there is no better one"
    await ends_in(rig.parts.database, connection_id, -1)
    over = await rig.token(connection_id)
    assert (over.status_code, over.json()["code"]) == (409, "reauthorization_required")


async def test_an_imported_refresh_token_is_used_when_the_access_token_is_over(rig: Rig) -> None:
    minted = rig.sandbox.state.mint("grace", "openid")
    connection_id = await imported(
        rig,
        access_token=minted["access_token"],
        refresh_token=minted["refresh_token"],
        expires_at="2020-01-01T00:00:00Z",
    )
    answer = (await rig.token(connection_id)).json()
    assert answer["access_token"] != minted["access_token"]
    assert (await rig.whoami(answer["access_token"])).status_code == 200


async def test_an_api_key_is_handed_out_without_an_end(rig: Rig) -> None:
    made = await rig.call("POST", "/v1/integrations", {"name": "github", "provider": "github", "client_id": "x"})
    assert made.status_code == 201, made.text
    body = {"integration": "github", "subject": "a", "credentials": {"type": "api_key", "api_key": "k" * 30}}
    connection_id = (await rig.call("POST", "/v1/connections", body)).json()["id"]
    answer = (await rig.token(connection_id, min_ttl=86_400)).json()
    assert (answer["access_token"], answer["expires_at"], answer["stale"]) == ("k" * 30, None, False)
    assert (await rig.token(connection_id, force_refresh=True)).json()["code"] == "not_refreshable"


async def test_a_dead_grant_asks_for_consent_again_and_says_why(rig: Rig) -> None:
    connection = await rig.connected()
    rig.sandbox.state.kill_account("ada")
    for _ in range(3):
        answer = await rig.token(connection["id"], not_token_sha256="0" * 64, min_ttl=3601)
        if answer.status_code != 200:
            break
        await ends_in(rig.parts.database, connection["id"], -1)
    assert (answer.status_code, answer.json()["code"]) == (409, "reauthorization_required")
    seen = len(rig.sandbox.state.token_requests("ada"))
    answer = await rig.token(connection["id"])
    assert answer.json()["status_reason"] == "invalid_grant"
    assert len(rig.sandbox.state.token_requests("ada")) == seen, "the provider is not asked again"
    shown = (await rig.call("GET", f"/v1/connections/{connection['id']}")).json()
    assert (shown["status"], shown["status_reason"]) == ("reauthorization_required", "invalid_grant")
    assert await audited(rig.parts.database, "connection.reauthorization_required") == [{"reason": "invalid_grant"}]


async def test_while_the_provider_is_down_a_live_token_is_served_as_stale_and_a_dead_one_is_a_named_error(
    rig: Rig,
) -> None:
    connection = await rig.connected()
    before = (await rig.token(connection["id"])).json()
    rig.sandbox.state.add_fault("fail", times=None)
    await ends_in(rig.parts.database, connection["id"], 50)
    for _ in range(2):  # the second one does not even ask
        answer = (await rig.token(connection["id"])).json()
        assert (answer["access_token"], answer["stale"]) == (before["access_token"], True)
    refused = await rig.token(connection["id"], not_token_sha256=sha256(before["access_token"]))
    assert (refused.status_code, refused.json()["code"]) == (502, "provider_unavailable")
    await ends_in(rig.parts.database, connection["id"], -1)
    await wait_is_over(rig.parts.database, connection["id"])
    for _ in range(2):
        dead = await rig.token(connection["id"])
        assert (dead.status_code, dead.json()["code"]) == (502, "provider_unavailable")
        assert int(dead.headers["retry-after"]) >= 1
    rig.sandbox.state.clear_faults()
    await wait_is_over(rig.parts.database, connection["id"])
    healed = (await rig.token(connection["id"])).json()
    assert (healed["stale"], healed["access_token"] == before["access_token"]) == (False, False)


@pytest.mark.parametrize(
    ("status", "code"),
    [("frozen", "connection_frozen"), ("revoked", "connection_revoked"), ("error", "conflict")],
)
async def test_a_connection_that_may_not_be_used_yields_no_token(rig: Rig, status: str, code: str) -> None:
    connection = await rig.connected()
    await set_row(rig.parts.database, connection["id"], status=status)
    answer = await rig.token(connection["id"])
    assert (answer.status_code, answer.json()["code"]) == (409, code)


async def slow_refresh(rig: Rig, user: str, key: str, meanwhile: Callable[[], Awaitable[Any]]) -> Any:
    """Return the answer to an ask whose refresh takes over a second, while something else happens."""
    connection = await rig.connected(f"acme:{user}", user)
    rig.sandbox.state.configure(latency_seconds=1.2)
    body = {"force_refresh": True}
    asked = asyncio.create_task(rig.call("POST", f"/v1/connections/{connection['id']}/token", body, key=key))
    await asyncio.sleep(0.3)
    await meanwhile()
    rig.sandbox.state.configure(latency_seconds=0)
    return await asked


async def test_who_lost_the_right_while_a_refresh_ran_gets_no_token(rig: Rig) -> None:
    grants = [{"integrations": ["sandbox"], "may": ["token"]}]
    body = {"name": "app", "roles": ["service"], "grants": grants}
    made = (await rig.call("POST", "/v1/callers", body)).json()
    path = f"/v1/callers/{made['id']}"
    lesser = {"grants": [{"integrations": ["sandbox"], "may": ["read"]}]}
    assert (await slow_refresh(rig, "ada", made["key"], lambda: asyncio.sleep(0))).status_code == 200
    answer = await slow_refresh(rig, "bob", made["key"], lambda: rig.call("PATCH", path, lesser))
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    await rig.call("PATCH", path, {"grants": grants})
    answer = await slow_refresh(rig, "cyd", made["key"], lambda: rig.call("DELETE", path))
    assert answer.status_code == 401
    records = (await rig.call("GET", "/v1/audit?action=connection.token")).json()["data"]
    assert [record["outcome"] for record in records] == ["denied", "ok"]


async def test_a_connection_that_was_frozen_while_a_refresh_ran_gives_no_token(rig: Rig) -> None:
    async def freeze() -> None:
        frozen = sa.update(Connection).values(status="frozen")
        await rig.parts.database.transaction(lambda session: session.execute(frozen))

    answer = await slow_refresh(rig, "ada", rig.admin_key, freeze)
    assert (answer.status_code, answer.json()["code"]) == (409, "connection_frozen")
