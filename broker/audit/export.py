"""Exports: records as JSON lines with seals in between, which anybody who has the public keys can check without the broker.

The first line says what was asked for and behind which record the first one stands. Then comes a record a line, and after
every 1,000 of them, and at the end, a seal: SHA-256 over every byte of the file before it, the last number so far, and an
Ed25519 signature over both. So the seals prove, with the public key alone, that these are the broker's lines in the broker's
order, none added, changed or left out, up to the last seal; one with ``complete`` ends the file. The links (``chain``) are
HMACs: that a record fits the one before can be checked only where the audit's root keys are. The broker has them, and checks
every link while it writes: where one does not fit, each seal from there on names the ``break``, and none is ``complete``. All
records are in the file all the same, for whoever looks into it. A break that an operator accepted is told in a line
``accepted`` (numbers ``first`` to ``last``, and the ``link`` behind them) before its records.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from broker.audit.acceptances import AcceptedBreak, digest_of_found, found_rows
from broker.audit.chain import COVERED, GENESIS, Keys, KeySet, Row, canonical, same, strict_json
from broker.audit.floor import read_floor
from broker.audit.records import BATCH, bounds_in_time, first_and_last, links_of, numbers_between
from broker.audit.stored import parsed_row
from broker.audit.verify import Known, read_known
from broker.audit.walk import Break, Position, problem_of
from broker.database import Database
from broker.errors import AuditUnavailable

SIGNED_FOR = b"broker audit export 1\n"
STRETCH = 10_000
REMOVED = "Records were removed while they were exported"


# --- making


async def export_lines(
    database: Database, keys: KeySet, *, since: float | None, until: float | None
) -> AsyncGenerator[str]:
    """Yield the lines of an export, memory flat: from the first record with ``at >= since`` to the last ``at < until``.

    All numbers in between are in it, whatever clock there was, and what does not fit too: the seals then name the break (see
    above). Without ``since`` it begins at the floor, and without ``until`` it must reach the head. Checkpoints are not looked
    at. Raises ``AuditUnavailable`` when records go missing meanwhile (retention): the file then has no last seal.
    ``DatabaseUnavailable``.
    """
    known = await read_known(database, keys)
    first, last = await _bounds(database, since, until)
    before = known.floor.number if since is None and first <= last else first - 1
    links = _Links(database, keys, known, await _start(database, known, before))
    links.broken = _broken_outside(known, last, since=since, until=until)
    digest = hashlib.sha256()

    def told(line: Mapping[str, Any]) -> str:
        text = canonical(line) + "\n"
        digest.update(text.encode())
        return text

    def seal(at: int) -> str:
        return told(_seal(keys.current, digest.hexdigest(), at, links.broken, is_last=at >= last))

    yield told({"export": {"since": since, "until": until, "after": before, "link": links.at.chain, "last": last}})
    at = before
    while at < last:
        rows = await _next_rows(database, at, last)
        text = "".join([told(line) for row in rows for line in await links.lines(row)])
        at = rows[-1]["number"]
        yield text + seal(at)
    if at == before:
        yield seal(at)


async def _next_rows(database: Database, at: int, last: int) -> Sequence[Row]:
    numbers = await database.read(partial(numbers_between, after=at, last=last, size=BATCH))
    rows = await found_rows(database, at, numbers) if numbers else ()
    if not rows:
        raise AuditUnavailable(REMOVED)
    return rows


async def _start(database: Database, known: Known, before: int) -> Position:
    """Return record ``before`` with its link, which nothing has proved yet; that of an accepted break if it is gone."""
    if before == known.floor.number:
        return Position(before, known.floor.chain)
    links = {one.last: one.link for one in _accepted(known) if one.link is not None}
    found = await database.read(partial(links_of, numbers=[before]))
    return Position(before, str(found.get(before, links.get(before, GENESIS))))


def _broken_outside(known: Known, last: int, *, since: float | None, until: float | None) -> Break | None:
    """Return what is wrong with floor or head, if the export reaches them. Pure."""
    if since is None and not known.floor.genuine:
        return Break("floor_forged", None)
    head = known.head
    if until is not None or (head is None and last == 0):
        return None
    if head is None or not head.genuine:
        return Break("head_forged", None)
    return Break("cut_tail", last + 1) if since is None and head.count > max(last, known.floor.number) else None


def _accepted(known: Known) -> list[AcceptedBreak]:
    return [one for acceptance in known.acceptances for one in acceptance.breaks]


class _Links:
    """Follows the links of the records as they are exported: ``at`` is the last that fitted, ``broken`` the first break."""

    def __init__(self, database: Database, keys: KeySet, known: Known, start: Position) -> None:
        self.at = start
        self.broken: Break | None = None
        self._database = database
        self._keys = keys
        self._known = known

    async def lines(self, row: Row) -> list[dict[str, Any]]:
        """Return the lines of the next row: it, and the accepted breaks that begin with it or before it."""
        spans: list[dict[str, Any]] = []
        while self.broken is None and row["number"] > self.at.number:
            problem = problem_of(self._keys, row, self.at)
            if problem is None:
                self.at = Position(row["number"], row["chain"])
                break
            span = await self._span()
            if span is None:
                self.broken = Break(problem, self.at.number + 1)
                await self._require_no_retention()
            else:
                spans.append({"accepted": {"first": self.at.number + 1, "last": span.number, "link": span.chain}})
                self.at = span
        return [*spans, parsed_row(row)]

    async def _span(self) -> Position | None:
        """Return the end of the accepted break that the next number is in, if that is still as it was then."""
        number = self.at.number + 1
        for one in _accepted(self._known):
            if one.link is not None and one.first <= number <= one.last:
                found = await digest_of_found(self._database, one.first, one.last)
                if same(found, one.found):
                    return Position(one.last, one.link)
        return None

    async def _require_no_retention(self) -> None:
        floor = await self._database.read(partial(read_floor, keys=self._keys))
        if floor != self._known.floor:
            raise AuditUnavailable(REMOVED)


async def _bounds(database: Database, since: float | None, until: float | None) -> tuple[int, int]:
    """Return the lowest and highest number that fit; (1, 0) for none. Walks the times, a million a second."""
    lowest, highest = await database.read(first_and_last)
    if lowest is None or highest is None:
        return 1, 0
    if since is None and until is None:
        return lowest, highest
    found: list[int] = []
    for after in range(lowest - 1, highest, STRETCH):
        part = partial(bounds_in_time, after=after, last=min(highest, after + STRETCH), since=since, until=until)
        found += [number for number in await database.read(part) if number is not None]
    return (min(found), max(found)) if found else (1, 0)


def _seal(keys: Keys, sha256: str, last: int, broken: Break | None, *, is_last: bool) -> dict[str, Any]:
    complete = is_last and broken is None
    seal: dict[str, Any] = {"sha256": sha256, "last": last, "complete": complete}
    seal |= {"key_id": keys.id, "public_key": keys.public_key}
    if broken is not None:
        seal["break"] = {"problem": broken.problem, "number": broken.number}
    return {"seal": {**seal, "signature": keys.signer.sign(SIGNED_FOR + canonical(seal).encode()).hex()}}


# --- checking


@dataclass(frozen=True, slots=True)
class ExportVerification:
    """What checking a file found. ``count``: records up to the last good seal; ``first`` and ``last``: their numbers.

    ``problem``: ``not_an_export``; ``forged`` (a line, or a seal that no known key signed); ``removed`` (a number is missing);
    ``edited`` (a record does not fit its link, or its subject not its digest; only told with the root keys); ``broken`` (the
    broker itself found the chain broken while it exported, and says so in this seal: ``broken`` is what it says, ``problem``
    and ``number`` as ``verify`` names them); ``cut`` (there is no last seal). ``line``: where. ``links_checked``: whether the
    root keys were there.
    """

    ok: bool
    count: int
    first: int | None = None
    last: int | None = None
    problem: str | None = None
    line: int | None = None
    links_checked: bool = False
    broken: dict[str, Any] | None = None


class _Wrong(Exception):
    """A line is wrong; carries the problem's name."""


class _Check:
    """The state of a check: what the lines so far have come to."""

    def __init__(self, public_keys: Mapping[str, str], keys: KeySet | None) -> None:
        self.count = self.sealed = 0
        self.first: int | None = None
        self.number: int | None = None
        self.last: int | None = None  # that a good seal was over
        self.complete = False
        self.broken: dict[str, Any] | None = None
        self._accepted_until = 0
        self._link = ""
        self._public_keys = public_keys
        self._keys = keys
        self._digest = hashlib.sha256()

    def take(self, line: bytes) -> None:
        try:
            told = strict_json(line)
        except (ValueError, RecursionError):
            raise _Wrong("not_an_export" if self.number is None else "forged") from None
        if self.number is None:
            self._begin(told)
        elif self.complete or not isinstance(told, dict):
            raise _Wrong("forged")
        elif set(told) == {"seal"}:
            self._check_seal(told["seal"])
        elif set(told) == {"accepted"}:
            self._accept(told["accepted"])
        else:
            self._check_record(told)
        self._digest.update(line)

    def _begin(self, told: object) -> None:
        try:
            begun = cast("Any", told)["export"]
            self.number, self._link = int(begun["after"]), str(begun["link"])
        except (KeyError, TypeError, ValueError):
            raise _Wrong("not_an_export") from None

    def _accept(self, told: object) -> None:
        """Go over an accepted break: its records need not fit, nor be there. A seal has to follow, as after a record."""
        try:
            span = cast("Any", told)
            first, last, link = int(span["first"]), int(span["last"]), str(span["link"])
        except (KeyError, TypeError, ValueError):
            raise _Wrong("forged") from None
        if first != max(self.number or 0, self._accepted_until) + 1 or last < first:
            raise _Wrong("forged")
        self._accepted_until, self._link = last, link

    def _check_record(self, row: dict[str, Any]) -> None:
        before, number = self.number or 0, row.get("number")
        if not isinstance(number, int) or number <= before:
            raise _Wrong("removed")
        if number > self._accepted_until:
            if number != max(before, self._accepted_until) + 1:
                raise _Wrong("removed")
            if self._keys is not None and not self._follows(row):
                raise _Wrong("edited")
            self._link = str(row.get("chain"))
        self.first = number if self.first is None else self.first
        self.number, self.count = number, self.count + 1

    def _follows(self, row: dict[str, Any]) -> bool:
        keys = None if self._keys is None else self._keys.by_id.get(str(row.get("key_id")))
        if keys is None or any(name not in row for name in COVERED):
            return False
        subject = row.get("subject")  # it is outside the links: an erasure takes it away
        if subject is not None and not same(row["subject_digest"], keys.subject_digest(str(subject))):
            return False
        try:
            return same(row["chain"], keys.link(self._link, row))
        except (KeyError, TypeError, ValueError):  # ValueError: NaN, which JSON does not have
            return False

    def _check_seal(self, seal: Any) -> None:  # noqa: ANN401 - whatever the file holds
        try:
            told = dict(seal)
            signature = bytes.fromhex(told.pop("signature"))
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self._public_keys[told["key_id"]]))
            key.verify(signature, SIGNED_FOR + canonical(told).encode())
        except (InvalidSignature, KeyError, TypeError, ValueError):
            raise _Wrong("forged") from None
        if told["sha256"] != self._digest.hexdigest() or told["last"] != self.number:
            raise _Wrong("forged")
        if "break" in told:
            self.broken = told["break"]
            raise _Wrong("broken")
        self.sealed, self.last, self.complete = self.count, self.number, told["complete"] is True


def check_export(
    lines: Iterable[bytes], public_keys: Mapping[str, str], keys: KeySet | None = None
) -> ExportVerification:
    """Check the lines of an export (each with its line feed) against public keys by id, and links too where ``keys`` are.

    Pure but for reading the lines; memory stays flat.
    """
    check, problem, at = _Check(public_keys, keys), None, 0
    try:
        for line in lines:
            at += 1
            check.take(line)
        if not check.complete:
            problem = "cut" if at else "not_an_export"
    except _Wrong as wrong:
        problem = str(wrong)
    facts: dict[str, Any] = {"links_checked": keys is not None, "broken": check.broken}
    if check.first is not None and check.sealed:
        facts |= {"first": check.first, "last": check.last}
    return ExportVerification(
        problem is None, check.sealed, problem=problem, line=None if problem is None else at, **facts
    )
