"""Which proxied calls are made once more, after how long, and how many: by tables and by laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.proxy.retrying import (
    BUDGET_SHARE,
    IDEMPOTENT,
    LEAST_ATTEMPT_SECONDS,
    MOST_KEYS,
    MOST_SAVED,
    RetryBudget,
    RetryRule,
    Seen,
    Standing,
    Step,
    delay_seconds,
    is_repeatable,
    next_step,
)

RULE = RetryRule()
FIRST = Standing(attempts=1, repeatable=True, replayable=True, renewable=False, left_seconds=10.0)
UNSAFE = Standing(attempts=1, repeatable=False, replayable=True, renewable=False, left_seconds=10.0)
STREAMED = Standing(attempts=1, repeatable=True, replayable=False, renewable=True, left_seconds=10.0)
RENEWABLE = Standing(attempts=1, repeatable=False, replayable=True, renewable=True, left_seconds=10.0)
LAST = Standing(attempts=3, repeatable=True, replayable=True, renewable=False, left_seconds=10.0)
LAST_RENEWABLE = Standing(attempts=3, repeatable=True, replayable=True, renewable=True, left_seconds=10.0)
NO_TIME = Standing(attempts=1, repeatable=True, replayable=True, renewable=True, left_seconds=LEAST_ATTEMPT_SECONDS)
WITHOUT_429 = RetryRule(statuses=frozenset({503}))
WITH_500 = RetryRule(statuses=frozenset({500}))
ONCE = RetryRule(attempts=1)


@pytest.mark.parametrize(
    ("seen", "standing", "rule", "step"),
    [
        (Seen(200), FIRST, RULE, "give"),
        (Seen(404), FIRST, RULE, "give"),
        (Seen(500), FIRST, RULE, "give"),
        (Seen(500), FIRST, WITH_500, "repeat"),
        (Seen(503), FIRST, RULE, "repeat"),
        (Seen(503), FIRST, ONCE, "give"),
        (Seen(503), LAST, RULE, "give"),
        (Seen(503), UNSAFE, RULE, "give"),
        (Seen(503), STREAMED, RULE, "give"),
        (Seen(429), FIRST, RULE, "repeat"),
        (Seen(429, limited=True), UNSAFE, RULE, "give"),
        (Seen(403, limited=True), FIRST, RULE, "repeat"),
        (Seen(403, limited=True), FIRST, WITHOUT_429, "give"),
        (Seen(403), FIRST, RULE, "give"),
        (Seen(401), FIRST, RULE, "give"),
        (Seen(401), RENEWABLE, RULE, "renew"),
        (Seen(401), RENEWABLE, ONCE, "renew"),
        (Seen(401), LAST_RENEWABLE, RULE, "renew"),
        (Seen(401), STREAMED, RULE, "give"),
        (Seen(401), NO_TIME, RULE, "give"),
        (Seen(None), FIRST, RULE, "repeat"),
        (Seen(None), UNSAFE, RULE, "give"),
        (Seen(None, sent=False), UNSAFE, RULE, "repeat"),
        (Seen(None, sent=False), STREAMED, RULE, "give"),
        (Seen(None, sent=False), LAST, RULE, "give"),
    ],
)
def test_what_follows_on_an_attempt(seen: Seen, standing: Standing, rule: RetryRule, step: Step) -> None:
    assert next_step(seen, standing, rule) == step


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "POST", "PATCH", "get", "PURGE"])
def test_a_call_is_repeatable_by_its_method_or_by_its_key(method: str) -> None:
    assert is_repeatable(method, has_key=True)
    assert is_repeatable(method, has_key=False) == (method in IDEMPOTENT)


STATUSES = st.one_of(st.none(), st.integers(100, 599))
SEEN = st.builds(Seen, STATUSES, sent=st.booleans(), limited=st.booleans(), rest_seconds=st.none() | st.floats(0, 1e4))
STANDING = st.builds(Standing, st.integers(1, 12), st.booleans(), st.booleans(), st.booleans(), st.floats(-10, 100))
RULES = st.builds(
    RetryRule,
    st.integers(1, 10),
    st.booleans(),
    st.floats(0.001, 60),
    st.floats(0.001, 600),
    st.frozensets(st.integers(400, 599), max_size=10),
)


@given(SEEN, STANDING, RULES)
def test_a_call_that_may_have_been_applied_is_never_repeated_unless_that_does_no_harm(
    seen: Seen, standing: Standing, rule: RetryRule
) -> None:
    step = next_step(seen, standing, rule)
    arrived = seen.status is not None or seen.sent
    if step == "repeat":
        assert standing.repeatable or not arrived
        assert standing.attempts < rule.attempts
    if step == "renew":
        assert seen.status == 401
        assert standing.renewable
        assert standing.left_seconds > 0
    if step != "give":
        assert standing.replayable


@given(SEEN, st.integers(1, 10), RULES, st.floats(0, 1, exclude_max=True))
def test_a_pause_is_never_shorter_than_the_provider_asked_for_nor_longer_than_the_rule_says(
    seen: Seen, failed: int, rule: RetryRule, random_share: float
) -> None:
    delay = delay_seconds(seen, failed, rule, random_share=random_share)
    assert delay >= (seen.rest_seconds or 0.0)
    assert delay <= max(rule.max_delay_seconds, seen.rest_seconds or 0.0)


@given(st.integers(1, 9), RULES)
def test_the_longest_pause_grows_twofold_or_by_a_step(failed: int, rule: RetryRule) -> None:
    longest = [delay_seconds(Seen(503), count, rule, random_share=1.0) for count in (failed, failed + 1)]
    wanted = [
        rule.initial_delay_seconds * (2.0 ** (count - 1) if rule.doubles else count) for count in (failed, failed + 1)
    ]
    assert longest == pytest.approx([min(rule.max_delay_seconds, seconds) for seconds in wanted])


# --- the budget


def spent(budget: RetryBudget, key: str) -> int:
    """Spend until nothing is left; return how many retries that were."""
    count = 0
    while budget.spend(key):
        count += 1
    return count


def test_a_key_begins_with_some_retries_and_earns_one_by_five_calls() -> None:
    budget = RetryBudget()
    assert spent(budget, "a") == 20
    for _ in range(4):
        budget.earn("a")
    assert not budget.spend("a")
    for _ in range(2):  # the fifth, and one for what adding fifths up loses
        budget.earn("a")
    assert budget.spend("a")
    assert spent(budget, "b") == 20, "another key has its own"


def test_calls_without_retries_save_up_no_more_than_the_beginning() -> None:
    budget = RetryBudget()
    budget.spend("a")
    for _ in range(10_000):
        budget.earn("a")
    assert spent(budget, "a") == 20


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("ab")), max_size=300), st.integers(0, 60))
def test_retries_are_never_more_than_twenty_and_a_fifth_of_the_calls(steps: list[tuple[bool, str]], storm: int) -> None:
    budget = RetryBudget()
    calls, retries = {"a": 0, "b": 0}, {"a": 0, "b": 0}
    for is_call, key in [*([(False, "a")] * storm), *steps]:
        if is_call:
            budget.earn(key)
            calls[key] += 1
        elif budget.spend(key):
            retries[key] += 1
        for one in "ab":
            assert retries[one] <= MOST_SAVED + BUDGET_SHARE * calls[one] + 1e-9


def test_keys_are_kept_in_bounds() -> None:
    budget = RetryBudget()
    for number in range(MOST_KEYS + 100):
        assert budget.spend(f"key {number}")
        budget.earn(f"other {number}")
    assert len(budget._saved) <= MOST_KEYS


def test_a_key_that_retries_all_the_time_is_not_the_one_that_is_forgotten() -> None:
    budget = RetryBudget()
    assert spent(budget, "busy") == 20
    retries = 0
    for number in range(MOST_KEYS + 100):
        budget.spend(f"key {number}")
        budget.earn("busy")
        retries += budget.spend("busy")
    assert retries <= BUDGET_SHARE * (MOST_KEYS + 100), "an outage would begin again with twenty retries"
