"""Dropbox's revocation, which only a live access token can ask for."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

import pytest

from providers.dropbox import PROVIDER, revoke
from providers.spec import Credential, Incoming
from tests.providers.dialogues import credential_at, driven, said

REVOKE = "https://api.dropboxapi.com/2/auth/token/revoke"
# https://www.dropbox.com/developers/documentation/http/documentation#error-handling
EXPIRED = said({"error_summary": "expired_access_token/..", "error": {".tag": "expired_access_token"}}, 401)


def credential(**changes: Any) -> Credential:
    return credential_at(PROVIDER, **changes)


def test_a_live_token_revokes_itself_and_what_hangs_on_its_refresh_token() -> None:
    (request,), done = driven(revoke(credential()), said(None))
    assert (request.method, request.url, request.body, done) == ("POST", REVOKE, b"", True)
    assert request.headers == {"Authorization": "Bearer the-access-token"}


def test_a_dead_token_is_refreshed_so_that_the_new_one_can_revoke() -> None:
    asked, done = driven(revoke(credential()), EXPIRED, said({"access_token": "sl.new"}), said(None))
    assert done is True
    assert [one.url for one in asked] == [REVOKE, "https://api.dropboxapi.com/oauth2/token", REVOKE]
    assert parse_qs(asked[1].body.decode()) == {
        "grant_type": ["refresh_token"],
        "refresh_token": ["the-refresh-token"],
        "client_id": ["client-1"],
        "client_secret": ["client-secret"],
    }
    assert asked[2].headers == {"Authorization": "Bearer sl.new"}


def test_a_grant_that_is_gone_is_revoked() -> None:
    gone = said({"error": "invalid_grant", "error_description": "refresh token is invalid or revoked"}, 400)
    assert driven(revoke(credential()), EXPIRED, gone)[1] is True
    assert driven(revoke(credential(refresh_token=None)), EXPIRED)[1] is True


@pytest.mark.parametrize(
    "answers",
    [
        (said(None, 429),),
        (EXPIRED, said({"error": "invalid_client: Invalid client_id or client_secret"}, 400)),
        (EXPIRED, said({"access_token": "sl.new"}, 500)),
        (EXPIRED, said({"access_token": 7})),
        (EXPIRED, said([])),
        (EXPIRED, Incoming(200, body=b"<html>")),
        (EXPIRED, said({"access_token": "sl.new"}), said(None, 401)),
    ],
)
def test_what_is_not_confirmed_is_not_claimed(answers: tuple[Incoming, ...]) -> None:
    assert driven(revoke(credential()), *answers)[1] is False


def test_another_401_says_nothing_about_a_token_alone() -> None:
    assert driven(revoke(credential(refresh_token=None)), said({"error": {".tag": "user_suspended"}}, 401))[1] is False


@pytest.mark.parametrize("changes", [{"urls": {}}, {"access_token": None}])
def test_without_an_address_or_a_token_nothing_is_asked(changes: dict[str, Any]) -> None:
    assert driven(revoke(credential(**changes))) == ([], False)


def test_without_a_secret_a_dead_token_stays_what_it_is() -> None:
    asked, done = driven(revoke(credential(client_secret=None)), EXPIRED)
    assert (len(asked), done) == (1, False)
