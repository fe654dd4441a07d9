"""What those look at who wait for another process's refresh: one query for all of them, and turns for those who begin one."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

from broker.credentials.leases import Seen, see
from broker.database import Database
from broker.errors import BrokerError

LOOK_SECONDS = 0.05
LOOKS_AT_ONCE = 500


class Watching:
    """Looks at rows and leases for the waiting tasks of this process: a thousand of them cost one query every 50 ms."""

    def __init__(self, database: Database) -> None:
        """Begin with nobody waiting."""
        self._database = database
        self._waiting: dict[str, asyncio.Future[Seen | None]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def look(self, connection_id: str) -> Seen | None:
        """Return what there is now, None for no such connection (DatabaseUnavailable)."""
        found = await self._database.read(lambda session: see(session, [connection_id]))
        return found.get(connection_id)

    async def look_again(self, connection_id: str) -> Seen | None:
        """As ``look``, a moment later and together with whoever waits too."""
        waiting = self._waiting.setdefault(connection_id, asyncio.get_running_loop().create_future())
        if self._looking is None or self._looking.done():
            # A context of its own: the looks belong to none of the requests that wait.
            self._looking = asyncio.create_task(self._keep_looking(), context=contextvars.Context())
        return await asyncio.shield(waiting)  # one who is cancelled does not cancel the others

    async def _keep_looking(self) -> None:
        waiting: dict[str, asyncio.Future[Seen | None]] = {}
        try:
            while self._waiting:
                await asyncio.sleep(LOOK_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - spreading, not secrecy
                waiting, self._waiting = self._waiting, {}
                ids = list(waiting)
                for start in range(0, len(ids), LOOKS_AT_ONCE):
                    await self._answer(waiting, ids[start : start + LOOKS_AT_ONCE])
        finally:  # when the loop is torn down meanwhile, nobody is left waiting
            for future in (*waiting.values(), *self._waiting.values()):
                future.cancel()

    async def _answer(self, waiting: dict[str, asyncio.Future[Seen | None]], ids: Sequence[str]) -> None:
        try:
            found = await self._database.read(lambda session: see(session, ids))
        except BrokerError as error:
            for one in ids:  # a copy each: one exception raised in many tasks would collect all of their tracebacks
                waiting[one].set_exception(copy.copy(error))
                waiting[one].exception()  # seen, also where the one who waited was cancelled
            return
        for one in ids:
            waiting[one].set_result(found.get(one))


@dataclass(slots=True)
class _Lane:
    turns: asyncio.Semaphore
    users: int = 0


class Turns:
    """Lets so many refreshes of one integration run at once in this process; the others wait in order, before they claim.

    Else a thousand that begin together queue for the database while they hold leases, and for the provider while their time
    runs. A lane for each integration, so that one provider that hangs does not hold up another's.
    """

    def __init__(self, most: int) -> None:
        """``most``: how many at once, for each integration."""
        self._most = most
        self._lanes: dict[str, _Lane] = {}

    async def take(self, integration: str) -> bool:
        """Wait for a turn, to be given back; return whether there was a wait."""
        lane = self._lanes.setdefault(integration, _Lane(asyncio.Semaphore(self._most)))
        lane.users += 1
        waits = lane.turns.locked()
        try:
            await lane.turns.acquire()
        except BaseException:
            self._leave(integration, lane)
            raise
        return waits

    def give_back(self, integration: str) -> None:
        """End a turn."""
        lane = self._lanes[integration]
        lane.turns.release()
        self._leave(integration, lane)

    def _leave(self, integration: str, lane: _Lane) -> None:
        lane.users -= 1
        if lane.users == 0:
            del self._lanes[integration]
