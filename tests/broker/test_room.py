"""Rooms: how many may be under way, what one caller may have of that, bursts, and who only waits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Overloaded
from broker.limits import Room, waiting_elsewhere


class Clock:
    """Seconds that a test moves on."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


@contextlib.contextmanager
def request(room: Room, caller: str) -> Iterator[None]:
    """Be a request of the caller for the length of a block."""
    room.enter()
    try:
        with room.place(caller):
            yield
    finally:
        room.leave()


def held(stack: contextlib.ExitStack, room: Room, caller: str, most: int = 1000) -> int:
    """Begin requests of a caller until one is refused; return how many are under way then."""
    for count in range(most):
        try:
            stack.enter_context(request(room, caller))
        except Overloaded:
            return count
    return most


def test_one_caller_alone_gets_two_thirds_and_each_newcomer_finds_a_place() -> None:
    room = Room(300, 60, burst_seconds=0)
    with contextlib.ExitStack() as stack:
        assert held(stack, room, "noisy") == 40
        assert [held(stack, room, f"quiet {number}", 3) for number in range(5)] == [3] * 5
        assert room.busy == 55
    assert (room.inside, room.busy) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=300))
def test_whatever_comes_and_goes_a_room_is_never_over_full_and_never_closed_to_a_newcomer(
    steps: list[tuple[str, bool]],
) -> None:
    room = Room(1000, 12, burst_seconds=0)
    under_way: dict[str, list[contextlib.ExitStack]] = {caller: [] for caller in "abcdef"}
    for caller, comes in steps:
        if comes:
            one = contextlib.ExitStack()
            with contextlib.suppress(Overloaded):
                one.enter_context(request(room, caller))
                under_way[caller].append(one)
        elif under_way[caller]:
            under_way[caller].pop().close()
        assert room.busy == room.inside == sum(map(len, under_way.values())) <= 12
        if room.busy < 12:
            with request(room, "newcomer"):
                pass


def test_a_refusal_says_when_to_come_again() -> None:
    room = Room(1)
    with contextlib.ExitStack() as stack:
        room.enter()
        with pytest.raises(Overloaded) as refused:
            room.enter()
        stack.callback(room.leave)
        assert refused.value.headers["Retry-After"] in {"2", "3", "4"}
    assert room.inside == 0


def test_a_burst_is_let_in_and_what_lasts_is_not() -> None:
    clock = Clock()
    room = Room(1000, 10, burst_seconds=3.0, monotonic=clock)
    with contextlib.ExitStack() as stack:
        assert held(stack, room, "a", 100) == 100
        clock.at = 2.9
        assert held(stack, room, "a", 1) == 1
        clock.at = 3.0
        assert held(stack, room, "a", 1) == 0
        clock.at = 5.9
        assert held(stack, room, "a", 1) == 0
    clock.at = 8.8
    with contextlib.ExitStack() as stack:
        assert held(stack, room, "a", 100) < 10
    clock.at = 11.8
    with contextlib.ExitStack() as stack:
        assert held(stack, room, "a", 100) == 100


def test_who_waits_elsewhere_is_not_busy_but_inside() -> None:
    room = Room(9, 3, burst_seconds=0)
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(request(room, "a"))
            stack.enter_context(waiting_elsewhere())
            with waiting_elsewhere():
                assert room.busy == 0
        assert room.inside == 6
        assert held(stack, room, "a", 1) == 0
        with request(room, "b"):
            assert room.busy == 1
    assert (room.inside, room.busy) == (0, 0)


def test_nothing_is_counted_for_who_waits_after_its_request_or_without_one() -> None:
    room = Room(3, 3)
    with waiting_elsewhere():
        pass
    with contextlib.ExitStack() as later:
        with request(room, "a"):
            later.enter_context(waiting_elsewhere())
            assert room.busy == 0
        assert room.busy == 0
    with waiting_elsewhere():
        assert room.busy == 0
