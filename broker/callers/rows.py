"""MACs over the rows of callers and keys, so that who may write to the database alone cannot make a caller.

The MAC key is derived from the root keys of purpose ``rows`` (``vault.system_keys``), which open only with the keyring. It
covers every column that decides who gets in and what they may do; not a caller's ``created_at`` nor a key's
``last_used_at`` and ``warned_at``, which decide nothing. Rows of an installation from before there were MACs are taken over
once, in the transaction that makes the first such key. Afterwards a row without one is a forgery, also when all rows have
lost theirs: the key's row, and a record in the audit chain, say that the taking over is done. Without the key's row the audit
alone is asked, so it must be whole from its first record on, and know each of the rows.

A genuine row that is put back in an older version still has its MAC. That is found by the audit: each change of a row
records what its MAC begins with (``rows``), and ``put_back`` compares. A record of all rows (``ROWS_STATED``) is written before
retention removes those behind it, and the newest one is never removed, so what the audit does not know is put back too.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.audit import Audit, Entry
from broker.audit.retention import ROWS_STATED
from broker.database import Database
from broker.errors import SecretStoreUnavailable
from broker.models import AuditRecord, Caller, CallerKey, SystemKey
from broker.vault.keyring import Sealer, derive_key
from broker.vault.system_keys import SystemKeys, insert_key, owner_of

PURPOSE: Final = "rows"
MARKED, TAKEN_OVER = ROWS_STATED
LOCK: Final = 0x43414C4C  # "CALL": one change of callers at a time on PostgreSQL
_COVERED: Final = {
    Caller: ("id", "name", "roles", "grants", "expires_at"),
    CallerKey: ("id", "caller_id", "key_digest", "expires_at", "revoked_at", "created_at"),
}
WAY_BACK: Final = "look at `broker audit verify`; delete the callers, set a new BROKER_ADMIN_KEY, and make them anew"
Row = Caller | CallerKey
Change = tuple[int, str, dict[str, Any]]  # number, action and detail of an audit record
log = structlog.get_logger()


class RowMacs:
    """Signs rows and tells genuine ones. Calls may run at once."""

    def __init__(self, keys: SystemKeys) -> None:
        """Take the keys of purpose ``rows``, loaded."""
        self._keys = keys

    def sign(self, row: Row) -> None:
        """Set the row's MAC, which holds until a covered column changes (SecretStoreUnavailable without a key)."""
        current = self._keys.current
        row.mac = f"{current.id}:{row_mac(current.root, row)}"

    def is_genuine(self, row: Row) -> bool:
        """Return whether the row is as some holder of the keyring left it, now or at an earlier time.

        ``SecretStoreUnavailable`` without any key: then nothing can be told, and a genuine row must not be called forged.
        """
        if not self._keys.all:
            raise SecretStoreUnavailable("no key of the callers' rows opens")
        key_id, _, stored = (row.mac or "").partition(":")
        key = self._keys.get(key_id)
        return key is not None and hmac.compare_digest(row_mac(key.root, row).encode(), stored.encode())


def row_mac(root: bytes, row: Row) -> str:
    """Return HMAC-SHA256 over the covered columns under the key that is derived from ``root``, in hex (pure)."""
    kind = Caller if isinstance(row, Caller) else CallerKey
    values = [_plain(getattr(row, name)) for name in _COVERED[kind]]
    text = json.dumps([kind.__tablename__, *values], sort_keys=True, separators=(",", ":"))
    return hmac.new(_mac_key(root), text.encode(), hashlib.sha256).hexdigest()


def _plain(value: object) -> object:
    # a time that was given as a whole number comes back from the database as a double
    return float(value) if isinstance(value, int) else value


@lru_cache(maxsize=8)
def _mac_key(root: bytes) -> bytes:
    return derive_key(root, "mac of callers' rows")


async def open_rows(database: Database, sealer: Sealer, audit: Audit) -> SystemKeys:
    """Return the keys for ``RowMacs``, loaded; take over the rows of an older version, once.

    Without a key the whole audit is verified first. Raises ``DatabaseUnavailable``, and ``AuditUnavailable`` when it cannot be
    verified now: what is refused once is not taken over later.
    """
    keys = SystemKeys(database, sealer, PURPOSE)
    if await database.read(_has_no_key):
        found = await audit.verify()
        is_whole = found.ok and not found.floor and not found.accepted
        await sealer.write(database, lambda session, _: _take_over(session, keys, sealer, audit, is_whole=is_whole))
    await keys.load()
    return keys


def _has_no_key(session: Session) -> bool:
    return session.exec(select(SystemKey.id).where(SystemKey.purpose == PURPOSE)).first() is None


def _take_over(session: Session, keys: SystemKeys, sealer: Sealer, audit: Audit, *, is_whole: bool) -> None:
    """Make the first key and sign all rows with it, unless that was done before, whatever the rows look like now."""
    lock_callers(session)
    if not _has_no_key(session):
        return
    rows: list[Row] = [*session.exec(select(Caller)), *session.exec(select(CallerKey))]
    why = _why_not(rows, changes_since(session, -1), is_whole=is_whole)
    if why is not None:
        log.critical("caller.rows_key_missing", why=f"callers are refused: {why}", help=WAY_BACK)
        return
    first = keys.new_row("current")
    insert_key(session, first)
    root = sealer.open(first.sealed_key, owner=owner_of(first.id), purpose=PURPOSE, version=1)
    for row in rows:
        row.mac = f"{first.id}:{row_mac(root, row)}"
        session.add(row)
    callers = sum(isinstance(row, Caller) for row in rows)
    detail = {"callers": callers, "rows": {row.id: mark_of(row) for row in rows}, "key": first.id}
    audit.append(session, Entry(action=TAKEN_OVER, actor="system", detail=detail))


def _why_not(rows: Sequence[Row], changes: Sequence[Change], *, is_whole: bool) -> str | None:
    """Return why rows are not to be taken over, None when they are of a version without MACs (pure).

    ``is_whole``: the audit verifies from its first record on, and no break of it was accepted. That version recorded every
    caller and key that it made, and no MACs.
    """
    if any(action in {*ROWS_STATED, PUT_BACK} or "rows" in detail for _, action, detail in changes):
        return "their MACs were made by a key that is gone"
    if any(row.mac is not None for row in rows):
        return "some have a MAC, and there is no key"
    if not is_whole:
        return "they have no MACs, and the audit, which would say whether they ever had, is not whole"
    made = {str(detail.get(name)) for _, _, detail in changes for name in ("caller_id", "key_id")}
    if any(row.id not in made for row in rows):
        return "the audit does not know all of them, so the broker did not make them"
    return None


def lock_callers(session: Session) -> None:
    """Let one transaction at a time change callers: two admins that remove each other must not both succeed."""
    if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer anyway
        session.connection().exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")


# Older versions put back


CHANGES: Final = ("caller.created", "caller.updated", "caller.deleted", "caller.key_added", "caller.key_revoked")
PUT_BACK: Final = "caller.row_put_back"


def mark_of(row: Row) -> str | None:
    """Return the short form of a row's MAC that the audit keeps: enough to tell two versions apart."""
    return (row.mac or "").rpartition(":")[2][:16] or None


def changes_since(session: Session, number: int) -> Sequence[Change]:
    """Return the audit's records of changed rows after ``number``, oldest first."""
    columns = (col(AuditRecord.number), col(AuditRecord.action), col(AuditRecord.detail))
    query = sa.select(*columns).where(col(AuditRecord.action).in_([*CHANGES, PUT_BACK, *ROWS_STATED]))
    query = query.where(col(AuditRecord.action) != "connection.token")  # so the index of rare actions serves
    query = query.where(col(AuditRecord.number) > number).order_by(col(AuditRecord.number))
    return [(row[0], row[1], row[2]) for row in session.execute(query)]


def learned(known: dict[str, str | None], action: str, detail: Mapping[str, Any]) -> None:
    """Add to ``known``, the mark that each row has by the audit (None: deleted), what one more record says."""
    if action == "caller.deleted":
        known[str(detail.get("caller_id"))] = None
    known.update(detail.get("rows") or {})  # a record of an older version names none


def put_back(rows: Sequence[Row], known: Mapping[str, str | None]) -> list[Row]:
    """Return the rows that are not as the audit last knew them: deleted, unknown, or with another MAC (pure)."""
    return [row for row in rows if known.get(row.id) != mark_of(row)]


def stated_at(session: Session) -> float | None:
    """Return when the audit last had a record of all rows, in seconds since 1970; None for never."""
    query = select(AuditRecord.at).where(col(AuditRecord.action).in_(ROWS_STATED))
    query = query.where(col(AuditRecord.action) != "connection.token")
    return session.exec(query.order_by(col(AuditRecord.number).desc())).first()
