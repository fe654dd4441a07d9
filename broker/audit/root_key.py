"""The root key that all others are derived from: made once, kept sealed in ``system_keys``."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence

from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select

from broker.audit.chain import KEY_BYTES, keys_of
from broker.database import Database, now
from broker.errors import AuditUnavailable
from broker.models import SystemKey
from broker.vault import SecretUnreadable
from broker.vault.keyring import Sealer

PURPOSE = "audit"


async def root_keys(database: Database, sealer: Sealer) -> tuple[bytes, list[bytes]]:
    """Return the current root key, made if there is none, and the previous ones that open.

    Processes that start at once end with the same one. Raises ``AuditUnavailable`` when the current key does not open, and
    what the database raises.
    """
    rows = await database.read(_rows)
    if not any(row.state == "current" for row in rows):
        rows = await _make(database, sealer)
    current = _opened(sealer, [row for row in rows if row.state == "current"])
    if not current:
        raise AuditUnavailable("The audit key does not open")
    return current[0], _opened(sealer, [row for row in rows if row.state == "previous"])


def _rows(session: Session) -> Sequence[SystemKey]:
    return session.exec(select(SystemKey).where(SystemKey.purpose == PURPOSE)).all()


async def _make(database: Database, sealer: Sealer) -> Sequence[SystemKey]:
    """Insert a fresh key; if another process was first (the index allows one current key), take that one."""
    root = secrets.token_bytes(KEY_BYTES)
    key_id = keys_of(root).id
    sealed = sealer.seal(root, owner=_owner(key_id), purpose=PURPOSE, version=1)

    def insert(session: Session) -> None:
        session.add(SystemKey(id=key_id, purpose=PURPOSE, sealed_key=sealed, created_at=now(session)))

    with contextlib.suppress(IntegrityError):
        await database.transaction(insert)
    return await database.read(_rows)


def _opened(sealer: Sealer, rows: Sequence[SystemKey]) -> list[bytes]:
    keys = []
    for row in rows:
        with contextlib.suppress(SecretUnreadable):
            keys.append(sealer.open(row.sealed_key, owner=_owner(row.id), purpose=PURPOSE, version=1))
    return keys


def _owner(key_id: str) -> str:
    return f"system_keys/{key_id}"
