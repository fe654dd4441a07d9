"""Real `broker serve` processes on one database, a sandbox beside them, and a backend that asks thousands of things at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.app import Parts, open_parts
from broker.callers import mint_key
from broker.demo.sandbox import DEMO_CLIENT_ID, DEMO_CLIENT_SECRET, Sandbox, SandboxOptions, TokenAnswer, serve_sandbox
from broker.imports import Import
from broker.integrations import Draft
from broker.policy import Principal
from broker.settings import Settings
from providers.spec import Secret
from tests.commands import environment, free_port
from tests.flows.rig import settings_for

ADMIN = Principal("tests", "tests", frozenset({"admin"}), (), "")
OVER = "2020-01-01T00:00:00Z"
START_SECONDS = 60.0


@dataclass(frozen=True)
class Site:
    """What processes share: the sandbox, the settings with the database, and an admin's key. ``parts``: opened by the test."""

    sandbox: Sandbox
    settings: Settings
    admin_key: str
    parts: Parts


@contextlib.asynccontextmanager
async def open_site(
    place: Path,
    database_url: str,
    options: SandboxOptions,
    make_settings: Callable[..., Settings] = settings_for,
    **config: Any,
) -> AsyncIterator[Site]:
    """Start a sandbox and open a broker's parts on the database; ``config`` is of the integration ``sandbox``."""
    admin_key = mint_key()[1].reveal()
    settings = make_settings(place, public_url="http://127.0.0.1:8000", database_url=database_url, admin_key=admin_key)
    async with serve_sandbox(options) as sandbox, open_parts(settings) as parts:
        secret = Secret(DEMO_CLIENT_SECRET)
        scopes = ("openid", "profile", "email", "offline_access")
        config = {"issuer": sandbox.issuer, **config}
        draft = Draft("sandbox", "oidc", client_id=DEMO_CLIENT_ID, client_secret=secret, scopes=scopes, config=config)
        await parts.integrations.create(draft, ADMIN)
        yield Site(sandbox, settings, admin_key, parts)


async def import_expired(site: Site, login: str) -> str:
    """Import a new grant of the user, with an access token that is over; return the connection's id."""
    return await import_over(site, login, site.sandbox.state.mint(login, "openid"))


async def import_over(site: Site, login: str, minted: TokenAnswer) -> str:
    """As ``import_expired``, for a grant that was minted already."""
    credentials = {"type": "oauth2", "access_token": minted["access_token"], "refresh_token": minted["refresh_token"]}
    wanted = Import("sandbox", f"acme:{login}", {**credentials, "expires_at": OVER})
    return (await site.parts.connections.import_(wanted, ADMIN)).id


# Processes


def process_environment(site: Site, **more: str) -> dict[str, str]:
    """Return the environment of a broker process; without coverage, which would not outlive a kill and costs half the speed."""
    settings = site.settings
    not_measured = {name: "" for name in os.environ if name.startswith("COVERAGE_")}
    variables = {
        "BROKER_ENV": "development",
        "BROKER_DATA_DIR": str(settings.data_dir),
        "BROKER_DATABASE_URL": settings.effective_database_url,
        **more,
    }
    return environment(settings.data_dir, **not_measured, **variables)


@contextlib.asynccontextmanager
async def serve(site: Site, log: Path, **more: str) -> AsyncIterator[int]:
    """Run `broker serve` until the block ends, then stop it by SIGTERM; give its port. ``more``: of its environment."""
    port = free_port()
    command = (sys.executable, "-m", "broker", "serve", "--port", str(port))
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command, env=process_environment(site, **more), cwd=site.settings.data_dir, stdout=file, stderr=file
        )
        try:
            await is_up(port)
            yield port
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def is_up(port: int) -> None:
    """Wait until the process at ``port`` answers."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async with connected(port) as wire:
                    if (await wire.ask(b"GET /health/live HTTP/1.1\r\nHost: broker\r\n\r\n"))[0] == 200:
                        return
            await asyncio.sleep(0.02)


# A backend


@dataclass(frozen=True)
class Wire:
    """One connection to a broker; one request at a time."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a whole request; return status and body. OSError or IncompleteReadError when the process dies."""
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return int(head[9:12]), await self.reader.readexactly(int(length or 0))


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Wire]:
    """Connect to a broker process."""
    wire = Wire(*await asyncio.open_connection("127.0.0.1", port))
    try:
        yield wire
    finally:
        wire.writer.close()
        with contextlib.suppress(OSError):
            await wire.writer.wait_closed()


def token_request(site: Site, connection_id: str) -> bytes:
    """Return the request for a fresh token."""
    head = (
        f"POST /v1/connections/{connection_id}/token HTTP/1.1\r\nHost: broker\r\nAuthorization: Bearer {site.admin_key}"
    )
    return f"{head}\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}".encode()


def token_of(answer: tuple[int, bytes]) -> str:
    """Return the token of an answer that must hold one."""
    assert answer[0] == 200, answer[1]
    return str(json.loads(answer[1])["access_token"])


async def ask_all_at_once(asked: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Open a connection for each (port, request), and when all are open send all; return the answers in order."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    dialling, ready, go = asyncio.Semaphore(100), asyncio.Semaphore(0), asyncio.Event()

    async def one(port: int, request: bytes) -> tuple[int, bytes]:
        async with contextlib.AsyncExitStack() as stack:
            async with dialling:
                wire = await stack.enter_async_context(connected(port))
            ready.release()
            await go.wait()
            return await wire.ask(request)

    tasks = [asyncio.create_task(one(*each)) for each in asked]
    for _ in tasks:
        await ready.acquire()
    go.set()
    return await asyncio.gather(*tasks)
