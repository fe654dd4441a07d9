"""Who calls with a token instead of a key: one of a trusted issuer, or one of ours; and ours made out of either."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog

from broker.audit import Audit, Entry
from broker.callers.exchange import Exchange, Exchanged, new_exchanged
from broker.callers.fields import grants_summary
from broker.callers.issuers import Issuers, Verified
from broker.callers.keys import digest
from broker.callers.narrowing import MOST_BYTES, own_grants
from broker.callers.signatures import TokenRefused, UnverifiedToken, read_token
from broker.callers.standing import Standing, narrowed
from broker.callers.trust import first_fitting
from broker.database import Database, now
from broker.errors import Forbidden, InvalidRequest, Unauthenticated
from broker.policy import Grant, Principal, grant_json
from providers.spec import Secret

VERIFIED_SECONDS: Final = 60.0
OURS_SECONDS: Final = 0.5
MOST_ANNOUNCED: Final = 4096
HOUR_SECONDS: Final = 3600
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Believed:
    """Who a token stands for, and for how many seconds that need not be asked again."""

    principal: Principal
    seconds: float
    verified: Verified | None = None


class Tokens:
    """Reads and makes tokens. Calls may run at once; of several with one new token, one verifies it for all."""

    def __init__(
        self,
        database: Database,
        audit: Audit,
        standing: Standing,
        issuers: Issuers,
        exchange: Exchange,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Keep the parts; ``wall_clock`` gives seconds since 1970."""
        self.exchange = exchange
        self.issuers = issuers
        self._database = database
        self._audit = audit
        self._standing = standing
        self._wall_clock = wall_clock
        self._announced: set[str] = set()
        self._verifying: dict[str, asyncio.Task[Verified]] = {}

    def are_ours(self, text: str) -> bool:
        """Return whether a text claims to be a token of ours or of a trusted issuer; a vendor's own JWT does not."""
        try:
            issuer = read_token(text).claims.get("iss")
        except TokenRefused:
            return False
        return isinstance(issuer, str) and (issuer == self.exchange.issuer or issuer in self.issuers.trust.issuers)

    async def identify(self, text: str) -> Believed:
        """Return who a token stands for.

        Raises ``Unauthenticated`` in one shape whatever is wrong (the log says what), ``Overloaded`` when the issuer's keys
        are not to be had, ``AuditUnavailable`` when a token that is new here cannot be recorded, ``DatabaseUnavailable``.
        """
        try:
            token = read_token(text)
            if token.claims.get("iss") == self.exchange.issuer:
                return await self._ours(token)
            verified = await self._verified(token)
        except TokenRefused as error:
            log.info("caller.token_refused", why=str(error))
        else:
            rest = verified.ends_at - self._wall_clock()
            return Believed(verified.principal, max(0.0, min(VERIFIED_SECONDS, rest)), verified)
        raise Unauthenticated

    async def _ours(self, token: UnverifiedToken) -> Believed:
        told = await self.exchange.read(token, at=self._wall_clock())
        principal = await self._database.read(lambda session: self._standing.by_exchanged(session, told))
        if principal is None:
            raise TokenRefused("the caller or the key behind the token is gone, or the token is over")
        return Believed(principal, OURS_SECONDS)

    async def _verified(self, token: UnverifiedToken) -> Verified:
        mark = digest(token.text)
        task = self._verifying.get(mark)
        if task is None:
            task = asyncio.create_task(self._verify(token, mark))
            self._verifying[mark] = task
            task.add_done_callback(lambda done: self._end(mark, done))
        return await asyncio.shield(task)

    def _end(self, mark: str, done: asyncio.Task[Verified]) -> None:
        self._verifying.pop(mark, None)
        if not done.cancelled():
            done.exception()  # whoever waited has it; if all have left, nobody needs it

    async def _verify(self, token: UnverifiedToken, mark: str) -> Verified:
        verified = await self.issuers.verified(token, at=self._wall_clock())
        entry = Entry(
            action="caller.token_accepted",
            actor=verified.principal.caller_id,
            subject=verified.subject,
            detail={
                "rule": verified.rule.name,
                "issuer": verified.rule.source,
                "token": self._audit.digest(token.text),
            },
        )
        await self._announce(mark, entry)
        return verified

    async def certified(self, identity: str) -> Principal:
        """Return whom a certificate's identity stands for (Unauthenticated for a stranger; AuditUnavailable)."""
        rule = first_fitting(self.issuers.trust.certificates, identity, {})
        if rule is None:
            raise Unauthenticated
        principal = rule.principal(identity)
        hour = int(self._wall_clock()) // HOUR_SECONDS
        entry = Entry(
            action="caller.certificate_accepted",
            actor=principal.caller_id,
            subject=identity,
            detail={"rule": rule.name},
        )
        await self._announce(f"{hour} {identity}", entry)
        return principal

    async def _announce(self, mark: str, entry: Entry) -> None:
        """Record, once a process, who stands behind a caller's id: its other records have the id alone."""
        if mark in self._announced:
            return
        await self._audit.record(entry)
        if len(self._announced) >= MOST_ANNOUNCED:
            self._announced.clear()
        self._announced.add(mark)

    async def exchanged(
        self, principal: Principal, wanted: Sequence[Grant] | None, verified: Verified | None
    ) -> tuple[Secret, Exchanged]:
        """Return a token of ours for a caller, recorded in the audit, and what it says.

        ``wanted``: grants, None for all that the caller has. ``verified``: the issuer's token that the caller came with, which
        this one does not outlive. Raises ``InvalidRequest`` for an admin who does not say what for, and for too many grants;
        ``Forbidden`` when nothing is left; ``AuditUnavailable``, ``SecretStoreUnavailable``.
        """
        if own_grants(principal) is None and wanted is None:
            raise InvalidRequest("An admin has to name what the token is for: scope, or authorization_details")
        grants = narrowed(principal, wanted)
        if not grants:
            raise Forbidden("Nothing of this is the caller's to pass on")
        kept = None if wanted is None else grants
        if kept is not None and sum(len(str(grant_json(grant))) for grant in kept) > 2 * MOST_BYTES:
            raise InvalidRequest("Too many grants are left; name fewer integrations, subjects or paths")
        at = await self._database.read(now)
        ends_at = int(min(at + self.exchange.seconds, verified.ends_at if verified is not None else at + HOUR_SECONDS))
        if ends_at < at + 1:
            raise Unauthenticated
        told = new_exchanged(principal.caller_id, principal.key_id or None, kept, at=at, ends_at=ends_at)
        if verified is not None:
            told = replace(told, subject=verified.subject, claims_mark=verified.rule.claims_mark)
        token = self.exchange.issue(told, at=at)
        await self._audit.record(
            Entry(
                action="caller.token_exchanged",
                actor=principal.caller_id,
                detail={"token_id": told.token_id, "expires_at": ends_at, "grants": grants_summary(kept)},
            )
        )
        return token, told

    async def aclose(self) -> None:
        """End what is under way."""
        for task in list(self._verifying.values()):
            task.cancel()
        await asyncio.gather(*self._verifying.values(), return_exceptions=True)
        await self.issuers.aclose()
