"""Box: what revokes, and the tokens of server apps: client credentials, and a JWT by the app's configuration file."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs

import pytest

from providers.box import CLIENT_CREDENTIALS, PROVIDER, read_key, read_subject, revoke, sign_in, subject_of
from providers.spec import Account, Incoming, Minter, Outgoing, Secret
from tests.providers.dialogues import credential_at, driven, said
from tests.providers.keys import RSA_PEM, ec_key, opened, pem, rsa_key

TOKEN_URL = "https://api.box.com/oauth2/token"
# https://developer.box.com/guides/authentication/jwt/without-sdk: what the developer console writes
CONFIG: dict[str, Any] = {
    "boxAppSettings": {
        "clientID": "abc123",
        "clientSecret": "def234",
        "appAuth": {
            "publicKeyID": "abcd1234",
            "privateKey": RSA_PEM,  # encrypted there: the person decrypts it once
            "passphrase": "ghi345",
        },
    },
    "enterpriseID": "1234567",
}


def form(request: Outgoing) -> dict[str, str]:
    return {name: value for name, (value,) in parse_qs(request.body.decode()).items()}


def minter(material: Any) -> Minter:
    held = {name: Secret(text) for name, text in material.items()}
    return Minter(held, credential_at(PROVIDER), (), 1_790_000_000.0, "unique-of-16-char")


def with_auth(**changes: Any) -> dict[str, Any]:
    settings = CONFIG["boxAppSettings"]
    return {**CONFIG, "boxAppSettings": {**settings, "appAuth": {**settings["appAuth"], **changes}}}


# https://developer.box.com/guides/authentication/tokens/revoke
def test_both_tokens_are_revoked_by_the_client() -> None:
    asked, done = driven(revoke(credential_at(PROVIDER)), said(None), said(None))
    assert done is True
    assert [(one.method, one.url) for one in asked] == [("POST", "https://api.box.com/oauth2/revoke")] * 2
    client = {"client_id": "client-1", "client_secret": "client-secret"}
    assert [form(one) for one in asked] == [
        {**client, "token": "the-refresh-token"},
        {**client, "token": "the-access-token"},
    ]


def test_a_token_that_died_with_the_other_is_dead() -> None:
    dead = said({"error": "invalid_token"}, 400)
    assert driven(revoke(credential_at(PROVIDER)), said(None), dead)[1] is True


@pytest.mark.parametrize(
    "answer", [said({"error": "invalid_client"}, 400), Incoming(400, body=b"<html>"), said([], 400)]
)
def test_what_is_not_confirmed_is_not_claimed(answer: Incoming) -> None:
    assert driven(revoke(credential_at(PROVIDER)), answer)[1] is False


@pytest.mark.parametrize(
    "changes", [{"urls": {}}, {"client_secret": None}, {"access_token": None, "refresh_token": None}]
)
def test_without_an_address_a_secret_or_a_token_nothing_is_asked(changes: dict[str, Any]) -> None:
    assert driven(revoke(credential_at(PROVIDER, **changes))) == ([], False)


# https://developer.box.com/guides/authentication/client-credentials
def test_client_credentials_say_whom_the_token_is_for() -> None:
    material = read_subject({"box_subject_type": "enterprise", "box_subject_id": 1234567})
    request = CLIENT_CREDENTIALS.request(minter(material))
    assert (request.url, form(request)) == (
        TOKEN_URL,
        {
            "grant_type": "client_credentials",
            "box_subject_type": "enterprise",
            "box_subject_id": "1234567",
            "client_id": "client-1",
            "client_secret": "client-secret",
        },
    )


@pytest.mark.parametrize(
    "given",
    [{}, {"box_subject_type": "app", "box_subject_id": "1"}, {"box_subject_type": "user", "box_subject_id": "me"}],
)
def test_any_other_subject_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="box_subject"):
        read_subject(given)


def test_a_user_has_the_id_that_the_api_gives_and_a_service_account_that_of_its_enterprise() -> None:
    assert subject_of({"box_subject_type": "user", "box_subject_id": "11446498"}) == Account("11446498")
    assert subject_of({"box_subject_type": "enterprise", "box_subject_id": "1"}) == Account("enterprise:1")


@pytest.mark.parametrize("user", [None, "11446498"])
@pytest.mark.parametrize("key", [CONFIG, json.dumps(CONFIG), with_auth(passphrase=None)])
def test_a_jwt_is_signed_with_the_opened_key_and_goes_with_the_clients_secret(user: str | None, key: object) -> None:
    request = sign_in(minter(read_key({"key": key, "user_id": user})))
    sent = form(request)
    header, claims = opened(sent.pop("assertion"))
    assert (request.url, sent) == (
        TOKEN_URL,
        {
            "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
            "client_id": "client-1",
            "client_secret": "client-secret",
        },
    )
    assert header == {"alg": "RS256", "typ": "JWT", "kid": "abcd1234"}
    assert claims == {
        "iss": "client-1",
        "sub": user or "1234567",
        "box_sub_type": "user" if user else "enterprise",
        "aud": TOKEN_URL,
        "jti": "unique-of-16-char",
        "iat": 1_790_000_000,
        "exp": 1_790_000_045,
    }


def test_neither_the_passphrase_nor_the_clients_secret_is_kept() -> None:
    kept = read_key({"key": CONFIG})
    assert sorted(kept) == ["box_subject_id", "box_subject_type", "key_id", "private_key"]
    assert not any(secret in text for text in kept.values() for secret in ("ghi345", "def234", "ENCRYPTED"))


@pytest.mark.parametrize(
    "key",
    [
        None,
        "text",
        {},
        {**CONFIG, "boxAppSettings": []},
        {**CONFIG, "enterpriseID": None},
        with_auth(privateKey=None),
        with_auth(privateKey=pem(ec_key())),
        with_auth(publicKeyID="a b"),
    ],
)
def test_a_file_that_cannot_sign_in_is_refused_and_not_quoted(key: object) -> None:
    with pytest.raises(ValueError, match=r"^[A-Za-z ,0-9']+$") as refused:
        read_key({"key": key})
    assert "ghi345" not in str(refused.value)


@pytest.mark.parametrize("old", [False, True])
def test_an_encrypted_key_is_never_opened_and_the_refusal_says_how_to_decrypt_it(*, old: bool) -> None:
    sealed = pem(rsa_key(), old=old, password=b"ghi345")
    with pytest.raises(ValueError, match="decrypt it once with openssl pkcs8"):
        read_key({"key": with_auth(privateKey=sealed)})
