"""Following the links: from the floor on, over breaks that an operator accepted, to the first one that nobody did."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from broker.audit.acceptances import Acceptance, AcceptedBreak, digest_of_found
from broker.audit.chain import GENESIS, KeySet, Row, same
from broker.audit.records import BATCH, RECORDS, count_behind, links_after, records_after
from broker.database import Database
from broker.errors import InternalError

Problem: TypeAlias = Literal[
    "edited",
    "removed",
    "reordered",
    "cut_tail",
    "head_forged",
    "floor_forged",
    "checkpoint_forged",
    "subject_mismatch",
]


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the chain: the number of a record and its link."""

    number: int = 0
    chain: str = GENESIS


@dataclass(frozen=True, slots=True)
class Break:
    """What is wrong, and the number of the first record that is wrong or missing."""

    problem: Problem
    number: int | None


@dataclass(frozen=True, slots=True)
class Walked:
    """How far the records fit: the last good position, how many of them did, and what stopped the walk."""

    last: Position
    count: int
    broken: Break | None = None


async def walk(
    database: Database,
    keys: KeySet,
    start: Position,
    *,
    until: int | None,
    acceptances: Sequence[Acceptance] = (),
) -> Walked:
    """Follow the links behind ``start`` to number ``until`` (None: to the end).

    Memory stays flat. Raises ``DatabaseUnavailable``.
    """
    spans = _spans(acceptances)
    at, count = start, 0
    while True:
        span = await _accepted(database, spans, at)
        if span is not None:
            at = span
            continue
        rows = await _next_records(database, at.number, until)
        if not rows:
            return Walked(at, count)
        for row in rows:
            problem = problem_of(keys, row, at)
            if problem is not None:
                gap = 0 if until is None else until - at.number - _accepted_numbers(spans, at.number)
                named = await _named(database, keys, problem, row, start.chain, (at.number, gap))
                return Walked(at, count, Break(named, at.number + 1))
            at, count = Position(row["number"], row["chain"]), count + 1
            if at.number + 1 in spans:
                break
        await asyncio.sleep(0)  # others want the event loop too


def _spans(acceptances: Sequence[Acceptance]) -> Mapping[int, list[AcceptedBreak]]:
    spans: dict[int, list[AcceptedBreak]] = {}
    for acceptance in acceptances:
        for one in acceptance.breaks:
            if one.link is not None and one.last >= one.first:
                spans.setdefault(one.first, []).append(one)
    return spans


def _accepted_numbers(spans: Mapping[int, list[AcceptedBreak]], number: int) -> int:
    """Return how many numbers behind this one at most were accepted as missing."""
    return sum(max(one.last - one.first + 1 for one in found) for first, found in spans.items() if first > number)


async def _accepted(database: Database, spans: Mapping[int, list[AcceptedBreak]], at: Position) -> Position | None:
    """Return where the chain goes on if a break that begins here was accepted and is still as it was then."""
    for one in spans.get(at.number + 1, ()):
        if one.link is not None and same(await digest_of_found(database, one.first, one.last), one.found):
            return Position(one.last, one.link)
    return None


async def _next_records(database: Database, number: int, until: int | None) -> Sequence[Row]:
    """Return the next batch; a single record that cannot even be read stands for itself, as one of nothing.

    (SQLite keeps bytes in a text column that are no text, and its driver stumbles over them.)
    """
    for size in (BATCH, 1):
        with contextlib.suppress(InternalError):
            return await database.read(partial(records_after, number=number, until=until, size=size))
    return [dict.fromkeys(RECORDS.c.keys())]


def problem_of(keys: KeySet, row: Row, before: Position) -> Problem | None:
    """Return what is wrong with the row behind ``before``, as far as it shows by itself. Pure."""
    if row["number"] is None:
        return "edited"
    if row["number"] != before.number + 1:
        return "removed"
    link = keys.link_of(row, before.chain)
    if link is None or not same(row["chain"], link):
        return "edited"
    subject, digest = row["subject"], row["subject_digest"]
    if subject is not None and not same(digest, keys.by_id[row["key_id"]].subject_digest(str(subject))):
        return "subject_mismatch"
    return None


async def _named(
    database: Database, keys: KeySet, problem: Problem, row: Row, bottom: str, rest: tuple[int, int]
) -> Problem:
    """Tell a row that does not fit from one that would fit elsewhere, or that stands where a removed one stood.

    ``rest``: the last number that fitted, and how many records there should be behind it at least.
    """
    if problem != "edited":
        return problem
    with contextlib.suppress(InternalError):  # a later record may be one that cannot be read
        if await _fits_elsewhere(database, keys, row, bottom):
            return "reordered"
    number, expected = rest
    return "removed" if await database.read(partial(count_behind, number=number)) < expected else "edited"


async def _fits_elsewhere(database: Database, keys: KeySet, row: Row, bottom: str) -> bool:
    """Whether the record follows another one's link: by its own link, or by the link that now stands behind that."""
    if keys.link_of(row, GENESIS) is None:
        return False
    before, links = 0, [bottom]
    while found := await database.read(partial(links_after, number=before)):
        before = found[-1]["number"]
        links.extend(str(one["chain"]) for one in found)
        for previous, following in itertools.pairwise([*links, ""]):
            if keys.link_of(row, previous) in {row["chain"], following}:
                return True
        links = links[-1:]
        await asyncio.sleep(0)
    return False
