"""What proxied calls were: counted in memory, shown to Prometheus, and written for all processes every two seconds."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial

import structlog

from broker.activity import stored
from broker.activity.exposing import STATES, Exposition
from broker.activity.sampling import Sample
from broker.activity.stored import shown
from broker.activity.tallies import CallDone, Tally, percentile
from broker.database import Database
from broker.errors import BrokerError
from broker.models import CallLine
from broker.telemetry import Metrics

__all__ = ["Activity", "CallDone", "Tally", "percentile", "shown", "sweep"]

FLUSH_SECONDS = 2.0
LINES_AT_ONCE = 40
log = structlog.get_logger()


async def sweep(database: Database) -> None:
    """Delete rows that are too old or too many, and put old minutes together: for a worker, once a minute."""
    await database.transaction(stored.sweep)


def _no_breakers() -> Mapping[Hashable, str]:
    return {}


class Activity:
    """Counts what became of proxied calls. ``note`` costs some microseconds and never waits; one event loop.

    Figures are written ``FLUSH_SECONDS`` after the first call that they hold, and added to those of other processes: a
    crash loses that much, and a commit whose answer was lost may count twice. What belongs to an integration that is gone by
    then is not written. Lines are a sample: see ``Sample``. ``breaker_states`` are those of ``Breakers.states``, keyed
    (integration, host) or by a text that begins with the integration and a space. Integrations are names that an operator
    configured, so their number is not bounded here.
    """

    def __init__(
        self,
        database: Database,
        metrics: Metrics,
        *,
        breaker_states: Callable[[], Mapping[Hashable, str]] = _no_breakers,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Register the figures with ``metrics``, at zero."""
        self._database, self._breaker_states, self._clock = database, breaker_states, clock
        self._written: dict[str, Tally] = {}  # since the start, for Prometheus
        self._pending: dict[str, Tally] = {}
        self._running: dict[str, int] = {}
        self._sample = Sample()
        self._writing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        metrics.registry.register(Exposition(self._totals, lambda: self._running, self._worst_breakers))

    def entered(self, integration: str) -> None:
        """Count a call that is under way; each is followed by ``left``."""
        self._running[integration] = self._running.get(integration, 0) + 1

    def left(self, integration: str) -> None:
        """Count it as over, however it ended."""
        self._running[integration] -= 1

    def note(self, done: CallDone) -> None:
        """Remember a call that is over."""
        at = self._clock()
        tally = self._pending.get(done.integration)
        if tally is None:
            tally = self._pending[done.integration] = Tally()
        tally.add(done, at)
        self._sample.add(at, done)
        if self._writing is None or self._writing.done():
            # A context of its own: what is logged belongs to no request.
            self._writing = asyncio.create_task(self._write(), context=contextvars.Context())

    async def figures(self, integration: str, *, window_seconds: float) -> Tally:
        """Return the sums over all processes in the last ``window_seconds``, up to the last flush of each.

        ``last_at`` and ``rate_remaining`` are the last known ones, also from before the window.
        """
        return await self._database.read(lambda session: stored.figures(session, integration, window_seconds))

    async def lines(
        self,
        integration: str,
        *,
        limit: int,
        level: str | None = None,
        text: str | None = None,
        before: tuple[float, int] | None = None,
    ) -> list[CallLine]:
        """Return recent lines of all processes, newest first, by level and by a part of ``shown``, before (at, id)."""
        return await self._database.read(
            lambda session: stored.lines(session, integration, level=level, text=text, before=before, limit=limit)
        )

    def breaker_state(self, integration: str) -> str:
        """Return the worst state of the integration's breakers in this process; ``closed`` when it has none."""
        return self._worst_breakers().get(integration, "closed")

    async def aclose(self) -> None:
        """Write what is noted, then return; what cannot be written now is lost."""
        self._closing.set()
        if self._writing is not None:
            await asyncio.wait({self._writing})

    def _totals(self) -> Mapping[str, Tally]:
        found: dict[str, Tally] = {}
        for source in (self._written, self._pending):
            for name, tally in source.items():
                found.setdefault(name, Tally()).merge(tally)
        return found

    def _worst_breakers(self) -> dict[str, str]:
        worst: dict[str, str] = {}
        for key, state in self._breaker_states().items():
            name = str(key[0]) if isinstance(key, tuple) else str(key).partition(" ")[0]
            worst[name] = max(worst.get(name, "closed"), state, key=STATES.__getitem__)
        return worst

    async def _write(self) -> None:
        while self._pending:
            if not self._closing.is_set():
                await self._pause()
            await self._flush()
            if self._closing.is_set():
                return

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._closing.wait()
        except TimeoutError:
            return

    async def _flush(self) -> None:
        tallies, self._pending = self._pending, {}
        lines = self._sample.take()

        try:
            await self._database.transaction(lambda session: stored.add_figures(session, tallies))
        except BrokerError as error:
            log.warning("activity.not_written", calls=sum(one.calls for one in tallies.values()), error_code=error.code)
            self._take_back(tallies)  # the figures are tried again, the lines are not
        else:
            for name, tally in tallies.items():
                self._written.setdefault(name, Tally()).merge(tally)
            await self._write_lines(lines)

    async def _write_lines(self, lines: Sequence[tuple[float, CallDone]]) -> None:
        """Write them a few at a time: audit records wait behind each transaction, and calls for those."""
        for start in range(0, len(lines), LINES_AT_ONCE):
            some = lines[start : start + LINES_AT_ONCE]
            try:
                await self._database.transaction(partial(stored.add_lines, lines=some))
            except BrokerError as error:
                log.warning("activity.lines_not_written", lines=len(lines) - start, error_code=error.code)
                return

    def _take_back(self, tallies: Mapping[str, Tally]) -> None:
        for name, tally in tallies.items():
            newer = self._pending.get(name)
            if newer is not None:
                tally.merge(newer)
            self._pending[name] = tally
