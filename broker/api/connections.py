"""``/v1/connections`` and ``/v1/token``: list, import, confirm, hand out, change, delete, reconnect."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.types import Scope

from broker.api import answers
from broker.api.lean import lean_post
from broker.api.requests import (
    TAG_NAME,
    AnyRequest,
    TagName,
    TagValue,
    Text,
    checked_limit,
    never_keep,
    page,
    position_of,
    problems,
    show_once,
)
from broker.api.sessions import Seconds, Tags, Variables, require_return_to, session_answer
from broker.callers import Callers
from broker.connections import STATUSES, Asking, Connections, Filter
from broker.credentials import Handout
from broker.errors import ConfirmationRequired, Conflict, FieldError, InvalidRequest
from broker.imports import Import
from broker.models import Connection, rfc3339
from broker.oauth.confirm import Confirm, Confirmations
from broker.policy import Principal
from broker.refresh import Ask
from broker.sessions import Sessions, Wanted
from broker.settings import Settings

Sha256 = Annotated[str, msgspec.Meta(min_length=64, max_length=64, pattern="^[0-9a-fA-F]*(?![\\s\\S])")]
Code = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Ttl = Annotated[int, msgspec.Meta(ge=0, le=86_400)]


class AccountBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Whose account an imported credential is, where the importer knows."""

    id: Text
    name: Text | None = None
    email: Text | None = None


class ImportBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A credential that exists already."""

    integration: Text
    subject: Text
    credentials: dict[str, Any]
    account: AccountBody | None = None
    variables: Variables = {}
    tags: Tags = {}
    metadata: dict[str, Any] = {}


class ConfirmBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The one-time code, and whose connection it is."""

    code: Code
    subject: Text
    return_to: str | None = None


class TokenBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How fresh the token has to be."""

    min_ttl: Ttl = 60
    not_token_sha256: Sha256 | None = None
    force_refresh: bool = False
    reason: Text | None = None


class FindTokenBody(TokenBody, forbid_unknown_fields=True, kw_only=True):
    """As ``TokenBody``, finding the connection."""

    integration: Text
    subject: Text


class PatchBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A merge patch (RFC 7396)."""

    tags: dict[TagName, TagValue | None] | msgspec.UnsetType | None = msgspec.UNSET
    metadata: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET


class ReconnectBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Where the user goes after a reconnect, and until when the session lives."""

    return_to: str | None = None
    expires_in: Seconds = 600


def connection_json(row: Connection) -> answers.Connection:
    """Return a connection as the contract shows it."""
    return {
        "id": row.id,
        "integration": row.integration,
        "provider": row.provider,
        "subject": row.subject,
        "account": {"id": row.account_id, "name": row.account_name, "email": row.account_email},
        "status": row.status,
        "status_reason": row.status_reason,
        "variables": row.variables,
        "scopes": row.scopes,
        "missing_scopes": row.missing_scopes,
        "expires_at": rfc3339(row.token_expires_at),
        "refresh_expires_at": rfc3339(row.refresh_expires_at),
        "refreshed_at": rfc3339(row.refreshed_at),
        "last_used_at": rfc3339(row.last_used_at),
        "tags": row.tags,
        "metadata": row.extra,
        "created_at": rfc3339(row.created_at),
    }


def handout_json(scope: Scope, handout: Handout) -> answers.AccessToken:
    """Return a credential as the contract shows it: the only place where one leaves in an answer."""
    never_keep(scope)
    return {
        "access_token": handout.access_token.reveal(),
        "token_type": handout.token_type,
        "expires_at": rfc3339(handout.expires_at),
        "scopes": list(handout.scopes),
        "connection_id": handout.connection_id,
        "stale": handout.stale,
    }


@get("/connections", responses=problems())
async def list_connections(
    principal: NamedDependency[Principal],
    connections: NamedDependency[Connections],
    integration: FromQuery[str | None] = None,
    subject: FromQuery[str | None] = None,
    status: FromQuery[str | None] = None,
    tag: FromQuery[str | None] = None,
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.ConnectionList:
    """List connections inside the caller's grants, newest first.

    A page may be short, even empty, and still have a next_cursor: so many rows are looked at for one request, no more.
    """
    if status is not None and status not in STATUSES:
        raise InvalidRequest(errors=[FieldError("?status", "is not a status")])
    key, colon, value = (tag or "").partition(":")
    if tag is not None and not (colon and re.fullmatch(TAG_NAME, key)):
        raise InvalidRequest(errors=[FieldError("?tag", "must be key:value")])
    wanted = Filter(
        integration=integration,
        subject=subject,
        status=status,
        tag=(key, value) if tag is not None else None,
        before=position_of(cursor),
        limit=checked_limit(limit),
    )
    rows, following = await connections.page(wanted, principal)
    return page([connection_json(row) for row in rows], following)


@post("/connections", status_code=201, responses=problems(403, 404, 409, 413, 415, 502, 504))
async def import_connection(
    data: JSONBody[ImportBody],
    principal: NamedDependency[Principal],
    connections: NamedDependency[Connections],
) -> answers.Connection:
    """Import a credential; the connection is active at once."""
    account = msgspec.to_builtins(data.account) if data.account is not None else None
    wanted = Import(data.integration, data.subject, data.credentials, account, data.tags, data.metadata, data.variables)
    return connection_json(await connections.import_(wanted, principal))


@post(
    "/connections/{connection_id:str}/confirm", status_code=200, responses=problems(403, 404, 409, 413, 415, 502, 504)
)
async def confirm_connection(
    connection_id: FromPath[str],
    data: JSONBody[ConfirmBody],
    principal: NamedDependency[Principal],
    confirmations: NamedDependency[Confirmations],
) -> answers.Connection:
    """Confirm who consented; the answer is the surviving connection."""
    wanted = Confirm(connection_id, data.code, data.subject, data.return_to)
    return connection_json(await confirmations.confirm(wanted, principal))


@get("/connections/{connection_id:str}", responses=problems(403, 404))
async def show_connection(
    connection_id: FromPath[str],
    principal: NamedDependency[Principal],
    connections: NamedDependency[Connections],
) -> answers.Connection:
    """Show one connection; never its secret."""
    return connection_json(await connections.get(connection_id, principal))


@patch("/connections/{connection_id:str}", responses=problems(403, 404, 413, 415))
async def change_connection(
    connection_id: FromPath[str],
    data: JSONBody[PatchBody],
    principal: NamedDependency[Principal],
    connections: NamedDependency[Connections],
) -> answers.Connection:
    """Change tags and metadata."""
    changes = {name: value for name in ("tags", "metadata") if (value := getattr(data, name)) is not msgspec.UNSET}
    return connection_json(await connections.update(connection_id, changes, principal))


@delete("/connections/{connection_id:str}", status_code=200, responses=problems(403, 404, 504))
async def delete_connection(
    connection_id: FromPath[str],
    principal: NamedDependency[Principal],
    connections: NamedDependency[Connections],
    revoke: FromQuery[bool] = True,  # noqa: FBT002 - a query parameter
) -> answers.DeletedConnection:
    """Delete a connection, and revoke it at the provider too unless ``revoke=false``."""
    result = await connections.delete(connection_id, principal, revoke=revoke)
    return {"id": connection_id, "deleted": True, "revocation": result}


@lean_post("/connections/{connection_id:str}/token", responses=problems(403, 404, 409, 413, 415, 429, 502, 504))
async def hand_out(
    connection_id: FromPath[str],
    scope: Scope,
    principal: NamedDependency[Principal],
    connections: NamedDependency[Connections],
    callers: NamedDependency[Callers],
    data: JSONBody[TokenBody | None] = None,
) -> answers.AccessToken:
    """Hand out a fresh token."""
    body = data or TokenBody()
    handout = await connections.token(connection_id, _ask(body), _asking(scope, callers, principal, body.reason))
    return handout_json(scope, handout)


@lean_post("/token", responses=problems(403, 404, 409, 413, 415, 429, 502, 504))
async def find_and_hand_out(
    data: JSONBody[FindTokenBody],
    scope: Scope,
    principal: NamedDependency[Principal],
    connections: NamedDependency[Connections],
    callers: NamedDependency[Callers],
) -> answers.AccessToken:
    """Hand out a fresh token of the one connection of (integration, subject)."""
    asking = _asking(scope, callers, principal, data.reason)
    handout = await connections.token_for(data.integration, data.subject, _ask(data), asking)
    return handout_json(scope, handout)


def _asking(scope: Scope, callers: Callers, principal: Principal, reason: str | None) -> Asking:
    async def recheck() -> Principal:
        return await callers.authenticate(scope["headers"])

    return Asking(principal, recheck, reason)


def _ask(body: TokenBody) -> Ask:
    return Ask(body.min_ttl, body.not_token_sha256, body.force_refresh)


@post("/connections/{connection_id:str}/reconnect", status_code=201, responses=problems(403, 404, 409, 413, 415))
async def reconnect(
    connection_id: FromPath[str],
    request: AnyRequest,
    principal: NamedDependency[Principal],
    connections: NamedDependency[Connections],
    sessions: NamedDependency[Sessions],
    settings: NamedDependency[Settings],
    data: JSONBody[ReconnectBody | None] = None,
) -> answers.Session:
    """Mint a session that may only connect the same account of this connection again."""
    row = await connections.get(connection_id, principal, may="connect")
    body = data or ReconnectBody()
    require_return_to(body.return_to, settings)
    if row.subject is None:
        raise ConfirmationRequired("a pending connection is confirmed, not reconnected")
    if row.credential_type != "oauth2":
        raise Conflict("this credential was not made by an OAuth flow; import it again")
    wanted = Wanted(
        subject=row.subject,
        integrations=[row.integration],
        return_to=body.return_to,
        variables=row.variables,
        tags=row.tags,
        expires_in=body.expires_in,
        reconnects=row.id,
    )
    made, token = await sessions.mint(wanted, principal)
    show_once(request, made.id)
    return session_answer(made, token, settings)


def routes() -> Router:
    """Return the routes of this resource."""
    handlers = [
        list_connections,
        import_connection,
        show_connection,
        change_connection,
        delete_connection,
        confirm_connection,
        hand_out,
        find_and_hand_out,
        reconnect,
    ]
    return Router(path="/", route_handlers=handlers, tags=["connections"])
