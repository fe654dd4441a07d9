"""Stripe's recorded answers: whose account a token is a key of, and how that account is disconnected."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import pytest

from providers.spec import Account, Incoming, ProviderAnswerError
from providers.stripe import PROVIDER, identify, revoke
from tests.providers.dialogues import credential_at, driven, said

# https://docs.stripe.com/api/accounts/object (shortened)
ACCOUNT: dict[str, Any] = {
    "id": "acct_1032D82eZvKYlo2C",
    "object": "account",
    "email": "shop@good.test",
    "settings": {"dashboard": {"display_name": "Shop"}},
}


def test_the_account_is_the_one_that_the_token_is_a_key_of() -> None:
    asked, account = driven(identify(credential_at(PROVIDER)), said(ACCOUNT))
    assert account == Account("acct_1032D82eZvKYlo2C", "Shop", "shop@good.test")
    assert [(one.method, one.url) for one in asked] == [("GET", "https://api.stripe.com/v1/account")]
    assert asked[0].headers["Authorization"] == "Bearer the-access-token"


@pytest.mark.parametrize("settings", [None, 7, {}, {"dashboard": 7}, {"dashboard": {"display_name": 7}}])
def test_a_name_and_an_address_that_are_not_there_are_left_out(settings: Any) -> None:
    answer = said({**ACCOUNT, "email": None, "settings": settings})
    assert driven(identify(credential_at(PROVIDER)), answer)[1] == Account("acct_1032D82eZvKYlo2C")


@pytest.mark.parametrize("answer", [said({"error": {}}, 401), said([]), said({"id": 7}), said({"id": ""})])
def test_without_an_id_there_is_no_account_and_nothing_is_disconnected(answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER)), answer)
    assert driven(revoke(credential_at(PROVIDER)), answer)[1] is False


@pytest.mark.parametrize(("status", "done"), [(200, True), (401, False), (500, False)])
def test_the_account_is_disconnected_with_the_platforms_own_key(status: int, *, done: bool) -> None:
    asked, told = driven(revoke(credential_at(PROVIDER)), said(ACCOUNT), said({}, status))
    assert told is done
    last = asked[-1]
    assert (last.method, last.url) == ("POST", "https://connect.stripe.com/oauth/deauthorize")
    assert last.headers["Authorization"] == "Bearer client-secret"
    assert dict(parse_qsl(last.body.decode())) == {"client_id": "client-1", "stripe_user_id": "acct_1032D82eZvKYlo2C"}


@pytest.mark.parametrize("missing", [{"client_secret": None}, {"access_token": None}, {"urls": {}}])
def test_without_a_key_a_token_or_an_address_nothing_is_asked(missing: dict[str, Any]) -> None:
    assert driven(revoke(credential_at(PROVIDER, **missing))) == ([], False)
