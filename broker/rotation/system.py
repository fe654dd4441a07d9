"""Rotation of the broker's own root keys: audit, session, JWT signing, webhook signing.

Nothing is written anew: what the old key made stays good until its last day (``retire_at``), so the rotation is over with
the switch; the worker destroys the old key when its time has come.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.database import Database, now
from broker.errors import InternalError
from broker.models import Rotation, SystemKey, rfc3339
from broker.rotation.steps import ACKNOWLEDGE, PUBLISH, SWITCH, KeyRow, Plan, Record, acknowledged, go_on
from broker.vault.system_keys import SystemKeys, insert_key

SKEW_SECONDS = 300.0  # a replica that learns late of the switch, a verifier whose clock is late
STATES = ("next", "current", "previous", "retired")


class SystemKeyClass:
    """The keys of one purpose. ``life_seconds``: the longest life of anything made with one; None: it is needed for ever."""

    steps: tuple[str, ...] = (PUBLISH, ACKNOWLEDGE, SWITCH)

    def __init__(self, database: Database, keys: SystemKeys, *, life_seconds: float | None) -> None:
        """Keep the parts; the class is called as the keys' purpose is."""
        self.name = keys.purpose
        self._database = database
        self._keys = keys
        self._life_seconds = life_seconds

    async def plan(self) -> Plan:
        """See ``KeyClass``: a new key can always be made."""
        await self._keys.load()
        return Plan(old_keys=[self._keys.current.id], new_key=None)

    async def act(self, rotation: Rotation) -> Record:
        """See ``KeyClass``."""
        if rotation.step == PUBLISH:
            return self._publish(self._keys.new_row("next"))
        if rotation.step == ACKNOWLEDGE:
            return acknowledged(self.name, self.steps)
        return self._switch

    def _publish(self, fresh: SystemKey) -> Record:
        """Put the new key where every process finds it; one that is there already, of nobody's rotation, is taken."""

        def record(session: Session, rotation: Rotation) -> str:
            known = session.exec(
                select(SystemKey).where(SystemKey.purpose == self.name, SystemKey.state == "next")
            ).first()
            if known is None:
                insert_key(session, fresh)
            rotation.new_key = (known or fresh).id
            go_on(rotation, self.steps)
            return "published"

        return record

    def _switch(self, session: Session, rotation: Rotation) -> str:
        """Let the new key make what is new, from this transaction on; the index allows one current key at any time."""
        at = now(session)
        retire_at = None if self._life_seconds is None else at + self._life_seconds + SKEW_SECONDS
        mine = col(SystemKey.purpose) == self.name
        was_current = sa.update(SystemKey).where(mine, col(SystemKey.state) == "current")
        session.execute(was_current.values(state="previous", retire_at=retire_at))
        is_next = sa.update(SystemKey).where(
            mine, col(SystemKey.id) == rotation.new_key, col(SystemKey.state) == "next"
        )
        switched = session.execute(is_next.values(state="current", activated_at=at).returning(col(SystemKey.id)))
        if switched.first() is None:
            raise InternalError  # somebody took the published key away: nothing is switched
        rotation.detail = {**rotation.detail, "retire_at": rfc3339(retire_at)}
        go_on(rotation, self.steps)
        return "switched"

    async def rows(self) -> list[KeyRow]:
        """See ``KeyClass``."""
        query = select(SystemKey).where(SystemKey.purpose == self.name)
        rows = await self._database.read(lambda session: list(session.exec(query)))
        rows.sort(key=lambda row: (STATES.index(row.state), -row.created_at, row.id))
        return [KeyRow(row.id, row.state, row.created_at, row.activated_at, row.retire_at) for row in rows]


def retire_due(session: Session) -> list[tuple[str, str]]:
    """Destroy previous keys whose time has come, in the caller's transaction; return (purpose, id) of each."""
    due = select(SystemKey).where(SystemKey.state == "previous", col(SystemKey.retire_at) <= now(session))
    rows = list(session.exec(due.with_for_update()))
    for row in rows:
        row.state, row.sealed_key = "retired", b""
        session.add(row)
    return [(row.purpose, row.id) for row in rows]
