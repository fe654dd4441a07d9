"""What every request passes first and last, and the short ways of the data planes past everything that they do not need."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from broker.api.lean import ExpressLane
from broker.errors import Overloaded
from broker.listening import NAMES_ITSELF, Exchange, Lane
from broker.proxy.routes import PREFIX as PROXIED
from broker.proxy.routes import ProxyRoute
from broker.telemetry import Metrics, access_line
from broker.tracing import trace_context
from broker.webhooks.routes import PREFIX, WebhookRoute

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,128}")
WEBHOOK = PREFIX.encode("ascii")

Fields = Sequence[tuple[bytes, bytes]]


class Lanes:
    """Finds who serves a request of a data plane, without asking the others: 15 µs of each hand-out, call and webhook.

    What is found serves as the whole application would, but for request id, log line and metrics.
    """

    def __init__(self, express: ExpressLane, proxy: ProxyRoute | None, webhooks: WebhookRoute | None) -> None:
        """Have the routes that the application has, None for those that it has not."""
        self._express = express
        self._proxy = proxy
        self._webhooks = webhooks

    def find(self, method: bytes, target: bytes, fields: Fields) -> Lane | None:
        """Return who serves a request, None where that has to be found out in the application's own way."""
        if self._webhooks is not None and target.startswith(WEBHOOK):
            return _of(self._webhooks)
        if self._proxy is not None and (target.startswith(PROXIED) or self._proxy.is_hosted(fields)):
            return _of(self._proxy)
        return self._express.lane(method, target, fields)


def _of(route: ProxyRoute | WebhookRoute) -> Lane:
    return lambda exchange: route(exchange.scope, exchange.receive, exchange.send)


class Edge:
    """Request id, log line, metrics: for an ASGI server, and for ours, which finds lanes here."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        lanes: Lanes,
        refuse: Callable[[Any, Any, Overloaded], Awaitable[None]],
    ) -> None:
        """Wrap the application. ``refuse`` answers (scope, send, error) where a lane found no room."""
        self._app = app
        self._metrics = metrics
        self._lanes = lanes
        self._refuse = refuse

    def lane(self, method: bytes, target: bytes, fields: Fields) -> Lane | None:
        """Return what serves a request past the application's layers, answering the same; None where nothing does."""
        found = self._lanes.find(method, target, fields)
        return None if found is None else lambda exchange: self._serve(found, exchange)

    async def _serve(self, lane: Lane, exchange: Exchange) -> None:
        scope: Any = exchange.scope
        named, started = _named(scope), time.monotonic()
        request_id = named["request_id"]
        scope["state"]["request_id"], exchange.request_id = request_id, request_id.encode("ascii")
        structlog.contextvars.bind_contextvars(**named)  # of this task, which ends with the request
        try:
            await lane(exchange)
        except Overloaded as error:
            await self._refuse(scope, exchange.send, error)
        finally:
            self._note(scope, exchange.status, time.monotonic() - started, named)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":  # type: ignore[comparison-overlap] # the framework's enumeration is of strings
            await self._app(scope, receive, send)
            return
        named, started, status = _named(scope), time.monotonic(), 500
        scope.setdefault("state", {})["request_id"] = named["request_id"]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if message["type"] == "http.response.start" and NAMES_ITSELF not in scope["state"]:
                message["headers"] = [*message["headers"], (b"x-request-id", named["request_id"].encode())]
            await send(message)

        bound = structlog.contextvars.bind_contextvars(**named)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._note(scope, status, time.monotonic() - started, named)
            structlog.contextvars.reset_contextvars(**bound)

    def _note(self, scope: Any, status: int, seconds: float, named: Mapping[str, str]) -> None:  # noqa: ANN401
        """Write the access log line and count: the route's template and no query, because URLs carry codes."""
        template = str(scope.get("path_template") or "unknown")
        method = str(scope.get("method"))
        self._metrics.http_request(template, method, status, seconds)
        access_line(method, template, status, seconds, named["request_id"], trace_id=named.get("trace_id"))


def _named(scope: Any) -> dict[str, str]:  # noqa: ANN401 - ASGI's own shape
    """Return what names a request in log lines: an id, and the trace that a well-formed ``traceparent`` says it is of."""
    request_id, traced = None, False
    for name, value in scope["headers"]:
        if name == b"x-request-id" and request_id is None and REQUEST_ID.fullmatch(text := value.decode("latin-1")):
            request_id = text
        elif name == b"traceparent":
            traced = True
    named = {"request_id": request_id or f"req_{random.getrandbits(104):026x}"}  # no secret: another one, and cheap
    context = trace_context(scope["headers"]) if traced else None
    return named if context is None else {**named, "trace_id": context.parent[3:35].decode("ascii")}
