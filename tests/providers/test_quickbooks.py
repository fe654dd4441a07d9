"""QuickBooks Online's recorded answers: the refresh token's end under its own name, the company, and a revocation in JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.token_endpoint import TokenAnswer, parse_answer
from providers.quickbooks import PROVIDER, identify, parse_token, revoke
from providers.spec import Account, Incoming, ProviderAnswerError
from tests.providers.dialogues import credential_at, driven, said

COMPANY = "9130347798120106"
# https://developer.intuit.com/app/developer/qbo/docs/api/accounting/all-entities/companyinfo (shortened)
INFO: dict[str, Any] = {
    "CompanyInfo": {"CompanyName": "Larry's Bakery", "Email": {"Address": "larry@example.test"}, "Id": "1"}
}


# https://developer.intuit.com/app/developer/qbo/docs/develop/authentication-and-authorization/oauth-2.0
def test_the_refresh_tokens_end_is_read_under_its_own_name() -> None:
    assert PROVIDER.oauth2 is not None
    body = {
        "token_type": "bearer",
        "expires_in": 3600,
        "refresh_token": "AB115873",
        "x_refresh_token_expires_in": 8_726_400,
        "access_token": "eyJlbmMiOiJB",
    }
    answer = parse_answer(PROVIDER.oauth2, said(body), received_at=1000.0)
    assert isinstance(answer, TokenAnswer)
    assert (answer.expires_at, answer.refresh_expires_at) == (4600.0, 8_727_400.0)


@pytest.mark.parametrize(
    "answer",
    [
        {"error": "invalid_grant"},
        {"x_refresh_token_expires_in": 1, "refresh_token_expires_in": 2},
        {"access_token": "a"},
    ],
)
def test_any_other_answer_is_left_as_it_is(answer: dict[str, Any]) -> None:
    assert parse_token(answer) == answer


def test_the_company_of_the_callback_is_opened_by_the_token_that_came_with_it() -> None:
    asked, account = driven(identify(credential_at(PROVIDER)), said(INFO))
    assert account == Account(COMPANY, "Larry's Bakery", "larry@example.test")
    (request,) = asked
    assert request.url == f"https://quickbooks.api.intuit.com/v3/company/{COMPANY}/companyinfo/{COMPANY}"
    assert request.headers == {"Authorization": "Bearer the-access-token", "Accept": "application/json"}


@pytest.mark.parametrize("info", [{}, {"CompanyName": 7, "Email": None}, {"Email": {"Address": 7}}, {"Email": "x"}])
def test_a_company_without_a_name_is_known_by_its_number(info: dict[str, Any]) -> None:
    assert driven(identify(credential_at(PROVIDER)), said({"CompanyInfo": info}))[1] == Account(COMPANY)


@pytest.mark.parametrize(
    "answer",
    [
        # A company that this token does not open: https://developer.intuit.com/app/developer/qbo/docs/develop/troubleshooting/error-codes
        said({"Fault": {"Error": [{"Message": "message=AuthorizationFailed", "code": "3100"}]}}, 403),
        said({"Fault": {"type": "AUTHENTICATION"}}, 401),
        said({"QueryResponse": {}}),
        said([]),
        Incoming(200, body=b"<?xml version='1.0'?>"),
    ],
)
def test_a_company_that_the_token_does_not_open_is_not_believed(answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER)), answer)


@pytest.mark.parametrize("changes", [{"access_token": None}, {"variables": {}}, {"hosts": {}}])
def test_without_a_token_or_a_company_nobody_is_asked(changes: dict[str, Any]) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER, **changes)))


# intuit/oauth-pythonclient, intuitlib/client.py
@pytest.mark.parametrize(("status", "done"), [(200, True), (400, False), (401, False), (500, False)])
def test_the_refresh_token_is_revoked_in_json_with_the_client_in_the_header(status: int, *, done: bool) -> None:
    asked, result = driven(revoke(credential_at(PROVIDER)), Incoming(status))
    (request,) = asked
    assert (request.method, request.url) == ("POST", "https://developer.api.intuit.com/v2/oauth2/tokens/revoke")
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Authorization"] == "Basic Y2xpZW50LTE6Y2xpZW50LXNlY3JldA=="
    assert json.loads(request.body) == {"token": "the-refresh-token"}
    assert result is done


def test_the_access_token_is_revoked_where_it_is_all_there_is() -> None:
    (request,), _ = driven(revoke(credential_at(PROVIDER, refresh_token=None)), Incoming(200))
    assert json.loads(request.body) == {"token": "the-access-token"}


@pytest.mark.parametrize(
    "changes", [{"urls": {}}, {"access_token": None, "refresh_token": None}, {"client_secret": None}]
)
def test_what_cannot_be_asked_is_not_asked_and_not_claimed(changes: dict[str, Any]) -> None:
    assert driven(revoke(credential_at(PROVIDER, **changes))) == ([], False)


def test_the_refresh_token_counts_as_spent_and_has_a_hard_end() -> None:
    refresh = PROVIDER.oauth2.refresh if PROVIDER.oauth2 is not None else None
    assert refresh is not None
    assert (refresh.rotates, refresh.grace_seconds, refresh.keep_old, refresh.sliding) == (True, 0, True, False)
    assert (refresh.idle_seconds, refresh.lifetime_seconds) == (8_640_000, 157_680_000)
