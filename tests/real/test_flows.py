"""The broker's flows against servers that no one here wrote: emulate's GitHub and Google, and oidc-provider."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest

from broker.app import create_app, open_parts
from broker.callers import mint_key
from broker.refresh import REFUSED_EVERY_SECONDS
from tests.flows.rig import APP, Browser, landed, serving, settings_for
from tests.real.parts import (
    ADA_CLAIMS,
    ADA_EMAIL,
    ADA_LOGIN,
    GRACE_CLAIMS,
    Client,
    OidcServer,
    consent_github,
    consent_google,
    consent_oidc,
    type_in,
    withdraw_grants,
)

pytestmark = pytest.mark.real

Consent = Callable[[str], Awaitable[str]]
SUBJECT = "acme:42"


@dataclass(frozen=True, slots=True)
class Broker:
    """A running broker, seen by its operator, by an app's backend, and by browsers."""

    base: str
    backend: httpx2.AsyncClient
    admin_key: str = field(repr=False)
    service_key: str = field(repr=False)
    poll_devices: Callable[[], Awaitable[object]]

    async def call(self, method: str, path: str, body: Any = None, *, admin: bool = False) -> httpx2.Response:
        """Call ``/v1`` as the app's backend, or as the operator."""
        key = self.admin_key if admin else self.service_key
        return await self.backend.request(method, path, json=body, headers={"Authorization": f"Bearer {key}"})

    async def integrate(self, name: str, provider: str, client: Client, scopes: str, **config: Any) -> None:
        """Configure an integration for a part's client."""
        body = {
            "name": name,
            "provider": provider,
            "client_id": client.client_id,
            "client_secret": client.client_secret,
            "scopes": scopes.split(),
            "config": config,
        }
        made = await self.call("POST", "/v1/integrations", body, admin=True)
        assert made.status_code == 201, made.text

    async def begin(self, browser: Browser, integration: str, session: str | None = None) -> str:
        """Open the start link; return the authorize URL at the provider."""
        query = urlencode({"return_to": APP, **({"session": session} if session else {})})
        answer = await browser.get(f"/oauth/{integration}/start?{query}")
        if answer.status_code == 303:  # the session's token was taken out of the URL
            answer = await browser.get(answer.headers["location"])
        assert answer.status_code == 302, answer.text
        return str(answer.headers["location"])

    async def came_back(self, browser: Browser, callback_url: str) -> dict[str, str]:
        """Open the callback; return what reaches the app."""
        answer = await browser.get(callback_url)
        assert answer.status_code == 303, answer.text
        return landed(answer)

    async def connect(self, integration: str, consent: Consent) -> dict[str, Any]:
        """Run start, consent, callback and confirm; return the connection."""
        async with a_browser(self.base) as browser:
            came = await self.came_back(browser, await consent(await self.begin(browser, integration)))
        assert came["status"] == "connected", came
        body = {"code": came["confirm"], "subject": SUBJECT, "return_to": APP}
        answer = await self.call("POST", f"/v1/connections/{came['connection_id']}/confirm", body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def token(self, connection: dict[str, Any], **body: Any) -> str:
        """Return a token that is handed out to the app's backend."""
        answer = await self.call("POST", f"/v1/connections/{connection['id']}/token", body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["stale"] is False
        return str(answer.json()["access_token"])

    async def show(self, connection: dict[str, Any]) -> dict[str, Any]:
        """Return the connection as it is now."""
        return dict((await self.call("GET", f"/v1/connections/{connection['id']}")).json())

    async def disconnect(self, connection: dict[str, Any]) -> str:
        """Delete the connection; return what became of its credential."""
        answer = await self.call("DELETE", f"/v1/connections/{connection['id']}")
        assert answer.status_code == 200, answer.text
        assert (await self.call("GET", f"/v1/connections/{connection['id']}")).status_code == 404
        return str(answer.json()["revocation"])


@contextlib.asynccontextmanager
async def a_browser(base: str) -> AsyncIterator[Browser]:
    """Give a fresh browser."""
    browser = Browser(base)
    try:
        yield browser
    finally:
        await browser.http.aclose()


@pytest.fixture
async def broker(tmp_path: Path, broker_url: str, broker_listener: socket.socket) -> AsyncIterator[Broker]:
    """Run a broker on embedded defaults, with an app's backend as its caller."""
    admin_key = mint_key()[1].reveal()
    async with (
        open_parts(settings_for(tmp_path, broker_url, admin_key=admin_key)) as parts,
        serving(create_app(parts), broker_listener.dup()),
        httpx2.AsyncClient(base_url=broker_url, trust_env=False, timeout=60) as backend,
    ):
        grant = {"integrations": ["*"], "may": ["connect", "read", "token", "manage"], "subjects": ["acme:*"]}
        body = {"name": "app", "roles": ["service"], "grants": [grant]}
        made = await backend.post("/v1/callers", json=body, headers={"Authorization": f"Bearer {admin_key}"})
        assert made.status_code == 201, made.text
        yield Broker(broker_url, backend, admin_key, made.json()["key"], parts.device_flows.poll_due)


async def integrate_github(broker: Broker, github: Client) -> None:
    await broker.integrate(
        "github",
        "github",
        github,
        "read:user user:email",
        authorize_url=f"{github.base}/login/oauth/authorize",
        token_url=f"{github.base}/login/oauth/access_token",
        api_base_url=github.base,
    )


async def integrate_google(broker: Broker, google: Client) -> None:
    await broker.integrate(
        "google",
        "google",
        google,
        "openid email profile",
        issuer=google.base,
        authorize_url=f"{google.base}/o/oauth2/v2/auth",
        token_url=f"{google.base}/oauth2/token",
        revoke_url=f"{google.base}/oauth2/revoke",
        userinfo_url=f"{google.base}/oauth2/v2/userinfo",
        jwks_url=f"{google.base}/oauth2/v3/certs",
        api_base_url=google.base,
    )


async def integrate_oidc(broker: Broker, client: Client, kind: str) -> str:
    """Configure everything by discovery; return the integration's name."""
    scopes = "openid profile email offline_access"
    config = {"issuer": client.base, "client_auth": f"client_secret_{kind}"}
    await broker.integrate(f"oidc-{kind}", "oidc", client, scopes, **config)
    return f"oidc-{kind}"


async def asked(url: str, token: str) -> httpx2.Response:
    """Call a part's API with a token."""
    async with httpx2.AsyncClient(trust_env=False) as http:
        return await http.get(url, headers={"Authorization": f"Bearer {token}"})


async def alive(client: Client, token: str) -> bool:
    """Whether oidc-provider's introspection (RFC 7662) says that a token is active."""
    fields = {"token": token, "client_id": client.client_id, "client_secret": client.client_secret}
    async with httpx2.AsyncClient(trust_env=False) as http:
        answer = await http.post(f"{client.base}/token/introspection", data=fields)
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["active"])


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


# emulate's GitHub


async def test_a_github_account_is_connected_and_its_token_names_the_user_who_consented(
    broker: Broker, github: Client
) -> None:
    await integrate_github(broker, github)
    connection = await broker.connect("github", consent_github)
    assert (connection["status"], connection["subject"]) == ("active", SUBJECT)
    assert connection["account"]["name"] == ADA_LOGIN
    assert sorted(connection["scopes"]) == ["read:user", "user:email"]
    assert connection["missing_scopes"] == []

    user = (await asked(f"{github.base}/user", await broker.token(connection))).json()
    assert user["login"] == ADA_LOGIN, "the decoy is what emulate shows for a dead token"
    assert connection["account"]["id"] == str(user["id"])


async def test_a_github_token_that_does_not_expire_cannot_be_refreshed(broker: Broker, github: Client) -> None:
    await integrate_github(broker, github)
    connection = await broker.connect("github", consent_github)
    assert connection["expires_at"] is None
    answer = await broker.call("POST", f"/v1/connections/{connection['id']}/token", {"force_refresh": True})
    assert (answer.status_code, answer.json()["code"]) == (409, "not_refreshable")


async def test_githubs_refusal_with_status_200_is_an_error_and_leaves_no_connection(
    broker: Broker, github: Client
) -> None:
    wrong = Client(github.base, github.client_id, "not the secret", github.redirect_uri)
    await integrate_github(broker, wrong)
    async with a_browser(broker.base) as browser:
        came = await broker.came_back(browser, await consent_github(await broker.begin(browser, "github")))
    assert came == {"status": "error", "error": "exchange_failed"}
    assert (await broker.call("GET", "/v1/connections", admin=True)).json()["data"] == []


# emulate's Google


async def test_a_google_account_is_connected_refreshed_and_disconnected(broker: Broker, google: Client) -> None:
    await integrate_google(broker, google)
    connection = await broker.connect("google", consent_google)
    assert connection["status"] == "active"
    assert (connection["account"]["email"], connection["account"]["name"]) == (ADA_EMAIL, "Ada Lovelace")
    assert connection["missing_scopes"] == []

    first = await broker.token(connection)
    second = await broker.token(connection, force_refresh=True)
    await asyncio.sleep(REFUSED_EVERY_SECONDS)
    third = await broker.token(connection, not_token_sha256=sha256(second))  # with the same refresh token again
    assert len({first, second, third}) == 3
    for token in (first, second, third):
        user = (await asked(f"{google.base}/oauth2/v2/userinfo", token)).json()
        assert user["email"] == ADA_EMAIL, "the decoy is what emulate shows for a dead token"
        assert user["sub"] == connection["account"]["id"]
    assert await broker.disconnect(connection) == "revoked"


async def test_a_session_ties_a_google_connection_to_its_own_subject(broker: Broker, google: Client) -> None:
    await integrate_google(broker, google)
    wanted = {"subject": SUBJECT, "integrations": ["google"], "return_to": APP}
    session = (await broker.call("POST", "/v1/sessions", wanted)).json()
    async with a_browser(broker.base) as browser:
        authorize_url = await broker.begin(browser, "google", session["token"])
        came = await broker.came_back(browser, await consent_google(authorize_url))
    path = f"/v1/connections/{came['connection_id']}"
    assert (await broker.call("POST", f"{path}/token", {})).status_code != 200, "pending yields nothing"
    answer = await broker.call("POST", f"{path}/confirm", {"code": came["confirm"], "subject": SUBJECT})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["status"], answer.json()["subject"]) == ("active", SUBJECT)


# oidc-provider


@pytest.mark.parametrize("kind", ["basic", "post"])
async def test_a_strict_servers_account_lives_through_refreshes_and_dies_with_its_grant_on_delete(
    broker: Broker, oidc: OidcServer, kind: str
) -> None:
    client = oidc.basic if kind == "basic" else oidc.post
    connection = await broker.connect(await integrate_oidc(broker, client, kind), consent_oidc)
    assert connection["status"] == "active"
    account = {"id": "ada", "name": ADA_CLAIMS["name"], "email": ADA_CLAIMS["email"]}
    assert connection["account"] == account
    assert connection["missing_scopes"] == []

    first = await broker.token(connection)
    assert (await asked(f"{oidc.issuer}/me", first)).json()["sub"] == "ada"
    second = await broker.token(connection, force_refresh=True)
    await asyncio.sleep(REFUSED_EVERY_SECONDS)
    third = await broker.token(connection, not_token_sha256=sha256(second))  # with what the first refresh rotated to
    assert len({first, second, third}) == 3
    for token in (first, second, third):  # the grant is alive: no refresh token was used twice
        assert (await asked(f"{oidc.issuer}/me", token)).json()["sub"] == "ada"

    assert [await alive(oidc.post, token) for token in (first, second, third)] == [True] * 3
    assert await broker.disconnect(connection) == "revoked"
    assert [await alive(oidc.post, token) for token in (first, second, third)] == [False] * 3
    assert (await asked(f"{oidc.issuer}/me", third)).status_code == 401


async def test_a_token_of_the_right_age_is_handed_out_again_without_a_refresh(broker: Broker, oidc: OidcServer) -> None:
    connection = await broker.connect(await integrate_oidc(broker, oidc.basic, "basic"), consent_oidc)
    first = await broker.token(connection)
    assert await broker.token(connection) == first
    assert (await broker.show(connection))["refreshed_at"] is None


async def test_a_withdrawn_grant_asks_for_a_new_consent_which_revives_the_same_connection(
    broker: Broker, oidc: OidcServer
) -> None:
    integration = await integrate_oidc(broker, oidc.post, "post")
    connection = await broker.connect(integration, consent_as_grace)
    await withdraw_grants(oidc.issuer, "grace")
    answer = await broker.call("POST", f"/v1/connections/{connection['id']}/token", {"force_refresh": True})
    assert (answer.status_code, answer.json()["code"]) == (409, "reauthorization_required")
    assert (await broker.show(connection))["status"] == "reauthorization_required"

    again = await broker.connect(integration, consent_as_grace)
    assert (again["id"], again["status"]) == (connection["id"], "active")
    user = await asked(f"{oidc.issuer}/me", await broker.token(again))
    assert user.json() == {"sub": "grace", **GRACE_CLAIMS}


async def consent_as_grace(authorize_url: str) -> str:
    return await consent_oidc(authorize_url, account="grace")


async def test_a_code_of_another_flow_does_not_pass_the_servers_pkce_check(broker: Broker, oidc: OidcServer) -> None:
    integration = await integrate_oidc(broker, oidc.basic, "basic")
    async with a_browser(broker.base) as browser:
        mine, other = [await consent_oidc(await broker.begin(browser, integration)) for _ in range(2)]
        codes = [parse_qs(urlsplit(url).query)["code"][0] for url in (mine, other)]
        came = await broker.came_back(browser, mine.replace(codes[0], codes[1]))
    assert came == {"status": "error", "error": "exchange_failed"}


async def test_a_declined_consent_comes_back_as_access_denied(broker: Broker, oidc: OidcServer) -> None:
    integration = await integrate_oidc(broker, oidc.basic, "basic")
    async with a_browser(broker.base) as browser:
        authorize_url = await broker.begin(browser, integration)
        came = await broker.came_back(browser, await consent_oidc(authorize_url, decision="deny"))
    assert came == {"status": "error", "error": "access_denied"}


# The operator's test of an integration


@pytest.mark.parametrize("secret_is_right", [True, False])
@pytest.mark.parametrize("name", ["github", "google", "oidc-basic", "oidc-post"])
async def test_the_operators_test_proves_or_disproves_the_clients_credentials(
    broker: Broker, github: Client, google: Client, oidc: OidcServer, name: str, *, secret_is_right: bool
) -> None:
    right = {"github": github, "google": google, "oidc-basic": oidc.basic, "oidc-post": oidc.post}[name]
    secret = right.client_secret if secret_is_right else "not the secret"
    client = Client(right.base, right.client_id, secret, right.redirect_uri)
    if name == "github":
        await integrate_github(broker, client)
    elif name == "google":
        await integrate_google(broker, client)
    else:
        await integrate_oidc(broker, client, name.removeprefix("oidc-"))
    answer = await broker.call("POST", f"/v1/integrations/{name}/test", admin=True)
    assert answer.status_code == 200, answer.text
    assert answer.json()["ok"] is secret_is_right, answer.text
    assert {check["name"]: check["ok"] for check in answer.json()["checks"]}["client"] is secret_is_right


# What needs no browser, and a client without a shared secret


async def integrate_key(broker: Broker, oidc: OidcServer) -> None:
    scopes = "openid profile email offline_access"
    await broker.integrate("oidc-key", "oidc", oidc.key, scopes, issuer=oidc.issuer, client_auth="private_key_jwt")


async def test_a_client_that_signs_connects_and_refreshes(broker: Broker, oidc: OidcServer) -> None:
    await integrate_key(broker, oidc)
    connection = await broker.connect("oidc-key", consent_oidc)
    assert connection["account"]["id"] == "ada"
    first = await broker.token(connection)
    second = await broker.token(connection, not_token_sha256=hashlib.sha256(first.encode()).hexdigest())
    assert second != first
    assert await broker.disconnect(connection) == "revoked"


async def test_the_test_of_an_integration_proves_a_signing_client(broker: Broker, oidc: OidcServer) -> None:
    await integrate_key(broker, oidc)
    answer = await broker.call("POST", "/v1/integrations/oidc-key/test", admin=True)
    assert answer.json()["ok"] is True, answer.text


async def test_client_credentials_are_minted_and_shared(broker: Broker, oidc: OidcServer) -> None:
    await integrate_key(broker, oidc)
    body = {"integration": "oidc-key", "subject": SUBJECT, "credentials": {"type": "client_credentials", "scopes": []}}
    made = await broker.call("POST", "/v1/connections", body)
    assert made.status_code == 201, made.text
    tokens = await asyncio.gather(*(broker.token(made.json()) for _ in range(5)))
    assert len(set(tokens)) == 1
    assert (await broker.show(made.json()))["expires_at"] is not None


async def test_a_device_flow_ends_in_a_connection_that_refreshes(broker: Broker, oidc: OidcServer) -> None:
    await integrate_key(broker, oidc)
    started = await broker.call("POST", "/v1/device-flows", {"integration": "oidc-key", "subject": SUBJECT})
    assert started.status_code == 201, started.text
    flow = started.json()
    assert (await broker.call("GET", f"/v1/device-flows/{flow['id']}")).json()["status"] == "pending"
    await type_in(flow["verification_uri"], flow["user_code"])
    async with asyncio.timeout(30):
        while (seen := (await broker.call("GET", f"/v1/device-flows/{flow['id']}")).json())["status"] == "pending":
            await broker.poll_devices()
            await asyncio.sleep(0.2)
    assert seen["status"] == "connected", seen
    connection = (await broker.call("GET", f"/v1/connections/{seen['connection_id']}")).json()
    assert (connection["account"]["id"], connection["status"]) == ("ada", "active")
    first = await broker.token(connection)
    assert await broker.token(connection, not_token_sha256=hashlib.sha256(first.encode()).hexdigest()) != first
