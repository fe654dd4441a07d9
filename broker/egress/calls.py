"""The client of proxied calls: kept connections, exact bytes, and knowledge of how far each request got.

What holds for every request that leaves here:

* A name is resolved once for each dial, every address of the answer must be one that may be dialled, and exactly one of
  those addresses is dialled. The name stays in SNI and in the check of the certificate.
* The request line and the fields go out byte for byte as they were given; nothing is added, folded, decoded or sorted but
  the framing, which is made here.
* No redirect is followed, no cookie is kept, no environment variable is read, nothing is decompressed.
* An answer that could be read in two ways is none: the connection is closed and never used again.
* Whether a failed request left or not is known from the first byte written.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

from broker.egress.addresses import Address
from broker.egress.dialing import (
    CONNECT_TRY_SECONDS,
    NotSent,
    OutcomeUnknown,
    Resolve,
    Stage,
    guard_of,
    not_sent,
    system_resolver,
    tls_context,
)
from broker.egress.messages import Fields, WireRequest, request_head
from broker.egress.wire import UploadStalled, Wire, WireAnswer
from broker.errors import BrokerError
from broker.settings import Settings

__all__ = ["Calls", "Fields", "UploadStalled", "WireAnswer", "WireRequest"]

DNS_THREADS: Final = 64  # as the control plane's client has
MAX_IN_USE_PER_HOST: Final = 1024
MAX_IDLE_PER_HOST: Final = 100
MAX_IDLE: Final = 1000
MAX_IDLE_SECONDS: Final = 15.0
FRESH_SECONDS: Final = 2.0
SWEEP_SECONDS: Final = 1.0
TLS_GOODBYE_SECONDS: Final = 1.0

_Key: TypeAlias = tuple[str, str, int]


class _Host:
    """The connections to one origin: how many are in use, which are idle (the newest last), and who waits, in order."""

    def __init__(self, key: _Key, most_in_use: int) -> None:
        self.key = key
        self.most_in_use = most_in_use
        self.in_use = 0
        self.idle: list[Wire] = []
        self.waiters: deque[asyncio.Future[None]] = deque()

    async def take_slot(self) -> None:
        if self.in_use < self.most_in_use and not self.waiters:
            self.in_use += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.give_slot()
            raise

    def give_slot(self) -> None:
        """Hand the slot to whoever has waited longest, or put it back."""
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self.in_use -= 1

    def unused(self) -> bool:
        return not (self.in_use or self.idle or self.waiters)


class Calls:
    """Makes proxied calls. One for a process; calls may run at once. ``resolve`` and ``most_in_use`` are for tests.

    At most 1,024 requests run at once for each origin, as models stream for a minute; the next wait in order. Each takes a
    file descriptor, and the caller's connection another one, so a process needs more of them than the 1,024 that shells
    grant (``ulimit -n``). A connection that is complete in both directions is kept: at most 100 for each origin and 1,000
    in all, for 15 seconds or what the server grants.
    """

    def __init__(
        self, settings: Settings, *, resolve: Resolve | None = None, most_in_use: int = MAX_IN_USE_PER_HOST
    ) -> None:
        """Read the TLS authorities (``SettingsError`` when ``BROKER_EGRESS_CA_FILE`` is no good); connect nowhere."""
        self._dns_threads = ThreadPoolExecutor(DNS_THREADS, thread_name_prefix="calls-dns")
        self._tls = tls_context(settings)
        self.guard = guard_of(settings, resolve or system_resolver(self._dns_threads))
        self._hosts: dict[_Key, _Host] = {}
        self._wires: set[Wire] = set()
        self._most_in_use = most_in_use
        self._idle = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    async def open(
        self, request: WireRequest, *, connect_seconds: float, headers_seconds: float, idle_seconds: float
    ) -> WireAnswer:
        """Send a request and return its answer once the answer's head has come; 1xx answers are skipped.

        ``connect_seconds``: for the wait for a connection, DNS, dialling and TLS together. ``headers_seconds``: from the
        body's last byte (as handed to the connection's buffer) to the answer's head. ``idle_seconds``: the longest pause in
        which the upload gets nowhere; what the caller's own pieces are late by counts too, as ``UploadStalled``.
        The answer may come before the upload's end: then the upload goes on beside it until ``aclose``.

        An idempotent request that a kept connection swallowed without a byte of an answer is sent once more on a new one,
        dialled within another ``connect_seconds``.

        Raises, when nothing was sent: ``InternalError`` (a malformed request), ``NotSent`` (``NoRoom`` when no connection came
        free in time), ``EgressDenied`` (this one also
        when a second dial meets a bad address; the first sending was then idempotent and never answered). When it was,
        perhaps, sent: ``OutcomeUnknown``. What the body's iterator raises is raised as it is, the connection is closed then.
        When cancelled, the connection is closed. The iterator has ended, or is not waited upon, when this raises and when
        ``aclose`` of the answer returns; closing it is its owner's.
        """
        head = request_head(request)
        body = request.body
        again = request.idempotent and (body is None or isinstance(body, bytes))
        wire = await self._take(request, connect_seconds, stale=again)
        while True:
            answer = await self._send(wire, request, head, headers_seconds, idle_seconds, again=again)
            if answer is not None:
                return answer
            wire = await self._dial_again(request, connect_seconds)

    async def _send(
        self, wire: Wire, request: WireRequest, head: bytes, headers_seconds: float, idle_seconds: float, *, again: bool
    ) -> WireAnswer | None:
        """Return the answer, or None when a kept connection died under a request that may be sent again."""
        may_repeat = again and wire.kept
        try:
            answer = await wire.send(
                request.method,
                head,
                request.body,
                request.length,
                headers_seconds=headers_seconds,
                idle_seconds=idle_seconds,
            )
        except OutcomeUnknown as error:
            await wire.finish()
            if may_repeat and wire.untouched and not error.timed_out:
                return None
            raise
        except BaseException:
            wire.abort()
            await wire.finish()
            raise
        if wire.complete:
            wire.over()
        return answer

    async def _dial_again(self, request: WireRequest, connect_seconds: float) -> Wire:
        try:
            return await self._take(request, connect_seconds, kept=False)
        except NotSent as error:
            said = error.detail
        raise OutcomeUnknown(said)  # the first time it was, perhaps, sent

    # --- A connection: a kept one or a new one.

    async def _take(
        self, request: WireRequest, connect_seconds: float, *, stale: bool = False, kept: bool = True
    ) -> Wire:
        if self._closed:
            raise not_sent("ready")
        key = (request.scheme, request.host, request.port)
        host = self._hosts.get(key)
        if host is None:
            host = self._hosts[key] = _Host(key, self._most_in_use)
        if kept and host.in_use < host.most_in_use and not host.waiters:
            wire = self._pop_idle(host, stale=stale)
            if wire is not None:
                host.in_use += 1
                return wire
        return await self._take_slowly(host, connect_seconds, stale=stale, kept=kept)

    async def _take_slowly(self, host: _Host, connect_seconds: float, *, stale: bool, kept: bool) -> Wire:
        progress = _Progress()
        try:
            async with asyncio.timeout(connect_seconds):
                await host.take_slot()
                try:
                    wire = self._pop_idle(host, stale=stale) if kept else None
                    return wire or await self._dial(host, progress)
                except BaseException:
                    host.give_slot()
                    raise
        except BrokerError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever broke beneath, nothing was sent
            failure = not_sent(progress.stage, untrusted=isinstance(error, ssl.SSLCertVerificationError))
        finally:
            self._forget_unused(host)
        raise failure  # outside of the except block: the context of a library's error is not ours

    def _pop_idle(self, host: _Host, *, stale: bool) -> Wire | None:
        """Return the newest idle connection that may be used; ``stale``: also one that its server may just be closing."""
        while host.idle:
            wire = host.idle[-1]
            idle_seconds = _idle_seconds(wire)
            if not stale and idle_seconds >= FRESH_SECONDS:
                return None
            self._idle -= 1
            host.idle.pop()
            if idle_seconds < _keep_seconds(wire) and wire.usable():
                return wire
            wire.close()
        return None

    async def _dial(self, host: _Host, progress: _Progress) -> Wire:
        scheme, name, port = host.key
        loop = asyncio.get_running_loop()
        progress.stage = "resolving"
        addresses = await self.guard.addresses(name, port, encrypted=scheme == "https")
        progress.stage = "connecting"
        connected = await _connect_first(addresses, port)
        progress.stage = "securing" if scheme == "https" else "ready"
        wire = Wire(partial(self._exchange_over, host), partial(self._gone, host))
        try:
            if scheme == "https":
                await loop.create_connection(
                    lambda: wire,
                    sock=connected,
                    ssl=self._tls,
                    server_hostname=name,
                    ssl_shutdown_timeout=TLS_GOODBYE_SECONDS,
                )
            else:
                await loop.create_connection(lambda: wire, sock=connected)
        except BaseException:
            wire.abort()
            connected.close()
            raise
        if self._closed:
            wire.abort()
        elif wire.alive:
            self._wires.add(wire)
        return wire  # one that is closed already cannot send, and says so

    # --- What becomes of it.

    def _exchange_over(self, host: _Host, wire: Wire) -> None:
        """Keep a connection that is good for another exchange, and give its slot to the next."""
        if wire.alive:
            if len(host.idle) < MAX_IDLE_PER_HOST and self._idle < MAX_IDLE and not self._closed:
                host.idle.append(wire)
                self._idle += 1
                if self._sweeper is None:
                    self._sweeper = wire.loop.call_later(SWEEP_SECONDS, self._sweep)
            else:
                wire.close()
        host.give_slot()
        self._forget_unused(host)

    def _gone(self, host: _Host, wire: Wire) -> None:
        self._wires.discard(wire)
        if wire in host.idle:
            host.idle.remove(wire)
            self._idle -= 1
            self._forget_unused(host)

    def _forget_unused(self, host: _Host) -> None:
        if host.unused() and self._hosts.get(host.key) is host:
            del self._hosts[host.key]

    def _sweep(self) -> None:
        """Close what has idled too long; once a second while anything idles."""
        self._sweeper = None
        for host in list(self._hosts.values()):
            for wire in [wire for wire in host.idle if _idle_seconds(wire) >= _keep_seconds(wire)]:
                host.idle.remove(wire)
                self._idle -= 1
                wire.close()
            self._forget_unused(host)
        if self._idle:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    async def aclose(self) -> None:
        """Close every connection, in use or kept, and let go of what serves DNS; a new call is ``NotSent``."""
        self._closed = True
        self._dns_threads.shutdown(wait=False, cancel_futures=True)
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        ends = [wire.ended for wire in self._wires]
        for wire in list(self._wires):
            wire.abort()
        if ends:
            await asyncio.wait(ends, timeout=TLS_GOODBYE_SECONDS)


@dataclass(slots=True)
class _Progress:
    """How far a dial has got."""

    stage: Stage = "waiting"


def _idle_seconds(wire: Wire) -> float:
    return wire.loop.time() - wire.idle_since


def _keep_seconds(wire: Wire) -> float:
    return min(wire.keep_seconds, MAX_IDLE_SECONDS)


async def _connect_first(addresses: Sequence[Address], port: int) -> socket.socket:
    """Connect to the first address that answers, with a short try for each but the last."""
    *early, last = addresses
    for address in early:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_TRY_SECONDS):
                return await _connect(address, port)
    return await _connect(last, port)


async def _connect(address: Address, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    connected = socket.socket(family, socket.SOCK_STREAM)
    try:
        connected.settimeout(0)
        await asyncio.get_running_loop().sock_connect(connected, (str(address), port))
    except BaseException:
        connected.close()
        raise
    return connected
