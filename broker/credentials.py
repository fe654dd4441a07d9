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
import hmac
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    DatabaseUnavailable,
    EgressDenied,
    InternalError,
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
    Failure,
    Held,
    Tally,
    Verdict,
    after_attempt,
    after_failure,
    decide,
    failure_of,
    wait_for,
)
from broker.telemetry import Metrics
from broker.token_endpoint import TokenAnswer, TokenRefusal, granted_scopes, parse_answer, refresh_request
from broker.vault import SecretNotFound, SecretUnreadable, Vault, VaultConflict
from broker.vault.keyring import Sealer
from providers.spec import Credential, Incoming, OAuth2, Outgoing, Secret

LEASE_SECONDS = 30.0
WAIT_SECONDS = 40.0
LIVE_WAIT_SECONDS = 5.0
JOURNAL_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 0.2
ROUNDS = 3
WORKER_MARGIN_SECONDS = 240.0  # more than the soft margin, so that callers seldom wait
WORKER_SHARE = 0.2
SWEEP_BATCH = 500
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


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A refresh that is ready to be sent: one request for each live client secret, newest first."""

    requests: tuple[Outgoing, ...] = field(repr=False)
    oauth2: OAuth2
    token_digest: str
    token_sha256: str
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class _Answered:
    """What the provider answered, and when by the monotonic clock."""

    answer: Incoming
    at_monotonic: float


class LeaseLost(Conflict):
    """Somebody else holds the lease now: this writer was too slow, its write is refused."""

    def __init__(self) -> None:
        """Say it in a caller's words."""
        super().__init__("the connection was changed at the same moment; try again")


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
        error = refusals[row.status]()
        error.members = {"status_reason": row.status_reason} if row.status_reason is not None else {}
        raise error
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
        *,
        lease_seconds: float = LEASE_SECONDS,
        wait_seconds: float = WAIT_SECONDS,
        live_wait_seconds: float = LIVE_WAIT_SECONDS,
        journal_seconds: float = JOURNAL_SECONDS,
    ) -> None:
        """Keep the parts. ``lease_seconds``: how long a lease outlives what its holder is known to do.

        ``wait_seconds``: how long a caller waits for a refresh, its own or another's; ``live_wait_seconds``: and how long
        while there is a live token to serve. ``journal_seconds``: how long an answer is kept in memory while the database
        does not take it.
        """
        self._database = database
        self._vault = vault
        self._sealer = sealer
        self._egress = egress
        self._integrations = integrations
        self._audit = audit
        self._metrics = metrics
        self._lease_seconds = lease_seconds
        self._wait_seconds = wait_seconds
        self._live_wait_seconds = live_wait_seconds
        self._journal_seconds = journal_seconds
        self._owner = secrets.token_hex(8)  # names this process in leases
        self._running: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._closing = False

    # Handing out

    async def fresh(self, row: Connection, configured: Configured, ask: Ask, at: float) -> Handout:
        """Return a token that fits ``ask``, refreshing at most once; concurrent callers share one refresh.

        ``row`` was read at ``at`` (the database's clock) and is checked here for status and pinned origins. Raises those
        refusals, ``decide``'s, and ProviderUnavailable, UpstreamTimeout or UpstreamInvalid when a needed refresh fails.
        """
        require_usable(row)
        require_pinned(row, configured)
        row, value = await self._opened(row)
        held = held_from(row, value)
        choice = decide(held, ask, at)
        if choice != "renew":
            return _handout(row, value, stale=choice == "stale")
        servable = held.live(at) and not ask.force and not held.refused(ask)
        patience_seconds = self._live_wait_seconds if servable else self._wait_seconds
        failure: BrokerError = ProviderUnavailable("the refresh brought no token; try again")
        for _ in range(ROUNDS):  # a version can move without a new token, after a crash: then once more
            refreshed = True
            try:
                await self._refresh_once(row.id, row.secret_version, patience_seconds)
            except BrokerError as error:
                failure, refreshed = error, False
            row, at = await self._reread(row.id)
            require_usable(row)
            row, value = await self._opened(row)
            if row.refreshed_at != held.refreshed_at or held_from(row, value).token_sha256 != held.token_sha256:
                return _handout(row, value, stale=False)
            if not refreshed:
                break
        return _handout(row, value, stale=after_failure(held, ask, at, failure) == "stale")

    async def _opened(self, row: Connection) -> tuple[Connection, dict[str, Any]]:
        """Return the row and its secret; both anew if the secret moved on since the row was read."""
        try:
            return row, (await self._vault.get(secret_owner(row.id), row.secret_version))[1]
        except (SecretNotFound, SecretUnreadable):
            current, _ = await self._reread(row.id)
        require_usable(current)
        return current, await self._open(current)

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

    async def refresh(self, row: Connection) -> None:
        """Refresh now unless somebody else just did; for the worker. Raises as ``fresh`` does."""
        await self._refresh_once(row.id, row.secret_version, self._wait_seconds)

    async def _refresh_once(self, connection_id: str, seen_version: int, patience_seconds: float) -> None:
        """Join the refresh that runs in this process, or start one that does not die with its caller."""
        key = (connection_id, seen_version)
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._refresh(connection_id, seen_version))
            self._running[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        await asyncio.wait({task}, timeout=patience_seconds)
        if not task.done():
            raise UpstreamTimeout("the refresh goes on; ask again")
        if task.cancelled():
            raise UpstreamTimeout("the refresh was cut off; ask again")
        task.result()

    def _forget(self, key: tuple[str, int], done: asyncio.Task[None]) -> None:
        self._running.pop(key, None)
        if done.cancelled():
            return
        error = done.exception()  # retrieved, so that a refresh without a waiting caller is not reported as lost
        if error is not None and not isinstance(error, BrokerError):
            log.error("refresh.defect", connection_id=key[0], exc_info=error)

    async def _refresh(self, connection_id: str, seen_version: int) -> None:
        deadline = time.monotonic() + self._wait_seconds
        while (claimed := await self._claim_or_follow(connection_id, seen_version, deadline)) is not None:
            try:
                async with self._released(claimed.lease):
                    await self._act(claimed, seen_version)
            except LeaseLost:
                log.warning("refresh.lease_lost", connection_id=connection_id, fence=claimed.lease.fence)
                continue  # somebody else is at it: follow them
            return

    async def _act(self, claimed: Claimed, seen_version: int) -> None:
        over = False
        if claimed.journal is not None:
            claimed = await self._replayed(claimed, claimed.journal)
            ends_at = claimed.row.token_expires_at
            over = ends_at is not None and ends_at <= claimed.now  # the answer waited longer than its token lives
        if over or claimed.row.secret_version == seen_version:
            await self._send(claimed)

    async def _replayed(self, claimed: Claimed, journal: RefreshJournal) -> Claimed:
        log.warning("refresh.replayed", connection_id=claimed.row.id, fence=journal.fence)
        await self._settle(claimed, journal)
        row, at = await self._reread(claimed.row.id)
        return Claimed(claimed.lease, row, None, at)

    # Leases

    async def _claim_or_follow(self, connection_id: str, seen_version: int, deadline: float) -> Claimed | None:
        """Return the lease, or None once another holder has written a newer version or ended the connection."""

        def moved(row: Connection) -> bool:
            return row.secret_version != seen_version or row.status != "active"

        while (claimed := await self.claim(connection_id)) is None:
            if await self._lease_ends(connection_id, deadline, moved):
                return None
        return claimed

    async def _lease_ends(self, connection_id: str, deadline: float, enough: Callable[[Connection], bool]) -> bool:
        """Wait until the lease can be claimed (False), or the row is ``enough`` (True). Only reads, ever more seldom.

        Raises UpstreamTimeout at the ``deadline`` (monotonic), and at once when this process stops; NotFound.
        """
        pause_seconds = 0.01
        while True:
            if self._closing or time.monotonic() > deadline:
                raise UpstreamTimeout("another process is still refreshing this connection")
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311 - spreading, not secrecy
            pause_seconds = min(LONGEST_PAUSE_SECONDS, pause_seconds * 1.5)
            row, free = await self._database.read(lambda session: _watch(session, connection_id))
            if row is None:
                raise NotFound
            if enough(row):
                return True
            if free:
                return False

    async def claim(self, connection_id: str) -> Claimed | None:
        """Take the lease if nobody holds it; None otherwise (NotFound for no such connection).

        An attempt without a journal is what a crash between sending and journalling leaves: it is counted here as an
        unknown outcome, and when the same token may be sent again is written to the row.
        """

        def work(session: Session) -> tuple[Claimed | None, Verdict | None]:
            at = now(session)
            lease = _take_lease(session, connection_id, self._owner, at, self._lease_seconds)
            if lease is None:
                return None, None
            row = session.get(Connection, connection_id, with_for_update=True)
            if row is None:
                raise NotFound
            journal = session.get(RefreshJournal, connection_id)
            attempt = session.get(RefreshAttempt, connection_id)
            verdict = None
            if attempt is not None and journal is None:
                session.delete(attempt)
                verdict = self._judged(session, row, Failure("unknown", "outcome_unknown"), at)
            session.flush()
            return Claimed(lease, row, journal, at), verdict

        try:
            claimed, verdict = await self._database.transaction(work)
        except IntegrityError:
            return None  # two first claims at once: the other one has it
        if claimed is not None and verdict is not None:
            self._tell(claimed.row, verdict, cut_off=True)
        return claimed

    @contextlib.asynccontextmanager
    async def _released(self, lease: Lease) -> AsyncIterator[None]:
        try:
            yield
        finally:
            with contextlib.suppress(BrokerError):  # it ends by itself then
                await self._database.transaction(lambda session: _release(session, lease))

    @contextlib.asynccontextmanager
    async def holding(self, connection_id: str) -> AsyncIterator[Claimed]:
        """Hold a connection's lease for a block that writes its secret otherwise (merge, delete, revoke).

        Waits for a refresh under way; a journal left behind is settled first, or left when it cannot be: it is for one
        refresh token, and dropped later if that one is gone. Raises UpstreamTimeout, NotFound, LeaseLost.
        """
        deadline = time.monotonic() + self._wait_seconds
        while (claimed := await self.claim(connection_id)) is None:
            await self._lease_ends(connection_id, deadline, lambda _: False)
        async with self._released(claimed.lease):
            if claimed.journal is not None:
                claimed = await self._settled(claimed, claimed.journal)
            yield claimed

    async def _settled(self, claimed: Claimed, journal: RefreshJournal) -> Claimed:
        try:
            return await self._replayed(claimed, journal)
        except (LeaseLost, DatabaseUnavailable):
            raise
        except BrokerError as error:
            log.warning("refresh.not_settled", connection_id=claimed.row.id, code=error.code)
        row, at = await self._reread(claimed.row.id)
        return Claimed(claimed.lease, row, None, at)

    # Sending

    async def _send(self, claimed: Claimed) -> None:
        row = claimed.row
        require_usable(row)
        if row.refresh_not_before_at is not None and row.refresh_not_before_at > claimed.now:
            raise wait_for(row.refresh_not_before_at, claimed.now)
        try:
            prepared = await self._prepared(row)
        except (ProviderUnavailable, UpstreamInvalid, EgressDenied) as error:
            await self._fail(claimed, Failure("not_sent", "not_sent"))
            raise _as_provider_error(error) from None
        answered = await self._answered(claimed, prepared)
        journal = await self._journal(claimed.lease, prepared, answered)
        await self._settle(claimed, journal)

    async def _prepared(self, row: Connection) -> _Prepared:
        """Gather all that a refresh needs, so that nothing but the network can fail once the attempt is written."""
        configured = await self._integrations.configured(row.integration)
        require_pinned(row, configured)
        token = (await self._open(row)).get("refresh_token")
        if token is None:
            raise ReauthorizationRequired
        client = await self._integrations.client(configured)
        requests = tuple(
            refresh_request(
                configured.oauth2,
                token_url=configured.endpoints.urls["token_url"],
                client=client,
                secret=secret,
                refresh_token=Secret(token),
            )
            for secret in client.secrets or (None,)
        )
        timeout_seconds = configured.config.timeout_seconds
        return _Prepared(requests, configured.oauth2, self._audit.digest(token), sha256_hex(token), timeout_seconds)

    async def _answered(self, claimed: Claimed, prepared: _Prepared) -> _Answered:
        """Write the attempt, then send; a failure is recorded and raised in a caller's terms."""
        lease, row = claimed.lease, claimed.row
        ends_seconds = prepared.timeout_seconds + self._lease_seconds
        deadline = time.monotonic() + prepared.timeout_seconds  # read first: the lease outlives every sender
        await self._database.transaction(
            lambda session: _write_attempt(session, lease, prepared.token_digest, ends_seconds)
        )
        started = time.monotonic()
        log.info("refresh.sent", connection_id=row.id, fence=lease.fence, unknown_outcomes=row.unknown_outcomes)
        try:
            answer = await self._ask_provider(prepared, deadline)
        except (NotSent, EgressDenied, InternalError) as error:
            await self._fail(claimed, Failure("not_sent", "not_sent"))
            raise _as_provider_error(error) from None
        except (OutcomeUnknown, UpstreamInvalid) as error:
            await self._fail(claimed, Failure("unknown", "outcome_unknown"))
            raise _as_provider_error(error) from None
        log.info("refresh.answered", connection_id=row.id, status=answer.status, ms=_ms_since(started))
        return _Answered(answer, time.monotonic())

    async def _ask_provider(self, prepared: _Prepared, deadline: float) -> Incoming:
        """Send with each live client secret, newest first, until one is not refused; all before the ``deadline``."""
        answer: Incoming | None = None
        for request in prepared.requests:
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0:  # this process slept: the lease may be another's soon
                raise NotSent("The time for this refresh is over")
            answer = await self._egress.send(request, timeout_seconds=left_seconds)
            parsed = parse_answer(prepared.oauth2, answer, received_at=0.0)
            if not (isinstance(parsed, TokenRefusal) and parsed.outcome == "client_refused"):
                break
        assert answer is not None  # noqa: S101 - the loop runs at least once
        return answer

    # Journal

    async def _journal(self, lease: Lease, prepared: _Prepared, answered: _Answered) -> RefreshJournal:
        """Make the answer durable. While the database does not take it, it is offered again: it may be the only copy."""
        sealed = self._sealed_answer(lease, prepared, answered.answer)

        def work(session: Session) -> RefreshJournal:
            require_lease(session, lease)
            journal = RefreshJournal(
                connection_id=lease.connection_id,
                fence=lease.fence,
                token_digest=prepared.token_digest,
                sealed_answer=sealed,
                received_at=now(session) - (time.monotonic() - answered.at_monotonic),
            )
            session.merge(journal)
            return journal

        while True:
            try:
                return await self._database.transaction(work)
            except DatabaseUnavailable:
                waited_seconds = time.monotonic() - answered.at_monotonic
                log.error("refresh.journal_waits", connection_id=lease.connection_id, seconds=round(waited_seconds, 1))  # noqa: TRY400 - no defect
                if waited_seconds > self._journal_seconds:
                    raise
            await asyncio.sleep(0.1)

    def _sealed_answer(self, lease: Lease, prepared: _Prepared, answer: Incoming) -> bytes:
        body = {
            "status": answer.status,
            "headers": dict(answer.headers),
            "body": base64.b64encode(answer.body).decode(),
            "for_sha256": prepared.token_sha256,
        }
        owner = secret_owner(lease.connection_id)
        return self._sealer.seal(json.dumps(body).encode(), owner=owner, purpose="journal", version=lease.fence)

    async def _unsealed_answer(self, journal: RefreshJournal) -> tuple[Incoming, str]:
        """Return the answer and the digest of the refresh token that it is for."""
        try:
            opened = await self._sealer.open_fresh(
                self._database,
                journal.sealed_answer,
                owner=secret_owner(journal.connection_id),
                purpose="journal",
                version=journal.fence,
            )
        except SecretUnreadable:
            log.critical("refresh.journal_unreadable", connection_id=journal.connection_id, fence=journal.fence)
            raise SecretStoreUnavailable("a journalled answer cannot be opened") from None
        body = json.loads(opened)
        return Incoming(body["status"], body["headers"], base64.b64decode(body["body"])), body["for_sha256"]

    async def _settle(self, claimed: Claimed, journal: RefreshJournal) -> None:
        """Act on a journalled answer: store the new token, or record what the refusal means. Needs no network."""
        row = claimed.row
        oauth2 = self._dialogue(row)
        answer, for_sha256 = await self._unsealed_answer(journal)
        old = (await self._open(row)).get("refresh_token")
        if old is None or not hmac.compare_digest(sha256_hex(old), for_sha256):
            log.warning("refresh.journal_dropped", connection_id=row.id, fence=journal.fence)
            await self._record(claimed.lease, {})  # the secret was replaced otherwise, by a consent or an import
            return
        parsed = parse_answer(oauth2, answer, received_at=journal.received_at)
        if isinstance(parsed, TokenAnswer):
            await self._write(claimed, oauth2, parsed, journal, old)
            return
        verdict = await self._fail(claimed, failure_of(oauth2.refresh, parsed, status=answer.status))
        if verdict.lost:
            raise ReauthorizationRequired
        if parsed.outcome == "transient":
            raise wait_for(verdict.tally.not_before_at or claimed.now, claimed.now)
        raise UpstreamInvalid("the provider refused the refresh: see status_reason of the connection")

    def _dialogue(self, row: Connection) -> OAuth2:
        """Return the provider's OAuth dialogue, as its file has it; a default one for a provider that is gone."""
        provider = self._integrations.catalog.get(row.provider)
        return provider.oauth2 if provider is not None and provider.oauth2 is not None else OAuth2()

    # Recording

    async def _write(
        self, claimed: Claimed, oauth2: OAuth2, answer: TokenAnswer, journal: RefreshJournal, old_refresh_token: str
    ) -> None:
        row = claimed.row
        old = old_refresh_token if oauth2.refresh.keep_old else None
        value = oauth_value(answer, received_at=journal.received_at, old_refresh_token=old)
        version = await self.put(row.id, value, expected_version=row.secret_version)
        changes: dict[str, Any] = {
            "secret_version": version,
            "refreshable": "refresh_token" in value,
            "token_expires_at": answer.expires_at,
            "refreshed_at": journal.received_at,
            "refresh_failures": 0,
            "refresh_not_before_at": None,
            "unknown_outcomes": 0,
        }
        if answer.scopes is not None:
            changes["scopes"] = list(granted_scopes(oauth2, row.scopes, answer))
        if answer.refresh_expires_at is not None:
            changes["refresh_expires_at"] = answer.refresh_expires_at
        await self._record(claimed.lease, changes, _entry("connection.refreshed", row, version=version))
        self._metrics.refresh_outcome(row.provider, "ok")
        replaced = answer.refresh_token is not None and answer.refresh_token.reveal() != old_refresh_token
        log.info("refresh.stored", connection_id=row.id, provider=row.provider, version=version, rotated=replaced)
        if "refresh_token" not in value:
            log.warning("refresh.no_refresh_token", connection_id=row.id, provider=row.provider)

    async def put(self, connection_id: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """Write the next version of a secret under the lease; return it, for the row to name.

        A crash between vault and row leaves a version that no row names. A replay finds its own value there and takes it.
        Anything else is written only after the row names the newest version again, with the content that it names now: a
        vault keeps three versions, so the one that the row names would else be dropped after two such crashes.
        Raises SecretStoreUnavailable.
        """
        expected = expected_version
        for _ in range(ROUNDS):
            try:
                return await self._vault.put(secret_owner(connection_id), value, expected_version=expected)
            except VaultConflict as conflict:
                current = conflict.current
            with contextlib.suppress(VaultConflict):
                if await self._content(connection_id, current) == value:
                    return current
                expected = await self._named_anew(connection_id, expected, current)
        raise SecretStoreUnavailable("others keep writing this secret")

    async def _content(self, connection_id: str, version: int) -> dict[str, Any] | None:
        try:
            return (await self._vault.get(secret_owner(connection_id), version))[1]
        except (SecretNotFound, SecretUnreadable):
            return None

    async def _named_anew(self, connection_id: str, pinned: int, current: int) -> int:
        """Let the row name the newest version, made a copy of the one that it names; return that version."""
        content = await self._content(connection_id, pinned)
        if content is None:
            return current  # nothing to save
        if await self._content(connection_id, current) != content:
            current = await self._vault.put(secret_owner(connection_id), content, expected_version=current)
        pinned_row = (col(Connection.id) == connection_id) & (col(Connection.secret_version) == pinned)
        move = sa.update(Connection).where(pinned_row).values(secret_version=current)
        await self._database.transaction(lambda session: session.execute(move))
        log.warning("credential.named_anew", connection_id=connection_id, version=current)
        return current

    async def destroy(self, connection_id: str) -> None:
        """Destroy every version of a connection's secret."""
        await self._vault.destroy(secret_owner(connection_id))

    async def _record(self, lease: Lease, changes: Mapping[str, Any], *entries: Entry) -> None:
        """Finish an attempt in one transaction (LeaseLost when the fence moved on: then nothing is written)."""

        def work(session: Session) -> None:
            row = _finished(session, lease)
            for name, value in changes.items():
                setattr(row, name, value)
            if changes and row.status == "active":
                row.status_reason = None
            session.flush()
            self._audit.append(session, *entries)

        await self._database.transaction(work)

    async def _fail(self, claimed: Claimed, failure: Failure) -> Verdict:
        """Record a failed attempt: when to try again, or that only the user can help."""

        def work(session: Session) -> Verdict:
            return self._judged(session, _finished(session, claimed.lease), failure, now(session))

        verdict = await self._database.transaction(work)
        self._tell(claimed.row, verdict, cut_off=False)
        return verdict

    def _judged(self, session: Session, row: Connection, failure: Failure, at: float) -> Verdict:
        """Write what follows from a failure to the (locked) row; a loss is audited, once."""
        verdict = after_attempt(
            self._dialogue(row).refresh,
            failure,
            Tally(row.refresh_failures, row.unknown_outcomes, row.refresh_not_before_at),
            expires_at=row.token_expires_at,
            now=at,
            random_share=random.random(),  # noqa: S311 - spreading, not secrecy
        )
        tally = verdict.tally
        row.refresh_failures, row.unknown_outcomes = tally.failures, tally.unknown_outcomes
        row.refresh_not_before_at = tally.not_before_at
        entries: list[Entry] = []
        if row.status == "active":  # what is frozen or revoked stays so
            row.status_reason = verdict.reason
            if verdict.lost:
                row.status = "reauthorization_required"
                entries = [_entry("connection.reauthorization_required", row, reason=verdict.reason)]
        session.flush()
        self._audit.append(session, *entries)
        return verdict

    def _tell(self, row: Connection, verdict: Verdict, *, cut_off: bool) -> None:
        outcome = "lost" if verdict.lost else verdict.reason
        self._metrics.refresh_outcome(row.provider, outcome)
        log.warning(
            "refresh.lost" if verdict.lost else "refresh.failed",
            connection_id=row.id,
            provider=row.provider,
            reason=verdict.reason,
            cut_off=cut_off,
            failures=verdict.tally.failures,
            unknown_outcomes=verdict.tally.unknown_outcomes,
            again_at=verdict.tally.not_before_at,
        )

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
        """Whether another connection of the same account would die with this one's grant.

        Where the account of either is unknown (an import), the same subject is taken for the same account.
        """
        unknown = col(Connection.subject) == row.subject
        if row.account_id is not None:
            unknown &= col(Connection.account_id).is_(None)
        same: list[Any] = [
            (col(Connection.account_id) == row.account_id) | unknown,
            Connection.id != row.id,
            col(Connection.deleted_at).is_(None),
            col(Connection.status) != "revoked",
        ]
        if project:
            same.append(Connection.provider == row.provider)
        else:
            same += [Connection.integration == row.integration, Connection.client_id == row.client_id]
        query = select(Connection.id).where(*same).limit(1)
        return await self._database.read(lambda session: session.exec(query).first() is not None)

    async def dispose(self, connection_id: str) -> Revoked:
        """Finish the deletion of a row marked ``deleted_at``: revoke, destroy the secret, remove the row.

        May be repeated after a crash at any point. Raises SecretStoreUnavailable, DatabaseUnavailable, UpstreamTimeout,
        LeaseLost: then the row stays marked and the worker tries again.
        """
        async with self.holding(connection_id) as claimed:
            row = claimed.row
            result = await self._revoke_deleted(row)
            await self.destroy(connection_id)

            def work(session: Session) -> None:
                require_lease(session, claimed.lease)
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

    async def due(self, *, limit: int, after: tuple[float, str] | None = None) -> list[Connection]:
        """Return connections to refresh now: used ones whose token ends soon, idle ones whose refresh token would die.

        In the order of the tokens' ends and ids; ``after`` is the (end or 0, id) of the last one of the page before.
        """
        ends_at = sa.func.coalesce(Connection.token_expires_at, 0.0)

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
            if after is not None:
                query = query.where(sa.tuple_(ends_at, col(Connection.id)) > after)
            return list(session.exec(query.order_by(ends_at, col(Connection.id)).limit(limit)))

        return await self._database.read(work)

    @staticmethod
    def _ends_soon(at: float) -> sa.ColumnElement[bool]:
        """In use, and within the margin or the last fifth of its life: a token of a minute is not renewed all the time."""
        ends_at = col(Connection.token_expires_at)
        since = sa.func.coalesce(Connection.refreshed_at, Connection.created_at)
        used = col(Connection.last_used_at) > at - USED_WITHIN_SECONDS
        return used & (ends_at < at + WORKER_MARGIN_SECONDS) & (ends_at - at < WORKER_SHARE * (ends_at - since))

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

    async def sweep_unreferenced(self, *, older_than_seconds: float = 86_400.0, at: float | None = None) -> int:
        """Destroy secrets that no row names, left by a crash between vault and row; return how many.

        ``at``: the time to count from, by default the database's now.
        """
        now_at = await self._database.read(now) if at is None else at
        found = await self._vault.owners("connections/")
        old = [owner for owner, made_at in found if made_at < now_at - older_than_seconds]
        swept = 0
        for start in range(0, len(old), SWEEP_BATCH):
            for owner in await self._unreferenced(old[start : start + SWEEP_BATCH]):
                await self._vault.destroy(owner)
                swept += 1
        if swept:
            log.warning("credential.swept", count=swept)
        return swept

    async def _unreferenced(self, owners: Sequence[str]) -> list[str]:
        ids = [owner.removeprefix("connections/") for owner in owners]
        query = select(Connection.id).where(col(Connection.id).in_(ids))
        known = await self._database.read(lambda session: set(session.exec(query)))
        return [secret_owner(connection_id) for connection_id in ids if connection_id not in known]

    async def unsettled(self, *, limit: int = 1000) -> list[str]:
        """Return connections whose refresh was cut off by a crash: a journal or an attempt without a live lease."""

        def work(session: Session) -> list[str]:
            free = _is_free(now(session))
            found: set[str] = set()
            for table in (RefreshJournal, RefreshAttempt):
                same = col(RefreshLease.connection_id) == col(table.connection_id)
                found.update(
                    session.exec(select(table.connection_id).join(RefreshLease, same).where(free).limit(limit))
                )
            return sorted(found)

        return await self._database.read(work)

    async def settle(self, connection_id: str) -> None:
        """Finish what a crash left of one connection: replay its journal, or count its unknown outcome.

        Does not wait for a live lease: its holder does the same. Raises DatabaseUnavailable.
        """
        with contextlib.suppress(NotFound, LeaseLost):
            claimed = await self.claim(connection_id)
            if claimed is None:
                return
            async with self._released(claimed.lease):
                if claimed.journal is not None:
                    await self._settled(claimed, claimed.journal)

    async def aclose(self) -> None:
        """Finish the refreshes under way (each ends within its time limit) and give their leases back.

        Those that only wait for another process end at once.
        """
        self._closing = True
        while self._running:
            await asyncio.wait(set(self._running.values()))
            await asyncio.sleep(0)  # the tasks' callbacks forget them


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


def _is_free(at: float) -> sa.ColumnElement[bool]:
    return col(RefreshLease.owner).is_(None) | (col(RefreshLease.expires_at) < at)


def _watch(session: Session, connection_id: str) -> tuple[Connection | None, bool]:
    """Return the row and whether its lease can be claimed."""
    lease = session.get(RefreshLease, connection_id)
    free = lease is None or lease.owner is None or lease.expires_at < now(session)
    return session.get(Connection, connection_id), free


def _take_lease(session: Session, connection_id: str, owner: str, at: float, lease_seconds: float) -> Lease | None:
    ends_at = at + lease_seconds
    claim = (
        sa.update(RefreshLease)
        .where(col(RefreshLease.connection_id) == connection_id, _is_free(at))
        .values(owner=owner, fence=RefreshLease.fence + 1, expires_at=ends_at)
        .returning(col(RefreshLease.fence))
    )
    fence = session.execute(claim).scalar_one_or_none()
    if fence is not None:
        return Lease(connection_id, fence)
    if session.get(RefreshLease, connection_id) is not None:
        return None
    session.add(RefreshLease(connection_id=connection_id, owner=owner, fence=1, expires_at=ends_at))
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


def _write_attempt(session: Session, lease: Lease, digest: str, ends_seconds: float) -> None:
    """Write what is about to be sent, and let the lease last until its sender has surely given up."""
    require_lease(session, lease)
    at = now(session)
    session.execute(
        sa.update(RefreshLease)
        .where(col(RefreshLease.connection_id) == lease.connection_id)
        .values(expires_at=at + ends_seconds)
    )
    session.merge(RefreshAttempt(connection_id=lease.connection_id, fence=lease.fence, token_digest=digest, sent_at=at))


def _finished(session: Session, lease: Lease) -> Connection:
    """End an attempt: check the lease, forget attempt and journal, and return the locked row."""
    require_lease(session, lease)
    for table in (RefreshAttempt, RefreshJournal):
        session.execute(sa.delete(table).where(col(table.connection_id) == lease.connection_id))
    row = session.get(Connection, lease.connection_id, with_for_update=True)
    if row is None:
        raise LeaseLost
    return row


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
