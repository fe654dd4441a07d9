"""What the worker does about callers: warn before keys expire, and undo rows that were put back in an older version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.announcing import announce
from broker.audit import Audit, Entry
from broker.callers.rows import (
    MARKED,
    PUT_BACK,
    Row,
    RowMacs,
    changes_since,
    learned,
    lock_callers,
    mark_of,
    put_back,
    stated_at,
)
from broker.database import Database, now
from broker.models import Caller, CallerKey, rfc3339

DAY_SECONDS: Final = 86_400.0
WARNED_DAYS: Final = (1, 14)  # before the end, the last warning first
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Ending:
    """A live key that will end, by itself or with its caller (``ends_at``, seconds since 1970)."""

    key: CallerKey
    ends_at: float


def due_warning(ends_at: float, warned_at: float | None, at: float) -> int | None:
    """Return how many days before its end a key is to be warned of now, None for not now (pure).

    Each warning comes once, and a missed one not after a later one. A key that was prolonged is warned of anew.
    """
    for days in WARNED_DAYS:
        begins_at = ends_at - days * DAY_SECONDS
        if begins_at <= at < ends_at:
            return days if warned_at is None or warned_at < begins_at else None
    return None


class Upkeep:
    """Jobs of the worker. Any number may run: each acts in a transaction that lets nobody else change callers."""

    def __init__(
        self,
        database: Database,
        audit: Audit,
        rows: RowMacs,
        *,
        on_next_end: Callable[[float | None], None] | None = None,
        retention_days: float | None = None,
    ) -> None:
        """Keep the parts; ``on_next_end`` is told when the next live key ends (seconds since 1970), None for never.

        ``retention_days``: how long audit records are kept, None for ever.
        """
        self._database = database
        self._audit = audit
        self._rows = rows
        self._on_next_end = on_next_end
        self._state_seconds = None if retention_days is None else retention_days * DAY_SECONDS / 2
        self._marks: dict[str, str | None] = {}
        self._seen_number = -1

    async def warn(self) -> None:
        """Log and record ``broker.key.expiring`` once 14 days and once a day before a key ends."""
        at, endings = await self._database.read(lambda session: (now(session), self._endings(session)))
        if self._on_next_end is not None:
            self._on_next_end(min((one.ends_at for one in endings), default=None))
        if any(due_warning(one.ends_at, one.key.warned_at, at) for one in endings):
            await self._database.transaction(self._warn)

    def _endings(self, session: Session) -> list[Ending]:
        at = now(session)
        query = select(CallerKey, Caller).join(Caller, col(Caller.id) == col(CallerKey.caller_id))
        query = query.where(col(CallerKey.revoked_at).is_(None))
        ends = sa.or_(col(CallerKey.expires_at).is_not(None), col(Caller.expires_at).is_not(None))
        pairs = [
            (key, _first(key.expires_at, caller.expires_at), caller) for key, caller in session.exec(query.where(ends))
        ]
        genuine = self._rows.is_genuine
        return [Ending(key, end) for key, end, caller in pairs if end > at and genuine(key) and genuine(caller)]

    def _warn(self, session: Session) -> None:
        lock_callers(session)
        at = now(session)
        entries = []
        for one in self._endings(session):
            days = due_warning(one.ends_at, one.key.warned_at, at)
            if days is None:
                continue
            one.key.warned_at = at
            session.add(one.key)
            told = {"caller_id": one.key.caller_id, "key_id": one.key.id, "expires_at": rfc3339(one.ends_at)}
            log.warning("broker.key.expiring", days=days, **told)
            entries.append(Entry(action="broker.key.expiring", actor="worker", detail={**told, "days": days}))
            announce(session, "broker.key.expiring", {**told, "days": days})
        if entries:
            self._audit.append(session, *entries)

    async def undo_put_back(self) -> None:
        """End every row that is not as the audit last knew it: deleted there, unknown, revoked, or with other roles or grants.

        Its MAC is genuine, so somebody wrote an older version of it into the database. A key is revoked, a caller ended, what
        was deleted is deleted again. A row whose MAC is wrong needs nothing: it is refused already. Where audit records are
        removed by retention, the rows are stated anew (``caller.rows_marked``) each half of that time.
        """
        await self._database.transaction(self._undo_put_back)

    def _undo_put_back(self, session: Session) -> None:
        lock_callers(session)  # whoever changes callers waits, so rows and audit are of one moment
        for number, action, detail in changes_since(session, self._seen_number):
            learned(self._marks, action, detail)
            self._seen_number = number
        rows: Sequence[Row] = [*session.exec(select(Caller)), *session.exec(select(CallerKey))]
        entries = [self._end(session, row) for row in put_back(rows, self._marks) if self._rows.is_genuine(row)]
        if not entries and self._has_to_state(session):
            # by the audit, not by the rows: those whose MACs cannot be checked now are not forgotten
            marks = {row.id: self._marks[row.id] for row in rows if row.id in self._marks}
            entries = [Entry(action=MARKED, actor="worker", detail={"rows": marks})]
        if entries:
            self._audit.append(session, *entries)

    def _has_to_state(self, session: Session) -> bool:
        if self._state_seconds is None:
            return False
        at = stated_at(session)
        return at is None or now(session) - at >= self._state_seconds

    def _end(self, session: Session, row: Row) -> Entry:
        caller_id = row.caller_id if isinstance(row, CallerKey) else row.id
        log.critical("caller.row_put_back", table=type(row).__tablename__, row_id=row.id, caller_id=caller_id)
        if self._marks.get(row.id, "unknown") is None:
            session.delete(row)
            mark = None
        else:
            _close(row, now(session))
            self._rows.sign(row)
            session.add(row)
            mark = mark_of(row)
        return Entry(action=PUT_BACK, actor="worker", detail={"caller_id": caller_id, "rows": {row.id: mark}})


def _close(row: Row, at: float) -> None:
    if isinstance(row, CallerKey):
        row.revoked_at = at
    else:
        row.expires_at = at


def _first(one: float | None, other: float | None) -> float:
    return min(end for end in (one, other, float("inf")) if end is not None)
