"""Intercom's recorded answers: a token under two names, an admin in a workspace, and the app that is uninstalled."""

from __future__ import annotations

from typing import Any

import pytest

from providers.intercom import PROVIDER, identify, parse_token, revoke
from providers.spec import Account, Incoming, ProviderAnswerError
from tests.providers.dialogues import credential_at, driven, said

# https://github.com/intercom/Intercom-OpenAPI (GET /me)
ME: dict[str, Any] = {
    "type": "admin",
    "id": "991267214",
    "name": "Ciaran Lee",
    "email": "admin1@example.test",
    "email_verified": True,
    "app": {"type": "app", "id_code": "abc123", "name": "MyApp 1", "region": "US"},
}


@pytest.mark.parametrize(
    ("answer", "token"),
    [
        # https://developers.intercom.com/docs/build-an-integration/learn-more/authentication/setting-up-oauth
        ({"token": "dG9rOmZlZmRk", "token_type": "Bearer"}, "dG9rOmZlZmRk"),
        ({"token": "one", "access_token": "two"}, "two"),
        ({"type": "error.list", "errors": [{"code": "unauthorized"}]}, None),
    ],
)
def test_the_token_is_found_under_both_names(answer: dict[str, Any], token: str | None) -> None:
    assert parse_token(answer).get("access_token") == token


def test_the_account_is_an_admin_in_a_workspace() -> None:
    asked, account = driven(identify(credential_at(PROVIDER)), said(ME))
    assert account == Account("abc123:991267214", "Ciaran Lee", "admin1@example.test")
    assert [(one.method, one.url, one.headers["Authorization"]) for one in asked] == [
        ("GET", "https://api.intercom.io/me", "Bearer the-access-token")
    ]


@pytest.mark.parametrize("changes", [{"email_verified": False}, {"email": None}])
def test_an_address_that_is_not_verified_is_left_out(changes: dict[str, Any]) -> None:
    assert driven(identify(credential_at(PROVIDER)), said({**ME, **changes, "name": 7}))[1] == Account(
        "abc123:991267214"
    )


@pytest.mark.parametrize(
    "answer",
    [
        said({"type": "error.list", "errors": [{"code": "token_unauthorized"}]}, 401),
        said({**ME, "app": None}),
        said({**ME, "app": {"id_code": ""}}),
        said({**ME, "id": 991267214}),
        said([]),
        Incoming(200, body=b"<html>"),
    ],
)
def test_an_answer_that_names_no_admin_or_no_workspace_is_refused(answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER)), answer)


def test_without_an_access_token_nobody_is_asked() -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER, access_token=None)))
    assert driven(revoke(credential_at(PROVIDER, access_token=None))) == ([], False)


# https://developers.intercom.com/docs/build-an-integration/learn-more/authentication/installing-uninstalling-apps#revoking-access
@pytest.mark.parametrize(("status", "done"), [(200, True), (204, True), (401, False), (404, False), (500, False)])
def test_revoking_uninstalls_the_app(status: int, *, done: bool) -> None:
    asked, result = driven(revoke(credential_at(PROVIDER)), Incoming(status))
    assert [(one.method, one.url, one.headers["Authorization"]) for one in asked] == [
        ("POST", "https://api.intercom.io/auth/uninstall", "Bearer the-access-token")
    ]
    assert result is done


def test_scopes_are_not_asked_for() -> None:
    assert PROVIDER.oauth2 is not None
    assert (PROVIDER.oauth2.scope_param, PROVIDER.oauth2.default_scopes) == ("", ())
