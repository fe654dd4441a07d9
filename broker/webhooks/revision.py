"""Whether sources or subscriptions changed: a number that every change of them adds to, asked for twice a second at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import sqlalchemy as sa
from sqlmodel import Session, col

from broker.database import Database, GroupReader
from broker.models import WebhookState

BELIEVED_SECONDS: Final = 0.5
MOST_HELD_SECONDS: Final = 5.0  # what was opened, on top of what the vault's own cache keeps it for
_CURRENT: Final = sa.select(col(WebhookState.revision))


class Revision:
    """The number of changes, as it was at most ``BELIEVED_SECONDS`` ago. One for a process; calls may run at once."""

    def __init__(self, database: Database, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Ask ``database``; ``monotonic`` is the clock of ages, also of what is kept by a revision."""
        self._reader: GroupReader[None, int] = GroupReader(database, _asked)
        self.monotonic = monotonic
        self._known: tuple[float, int] | None = None

    async def current(self) -> int:
        """Return the number; those who ask at the same time share one query (DatabaseUnavailable)."""
        began = self.monotonic()
        if self._known is not None and began - self._known[0] < BELIEVED_SECONDS:
            return self._known[1]
        number = await self._reader.submit(None)
        if self._known is None or self._known[0] < began:
            self._known = (began, number)
        return number

    def forget(self) -> None:
        """Believe nothing: this process itself has just changed something, and wants to see it."""
        self._known = None


def _asked(connection: sa.Connection, waiting: Sequence[None]) -> Sequence[int]:
    return [int(connection.execute(_CURRENT).scalar_one())] * len(waiting)


def revision_of(session: Session) -> int:
    """Return the number as a transaction sees it."""
    return int(session.execute(_CURRENT).scalar_one())


def changed(session: Session) -> None:
    """Add one, in the transaction that changes a source or a subscription; as its last statement, after the audit's.

    It takes the lock under which events get their numbers.
    """
    session.execute(sa.update(WebhookState).values(revision=WebhookState.revision + 1))
