"""What happens without a request: refresh what expires, finish what a crash cut off, sweep, write checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col

from broker.audit import Audit
from broker.background_refresh import BackgroundRefresh
from broker.credentials import Credentials
from broker.database import Database, now
from broker.errors import BrokerError
from broker.models import (
    BrowserSession,
    Connection,
    ConsoleSession,
    DeviceFlow,
    Flow,
    IdempotentAnswer,
    IntegrationLog,
)
from broker.oauth.confirm import Confirmations
from broker.oauth.device import DeviceFlows

DAY_SECONDS = 86_400.0
log = structlog.get_logger()

Job = tuple[float, Callable[[], Awaitable[object]]]


class Worker:
    """Runs the background jobs until stopped. Any number may run, on any replica: claims decide who acts."""

    def __init__(
        self,
        database: Database,
        credentials: Credentials,
        confirmations: Confirmations,
        device_flows: DeviceFlows,
        refreshing: BackgroundRefresh,
        audit: Audit,
        more: Sequence[Job] = (),
    ) -> None:
        """Keep the parts. ``more``: jobs of other parts, each of which bounds and claims its own work."""
        self.refreshing = refreshing
        self._database = database
        self._credentials = credentials
        self._confirmations = confirmations
        self._device_flows = device_flows
        self._audit = audit
        self._more = tuple(more)
        self._stopping = asyncio.Event()

    @property
    def jobs(self) -> Sequence[Job]:
        """Every job and its pace in seconds."""
        return (
            (1.0, self._confirmations.sweep),
            (1.0, self._device_flows.begin_polls),
            (2.0, self.refreshing.begin),
            (5.0, self.finish_cut_off),
            (5.0, self._audit.checkpoint),
            (60.0, self.forget_old),
            (600.0, self._audit.cut),
            (3600.0, self._credentials.sweep_unreferenced),
            *self._more,
        )

    async def run(self) -> None:
        """Run every job at its pace until ``stop``; a job that fails is logged and tried again."""
        await asyncio.gather(*(self._repeat(seconds, job) for seconds, job in self.jobs))
        await self._device_flows.finish()
        await self.refreshing.finish()

    def stop(self) -> None:
        """End soon: what is under way is finished, nothing else begun. Refreshes go on until ``Credentials.aclose``."""
        self._stopping.set()
        self.refreshing.stop()

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

    # After a crash

    async def finish_cut_off(self) -> None:
        """Replay journals and finish deletions that a crash left behind; one that fails does not stop the others."""
        for connection_id in await self._credentials.unsettled():
            await self._finish(connection_id, self._credentials.settle)
        for connection_id in await self._credentials.left_behind(older_than_seconds=60.0):
            await self._finish(connection_id, self._credentials.dispose)

    async def _finish(self, connection_id: str, act: Callable[[str], Awaitable[object]]) -> None:
        if self._stopping.is_set():
            return
        try:
            await act(connection_id)
        except BrokerError as error:
            log.warning("worker.failed", job=act.__name__, connection_id=connection_id, code=error.code)
        except Exception:
            log.exception("worker.defect", job=act.__name__, connection_id=connection_id)

    # Tidying

    async def forget_old(self) -> None:
        """Delete rows that serve nobody any more; flow outcomes lose their sealed contents first."""

        def work(session: Session) -> None:
            at = now(session)
            session.execute(
                sa.update(Flow)
                .where(col(Flow.outcome_until) < at, col(Flow.sealed_outcome).is_not(None))
                .values(sealed_outcome=None)
            )
            same = col(Connection.id) == col(Flow.connection_id)
            pending = sa.exists().where(same, col(Connection.status) == "pending")
            session.execute(sa.delete(Flow).where(col(Flow.expires_at) < at - DAY_SECONDS, ~pending))
            session.execute(sa.delete(DeviceFlow).where(col(DeviceFlow.expires_at) < at - DAY_SECONDS))
            session.execute(sa.delete(BrowserSession).where(col(BrowserSession.expires_at) < at - DAY_SECONDS))
            session.execute(sa.delete(ConsoleSession).where(col(ConsoleSession.expires_at) < at))
            session.execute(sa.delete(IdempotentAnswer).where(col(IdempotentAnswer.created_at) < at - DAY_SECONDS))
            session.execute(sa.delete(IntegrationLog).where(col(IntegrationLog.at) < at - 7 * DAY_SECONDS))

        await self._database.transaction(work)
