"""One connection's way out: resolve once, dial an address that was checked, and know how far the request got."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import httpcore2
import httpx2

from broker.egress.addresses import Address, may_dial, may_dial_unencrypted
from broker.errors import EgressDenied, ProviderUnavailable
from broker.settings import Network, Settings, SettingsError

Resolve: TypeAlias = Callable[[str, int], Awaitable[list[str]]]
MAX_ADDRESSES: Final = 8
DNS_SECONDS: Final = 5.0
DNS_THREADS_PER_NAME: Final = 8
CONNECT_TRY_SECONDS: Final = 2.0


class NotSent(ProviderUnavailable):
    """The request never left: no slot in time, DNS, connect or TLS failed. The outcome is known: nothing happened."""


class NoRoom(NotSent):
    """No slot came free in time: too many requests of our own run at that origin. It says nothing of the provider."""


class OutcomeUnknown(ProviderUnavailable):
    """It was, perhaps, sent, and no complete answer came: time-out, reset, a cut or malformed answer.

    ``timed_out`` tells a silent provider from one that hung up.
    """

    def __init__(self, detail: str | None = None, *, timed_out: bool = False) -> None:
        """Keep whether the deadline ended it."""
        self.timed_out = timed_out
        super().__init__(detail)


# --- From a name to addresses that were all checked.


@dataclass(frozen=True, slots=True)
class AddressGuard:
    """Finds the addresses of a host and lets them pass only when every one of them may be dialled.

    ``pinned`` maps (host, port) to addresses without asking anyone (``BROKER_EGRESS_RESOLVE``, development only); they are
    judged like any other. Calls may run at once; nothing is remembered between them.
    """

    development: bool
    allow: tuple[Network, ...]
    resolve: Resolve
    pinned: Mapping[tuple[str, int], tuple[str, ...]] = field(default_factory=dict)
    dns_seconds: float = DNS_SECONDS

    async def addresses(self, host: str, port: int, *, encrypted: bool) -> tuple[Address, ...]:
        """Resolve once, check all, and return at most 8 addresses in the order in which to try them.

        ``host`` is in the form of ``origin_of``, an IPv6 address without its brackets. Raises ``EgressDenied`` when any
        address may not be dialled, or ``encrypted`` is false where that is not allowed; ``NotSent`` when there is no
        address. What ``resolve`` itself raises passes through, as does ``TimeoutError`` after ``dns_seconds``.
        """
        if not encrypted and not self.development:
            raise EgressDenied("Only https is spoken in production")
        found = _parsed(await self._texts(host, port))
        if found is None or not all(self._admits(address, encrypted=encrypted) for address in found):
            raise EgressDenied
        if not found:
            raise NotSent("The provider's name has no address")
        return _families_in_turn(found)[:MAX_ADDRESSES]

    async def _texts(self, host: str, port: int) -> Sequence[str]:
        if _address(host) is not None:
            return [host]
        if (host, port) in self.pinned:
            return self.pinned[host, port]
        async with asyncio.timeout(self.dns_seconds):
            return await self.resolve(host, port)

    def _admits(self, address: Address, *, encrypted: bool) -> bool:
        return may_dial(address, development=self.development, allow=self.allow) and (
            encrypted or may_dial_unencrypted(address, self.allow)
        )


def _parsed(texts: Iterable[str]) -> tuple[Address, ...] | None:
    found = tuple(_address(text) for text in dict.fromkeys(texts))
    known = tuple(address for address in found if address is not None)
    return known if len(known) == len(found) else None


def _address(text: str) -> Address | None:
    """Read an address; None for anything else, and for one with a zone, which names an interface of this machine."""
    try:
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None


def _families_in_turn(addresses: Sequence[Address]) -> tuple[Address, ...]:
    """Keep the resolver's order but alternate the families, so that a dead IPv6 costs one try (RFC 8305 4)."""
    first = [address for address in addresses if address.version == addresses[0].version]
    second = [address for address in addresses if address.version != addresses[0].version]
    longest = max(len(first), len(second))
    return tuple(address for i in range(longest) for address in (*first[i : i + 1], *second[i : i + 1]))


def guard_of(settings: Settings, resolve: Resolve) -> AddressGuard:
    """Return the guard that the settings ask for; pinned names are for development only."""
    return AddressGuard(
        development=settings.development,
        allow=settings.egress_allow,
        resolve=resolve,
        pinned=_pinned(settings.egress_resolve) if settings.development else {},
    )


def _pinned(entries: Iterable[str]) -> dict[tuple[str, int], tuple[str, ...]]:
    found: dict[tuple[str, int], tuple[str, ...]] = {}
    for entry in entries:
        host, port, address = entry.split(":", 2)
        key = (host.lower(), int(port))
        found[key] = (*found.get(key, ()), address.strip("[]"))
    return found


def system_resolver(threads: ThreadPoolExecutor) -> Resolve:
    """Return the system's resolver, run in ``threads``; it raises ``OSError`` when a name does not resolve.

    A name has at most 8 threads, each taken until it really returns, whoever still waits for it: one name server that hangs
    leaves the others to the other names. Raises NotSent at once when all 8 hang; waits while they may yet answer.
    """
    names: dict[str, _Lookups] = {}

    async def resolve(host: str, port: int) -> list[str]:
        lookups = names.setdefault(host, _Lookups())
        lookups.users += 1
        try:
            return await lookups.ask(threads, host, port)
        finally:
            lookups.users -= 1
            for name in [name for name, one in names.items() if one.idle()]:
                del names[name]

    return resolve


class _Lookups:
    """The lookups of one name: who uses it, how many threads it has, and how many of those nobody waits for any more."""

    def __init__(self) -> None:
        self.users = 0
        self._free = asyncio.Semaphore(DNS_THREADS_PER_NAME)
        self._running = 0
        self._hanging = 0

    def idle(self) -> bool:
        return self.users == self._running == 0

    async def ask(self, threads: ThreadPoolExecutor, host: str, port: int) -> list[str]:
        if self._hanging >= DNS_THREADS_PER_NAME:
            raise NotSent("The provider's name server does not answer")
        await self._free.acquire()
        try:
            lookup = threads.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        except RuntimeError:  # the threads were let go
            self._free.release()
            raise
        self._running += 1
        done = self._when_done(lookup)
        try:
            rows = await asyncio.shield(done)
        except asyncio.CancelledError:
            self._leave(lookup, done)
            raise
        return [str(row[4][0]) for row in rows]

    def _when_done(self, lookup: Future[Any]) -> asyncio.Future[Any]:
        """Return the lookup as the loop sees it; the thread is given back when it returns."""
        done: asyncio.Future[Any] = asyncio.wrap_future(lookup)
        done.add_done_callback(self._give_back)
        return done

    def _give_back(self, done: asyncio.Future[Any]) -> None:
        self._running -= 1
        self._free.release()
        if not done.cancelled():
            done.exception()  # retrieved: nobody may be waiting any more

    def _leave(self, lookup: Future[Any], done: asyncio.Future[Any]) -> None:
        """Stop waiting: a lookup that has not begun is dropped, one that runs hangs until its thread returns."""
        if done.done() or lookup.cancel():
            return
        self._hanging += 1
        done.add_done_callback(self._returned)

    def _returned(self, _: asyncio.Future[Any]) -> None:
        self._hanging -= 1


# --- One request's way out.

Stage: TypeAlias = Literal["waiting", "resolving", "connecting", "securing", "ready", "sent"]
_NOT_SENT_BECAUSE: Final[Mapping[Stage, str]] = {
    "waiting": "Too many requests are waiting for this provider",
    "resolving": "The provider's name could not be resolved",
    "connecting": "No connection to the provider could be made",
    "securing": "The TLS handshake with the provider failed",
    "ready": "The request could not be sent",
}


def not_sent(stage: Stage, *, untrusted: bool = False) -> NotSent:
    """Say in our words how far the way out went (``NoRoom``: nowhere); ``untrusted``: it ended at the certificate. Pure."""
    if untrusted:
        return NotSent("The provider's certificate is not trusted or is for another name")
    return (NoRoom if stage == "waiting" else NotSent)(_NOT_SENT_BECAUSE[stage])


class Dial(httpcore2.AsyncNetworkBackend):
    """One connection attempt: resolves once, dials a checked address, and knows how far the request got.

    For one request; ``aclose`` has to follow.
    """

    def __init__(self, guard: AddressGuard, *, encrypted: bool) -> None:
        self.stage: Stage = "waiting"
        self._guard = guard
        self._encrypted = encrypted
        self._open = contextlib.AsyncExitStack()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109 - httpcore's signature; our deadline is around it all
        local_address: str | None = None,  # noqa: ARG002 - httpcore's signature
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,  # noqa: ARG002 - httpcore's signature
    ) -> httpcore2.AsyncNetworkStream:
        """Return a stream to one of the host's addresses, all of which were checked in this very call."""
        self.stage = "resolving"
        addresses = await self._guard.addresses(host, port, encrypted=self._encrypted)
        self.stage = "connecting"
        stream = await _connect_first(addresses, port)
        # httpcore drops a stream unclosed when a handshake is cancelled: close it ourselves, whatever happens
        self._open.push_async_callback(stream.aclose)
        self.stage = "ready"
        return _Wire(stream, self)

    async def aclose(self) -> None:
        """Close the connection if there is one; safe to call twice."""
        await self._open.aclose()

    def failure(self, error: Exception) -> ProviderUnavailable:
        """Say in our words what ``error`` means: nothing happened, or nobody knows. Nothing of ``error`` is quoted."""
        timed_out = isinstance(error, TimeoutError)
        if self.stage == "sent":
            said = "The provider did not answer in time" if timed_out else "The provider's answer did not come complete"
            return OutcomeUnknown(said, timed_out=timed_out)
        return not_sent(self.stage, untrusted=isinstance(error.__cause__, ssl.SSLCertVerificationError))


async def _connect_first(addresses: Sequence[Address], port: int) -> httpcore2.AsyncNetworkStream:
    """Connect to the first address that answers, with a short try for each but the last."""
    *early, last = addresses
    network = httpcore2.AnyIOBackend()
    for address in early:
        with contextlib.suppress(httpcore2.ConnectError, TimeoutError):
            async with asyncio.timeout(CONNECT_TRY_SECONDS):
                return await network.connect_tcp(str(address), port)
    return await network.connect_tcp(str(last), port)


class _Wire(httpcore2.AsyncNetworkStream):
    """A stream that tells its dial when the first byte of the request goes out (TLS's own bytes pass beneath it)."""

    def __init__(self, inner: httpcore2.AsyncNetworkStream, dial: Dial) -> None:
        self._inner = inner
        self._dial = dial

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's signature
        data = await self._inner.read(max_bytes, timeout)
        if not data:
            self._refuse_a_cut()
        return data

    def _refuse_a_cut(self) -> None:
        """Raise when TLS ended without its closing alert (RFC 9112 9.8): such an end does not end an answer."""
        secured: ssl.SSLObject | None = self._inner.get_extra_info("ssl_object")
        if secured is not None:
            secured.read(1)  # says b"" again after a proper end and raises SSLEOFError after a cut

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore's signature
        self._dial.stage = "sent"
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
    ) -> httpcore2.AsyncNetworkStream:
        self._dial.stage = "securing"
        secured = await self._inner.start_tls(ssl_context, server_hostname, timeout)
        self._dial.stage = "ready"
        return _Wire(secured, self._dial)


# --- TLS.


def tls_context(settings: Settings) -> ssl.SSLContext:
    """Trust the system's authorities, or those of ``BROKER_EGRESS_CA_FILE`` in their place; no variable is consulted.

    ``SettingsError`` when that file cannot be read.
    """
    if settings.egress_ca_file is None:
        context = httpx2.create_ssl_context(trust_env=False)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _load_authorities(context, str(settings.egress_ca_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except OSError:
        raise SettingsError("BROKER_EGRESS_CA_FILE: cannot be read as certificates in PEM form") from None
