"""Figma's recorded answer: who consented."""

from __future__ import annotations

import pytest

from providers.figma import PROVIDER, identify
from providers.spec import Account, Incoming, ProviderAnswerError
from tests.providers.dialogues import credential_at, driven, said

# https://github.com/figma/rest-api-spec (openapi.yaml, GET /v1/me)
ME = {
    "id": "1234567890123456789",
    "handle": "Ada Lovelace",
    "img_url": "https://x.test/a.png",
    "email": "ada@example.test",
}


def test_the_account_is_known_by_its_id() -> None:
    asked, account = driven(identify(credential_at(PROVIDER)), said(ME))
    assert account == Account("1234567890123456789", "Ada Lovelace", "ada@example.test")
    assert [(one.method, one.url, one.headers["Authorization"]) for one in asked] == [
        ("GET", "https://api.figma.com/v1/me", "Bearer the-access-token")
    ]


def test_names_of_another_type_are_left_out() -> None:
    assert driven(identify(credential_at(PROVIDER)), said({"id": "1", "handle": 7, "email": []}))[1] == Account("1")


@pytest.mark.parametrize(
    "answer",
    [
        # https://developers.figma.com/docs/rest-api/errors: a token that lacks the scope
        said({"status": 403, "err": "Invalid token"}, 403),
        said({"id": 1}),
        said({"id": ""}),
        said([]),
        Incoming(200, body=b"<html>"),
    ],
)
def test_an_answer_that_names_nobody_is_refused(answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER)), answer)


def test_without_an_access_token_nobody_is_asked() -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER, access_token=None)))


def test_a_refresh_token_serves_again_and_has_an_address_of_its_own() -> None:
    oauth2 = PROVIDER.oauth2
    assert oauth2 is not None
    assert oauth2.refresh_url == "https://api.figma.com/v1/oauth/refresh"
    assert (oauth2.refresh.rotates, oauth2.refresh.keep_old, oauth2.revocation) == (False, True, None)
