"""Copies of the records in other sinks: each gets every record in order; one that fails costs a deadline, then catches up."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from broker.audit.records import BATCH, records_between
from broker.audit.sinks import DEADLINE_SECONDS, Place, Writer, line_of
from broker.audit.stored import parsed_row
from broker.database import Database
from broker.errors import BrokerError

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
MOST_STRETCHES = 10_000
log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Batch:
    """The records of one transaction: numbers ``first`` to ``last``, and the writes of the copies that are well."""

    first: int
    last: int
    lines: str
    writes: list[asyncio.Future[None]] = field(default_factory=list)


def batch_of(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Return the batch of these rows, of which there is at least one."""
    return Batch(rows[0]["number"], rows[-1]["number"], "".join(map(line_of, rows)))


class Copies:
    """The sinks besides the database. Use it from the event loop that made it, but ``deliver_soon`` from any thread.

    What a process has committed while one of them failed is read from the database again once it is well: a copy holds every
    record of this process at least once, those of other processes perhaps too, in the order of their numbers. What it lacks
    when the process ends is lost to it (an export has it).
    """

    def __init__(
        self,
        places: Sequence[Place],
        database: Database,
        *,
        on_failure: Callable[[], None],
        deadline_seconds: float = DEADLINE_SECONDS,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        """Keep the places. ``on_failure`` is called when one of them begins to fail."""
        self._loop = asyncio.get_running_loop()
        self._copies = [_Copy(place, database, on_failure, deadline_seconds, first_pause_seconds) for place in places]

    @property
    def failing(self) -> int:
        """How many of them lack records now."""
        return sum(bool(copy.missed) for copy in self._copies)

    def deliver_soon(self, batch: Batch) -> None:
        """Hand over what was committed; nothing is waited for."""
        self._loop.call_soon_threadsafe(self._deliver, batch)

    def _deliver(self, batch: Batch) -> None:
        for copy in self._copies:
            write = copy.put(batch)
            if write is not None:
                batch.writes.append(write)

    async def settled(self, batch: Batch) -> None:
        """Return once every copy that is well has the batch, or has proved not to be well. Call it after the commit."""
        await asyncio.sleep(0)  # ``_deliver`` was called by now
        if batch.writes:
            await asyncio.wait(batch.writes)

    async def aclose(self) -> None:
        """Write what is under way, for as long as the deadline; tell what a copy lacks."""
        await asyncio.sleep(0)
        await asyncio.gather(*(copy.aclose() for copy in self._copies))


class _Copy:
    """One place, and the numbers that it lacks: stretches in order, empty while all is well."""

    def __init__(
        self,
        place: Place,
        database: Database,
        on_failure: Callable[[], None],
        deadline_seconds: float,
        first_pause_seconds: float,
    ) -> None:
        self.missed: collections.deque[tuple[int, int]] = collections.deque()
        self._name = "stdout" if place is None else f"file:{place}"
        self._database = database
        self._on_failure = on_failure
        self._deadline_seconds = deadline_seconds
        self._first_pause_seconds = first_pause_seconds
        self._writer = Writer(place)
        self._under_way: dict[asyncio.Future[None], Batch] = {}
        self._mending: asyncio.Task[None] | None = None

    def put(self, batch: Batch) -> asyncio.Future[None] | None:
        """Begin to write the batch; None when it has to wait until what was missed before is written."""
        if self.missed:
            self._miss(batch)
            return None
        write = self._writer.begin(batch.lines)
        self._under_way[write] = batch
        late = asyncio.get_running_loop().call_later(self._deadline_seconds, self._fail, "it does not answer in time")
        write.add_done_callback(partial(self._ended, late))
        return write

    def _ended(self, late: asyncio.TimerHandle, write: asyncio.Future[None]) -> None:
        late.cancel()
        if write in self._under_way and write.exception() is None:
            del self._under_way[write]
        elif write in self._under_way:
            self._fail("it cannot be written")

    def _fail(self, why: str) -> None:
        """Note everything that is under way as missed (it may be written all the same), and begin to mend."""
        if not self._under_way:
            return  # it has just failed in another way
        batches, self._under_way = self._under_way, {}
        self._writer.give_up()
        for write, batch in batches.items():
            self._miss(batch)
            if not write.done():
                write.set_result(None)  # whoever waits goes on: the database has the record
        self._on_failure()
        self._mending = asyncio.create_task(self._mend())
        log.warning("audit.copy_failed", sink=self._name, why=why, from_number=self.missed[0][0])

    def _miss(self, batch: Batch) -> None:
        """Add a stretch; neighbours become one, and so do the last ones when there are too many."""
        first = batch.first
        if self.missed and (self.missed[-1][1] + 1 == first or len(self.missed) >= MOST_STRETCHES):
            first = self.missed.pop()[0]
        self.missed.append((first, batch.last))

    async def _mend(self) -> None:
        """Try again with growing pauses until nothing is missed."""
        pause_seconds = self._first_pause_seconds
        while self.missed:
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
            try:
                while self.missed:
                    await self._write_missed()
            except BrokerError:
                continue
        log.warning("audit.copy_healed", sink=self._name)

    async def _write_missed(self) -> None:
        """Write the next missed records from the database (BrokerError); what retention has removed stays missing."""
        first, last = self.missed[0]
        end = min(last, first + BATCH - 1)
        rows = await self._database.read(partial(records_between, after=first - 1, last=end))
        if rows:
            await self._writer.write("".join(line_of(parsed_row(row)) for row in rows), self._deadline_seconds)
        last = self.missed[0][1]  # it may have grown meanwhile
        if end < last:
            self.missed[0] = (end + 1, last)
        else:
            self.missed.popleft()

    async def aclose(self) -> None:
        if self._under_way:
            await asyncio.wait(self._under_way)
        if self._mending is not None and not self._mending.done():
            self._mending.cancel()
            await asyncio.wait({self._mending})
        if self.missed:
            log.warning("audit.copy_incomplete", sink=self._name, lacks=list(self.missed)[:10])
