"""GitHub's recorded answers: who consented, what a revocation deletes, and how an installation gets a token."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from broker.token_endpoint import TokenAnswer, TokenRefusal, parse_answer
from providers.github import (
    PROVIDER,
    identify,
    installation_of,
    installation_request,
    parse_installation,
    read_app,
    revoke,
)
from providers.spec import Account, Credential, Dialogue, Incoming, Minter, Outgoing, ProviderAnswerError, Secret
from tests.providers.keys import RSA_PEM, ec_key, opened, pem

# https://docs.github.com/en/rest/users/users#get-the-authenticated-user (shortened)
USER = {
    "login": "octocat",
    "id": 1,
    "node_id": "MDQ6VXNlcjE=",
    "type": "User",
    "name": "monalisa octocat",
    "email": None,
}


def credential(**changes: Any) -> Credential:
    values: dict[str, Any] = {
        "client_id": "Iv1.8a61f9b3a7aba766",
        "client_secret": Secret("c11e9t5ecr3t"),
        "access_token": Secret("gho_16C7e42F292c6912E7710c838347Ae178B4a"),
        "refresh_token": None,
        "urls": {},
        "hosts": dict(PROVIDER.hosts),
    }
    return Credential(**{**values, **changes})


def asked(dialogue: Dialogue[Any]) -> Outgoing:
    return next(dialogue)


def answered(dialogue: Dialogue[Any], answer: Incoming) -> Any:
    next(dialogue)
    with pytest.raises(StopIteration) as done:
        dialogue.send(answer)
    return done.value.value


def test_the_account_call_carries_the_headers_without_which_it_is_refused() -> None:
    request = asked(identify(credential()))
    assert (request.method, request.url) == ("GET", "https://api.github.com/user")
    assert request.headers == {
        "Accept": "application/vnd.github+json",
        "User-Agent": "credential-broker",
        "X-GitHub-Api-Version": "2022-11-28",
        "Authorization": "Bearer gho_16C7e42F292c6912E7710c838347Ae178B4a",
    }
    assert PROVIDER.headers.items() <= request.headers.items()


def test_an_enterprise_server_is_asked_at_its_own_api() -> None:
    request = asked(identify(credential(hosts={"": "https://ghe.example.test/api/v3/"})))
    assert request.url == "https://ghe.example.test/api/v3/user"


def test_the_account_is_known_by_its_number_not_by_its_login() -> None:
    account = answered(identify(credential()), Incoming(200, body=json.dumps(USER).encode()))
    assert account == Account("1", "octocat", None)
    shown = answered(
        identify(credential()), Incoming(200, body=json.dumps({**USER, "email": "o@example.test"}).encode())
    )
    assert shown.email == "o@example.test"


@pytest.mark.parametrize(
    "answer",
    [
        # https://docs.github.com/en/rest/authentication/authenticating-to-the-rest-api#failed-login-limit
        Incoming(401, body=b'{"message":"Bad credentials","documentation_url":"https://docs.github.com/rest"}'),
        Incoming(403, body=json.dumps(USER).encode()),
        Incoming(200, body=b"<html>"),
        Incoming(200, body=b"[" * 100_000),
        Incoming(200, body=b"[]"),
        Incoming(200, body=b'{"login":"octocat"}'),
        Incoming(200, body=b'{"id":"1"}'),
        Incoming(200, body=b'{"id":true}'),
    ],
)
def test_an_answer_that_names_nobody_is_refused(answer: Incoming) -> None:
    dialogue = identify(credential())
    next(dialogue)
    with pytest.raises(ProviderAnswerError):
        dialogue.send(answer)


def test_without_an_access_token_nobody_is_asked() -> None:
    with pytest.raises(ProviderAnswerError):
        next(identify(credential(access_token=None)))


# https://docs.github.com/en/rest/apps/oauth-applications#delete-an-app-token
def test_a_token_alone_is_deleted_as_a_token() -> None:
    request = asked(revoke(credential(hosts={"": "https://ghe.example.test/api/v3"})))
    url = "https://ghe.example.test/api/v3/applications/Iv1.8a61f9b3a7aba766/token"
    assert (request.method, request.url) == ("DELETE", url)
    assert json.loads(request.body) == {"access_token": "gho_16C7e42F292c6912E7710c838347Ae178B4a"}
    scheme, pair = request.headers["Authorization"].split()
    assert (scheme, base64.b64decode(pair)) == ("Basic", b"Iv1.8a61f9b3a7aba766:c11e9t5ecr3t")
    assert request.headers["Content-Type"] == "application/json"


# https://docs.github.com/en/rest/apps/oauth-applications#delete-an-app-authorization
def test_beside_a_refresh_token_the_whole_grant_is_deleted() -> None:
    request = asked(revoke(credential(refresh_token=Secret("ghr_1B4a2e77838347a7E420ce178F2E7c6912E1692"))))
    assert request.url == "https://api.github.com/applications/Iv1.8a61f9b3a7aba766/grant"
    assert PROVIDER.oauth2 is not None
    assert PROVIDER.oauth2.revocation is not None
    assert (PROVIDER.oauth2.revocation.kills, PROVIDER.oauth2.revocation.kills_with_refresh) == ("token", "grant")


def test_a_client_id_cannot_leave_its_place_in_the_path() -> None:
    assert (
        asked(revoke(credential(client_id="../user?"))).url == "https://api.github.com/applications/..%2Fuser%3F/token"
    )


@pytest.mark.parametrize(
    ("status", "refresh_token", "done"),
    [
        (204, None, True),
        (401, None, False),
        (500, None, False),
        (204, "ghr_1", True),
        (404, "ghr_1", False),  # the access token is dead, which says nothing about the refresh token
        (422, "ghr_1", False),
    ],
)
def test_a_revocation_is_claimed_only_when_nothing_is_left_alive(
    status: int, refresh_token: str | None, *, done: bool
) -> None:
    held = credential(refresh_token=Secret(refresh_token) if refresh_token else None)
    assert answered(revoke(held), Incoming(status)) is done


@pytest.mark.parametrize("first", [404, 422])
@pytest.mark.parametrize(("second", "done"), [(401, True), (200, False), (404, False), (503, False)])
def test_a_token_that_is_said_to_be_unknown_counts_as_dead_only_when_the_api_refuses_it(
    first: int, second: int, *, done: bool
) -> None:
    dialogue = revoke(credential(refresh_token=None))
    next(dialogue)
    asked_again = dialogue.send(Incoming(first))
    assert (asked_again.method, asked_again.url) == ("GET", "https://api.github.com/user")
    with pytest.raises(StopIteration) as ended:
        dialogue.send(Incoming(second))
    assert ended.value.value is done


@pytest.mark.parametrize("missing", ["client_secret", "access_token"])
def test_without_secret_or_token_nothing_is_asked_and_nothing_claimed(missing: str) -> None:
    with pytest.raises(StopIteration) as done:
        next(revoke(credential(**{missing: None})))
    assert done.value.value is False


def test_the_facts_of_the_definition() -> None:
    oauth2 = PROVIDER.oauth2
    assert oauth2 is not None
    assert oauth2.issuer == "https://github.com/login/oauth"
    assert oauth2.callback_iss == "optional"
    assert (oauth2.refresh.rotates, oauth2.refresh.keep_old, oauth2.refresh.expected) == (True, False, False)
    assert PROVIDER.credential_types == ("oauth2", "api_key", "github_app")
    assert PROVIDER.hosts == {"": "https://api.github.com", "uploads": "https://uploads.github.com"}
    assert PROVIDER.env_prefix == "GITHUB"


# --- an installation's token

NOW = 1_790_000_000.0
APP = {"app_id": "Iv23liABCDEFGHIJKLMN", "installation_id": "27776345", "private_key": RSA_PEM}
# https://docs.github.com/en/rest/apps/apps#create-an-installation-access-token-for-an-app (shortened), with a token of the
# length and alphabet of April 2026
TOKEN = "ghs_123456_" + "aZ09-_." * 72 + "end"
MINTED = {
    "token": TOKEN,
    "expires_at": "2026-09-21T15:33:20Z",
    "permissions": {"issues": "write", "contents": "read"},
    "repository_selection": "selected",
}


def minter(**changes: Any) -> Minter:
    material = {name: Secret(text) for name, text in APP.items()}
    return Minter(material, credential(**changes), (), NOW, "unique")


def judged(body: Any, status: int = 200, **headers: str) -> TokenAnswer | TokenRefusal:
    """Read an answer as the broker does for a minted credential."""
    assert PROVIDER.oauth2 is not None
    rules = replace(PROVIDER.oauth2, parse_token=PROVIDER.minting["github_app"].parse_token)
    return parse_answer(rules, Incoming(status, headers, json.dumps(body).encode()), received_at=NOW)


# https://docs.github.com/en/apps/creating-github-apps/authenticating-with-a-github-app/generating-a-json-web-token-jwt-for-a-github-app
def test_an_app_asks_for_an_installations_token_with_a_jwt_of_its_own() -> None:
    request = installation_request(minter())
    assert (request.method, request.body) == ("POST", b"")
    assert request.url == "https://api.github.com/app/installations/27776345/access_tokens"
    assert PROVIDER.headers.items() <= request.headers.items()
    header, claims = opened(request.headers["Authorization"].removeprefix("Bearer "))
    assert header["alg"] == "RS256"
    assert claims == {"iss": "Iv23liABCDEFGHIJKLMN", "iat": int(NOW) - 60, "exp": int(NOW) + 540}
    assert claims["exp"] - claims["iat"] <= 600


def test_an_enterprise_servers_app_asks_at_its_own_api() -> None:
    request = installation_request(minter(hosts={"": "https://ghe.example.test/api/v3/"}))
    assert request.url == "https://ghe.example.test/api/v3/app/installations/27776345/access_tokens"


def test_a_long_token_with_dots_is_read_with_its_end_and_no_scopes() -> None:
    assert len(TOKEN) > 500
    answer = judged(MINTED, 201)
    assert isinstance(answer, TokenAnswer)
    assert answer.access_token.reveal() == TOKEN
    assert answer.expires_at == datetime(2026, 9, 21, 15, 33, 20, tzinfo=UTC).timestamp()
    assert (answer.scopes_apply, answer.refresh_token, answer.odd) == (False, None, ())


@pytest.mark.parametrize(
    ("status", "message", "outcome", "error"),
    [
        (404, "Not Found", "permanent", "installation_not_found"),
        # octo-sts/app, octokit/auth-app.js issues: the app was deleted
        (404, "Integration not found", "permanent", "app_not_found"),
        # https://github.com/backstage/backstage/issues/12887
        (401, "A JSON web token could not be decoded", "permanent", "app_key_refused"),
        # https://github.com/octokit/octokit.rb/pull/1307
        (403, "This installation has been suspended", "transient", "installation_suspended"),
        # https://github.com/octokit/auth-app.js (src/hook.ts looks for both)
        (401, "'Expiration time' claim ('exp') is too far in the future", "transient", "clock_skew"),
        (401, "'Issued at' claim ('iat') must be an Integer representing the time", "transient", "clock_skew"),
        # https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api
        (403, "API rate limit exceeded for installation ID 27776345.", "transient", "rate_limited"),
        (403, "You have exceeded a secondary rate limit. Please wait a few minutes", "transient", "rate_limited"),
        (401, "Bad credentials", "invalid", "unknown_error"),
        (403, "Resource not accessible by integration", "invalid", "unknown_error"),
        (422, "Validation Failed", "invalid", "unknown_error"),
        (502, "Not Found", "transient", "temporarily_unavailable"),
    ],
)
def test_only_what_no_time_heals_ends_the_connection(status: int, message: str, outcome: str, error: str) -> None:
    body = {"message": message, "documentation_url": "https://docs.github.com/rest", "status": str(status)}
    refusal = judged(body, status)
    assert isinstance(refusal, TokenRefusal)
    assert (refusal.outcome, refusal.error) == (outcome, error)


def test_a_rate_limit_says_how_long_to_wait() -> None:
    refusal = judged({"message": "You have exceeded a secondary rate limit."}, 403, **{"retry-after": "60"})
    assert refusal == TokenRefusal("transient", "rate_limited", 60.0)


@pytest.mark.parametrize("body", [{}, {"message": ["Not Found"]}, {"message": None}, {"documentation_url": "x"}])
def test_an_answer_that_says_nothing_known_ends_nothing(body: dict[str, Any]) -> None:
    assert parse_installation(body) == {"error": "unknown_error"}
    refusal = judged(body, 404)
    assert isinstance(refusal, TokenRefusal)
    assert refusal.outcome == "invalid"


def test_an_import_keeps_the_three_fields_and_an_installation_is_its_own_account_and_no_user() -> None:
    kept = read_app({**APP, "app_id": 12345, "type": "github_app"})
    assert kept == {**APP, "app_id": "12345"}
    assert installation_of(kept) == Account("installation:27776345")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"app_id": "a/b"}, "app_id"),
        ({"app_id": None}, "app_id"),
        ({"installation_id": "1/../2"}, "installation_id"),
        ({"installation_id": ""}, "installation_id"),
        ({"installation_id": True}, "installation_id"),
        ({"private_key": "CANARY"}, "private key"),
        ({"private_key": pem(ec_key())}, "RS256"),
    ],
)
def test_an_import_that_cannot_be_right_is_refused_by_name(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what) as refused:
        read_app({**APP, **changes})
    assert "CANARY" not in str(refused.value)
