"""Xero's recorded answers: the user, and the organisation where there is one that stands alone."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

import pytest

from providers.spec import Account, Incoming, Minter, ProviderAnswerError
from providers.xero import PROVIDER, identify
from tests.providers.dialogues import credential_at, driven, said

# https://identity.xero.com/connect/userinfo (OpenID Connect Core 5.3.2)
USER = {"sub": "f7a1382ec7914cae", "name": "Luca Pacioli", "email": "luca@example.test"}
# https://developer.xero.com/documentation/guides/oauth2/auth-flow#5-check-the-tenants-youre-authorized-to-access
CONNECTION: dict[str, Any] = {
    "id": "e1eede29-f875-4a5d-8470-17f6a29a88b1",
    "authEventId": "d99ecdfe-391d-43d2-b834-17636ba90e8d",
    "tenantId": "70784a63-d24b-46a9-a4db-0e70a274b056",
    "tenantType": "ORGANISATION",
    "tenantName": "Maple Florist",
}
OTHER = {**CONNECTION, "tenantId": "8be3fdd0-1ee8-4ef9-9a4c-2d7d4ed7a2b1"}


def account_of(*connections: Any) -> Account:
    return driven(identify(credential_at(PROVIDER)), said(USER), said(list(connections)))[1]


def test_the_user_is_the_account_and_an_organisation_that_stands_alone_is_the_connections() -> None:
    asked, account = driven(identify(credential_at(PROVIDER)), said(USER), said([CONNECTION]))
    tenant = {"tenant_id": "70784a63-d24b-46a9-a4db-0e70a274b056"}
    assert account == Account("f7a1382ec7914cae", "Luca Pacioli", "luca@example.test", tenant)
    assert [(one.method, one.url) for one in asked] == [
        ("GET", "https://identity.xero.com/connect/userinfo"),
        ("GET", "https://api.xero.com/connections"),
    ]
    assert {one.headers["Authorization"] for one in asked} == {"Bearer the-access-token"}


def test_of_several_organisations_none_is_taken_for_the_one_that_is_meant() -> None:
    assert account_of(CONNECTION, OTHER).variables == {}


@pytest.mark.parametrize("one", [7, {}, {"tenantId": 7}, {"tenantId": "../x"}, {"tenantId": "70784A63-x"}])
def test_what_is_no_organisation_is_left_out(one: Any) -> None:
    assert account_of(one).variables == {}
    assert account_of(one, OTHER).variables == {"tenant_id": OTHER["tenantId"]}


@pytest.mark.parametrize("answer", [said({"Type": None}, 401), said([], 503), said({}), Incoming(200, body=b"<html>")])
def test_without_the_list_of_organisations_there_is_no_account(answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER)), said(USER), answer)


@pytest.mark.parametrize("changes", [{"access_token": None}, {"hosts": {}}])
def test_without_a_token_or_a_place_to_ask_there_is_no_account(changes: dict[str, Any]) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER, **changes)), *([said(USER)] if "hosts" in changes else []))


# https://developer.xero.com/documentation/guides/oauth2/custom-connections
def test_a_custom_connection_gets_a_token_with_the_client_in_the_header() -> None:
    holder = credential_at(PROVIDER, access_token=None, refresh_token=None)
    way = PROVIDER.minting["client_credentials"]
    request = way.request(Minter({}, holder, ("accounting.contacts", "accounting.invoices"), 0.0, "u"))
    assert request.url == "https://identity.xero.com/connect/token"
    assert request.headers["Authorization"] == "Basic Y2xpZW50LTE6Y2xpZW50LXNlY3JldA=="
    assert parse_qs(request.body.decode()) == {
        "grant_type": ["client_credentials"],
        "scope": ["accounting.contacts accounting.invoices"],
    }


# https://community.xero.com/developer/discussion/105714701: 30 minutes for a lost answer
def test_a_used_refresh_token_answers_again_for_half_an_hour_and_a_revoked_one_takes_all_organisations_along() -> None:
    oauth2 = PROVIDER.oauth2
    assert oauth2 is not None
    assert oauth2.revocation is not None
    assert (oauth2.refresh.rotates, oauth2.refresh.grace_seconds, oauth2.refresh.keep_old) == (True, 1800, False)
    assert oauth2.revocation.kills_with_refresh == "grant"
    assert PROVIDER.headers["Xero-Tenant-Id"] == "{tenant_id}"
