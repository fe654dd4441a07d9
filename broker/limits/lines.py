"""Who waits for a free place at one key: a bounded line that goes round between callers, so that none starves another."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

MAX_WAITING = 100
Ticket = asyncio.Future[None]


class Line:
    """Those who wait: first in, first out within a caller, and the callers in turn. Memory only, one event loop.

    ``len()`` is how many wait; the owner refuses more than ``MAX_WAITING``.
    """

    def __init__(self) -> None:
        """Start with nobody."""
        self._tickets: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def before(self, caller: str) -> int:
        """Return how many go before a newcomer of ``caller`` at best: his own, and as many of each other caller."""
        own = len(self._tickets.get(caller, ()))
        return own + sum(min(len(queue), own) for name, queue in self._tickets.items() if name != caller)

    def join(self, caller: str) -> Ticket:
        """Stand at the end of one's own queue; the ticket is done when it is one's turn."""
        ticket: Ticket = asyncio.get_running_loop().create_future()
        self._tickets.setdefault(caller, deque()).append(ticket)
        self._count += 1
        return ticket

    def leave(self, caller: str, ticket: Ticket) -> None:
        """Take back a ticket; nothing when it was its turn already."""
        queue = self._tickets.get(caller)
        if queue is None or ticket not in queue:
            return
        queue.remove(ticket)
        self._count -= 1
        if not queue:
            del self._tickets[caller]

    def call_next(self) -> None:
        """Let the next one in: the caller whose turn it is goes to the end of the round. Nothing when nobody waits."""
        while self._tickets:
            caller, queue = next(iter(self._tickets.items()))
            ticket = queue.popleft()
            self._count -= 1
            if queue:
                self._tickets.move_to_end(caller)
            else:
                del self._tickets[caller]
            if not ticket.done():  # one that was given up and has not left yet takes no turn
                ticket.set_result(None)
                return
