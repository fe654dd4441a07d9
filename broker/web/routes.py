"""The connect page and the style sheet over HTTP: what a browser sends is checked here, ``connect`` decides."""

from __future__ import annotations

import hmac
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from litestar import MediaType, Response, Router, get, post, route
from litestar.connection import Request
from litestar.di import NamedDependency
from litestar.params import FromPath

from broker.connections import Connections
from broker.errors import FlowError, NotFound
from broker.integrations import Integrations
from broker.limits import AddressLimiter
from broker.models import BrowserSession
from broker.oauth.browser import changes_nothing, session_cookie_name
from broker.oauth.return_to import allowed_return_to
from broker.oauth.routes import (
    READ,
    address_of,
    browser_answers,
    claimed,
    cookies_of,
    nothing,
    owned_session,
    redirect,
    single_parameters,
)
from broker.sessions import TOKEN_PATTERN, Sessions
from broker.settings import Settings
from broker.web import connect
from broker.web.pages import Pages

AnyRequest = Request[Any, Any, Any]
MAX_FORM_BYTES = 4096
FORM = "application/x-www-form-urlencoded"


@get("/assets/{name:str}", include_in_schema=False)
async def asset(name: FromPath[str], pages: NamedDependency[Pages]) -> Response[bytes]:
    """Serve the style sheet; its name changes with its content, so it may be kept for good."""
    if name != pages.stylesheet_name:
        raise NotFound
    headers = {
        "Cache-Control": "public, max-age=31536000, immutable",
        "Cross-Origin-Resource-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(pages.stylesheet, media_type=MediaType.CSS, headers=headers)


@route("/connect", http_method=READ, media_type=MediaType.HTML, responses=browser_answers(204, 303))
async def show(
    request: AnyRequest,
    sessions: NamedDependency[Sessions],
    integrations: NamedDependency[Integrations],
    connections: NamedDependency[Connections],
    limiter: NamedDependency[AddressLimiter],
    settings: NamedDependency[Settings],
    pages: NamedDependency[Pages],
) -> Response[Any]:
    """Show which integrations a session may connect and their state, with connect, reconnect and disconnect."""
    if changes_nothing(request.method, request.headers):
        return nothing()
    await limiter.check("connect", address_of(request, settings))
    asked, cookies = single_parameters(request), cookies_of(request)
    shown = asked.get("session", "")
    if TOKEN_PATTERN.fullmatch(shown):
        return await claimed(request, shown, asked, cookies, sessions, settings)
    session = await _owned(asked, cookies, sessions, settings)
    return_to = _return_to(session, settings)
    body = pages.connect_page(
        session_id=session.id,
        return_to=return_to,
        application=_application(return_to),
        shown=await connect.shown_integrations(session, await sessions.minter(session), integrations, connections),
        notice=asked.get("disconnected"),
    )
    return _page(body, pages)


@route("/connect/disconnect", http_method=READ, include_in_schema=False)
async def ask_to_disconnect(
    request: AnyRequest,
    sessions: NamedDependency[Sessions],
    integrations: NamedDependency[Integrations],
    connections: NamedDependency[Connections],
    limiter: NamedDependency[AddressLimiter],
    settings: NamedDependency[Settings],
    pages: NamedDependency[Pages],
) -> Response[Any]:
    """Ask once more before a connection is deleted."""
    if changes_nothing(request.method, request.headers):
        return nothing()
    await limiter.check("connect", address_of(request, settings))
    asked, cookies = single_parameters(request), cookies_of(request)
    session = await _owned(asked, cookies, sessions, settings)
    minter = await sessions.minter(session)
    found = await connect.chosen(session, minter, asked.get("connection", ""), integrations, connections)
    if found is None:
        return redirect(_connect_url(session), 303)
    integration, connection = found
    cookie = cookies[session_cookie_name(session.id, development=settings.development)]
    body = pages.disconnect_page(
        session_id=session.id,
        application=_application(_return_to(session, settings)),
        title=integration.title,
        connection=connection,
        form_token=connect.form_token(cookie, connection.id),
    )
    return _page(body, pages)


@post("/connect/disconnect", include_in_schema=False, request_max_body_size=MAX_FORM_BYTES)
async def disconnect(
    request: AnyRequest,
    sessions: NamedDependency[Sessions],
    connections: NamedDependency[Connections],
    limiter: NamedDependency[AddressLimiter],
    settings: NamedDependency[Settings],
) -> Response[None]:
    """Delete one connection of the session's subject; 303 to the connect page, which says what it did."""
    if changes_nothing(request.method, request.headers):
        return nothing()
    await limiter.check("connect", address_of(request, settings))
    require_own_origin(request, settings)
    form = await form_of(request)
    if form is None:
        raise FlowError("state_invalid")
    cookies = cookies_of(request)
    session = await _owned(form, cookies, sessions, settings)
    connection_id = form.get("connection", "")
    cookie = cookies[session_cookie_name(session.id, development=settings.development)]
    proof = form.get("form_token", "")
    if not hmac.compare_digest(proof.encode(), connect.form_token(cookie, connection_id).encode()):
        raise FlowError("state_invalid")
    result = await connect.disconnect(session, await sessions.minter(session), connection_id, connections)
    return redirect(_connect_url(session, **({"disconnected": result} if result is not None else {})), 303)


def require_own_origin(request: AnyRequest, settings: Settings) -> None:
    """Refuse a form that another site sent (FlowError ``state_invalid``): see ``is_own_origin``."""
    if not is_own_origin(request, settings):
        raise FlowError("state_invalid")


def is_own_origin(request: AnyRequest, settings: Settings) -> bool:
    """Return whether a form may be one of our pages'.

    ``Sec-Fetch-Site`` decides where there is one. Our pages send no referrer, which makes ``Origin`` of our own forms
    ``null`` (Fetch, "append a request Origin header"): then the SameSite cookie and the form's token decide alone.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin", "null")
    return site == "same-origin" or (site is None and origin in {"null", settings.public_url})


async def form_of(request: AnyRequest) -> dict[str, str] | None:
    """Return the fields of a form, each once; None for anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    pairs = parse_qsl(body.decode("latin-1"), keep_blank_values=True) if kind == FORM else []
    fields = dict(pairs)
    return None if len(fields) < len(pairs) else fields


async def _owned(
    asked: dict[str, str], cookies: dict[str, str], sessions: Sessions, settings: Settings
) -> BrowserSession:
    session = await owned_session(asked.get("session"), cookies, sessions, settings)
    if session is None:
        raise FlowError("session_required")
    return session


def _return_to(session: BrowserSession, settings: Settings) -> str:
    """Return where the session's flows end; it must be there, and still be on the list (FlowError)."""
    return_to = session.return_to
    if return_to is None:
        raise FlowError("return_to_invalid", "This link does not say where to go afterwards.")
    if not allowed_return_to(return_to, settings.return_to, development=settings.development):
        raise FlowError("return_to_invalid")
    return return_to


def _application(return_to: str) -> str:
    return urlsplit(return_to).hostname or ""


def _connect_url(session: BrowserSession, **more: str) -> str:
    return f"/connect?{urlencode({'session': session.id, **more})}"


def _page(body: str, pages: Pages) -> Response[str]:
    return Response(body, media_type=MediaType.HTML, headers=pages.security_headers())


def routes() -> Router:
    """Return the routes of the built-in pages."""
    return Router(path="/", route_handlers=[asset, show, ask_to_disconnect, disconnect], tags=["browser"])
