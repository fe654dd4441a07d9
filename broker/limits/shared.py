"""The windows that several processes share in Redis, by the ``limits`` library; while Redis is away it says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit

import structlog
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from broker.limits.windows import Rate

REDIS_PORT = 6379
ANSWER_SECONDS = 0.25
AWAY_SECONDS = 2.0
WARN_SECONDS = 60.0
SHORTEST_WAIT_SECONDS = 0.01
log = structlog.get_logger()


def _with_port(url: str) -> str:
    """Return the URL with Redis's port where it names none: the library insists on one."""
    parts = urlsplit(url)
    if parts.port is not None:
        return url
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.removesuffix(':')}:{REDIS_PORT}"))


class SharedWindows:
    """Counts calls in Redis, one round trip a call that passes. Calls may run at once.

    ``on_failure`` is called for each question that Redis did not answer. After one it is left alone for ``AWAY_SECONDS``,
    so that a dead Redis costs one caller in a while ``ANSWER_SECONDS`` and the others nothing. Windows are whole seconds
    there: a fraction is rounded up, to the stricter side. The sliding window goes by the clocks of the processes.
    """

    def __init__(
        self, url: str, *, on_failure: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Connect when the first call comes. ``url`` is redis://… or rediss://… and is never logged."""
        self._storage = RedisStorage(
            f"async+{_with_port(url)}",
            implementation="redispy",
            key_prefix="broker-rates",
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 0),  # type: ignore[arg-type] # passed on to the client as it is
        )
        self._strategies: dict[str, RateLimiter] = {
            "sliding": MovingWindowRateLimiter(self._storage),
            "fixed": FixedWindowRateLimiter(self._storage),
        }
        self._items: dict[Rate, RateLimitItem] = {}
        self._on_failure, self._clock = on_failure, clock
        self._away_until = self._warned_at = -math.inf

    async def hit(self, key: str, rate: Rate) -> float | None:
        """Count a call and return 0.0; or count nothing and return the seconds until one fits; None: Redis is away."""
        if self._clock() < self._away_until:
            return None
        strategy, item = self._strategies[rate.strategy], self._item(rate)
        try:
            if await strategy.hit(item, key):
                return 0.0
            window = await strategy.get_window_stats(item, key)
        except (RedisError, OSError, TimeoutError) as error:
            self._note_failure(error)
            return None
        return min(max(window.reset_time - time.time(), SHORTEST_WAIT_SECONDS), rate.window_seconds + 1)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._storage.bridge.get_connection().aclose()  # type: ignore[attr-defined]

    def _item(self, rate: Rate) -> RateLimitItem:
        item = self._items.get(rate)
        if item is None:
            if len(self._items) >= 1000:
                self._items.clear()
            item = self._items[rate] = RateLimitItemPerSecond(rate.max_requests, math.ceil(rate.window_seconds))
        return item

    def _note_failure(self, error: Exception) -> None:
        now = self._clock()
        self._away_until = now + AWAY_SECONDS
        self._on_failure()
        if now - self._warned_at >= WARN_SECONDS:
            self._warned_at = now
            log.warning("rates.redis_away", error=type(error).__name__, now="each process counts for itself")
