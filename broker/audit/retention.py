"""Retention: the oldest records are removed up to a signed checkpoint, and the chain begins behind them from then on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session, col

from broker.audit.chain import KeySet
from broker.audit.checkpoints import forget_before, newest_before
from broker.audit.entries import Entry
from broker.audit.floor import move_floor
from broker.audit.records import link_entries, remove_until
from broker.audit.verify import Known, read_known
from broker.audit.walk import Position, walk
from broker.database import Database, now
from broker.errors import AuditUnavailable
from broker.models import AuditRecord

PIECE = 5_000
ACTION = "audit.cut"
ROWS_STATED = ("caller.rows_marked", "caller.rows_taken_over")
"""Records of all rows of callers. The newest is kept with what follows: only it tells an older row that was put back."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one transaction removes: the records behind ``floor`` up to ``last``."""

    floor: int
    last: Position
    count: int


async def next_piece(database: Database, keys: KeySet, *, older_than_seconds: float) -> Piece | None:
    """Return the next piece that may go, None when there is none.

    Everything in it was written before a checkpoint that is older, and every link of it was verified: what is broken is
    evidence, and is not removed (``AuditUnavailable``). The newest record of all rows of callers stays, and all behind it.
    """
    known = await read_known(database, keys)
    if not known.floor.genuine:
        raise AuditUnavailable("The floor of the audit chain was changed from outside")
    above = known.floor.number
    until = await database.read(partial(_until, keys=keys, age_seconds=older_than_seconds, above=above))
    return await _verified(database, keys, known, until) if until > above else None


def _until(session: Session, *, keys: KeySet, age_seconds: float, above: int) -> int:
    target = newest_before(session, keys=keys, before=now(session) - age_seconds, above=above)
    query = sa.select(sa.func.max(AuditRecord.number)).where(col(AuditRecord.action).in_(ROWS_STATED))
    stated = session.execute(query.where(col(AuditRecord.action) != "connection.token")).scalar()
    until = above if target is None else min(int(target["count"]), above + PIECE)
    return until if stated is None else min(until, int(stated) - 1)


async def _verified(database: Database, keys: KeySet, known: Known, until: int) -> Piece | None:
    start = Position(known.floor.number, known.floor.chain)
    walked = await walk(database, keys, start, until=until, acceptances=known.acceptances)
    if walked.broken is not None or walked.last.number < until:
        raise AuditUnavailable("Old audit records are broken, so they are kept; `broker audit verify` names the break")
    return Piece(start.number, walked.last, walked.count)


def remove_piece(session: Session, piece: Piece, keys: KeySet) -> list[dict[str, Any]] | None:
    """Remove a piece, move the floor and link the record of it; return that, None when another process was first."""
    if not move_floor(session, keys.current, piece.floor, piece.last.number, piece.last.chain, now(session)):
        return None
    remove_until(session, piece.last.number)
    forget_before(session, count=piece.last.number)
    detail = {"first": piece.floor + 1, "last": piece.last.number, "link": piece.last.chain, "count": piece.count}
    return link_entries(session, keys, [Entry(ACTION, "worker", detail=detail)])
