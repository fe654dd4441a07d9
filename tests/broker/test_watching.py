"""Waiting for another process's refresh costs one query for everybody, and refreshes take turns, integration by integration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from sqlmodel import Session

from broker.credentials.leases import Seen, release_lease, take_lease
from broker.credentials.watching import Turns, Watching
from broker.database import Database, now
from broker.errors import DatabaseUnavailable
from broker.models import Connection


class Counted:
    """A database that counts how often it is read."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.reads = 0

    async def read(self, work: Callable[[Session], Any]) -> Any:
        self.reads += 1
        return await self._database.read(work)


def watching(database: Database | Counted) -> Watching:
    return Watching(cast("Database", database))


async def made(database: Database, *ids: str) -> None:
    def work(session: Session) -> None:
        for one in ids:
            session.add(
                Connection(id=one, integration="demo", provider="oidc", status="active", created_at=now(session))
            )

    await database.transaction(work)


async def test_a_look_tells_what_a_waiter_has_to_know(database: Database) -> None:
    await made(database, "con_1")
    look = watching(database).look
    assert await look("con_absent") is None
    assert await look("con_1") == Seen("demo", "active", 0, free=True)
    lease = await database.transaction(lambda session: take_lease(session, "con_1", "me", now(session), 30.0))
    assert lease is not None
    assert await look("con_1") == Seen("demo", "active", 0, free=False)
    await database.transaction(lambda session: release_lease(session, lease))
    assert await look("con_1") == Seen("demo", "active", 0, free=True)
    await database.transaction(lambda session: take_lease(session, "con_1", "me", now(session) - 31, 30.0))
    assert await look("con_1") == Seen("demo", "active", 0, free=True), "it is over"


async def test_everybody_who_waits_is_told_by_one_query(database: Database) -> None:
    ids = [f"con_{number}" for number in range(300)]
    await made(database, *ids)
    counted = Counted(database)
    watch = watching(counted)
    seen = await asyncio.gather(*(watch.look_again(one) for one in ids * 3), watch.look_again("con_absent"))
    assert counted.reads == 1
    assert seen == [Seen("demo", "active", 0, free=True)] * 900 + [None]


async def test_who_stops_waiting_stops_nobody_else(database: Database) -> None:
    await made(database, "con_1")
    watch = watching(database)
    leaves, stays = (asyncio.create_task(watch.look_again("con_1")) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    assert await stays == Seen("demo", "active", 0, free=True)


async def test_a_database_that_fails_is_told_to_each_and_the_next_look_is_a_new_one(database: Database) -> None:
    await made(database, "con_1")
    watch = watching(database)
    await database.aclose()
    failures = await asyncio.gather(*(watch.look_again(one) for one in ("con_1", "con_2")), return_exceptions=True)
    assert [type(failure) for failure in failures] == [DatabaseUnavailable] * 2
    assert failures[0] is not failures[1]
    with pytest.raises(DatabaseUnavailable):
        await watch.look_again("con_1")


async def test_turns_are_taken_in_order_and_one_integration_does_not_hold_up_another() -> None:
    turns, order = Turns(1), list[str]()

    async def wait_for(name: str) -> None:
        assert await turns.take("busy") is True
        order.append(name)
        turns.give_back("busy")

    assert await turns.take("busy") is False
    waiting = [asyncio.create_task(wait_for(name)) for name in ("first", "gives up", "second")]
    await asyncio.sleep(0)
    waiting[1].cancel()
    assert await asyncio.wait_for(turns.take("other"), 1) is False
    assert order == []
    turns.give_back("busy")
    await asyncio.wait(waiting)
    assert order == ["first", "second"]
    assert await turns.take("busy") is False, "all turns came back"
