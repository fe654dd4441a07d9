"""LinkedIn: what a revocation sends, and what of an answer is read."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import pytest

from broker.token_endpoint import TokenAnswer, parse_answer
from providers.linkedin import PROVIDER, revoke
from tests.providers.dialogues import credential_at, driven, said

ENDPOINT = "https://www.linkedin.com/oauth/v2/revoke"


def test_each_token_is_revoked_with_the_client_in_the_body() -> None:
    asked, done = driven(revoke(credential_at(PROVIDER)), said({}), said({}))
    assert done is True
    assert {(one.method, one.url) for one in asked} == {("POST", ENDPOINT)}
    bodies = [dict(parse_qsl(one.body.decode())) for one in asked]
    proof = {"client_id": "client-1", "client_secret": "client-secret"}
    assert bodies == [{**proof, "token": "the-refresh-token"}, {**proof, "token": "the-access-token"}]


def test_the_first_token_that_is_not_accepted_ends_it() -> None:
    asked, done = driven(revoke(credential_at(PROVIDER)), said({}, 400))
    assert (len(asked), done) == (1, False)
    assert driven(revoke(credential_at(PROVIDER, refresh_token=None)), said({}))[1] is True


@pytest.mark.parametrize(
    "missing", [{"client_secret": None}, {"urls": {}}, {"access_token": None, "refresh_token": None}]
)
def test_without_a_secret_a_token_or_an_address_nothing_is_asked(missing: dict[str, Any]) -> None:
    assert driven(revoke(credential_at(PROVIDER, **missing))) == ([], False)


# https://learn.microsoft.com/en-us/linkedin/shared/authentication/programmatic-refresh-tokens
def test_a_year_of_the_refresh_token_is_read_and_an_id_token_without_a_nonce_is_not() -> None:
    assert PROVIDER.oauth2 is not None
    body = {
        "access_token": "AQV_made-up",
        "expires_in": 86400,
        "refresh_token": "AQW_made-up",
        "refresh_token_expires_in": 525600,
        "id_token": "a.b.c",
        "scope": "email,openid,profile",
    }
    answer = parse_answer(PROVIDER.oauth2, said(body), received_at=1000.0)
    assert isinstance(answer, TokenAnswer)
    assert (answer.expires_at, answer.refresh_expires_at) == (87400.0, 526600.0)
    assert (answer.scopes, answer.id_token) == (("email", "openid", "profile"), None)
