"""Tokens of trusted issuers: their keys, fetched within bounds and kept, and who a token's subject is here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from broker.callers.signatures import (
    SKEW_SECONDS,
    TokenRefused,
    UnknownKey,
    UnverifiedToken,
    checked_end,
    plain_text,
    require_audience,
    signed_claims,
)
from broker.callers.trust import SETTING, Issuer, Rule, Trust, first_fitting
from broker.egress import Egress
from broker.errors import Overloaded
from broker.policy import Principal
from broker.settings import Settings, SettingsError
from broker.token_endpoint import strict_object

TYPES: Final = ("", "jwt", "at+jwt")
FRESH_SECONDS: Final = 300.0
STALE_SECONDS: Final = 6 * 3600.0
RETRY_SECONDS: Final = 30.0
FIRST_RETRY_SECONDS: Final = 5.0  # while there are no keys at all
FETCH_SECONDS: Final = 5.0
MAX_KEYS_BYTES: Final = 262_144
MAX_KEYS: Final = 100
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Verified:
    """Who a token proves to be, as whom its issuer knows it (``subject``), and when it ends (seconds since 1970)."""

    principal: Principal
    rule: Rule
    subject: str
    ends_at: float


class IssuerKeys:
    """The published keys of one issuer: one fetch at a time, in the background while the old ones will do.

    Keys are fresh for 5 minutes. An unknown key id asks again, at most every 30 s. While the issuer does not answer, keys
    are used for up to 6 hours after they were fetched.
    """

    def __init__(self, issuer: Issuer, egress: Egress, clock: Callable[[], float]) -> None:
        """Fetch nothing yet; ``clock`` counts seconds."""
        self._issuer = issuer
        self._egress = egress
        self._clock = clock
        self._keys: tuple[Mapping[str, Any], ...] = ()
        self._fetched_at = self._tried_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    async def get(self, *, unknown: bool = False) -> Sequence[Mapping[str, Any]]:
        """Return the keys; ``unknown``: those at hand lack one. Raises ``Overloaded`` when there are none to be had."""
        age = self._clock() - self._fetched_at
        if unknown or age > FRESH_SECONDS:
            self._begin()
        usable = bool(self._keys) and age <= STALE_SECONDS
        if self._fetching is not None and (unknown or not usable):
            await asyncio.shield(self._fetching)
        if not self._keys or self._clock() - self._fetched_at > STALE_SECONDS:
            raise Overloaded("The keys of the token's issuer are not to be had", retry_after_seconds=5)
        return self._keys

    def _begin(self) -> None:
        wait = RETRY_SECONDS if self._keys else FIRST_RETRY_SECONDS
        if self._fetching is None and self._clock() - self._tried_at >= wait:
            self._tried_at = self._clock()
            self._fetching = asyncio.create_task(self._fetch())
            self._fetching.add_done_callback(self._end)

    def _end(self, _: asyncio.Task[None]) -> None:
        self._fetching = None

    async def _fetch(self) -> None:
        try:
            self._keys = published_keys(await self._document())
            self._fetched_at = self._clock()
        except Exception as error:  # noqa: BLE001 - a document of somebody else: whatever it makes stumble, there are no keys
            log.warning("issuer.keys_unavailable", issuer=self._issuer.issuer, why=type(error).__name__)

    async def _document(self) -> Any:  # noqa: ANN401 - JSON is any shape until it is checked
        if self._issuer.jwks_file is not None:
            return await asyncio.to_thread(_of_file, self._issuer.jwks_file)
        url = self._issuer.jwks_url or await self._discovered()
        return await self._egress.get_json(url, timeout_seconds=FETCH_SECONDS, max_bytes=MAX_KEYS_BYTES)

    async def _discovered(self) -> str:
        """Return ``jwks_uri`` of the issuer's own metadata (OpenID Connect Discovery 4.3: it must name the same issuer)."""
        url = self._issuer.issuer.rstrip("/") + "/.well-known/openid-configuration"
        found = await self._egress.get_json(url, timeout_seconds=FETCH_SECONDS, max_bytes=MAX_KEYS_BYTES)
        if not isinstance(found, dict) or found.get("issuer") != self._issuer.issuer:
            raise ValueError("the metadata are of another issuer")
        jwks_uri = found.get("jwks_uri")
        if not isinstance(jwks_uri, str) or (self._issuer.issuer.startswith("https:") and jwks_uri[:6] != "https:"):
            raise ValueError("the metadata name no keys")
        return jwks_uri

    async def aclose(self) -> None:
        """End a fetch that is under way."""
        if self._fetching is not None:
            self._fetching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._fetching


def _of_file(path: Path) -> Any:  # noqa: ANN401
    with path.open("rb") as file:
        return strict_object(file.read(MAX_KEYS_BYTES + 1)[: MAX_KEYS_BYTES + 1])


def published_keys(document: object) -> tuple[Mapping[str, Any], ...]:
    """Return the keys of a key set (RFC 7517 5), 1 to 100 objects; ``ValueError`` for anything else (pure)."""
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list) or not 1 <= len(keys) <= MAX_KEYS or not all(isinstance(key, dict) for key in keys):
        raise ValueError("not a key set")
    return tuple(keys)


class Issuers:
    """Says who tokens of trusted issuers prove to be. Calls may run at once."""

    def __init__(
        self, trust: Trust, egress_of: Callable[[Issuer], Egress], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``egress_of`` gives the client for an issuer (its authorities may be its own); ``clock`` counts seconds."""
        self.trust = trust
        self._keys = {name: IssuerKeys(one, egress_of(one), clock) for name, one in trust.issuers.items()}

    async def verified(self, token: UnverifiedToken, *, at: float) -> Verified:
        """Return who the token proves to be at ``at``, seconds since 1970 (TokenRefused; Overloaded without keys)."""
        named = token.claims.get("iss")
        issuer = self.trust.issuers.get(named) if isinstance(named, str) else None
        if issuer is None:
            raise TokenRefused("the token is of an unknown issuer")
        # what is over is refused before anything is fetched for it; the claims count only once they are signed
        checked_end(token.claims, at, most_seconds=issuer.max_seconds, skew_seconds=SKEW_SECONDS)
        claims = await self._signed_claims(token, self._keys[issuer.issuer])
        return judged(claims, issuer, at)

    async def _signed_claims(self, token: UnverifiedToken, keys: IssuerKeys) -> dict[str, Any]:
        try:
            return signed_claims(token, await keys.get(), types=TYPES)
        except UnknownKey:
            return signed_claims(token, await keys.get(unknown=True), types=TYPES)

    async def aclose(self) -> None:
        """End what is under way."""
        for keys in self._keys.values():
            await keys.aclose()


def judged(claims: Mapping[str, Any], issuer: Issuer, at: float) -> Verified:
    """Return who signed claims stand for (TokenRefused; pure)."""
    if claims.get("iss") != issuer.issuer:
        raise TokenRefused("the token is of another issuer")
    require_audience(claims, issuer.audience)
    ends_at = checked_end(claims, at, most_seconds=issuer.max_seconds, skew_seconds=SKEW_SECONDS)
    subject = plain_text(claims.get("sub"))
    rule = first_fitting(issuer.rules, subject, claims) if subject is not None else None
    if subject is None or rule is None:
        raise TokenRefused("no rule is for the token's subject")
    return Verified(rule.principal(subject), rule, subject, ends_at)


def open_issuers(trust: Trust, settings: Settings, egress: Egress) -> tuple[Issuers, list[Egress]]:
    """Return the issuers, and the clients that were made for those with authorities of their own: close them.

    A key file that cannot be used stops the start (SettingsError); what has to be fetched is fetched later.
    """
    made: dict[Path, Egress] = {}
    for issuer in trust.issuers.values():
        if issuer.jwks_file is not None:
            _require_key_file(issuer.jwks_file)
        if issuer.ca_file is not None and issuer.ca_file not in made:
            made[issuer.ca_file] = _egress_with(settings, issuer.ca_file)
    return Issuers(trust, lambda issuer: made[issuer.ca_file] if issuer.ca_file else egress), list(made.values())


def _require_key_file(path: Path) -> None:
    try:
        published_keys(_of_file(path))
    except (OSError, ValueError):
        raise SettingsError(f"{SETTING}: a jwks_file cannot be read, or holds no key set") from None


def _egress_with(settings: Settings, ca_file: Path) -> Egress:
    try:
        return Egress(settings.model_copy(update={"egress_ca_file": ca_file}))
    except SettingsError:
        raise SettingsError(f"{SETTING}: a ca_file cannot be read, or holds no certificates") from None
