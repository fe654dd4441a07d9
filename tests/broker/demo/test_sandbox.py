"""The sandbox provider is strict, exact about what it saw, and misbehaves precisely as told: over real HTTP."""

import asyncio
import base64
import hashlib
import json
import logging
import os
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import httpx2
import pytest
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from authlib.oauth2.rfc9207 import AuthorizationServerMetadata as IssuerMetadata
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.errors import BadSignatureError
from joserfc.jwk import KeySet, RSAKey

from broker.demo.sandbox import (
    DEMO_CLIENT_ID,
    DEMO_CLIENT_SECRET,
    FAULTS,
    Answer,
    Fault,
    Grant,
    RefreshToken,
    Request,
    Sandbox,
    SandboxOptions,
    TokenAnswer,
    create_sandbox,
    fault,
    is_loopback,
    is_safe_redirect,
    judge_refresh_token,
    main,
    run_sandbox,
    serve_sandbox,
    sha256,
)
from providers.spec import Secret

CALLBACK = "http://127.0.0.1:8000/oauth/sandbox/callback"
VERIFIER = "a-verifier-of-at-least-forty-three-characters-0"
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
DEMO = (DEMO_CLIENT_ID, DEMO_CLIENT_SECRET)
FORM = {"content-type": "application/x-www-form-urlencoded"}


class Clock:
    """A clock that moves by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Caller:
    """A client application with a browser, over real HTTP."""

    sandbox: Sandbox
    http: httpx2.AsyncClient

    async def authorize(self, *, headers: dict[str, str] | None = None, **changes: Any) -> httpx2.Response:
        asked: dict[str, str | None] = {
            "response_type": "code",
            "client_id": DEMO_CLIENT_ID,
            "redirect_uri": CALLBACK,
            "scope": "openid profile email read",
            "state": "the-state",
            "nonce": "the-nonce",
            "code_challenge": CHALLENGE,
            "code_challenge_method": "S256",
        }
        sent = {name: value for name, value in {**asked, **changes}.items() if value is not None}
        return await self.http.get("/authorize", params=sent, headers=headers or {"x-sandbox-decision": "allow"})

    async def code(self, **changes: Any) -> str:
        return callback(await self.authorize(**changes))["code"]

    async def token(self, *, auth: tuple[str, str] | None = DEMO, **form: Any) -> httpx2.Response:
        return await self.http.post(
            "/token", data=form, auth=httpx2.BasicAuth(*auth) if auth else httpx2.USE_CLIENT_DEFAULT
        )

    async def exchange(self, code: str, **changes: Any) -> httpx2.Response:
        form = {"code": code, "redirect_uri": CALLBACK, "code_verifier": VERIFIER, **changes}
        return await self.token(grant_type="authorization_code", **form)

    async def connect(self, **changes: Any) -> dict[str, Any]:
        answer = await self.exchange(await self.code(**changes))
        assert answer.status_code == 200
        return dict(answer.json())

    async def refresh(self, refresh_token: str, **changes: Any) -> httpx2.Response:
        return await self.token(grant_type="refresh_token", refresh_token=refresh_token, **changes)

    async def api(self, access_token: str, path: str = "/api/me") -> httpx2.Response:
        return await self.http.get(path, headers=bearer(access_token))


def bearer(access_token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {access_token}"}


def callback(answer: httpx2.Response) -> dict[str, str]:
    assert answer.status_code == 302
    assert answer.headers["location"].startswith(CALLBACK + "?")
    return dict(parse_qsl(urlsplit(answer.headers["location"]).query))


@pytest.fixture(scope="session")
def signing_key() -> RSAKey:
    return RSAKey.generate_key(2048, {"kid": "of-the-tests", "use": "sig", "alg": "RS256"})


@pytest.fixture(scope="session")
def plain() -> ssl.SSLContext:
    """No certificates: reading the store for each client takes longer than most tests."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@pytest.fixture
def clock() -> Clock:
    return Clock()


Opener = Callable[..., Any]


@pytest.fixture
def opened(signing_key: RSAKey, clock: Clock, plain: ssl.SSLContext) -> Opener:
    @asynccontextmanager
    async def opening(**options: Any) -> AsyncIterator[Caller]:
        wanted = SandboxOptions(**options)
        async with (
            serve_sandbox(wanted, clock=clock, signing_key=signing_key) as sandbox,
            httpx2.AsyncClient(base_url=sandbox.issuer, trust_env=False, verify=plain) as http,
        ):
            yield Caller(sandbox, http)

    return opening


@pytest.fixture
async def caller(opened: Opener) -> AsyncIterator[Caller]:
    async with opened(control=True) as one:
        yield one


async def raw(sandbox: Sandbox, request: bytes) -> bytes:
    """Send bytes, return all that comes until the other side hangs up (by FIN; a RST raises)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(sandbox.issuer).port)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


def raw_refresh(refresh_token: str) -> bytes:
    body = urlencode({"grant_type": "refresh_token", "refresh_token": refresh_token}).encode()
    basic = base64.b64encode(":".join(DEMO).encode())
    head = b"POST /token HTTP/1.1\r\nhost: sandbox\r\nauthorization: Basic %s\r\n" % basic
    return head + b"content-type: application/x-www-form-urlencoded\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


# The way through


async def test_a_code_becomes_tokens_and_the_api_names_the_account_and_counts_its_calls(caller: Caller) -> None:
    tokens = await caller.connect(login_hint="grace", scope="read write")
    assert set(tokens) == {"access_token", "token_type", "expires_in", "scope", "refresh_token"}
    assert (tokens["token_type"], tokens["expires_in"], tokens["scope"]) == ("Bearer", 3600, "read write")
    first, second = await caller.api(tokens["access_token"]), await caller.api(tokens["access_token"])
    grace = {"id": "user-grace", "login": "grace", "name": "Grace Hopper", "email": "grace@sandbox.test"}
    expected = {"account": grace, "client_id": DEMO_CLIENT_ID, "scopes": ["read", "write"]}
    assert first.json() == {**expected, "calls": 1}
    assert second.json() == {**expected, "calls": 2}


async def test_both_metadata_documents_are_valid_and_say_that_iss_is_sent(caller: Caller) -> None:
    for path in ("/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"):
        document = (await caller.http.get(path)).json()
        AuthorizationServerMetadata(document).validate(metadata_classes=[IssuerMetadata])
        assert document["issuer"] == caller.sandbox.issuer
        assert document["authorization_response_iss_parameter_supported"] is True
        assert document["code_challenge_methods_supported"] == ["S256"]


async def test_the_id_token_verifies_against_the_published_keys_and_carries_the_nonce(
    caller: Caller, clock: Clock
) -> None:
    tokens = await caller.connect()
    keys = KeySet.import_key_set((await caller.http.get("/jwks")).json())
    id_token = jwt.decode(tokens["id_token"], keys, algorithms=["RS256"])
    assert id_token.header == {"alg": "RS256", "typ": "JWT", "kid": "of-the-tests"}
    assert id_token.claims == {
        "iss": caller.sandbox.issuer,
        "sub": "user-ada",
        "aud": DEMO_CLIENT_ID,
        "iat": int(clock.now),
        "exp": int(clock.now) + 3600,
        "nonce": "the-nonce",
        "name": "Ada Lovelace",
        "preferred_username": "ada",
        "email": "ada@sandbox.test",
        "email_verified": True,
    }


async def test_without_a_nonce_or_openid_there_is_none_of_it(caller: Caller) -> None:
    without_nonce = await caller.connect(nonce=None, scope="openid")
    claims = json.loads(base64.urlsafe_b64decode(without_nonce["id_token"].split(".")[1] + "=="))
    assert set(claims) == {"iss", "sub", "aud", "iat", "exp"}
    assert "id_token" not in await caller.connect(scope="read")


async def test_rotated_keys_are_published_beside_the_old_ones_until_those_are_dropped(caller: Caller) -> None:
    state = caller.sandbox.state
    old_token = (await caller.connect())["id_token"]
    newest = state.rotate_keys()
    published = (await caller.http.get("/jwks")).json()["keys"]
    assert [key["kid"] for key in published] == [newest, "of-the-tests"]
    assert all("d" not in key for key in published)
    assert jwt.decode(old_token, KeySet.import_key_set({"keys": published}), algorithms=["RS256"]).claims["sub"]
    alone = state.rotate_keys(keep_old=False)
    assert [key["kid"] for key in (await caller.http.get("/jwks")).json()["keys"]] == [alone]
    header = jwt.decode((await caller.connect())["id_token"], state.keys[0], algorithms=["RS256"]).header
    assert header["kid"] == alone


async def test_a_signing_key_is_made_when_it_is_first_needed() -> None:
    sandbox = create_sandbox(SandboxOptions(issuer="http://127.0.0.1:1"))
    assert len(sandbox.state.keys) == 1


async def test_userinfo_follows_the_scopes(caller: Caller) -> None:
    everything = await caller.connect()
    answer = await caller.api(everything["access_token"], "/userinfo")
    assert answer.json() == {
        "sub": "user-ada",
        "name": "Ada Lovelace",
        "preferred_username": "ada",
        "email": "ada@sandbox.test",
        "email_verified": True,
    }
    bare = await caller.connect(scope="openid")
    assert (await caller.api(bare["access_token"], "/userinfo")).json() == {"sub": "user-ada"}
    without = await caller.api((await caller.connect(scope="read"))["access_token"], "/userinfo")
    assert (without.status_code, without.json()) == (403, {"error": "insufficient_scope"})
    assert 'error="insufficient_scope"' in without.headers["www-authenticate"]
    assert (await caller.http.get("/userinfo")).status_code == 401


async def test_the_client_for_itself_gets_no_refresh_token_and_no_account(caller: Caller) -> None:
    tokens = (await caller.token(grant_type="client_credentials", scope="read")).json()
    assert set(tokens) == {"access_token", "token_type", "expires_in", "scope"}
    me = (await caller.api(tokens["access_token"])).json()
    assert me == {"account": None, "client_id": DEMO_CLIENT_ID, "scopes": ["read"], "calls": 1}
    assert (await caller.api(tokens["access_token"], "/userinfo")).status_code == 403


async def test_the_default_scope_is_the_clients_own(caller: Caller) -> None:
    assert (await caller.connect(scope=None))["scope"] == "read"


# The browser's side


async def test_the_page_lists_the_users_and_every_scope_ticked(caller: Caller) -> None:
    page = await caller.authorize(headers={"accept": "text/html"}, login_hint="bob.builder@example.test")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    for text in ("Ada Lovelace", "Grace Hopper", "Bob Builder", DEMO_CLIENT_ID, '<html lang="en">', "<legend>"):
        assert text in page.text
    ticked = re.findall(r'name="granted" value="(\w+)" checked', page.text)
    assert ticked == ["openid", "profile", "email", "read"]
    assert re.findall(r'name="user" value="([^"]+)" required checked', page.text) == ["bob.builder@example.test"]
    assert caller.sandbox.state.visits[-1].outcome == "shown"


async def submit(caller: Caller, **fields: Any) -> httpx2.Response:
    page = await caller.authorize(headers={"accept": "text/html"})
    found = re.search(r'action="([^"]+)"', page.text)
    assert found is not None
    return await caller.http.post(found[1].replace("&amp;", "&"), data=fields)


async def test_what_the_submitted_page_left_ticked_is_granted_to_whom_it_names(caller: Caller) -> None:
    answer = await submit(caller, user="grace", granted=["read", "openid", "write"], decision="allow")
    tokens = (await caller.exchange(callback(answer)["code"])).json()
    assert tokens["scope"] == "openid read"
    assert (await caller.api(tokens["access_token"])).json()["account"]["login"] == "grace"


async def test_a_denied_page_sends_the_error_the_state_and_iss(caller: Caller) -> None:
    for fields in ({"user": "ada", "decision": "deny", "granted": "read"}, {"user": "ada", "decision": "allow"}):
        sent = callback(await submit(caller, **fields))
        assert (sent["error"], sent["state"], sent["iss"]) == ("access_denied", "the-state", caller.sandbox.issuer)
        assert "code" not in sent
    seen = caller.sandbox.state.visits[-1]
    assert (seen.outcome, seen.error, seen.account) == ("refused", "access_denied", "ada")


@pytest.mark.parametrize(
    "fields", [{"user": "ada"}, {"user": "<nobody>", "decision": "allow"}, {"decision": "perhaps"}]
)
async def test_a_malformed_decision_is_refused_on_a_page(caller: Caller, fields: dict[str, str]) -> None:
    answer = await submit(caller, **fields)
    assert answer.status_code == 400
    assert "location" not in answer.headers
    assert "nobody" not in answer.text


async def test_a_header_unticks_scopes_for_callers_without_a_page(caller: Caller) -> None:
    headers = {"x-sandbox-decision": "allow", "x-sandbox-scopes": "read email unknown"}
    tokens = await caller.connect(headers=headers)
    assert tokens["scope"] == "email read"
    assert caller.sandbox.state.token_requests()[-1].scopes == ("email", "read")


async def test_with_auto_consent_the_redirect_comes_at_once(opened: Opener) -> None:
    async with opened(auto_consent=True) as caller:
        sent = callback(await caller.authorize(headers={"accept": "*/*"}, login_hint="carol"))
        assert set(sent) == {"code", "state", "iss"}
        assert sent["iss"] == caller.sandbox.issuer
        assert (await caller.exchange(sent["code"])).status_code == 200
        assert caller.sandbox.state.newest_refresh_sha256("carol") is not None
        denied = callback(await caller.authorize(headers={"x-sandbox-decision": "deny"}))
        assert denied["error"] == "access_denied"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"code_challenge": None, "code_challenge_method": None}, "invalid_request"),
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge_method": None}, "invalid_request"),
        ({"code_challenge_method": "plain", "code_challenge": VERIFIER}, "invalid_request"),
        ({"code_challenge_method": "s256"}, "invalid_request"),
        ({"code_challenge": CHALLENGE[:-1]}, "invalid_request"),
        ({"code_challenge": CHALLENGE + "\n"}, "invalid_request"),
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"response_type": None}, "unsupported_response_type"),
        ({"scope": "read unheard-of"}, "invalid_scope"),
    ],
)
async def test_a_bad_request_of_a_known_client_goes_back_with_error_state_and_iss(
    caller: Caller, changes: dict[str, Any], error: str
) -> None:
    sent = callback(await caller.authorize(**changes))
    assert (sent["error"], sent["state"], sent["iss"]) == (error, "the-state", caller.sandbox.issuer)
    assert "code" not in sent


@pytest.mark.parametrize(
    "changes",
    [
        {"redirect_uri": "http://127.0.0.1:8000/oauth/sandbox/callback/"},
        {"redirect_uri": "http://127.0.0.1:8001/oauth/sandbox/callback"},
        {"redirect_uri": CALLBACK + "?x=1"},
        {"redirect_uri": "http://localhost:8000/oauth/sandbox/callback"},
        {"redirect_uri": "https://evil.test/"},
        {"redirect_uri": 'https://evil.test/"quoted"'},
        {"redirect_uri": None},
        {"client_id": "nobody"},
        {"client_id": None},
        {"redirect_uri": "https://evil.test/", "response_type": "token"},
        {"response_type": 'co"de'},
        {"login_hint": "no such <login>"},
    ],
)
async def test_where_the_redirect_uri_cannot_be_trusted_there_is_never_a_redirect(
    caller: Caller, changes: dict[str, Any]
) -> None:
    answer = await caller.authorize(**changes)
    assert answer.status_code == 400
    assert "location" not in answer.headers
    assert "evil.test" not in answer.text
    assert "This request is not valid" in answer.text


async def test_a_repeated_parameter_is_refused_without_a_redirect(caller: Caller) -> None:
    query = urlencode({"response_type": "code", "client_id": DEMO_CLIENT_ID, "redirect_uri": CALLBACK})
    answer = await caller.http.get(f"/authorize?{query}&{urlencode({'redirect_uri': 'https://evil.test/'})}")
    assert answer.status_code == 400
    assert "location" not in answer.headers


# Codes and clients


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"code_verifier": ""}, "invalid_request"),
        ({"code_verifier": "short"}, "invalid_request"),
        ({"code_verifier": VERIFIER[:-1] + "1"}, "invalid_grant"),
        ({"code_verifier": CHALLENGE}, "invalid_grant"),
        ({"redirect_uri": CALLBACK + "/"}, "invalid_grant"),
        ({"redirect_uri": ""}, "invalid_grant"),
        ({"code": "sac_unknown"}, "invalid_grant"),
        ({"code": ""}, "invalid_request"),
    ],
)
async def test_an_exchange_must_fit_its_authorization(caller: Caller, changes: dict[str, str], error: str) -> None:
    code = await caller.code()
    refused = await caller.exchange(**{"code": code, **changes})
    assert (refused.status_code, refused.json()["error"]) == (400, error)
    assert caller.sandbox.state.counters.exchanges == 0
    assert (await caller.exchange(code)).status_code == 200


async def test_a_code_that_is_used_twice_kills_what_came_of_it(caller: Caller) -> None:
    code = await caller.code()
    tokens = (await caller.exchange(code)).json()
    again = await caller.exchange(code)
    assert (again.status_code, again.json()["error"]) == (400, "invalid_grant")
    assert (await caller.api(tokens["access_token"])).status_code == 401
    assert (await caller.refresh(tokens["refresh_token"])).json()["error"] == "invalid_grant"
    assert caller.sandbox.state.counters.code_reuses == 1
    assert caller.sandbox.state.counters.reuse_alarms == 0


async def test_a_code_dies_of_age_and_with_its_grant(caller: Caller, clock: Clock) -> None:
    old, killed = await caller.code(), await caller.code(login_hint="grace")
    caller.sandbox.state.kill_account("grace")
    assert (await caller.exchange(killed)).json()["error"] == "invalid_grant"
    clock.now += 60
    assert (await caller.exchange(old)).json()["error"] == "invalid_grant"


async def test_a_code_and_a_refresh_token_belong_to_their_client_and_others_do_them_no_harm(caller: Caller) -> None:
    caller.sandbox.state.add_client("other", [Secret("other-secret")], [CALLBACK])
    code = await caller.code()
    form = {"code": code, "redirect_uri": CALLBACK, "code_verifier": VERIFIER}
    stolen = await caller.token(auth=("other", "other-secret"), grant_type="authorization_code", **form)
    assert stolen.json()["error"] == "invalid_grant"
    tokens = (await caller.exchange(code)).json()
    stolen = await caller.refresh(tokens["refresh_token"], auth=("other", "other-secret"))
    assert stolen.json()["error"] == "invalid_grant"
    revoked = await caller.http.post("/revoke", data={"token": tokens["refresh_token"]}, auth=("other", "other-secret"))
    assert revoked.json()["error"] == "invalid_grant"
    assert (await caller.refresh(tokens["refresh_token"])).status_code == 200


@pytest.mark.parametrize("auth", [(DEMO_CLIENT_ID, "wrong"), (DEMO_CLIENT_ID, ""), ("nobody", "x"), None])
async def test_wrong_client_credentials_are_a_401(caller: Caller, auth: tuple[str, str] | None) -> None:
    refused = await caller.token(auth=auth, grant_type="client_credentials")
    assert (refused.status_code, refused.json()["error"]) == (401, "invalid_client")
    assert refused.headers["www-authenticate"].startswith("Basic")


async def test_a_client_may_send_its_secret_in_the_body(caller: Caller) -> None:
    form = {"grant_type": "client_credentials", "client_id": DEMO_CLIENT_ID}
    assert (await caller.token(auth=None, client_secret=DEMO_CLIENT_SECRET, **form)).status_code == 200
    assert (await caller.token(auth=None, client_secret="wrong", **form)).json()["error"] == "invalid_client"


async def test_several_secrets_are_live_and_a_way_not_registered_is_refused(caller: Caller) -> None:
    state = caller.sandbox.state
    both = [Secret("old+secret &"), Secret("new")]
    state.add_client("app one", both, [CALLBACK], auth_methods=["client_secret_basic"])
    for secret in ("old+secret &", "new"):
        coded = (quote("app one"), quote(secret, safe=""))  # RFC 6749 2.3.1: form-encoded before Basic
        assert (await caller.token(auth=coded, grant_type="client_credentials")).status_code == 200
    plus = ("app+one", "old%2Bsecret+%26")
    assert (await caller.token(auth=plus, grant_type="client_credentials")).status_code == 200
    in_body = {"client_id": "app one", "client_secret": "new"}
    assert (await caller.token(auth=None, grant_type="client_credentials", **in_body)).status_code == 401
    state.add_client("app one", both[1:], [CALLBACK])
    gone = (quote("app one"), quote("old+secret &"))
    assert (await caller.token(auth=gone, grant_type="client_credentials")).status_code == 401


async def test_a_public_client_needs_no_secret_and_gets_nothing_for_itself(caller: Caller) -> None:
    caller.sandbox.state.add_client("public", [], [CALLBACK], auth_methods=["none"])
    code = await caller.code(client_id="public")
    form = {"client_id": "public", "redirect_uri": CALLBACK, "code": code}
    assert (await caller.token(auth=None, grant_type="authorization_code", **form)).json()["error"] == "invalid_request"
    form["code_verifier"] = VERIFIER
    assert (await caller.token(auth=None, grant_type="authorization_code", **form)).status_code == 200
    refused = await caller.token(auth=None, grant_type="client_credentials", client_id="public")
    assert refused.json()["error"] == "unauthorized_client"


@pytest.mark.parametrize(
    ("uris", "secrets", "methods"),
    [
        (["http://app.test/cb"], ["s"], ["client_secret_basic"]),
        (["https://app.test/cb#fragment"], ["s"], ["client_secret_basic"]),
        ([CALLBACK], ["s"], ["tls_client_auth"]),
        ([CALLBACK], [], ["client_secret_basic"]),
        ([CALLBACK], ["s"], ["none"]),
    ],
)
async def test_a_client_that_makes_no_sense_is_not_registered(
    caller: Caller, uris: list[str], secrets: list[str], methods: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"must be https|do not fit"):
        caller.sandbox.state.add_client("x", [Secret(value) for value in secrets], uris, auth_methods=methods)


def test_only_https_and_loopback_are_safe_to_redirect_to() -> None:
    safe = ["https://app.test/cb", "http://127.0.0.1:1/cb", "http://[::1]/cb", "http://localhost/cb"]
    unsafe = ["http://app.test/cb", "https:///cb", "javascript:alert(1)", "http://127.0.0.1.evil.test/", "https://a/#"]
    assert all(map(is_safe_redirect, safe))
    assert not any(map(is_safe_redirect, unsafe))
    assert [is_loopback(host) for host in ("127.9.9.9", "::1", "10.0.0.1", "0.0.0.0")] == [True, True, False, False]  # noqa: S104 - not bound


@pytest.mark.parametrize(
    ("headers", "body", "error"),
    [
        (FORM, "grant_type=client_credentials&grant_type=client_credentials", "invalid_request"),
        (FORM, "grant_type=client_credentials&client_secret=x", "invalid_request"),
        ({"content-type": "application/json"}, '{"grant_type": "client_credentials"}', "invalid_request"),
        ({}, "grant_type=client_credentials", "invalid_request"),
        (FORM, "grant_type=password&username=a&password=b", "unsupported_grant_type"),
        (FORM, "", "unsupported_grant_type"),
        (FORM, "grant_type=refresh_token", "invalid_request"),
        (FORM, "grant_type=client_credentials&scope=unheard-of", "invalid_scope"),
    ],
)
async def test_a_malformed_token_request_is_refused(
    caller: Caller, headers: dict[str, str], body: str, error: str
) -> None:
    answer = await caller.http.post("/token", content=body, headers=headers, auth=DEMO)
    assert (answer.status_code, answer.json()["error"]) == (400, error)
    assert caller.sandbox.state.visits[-1].outcome == "refused"


async def test_two_authorization_headers_are_refused_at_token_and_api(caller: Caller) -> None:
    tokens = await caller.connect()
    twice = [("authorization", f"Bearer {tokens['access_token']}")] * 2
    assert (await caller.http.get("/api/me", headers=twice)).status_code == 400
    form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
    assert (await caller.http.post("/token", data=form, headers=twice)).json()["error"] == "invalid_request"


@pytest.mark.parametrize("value", ["Basic !!!", "Basic /w==", "Bearer x", "Basic"])
async def test_an_unreadable_basic_header_is_an_unknown_client(caller: Caller, value: str) -> None:
    answer = await caller.http.post(
        "/token", data={"grant_type": "client_credentials"}, headers={"authorization": value}
    )
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")


# Refreshing


async def test_a_strict_refresh_rotates_and_any_reuse_kills_the_grant(caller: Caller) -> None:
    state = caller.sandbox.state
    first = await caller.connect(scope="read write")
    second = (await caller.refresh(first["refresh_token"])).json()
    assert second["refresh_token"] != first["refresh_token"]
    assert second["scope"] == "read write"
    assert (await caller.api(second["access_token"])).status_code == 200
    assert state.newest_refresh_sha256("ada") == sha256(second["refresh_token"])
    reused = await caller.refresh(first["refresh_token"])
    assert (reused.status_code, reused.json()["error"]) == (400, "invalid_grant")
    assert state.counters.reuse_alarms == 1
    assert (await caller.api(second["access_token"])).status_code == 401
    assert (await caller.refresh(second["refresh_token"])).json()["error"] == "invalid_grant"
    assert state.counters.reuse_alarms == 1
    assert state.newest_refresh_sha256("ada") is None


async def test_the_old_access_token_lives_on_unless_it_dies_on_refresh(opened: Opener) -> None:
    async with opened() as caller:
        first = await caller.connect()
        second = (await caller.refresh(first["refresh_token"])).json()
        assert (await caller.api(first["access_token"])).status_code == 200
        caller.sandbox.state.configure(access_dies_on_refresh=True)
        third = (await caller.refresh(second["refresh_token"])).json()
        statuses = [(await caller.api(one["access_token"])).status_code for one in (first, second, third)]
        assert statuses == [401, 401, 200]


async def test_a_grace_period_answers_again_with_the_same_successor(opened: Opener, clock: Clock) -> None:
    async with opened(mode="grace", grace_seconds=30) as caller:
        state = caller.sandbox.state
        first = await caller.connect()
        second = (await caller.refresh(first["refresh_token"])).json()
        clock.now += 29.9
        assert (await caller.refresh(first["refresh_token"])).json() == second
        assert [seen.replayed for seen in state.token_requests("ada")] == [False, False, True]
        assert (state.counters.refreshes, state.counters.replays) == (1, 1)
        clock.now += 0.2
        assert (await caller.refresh(first["refresh_token"])).json()["error"] == "invalid_grant"
        assert state.counters.reuse_alarms == 1
        assert (await caller.api(second["access_token"])).status_code == 401


async def test_the_grace_ends_when_the_successor_was_used(opened: Opener) -> None:
    async with opened(mode="grace") as caller:
        first = await caller.connect()
        second = (await caller.refresh(first["refresh_token"])).json()
        assert (await caller.refresh(second["refresh_token"])).status_code == 200
        assert (await caller.refresh(first["refresh_token"])).json()["error"] == "invalid_grant"
        assert caller.sandbox.state.counters.reuse_alarms == 1


async def test_a_static_refresh_token_stays_and_is_not_sent_again(opened: Opener) -> None:
    async with opened(mode="static") as caller:
        tokens = await caller.connect()
        answers = [(await caller.refresh(tokens["refresh_token"])).json() for _ in range(3)]
        assert all("refresh_token" not in answer for answer in answers)
        assert len({answer["access_token"] for answer in answers}) == 3
        assert caller.sandbox.state.newest_refresh_sha256("ada") == sha256(tokens["refresh_token"])


async def test_a_refresh_may_narrow_the_scope_but_not_widen_it(caller: Caller) -> None:
    tokens = await caller.connect(scope="read write")
    wider = await caller.refresh(tokens["refresh_token"], scope="read email")
    assert wider.json()["error"] == "invalid_scope"
    narrow = (await caller.refresh(tokens["refresh_token"], scope="read")).json()
    assert narrow["scope"] == "read"
    assert (await caller.refresh(narrow["refresh_token"])).json()["scope"] == "read write"


async def test_tokens_expire(opened: Opener, clock: Clock) -> None:
    async with opened(access_token_seconds=10, refresh_token_seconds=100) as caller:
        tokens = await caller.connect()
        assert (tokens["expires_in"], tokens["refresh_token_expires_in"]) == (10, 100)
        clock.now += 10
        expired = await caller.api(tokens["access_token"])
        assert expired.status_code == 401
        assert expired.headers["www-authenticate"] == 'Bearer realm="sandbox", error="invalid_token"'
        newer = (await caller.refresh(tokens["refresh_token"])).json()
        assert len(caller.sandbox.state.access_tokens) == 1  # the expired one is forgotten
        clock.now += 100
        assert (await caller.refresh(newer["refresh_token"])).json()["error"] == "invalid_grant"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("always", [True, True, True]),
        ("like_google", [True, False, True]),
        ("prompt_consent", [False, False, True]),
        ("never", [False, False, False]),
    ],
)
async def test_who_gets_a_refresh_token_is_an_option(opened: Opener, rule: str, expected: list[bool]) -> None:
    async with opened(refresh_tokens=rule) as caller:
        answers = [await caller.connect(prompt=prompt) for prompt in (None, None, "consent")]
        assert ["refresh_token" in answer for answer in answers] == expected
        assert caller.sandbox.state.visits[-2].prompt == "consent"


async def test_like_google_a_revoked_user_is_a_first_time_user_again(opened: Opener) -> None:
    async with opened(refresh_tokens="like_google") as caller:
        assert "refresh_token" in await caller.connect()
        assert "refresh_token" not in await caller.connect()
        assert caller.sandbox.state.kill_account("ada") == 2
        assert "refresh_token" in await caller.connect()


def a_refresh_token(**changes: Any) -> RefreshToken:
    return RefreshToken(**{"digest": "d", "grant": Grant("c", "ada"), "scope": "read", "expires_at": None, **changes})


@pytest.mark.parametrize(
    ("changes", "mode", "successor_used", "verdict"),
    [
        ({}, "strict", False, "rotate"),
        ({}, "grace", False, "rotate"),
        ({}, "static", False, "keep"),
        ({"used_at": 90.0}, "strict", False, "reuse"),
        ({"used_at": 90.0}, "grace", False, "replay"),
        ({"used_at": 90.0}, "grace", True, "reuse"),
        ({"used_at": 70.0}, "grace", False, "reuse"),
        ({"used_at": 90.0}, "static", False, "reuse"),
        ({"revoked": True}, "strict", False, "dead"),
        ({"expires_at": 100.0}, "strict", False, "dead"),
        ({"expires_at": 100.1}, "strict", False, "rotate"),
        ({"grant": Grant("c", "ada", alive=False), "used_at": 90.0}, "strict", False, "dead"),
    ],
)
def test_what_a_presented_refresh_token_means(
    changes: dict[str, Any],
    mode: Any,
    successor_used: bool,  # noqa: FBT001 - a parameter of the table above
    verdict: str,
) -> None:
    token, options = a_refresh_token(**changes), SandboxOptions(mode=mode)
    assert judge_refresh_token(token, options, successor_used=successor_used, now=100.0) == verdict


@settings(max_examples=60, deadline=None)
@given(mode=st.sampled_from(["strict", "grace"]), choices=st.lists(st.integers(min_value=0, max_value=9), max_size=12))
def test_whatever_is_presented_only_the_newest_token_moves_the_chain(mode: Any, choices: list[int]) -> None:
    sandbox = create_sandbox(SandboxOptions(issuer="http://127.0.0.1:1", mode=mode), clock=Clock())
    chain = [sandbox.state.mint("ada")["refresh_token"]]
    alive = True
    for choice in choices:
        place = choice % len(chain)
        answer = refresh_directly(sandbox, chain[place])
        newest, replay = place == len(chain) - 1, mode == "grace" and place == len(chain) - 2
        assert (answer.status == 200) is (alive and (newest or replay))
        if answer.status == 200 and newest:
            chain.append(answer.document["refresh_token"])
        elif answer.status == 200:
            assert answer.document["refresh_token"] == chain[-1]
        alive = alive and answer.status == 200
    assert sandbox.state.counters.reuse_alarms == (0 if alive else 1)
    assert sandbox.state.counters.refreshes == len(chain) - 1


def refresh_directly(sandbox: Sandbox, refresh_token: str) -> Answer:
    basic = "Basic " + base64.b64encode(":".join(DEMO).encode()).decode()
    request = Request("POST", "/token", "", {"authorization": basic}, b"")
    request.parameters = {"grant_type": "refresh_token", "refresh_token": refresh_token}
    answer = sandbox.server.create_token_response(request)
    assert isinstance(answer, Answer)
    return answer


# Revocation and the API


@pytest.mark.parametrize(
    ("kills", "sent", "alive"),
    [
        ("token", "access_token", ["refresh", "other"]),
        ("token", "refresh_token", ["access", "other"]),
        ("grant", "access_token", ["refresh", "other"]),
        ("grant", "refresh_token", ["other"]),
        ("user", "access_token", []),
        ("user", "refresh_token", []),
    ],
)
async def test_what_a_revocation_kills(opened: Opener, kills: str, sent: str, alive: list[str]) -> None:
    async with opened(revocation_kills=kills) as caller:
        tokens, other = await caller.connect(), await caller.connect()
        revoked = await caller.http.post("/revoke", data={"token": tokens[sent]}, auth=DEMO)
        assert (revoked.status_code, revoked.json()) == (200, {})
        answers = {
            "access": await caller.api(tokens["access_token"]),
            "refresh": await caller.refresh(tokens["refresh_token"]),
            "other": await caller.api(other["access_token"]),
        }
        assert [name for name, answer in answers.items() if answer.status_code == 200] == alive
        assert caller.sandbox.state.counters.revocations == 1
        assert caller.sandbox.state.counters.reuse_alarms == 0


async def test_with_user_wide_revocation_the_clients_own_token_dies_alone(opened: Opener) -> None:
    async with opened(revocation_kills="user") as caller:
        own = [(await caller.token(grant_type="client_credentials")).json()["access_token"] for _ in range(2)]
        await caller.http.post("/revoke", data={"token": own[0]}, auth=DEMO)
        assert [(await caller.api(token)).status_code for token in own] == [401, 200]


async def test_revocation_needs_the_client_and_takes_unknown_tokens_calmly(caller: Caller) -> None:
    unknown = {"token": "never-issued", "token_type_hint": "access_token"}
    assert (await caller.http.post("/revoke", data=unknown, auth=DEMO)).status_code == 200
    assert (await caller.http.post("/revoke", data=unknown)).json()["error"] == "invalid_client"
    assert (await caller.http.post("/revoke", data={}, auth=DEMO)).json()["error"] == "invalid_request"
    assert (await caller.http.post("/revoke?token=x", auth=DEMO)).json()["error"] == "invalid_request"
    assert caller.sandbox.state.counters.revocations == 0


async def test_the_api_refuses_without_a_live_token(caller: Caller) -> None:
    for path in ("/api/me", "/api/echo"):
        missing = await caller.http.get(path)
        assert (missing.status_code, missing.json()) == (401, {"error": "missing_token"})
        assert missing.headers["www-authenticate"] == 'Bearer realm="sandbox"'
        dead = await caller.api("sat_unknown", path)
        assert (dead.status_code, dead.json()) == (401, {"error": "invalid_token"})
    assert caller.sandbox.state.counters.api_refusals == 4


async def test_the_echo_shows_what_arrived_but_no_credential_unless_it_is_careless(caller: Caller) -> None:
    token = caller.sandbox.state.mint("ada")["access_token"]
    seen = (await caller.http.get("/api/echo?a=b%2Fc&a=", headers={"x-more": "1", **bearer(token)})).json()
    assert (seen["method"], seen["path"], seen["query"]) == ("GET", "/api/echo", "a=b%2Fc&a=")
    assert seen["access_token_sha256"] == sha256(token)
    assert seen["headers"]["x-more"] == "1"
    assert token not in json.dumps(seen)
    caller.sandbox.state.configure(echo_credentials=True)
    posted = await caller.http.post("/api/echo", content=b"\x00raw", headers=bearer(token))
    assert base64.b64decode(posted.json()["body"]) == b"\x00raw"
    assert posted.json()["headers"]["authorization"] == f"Bearer {token}"


async def test_unknown_paths_methods_and_huge_bodies_are_refused(caller: Caller) -> None:
    assert (await caller.http.get("/elsewhere")).status_code == 404
    wrong = await caller.http.get("/token")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert (await caller.http.post("/token", content=b"x" * (1 << 21))).status_code == 413


async def test_half_a_request_has_no_effect(caller: Caller) -> None:
    minted = caller.sandbox.state.mint("ada")
    whole = raw_refresh(minted["refresh_token"]).replace(b"content-length: ", b"content-length: 1")
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(caller.sandbox.issuer).port)
    writer.write(whole)
    await writer.drain()
    writer.close()
    assert await reader.read() == b""
    assert (await caller.refresh(minted["refresh_token"])).status_code == 200
    assert len(caller.sandbox.state.token_requests()) == 1


# Faults


async def test_a_told_failure_comes_as_often_as_told_and_changes_nothing(caller: Caller) -> None:
    tokens = await caller.connect()
    caller.sandbox.state.add_fault("fail", times=2, headers={"Retry-After": "7"})
    for _ in range(2):
        failed = await caller.refresh(tokens["refresh_token"])
        assert (failed.status_code, failed.json()) == (503, {"error": "temporarily_unavailable"})
        assert (failed.headers["retry-after"], failed.headers["content-type"]) == ("7", "application/json")
    assert (await caller.refresh(tokens["refresh_token"])).status_code == 200
    outcomes = [(seen.outcome, seen.answered, seen.fault) for seen in caller.sandbox.state.token_requests()[1:]]
    assert outcomes == [("refused", True, "answer")] * 2 + [("committed", True, None)]


@pytest.mark.parametrize("body", ["<html>", '{"access_token": 123}', "", {"error": "slow_down"}, [1], None, True])
async def test_any_body_can_be_sent_instead(caller: Caller, body: Any) -> None:
    caller.sandbox.state.add_fault(Fault(kind="answer", status=200, body=body))
    answer = await caller.refresh("whatever")
    assert answer.status_code == 200
    assert answer.text == body if isinstance(body, str) else answer.json() == body


async def test_garbage_may_come_after_the_rotation(caller: Caller) -> None:
    tokens = await caller.connect()
    caller.sandbox.state.add_fault("garbage", commit=True)
    spoilt = await caller.refresh(tokens["refresh_token"])
    assert (spoilt.status_code, spoilt.headers["content-type"]) == (200, "text/html")
    seen = caller.sandbox.state.token_requests()[-1]
    assert (seen.outcome, seen.answered) == ("committed", False)
    assert (await caller.refresh(tokens["refresh_token"])).json()["error"] == "invalid_grant"


@pytest.mark.parametrize(
    ("preset", "status", "error"), [("invalid_client", 401, "invalid_client"), ("invalid_grant", 400, "invalid_grant")]
)
async def test_named_refusals(caller: Caller, preset: str, status: int, error: str) -> None:
    caller.sandbox.state.add_fault(preset)
    answer = await caller.token(grant_type="client_credentials")
    assert (answer.status_code, answer.json()) == (status, {"error": error})


async def test_a_dropped_request_has_no_effect_and_no_byte_comes_back(
    caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    minted = caller.sandbox.state.mint("ada")
    caller.sandbox.state.add_fault("drop_request")
    assert await raw(caller.sandbox, raw_refresh(minted["refresh_token"])) == b""
    seen = caller.sandbox.state.token_requests()[-1]
    assert (seen.outcome, seen.answered, seen.issued_refresh) == ("dropped", False, None)
    assert (await caller.refresh(minted["refresh_token"])).status_code == 200
    assert "ASGI" not in caplog.text


async def test_a_dropped_answer_has_rotated_and_no_byte_comes_back(caller: Caller) -> None:
    minted = caller.sandbox.state.mint("ada")
    caller.sandbox.state.add_fault("drop_answer")
    assert await raw(caller.sandbox, raw_refresh(minted["refresh_token"])) == b""
    seen = caller.sandbox.state.token_requests()[-1]
    assert (seen.outcome, seen.answered) == ("committed", False)
    assert seen.issued_refresh == caller.sandbox.state.newest_refresh_sha256("ada")
    assert (await caller.refresh(minted["refresh_token"])).json()["error"] == "invalid_grant"
    assert caller.sandbox.state.counters.reuse_alarms == 1


async def test_a_lost_answer_comes_again_within_the_grace_period(opened: Opener) -> None:
    async with opened(mode="grace") as caller:
        minted = caller.sandbox.state.mint("ada")
        caller.sandbox.state.add_fault("drop_answer")
        with pytest.raises(httpx2.RemoteProtocolError):
            await caller.refresh(minted["refresh_token"])
        answer = (await caller.refresh(minted["refresh_token"])).json()
        assert sha256(answer["refresh_token"]) == caller.sandbox.state.newest_refresh_sha256("ada")
        assert caller.sandbox.state.counters.reuse_alarms == 0
        assert caller.sandbox.state.counters.concurrent_senders == 0


async def test_a_reset_is_a_reset(caller: Caller) -> None:
    caller.sandbox.state.add_fault("drop_request", reset=True)
    with pytest.raises(ConnectionResetError):
        await raw(caller.sandbox, raw_refresh("whatever"))


async def test_a_cut_answer_has_whole_headers_and_half_a_body(caller: Caller) -> None:
    minted = caller.sandbox.state.mint("ada")
    caller.sandbox.state.add_fault("cut_answer")
    head, _, body = (await raw(caller.sandbox, raw_refresh(minted["refresh_token"]))).partition(b"\r\n\r\n")
    announced = re.search(rb"content-length: (\d+)", head)
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert announced is not None
    assert len(body) == int(announced[1]) // 2
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(body)
    assert caller.sandbox.state.token_requests()[-1].outcome == "committed"


async def test_a_stall_before_is_without_effect_when_the_caller_leaves(caller: Caller) -> None:
    minted = caller.sandbox.state.mint("ada")
    caller.sandbox.state.add_fault(Fault(kind="stall", seconds=30))
    with pytest.raises(httpx2.ReadTimeout):
        await caller.http.post("/token", content=b"", headers=FORM, timeout=httpx2.Timeout(5, read=0.05))
    await settled(caller.sandbox)
    assert caller.sandbox.state.visits[-1].outcome == "dropped"
    assert (await caller.refresh(minted["refresh_token"])).status_code == 200


async def test_a_stall_after_has_taken_effect_when_the_caller_leaves(caller: Caller) -> None:
    minted = caller.sandbox.state.mint("ada")
    caller.sandbox.state.add_fault(Fault(kind="stall", seconds=30, commit=True))
    form = {"grant_type": "refresh_token", "refresh_token": minted["refresh_token"]}
    with pytest.raises(httpx2.ReadTimeout):
        await caller.http.post("/token", data=form, auth=DEMO, timeout=httpx2.Timeout(5, read=0.05))
    seen = caller.sandbox.state.visits[-1]
    assert (seen.outcome, seen.answered) == ("committed", False)
    assert seen.issued_refresh == caller.sandbox.state.newest_refresh_sha256("ada")


async def test_a_stall_that_is_waited_out_is_only_slow(caller: Caller) -> None:
    tokens = await caller.connect()
    started = time.monotonic()
    for commit in (False, True):
        caller.sandbox.state.add_fault(Fault(kind="stall", seconds=0.05, commit=commit))
        answer = await caller.refresh(tokens["refresh_token"])
        assert answer.status_code == 200
        tokens = answer.json()
    assert time.monotonic() - started >= 0.1
    assert all(seen.answered for seen in caller.sandbox.state.token_requests())


async def eventually(happened: Callable[[], object]) -> None:
    """Wait for what the other side of a socket does in its own time."""
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110 - the sandbox has no event to tell of what it notices
            await asyncio.sleep(0.005)


async def settled(sandbox: Sandbox) -> None:
    """Wait until the sandbox has noticed that its callers left."""
    await eventually(lambda: all(seen.outcome != "pending" for seen in sandbox.state.visits))


async def test_a_fault_hits_the_account_and_grant_type_it_names_and_stays_until_cleared(caller: Caller) -> None:
    state = caller.sandbox.state
    ada, grace = await caller.connect(login_hint="ada"), await caller.connect(login_hint="grace")
    state.add_fault("fail", account="grace", grant_type="refresh_token", times=None)
    assert (await caller.refresh(ada["refresh_token"])).status_code == 200
    assert (await caller.exchange(await caller.code(login_hint="grace"))).status_code == 200
    assert [(await caller.refresh(grace["refresh_token"])).status_code for _ in range(3)] == [503] * 3
    state.clear_faults()
    assert (await caller.refresh(grace["refresh_token"])).status_code == 200


async def test_the_oldest_fault_that_fits_is_used_first(caller: Caller) -> None:
    caller.sandbox.state.add_fault("fail", status=500)
    caller.sandbox.state.add_fault("fail", status=502)
    statuses = [(await caller.token(grant_type="client_credentials")).status_code for _ in range(3)]
    assert statuses == [500, 502, 200]


@pytest.mark.parametrize(
    ("endpoint", "path"),
    [
        ("api", "/api/me"),
        ("userinfo", "/userinfo"),
        ("jwks", "/jwks"),
        ("discovery", "/.well-known/openid-configuration"),
    ],
)
async def test_other_endpoints_fail_too(caller: Caller, endpoint: str, path: str) -> None:
    token = (await caller.connect())["access_token"]
    caller.sandbox.state.add_fault("fail", endpoint=endpoint)
    assert [(await caller.api(token, path)).status_code for _ in range(2)] == [503, 200]


async def test_an_api_fault_can_single_out_an_account(caller: Caller) -> None:
    mint = caller.sandbox.state.mint
    caller.sandbox.state.add_fault("fail", endpoint="api", account="grace", status=429)
    tokens = [mint("ada")["access_token"], mint("grace")["access_token"]]
    assert [(await caller.api(token)).status_code for token in tokens] == [200, 429]


async def test_the_callback_can_carry_a_wrong_iss_or_none(caller: Caller) -> None:
    caller.sandbox.state.add_fault("wrong_iss")
    caller.sandbox.state.add_fault("missing_iss")
    wrong, missing, right = [callback(await caller.authorize()) for _ in range(3)]
    assert wrong["iss"] == "https://other-issuer.test"
    assert set(missing) == {"code", "state"}
    assert right["iss"] == caller.sandbox.issuer


async def test_the_callback_can_be_made_an_error_and_denials_change_too(caller: Caller) -> None:
    changed: dict[str, str | None] = {"code": None, "error": "server_error"}
    caller.sandbox.state.add_fault(Fault(kind="callback", endpoint="authorize", parameters=changed))
    caller.sandbox.state.add_fault("missing_iss")
    assert set(callback(await caller.authorize())) == {"error", "state", "iss"}
    denied = callback(await caller.authorize(headers={"x-sandbox-decision": "deny"}))
    assert set(denied) == {"error", "error_description", "state"}
    assert caller.sandbox.state.counters.authorizations == 0


async def test_the_id_token_can_be_spoilt(caller: Caller) -> None:
    key = caller.sandbox.state.keys[0]
    caller.sandbox.state.add_fault("wrong_nonce")
    wrong = jwt.decode((await caller.connect())["id_token"], key, algorithms=["RS256"])
    assert wrong.claims["nonce"] == "not-the-nonce"
    caller.sandbox.state.add_fault(Fault(kind="id_token", claims={"aud": None, "iss": "https://other.test"}))
    other = jwt.decode((await caller.connect())["id_token"], key, algorithms=["RS256"])
    assert other.claims["iss"] == "https://other.test"
    assert "aud" not in other.claims
    for _ in range(2):
        caller.sandbox.state.add_fault("bad_signature")
        spoilt = await caller.connect()
        with pytest.raises(BadSignatureError):
            jwt.decode(spoilt["id_token"], key, algorithms=["RS256"])


async def test_the_date_header_can_be_off(caller: Caller, clock: Clock) -> None:
    for skew in (0, -900, 900):
        caller.sandbox.state.configure(date_skew_seconds=skew)
        sent = parsedate_to_datetime((await caller.http.get("/jwks")).headers["date"])
        assert sent.timestamp() == clock.now + skew


async def test_faults_and_options_that_make_no_sense_are_refused(caller: Caller) -> None:
    with pytest.raises(ValueError, match="no such fault"):
        fault("explode")
    with pytest.raises(ValueError, match="unknown field"):
        fault("fail", colour="red")
    with pytest.raises(ValueError, match="mode"):
        caller.sandbox.state.configure(mode="loose")
    with pytest.raises(ValueError, match="fixed at start"):
        caller.sandbox.state.configure(issuer="https://other.test")
    with pytest.raises(ValueError, match="no such user"):
        caller.sandbox.state.mint("no such <login>")
    assert set(FAULTS) >= {"fail", "drop_answer", "wrong_iss", "bad_signature"}


# Senders at once


async def test_two_senders_of_one_refresh_token_at_once_are_counted(opened: Opener) -> None:
    async with opened(mode="grace", latency_seconds=0.25) as caller:
        token = caller.sandbox.state.mint("ada")["refresh_token"]
        first, second = await asyncio.gather(caller.refresh(token), caller.refresh(token))
        assert first.json() == second.json()
        assert caller.sandbox.state.counters.concurrent_senders == 1
        assert (caller.sandbox.state.counters.refreshes, caller.sandbox.state.counters.replays) == (1, 1)


async def test_other_tokens_and_later_senders_are_not_counted(opened: Opener) -> None:
    async with opened(mode="grace", latency_seconds=0.02) as caller:
        tokens = [caller.sandbox.state.mint(login)["refresh_token"] for login in ("ada", "grace")]
        await asyncio.gather(*(caller.refresh(token) for token in tokens))
        await caller.refresh(tokens[0])
        assert caller.sandbox.state.counters.concurrent_senders == 0


async def test_a_sender_that_hung_up_and_sends_again_is_one_sender(opened: Opener) -> None:
    async with opened(mode="grace", latency_seconds=0.05) as caller:
        token = caller.sandbox.state.mint("ada")["refresh_token"]
        port = urlsplit(caller.sandbox.issuer).port
        for _ in range(10):  # the hang-up and the new request arrive together
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(raw_refresh(token))
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.close()
            assert (await caller.refresh(token)).status_code == 200
        assert caller.sandbox.state.counters.concurrent_senders == 0
        assert caller.sandbox.state.counters.refreshes == 1
        left = [seen for seen in caller.sandbox.state.token_requests() if not seen.answered]
        assert {seen.outcome for seen in left} == {"committed"}


async def test_a_second_sender_that_gives_up_at_once_has_no_effect(opened: Opener) -> None:
    async with opened(latency_seconds=0.25) as caller:
        token = caller.sandbox.state.mint("ada")["refresh_token"]
        first = asyncio.create_task(caller.refresh(token))
        await asyncio.sleep(0.02)
        _, writer = await asyncio.open_connection("127.0.0.1", urlsplit(caller.sandbox.issuer).port)
        writer.write(raw_refresh(token))
        await writer.drain()
        writer.close()
        assert (await first).status_code == 200
        await settled(caller.sandbox)
        assert [seen.outcome for seen in caller.sandbox.state.token_requests()] == ["committed", "dropped"]
        assert caller.sandbox.state.counters.reuse_alarms == 0
        assert caller.sandbox.state.counters.concurrent_senders == 0


async def test_thousands_of_accounts_each_have_their_own_chain(caller: Caller) -> None:
    state = caller.sandbox.state
    for number in range(3000):
        state.mint(f"user{number}")
    minted = state.mint("user7")
    assert state.newest_refresh_sha256("user7") == sha256(minted["refresh_token"])
    assert state.kill_account("user7", client_id="another-client") == 0
    assert state.kill_account("user7") == 2
    assert len(state.users) == 3002


# The log


async def test_the_log_has_digests_and_no_secret(caller: Caller) -> None:
    code = await caller.code()
    first = (await caller.exchange(code)).json()
    second = (await caller.refresh(first["refresh_token"])).json()
    await caller.refresh("srt_a-stranger's-token")
    await caller.token(auth=("stranger", "strange-secret"), grant_type="strange-grant")
    await caller.http.post("/revoke", data={"token": second["access_token"]}, auth=DEMO)
    log = await caller.http.get("/_control/log")
    authorized, exchanged, refreshed, refused, strange, revoked = log.json()["requests"]
    assert (authorized["endpoint"], authorized["account"], authorized["outcome"]) == ("authorize", "ada", "committed")
    assert (exchanged["presented"], exchanged["issued_refresh"]) == (sha256(code), sha256(first["refresh_token"]))
    assert refreshed["presented"] == exchanged["issued_refresh"]
    assert refreshed["issued_access"] == sha256(second["access_token"])
    assert (refreshed["outcome"], refreshed["account"], refreshed["client_id"]) == ("committed", "ada", DEMO_CLIENT_ID)
    assert (refused["outcome"], refused["error"], refused["account"]) == ("refused", "invalid_grant", None)
    assert (strange["client_id"], strange["grant_type"]) == (None, None)
    assert (revoked["endpoint"], revoked["presented"]) == ("revoke", sha256(second["access_token"]))
    assert log.json()["counters"]["exchanges"] == log.json()["counters"]["refreshes"] == 1
    for secret in (
        code,
        DEMO_CLIENT_SECRET,
        VERIFIER,
        "stranger",
        "strange-grant",
        *map(str, {**first, **second}.values()),
    ):
        assert secret not in log.text or secret in {"Bearer", "3600", first["scope"]}


async def test_the_log_can_be_read_on_and_cleared(caller: Caller) -> None:
    for _ in range(3):
        await caller.token(grant_type="client_credentials")
    assert [one["number"] for one in (await caller.http.get("/_control/log?after=1")).json()["requests"]] == [2, 3]
    assert len((await caller.http.get("/_control/log?after=x")).json()["requests"]) == 3
    await caller.http.delete("/_control/log")
    assert (await caller.http.get("/_control/log")).json()["requests"] == []
    assert caller.sandbox.state.counters.client_credentials == 0


async def test_authlib_logs_no_token_at_debug_level(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="authlib")
    tokens = (await caller.refresh((await caller.connect())["refresh_token"])).json()
    assert "Issue token" in caplog.text
    assert tokens["access_token"] not in caplog.text
    assert tokens["refresh_token"] not in caplog.text
    assert repr(TokenAnswer(tokens)) == "TokenAnswer(…)"


# Control over HTTP


async def test_everything_can_be_steered_over_http(caller: Caller) -> None:
    post = caller.http.post
    assert (await post("/_control/faults", json={"preset": "fail", "status": 500})).status_code == 200
    whole = {"kind": "answer", "status": 418, "endpoint": "token"}
    assert (await post("/_control/faults", json=whole)).status_code == 200
    listed = (await caller.http.get("/_control/faults")).json()
    assert [one["status"] for one in listed["faults"]] == [500, 418]
    assert "drop_answer" in listed["presets"]
    assert (await caller.token(grant_type="client_credentials")).status_code == 500
    await caller.http.delete("/_control/faults")
    assert (await caller.token(grant_type="client_credentials")).status_code == 200

    changed = await caller.http.patch("/_control/options", json={"mode": "static", "access_token_seconds": 5})
    assert (changed.json()["mode"], changed.json()["access_token_seconds"]) == ("static", 5)
    client = {"client_id": "third", "client_secrets": ["one", "two"], "redirect_uris": [CALLBACK]}
    assert (await post("/_control/clients", json=client)).status_code == 200
    assert (await caller.token(auth=("third", "two"), grant_type="client_credentials")).status_code == 200
    kid = (await post("/_control/keys", json={"keep_old": False})).json()["kid"]
    assert [key["kid"] for key in (await caller.http.get("/jwks")).json()["keys"]] == [kid]
    minted = (await post("/_control/mint", json={"login": "dora", "scope": "write"})).json()
    assert (await caller.api(minted["access_token"])).json()["scopes"] == ["write"]
    assert (await post("/_control/kill", json={"login": "dora"})).json() == {"killed": 1}
    assert (await caller.api(minted["access_token"])).status_code == 401


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/_control/faults", "{"),
        ("/_control/faults", '{"preset": "explode"}'),
        ("/_control/faults", '{"kind": "explode"}'),
        ("/_control/clients", "{}"),
        ("/_control/mint", "[]"),
        ("/_control/mint", ""),
    ],
)
async def test_a_wrong_instruction_is_refused_with_a_reason(caller: Caller, path: str, body: str) -> None:
    answer = await caller.http.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json()["reason"]


async def test_without_the_option_there_is_no_control(opened: Opener) -> None:
    async with opened() as caller:
        for path in ("/_control/log", "/_control/faults"):
            assert (await caller.http.get(path)).status_code == 404
    with pytest.raises(ValueError, match="loopback only"):
        async with serve_sandbox(SandboxOptions(control=True), host="0.0.0.0"):  # noqa: S104 - refused
            pass


# Serving


async def test_it_serves_ipv6_and_a_named_issuer() -> None:
    async with serve_sandbox(host="::1") as sandbox, httpx2.AsyncClient(trust_env=False) as http:
        assert sandbox.issuer.startswith("http://[::1]:")
        assert (await http.get(f"{sandbox.issuer}/api/me")).status_code == 401
    async with serve_sandbox(SandboxOptions(issuer="https://sandbox.test")) as named:
        assert named.issuer == "https://sandbox.test"


async def test_a_taken_port_is_an_error(caller: Caller) -> None:
    with pytest.raises(OSError, match="in use"):
        async with serve_sandbox(port=urlsplit(caller.sandbox.issuer).port or 0):
            pass


async def test_the_end_of_the_block_ends_requests_that_are_under_way(opened: Opener) -> None:
    async with opened() as caller:
        caller.sandbox.state.add_fault(Fault(kind="stall", seconds=60))
        waiting = asyncio.create_task(caller.refresh("whatever"))
        await eventually(lambda: caller.sandbox.state.visits)
        started = time.monotonic()
    with pytest.raises(httpx2.TransportError):
        await waiting
    assert time.monotonic() - started < 2


async def test_without_an_issuer_or_http_it_refuses_to_work() -> None:
    with pytest.raises(ValueError, match="issuer"):
        create_sandbox(SandboxOptions())
    sandbox = create_sandbox(SandboxOptions(issuer="http://127.0.0.1:1"))

    async def never(*_: Any) -> Any:
        raise AssertionError

    with pytest.raises(RuntimeError, match="HTTP only"):
        await sandbox({"type": "websocket"}, never, never)


async def test_under_another_server_a_drop_is_an_error_and_not_an_answer() -> None:
    sandbox = create_sandbox(SandboxOptions(issuer="http://127.0.0.1:1"))
    sandbox.state.add_fault("drop_request", endpoint="jwks")
    transport = httpx2.ASGITransport(app=sandbox)
    async with httpx2.AsyncClient(transport=transport, base_url="http://sandbox.test") as http:
        with pytest.raises(RuntimeError, match="serve_sandbox"):
            await http.get("/jwks")
        assert (await http.get("/jwks")).status_code == 200


async def test_run_sandbox_prints_where_and_ends_by_signal(capsys: pytest.CaptureFixture[str]) -> None:
    running = asyncio.create_task(run_sandbox("127.0.0.1", 0, SandboxOptions()))
    printed: list[str] = []

    def has_printed() -> str:
        printed.append(capsys.readouterr().out)
        return printed[-1]

    await eventually(has_printed)
    issuer = printed[-1].removeprefix("sandbox provider: ").strip()
    async with httpx2.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"{issuer}/.well-known/openid-configuration")).json()["issuer"] == issuer
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(running, 5)
    for number in (signal.SIGINT, signal.SIGTERM):
        assert not asyncio.get_running_loop().remove_signal_handler(number)


def test_the_command_runs_on_uvloop_and_drops_there_too(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen: list[bytes | type[Exception]] = []
    visitor = threading.Thread(target=visit, args=(port, seen))
    visitor.start()
    main(
        ["--port", str(port), "--mode", "grace", "--control", "--auto-consent", "--redirect-uri", "https://app.test/cb"]
    )
    visitor.join()
    assert seen == [b"", ConnectionResetError]
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out


def visit(port: int, seen: list[bytes | type[Exception]]) -> None:
    """Steer the sandbox from another thread, see two drops, then end it by the signal an operator would send."""
    base = f"http://127.0.0.1:{port}"
    with httpx2.Client(base_url=base, trust_env=False, transport=httpx2.HTTPTransport(retries=8)) as http:
        http.post("/_control/faults", json={"preset": "drop_answer"})
        http.post("/_control/faults", json={"preset": "drop_answer", "reset": True})
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(raw_refresh("whatever"))
            try:
                seen.append(connection.recv(100))
            except ConnectionResetError:
                seen.append(ConnectionResetError)
    os.kill(os.getpid(), signal.SIGTERM)


async def test_serving_changes_no_logger() -> None:
    access = logging.getLogger("uvicorn.access")
    before = (access.propagate, access.handlers[:], access.level)
    async with serve_sandbox() as sandbox, httpx2.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"{sandbox.issuer}/jwks")).status_code == 200
    assert (access.propagate, access.handlers, access.level) == before


async def test_codes_and_states_stand_in_no_log(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    for client in ("httpx2", "httpcore2"):  # the client's own log of its URLs is not the sandbox's
        caplog.set_level("ERROR", logger=client)
    code = await caller.code(state="canary-state")
    await caller.exchange(code)
    assert code not in caplog.text
    assert "canary-state" not in caplog.text
