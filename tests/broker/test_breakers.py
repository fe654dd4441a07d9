"""Circuit breakers against a model in virtual time: they open at the threshold, and never let two probes go at once."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from broker.errors import CircuitOpen
from broker.limits import BreakerRule, Breakers, Pass
from broker.limits.breakers import MAX_KEYS

RULE = BreakerRule(failure_threshold=3, window_seconds=10, recovery_seconds=5)
KEY = ("shop", "api.shop.test:443")


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _fail(breakers: Breakers, times: int, key: tuple[str, str] = KEY, rule: BreakerRule = RULE) -> None:
    for _ in range(times):
        breakers.enter(key, rule).failed()


def _retry_after(breakers: Breakers, key: tuple[str, str] = KEY) -> int:
    with pytest.raises(CircuitOpen) as caught:
        breakers.enter(key, RULE)
    return int(caught.value.headers["Retry-After"])


def test_it_opens_with_the_failure_that_reaches_the_threshold_and_says_for_how_long() -> None:
    clock = Clock()
    breakers = Breakers(clock=clock)
    _fail(breakers, 2)
    breakers.enter(KEY, RULE).left()
    assert breakers.states() == {KEY: "closed"}
    _fail(breakers, 1)
    assert breakers.states() == {KEY: "open"}
    assert _retry_after(breakers) == 5
    clock.now += 4.5
    assert _retry_after(breakers) == 1
    breakers.enter(("shop", "other.test:443"), RULE).succeeded()


def test_failures_of_an_older_window_do_not_count() -> None:
    clock = Clock()
    breakers = Breakers(clock=clock)
    _fail(breakers, 2)
    clock.now += 10
    _fail(breakers, 2)
    assert breakers.states() == {KEY: "closed"}
    _fail(breakers, 1)
    assert breakers.states() == {KEY: "open"}


def test_a_busy_upstream_with_a_few_errors_is_not_a_broken_one() -> None:
    breakers = Breakers(clock=Clock())
    for _ in range(50):
        breakers.enter(KEY, RULE).succeeded()
        breakers.enter(KEY, RULE).succeeded()
        _fail(breakers, 1)
    assert breakers.states() == {KEY: "closed"}
    _fail(breakers, 47)
    assert breakers.states() == {KEY: "closed"}
    _fail(breakers, 1)  # as many as the 98 successes since the window's first failure
    assert breakers.states() == {KEY: "open"}


def test_a_probe_that_succeeds_closes_it_and_one_that_fails_opens_it_as_long_as_before() -> None:
    clock = Clock()
    breakers = Breakers(clock=clock)
    _fail(breakers, 3)
    clock.now += 5
    assert breakers.states() == {KEY: "half_open"}
    probe = breakers.enter(KEY, RULE)
    assert probe.is_probe
    assert _retry_after(breakers) == 1
    probe.failed()
    assert _retry_after(breakers) == 5
    clock.now += 5
    breakers.enter(KEY, RULE).succeeded()
    assert breakers.states() == {KEY: "closed"}
    _fail(breakers, 2)
    assert breakers.states() == {KEY: "closed"}, "nothing of before is counted"


def test_a_probe_that_leaves_makes_room_for_another_also_when_its_caller_is_cancelled() -> None:
    clock = Clock()
    breakers = Breakers(clock=clock)
    _fail(breakers, 3)
    clock.now += 5
    breakers.enter(KEY, RULE).left()
    with pytest.raises(KeyboardInterrupt), breakers.enter(KEY, RULE):
        raise KeyboardInterrupt
    with breakers.enter(KEY, RULE) as probe:
        probe.succeeded()
    assert breakers.states() == {KEY: "closed"}


def test_a_probe_that_lasts_holds_its_place_for_the_recovery_time_and_then_has_no_say() -> None:
    clock = Clock()
    breakers = Breakers(clock=clock)
    _fail(breakers, 3)
    clock.now += 5
    lasting = breakers.enter(KEY, RULE)
    clock.now += 4.5
    assert _retry_after(breakers) == 1
    clock.now += 0.5
    second = breakers.enter(KEY, RULE)
    assert second.is_probe
    lasting.left()
    assert _retry_after(breakers) == 1, "the place is the second one's"
    clock.now += 5
    third = breakers.enter(KEY, RULE)
    second.failed()
    assert breakers.states() == {KEY: "half_open"}
    third.succeeded()
    assert breakers.states() == {KEY: "closed"}


def test_a_probe_that_lasts_has_its_say_while_nobody_took_its_place() -> None:
    clock = Clock()
    breakers = Breakers(clock=clock)
    _fail(breakers, 3)
    clock.now += 5
    lasting = breakers.enter(KEY, RULE)
    clock.now += 600
    lasting.succeeded()
    assert breakers.states() == {KEY: "closed"}


def test_only_the_first_word_counts() -> None:
    breakers = Breakers(clock=Clock())
    _fail(breakers, 2)
    leave = breakers.enter(KEY, RULE)
    leave.succeeded()
    leave.failed()
    assert breakers.states() == {KEY: "closed"}


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_rule_that_could_not_work_is_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="a breaker needs"):
        BreakerRule(*wrong)


def test_keys_are_bounded_and_closed_breakers_are_forgotten_first() -> None:
    breakers = Breakers(clock=Clock())
    _fail(breakers, 3)
    for number in range(MAX_KEYS + 10):
        breakers.enter((f"i{number}", "h"), RULE).succeeded()
    assert len(breakers.states()) <= MAX_KEYS
    assert breakers.states()[KEY] == "open"


class BreakerMachine(RuleBasedStateMachine):
    """Any order of entering, ending and waiting, beside a model that keeps all it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breakers = Breakers(clock=self.clock)
        self.passes: list[tuple[Pass, int]] = []
        self.open_until: float | None = None
        self.probe_until = float("-inf")
        self.turn = 0
        self.window: list[bool] = []  # of the ordinary calls since the window's first failure: whether each succeeded
        self.window_began = float("-inf")

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 4.0, 5.0, 9.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def somebody_enters(self) -> None:
        refused = self.open_until is not None and self.clock.now < max(self.open_until, self.probe_until)
        if refused:
            assert _retry_after(self.breakers) >= 1
            return
        leave = self.breakers.enter(KEY, RULE)
        assert leave.is_probe == (self.open_until is not None)
        if leave.is_probe:
            self.turn += 1
            self.probe_until = self.clock.now + 5
        self.passes.append((leave, self.turn))

    @rule(data=st.data(), how=st.sampled_from(["succeeded", "failed", "left"]))
    def somebody_ends(self, data: st.DataObject, how: str) -> None:
        if not self.passes:
            return
        leave, turn = self.passes.pop(data.draw(st.integers(0, len(self.passes) - 1)))
        getattr(leave, how)()
        if turn != self.turn:
            return
        if leave.is_probe:
            self.probe_until = float("-inf")
        if how == "left":
            return
        if leave.is_probe:
            self._moved(None if how == "succeeded" else self.clock.now + 5)
        elif how == "failed":
            if self.window_began + 10 <= self.clock.now:
                self.window, self.window_began = [], self.clock.now
            self.window.append(False)
            if self.window.count(False) >= 3 and self.window.count(False) >= self.window.count(True):
                self._moved(self.clock.now + 5)
        elif self.window:
            self.window.append(True)

    def _moved(self, open_until: float | None) -> None:
        self.turn += 1
        self.open_until, self.window, self.window_began = open_until, [], float("-inf")

    @invariant()
    def it_says_what_it_is(self) -> None:
        expected = "closed"
        if self.open_until is not None:
            expected = "open" if self.clock.now < self.open_until else "half_open"
        assert self.breakers.states().get(KEY, "closed") == expected

    @invariant()
    def there_is_one_probe_at_most(self) -> None:
        assert sum(one.is_probe and turn == self.turn for one, turn in self.passes) <= 1


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
