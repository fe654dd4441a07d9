"""Ends stopped connections at their providers: a few at once, within a budget, tried again, resumed after a crash.

A claim moves the result's ``not_before_at`` ahead, so that of several processes one acts, and another one after a crash.
What the provider said is noted before the secret is destroyed: whoever resumes behind that does not ask again. What is
deleted or erased meanwhile goes the same way, and its row with the last step. While our own stores do not answer nothing is
counted as a try.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
import structlog
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from sqlmodel import Session, col

from broker.audit import Audit, Entry
from broker.credentials import Credentials, Lease, LeaseLost, Revoked, SecretLost, destroyed_version, require_lease
from broker.database import Database, now
from broker.errors import (
    AuditUnavailable,
    BrokerError,
    DatabaseUnavailable,
    NotFound,
    ProviderUnavailable,
    SecretStoreUnavailable,
    UpstreamInvalid,
    UpstreamTimeout,
)
from broker.models import Connection, RefreshAttempt, RefreshJournal, Revocation, RevocationResult
from broker.refresh import Lane, after_refresh

AT_ONCE = 10
PAGE = 200
PASS_SECONDS = 5.0
CLAIM_SECONDS = 180.0  # longer than one takes: waiting for a refresh under way, the provider, the vault
RETRY_SECONDS = (5.0, 15.0, 60.0, 180.0, 600.0)
MOST_ATTEMPTS = len(RETRY_SECONDS) + 1
OUTAGE_SECONDS = 15.0  # between looks at an integration while our own stores do not answer
OURS = (SecretStoreUnavailable, DatabaseUnavailable, AuditUnavailable)
ENDED: frozenset[Revoked] = frozenset({"revoked", "unsupported", "skipped_shared_grant"})
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Due:
    """A connection to end. ``attempts``: this one too; ``known``: what the provider said already, before a crash.

    ``always``: whoever deletes the connection meanwhile cannot keep it from being revoked.
    """

    revocation_id: str
    connection_id: str
    integration: str
    always: bool
    attempts: int = 0
    known: Revoked | None = None


@dataclass(frozen=True, slots=True)
class _Ended:
    """What one came to. ``again``: it did not work, for this reason, and is tried again."""

    result: Revoked | None
    detail: str | None = None

    @property
    def again(self) -> bool:
        return self.result is None


class Ending:
    """Ends connections; one a process. Any number of processes may work on the same revocation."""

    def __init__(self, database: Database, credentials: Credentials, audit: Audit, *, per_minute: int) -> None:
        """Keep the parts. ``per_minute``: how many this process begins for one integration in a minute."""
        self._database = database
        self._credentials = credentials
        self._audit = audit
        self._budget = RateLimitItemPerMinute(per_minute)
        self._windows = MovingWindowRateLimiter(MemoryStorage())
        self._lanes: dict[str, Lane] = {}
        self._positions: dict[str, str] = {}  # where each revocation's next page begins

    async def some(self, revocation: Revocation) -> int:
        """End the connections of the next page that are due; return how many were tried. One that fails stops no other.

        None is begun after ``PASS_SECONDS``: whoever calls may be about to stop; nor after our own stores did not answer.
        """
        due, end_at = await self._page(revocation), time.monotonic() + PASS_SECONDS
        waiting, tried = [one for one in due if self._rested(one.integration)], 0

        async def take() -> None:
            nonlocal tried
            while waiting and time.monotonic() < end_at:
                one = waiting.pop(0)
                if self._rested(one.integration) and self._windows.hit(self._budget, one.integration):
                    tried += 1
                    if not await self._tried(one):
                        waiting.clear()

        await asyncio.gather(*(take() for _ in range(AT_ONCE)))
        return tried

    async def _page(self, revocation: Revocation) -> list[_Due]:
        """Return what is due of the next page of those that are not through; behind the last one it begins anew."""
        revocation_id, always = revocation.id, revocation.action == "revoke"
        after = self._positions.get(revocation_id, "")
        mine = (
            col(RevocationResult.revocation_id) == revocation_id,
            col(RevocationResult.result) == "pending",
            col(RevocationResult.at).is_not(None),  # the audit knows that it was stopped
        )
        joined = sa.outerjoin(RevocationResult, Connection, col(Connection.id) == col(RevocationResult.connection_id))
        columns = (
            col(RevocationResult.connection_id),
            col(RevocationResult.not_before_at),
            col(Connection.integration),
        )
        query = sa.select(*columns).select_from(joined).where(*mine, col(RevocationResult.connection_id) > after)
        query = query.order_by(col(RevocationResult.connection_id)).limit(PAGE)
        rows, at = await self._database.read(lambda session: (session.execute(query).all(), now(session)))
        self._positions[revocation_id] = rows[-1][0] if len(rows) == PAGE else ""
        due = [(found, name or "") for found, not_before, name in rows if (not_before or 0.0) <= at]
        return [_Due(revocation_id, found, name, always) for found, name in due]

    def _rested(self, integration: str) -> bool:
        return self._lanes.get(integration, Lane()).rest_until <= time.monotonic()

    async def _tried(self, due: _Due) -> bool:
        """End one, unless another process has it; False when our own stores do not answer."""
        try:
            claimed = await self._database.transaction(lambda session: _claimed(session, due))
            if claimed is not None:
                await self._end(claimed)
        except OURS as error:  # where nothing could be written the claim ends by itself
            rests = self._lanes.get(due.integration, Lane())
            self._lanes[due.integration] = replace(rests, rest_until=time.monotonic() + OUTAGE_SECONDS)
            log.warning("revocation.put_off", connection_id=due.connection_id, code=error.code)
            return False
        except BrokerError as error:
            log.warning("revocation.not_recorded", connection_id=due.connection_id, code=error.code)
        except Exception:
            log.exception("revocation.defect", connection_id=due.connection_id)
        return True

    async def _end(self, due: _Due) -> None:
        try:
            async with self._credentials.holding(due.connection_id) as claimed:
                ended = await self._ended(due, claimed.row)
                if claimed.row.deleted_at is None:
                    await self._record(due, ended, claimed.lease)
                    return
            await self._remove(due, ended)
        except NotFound:
            await self._record(due, _Ended(due.known or "skipped", None if due.known else "gone"))
        except LeaseLost:
            raise
        except BrokerError as error:
            if _is_outage(error):
                await self._database.transaction(lambda session: _put_off_uncounted(session, due))
                raise
            await self._record(due, _Ended(None, error.code))

    async def _remove(self, due: _Due, ended: _Ended) -> None:
        """Remove a deleted row and its secret, unless its provider is asked again."""
        if not ended.again or due.attempts >= MOST_ATTEMPTS:
            await self._credentials.dispose(due.connection_id, known=ended.result or "failed")
        await self._record(due, ended)

    async def _ended(self, due: _Due, row: Connection) -> _Ended:
        """Revoke at the provider and destroy the secret, under the connection's lease."""
        if row.deleted_at is None and row.status != "revoked":
            return _Ended("skipped", "in_use_again")
        if row.secret_version <= 0:
            return _Ended(due.known or "skipped", None if due.known else "destroyed_already")
        if row.deleted_at is not None and not (row.revoke_on_delete or due.always):
            return _Ended("skipped")
        ended = _Ended(due.known) if due.known else await self._asked(row)
        if ended.again:
            return ended
        if due.known is None:
            await self._database.transaction(lambda session: _note(session, due, ended.result))
        await self._credentials.destroy(row.id)
        return ended

    async def _asked(self, row: Connection) -> _Ended:
        """Revoke at the provider; what does not work is tried again, but an outage of our own stores is raised."""
        try:
            result = await self._at_provider(row)
        except BrokerError as error:
            if _is_outage(error):
                raise
            return _Ended(None, error.code)
        except Exception:
            log.exception("revocation.defect", connection_id=row.id)
            return _Ended(None, "internal_error")
        return _Ended(result) if result in ENDED else _Ended(None, "not_confirmed")

    async def _at_provider(self, row: Connection) -> Revoked:
        try:
            result = await self._credentials.revoke_at_provider(row)
        except NotFound:
            raise ProviderUnavailable("the integration is gone") from None
        except (ProviderUnavailable, UpstreamInvalid, UpstreamTimeout) as error:
            self._note_lane(row.integration, failed=True, pause_seconds=getattr(error, "pause_seconds", None))
            raise
        self._note_lane(row.integration, failed=result == "failed")
        return result

    def _note_lane(self, integration: str, *, failed: bool, pause_seconds: float | None = None) -> None:
        self._lanes[integration] = after_refresh(
            self._lanes.get(integration, Lane()),
            failed=failed,
            pause_seconds=pause_seconds,
            now=time.monotonic(),
            random_share=random.random(),  # noqa: S311 - spreading, not secrecy
        )

    async def _record(self, due: _Due, ended: _Ended, lease: Lease | None = None) -> None:
        if ended.again and due.attempts < MOST_ATTEMPTS:
            await self._database.transaction(lambda session: _put_off(session, due))
            return
        result = ended.result or "failed"

        def work(session: Session) -> None:
            if lease is not None:
                require_lease(session, lease)
            row = session.get(Connection, due.connection_id, with_for_update=True)
            if row is not None and row.status == "revoked" and result in ENDED:
                _empty(session, row)
            if _finished(session, due, result, ended.detail):
                self._audit.append(session, _entry(due, row, result, ended.detail))

        await self._database.transaction(work)


def _is_outage(error: BrokerError) -> bool:
    """Whether our own stores do not answer: no try of a provider's."""
    return isinstance(error, OURS) and not isinstance(error, SecretLost)


def _mine(due: _Due) -> Sequence[sa.ColumnElement[bool]]:
    same = (col(RevocationResult.revocation_id) == due.revocation_id, col(RevocationResult.result) == "pending")
    return (*same, col(RevocationResult.connection_id) == due.connection_id)


def _claimed(session: Session, due: _Due) -> _Due | None:
    """Take one for ``CLAIM_SECONDS``; None when another process has it, or it is through."""
    at = now(session)
    not_before = col(RevocationResult.not_before_at)
    claim = sa.update(RevocationResult).where(*_mine(due), not_before.is_(None) | (not_before <= at))
    claim = claim.values(not_before_at=at + CLAIM_SECONDS)
    found = session.execute(claim.returning(col(RevocationResult.attempts), col(RevocationResult.detail))).first()
    if found is None:
        return None
    known: Revoked | None = next((one for one in ENDED if one == found.detail), None)
    return replace(due, attempts=found.attempts + 1, known=known)


def _note(session: Session, due: _Due, result: str | None) -> None:
    session.execute(sa.update(RevocationResult).where(*_mine(due)).values(detail=result))


def _put_off(session: Session, due: _Due) -> None:
    again_at = now(session) + RETRY_SECONDS[due.attempts - 1]
    put_off = {"not_before_at": again_at, "attempts": due.attempts}
    session.execute(sa.update(RevocationResult).where(*_mine(due)).values(**put_off))


def _put_off_uncounted(session: Session, due: _Due) -> None:
    again_at = now(session) + OUTAGE_SECONDS
    session.execute(sa.update(RevocationResult).where(*_mine(due)).values(not_before_at=again_at))


def _empty(session: Session, row: Connection) -> None:
    """Say on the row that there is no secret any more; what a refresh left beside it goes too."""
    row.secret_version, row.refreshable = destroyed_version(row.secret_version), False
    row.token_expires_at = row.refresh_expires_at = row.refresh_not_before_at = None
    for table in (RefreshAttempt, RefreshJournal):
        session.execute(sa.delete(table).where(col(table.connection_id) == row.id))
    session.flush()


def _finished(session: Session, due: _Due, result: str, detail: str | None) -> bool:
    """Write the result and count it; False when somebody else has done so."""
    at = now(session)
    said = {"result": result, "detail": detail, "attempts": due.attempts, "not_before_at": None, "at": at}
    write = sa.update(RevocationResult).where(*_mine(due)).values(**said)
    if session.execute(write).rowcount != 1:  # type: ignore[attr-defined]
        return False
    counted = {"done": Revocation.done + 1, "failed": Revocation.failed + (1 if result == "failed" else 0)}
    session.execute(sa.update(Revocation).where(col(Revocation.id) == due.revocation_id).values(**counted))
    return True


def _entry(due: _Due, row: Connection | None, result: str, detail: str | None) -> Entry:
    said = {"revocation_id": due.revocation_id, "result": result, "attempts": due.attempts}
    return Entry(
        action="connection.revocation",
        actor="worker",
        outcome="failed" if result == "failed" else "ok",
        connection_id=due.connection_id,
        integration=due.integration or None,
        subject=row.subject if row is not None else None,
        detail=said if detail is None else {**said, "reason": detail},
    )
