"""Minutes of a provider in trouble: no live token is withheld, nobody is sent to consent for nothing, nobody is hammered.

A `broker serve` with its worker, a provider that goes wrong in every third refresh, and callers who never stop asking.
``TEST_LONG=1`` (`make soak`) makes it five minutes, with the time limit of production; the short form has shorter lives.
What bounds the refresh calls of one connection is in ``broker/refresh.py``, and is checked call by call in what the provider
saw: after success half a life goes by; after "not now" at least the 0.2 seconds of the shortest backoff, and Retry-After; after
a first refusal one second, after a second for ever; after silence the same token goes out three times at most, never before
the old access token is over, and after 0, 15 and 900 seconds.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from sqlmodel import Session, select

from broker.demo.sandbox import Fault, SandboxOptions, Visit
from broker.imports import Import
from broker.models import Connection, epoch_of
from tests.crash.processes import ADMIN, Site, Wire, connected, open_site, serve, token_request

LONG = os.environ.get("TEST_LONG") == "1"
SECONDS = 300.0 if LONG else 25.0
LIFETIME_SECONDS = 30 if LONG else 8
TIMEOUT_SECONDS = 10 if LONG else 2
CONNECTIONS = 300 if LONG else 150
CALLERS = 24
PAUSE_SECONDS = 0.02
RETRY_AFTER_SECONDS = 3.0
SHORTEST_BACKOFF_SECONDS = 0.2
CONFIRM_SECONDS = 1.0
RESEND_WAITS_SECONDS = (0.0, 15.0, 900.0)
SLACK_SECONDS = 0.1  # between the sandbox's clock reading and the broker's
FLAT_BYTES = 12 * 1024 * 1024
SEED = 20_264

HTML = {"content-type": "text/html"}
FAULTS = (  # each takes its share of what those before it have left
    Fault(kind="answer", share=0.10, status=400, body={"error": "invalid_grant"}),
    Fault(
        kind="answer", share=0.06, status=429, body="slow down", headers={"retry-after": str(int(RETRY_AFTER_SECONDS))}
    ),
    Fault(kind="answer", share=0.06, status=500, body="<html>oops</html>", headers=HTML),
    Fault(kind="answer", share=0.05, status=200, body="<html>please log in</html>", headers=HTML),
    Fault(kind="cut", share=0.04, commit=True),
    Fault(kind="stall", share=0.02, seconds=30),
    Fault(kind="stall", share=0.02, seconds=30, commit=True),
)

Outcome = Literal["ok", "not now", "refused", "silence"]


@dataclass
class Seen:
    """What callers were given. ``live_until``: of each connection, the latest end of a token that was handed out."""

    live_until: dict[str, float]
    answers: collections.Counter[str] = field(default_factory=collections.Counter)
    stale: int = 0
    wrong: list[str] = field(default_factory=list)


# --- the provider's side


def outcome_of(visit: Visit) -> Outcome:
    """Say what the broker can have learned from an answer."""
    if not visit.answered or visit.status is None:
        return "silence"
    if visit.status == 429 or visit.status >= 500:
        return "not now"
    if visit.error == "invalid_grant":
        return "refused"
    return "ok" if visit.outcome == "committed" else "silence"


def complaints(visits: Sequence[Visit], *, first_ends_at: float) -> list[str]:
    """Return what one connection's refresh calls, in their order, did against the bound."""
    found: list[str] = []
    ends_at, refusals, silences = first_ends_at, 0, 0
    for before, after in pairwise(visits):
        outcome, waited = outcome_of(before), after.at - before.at + SLACK_SECONDS
        if outcome == "ok":
            ends_at, refusals, silences = before.at + LIFETIME_SECONDS, 0, 0
            least, same = LIFETIME_SECONDS / 2, False
        else:
            refusals, silences = refusals + (outcome == "refused"), silences + (outcome == "silence")
            least, same = least_wait(before, outcome, silences, ends_at), True
        if refusals > 1:
            found.append("asked again after it was refused twice")
        if silences > len(RESEND_WAITS_SECONDS):
            found.append("sent a token again more than three times after silence")
        if (after.presented == before.presented) is not same:
            found.append(f"sent another token than the one that is due after {outcome}")
        if waited < least:
            found.append(f"waited {waited:.2f} s after {outcome}, at least {least:.2f} are due")
    return found


def least_wait(before: Visit, outcome: Outcome, silences: int, ends_at: float) -> float:
    """Return how long the next call has to wait, in seconds after the arrival of the one before."""
    if outcome == "refused":
        return CONFIRM_SECONDS
    if outcome == "not now":
        return SHORTEST_BACKOFF_SECONDS + (RETRY_AFTER_SECONDS if before.status == 429 else 0.0)
    wait = RESEND_WAITS_SECONDS[min(silences, len(RESEND_WAITS_SECONDS)) - 1]
    return max(wait, ends_at - before.at)


def was_told(visits: Sequence[Visit], reason: str | None) -> bool:
    """Whether the provider said twice of the last token that the grant is dead, or was silent four times."""
    last = [visit for visit in visits if visit.presented == visits[-1].presented]
    outcomes = collections.Counter(map(outcome_of, last))
    silent = outcomes["silence"] > len(RESEND_WAITS_SECONDS)
    expected = "refresh_outcome_unknown" if outcomes["silence"] else "invalid_grant"
    return (outcomes["refused"] >= 2 or silent) and reason == expected


# --- the callers' side


async def keep_asking(site: Site, wire: Wire, ids: Sequence[str], seen: Seen, chance: random.Random) -> None:
    """Ask for a token of one connection after the other."""
    while True:
        connection_id = chance.choice(ids)
        live_until = seen.live_until[connection_id]
        status, body = await wire.ask(token_request(site, connection_id))
        judge(seen, connection_id, live_until, status, json.loads(body))
        await asyncio.sleep(PAUSE_SECONDS)


def judge(seen: Seen, connection_id: str, live_until: float, status: int, answer: dict[str, object]) -> None:
    """Take down what a caller was given. ``live_until`` is of the moment when it asked."""
    code = "ok" if status == 200 else str(answer["code"])
    seen.answers[code] += 1
    if code == "ok":
        ends_at = epoch_of(str(answer["expires_at"])) or 0.0
        seen.stale += answer["stale"] is True
        seen.live_until[connection_id] = max(seen.live_until[connection_id], ends_at)
        if ends_at < live_until:
            seen.wrong.append("an older token than before was handed out")
    elif code == "reauthorization_required":
        return  # judged by what the provider said
    elif time.time() < live_until:
        seen.wrong.append(f"a live token was withheld: {code}")
    elif code not in {"provider_unavailable", "upstream_timeout", "upstream_invalid"}:
        seen.wrong.append(f"{status} {code}")


async def watch_memory(wire: Wire, sizes: list[float]) -> None:
    """Take down the process's resident size every half second."""
    while True:
        _, text = await wire.ask(b"GET /metrics HTTP/1.1\r\nHost: broker\r\n\r\n")
        line = next(line for line in text.decode().splitlines() if line.startswith("process_resident_memory_bytes"))
        sizes.append(float(line.split()[1]))
        await asyncio.sleep(0.5)


async def five_minutes(site: Site, port: int, ids: Sequence[str], seen: Seen) -> list[float]:
    """Let callers ask while the provider fails; return the sizes of the process."""
    chance, sizes = random.Random(SEED), list[float]()  # noqa: S311 - repeatable, not secret
    async with contextlib.AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connected(port)) for _ in range(CALLERS + 1)]
        tasks = [asyncio.create_task(keep_asking(site, wire, ids, seen, chance)) for wire in wires[1:]]
        tasks.append(asyncio.create_task(watch_memory(wires[0], sizes)))
        done, _ = await asyncio.wait(tasks, timeout=SECONDS, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
    return sizes


async def import_live(site: Site, login: str) -> tuple[str, float]:
    """Import a new grant of the user; return the connection's id and when its access token ends."""
    minted = site.sandbox.state.mint(login, "openid")
    ends_at = round(time.time() + LIFETIME_SECONDS, 3)
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ends_at)) + f".{round(ends_at % 1 * 1000) % 1000:03d}Z"
    credentials = {"type": "oauth2", "access_token": minted["access_token"], "refresh_token": minted["refresh_token"]}
    wanted = Import("sandbox", f"acme:{login}", {**credentials, "expires_at": when})
    return (await site.parts.connections.import_(wanted, ADMIN)).id, epoch_of(when) or 0.0


@pytest.mark.timeout(900)
async def test_minutes_of_provider_faults_cost_nobody_a_token_or_a_connection(tmp_path: Path, sqlite_url: str) -> None:
    options = SandboxOptions(mode="grace", grace_seconds=3600, access_token_seconds=LIFETIME_SECONDS)
    async with open_site(tmp_path, sqlite_url, options, timeout_seconds=TIMEOUT_SECONDS) as site:
        imported = [await import_live(site, f"user{number}") for number in range(CONNECTIONS)]
        seen = Seen(dict(imported))
        state = site.sandbox.state
        state.chance = random.Random(SEED)  # noqa: S311 - repeatable, not secret
        for fault in FAULTS:
            state.add_fault(msgspec.structs.replace(fault, grant_type="refresh_token", times=None))
        async with serve(site, tmp_path / "broker.log") as port:
            sizes = await five_minutes(site, port, [connection_id for connection_id, _ in imported], seen)
        told_and_bounded(site, await rows(site), dict(imported))
        report(site, seen, sizes)
        assert seen.wrong == []
        assert seen.answers["ok"] > 2 * CONNECTIONS
        assert state.counters.concurrent_senders == 0
        warm, end = statistics.median(sizes[len(sizes) // 4 : len(sizes) // 2]), statistics.median(sizes[-5:])
        assert end - warm < FLAT_BYTES


async def rows(site: Site) -> list[Connection]:
    """Return all connections."""

    def work(session: Session) -> list[Connection]:
        return list(session.exec(select(Connection)))

    return await site.parts.database.read(work)


def told_and_bounded(site: Site, found: Sequence[Connection], first_ends_at: dict[str, float]) -> None:
    """Check each connection against what the provider saw and said of it."""
    visits = collections.defaultdict(list)
    for visit in site.sandbox.state.token_requests():
        visits[visit.account].append(visit)
    against = [
        f"{row.subject}: {text}"
        for row in found
        for text in complaints(visits[login_of(row)], first_ends_at=first_ends_at[row.id])
    ]
    assert against == []
    marked = [row for row in found if row.status != "active"]
    assert [row.subject for row in marked if not was_told(visits[login_of(row)], row.status_reason)] == []
    assert len(marked) < len(found) / 2


def login_of(row: Connection) -> str:
    """Return the account of a connection."""
    return str(row.subject).removeprefix("acme:")


def report(site: Site, seen: Seen, sizes: Sequence[float]) -> None:
    """Print the figures, for `-s` and for a failure."""
    visits = site.sandbox.state.token_requests()
    calls = collections.Counter(visit.account for visit in visits)
    outcomes = collections.Counter(map(outcome_of, visits))
    print(f"answers {dict(seen.answers)}, stale {seen.stale}")  # noqa: T201 - figures of a campaign
    print(f"refreshes {dict(outcomes)}, most for one connection {max(calls.values())}")  # noqa: T201
    print(f"MiB {[round(size / 2**20) for size in sizes[:: max(1, len(sizes) // 10)]]}")  # noqa: T201
