"""A replica that is told to end serves what it has, tells load balancers first, and nobody's request fails meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import resource
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import col

from broker.demo.sandbox import SandboxOptions
from broker.models import AuditRecord
from broker.proxy.outcomes import ACTION
from tests.commands import free_port
from tests.crash.balancer import open_balancer
from tests.crash.processes import (
    Site,
    Wire,
    connected,
    import_expired,
    is_up,
    open_site,
    process_environment,
    token_of,
    token_request,
)
from tests.crash.webhook_parties import make_source, operator, push_body, push_request
from tests.flows.upstream import Got, api_server

CLIENTS = 8
STOP_SECONDS = 30.0


@dataclass
class Replica:
    """One `broker serve` at a port that it keeps over restarts."""

    site: Site
    log: Path
    variables: dict[str, str]
    port: int = field(default_factory=free_port)
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        command = (sys.executable, "-m", "broker", "serve", "--port", str(self.port), "--no-worker")
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                env=process_environment(self.site, **self.variables),
                cwd=self.site.settings.data_dir,
                stdout=log,
                stderr=log,
            )
        await is_up(self.port)

    def tell_to_end(self) -> None:
        """Send SIGTERM."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """Wait until it is gone; return its exit status."""
        assert self.process is not None
        async with asyncio.timeout(STOP_SECONDS):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def replicas(site: Site, count: int, **variables: str) -> AsyncIterator[Sequence[Replica]]:
    """Run so many replicas; what is left of them at the end is killed."""
    made = [Replica(site, site.settings.data_dir / f"replica-{number}.log", variables) for number in range(count)]
    try:
        await asyncio.gather(*(one.start() for one in made))
        yield made
    finally:
        for one in made:
            if one.process is not None and one.process.returncode is None:
                one.process.kill()
                await one.process.wait()


def get(site: Site, path: str) -> bytes:
    """Return a request for a path, by the admin."""
    return f"GET {path} HTTP/1.1\r\nHost: broker\r\nAuthorization: Bearer {site.admin_key}\r\n\r\n".encode()


async def answered(wire: Wire, request: bytes) -> tuple[int, str, Any]:
    """Return an answer's status, its head in lower case, and its JSON."""
    wire.writer.write(request)
    head = (await wire.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    return int(head[9:12]), head, json.loads(await wire.reader.readexactly(length))


# --- a rolling restart


@dataclass
class Load:
    """Clients behind a balancer, each with a connection that it keeps, one request at a time, as fast as it is answered."""

    port: int
    requests: Sequence[bytes]
    source: str
    stopping: bool = False
    answers: int = 0
    acknowledged: int = 0
    failures: list[Any] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask until the block ends."""
        tasks = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        try:
            yield
        finally:
            self.stopping = True
            await asyncio.gather(*tasks)

    async def _client(self, number: int) -> None:
        async with connected(self.port) as wire:
            for turn in itertools.count(number):
                if self.stopping:
                    return
                is_push = turn % 4 == 0
                status, body = await wire.ask(self._push() if is_push else self.requests[turn % len(self.requests)])
                self.answers += 1
                self.acknowledged += is_push and status == 202
                if status not in {200, 202}:
                    self.failures.append((is_push, status, body[:200]))

    def _push(self) -> bytes:
        nonce = str(uuid.uuid4())
        return push_request(self.source, nonce, push_body(nonce))


@pytest.mark.timeout(180)
async def test_no_request_fails_while_two_replicas_restart_one_after_the_other(
    tmp_path: Path, postgres_url: str
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        options = SandboxOptions(mode="grace", latency_seconds=0.1)
        site = await stack.enter_async_context(open_site(tmp_path, postgres_url, options))
        ids = [await import_expired(site, f"user{number}") for number in range(12)]
        running = await stack.enter_async_context(replicas(site, 2, BROKER_DRAIN_SECONDS="1"))
        balancer = await stack.enter_async_context(open_balancer(*(one.port for one in running)))
        await balancer.has(*(one.port for one in running))
        client = await stack.enter_async_context(operator(balancer.port, site.admin_key))
        load = Load(balancer.port, [token_request(site, one) for one in ids], await make_source(client))
        async with load.running():
            for one in running:
                before = load.answers
                one.tell_to_end()
                assert await one.ended() == 0
                assert load.answers > before
                await one.start()
                await balancer.has(one.port)
        assert load.failures == []
        assert {kind: count for kind, count in balancer.counts.items() if kind in {"lost", "cut", "nobody"}} == {}
        stored = await client.get("/v1/events", params={"limit": 200})
        assert load.acknowledged > 0
        assert len(stored.json()["data"]) == min(load.acknowledged, 200)


# --- one process that ends


async def test_from_sigterm_on_it_is_not_ready_but_serves_until_balancers_have_noticed(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        site = await stack.enter_async_context(open_site(tmp_path, "", SandboxOptions(latency_seconds=1.0)))
        connection_id = await import_expired(site, "ada")
        (one,) = await stack.enter_async_context(replicas(site, 1, BROKER_DRAIN_SECONDS="2"))
        kept, asking = [await stack.enter_async_context(connected(one.port)) for _ in range(2)]
        assert "connection: close" not in (await answered(kept, get(site, "/health/ready")))[1]
        refreshed = asyncio.create_task(asking.ask(token_request(site, connection_id)))
        await until_asked(site)
        one.tell_to_end()
        await asyncio.sleep(0.3)
        status, head, body = await answered(kept, get(site, "/health/ready"))
        assert (status, list(body["failing"])) == (503, ["process"])
        assert "connection: close" in head
        assert await kept.reader.read() == b""
        async with connected(one.port) as late:
            status, head, _ = await answered(late, get(site, "/v1/connections"))
            assert (status, "connection: close" in head) == (200, True)
        assert token_of(await refreshed)
        assert await one.ended() == 0


async def until_asked(site: Site) -> None:
    """Wait until the provider has a refresh before it."""
    async with asyncio.timeout(10):
        while not site.sandbox.state.token_requests():  # noqa: ASYNC110 - another process asks
            await asyncio.sleep(0.01)


async def test_streams_end_well_and_what_lasts_longer_than_the_grace_time_is_cut(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(api_server())
        api.answer = in_pieces
        site = await stack.enter_async_context(open_site(tmp_path, "", SandboxOptions(), api_base_url=api.base))
        connection_id = await import_expired(site, "ada")
        (one,) = await stack.enter_async_context(replicas(site, 1, BROKER_GRACE_SECONDS="2"))
        events, short, endless = [await stack.enter_async_context(connected(one.port)) for _ in range(3)]
        events.writer.write(get(site, "/v1/events/stream"))
        assert (await events.reader.readuntil(b"\r\n\r\n"))[9:12] == b"200"
        for wire, pieces in ((short, 10), (endless, 1000)):
            wire.writer.write(get(site, f"/proxy/{connection_id}/pieces/{pieces}"))
            assert (await wire.reader.readuntil(b"\r\n\r\n"))[9:12] == b"200"
        told_at = time.monotonic()
        one.tell_to_end()
        assert (await events.reader.read()).endswith(b"0\r\n\r\n")
        assert (await short.reader.read()).endswith(b"0\r\n\r\n")
        assert time.monotonic() - told_at < 2.0
        assert not (await _rest(endless)).endswith(b"0\r\n\r\n")
        assert await one.ended() == 0
        assert sorted(await outcomes(site)) == ["200", "cancelled"]


async def outcomes(site: Site) -> list[str]:
    """Return what each proxied call came to, as the audit says: the API's status, or a word of ours."""
    wanted = sa.select(col(AuditRecord.detail)).where(col(AuditRecord.action) == ACTION)
    details = await site.parts.database.read(lambda session: session.execute(wanted).scalars().all())
    said = [line.split() for detail in details for line in detail["calls"]]
    return [status if word == "-" else word for _, status, word, _, _ in said]


async def in_pieces(got: Got, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with as many chunks as the path says, one in a tenth of a second."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _number in range(int(got.target.rpartition("/")[2])):
        writer.write(b"5\r\npiece\r\n")
        await writer.drain()
        await asyncio.sleep(0.1)
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def _rest(wire: Wire) -> bytes:
    """Return what comes until the end, which may be a reset."""
    pieces = b""
    with contextlib.suppress(OSError):
        while piece := await wire.reader.read(65_536):
            pieces += piece
    return pieces


async def test_a_process_may_open_as_many_files_as_the_machine_allows(tmp_path: Path) -> None:
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # as it is on most machines, and inherited
    try:
        async with open_site(tmp_path, "", SandboxOptions()) as site, replicas(site, 1) as (one,):
            assert one.process is not None
            assert resource.prlimit(one.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
