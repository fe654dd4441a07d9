"""Token hand-outs a second on one core against a bare Litestar route, in one run: `python benchmarks/tokens.py`.

The broker runs on embedded defaults (SQLite, ``synchronous=FULL``) with the audit durable before each answer: the number of
audit rows must equal the number of answers. Server on core 0, load on core 1, 64 connections, uniformly random ids.
The last line is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop
from _load import Measured, measure

from broker.app import open_parts
from broker.callers import mint_key
from broker.connections import Import
from broker.integrations import Draft
from broker.policy import Principal
from broker.settings import load_settings
from providers.spec import Secret

ROOT = Path(__file__).resolve().parent
CONNECTIONS, ROUNDS, SECONDS, POPULATION = 64, 5, 4.0, 10_000
ADMIN = Principal("benchmark", "benchmark", frozenset({"admin"}), (), "")


async def fill(data_dir: Path, key: str) -> list[str]:
    """Make the integration and its connections; return their ids."""
    settings = load_settings({}, directory=data_dir, env="development", data_dir=data_dir, admin_key=key)
    async with open_parts(settings) as parts:
        urls = {
            "authorize_url": "http://127.0.0.1:9/a",
            "token_url": "http://127.0.0.1:9/t",
            "issuer": "http://127.0.0.1:9",
        }
        urls["jwks_url"] = "http://127.0.0.1:9/j"
        draft = Draft("bench", "github", client_id="bench", client_secret=Secret("bench-secret"))
        await parts.integrations.create(draft, ADMIN)
        made = []
        for number in range(POPULATION):
            wanted = Import(
                "bench", f"user:{number}", {"type": "oauth2", "access_token": f"token-{number:08d}-{'x' * 24}"}
            )
            made.append((await parts.connections.import_(wanted, ADMIN)).id)
        return made


@contextlib.contextmanager
def server(arguments: list[str], port: int, path: str, environment: dict[str, str] | None = None) -> Iterator[None]:
    """Run a server on core 0 until the block ends."""
    process = subprocess.Popen(  # noqa: S603 - our own commands
        arguments,
        env={"PATH": os.environ["PATH"], **(environment or {})},
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {0}),  # noqa: PLW1509 - this process has one thread
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1).close()
                break
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(port: int, request: Callable[[], bytes]) -> Measured:
    """Measure one round with the load on core 1."""
    os.sched_setaffinity(0, {1})
    return uvloop.run(measure(port, request, connections=CONNECTIONS, seconds=SECONDS))


def token_requests(ids: list[str], key: str) -> Callable[[], bytes]:
    """Return a function that makes the next request for a random connection."""
    heads = [
        f"POST /v1/connections/{one}/token HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        "Content-Length: 2\r\nContent-Type: application/json\r\n\r\n{}".encode()
        for one in ids
    ]
    return lambda: random.choice(heads)  # noqa: S311 - load, not secrecy


def audit_rows(data_dir: Path) -> int:
    """Count the hand-outs in the audit table."""
    with contextlib.closing(sqlite3.connect(data_dir / "broker.db")) as database:
        query = "SELECT count(*) FROM audit_records WHERE action = 'connection.token'"
        return int(database.execute(query).fetchone()[0])


def main() -> None:
    """Run all rounds, interleaved, and print the table and the JSON line."""
    with tempfile.TemporaryDirectory() as directory:
        data_dir, key = Path(directory), mint_key()[1].reveal()
        started = time.monotonic()
        ids = asyncio.run(fill(data_dir, key))
        print(f"{POPULATION} connections made in {time.monotonic() - started:.1f} s")
        ours, bare = free_port(), free_port()
        environment = {"BROKER_ENV": "development", "BROKER_DATA_DIR": directory}
        bare_command = [
            sys.executable,
            "-m",
            "uvicorn",
            "peers.litestar_bare:app",
            "--port",
            str(bare),
            "--http",
            "httptools",
        ]
        bare_command += ["--loop", "uvloop", "--no-access-log", "--log-level", "critical", "--app-dir", str(ROOT)]
        serve = [sys.executable, "-m", "broker", "serve", "--port", str(ours)]
        with server(serve, ours, "/health/ready", environment), server(bare_command, bare, "/token"):
            rounds = interleaved(ours, bare, token_requests(ids, key))
        answers = sum(one.statuses.get(200, 0) for one in rounds["broker"])
        rows = audit_rows(data_dir)
    report(rounds, answers, rows)


def interleaved(ours: int, bare: int, request: Callable[[], bytes]) -> dict[str, list[Measured]]:
    """Run the variants in turn, so that a drifting machine hurts both alike."""
    plain = b"GET /token HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    rounds: dict[str, list[Measured]] = {"broker": [], "litestar": []}
    run(ours, request)  # warm
    for _ in range(ROUNDS):
        rounds["broker"].append(run(ours, request))
        rounds["litestar"].append(run(bare, lambda: plain))
    return rounds


def report(rounds: dict[str, list[Measured]], answers: int, rows: int) -> None:
    """Print what people and machines read; fail when an answer had no audit row or was no hand-out."""
    medians: dict[str, Any] = {}
    for name, measured in rounds.items():
        medians[name] = statistics.median(one.per_second for one in measured)
        p50, p99 = (statistics.median(getattr(one, field) for one in measured) for field in ("p50_ms", "p99_ms"))
        print(f"{name:10s} {medians[name]:9.0f} a second   p50 {p50:6.2f} ms   p99 {p99:6.2f} ms")
    bad = {status for measured in rounds.values() for one in measured for status in one.statuses} - {200}
    print(f"hand-outs answered {answers} (without the warm-up), audit rows {rows}, other statuses {sorted(bad)}")
    if bad or rows < answers:
        sys.exit("a hand-out failed or has no audit row")
    ratio = round(medians["broker"] / medians["litestar"], 3)
    print(json.dumps({"benchmark": "tokens", "ratios": {"sqlite_vs_litestar": ratio}}))


if __name__ == "__main__":
    main()
