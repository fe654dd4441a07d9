"""The only place where things are wired: settings → parts → the application."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import random
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import structlog
from litestar import Litestar, MediaType, Response, Router, get
from litestar.connection import Request
from litestar.datastructures import ResponseHeader, State
from litestar.di import Provide
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.types import ASGIApp, Message, Receive, Scope, Send

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
import broker.web.routes
from broker import __version__
from broker.activity import sweep as sweep_activity
from broker.api.lean import ExpressLane
from broker.api.requests import (
    MAX_BODY_BYTES,
    Authentication,
    Idempotency,
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
from broker.egress import Egress
from broker.errors import (
    BrokerError,
    FieldError,
    FlowError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    UnsupportedMediaType,
    problem_of,
)
from broker.health import cached_readiness
from broker.integrations import Integrations
from broker.limits import AddressLimiter
from broker.listening import COUNT_REFUSED
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
from broker.telemetry import Metrics, access_line, configure_logging, new_metrics, render
from broker.vault import Store, open_server, open_vault, open_wrapping
from broker.vault.cache import CachedVault
from broker.vault.keyring import Sealer, Wrapping, open_sealer
from broker.vault.system_keys import SystemKeys
from broker.web.pages import Pages
from broker.webhooks.opening import Given, WebhookParts, open_webhooks
from broker.worker import Job, Worker
from providers import load_catalog
from providers.spec import Secret

GARBAGE_THRESHOLD = 20_000
NAMES_ITSELF = "broker_names_itself"  # in a request's state: the answer has its request id already
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,128}")
DAY_SECONDS = 86_400.0
# How long at most what a root key made is good; None: for ever, so that key is never retired.
LIVES = {"webhook-signing": DAY_SECONDS, "jwt-signing": LONGEST_SECONDS, "session": DAY_SECONDS, "audit": None}
BROWSER_PATHS = ("/oauth/", "/connect")
BROWSER_RATES = {"start": "120/minute", "callback": "240/minute", "connect": "240/minute"}
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
async def open_parts(settings: Settings, *, confirm_seconds: float = CONFIRM_SECONDS) -> AsyncIterator[Parts]:
    """Open everything in order, and close it in reverse: refreshes finish, leases go back, the audit is flushed.

    ``confirm_seconds``: see ``Credentials``.
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
        vault = CachedVault(await open_vault(settings, database, sealer, server), seconds=settings.secret_cache_seconds)
        counters = new_metrics()
        audit = await open_audit(database, sealer, settings, on_failure=counters.audit_failure, vault=vault)
        stack.push_async_callback(audit.aclose)
        egress = Egress(settings)
        stack.push_async_callback(egress.aclose)
        replicas = Replicas(database, sealer, keyring, on_revocation=(vault.clear,))
        root_keys = await _root_keys(database, sealer, replicas, audit)
        signing = root_keys["jwt-signing"]
        opening = open_callers(settings, database, sealer, signing, audit, egress, counters)
        callers = await stack.enter_async_context(opening)
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


def create_app(parts: Parts) -> ASGIApp:
    """Return the application over opened parts: routes of the configured groups behind ``Edge``."""
    handlers: list[Any] = [live, ready]
    readiness = cached_readiness(parts.database, parts.vault, parts.audit)
    groups = parts.settings.routes
    if "public" in groups:
        handlers += [broker.oauth.routes.routes(), broker.web.routes.routes(), broker.callers.routes.routes()]
        handlers.append(broker.api.webhook_keys.routes())
    if "private" in groups:
        handlers += [_private_routes(parts), broker.api.token_exchange.routes()]
    if "admin" in groups:
        handlers.append(metrics)
    app = Litestar(
        handlers,
        dependencies={
            **{name: Provide(_giver(getattr(parts, name))) for name in _NAMES},
            **{name: Provide(_giver(getattr(parts.webhooks, name))) for name in _OF_WEBHOOKS},
            "done_page": Provide(_giver(_done_page(parts.pages))),
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
    served: Any = ExpressLane(app, parts.callers)
    served = served if parts.proxy is None else parts.proxy.before(served)
    served = parts.webhooks.taking_in.before(served) if "public" in groups else served
    return Edge(served, parts.metrics)


_NAMES = (
    *("settings", "database", "audit", "egress", "callers", "integrations", "sessions", "rotations"),
    *("credentials", "confirmations", "flows", "device_flows", "connections", "limiter", "pages", "revocations"),
)

_OF_WEBHOOKS = ("sources", "subscriptions", "signing_keys", "history", "replaying", "event_feed")


def _giver(part: Any) -> Callable[[], Any]:  # noqa: ANN401 - any part
    async def give() -> Any:  # noqa: ANN401
        return part

    return give


def _private_routes(parts: Parts) -> Router:
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
            lambda app: Authentication(app, parts.callers),
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
        render_plugins=[JsonRenderPlugin(path="/openapi.json")],
        components=Components(security_schemes={"callerKey": scheme}),
    )


def _done_page(pages: Pages) -> Callable[[Outcome], Response[str]]:
    def show(outcome: Outcome) -> Response[str]:
        body = pages.done_page(
            connection_id=outcome.connection_id or "",
            confirm_code=outcome.confirm_code.reveal() if outcome.confirm_code is not None else None,
            missing_scopes=outcome.missing_scopes,
        )
        return Response(body, media_type=MediaType.HTML, headers=pages.security_headers())

    return show


@get("/health/live", tags=["health"])
async def live() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "live"}


@get("/health/ready", tags=["health"])
async def ready(state: State) -> Response[dict[str, Any]]:
    """Say whether every part works, as of a second ago at most; each failing part is named."""
    failing = await state.readiness()
    body = {"status": "ready" if not failing else "not_ready", "failing": failing}
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


# The edge


class Edge:
    """What every request passes first and last: request id, log line, metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap the application."""
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":  # type: ignore[comparison-overlap] # the framework's enumeration is of strings
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        started, status = time.monotonic(), 500
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if message["type"] == "http.response.start" and NAMES_ITSELF not in scope["state"]:
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        bound = structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._note(scope, status, time.monotonic() - started, request_id)
            structlog.contextvars.reset_contextvars(**bound)

    def _note(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        """Write the access log line and count: the route's template and no query, because URLs carry codes."""
        template = str(scope.get("path_template") or "unknown")
        method = str(scope.get("method"))
        self._metrics.http_request(template, method, status, seconds)
        access_line(method, template, status, seconds, request_id)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(text := value.decode("latin-1")):
            return text
    return f"req_{random.getrandbits(104):026x}"  # no secret: it has to be another one, and cheap


# A process


class Served:
    """The application as a server runs it: opens the parts at start-up and closes them at the end."""

    def __init__(self, settings: Settings, *, with_worker: bool) -> None:
        """Keep the settings; nothing is opened before the server's start-up event."""
        self._settings = settings
        self._with_worker = with_worker
        self._stack = contextlib.AsyncExitStack()
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or run the life of the process for the ``lifespan`` scope."""
        if scope["type"] == "lifespan":  # type: ignore[comparison-overlap] # the framework's type leaves it out
            await self._live(scope, receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)

    async def _live(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - the types leave lifespan out
        await receive()
        try:
            metrics = (await self._open()).metrics
            scope.get("state", {})[COUNT_REFUSED] = lambda status: metrics.http_request("refused", "", status, 0)
        except (SettingsError, BrokerError) as error:
            log.critical("start.failed", why=str(error))
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._stack.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _open(self) -> Parts:
        parts = await self._stack.enter_async_context(open_parts(self._settings))
        await self._stack.enter_async_context(parts.replicas.beating("serve"))
        if self._with_worker:
            await self._stack.enter_async_context(running_worker(parts))
        _on_signal(parts.credentials.stop_waiting)
        _on_signal(parts.webhooks.event_feed.stop)
        self._app = create_app(parts)
        gc.collect()
        gc.freeze()  # a full collection costs 50 ms here; what start-up made lives as long as the process
        # 64 requests under way are more objects than the 700 after which it looks for cycles otherwise, always in vain.
        gc.set_threshold(GARBAGE_THRESHOLD)
        return parts


def _on_signal(act: Callable[[], None]) -> None:
    """Act as soon as the process is told to end, before the server's own handler drains the requests.

    Callers who wait for another process's lease would hold the drain for up to 30 s, and the leases of this process with it.
    Outside of the main thread no handler can be set; there nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def heard(got: int, frame: FrameType | None, before: Any = before) -> None:  # noqa: ANN401 - any kind of handler
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(act)
            if callable(before):
                before(got, frame)

        if callable(before):
            signal.signal(number, heard)


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
