"""Rotation of data keys: a new one is made, and whatever is sealed under another is opened and sealed anew, place by place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.database import Database, now
from broker.errors import InternalError, SecretStoreUnavailable
from broker.models import DataKey, Rotation
from broker.rotation.encryption import note_wrapping_key
from broker.rotation.passes import begin_pass, count_batch, end_pass
from broker.rotation.retired import Act, any_opens, look_after
from broker.rotation.steps import (
    ACKNOWLEDGE,
    FLOOR,
    PUBLISH,
    REWRITE,
    SWITCH,
    KeyRow,
    Plan,
    Record,
    acknowledged,
    go_on,
)
from broker.vault import SecretUnreadable
from broker.vault.floor import require_live_key
from broker.vault.keyring import Sealer, Wrapping, new_data_key
from broker.vault.sealed_places import PLACES, Place, Row

NAME = "data"
BATCH = 200
SETTLE_SECONDS = 2.0  # who has read a value under the old key opens it before the key is gone
GIVE_WAY = (
    "SET LOCAL lock_timeout = '300ms'"  # below PostgreSQL's deadlock timeout: of two, it is never the caller who fails
)

Spot = tuple[str, Place]


class DataKeys:
    """The data keys. A rotation replaces every one but the new one, so that what an earlier one left is covered too."""

    name = NAME
    steps: tuple[str, ...] = (PUBLISH, ACKNOWLEDGE, SWITCH, REWRITE, FLOOR)

    def __init__(
        self, database: Database, sealer: Sealer, wrapping: Wrapping, *, settle_seconds: float = SETTLE_SECONDS
    ) -> None:
        """Keep the parts. ``settle_seconds`` pass between the last look and the floor."""
        self._database = database
        self._sealer = sealer
        self._wrapping = wrapping
        self._settle_seconds = settle_seconds

    async def plan(self) -> Plan:
        """See ``KeyClass``: a new key can always be made."""
        rows = await self._database.read(_live_rows)
        old_keys = [row.id for row in sorted(rows, key=lambda row: (not row.current, -row.created_at))]
        return Plan(old_keys, None, await self._counts(old_keys))

    async def act(self, rotation: Rotation) -> Record:
        """See ``KeyClass``."""
        if rotation.step == PUBLISH:
            return self._publish((await new_data_key(self._wrapping))[0])
        if rotation.step == ACKNOWLEDGE:
            return acknowledged(self.name, self.steps)
        if rotation.step == SWITCH:
            return await self._switch(rotation)
        await self._require_keys(rotation)
        return await self._rewrite(rotation) if rotation.step == REWRITE else self._floor

    def _publish(self, fresh: DataKey) -> Record:
        def record(session: Session, rotation: Rotation) -> str:
            note_wrapping_key(session, self._wrapping, fresh.wrapped_by)
            fresh.created_at = now(session)
            session.add(fresh)
            rotation.new_key = fresh.id
            go_on(rotation, self.steps)
            return "published"

        return record

    async def _switch(self, rotation: Rotation) -> Record:
        """Let the new key seal what is new. Who learns of it late still writes under the old one; the last look finds that."""
        rows = await self._database.read(_live_rows)
        old_keys = [row.id for row in rows if row.id != rotation.new_key]
        total = sum((await self._counts(old_keys)).values())

        def record(session: Session, rotation: Rotation) -> str:
            others = sa.update(DataKey).where(col(DataKey.id) != rotation.new_key, col(DataKey.current).is_(True))
            session.execute(others.values(current=False))
            new = sa.update(DataKey).where(col(DataKey.id) == rotation.new_key, col(DataKey.retired_at).is_(None))
            values = {"current": True, "activated_at": now(session)}
            if session.execute(new.values(**values).returning(col(DataKey.id))).first() is None:
                raise InternalError  # somebody took the published key away: nothing is switched
            rotation.total = rotation.done + total
            rotation.detail = {**rotation.detail, "old_keys": old_keys}
            go_on(rotation, self.steps)
            begin_pass(rotation)
            return "switched"

        return record

    async def _require_keys(self, rotation: Rotation) -> None:
        """Make sure that this process has the keys and seals with the new one: else it would call everything unreadable."""
        wanted = {str(rotation.new_key), *_old_keys(rotation)}
        if not wanted <= set(self._sealer.key_ids) or self._sealer.current_key_id != rotation.new_key:
            await self._sealer.refresh(self._database)
        if not wanted <= set(self._sealer.key_ids) or self._sealer.current_key_id != rotation.new_key:
            raise SecretStoreUnavailable("a key of the rotation is not usable here")

    # Rewriting

    async def _rewrite(self, rotation: Rotation) -> Record:
        spots = [(key_id, place) for key_id in _old_keys(rotation) for place in PLACES]
        index, after = _position(rotation, spots)
        for place_at in range(index, len(spots)):
            key_id, place = spots[place_at]
            rows = await self._database.read(
                partial(place.batch, key_id=key_id, after=after if place_at == index else None, limit=BATCH)
            )
            if rows:
                return self._replacing(spots[place_at], rows)
        left = sum((await self._counts(_old_keys(rotation), by_column=False)).values())
        return partial(_end_pass, left)

    def _replacing(self, spot: Spot, rows: Sequence[Row]) -> Record:
        key_id, place = spot
        fresh: list[tuple[Row, bytes]] = []
        unreadable = []
        for row in rows:
            try:
                fresh.append((row, self._sealed_anew(row)))
            except SecretUnreadable:
                unreadable.append(f"{place.name} {'/'.join(map(str, row.pk))}")

        def record(session: Session, rotation: Rotation) -> None:
            if session.get_bind().dialect.name == "postgresql":
                session.execute(sa.text(GIVE_WAY))
            require_live_key(session, str(rotation.new_key))
            count_batch(rotation, _replace(session, place, str(rotation.new_key), fresh), unreadable)
            rotation.position = json.dumps([key_id, place.name, list(rows[-1].pk)])

        return record

    def _sealed_anew(self, row: Row) -> bytes:
        plaintext = self._sealer.open(row.sealed, owner=row.owner, purpose=row.purpose, version=row.version)
        return self._sealer.seal(plaintext, owner=row.owner, purpose=row.purpose, version=row.version)

    # The end

    def _floor(self, session: Session, rotation: Rotation) -> str | None:
        """Lock the old keys, count, and retire them; whoever writes under one holds its row, so nothing comes in between.

        They stay wrapped for a day (``broker.rotation.retired``), for writers that do not ask the floor.
        """
        at = now(session)
        if at < rotation.detail.get("clean_at", 0.0) + self._settle_seconds:
            return None
        query = select(DataKey).where(col(DataKey.id).in_(_old_keys(rotation))).order_by(col(DataKey.id))
        keys = list(session.exec(query.with_for_update()))
        left = sum(place.count_under(session, key.id) for key in keys for place in PLACES)
        if left and not (rotation.detail.get("abandon_unreadable") and self._none_opens(session, keys)):
            begin_pass(rotation)
            return None
        for key in keys:
            key.retired_at, key.current = at, False
            session.add(key)
        rotation.detail = {**rotation.detail, "abandoned": left} if left else rotation.detail
        go_on(rotation, self.steps)
        return "retired"

    def _none_opens(self, session: Session, keys: Sequence[DataKey]) -> bool:
        """Return whether all that is left under these keys is unreadable; with the keys locked, so that it stays so."""
        return not any(any_opens(session, self._sealer, key.id) for key in keys)

    async def retired(self) -> list[Act]:
        """Return what has to be done with keys that a rotation retired: see ``look_after``."""
        return await look_after(self._database, self._wrapping)

    # Reading

    async def _counts(self, key_ids: Sequence[str], *, by_column: bool = True) -> dict[str, int]:
        """Return how many values are under these keys, by place; other work comes between two places."""
        counts = dict.fromkeys((place.name for place in PLACES), 0)
        for key_id, place in ((key_id, place) for key_id in key_ids for place in PLACES):
            count = partial(place.count_under, key_id=key_id, by_column=by_column)
            counts[place.name] += await self._database.read(count)
        return counts

    async def rows(self) -> list[KeyRow]:
        """See ``KeyClass``. What was abandoned under a retired key is not counted."""
        rows = await self._database.read(lambda session: list(session.exec(select(DataKey))))
        rows.sort(key=lambda row: (-row.created_at, row.id))
        return [_key_row(row, None if row.retired_at else await self._counts([row.id])) for row in rows]


def _end_pass(left: int, session: Session, rotation: Rotation) -> None:
    end_pass(rotation, left)
    if rotation.step == FLOOR:
        rotation.detail = {**rotation.detail, "clean_at": now(session)}


def _replace(session: Session, place: Place, key_id: str, fresh: Sequence[tuple[Row, bytes]]) -> int:
    """Put new bytes where still the old ones stand, in one statement: as ``Place.replace``, which takes 1 ms a row."""
    if not fresh:
        return 0
    pks, column = list(place.table.primary_key.columns), place.table.c[place.column]
    given = sa.values(
        *(sa.column(pk.name, pk.type) for pk in pks),
        sa.column("old_bytes", sa.LargeBinary),
        sa.column("new_bytes", sa.LargeBinary),
        name="given",
    )
    pairs = given.data([(*row.pk, row.sealed, sealed) for row, sealed in fresh]).cte("pairs")
    same = [pk == pairs.c[pk.name] for pk in pks]
    changes = {place.column: pairs.c.new_bytes, **({place.key_id: key_id} if place.key_id is not None else {})}
    update = sa.update(place.table).where(*same, column == pairs.c.old_bytes).values(**changes)
    return len(session.execute(update.returning(*pks)).all())


def _old_keys(rotation: Rotation) -> list[str]:
    return list(rotation.detail.get("old_keys", ()))


def _position(rotation: Rotation, spots: Sequence[Spot]) -> tuple[int, list[str | int] | None]:
    """Return at which spot to go on and behind which primary key; from the beginning for a position of other keys (pure)."""
    if rotation.position is None:
        return 0, None
    key_id, place_name, after = json.loads(rotation.position)
    names = [(key, place.name) for key, place in spots]
    return (names.index((key_id, place_name)), after) if (key_id, place_name) in names else (0, None)


def _live_rows(session: Session) -> list[DataKey]:
    return list(session.exec(select(DataKey).where(col(DataKey.retired_at).is_(None))))


def _key_row(row: DataKey, places: Mapping[str, int] | None) -> KeyRow:
    if row.retired_at is not None:
        state = "retired"
    elif row.current:
        state = "current"
    else:
        state = "next" if row.activated_at is None else "previous"
    return KeyRow(row.id, state, row.created_at, row.activated_at, None, row.retired_at, places)
