"""Google's recorded answers: retryable errors, a revocation that ends a whole project, and tokens of service accounts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs

import pytest

from broker.token_endpoint import TokenAnswer, TokenRefusal, parse_answer
from providers.google import (
    PROVIDER,
    parse_minted,
    parse_token,
    read_service_account,
    service_account_of,
    service_account_request,
)
from providers.oidc import revoke_without_client as revoke
from providers.spec import Account, Credential, Incoming, Minter, Secret
from tests.providers.keys import RSA_PEM, ec_key, opened, pem

REVOKE_URL = "https://oauth2.googleapis.com/revoke"


def credential(**changes: Any) -> Credential:
    values: dict[str, Any] = {
        "client_id": "1234-abc.apps.googleusercontent.com",
        "client_secret": Secret("GOCSPX-1"),
        "access_token": Secret("ya29.access"),
        "refresh_token": Secret("1//refresh"),
        "urls": {"revoke_url": REVOKE_URL},
        "hosts": dict(PROVIDER.hosts),
    }
    return Credential(**{**values, **changes})


def revoked(held: Credential, answer: Incoming) -> Any:
    dialogue = revoke(held)
    next(dialogue)
    with pytest.raises(StopIteration) as done:
        dialogue.send(answer)
    return done.value.value


# https://developers.google.com/identity/protocols/oauth2/web-server#tokenrevoke
def test_the_refresh_token_is_revoked_without_client_authentication() -> None:
    request = next(revoke(credential()))
    assert (request.method, request.url) == ("POST", REVOKE_URL)
    assert parse_qs(request.body.decode()) == {"token": ["1//refresh"]}
    assert request.headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert "Authorization" not in request.headers


def test_the_access_token_is_revoked_where_it_is_all_there_is() -> None:
    assert parse_qs(next(revoke(credential(refresh_token=None))).body.decode()) == {"token": ["ya29.access"]}


@pytest.mark.parametrize(
    ("answer", "done"),
    [
        (Incoming(200, body=b"{}"), True),
        # https://github.com/googleapis/google-auth-library-python: a token that is expired or revoked
        (Incoming(400, body=b'{"error":"invalid_token","error_description":"Token expired or revoked"}'), True),
        (Incoming(400, body=b'{"error":"invalid_request"}'), False),
        (Incoming(401, body=b'{"error":"invalid_token"}'), False),
        (Incoming(400, body=b"<html>"), False),
        (Incoming(400, body=b"[]"), False),
        (Incoming(503), False),
    ],
)
def test_a_dead_token_counts_as_revoked_and_a_refusal_does_not(answer: Incoming, *, done: bool) -> None:
    assert revoked(credential(), answer) is done


@pytest.mark.parametrize("changes", [{"urls": {"revoke_url": ""}}, {"access_token": None, "refresh_token": None}])
def test_without_address_or_token_nothing_is_asked_and_nothing_claimed(changes: dict[str, Any]) -> None:
    with pytest.raises(StopIteration) as done:
        next(revoke(credential(**changes)))
    assert done.value.value is False


def test_revoking_is_said_to_end_everything_that_the_project_holds() -> None:
    assert PROVIDER.oauth2 is not None
    assert PROVIDER.oauth2.revocation is not None
    assert {PROVIDER.oauth2.revocation.kills, PROVIDER.oauth2.revocation.kills_with_refresh} == {"project"}


# googleapis/google-auth-library-python oauth2/_client.py: error and error_description are both looked at
@pytest.mark.parametrize("code", ["internal_failure", "server_error", "temporarily_unavailable"])
def test_a_retryable_description_counts_as_the_error(code: str) -> None:
    assert parse_token({"error": "invalid_grant", "error_description": code})["error"] == code


@pytest.mark.parametrize(
    "answer",
    [
        {"error": "invalid_grant", "error_description": "Token has been expired or revoked."},
        {"error": "invalid_grant", "error_subtype": "invalid_rapt"},
        {"error": "invalid_grant", "error_description": ["server_error"]},
        {"access_token": "ya29.a", "error_description": "server_error"},
    ],
)
def test_any_other_answer_is_left_as_it_is(answer: dict[str, Any]) -> None:
    assert parse_token(answer) == answer


def test_the_facts_of_the_definition() -> None:
    oauth2 = PROVIDER.oauth2
    assert oauth2 is not None
    assert oauth2.authorize_params == {"access_type": "offline"}
    assert oauth2.consent_params == {"prompt": "consent"}
    assert (oauth2.issuer, oauth2.issuer_aliases) == ("https://accounts.google.com", ("accounts.google.com",))
    refresh = oauth2.refresh
    assert (refresh.rotates, refresh.keep_old, refresh.expected, refresh.idle_seconds) == (
        False,
        True,
        True,
        15_552_000,
    )
    assert PROVIDER.hosts["gmail"] == "https://gmail.googleapis.com"
    assert PROVIDER.env_prefix == "GOOGLE"


# --- service accounts

NOW = 1_328_550_785.0
EMAIL = "761326798069-r5mljlln1rd4lrbhg75efgigp36m78j5@developer.gserviceaccount.com"
# The shape of a downloaded key: https://developers.google.com/identity/protocols/oauth2/service-account
KEY = {
    "type": "service_account",
    "project_id": "my-project",
    "private_key_id": "0123456789abcdef0123456789abcdef01234567",
    "private_key": RSA_PEM,
    "client_email": EMAIL,
    "client_id": "100000000000000000001",
    "auth_uri": "https://accounts.google.com/o/oauth2/auth",
    "token_uri": "https://evil.example.test/token",
    "universe_domain": "googleapis.com",
}
KEPT = {name: KEY[name] for name in ("client_email", "private_key", "private_key_id")}
SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"


def minter(*scopes: str, **more: str) -> Minter:
    material = {name: Secret(text) for name, text in {**KEPT, **more}.items()}
    holder = credential(urls={"token_url": "http://127.0.0.1:9/token"}, client_id="", client_secret=None)
    return Minter(material, holder, scopes, NOW, "unique")


def asserted(asking: Minter) -> tuple[dict[str, Any], dict[str, Any]]:
    form = parse_qs(service_account_request(asking).body.decode())
    assert form["grant_type"] == ["urn:ietf:params:oauth:grant-type:jwt-bearer"]
    return opened(form["assertion"][0])


def judged(body: dict[str, Any], status: int) -> TokenAnswer | TokenRefusal:
    """Read an answer as the broker does for a minted credential."""
    assert PROVIDER.oauth2 is not None
    rules = replace(PROVIDER.oauth2, parse_token=PROVIDER.minting["service_account"].parse_token)
    return parse_answer(rules, Incoming(status, body=json.dumps(body).encode()), received_at=NOW)


# https://developers.google.com/identity/protocols/oauth2/service-account#jwt-auth: the claim set that is printed there
def test_the_assertion_is_the_documented_one() -> None:
    header, claims = asserted(minter(SCOPE))
    assert header == {"alg": "RS256", "typ": "JWT", "kid": KEY["private_key_id"]}
    assert claims == {
        "iss": EMAIL,
        "scope": SCOPE,
        "aud": "https://oauth2.googleapis.com/token",
        "exp": 1_328_554_385,
        "iat": 1_328_550_785,
    }


def test_scopes_are_joined_by_spaces_and_a_delegate_is_named() -> None:
    _, claims = asserted(minter(SCOPE, "https://www.googleapis.com/auth/prediction", sub="some.user@example.com"))
    assert claims["scope"] == f"{SCOPE} https://www.googleapis.com/auth/prediction"
    assert claims["sub"] == "some.user@example.com"


def test_an_assertion_goes_where_the_integration_says_and_is_good_at_google_only() -> None:
    request = service_account_request(minter(SCOPE))
    assert (request.method, request.url) == ("POST", "http://127.0.0.1:9/token")
    assert asserted(minter(SCOPE))[1]["aud"] == "https://oauth2.googleapis.com/token"


def test_without_scopes_there_is_no_request() -> None:
    with pytest.raises(ValueError, match="needs scopes"):
        service_account_request(minter())


@pytest.mark.parametrize("key", [KEY, json.dumps(KEY)], ids=["object", "text"])
def test_of_a_key_only_what_signs_is_kept(key: object) -> None:
    assert read_service_account({"key": key}) == KEPT
    assert read_service_account({"key": key, "sub": "some.user@example.com"}) == {
        **KEPT,
        "sub": "some.user@example.com",
    }


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({}, "JSON object"),
        ({"key": "CANARY"}, "JSON object"),
        ({"key": {**KEY, "type": "authorized_user"}}, "not that of a service account"),
        ({"key": {**KEY, "type": None}}, "not that of a service account"),
        ({"key": {**KEY, "client_email": "CANARY"}}, "client_email"),
        ({"key": {**KEY, "private_key_id": None}}, "private_key_id"),
        ({"key": {**KEY, "private_key": "CANARY"}}, "private key"),
        ({"key": {**KEY, "private_key": pem(ec_key())}}, "RS256"),
        ({"key": KEY, "sub": "CANARY"}, "sub"),
        ({"key": KEY, "sub": ""}, "sub"),
    ],
)
def test_a_key_that_cannot_be_right_is_refused_by_name(given: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what) as refused:
        read_service_account(given)
    assert "CANARY" not in str(refused.value)


def test_the_account_is_the_service_accounts_and_another_for_each_user_that_it_acts_for() -> None:
    assert service_account_of(KEPT) == Account(EMAIL, EMAIL, EMAIL)
    acting = service_account_of({**KEPT, "sub": "some.user@example.com"})
    assert acting == Account(f"{EMAIL} as some.user@example.com", "some.user@example.com", "some.user@example.com")


# https://developers.google.com/identity/protocols/oauth2/service-account#handlingresponse
def test_a_minted_token_is_read_with_its_end() -> None:
    answer = judged(
        {"access_token": "1/8xbJqaOZXSUZbHLl5EOtu1pxz3fmmetKx9W8CV4t79M", "token_type": "Bearer", "expires_in": 3600},
        200,
    )
    assert isinstance(answer, TokenAnswer)
    assert (answer.expires_at, answer.refresh_token, answer.scopes) == (NOW + 3600, None, None)


@pytest.mark.parametrize(
    ("error", "description", "outcome", "code"),
    [
        # googleapis/google-cloud-python#10004: the key was deleted
        ("invalid_grant", "Invalid JWT Signature.", "permanent", "invalid_grant"),
        ("invalid_grant", "Invalid grant: account not found", "permanent", "invalid_grant"),
        # https://developers.google.com/identity/protocols/oauth2/service-account#error-codes
        ("unauthorized_client", "Unauthorized client or scope in request.", "client_refused", "unauthorized_client"),
        ("admin_policy_enforced", "Blocked by your administrator", "permanent", "admin_policy_enforced"),
        ("invalid_scope", "Invalid OAuth scope or ID token audience provided.", "invalid", "invalid_scope"),
        ("org_internal", "", "invalid", "unknown_error"),
        # erebusnz/gapi-google-analytics-php-interface#147: the clock was wrong
        (
            "invalid_grant",
            "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. Check your iat and exp",
            "transient",
            "clock_skew",
        ),
        ("internal_failure", "", "transient", "internal_failure"),
        ("invalid_grant", "server_error", "transient", "server_error"),
    ],
)
def test_a_deleted_key_ends_the_connection_and_a_wrong_clock_does_not(
    error: str, description: str, outcome: str, code: str
) -> None:
    refusal = judged({"error": error, "error_description": description}, 400)
    assert isinstance(refusal, TokenRefusal)
    assert (refusal.outcome, refusal.error) == (outcome, code)


@pytest.mark.parametrize("answer", [{"error": "invalid_grant"}, {"error": "invalid_grant", "error_description": 7}])
def test_a_refusal_without_a_description_is_left_as_it_is(answer: dict[str, Any]) -> None:
    assert parse_minted(answer) == answer
