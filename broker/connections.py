"""What a backend does with connections: list, import, change, delete, and the hand-out of a fresh token.

Order of every hand-out: who may → is it usable → a fresh token → a durable audit record → release.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker import policy
from broker.audit import Audit, Entry
from broker.credentials import Credentials, Handout, LeaseLost, Revoked, require_lease, secret_owner
from broker.credentials.usable import require_usable
from broker.database import Database, now
from broker.egress import Egress
from broker.errors import (
    AmbiguousConnection,
    AuditUnavailable,
    BrokerError,
    Conflict,
    FieldError,
    Forbidden,
    InvalidRequest,
    NotFound,
)
from broker.integrations import Configured, Integrations
from broker.integrations.config import is_scope, merge_patch
from broker.models import Connection, epoch_of, new_id
from broker.policy import May, Principal, Target
from broker.refresh import Ask
from broker.telemetry import Metrics
from broker.vault import Vault
from providers.spec import Credential

STATUSES = frozenset({"pending", "active", "reauthorization_required", "frozen", "revoked", "error"})
TOUCH_SECONDS = 60.0
SMALLEST_BATCH = 200
MOST_EXAMINED = 2_000
MOST_PUSHED = 500
RECHECK_SECONDS = 0.5
RACES = 3
MOST_TAGS = 64
LARGEST_METADATA = 16_384
Position = tuple[float, str]
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Filter:
    """What a list of connections is narrowed to; ``before`` is the cursor's position."""

    integration: str | None = None
    subject: str | None = None
    status: str | None = None
    tag: tuple[str, str] | None = None
    before: Position | None = None
    limit: int = 50


@dataclass(frozen=True, slots=True)
class Import:
    """A credential that exists already. ``credentials`` is checked here by its ``type``."""

    integration: str
    subject: str
    credentials: Mapping[str, Any] = field(repr=False)
    account: Mapping[str, Any] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Imported:
    """A checked import: what goes to the vault and what goes to the row."""

    value: Mapping[str, Any] = field(repr=False)
    token_expires_at: float | None = None
    scopes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks for a token and why; ``recheck`` finds out anew who they are (Unauthenticated when their key is dead)."""

    principal: Principal
    recheck: Callable[[], Awaitable[Principal]] = field(repr=False)
    reason: str | None = None


def target_of(row: Connection) -> Target:
    """Return what policy decides on."""
    return Target(row.integration, row.subject, row.tags)


class Connections:
    """Connections as callers see them. Methods may run at once on every replica."""

    def __init__(
        self,
        database: Database,
        vault: Vault,
        credentials: Credentials,
        integrations: Integrations,
        audit: Audit,
        metrics: Metrics,
    ) -> None:
        """Keep the parts."""
        self._database = database
        self._vault = vault
        self._credentials = credentials
        self._integrations = integrations
        self._audit = audit
        self._metrics = metrics

    # Reading

    async def get(self, connection_id: str, principal: Principal, *, may: May = "read") -> Connection:
        """Return one connection for a caller that may do ``may`` with it (NotFound, Forbidden)."""
        row, _ = await self._row(connection_id)
        policy.require(principal, may, target_of(row))
        return row

    async def _row(self, connection_id: str) -> tuple[Connection, float]:
        def work(session: Session) -> tuple[Connection | None, float]:
            return session.get(Connection, connection_id), now(session)

        row, at = await self._database.read(work)
        if row is None or row.deleted_at is not None:
            raise NotFound
        return row, at

    async def page(self, wanted: Filter, principal: Principal) -> tuple[list[Connection], Position | None]:
        """Return (visible connections, newest first; where the next page begins, None at the end).

        Rows outside the caller's grants are skipped without a trace. A page is filled from further rows, but not from
        more than about ``MOST_EXAMINED`` of them: then it is short, or empty, although more may follow.
        """
        found: list[Connection] = []
        before, examined, batch = wanted.before, 0, wanted.limit + 1
        while True:
            rows = await self._rows(wanted, principal, before, batch)
            found += [row for row in rows if _fits(wanted, row) and policy.visible(principal, target_of(row))]
            if len(found) > wanted.limit:
                return found[: wanted.limit], _position(found[wanted.limit - 1])
            if len(rows) < batch:
                return found, None
            before, examined, batch = _position(rows[-1]), examined + batch, max(batch, SMALLEST_BATCH)
            if examined >= MOST_EXAMINED:
                return found, before
            await asyncio.sleep(0)  # SQLite reads on the loop: others are served between two batches

    async def _rows(
        self, wanted: Filter, principal: Principal, before: Position | None, limit: int
    ) -> list[Connection]:
        query = select(Connection).where(col(Connection.deleted_at).is_(None), *_reachable(principal))
        if wanted.integration is not None:
            query = query.where(Connection.integration == wanted.integration)
        if wanted.subject is not None:
            query = query.where(Connection.subject == wanted.subject)
        if wanted.status is not None:
            query = query.where(Connection.status == wanted.status)
        if before is not None:
            query = query.where(sa.tuple_(col(Connection.created_at), col(Connection.id)) < before)
        query = query.order_by(col(Connection.created_at).desc(), col(Connection.id).desc()).limit(limit)
        return await self._database.read(lambda session: list(session.exec(query)))

    # Handing out

    async def token(self, connection_id: str, ask: Ask, asking: Asking) -> Handout:
        """Return a fresh token, after its hand-out is durably audited (AuditUnavailable otherwise: nothing leaves).

        Where that took over ``RECHECK_SECONDS``, who asks and what they may is found out once more before it leaves.
        """
        row, at = await self._row(connection_id)
        await self._require_token(row, asking.principal)
        return await self._hand_out(row, at, ask, asking)

    async def _require_token(self, row: Connection, principal: Principal) -> None:
        try:
            policy.require(principal, "token", target_of(row))
        except (Forbidden, NotFound):
            await self._note_denied(_entry("connection.token", row, principal, outcome="denied"))
            raise

    async def _note_denied(self, entry: Entry) -> None:
        # an audit that fails must not tell "outside" from "absent"
        with contextlib.suppress(AuditUnavailable):
            await self._audit.record(entry)

    async def token_for(self, integration: str, subject: str, ask: Ask, asking: Asking) -> Handout:
        """As ``token``, finding the connection of (integration, subject); AmbiguousConnection when several fit."""
        principal = asking.principal
        query = select(Connection).where(
            Connection.integration == integration,
            Connection.subject == subject,
            Connection.status != "pending",
            col(Connection.deleted_at).is_(None),
        )

        def work(session: Session) -> list[Connection]:
            return list(session.exec(query))

        found = await self._database.read(work)
        rows = [row for row in found if policy.allowed(principal, "token", target_of(row))]
        if not rows:
            nearest = next((row for row in found if policy.inside(principal, target_of(row))), None)
            for row in [nearest] if nearest is not None else found:
                await self._require_token(row, principal)
            policy.require(principal, "token", Target(integration, subject, {}))
            raise NotFound
        usable = [row for row in rows if row.status == "active"] or rows
        if len(usable) > 1:
            raise AmbiguousConnection
        return await self.token(usable[0].id, ask, asking)

    async def _hand_out(self, row: Connection, at: float, ask: Ask, asking: Asking) -> Handout:
        began = time.monotonic()
        principal = asking.principal
        try:
            configured = await self._integrations.configured(row.integration)
            handout = await self._credentials.fresh(row, configured, ask, at)
            if time.monotonic() - began > RECHECK_SECONDS:
                row, principal = await self._rechecked(row.id, asking)
        except BrokerError as error:
            self._metrics.handout(error.code)
            raise
        detail: dict[str, Any] = {"token": self._audit.digest(handout.access_token.reveal()), "stale": handout.stale}
        detail.update({"reason": asking.reason} if asking.reason else {})
        await self._audit.record(_entry("connection.token", row, principal, **detail))
        self._metrics.handout("ok")
        await self._touch(row, at)
        return handout

    async def _rechecked(self, connection_id: str, asking: Asking) -> tuple[Connection, Principal]:
        """Return row and caller as they are now: a refresh takes long enough for either to be gone or frozen."""
        principal = await asking.recheck()
        row, _ = await self._row(connection_id)
        await self._require_token(row, principal)
        require_usable(row)
        return row, principal

    async def identity_check(self, name: str, egress: Egress, principal: Principal) -> dict[str, Any] | None:
        """Make the provider's identity call with the newest active connection of an integration, if there is one.

        Returns a check as ``probe`` does, None without a connection or an identity call. The use is audited before it is
        made; whose connection it was stands in the audit only.
        """
        query = select(Connection).where(
            Connection.integration == name, Connection.status == "active", col(Connection.deleted_at).is_(None)
        )
        newest = query.order_by(col(Connection.created_at).desc(), col(Connection.id).desc()).limit(1)
        row, at = await self._database.read(lambda session: (session.exec(newest).first(), now(session)))
        configured = await self._integrations.configured(name)
        if row is None or configured.provider.identify is None:
            return None
        try:
            handout = await self._credentials.fresh(row, configured, Ask(), at)
            await self._audit.record(_entry("integration.tested", row, principal))
            account = await egress.converse(
                configured.provider.identify(_bearer_only(configured, handout)), origins=set(row.pins.values())
            )
        except BrokerError as error:
            return {"name": "identity", "ok": False, "detail": error.detail}
        same = row.account_id in {None, account.id}
        return {"name": "identity", "ok": same, "detail": "fine" if same else "the API names another account"}

    async def _touch(self, row: Connection, at: float) -> None:
        """Keep ``last_used_at`` true to the minute without a write per hand-out."""
        if row.last_used_at is not None and at - row.last_used_at < TOUCH_SECONDS:
            return
        fresh = sa.update(Connection).where(col(Connection.id) == row.id).values(last_used_at=at)
        try:
            await self._database.transaction(lambda session: session.execute(fresh))
        except BrokerError:
            log.warning("connection.touch_failed", connection_id=row.id)  # the hand-out itself stands

    # Writing

    async def import_(self, wanted: Import, principal: Principal) -> Connection:
        """Store a credential that exists already; the connection is active at once.

        With an ``account.id`` that this (integration, subject) has already, that connection is updated. The credential is
        not tried at the provider.
        """
        target = Target(wanted.integration, wanted.subject, wanted.tags)
        policy.require(principal, "connect", target)
        checked_size(wanted.metadata, "/metadata")
        configured = await self._integrations.configured(wanted.integration)
        checked = check_import(wanted.credentials, configured.provider.credential_types)
        fields = {
            "integration": wanted.integration,
            "provider": configured.provider.name,
            "subject": wanted.subject,
            "credential_type": checked.value["type"],
            "client_id": configured.row.client_id,
            "pins": configured.endpoints.origins,
            "scopes": list(checked.scopes),
            "token_expires_at": checked.token_expires_at,
            "refreshable": "refresh_token" in checked.value,
            "status": "active",
            "created_by": principal.caller_id,
            **_account_fields(wanted.account),
        }
        for _ in range(RACES):
            existing = await self._same_account(fields)
            if existing is not None:
                return await self._replace(existing, wanted, checked, fields, principal)
            with contextlib.suppress(IntegrityError):  # the same account was connected meanwhile: update that one
                return await self._insert(wanted, checked, fields, principal)
        raise Conflict("the same account is being connected by several at once; try again")

    async def _same_account(self, fields: Mapping[str, Any]) -> str | None:
        if fields["account_id"] is None:
            return None
        query = select(Connection.id).where(
            *(getattr(Connection, name) == fields[name] for name in ("integration", "subject", "account_id")),
            Connection.status != "pending",
            col(Connection.deleted_at).is_(None),
        )
        return await self._database.read(lambda session: session.exec(query).first())

    async def _insert(
        self, wanted: Import, checked: _Imported, fields: Mapping[str, Any], principal: Principal
    ) -> Connection:
        connection_id = new_id("con")
        version = await self._vault.put(secret_owner(connection_id), checked.value, expected_version=0)

        def work(session: Session) -> Connection:
            row = Connection(
                id=connection_id,
                secret_version=version,
                tags=dict(wanted.tags),
                extra=dict(wanted.metadata),
                created_at=now(session),
                **fields,
            )
            session.add(row)
            session.flush()
            self._audit.append(session, _entry("connection.imported", row, principal, type=checked.value["type"]))
            return row

        try:
            return await self._database.transaction(work)
        except IntegrityError:
            await self._vault.destroy(secret_owner(connection_id))
            raise

    async def _replace(
        self,
        existing_id: str,
        wanted: Import,
        checked: _Imported,
        fields: Mapping[str, Any],
        principal: Principal,
    ) -> Connection:
        async with self._credentials.holding(existing_id) as claimed:
            policy.require(principal, "connect", target_of(claimed.row))
            checked_size(merge_patch(claimed.row.extra, wanted.metadata), "/metadata")
            version = await self._credentials.put(
                existing_id, checked.value, expected_version=claimed.row.secret_version
            )

            def work(session: Session) -> Connection:
                require_lease(session, claimed.lease)
                row = session.get(Connection, existing_id)
                if row is None or row.deleted_at is not None:
                    raise NotFound
                for name, value in _replaced(row, wanted, fields, version).items():
                    setattr(row, name, value)
                session.flush()
                self._audit.append(session, _entry("connection.imported", row, principal, replaced=True))
                return row

            try:
                return await self._database.transaction(work)
            except LeaseLost:
                raise Conflict("the connection was written by another process; try again") from None

    async def update(self, connection_id: str, patch: Mapping[str, Any], principal: Principal) -> Connection:
        """Apply a merge patch to ``tags`` and ``metadata``; the caller must be allowed before and after."""
        await self.get(connection_id, principal, may="manage")

        def work(session: Session) -> Connection:
            row = session.get(Connection, connection_id, with_for_update=True)
            if row is None or row.deleted_at is not None:
                raise NotFound
            tags = _patched(row.tags, patch, "tags")
            policy.require_write(principal, "manage", target_of(row), Target(row.integration, row.subject, tags))
            row.tags, row.extra = tags, checked_size(_patched(row.extra, patch, "metadata"), "/metadata")
            if len(tags) > MOST_TAGS:
                raise InvalidRequest(errors=[FieldError("/tags", f"must be at most {MOST_TAGS}")])
            session.flush()
            self._audit.append(session, _entry("connection.updated", row, principal, fields=sorted(patch)))
            return row

        return await self._database.transaction(work)

    async def delete(
        self, connection_id: str, principal: Principal, *, revoke: bool, session_id: str | None = None
    ) -> Revoked:
        """Delete a connection: gone for everybody at once, then revoked at the provider, then its secret destroyed.

        ``session_id``: whose owner asked for it at the connect page, for the audit.
        """
        row, _ = await self._row(connection_id)
        policy.require(principal, "manage", target_of(row))

        def work(session: Session) -> None:
            gone = (
                sa.update(Connection)
                .where(col(Connection.id) == connection_id, col(Connection.deleted_at).is_(None))
                .values(deleted_at=now(session), revoke_on_delete=revoke)
            )
            if session.execute(gone).rowcount != 1:  # type: ignore[attr-defined]
                raise NotFound
            by = {"session_id": session_id} if session_id is not None else {}
            self._audit.append(session, _entry("connection.deleted", row, principal, revoke=revoke, **by))

        await self._database.transaction(work)
        return await self._credentials.dispose(connection_id)


def _position(row: Connection) -> Position:
    return row.created_at, row.id


def _fits(wanted: Filter, row: Connection) -> bool:
    """Whether a row has the wanted tag: looked at here, because no index serves it and rows looked at are bounded."""
    return wanted.tag is None or row.tags.get(wanted.tag[0]) == wanted.tag[1]


def _reachable(principal: Principal) -> list[sa.ColumnElement[bool]]:
    """Return conditions that leave out rows that no grant can reach; ``policy.visible`` has the last word (pure)."""
    if not principal.roles.isdisjoint({"admin", "auditor"}):
        return []
    grants = [grant for grant in principal.grants if "read" in grant.may] if "service" in principal.roles else []
    conditions: list[sa.ColumnElement[bool]] = []
    integrations = _pushed(grant.integrations for grant in grants)
    if integrations is not None:
        # an expression, so that a long list of integrations is not gathered by its index and then sorted
        column = col(Connection.integration)
        several = sa.func.coalesce(column, "").in_(integrations)
        conditions.append(several if len(integrations) > 1 else column.in_(integrations))
    subjects = _pushed(grant.subjects if grant.subjects is not None else ("*",) for grant in grants)
    return conditions if subjects is None else [*conditions, col(Connection.subject).in_(subjects)]


def _pushed(lists: Iterable[Sequence[str]]) -> list[str] | None:
    """Return all exact values that any list names, None when they say too little or are too many for a query."""
    values = sorted({value for one in lists for value in one})
    return None if len(values) > MOST_PUSHED or any("*" in value for value in values) else values


def check_import(credentials: Mapping[str, Any], types: Sequence[str]) -> _Imported:
    """Check an imported credential by its ``type`` (InvalidRequest names the field; values are never quoted)."""
    kind = credentials.get("type")
    if not isinstance(kind, str) or kind not in types or kind not in SHAPES:
        raise InvalidRequest(errors=[FieldError("/credentials/type", f"must be one of {', '.join(types) or 'none'}")])
    given = {name: value for name, value in credentials.items() if name != "type" and value is not None}
    needed, optional = SHAPES[kind]
    problems = [FieldError("/credentials", "has a field that is not known")] if given.keys() - needed - optional else []
    problems += [FieldError(f"/credentials/{name}", "is required") for name in sorted(needed - given.keys())]
    for name in sorted(given.keys() & (needed | optional)):
        if (problem := _CHECKS[name](given[name])) is not None:
            problems.append(FieldError(f"/credentials/{name}", problem))
    if problems:
        raise InvalidRequest(errors=problems)
    kept = {name: given[name] for name in sorted(given.keys() - {"expires_at", "scopes"})}
    expires_at = epoch_of(given["expires_at"]) if "expires_at" in given else None
    return _Imported({"type": kind, **kept}, expires_at, tuple(given.get("scopes", ())))


def _token_problem(value: object) -> str | None:
    good = isinstance(value, str) and re.fullmatch(r"[\x21-\x7e]{1,16384}", value) is not None
    return None if good else "must be 1 to 16,384 visible ASCII characters"


def _password_problem(value: object) -> str | None:
    good = isinstance(value, str) and 1 <= len(value) <= 1024 and value.isprintable()
    return None if good else "must be 1 to 1,024 printable characters"


def _username_problem(value: object) -> str | None:
    if isinstance(value, str) and ":" in value:
        return "must not hold a colon (RFC 7617)"
    return _password_problem(value)


def _expiry_problem(value: object) -> str | None:
    good = isinstance(value, str) and epoch_of(value) is not None
    return None if good else "must be an RFC 3339 time"


def _scopes_problem(value: object) -> str | None:
    good = isinstance(value, list) and len(value) <= 200 and all(map(is_scope, value))
    return None if good else "must be a list of scopes (RFC 6749 3.3)"


SHAPES: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "api_key": (frozenset({"api_key"}), frozenset()),
    "basic": (frozenset({"username", "password"}), frozenset()),
    "oauth2": (frozenset({"access_token"}), frozenset({"refresh_token", "expires_at", "scopes"})),
}
_CHECKS: Mapping[str, Callable[[object], str | None]] = {
    **dict.fromkeys(("api_key", "access_token", "refresh_token"), _token_problem),
    "username": _username_problem,
    "password": _password_problem,
    "expires_at": _expiry_problem,
    "scopes": _scopes_problem,
}


def checked_size(metadata: Mapping[str, Any], pointer: str) -> dict[str, Any]:
    """Return metadata that is small enough to be listed 200 at a time (InvalidRequest)."""
    if len(json.dumps(metadata)) > LARGEST_METADATA:
        raise InvalidRequest(errors=[FieldError(pointer, f"must be at most {LARGEST_METADATA} characters of JSON")])
    return dict(metadata)


def _patched(current: Mapping[str, Any], patch: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what a merge patch of the connection makes of one of its maps; null removes all of it (RFC 7396)."""
    if name not in patch:
        return dict(current)
    return merge_patch(current, patch[name]) if patch[name] is not None else {}


def _replaced(row: Connection, wanted: Import, fields: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return what an import changes of the connection that it updates; a freeze stays a freeze, a name is not forgotten."""
    known = {name: value for name, value in fields.items() if value is not None or not name.startswith("account_")}
    return {
        **known,
        "status": "frozen" if row.status == "frozen" else "active",
        "status_reason": row.status_reason if row.status == "frozen" else None,
        "secret_version": version,
        "missing_scopes": [],
        "refresh_expires_at": None,
        "refreshed_at": None,
        "refresh_not_before_at": None,
        "refresh_failures": 0,
        "unknown_outcomes": 0,
        "tags": {**row.tags, **wanted.tags},
        "extra": {**row.extra, **wanted.metadata},
        "created_by": row.created_by,
    }


def _account_fields(account: Mapping[str, Any] | None) -> dict[str, Any]:
    given = account or {}
    return {f"account_{name}": given.get(name) for name in ("id", "name", "email")}


def _bearer_only(configured: Configured, handout: Handout) -> Credential:
    """Return what an identity call needs: the token, and neither the client's secret nor the refresh token."""
    return Credential(
        client_id=configured.row.client_id,
        client_secret=None,
        access_token=handout.access_token,
        refresh_token=None,
        urls=configured.endpoints.urls,
        hosts=configured.endpoints.hosts,
    )


def _entry(action: str, row: Connection, principal: Principal, *, outcome: str = "ok", **detail: Any) -> Entry:  # noqa: ANN401 - JSON values
    return Entry(
        action=action,
        actor=principal.caller_id,
        outcome=outcome,
        connection_id=row.id,
        integration=row.integration,
        subject=row.subject,
        detail=detail,
    )
