"""A world for the law of refreshing: processes that stop at every await, a provider that may do anything, and a witness.

A process is a real ``Credentials`` over the real database, on an event loop of its own. Its calls to the database and to the
provider wait at gates until the test lets them pass; so it can be killed, frozen or overtaken between any two of them. The
provider stands where the wire begins, behind ``Egress.send``. The witness keeps what was sent and what came of it, and looks
at the tables after every commit. What it finds against the law is collected in ``World.violations``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast
from urllib.parse import parse_qs

import sqlalchemy as sa
from sqlmodel import Session

from broker.audit import Audit
from broker.credentials import Credentials, Handout, secret_owner
from broker.database import Database
from broker.egress import Egress, NotSent, OutcomeUnknown
from broker.errors import (
    BrokerError,
    DatabaseUnavailable,
    ReauthorizationRequired,
    SecretStoreUnavailable,
    UpstreamInvalid,
)
from broker.integrations import Draft, Integrations
from broker.models import Connection
from broker.refresh import Ask
from broker.settings import Settings
from broker.telemetry import Metrics
from broker.vault.cache import CachedVault
from broker.vault.keyring import Sealer
from broker.vault.sealed_rows import PURPOSE, SealedRows
from providers.spec import Incoming, OAuth2, Outgoing, Provider, Refresh, Secret
from tests.broker.virtual_time import EPOCH, Clock, VirtualLoop

T = TypeVar("T")
Mode = Literal["strict", "grace", "static"]
Decision = Literal["honest", "busy", "broken", "page", "lie"]
Outcome = Literal["open", "not_sent", "unknown", "ok", "refused", "transient"]

ID = "con_law"
NAME = "made-up"
ORIGIN = "https://provider.test"
LIFETIME_SECONDS = 3600.0
GRACE_SECONDS = 60
BUSY_SECONDS = 20.0
SLACK_SECONDS = 1e-4  # databases round
MOST_RESENDS = 3  # the law's own numbers: not taken from the code that has to keep it
RESEND_WAITS_SECONDS = (0.0, 15.0, 900.0)
CONFIRM_SECONDS = 1.0
TIRED = 20_000  # steps after which nothing will come any more


# --- the provider, and what the witness knows of each call


@dataclass(eq=False)
class Call:
    """One refresh on its way. ``outcome``: what its sender knows; ``recorded_at``: since when that is durable."""

    process: Process
    token: str
    fence: int
    started_at: float
    deadline: float
    answered: asyncio.Future[Incoming] = field(repr=False)
    dialling: bool = True
    answer: Incoming | None = None
    answer_means: Outcome = "unknown"
    retry_after_seconds: float = 0.0
    outcome: Outcome = "open"
    ended_at: float = 0.0
    recorded_at: float | None = None

    @property
    def known(self) -> Outcome:
        """What the broker can know of it: an answer that was never made durable is as good as none."""
        definite = self.outcome in {"ok", "refused", "transient"}
        return "unknown" if definite and self.recorded_at is None else self.outcome

    @property
    def waits(self) -> bool:
        """Whether its sender still listens."""
        return self.outcome == "open" and not self.answered.done()


class MadeUpProvider:
    """Knows which tokens live, and answers as it is told to."""

    def __init__(self, mode: Mode, clock: Clock) -> None:
        """Begin with one grant, whose first tokens are ``access-0`` and ``refresh-0``."""
        self.mode = mode
        self._clock = clock
        self.issued = 0
        self.alive = True
        self.newest_refresh = "refresh-0"
        self.live_access = {"access-0"}
        self._successors: dict[str, tuple[dict[str, Any], float]] = {}

    @property
    def newest_access(self) -> str:
        """The access token that came last."""
        return f"access-{self.issued}"

    def decide(self, call: Call, decision: Decision) -> None:
        """Act on a request, and lay its answer ready."""
        call.dialling = False
        if decision == "honest":
            call.answer, call.answer_means = self._honest(call.token)
        elif decision == "lie":
            call.answer, call.answer_means = _refusal(), "refused"
        elif decision == "busy":
            call.answer, call.answer_means = Incoming(429, {"retry-after": str(int(BUSY_SECONDS))}, b""), "transient"
            call.retry_after_seconds = BUSY_SECONDS
        elif decision == "broken":
            call.answer, call.answer_means = Incoming(500, {}, b"<html>oops</html>"), "transient"
        else:
            means: Outcome = "transient" if self.mode == "static" else "unknown"
            call.answer, call.answer_means = Incoming(200, {}, b"<html>please log in</html>"), means

    def _honest(self, token: str) -> tuple[Incoming, Outcome]:
        if not self.alive:
            return _refusal(), "refused"
        if token == self.newest_refresh:
            return _tokens(self._renew(token)), "ok"
        used = self._successors.get(token)
        if used is not None and self.mode == "grace" and self._may_replay(*used):
            return _tokens(used[0]), "ok"
        self.revoke()  # reuse of a token that was replaced
        return _refusal(), "refused"

    def _may_replay(self, answer: dict[str, Any], used_at: float) -> bool:
        unused = answer["refresh_token"] == self.newest_refresh
        return unused and self._clock.elapsed < used_at + GRACE_SECONDS

    def _renew(self, token: str) -> dict[str, Any]:
        self.issued += 1
        answer = {"access_token": self.newest_access, "token_type": "Bearer", "expires_in": LIFETIME_SECONDS}
        self.live_access.add(self.newest_access)
        if self.mode != "static":
            answer["refresh_token"] = self.newest_refresh = f"refresh-{self.issued}"
            self._successors[token] = answer, self._clock.elapsed
        return answer

    def revoke(self) -> None:
        """Let the grant die, as a user can."""
        self.alive = False
        self.live_access.clear()


def _tokens(answer: dict[str, Any]) -> Incoming:
    return Incoming(200, {}, json.dumps(answer).encode())


def _refusal() -> Incoming:
    return Incoming(400, {}, b'{"error": "invalid_grant"}')


class Wire:
    """One process's way to the provider: what ``Egress`` is to ``Credentials``, with a made-up network behind it."""

    def __init__(self, process: Process) -> None:
        """Belong to a process, and die with it."""
        self._process = process

    async def send(self, request: Outgoing, *, timeout_seconds: float = 10.0) -> Incoming:
        """Send a refresh. See ``Egress.send``; answers here are never too large."""
        process, world = self._process, self._process.world
        if process.dead:
            raise asyncio.CancelledError
        call = world.sends(process, parse_qs(request.body.decode())["refresh_token"][0], timeout_seconds)
        try:
            async with asyncio.timeout(timeout_seconds):
                answer = await call.answered
        except TimeoutError:
            world.ends(call, "not_sent" if call.dialling else "unknown")
            raise (NotSent() if call.dialling else OutcomeUnknown(timed_out=True)) from None
        except (NotSent, OutcomeUnknown, UpstreamInvalid) as error:
            world.ends(call, "not_sent" if isinstance(error, NotSent) else "unknown")
            raise
        except asyncio.CancelledError:
            world.ends(call, "not_sent" if call.dialling else "unknown")
            raise
        world.ends(call, call.answer_means)
        return answer


# --- processes


@dataclass(eq=False)
class Gate:
    """A call that waits to be let through. True lets it pass, False makes the database fail there."""

    name: str
    opened: asyncio.Future[bool]


class GatedDatabase:
    """The real database behind gates: one before anything happens, one between a commit and its caller."""

    def __init__(self, process: Process, real: Database) -> None:
        """Belong to a process."""
        self._process = process
        self._real = real
        self.dialect = real.dialect

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """See ``Database``."""
        await self._process.gate("commit")
        result = await self._real.transaction(work)
        self._process.world.committed(self._process)
        await self._process.gate("committed")
        return result

    async def read(self, work: Callable[[Session], T]) -> T:
        """See ``Database``."""
        await self._process.gate("read")
        return await self._real.read(work)

    async def query(self, work: Callable[[sa.Connection], T]) -> T:
        """See ``Database``."""
        await self._process.gate("read")
        return await self._real.query(work)


@dataclass(eq=False)
class Caller:
    """Somebody who asked, and what is known of that moment."""

    task: asyncio.Task[Handout]
    ask: Ask
    token_before: str
    live_until: float
    failed_database: bool = False


class Process:
    """One process of the broker: its memory is gone when it is killed."""

    def __init__(self, world: World, number: int) -> None:
        """Start it."""
        self.world, self.number = world, number
        self.loop = VirtualLoop(world.clock)
        self.dead = self.frozen = self.leaving = self.database_failed = False
        self.gates: list[Gate] = []
        self.callers: list[Caller] = []
        self.tasks: list[asyncio.Task[Any]] = []
        ground = world.ground
        self.database = cast("Database", GatedDatabase(self, ground.stores[number]))
        vault = CachedVault(SealedRows(self.database, ground.sealer), seconds=10.0, timer=world.clock.monotonic)
        wire = cast("Egress", Wire(self))
        self.integrations = Integrations(self.database, vault, wire, ground.audit, world.catalog, ground.settings)
        parts = (self.database, vault, ground.sealer, wire, self.integrations, ground.audit, ground.metrics)
        self.credentials = Credentials(*parts, monotonic=world.clock.monotonic)
        self.owner = self.credentials._claims._owner

    async def gate(self, name: str) -> None:
        """Wait to be let through; DatabaseUnavailable when told so."""
        if self.dead:
            raise asyncio.CancelledError
        gate = Gate(name, self.loop.create_future())
        self.gates.append(gate)
        try:
            passes = await gate.opened
        finally:
            self.gates.remove(gate)
        if not passes:
            self.database_failed = True
            for caller in self.callers:
                caller.failed_database = True
            raise DatabaseUnavailable

    def settle(self) -> None:
        """Let it run until it waits."""
        if not self.dead and not self.frozen:
            self.loop.settle()

    def open_gate(self, index: int = 0, *, passes: bool = True) -> bool:
        """Open one gate; say whether there was any."""
        waiting = [gate for gate in self.gates if not gate.opened.done()]
        if self.frozen or not waiting:
            return False
        waiting[index % len(waiting)].opened.set_result(passes)
        self.settle()
        return True

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin something in this process."""
        task = self.loop.create_task(work)
        self.tasks.append(task)
        self.settle()
        return task

    def kill(self) -> None:
        """End it between two instructions: nothing that it would still do reaches anybody."""
        self.dead = True
        while tasks := asyncio.all_tasks(self.loop):
            for task in tasks:
                task.cancel()
            self.loop.settle()
        self.loop.close()


async def asked(process: Process, ask: Ask) -> Handout:
    """Ask for a token as ``Connections`` does."""

    def work(session: Session) -> Connection | None:
        return session.get(Connection, ID)

    row = await process.database.read(work)
    at = process.world.clock.epoch()
    assert row is not None
    return await process.credentials.fresh(row, await process.integrations.configured(NAME), ask, at)


async def refreshed_by_the_worker(process: Process) -> None:
    """Refresh as the worker does."""
    row = await process.database.read(lambda session: session.get(Connection, ID))
    assert row is not None
    await process.credentials.refresh(row)


# --- the world and its witness


@dataclass(frozen=True)
class Tables:
    """What the tables say of the connection."""

    status: str
    status_reason: str | None
    secret_version: int
    token_expires_at: float
    unknown_outcomes: int
    refusals: int
    owner: str | None
    fence: int
    lease_ends_at: float
    attempt_fence: int | None
    attempt_digest: str | None
    journal_fence: int | None

    @property
    def guarded(self) -> Tables:
        """What only the holder of the lease may change."""
        return replace(self, owner=None, fence=0, lease_ends_at=0.0)


LOOK = sa.text(
    "SELECT c.status, c.status_reason, c.secret_version, c.token_expires_at, c.unknown_outcomes, c.refusals,"
    " l.owner, coalesce(l.fence, 0), coalesce(l.expires_at, 0), a.fence, a.token_digest, j.fence"
    " FROM connections c LEFT JOIN refresh_leases l ON l.connection_id = c.id"
    " LEFT JOIN refresh_attempts a ON a.connection_id = c.id LEFT JOIN refresh_journal j ON j.connection_id = c.id"
    " WHERE c.id = :id"
)
SEALED = sa.text("SELECT sealed FROM sealed_secrets WHERE owner = :owner AND version = :version")
FORGET = ("connections", "refresh_leases", "refresh_attempts", "refresh_journal")


def catalog_for(mode: Mode) -> dict[str, Provider]:
    """Return the provider's file."""
    refresh = {
        "strict": Refresh(),
        "grace": Refresh(grace_seconds=GRACE_SECONDS),
        "static": Refresh(rotates=False),
    }[mode]
    oauth2 = OAuth2(authorize_url=f"{ORIGIN}/authorize", token_url=f"{ORIGIN}/token", refresh=refresh)
    return {"made-up": Provider("made-up", "Made up", f"{ORIGIN}/docs", oauth2)}


@dataclass(frozen=True)
class Ground:
    """What outlives a world: the clock, one store for each process on the same database, keys, and the audit."""

    clock: Clock
    stores: tuple[Database, ...]
    sealer: Sealer
    audit: Audit
    settings: Settings
    metrics: Metrics


class World:
    """Everything around one connection, and the witness of all that happens to it."""

    def __init__(self, ground: Ground, *, mode: Mode, ends_in_seconds: float) -> None:
        """Wipe the tables and begin anew: a connection whose token ends in so many seconds, and idle processes."""
        self.ground, self.clock = ground, ground.clock
        self.clock.elapsed = 0.0
        self.catalog = catalog_for(mode)
        self.provider = MadeUpProvider(mode, self.clock)
        self.calls: list[Call] = []
        self.violations: list[str] = []
        loop = VirtualLoop(self.clock)
        loop.run_until_complete(self._begin(ends_in_seconds))
        loop.close()
        self.tables = self.look()
        self.processes = [Process(self, number) for number in range(len(ground.stores))]

    async def _begin(self, ends_in_seconds: float) -> None:
        store, now = self.ground.stores[0], self.clock.epoch()

        def wipe(session: Session) -> None:
            for table in FORGET:
                session.execute(sa.text(f"DELETE FROM {table}"))  # noqa: S608 - names of ours
            session.execute(sa.text("DELETE FROM sealed_secrets WHERE owner LIKE 'connections/%'"))

        await store.transaction(wipe)
        vault = SealedRows(store, self.ground.sealer)
        value = {"type": "oauth2", "access_token": "access-0", "token_type": "Bearer", "refresh_token": "refresh-0"}
        await vault.put(secret_owner(ID), {**value, "lifetime_seconds": LIFETIME_SECONDS}, expected_version=0)
        row = Connection(
            id=ID,
            integration=NAME,
            provider="made-up",
            subject="acme:1",
            status="active",
            client_id="client",
            pins={"token": ORIGIN},
            secret_version=1,
            refreshable=True,
            token_expires_at=now + ends_in_seconds,
            created_at=now,
        )
        await store.transaction(lambda session: session.add(row))

    def close(self) -> None:
        """End every process."""
        for process in self.processes:
            if not process.dead:
                process.kill()

    # Time and processes

    def restart(self, number: int) -> None:
        """Kill a process; another one, that remembers nothing, takes its place."""
        self.processes[number].kill()
        self.processes[number] = Process(self, number)

    def advance(self, seconds: float) -> None:
        """Let time pass; timers go off in their order, except in processes that are frozen."""
        until = self.clock.elapsed + seconds
        while True:
            awake = [process for process in self.processes if not process.frozen]
            for process in awake:
                process.settle()
            due = [process.loop.wakes_at for process in awake if process.loop.wakes_at is not None]
            if not due or min(due) > until:
                break
            self.clock.elapsed = max(self.clock.elapsed, min(due))
        self.clock.elapsed = until
        for process in self.processes:
            process.settle()

    def next_timer(self) -> float | None:
        """Return in how many seconds the next timer goes off."""
        due = [process.loop.wakes_at for process in self.processes if process.loop.wakes_at is not None]
        return max(0.0, min(due) - self.clock.elapsed) if due else None

    # What may happen

    def ask(self, number: int, ask: Ask) -> None:
        """Let somebody ask a process for a token."""
        process = self.processes[number]
        before, live_until = self.held()["access_token"], self.tables.token_expires_at
        process.callers.append(Caller(process.start(asked(process, ask)), ask, before, live_until))
        process.tasks.pop()  # a caller is judged otherwise

    def leave(self, number: int) -> None:
        """Stop a process in an orderly way; ``harvest`` replaces it when it is done."""
        process = self.processes[number]
        process.leaving = True
        process.start(process.credentials.aclose())

    def deliver(self, call: Call, error: BrokerError | None = None) -> None:
        """Let the answer, or what happened to it, reach its sender, if there still is one."""
        if not call.waits:
            return
        if error is not None:
            call.answered.set_exception(error)
        elif call.answer is not None:
            call.answered.set_result(call.answer)
        call.process.settle()

    # The witness

    def look(self) -> Tables:
        """Read the tables."""
        found = at_once(self.ground.stores[0].read(lambda session: tuple(session.execute(LOOK, {"id": ID}).one())))
        return Tables(*found)

    def held(self) -> dict[str, Any]:
        """Return the secret that the row names."""
        owner, version = secret_owner(ID), self.look().secret_version
        wanted = {"owner": owner, "version": version}
        sealed = at_once(self.ground.stores[0].read(lambda session: session.execute(SEALED, wanted).scalar_one()))
        return dict(json.loads(self.ground.sealer.open(sealed, owner=owner, purpose=PURPOSE, version=version)))

    def against(self, text: str) -> None:
        """Note a violation."""
        self.violations.append(f"{self.clock.elapsed:.1f} s: {text}")

    def sends(self, process: Process, token: str, timeout_seconds: float) -> Call:
        """Begin a call; see whether it may be made."""
        now, tables = self.clock.elapsed, self.tables
        answered = process.loop.create_future()
        call = Call(process, token, tables.fence, now, now + timeout_seconds, answered)
        if any(other.outcome == "open" and not other.process.dead and now < other.deadline for other in self.calls):
            self.against("two senders at once")
        if tables.attempt_digest != self.ground.audit.digest(token) or tables.attempt_fence != tables.fence:
            self.against("sent without a durable attempt")
        if tables.owner != process.owner or tables.lease_ends_at < EPOCH + call.deadline - SLACK_SECONDS:
            self.against("sent without a lease that lasts until its sender has given up")
        self._may_be_sent_again([other for other in self.calls if other.token == token], call)
        self.calls.append(call)
        return call

    def _may_be_sent_again(self, sent: list[Call], call: Call) -> None:
        """Check the second part of the law on what became of the same token before."""
        sent = [other for other in sent if other.outcome != "not_sent"]
        if not sent:
            return
        last, rotates = sent[-1], self.provider.mode != "static"
        unknown = sum(other.known == "unknown" for other in sent)
        if rotates and any(other.known == "ok" for other in sent):
            self.against("a token was sent again although its successor is known")
        if rotates and unknown > MOST_RESENDS:
            self.against("a token was sent again more than three times after silence")
        if sum(other.known == "refused" for other in sent) > 1:
            self.against("a token was sent again although it was refused twice")
        if call.started_at < self._earliest_after(last, unknown) - SLACK_SECONDS:
            self.against(f"a token was sent again too soon after an outcome that is {last.known}")

    def _earliest_after(self, last: Call, unknown: int) -> float:
        if last.known == "open":
            return last.deadline
        if last.known == "refused":
            return (last.recorded_at or 0.0) + CONFIRM_SECONDS
        if last.known == "transient":
            return (last.recorded_at or 0.0) + last.retry_after_seconds
        if last.known != "unknown" or self.provider.mode == "static":
            return 0.0
        again_at = last.ended_at + RESEND_WAITS_SECONDS[min(unknown, MOST_RESENDS) - 1]
        return again_at if self.provider.mode == "grace" else max(again_at, self.tables.token_expires_at - EPOCH)

    def ends(self, call: Call, outcome: Outcome) -> None:
        """End a call as its sender sees it."""
        if call.outcome == "open":
            call.outcome, call.ended_at = outcome, self.clock.elapsed

    def committed(self, process: Process) -> None:
        """Look at what a commit has changed, and whether it may."""
        before, self.tables = self.tables, self.look()
        after = self.tables
        if before.guarded != after.guarded and process.owner not in {before.owner, after.owner}:
            self.against("written without the lease")
        if before.journal_fence is None and after.journal_fence is not None:
            self._recorded(after.journal_fence)
        if after.unknown_outcomes > before.unknown_outcomes:
            self._counted_unknown(before.attempt_fence)
        if (before.status, after.status) == ("active", "reauthorization_required"):
            self._given_up(after)

    def _recorded(self, fence: int) -> None:
        call = next(call for call in reversed(self.calls) if call.fence == fence)
        call.recorded_at = self.clock.elapsed

    def _counted_unknown(self, fence: int | None) -> None:
        mine = [call for call in self.calls if call.fence == fence]
        if fence is None or (mine and mine[-1].known in {"ok", "refused", "transient"}):
            self.against("a known outcome was counted as unknown")

    def _given_up(self, after: Tables) -> None:
        """Check why the connection was marked: it was told twice, or there was silence after three more tries."""
        token = self.calls[-1].token if self.calls else ""
        told = sum(call.known == "refused" for call in self.calls if call.token == token)
        silent = self.provider.mode != "static" and after.unknown_outcomes > MOST_RESENDS
        if told < 2 and not silent:
            self.against("given up without being told so twice")
        expected = "refresh_outcome_unknown" if after.unknown_outcomes else "invalid_grant"
        if after.status_reason != expected:
            self.against("given up with another reason than what happened")

    def harvest(self) -> None:
        """Judge what callers were given, and replace processes that have stopped."""
        for number, process in enumerate(self.processes):
            ended = [caller for caller in process.callers if caller.task.done()]
            process.callers = [caller for caller in process.callers if not caller.task.done()]
            for caller in ended:
                self._judge(caller)
            for task in [task for task in process.tasks if task.done()]:
                process.tasks.remove(task)
                self._expected(task)
            if process.leaving and not process.tasks and not process.callers:
                if self.tables.owner == process.owner and not process.database_failed:
                    self.against("a process left and kept its lease")
                self.restart(number)

    def _expected(self, task: asyncio.Task[Any]) -> BaseException | None:
        """Return what a task raised, if that is something that may be raised."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, BrokerError):
            self.against(f"a defect: {error!r}")
        return error

    def _judge(self, caller: Caller) -> None:
        error = self._expected(caller.task)
        if caller.task.cancelled():
            return
        if error is None:
            self._judge_token(caller, caller.task.result())
            return
        plain = not caller.ask.force and caller.ask.not_token_sha256 is None
        excused = caller.failed_database and isinstance(error, (DatabaseUnavailable, SecretStoreUnavailable))
        if plain and self.tables.status == "active" and self.clock.epoch() < caller.live_until and not excused:
            self.against(f"a live token was withheld: {error!r}")

    def _judge_token(self, caller: Caller, handout: Handout) -> None:
        token = handout.access_token.reveal()
        number, before = int(token.removeprefix("access-")), int(caller.token_before.removeprefix("access-"))
        if not before <= number <= self.provider.issued:
            self.against("an older token was handed out than the one that there was")
        if caller.ask.force and token == caller.token_before:
            self.against("a new token was demanded, and the same one handed out")
        if sha256(token) == caller.ask.not_token_sha256:
            self.against("a token was handed out that the caller said was refused")

    # The end

    def come_to_rest(self) -> None:
        """Let everything end with an honest provider, then ask until there is a final state; judge that."""
        for process in self.processes:
            process.frozen = False
        self.pass_time(LIFETIME_SECONDS)
        for _ in range(6):
            process = self.processes[0]
            self.run_out(process.start(process.credentials.settle(ID)))
            self.pass_time(LIFETIME_SECONDS + 1000)
            task = process.start(asked(process, Ask()))
            self.run_out(task)
            error = self._expected(task)
            if error is None:
                self._rests_alive(task.result())
                return
            if isinstance(error, ReauthorizationRequired):
                self._rests_given_up(error)
                return
        self.against("no final state")

    def _rests_alive(self, handout: Handout) -> None:
        held, tables = self.held(), self.look()
        if handout.access_token.reveal() != self.provider.newest_access or handout.stale:
            self.against("the final token is not the newest")
        if held["refresh_token"] != self.provider.newest_refresh or not self.provider.alive:
            self.against("the final refresh token is not the newest")
        if (tables.attempt_fence, tables.journal_fence, tables.owner) != (None, None, None):
            self.against("something was left behind")

    def _rests_given_up(self, error: BrokerError) -> None:
        if error.members.get("status_reason") not in {"refresh_outcome_unknown", "invalid_grant"}:
            self.against("given up without a reason")

    def drain(self) -> None:
        """Let everything run that needs no time; the provider is honest and answers."""
        moved = True
        while moved:
            moved = False
            for process in self.processes:
                process.settle()
                while process.open_gate():
                    moved = True
            for call in [call for call in self.calls if call.waits]:
                if call.answer is None:
                    self.provider.decide(call, "honest")
                self.deliver(call)
                moved = True
        self.harvest()

    def pass_time(self, seconds: float) -> None:
        """Let time pass and everything run in it."""
        until = self.clock.elapsed + seconds
        for _ in range(TIRED):
            self.drain()
            timer = self.next_timer()
            if timer is None or self.clock.elapsed + timer > until:
                break
            self.advance(timer)
        self.advance(max(0.0, until - self.clock.elapsed))
        self.drain()

    def run_out(self, task: asyncio.Task[Any]) -> None:
        """Run until a task is done."""
        for _ in range(TIRED):
            self.drain()
            timer = self.next_timer()
            if task.done() or timer is None:
                break
            self.advance(timer)
        if not task.done():
            raise AssertionError("a task that never ends")


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns that never has to wait, wherever it is called."""
    try:
        work.send(None)
    except StopIteration as done:
        return cast("T", done.value)
    raise AssertionError("it had to wait")


def sha256(token: str) -> str:
    """Return the digest by which callers name a token."""
    return hashlib.sha256(token.encode()).hexdigest()


async def prepared(ground: Ground) -> None:
    """Make the integration, once for a database."""
    store = ground.stores[0]
    vault = SealedRows(store, ground.sealer)
    wire = cast("Egress", None)  # creating asks nobody
    integrations = Integrations(store, vault, wire, ground.audit, catalog_for("strict"), ground.settings)
    await integrations.create(Draft(NAME, "made-up", client_id="client", client_secret=Secret("s" * 20)), None)
