"""Rotation of key-encryption keys: every data key is unwrapped and wrapped again by the newest one; no secret is touched.

The operator puts the new key first in the keyring (with Transit the rotation has Vault make a new version). The retired key
wraps nothing any more, but backups hold data keys under it: the operator keeps it until the last of them has expired.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.database import Database, now
from broker.errors import Conflict, SecretStoreUnavailable
from broker.models import DataKey, KeyCheck, Rotation
from broker.rotation.passes import begin_pass, count_batch, end_pass
from broker.rotation.steps import ACKNOWLEDGE, FLOOR, PUBLISH, REWRITE, KeyRow, Plan, Record, acknowledged, go_on
from broker.vault import SecretUnreadable
from broker.vault.floor import require_live_wrapping_key
from broker.vault.keyring import Wrapping

NAME = "encryption"
BATCH = 20  # with Transit each is three calls over the network
PLACE = "data_keys.wrapped"
RESTORES = "keep the old keys where they are until the last backup that was made before this has expired"


class EncryptionKeys:
    """The key-encryption keys. ``rotate`` makes a new newest key where the keys are made elsewhere (Transit)."""

    name = NAME
    steps: tuple[str, ...] = (PUBLISH, ACKNOWLEDGE, REWRITE, FLOOR)

    def __init__(
        self, database: Database, wrapping: Wrapping, rotate: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        """Keep the parts."""
        self._database = database
        self._wrapping = wrapping
        self._rotate = rotate

    async def plan(self) -> Plan:
        """See ``KeyClass``. ``Conflict``: the keyring's newest key is the one in use already, or was retired."""
        await self._wrapping.reload()
        newest = self._wrapping.newest_id
        checks, wrapped = await self._database.read(_in_use)
        if newest in checks and checks[newest].retired_at is not None:
            raise Conflict(f"the newest key {newest} was retired; put a key with a new id in front of it")
        old_keys = _old_keys(checks, wrapped, newest)
        if old_keys:
            places = {PLACE: sum(count for key_id, count in wrapped.items() if key_id != newest)}
            return Plan(old_keys, newest, places)
        if self._rotate is None:
            raise Conflict(f"the newest key {newest} wraps every data key; put a new key in front of it, then rotate")
        return Plan([newest], None, {PLACE: sum(wrapped.values())})

    async def act(self, rotation: Rotation) -> Record:
        """See ``KeyClass``."""
        if rotation.step == PUBLISH:
            return await self._publish(rotation)
        if rotation.step == ACKNOWLEDGE:
            return acknowledged(self.name, self.steps)
        await self._require_newest(str(rotation.new_key))
        return await self._rewrite(rotation) if rotation.step == REWRITE else self._floor

    async def _publish(self, rotation: Rotation) -> Record:
        if rotation.new_key is None and self._rotate is not None:
            await self._rotate()  # a crash after this costs a version that nothing was wrapped with
            await self._wrapping.reload()
        newest = self._wrapping.newest_id
        if newest != (rotation.new_key or newest) or newest == rotation.old_key:
            raise SecretStoreUnavailable("the rotation's new key is not the newest one here")

        def record(session: Session, rotation: Rotation) -> str:
            note_wrapping_key(session, self._wrapping, newest)
            rotation.new_key = newest
            go_on(rotation, self.steps)
            return "published"

        return record

    async def _require_newest(self, new_key: str) -> None:
        """Make sure that this process wraps with the rotation's key (SecretStoreUnavailable)."""
        if self._wrapping.newest_id != new_key:
            await self._wrapping.reload()
        if self._wrapping.newest_id != new_key:
            raise SecretStoreUnavailable("the rotation's new key is not the newest one here")

    async def _rewrite(self, rotation: Rotation) -> Record:
        new_key, after = str(rotation.new_key), rotation.position or ""
        rows = await self._database.read(lambda session: _under_others(session, new_key, after))
        if not rows:
            return self._end_of_pass
        fresh, unreadable = [], []
        for row in rows:
            try:
                fresh.append((row, await self._rewrapped(row)))
            except SecretUnreadable:
                unreadable.append(row.id)

        def record(session: Session, rotation: Rotation) -> None:
            moved = sum(_replace(session, row, new_key, wrapped) for row, wrapped in fresh)
            count_batch(rotation, moved, unreadable)
            rotation.position = rows[-1].id

        return record

    async def _rewrapped(self, row: DataKey) -> bytes:
        """Return the data key wrapped by the newest key; what comes back is opened once more before anything relies on it."""
        key = await self._wrapping.unwrap(row.wrapped_by, row.id, row.wrapped)
        wrapped_by, wrapped = await self._wrapping.wrap(row.id, key)
        if not hmac.compare_digest(await self._wrapping.unwrap(wrapped_by, row.id, wrapped), key):
            raise SecretStoreUnavailable("a data key did not come back as it was wrapped")
        await self._require_newest(wrapped_by)  # a reload in between would have wrapped by another one
        return wrapped

    def _end_of_pass(self, session: Session, rotation: Rotation) -> None:
        left = sum(count for key_id, count in _in_use(session)[1].items() if key_id != rotation.new_key)
        end_pass(rotation, left)

    def _floor(self, session: Session, rotation: Rotation) -> str | None:
        """Retire every other key, if it wraps nothing; who wraps a new data key by one holds its row meanwhile."""
        query = select(KeyCheck).where(KeyCheck.key_id != rotation.new_key, col(KeyCheck.retired_at).is_(None))
        checks = list(session.exec(query.order_by(col(KeyCheck.key_id)).with_for_update()))
        if _under_others(session, str(rotation.new_key), ""):
            begin_pass(rotation)
            return None
        at = now(session)
        for check in checks:
            check.retired_at = at
            session.add(check)
        rotation.detail = {**rotation.detail, "note": RESTORES}
        go_on(rotation, self.steps)
        return "retired"

    async def rows(self) -> list[KeyRow]:
        """See ``KeyClass``: those that are or were in use, and the newest."""
        checks, wrapped = await self._database.read(_in_use)
        newest = self._wrapping.newest_id
        ids = sorted({*checks, newest}, key=lambda one: (one != newest, -_made_at(checks, one), one))
        return [_key_row(one, newest, checks.get(one), wrapped.get(one, 0)) for one in ids]


def note_wrapping_key(session: Session, wrapping: Wrapping, key_id: str) -> None:
    """Write down that a key-encryption key is in use, with its check value (``KeyRetired`` for one that was retired)."""
    require_live_wrapping_key(session, key_id)
    if session.get(KeyCheck, key_id) is None:
        check = wrapping.check_value(key_id) or ""
        session.add(KeyCheck(key_id=key_id, check_value=check, created_at=now(session)))


def _in_use(session: Session) -> tuple[dict[str, KeyCheck], dict[str, int]]:
    """Return the known keys by id, and how many data keys that were not retired each wraps."""
    checks = {row.key_id: row for row in session.exec(select(KeyCheck))}
    wrapped_by = col(DataKey.wrapped_by)
    counted = sa.select(wrapped_by, sa.func.count()).where(col(DataKey.retired_at).is_(None)).group_by(wrapped_by)
    return checks, {str(row[0]): int(row[1]) for row in session.execute(counted)}


def _old_keys(checks: Mapping[str, KeyCheck], wrapped: Mapping[str, int], newest: str) -> list[str]:
    """Return what a rotation to the newest key would retire, the one that wraps most first (pure)."""
    live = {key_id for key_id, check in checks.items() if check.retired_at is None}
    return sorted((live | set(wrapped)) - {newest}, key=lambda key_id: (-wrapped.get(key_id, 0), key_id))


def _under_others(session: Session, new_key: str, after: str) -> list[DataKey]:
    query = select(DataKey).where(DataKey.wrapped_by != new_key, col(DataKey.retired_at).is_(None), DataKey.id > after)
    return list(session.exec(query.order_by(col(DataKey.id)).limit(BATCH)))


def _replace(session: Session, row: DataKey, new_key: str, wrapped: bytes) -> int:
    require_live_wrapping_key(session, new_key)
    same = (col(DataKey.id) == row.id, col(DataKey.wrapped) == row.wrapped, col(DataKey.retired_at).is_(None))
    update = sa.update(DataKey).where(*same).values(wrapped_by=new_key, wrapped=wrapped)
    return len(session.execute(update.returning(col(DataKey.id))).all())


def _made_at(checks: Mapping[str, KeyCheck], key_id: str) -> float:
    return checks[key_id].created_at if key_id in checks else 0.0


def _key_row(key_id: str, newest: str, check: KeyCheck | None, count: int) -> KeyRow:
    created_at = check.created_at if check is not None else None
    retired_at = check.retired_at if check is not None else None
    if retired_at is not None:
        state = "retired"
    elif key_id == newest:
        state = "current" if count else "next"
    else:
        state = "previous"
    return KeyRow(key_id, state, created_at, created_at, None, retired_at, {PLACE: count})
