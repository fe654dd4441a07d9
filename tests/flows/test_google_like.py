"""Google's ways: a refresh token comes only with a consent that was really shown, and a missing one is asked for once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytest_asyncio

from broker.demo.sandbox import Fault
from providers.spec import Secret
from tests.flows.rig import APP, Browser, Rig, landed
from tests.flows.shared import bearer, browser_of, flow, is_error, parameters, person, stored, subject

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def google(shared: Rig) -> AsyncIterator[Rig]:
    """Configure the provider `google` with every address pointing at the sandbox."""
    issuer = shared.sandbox.issuer
    urls = {f"{name}_url": f"{issuer}/{name}" for name in ("authorize", "token", "revoke", "jwks", "userinfo")}
    document = (await shared.backend.get(f"{issuer}/.well-known/openid-configuration")).json()
    urls["jwks_url"] = document["jwks_uri"]
    secret = "google-like-secret"
    shared.sandbox.state.add_client("google-like", [Secret(secret)], [f"{shared.base}/oauth/google/callback"])
    body: dict[str, Any] = {"name": "google", "provider": "google", "client_id": "google-like", "client_secret": secret}
    body["config"] = {"issuer": issuer, **urls}
    made = await shared.call("POST", "/v1/integrations", body)
    assert made.status_code == 201, made.text
    yield shared


@contextmanager
def refresh_tokens(rig: Rig, rule: str) -> Iterator[None]:
    """Let the sandbox give refresh tokens by this rule."""
    rig.sandbox.state.configure(refresh_tokens=rule)
    try:
        yield
    finally:
        rig.sandbox.state.configure(refresh_tokens="always")


async def asked_again(rig: Rig, browser: Browser, url: str, user: str) -> str:
    """Consent at `url` and open the callback; return where the broker asks for consent again."""
    answer = await browser.get(await rig.consent(url, user=user))
    assert answer.status_code == 302, answer.text
    return str(answer.headers["location"])


async def test_google_is_asked_for_offline_access_without_bothering_the_user_with_consent(google: Rig) -> None:
    asked = parameters(await google.begin(browser_of(google), "google"))
    assert asked["access_type"] == "offline"
    assert "prompt" not in asked
    assert asked["code_challenge_method"] == "S256"


async def test_a_first_connect_with_a_refresh_token_asks_once(google: Rig) -> None:
    with refresh_tokens(google, "like_google"):
        came = landed(await flow(google, user=person(), integration="google"))
    confirmed = await google.confirm(came, subject(), return_to=APP)
    assert confirmed.json()["status"] == "active"
    assert (await google.token(came["connection_id"], force_refresh=True)).status_code == 200


async def test_a_first_connect_without_a_refresh_token_asks_for_consent_once_by_itself(google: Rig) -> None:
    browser, user, before = browser_of(google), person(), await stored(google)
    with refresh_tokens(google, "prompt_consent"):
        first = await google.begin(browser, "google")
        again = await asked_again(google, browser, first, user)
        assert await stored(google) == before
        assert parameters(again)["prompt"] == "consent"
        assert parameters(again)["access_type"] == "offline"
        assert parameters(again)["redirect_uri"] == parameters(first)["redirect_uri"]
        for name in ("state", "nonce", "code_challenge"):
            assert parameters(again)[name] != parameters(first)[name]
        came = landed(await browser.get(await google.consent(again, user=user)))
    assert came["status"] == "connected"
    confirmed = await google.confirm(came, subject(), return_to=APP)
    assert confirmed.json()["status"] == "active"
    refreshed = await google.token(came["connection_id"], force_refresh=True)
    assert (await google.whoami(refreshed.json()["access_token"])).status_code == 200


async def test_the_second_flow_belongs_to_the_same_browser_and_a_duplicate_of_the_first_is_sent_to_it(
    google: Rig,
) -> None:
    browser, user = browser_of(google), person()
    with refresh_tokens(google, "prompt_consent"):
        callback = await google.consent(await google.begin(browser, "google"), user=user)
        first, second = await browser.get(callback), await browser.get(callback)
        assert (first.status_code, first.headers["location"]) == (second.status_code, second.headers["location"])
        finished = await google.consent(str(first.headers["location"]), user=user)
    assert (await browser_of(google).get(finished)).status_code == 400
    assert landed(await browser.get(finished))["status"] == "connected"


async def test_a_second_refusal_of_a_refresh_token_is_an_error_and_no_third_question(google: Rig) -> None:
    browser, user, before = browser_of(google), person(), await stored(google)
    with refresh_tokens(google, "never"):
        again = await asked_again(google, browser, await google.begin(browser, "google"), user)
        answer = await browser.get(await google.consent(again, user=user))
    assert is_error(answer, "refresh_token_missing")
    assert await stored(google) == before


async def test_a_later_login_with_a_session_keeps_the_old_refresh_token_and_asks_nobody(google: Rig) -> None:
    owner, user = subject(), person()
    with refresh_tokens(google, "like_google"):
        first = await google.confirm(landed(await flow(google, user=user, integration="google")), owner, return_to=APP)
        old = await bearer(google, first.json()["id"])
        _, before = await google.parts.vault.get(f"connections/{first.json()['id']}")
        session = await google.session(owner, integrations=["google"], return_to=APP)
        came = landed(await flow(google, user=user, integration="google", session=session["token"]))
        merged = await google.confirm(came, owner)
    assert merged.json()["id"] == first.json()["id"]
    _, after = await google.parts.vault.get(f"connections/{first.json()['id']}")
    assert after["refresh_token"] == before["refresh_token"]
    assert await bearer(google, first.json()["id"]) != old
    refreshed = await google.token(first.json()["id"], force_refresh=True)
    assert (await google.whoami(refreshed.json()["access_token"])).status_code == 200


async def test_a_later_login_without_a_session_asks_again_because_nobody_is_known_to_have_one(google: Rig) -> None:
    browser, user = browser_of(google), person()
    with refresh_tokens(google, "like_google"):
        await google.confirm(landed(await flow(google, user=user, integration="google")), subject(), return_to=APP)
        again = await asked_again(google, browser, await google.begin(browser, "google"), user)
        assert landed(await browser.get(await google.consent(again, user=user)))["status"] == "connected"


async def test_a_login_after_the_old_refresh_token_died_asks_again(google: Rig) -> None:
    owner, user = subject(), person()
    with refresh_tokens(google, "prompt_consent"):
        browser = browser_of(google)
        again = await asked_again(google, browser, await google.begin(browser, "google"), user)
        came = landed(await browser.get(await google.consent(again, user=user)))
        connection = (await google.confirm(came, owner, return_to=APP)).json()
        google.sandbox.state.kill_account(user)
        assert (await google.token(connection["id"], force_refresh=True)).status_code == 409
        session = await google.session(owner, integrations=["google"], return_to=APP)
        url = await google.begin(browser, "google", session=session["token"])
        again = await asked_again(google, browser, url, user)
        came = landed(await browser.get(await google.consent(again, user=user)))
    assert (await google.confirm(came, owner)).json()["status"] == "active"


async def test_the_alias_of_googles_issuer_is_not_accepted_from_another_issuer(google: Rig) -> None:
    spoilt = Fault(kind="id_token", grant_type="authorization_code", claims={"iss": "accounts.google.com"})
    google.sandbox.state.add_fault(spoilt)
    assert is_error(await flow(google, user=person(), integration="google"), "identity_invalid")


async def test_a_retryable_refusal_of_the_exchange_is_the_providers_trouble(google: Rig) -> None:
    body = {"error": "invalid_grant", "error_description": "internal_failure"}
    google.sandbox.state.add_fault(Fault(kind="answer", status=400, body=body))
    assert is_error(await flow(google, user=person(), integration="google"), "provider_unavailable")
