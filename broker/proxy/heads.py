"""What the fields of requests say, remembered for a moment: a client sends the same ones with call after call.

Who calls, what is asked of us and which fields go on costs a fifth of a call to find out, and depends on the fields alone.
They are known by a keyed digest: a caller key is not kept.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain

from broker.policy import Principal
from broker.proxy.fields import Asked, asked, request_fields

Fields = tuple[tuple[bytes, bytes], ...]
BELIEVED_SECONDS = 0.3  # besides the half second of ``Callers``: a revoked key is dead within one
KEPT_SECONDS = 10.0
MOST_KEPT = 1_024


@dataclass(slots=True)
class Head:
    """The fields of a request, and who they say is calling. ``InvalidRequest`` from what asks of them what makes no sense."""

    principal: Principal
    believed_until: float
    _asked: Asked | None = None
    _fields: dict[int, tuple[object, Fields]] = field(default_factory=dict, repr=False)

    def asked(self, headers: Sequence[tuple[bytes, bytes]]) -> Asked:
        """Return what is asked of us; ``headers`` are the ones that this was made of."""
        if self._asked is None:
            self._asked = asked(headers)
        return self._asked

    def fields(
        self,
        headers: Sequence[tuple[bytes, bytes]],
        plan: object,
        *,
        owned: frozenset[bytes],
        companions: Mapping[bytes, tuple[bytes, bool]],
    ) -> Fields:
        """Return which of them go on, as ``request_fields`` says; ``plan`` is what ``owned`` and ``companions`` are part of."""
        known = self._fields.get(id(plan))
        if known is not None and known[0] is plan:
            return known[1]
        made = request_fields(headers, owned=owned, companions=companions)
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
        """Return what these fields from this peer are known by, None for fields that could be taken for others."""
        whole = b"\0".join(chain.from_iterable(headers))
        if whole.count(b"\0") != 2 * len(headers) - 1:
            return None
        return blake2b(b"%b\0%b" % (whole, (peer or "").encode()), key=self._key, digest_size=32).digest()

    def known(self, mark: bytes | None) -> Head | None:
        """Return the head, if it is known and its caller is still believed."""
        head = self._known.get(mark) if mark is not None else None
        return head if head is not None and time.monotonic() < head.believed_until else None

    def keep(self, mark: bytes | None, principal: Principal) -> Head:
        """Return the head of a caller that was just found, and remember it for some seconds."""
        until = time.monotonic() + BELIEVED_SECONDS
        head = self._known.get(mark) if mark is not None else None
        if head is not None:
            head.principal, head.believed_until = principal, until
            return head
        head = Head(principal, until)
        if mark is not None and len(self._known) < MOST_KEPT:
            self._known[mark] = head
            if self._forgetting is None:
                self._forgetting = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._forget)
        return head

    def _forget(self) -> None:
        self._forgetting = None
        self._known.clear()
