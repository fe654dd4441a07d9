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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlmodel import Session

from broker.audit.chain import GENESIS, key_set, mac
from broker.audit.checkpoints import due_checkpoint, store_checkpoint, with_public_key
from broker.audit.entries import Entry
from broker.audit.records import HANDED_OUT, KnownHead, erase, link_at_head, link_entries, newest, stretch
from broker.audit.root_key import root_keys
from broker.audit.sinks import Copies, line_of, places_of, write_lines
from broker.audit.verify import Verification, verify_chain
from broker.database import Database, DriverFault, GroupWriter, PostgresDatabase
from broker.errors import AuditUnavailable, DatabaseUnavailable, InternalError
from broker.models import AuditRecord
from broker.settings import Settings
from broker.vault.keyring import Sealer

__all__ = ["GENESIS", "Audit", "Entry", "Verification", "open_audit"]

DATABASE_ERRORS = (DatabaseUnavailable, InternalError)  # the second: a table is not as we made it
RECORD_TIMEOUT_SECONDS = 10.0
STRETCH = 10_000  # 5 ms of SQLite, which searches on the event loop


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
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        """Take the current root key (32 bytes), earlier ones, and places as in the settings (``ValueError`` else).

        ``on_failure`` is called whenever something could not be written: once for each ``record``, ``append`` and
        ``checkpoint`` that raises ``AuditUnavailable``, and for each transaction that does so after its commit. It may be
        called on any thread, and must neither wait nor raise.
        """
        self._database = database
        self._keys = key_set(key, previous_keys)
        self._sinks = places_of(sinks)
        self._second_places = places_of(checkpoints)
        self._on_failure = on_failure
        self._head: KnownHead | None = None  # as a group left it
        self._is_alone = False  # nobody else moved the head between the last two groups
        self._single = database.single if isinstance(database, PostgresDatabase) and not self._sinks else None
        self._writer: GroupWriter[Entry, tuple[str, Copies]] = GroupWriter(
            database, self._write_group, patience_seconds=RECORD_TIMEOUT_SECONDS, shortcut=self._write_at_known_head
        )

    def digest(self, secret: str) -> str:
        """Return a keyed digest of a credential: joins records without a hash that anyone could compute."""
        return mac(self._keys.current.digest, secret)

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
        """Write one entry together with others that wait; return its ``aud_`` id once it is durable in every sink.

        Raises ``AuditUnavailable`` within ``RECORD_TIMEOUT_SECONDS`` otherwise: release nothing then. The record may exist
        all the same (in the database, when only a copy failed; later, after a time-out): it says what was attempted.
        """
        try:
            record_id, copies = await self._writer.submit(entry)
        except AuditUnavailable:
            self._count_failure()
            raise
        except (*DATABASE_ERRORS, IntegrityError, TimeoutError) as error:
            self._count_failure()
            raise AuditUnavailable from error
        if copies.error is not None:
            self._count_failure()
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
        with self._counting_failures():
            rows = self._linked(session, entries)
        if self._sinks and rows:
            self._copies_of(session).lines.extend(map(line_of, rows))

    def _linked(self, session: Session, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        try:
            return link_entries(session, self._keys, entries)
        except SQLAlchemyError as error:
            failure = AuditUnavailable()
            failure.__cause__ = DriverFault(type(getattr(error, "orig", None) or error).__name__)
        raise failure  # outside the handler: what the driver says may quote values, and must not be its context

    def _copies_of(self, session: Session) -> Copies:
        """Return the lines that wait for this session's commit; the hook is registered with the first.

        It raises a failure out of the transaction, which is committed all the same.
        """
        if self not in session.info:
            session.info[self] = copies = Copies(self._sinks)

            def write(_session: Session) -> None:
                copies.write()
                if copies.error is not None:
                    with self._counting_failures():
                        raise copies.error

            sa.event.listen(session, "after_commit", write, once=True)
        return cast("Copies", session.info[self])

    def _write_group(self, session: Session, entries: Sequence[Entry]) -> list[tuple[str, Copies]]:
        """Link a group. A failed copy must not fail the transaction: the group writer would write the group again."""
        rows = link_entries(session, self._keys, entries)
        number, last = rows[0]["number"], rows[-1]
        self._is_alone = self._head is not None and number == self._head.number + 1
        self._head = KnownHead(last["number"], last["chain"], last["at"] - time.monotonic())
        copies = Copies(self._sinks)
        if self._sinks:
            copies.lines.extend(map(line_of, rows))
            sa.event.listen(session, "after_commit", lambda _session: copies.write(), once=True)
        return [(row["id"], copies) for row in rows]

    async def _write_at_known_head(self, entries: Sequence[Entry]) -> list[tuple[str, Copies]] | None:
        """Write a group without reading the head first, where it is probably as the last group left it."""
        head, is_alone, self._is_alone = self._head, self._is_alone, False
        if self._single is None or head is None or not is_alone:
            return None
        done = await self._single(partial(link_at_head, keys=self._keys, entries=entries, known=head))
        if done is None:
            return None
        rows, self._head = done
        self._is_alone = True
        return [(row["id"], Copies(())) for row in rows]

    async def checkpoint(self, *, force: bool = False) -> None:
        """Sign (count, link) when 1,000 records or 60 s (database clock) have passed since the last; the worker calls it.

        ``force``: now, if there is any record since. Written to the second places first, then to the database: a place
        that fails is tried again with the next call. Raises ``AuditUnavailable``, also for a head that is not ours to sign.
        """
        with self._counting_failures():
            try:
                await self._write_checkpoint(force=force)
            except DATABASE_ERRORS as error:
                raise AuditUnavailable from error

    async def _write_checkpoint(self, *, force: bool) -> None:
        row = await self._database.read(partial(due_checkpoint, keys=self._keys, force=force))
        if row is None:
            return
        line = line_of(with_public_key(row, self._keys.current))
        await asyncio.to_thread(write_lines, self._second_places, line)
        await self._database.transaction(partial(store_checkpoint, row=row))

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
        return await verify_chain(self._database, self._keys, self._second_places)

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

        Other actions than hand-outs have an index. Else records are walked from the newest on, a million a second: an index
        on a column of hand-outs would be paid for by each of them. Others are served between two stretches of the walk.
        """
        equal = {"actor": actor, "action": action, "connection_id": connection_id}
        equal |= {"subject": subject, "integration": integration}
        query = newest(equal, since=since, until=until)
        size = STRETCH if action in {None, HANDED_OUT} else None
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

    # --- erasing, closing

    def erase_subject(self, session: Session, subject: str) -> int:
        """Set ``subject`` to null in every record of the caller's transaction; return how many. The chain still verifies."""
        return erase(session, subject)

    async def aclose(self) -> None:
        """Write what still waits, then return. The database stays open: it is the caller's."""
        await self._writer.aclose()


async def open_audit(
    database: Database, sealer: Sealer, settings: Settings, *, on_failure: Callable[[], None] | None = None
) -> Audit:
    """Load the audit root key, or make it if there is none; processes that start at once end with the same one.

    Raises ``AuditUnavailable`` when the current key does not open or the database is gone. A previous key that does not open
    is left out: its records no longer verify, new ones are written all the same. ``on_failure``: see ``Audit``.
    """
    try:
        current, previous = await root_keys(database, sealer)
    except DATABASE_ERRORS as error:
        raise AuditUnavailable from error
    return Audit(
        database,
        current,
        sinks=settings.audit_sinks,
        checkpoints=settings.audit_checkpoints,
        previous_keys=previous,
        on_failure=on_failure,
    )
