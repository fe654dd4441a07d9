"""Three web replicas and two workers on one PostgreSQL and one Vault, behind a balancer, under a steady mixed load.

Real processes of the command line, forked from one that has imported it. The sandbox provider, the API behind the proxy, the
receiver of webhooks, the balancer and the load live in this process. Every answer that was not as it should be is kept with the
phase that it fell in.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import sqlalchemy as sa
from sqlmodel import col

from broker.demo.sandbox import SandboxOptions
from broker.imports import Import
from broker.models import Connection, rfc3339
from tests.crash.balancer import Balancer, open_balancer
from tests.crash.campaign import Forks, Process, open_forks
from tests.crash.processes import ADMIN, Site, Wire, connected, open_site
from tests.crash.webhook_parties import (
    Receiver,
    make_source,
    open_receiver,
    operator,
    push_body,
    push_request,
    subscribe,
)
from tests.flows.upstream import api_server
from tests.real.vault import VaultServer

REPLICAS, WORKERS, CONNECTIONS = 3, 2, 300  # each connection may be forced to refresh every 30 s
LANES = 6  # of each kind
PER_SECOND = {"token": 40.0, "refresh": 4.0, "proxy": 15.0, "webhook": 10.0}
VARIABLES = {
    "BROKER_VAULT": "hashicorp",
    "BROKER_DRAIN_SECONDS": "1",
    "BROKER_GRACE_SECONDS": "10",
    "BROKER_WEBHOOKS_PER_MINUTE": "10000000",
}
WRONG_SHOWN = 200


@dataclass
class Load:
    """What is sent through the balancer, how fast, and what came of it. ``phase`` is set from outside."""

    port: int
    key: str
    ids: Sequence[str]
    source: str
    phase: str = "warm"
    answers: Counter[str] = field(default_factory=Counter)  # phase and kind
    wrong: Counter[tuple[str, str, int, str]] = field(default_factory=Counter)  # phase, kind, status, code
    acknowledged: set[str] = field(default_factory=set)
    samples: list[str] = field(default_factory=list)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send until the block ends."""
        lanes = [asyncio.create_task(self._lane(kind, number)) for kind in PER_SECOND for number in range(LANES)]
        try:
            yield
        finally:
            self._stopping.set()
            await asyncio.gather(*lanes)

    async def _lane(self, kind: str, number: int) -> None:
        """Ask one thing after the other, each at its time, on one connection; one that fell behind does not catch up."""
        ids, pace_seconds = itertools.cycle(self.ids[number::LANES]), LANES / PER_SECOND[kind]
        due = time.monotonic() + number / PER_SECOND[kind]
        while not self._stopping.is_set():
            async with contextlib.AsyncExitStack() as stack:
                wire = await stack.enter_async_context(connected(self.port))
                with contextlib.suppress(OSError, EOFError):  # an answer was cut: on with a new connection
                    while not self._stopping.is_set():
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(self._stopping.wait(), max(0.0, due - time.monotonic()))
                        due = max(due, time.monotonic() - pace_seconds) + pace_seconds
                        await self._ask(wire, kind, next(ids))
                    return
            self._note_wrong(self.phase, kind, 0, b"cut")

    async def _ask(self, wire: Wire, kind: str, connection_id: str) -> None:
        nonce = str(uuid.uuid4())
        status, body = await wire.ask(self._request(kind, connection_id, nonce))
        phase = self.phase
        self.answers[f"{phase} {kind}"] += 1
        if kind == "webhook" and status == 202:
            self.acknowledged.add(nonce)
        elif status != 200:
            self._note_wrong(phase, kind, status, body)

    def _note_wrong(self, phase: str, kind: str, status: int, body: bytes) -> None:
        code = "balancer" if not body else body[:20].decode(errors="replace")
        with contextlib.suppress(ValueError):
            code = str(json.loads(body).get("code"))
        self.wrong[phase, kind, status, code] += 1
        if len(self.samples) < WRONG_SHOWN:
            self.samples.append(f"{phase} {kind} {status} {body[:300]!r}")

    def _request(self, kind: str, connection_id: str, nonce: str) -> bytes:
        if kind == "webhook":
            return push_request(self.source, nonce, push_body(nonce))
        head = f"Host: broker\r\nAuthorization: Bearer {self.key}\r\n"
        if kind == "proxy":
            return f"GET /proxy/{connection_id}/things HTTP/1.1\r\n{head}\r\n".encode()
        body = json.dumps({"force_refresh": True} if kind == "refresh" else {})
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"POST /v1/connections/{connection_id}/token HTTP/1.1\r\n{head}\r\n{body}".encode()

    def wrong_in(self, *phases: str) -> dict[str, int]:
        """Return what was not as it should be in these phases, with its count."""
        found = {one: count for one, count in self.wrong.items() if one[0] in phases}
        return {f"{kind} {status} {code}": count for (_, kind, status, code), count in sorted(found.items())}


@dataclass
class Mixed:
    """Everything that runs."""

    site: Site
    forks: Forks
    balancer: Balancer
    receiver: Receiver
    load: Load
    web: list[Process]
    workers: list[Process]

    async def start_web(self) -> Process:
        """Start a replica, and wait until the balancer sends it requests."""
        process = await self.forks.fork("--no-worker")
        self.balancer.watch(process.port)
        await self.balancer.has(process.port)
        return process

    @property
    def processes(self) -> Sequence[Process]:
        """All that run now."""
        return (*self.web, *self.workers)

    @property
    def ports(self) -> Sequence[int]:
        """Of the replicas."""
        return [one.port for one in self.web]

    def delivered(self) -> set[str]:
        """Return the nonces of what arrived, signed as it should be."""
        return {arrival.nonce for arrival in self.receiver.arrivals if not arrival.problem}

    async def all_delivered(self, seconds: float) -> set[str]:
        """Wait until everything that was acknowledged arrived, or the time is over; return what is missing."""
        ends_at = time.monotonic() + seconds
        while (missing := self.load.acknowledged - self.delivered()) and time.monotonic() < ends_at:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        return missing

    async def statuses(self) -> Counter[str]:
        """Count the connections by status."""
        query = sa.select(col(Connection.status))
        return Counter(await self.site.parts.database.read(lambda session: list(session.execute(query).scalars())))


async def import_live(site: Site, login: str) -> str:
    """Import a new grant of the user, whose access token is good for an hour; return the connection's id."""
    minted = site.sandbox.state.mint(login, "openid")
    credentials = {"type": "oauth2", "access_token": minted["access_token"], "refresh_token": minted["refresh_token"]}
    wanted = Import("sandbox", f"acme:{login}", {**credentials, "expires_at": rfc3339(time.time() + 3600)})
    return (await site.parts.connections.import_(wanted, ADMIN)).id


@contextlib.asynccontextmanager
async def open_mixed(place: Path, database_url: str, vault: VaultServer) -> AsyncIterator[Mixed]:
    """Start everything; the load has not begun."""
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(api_server())
        receiver = await stack.enter_async_context(open_receiver())
        token = vault.token(period="1h")
        make_settings = partial(vault.settings, token=token, vault="hashicorp")
        options = SandboxOptions(mode="grace", grace_seconds=86_400, latency_seconds=0.05)
        opened = open_site(place, database_url, options, make_settings, api_base_url=api.base)
        site = await stack.enter_async_context(opened)
        ids = [await import_live(site, f"user{number}") for number in range(CONNECTIONS)]
        variables = {**VARIABLES, "VAULT_ADDR": vault.address, "VAULT_TOKEN": token}
        forks = await stack.enter_async_context(open_forks(site, **variables))
        balancer = await stack.enter_async_context(open_balancer())
        balancer.panics = True
        mixed = Mixed(site, forks, balancer, receiver, Load(balancer.port, site.admin_key, ids, ""), [], [])
        mixed.web = [await mixed.start_web() for _ in range(REPLICAS)]
        mixed.workers = [await forks.fork_worker() for _ in range(WORKERS)]
        client = await stack.enter_async_context(operator(balancer.port, site.admin_key))
        mixed.load.source = await make_source(client)
        await subscribe(client, receiver, "/all")
        yield mixed


def say(text: str) -> None:
    """Show what happens as it happens."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def directories(place: Path) -> Callable[[str], Path]:
    """Return what makes new directories for `running_vault`."""
    numbers: Iterator[int] = itertools.count()

    def make(name: str) -> Path:
        made = place / f"{name}{next(numbers)}"
        made.mkdir()
        return made

    return make


def shown(counts: Mapping[str, int]) -> str:
    """Return counts in a line."""
    return ", ".join(f"{name} x{count}" for name, count in counts.items()) or "none"
