"""Law 5: for every interleaving of refreshers with crashes and lost answers, one sender at a time and a final state.

Never two senders at once. The same token is sent again only after an unknown outcome, at most three times; or after a
definite refusal for now, when its wait is over; or once more to confirm a refusal for good. The final state is the newest
token, or a need for consent that names its reason. Hypothesis chooses who runs, how far, what the provider does, when time
passes and who is killed; ``tests/broker/refresh_world.py`` is the stage. ``TEST_LONG=1`` searches longer and at random.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import sqlalchemy as sa
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlmodel import Session

from broker.audit import open_audit
from broker.database import Database, PostgresDatabase, SqliteDatabase, now, opened
from broker.egress import NotSent, OutcomeUnknown
from broker.errors import UpstreamInvalid
from broker.refresh import Ask
from broker.settings import load_settings
from broker.telemetry import new_metrics
from broker.vault.keyring import load_keyring, open_sealer
from tests.broker.refresh_world import ID as CONNECTION_ID
from tests.broker.refresh_world import (
    LIFETIME_SECONDS,
    Call,
    Ground,
    Tables,
    World,
    prepared,
    refreshed_by_the_worker,
    sha256,
)
from tests.broker.virtual_time import EPOCH, Clock
from tests.commands import logging_as_before

T = TypeVar("T")
LONG = os.environ.get("TEST_LONG") == "1"
PROCESSES = 3
SERIOUS = {"refresh.defect", "credential.unreadable", "refresh.journal_unreadable"}

KINDS = ["late", "late", "plain", "force", "refused", "worker", "settle"]
DECISIONS = ["honest", "honest", "honest", "busy", "broken", "page", "lie"]
FATES = ["arrives", "arrives", "late", "lost", "cut"]
TROUBLES = ["kill", "kill", "kill", "freeze", "freeze", "database", "hang up", "stop", "revoked"]
MOST_AT_ONCE = 4
POINTS: dict[str, Callable[[Tables, str], bool]] = {
    "claimed": lambda tables, owner: tables.owner == owner,
    "attempted": lambda tables, _: tables.attempt_fence is not None,
    "journalled": lambda tables, _: tables.journal_fence is not None,
    "recorded": lambda tables, owner: tables.owner == owner and tables.attempt_fence is None,
    "waiting": lambda _, __: False,
}


numbers = st.integers(0, PROCESSES - 1)
points = st.sampled_from(sorted(POINTS))


class Refreshers(RuleBasedStateMachine):
    """What may happen to a connection, in any order."""

    ground: Ground
    world: World
    defects: list[str]
    reached: Counter[str]

    @initialize(mode=st.sampled_from(["strict", "grace", "static"]), ends_in=st.sampled_from([-1.0, 60.0, 1000.0]))
    def begin(self, mode: Any, ends_in: float) -> None:
        self.world = World(self.ground, mode=mode, ends_in_seconds=ends_in)
        self.defects.clear()

    # Who asks, and how far they come

    @rule(number=numbers, kind=st.sampled_from(KINDS), point=points)
    def somebody_asks(self, number: int, kind: str, point: str) -> None:
        process = self.world.processes[number]
        if process.leaving or len(process.callers) + len(process.tasks) > MOST_AT_ONCE:
            return
        if kind == "late":
            self.world.advance(max(0.0, self.world.tables.token_expires_at + 1.0 - self.world.clock.epoch()))
        if kind == "worker":
            process.start(refreshed_by_the_worker(process))
        elif kind == "settle":
            process.start(process.credentials.settle(CONNECTION_ID))
        else:
            refused = sha256(self.world.held()["access_token"]) if kind == "refused" else None
            self.world.ask(number, Ask(force=kind == "force", not_token_sha256=refused))
        self._goes_on(number, point)

    @rule(number=numbers, point=points)
    def a_process_goes_on(self, number: int, point: str) -> None:
        self._goes_on(number, point)

    def _goes_on(self, number: int, point: str) -> None:
        process = self.world.processes[number]
        process.frozen = False
        process.settle()
        while not POINTS[point](self.world.tables, process.owner) and process.open_gate():
            pass

    @rule(number=numbers, steps=st.integers(1, 12), index=st.integers(0, 3))
    def a_process_takes_some_steps(self, number: int, steps: int, index: int) -> None:
        for _ in range(steps):
            self.world.processes[number].open_gate(index)

    @rule()
    def everybody_goes_on(self) -> None:
        for number in range(PROCESSES):
            self._goes_on(number, "waiting")

    # What the provider and the network do

    @precondition(lambda self: bool(self._undecided()))
    @rule(index=st.integers(0, 2), decision=st.sampled_from(DECISIONS), fate=st.sampled_from(FATES))
    def the_provider_acts(self, index: int, decision: Any, fate: str) -> None:
        waiting = self._undecided()
        call = waiting[index % len(waiting)]
        self.world.provider.decide(call, decision)
        self._goes_back(call, fate)

    def _undecided(self) -> list[Call]:
        return [call for call in self.world.calls if call.answer is None and call.outcome != "not_sent"]

    def _goes_back(self, call: Call, fate: str) -> None:
        if fate == "arrives":
            self.world.deliver(call)
        elif fate == "lost":
            self.world.deliver(call, OutcomeUnknown())
        elif fate == "cut":
            self.world.deliver(call, UpstreamInvalid())

    @precondition(lambda self: any(call.waits for call in self.world.calls))
    @rule(fate=st.sampled_from(["arrives", "lost", "never sent", "lost on the way"]))
    def the_network_acts(self, fate: str) -> None:
        call = next(call for call in self.world.calls if call.waits)
        if call.answer is not None:
            self._goes_back(call, fate)
        elif fate == "never sent":
            self.world.deliver(call, NotSent())
        elif fate == "lost on the way":
            call.dialling = False
            self.world.deliver(call, OutcomeUnknown())

    @rule()
    def all_goes_well_for_a_moment(self) -> None:
        self.world.drain()

    # Time and trouble

    @rule(seconds=st.sampled_from([0.3, 2.0, 5.0, 15.0, 31.0, 41.0, 300.0, 901.0, LIFETIME_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(number=numbers, kind=st.sampled_from(TROUBLES))
    def trouble_comes(self, number: int, kind: str) -> None:
        process = self.world.processes[number]
        if kind == "kill":
            self.world.restart(number)
        elif kind == "freeze":
            process.frozen = True
        elif kind == "stop" and not process.leaving:
            self.world.leave(number)
        elif kind == "database":
            process.open_gate(passes=False)
        elif kind == "revoked" and len(self.world.calls) > 2:
            self.world.provider.revoke()
        elif kind == "hang up":
            for caller in process.callers[:1]:
                caller.task.cancel()
            process.settle()

    # The law

    @invariant()
    def the_law_is_kept(self) -> None:
        self.world.harvest()
        assert self.world.violations == []
        assert self.defects == []

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if not self.world.violations and not self.defects:
                self.world.come_to_rest()
                assert self.world.violations == []
                assert self.defects == []
        finally:
            self.reached.update(call.known for call in self.world.calls)
            self.reached["again"] += len(self.world.calls) - len({call.token for call in self.world.calls})
            self.world.close()


@contextmanager
def defects_noted() -> Iterator[list[str]]:
    """Collect the log's events that no run may have; nothing else is logged meanwhile."""
    found: list[str] = []

    def note(_logger: object, _name: str, event: Any) -> Any:
        if event["event"] in SERIOUS:
            found.append(f"{event['event']}: {event.get('exc_info')!r}")
        raise structlog.DropEvent

    with logging_as_before():
        structlog.configure(processors=[note])
        yield found


@pytest.fixture
def memory() -> Iterator[Path]:
    """Give a folder in memory, if there is one: every step commits to a file."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


async def ground_on(stores: tuple[Database, ...], folder: Path, clock: Clock) -> Ground:
    """Prepare a migrated database; ``stores`` are the ways of several processes to it."""
    given = {"env": "development", "data_dir": folder, "public_url": "http://127.0.0.1:1"}
    settings = load_settings({}, directory=folder, **given)
    assert all([abs(await store.read(now) - clock.epoch()) < 0.001 for store in stores])
    sealer = await open_sealer(stores[0], load_keyring(settings))
    audit = await open_audit(stores[0], sealer, settings)
    ground = Ground(clock, stores, sealer, audit, settings, new_metrics())
    await prepared(ground)
    return ground


def ground_on_sqlite(folder: Path, clock: Clock) -> Ground:
    path = folder / "broker.db"
    stores = tuple(cast("Database", SqliteDatabase(path, clock=clock.epoch)) for _ in range(PROCESSES))
    return asyncio.run(ground_on(stores, folder, clock))


class PostgresAtOnce:
    """A real PostgreSQL that answers before a coroutine has to wait, and whose clock is ours.

    It works in a loop on a thread of its own. A function of the server's name for its clock stands before the server's own
    in the search path.
    """

    dialect = "postgresql"

    def __init__(self, url: str, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self._database, self._loop, self._clock = PostgresDatabase(url, pool_size=2), loop, clock
        self._told = -1.0

    async def transaction(self, work: Callable[[Session], T]) -> T:
        return self._answer(self._database.transaction(work))

    async def read(self, work: Callable[[Session], T]) -> T:
        return self._answer(self._database.read(work))

    async def query(self, work: Callable[[sa.Connection], T]) -> T:
        return self._answer(self._database.query(work))

    def _answer(self, call: Coroutine[Any, Any, T]) -> T:
        if self._told != self._clock.elapsed:
            self._told = self._clock.elapsed
            tell = sa.text("UPDATE ours.clock SET at = :at").bindparams(at=self._clock.epoch())
            self._wait(self._database.transaction(lambda session: session.execute(tell)))
        return self._wait(call)

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def close(self) -> None:
        self._wait(self._database.aclose())


VIRTUAL_CLOCK = (
    "CREATE SCHEMA ours",
    f"CREATE TABLE ours.clock AS SELECT {EPOCH}::double precision AS at",
    "CREATE FUNCTION ours.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT to_timestamp(at) FROM ours.clock'",
    "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = ours, public, pg_catalog', current_database()); END $$",
)


async def let_time_be_ours(url: str) -> None:
    def work(session: Session) -> None:
        for statement in VIRTUAL_CLOCK:
            session.execute(sa.text(statement))

    async with opened(url, migrate=False) as database:
        await database.transaction(work)


@contextmanager
def ground_on_postgres(url: str, folder: Path, clock: Clock) -> Iterator[Ground]:
    asyncio.run(let_time_be_ours(url))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stores = [PostgresAtOnce(url, loop, clock) for _ in range(PROCESSES)]
    try:
        yield asyncio.run(ground_on(tuple(cast("Database", store) for store in stores), folder, clock))
    finally:
        for store in stores:
            store.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def search(ground: Ground, *, examples: int, steps: int) -> set[str]:
    """Let Hypothesis look for a way to break the law; return what came of refreshes on the way."""
    reached: Counter[str] = Counter()
    with defects_noted() as defects:
        machine = type("Refreshers", (Refreshers,), {"ground": ground, "defects": defects, "reached": reached})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize=not LONG,
                phases=(Phase.generate, Phase.shrink) if LONG else (Phase.generate,),
                database=None,
                suppress_health_check=list(HealthCheck),
                print_blob=False,
            ),
        )
    return set(+reached)


@pytest.fixture
def sqlite_ground(sqlite_template: bytes, memory: Path) -> Ground:
    """Give a migrated SQLite file with the integration in it."""
    (memory / "broker.db").write_bytes(sqlite_template)
    return ground_on_sqlite(memory, Clock())


@pytest.mark.timeout(7200 if LONG else 600)
def test_no_interleaving_breaks_the_law_of_refreshing(sqlite_ground: Ground) -> None:
    examples = int(os.environ.get("LAW_EXAMPLES", "20000" if LONG else "200"))
    reached = search(sqlite_ground, examples=examples, steps=60)
    assert reached >= {"ok", "unknown", "refused", "transient", "not_sent", "again"}


@pytest.mark.timeout(7200 if LONG else 600)
def test_no_interleaving_breaks_the_law_on_postgresql(postgres_url: str, memory: Path) -> None:
    with ground_on_postgres(postgres_url, memory, Clock()) as ground:
        assert "ok" in search(ground, examples=2000 if LONG else 30, steps=60)


def test_late_holders_do_not_push_the_newest_secret_out_of_the_vault(sqlite_ground: Ground) -> None:
    world = World(sqlite_ground, mode="strict", ends_in_seconds=-1.0)
    for number in (0, 2):
        frozen_before_the_vault(world, number)
        other = world.processes[1]
        other.start(other.credentials.settle(CONNECTION_ID))
        while other.open_gate():
            pass
        world.advance(LIFETIME_SECONDS)
    for number in (0, 2):
        world.processes[number].frozen = False
        while world.processes[number].open_gate():
            pass
    world.come_to_rest()
    world.close()
    assert world.violations == []


def frozen_before_the_vault(world: World, number: int) -> None:
    """Let a process refresh, and stop it when the answer is journalled, until its lease is over."""
    process = world.processes[number]
    world.ask(number, Ask())
    while process.open_gate():
        pass
    world.provider.decide(world.calls[-1], "honest")
    world.deliver(world.calls[-1])
    while world.tables.journal_fence is None or process.gates[0].name != "commit":
        process.open_gate()
    process.frozen = True
    world.advance(100.0)
