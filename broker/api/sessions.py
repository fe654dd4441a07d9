"""``POST /v1/sessions``: a backend's session for one user."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from broker import policy
from broker.api.requests import AnyRequest, show_once
from broker.errors import FieldError, InvalidRequest
from broker.integrations import Integrations
from broker.models import BrowserSession, rfc3339
from broker.oauth.return_to import allowed_return_to
from broker.policy import Principal, Target
from broker.sessions import MAX_SECONDS, MIN_SECONDS, Sessions, Wanted
from broker.settings import Settings
from providers.spec import Secret

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]


class SessionBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a session is asked for with."""

    subject: Text
    integrations: list[Text] | None = None
    return_to: str | None = None
    scopes: list[Text] | None = None
    variables: dict[str, str] = {}
    tags: dict[str, str] = {}
    expires_in: Annotated[int, msgspec.Meta(ge=MIN_SECONDS, le=MAX_SECONDS)] = 600


def session_answer(row: BrowserSession, token: Secret, names: list[str], settings: Settings) -> dict[str, Any]:
    """Return a session with its token, shown once; the URLs carry the token and are worth nothing after the first use."""
    base, shown = settings.public_url, token.reveal()
    return {
        "id": row.id,
        "token": shown,
        "start_urls": {name: f"{base}/oauth/{name}/start?session={shown}" for name in names},
        "connect_url": f"{base}/connect?session={shown}",
        "expires_at": rfc3339(row.expires_at),
    }


@post("/sessions")
async def create_session(
    data: JSONBody[SessionBody],
    request: AnyRequest,
    principal: NamedDependency[Principal],
    sessions: NamedDependency[Sessions],
    integrations: NamedDependency[Integrations],
    settings: NamedDependency[Settings],
) -> dict[str, Any]:
    """Mint a session; each integration, its scopes and return_to are checked now, not in the user's browser."""
    names = await _allowed_integrations(data, principal, integrations)
    if data.return_to is not None and not allowed_return_to(
        data.return_to, settings.return_to, development=settings.development
    ):
        raise InvalidRequest(errors=[FieldError("/return_to", "is not on the list")])
    wanted = Wanted(
        subject=data.subject,
        integrations=data.integrations,
        return_to=data.return_to,
        scopes=data.scopes,
        variables=data.variables,
        tags=data.tags,
        expires_in=data.expires_in,
    )
    row, token = await sessions.mint(wanted, principal)
    show_once(request, row.id)
    return session_answer(row, token, names, settings)


async def _allowed_integrations(data: SessionBody, principal: Principal, integrations: Integrations) -> list[str]:
    """Return the integrations of the session: those named, each within the caller's grants, or all that it may connect."""
    if data.integrations is None:
        views = await integrations.page(limit=200)
        names = [view.row.name for view in views]
        names = [n for n in names if policy.allowed(principal, "connect", Target(n, data.subject, data.tags))]
    else:
        names = data.integrations
    for index, name in enumerate(names):
        policy.require(principal, "connect", Target(name, data.subject, data.tags))
        view = await integrations.get(name)
        if data.scopes is not None and not set(data.scopes) <= set(view.row.scopes):
            raise InvalidRequest(errors=[FieldError("/scopes", "must lie within the integration's scopes")])
        provider = integrations.catalog[view.row.provider]
        if set(data.variables) - {variable.name for variable in provider.variables} and data.integrations is not None:
            raise InvalidRequest(errors=[FieldError(f"/integrations/{index}", "does not take these variables")])
    if not names:
        raise InvalidRequest(errors=[FieldError("/integrations", "this caller may connect none")])
    return names


def routes() -> Router:
    """Return the routes of this resource."""
    return Router(path="/", route_handlers=[create_session], tags=["sessions"])
