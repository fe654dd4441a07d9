"""Who may write a connection's secret now: claim its lease, wait for another's, hold it, and settle what a crash left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable

import structlog
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

from broker.credentials.journal import Journal
from broker.credentials.leases import Claimed, Lease, LeaseLost, release_lease, take_lease, watch
from broker.credentials.outcomes import Outcomes
from broker.database import Database, now
from broker.errors import BrokerError, DatabaseUnavailable, NotFound, UpstreamTimeout
from broker.models import Connection, RefreshAttempt, RefreshJournal
from broker.refresh import Failure, Verdict

LONGEST_PAUSE_SECONDS = 0.2
log = structlog.get_logger()


class Claims:
    """Claims leases in the name of this process."""

    def __init__(
        self,
        database: Database,
        outcomes: Outcomes,
        journal: Journal,
        *,
        lease_seconds: float,
        wait_seconds: float,
    ) -> None:
        """Keep the parts; the seconds are those of ``Credentials``."""
        self._database = database
        self._outcomes = outcomes
        self._journal = journal
        self._lease_seconds = lease_seconds
        self._wait_seconds = wait_seconds
        self._owner = secrets.token_hex(8)  # names this process in leases
        self._closing = False

    async def claim(self, connection_id: str) -> Claimed | None:
        """Take the lease if nobody holds it, and count an attempt that a crash cut off. See ``Credentials.claim``."""

        def work(session: Session) -> tuple[Claimed | None, Verdict | None]:
            at = now(session)
            lease = take_lease(session, connection_id, self._owner, at, self._lease_seconds)
            if lease is None:
                return None, None
            row = session.get(Connection, connection_id, with_for_update=True)
            if row is None:
                raise NotFound
            journal = session.get(RefreshJournal, connection_id)
            attempt = session.get(RefreshAttempt, connection_id)
            verdict = None
            if attempt is not None and journal is None:
                session.delete(attempt)
                verdict = self._outcomes.judge(session, row, Failure("unknown", "outcome_unknown"), at)
            session.flush()
            return Claimed(lease, row, journal, at), verdict

        try:
            claimed, verdict = await self._database.transaction(work)
        except IntegrityError:
            return None  # two first claims at once: the other one has it
        if claimed is not None and verdict is not None:
            self._outcomes.tell(claimed, verdict, cut_off=True)
        return claimed

    @contextlib.asynccontextmanager
    async def released(self, lease: Lease) -> AsyncIterator[None]:
        """Give the lease back at the end of the block."""
        try:
            yield
        finally:
            with contextlib.suppress(BrokerError):  # it ends by itself then
                await self._database.transaction(lambda session: release_lease(session, lease))

    async def claim_or_follow(self, connection_id: str, seen_version: int, deadline: float) -> Claimed | None:
        """Return the lease, or None once another holder has written a newer version or ended the connection.

        Raises UpstreamTimeout at the ``deadline`` (monotonic), and at once when this process stops; NotFound.
        """

        def moved(row: Connection) -> bool:
            return row.secret_version != seen_version or row.status != "active"

        while (claimed := await self.claim(connection_id)) is None:
            if await self._lease_ends(connection_id, deadline, moved):
                return None
        return claimed

    @contextlib.asynccontextmanager
    async def holding(self, connection_id: str) -> AsyncIterator[Claimed]:
        """Hold the lease for a block, with what a crash left settled. See ``Credentials.holding``."""
        deadline = time.monotonic() + self._wait_seconds
        while (claimed := await self.claim(connection_id)) is None:
            await self._lease_ends(connection_id, deadline, lambda _: False)
        async with self.released(claimed.lease):
            yield await self._settled(claimed)

    async def settle(self, connection_id: str) -> None:
        """Finish what a crash left of one connection. See ``Credentials.settle``."""
        with contextlib.suppress(NotFound, LeaseLost):
            claimed = await self.claim(connection_id)
            if claimed is None:
                return
            async with self.released(claimed.lease):
                await self._settled(claimed)

    def stop_waiting(self) -> None:
        """Let those who wait for another process's lease end at once, now and from now on."""
        self._closing = True

    async def _lease_ends(self, connection_id: str, deadline: float, enough: Callable[[Connection], bool]) -> bool:
        """Wait until the lease can be claimed (False), or the row is ``enough`` (True). Only reads, ever more seldom.

        Raises UpstreamTimeout at the ``deadline`` (monotonic), and at once when this process stops; NotFound.
        """
        pause_seconds = 0.01
        while True:
            if self._closing or time.monotonic() > deadline:
                raise UpstreamTimeout("another process is still refreshing this connection")
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311 - spreading, not secrecy
            pause_seconds = min(LONGEST_PAUSE_SECONDS, pause_seconds * 1.5)
            row, free = await self._database.read(lambda session: watch(session, connection_id))
            if row is None:
                raise NotFound
            if enough(row):
                return True
            if free:
                return False

    async def _settled(self, claimed: Claimed) -> Claimed:
        """Replay the journal, if there is one; what cannot be replayed is left as it is, unless the lease is at stake."""
        if claimed.journal is None:
            return claimed
        try:
            return await self._journal.replay(claimed, claimed.journal)
        except (LeaseLost, DatabaseUnavailable):
            raise
        except BrokerError as error:
            log.warning("refresh.not_settled", connection_id=claimed.row.id, code=error.code)
        return await self._journal.reread(claimed)
