"""Tokens minted for APIs whose token endpoint is no provider's own: Twilio, Firebase Cloud Messaging, TikTok."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs

import pytest

from providers import fcm, load_catalog, tiktok, twilio
from providers.client_auth import signing_algorithm
from providers.spec import Credential, Minter, Provider, Secret
from tests.providers.keys import RSA_PEM, opened

KEY = {
    "type": "service_account",
    "project_id": "acme",
    "client_email": "push@acme.iam.gserviceaccount.com",
    "private_key_id": "key-1",
    "private_key": RSA_PEM,
    "token_uri": "https://evil.example.test/token",
}


def minter(provider: Provider, *scopes: str, material: dict[str, str] | None = None, **changes: Any) -> Minter:
    values: dict[str, Any] = {
        "client_id": "client-1",
        "client_secret": Secret("client-secret"),
        "access_token": None,
        "refresh_token": None,
        "urls": {"token_url": provider.oauth2.token_url if provider.oauth2 else ""},
        "hosts": provider.hosts,
    }
    held = {name: Secret(text) for name, text in (material or {}).items()}
    return Minter(held, Credential(**{**values, **changes}), scopes, 1_790_000_000.0, "unique-1")


def form(body: bytes) -> dict[str, str]:
    return {name: value for name, (value,) in parse_qs(body.decode(), strict_parsing=True).items()}


def test_an_apps_token_is_asked_for_with_the_client_in_the_body() -> None:
    request = twilio.PROVIDER.minting["client_credentials"].request(minter(twilio.PROVIDER))
    assert (request.method, request.url) == ("POST", "https://oauth.twilio.com/v2/token")
    assert form(request.body) == {
        "grant_type": "client_credentials",
        "client_id": "client-1",
        "client_secret": "client-secret",
    }
    scoped = twilio.PROVIDER.minting["client_credentials"].request(minter(twilio.PROVIDER, "a", "b"))
    assert form(scoped.body)["scope"] == "a b"


def test_the_clients_id_has_its_own_name_there_too() -> None:
    request = tiktok.PROVIDER.minting["client_credentials"].request(minter(tiktok.PROVIDER))
    assert (request.method, request.url) == ("POST", "https://open.tiktokapis.com/v2/oauth/token/")
    assert form(request.body) == {
        "grant_type": "client_credentials",
        "client_key": "client-1",
        "client_secret": "client-secret",
    }


@pytest.mark.parametrize("provider", [twilio.PROVIDER, tiktok.PROVIDER], ids=lambda one: one.name)
@pytest.mark.parametrize("secret", [None, Secret(RSA_PEM)], ids=["no secret", "a private key"])
def test_a_client_without_a_secret_that_may_be_sent_asks_for_nothing(provider: Provider, secret: Secret | None) -> None:
    with pytest.raises(ValueError, match="secret"):
        provider.minting["client_credentials"].request(minter(provider, client_secret=secret))


@pytest.mark.parametrize(
    ("scopes", "sent"),
    [
        ((), "https://www.googleapis.com/auth/firebase.messaging"),
        (("https://www.googleapis.com/auth/cloud-platform",), "https://www.googleapis.com/auth/cloud-platform"),
    ],
)
def test_a_service_account_signs_for_google_and_never_for_the_address_in_its_key(
    scopes: tuple[str, ...], sent: str
) -> None:
    minting = fcm.PROVIDER.minting["service_account"]
    assert minting.read is not None
    assert signing_algorithm(Secret(RSA_PEM)) == "RS256"
    material = dict(minting.read({"key": json.dumps(KEY)}))
    request = minting.request(minter(fcm.PROVIDER, *scopes, material=material))
    assert (request.method, request.url) == ("POST", "https://oauth2.googleapis.com/token")
    header, claims = opened(form(request.body)["assertion"])
    assert (header["alg"], header["kid"]) == ("RS256", "key-1")
    assert (claims["iss"], claims["aud"], claims["scope"]) == (
        "push@acme.iam.gserviceaccount.com",
        "https://oauth2.googleapis.com/token",
        sent,
    )
    assert claims["exp"] == claims["iat"] + 3600


def test_what_asks_for_tokens_at_a_named_host_has_that_host() -> None:
    catalog = load_catalog()
    assert {name for name, one in catalog.items() if one.minting and one.oauth2 is None} == {"fcm", "twilio"}
    assert all("oauth" in catalog[name].hosts for name in ("fcm", "twilio"))
