"""Hand-outs with secrets in a real Vault's KV against sealed rows and against Vault's own reads, and what a cold read costs.

`make bench-vault` (the Vault is built by `make vault`). Whatever is measured has core 0 with all of its threads, the load is
on core 1. The broker runs as in production on SQLite, with an audit row durable before each answer (the two are counted and
must be equal); what is opened stays in memory for 30 s, and is then read again. Vault runs with a file audit device, which it
does not sync, and with a token as Vault makes them; reads with one without the default policy, which are twice as fast, stand
beside them. While the broker over KV is measured, Vault is on core 1. Secrets get into KV by a real move. Variants are
interleaved. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx2
from _fill import fill
from _servers import LOAD_CORE, SERVER_CORE, Server, broker_server, stay_on_load_core
from tokens import Variant, interleaved, proven, token_requests

from broker.app import open_parts
from broker.callers import mint_key
from broker.settings import Settings, load_settings
from broker.telemetry import configure_logging
from broker.vault import open_server, open_store
from broker.vault.moving import Move
from tests.real.vault import VaultServer, running_vault

POPULATION, ROUNDS, SECONDS, AT_ONCE = 1_000, 5, 3.0, 16
BARS = {"kv_warm_vs_sealed": 0.9, "kv_cold_vs_bare_read": 0.5, "hand_out_vs_kv_read": 2.0}


@dataclass
class Reads(Variant):
    """Vault itself, which has the core for itself only while it is measured."""

    def run(self, seconds: float, *, counts: bool = True) -> None:
        """See ``Variant``."""
        put_on(self.server.pid, SERVER_CORE)
        super().run(seconds, counts=counts)
        put_on(self.server.pid, LOAD_CORE)


def put_on(pid: int, core: int) -> None:
    """Move every thread of a process to a core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {core})


@contextlib.contextmanager
def vault(place: Path) -> Iterator[tuple[VaultServer, Server]]:
    """Run a Vault with a file audit device; Go sees one processor, so it has one at a time."""

    def directory(name: str) -> Path:
        made = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))
        (made / "data").mkdir()
        return made

    with running_vault(directory) as made:
        assert made.process is not None
        made.admin("PUT", "sys/audit/file", {"type": "file", "options": {"file_path": str(place / "vault-audit.log")}})
        yield made, Server(made.port, made.process.pid)


@contextlib.contextmanager
def broker(
    name: str, place: Path, of_vault: Mapping[str, str] | None = None
) -> Iterator[tuple[Variant, Sequence[str]]]:
    """Fill a new database, move its secrets to KV if a Vault is given, and serve it; give the connections' ids too."""
    directory = place / name.replace(" ", "-")
    directory.mkdir()
    key = mint_key()[1].reveal()
    environment = {
        "BROKER_ENV": "production",
        "BROKER_PUBLIC_URL": "https://broker.example",
        "BROKER_KEYRING": f"bench:{base64.b64encode(os.urandom(32)).decode()}",
        "BROKER_DATA_DIR": str(directory),
        "BROKER_DATABASE_URL": f"sqlite:///{directory}/broker.db",
    }
    settings = load_settings({**environment, "BROKER_ADMIN_KEY": key}, directory=directory)
    configure_logging(settings, quiet=True)
    ids = asyncio.run(fill(settings, POPULATION))
    if of_vault is not None:
        environment = {**environment, **of_vault}
        started = time.monotonic()
        copied = asyncio.run(
            moved(load_settings({**environment, "BROKER_VAULT_FALLBACK": "local"}, directory=directory))
        )
        print(f"{name}: {copied:,} secrets moved to KV in {time.monotonic() - started:.1f} s", flush=True)
    with broker_server(environment) as server:
        yield Variant(name, server, token_requests(ids, key), environment["BROKER_DATABASE_URL"]), ids


async def moved(settings: Settings) -> int:
    """Move everything to KV, as `broker vault migrate` does; return how many secrets are there."""
    async with open_parts(settings) as parts:
        server = await open_server(settings)
        old, new = [
            await open_store(settings, kind, parts.database, parts.sealer, server) for kind in ("local", "hashicorp")
        ]
        last = await Move(parts.database, old, new).passes(lambda _: None)
        assert last.found_nothing_new
        if server is not None:
            await server.aclose()
        return len(last.verified)


def kv_requests(ids: Sequence[str], token: str) -> Callable[[], bytes]:
    """Return a function that makes the next KV read of a random connection's secret."""
    rest = f" HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Vault-Token: {token}\r\n\r\n".encode()
    paths = [b"GET " + path.encode() for path in map(kv_path, ids)]
    return lambda: random.choice(paths) + rest  # noqa: S311 - load, not secrecy


def kv_path(connection_id: str) -> str:
    """Return where KV has a connection's secret."""
    return f"/v1/secret/data/broker/connections/{connection_id}"


def hand_outs(place: Path, server: VaultServer, process: Server) -> tuple[dict[str, float], Sequence[str]]:
    """Measure the broker over both stores, and Vault by itself; return the ratios, and what is in KV."""
    token = server.token()
    of_vault = {"BROKER_VAULT": "hashicorp", "VAULT_ADDR": server.address, "VAULT_TOKEN": token}
    with broker("sealed rows", place) as (sealed, _), broker("KV", place, of_vault) as (kv, ids):
        ordinary = server.token(policies=("broker", "default"), no_default_policy=False)
        reads = Reads("Vault's KV read", process, kv_requests(ids, ordinary))
        barest = Reads("... without default", process, kv_requests(ids, token))
        interleaved([sealed, kv, reads, barest])
        proven([sealed, kv, reads, barest])
    rates = [one.median("per_second") for one in (sealed, kv, reads, barest)]
    print(f"a hand-out against a KV read with a token without the default policy: {rates[1] / rates[3]:.3f}")
    ratios = {"kv_warm_vs_sealed": rates[1] / rates[0], "hand_out_vs_kv_read": rates[1] / rates[2]}
    return ratios, ids


@dataclass
class Reader:
    """A way to read a secret, and how many times a second it went in each round."""

    name: str
    read: Callable[[str], Awaitable[object]]
    rounds: list[float] = field(default_factory=list)

    async def run(self, ids: Sequence[str], seconds: float, *, counts: bool = True) -> None:
        """Read random secrets, ``AT_ONCE`` at a time."""
        started, done = time.perf_counter(), 0

        async def lane() -> None:
            nonlocal done
            while time.perf_counter() < started + seconds:
                await self.read(random.choice(ids))  # noqa: S311 - load, not secrecy
                done += 1

        await asyncio.gather(*(lane() for _ in range(AT_ONCE)))
        if counts:
            self.rounds.append(done / (time.perf_counter() - started))


async def cold(place: Path, server: VaultServer, ids: Sequence[str]) -> float:
    """Return how fast our store reads, nothing cached, against a bare read by the same client; Vault has core 0."""
    settings = server.settings(place)
    session = await open_server(settings)
    nothing: Any = None  # a store of its own needs no database
    store = await open_store(settings, "hashicorp", nothing, nothing, session)
    limits = httpx2.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    headers = {"X-Vault-Token": server.token()}
    async with httpx2.AsyncClient(base_url=server.address, trust_env=False, limits=limits, headers=headers) as http:

        async def bare(connection_id: str) -> object:
            return (await http.get(kv_path(connection_id))).raise_for_status().json()["data"]["data"]

        readers = [
            Reader("bare read", bare),
            Reader("HashicorpVault.get", lambda one: store.get(f"connections/{one}", 1)),
        ]
        for one in readers:
            await one.run(ids, 1.0, counts=False)
        for _ in range(ROUNDS):
            for one in readers:
                await one.run(ids, SECONDS)
    await cast("Any", session).aclose()
    for one in readers:
        print(f"{one.name:20s} {statistics.median(one.rounds):9,.0f} a second, {AT_ONCE} at once", flush=True)
    return statistics.median(readers[1].rounds) / statistics.median(readers[0].rounds)


def main() -> None:
    """Run everything; print the table, what was missed, and the JSON line."""
    stay_on_load_core()
    with tempfile.TemporaryDirectory(prefix="broker-bench-vault-") as directory:
        place = Path(directory)
        with vault(place) as (server, process):
            found, ids = hand_outs(place, server, process)
            put_on(process.pid, SERVER_CORE)
            found["kv_cold_vs_bare_read"] = asyncio.run(cold(place, server, ids))
    ratios = {name: round(found[name], 3) for name in BARS}
    for name, bar in BARS.items():
        print(f"{name}: {ratios[name]} ({'meets' if ratios[name] >= bar else 'MISSES'} the bar of {bar})")
    print(json.dumps({"benchmark": "vault", "ratios": ratios}))


if __name__ == "__main__":
    main()
