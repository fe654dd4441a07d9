"""The pure rules of refreshing, with laws that hold for every row and every history."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import (
    BrokerError,
    NotRefreshable,
    ProviderUnavailable,
    RateLimited,
    ReauthorizationRequired,
    UpstreamInvalid,
)
from broker.refresh import (
    MOST_BACKOFF_SECONDS,
    MOST_RESENDS,
    Ask,
    Failure,
    Held,
    Kind,
    Tally,
    after_attempt,
    after_failure,
    backoff_seconds,
    decide,
    failure_of,
    refresh_ends_at,
    send_again_at,
    soft_margin_seconds,
    wait_for,
)
from broker.token_endpoint import TokenRefusal
from providers.spec import Refresh

NOW = 1_800_000_000.0
TOKEN = "the token"
SHA = hashlib.sha256(TOKEN.encode()).hexdigest()
HELD = Held(TOKEN, NOW + 3600, 3600.0, refreshable=True, refreshed_at=NOW - 60, not_before_at=None)
STRICT, GRACE, STATIC = Refresh(), Refresh(grace_seconds=30), Refresh(rotates=False)

times = st.none() | st.floats(NOW - 10_000, NOW + 10_000)
holdings = st.builds(
    Held,
    token=st.just(TOKEN),
    expires_at=times,
    lifetime_seconds=st.none() | st.floats(0, 100_000),
    refreshable=st.booleans(),
    refreshed_at=times,
    not_before_at=times,
    jitter=st.floats(0, 1, exclude_max=True),
)
asks = st.builds(
    Ask,
    min_ttl_seconds=st.floats(0, 86_400),
    not_token_sha256=st.none() | st.sampled_from([SHA, SHA.upper(), "b" * 64]),
    force=st.booleans(),
)
kinds = st.sampled_from(["not_sent", "transient", "unknown", "permanent"])
refreshes = st.sampled_from([STRICT, GRACE, STATIC])


@given(holdings, asks)
def test_a_dead_or_refused_token_is_never_served_and_nothing_is_sent_while_it_has_to_wait(held: Held, ask: Ask) -> None:
    choice, refusal = decided(held, ask)
    if choice == "renew":
        assert held.refreshable
        assert held.not_before_at is None or held.not_before_at <= NOW
    elif refusal is None:
        assert held.live(NOW)
        assert not ask.force
        assert not held.refused(ask)
    elif isinstance(refusal, RateLimited):
        assert ask.force or (held.refused(ask) and held.live(NOW))
        assert held.refreshed_at is not None
    elif isinstance(refusal, ProviderUnavailable):
        assert held.not_before_at is not None
        assert held.not_before_at > NOW
        assert int(refusal.headers["Retry-After"]) >= 1
    else:
        assert isinstance(refusal, NotRefreshable | ReauthorizationRequired)
        assert not held.refreshable


def decided(held: Held, ask: Ask) -> tuple[str | None, BrokerError | None]:
    try:
        return decide(held, ask, NOW), None
    except BrokerError as error:
        return None, error


@given(st.floats(1, 100_000), st.floats(0, 1, exclude_max=True), st.integers(0, 86_400))
def test_a_token_that_was_just_renewed_is_served_whatever_min_ttl_says(
    lifetime: float, jitter: float, min_ttl: int
) -> None:
    held = replace(HELD, expires_at=NOW + lifetime, lifetime_seconds=lifetime, refreshed_at=NOW, jitter=jitter)
    assert decide(held, Ask(min_ttl_seconds=min_ttl), NOW) == "serve"


@pytest.mark.parametrize(
    ("change", "ask", "choice"),
    [
        ({}, Ask(), "serve"),
        ({"expires_at": None}, Ask(min_ttl_seconds=86_400), "serve"),
        ({"expires_at": NOW + 200}, Ask(), "serve"),
        ({"expires_at": NOW + 90}, Ask(), "renew"),
        ({"expires_at": NOW + 200}, Ask(min_ttl_seconds=300), "renew"),
        ({}, Ask(not_token_sha256=SHA), "renew"),
        ({}, Ask(not_token_sha256="b" * 64), "serve"),
        ({}, Ask(force=True), "renew"),
        ({"expires_at": NOW + 5, "refreshable": False}, Ask(), "serve"),
        ({"expires_at": NOW + 5, "not_before_at": NOW + 1}, Ask(), "stale"),
        ({"expires_at": NOW + 5, "not_before_at": NOW - 1}, Ask(), "renew"),
        ({"has_token": False}, Ask(), "renew"),
        ({"has_token": False, "expires_at": None}, Ask(), "renew"),
    ],
)
def test_decide(change: dict[str, float | None], ask: Ask, choice: str) -> None:
    assert decide(replace(HELD, **change), ask, NOW) == choice  # type: ignore[arg-type] # names and kinds fit


def test_a_token_that_is_not_there_is_never_served() -> None:
    missing = replace(HELD, has_token=False)
    with pytest.raises(ProviderUnavailable):
        decide(replace(missing, not_before_at=NOW + 1), Ask(), NOW)
    with pytest.raises(ReauthorizationRequired):
        decide(replace(missing, refreshable=False), Ask(), NOW)
    with pytest.raises(ProviderUnavailable):
        after_failure(missing, Ask(), NOW, ProviderUnavailable())


def test_force_says_when_it_may_be_used_again() -> None:
    with pytest.raises(RateLimited) as refused:
        decide(replace(HELD, refreshed_at=NOW - 10), Ask(force=True), NOW)
    assert refused.value.headers == {"Retry-After": "21"}


def test_a_token_that_is_said_to_be_refused_right_after_it_came_has_to_wait() -> None:
    fresh = replace(HELD, refreshed_at=NOW - 2)
    with pytest.raises(RateLimited) as refused:
        decide(fresh, Ask(not_token_sha256=SHA), NOW)
    assert refused.value.headers == {"Retry-After": "4"}
    assert decide(fresh, Ask(not_token_sha256="b" * 64), NOW) == "serve", "who names an older token gets this one"
    assert decide(replace(fresh, expires_at=NOW - 1), Ask(not_token_sha256=SHA), NOW) == "renew", (
        "a dead one does not wait"
    )
    assert decide(replace(fresh, refreshed_at=NOW - 5), Ask(not_token_sha256=SHA), NOW) == "renew"


def test_a_demand_without_a_refresh_token_is_not_refreshable_and_a_dead_token_needs_consent() -> None:
    fixed = replace(HELD, refreshable=False)
    with pytest.raises(NotRefreshable):
        decide(fixed, Ask(force=True), NOW)
    with pytest.raises(ReauthorizationRequired):
        decide(replace(fixed, expires_at=NOW), Ask(), NOW)


@pytest.mark.parametrize(
    ("lifetime", "least", "most"), [(None, 96, 144), (3600, 96, 144), (300, 24, 36), (10, 0.8, 1.2)]
)
@given(st.floats(0, 1, exclude_max=True))
def test_the_soft_margin_is_a_tenth_of_a_life_and_spread(
    lifetime: float | None, least: float, most: float, jitter: float
) -> None:
    margin = soft_margin_seconds(replace(HELD, lifetime_seconds=lifetime, jitter=jitter))
    assert least - 0.001 <= margin <= most + 0.001


def test_after_a_failure_a_live_token_is_served_unless_a_new_one_was_demanded() -> None:
    failure = UpstreamInvalid()
    assert after_failure(HELD, Ask(), NOW, failure) == "stale"
    for held, ask in [
        (replace(HELD, expires_at=NOW), Ask()),
        (HELD, Ask(force=True)),
        (HELD, Ask(not_token_sha256=SHA)),
    ]:
        with pytest.raises(UpstreamInvalid):
            after_failure(held, ask, NOW, failure)


# --- after an attempt -----------------------------------------------------------------------------------------------------


@given(refreshes, st.lists(st.tuples(kinds, st.floats(0, 1), st.floats(0, 5000)), max_size=30), times)
def test_law_of_resending(refresh: Refresh, history: list[tuple[Kind, float, float]], expires_at: float | None) -> None:
    """Whatever happens in whatever order: at most 3 resends for who rotates, waits are bounded, a loss has a reason."""
    tally, now = Tally(), NOW
    for kind, share, later in history:
        now = max(now + later, tally.not_before_at or 0)
        verdict = after_attempt(refresh, Failure(kind, kind), tally, expires_at=expires_at, now=now, random_share=share)
        tally = verdict.tally
        if verdict.lost:
            assert kind == "permanent" or (kind == "unknown" and refresh.rotates)
            assert verdict.reason == ("refresh_outcome_unknown" if tally.unknown_outcomes else "permanent")
            assert kind != "permanent" or tally.refusals == 2  # the provider said it twice
            return
        assert verdict.ask_again == (kind == "permanent")
        assert tally.not_before_at is not None
        longest = max(now + 900, expires_at or 0)
        assert now <= tally.not_before_at <= longest
        if refresh.rotates:
            assert tally.unknown_outcomes <= MOST_RESENDS
        if kind == "unknown" and refresh == STRICT and expires_at is not None:
            assert tally.not_before_at >= expires_at


def test_a_failure_that_did_not_reach_the_provider_never_counts_as_unknown() -> None:
    tally = Tally()
    for _ in range(50):
        verdict = after_attempt(
            STRICT, Failure("not_sent", "not_sent"), tally, expires_at=None, now=NOW, random_share=0.5
        )
        tally = replace(verdict.tally, not_before_at=None)
    assert (verdict.lost, tally.unknown_outcomes, tally.failures) == (False, 0, 50)


def test_retry_after_is_the_least_wait() -> None:
    failure = Failure("transient", "temporarily_unavailable", retry_after_seconds=120)
    verdict = after_attempt(STRICT, failure, Tally(), expires_at=None, now=NOW, random_share=0.5)
    assert verdict.tally.not_before_at is not None
    assert NOW + 120 < verdict.tally.not_before_at <= NOW + 121


@pytest.mark.parametrize(
    ("refresh", "waits"),
    [(STRICT, [100, 100, 900, None]), (GRACE, [0, 15, 900, None]), (STATIC, [0, 0, 0, 0])],
)
def test_when_the_same_token_is_sent_again(refresh: Refresh, waits: list[float | None]) -> None:
    for number, wait in enumerate(waits, start=1):
        again = send_again_at(refresh, unknown_outcomes=number, expires_at=NOW + 100, now=NOW)
        assert again == (None if wait is None else NOW + wait)
    assert send_again_at(STRICT, unknown_outcomes=1, expires_at=None, now=NOW) == NOW


def test_a_provider_that_does_not_rotate_is_asked_again_at_once_and_then_ever_more_seldom() -> None:
    failure = Failure("unknown", "outcome_unknown")
    first = after_attempt(STATIC, failure, Tally(), expires_at=None, now=NOW, random_share=1.0)
    later = after_attempt(STATIC, failure, Tally(9, 9), expires_at=None, now=NOW, random_share=1.0)
    assert (first.tally.not_before_at, later.tally.not_before_at) == (NOW, NOW + 300)


@pytest.mark.parametrize(
    ("refresh", "refusal", "status", "kind"),
    [
        (STRICT, TokenRefusal("permanent", "invalid_grant"), 400, "permanent"),
        (STRICT, TokenRefusal("invalid", "invalid_answer"), 200, "unknown"),
        (STATIC, TokenRefusal("invalid", "invalid_answer"), 200, "transient"),
        (STRICT, TokenRefusal("invalid", "invalid_answer"), 400, "transient"),
        (STRICT, TokenRefusal("invalid", "unknown_error"), 200, "transient"),
        (STRICT, TokenRefusal("client_refused", "invalid_client"), 401, "transient"),
        (STRICT, TokenRefusal("transient", "temporarily_unavailable", 7.0), 503, "transient"),
    ],
)
def test_what_an_answer_without_a_token_means(refresh: Refresh, refusal: TokenRefusal, status: int, kind: Kind) -> None:
    failure = failure_of(refresh, refusal, status=status)
    assert (failure.kind, failure.reason) == (kind, refusal.error)
    assert failure.retry_after_seconds == refusal.retry_after_seconds


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_backoff_is_bounded_on_both_sides(failures: int, share: float) -> None:
    assert 0.2 <= backoff_seconds(failures, share) <= MOST_BACKOFF_SECONDS


def test_backoff_doubles() -> None:
    assert [backoff_seconds(failures, 1.0) for failures in (1, 2, 3, 9, 10)] == [1, 2, 4, 256, 300]


def test_the_wait_is_told_in_whole_seconds() -> None:
    assert wait_for(NOW + 2.5, NOW).headers == {"Retry-After": "3"}
    assert wait_for(NOW - 9, NOW).headers == {"Retry-After": "1"}


def test_a_grant_is_given_up_only_when_the_provider_said_so_twice() -> None:
    first = after_attempt(
        STRICT, Failure("permanent", "invalid_grant"), Tally(), expires_at=None, now=NOW, random_share=0.5
    )
    assert (first.lost, first.ask_again, first.tally.refusals) == (False, True, 1)
    between = after_attempt(
        STRICT, Failure("transient", "temporarily_unavailable"), first.tally, expires_at=None, now=NOW, random_share=0.5
    )
    assert (between.lost, between.tally.refusals) == (False, 1)
    second = after_attempt(
        STRICT, Failure("permanent", "invalid_grant"), between.tally, expires_at=None, now=NOW, random_share=0.5
    )
    assert (second.lost, second.reason) == (True, "invalid_grant")


FIXED = Refresh(lifetime_seconds=100, sliding=False)
SLIDING = Refresh(lifetime_seconds=100)


@pytest.mark.parametrize(
    ("refresh", "told_at", "before", "ends_at"),
    [
        (STRICT, None, None, None),
        (STRICT, None, NOW + 5, NOW + 5),
        (STRICT, NOW + 7, NOW + 5, NOW + 7),
        (SLIDING, None, None, NOW + 100),
        (SLIDING, None, NOW + 5, NOW + 100),
        (FIXED, None, None, NOW + 100),
        (FIXED, None, NOW + 5, NOW + 5),
        (FIXED, NOW + 7, NOW + 5, NOW + 7),
    ],
)
def test_a_refresh_tokens_end_is_told_or_slides_or_stands(
    refresh: Refresh, told_at: float | None, before: float | None, ends_at: float | None
) -> None:
    assert refresh_ends_at(refresh, told_at, received_at=NOW, before=before) == ends_at


def test_where_a_refresh_ends_the_access_token_too_there_is_nothing_to_wait_for() -> None:
    both = Refresh(ends_access=True)
    assert send_again_at(both, unknown_outcomes=1, expires_at=NOW + 3600, now=NOW) == NOW
    assert send_again_at(STRICT, unknown_outcomes=1, expires_at=NOW + 3600, now=NOW) == NOW + 3600
