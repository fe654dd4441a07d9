"""``/v1/subscriptions``: who gets which events, where, and signed how."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from broker import policy
from broker.api import answers
from broker.api.requests import PLAIN, AnyRequest, checked_limit, page, position_of, problems, show_once
from broker.models import WebhookSecret, rfc3339
from broker.policy import Principal, Role
from broker.webhooks.subscriptions import (
    DEFAULT_OVERLAP_SECONDS,
    SubscriptionDraft,
    Subscriptions,
    SubscriptionView,
)
from providers.spec import Secret

Text = Annotated[str, msgspec.Meta(max_length=2048, pattern=PLAIN)]
SecretText = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
READERS: tuple[Role, ...] = ("operator", "auditor")


class CreateBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new subscription; ``secret`` is its own to bring along, else one is made."""

    url: Text
    event_types: list[Text]
    source_id: Text | None = None
    filter: dict[str, list[Any]] = {}
    active: bool = True
    order_key: Text | None = None
    signature: Literal["v1", "v1a"] = "v1"
    max_per_second: float | None = None
    max_concurrent: int = 16
    timeout_seconds: float = 15.0
    description: Text = ""
    secret: SecretText | None = None


class PatchBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A merge patch (RFC 7396): null puts a value back to what it is by itself."""

    url: Text | msgspec.UnsetType = msgspec.UNSET
    event_types: list[Text] | msgspec.UnsetType = msgspec.UNSET
    source_id: Text | msgspec.UnsetType | None = msgspec.UNSET
    filter: dict[str, list[Any] | None] | msgspec.UnsetType | None = msgspec.UNSET
    active: bool | msgspec.UnsetType = msgspec.UNSET
    order_key: Text | msgspec.UnsetType | None = msgspec.UNSET
    signature: Literal["v1", "v1a"] | msgspec.UnsetType = msgspec.UNSET
    max_per_second: float | msgspec.UnsetType | None = msgspec.UNSET
    max_concurrent: int | msgspec.UnsetType | None = msgspec.UNSET
    timeout_seconds: float | msgspec.UnsetType | None = msgspec.UNSET
    description: Text | msgspec.UnsetType | None = msgspec.UNSET


class RotateBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How long the secrets before the new one still sign, beside it."""

    overlap_seconds: float = DEFAULT_OVERLAP_SECONDS


def subscription_json(view: SubscriptionView) -> answers.Subscription:
    """Return a subscription; no secret is among it."""
    row = view.row
    return {
        "id": row.id,
        "url": row.url,
        "description": row.description,
        "event_types": row.event_types,
        "source_id": row.source_id,
        "filter": row.filter,
        "active": row.active,
        "order_key": row.order_key,
        "signature": row.signature,
        "max_per_second": row.max_per_second,
        "max_concurrent": row.max_concurrent,
        "timeout_seconds": row.timeout_seconds,
        "failing_since": rfc3339(row.failing_since),
        "disabled_reason": row.disabled_reason,
        "secrets": [_secret_json(one) for one in view.secrets],
        "public_keys": [key.text for key in view.public_keys],
        "created_at": rfc3339(row.created_at),
        "updated_at": rfc3339(row.updated_at),
    }


def _secret_json(row: WebhookSecret) -> answers.SigningSecret:
    return {"id": row.id, "created_at": rfc3339(row.created_at), "expires_at": rfc3339(row.expires_at)}


@get("/subscriptions", responses=problems(403))
async def list_subscriptions(
    principal: NamedDependency[Principal],
    subscriptions: NamedDependency[Subscriptions],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.SubscriptionList:
    """List subscriptions, newest first."""
    policy.require_role(principal, *READERS)
    views = await subscriptions.page(limit=checked_limit(limit) + 1, before=position_of(cursor))
    shown = views[:limit]
    last = (shown[-1].row.created_at, shown[-1].row.id) if len(views) > limit else None
    return page([subscription_json(view) for view in shown], last)


@post("/subscriptions", status_code=201, responses=problems(403, 413, 415))
async def create_subscription(
    data: JSONBody[CreateBody],
    request: AnyRequest,
    principal: NamedDependency[Principal],
    subscriptions: NamedDependency[Subscriptions],
) -> answers.NewSubscription:
    """Make a subscription; the secret that signs what it gets is shown once."""
    policy.require_role(principal, "operator")
    fields = msgspec.structs.asdict(data)
    given = fields.pop("secret")
    draft = SubscriptionDraft(**fields, secret=Secret(given) if given is not None else None)
    view, secret = await subscriptions.create(draft, principal)
    if secret is None:
        return cast("answers.NewSubscription", subscription_json(view))  # without the member that may be missing
    show_once(request, view.row.id)
    return {**subscription_json(view), "secret": secret.reveal()}


@get("/subscriptions/{subscription_id:str}", responses=problems(403, 404))
async def show_subscription(
    subscription_id: FromPath[str],
    principal: NamedDependency[Principal],
    subscriptions: NamedDependency[Subscriptions],
) -> answers.Subscription:
    """Show one subscription."""
    policy.require_role(principal, *READERS)
    return subscription_json(await subscriptions.get(subscription_id))


_BY_ITSELF: dict[str, Any] = {"max_concurrent": 16, "timeout_seconds": 15.0, "description": ""}


@patch("/subscriptions/{subscription_id:str}", responses=problems(403, 404, 409, 413, 415))
async def change_subscription(
    subscription_id: FromPath[str],
    data: JSONBody[PatchBody],
    principal: NamedDependency[Principal],
    subscriptions: NamedDependency[Subscriptions],
) -> answers.Subscription:
    """Change a subscription; while ``active`` is false its deliveries are held. Becoming active forgets failures."""
    policy.require_role(principal, "operator")
    given = {name: value for name, value in msgspec.structs.asdict(data).items() if value is not msgspec.UNSET}
    changes = {name: _BY_ITSELF.get(name) if value is None else value for name, value in given.items()}
    return subscription_json(await subscriptions.update(subscription_id, changes, principal))


@delete("/subscriptions/{subscription_id:str}", status_code=204, responses=problems(403, 404))
async def delete_subscription(
    subscription_id: FromPath[str],
    principal: NamedDependency[Principal],
    subscriptions: NamedDependency[Subscriptions],
) -> None:
    """Remove a subscription; what was still to be delivered to it ends as dead."""
    policy.require_role(principal, "operator")
    await subscriptions.delete(subscription_id, principal)


@post(
    "/subscriptions/{subscription_id:str}/rotate-secret", status_code=200, responses=problems(403, 404, 409, 413, 415)
)
async def rotate_secret(
    subscription_id: FromPath[str],
    request: AnyRequest,
    principal: NamedDependency[Principal],
    subscriptions: NamedDependency[Subscriptions],
    data: JSONBody[RotateBody | None] = None,
) -> answers.NewSigningSecret:
    """Make a new signing secret, shown once; those before it sign too until their end."""
    policy.require_role(principal, "operator")
    overlap = (data or RotateBody()).overlap_seconds
    row, secret = await subscriptions.rotate_secret(subscription_id, principal, overlap_seconds=overlap)
    show_once(request, row.id)
    return {**_secret_json(row), "secret": secret.reveal()}


def routes() -> Router:
    """Return the routes of this resource."""
    of_many = [list_subscriptions, create_subscription]
    of_one = [show_subscription, change_subscription, delete_subscription, rotate_secret]
    return Router(path="/", route_handlers=[*of_many, *of_one], tags=["webhooks"])
