"""Airtable's documented answers: a token type with a space, the refresh token's end, and who consented."""

from __future__ import annotations

from typing import Any

import pytest

from broker.token_endpoint import TokenAnswer, TokenRefusal, parse_answer
from providers.airtable import PROVIDER, identify, parse_token
from providers.spec import Account, Incoming, ProviderAnswerError
from tests.providers.dialogues import credential_at, driven, said

# https://airtable.com/developers/web/api/oauth-reference#successful-response: 'The string "Bearer " (space intentional)'
TOKENS = {
    "access_token": "oaa1.v1.access",
    "refresh_token": "oaa1.v1.refresh",
    "token_type": "Bearer ",
    "scope": "data.records:read schema.bases:read",
    "expires_in": 3600,
    "refresh_expires_in": 5_184_000,
}


def judged(answer: Incoming) -> TokenAnswer | TokenRefusal:
    assert PROVIDER.oauth2 is not None
    return parse_answer(PROVIDER.oauth2, answer, received_at=1000.0)


def test_the_intended_space_behind_the_token_type_costs_no_connection() -> None:
    answer = judged(said(TOKENS))
    assert isinstance(answer, TokenAnswer)
    assert (answer.expires_at, answer.refresh_expires_at) == (4600.0, 5_185_000.0)
    assert answer.scopes == ("data.records:read", "schema.bases:read")


@pytest.mark.parametrize(
    ("answer", "reshaped"),
    [
        ({"error": "invalid_grant"}, {"error": "invalid_grant"}),
        ({"token_type": 7}, {"token_type": 7}),
        (
            {"refresh_expires_in": 1, "refresh_token_expires_in": 2},
            {"refresh_expires_in": 1, "refresh_token_expires_in": 2},
        ),
    ],
)
def test_any_other_answer_is_left_as_it_is(answer: dict[str, Any], reshaped: dict[str, Any]) -> None:
    assert parse_token(answer) == reshaped


# https://airtable.com/developers/web/api/oauth-reference#token-expiry-refresh-tokens: "a 409 response … you recently refreshed"
@pytest.mark.parametrize("answer", [Incoming(409, body=b"{}"), said({"error": "conflict"}, 409), Incoming(409)])
def test_a_conflict_with_a_refresh_of_a_moment_ago_is_no_refusal(answer: Incoming) -> None:
    refusal = judged(answer)
    assert isinstance(refusal, TokenRefusal)
    assert refusal.outcome == "invalid"


# https://airtable.com/developers/web/api/get-user-id-scopes
def test_the_account_is_known_by_its_id_and_its_address_may_be_missing() -> None:
    asked, account = driven(identify(credential_at(PROVIDER)), said({"id": "usrL2PNC5o3H4lBEi", "scopes": []}))
    assert account == Account("usrL2PNC5o3H4lBEi")
    assert [(one.method, one.url) for one in asked] == [("GET", "https://api.airtable.com/v0/meta/whoami")]
    shown = driven(identify(credential_at(PROVIDER)), said({"id": "usr1", "email": "foo@bar.test"}))[1]
    assert shown.email == "foo@bar.test"


@pytest.mark.parametrize(
    "answer", [said({"id": "usr1"}, 401), said({"id": 1}), said([]), Incoming(200, body=b"<html>")]
)
def test_an_answer_that_names_nobody_is_refused(answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER)), answer)


def test_without_an_access_token_nobody_is_asked() -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER, access_token=None)))


def test_a_refresh_token_serves_once_and_takes_the_access_token_along() -> None:
    oauth2 = PROVIDER.oauth2
    assert oauth2 is not None
    assert (oauth2.refresh.rotates, oauth2.refresh.keep_old, oauth2.refresh.ends_access) == (True, False, True)
    assert (oauth2.refresh.idle_seconds, oauth2.refresh.grace_seconds, oauth2.pkce) == (5_184_000, 0, True)
