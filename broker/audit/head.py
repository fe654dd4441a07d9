"""The head row: count and last link under a MAC; whoever holds its lock writes next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa
from sqlmodel import Session

from broker.audit.chain import GENESIS, Keys, KeySet
from broker.errors import AuditUnavailable
from broker.models import AuditHead

FORGED = "The head of the audit chain was changed from outside"
_HEAD = cast("sa.Table", AuditHead.__table__)  # type: ignore[attr-defined]
_MAKE_HEAD = sa.text(
    "INSERT INTO audit_head (id, count, chain, mac) VALUES (1, :count, :chain, :mac) ON CONFLICT DO NOTHING"
)

_FORGET_HEAD = sa.text("DELETE FROM audit_head")
_MOVE_HEAD = sa.text("UPDATE audit_head SET count = :count, chain = :chain, mac = :mac WHERE id = 1")


@dataclass(frozen=True, slots=True)
class Head:
    """The head row as found; ``genuine``: one of our keys made its MAC."""

    count: int
    chain: str
    genuine: bool


def read_head(session: Session, keys: KeySet) -> Head | None:
    """Return the head as it is now, genuine or not, None before the first record. Waits for no lock."""
    return _found(session, keys, _QUERY)


def lock_head(session: Session, keys: KeySet) -> Head:
    """Return the genuine head, made if there is none, and locked until the transaction ends.

    Raises ``AuditUnavailable`` for a forged one: whoever writes on it makes it genuine. Waits no longer than the database's
    lock time-out.
    """
    head = _found(session, keys, _LOCKING_QUERY)
    if head is None:
        session.connection().execute(_MAKE_HEAD, _values(keys.current, 0, GENESIS))
        head = _found(session, keys, _LOCKING_QUERY)
    if head is None or not head.genuine:
        raise AuditUnavailable(FORGED)
    return head


def find_and_lock_head(session: Session, keys: KeySet) -> Head | None:
    """As ``read_head``, and keep its lock until the transaction ends."""
    return _found(session, keys, _LOCKING_QUERY)


def put_head(session: Session, keys: Keys, count: int, chain: str) -> None:
    """Put a head there, whatever was there before: only for an operator who accepts a break."""
    connection = session.connection()
    connection.execute(_FORGET_HEAD)
    connection.execute(_MAKE_HEAD, _values(keys, count, chain))


def move_head(session: Session, keys: KeySet, count: int, chain: str) -> None:
    """Let the head, whose lock is held, count up to the last record and hold its link."""
    session.connection().execute(_MOVE_HEAD, _values(keys.current, count, chain))


_QUERY = sa.select(_HEAD.c.count, _HEAD.c.chain, _HEAD.c.mac).where(_HEAD.c.id == 1)
_LOCKING_QUERY = _QUERY.with_for_update()


def _found(session: Session, keys: KeySet, query: sa.Select[Any]) -> Head | None:
    row = session.connection().execute(query).one_or_none()
    if row is None:
        return None
    count, chain, mac = row
    return Head(count, chain, genuine=keys.wrote_head(count, chain, mac))


def _values(keys: Keys, count: int, chain: str) -> dict[str, Any]:
    return {"count": count, "chain": chain, "mac": keys.head_mac(count, chain)}
