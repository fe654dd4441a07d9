"""Signed tokens (JWT, RFC 7519): read strictly, checked against a key set, with asymmetric algorithms only (pure).

What an attacker may write is refused before a signature is looked at: a token that is too long, members named twice, an
algorithm that is not on the list, ``crit``, ``b64``, and keys that the token brings along (``jwk``, ``jku``, ``x5c``,
``x5u``). The key is chosen by ``kid`` among those of the issuer, and must be of the kind that the algorithm takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

from joserfc import jws
from joserfc.jwk import import_key
from joserfc.util import urlsafe_b64decode

from broker.token_endpoint import strict_object

MAX_TOKEN_BYTES: Final = 16_384
SKEW_SECONDS: Final = 60.0
_KEY_TYPES: Final = {  # no "none", no shared secrets
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "RSA"),
    **dict.fromkeys(("ES256", "ES384", "ES512"), "EC"),
    **dict.fromkeys(("EdDSA", "Ed25519"), "OKP"),
}
_CURVES: Final = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "EdDSA": "Ed25519", "Ed25519": "Ed25519"}
_ALGORITHMS: Final = {name: jws.JWSRegistry.algorithms[name] for name in _KEY_TYPES}
_PUBLIC_MEMBERS: Final = ("kty", "n", "e", "crv", "x", "y")
_FORBIDDEN_IN_HEADER: Final = frozenset({"crit", "b64", "jwk", "jku", "x5c", "x5u"})
_RSA_BITS: Final = range(2048, 16_385)
_LONGEST_NAME: Final = 255


class TokenRefused(Exception):
    """The token proves nothing; the text says why, is ours, and is for the log only."""


class UnknownKey(TokenRefused):
    """No key of the set has the token's key id: the issuer may have rotated."""


class _Registry(jws.JWSRegistry):
    """Our list of algorithms; joserfc's own warns of ``EdDSA``, which is still what most servers call Ed25519."""

    max_header_length = 4096
    max_payload_length = MAX_TOKEN_BYTES

    def get_alg(self, name: str) -> Any:  # noqa: ANN401 - joserfc does not export the type
        return _ALGORITHMS[name]


REGISTRY: Final = _Registry(strict_check_header=False)


@dataclass(frozen=True, slots=True)
class UnverifiedToken:
    """What a well-formed token says of itself; anybody can have written it."""

    text: str
    header: Mapping[str, Any]
    claims: Mapping[str, Any]


def read_token(text: str) -> UnverifiedToken:
    """Return what a token says, nothing of it verified (TokenRefused when it is malformed or too long)."""
    parts = text.split(".") if len(text) <= MAX_TOKEN_BYTES and text.isascii() else []
    try:
        header, claims = (strict_object(urlsafe_b64decode(part.encode())) for part in parts[:2])
    except Exception:  # noqa: BLE001 - hostile input: whatever the decoding raises, the token is malformed
        header, claims = {}, {}
    if len(parts) != 3 or not header or not claims or _FORBIDDEN_IN_HEADER & header.keys():
        raise TokenRefused("the token is malformed")
    return UnverifiedToken(text, header, claims)


def signed_claims(token: UnverifiedToken, keys: Sequence[Mapping[str, Any]], *, types: Sequence[str]) -> dict[str, Any]:
    """Return the claims if one of ``keys`` (RFC 7517) made the signature; only this makes them more than a rumour.

    ``types``: accepted values of ``typ`` in lower case without ``application/``; ``""`` accepts its absence. Raises
    TokenRefused, UnknownKey. Claims are not looked at.
    """
    typ = token.header.get("typ", "")
    if not isinstance(typ, str) or typ.lower().removeprefix("application/") not in types:
        raise TokenRefused("the token is of another type")
    key = _chosen(token.header, keys)
    try:
        signed = jws.extract_compact(token.text.encode("ascii"), None, REGISTRY)
        good = jws.validate_compact(signed, import_key(key), registry=REGISTRY)
        claims = strict_object(signed.payload) if good else None
    except Exception:  # noqa: BLE001 - a library over hostile input; also a key that is malformed
        claims = None
    if claims is None:
        raise TokenRefused("the token's signature is not valid")
    return claims


def _chosen(header: Mapping[str, Any], keys: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the public members of the one key that the token can be signed with."""
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in _KEY_TYPES:
        raise TokenRefused("the token is signed in a way that is not accepted")
    if kid is not None and not (isinstance(kid, str) and 0 < len(kid) <= _LONGEST_NAME):
        raise TokenRefused("the token's key id is malformed")
    named = [key for key in keys if kid is None or key.get("kid") == kid]
    if kid is not None and not named:
        raise UnknownKey("the token is signed with a key that the issuer does not publish")
    fitting = [key for key in named if _fits(key, algorithm)]
    if len(fitting) != 1:
        raise TokenRefused("the token does not tell which of the issuer's keys signed it")
    return {name: fitting[0][name] for name in _PUBLIC_MEMBERS if name in fitting[0]}


def _fits(key: Mapping[str, Any], algorithm: str) -> bool:
    if key.get("kty") != _KEY_TYPES[algorithm] or (key.get("use") or "sig") != "sig":
        return False
    if (key.get("alg") or algorithm) != algorithm or key.get("crv") != _CURVES.get(algorithm, key.get("crv")):
        return False
    operations = key.get("key_ops")
    if operations is not None and not (isinstance(operations, list) and "verify" in operations):
        return False
    return key.get("kty") != "RSA" or _rsa_bits(key.get("n")) in _RSA_BITS


def _rsa_bits(modulus: object) -> int:
    try:
        return int.from_bytes(urlsafe_b64decode(str(modulus).encode("ascii"))).bit_length()
    except ValueError:
        return 0


def require_audience(claims: Mapping[str, Any], audience: str) -> None:
    """Return if the token is, among others, for exactly this audience (TokenRefused)."""
    named = claims.get("aud")
    if audience not in (named if isinstance(named, list) else [named]):
        raise TokenRefused("the token is for another audience")


def checked_end(claims: Mapping[str, Any], now: float, *, most_seconds: float, skew_seconds: float) -> float:
    """Return when the token ends, skew not added (TokenRefused when it is over, not begun, or lives longer than allowed).

    ``exp`` must be there. Without ``iat`` the life that is left counts. ``now`` is seconds since 1970.
    """
    ends_at, issued_at, begins_at = claims.get("exp"), claims.get("iat", now), claims.get("nbf", 0)
    if not _is_time(ends_at) or not _is_time(issued_at) or not _is_time(begins_at):
        raise TokenRefused("the token's times are missing or malformed")
    if ends_at <= now - skew_seconds:
        raise TokenRefused("the token is over")
    if max(issued_at, begins_at) > now + skew_seconds:
        raise TokenRefused("the token is from the future: check the clocks")
    if ends_at - min(issued_at, now) > most_seconds:
        raise TokenRefused("the token lives longer than is accepted")
    return float(ends_at)


def _is_time(claim: object) -> TypeGuard[float]:
    """Whether a claim is a NumericDate (RFC 7519 2); NaN would compare as never over."""
    if isinstance(claim, float):
        return math.isfinite(claim)
    return isinstance(claim, int) and not isinstance(claim, bool) and abs(claim) < 2**53


def plain_text(claim: object) -> str | None:
    """Return a claim that is a printable text of sensible length, None for all else."""
    return claim if isinstance(claim, str) and 0 < len(claim) <= _LONGEST_NAME and claim.isprintable() else None
