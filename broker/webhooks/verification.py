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
    """An answer, None for one that did not come, and when it was asked for (monotonic)."""

    at: float
    answer: Incoming | None


class PublishedKeys:
    """Fetches what a provider publishes, each address once for all who ask meanwhile, and keeps it for a while.

    A request that says ``no-cache`` is answered with nothing older than ``FRESH_SECONDS``, and one that failed is not repeated
    sooner: strangers decide how often a key is asked for that nobody has.
    """

    def __init__(self, egress: Egress, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing kept."""
        self._egress = egress
        self._monotonic = monotonic
        self._kept: dict[str, _Kept] = {}
        self._fetching: dict[str, asyncio.Task[_Kept]] = {}

    async def answer(self, request: Outgoing, asks: Collection[str]) -> Incoming | ProviderAnswerError:
        """Return the answer, or what is thrown into the check when there is none; ``asks``: the origins that may be asked."""
        if request.method != "GET" or not _is_within(request.url, asks):
            return ProviderAnswerError("this address may not be asked")
        kept = self._kept.get(request.url)
        wants_fresh = any(name.lower() == "cache-control" for name in request.headers)
        good_for = FRESH_SECONDS if wants_fresh or (kept is not None and kept.answer is None) else KEPT_SECONDS
        if kept is None or self._monotonic() - kept.at >= good_for:
            if request.url not in self._fetching and len(self._fetching) >= MOST_FETCHES:
                return ProviderAnswerError("too many keys are asked for")
            kept = await self._shared(request)
        return kept.answer if kept.answer is not None else ProviderAnswerError("there was no answer")

    async def _shared(self, request: Outgoing) -> _Kept:
        task = self._fetching.get(request.url)
        if task is None:
            # A context of its own: what is logged belongs to no request.
            task = asyncio.create_task(self._fetch(request), context=contextvars.Context())
            self._fetching[request.url] = task
            task.add_done_callback(
                lambda done: self._fetching.pop(request.url) and (done.cancelled() or done.exception())
            )
        return await asyncio.shield(task)

    async def _fetch(self, request: Outgoing) -> _Kept:
        began = self._monotonic()
        answer: Incoming | None = None
        try:
            answer = await self._egress.send(request, timeout_seconds=FETCH_SECONDS)
        except BrokerError:
            answer = None
        if answer is not None and (answer.status == 429 or answer.status >= 500):
            answer = None
        while len(self._kept) >= MOST_KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept.pop(request.url, None)
        kept = self._kept[request.url] = _Kept(began, answer)
        return kept


def _is_within(url: str, asks: Collection[str]) -> bool:
    try:
        return origin_of(url) in {origin_of(one) for one in asks}
    except ValueError:
        return False
