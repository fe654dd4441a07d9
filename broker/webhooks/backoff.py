"""Pure: what an attempt at a delivery means, when the next one is due, and when a subscriber is given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

DELAYS_SECONDS: Final = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 36_000.0)  # behind the 1st to the 7th attempt
JITTER: Final = 0.2
LONGEST_SECONDS: Final = 36_000.0
OBEYED: Final = frozenset({429, 503})  # whose Retry-After counts (RFC 9110 10.2.3, RFC 6585 4)
TROUBLE: Final = frozenset({408, 425, 429})  # besides 5xx: the subscriber as a whole cannot now
FAILING_SECONDS: Final = 5 * 86_400.0
FAILING_ATTEMPTS: Final = 10

Verdict = Literal["delivered", "retry", "gone"]
State = Literal["delivered", "retrying", "dead"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """How an attempt ended. ``status`` None: no answer, for the reason ``error`` (a code of ours).

    ``rest_seconds``: what ``Retry-After`` asked for, untrusted, None where it was absent or unreadable.
    """

    status: int | None
    error: str | None = None
    rest_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Next:
    """What becomes of a delivery. ``delay_seconds``: for ``retrying``. ``reason``: why it is dead.

    ``disables``: the subscriber said that it is gone for good.
    """

    state: State
    delay_seconds: float = 0.0
    reason: str | None = None
    disables: bool = False


def judge(attempt: Attempt) -> Verdict:
    """Say what an answer means: any 2xx is delivered, 410 is gone, all else may be tried again. Pure.

    A redirect is a failure: it is never followed, since its target was never configured.
    """
    if attempt.status is None:
        return "retry"
    if 200 <= attempt.status < 300:
        return "delivered"
    return "gone" if attempt.status == 410 else "retry"


def in_trouble(attempt: Attempt) -> bool:
    """Whether an attempt shows that the subscriber serves nobody now; a 404 or a 400 may be about this one event. Pure."""
    return attempt.status is None or attempt.status >= 500 or attempt.status in TROUBLE


def next_of(attempt: Attempt, attempts: int, *, random_share: float) -> Next:
    """Say what follows on the ``attempts``-th attempt (1 is the first). Pure.

    ``random_share``: uniform in [0, 1), spreads a delay by ±20 %. ``Retry-After`` of a 429 or 503 makes the pause longer, up
    to 10 hours, and never shorter: a subscriber that says 0 would use up all its attempts within a second.
    """
    verdict = judge(attempt)
    if verdict == "delivered":
        return Next("delivered")
    if verdict == "gone":
        return Next("dead", reason="gone", disables=True)
    if attempts > len(DELAYS_SECONDS):
        return Next("dead", reason="attempts_exhausted")
    delay = DELAYS_SECONDS[attempts - 1] * (1 - JITTER + 2 * JITTER * random_share)
    return Next("retrying", max(delay, asked_seconds(attempt)))


def asked_seconds(attempt: Attempt) -> float:
    """Return how long the subscriber asked to be left alone: 0 to 10 hours. Pure."""
    if attempt.status not in OBEYED or attempt.rest_seconds is None:
        return 0.0
    return min(max(attempt.rest_seconds, 0.0), LONGEST_SECONDS)


def is_given_up(failing_seconds: float, attempts: int) -> bool:
    """Whether a subscription is disabled that has failed for so long, without one success in so many attempts. Pure."""
    return failing_seconds >= FAILING_SECONDS and attempts >= FAILING_ATTEMPTS
