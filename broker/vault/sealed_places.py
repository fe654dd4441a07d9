"""Every place of the database that holds sealed bytes, so that all can be found, counted, checked and sealed anew.

A new ``sealed_*`` column gets its line in ``PLACES`` (a test asks for it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlmodel import Session, SQLModel

from broker.models import DeviceFlow, Flow, RefreshJournal, SealedSecret, SystemKey, WebhookEvent
from broker.vault.floor import require_live_key
from broker.vault.keyring import Sealer, envelope_prefix
from broker.vault.system_keys import owner_of

BATCH = 500


class Row(NamedTuple):
    """One sealed value: its row's primary key, what it has to open for, and the bytes as they stand there, unverified.

    ``filed_under`` is the data key by the row's own column, where it has one.
    """

    pk: tuple[str | int, ...]
    owner: str
    purpose: str
    version: int
    sealed: bytes
    filed_under: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """One column of sealed bytes. ``bound`` says for whom a row's bytes open: (owner, purpose, version).

    Where ``key_id`` names an indexed column, what is sealed anew changes it too. A value is under a key when that column or
    the bytes themselves say so: who restores the bytes alone from a backup leaves the column behind. That walks over the
    whole table; ``by_column`` spares it, and trusts the column where there is one. ``emptied``: rows whose bytes were
    destroyed on purpose.
    """

    table: sa.Table
    column: str
    bound: Callable[[Any], tuple[str, str, int]] = field(repr=False)
    key_id: str | None = None
    emptied: sa.ColumnElement[bool] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """``table.column``."""
        return f"{self.table.name}.{self.column}"

    def count_under(self, session: Session, key_id: str, *, by_column: bool = False) -> int:
        """Return how many values are under a data key."""
        query = sa.select(sa.func.count()).select_from(self.table).where(self._under(key_id, by_column=by_column))
        return int(session.execute(query).scalar_one())

    def batch(
        self,
        session: Session,
        key_id: str | None,
        after: Sequence[str | int] | None,
        limit: int = BATCH,
        *,
        by_column: bool = False,
    ) -> list[Row]:
        """Return the first values under a data key (None: any) in the order of the primary keys, behind ``after``."""
        pks = list(self.table.primary_key.columns)
        query = sa.select(self.table).where(self._under(key_id, by_column=by_column)).order_by(*pks).limit(limit)
        if after is not None:
            query = query.where(sa.tuple_(*pks) > sa.tuple_(*after))
        return [self._row(found) for found in session.execute(query)]

    def one(self, session: Session, pk: Sequence[str | int]) -> Row | None:
        """Return one row's value as it is now; None when the row is gone or holds none."""
        query = sa.select(self.table).where(*self._is(pk), self._holds_one())
        found = session.execute(query).one_or_none()
        return None if found is None else self._row(found)

    def replace(self, session: Session, row: Row, new_sealed: bytes) -> bool:
        """Put new bytes where still ``row.sealed`` stands; False when another writer was there, or the row is gone.

        Raises ``KeyRetired`` when the new ones are under a data key that was retired meanwhile.
        """
        key_id = Sealer.key_id_of(new_sealed)
        require_live_key(session, key_id)
        changes = {self.column: new_sealed, **({self.key_id: key_id} if self.key_id is not None else {})}
        update = sa.update(self.table).where(*self._is(row.pk), self._sealed == row.sealed).values(**changes)
        return bool(session.execute(update).rowcount == 1)  # type: ignore[attr-defined]

    @property
    def _sealed(self) -> sa.Column[bytes]:
        return self.table.c[self.column]

    def _is(self, pk: Sequence[str | int]) -> list[sa.ColumnElement[bool]]:
        return [column == value for column, value in zip(self.table.primary_key.columns, pk, strict=True)]

    def _holds_one(self) -> sa.ColumnElement[bool]:
        there = self._sealed.is_not(None)
        return there if self.emptied is None else sa.and_(there, sa.not_(self.emptied))

    def _under(self, key_id: str | None, *, by_column: bool = False) -> sa.ColumnElement[bool]:
        if key_id is None:
            return self._holds_one()
        prefix = envelope_prefix(key_id)
        by_bytes = sa.func.substr(self._sealed, 1, len(prefix), type_=sa.LargeBinary) == prefix
        if self.key_id is None:
            return by_bytes
        filed = self.table.c[self.key_id] == key_id
        return filed if by_column else sa.or_(filed, by_bytes)

    def _row(self, found: sa.Row[Any]) -> Row:
        pk = tuple(getattr(found, column.name) for column in self.table.primary_key.columns)
        filed_under = getattr(found, self.key_id) if self.key_id is not None else None
        return Row(pk, *self.bound(found), getattr(found, self.column), filed_under)


def _table(model: type[SQLModel]) -> sa.Table:
    return cast("sa.Table", model.__table__)  # type: ignore[attr-defined]


_SYSTEM_KEYS = _table(SystemKey)
PLACES: tuple[Place, ...] = (
    Place(_table(SealedSecret), "sealed", lambda row: (row.owner, "secret", row.version), key_id="key_id"),
    Place(_table(Flow), "sealed_verifier", lambda row: (row.id, "verifier", 1)),
    Place(_table(Flow), "sealed_outcome", lambda row: (row.id, "outcome", 1)),
    Place(_table(DeviceFlow), "sealed_device_code", lambda row: (row.id, "device", 1)),
    Place(
        _table(RefreshJournal),
        "sealed_answer",
        lambda row: (f"connections/{row.connection_id}", "journal", row.fence),
    ),
    Place(_table(WebhookEvent), "sealed_body", lambda row: (row.id, "event", 1)),
    Place(
        _SYSTEM_KEYS,
        "sealed_key",
        lambda row: (owner_of(row.id), row.purpose, 1),
        emptied=sa.and_(_SYSTEM_KEYS.c.state == "retired", _SYSTEM_KEYS.c.sealed_key == b""),
    ),
)
