"""Verifying: walk the chain, then hold it against its head and against all checkpoints; name the first break."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from broker.audit.acceptances import Acceptance, digest_of_line, read_acceptances
from broker.audit.chain import KeySet, Row, same
from broker.audit.checkpoints import checkpoint_batches, is_signed
from broker.audit.floor import Floor, read_floor
from broker.audit.head import Head, read_head
from broker.audit.places import CheckpointPlace
from broker.audit.records import first_and_last, links_of
from broker.audit.walk import Break, Position, Problem, Walked, walk
from broker.database import Database


@dataclass(frozen=True, slots=True)
class Verification:
    """What ``verify`` found. ``count``: records that fit before the first break, all of them when ``ok``.

    ``first_broken``: the number of the first record that is wrong or missing; for a rewritten tail, of the one at which the
    chain contradicts a checkpoint (the break is there or between it and the checkpoint before); None for a forged
    checkpoint, which breaks no record, and for a forged floor. ``problem``: ``edited``; ``removed``; ``reordered``;
    ``cut_tail``; ``head_forged`` (the records fit as far as they go, but whether they are all cannot be told);
    ``floor_forged`` (whether records before the first were removed by us cannot be told); ``checkpoint_forged``;
    ``subject_mismatch``. ``checked_checkpoints`` counts those read in all places, also the same one twice. ``floor``: up to
    this number records were removed by retention, 0: none. ``accepted``: breaks that an operator accepted, by whom and why.
    """

    ok: bool
    count: int
    first_broken: int | None = None
    problem: Problem | None = None
    checked_checkpoints: int = 0
    floor: int = 0
    accepted: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """What is read before the walk: where it begins, where it must end, and what was accepted."""

    floor: Floor
    head: Head | None
    acceptances: tuple[Acceptance, ...]

    @property
    def until(self) -> int | None:
        """The number that the walk ends at: what is written meanwhile is not looked at. None: to the end."""
        return self.head.count if self.head is not None and self.head.genuine else None


async def verify_chain(database: Database, keys: KeySet, places: Sequence[CheckpointPlace]) -> Verification:
    """See ``Audit.verify``."""
    known = await read_known(database, keys)
    found = await _verdict(database, keys, places, known)
    while not found.ok:
        again = await database.read(partial(read_floor, keys=keys))
        if again == known.floor:
            break  # else records were removed by retention while we walked
        known = await read_known(database, keys)
        found = await _verdict(database, keys, places, known)
    return found


async def read_known(database: Database, keys: KeySet) -> Known:
    """Read floor, head and acceptances."""
    head = await database.read(partial(read_head, keys=keys))
    acceptances = await read_acceptances(database, keys)
    return Known(await database.read(partial(read_floor, keys=keys)), head, acceptances)


async def _verdict(database: Database, keys: KeySet, places: Sequence[CheckpointPlace], known: Known) -> Verification:
    told: dict[str, Any] = {"floor": known.floor.number, "accepted": tuple(one.shown() for one in known.acceptances)}
    if not known.floor.genuine:
        return Verification(ok=False, count=0, problem="floor_forged", **told)
    start = Position(known.floor.number, known.floor.chain)
    walked = await walk(database, keys, start, until=known.until, acceptances=known.acceptances)
    broken = walked.broken
    if broken is None and known.until is not None and walked.last.number < known.until:
        broken = Break("cut_tail", walked.last.number + 1)
    checked = 0
    if broken is None:
        broken, checked = await check_checkpoints(database, keys, places, known)
        if broken is None or broken.problem != "cut_tail":
            broken = await _check_head(database, keys, known, walked) or broken
    problem, number = (None, None) if broken is None else (broken.problem, broken.number)
    return Verification(problem is None, walked.count, number, problem, checked, **told)


# --- the head


async def _check_head(database: Database, keys: KeySet, known: Known, walked: Walked) -> Break | None:
    """Find a head that is not ours, is gone, or is an older copy that counts fewer records than there are."""
    first, last = await database.read(first_and_last)
    latest = await database.read(partial(read_head, keys=keys))  # read after the records: it counts at least those
    count = known.floor.number if latest is None else latest.count
    if first is not None and first <= known.floor.number:
        return Break("edited", first)
    if any(one is not None and not one.genuine for one in (known.head, latest)):
        return Break("head_forged", walked.last.number + 1)
    if last is not None and last > count:
        return Break("head_forged", count + 1 if latest is not None else walked.last.number + 1)
    if known.head is not None and not same(known.head.chain, walked.last.chain):
        return Break("head_forged", walked.last.number + 1)
    return None


# --- the checkpoints


async def check_checkpoints(
    database: Database, keys: KeySet, places: Sequence[CheckpointPlace], known: Known
) -> tuple[Break | None, int]:
    """Compare every checkpoint with the chain; return the first break, cut tails before forgeries, and the count."""
    forged: Break | None = None
    checked = 0
    accepted = frozenset[str]().union(*(one.forged for one in known.acceptances))
    async with contextlib.aclosing(checkpoint_batches(database, places)) as batches:
        async for batch in batches:
            checked += len(batch)
            signed, others = await asyncio.to_thread(sorted_out, keys, batch)
            if any(digest_of_line(line) not in accepted for line in others):
                forged = Break("checkpoint_forged", None)
            wrong = await contradictions(database, signed, known)
            if wrong:
                _, last = await database.read(first_and_last)
                return Break("cut_tail", min(*wrong, (last or known.floor.number) + 1)), checked
    return forged, checked


def sorted_out(keys: KeySet, batch: Sequence[Any]) -> tuple[list[Row], list[Any]]:
    """Return the checkpoints that we signed, and the other lines."""
    signed = [line for line in batch if is_signed(keys, line)]
    ours = {id(line) for line in signed}
    return signed, [line for line in batch if id(line) not in ours]


async def contradictions(database: Database, signed: Sequence[Row], known: Known) -> list[int]:
    """Return the counts at which the chain lacks a record that was signed for, or has another in its place.

    Those before the floor, and those in a span that was accepted, say nothing any more.
    """
    spans = [(one.first, one.last) for acceptance in known.acceptances for one in acceptance.breaks]
    counted = [
        one
        for one in signed
        if one["count"] >= known.floor.number and not any(first <= one["count"] <= last for first, last in spans)
    ]
    links = await database.read(partial(links_of, numbers=[one["count"] for one in counted]))
    links[known.floor.number] = known.floor.chain
    return [one["count"] for one in counted if not same(links.get(one["count"]), one["chain"])]
