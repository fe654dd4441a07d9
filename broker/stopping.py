"""How a process ends: it says that it is not ready, serves on for a moment, stops listening, and lets go of who only waits."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Final

WAITERS_SECONDS: Final = 4.0
NOT_READY: Final = {"process": "is about to end"}  # in the words of readiness

Act = Callable[[], None]


class Stopping:
    """What happens from SIGTERM on, in the loop's thread, before the server's own handler closes the listener.

    1. At once ``begun``: readiness says so, and each answer ends its connection. New connections are still served, for
       ``drain_seconds``: load balancers notice meanwhile. SIGINT (a person) and a second signal do not wait.
    2. The server stops listening and waits for what is under way. ``end_streams`` are called: what would go on for ever.
    3. After ``WAITERS_SECONDS`` more, ``end_waiting``: who waits for another process would hold up the end, and the leases of
       this one with it.
    """

    def __init__(self, drain_seconds: float) -> None:
        """Begin with nothing heard."""
        self.begun = False
        self._drain_seconds = drain_seconds
        self._end_streams: Sequence[Act] = ()
        self._end_waiting: Sequence[Act] = ()

    def heed_signals(self, *, end_streams: Sequence[Act], end_waiting: Sequence[Act]) -> None:
        """Stand in front of the handlers that are set now. Outside of the main thread none can be set: nothing is done then."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._end_streams, self._end_waiting = end_streams, end_waiting
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if callable(before):
                signal.signal(number, self._handler(loop, before))

    def _handler(
        self, loop: asyncio.AbstractEventLoop, before: Callable[[int, FrameType | None], Any]
    ) -> Callable[[int, FrameType | None], None]:
        def heard(number: int, frame: FrameType | None) -> None:
            try:
                loop.call_soon_threadsafe(self._begin, loop, number, lambda: before(number, None))
            except RuntimeError:  # the loop has ended: nobody waits any more
                before(number, frame)

        return heard

    def _begin(self, loop: asyncio.AbstractEventLoop, number: int, stop_listening: Act) -> None:
        if self.begun:
            stop_listening()
            return
        self.begun = True
        if number == signal.SIGTERM and self._drain_seconds:
            loop.call_later(self._drain_seconds, self._listen_no_more, loop, stop_listening)
        else:
            self._listen_no_more(loop, stop_listening)

    def _listen_no_more(self, loop: asyncio.AbstractEventLoop, stop_listening: Act) -> None:
        stop_listening()
        for act in self._end_streams:
            act()
        for act in self._end_waiting:
            loop.call_later(WAITERS_SECONDS, act)
