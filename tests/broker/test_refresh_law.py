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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
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

from broker.audit import open_audit
from broker.database import SqliteDatabase
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
from tests.broker.virtual_time import Clock
from tests.commands import logging_as_before

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


async def ground_on_sqlite(folder: Path, clock: Clock) -> Ground:
    stores = tuple(SqliteDatabase(folder / "broker.db", clock=clock.epoch) for _ in range(PROCESSES))
    given = {"env": "development", "data_dir": folder, "public_url": "http://127.0.0.1:1"}
    settings = load_settings({}, directory=folder, **given)
    sealer = await open_sealer(stores[0], load_keyring(settings))
    audit = await open_audit(stores[0], sealer, settings)
    ground = Ground(clock, stores, sealer, audit, settings, new_metrics())
    await prepared(ground)
    return ground


def search(ground: Ground, *, examples: int, steps: int) -> None:
    """Let Hypothesis look for a way to break the law."""
    with defects_noted() as defects:
        machine = type("Refreshers", (Refreshers,), {"ground": ground, "defects": defects})
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


@pytest.mark.timeout(7200 if LONG else 120)
def test_no_interleaving_breaks_the_law_of_refreshing(sqlite_template: bytes, memory: Path) -> None:
    (memory / "broker.db").write_bytes(sqlite_template)
    ground = asyncio.run(ground_on_sqlite(memory, Clock()))
    search(ground, examples=int(os.environ.get("LAW_EXAMPLES", "20000" if LONG else "200")), steps=60)
