"""How an OAuth client proves itself: Basic, in the body, not at all, or by an assertion that it signs (RFC 6749 2.3, 7523)."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote_plus

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey

from providers.spec import ClientAuth, Secret

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_SECONDS = 300
CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
LEAST_RSA_BITS = 2048  # RFC 7518 3.3
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
    or no such key; its text is safe to show.
    """
    if auth == "none":
        return {}, {"client_id": client_id}
    if client_secret is None:
        raise ValueError("there is no client secret")
    if auth == "client_secret_post":
        return {}, {"client_id": client_id, "client_secret": client_secret.reveal()}
    if auth == "private_key_jwt":
        claims = {"iss": client_id, "sub": client_id, "aud": audience, "jti": unique}
        assertion = signed_jwt(client_secret, claims, now=now, lifetime_seconds=ASSERTION_SECONDS)
        return {}, {"client_id": client_id, "client_assertion_type": ASSERTION_TYPE, "client_assertion": assertion}
    pair = f"{quote_plus(client_id)}:{quote_plus(client_secret.reveal())}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}, {}


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
    that can sign; its text quotes nothing.
    """
    key = _key(private_key)
    header = {"alg": _algorithm(key), "typ": "JWT", "kid": key_id or key.kid or key.thumbprint()}
    issued_at = int(now) - issued_ago_seconds
    whole = {**claims, "iat": issued_at, "exp": int(now) + lifetime_seconds}
    return jwt.encode(header, whole, key, algorithms=ALGORITHMS)


def signing_algorithm(private_key: Secret) -> str:
    """Return the ``alg`` with which ``signed_jwt`` signs; ``ValueError`` as there. Pure."""
    return _algorithm(_key(private_key))


def _key(private_key: Secret) -> RSAKey | ECKey:
    text = private_key.reveal().strip()
    for kind in (RSAKey, ECKey):
        try:
            key: RSAKey | ECKey = kind.import_key(json.loads(text) if text.startswith("{") else text)
        except (ValueError, TypeError, KeyError, RecursionError, JoseError):
            continue
        if key.is_private:
            return key
    raise ValueError("the private key is neither a PEM nor a JWK of RSA or EC that can sign")


def _algorithm(key: RSAKey | ECKey) -> str:
    if isinstance(key, RSAKey):
        if key.raw_value.key_size < LEAST_RSA_BITS:
            raise ValueError("the private key is too short: RSA needs 2048 bits at least")
        return "RS256"
    if key.curve_name not in CURVES:
        raise ValueError("the private key is of a curve that cannot sign here")
    return CURVES[key.curve_name]
