"""One way to read, one way to write, and the groups: what is waiting is committed together, or read with one query.

Work inside a transaction is a plain synchronous function over a ``Session``. It cannot await, so it cannot hold a
transaction open across a network call: "claim → act → record" holds by construction. ``Database.transaction`` has the
only commit in the code base. SQLite runs writes on one thread (its lock may block) and reads on the event loop (WAL readers
never block); PostgreSQL goes through asyncpg. Figures and reasons: ``docs/decisions/0002-database.md``.

What a driver says may quote values (a key that exists, a row that failed), so none of its text leaves this module: errors
are rebuilt from the driver's class, code and constraint name, and the original is not chained to them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import json
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, PendingRollbackError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel import Session
from sqlmodel.ext.asyncio.session import AsyncSession

from broker.errors import BrokerError, DatabaseUnavailable, InternalError

T = TypeVar("T")
Place = TypeVar("Place")
Item = TypeVar("Item")
Result = TypeVar("Result")

BUSY_TIMEOUT_SECONDS = 5.0  # for a lock, a free connection, a server that answers
STATEMENT_TIMEOUT_SECONDS = 15.0
MIGRATION_TIMEOUT_SECONDS = 300.0
LOOP_BUSY_TIMEOUT_SECONDS = 0.1  # SQLite reads run on the event loop: WAL readers wait for nobody but a recovery
QUIET_TURNS = 5
CACHE_KIB = 16_384
CHECKPOINT_PAGES = 8_000  # 32 MB of write-ahead log
SINGLE_CONNECTIONS = 2
MIGRATION_LOCK = 0x42524F4B  # "BROK": one migration at a time on PostgreSQL
FOREIGN_ERRORS = (StatementError, PendingRollbackError, PoolTimeout, OSError, UnicodeError)
SCHEMA_IS_BEHIND = frozenset({"42P01", "42703"})  # no such table, no such column: not migrated yet


class DriverFault(Exception):
    """What is kept of a driver's error: its class, code, constraint, and for a defect the statement without values."""

    safe_to_log = True


def now(session: Session) -> float:
    """Return the database's clock, seconds since 1970 UTC. SQLite has none of its own: there it is this machine's."""
    bind = session.get_bind()
    if bind.dialect.name == "sqlite":
        return float(bind.get_execution_options().get("clock", time.time)())
    return float(session.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


def clock(connection: sa.Connection) -> sa.ColumnElement[float]:
    """Return ``now`` as a column, for a query that brings the time along with its rows."""
    if connection.dialect.name == "sqlite":
        return sa.literal(connection.get_execution_options().get("clock", time.time)(), sa.Float)
    return _SERVER_CLOCK


_SERVER_CLOCK: sa.ColumnElement[float] = sa.literal_column(
    "CAST(extract(epoch FROM clock_timestamp()) AS double precision)", sa.Float(53)
)


@dataclass(frozen=True, slots=True)
class Batched:
    """A query for many keys at once, as text that was made once: for what every hand-out asks.

    Making it anew, and the library's objects around each value, cost more than the query: 10 µs of 14 for a key of 32.
    Columns come as the driver gives them.
    """

    sqlite: str
    postgresql: str

    def rows(self, connection: sa.Connection, keys: Sequence[str]) -> tuple[Sequence[Sequence[Any]], float]:
        """Return the rows whose key is one of these, and the database's time (``now`` at this machine without a row)."""
        if connection.dialect.name == "sqlite":
            rows = _plain_rows(connection, self.sqlite, json.dumps(keys))
            return rows, connection.get_execution_options().get("clock", time.time)()
        rows = cast("Any", connection.exec_driver_sql(self.postgresql, (list(keys),)).cursor).fetchall()
        return [row[:-1] for row in rows], rows[0][-1] if rows else time.time()


def _plain_rows(connection: sa.Connection, statement: str, value: str) -> list[tuple[Any, ...]]:
    """Return what a statement finds, by SQLite's own connection: the library's result costs as much as ten rows."""
    driver = cast("sqlite3.Connection", connection.connection.driver_connection)
    try:
        return driver.execute(statement, (value,)).fetchall()
    except sqlite3.Error as error:
        raise _instance_of(error) from None


def _instance_of(error: sqlite3.Error) -> DBAPIError:
    """Return a driver's error as the library would raise it."""
    return cast("DBAPIError", DBAPIError.instance("", (), error, sqlite3.Error, hide_parameters=True))


def batched(query: sa.Select[*tuple[Any, ...]], key: sa.ColumnElement[str]) -> Batched:
    """Return ``query`` for the rows whose ``key`` is one of those that ``Batched.rows`` is given."""
    in_sqlite = query.where(key.in_(sa.text("SELECT value FROM json_each(?)")))
    in_postgresql = query.add_columns(_SERVER_CLOCK).where(key == sa.text("ANY(CAST($1 AS text[]))"))
    dialects: Any = (sqlite.dialect, postgresql.dialect)
    return Batched(
        *(str(one.compile(dialect=of())) for one, of in zip((in_sqlite, in_postgresql), dialects, strict=True))
    )


class Database(Protocol):
    """What both engines offer. Calls may run at once; each ``work`` runs alone on its session.

    Every method raises ``DatabaseUnavailable``, in bounded time, when the database is locked, full, gone or too slow, and
    works again by itself once that is over. A statement that can never work raises ``InternalError``.
    """

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in one write transaction and commit it; any exception rolls all of it back.

        ``IntegrityError`` passes (without the values that the driver quotes): a caller that races for a unique key
        decides what losing means. What ``work`` itself raises passes unchanged. Objects stay readable afterwards.
        """

    async def read(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` without a transaction: each statement sees what is committed. Writes are refused."""

    async def read_aside(self, work: Callable[[Session], T]) -> T:
        """As ``read``, for what may look at thousands of rows: nothing else of this process waits for it meanwhile.

        On SQLite one such read runs after the other, on a thread: ``work`` must not touch what belongs to the event loop.
        """

    async def query(self, work: Callable[[sa.Connection], T]) -> T:
        """As ``read``, on a plain connection: spares the session where many queries are made and no objects."""

    async def migrate(self) -> None:
        """Bring the schema to this version's head, once, under a lock that other processes wait for.

        Not twice at once in one process: Alembic keeps its state in module globals.
        """

    async def schema_revision(self) -> str | None:
        """Return the revision that the database is at, None for an empty one."""

    async def aclose(self) -> None:
        """Close every connection, in bounded time; calls after it are refused."""


async def _translated(action: Awaitable[T]) -> T:
    """Turn driver errors into ours. Raised outside the handler, so that the original is not even their context."""
    try:
        return await action
    except IntegrityError as error:
        failure: Exception = IntegrityError(None, None, _fault(error))
    except FOREIGN_ERRORS as error:
        failure = _explained(error)
    raise failure


def _explained(error: BaseException) -> BrokerError:
    failure = InternalError() if _is_defect(error) else DatabaseUnavailable()
    failure.__cause__ = _fault(error)
    return failure


def _is_defect(error: BaseException) -> bool:
    """Whether the statement or its values are wrong, so that coming again later would not help.

    Everything else is a state of the database, also what we have no name for.
    """
    if not isinstance(error, DBAPIError):
        return isinstance(error, StatementError | PendingRollbackError | UnicodeError)
    driver_error = error.orig
    sqlstate = getattr(driver_error, "sqlstate", None) or ""
    sqlite_code = getattr(driver_error, "sqlite_errorname", None)
    if sqlite_code is None and type(driver_error).__module__ == "sqlite3":
        return True  # raised by the sqlite3 module itself: misuse, or a value that it cannot bind
    if sqlstate in SCHEMA_IS_BEHIND or (sqlite_code == "SQLITE_ERROR" and "no such " in str(driver_error)):
        return False
    return sqlstate[:2] in {"22", "42"} or sqlite_code in {"SQLITE_ERROR", "SQLITE_MISMATCH", "SQLITE_TOOBIG"}


def _fault(error: BaseException) -> DriverFault:
    driver_error = getattr(error, "orig", None) or error
    if getattr(driver_error, "sqlite_errorname", None) and isinstance(error, IntegrityError):
        return DriverFault(str(driver_error))  # names the columns; SQLite quotes no values
    source = getattr(driver_error, "__cause__", None) or driver_error
    facts = [type(source).__name__]
    facts += [getattr(source, name, None) or "" for name in ("sqlite_errorname", "sqlstate", "constraint_name")]
    if _is_defect(error) and isinstance(error, StatementError):
        facts.append(error.statement or "")
    return DriverFault(" ".join(filter(None, facts)))


class SqliteDatabase:
    """SQLite in WAL mode with ``synchronous=FULL``: one writing connection on its own thread, one reading on the loop."""

    dialect = "sqlite"

    def __init__(
        self, path: Path, *, busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS, clock: Callable[[], float] = time.time
    ) -> None:
        """Create the file at ``path``, readable by its owner only; several processes may use it at once.

        ``clock``: what ``now`` says, seconds since 1970 UTC; for tests.
        """
        if not path.exists():
            path.touch(mode=0o600)
        self._busy_timeout_seconds = busy_timeout_seconds
        self._clock = clock
        self._writer = _sqlite_writer(path, busy_timeout_seconds, clock)
        self._plain: sqlite3.Connection | None = None
        self._reader = _sqlite_reader(path, min(busy_timeout_seconds, LOOP_BUSY_TIMEOUT_SECONDS), clock)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite-writer")
        self._aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite-aside")
        self._kept: sa.Connection | None = None  # for queries: to check one out of the pool costs 27 µs
        self._wrote_at = 0.0
        self._closed = False

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """See ``Database``. A cancelled caller does not stop a transaction that has begun."""
        start_by = time.monotonic() + self._busy_timeout_seconds
        return await self._on_thread(lambda: self._write(work, start_by))

    async def _on_thread(self, action: Callable[[], T]) -> T:
        if self._closed:
            raise DatabaseUnavailable
        return await _translated(asyncio.get_running_loop().run_in_executor(self._thread, action))

    def _require_turn(self, start_by: float) -> None:
        """Give up when those ahead got nowhere: else every one of a long queue waits for the lock."""
        if time.monotonic() > max(start_by, self._wrote_at + self._busy_timeout_seconds):
            raise DatabaseUnavailable

    def _write(self, work: Callable[[Session], T], start_by: float) -> T:
        self._require_turn(start_by)
        with Session(self._writer, expire_on_commit=False) as session:
            result = work(session)
            session.commit()
        self._wrote_at = time.monotonic()
        return result

    async def plain_transaction(self, work: Callable[[sqlite3.Connection, float], T]) -> T:
        """As ``transaction``, on the driver's own connection and with the time: spares 0.3 ms for a few known statements.

        ``work`` neither begins nor ends anything.
        """
        start_by = time.monotonic() + self._busy_timeout_seconds
        return await self._on_thread(lambda: self._write_plain(work, start_by))

    def _write_plain(self, work: Callable[[sqlite3.Connection, float], T], start_by: float) -> T:
        self._require_turn(start_by)
        if self._plain is None:
            self._plain = self._driver_connection()
        driver = self._plain
        try:
            driver.execute("BEGIN IMMEDIATE")
            result = work(driver, self._clock())
            driver.execute("COMMIT")
        except sqlite3.Error as error:
            raise _instance_of(error) from None
        finally:
            if driver.in_transaction:
                driver.execute("ROLLBACK")
        self._wrote_at = time.monotonic()
        return result

    def _driver_connection(self) -> sqlite3.Connection:
        """Return a connection of the writer's kind that belongs to nobody's pool."""
        checked_out = self._writer.raw_connection()
        checked_out.detach()
        return cast("sqlite3.Connection", checked_out.dbapi_connection)

    async def read(self, work: Callable[[Session], T]) -> T:
        """See ``Database``."""
        return await _translated(self._read(work))

    async def _read(self, work: Callable[[Session], T]) -> T:
        if self._closed:
            raise DatabaseUnavailable
        return self._read_now(work)

    def _read_now(self, work: Callable[[Session], T]) -> T:
        with Session(self._reader, expire_on_commit=False) as session:
            return work(session)

    async def read_aside(self, work: Callable[[Session], T]) -> T:
        """See ``Database``. A cancelled caller does not stop a read that has begun."""
        if self._closed:
            raise DatabaseUnavailable
        loop = asyncio.get_running_loop()
        return await _translated(loop.run_in_executor(self._aside, lambda: self._read_now(work)))

    async def query(self, work: Callable[[sa.Connection], T]) -> T:
        """See ``Database``."""
        return await _translated(self._query(work))

    async def _query(self, work: Callable[[sa.Connection], T]) -> T:
        if self._closed:
            raise DatabaseUnavailable
        kept, self._kept = self._kept, None  # given back only when all went well
        connection = kept if kept is not None else self._reader.connect()
        try:
            result = work(connection)
            if connection.in_transaction():
                connection.rollback()
        except BaseException:
            connection.close()
            raise
        self._kept = connection
        return result

    async def migrate(self) -> None:
        """See ``Database``."""
        await self._on_thread(self._migrate)

    def _migrate(self) -> None:
        patience = (MIGRATION_TIMEOUT_SECONDS, self._busy_timeout_seconds)
        with self._writer.connect() as connection, _busy_timeout(connection, *patience), connection.begin():
            _upgrade(connection)

    async def schema_revision(self) -> str | None:
        """See ``Database``."""
        return await self.read(lambda session: _revision(session.connection()))

    async def aclose(self) -> None:
        """See ``Database``; a transaction under way is finished first."""
        self._closed = True
        await asyncio.to_thread(self._aside.shutdown)
        await asyncio.to_thread(self._thread.shutdown)
        if self._kept is not None:
            self._kept.close()
        self._reader.dispose()
        if self._plain is not None:
            self._plain.close()
        self._writer.dispose()  # last: closing the last connection folds the WAL into the file, which a reader may not


def _sqlite_engine(path: Path, timeout_seconds: float, clock: Callable[[], float], *pragmas: str) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"check_same_thread": False, "timeout": timeout_seconds},
        execution_options={"clock": clock},
        hide_parameters=True,
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:  # noqa: ANN401 - a driver connection
        connection.isolation_level = None  # the driver must not begin transactions by itself
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    return engine


def _sqlite_writer(path: Path, timeout_seconds: float, clock: Callable[[], float]) -> sa.Engine:
    # The pages of the indexes that audit records go to stay in memory, and a page that many transactions change is copied
    # into the file once for them all: together 5 of 35 µs that a record costs in a group of 64.
    pages = (f"cache_size=-{CACHE_KIB}", f"wal_autocheckpoint={CHECKPOINT_PAGES}")
    pragmas = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", *pages)
    engine = _sqlite_engine(path, timeout_seconds, clock, *pragmas)

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # takes the write lock now: no deadlock on upgrading later

    return engine


def _sqlite_reader(path: Path, timeout_seconds: float, clock: Callable[[], float]) -> sa.Engine:
    return _sqlite_engine(path, timeout_seconds, clock, "query_only=ON").execution_options(isolation_level="AUTOCOMMIT")


@contextlib.contextmanager
def _busy_timeout(connection: sa.Connection, seconds: float, afterwards_seconds: float) -> Any:  # noqa: ANN401
    driver: Any = connection.connection.driver_connection
    driver.execute(f"PRAGMA busy_timeout={int(seconds * 1000)}")
    try:
        yield
    finally:
        driver.execute(f"PRAGMA busy_timeout={int(afterwards_seconds * 1000)}")


class _Queue:
    """Lets so many calls at the database at once; the others are let in in order.

    Who waits gives up (DatabaseUnavailable) when nobody got anything done for so many seconds: a thousand calls that come
    together and are served one after the other are no outage.
    """

    def __init__(self, most: int, *, patience_seconds: float) -> None:
        self._free = most
        self._patience_seconds = patience_seconds
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self._moved_at = 0.0

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        if self._free:
            self._free -= 1
        else:
            await self._wait()
        try:
            yield
            self._moved_at = time.monotonic()
        finally:
            self._let_next_in()

    async def _wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        began_at = time.monotonic()
        try:
            while not turn.done():
                await asyncio.wait({turn}, timeout=self._left_seconds(began_at))
        except BaseException:
            if not turn.cancel():  # it came all the same
                self._let_next_in()
            raise

    def _left_seconds(self, began_at: float) -> float:
        left_seconds = max(began_at, self._moved_at) + self._patience_seconds - time.monotonic()
        if left_seconds <= 0:
            raise DatabaseUnavailable
        return left_seconds

    def _let_next_in(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class PostgresDatabase:
    """PostgreSQL through asyncpg: one pool that writes, and one on autocommit that the server lets only read.

    Two pools, so that writers that wait for a lock leave reads their connections.
    """

    dialect = "postgresql"

    def __init__(
        self,
        url: str | sa.URL,
        *,
        pool_size: int = 10,
        busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS,
        statement_timeout_seconds: float = STATEMENT_TIMEOUT_SECONDS,
    ) -> None:
        """Take a ``postgresql+asyncpg://`` URL; at most ``2 * pool_size + 2`` connections; none before the first use."""
        self._url = url
        self._busy_timeout_seconds = busy_timeout_seconds
        pool = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": busy_timeout_seconds}
        writing = _postgres_arguments(busy_timeout_seconds, statement_timeout_seconds)
        reading = _postgres_arguments(
            busy_timeout_seconds, statement_timeout_seconds, default_transaction_read_only="on"
        )
        plain: dict[str, Any] = {"hide_parameters": True, **pool}
        # Asking whether a connection is still alive takes a round trip, three in a transaction. What may be done once more
        # is done without asking.
        # The floor of a rotation waits for a lock and then counts: it has to see what was committed meanwhile, whatever the
        # database or the role would begin transactions with.
        self._writer = create_async_engine(
            url, connect_args=writing, pool_pre_ping=True, isolation_level="READ COMMITTED", **plain
        )
        self._reader = create_async_engine(url, connect_args=reading, isolation_level="AUTOCOMMIT", **plain)
        plain["pool_size"] = SINGLE_CONNECTIONS
        self._single = create_async_engine(url, connect_args=writing, isolation_level="AUTOCOMMIT", **plain)
        self._writers, self._readers = (_Queue(pool_size, patience_seconds=busy_timeout_seconds) for _ in range(2))
        self._closed = False

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """See ``Database``. A caller that is cancelled before the commit rolls back."""
        return await _translated(self._run(self._writer, self._writers, work, commit=True))

    async def read(self, work: Callable[[Session], T]) -> T:
        """See ``Database``."""
        return await _translated(
            self._again_if_dead(lambda: self._run(self._reader, self._readers, work, commit=False))
        )

    async def read_aside(self, work: Callable[[Session], T]) -> T:
        """See ``Database``: here no read holds anything up."""
        return await self.read(work)

    async def _again_if_dead(self, action: Callable[[], Awaitable[T]]) -> T:
        """Do it once more where a connection was found dead: that ends the others of its pool too."""
        try:
            return await action()
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
        return await action()

    async def _run(self, engine: AsyncEngine, queue: _Queue, work: Callable[[Session], T], *, commit: bool) -> T:
        if self._closed:
            raise DatabaseUnavailable
        async with queue.turn(), AsyncSession(engine, expire_on_commit=False) as session:
            result = await session.run_sync(cast("Callable[[Any], T]", work))
            if commit:
                await session.commit()
            return result

    async def query(self, work: Callable[[sa.Connection], T]) -> T:
        """See ``Database``."""
        return await _translated(self._again_if_dead(lambda: self._in_turn(work)))

    async def _in_turn(self, work: Callable[[sa.Connection], T]) -> T:
        async with self._readers.turn():  # the pool is the readers': a burst waits in one line, not beside it
            return await self._on_plain(self._reader, work)

    async def single(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work``, whose only statement is a transaction by itself: in one round trip instead of eight.

        A connection that dies meanwhile is replaced and ``work`` is done once more: that must do no harm. Raises as
        ``transaction`` does.
        """
        return await _translated(self._again_if_dead(lambda: self._on_plain(self._single, work)))

    async def _on_plain(self, engine: AsyncEngine, work: Callable[[sa.Connection], T]) -> T:
        if self._closed:
            raise DatabaseUnavailable
        async with engine.connect() as connection:
            return await connection.run_sync(work)

    async def migrate(self) -> None:
        """See ``Database``."""
        await _translated(self._migrate())

    async def _migrate(self) -> None:
        patient = _postgres_arguments(MIGRATION_TIMEOUT_SECONDS, MIGRATION_TIMEOUT_SECONDS)
        engine = create_async_engine(self._url, hide_parameters=True, connect_args=patient, poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            await connection.run_sync(_upgrade)

    async def schema_revision(self) -> str | None:
        """See ``Database``."""
        return await self.read(lambda session: _revision(session.connection()))

    async def aclose(self) -> None:
        """See ``Database``. A server that does not say goodbye is left."""
        self._closed = True
        for engine in (self._writer, self._single, self._reader):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(engine.dispose(), self._busy_timeout_seconds)


def _postgres_arguments(busy_seconds: float, statement_seconds: float, **settings: str) -> dict[str, Any]:
    return {
        "timeout": min(busy_seconds, BUSY_TIMEOUT_SECONDS),  # to connect
        "command_timeout": statement_seconds + busy_seconds,  # for a server that went silent; its own limit is first
        "server_settings": {
            "application_name": "credential-broker",
            "default_transaction_isolation": "read committed",  # also for what runs on autocommit
            "lock_timeout": f"{busy_seconds}s",
            "statement_timeout": f"{statement_seconds}s",
            # Shorter than others wait for a lock: a process that stands still inside a transaction (a paused machine) loses
            # the transaction, and with it the head of the audit, before they give up.
            "idle_in_transaction_session_timeout": f"{max(1.0, 0.8 * busy_seconds)}s",
            **settings,
        },
    }


def open_database(url: str) -> SqliteDatabase | PostgresDatabase:
    """Return the engine for ``sqlite:///path`` or ``postgresql+asyncpg://…``, creating the path's folder.

    ``ValueError`` for anything else; its text does not quote the URL, which may hold a password.
    """
    with contextlib.suppress(ArgumentError, ValueError):
        parsed = sa.make_url(url)
        if parsed.drivername == "sqlite" and not parsed.query and parsed.database not in {None, "", ":memory:"}:
            path = Path(str(parsed.database))
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return SqliteDatabase(path)
        if parsed.drivername in {"postgresql", "postgresql+asyncpg"}:
            return PostgresDatabase(_asyncpg_url(parsed))
    message = "the database URL must be sqlite:///<path> or postgresql+asyncpg://…"
    raise ValueError(message)


def _asyncpg_url(url: sa.URL) -> sa.URL:
    query = {"ssl" if name == "sslmode" else name: value for name, value in url.query.items()}  # libpq's spelling
    return url.set(drivername="postgresql+asyncpg", query=query)


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def head_revision() -> str | None:
    """Return the schema revision that this version of the code is written for."""
    return ScriptDirectory.from_config(_migrations()).get_current_head()


def older_revisions() -> frozenset[str]:
    """Return the schema revisions that this version of the code knows and that come before its own."""
    known = ScriptDirectory.from_config(_migrations()).walk_revisions()
    return frozenset(script.revision for script in known) - {head_revision() or ""}


def _revision(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _upgrade(connection: sa.Connection) -> None:
    config = _migrations()
    revision = _revision(connection)
    if revision is not None and revision not in older_revisions():
        return  # up to date, or newer: migrations only expand, and an old replica may start again after one
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


class _Group(Generic[Place, Item, Result]):
    """Gathers what many tasks submit, and does it together with one ``work(session or connection, items)``.

    While one group is at work, the next gathers; an idle one begins at once. ``work`` gets the items in order and returns a
    result for each. If a group fails, its halves are tried, so that one bad item fails by itself; if the database is not
    available, the whole group fails at once. One per process and kind of work.
    """

    def __init__(
        self,
        run: Callable[[Callable[[Place], Sequence[Result]]], Awaitable[Sequence[Result]]],
        work: Callable[[Place, Sequence[Item]], Sequence[Result]],
        largest: int,
        patience_seconds: float | None = None,
        shortcut: Callable[[Sequence[Item]], Awaitable[Sequence[Result] | None]] | None = None,
    ) -> None:
        self._shortcut = shortcut
        self._patience_seconds = patience_seconds
        self._pending: deque[tuple[float, asyncio.Future[Result]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._run = run
        self._work = work
        self._largest = largest
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._closed = False

    async def submit(self, item: Item) -> Result:
        """Return the item's result once its group is done, or raise what made it fail.

        A caller that is cancelled meanwhile does not take its item back, nor does one whose patience is over
        (``TimeoutError``). ``DatabaseUnavailable`` after ``aclose``.
        """
        if self._closed:
            raise DatabaseUnavailable
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._patience_seconds is not None:
            self._watch(done, self._patience_seconds)
        if self._flushing is None or self._flushing.done():
            # A context of its own: the group's log lines belong to none of the requests that wait.
            self._flushing = asyncio.create_task(self._flush(), context=contextvars.Context())
        return await done

    def _watch(self, done: asyncio.Future[Result], patience_seconds: float) -> None:
        """Bound the wait, with one timer for all that wait: a timer for each costs 4 µs."""
        while self._pending and self._pending[0][1].done():
            self._pending.popleft()
        self._pending.append((time.monotonic() + patience_seconds, done))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(patience_seconds, self._give_up)

    def _give_up(self) -> None:
        while self._pending and (self._pending[0][1].done() or self._pending[0][0] <= time.monotonic()):
            _fail(self._pending.popleft()[1], TimeoutError())
        self._timer = None
        if self._pending:
            wait_seconds = self._pending[0][0] - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(max(wait_seconds, 0.01), self._give_up)

    async def _flush(self) -> None:
        group: list[tuple[Item, asyncio.Future[Result]]] = []
        try:
            while self._waiting:
                await self._gather()
                group, self._waiting = self._waiting[: self._largest], self._waiting[self._largest :]
                await self._do(group)
        finally:  # when the loop is torn down meanwhile, nobody is left waiting
            for _, done in (*group, *self._waiting):
                done.cancel()

    async def _gather(self) -> None:
        """Wait until turns of the loop bring nothing more: a group costs as much as ten to twenty items.

        Several turns, for those who will ask come in two kinds of them, with a request and with an upstream's answer.
        """
        known = quiet = 0
        while quiet < QUIET_TURNS and len(self._waiting) < self._largest:
            quiet = quiet + 1 if len(self._waiting) == known else 0
            known = len(self._waiting)
            await asyncio.sleep(0)

    async def _do(self, group: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            short = None if self._shortcut is None else await self._shortcut([item for item, _ in group])
            results = await self._run(lambda place: self._do_all(place, group)) if short is None else short
        except DatabaseUnavailable as error:
            for _, done in group:
                _fail(done, _another(error))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            if len(group) == 1:
                _fail(group[0][1], error)
                return
            middle = len(group) // 2
            await self._do(group[:middle])
            await self._do(group[middle:])
        else:
            for (_, done), result in zip(group, results, strict=True):
                if not done.done():
                    done.set_result(result)

    def _do_all(self, place: Place, group: list[tuple[Item, asyncio.Future[Result]]]) -> Sequence[Result]:
        results = self._work(place, [item for item, _ in group])
        if len(results) != len(group):
            message = "a group's work must return one result for each item"
            raise RuntimeError(message)
        return results

    async def aclose(self) -> None:
        """Do what is still waiting, then return; ``submit`` is refused from now on."""
        self._closed = True
        if self._flushing is not None:
            await asyncio.wait({self._flushing})  # unlike a bare await, does not cancel it with us


class GroupWriter(_Group[Session, Item, Result]):
    """Commits what is waiting together: the reason why a durable record per call is affordable.

    ``write(session, items)`` gets every waiting item in order and returns a result for each. ``submit`` returns after the
    item's transaction was committed, and may be called by many tasks at once. The rest is as ``_Group`` says.
    """

    def __init__(
        self,
        database: Database,
        write: Callable[[Session, Sequence[Item]], Sequence[Result]],
        *,
        largest: int = 256,
        patience_seconds: float | None = None,
        shortcut: Callable[[Sequence[Item]], Awaitable[Sequence[Result] | None]] | None = None,
    ) -> None:
        """Commit at most ``largest`` items in one transaction; nobody waits longer than ``patience_seconds``.

        ``shortcut(items)`` is tried first: it does all that ``write`` would do, durably, or nothing and returns None.
        """
        super().__init__(database.transaction, write, largest, patience_seconds, shortcut)


class GroupReader(_Group[sa.Connection, Item, Result]):
    """Reads what is asked for at the same time with one query: at 64 callers a tenth of the cost of a query each.

    ``find(connection, keys)`` gets every waiting key in order, one that several wait for several times, and returns a result
    for each. It starts after the last of its ``submit`` calls, so whatever was committed before a call is seen by it.
    """

    def __init__(
        self,
        database: Database,
        find: Callable[[sa.Connection, Sequence[Item]], Sequence[Result]],
        *,
        largest: int = 64,
    ) -> None:
        """Ask for at most ``largest`` keys in one query: on SQLite it runs on the event loop."""
        super().__init__(database.query, find, largest)


def _fail(done: asyncio.Future[Any], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)


def _another(error: DatabaseUnavailable) -> DatabaseUnavailable:
    """Return a copy: one exception raised in many tasks would collect all of their tracebacks."""
    copy = DatabaseUnavailable(error.detail)
    copy.__cause__ = error.__cause__
    return copy


@contextlib.asynccontextmanager
async def opened(url: str, *, migrate: bool = True) -> AsyncIterator[SqliteDatabase | PostgresDatabase]:
    """Open, migrate and, at the end, close: for the command line and tests."""
    database = open_database(url)
    try:
        if migrate:
            await database.migrate()
        yield database
    finally:
        await database.aclose()
