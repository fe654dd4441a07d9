"""What a backend does with connections: list, import, change, delete, and the hand-out of a fresh token.

Order of every hand-out: who may → is it usable → a fresh token → a durable audit record → release.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker import policy
from broker.announcing import announce_connection
from broker.audit import Audit, Entry
from broker.credentials import Credentials, Handout, LeaseLost, Revoked, require_lease, secret_owner
from broker.credentials.freezes import active_freezes, hold, require_not_ending
from broker.credentials.last_use import LastUse
from broker.credentials.snapshots import Snapshot, snapshots_of
from broker.credentials.usable import Standing, require_usable
from broker.database import Database, GroupReader, now
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
from broker.imports import (
    Import,
    Imported,
    account_fields,
    check_import,
    check_variables,
    known_of,
    require_mintable,
    require_power,
    require_variables,
    scopes_of,
)
from broker.integrations import Configured, Integrations
from broker.integrations.config import merge_patch
from broker.models import Connection, new_id
from broker.policy import May, Principal, Target
from broker.refresh import Ask
from broker.telemetry import Metrics
from broker.vault import Vault
from providers.spec import Credential

STATUSES = frozenset({"pending", "active", "reauthorization_required", "frozen", "revoked", "error"})
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
class Asking:
    """Who asks for a token and why; ``recheck`` finds out anew who they are (Unauthenticated when their key is dead)."""

    principal: Principal
    recheck: Callable[[], Awaitable[Principal]] = field(repr=False)
    reason: str | None = None


def target_of(row: Standing) -> Target:
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
        self._snapshots: GroupReader[str, Snapshot | None] = GroupReader(database, credentials.snapshots)
        self._last_use = LastUse(database)

    async def aclose(self) -> None:
        """Write what is still to be written of when connections were used."""
        await self._last_use.aclose()

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

        Where that took over ``RECHECK_SECONDS``, the first read with it, who asks, what they may and whether the connection was
        stopped is found out once more before it leaves, after a record that waited too: such a record tells of an attempt. How
        long the last look itself takes is not looked at.
        """
        began = time.monotonic()
        row = await self._snapshot(connection_id)
        await self._require_token(row, asking.principal)
        return await self._hand_out(row, ask, asking, began)

    async def _snapshot(self, connection_id: str) -> Snapshot:
        row = await self._snapshots.submit(connection_id)
        if row is None or row.deleted_at is not None:
            raise NotFound
        return row

    async def _require_token(self, row: Snapshot, principal: Principal) -> None:
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
        began, principal = time.monotonic(), asking.principal
        found = await self._database.query(lambda one: snapshots_of(one, integration, subject))
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
        return await self._hand_out(usable[0], ask, asking, began)

    async def _hand_out(self, row: Snapshot, ask: Ask, asking: Asking, began: float) -> Handout:
        """Hand out what ``row`` names. ``began``: before it was read (monotonic); what was stopped since may be unseen."""
        principal = asking.principal
        try:
            configured = await self._integrations.configured_at(row.integration, row.integration_version, row.variables)
            handout = await self._credentials.fresh(row, configured, ask, row.at)
            if time.monotonic() - began > RECHECK_SECONDS:
                began = time.monotonic()
                row, principal = await self._rechecked(row.id, asking)
        except BrokerError as error:
            self._metrics.handout(error.code)
            raise
        detail: dict[str, Any] = {"token": self._audit.digest(handout.access_token.reveal()), "stale": handout.stale}
        if asking.reason:
            detail["reason"] = asking.reason
        await self._audit.record(_entry("connection.token", row, principal, **detail))
        if time.monotonic() - began > RECHECK_SECONDS:  # the record waited: what was stopped meanwhile stays here
            await self._rechecked(row.id, asking)
        self._metrics.handout("ok")
        self._last_use.note(row, row.at)
        return handout

    async def _rechecked(self, connection_id: str, asking: Asking) -> tuple[Snapshot, Principal]:
        """Return row and caller as they are now: a refresh takes long enough for either to be gone or frozen."""
        principal = await asking.recheck()
        row = await self._snapshot(connection_id)
        await self._require_token(row, principal)
        require_usable(row)
        return row, principal

    async def identity_check(self, name: str, egress: Egress, principal: Principal) -> dict[str, Any] | None:
        """Make the provider's identity call with the newest active connection of an integration, if there is one.

        Returns a check as ``probe`` does, None without a connection or an identity call. The use is audited before it is
        made, and not made where the connection was stopped until then; whose connection it was stands in the audit only.
        """
        query = select(Connection).where(
            Connection.integration == name, Connection.status == "active", col(Connection.deleted_at).is_(None)
        )
        newest = query.order_by(col(Connection.created_at).desc(), col(Connection.id).desc()).limit(1)
        row, at = await self._database.read(lambda session: (session.exec(newest).first(), now(session)))
        if row is None:
            return None
        configured = await self._integrations.configured(name, variables=row.variables)
        if configured.provider.identify is None:
            return None
        try:
            handout = await self._credentials.fresh(row, configured, Ask(), at)
            await self._audit.record(_entry("integration.tested", row, principal))
            require_usable((await self._row(row.id))[0])  # a refresh and the record took long enough for a freeze
            account = await egress.converse(
                configured.provider.identify(_bearer_only(configured, handout, at)), origins=set(row.pins.values())
            )
        except BrokerError as error:
            return {"name": "identity", "ok": False, "detail": error.detail}
        same = row.account_id in {None, account.id}
        return {"name": "identity", "ok": same, "detail": "fine" if same else "the API names another account"}

    # Writing

    async def import_(self, wanted: Import, principal: Principal) -> Connection:
        """Store a credential that exists already; the connection is active at once.

        With an ``account.id`` that this (integration, subject) has already, that connection is updated; Conflict where its
        credential is of another type, which would be lost. The credential is not tried at the provider.
        """
        target = Target(wanted.integration, wanted.subject, wanted.tags)
        policy.require(principal, "connect", target)
        checked_size(wanted.metadata, "/metadata")
        configured, checked = await self._checked(wanted, principal)
        fields = {
            "integration": wanted.integration,
            "provider": configured.provider.name,
            "subject": wanted.subject,
            "credential_type": checked.value["type"],
            "client_id": configured.row.client_id,
            "pins": configured.endpoints.origins,
            "variables": known_of(wanted, checked, configured.provider),
            "scopes": scopes_of(configured, checked),
            "refreshable": checked.renewable,
            "status": "active",
            "created_by": principal.caller_id,
            **account_fields(wanted.account, checked.account),
        }
        for _ in range(RACES):
            existing = await self._same_account(fields)
            if existing is not None:
                return await self._replace(existing, wanted, checked, fields, principal)
            with contextlib.suppress(IntegrityError):  # the same account was connected meanwhile: update that one
                return await self._insert(wanted, checked, fields, principal)
        raise Conflict("the same account is being connected by several at once; try again")

    async def _checked(self, wanted: Import, principal: Principal) -> tuple[Configured, Imported]:
        """Return the integration as this import needs it, and the import; raise all that stands against it."""
        plain = await self._integrations.configured(wanted.integration)
        checked = check_import(wanted.credentials, plain.provider.credential_types, plain.provider.minting)
        check_variables(plain.provider, plain.row.config, wanted, checked)
        require_power(principal, wanted, checked, plain.config)
        known = known_of(wanted, checked, plain.provider)
        configured = await self._integrations.configured(wanted.integration, variables=known) if known else plain
        require_variables(configured, checked)
        if checked.minting is not None:
            client = await self._integrations.client(configured)
            at = await self._database.read(now)
            checked = require_mintable(configured, client, checked, scopes_of(configured, checked), at)
        return configured, checked

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
        self, wanted: Import, checked: Imported, fields: Mapping[str, Any], principal: Principal
    ) -> Connection:
        connection_id = new_id("con")
        version = await self._vault.put(secret_owner(connection_id), checked.value, expected_version=0)

        def work(session: Session) -> Connection:
            freezes = active_freezes(session)
            row = Connection(
                id=connection_id,
                secret_version=version,
                tags=dict(wanted.tags),
                extra=dict(wanted.metadata),
                created_at=now(session),
                token_expires_at=_ends_at(session, checked),
                **fields,
            )
            session.add(row)
            announce_connection(session, "created", row)
            frozen = hold(session, row, freezes)
            imported = _entry("connection.imported", row, principal, type=checked.value["type"])
            self._audit.append(session, imported, *frozen)
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
        checked: Imported,
        fields: Mapping[str, Any],
        principal: Principal,
    ) -> Connection:
        async with self._credentials.holding(existing_id) as claimed:
            policy.require(principal, "connect", target_of(claimed.row))
            _require_same_type(claimed.row, checked)
            await self._database.read(lambda session: require_not_ending(session, existing_id))
            checked_size(merge_patch(claimed.row.extra, wanted.metadata), "/metadata")
            fields = await self._with_known_variables(claimed.row, fields)
            version = await self._credentials.put(
                existing_id, checked.value, expected_version=claimed.row.secret_version
            )

            def work(session: Session) -> Connection:
                freezes = active_freezes(session)
                require_not_ending(session, existing_id)  # once more: no revocation begins while this lasts
                require_lease(session, claimed.lease)
                row = session.get(Connection, existing_id, with_for_update=True)
                if row is None or row.deleted_at is not None:
                    raise NotFound
                if row.status == "revoked" != claimed.row.status:
                    raise Conflict("the connection was revoked meanwhile; try again later")
                for name, value in _replaced(row, wanted, fields, version).items():
                    setattr(row, name, value)
                row.token_expires_at, row.granted_at = _ends_at(session, checked), now(session)
                announce_connection(session, "confirmed", row)
                frozen = hold(session, row, freezes)
                self._audit.append(session, _entry("connection.imported", row, principal, replaced=True), *frozen)
                return row

            try:
                return await self._database.transaction(work)
            except LeaseLost:
                raise Conflict("the connection was written by another process; try again") from None

    async def _with_known_variables(self, row: Connection, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields with what is known already of the account's addresses, and pins that fit."""
        variables = {**row.variables, **fields["variables"]}
        if variables == fields["variables"]:
            return fields
        configured = await self._integrations.configured(row.integration, variables=variables)
        return {**fields, "variables": variables, "pins": configured.endpoints.origins}

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
        await self._credentials.before_the_end(row)  # while an ended token can still be refreshed for it

        def work(session: Session) -> None:
            gone = (
                sa.update(Connection)
                .where(col(Connection.id) == connection_id, col(Connection.deleted_at).is_(None))
                .values(deleted_at=now(session), revoke_on_delete=revoke)
            )
            if session.execute(gone).rowcount != 1:  # type: ignore[attr-defined]
                raise NotFound
            gone_row = session.get(Connection, connection_id)  # as it was in the end: a confirm may have been faster
            announce_connection(session, "deleted", gone_row or row)
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


def _require_same_type(row: Connection, checked: Imported) -> None:
    """Raise Conflict for a credential of another type than the one that it would replace: a key is not got back."""
    if row.credential_type != checked.value["type"]:
        raise Conflict("this account has a credential of another type; delete that, or name another account.id")


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
        "refusals": 0,
        "tags": {**row.tags, **wanted.tags},
        "extra": {**row.extra, **wanted.metadata},
        "created_by": row.created_by,
    }


def _ends_at(session: Session, checked: Imported) -> float | None:
    """Return when an imported token ends: one that is still to be minted has ended, so the first hand-out mints it."""
    return now(session) if checked.minting is not None else checked.token_expires_at


def _bearer_only(configured: Configured, handout: Handout, at: float) -> Credential:
    """Return what an identity call needs: the token, and neither the client's secret nor the refresh token."""
    return Credential(
        client_id=configured.row.client_id,
        client_secret=None,
        access_token=handout.access_token,
        refresh_token=None,
        urls=configured.endpoints.urls,
        hosts=configured.endpoints.hosts,
        client_auth=configured.endpoints.client_auth,
        variables=configured.variables,
        at=at,
    )


def _entry(action: str, row: Standing, principal: Principal, *, outcome: str = "ok", **detail: Any) -> Entry:  # noqa: ANN401 - JSON values
    return Entry(
        action=action,
        actor=principal.caller_id,
        outcome=outcome,
        connection_id=row.id,
        integration=row.integration,
        subject=row.subject,
        detail=detail,
    )
