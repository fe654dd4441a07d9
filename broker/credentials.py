"""The only reader of a connection's secret: store, hand out fresh (refresh once however many ask), revoke, mark.

A refresh is claim → attempt → act → journal → compare-and-set → release. The lease has an owner and a fencing number; a
late holder's write is refused. The attempt is durable before the request leaves, the provider's raw answer is durable before
anything else happens, so that a crash at any point ends in the newest token, or in an unknown outcome that is known to be one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker.audit import Audit, Entry
from broker.database import Database, now
from broker.egress import Egress, NotSent, OutcomeUnknown
from broker.errors import (
    BrokerError,
    ConfirmationRequired,
    Conflict,
    ConnectionFrozen,
    ConnectionRevoked,
    EgressDenied,
    NotFound,
    OriginChanged,
    ProviderUnavailable,
    ReauthorizationRequired,
    SecretStoreUnavailable,
    UpstreamInvalid,
    UpstreamTimeout,
)
from broker.integrations import Configured, Integrations
from broker.models import Connection, RefreshAttempt, RefreshJournal, RefreshLease
from broker.refresh import (
    IDLE_SHARE,
    USED_WITHIN_SECONDS,
    Ask,
    Held,
    after_failure,
    backoff_seconds,
    decide,
    send_again_at,
)
from broker.telemetry import Metrics
from broker.token_endpoint import (
    TokenAnswer,
    TokenRefusal,
    granted_scopes,
    parse_answer,
    refresh_request,
)
from broker.vault import SecretNotFound, SecretUnreadable, Vault, VaultConflict
from broker.vault.keyring import Sealer
from providers.spec import Credential, Incoming, Refresh, Secret

LEASE_SECONDS = 30.0
WAIT_SECONDS = 40.0
WORKER_MARGIN_SECONDS = 90.0
log = structlog.get_logger()

Revoked = Literal["revoked", "unsupported", "failed", "skipped", "skipped_shared_grant"]


@dataclass(frozen=True, slots=True)
class Handout:
    """A credential on its way to a backend."""

    access_token: Secret
    token_type: str
    expires_at: float | None
    scopes: tuple[str, ...]
    connection_id: str
    stale: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write one connection's secret until it is over or somebody claims it after its end."""

    connection_id: str
    fence: int


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim found under its lease."""

    lease: Lease
    row: Connection
    journal: RefreshJournal | None
    now: float


class LeaseLost(Exception):
    """Somebody else holds the lease now: this writer was too slow, its write is refused."""


def secret_owner(connection_id: str) -> str:
    """Return where a connection's secret lives in the vault."""
    return f"connections/{connection_id}"


def sha256_hex(token: str) -> str:
    """Return the digest by which callers name a token (``not_token_sha256``); never stored as such."""
    return hashlib.sha256(token.encode()).hexdigest()


def oauth_value(answer: TokenAnswer, *, received_at: float, old_refresh_token: str | None = None) -> dict[str, Any]:
    """Return what the vault keeps of a token answer; ``old_refresh_token`` stays when none came."""
    refresh = answer.refresh_token.reveal() if answer.refresh_token is not None else old_refresh_token
    lifetime = None if answer.expires_at is None else answer.expires_at - received_at
    value: dict[str, Any] = {"type": "oauth2", "access_token": answer.access_token.reveal(), "token_type": "Bearer"}
    value.update({"lifetime_seconds": lifetime} if lifetime is not None else {})
    value.update({"refresh_token": refresh} if refresh is not None else {})
    return value


def require_usable(row: Connection) -> None:
    """Raise what stands against using the connection, by its status."""
    refusals: dict[str, type[BrokerError]] = {
        "pending": ConfirmationRequired,
        "reauthorization_required": ReauthorizationRequired,
        "frozen": ConnectionFrozen,
        "revoked": ConnectionRevoked,
    }
    if row.deleted_at is not None:
        raise NotFound
    if row.status in refusals:
        raise refusals[row.status]
    if row.status != "active":
        raise Conflict("the connection is in error; see status_reason")


class Credentials:
    """Secrets of connections. Every method may run at once, in many tasks, processes and replicas."""

    def __init__(
        self,
        database: Database,
        vault: Vault,
        sealer: Sealer,
        egress: Egress,
        integrations: Integrations,
        audit: Audit,
        metrics: Metrics,
    ) -> None:
        """Keep the parts. ``owner`` names this process in leases."""
        self._database = database
        self._vault = vault
        self._sealer = sealer
        self._egress = egress
        self._integrations = integrations
        self._audit = audit
        self._metrics = metrics
        self._owner = secrets.token_hex(8)
        self._running: dict[str, asyncio.Task[None]] = {}

    # Handing out

    async def fresh(self, row: Connection, configured: Configured, ask: Ask, at: float) -> Handout:
        """Return a token that fits ``ask``, refreshing at most once; concurrent callers share one refresh.

        ``row`` was read at ``at`` (the database's clock) and is checked here for status and pinned origins. Raises those
        refusals, ``decide``'s, and ProviderUnavailable, UpstreamTimeout or UpstreamInvalid when a needed refresh fails.
        """
        require_usable(row)
        require_pinned(row, configured)
        value = await self._open(row)
        held = held_from(row, value)
        choice = decide(held, ask, at)
        if choice != "renew":
            return _handout(row, value, stale=choice == "stale")
        try:
            await self._refresh_once(row.id, row.secret_version)
        except (BrokerError, LeaseLost) as failure:
            error = failure if isinstance(failure, BrokerError) else ProviderUnavailable()
            row, now_at = await self._reread(row.id)
            require_usable(row)
            return _handout(row, await self._open(row), stale=after_failure(held, ask, now_at, error) == "stale")
        row, _ = await self._reread(row.id)
        require_usable(row)
        return _handout(row, await self._open(row), stale=False)

    async def _reread(self, connection_id: str) -> tuple[Connection, float]:
        def work(session: Session) -> tuple[Connection | None, float]:
            return session.get(Connection, connection_id), now(session)

        row, at = await self._database.read(work)
        if row is None:
            raise NotFound
        return row, at

    async def _open(self, row: Connection) -> dict[str, Any]:
        try:
            return (await self._vault.get(secret_owner(row.id), row.secret_version))[1]
        except (SecretNotFound, SecretUnreadable):
            log.critical("credential.unreadable", connection_id=row.id, secret_version=row.secret_version)
            raise SecretStoreUnavailable("the secret of this connection cannot be opened") from None

    # Refreshing

    async def _refresh_once(self, connection_id: str, seen_version: int) -> None:
        """Join the refresh that runs in this process, or start one that does not die with its caller."""
        task = self._running.get(connection_id)
        if task is None:
            task = asyncio.create_task(self._refresh(connection_id, seen_version))
            self._running[connection_id] = task
            task.add_done_callback(lambda done: self._forget(connection_id, done))
        await asyncio.shield(task)

    def _forget(self, connection_id: str, done: asyncio.Task[None]) -> None:
        self._running.pop(connection_id, None)
        if not done.cancelled():
            done.exception()  # retrieved, so that a refresh without a waiting caller is not reported as lost

    async def refresh(self, row: Connection) -> None:
        """Refresh now unless somebody else just did; for the worker. Raises as ``fresh`` does."""
        await self._refresh_once(row.id, row.secret_version)

    async def _refresh(self, connection_id: str, seen_version: int) -> None:
        claimed = await self._claim_or_follow(connection_id, seen_version)
        if claimed is None:
            return
        async with self._released(claimed.lease):
            if claimed.journal is not None:
                await self._settle(claimed, claimed.journal)
            elif claimed.row.secret_version == seen_version:
                await self._send(claimed)

    async def _claim_or_follow(self, connection_id: str, seen_version: int) -> Claimed | None:
        """Return the lease, or None once another holder has written a newer version."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            claimed = await self.claim(connection_id)
            if claimed is not None:
                return claimed
            await asyncio.sleep(random.uniform(0.02, 0.08))  # noqa: S311 - spreading, not secrecy
            row, _ = await self._reread(connection_id)
            if row.secret_version != seen_version or row.status != "active":
                return None
        raise UpstreamTimeout("another process is still refreshing this connection")

    async def claim(self, connection_id: str) -> Claimed | None:
        """Take the lease if nobody holds it; None otherwise (NotFound for no such connection).

        An attempt without a journal is what a crash between sending and journalling leaves: it is counted here as an
        unknown outcome, and when the same token may be sent again is written to the row.
        """
        configured_refresh = await self._refresh_kind(connection_id)

        def work(session: Session) -> Claimed | None:
            at = now(session)
            lease = _take_lease(session, connection_id, self._owner, at)
            if lease is None:
                return None
            row = session.get(Connection, connection_id)
            if row is None:
                raise NotFound
            journal = session.get(RefreshJournal, connection_id)
            attempt = session.get(RefreshAttempt, connection_id)
            if attempt is not None and journal is None:
                session.delete(attempt)
                _count_unknown(row, configured_refresh, at)
            session.flush()
            if row.status == "reauthorization_required" and attempt is not None and journal is None:
                reason = _entry("connection.reauthorization_required", row, reason=row.status_reason)
                self._audit.append(session, reason)
            return Claimed(lease, row, journal, at)

        try:
            return await self._database.transaction(work)
        except IntegrityError:
            return None  # two first claims at once: the other one has it

    async def _refresh_kind(self, connection_id: str) -> Refresh:
        row, _ = await self._reread(connection_id)
        provider = self._integrations.catalog.get(row.provider)
        return provider.oauth2.refresh if provider is not None and provider.oauth2 is not None else Refresh()

    @contextlib.asynccontextmanager
    async def _released(self, lease: Lease) -> AsyncIterator[None]:
        try:
            yield
        finally:
            with contextlib.suppress(BrokerError):
                await self._database.transaction(lambda session: _release(session, lease))

    @contextlib.asynccontextmanager
    async def holding(self, connection_id: str) -> AsyncIterator[Claimed]:
        """Hold a connection's lease for a block that writes its secret otherwise (merge, delete, revoke).

        Waits for a refresh under way; a journal left behind is settled first. Raises UpstreamTimeout, NotFound.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while (claimed := await self.claim(connection_id)) is None:
            if time.monotonic() > deadline:
                raise UpstreamTimeout("another process is still refreshing this connection")
            await asyncio.sleep(random.uniform(0.02, 0.08))  # noqa: S311 - spreading, not secrecy
        async with self._released(claimed.lease):
            if claimed.journal is not None:
                with contextlib.suppress(ProviderUnavailable, UpstreamInvalid, ReauthorizationRequired):
                    await self._settle(claimed, claimed.journal)
                row, at = await self._reread(connection_id)
                claimed = Claimed(claimed.lease, row, None, at)
            yield claimed

    async def _send(self, claimed: Claimed) -> None:
        row = claimed.row
        require_usable(row)
        if row.refresh_not_before_at is not None and row.refresh_not_before_at > claimed.now:
            raise ProviderUnavailable("the last refresh failed; it is tried again soon")
        configured = await self._integrations.configured(row.integration)
        require_pinned(row, configured)
        token = (await self._open(row)).get("refresh_token")
        if token is None:
            raise ReauthorizationRequired
        digest = self._audit.digest(token)
        await self._database.transaction(lambda session: _write_attempt(session, claimed.lease, digest))
        started = time.monotonic()
        try:
            answer = await self._ask_provider(configured, Secret(token))
        except (NotSent, EgressDenied) as error:
            await self._note_failure(claimed, "not_sent", unknown=False, retry_after_seconds=None)
            raise _as_provider_error(error) from None
        except (OutcomeUnknown, UpstreamInvalid) as error:
            await self._note_failure(claimed, "outcome_unknown", unknown=True, retry_after_seconds=None)
            raise _as_provider_error(error) from None
        journal = await self._journal(claimed.lease, digest, answer)
        log.info("refresh.answered", connection_id=row.id, status=answer.status, ms=_ms_since(started))
        await self._settle(claimed, journal)

    async def _ask_provider(self, configured: Configured, token: Secret) -> Incoming:
        """Send the refresh with each live client secret, newest first, until one is not refused."""
        client = await self._integrations.client(configured)
        answer: Incoming | None = None
        for secret in client.secrets or (None,):
            request = refresh_request(
                configured.oauth2,
                token_url=configured.endpoints.urls["token_url"],
                client=client,
                secret=secret,
                refresh_token=token,
            )
            answer = await self._egress.send(request, timeout_seconds=configured.config.timeout_seconds)
            parsed = parse_answer(configured.oauth2, answer, received_at=0.0)
            if not (isinstance(parsed, TokenRefusal) and parsed.outcome == "client_refused"):
                break
        assert answer is not None  # noqa: S101 - the loop runs at least once
        return answer

    async def _journal(self, lease: Lease, digest: str, answer: Incoming) -> RefreshJournal:
        body = {
            "status": answer.status,
            "headers": dict(answer.headers),
            "body": base64.b64encode(answer.body).decode(),
        }
        sealed = self._sealer.seal(
            json.dumps(body).encode(), owner=secret_owner(lease.connection_id), purpose="journal", version=lease.fence
        )

        def work(session: Session) -> RefreshJournal:
            require_lease(session, lease)
            journal = RefreshJournal(
                connection_id=lease.connection_id,
                fence=lease.fence,
                token_digest=digest,
                sealed_answer=sealed,
                received_at=now(session),
            )
            session.merge(journal)
            return journal

        return await self._database.transaction(work)

    async def _settle(self, claimed: Claimed, journal: RefreshJournal) -> None:
        """Act on a journalled answer: store the new token, or record what the refusal means."""
        configured = await self._integrations.configured(claimed.row.integration)
        answer = await self._unseal(journal)
        parsed = parse_answer(configured.oauth2, answer, received_at=journal.received_at)
        self._metrics.refresh_outcome(
            claimed.row.provider, parsed.outcome if isinstance(parsed, TokenRefusal) else "ok"
        )
        if isinstance(parsed, TokenRefusal):
            await self._refused(claimed, parsed)
            return
        await self._write(claimed, configured, parsed, journal)

    async def _unseal(self, journal: RefreshJournal) -> Incoming:
        try:
            opened = await self._sealer.open_fresh(
                self._database,
                journal.sealed_answer,
                owner=secret_owner(journal.connection_id),
                purpose="journal",
                version=journal.fence,
            )
        except SecretUnreadable:
            raise SecretStoreUnavailable("a journalled answer cannot be opened") from None
        body = json.loads(opened)
        return Incoming(body["status"], body["headers"], base64.b64decode(body["body"]))

    async def _write(
        self, claimed: Claimed, configured: Configured, answer: TokenAnswer, journal: RefreshJournal
    ) -> None:
        row = claimed.row
        refresh = configured.oauth2.refresh
        old = (await self._open(row)).get("refresh_token") if refresh.keep_old else None
        value = oauth_value(answer, received_at=journal.received_at, old_refresh_token=old)
        version = await self.put(row.id, value, expected_version=row.secret_version)
        scopes = (
            list(granted_scopes(configured.oauth2, row.scopes, answer)) if answer.scopes is not None else row.scopes
        )
        changes = {
            "secret_version": version,
            "scopes": scopes,
            "refreshable": "refresh_token" in value,
            "token_expires_at": answer.expires_at,
            "refreshed_at": journal.received_at,
            "refresh_failures": 0,
            "refresh_not_before_at": None,
            "unknown_outcomes": 0,
            "status_reason": None,
        }
        if answer.refresh_expires_at is not None:
            changes["refresh_expires_at"] = answer.refresh_expires_at
        await self._record(claimed.lease, changes, _entry("connection.refreshed", row, version=version))

    async def put(self, connection_id: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """Write the next version of a secret under the lease; return it.

        A crash between vault and row leaves a version that no row names; under the lease nobody else writes, so the next
        version is put on top of it.
        """
        try:
            return await self._vault.put(secret_owner(connection_id), value, expected_version=expected_version)
        except VaultConflict as conflict:
            return await self._vault.put(secret_owner(connection_id), value, expected_version=conflict.current)

    async def destroy(self, connection_id: str) -> None:
        """Destroy every version of a connection's secret."""
        await self._vault.destroy(secret_owner(connection_id))

    async def _record(self, lease: Lease, changes: Mapping[str, Any], *entries: Entry) -> None:
        """Finish an attempt in one transaction (LeaseLost when the fence moved on: then nothing is written)."""

        def work(session: Session) -> None:
            require_lease(session, lease)
            for table in (RefreshAttempt, RefreshJournal):
                session.execute(sa.delete(table).where(col(table.connection_id) == lease.connection_id))
            session.execute(sa.update(Connection).where(col(Connection.id) == lease.connection_id).values(**changes))
            if entries:
                self._audit.append(session, *entries)

        await self._database.transaction(work)

    async def _refused(self, claimed: Claimed, refusal: TokenRefusal) -> None:
        row = claimed.row
        if refusal.outcome == "permanent":
            reason = "refresh_outcome_unknown" if row.unknown_outcomes else refusal.error
            await self._give_up(claimed, reason)
            raise ReauthorizationRequired
        await self._note_failure(claimed, refusal.error, unknown=False, retry_after_seconds=refusal.retry_after_seconds)
        if refusal.outcome == "transient":
            raise ProviderUnavailable
        raise UpstreamInvalid("the provider refused the refresh: see status_reason of the connection")

    async def _give_up(self, claimed: Claimed, reason: str) -> None:
        changes = {"status": "reauthorization_required", "status_reason": reason, "refresh_not_before_at": None}
        entry = _entry("connection.reauthorization_required", claimed.row, reason=reason)
        await self._record(claimed.lease, changes, entry)

    async def _note_failure(
        self, claimed: Claimed, reason: str, *, unknown: bool, retry_after_seconds: float | None
    ) -> None:
        row = claimed.row
        failures = row.refresh_failures + 1
        unknown_outcomes = row.unknown_outcomes + (1 if unknown else 0)
        wait = retry_after_seconds or backoff_seconds(failures, random.random())  # noqa: S311 - spreading, not secrecy
        not_before_at: float | None = claimed.now + wait
        if unknown:
            kind = await self._refresh_kind(row.id)
            again = send_again_at(
                kind, unknown_outcomes=unknown_outcomes, expires_at=row.token_expires_at, now=claimed.now
            )
            if again is None:
                await self._give_up(claimed, "refresh_outcome_unknown")
                return
            not_before_at = max(again, claimed.now + wait)
        changes = {
            "refresh_failures": failures,
            "unknown_outcomes": unknown_outcomes,
            "refresh_not_before_at": not_before_at,
            "status_reason": reason,
        }
        log.warning(
            "refresh.failed", connection_id=row.id, reason=reason, failures=failures, wait_seconds=round(wait, 1)
        )
        self._metrics.refresh_outcome(row.provider, reason if reason in {"not_sent", "outcome_unknown"} else "failed")
        await self._record(claimed.lease, changes)

    # Revoking

    async def revoke(self, row: Connection, configured: Configured) -> Revoked:
        """Revoke at the provider what this connection holds, unless another live connection would die with it.

        ``failed`` when the provider cannot be reached or refuses; never raises for that. The caller holds the row
        (deleted or revoked already), so that nothing is handed out meanwhile.
        """
        revocation = configured.provider.oauth2.revocation if configured.provider.oauth2 is not None else None
        if row.credential_type != "oauth2" or revocation is None:
            return "unsupported"
        try:
            require_pinned(row, configured)
            credential = await self._credential(row, configured)
            kills = revocation.kills_with_refresh if credential.refresh_token is not None else revocation.kills
            if kills in {"grant", "project"} and await self._shared(row, project=kills == "project"):
                return "skipped_shared_grant"
            done = await self._egress.converse(revocation.dialogue(credential), origins=set(row.pins.values()))
        except (BrokerError, SecretNotFound):
            return "failed"
        return "revoked" if done else "failed"

    async def _credential(self, row: Connection, configured: Configured) -> Credential:
        value = await self._open(row)
        client = await self._integrations.client(configured)
        refresh = value.get("refresh_token")
        return Credential(
            client_id=client.client_id,
            client_secret=client.secrets[0] if client.secrets else None,
            access_token=Secret(value["access_token"]),
            refresh_token=Secret(refresh) if refresh is not None else None,
            urls=configured.endpoints.urls,
            hosts=configured.endpoints.hosts,
            client_auth=configured.endpoints.client_auth,
        )

    async def _shared(self, row: Connection, *, project: bool) -> bool:
        """Whether another connection of the same account would die with this one's grant."""
        same = [
            Connection.account_id == row.account_id,
            Connection.id != row.id,
            col(Connection.deleted_at).is_(None),
            col(Connection.status) != "revoked",
        ]
        if project:
            same.append(Connection.provider == row.provider)
        else:
            same += [Connection.integration == row.integration, Connection.client_id == row.client_id]
        query = select(Connection.id).where(*same).limit(1)
        return row.account_id is not None and await self._database.read(
            lambda session: session.exec(query).first() is not None
        )

    async def dispose(self, connection_id: str) -> Revoked:
        """Finish the deletion of a row marked ``deleted_at``: revoke, destroy the secret, remove the row.

        May be repeated after a crash at any point. Raises SecretStoreUnavailable, DatabaseUnavailable, UpstreamTimeout:
        then the row stays marked and the worker tries again.
        """
        async with self.holding(connection_id) as claimed:
            row = claimed.row
            result = await self._revoke_deleted(row)
            await self.destroy(connection_id)

            def work(session: Session) -> None:
                for table in (RefreshAttempt, RefreshJournal, RefreshLease):
                    session.execute(sa.delete(table).where(col(table.connection_id) == connection_id))
                session.execute(sa.delete(Connection).where(col(Connection.id) == connection_id))
                self._audit.append(session, _entry("connection.disposed", row, revocation=result))

            await self._database.transaction(work)
        return result

    async def _revoke_deleted(self, row: Connection) -> Revoked:
        if not row.revoke_on_delete:
            return "skipped"
        try:
            return await self.revoke(row, await self._integrations.configured(row.integration))
        except BrokerError:
            return "failed"

    # For the worker

    async def due(self, *, limit: int) -> list[Connection]:
        """Return connections to refresh now: used ones whose token ends soon, idle ones whose refresh token would die."""

        def work(session: Session) -> list[Connection]:
            at = now(session)
            waits = col(Connection.refresh_not_before_at)
            query = select(Connection).where(
                Connection.status == "active",
                col(Connection.refreshable).is_(True),
                col(Connection.deleted_at).is_(None),
                waits.is_(None) | (waits < at),
                self._ends_soon(at) | self._dies_of_idleness(at),
            )
            return list(session.exec(query.order_by(col(Connection.token_expires_at)).limit(limit)))

        return await self._database.read(work)

    @staticmethod
    def _ends_soon(at: float) -> sa.ColumnElement[bool]:
        used = col(Connection.last_used_at) > at - USED_WITHIN_SECONDS
        return used & (col(Connection.token_expires_at) < at + WORKER_MARGIN_SECONDS)

    def _dies_of_idleness(self, at: float) -> sa.ColumnElement[bool]:
        since = sa.func.coalesce(Connection.refreshed_at, Connection.created_at)
        ends: list[sa.ColumnElement[bool]] = []
        for name, provider in self._integrations.catalog.items():
            if provider.oauth2 is None:
                continue
            refresh, mine = provider.oauth2.refresh, col(Connection.provider) == name
            if refresh.idle_seconds is not None:
                ends.append(mine & (since < at - IDLE_SHARE * refresh.idle_seconds))
            if refresh.sliding:
                dies_at = col(Connection.refresh_expires_at)
                ends.append(mine & (since + IDLE_SHARE * (dies_at - since) < at))
        return sa.or_(sa.false(), *ends)

    async def left_behind(self, *, older_than_seconds: float) -> list[str]:
        """Return connections whose deletion a crash cut off."""

        def work(session: Session) -> list[str]:
            query = select(Connection.id).where(col(Connection.deleted_at) < now(session) - older_than_seconds)
            return list(session.exec(query.limit(100)))

        return await self._database.read(work)

    async def sweep_unreferenced(self, *, older_than_seconds: float = 86_400.0) -> int:
        """Destroy secrets that no row names, left by a crash between vault and row; return how many."""
        at = await self._database.read(now)
        old = [
            owner for owner, made_at in await self._vault.owners("connections/") if made_at < at - older_than_seconds
        ]
        swept = 0
        for owner in old:
            connection_id = owner.removeprefix("connections/")
            if await self._database.read(lambda session, key=connection_id: session.get(Connection, key)) is None:
                await self._vault.destroy(owner)
                swept += 1
        return swept

    async def unsettled(self) -> list[str]:
        """Return connections whose refresh was cut off by a crash: a journal or an attempt without a live lease."""

        def work(session: Session) -> list[str]:
            at = now(session)
            found: set[str] = set()
            for table in (RefreshJournal, RefreshAttempt):
                query = select(table.connection_id).join(
                    RefreshLease, col(RefreshLease.connection_id) == col(table.connection_id)
                )
                found.update(
                    session.exec(query.where((col(RefreshLease.expires_at) < at) | col(RefreshLease.owner).is_(None)))
                )
            return sorted(found)

        return await self._database.read(work)

    async def settle(self, connection_id: str) -> None:
        """Finish what a crash left of one connection: replay its journal, or count its unknown outcome."""
        with contextlib.suppress(NotFound, UpstreamTimeout):
            async with self.holding(connection_id):
                pass

    async def aclose(self) -> None:
        """Finish the refreshes under way (each ends within its time limit) and give their leases back."""
        await asyncio.gather(*self._running.values(), return_exceptions=True)


def require_pinned(row: Connection, configured: Configured) -> None:
    """Raise OriginChanged when a place that the credential goes to is not the one it was made with.

    A host that the provider's file gained later changes nothing: it is not pinned, so nothing is sent there.
    """
    current = configured.endpoints.origins
    moved = any(name in current and current[name] != origin for name, origin in row.pins.items())
    if moved or ("token" in current and "token" not in row.pins):
        raise OriginChanged


def held_from(row: Connection, value: Mapping[str, Any]) -> Held:
    """Return what ``decide`` needs of a row and its opened secret (pure)."""
    token = bearer_of(value)
    return Held(
        token_sha256=sha256_hex(token),
        expires_at=row.token_expires_at,
        lifetime_seconds=value.get("lifetime_seconds"),
        refreshable=row.refreshable,
        refreshed_at=row.refreshed_at,
        not_before_at=row.refresh_not_before_at,
        jitter=int(sha256_hex(row.id)[:6], 16) / 0x1000000,
    )


def bearer_of(value: Mapping[str, Any]) -> str:
    """Return what is put behind the scheme of an Authorization header: token, key, or the encoded Basic pair."""
    if value["type"] == "basic":
        return base64.b64encode(f"{value['username']}:{value['password']}".encode()).decode()
    return str(value["api_key"] if value["type"] == "api_key" else value["access_token"])


def _handout(row: Connection, value: Mapping[str, Any], *, stale: bool) -> Handout:
    kind = {"basic": "Basic", "api_key": "Bearer"}.get(value["type"], "Bearer")
    return Handout(Secret(bearer_of(value)), kind, row.token_expires_at, tuple(row.scopes), row.id, stale)


def _take_lease(session: Session, connection_id: str, owner: str, at: float) -> Lease | None:
    free = (col(RefreshLease.owner).is_(None)) | (col(RefreshLease.expires_at) < at)
    claim = (
        sa.update(RefreshLease)
        .where(col(RefreshLease.connection_id) == connection_id, free)
        .values(owner=owner, fence=RefreshLease.fence + 1, expires_at=at + LEASE_SECONDS)
        .returning(col(RefreshLease.fence))
    )
    fence = session.execute(claim).scalar_one_or_none()
    if fence is not None:
        return Lease(connection_id, fence)
    if session.get(RefreshLease, connection_id) is not None:
        return None
    session.add(RefreshLease(connection_id=connection_id, owner=owner, fence=1, expires_at=at + LEASE_SECONDS))
    session.flush()
    return Lease(connection_id, 1)


def require_lease(session: Session, lease: Lease) -> None:
    """Refuse a late holder (LeaseLost). Locks the lease row, so that nobody claims it before this commit."""
    touch = (
        sa.update(RefreshLease)
        .where(col(RefreshLease.connection_id) == lease.connection_id, col(RefreshLease.fence) == lease.fence)
        .values(fence=lease.fence)
    )
    if session.execute(touch).rowcount != 1:  # type: ignore[attr-defined]
        raise LeaseLost


def _release(session: Session, lease: Lease) -> None:
    session.execute(
        sa.update(RefreshLease)
        .where(col(RefreshLease.connection_id) == lease.connection_id, col(RefreshLease.fence) == lease.fence)
        .values(owner=None, expires_at=0.0)
    )


def _write_attempt(session: Session, lease: Lease, digest: str) -> None:
    require_lease(session, lease)
    session.merge(
        RefreshAttempt(connection_id=lease.connection_id, fence=lease.fence, token_digest=digest, sent_at=now(session))
    )


def _count_unknown(row: Connection, refresh: Refresh, at: float) -> None:
    row.unknown_outcomes += 1
    again = send_again_at(refresh, unknown_outcomes=row.unknown_outcomes, expires_at=row.token_expires_at, now=at)
    if again is None:
        row.status, row.status_reason = "reauthorization_required", "refresh_outcome_unknown"
    else:
        row.refresh_not_before_at = again


def _entry(action: str, row: Connection, **detail: Any) -> Entry:  # noqa: ANN401 - JSON values
    return Entry(
        action=action,
        actor="system",
        connection_id=row.id,
        integration=row.integration,
        subject=row.subject,
        detail=detail,
    )


def _as_provider_error(error: BrokerError) -> BrokerError:
    if isinstance(error, OutcomeUnknown) and error.timed_out:
        return UpstreamTimeout()
    return error


def _ms_since(started: float) -> int:
    return round((time.monotonic() - started) * 1000)
