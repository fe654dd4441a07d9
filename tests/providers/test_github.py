"""GitHub's recorded answers: who consented, and what a revocation deletes."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from providers.github import PROVIDER, identify, revoke
from providers.spec import Account, Credential, Dialogue, Incoming, Outgoing, ProviderAnswerError, Secret

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
    assert PROVIDER.credential_types == ("oauth2", "api_key")
    assert PROVIDER.hosts == {"": "https://api.github.com", "uploads": "https://uploads.github.com"}
    assert PROVIDER.env_prefix == "GITHUB"
