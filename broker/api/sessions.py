"""``POST /v1/sessions``: a backend's session for one user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from broker import policy
from broker.api import answers
from broker.api.requests import AnyRequest, TagName, TagValue, Text, problems, show_once, shown_name
from broker.errors import FieldError, InvalidRequest
from broker.integrations import Integrations, View
from broker.integrations.config import contradictions, fits, to_be_given
from broker.models import BrowserSession, rfc3339
from broker.oauth.return_to import allowed_return_to
from broker.policy import Principal, Target
from broker.sessions import MAX_SECONDS, MIN_SECONDS, Sessions, Wanted
from broker.settings import Settings
from providers.spec import Provider, Secret, Variable

Seconds = Annotated[int, msgspec.Meta(ge=MIN_SECONDS, le=MAX_SECONDS)]
Texts = Annotated[list[Text], msgspec.Meta(min_length=1, max_length=100)]
Tags = Annotated[dict[TagName, TagValue], msgspec.Meta(max_length=64)]
Variables = Annotated[dict[str, Text], msgspec.Meta(max_length=20)]


class SessionBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a session is asked for with. ``integrations`` left out: all that this caller may connect now."""

    subject: Text
    integrations: Texts | None = None
    return_to: str | None = None
    scopes: Texts | None = None
    variables: Variables = {}
    tags: Tags = {}
    expires_in: Seconds = 600


def session_answer(row: BrowserSession, token: Secret, settings: Settings) -> answers.Session:
    """Return a session with its token, shown once; the URLs carry the token and are worth nothing after the first use."""
    base, shown = settings.public_url, token.reveal()
    return {
        "id": row.id,
        "token": shown,
        "start_urls": {name: f"{base}/oauth/{name}/start?session={shown}" for name in row.integrations or ()},
        "connect_url": f"{base}/connect?session={shown}",
        "expires_at": rfc3339(row.expires_at),
    }


@post("/sessions", responses=problems(403, 404, 409, 413, 415))
async def create_session(
    data: JSONBody[SessionBody],
    request: AnyRequest,
    principal: NamedDependency[Principal],
    sessions: NamedDependency[Sessions],
    integrations: NamedDependency[Integrations],
    settings: NamedDependency[Settings],
) -> answers.Session:
    """Mint a session; each integration, its scopes and return_to are checked now, not in the user's browser."""
    views = await _allowed_integrations(data, principal, integrations)
    require_return_to(data.return_to, settings)
    wrong = [*_scope_problems(data.scopes, views), *_variable_problems(data, views, integrations.catalog)]
    if wrong:
        raise InvalidRequest(errors=wrong)
    wanted = Wanted(
        subject=data.subject,
        integrations=[view.row.name for view in views],  # never "all": that would grow beyond the caller's grants
        return_to=data.return_to,
        scopes=data.scopes,
        variables=data.variables,
        tags=data.tags,
        expires_in=data.expires_in,
    )
    row, token = await sessions.mint(wanted, principal)
    show_once(request, row.id)
    return session_answer(row, token, settings)


def require_return_to(asked: str | None, settings: Settings) -> None:
    """Raise InvalidRequest for an address that is not on the list."""
    if asked is not None and not allowed_return_to(asked, settings.return_to, development=settings.development):
        raise InvalidRequest(errors=[FieldError("/return_to", "is not on the list")])


async def _allowed_integrations(data: SessionBody, principal: Principal, integrations: Integrations) -> list[View]:
    """Return the integrations of the session: those named, each within the caller's grants, or all that it may connect."""
    if data.integrations is None:
        views = [view for view in await integrations.every() if _connectable(view, integrations.catalog)]
        targets = {view.row.name: Target(view.row.name, data.subject, data.tags) for view in views}
        views = [view for view in views if policy.allowed(principal, "connect", targets[view.row.name])]
        if not views:
            raise InvalidRequest(errors=[FieldError("/integrations", "there is none that this caller may connect")])
        return views
    views = []
    for index, name in enumerate(dict.fromkeys(data.integrations)):
        policy.require(principal, "connect", Target(name, data.subject, data.tags))
        view = await integrations.get(name)
        if not _connectable(view, integrations.catalog):
            raise InvalidRequest(errors=[FieldError(f"/integrations/{index}", "is switched off, or has no OAuth flow")])
        views.append(view)
    return views


def _connectable(view: View, catalog: Mapping[str, Provider]) -> bool:
    provider = catalog.get(view.row.provider)
    return provider is not None and provider.oauth2 is not None and view.row.enabled


def _scope_problems(scopes: Sequence[str] | None, views: Sequence[View]) -> list[FieldError]:
    if scopes is None or all(set(scopes) <= set(view.row.scopes) for view in views):
        return []
    return [FieldError("/scopes", "must lie within the scopes of each integration")]


def _variable_problems(data: SessionBody, views: Sequence[View], catalog: Mapping[str, Provider]) -> list[FieldError]:
    """Return which variables are unknown, missing, settled otherwise, or do not fit: they become part of a host.

    Missing is what an integration that is named cannot start without: it has neither a default nor a ``config.variables``.
    """
    declared: dict[str, list[Variable]] = {}
    needed: set[str] = set()
    for view in views:
        for variable in catalog[view.row.provider].variables:
            declared.setdefault(variable.name, []).append(variable)
        needed |= to_be_given(catalog[view.row.provider], view.row.config) if data.integrations is not None else set()
    given = data.variables
    problems = [FieldError(f"/variables/{shown_name(name)}", "is not used here") for name in given.keys() - declared]
    problems += [FieldError(f"/variables/{name}", "is required") for name in needed - given.keys()]
    for name in declared.keys() & given.keys():
        if not all(fits(variable, given[name]) for variable in declared[name]):
            problems.append(FieldError(f"/variables/{name}", f"must look like {declared[name][0].example}"))
    problems += [problem for view in views for problem in contradictions(view.row.config, given)]
    return sorted(problems, key=lambda problem: problem.pointer)


def routes() -> Router:
    """Return the routes of this resource."""
    return Router(path="/", route_handlers=[create_session], tags=["sessions"])
