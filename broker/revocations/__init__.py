"""Incident mode: freeze or revoke many connections at once, lift a freeze, and erase a person.

``Revocations`` is the face. Selecting and stopping is one transaction: from its commit on no hand-out begins on any replica,
and one under way looks at the row once more (``Connections.token``). What follows is done afterwards, by any process, resumed
after a crash: the audit's record of each connection (``stopping``), its end at the provider and in the vault (``ending``), the
last steps of an erasure (``erasing``). A freeze holds what becomes usable while it lasts too (``credentials.freezes``).
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.audit import Audit, Entry
from broker.credentials import Credentials
from broker.credentials.freezes import Selector, lock_freezes
from broker.database import Database, now
from broker.errors import BrokerError, Conflict, FieldError, InvalidRequest, NotFound
from broker.models import Revocation, RevocationResult, new_id
from broker.policy import Principal
from broker.revocations.ending import PASS_SECONDS, Ending
from broker.revocations.erasing import SETTLE_SECONDS, begin_erasure, forget_events, forget_name, names, take_stragglers
from broker.revocations.stopping import count_selected, lift_freeze, record_some, stop_selected

__all__ = ["Revocations", "Selector", "View"]

UNFINISHED = ("running", "lifting")
RECORD_PAUSE_SECONDS = 0.01  # in which hand-outs get at the audit
Position = tuple[float, str]
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class View:
    """A revocation and how many connections came to what."""

    row: Revocation
    counts: dict[str, int] = field(default_factory=dict)


class Revocations:
    """Stops, lifts, ends and erases. Methods may run at once on every replica."""

    def __init__(
        self,
        database: Database,
        credentials: Credentials,
        audit: Audit,
        *,
        per_minute: int,
        forget_secrets: Callable[[], None],
    ) -> None:
        """Keep the parts. ``per_minute``: how many ends this process begins at one integration's provider in a minute.

        ``forget_secrets`` drops the opened secrets that this process keeps; the others do so at their next heartbeat.
        """
        self._database = database
        self._audit = audit
        self._ending = Ending(database, credentials, audit, per_minute=per_minute)
        self._forget_secrets = forget_secrets
        self._recorded: set[str] = set()  # whose records are all written: not to be looked for again

    # Stopping and lifting

    async def count(self, action: str, selector: Selector) -> dict[str, int]:
        """Return how many connections would be stopped now, by integration; nothing is changed."""
        return await self._database.read(lambda session: count_selected(session, action, selector))

    async def start(self, action: str, selector: Selector, reason: str, principal: Principal) -> Revocation:
        """Stop what is selected, in one transaction; return the revocation. ``action``: freeze or revoke.

        Not checked here: that the caller may. Raises InvalidRequest for a reason with the subject's name, which the audit
        could never forget; DatabaseUnavailable, AuditUnavailable: then nothing was stopped.
        """
        if selector.subject is not None and names(reason, selector.subject):
            raise InvalidRequest(
                errors=[FieldError("/reason", "must not name the subject: the audit keeps it for ever")]
            )
        row = Revocation(
            id=new_id("rev"), action=action, selector=selector.stored(), reason=reason, created_by=principal.caller_id
        )

        def work(session: Session) -> None:
            stop_selected(session, row, selector)
            self._audit.append(session, self._started(row, selector))

        await self._database.transaction(work)
        self._forget_secrets()
        log.warning("revocation.started", revocation_id=row.id, action=action, total=row.total)
        return row

    def _started(self, row: Revocation, selector: Selector) -> Entry:
        """Return the record of a start. The selector is in it as a digest: who has the selector can prove that it was this."""
        given = json.dumps(row.selector, sort_keys=True)
        detail = {
            "revocation_id": row.id,
            "action": row.action,
            "selected_by": sorted(row.selector),
            "selector": self._audit.digest(given),
            "reason": row.reason,
            "total": row.total,
        }
        return Entry(
            action="revocation.started",
            actor=row.created_by or "system",
            integration=selector.integration,
            subject=selector.subject,
            detail=detail,
        )

    async def lift(self, revocation_id: str, principal: Principal) -> Revocation:
        """Lift a freeze: what it holds alone is what it was before; what another one holds too stays frozen.

        Raises NotFound, and Conflict for anything but a freeze in force.
        """
        _require_liftable(await self.get(revocation_id))
        await self._record_all(revocation_id)

        def work(session: Session) -> Revocation:
            lock_freezes(session, exclusive=True)
            row = session.get(Revocation, revocation_id, with_for_update=True, populate_existing=True)
            if row is None:
                raise NotFound
            _require_liftable(row)
            count = lift_freeze(session, row)
            row.state = "lifting"
            session.flush()
            self._audit.append(session, _lifted(row, principal, count))
            return row

        row = await self._database.transaction(work)
        self._recorded.discard(revocation_id)
        log.warning("revocation.lifted", revocation_id=revocation_id)
        return row

    async def erase(self, subject: str, principal: Principal, *, revoke: bool) -> Revocation:
        """Begin to erase a person: their connections are gone for everybody at once. Return the job, to be looked at.

        While one runs for this person, it takes in what came since and settles anew. ``revoke``: at the providers too. The
        name is gone from every row, but for callers' grants, once the job is done.
        """
        row = Revocation(
            id=new_id("rev"),
            action="erase",
            selector={"subject": subject, "revoke": revoke},
            reason="erasure",
            created_by=principal.caller_id,
        )

        def work(session: Session) -> Revocation:
            job = begin_erasure(session, row, subject)
            session.refresh(job)
            detail = {"revocation_id": job.id, "revoke": revoke, "total": job.total}
            entry = Entry(action="subject.erasing", actor=principal.caller_id, subject=subject, detail=detail)
            self._audit.append(session, entry)
            return job

        job = await self._database.transaction(work)
        self._forget_secrets()
        return job

    # Looking

    async def get(self, revocation_id: str) -> Revocation:
        """Return one (NotFound)."""
        row = await self._database.read(lambda session: session.get(Revocation, revocation_id))
        if row is None:
            raise NotFound
        return row

    async def view(self, revocation_id: str) -> View:
        """Return one with its counts (NotFound)."""
        result = col(RevocationResult.result)
        counted = sa.select(result, sa.func.count()).where(col(RevocationResult.revocation_id) == revocation_id)
        row = await self.get(revocation_id)
        found = await self._database.read(lambda session: session.execute(counted.group_by(result)).all())
        return View(row, {name: count for name, count in found})  # noqa: C416 - rows, no pairs

    async def page(self, *, limit: int, before: Position | None) -> list[Revocation]:
        """Return at most ``limit``, newest first, older than the position."""
        query = select(Revocation)
        if before is not None:
            query = query.where(sa.tuple_(col(Revocation.created_at), col(Revocation.id)) < before)
        query = query.order_by(col(Revocation.created_at).desc(), col(Revocation.id).desc()).limit(limit)
        return await self._database.read(lambda session: list(session.exec(query)))

    async def results(
        self, revocation_id: str, *, result: str | None, limit: int, after: str | None
    ) -> list[RevocationResult]:
        """Return at most ``limit`` results in the order of the connections' ids, behind ``after``."""
        query = select(RevocationResult).where(RevocationResult.revocation_id == revocation_id)
        if result is not None:
            query = query.where(RevocationResult.result == result)
        if after is not None:
            query = query.where(col(RevocationResult.connection_id) > after)
        query = query.order_by(col(RevocationResult.connection_id)).limit(limit)
        return await self._database.read(lambda session: list(session.exec(query)))

    # What follows, for the worker and the command line

    async def advance(self) -> int:
        """Do the next piece of all that is unfinished; return how many there are. One that fails stops no other."""
        query = select(Revocation).where(col(Revocation.state).in_(UNFINISHED)).order_by(col(Revocation.created_at))
        rows = await self._database.read(lambda session: list(session.exec(query)))
        for row in rows:
            try:
                await self.work_on(row)
            except BrokerError as error:
                log.warning("revocation.failed", revocation_id=row.id, code=error.code)
        return len(rows)

    async def work_on(self, row: Revocation) -> None:
        """Do the next piece of one: the records of all that were stopped, then a page of ends at the providers."""
        if row.action == "erase":
            await self._ending.some(row)
            if await self._forget_events(row):
                await self._finish_erasure(row)
            return
        await self._record_all(row.id, seconds=PASS_SECONDS)
        if row.action == "revoke":
            await self._ending.some(row)
        await self._finish(row)

    async def _record_all(self, revocation_id: str, *, seconds: float = math.inf) -> None:
        """Write the records that are missing, group by group, so that hand-outs come between; not after so long."""
        after: str | None = ""
        end_at = time.monotonic() + seconds
        while revocation_id not in self._recorded and after is not None and time.monotonic() < end_at:
            position = after
            after = await self._database.transaction(
                lambda session: record_some(session, self._audit, revocation_id, position)  # noqa: B023 - done by then
            )
            await asyncio.sleep(RECORD_PAUSE_SECONDS)

    async def _finish(self, row: Revocation) -> None:
        """Say that one is through, if it is."""
        ends = {"running": "done", "lifting": "lifted"}
        mine = (col(RevocationResult.revocation_id) == row.id,)
        unrecorded = sa.exists().where(*mine, col(RevocationResult.at).is_(None))
        waiting = sa.exists().where(*mine, col(RevocationResult.result) == "pending")

        def work(session: Session) -> bool:
            if session.execute(sa.select(unrecorded)).scalar_one():
                return False
            if not session.execute(sa.select(waiting)).scalar_one():
                same = (col(Revocation.id) == row.id, col(Revocation.state) == row.state)
                ended = {"state": ends[row.state], "ended_at": now(session)}
                session.execute(sa.update(Revocation).where(*same).values(**ended))
            return True

        if await self._database.transaction(work):
            self._recorded.add(row.id)

    async def _forget_events(self, row: Revocation) -> bool:
        """Delete the webhook events of a person, batch by batch; return whether none are left, False after so long."""
        subject, end_at = row.selector.get("subject"), time.monotonic() + PASS_SECONDS
        while subject is not None and time.monotonic() < end_at:
            if not await self._database.transaction(lambda session: forget_events(session, row, subject)):
                return True
            await asyncio.sleep(RECORD_PAUSE_SECONDS)  # in which those who take events in get at the database
        return False

    async def _finish_erasure(self, row: Revocation) -> None:
        """Take the last traces away and forget the name, once all that was under way at the beginning is over."""
        subject = row.selector.get("subject")
        waiting = sa.exists().where(
            col(RevocationResult.revocation_id) == row.id, col(RevocationResult.result) == "pending"
        )
        is_waiting, at = await self._database.read(
            lambda session: (session.execute(sa.select(waiting)).scalar_one(), now(session))
        )
        if subject is None or is_waiting or at < row.created_at + SETTLE_SECONDS:
            return
        if await self._database.transaction(lambda session: take_stragglers(session, row, subject)):
            return

        def work(session: Session) -> None:
            if forget_name(session, row):
                done = Entry(
                    action="subject.erased", actor="system", detail={"revocation_id": row.id, "total": row.total}
                )
                self._audit.append(session, done)

        await self._audit.erase(subject)
        await self._database.transaction(work)


def _require_liftable(row: Revocation) -> None:
    if row.action != "freeze":
        raise Conflict("only a freeze can be lifted")
    if row.state not in {"running", "done"}:
        raise Conflict("this freeze was lifted already")


def _lifted(row: Revocation, principal: Principal, count: int) -> Entry:
    return Entry(
        action="revocation.lifted",
        actor=principal.caller_id,
        integration=row.selector.get("integration"),
        subject=row.selector.get("subject"),
        detail={"revocation_id": row.id, "total": count},
    )
