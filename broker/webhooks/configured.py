"""Sources and subscriptions as those see them who verify, match and deliver: values, with the secrets opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from providers.spec import Secret, Webhook

SignatureKind = Literal["v1", "v1a"]


@dataclass(frozen=True, slots=True)
class SourceSecret:
    """One live secret of a source."""

    id: str
    value: Secret = field(repr=False)


@dataclass(frozen=True, slots=True)
class Source:
    """Where one provider posts. ``webhook``: the provider's check as this source's settings configure it.

    ``secrets``: the live ones, newest first. ``public_url``: where the source is known outside, None: the broker's public URL
    and the request's path. ``seal``: bodies are sealed in the database. ``park_unmatched``: an event of no known connection
    waits for one instead of being delivered. ``integration``: whose app posts here: its events belong to no other's connection.
    """

    id: str
    name: str
    provider: str
    kind: str
    webhook: Webhook
    secrets: Sequence[SourceSecret] = field(repr=False)
    settings: Mapping[str, Secret] = field(repr=False)
    tolerance_seconds: float | None
    public_url: str | None
    connection_id: str | None
    seal: bool
    park_unmatched: bool
    enabled: bool
    integration: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """Which events a subscription wants: what ``matching`` decides on. No secret, so that it can be read in a transaction.

    ``event_types``: globs; ``filter``: JSON Pointer → accepted values; ``order_key``: the JSON Pointer of what names the line
    in which events keep their order.
    """

    subscription_id: str
    event_types: tuple[str, ...]
    source_id: str | None
    filter: Mapping[str, Sequence[Any]]
    order_key: str | None


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where a subscription's deliveries go, and how. ``secrets``: those that sign, newest first; none for ``v1a``."""

    subscription_id: str
    url: str
    signature: SignatureKind
    secrets: Sequence[Secret] = field(repr=False)
    max_per_second: float | None
    max_concurrent: int
    timeout_seconds: float
    failing_since: float | None
