"""When a delivery is tried again, and when it or its subscriber is given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.webhooks.backoff import (
    DELAYS_SECONDS,
    FAILING_ATTEMPTS,
    FAILING_SECONDS,
    LONGEST_SECONDS,
    Attempt,
    asked_seconds,
    in_trouble,
    is_given_up,
    judge,
    next_of,
)

STATUSES = st.integers(100, 999)
SHARES = st.floats(0, 1, exclude_max=True)
ATTEMPTS = st.integers(1, 30)
RESTS = st.none() | st.floats(allow_nan=False)


def test_the_schedule_is_the_one_that_is_promised() -> None:
    waits = [next_of(Attempt(500), attempts, random_share=0.5) for attempts in range(1, 9)]
    assert [one.delay_seconds for one in waits[:7]] == pytest.approx([5, 300, 1800, 7200, 18_000, 36_000, 36_000])
    assert [one.state for one in waits] == ["retrying"] * 7 + ["dead"]
    assert waits[7].reason == "attempts_exhausted"


@given(attempts=st.integers(1, 7), share=SHARES)
def test_a_delay_is_spread_by_a_fifth_to_both_sides(attempts: int, share: float) -> None:
    delay = next_of(Attempt(500), attempts, random_share=share).delay_seconds
    assert 0.8 * DELAYS_SECONDS[attempts - 1] <= delay <= 1.2 * DELAYS_SECONDS[attempts - 1]


@given(status=STATUSES, attempts=ATTEMPTS, share=SHARES, rest=RESTS)
def test_every_answer_leads_to_exactly_one_state(status: int, attempts: int, share: float, rest: float | None) -> None:
    then = next_of(Attempt(status, rest_seconds=rest), attempts, random_share=share)
    assert (then.state == "delivered") == (200 <= status < 300)
    assert then.disables == (status == 410)
    assert (then.reason is not None) == (then.state == "dead")
    assert then.state != "retrying" or attempts <= 7


@given(rest=RESTS, status=STATUSES, share=SHARES, attempts=st.integers(1, 7))
def test_retry_after_makes_a_pause_longer_never_shorter_and_not_over_ten_hours(
    rest: float | None, status: int, share: float, attempts: int
) -> None:
    asked = next_of(Attempt(status, rest_seconds=rest), attempts, random_share=share)
    unasked = next_of(Attempt(status), attempts, random_share=share)
    assert asked.state == unasked.state
    assert unasked.delay_seconds <= asked.delay_seconds <= max(unasked.delay_seconds, LONGEST_SECONDS)
    if status not in {429, 503}:
        assert asked == unasked


def test_retry_after_of_a_429_is_obeyed() -> None:
    assert next_of(Attempt(429, rest_seconds=120.0), 1, random_share=0.5).delay_seconds == 120.0
    assert next_of(Attempt(503, rest_seconds=1e9), 1, random_share=0.5).delay_seconds == LONGEST_SECONDS
    assert asked_seconds(Attempt(500, rest_seconds=120.0)) == 0.0


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 304, 100, 199, 404, 500])
def test_a_redirect_and_anything_else_that_is_no_2xx_is_a_failure(status: int) -> None:
    assert judge(Attempt(status)) == "retry"


def test_no_answer_is_a_failure() -> None:
    assert judge(Attempt(None, "timeout")) == "retry"


@pytest.mark.parametrize(
    ("attempt", "trouble"),
    [
        (Attempt(None, "unreachable"), True),
        (Attempt(500), True),
        (Attempt(503), True),
        (Attempt(429), True),
        (Attempt(408), True),
        (Attempt(404), False),
        (Attempt(400), False),
        (Attempt(302), False),
        (Attempt(200), False),
        (Attempt(410), False),
    ],
)
def test_only_what_shows_that_nobody_is_served_counts_against_the_subscriber(
    attempt: Attempt, *, trouble: bool
) -> None:
    assert in_trouble(attempt) is trouble


@given(seconds=st.floats(0, 1e7), attempts=st.integers(0, 100))
def test_a_subscriber_is_given_up_only_after_both_time_and_attempts(seconds: float, attempts: int) -> None:
    assert is_given_up(seconds, attempts) == (seconds >= FAILING_SECONDS and attempts >= FAILING_ATTEMPTS)
