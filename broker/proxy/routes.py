"""``ANY /proxy/{connection}[:{host}]/{path}`` as an ASGI route: the framework's own would decode and fold the path.

Everything here is about the two ends of a request: its body on the way in, its answer on the way out, a client that leaves,
a connection that is stopped meanwhile. What is decided and sent stands in ``forward``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

import structlog

from broker.activity import Activity, CallDone
from broker.credentials.in_use import InUse
from broker.credentials.snapshots import Snapshot
from broker.egress.calls import WireAnswer
from broker.errors import (
    BrokerError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    problem_of,
)
from broker.limits.room import SHARE
from broker.listening import CUT, GONE, NAMES_ITSELF, raw_target
from broker.proxy.answering import BODY, START, Limits, Passed, ReaderStalled, Send, own_fields, pass_on
from broker.proxy.fields import Rewriter
from broker.proxy.forward import IDLE_SECONDS, Forwarding
from broker.proxy.outgoing import loan_of
from broker.proxy.target import CallTarget, parse_hosted, parse_target
from broker.proxy.underway import Inbound, Underway

PREFIX: Final = b"/proxy/"
TEMPLATE: Final = "/proxy/{connection_id}/{path}"
METHOD: Final = re.compile(r"[A-Z]{1,24}")
NO_METHODS: Final = frozenset({"CONNECT", "TRACE"})
WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
KEPT_BODY_BYTES: Final = 1024**2  # a longer one is streamed, and not sent twice
SIGNED_BODY_BYTES: Final = 16 * 1024**2
WATCH_SECONDS: Final = 0.05  # most calls are over by then, and nobody had to look whether their client is still there
MOST_CALLS: Final = 2_000
log = structlog.get_logger()

Receive = Callable[[], Awaitable[Any]]
App = Callable[[Any, Any, Any], Awaitable[None]]


class ClientLeft(Exception):
    """The client closed its connection: there is nobody to answer."""


class Interruption:
    """Ends a call from outside, by cancelling its task: once, and the task knows why."""

    def __init__(self) -> None:
        """Belong to the task that runs."""
        self._task = asyncio.current_task()
        self.why: BrokerError | ClientLeft | None = None

    def stop(self, why: BrokerError | ClientLeft) -> None:
        """Cancel the task for this reason; a later one counts for nothing."""
        if self.why is None and self._task is not None:
            self.why = why
            self._task.cancel()

    def explained(self) -> BrokerError | ClientLeft | None:
        """Return why the task was cancelled, None when it was by somebody else; to be called where that was caught."""
        if self.why is not None and self._task is not None:
            self._task.uncancel()
        return self.why


class RequestBody:
    """A request's body as the server brings it: all at once or in pieces, never more than ``most_bytes``."""

    def __init__(self, receive: Receive, most_bytes: int) -> None:
        """Read nothing yet."""
        self._receive = receive
        self._most_bytes = most_bytes
        self.done = False
        self.bytes_out = 0

    async def next(self) -> bytes:
        """Return the next piece, which may be empty (ClientLeft, PayloadTooLarge); ``done`` says whether it was the last."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        piece: bytes = message.get("body", b"")
        self.done = not message.get("more_body", False)
        self.bytes_out += len(piece)
        if self.bytes_out > self._most_bytes:
            raise PayloadTooLarge
        return piece

    async def whole(self, most_bytes: int) -> bytes:
        """Return all of it (PayloadTooLarge beyond ``most_bytes``; InvalidRequest when it does not come)."""
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                while not self.done:
                    pieces.append(await self.next())
                    if self.bytes_out > most_bytes:
                        raise PayloadTooLarge
        except TimeoutError:
            raise InvalidRequest("the body did not come in time") from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield it as it comes, without empty pieces."""
        while not self.done:
            if piece := await self.next():
                yield piece


class ProxyRoute:
    """Serves proxied calls, and gives all other requests to the application behind it."""

    def __init__(
        self,
        app: App,
        forwarding: Forwarding,
        in_use: InUse,
        activity: Activity,
        *,
        public_url: str,
        proxy_domain: str | None,
        most_bytes: int,
        most_calls: int = MOST_CALLS,
    ) -> None:
        """Wrap the application. ``most_bytes``: of a body, each way; ``most_calls``: under way at once."""
        self._app = app
        self._forwarding = forwarding
        self._in_use = in_use
        self._activity = activity
        self._public_url = public_url.rstrip("/")
        self._proxy_domain = proxy_domain
        self._most_bytes = most_bytes
        self._most_calls = most_calls
        self._running = 0
        self._running_of: dict[str, int] = {}
        self._young: set[_Exchange] = set()  # begun since the last patrol
        self._older: set[_Exchange] = set()  # before it
        self._patrol: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:  # noqa: ANN401 - ASGI's own shapes
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        raw, hosted = raw_target(scope), self.is_hosted(scope["headers"])
        if not hosted and not raw.startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        scope["path_template"] = TEMPLATE
        scope["state"][NAMES_ITSELF] = True  # the upstream's X-Request-Id passes; ours has another name here
        self._running += 1
        try:
            await _Exchange(self, scope, receive, send, raw, hosted=hosted).serve()
        finally:
            self._running -= 1

    def is_hosted(self, fields: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether the Host field of a request names a connection."""
        if self._proxy_domain is None:
            return False
        suffix = b"." + self._proxy_domain.encode()
        return any(name == b"host" and value.partition(b":")[0].lower().endswith(suffix) for name, value in fields)

    # What an exchange needs

    @property
    def forwarding(self) -> Forwarding:
        """Who makes the calls."""
        return self._forwarding

    @property
    def most_bytes(self) -> int:
        """Of a body, each way."""
        return self._most_bytes

    def begun(self, exchange: _Exchange) -> None:
        """Have an exchange looked at when it lasts longer than most; ``ended`` has to follow."""
        self._young.add(exchange)
        if self._patrol is None:
            self._patrol = asyncio.get_running_loop().call_later(WATCH_SECONDS, self._look_at_young)

    def ended(self, exchange: _Exchange) -> None:
        """Look at it no more."""
        self._young.discard(exchange)
        self._older.discard(exchange)

    def _look_at_young(self) -> None:
        """Let those that are not over begin to watch: one timer for all, because most need none."""
        self._older, self._young = {one for one in self._older if not one.watch()} | self._young, set()
        again = bool(self._older) or self._running > 0
        self._patrol = asyncio.get_running_loop().call_later(WATCH_SECONDS, self._look_at_young) if again else None

    def require_room(self) -> None:
        """Raise Overloaded when too many calls are under way in this process."""
        if self._running > self._most_calls:
            raise Overloaded

    def take_room(self, caller_id: str) -> None:
        """Count a call of a caller, who may have twice what is free (Overloaded); ``give_room`` has to follow."""
        count = self._running_of.get(caller_id, 0)
        if count > SHARE * (self._most_calls - self._running):
            raise Overloaded("This caller has too many calls under way")
        self._running_of[caller_id] = count + 1

    def give_room(self, caller_id: str) -> None:
        """Count it as over."""
        self._running_of[caller_id] -= 1
        if not self._running_of[caller_id]:
            del self._running_of[caller_id]

    def target(self, scope: Any, raw: bytes, *, hosted: bool) -> CallTarget:  # noqa: ANN401
        """Return what is called (InvalidRequest, NotFound)."""
        if not hosted or self._proxy_domain is None:
            return parse_target(raw)
        found = [value for name, value in scope["headers"] if name == b"host"]
        target = parse_hosted(found[0], self._proxy_domain, raw) if len(found) == 1 else None
        if target is None:
            raise NotFound
        return target

    def rewriter(self, call: Underway, *, hosted: bool) -> Rewriter:
        """Return what turns an upstream's own URLs into ours."""
        upstream = call.upstream
        return Rewriter(
            call.ready.configured.endpoints.hosts,
            self._public_url,
            call.row.id,
            f"{upstream.scheme}://{(upstream.authority + upstream.target).decode('ascii')}",
            host=call.inbound.target.host,
            proxy_domain=self._proxy_domain if hosted else None,
        )

    def following(
        self, call: Underway, check: Callable[[Snapshot], Awaitable[None]], interruption: Interruption
    ) -> contextlib.AbstractContextManager[None]:
        """Look at the call's connection for as long as the block lasts."""
        return self._in_use.following(call.row.id, check, interruption.stop)

    @property
    def activity(self) -> Activity:
        """Who counts calls."""
        return self._activity


class _Exchange:
    """One request and its answer."""

    def __init__(
        self,
        route: ProxyRoute,
        scope: Any,  # noqa: ANN401
        receive: Receive,
        send: Send,
        raw: bytes,
        *,
        hosted: bool,
    ) -> None:
        self._route = route
        self._scope = scope
        self._receive = receive
        self._send = send
        self._raw = raw
        self._hosted = hosted
        self._headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        self._request_id = str(scope.get("state", {}).get("request_id", ""))
        self._body = RequestBody(receive, route.most_bytes)
        self._passed = Passed()
        self._caller_id = ""
        self._gone: list[Callable[[], None]] | None = scope.get(GONE)
        self._call: Underway | None = None
        self._rewriter: Rewriter | None = None
        self._interruption = Interruption()
        self._watching: asyncio.Task[None] | None = None
        self._following: contextlib.AbstractContextManager[None] | None = None
        self._began = time.monotonic()

    async def serve(self) -> None:
        """Answer the request, whatever happens; what cannot be answered any more is cut."""
        code: str | None = "cancelled"
        if self._gone is not None:  # before anything is waited for: a client that is gone by then is not told of
            self._gone.append(self._left)
        self._route.begun(self)
        try:
            code = await self._guarded()
        finally:
            self._route.ended(self)
            if self._gone is not None:
                self._gone.clear()  # it leads back here: all of a call would wait for the collector of cycles
            if self._caller_id:
                self._route.give_room(self._caller_id)
            if self._following is not None:
                self._following.__exit__(None, None, None)
            if self._watching is not None:
                self._watching.cancel()
            self._finish(code)

    async def _guarded(self) -> str | None:
        """Run; return the code of the error that ended it, None for an answer that was passed on whole."""
        try:
            await self._run()
        except asyncio.CancelledError:
            why = self._interruption.explained()
            if why is None:
                raise
            return await self._failed(why)
        except (BrokerError, ClientLeft, ReaderStalled) as error:
            return await self._failed(error)
        except Exception as error:
            log.exception("proxy.defect", kind=type(error).__name__)
            return await self._failed(InternalError())
        return None

    async def _run(self) -> None:
        forwarding, peer = self._route.forwarding, _peer_of(self._scope)
        self._route.require_room()
        method = self._scope["method"]
        head = await forwarding.head(self._headers, peer)
        self._route.take_room(head.principal.caller_id)
        self._caller_id = head.principal.caller_id
        try:
            _require_method(method)
            target = self._route.target(self._scope, self._raw, hosted=self._hosted)
            inbound = Inbound(method, target, self._headers, peer, self._request_id)
            call = self._call = await forwarding.admit(inbound, head)
            self._route.activity.entered(call.row.integration)
        except (InvalidRequest, MethodNotAllowed) as error:
            await forwarding.note_refused(head.principal, method if METHOD.fullmatch(method) else "", error.code)
            raise
        await self._take_body(call)
        answer = await forwarding.answer(call)
        try:
            await self._pass_on(call, answer)
        finally:
            await answer.aclose()

    async def _take_body(self, call: Underway) -> None:
        """Read the body if it is small or has to be signed; else let it be streamed."""
        length, coded = _framing(self._headers)
        inbound = call.inbound
        if length is not None and length > self._route.most_bytes:
            raise PayloadTooLarge
        if not length and not coded:
            inbound.body = b"" if inbound.method in WITH_BODY else None
            self._body.done = True
        elif call.plan.signer.whole_body:
            inbound.body = await self._body.whole(SIGNED_BODY_BYTES)
        elif length is not None and length <= KEPT_BODY_BYTES:
            inbound.body, inbound.length = await self._body.whole(KEPT_BODY_BYTES), length
        else:
            inbound.body, inbound.length = self._body.pieces(), length

    async def _pass_on(self, call: Underway, answer: WireAnswer) -> None:
        own = own_fields(self._request_id, attempts=call.attempts, upstream_seconds=call.upstream_seconds)
        await pass_on(
            answer,
            method=call.inbound.method,
            own=own,
            forms=loan_of(call).forms,
            rewrite=self._rewritten,
            limits=Limits(IDLE_SECONDS, self._route.most_bytes),
            send=self._send,
            passed=self._passed,
        )

    def _rewritten(self, url: bytes) -> bytes | None:
        """Return our URL for one in the answer; few answers have one."""
        if self._rewriter is None and self._call is not None:
            self._rewriter = self._route.rewriter(self._call, hosted=self._hosted)
        return None if self._rewriter is None else self._rewriter(url)

    # A client that leaves, a connection that is stopped

    def watch(self) -> bool:
        """Begin to look, now that this takes longer than most; False while there is more to look at than can be yet.

        Of a client that left the server tells; where it does not, whoever reads the body hears of it first.
        """
        if self._call is None:
            return False
        if self._following is None:
            self._following = self._route.following(self._call, self._still_may, self._interruption)
            self._following.__enter__()
        if self._gone is not None:
            return True
        if self._body.done:
            self._watching = asyncio.create_task(self._watch_client())
        return self._body.done

    def _left(self) -> None:
        self._interruption.stop(ClientLeft())

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self._left()

    async def _still_may(self, row: Snapshot) -> None:
        call = self._call
        if call is not None:
            call.principal = await self._route.forwarding.identify(self._headers, _peer_of(self._scope))
            await self._route.forwarding.require_still(call, row)

    # The end

    async def _failed(self, error: BrokerError | ClientLeft | ReaderStalled) -> str:
        if isinstance(error, ReaderStalled):
            await self._send({"type": CUT})
        if isinstance(error, (ClientLeft, ReaderStalled)):
            return "client_left"
        if self._passed.started:
            await self._send({"type": CUT})
        else:
            await self._send_problem(error)
        return error.code

    async def _send_problem(self, error: BrokerError) -> None:
        body = json.dumps(problem_of(error, self._request_id)).encode()
        call = self._call
        attempts, seconds = (call.attempts, call.upstream_seconds) if call is not None else (0, 0.0)
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            (b"x-request-id", self._request_id.encode()),
            (b"x-broker-error", error.code.encode()),
            *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
            *own_fields(self._request_id, attempts=attempts, upstream_seconds=seconds),
        ]
        if not self._body.done and any(_framing(self._headers)):
            headers.append((b"connection", b"close"))  # the rest of the body is of no use to anybody
        await self._send({"type": START, "status": error.status, "headers": headers})
        await self._send({"type": BODY, "body": body, "more_body": False})

    def _finish(self, code: str | None) -> None:
        call, seconds = self._call, time.monotonic() - self._began
        if call is None:
            return
        self._route.forwarding.finished(call, code, seconds)
        self._route.activity.left(call.row.integration)
        self._route.activity.note(
            CallDone(
                integration=call.row.integration,
                provider=call.row.provider,
                host=call.inbound.target.host,
                method=call.inbound.method,
                path=call.inbound.target.path.decode("latin-1")[:200],
                connection_id=call.row.id,
                caller_id=call.principal.caller_id,
                request_id=self._request_id,
                status=call.status if code is None else None,
                code=code,
                attempts=call.attempts,
                upstream_seconds=call.upstream_seconds,
                total_seconds=seconds,
                bytes_out=self._body.bytes_out,
                bytes_in=self._passed.bytes_in,
                rate_remaining=call.rate_remaining,
            )
        )


def _require_method(method: str) -> None:
    """Raise MethodNotAllowed for what is no method, or none of an origin server's."""
    if method in NO_METHODS or METHOD.fullmatch(method) is None:
        raise MethodNotAllowed


def _framing(headers: Sequence[tuple[bytes, bytes]]) -> tuple[int | None, bool]:
    """Return what the fields say of the body: its length, and whether it comes in chunks. The server checked both."""
    length, coded = None, False
    for name, value in headers:
        if name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            coded = True
    return length, coded


def _peer_of(scope: Any) -> str | None:  # noqa: ANN401
    client = scope.get("client")
    return client[0] if client else None
