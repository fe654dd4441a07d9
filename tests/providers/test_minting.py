"""Ready ways to mint: client credentials with each client authentication, a signed JWT as the grant, and checks of input."""

from __future__ import annotations

import base64
import copy
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers import load_catalog
from providers.minting import (
    client_credentials,
    json_object,
    jwt_grant,
    require_private_key,
    require_text,
    token_request,
)
from providers.spec import Credential, Minter, Minting, Secret
from tests.providers.keys import RSA_PEM, ec_key, opened, pem

TOKEN_URL = "https://idp.example.test/token"


def minter(*scopes: str, material: dict[str, str] | None = None, **changes: Any) -> Minter:
    values: dict[str, Any] = {
        "client_id": "s6BhdRkqt3",
        "client_secret": Secret("gX1fBat3bV"),
        "access_token": None,
        "refresh_token": None,
        "urls": {"token_url": TOKEN_URL},
        "hosts": {},
        "client_auth": "client_secret_basic",
    }
    held = {name: Secret(text) for name, text in (material or {}).items()}
    return Minter(held, Credential(**{**values, **changes}), scopes, 1_790_000_000.0, "unique-1")


def form(body: bytes) -> dict[str, str]:
    return {name: value for name, (value,) in parse_qs(body.decode(), strict_parsing=True).items()}


# RFC 6749 4.4.2: the request, to the letter
def test_a_client_asks_for_itself_as_published() -> None:
    request = client_credentials().request(minter())
    assert (request.method, request.url, request.body) == ("POST", TOKEN_URL, b"grant_type=client_credentials")
    assert request.headers == {
        "Authorization": "Basic czZCaGRSa3F0MzpnWDFmQmF0M2JW",
        "Content-Type": "application/x-www-form-urlencoded",
        "Accept": "application/json",
    }


def test_scopes_are_joined_as_the_provider_wants_them() -> None:
    assert form(client_credentials().request(minter("a:read", "b")).body)["scope"] == "a:read b"
    assert form(client_credentials(scope_separator=",").request(minter("a", "b")).body)["scope"] == "a,b"


def test_what_an_import_brings_goes_along_under_its_own_name_and_nothing_else_does() -> None:
    way = client_credentials(
        grant_type="account_credentials", params={"a": "fixed"}, fields={"account_id": True, "b": False}
    )
    request = way.request(minter(material={"account_id": "acc-1", "stray": "x"}))
    assert form(request.body) == {"grant_type": "account_credentials", "a": "fixed", "account_id": "acc-1"}
    assert way.fields == {"account_id": True, "b": False}
    assert way.uses_client


def test_the_client_proves_itself_in_its_own_way_unless_the_file_says_another() -> None:
    in_body = client_credentials().request(minter(client_auth="client_secret_post"))
    assert form(in_body.body)["client_secret"] == "gX1fBat3bV"
    assert "Authorization" not in in_body.headers
    header = client_credentials(client_auth="client_secret_basic").request(minter(client_auth="client_secret_post"))
    assert base64.b64decode(header.headers["Authorization"].removeprefix("Basic ")) == b"s6BhdRkqt3:gX1fBat3bV"
    assert "client_secret" not in form(header.body)


def test_a_client_with_a_key_signs_for_the_token_endpoint_wherever_the_request_goes() -> None:
    asking = minter(client_secret=Secret(RSA_PEM), client_auth="private_key_jwt")
    request = token_request(asking, {"grant_type": "x"}, url="https://idp.example.test/other")
    assert request.url == "https://idp.example.test/other"
    _, claims = opened(form(request.body)["client_assertion"])
    assert (claims["aud"], claims["iss"], claims["jti"]) == (TOKEN_URL, "s6BhdRkqt3", "unique-1")


def test_no_parameter_replaces_the_clients_own() -> None:
    request = token_request(minter(client_auth="client_secret_post"), {"client_id": "another", "client_secret": "x"})
    assert form(request.body) == {"client_id": "s6BhdRkqt3", "client_secret": "gX1fBat3bV"}


def test_without_a_secret_or_an_endpoint_there_is_no_request() -> None:
    with pytest.raises(ValueError, match="no client secret"):
        client_credentials().request(minter(client_secret=None))
    for urls in ({}, {"token_url": ""}):
        with pytest.raises(ValueError, match="no token endpoint"):
            client_credentials().request(minter(urls=urls))
        with pytest.raises(ValueError, match="no token endpoint"):
            jwt_grant(minter(urls=urls), "a.b.c")


# RFC 7523 2.1: the grant type, to the letter
def test_a_signed_jwt_is_given_for_a_token() -> None:
    request = jwt_grant(minter(), "eyJhbGciOiJFUzI1NiIsImtpZCI6IjE2In0.e30.J9l-ZhwP")
    assert (request.method, request.url) == ("POST", TOKEN_URL)
    assert request.body.startswith(b"grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion=eyJ")
    assert "Authorization" not in request.headers


def test_a_key_is_taken_when_it_signs_what_is_wanted() -> None:
    assert require_private_key(RSA_PEM) == RSA_PEM
    assert require_private_key(RSA_PEM, algorithm="RS256") == RSA_PEM
    assert require_private_key(pem(ec_key())) == pem(ec_key())
    with pytest.raises(ValueError, match="cannot sign RS256"):
        require_private_key(pem(ec_key()), algorithm="RS256")


@pytest.mark.parametrize("value", [None, 7, b"key", ["CANARY"], "CANARY"])
def test_what_is_no_key_is_refused_and_not_quoted(value: object) -> None:
    with pytest.raises(ValueError, match="private key") as refused:
        require_private_key(value, algorithm="RS256")
    assert "CANARY" not in str(refused.value)


def test_a_json_object_is_taken_as_such_or_as_text() -> None:
    assert json_object({"a": 1}) == {"a": 1}
    assert json_object('{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("value", [None, 1, [], "[]", "", "CANARY", "[" * 100_000])
def test_what_is_no_json_object_is_refused_and_not_quoted(value: object) -> None:
    with pytest.raises(ValueError, match="JSON object") as refused:
        json_object(value)
    assert "CANARY" not in str(refused.value)


def test_text_must_fit_as_a_whole_and_a_number_is_text_too() -> None:
    assert require_text("123", "[0-9]+", "the id") == "123"
    assert require_text(123, "[0-9]+", "the id") == "123"


@pytest.mark.parametrize("value", [None, True, 1.0, "", "12a", "12\n", ["12"], "CANARY"])
def test_text_that_does_not_fit_is_refused_by_name_and_not_quoted(value: object) -> None:
    with pytest.raises(ValueError, match="the id is missing or malformed") as refused:
        require_text(value, "[0-9]+", "the id")
    assert "CANARY" not in str(refused.value)


# --- every way in the catalog

WAYS = {f"{name} {kind}": way for name, provider in load_catalog().items() for kind, way in provider.minting.items()}
ANY = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.lists(st.text(max_size=8), max_size=2)
MEMBERS = st.sampled_from(
    ["access_token", "token", "expires_at", "error", "error_description", "message", "status", "scope"]
)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@given(body=st.dictionaries(MEMBERS, ANY, max_size=6))
@settings(max_examples=60, deadline=None)
def test_parse_token_is_pure_and_stands_every_object(way: Minting, body: dict[str, Any]) -> None:
    before = copy.deepcopy(body)
    parse = way.parse_token or dict
    assert isinstance(parse(body), Mapping)
    assert parse(body) == parse(body)
    assert body == before


@pytest.mark.parametrize("way", [way for way in WAYS.values() if way.read is not None], ids=lambda way: way.title)
@given(values=st.lists(ANY, min_size=8, max_size=8))
@settings(max_examples=60, deadline=None)
def test_what_an_import_brings_is_kept_as_text_or_refused_by_a_value_error(way: Minting, values: list[Any]) -> None:
    assert way.read is not None
    try:
        kept = way.read(dict(zip(way.fields, values, strict=False)))
    except ValueError:
        kept = {}
    assert all(isinstance(text, str) for text in kept.values())
