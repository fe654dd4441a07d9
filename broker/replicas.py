"""Every process says each two seconds that it is alive and which keys it has; a new key is used once all live ones have it.

A beat first reads everything again (key-encryption keys, data keys, root keys, revocations), then writes down what it has.
So a row that names a key is that process's word that it can open what is made with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker import __version__
from broker.database import Database, now
from broker.errors import BrokerError
from broker.models import KeyCheck, Replica, Revocation, new_id
from broker.settings import SettingsError
from broker.vault.keyring import Sealer, Wrapping
from broker.vault.system_keys import SystemKeys

BEAT_SECONDS = 2.0
LIVE_SECONDS = 15.0
FORGOTTEN_SECONDS = 86_400.0
OVERLAP_SECONDS = 600.0  # how far back revocations are looked for: one may be committed after a later one
ENCRYPTION, DATA = "encryption", "data"
log = structlog.get_logger()


def live(session: Session) -> list[Replica]:
    """Return the processes that were seen in the last ``LIVE_SECONDS`` by the database's clock, oldest first.

    One that hangs longer than that is not waited for: what it would write under an old key is refused (``vault.floor``).
    """
    query = select(Replica).where(col(Replica.seen_at) > now(session) - LIVE_SECONDS)
    return list(session.exec(query.order_by(col(Replica.started_at), col(Replica.id))))


def lacking(session: Session, key_class: str, key_id: str) -> list[Replica]:
    """Return the live processes that have not said that they have a key: ``key_class`` is encryption, data or a purpose."""
    return [one for one in live(session) if key_id not in one.keys.get(key_class, ())]


class Replicas:
    """This process among the others. ``beating`` runs it; nothing of it is needed to read or write secrets."""

    def __init__(
        self,
        database: Database,
        sealer: Sealer,
        wrapping: Wrapping,
        system_keys: Sequence[SystemKeys] = (),
        *,
        on_revocation: Sequence[Callable[[], None]] = (),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_revocation`` is called when a revocation is seen that was not there before. ``monotonic`` is for tests."""
        self.id = new_id("rpl")
        self._database = database
        self._sealer = sealer
        self._wrapping = wrapping
        self._system_keys = list(system_keys)
        self._on_revocation = on_revocation
        self._monotonic = monotonic
        self._kind = "cli"
        self._started_at: float | None = None
        self._seen_revocations: frozenset[str] | None = None
        self._beaten_at = math.inf

    def watch(self, keys: SystemKeys) -> None:
        """Read these root keys too at each beat, and tell which there are."""
        self._system_keys.append(keys)

    @contextlib.asynccontextmanager
    async def beating(self, kind: str) -> AsyncIterator[None]:
        """Beat once, then each ``BEAT_SECONDS`` until the end, and say goodbye: ``kind`` is serve, worker or cli.

        Raises what ``beat`` raises; after the first one a beat that fails is logged and tried again.
        """
        self._kind = kind
        await self.beat()
        stopping = asyncio.Event()
        task = asyncio.create_task(self._run(stopping))
        try:
            yield
        finally:
            stopping.set()
            await task
            await self._leave()

    async def _run(self, stopping: asyncio.Event) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), BEAT_SECONDS)
            if stopping.is_set():
                return
            try:
                await self.beat()
            except BrokerError as error:
                log.warning("replica.beat_failed", replica=self.id, code=error.code)
            except Exception:
                log.exception("replica.beat_defect", replica=self.id)

    async def beat(self) -> None:
        """Read keys and revocations again, then write down which keys are here (``DatabaseUnavailable``).

        What cannot be read is logged and left as it was; the row says which keys are here, and so which are not yet.
        """
        await self._tried(self._wrapping.reload)
        await self._tried(lambda: self._sealer.refresh(self._database))
        for keys in self._system_keys:
            await self._tried(keys.refresh)
        await self._notice_revocations()
        await self._database.transaction(self._write)
        self._beaten_at = self._monotonic()

    async def _tried(self, action: Callable[[], Awaitable[object]]) -> None:
        try:
            await action()
        except (BrokerError, SettingsError) as error:
            code = error.code if isinstance(error, BrokerError) else "settings"
            log.warning("replica.keys_not_read", replica=self.id, code=code, why=str(error))

    @property
    def keys(self) -> dict[str, list[str]]:
        """Which keys are here, by class."""
        root_keys = {keys.purpose: [key.id for key in keys.all] for keys in self._system_keys}
        return {ENCRYPTION: list(self._wrapping.ids), DATA: list(self._sealer.key_ids), **root_keys}

    def _write(self, session: Session) -> None:
        at = now(session)
        self._started_at = self._started_at or at
        keys = {**self.keys, ENCRYPTION: self._genuine(session)}
        row = Replica(id=self.id, kind=self._kind, host=socket.gethostname(), version=__version__, keys=keys)
        row.started_at, row.seen_at = self._started_at, at
        session.merge(row)
        session.execute(sa.delete(Replica).where(col(Replica.seen_at) < at - FORGOTTEN_SECONDS))

    def _genuine(self, session: Session) -> list[str]:
        """Return the key-encryption keys that are here, without one that has other bytes than the database knows it by."""
        known = {row.key_id: row.check_value for row in session.exec(select(KeyCheck))}
        ids = self._wrapping.ids
        return [one for one in ids if known.get(one) in {None, "", self._wrapping.check_value(one)}]

    async def _notice_revocations(self) -> None:
        """Call the hooks for a revocation that is new here, and after an absence: there may have been some unseen."""
        recent = await self._database.read(_recent_revocations)
        seen, self._seen_revocations = self._seen_revocations, recent
        absent = self._monotonic() - self._beaten_at > LIVE_SECONDS
        if absent or (seen is not None and not recent <= seen):
            for hook in self._on_revocation:
                hook()

    async def _leave(self) -> None:
        with contextlib.suppress(BrokerError):  # then it is forgotten in a day, and not counted in 15 s
            await self._database.transaction(
                lambda session: session.execute(sa.delete(Replica).where(col(Replica.id) == self.id))
            )


def _recent_revocations(session: Session) -> frozenset[str]:
    query = select(Revocation.id).where(col(Revocation.created_at) > now(session) - OVERLAP_SECONDS)
    return frozenset(session.exec(query))
