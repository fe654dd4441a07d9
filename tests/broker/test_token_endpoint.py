"""The OAuth dialogue against published vectors, recorded answers, and everything that must not pass for a token."""

from __future__ import annotations

import base64
import importlib
import json
import math
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey

from broker.credentials.renewals import dialogue_of
from broker.egress import NotSent
from broker.token_endpoint import (
    _KNOWN_ERRORS,
    MAX_LIFETIME_SECONDS,
    MAX_TOKEN_LENGTH,
    Client,
    TokenAnswer,
    TokenRefusal,
    authorize_url,
    challenge,
    discovery_url,
    exchange_request,
    granted_scopes,
    missing_scopes,
    new_verifier,
    parse_answer,
    parse_discovery,
    refresh_request,
    strict_object,
)
from providers import load_catalog
from providers.spec import RESERVED_AUTHORIZE_PARAMS, ClientAuth, Incoming, OAuth2, Outgoing, Secret

VECTORS = json.loads((Path(__file__).parent / "data" / "oauth_vectors.json").read_text("utf-8"))
CATALOG = {name: provider.oauth2 for name, provider in load_catalog().items() if provider.oauth2 is not None}
GITHUB, GOOGLE, OIDC = CATALOG["github"], CATALOG["google"], CATALOG["oidc"]
PLAIN = OAuth2(authorize_url="https://as.test/authorize", token_url="https://as.test/token")
NOW = 1_800_000_000.0
TOKEN_URL = "https://as.test/token"
GOOD: dict[str, Any] = {"access_token": "2YotnFZFEjr1zCsicMWpAA", "token_type": "Bearer"}


def vector(suite: str, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    (found,) = [v for v in VECTORS if v["suite"] == suite and v["case"].startswith(case)]
    return found["inputs"], found["expected"]


def client(auth: ClientAuth = "client_secret_post", client_id: str = "s6BhdRkqt3") -> Client:
    return Client(client_id, (Secret("7Fjfp0ZBr1KtDRbnfVdmIw"),), auth)


def form(request: Outgoing) -> dict[str, str]:
    pairs = parse_qsl(request.body.decode("ascii"), keep_blank_values=True, strict_parsing=True)
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def answer(body: object, status: int = 200, **headers: str) -> Incoming:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Incoming(status, {name.replace("_", "-"): value for name, value in headers.items()}, raw)


def parsed(body: object, status: int = 200, *, oauth2: OAuth2 = PLAIN, **headers: str) -> TokenAnswer | TokenRefusal:
    return parse_answer(oauth2, answer(body, status, **headers), received_at=NOW)


def token(body: object, *, oauth2: OAuth2 = PLAIN) -> TokenAnswer:
    found = parsed(body, oauth2=oauth2)
    assert isinstance(found, TokenAnswer)
    return found


def outcome(body: object, status: int = 200, *, oauth2: OAuth2 = PLAIN) -> tuple[str, str]:
    found = parsed(body, status, oauth2=oauth2)
    assert isinstance(found, TokenRefusal)
    return found.outcome, found.error


# --- PKCE and the authorization request


@pytest.mark.parametrize(("suite", "case"), [("rfc7636", "Appendix B"), ("pkce-gitlab-docs", "S256")])
def test_the_challenge_is_the_published_one(suite: str, case: str) -> None:
    given_, expected = vector(suite, case)
    assert challenge(Secret(given_["code_verifier"])) == expected["code_challenge"]


def test_every_verifier_is_new_and_long_enough() -> None:
    verifiers = {new_verifier().reveal() for _ in range(100)}
    assert len(verifiers) == 100
    assert all(len(verifier) == 43 and verifier.isascii() for verifier in verifiers)
    assert all(len(challenge(Secret(verifier))) == 43 for verifier in verifiers)


def url_with(*, oauth2: OAuth2 = PLAIN, **changes: Any) -> str:
    values: dict[str, Any] = {
        "authorize_url": "https://server.example.com/authorize",
        "client_id": "s6BhdRkqt3",
        "redirect_uri": "https://client.example.com/cb",
        "scopes": (),
        "state": "xyz",
        "verifier_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM",
        "nonce": None,
        "extra": {},
    }
    return authorize_url(oauth2, **{**values, **changes})


def query(url: str) -> dict[str, str]:
    pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    assert len(dict(pairs)) == len(pairs), "a parameter comes twice"
    return dict(pairs)


def test_the_authorization_request_is_the_published_one_with_pkce() -> None:
    _, expected = vector("rfc6749", "4.1.1")
    url = url_with()
    assert url.startswith("https://server.example.com/authorize?")
    pkce = {"code_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM", "code_challenge_method": "S256"}
    assert query(url) == query("https://x" + expected["request_target"]) | pkce


def test_scopes_nonce_and_extra_parameters_are_added() -> None:
    extra = {"access_type": "offline", "uri": "a b&c", "response": ""}
    found = query(url_with(scopes=("read:user", "user:email"), nonce="n-0S6", extra=extra))
    assert found["scope"] == "read:user user:email"
    assert found["nonce"] == "n-0S6"
    assert extra.items() <= found.items()
    assert "response_mode" not in found


def test_scopes_are_joined_as_the_provider_wants() -> None:
    assert query(url_with(oauth2=replace(PLAIN, scope_separator=","), scopes=("a", "b")))["scope"] == "a,b"


def test_a_query_that_the_configured_url_has_is_kept() -> None:
    found = query(url_with(authorize_url="https://as.test/authorize?tenant=a%26b&empty=&p=caf%C3%A9"))
    assert {"tenant": "a&b", "empty": "", "p": "café"}.items() <= found.items()


def test_a_parameter_of_the_flow_never_comes_twice() -> None:
    dirty = (
        "https://as.test/authorize?state=fixed&response_mode=fragment&prompt=none&client_id=other&request_uri=u#frag"
    )
    url = url_with(authorize_url=dirty, extra={"prompt": "consent"})
    found = query(url)
    assert (found["state"], found["client_id"], found["prompt"]) == ("xyz", "s6BhdRkqt3", "consent")
    assert not {"response_mode", "request_uri"} & found.keys()
    assert not urlsplit(url).fragment


@pytest.mark.parametrize("name", sorted(RESERVED_AUTHORIZE_PARAMS))
def test_an_extra_parameter_cannot_replace_one_of_the_flow(name: str) -> None:
    with pytest.raises(ValueError, match="the flow itself sets"):
        url_with(extra={name: "x"})


@pytest.mark.parametrize("name", ["client_id", "redirect_uri", "state", "verifier_challenge", "nonce"])
def test_an_empty_parameter_is_not_left_out_silently(name: str) -> None:
    empty: dict[str, Any] = {name: ""}
    with pytest.raises(ValueError, match="left out silently"):
        url_with(**empty)


@given(
    st.text(), st.text(min_size=1), st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=3)
)
@settings(max_examples=100, deadline=None)
def test_parameters_survive_the_url(tenant: str, state: str, extra: dict[str, str]) -> None:
    texts = [tenant, state, *extra, *extra.values()]
    if (
        any("\ud800" <= letter <= "\udfff" for text in texts for letter in text)
        or RESERVED_AUTHORIZE_PARAMS & extra.keys()
    ):
        return
    found = query(url_with(state=state, extra={**extra, "tenant": tenant}))
    assert found == found | {"state": state, "code_challenge_method": "S256"} | {**extra, "tenant": tenant}


# --- token requests


def exchange(oauth2: OAuth2 = PLAIN, **changes: Any) -> Outgoing:
    values: dict[str, Any] = {
        "token_url": TOKEN_URL,
        "client": client(),
        "secret": Secret("7Fjfp0ZBr1KtDRbnfVdmIw"),
        "code": Secret("SplxlOBeZQQYbYS6WxSbIA"),
        "redirect_uri": "https://client.example.com/cb",
        "verifier": Secret("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"),
        "now": 1_700_000_000.0,
    }
    return exchange_request(oauth2, **{**values, **changes})


def test_the_exchange_carries_code_verifier_and_the_same_redirect_uri() -> None:
    request = exchange()
    assert (request.method, request.url) == ("POST", TOKEN_URL)
    assert form(request) == {
        "grant_type": "authorization_code",
        "code": "SplxlOBeZQQYbYS6WxSbIA",
        "redirect_uri": "https://client.example.com/cb",
        "code_verifier": "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
        "client_id": "s6BhdRkqt3",
        "client_secret": "7Fjfp0ZBr1KtDRbnfVdmIw",
    }
    assert request.headers == {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}


def test_a_refresh_with_the_secret_in_the_form_is_the_published_one() -> None:
    given_, expected = vector("rfc6749", "2.3.1")
    request = refresh_request(
        PLAIN,
        token_url=TOKEN_URL,
        client=client(client_id=given_["client_id"]),
        secret=Secret(given_["client_secret"]),
        refresh_token=Secret(given_["refresh_token"]),
        redirect_uri="https://client.example.com/cb",
        now=0.0,
    )
    assert form(request) == expected["form"]
    assert request.headers["Content-Type"] == expected["content_type"]


def test_basic_takes_id_and_secret_form_encoded() -> None:
    request = exchange(client=client("client_secret_basic", "my client:1"), secret=Secret("p%a+s:s é"))
    decoded = base64.b64decode(request.headers["Authorization"].removeprefix("Basic "))
    assert decoded == b"my+client%3A1:p%25a%2Bs%3As+%C3%A9"
    assert not {"client_id", "client_secret"} & form(request).keys()


def test_a_public_client_names_itself_only() -> None:
    request = exchange(client=client("none"), secret=None)
    assert form(request)["client_id"] == "s6BhdRkqt3"
    assert "client_secret" not in form(request)
    assert "Authorization" not in request.headers


def test_the_providers_headers_are_sent() -> None:
    assert exchange(GITHUB).headers["Accept"] == "application/json"
    assert exchange(replace(PLAIN, token_headers={"Accept": "text/json", "X-A": "1"})).headers["Accept"] == "text/json"


@pytest.mark.parametrize("auth", ["client_secret_basic", "client_secret_post"])
def test_without_a_client_secret_nothing_is_sent(auth: ClientAuth) -> None:
    with pytest.raises(NotSent, match="no client secret"):
        exchange(client=client(auth), secret=None)


def test_a_client_that_signs_sends_no_secret_but_an_assertion_for_the_token_endpoint() -> None:
    key = ECKey.generate_key("P-256")
    request = exchange(client=client("private_key_jwt"), secret=Secret(key.as_pem(private=True).decode()))
    fields = form(request)
    assert fields["client_assertion_type"] == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
    token = jwt.decode(fields["client_assertion"], key, algorithms=["ES256"])
    assert {name: token.claims[name] for name in ("iss", "sub", "aud")} == {
        "iss": "s6BhdRkqt3",
        "sub": "s6BhdRkqt3",
        "aud": TOKEN_URL,
    }
    assert (token.claims["iat"], token.claims["exp"]) == (1_700_000_000, 1_700_000_300)
    assert token.header["kid"] == key.thumbprint()
    assert "client_secret" not in fields
    again = exchange(client=client("private_key_jwt"), secret=Secret(key.as_pem(private=True).decode()))
    assert jwt.decode(form(again)["client_assertion"], key, algorithms=["ES256"]).claims["jti"] != token.claims["jti"]


def test_a_client_secret_that_is_no_private_key_cannot_sign_and_is_not_quoted() -> None:
    with pytest.raises(NotSent, match="neither a PEM nor a JWK") as refused:
        exchange(client=client("private_key_jwt"))
    assert "7Fjfp0ZBr1KtDRbnfVdmIw" not in str(refused.value)


def test_a_json_endpoint_gets_json_and_a_provider_without_pkce_no_verifier() -> None:
    request = exchange(replace(PLAIN, token_format="json", pkce=False, exchange_params={"expiring": "1"}))
    assert request.headers["Content-Type"] == "application/json"
    body = json.loads(request.body)
    assert body["expiring"] == "1"
    assert "code_verifier" not in body
    assert body["grant_type"] == "authorization_code"


@pytest.mark.parametrize("changes", [{"code": Secret("")}, {"redirect_uri": ""}, {"verifier": Secret("")}])
def test_an_exchange_without_code_address_or_verifier_is_not_built(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="left out silently"):
        exchange(**changes)


def test_an_empty_token_is_not_sent() -> None:
    with pytest.raises(ValueError, match="empty"):
        refresh_request(
            PLAIN,
            token_url=TOKEN_URL,
            client=client(),
            secret=Secret("s"),
            refresh_token=Secret(""),
            redirect_uri="https://client.example.com/cb",
            now=0.0,
        )


@given(
    code=st.text(min_size=1),
    secret=st.text(min_size=1),
    auth=st.sampled_from(["client_secret_basic", "client_secret_post"]),
)
@settings(max_examples=100, deadline=None)
def test_every_value_survives_the_form_and_no_secret_shows(code: str, secret: str, auth: ClientAuth) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in code + secret):
        return
    request = exchange(client=client(auth), secret=Secret(secret), code=Secret(code))
    assert form(request)["code"] == code
    assert auth == "client_secret_basic" or form(request)["client_secret"] == secret
    shown = repr(request) + repr(client(auth)) + request.url
    assert len(secret) < 8 or secret not in shown
    assert "7Fjfp0ZBr1KtDRbnfVdmIw" not in shown


# --- answers that are tokens


def test_a_full_answer_is_read() -> None:
    found = token(
        {**GOOD, "expires_in": 3600, "refresh_token": "tGzv3JOkF0XG5Qx2TlKWIA", "scope": "a b", "extra": {"x": 1}}
    )
    assert found == TokenAnswer(
        access_token=Secret("2YotnFZFEjr1zCsicMWpAA"),
        token_type="Bearer",
        expires_at=NOW + 3600,
        refresh_token=Secret("tGzv3JOkF0XG5Qx2TlKWIA"),
        refresh_expires_at=None,
        scopes=("a", "b"),
        id_token=None,
    )
    assert "2Yot" not in repr(found)
    assert "tGzv" not in repr(found)


def test_the_published_answer_with_a_made_up_token_type_is_refused_and_with_bearer_read() -> None:
    given_, expected = vector("rfc6749", "4.1.4")
    assert outcome(given_["body"].encode()) == ("invalid", "invalid_answer")
    found = token(given_["body"].replace('"example"', '"bearer"').encode())
    assert found.access_token.reveal() == expected["access_token"]
    assert found.refresh_token == Secret(expected["refresh_token"])
    assert found.expires_at == NOW + expected["expires_in"]


@pytest.mark.parametrize("token_type", ["bearer", "BEARER", "Bearer", None])
def test_any_spelling_of_bearer_is_bearer(token_type: str | None) -> None:
    assert token({**GOOD, "token_type": token_type}).token_type == "Bearer"
    assert token({"access_token": "a"}).token_type == "Bearer"


@pytest.mark.parametrize(
    ("expires_in", "seconds"),
    [
        (3600, 3600),
        ("3600", 3600),
        (3599.5, 3599.5),
        (0, 0),
        ("0", 0),
        (None, None),
        (MAX_LIFETIME_SECONDS + 1, MAX_LIFETIME_SECONDS),
        (10**400, MAX_LIFETIME_SECONDS),
        ("9" * 20, MAX_LIFETIME_SECONDS),
    ],
)
def test_a_lifetime_becomes_an_end_of_at_most_ten_years(expires_in: object, seconds: float | None) -> None:
    found = token({**GOOD, "expires_in": expires_in, "refresh_token_expires_in": expires_in})
    end = None if seconds is None else NOW + seconds
    assert (found.expires_at, found.refresh_expires_at) == (end, end)


@pytest.mark.parametrize(
    ("scope", "scopes"),
    [
        ("a b", ("a", "b")),
        ("  a  a ", ("a",)),
        ("", ()),
        ([], ()),
        (["a", "b", "a"], ("a", "b")),
        (None, None),
        ("repo,gist", ("repo,gist",)),
    ],
)
def test_scopes_come_as_text_or_list(scope: object, scopes: tuple[str, ...] | None) -> None:
    assert token({**GOOD, "scope": scope}).scopes == scopes


def test_an_id_token_is_kept_where_openid_connect_is_spoken() -> None:
    body = {**GOOD, "id_token": "e30.e30.c2ln"}
    assert token(body, oauth2=OIDC).id_token == Secret("e30.e30.c2ln")
    assert token({**GOOD, "id_token": 7}).id_token is None


def test_a_201_is_as_good_as_a_200() -> None:
    assert isinstance(parsed(GOOD, 201), TokenAnswer)


@pytest.mark.parametrize(
    "name", ["refresh_token", "expires_in", "scope", "id_token", "refresh_token_expires_in", "error"]
)
def test_null_means_absent(name: str) -> None:
    assert token({**GOOD, name: None}, oauth2=OIDC) == token(GOOD, oauth2=OIDC)


# --- answers that are not (threats T1, T2)


@pytest.mark.parametrize(
    "access_token",
    [
        123,
        "",
        None,
        ["a"],
        {"a": "b"},
        "a\r\nX-Evil: 1",
        "a\x00",
        "tökén",
        "\ud800",
        " a",
        "a ",
        1.5,
        "a" * (MAX_TOKEN_LENGTH + 1),
        True,
        False,
    ],
)
def test_nothing_but_a_clean_text_is_an_access_token(access_token: object) -> None:
    assert outcome({**GOOD, "access_token": access_token}) == ("invalid", "invalid_answer")


def test_the_longest_token_is_read() -> None:
    longest = "a" * MAX_TOKEN_LENGTH
    assert token({**GOOD, "access_token": longest}).access_token.reveal() == longest


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'""',
        b"null",
        b"true",
        b"[]",
        b'["access_token"]',
        b'"access_token"',
        b"<html>Not Found</html>",
        b"access_token=gho_16C7e42F292c6912E7710c838347Ae178B4a&scope=repo&token_type=bearer",  # GitHub without Accept
        b'{"access_token":"a","access_token":"b"}',
        b'{"access_token":"a","x":{"y":1,"y":2}}',
        b'{"access_token":"a","expires_in":NaN}',
        b'{"access_token":"a","expires_in":Infinity}',
        b'{"access_token":"a","expires_in":' + b"1" * 5000 + b"}",
        b'{"access_token":"a"} trailing',
        b'\xef\xbb\xbf{"access_token":"a"}',
        b'{"access_token":"\xff"}',
        '{"access_token":"a"}'.encode("utf-16"),
        b'{"x":' + b"[" * 100_000,
        b"[" * 100_000,
    ],
)
def test_a_malformed_document_is_no_token(body: bytes) -> None:
    assert outcome(body) == ("invalid", "invalid_answer")


@pytest.mark.parametrize(
    "changes",
    [
        {"token_type": "mac"},
        {"token_type": "N_A"},
        {"token_type": "DPoP"},
        {"token_type": ""},
        {"token_type": ["bearer"]},
        {"refresh_token": 7},
        {"refresh_token": ""},
        {"refresh_token": False},
        {"refresh_token": "a\nb"},
    ],
)
def test_a_malformed_field_spoils_the_answer(changes: dict[str, Any]) -> None:
    assert outcome({**GOOD, **changes}) == ("invalid", "invalid_answer")


@pytest.mark.parametrize(
    "changes",
    [
        {"expires_in": -1},
        {"expires_in": True},
        {"expires_in": "soon"},
        {"expires_in": "-1"},
        {"expires_in": "٣"},
        {"expires_in": ""},
        {"expires_in": [3600]},
        {"refresh_token_expires_in": -1},
        {"scope": 7},
        {"scope": {"a": 1}},
        {"scope": ["a", 1]},
        {"scope": 'a "b"'},
        {"scope": "a\x00"},
        {"scope": ["a b"]},
        {"scope": "a " * MAX_TOKEN_LENGTH},
    ],
)
def test_a_malformed_optional_member_counts_as_absent_and_is_named(changes: dict[str, Any]) -> None:
    assert token({**GOOD, **changes}) == replace(token(GOOD), odd=tuple(changes))


def test_a_lifetime_beyond_all_numbers_counts_as_absent() -> None:
    found = parsed(b'{"access_token":"a","expires_in":1e400,"refresh_token_expires_in":-1e400}')
    assert isinstance(found, TokenAnswer)
    assert (found.expires_at, found.refresh_expires_at) == (None, None)
    assert found.odd == ("expires_in", "refresh_token_expires_in")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 599])
@pytest.mark.parametrize("body", [GOOD, {"message": "slow"}, {"error": "invalid_grant"}, b"<html>", b""])
def test_a_status_that_means_later_is_transient_whatever_it_carries(status: int, body: object) -> None:
    assert outcome(body, status) == ("transient", "temporarily_unavailable")


@pytest.mark.parametrize("status", [100, 202, 204, 206, 301, 302, 307, 308])
def test_a_status_that_no_token_endpoint_sends_is_invalid(status: int) -> None:
    assert outcome(GOOD, status) == ("invalid", "invalid_answer")
    assert outcome({"error": "invalid_grant"}, status) == ("invalid", "invalid_answer")


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_token_like_json_beside_an_error_status_is_no_token(status: int) -> None:
    assert outcome(GOOD, status) == ("invalid", "unknown_error")


def test_a_token_beside_an_error_is_no_token() -> None:
    assert outcome({**GOOD, "error": "invalid_grant"}) == ("permanent", "invalid_grant")
    assert outcome({**GOOD, "error": ""}) == ("invalid", "unknown_error")
    assert outcome({**GOOD, "error": False}) == ("invalid", "unknown_error")


# --- what an error means


@pytest.mark.parametrize("status", [200, 400, 401, 403])
def test_a_dead_grant_is_permanent_whatever_the_status(status: int) -> None:
    assert outcome({"error": "invalid_grant"}, status) == ("permanent", "invalid_grant")


def test_the_published_codes_do_not_kill_a_grant_except_the_one_that_says_so() -> None:
    _, expected = vector("rfc6749", "5.2")
    found = {code: outcome({"error": code}, 400) for code in expected["codes"]}
    assert found.pop("invalid_grant") == ("permanent", "invalid_grant")
    assert found.pop("invalid_client") == ("client_refused", "invalid_client")
    assert all(found[code] == ("invalid", code) for code in found)


@pytest.mark.parametrize(
    "error", ["made_up", "", 7, None, ["invalid_grant"], {"code": 400}, "invalid_grant ", "CANARY\n"]
)
def test_an_unknown_error_kills_nothing_and_is_not_quoted(error: object) -> None:
    found = parsed({"error": error, "error_description": "CANARY"}, 400)
    assert found == TokenRefusal("invalid", "unknown_error")
    assert "CANARY" not in repr(found)


@pytest.mark.parametrize(
    ("provider", "status", "body", "expected"),
    [
        # https://docs.github.com/en/apps/oauth-apps/maintaining-oauth-apps/troubleshooting-oauth-app-access-token-request-errors
        (
            "github",
            200,
            {
                "error": "incorrect_client_credentials",
                "error_description": "The client_id and/or client_secret passed are incorrect.",
            },
            ("client_refused", "incorrect_client_credentials"),
        ),
        (
            "github",
            200,
            {"error": "bad_verification_code", "error_description": "The code passed is incorrect or expired."},
            ("permanent", "bad_verification_code"),
        ),
        ("github", 200, {"error": "redirect_uri_mismatch"}, ("invalid", "redirect_uri_mismatch")),
        ("github", 200, {"error": "unverified_user_email"}, ("permanent", "unverified_user_email")),
        # https://www.nango.dev/blog/github-app-oauth-refresh-token-bad-refresh-token (seen with 200 and with 400)
        (
            "github",
            200,
            {"error": "bad_refresh_token", "error_description": "The refresh token passed is incorrect or expired."},
            ("permanent", "bad_refresh_token"),
        ),
        ("github", 400, {"error": "bad_refresh_token"}, ("permanent", "bad_refresh_token")),
        ("github", 404, b"<!DOCTYPE html>", ("invalid", "invalid_answer")),
        # https://developers.google.com/identity/protocols/oauth2/web-server#errors
        (
            "google",
            400,
            {"error": "invalid_grant", "error_description": "Token has been expired or revoked."},
            ("permanent", "invalid_grant"),
        ),
        (
            "google",
            400,
            {"error": "invalid_grant", "error_description": "reauth related error", "error_subtype": "invalid_rapt"},
            ("permanent", "invalid_grant"),
        ),
        ("google", 401, {"error": "invalid_client"}, ("client_refused", "invalid_client")),
        ("google", 401, {"error": "deleted_client"}, ("client_refused", "deleted_client")),
        ("google", 401, {"error": "unauthorized_client"}, ("client_refused", "unauthorized_client")),
        ("google", 400, {"error": "admin_policy_enforced"}, ("permanent", "admin_policy_enforced")),
        # googleapis/google-auth-library-python oauth2/_client.py: retryable in error or error_description
        ("google", 400, {"error": "internal_failure"}, ("transient", "internal_failure")),
        (
            "google",
            400,
            {"error": "invalid_request", "error_description": "internal_failure"},
            ("transient", "internal_failure"),
        ),
        # https://github.com/keycloak/keycloak-nodejs-connect/pull/119
        (
            "oidc",
            401,
            {"error": "unauthorized_client", "error_description": "Invalid client or Invalid client credentials"},
            ("client_refused", "unauthorized_client"),
        ),
        (
            "oidc",
            400,
            {"error": "invalid_grant", "error_description": "Token is not active"},
            ("permanent", "invalid_grant"),
        ),
        ("oidc", 400, {"error": "temporarily_unavailable"}, ("transient", "temporarily_unavailable")),
    ],
)
def test_recorded_refusals(provider: str, status: int, body: object, expected: tuple[str, str]) -> None:
    assert outcome(body, status, oauth2=CATALOG[provider]) == expected


# https://docs.github.com/en/apps/creating-github-apps/authenticating-with-a-github-app/refreshing-user-access-tokens
GITHUB_APP = {
    "access_token": "ghu_16C7e42F292c6912E7710c838347Ae178B4a",
    "expires_in": 28800,
    "refresh_token": "ghr_1B4a2e77838347a7E420ce178F2E7c6912E169246c34E1ccbF66C46812d16D5B1A9Dc86A1498",
    "refresh_token_expires_in": 15811200,
    "scope": "",
    "token_type": "bearer",
}
# https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/authorizing-oauth-apps
GITHUB_OAUTH_APP = {
    "access_token": "gho_16C7e42F292c6912E7710c838347Ae178B4a",
    "scope": "repo,gist",
    "token_type": "bearer",
}


def test_a_github_app_answers_with_ends_and_without_scopes() -> None:
    found = token(GITHUB_APP, oauth2=GITHUB)
    assert (found.expires_at, found.refresh_expires_at) == (NOW + 28800, NOW + 15811200)
    assert (found.scopes, found.scopes_apply) == (None, False)
    assert granted_scopes(GITHUB, ("read:user",), found) == ()
    assert missing_scopes(GITHUB, ("read:user",), found.scopes) == ()


def test_a_github_oauth_app_answers_with_commas_and_without_an_end() -> None:
    found = token(GITHUB_OAUTH_APP, oauth2=GITHUB)
    assert (found.scopes, found.expires_at, found.refresh_token) == (("repo", "gist"), None, None)
    assert token({**GITHUB_OAUTH_APP, "scope": "repo, gist"}, oauth2=GITHUB).scopes == ("repo", "gist")
    assert token({**GITHUB_OAUTH_APP, "scope": ""}, oauth2=GITHUB).scopes == ()


# https://developers.google.com/identity/protocols/oauth2/web-server#exchange-authorization-code
GOOGLE_ANSWER = {
    "access_token": "1/fFAGRNJru1FTz70BzhT3Zg",
    "expires_in": 3920,
    "token_type": "Bearer",
    "scope": "openid https://www.googleapis.com/auth/userinfo.email https://www.googleapis.com/auth/calendar.readonly",
    "refresh_token": "1//xEoDL4iW3cxlI7yDbSRFYNG01kVKM2C-259HOF2aQbI",
}


def test_google_answers_with_the_long_names_of_scopes() -> None:
    found = token(GOOGLE_ANSWER, oauth2=GOOGLE)
    asked = ("openid", "email", "profile", "https://www.googleapis.com/auth/calendar.readonly")
    assert granted_scopes(GOOGLE, asked, found) == ("openid", "email", asked[3])
    assert missing_scopes(GOOGLE, asked, found.scopes) == ("profile",)
    assert found.refresh_expires_at is None
    assert (
        token({**GOOGLE_ANSWER, "refresh_token_expires_in": 604799}, oauth2=GOOGLE).refresh_expires_at == NOW + 604799
    )


# Keycloak, https://www.keycloak.org/docs/latest/securing_apps/ and org.keycloak.representations.AccessTokenResponse
def test_keycloak_answers_with_its_own_name_for_the_refresh_tokens_end() -> None:
    body = {**GOOD, "refresh_token": "r", "refresh_expires_in": 1800, "not-before-policy": 0, "session_state": "s"}
    assert token(body, oauth2=OIDC).refresh_expires_at == NOW + 1800
    assert token({**body, "refresh_expires_in": 0}, oauth2=OIDC).refresh_expires_at is None


# --- reshaping by the provider


def test_an_answer_is_reshaped_before_it_is_checked() -> None:
    def inner(body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**body, **body.get("authed_user", {})}

    found = token({"authed_user": GOOD}, oauth2=replace(PLAIN, parse_token=inner))
    assert found.access_token == Secret(GOOD["access_token"])


def test_a_function_that_stumbles_over_an_answer_makes_it_invalid() -> None:
    def stumble(body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"access_token": body["no such key"]}

    assert outcome(GOOD, oauth2=replace(PLAIN, parse_token=stumble)) == ("invalid", "invalid_answer")


def test_a_function_that_returns_something_else_makes_it_invalid() -> None:
    wrong = replace(PLAIN, parse_token=lambda _: ["access_token"])  # type: ignore[arg-type,return-value]
    assert outcome(GOOD, oauth2=wrong) == ("invalid", "invalid_answer")


# --- Retry-After


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        ("0", 0.0),
        ("86400", 3600.0),
        ("9" * 20, 3600.0),
        (formatdate(NOW + 90, usegmt=True), 90.0),
        (formatdate(NOW + 90, usegmt=False), 90.0),  # -0000: a date without a zone is UTC
        (formatdate(NOW - 90, usegmt=True), 0.0),
        (formatdate(NOW + 10_000, usegmt=True), 3600.0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("120, 120", None),
        ("Fri, 99 Xxx 9999 99:99:99 GMT", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_date(value: str, seconds: float | None) -> None:
    found = parsed({}, 503, retry_after=value)
    assert found == TokenRefusal("transient", "temporarily_unavailable", seconds)


def test_retry_after_counts_for_transient_errors_only() -> None:
    later = parsed({"error": "slow_down"}, 400, retry_after="7")
    never = parsed({"error": "invalid_grant"}, 400, retry_after="7")
    assert later == TokenRefusal("transient", "slow_down", 7.0)
    assert never == TokenRefusal("permanent", "invalid_grant", None)


@given(st.text(st.characters(max_codepoint=255), max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_retry_after_breaks_the_parser(value: str) -> None:
    found = parsed({}, 429, retry_after=value)
    assert isinstance(found, TokenRefusal)
    assert found.retry_after_seconds is None or 0 <= found.retry_after_seconds <= 3600


# --- law 7: every answer from a JSON grammar is ok, transient, permanent or misconfigured

CANARY = "CANARY-9f3e"
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        [CANARY, "Bearer", "bearer", "a b", "a,b", "3600", "ghu_x", "invalid_grant", "invalid_client", "server_error"]
    )
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "access_token token_type expires_in refresh_token refresh_token_expires_in refresh_expires_in scope id_token error"
)
OBJECTS = st.dictionaries(
    st.sampled_from([*FIELDS.split(), "error_description"]) | st.text(max_size=6), JSON, max_size=9
)
LIKELY = st.fixed_dictionaries(
    {"access_token": st.sampled_from(["token", CANARY, "ghu_token"])},
    optional={
        "token_type": st.sampled_from(["bearer", "Bearer", "mac"]),
        "expires_in": st.integers(-1, 10**12) | st.just("3600"),
        "refresh_token": st.sampled_from(["refresh", "", None]),
        "scope": st.sampled_from(["a b", "a,b", "", ["a"]]),
        "id_token": st.just("e30.e30.c2ln"),
        "x": JSON,
    },
)
STATUSES = st.sampled_from([200] * 8 + [201] * 2) | st.integers(100, 599)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "content-type": st.sampled_from(
            ["application/json", "text/html; charset=utf-8", "application/x-www-form-urlencoded"]
        ),
        "retry-after": st.integers(-10, 10**6).map(str) | st.text(st.characters(max_codepoint=255), max_size=20),
        "date": st.just(formatdate(NOW, usegmt=True)),
    },
)
MINTING = {
    f"{name}, {kind}": dialogue_of(provider, kind)
    for name, provider in load_catalog().items()
    for kind in provider.minting
}
DIALOGUES = {**CATALOG, **MINTING}
LONG = os.environ.get("TEST_LONG") == "1"


def recorded_answers() -> dict[str, list[Any]]:
    """Return what each provider was seen to answer, tokens and refusals, as `tests/providers/behaviours` has it."""
    found: dict[str, list[Any]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "providers" / "behaviours")]):
        for known in importlib.import_module(f"tests.providers.behaviours.{module.name}").BEHAVIOURS:
            answers = (
                known.code_answer,
                known.refresh_answer,
                known.dead.body,
                known.refused_client.body,
                known.busy.body,
            )
            found.setdefault(known.provider, []).extend(answers)
    return found


RECORDED = recorded_answers()


@st.composite
def damaged(draw: st.DrawFn, name: str) -> Any:
    """Draw an answer that the provider gives, with some members put in, taken out, or replaced; or made of nothing."""
    answers = [one for one in RECORDED.get(name.partition(",")[0], []) if isinstance(one, dict)]
    whole = (
        draw(st.sampled_from(answers) if answers else LIKELY) if draw(st.booleans()) else draw(OBJECTS | LIKELY | JSON)
    )
    if not isinstance(whole, dict):
        return whole
    changes = draw(
        st.dictionaries(st.sampled_from([*whole, *NAMES]), JSON | st.sampled_from([GONE, whole]), max_size=3)
    )
    return {key: value for key, value in {**whole, **changes}.items() if value is not GONE}


GONE = object()
NAMES = [
    *FIELDS.split(),
    "error_description",
    "token",
    "authed_user",
    "ok",
    "status",
    "message",
    "errors",
    "instance_url",
]


def texts(value: Any) -> set[str]:
    """Return every string of a JSON value that is not a key."""
    if isinstance(value, str):
        return {value}
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return {text for one in inner for text in texts(one)}


@pytest.mark.parametrize("name", sorted(DIALOGUES))
@given(data=st.data(), status=STATUSES, headers=HEADERS)
@settings(max_examples=3000 if LONG else 60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_answer_has_one_of_the_known_outcomes(
    name: str, data: st.DataObject, status: int, headers: dict[str, str]
) -> None:
    body = data.draw(damaged(name).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30))
    body = body[: len(body) // 2] if data.draw(st.integers(0, 9)) == 0 else body  # cut on the way
    oauth2 = DIALOGUES[name]
    found = parse_answer(oauth2, Incoming(status, headers, body), received_at=NOW)
    assert found == parse_answer(oauth2, Incoming(status, headers, body), received_at=NOW)
    assert CANARY not in repr(found)
    if isinstance(found, TokenRefusal):
        known_refusal(oauth2, found, status)
    else:
        known_token(oauth2, found, status, json.loads(body))
        assert isinstance(parse_answer(oauth2, Incoming(400, headers, body), received_at=NOW), TokenRefusal)


def known_refusal(oauth2: OAuth2, found: TokenRefusal, status: int) -> None:
    """Check that a refusal is transient, permanent or misconfigured, and names itself in our words."""
    assert found.outcome in {"transient", "permanent", "client_refused", "invalid"}
    assert found.error in _KNOWN_ERRORS | oauth2.error_outcomes.keys() | {"invalid_answer", "unknown_error"}
    if status in {408, 429} or status >= 500:
        assert found.outcome == "transient"
    if found.outcome in {"permanent", "client_refused"}:
        assert status in {200, 201} or 400 <= status < 500
    assert found.retry_after_seconds is None or (
        found.outcome == "transient" and 0 <= found.retry_after_seconds <= 3600
    )


def known_token(oauth2: OAuth2, found: TokenAnswer, status: int, sent: Any) -> None:
    """Check that tokens come of success only, are strings that were sent, and that what is told of them makes sense."""
    assert status in {200, 201}
    assert isinstance(sent, dict)
    assert sent.get("error") is None
    secrets = [found.access_token, found.refresh_token, found.id_token]
    assert {secret.reveal() for secret in secrets if secret is not None} <= texts(sent)
    assert found.expires_at is None or (math.isfinite(found.expires_at) and found.expires_at >= 0)
    assert set(missing_scopes(oauth2, ("a",), found.scopes)) <= {"a"}
    assert all(isinstance(scope, str) for scope in granted_scopes(oauth2, ("a",), found))


@given(OBJECTS)
@settings(max_examples=100, deadline=None)
def test_a_strictly_decoded_object_is_what_was_encoded(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    if "NaN" in text or "Infinity" in text:
        return
    assert strict_object(text.encode()) == value


# --- scopes


def test_no_scope_in_the_answer_means_all_that_was_asked() -> None:
    found = token(GOOD)
    assert granted_scopes(PLAIN, ("a", "b", "a"), found) == ("a", "b")
    assert missing_scopes(PLAIN, ("a", "b"), found.scopes) == ()


def test_a_scope_that_a_wider_one_contains_is_not_missing() -> None:
    asked = ("user:email", "read:org", "public_repo", "gist", "read:gpg_key")
    assert missing_scopes(GITHUB, asked, ("user", "admin:org", "repo", "admin:gpg_key")) == ("gist",)
    assert missing_scopes(GITHUB, ("admin:org",), ("read:org",)) == ("admin:org",)


def test_nothing_granted_means_everything_is_missing() -> None:
    assert missing_scopes(PLAIN, ("a", "b", "a"), ()) == ("a", "b")
    assert missing_scopes(PLAIN, (), ()) == ()


def test_a_scope_is_named_as_it_was_asked_for() -> None:
    long_name = "https://www.googleapis.com/auth/userinfo.email"
    found = replace(token(GOOD), scopes=("email", "openid"))
    assert granted_scopes(GOOGLE, (long_name,), found) == (long_name, "openid")
    assert missing_scopes(GOOGLE, (long_name,), found.scopes) == ()
    assert granted_scopes(GOOGLE, (), found) == ("email", "openid")


# --- discovery

ISSUER = "https://idp.example.test/realms/main"
# Shape of Keycloak 26's document, https://idp/realms/main/.well-known/openid-configuration
DOCUMENT: dict[str, Any] = {
    "issuer": ISSUER,
    "authorization_endpoint": f"{ISSUER}/protocol/openid-connect/auth",
    "token_endpoint": f"{ISSUER}/protocol/openid-connect/token",
    "jwks_uri": f"{ISSUER}/protocol/openid-connect/certs",
    "userinfo_endpoint": f"{ISSUER}/protocol/openid-connect/userinfo",
    "revocation_endpoint": f"{ISSUER}/protocol/openid-connect/revoke",
    "device_authorization_endpoint": f"{ISSUER}/protocol/openid-connect/auth/device",
    "token_endpoint_auth_methods_supported": ["private_key_jwt", "client_secret_post", "client_secret_basic"],
    "authorization_response_iss_parameter_supported": True,
    "mtls_endpoint_aliases": {"token_endpoint": "http://evil.test"},
}


@pytest.mark.parametrize("issuer", [ISSUER, f"{ISSUER}/"])
def test_the_metadata_lies_below_the_issuer(issuer: str) -> None:
    assert discovery_url(issuer) == f"{ISSUER}/.well-known/openid-configuration"


def test_the_metadata_is_read_under_our_names() -> None:
    assert parse_discovery(DOCUMENT, issuer=ISSUER) == {
        "issuer": ISSUER,
        "authorize_url": DOCUMENT["authorization_endpoint"],
        "token_url": DOCUMENT["token_endpoint"],
        "jwks_url": DOCUMENT["jwks_uri"],
        "userinfo_url": DOCUMENT["userinfo_endpoint"],
        "revoke_url": DOCUMENT["revocation_endpoint"],
        "device_url": DOCUMENT["device_authorization_endpoint"],
        "iss_in_callback": True,
        "client_auth": "client_secret_basic",
    }


def test_what_may_be_absent_may_be_absent() -> None:
    required = ("issuer", "authorization_endpoint", "token_endpoint", "jwks_uri")
    found = parse_discovery({name: DOCUMENT[name] for name in required}, issuer=ISSUER)
    assert "revoke_url" not in found
    assert found["iss_in_callback"] is False
    assert found["client_auth"] == "client_secret_basic"


@pytest.mark.parametrize(
    ("methods", "auth"),
    [
        (["client_secret_post"], "client_secret_post"),
        (["none"], "none"),
        (["private_key_jwt", "tls_client_auth"], "private_key_jwt"),
        (["tls_client_auth"], None),
        ("client_secret_basic", None),
        ([], None),
        ([["none"]], None),
    ],
)
def test_the_client_proves_itself_in_a_way_that_both_know(methods: object, auth: str | None) -> None:
    document = {**DOCUMENT, "token_endpoint_auth_methods_supported": methods}
    assert parse_discovery(document, issuer=ISSUER).get("client_auth") == auth


@pytest.mark.parametrize("flag", [False, "true", 1, None])
def test_only_a_real_true_says_that_the_callback_carries_the_issuer(flag: object) -> None:
    document = {**DOCUMENT, "authorization_response_iss_parameter_supported": flag}
    assert parse_discovery(document, issuer=ISSUER)["iss_in_callback"] is False


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        "issuer",
        {},
        {**DOCUMENT, "issuer": f"{ISSUER}/"},
        {**DOCUMENT, "issuer": "https://evil.test"},
        {**DOCUMENT, "issuer": [ISSUER]},
        {name: value for name, value in DOCUMENT.items() if name != "token_endpoint"},
        {name: value for name, value in DOCUMENT.items() if name != "jwks_uri"},
        {**DOCUMENT, "token_endpoint": "http://idp.example.test/token"},
        {**DOCUMENT, "token_endpoint": "https://idp.example.test@evil.test/token"},
        {**DOCUMENT, "token_endpoint": "https://idp.example.test\\.evil.test/"},
        {**DOCUMENT, "token_endpoint": "/token"},
        {**DOCUMENT, "token_endpoint": 7},
        {**DOCUMENT, "revocation_endpoint": "http://idp.example.test/revoke"},
        {**DOCUMENT, "userinfo_endpoint": ""},
        {**DOCUMENT, "jwks_uri": "file:///etc/passwd"},
    ],
)
def test_metadata_of_another_issuer_or_with_a_bad_address_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match=r"metadata|URL|host"):
        parse_discovery(document, issuer=ISSUER)


def test_http_is_for_development() -> None:
    local = {
        name: value.replace("https:", "http:") if isinstance(value, str) else value for name, value in DOCUMENT.items()
    }
    issuer = local["issuer"]
    with pytest.raises(ValueError, match="malformed"):
        parse_discovery(local, issuer=issuer)
    assert parse_discovery(local, issuer=issuer, development=True)["token_url"] == local["token_endpoint"]
