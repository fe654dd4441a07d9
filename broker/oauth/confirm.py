"""The confirm that makes a pending connection usable: the user who consented is the user who is logged in.

A confirm is decided by one conditional update on the flow's row, so two confirms, a burn and the sweeper cannot both
win. Where the same account is connected already, its connection takes over the new secret under its refresh lease.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker import policy
from broker.audit import Audit, Entry
from broker.credentials import Claimed, Credentials, require_lease, secret_owner
from broker.database import Database, now
from broker.errors import ConfirmInvalid, Conflict, InvalidRequest, NotFound, SubjectMismatch
from broker.models import Connection, Flow
from broker.policy import Principal, Target
from broker.sessions import same_digest
from broker.vault import SecretNotFound, Vault

REPEAT_SECONDS = 120.0
CLAIM_SECONDS = 60.0
RACES = 5


@dataclass(frozen=True, slots=True)
class Confirm:
    """What a backend says when it confirms a flow."""

    connection_id: str
    code: str
    subject: str
    return_to: str | None

    @property
    def body_digest(self) -> str:
        """A digest by which a repeat of the same body is known."""
        body = json.dumps([self.connection_id, self.code, self.subject, self.return_to])
        return hashlib.sha256(body.encode()).hexdigest()


class _Lost(Exception):
    """The conditional update found the flow confirmed, burnt, or claimed."""


class Confirmations:
    """Confirms, burns and sweeps pending connections. Methods may run at once on every replica."""

    def __init__(self, database: Database, vault: Vault, credentials: Credentials, audit: Audit) -> None:
        """Keep the parts."""
        self._database = database
        self._vault = vault
        self._credentials = credentials
        self._audit = audit

    async def confirm(self, wanted: Confirm, principal: Principal) -> Connection:
        """Return the surviving connection. Checked in order: grant, code, subject.

        Raises NotFound or Forbidden by the caller's grants, ConfirmInvalid (nothing changed), InvalidRequest when a flow
        without a session is confirmed without ``return_to`` (nothing changed), SubjectMismatch (the flow is burnt). The same
        caller repeating the same body within 120 s gets the same connection.
        """
        flow, at = await self._flow_of(wanted.connection_id, principal)
        policy.require(principal, "connect", Target(flow.integration, wanted.subject, flow.tags))
        if _repeats(flow, wanted, principal, at):
            return await self._connection(flow.surviving_id or "")
        pending = await self._database.read(lambda session: session.get(Connection, wanted.connection_id))
        if pending is None or not _code_fits(flow, pending, wanted.code, at):
            raise ConfirmInvalid
        if not _subject_fits(flow, wanted):
            await self.burn(flow, "subject_mismatch")
            raise SubjectMismatch
        try:
            return await self._activate(flow, pending, wanted.subject, principal, wanted.body_digest)
        except _Lost:
            flow, at = await self._flow_of(wanted.connection_id, principal)
            if _repeats(flow, wanted, principal, at):
                return await self._connection(flow.surviving_id or "")
            raise ConfirmInvalid from None

    async def _flow_of(self, connection_id: str, principal: Principal) -> tuple[Flow, float]:
        def work(session: Session) -> tuple[Flow | None, Connection | None, float]:
            flow = session.exec(select(Flow).where(Flow.connection_id == connection_id)).first()
            return flow, session.get(Connection, connection_id), now(session)

        flow, row, at = await self._database.read(work)
        if flow is not None:
            return flow, at
        if row is not None and row.deleted_at is None:
            policy.require(principal, "connect", Target(row.integration, row.subject, row.tags))
            raise ConfirmInvalid
        raise NotFound

    async def _connection(self, connection_id: str) -> Connection:
        row = await self._database.read(lambda session: session.get(Connection, connection_id))
        if row is None or row.deleted_at is not None:
            raise NotFound
        return row

    async def activate_at_once(self, connection_id: str) -> Connection:
        """Activate a session-bound flow without a confirm, where ``config.confirm`` is ``without_session``."""

        def work(session: Session) -> tuple[Flow | None, Connection | None]:
            flow = session.exec(select(Flow).where(Flow.connection_id == connection_id)).first()
            return flow, session.get(Connection, connection_id)

        flow, pending = await self._database.read(work)
        if flow is None or pending is None or flow.session_id is None or flow.subject is None:
            raise NotFound
        try:
            return await self._activate(flow, pending, flow.subject, None, "")
        except _Lost:
            raise ConfirmInvalid from None

    async def _activate(
        self, flow: Flow, pending: Connection, subject: str, principal: Principal | None, body_digest: str
    ) -> Connection:
        settled = {
            "confirmed_by": principal.caller_id if principal is not None else None,
            "confirm_body_digest": body_digest,
        }
        for _ in range(RACES):
            existing = await self._existing(flow, pending, subject)
            try:
                if existing is None:
                    return await self._make_active(flow, pending, subject, principal, settled)
                return await self._merge(flow, pending, existing, principal, settled)
            except IntegrityError:
                continue  # another confirm of the same account was faster: merge into its connection
        raise Conflict("several flows of this account are being confirmed at once; try again")

    async def _existing(self, flow: Flow, pending: Connection, subject: str) -> str | None:
        if flow.reconnects is not None:
            return flow.reconnects
        if pending.account_id is None:
            return None
        query = select(Connection.id).where(
            Connection.integration == pending.integration,
            Connection.subject == subject,
            Connection.account_id == pending.account_id,
            Connection.status != "pending",
            col(Connection.deleted_at).is_(None),
        )
        return await self._database.read(lambda session: session.exec(query).first())

    async def _make_active(
        self, flow: Flow, pending: Connection, subject: str, principal: Principal | None, settled: Mapping[str, Any]
    ) -> Connection:
        """Set the subject and activate, in one transaction."""

        def work(session: Session) -> Connection:
            at = now(session)
            _win(session, flow.id, at, {**settled, "confirmed_at": at, "surviving_id": pending.id})
            row = session.get(Connection, pending.id)
            if row is None or row.status != "pending" or row.deleted_at is not None:
                raise _Lost
            row.status, row.subject, row.pending_until = "active", subject, None
            row.created_by = principal.caller_id if principal is not None else None
            session.flush()
            self._audit.append(session, _entry("connection.confirmed", row, principal))
            return row

        return await self._database.transaction(work)

    async def _merge(
        self, flow: Flow, pending: Connection, existing_id: str, principal: Principal | None, settled: Mapping[str, Any]
    ) -> Connection:
        """Move the pending secret into the existing connection, under its lease; keep its old refresh token if need be."""
        async with self._credentials.holding(existing_id) as claimed:
            if claimed.row.deleted_at is not None:
                raise Conflict("the connection was deleted meanwhile")
            tags = {**claimed.row.tags, **flow.tags}
            if principal is not None:
                row = claimed.row
                before, after = (
                    Target(row.integration, row.subject, row.tags),
                    Target(row.integration, row.subject, tags),
                )
                policy.require_write(principal, "connect", before, after)
            await self._database.transaction(lambda session: _claim(session, flow.id))
            value = await self._merged_value(pending, claimed)
            version = await self._credentials.put(existing_id, value, expected_version=claimed.row.secret_version)
            changes = _moved(pending, claimed.row, version, refreshable="refresh_token" in value)
            survivor = await self._record_merge(flow, pending, claimed, {**changes, "tags": tags}, principal, settled)
        await self._credentials.destroy(pending.id)
        return survivor

    async def _merged_value(self, pending: Connection, claimed: Claimed) -> dict[str, Any]:
        try:
            _, value = await self._vault.get(secret_owner(pending.id), pending.secret_version)
        except SecretNotFound:
            raise _Lost from None
        row = claimed.row
        if "refresh_token" in value or not row.refreshable or row.client_id != pending.client_id:
            return value
        _, old = await self._vault.get(secret_owner(row.id), row.secret_version)
        kept = old.get("refresh_token")
        return {**value, "refresh_token": kept} if kept is not None else value

    async def _record_merge(
        self,
        flow: Flow,
        pending: Connection,
        claimed: Claimed,
        changes: Mapping[str, Any],
        principal: Principal | None,
        settled: Mapping[str, Any],
    ) -> Connection:
        def work(session: Session) -> Connection:
            at = now(session)
            require_lease(session, claimed.lease)
            _win(session, flow.id, at, {**settled, "confirmed_at": at, "surviving_id": claimed.row.id}, claimed=True)
            gone = session.execute(
                sa.delete(Connection).where(
                    col(Connection.id) == pending.id,
                    Connection.status == "pending",
                    col(Connection.deleted_at).is_(None),
                )
            )
            row = session.get(Connection, claimed.row.id)
            if gone.rowcount != 1 or row is None:  # type: ignore[attr-defined]
                raise _Lost
            for name, value in changes.items():
                setattr(row, name, value)
            session.flush()
            self._audit.append(session, _entry("connection.confirmed", row, principal, merged=pending.id))
            return row

        return await self._database.transaction(work)

    async def burn(self, flow: Flow, reason: str) -> None:
        """End a flow for good: its pending connection is gone at once, its secret destroyed, revoked unless shared."""

        def work(session: Session) -> str | None:
            at = now(session)
            _win(session, flow.id, at, {"burnt_at": at})
            row = session.get(Connection, flow.connection_id)
            if row is None or row.status != "pending":
                return None
            row.deleted_at = at
            session.flush()
            self._audit.append(session, _entry("connection.discarded", row, None, reason=reason))
            return row.id

        try:
            discarded = await self._database.transaction(work)
        except _Lost:
            return
        if discarded is not None:
            await self._credentials.dispose(discarded)

    async def sweep(self) -> int:
        """Discard every pending connection whose time is over; return how many. For the worker."""

        def work(session: Session) -> list[Flow]:
            over = select(Flow).join(Connection, col(Connection.id) == col(Flow.connection_id))
            over = over.where(Connection.status == "pending", col(Connection.pending_until) < now(session))
            return list(session.exec(over.where(col(Connection.deleted_at).is_(None)).limit(100)))

        flows = await self._database.read(work)
        for flow in flows:
            await self.burn(flow, "unconfirmed")
        return len(flows)


def _win(session: Session, flow_id: str, at: float, changes: Mapping[str, Any], *, claimed: bool = False) -> None:
    """Decide between two confirms, a burn and the sweeper by one conditional update (``_Lost``)."""
    conditions = [col(Flow.id) == flow_id, col(Flow.confirmed_at).is_(None), col(Flow.burnt_at).is_(None)]
    if not claimed:
        unclaimed = col(Flow.confirm_claimed_at).is_(None) | (col(Flow.confirm_claimed_at) < at - CLAIM_SECONDS)
        conditions.append(unclaimed)
    if session.execute(sa.update(Flow).where(*conditions).values(**changes)).rowcount != 1:  # type: ignore[attr-defined]
        raise _Lost


def _claim(session: Session, flow_id: str) -> None:
    at = now(session)
    _win(session, flow_id, at, {"confirm_claimed_at": at})


def _repeats(flow: Flow, wanted: Confirm, principal: Principal, at: float) -> bool:
    return (
        flow.confirmed_at is not None
        and at - flow.confirmed_at <= REPEAT_SECONDS
        and flow.confirmed_by == principal.caller_id
        and flow.confirm_body_digest == wanted.body_digest
    )


def _code_fits(flow: Flow, pending: Connection, code: str, at: float) -> bool:
    """Whether the code is right and in time, and the flow neither confirmed nor burnt."""
    right = same_digest(code, flow.confirm_digest)
    in_time = flow.confirm_until is not None and at <= flow.confirm_until
    waiting = pending.status == "pending" and pending.deleted_at is None and (pending.pending_until or 0) >= at
    return right and in_time and waiting and flow.confirmed_at is None and flow.burnt_at is None


def _subject_fits(flow: Flow, wanted: Confirm) -> bool:
    """Whether the confirm names the session's subject or, without a session, the exact return_to of the start."""
    if flow.session_id is not None:
        return flow.subject == wanted.subject
    if wanted.return_to is None and flow.return_to is not None:
        raise InvalidRequest("return_to is required: exactly what the flow was started with")
    return flow.return_to == wanted.return_to


def _moved(pending: Connection, row: Connection, version: int, *, refreshable: bool) -> dict[str, Any]:
    """Return what the surviving connection takes over; a freeze stays a freeze."""
    copied = ("scopes", "missing_scopes", "token_expires_at", "pins", "client_id", "account_name", "account_email")
    return {
        **{name: getattr(pending, name) for name in copied},
        "account_id": pending.account_id or row.account_id,
        "refresh_expires_at": pending.refresh_expires_at or row.refresh_expires_at,
        "secret_version": version,
        "credential_type": "oauth2",
        "refreshable": refreshable,
        "status": "frozen" if row.status == "frozen" else "active",
        "status_reason": None,
        "refresh_failures": 0,
        "unknown_outcomes": 0,
        "refresh_not_before_at": None,
    }


def _entry(action: str, row: Connection, principal: Principal | None, **detail: Any) -> Entry:  # noqa: ANN401 - JSON values
    return Entry(
        action=action,
        actor=principal.caller_id if principal is not None else "system",
        connection_id=row.id,
        integration=row.integration,
        subject=row.subject,
        detail=detail,
    )
