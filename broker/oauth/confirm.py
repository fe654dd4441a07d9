"""The confirm that makes a pending connection usable: the user who consented is the user who is logged in.

A confirm is decided by one conditional update on the flow's row, so two confirms, a burn and the sweeper cannot both
win. Where the same account is connected already, its connection takes over the new secret under its refresh lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker import policy
from broker.announcing import Change, announce_connection
from broker.audit import Audit, Entry
from broker.credentials import Claimed, Credentials, LeaseLost, require_lease, secret_owner
from broker.credentials.freezes import active_freezes, hold, require_not_ending
from broker.credentials.usable import renewal_home
from broker.database import Database, now
from broker.errors import (
    BrokerError,
    ConfirmInvalid,
    Conflict,
    FlowError,
    Forbidden,
    InvalidRequest,
    NotFound,
    SubjectMismatch,
    UpstreamTimeout,
)
from broker.models import Connection, Flow
from broker.oauth.plan import planned_endpoints
from broker.policy import Principal, Target
from broker.sessions import Standing, live_session, same_digest
from broker.vault import SecretNotFound, Vault

REPEAT_SECONDS = 120.0
CLAIM_SECONDS = 60.0
RACES = 5
SWEPT_AT_ONCE = 20
log = structlog.get_logger()


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


@dataclass(frozen=True, slots=True)
class Newcomer:
    """What is known of a credential that may be merged into a connection: whose, by which client, and sent where."""

    account_id: str | None
    client_id: str
    pins: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge has put into the vault for a connection: the opened secret, its version, and whose it must be."""

    value: Mapping[str, Any] = field(repr=False)
    version: int
    subject: str


class OtherType(Conflict):
    """The account's connection has a credential of another type: to try again does not help."""

    def __init__(self) -> None:
        """Say what does."""
        super().__init__("this account has a credential of another type, which would be lost; delete that first")


class _Lost(Exception):
    """The conditional update found the flow confirmed, burnt, or claimed."""


class Confirmations:
    """Confirms, burns and sweeps pending connections. Methods may run at once on every replica."""

    def __init__(
        self, database: Database, vault: Vault, credentials: Credentials, audit: Audit, standing: Standing
    ) -> None:
        """Keep the parts; ``standing`` says what a caller may do now."""
        self._standing = standing
        self._database = database
        self._vault = vault
        self._credentials = credentials
        self._audit = audit

    async def confirm(self, wanted: Confirm, principal: Principal, *, without_return_to: bool = False) -> Connection:
        """Return the surviving connection. Checked in order: grant, code, subject.

        ``without_return_to``: a person at the command line vouches for who consented, where a flow was started with neither
        a session nor a ``return_to`` and so nothing can tell whose browser it was. Never for what came over HTTP.

        Raises NotFound or Forbidden by the caller's grants, ConfirmInvalid (nothing changed), InvalidRequest when a flow
        without a session is confirmed without ``return_to`` (nothing changed), SubjectMismatch (the flow is burnt), Conflict
        or UpstreamTimeout when the connection to merge into cannot take the secret now (nothing changed). The same caller
        repeating the same body within 120 s gets the same connection.
        """
        flow, pending, at = await self._flow_of(wanted, principal)
        if _repeats(flow, wanted, principal, at):
            return await self._connection(flow.surviving_id or "")
        if pending is None or not _code_fits(flow, pending, wanted.code, at):
            raise ConfirmInvalid
        if not _subject_fits(flow, wanted, without_return_to=without_return_to):
            await self.burn(flow, "subject_mismatch", principal)
            raise SubjectMismatch
        try:
            settled = _settled(principal, wanted.body_digest)
            return await self._activate(flow, pending, wanted.subject, principal, settled, change="confirmed")
        except _Lost:
            flow, _, at = await self._flow_of(wanted, principal)
            if _repeats(flow, wanted, principal, at):
                return await self._connection(flow.surviving_id or "")
            raise ConfirmInvalid from None

    async def _flow_of(self, wanted: Confirm, principal: Principal) -> tuple[Flow, Connection | None, float]:
        """Return the flow, its connection as it is now, and the time, if the caller may confirm it (NotFound, Forbidden).

        The connection is read before the flow: whoever sees a connection that is no longer pending sees a flow that was
        confirmed, so a repeat is known as one also while the first confirm commits.
        """

        def work(session: Session) -> tuple[Connection | None, Flow | None, float]:
            row = session.get(Connection, wanted.connection_id)
            flow = session.exec(select(Flow).where(Flow.connection_id == wanted.connection_id)).first()
            return row, flow, now(session)

        row, flow, at = await self._database.read(work)
        known = row or flow
        if known is None or (flow is None and row is not None and row.deleted_at is not None):
            raise NotFound
        policy.require(principal, "connect", Target(known.integration, wanted.subject, known.tags))
        if flow is None:
            raise ConfirmInvalid
        return flow, row, at

    async def _connection(self, connection_id: str) -> Connection:
        row = await self._database.read(lambda session: session.get(Connection, connection_id))
        if row is None or row.deleted_at is not None:
            raise NotFound
        return row

    async def activate_at_once(self, flow: Flow, pending: Connection) -> Connection | None:
        """Activate a session-bound flow without a confirm, where ``config.confirm`` is ``without_session``.

        None, and the connection stays pending, where it would have to merge into a connection that the session's tags do
        not describe, or that cannot take it now: nobody's grants are at hand here to judge such a write, so a confirm has to.
        """
        session_id = flow.session_id
        if session_id is None or flow.subject is None:
            return None
        live = await self._database.read(lambda session: live_session(session, session_id, self._standing))
        if live is None or flow.integration not in (live[0].integrations or ()):
            return None  # who minted the session may no longer connect this
        try:
            return await self._activate(flow, pending, flow.subject, None, _settled(None, ""), change="created")
        except (Conflict, Forbidden, UpstreamTimeout, _Lost):
            return None

    async def activate_device(self, flow: Flow, pending: Connection, principal: Principal) -> Connection:
        """Activate what came of a device flow, in the name of the caller who started it, and return the survivor.

        Raises Conflict, Forbidden or UpstreamTimeout when it cannot be merged now; FlowError when it is gone.
        """
        try:
            settled = _settled(principal, "")
            return await self._activate(flow, pending, flow.subject or "", principal, settled, change="created")
        except _Lost:
            raise FlowError("state_invalid") from None

    async def _activate(
        self,
        flow: Flow,
        pending: Connection,
        subject: str,
        principal: Principal | None,
        settled: Mapping[str, Any],
        *,
        change: Change,
    ) -> Connection:
        """Activate or merge. ``change``: what a connection that is new then has come to, for events."""
        for _ in range(RACES):
            existing = await self._existing(flow, pending, subject)
            if existing is not None:
                return await self._merge(flow, pending, existing, subject, principal, settled)
            with contextlib.suppress(IntegrityError):  # another confirm of this account was faster: merge into its own
                return await self._make_active(flow, pending, subject, principal, settled, change=change)
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
        self,
        flow: Flow,
        pending: Connection,
        subject: str,
        principal: Principal | None,
        settled: Mapping[str, Any],
        *,
        change: Change,
    ) -> Connection:
        """Set the subject and activate, in one transaction."""

        def work(session: Session) -> Connection:
            freezes, at = active_freezes(session), now(session)
            _win(session, flow.id, at, {**settled, "confirmed_at": at, "surviving_id": pending.id})
            row = session.get(Connection, pending.id)
            if row is None or row.status != "pending" or row.deleted_at is not None:
                raise _Lost
            row.status, row.subject, row.pending_until = "active", subject, None
            row.created_by = principal.caller_id if principal is not None else None
            announce_connection(session, change, row)
            frozen = hold(session, row, freezes)
            self._audit.append(session, _entry("connection.confirmed", row, principal), *frozen)
            return row

        return await self._database.transaction(work)

    async def _merge(
        self,
        flow: Flow,
        pending: Connection,
        existing_id: str,
        subject: str,
        principal: Principal | None,
        settled: Mapping[str, Any],
    ) -> Connection:
        """Move the pending secret into the existing connection, under its lease; keep its old refresh token if need be.

        What can be refused is refused before the vault is written: a version that no row names pushes out older ones.
        """
        try:
            async with self._credentials.holding(existing_id) as claimed:
                _require_fit(pending, claimed.row, subject)
                _merged_tags(flow, pending, claimed.row, principal)
                await self._database.read(lambda session: require_not_ending(session, existing_id))
                await self._require_only_one(pending, claimed.row)
                await self._database.transaction(lambda session: _claim(session, flow.id))
                async with self._claim_given_back(flow.id):
                    value = await self._merged_value(flow, pending, claimed)
                    version = await self._credentials.put(
                        existing_id, value, expected_version=claimed.row.secret_version
                    )
                    merged = Merged(value, version, subject)
                    survivor = await self._record_merge(flow, pending, claimed, merged, principal, settled)
        except (NotFound, LeaseLost, IntegrityError):
            raise Conflict("the connection of this account changed meanwhile; try again") from None
        with contextlib.suppress(BrokerError):  # it is merged; what stays of the pending secret is swept
            await self._credentials.destroy(pending.id)
        return survivor

    @contextlib.asynccontextmanager
    async def _claim_given_back(self, flow_id: str) -> AsyncIterator[None]:
        """Give a claim back when the block fails, so that the caller may try again at once."""
        given_back = sa.update(Flow).where(col(Flow.id) == flow_id, col(Flow.confirmed_at).is_(None))
        try:
            yield
        except BaseException:
            with contextlib.suppress(BrokerError):
                await self._database.transaction(
                    lambda session: session.execute(given_back.values(confirm_claimed_at=None))
                )
            raise

    async def _require_only_one(self, pending: Connection, row: Connection) -> None:
        """Raise Conflict when a connection without a known account turns out to be one that is connected already."""
        if row.account_id == pending.account_id:
            return
        other = select(Connection.id).where(
            Connection.integration == row.integration,
            Connection.subject == row.subject,
            Connection.account_id == pending.account_id,
            Connection.id != row.id,
            Connection.status != "pending",
            col(Connection.deleted_at).is_(None),
        )
        if await self._database.read(lambda session: session.exec(other).first()) is not None:
            raise Conflict("this account is connected already")

    async def _merged_value(self, flow: Flow, pending: Connection, claimed: Claimed) -> dict[str, Any]:
        try:
            _, value = await self._vault.get(secret_owner(pending.id), pending.secret_version)
        except SecretNotFound:
            raise _Lost from None
        row = claimed.row
        coming = Newcomer(pending.account_id, pending.client_id, _places(flow, pending, row)[1])
        if "refresh_token" in value or not keeps_refresh_token(row, coming):
            return value
        _, old = await self._vault.get(secret_owner(row.id), row.secret_version)
        kept = old.get("refresh_token")
        return {**value, "refresh_token": kept} if kept is not None else value

    async def _record_merge(
        self,
        flow: Flow,
        pending: Connection,
        claimed: Claimed,
        merged: Merged,
        principal: Principal | None,
        settled: Mapping[str, Any],
    ) -> Connection:
        """Write the survivor's row. The lease keeps other secrets out, not a freeze, a revocation, new tags or a DELETE.

        All of them are judged anew here.
        """

        def work(session: Session) -> Connection:
            freezes, at = active_freezes(session), now(session)
            require_not_ending(session, claimed.row.id)  # once more: no revocation begins while this lasts
            require_lease(session, claimed.lease)
            _win(session, flow.id, at, {**settled, "confirmed_at": at, "surviving_id": claimed.row.id}, claimed=True)
            gone = session.execute(
                sa.delete(Connection).where(
                    col(Connection.id) == pending.id,
                    col(Connection.status) == "pending",
                    col(Connection.deleted_at).is_(None),
                )
            )
            row = session.get(Connection, claimed.row.id, with_for_update=True)
            if gone.rowcount != 1 or row is None:  # type: ignore[attr-defined]
                raise _Lost
            _require_fit(pending, row, merged.subject)
            if row.status not in {claimed.row.status, "frozen"}:
                raise Conflict("the connection of this account changed meanwhile; try again")
            tags = _merged_tags(flow, pending, row, principal)
            changes = {**_moved(flow, pending, row, merged.value), "secret_version": merged.version, "tags": tags}
            for name, value in changes.items():
                setattr(row, name, value)
            announce_connection(session, "confirmed", row)
            frozen = hold(session, row, freezes)
            self._audit.append(session, _entry("connection.confirmed", row, principal, merged=pending.id), *frozen)
            return row

        return await self._database.transaction(work)

    async def burn(self, flow: Flow, reason: str, principal: Principal) -> None:
        """End a flow for good: its pending connection is gone at once, its secret destroyed, revoked unless shared.

        ``principal`` is who tried, for the audit.
        """
        discarded = await self._discard(flow, reason, principal)
        if discarded is not None:
            await self._dispose(discarded)

    async def _discard(self, flow: Flow, reason: str, principal: Principal | None = None) -> str | None:
        """Burn a flow unless a confirm was faster; return the id of the connection to dispose of."""

        def work(session: Session) -> str | None:
            at = now(session)
            _win(session, flow.id, at, {"burnt_at": at})
            row = session.get(Connection, flow.connection_id)
            if row is None or row.status != "pending" or row.deleted_at is not None:
                return None
            row.deleted_at = at
            session.flush()
            self._audit.append(session, _entry("connection.discarded", row, principal, reason=reason))
            return row.id

        try:
            return await self._database.transaction(work)
        except _Lost:
            return None

    async def _dispose(self, connection_id: str) -> None:
        try:
            await self._credentials.dispose(connection_id)
        except BrokerError as error:  # gone for everybody already; the worker finishes it later
            log.warning("connection.dispose_failed", connection_id=connection_id, error=error.code)

    async def sweep(self) -> int:
        """Discard every pending connection whose time is over; return how many were found. For the worker.

        All of them are unusable before the first provider is asked to revoke, so a slow one holds up none of the others.
        """

        def work(session: Session) -> list[Flow]:
            over = select(Flow).join(Connection, col(Connection.id) == col(Flow.connection_id))
            over = over.where(Connection.status == "pending", col(Connection.pending_until) < now(session))
            over = over.where(col(Connection.deleted_at).is_(None)).order_by(col(Connection.pending_until))
            return list(session.exec(over.limit(SWEPT_AT_ONCE)))

        flows = await self._database.read(work)
        discarded = [await self._discard(flow, "unconfirmed") for flow in flows]
        await asyncio.gather(*(self._dispose(found) for found in discarded if found is not None))
        return len(flows)


def _settled(principal: Principal | None, body_digest: str) -> dict[str, Any]:
    """Return by what a repeat of this confirm is known."""
    return {
        "confirmed_by": principal.caller_id if principal is not None else None,
        "confirm_body_digest": body_digest,
    }


def keeps_refresh_token(row: Connection, coming: Newcomer) -> bool:
    """Whether a new credential without a refresh token takes over that of an existing connection (pure).

    Only of the very same account and client, while the old one is not known to be dead, and only if it would be sent where
    it was sent before: a credential never follows a changed setting.
    """
    same = _same_grant(row, coming.account_id, coming.client_id)
    homes = all(row.pins.get(name) == coming.pins.get(name) for name in ("token", "revoke"))
    homes = homes and renewal_home(row.pins) == renewal_home(coming.pins)
    unmoved = all(coming.pins[name] == origin for name, origin in row.pins.items() if name in coming.pins)
    return row.refreshable and row.status in {"active", "frozen"} and same and homes and unmoved


def _same_grant(row: Connection, account_id: str | None, client_id: str) -> bool:
    return row.account_id is not None and row.account_id == account_id and row.client_id == client_id


def _places(flow: Flow, pending: Connection, row: Connection) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the survivor's variables and pins: the newcomer's, and what only the old one knew of the same account (pure).

    What the flow was planned with stands, a default too: by it the new credential was made. Hosts that need what was known
    before are pinned as the plan has them.
    """
    settled = flow.plan.get("variables", {}).keys() | pending.variables.keys()
    known = {name: value for name, value in row.variables.items() if name not in settled}
    if not known or not _same_grant(row, pending.account_id, pending.client_id):
        return dict(pending.variables), dict(pending.pins)
    variables = {**known, **pending.variables}
    return variables, dict(planned_endpoints(flow, variables).origins)


def _require_fit(pending: Connection, row: Connection, subject: str) -> None:
    """Raise Conflict unless the existing connection is one that this flow may move its secret into."""
    if row.deleted_at is not None or row.status == "pending":
        raise Conflict("the connection was deleted meanwhile")
    if (row.integration, row.subject) != (pending.integration, subject):
        raise Conflict("the connection is another user's")
    if row.account_id not in {None, pending.account_id}:
        raise Conflict("the connection is another account's")
    if row.credential_type != pending.credential_type:
        raise OtherType


def _merged_tags(flow: Flow, pending: Connection, row: Connection, principal: Principal | None) -> dict[str, str]:
    """Return the survivor's tags if the caller may write them; a reconnect leaves them as they are.

    Raises NotFound or Forbidden by the caller's grants; Conflict without a caller when a tag would change.
    """
    tags = dict(row.tags) if flow.reconnects is not None else {**row.tags, **pending.tags}
    if principal is not None:
        before = Target(row.integration, row.subject, row.tags)
        try:
            policy.require_write(principal, "connect", before, Target(row.integration, row.subject, tags))
        except NotFound:
            raise Forbidden("the account is connected already, outside of what this caller may reach") from None
    elif not pending.tags.items() <= row.tags.items():
        raise Conflict("the connection has other tags")
    return tags


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


def _subject_fits(flow: Flow, wanted: Confirm, *, without_return_to: bool) -> bool:
    """Whether the confirm names the session's subject or, without a session, the exact return_to of the start."""
    if flow.session_id is not None:
        return flow.subject == wanted.subject
    if wanted.return_to is None and flow.return_to is not None:
        raise InvalidRequest("return_to is required: exactly what the flow was started with")
    if wanted.return_to is None and not without_return_to:
        raise InvalidRequest(
            "a flow without a session and a return_to is confirmed on the command line; start with one of them"
        )
    return flow.return_to == wanted.return_to


def _moved(flow: Flow, pending: Connection, row: Connection, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the surviving connection takes over; a freeze stays a freeze. ``value`` is its secret from now on."""
    copied = (
        "scopes",
        "missing_scopes",
        "token_expires_at",
        "client_id",
        "flow_id",
        "account_name",
        "account_email",
    )
    own = pending.refreshable or "refresh_token" not in value
    variables, pins = _places(flow, pending, row)
    return {
        **{name: getattr(pending, name) for name in copied},
        "variables": variables,
        "pins": pins,
        "account_id": pending.account_id or row.account_id,
        "granted_at": pending.created_at,
        "refresh_expires_at": pending.refresh_expires_at if own else row.refresh_expires_at,
        "refreshable": "refresh_token" in value,
        "status": "frozen" if row.status == "frozen" else "active",
        "status_reason": row.status_reason if row.status == "frozen" else None,
        "refresh_failures": 0,
        "unknown_outcomes": 0,
        "refusals": 0,
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
