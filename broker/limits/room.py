"""How much may be under way at once: early and cheap refusals, so that who is let in is served, and nobody takes all places.

Two bounds, because two things run out. Memory: every request counts from its first byte to its last (``most``). The processor,
the database and the store: a request counts while it is worked on (``most_busy``), but not while it waits for a provider
(``waiting_elsewhere``): thousands may wait for one refresh, and nothing is overloaded by that.
"""

from __future__ import annotations

import contextlib
import contextvars
import random
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Self

from broker.errors import Overloaded

SHARE: Final = (
    2  # who has twice as many places as are free gets no more: alone two thirds of all, among many an even part
)
BURST_SECONDS: Final = 15.0
CALM_SECONDS: Final = 3.0
# Retry-After. Several, so that those who were refused together do not come back together; not 1, because of many clients that
# try again soon more are refused than served, and a refusal costs a third of an answer.
LATER_SECONDS: Final = (2, 3, 4)


class Room:
    """The places of one data plane in this process. One event loop; memory only.

    A caller is refused a place when it has ``SHARE`` times as many as are free, so there is always one for a newcomer. A
    burst is no overload: ``most_busy`` may be passed for ``BURST_SECONDS``, and again once it was not reached for
    ``CALM_SECONDS``; ``most`` never.
    """

    def __init__(
        self,
        most: int,
        most_busy: int | None = None,
        *,
        burst_seconds: float = BURST_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin empty. ``most_busy``: None for no second bound; ``burst_seconds``: how long that may be passed."""
        self._most = most
        self._most_busy = most if most_busy is None else most_busy
        self._burst_seconds = burst_seconds
        self._monotonic = monotonic
        self._inside = self._busy = 0
        self._shares: dict[str, Share] = {}
        self._burst_began = self._full_at = -CALM_SECONDS

    @property
    def inside(self) -> int:
        """How many requests are in it now."""
        return self._inside

    @property
    def busy(self) -> int:
        """How many of them are worked on."""
        return self._busy

    def enter(self) -> None:
        """Count a request whose caller is not known yet (Overloaded when there are too many); ``leave`` has to follow."""
        if self._inside >= self._most:
            raise _overloaded()
        self._inside += 1

    def leave(self) -> None:
        """Count it as over."""
        self._inside -= 1

    def place(self, caller: str) -> Place:
        """Give a caller a place, to be left by the end of a ``with`` block; the request has to be inside (``enter``).

        Raises Overloaded when its share of either bound is used up.
        """
        share = self._shares.get(caller)
        if share is None:
            share = Share()
        if share.inside > SHARE * (self._most - self._inside):
            raise _overloaded()
        if share.busy > SHARE * (self._most_busy - self._busy - 1) and self._stays_full():
            raise _overloaded()
        self._shares[caller] = share
        share.inside += 1
        return Place(self, caller, share)

    def _stays_full(self) -> bool:
        """Whether it has been full for longer than a burst may last."""
        at = self._monotonic()
        if at - self._full_at >= CALM_SECONDS:
            self._burst_began = at
        self._full_at = at
        return at - self._burst_began >= self._burst_seconds

    def change_busy(self, share: Share, by: int) -> None:
        """Count a place as worked on (1) or not (-1)."""
        self._busy += by
        share.busy += by

    def give_back(self, caller: str, share: Share) -> None:
        """Count a place as free."""
        share.inside -= 1
        if not share.inside:
            del self._shares[caller]


class Share:
    """What one caller has of a room."""

    __slots__ = ("busy", "inside")

    def __init__(self) -> None:
        """Begin with nothing."""
        self.inside = self.busy = 0


class Place:
    """One request's place in a room, for a ``with`` block."""

    __slots__ = ("_away", "_caller", "_ended", "_room", "_share")

    def __init__(self, room: Room, caller: str, share: Share) -> None:
        """Belong to a caller's share, which counts it already."""
        self._room, self._caller, self._share = room, caller, share
        self._away, self._ended = 0, False

    def __enter__(self) -> Self:
        self._room.change_busy(self._share, 1)
        _PLACE.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        if not self._away:
            self._room.change_busy(self._share, -1)
        self._room.give_back(self._caller, self._share)

    def step(self, by: int) -> None:
        """Step out (1) or back in (-1); steps may be nested, and after the end they count for nothing."""
        was_away = self._away > 0
        self._away += by
        if not self._ended and was_away != (self._away > 0):
            self._room.change_busy(self._share, -by)


_PLACE: contextvars.ContextVar[Place | None] = contextvars.ContextVar("place", default=None)


@contextlib.contextmanager
def waiting_elsewhere() -> Iterator[None]:
    """Not count as busy during the block the request that this task serves: it waits for somebody outside.

    Nothing happens where there is none, or it has ended. The room may be fuller than full when it comes back.
    """
    place = _PLACE.get()
    if place is None:
        yield
        return
    place.step(1)
    try:
        yield
    finally:
        place.step(-1)


def _overloaded() -> Overloaded:
    return Overloaded(retry_after_seconds=LATER_SECONDS[int(random.random() * len(LATER_SECONDS))])  # noqa: S311 - no secret
