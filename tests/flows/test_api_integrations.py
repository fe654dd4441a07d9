"""Integrations through HTTP: made, changed, tested, exported, with several client secrets, from environment and file."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from sqlmodel import select
from structlog.testing import capture_logs

from broker.app import create_app, open_parts
from broker.callers import mint_key
from broker.demo.sandbox import DEMO_CLIENT_ID, DEMO_CLIENT_SECRET, fault
from broker.errors import ProviderUnavailable
from broker.integrations import Draft
from broker.models import ClientSecret, Integration, SealedSecret
from broker.settings import SettingsError, load_settings
from providers.spec import Secret
from tests.fakes import Seen, listening
from tests.flows.api_calls import check_problem, imported, unused
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.shared import audited, person, rows

pytestmark = pytest.mark.asyncio(loop_scope="module")
SHOWN = {
    *("name", "provider", "description", "client_id", "scopes", "config", "enabled", "status", "status_reason"),
    *("client_secrets", "created_at", "updated_at"),
}


async def made(rig: Rig, **fields: Any) -> dict[str, Any]:
    """Return a new integration."""
    body = {"name": unused("hub-"), "provider": "github", "client_id": "id", "client_secret": "s3cret", **fields}
    answer = await rig.call("POST", "/v1/integrations", body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def patched(rig: Rig, name: str, body: Any, **kwargs: Any) -> Any:
    return await rig.call("PATCH", f"/v1/integrations/{name}", body, **kwargs)


async def operator(rig: Rig) -> str:
    return await rig.caller(roles=("operator",))


async def vault_owners(rig: Rig, name: str) -> set[str]:
    return {row.owner for row in await rows(rig, SealedSecret) if row.owner.startswith(f"integrations/{name}/")}


# Made and shown


async def test_an_integration_is_shown_whole_and_without_its_secret(shared: Rig) -> None:
    shown = await made(shared, client_secret="CANARY-client", description="For the docs", scopes=["repo"])
    assert shown.keys() == SHOWN
    assert (shown["status"], shown["client_secrets"], shown["scopes"]) == ("active", 1, ["repo"])
    listed = await shared.call("GET", "/v1/integrations?limit=200")
    assert "CANARY" not in listed.text
    assert shown in listed.json()["data"]
    assert (await shared.call("GET", f"/v1/integrations/{shown['name']}")).json() == shown
    assert "CANARY" not in repr(await rows(shared, ClientSecret))


async def test_scopes_left_out_are_the_providers(shared: Rig) -> None:
    assert (await made(shared))["scopes"] == ["read:user", "user:email"]
    assert (await made(shared, scopes=[]))["scopes"] == []


@pytest.mark.parametrize(
    "name", ["", "UPPER", "a b", "-a", "_a", "a" * 64, "a/b", "ä", "export", "import", "a\n", "a.b"]
)
async def test_a_name_that_no_url_could_carry_is_refused(shared: Rig, name: str) -> None:
    answer = await shared.call("POST", "/v1/integrations", {"name": name, "provider": "github"})
    check_problem(answer, 400, "invalid_request", "/name")


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"provider": "absent"}, "/provider"),
        ({"provider": "svix"}, "/provider"),  # it has webhooks alone
        ({"provider": None}, "/provider"),
        ({"scopes": ["a b"]}, "/scopes/0"),
        ({"scopes": "repo"}, "/scopes"),
        ({"client_secret": ""}, "/client_secret"),
        ({"enabled": "yes"}, "/enabled"),
        ({"status": "active"}, "/status"),
        ({"description": "a\u0000"}, "/description"),
        ({"config": {"token_url": "https://u:p@x.test/"}}, "/config/token_url"),
        ({"config": {"timeout_seconds": "10"}}, "/config/timeout_seconds"),
        ({"config": {"retry": {"max_attempts": 99}}}, "/config/retry/max_attempts"),
        ({"config": {"authorize_params": {"state": "x"}}}, "/config/authorize_params"),
        ({"config": []}, "/config"),
    ],
)
async def test_a_bad_field_is_named(shared: Rig, fields: dict[str, Any], pointer: str) -> None:
    body = {"name": unused("bad-"), "provider": "github", **fields}
    check_problem(await shared.call("POST", "/v1/integrations", body), 400, "invalid_request", pointer)
    assert await vault_owners(shared, body["name"]) == set()


async def test_a_taken_name_is_a_conflict_and_leaves_no_secret_behind(shared: Rig) -> None:
    name = (await made(shared))["name"]
    before = await vault_owners(shared, name)
    body = {"name": name, "provider": "github", "client_secret": "other"}
    check_problem(await shared.call("POST", "/v1/integrations", body), 409, "conflict")
    assert await vault_owners(shared, name) == before


async def test_http_endpoints_are_for_development(tmp_path: Path) -> None:
    settings = {
        "env": "production",
        "public_url": "https://broker.test",
        "keyring": "k1:" + "A" * 43 + "=",
        "data_dir": tmp_path,
    }
    key = mint_key()[1].reveal()
    loaded = load_settings({}, directory=tmp_path, **settings, admin_key=key)
    async with open_parts(loaded) as parts:
        transport = httpx2.ASGITransport(app=create_app(parts))  # type: ignore[arg-type] # an ASGI application
        async with httpx2.AsyncClient(transport=transport, base_url="https://broker.test") as http:
            body = {"name": "x", "provider": "oidc", "config": {"issuer": "http://id.test"}}
            headers = {"Authorization": f"Bearer {key}"}
            check_problem(
                await http.post("/v1/integrations", json=body, headers=headers),
                400,
                "invalid_request",
                "/config/issuer",
            )
            body["config"] = {"issuer": "https://id.test"}
            assert (await http.post("/v1/integrations", json=body, headers=headers)).status_code == 201


async def test_the_status_follows_what_is_configured(shared: Rig) -> None:
    name = (await made(shared, client_id="", client_secret=None))["name"]
    path = f"/v1/integrations/{name}"
    steps: list[tuple[Any, str]] = [
        ({}, "configuring"),
        ({"client_id": "id"}, "configuring"),
        ({"client_secret": "x"}, "active"),
        ({"enabled": False}, "inactive"),
        ({"enabled": True}, "active"),
    ]
    for body, expected in steps:
        assert (await patched(shared, name, body)).json()["status"] == expected
    await shared.parts.integrations.begin_test(name)
    assert (await shared.call("GET", path)).json()["status"] == "testing"
    await shared.parts.integrations.end_test(name, "it does not work")
    shown = (await shared.call("GET", path)).json()
    assert (shown["status"], shown["status_reason"]) == ("error", "it does not work")
    assert (await patched(shared, name, {"description": "new"})).json()["status"] == "active", (
        "a change asks for a new test"
    )


async def test_a_public_client_needs_no_secret(shared: Rig) -> None:
    assert (await made(shared, client_secret=None, config={"client_auth": "none"}))["status"] == "active"


# Changed


async def test_a_patch_changes_what_it_names_and_null_puts_back_what_was(shared: Rig) -> None:
    config = {"timeout_seconds": 5, "retry": {"max_attempts": 2, "backoff": "linear"}}
    name = (await made(shared, description="old", scopes=["repo"], config=config))["name"]
    cases: list[tuple[Any, str, Any]] = [
        ({"description": "new"}, "description", "new"),
        ({"description": None}, "description", ""),
        ({"scopes": ["gist"]}, "scopes", ["gist"]),
        ({"scopes": None}, "scopes", ["read:user", "user:email"]),
        ({"client_id": None}, "client_id", ""),
        ({"config": {"retry": {"backoff": None}}}, "config", {"timeout_seconds": 5, "retry": {"max_attempts": 2}}),
        ({"config": {"retry": None, "confirm_seconds": 60}}, "config", {"timeout_seconds": 5, "confirm_seconds": 60}),
        ({"config": None}, "config", {}),
    ]
    for body, field, expected in cases:
        answer = await patched(shared, name, body)
        assert answer.status_code == 200, answer.text
        assert answer.json()[field] == expected, body


@pytest.mark.parametrize(
    "body", [{"enabled": None}, {"provider": None}, {"client_secret": None}, {"name": "x"}, {"status": "x"}]
)
async def test_what_has_no_state_to_go_back_to_takes_no_null(shared: Rig, body: Any) -> None:
    (field,) = body
    check_problem(await patched(shared, (await made(shared))["name"], body), 400, "invalid_request", f"/{field}")


async def test_a_provider_cannot_be_changed(shared: Rig) -> None:
    name = (await made(shared))["name"]
    assert (await patched(shared, name, {"provider": "github"})).status_code == 200
    check_problem(await patched(shared, name, {"provider": "google"}), 400, "invalid_request", "/provider")
    check_problem(await patched(shared, "absent", {}), 404, "not_found")


async def test_patches_at_once_lose_nothing(tmp_path: Path, database_url: str) -> None:
    async with open_rig(tmp_path, database_url=database_url) as rig:
        name = (await made(rig))["name"]
        changes: list[Any] = [
            {"confirm_seconds": 60},
            {"require_session": True},
            {"timeout_seconds": 7},
            {"retry": {"max_attempts": 1}},
        ]
        answers = await asyncio.gather(*(patched(rig, name, {"config": one}) for one in changes))
        assert {answer.status_code for answer in answers} == {200}
        found = (await rig.call("GET", f"/v1/integrations/{name}")).json()["config"]
        assert found == {name: value for one in changes for name, value in one.items()}


MOVES = [
    {"token_url": "https://evil.test/"},
    {"api_base_url": "https://evil.test/"},
    {"hosts": {"uploads": "https://evil.test/"}},
    {"issuer": "https://evil.test"},
    {"revoke_url": "https://evil.test/"},
    {"confirm": "without_session"},
]


@pytest.mark.parametrize("config", MOVES)
async def test_where_credentials_go_and_what_protects_the_flows_is_for_admins(shared: Rig, config: Any) -> None:
    name = (await made(shared))["name"]
    key = await operator(shared)
    check_problem(await patched(shared, name, {"config": config}, key=key), 403, "forbidden")
    assert (await patched(shared, name, {"config": config})).status_code == 200
    check_problem(await patched(shared, name, {"config": None}, key=key), 403, "forbidden")
    assert (await patched(shared, name, {"config": {"timeout_seconds": 5}}, key=key)).status_code == 200
    records = await audited(shared, "integration.updated")
    changed = [record for record in records if record.integration == name]
    assert changed[0].detail["endpoints_changed"] == [field for field in config if field != "confirm"]


async def test_a_moved_endpoint_stops_existing_connections_until_a_rebind(shared: Rig) -> None:
    name = (await made(shared))["name"]
    credentials = {"type": "api_key", "api_key": "x"}
    connection = await imported(shared, "acme:1", integration=name, credentials=credentials)
    await patched(shared, name, {"config": {"api_base_url": "https://ghe.test/api"}})
    check_problem(await shared.token(connection["id"]), 409, "origin_changed")
    check_problem(
        await shared.call("POST", f"/v1/integrations/{name}/rebind", key=await operator(shared)), 403, "forbidden"
    )
    assert (await shared.call("POST", f"/v1/integrations/{name}/rebind")).json() == {"connections": 1}
    assert (await shared.token(connection["id"])).status_code == 200


async def test_an_integration_with_connections_stays_and_one_without_is_gone_whole(shared: Rig) -> None:
    name = (await made(shared))["name"]
    credentials = {"type": "api_key", "api_key": "x"}
    connection = await imported(shared, "acme:1", integration=name, credentials=credentials)
    path = f"/v1/integrations/{name}"
    check_problem(await shared.call("DELETE", path), 409, "conflict")
    await shared.call("DELETE", f"/v1/connections/{connection['id']}")
    await shared.parts.integrations.note(name, action="test", text="a line")
    assert (await shared.call("DELETE", path)).status_code == 204
    check_problem(await shared.call("GET", path), 404, "not_found")
    check_problem(await shared.call("DELETE", path), 404, "not_found")
    assert await vault_owners(shared, name) == set()
    again = await made(shared, name=name)
    assert again["client_secrets"] == 1
    assert (await shared.call("GET", f"{path}/logs")).json()["data"] == []


# Client secrets


async def test_several_client_secrets_live_side_by_side_newest_first(shared: Rig) -> None:
    name = (await made(shared, client_secret="CANARY-1"))["name"]
    path = f"/v1/integrations/{name}/client-secrets"
    second = await shared.call("POST", path, {"client_secret": "CANARY-2"})
    assert second.status_code == 201
    shown = {"id", "source", "state", "created_at", "last_used_at", "refused_at"}
    assert second.json().keys() == {*shown, "rotation_id"}
    listed = await shared.call("GET", path)
    assert listed.json()["data"][0]["id"] == second.json()["id"]
    again = await shared.call("POST", path, {"client_secret": "CANARY-2"})
    assert again.json()["id"] == second.json()["id"], "the same value is one secret"
    assert len(await vault_owners(shared, name)) == 2
    assert "CANARY" not in listed.text + second.text
    check_problem(await shared.call("POST", path, {"client_secret": ""}), 400, "invalid_request", "/client_secret")
    check_problem(
        await shared.call("POST", "/v1/integrations/absent/client-secrets", {"client_secret": "x"}), 404, "not_found"
    )
    assert (await shared.call("DELETE", f"{path}/{second.json()['id']}")).status_code == 204
    check_problem(await shared.call("DELETE", f"{path}/{second.json()['id']}"), 404, "not_found")
    other = (await made(shared))["name"]
    (left,) = (await shared.call("GET", path)).json()["data"]
    check_problem(
        await shared.call("DELETE", f"/v1/integrations/{other}/client-secrets/{left['id']}"), 404, "not_found"
    )
    assert len(await vault_owners(shared, name)) == 1


async def test_there_is_an_end_to_how_many_are_tried(shared: Rig) -> None:
    name = (await made(shared))["name"]
    path = f"/v1/integrations/{name}/client-secrets"
    answers = [await shared.call("POST", path, {"client_secret": f"s{n}"}) for n in range(10)]
    assert [answer.status_code for answer in answers] == [201] * 9 + [409]
    assert len(await vault_owners(shared, name)) == 10
    check_problem(await patched(shared, name, {"client_secret": "one more", "description": "changed"}), 409, "conflict")
    assert (await shared.call("GET", f"/v1/integrations/{name}")).json()["description"] == ""


async def test_an_older_client_secret_is_tried_when_the_newest_is_refused(shared: Rig) -> None:
    name = "other"  # its callback is registered at the sandbox
    await shared.integration(name)
    path = f"/v1/integrations/{name}/client-secrets"
    wrong = (await shared.call("POST", path, {"client_secret": "not registered yet"})).json()["id"]
    browser = shared.browser()
    url = await shared.begin(browser, name)
    answer = await browser.get(await shared.consent(url, user=person()))
    assert "status=connected" in answer.headers["location"]
    came = dict(part.split("=", 1) for part in urlsplit(answer.headers["location"]).query.split("&"))
    confirmed = await shared.confirm(came, unused("acme:"), return_to="http://127.0.0.1:7777/app/connected")
    connection = confirmed.json()
    refreshed = await shared.token(connection["id"], force_refresh=True)
    assert refreshed.status_code == 200, refreshed.text
    (right,) = [row["id"] for row in (await shared.call("GET", path)).json()["data"] if row["id"] != wrong]
    await shared.call("DELETE", f"{path}/{right}")
    verdict = (await shared.call("POST", f"/v1/integrations/{name}/test")).json()
    assert verdict["ok"] is False


# Tested


async def test_a_test_proves_the_clients_credentials(shared: Rig) -> None:
    verdict = (await shared.call("POST", "/v1/integrations/sandbox/test")).json()
    assert verdict["ok"] is True
    assert [(check["name"], check["ok"]) for check in verdict["checks"]][:3] == [
        ("discovery", True),
        ("jwks", True),
        ("client", True),
    ]


async def test_with_a_connection_at_hand_a_test_makes_its_identity_call(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        connection = await rig.connected()
        verdict = (await rig.call("POST", "/v1/integrations/sandbox/test")).json()
        assert verdict["checks"][3:] == [{"name": "identity", "ok": True, "detail": "fine"}]
        used = (await rig.call("GET", "/v1/audit?action=integration.tested")).json()["data"]
        assert [record["connection_id"] for record in used] == [connection["id"]]

        rig.sandbox.state.kill_account("ada")
        verdict = (await rig.call("POST", "/v1/integrations/sandbox/test")).json()
        assert (verdict["ok"], verdict["checks"][3]["ok"]) == (False, False)
        shown = (await rig.call("GET", "/v1/integrations/sandbox")).json()
        assert shown["status"] == "active"  # one user's dead token says nothing about the configuration


@pytest.mark.parametrize(
    ("fields", "failing"),
    [
        ({"client_secret": "CANARY wrong"}, "client"),
        ({"client_id": "CANARY-unknown"}, "client"),
        ({"client_id": ""}, "client"),
        ({"config": {"issuer": "http://127.0.0.1:9/"}}, "discovery"),
        ({"config": {"jwks_url": "http://127.0.0.1:9/keys"}}, "jwks"),
        ({"config": {"token_url": "http://127.0.0.1:9/token"}}, "client"),
        ({"config": {"userinfo_url": "http://127.0.0.1:9/", "timeout_seconds": 1}}, None),
    ],
)
async def test_a_test_names_what_fails(shared: Rig, fields: dict[str, Any], failing: str | None) -> None:
    name = unused("probe-")
    await shared.integration(name, **fields)
    answer = await shared.call("POST", f"/v1/integrations/{name}/test")
    assert answer.status_code == 200, answer.text
    assert "CANARY" not in answer.text
    assert [check["name"] for check in answer.json()["checks"] if not check["ok"]] == ([failing] if failing else [])
    shown = (await shared.call("GET", f"/v1/integrations/{name}")).json()
    if shown["client_id"]:
        assert shown["status"] == ("error" if failing else "active")
    logs = (await shared.call("GET", f"/v1/integrations/{name}/logs?level={'error' if failing else 'info'}")).json()[
        "data"
    ]
    assert [line["action"] for line in logs] == ["test"]


async def test_a_provider_that_answers_nonsense_disproves_nothing_by_its_text(shared: Rig) -> None:
    name = unused("probe-")
    await shared.integration(name)
    for preset in ("garbage", "fail"):
        shared.sandbox.state.faults.append(fault(preset))
        answer = await shared.call("POST", f"/v1/integrations/{name}/test")
        assert answer.json()["ok"] is False
        assert "<html>" not in answer.text


# Figures and lines


async def test_figures_and_lines_are_of_the_window_and_the_filter(shared: Rig) -> None:
    name = (await made(shared))["name"]
    path, integrations = f"/v1/integrations/{name}", shared.parts.integrations
    empty = (await shared.call("GET", f"{path}/metrics")).json()
    assert (empty["total"], empty["success_rate"], empty["last_activity_at"], empty["window"]) == (0, None, None, "24h")
    await integrations.note(name, action="exchange", text="good 100%_", duration_ms=10.0)
    await integrations.note(name, action="exchange", text="bad", level="error", duration_ms=30.0)
    figures = (await shared.call("GET", f"{path}/metrics?window=1h")).json()
    assert (figures["total"], figures["success_rate"], figures["mean_latency_ms"], figures["p95_latency_ms"]) == (
        2,
        0.5,
        20,
        30,
    )
    assert figures["last_activity_at"].endswith("Z")
    for query, texts in (
        ("", ["bad", "good 100%_"]),
        ("?level=error", ["bad"]),
        ("?text=00%25_", ["good 100%_"]),
        ("?text=%25d", []),
    ):
        lines = (await shared.call("GET", f"{path}/logs{query}")).json()["data"]
        assert [line["text"] for line in lines] == texts, query
    check_problem(await shared.call("GET", f"{path}/metrics?window=2w"), 400, "invalid_request", "?window")
    check_problem(await shared.call("GET", f"{path}/logs?level=loud"), 400, "invalid_request", "?level")


# A provider that is down


@contextlib.asynccontextmanager
async def dead_provider() -> AsyncIterator[tuple[str, list[bytes]]]:
    """Serve 500 to everything, slowly; yield the base URL and the requests that came."""
    came: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.readuntil(b"\r\n\r\n"))
        await asyncio.sleep(0.1)
        writer.write(b"HTTP/1.1 500 Broken\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", came


async def test_a_dead_provider_is_asked_once_for_many_flows_and_anew_by_a_test(shared: Rig) -> None:
    integrations = shared.parts.integrations
    async with dead_provider() as (base, came):
        name = unused("dead-")
        await shared.integration(name, config={"issuer": base})

        async def discover() -> object:
            return await integrations.configured(name)

        async def keys() -> object:
            return await integrations.jwks(f"{base}/keys")

        for number, ask in enumerate((discover, keys), 1):
            failed = await asyncio.gather(*(ask() for _ in range(20)), return_exceptions=True)
            failed += await asyncio.gather(ask(), return_exceptions=True)
            assert {type(error) for error in failed} == {ProviderUnavailable}
            assert len({id(error) for error in failed}) == 21, "each has its own, with its own traceback"
            assert len(came) <= number * 3, "one ask is up to three tries"
        before = len(came)
        assert (await shared.call("POST", f"/v1/integrations/{name}/test")).json()["ok"] is False
        assert len(came) > before


async def test_live_tokens_are_served_while_discovery_is_down(tmp_path: Path) -> None:
    replies: list[Any] = []

    def answer(_: Seen) -> Any:
        return replies[-1]

    async with open_rig(tmp_path) as rig, listening(answer) as fake:
        base = fake.base
        document = {"issuer": base, **{f"{name}_endpoint": f"{base}/{name}" for name in ("authorization", "token")}}
        replies.append((200, {**document, "jwks_uri": f"{base}/keys"}))
        await rig.integration("sso", config={"issuer": base})
        credentials = {
            "type": "oauth2",
            "access_token": "live",
            "refresh_token": "r",
            "expires_at": "2099-01-01T00:00:00Z",
        }
        body = {"integration": "sso", "subject": "acme:1", "credentials": credentials}
        connection = (await rig.call("POST", "/v1/connections", body)).json()["id"]
        assert (await rig.token(connection)).status_code == 200
        integrations = rig.parts.integrations
        integrations._discovered = {url: (at - 3601, found) for url, (at, found) in integrations._discovered.items()}
        replies.append((503, {}))
        before = len(fake.seen)
        with capture_logs() as logs:
            served = await asyncio.gather(*(rig.token(connection) for _ in range(5)))
            served.append(await rig.token(connection))
        assert [one.json()["access_token"] for one in served] == ["live"] * 6
        assert len([line for line in logs if line["event"] == "discovery.stale"]) == 1
        asked = len(fake.seen) - before
        assert 1 <= asked <= 3, "one ask is up to three tries; the next is a while later"
        checks = (await rig.call("POST", "/v1/integrations/sso/test")).json()["checks"]
        assert checks[0]["name"] == "discovery"
        assert checks[0]["ok"] is False
        asked = len(fake.seen) - before
        replies.append(replies[0])
        integrations._failed = {url: (at - 16, error) for url, (at, error) in integrations._failed.items()}
        assert (await rig.token(connection)).status_code == 200
        assert len(fake.seen) - before == asked + 1


async def test_many_flows_at_once_discover_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        found = await asyncio.gather(*(rig.parts.integrations.configured("sandbox") for _ in range(10)))
        assert all(one.endpoints.urls is not None for one in found)
        documents = [id(value) for _, value in rig.parts.integrations._discovered.values()]
        assert len(documents) == 1


# Who says where credentials go, when an integration is made


async def test_endpoints_of_a_new_integration_are_for_admins_where_the_provider_has_its_own(shared: Rig) -> None:
    key, name = await operator(shared), unused("ghe-")
    for config in MOVES[:5]:
        body = {"name": name, "provider": "github", "client_secret": "s", "config": config}
        check_problem(await shared.call("POST", "/v1/integrations", body, key=key), 403, "forbidden")
        document = {"format": "broker-integrations/1", "integrations": [{**body, "client_secret": ""}]}
        del document["integrations"][0]["client_secret"]  # type: ignore[attr-defined]
        check_problem(await put_back(shared, document, key=key), 403, "forbidden")
    assert await vault_owners(shared, name) == set()
    generic = {"name": name, "provider": "oidc", "config": {"issuer": "http://127.0.0.1:9"}}
    assert (await shared.call("POST", "/v1/integrations", generic, key=key)).status_code == 201


async def test_a_name_that_was_deleted_once_gets_endpoints_anew_from_an_admin_only(shared: Rig) -> None:
    key, name = await operator(shared), unused("idp-")
    body = {"name": name, "provider": "oidc", "client_secret": "s", "config": {"issuer": "http://127.0.0.1:9"}}
    assert (await shared.call("POST", "/v1/integrations", body, key=key)).status_code == 201
    assert (await shared.call("DELETE", f"/v1/integrations/{name}", key=key)).status_code == 204
    check_problem(await shared.call("POST", "/v1/integrations", body, key=key), 403, "forbidden")
    assert await vault_owners(shared, name) == set()
    entry = {field: value for field, value in body.items() if field != "client_secret"}
    document = {"format": "broker-integrations/1", "integrations": [entry]}
    check_problem(await put_back(shared, document, key=key), 403, "forbidden")
    assert (await shared.call("POST", "/v1/integrations", body)).status_code == 201
    plain = (await made(shared))["name"]
    assert (await shared.call("DELETE", f"/v1/integrations/{plain}", key=key)).status_code == 204
    again = {"name": plain, "provider": "github"}
    assert (await shared.call("POST", "/v1/integrations", again, key=key)).status_code == 201


# Export and import


PHRASE = "correct horse battery ü"


def carried(phrase: str = PHRASE) -> dict[str, bytes]:
    return {"X-Broker-Passphrase": phrase.encode()}


async def exported(rig: Rig, phrase: str | None = None) -> Any:
    headers: dict[str, Any] = {"Authorization": f"Bearer {rig.admin_key}", **(carried(phrase) if phrase else {})}
    return await rig.backend.get("/v1/integrations/export", headers=headers)


async def put_back(rig: Rig, document: Any, phrase: str | None = None, key: str | None = None) -> Any:
    headers: dict[str, Any] = {"Authorization": f"Bearer {key or rig.admin_key}", **(carried(phrase) if phrase else {})}
    return await rig.backend.post("/v1/integrations/import", json=document, headers=headers)


async def test_an_export_moves_to_another_broker_whole(shared: Rig, tmp_path: Path) -> None:
    name = (
        await made(shared, client_secret="CANARY-e", description="d", config={"timeout_seconds": 5}, enabled=False)
    )["name"]
    bare, sealed = await exported(shared), await exported(shared, PHRASE)
    assert "sealed_secrets" not in bare.json()
    assert "CANARY-e" not in bare.text + sealed.text
    assert len(await audited(shared, "integration.exported")) == 1
    async with open_rig(tmp_path) as other:
        done = await put_back(other, sealed.json(), PHRASE)
        assert done.status_code == 200, done.text
        assert "sandbox" in done.json()["updated"]
        assert name in done.json()["created"]
        for row in (await exported(other)).json()["integrations"]:
            assert row in bare.json()["integrations"]
        values = await other.parts.integrations.secret_values(name)
        assert [value.reveal() for value in values] == ["CANARY-e"]
        again = await put_back(other, sealed.json(), PHRASE)
        assert again.json()["created"] == []
        assert len(await other.parts.integrations.secret_values(name)) == 1, "twice is once"


async def test_an_import_makes_what_is_there_equal_to_the_document(shared: Rig) -> None:
    name = (await made(shared, description="old", config={"timeout_seconds": 5, "confirm_seconds": 60}))["name"]
    entry = {"name": name, "provider": "github", "description": "new", "config": {"timeout_seconds": 7}}
    answer = await put_back(shared, {"format": "broker-integrations/1", "integrations": [entry]})
    assert answer.json() == {"created": [], "updated": [name]}
    shown = (await shared.call("GET", f"/v1/integrations/{name}")).json()
    assert (shown["description"], shown["config"]) == ("new", {"timeout_seconds": 7})


async def test_an_import_writes_nothing_when_any_part_of_it_is_wrong(shared: Rig) -> None:
    fine, sealed = unused("fine-"), (await exported(shared, PHRASE)).json()["sealed_secrets"]
    good = {"name": fine, "provider": "github"}
    base = {"format": "broker-integrations/1", "integrations": [good]}
    existing = (await made(shared))["name"]
    wrong: list[tuple[Any, str | None]] = [
        ({**base, "format": "other"}, None),
        ({**base, "colour": "red"}, None),
        ({"format": base["format"]}, None),
        ({**base, "integrations": {}}, None),
        ({**base, "integrations": [good, good]}, None),
        ({**base, "integrations": [good, 5]}, None),
        ({**base, "integrations": [good, {"name": "UPPER", "provider": "github"}]}, None),
        ({**base, "integrations": [good, {"name": "x1", "provider": "absent"}]}, None),
        ({**base, "integrations": [good, {"name": "x1", "provider": "github", "config": {"a": 1}}]}, None),
        ({**base, "integrations": [good, {"name": "x1", "provider": "github", "scopes": [5]}]}, None),
        ({**base, "integrations": [good, {"name": existing, "provider": "google"}]}, None),
        ({**base, "integrations": [{**good, "client_secret": "plain"}]}, None),
        ({**base, "sealed_secrets": sealed}, None),
        ({**base, "sealed_secrets": sealed}, "another passphrase"),
        ({**base, "sealed_secrets": sealed}, PHRASE),  # secrets of integrations that are not in it
        ({**base, "sealed_secrets": {**sealed, "ciphertext": "AAAA"}}, PHRASE),
        ({**base, "sealed_secrets": "text"}, PHRASE),
    ]
    for document, phrase in wrong:
        check_problem(await put_back(shared, document, phrase), 400, "invalid_request")
    moving = {"name": existing, "provider": "github", "config": {"token_url": "https://evil.test/"}}
    document = {**base, "integrations": [good, moving]}
    check_problem(await put_back(shared, document, key=await operator(shared)), 403, "forbidden")
    check_problem(await shared.call("GET", f"/v1/integrations/{fine}"), 404, "not_found")


async def test_a_passphrase_is_long_enough_and_sent_once(shared: Rig) -> None:
    check_problem(await exported(shared, "too short"), 400, "invalid_request")
    auth = ("Authorization", f"Bearer {shared.admin_key}")
    for given in (
        [("X-Broker-Passphrase", "a" * 20), ("X-Broker-Passphrase", "b" * 20)],
        [("X-Broker-Passphrase", "")],
    ):
        check_problem(
            await shared.backend.get("/v1/integrations/export", headers=[auth, *given]), 400, "invalid_request"
        )
    raw: Any = {"Authorization": auth[1].encode(), "X-Broker-Passphrase": b"\xff" * 20}
    check_problem(await shared.backend.get("/v1/integrations/export", headers=raw), 400, "invalid_request")


# From the environment and a file


def loaded(folder: Path, environ: dict[str, str], **overrides: Any) -> Any:
    given = {"env": "development", "data_dir": folder, "return_to": "http://127.0.0.1:7777/app/**", **overrides}
    return load_settings(environ, directory=folder, **given)


async def test_a_client_id_and_secret_in_the_environment_are_enough_to_start_a_flow(tmp_path: Path) -> None:
    environ = {
        "GITHUB_CLIENT_ID": "Iv1.x",
        "GITHUB_CLIENT_SECRET": "CANARY-env",
        "OTHER_CLIENT_ID": "x",
        "GOOGLE_CLIENT_ID": "half",
    }
    async with open_parts(loaded(tmp_path, environ)) as parts:
        transport = httpx2.ASGITransport(app=create_app(parts))  # type: ignore[arg-type] # an ASGI application
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            answer = await http.get("/oauth/github/start")
        assert answer.status_code == 302
        assert answer.headers["location"].startswith("https://github.com/login/oauth/authorize?")
        assert "client_id=Iv1.x" in answer.headers["location"]
        assert [view.row.name for view in await parts.integrations.every()] == ["github"], "half a client is none"


async def test_later_starts_take_only_id_and_secret_from_the_environment(tmp_path: Path) -> None:
    environ = {"GITHUB_CLIENT_ID": "one", "GITHUB_CLIENT_SECRET": "first"}
    async with open_parts(loaded(tmp_path, environ)) as parts:
        view = await parts.integrations.get("github")
        assert view.row.scopes == ["read:user", "user:email"]
    for _ in range(2):
        async with open_parts(loaded(tmp_path, {"GITHUB_CLIENT_ID": "two", "GITHUB_CLIENT_SECRET": "second"})) as parts:
            assert (await parts.integrations.get("github")).row.client_id == "two"
            values = [value.reveal() for value in await parts.integrations.secret_values("github")]
            assert values == ["second", "first"]


@pytest.mark.parametrize("moved", [False, True], ids=["as configured", "endpoints changed by an admin"])
async def test_a_start_after_a_rotation_of_the_audits_key_knows_the_secret_of_the_environment(
    tmp_path: Path,
    moved: bool,  # noqa: FBT001 - a case
) -> None:
    settings = loaded(tmp_path, {"GITHUB_CLIENT_ID": "one", "GITHUB_CLIENT_SECRET": "first"})
    ghe = {
        "authorize_url": "https://ghe.test/authorize",
        "token_url": "https://ghe.test/token",
        "api_base_url": "https://ghe.test/api",
    }
    async with open_parts(settings) as parts:
        if moved:
            await parts.integrations.update(Draft("github", config=ghe, client_secret=Secret("first")), None)
        rotation = await parts.rotations.start("audit", actor="test")

        async def done() -> bool:
            return (await parts.rotations.advance(rotation.id)).state == "done"

        await eventually(done, seconds=30)
        (before,) = await parts.integrations.secrets("github")
    async with open_parts(settings) as parts:
        assert before.value_digest != parts.audit.digest("first"), "another key makes digests now"
        assert [row.id for row in await parts.integrations.secrets("github")] == [before.id]


async def test_replicas_that_start_at_once_make_one_integration_with_one_secret(
    tmp_path: Path, database_url: str
) -> None:
    file = tmp_path / "integrations.json"
    entry = {
        "name": "keycloak",
        "provider": "oidc",
        "client_id": "x",
        "client_secret": "y",
        "config": {"issuer": "http://127.0.0.1:9"},
    }
    file.write_text(json.dumps({"integrations": [entry]}))
    environ = {"GITHUB_CLIENT_ID": "one", "GITHUB_CLIENT_SECRET": "first"}
    settings = loaded(tmp_path, environ, database_url=database_url, integrations_file=file)
    async with open_parts(settings) as first, open_parts(settings) as second, open_parts(settings) as third:
        replicas = (first, second, third)
        for name in ("github", "keycloak"):
            await first.integrations.delete(name, None)
        await asyncio.gather(*(parts.integrations.create_from_settings() for parts in replicas))
        for table, expected in ((Integration, 2), (ClientSecret, 2)):
            assert await first.database.read(lambda session, t=table: len(session.exec(select(t)).all())) == expected  # type: ignore[misc] # a default argument
        secrets = await first.database.read(lambda session: list(session.exec(select(SealedSecret))))
        assert len([row for row in secrets if row.owner.startswith("integrations/")]) == 2


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"name": "UPPER", "provider": "oidc"}, "/name"),
        ({"name": "x", "provider": "absent"}, "/provider"),
        ({"name": "x", "provider": "oidc", "config": {"issuer": "ftp://x"}}, "/config/issuer"),
        ({"name": "github", "provider": "oidc", "config": {"issuer": "http://127.0.0.1:9"}}, "another provider"),
    ],
)
async def test_a_wrong_entry_stops_the_start(tmp_path: Path, entry: Any, told: str) -> None:
    file = tmp_path / "integrations.json"
    file.write_text(json.dumps({"integrations": [entry]}))
    environ = {"GITHUB_CLIENT_ID": "one", "GITHUB_CLIENT_SECRET": "first"}
    with pytest.raises(SettingsError, match=f"BROKER_INTEGRATIONS_FILE.*{told}"):
        async with open_parts(loaded(tmp_path, environ, integrations_file=file)):
            pass


async def test_the_environments_secret_never_goes_to_another_providers_integration(tmp_path: Path) -> None:
    file = tmp_path / "integrations.json"
    entry = {"name": "github", "provider": "oidc", "config": {"issuer": "http://127.0.0.1:9"}}
    file.write_text(json.dumps({"integrations": [entry]}))
    async with open_parts(loaded(tmp_path, {}, integrations_file=file)):
        pass
    with pytest.raises(SettingsError, match="GITHUB_CLIENT_ID"):
        async with open_parts(
            loaded(tmp_path, {"GITHUB_CLIENT_ID": DEMO_CLIENT_ID, "GITHUB_CLIENT_SECRET": DEMO_CLIENT_SECRET})
        ):
            pass


@pytest.mark.parametrize("source", ["environment", "file"])
async def test_a_secret_of_the_settings_never_goes_to_endpoints_that_they_do_not_name(
    tmp_path: Path, source: str
) -> None:
    file, moved = tmp_path / "integrations.json", {"token_url": "http://127.0.0.1:9/elsewhere"}
    entry = {"name": "github", "provider": "github", "client_id": "one", "client_secret": "first"}
    file.write_text(json.dumps({"integrations": [entry]}))
    environ = {"GITHUB_CLIENT_ID": "one", "GITHUB_CLIENT_SECRET": "first"}
    settings = loaded(tmp_path, environ) if source == "environment" else loaded(tmp_path, {}, integrations_file=file)
    async with open_parts(settings) as parts:
        await parts.integrations.update(Draft("github", config=moved), None)
    async with open_parts(settings) as parts:  # an admin moved it: the secret that is live there stays
        (secret,) = await parts.integrations.secrets("github")
        await parts.integrations.delete_secret("github", secret.id, None)
    setting = "GITHUB_CLIENT_ID" if source == "environment" else "BROKER_INTEGRATIONS_FILE"
    with pytest.raises(SettingsError, match=f"{setting}.*endpoints"):
        async with open_parts(settings):
            pass
    file.write_text(json.dumps({"integrations": [{**entry, "config": moved}]}))
    async with open_parts(loaded(tmp_path, {}, integrations_file=file)) as parts:
        assert len(await parts.integrations.secrets("github")) == 1
