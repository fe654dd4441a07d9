"""Circuit breakers: after repeated failures calls are refused for a while, then one probe at a time may try."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from broker.errors import CircuitOpen

BreakerState = Literal["closed", "open", "half_open"]
MAX_KEYS = 10_000


@dataclass(frozen=True, slots=True)
class BreakerRule:
    """When a breaker opens and for how long; ``ValueError`` for a threshold under 1 or seconds that are not above 0.

    It opens with the ``failure_threshold``-th failure in a window of ``window_seconds`` that begins with a first failure,
    unless more calls of that window succeeded than failed: a busy upstream with a few errors is not a broken one.
    ``recovery_seconds`` later one probe may go, and the next one when it has said nothing for as long.
    """

    failure_threshold: int
    window_seconds: float
    recovery_seconds: float

    def __post_init__(self) -> None:
        """Refuse what could not work."""
        if self.failure_threshold < 1 or self.window_seconds <= 0 or self.recovery_seconds <= 0:
            raise ValueError("a breaker needs a threshold of 1 or more and seconds above 0")


class _Circuit:
    """What is known of one key. ``turn`` counts changes of state and probes: who entered before the last one has no say."""

    __slots__ = ("began_at", "failures", "open_until", "probe_until", "successes", "turn")

    def __init__(self) -> None:
        self.turn = 0
        self.close()

    def close(self) -> None:
        """Let everybody pass, with nothing counted."""
        self.turn += 1
        self.began_at, self.failures, self.successes = -math.inf, 0, 0
        self.open_until: float | None = None
        self.probe_until = -math.inf

    def open(self, until: float) -> None:
        """Refuse everybody until then."""
        self.turn += 1
        self.open_until, self.probe_until = until, -math.inf

    def begin_probe(self, until: float) -> None:
        """Refuse everybody else until then: a call that lasts (a stream) must not keep the others out meanwhile."""
        self.turn += 1
        self.probe_until = until

    def state(self, now: float) -> BreakerState:
        """Return the state; it is half open once the time is over, until a probe decided."""
        if self.open_until is None:
            return "closed"
        return "open" if now < self.open_until else "half_open"

    def note_failure(self, rule: BreakerRule, now: float) -> None:
        """Count a failure of an ordinary call, and open where the rule says so."""
        if self.began_at + rule.window_seconds <= now:
            self.began_at, self.failures, self.successes = now, 0, 0
        self.failures += 1
        if self.failures >= rule.failure_threshold and self.failures >= self.successes:
            self.open(now + rule.recovery_seconds)


class Pass:
    """The leave to make one call; say once how it went. The first word counts, any later one is ignored.

    As a context manager it says ``left()`` at the end by itself, so that no probe can be lost.
    """

    __slots__ = ("_circuit", "_clock", "_rule", "_said", "_turn", "is_probe")

    def __init__(self, circuit: _Circuit, rule: BreakerRule, clock: Callable[[], float], *, is_probe: bool) -> None:
        """Belong to the turn that the circuit is in now."""
        self._circuit, self._rule, self._clock = circuit, rule, clock
        self._turn, self._said, self.is_probe = circuit.turn, False, is_probe

    def succeeded(self) -> None:
        """Say that the upstream works: a probe closes the breaker."""
        if self._has_a_say():
            if self.is_probe:
                self._circuit.close()
            elif self._circuit.failures:  # a window is open: successes weigh against its failures
                self._circuit.successes += 1

    def failed(self) -> None:
        """Say that the upstream does not work: a probe opens the breaker again, for as long as before."""
        if self._has_a_say():
            if self.is_probe:
                self._circuit.open(self._clock() + self._rule.recovery_seconds)
            else:
                self._circuit.note_failure(self._rule, self._clock())

    def left(self) -> None:
        """Say that the call shows nothing (cancelled, or never sent): the next caller may probe."""
        if self._has_a_say() and self.is_probe:
            self._circuit.probe_until = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.left()

    def _has_a_say(self) -> bool:
        if self._said:
            return False
        self._said = True
        return self._turn == self._circuit.turn


class Breakers:
    """One breaker per key, such as (integration, upstream host); in this process's memory, at most ``MAX_KEYS``.

    Synchronous, for one event loop; ``clock`` gives monotonic seconds. When there are too many keys, closed breakers are
    forgotten first, then those that opened longest ago.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with every breaker closed."""
        self._circuits: dict[Hashable, _Circuit] = {}
        self._clock = clock

    def enter(self, key: Hashable, rule: BreakerRule) -> Pass:
        """Return the leave to make one call, or raise ``CircuitOpen`` with Retry-After.

        When the recovery time is over, exactly one caller at a time gets a leave, as a probe; it holds its place for another
        ``recovery_seconds`` at most, and has no say once the next one probes. The rule may change between calls: each call
        is judged by its own.
        """
        circuit = self._circuits.get(key)
        if circuit is None:
            circuit = self._new(key)
        if circuit.open_until is None:
            return Pass(circuit, rule, self._clock, is_probe=False)
        now = self._clock()
        remaining = circuit.open_until - now
        if remaining > 0 or now < circuit.probe_until:
            raise CircuitOpen(headers={"Retry-After": str(max(1, math.ceil(remaining)))})
        circuit.begin_probe(now + rule.recovery_seconds)
        return Pass(circuit, rule, self._clock, is_probe=True)

    def states(self) -> Mapping[Hashable, BreakerState]:
        """Return the state of every known key, as it is now."""
        now = self._clock()
        return {key: circuit.state(now) for key, circuit in self._circuits.items()}

    def _new(self, key: Hashable) -> _Circuit:
        if len(self._circuits) >= MAX_KEYS:
            order = sorted(self._circuits, key=lambda one: self._circuits[one].open_until or -math.inf)
            for old in order[: MAX_KEYS // 10]:
                del self._circuits[old]
        circuit = self._circuits[key] = _Circuit()
        return circuit
