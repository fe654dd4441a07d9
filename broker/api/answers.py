"""What `/v1` and `/health` answer with, as the OpenAPI document says it: every shape in the order of the resources.

Types of plain dictionaries: the functions that make answers are checked against them by the type checker, which finds a
field too many too, and running answers by ``tests/real/test_schemathesis.py``. At run time they cost nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypedDict, TypeVar

from litestar.params import BodyKwarg

from broker.connections import STATUSES
from broker.webhooks.history import DELIVERY_STATUSES, EVENT_STATUSES

T = TypeVar("T")
TIME_PATTERN = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z$"
Time = Annotated[str, BodyKwarg(pattern=TIME_PATTERN, format="date-time")]
ConnectionStatus = Annotated[str, BodyKwarg(schema_extra={"enum": sorted(STATUSES)})]
DeviceFlowStatus = Annotated[
    str, BodyKwarg(schema_extra={"enum": ["connected", "denied", "expired", "failed", "pending"]})
]
LogLevel = Annotated[str, BodyKwarg(schema_extra={"enum": ["error", "info", "warning"]})]
EventStatus = Annotated[str, BodyKwarg(schema_extra={"enum": sorted(EVENT_STATUSES)})]
DeliveryStatus = Annotated[str, BodyKwarg(schema_extra={"enum": sorted(DELIVERY_STATUSES)})]


class Page(TypedDict, Generic[T]):
    """What every list answers; each has a type of its own below, because names of generic ones read badly in a document."""

    data: list[T]
    next_cursor: str | None


# Health


class Liveness(TypedDict):
    """The process answers."""

    status: Literal["live"]


class Readiness(TypedDict):
    """Whether every part works; ``failing`` names those that do not, and how."""

    status: Literal["ready", "not_ready"]
    failing: dict[str, str]


# Sessions, connections, tokens


class Session(TypedDict):
    """A session; ``token`` and the URLs that carry it are shown once."""

    id: str
    token: str
    start_urls: dict[str, str]
    connect_url: str
    expires_at: Time


class Account(TypedDict):
    """Whose account a connection is, as far as it is known."""

    id: str | None
    name: str | None
    email: str | None


class Connection(TypedDict):
    """A connection; never its secret."""

    id: str
    integration: str
    provider: str
    subject: str | None
    account: Account
    status: ConnectionStatus
    status_reason: str | None
    variables: dict[str, str]
    scopes: list[str]
    missing_scopes: list[str]
    expires_at: Time | None
    refresh_expires_at: Time | None
    refreshed_at: Time | None
    last_used_at: Time | None
    tags: dict[str, str]
    metadata: dict[str, Any]
    created_at: Time


class ConnectionList(TypedDict):
    """A page of connections."""

    data: list[Connection]
    next_cursor: str | None


class DeletedConnection(TypedDict):
    """A connection that is gone, and what its provider made of it."""

    id: str
    deleted: bool
    revocation: Literal["revoked", "unsupported", "failed", "skipped", "skipped_shared_grant"]


class AccessToken(TypedDict):
    """A credential that is handed out."""

    access_token: str
    token_type: str
    expires_at: Time | None
    scopes: list[str]
    connection_id: str
    stale: bool


class DeviceFlowStart(TypedDict):
    """What the user types in where (RFC 8628)."""

    id: str
    user_code: str
    verification_uri: str
    verification_uri_complete: str | None
    expires_at: Time
    interval: int
    status: str


class DeviceFlow(TypedDict):
    """What came of a device flow."""

    id: str
    status: DeviceFlowStatus
    status_reason: str | None
    connection_id: str | None
    integration: str
    subject: str
    expires_at: Time


# Integrations and the catalog


class Integration(TypedDict):
    """A configured provider; no client secret is among it."""

    name: str
    provider: str
    description: str
    client_id: str
    scopes: list[str]
    config: dict[str, Any]
    enabled: bool
    status: str
    status_reason: str | None
    client_secrets: int
    created_at: Time
    updated_at: Time


class IntegrationList(TypedDict):
    """A page of integrations."""

    data: list[Integration]
    next_cursor: str | None


class Check(TypedDict):
    """One call of a test."""

    name: str
    ok: bool
    detail: str


class Verdict(TypedDict):
    """What the calls of a test proved."""

    ok: bool
    checks: list[Check]


class Rebound(TypedDict):
    """How many connections were pinned anew."""

    connections: int


class ClientSecret(TypedDict):
    """When and whence a client secret is, and how it does; not what."""

    id: str
    source: str
    state: str
    created_at: Time
    last_used_at: Time | None
    refused_at: Time | None


class AddedClientSecret(ClientSecret):
    """A client secret; ``rotation_id``: its canary, if it has one."""

    rotation_id: str | None


class ClientSecretList(TypedDict):
    """A page of client secrets."""

    data: list[ClientSecret]
    next_cursor: str | None


class ExportedIntegration(TypedDict):
    """An integration as documents carry it."""

    name: str
    provider: str
    description: str
    client_id: str
    scopes: list[str]
    config: dict[str, Any]
    enabled: bool


class SealedSecrets(TypedDict):
    """Client secrets under a passphrase; each member is base64."""

    salt: str
    nonce: str
    ciphertext: str


class PlainExport(TypedDict):
    """All integrations."""

    format: str
    integrations: list[ExportedIntegration]


class Export(PlainExport, total=False):
    """All integrations; ``sealed_secrets`` when a passphrase was given."""

    sealed_secrets: SealedSecrets


class Imported(TypedDict):
    """The names of what an import made and changed."""

    created: list[str]
    updated: list[str]


class Figures(TypedDict):
    """How flows, refreshes, tests and proxied calls went; a rate of nothing is null."""

    total: int
    success_rate: float | None
    error_rate: float | None
    mean_latency_ms: float | None
    mean_upstream_latency_ms: float | None
    p50_latency_ms: float | None
    p95_latency_ms: float | None
    p99_latency_ms: float | None
    calls: int
    outcomes: dict[str, int]
    errors: dict[str, int]
    retries: int
    bytes_out: int
    bytes_in: int
    last_activity_at: Time | None
    rate_limit_remaining: int | None


class IntegrationFigures(Figures):
    """How it went in a window, and how the breaker stands now."""

    window: str
    breaker_state: str


class PlainLogLine(TypedDict):
    """A line about a flow, a refresh, a test or a secret."""

    at: Time
    level: LogLevel
    action: str
    text: str


class LogLine(PlainLogLine, total=False):
    """A line of the log; one about a proxied call has all members."""

    connection_id: str
    caller_id: str
    request_id: str
    status: int | None
    code: str | None
    attempts: int
    duration_ms: float
    upstream_ms: float
    bytes_out: int
    bytes_in: int


class LogLineList(TypedDict):
    """A page of lines."""

    data: list[LogLine]
    next_cursor: str | None


class Variable(TypedDict):
    """A part of a provider's hosts that differs between connections."""

    name: str
    pattern: str
    example: str
    default: str | None
    learned: bool


class Setting(TypedDict):
    """Something that a webhook source has to say."""

    name: str
    help: str
    pattern: str
    needed: bool
    secret: bool


class ProviderWebhook(TypedDict):
    """A kind of webhook that a provider sends."""

    kind: str
    scheme: str
    covers: list[str]
    needs_secret: bool
    docs_url: str
    help: str
    settings: list[Setting]
    registration: list[Setting] | None


class ListedProvider(TypedDict):
    """A provider of the catalog."""

    name: str
    title: str
    docs_url: str
    credential_types: list[str]
    hosts: dict[str, str]
    variables: list[Variable]
    default_scopes: list[str]
    discovery: bool
    refresh_rotates: bool | None
    webhooks: list[ProviderWebhook]


class Provider(ListedProvider):
    """A provider with the JSON Schema of an integration's ``config``."""

    config_schema: dict[str, Any]


class ProviderList(TypedDict):
    """A page of the catalog."""

    data: list[ListedProvider]
    next_cursor: str | None


# Callers, audit, keys, revocations


class CallerKey(TypedDict):
    """A key's row."""

    id: str
    created_at: Time
    last_used_at: Time | None
    expires_at: Time | None
    revoked_at: Time | None


class NewCallerKey(CallerKey):
    """A key, shown once."""

    key: str


class Caller(TypedDict):
    """A caller with its keys' ids and times; ``genuine`` is false for a row that the broker did not write."""

    id: str
    name: str
    roles: list[str]
    grants: list[dict[str, Any]]
    expires_at: Time | None
    created_at: Time
    genuine: bool
    keys: list[CallerKey]


class NewCaller(Caller):
    """A caller with its first key, shown once."""

    key: str


class CallerList(TypedDict):
    """A page of callers."""

    data: list[Caller]
    next_cursor: str | None


class PlainIssuedToken(TypedDict):
    """A token of ours (RFC 8693 2.2.1)."""

    access_token: str
    issued_token_type: str
    token_type: str
    expires_in: int


class IssuedToken(PlainIssuedToken, total=False):
    """A token of ours, with what it is narrowed to (RFC 9396) if it is."""

    authorization_details: list[dict[str, Any]]


class AuditRecord(TypedDict):
    """A record of the chain."""

    id: str
    number: int
    at: Time
    action: str
    outcome: str
    actor: str
    connection_id: str | None
    integration: str | None
    subject: str | None
    detail: dict[str, Any]


class AuditRecordList(TypedDict):
    """A page of records."""

    data: list[AuditRecord]
    next_cursor: str | None


class CheckpointKey(TypedDict):
    """A public key that checkpoints and exports are checked with."""

    key_id: str
    public_key: str


class CheckpointKeyList(TypedDict):
    """All of them, the current one first."""

    data: list[CheckpointKey]
    next_cursor: str | None


class Key(TypedDict):
    """A key, by its id; ``sealed``: how many values are under it, null where its class seals nothing."""

    id: str
    state: str
    created_at: Time | None
    activated_at: Time | None
    retire_at: Time | None
    retired_at: Time | None
    sealed: int | None
    places: dict[str, int] | None


_OfClass = TypedDict("_OfClass", {"class": str})  # a keyword cannot be said as a field


class KeyClass(_OfClass):
    """A class of keys, newest first, and its rotation that is not over."""

    rotation: str | None
    keys: list[Key]


class KeyClassList(TypedDict):
    """A page of classes."""

    data: list[KeyClass]
    next_cursor: str | None


class Rotation(_OfClass):
    """A rotation; one that is only planned has no id."""

    id: str | None
    state: str
    step: str
    old_key: str | None
    new_key: str | None
    total: int
    done: int
    failed: int
    detail: dict[str, Any]
    created_by: str | None
    created_at: Time
    updated_at: Time
    ended_at: Time | None


class RotationList(TypedDict):
    """A page of rotations."""

    data: list[Rotation]
    next_cursor: str | None


class Revocation(TypedDict):
    """A freeze, a revocation or an erasure."""

    id: str
    action: str
    selector: dict[str, Any]
    reason: str
    state: str
    total: int
    done: int
    failed: int
    created_by: str | None
    created_at: Time
    ended_at: Time | None


class RevocationResult(TypedDict):
    """What one connection came to."""

    connection_id: str
    status_before: str
    result: str
    detail: str | None
    attempts: int
    at: Time | None


class CountedRevocation(Revocation):
    """A revocation with how many connections came to what."""

    counts: dict[str, int]


class RevocationView(CountedRevocation):
    """A revocation with a page of what its connections came to."""

    results: list[RevocationResult]
    next_cursor: str | None


class RevocationList(TypedDict):
    """A page of revocations."""

    data: list[Revocation]
    next_cursor: str | None


class RevocationCount(TypedDict):
    """What a revocation would stop now."""

    action: Literal["freeze", "revoke"]
    dry_run: bool
    total: int
    by_integration: dict[str, int]


class Erasure(Revocation):
    """The job that erases a person, and which callers' grants name the person."""

    callers: list[str]


# Webhooks


class SourceSecret(TypedDict):
    """When and whence a source's secret is, and until when; not what."""

    id: str
    origin: str
    created_at: Time
    expires_at: Time | None
    last_used_at: Time | None


class NewSourceSecret(SourceSecret, total=False):
    """A secret; shown once if it was made here."""

    secret: str


class SourceSecretList(TypedDict):
    """A page of secrets."""

    data: list[SourceSecret]
    next_cursor: str | None


class Registration(TypedDict):
    """What is known of the hook at the provider."""

    state: str
    error: str | None
    remote_id: str | None
    expires_at: Time | None
    checked_at: Time | None


class WebhookSource(TypedDict):
    """A source; no secret is among it."""

    id: str
    name: str
    provider: str
    url: str
    connection_id: str | None
    register: bool
    tolerance_seconds: float | None
    config: dict[str, Any]
    scheme: str | None
    covers: list[str]
    enabled: bool
    status: str
    status_reason: str | None
    secrets: list[SourceSecret]
    registration: Registration | None
    created_at: Time
    updated_at: Time


class NewWebhookSource(WebhookSource, total=False):
    """A source; its secret is shown once if it was made here."""

    secret: str


class WebhookSourceList(TypedDict):
    """A page of sources."""

    data: list[WebhookSource]
    next_cursor: str | None


class Rejection(TypedDict):
    """A refused request, or ``count`` of a kind."""

    id: str
    at: Time
    step: str
    method: str
    size: int
    address: str | None
    count: int


class RejectionList(TypedDict):
    """A page of refused requests."""

    data: list[Rejection]
    next_cursor: str | None


class SigningSecret(TypedDict):
    """A subscription's secret: since when and until when; not what."""

    id: str
    created_at: Time
    expires_at: Time | None


class NewSigningSecret(SigningSecret):
    """A subscription's secret, shown once."""

    secret: str


class Subscription(TypedDict):
    """A subscription; no secret is among it."""

    id: str
    url: str
    description: str
    event_types: list[str]
    source_id: str | None
    filter: dict[str, list[Any]]
    active: bool
    order_key: str | None
    signature: str
    max_per_second: float | None
    max_concurrent: int
    timeout_seconds: float
    failing_since: Time | None
    disabled_reason: str | None
    secrets: list[SigningSecret]
    public_keys: list[str]
    created_at: Time
    updated_at: Time


class NewSubscription(Subscription, total=False):
    """A subscription; the secret that signs with ``v1`` is shown once."""

    secret: str


class SubscriptionList(TypedDict):
    """A page of subscriptions."""

    data: list[Subscription]
    next_cursor: str | None


class WebhookKey(TypedDict):
    """A public key of deliveries, as Standard Webhooks writes it (``whpk_``)."""

    id: str
    state: str
    key: str


class WebhookKeys(TypedDict):
    """All of them: next, now and before."""

    keys: list[WebhookKey]


class StreamedEvent(TypedDict):
    """An event without its deliveries: ``data`` of a message of the stream."""

    id: str
    number: int | None
    type: str
    source_id: str | None
    provider: str
    connection_id: str | None
    provider_event_id: str | None
    verdict: dict[str, Any]
    received_at: Time
    size: int
    content_type: str | None


class Event(StreamedEvent):
    """An event."""

    status: EventStatus


class WholeEvent(Event):
    """An event whole; ``body`` is base64, and null for who may not have it."""

    headers: list[list[str]]
    body: str | None


class EventList(TypedDict):
    """A page of events."""

    data: list[Event]
    next_cursor: str | None


class Replayed(TypedDict):
    """The new deliveries of an event."""

    event_id: str
    delivery_ids: list[str]
    released: bool


class Try(TypedDict):
    """One attempt of a delivery."""

    at: Time
    status: int | None
    error: str | None
    ms: int


class Delivery(TypedDict):
    """An event on its way to a subscription, with its attempts."""

    id: str
    event_id: str
    event_type: str
    subscription_id: str
    connection_id: str | None
    status: DeliveryStatus
    reason: str | None
    attempts: int
    tries: list[Try]
    replay: bool
    next_attempt_at: Time | None
    created_at: Time
    ended_at: Time | None


class DeliveryList(TypedDict):
    """A page of deliveries."""

    data: list[Delivery]
    next_cursor: str | None


class ReplayCount(TypedDict):
    """How many deliveries an order would send again."""

    dry_run: bool
    total: int
    next_cursor: str | None


class ReplayOrder(ReplayCount):
    """What came of an order of many."""

    retried: int
    replayed: int
