"""Pure: what may be said of a subscription."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from broker.egress import may_dial, origin_of
from broker.errors import FieldError, InvalidRequest
from broker.settings import Settings
from broker.webhooks.configured import SignatureKind
from broker.webhooks.matching import event_types_problem, filter_problem, pointer_problem
from providers.spec import Secret

SECRET_BYTES: Final = range(24, 65)  # Standard Webhooks, "Signature scheme"
SECRET_MARK: Final = "whsec_"  # noqa: S105 - what secrets begin with
LONGEST_URL: Final = 2048


@dataclass(frozen=True, slots=True)
class SubscriptionDraft:
    """A new subscription as it was asked for. ``secret``: its own to bring along, None: one is made."""

    url: str
    event_types: Sequence[str]
    source_id: str | None = None
    filter: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    active: bool = True
    order_key: str | None = None
    signature: SignatureKind = "v1"
    max_per_second: float | None = None
    max_concurrent: int = 16
    timeout_seconds: float = 15.0
    description: str = ""
    secret: Secret | None = None


def new_secret() -> Secret:
    """Return a fresh signing secret of 32 bytes, in the form of Standard Webhooks."""
    return Secret(SECRET_MARK + base64.b64encode(os.urandom(32)).decode())


def first_secret(draft: SubscriptionDraft) -> Secret | None:
    """Return the secret that a new subscription signs with, its own or a fresh one; None for ``v1a`` (InvalidRequest)."""
    if draft.signature == "v1a":
        if draft.secret is not None:
            raise InvalidRequest(errors=[FieldError("/secret", "v1a signs with the broker's own keys")])
        return None
    if draft.secret is None:
        return new_secret()
    problem = secret_problem(draft.secret)
    if problem is not None:
        raise InvalidRequest(errors=[FieldError("/secret", problem)])
    return draft.secret


def secret_problem(value: Secret) -> str | None:
    """Return what is wrong with a signing secret, None for ``whsec_`` and 24 to 64 bytes in base64."""
    text = value.reveal()
    try:
        raw = base64.b64decode(text.removeprefix(SECRET_MARK), validate=True)
    except (ValueError, binascii.Error):
        raw = b""
    if text.startswith(SECRET_MARK) and len(raw) in SECRET_BYTES:
        return None
    return "must be whsec_ and the base64 of 24 to 64 bytes"


def url_problem(url: str, settings: Settings) -> str | None:
    """Return what is wrong with a URL to deliver to, as far as can be told without resolving its host. Pure.

    Each attempt checks the address anew. http is spoken in development only.
    """
    try:
        origin = origin_of(url)
    except ValueError:
        origin = ""
    if not origin or len(url) > LONGEST_URL:
        return f"must be a URL without credentials or fragment, of at most {LONGEST_URL} characters"
    if origin.startswith("http://") and not settings.development:
        return "must be https"
    host = origin.partition("://")[2]
    literal = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        address = ipaddress.ip_address(literal)
    except ValueError:
        return None
    if not may_dial(address, development=settings.development, allow=settings.delivery_allow):
        return "must not name a private address outside of BROKER_DELIVERY_ALLOW"
    return None


def _between(least: float, most: float, value: float | None) -> str | None:
    return None if value is None or least <= value <= most else f"must be from {least:g} to {most:g}"


_CHECKS: Final[Mapping[str, Any]] = {
    "event_types": event_types_problem,
    "filter": filter_problem,
    "order_key": lambda value: None if value is None else pointer_problem(value),
    "max_per_second": lambda value: _between(0.01, 10_000, value),
    "max_concurrent": lambda value: _between(1, 256, value),
    "timeout_seconds": lambda value: _between(1, 60, value),
}
FIELDS: Final = (
    *("url", "event_types", "source_id", "filter", "active", "order_key", "signature"),
    *("max_per_second", "max_concurrent", "timeout_seconds", "description"),
)


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields as a row keeps them."""
    values = dict(fields)
    if "event_types" in values:
        values["event_types"] = list(values["event_types"])
    if "filter" in values:
        values["filter"] = {pointer: list(accepted) for pointer, accepted in values["filter"].items()}
    return values


def check_fields(fields: Mapping[str, Any], settings: Settings) -> None:
    """Raise InvalidRequest for fields that cannot be; those that are not there are fine."""
    problems = {name: check(fields[name]) for name, check in _CHECKS.items() if name in fields}
    if "url" in fields:
        problems["url"] = url_problem(fields["url"], settings)
    errors = [FieldError(f"/{name}", problem) for name, problem in problems.items() if problem is not None]
    if errors:
        raise InvalidRequest(errors=errors)
