"""Who consented, by recorded answers of the APIs whose identity call is plain: one table, a line for each provider."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest

from providers import asana, box, dropbox, salesforce, shopify, spotify, twitch, x
from providers.spec import Account, Incoming, Provider, ProviderAnswerError
from tests.providers.dialogues import credential_at, driven, said


@dataclass(frozen=True)
class Recorded:
    """A provider's answer about the owner of a token: ``at`` leads to the account's id in it, ``email`` to the address."""

    provider: Provider
    method: str
    url: str
    body: dict[str, Any]
    at: tuple[str, ...]
    account: Account
    header: tuple[str, str] = ("Authorization", "Bearer the-access-token")


EVERY = (
    Recorded(  # https://developers.asana.com/reference/getuser
        asana.PROVIDER,
        "GET",
        "https://app.asana.com/api/1.0/users/me",
        {"data": {"gid": "12345", "resource_type": "user", "name": "Greg Sanchez", "email": "gsanchez@example.test"}},
        ("data", "gid"),
        Account("12345", "Greg Sanchez", "gsanchez@example.test"),
    ),
    Recorded(  # https://developer.box.com/reference/get-users-me/
        box.PROVIDER,
        "GET",
        "https://api.box.com/2.0/users/me",
        {"id": "11446498", "type": "user", "name": "Aaron Levie", "login": "ceo@example.test"},
        ("id",),
        Account("11446498", "Aaron Levie", "ceo@example.test"),
    ),
    Recorded(  # https://www.dropbox.com/developers/documentation/http/documentation#users-get_current_account
        dropbox.PROVIDER,
        "POST",
        "https://api.dropboxapi.com/2/users/get_current_account",
        {
            "account_id": "dbid:AAH4f99T0taONIb-OurWxbNQ6ywGRopQngc",
            "name": {"display_name": "Franz Ferdinand (Personal)"},
            "email": "franz@example.test",
            "email_verified": True,
        },
        ("account_id",),
        Account("dbid:AAH4f99T0taONIb-OurWxbNQ6ywGRopQngc", "Franz Ferdinand (Personal)", "franz@example.test"),
    ),
    Recorded(  # https://help.salesforce.com/apex/HTViewHelpDoc?id=xcloud.remoteaccess_using_userinfo_endpoint.htm
        salesforce.PROVIDER,
        "GET",
        "https://acme.my.salesforce.com/services/oauth2/userinfo",
        {
            "sub": "https://login.salesforce.com/id/00Dx0000000BV7z/005x00000012Q9P",
            "user_id": "005x00000012Q9P",
            "organization_id": "00Dx0000000BV7z",
            "name": "Pat Patterson",
            "email": "pat@example.test",
            "email_verified": True,
        },
        ("organization_id",),
        Account("00Dx0000000BV7z/005x00000012Q9P", "Pat Patterson", "pat@example.test"),
    ),
    Recorded(  # https://shopify.dev/docs/api/admin-graphql/latest/queries/shop
        shopify.PROVIDER,
        "POST",
        "https://acme.myshopify.com/admin/api/2026-10/graphql.json",
        {"data": {"shop": {"id": "gid://shopify/Shop/548380009", "name": "John Smith Test Store"}}},
        ("data", "shop", "id"),
        Account("gid://shopify/Shop/548380009", "John Smith Test Store"),
        ("X-Shopify-Access-Token", "the-access-token"),
    ),
    Recorded(  # https://developer.spotify.com/documentation/web-api/reference/get-current-users-profile
        spotify.PROVIDER,
        "GET",
        "https://api.spotify.com/v1/me",
        {"id": "smedjan", "display_name": "Smedjan", "email": "smedjan@example.test", "type": "user"},
        ("id",),
        Account("smedjan", "Smedjan", "smedjan@example.test"),
    ),
    Recorded(  # https://dev.twitch.tv/docs/authentication/validate-tokens/
        twitch.PROVIDER,
        "GET",
        "https://id.twitch.tv/oauth2/validate",
        {
            "client_id": "wbmytr93xzw8zbg0p1izqyzzc5mbiz",
            "login": "twitchdev",
            "scopes": ["channel:read:subscriptions"],
            "user_id": "141981764",
            "expires_in": 5520838,
        },
        ("user_id",),
        Account("141981764", "twitchdev", variables={"client_id": "wbmytr93xzw8zbg0p1izqyzzc5mbiz"}),
        ("Authorization", "OAuth the-access-token"),
    ),
    Recorded(  # https://docs.x.com/x-api/users/get-my-user
        x.PROVIDER,
        "GET",
        "https://api.x.com/2/users/me",
        {"data": {"id": "2244994945", "name": "X Dev", "username": "TwitterDev"}},
        ("data", "id"),
        Account("2244994945", "TwitterDev"),
    ),
)
NOBODY: tuple[object, ...] = (None, "", 1, True, [], {})


def asked_about(provider: Provider, *answers: Incoming, **changes: Any) -> tuple[Any, Account]:
    assert provider.identify is not None
    urls = {"token_url": "", "userinfo_url": ""}
    if provider.oauth2 is not None:
        urls = {name: getattr(provider.oauth2, name) for name in urls}
    for variable in provider.variables:
        urls = {name: url.replace(f"{{{variable.name}}}", variable.example) for name, url in urls.items()}
    return driven(provider.identify(credential_at(provider, **{"urls": urls, **changes})), *answers)


def with_id(recorded: Recorded, value: object) -> dict[str, Any]:
    body = copy.deepcopy(recorded.body)
    inner = body
    for name in recorded.at[:-1]:
        inner = inner[name]
    inner[recorded.at[-1]] = value
    return body


by_name = pytest.mark.parametrize("recorded", EVERY, ids=lambda recorded: recorded.provider.name)


@by_name
def test_the_account_is_what_the_api_said_to_the_token(recorded: Recorded) -> None:
    (request,), account = asked_about(recorded.provider, said(recorded.body))
    assert account == recorded.account
    assert (request.method, request.url) == (recorded.method, recorded.url)
    assert request.headers[recorded.header[0]] == recorded.header[1]
    assert "@" not in account.id


@by_name
@pytest.mark.parametrize("value", NOBODY, ids=repr)
def test_an_answer_without_an_id_names_nobody(recorded: Recorded, value: object) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(recorded.provider, said(with_id(recorded, value)))


@by_name
@pytest.mark.parametrize("status", [201, 302, 401, 403, 429, 500])
def test_an_answer_that_is_no_success_names_nobody(recorded: Recorded, status: int) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(recorded.provider, said(recorded.body, status))


@by_name
@pytest.mark.parametrize("body", [b"[]", b"null", b"<html>", b'{"data":[]}', b'{"data":{"shop":1}}'])
def test_an_answer_of_another_shape_names_nobody(recorded: Recorded, body: bytes) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(recorded.provider, Incoming(200, body=body))


@by_name
def test_without_a_token_nobody_is_asked(recorded: Recorded) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(recorded.provider, access_token=None)


@pytest.mark.parametrize("name", ["shopify", "salesforce"])
def test_where_the_host_is_not_known_nobody_is_asked(name: str) -> None:
    (recorded,) = (one for one in EVERY if one.provider.name == name)
    with pytest.raises(ProviderAnswerError):
        asked_about(recorded.provider, hosts={}, urls={"token_url": "https://acme.test", "userinfo_url": ""})


@by_name
def test_names_of_another_kind_are_left_out(recorded: Recorded) -> None:
    names = ("name", "display_name", "login", "username", "email", "client_id")

    def odd(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: 7 if name in names else odd(inner) for name, inner in value.items()}

    assert asked_about(recorded.provider, said(odd(recorded.body)))[1] == Account(recorded.account.id)


@pytest.mark.parametrize("name", ["dropbox", "salesforce"])
def test_an_address_that_is_not_verified_is_left_out(name: str) -> None:
    (recorded,) = (one for one in EVERY if one.provider.name == name)
    _, account = asked_about(recorded.provider, said({**recorded.body, "email_verified": False}))
    assert account == Account(recorded.account.id, recorded.account.name)


def test_dropbox_is_asked_with_neither_body_nor_content_type() -> None:
    (request,), _ = asked_about(dropbox.PROVIDER, said(EVERY[2].body))
    assert (request.body, [name.lower() for name in request.headers]) == (b"", ["authorization"])


def test_the_same_user_of_a_copied_organisation_is_another_account() -> None:
    _, account = asked_about(salesforce.PROVIDER, said({**EVERY[3].body, "organization_id": "00D9"}))
    assert account.id == "00D9/005x00000012Q9P"
