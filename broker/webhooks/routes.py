"""``/webhooks/{source_id}`` as an ASGI route: raw bytes in, verified, stored, and only then acknowledged.

Nothing that is not proven costs more than reading it within bounds: an unknown source, a method, a length or an address that
sends too much is refused unread. A refusal tells no more than that it is one; which step failed stands in the source's log.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import structlog

from broker.errors import (
    BrokerError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    RateLimited,
    Unauthenticated,
    problem_of,
)
from broker.limits import client_address, limited_as
from broker.listening import raw_target
from broker.settings import Network, Settings
from broker.telemetry import Metrics
from broker.webhooks.configured import Source
from broker.webhooks.inbox import Inbox
from broker.webhooks.rejections import Rejected, Rejections
from broker.webhooks.sources import Sources
from broker.webhooks.storing import Stored
from broker.webhooks.verification import Verification
from providers.spec import Received, Refused, Reply, Verified

TARGET: Final = re.compile(rb"/webhooks/([^/?]+)(\?.*)?", re.DOTALL)
PREFIX: Final = "/webhooks/"
TEMPLATE: Final = "/webhooks/{source_id}"
IDLE_SECONDS: Final = 10.0  # between two pieces of a body
BODY_SECONDS: Final = 60.0  # for all of it
HELD_BYTES: Final = 128 * 1024**2  # of all bodies that are being read or stored
SHARES: Final = 4  # one address holds no more than a fourth of that, or one whole body
LONGEST_KEPT: Final = 256
MINUTE_SECONDS: Final = 60.0
log = structlog.get_logger()

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]
Fields = Sequence[tuple[bytes, bytes]]


class ClientLeft(Exception):
    """The client closed its connection amid its body: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back. ``code``: what the request is counted as."""

    status: int
    headers: Fields
    body: bytes
    code: str


class HeldBytes:
    """How many bytes of bodies are in memory, and how many may be: of all, and of one address, which could keep others out."""

    def __init__(self, most: int, most_of_one: int) -> None:
        """Begin with none."""
        self._left = most
        self._most_of_one = most_of_one
        self._of: dict[str, int] = {}

    def require(self, count: int, address: str) -> None:
        """Raise Overloaded where so many would not fit now."""
        if count > self._left or self._of.get(address, 0) + count > self._most_of_one:
            raise Overloaded

    def take(self, count: int, address: str) -> None:
        """Count bytes that came (Overloaded where they do not fit); ``give`` has to follow."""
        self.require(count, address)
        self._left -= count
        self._of[address] = self._of.get(address, 0) + count

    def give(self, count: int, address: str) -> None:
        """Count them as gone."""
        self._left += count
        self._of[address] = self._of.get(address, 0) - count
        if self._of[address] == 0:
            del self._of[address]


class AddressCounts:
    """How often each address called in this minute: with a limit this high, a window of exact times costs 8 µs a call."""

    def __init__(self, most: int, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Allow ``most`` calls a minute."""
        self._most = most
        self._monotonic = monotonic
        self._began = monotonic()
        self._counts: dict[str, int] = {}

    def note(self, address: str) -> None:
        """Count a call (RateLimited, with the rest of the minute, for one too many)."""
        age = self._monotonic() - self._began
        if age >= MINUTE_SECONDS:
            self._began, age, self._counts = self._monotonic(), 0.0, {}
        count = self._counts.get(address, 0) + 1
        if count > self._most:
            raise RateLimited(retry_after_seconds=int(MINUTE_SECONDS - age) + 1)
        self._counts[address] = count


class WebhookRoute:
    """Takes what goes to a webhook source; everything else goes to the application. Requests run at once."""

    def __init__(
        self,
        app: App,
        sources: Sources,
        verification: Verification,
        inbox: Inbox,
        rejections: Rejections,
        settings: Settings,
        metrics: Metrics,
        *,
        idle_seconds: float = IDLE_SECONDS,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        """Stand in front of ``app``. ``idle_seconds``: between two pieces of a body; ``held_bytes``: of all bodies together."""
        self._app = app
        self._idle_seconds = idle_seconds
        self._sources = sources
        self._verification = verification
        self._inbox = inbox
        self._rejections = rejections
        self._metrics = metrics
        self._public_url = settings.public_url.rstrip("/")
        self._most_bytes = settings.webhook_most_bytes
        self._held = HeldBytes(*(max(one, self._most_bytes) for one in (held_bytes, held_bytes // SHARES)))
        self._counts = AddressCounts(settings.webhooks_per_minute)
        self._trusted = tuple(settings.trusted_proxies)
        self._address = functools.lru_cache(maxsize=4096)(functools.partial(_address, trusted=self._trusted))

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:  # noqa: ANN401 - ASGI's own shapes
        """Serve one request."""
        found = None
        if scope["type"] == "http" and scope["path"].startswith(PREFIX):
            found = TARGET.fullmatch(raw_target(scope))
        if found is None:
            await self._app(scope, receive, send)
            return
        scope["path_template"] = TEMPLATE
        request = _Request(scope, receive, found[1].decode("latin-1"), (found[2] or b"").decode("latin-1"))
        try:
            answer = await self._answered(request)
        except ClientLeft:
            return
        finally:
            self._held.give(request.held, request.address)
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": False})

    async def _answered(self, request: _Request) -> Answer:
        began = time.perf_counter()
        try:
            answer = await self._served(request)
        except BrokerError as error:
            answer = _problem(error, request)
        except ClientLeft:
            raise
        except Exception as error:
            log.exception("webhook.defect", kind=type(error).__name__)
            answer = _problem(InternalError(), request)
        if request.source is not None:
            self._metrics.webhook_request(request.source.id, answer.code)
            if answer.code in {"stored", "duplicate"}:
                self._metrics.webhook_acknowledged(time.perf_counter() - began)
        return answer

    async def _served(self, request: _Request) -> Answer:
        request.address = self._address_of(request)
        self._counts.note(request.address)
        source = await self._sources.known(request.source_id)
        if source is None or not source.enabled:
            raise NotFound
        request.source = source
        if request.method not in source.webhook.methods:
            raise self._rejected(request, "method_refused")
        body = await self._body(request)
        base = source.public_url or f"{self._public_url}{PREFIX}{request.source_id}"
        received = Received(request.method, base + request.query, tuple(request.headers), body)
        judged = await self._verification.judged(source, received)
        if isinstance(judged, Refused):
            raise self._rejected(request, judged.step)
        if isinstance(judged, Reply):
            return await self._handshake(source, request, judged)
        return await self._stored(source, received, judged)

    def _address_of(self, request: _Request) -> str:
        forwarded_for = request.forwarded_for if self._trusted else None
        if forwarded_for is not None and len(forwarded_for) > LONGEST_KEPT:  # 4096 such fields would be 250 MB
            return _address(request.peer, forwarded_for, trusted=self._trusted)
        return self._address(request.peer, forwarded_for)

    async def _stored(self, source: Source, received: Received, verified: Verified) -> Answer:
        stored = await self._inbox.keep(source, received, verified)
        if verified.secret_index is not None:
            self._sources.note_used(source.secrets[verified.secret_index].id)
        return acknowledgement(source.webhook.acknowledgement, stored)

    async def _handshake(self, source: Source, request: _Request, reply: Reply) -> Answer:
        if reply.learned is not None and not await self._sources.learn(source, reply.learned):
            raise self._rejected(request, "token_mismatch")  # another request brought another secret first
        return answered(reply, "handshake")

    def _rejected(self, request: _Request, step: str) -> BrokerError:
        """Log a request that proved nothing, and return what its sender is told: the same for every step."""
        self._note_rejected(request, step)
        if step == "method_refused":
            allowed = request.source.webhook.methods if request.source is not None else ()
            return MethodNotAllowed(headers={"Allow": ", ".join(sorted(allowed))})
        if step == "key_unavailable":  # ours to mend, so the sender shall come again
            return Overloaded("The provider's keys cannot be read now", retry_after_seconds=30)
        return Unauthenticated("The request is not proven to come from the provider")

    def _note_rejected(self, request: _Request, step: str) -> None:
        if request.source is not None:
            self._rejections.note(
                Rejected(request.source.id, step, request.method, request.address or None), request.held
            )

    # The body

    async def _body(self, request: _Request) -> bytes:
        """Return all of it (PayloadTooLarge, Overloaded, InvalidRequest for one that does not come in time)."""
        if request.length is not None and request.length > self._most_bytes:
            self._note_rejected(request, "payload_too_large")
            raise PayloadTooLarge
        self._held.require(request.length or 0, request.address)
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + BODY_SECONDS
        try:
            async with asyncio.timeout_at(loop.time() + self._idle_seconds) as limit:
                body = await self._next(request)
                if request.done:
                    return body
                pieces = [body]
                while not request.done:
                    limit.reschedule(min(ends_at, loop.time() + self._idle_seconds))
                    pieces.append(await self._next(request))
        except TimeoutError:
            self._note_rejected(request, "body_incomplete")
            raise InvalidRequest("The body did not come in time") from None
        return b"".join(pieces)

    async def _next(self, request: _Request) -> bytes:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        piece: bytes = message.get("body", b"")
        request.done = not message.get("more_body", False)
        if request.held + len(piece) > self._most_bytes:
            self._note_rejected(request, "payload_too_large")
            raise PayloadTooLarge
        self._held.take(len(piece), request.address)
        request.held += len(piece)
        return piece


class _Request:
    """One request. ``held``: how many bytes of its body are counted as in memory; ``done``: all of it was read."""

    __slots__ = (
        *("address", "done", "forwarded_for", "headers", "held", "length", "method", "peer", "query", "receive"),
        *("request_id", "source", "source_id"),
    )

    def __init__(self, scope: Any, receive: Receive, source_id: str, query: str) -> None:  # noqa: ANN401
        self.headers: Fields = scope["headers"]
        self.method: str = scope["method"]
        self.source_id = source_id
        self.query = query
        self.receive = receive
        self.request_id = str(scope.get("state", {}).get("request_id", ""))
        client = scope.get("client")
        self.peer: str = client[0] if client else ""
        self.address = ""
        self.source: Source | None = None
        self.held = 0
        self.length: int | None = None
        self.done = True
        forwarded: list[str] = []
        for name, value in self.headers:
            if name == b"content-length":
                self.length, self.done = int(value), value == b"0"
            elif name == b"transfer-encoding":
                self.done = False
            elif name == b"x-forwarded-for":
                forwarded.append(value.decode("latin-1"))
        self.forwarded_for = ",".join(forwarded) if forwarded else None


def _address(peer: str, forwarded_for: str | None, *, trusted: Sequence[Network]) -> str:
    return limited_as(client_address(peer, forwarded_for, trusted))


# --- Answers: pure.


def acknowledgement(reply: Reply | None, stored: Stored) -> Answer:
    """Return the provider's own acknowledgement, or ours: 202 with the event's id and whether it was there before."""
    code = "duplicate" if stored.duplicate else "stored"
    if reply is not None:
        return answered(reply, code)
    body = msgspec.json.encode({"event_id": stored.event_id, "duplicate": stored.duplicate})
    return Answer(202, ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))), body, code)


def answered(reply: Reply, code: str) -> Answer:
    """Return a provider's reply as it is sent."""
    return Answer(reply.status, _fields(reply.status, reply.headers, reply.body), reply.body, code)


def _fields(status: int, headers: Mapping[str, str], body: bytes) -> Fields:
    own = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return own if status == 204 else (*own, (b"content-length", b"%d" % len(body)))  # RFC 9110 8.6


def _problem(error: BrokerError, request: _Request) -> Answer:
    """Return an error as it is answered; whoever is told to come again is told when."""
    body = json.dumps(problem_of(error, request.request_id)).encode()
    later = {"Retry-After": "1"} if error.status == 503 else {}
    headers = {"Content-Type": "application/problem+json", "Cache-Control": "no-store", **later, **error.headers}
    if not request.done:
        headers["Connection"] = "close"  # the rest of the body is of no use to anybody
    return Answer(error.status, _fields(error.status, headers, body), body, error.code)
