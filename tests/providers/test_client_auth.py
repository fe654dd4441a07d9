"""How a client proves itself: what it signs verifies with others' code, and what is no key is refused and never quoted."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from joserfc.jwk import ECKey, RSAKey

from providers import load_catalog
from providers.client_auth import ASSERTION_TYPE, client_authentication, signed_jwt, signing_algorithm
from providers.spec import Provider, Secret
from tests.providers.dialogues import credential_at, said
from tests.providers.keys import EC_JWK, RSA_JWK, RSA_PEM, RSA_SIGNED, opened, pem, rsa_key

NOW = 1_790_000_000.7


def sign(key: str, **more: Any) -> str:
    return signed_jwt(Secret(key), {"iss": "joe"}, **{"now": NOW, "lifetime_seconds": 300, **more})


def signed_by_the_key(token: str) -> bool:
    """Check an RS256 signature without any JOSE library (RFC 7515 5.2)."""
    signed, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    with contextlib.suppress(InvalidSignature):
        rsa_key().public_key().verify(raw, signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return True
    return False


# RFC 7515 A.2: this key, this signature
def test_the_check_of_these_tests_accepts_the_published_signature_and_no_other() -> None:
    assert signed_by_the_key(RSA_SIGNED)
    assert not signed_by_the_key(RSA_SIGNED.replace("eyJpc3Mi", "eyJpc3Nj"))


@pytest.mark.parametrize(
    "key",
    [RSA_PEM, pem(rsa_key(), old=True), json.dumps(RSA_JWK), f"\n {RSA_PEM}\n\n"],
    ids=["PKCS #8", "PKCS #1", "JWK", "white space around it"],
)
def test_an_rsa_key_signs_rs256_in_every_form(key: str) -> None:
    token = sign(key)
    assert signed_by_the_key(token)
    header, claims = opened(token)
    assert header == {"alg": "RS256", "typ": "JWT", "kid": RSAKey.import_key(RSA_PEM).thumbprint()}
    assert claims == {"iss": "joe", "iat": 1_790_000_000, "exp": 1_790_000_300}
    assert signing_algorithm(Secret(key)) == "RS256"


@pytest.mark.parametrize(
    ("curve", "algorithm"), [(ec.SECP256R1, "ES256"), (ec.SECP384R1, "ES384"), (ec.SECP521R1, "ES512")]
)
@pytest.mark.parametrize("old", [False, True])
def test_an_ec_key_signs_by_its_curve(curve: Callable[[], ec.EllipticCurve], algorithm: str, *, old: bool) -> None:
    key = ec.generate_private_key(curve())
    token = sign(pem(key, old=old))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    header, claims = opened(token, ECKey.import_key(public.decode()))
    assert (header["alg"], claims["iss"]) == (algorithm, "joe")
    assert signing_algorithm(Secret(pem(key, old=old))) == algorithm


@pytest.mark.parametrize("jwk", [RSA_JWK, EC_JWK], ids=["RSA", "EC"])
def test_a_jwk_brings_its_own_key_id_and_a_given_one_goes_first(jwk: dict[str, str]) -> None:
    own = json.dumps({**jwk, "kid": "of-the-key"})
    public = ECKey.import_key(dict(EC_JWK)) if jwk is EC_JWK else None
    assert opened(sign(own), public)[0]["kid"] == "of-the-key"
    assert opened(sign(own, key_id="given"), public)[0]["kid"] == "given"


def test_a_token_can_be_dated_back_for_a_verifier_whose_clock_lies_back() -> None:
    claims = opened(sign(RSA_PEM, issued_ago_seconds=60, lifetime_seconds=540))[1]
    assert (claims["iat"], claims["exp"]) == (1_789_999_940, 1_790_000_540)


def public_pem() -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return rsa_key().public_key().public_bytes(serialization.Encoding.PEM, form).decode()


REFUSED: dict[str, str] = {
    "nothing": "",
    "a password": "hunter2-CANARY",
    "an Ed25519 key": pem(ed25519.Ed25519PrivateKey.generate()),
    "a sealed key": pem(rsa_key(), password=b"CANARY"),
    "a public key": public_pem(),
    "a public JWK": json.dumps({name: RSA_JWK[name] for name in ("kty", "n", "e")}),
    "a shared secret": json.dumps({"kty": "oct", "k": "Q0FOQVJZ"}),
    "an unknown curve": pem(ec.generate_private_key(ec.SECP256K1())),
    "half a JWK": json.dumps({"kty": "RSA", "n": RSA_JWK["n"], "d": "CANARY"}),
    "numbers in a JWK": json.dumps({"kty": "EC", "crv": "P-256", "x": 1, "y": 2, "d": 3}),
    "a list": "[]",
    "cut JSON": '{"kty": "RSA", "d": "CANARY"',
    "deep JSON": '{"a":' * 10_000,
    "line feeds written out": RSA_PEM.replace("\n", "\\n"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_sign_is_refused_and_not_quoted(case: str) -> None:
    for attempt in (sign, lambda key: signing_algorithm(Secret(key))):
        with pytest.raises(ValueError, match="private key") as refused:
            attempt(REFUSED[case])
        assert "CANARY" not in str(refused.value)
        assert RSA_JWK["n"][:20] not in str(refused.value)
        assert refused.value.__cause__ is None


def test_a_short_rsa_key_is_refused() -> None:
    short = pem(rsa.generate_private_key(65_537, 1024))  # noqa: S505 - that is the point
    with pytest.raises(ValueError, match="too short"):
        sign(short)


def number(value: int) -> str:
    """Write a number as a JWK does (RFC 7518 2)."""
    return base64.urlsafe_b64encode(value.to_bytes((value.bit_length() + 7) // 8)).decode().rstrip("=")


TOO_LONG = {
    "a modulus of 4104 bits": {**RSA_JWK, "n": number((1 << 4103) + 1)},
    "a prime of 5000 bits": {**RSA_JWK, "p": number((1 << 4999) + 1)},
}


@pytest.mark.parametrize("case", sorted(TOO_LONG))
def test_a_key_that_would_take_long_to_check_is_refused_before_that(case: str) -> None:
    for attempt in (sign, lambda key: signing_algorithm(Secret(key))):
        with pytest.raises(ValueError, match="private key"):
            attempt(json.dumps(TOO_LONG[case]))


def test_an_rsa_key_that_is_none_is_found_when_it_comes() -> None:
    wrong = {**RSA_JWK, "d": number(65_537)}
    with pytest.raises(ValueError, match="neither a PEM nor a JWK"):
        signing_algorithm(Secret(json.dumps(wrong)))


def test_a_jwk_has_to_bring_its_primes_and_no_key_is_endless() -> None:
    bare = {name: RSA_JWK[name] for name in ("kty", "n", "e", "d")}
    for text in (json.dumps(bare), json.dumps({**RSA_JWK, "x5c": ["A" * 20_000]})):
        with pytest.raises(ValueError, match="neither a PEM nor a JWK"):
            sign(text)


@pytest.mark.parametrize("auth", ["client_secret_basic", "client_secret_post"])
@pytest.mark.parametrize(
    "key", [RSA_PEM, pem(rsa_key(), old=True), pem(rsa_key(), password=b"x"), json.dumps(RSA_JWK), json.dumps(EC_JWK)]
)
def test_a_private_key_is_never_sent_as_a_client_secret(auth: Any, key: str) -> None:
    with pytest.raises(ValueError, match="is a private key, which is never sent"):
        client_authentication("client", Secret(f"\n{key}"), auth)


def test_basic_takes_both_parts_form_encoded() -> None:
    headers, fields = client_authentication("client 1", Secret("p%s:s"), "client_secret_basic")
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"client+1:p%25s%3As"  # RFC 6749 2.3.1
    assert fields == {}


# RFC 6749 2.3.1: client s6BhdRkqt3, secret 7Fjfp0ZBr1KtDRbnfVdmIw
def test_the_published_client_proves_itself_as_published() -> None:
    client = "s6BhdRkqt3", Secret("7Fjfp0ZBr1KtDRbnfVdmIw")
    basic = {"Authorization": "Basic czZCaGRSa3F0Mzo3RmpmcDBaQnIxS3REUmJuZlZkbUl3"}
    assert client_authentication(*client, "client_secret_basic") == (basic, {})
    body = {"client_id": "s6BhdRkqt3", "client_secret": "7Fjfp0ZBr1KtDRbnfVdmIw"}
    assert client_authentication(*client, "client_secret_post") == ({}, body)
    assert client_authentication(*client, "none") == ({}, {"client_id": "s6BhdRkqt3"})


# RFC 7523 2.2 and 3: iss and sub are the client, aud is the token endpoint, jti is used once
def test_a_client_signs_an_assertion_about_itself() -> None:
    headers, fields = client_authentication(
        "s6BhdRkqt3",
        Secret(RSA_PEM),
        "private_key_jwt",
        audience="https://idp.example.test/token",
        now=NOW,
        unique="u-1",
    )
    assert headers == {}
    assert {name: fields[name] for name in fields.keys() - {"client_assertion"}} == {
        "client_id": "s6BhdRkqt3",
        "client_assertion_type": ASSERTION_TYPE,
    }
    _, claims = opened(fields["client_assertion"])
    assert claims == {
        "iss": "s6BhdRkqt3",
        "sub": "s6BhdRkqt3",
        "aud": "https://idp.example.test/token",
        "jti": "u-1",
        "iat": 1_790_000_000,
        "exp": 1_790_000_300,
    }


@pytest.mark.parametrize("auth", ["client_secret_basic", "client_secret_post", "private_key_jwt"])
def test_without_a_secret_only_a_public_client_can_prove_itself(auth: Any) -> None:
    with pytest.raises(ValueError, match="no client secret"):
        client_authentication("client", None, auth)


REVOKING = [one for one in load_catalog().values() if one.oauth2 is not None and one.oauth2.revocation is not None]


@pytest.mark.parametrize("provider", REVOKING, ids=lambda one: one.name)
def test_no_revocation_sends_a_private_key(provider: Provider) -> None:
    assert provider.oauth2 is not None
    assert provider.oauth2.revocation is not None
    key = Secret("-----BEGIN PRIVATE KEY-----CANARY")
    dialogue, sent = provider.oauth2.revocation.dialogue(credential_at(provider, client_secret=key)), ""
    with contextlib.suppress(StopIteration):
        request = next(dialogue)
        while True:
            kind, _, proof = request.headers.get("Authorization", "").partition(" ")
            basic = proof if kind == "Basic" else ""
            sent += (
                f"{request.url} {request.headers} {request.body!r} {base64.b64decode(basic + '==', altchars='-_')!r}"
            )
            request = dialogue.send(said({"id": "account-1"}))
    assert "CANARY" not in sent
