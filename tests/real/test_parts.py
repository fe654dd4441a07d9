"""Proves the harness by itself: what the real parts check, what they let through, and how a dead token shows there."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote_plus, urlencode, urlsplit

import httpx2
import pytest

from tests.real.parts import (
    ADA_CLAIMS,
    ADA_EMAIL,
    ADA_LOGIN,
    DECOY_EMAIL,
    DECOY_LOGIN,
    HERE,
    Client,
    OidcServer,
    StartFailed,
    answers,
    consent_github,
    consent_google,
    consent_oidc,
    emulate,
    free_port,
    github_seed,
    node_process,
)

pytestmark = pytest.mark.real

VERIFIER = "a-verifier-of-at-least-forty-three-characters-0123456789"
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
PKCE = {"code_challenge": CHALLENGE, "code_challenge_method": "S256"}
OFFLINE = {"scope": "openid profile email offline_access", "prompt": "consent"}


def authorize_url(client: Client, path: str, **params: str) -> str:
    asked = {"response_type": "code", "client_id": client.client_id, "redirect_uri": client.redirect_uri, **params}
    return f"{client.base}{path}?{urlencode(asked)}"


def query_of(callback_url: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(callback_url).query).items()}


async def post(url: str, fields: dict[str, str], headers: dict[str, str] | None = None) -> httpx2.Response:
    async with httpx2.AsyncClient(trust_env=False) as http:
        return await http.post(url, data=fields, headers=headers)


async def get(url: str, token: str) -> httpx2.Response:
    async with httpx2.AsyncClient(trust_env=False) as http:
        return await http.get(url, headers={"Authorization": f"Bearer {token}"})


def body_authentication(client: Client) -> dict[str, str]:
    return {"client_id": client.client_id, "client_secret": client.client_secret}


def basic_authentication(client: Client) -> dict[str, str]:
    pair = f"{quote_plus(client.client_id)}:{quote_plus(client.client_secret)}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


# The house rules of this folder


def test_the_lock_holds_hashes_and_names_no_host() -> None:
    lock = json.loads((HERE / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages
    assert all(entry["integrity"].startswith("sha512-") and "resolved" not in entry for entry in packages.values())
    assert "://" not in json.dumps(lock), 'npm writes "funding" entries when the lock is made anew: delete them'
    assert packages["node_modules/emulate"]["version"] == "0.12.2"


def test_a_part_that_does_not_come_up_shows_what_it_printed(tmp_path: Path) -> None:
    script = "console.error('no port for me'); process.exit(3)"
    with (
        pytest.raises(StartFailed, match=r"(?s)status 3.*no port for me"),
        node_process(("-e", script), directory=tmp_path, ready=lambda _: False),
    ):
        pass


def test_a_port_that_was_taken_meanwhile_is_given_up_for_another(make_directory: Callable[[str], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        ports = iter([squatter.getsockname()[1], free_port()])
        seed = github_seed("id", "secret", "http://127.0.0.1:9/callback")
        with emulate(
            "github", seed, make_directory=make_directory, health_path="/versions", choose_port=lambda: next(ports)
        ) as base:
            assert answers(f"{base}/versions")
    assert not answers(f"{base}/versions"), "the part is still there after its block"


# emulate's GitHub


async def github_token(github: Client, **fields: str) -> dict[str, Any]:
    url = authorize_url(github, "/login/oauth/authorize", scope="read:user user:email", state="s1")
    came = query_of(await consent_github(url))
    assert came["state"] == "s1"
    sent = {**body_authentication(github), "code": came["code"], "redirect_uri": github.redirect_uri, **fields}
    answer = await post(f"{github.base}/login/oauth/access_token", sent, {"Accept": "application/json"})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_githubs_token_names_the_user_who_consented(github: Client) -> None:
    token = await github_token(github)
    user = await get(f"{github.base}/user", token["access_token"])
    assert user.json()["login"] == ADA_LOGIN


async def test_github_shows_the_decoy_for_a_token_that_it_never_issued(github: Client) -> None:
    user = await get(f"{github.base}/user", "gho_madeup")
    assert user.status_code == 200
    assert user.json()["login"] == DECOY_LOGIN


async def test_github_answers_a_wrong_secret_with_200_and_an_error(github: Client) -> None:
    answer = await github_token(github, client_secret="wrong")
    assert answer["error"] == "incorrect_client_credentials"
    assert "access_token" not in answer


async def test_github_refuses_a_redirect_address_that_is_not_registered(github: Client) -> None:
    url = authorize_url(github, "/login/oauth/authorize", redirect_uri="http://127.0.0.1:9/oauth/github/callback")
    async with httpx2.AsyncClient(trust_env=False) as http:
        answer = await http.get(url)
    assert answer.status_code == 400


# emulate's Google


async def google_token(google: Client, **fields: str) -> httpx2.Response:
    url = authorize_url(google, "/o/oauth2/v2/auth", scope="openid email profile", state="s2", nonce="n2", **PKCE)
    came = query_of(await consent_google(url))
    assert came["state"] == "s2"
    sent = {"grant_type": "authorization_code", "code": came["code"], "redirect_uri": google.redirect_uri}
    return await post(f"{google.base}/oauth2/token", {**sent, **body_authentication(google), **fields})


async def test_googles_code_flow_with_pkce_ends_in_an_id_token_of_the_user_who_consented(google: Client) -> None:
    answer = (await google_token(google, code_verifier=VERIFIER)).json()
    payload = answer["id_token"].split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert claims["iss"] == google.base
    assert claims["aud"] == google.client_id
    assert (claims["email"], claims["nonce"]) == (ADA_EMAIL, "n2")
    user = await get(f"{google.base}/oauth2/v2/userinfo", answer["access_token"])
    assert (user.json()["email"], user.json()["sub"]) == (ADA_EMAIL, claims["sub"])


async def test_google_shows_the_decoy_for_a_token_that_it_never_issued(google: Client) -> None:
    user = await get(f"{google.base}/oauth2/v2/userinfo", "google_madeup")
    assert user.json()["email"] == DECOY_EMAIL


async def test_google_refuses_a_code_with_the_wrong_verifier(google: Client) -> None:
    answer = await google_token(google, code_verifier=VERIFIER[::-1])
    assert answer.status_code == 400
    assert answer.json()["error"] == "invalid_grant"


# oidc-provider


async def oidc_token(oidc: OidcServer, **fields: str) -> httpx2.Response:
    url = authorize_url(oidc.basic, "/auth", state="s3", **OFFLINE, **PKCE)
    came = query_of(await consent_oidc(url))
    assert (came["state"], came["iss"]) == ("s3", oidc.issuer)
    sent = {"grant_type": "authorization_code", "code": came["code"], "redirect_uri": oidc.basic.redirect_uri, **fields}
    return await post(f"{oidc.issuer}/token", sent, basic_authentication(oidc.basic))


async def refreshed(oidc: OidcServer, refresh_token: str) -> httpx2.Response:
    sent = {"grant_type": "refresh_token", "refresh_token": refresh_token}
    return await post(f"{oidc.issuer}/token", sent, basic_authentication(oidc.basic))


async def test_oidc_provider_refuses_an_authorization_request_without_pkce(oidc: OidcServer) -> None:
    async with httpx2.AsyncClient(trust_env=False) as http:
        answer = await http.get(authorize_url(oidc.basic, "/auth", state="s4", **OFFLINE))
    came = query_of(answer.headers["location"])
    assert (came["error"], came["state"]) == ("invalid_request", "s4")


async def test_oidc_provider_refuses_a_code_without_or_with_a_wrong_verifier(oidc: OidcServer) -> None:
    assert (await oidc_token(oidc)).json()["error"] == "invalid_grant"
    assert (await oidc_token(oidc, code_verifier=VERIFIER[::-1])).json()["error"] == "invalid_grant"


async def test_oidc_provider_names_the_user_and_refuses_a_made_up_token(oidc: OidcServer) -> None:
    token = (await oidc_token(oidc, code_verifier=VERIFIER)).json()
    user = await get(f"{oidc.issuer}/me", token["access_token"])
    assert user.json() == {"sub": "ada", **ADA_CLAIMS}
    assert (await get(f"{oidc.issuer}/me", "madeup")).status_code == 401


async def test_oidc_provider_gives_no_refresh_token_where_consent_was_not_asked_for(oidc: OidcServer) -> None:
    url = authorize_url(oidc.post, "/auth", scope=OFFLINE["scope"], **PKCE)
    came = query_of(await consent_oidc(url))
    sent = {"grant_type": "authorization_code", "code": came["code"], "redirect_uri": oidc.post.redirect_uri}
    answer = await post(f"{oidc.issuer}/token", {**sent, **body_authentication(oidc.post), "code_verifier": VERIFIER})
    assert answer.status_code == 200, answer.text
    assert "refresh_token" not in answer.json()
    assert "offline_access" not in answer.json()["scope"].split()


async def test_oidc_provider_rotates_and_kills_the_whole_grant_on_reuse(oidc: OidcServer) -> None:
    first = (await oidc_token(oidc, code_verifier=VERIFIER)).json()
    second = (await refreshed(oidc, first["refresh_token"])).json()
    assert second["refresh_token"] != first["refresh_token"]
    assert (await get(f"{oidc.issuer}/me", second["access_token"])).status_code == 200

    reuse = await refreshed(oidc, first["refresh_token"])
    assert (reuse.status_code, reuse.json()["error"]) == (400, "invalid_grant")
    assert (await refreshed(oidc, second["refresh_token"])).json()["error"] == "invalid_grant"
    assert (await get(f"{oidc.issuer}/me", second["access_token"])).status_code == 401


async def test_oidc_providers_consent_page_can_be_declined(oidc: OidcServer) -> None:
    url = authorize_url(oidc.basic, "/auth", state="s5", **OFFLINE, **PKCE)
    came = query_of(await consent_oidc(url, decision="deny"))
    assert (came["error"], came["iss"]) == ("access_denied", oidc.issuer)
