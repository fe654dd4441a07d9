"""The bounded log of requests that proved nothing: grouped in memory, written once a second at most, the newest kept.

Nothing of a request is kept but what it was counted as: the step that failed, its method, its size, and where it came from.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col

from broker.database import Database, now
from broker.errors import BrokerError
from broker.models import WebhookRejection
from broker.telemetry import METHODS, Metrics

EVERY_SECONDS: Final = 1.0
MOST_WAITING: Final = 200  # kinds of rejections in a second; what is beyond them is counted by the metric alone
KEPT_ROWS: Final = 1_000  # of a source
log = structlog.get_logger()


class Rejected(NamedTuple):
    """What rejections are grouped by. ``address``: as it is limited, so a whole network of IPv6 is one."""

    source_id: str
    step: str
    method: str
    address: str | None


@dataclass(slots=True)
class _Tally:
    """``at``: when the last one came (monotonic). ``size``: of the largest body."""

    count: int
    size: int
    at: float


class Rejections:
    """One for a process. It may lose what it holds when the process is killed, or the database is gone for long."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        """Begin with nothing noted."""
        self._database = database
        self._metrics = metrics
        self._noted: dict[Rejected, _Tally] = {}
        self._writing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def note(self, rejected: Rejected, size: int = 0) -> None:
        """Count a rejected request; in an event loop. The source must be one that there is: a stranger's ids fill nothing."""
        self._metrics.webhook_rejected(rejected.source_id, rejected.step)
        if rejected.method not in METHODS:
            rejected = rejected._replace(method="other")
        tally = self._noted.get(rejected)
        if tally is None and len(self._noted) >= MOST_WAITING:
            return
        count, largest = (0, 0) if tally is None else (tally.count, tally.size)
        self._noted[rejected] = _Tally(count + 1, max(largest, size), time.monotonic())
        if self._writing is None or self._writing.done():
            # A context of its own: what is logged belongs to no request.
            self._writing = asyncio.create_task(self._write(), context=contextvars.Context())

    async def _write(self) -> None:
        while self._noted:
            noted, self._noted = self._noted, {}
            try:
                await self._database.transaction(partial(_insert, noted=noted))
            except BrokerError as error:
                log.warning("webhook.rejections_lost", count=sum(one.count for one in noted.values()), code=error.code)
            await self._pause()

    async def _pause(self) -> None:
        """Wait, so that the rejections of a second are written together."""
        try:
            async with asyncio.timeout(EVERY_SECONDS):
                await self._closing.wait()
        except TimeoutError:
            return

    async def aclose(self) -> None:
        """Write what is noted, then return."""
        self._closing.set()
        if self._writing is not None:
            await asyncio.wait({self._writing})


def _insert(session: Session, noted: Mapping[Rejected, _Tally]) -> None:
    """Write the tallies, and keep of each source no more than its newest rows."""
    at, here = now(session), time.monotonic()
    rows: list[dict[str, Any]] = [
        {**rejected._asdict(), "at": at - (here - tally.at), "size": tally.size, "count": tally.count}
        for rejected, tally in noted.items()
    ]
    session.execute(sa.insert(WebhookRejection), rows)
    for source_id in sorted({rejected.source_id for rejected in noted}):
        newest = sa.select(col(WebhookRejection.id)).where(col(WebhookRejection.source_id) == source_id)
        oldest_kept = newest.order_by(col(WebhookRejection.id).desc()).offset(KEPT_ROWS - 1).limit(1).scalar_subquery()
        session.execute(
            sa.delete(WebhookRejection).where(
                col(WebhookRejection.source_id) == source_id, col(WebhookRejection.id) < oldest_kept
            ),
            execution_options={"synchronize_session": False},
        )
