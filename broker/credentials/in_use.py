"""The connections that proxied calls and open streams use right now, as they were a moment ago.

A call reads its connection here instead of from the database: hundreds of calls a second with one connection are two or
three queries. A stream that is open is looked at four times a second, so that what is frozen, revoked or deleted stops
within one.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
import structlog

from broker.credentials.snapshots import Snapshot
from broker.credentials.usable import require_usable
from broker.database import Database, GroupReader
from broker.errors import BrokerError, DatabaseUnavailable, InternalError, NotFound

MOST_SECONDS = 0.4  # together with what a call under way takes to notice, under the second that a freeze may take
LOOK_SECONDS = 0.25
BLIND_SECONDS = 5.0  # without a look at the database no stream goes on for longer
MOST_KEPT = 10_000
AT_ONCE = 100
log = structlog.get_logger()

Check = Callable[[Snapshot], Awaitable[None]]
Snapshots = Callable[[sa.Connection, Sequence[str]], list[Snapshot | None]]


@dataclass(slots=True, eq=False)
class _Stream:
    """An open stream: ``check`` raises what stands against going on, ``stop`` is told of it, once."""

    connection_id: str
    check: Check
    stop: Callable[[BrokerError], None]


class InUse:
    """One for a process; calls may run at once. ``aclose`` ends the looks, not the streams."""

    def __init__(
        self, database: Database, snapshots: Snapshots, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Keep the parts; ``snapshots`` is that of ``Credentials``, ``monotonic`` the clock of ages."""
        self._reader: GroupReader[str, Snapshot | None] = GroupReader(database, snapshots)
        self._monotonic = monotonic
        self._known: dict[str, tuple[float, Snapshot]] = {}
        self._streams: set[_Stream] = set()
        self._looking: asyncio.Task[None] | None = None

    async def current(self, connection_id: str) -> Snapshot:
        """Return the connection as it was not longer than ``MOST_SECONDS`` ago (NotFound, DatabaseUnavailable).

        Whether it may be used is not checked: ``require_usable`` does. One that is absent is asked for each time.
        """
        known = self._known.get(connection_id)
        if known is not None and self._monotonic() - known[0] < MOST_SECONDS:
            return known[1]
        return await self.anew(connection_id)

    async def anew(self, connection_id: str) -> Snapshot:
        """As ``current``, read by now: for what was just changed, such as a token that was refreshed."""
        began = self._monotonic()
        row = await self._reader.submit(connection_id)
        if row is None or row.deleted_at is not None:
            self._known.pop(connection_id, None)
            raise NotFound
        self._keep(row, began)
        return row

    def _keep(self, row: Snapshot, began: float) -> None:
        if len(self._known) >= MOST_KEPT:
            self._known.clear()
        known = self._known.get(row.id)
        if known is None or known[0] < began:
            self._known[row.id] = (began, row)

    @contextlib.contextmanager
    def following(self, connection_id: str, check: Check, stop: Callable[[BrokerError], None]) -> Iterator[None]:
        """Look at the connection four times a second for as long as the block lasts.

        ``check`` gets the row and raises what else stands against going on; ``stop`` gets the first such error, or that of the
        row itself, or DatabaseUnavailable when there was no look for ``BLIND_SECONDS``. It must not wait.
        """
        stream = _Stream(connection_id, check, stop)
        self._streams.add(stream)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), context=contextvars.Context())
        try:
            yield
        finally:
            self._streams.discard(stream)

    async def _look(self) -> None:
        """Look until no stream is left. A look that hangs is one that failed: a database may be silent for long."""
        seen = self._monotonic()
        while self._streams:
            await asyncio.sleep(LOOK_SECONDS)
            began = self._monotonic()
            try:
                async with asyncio.timeout(max(LOOK_SECONDS, seen + BLIND_SECONDS - began)):
                    await self._look_once(began)
                seen = began
            except Exception as error:
                if not isinstance(error, DatabaseUnavailable | TimeoutError):
                    log.exception("streams.look_failed")
                if self._monotonic() - seen >= BLIND_SECONDS:
                    log.warning("streams.stopped_blind", streams=len(self._streams))
                    self._stop_all(error if isinstance(error, DatabaseUnavailable) else DatabaseUnavailable())

    async def _look_once(self, began: float) -> None:
        streams = list(self._streams)
        ids = sorted({one.connection_id for one in streams})
        rows: dict[str, Snapshot | None] = {}
        for at in range(0, len(ids), AT_ONCE):
            page = ids[at : at + AT_ONCE]
            rows.update(zip(page, await asyncio.gather(*map(self._reader.submit, page)), strict=True))
        for row in filter(None, rows.values()):
            self._keep(row, began)
        blind: list[DatabaseUnavailable] = []
        async with asyncio.TaskGroup() as together:  # what checks wait for they share, and none waits for another's
            for number, stream in enumerate(streams):
                together.create_task(self._judge(stream, rows[stream.connection_id], blind))
                if number % AT_ONCE == 0:
                    await asyncio.sleep(0)
        if blind:
            raise blind[0]

    async def _judge(self, stream: _Stream, row: Snapshot | None, blind: list[DatabaseUnavailable]) -> None:
        try:
            error = await _against(stream, row)
        except DatabaseUnavailable as unavailable:
            blind.append(unavailable)
            return
        if error is not None and stream in self._streams:
            self._streams.discard(stream)
            stream.stop(error)

    def _stop_all(self, error: BrokerError) -> None:
        streams, self._streams = self._streams, set()
        for stream in streams:
            stream.stop(error)

    async def aclose(self) -> None:
        """Stop looking."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})


async def _against(stream: _Stream, row: Snapshot | None) -> BrokerError | None:
    """Return what stands against a stream's going on; a store that cannot be asked is no answer, and raises.

    A check that breaks ends its own stream, and hides no other one.
    """
    if row is None:
        return NotFound()
    try:
        require_usable(row)
        await stream.check(row)
    except DatabaseUnavailable:
        raise
    except BrokerError as error:
        return error
    except Exception:
        log.exception("streams.check_failed")
        return InternalError()
    return None
