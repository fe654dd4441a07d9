"""Events as they come: one look at the newest number serves every stream of a process, which each go at their reader's pace.

A stream is no queue but a position: the number of the last event that it sent. What is new is read once for all; one that is
behind what is kept of that, because it resumes or its reader is slow, reads pages of its own until it has caught up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col

from broker.database import Database
from broker.errors import BrokerError, Overloaded, RateLimited
from broker.limits import waiting_elsewhere
from broker.models import WebhookState
from broker.policy import Principal
from broker.webhooks.history import EVENT_QUERY, EVENTS, Event, EventFilter, may_see

POLL_SECONDS: Final = 0.5
RECHECK_SECONDS: Final = 1.0
KEEP_ALIVE_SECONDS: Final = 15.0
KEPT: Final = 1_000
PAGE: Final = 200
MOST_STREAMS: Final = 200
MOST_OF_A_CALLER: Final = 10
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads a stream; ``recheck`` finds out anew who they are (Unauthenticated when their key is dead)."""

    principal: Principal
    recheck: Callable[[], Awaitable[Principal]]


class EventFeed:
    """Streams of events for one process. Looks at the database only while there is a stream; one event loop."""

    def __init__(
        self, database: Database, *, keep_alive_seconds: float = KEEP_ALIVE_SECONDS, most_streams: int = MOST_STREAMS
    ) -> None:
        """Keep the parts; nothing runs yet."""
        self._database = database
        self._keep_alive_seconds = keep_alive_seconds
        self._most_streams = most_streams
        self._streams: Counter[str] = Counter()  # by caller
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._from = self._newest = -1  # what is kept is all in (from, newest]; -1: not looked yet
        self._news = asyncio.Event()
        self._look = asyncio.Event()
        self._polling: asyncio.Task[None] | None = None
        self._stopped = False

    def wake(self) -> None:
        """Look at once: this process has just committed events. Costs nothing without a stream; call it on the loop."""
        self._look.set()

    def stop(self) -> None:
        """End all streams soon, for good: their readers go on at another process, from the last event that they have."""
        self._stopped = True
        self._tell()

    async def aclose(self) -> None:
        """End, and look no more."""
        self.stop()
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait({self._polling})

    async def position_of(self, event_id: str) -> int:
        """Return the number of the last event that a reader has; 0, the oldest that is kept, for one that is gone.

        What is gone was among the oldest, so nothing is left out that way.
        """
        query = sa.select(EVENTS.c.number).where(EVENTS.c.id == event_id)
        return int(await self._database.read(lambda session: session.execute(query).scalar_one_or_none()) or 0)

    async def newest(self) -> int:
        """Return the newest number."""
        return await self._database.read(_newest)

    async def follow(self, wanted: EventFilter, after: int, reader: Reader) -> AsyncGenerator[Event | None]:
        """Yield the events behind ``after`` that fit and that the reader may see, in the order of their numbers.

        None: nothing came for ``KEEP_ALIVE_SECONDS``, and once at the beginning. Ends when the reader's key is dead, when what
        it may has changed, when the database is away, and at ``stop``: whoever comes back with the last event misses nothing.
        Raises before the first event RateLimited for a caller with too many streams, Overloaded where the process has.
        """
        with self._place(reader.principal.caller_id), waiting_elsewhere():
            yield None
            checked, sent = time.monotonic(), time.monotonic()
            while not self._stopped:
                rows, after = await self._after(after)
                for row in (*rows, None):
                    if time.monotonic() - checked >= RECHECK_SECONDS:
                        checked = time.monotonic()
                        if not await _is_same(reader):
                            return
                    if row is not None and wanted.fits(row) and _fits(wanted, row) and may_see(reader.principal, row):
                        yield row
                        sent = time.monotonic()
                if time.monotonic() - sent >= self._keep_alive_seconds:
                    yield None
                    sent = time.monotonic()
                if not rows and after >= self._newest:
                    await self._wait(min(RECHECK_SECONDS, self._keep_alive_seconds))

    @contextlib.contextmanager
    def _place(self, caller_id: str) -> Iterator[None]:
        if self._stopped or self._streams.total() >= self._most_streams:
            raise Overloaded
        if self._streams[caller_id] >= MOST_OF_A_CALLER:
            raise RateLimited(f"a caller may have {MOST_OF_A_CALLER} streams open in a process")
        self._streams[caller_id] += 1
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        try:
            yield
        finally:
            self._streams[caller_id] -= 1
            if not self._streams[caller_id]:
                del self._streams[caller_id]

    async def _after(self, number: int) -> tuple[Sequence[Event], int]:
        """Return (the next events, what was looked at): out of what is kept, else from the database."""
        if 0 <= self._from <= number:
            return [row for row in self._kept if (row.number or 0) > number], max(number, self._newest)
        try:
            return await self._database.read_aside(lambda session: _read(session, number))
        except BrokerError:
            self._look.set()
            await asyncio.sleep(POLL_SECONDS)
            return (), number

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _poll(self) -> None:
        """Keep up with the newest events until the last stream has ended."""
        self._kept.clear()
        self._from = self._newest = -1
        while self._streams and not self._stopped:
            self._look.clear()
            try:
                await self._keep_up()
            except BrokerError as error:
                log.warning("events.not_read", code=error.code)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), POLL_SECONDS)

    async def _keep_up(self) -> None:
        newest = await self.newest()
        if self._newest < 0:
            self._from = self._newest = newest
            self._tell()
        while self._newest < newest:
            rows, reached = await self._database.read(lambda session: _read(session, self._newest, newest))
            if len(self._kept) + len(rows) > KEPT:
                dropped = self._kept[len(self._kept) + len(rows) - KEPT - 1]
                self._from = dropped.number or self._from
            self._kept.extend(rows)
            self._newest = reached
            self._tell()


async def _is_same(reader: Reader) -> bool:
    """Whether the reader is still who it was, and may what it might."""
    try:
        return await reader.recheck() == reader.principal
    except BrokerError:
        return False


def _fits(wanted: EventFilter, row: Event) -> bool:
    return wanted.source_id in {None, row.source_id} and wanted.connection_id in {None, row.connection_id}


def _newest(session: Session) -> int:
    return int(session.execute(sa.select(col(WebhookState.number))).scalar_one())


def _read(session: Session, after: int, newest: int | None = None) -> tuple[Sequence[Event], int]:
    """Return (a page of events, the number that it reaches). The newest number is read first: see ``History.events_after``."""
    newest = _newest(session) if newest is None else newest
    query = EVENT_QUERY.where(EVENTS.c.number > after, EVENTS.c.number <= newest)
    rows = [Event(*row) for row in session.execute(query.order_by(EVENTS.c.number).limit(PAGE))]
    return rows, max(newest, after) if len(rows) < PAGE else rows[-1].number or after
