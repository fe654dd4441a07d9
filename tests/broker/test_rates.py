"""Rates: what a window allows, who waits and for how long, and that no caller starves another."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import RateLimited
from broker.limits import Rate, Rates, rate_per_second
from broker.limits.lines import MAX_WAITING, Line, Ticket
from broker.limits.rates import MAX_KEYS
from broker.limits.windows import FixedWindow, SlidingWindow


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def _retry_after(rates: Rates, key: str, rate: Rate | None, *, wait_seconds: float = 0.0) -> int:
    with pytest.raises(RateLimited) as caught:
        await rates.take(key, rate, caller="one", wait_seconds=wait_seconds)
    return int(caught.value.headers["Retry-After"])


def _waiting(rates: Rates) -> int:
    return sum(len(place.line) for place in rates._places.values())


# --- rates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_second", "rate"),
    [
        (0, None),
        (0.01, Rate(1, 100)),
        (0.4, Rate(1, 2.5)),
        (1, Rate(1, 1)),
        (2, Rate(2, 1)),
        (2.5, Rate(5, 2)),
        (3.3, Rate(33, 10)),
        (9999.9, Rate(99_999, 10)),
        (10_000, Rate(10_000, 1)),
    ],
)
def test_calls_in_a_second_are_a_rate(per_second: float, rate: Rate | None) -> None:
    assert rate_per_second(per_second) == rate


@given(st.floats(0.01, 10_000))
def test_whatever_the_settings_take_is_a_rate_that_is_nearly_as_much(per_second: float) -> None:
    rate = rate_per_second(per_second)
    assert rate is not None
    assert rate.max_requests / rate.window_seconds == pytest.approx(per_second, rel=0.05)
    assert per_second < 1 or rate.window_seconds in range(1, 11)


@pytest.mark.parametrize("per_second", [-1, 0.000001, 10_001, float("nan"), float("inf")])
def test_what_is_too_little_or_too_much_to_count_is_refused(per_second: float) -> None:
    with pytest.raises(ValueError, match="a rate takes"):
        rate_per_second(per_second)


# --- windows --------------------------------------------------------------------------------------------------------------

STEPS = st.lists(st.floats(0, 3, allow_nan=False, width=32), max_size=60)


@settings(deadline=None)
@given(st.integers(1, 6), st.floats(0.5, 4, width=32), STEPS)
def test_no_stretch_of_a_sliding_window_holds_more_calls_than_the_rate(
    size: int, seconds: float, steps: list[float]
) -> None:
    window, now = SlidingWindow(Rate(size, seconds)), 100.0
    allowed: list[float] = []
    for step in steps:
        now += step
        wait = window.wait_seconds(now)
        in_window = [at for at in allowed if at + seconds > now]
        assert (wait <= 0) == (len(in_window) < size)
        if wait <= 0:
            window.note(now)
            allowed.append(now)
        else:
            assert now + wait == pytest.approx(in_window[-size] + seconds)


@settings(deadline=None)
@given(st.integers(1, 6), st.floats(0.5, 4, width=32), STEPS)
def test_a_fixed_window_begins_with_the_first_call_and_holds_no_more_than_the_rate(
    size: int, seconds: float, steps: list[float]
) -> None:
    window, now, windows = FixedWindow(Rate(size, seconds, "fixed")), 100.0, [(float("-inf"), 0)]
    for step in steps:
        now += step
        began_at, count = windows[-1]
        if began_at + seconds <= now:
            began_at, count = now, 0
            windows.append((began_at, 0))
        wait = window.wait_seconds(now)
        assert (wait <= 0) == (count < size)
        if wait <= 0:
            window.note(now)
            windows[-1] = (began_at, count + 1)
        else:
            assert now + wait == pytest.approx(began_at + seconds)


@pytest.mark.parametrize(
    "wrong", [(0, 1.0), (100_001, 1.0), (1, 0.0), (1, 86_401.0), (1, float("nan")), (1, 1.0, "odd")]
)
def test_a_rate_that_makes_no_sense_is_refused(wrong: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match=r"a rate takes|a strategy is"):
        Rate(*wrong)


# --- at once or not at all --------------------------------------------------------------------------------------------------


async def test_a_call_over_the_rate_is_told_when_to_come_again() -> None:
    clock, rate = Clock(), Rate(2, 10)
    rates = Rates(clock=clock)
    await rates.take("k", rate, caller="one", wait_seconds=0)
    clock.now += 4
    await rates.take("k", rate, caller="two", wait_seconds=0)
    assert await _retry_after(rates, "k", rate) == 6
    await rates.take("other", rate, caller="one", wait_seconds=0)
    clock.now += 6
    await rates.take("k", rate, caller="one", wait_seconds=0)
    assert await _retry_after(rates, "k", rate) == 4


async def test_a_refused_call_is_not_counted() -> None:
    clock, rate = Clock(), Rate(1, 10)
    rates = Rates(clock=clock)
    await rates.take("k", rate, caller="one", wait_seconds=0)
    clock.now += 9
    assert await _retry_after(rates, "k", rate) == 1
    clock.now += 1
    await rates.take("k", rate, caller="one", wait_seconds=0)


async def test_a_changed_rate_counts_anew() -> None:
    rates = Rates(clock=Clock())
    await rates.take("k", Rate(1, 10), caller="one", wait_seconds=0)
    await rates.take("k", Rate(2, 10), caller="one", wait_seconds=0)
    await rates.take("k", Rate(2, 10), caller="one", wait_seconds=0)
    assert await _retry_after(rates, "k", Rate(2, 10)) == 10


async def test_keys_are_bounded_and_a_limit_in_force_is_not_the_first_to_be_forgotten() -> None:
    clock, rate = Clock(), Rate(1, 10)
    rates = Rates(clock=clock)
    for number in range(MAX_KEYS // 2):
        await rates.take(f"old{number}", rate, caller="one", wait_seconds=0)
    clock.now += 10
    for number in range(MAX_KEYS // 2 + 1):
        await rates.take(f"new{number}", rate, caller="one", wait_seconds=0)
    assert len(rates._places) <= MAX_KEYS // 2 + 1
    assert await _retry_after(rates, "new0", rate) == 10
    for number in range(MAX_KEYS):
        await rates.take(f"more{number}", rate, caller="one", wait_seconds=0)
    assert len(rates._places) <= MAX_KEYS
    assert await _retry_after(rates, f"more{MAX_KEYS - 1}", rate) == 10


# --- pauses -----------------------------------------------------------------------------------------------------------------


async def test_a_pause_holds_back_every_later_call_of_its_key_and_no_longer_than_a_minute() -> None:
    clock = Clock()
    rates = Rates(clock=clock)
    rates.pause("k", 3600)
    assert await _retry_after(rates, "k", Rate(5, 10)) == 60
    assert await _retry_after(rates, "k", None) == 60
    await rates.take("other", None, caller="one", wait_seconds=0)
    rates.pause("k", 1)  # the longer one holds
    clock.now += 59
    assert await _retry_after(rates, "k", None) == 1
    clock.now += 1
    await rates.take("k", Rate(5, 10), caller="one", wait_seconds=0)


@pytest.mark.parametrize("seconds", [0.0, -5.0, float("nan")])
async def test_a_pause_of_no_length_is_none(seconds: float) -> None:
    rates = Rates()
    rates.pause("k", seconds)
    await rates.take("k", None, caller="one", wait_seconds=0)
    assert _waiting(rates) == 0


async def test_a_call_waits_for_the_end_of_a_pause() -> None:
    rates = Rates()
    rates.pause("k", 0.15)
    began = time.monotonic()
    await rates.take("k", None, caller="one", wait_seconds=1)
    assert 0.14 < time.monotonic() - began < 1
    await rates.aclose()


async def test_a_pause_holds_back_those_who_wait_already() -> None:
    rates, rate = Rates(), Rate(1, 0.1)
    await rates.take("k", rate, caller="one", wait_seconds=0)
    began = time.monotonic()
    waiting = asyncio.create_task(rates.take("k", rate, caller="one", wait_seconds=2))
    await asyncio.sleep(0)
    rates.pause("k", 0.3)
    await waiting
    assert time.monotonic() - began > 0.29


# --- the line ---------------------------------------------------------------------------------------------------------------


async def test_a_call_that_may_wait_goes_when_a_place_is_free() -> None:
    rates, rate = Rates(), Rate(1, 0.2)
    await rates.take("k", rate, caller="one", wait_seconds=0)
    began = time.monotonic()
    await rates.take("k", rate, caller="one", wait_seconds=1)
    assert 0.19 < time.monotonic() - began < 0.9
    assert _waiting(rates) == 0


async def _order(rates: Rates, rate: Rate, callers: list[str]) -> list[str]:
    """Let these wait in this order; return the order in which they went."""
    went: list[str] = []

    async def wait(name: str) -> None:
        await rates.take("k", rate, caller=name[0], wait_seconds=30)
        went.append(name)

    tasks = []
    for name in callers:
        tasks.append(asyncio.create_task(wait(name)))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    return went


async def test_callers_take_turns_and_each_keeps_its_own_order() -> None:
    rates, rate = Rates(), Rate(1, 0.02)
    await rates.take("k", rate, caller="x", wait_seconds=0)
    noisy = [f"a{number}" for number in range(6)]
    assert await _order(rates, rate, [*noisy, "b0", "b1", "c0"]) == [
        "a0",
        "b0",
        "c0",
        "a1",
        "b1",
        "a2",
        "a3",
        "a4",
        "a5",
    ]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=20))
def test_whoever_waits_is_overtaken_by_each_other_caller_at_most_once_a_turn(callers: list[str]) -> None:
    async def run() -> list[str]:
        rates, rate = Rates(), Rate(1, 0.001)
        await rates.take("k", rate, caller="x", wait_seconds=0)
        return await _order(rates, rate, [f"{name}{number}" for number, name in enumerate(callers)])

    went = asyncio.run(run())
    assert sorted(went) == sorted(f"{name}{number}" for number, name in enumerate(callers))
    for name in set(callers):
        own = [int(one[1:]) for one in went if one[0] == name]
        assert own == sorted(own)
    seen: Counter[str] = Counter()
    for one in went:  # nobody is two turns ahead of somebody who still waits
        seen[one[0]] += 1
        still = [name for name in set(callers) if seen[name] < callers.count(name)]
        assert all(seen[one[0]] - seen[name] <= 1 for name in still)


async def test_nobody_overtakes_those_who_wait() -> None:
    rates, rate = Rates(), Rate(1, 0.1)
    await rates.take("k", rate, caller="one", wait_seconds=0)
    waiting = asyncio.create_task(rates.take("k", rate, caller="one", wait_seconds=1))
    await asyncio.sleep(0)
    time.sleep(0.15)  # noqa: ASYNC251 - a place is free now, but the line has not been served yet
    with pytest.raises(RateLimited):
        await rates.take("k", rate, caller="two", wait_seconds=0.0)
    await waiting


async def test_the_line_is_bounded_and_who_does_not_fit_is_refused_at_once() -> None:
    rates, rate = Rates(), Rate(1, 5)
    await rates.take("k", rate, caller="one", wait_seconds=0)
    tasks = [
        asyncio.create_task(rates.take("k", rate, caller=f"c{number}", wait_seconds=1000))
        for number in range(MAX_WAITING)
    ]
    await asyncio.sleep(0)
    assert _waiting(rates) == MAX_WAITING
    began = time.monotonic()
    assert await _retry_after(rates, "k", rate, wait_seconds=1000) >= 5
    assert time.monotonic() - began < 0.5
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert _waiting(rates) == 0
    await rates.aclose()


async def test_a_flooder_gives_way_to_a_polite_caller() -> None:
    rates, rate = Rates(), Rate(1, 0.05)
    gone: Counter[str] = Counter()

    async def flood() -> None:
        while True:
            try:
                await rates.take("k", rate, caller="flooder", wait_seconds=10)
                gone["in"] += 1
            except RateLimited:
                gone["refused"] += 1
                await asyncio.sleep(0.01)

    flooding = [asyncio.create_task(flood()) for _ in range(300)]
    await asyncio.sleep(0.1)
    assert _waiting(rates) == MAX_WAITING
    for _ in range(10):
        began = time.monotonic()
        await rates.take("k", rate, caller="polite", wait_seconds=10)
        assert time.monotonic() - began < 1.0, "the second turn is his: 0.1 s on a machine with nothing else to do"
    assert gone["refused"] > 0
    for task in flooding:
        task.cancel()
    await asyncio.gather(*flooding, return_exceptions=True)
    assert _waiting(rates) == 0
    await rates.aclose()


async def test_whoever_is_pushed_out_of_a_full_line_is_refused_at_once_and_is_the_newest() -> None:
    rates, rate = Rates(), Rate(1, 100)
    await rates.take("k", rate, caller="one", wait_seconds=0)
    own = [asyncio.create_task(rates.take("k", rate, caller="one", wait_seconds=100_000)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    other = asyncio.create_task(rates.take("k", rate, caller="two", wait_seconds=1000))
    with pytest.raises(RateLimited) as caught:
        await asyncio.wait_for(own[-1], 1)
    assert int(caught.value.headers["Retry-After"]) in {99, 100}
    assert not any(task.done() for task in (*own[:-1], other))
    assert _waiting(rates) == MAX_WAITING
    for task in (*own, other):
        task.cancel()
    await asyncio.gather(*own, other, return_exceptions=True)
    await rates.aclose()


STEPS_OF_A_LINE = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("abcd"), st.integers(1, 120)),  # so many of one caller come
        st.tuples(st.just("served"), st.integers(1, 5)),
        st.tuples(st.just("polite"), st.just(1)),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(STEPS_OF_A_LINE)
def test_in_any_mix_a_caller_with_few_waiting_has_its_turn_within_one_round(steps: list[tuple[str, int]]) -> None:
    async def run() -> None:
        line, ticket, turns = Line(), None, 0
        for what, count in steps:
            for _ in range(count):
                if what == "served":
                    line.call_next()
                    turns += ticket is not None and not ticket.done()
                elif what != "polite":
                    line.join(what)
                elif ticket is None or ticket.done():
                    ticket, turns = line.join("polite"), 0
                    assert ticket is not None, "there is always room for one"
                assert len(line) <= MAX_WAITING
                assert turns <= 4, "each other caller has gone once"
                assert ticket is None or not ticket.done() or ticket.result(), "he was pushed out"

    asyncio.run(run())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 120)), min_size=1, max_size=20))
def test_nobody_is_pushed_out_of_an_even_share_of_the_line(arrivals: list[tuple[str, int]]) -> None:
    async def run() -> None:
        line, came = Line(), dict.fromkeys("abcde", 0)
        tickets: list[tuple[str, Ticket]] = []
        for name, count in arrivals:
            for _ in range(count):
                came[name] += 1
                ticket = line.join(name)
                tickets += [(name, ticket)] if ticket is not None else []
        wait = Counter(name for name, ticket in tickets if not ticket.done())
        assert sum(wait.values()) == len(line) == min(MAX_WAITING, sum(came.values()))
        callers = sum(count > 0 for count in came.values())
        for name, count in came.items():
            assert wait[name] >= min(count, MAX_WAITING // callers - 1)

    asyncio.run(run())


async def test_a_wait_that_would_be_too_long_is_refused_at_once() -> None:
    rates, rate = Rates(), Rate(1, 100)
    await rates.take("k", rate, caller="one", wait_seconds=0)
    began = time.monotonic()
    assert await _retry_after(rates, "k", rate, wait_seconds=5) in {99, 100}
    assert time.monotonic() - began < 0.5


async def test_a_wait_that_turns_out_too_long_ends_in_time() -> None:
    rates, rate = Rates(), Rate(1, 0.3)
    await rates.take("k", rate, caller="one", wait_seconds=0)
    first = asyncio.create_task(rates.take("k", rate, caller="one", wait_seconds=2))
    await asyncio.sleep(0)
    began = time.monotonic()
    assert await _retry_after(rates, "k", rate, wait_seconds=0.4) == 1  # two others' places away: 0.6 s
    assert time.monotonic() - began < 0.55
    await first


async def test_who_is_cancelled_leaves_the_line_to_the_others() -> None:
    rates, rate = Rates(), Rate(1, 0.1)
    await rates.take("k", rate, caller="one", wait_seconds=0)
    gone = asyncio.create_task(rates.take("k", rate, caller="one", wait_seconds=5))
    stays = asyncio.create_task(rates.take("k", rate, caller="one", wait_seconds=5))
    await asyncio.sleep(0)
    gone.cancel()
    began = time.monotonic()
    await stays
    assert time.monotonic() - began < 0.19  # the place of the one who left
    assert gone.cancelled()
    assert _waiting(rates) == 0


# --- Redis that is not there ------------------------------------------------------------------------------------------------


async def test_without_redis_each_process_counts_for_itself_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        failures: list[int] = []
        rates = Rates(f"redis://:CANARY-9f3e@127.0.0.1:{port}/0", on_store_failure=lambda: failures.append(1))
        for _ in range(2):
            await rates.take("k", Rate(2, 100), caller="one", wait_seconds=0)
        assert await _retry_after(rates, "k", Rate(2, 100)) in {99, 100}
        assert len(failures) == 1, "a Redis that is away is left alone for a while"
        assert "CANARY" not in caplog.text
        await rates.aclose()


async def test_a_redis_that_hangs_costs_one_caller_a_moment() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes the connection, nobody answers
        rates, began = Rates(f"redis://127.0.0.1:{silent.getsockname()[1]}"), time.monotonic()
        for _ in range(20):
            await rates.take("k", Rate(20, 100), caller="one", wait_seconds=0)
        assert time.monotonic() - began < 1.0
        await _retry_after(rates, "k", Rate(20, 100))
        await rates.aclose()


@pytest.mark.parametrize("url", ["redis://127.0.0.1", "redis://:secret@127.0.0.1/2", "rediss://user:secret@[::1]"])
async def test_an_address_of_redis_needs_no_port(url: str) -> None:
    rates = Rates(url)
    await rates.aclose()
    assert rates._shared is not None
    assert rates._shared._storage.bridge.options_from_uri.locations[0][1] == 6379
