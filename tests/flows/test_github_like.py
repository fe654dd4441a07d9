"""GitHub's ways: errors come with status 200, scopes with commas, and the account from the API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from tests.fakes import Fake, Reply, Seen, listening
from tests.flows.rig import APP, Rig, landed
from tests.flows.shared import bearer, browser_of, changed, is_error, parameters, stored, subject

pytestmark = pytest.mark.asyncio(loop_scope="module")
ADA = {"id": 4711, "login": "ada", "email": "ada@good.test"}


@dataclass
class Hub:
    """A GitHub on loopback: what its token endpoint and `GET /user` answer next."""

    rig: Rig
    fake: Fake
    token: Reply = (200, {})
    user: Reply = (200, ADA)
    usual: dict[str, Any] = field(default_factory=dict)

    async def flow(self, *, token: Reply | None = None, user: Reply = (200, ADA), **came: str) -> httpx2.Response:
        """Run a flow; the provider's side of the browser's way is written by hand."""
        self.token, self.user = token or (200, self.usual), user
        browser = browser_of(self.rig)
        url = await self.rig.begin(browser, "github")
        back = f"{self.rig.base}/oauth/github/callback"
        return await browser.get(changed(back, state=parameters(url)["state"], **(came or {"code": "the-code"})))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hub(shared: Rig) -> AsyncIterator[Hub]:
    """Configure the provider `github` as an enterprise server of one's own."""
    hubs: list[Hub] = []

    def answer(seen: Seen) -> Reply:
        return {"/login/oauth/access_token": hubs[0].token, "/api/v3/user": hubs[0].user}.get(seen.path, (404, {}))

    async with listening(answer) as fake:
        usual = {"access_token": "gho_usual", "token_type": "bearer", "scope": "read:user,user:email"}
        hubs.append(Hub(shared, fake, usual=usual))
        body: dict[str, Any] = {
            "name": "github",
            "provider": "github",
            "client_id": "hub",
            "client_secret": "hub-secret",
        }
        body["config"] = {
            "authorize_url": f"{fake.base}/login/oauth/authorize",
            "token_url": f"{fake.base}/login/oauth/access_token",
            "api_base_url": f"{fake.base}/api/v3",
        }
        made = await shared.call("POST", "/v1/integrations", body)
        assert made.status_code == 201, made.text
        yield hubs[0]


async def test_the_account_comes_from_the_api_and_scopes_with_commas_are_understood(hub: Hub) -> None:
    came = landed(await hub.flow())
    assert set(came) == {"status", "connection_id", "confirm"}
    connection = (await hub.rig.confirm(came, subject(), return_to=APP)).json()
    assert connection["account"] == {"id": "4711", "name": "ada", "email": "ada@good.test"}
    assert connection["scopes"] == ["read:user", "user:email"]
    assert connection["missing_scopes"] == []
    assert await bearer(hub.rig, connection["id"]) == "gho_usual"
    exchange, identity = hub.fake.seen[-2:]
    assert exchange.form["code"] == "the-code"
    assert len(exchange.form["code_verifier"]) == 43
    assert exchange.headers["accept"] == "application/json"
    assert identity.headers["authorization"] == "Bearer gho_usual"
    assert (identity.method, identity.path) == ("GET", "/api/v3/user")


async def test_what_is_asked_for_has_pkce_and_no_nonce(hub: Hub) -> None:
    asked = parameters(await hub.rig.begin(browser_of(hub.rig), "github"))
    assert asked["code_challenge_method"] == "S256"
    assert asked["scope"] == "read:user user:email"
    assert "nonce" not in asked


async def test_scopes_that_were_not_granted_are_named_and_those_inside_a_wider_one_are_not(hub: Hub) -> None:
    fewer = landed(await hub.flow(token=(200, {**hub.usual, "scope": "read:user"})))
    assert fewer["missing_scopes"] == "user:email"
    assert "missing_scopes" not in landed(await hub.flow(token=(200, {**hub.usual, "scope": "user"})))
    none = landed(await hub.flow(token=(200, {**hub.usual, "scope": ""})))
    assert none["missing_scopes"] == "read:user user:email"


@pytest.mark.parametrize(
    "error", ["bad_verification_code", "incorrect_client_credentials", "redirect_uri_mismatch", "new"]
)
async def test_an_error_with_status_200_is_no_token_and_its_text_goes_nowhere(hub: Hub, error: str) -> None:
    before = await stored(hub.rig)
    body = {
        "error": error,
        "error_description": "canary-text",
        "error_uri": "https://canary-text.test",
        "access_token": "x",
    }
    answer = await hub.flow(token=(200, body))
    assert is_error(answer, "exchange_failed")
    assert "canary" not in str(answer.headers) + answer.text
    assert await stored(hub.rig) == before


@pytest.mark.parametrize(
    ("user", "code"),
    [
        ((200, {}), "identity_invalid"),
        ((200, {"id": "4711"}), "identity_invalid"),
        ((200, {"id": True}), "identity_invalid"),
        ((200, b"<html>"), "identity_invalid"),
        ((401, {"message": "Bad credentials"}), "identity_invalid"),
        ((200, {"id": int("9" * 300)}), "identity_invalid"),
    ],
)
async def test_without_an_account_there_is_no_connection(hub: Hub, user: Reply, code: str) -> None:
    before = await stored(hub.rig)
    assert is_error(await hub.flow(user=user), code)
    assert await stored(hub.rig) == before


async def test_an_odd_name_or_address_of_an_account_is_left_out(hub: Hub) -> None:
    came = landed(await hub.flow(user=(200, {"id": 1, "login": "a\u202eb", "email": "x" * 300})))
    connection = (await hub.rig.confirm(came, subject(), return_to=APP)).json()
    assert connection["account"] == {"id": "1", "name": None, "email": None}


async def test_a_redirect_of_the_api_is_not_followed(hub: Hub) -> None:
    seen = len(hub.fake.seen)
    answer = await hub.flow(user=(302, {}))
    assert landed(answer)["error"] in {"identity_invalid", "provider_unavailable"}
    assert len(hub.fake.seen) == seen + 2


async def test_a_refused_consent_and_an_unknown_error_come_back_as_codes(hub: Hub) -> None:
    assert is_error(await hub.flow(error="access_denied", error_description="canary"), "access_denied")
    assert is_error(await hub.flow(error="application_suspended"), "provider_error")


async def test_the_expiring_tokens_of_an_app_bring_their_refresh_token_and_no_scopes(hub: Hub) -> None:
    answer = {
        "access_token": "ghu_app",
        "expires_in": 28800,
        "refresh_token": "ghr_app",
        "scope": "",
        "token_type": "bearer",
    }
    came = landed(await hub.flow(token=(200, {**answer, "refresh_token_expires_in": 15811200})))
    assert "missing_scopes" not in came
    connection = (await hub.rig.confirm(came, subject(), return_to=APP)).json()
    assert connection["expires_at"] is not None
    assert connection["refresh_expires_at"] is not None
    assert connection["missing_scopes"] == []


async def test_another_account_of_the_same_subject_is_another_connection(hub: Hub) -> None:
    owner, ids = subject(), []
    for number in (1, 2, 1):
        came = landed(await hub.flow(user=(200, {"id": number, "login": "renamed"})))
        ids.append((await hub.rig.confirm(came, owner, return_to=APP)).json()["id"])
    assert ids[0] == ids[2] != ids[1]
