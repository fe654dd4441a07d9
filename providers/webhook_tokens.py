"""A webhook request that carries a token signed by the provider (JWT, RFC 7519): whose it is, for whom, and still good.

The token says nothing of the body. The keys are the provider's published set (RFC 7517); the algorithm is the scheme's.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from joserfc import jws
from joserfc.jwk import RSAKey

from providers.spec import Dialogue, Outgoing, Proof, ProviderAnswerError, Received, Scheme, SourceKeys, WebhookRefused
from providers.webhook_places import Body, field

SKEW_SECONDS: Final = 60.0
LONGEST_TOKEN: Final = 8192
RSA_BITS: Final = range(2048, 8193)
REFUSED_IN_HEADER: Final = frozenset({"crit", "b64", "jwk", "jku", "x5c", "x5u"})


def bearer_token(keys_url: str, issuers: Sequence[str]) -> Scheme:
    """Return a check of ``Authorization: Bearer`` with an RS256 token.

    The source's settings ``audience`` and ``account`` (an e-mail address, which must be verified) say for whom and whose it
    has to be. An unknown key id asks for the set once more, past any cache.
    """

    def verify(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
        audience, account = _setting(keys, "audience"), _setting(keys, "account")
        text = field(received, "authorization")
        if not text.startswith("Bearer "):
            raise WebhookRefused("prefix_wrong")
        token, key_id = _unverified(text.removeprefix("Bearer "))
        key = _named(_published((yield Outgoing("GET", keys_url, {"Accept": "application/json"}))), key_id)
        if key is None:
            fresh = {"Accept": "application/json", "Cache-Control": "no-cache"}
            key = _named(_published((yield Outgoing("GET", keys_url, fresh))), key_id)
        if key is None:
            raise WebhookRefused("key_unknown")
        claims = _signed_claims(token, key)
        _check_claims(claims, issuers, audience, account)
        _check_times(claims, keys)
        return Proof(None, frozenset())  # without a digest: one token goes with many requests

    parts = urlsplit(keys_url)
    asks = (f"{parts.scheme}://{parts.netloc}",)
    return Scheme(
        "Signed token", verify, frozenset(), ("authorization",), asks=asks, needs_secret=False, symmetric=False
    )


def _setting(keys: SourceKeys, name: str) -> str:
    held = keys.settings.get(name)
    if held is None or not held.reveal():
        raise WebhookRefused("setting_missing")
    return held.reveal()


def _unverified(text: str) -> tuple[Any, str]:
    """Return a token that is well-formed and signed in the one accepted way, and the id of its key; ``WebhookRefused``."""
    try:
        token = jws.extract_compact(text.encode("ascii") if len(text) <= LONGEST_TOKEN else b"", None)
        header = token.headers()
    except Exception:  # noqa: BLE001 - a library that parses hostile input: whatever it raises, the token is malformed
        raise WebhookRefused("token_malformed") from None
    if not isinstance(header, dict) or REFUSED_IN_HEADER & header.keys():
        raise WebhookRefused("token_malformed")
    if header.get("alg") != "RS256":
        raise WebhookRefused("algorithm_refused")
    key_id = header.get("kid")
    if not isinstance(key_id, str) or not key_id:
        raise WebhookRefused("key_unknown")
    return token, key_id


def _published(answer: Any) -> Sequence[Mapping[str, Any]]:  # noqa: ANN401 - what a driver sends is an Incoming
    try:
        said = answer.json() if answer.status == 200 else None
    except ProviderAnswerError:
        said = None
    keys = said.get("keys") if isinstance(said, dict) else None
    if not isinstance(keys, list):
        raise WebhookRefused("key_unavailable")
    return [key for key in keys if isinstance(key, dict)]


def _named(published: Sequence[Mapping[str, Any]], key_id: str) -> Mapping[str, Any] | None:
    named = [key for key in published if key.get("kid") == key_id]
    if len(named) > 1:
        raise WebhookRefused("key_refused")
    return named[0] if named else None


def _signed_claims(token: Any, key: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ANN401 - joserfc does not export it
    if key.get("kty") != "RSA" or key.get("use", "sig") != "sig" or key.get("alg", "RS256") != "RS256":
        raise WebhookRefused("key_refused")
    try:
        public = RSAKey.import_key({name: str(key[name]) for name in ("kty", "n", "e")})
        good = public.public_key.key_size in RSA_BITS and jws.validate_compact(token, public, algorithms=["RS256"])
        claims = Body(token.payload).decoded() if good else None
    except Exception:  # noqa: BLE001 - as above; also a key that is malformed
        claims = None
    if not isinstance(claims, dict):
        raise WebhookRefused("signature_mismatch")
    return claims


def _check_claims(claims: Mapping[str, Any], issuers: Sequence[str], audience: str, account: str) -> None:
    if claims.get("iss") not in issuers:
        raise WebhookRefused("issuer_mismatch")
    if not _same(claims.get("aud"), audience):
        raise WebhookRefused("audience_mismatch")
    if claims.get("email_verified") is not True or not _same(claims.get("email"), account):
        raise WebhookRefused("account_mismatch")


def _same(claim: object, expected: str) -> bool:
    return isinstance(claim, str) and hmac.compare_digest(claim.encode("utf-8", "surrogatepass"), expected.encode())


def _check_times(claims: Mapping[str, Any], keys: SourceKeys) -> None:
    skew = keys.tolerance_seconds if keys.tolerance_seconds is not None else SKEW_SECONDS
    if _time(claims, "exp") <= keys.now - skew:
        raise WebhookRefused("timestamp_stale")
    if _time(claims, "iat") > keys.now + skew:
        raise WebhookRefused("timestamp_ahead")


def _time(claims: Mapping[str, Any], name: str) -> float:
    """Return a NumericDate (RFC 7519 2); NaN would compare as never expired."""
    claim = claims.get(name)
    if isinstance(claim, bool) or not isinstance(claim, int | float) or not math.isfinite(claim):
        raise WebhookRefused("timestamp_malformed")
    return claim
