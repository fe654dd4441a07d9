"""Who may write a connection's secret now: claim its lease, wait for another's, hold it, and settle what a crash left."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable

import structlog
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

from broker.credentials.journal import Journal
from broker.credentials.leases import Claimed, Lease, LeaseLost, Seen, release_lease, take_lease
from broker.credentials.outcomes import Outcomes
from broker.credentials.watching import Turns, Watching
from broker.database import Database, now
from broker.errors import BrokerError, DatabaseUnavailable, NotFound, UpstreamTimeout
from broker.models import Connection, RefreshAttempt, RefreshJournal
from broker.refresh import Failure, Verdict

REFRESHES_AT_ONCE = (
    50  # of one integration: as many as egress sends to one host, so none waits there with its time running
)
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
        monotonic: Callable[[], float],
    ) -> None:
        """Keep the parts; seconds and clock are those of ``Credentials``."""
        self._database = database
        self._outcomes = outcomes
        self._journal = journal
        self._lease_seconds = lease_seconds
        self._wait_seconds = wait_seconds
        self._monotonic = monotonic
        self._owner = secrets.token_hex(8)  # names this process in leases
        self._watching = Watching(database)
        self._turns = Turns(REFRESHES_AT_ONCE)
        self._turn_of: dict[Lease, str] = {}  # whose turn ends with the lease
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
        """Give the lease back at the end of the block, and the turn that it was claimed in."""
        try:
            yield
        finally:
            try:
                with contextlib.suppress(BrokerError):  # it ends by itself then
                    await self._database.transaction(lambda session: release_lease(session, lease))
            finally:
                self._end_turn(lease)

    async def claim_or_follow(self, connection_id: str, seen_version: int, deadline: float) -> Claimed | None:
        """Return the lease, or None once another holder has written a newer version or ended the connection.

        Raises UpstreamTimeout at the ``deadline`` (monotonic), and at once when this process stops; NotFound.
        """
        seen = await self._watching.look(connection_id)
        while True:
            if seen is None:
                raise NotFound
            if _moved(seen, seen_version):
                return None
            claimed = await self._claimed_in_turn(connection_id, seen, seen_version, deadline) if seen.free else None
            if claimed is not None:
                return claimed
            self._require_patience(deadline)
            seen = await self._watching.look_again(connection_id)

    async def _claimed_in_turn(
        self, connection_id: str, seen: Seen, seen_version: int, deadline: float
    ) -> Claimed | None:
        """Claim when it is this refresh's turn; what changed while it waited is found out without a claim.

        The turn is held until the lease is ``released``, or given back at once if there is none.
        """
        claimed = None
        waited = await self._turns.take(seen.integration)
        try:
            self._require_patience(deadline)
            now_seen = await self._watching.look(connection_id) if waited else seen
            if now_seen is not None and now_seen.free and not _moved(now_seen, seen_version):
                claimed = await self.claim(connection_id)
        finally:
            if claimed is None:
                self._turns.give_back(seen.integration)
            else:
                self._turn_of[claimed.lease] = seen.integration
        return claimed

    def _end_turn(self, lease: Lease) -> None:
        integration = self._turn_of.pop(lease, None)
        if integration is not None:
            self._turns.give_back(integration)

    @contextlib.asynccontextmanager
    async def holding(self, connection_id: str) -> AsyncIterator[Claimed]:
        """Hold the lease for a block, with what a crash left settled. See ``Credentials.holding``."""
        deadline = self._monotonic() + self._wait_seconds
        while (claimed := await self.claim(connection_id)) is None:
            self._require_patience(deadline)
            await self._watching.look_again(connection_id)
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

    def _require_patience(self, deadline: float) -> None:
        """Raise UpstreamTimeout after the ``deadline`` (monotonic), and at once when this process stops."""
        if self._closing or self._monotonic() > deadline:
            raise UpstreamTimeout("another process is still refreshing this connection")

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


def _moved(seen: Seen, seen_version: int) -> bool:
    return seen.secret_version != seen_version or seen.status != "active"
