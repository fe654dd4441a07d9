"""Breaks of the chain that an operator accepted: records of the chain itself, which name what was found.

Who accepts a break writes the record ``audit.accepted`` behind the last number that is known. Its detail holds its own number
and the link that it follows (``after``), so that it proves itself with nothing before it intact, and each break: which numbers
it spans, the link at which the chain goes on behind it, and a digest of the records that stand there. A span that changes
again after it was accepted is a new break.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from broker.audit.chain import KeySet, Row, same, strict_json
from broker.audit.records import BATCH, RECORDS, actions_of, numbers_between, records_between
from broker.database import Database
from broker.errors import InternalError

ACTION = "audit.accepted"
_OUTSIDE_THE_CHAIN = {"subject"}  # it may be erased later


@dataclass(frozen=True, slots=True)
class AcceptedBreak:
    """Numbers ``first`` to ``last`` (both included) that do not fit; behind them the chain goes on after ``link``.

    ``found`` is the digest of the records that stand there. Both are None where the records fit, but contradict checkpoints.
    """

    problem: str
    first: int
    last: int
    link: str | None = None
    found: str | None = None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """One ``audit.accepted`` record that is ours. ``forged``: digests of lines that are no checkpoints of ours."""

    number: int
    at: float
    actor: str
    by: str
    reason: str
    breaks: tuple[AcceptedBreak, ...]
    forged: frozenset[str]

    def shown(self) -> dict[str, Any]:
        """Return it as ``verify`` says it."""
        spans = [{"problem": one.problem, "first": one.first, "last": one.last} for one in self.breaks]
        facts = {"number": self.number, "at": self.at, "actor": self.actor, "by": self.by, "reason": self.reason}
        return {**facts, "breaks": spans, "forged_checkpoints": len(self.forged)}


def detail_of(
    number: int, link: str, breaks: Sequence[AcceptedBreak], forged: Sequence[str], *, by: str, reason: str
) -> dict[str, Any]:
    """Return the detail of an acceptance that becomes record ``number`` behind ``link``. Pure."""
    told = [asdict(one) for one in breaks]
    after = {"number": number, "link": link}
    return {"after": after, "breaks": told, "forged_checkpoints": list(forged), "by": by, "reason": reason}


async def read_acceptances(database: Database, keys: KeySet) -> tuple[Acceptance, ...]:
    """Return every acceptance that is ours, wherever in the chain it stands; those of other hands are passed over."""
    with contextlib.suppress(InternalError):  # a row that cannot even be read: the walk names it
        rows = await database.read(partial(actions_of, action=ACTION))
        return tuple(one for row in rows if (one := _acceptance(keys, row)) is not None)
    return ()


def _acceptance(keys: KeySet, row: Row) -> Acceptance | None:
    """Return what the row says if it proves itself: by a link over a detail that names its own place."""
    try:
        detail = strict_json(row["detail"])
        link = keys.link_of(row, detail["after"]["link"])
        if link is None or not same(link, row["chain"]) or detail["after"]["number"] != row["number"]:
            return None
        breaks = tuple(AcceptedBreak(**one) for one in detail["breaks"])
        forged = frozenset(detail["forged_checkpoints"])
        who = (row["actor"], detail["by"], detail["reason"])
        return Acceptance(row["number"], row["at"], *who, breaks, forged)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


async def digest_of_found(database: Database, first: int, last: int) -> str:
    """Return SHA-256 over the records with these numbers as they stand, whatever they hold; memory stays flat."""
    digest, after = hashlib.sha256(), first - 1
    while numbers := await database.read(partial(numbers_between, after=after, last=last, size=BATCH)):
        for row in await found_rows(database, after, numbers):
            digest.update(digest_text(row).encode("utf-8", "surrogatepass"))
        after = numbers[-1]
    return digest.hexdigest()


async def found_rows(database: Database, after: int, numbers: Sequence[int]) -> Sequence[Row]:
    """Return the records with these numbers, the next behind ``after``; of one that cannot be read only the number."""
    with contextlib.suppress(InternalError):
        return await database.read(partial(records_between, after=after, last=numbers[-1]))
    rows: list[Row] = []
    for number in numbers:
        row: Sequence[Row] = [{**dict.fromkeys(RECORDS.c.keys()), "number": number}]
        with contextlib.suppress(InternalError):
            row = await database.read(partial(records_between, after=number - 1, last=number))
        rows += row
    return rows


def digest_text(row: Mapping[str, Any]) -> str:
    """Return what stands in a row as one line, also what no record of ours would hold. Pure."""
    covered = {name: value for name, value in row.items() if name not in _OUTSIDE_THE_CHAIN}
    return json.dumps(covered, sort_keys=True, default=repr) + "\n"


def digest_of_line(line: object) -> str:
    """Return the digest by which a line that is no checkpoint of ours is known again. Pure."""
    text = json.dumps(dict(line) if isinstance(line, Mapping) else line, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
