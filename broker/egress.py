"""The only place that makes outbound clients: one guarded, bounded connection for each request to a provider.

What holds for every request that leaves here:

* A name is resolved once for each connection, every address of the answer must be one that may be dialled, and exactly one
  of those addresses is dialled. The name stays in ``Host``, in SNI and in the check of the certificate.
* https with TLS 1.2 or newer; http only in development and only to loopback or an excepted address.
* No redirect is followed, no cookie is kept, no environment variable is read, no coded (compressed) body is accepted.
* One deadline covers the waiting for a slot, DNS, connecting, TLS, sending and the whole answer.
* Whether a failed request left or not is known from the first byte written, not guessed from an exception's type.

A connection serves one request and is closed. Keeping it would save a handshake, but a server may close an idle connection
in the moment in which the next request is written, and then nobody knows whether a refresh token was spent. Control-plane
calls are few; knowing is worth more. It also makes "each request re-checks its address" true by construction.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

import httpcore2
import httpx2
import idna
import tenacity

from broker.errors import BrokerError, EgressDenied, InternalError, ProviderUnavailable, UpstreamInvalid
from broker.settings import Network, Settings, SettingsError
from providers.spec import Dialogue, Incoming, Outgoing, ProviderAnswerError

T = TypeVar("T")
Address: TypeAlias = IPv4Address | IPv6Address
AddressKind: TypeAlias = Literal["public", "loopback", "private", "link_local", "metadata", "multicast", "reserved"]
Resolve: TypeAlias = Callable[[str, int], Awaitable[list[str]]]

MAX_CONNECTIONS: Final = 200
MAX_CONNECTIONS_PER_HOST: Final = 50
MAX_REQUESTS_PER_DIALOGUE: Final = 5
MAX_ADDRESSES: Final = 8
MAX_BODY_BYTES: Final = 1_048_576
DNS_SECONDS: Final = 5.0
DNS_THREADS: Final = 64  # more than one host may have in flight, so that one name server that hangs leaves room
CONNECT_TRY_SECONDS: Final = 2.0
JSON_TRIES: Final = 3
USER_AGENT: Final = "credential-broker"


class NotSent(ProviderUnavailable):
    """The request never left: no slot in time, DNS, connect or TLS failed. The outcome is known: nothing happened."""


class OutcomeUnknown(ProviderUnavailable):
    """It was, perhaps, sent, and no complete answer came: time-out, reset, a cut or malformed answer.

    ``timed_out`` tells a silent provider from one that hung up.
    """

    def __init__(self, detail: str | None = None, *, timed_out: bool = False) -> None:
        """Keep whether the deadline ended it."""
        self.timed_out = timed_out
        super().__init__(detail)


# --- Which addresses may be dialled: our own table, because ``is_global`` changes between Python versions and is true for
# 168.63.129.16. Source: IANA's special-purpose registries (RFC 6890) and the clouds' documentation. First match wins.

_METADATA: Final = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254",  # AWS, Azure, Google, OpenStack, Oracle, DigitalOcean
        "169.254.169.253",  # AWS: DNS of the VPC
        "169.254.170.2",  # AWS: credentials of ECS tasks
        "169.254.170.23",  # AWS: EKS pod identity
        "169.254.42.42",  # Scaleway
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure: WireServer, a public address
        "192.0.0.192",  # Oracle
        "fd00:ec2::254",  # AWS
        "fd00:ec2::253",
        "fd00:ec2::23",
        "fd20:ce::254",  # Google
        "fd00:c1::a9fe:a9fe",  # Oracle
        "fd00:42::42",  # Scaleway
        "fe80::a9fe:a9fe",  # OpenStack
    )
)
_TABLE: Final[tuple[tuple[str, AddressKind], ...]] = (
    ("0.0.0.0/8", "reserved"),  # "this host": Linux connects to itself
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "private"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link_local"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "reserved"),
    ("192.0.2.0/24", "reserved"),
    ("192.31.196.0/24", "reserved"),
    ("192.52.193.0/24", "reserved"),
    ("192.88.99.0/24", "reserved"),
    ("192.168.0.0/16", "private"),
    ("192.175.48.0/24", "reserved"),
    ("198.18.0.0/15", "reserved"),
    ("198.51.100.0/24", "reserved"),
    ("203.0.113.0/24", "reserved"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
    ("0.0.0.0/0", "public"),
    ("::1/128", "loopback"),
    ("fc00::/7", "private"),
    ("fec0::/10", "private"),
    ("fe80::/10", "link_local"),
    ("ff00::/8", "multicast"),
    ("2001::/23", "reserved"),  # Teredo, ORCHID, benchmarking, protocol assignments
    ("2001:db8::/32", "reserved"),
    ("2620:4f:8000::/48", "reserved"),
    ("3fff::/20", "reserved"),
    ("2000::/3", "public"),
    ("::/0", "reserved"),
)
_SPECIAL: Final = tuple((ipaddress.ip_network(text), kind) for text, kind in _TABLE)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64: Final = ipaddress.IPv6Network("64:ff9b:1::/48")
_SIX_TO_FOUR: Final = ipaddress.IPv6Network("2002::/16")
_TEREDO: Final = ipaddress.IPv6Network("2001::/32")
_LOW_32_BITS: Final = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96")))


def classify(address: Address) -> AddressKind:
    """Say what kind of network ``address`` is in, by our own table. Pure.

    An IPv4-mapped address is judged as the IPv4 address. One that a translator or a relay turns into an IPv4 address
    (NAT64's well-known prefix, 6to4) has that address's kind, except that the far side's loopback is not ours: reserved.
    """
    address = _unmapped(address)
    if address in _METADATA:
        return "metadata"
    if isinstance(address, IPv6Address) and (address in _NAT64 or address in _SIX_TO_FOUR):
        kind = classify(_embedded(address)[0])
        return "reserved" if kind == "loopback" else kind
    return next(kind for network, kind in _SPECIAL if address in network)


def may_dial(address: Address, *, development: bool, allow: Sequence[Network]) -> bool:
    """Say whether a connection to ``address`` may be opened. Pure.

    Public: yes. Loopback: in development. Anything else: only inside a network of ``allow``, and where the address carries
    an IPv4 address (NAT64, 6to4, Teredo, compatible, translated), that one too must be public or in ``allow``. A metadata
    address opens only to an exception that names exactly it, so that ``fd00::/8`` does not open AWS's. The local-use NAT64
    prefix (RFC 8215) never does: where it keeps the IPv4 address is the operator's secret.
    """
    address = _unmapped(address)
    kind = classify(address)
    if kind == "public" or (kind == "loopback" and development):
        return True
    if address in _LOCAL_NAT64:
        return False
    if kind == "metadata" and _embedded(address) == ():
        return any(network.num_addresses == 1 and address in network for network in allow)
    return any(address in network for network in allow) and all(
        may_dial(inner, development=False, allow=allow) for inner in _embedded(address)
    )


def _may_dial_unencrypted(address: Address, allow: Sequence[Network]) -> bool:
    address = _unmapped(address)
    return classify(address) == "loopback" or any(address in network for network in allow)


def _unmapped(address: Address) -> Address:
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _embedded(address: Address) -> tuple[IPv4Address, ...]:
    if not isinstance(address, IPv6Address) or address == ipaddress.IPv6Address("::1"):
        return ()
    bits = int(address)
    if address in _SIX_TO_FOUR:
        return (IPv4Address(bits >> 80 & 0xFFFFFFFF),)
    if address in _TEREDO:
        return (IPv4Address(bits >> 64 & 0xFFFFFFFF), IPv4Address(~bits & 0xFFFFFFFF))
    if any(address in network for network in _LOW_32_BITS):
        return (IPv4Address(bits & 0xFFFFFFFF),)
    return ()


# --- Reading a URL: one strict grammar, so that no second parser can see another host in it.

_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::(?P<port>[1-9][0-9]{0,4}))?"
    r'(?P<target>[/?][!"$-\[\]-~]*)?',
    re.ASCII | re.IGNORECASE,
)
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class _Target:
    scheme: str
    host: str
    port: int
    path_and_query: str = field(repr=False)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def origin_of(url: str) -> str:
    """Return ``scheme://host[:port]`` of an absolute http(s) URL: lower case, without the default port. Pure.

    ``ValueError``, which does not quote the URL, for anything that two parsers could read in two ways: user information, an
    empty host, a backslash, white space, a fragment, any non-ASCII letter, a malformed A-label, a trailing dot, or a host
    that looks like a number without being a canonical address (2130706433, 0x7f000001, 127.1). Whether the address behind
    the host may be dialled is not checked here.
    """
    target = _target_of(url)
    return f"{target.scheme}://{target.authority}"


def _target_of(url: str) -> _Target:
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("not an absolute http(s) URL in its plain form")
    scheme = match["scheme"].lower()
    port = int(match["port"]) if match["port"] else _DEFAULT_PORTS[scheme]
    if port > 65535:
        raise ValueError("the port is out of range")
    rest = match["target"] or "/"
    return _Target(scheme, _host(match["host"].lower()), port, rest if rest.startswith("/") else f"/{rest}")


def _host(host: str) -> str:
    if host.startswith("["):
        try:
            return str(IPv6Address(host[1:-1]))
        except ValueError:
            raise ValueError("the host is not an IPv6 address") from None
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("the host is not a plain name")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise ValueError("the host looks like a number") from None
    for label in labels:
        if label.startswith("xn--"):
            _check_a_label(label)
    return host


def _check_a_label(label: str) -> None:
    try:
        idna.ulabel(label)
    except idna.IDNAError:
        raise ValueError("the host has a malformed A-label") from None


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
        if _is_literal(host):
            return [host]
        if (host, port) in self.pinned:
            return self.pinned[host, port]
        async with asyncio.timeout(self.dns_seconds):
            return await self.resolve(host, port)

    def _admits(self, address: Address, *, encrypted: bool) -> bool:
        return may_dial(address, development=self.development, allow=self.allow) and (
            encrypted or _may_dial_unencrypted(address, self.allow)
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


def _is_literal(host: str) -> bool:
    return _address(host) is not None


def _families_in_turn(addresses: Sequence[Address]) -> tuple[Address, ...]:
    """Keep the resolver's order but alternate the families, so that a dead IPv6 costs one try (RFC 8305 4)."""
    first = [address for address in addresses if address.version == addresses[0].version]
    second = [address for address in addresses if address.version != addresses[0].version]
    longest = max(len(first), len(second))
    return tuple(address for i in range(longest) for address in (*first[i : i + 1], *second[i : i + 1]))


def _pinned(entries: Iterable[str]) -> dict[tuple[str, int], tuple[str, ...]]:
    found: dict[tuple[str, int], tuple[str, ...]] = {}
    for entry in entries:
        host, port, address = entry.split(":", 2)
        key = (host.lower(), int(port))
        found[key] = (*found.get(key, ()), address.strip("[]"))
    return found


# --- One request's way out.

Stage = Literal["waiting", "resolving", "connecting", "securing", "ready", "sent"]
_NOT_SENT_BECAUSE: Final[Mapping[Stage, str]] = {
    "waiting": "Too many requests are waiting for this provider",
    "resolving": "The provider's name could not be resolved",
    "connecting": "No connection to the provider could be made",
    "securing": "The TLS handshake with the provider failed",
    "ready": "The request could not be sent",
}


class _Dial(httpcore2.AsyncNetworkBackend):
    """One connection attempt: resolves once, dials a checked address, and knows how far the request got."""

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
        if isinstance(error.__cause__, ssl.SSLCertVerificationError):
            return NotSent("The provider's certificate is not trusted or is for another name")
        return NotSent(_NOT_SENT_BECAUSE[self.stage])


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

    def __init__(self, inner: httpcore2.AsyncNetworkStream, dial: _Dial) -> None:
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


def _prepared(request: Outgoing, target: _Target) -> httpcore2.Request:
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


# --- TLS.


def _tls_context(settings: Settings) -> ssl.SSLContext:
    """Trust the system's authorities, or those of ``BROKER_EGRESS_CA_FILE`` in their place; no variable is consulted."""
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
        self._tls = _tls_context(settings)
        self._slots = _Slots(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_HOST)
        self.guard = AddressGuard(
            development=settings.development,
            allow=settings.egress_allow,
            resolve=resolve or functools.partial(_system_resolve, self._dns_threads),
            pinned=_pinned(settings.egress_resolve) if settings.development else {},
        )
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
        dial = _Dial(self.guard, encrypted=target.scheme == "https")
        try:
            async with asyncio.timeout(timeout_seconds), self._slots.take(target.authority):
                return await self._exchange(prepared, dial, max_bytes=max_bytes)
        except BrokerError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever broke beneath, the caller must learn if the request left
            failure = dial.failure(error)
        raise failure  # outside of the except block: the context of a library's error can quote headers and bodies

    async def _exchange(self, request: httpcore2.Request, dial: _Dial, *, max_bytes: int) -> Incoming:
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
            allowed = {_allowed_origin(origin) for origin in origins}
            answer: Incoming | None = None
            asked = 0
            while not isinstance(step := _step(dialogue, answer), _Finished):
                if asked == MAX_REQUESTS_PER_DIALOGUE:
                    raise UpstreamInvalid("The provider's answers led to too many requests")
                if _allowed_origin(step.url) not in allowed:
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
        request = Outgoing("GET", url, {"Accept": "application/json"})
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


async def _system_resolve(threads: ThreadPoolExecutor, host: str, port: int) -> list[str]:
    ask = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    rows = await asyncio.get_running_loop().run_in_executor(threads, ask)
    return [str(row[4][0]) for row in rows]


def _json(answer: Incoming) -> Any:  # noqa: ANN401 - JSON is any shape until it is checked
    with contextlib.suppress(ProviderAnswerError):
        return answer.json()
    raise UpstreamInvalid("The provider's document is not JSON")


def _allowed_target(url: str) -> _Target:
    with contextlib.suppress(ValueError):
        return _target_of(url)
    raise EgressDenied("The target's URL is not in its plain form")


def _allowed_origin(url: str) -> str:
    target = _allowed_target(url)
    return f"{target.scheme}://{target.authority}"
