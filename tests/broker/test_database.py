"""What both databases promise: one transaction or nothing, errors without values, bounded waits, healing, groups."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import sqlite3
import stat
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError, NoResultFound
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Session, select

from broker.database import (
    Database,
    GroupReader,
    GroupWriter,
    PostgresDatabase,
    SqliteDatabase,
    clock,
    now,
    open_database,
    opened,
)
from broker.errors import BrokerError, DatabaseUnavailable, InternalError, NotFound
from broker.models import Caller, KeyCheck, SealedSecret

T = TypeVar("T")
CANARY = "CANARY-9f3e41"
AnyDatabase = SqliteDatabase | PostgresDatabase


def _put(*names: str, value: str = "v") -> Callable[[Session], int]:
    def work(session: Session) -> int:
        session.add_all(KeyCheck(key_id=name, check_value=value, created_at=now(session)) for name in names)
        session.flush()
        return len(names)

    return work


def _names(session: Session) -> list[str]:
    return list(session.exec(select(KeyCheck.key_id).order_by(KeyCheck.key_id)).all())


def _impatient(url: str, **options: Any) -> AnyDatabase:
    """Open the database with limits so short that a test can wait for them."""
    if url.startswith("sqlite"):
        return SqliteDatabase(Path(str(sa.make_url(url).database)), busy_timeout_seconds=0.3)
    return PostgresDatabase(url, busy_timeout_seconds=0.3, statement_timeout_seconds=0.6, **options)


def _elsewhere(url: str, work: Callable[[Session], T]) -> T:
    """Run one transaction on connections and a loop of its own, and wait for it: what another process would do."""

    async def run() -> T:
        async with opened(url, migrate=False) as other:
            return await other.transaction(work)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(lambda: asyncio.run(run())).result()


@contextlib.asynccontextmanager
async def _write_lock(url: str) -> AsyncIterator[None]:
    """Hold what keeps all others from writing, on a connection that is not the broker's."""
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(str(sa.make_url(url).database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            return
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(sa.text("LOCK TABLE key_checks IN EXCLUSIVE MODE"))
        yield
    await engine.dispose()


@contextlib.asynccontextmanager
async def _longest_pause_seconds() -> AsyncIterator[list[float]]:
    """Watch the event loop; the one number in the list is the longest time in which it ran nothing else."""
    longest = [0.0]

    async def watch() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.005)
            longest[0] = max(longest[0], time.monotonic() - last)
            last = time.monotonic()

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    yield longest
    watching.cancel()


# --- transactions ---------------------------------------------------------------------------------------------------------


async def test_a_transaction_commits_and_its_objects_stay_readable(database: Database, database_url: str) -> None:
    def work(session: Session) -> KeyCheck:
        session.add(row := KeyCheck(key_id="a", check_value="v", created_at=1.5))
        return row

    row = await database.transaction(work)
    assert (row.key_id, row.created_at) == ("a", 1.5)
    assert _elsewhere(database_url, _names) == ["a"]


@pytest.mark.parametrize("raised", [NotFound(), RuntimeError("ours"), KeyError("k"), NoResultFound()])
async def test_any_exception_rolls_all_of_it_back_and_passes_unchanged(database: Database, raised: Exception) -> None:
    def work(session: Session) -> None:
        _put("a", "b")(session)
        raise raised

    with pytest.raises(type(raised)) as caught:
        await database.transaction(work)
    assert caught.value is raised
    assert await database.read(_names) == []
    assert await database.transaction(_put("a")) == 1


async def test_a_race_for_a_unique_key_is_an_integrity_error_that_names_the_key_but_not_its_value(
    database: Database,
) -> None:
    await database.transaction(_put(CANARY))
    with pytest.raises(IntegrityError) as caught:
        await database.transaction(_put("other", CANARY))
    assert "key_check" in str(caught.value)
    assert CANARY not in _everything_told_by(caught.value)
    assert await database.read(_names) == [CANARY]


async def test_transactions_at_once_do_not_lose_each_others_writes(database: Database, database_url: str) -> None:
    await database.transaction(_put("counter", value="0"))

    def increment(session: Session) -> None:
        row = session.exec(select(KeyCheck).where(KeyCheck.key_id == "counter").with_for_update()).one()
        row.check_value = str(int(row.check_value) + 1)

    async with opened(database_url, migrate=False) as second:
        await asyncio.gather(*(each.transaction(increment) for each in [database, second] * 20))
    row = await database.read(lambda session: session.get(KeyCheck, "counter"))
    assert row is not None
    assert row.check_value == "40"


async def test_a_read_sees_between_two_statements_what_another_process_commits(
    database: Database, database_url: str
) -> None:
    def work(session: Session) -> tuple[list[str], list[str]]:
        before = _names(session)
        _elsewhere(database_url, _put("a"))
        return before, _names(session)

    assert await database.read(work) == ([], ["a"])


async def test_a_read_may_not_write(database: Database) -> None:
    with pytest.raises(DatabaseUnavailable):
        await database.read(_put("a"))
    assert await database.read(_names) == []


async def test_the_clock_is_the_databases_and_goes_on_within_a_transaction(database: Database) -> None:
    def work(session: Session) -> tuple[float, float]:
        first = now(session)
        time.sleep(0.01)
        return first, now(session)

    first, second = await database.transaction(work)
    assert abs(first - time.time()) < 5
    assert 0.01 <= second - first < 5


async def test_a_cancelled_caller_leaves_all_or_nothing(database: Database) -> None:
    task = asyncio.create_task(database.transaction(_put("a", "b")))
    await asyncio.sleep(0.001)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await database.transaction(_put("c"))
    assert await database.read(_names) in (["c"], ["a", "b", "c"])


async def test_after_closing_every_call_is_refused(database_url: str) -> None:
    database = open_database(database_url)
    assert await database.read(_names) == []
    await database.aclose()
    for call in (database.transaction(_put("a")), database.read(_names), database.schema_revision()):
        with pytest.raises(DatabaseUnavailable):
            await call


# --- locked, full, gone; and healing --------------------------------------------------------------------------------------


async def test_a_locked_database_is_a_named_error_in_bounded_time_and_heals(database_url: str) -> None:
    database = _impatient(database_url)
    await database.transaction(_put("before"))
    async with _write_lock(database_url):
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await database.transaction(_put("during"))
        assert 0.2 < time.monotonic() - started < 3
        assert await database.read(_names) == ["before"]
    await database.transaction(_put("after"))
    assert await database.read(_names) == ["after", "before"]
    await database.aclose()


async def test_a_process_that_stands_still_in_a_transaction_loses_it_before_others_give_up(postgres_url: str) -> None:
    locked, over = threading.Event(), threading.Event()

    def stand_still(session: Session) -> None:
        session.execute(sa.update(KeyCheck).values(check_value="lost"))
        locked.set()
        over.wait(30)
        session.execute(sa.text("SELECT 1"))

    async def run() -> None:
        await PostgresDatabase(postgres_url, busy_timeout_seconds=1.25).transaction(stand_still)

    database = PostgresDatabase(postgres_url, busy_timeout_seconds=4.0)
    await database.transaction(_put("a"))
    with ThreadPoolExecutor(max_workers=1) as thread:
        stands = thread.submit(lambda: asyncio.run(run()))
        try:
            assert await asyncio.to_thread(locked.wait, 30)
            await database.transaction(lambda session: session.execute(sa.update(KeyCheck).values(check_value="kept")))
        finally:
            over.set()
        with pytest.raises(DatabaseUnavailable):
            stands.result()
    assert await database.read(lambda session: session.exec(select(KeyCheck.check_value)).all()) == ["kept"]
    await database.aclose()


async def test_a_locked_writer_does_not_hold_up_the_event_loop(database_url: str) -> None:
    database = _impatient(database_url)
    await database.transaction(_put("warm"))
    async with _write_lock(database_url), _longest_pause_seconds() as longest:
        with pytest.raises(DatabaseUnavailable):
            await database.transaction(_put("during"))
    assert longest[0] < 0.2
    await database.aclose()


async def test_a_long_queue_before_a_lock_fails_in_the_time_of_a_few_waits(database_url: str) -> None:
    database = _impatient(database_url)
    async with _write_lock(database_url):
        started = time.monotonic()
        outcomes = await asyncio.gather(
            *(database.transaction(_put(f"{number}")) for number in range(50)), return_exceptions=True
        )
        assert time.monotonic() - started < 3
    assert {type(outcome) for outcome in outcomes} == {DatabaseUnavailable}
    assert await database.transaction(_put("after")) == 1
    await database.aclose()


async def test_a_long_queue_that_moves_is_served_to_its_end(database_url: str) -> None:
    database = _impatient(database_url, **({} if database_url.startswith("sqlite") else {"pool_size": 1}))

    def slowly(session: Session) -> None:
        time.sleep(0.05)

    started = time.monotonic()
    await asyncio.gather(*(database.transaction(slowly) for _ in range(20)))
    assert time.monotonic() - started > 2 * 0.3, "longer than any of them would wait for a lock"
    await database.aclose()


async def test_who_leaves_the_queue_takes_nobodys_turn(empty_postgres_url: str) -> None:
    database = PostgresDatabase(empty_postgres_url, pool_size=1)
    pause = sa.text("SELECT pg_sleep(0.2)")
    first = asyncio.create_task(database.read(lambda session: session.execute(pause).one()))
    await asyncio.sleep(0.05)
    leaves, stays = (asyncio.create_task(database.read(now)) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.gather(first, stays)
    assert leaves.cancelled()
    assert await database.read(now) > 0
    await database.aclose()


async def test_writers_that_wait_for_a_lock_leave_reads_their_connections(database_url: str) -> None:
    database = _impatient(database_url)
    async with _write_lock(database_url):
        writers = [asyncio.create_task(database.transaction(_put(f"{number}"))) for number in range(30)]
        await asyncio.sleep(0.05)
        assert await database.read(_names) == []
        await asyncio.gather(*writers, return_exceptions=True)
    await database.aclose()


async def test_a_full_disk_is_a_named_error_and_heals(sqlite_url: str) -> None:
    big = SealedSecret(owner="o", version=1, key_id="k", sealed=b"x" * 500_000, created_at=1.0)
    async with opened(sqlite_url, migrate=False) as database:
        await database.transaction(lambda session: session.execute(sa.text("PRAGMA max_page_count = 1")).all())
        with pytest.raises(DatabaseUnavailable) as caught:
            await database.transaction(lambda session: session.add(big))
        assert "SQLITE_FULL" in str(caught.value.__cause__)
        await database.transaction(lambda session: session.execute(sa.text("PRAGMA max_page_count = 1000000")).all())
        again = SealedSecret(owner="o", version=1, key_id="k", sealed=b"x" * 500_000, created_at=1.0)
        await database.transaction(lambda session: session.add(again))
        stored = await database.read(lambda session: session.exec(select(SealedSecret.version)).all())
    assert stored == [1]


async def test_a_file_that_is_gone_is_a_named_error_and_heals(tmp_path: Path, sqlite_template: bytes) -> None:
    folder = tmp_path / "mount"
    database = open_database(f"sqlite:///{folder / 'broker.db'}")
    folder.rename(tmp_path / "unmounted")
    for call in (database.transaction(_put("a")), database.read(_names)):
        with pytest.raises(DatabaseUnavailable) as caught:
            await call
        assert "SQLITE_CANTOPEN" in str(caught.value.__cause__)
    (tmp_path / "unmounted").rename(folder)
    (folder / "broker.db").write_bytes(sqlite_template)
    assert await database.transaction(_put("a")) == 1
    await database.aclose()


async def test_a_file_that_is_no_database_is_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    path.write_bytes(b"not a database " * 100)
    database = open_database(f"sqlite:///{path}")
    for call in (database.transaction(_put("a")), database.read(_names), database.migrate()):
        with pytest.raises(DatabaseUnavailable):
            await call
    await database.aclose()


async def test_a_server_that_refuses_connections_is_a_named_error(unused_tcp_port: int) -> None:
    database = open_database(f"postgresql://broker:{CANARY}@127.0.0.1:{unused_tcp_port}/broker")
    for call in (
        database.transaction(_put("a")),
        database.read(_names),
        database.migrate(),
        database.schema_revision(),
    ):
        with pytest.raises(DatabaseUnavailable) as caught:
            await call
        assert CANARY not in _everything_told_by(caught.value)
    await database.aclose()


async def test_a_server_that_says_nothing_is_a_named_error_in_bounded_time() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()  # until the other side gives up
        writer.close()
        closed.set()

    closed = asyncio.Event()
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    database = _impatient(f"postgresql+asyncpg://broker@127.0.0.1:{port}/broker")
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        await database.read(_names)
    assert time.monotonic() - started < 3
    await database.aclose()
    await closed.wait()
    server.close()


async def test_a_server_that_went_away_and_came_back_needs_no_restart(
    postgres_url: str, postgres_server: Callable[[str], str]
) -> None:
    name = sa.make_url(postgres_url).database
    admin = create_async_engine(postgres_server("postgres"), isolation_level="AUTOCOMMIT")
    async with opened(postgres_url) as database, admin.connect() as connection:
        await database.transaction(_put("before"))
        await database.read(_names)
        await connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        await connection.execute(
            sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name}
        )
        for call in (database.transaction(_put("during")), database.read(_names)):
            with pytest.raises(DatabaseUnavailable):
                await call
        await connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        assert await database.read(_names) == ["before"]
        assert await database.transaction(_put("after")) == 1
    await admin.dispose()


class _Wire:
    """A TCP port in front of the server's Unix socket that can be cut silently, as a dead network does."""

    def __init__(self, socket_path: str) -> None:
        self.alive = asyncio.Event()
        self.alive.set()
        self._socket_path = socket_path
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._socket_path)
        for pair in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._pass_on(*pair)))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self.alive.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


async def test_a_network_that_swallows_everything_is_a_named_error_in_bounded_time_and_heals(postgres_url: str) -> None:
    url = sa.make_url(postgres_url)
    wire = _Wire(f"{url.query['host']}/.s.PGSQL.5432")
    async with wire as port:
        database = _impatient(f"postgresql+asyncpg://postgres@127.0.0.1:{port}/{url.database}")
        await database.transaction(_put("before"))
        wire.alive.clear()
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await database.transaction(_put("during"))
        assert time.monotonic() - started < 8
        wire.alive.set()
        assert await database.transaction(_put("after")) == 1
        wire.alive.clear()
        started = time.monotonic()
        await database.aclose()
        assert time.monotonic() - started < 8
        wire.alive.set()


async def test_a_statement_that_takes_too_long_is_ended_by_the_server(postgres_url: str) -> None:
    database = _impatient(postgres_url)
    with pytest.raises(DatabaseUnavailable):
        await database.transaction(lambda session: session.execute(sa.text("SELECT pg_sleep(30)")))
    await database.aclose()


# --- what an error tells --------------------------------------------------------------------------------------------------


def _everything_told_by(error: BaseException | None, depth: int = 0) -> str:
    """Return all that a log, a debugger or a crash reporter could print of an error and whatever hangs on it."""
    if error is None or depth > 8:
        return ""
    own = [str(error), repr(error), repr(error.args), repr(vars(error)), *traceback.format_exception(error)]
    linked = (_everything_told_by(other, depth + 1) for other in (error.__cause__, error.__context__))
    return "\n".join([*own, *linked, _everything_told_by(getattr(error, "orig", None), depth + 1)])


def _unknown_table(session: Session) -> None:
    session.execute(sa.text("INSERT INTO nowhere VALUES (:value)"), {"value": CANARY})


def _no_sql(session: Session) -> None:
    session.execute(sa.text("SELEKT :value"), {"value": CANARY})


def _missing_value(session: Session) -> None:
    session.execute(sa.text("INSERT INTO key_checks (key_id) VALUES (:value)"), {"value": CANARY})


def _wrong_type(session: Session) -> None:
    row = {"key_id": "k", "check_value": "v", "created_at": CANARY}
    session.execute(sa.insert(KeyCheck).values(**row))
    session.execute(sa.text("SELECT 1 1"))  # SQLite takes any type; it fails here


def _not_json(session: Session) -> None:
    session.add(Caller(id="c", name="n", roles=[], grants=[{"x": {CANARY}}], created_at=1.0))
    session.flush()


def _not_text(session: Session) -> None:
    session.add(KeyCheck(key_id=f"{CANARY}\udc80", check_value="v", created_at=1.0))
    session.flush()


def _too_large(session: Session) -> None:
    session.add(SealedSecret(owner=CANARY, version=2**70, key_id="k", sealed=b"", created_at=1.0))
    session.flush()


def _unbindable(session: Session) -> None:
    session.execute(sa.text("SELECT :value"), {"value": [object(), CANARY]})


def _goes_on_after_an_error(session: Session) -> None:
    for _ in range(2):
        with contextlib.suppress(IntegrityError):
            _put(CANARY)(session)
    session.execute(sa.text("SELECT 1"))
    session.flush()


DEFECTS = [_wrong_type, _no_sql, _not_json, _not_text, _unbindable, _goes_on_after_an_error]


@pytest.mark.parametrize("work", DEFECTS)
async def test_a_statement_that_can_never_work_is_an_internal_error_without_its_values(
    database: Database, work: Callable[[Session], None]
) -> None:
    with pytest.raises(InternalError) as caught:
        await database.transaction(work)
    assert CANARY not in _everything_told_by(caught.value)
    assert await database.transaction(_put("after")) == 1


@pytest.mark.parametrize("work", [_missing_value, _too_large])
async def test_a_row_that_the_database_refuses_is_an_error_without_its_values(
    database: Database, work: Callable[[Session], None]
) -> None:
    with pytest.raises((IntegrityError, BrokerError, OverflowError)) as caught:
        await database.transaction(work)
    assert CANARY not in _everything_told_by(caught.value)


async def test_a_schema_that_is_not_migrated_yet_is_unavailable_and_heals(empty_database_url: str) -> None:
    async with opened(empty_database_url, migrate=False) as database:
        for call in (database.transaction(_put(CANARY)), database.transaction(_unknown_table), database.read(_names)):
            with pytest.raises(DatabaseUnavailable) as caught:
                await call
            assert CANARY not in _everything_told_by(caught.value)
        await database.migrate()
        assert await database.transaction(_put("a")) == 1


async def test_an_unavailable_database_names_the_drivers_code_and_no_values(database_url: str) -> None:
    database = _impatient(database_url)
    async with _write_lock(database_url):
        with pytest.raises(DatabaseUnavailable) as caught:
            await database.transaction(_put(CANARY))
    told = _everything_told_by(caught.value)
    assert CANARY not in told
    assert ("SQLITE_BUSY" if database.dialect == "sqlite" else "55P03") in str(caught.value.__cause__)
    assert caught.value.__context__ is None
    await database.aclose()


async def test_work_that_looks_at_an_error_itself_sees_no_parameters(database: Database) -> None:
    def work(session: Session) -> str:
        with pytest.raises(sa.exc.DBAPIError) as caught:
            _unknown_table(session)
        return str(caught.value)

    text = await database.transaction(work)
    assert "parameters hidden" in text
    assert CANARY not in text


# --- the settings that durability and secrecy stand on --------------------------------------------------------------------


async def test_the_writing_sqlite_connection_is_durable_and_forgets_what_is_deleted(sqlite_url: str) -> None:
    def pragma(name: str) -> Callable[[Session], object]:
        return lambda session: session.execute(sa.text(f"PRAGMA {name}")).scalar_one()

    async with opened(sqlite_url) as database:
        expected = {
            "journal_mode": "wal",
            "synchronous": 2,
            "secure_delete": 1,
            "foreign_keys": 1,
            "busy_timeout": 5000,
        }
        assert {name: await database.transaction(pragma(name)) for name in expected} == expected
        assert await database.read(pragma("query_only")) == 1


async def test_the_sqlite_file_is_its_owners_alone_and_whole_after_closing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "broker.db"
    async with opened(f"sqlite:///{path}") as database:
        await database.transaction(_put("a"))
        await database.read(_names)
        assert {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {0o600}
    assert [each.name for each in path.parent.iterdir()] == ["broker.db"]


async def test_postgresql_ends_what_would_hang_and_lets_reads_only_read(postgres_url: str) -> None:
    def setting(name: str) -> Callable[[Session], object]:
        return lambda session: session.execute(sa.text(f"SHOW {name}")).scalar_one()

    async with opened(postgres_url) as database:
        expected = {
            "lock_timeout": "5s",
            "statement_timeout": "15s",
            "idle_in_transaction_session_timeout": "4s",
            "default_transaction_read_only": "off",
        }
        assert {name: await database.transaction(setting(name)) for name in expected} == expected
        assert await database.read(setting("default_transaction_read_only")) == "on"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///x?mode=ro",
        "sqlite+aiosqlite:///x",
        "mysql://h/d",
        f"postgresql://u:{CANARY}@h:{CANARY}/d",
        f"postgresql+psycopg://u:{CANARY}@h/d",
    ],
)
def test_other_database_urls_are_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ValueError, match="the database URL must be") as caught:
        open_database(url)
    assert CANARY not in _everything_told_by(caught.value)


async def test_a_postgresql_url_may_be_spelled_as_libpq_does(postgres_url: str) -> None:
    url = postgres_url.replace("+asyncpg", "") + "&sslmode=disable"
    async with opened(url, migrate=False) as database:
        assert database.dialect == "postgresql"
        assert await database.read(_names) == []


# --- the group writer -----------------------------------------------------------------------------------------------------

Put = Callable[[Session, Sequence[str]], list[int]]


def _counting(groups: list[int]) -> Put:
    """Write each item as a row; give its place in the group; note how large each attempted group was."""

    def write(session: Session, items: Sequence[str]) -> list[int]:
        groups.append(len(items))
        _put(*items)(session)
        return list(range(len(items)))

    return write


async def test_what_waits_is_committed_together_and_each_gets_its_own_result(database: Database) -> None:
    groups: list[int] = []
    writer = GroupWriter(database, _counting(groups))
    results = await asyncio.gather(*(writer.submit(f"{number:03}") for number in range(100)))
    assert sum(groups) == 100
    assert len(groups) <= 2
    assert results[:3] in ([0, 1, 2], [0, 0, 1])
    assert await database.read(_names) == [f"{number:03}" for number in range(100)]


async def test_while_one_group_commits_the_next_gathers(database_url: str) -> None:
    database = open_database(database_url)
    groups: list[int] = []
    writer = GroupWriter(database, _counting(groups))
    async with _write_lock(database_url):
        first = asyncio.create_task(writer.submit("first"))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(writer.submit(f"{number}")) for number in range(20)]
        await asyncio.sleep(0.05)
    await asyncio.gather(first, *others)
    assert groups == [1, 20]
    await database.aclose()


async def test_a_group_has_a_largest_size(database: Database) -> None:
    groups: list[int] = []
    writer = GroupWriter(database, _counting(groups), largest=8)
    await asyncio.gather(*(writer.submit(f"{number}") for number in range(20)))
    assert sum(groups) == 20
    assert max(groups) == 8


async def test_one_bad_item_fails_alone(database: Database) -> None:
    await database.transaction(_put("taken"))
    writer = GroupWriter(database, _counting([]))
    items = ["a", "b", "taken", "c", "d"]
    outcomes = await asyncio.gather(*(writer.submit(item) for item in items), return_exceptions=True)
    assert [isinstance(outcome, IntegrityError) for outcome in outcomes] == [item == "taken" for item in items]
    assert await database.read(_names) == ["a", "b", "c", "d", "taken"]


async def test_a_cancelled_caller_does_not_take_its_item_back(database: Database) -> None:
    writer = GroupWriter(database, _counting([]))
    leaving = asyncio.create_task(writer.submit("leaving"))
    staying = asyncio.create_task(writer.submit("staying"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await staying == 1
    assert leaving.cancelled()
    assert await database.read(_names) == ["leaving", "staying"]


async def test_a_group_before_a_locked_database_fails_at_once_and_the_writer_heals(database_url: str) -> None:
    database = _impatient(database_url)
    groups: list[int] = []
    writer = GroupWriter(database, _counting(groups))
    async with _write_lock(database_url):
        started = time.monotonic()
        waiting = [asyncio.create_task(writer.submit(f"{number}")) for number in range(51)]
        await asyncio.sleep(0.05)
        waiting.pop().cancel()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert time.monotonic() - started < 3
    assert {type(outcome) for outcome in outcomes} == {DatabaseUnavailable}
    assert len({id(outcome) for outcome in outcomes}) == 50
    assert await writer.submit("after") == 0
    await database.aclose()


async def test_a_write_without_a_result_for_each_item_is_rolled_back(database: Database) -> None:
    def forgetful(session: Session, items: Sequence[str]) -> list[int]:
        _put(*items)(session)
        return []

    writer = GroupWriter(database, forgetful)
    outcomes = await asyncio.gather(*(writer.submit(item) for item in "ab"), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {RuntimeError}
    assert await database.read(_names) == []


async def test_closing_writes_what_still_waits_and_refuses_what_comes_later(database: Database) -> None:
    writer = GroupWriter(database, _counting([]), largest=2)
    waiting = [asyncio.create_task(writer.submit(item)) for item in "abcde"]
    await asyncio.sleep(0)
    await writer.aclose()
    assert await database.read(_names) == list("abcde")
    assert len(await asyncio.gather(*waiting)) == 5
    with pytest.raises(DatabaseUnavailable):
        await writer.submit("late")


async def test_closing_a_writer_that_never_wrote_is_fine(database: Database) -> None:
    groups: list[int] = []
    await GroupWriter(database, _counting(groups)).aclose()
    assert groups == []


async def test_a_closer_who_gives_up_does_not_stop_the_writing(database_url: str) -> None:
    database = open_database(database_url)
    writer = GroupWriter(database, _counting([]))
    async with _write_lock(database_url):
        waiting = asyncio.create_task(writer.submit("a"))
        await asyncio.sleep(0.02)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.aclose(), 0.05)
    assert await waiting == 0
    await database.aclose()


async def test_nobody_is_left_waiting_when_the_loop_is_torn_down(database_url: str) -> None:
    database = _impatient(database_url)
    writer = GroupWriter(database, _counting([]), largest=1)
    async with _write_lock(database_url):
        waiting = [asyncio.create_task(writer.submit(item)) for item in "ab"]
        await asyncio.sleep(0.02)
        flushing = next(task for task in asyncio.all_tasks() if "_flush" in repr(task.get_coro()))
        flushing.cancel()
        outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 2)
    assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError}
    await database.aclose()


async def test_a_group_belongs_to_none_of_the_requests_that_wait_for_it(database: Database) -> None:
    request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")
    seen: list[str] = []

    def write(_session: Session, items: Sequence[str]) -> Sequence[str]:
        seen.append(request_id.get())
        return items

    request_id.set("mine")
    assert await GroupWriter(database, write).submit("a") == "a"
    assert seen == ["none"]


class _ListDatabase:
    """A database of one list, for the law below: a failed transaction leaves it as it was."""

    dialect = "list"

    def __init__(self) -> None:
        self.rows: list[int] = []

    async def transaction(self, work: Callable[[Session], T]) -> T:
        before = list(self.rows)
        await asyncio.sleep(0)
        try:
            return work(cast("Session", self))
        except Exception:
            self.rows = before
            raise


@settings(max_examples=200, deadline=None)
@given(bad=st.lists(st.booleans(), max_size=40), largest=st.integers(1, 16))
def test_exactly_the_bad_items_fail_and_the_others_are_written_once_and_in_order(bad: list[bool], largest: int) -> None:
    database = _ListDatabase()

    def write(_session: Session, items: Sequence[int]) -> Sequence[int]:
        for item in items:
            if bad[item]:
                raise KeyError(item)
            database.rows.append(item)
        return items

    async def run() -> list[int | BaseException]:
        writer = GroupWriter(cast("Database", database), write, largest=largest)
        return await asyncio.gather(*(writer.submit(item) for item in range(len(bad))), return_exceptions=True)

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        outcomes = runner.run(run())
    assert [isinstance(outcome, KeyError) for outcome in outcomes] == bad
    assert database.rows == [item for item, is_bad in enumerate(bad) if not is_bad]


async def test_nobody_waits_for_a_group_longer_than_the_patience(database_url: str) -> None:
    database = open_database(database_url)
    writer = GroupWriter(database, _counting([]), patience_seconds=0.2)
    async with _write_lock(database_url):
        started = time.monotonic()
        first = asyncio.create_task(writer.submit("first"))
        await asyncio.sleep(0.1)
        outcomes = await asyncio.gather(first, writer.submit("second"), return_exceptions=True)
        assert 0.2 <= time.monotonic() - started < 2
    assert {type(outcome) for outcome in outcomes} == {TimeoutError}
    await writer.aclose()
    assert await database.read(_names) == ["first", "second"], "an item is not taken back"
    await database.aclose()


# --- the group reader -----------------------------------------------------------------------------------------------------


def _finding(groups: list[int]) -> Callable[[sa.Connection, Sequence[str]], list[bool]]:
    """Say of each name whether there is such a row; note how large each attempted group was."""

    def find(connection: sa.Connection, names: Sequence[str]) -> list[bool]:
        groups.append(len(names))
        if "bad" in names:
            raise ValueError("bad")
        found = set(_names_of(connection))
        return [name in found for name in names]

    return find


def _names_of(connection: sa.Connection) -> list[str]:
    return list(connection.execute(sa.text("SELECT key_id FROM key_checks")).scalars())


async def test_what_is_asked_for_at_once_is_one_query(database: Database) -> None:
    await database.transaction(_put("a", "b"))
    groups: list[int] = []
    reader = GroupReader(database, _finding(groups))
    assert await asyncio.gather(*(reader.submit(name) for name in "abcab")) == [True, True, False, True, True]
    assert groups == [5]


async def test_a_group_read_sees_what_was_committed_before_it_was_asked_for(database: Database) -> None:
    reader = GroupReader(database, _finding([]))
    for number in range(30):
        others = [asyncio.create_task(reader.submit(f"other-{number}")) for _ in range(number % 4)]
        await asyncio.sleep(0 if number % 2 else 0.001)
        await database.transaction(_put(f"{number}"))
        assert await reader.submit(f"{number}"), "although a group may have been under way"
        await asyncio.gather(*others)


async def test_one_bad_key_fails_alone(database: Database) -> None:
    await database.transaction(_put("a", "b"))
    reader = GroupReader(database, _finding([]))
    outcomes = await asyncio.gather(*(reader.submit(key) for key in ("a", "bad", "b", "c")), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["True", "bad", "True", "False"]


async def test_a_group_reader_cannot_write_and_says_when_the_database_is_closed(database_url: str) -> None:
    database = open_database(database_url)

    def write(connection: sa.Connection, items: Sequence[str]) -> list[str]:
        connection.execute(sa.text("DELETE FROM audit_head"))
        return list(items)

    with pytest.raises(BrokerError):
        await GroupReader(database, write).submit("a")
    await database.aclose()
    with pytest.raises(DatabaseUnavailable):
        await GroupReader(database, _finding([])).submit("a")


async def test_the_clock_comes_along_with_the_rows(database: Database) -> None:
    def read(connection: sa.Connection) -> float:
        return float(connection.execute(sa.select(clock(connection))).scalar_one())

    before = await database.read(now)
    assert before <= await database.query(read) <= await database.read(now)


async def test_a_burst_of_queries_waits_in_the_readers_line_and_none_fails(postgres_url: str) -> None:
    database = PostgresDatabase(postgres_url, pool_size=2, busy_timeout_seconds=1.0)
    slow = sa.text("SELECT 1 FROM pg_sleep(0.05)")
    try:
        # 100 at two at a time take 2.5 s: longer than anybody would wait for a connection of the pool by itself.
        found = await asyncio.gather(
            *(database.query(lambda connection: connection.execute(slow).scalar_one()) for _ in range(100))
        )
    finally:
        await database.aclose()
    assert found == [1] * 100


async def test_a_query_that_fails_takes_nothing_from_the_next_one(database: Database) -> None:
    def wrong(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT no_such_column FROM flows")

    for _ in range(3):
        with pytest.raises((InternalError, DatabaseUnavailable)):
            await database.query(wrong)
        assert await database.query(lambda one: one.execute(sa.text("SELECT 1")).scalar_one()) == 1


async def test_a_query_leaves_no_transaction_behind_that_would_hide_later_commits(database: Database) -> None:
    def count(connection: sa.Connection) -> int:
        return int(connection.execute(sa.text("SELECT count(*) FROM sessions")).scalar_one())

    insert = sa.text(
        "INSERT INTO sessions (id, token_digest, caller_id, subject, variables, tags, created_at, expires_at) "
        "VALUES (:id, '', '', '', '{}', '{}', 1, 1)"
    )
    for number in range(3):
        assert await database.query(count) == number
        await database.transaction(lambda session, number=number: session.execute(insert, {"id": f"ses_{number}"}))  # type: ignore[misc]


SLOW = {
    "sqlite": "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000000) SELECT count(*) FROM n",
    "postgresql": "SELECT count(*) FROM (SELECT 1 FROM pg_sleep(0.3)) AS slept",
}


async def test_a_read_aside_lets_the_event_loop_go_on(database: Database) -> None:
    """In a thread on SQLite, where a plain read would hold the loop; writes are refused there too."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.005)
            turns += 1

    turning = asyncio.create_task(turn())
    slow = sa.text(SLOW[database.dialect])
    assert await database.read_aside(lambda session: session.execute(slow).scalar_one()) > 0
    turning.cancel()
    assert turns >= 5
    with pytest.raises((DatabaseUnavailable, InternalError)):
        await database.read_aside(lambda session: session.execute(sa.text("UPDATE webhook_state SET number = 7")))
    await database.aclose()
    with pytest.raises(DatabaseUnavailable):
        await database.read_aside(lambda session: session.execute(slow).scalar_one())
