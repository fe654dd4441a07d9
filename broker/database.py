"""The database: one way to read, one way to write, and the group writer that commits what is waiting together.

Work inside a transaction is a plain synchronous function over a ``Session``. It cannot await, so it cannot hold a
transaction open across a network call: "claim → act → record" holds by construction. ``Database.transaction`` has the
only commit in the code base. SQLite runs writes on one thread (its lock may block) and reads on the event loop (WAL readers
never block); PostgreSQL goes through asyncpg. Figures: ``docs/decisions/0002-database.md``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel import Session
from sqlmodel.ext.asyncio.session import AsyncSession

from broker.errors import DatabaseUnavailable

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")

BUSY_TIMEOUT_SECONDS = 5.0
MIGRATION_LOCK = 0x42524F4B  # "BROK": one migration at a time on PostgreSQL


def now(session: Session) -> float:
    """Return the database's clock, seconds since 1970 UTC. SQLite has none of its own: there it is this machine's."""
    if session.get_bind().dialect.name == "sqlite":
        return time.time()
    return float(session.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


class Database(Protocol):
    """What both engines offer. Calls may run at once; each ``work`` runs alone on its session."""

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in one write transaction and commit it; any exception rolls all of it back.

        Raises ``DatabaseUnavailable`` when the database is locked, full or gone. ``IntegrityError`` passes through:
        a caller that races for a unique key decides what losing means. Objects stay readable afterwards.
        """

    async def read(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` without a transaction: each statement sees what is committed. ``work`` must not write."""

    async def migrate(self) -> None:
        """Bring the schema to this version's head, once, under a lock that other processes wait for."""

    async def schema_revision(self) -> str | None:
        """Return the revision that the database is at, None for an empty one."""

    async def aclose(self) -> None:
        """Close every connection."""


@contextlib.contextmanager
def _translated() -> Any:  # noqa: ANN401 - a generator context manager
    """Turn driver errors into ours; keep ``IntegrityError``. The driver's text (it may hold parameters) is dropped."""
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, PoolTimeout, OSError, TimeoutError) as error:
        raise DatabaseUnavailable from _without_parameters(error)


def _without_parameters(error: BaseException) -> BaseException:
    if isinstance(error, DBAPIError):
        error.hide_parameters = True
        error.params = None
    return error


class SqliteDatabase:
    """SQLite in WAL mode with ``synchronous=FULL``: one writing connection on its own thread, one reading on the loop."""

    dialect = "sqlite"

    def __init__(self, path: Path) -> None:
        """Open (and create) the file at ``path``; several processes may do so at once."""
        self._writer = _sqlite_engine(path, begin="BEGIN IMMEDIATE")
        self._reader = _sqlite_engine(path, begin=None).execution_options(isolation_level="AUTOCOMMIT")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite-writer")

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """See ``Database``. A cancelled caller does not stop a transaction that has begun."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._write, work)

    def _write(self, work: Callable[[Session], T]) -> T:
        with _translated(), Session(self._writer, expire_on_commit=False) as session:
            result = work(session)
            session.commit()
            return result

    async def read(self, work: Callable[[Session], T]) -> T:
        """See ``Database``."""
        with _translated(), Session(self._reader, expire_on_commit=False) as session:
            return work(session)

    async def migrate(self) -> None:
        """See ``Database``."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._migrate)

    def _migrate(self) -> None:
        with _translated(), self._writer.begin() as connection:
            _upgrade(connection)

    async def schema_revision(self) -> str | None:
        """See ``Database``."""
        with _translated(), self._reader.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    async def aclose(self) -> None:
        """See ``Database``; a transaction under way is finished first."""
        await asyncio.to_thread(self._thread.shutdown)
        self._writer.dispose()
        self._reader.dispose()


def _sqlite_engine(path: Path, *, begin: str | None) -> sa.Engine:
    engine = sa.create_engine(
        f"sqlite:///{path}",
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_SECONDS},
        hide_parameters=True,
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:  # noqa: ANN401 - a driver connection
        connection.isolation_level = None  # the driver must not begin transactions by itself
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA secure_delete=ON")

    if begin is not None:

        @sa.event.listens_for(engine, "begin")
        def begin_transaction(connection: sa.Connection) -> None:
            connection.exec_driver_sql(begin)

    return engine


class PostgresDatabase:
    """PostgreSQL through asyncpg; reads on autocommit connections."""

    dialect = "postgresql"

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        """Take a ``postgresql+asyncpg://`` URL; nothing is dialled before the first use."""
        self._engine: AsyncEngine = create_async_engine(
            url,
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_timeout=BUSY_TIMEOUT_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "command_timeout": 30},
        )
        self._reader = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """See ``Database``. A caller that is cancelled before the commit rolls back."""
        with _translated():
            async with AsyncSession(self._engine, expire_on_commit=False) as session:
                result = await session.run_sync(cast("Callable[[Any], T]", work))
                await session.commit()
                return result

    async def read(self, work: Callable[[Session], T]) -> T:
        """See ``Database``."""
        with _translated():
            async with AsyncSession(self._reader, expire_on_commit=False) as session:
                return await session.run_sync(cast("Callable[[Any], T]", work))

    async def migrate(self) -> None:
        """See ``Database``."""
        with _translated():
            async with self._engine.begin() as connection:
                await connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
                await connection.run_sync(_upgrade)

    async def schema_revision(self) -> str | None:
        """See ``Database``."""
        with _translated():
            async with self._reader.connect() as connection:
                return await connection.run_sync(lambda c: MigrationContext.configure(c).get_current_revision())

    async def aclose(self) -> None:
        """See ``Database``."""
        await self._engine.dispose()


def open_database(url: str) -> SqliteDatabase | PostgresDatabase:
    """Return the engine for ``sqlite:///path`` or ``postgresql+asyncpg://…`` (ValueError for anything else)."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        path = Path(parsed.database)
        path.parent.mkdir(parents=True, exist_ok=True)
        return SqliteDatabase(path)
    if parsed.get_backend_name() == "postgresql":
        return PostgresDatabase(parsed.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False))
    message = "the database URL must be sqlite:///<path> or postgresql+asyncpg://…"
    raise ValueError(message)


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def head_revision() -> str | None:
    """Return the schema revision that this version of the code is written for."""
    return ScriptDirectory.from_config(_migrations()).get_current_head()


def _upgrade(connection: sa.Connection) -> None:
    config = _migrations()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


class GroupWriter(Generic[Item, Result]):
    """Commits what is waiting together: the reason why a durable record per call is affordable.

    ``write(session, items)`` gets every waiting item in order and returns a result for each. While one group commits, the
    next gathers; an idle writer commits at once. If a group fails, each of its items is tried alone, so that one bad item
    fails by itself. One per process and kind of work; ``submit`` may be called by many tasks at once.
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

    async def submit(self, item: Item) -> Result:
        """Return the item's result after its transaction was committed, or raise what made it fail.

        A caller that is cancelled meanwhile does not take its item back: it is written all the same.
        """
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        return await done

    async def _flush(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[: self._largest], self._waiting[self._largest :]
            await self._commit(group)

    async def _commit(self, group: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        items = [item for item, _ in group]
        try:
            results = await self._database.transaction(lambda session: self._write(session, items))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            if len(group) == 1:
                _fail(group[0][1], error)
                return
            for one in group:
                await self._commit([one])
            return
        for (_, done), result in zip(group, results, strict=True):
            if not done.done():
                done.set_result(result)

    async def aclose(self) -> None:
        """Write what is still waiting, then return."""
        if self._flushing is not None:
            await self._flushing


def _fail(done: asyncio.Future[Any], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)


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
