"""The browser's two routes of a flow, start and callback: HTTP in, HTTP out, ``flow`` decides."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from litestar import Response, Router, route
from litestar.connection import Request
from litestar.datastructures import Cookie
from litestar.di import NamedDependency
from litestar.enums import HttpMethod, MediaType
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath

from broker.errors import FlowError, RateLimited
from broker.limits import AddressLimiter, client_address
from broker.models import BrowserSession
from broker.oauth.browser import changes_nothing, flow_cookies_to_drop, parse_cookies, session_cookie_name
from broker.oauth.flow import FLOW_SECONDS, OUTCOME_SECONDS, Callback, Flows, Outcome, Start, Started
from broker.sessions import ID_PATTERN, TOKEN_PATTERN, Sessions
from broker.settings import Settings

AnyRequest = Request[Any, Any, Any]
READ = [HttpMethod.GET, HttpMethod.HEAD]


def browser_answers(*statuses: int) -> dict[int, ResponseSpec]:
    """Return the documentation of what a browser gets besides: redirects, pages, and nothing for what is no click."""
    found = sorted({400, 429, 500, 503, *statuses})
    return {
        status: ResponseSpec(
            str if status == 200 or status >= 400 else None,
            generate_examples=False,
            description=HTTPStatus(status).phrase,
            media_type=MediaType.HTML,
        )
        for status in found
    }


@route(
    "/oauth/{integration:str}/start",
    http_method=READ,
    status_code=302,
    responses=browser_answers(204, 302, 303, 404),
)
async def start(
    integration: FromPath[str],
    request: AnyRequest,
    flows: NamedDependency[Flows],
    sessions: NamedDependency[Sessions],
    limiter: NamedDependency[AddressLimiter],
    settings: NamedDependency[Settings],
) -> Response[None]:
    """Start a flow: 302 to the provider with a cookie that binds the flow to this browser."""
    if changes_nothing(request.method, request.headers):
        return nothing()
    address, asked, cookies = address_of(request, settings), single_parameters(request), cookies_of(request)
    shown, session = asked.get("session"), None
    try:
        await limiter.check("start", address)
        if shown is not None and TOKEN_PATTERN.fullmatch(shown):
            return await claimed(request, shown, asked, cookies, sessions, settings)
        session = await owned_session(shown, cookies, sessions, settings)
        started = await flows.start(Start(integration, asked.get("return_to"), session, address))
    except (FlowError, RateLimited) as error:
        back = flows.way_back(error, asked.get("return_to"), session)
        if back is None:
            raise
        return redirect(back, 303)
    return bound(redirect(started.url, 302), started, cookies, settings)


def bound(response: Response[None], started: Started, cookies: Mapping[str, str], settings: Settings) -> Response[None]:
    """Bind a flow to this browser: set its cookie, and drop the oldest ones of too many flows.

    The cookie outlives a flow, a second one that asks for consent again, and the time in which a duplicate is answered.
    """
    for name in flow_cookies_to_drop(cookies, development=settings.development):
        response.set_cookie(bound_cookie(name, "", 0, settings))
    seconds = int(2 * FLOW_SECONDS + OUTCOME_SECONDS)
    response.set_cookie(bound_cookie(started.cookie_name, started.cookie_value.reveal(), seconds, settings))
    return response


@route(
    "/oauth/{integration:str}/callback",
    http_method=READ,
    status_code=303,
    responses=browser_answers(200, 204, 302, 303),
)
async def callback(
    integration: FromPath[str],
    request: AnyRequest,
    flows: NamedDependency[Flows],
    limiter: NamedDependency[AddressLimiter],
    settings: NamedDependency[Settings],
    done_page: NamedDependency[Callable[[Outcome], Response[str]]],
) -> Response[Any]:
    """Finish a flow: 303 to where it was started from, or the built-in page."""
    if changes_nothing(request.method, request.headers):
        return nothing()
    await limiter.check("callback", address_of(request, settings))
    parameters = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    cookies = cookies_of(request)
    outcome = await flows.finish(Callback(integration, parameters, cookies))
    if outcome.url is not None:
        return redirect(outcome.url, 302 if outcome.again else 303)
    if outcome.error is not None:
        raise FlowError(outcome.error)
    return done_page(outcome)


async def owned_session(
    shown: str | None, cookies: dict[str, str], sessions: Sessions, settings: Settings
) -> BrowserSession | None:
    """Return the session that a public id names, if this browser owns it (FlowError); None without an id.

    Without ``session`` in the URL, session cookies are ignored.
    """
    if shown is None:
        return None
    if not ID_PATTERN.fullmatch(shown):
        raise FlowError("session_expired")
    return await sessions.owned(shown, cookies.get(session_cookie_name(shown, development=settings.development)))


async def claimed(
    request: AnyRequest,
    token: str,
    asked: dict[str, str],
    cookies: dict[str, str],
    sessions: Sessions,
    settings: Settings,
) -> Response[None]:
    """Let this browser own the session, and redirect to the same URL with the public id instead of the token."""
    session_id = "ses_" + token.split("_")[1]
    name = session_cookie_name(session_id, development=settings.development)
    row, cookie = await sessions.claim(token, cookies.get(name))
    path = quote(re.sub("/+", "/", request.scope["path"]))  # a path that begins with // would name another host
    response = redirect(f"{path}?{urlencode({**asked, 'session': row.id})}", 303)
    if cookie is not None:
        lives = max(1, int(row.expires_at - row.created_at))
        response.set_cookie(bound_cookie(name, cookie.reveal(), lives, settings))
    return response


def single_parameters(request: AnyRequest) -> dict[str, str]:
    """Return query parameters; one of ours that is given twice is refused: which counts would be anybody's guess."""
    pairs = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    names = [name for name, _ in pairs]
    if names.count("return_to") > 1:
        raise FlowError("return_to_invalid")
    if any(names.count(name) > 1 for name in ("session", "connection")):
        raise FlowError("state_invalid")
    return dict(pairs)


def cookies_of(request: AnyRequest) -> dict[str, str]:
    """Return the cookies that a browser sent; HTTP/2 may bring them in several fields (RFC 9113 8.2.3)."""
    return parse_cookies("; ".join(request.headers.getall("cookie", [])))


def address_of(request: AnyRequest, settings: Settings) -> str:
    """Return the browser's address, for audit and limits only."""
    peer = request.client.host if request.client is not None else "unknown"
    forwarded_for = ", ".join(request.headers.getall("x-forwarded-for", []))
    return client_address(peer, forwarded_for, settings.trusted_proxies)


def redirect(url: str, status_code: int) -> Response[None]:
    """Return a redirect that is neither stored nor referred from, with an empty body."""
    headers = {"Location": url, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
    return Response(None, status_code=status_code, headers=headers, media_type=MediaType.TEXT)


def nothing() -> Response[None]:
    """Answer HEAD, prefetch and subresource requests without changing anything."""
    return Response(None, status_code=204, headers={"Cache-Control": "no-store"})


def bound_cookie(name: str, value: str, max_age_seconds: int, settings: Settings) -> Cookie:
    """Return a cookie that only this host gets back, never a script, and not from another site's form."""
    return Cookie(
        key=name,
        value=value,
        max_age=max_age_seconds,
        path="/",
        secure=not settings.development,
        httponly=True,
        samesite="lax",
    )


def routes() -> Router:
    """Return the flow's routes."""
    return Router(path="/", route_handlers=[start, callback], tags=["browser"])
