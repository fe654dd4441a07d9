"""Refreshing without a request: a lane for each integration, so that one provider's trouble slows down nobody else's.

A lane refreshes what is due in the order of expiry, a few at once and within a budget per minute. It rests when its provider
asks for it (``Retry-After``) and after failures in a row to answer, ever longer and with jitter; then one refresh, of any
connection, tries whether the trouble is over before the others follow. A refusal is no trouble of the lane: what a single
connection has to wait for stands in its own row.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass

import structlog
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from broker.credentials import Backlog, Credentials
from broker.errors import BrokerError, Conflict, NotFound, SecretStoreUnavailable
from broker.models import Connection
from broker.refresh import Lane, after_refresh
from broker.telemetry import Metrics

AT_ONCE = 10
PAGE = 100
REST_SECONDS = 300.0
IDLE_EVERY_SECONDS = 600.0
REMEMBERED_SECONDS = 3600.0
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Round:
    """One lane's work: which integration, and whether it is for refresh tokens that would die of idleness."""

    integration: str
    idle: bool


class BackgroundRefresh:
    """Refreshes what is due. Any number may run, on any replica: leases decide who acts, each counts its own budget."""

    def __init__(self, credentials: Credentials, metrics: Metrics, *, per_minute: int) -> None:
        """Keep the parts. ``per_minute``: how many refreshes this process begins for one integration in a minute."""
        self._credentials = credentials
        self._metrics = metrics
        self._budget = RateLimitItemPerMinute(per_minute)
        self._windows = MovingWindowRateLimiter(MemoryStorage())
        self._lanes: dict[str, Lane] = {}
        self._running: dict[str, asyncio.Task[int]] = {}
        self._resting: dict[str, float] = {}  # connections that nothing can be done for, until when (monotonic)
        self._shown: set[str] = set()  # providers whose backlog was shown last
        self._idle_at = 0.0
        self._stopping = asyncio.Event()

    async def begin(self) -> None:
        """Start a lane for each integration with something due and none running; do not wait for any."""
        await self._begin(idle=time.monotonic() >= self._idle_at)

    async def refresh_due(self) -> int:
        """Refresh all that is due, as far as lanes and budgets allow; return how many were tried."""
        await self._begin(idle=True)
        return sum(await asyncio.gather(*self._running.values()))

    def stop(self) -> None:
        """Begin nothing more; ``finish`` waits for what was begun."""
        self._stopping.set()

    async def finish(self) -> None:
        """Wait until no lane runs. A refresh that was sent goes on until ``Credentials.aclose``."""
        while self._running:
            await asyncio.wait(set(self._running.values()))

    async def _begin(self, *, idle: bool) -> None:
        if self._stopping.is_set():
            return
        backlog = await self._credentials.backlog()
        self._show(backlog)
        self._forget_rests({one.integration for one in backlog})
        rounds = [Round(one.integration, idle=False) for one in backlog]
        if idle:
            rounds += [Round(name, idle=True) for name in await self._credentials.idle_integrations()]
            self._idle_at = time.monotonic() + IDLE_EVERY_SECONDS
        for wanted in rounds:
            key = f"{wanted.integration}:idle" if wanted.idle else wanted.integration
            if key not in self._running and self._rested(wanted.integration):
                task = asyncio.create_task(self._run(wanted))
                self._running[key] = task
                task.add_done_callback(lambda done, key=key: self._ended(key, done))  # type: ignore[misc]

    def _ended(self, key: str, done: asyncio.Task[int]) -> None:
        self._running.pop(key, None)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("worker.failed", job="refresh", lane=key, exc_info=error)

    def _forget_rests(self, due: set[str]) -> None:
        """Forget the rests that are over, and lanes that have had nothing to do for an hour: integrations go."""
        at = time.monotonic()
        self._resting = {one: until for one, until in self._resting.items() if until > at}
        self._lanes = {
            name: lane
            for name, lane in self._lanes.items()
            if lane.rest_until > (at if not lane.failures else at - REMEMBERED_SECONDS)
            or (lane.failures and name in due)
        }

    def _show(self, backlog: list[Backlog]) -> None:
        """Tell the metrics how much is due and how late it is; a provider with nothing due any more shows zero."""
        found: dict[str, tuple[int, float]] = dict.fromkeys(self._shown, (0, 0.0))
        for one in backlog:
            count, late = found.get(one.provider, (0, 0.0))
            found[one.provider] = (count + one.count, max(late, one.late_seconds))
        for provider, (count, late) in found.items():
            self._metrics.refresh_backlog(provider, count, late)
        self._shown = {one.provider for one in backlog}

    # One lane

    def _rested(self, integration: str) -> bool:
        return self._lanes.get(integration, Lane()).rest_until <= time.monotonic()

    async def _run(self, wanted: Round) -> int:
        """Refresh page by page until nothing is due, the lane rests, or its budget is used up; return how many were tried."""
        tried, after = 0, None
        while not self._stopping.is_set():
            page = await self._credentials.due(wanted.integration, idle=wanted.idle, limit=PAGE, after=after)
            rows = [row for row in page if not self._rests(row.id)]
            went = await self._page(wanted.integration, rows)
            tried += went
            if len(page) < PAGE or went < len(rows):
                break
            after = (page[-1].token_expires_at or 0.0, page[-1].id)
        return tried

    async def _page(self, integration: str, rows: list[Connection]) -> int:
        """Refresh rows, a few at once, for as long as the lane may; return how many were begun."""
        waiting, begun = list(rows), 0

        async def take() -> None:
            nonlocal begun
            while waiting and self._may_go_on(integration):
                begun += 1
                await self._refresh(waiting.pop(0))

        if waiting and self._lanes.get(integration, Lane()).failures:  # is the trouble over? one finds out
            trying = waiting.pop(random.randrange(len(waiting)))  # noqa: S311 - any but always the same
            waiting, later = [trying], waiting
            await take()
            waiting = later if not self._lanes.get(integration, Lane()).failures else []
        await asyncio.gather(*(take() for _ in range(AT_ONCE)))
        return begun

    def _may_go_on(self, integration: str) -> bool:
        if self._stopping.is_set() or not self._rested(integration):
            return False
        return self._windows.hit(self._budget, integration)

    def _rests(self, connection_id: str) -> bool:
        until = self._resting.get(connection_id)
        if until is not None and until <= time.monotonic():
            del self._resting[connection_id]
        return connection_id in self._resting

    async def _refresh(self, row: Connection) -> None:
        """Refresh one; when the worker stops only the waiting ends: the refresh itself does not die with its callers."""
        refresh = asyncio.create_task(self._refreshed(row))
        stopped = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({refresh, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (refresh, stopped):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _refreshed(self, row: Connection) -> None:
        try:
            await self._credentials.refresh(row)
        except BrokerError as error:
            if error.provider_in_trouble is not None:
                self._note(row.integration, error if error.provider_in_trouble else None)
            elif error.code == "reauthorization_required":
                self._note(row.integration, None)  # the provider answers; it is this grant that is dead
            elif isinstance(error, (Conflict, NotFound, SecretStoreUnavailable)):
                # Moved endpoints, a missing integration, a secret that does not open: no wait on the row says so.
                self._resting[row.id] = time.monotonic() + REST_SECONDS
            # All else is ours or this connection's own: the row and the log say what happened.
        except Exception:
            log.exception("worker.defect", job="refresh", connection_id=row.id)
        else:
            self._note(row.integration, None)

    def _note(self, integration: str, trouble: BrokerError | None) -> None:
        lane = after_refresh(
            self._lanes.get(integration, Lane()),
            failed=trouble is not None,
            pause_seconds=getattr(trouble, "pause_seconds", None),
            now=time.monotonic(),
            random_share=random.random(),  # noqa: S311 - spreading, not secrecy
        )
        if lane.rest_until > time.monotonic() and lane != self._lanes.get(integration):
            seconds = round(lane.rest_until - time.monotonic(), 1)
            log.warning("refresh.lane_rests", integration=integration, failures=lane.failures, seconds=seconds)
        self._lanes[integration] = lane
        if lane == Lane():
            del self._lanes[integration]  # what is well needs no memory
