"""The floor of a key rotation: a write under a key that was retired is refused in the write's own transaction.

Whoever retires a key locks its row FOR UPDATE, counts what is left under it, and retires it only at zero. Whoever writes
something under a key holds its row FOR KEY SHARE until the commit. So neither can run in between the other, and a process
that slept through the whole rotation cannot leave anything behind that no key opens. SQLite has one writer at a time.
"""

from __future__ import annotations

from typing import Any, cast

import sqlalchemy as sa
from sqlmodel import Session, col

from broker.errors import SecretStoreUnavailable
from broker.models import DataKey, KeyCheck


class KeyRetired(SecretStoreUnavailable):
    """The key that the writer has was replaced meanwhile: it refreshes its keys and begins again."""


def require_live_key(session: Session, key_id: str) -> None:
    """Hold the data key as it is until the transaction ends (``KeyRetired`` when it was retired, or is not there)."""
    row = _held(session, col(DataKey.retired_at), col(DataKey.id) == key_id)
    if row is None or row[0] is not None:
        raise KeyRetired("the data key was retired")


def require_live_wrapping_key(session: Session, key_id: str) -> None:
    """Hold the key-encryption key as it is until the transaction ends (``KeyRetired``); one never seen is live."""
    row = _held(session, col(KeyCheck.retired_at), col(KeyCheck.key_id) == key_id)
    if row is not None and row[0] is not None:
        raise KeyRetired("the key-encryption key was retired")


def _held(session: Session, wanted: Any, condition: sa.ColumnElement[bool]) -> tuple[float | None] | None:  # noqa: ANN401
    query = sa.select(wanted).where(condition).with_for_update(read=True, key_share=True)  # FOR KEY SHARE
    return cast("tuple[float | None] | None", session.execute(query).first())
