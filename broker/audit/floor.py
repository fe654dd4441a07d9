"""The floor row: where the chain begins since older records were removed, under a MAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import sqlalchemy as sa
from sqlmodel import Session

from broker.audit.chain import GENESIS, Keys, KeySet
from broker.models import AuditFloor

_FLOOR = cast("sa.Table", AuditFloor.__table__)  # type: ignore[attr-defined]
_QUERY = sa.select(_FLOOR.c.number, _FLOOR.c.chain, _FLOOR.c.mac).where(_FLOOR.c.id == 1)
_MAKE = sa.text(
    "INSERT INTO audit_floor (id, number, chain, mac, key_id, cut_at) VALUES (1, :number, :chain, :mac, :key_id, :at) "
    "ON CONFLICT DO NOTHING"
)
_MOVE = sa.text(
    "UPDATE audit_floor SET number = :number, chain = :chain, mac = :mac, key_id = :key_id, cut_at = :at "
    "WHERE id = 1 AND number = :before"
)
_REMOVE = sa.text("DELETE FROM audit_floor")


@dataclass(frozen=True, slots=True)
class Floor:
    """The last record that was removed and its link; 0 and the link before the first record where none was.

    ``genuine``: one of our keys made its MAC.
    """

    number: int
    chain: str
    genuine: bool


BOTTOM = Floor(0, GENESIS, genuine=True)


def read_floor(session: Session, keys: KeySet) -> Floor:
    """Return the floor as it is now. Waits for no lock."""
    row = session.connection().execute(_QUERY).one_or_none()
    if row is None:
        return BOTTOM
    number, chain, mac = row
    return Floor(number, chain, genuine=keys.wrote_floor(number, chain, mac))


def move_floor(session: Session, keys: Keys, before: int, number: int, chain: str, at: float) -> bool:
    """Raise the floor from record ``before`` to ``number``; False (nothing changed) when another process was first.

    Locks the floor until the transaction ends.
    """
    mac = keys.floor_mac(number, chain)
    values = {"number": number, "chain": chain, "mac": mac, "key_id": keys.id, "at": at}
    connection = session.connection()
    if connection.execute(_MOVE, {**values, "before": before}).rowcount:
        return True
    return before == 0 and connection.execute(_MAKE, values).rowcount == 1


def forget_floor(session: Session) -> None:
    """Remove a floor that is not ours."""
    session.connection().execute(_REMOVE)
