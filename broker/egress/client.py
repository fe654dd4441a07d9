"""The client: one bounded request, a dialogue of several, or a JSON document, and what is sent and accepted in each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import httpcore2
import tenacity

from broker.egress.addresses import Target, target_of
from broker.egress.dialing import Dial, NotSent, OutcomeUnknown, Resolve, guard_of, system_resolver, tls_context
from broker.errors import BrokerError, EgressDenied, InternalError, ProviderUnavailable, UpstreamInvalid
from broker.settings import Settings
from providers.spec import Dialogue, Incoming, Outgoing, ProviderAnswerError

T = TypeVar("T")

MAX_CONNECTIONS: Final = 200
MAX_CONNECTIONS_PER_HOST: Final = 50
MAX_REQUESTS_PER_DIALOGUE: Final = 5
MAX_BODY_BYTES: Final = 1_048_576
DNS_THREADS: Final = 64  # more than one host may have in flight, so that one name server that hangs leaves room
JSON_TRIES: Final = 3
USER_AGENT: Final = "credential-broker"
JSON_KINDS: Final = "application/json, application/jwk-set+json"  # Kubernetes serves keys as nothing but the second


class _Slots:
    """How many requests run at once, for each host and in all; who waits is served in order.

    The host's own slot is taken first, so that those who wait for a slow provider hold none of the common slots.
    """

    def __init__(self, in_all: int, per_host: int) -> None:
        self._common = asyncio.Semaphore(in_all)
        self._per_host = per_host
        self._hosts: dict[str, tuple[asyncio.Semaphore, int]] = {}

    @contextlib.asynccontextmanager
    async def take(self, host: str) -> AsyncIterator[None]:
        own, users = self._hosts.get(host) or (asyncio.Semaphore(self._per_host), 0)
        self._hosts[host] = (own, users + 1)
        try:
            async with own, self._common:
                yield
        finally:
            _, users = self._hosts.pop(host)
            if users > 1:
                self._hosts[host] = (own, users - 1)


# --- The request and the answer.

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^`|~-]+")
_HEADER_VALUE: Final = re.compile(r"([!-~]([ -~]*[!-~])?)?")
_OWN_HEADERS: Final = frozenset(
    {"host", "content-length", "transfer-encoding", "accept-encoding", "connection", "keep-alive", "te", "trailer"}
    | {"upgrade", "expect", "cookie", "proxy-authorization", "proxy-connection"}
)


def _prepared(request: Outgoing, target: Target) -> httpcore2.Request:
    """Make the exact request; ``InternalError`` for a malformed one or one that sets what is ours to set."""
    names = [name.lower() for name in request.headers]
    if (
        request.method not in _METHODS
        or len(set(names)) < len(names)
        or not _OWN_HEADERS.isdisjoint(names)
        or not all(_HEADER_NAME.fullmatch(name) for name in names)
        or not all(_HEADER_VALUE.fullmatch(value) for value in request.headers.values())
    ):
        raise InternalError("The request to the provider is not well-formed; it was not sent")
    headers = {"Host": target.authority, **request.headers, "Accept-Encoding": "identity", "Connection": "close"}
    if "user-agent" not in names:
        headers["User-Agent"] = USER_AGENT
    if request.body or request.method in {"POST", "PUT", "PATCH"}:
        headers["Content-Length"] = str(len(request.body))
    url = httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path_and_query)
    return httpcore2.Request(request.method, url, headers=list(headers.items()), content=request.body)


async def _read(response: httpcore2.Response, *, max_bytes: int) -> Incoming:
    """Read the whole answer; ``UpstreamInvalid`` for one that is coded or too large, ``OutcomeUnknown`` for nonsense."""
    headers = _joined(response.headers)
    if response.status == 101 or {"content-length", "transfer-encoding"} <= headers.keys():
        raise OutcomeUnknown("The provider's answer is malformed")
    coded = headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}
    body = bytearray()
    async with contextlib.aclosing(response.aiter_stream()) as chunks:
        async for chunk in chunks:
            if coded:
                raise UpstreamInvalid("The provider's answer is compressed although that was not asked for")
            body += chunk
            if len(body) > max_bytes:
                raise UpstreamInvalid("The provider's answer is too large")
    return Incoming(response.status, headers, bytes(body))


def _joined(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Lower the names and join repeated fields by a comma (RFC 9110 5.2); cookies are left out: nobody keeps them."""
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name != "set-cookie":
            found[name] = f"{found[name]}, {value}" if name in found else value
    return found


# --- The client.


@dataclass(frozen=True, slots=True)
class _Finished(Generic[T]):
    value: T


def _step(dialogue: Dialogue[T], answer: Incoming | None) -> Outgoing | _Finished[T]:
    """Move a provider's generator on by one step; ``UpstreamInvalid`` when it refuses the answer."""
    try:
        return next(dialogue) if answer is None else dialogue.send(answer)
    except StopIteration as done:
        return _Finished(done.value)
    except ProviderAnswerError as error:
        refusal = str(error)
    raise UpstreamInvalid(refusal)  # outside of the except block: the error's context may hold the provider's text


class Egress:
    """Makes requests to providers. One for a process; calls may run at once. ``resolve`` is for tests.

    ``resolve(host, port)`` returns addresses as text; by default it is the system's, in threads of its own.
    """

    def __init__(self, settings: Settings, *, resolve: Resolve | None = None) -> None:
        """Read the TLS authorities (``SettingsError`` when ``BROKER_EGRESS_CA_FILE`` is no good); connect nowhere."""
        self._dns_threads = ThreadPoolExecutor(DNS_THREADS, thread_name_prefix="egress-dns")
        self._tls = tls_context(settings)
        self._slots = _Slots(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_HOST)
        self.guard = guard_of(settings, resolve or system_resolver(self._dns_threads))
        for name in ("httpx2", "httpcore2"):  # they log URLs with their queries at INFO and headers at DEBUG
            logging.getLogger(name).setLevel(logging.WARNING)

    async def send(
        self, request: Outgoing, *, timeout_seconds: float = 10.0, max_bytes: int = MAX_BODY_BYTES
    ) -> Incoming:
        """Send one request and return the whole answer, whatever its status; a redirect is returned, not followed.

        ``timeout_seconds`` is for everything, from waiting for a slot to the last byte. Repeated fields of the answer are
        joined by a comma, ``Set-Cookie`` is left out. Whether the URL's origin is one of the pinned ones is not checked.

        Raises, when nothing was sent: ``EgressDenied`` (URL, scheme or address), ``InternalError`` (the request itself is
        malformed), ``NotSent``. When it was, perhaps, sent: ``OutcomeUnknown``. When the provider did answer, but with
        something coded or over ``max_bytes``: ``UpstreamInvalid``; what it did is then unknown just the same. A
        cancellation tells nothing: treat it like ``OutcomeUnknown``.
        """
        target = _allowed_target(request.url)
        prepared = _prepared(request, target)
        dial = Dial(self.guard, encrypted=target.scheme == "https")
        try:
            async with asyncio.timeout(timeout_seconds), self._slots.take(target.authority):
                return await self._exchange(prepared, dial, max_bytes=max_bytes)
        except BrokerError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever broke beneath, the caller must learn if the request left
            failure = dial.failure(error)
        raise failure  # outside of the except block: the context of a library's error can quote headers and bodies

    async def _exchange(self, request: httpcore2.Request, dial: Dial, *, max_bytes: int) -> Incoming:
        connection = httpcore2.AsyncHTTPConnection(request.url.origin, self._tls, network_backend=dial)
        try:
            return await _read(await connection.handle_async_request(request), max_bytes=max_bytes)
        finally:
            await dial.aclose()

    async def converse(self, dialogue: Dialogue[T], *, origins: Collection[str], timeout_seconds: float = 10.0) -> T:
        """Drive a provider's generator to its end and return its value; the generator is closed in any case.

        ``origins``: URLs or origins; a request to any other origin is ``EgressDenied``, none allow nothing.
        ``timeout_seconds`` is for the whole dialogue. Raises as ``send`` does, but ``NotSent`` only for the first request
        (after that something has happened: ``OutcomeUnknown``); ``UpstreamInvalid`` when the provider's function refuses
        the answer or wants a sixth request.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        with contextlib.closing(dialogue):
            allowed = {_allowed_target(origin).origin for origin in origins}
            answer: Incoming | None = None
            asked = 0
            while not isinstance(step := _step(dialogue, answer), _Finished):
                if asked == MAX_REQUESTS_PER_DIALOGUE:
                    raise UpstreamInvalid("The provider's answers led to too many requests")
                if _allowed_target(step.url).origin not in allowed:
                    raise EgressDenied("The provider's function asked for an origin that is not pinned")
                answer = await self._next_answer(step, deadline, first=asked == 0)
                asked += 1
            return step.value

    async def _next_answer(self, request: Outgoing, deadline: float, *, first: bool) -> Incoming:
        remaining = deadline - asyncio.get_running_loop().time()
        try:
            return await self.send(request, timeout_seconds=remaining)
        except NotSent as error:
            if first:
                raise
            said = error.detail
        raise OutcomeUnknown(said)

    async def get_json(self, url: str, *, timeout_seconds: float = 10.0, max_bytes: int = MAX_BODY_BYTES) -> Any:  # noqa: ANN401 - JSON is any shape until it is checked
        """Fetch a document by GET and return its JSON; for discovery, JWKS and the like.

        Tried at most 3 times within ``timeout_seconds``, with full jitter between: a GET may be repeated after any failure
        to answer, a 429 or a 5xx. Raises ``ProviderUnavailable`` when it stays so, ``UpstreamInvalid`` for any status but
        200 and for what is not JSON, else as ``send``. Neither media type nor shape is checked.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        request = Outgoing("GET", url, {"Accept": JSON_KINDS})
        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ProviderUnavailable),
            stop=tenacity.stop_after_attempt(JSON_TRIES) | tenacity.stop_before_delay(timeout_seconds),
            wait=tenacity.wait_random_exponential(multiplier=0.25, max=2),
            reraise=True,
        )
        answer: Incoming = await tries(self._get, request, deadline, max_bytes)
        return _json(answer)

    async def _get(self, request: Outgoing, deadline: float, max_bytes: int) -> Incoming:
        remaining = deadline - asyncio.get_running_loop().time()
        answer = await self.send(request, timeout_seconds=remaining, max_bytes=max_bytes)
        if answer.status == 429 or answer.status >= 500:
            raise ProviderUnavailable("The provider answered that it cannot serve this now")
        if answer.status != 200:
            raise UpstreamInvalid("The provider did not serve the document")
        return answer

    async def aclose(self) -> None:
        """Let go of the DNS threads. Requests under way go on; a new one that needs DNS is ``NotSent``."""
        self._dns_threads.shutdown(wait=False, cancel_futures=True)


def _json(answer: Incoming) -> Any:  # noqa: ANN401 - JSON is any shape until it is checked
    with contextlib.suppress(ProviderAnswerError):
        return answer.json()
    raise UpstreamInvalid("The provider's document is not JSON")


def _allowed_target(url: str) -> Target:
    with contextlib.suppress(ValueError):
        return target_of(url)
    raise EgressDenied("The target's URL is not in its plain form")
