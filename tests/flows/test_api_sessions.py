"""Sessions and reconnects: what a backend may ask for, and that everything is checked before a user sees it."""

from __future__ import annotations

import dataclasses
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from broker.models import BrowserSession
from providers.spec import Variable
from tests.broker.test_return_to import THREATS
from tests.flows.api_calls import check_problem, imported, unused
from tests.flows.rig import APP, Rig, landed, open_rig
from tests.flows.shared import browser_of, flow, person, rows

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def minted(rig: Rig, **fields: Any) -> Any:
    return await rig.call("POST", "/v1/sessions", {"subject": "acme:1", **fields})


async def test_a_session_answers_with_a_token_and_the_links_that_carry_it(shared: Rig) -> None:
    answer = await minted(shared, integrations=["sandbox"], return_to=APP, tags={"a": "b"}, expires_in=90)
    assert answer.status_code == 201
    made = answer.json()
    assert made.keys() == {"id", "token", "start_urls", "connect_url", "expires_at"}
    assert made["id"].startswith("ses_")
    assert made["start_urls"] == {"sandbox": f"{shared.base}/oauth/sandbox/start?session={made['token']}"}
    assert made["connect_url"] == f"{shared.base}/connect?session={made['token']}"
    assert 80 < datetime.fromisoformat(made["expires_at"]).timestamp() - time.time() <= 90


async def test_no_row_and_no_audit_record_holds_the_token(shared: Rig) -> None:
    token = (await minted(shared)).json()["token"]
    assert token not in repr(await rows(shared, BrowserSession))
    assert token not in (await shared.call("GET", "/v1/audit?action=session.created")).text


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"expires_in": 59}, "/expires_in"),
        ({"expires_in": 86_401}, "/expires_in"),
        ({"integrations": []}, "/integrations"),
        ({"scopes": []}, "/scopes"),
        ({"scopes": ["openid", "admin:everything"]}, "/scopes"),
        ({"variables": {"shop": "x"}}, "/variables/shop"),
        ({"tags": {"a:b": "c"}}, "/tags"),
        ({"tags": {"": "c"}}, "/tags"),
        ({"tags": {f"n{n}": "" for n in range(65)}}, "/tags"),
        ({"subject": "a" * 513}, "/subject"),
        ({"return_to": "https://evil.test/"}, "/return_to"),
    ],
)
async def test_what_is_asked_for_is_checked_now(shared: Rig, fields: dict[str, Any], pointer: str) -> None:
    check_problem(await minted(shared, **fields), 400, "invalid_request", pointer)


@pytest.mark.parametrize("expires_in", [60, 86_400])
async def test_the_bounds_of_a_sessions_life_are_allowed(shared: Rig, expires_in: int) -> None:
    assert (await minted(shared, expires_in=expires_in)).status_code == 201


@pytest.mark.parametrize("return_to", THREATS)
async def test_a_return_to_that_is_not_on_the_list_is_refused_here_and_at_a_reconnect(
    shared: Rig, return_to: str
) -> None:
    check_problem(await minted(shared, return_to=return_to), 400, "invalid_request", "/return_to")
    connection = await imported(shared, unused("acme:"))
    answer = await shared.call("POST", f"/v1/connections/{connection['id']}/reconnect", {"return_to": return_to})
    check_problem(answer, 400, "invalid_request", "/return_to")
    assert return_to not in answer.text


async def test_an_integration_that_cannot_be_connected_is_refused_by_name_and_left_out_otherwise(shared: Rig) -> None:
    off = unused("off-")
    await shared.integration(off, enabled=False)
    check_problem(await minted(shared, integrations=["sandbox", off]), 400, "invalid_request", "/integrations/1")
    check_problem(await minted(shared, integrations=["absent"]), 404, "not_found")
    assert off not in (await minted(shared)).json()["start_urls"]


async def test_a_session_without_integrations_is_for_those_of_this_moment(shared: Rig) -> None:
    made = (await minted(shared)).json()
    await shared.integration(unused("later-"))
    row = next(one for one in await rows(shared, BrowserSession) if one.id == made["id"])
    assert row.integrations is not None
    assert set(row.integrations) == set(made["start_urls"])


async def test_narrower_scopes_are_what_the_provider_is_asked_for(shared: Rig) -> None:
    made = (await minted(shared, scopes=["openid"], return_to=APP)).json()
    url = await shared.begin(browser_of(shared), session=made["token"])
    assert "scope=openid&" in f"{url}&"


async def test_variables_must_be_declared_given_and_fit_their_pattern(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        known = rig.parts.integrations.catalog["oidc"]
        shop = Variable("shop", r"[a-z0-9-]+\.shop\.test", "demo.shop.test")
        changed = dataclasses.replace(known, variables=(shop,), hosts={"": "https://{shop}"})
        rig.parts.integrations.catalog = {**rig.parts.integrations.catalog, "oidc": changed}
        named = await minted(rig, integrations=["sandbox"])
        check_problem(named, 400, "invalid_request", "/variables/shop")
        for value in ("evil.test", "a.shop.test@evil.test", "a.shop.test\n", "x/a.shop.test", "evil.test#.shop.test"):
            answer = await minted(rig, variables={"shop": value})
            check_problem(answer, 400, "invalid_request")
            assert "evil" not in answer.text
        check_problem(
            await minted(rig, variables={"shop": "a.shop.test", "x": "y"}), 400, "invalid_request", "/variables/x"
        )
        assert (await minted(rig, variables={"shop": "a.shop.test"})).status_code == 201


# Reconnect


async def test_a_reconnect_brings_the_same_connection_back_to_life(shared: Rig) -> None:
    owner, user = unused("acme:"), person()
    connection = await shared.connected(owner, user)
    answer = await shared.call("POST", f"/v1/connections/{connection['id']}/reconnect", {"return_to": APP})
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert made.keys() == {"id", "token", "start_urls", "connect_url", "expires_at"}
    came = landed(await flow(shared, user=user, session=made["token"]))
    confirmed = await shared.confirm(came, owner)
    assert confirmed.status_code == 200, confirmed.text
    assert confirmed.json()["id"] == connection["id"]


async def test_a_reconnect_is_refused_where_there_is_nothing_to_reconnect(shared: Rig) -> None:
    check_problem(await shared.call("POST", f"/v1/connections/con_{'a' * 26}/reconnect"), 404, "not_found")
    pending = landed(await flow(shared, user=person()))
    answer = await shared.call("POST", f"/v1/connections/{pending['connection_id']}/reconnect")
    check_problem(answer, 409, "confirmation_required")
    body = {"name": "hub", "provider": "github", "client_id": "x"}
    assert (await shared.call("POST", "/v1/integrations", body)).status_code == 201
    key = await imported(shared, "a", integration="hub", credentials={"type": "api_key", "api_key": "x"})
    check_problem(await shared.call("POST", f"/v1/connections/{key['id']}/reconnect"), 409, "conflict")
    wrong: list[Any] = [{"expires_in": 1}, {"colour": "red"}, {"return_to": 5}]
    for fields in wrong:
        check_problem(
            await shared.call("POST", f"/v1/connections/{key['id']}/reconnect", fields), 400, "invalid_request"
        )
