"""The audit chain: what happened, linked so that a change shows, and durable in every sink before a credential leaves.

Each record is linked to the one before: ``chain = HMAC-SHA256(chain key, previous link || canonical JSON of the record)``.
Covered is every column but ``number`` (it is the position in the chain, and is checked as such) and ``subject`` (so that a
person can be erased; ``subject_digest``, a keyed digest of it, is covered, and a subject that is there must fit it). The head
row holds count and last link under a MAC; its lock orders the writers of all processes, and a head that does not verify is
never written on: the audit is unavailable then, and so are credentials, until an operator has looked.

What each part withstands, from an attacker who may write to the database but has no key:

- an edited, added, removed or moved record breaks a link; a tail that was cut leaves a head that counts more;
- a head row made to fit has no valid MAC;
- an *older copy* of the head row is valid. With the tail cut to its count, the signed checkpoints (Ed25519 over count and
  link) in the database still tell; but who cuts the tail can delete the newer checkpoint rows too, and then nothing in the
  database contradicts. Only the second place does (``BROKER_AUDIT_CHECKPOINTS``, a file that the database's writer cannot
  reach): without one, such a cut is not found. Even so the records after the last checkpoint (at most 1,000, or 60 s of
  them) can go unnoticed;
- ``subject`` set to null looks like an erasure.

All keys are derived from one root key (HKDF-SHA256, RFC 5869), which is kept sealed in ``system_keys``. Each record names its
key, so records of earlier keys stay verifiable.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import math
import os
import re
import secrets
import stat
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import sqlalchemy as sa
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.util.concurrency import await_, in_greenlet
from sqlmodel import Session, col, select

from broker.database import Database, DriverFault, GroupWriter, now
from broker.errors import AuditUnavailable, DatabaseUnavailable, InternalError
from broker.models import AuditCheckpoint, AuditHead, AuditRecord, SystemKey, new_id
from broker.settings import Settings
from broker.vault import SecretUnreadable
from broker.vault.keyring import Sealer

Problem: TypeAlias = Literal[
    "edited", "removed", "reordered", "cut_tail", "head_forged", "checkpoint_forged", "subject_mismatch"
]
Row: TypeAlias = Mapping[str, Any]

PURPOSE = "audit"
DATABASE_ERRORS = (DatabaseUnavailable, InternalError)  # the second: a table is not as we made it
KEY_BYTES = 32
GENESIS = "0" * 64  # the link before the first record
OUTCOMES = frozenset({"ok", "denied", "intent", "failed"})
COVERED = (
    "id", "at", "action", "outcome", "actor", "connection_id", "integration", "subject_digest", "detail", "key_id"
)  # fmt: skip
RECORD_TIMEOUT_SECONDS = 10.0
CHECKPOINT_RECORDS = 1_000
CHECKPOINT_SECONDS = 60.0
BATCH = 1_000
DEEPEST_DETAIL = 16
LONGEST_CHECKPOINT_LINE = 4_096

_RECORDS = cast("sa.Table", AuditRecord.__table__)  # type: ignore[attr-defined]
_HEAD = cast("sa.Table", AuditHead.__table__)  # type: ignore[attr-defined]
_CHECKPOINTS = cast("sa.Table", AuditCheckpoint.__table__)  # type: ignore[attr-defined]
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
_ACTION = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_encode_line = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), allow_nan=False
).encode  # ASCII: any stream has it


# --- what happened --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """What happened. Never holds a secret: a credential appears only as ``Audit.digest``.

    ``actor``: a caller id, ``browser``, ``worker``, ``cli`` or ``system``. ``detail`` is JSON (a copy is kept) without
    personal names: the chain covers it for ever, only ``subject`` can be erased. ``ValueError`` for an action that is not
    dotted lower case, an unknown outcome, text with NUL or lone surrogates (PostgreSQL keeps neither), and for a detail
    that would not come back from JSON as it went in: NaN, keys that are no strings, bytes, integers over 64 bits.
    """

    action: str
    actor: str
    outcome: str = "ok"
    connection_id: str | None = None
    integration: str | None = None
    subject: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what could not be stored or verified later."""
        if not _ACTION.fullmatch(self.action):
            raise ValueError("an audit action is dotted lower case")
        if self.outcome not in OUTCOMES:
            raise ValueError("an audit outcome is ok, denied, intent or failed")
        _plain_text(self.actor)
        for text in (self.connection_id, self.integration, self.subject):
            if text is not None:
                _plain_text(text)
        if not isinstance(self.detail, Mapping):
            raise ValueError("an audit detail is a map")  # noqa: TRY004 - one kind of refusal for one kind of mistake
        object.__setattr__(self, "detail", _plain(self.detail, DEEPEST_DETAIL))


def _plain(value: object, depth: int) -> Any:  # noqa: ANN401 - JSON is any shape
    """Return a copy made of JSON's own types; ``ValueError`` when it would not come back the same."""
    if depth < 0:
        raise ValueError("an audit detail is nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _plain_text(value)
    if isinstance(value, Mapping):
        return {_plain_text(key): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value]
    return _plain_number(value)


def _plain_text(value: object) -> str:
    if not isinstance(value, str) or _UNSTORABLE.search(value):
        raise ValueError("an audit entry takes text without NUL and lone surrogates")
    return str(value)


def _plain_number(value: object) -> int | float:
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise ValueError("an audit detail holds only what JSON can hold")


# --- keys and links -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class _Keys:
    """What is derived from one root key: no key serves two purposes. Cannot print itself."""

    id: str
    digest: bytes
    subject: bytes
    chain: bytes
    head: bytes
    signer: Ed25519PrivateKey

    def link(self, previous: str, row: Row) -> str:
        """Return the link of ``row`` after ``previous``. ``ValueError`` or ``TypeError`` when the row is not JSON."""
        covered = _encode({name: row[name] for name in COVERED})
        return _mac(self.chain, f"{previous}{covered}")  # a genuine ``previous`` has 64 characters: nothing to confuse

    def head_mac(self, count: int, chain: str) -> str:
        """Return what proves that we wrote this head."""
        return _mac(self.head, f"{count}:{chain}")


def _derived(root: bytes, name: str) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=f"broker audit {name}".encode()).derive(root)


def _keys(root: bytes) -> _Keys:
    if len(root) != KEY_BYTES:
        raise ValueError("an audit root key has 32 bytes")
    return _Keys(
        id=f"{PURPOSE}-{_derived(root, 'key id').hex()[:16]}",
        digest=_derived(root, "digest"),
        subject=_derived(root, "subject"),
        chain=_derived(root, "chain"),
        head=_derived(root, "head"),
        signer=Ed25519PrivateKey.from_private_bytes(_derived(root, "checkpoint")),
    )


def _mac(key: bytes, text: str) -> str:
    return hmac.digest(key, text.encode("utf-8", "surrogatepass"), "sha256").hex()


def _same(one: object, other: object) -> bool:
    return hmac.compare_digest(str(one).encode("utf-8", "replace"), str(other).encode("utf-8", "replace"))


# --- sinks and second places ----------------------------------------------------------------------------------------------


def _places(names: Sequence[str]) -> tuple[Path | None, ...]:
    """Return the places besides the database: a path for ``file:…``, None for ``stdout``. ``ValueError`` for others."""
    places: list[Path | None] = []
    for name in names:
        kind, _, path = name.partition(":")
        if name not in {"database", "stdout"} and (kind != "file" or not path):
            raise ValueError("an audit place is database, stdout or file:<path>")
        if name != "database":
            places.append(Path(path) if path else None)
    return tuple(places)


def _write_lines(places: Sequence[Path | None], lines: str) -> None:
    """Write whole lines to every place, durably; ``AuditUnavailable`` when one of them does not take them."""
    try:
        for place in places:
            if place is None:
                sys.stdout.write(lines)
                sys.stdout.flush()
            else:
                _append_durably(place, lines.encode())
    except (OSError, ValueError) as error:  # ValueError: a closed stream
        raise AuditUnavailable("An audit sink could not be written") from error


def _append_durably(path: Path, data: bytes) -> None:
    """Append to a file (made 0600) and sync it. Opened anew each time: it may have been rotated, or have healed.

    A regular file or a device: a pipe could swallow the lines, and opening one could block for ever.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    file = os.open(path, flags, 0o600)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            _write_device(file, status.st_mode, data)
            return
        if status.st_size and os.pread(file, 1, status.st_size - 1) != b"\n":
            data = b"\n" + data  # a write that was cut (full disk, crash) must not spoil this line too
        _write_all(file, data)
        os.fsync(file)
    finally:
        os.close(file)
    if not status.st_size:
        _sync_directory(path.parent)


def _write_device(file: int, mode: int, data: bytes) -> None:
    if not stat.S_ISCHR(mode):
        raise OSError("an audit file is a regular file or a device")
    _write_all(file, data)


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _line(row: Row) -> str:
    """Return a record as a line. The subject stays out: an erasure could not reach it here."""
    return _encode_line({name: value for name, value in row.items() if name != "subject"}) + "\n"


@dataclass(slots=True)
class _Copies:
    """The lines of one transaction for the other sinks, written after its commit, and how that went."""

    places: tuple[Path | None, ...]
    lines: list[str] = field(default_factory=list)
    error: AuditUnavailable | None = None

    def write(self, _session: object) -> None:
        """Write; keep the failure. On PostgreSQL this is called on the event loop, which must not wait for a disk."""
        lines = "".join(self.lines)
        try:
            if in_greenlet():
                await_(asyncio.to_thread(_write_lines, self.places, lines))
            else:
                _write_lines(self.places, lines)
        except AuditUnavailable as error:
            self.error = error

    def write_or_raise(self, session: object) -> None:
        """Write; raise the failure out of the transaction, which is committed all the same."""
        self.write(session)
        if self.error is not None:
            raise self.error


# --- what verify says -----------------------------------------------------------------------------------------------------


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
class _Head:
    """The head row as found; ``genuine``: one of our keys made its MAC."""

    count: int
    chain: str
    genuine: bool


@dataclass(frozen=True, slots=True)
class _Walked:
    """How far the records fit: the last good number and link, and what stopped the walk."""

    last: int
    chain: str
    broken: _Break | None = None


# --- the audit ------------------------------------------------------------------------------------------------------------


class Audit:
    """Writes, checks, verifies and searches the chain. One per process; every call may run at once with others."""

    def __init__(
        self,
        database: Database,
        key: bytes,
        *,
        sinks: Sequence[str],
        checkpoints: Sequence[str],
        previous_keys: Sequence[bytes] = (),
    ) -> None:
        """Take the current root key (32 bytes), earlier ones, and places as in the settings (``ValueError`` else)."""
        self._database = database
        self._current = _keys(key)
        self._by_id = {keys.id: keys for keys in (self._current, *map(_keys, previous_keys))}
        self._sinks = _places(sinks)
        self._second_places = _places(checkpoints)
        self._writer: GroupWriter[Entry, tuple[str, _Copies]] = GroupWriter(database, self._write_group)

    def digest(self, secret: str) -> str:
        """Return a keyed digest of a credential: joins records without a hash that anyone could compute."""
        return _mac(self._current.digest, secret)

    def subject_digest(self, subject: str) -> str:
        """Return the digest that stands for ``subject`` in the records, after an erasure too."""
        return _mac(self._current.subject, subject)

    async def record(self, entry: Entry) -> str:
        """Write one entry together with others that wait; return its ``aud_`` id once it is durable in every sink.

        Raises ``AuditUnavailable`` within ``RECORD_TIMEOUT_SECONDS`` otherwise: release nothing then. The record may exist
        all the same (in the database, when only a copy failed; later, after a time-out): it says what was attempted.
        """
        try:
            async with asyncio.timeout(RECORD_TIMEOUT_SECONDS):
                record_id, copies = await self._writer.submit(entry)
        except (*DATABASE_ERRORS, IntegrityError, TimeoutError) as error:
            raise AuditUnavailable from error
        if copies.error is not None:
            raise AuditUnavailable(copies.error.detail) from copies.error
        return record_id

    def append(self, session: Session, *entries: Entry) -> None:
        """Link entries inside the caller's transaction; call it last in it, since it locks the head row for all writers.

        Raises ``AuditUnavailable``; so does ``Database.transaction`` when a sink besides the database fails after the
        commit, which then stands. ``RuntimeError`` inside a savepoint, whose end nobody could tell from the commit.
        """
        if session.in_nested_transaction():
            raise RuntimeError("audit entries are appended outside savepoints")
        session.flush()  # the caller's own conflicts surface as they are, and before the head is locked
        failure: AuditUnavailable | None = None
        try:
            rows = self._link(session, entries)
        except SQLAlchemyError as error:
            failure = AuditUnavailable()
            failure.__cause__ = DriverFault(type(getattr(error, "orig", None) or error).__name__)
        if failure is not None:
            raise failure  # outside the handler: what the driver says may quote values, and must not be its context
        if self._sinks and rows:
            self._copies_of(session).lines.extend(map(_line, rows))

    def _copies_of(self, session: Session) -> _Copies:
        """Return the lines that wait for this session's commit; the hook is registered with the first."""
        if self not in session.info:
            session.info[self] = copies = _Copies(self._sinks)
            sa.event.listen(session, "after_commit", copies.write_or_raise, once=True)
        return cast("_Copies", session.info[self])

    def _write_group(self, session: Session, entries: Sequence[Entry]) -> list[tuple[str, _Copies]]:
        """Link a group. A failed copy must not fail the transaction: the group writer would write the group again."""
        rows = self._link(session, entries)
        copies = _Copies(self._sinks)
        if self._sinks:
            copies.lines.extend(map(_line, rows))
            sa.event.listen(session, "after_commit", copies.write, once=True)
        return [(row["id"], copies) for row in rows]

    def _link(self, session: Session, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        if not entries:
            return []
        head = self._lock_head(session)
        at, chain = now(session), head.chain
        rows: list[dict[str, Any]] = []
        for number, entry in enumerate(entries, head.count + 1):
            row = self._row(number, entry, at)
            row["chain"] = chain = self._current.link(chain, row)
            rows.append(row)
        connection = session.connection()
        connection.execute(sa.insert(_RECORDS), rows)
        connection.execute(sa.update(_HEAD).where(_HEAD.c.id == 1).values(self._head_values(rows[-1]["number"], chain)))
        return rows

    def _row(self, number: int, entry: Entry, at: float) -> dict[str, Any]:
        return {
            "number": number,
            "id": new_id("aud"),
            "at": at,
            "action": entry.action,
            "outcome": entry.outcome,
            "actor": entry.actor,
            "connection_id": entry.connection_id,
            "integration": entry.integration,
            "subject": entry.subject,
            "subject_digest": None if entry.subject is None else self.subject_digest(entry.subject),
            "detail": entry.detail,
            "key_id": self._current.id,
        }

    def _lock_head(self, session: Session) -> _Head:
        """Return the head, locked until the transaction ends; a forged one is refused, or we would make it genuine."""
        head = self._head(session, lock=True)  # waits no longer than the database's lock time-out
        if head is None:
            session.connection().execute(_MAKE_HEAD, self._head_values(0, GENESIS))
            head = self._head(session, lock=True)
        if head is None or not head.genuine:
            raise AuditUnavailable("The head of the audit chain was changed from outside")
        return head

    def _head(self, session: Session, *, lock: bool = False) -> _Head | None:
        query = sa.select(_HEAD.c.count, _HEAD.c.chain, _HEAD.c.mac).where(_HEAD.c.id == 1)
        row = session.connection().execute(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            return None
        count, chain, mac = row
        genuine = any(_same(mac, keys.head_mac(count, chain)) for keys in self._by_id.values())
        return _Head(count, chain, genuine)

    def _head_values(self, count: int, chain: str) -> dict[str, Any]:
        return {"count": count, "chain": chain, "mac": self._current.head_mac(count, chain)}

    # --- checkpoints

    async def checkpoint(self, *, force: bool = False) -> None:
        """Sign (count, link) when 1,000 records or 60 s (database clock) have passed since the last; the worker calls it.

        ``force``: now, if there is any record since. Written to the second places first, then to the database: a place
        that fails is tried again with the next call. Raises ``AuditUnavailable``, also for a head that is not ours to sign.
        """
        try:
            due = await self._database.read(partial(self._due_checkpoint, force=force))
            if due is None:
                return
            line = _encode_line(due) + "\n"
            await asyncio.to_thread(_write_lines, self._second_places, line)
            await self._database.transaction(partial(_store_checkpoint, row=due))
        except DATABASE_ERRORS as error:
            raise AuditUnavailable from error

    def _due_checkpoint(self, session: Session, *, force: bool) -> dict[str, Any] | None:
        head, at = self._head(session), now(session)
        if head is None or head.count == 0:
            return None
        if not head.genuine:
            raise AuditUnavailable("The head of the audit chain was changed from outside")
        last_count, last_at = self._last_checkpoint(session, head.count)
        waited = not 0 <= at - last_at < CHECKPOINT_SECONDS  # a clock that was set back must not stop the checkpoints
        if head.count == last_count or not (force or waited or head.count - last_count >= CHECKPOINT_RECORDS):
            return None
        return self._signed(head, at)

    def _last_checkpoint(self, session: Session, count: int) -> tuple[int, float]:
        """Return count and time of the last one; a row that we did not sign is none, or it could hold off all others."""
        query = sa.select(_CHECKPOINTS).where(_CHECKPOINTS.c.count <= count)
        rows = _rows(session, query.order_by(_CHECKPOINTS.c.count.desc()).limit(1))
        return (rows[0]["count"], rows[0]["at"]) if rows and self._is_signed(rows[0]) else (0, -math.inf)

    def _signed(self, head: _Head, at: float) -> dict[str, Any]:
        row: dict[str, Any] = {"count": head.count, "chain": head.chain, "at": at, "key_id": self._current.id}
        return {**row, "signature": self._current.signer.sign(_to_sign(row)).hex()}

    def _is_signed(self, checkpoint: object) -> bool:
        """Whether we signed exactly this; False for anything that is no checkpoint at all."""
        try:
            row = dict(cast("Row", checkpoint))
            signature = bytes.fromhex(row.pop("signature"))
            self._by_id[row["key_id"]].signer.public_key().verify(signature, _to_sign(row))
        except (InvalidSignature, KeyError, TypeError, ValueError):
            return False
        return True

    # --- verify

    async def verify(self) -> Verification:
        """Check every record, the head and all checkpoints, those in second places too; name the first break.

        Streams in batches, so memory stays flat; may run while others write and sees what was committed when it began.
        A line in a second place that is not whole JSON was cut while it was written, and is passed over. Raises
        ``AuditUnavailable`` when a second place cannot be read, ``DatabaseUnavailable``.
        """
        head = await self._database.read(self._head)
        walked = await self._walk(head.count if head is not None and head.genuine else None)
        if walked.broken is not None:
            return _broken(walked.broken, walked.last)
        if head is not None and head.genuine and walked.last < head.count:
            return _broken(_Break("cut_tail", walked.last + 1), walked.last)
        found, checked = await self._check_checkpoints()
        if found is None or found.problem != "cut_tail":
            found = await self._check_head(head, walked) or found
        if found is not None:
            return _broken(found, walked.last, checked)
        return Verification(ok=True, count=walked.last, checked_checkpoints=checked)

    async def _walk(self, until: int | None) -> _Walked:
        """Follow the links from the first record to number ``until`` (None: to the end)."""
        last, chain = 0, GENESIS
        while rows := await self._records_after(last, until):
            for row in rows:
                problem = self._problem(row, last + 1, chain)
                if problem is not None:
                    named = await self._named(problem, row, until)
                    return _Walked(last, chain, _Break(named, last + 1))
                last, chain = row["number"], row["chain"]
            await asyncio.sleep(0)  # others want the event loop too
        return _Walked(last, chain)

    async def _records_after(self, number: int, until: int | None) -> Sequence[Row]:
        """Return the next batch; a single record that cannot even be read stands for itself, as one of nothing.

        (SQLite keeps bytes in a text column that are no text, and its driver stumbles over them.)
        """
        for size in (BATCH, 1):
            with contextlib.suppress(InternalError):
                return await self._database.read(partial(_records_after, number=number, until=until, size=size))
        return [dict.fromkeys(_RECORDS.c.keys())]

    def _problem(self, row: Row, expected: int, previous: str) -> Problem | None:
        """Return what is wrong with the row at position ``expected``, as far as it shows by itself. Pure."""
        if row["number"] is None:
            return "edited"
        if row["number"] != expected:
            return "removed"
        keys = self._by_id.get(row["key_id"])
        link = self._link_of(row, previous)
        if keys is None or link is None or not _same(row["chain"], link):
            return "edited"
        if row["subject"] is not None and not _same(row["subject_digest"], _mac(keys.subject, str(row["subject"]))):
            return "subject_mismatch"
        return None

    def _link_of(self, row: Row, previous: str) -> str | None:
        """Return the link that a stored row should have after ``previous``; None when it is nothing that we wrote."""
        keys = self._by_id.get(row["key_id"])
        if keys is None:
            return None
        try:
            return keys.link(previous, {**row, "detail": json.loads(row["detail"], object_pairs_hook=_unambiguous)})
        except (TypeError, ValueError, RecursionError):
            return None

    async def _named(self, problem: Problem, row: Row, until: int | None) -> Problem:
        """Tell a row that does not fit from one that would fit elsewhere, or that stands where a removed one stood."""
        if problem != "edited":
            return problem
        with contextlib.suppress(InternalError):  # a later record may be one that cannot be read
            if await self._fits_elsewhere(row):
                return "reordered"
        count = await self._database.read(_count_records)
        return "removed" if until is not None and count < until else "edited"

    async def _fits_elsewhere(self, row: Row) -> bool:
        """Whether the record follows another one's link: by its own link, or by the link that now stands behind that."""
        if self._link_of(row, GENESIS) is None:
            return False
        before, links = 0, [GENESIS]
        while found := await self._database.read(partial(_links_after, number=before)):
            before = found[-1]["number"]
            links.extend(str(one["chain"]) for one in found)
            for previous, following in itertools.pairwise([*links, ""]):
                if self._link_of(row, previous) in {row["chain"], following}:
                    return True
            links = links[-1:]
            await asyncio.sleep(0)
        return False

    async def _check_head(self, head: _Head | None, walked: _Walked) -> _Break | None:
        """Find a head that is not ours, is gone, or is an older copy that counts fewer records than there are."""
        first, last = await self._database.read(lambda session: session.connection().execute(_FIRST_AND_LAST).one())
        latest = await self._database.read(self._head)  # read after the records: it counts at least those
        count = 0 if latest is None else latest.count
        if first is not None and first < 1:
            return _Break("edited", first)
        if any(one is not None and not one.genuine for one in (head, latest)):
            return _Break("head_forged", walked.last + 1)
        if last is not None and last > count:
            return _Break("head_forged", count + 1 if latest is not None else walked.last + 1)
        if head is not None and not _same(head.chain, walked.chain):
            return _Break("head_forged", walked.last + 1)
        return None

    async def _check_checkpoints(self) -> tuple[_Break | None, int]:
        """Compare every checkpoint with the chain; return the first break, cut tails before forgeries, and the count."""
        forged: _Break | None = None
        checked = 0
        async with contextlib.aclosing(self._checkpoint_batches()) as batches:
            async for batch in batches:
                checked += len(batch)
                signed = await asyncio.to_thread(lambda rows: list(filter(self._is_signed, rows)), batch)
                if len(signed) < len(batch):
                    forged = _Break("checkpoint_forged", None)
                contradiction = await self._contradiction(signed)
                if contradiction is not None:
                    return contradiction, checked
        return forged, checked

    async def _contradiction(self, signed: Sequence[Row]) -> _Break | None:
        """Return where the chain lacks a record that was signed for, or has another in its place."""
        numbers = [one["count"] for one in signed]
        links = await self._database.read(partial(_links_of, numbers=numbers))
        wrong = [one["count"] for one in signed if not _same(links.get(one["count"]), one["chain"])]
        if not wrong:
            return None
        _, last = await self._database.read(lambda session: session.connection().execute(_FIRST_AND_LAST).one())
        return _Break("cut_tail", min(*wrong, (last or 0) + 1))

    async def _checkpoint_batches(self) -> AsyncGenerator[Sequence[Row]]:
        """Read the checkpoints of the database, then those of each file."""
        after: int | None = None
        while batch := await self._database.read(partial(_checkpoints_after, count=after)):
            yield batch
            after = batch[-1]["count"]
        for path in dict.fromkeys(self._second_places):
            if path is not None:
                async with contextlib.aclosing(_file_batches(path)) as batches:
                    async for lines in batches:
                        yield lines

    # --- search, erase, close

    async def search(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        connection_id: str | None = None,
        subject: str | None = None,
        integration: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int,
        before_number: int | None = None,
    ) -> list[AuditRecord]:
        """Return at most ``limit`` records, newest first; None does not restrict. ``since <= at < until``, epoch seconds.

        ``before_number`` continues a list below that number. Raises ``DatabaseUnavailable``.
        """
        equal = {"actor": actor, "action": action, "connection_id": connection_id}
        equal |= {"subject": subject, "integration": integration}
        query = select(AuditRecord).order_by(col(AuditRecord.number).desc()).limit(limit)
        query = query.where(*(_RECORDS.c[name] == value for name, value in equal.items() if value is not None))
        if since is not None:
            query = query.where(AuditRecord.at >= since)
        if until is not None:
            query = query.where(AuditRecord.at < until)
        if before_number is not None:
            query = query.where(AuditRecord.number < before_number)
        return await self._database.read(lambda session: list(session.exec(query).all()))

    def erase_subject(self, session: Session, subject: str) -> int:
        """Set ``subject`` to null in every record of the caller's transaction; return how many. The chain still verifies."""
        erase = sa.update(_RECORDS).where(_RECORDS.c.subject == subject).values(subject=None)
        return session.connection().execute(erase).rowcount

    async def aclose(self) -> None:
        """Write what still waits, then return. The database stays open: it is the caller's."""
        await self._writer.aclose()


def _broken(found: _Break, count: int, checked: int = 0) -> Verification:
    return Verification(
        ok=False, count=count, first_broken=found.number, problem=found.problem, checked_checkpoints=checked
    )


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that occurs twice: readers would differ on which one counts."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _to_sign(checkpoint: Row) -> bytes:
    return b"broker audit checkpoint 1\n" + _encode(checkpoint).encode()


# --- statements -----------------------------------------------------------------------------------------------------------

_MAKE_HEAD = sa.text(
    "INSERT INTO audit_head (id, count, chain, mac) VALUES (1, :count, :chain, :mac) ON CONFLICT DO NOTHING"
)
_FIRST_AND_LAST = sa.select(sa.func.min(_RECORDS.c.number), sa.func.max(_RECORDS.c.number))
_STORED = [
    sa.cast(_RECORDS.c.detail, sa.Text).label("detail") if column.name == "detail" else column for column in _RECORDS.c
]


def _rows(session: Session, query: sa.Select[Any]) -> Sequence[Row]:
    return cast("Sequence[Row]", session.connection().execute(query).mappings().all())


def _records_after(session: Session, *, number: int, until: int | None, size: int) -> Sequence[Row]:
    """Return the next batch as it is stored, ``detail`` as text: an attacker's row need not fit the column's type."""
    query = sa.select(*_STORED).where(_RECORDS.c.number > number).order_by(_RECORDS.c.number).limit(size)
    if until is not None:
        query = query.where(_RECORDS.c.number <= until)
    return _rows(session, query)


def _count_records(session: Session) -> int:
    return int(session.connection().execute(sa.select(sa.func.count()).select_from(_RECORDS)).scalar_one())


def _links_after(session: Session, *, number: int) -> Sequence[Row]:
    query = sa.select(_RECORDS.c.number, _RECORDS.c.chain).where(_RECORDS.c.number > number)
    return _rows(session, query.order_by(_RECORDS.c.number).limit(BATCH))


def _links_of(session: Session, *, numbers: Sequence[int]) -> dict[int, str]:
    query = sa.select(_RECORDS.c.number, _RECORDS.c.chain).where(_RECORDS.c.number.in_(numbers))
    return {row["number"]: row["chain"] for row in _rows(session, query)}


def _checkpoints_after(session: Session, *, count: int | None) -> Sequence[Row]:
    query = sa.select(_CHECKPOINTS).order_by(_CHECKPOINTS.c.count).limit(BATCH)
    if count is not None:
        query = query.where(_CHECKPOINTS.c.count > count)
    return _rows(session, query)


def _store_checkpoint(session: Session, *, row: Row) -> None:
    """Keep the checkpoint; another process may have written one of the same count, which is as good."""
    session.connection().execute(_STORE_CHECKPOINT, dict(row))


_STORE_CHECKPOINT = sa.text(
    "INSERT INTO audit_checkpoints (count, chain, at, key_id, signature) "
    "VALUES (:count, :chain, :at, :key_id, :signature) ON CONFLICT DO NOTHING"
)


async def _file_batches(path: Path) -> AsyncGenerator[Sequence[Any]]:
    """Read a second place in batches; a file that is not there yet holds nothing. Raises ``AuditUnavailable``."""
    try:
        with path.open("rb") as file:
            lines = iter(partial(file.readline, LONGEST_CHECKPOINT_LINE), b"")
            while chunk := await asyncio.to_thread(lambda: list(itertools.islice(lines, BATCH))):
                yield list(_parsed(chunk))
    except FileNotFoundError:
        return
    except OSError as error:
        raise AuditUnavailable("A place of audit checkpoints could not be read") from error


def _parsed(lines: Sequence[bytes]) -> Iterator[Any]:
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line, object_pairs_hook=_unambiguous)


# --- the root key ---------------------------------------------------------------------------------------------------------


async def open_audit(database: Database, sealer: Sealer, settings: Settings) -> Audit:
    """Load the audit root key, or make it if there is none; processes that start at once end with the same one.

    Raises ``AuditUnavailable`` when the current key does not open or the database is gone. A previous key that does not open
    is left out: its records no longer verify, new ones are written all the same.
    """
    try:
        rows = await database.read(_root_keys)
        if not any(row.state == "current" for row in rows):
            rows = await _make_root_key(database, sealer)
    except DATABASE_ERRORS as error:
        raise AuditUnavailable from error
    current = _opened(sealer, [row for row in rows if row.state == "current"])
    if not current:
        raise AuditUnavailable("The audit key does not open")
    return Audit(
        database,
        current[0],
        sinks=settings.audit_sinks,
        checkpoints=settings.audit_checkpoints,
        previous_keys=_opened(sealer, [row for row in rows if row.state == "previous"]),
    )


def _opened(sealer: Sealer, rows: Sequence[SystemKey]) -> list[bytes]:
    keys = []
    for row in rows:
        with contextlib.suppress(SecretUnreadable):
            keys.append(sealer.open(row.sealed_key, owner=_owner(row.id), purpose=PURPOSE, version=1))
    return keys


def _root_keys(session: Session) -> Sequence[SystemKey]:
    return session.exec(select(SystemKey).where(SystemKey.purpose == PURPOSE)).all()


async def _make_root_key(database: Database, sealer: Sealer) -> Sequence[SystemKey]:
    """Insert a fresh key; if another process was first (the index allows one current key), take that one."""
    root = secrets.token_bytes(KEY_BYTES)
    key_id = _keys(root).id
    sealed = sealer.seal(root, owner=_owner(key_id), purpose=PURPOSE, version=1)

    def insert(session: Session) -> None:
        session.add(SystemKey(id=key_id, purpose=PURPOSE, sealed_key=sealed, created_at=now(session)))

    with contextlib.suppress(IntegrityError):
        await database.transaction(insert)
    return await database.read(_root_keys)


def _owner(key_id: str) -> str:
    return f"system_keys/{key_id}"
