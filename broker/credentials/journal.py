"""What is durable of a refresh under way: the attempt before it is sent, the provider's raw answer before it is acted on."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
from sqlmodel import Session

from broker.credentials.leases import Claimed, Lease, extend_lease, require_lease
from broker.credentials.outcomes import Outcomes
from broker.credentials.renewals import renewal_key
from broker.credentials.stored_secrets import StoredSecrets, secret_owner, sha256_hex
from broker.credentials.usable import read_row
from broker.database import Database, now
from broker.errors import (
    DatabaseUnavailable,
    ProviderUnavailable,
    ReauthorizationRequired,
    SecretStoreUnavailable,
    UpstreamInvalid,
)
from broker.models import RefreshAttempt, RefreshJournal
from broker.refresh import Verdict, failure_of, wait_for
from broker.token_endpoint import TokenAnswer, TokenRefusal, parse_answer
from broker.vault import SecretUnreadable
from broker.vault.keyring import Seal, Sealer
from providers.spec import Incoming

log = structlog.get_logger()


class RefusedOnce(ProviderUnavailable):
    """The provider said, for the first time, that the grant is dead: ask once more before believing it."""


@dataclass(frozen=True, slots=True)
class SentToken:
    """By what digests the secret that a renewal is made with is known: keyed, for the rows; bare, only ever sealed."""

    keyed_digest: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What the provider answered, and when by the monotonic clock."""

    answer: Incoming
    at_monotonic: float


def write_attempt(session: Session, lease: Lease, token: SentToken, *, lasts_seconds: float) -> None:
    """Write what is about to be sent, and let the lease last until its sender has surely given up (LeaseLost)."""
    require_lease(session, lease)
    at = now(session)
    extend_lease(session, lease, ends_at=at + lasts_seconds)
    attempt = RefreshAttempt(
        connection_id=lease.connection_id, fence=lease.fence, token_digest=token.keyed_digest, sent_at=at
    )
    session.merge(attempt)


def _in_a_callers_terms(verdict: Verdict, refusal: TokenRefusal, at: float) -> Exception:
    if verdict.lost:
        return ReauthorizationRequired(status_reason=verdict.reason)
    if verdict.ask_again:
        return RefusedOnce("the provider refused the refresh; it is asked once more", headers={"Retry-After": "2"})
    if refusal.outcome == "transient":
        error = wait_for(verdict.tally.not_before_at or at, at)
        error.pause_seconds = refusal.retry_after_seconds
        error.provider_in_trouble = True
        return error
    refused = UpstreamInvalid("the provider refused the refresh: see status_reason of the connection")
    refused.provider_in_trouble = False
    return refused


def _content(token: SentToken, answer: Incoming) -> bytes:
    """Return what is sealed of an answer."""
    body = {
        "status": answer.status,
        "headers": dict(answer.headers),
        "body": base64.b64encode(answer.body).decode(),
        "for_sha256": token.sha256,
    }
    return json.dumps(body).encode()


class Journal:
    """Keeps raw answers, sealed, and acts on them. Only the holder of a connection's lease calls it."""

    def __init__(
        self,
        database: Database,
        stored: StoredSecrets,
        sealer: Sealer,
        outcomes: Outcomes,
        *,
        keep_seconds: float,
        monotonic: Callable[[], float],
    ) -> None:
        """Keep the parts. ``keep_seconds``: how long an answer is offered to a database that does not take it."""
        self._database = database
        self._stored = stored
        self._sealer = sealer
        self._outcomes = outcomes
        self._keep_seconds = keep_seconds
        self._monotonic = monotonic

    async def keep(self, lease: Lease, token: SentToken, answered: Answered) -> RefreshJournal:
        """Make the answer durable. While the database does not take it, it is offered again: it may be the only copy.

        So it is while a data key that was replaced cannot be loaded. Raises LeaseLost; DatabaseUnavailable or
        SecretStoreUnavailable when the time for that is over.
        """
        content = _content(token, answered.answer)

        def work(session: Session, seal: Seal) -> RefreshJournal:
            require_lease(session, lease)
            owner = secret_owner(lease.connection_id)
            journal = RefreshJournal(
                connection_id=lease.connection_id,
                fence=lease.fence,
                token_digest=token.keyed_digest,
                sealed_answer=seal(content, owner=owner, purpose="journal", version=lease.fence),
                received_at=now(session) - (self._monotonic() - answered.at_monotonic),
            )
            session.merge(journal)
            return journal

        while True:
            try:
                return await self._sealer.write(self._database, work)
            except (DatabaseUnavailable, SecretStoreUnavailable):
                waited_seconds = self._monotonic() - answered.at_monotonic
                log.error("refresh.journal_waits", connection_id=lease.connection_id, seconds=round(waited_seconds, 1))  # noqa: TRY400 - no defect
                if waited_seconds > self._keep_seconds:
                    raise
            await asyncio.sleep(0.1)

    async def settle(self, claimed: Claimed, journal: RefreshJournal) -> None:
        """Act on a journalled answer: store the new token, or record what the refusal means. Needs no network.

        Raises RefusedOnce, ReauthorizationRequired, ProviderUnavailable or UpstreamInvalid for a refusal; LeaseLost,
        DatabaseUnavailable and SecretStoreUnavailable leave the journal for the next one who claims.
        """
        row = claimed.row
        oauth2 = self._outcomes.oauth2_of(row)
        answer, for_sha256 = await self._opened(journal)
        old_value = await self._stored.open(row)
        key = renewal_key(old_value)
        if key is None or not hmac.compare_digest(sha256_hex(key), for_sha256):
            log.warning("refresh.journal_dropped", connection_id=row.id, fence=journal.fence)
            await self._outcomes.drop(claimed.lease)  # the secret was replaced otherwise, by a consent or an import
            return
        parsed = parse_answer(oauth2, answer, received_at=journal.received_at)
        if isinstance(parsed, TokenAnswer):
            await self._outcomes.store(claimed, parsed, received_at=journal.received_at, old_value=old_value)
            return
        verdict = await self._outcomes.fail(claimed, failure_of(oauth2.refresh, parsed, status=answer.status))
        raise _in_a_callers_terms(verdict, parsed, claimed.now)

    async def replay(self, claimed: Claimed, journal: RefreshJournal) -> Claimed:
        """Settle a journal that a crash left, and return what the row has become (as ``settle`` raises)."""
        log.warning("refresh.replayed", connection_id=claimed.row.id, fence=journal.fence)
        await self.settle(claimed, journal)
        return await self.reread(claimed)

    async def reread(self, claimed: Claimed) -> Claimed:
        """Return the claim with its row as it is now and without a journal (NotFound)."""
        row, at = await read_row(self._database, claimed.row.id)
        return replace(claimed, row=row, journal=None, now=at)

    async def _opened(self, journal: RefreshJournal) -> tuple[Incoming, str]:
        """Return the answer and the digest of the refresh token that it is for."""
        try:
            opened = await self._sealer.open_fresh(
                self._database,
                journal.sealed_answer,
                owner=secret_owner(journal.connection_id),
                purpose="journal",
                version=journal.fence,
            )
        except SecretUnreadable:
            log.critical("refresh.journal_unreadable", connection_id=journal.connection_id, fence=journal.fence)
            raise SecretStoreUnavailable("a journalled answer cannot be opened") from None
        body = json.loads(opened)
        return Incoming(body["status"], body["headers"], base64.b64decode(body["body"])), body["for_sha256"]
