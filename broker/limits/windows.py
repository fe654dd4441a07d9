"""What was called lately, counted in this process's memory: an exact sliding window and a fixed one, as pure values."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

MAX_REQUESTS = 100_000


@dataclass(frozen=True, slots=True)
class Rate:
    """At most ``max_requests`` (1 to 100,000) in ``window_seconds`` (above 0, at most a day); ``ValueError`` otherwise.

    ``sliding``: in no stretch of that length are there more. ``fixed``: a window begins with the first call after the last
    one ended, so up to twice as many can come in a stretch that lies over a border.
    """

    max_requests: int
    window_seconds: float
    strategy: Literal["sliding", "fixed"] = "sliding"

    def __post_init__(self) -> None:
        """Refuse what could never pass a call, or would need too much memory."""
        if not 1 <= self.max_requests <= MAX_REQUESTS or not 0 < self.window_seconds <= 86_400:
            raise ValueError("a rate takes 1 to 100,000 requests in at most a day")
        if self.strategy not in {"sliding", "fixed"}:
            raise ValueError("a strategy is sliding or fixed")


def rate_per_second(per_second: float) -> Rate | None:
    """Return the rate of ``per_second`` calls: 0 is none, else 0.01 to 10,000 (``ValueError`` beyond). Pure.

    From 1 on it is a whole number of calls in 1 to 10 whole seconds, the fewest that come within 5 % (2.5 is 5 in 2 s), since
    shared windows are whole seconds; below 1 it is one call in as long as it takes.
    """
    if per_second == 0:
        return None
    if not 0.01 <= per_second <= 10_000:
        raise ValueError("a rate takes 0.01 to 10,000 calls in a second")
    if per_second < 1:
        return Rate(1, 1 / per_second)
    share = Fraction(per_second).limit_denominator(10)
    return Rate(share.numerator, share.denominator)


class SlidingWindow:
    """The times of the last ``max_requests`` calls in a ring: eight bytes each, and one comparison a call."""

    __slots__ = ("_next", "_size", "_times", "_window", "newest_at")

    def __init__(self, rate: Rate) -> None:
        """Start with no calls; memory grows with what is used, up to ``max_requests`` times."""
        self._times = array("d")
        self._next = 0  # where the oldest time stands once the ring is full
        self._size, self._window = rate.max_requests, rate.window_seconds
        self.newest_at = 0.0

    def wait_seconds(self, now: float) -> float:
        """Return how long until one more call fits: 0.0 for now. Changes nothing."""
        if len(self._times) < self._size:
            return 0.0
        # compared as a sum: what is said here as a moment has to be over at exactly that moment
        ends_at = self._times[self._next] + self._window
        return ends_at - now if ends_at > now else 0.0

    def note(self, now: float) -> None:
        """Count a call, also one over the rate (it was allowed elsewhere): the oldest is forgotten for it."""
        self.newest_at = now
        if len(self._times) < self._size:
            self._times.append(now)
            return
        self._times[self._next] = now
        self._next = (self._next + 1) % self._size


class FixedWindow:
    """The begin of the current window and how many calls it has."""

    __slots__ = ("_began_at", "_count", "_size", "_window", "newest_at")

    def __init__(self, rate: Rate) -> None:
        """Start without a window: the first call begins one."""
        self._began_at, self._count = float("-inf"), 0
        self._size, self._window = rate.max_requests, rate.window_seconds
        self.newest_at = 0.0

    def wait_seconds(self, now: float) -> float:
        """Return how long until one more call fits: 0.0 for now. Changes nothing."""
        ends_at = self._began_at + self._window
        return ends_at - now if self._count >= self._size and ends_at > now else 0.0

    def note(self, now: float) -> None:
        """Count a call, also one over the rate (it was allowed elsewhere)."""
        self.newest_at = now
        if self._began_at + self._window <= now:
            self._began_at, self._count = now, 0
        self._count += 1


Window = SlidingWindow | FixedWindow


def window_of(rate: Rate) -> Window:
    """Return an empty window for ``rate``."""
    return SlidingWindow(rate) if rate.strategy == "sliding" else FixedWindow(rate)
