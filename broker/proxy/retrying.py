"""Pure: whether a proxied call may be made once more, and after how long; and the budget that keeps retries from piling up.

A call goes out again by itself only if that can do no harm: its method is idempotent (RFC 9110 9.2.2), or it carries an
``Idempotency-Key``, or it is known that it was never sent or, by a 401, never applied (RFC 9110 15.5.2).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Literal

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
BUDGET_SHARE: Final = 0.2
MOST_SAVED: Final = 20.0
MOST_KEYS: Final = 4_096
LEAST_ATTEMPT_SECONDS: Final = 0.05  # with less time left there is no point in another one

Step = Literal["give", "repeat", "renew"]


@dataclass(frozen=True, slots=True)
class RetryRule:
    """How often and how patiently: as in an integration's ``config.retry``. ``attempts`` counts the first one too.

    ``doubles``: pauses grow twofold with each attempt, else by the same step.
    """

    attempts: int = 3
    doubles: bool = True
    initial_delay_seconds: float = 0.2
    max_delay_seconds: float = 30.0
    statuses: frozenset[int] = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Seen:
    """What an attempt came to. ``status`` None: no answer; then ``sent`` says whether the request may have arrived.

    ``limited``: the provider said "too many", in its own way. ``rest_seconds``: how long it asked us to stay away.
    """

    status: int | None
    sent: bool = True
    limited: bool = False
    rest_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a call stands. ``repeatable``: sending it twice does no harm. ``replayable``: its body is still at hand.

    ``renewable``: a refused credential can be renewed, and was not for this call yet. ``left_seconds``: until its deadline.
    """

    attempts: int
    repeatable: bool
    replayable: bool
    renewable: bool
    left_seconds: float


def is_repeatable(method: str, *, has_key: bool) -> bool:
    """Whether a call may be sent twice: by its method, or because its receiver knows repeats by their key."""
    return has_key or method in IDEMPOTENT


def next_step(seen: Seen, standing: Standing, rule: RetryRule) -> Step:
    """Say what follows on an attempt: pass on what came, make the call once more, or with a renewed credential."""
    if not standing.replayable:
        return "give"
    if seen.status == 401 and standing.renewable and standing.left_seconds > LEAST_ATTEMPT_SECONDS:
        return "renew"
    if standing.attempts >= rule.attempts:
        return "give"
    if seen.status is None:
        return "repeat" if standing.repeatable or not seen.sent else "give"
    worth = (seen.limited and 429 in rule.statuses) or seen.status in rule.statuses
    return "repeat" if worth and standing.repeatable else "give"


def delay_seconds(seen: Seen, failed: int, rule: RetryRule, *, random_share: float) -> float:
    """Return how long to wait after ``failed`` attempts: full jitter, but never less than the provider asked for.

    ``random_share`` is uniform in [0, 1). The result may be longer than ``max_delay_seconds`` only where the provider's own
    word is: then the caller passes the answer on instead of waiting.
    """
    steps = 2.0 ** (failed - 1) if rule.doubles else float(failed)
    jittered = random_share * min(rule.max_delay_seconds, rule.initial_delay_seconds * steps)
    return max(jittered, seen.rest_seconds or 0.0)


class RetryBudget:
    """Lets retries be a fifth of the calls of a key, and a few more in the beginning: an outage is not made worse by us.

    In memory, for one process, of the ``MOST_KEYS`` keys that retried last; calls do not wait.
    """

    def __init__(self) -> None:
        """Begin with ``MOST_SAVED`` for each key."""
        self._saved: OrderedDict[str, float] = OrderedDict()

    def earn(self, key: str) -> None:
        """Count a call."""
        saved = self._saved.get(key, MOST_SAVED)
        if saved < MOST_SAVED:
            self._saved[key] = min(MOST_SAVED, saved + BUDGET_SHARE)

    def spend(self, key: str) -> bool:
        """Count a retry; False when there is nothing left for it."""
        saved = self._saved.get(key, MOST_SAVED)
        if saved < 1.0:
            return False
        self._saved[key] = saved - 1.0
        self._saved.move_to_end(key)
        if len(self._saved) > MOST_KEYS:
            self._saved.popitem(last=False)
        return True
