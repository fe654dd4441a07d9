"""Restarts, kills and outages under a steady mixed load: what is lost, what fails, and whether it heals by itself.

`make bench-rolling` (the Vault is built by `make vault`). Three web replicas and two workers on one PostgreSQL and one Vault,
behind a balancer that goes by readiness; 40 hand-outs, 4 forced refreshes (each against a provider that rotates refresh
tokens and honours the one before), 15 proxied calls and 10 webhooks a second. One after the other: each process restarts
gracefully; each is killed by SIGKILL; PostgreSQL restarts; Vault restarts, and is unsealed. Ends with an error where anything
was lost, a request failed in a graceful restart, an error had no name, or it did not heal. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from _mixed import Mixed, directories, open_mixed, say, shown
from _servers import Postgres, postgres_server

from broker.telemetry import configure_logging
from tests.crash.campaign import Process
from tests.real.vault import VaultServer, running_vault

STEADY_SECONDS, AWAY_SECONDS, HEAL_SECONDS = 5.0, 4.0, 60.0
DELIVERY_SECONDS = 90.0
NAMED = {"database_unavailable", "secret_store_unavailable", "audit_unavailable", "overloaded"}
KILLED_UNDER = {(502, "balancer"), (0, "cut")}  # a request whose process was killed with it


@contextlib.asynccontextmanager
async def phase(mixed: Mixed, name: str) -> AsyncIterator[None]:
    """Run a phase of the load, and say what came of it."""
    mixed.load.phase = name
    began = time.monotonic()
    yield
    await asyncio.sleep(1.0)  # what was sent at the end is answered in it
    answers = sum(count for one, count in mixed.load.answers.items() if one.startswith(f"{name} "))
    say(
        f"{name}: {time.monotonic() - began:.0f} s, {answers} answers; not as wished: {shown(mixed.load.wrong_in(name))}"
    )


async def replaced(mixed: Mixed, old: Process, number: signal.Signals) -> None:
    """End a process by a signal, and start another one in its place."""
    began = time.monotonic()
    old.signal(number)
    await old.ended()
    took = time.monotonic() - began
    if old in mixed.web:
        await mixed.balancer.forget(old.port)
        mixed.web[mixed.web.index(old)] = await mixed.start_web()
    else:
        mixed.workers[mixed.workers.index(old)] = await mixed.forks.fork_worker()
    kind = "worker" if not old.port else "replica"
    say(
        f"  {kind} ended by {number.name} in {took:.1f} s, another one up {time.monotonic() - began - took:.1f} s later"
    )


async def healed(mixed: Mixed) -> float:
    """Wait until all replicas are ready again; return the seconds (TimeoutError when they are not)."""
    began = time.monotonic()
    await mixed.balancer.has(*mixed.ports, seconds=HEAL_SECONDS)
    return time.monotonic() - began


async def gone_through(mixed: Mixed, postgres: Postgres, vault: VaultServer) -> None:
    """Go through all phases."""
    async with mixed.load.running():
        async with phase(mixed, "steady"):
            await asyncio.sleep(STEADY_SECONDS)
        for name, number in (("graceful", signal.SIGTERM), ("killed", signal.SIGKILL)):
            async with phase(mixed, name):
                for process in list(mixed.processes):
                    await replaced(mixed, process, number)
        async with phase(mixed, "postgresql away"):
            await asyncio.to_thread(postgres.stop)
            await asyncio.sleep(AWAY_SECONDS)
            await asyncio.to_thread(postgres.start)
            say(f"  all replicas ready {await healed(mixed):.1f} s after PostgreSQL was back")
        async with phase(mixed, "vault away"):
            await asyncio.to_thread(vault.stop)
            await asyncio.sleep(AWAY_SECONDS)
            await asyncio.to_thread(vault.start)
            await asyncio.to_thread(vault.unseal)
            say(f"  all replicas ready {await healed(mixed):.1f} s after Vault was back")
        async with phase(mixed, "recovering"):
            await asyncio.sleep(AWAY_SECONDS)
        async with phase(mixed, "healed"):
            await asyncio.sleep(STEADY_SECONDS)


async def counted(mixed: Mixed) -> tuple[dict[str, int], list[str]]:
    """Return the counts, and what is wrong with them."""
    load, statuses = mixed.load, await mixed.statuses()
    missing = await mixed.all_delivered(DELIVERY_SECONDS)
    unnamed = [
        one
        for one in load.wrong
        if one[0] in {"postgresql away", "vault away", "recovering"} and (one[2] != 503 or one[3] not in NAMED)
    ]
    unlike = [one for one in load.wrong if one[0] == "killed" and (one[2], one[3]) not in KILLED_UNDER]
    counters = mixed.site.sandbox.state.counters
    counts = {
        "events_acknowledged": len(load.acknowledged),
        "events_delivered": len(load.acknowledged) - len(missing),
        "events_lost": len(missing),
        "connections_lost": sum(statuses.values()) - statuses["active"],
        "failed_in_graceful_restarts": sum(load.wrong_in("steady", "graceful").values()),
        "cut_by_kills": sum(load.wrong_in("killed").values()),
        "refused_by_name_in_outages": sum(load.wrong_in("postgresql away", "vault away", "recovering").values()),
        "unnamed": len(unnamed) + len(unlike),
        "failed_after_healing": sum(load.wrong_in("healed").values()),
        "reuse_alarms": counters.reuse_alarms,
        "answers": sum(load.answers.values()),
    }
    zero = ("events_lost", "connections_lost", "failed_in_graceful_restarts", "unnamed", "failed_after_healing")
    wrong = [f"{name}: {counts[name]}" for name in (*zero, "reuse_alarms") if counts[name]]
    wrong += [] if (await mixed.site.parts.audit.verify()).ok else ["the audit does not verify"]
    return counts, wrong + [str(one) for one in (*unnamed, *unlike)]


async def run(place: Path, database_url: str, postgres: Postgres, vault: VaultServer) -> list[str]:
    """Run everything; return what is wrong."""
    async with open_mixed(place, database_url, vault) as mixed:
        configure_logging(
            mixed.site.settings.model_copy(update={"env": "production"}), stream=(place / "own.log").open("w")
        )
        await gone_through(mixed, postgres, vault)
        counts, wrong = await counted(mixed)
        for name, count in counts.items():
            say(f"{name}: {count}")
        if wrong:
            say("\n".join(mixed.load.samples))
        say(json.dumps({"benchmark": "rolling", "counts": counts}))
        return wrong


def main() -> None:
    """Run everything; exit with what is wrong."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="broker-bench-rolling-") as folder, postgres_server() as postgres:
        place = Path(folder)
        with running_vault(directories(place)) as vault:
            wrong = asyncio.run(run(place, postgres.database("rolling"), postgres, vault))
    sys.stderr.write(f"{time.monotonic() - began:.0f} s in all\n")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
