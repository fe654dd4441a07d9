"""Accepting breaks: an operator who has looked lets the chain go on, in a record that names what was found."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlmodel import Session

from broker.audit.acceptances import (
    ACTION,
    AcceptedBreak,
    detail_of,
    digest_of_found,
    digest_of_line,
    found_rows,
)
from broker.audit.chain import KeySet, same
from broker.audit.checkpoints import checkpoint_batches
from broker.audit.entries import Entry
from broker.audit.floor import BOTTOM, forget_floor
from broker.audit.head import Head, find_and_lock_head, put_head
from broker.audit.places import CheckpointPlace
from broker.audit.records import BATCH, first_and_last, link_entries, links_of, numbers_between
from broker.audit.verify import Known, contradictions, read_known, sorted_out
from broker.audit.walk import Position, walk
from broker.database import Database
from broker.errors import AuditUnavailable

MOST_BREAKS = 1_000  # of which the last spans all that is left
CHANGED = "The audit chain changed while it was looked at; try again"


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that does not fit, and where the chain may go on (``end``). ``last``: the highest number in the table."""

    breaks: tuple[AcceptedBreak, ...]
    forged: tuple[str, ...]
    end: Position
    last: int
    floor_forged: bool


@dataclass(frozen=True, slots=True)
class _Signed:
    """What the checkpoints say: the highest one that is ours, where they contradict the chain, and what is not ours."""

    highest: Position
    wrong: tuple[int, ...]
    forged: tuple[str, ...]


async def find_all(database: Database, keys: KeySet, places: Sequence[CheckpointPlace]) -> Findings:
    """Look at the whole chain, past every break; nothing is written.

    Raises ``AuditUnavailable`` for a place that cannot be read, and for records before the first, which have to be deleted by
    hand; ``DatabaseUnavailable``.
    """
    known = await read_known(database, keys)
    floor_forged = not known.floor.genuine
    if floor_forged:
        known = replace(known, floor=BOTTOM)
    signed = await _checkpoints(database, keys, places, known)  # before the walk, which then goes at least as far
    first, last = await database.read(first_and_last)
    if first is not None and first <= known.floor.number:
        raise AuditUnavailable(f"There is a record with the number {first}, before the first one; delete that row")
    breaks, end = await _walk_all(database, keys, known, last or 0)
    for claimed in (_claimed_by(known.head), signed.highest):
        if claimed.number > end.number:
            found = await digest_of_found(database, end.number + 1, claimed.number)
            breaks.append(AcceptedBreak("cut_tail", end.number + 1, claimed.number, claimed.chain, found))
            end = claimed
    wrong = [count for count in signed.wrong if not any(one.first <= count <= one.last for one in breaks)]
    if wrong:
        breaks.append(AcceptedBreak("cut_tail", min(wrong), max(wrong)))
    return Findings(tuple(breaks), signed.forged, end, last or 0, floor_forged)


def _claimed_by(head: Head | None) -> Position:
    return Position(head.count, head.chain) if head is not None and head.genuine else Position()


async def _checkpoints(database: Database, keys: KeySet, places: Sequence[CheckpointPlace], known: Known) -> _Signed:
    highest, wrong, forged = Position(), list[int](), set[str]()
    accepted = frozenset[str]().union(*(one.forged for one in known.acceptances))
    async with contextlib.aclosing(checkpoint_batches(database, places)) as batches:
        async for batch in batches:
            signed, others = sorted_out(keys, batch)
            forged |= {digest_of_line(line) for line in others} - accepted
            wrong += await contradictions(database, signed, known)
            for row in signed:
                highest = max(highest, Position(row["count"], row["chain"]), key=lambda one: one.number)
    if len(forged) > MOST_BREAKS:
        raise AuditUnavailable("There are too many lines that are no checkpoints of ours; remove them by hand")
    return _Signed(highest, tuple(wrong), tuple(sorted(forged)))


async def _walk_all(database: Database, keys: KeySet, known: Known, last: int) -> tuple[list[AcceptedBreak], Position]:
    """Return every break of the links, and the end of the chain."""
    at, breaks = Position(known.floor.number, known.floor.chain), list[AcceptedBreak]()
    until = max(known.until or 0, last)
    while True:
        walked = await walk(database, keys, at, until=until, acceptances=known.acceptances)
        at = walked.last
        if walked.broken is None:
            return breaks, at
        behind = None if len(breaks) >= MOST_BREAKS else await _resumption(database, keys, at.number, last)
        behind = behind or await _at(database, last)
        found = await digest_of_found(database, at.number + 1, behind.number)
        breaks.append(AcceptedBreak(walked.broken.problem, at.number + 1, behind.number, behind.chain, found))
        at = behind


async def _resumption(database: Database, keys: KeySet, after: int, last: int) -> Position | None:
    """Return the first record behind ``after`` that the next one follows; None when none does."""
    before = None
    while numbers := await database.read(partial(numbers_between, after=after, last=last, size=BATCH)):
        for row in await found_rows(database, after, numbers):
            if before is not None and before["number"] + 1 == row["number"]:
                link = keys.link_of(row, str(before["chain"]))
                if link is not None and same(link, row["chain"]):
                    return Position(before["number"], str(before["chain"]))
            before = row
        after = numbers[-1]
    return None


async def _at(database: Database, number: int) -> Position:
    [row] = await found_rows(database, number - 1, [number])
    return Position(number, str(row["chain"]))


def write_acceptance(
    session: Session, findings: Findings, keys: KeySet, *, by: str, reason: str
) -> list[dict[str, Any]]:
    """Repair head and floor as far as they are not ours, and link the acceptance; return its row.

    Nothing (an empty list) when all is well. Raises ``AuditUnavailable`` when the chain is no longer as it was found.
    """
    head = find_and_lock_head(session, keys)
    _, last = first_and_last(session)
    fits = head is not None and _fits(session, head, last or 0, findings.end)
    if fits and not (findings.breaks or findings.forged or findings.floor_forged):
        return []
    if head is None and not (findings.breaks or findings.forged or findings.floor_forged or last):
        return []  # the chain has not begun
    at = Position(head.count, head.chain) if head is not None and fits else findings.end
    if not fits:
        if (last or 0) != findings.last:
            raise AuditUnavailable(CHANGED)
        put_head(session, keys.current, at.number, at.chain)
    if findings.floor_forged:
        forget_floor(session)
    told = detail_of(at.number + 1, at.chain, findings.breaks, findings.forged, by=by, reason=reason)
    told |= {"new_head": not fits, "new_floor": findings.floor_forged}
    return link_entries(session, keys, [Entry(ACTION, "cli", detail=told)])


def _fits(session: Session, head: Head, last: int, end: Position) -> bool:
    """Whether the chain can go on at this head."""
    if not head.genuine or last > head.count or end.number > head.count:
        return False
    link = links_of(session, numbers=[head.count]).get(head.count)
    return head.count == 0 or link is None or same(link, head.chain)
