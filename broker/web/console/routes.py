"""The console's pages: each asks the function of a `/v1` route, so that it shows and does exactly what that allows."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

import msgspec
import structlog
from litestar import Response, Router, get, post
from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.params import FromPath

from broker import gauges, policy
from broker.api import activity as activity_api
from broker.api import answers
from broker.api import audit as audit_api
from broker.api import callers as callers_api
from broker.api import connections as connections_api
from broker.api import deliveries as deliveries_api
from broker.api import integrations as integrations_api
from broker.api import revocations as revocations_api
from broker.api.requests import Shape
from broker.api.revocations import RevocationBody
from broker.audit import Audit
from broker.callers import Callers
from broker.connections import STATUSES, Connections
from broker.errors import BrokerError, Unauthenticated
from broker.integrations import Integrations
from broker.limits import AddressLimiter
from broker.oauth.routes import address_of, cookies_of, redirect
from broker.policy import Target
from broker.revocations import Revocations
from broker.settings import Settings
from broker.web.console.sessions import ConsoleSessions
from broker.web.console.visits import (
    HOME,
    LOG_IN,
    AnyRequest,
    Order,
    Visit,
    asked,
    bound_cookie,
    cookie_name,
    form_cookie,
    form_token,
    has_role,
    new_form_cookie,
    older,
    order_of,
    own_form,
    shown,
    visit_of,
)
from broker.web.pages import NOTICES, Pages
from broker.webhooks.history import DELIVERY_STATUSES, History
from broker.webhooks.replaying import Replaying
from providers.spec import Secret

MAX_FORM_BYTES: Final = 4096
RECENT: Final = 20
CONNECTION_FILTERS: Final = ("integration", "subject", "status", "tag")
DELIVERY_FILTERS: Final = ("status", "subscription_id", "event_id")
AUDIT_FILTERS: Final = ("action", "actor", "connection_id", "integration", "subject", "since", "until")
WRONG_KEY: Final = "That is no live caller key."
REVOCATION: Final = Shape(RevocationBody)
log = structlog.get_logger()


# Logging in and out


@get(LOG_IN)
async def log_in_page(
    request: AnyRequest,
    settings: NamedDependency[Settings],
    limiter: NamedDependency[AddressLimiter],
    pages: NamedDependency[Pages],
    console_sessions: NamedDependency[ConsoleSessions],
) -> Response[Any]:
    """Ask for a caller key; 303 to the overview for who is logged in."""
    await limiter.check("console", address_of(request, settings))
    cookie = cookies_of(request).get(cookie_name(settings))
    if cookie is not None and await _is_live(cookie, console_sessions):
        return redirect(HOME, 303)
    return _log_in_form(request, pages, settings)


async def _is_live(cookie: str, console_sessions: ConsoleSessions) -> bool:
    try:
        await console_sessions.resume(cookie)
    except Unauthenticated:
        return False
    return True


def _log_in_form(request: AnyRequest, pages: Pages, settings: Settings, problem: str | None = None) -> Response[str]:
    """Return the form, bound to this browser: another site cannot log it in as somebody else."""
    held = form_cookie(request, settings)
    cookie, status = held or new_form_cookie(), 200 if problem is None else 401
    response = shown(pages, "log_in.html", status, problem=problem, token=form_token(cookie, LOG_IN))
    if problem is not None:
        response.headers.update(Unauthenticated().headers)
    if held is None:
        response.set_cookie(bound_cookie(cookie_name(settings, form=True), cookie, settings))
    return response


@post(LOG_IN, request_max_body_size=MAX_FORM_BYTES)
async def log_in(
    request: AnyRequest,
    settings: NamedDependency[Settings],
    limiter: NamedDependency[AddressLimiter],
    pages: NamedDependency[Pages],
    console_sessions: NamedDependency[ConsoleSessions],
) -> Response[Any]:
    """Begin a session for who holds a live caller key: 303 to the overview. The key is kept nowhere."""
    await limiter.check("console_log_in", address_of(request, settings))
    form = await own_form(request, form_cookie(request, settings) or "", settings)
    try:
        cookie = await console_sessions.begin(Secret(form.get("key", "").strip()))
    except Unauthenticated:
        return _log_in_form(request, pages, settings, WRONG_KEY)
    response = redirect(HOME, 303)
    response.set_cookie(bound_cookie(cookie_name(settings), cookie.reveal(), settings))
    response.set_cookie(bound_cookie(cookie_name(settings, form=True), "", settings, over=True))
    return response


@post("/console/log-out", request_max_body_size=MAX_FORM_BYTES)
async def log_out(
    order: NamedDependency[Order],
    settings: NamedDependency[Settings],
    console_sessions: NamedDependency[ConsoleSessions],
) -> Response[None]:
    """End the session, here and for whoever has its cookie."""
    await console_sessions.end(order.visit.cookie, order.visit.principal)
    response = redirect(LOG_IN, 303)
    response.set_cookie(bound_cookie(cookie_name(settings), "", settings, over=True))
    return response


# What there is


@get(HOME)
async def overview(
    request: AnyRequest,
    state: State,
    visit: NamedDependency[Visit],
    database: NamedDependency[Any],  # a Database: a protocol, which the framework cannot check
    integrations: NamedDependency[Integrations],
) -> Response[str]:
    """Show health; and to whom the integrations are shown, these and how many connections there are."""
    failing: dict[str, str] = await state.readiness()
    if not has_role(visit.principal, *integrations_api.READERS):
        return visit.page("overview.html", failing=failing, counts=None, integrations=None, older=None)
    cursor = asked(request, "cursor")["cursor"]
    found: answers.IntegrationList = await integrations_api.list_integrations.fn(
        visit.principal, integrations, limit=50, cursor=cursor
    )
    counts = await database.read(gauges.connections)
    following = older(HOME, {}, found["next_cursor"])
    return visit.page("overview.html", failing=failing, counts=counts, integrations=found["data"], older=following)


@get("/console/integrations/{name:str}")
async def integration(
    name: FromPath[str],
    visit: NamedDependency[Visit],
    integrations: NamedDependency[Integrations],
    activity: NamedDependency[Any],
) -> Response[str]:
    """Show one integration, how it went for a day and its recent lines; without these where no calls are served."""
    found: answers.Integration = await integrations_api.show_integration.fn(name, visit.principal, integrations)
    figures: answers.IntegrationFigures | None = None
    lines: list[answers.LogLine] = []
    if activity is not None:
        of_calls = (name, visit.principal, integrations, activity)
        figures = await activity_api.show_metrics.fn(*of_calls, window="24h")
        lines = (await activity_api.show_logs.fn(*of_calls, limit=RECENT))["data"]
    return visit.page("integration.html", integration=found, figures=figures, lines=lines)


# Connections


@get("/console/connections")
async def list_connections(
    request: AnyRequest, visit: NamedDependency[Visit], connections: NamedDependency[Connections]
) -> Response[str]:
    """List the connections that the caller may see, newest first, as ``GET /v1/connections`` does."""
    wanted = asked(request, *CONNECTION_FILTERS)
    cursor = asked(request, "cursor")["cursor"]
    found: answers.ConnectionList = await connections_api.list_connections.fn(
        visit.principal, connections, **wanted, limit=50, cursor=cursor
    )
    return visit.page(
        "connections.html",
        connections=found["data"],
        wanted=wanted,
        statuses=sorted(STATUSES),
        notice=NOTICES.get(asked(request, "deleted")["deleted"] or ""),
        older=older("/console/connections", wanted, found["next_cursor"]),
    )


@get("/console/connections/{connection_id:str}")
async def connection(
    connection_id: FromPath[str],
    visit: NamedDependency[Visit],
    connections: NamedDependency[Connections],
    revocations: NamedDependency[Revocations],
    audit: NamedDependency[Audit],
) -> Response[str]:
    """Show one connection, its recent audit records to who may read the audit, and what the caller may do with it."""
    principal = visit.principal
    row: answers.Connection = await connections_api.show_connection.fn(connection_id, principal, connections)
    records: list[answers.AuditRecord] | None = None
    if has_role(principal, *audit_api.READERS):
        found = await audit_api.search_audit.fn(principal, audit, connection_id=connection_id, limit=RECENT)
        records = found["data"]
    stoppable: int | None = None
    if row["subject"] is not None and has_role(principal, "security"):
        counting = _stopping(row, "revoke", "-", dry_run=True)
        stoppable = (await revocations_api.start_revocation.fn(counting, principal, revocations)).content["total"]
    may_delete = policy.allowed(principal, "manage", Target(row["integration"], row["subject"], row["tags"]))
    return visit.page("connection.html", connection=row, records=records, may_delete=may_delete, stoppable=stoppable)


def _stopping(row: answers.Connection, action: str, reason: str, *, dry_run: bool = False) -> RevocationBody:
    """Return the body of ``POST /v1/revocations`` for all connections of one subject at one integration (InvalidRequest)."""
    selector = {"integration": row["integration"], "subject": row["subject"]}
    body = {"action": action, "selector": selector, "reason": reason, "dry_run": dry_run}
    found: RevocationBody = REVOCATION.decoded(msgspec.json.encode(body), "application/json")
    return found


@post("/console/connections/{connection_id:str}/delete", request_max_body_size=MAX_FORM_BYTES)
async def delete_connection(
    connection_id: FromPath[str], order: NamedDependency[Order], connections: NamedDependency[Connections]
) -> Response[None]:
    """Delete a connection, at the provider too: 303 to the list, which says what came of it."""
    done: answers.DeletedConnection = await connections_api.delete_connection.fn(
        connection_id, order.visit.principal, connections, revoke=True
    )
    return redirect(f"/console/connections?deleted={done['revocation']}", 303)


@post("/console/connections/{connection_id:str}/stop", request_max_body_size=MAX_FORM_BYTES)
async def stop(
    connection_id: FromPath[str],
    order: NamedDependency[Order],
    connections: NamedDependency[Connections],
    revocations: NamedDependency[Revocations],
) -> Response[None]:
    """Freeze or revoke all connections of this one's subject and integration: 303 to what comes of it."""
    principal = order.visit.principal
    row: answers.Connection = await connections_api.show_connection.fn(connection_id, principal, connections)
    body = _stopping(row, order.form.get("action", ""), order.form.get("reason", "").strip())
    done = await revocations_api.start_revocation.fn(body, principal, revocations)
    return redirect(f"/console/revocations/{done.content['id']}", 303)


# Revocations


@get("/console/revocations")
async def list_revocations(
    request: AnyRequest, visit: NamedDependency[Visit], revocations: NamedDependency[Revocations]
) -> Response[str]:
    """List freezes, revocations and erasures, newest first."""
    found: answers.RevocationList = await revocations_api.list_revocations.fn(
        visit.principal, revocations, limit=50, cursor=asked(request, "cursor")["cursor"]
    )
    following = older("/console/revocations", {}, found["next_cursor"])
    return visit.page("revocations.html", revocations=found["data"], older=following)


@get("/console/revocations/{revocation_id:str}")
async def revocation(
    request: AnyRequest,
    revocation_id: FromPath[str],
    visit: NamedDependency[Visit],
    revocations: NamedDependency[Revocations],
) -> Response[str]:
    """Show one and what its connections came to; a freeze can be lifted here."""
    found: answers.RevocationView = await revocations_api.show_revocation.fn(
        revocation_id, visit.principal, revocations, limit=50, cursor=asked(request, "cursor")["cursor"]
    )
    following = older(f"/console/revocations/{revocation_id}", {}, found["next_cursor"])
    may_lift = found["action"] == "freeze" and found["ended_at"] is None and has_role(visit.principal, "security")
    return visit.page("revocation.html", revocation=found, may_lift=may_lift, older=following)


@post("/console/revocations/{revocation_id:str}/lift", request_max_body_size=MAX_FORM_BYTES)
async def lift(
    revocation_id: FromPath[str], order: NamedDependency[Order], revocations: NamedDependency[Revocations]
) -> Response[None]:
    """Lift a freeze."""
    await revocations_api.lift_freeze.fn(revocation_id, order.visit.principal, revocations)
    return redirect(f"/console/revocations/{revocation_id}", 303)


# Deliveries


@get("/console/deliveries")
async def list_deliveries(
    request: AnyRequest, visit: NamedDependency[Visit], history: NamedDependency[History]
) -> Response[str]:
    """List deliveries, newest first; without a query the dead ones."""
    wanted = asked(request, *DELIVERY_FILTERS)
    if not request.scope["query_string"]:
        wanted["status"] = "dead"
    found: answers.DeliveryList = await deliveries_api.list_deliveries.fn(
        visit.principal, history, **wanted, limit=50, cursor=asked(request, "cursor")["cursor"]
    )
    return visit.page(
        "deliveries.html",
        deliveries=found["data"],
        wanted=wanted,
        statuses=sorted(DELIVERY_STATUSES),
        older=older("/console/deliveries", wanted, found["next_cursor"]),
    )


@get("/console/deliveries/{delivery_id:str}")
async def delivery(
    delivery_id: FromPath[str], visit: NamedDependency[Visit], history: NamedDependency[History]
) -> Response[str]:
    """Show one delivery with its attempts, and send it again from there."""
    found: answers.Delivery = await deliveries_api.show_delivery.fn(delivery_id, visit.principal, history)
    may_retry = not visit.principal.roles <= {"auditor", "security"}  # the others who see it may: ``history.may_open``
    return visit.page("delivery.html", delivery=found, may_retry=may_retry)


@post("/console/deliveries/{delivery_id:str}/retry", request_max_body_size=MAX_FORM_BYTES)
async def retry(
    delivery_id: FromPath[str], order: NamedDependency[Order], replaying: NamedDependency[Replaying]
) -> Response[None]:
    """Send a delivery again now: 303 to it, or to the replay of one that was delivered."""
    done: answers.Delivery = await deliveries_api.retry_delivery.fn(delivery_id, order.visit.principal, replaying)
    return redirect(f"/console/deliveries/{quote(done['id'])}", 303)


# Audit and callers


@get("/console/audit")
async def search_audit(
    request: AnyRequest, visit: NamedDependency[Visit], audit: NamedDependency[Audit]
) -> Response[str]:
    """List audit records, newest first; who looks is recorded, as with ``GET /v1/audit``."""
    wanted = asked(request, *AUDIT_FILTERS)
    found: answers.AuditRecordList = await audit_api.search_audit.fn(
        visit.principal, audit, **wanted, limit=50, cursor=asked(request, "cursor")["cursor"]
    )
    following = older("/console/audit", wanted, found["next_cursor"])
    return visit.page("audit.html", records=found["data"], wanted=wanted, older=following)


@get("/console/callers")
async def list_callers(
    request: AnyRequest, visit: NamedDependency[Visit], callers: NamedDependency[Callers]
) -> Response[str]:
    """List callers and when their keys were last used, newest first."""
    found: answers.CallerList = await callers_api.list_callers.fn(
        visit.principal, callers, limit=50, cursor=asked(request, "cursor")["cursor"]
    )
    return visit.page("callers.html", callers=found["data"], older=older("/console/callers", {}, found["next_cursor"]))


# What goes wrong


def _to_log_in(_request: AnyRequest, _error: Unauthenticated) -> Response[None]:
    return redirect(LOG_IN, 303)


def _show_error(request: AnyRequest, error: BrokerError) -> Response[str]:
    """Answer an error by a page with the fields that were refused; our own text, and no input."""
    if error.status >= 500:
        log.warning("request.failed", code=error.code, exc_info=error.__cause__ or False)
    pages: Pages = request.app.state.parts.pages
    request_id = request.scope["state"].get("request_id", "")
    response = shown(pages, "error.html", error.status, error=error, request_id=request_id)
    response.headers.update(error.headers)
    return response


def routes() -> Router:
    """Return the routes of the console."""
    handlers = [
        *(log_in_page, log_in, log_out, overview, integration),
        *(list_connections, connection, delete_connection, stop),
        *(list_revocations, revocation, lift),
        *(list_deliveries, delivery, retry),
        *(search_audit, list_callers),
    ]
    return Router(
        path="/",
        route_handlers=handlers,
        dependencies={"visit": Provide(visit_of), "order": Provide(order_of)},
        exception_handlers={Unauthenticated: _to_log_in, BrokerError: _show_error},
        include_in_schema=False,
        tags=["console"],
    )
