"""One attempt at a delivery: the event is read, opened and signed, posted, and the answer's status is all that is kept."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

from broker.database import Database, GroupReader
from broker.egress import Calls, NoRoom, NotSent, OutcomeUnknown, Resolve, WireAnswer, WireRequest
from broker.egress.addresses import target_of
from broker.errors import BrokerError, EgressDenied
from broker.settings import Settings
from broker.vault.keyring import Sealer
from broker.webhooks.backoff import OBEYED, Attempt
from broker.webhooks.configured import Receiver
from broker.webhooks.queue import Loaded, events_of
from broker.webhooks.signing import Sent, V1aKey, fields_of
from providers.rates import observed

ANSWER_BYTES: Final = 4096
ANSWER_SECONDS: Final = 1.0
USER_AGENT: Final = b"credential-broker"


def calls_of(settings: Settings, *, resolve: Resolve | None = None) -> Calls:
    """Return the way out of deliveries: their own exceptions for private networks count, not those for providers.

    ``resolve`` is for tests. ``SettingsError`` as ``Calls``.
    """
    return Calls(settings.model_copy(update={"egress_allow": settings.delivery_allow}), resolve=resolve)


class Sending:
    """What turns a claimed delivery into an attempt. Calls may run at once; those that read at once share one query."""

    def __init__(self, database: Database, sealer: Sealer, keys: Callable[[], Sequence[V1aKey]], calls: Calls) -> None:
        """Keep the parts. ``keys``: those that sign ``v1a``. ``calls``: a way out whose guard is for deliveries."""
        self._database = database
        self._sealer = sealer
        self._keys = keys
        self._calls = calls
        self._events: GroupReader[str, Loaded | None] = GroupReader(database, events_of)

    async def aclose(self) -> None:
        """Finish what is being read."""
        await self._events.aclose()

    async def request(self, receiver: Receiver, event_id: str, *, replay: bool) -> WireRequest | None:
        """Return an attempt as it goes out, signed now; None when the event or its body is gone for good.

        Raises DatabaseUnavailable, and when it cannot be opened or signed now: ValueError, SecretUnreadable,
        SecretStoreUnavailable.
        """
        event = await self._events.submit(event_id)
        if event is None:
            return None
        body = event.body
        if body is None:
            if event.sealed_body is None:
                return None
            sealed, owner = event.sealed_body, event.id
            body = await self._sealer.open_fresh(self._database, sealed, owner=owner, purpose="event", version=1)
        return self._signed(receiver, event, body, replay=replay)

    def _signed(self, receiver: Receiver, event: Loaded, body: bytes, *, replay: bool) -> WireRequest:
        target = target_of(receiver.url)
        keys = self._keys() if receiver.signature == "v1a" else ()
        told = (event.id, event.type, event.source_id, event.connection_id, event.provider_event_id, event.content_type)
        fields = fields_of(Sent(*told, replay), receiver, keys, body, at=int(time.time()))
        return WireRequest(
            scheme=target.scheme,
            host=target.host,
            port=target.port,
            method=b"POST",
            target=target.path_and_query.encode("ascii"),
            headers=((b"host", target.authority.encode("ascii")), (b"user-agent", USER_AGENT), *fields),
            body=body,
            idempotent=True,  # it may come twice, under one id
        )

    async def post(self, request: WireRequest, seconds: float) -> Attempt:
        """Make one attempt, answered in ``seconds`` or failed. ``NoRoom`` when nothing was tried, for want of our own room."""
        try:
            async with asyncio.timeout(seconds):
                answer = await self._calls.open(
                    request, connect_seconds=seconds, headers_seconds=seconds, idle_seconds=seconds
                )
        except NoRoom:
            raise
        except (BrokerError, TimeoutError) as error:
            return Attempt(None, _code_of(error))
        rest = None
        if answer.status in OBEYED:
            rest = observed(None, answer.status, answer.headers, time.time()).rest_seconds
        await _read_out(answer)
        return Attempt(answer.status, rest_seconds=rest)


def _code_of(error: BaseException) -> str:
    """Return our word for why there was no answer; nothing of the error is quoted."""
    if isinstance(error, TimeoutError) or (isinstance(error, OutcomeUnknown) and error.timed_out):
        return "timeout"
    if isinstance(error, EgressDenied):
        return "egress_denied"
    if isinstance(error, NotSent):
        return "unreachable"
    return "no_answer" if isinstance(error, OutcomeUnknown) else "not_sent"


async def _read_out(answer: WireAnswer) -> None:
    """Read a little of an answer, so that its connection can be kept, and throw it away."""
    left = ANSWER_BYTES if answer.whole is None else 0
    with contextlib.suppress(BrokerError, TimeoutError):
        async with asyncio.timeout(ANSWER_SECONDS):
            while left > 0 and (piece := await answer.read(ANSWER_SECONDS)):
                left -= len(piece)
    await answer.aclose()
