"""What the fields of requests say, remembered for a moment: a client sends the same ones with call after call.

Who calls, what is asked of us and which fields go on costs a fifth of a call to find out, and depends on the fields alone.
They are known by a keyed digest: a caller key is not kept.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain

from broker.policy import Principal
from broker.proxy.fields import Asked, asked, request_fields
from broker.proxy.planning import Plan

Fields = tuple[tuple[bytes, bytes], ...]
Shown = Callable[[Sequence[tuple[bytes, bytes]]], tuple[Sequence[bytes], frozenset[bytes]]]
BELIEVED_SECONDS = 0.3  # besides the half second of ``Callers``: a revoked key is dead within one
KEPT_SECONDS = 10.0
MOST_KEPT = 1_024
LONGEST = 8_192
OF_ONE_REQUEST = frozenset({b"content-length", b"traceparent", b"tracestate"})  # and nothing here depends on them


@dataclass(slots=True)
class Head:
    """The fields of a request, and who they say is calling. ``InvalidRequest`` from what asks of them what makes no sense."""

    principal: Principal
    believed_until: float
    changes: int  # of the callers of this process, when this one was found
    _asked: Asked | None = None
    _fields: dict[int, tuple[Plan, Fields]] = field(default_factory=dict, repr=False)

    def asked(self, headers: Sequence[tuple[bytes, bytes]]) -> Asked:
        """Return what is asked of us; ``headers`` are the ones that this was made of."""
        if self._asked is None:
            self._asked = asked(headers)
        return self._asked

    def fields(self, headers: Sequence[tuple[bytes, bytes]], plan: Plan, shown: Shown) -> Fields:
        """Return which of them go on, as ``request_fields`` says.

        ``shown``: from the fields what the caller showed of itself, and the names of fields in which that may stand.
        """
        known = self._fields.get(id(plan))
        if known is not None and known[0] is plan:
            return known[1]
        texts, names = shown(headers)
        made = request_fields(
            headers, owned=plan.owned, companions=plan.companions, shown=texts, dropped=names - plan.owned
        )
        self._fields[id(plan)] = (plan, made)
        return made


class Heads:
    """The heads of the last seconds. One for a process; calls do not wait."""

    def __init__(self) -> None:
        """Begin with none."""
        self._key = secrets.token_bytes(32)
        self._known: dict[bytes, Head] = {}
        self._forgetting: asyncio.TimerHandle | None = None

    def mark(self, headers: Sequence[tuple[bytes, bytes]], peer: str | None) -> bytes | None:
        """Return what these fields from this peer are known by, None for those that could be taken for others, or are long."""
        lasting = [one for one in headers if one[0] not in OF_ONE_REQUEST]
        whole = b"\0".join(chain.from_iterable(lasting))
        if whole.count(b"\0") != 2 * len(lasting) - 1 or len(whole) > LONGEST:
            return None
        return blake2b(b"%b\0%b" % (whole, (peer or "").encode()), key=self._key, digest_size=32).digest()

    def known(self, mark: bytes | None, changes: int) -> Head | None:
        """Return the head, if it is known and its caller is still believed; ``changes``: of the callers by now."""
        head = self._known.get(mark) if mark is not None else None
        if head is None or head.changes != changes or time.monotonic() >= head.believed_until:
            return None
        return head

    def keep(self, mark: bytes | None, principal: Principal, changes: int) -> Head:
        """Return the head of a caller that was just found, and remember it for some seconds.

        ``changes``: those of the callers from before it was looked for.
        """
        until = time.monotonic() + BELIEVED_SECONDS
        head = self._known.get(mark) if mark is not None else None
        if head is not None:
            head.principal, head.believed_until, head.changes = principal, until, changes
            return head
        head = Head(principal, until, changes)
        if mark is not None and len(self._known) < MOST_KEPT:
            self._known[mark] = head
            if self._forgetting is None:
                self._forgetting = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._forget)
        return head

    def _forget(self) -> None:
        self._forgetting = None
        self._known.clear()
