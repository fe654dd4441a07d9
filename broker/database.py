"""One way to read, one way to write, and the group writer that commits what is waiting together.

Work inside a transaction is a plain synchronous function over a ``Session``. It cannot await, so it cannot hold a
transaction open across a network call: "claim → act → record" holds by construction. ``Database.transaction`` has the
only commit in the code base. SQLite runs writes on one thread (its lock may block) and reads on the event loop (WAL readers
never block); PostgreSQL goes through asyncpg. Figures and reasons: ``docs/decisions/0002-database.md``.

What a driver says may quote values (a key that exists, a row that failed), so none of its text leaves this module: errors
are rebuilt from the driver's class, code and constraint name, and the original is not chained to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, PendingRollbackError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel import Session
from sqlmodel.ext.asyncio.session import AsyncSession

from broker.errors import BrokerError, DatabaseUnavailable, InternalError

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")

BUSY_TIMEOUT_SECONDS = 5.0  # for a lock, a free connection, a server that answers
STATEMENT_TIMEOUT_SECONDS = 15.0
MIGRATION_TIMEOUT_SECONDS = 300.0
LOOP_BUSY_TIMEOUT_SECONDS = 0.1  # SQLite reads run on the event loop: WAL readers wait for nobody but a recovery
MIGRATION_LOCK = 0x42524F4B  # "BROK": one migration at a time on PostgreSQL
FOREIGN_ERRORS = (StatementError, PendingRollbackError, PoolTimeout, OSError, UnicodeError)
SCHEMA_IS_BEHIND = frozenset({"42P01", "42703"})  # no such table, no such column: not migrated yet


class DriverFault(Exception):
    """What is kept of a driver's error: its class, code, constraint, and for a defect the statement without values."""

    safe_to_log = True


def now(session: Session) -> float:
    """Return the database's clock, seconds since 1970 UTC. SQLite has none of its own: there it is this machine's."""
    if session.get_bind().dialect.name == "sqlite":
        return time.time()
    return float(session.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


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

    def __init__(self, path: Path, *, busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS) -> None:
        """Create the file at ``path``, readable by its owner only; several processes may use it at once."""
        if not path.exists():
            path.touch(mode=0o600)
        self._busy_timeout_seconds = busy_timeout_seconds
        self._writer = _sqlite_writer(path, busy_timeout_seconds)
        self._reader = _sqlite_reader(path, min(busy_timeout_seconds, LOOP_BUSY_TIMEOUT_SECONDS))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite-writer")
        self._closed = False

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """See ``Database``. A cancelled caller does not stop a transaction that has begun."""
        start_by = time.monotonic() + self._busy_timeout_seconds
        return await self._on_thread(lambda: self._write(work, start_by))

    async def _on_thread(self, action: Callable[[], T]) -> T:
        if self._closed:
            raise DatabaseUnavailable
        return await _translated(asyncio.get_running_loop().run_in_executor(self._thread, action))

    def _write(self, work: Callable[[Session], T], start_by: float) -> T:
        if time.monotonic() > start_by:
            raise DatabaseUnavailable  # those ahead used up the time: else every one of a long queue waits for the lock
        with Session(self._writer, expire_on_commit=False) as session:
            result = work(session)
            session.commit()
            return result

    async def read(self, work: Callable[[Session], T]) -> T:
        """See ``Database``."""
        return await _translated(self._read(work))

    async def _read(self, work: Callable[[Session], T]) -> T:
        if self._closed:
            raise DatabaseUnavailable
        with Session(self._reader, expire_on_commit=False) as session:
            return work(session)

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
        await asyncio.to_thread(self._thread.shutdown)
        self._reader.dispose()
        self._writer.dispose()  # last: closing the last connection folds the WAL into the file, which a reader may not


def _sqlite_engine(path: Path, timeout_seconds: float, *pragmas: str) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"check_same_thread": False, "timeout": timeout_seconds},
        hide_parameters=True,
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:  # noqa: ANN401 - a driver connection
        connection.isolation_level = None  # the driver must not begin transactions by itself
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    return engine


def _sqlite_writer(path: Path, timeout_seconds: float) -> sa.Engine:
    pragmas = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON")
    engine = _sqlite_engine(path, timeout_seconds, *pragmas)

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # takes the write lock now: no deadlock on upgrading later

    return engine


def _sqlite_reader(path: Path, timeout_seconds: float) -> sa.Engine:
    return _sqlite_engine(path, timeout_seconds, "query_only=ON").execution_options(isolation_level="AUTOCOMMIT")


@contextlib.contextmanager
def _busy_timeout(connection: sa.Connection, seconds: float, afterwards_seconds: float) -> Any:  # noqa: ANN401
    driver: Any = connection.connection.driver_connection
    driver.execute(f"PRAGMA busy_timeout={int(seconds * 1000)}")
    try:
        yield
    finally:
        driver.execute(f"PRAGMA busy_timeout={int(afterwards_seconds * 1000)}")


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
        """Take a ``postgresql+asyncpg://`` URL; at most ``2 * pool_size`` connections; none before the first use."""
        self._url = url
        self._busy_timeout_seconds = busy_timeout_seconds
        pool = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": busy_timeout_seconds, "pool_pre_ping": True}
        writing = _postgres_arguments(busy_timeout_seconds, statement_timeout_seconds)
        reading = _postgres_arguments(
            busy_timeout_seconds, statement_timeout_seconds, default_transaction_read_only="on"
        )
        self._writer = create_async_engine(url, hide_parameters=True, connect_args=writing, **pool)
        self._reader = create_async_engine(
            url, hide_parameters=True, connect_args=reading, isolation_level="AUTOCOMMIT", **pool
        )
        self._closed = False

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """See ``Database``. A caller that is cancelled before the commit rolls back."""
        return await _translated(self._run(self._writer, work, commit=True))

    async def read(self, work: Callable[[Session], T]) -> T:
        """See ``Database``."""
        return await _translated(self._run(self._reader, work, commit=False))

    async def _run(self, engine: AsyncEngine, work: Callable[[Session], T], *, commit: bool) -> T:
        if self._closed:
            raise DatabaseUnavailable
        async with AsyncSession(engine, expire_on_commit=False) as session:
            result = await session.run_sync(cast("Callable[[Any], T]", work))
            if commit:
                await session.commit()
            return result

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
        for engine in (self._writer, self._reader):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(engine.dispose(), self._busy_timeout_seconds)


def _postgres_arguments(busy_seconds: float, statement_seconds: float, **settings: str) -> dict[str, Any]:
    return {
        "timeout": min(busy_seconds, BUSY_TIMEOUT_SECONDS),  # to connect
        "command_timeout": statement_seconds + busy_seconds,  # for a server that went silent; its own limit is first
        "server_settings": {
            "application_name": "credential-broker",
            "lock_timeout": f"{busy_seconds}s",
            "statement_timeout": f"{statement_seconds}s",
            "idle_in_transaction_session_timeout": f"{statement_seconds}s",
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


def _revision(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _upgrade(connection: sa.Connection) -> None:
    config = _migrations()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


class GroupWriter(Generic[Item, Result]):
    """Commits what is waiting together: the reason why a durable record per call is affordable.

    ``write(session, items)`` gets every waiting item in order and returns a result for each. While one group commits, the
    next gathers; an idle writer commits at once. If a group fails, its halves are tried, so that one bad item fails by
    itself; if the database is not available, the whole group fails at once. One per process and kind of work; ``submit``
    may be called by many tasks at once.
    """

    def __init__(
        self, database: Database, write: Callable[[Session, Sequence[Item]], Sequence[Result]], *, largest: int = 256
    ) -> None:
        """Commit at most ``largest`` items in one transaction."""
        self._database = database
        self._write = write
        self._largest = largest
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._closed = False

    async def submit(self, item: Item) -> Result:
        """Return the item's result after its transaction was committed, or raise what made it fail.

        A caller that is cancelled meanwhile does not take its item back: it is written all the same.
        ``DatabaseUnavailable`` after ``aclose``.
        """
        if self._closed:
            raise DatabaseUnavailable
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._flushing is None or self._flushing.done():
            # A context of its own: the group's log lines belong to none of the requests that wait.
            self._flushing = asyncio.create_task(self._flush(), context=contextvars.Context())
        return await done

    async def _flush(self) -> None:
        group: list[tuple[Item, asyncio.Future[Result]]] = []
        try:
            while self._waiting:
                group, self._waiting = self._waiting[: self._largest], self._waiting[self._largest :]
                await self._commit(group)
        finally:  # when the loop is torn down meanwhile, nobody is left waiting
            for _, done in (*group, *self._waiting):
                done.cancel()

    async def _commit(self, group: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._database.transaction(lambda session: self._write_all(session, group))
        except DatabaseUnavailable as error:
            for _, done in group:
                _fail(done, _another(error))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            if len(group) == 1:
                _fail(group[0][1], error)
                return
            middle = len(group) // 2
            await self._commit(group[:middle])
            await self._commit(group[middle:])
        else:
            for (_, done), result in zip(group, results, strict=True):
                if not done.done():
                    done.set_result(result)

    def _write_all(self, session: Session, group: list[tuple[Item, asyncio.Future[Result]]]) -> Sequence[Result]:
        results = self._write(session, [item for item, _ in group])
        if len(results) != len(group):
            message = "a group's write must return one result for each item"
            raise RuntimeError(message)
        return results

    async def aclose(self) -> None:
        """Write what is still waiting, then return; ``submit`` is refused from now on."""
        self._closed = True
        if self._flushing is not None:
            await asyncio.wait({self._flushing})  # unlike a bare await, does not cancel it with us


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
