"""Law: who pulls oldest first, while several write at once, sees every event exactly once, in the order of the numbers."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlmodel import Session

from broker.database import Database, now, open_database
from broker.policy import Principal
from broker.webhooks.history import EventFilter, History
from tests.flows import events_made as made

ADMIN = Principal("clr_test", "test", frozenset({"admin"}), (), "key_test")
TYPES = ("sender.a", "sender.b")
Writes = list[tuple[int, int]]  # (events in the transaction, how many of them the puller does not want)


async def write(database: Database, writes: Writes, sent: list[str]) -> None:
    """Commit one transaction after the other; between the numbers and the commit there is time for others."""
    for wanted, unwanted in writes:

        def work(session: Session, wanted: int = wanted, unwanted: int = unwanted) -> list[str]:
            at = now(session)
            types = [TYPES[0]] * wanted + [TYPES[1]] * unwanted
            random.shuffle(types)
            rows = [made.event_row(at, type=one) for one in types]
            made.put(session, rows)
            return [row.id for row in rows if row.type == TYPES[0]]

        sent += await database.transaction(work)
        await asyncio.sleep(0)


async def pull(history: History, limit: int, done: Callable[[], bool]) -> list[tuple[int, str]]:
    """Ask again and again from where it was, once more after the last commit."""
    seen: list[tuple[int, str]] = []
    number, last_round = 0, False
    while True:
        last_round = done()
        rows, reached = await history.events_after(EventFilter(type=TYPES[0]), ADMIN, limit=limit, number=number)
        assert reached >= number
        seen += [(row.event.number or 0, row.event.id) for row in rows]
        if last_round and reached == number:
            return seen
        number = reached
        await asyncio.sleep(0)


async def check_law(databases: list[Database], writers: list[Writes], limit: int) -> None:
    """Run writers on databases of their own, as processes have them, beside the puller on the first."""
    history = History(databases[0], None, None)  # type: ignore[arg-type] # lists open nothing and note nothing
    before = await history.events_after(EventFilter(), ADMIN, limit=1, number=10**9)
    assert before == ([], 10**9)
    sent: list[str] = []
    start = (await history.events_after(EventFilter(), ADMIN, limit=200, number=0))[1]
    writing = [
        asyncio.create_task(write(databases[at % len(databases)], writes, sent)) for at, writes in enumerate(writers)
    ]
    assert start == 0
    seen = await pull(history, limit, lambda: all(task.done() for task in writing))
    await asyncio.gather(*writing)
    assert sorted(event_id for _, event_id in seen) == sorted(sent)
    assert seen == sorted(seen)


WRITERS = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=6), min_size=2, max_size=4
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writers=WRITERS, limit=st.integers(1, 7))
def test_a_puller_misses_none_of_several_writers_on_sqlite(
    sqlite_template: bytes, writers: list[Writes], limit: int
) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "broker.db"
            path.write_bytes(sqlite_template)
            databases = [open_database(f"sqlite:///{path}") for _ in range(2)]
            await check_law(list(databases), writers, limit)
            for database in databases:
                await database.aclose()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(4))
async def test_a_puller_misses_none_of_several_writers_on_postgresql(postgres_url: str, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - which case, no secret
    writers = [[(chance.randrange(5), chance.randrange(4)) for _ in range(12)] for _ in range(5)]
    databases = [open_database(postgres_url) for _ in range(3)]
    await check_law(list(databases), writers, chance.randrange(1, 8))
    for database in databases:
        await database.aclose()
