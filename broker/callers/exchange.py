"""Short-lived tokens of our own (RFC 8693, RFC 9068): signed, narrowed, and worth nothing without the caller behind them.

A token names its caller, the key (or the issuer's subject) that it was made with, and the grants that it was narrowed to. What
it allows is worked out at each look: what those grants and the caller's of now both allow. Signed with Ed25519 by a key derived
from the current root key of purpose ``jwt-signing``; the keys of all states but retired verify.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jws
from joserfc.jwk import OKPKey

from broker.callers.signatures import (
    REGISTRY,
    SKEW_SECONDS,
    TokenRefused,
    UnknownKey,
    UnverifiedToken,
    checked_end,
    plain_text,
    require_audience,
    signed_claims,
)
from broker.errors import InvalidRequest
from broker.models import new_id
from broker.policy import Grant, grant_json, parse_grants
from broker.vault.keyring import derive_key
from broker.vault.system_keys import RootKey, SystemKeys
from providers.spec import Secret

AUDIENCE: Final = "broker"
TYPE: Final = "at+jwt"
LONGEST_SECONDS: Final = 3600
REFRESH_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What a token of ours says. ``key_id``: the caller's key behind it, None for a caller by rule. ``grants`` None: all.

    ``seconds``: how long a fresh one lives; 0 for one that was read. ``subject``, ``claims_mark``: whom the issuer knows the
    caller by rule as, and the claims that its rule asked for (``Rule.claims_mark``); None for a caller with a key.
    """

    token_id: str
    caller_id: str
    key_id: str | None
    grants: tuple[Grant, ...] | None
    ends_at: float
    seconds: int = 0
    subject: str | None = None
    claims_mark: str | None = None


class Exchange:
    """Makes and reads tokens of ours. Calls may run at once."""

    def __init__(self, keys: SystemKeys, *, issuer: str, seconds: int) -> None:
        """Take the keys of purpose ``jwt-signing``, loaded; ``seconds`` is how long a token lives at most."""
        self.issuer = issuer
        self.seconds = seconds
        self._keys = keys
        self._refreshed_at = float("-inf")
        self._public: dict[str, dict[str, Any]] = {}

    def issue(self, told: Exchanged, *, at: float) -> Secret:
        """Return a signed token that says this (SecretStoreUnavailable without a key); ``at`` is its ``iat``."""
        claims = {
            "iss": self.issuer,
            "aud": AUDIENCE,
            "sub": told.caller_id,
            "client_id": told.caller_id,
            "jti": told.token_id,
            "iat": int(at),
            "exp": int(told.ends_at),
            "key": told.key_id,
            "rule_subject": told.subject,
            "rule_claims": told.claims_mark,
            "grants": None if told.grants is None else [grant_json(grant) for grant in told.grants],
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        key = self._keys.current
        header = {"alg": "EdDSA", "typ": TYPE, "kid": key.id}
        payload = json.dumps(claims, separators=(",", ":")).encode()
        return Secret(jws.serialize_compact(header, payload, _private_key(key), registry=REGISTRY))

    async def read(self, token: UnverifiedToken, *, at: float) -> Exchanged:
        """Return what a token of ours says, its signature and times verified at ``at`` (TokenRefused).

        Whether the caller and the key behind it are still good is not checked.
        """
        try:
            claims = signed_claims(token, self.public_keys(), types=(TYPE,))
        except UnknownKey:
            await self._refresh()
            claims = signed_claims(token, self.public_keys(), types=(TYPE,))
        return told_by(claims, self.issuer, at)

    def public_keys(self) -> list[dict[str, Any]]:
        """Return the public keys that verify tokens of ours, as JWKs: next, current, previous."""
        keys = self._keys.all
        self._public = {key.id: self._public.get(key.id) or _public_jwk(key) for key in keys}
        return list(self._public.values())

    async def _refresh(self) -> None:
        # another process may have made its first token with a key that this one has not read yet
        if time.monotonic() - self._refreshed_at >= REFRESH_SECONDS:
            self._refreshed_at = time.monotonic()
            await self._keys.refresh()


def told_by(claims: Mapping[str, Any], issuer: str, at: float) -> Exchanged:
    """Return what signed claims say (TokenRefused; pure). No skew is allowed: it is our own clock."""
    if claims.get("iss") != issuer:
        raise TokenRefused("the token is of another issuer")
    require_audience(claims, AUDIENCE)
    if "iat" not in claims:
        raise TokenRefused("the token's times are missing or malformed")
    checked_end(claims, at, most_seconds=LONGEST_SECONDS, skew_seconds=SKEW_SECONDS)
    ends_at = checked_end({"exp": claims["exp"]}, at, most_seconds=LONGEST_SECONDS + SKEW_SECONDS, skew_seconds=0)
    token_id, caller_id = plain_text(claims.get("jti")), plain_text(claims.get("sub"))
    key_id = plain_text(claims.get("key"))
    if token_id is None or caller_id is None or (key_id is None and "key" in claims):
        raise TokenRefused("the token names no caller")
    subject, claims_mark = plain_text(claims.get("rule_subject")), plain_text(claims.get("rule_claims"))
    return Exchanged(token_id, caller_id, key_id, _grants(claims), ends_at, subject=subject, claims_mark=claims_mark)


def _grants(claims: Mapping[str, Any]) -> tuple[Grant, ...] | None:
    if "grants" not in claims:
        return None
    try:
        return parse_grants(claims["grants"])
    except InvalidRequest:
        raise TokenRefused("the token's grants are not known here") from None


def new_exchanged(
    caller_id: str, key_id: str | None, grants: Sequence[Grant] | None, *, at: float, ends_at: float
) -> Exchanged:
    """Return what a fresh token is to say, with an id of its own; of a caller by rule the subject has to be added."""
    told = tuple(grants) if grants is not None else None
    return Exchanged(new_id("tok"), caller_id, key_id, told, ends_at, int(ends_at - at))


def _private_key(key: RootKey) -> OKPKey:
    seed = derive_key(key.root, "jwt signing with Ed25519")
    return OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(seed))


def _public_jwk(key: RootKey) -> dict[str, Any]:
    members = _private_key(key).as_dict(private=False)
    return {**members, "kid": key.id, "use": "sig", "alg": "EdDSA"}
