"""Who waits for a free place at one key: a bounded line that goes round between callers, so that none starves another."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

MAX_WAITING = 100
Ticket = asyncio.Future[bool]


class Line:
    """Those who wait: first in, first out within a caller, and the callers in turn. Memory only, one event loop.

    ``len()`` is how many wait, ``MAX_WAITING`` at most. Who has few waiting always finds room: in a full line the newest of
    whoever has most gives way, as long as the newcomer's caller still has no more than that one afterwards. So a caller is
    pushed out only of what is beyond an even share of the line.
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

    def join(self, caller: str) -> Ticket | None:
        """Stand at the end of one's own queue; None where there is no room.

        The ticket is done with True when it is one's turn, and with False when it was pushed out.
        """
        if self._count >= MAX_WAITING and not self._made_room(caller):
            return None
        ticket: Ticket = asyncio.get_running_loop().create_future()
        self._tickets.setdefault(caller, deque()).append(ticket)
        self._count += 1
        return ticket

    def leave(self, caller: str, ticket: Ticket) -> None:
        """Take back a ticket; nothing when it was its turn already, or it was pushed out."""
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
                ticket.set_result(True)
                return

    def _made_room(self, caller: str) -> bool:
        longest = max(self._tickets.values(), key=len)
        if len(self._tickets.get(caller, ())) + 1 >= len(longest):  # an exchange of places would go on for ever
            return False
        newest = longest.pop()  # the queue keeps another one: it was longer than 1
        self._count -= 1
        if not newest.done():
            newest.set_result(False)
        return True
