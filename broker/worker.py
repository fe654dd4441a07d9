"""What happens without a request: refresh what expires, finish what a crash cut off, sweep, write checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col

from broker.audit import Audit
from broker.credentials import Credentials, LeaseLost
from broker.database import Database, now
from broker.errors import BrokerError
from broker.models import BrowserSession, Connection, Flow, IdempotentAnswer, IntegrationLog
from broker.oauth.confirm import Confirmations

DAY_SECONDS = 86_400.0
AT_ONCE = 10
log = structlog.get_logger()


class Worker:
    """Runs the background jobs until stopped. Any number may run, on any replica: claims decide who acts."""

    def __init__(
        self, database: Database, credentials: Credentials, confirmations: Confirmations, audit: Audit
    ) -> None:
        """Keep the parts."""
        self._database = database
        self._credentials = credentials
        self._confirmations = confirmations
        self._audit = audit
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Run every job at its pace until ``stop``; a job that fails is logged and tried again."""
        jobs: list[tuple[float, Callable[[], Awaitable[object]]]] = [
            (1.0, self._confirmations.sweep),
            (2.0, self.refresh_due),
            (5.0, self.finish_cut_off),
            (5.0, self._audit.checkpoint),
            (60.0, self.forget_old),
            (3600.0, self._credentials.sweep_unreferenced),
        ]
        await asyncio.gather(*(self._repeat(seconds, job) for seconds, job in jobs))

    def stop(self) -> None:
        """End after the jobs that are under way."""
        self._stopping.set()

    async def _repeat(self, seconds: float, job: Callable[[], Awaitable[object]]) -> None:
        while not self._stopping.is_set():
            try:
                await job()
            except BrokerError as error:
                log.warning("worker.failed", job=getattr(job, "__name__", "job"), code=error.code)
            except Exception:
                log.exception("worker.defect", job=getattr(job, "__name__", "job"))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)

    async def refresh_due(self) -> int:
        """Refresh what is due, a few at once; return how many were tried."""
        rows = await self._credentials.due(limit=100)
        gate = asyncio.Semaphore(AT_ONCE)
        await asyncio.gather(*(self._refresh(row, gate) for row in rows))
        return len(rows)

    async def _refresh(self, row: Connection, gate: asyncio.Semaphore) -> None:
        async with gate:
            with contextlib.suppress(BrokerError, LeaseLost):  # the row and the log say what happened
                await self._credentials.refresh(row)

    async def finish_cut_off(self) -> None:
        """Replay journals and finish deletions that a crash left behind."""
        for connection_id in await self._credentials.unsettled():
            await self._credentials.settle(connection_id)
        for connection_id in await self._credentials.left_behind(older_than_seconds=60.0):
            with contextlib.suppress(BrokerError):
                await self._credentials.dispose(connection_id)

    async def forget_old(self) -> None:
        """Delete rows that serve nobody any more; flow outcomes lose their sealed contents first."""

        def work(session: Session) -> None:
            at = now(session)
            session.execute(
                sa.update(Flow)
                .where(col(Flow.outcome_until) < at, col(Flow.sealed_outcome).is_not(None))
                .values(sealed_outcome=None)
            )
            pending = sa.select(col(Connection.flow_id)).where(col(Connection.status) == "pending")
            session.execute(
                sa.delete(Flow).where(col(Flow.expires_at) < at - DAY_SECONDS, col(Flow.id).not_in(pending))
            )
            session.execute(sa.delete(BrowserSession).where(col(BrowserSession.expires_at) < at - DAY_SECONDS))
            session.execute(sa.delete(IdempotentAnswer).where(col(IdempotentAnswer.created_at) < at - DAY_SECONDS))
            session.execute(sa.delete(IntegrationLog).where(col(IntegrationLog.at) < at - 7 * DAY_SECONDS))

        await self._database.transaction(work)
