"""One lane for each subscription, so that one that hangs or fails slows no other: what waits in it, and when it may go on."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from broker.limits import Rate, rate_per_second
from broker.webhooks.configured import Receiver
from broker.webhooks.queue import Taken


class Load(NamedTuple):
    """What is under way: attempts, and the bytes of their bodies."""

    attempts: int = 0
    body_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one process does at once, for all subscriptions together."""

    attempts: int = 512
    body_bytes: int = 128 * 1024**2


def may_start(own: Load, together: Load, size: int, lanes: int, bounds: Bounds) -> bool:
    """Whether a lane may begin an attempt with a body of ``size`` bytes. Pure.

    Half of the bounds is for whoever comes first. Of the other half each of the ``lanes`` has its share, at least one attempt,
    which those that came first cannot take. A body that fits nowhere goes when its lane is idle and there is room in all, or
    by itself.
    """
    if together.attempts >= bounds.attempts:
        return False
    share = max(1, bounds.attempts // 2 // max(1, lanes))
    if together.attempts >= bounds.attempts // 2 and own.attempts >= share:
        return False
    after = together.body_bytes + size
    if after <= bounds.body_bytes // 2:
        return True
    return own.attempts == 0 and (after <= bounds.body_bytes or together.attempts == 0)


NOTHING: Final = Load()


@dataclass(eq=False, slots=True)
class Lane:
    """What this process holds of one subscription's deliveries. One event loop.

    ``receiver`` None: paused or deleted since. ``waiting``: claimed, not begun. ``hungry``: there may be more that is due.
    ``held_until``: the loop's time until which nothing is begun. ``probing``: one attempt shows whether its breaker closes.
    """

    subscription_id: str
    receiver: Receiver | None
    waiting: deque[Taken] = field(default_factory=deque)
    under_way: Load = NOTHING
    hungry: bool = True
    held_until: float = -math.inf
    probing: bool = False
    feeding: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    rate: Rate | None = None

    def __post_init__(self) -> None:
        """Read what the receiver says."""
        self.take(self.receiver)

    def take(self, receiver: Receiver | None) -> None:
        """Go by ``receiver`` from now on."""
        if receiver is not None:
            self.rate = rate_per_second(receiver.max_per_second or 0)
        self.receiver = receiver

    def wants(self, at: float) -> int:
        """Return how many more deliveries to claim: up to as many as it may make at once, beside as many under way.

        Claimed in portions, for each claim is a transaction; of a lane with a rate not more than a second's worth.
        """
        if self.receiver is None or self.probing or at < self.held_until:
            return 0
        most = self.receiver.max_concurrent
        if self.rate is not None:
            most = max(1, min(most, int(self.rate.max_requests / self.rate.window_seconds)))
        if len(self.waiting) > most // 2:
            return 0
        return max(0, 2 * most - len(self.waiting) - self.under_way.attempts)

    def hold(self, until: float) -> None:
        """Begin nothing before ``until``."""
        self.held_until = max(self.held_until, until)

    def began(self, size: int) -> None:
        """Count an attempt."""
        self.under_way = Load(self.under_way.attempts + 1, self.under_way.body_bytes + size)

    def ended(self, size: int) -> None:
        """Count it no more."""
        self.under_way = Load(self.under_way.attempts - 1, self.under_way.body_bytes - size)
        self.changed.set()

    @property
    def full(self) -> bool:
        """Whether its subscriber has as many attempts as it takes at once."""
        return self.receiver is None or self.under_way.attempts >= self.receiver.max_concurrent

    @property
    def idle(self) -> bool:
        """Whether nothing of it is held here."""
        return not self.waiting and self.under_way == NOTHING and (self.feeding is None or self.feeding.done())
