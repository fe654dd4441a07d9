"""Verifying: follow every link, then hold the chain against its head and against all checkpoints; name the first break."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from broker.audit.chain import GENESIS, KeySet, Row, same
from broker.audit.checkpoints import checkpoint_batches, is_signed
from broker.audit.head import Head, read_head
from broker.audit.records import (
    BATCH,
    RECORDS,
    count_records,
    first_and_last,
    links_after,
    links_of,
    records_after,
)
from broker.audit.sinks import Place
from broker.database import Database
from broker.errors import InternalError

Problem: TypeAlias = Literal[
    "edited", "removed", "reordered", "cut_tail", "head_forged", "checkpoint_forged", "subject_mismatch"
]


@dataclass(frozen=True, slots=True)
class Verification:
    """What ``verify`` found. ``count``: records that fit before the first break, all of them when ``ok``.

    ``first_broken``: the number of the first record that is wrong or missing; for a rewritten tail, of the one at which the
    chain contradicts a checkpoint (the break is there or between it and the checkpoint before); None for a forged
    checkpoint, which breaks no record. ``problem``: ``edited``; ``removed``; ``reordered``; ``cut_tail``;
    ``head_forged`` (the records fit as far as they go, but whether they are all cannot be told); ``checkpoint_forged``;
    ``subject_mismatch``. ``checked_checkpoints`` counts those read in all places, also the same one twice.
    """

    ok: bool
    count: int
    first_broken: int | None = None
    problem: Problem | None = None
    checked_checkpoints: int = 0


@dataclass(frozen=True, slots=True)
class _Break:
    problem: Problem
    number: int | None


@dataclass(frozen=True, slots=True)
class _Walked:
    """How far the records fit: the last good number and link, and what stopped the walk."""

    last: int
    chain: str
    broken: _Break | None = None


async def verify_chain(database: Database, keys: KeySet, second_places: Sequence[Place]) -> Verification:
    """See ``Audit.verify``."""
    head = await database.read(partial(read_head, keys=keys))
    walked = await _walk(database, keys, head.count if head is not None and head.genuine else None)
    if walked.broken is not None:
        return _broken(walked.broken, walked.last)
    if head is not None and head.genuine and walked.last < head.count:
        return _broken(_Break("cut_tail", walked.last + 1), walked.last)
    found, checked = await _check_checkpoints(database, keys, second_places)
    if found is None or found.problem != "cut_tail":
        found = await _check_head(database, keys, head, walked) or found
    if found is not None:
        return _broken(found, walked.last, checked)
    return Verification(ok=True, count=walked.last, checked_checkpoints=checked)


def _broken(found: _Break, count: int, checked: int = 0) -> Verification:
    return Verification(
        ok=False, count=count, first_broken=found.number, problem=found.problem, checked_checkpoints=checked
    )


# --- the links


async def _walk(database: Database, keys: KeySet, until: int | None) -> _Walked:
    """Follow the links from the first record to number ``until`` (None: to the end)."""
    last, chain = 0, GENESIS
    while rows := await _next_records(database, last, until):
        for row in rows:
            problem = _problem(keys, row, last + 1, chain)
            if problem is not None:
                named = await _named(database, keys, problem, row, until)
                return _Walked(last, chain, _Break(named, last + 1))
            last, chain = row["number"], row["chain"]
        await asyncio.sleep(0)  # others want the event loop too
    return _Walked(last, chain)


async def _next_records(database: Database, number: int, until: int | None) -> Sequence[Row]:
    """Return the next batch; a single record that cannot even be read stands for itself, as one of nothing.

    (SQLite keeps bytes in a text column that are no text, and its driver stumbles over them.)
    """
    for size in (BATCH, 1):
        with contextlib.suppress(InternalError):
            return await database.read(partial(records_after, number=number, until=until, size=size))
    return [dict.fromkeys(RECORDS.c.keys())]


def _problem(keys: KeySet, row: Row, expected: int, previous: str) -> Problem | None:
    """Return what is wrong with the row at position ``expected``, as far as it shows by itself. Pure."""
    if row["number"] is None:
        return "edited"
    if row["number"] != expected:
        return "removed"
    link = keys.link_of(row, previous)
    if link is None or not same(row["chain"], link):
        return "edited"
    subject, digest = row["subject"], row["subject_digest"]
    if subject is not None and not same(digest, keys.by_id[row["key_id"]].subject_digest(str(subject))):
        return "subject_mismatch"
    return None


async def _named(database: Database, keys: KeySet, problem: Problem, row: Row, until: int | None) -> Problem:
    """Tell a row that does not fit from one that would fit elsewhere, or that stands where a removed one stood."""
    if problem != "edited":
        return problem
    with contextlib.suppress(InternalError):  # a later record may be one that cannot be read
        if await _fits_elsewhere(database, keys, row):
            return "reordered"
    count = await database.read(count_records)
    return "removed" if until is not None and count < until else "edited"


async def _fits_elsewhere(database: Database, keys: KeySet, row: Row) -> bool:
    """Whether the record follows another one's link: by its own link, or by the link that now stands behind that."""
    if keys.link_of(row, GENESIS) is None:
        return False
    before, links = 0, [GENESIS]
    while found := await database.read(partial(links_after, number=before)):
        before = found[-1]["number"]
        links.extend(str(one["chain"]) for one in found)
        for previous, following in itertools.pairwise([*links, ""]):
            if keys.link_of(row, previous) in {row["chain"], following}:
                return True
        links = links[-1:]
        await asyncio.sleep(0)
    return False


# --- the head


async def _check_head(database: Database, keys: KeySet, head: Head | None, walked: _Walked) -> _Break | None:
    """Find a head that is not ours, is gone, or is an older copy that counts fewer records than there are."""
    first, last = await database.read(first_and_last)
    latest = await database.read(partial(read_head, keys=keys))  # read after the records: it counts at least those
    count = 0 if latest is None else latest.count
    if first is not None and first < 1:
        return _Break("edited", first)
    if any(one is not None and not one.genuine for one in (head, latest)):
        return _Break("head_forged", walked.last + 1)
    if last is not None and last > count:
        return _Break("head_forged", count + 1 if latest is not None else walked.last + 1)
    if head is not None and not same(head.chain, walked.chain):
        return _Break("head_forged", walked.last + 1)
    return None


# --- the checkpoints


async def _check_checkpoints(
    database: Database, keys: KeySet, second_places: Sequence[Place]
) -> tuple[_Break | None, int]:
    """Compare every checkpoint with the chain; return the first break, cut tails before forgeries, and the count."""
    forged: _Break | None = None
    checked = 0
    async with contextlib.aclosing(checkpoint_batches(database, second_places)) as batches:
        async for batch in batches:
            checked += len(batch)
            signed = await asyncio.to_thread(lambda rows: [row for row in rows if is_signed(keys, row)], batch)
            if len(signed) < len(batch):
                forged = _Break("checkpoint_forged", None)
            contradiction = await _contradiction(database, signed)
            if contradiction is not None:
                return contradiction, checked
    return forged, checked


async def _contradiction(database: Database, signed: Sequence[Row]) -> _Break | None:
    """Return where the chain lacks a record that was signed for, or has another in its place."""
    numbers = [one["count"] for one in signed]
    links = await database.read(partial(links_of, numbers=numbers))
    wrong = [one["count"] for one in signed if not same(links.get(one["count"]), one["chain"])]
    if not wrong:
        return None
    _, last = await database.read(first_and_last)
    return _Break("cut_tail", min(*wrong, (last or 0) + 1))
