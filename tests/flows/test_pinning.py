"""C4: a credential never follows a changed setting by itself."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from broker.demo.sandbox import DEMO_CLIENT_ID
from tests.fakes import Fake, Seen, listening
from tests.flows.rig import APP, Rig, landed
from tests.flows.shared import audited, bearer, browser_of, connected, flow, is_error, parameters, person, subject
from tests.flows.time_passes import row_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sink() -> AsyncIterator[Fake]:
    """Listen where credentials must not go; it offers metadata of its own, so that nothing stops at discovery."""

    def answer(seen: Seen) -> tuple[int, Any]:
        base = fakes[0].base
        names = ("authorization_endpoint", "token_endpoint", "revocation_endpoint", "userinfo_endpoint", "jwks_uri")
        return 200, {"issuer": base, "access_token": "planted", **{name: f"{base}/{name}" for name in names}}

    fakes: list[Fake] = []
    async with listening(answer) as fake:
        fakes.append(fake)
        yield fake


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pinned(shared: Rig) -> Rig:
    """Give the sandbox's integration an API host and a named one."""
    hosts = {"api_base_url": f"{shared.sandbox.issuer}/api", "hosts": {"uploads": f"{shared.sandbox.issuer}/api"}}
    assert (await shared.call("PATCH", "/v1/integrations/sandbox", {"config": hosts})).status_code == 200
    return shared


FIELDS = ("issuer", "token_url", "refresh_url", "revoke_url", "userinfo_url", "api_base_url", "hosts")
OTHERS = ("authorize_url", "jwks_url", "device_url")


def moved(name: str, base: str) -> dict[str, Any]:
    """Return a patch that moves one address to another origin."""
    return {"config": {name: {"uploads": base} if name == "hosts" else base}}


async def patch(rig: Rig, change: dict[str, Any], key: str | None = None) -> int:
    """Patch the integration; return the status."""
    answer = await rig.call("PATCH", "/v1/integrations/sandbox", change, key=key)
    return int(answer.status_code)


async def as_it_was(rig: Rig) -> None:
    """Undo every move."""
    issuer = rig.sandbox.issuer
    urls: dict[str, Any] = {
        f"{name}_url": None for name in ("token", "refresh", "revoke", "userinfo", "authorize", "jwks", "device")
    }
    hosts = {"api_base_url": f"{issuer}/api", "hosts": {"uploads": f"{issuer}/api"}}
    assert await patch(rig, {"config": {**urls, **hosts, "issuer": issuer}}) == 200


@pytest.mark.parametrize("name", [*FIELDS, *OTHERS])
async def test_c4_an_operator_may_not_move_where_credentials_go(pinned: Rig, sink: Fake, name: str) -> None:
    operator = await pinned.caller(roles=("operator",))
    before = (await pinned.call("GET", "/v1/integrations/sandbox")).json()["config"]
    assert await patch(pinned, moved(name, sink.base), operator) == 403
    assert (await pinned.call("GET", "/v1/integrations/sandbox")).json()["config"] == before
    assert await patch(pinned, {"description": "renamed"}, operator) == 200


@pytest.mark.parametrize("name", FIELDS)
async def test_c4_a_moved_address_stops_existing_connections_and_no_credential_reaches_it(
    pinned: Rig, sink: Fake, name: str
) -> None:
    connection = await connected(pinned, subject(), person())
    token = await bearer(pinned, connection["id"])
    reached = len(sink.seen)
    assert await patch(pinned, moved(name, sink.base)) == 200
    try:
        for body in ({}, {"force_refresh": True}):
            answer = await pinned.token(connection["id"], **body)
            assert (answer.status_code, answer.json()["code"]) == (409, "origin_changed")
        gone = await pinned.call("DELETE", f"/v1/connections/{connection['id']}")
        assert gone.json()["revocation"] == "failed"
    finally:
        await as_it_was(pinned)
    for seen in sink.seen[reached:]:
        assert (seen.method, seen.path) == ("GET", "/.well-known/openid-configuration")
        assert "authorization" not in seen.headers
        assert token not in repr(seen)
    assert name == "issuer" or len(sink.seen) == reached
    last = (await audited(pinned, "integration.updated"))[-2]
    assert last.detail["endpoints_changed"] == [name]


async def test_c4_the_connection_works_again_where_it_was_made(pinned: Rig, sink: Fake) -> None:
    connection = await connected(pinned, subject(), person())
    assert await patch(pinned, moved("token_url", sink.base)) == 200
    assert (await pinned.token(connection["id"])).status_code == 409
    await as_it_was(pinned)
    assert (await pinned.token(connection["id"], force_refresh=True)).status_code == 200


async def test_c4_a_changed_client_stops_refresh_and_revocation_until_it_is_undone_or_rebound(pinned: Rig) -> None:
    first, second = [await connected(pinned, subject(), person()) for _ in range(2)]
    refreshes = pinned.sandbox.state.counters.refreshes
    assert await patch(pinned, {"client_id": "another-app"}) == 200
    try:
        assert (await pinned.token(first["id"])).status_code == 200, "a live token is handed out"
        answer = await pinned.token(first["id"], force_refresh=True)
        assert (answer.status_code, answer.json()["code"]) == (409, "origin_changed")
        gone = await pinned.call("DELETE", f"/v1/connections/{second['id']}")
        assert gone.json()["revocation"] == "failed"
        assert (await pinned.call("POST", "/v1/integrations/sandbox/rebind")).status_code == 200
        row = await row_of(pinned.parts.database, first["id"])
        assert (row.client_id, row.status) == ("another-app", "active")
    finally:
        assert await patch(pinned, {"client_id": DEMO_CLIENT_ID}) == 200
        assert (await pinned.call("POST", "/v1/integrations/sandbox/rebind")).status_code == 200
    assert pinned.sandbox.state.counters.refreshes == refreshes
    assert (await pinned.token(first["id"], force_refresh=True)).status_code == 200


async def test_c4_a_rebind_is_for_an_admin_is_audited_and_moves_the_pins(pinned: Rig) -> None:
    connection = await connected(pinned, subject(), person())
    elsewhere = pinned.sandbox.issuer.replace("127.0.0.1", "localhost")  # the same server under another origin
    assert await patch(pinned, moved("token_url", f"{elsewhere}/token")) == 200
    try:
        assert (await pinned.token(connection["id"])).json()["code"] == "origin_changed"
        operator = await pinned.caller(roles=("operator",))
        path = "/v1/integrations/sandbox/rebind"
        assert (await pinned.call("POST", path, key=operator)).status_code == 403
        assert (await pinned.token(connection["id"])).json()["code"] == "origin_changed"
        assert (await pinned.call("POST", path)).status_code == 200
        assert (await audited(pinned, "integration.rebound"))[-1].detail["connections"] >= 1
        assert (await pinned.token(connection["id"], force_refresh=True)).status_code == 200
    finally:
        await as_it_was(pinned)
        assert (await pinned.call("POST", "/v1/integrations/sandbox/rebind")).status_code == 200


@pytest.mark.parametrize("name", ["issuer", "token_url", "jwks_url", "userinfo_url"])
async def test_c4_a_flow_that_began_before_the_change_finishes_where_it_began(
    pinned: Rig, sink: Fake, name: str
) -> None:
    browser, owner = browser_of(pinned), subject()
    callback = await pinned.consent(await pinned.begin(browser), user=person())
    reached = sink.connections
    assert await patch(pinned, moved(name, sink.base)) == 200
    try:
        came = landed(await browser.get(callback))
        assert came["status"] == "connected"
        assert sink.connections == reached
        assert (await pinned.confirm(came, owner, return_to=APP)).status_code == 200
        answer = await pinned.token(came["connection_id"])
        assert answer.status_code == (200 if name == "jwks_url" else 409)
    finally:
        await as_it_was(pinned)
    assert (await pinned.token(came["connection_id"])).status_code == 200


async def test_c4_a_refresh_endpoint_that_comes_later_is_used_where_refresh_tokens_went_before(pinned: Rig) -> None:
    connection = await connected(pinned, subject(), person())
    assert await patch(pinned, moved("refresh_url", f"{pinned.sandbox.issuer}/token")) == 200
    try:
        assert (await pinned.token(connection["id"], force_refresh=True)).status_code == 200
    finally:
        await as_it_was(pinned)
    assert (await pinned.token(connection["id"])).status_code == 200


@pytest.mark.parametrize("name", ["token_url", "refresh_url"])
async def test_c4_a_merge_does_not_carry_the_old_refresh_token_to_a_new_origin(pinned: Rig, name: str) -> None:
    owner, account = subject(), person()
    connection = await connected(pinned, owner, account)
    elsewhere = pinned.sandbox.issuer.replace("127.0.0.1", "localhost")
    assert await patch(pinned, moved(name, f"{elsewhere}/token")) == 200
    pinned.sandbox.state.configure(refresh_tokens="never")
    try:
        assert (await connected(pinned, owner, account))["id"] == connection["id"]
        _, value = await pinned.parts.vault.get(f"connections/{connection['id']}")
        assert "refresh_token" not in value
        assert (await pinned.token(connection["id"])).status_code == 200
        assert (await pinned.token(connection["id"], force_refresh=True)).json()["code"] == "not_refreshable"
    finally:
        pinned.sandbox.state.configure(refresh_tokens="always")
        await as_it_was(pinned)
    assert (await pinned.token(connection["id"])).json()["code"] == "origin_changed"


async def test_c4_an_unconfirmed_flow_is_not_revoked_at_a_moved_address(pinned: Rig, sink: Fake) -> None:
    came = landed(await flow(pinned, user=person()))
    reached = sink.connections
    assert await patch(pinned, moved("revoke_url", sink.base)) == 200
    try:
        answer = await pinned.confirm(came, subject(), return_to=f"{APP}/other")
        assert answer.json()["code"] == "subject_mismatch"
    finally:
        await as_it_was(pinned)
    (record,) = await audited(pinned, "connection.disposed", came["connection_id"])
    assert record.detail["revocation"] == "failed"
    assert sink.connections == reached


async def test_c4_an_import_moves_nothing_for_an_operator_and_stops_connections_when_an_admin_does_it(
    pinned: Rig, sink: Fake
) -> None:
    connection = await connected(pinned, subject(), person())
    exported = (await pinned.call("GET", "/v1/integrations/export")).json()
    (found,) = [one for one in exported["integrations"] if one["name"] == "sandbox"]
    document = {**exported, "integrations": [{**found, "config": {**found["config"], "token_url": sink.base}}]}
    operator, reached = await pinned.caller(roles=("operator",)), sink.connections
    refused = await pinned.call("POST", "/v1/integrations/import", document, key=operator)
    assert refused.status_code == 403, refused.text
    assert (await pinned.token(connection["id"])).status_code == 200
    try:
        done = await pinned.call("POST", "/v1/integrations/import", document)
        assert done.status_code in {200, 201}, done.text
        answer = await pinned.token(connection["id"], force_refresh=True)
        assert (answer.status_code, answer.json()["code"]) == (409, "origin_changed")
    finally:
        await as_it_was(pinned)
    assert sink.connections == reached


async def client_secrets(rig: Rig) -> list[str]:
    """Return the ids of the live client secrets."""
    found = (await rig.call("GET", "/v1/integrations/secretive/client-secrets")).json()["data"]
    return [one["id"] for one in found]


async def begun_at(rig: Rig, sink: Fake, browser: Any, *, secret: str = "the-old-secret", **fields: Any) -> str:
    """Make an integration whose token endpoint is the sink and begin a flow; return the callback's path."""
    urls = {f"{name}_url": f"{sink.base}/{name}" for name in ("authorize", "token", "jwks")}
    await rig.integration("secretive", client_id="old", client_secret=secret, config=urls | {"issuer": None}, **fields)
    state = parameters(await rig.begin(browser, "secretive"))["state"]
    return f"/oauth/secretive/callback?state={state}&code=x"


async def removed(rig: Rig) -> None:
    """Remove the integration."""
    assert (await rig.call("DELETE", "/v1/integrations/secretive")).status_code == 204


@pytest.mark.parametrize("how", ["made anew", "moved"])
async def test_c4_a_new_client_secret_does_not_follow_an_old_plan(shared: Rig, sink: Fake, how: str) -> None:
    browser, good = browser_of(shared), "https://good.test"
    callback = await begun_at(shared, sink, browser)
    reached, old = len(sink.seen), await client_secrets(shared)
    if how == "made anew":
        await removed(shared)
        await shared.integration("secretive", client_secret="the-new-secret")
    else:
        urls = {f"{name}_url": f"{good}/{name}" for name in ("authorize", "token", "jwks")}
        change = {"client_id": "new", "client_secret": "the-new-secret", "config": urls}
        assert (await shared.call("PATCH", "/v1/integrations/secretive", change)).status_code == 200
        for secret_id in old:
            path = f"/v1/integrations/secretive/client-secrets/{secret_id}"
            assert (await shared.call("DELETE", path)).status_code == 204
    try:
        assert is_error(await browser.get(callback), "integration_disabled")
        assert len(sink.seen) == reached
    finally:
        await removed(shared)


async def test_c4_of_several_secrets_only_those_of_the_start_are_sent_where_the_flow_began(
    shared: Rig, sink: Fake
) -> None:
    browser = browser_of(shared)
    callback = await begun_at(shared, sink, browser)
    reached = len(sink.seen)
    change = {"client_secret": "the-new-secret", "config": {"token_url": "https://good.test/token"}}
    assert (await shared.call("PATCH", "/v1/integrations/secretive", change)).status_code == 200
    try:
        assert len(await client_secrets(shared)) == 2
        await browser.get(callback)
        sent = [b64decode(seen.headers["authorization"].split()[1]) for seen in sink.seen[reached:]]
        assert sent == [b"old:the-old-secret"]
    finally:
        await removed(shared)


async def test_c4_a_secret_that_is_rotated_during_a_flow_does_not_break_it(shared: Rig, sink: Fake) -> None:
    browser = browser_of(shared)
    callback = await begun_at(shared, sink, browser)
    reached, old = len(sink.seen), await client_secrets(shared)
    change = {"client_secret": "the-new-secret"}
    assert (await shared.call("PATCH", "/v1/integrations/secretive", change)).status_code == 200
    assert (await shared.call("DELETE", f"/v1/integrations/secretive/client-secrets/{old[0]}")).status_code == 204
    try:
        await browser.get(callback)
        sent = [b64decode(seen.headers["authorization"].split()[1]) for seen in sink.seen[reached:]]
        assert sent == [b"old:the-new-secret"]
    finally:
        await removed(shared)
