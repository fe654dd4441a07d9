"""Proxied calls a second on one core against Envoy's credential injector, nginx and mitmproxy, and 50 MB either way.

`make bench-proxy`. Each proxy has core 0 with all of its threads, in turn; the load and the API behind it (`wire/`, which
checks the credential of every request) share core 1. 32 connections, 1 kB of JSON. The broker works as in production (SQLite
with ``synchronous=FULL``, a caller whose grant names methods and paths, rate limits and a circuit breaker that are asked and
never say no, the scrubber on, the intent of every call durable in the audit before it leaves: as many intents as answers),
but for ``BROKER_ENV=development``, which plain http to an API needs; its log has the lines of production all the same. Variants
are interleaved. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from _fill import ADMIN
from _peers import ENVOY, WIRE, debian, mitmdump
from _servers import HERE, LOAD_CORE, Server, free_port, running, stay_on_load_core
from _shipped import described, python
from sqlmodel import Session

from broker.app import open_parts
from broker.callers import mint_key
from broker.database import opened
from broker.imports import Import
from broker.integrations import Draft
from broker.settings import load_settings
from broker.telemetry import configure_logging
from providers.spec import Secret

CONNECTIONS, ROUNDS, SECONDS, WARM_SECONDS, POPULATION = 32, 5, 4, 2, 100
HALF_LOAD_ROUNDS = 7
TRANSFER_BYTES, TRANSFER_ROUNDS, AT_ONCE = 50_000_000, 9, 20
BARS = {"vs_envoy": 0.25, "vs_mitmproxy": 6.0, "download_vs_nginx": 0.5, "upload_vs_nginx": 0.5}
MOST_ADDED_P99_MS, MOST_GROWTH_MIB = 5.0, 32.0
PEERS = HERE / "peers"
PEER_NAME, PEER_CREDENTIAL = "peer", "Bearer tok_peer"
GRANT = {
    "integrations": ["bench"],
    "subjects": ["user:*"],
    "may": ["proxy"],
    "methods": ["GET", "POST"],
    "paths": ["/json/*", "/down/*/*", "/up/*"],
}
LIMITS = {
    "rate_limit": {"max_requests": 10_000, "window_seconds": 1.0},
    "circuit_breaker": {"failure_threshold": 50, "recovery_seconds": 5.0, "window_seconds": 10.0},
}
INTENTS = sa.text("SELECT count(*) FROM audit_records WHERE outcome = 'intent'")
Heads = Callable[[str, str], list[str]]


@dataclass
class Proxy:
    """A server under load, and what its rounds gave. ``heads``: from method and path to whole requests without a body."""

    name: str
    server: Server
    heads: Heads
    place: Path
    rounds: list[dict[str, Any]] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    half_load: list[dict[str, Any]] = field(default_factory=list)
    transfers: dict[str, list[float]] = field(default_factory=lambda: {"down": [], "up": []})
    answers: int = 0
    wrong: int = 0

    def run(self, *, seconds: int = SECONDS, counts: bool = True) -> None:
        """Load it as much as it takes; ``counts``: this round is one of those that are reported."""
        before = self.server.cpu_seconds()
        round_ = self._wire("closed", self.heads("GET", "/json"), CONNECTIONS, seconds)
        spent = self.server.cpu_seconds() - before
        answered = self._noted(round_)
        if counts:
            self.rounds.append(round_)
            self.cpu_us.append(spent / answered * 1e6)

    def run_open(self, per_second: int, *, counts: bool = True) -> None:
        """Let requests arrive at a rate, by chance."""
        round_ = self._wire("open", self.heads("GET", "/json"), CONNECTIONS, SECONDS, per_second)
        self._noted(round_)
        if counts:
            self.half_load.append(round_)

    def move(self, way: str, *, at_once: int = 1) -> float:
        """Move ``TRANSFER_BYTES`` each way ``at_once`` times; return the megabytes a second of all together."""
        method, path, more = (
            ("GET", f"/down/{TRANSFER_BYTES}", ()) if way == "down" else ("POST", "/up", (TRANSFER_BYTES,))
        )
        heads = self.heads(method, path)
        for length in more:
            heads = [head.replace("\r\n\r\n", f"\r\nContent-Length: {length}\r\n\r\n") for head in heads]
        made = self._wire(way, heads, TRANSFER_BYTES, at_once)
        self.answers += made["right"]
        rate = float(TRANSFER_BYTES * at_once / 1e6 / made["seconds"])
        if at_once == 1:
            self.transfers[way].append(rate)
        return rate

    def median(self, name: str) -> float:
        """Return the median over the rounds of one field."""
        return statistics.median(one[name] for one in self.rounds)

    def median_open(self, name: str) -> float:
        """Return the median over the rounds at half load of one field."""
        return statistics.median(one[name] for one in self.half_load)

    def _noted(self, round_: dict[str, Any]) -> int:
        answered = sum(round_["statuses"].values())
        self.answers += answered
        self.wrong += answered - round_["statuses"].get("200", 0) + round_["wrong"]
        return int(answered)

    def _wire(self, mode: str, requests: Sequence[str], *numbers: int) -> dict[str, Any]:
        file = self.place / f"{self.name.replace(' ', '-')}-{mode}.json"
        file.write_text(json.dumps(requests), encoding="ascii")
        command = [WIRE, mode, str(self.server.port), file, *map(str, numbers)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603 - our own command
        return dict(json.loads(done.stdout))


# --- what is measured


def request(method: str, target: str, credential: str) -> str:
    """Return a request without a body, as an SDK writes it."""
    return (
        f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\nAccept-Encoding: identity\r\n"
        f"Authorization: {credential}\r\nUser-Agent: sdk/1.0 (benchmark)\r\n\r\n"
    )


def peer_heads(method: str, path: str) -> list[str]:
    """Return what a peer is asked: like the broker's callers, with a credential that it has to replace."""
    return [request(method, f"{path}/{PEER_NAME}", "Bearer of-the-caller")]


def direct_heads(method: str, path: str) -> list[str]:
    """Return what the API is asked directly."""
    return [request(method, f"{path}/{PEER_NAME}", PEER_CREDENTIAL)]


@contextlib.contextmanager
def api() -> Iterator[Server]:
    """Run the API on the core of the load."""
    port = free_port()
    with running([str(WIRE), "upstream", "{port}"], "/counters", port=port, core=LOAD_CORE) as server:
        yield server


def filled(name: str, place: Path, port: int, api_port: int) -> Path:
    """Write a peer's configuration with the places put in; return the file."""
    text = (PEERS / name).read_text(encoding="utf-8").format(port=port, api_port=api_port, place=place, names="{names}")
    (place / name).write_text(text, encoding="utf-8")
    return place / name


@contextlib.contextmanager
def envoy(place: Path, far: Server) -> Iterator[Proxy]:
    """Run Envoy with its credential injector and one worker."""
    port = free_port()
    (place / "credential.yaml").write_bytes((PEERS / "envoy_credential.yaml").read_bytes())
    flags = [
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "-l",
        "off",
        "--service-node",
        "x",
        "--service-cluster",
        "x",
    ]
    command = [str(ENVOY), "-c", str(filled("envoy.yaml", place, port, far.port)), *flags]
    with running(command, "/counters", port=port) as server:
        yield Proxy("Envoy", server, peer_heads, place)


@contextlib.contextmanager
def nginx_proxy(place: Path, far: Server) -> Iterator[Proxy]:
    """Run nginx with one process."""
    port = free_port()
    command = [str(debian("nginx")), "-p", str(place), "-c", str(filled("nginx.conf", place, port, far.port))]
    with running(command, "/counters", port=port) as server:
        yield Proxy("nginx", server, peer_heads, place)


@contextlib.contextmanager
def mitmproxy(place: Path, far: Server) -> Iterator[Proxy]:
    """Run mitmproxy in front of the API with an add-on that sets the header."""
    flags = ["-q", "--set", "flow_detail=0", "--set", f"confdir={place}", "-s", str(PEERS / "mitmproxy_header.py")]
    command = [*mitmdump(), "--mode", f"reverse:http://127.0.0.1:{far.port}", "--listen-host", "127.0.0.1"]
    with running([*command, "--listen-port", "{port}", *flags], "/counters") as server:
        yield Proxy("mitmproxy", server, peer_heads, place)


@contextlib.contextmanager
def broker(place: Path, far: Server) -> Iterator[tuple[Proxy, str]]:
    """Fill a new database and serve it without the worker; give the database's URL too."""
    environment = {
        "BROKER_ENV": "development",
        "BROKER_PUBLIC_URL": "https://broker.example",
        "BROKER_KEYRING": f"bench:{base64.b64encode(os.urandom(32)).decode()}",
        "BROKER_DATA_DIR": str(place),
        "BROKER_DATABASE_URL": f"sqlite:///{place}/broker.db",
        "BROKER_CALLER_CALLS_PER_SECOND": "10000",
    }
    names = [secrets.token_hex(16) for _ in range(POPULATION)]
    ids, key = asyncio.run(prepared(place, environment, names, far.port))
    known = list(zip(ids, names, strict=True))

    def heads(method: str, path: str) -> list[str]:
        return [request(method, f"/proxy/{one}{path}/{name}", f"Bearer {key}") for one, name in known]

    command = [python(), str(HERE / "_serve_in_development.py"), "serve", "--port", "{port}", "--no-worker"]
    with running(command, "/health/ready", {**environment, "PYTHONPATH": str(HERE.parent)}) as server:
        yield Proxy("the broker", server, heads, place), environment["BROKER_DATABASE_URL"]


async def prepared(
    place: Path, environment: dict[str, str], names: Sequence[str], api_port: int
) -> tuple[list[str], str]:
    """Make an integration, a connection for each name and a caller; return the connections' ids and the caller's key."""
    settings = load_settings({**environment, "BROKER_ADMIN_KEY": mint_key()[1].reveal()}, directory=place)
    configure_logging(settings, quiet=True)
    async with open_parts(settings) as parts:
        config = {"api_base_url": f"http://127.0.0.1:{api_port}", **LIMITS}
        draft = Draft("bench", "github", client_id="bench", client_secret=Secret("bench-secret"), config=config)
        await parts.integrations.create(draft, ADMIN)
        ids = []
        for name in names:
            credentials = {"type": "oauth2", "access_token": f"tok_{name}"}
            ids.append((await parts.connections.import_(Import("bench", f"user:{name}", credentials), ADMIN)).id)
        _, key = await parts.callers.add("benchmark", ["service"], [GRANT], actor="cli")
        return ids, key.reveal()


# --- the measuring


def interleaved(proxies: Sequence[Proxy]) -> None:
    """Warm all of them, then run them in turn."""
    for one in proxies:
        one.run(seconds=WARM_SECONDS, counts=False)
    for _ in range(ROUNDS):
        for one in proxies:
            one.run()
    print(f"{'':12s} {'a second':>9s} {'p50':>9s} {'p99':>9s} {'core each':>10s} {'resident':>9s}")
    for one in proxies:
        print(
            f"{one.name:12s} {one.median('per_second'):9,.0f} {one.median('p50_ms'):6.2f} ms {one.median('p99_ms'):6.2f} ms "
            f"{statistics.median(one.cpu_us):7.0f} µs {one.server.memory_bytes() / 2**20:5.0f} MiB",
            flush=True,
        )


def by_core_time(ours: Proxy, peer: Proxy) -> float:
    """Return how many calls the broker makes in the core's time of a peer's one."""
    return statistics.median(peer.cpu_us) / statistics.median(ours.cpu_us)


def added_p99_ms(ours: Proxy, direct: Proxy) -> float:
    """Return how much later the slowest hundredth is answered through the broker at half of what it can do."""
    per_second = round(ours.median("per_second") / 2)
    for number in range(HALF_LOAD_ROUNDS + 1):
        for one in (direct, ours):
            one.run_open(per_second, counts=number > 0)
    for one in (direct, ours):
        p50, p99 = (one.median_open(name) for name in ("p50_ms", "p99_ms"))
        print(f"{per_second:,} a second to {one.name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms", flush=True)
    return round(ours.median_open("p99_ms") - direct.median_open("p99_ms"), 2)


def transfers(ours: Proxy, peer: Proxy) -> dict[str, float]:
    """Return how fast one large transfer is beside nginx, each way."""
    ratios = {}
    for way, name in (("down", "download_vs_nginx"), ("up", "upload_vs_nginx")):
        for one in (ours, peer):
            one.move(way)
            one.transfers[way].clear()  # it was the warm-up
        for _ in range(TRANSFER_ROUNDS):
            for one in (ours, peer):
                one.move(way)
        rates = [statistics.median(one.transfers[way]) for one in (ours, peer)]
        print(
            f"{TRANSFER_BYTES / 1e6:.0f} MB {way}: {ours.name} {rates[0]:,.0f} MB/s, {peer.name} {rates[1]:,.0f} MB/s"
        )
        ratios[name] = round(rates[0] / rates[1], 3)
    return ratios


def growth_mib(ours: Proxy) -> float:
    """Return by how much the broker's memory grows at most while many large transfers run at once, either way."""
    before, most = ours.server.memory_bytes(), 0.0
    for way in ("down", "up"):
        Path(f"/proc/{ours.server.pid}/clear_refs").write_text("5", encoding="ascii")  # forget the peak (proc(5))
        rate = ours.move(way, at_once=AT_ONCE)
        grown = (peak_bytes(ours.server.pid) - before) / 2**20
        print(f"{AT_ONCE} at once {way}: {rate:,.0f} MB/s, memory at most {grown:.1f} MiB above {before / 2**20:.0f}")
        most = max(most, grown)
    return round(most, 1)


def peak_bytes(pid: int) -> int:
    """Return the most that was ever resident since the peak was forgotten."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


async def intents(database_url: str) -> int:
    """Count the calls that the audit knows of."""
    async with opened(database_url, migrate=False) as database:

        def count(session: Session) -> int:
            return int(session.connection().execute(INTENTS).scalar_one())

        return await database.read(count)


def proven(proxies: Sequence[Proxy], far: Server, ours: Proxy, database_url: str) -> None:
    """End here, with an error, when an answer or a credential was wrong, or the audit does not have exactly the calls."""
    with urllib.request.urlopen(f"http://127.0.0.1:{far.port}/counters") as answer:
        counters = json.load(answer)
    known, answers = asyncio.run(intents(database_url)), sum(one.answers for one in proxies)
    wrong = sum(one.wrong for one in proxies)
    print(
        f"{answers:,} answers, {wrong} of them wrong; the API saw {counters['right']:,} right credentials and "
        f"{counters['wrong']} wrong ones; {ours.answers:,} answers by the broker, {known:,} intents in its audit"
    )
    if wrong or counters["wrong"] or counters["right"] != answers or known != ours.answers:
        sys.exit("not every call was made with the right credential, answered with the API's bytes and audited")


def measured() -> tuple[dict[str, float], float]:
    """Measure everything; return the ratios and the growth of memory in MiB."""
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-bench-proxy-")))
        far = stack.enter_context(api())
        peers = [stack.enter_context(peer(place, far)) for peer in (envoy, nginx_proxy, mitmproxy)]
        ours, database_url = stack.enter_context(broker(place, far))
        direct = Proxy("the API", far, direct_heads, place)
        interleaved([ours, *peers])
        rate = ours.median("per_second")
        names = ("vs_envoy", "vs_nginx", "vs_mitmproxy")
        ratios = {name: round(rate / one.median("per_second"), 3) for name, one in zip(names, peers, strict=True)}
        print(
            f"by the core's time of a call, which other work disturbs less: {by_core_time(ours, peers[0]):.3f} of Envoy"
        )
        ratios.update(transfers(ours, peers[1]))
        grown = growth_mib(ours)
        ratios["added_p99_ms"] = added_p99_ms(ours, direct)
        proven([ours, *peers, direct], far, ours, database_url)
    return ratios, grown


def main() -> None:
    """Run everything; print the table, what was missed, and the JSON line."""
    print(f"Python: {described()}", flush=True)
    stay_on_load_core()
    started = time.monotonic()
    ratios, grown = measured()
    for name, bar in BARS.items():
        print(f"{name}: {ratios[name]} ({'meets' if ratios[name] >= bar else 'MISSES'} the bar of {bar})")
    for name, value, most in (
        ("p99 added at half load", ratios["added_p99_ms"], MOST_ADDED_P99_MS),
        (f"memory in MiB with {AT_ONCE} transfers at once", grown, MOST_GROWTH_MIB),
    ):
        print(f"{name}: {value} ({'meets' if value < most else 'MISSES'} the bar of {most})")
    print(f"{time.monotonic() - started:.0f} s in all")
    print(json.dumps({"benchmark": "proxy", "ratios": ratios}))


if __name__ == "__main__":
    main()
