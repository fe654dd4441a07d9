"""Every table, readable in one sitting, and no column that holds a secret in the clear.

Secrets live in the vault. Columns named ``sealed_*`` hold ciphertext made by ``broker.vault.keyring.Sealer``; columns
named ``*_digest`` hold SHA-256 or HMAC values of high-entropy secrets. Times are seconds since 1970 UTC as a double
(``*_at``); leases and expiry compare against the database's own clock (``database.now``). Ids are ``<prefix>_`` and 26
characters of a-z0-9.
"""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime
from typing import Any, overload

from sqlalchemy import JSON, BigInteger, Column, Float, Index, Integer, LargeBinary, Text, UniqueConstraint, text
from sqlmodel import Field, SQLModel

ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
ID_LENGTH = 26
ORDERED_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"  # in the order of the characters' codes
ORDERED_LENGTH = 9  # until the year 5188
_UNEVEN = bytes(range(256 - 256 % len(ID_ALPHABET), 256))  # they would make the alphabet's first letters more likely
_LETTERS = bytes(ord(ID_ALPHABET[byte % len(ID_ALPHABET)]) for byte in range(256))


def new_id(prefix: str) -> str:
    """Return a fresh opaque id, for example ``con_…``: about 134 random bits, safe in a host name."""
    return new_ids(prefix, 1)[0]


def new_ids(prefix: str, count: int) -> list[str]:
    """Return fresh ids, of which 1 µs goes into each; a ``secrets.choice`` a letter would take 30."""
    letters, wanted = "", count * ID_LENGTH
    while len(letters) < wanted:
        letters += secrets.token_bytes(wanted + 16).translate(_LETTERS, _UNEVEN).decode()
    return [f"{prefix}_{letters[at : at + ID_LENGTH]}" for at in range(0, wanted, ID_LENGTH)]


def new_ordered_ids(prefix: str, count: int, at: float) -> list[str]:
    """Return fresh ids that sort by the time ``at``: nine characters of milliseconds, then 88 random bits.

    New rows then go to one end of the index over them. With random ids each goes to a page of its own, which an insert of
    64 audit records pays for with 12 µs a record on SQLite.
    """
    rest, time_part = int(at * 1000), ""
    while len(time_part) < ORDERED_LENGTH:
        rest, digit = divmod(rest, len(ORDERED_ALPHABET))
        time_part = ORDERED_ALPHABET[digit] + time_part
    return [f"{prefix}_{time_part}{one[len(prefix) + 1 + ORDERED_LENGTH :]}" for one in new_ids(prefix, count)]


@overload
def rfc3339(epoch_seconds: float) -> str: ...
@overload
def rfc3339(epoch_seconds: float | None) -> str | None: ...
def rfc3339(epoch_seconds: float | None) -> str | None:
    """Return the RFC 3339 form in UTC with milliseconds, or None for None."""
    if epoch_seconds is None:
        return None
    moment = datetime.fromtimestamp(epoch_seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def epoch_of(text: str) -> float | None:
    """Return seconds since 1970 of an RFC 3339 time from 1970 on, or None for anything else."""
    if _RFC3339.fullmatch(text) is None:
        return None
    try:
        seconds = datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError):
        return None
    return seconds if seconds >= 0 else None


def _time(*, nullable: bool = True, index: bool = False) -> Any:  # noqa: ANN401 - SQLModel's Field is Any too
    return Field(default=None, sa_column=Column(Float(53), nullable=nullable, index=index))


def _json(default: Any) -> Any:  # noqa: ANN401
    return Field(default_factory=default, sa_column=Column(JSON, nullable=False))


def _count(*, primary_key: bool = False) -> Any:  # noqa: ANN401
    # 32 bits would be full after a month of 1,000 records a second; on SQLite the key stays the row id.
    kind = BigInteger().with_variant(Integer(), "sqlite")
    return Field(default=0, sa_column=Column(kind, primary_key=primary_key, autoincrement=False, nullable=False))


def _sealed(*, nullable: bool = True) -> Any:  # noqa: ANN401
    return Field(default=None, sa_column=Column(LargeBinary, nullable=nullable))


class Integration(SQLModel, table=True):
    """A configured provider. Its client secrets are rows of ``ClientSecret`` and values in the vault."""

    __tablename__ = "integrations"

    name: str = Field(primary_key=True)
    provider: str
    description: str = ""
    client_id: str = ""
    scopes: list[str] = _json(list)
    config: dict[str, Any] = _json(dict)
    enabled: bool = True
    testing_until: float | None = _time()
    test_error: str | None = None
    created_at: float = _time(nullable=False)
    updated_at: float = _time(nullable=False)
    endpoints_changed_at: float | None = _time()
    rebound_at: float | None = _time()


class ClientSecret(SQLModel, table=True):
    """One live client secret of an integration; the value is in the vault under ``client_secret_owner``."""

    __tablename__ = "client_secrets"

    id: str = Field(primary_key=True)
    integration: str = Field(index=True)
    source: str = "api"
    value_digest: str
    state: str = Field(default="live", sa_column_kwargs={"server_default": "live"}, description="candidate or live")
    last_used_at: float | None = _time()
    refused_at: float | None = _time()
    created_at: float = _time(nullable=False)


class BrowserSession(SQLModel, table=True):
    """A backend's session for one user: ties flows to its subject. Only digests of its token and owner cookie."""

    __tablename__ = "sessions"

    id: str = Field(primary_key=True)
    token_digest: str = Field(index=True)
    cookie_digest: str | None = None
    caller_id: str
    subject: str
    integrations: list[str] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    return_to: str | None = None
    scopes: list[str] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    variables: dict[str, str] = _json(dict)
    tags: dict[str, str] = _json(dict)
    reconnects: str | None = Field(default=None, description="the connection that this session may reconnect")
    created_at: float = _time(nullable=False)
    expires_at: float = _time(nullable=False, index=True)


class ConsoleSession(SQLModel, table=True):
    """Somebody is logged in at the operators' console, until ``expires_at``; who that is stands in the signed cookie."""

    __tablename__ = "console_sessions"

    id: str = Field(primary_key=True)
    created_at: float = _time(nullable=False)
    expires_at: float = _time(nullable=False, index=True)


class Flow(SQLModel, table=True):
    """One authorization-code flow of one browser, from start to confirm.

    ``plan`` is what was configured at start (issuer, endpoints, client id): the answer is judged and the code sent by
    it, whatever was changed since. ``consumed_at`` is set by the one conditional update that lets a callback act.
    """

    __tablename__ = "flows"

    id: str = Field(primary_key=True)
    integration: str
    state_digest: str = Field(unique=True)
    cookie_name: str
    cookie_digest: str
    session_id: str | None = None
    reconnects: str | None = None
    return_to: str | None = None
    redirect_uri: str
    scopes: list[str] = _json(list)
    variables: dict[str, str] = _json(dict)
    tags: dict[str, str] = _json(dict)
    plan: dict[str, Any] = _json(dict)
    consent_forced: bool = False
    sealed_verifier: bytes | None = _sealed()
    address: str = ""
    created_at: float = _time(nullable=False)
    expires_at: float = _time(nullable=False, index=True)
    consumed_at: float | None = _time()
    sealed_outcome: bytes | None = _sealed()
    outcome_until: float | None = _time()
    connection_id: str | None = Field(default=None, index=True)
    subject: str | None = None
    confirm_digest: str | None = None
    confirm_until: float | None = _time()
    confirm_claimed_at: float | None = _time()
    confirmed_at: float | None = _time()
    confirmed_by: str | None = None
    confirm_body_digest: str | None = None
    surviving_id: str | None = None
    burnt_at: float | None = _time()


class Connection(SQLModel, table=True):
    """One account at one provider for one subject; the credential is in the vault at ``secret_version``.

    ``status``: pending, active, reauthorization_required, frozen, revoked, error. A row with ``deleted_at`` is gone for
    everybody; it stays only until revocation and the destruction of its secret are done. ``granted_at``: when the credential
    that it has was granted or imported, where that was not when it was created.
    """

    __tablename__ = "connections"
    __table_args__ = (
        Index(
            "uq_connections_account",
            "integration",
            "subject",
            "account_id",
            unique=True,
            sqlite_where=text("status <> 'pending' AND deleted_at IS NULL"),
            postgresql_where=text("status <> 'pending' AND deleted_at IS NULL"),
        ),
        Index(
            "ix_connections_created",
            "created_at",
            "id",
            sqlite_where=text("deleted_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "ix_connections_deleted_at",
            "deleted_at",
            sqlite_where=text("deleted_at IS NOT NULL"),
            postgresql_where=text("deleted_at IS NOT NULL"),
        ),
        # the time and the id too, so that a list with one filter reads in its order instead of sorting all that fits
        Index("ix_connections_integration", "integration", "created_at", "id"),
        Index("ix_connections_subject", "subject", "created_at", "id"),
        Index("ix_connections_status", "status", "created_at", "id"),
        Index("ix_connections_account", "provider", "account_id"),  # a webhook names nothing but these
    )

    id: str = Field(primary_key=True)
    integration: str
    provider: str
    subject: str | None = None
    account_id: str | None = None
    account_name: str | None = None
    account_email: str | None = None
    status: str
    status_reason: str | None = None
    credential_type: str = "oauth2"
    client_id: str = ""
    pins: dict[str, Any] = _json(dict)
    variables: dict[str, str] = _json(dict)
    scopes: list[str] = _json(list)
    missing_scopes: list[str] = _json(list)
    secret_version: int = 0  # -n: none any more, and n was the last number; the next one is n + 1
    refreshable: bool = False
    token_expires_at: float | None = _time(index=True)
    refresh_expires_at: float | None = _time()
    refreshed_at: float | None = _time()
    refresh_failures: int = 0
    refresh_not_before_at: float | None = _time()
    unknown_outcomes: int = 0
    refusals: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    last_used_at: float | None = _time()
    tags: dict[str, str] = _json(dict)
    extra: dict[str, Any] = Field(default_factory=dict, sa_column=Column("metadata", JSON, nullable=False))
    flow_id: str | None = None
    created_by: str | None = None
    created_at: float = _time(nullable=False)
    granted_at: float | None = _time()
    pending_until: float | None = _time(index=True)
    revoke_on_delete: bool = True
    deleted_at: float | None = _time()


class DeviceFlow(SQLModel, table=True):
    """One device authorization (RFC 8628), from the request for a code to the connection that comes of it.

    What it asks for and was planned stands in the ``Flow`` of ``flow_id``, which no browser can finish. A worker claims a poll
    by moving ``poll_at`` ahead. ``status``: pending, connected, denied, expired, failed.
    """

    __tablename__ = "device_flows"

    id: str = Field(primary_key=True)
    flow_id: str
    integration: str
    subject: str
    status: str = Field(default="pending", index=True)
    status_reason: str | None = None
    sealed_device_code: bytes | None = _sealed()
    user_code: str
    verification_uri: str
    verification_uri_complete: str | None = None
    interval_seconds: float = Field(sa_column=Column(Float(53), nullable=False))
    failures: int = 0
    poll_at: float = _time(nullable=False, index=True)
    created_by: str | None = None
    created_at: float = _time(nullable=False)
    expires_at: float = _time(nullable=False)
    connection_id: str | None = None


class RefreshLease(SQLModel, table=True):
    """Who may write this connection's secret now. ``fence`` grows with every claim and outlives the lease."""

    __tablename__ = "refresh_leases"

    connection_id: str = Field(primary_key=True)
    owner: str | None = None
    fence: int = 0
    expires_at: float = _time(nullable=False)


class RefreshAttempt(SQLModel, table=True):
    """Written before a refresh is sent; a row without a journal is an unknown outcome."""

    __tablename__ = "refresh_attempts"

    connection_id: str = Field(primary_key=True)
    fence: int
    token_digest: str
    sent_at: float = _time(nullable=False)


class RefreshJournal(SQLModel, table=True):
    """The provider's raw answer to a refresh, sealed, until it is in the vault and the row names that version."""

    __tablename__ = "refresh_journal"

    connection_id: str = Field(primary_key=True)
    fence: int
    token_digest: str
    sealed_answer: bytes = _sealed(nullable=False)
    received_at: float = _time(nullable=False)


class SealedSecret(SQLModel, table=True):
    """The embedded store: one version of one owner's secret as an AES-256-GCM envelope."""

    __tablename__ = "sealed_secrets"
    # what is under one key, in the order of the primary key: a rotation walks over it batch by batch
    __table_args__ = (Index("ix_sealed_secrets_under", "key_id", "owner", "version"),)

    owner: str = Field(primary_key=True)
    version: int = Field(primary_key=True)
    key_id: str
    sealed: bytes = _sealed(nullable=False)
    created_at: float = _time(nullable=False)


class DataKey(SQLModel, table=True):
    """A data key, wrapped by a key-encryption key (of the keyring, or Vault's Transit).

    Next (not yet activated) → current → previous → retired. What is retired is loaded nowhere, and a write that was sealed
    under it is refused in its own transaction. A day later it is shredded (``wrapped`` is empty), or previous once more if
    something readable was found under it.
    """

    __tablename__ = "data_keys"

    id: str = Field(primary_key=True)
    wrapped_by: str = Field(index=True)
    wrapped: bytes = _sealed(nullable=False)
    current: bool = True
    created_at: float = _time(nullable=False)
    activated_at: float | None = _time()
    retired_at: float | None = _time()


class KeyCheck(SQLModel, table=True):
    """A check value for each key-encryption key in use: a replica that lacks or differs refuses to start."""

    __tablename__ = "key_checks"

    key_id: str = Field(primary_key=True)
    check_value: str
    created_at: float = _time(nullable=False)
    retired_at: float | None = _time()


class SystemKey(SQLModel, table=True):
    """A root key of the broker itself, sealed; the index lets several processes agree on one current key a purpose."""

    __tablename__ = "system_keys"
    __table_args__ = (
        Index(
            "uq_system_keys_current",
            "purpose",
            unique=True,
            sqlite_where=text("state = 'current'"),
            postgresql_where=text("state = 'current'"),
        ),
    )

    id: str = Field(primary_key=True)
    purpose: str = Field(index=True)
    state: str = Field(default="current", description="next, current, previous or retired")
    sealed_key: bytes = _sealed(nullable=False)
    created_at: float = _time(nullable=False)
    activated_at: float | None = _time()
    retire_at: float | None = _time()


class Caller(SQLModel, table=True):
    """A backend, an operator or an auditor, with roles and grants (see ``policy``)."""

    __tablename__ = "callers"

    id: str = Field(primary_key=True)
    name: str
    roles: list[str] = _json(list)
    grants: list[dict[str, Any]] = _json(list)
    expires_at: float | None = _time()
    created_at: float = _time(nullable=False)
    mac: str | None = None


class CallerKey(SQLModel, table=True):
    """One key of a caller; only SHA-256 of the whole key (256 random bits, so no salt is needed)."""

    __tablename__ = "caller_keys"

    id: str = Field(primary_key=True)
    caller_id: str = Field(index=True)
    key_digest: str
    created_at: float = _time(nullable=False)
    last_used_at: float | None = _time()
    expires_at: float | None = _time()
    revoked_at: float | None = _time()
    warned_at: float | None = _time()
    mac: str | None = None


class AuditRecord(SQLModel, table=True):
    """One link of the audit chain. ``subject`` may be erased later; the chain covers ``subject_digest``."""

    __tablename__ = "audit_records"
    __table_args__ = (
        # No column of a hand-out or a call has an index: it costs one up to a fifth of its time, and "Audit.search" walks.
        Index(
            "ix_audit_records_rare",
            "action",
            "number",
            sqlite_where=text("action <> 'connection.token' AND action <> 'connection.proxy'"),
            postgresql_where=text("action <> 'connection.token' AND action <> 'connection.proxy'"),
        ),
    )

    number: int = _count(primary_key=True)
    id: str = Field(unique=True)
    at: float = _time(nullable=False)
    action: str
    outcome: str
    actor: str
    connection_id: str | None = None
    integration: str | None = None
    subject: str | None = None
    subject_digest: str | None = None
    detail: dict[str, Any] = _json(dict)
    key_id: str
    chain: str = Field(description="HMAC over the previous link and this record")


class AuditHead(SQLModel, table=True):
    """The one row that orders the chain across processes: whoever holds its lock writes next."""

    __tablename__ = "audit_head"

    id: int = Field(default=1, primary_key=True)
    count: int = _count()
    chain: str = ""
    mac: str = ""


class AuditCheckpoint(SQLModel, table=True):
    """A signed (count, head), so that a cut tail shows; copied to a second place too."""

    __tablename__ = "audit_checkpoints"

    count: int = _count(primary_key=True)
    chain: str
    at: float = _time(nullable=False)
    key_id: str
    signature: str


class AuditFloor(SQLModel, table=True):
    """Where the chain begins since older records were removed: the last one removed, its link, and a MAC over both."""

    __tablename__ = "audit_floor"

    id: int = Field(default=1, primary_key=True)
    number: int = _count()
    chain: str = ""
    mac: str = ""
    key_id: str = ""
    cut_at: float = _time(nullable=False)


class Replica(SQLModel, table=True):
    """A process that is alive, and which keys it has: a new key is used once every live one has it."""

    __tablename__ = "replicas"

    id: str = Field(primary_key=True)
    kind: str = Field(description="serve, worker or cli")
    host: str = ""
    version: str = ""
    keys: dict[str, list[str]] = _json(dict)
    started_at: float = _time(nullable=False)
    seen_at: float = _time(nullable=False, index=True)


class Rotation(SQLModel, table=True):
    """The replacement of one key by another, step by step: any process may do the next step, one at a time.

    ``state``: running, paused, done, failed. ``step`` and ``detail`` are the key class's own. ``position`` is where the
    rewriting has got to, so that a crash repeats one batch at most.
    """

    __tablename__ = "rotations"

    id: str = Field(primary_key=True)
    key_class: str = Field(index=True)
    state: str = Field(default="running", index=True)
    step: str = "publish"
    old_key: str | None = None
    new_key: str | None = None
    total: int = _count()
    done: int = _count()
    failed: int = _count()
    position: str | None = None
    detail: dict[str, Any] = _json(dict)
    created_by: str | None = None
    created_at: float = _time(nullable=False)
    updated_at: float = _time(nullable=False)
    ended_at: float | None = _time()
    lease_owner: str | None = None
    lease_expires_at: float | None = _time()


class Revocation(SQLModel, table=True):
    """A freeze or a revocation of many connections at once. ``state``: running, done, lifting, lifted."""

    __tablename__ = "revocations"

    id: str = Field(primary_key=True)
    action: str = Field(description="freeze or revoke")
    selector: dict[str, Any] = _json(dict)
    reason: str
    state: str = Field(default="running", index=True)
    total: int = _count()
    done: int = _count()
    failed: int = _count()
    created_by: str | None = None
    created_at: float = _time(nullable=False, index=True)
    ended_at: float | None = _time()
    lease_owner: str | None = None
    lease_expires_at: float | None = _time()


class RevocationResult(SQLModel, table=True):
    """What one connection came to in a ``Revocation``; ``status_before`` is what lifting a freeze brings back."""

    __tablename__ = "revocation_results"
    __table_args__ = (Index("ix_revocation_results_open", "revocation_id", "result", "connection_id"),)

    revocation_id: str = Field(primary_key=True)
    connection_id: str = Field(primary_key=True)
    status_before: str
    status_reason_before: str | None = None
    result: str = Field(default="pending", description="pending, frozen, lifted, or as an answer's ``revocation``")
    detail: str | None = None
    attempts: int = 0
    not_before_at: float | None = _time()
    at: float | None = _time()


class IdempotentAnswer(SQLModel, table=True):
    """What an Idempotency-Key was used for, for 24 hours."""

    __tablename__ = "idempotent_answers"
    __table_args__ = (UniqueConstraint("caller_id", "key_digest"),)

    id: str = Field(primary_key=True)
    caller_id: str
    key_digest: str
    request_digest: str
    status: int | None = None
    made_id: str | None = None
    answer: str | None = Field(default=None, sa_column=Column(Text))
    created_at: float = _time(nullable=False, index=True)


class IntegrationLog(SQLModel, table=True):
    """A recent line about an integration, for ``GET /v1/integrations/{name}/logs``; never holds a secret."""

    __tablename__ = "integration_logs"

    id: int | None = Field(default=None, primary_key=True)
    integration: str = Field(index=True)
    at: float = _time(nullable=False, index=True)
    level: str
    action: str
    text: str
    duration_ms: float | None = _time()


class CallMinute(SQLModel, table=True):
    """What an integration's proxied calls of one minute add up to, one row a ``part`` (see ``activity.Tally.parts``).

    Every process adds to the same rows. ``at`` is the minute's begin; after two hours that of its hour.
    """

    __tablename__ = "call_minutes"

    integration: str = Field(primary_key=True)
    at: int = _count(primary_key=True)
    part: str = Field(primary_key=True)
    amount: int = _count()


class CallLatest(SQLModel, table=True):
    """When an integration's last proxied call ended, and what its upstream last said is left of the limit."""

    __tablename__ = "call_latest"

    integration: str = Field(primary_key=True)
    last_at: float = _time(nullable=False)
    rate_remaining: int | None = Field(default=None, sa_column=Column(BigInteger))
    rate_at: float = _time(nullable=False)


class CallLine(SQLModel, table=True):
    """One proxied call, for ``GET /v1/integrations/{name}/logs``: a sample, no query, and gone with its connection."""

    __tablename__ = "call_lines"
    __table_args__ = (Index("ix_call_lines_of", "integration", "at", "id"),)

    id: int | None = Field(
        default=None, sa_column=Column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    )
    integration: str
    at: float = _time(nullable=False, index=True)
    level: str
    connection_id: str = Field(index=True)
    caller_id: str
    request_id: str
    method: str
    host: str
    path: str
    status: int | None = None
    code: str | None = None
    attempts: int
    upstream_ms: float = _time(nullable=False)
    total_ms: float = _time(nullable=False)
    bytes_out: int = _count()
    bytes_in: int = _count()


class WebhookState(SQLModel, table=True):
    """One row that orders events across processes, and tells them that sources or subscriptions changed.

    Whoever holds its lock numbers the next events and commits, so numbers become visible in their order: a reader that has
    seen a number will never see a smaller one appear.
    """

    __tablename__ = "webhook_state"

    id: int = Field(default=1, primary_key=True)
    number: int = _count()
    revision: int = _count()


class WebhookSource(SQLModel, table=True):
    """Where one provider posts its events. Its secrets are rows of ``WebhookSecret`` and values in the vault."""

    __tablename__ = "webhook_sources"

    id: str = Field(primary_key=True)
    name: str = Field(unique=True)
    provider: str
    kind: str = ""
    connection_id: str | None = Field(default=None, index=True)
    register_at_provider: bool = False
    tolerance_seconds: float | None = _time()
    config: dict[str, Any] = _json(dict)
    settings_version: int = 0
    enabled: bool = True
    created_by: str | None = None
    created_at: float = _time(nullable=False)
    updated_at: float = _time(nullable=False)


class WebhookSubscription(SQLModel, table=True):
    """Where events are delivered to, and which. While it is not active its deliveries are held, never dropped."""

    __tablename__ = "webhook_subscriptions"

    id: str = Field(primary_key=True)
    url: str
    description: str = ""
    event_types: list[str] = _json(list)
    source_id: str | None = None
    filter: dict[str, list[Any]] = _json(dict)
    active: bool = True
    order_key: str | None = None
    signature: str = "v1"
    max_per_second: float | None = _time()
    max_concurrent: int = 16
    timeout_seconds: float = Field(default=15.0, sa_column=Column(Float(53), nullable=False))
    failing_since: float | None = _time()
    disabled_reason: str | None = None
    created_by: str | None = None
    created_at: float = _time(nullable=False)
    updated_at: float = _time(nullable=False)


class WebhookSecret(SQLModel, table=True):
    """One live secret of a source or a subscription (``owner_id``); the value is in the vault, version 1."""

    __tablename__ = "webhook_secrets"

    id: str = Field(primary_key=True)
    owner_id: str = Field(index=True)
    origin: str = Field(description="given, generated, learned or rotated")
    value_digest: str
    created_by: str | None = None
    created_at: float = _time(nullable=False)
    expires_at: float | None = _time(index=True)
    last_used_at: float | None = _time()


class WebhookEvent(SQLModel, table=True):
    """What a provider posted, byte for byte, or an event of the broker's own (``source_id`` is None).

    ``number`` is given when the event is fanned out, in the order of commits; None while it waits for that, or for its
    connection (``parked``). ``verdict``: what of it was proven. The body stands in ``body`` or, sealed, in ``sealed_body``:
    the last columns, so that a list does not read them.
    """

    __tablename__ = "webhook_events"
    __table_args__ = (
        Index("ix_webhook_events_source", "source_id", "number"),
        Index(
            "ix_webhook_events_connection",
            "connection_id",
            "number",
            sqlite_where=text("connection_id IS NOT NULL"),
            postgresql_where=text("connection_id IS NOT NULL"),
        ),
        Index(
            "ix_webhook_events_waiting",
            "parked",
            "received_at",
            sqlite_where=text("number IS NULL"),
            postgresql_where=text("number IS NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    number: int | None = Field(
        default=None, sa_column=Column(BigInteger().with_variant(Integer(), "sqlite"), unique=True, nullable=True)
    )
    type: str
    source_id: str | None = None
    provider: str
    connection_id: str | None = None
    account_id: str | None = None
    parked: bool = False
    provider_event_id: str | None = None
    verdict: dict[str, Any] = _json(dict)
    received_at: float = _time(nullable=False)
    content_type: str | None = None
    headers: list[list[str]] = _json(list)
    size: int = 0
    sealed_body: bytes | None = _sealed()
    body: bytes | None = Field(default=None, sa_column=Column(LargeBinary, nullable=True))


class WebhookSeen(SQLModel, table=True):
    """What tells that a delivery was there before: a signed id, or the digest of the signed bytes. One row each."""

    __tablename__ = "webhook_seen"
    __table_args__ = {"sqlite_with_rowid": False}

    source_id: str = Field(primary_key=True)
    digest: str = Field(primary_key=True)
    event_id: str
    expires_at: float = _time(nullable=False, index=True)


class WebhookDelivery(SQLModel, table=True):
    """One event for one subscription: a row of the leased queue.

    ``state``: pending, delivering, retrying, delivered, dead. ``due_at`` is when it may be taken; taking moves it to the end
    of the lease and sets ``claim``, and only the holder of that claim records an outcome. A delivery whose subscription is
    not active is shown as ``held``. ``tries``: the attempts, newest last.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index(
            "ix_webhook_deliveries_open",
            "subscription_id",
            "due_at",
            "id",
            sqlite_where=text("state NOT IN ('delivered', 'dead')"),
            postgresql_where=text("state NOT IN ('delivered', 'dead')"),
        ),
        Index(
            "ix_webhook_deliveries_ordered",
            "subscription_id",
            "order_key",
            "number",
            sqlite_where=text("order_key IS NOT NULL AND state NOT IN ('delivered', 'dead')"),
            postgresql_where=text("order_key IS NOT NULL AND state NOT IN ('delivered', 'dead')"),
        ),
        Index(
            "ix_webhook_deliveries_dead",
            "subscription_id",
            "id",
            sqlite_where=text("state = 'dead'"),
            postgresql_where=text("state = 'dead'"),
        ),
        Index("ix_webhook_deliveries_event", "event_id"),
    )

    id: str = Field(primary_key=True)
    subscription_id: str
    event_id: str
    number: int = _count()
    order_key: str | None = None
    state: str = "pending"
    due_at: float = _time(nullable=False)
    claim: str | None = None
    attempts: int = 0
    replay: bool = False
    reason: str | None = None
    tries: list[dict[str, Any]] = _json(list)
    created_at: float = _time(nullable=False)
    ended_at: float | None = _time()


class WebhookRejection(SQLModel, table=True):
    """A request to a source that proved nothing, and the step that failed; a bounded log, nothing of the request is kept."""

    __tablename__ = "webhook_rejections"
    __table_args__ = (Index("ix_webhook_rejections_of", "source_id", "id"),)

    id: int | None = Field(
        default=None, sa_column=Column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    )
    source_id: str
    at: float = _time(nullable=False)
    step: str
    method: str
    size: int = 0
    address: str | None = None
    count: int = 1


class WebhookRegistration(SQLModel, table=True):
    """A hook that the broker made at a provider with a connection's token, or is about to make or remove.

    ``state``: wanted, active, failed, unwanted, gone. Several of a source are there while one lease overlaps the next.
    """

    __tablename__ = "webhook_registrations"

    id: str = Field(primary_key=True)
    source_id: str = Field(index=True)
    connection_id: str = Field(index=True)
    state: str = "wanted"
    remote_id: str | None = None
    detail: dict[str, Any] = _json(dict)
    error: str | None = None
    attempts: int = 0
    due_at: float = _time(nullable=False, index=True)
    claim: str | None = None
    expires_at: float | None = _time()
    created_at: float = _time(nullable=False)
    checked_at: float | None = _time()
