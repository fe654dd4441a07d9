"""Rounds of `kill -9` against real `broker serve` processes that refresh under load, and the account of where each fell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from broker.credentials import sha256_hex
from broker.demo.sandbox import Fault
from broker.errors import BrokerError
from broker.models import Connection, RefreshLease
from tests.commands import ROOT, free_port
from tests.crash.evidence import (
    EVENTS,
    SEND_TO_JOURNAL,
    Event,
    Noted,
    SandboxLog,
    Stage,
    held_by,
    keep_log,
    noted,
    stage_of,
)
from tests.crash.processes import Site, connected, import_over, is_up, process_environment, token_of, token_request

T = TypeVar("T")
INSIST_SECONDS = 60.0
AT_ONCE = 10  # connections that are refreshed in a round
SPREAD_SECONDS = 0.25  # over which their callers begin
CALLERS = 2  # of each connection, at different processes
AIM_SECONDS = 3.0  # after which an aim is given up and the kill falls anywhere
AIMS = {
    "committed": 40,  # the sandbox has committed and did not answer yet
    "arrived": 10,  # the sandbox has the request and did not commit yet
    "answered": 10,  # the answer is on its way
    "claim": 5,  # the database has just committed this
    "attempt": 5,
    "journal": 6,
    "store": 4,
    "any": 18,
    "idle": 2,
}
STOP_EVERY, TERM_EVERY = 40, 20  # rounds
SLEEPING = sa.text(
    "SELECT pid, state_change FROM pg_stat_activity"
    " WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
)
STOPPED_SECONDS = 60.0  # at most: a lease is over after 32, the integration's 2 s and 30


@dataclass
class Process:
    """One `broker serve`, or `broker worker` at port 0; ``owner`` is its name in leases."""

    pid: int
    port: int
    log: Path
    owner: str = ""

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def ended(self, seconds: float = 60.0) -> None:
        """Wait until it is gone."""
        async with asyncio.timeout(seconds):
            with contextlib.suppress(ProcessLookupError):
                while True:
                    os.kill(self.pid, 0)
                    await asyncio.sleep(0.005)


class Forks:
    """Makes broker processes from one that has imported everything."""

    def __init__(self, site: Site, server: asyncio.subprocess.Process) -> None:
        self._site = site
        self._server = server
        self._made = 0
        self._forking = asyncio.Lock()
        self.alive: set[int] = set()

    async def fork(self, *flags: str) -> Process:
        """Start a `broker serve` and wait until it serves."""
        port = free_port()
        process = await self._fork(port, "serve", "--port", str(port), *flags)
        await is_up(port)
        return process

    async def fork_worker(self) -> Process:
        """Start a `broker worker` and wait until it works."""
        process = await self._fork(0, "worker")
        async with asyncio.timeout(60):
            while b"worker.started" not in process.log.read_bytes():  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.01)
        return process

    async def _fork(self, port: int, *command: str) -> Process:
        self._made += 1
        log = self._site.settings.data_dir / f"process-{self._made}.log"
        log.touch()
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        async with self._forking:
            self._server.stdin.write(f"{log} {' '.join(command)}\n".encode())
            process = Process(int(await self._server.stdout.readline()), port, log)
        self.alive.add(process.pid)
        return process


@contextlib.asynccontextmanager
async def open_forks(site: Site, **more: str) -> AsyncIterator[Forks]:
    """Run the process that forks; whatever it made is killed at the end. ``more``: of its environment."""
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "tests" / "crash" / "forking.py")),
        env=process_environment(site, **more),
        cwd=site.settings.data_dir,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    forks = Forks(site, server)
    try:
        yield forks
    finally:
        for pid in forks.alive:
            Process(pid, 0, Path()).signal(signal.SIGKILL)
        assert server.stdin is not None
        server.stdin.close()
        await server.wait()


@dataclass
class Account:
    """A user with one connection. ``answer``: the token or the refusal that its callers got at last."""

    login: str
    connection_id: str = ""
    answers: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Figures:
    """What the rounds came to."""

    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # rounds with at least one refresh cut off there
    refreshes: Counter[str] = field(default_factory=Counter)  # refreshes cut off there
    aims: Counter[str] = field(default_factory=Counter)
    between_send_and_journal: int = 0
    stopped: int = 0
    refused_late: int = 0
    terminated: int = 0


class Campaign:
    """Loads two processes out of three, and kills one after the other."""

    def __init__(self, site: Site, forks: Forks, seed: str, *, patient: bool) -> None:
        """``patient``: a stopped process is left until its leases end by themselves; else time is moved on for it."""
        self.site = site
        self.figures = Figures()
        self.accounts: list[Account] = []
        self.sandbox_log = SandboxLog(site.sandbox.state, site.parts.audit)
        self._forks = forks
        self._chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._patient = patient
        self._serving: list[Process] = []
        self._spares: asyncio.Queue[Process] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: list[asyncio.Task[None]] = []
        self._leaving: list[asyncio.Task[None]] = []
        self._dead: set[str] = set()

    @property
    def _database(self) -> Any:
        return self.site.parts.database

    async def run(self, *, rounds: int, seconds: float) -> None:
        """Go through the rounds, or as many as fit into the time, then let everything come to rest."""
        await keep_log(self._database)
        for _ in range(3):
            await self._add_spare()
        self._serving = [await self._spares.get() for _ in range(2)]
        end = time.monotonic() + seconds
        while self.figures.rounds < rounds and time.monotonic() < end:
            await self._round()
        await self._come_to_rest()

    # Rounds

    async def _round(self) -> None:
        self.figures.rounds += 1
        number = self.figures.rounds
        aim = self._chance.choices(list(AIMS), list(AIMS.values()))[0]
        state = self.site.sandbox.state
        state.configure(latency_seconds=self._chance.uniform(0.1, 0.2) if aim == "committed" else 0.02)
        if aim == "arrived":
            state.add_fault(Fault(kind="stall", seconds=0.2, times=None))
        load = await self._begin_load()
        victim = await self._taken_aim(aim, load)
        await self._kill(victim, aim)
        state.clear_faults()
        await self._replace(victim)
        if number % STOP_EVERY == STOP_EVERY // 2:
            await self._stop_one()
        if number % TERM_EVERY == 0:
            await self._terminate_one()

    async def _begin_load(self) -> list[Account]:
        """Import connections whose tokens are over, and let callers ask for all of them at both processes."""
        accounts = [await self._import() for _ in range(AT_ONCE)]
        for account in accounts:
            delay_seconds = self._chance.uniform(0, SPREAD_SECONDS)
            for caller in range(CALLERS):
                self._begin(self._keep_asking(account, caller, delay_seconds))
        return accounts

    async def _import(self) -> Account:
        account = Account(f"user{len(self.accounts)}")
        self.accounts.append(account)
        minted = self.site.sandbox.state.mint(account.login, "openid")
        self.sandbox_log.knows(minted["refresh_token"])
        account.connection_id = await insisted(lambda: import_over(self.site, account.login, minted))
        return account

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed.append(task)

    async def _keep_asking(self, account: Account, caller: int, delay_seconds: float) -> None:
        """Be a backend: ask until there is a token, or word that the user must consent again; hang up when that takes long."""
        request = token_request(self.site, account.connection_id)
        patience = random.Random(f"{account.login} {caller}")  # noqa: S311 - repeatable, not secret
        await asyncio.sleep(delay_seconds)
        while True:
            process = self._serving[caller % 2]
            answer = None
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                async with asyncio.timeout(patience.uniform(1, 8)), connected(process.port) as wire:
                    answer = await wire.ask(request)
            if answer is not None and answer[0] in {200, 409}:
                account.answers.append((answer[0], token_of(answer) if answer[0] == 200 else answer[1].decode()))
                return
            caller += 1
            await asyncio.sleep(patience.uniform(0.2, 0.5))

    # Aiming

    async def _taken_aim(self, aim: str, load: Sequence[Account]) -> Process:
        aims: dict[str, Callable[[], Awaitable[str | None]]] = {
            "arrived": lambda: self._visited(load, "pending", answered=False),
            "committed": lambda: self._visited(load, "committed", answered=False),
            "answered": lambda: self._visited(load, "committed", answered=True),
        }
        event = next((event for event in EVENTS if event == aim), None)
        if event is not None:
            return await self._when_logged(event, load)
        if aim in aims:
            await asyncio.sleep(self._chance.uniform(0, SPREAD_SECONDS))
            connection_id = await self._soon(aims[aim])
            owner = None if connection_id is None else await self._owner_of(connection_id)
            return self._process_of(owner)
        if aim == "idle":
            await asyncio.wait(set(self._tasks), timeout=AIM_SECONDS)
        await asyncio.sleep(self._chance.uniform(0, 0.5))
        return self._process_of(None)

    async def _soon(self, look: Callable[[], Awaitable[str | None]]) -> str | None:
        end = time.monotonic() + AIM_SECONDS
        while time.monotonic() < end:
            found = await look()
            if found is not None:
                return found
            await asyncio.sleep(0.001)
        return None

    async def _visited(self, load: Sequence[Account], outcome: str, *, answered: bool) -> str | None:
        """Return a connection of which a request is at the sandbox, and so far there."""
        self.sandbox_log.read()
        for account in load:
            for visit in self.sandbox_log.by_account.get(account.login, [])[-1:]:
                if (visit.outcome, visit.answered) == (outcome, answered):
                    return account.connection_id
        return None

    async def _when_logged(self, event: Event, load: Sequence[Account]) -> Process:
        """Wait until the database notes the event, of any process."""
        ids = {account.connection_id for account in load}
        last = await self._last_number()

        async def look() -> str | None:
            found = [one for one in await noted(self._database, after=last) if one.connection_id in ids]
            return next((one.connection_id for one in found if one.event == event), None)

        connection_id = await self._soon(look)
        return self._process_of(None if connection_id is None else await self._owner_of(connection_id))

    async def _last_number(self) -> int:
        query = sa.text("SELECT coalesce(max(number), 0) FROM crash_log")
        return int(await self._database.read(lambda session: session.execute(query).scalar_one()))

    async def _owner_of(self, connection_id: str) -> str | None:
        lease = await self._database.read(lambda session: session.get(RefreshLease, connection_id))
        return None if lease is None else lease.owner

    def _process_of(self, owner: str | None) -> Process:
        """Return the process with that name in leases if it serves, else any."""
        return next((one for one in self._serving if one.owner == owner), self._chance.choice(self._serving))

    # Killing

    async def _kill(self, victim: Process, aim: str) -> None:
        victim.signal(signal.SIGKILL)
        await victim.ended()
        await asyncio.sleep(0.03)  # what it had sent to the database's server by then takes effect, or does not
        self._dead.add(victim.owner)
        stages = await self._stages(victim.owner)
        self._count(aim, stages)

    async def _stages(self, owner: str) -> list[Stage]:
        return [
            stage_of(held, self.sandbox_log.since(held.attempt_digest, held.sent_at))
            for held in await held_by(self._database, owner)
        ]

    def _count(self, aim: str, stages: list[Stage]) -> None:
        found: Counter[str] = Counter(stages or ["idle"])
        figures = self.figures
        figures.aims[aim] += 1
        figures.kills.update(found.keys())
        figures.refreshes.update(stages)
        figures.between_send_and_journal += any(stage in SEND_TO_JOURNAL for stage in stages)
        shown = ", ".join(f"{stage} x{count}" for stage, count in sorted(found.items()))
        self._write(f"round {figures.rounds}: aimed at {aim}, fell at {shown}")

    def _write(self, line: str) -> None:
        """Show what happens as it happens, also to who waits for a long run."""
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    async def _replace(self, victim: Process) -> None:
        """Let the spare take the place, and start another one behind the scenes."""
        self._begin(self._add_spare())
        for task in self._failed:
            task.result()
        async with asyncio.timeout(60):
            self._serving[self._serving.index(victim)] = await self._spares.get()

    async def _add_spare(self) -> None:
        process = await self._forks.fork()
        process.owner = await self._name_of(process)
        await self._spares.put(process)

    async def _name_of(self, process: Process) -> str:
        """Find out how a process signs its leases: by the first claim of a connection that only it is asked for."""
        account = await self._import()
        status = 0
        async with asyncio.timeout(30), connected(process.port) as wire:
            while status != 200:  # the first time it may be the sandbox's turn to be slow
                status, _ = await wire.ask(token_request(self.site, account.connection_id))
        claims = [one for one in await self._noted_of(account.connection_id) if one.event == "claim"]
        return str(claims[0].owner)

    async def _noted_of(self, connection_id: str) -> list[Noted]:
        return [one for one in await noted(self._database) if one.connection_id == connection_id]

    # Other ends

    async def _terminate_one(self) -> None:
        """Stop a process in an orderly way while it refreshes, as a deploy does: its leases are given back."""
        load = await self._begin_load()
        victim = await self._taken_aim("committed", load)
        victim.signal(signal.SIGTERM)
        await self._replace(victim)
        self._leaving.append(asyncio.create_task(self._gone(victim)))

    async def _gone(self, victim: Process) -> None:
        await victim.ended()
        assert await self._stages(victim.owner) == [], "a stopped process gave its leases back"
        self.figures.terminated += 1

    async def _stop_one(self) -> None:
        """Freeze a process with requests at the provider, past the end of its leases; then let it go on, too late."""
        self.site.sandbox.state.configure(latency_seconds=0.3)
        load = await self._begin_load()
        victim = await self._taken_aim("committed", load)
        if not await self._frozen(victim):
            return
        last = await self._last_number()
        held = await held_by(self._database, victim.owner)
        unfinished = {one.connection_id: one.fence for one in held if one.attempt_digest and not one.journalled}
        if not unfinished:
            victim.signal(signal.SIGCONT)  # nothing is at the provider: there is no late write to wait for
            return
        await self._replace(victim)
        self._leaving.append(asyncio.create_task(self._thaw(victim, unfinished, last)))

    async def _frozen(self, victim: Process) -> bool:
        """Stop it where it is in no transaction: one that sleeps in one blocks everybody, which is another test's matter."""
        if self._database.dialect == "sqlite":
            path = str(self.site.settings.data_dir / "broker.db")
            with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=5)) as lock:
                lock.execute("BEGIN IMMEDIATE")
                victim.signal(signal.SIGSTOP)
                lock.execute("ROLLBACK")
            return True
        for _ in range(20):
            victim.signal(signal.SIGSTOP)
            await asyncio.sleep(0.1)
            sleeping = await self._sleeping()
            await asyncio.sleep(0.3)  # the transactions of all others go on meanwhile
            if not sleeping & await self._sleeping():
                return True
            victim.signal(signal.SIGCONT)
            await asyncio.sleep(0.02)
        return False

    async def _sleeping(self) -> set[Any]:
        return await self._database.read(lambda session: {tuple(row) for row in session.execute(SLEEPING)})  # type: ignore[no-any-return]

    async def _thaw(self, victim: Process, fences: dict[str, int], last: int) -> None:
        if not self._patient:
            await asyncio.sleep(0.5)
            await self._end_leases({victim.owner})
        async with asyncio.timeout(STOPPED_SECONDS):  # until others have claimed what the frozen one held
            while not await self._taken_over(fences):  # noqa: ASYNC110 - the database has no event
                await asyncio.sleep(0.2)
        victim.signal(signal.SIGCONT)
        await asyncio.sleep(1.5)
        late = [
            one
            for one in await noted(self._database, after=last)
            if one.event in {"attempt", "journal"} and fences.get(one.connection_id) == one.fence
        ]
        assert not late, "a late holder's write is refused"
        refused = re.findall(r"refresh\.lease_lost", victim.log.read_text())
        self.figures.stopped += 1
        self.figures.refused_late += len(refused)
        victim.signal(signal.SIGTERM)
        await victim.ended()

    async def _taken_over(self, fences: dict[str, int]) -> bool:
        leases = [await self._database.read(lambda session, one=one: session.get(RefreshLease, one)) for one in fences]
        return all(lease is not None and lease.fence > fences[lease.connection_id] for lease in leases)

    # The end

    async def _come_to_rest(self) -> None:
        """Let the time pass after which the leases of the dead end; then every caller gets its answer."""
        self.site.sandbox.state.configure(latency_seconds=0)
        await self._end_leases(self._dead)
        await asyncio.gather(*self._leaving)
        async with asyncio.timeout(120):
            while self._tasks:
                await asyncio.wait(set(self._tasks), timeout=1)
                await self._end_waits()

    async def _end_leases(self, owners: set[str]) -> None:
        over = sa.update(RefreshLease).where(sa.column("owner").in_(owners)).values(expires_at=0.0)
        await insisted(lambda: self._database.transaction(lambda session: session.execute(over)))

    async def _end_waits(self) -> None:
        over = sa.update(Connection).where(sa.column("refresh_not_before_at").is_not(None))
        over = over.values(refresh_not_before_at=0.0)
        await insisted(lambda: self._database.transaction(lambda session: session.execute(over)))

    async def final_answer(self, account: Account) -> tuple[int, str]:
        """Ask once more, at the end: the digest of the token, or the refusal."""
        async with connected(self._serving[0].port) as wire:
            status, body = await wire.ask(token_request(self.site, account.connection_id))
        return status, sha256_hex(token_of((status, body))) if status == 200 else body.decode()


async def insisted(action: Callable[[], Awaitable[T]]) -> T:
    """Do it, and again while it is refused with a 503: a frozen process may hold a lock that its backend was waiting for."""
    ends_at = time.monotonic() + INSIST_SECONDS
    while True:
        try:
            return await action()
        except BrokerError as error:
            if error.status != 503 or time.monotonic() > ends_at:
                raise
        await asyncio.sleep(0.2)
