"""``/v1/callers``: who may call, and their keys."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from broker import policy
from broker.api import answers
from broker.api.requests import AnyRequest, checked_limit, page, position_of, problems, show_once
from broker.callers import Callers
from broker.models import Caller, CallerKey, rfc3339
from broker.policy import Principal
from providers.spec import Secret


class CreateBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new caller; ``expires_at`` is RFC 3339 or seconds since 1970."""

    name: str
    roles: list[str]
    grants: list[dict[str, Any]] = []
    expires_at: str | float | None = None


class PatchBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A merge patch (RFC 7396)."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    roles: list[str] | msgspec.UnsetType = msgspec.UNSET
    grants: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    expires_at: str | float | msgspec.UnsetType | None = msgspec.UNSET


class KeyBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One more key."""

    expires_at: str | float | None = None


def caller_json(row: Caller, keys: list[CallerKey], callers: Callers) -> answers.Caller:
    """Return a caller with its keys' ids and times; ``genuine`` is false for a row that the broker did not write."""
    return {
        "id": row.id,
        "name": row.name,
        "roles": row.roles,
        "grants": row.grants,
        "expires_at": rfc3339(row.expires_at),
        "created_at": rfc3339(row.created_at),
        "genuine": callers.is_genuine(row) and all(map(callers.is_genuine, keys)),
        "keys": [key_json(key) for key in keys],
    }


def _is_itself(principal: Principal, caller_id: str) -> bool:
    """Say whether a caller asks about itself, with its own key: an exchanged token has no say about keys."""
    return caller_id == principal.caller_id and principal.key_id.startswith("key_")


def key_json(row: CallerKey) -> answers.CallerKey:
    """Return a key's row."""
    return {
        "id": row.id,
        "created_at": rfc3339(row.created_at),
        "last_used_at": rfc3339(row.last_used_at),
        "expires_at": rfc3339(row.expires_at),
        "revoked_at": rfc3339(row.revoked_at),
    }


def new_key_json(row: CallerKey, key: Secret) -> answers.NewCallerKey:
    """Return a key's row and, this once, the key."""
    return {**key_json(row), "key": key.reveal()}


@get("/callers", responses=problems(403))
async def list_callers(
    principal: NamedDependency[Principal],
    callers: NamedDependency[Callers],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.CallerList:
    """List callers, newest first."""
    policy.require_role(principal, "security", "auditor")
    rows = await callers.page(limit=checked_limit(limit) + 1, before=position_of(cursor))
    shown = rows[:limit]
    keys = await callers.keys_of([row.id for row in shown])
    last = (shown[-1].created_at, shown[-1].id) if len(rows) > limit else None
    return page([caller_json(row, keys[row.id], callers) for row in shown], last)


@post("/callers", status_code=201, responses=problems(403, 409, 413, 415))
async def create_caller(
    data: JSONBody[CreateBody],
    request: AnyRequest,
    principal: NamedDependency[Principal],
    callers: NamedDependency[Callers],
) -> answers.NewCaller:
    """Make a caller; its first key is shown once (admin)."""
    policy.require_role(principal)
    row, key = await callers.add(data.name, data.roles, data.grants, data.expires_at, actor=principal.caller_id)
    show_once(request, row.id)
    keys = (await callers.keys_of([row.id]))[row.id]
    return {**caller_json(row, keys, callers), "key": key.reveal()}


@get("/callers/{caller_id:str}", responses=problems(403, 404))
async def show_caller(
    caller_id: FromPath[str], principal: NamedDependency[Principal], callers: NamedDependency[Callers]
) -> answers.Caller:
    """Show one caller; everybody may see itself."""
    if not _is_itself(principal, caller_id):
        policy.require_role(principal, "security", "auditor")
    row = await callers.get(caller_id)
    return caller_json(row, (await callers.keys_of([row.id]))[row.id], callers)


@patch("/callers/{caller_id:str}", responses=problems(403, 404, 409, 413, 415))
async def change_caller(
    caller_id: FromPath[str],
    data: JSONBody[PatchBody],
    principal: NamedDependency[Principal],
    callers: NamedDependency[Callers],
) -> answers.Caller:
    """Change name, roles, grants or expiry (admin); effective everywhere within a second."""
    policy.require_role(principal)
    given = {name: getattr(data, name) for name in ("name", "roles", "grants", "expires_at")}
    changes = {name: value for name, value in given.items() if value is not msgspec.UNSET}
    row = await callers.update(caller_id, changes, actor=principal.caller_id)
    return caller_json(row, (await callers.keys_of([row.id]))[row.id], callers)


@delete("/callers/{caller_id:str}", status_code=204, responses=problems(403, 404, 409))
async def delete_caller(
    caller_id: FromPath[str], principal: NamedDependency[Principal], callers: NamedDependency[Callers]
) -> None:
    """Remove a caller and its keys (admin)."""
    policy.require_role(principal)
    await callers.delete(caller_id, actor=principal.caller_id)


@post("/callers/{caller_id:str}/keys", status_code=201, responses=problems(403, 404, 409, 413, 415))
async def create_key(
    caller_id: FromPath[str],
    request: AnyRequest,
    principal: NamedDependency[Principal],
    callers: NamedDependency[Callers],
    data: JSONBody[KeyBody | None] = None,
) -> answers.NewCallerKey:
    """Make another key, shown once; two may be live at a time (admin, so that a stolen key cannot outlive itself)."""
    policy.require_role(principal)
    body = data or KeyBody()
    row, key = await callers.add_key(caller_id, actor=principal.caller_id, expires_at=body.expires_at)
    show_once(request, row.id)
    return new_key_json(row, key)


@delete("/callers/{caller_id:str}/keys/{key_id:str}", status_code=204, responses=problems(403, 404, 409))
async def revoke_key(
    caller_id: FromPath[str],
    key_id: FromPath[str],
    principal: NamedDependency[Principal],
    callers: NamedDependency[Callers],
) -> None:
    """Revoke a key: dead on every replica within a second. A caller may revoke its own (else admin or security)."""
    if not _is_itself(principal, caller_id):
        policy.require_role(principal, "security")
    await callers.revoke_key(caller_id, key_id, actor=principal.caller_id)


def routes() -> Router:
    """Return the routes of this resource."""
    handlers = [list_callers, create_caller, show_caller, change_caller, delete_caller, create_key, revoke_key]
    return Router(path="/", route_handlers=handlers, tags=["callers"])
