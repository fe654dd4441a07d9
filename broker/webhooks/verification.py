"""Has a request proven by its source's scheme: drives the check, and fetches the keys that a provider publishes."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from broker.egress import Egress, origin_of
from broker.errors import BrokerError
from broker.webhooks.configured import Source
from providers.receiving import verify
from providers.spec import (
    Dialogue,
    Incoming,
    Outgoing,
    ProviderAnswerError,
    Received,
    Refused,
    Reply,
    SourceKeys,
    Verified,
)

LARGE_BODY_BYTES: Final = 256 * 1024  # half a millisecond of hashing: beyond it in a thread
MOST_REQUESTS: Final = 3
FETCH_SECONDS: Final = 5.0
KEPT_SECONDS: Final = 600.0
FRESH_SECONDS: Final = 5.0
MOST_KEPT: Final = 64
MOST_FETCHES: Final = 8
MOST_UNKNOWN: Final = 30  # addresses of an origin, in
UNKNOWN_SECONDS: Final = 60.0
Judged = Verified | Reply | Refused


class Verification:
    """Judges requests. One for a process; calls may run at once.

    A scheme that needs nothing from its provider, as nearly all, is judged without a pause of the loop.
    """

    def __init__(self, egress: Egress, *, clock: Callable[[], float] = time.time) -> None:
        """Ask providers through ``egress``. ``clock``: seconds since 1970, which signed times are compared with."""
        self._published = PublishedKeys(egress)
        self._clock = clock

    async def judged(self, source: Source, received: Received) -> Judged:
        """Return what a request is; whatever is not proven is ``Refused``. Not checked: size, and whether it is a twin."""
        secrets = tuple([secret.value for secret in source.secrets])
        keys = SourceKeys(secrets, self._clock(), source.settings, source.tolerance_seconds)
        dialogue = verify(source.provider, source.webhook, received, keys)
        large = len(received.body) > LARGE_BODY_BYTES
        step = await asyncio.to_thread(_advance, dialogue, None) if large else _advance(dialogue, None)
        for _ in range(MOST_REQUESTS):
            if not isinstance(step, Outgoing):
                return step
            answer = await self._published.answer(step, source.webhook.scheme.asks)
            step = await asyncio.to_thread(_advance, dialogue, answer) if large else _advance(dialogue, answer)
        dialogue.close()
        return step if not isinstance(step, Outgoing) else Refused("key_unavailable")


def _advance(dialogue: Dialogue[Judged], answer: Incoming | ProviderAnswerError | None) -> Outgoing | Judged:
    """Go on to the next question of a check, or to its end."""
    try:
        if answer is None:
            return next(dialogue)
        return dialogue.throw(answer) if isinstance(answer, ProviderAnswerError) else dialogue.send(answer)
    except StopIteration as done:
        judged: Judged = done.value
        return judged


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer, and when it was asked for (monotonic)."""

    at: float
    answer: Incoming


class PublishedKeys:
    """Fetches what a provider publishes, each address once for all who ask meanwhile, and keeps it for a while.

    Strangers decide how often a key is asked for that nobody has, and some name its address. So a request that says
    ``no-cache`` is answered with nothing older than ``FRESH_SECONDS``, one that failed is not repeated sooner and takes away
    nothing that was kept, and of an origin only so many addresses are asked for in a minute that never answered.
    """

    def __init__(self, egress: Egress, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing kept."""
        self._egress = egress
        self._monotonic = monotonic
        self._kept: dict[str, _Kept] = {}
        self._asked_at: dict[str, float] = {}  # of the last FRESH_SECONDS
        self._unknown: dict[str, list[float]] = {}  # by origin: when an address was asked for that never answered
        self._fetching: dict[str, asyncio.Task[Incoming | None]] = {}

    async def answer(self, request: Outgoing, asks: Collection[str]) -> Incoming | ProviderAnswerError:
        """Return the answer, or what is thrown into the check when there is none; ``asks``: the origins that may be asked."""
        if request.method != "GET" or not _is_within(request.url, asks):
            return ProviderAnswerError("this address may not be asked")
        at, kept, asked_at = self._monotonic(), self._kept.get(request.url), self._asked_at.get(request.url)
        wants_fresh = any(name.lower() == "cache-control" for name in request.headers)
        if kept is not None and at - kept.at < (FRESH_SECONDS if wants_fresh else KEPT_SECONDS):
            return kept.answer
        if request.url not in self._fetching:
            if asked_at is not None and at - asked_at < FRESH_SECONDS:
                return ProviderAnswerError("there was no answer")
            if len(self._fetching) >= MOST_FETCHES or (kept is None and self._are_made_up(request.url, at)):
                return ProviderAnswerError("too many keys are asked for")
        answer = await self._shared(request)
        return answer if answer is not None else ProviderAnswerError("there was no answer")

    def _are_made_up(self, url: str, at: float) -> bool:
        """Count an address that never answered; return whether there were too many of its origin in this minute."""
        origin = origin_of(url)
        lately = self._unknown[origin] = [one for one in self._unknown.get(origin, ()) if at - one < UNKNOWN_SECONDS]
        if len(lately) >= MOST_UNKNOWN:
            return True
        lately.append(at)
        return False

    async def _shared(self, request: Outgoing) -> Incoming | None:
        task = self._fetching.get(request.url)
        if task is None:
            # A context of its own: what is logged belongs to no request.
            task = asyncio.create_task(self._fetch(request), context=contextvars.Context())
            self._fetching[request.url] = task
            task.add_done_callback(
                lambda done: self._fetching.pop(request.url) and (done.cancelled() or done.exception())
            )
        return await asyncio.shield(task)

    async def _fetch(self, request: Outgoing) -> Incoming | None:
        began = self._monotonic()
        self._asked_at = {url: at for url, at in self._asked_at.items() if began - at < FRESH_SECONDS}
        self._asked_at[request.url] = began
        try:
            answer = await self._egress.send(request, timeout_seconds=FETCH_SECONDS)
        except BrokerError:
            return None
        if answer.status != 200:  # whatever it says, it is no key
            return None
        self._kept.pop(request.url, None)
        while len(self._kept) >= MOST_KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept[request.url] = _Kept(began, answer)
        return answer


def _is_within(url: str, asks: Collection[str]) -> bool:
    try:
        return origin_of(url) in {origin_of(one) for one in asks}
    except ValueError:
        return False
