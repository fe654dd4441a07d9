"""Time that passes only when a test says so: a clock, and an event loop that runs what is ready and then gives control back."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

EPOCH = 1_800_000_000.0


class Clock:
    """One clock for databases, durations and event loops."""

    def __init__(self) -> None:
        """Begin at zero; small numbers, so that adding seconds loses no digits."""
        self.elapsed = 0.0

    def monotonic(self) -> float:
        """Return seconds since the start."""
        return self.elapsed

    def epoch(self) -> float:
        """Return seconds since 1970."""
        return EPOCH + self.elapsed


class _NeverWaits(selectors.SelectSelector):
    """Says how long the loop would have slept, instead of sleeping. There is no I/O to wait for."""

    def __init__(self, idle: Callable[[float | None], None]) -> None:
        super().__init__()
        self._idle = idle

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._idle(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a ``Clock``. What is handed to a thread is done in place, so that nothing happens by chance.

    ``wakes_at``: the clock's time of the next timer after the last ``settle``, None when there is none.
    """

    def __init__(self, clock: Clock) -> None:
        """Stand still until ``settle``."""
        self._virtual_clock = clock
        self.wakes_at: float | None = None
        super().__init__(_NeverWaits(self._note_idle))

    def time(self) -> float:
        """Return the clock's seconds."""
        return self._virtual_clock.elapsed

    def settle(self) -> None:
        """Run until every task waits for something that only time or the test can bring."""
        self.run_forever()

    def _note_idle(self, seconds: float | None) -> None:
        self.wakes_at = None if seconds is None else self._virtual_clock.elapsed + seconds
        self.stop()

    def run_in_executor(self, _executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Do the work at once and return its outcome."""
        done: asyncio.Future[Any] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits it
            done.set_exception(error)
        return done
