"""Connections as calls and open streams see them: never older than is said, and nothing goes on unseen."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlmodel import Session

from broker.credentials.in_use import AT_ONCE, BLIND_SECONDS, MOST_KEPT, MOST_SECONDS, InUse
from broker.credentials.snapshots import Snapshot, find_snapshots
from broker.database import Database, opened
from broker.errors import (
    BrokerError,
    ConnectionFrozen,
    DatabaseUnavailable,
    Forbidden,
    InternalError,
    NotFound,
)
from broker.models import Connection
from tests.broker.test_breakers import Clock
from tests.flows.rig import eventually

STOP_SECONDS = 0.8  # two looks, and a slow machine


class Look:
    """Reads rows, counts how often, and fails where a test says so."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.failures: list[Exception] = []

    def __call__(self, connection: sa.Connection, ids: Sequence[str]) -> list[Snapshot | None]:
        self.asked.append(list(ids))
        if self.failures:
            raise self.failures.pop(0)
        return find_snapshots(connection, ids)


class World:
    """Connections in a database, and what looks at them."""

    def __init__(self, database: Database) -> None:
        self.database, self.clock, self.look = database, Clock(), Look()
        self.in_use = InUse(database, self.look, monotonic=self.clock)
        self.stopped: list[tuple[str, BrokerError]] = []

    async def add(self, *ids: str) -> None:
        rows = [Connection(id=one, integration="one", provider="oidc", status="active", created_at=1.0) for one in ids]
        await self.database.transaction(lambda session: session.add_all(rows))

    async def set(self, connection_id: str, **values: object) -> None:
        change = sa.update(Connection).where(sa.column("id") == connection_id).values(**values)
        await self.database.transaction(lambda session: session.execute(change))

    async def execute(self, statement: str) -> None:
        await self.database.transaction(lambda session: session.execute(sa.text(statement)))

    def stop(self, name: str) -> Callable[[BrokerError], None]:
        return lambda error: self.stopped.append((name, error))

    def stops(self) -> list[tuple[str, type[BrokerError]]]:
        return [(name, type(error)) for name, error in self.stopped]

    async def looks(self, more: int) -> None:
        """Wait until so many looks were begun from now on."""
        wanted = len(self.look.asked) + more

        async def enough() -> bool:
            return len(self.look.asked) >= wanted

        await eventually(enough)

    async def any_stop(self) -> bool:
        return bool(self.stopped)


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    made = World(database)
    await made.add("con_a", "con_b")
    yield made
    await made.in_use.aclose()


async def fine(_: Snapshot) -> None:
    """Find nothing against a stream."""


# --- calls


async def test_a_row_is_read_once_for_as_long_as_it_is_fresh_and_then_again(world: World) -> None:
    for _ in range(5):
        assert (await world.in_use.current("con_a")).status == "active"
        world.clock.now += MOST_SECONDS / 6
    assert len(world.look.asked) == 1
    await world.set("con_a", status="frozen")
    world.clock.now += MOST_SECONDS / 6 + 0.001
    assert (await world.in_use.current("con_a")).status == "frozen"
    assert len(world.look.asked) == 2


async def test_what_was_just_changed_is_read_anew_and_known_from_then_on(world: World) -> None:
    assert (await world.in_use.current("con_a")).status == "active"
    await world.set("con_a", status="frozen")
    assert (await world.in_use.current("con_a")).status == "active", "within what may be old"
    world.clock.now += 0.001
    assert (await world.in_use.anew("con_a")).status == "frozen"
    assert (await world.in_use.current("con_a")).status == "frozen"
    assert len(world.look.asked) == 2


async def test_what_is_absent_or_deleted_is_not_found_and_asked_for_each_time(world: World) -> None:
    await world.in_use.current("con_a")
    await world.set("con_a", deleted_at=2.0)
    world.clock.now += MOST_SECONDS + 0.001
    for connection_id in ("con_a", "con_a", "con_x", "con_x"):
        with pytest.raises(NotFound):
            await world.in_use.current(connection_id)
    assert len(world.look.asked) == 5
    await world.set("con_a", deleted_at=None)
    assert (await world.in_use.current("con_a")).status == "active", "its absence was not kept"


async def test_calls_of_a_moment_share_a_query(world: World) -> None:
    ids = ["con_a", "con_b"] * 20
    found = await asyncio.gather(*map(world.in_use.current, ids))
    assert [one.id for one in found] == ids
    assert len(world.look.asked) == 1


async def test_a_database_that_cannot_be_asked_is_no_old_answer(world: World) -> None:
    await world.in_use.current("con_a")
    await world.execute("ALTER TABLE connections RENAME TO gone")
    assert (await world.in_use.current("con_a")).status == "active"
    world.clock.now += MOST_SECONDS + 0.001
    with pytest.raises(DatabaseUnavailable):
        await world.in_use.current("con_a")


async def test_what_is_known_stays_bounded(world: World) -> None:
    row = await world.in_use.current("con_a")
    many = InUse(world.database, lambda _, ids: [row._replace(id=one) for one in ids])
    for begin in range(0, MOST_KEPT + 1000, 1000):
        found = await asyncio.gather(*(many.current(f"con_{number}") for number in range(begin, begin + 1000)))
        assert found[-1].id == f"con_{begin + 999}"
        assert len(many._known) <= MOST_KEPT


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.floats(0.0, 1.0)),
        st.tuples(st.just("change"), st.sampled_from(["con_a", "con_b"])),
        st.tuples(st.just("current"), st.sampled_from(["con_a", "con_b"])),
        st.tuples(st.just("anew"), st.sampled_from(["con_a", "con_b"])),
    ),
    max_size=30,
)


@given(STEPS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_a_row_is_never_older_than_what_is_said(sqlite_url: str, steps: list[tuple[str, float | str]]) -> None:
    asyncio.run(never_older(sqlite_url, steps))


async def never_older(sqlite_url: str, steps: list[tuple[str, float | str]]) -> None:
    """Each row's version counts up; a version that ended longer ago than may be is never given, nor one before ``anew``."""
    async with opened(sqlite_url, migrate=False) as database:
        world = World(database)
        await world.execute("DELETE FROM connections")
        await world.add("con_a", "con_b")
        ended: dict[str, list[float]] = {"con_a": [], "con_b": []}
        for step, what in steps:
            if isinstance(what, float):
                world.clock.now += what
            elif step == "change":
                ended[what].append(world.clock.now)
                await world.set(what, secret_version=len(ended[what]))
            else:
                found = await getattr(world.in_use, step)(what)
                gone = ended[what][found.secret_version :]
                assert not gone or (step == "current" and world.clock.now - gone[0] < MOST_SECONDS)


# --- open streams


async def test_a_stream_of_what_is_frozen_is_stopped_once_and_no_other(world: World) -> None:
    with (
        world.in_use.following("con_a", fine, world.stop("a")),
        world.in_use.following("con_a", fine, world.stop("a2")),
        world.in_use.following("con_b", fine, world.stop("b")),
    ):
        await world.looks(2)
        assert world.stopped == []
        await world.set("con_a", status="frozen")
        began = time.monotonic()
        await eventually(world.any_stop)
        assert time.monotonic() - began < STOP_SECONDS
        await world.looks(3)
        assert sorted(world.stops(), key=str) == [("a", ConnectionFrozen), ("a2", ConnectionFrozen)]


@pytest.mark.parametrize("gone", [True, False])
async def test_a_stream_of_a_deleted_connection_is_stopped(world: World, gone: bool) -> None:  # noqa: FBT001
    with world.in_use.following("con_a", fine, world.stop("a")):
        if gone:
            await world.execute("DELETE FROM connections WHERE id = 'con_a'")
        else:
            await world.set("con_a", deleted_at=2.0)
        await eventually(world.any_stop)
    assert world.stops() == [("a", NotFound)]


async def test_what_the_check_says_stops_its_stream(world: World) -> None:
    seen: list[str] = []

    async def check(row: Snapshot) -> None:
        seen.append(row.subject or "")
        if row.subject == "acme:2":
            raise Forbidden

    with world.in_use.following("con_a", check, world.stop("a")):
        await world.looks(2)
        assert set(seen) == {""}
        await world.set("con_a", subject="acme:2")
        await eventually(world.any_stop)
    assert world.stops() == [("a", Forbidden)]


async def test_nothing_is_looked_at_once_the_streams_are_over(world: World) -> None:
    with world.in_use.following("con_a", fine, world.stop("a")):
        await world.looks(1)
    await world.set("con_a", status="frozen")
    looking = world.in_use._looking
    assert looking is not None
    await asyncio.wait({looking}, timeout=STOP_SECONDS)
    assert looking.done()
    assert world.stopped == []
    with world.in_use.following("con_a", fine, world.stop("again")):
        await eventually(world.any_stop)
    assert world.stops() == [("again", ConnectionFrozen)]


async def test_a_look_is_fresh_for_calls_too(world: World) -> None:
    with world.in_use.following("con_a", fine, world.stop("a")):
        await world.looks(2)
        await asyncio.sleep(0)
        asked = len(world.look.asked)
        await world.in_use.current("con_a")
    assert len(world.look.asked) == asked


async def test_a_blind_watch_stops_every_stream_once_it_lasted_too_long(world: World) -> None:
    with (
        world.in_use.following("con_a", fine, world.stop("a")),
        world.in_use.following("con_b", fine, world.stop("b")),
    ):
        await world.looks(1)
        await world.execute("ALTER TABLE connections RENAME TO gone")
        world.clock.now += BLIND_SECONDS - 1.0
        await world.looks(2)
        assert world.stopped == [], "not for as long as it may"
        world.clock.now += 1.1
        await eventually(world.any_stop)
    assert sorted(world.stops(), key=str) == [("a", DatabaseUnavailable), ("b", DatabaseUnavailable)]


async def test_a_database_that_comes_back_in_time_stops_nothing_and_the_watch_goes_on(world: World) -> None:
    with world.in_use.following("con_a", fine, world.stop("a")):
        for _ in range(3):
            await world.looks(1)
            await world.execute("ALTER TABLE connections RENAME TO gone")
            world.clock.now += BLIND_SECONDS - 1.0
            await world.looks(2)
            await world.execute("ALTER TABLE gone RENAME TO connections")
            await world.looks(2)
        assert world.stopped == []
        await world.set("con_a", status="frozen")
        await eventually(world.any_stop)
    assert world.stops() == [("a", ConnectionFrozen)]


async def test_a_database_that_says_nothing_is_blind_too(postgres_url: str) -> None:
    async with opened(postgres_url, migrate=False) as database, opened(postgres_url, migrate=False) as other:
        world = World(database)
        world.in_use = InUse(database, world.look)  # the true clock
        await world.add("con_a")
        with world.in_use.following("con_a", fine, world.stop("a")):
            await world.looks(1)
            holding = asyncio.create_task(other.transaction(held))
            began = time.monotonic()
            await eventually(world.any_stop)
            seconds = time.monotonic() - began
            await holding
        assert world.stops() == [("a", DatabaseUnavailable)]
        assert BLIND_SECONDS - 1.0 < seconds < BLIND_SECONDS + 1.0, "not first when a second look was in vain"
        await world.in_use.aclose()


def held(session: Session) -> None:
    """Lock the table for longer than streams may go on blindly."""
    session.execute(sa.text("LOCK TABLE connections IN ACCESS EXCLUSIVE MODE"))
    session.execute(sa.text(f"SELECT pg_sleep({BLIND_SECONDS + 2})"))


async def test_a_look_that_fails_otherwise_does_not_end_the_watch(world: World) -> None:
    world.look.failures = [RuntimeError("a defect"), ValueError("another")]
    with world.in_use.following("con_a", fine, world.stop("a")):
        await world.looks(3)
        assert world.stopped == []
        await world.set("con_a", status="frozen")
        await eventually(world.any_stop)
    assert world.stops() == [("a", ConnectionFrozen)]


async def test_looks_that_fail_for_too_long_stop_streams_whatever_fails(world: World) -> None:
    world.look.failures = [RuntimeError("a defect")] * 100
    with world.in_use.following("con_a", fine, world.stop("a")):
        await world.looks(1)
        world.clock.now += BLIND_SECONDS + 0.1
        await eventually(world.any_stop)
    assert world.stops() == [("a", DatabaseUnavailable)]


async def test_a_check_that_breaks_ends_its_own_stream_and_hides_no_other(world: World) -> None:
    async def broken(_: Snapshot) -> None:
        raise KeyError("a defect")

    async def both() -> bool:
        return len(world.stopped) == 2

    await world.set("con_b", status="frozen")
    with (
        world.in_use.following("con_a", broken, world.stop("a")),
        world.in_use.following("con_b", fine, world.stop("b")),
    ):
        await eventually(both)
    assert sorted(world.stops(), key=str) == [("a", InternalError), ("b", ConnectionFrozen)]


async def test_a_slow_check_holds_up_no_other_stream(world: World) -> None:
    async def slow(_: Snapshot) -> None:
        await asyncio.sleep(0.05)

    await world.set("con_b", status="frozen")
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(world.in_use.following("con_a", slow, world.stop("a")))
        stack.enter_context(world.in_use.following("con_b", fine, world.stop("b")))
        began = time.monotonic()
        await eventually(world.any_stop)
        assert time.monotonic() - began < STOP_SECONDS
    assert world.stops() == [("b", ConnectionFrozen)]


async def test_a_check_that_cannot_ask_is_blind_and_hides_no_other(world: World) -> None:
    async def unable(_: Snapshot) -> None:
        raise DatabaseUnavailable

    await world.set("con_b", status="frozen")
    with (
        world.in_use.following("con_a", unable, world.stop("a")),
        world.in_use.following("con_b", fine, world.stop("b")),
    ):
        await eventually(world.any_stop)
        assert world.stops() == [("b", ConnectionFrozen)]
        world.clock.now += BLIND_SECONDS + 0.1
        world.stopped.clear()
        await eventually(world.any_stop)
    assert world.stops() == [("a", DatabaseUnavailable)]


async def test_more_streams_than_fit_a_query_are_all_seen(world: World) -> None:
    ids = [f"con_{number}" for number in range(2 * AT_ONCE + 7)]
    await world.add(*ids)
    await world.execute("UPDATE connections SET status = 'frozen' WHERE id LIKE 'con_%'")

    async def all_of_them() -> bool:
        return len(world.stopped) == len(ids)

    with contextlib.ExitStack() as stack:
        for one in ids:
            stack.enter_context(world.in_use.following(one, fine, world.stop(one)))
        await eventually(all_of_them)
    assert {name for name, _ in world.stopped} == set(ids)


async def test_closing_ends_the_looks(world: World) -> None:
    with world.in_use.following("con_a", fine, world.stop("a")):
        await world.looks(1)
        await world.in_use.aclose()
        assert world.in_use._looking is not None
        assert world.in_use._looking.cancelled()
        await world.in_use.aclose()
