"""How often a key may be used: counted here or shared in Redis, with a fair and bounded line for those who can wait."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from broker.errors import RateLimited
from broker.limits.lines import MAX_WAITING, Line
from broker.limits.shared import SharedWindows
from broker.limits.windows import Rate, Window, window_of

__all__ = ["MAX_KEYS", "MAX_PAUSE_SECONDS", "Rate", "Rates"]

MAX_KEYS = 10_000
MAX_PAUSE_SECONDS = 60.0
SHORTEST_SLEEP_SECONDS = 0.001


class _Place:
    """What is known of one key: its window, until when it is paused, who waits, and when it is worth asking again."""

    __slots__ = ("line", "paused_until", "rate", "ready_at", "serving", "window")

    def __init__(self) -> None:
        self.rate: Rate | None = None
        self.window: Window | None = None
        self.paused_until = self.ready_at = -math.inf
        self.line = Line()
        self.serving: asyncio.Task[None] | None = None

    def wait_seconds(self, rate: Rate | None, now: float) -> float:
        """Return how long a call has to wait by what this process knows; a changed rate begins with an empty window."""
        if rate is not self.rate and rate != self.rate:
            self.rate, self.window = rate, window_of(rate) if rate is not None else None
        if now < self.paused_until:
            return self.paused_until - now
        return self.window.wait_seconds(now) if self.window is not None else 0.0

    def note(self, now: float) -> None:
        """Count a call."""
        if self.window is not None:
            self.window.note(now)

    def last_matters_at(self) -> float:
        """Return until when this place says more than an empty one would; infinity while somebody waits."""
        if self.line:
            return math.inf
        counted = self.window.newest_at + self.rate.window_seconds if self.window and self.rate else -math.inf
        return max(counted, self.paused_until)


class Rates:
    """Counts calls per key and lets them wait, fairly, where they may. Calls may run at once in one event loop.

    Without ``storage_url`` each process counts for itself; with one (redis://… or rediss://…) all that share it count
    together, and while Redis does not answer each goes on with its own count, which it kept all along: never without a
    limit, never an error. ``on_store_failure`` is called for each question that Redis did not answer. ``clock`` gives
    monotonic seconds. Memory: ``MAX_KEYS`` keys, each with eight bytes for every request that its rate allows; keys must
    not be chosen by strangers, for the one that was used least lately is forgotten when there are more.
    """

    def __init__(
        self,
        storage_url: str | None = None,
        *,
        on_store_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing counted; Redis is dialled when the first call comes."""
        self._places: dict[str, _Place] = {}
        self._clock = clock
        self._shared = SharedWindows(storage_url, on_failure=on_store_failure) if storage_url is not None else None

    async def take(self, key: str, rate: Rate | None, *, caller: str, wait_seconds: float) -> None:
        """Count a call of ``key``, at once or after waiting in line for at most ``wait_seconds``.

        Raises ``RateLimited`` with the seconds after which it is worth coming again: when the wait would be longer (at
        once, where that is certain) or the line is full, also while waiting: see ``Line``. Of those who wait the callers
        take turns, each caller's own first in, first out; nobody overtakes them. ``rate`` None: only pauses hold. Nothing
        is counted for who is refused or leaves; who is cancelled in the very moment of his turn has used it up.
        """
        place = self._places.get(key)
        if place is None:
            place = self._opened(key)
        if place.line:
            wait = max(0.0, max(place.ready_at, place.paused_until) - self._clock())
        elif self._shared is not None:
            wait = await self._attempt(key, place, rate)
            if wait <= 0:
                return
        else:  # the ordinary case, without another coroutine
            now = self._clock()
            wait = place.wait_seconds(rate, now)
            if wait <= 0:
                place.note(now)
                return
        await self._stand_in_line(key, place, rate, caller=caller, wait=wait, wait_seconds=wait_seconds)

    def pause(self, key: str, seconds: float) -> None:
        """Hold later calls of ``key`` back for ``seconds`` (an upstream's Retry-After), at most ``MAX_PAUSE_SECONDS``.

        The longest pause counts. It holds in this process, also for those who wait in line already. NaN pauses nothing.
        """
        place = self._places.get(key) or self._opened(key)
        if seconds > 0:
            place.paused_until = max(place.paused_until, self._clock() + min(seconds, MAX_PAUSE_SECONDS))

    async def aclose(self) -> None:
        """Stop serving the lines (who still stands there is refused at the end of his wait) and leave Redis."""
        tasks = [place.serving for place in self._places.values() if place.serving is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._shared is not None:
            await self._shared.aclose()

    async def _attempt(self, key: str, place: _Place, rate: Rate | None) -> float:
        """Count a call and return 0.0, or return how long to wait before asking again."""
        now = self._clock()
        local = place.wait_seconds(rate, now)
        if now < place.paused_until:
            return local
        shared = await self._shared.hit(key, rate) if self._shared is not None and rate is not None else None
        wait = local if shared is None else shared
        if wait <= 0:
            place.note(now)
        return wait

    async def _stand_in_line(
        self, key: str, place: _Place, rate: Rate | None, *, caller: str, wait: float, wait_seconds: float
    ) -> None:
        size, window = (rate.max_requests, rate.window_seconds) if rate is not None else (MAX_WAITING, 0.0)
        at_best = wait + place.line.before(caller) // size * window
        ticket = place.line.join(caller) if at_best <= wait_seconds else None
        if ticket is None:
            raise RateLimited(retry_after_seconds=math.ceil(at_best))
        if place.serving is None:
            place.ready_at = self._clock() + wait
            place.serving = asyncio.create_task(self._serve(key, place))
        try:
            async with asyncio.timeout(wait_seconds):
                in_turn = await ticket
        except TimeoutError:
            in_turn = False
        finally:
            place.line.leave(caller, ticket)
        if not in_turn:
            raise RateLimited(retry_after_seconds=math.ceil(place.ready_at - self._clock()))

    async def _serve(self, key: str, place: _Place) -> None:
        """Let those who wait in, one after the other, as places become free; ends with the line."""
        try:
            while place.line:
                delay = place.ready_at - self._clock()
                if delay > 0:
                    await asyncio.sleep(max(delay, SHORTEST_SLEEP_SECONDS))
                    continue  # the line may be empty by now
                wait = await self._attempt(key, place, place.rate)
                if wait > 0:
                    place.ready_at = self._clock() + wait
                else:
                    place.line.call_next()
        finally:
            place.serving = None

    def _opened(self, key: str) -> _Place:
        if len(self._places) >= MAX_KEYS:
            self._forget()
        place = self._places[key] = _Place()
        return place

    def _forget(self) -> None:
        """Drop places that say nothing any more; where all still do, the tenth that will be first to say nothing."""
        now = self._clock()
        until = {key: place.last_matters_at() for key, place in self._places.items()}
        over = [key for key, at in until.items() if at <= now]
        idle = (key for key in sorted(until, key=until.__getitem__) if until[key] < math.inf)
        for key in over or list(idle)[: MAX_KEYS // 10]:
            del self._places[key]
