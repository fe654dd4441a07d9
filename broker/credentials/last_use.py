"""Notes when connections were last used, behind the hand-outs and in groups: true to the minute without a write per call."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence
from functools import partial

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col

from broker.credentials.usable import Standing
from broker.database import Database
from broker.errors import BrokerError
from broker.models import Connection

USED_SECONDS = 60.0
EVERY_SECONDS = 0.25
LARGEST = 50
MOST_WAITING = 5_000
log = structlog.get_logger()


class LastUse:
    """Writes ``last_used_at``, at most ``LARGEST`` rows every ``EVERY_SECONDS``: that is 12,000 connections a minute.

    Ten times as many, each on a page of its own, made hand-outs from 100,000 connections half as fast as from 1,000.

    It is for operators and for the choice of what is refreshed ahead (used within a week), so it may be lost: with the
    process, when the database is not available, and when more than ``MOST_WAITING`` wait. The next use makes up for it.
    """

    def __init__(self, database: Database) -> None:
        """Begin with nothing noted."""
        self._database = database
        self._noted: dict[str, float] = {}
        self._writing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def note(self, row: Standing, at: float) -> None:
        """Remember a use at ``at`` (the database's clock), unless the row knows of one less than a minute before."""
        known = row.last_used_at is not None and at - row.last_used_at < USED_SECONDS
        if known or row.id in self._noted or len(self._noted) >= MOST_WAITING or self._closing.is_set():
            return
        self._noted[row.id] = at
        if self._writing is None or self._writing.done():
            # A context of its own: what is logged belongs to no request.
            self._writing = asyncio.create_task(self._write(), context=contextvars.Context())

    async def _write(self) -> None:
        while self._noted:
            if not self._closing.is_set():
                await self._pause()
            # In the order of their uses, so that those written together were used together and one time fits all.
            batch = dict(list(self._noted.items())[:LARGEST])
            try:
                await self._database.transaction(partial(_mark, ids=sorted(batch), at=max(batch.values())))
            except BrokerError as error:
                log.warning("connection.last_use_lost", connections=len(batch), code=error.code)
            for connection_id in batch:
                del self._noted[connection_id]

    async def _pause(self) -> None:
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


def _mark(session: Session, ids: Sequence[str], at: float) -> None:
    used = sa.update(Connection).where(col(Connection.id).in_(ids)).values(last_used_at=at)
    session.execute(used, execution_options={"synchronize_session": False})
