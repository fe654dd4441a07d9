"""Any OpenID Connect server: userinfo, standard revocation with every client authentication, Keycloak's extra field."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import parse_qs

import pytest

from providers.oidc import PROVIDER, parse_token, revoke, userinfo
from providers.spec import Account, Credential, Incoming, Minter, Outgoing, ProviderAnswerError, Secret
from tests.providers.keys import RSA_PEM, opened

URLS = {"userinfo_url": "https://idp.example.test/userinfo", "revoke_url": "https://idp.example.test/revoke"}
# OpenID Connect Core 5.3.2, https://openid.net/specs/openid-connect-core-1_0.html#UserInfoResponse
CLAIMS = {
    "sub": "248289761001",
    "name": "Jane Doe",
    "given_name": "Jane",
    "family_name": "Doe",
    "preferred_username": "j.doe",
    "email": "janedoe@example.com",
    "picture": "http://example.com/janedoe/me.jpg",
}
OK = Incoming(200)
UNSUPPORTED = Incoming(400, body=b'{"error":"unsupported_token_type"}')  # RFC 7009 2.2.1


def credential(**changes: Any) -> Credential:
    values: dict[str, Any] = {
        "client_id": "client 1",
        "client_secret": Secret("p%s:s"),
        "access_token": Secret("access"),
        "refresh_token": Secret("refresh"),
        "urls": URLS,
        "hosts": {},
        "client_auth": "client_secret_basic",
    }
    return Credential(**{**values, **changes})


def account_of(answer: Incoming) -> Any:
    dialogue = userinfo(credential())
    request = next(dialogue)
    assert (request.method, request.url) == ("GET", URLS["userinfo_url"])
    assert request.headers["Authorization"] == "Bearer access"
    with pytest.raises(StopIteration) as done:
        dialogue.send(answer)
    return done.value.value


def revoked(held: Credential, *answers: Incoming) -> tuple[list[Outgoing], bool]:
    dialogue, asked, waiting = revoke(held), list[Outgoing](), iter(answers)
    try:
        request = next(dialogue)
        while True:
            asked.append(request)
            request = dialogue.send(next(waiting, Incoming(599)))
    except StopIteration as done:
        return asked, done.value


def test_userinfo_names_the_account() -> None:
    assert account_of(Incoming(200, body=json.dumps(CLAIMS).encode())) == Account(
        "248289761001", "Jane Doe", "janedoe@example.com"
    )


@pytest.mark.parametrize(
    ("verified", "email"), [(True, "a@b.test"), (None, "a@b.test"), (False, None), ("false", None)]
)
def test_an_address_that_is_said_to_be_unverified_is_left_out(verified: object, email: str | None) -> None:
    claims = {"sub": "1", "preferred_username": "me", "email": "a@b.test", "email_verified": verified}
    assert account_of(Incoming(200, body=json.dumps(claims).encode())) == Account("1", "me", email)


def test_names_of_another_type_are_left_out() -> None:
    assert account_of(Incoming(200, body=b'{"sub":"1","name":["a"],"email":7}')) == Account("1")


@pytest.mark.parametrize(
    "answer",
    [
        Incoming(401, body=b'{"error":"invalid_token"}'),
        Incoming(200, body=b"eyJhbGciOiJSUzI1NiJ9.e30.c2ln"),  # application/jwt is not read
        Incoming(200, body=b'"248289761001"'),
        Incoming(200, body=b'{"sub":""}'),
        Incoming(200, body=b'{"sub":1}'),
    ],
)
def test_an_answer_that_names_nobody_is_refused(answer: Incoming) -> None:
    dialogue = userinfo(credential())
    next(dialogue)
    with pytest.raises(ProviderAnswerError):
        dialogue.send(answer)


@pytest.mark.parametrize("changes", [{"urls": {}}, {"access_token": None}])
def test_without_endpoint_or_token_nobody_is_asked(changes: dict[str, Any]) -> None:
    with pytest.raises(ProviderAnswerError):
        next(userinfo(credential(**changes)))


def test_both_tokens_are_revoked_with_the_client_form_encoded_in_the_header() -> None:
    asked, done = revoked(credential(), OK, OK)
    assert done
    assert [parse_qs(request.body.decode()) for request in asked] == [
        {"token": ["refresh"], "token_type_hint": ["refresh_token"]},
        {"token": ["access"], "token_type_hint": ["access_token"]},
    ]
    assert {request.url for request in asked} == {URLS["revoke_url"]}
    pair = base64.b64decode(asked[0].headers["Authorization"].removeprefix("Basic "))
    assert pair == b"client+1:p%25s%3As"  # RFC 6749 2.3.1


def test_the_client_proves_itself_in_the_form_where_the_server_wants_that() -> None:
    asked, _ = revoked(credential(client_auth="client_secret_post", refresh_token=None), OK)
    assert parse_qs(asked[0].body.decode())["client_secret"] == ["p%s:s"]
    assert "Authorization" not in asked[0].headers
    asked, _ = revoked(credential(client_auth="none", client_secret=None, refresh_token=None), OK)
    assert parse_qs(asked[0].body.decode())["client_id"] == ["client 1"]


@pytest.mark.parametrize(
    ("answers", "done"),
    [
        ([OK, UNSUPPORTED], True),  # the access token ends with the grant
        ([OK, Incoming(503)], False),
        ([OK, Incoming(400, body=b"<html>")], False),
        ([OK, Incoming(400, body=b"[]")], False),
        ([UNSUPPORTED], False),
        ([Incoming(401, body=b'{"error":"invalid_client"}')], False),
    ],
)
def test_a_revocation_is_claimed_only_when_nothing_is_left_alive(answers: list[Incoming], *, done: bool) -> None:
    assert revoked(credential(), *answers)[1] is done


def test_an_access_token_alone_that_cannot_be_revoked_is_alive() -> None:
    assert revoked(credential(refresh_token=None), UNSUPPORTED)[1] is False


@pytest.mark.parametrize(
    "changes",
    [
        {"urls": {"revoke_url": ""}},
        {"access_token": None, "refresh_token": None},
        {"client_secret": None},
        {"client_auth": "private_key_jwt"},
    ],
)
def test_what_cannot_be_asked_is_not_asked_and_not_claimed(changes: dict[str, Any]) -> None:
    assert revoked(credential(**changes)) == ([], False)


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        # Keycloak: https://github.com/keycloak/keycloak, org.keycloak.representations.AccessTokenResponse
        ({"access_token": "a", "refresh_expires_in": 1800, "not-before-policy": 0, "session_state": "s"}, 1800),
        ({"access_token": "a", "refresh_expires_in": 0}, None),
        ({"access_token": "a", "refresh_expires_in": 1800, "refresh_token_expires_in": 60}, 60),
        ({"access_token": "a"}, None),
    ],
)
def test_the_refresh_tokens_end_is_read_under_both_names(answer: dict[str, Any], seconds: int | None) -> None:
    assert parse_token(answer).get("refresh_token_expires_in") == seconds


# RFC 7009 2.1 with RFC 7523 2.2: the assertion is for the token endpoint, also where it goes to revocation
def test_a_client_with_a_key_signs_an_assertion_of_its_own_for_each_request() -> None:
    urls = {**URLS, "token_url": "https://idp.example.test/token"}
    keyed = credential(client_auth="private_key_jwt", client_secret=Secret(RSA_PEM), urls=urls, at=1_790_000_000.0)
    asked, done = revoked(keyed, OK, OK)
    assert done
    claims = [opened(parse_qs(request.body.decode())["client_assertion"][0])[1] for request in asked]
    assert {one["aud"] for one in claims} == {"https://idp.example.test/token"}
    assert {one["exp"] for one in claims} == {1_790_000_300}
    assert all(one["iss"] == one["sub"] == "client 1" for one in claims)
    assert not any("client_secret" in parse_qs(request.body.decode()) for request in asked)


def minter(*scopes: str, material: dict[str, str] | None = None, **changes: Any) -> Minter:
    urls = {"token_url": "https://idp.example.test/token"}
    held = {name: Secret(text) for name, text in (material or {}).items()}
    return Minter(
        held, credential(access_token=None, refresh_token=None, urls=urls, **changes), scopes, 1_790_000_000.0, "u-1"
    )


def minted(asking: Minter) -> dict[str, list[str]]:
    request = PROVIDER.minting["client_credentials"].request(asking)
    assert (request.method, request.url) == ("POST", "https://idp.example.test/token")
    return parse_qs(request.body.decode())


def test_a_client_gets_a_token_of_its_own_for_an_api() -> None:
    way = PROVIDER.minting["client_credentials"]
    assert (way.fields, way.uses_client, way.account) == ({"audience": False, "resource": False}, True, None)
    assert minted(minter()) == {"grant_type": ["client_credentials"]}
    body = minted(
        minter("orders:read", "stock", material={"audience": "orders-api", "resource": "https://api.example.test/"})
    )
    assert body == {
        "grant_type": ["client_credentials"],
        "scope": ["orders:read stock"],
        "audience": ["orders-api"],
        "resource": ["https://api.example.test/"],
    }


def test_a_client_with_a_key_gets_one_too() -> None:
    body = minted(minter("a", client_auth="private_key_jwt", client_secret=Secret(RSA_PEM)))
    _, claims = opened(body["client_assertion"][0])
    assert (claims["aud"], claims["jti"], claims["iat"]) == ("https://idp.example.test/token", "u-1", 1_790_000_000)
    assert "client_secret" not in body


def test_the_facts_of_the_definition() -> None:
    oauth2 = PROVIDER.oauth2
    assert oauth2 is not None
    assert oauth2.discovery
    assert oauth2.openid
    assert oauth2.client_auth == "client_secret_basic"
    assert "offline_access" not in oauth2.default_scopes
    assert oauth2.refresh.rotates
    assert PROVIDER.hosts == {}
