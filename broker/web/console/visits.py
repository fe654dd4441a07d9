"""What every page of the console shares: who is looking, proof that a form is ours, and the page around the contents."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlencode

from litestar import MediaType, Response
from litestar.connection import Request
from litestar.datastructures import Cookie
from litestar.di import NamedDependency

from broker import policy
from broker.api import audit
from broker.api.requests import CONTROL, require_path_parts
from broker.errors import Forbidden, InvalidRequest, Unauthenticated
from broker.limits import AddressLimiter
from broker.oauth.routes import address_of, cookies_of
from broker.policy import Principal, Role
from broker.settings import Settings
from broker.web.console.sessions import ConsoleSessions
from broker.web.pages import Pages
from broker.web.routes import form_of, is_own_origin

AnyRequest = Request[Any, Any, Any]
FORM_COOKIE = re.compile(r"[A-Za-z0-9_-]{43}")
HOME: Final = "/console"
LOG_IN: Final = "/console/log-in"
FOREIGN_FORM: Final = (
    "This form is not of this console, or too old. Load the page again and repeat it; nothing was done."
)
READERS: Final[tuple[Role, ...]] = audit.READERS  # who may read the audit may read revocations and callers
TABS: Final[tuple[tuple[str, str, tuple[Role, ...]], ...]] = (
    (HOME, "Overview", ()),
    ("/console/connections", "Connections", ()),
    ("/console/deliveries", "Deliveries", ()),
    ("/console/revocations", "Revocations", READERS),
    ("/console/audit", "Audit", READERS),
    ("/console/callers", "Callers", READERS),
)


class Tab(NamedTuple):
    """A link above every page; ``here``: to where the page belongs."""

    path: str
    title: str
    here: bool


@dataclass(frozen=True, slots=True)
class Visit:
    """A request of somebody who is logged in, with the roles and grants of now; ``cookie`` is the session's."""

    principal: Principal
    path: str
    pages: Pages
    cookie: str = field(repr=False)

    def page(self, template: str, **values: object) -> Response[str]:
        """Return a page of the console. ``form_token(path)`` is there for the forms in it."""
        tabs = [
            Tab(*tab[:2], here=self._is_in(tab[0])) for tab in TABS if not tab[2] or has_role(self.principal, *tab[2])
        ]
        token = partial(form_token, self.cookie)
        given: dict[str, Any] = {"tabs": tabs, "caller": self.principal.name, "form_token": token, **values}
        return shown(self.pages, template, **given)

    def _is_in(self, tab: str) -> bool:
        return self.path == tab or (tab != HOME and self.path.startswith(f"{tab}/"))


@dataclass(frozen=True, slots=True)
class Order:
    """A form of the console that was sent by the browser it was made for; its fields are not checked."""

    visit: Visit
    form: Mapping[str, str] = field(repr=False)


async def visit_of(
    request: AnyRequest,
    settings: NamedDependency[Settings],
    limiter: NamedDependency[AddressLimiter],
    pages: NamedDependency[Pages],
    console_sessions: NamedDependency[ConsoleSessions],
) -> Visit:
    """Return who is looking (a Litestar dependency). Unauthenticated for who is not logged in, any more or at all."""
    await limiter.check("console", address_of(request, settings))
    require_path_parts(request.path_params)
    cookie = cookies_of(request).get(cookie_name(settings))
    if cookie is None:
        raise Unauthenticated
    return Visit(await console_sessions.resume(cookie), request.url.path, pages, cookie)


async def order_of(request: AnyRequest, visit: NamedDependency[Visit], settings: NamedDependency[Settings]) -> Order:
    """Return a form that is ours (a Litestar dependency). Forbidden for one of another site, session or page."""
    return Order(visit, await own_form(request, visit.cookie, settings))


async def own_form(request: AnyRequest, cookie: str, settings: Settings) -> Mapping[str, str]:
    """Return the fields of a form that we served to the holder of ``cookie`` for this very path (Forbidden)."""
    form = await form_of(request)
    if form is None or not is_own_origin(request, settings):
        raise Forbidden(FOREIGN_FORM)
    proof = form.get("form_token", "")
    if not cookie or not hmac.compare_digest(proof.encode(), form_token(cookie, request.url.path).encode()):
        raise Forbidden(FOREIGN_FORM)
    return form


def form_token(cookie: str, path: str) -> str:
    """Return the proof that a form was served to this browser, for this path alone: HMAC-SHA256 under its cookie."""
    return hmac.new(cookie.encode(), f"console {path}".encode(), hashlib.sha256).hexdigest()


def asked(request: AnyRequest, *names: str) -> dict[str, str | None]:
    """Return what the query says of these names; None for what is left out or left empty, and all else is passed over."""
    pairs = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    if any(CONTROL.search(value) for _, value in pairs):
        raise InvalidRequest("The address holds control characters")
    given = dict(pairs)
    return {name: given.get(name) or None for name in names}


def older(path: str, wanted: Mapping[str, str | None], next_cursor: str | None) -> str | None:
    """Return the address of a list's next page, None at its end."""
    if next_cursor is None:
        return None
    kept = {name: value for name, value in wanted.items() if value is not None}
    return f"{path}?{urlencode({**kept, 'cursor': next_cursor})}"


def has_role(principal: Principal, *roles: Role) -> bool:
    """Return what ``policy.require_role`` would decide: to show what there is, not to let anything pass."""
    try:
        policy.require_role(principal, *roles)
    except Forbidden:
        return False
    return True


def shown(pages: Pages, template: str, status_code: int = 200, **values: object) -> Response[str]:
    """Return a page with the headers of every page."""
    body, headers = pages.console_page(template, **values), pages.security_headers()
    return Response(body, status_code=status_code, media_type=MediaType.HTML, headers=headers)


def cookie_name(settings: Settings, *, form: bool = False) -> str:
    """Return the name of the session's cookie; with ``form`` that of the one which binds a log-in form to a browser."""
    prefix = "" if settings.development else "__Host-"  # plain http cannot have it
    return f"{prefix}brk_console{'_form' if form else ''}"


def bound_cookie(name: str, value: str, settings: Settings, *, over: bool = False) -> Cookie:
    """Return a cookie that this host alone gets, never a script and never from another site; ``over`` removes it."""
    return Cookie(
        key=name,
        value=value,
        max_age=0 if over else None,
        path="/",
        secure=not settings.development,
        httponly=True,
        samesite="strict",
    )


def form_cookie(request: AnyRequest, settings: Settings) -> str | None:
    """Return the cookie that binds log-in forms to this browser, None where it has none of ours."""
    held = cookies_of(request).get(cookie_name(settings, form=True), "")
    return held if FORM_COOKIE.fullmatch(held) else None


def new_form_cookie() -> str:
    """Return 256 random bits for the browser that a log-in form is served to."""
    return secrets.token_urlsafe(32)
