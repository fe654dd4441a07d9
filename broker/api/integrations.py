"""``/v1/integrations``: configured providers, their client secrets, their test, export and import."""

from __future__ import annotations

from typing import Annotated, Any, cast

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from broker import policy
from broker.api import answers
from broker.api.requests import PLAIN, AnyRequest, checked_limit, page, position_of, problems, short_page
from broker.connections import Connections
from broker.egress import Egress
from broker.errors import InvalidRequest
from broker.integrations import Draft, Integrations, View, default_scopes
from broker.integrations.config import IntegrationConfig
from broker.integrations.portable import export_document, import_document
from broker.integrations.probe import probe
from broker.models import ClientSecret, rfc3339
from broker.policy import Principal, Role
from providers.spec import Provider, Secret

Text = Annotated[str, msgspec.Meta(max_length=2048, pattern=PLAIN)]
SecretText = Annotated[str, msgspec.Meta(min_length=1, max_length=16_384)]
READERS: tuple[Role, ...] = ("operator", "auditor", "security")


class CreateBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new integration."""

    name: Text
    provider: Text
    description: Text = ""
    client_id: Text = ""
    client_secret: SecretText | None = None
    scopes: list[Text] | None = None
    config: dict[str, Any] = {}
    enabled: bool = True


class PatchBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A merge patch (RFC 7396): null puts a value back to what it is by itself; three have no such state."""

    provider: Text | msgspec.UnsetType = msgspec.UNSET
    description: Text | msgspec.UnsetType | None = msgspec.UNSET
    client_id: Text | msgspec.UnsetType | None = msgspec.UNSET
    client_secret: SecretText | msgspec.UnsetType = msgspec.UNSET
    scopes: list[Text] | msgspec.UnsetType | None = msgspec.UNSET
    config: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    enabled: bool | msgspec.UnsetType = msgspec.UNSET


class SecretBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One more client secret; with ``canary`` it first refreshes so many connections, and goes live or away by itself."""

    client_secret: SecretText
    canary: Annotated[int, msgspec.Meta(ge=1, le=100)] | None = None


def integration_json(view: View) -> answers.Integration:
    """Return an integration; ``client_secret`` is never among it."""
    row = view.row
    return {
        "name": row.name,
        "provider": row.provider,
        "description": row.description,
        "client_id": row.client_id,
        "scopes": row.scopes,
        "config": row.config,
        "enabled": row.enabled,
        "status": view.status,
        "status_reason": view.status_reason,
        "client_secrets": len(view.secret_ids),
        "created_at": rfc3339(row.created_at),
        "updated_at": rfc3339(row.updated_at),
    }


def secret_json(row: ClientSecret) -> answers.ClientSecret:
    """Return a client secret's row: when and whence, and how it does; not what."""
    return {
        "id": row.id,
        "source": row.source,
        "state": row.state,
        "created_at": rfc3339(row.created_at),
        "last_used_at": rfc3339(row.last_used_at),
        "refused_at": rfc3339(row.refused_at),
    }


def _created(data: CreateBody) -> Draft:
    fields = msgspec.structs.asdict(data)
    secret = Secret(data.client_secret) if data.client_secret is not None else None
    return Draft(**{**fields, "client_secret": secret})


def _patched(name: str, data: PatchBody, provider: Provider | None) -> Draft:
    given = {field: value for field, value in msgspec.structs.asdict(data).items() if value is not msgspec.UNSET}
    cleared: dict[str, Any] = {
        "description": "",
        "client_id": "",
        "scopes": default_scopes(provider),
        "config": dict.fromkeys(IntegrationConfig.model_fields),
    }
    fields: dict[str, Any] = {field: cleared[field] if value is None else value for field, value in given.items()}
    if "client_secret" in fields:
        fields["client_secret"] = Secret(fields["client_secret"])
    return Draft(name, **fields)


@get("/integrations", responses=problems(403))
async def list_integrations(
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.IntegrationList:
    """List integrations, newest first."""
    policy.require_role(principal, *READERS)
    views = await integrations.page(limit=checked_limit(limit) + 1, before=position_of(cursor))
    shown = views[:limit]
    last = (shown[-1].row.created_at, shown[-1].row.name) if len(views) > limit else None
    return page([integration_json(view) for view in shown], last)


@post("/integrations", status_code=201, responses=problems(403, 409, 413, 415))
async def create_integration(
    data: JSONBody[CreateBody],
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
) -> answers.Integration:
    """Configure a provider."""
    policy.require_role(principal, "operator")
    return integration_json(await integrations.create(_created(data), principal))


@get("/integrations/{name:str}", responses=problems(403, 404))
async def show_integration(
    name: FromPath[str], principal: NamedDependency[Principal], integrations: NamedDependency[Integrations]
) -> answers.Integration:
    """Show one integration."""
    policy.require_role(principal, *READERS)
    return integration_json(await integrations.get(name))


@patch("/integrations/{name:str}", responses=problems(403, 404, 409, 413, 415))
async def change_integration(
    name: FromPath[str],
    data: JSONBody[PatchBody],
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
) -> answers.Integration:
    """Change an integration; its endpoints need an admin, and existing connections follow only by a rebind."""
    policy.require_role(principal, "operator")
    row = (await integrations.get(name)).row
    draft = _patched(name, data, integrations.catalog.get(row.provider))
    return integration_json(await integrations.update(draft, principal))


@delete("/integrations/{name:str}", status_code=204, responses=problems(403, 404, 409))
async def delete_integration(
    name: FromPath[str], principal: NamedDependency[Principal], integrations: NamedDependency[Integrations]
) -> None:
    """Remove an integration without connections."""
    policy.require_role(principal, "operator")
    await integrations.delete(name, principal)


@post("/integrations/{name:str}/test", status_code=200, responses=problems(403, 404, 409))
async def run_test(
    name: FromPath[str],
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
    connections: NamedDependency[Connections],
    egress: NamedDependency[Egress],
) -> answers.Verdict:
    """Make real calls that prove or disprove the configuration; with a connection at hand, its identity call too."""
    policy.require_role(principal, "operator")
    verdict = await probe(integrations, egress, name)
    identity = await connections.identity_check(name, egress, principal) if verdict["ok"] else None
    checks = [*verdict["checks"], *([identity] if identity is not None else [])]
    return {"ok": all(check["ok"] for check in checks), "checks": checks}


@post("/integrations/{name:str}/rebind", status_code=200, responses=problems(403, 404, 409, 502, 504))
async def rebind(
    name: FromPath[str], principal: NamedDependency[Principal], integrations: NamedDependency[Integrations]
) -> answers.Rebound:
    """Pin existing connections to the endpoints as they are now (admin)."""
    return {"connections": await integrations.rebind(name, principal)}


@get("/integrations/{name:str}/client-secrets", responses=problems(403, 404))
async def list_secrets(
    name: FromPath[str],
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.ClientSecretList:
    """List the client secrets, live ones and a candidate, newest first, without their values."""
    policy.require_role(principal, *READERS)
    return short_page([secret_json(row) for row in await integrations.secrets(name)], limit=limit, cursor=cursor)


@post("/integrations/{name:str}/client-secrets", status_code=201, responses=problems(403, 404, 409, 413, 415))
async def add_secret(
    name: FromPath[str],
    data: JSONBody[SecretBody],
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
) -> answers.AddedClientSecret:
    """Make a further client secret live, as the newest; with ``canary`` a candidate that has to prove itself first."""
    policy.require_role(principal, "operator", "security")
    row = await integrations.add_secret(name, Secret(data.client_secret), principal, canary=data.canary)
    canary = await integrations.canary(row.id)
    return {**secret_json(row), "rotation_id": canary.id if canary is not None else None}


@post("/integrations/{name:str}/client-secrets/{secret_id:str}/promote", status_code=200, responses=problems(403, 404))
async def promote_secret(
    name: FromPath[str],
    secret_id: FromPath[str],
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
) -> answers.ClientSecret:
    """Make a candidate live at once; one that is live is tried in its turn again."""
    policy.require_role(principal, "operator", "security")
    return secret_json(await integrations.promote_secret(name, secret_id, principal))


@delete("/integrations/{name:str}/client-secrets/{secret_id:str}", status_code=204, responses=problems(403, 404))
async def delete_secret(
    name: FromPath[str],
    secret_id: FromPath[str],
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
) -> None:
    """Take a client secret out of use and destroy it, a candidate too."""
    policy.require_role(principal, "operator", "security")
    await integrations.delete_secret(name, secret_id, principal)


@get("/integrations/export", responses=problems(403))
async def export_integrations(
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
    request: AnyRequest,
) -> answers.Export:
    """Return all integrations as one document; with a passphrase header (admin) their secrets too, sealed to it."""
    passphrase = _passphrase(request)
    policy.require_role(principal, *(READERS if passphrase is None else ()))  # secrets: an admin only
    return cast("answers.Export", await export_document(integrations, passphrase, principal))


@post("/integrations/import", status_code=200, responses=problems(403, 409, 413, 415))
async def import_integrations(
    data: JSONBody[dict[str, Any]],
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
    request: AnyRequest,
) -> answers.Imported:
    """Create or change integrations from an exported document."""
    policy.require_role(principal, "operator")
    passphrase = _passphrase(request)
    return cast("answers.Imported", await import_document(integrations, data, passphrase, principal))


def _passphrase(request: AnyRequest) -> Secret | None:
    """Return what ``X-Broker-Passphrase`` holds: a header, because a URL is logged and a GET has no body."""
    values = [value for name, value in request.scope["headers"] if name == b"x-broker-passphrase"]
    if not values:
        return None
    try:
        if len(values) == 1 and values[0]:
            return Secret(values[0].decode())
    except UnicodeDecodeError:
        pass
    raise InvalidRequest("X-Broker-Passphrase must be given once, as UTF-8 text")


def routes() -> Router:
    """Return the routes of this resource."""
    handlers = [
        list_integrations,
        create_integration,
        export_integrations,
        import_integrations,
        show_integration,
        change_integration,
        delete_integration,
        run_test,
        rebind,
        list_secrets,
        add_secret,
        promote_secret,
        delete_secret,
    ]
    return Router(path="/", route_handlers=handlers, tags=["integrations"])
