"""Exports: records as JSON lines with seals in between, which anybody who has the public keys can check without the broker.

The first line says what was asked for and behind which record the first one stands. Then comes a record a line, and after
every 1,000 of them, and at the end, a seal: SHA-256 over every byte of the file before it, the last number so far, and an
Ed25519 signature over both. So the seals prove, with the public key alone, that these are the broker's lines in the broker's
order, none added, changed or left out, up to the last seal; one with ``complete`` ends the file. The links (``chain``) are
HMACs: that a record fits the one before can be checked only where the audit's root keys are.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from broker.audit.acceptances import found_rows
from broker.audit.chain import COVERED, GENESIS, Keys, KeySet, canonical, same, strict_json
from broker.audit.records import BATCH, bounds_in_time, first_and_last, links_of
from broker.audit.stored import parsed_row
from broker.audit.verify import read_known
from broker.database import Database
from broker.errors import AuditUnavailable

SIGNED_FOR = b"broker audit export 1\n"
STRETCH = 10_000


# --- making


async def export_lines(
    database: Database, keys: KeySet, *, since: float | None, until: float | None
) -> AsyncGenerator[str]:
    """Yield the lines of an export, memory flat: from the first record with ``at >= since`` to the last ``at < until``.

    All numbers in between are in it, whatever clock there was. Raises ``AuditUnavailable`` when records go missing meanwhile
    (retention): the file then has no last seal. ``DatabaseUnavailable``.
    """
    known = await read_known(database, keys)
    first, last = await _bounds(database, since, until)
    before = first - 1
    links = await database.read(partial(links_of, numbers=[before]))
    link = known.floor.chain if before == known.floor.number else links.get(before, GENESIS)
    digest = hashlib.sha256()

    def told(line: Mapping[str, Any]) -> str:
        text = canonical(line) + "\n"
        digest.update(text.encode())
        return text

    yield told({"export": {"since": since, "until": until, "after": before, "link": link, "last": last}})
    at = before
    while at < last:
        rows = await found_rows(database, at, range(at + 1, min(last, at + BATCH) + 1))
        if not rows:
            raise AuditUnavailable("Records were removed while they were exported")
        text = "".join(told(parsed_row(row)) for row in rows)
        at = rows[-1]["number"]
        yield text + told(_seal(keys.current, digest.hexdigest(), at, complete=at >= last))
    if at == before:
        yield told(_seal(keys.current, digest.hexdigest(), at, complete=True))


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


def _seal(keys: Keys, sha256: str, last: int, *, complete: bool) -> dict[str, Any]:
    seal = {"sha256": sha256, "last": last, "complete": complete, "key_id": keys.id, "public_key": keys.public_key}
    return {"seal": {**seal, "signature": keys.signer.sign(SIGNED_FOR + canonical(seal).encode()).hex()}}


# --- checking


@dataclass(frozen=True, slots=True)
class ExportVerification:
    """What checking a file found. ``count``: records up to the last good seal; ``first`` and ``last``: their numbers.

    ``problem``: ``not_an_export``; ``forged`` (a line, or a seal that no known key signed); ``removed`` (a number is missing);
    ``edited`` (a record does not fit its link; only told with the root keys); ``cut`` (there is no last seal); ``line``: where.
    ``links_checked``: whether the root keys were there.
    """

    ok: bool
    count: int
    first: int | None = None
    last: int | None = None
    problem: str | None = None
    line: int | None = None
    links_checked: bool = False


class _Wrong(Exception):
    """A line is wrong; carries the problem's name."""


class _Check:
    """The state of a check: what the lines so far have come to."""

    def __init__(self, public_keys: Mapping[str, str], keys: KeySet | None) -> None:
        self.count = self.sealed = 0
        self.first: int | None = None
        self.number: int | None = None
        self.complete = False
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
        else:
            self._check_record(told)
        self._digest.update(line)

    def _begin(self, told: object) -> None:
        try:
            begun = cast("Any", told)["export"]
            self.number, self._link = int(begun["after"]), str(begun["link"])
        except (KeyError, TypeError, ValueError):
            raise _Wrong("not_an_export") from None

    def _check_record(self, row: dict[str, Any]) -> None:
        number = (self.number or 0) + 1
        if row.get("number") != number:
            raise _Wrong("removed")
        if self._keys is not None and not self._follows(row):
            raise _Wrong("edited")
        self.first = number if self.first is None else self.first
        self.number, self._link, self.count = number, str(row.get("chain")), self.count + 1

    def _follows(self, row: dict[str, Any]) -> bool:
        keys = None if self._keys is None else self._keys.by_id.get(str(row.get("key_id")))
        if keys is None or any(name not in row for name in COVERED):
            return False
        return same(row.get("chain"), keys.link(self._link, row))

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
        self.sealed, self.complete = self.count, told["complete"] is True


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
    facts: dict[str, Any] = {"links_checked": keys is not None}
    if check.first is not None and check.sealed:
        facts |= {"first": check.first, "last": check.first + check.sealed - 1}
    return ExportVerification(
        problem is None, check.sealed, problem=problem, line=None if problem is None else at, **facts
    )
