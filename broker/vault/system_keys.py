"""The broker's own root keys by purpose (audit, session, jwt-signing …): one current, a next one, previous ones, all sealed."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker.database import Database, now
from broker.errors import SecretStoreUnavailable
from broker.models import SystemKey, new_id
from broker.vault import SecretUnreadable
from broker.vault.floor import require_live_key
from broker.vault.keyring import KEY_BYTES, Sealer

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, eq=False)
class RootKey:
    """A root key, 32 bytes that cannot print themselves. ``state``: next, current or previous."""

    id: str
    state: str
    root: bytes = field(repr=False)


class SystemKeys:
    """The root keys of one purpose. Calls may run at once; ``load`` first.

    What they mean is the owner's: it derives what it needs, and may keep what it derived by ``RootKey.id``. A key that does
    not open is logged; it is left out, and with it what was made with it, unless it has opened here before: an id names one
    key for ever. Without a current one nothing new can be made.
    """

    def __init__(
        self, database: Database, sealer: Sealer, purpose: str, *, id_of: Callable[[bytes], str] | None = None
    ) -> None:
        """``id_of`` names a new key by its bytes; by default a random ``key_…`` names it."""
        self._database = database
        self._sealer = sealer
        self.purpose = purpose
        self._id_of = id_of or (lambda _: new_id("key"))
        self._by_id: Mapping[str, RootKey] = {}
        self._unopened: frozenset[str] = frozenset()

    @property
    def current(self) -> RootKey:
        """The key that makes what is new (SecretStoreUnavailable when it does not open, and never has here)."""
        for key in self._by_id.values():
            if key.state == "current":
                return key
        raise SecretStoreUnavailable(f"the {self.purpose} key does not open")

    @property
    def all(self) -> Sequence[RootKey]:
        """Every key that opens or has opened here, of every state but retired: next, current, previous, newest first."""
        return tuple(self._by_id.values())

    def get(self, key_id: str) -> RootKey | None:
        """Return a key that still counts, None for others."""
        return self._by_id.get(key_id)

    async def load(self) -> None:
        """Read the keys, and make the first one; processes that start at once end with the same one.

        Raises ``DatabaseUnavailable``.
        """
        rows = await self._database.read(self._rows)
        if not any(row.state == "current" for row in rows):
            with contextlib.suppress(IntegrityError):  # another process was first: the index allows one current key
                await self._sealer.write(
                    self._database, lambda session, _: insert_key(session, self.new_row("current"))
                )
        await self.refresh()

    async def refresh(self) -> None:
        """Read the keys again, as other processes left them; what is known stays when the database fails, which raises.

        A key that was known and does not open now (its row is damaged, or this process lacks the key-encryption key) stays
        too, with the state of its row; one whose row is gone or retired does not.
        """
        rows = await self._database.read(self._rows)
        if any(not self._sealer.knows(row.sealed_key) for row in rows):
            await self._sealer.refresh(self._database)
        opened = {row.id: key for row in rows if (key := self._opened(row)) is not None}
        self._tell_unopened(frozenset(row.id for row in rows) - opened.keys())
        known = self._by_id
        kept = {row.id: RootKey(row.id, row.state, known[row.id].root) for row in rows if row.id in known}
        self._by_id = {row.id: (kept | opened)[row.id] for row in rows if row.id in kept | opened}

    def _tell_unopened(self, key_ids: frozenset[str]) -> None:
        """Log a key when it is found not to open, not each time that it is: the heartbeat looks every 2 s."""
        for key_id in sorted(key_ids - self._unopened):
            log.critical("system_key.unreadable", purpose=self.purpose, key=key_id, in_memory=key_id in self._by_id)
        self._unopened = key_ids

    def new_row(self, state: str) -> SystemKey:
        """Return a fresh key, sealed, that is not in the database yet and has no times; ``insert_key`` writes it."""
        root = secrets.token_bytes(KEY_BYTES)
        key_id = self._id_of(root)
        sealed = self._sealer.seal(root, owner=owner_of(key_id), purpose=self.purpose, version=1)
        return SystemKey(id=key_id, purpose=self.purpose, state=state, sealed_key=sealed)

    def _rows(self, session: Session) -> Sequence[SystemKey]:
        query = select(SystemKey).where(SystemKey.purpose == self.purpose, SystemKey.state != "retired")
        rows = session.exec(query.order_by(col(SystemKey.created_at).desc(), col(SystemKey.id))).all()
        return sorted(rows, key=lambda row: ("next", "current", "previous").index(row.state))

    def _opened(self, row: SystemKey) -> RootKey | None:
        try:
            root = self._sealer.open(row.sealed_key, owner=owner_of(row.id), purpose=self.purpose, version=1)
        except SecretUnreadable:
            return None
        return RootKey(row.id, row.state, root)


def owner_of(key_id: str) -> str:
    """Return the owner that a root key is sealed for."""
    return f"system_keys/{key_id}"


def insert_key(session: Session, row: SystemKey) -> None:
    """Insert a fresh key (``KeyRetired`` when the data key that it is sealed under was retired meanwhile).

    ``IntegrityError`` at the commit when it is current and another one is.
    """
    require_live_key(session, Sealer.key_id_of(row.sealed_key))
    row.created_at = now(session)
    row.activated_at = row.created_at if row.state == "current" else None
    session.add(row)
