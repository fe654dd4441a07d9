"""Zendesk's recorded answers: nobody in particular is somebody with status 200, and a token deletes itself."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from providers.spec import Account, Incoming, Minter, ProviderAnswerError
from providers.zendesk import PROVIDER, identify, revoke
from tests.providers.dialogues import credential_at, driven, said

# https://developer.zendesk.com/api-reference/ticketing/users/users/#show-self (shortened)
USER: dict[str, Any] = {
    "id": 35436,
    "name": "Robert Jones",
    "email": "robert@example.test",
    "verified": True,
    "role": "admin",
}
# What a token that is not good gets, with 200: no published record, but clients have to guard against it
ANONYMOUS = {"user": {"id": None, "name": "Anonymous user", "email": "invalid@example.com", "role": "end-user"}}


def test_the_account_is_known_by_its_number() -> None:
    asked, account = driven(identify(credential_at(PROVIDER)), said({"user": USER}))
    assert account == Account("35436", "Robert Jones", "robert@example.test")
    assert [(one.method, one.url, one.headers["Authorization"]) for one in asked] == [
        ("GET", "https://acme.zendesk.com/api/v2/users/me.json", "Bearer the-access-token")
    ]


def test_an_address_that_is_not_verified_is_left_out() -> None:
    user = {**USER, "verified": False, "name": None}
    assert driven(identify(credential_at(PROVIDER)), said({"user": user}))[1] == Account("35436")


@pytest.mark.parametrize(
    "answer",
    [
        said(ANONYMOUS),
        said({"user": USER}, 401),
        said({"user": {**USER, "id": True}}),
        said({"user": {**USER, "id": "35436"}}),
        said({"user": None}),
        said([]),
        Incoming(200, body=b"<html>"),
    ],
)
def test_nobody_in_particular_is_not_taken_for_an_account(answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER)), answer)


@pytest.mark.parametrize("changes", [{"access_token": None}, {"hosts": {}}])
def test_without_a_token_or_a_subdomain_nobody_is_asked(changes: dict[str, Any]) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER, **changes)))


# https://developer.zendesk.com/api-reference/ticketing/oauth/oauth_tokens/#revoke-token
@pytest.mark.parametrize(
    ("status", "done"), [(204, True), (200, True), (401, False), (403, False), (404, False), (500, False)]
)
def test_a_token_deletes_itself(status: int, *, done: bool) -> None:
    asked, result = driven(revoke(credential_at(PROVIDER)), Incoming(status))
    assert [(one.method, one.url) for one in asked] == [
        ("DELETE", "https://acme.zendesk.com/api/v2/oauth/tokens/current.json")
    ]
    assert result is done


def test_without_an_access_token_nothing_is_revoked() -> None:
    assert driven(revoke(credential_at(PROVIDER, access_token=None))) == ([], False)


# https://developer.zendesk.com/api-reference/ticketing/oauth/grant_type_tokens/#create-token-for-grant-type
def test_a_client_gets_a_token_of_its_own_in_json() -> None:
    holder = credential_at(PROVIDER, urls={"token_url": "https://acme.zendesk.com/oauth/tokens"})
    request = PROVIDER.minting["client_credentials"].request(Minter({}, holder, ("read", "write"), 0.0, "u"))
    assert (request.url, request.headers["Content-Type"]) == (
        "https://acme.zendesk.com/oauth/tokens",
        "application/json",
    )
    assert json.loads(request.body) == {
        "grant_type": "client_credentials",
        "client_id": "client-1",
        "client_secret": "client-secret",
        "scope": "read write",
    }


@pytest.mark.parametrize("text", ["acme", "a", "acme-inc-2", "a" * 63])
def test_a_subdomain_is_one_label_of_a_host(text: str) -> None:
    assert re.fullmatch(PROVIDER.variables[0].pattern, text)


@pytest.mark.parametrize("text", ["", "-acme", "acme-", "a.b", "evil.test/", "ACME", "acme@evil", "a" * 64, "acme\n"])
def test_what_is_no_label_of_a_host_is_no_subdomain(text: str) -> None:
    assert not re.fullmatch(PROVIDER.variables[0].pattern, text)


def test_a_refresh_takes_both_old_tokens_along() -> None:
    oauth2 = PROVIDER.oauth2
    assert oauth2 is not None
    assert (oauth2.refresh.rotates, oauth2.refresh.keep_old, oauth2.refresh.ends_access) == (True, False, True)
    assert oauth2.token_format == "json"
