"""Verifies an ID token that came directly from the token endpoint, and says who consented (OpenID Connect Core 3.1.3.7)."""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeGuard

from joserfc import jws
from joserfc.jwk import import_key
from joserfc.util import urlsafe_b64decode

from broker.token_endpoint import strict_object
from providers.spec import Account, Secret

_KEY_TYPES: Final = {  # the algorithms that are accepted, and the kind of key that each takes: no "none", no shared secrets
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "RSA"),
    **dict.fromkeys(("ES256", "ES384", "ES512"), "EC"),
    **dict.fromkeys(("EdDSA", "Ed25519"), "OKP"),
}
_ALGORITHMS: Final = {name: jws.JWSRegistry.algorithms[name] for name in _KEY_TYPES}
_PUBLIC_MEMBERS: Final = ("kty", "n", "e", "crv", "x", "y")
_RSA_BITS: Final = range(2048, 16_385)
_MAX_TEXT: Final = 255


class IdentityInvalid(Exception):
    """The ID token does not prove who consented; the text says why, is ours and safe to log."""


class UnknownKey(IdentityInvalid):
    """No key of the set has the token's key id: the provider may have rotated; fetch the set again, once."""


class _Registry(jws.JWSRegistry):
    """Our list of algorithms; joserfc's own warns of ``EdDSA``, which is still what most servers call Ed25519."""

    max_header_length = 8192  # some servers put a certificate there

    def get_alg(self, name: str) -> Any:  # noqa: ANN401 - joserfc does not export the type
        return _ALGORITHMS[name]


_REGISTRY: Final = _Registry(
    strict_check_header=False
)  # RFC 7515 4: an unknown header is ignored (``crit`` is refused)


def verify_id_token(
    id_token: Secret,
    *,
    jwks: Mapping[str, Any],
    issuers: Sequence[str],
    client_id: str,
    nonce: str | None,
    now: float,
    skew_seconds: float = 60,
) -> Account:
    """Return the account that a valid ID token names; pure.

    ``jwks`` is the issuer's key set (RFC 7517) as fetched, ``issuers`` every accepted ``iss``, ``nonce`` what the flow sent
    (None: it sent none, and the claim is not looked at), ``now`` seconds since 1970. The e-mail address is left out when
    the provider says that it is not verified. Raises IdentityInvalid for every defect, UnknownKey for an unknown key id.

    Not checked: ``at_hash``, ``acr``, ``auth_time``, ``hd``. Right only for a token that came over TLS from the token
    endpoint itself; one out of a browser's hands needs more (section 3.2.2.11).
    """
    claims = _signed_claims(id_token.reveal(), jwks)
    accepted = {issuer for issuer in issuers if issuer}
    if not isinstance(claims.get("iss"), str) or claims["iss"] not in accepted:
        raise IdentityInvalid("the ID token is of another issuer")
    _check_audience(claims, client_id)
    _check_times(claims, now, skew_seconds)
    if nonce is not None and not _same(claims.get("nonce"), nonce):
        raise IdentityInvalid("the ID token is not of this flow: its nonce differs")
    return _account(claims)


def _signed_claims(text: str, jwks: Mapping[str, Any]) -> dict[str, Any]:
    try:
        token = jws.extract_compact(text.encode("ascii"), None, _REGISTRY)
        unverified_header = token.headers()
    except Exception:  # noqa: BLE001 - a library that parses hostile input: whatever it raises, the token is malformed
        token, unverified_header = None, {}
    if token is None or not isinstance(unverified_header, dict) or {"crit", "b64"} & unverified_header.keys():
        raise IdentityInvalid("the ID token is malformed")
    key_data = _choose_key(unverified_header, jwks)
    try:
        good = jws.validate_compact(token, import_key(key_data), registry=_REGISTRY)
        claims = strict_object(token.payload) if good else None
    except Exception:  # noqa: BLE001 - as above; also a key that is malformed or does not fit the algorithm
        claims = None
    if claims is None:
        raise IdentityInvalid("the ID token's signature or payload is not valid")
    return claims


def _choose_key(unverified_header: Mapping[str, Any], jwks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the public members of the one key that the token can be signed with."""
    algorithm, kid = unverified_header.get("alg"), unverified_header.get("kid")
    key_type = _KEY_TYPES.get(algorithm) if isinstance(algorithm, str) else None
    if key_type is None or not (kid is None or isinstance(kid, str)):
        raise IdentityInvalid("the ID token is signed in a way that is not accepted")
    keys = jwks.get("keys")
    published = [key for key in keys if isinstance(key, dict)] if isinstance(keys, list) else []
    named = [key for key in published if kid is None or key.get("kid") == kid]
    if kid is not None and not named:
        raise UnknownKey("the ID token is signed with a key that the issuer does not publish")
    fitting = [key for key in named if _fits(key, algorithm, key_type)]
    if len(fitting) != 1:  # OpenID Connect Core 10.1: without a key id there has to be one key only
        raise IdentityInvalid("the ID token does not tell which of the issuer's keys signed it")
    return {name: fitting[0][name] for name in _PUBLIC_MEMBERS if name in fitting[0]}


def _fits(key: Mapping[str, Any], algorithm: object, key_type: str) -> bool:
    if key.get("kty") != key_type or (key.get("use") or "sig") != "sig" or (key.get("alg") or algorithm) != algorithm:
        return False
    return key_type != "RSA" or _rsa_bits(key.get("n")) in _RSA_BITS


def _rsa_bits(modulus: object) -> int:
    try:
        return int.from_bytes(urlsafe_b64decode(str(modulus).encode("ascii"))).bit_length()
    except ValueError:
        return 0


def _check_audience(claims: Mapping[str, Any], client_id: str) -> None:
    audience = claims.get("aud")
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or not client_id or client_id not in audiences:
        raise IdentityInvalid("the ID token is for another client")
    needed = len(audiences) > 1
    if (needed or "azp" in claims) and claims.get("azp") != client_id:
        raise IdentityInvalid("the ID token was issued to another client")


def _check_times(claims: Mapping[str, Any], now: float, skew_seconds: float) -> None:
    expires_at, issued_at, not_before_at = claims.get("exp"), claims.get("iat"), claims.get("nbf", 0)
    if not _is_time(expires_at) or not _is_time(issued_at) or not _is_time(not_before_at):
        raise IdentityInvalid("the ID token's times are missing or malformed")
    if expires_at <= now - skew_seconds:
        raise IdentityInvalid("the ID token is expired")
    if max(issued_at, not_before_at) > now + skew_seconds:
        raise IdentityInvalid("the ID token is from the future: check the clocks")


def _is_time(claim: object) -> TypeGuard[float]:
    """Whether a claim is a NumericDate (RFC 7519 2); NaN would compare as never expired."""
    if isinstance(claim, float):
        return math.isfinite(claim)
    return isinstance(claim, int) and not isinstance(claim, bool)


def _same(claim: object, expected: str) -> bool:
    return isinstance(claim, str) and expected != "" and hmac.compare_digest(_bytes(claim), _bytes(expected))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _account(claims: Mapping[str, Any]) -> Account:
    subject = _text(claims.get("sub"))
    if subject is None:
        raise IdentityInvalid("the ID token names no account")
    verified = claims.get("email_verified") not in (False, "false")  # some servers write it as a string
    return Account(
        subject,
        _text(claims.get("name")) or _text(claims.get("preferred_username")),
        _text(claims.get("email")) if verified else None,
    )


def plain_account(account: Account) -> Account:
    """Return what a provider's API said about an account, held to what an ID token may say (IdentityInvalid)."""
    subject = _text(account.id)
    if subject is None:
        raise IdentityInvalid("the provider's API names no account")
    variables = {name: value for name, value in account.variables.items() if isinstance(value, str)}
    return Account(subject, _text(account.name), _text(account.email), variables)


def _text(claim: object) -> str | None:
    """Return a claim that is a printable text of sensible length; None for all else."""
    return claim if isinstance(claim, str) and 0 < len(claim) <= _MAX_TEXT and claim.isprintable() else None
