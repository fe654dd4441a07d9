"""Bitbucket's recorded answers: scopes under another name, errors under other codes, and who consented."""

from __future__ import annotations

from typing import Any

import pytest

from broker.token_endpoint import TokenAnswer, TokenRefusal, parse_answer
from providers.bitbucket import PROVIDER, identify
from providers.spec import Account, Incoming, ProviderAnswerError
from tests.providers.dialogues import credential_at, driven, said

# https://developer.atlassian.com/cloud/bitbucket/rest/api-group-users/#api-user-get (shortened)
USER: dict[str, Any] = {"uuid": "{c788b2da-b7a2-404c-9e26-d3f077557007}", "type": "user", "display_name": "Tutorials"}


def parsed(body: dict[str, Any], status: int = 200) -> TokenAnswer | TokenRefusal:
    assert PROVIDER.oauth2 is not None
    return parse_answer(PROVIDER.oauth2, said(body, status), received_at=0.0)


# https://github.com/terrakube-io/terrakube/issues/47
@pytest.mark.parametrize(
    ("named", "scopes"),
    [
        ({"scopes": "account repository"}, ("account", "repository")),
        ({"scope": "account", "scopes": "account repository"}, ("account",)),
        ({}, None),
    ],
)
def test_scopes_are_read_under_either_name(named: dict[str, str], scopes: tuple[str, ...] | None) -> None:
    answer = parsed({"access_token": "x", "token_type": "bearer", "state": "authorization_code", **named})
    assert isinstance(answer, TokenAnswer)
    assert answer.scopes == scopes


@pytest.mark.parametrize(
    ("error", "description", "outcome"),
    [
        ("invalid_request", "Invalid refresh_token", "permanent"),  # readthedocs/readthedocs.org#2992
        ("invalid_request", "redirect_uri does not match", "invalid"),
        ("invalid_grant", "The specified code is not valid.", "permanent"),
        ("unauthorized_client", "Requests must be authenticated using OAuth client credentials", "client_refused"),
    ],
)
def test_what_a_refusal_means_does_not_stand_in_its_code_alone(error: str, description: str, outcome: str) -> None:
    refusal = parsed({"error": error, "error_description": description, "scopes": "account"}, 400)
    assert isinstance(refusal, TokenRefusal)
    assert refusal.outcome == outcome


def test_the_account_is_the_uuid() -> None:
    asked, account = driven(identify(credential_at(PROVIDER)), said(USER))
    assert account == Account("{c788b2da-b7a2-404c-9e26-d3f077557007}", "Tutorials")
    assert [(one.method, one.url) for one in asked] == [("GET", "https://api.bitbucket.org/2.0/user")]
    assert driven(identify(credential_at(PROVIDER)), said({**USER, "display_name": 7}))[1].name is None


@pytest.mark.parametrize("answer", [said(USER, 403), said([]), said({"uuid": 7}), said({"uuid": ""})])
def test_without_a_uuid_there_is_no_account(answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER)), answer)


def test_without_a_token_nothing_is_asked() -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER, access_token=None)))
