"""The only place where things are wired: settings → parts → the application."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog
from litestar import Litestar, MediaType, Response, Router, get
from litestar.connection import Request
from litestar.datastructures import ResponseHeader, State
from litestar.di import Provide
from litestar.enums import HttpMethod
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.routes import HTTPRoute
from litestar.types import Receive, Scope, Send

import broker.api.activity
import broker.api.audit
import broker.api.callers
import broker.api.connections
import broker.api.deliveries
import broker.api.device_flows
import broker.api.events
import broker.api.integrations
import broker.api.keys
import broker.api.providers
import broker.api.revocations
import broker.api.sessions
import broker.api.subjects
import broker.api.subscriptions
import broker.api.token_exchange
import broker.api.webhook_keys
import broker.api.webhook_sources
import broker.callers.routes
import broker.oauth.routes
import broker.web.console.routes
import broker.web.routes
from broker import __version__
from broker.activity import sweep as sweep_activity
from broker.api import answers
from broker.api.lean import ExpressLane
from broker.api.requests import (
    MAX_BODY_BYTES,
    Authentication,
    Idempotency,
    also,
    field_error,
    principal_of,
    shown_name,
    strict_request,
)
from broker.audit import Audit, open_audit
from broker.background_refresh import BackgroundRefresh
from broker.callers import Callers
from broker.callers.exchange import LONGEST_SECONDS
from broker.callers.opening import CallerParts, open_callers
from broker.callers.upkeep import Upkeep
from broker.client_secrets import Canaries
from broker.connections import Connections
from broker.credentials import Credentials
from broker.database import Database, PostgresDatabase, SqliteDatabase, open_database
from broker.edge import Edge, Lanes
from broker.egress import Egress
from broker.errors import (
    BrokerError,
    FieldError,
    FlowError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    UnsupportedMediaType,
    problem_of,
)
from broker.gauges import EVERY_SECONDS, measure
from broker.health import cached_readiness
from broker.integrations import Integrations
from broker.limits import AddressLimiter, Room, client_address, limited_as
from broker.limits.doors import MOST_BUSY, MOST_REQUESTS, Doors
from broker.listening import COUNT_REFUSED, LEAVING, Lane
from broker.oauth.confirm import Confirmations
from broker.oauth.device import DeviceFlows
from broker.oauth.flow import Flows, Outcome
from broker.proxy.opening import ProxyParts, open_proxy
from broker.refresh import CONFIRM_SECONDS
from broker.replicas import Replicas
from broker.revocations import Revocations
from broker.rotation import Rotations
from broker.rotation.data import DataKeys
from broker.rotation.encryption import EncryptionKeys
from broker.rotation.system import SystemKeyClass
from broker.sessions import Sessions
from broker.settings import Settings, SettingsError, load_settings
from broker.stopping import NOT_READY, Stopping
from broker.telemetry import Metrics, configure_logging, new_metrics, render
from broker.tracing.logs import sending_logs
from broker.vault import Store, open_server, open_vault, open_wrapping
from broker.vault.cache import CachedVault
from broker.vault.keyring import Sealer, Wrapping, open_sealer
from broker.vault.system_keys import SystemKeys
from broker.vault.timed import TimedVault
from broker.web.console.sessions import ConsoleSessions
from broker.web.pages import Pages
from broker.webhooks.opening import Given, WebhookParts, open_webhooks
from broker.worker import Job, Worker
from providers import load_catalog
from providers.spec import Secret

GARBAGE_THRESHOLD = 20_000
# How long the thread that commits waits for the interpreter while the event loop has it, each of the five times that it needs
# it for a group: with the interpreter's own 5 ms the slowest hundredth of calls waited twice as long.
SWITCH_SECONDS = 0.0005
CLIENT_LEFT = "client disconnected prematurely"  # how the framework says so, as an error of the server
DAY_SECONDS = 86_400.0
# How long at most what a root key made is good; None: for ever, so that key is never retired.
LIVES = {"webhook-signing": DAY_SECONDS, "jwt-signing": LONGEST_SECONDS, "session": DAY_SECONDS, "audit": None}
BROWSER_PATHS = ("/oauth/", "/connect", "/console")
BROWSER_RATES = {
    "start": "120/minute",
    "callback": "240/minute",
    "connect": "240/minute",
    "console": "240/minute",
    "console_log_in": "10/minute",
}
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that lives as long as the process, made once and passed in."""

    settings: Settings
    database: Database
    sealer: Sealer
    vault: Store
    audit: Audit
    egress: Egress
    callers: Callers
    caller_upkeep: Upkeep
    integrations: Integrations
    sessions: Sessions
    credentials: Credentials
    confirmations: Confirmations
    flows: Flows
    device_flows: DeviceFlows
    connections: Connections
    metrics: Metrics
    limiter: AddressLimiter
    pages: Pages
    wrapping: Wrapping
    replicas: Replicas
    session_keys: SystemKeys
    rotations: Rotations
    canaries: Canaries
    revocations: Revocations
    webhooks: WebhookParts
    proxy: ProxyParts | None = None  # where this process serves it


@contextlib.asynccontextmanager
async def open_parts(
    settings: Settings, *, confirm_seconds: float = CONFIRM_SECONDS, counters: Metrics | None = None
) -> AsyncIterator[Parts]:
    """Open everything in order, and close it in reverse: refreshes finish, leases go back, the audit is flushed.

    ``confirm_seconds``: see ``Credentials``. ``counters``: what counts, where something counted before.
    Raises SettingsError for a wrong setting (a key that is missing or differs too), DatabaseUnavailable.
    """
    async with contextlib.AsyncExitStack() as stack:
        server = await open_server(settings)
        if server is not None:
            stack.push_async_callback(server.aclose)
        keyring = await open_wrapping(settings, server)
        database = database_of(settings)
        stack.push_async_callback(database.aclose)
        await database.migrate()
        sealer = await open_sealer(database, keyring)
        counters = counters or new_metrics()
        store = TimedVault(await open_vault(settings, database, sealer, server), counters.vault_answer)
        vault = CachedVault(store, seconds=settings.secret_cache_seconds)
        audit = await open_audit(database, sealer, settings, on_failure=counters.audit_failure, vault=vault)
        counters.audit_copies_failing.set_function(lambda: audit.failing_copies)
        stack.push_async_callback(audit.aclose)
        egress = Egress(settings)
        stack.push_async_callback(egress.aclose)
        replicas = Replicas(database, sealer, keyring, on_revocation=(vault.clear,))
        root_keys = await _root_keys(database, sealer, replicas, audit)
        of_callers = (settings, database, sealer, root_keys["jwt-signing"], audit, egress, counters)
        callers = await stack.enter_async_context(open_callers(*of_callers))
        replicas.watch(callers.row_keys)
        of_keys = (sealer, vault, keyring, replicas, root_keys)
        of_all = (settings, database, audit, egress, counters)
        of_credentials = await stack.enter_async_context(_credential_parts(of_all, of_keys, confirm_seconds))
        given = Given(*of_all, sealer, vault, callers.callers, *of_credentials, root_keys["webhook-signing"])
        webhooks = await stack.enter_async_context(open_webhooks(given))
        parts = _assembled(of_all, of_keys, callers, of_credentials, webhooks)
        stack.push_async_callback(parts.connections.aclose)
        if settings.admin_key is not None:
            await callers.callers.ensure_admin(Secret(settings.admin_key.reveal()))
        await parts.integrations.create_from_settings()
        if "private" in settings.routes:
            of_proxy = (settings, database, callers.callers, parts.integrations, parts.credentials, audit, counters)
            proxy = await stack.enter_async_context(open_proxy(*of_proxy))
            parts = replace(parts, proxy=proxy)
        yield parts


async def _root_keys(database: Database, sealer: Sealer, replicas: Replicas, audit: Audit) -> dict[str, SystemKeys]:
    """Return the root keys of each purpose that is rotated, loaded, and watched by this process's heartbeat."""
    found = {one: SystemKeys(database, sealer, one) for one in LIVES}
    found["audit"] = audit.system_keys  # the very ones that it writes with
    for keys in found.values():
        await keys.load()
        replicas.watch(keys)
    return found


def _rotations(
    database: Database, audit: Audit, sealer: Sealer, wrapping: Wrapping, root_keys: Mapping[str, SystemKeys]
) -> Rotations:
    encryption = EncryptionKeys(database, wrapping, getattr(wrapping, "rotate", None))
    of_root = [SystemKeyClass(database, keys, life_seconds=LIVES[one]) for one, keys in root_keys.items()]
    return Rotations(database, audit, [encryption, DataKeys(database, sealer, wrapping), *of_root])


def database_of(settings: Settings) -> SqliteDatabase | PostgresDatabase:
    """Return the configured database, not migrated yet (SettingsError when its URL is none)."""
    try:
        return open_database(settings.effective_database_url)
    except ValueError as error:
        raise SettingsError(f"BROKER_DATABASE_URL: {error}") from None


def _assembled(
    of_all: tuple[Settings, Database, Audit, Egress, Metrics],
    of_keys: tuple[Sealer, CachedVault, Wrapping, Replicas, dict[str, SystemKeys]],
    of_callers: CallerParts,
    of_credentials: tuple[Integrations, Credentials],
    webhooks: WebhookParts,
) -> Parts:
    settings, database, audit, egress, metrics = of_all
    sealer, vault, wrapping, replicas, root_keys = of_keys
    integrations, credentials = of_credentials
    callers = of_callers.callers
    confirmations = Confirmations(database, vault, credentials, audit, callers.standing)
    of_flows = (database, vault, sealer, egress, integrations, confirmations, audit, settings, metrics)
    return Parts(
        settings=settings,
        database=database,
        sealer=sealer,
        vault=vault,
        audit=audit,
        egress=egress,
        callers=callers,
        caller_upkeep=of_callers.upkeep,
        integrations=integrations,
        sessions=Sessions(database, audit, callers.standing),
        credentials=credentials,
        confirmations=confirmations,
        flows=Flows(*of_flows),
        device_flows=DeviceFlows(*of_flows, callers.standing),
        connections=Connections(database, vault, credentials, integrations, audit, metrics),
        metrics=metrics,
        limiter=AddressLimiter(BROWSER_RATES),
        pages=Pages(),
        wrapping=wrapping,
        replicas=replicas,
        session_keys=root_keys["session"],
        rotations=_rotations(database, audit, sealer, wrapping, root_keys),
        canaries=Canaries(database, integrations, credentials, egress),
        revocations=_revocations(settings, database, credentials, audit, vault),
        webhooks=webhooks,
    )


@contextlib.asynccontextmanager
async def _credential_parts(
    of_all: tuple[Settings, Database, Audit, Egress, Metrics],
    of_keys: tuple[Sealer, CachedVault, Wrapping, Replicas, dict[str, SystemKeys]],
    confirm_seconds: float,
) -> AsyncIterator[tuple[Integrations, Credentials]]:
    """Open what holds configured providers and credentials; at the end refreshes finish and leases go back."""
    (settings, database, audit, egress, metrics), (sealer, vault, *_) = of_all, of_keys
    integrations = Integrations(database, vault, egress, audit, load_catalog(), settings)
    of_credentials = (database, vault, sealer, egress, integrations, audit, metrics)
    credentials = Credentials(*of_credentials, confirm_seconds=confirm_seconds)
    try:
        yield integrations, credentials
    finally:
        await credentials.aclose()
        await integrations.aclose()


def _revocations(
    settings: Settings, database: Database, credentials: Credentials, audit: Audit, vault: CachedVault
) -> Revocations:
    per_minute = settings.background_refreshes_per_minute
    return Revocations(database, credentials, audit, per_minute=per_minute, forget_secrets=vault.clear)


# The application


def create_app(parts: Parts, *, room: Room | None = None) -> Edge:
    """Return the application over opened parts: routes of the configured groups behind ``Edge``. ``room``: that of ``/v1``."""
    handlers: list[Any] = [live, ready]
    readiness = cached_readiness(parts.database, parts.vault, parts.audit)
    room, groups = room or Room(MOST_REQUESTS, MOST_BUSY), parts.settings.routes
    if "public" in groups:
        handlers += [broker.oauth.routes.routes(), broker.web.routes.routes(), broker.callers.routes.routes()]
        handlers.append(broker.api.webhook_keys.routes())
    if "private" in groups:
        handlers += [_private_routes(parts, room), broker.api.token_exchange.routes()]
    if "admin" in groups:
        handlers += [metrics, broker.web.console.routes.routes()]
        handlers += [broker.web.routes.asset] if "public" not in groups else []
    app = Litestar(
        handlers,
        dependencies={
            **{name: Provide(_giver(getattr(parts, name))) for name in _NAMES},
            **{name: Provide(_giver(getattr(parts.webhooks, name))) for name in _OF_WEBHOOKS},
            "done_page": Provide(_giver(_done_page(parts.pages))),
            "console_sessions": Provide(_giver(_console_sessions(parts))),
            "activity": Provide(_giver(parts.proxy.activity if parts.proxy is not None else None)),
        },
        exception_handlers={
            BrokerError: _answer_error,
            HTTPException: _answer_foreign,
            Exception: _answer_defect,
        },
        state=State({"parts": parts, "readiness": readiness}, deep_copy=False),
        openapi_config=_openapi() if "admin" in groups else None,
        logging_config=None,
        request_max_body_size=MAX_BODY_BYTES,
    )
    _let_options_name_all_methods(app)
    express = ExpressLane(app, parts.callers, room)
    proxy = parts.proxy.before(express) if parts.proxy is not None else None
    webhooks = parts.webhooks.taking_in.before(proxy or express) if "public" in groups else None
    refuse, served = _refusing(parts.pages), webhooks or proxy or express
    doors = Doors(served, room, functools.partial(_address_of, settings=parts.settings), refuse)
    return Edge(doors, parts.metrics, Lanes(express, proxy, webhooks), refuse)


def _console_sessions(parts: Parts) -> ConsoleSessions:
    return ConsoleSessions(parts.database, parts.audit, parts.callers, parts.session_keys)


def _let_options_name_all_methods(app: Litestar) -> None:
    """Mend what the framework answers to OPTIONS: of a path with several methods its handler knows only the first."""
    for route in app.routes:
        handlers = route.route_handlers if isinstance(route, HTTPRoute) else ()
        for handler in handlers:
            if handler.http_methods == {HttpMethod.OPTIONS}:
                handler.after_request = _allowing(", ".join(sorted(route.methods)))


def _allowing(methods: str) -> Callable[[Response[Any]], Any]:
    async def named(response: Response[Any]) -> Response[Any]:
        response.headers["Allow"] = methods
        return response

    return named


_NAMES = (
    *("settings", "database", "audit", "egress", "callers", "integrations", "sessions", "rotations"),
    *("credentials", "confirmations", "flows", "device_flows", "connections", "limiter", "pages", "revocations"),
)

_OF_WEBHOOKS = ("sources", "subscriptions", "signing_keys", "history", "replaying", "event_feed")


def _giver(part: Any) -> Callable[[], Any]:  # noqa: ANN401 - any part
    async def give() -> Any:  # noqa: ANN401
        return part

    return give


def _private_routes(parts: Parts, room: Room) -> Router:
    resources = (
        broker.api.sessions,
        broker.api.connections,
        broker.api.device_flows,
        broker.api.integrations,
        broker.api.activity,
        broker.api.providers,
        broker.api.callers,
        broker.api.audit,
        broker.api.keys,
        broker.api.revocations,
        broker.api.subjects,
        broker.api.webhook_sources,
        broker.api.subscriptions,
        broker.api.events,
        broker.api.deliveries,
    )
    return Router(
        path="/v1",
        route_handlers=[resource.routes() for resource in resources],
        middleware=[  # functions, because the framework copies instances deeply
            lambda app: Authentication(app, parts.callers, room),
            lambda app: Idempotency(app, parts.database, parts.session_keys),
        ],
        guards=[strict_request],
        response_headers=[ResponseHeader(name="Cache-Control", value="no-store")],
        dependencies={"principal": Provide(principal_of)},
        security=[{"callerKey": []}],
    )


def _openapi() -> OpenAPIConfig:
    scheme = SecurityScheme(type="http", scheme="bearer", description="A caller key, brk_…")
    return OpenAPIConfig(
        title="Broker",
        version=__version__,
        path="/schema",
        render_plugins=[Document(path="/openapi.json")],
        components=Components(security_schemes={"callerKey": scheme}),
    )


class Document(JsonRenderPlugin):
    """The OpenAPI document with what the framework leaves out: unknown fields are refused, and some bodies optional."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """Return the document as JSON."""
        for name, schema in openapi_schema["components"]["schemas"].items():
            if name.endswith("Body"):  # so are the types of all bodies called, and of nothing else
                schema["additionalProperties"] = False
        for operation in (one for methods in openapi_schema["paths"].values() for one in methods.values()):
            for content in operation.get("requestBody", {}).get("content", {}).values():
                if {"type": "null"} in content["schema"].get("oneOf", ()):
                    operation["requestBody"]["required"] = False
        return super().render(request, openapi_schema)


def _done_page(pages: Pages) -> Callable[[Outcome], Response[str]]:
    def show(outcome: Outcome) -> Response[str]:
        body = pages.done_page(
            connection_id=outcome.connection_id or "",
            confirm_code=outcome.confirm_code.reveal() if outcome.confirm_code is not None else None,
            missing_scopes=outcome.missing_scopes,
        )
        # the route itself says 303, which is what most flows end with
        return Response(body, status_code=200, media_type=MediaType.HTML, headers=pages.security_headers())

    return show


@get("/health/live", tags=["health"])
async def live() -> answers.Liveness:
    """Say that the process answers."""
    return {"status": "live"}


@get("/health/ready", tags=["health"], responses=also(503, answers.Readiness))
async def ready(state: State, scope: Scope) -> Response[answers.Readiness]:
    """Say whether every part works, as of a second ago at most; each failing part is named, the end of the process too."""
    leaving: Any = scope["state"].get(LEAVING)
    failing = NOT_READY if leaving is not None and leaving.begun else await state.readiness()
    body: answers.Readiness = {"status": "ready" if not failing else "not_ready", "failing": failing}
    return Response(body, status_code=503 if failing else 200, headers={"Cache-Control": "no-store"})


@get("/metrics", media_type="text/plain", tags=["health"])
async def metrics(state: State) -> Response[bytes]:
    """Prometheus metrics."""
    return Response(render(state.parts.metrics), media_type="text/plain; version=0.0.4")


# Errors: the one place that makes a response of them


def problem(error: BrokerError, request_id: str) -> Response[dict[str, Any]]:
    """Return an RFC 9457 problem document."""
    headers = {"Cache-Control": "no-store", **error.headers}
    return Response(
        problem_of(error, request_id), status_code=error.status, media_type="application/problem+json", headers=headers
    )


def _answer_error(request: Request[Any, Any, Any], error: BrokerError) -> Response[Any]:
    request_id = request.scope["state"].get("request_id", "")
    if error.status >= 500:
        log.warning("request.failed", code=error.code, exc_info=error.__cause__ or False)
    if not _wants_page(request):
        return problem(error, request_id)
    pages: Pages = request.app.state.parts.pages
    code = error.flow_code if isinstance(error, FlowError) else error.code
    body = pages.error_page(status=error.status, code=code, text=error.detail, request_id=request_id)
    headers = {**pages.security_headers(), **error.headers}
    return Response(body, status_code=error.status, media_type=MediaType.HTML, headers=headers)


def _wants_page(request: Request[Any, Any, Any]) -> bool:
    return request.url.path.startswith(BROWSER_PATHS) and "application/json" not in request.headers.get("accept", "")


def _refusing(pages: Pages) -> Callable[[Any, Any, Overloaded], Awaitable[None]]:
    """Return what answers a request that found no room: at a fifth of what it costs in the framework."""

    async def refuse(scope: Any, send: Any, error: Overloaded) -> None:  # noqa: ANN401 - ASGI's own shapes
        request_id, extra = scope["state"].get("request_id", ""), {"cache-control": "no-store"}
        if scope["path"].startswith(BROWSER_PATHS) and not any(
            name == b"accept" and b"application/json" in value for name, value in scope["headers"]
        ):
            page = pages.error_page(status=error.status, code=error.code, text=error.detail, request_id=request_id)
            body, kind, extra = page.encode(), "text/html; charset=utf-8", dict(pages.security_headers())
        else:
            body, kind = _overloaded_body(error.detail, request_id), "application/problem+json"
        headers = {"content-type": kind, "content-length": str(len(body)), **extra, **error.headers}
        fields = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": error.status, "headers": fields})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return refuse


def _overloaded_body(detail: str, request_id: str) -> bytes:
    return _overloaded_frame(detail) % request_id.encode()


@functools.lru_cache(maxsize=64)  # the texts are ours, and few
def _overloaded_frame(detail: str) -> bytes:
    """Return a problem document with ``%s`` for the request's id, which is of plain characters."""
    mark = "request-id-mark"
    return json.dumps(problem_of(Overloaded(detail), mark)).replace("%", "%%").replace(mark, "%s").encode()


def _address_of(scope: Any, *, settings: Settings) -> str:  # noqa: ANN401
    """Return the client's address, as limits count it."""
    forwarded = ",".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for")
    peer = scope["client"][0] if scope.get("client") else "unknown"
    return limited_as(client_address(peer, forwarded, settings.trusted_proxies))


def _answer_foreign(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    return _answer_error(request, translated(error))


def translated(error: HTTPException) -> BrokerError:
    """Return our error for one of the framework's; its text is dropped, field problems are kept."""
    kinds: Mapping[int, type[BrokerError]] = {
        404: NotFound,
        405: MethodNotAllowed,
        413: PayloadTooLarge,
        415: UnsupportedMediaType,
    }
    if error.status_code in kinds:
        return kinds[error.status_code](headers=_allow(error.headers))
    if 400 <= error.status_code < 500:
        return InvalidRequest(errors=_field_errors(error))
    if error.detail == CLIENT_LEFT:  # nobody reads this answer, but it is counted: as the client's doing
        return InvalidRequest("the client left in the middle of its request")
    return InternalError()


def _allow(headers: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return the Allow header that a 405 must have (RFC 9110 15.5.6), nothing else."""
    given = {name.lower(): value for name, value in (headers or {}).items()}
    return {"Allow": given["allow"]} if "allow" in given else {}


def _field_errors(error: HTTPException) -> Sequence[FieldError]:
    """Return which query parameters are wrong; bodies were checked before the framework saw them."""
    extra = error.extra if isinstance(error, ValidationException) and isinstance(error.extra, list) else []
    return [FieldError(f"?{shown_name(str(item.get('key', '')))}", _told(item)) for item in extra]


def _told(item: Mapping[str, Any]) -> str:
    return field_error(str(item.get("message", ""))).detail


def _answer_defect(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    log.error("request.defect", kind=type(error).__name__, exc_info=error)
    return _answer_error(request, InternalError())


# A process


class Served:
    """The application as a server runs it: opens the parts at start-up and closes them at the end."""

    def __init__(self, settings: Settings, *, with_worker: bool) -> None:
        """Keep the settings; nothing is opened before the server's start-up event."""
        self._settings = settings
        self._with_worker = with_worker
        self._stack = contextlib.AsyncExitStack()
        self._app: Edge | None = None
        self._stopping = Stopping(settings.effective_drain_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or run the life of the process for the ``lifespan`` scope."""
        if scope["type"] == "lifespan":  # type: ignore[comparison-overlap] # the framework's type leaves it out
            await self._live(scope, receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)

    def lane(self, method: bytes, target: bytes, fields: Sequence[tuple[bytes, bytes]]) -> Lane | None:
        """See ``Edge.lane``."""
        return None if self._app is None else self._app.lane(method, target, fields)

    async def _live(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - the types leave lifespan out
        await receive()
        try:
            metrics = (await self._open()).metrics
            state: dict[str, Any] = scope.get("state", {})
            state[COUNT_REFUSED] = lambda status: metrics.http_request("refused", "", status, 0)
            state[LEAVING] = self._stopping
        except (SettingsError, BrokerError) as error:
            log.critical("start.failed", why=str(error))
            await self._stack.aclose()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._stack.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _open(self) -> Parts:
        counters = new_metrics()
        await self._stack.enter_async_context(sending_logs(self._settings, counters.log_lines_lost))  # ends last
        parts = await self._stack.enter_async_context(open_parts(self._settings, counters=counters))
        await self._stack.enter_async_context(parts.replicas.beating("serve"))
        if self._with_worker:
            await self._stack.enter_async_context(running_worker(parts))
        waiting, streams = (parts.credentials.stop_waiting,), (parts.webhooks.event_feed.stop,)
        self._stopping.heed_signals(end_streams=streams, end_waiting=waiting)
        self._app = create_app(parts)
        gc.collect()
        gc.freeze()  # a full collection costs 50 ms here; what start-up made lives as long as the process
        # 64 requests under way are more objects than the 700 after which it looks for cycles otherwise, always in vain.
        gc.set_threshold(GARBAGE_THRESHOLD)
        sys.setswitchinterval(SWITCH_SECONDS)
        return parts


def new_worker(parts: Parts) -> Worker:
    """Return the worker over opened parts; nothing runs yet."""
    refreshing = BackgroundRefresh(
        parts.credentials, parts.metrics, per_minute=parts.settings.background_refreshes_per_minute
    )
    more: Sequence[Job] = (
        (1.0, parts.rotations.move),
        (60.0, parts.rotations.retire_due),
        (1.0, parts.canaries.run_due),
        (1.0, parts.revocations.advance),
        (60.0, parts.caller_upkeep.warn),
        (60.0, parts.caller_upkeep.undo_put_back),
        (60.0, functools.partial(sweep_activity, parts.database)),
        (EVERY_SECONDS, functools.partial(measure, parts.database, parts.metrics)),
        *parts.webhooks.jobs,
    )
    return Worker(
        parts.database, parts.credentials, parts.confirmations, parts.device_flows, refreshing, parts.audit, more
    )


@contextlib.asynccontextmanager
async def running_worker(parts: Parts) -> AsyncIterator[Worker]:
    """Run the worker's jobs beside whatever else this process does; stop them in an orderly way."""
    worker = new_worker(parts)
    task = asyncio.create_task(worker.run())
    try:
        async with parts.webhooks.delivery.running():
            yield worker
    finally:
        worker.stop()
        await task


def from_environment() -> Served:
    """Return the application for a server that imports it by name, with settings from the environment."""
    settings = load_settings()
    configure_logging(settings)
    return Served(settings, with_worker=True)


def from_environment_without_worker() -> Served:
    """As ``from_environment``, for web processes whose worker is a process of its own."""
    settings = load_settings()
    configure_logging(settings)
    return Served(settings, with_worker=False)
