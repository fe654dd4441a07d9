"""What is counted of proxied calls, as plain numbers that add up: classes, codes, sums and a histogram of durations."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# Upper bounds in milliseconds, each 19 % above the last: a duration is known to 9 %. What is longer is one more bucket.
BOUNDS_MS = tuple(0.25 * 2 ** (step / 4) for step in range(77))
ANSWERED_WELL = ("1xx", "2xx", "3xx")
CLASSES = (*ANSWERED_WELL, "4xx", "5xx", "broker", "none")
LONGEST_PATH = 200


class CallDone(NamedTuple):
    """One proxied call that is over. ``path`` is the raw text without its query; 200 characters of it are kept.

    ``status`` is the upstream's last answer (None: there was none), ``code`` our own error's when the broker answered
    itself. Neither: the caller left. ``rate_remaining`` is what the upstream said is left of its limit.
    """

    integration: str
    provider: str
    host: str
    method: str
    path: str
    connection_id: str
    caller_id: str
    request_id: str
    status: int | None
    code: str | None
    attempts: int
    upstream_seconds: float
    total_seconds: float
    bytes_out: int
    bytes_in: int
    rate_remaining: int | None = None

    @property
    def outcome(self) -> str:
        """Return its class, one of ``CLASSES``: what the caller got."""
        if self.code is not None:
            return "broker"
        return f"{self.status // 100}xx" if self.status is not None and 100 <= self.status < 600 else "none"

    @property
    def failed(self) -> bool:
        """Whether it counts as an error: anything but an upstream's answer below 400."""
        return self.outcome not in ANSWERED_WELL

    @property
    def level(self) -> str:
        """Return ``info`` for what went well, ``warning`` for a 4xx and for a caller who left, ``error`` for the rest."""
        if not self.failed:
            return "info"
        return "warning" if self.outcome in {"4xx", "none"} else "error"


class Tally:
    """Sums over calls of one integration. ``parts()`` are what a database or another tally adds up; all are whole numbers."""

    __slots__ = (
        *("bytes_in", "bytes_out", "codes", "durations", "last_at", "microseconds", "outcomes"),
        *("rate_at", "rate_remaining", "retries", "sent", "upstream_microseconds"),
    )

    def __init__(self) -> None:
        """Start at zero."""
        self.outcomes = dict.fromkeys(CLASSES, 0)
        self.codes: dict[str, int] = {}
        self.durations = [0] * (len(BOUNDS_MS) + 1)
        self.retries = self.sent = self.microseconds = self.upstream_microseconds = self.bytes_in = self.bytes_out = 0
        self.last_at = self.rate_at = 0.0
        self.rate_remaining: int | None = None

    def add(self, done: CallDone, at: float) -> None:
        """Count a call that ended at ``at`` (seconds since 1970)."""
        self.outcomes[done.outcome] += 1
        if done.code is not None:
            self.codes[done.code] = self.codes.get(done.code, 0) + 1
        self.durations[bisect_left(BOUNDS_MS, done.total_seconds * 1000)] += 1
        self.microseconds += int(done.total_seconds * 1e6)
        if done.attempts > 0:
            self.sent += 1
            self.retries += done.attempts - 1
            self.upstream_microseconds += int(done.upstream_seconds * 1e6)
        self.bytes_in += done.bytes_in
        self.bytes_out += done.bytes_out
        self.last_at = at
        if done.rate_remaining is not None:
            self.rate_remaining, self.rate_at = done.rate_remaining, at

    def parts(self) -> dict[str, int]:
        """Return what is not zero, by names that stay as they are in the database."""
        sums = {
            **self.outcomes,
            **{f"code:{code}": count for code, count in self.codes.items()},
            **{f"ms:{bucket}": count for bucket, count in enumerate(self.durations)},
            "retries": self.retries,
            "sent": self.sent,
            "us": self.microseconds,
            "upstream_us": self.upstream_microseconds,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }
        return {name: amount for name, amount in sums.items() if amount}

    def absorb(self, parts: Mapping[str, int]) -> None:
        """Add parts; a name of a later version is passed over, so that an older process can read beside it."""
        for name, amount in parts.items():
            kind, _, rest = name.partition(":")
            if kind == "code":
                self.codes[rest] = self.codes.get(rest, 0) + amount
            elif kind == "ms":
                self.durations[min(int(rest), len(BOUNDS_MS))] += amount
            elif name in self.outcomes:
                self.outcomes[name] += amount
            elif name in _SUMS:
                setattr(self, _SUMS[name], getattr(self, _SUMS[name]) + amount)

    def merge(self, other: Tally) -> None:
        """Add another tally, and what was last of the two."""
        self.absorb(other.parts())
        self.last_at = max(self.last_at, other.last_at)
        if other.rate_at >= self.rate_at and other.rate_remaining is not None:
            self.rate_at, self.rate_remaining = other.rate_at, other.rate_remaining

    @property
    def calls(self) -> int:
        """Return how many calls there were."""
        return sum(self.outcomes.values())

    @property
    def failures(self) -> int:
        """Return how many of them failed (see ``CallDone.failed``)."""
        return self.calls - sum(self.outcomes[one] for one in ANSWERED_WELL)

    @property
    def mean_upstream_ms(self) -> float | None:
        """Return how long the upstream took for its last answer, on average over the calls that were sent to it."""
        return self.upstream_microseconds / self.sent / 1000 if self.sent else None

    def weighed_ms(self) -> Iterable[tuple[float, int]]:
        """Return (duration, how many) for each bucket that has some; a duration stands for its bucket's middle."""
        return ((_middle(bucket), count) for bucket, count in enumerate(self.durations) if count)


_SUMS = {
    "retries": "retries",
    "sent": "sent",
    "us": "microseconds",
    "upstream_us": "upstream_microseconds",
    "bytes_in": "bytes_in",
    "bytes_out": "bytes_out",
}


def _middle(bucket: int) -> float:
    upper = BOUNDS_MS[min(bucket, len(BOUNDS_MS) - 1)]
    return upper if bucket == len(BOUNDS_MS) else upper / 2 ** (1 / 8)


def percentile(weighed: Iterable[tuple[float, int]], share: float) -> float | None:
    """Return the ``share`` (0 to 1) percentile by nearest rank of (value, how many), None of nothing (pure)."""
    ordered = sorted(weighed)
    rank = max(1, math.ceil(sum(count for _, count in ordered) * share))
    for value, count in ordered:
        rank -= count
        if rank <= 0:
            return value
    return None
