"""Addresses that differ by account: given by a session or the operator, or learned from callback, token answer and API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import structlog

from broker.demo.sandbox import Fault
from providers.spec import OAuth2, Provider, Variable
from tests.fakes import Reply, Seen, listening
from tests.flows.api_calls import check_problem
from tests.flows.made_up import NAME, SHOP, World, playing
from tests.flows.rig import APP, Rig
from tests.flows.shared import browser_of, changed, flow, is_error, parameters, person, start, stored, subject
from tests.flows.time_passes import ends_in

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def world(shared: Rig) -> AsyncIterator[World]:
    """Give the made-up provider anew to each test, with an integration of its own."""
    async with playing(shared) as made:
        yield made


# What is given


async def test_a_connection_has_what_was_given_and_what_was_learned_and_is_pinned_to_it(world: World) -> None:
    token = await world.session(subject(), shop=SHOP)
    browser, url = await world.begin(token)
    assert url.startswith(f"{world.fake.base}/{SHOP}/authorize?")
    assert "code_challenge" not in parameters(url)
    came = parameters((await browser.get(world.callback(url))).headers["location"])
    (exchange,) = world.calls("/token")
    assert exchange.path == f"/eu/{SHOP}/token"
    assert "code_verifier" not in exchange.form
    (asked,) = world.calls("/me")
    assert asked.query == {"shop": SHOP}
    row = await world.row(came["connection_id"])
    assert row.variables == {"shop": SHOP, "instance": world.instance, "site": "site-1"}
    assert row.pins == dict.fromkeys(("token", "revoke", "api:", "api:site"), world.fake.base)


async def test_a_start_without_the_variable_that_the_address_needs_asks_for_a_session(world: World) -> None:
    answer = await start(browser_of(world.rig), world.integration, return_to=APP)
    assert parameters(answer.headers["location"])["error"] == "session_required"
    minted, browser = await world.rig.session(subject(), return_to=APP), browser_of(world.rig)  # for whatever there is
    owned = await start(browser, world.integration, session=minted["token"])
    answer = await browser.get(owned.headers["location"])
    assert parameters(answer.headers["location"])["error"] == "session_required"


async def test_a_session_for_a_named_integration_must_bring_what_its_start_needs(world: World) -> None:
    body = {"subject": subject(), "integrations": [world.integration]}
    check_problem(await world.rig.call("POST", "/v1/sessions", body), 400, "invalid_request", "/variables/shop")
    wrong = {**body, "variables": {"shop": "ACME", "region": "eu", "site": "s", "instance": "80443"}}
    check_problem(await world.rig.call("POST", "/v1/sessions", wrong), 400, "invalid_request", "/variables/shop")


async def test_config_variables_serve_every_start_and_stand_above_a_default(world: World) -> None:
    await world.configure(config={"variables": {"shop": "corner", "region": "us"}})
    browser, url = await world.begin(None)
    assert url.startswith(f"{world.fake.base}/corner/authorize?")
    assert "connected" in (await browser.get(world.callback(url))).headers["location"]
    assert world.calls("/token")[0].path == "/us/corner/token"
    assert (await world.session(subject())).startswith("bst_")


async def test_a_session_stands_above_a_default(world: World) -> None:
    await world.connected(subject(), region="jp")
    assert world.calls("/token")[0].path == f"/jp/{SHOP}/token"


async def test_what_config_variables_set_is_final_for_sessions_imports_and_device_flows(world: World) -> None:
    await world.configure(config={"variables": {"region": "us"}})
    one = {"subject": subject(), "variables": {"shop": SHOP, "region": "jp"}}
    key = {"credentials": {"type": "api_key", "api_key": "k"}}
    for path, body in (
        ("/v1/sessions", {**one, "integrations": [world.integration]}),
        ("/v1/connections", {**one, **key, "integration": world.integration}),
        ("/v1/device-flows", {**one, "integration": world.integration}),
    ):
        check_problem(await world.rig.call("POST", path, body), 400, "invalid_request", "/variables/region")
        again = await world.rig.call("POST", path, {**body, "variables": {"shop": SHOP, "region": "us"}})
        assert "/variables/region" not in again.text
    assert world.fake.seen == []


async def test_what_config_variables_set_later_is_final_for_sessions_that_were_made_before(world: World) -> None:
    token = await world.session(subject(), shop=SHOP, region="jp")
    patch = {"config": {"variables": {"region": "us"}}}
    assert (await world.rig.call("PATCH", f"/v1/integrations/{world.integration}", patch)).status_code == 200
    browser, url = await world.begin(token)
    await browser.get(world.callback(url))
    assert world.calls("/token")[0].path == f"/us/{SHOP}/token"


async def test_a_plan_outlives_a_change_of_config_variables(world: World) -> None:
    await world.configure(config={"variables": {"region": "us"}})
    browser, url = await world.begin(await world.session(subject(), shop=SHOP))
    patch = {"config": {"variables": {"region": "jp"}}}
    assert (await world.rig.call("PATCH", f"/v1/integrations/{world.integration}", patch)).status_code == 200
    assert "connected" in (await browser.get(world.callback(url))).headers["location"]
    assert world.calls("/token")[0].path == f"/us/{SHOP}/token"


async def test_the_catalog_says_what_is_learned_and_what_has_a_default(world: World) -> None:
    shown = (await world.rig.call("GET", f"/v1/providers/{NAME}")).json()["variables"]
    assert {one["name"]: (one["default"], one["learned"]) for one in shown} == {
        "shop": (None, True),
        "instance": (None, True),
        "site": (None, True),
        "cell": (None, True),
        "region": ("eu", False),
    }


# What is refused


@pytest.mark.parametrize("shop", ["other", "ACME", "acme.evil.test", ""])
async def test_a_callback_of_another_shop_changes_nothing_and_the_right_one_still_counts(
    world: World, shop: str
) -> None:
    browser, url = await world.begin(await world.session(subject(), shop=SHOP))
    before = await stored(world.rig)
    answer = await browser.get(world.callback(url, shop=shop))
    assert (answer.status_code, "location" in answer.headers) == (400, False)
    assert (world.fake.seen, await stored(world.rig)) == ([], before)
    assert "connected" in (await browser.get(world.callback(url))).headers["location"]


async def test_a_callback_that_no_live_secret_signed_is_refused_before_anything_is_sent(world: World) -> None:
    browser, url = await world.begin(await world.session(subject(), shop=SHOP))
    good = world.callback(url)
    forged = (world.callback(url, secret="guess"), changed(good, hmac=None), changed(good, code="code-2"))
    for wrong in (*forged, f"{good}&shop={SHOP}"):
        answer = await browser.get(wrong)
        assert (answer.status_code, "location" in answer.headers) == (400, False)
    assert world.fake.seen == []
    assert "connected" in (await browser.get(good)).headers["location"]
    assert (await browser.get(good)).headers["location"] == (await browser.get(good)).headers["location"]
    assert len(world.calls("/token")) == 1


async def test_a_callback_may_be_signed_with_any_live_client_secret(world: World) -> None:
    path = f"/v1/integrations/{world.integration}/client-secrets"
    assert (await world.rig.call("POST", path, {"client_secret": "a-newer-secret"})).status_code == 201
    for secret in ("a-newer-secret", world.secret):
        browser, url = await world.begin(await world.session(subject(), shop=SHOP))
        assert "connected" in (await browser.get(world.callback(url, secret=secret))).headers["location"]


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        ({"instance": "evil.test"}, {}),
        ({"instance": "80443"}, {"instance": "8443"}),
        ({}, {"site": "another-site"}),
    ],
)
async def test_an_answer_about_another_account_than_was_meant_leaves_nothing(
    world: World, answer: dict[str, Any], given: dict[str, str]
) -> None:
    if "site" in given:
        given = {**given, "instance": world.instance}
    world.extra, before = answer, await stored(world.rig)
    assert is_error(await world.flow(subject(), **given), "identity_invalid")
    assert await stored(world.rig) == before


async def test_an_answer_that_contradicts_config_variables_is_refused(world: World) -> None:
    await world.configure(config={"variables": {"instance": "8443"}})
    assert is_error(await world.flow(subject()), "identity_invalid")


async def test_what_the_identity_call_says_and_does_not_fit_counts_as_not_said(world: World) -> None:
    world.site = "Not A Site"
    connection = await world.connected(subject())
    assert "site" not in connection["variables"]
    assert "api:site" not in (await world.row(connection["id"])).pins


async def test_a_callback_may_name_the_address_of_the_exchange_and_then_has_to(world: World) -> None:
    await world.configure(config={"token_url": f"{world.fake.base}/{{cell}}/token"})
    browser, url = await world.begin(await world.session(subject(), shop=SHOP))
    answer = await browser.get(world.callback(url))
    assert (answer.status_code, "location" in answer.headers, world.fake.seen) == (400, False, [])
    assert "connected" in (await browser.get(world.callback(url, cell="c7"))).headers["location"]
    assert [seen.path for seen in world.calls("/token")] == ["/c7/token"]


# Later


async def test_an_instance_that_moved_at_a_refresh_is_not_followed_until_an_admin_rebinds(world: World) -> None:
    connection = await world.connected(subject())
    async with listening(lambda _: (200, {"id": world.account, "site": world.site})) as elsewhere:
        world.instance = elsewhere.base.rpartition(":")[2]
        await ends_in(world.rig.parts.database, connection["id"], -1)
        await world.rig.token(connection["id"])
        check_problem(await world.rig.token(connection["id"]), 409, "origin_changed")
        row = await world.row(connection["id"])
        assert (row.variables["instance"], row.pins["api:"]) == (world.instance, world.fake.base)
        rebound = await world.rig.call("POST", f"/v1/integrations/{world.integration}/rebind")
        assert rebound.json() == {"connections": 1}
        assert (await world.row(connection["id"])).pins["api:"] == elsewhere.base
        assert (await world.rig.token(connection["id"])).status_code == 200


async def test_a_reconnect_keeps_the_shop_and_takes_the_account_where_it_moved_to(world: World) -> None:
    owner = subject()
    connection = await world.connected(owner)
    async with listening(lambda _: (200, {"id": world.account, "site": world.site})) as elsewhere:
        world.instance = elsewhere.base.rpartition(":")[2]
        made = await world.rig.call("POST", f"/v1/connections/{connection['id']}/reconnect", {"return_to": APP})
        again = await world.connected(owner, made.json()["token"])
        assert again["id"] == connection["id"]
        assert again["variables"] == {**connection["variables"], "instance": world.instance}
        row = await world.row(connection["id"])
        assert (row.pins["api:"], row.pins["token"]) == (elsewhere.base, world.fake.base)
        assert (await world.rig.token(connection["id"])).status_code == 200


async def test_a_reconnect_of_another_shop_is_refused_at_the_callback(world: World) -> None:
    connection = await world.connected(subject())
    made = await world.rig.call("POST", f"/v1/connections/{connection['id']}/reconnect", {"return_to": APP})
    browser, url = await world.begin(made.json()["token"])
    assert (await browser.get(world.callback(url, shop="other"))).status_code == 400


async def test_a_second_flow_of_the_same_account_brings_variables_and_pins_together(world: World) -> None:
    owner = subject()
    connection = await world.connected(owner)
    world.site = "site-2"
    again = await world.connected(owner)
    assert (again["id"], again["variables"]["site"]) == (connection["id"], "site-2")
    assert (await world.rig.token(connection["id"])).status_code == 200


async def test_a_second_flow_that_learns_less_keeps_what_was_known_unless_it_is_another_client(world: World) -> None:
    owner = subject()
    connection = await world.connected(owner, region="jp")
    world.site = ""
    again = await world.connected(owner)
    assert again["id"] == connection["id"]
    assert again["variables"] == {"shop": SHOP, "instance": world.instance, "site": "site-1"}
    row = await world.row(connection["id"])
    assert row.pins == dict.fromkeys(("token", "revoke", "api:", "api:site"), world.fake.base)
    assert (await world.rig.token(connection["id"], force_refresh=True)).status_code == 200
    assert world.calls("/token")[-1].path == f"/eu/{SHOP}/token", "a default is what the newcomer was made with"
    change = {"client_id": "another"}
    assert (await world.rig.call("PATCH", f"/v1/integrations/{world.integration}", change)).status_code == 200
    assert "site" not in (await world.connected(owner))["variables"]
    assert "api:site" not in (await world.row(connection["id"])).pins


async def test_a_refresh_and_a_revocation_go_to_the_connections_own_shop(world: World) -> None:
    connection = await world.connected(subject())
    await ends_in(world.rig.parts.database, connection["id"], -1)
    assert (await world.rig.token(connection["id"])).json()["stale"] is False
    refreshed = world.calls("/token")[1]
    assert (refreshed.path, refreshed.form["grant_type"]) == (f"/eu/{SHOP}/token", "refresh_token")
    gone = await world.rig.call("DELETE", f"/v1/connections/{connection['id']}")
    assert gone.json()["revocation"] == "revoked"
    assert [seen.path for seen in world.calls("/revoke")] == [f"/{SHOP}/revoke"]


async def test_a_test_of_an_integration_asks_with_the_connections_own_addresses(world: World) -> None:
    lacking = (await world.rig.call("POST", f"/v1/integrations/{world.integration}/test")).json()
    assert [check["ok"] for check in lacking["checks"]] == [True, False]
    assert "variable" in lacking["checks"][1]["detail"]
    await world.configure(config={"variables": {"shop": SHOP}})
    await world.connected(subject())
    world.extra = {"error": "invalid_grant"}
    path = f"/v1/integrations/{world.integration}/test"
    assert [check["name"] for check in (await world.rig.call("POST", path)).json()["checks"]][-1] == "identity"
    assert len(world.calls("/me")) == 2


async def test_a_malformed_member_of_the_exchange_is_logged_and_costs_nothing(world: World) -> None:
    world.extra = {"expires_in": "soon"}
    with structlog.testing.capture_logs() as lines:
        connection = await world.connected(subject())
    assert connection["expires_at"] is None
    odd = [line["members"] for line in lines if line["event"] == "flow.odd_answer"]
    assert odd == [["expires_in"]]


async def test_a_malformed_id_token_ends_a_flow_that_needs_one(shared: Rig) -> None:
    body = {"access_token": "at", "token_type": "Bearer", "id_token": 5}
    shared.sandbox.state.add_fault(Fault(kind="answer", status=200, body=body))
    assert is_error(await flow(shared, user=person()), "identity_invalid")


# An issuer that has a variable


def tenants(base: str) -> Provider:
    """Return a provider whose every tenant is an issuer of its own."""
    return Provider(
        name="tenants",
        title="Tenants",
        docs_url="https://tenants.test",
        oauth2=OAuth2(discovery=True, default_scopes=("read",)),
        hosts={"": f"{base}/{{tenant}}/api"},
        variables=(Variable("tenant", r"[a-z]{1,20}", "one"),),
    )


async def test_an_issuer_may_hold_a_variable_and_each_is_discovered_for_itself(shared: Rig) -> None:
    bases: list[str] = []

    def discovered(seen: Seen) -> Reply:
        issuer = f"{bases[0]}/{seen.path.split('/')[1]}"
        if seen.path.endswith("/token"):
            return 200, {"access_token": f"of {issuer}", "expires_in": 600}
        named = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "jwks"}
        return 200, {"issuer": issuer, **{name: f"{issuer}/{path}" for name, path in named.items()}}

    async with listening(discovered) as fake:
        bases.append(fake.base)
        catalog = shared.parts.integrations.catalog
        shared.parts.integrations.catalog = {**catalog, "tenants": tenants(fake.base)}
        config = {"issuer": f"{fake.base}/{{tenant}}"}
        body = {"name": "tenants", "provider": "tenants", "client_id": "c", "client_secret": "s", "config": config}
        made = await shared.call("POST", "/v1/integrations", body)
        assert made.status_code == 201, made.text
        without = await start(browser_of(shared), "tenants", return_to=APP)
        assert parameters(without.headers["location"])["error"] == "session_required"
        session = await shared.session(subject(), integrations=["tenants"], variables={"tenant": "two"})
        url = await shared.begin(browser_of(shared), "tenants", session=session["token"])
        assert url.startswith(f"{fake.base}/two/authorize?")
        credentials = {"type": "oauth2", "access_token": "old", "refresh_token": "r"}
        body = {"integration": "tenants", "subject": subject(), "credentials": credentials}
        imported = await shared.call("POST", "/v1/connections", {**body, "variables": {"tenant": "one"}})
        connection = imported.json()["id"]
        fresh = await shared.token(connection, force_refresh=True)
        assert fresh.json()["access_token"] == f"of {fake.base}/one"
        assert (await shared.token(connection)).json() == fresh.json()
        assert (await shared.call("POST", "/v1/integrations/tenants/rebind")).json() == {"connections": 0}
        await shared.call("DELETE", f"/v1/connections/{connection}?revoke=false")
