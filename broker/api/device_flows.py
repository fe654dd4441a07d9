"""``/v1/device-flows``: start a device flow (RFC 8628) and see what came of it."""

from __future__ import annotations

import msgspec
from litestar import Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from broker.api import answers
from broker.api.requests import Text, problems
from broker.api.sessions import Variables
from broker.models import DeviceFlow, rfc3339
from broker.oauth.device import DeviceFlows, Wanted
from broker.policy import Principal


class DeviceFlowBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which integration, and whose connection it becomes."""

    integration: Text
    subject: Text
    scopes: list[Text] | None = None
    variables: Variables = {}


@post("/device-flows", status_code=201, responses=problems(403, 404, 409, 413, 415, 502, 504))
async def start_device_flow(
    data: JSONBody[DeviceFlowBody],
    principal: NamedDependency[Principal],
    device_flows: NamedDependency[DeviceFlows],
) -> answers.DeviceFlowStart:
    """Ask the provider for a code that the user types in on another device."""
    wanted = Wanted(data.integration, data.subject, data.scopes, data.variables)
    row = await device_flows.start(wanted, principal)
    return {
        "id": row.id,
        "user_code": row.user_code,
        "verification_uri": row.verification_uri,
        "verification_uri_complete": row.verification_uri_complete,
        "expires_at": rfc3339(row.expires_at),
        "interval": round(row.interval_seconds),
        "status": row.status,
    }


@get("/device-flows/{device_id:str}", responses=problems(403, 404))
async def show_device_flow(
    device_id: FromPath[str],
    principal: NamedDependency[Principal],
    device_flows: NamedDependency[DeviceFlows],
) -> answers.DeviceFlow:
    """Show what came of a device flow: pending, connected, denied, expired or failed."""
    return device_flow_json(await device_flows.get(device_id, principal))


def device_flow_json(row: DeviceFlow) -> answers.DeviceFlow:
    """Return a device flow as the contract shows it; a connection only once it can be used."""
    return {
        "id": row.id,
        "status": row.status,
        "status_reason": row.status_reason,
        "connection_id": row.connection_id if row.status == "connected" else None,
        "integration": row.integration,
        "subject": row.subject,
        "expires_at": rfc3339(row.expires_at),
    }


def routes() -> Router:
    """Return the routes of this resource."""
    return Router(path="/", route_handlers=[start_device_flow, show_device_flow], tags=["device flows"])
