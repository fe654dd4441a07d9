"""``/v1/webhook-sources``: where providers post their events, the secrets that prove them, and what was refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from broker import policy
from broker.api import answers
from broker.api.requests import PLAIN, AnyRequest, checked_limit, page, position_of, problems, short_page, show_once
from broker.models import WebhookRejection, WebhookSecret, rfc3339
from broker.policy import Principal, Role
from broker.webhooks.sources import SourceDraft, Sources, SourceView
from providers.spec import Secret

Text = Annotated[str, msgspec.Meta(max_length=255, pattern=PLAIN)]
SecretText = Annotated[str, msgspec.Meta(min_length=1, max_length=16_384)]
Overlap = Annotated[float, msgspec.Meta(ge=0, le=2_592_000)]
READERS: tuple[Role, ...] = ("operator", "auditor")


class CreateBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new source. Without ``secret`` one is made where that makes sense; ``null``: it is added later."""

    name: Text
    provider: Text
    secret: SecretText | msgspec.UnsetType | None = msgspec.UNSET
    connection_id: Text | None = None
    register: bool = False
    tolerance_seconds: float | None = None
    config: dict[str, Any] = {}
    enabled: bool = True


class PatchBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A merge patch (RFC 7396): null puts a value back to what it is by itself. Secrets have routes of their own."""

    name: Text | msgspec.UnsetType = msgspec.UNSET
    connection_id: Text | msgspec.UnsetType | None = msgspec.UNSET
    register: bool | msgspec.UnsetType = msgspec.UNSET
    tolerance_seconds: float | msgspec.UnsetType | None = msgspec.UNSET
    config: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    enabled: bool | msgspec.UnsetType = msgspec.UNSET


class SecretBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One more secret; ``expires_old_in``: for how many seconds the others still count."""

    secret: SecretText | None = None
    expires_old_in: Overlap | None = None


def source_json(view: SourceView) -> answers.WebhookSource:
    """Return a source; no secret is among it, nor a setting that is one."""
    row, scheme = view.row, view.webhook.scheme if view.webhook is not None else None
    return {
        "id": row.id,
        "name": row.name,
        "provider": row.provider,
        "url": view.url,
        "connection_id": row.connection_id,
        "register": row.register_at_provider,
        "tolerance_seconds": row.tolerance_seconds,
        "config": {"kind": row.kind, **row.config},
        "scheme": scheme.title if scheme is not None else None,
        "covers": sorted(scheme.covers) if scheme is not None else [],
        "enabled": row.enabled,
        "status": view.status,
        "status_reason": view.status_reason,
        "secrets": [secret_json(one) for one in view.secrets],
        "registration": registration_json(view.hook) if view.hook is not None else None,
        "created_at": rfc3339(row.created_at),
        "updated_at": rfc3339(row.updated_at),
    }


def registration_json(hook: Mapping[str, Any]) -> answers.Registration:
    """Return what is known of the hook at the provider."""
    return {
        "state": hook["state"],
        "error": hook["error"],
        "remote_id": hook["remote_id"],
        "expires_at": rfc3339(hook["expires_at"]),
        "checked_at": rfc3339(hook["checked_at"]),
    }


def secret_json(row: WebhookSecret) -> answers.SourceSecret:
    """Return a secret's row: when, whence and until when; not what."""
    return {
        "id": row.id,
        "origin": row.origin,
        "created_at": rfc3339(row.created_at),
        "expires_at": rfc3339(row.expires_at),
        "last_used_at": rfc3339(row.last_used_at),
    }


def rejection_json(row: WebhookRejection) -> answers.Rejection:
    """Return a refused request, or ``count`` of a kind: the step that failed, and nothing that was in it."""
    return {
        "id": str(row.id),
        "at": rfc3339(row.at),
        "step": row.step,
        "method": row.method,
        "size": row.size,
        "address": row.address,
        "count": row.count,
    }


@get("/webhook-sources", responses=problems(403))
async def list_sources(
    principal: NamedDependency[Principal],
    sources: NamedDependency[Sources],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.WebhookSourceList:
    """List sources, newest first."""
    policy.require_role(principal, *READERS)
    views = await sources.page(limit=checked_limit(limit) + 1, before=position_of(cursor))
    shown = views[:limit]
    last = (shown[-1].row.created_at, shown[-1].row.id) if len(views) > limit else None
    return page([source_json(view) for view in shown], last)


@post("/webhook-sources", status_code=201, responses=problems(403, 409, 413, 415))
async def create_source(
    data: JSONBody[CreateBody],
    request: AnyRequest,
    principal: NamedDependency[Principal],
    sources: NamedDependency[Sources],
) -> answers.NewWebhookSource:
    """Make a source; a secret that is made for it is shown once."""
    policy.require_role(principal, "operator")
    fields = msgspec.structs.asdict(data)
    given = fields.pop("secret")
    secret = Secret(given) if isinstance(given, str) else None
    draft = SourceDraft(**fields, secret=secret, generate=given is msgspec.UNSET)
    view, made = await sources.create(draft, principal)
    if made is None:
        return cast("answers.NewWebhookSource", source_json(view))  # without the member that may be missing
    show_once(request, view.row.id)
    return {**source_json(view), "secret": made.reveal()}


@get("/webhook-sources/{source_id:str}", responses=problems(403, 404))
async def show_source(
    source_id: FromPath[str], principal: NamedDependency[Principal], sources: NamedDependency[Sources]
) -> answers.WebhookSource:
    """Show one source."""
    policy.require_role(principal, *READERS)
    return source_json(await sources.get(source_id))


@patch("/webhook-sources/{source_id:str}", responses=problems(403, 404, 409, 413, 415))
async def change_source(
    source_id: FromPath[str],
    data: JSONBody[PatchBody],
    principal: NamedDependency[Principal],
    sources: NamedDependency[Sources],
) -> answers.WebhookSource:
    """Change a source; effective everywhere within half a second."""
    policy.require_role(principal, "operator")
    given = msgspec.structs.asdict(data)
    changes = {name: value for name, value in given.items() if value is not msgspec.UNSET}
    return source_json(await sources.update(source_id, changes, principal))


@delete("/webhook-sources/{source_id:str}", status_code=204, responses=problems(403, 404))
async def delete_source(
    source_id: FromPath[str], principal: NamedDependency[Principal], sources: NamedDependency[Sources]
) -> None:
    """Remove a source and its secrets; its address answers 404 within half a second, its events stay."""
    policy.require_role(principal, "operator")
    await sources.delete(source_id, principal)


@get("/webhook-sources/{source_id:str}/secrets", responses=problems(403, 404))
async def list_secrets(
    source_id: FromPath[str],
    principal: NamedDependency[Principal],
    sources: NamedDependency[Sources],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.SourceSecretList:
    """List the live secrets, newest first, without their values."""
    policy.require_role(principal, *READERS)
    view = await sources.get(source_id)
    return short_page([secret_json(one) for one in view.secrets], limit=limit, cursor=cursor)


@post("/webhook-sources/{source_id:str}/secrets", status_code=201, responses=problems(403, 404, 409, 413, 415))
async def add_secret(
    source_id: FromPath[str],
    request: AnyRequest,
    principal: NamedDependency[Principal],
    sources: NamedDependency[Sources],
    data: JSONBody[SecretBody | None] = None,
) -> answers.NewSourceSecret:
    """Make a further secret live, as the newest; one that is made here is shown once."""
    policy.require_role(principal, "operator")
    body = data or SecretBody()
    given = Secret(body.secret) if body.secret is not None else None
    row, made = await sources.add_secret(source_id, given, principal, expires_old_in=body.expires_old_in)
    if made is None:
        return cast("answers.NewSourceSecret", secret_json(row))
    show_once(request, row.id)
    return {**secret_json(row), "secret": made.reveal()}


@delete("/webhook-sources/{source_id:str}/secrets/{secret_id:str}", status_code=204, responses=problems(403, 404))
async def delete_secret(
    source_id: FromPath[str],
    secret_id: FromPath[str],
    principal: NamedDependency[Principal],
    sources: NamedDependency[Sources],
) -> None:
    """Take a secret out of use and destroy it."""
    policy.require_role(principal, "operator")
    await sources.delete_secret(source_id, secret_id, principal)


@get("/webhook-sources/{source_id:str}/rejections", responses=problems(403, 404))
async def list_rejections(
    source_id: FromPath[str],
    principal: NamedDependency[Principal],
    sources: NamedDependency[Sources],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.RejectionList:
    """List what the source refused, newest first: the step that failed, and nothing that was in the request."""
    policy.require_role(principal, *READERS)
    position = position_of(cursor)
    before = int(position[0]) if position is not None else None
    rows = await sources.rejections(source_id, limit=checked_limit(limit) + 1, before=before)
    shown = rows[:limit]
    last = (float(shown[-1].id or 0), "row") if len(rows) > limit else None
    return page([rejection_json(row) for row in shown], last)


def routes() -> Router:
    """Return the routes of this resource."""
    of_sources = [list_sources, create_source, show_source, change_source, delete_source]
    handlers = [*of_sources, list_secrets, add_secret, delete_secret, list_rejections]
    return Router(path="/", route_handlers=handlers, tags=["webhooks"])
