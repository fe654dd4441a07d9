"""How an OAuth client proves itself: Basic, in the body, not at all, or by an assertion that it signs (RFC 6749 2.3, 7523)."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote_plus

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPrivateNumbers, RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey
from joserfc.util import base64_to_int

from providers.spec import ClientAuth, Secret

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_SECONDS = 300
CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
LEAST_RSA_BITS = 2048  # RFC 7518 3.3
MOST_RSA_BITS = 4096  # what takes an RSA key apart grows with the third power: 0.2 s here, on the event loop
LONGEST_KEY = 16_384
NO_KEY = "the private key is neither a PEM nor a JWK of RSA or EC that can sign"
ALGORITHMS = ["RS256", *CURVES.values()]


def client_authentication(
    client_id: str,
    client_secret: Secret | None,
    auth: ClientAuth,
    *,
    audience: str = "",
    now: float = 0.0,
    unique: str = "",
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the headers and the form fields by which a client proves itself (RFC 6749 2.3.1, RFC 7523 2.2); pure.

    Basic takes id and secret form-encoded, which many libraries leave out. For ``private_key_jwt`` the secret is a private
    key (see ``signed_jwt``), ``audience`` the token endpoint, ``unique`` random. ``ValueError`` when the secret is missing
    or no such key, and when it is a private key that would be sent; its text is safe to show.
    """
    if auth == "none":
        return {}, {"client_id": client_id}
    if client_secret is None:
        raise ValueError("there is no client secret")
    if auth != "private_key_jwt" and holds_private_key(client_secret):
        raise ValueError("the client secret is a private key, which is never sent")
    if auth == "client_secret_post":
        return {}, {"client_id": client_id, "client_secret": client_secret.reveal()}
    if auth == "private_key_jwt":
        claims = {"iss": client_id, "sub": client_id, "aud": audience, "jti": unique}
        assertion = signed_jwt(client_secret, claims, now=now, lifetime_seconds=ASSERTION_SECONDS)
        return {}, {"client_id": client_id, "client_assertion_type": ASSERTION_TYPE, "client_assertion": assertion}
    pair = f"{quote_plus(client_id)}:{quote_plus(client_secret.reveal())}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}, {}


def holds_private_key(secret: Secret) -> bool:
    """Whether a secret looks like a private key, as PEM or JWK; cheap, and surer to say yes than a parser. Pure."""
    text = secret.reveal().strip()
    return "PRIVATE KEY-----" in text or (text.startswith("{") and '"kty"' in text)


def signed_jwt(
    private_key: Secret,
    claims: Mapping[str, Any],
    *,
    now: float,
    lifetime_seconds: int,
    key_id: str | None = None,
    issued_ago_seconds: int = 0,
) -> str:
    """Sign claims, with ``iat`` and ``exp``, as a compact JWS (RFC 7515); pure.

    The key is a PEM (PKCS #8, PKCS #1 or SEC 1) or a private JWK: RSA signs RS256, an EC key by its curve.
    ``kid`` is ``key_id``, else the JWK's own, else its thumbprint (RFC 7638). ``ValueError`` for anything else than a key
    that can sign; its text quotes nothing. That an RSA key's primes are primes is not checked again: ``signing_algorithm``
    does so when the key comes, and it costs 30 to 200 times what the signature does.
    """
    key = _key(private_key)
    header = {"alg": _algorithm(key), "typ": "JWT", "kid": key_id or key.kid or key.thumbprint()}
    issued_at = int(now) - issued_ago_seconds
    whole = {**claims, "iat": issued_at, "exp": int(now) + lifetime_seconds}
    return jwt.encode(header, whole, key, algorithms=ALGORITHMS)


def signing_algorithm(private_key: Secret) -> str:
    """Return the ``alg`` with which ``signed_jwt`` signs, after the whole check of the key; ``ValueError`` as there. Pure."""
    key = _key(private_key)
    if isinstance(key.raw_value, RSAPrivateKey):
        try:
            key.raw_value.private_numbers().private_key()
        except ValueError:
            raise ValueError(NO_KEY) from None
    return _algorithm(key)


def _key(private_key: Secret) -> RSAKey | ECKey:
    """Load a key without the expensive part of an RSA key's check; no number of it is longer than the check can bear."""
    text = private_key.reveal().strip()
    try:
        key = _from_jwk(json.loads(text)) if text.startswith("{") else _from_pem(text)
    except (ValueError, TypeError, KeyError, RecursionError, UnsupportedAlgorithm, JoseError):
        key = None
    if key is None or len(text) > LONGEST_KEY:
        raise ValueError(NO_KEY)
    if isinstance(key.raw_value, RSAPrivateKey):
        _require_bearable(key.raw_value)
    return key


def _from_pem(text: str) -> RSAKey | ECKey | None:
    raw = load_pem_private_key(text.encode(), None, unsafe_skip_rsa_key_validation=True)
    if isinstance(raw, RSAPrivateKey):
        return RSAKey(raw, raw)
    return ECKey(raw, raw) if isinstance(raw, EllipticCurvePrivateKey) else None


def _from_jwk(jwk: dict[str, Any]) -> RSAKey | ECKey | None:
    """Load a JWK (RFC 7518 6.2, 6.3); an RSA key has to bring its primes: to find them takes seconds."""
    if jwk.get("kty") == "EC":
        key = ECKey.import_key(jwk)
        return key if key.is_private else None
    RSAKey.validate_dict_key(jwk)
    names = ("p", "q", "d", "dp", "dq", "qi", "e", "n")
    p, q, d, dp, dq, qi, e, n = (base64_to_int(jwk[name]) for name in names)
    raw = RSAPrivateNumbers(p, q, d, dp, dq, qi, RSAPublicNumbers(e, n)).private_key(
        unsafe_skip_rsa_key_validation=True
    )
    return RSAKey(raw, jwk)


def _require_bearable(key: RSAPrivateKey) -> None:
    numbers = key.private_numbers()
    if key.key_size < LEAST_RSA_BITS:
        raise ValueError("the private key is too short: RSA needs 2048 bits at least")
    inner = (numbers.p, numbers.q, numbers.d, numbers.dmp1, numbers.dmq1, numbers.iqmp, numbers.public_numbers.e)
    if key.key_size > MOST_RSA_BITS or any(number.bit_length() > MOST_RSA_BITS for number in inner):
        raise ValueError("the private key is too long: RSA may have 4096 bits at most")


def _algorithm(key: RSAKey | ECKey) -> str:
    if isinstance(key, RSAKey):
        return "RS256"
    if key.curve_name not in CURVES:
        raise ValueError("the private key is of a curve that cannot sign here")
    return CURVES[key.curve_name]
