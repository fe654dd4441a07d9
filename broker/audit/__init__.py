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
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlmodel import Session

from broker.audit.accepting import Findings, find_all, write_acceptance
from broker.audit.chain import GENESIS, Keys, KeySet, key_set, key_set_of, keys_of, mac
from broker.audit.checkpoints import due_checkpoint, store_checkpoint, with_public_key
from broker.audit.copies import Batch, Copies, batch_of
from broker.audit.entries import Entry
from broker.audit.export import ExportVerification, check_export, export_lines
from broker.audit.head import FORGED
from broker.audit.places import CheckpointPlace, checkpoint_places
from broker.audit.records import (
    CALLED,
    HANDED_OUT,
    KnownHead,
    erase,
    first_and_last,
    link_at_head,
    link_entries,
    link_plainly,
    newest,
    stretch,
    subject_numbers,
)
from broker.audit.retention import next_piece, remove_piece
from broker.audit.sinks import line_of, places_of
from broker.audit.verify import Verification, verify_chain
from broker.database import Database, DriverFault, GroupWriter, PostgresDatabase, SqliteDatabase
from broker.errors import AuditUnavailable, BrokerError, DatabaseUnavailable, InternalError, SecretStoreUnavailable
from broker.models import AuditRecord
from broker.settings import Settings
from broker.vault import Vault
from broker.vault.keyring import Sealer
from broker.vault.system_keys import SystemKeys

__all__ = ["GENESIS", "Audit", "Entry", "ExportVerification", "Findings", "Verification", "check_export", "open_audit"]

PURPOSE = "audit"
DATABASE_ERRORS = (DatabaseUnavailable, InternalError)  # the second: a table is not as we made it
RECORD_TIMEOUT_SECONDS = 10.0
REFRESH_PAUSE_SECONDS = 1.0
ERASED_AT_ONCE = 500
STRETCH = 10_000  # 5 ms of SQLite, which searches on the event loop
DAY_SECONDS = 86_400.0


class Audit:
    """Writes, checks, verifies and searches the chain. One per process; every call may run at once with others."""

    def __init__(
        self,
        database: Database,
        key: bytes | SystemKeys,
        *,
        sinks: Sequence[str],
        checkpoints: Sequence[str],
        previous_keys: Sequence[bytes] = (),
        on_failure: Callable[[], None] | None = None,
        vault: Vault | None = None,
        retention_days: float | None = None,
    ) -> None:
        """Take the root keys, and places as in the settings (``ValueError`` else; other sinks than the database need a loop).

        ``key``: all of them, loaded, or the current one (32 bytes) beside ``previous_keys``. ``on_failure`` is called once for
        each ``record``, ``append`` and ``checkpoint`` that raises ``AuditUnavailable``, and whenever a copy begins to fail. It
        may be called on any thread, and must neither wait nor raise. ``vault``: for a checkpoint place in it.
        """
        self._database = database
        self._system_keys = key if isinstance(key, SystemKeys) else None
        self._derived: dict[str, Keys] = {}
        self._taken: tuple[str, ...] = ()
        self._refreshed_at = 0.0
        self._refreshing = asyncio.Lock()
        self._keys = key_set(key, previous_keys) if isinstance(key, bytes) else self._take()
        self._on_failure = on_failure
        self._retention_days = retention_days
        self._places: list[CheckpointPlace] = checkpoint_places(
            [one for one in checkpoints if one != "database"], vault
        )
        self._owed: dict[CheckpointPlace, tuple[str, int]] = {}
        others = places_of(sinks)
        self._copies = Copies(others, database, on_failure=self._count_failure) if others else None
        self._head: KnownHead | None = None  # as a group left it
        self._is_alone = False  # nobody else moved the head between the last two groups
        self._single = database.single if isinstance(database, PostgresDatabase) else None
        self._sqlite = database if isinstance(database, SqliteDatabase) else None
        self._writer: GroupWriter[Entry, tuple[str, Batch | None]] = GroupWriter(
            database, self._write_group, patience_seconds=RECORD_TIMEOUT_SECONDS, shortcut=self._write_shortly
        )

    # --- keys

    @property
    def system_keys(self) -> SystemKeys:
        """The root keys, for whoever refreshes and rotates them; ``RuntimeError`` where they were given as bytes."""
        if self._system_keys is None:
            raise RuntimeError("this audit has its keys for good")
        return self._system_keys

    @property
    def failing_copies(self) -> int:
        """How many sinks besides the database lack records now."""
        return 0 if self._copies is None else self._copies.failing

    def take_keys(self) -> None:
        """Go over to the root keys as ``SystemKeys`` has them now; the ones before stay when the current one does not open.

        Cheap when nothing has changed; each group of records begins with it, so nobody needs to call it. From any thread.
        """
        if (
            self._system_keys is not None
            and tuple(f"{one.id} {one.state}" for one in self._system_keys.all) != self._taken
        ):
            with contextlib.suppress(SecretStoreUnavailable):
                self._keys = self._take()

    def _take(self) -> KeySet:
        roots, current_id = self.system_keys.all, self.system_keys.current.id
        for root in roots:
            if root.id not in self._derived:
                self._derived[root.id] = keys_of(root.root)
        self._taken = tuple(f"{one.id} {one.state}" for one in roots)
        others = [self._derived[one.id] for one in roots if one.id != current_id]
        return key_set_of(self._derived[current_id], others)

    async def refresh_keys(self) -> bool:
        """Read the root keys again, once a second at most; return whether they are other ones. Raises DatabaseUnavailable."""
        async with self._refreshing:
            before = self._taken
            if self._system_keys is None or time.monotonic() - self._refreshed_at < REFRESH_PAUSE_SECONDS:
                return False
            await self._system_keys.refresh()
            self._refreshed_at = time.monotonic()
            self.take_keys()
            return self._taken != before

    def digest(self, secret: str) -> str:
        """Return a keyed digest of a credential: joins records without a hash that anyone could compute."""
        return mac(self._keys.current.digest, secret)

    def digests(self, secret: str) -> frozenset[str]:
        """Return what ``digest`` says and, for what was kept before a rotation, would have said under every other root key."""
        self.take_keys()
        return frozenset(mac(keys.digest, secret) for keys in self._keys.by_id.values())

    def subject_digest(self, subject: str) -> str:
        """Return the digest that stands for ``subject`` in the records, after an erasure too."""
        return self._keys.current.subject_digest(subject)

    def checkpoint_keys(self) -> dict[str, str]:
        """Return the public keys that checkpoints are checked with, by key id, the current one first.

        Each is an Ed25519 public key (RFC 8032), its 32 bytes as hex. Whoever is given them by a way that they trust can
        check the lines of a second place without any secret; ``broker.audit.checkpoints`` says how.
        """
        return {key_id: keys.public_key for key_id, keys in self._keys.by_id.items()}

    # --- writing

    async def record(self, entry: Entry) -> str:
        """Write one entry together with others that wait; return its ``aud_`` id once it is durable.

        That is in the database, and in every copy that is well: one that fails costs ``DEADLINE_SECONDS`` once, and catches up
        later. Raises ``AuditUnavailable`` within ``RECORD_TIMEOUT_SECONDS`` otherwise: release nothing then. The record may
        exist all the same (after a time-out): it says what was attempted.
        """
        try:
            record_id, batch = await self._submitted(entry)
        except AuditUnavailable:
            self._count_failure()
            raise
        except (*DATABASE_ERRORS, IntegrityError, TimeoutError) as error:
            self._count_failure()
            raise AuditUnavailable from error
        if self._copies is not None and batch is not None:
            await self._copies.settled(batch)
        return record_id

    async def _submitted(self, entry: Entry) -> tuple[str, Batch | None]:
        """Submit, once more where the head was made by a key that this process did not have yet."""
        before = self._taken
        try:
            return await self._writer.submit(entry)
        except AuditUnavailable as error:
            if error.detail != FORGED or not (await self.refresh_keys() or self._taken != before):
                raise
        return await self._writer.submit(entry)

    def append(self, session: Session, *entries: Entry) -> None:
        """Link entries inside the caller's transaction; call it last in it, since it locks the head row for all writers.

        Copies get them after the commit, which waits for none of them. Raises ``AuditUnavailable``. ``RuntimeError`` inside a
        savepoint, whose end nobody could tell from the commit.
        """
        if session.in_nested_transaction():
            raise RuntimeError("audit entries are appended outside savepoints")
        session.flush()  # the caller's own conflicts surface as they are, and before the head is locked
        self.take_keys()
        with self._counting_failures():
            rows = self._linked(session, entries)
        self._deliver_after_commit(session, rows)

    def _linked(self, session: Session, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        try:
            return link_entries(session, self._keys, entries)
        except SQLAlchemyError as error:
            failure = AuditUnavailable()
            failure.__cause__ = DriverFault(type(getattr(error, "orig", None) or error).__name__)
        raise failure  # outside the handler: what the driver says may quote values, and must not be its context

    def _deliver_after_commit(self, session: Session, rows: Sequence[Mapping[str, Any]]) -> Batch | None:
        copies = self._copies
        if copies is None or not rows:
            return None
        batch = batch_of(rows)
        sa.event.listen(session, "after_commit", lambda _session: copies.deliver_soon(batch), once=True)
        return batch

    def _write_group(self, session: Session, entries: Sequence[Entry]) -> list[tuple[str, Batch | None]]:
        """Link a group."""
        self.take_keys()
        rows = link_entries(session, self._keys, entries)
        number, last = rows[0]["number"], rows[-1]
        self._is_alone = self._head is not None and number == self._head.number + 1
        self._head = KnownHead(last["number"], last["chain"], last["at"] - time.monotonic())
        batch = self._deliver_after_commit(session, rows)
        return [(row["id"], batch) for row in rows]

    async def _write_shortly(self, entries: Sequence[Entry]) -> list[tuple[str, Batch | None]] | None:
        """Write a group by the few statements that this database needs; None where that cannot be, and nothing was written."""
        self.take_keys()
        rows = await (self._write_at_known_head(entries) if self._sqlite is None else self._write_plainly(entries))
        if rows is None:
            return None
        batch = None
        if self._copies is not None:
            batch = batch_of(rows)
            self._copies.deliver_soon(batch)
        return [(row["id"], batch) for row in rows]

    async def _write_plainly(self, entries: Sequence[Entry]) -> list[dict[str, Any]] | None:
        if self._sqlite is None:
            return None
        return await self._sqlite.plain_transaction(lambda driver, at: link_plainly(driver, at, self._keys, entries))

    async def _write_at_known_head(self, entries: Sequence[Entry]) -> list[dict[str, Any]] | None:
        """Write without reading the head first, where it is probably as the last group left it (PostgreSQL)."""
        head, is_alone, self._is_alone = self._head, self._is_alone, False
        if self._single is None or head is None or not is_alone:
            return None
        done = await self._single(partial(link_at_head, keys=self._keys, entries=entries, known=head))
        if done is None:
            return None
        self._head = done[1]
        self._is_alone = True
        return done[0]

    async def checkpoint(self, *, force: bool = False) -> None:
        """Sign (count, link) when 1,000 records or 60 s (database clock) have passed since the last; the worker calls it.

        ``force``: now, if there is any record since. Written to every other place, then to the database; a place that fails
        gets the newest one with the next call, and holds up no other for longer than a deadline. Raises ``AuditUnavailable``
        when one of them fails, also for a head that is not ours to sign.
        """
        with self._counting_failures():
            try:
                await self._write_checkpoint(force=force)
            except DATABASE_ERRORS as error:
                raise AuditUnavailable from error

    async def _write_checkpoint(self, *, force: bool) -> None:
        self.take_keys()
        row = await self._due(force=force)
        if row is not None:
            line = line_of(with_public_key(row, self._keys.current))
            self._owed = dict.fromkeys(self._places, (line, row["count"]))
        failed = await asyncio.gather(*map(self._pay, list(self._owed)))
        if row is not None:
            await self._database.transaction(partial(store_checkpoint, row=row))
        if any(failed):
            raise AuditUnavailable("A place of audit checkpoints could not be written")

    async def _due(self, *, force: bool) -> dict[str, Any] | None:
        try:
            return await self._database.read(partial(due_checkpoint, keys=self._keys, force=force))
        except AuditUnavailable:
            if not await self.refresh_keys():
                raise
        return await self._database.read(partial(due_checkpoint, keys=self._keys, force=force))

    async def _pay(self, place: CheckpointPlace) -> bool:
        """Write the checkpoint that a place is owed; return whether that failed."""
        line, count = self._owed[place]
        try:
            await place.write(line, count)
        except BrokerError:
            return True
        if self._owed.get(place) == (line, count):
            del self._owed[place]
        return False

    @contextlib.contextmanager
    def _counting_failures(self) -> Iterator[None]:
        try:
            yield
        except AuditUnavailable:
            self._count_failure()
            raise

    def _count_failure(self) -> None:
        if self._on_failure is not None:
            self._on_failure()

    # --- reading

    async def verify(self) -> Verification:
        """Check every record, the head and all checkpoints, those in second places too; name the first break.

        Streams in batches, so memory stays flat; may run while others write and sees what was committed when it began.
        A line in a second place that is not whole JSON was cut while it was written, and is passed over. Raises
        ``AuditUnavailable`` when a second place cannot be read, ``DatabaseUnavailable``.
        """
        await self.refresh_keys()
        return await verify_chain(self._database, self._keys, self._places)

    async def export(self, *, since: float | None = None, until: float | None = None) -> AsyncGenerator[str]:
        """Yield records as JSON lines, one or more at a time, with the subjects that are not erased; see ``audit.export``.

        ``since <= at < until``, epoch seconds. Every link is checked on the way: a break is named in the seals, of which none
        is then ``complete``. Raises ``DatabaseUnavailable``, ``AuditUnavailable``.
        """
        await self.refresh_keys()
        async with contextlib.aclosing(export_lines(self._database, self._keys, since=since, until=until)) as parts:
            async for lines in parts:
                yield lines

    def check_export(self, lines: Iterable[bytes]) -> ExportVerification:
        """Check the lines of an export with the root keys: its seals, each record's link to the one before, and its subject."""
        return check_export(lines, self.checkpoint_keys(), self._keys)

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

        Other actions than hand-outs and calls have an index. Else records are walked from the newest on, a million a second:
        an index on a column of theirs would be paid for by each of them. Others are served between two stretches of the walk.
        """
        equal = {"actor": actor, "action": action, "connection_id": connection_id}
        equal |= {"subject": subject, "integration": integration}
        query = newest(equal, since=since, until=until)
        size = STRETCH if action in {None, HANDED_OUT, CALLED} else None
        found: list[AuditRecord] = []
        before = before_number
        while True:
            rest = limit - len(found)
            part = partial(stretch, query=query, before=before, size=size, limit=rest)
            rows, before = await self._database.read(part)
            found += rows
            if before is None or len(found) >= limit:
                return found
            await asyncio.sleep(0)

    # --- erasing, cutting, accepting, closing

    async def erase(self, subject: str) -> int:
        """Set ``subject`` to null in every record there is; return in how many it stood. The chain still verifies.

        In short transactions, a stretch of numbers each, newest first; writers are not held up. Do it again after a crash: what
        is done stays done. Records that are written meanwhile are not looked at. Copies and checkpoints never hold a subject;
        exports do. Raises ``DatabaseUnavailable``.
        """
        first, last = await self._database.read(first_and_last)
        erased = 0
        while first is not None and last is not None and last >= first:
            part = partial(subject_numbers, after=last - STRETCH, last=last, subject=subject)
            numbers = await self._database.read(part)
            for some in (numbers[at : at + ERASED_AT_ONCE] for at in range(0, len(numbers), ERASED_AT_ONCE)):
                erased += await self._database.transaction(partial(erase, numbers=some, subject=subject))
            last -= STRETCH
            await asyncio.sleep(0)
        return erased

    async def cut(self, *, older_than_days: float | None = None) -> int:
        """Remove the records before the newest signed checkpoint that is so old; return how many. The worker calls it.

        By default by ``BROKER_AUDIT_RETENTION_DAYS``; nothing where that is not set. In pieces, each with the new floor and a
        record ``audit.cut`` in its transaction; any number of processes may do it at once. What does not verify is kept:
        ``AuditUnavailable``. Raises ``DatabaseUnavailable``.
        """
        days, removed = self._retention_days if older_than_days is None else older_than_days, 0
        if days is None:
            return 0
        self.take_keys()
        while piece := await next_piece(self._database, self._keys, older_than_seconds=days * DAY_SECONDS):

            def work(session: Session, piece: Any = piece) -> bool:  # noqa: ANN401 - bound to this turn of the loop
                rows = remove_piece(session, piece, self._keys)
                self._deliver_after_commit(session, rows or [])
                return rows is not None

            removed += piece.count if await self._database.transaction(work) else 0
        return removed

    async def accept(self, *, by: str, reason: str) -> str | None:
        """Accept every break that there is now, for an operator who has looked; return the id of the record of it.

        None when nothing was broken. ``verify`` then says what was accepted, by whom and why, and checks everything else: what
        changes later is a new break. Raises ``AuditUnavailable`` (also when the chain changed meanwhile: try again).
        """
        await self.refresh_keys()
        findings = await find_all(self._database, self._keys, self._places)

        def work(session: Session) -> list[dict[str, Any]]:
            rows = write_acceptance(session, findings, self._keys, by=by, reason=reason)
            self._deliver_after_commit(session, rows)
            return rows

        rows = await self._database.transaction(work)
        if not rows:
            return None
        self._head, self._is_alone = None, False
        await self.checkpoint(force=True)
        return str(rows[0]["id"])

    async def aclose(self) -> None:
        """Write what still waits, then return. The database stays open: it is the caller's."""
        await self._writer.aclose()
        if self._copies is not None:
            await self._copies.aclose()


async def open_audit(
    database: Database,
    sealer: Sealer,
    settings: Settings,
    *,
    on_failure: Callable[[], None] | None = None,
    vault: Vault | None = None,
) -> Audit:
    """Load the audit root keys, or make the first; processes that start at once end with the same one.

    Raises ``AuditUnavailable`` when the current key does not open or the database is gone. A previous key that does not open
    is left out: its records no longer verify, new ones are written all the same. ``on_failure``, ``vault``: see ``Audit``.
    """
    keys = SystemKeys(database, sealer, PURPOSE, id_of=lambda root: keys_of(root).id)
    try:
        await keys.load()
        return Audit(
            database,
            keys,
            sinks=settings.audit_sinks,
            checkpoints=settings.audit_checkpoints,
            on_failure=on_failure,
            vault=vault,
            retention_days=settings.audit_retention_days,
        )
    except SecretStoreUnavailable as error:
        raise AuditUnavailable("The audit key does not open") from error
    except DATABASE_ERRORS as error:
        raise AuditUnavailable from error
