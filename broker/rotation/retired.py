"""The net under the floor of data keys: a retired key is kept for a day, unused, and comes back if something is under it.

The floor holds for who asks it. A process of an older version does not, nor does an operator who restores a row from a
backup; what they leave under a retired key would be lost the moment that it is shredded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.audit import Entry
from broker.database import Database, now
from broker.models import DataKey
from broker.vault import SecretUnreadable
from broker.vault.keyring import Sealer, Wrapping
from broker.vault.sealed_places import BATCH, PLACES, Row

SHRED_AFTER_SECONDS = 86_400.0
SHREDDED, REVIVED = "key.shredded", "key.revived"
Act = Callable[[Session], "Entry | None"]
log = structlog.get_logger()


async def look_after(database: Database, wrapping: Wrapping) -> list[Act]:
    """Return what has to be done with retired data keys, each act for a transaction of its own; it returns what to audit.

    A key with a value under it that opens is live again, as a previous one: every process loads it, and the next rotation
    takes it along. One that was retired ``SHRED_AFTER_SECONDS`` ago and has none is shredded. Until then rows are found by
    their columns, which is cheap; before shredding by their bytes too. Raises ``DatabaseUnavailable``, and
    ``SecretStoreUnavailable`` when a key that is needed cannot be unwrapped now.
    """
    keys, at = await database.read(_unshredded)
    acts: list[Act] = []
    for key in keys:
        due = key.retired_at is not None and key.retired_at + SHRED_AFTER_SECONDS <= at
        if due or await database.read(partial(_count, key_id=key.id, by_column=True)) > 0:
            sealer = await _unwrapped(wrapping, key)
            acts.append(partial(_settle, key_id=key.id, sealer=sealer, due=due))
    return acts


def any_opens(session: Session, sealer: Sealer, key_id: str, *, by_column: bool = False) -> bool:
    """Return whether any value under a data key opens with ``sealer``."""
    for place in PLACES:
        after = None
        while rows := place.batch(session, key_id, after, BATCH, by_column=by_column):
            if any(_opens(sealer, row) for row in rows):
                return True
            after = rows[-1].pk
    return False


def _opens(sealer: Sealer, row: Row) -> bool:
    try:
        sealer.open(row.sealed, owner=row.owner, purpose=row.purpose, version=row.version)
    except SecretUnreadable:
        return False
    return True


def _unshredded(session: Session) -> tuple[list[DataKey], float]:
    kept = (col(DataKey.retired_at).is_not(None), sa.func.length(col(DataKey.wrapped)) > 0)
    return list(session.exec(select(DataKey).where(*kept))), now(session)


def _count(session: Session, key_id: str, *, by_column: bool) -> int:
    return sum(place.count_under(session, key_id, by_column=by_column) for place in PLACES)


async def _unwrapped(wrapping: Wrapping, key: DataKey) -> Sealer | None:
    """Return what opens values under a retired key; None when the key does not open with what is here."""
    try:
        return Sealer(wrapping, {key.id: await wrapping.unwrap(key.wrapped_by, key.id, key.wrapped)}, key.id)
    except SecretUnreadable:
        return None


def _settle(session: Session, key_id: str, sealer: Sealer | None, *, due: bool) -> Entry | None:
    """Revive or shred a key, whose row is locked from here on, or leave it as it is."""
    key = session.get(DataKey, key_id, with_for_update=True)
    if key is None or key.retired_at is None or key.wrapped == b"":
        return None  # another worker was first
    left = _count(session, key_id, by_column=not due)
    if left and sealer is None:
        log.critical("key.retired_unreadable", key=key_id, values=left)  # another keyring may open it: it is kept
        return None
    if left and sealer is not None and any_opens(session, sealer, key_id, by_column=not due):
        key.retired_at, key.activated_at = None, key.activated_at or key.created_at
        return _written(session, key, REVIVED, left)
    if not due:
        return None  # what does not open was abandoned by a person
    key.wrapped = b""
    return _written(session, key, SHREDDED, left)


def _written(session: Session, key: DataKey, action: str, left: int) -> Entry:
    session.add(key)
    return Entry(action, "worker", detail={"class": "data", "key": key.id, "values": left})
