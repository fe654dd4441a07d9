"""One refresh, however many ask: claim → attempt → act → journal → compare-and-set → release.

The attempt is durable before the request leaves, the provider's raw answer is durable before anything else happens, so that
a crash at any point ends in the newest token, or in an unknown outcome that is known to be one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import structlog

from broker.audit import Audit
from broker.credentials.claims import Claims
from broker.credentials.journal import Answered, Journal, RefusedOnce, SentToken, write_attempt
from broker.credentials.leases import Claimed, LeaseLost
from broker.credentials.outcomes import Outcomes
from broker.credentials.renewals import Renewal, minting_of, renewal_key, requests_for
from broker.credentials.stored_secrets import StoredSecrets, sha256_hex
from broker.credentials.usable import require_pinned, require_same_client, require_usable
from broker.database import Database
from broker.egress import Egress, NotSent, OutcomeUnknown
from broker.errors import (
    BrokerError,
    EgressDenied,
    InternalError,
    ProviderUnavailable,
    ReauthorizationRequired,
    UpstreamInvalid,
    UpstreamTimeout,
)
from broker.integrations import Configured, Integrations
from broker.limits import waiting_elsewhere
from broker.models import Connection
from broker.refresh import Failure, wait_for
from broker.token_endpoint import Client, Heard
from providers.spec import Incoming, OAuth2, Outgoing

log = structlog.get_logger()
Tried = Literal["taken", "refused", "not_sent"]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A refresh that is ready to be sent: one request for each of the client's secrets, in their order."""

    client: Client
    requests: tuple[Outgoing, ...] = field(repr=False)
    oauth2: OAuth2
    token: SentToken
    timeout_seconds: float


@dataclass(slots=True)
class _Trial:
    """A client secret that goes in front of the live ones in the refresh of one connection, and what was heard of it."""

    secret_id: str
    refused: bool = False
    taken: bool = False


class Refreshing:
    """Refreshes connections; knows the refreshes that run in this process."""

    def __init__(
        self,
        database: Database,
        stored: StoredSecrets,
        egress: Egress,
        integrations: Integrations,
        audit: Audit,
        claims: Claims,
        journal: Journal,
        outcomes: Outcomes,
        *,
        lease_seconds: float,
        wait_seconds: float,
        confirm_seconds: float,
        monotonic: Callable[[], float],
    ) -> None:
        """Keep the parts; seconds and clock are those of ``Credentials``."""
        self._database = database
        self._stored = stored
        self._egress = egress
        self._integrations = integrations
        self._audit = audit
        self._claims = claims
        self._journal = journal
        self._outcomes = outcomes
        self._lease_seconds = lease_seconds
        self._wait_seconds = wait_seconds
        self._confirm_seconds = confirm_seconds
        self._monotonic = monotonic
        self._running: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._trials: dict[str, _Trial] = {}

    async def once(self, connection_id: str, seen_version: int, patience_seconds: float) -> None:
        """Join the refresh that runs in this process, or start one that does not die with its caller.

        Nothing is sent where another writer has moved on from ``seen_version``. Raises UpstreamTimeout when patience is
        over, and what the refresh raises.
        """
        key = (connection_id, seen_version)
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._refresh(connection_id, seen_version))
            self._running[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        with waiting_elsewhere():  # for the provider, or another process: thousands may, and nothing is overloaded
            await asyncio.wait({task}, timeout=patience_seconds)
        if not task.done():
            raise UpstreamTimeout("the refresh goes on; ask again")
        if task.cancelled():
            raise UpstreamTimeout("the refresh was cut off; ask again")
        task.result()

    async def trying(self, row: Connection, secret_id: str) -> Tried:
        """Refresh a connection with this client secret in front of the live ones. See ``Credentials.try_client_secret``."""
        trial = self._trials[row.id] = _Trial(secret_id)
        try:
            await self.once(row.id, row.secret_version, self._wait_seconds)
        except BrokerError:
            if not trial.refused:
                raise
        finally:
            self._trials.pop(row.id, None)
        if trial.refused:
            return "refused"
        return "taken" if trial.taken else "not_sent"

    async def finish(self) -> None:
        """Wait for the refreshes under way."""
        while self._running:
            await asyncio.wait(set(self._running.values()))
            await asyncio.sleep(0)  # the tasks' callbacks forget them

    def _forget(self, key: tuple[str, int], done: asyncio.Task[None]) -> None:
        self._running.pop(key, None)
        if done.cancelled():
            return
        error = done.exception()  # retrieved, so that a refresh without a waiting caller is not reported as lost
        if error is not None and not isinstance(error, BrokerError):
            log.error("refresh.defect", connection_id=key[0], exc_info=error)

    async def _refresh(self, connection_id: str, seen_version: int) -> None:
        deadline = self._monotonic() + self._wait_seconds
        while (claimed := await self._claims.claim_or_follow(connection_id, seen_version, deadline)) is not None:
            try:
                async with self._claims.released(claimed.lease):
                    await self._confirmed(claimed, seen_version)
            except LeaseLost:
                log.warning("refresh.lease_lost", connection_id=connection_id, fence=claimed.lease.fence)
                continue  # somebody else is at it: follow them
            return

    async def _confirmed(self, claimed: Claimed, seen_version: int) -> None:
        """Act; and once more, a moment later, where the provider said for the first time that the grant is dead."""
        try:
            await self._act(claimed, seen_version)
        except RefusedOnce:
            await asyncio.sleep(self._confirm_seconds)
            await self._act(await self._journal.reread(claimed), seen_version, confirming=True)

    async def _act(self, claimed: Claimed, seen_version: int, *, confirming: bool = False) -> None:
        over = False
        if claimed.journal is not None:
            claimed = await self._journal.replay(claimed, claimed.journal)
            ends_at = claimed.row.token_expires_at
            over = ends_at is not None and ends_at <= claimed.now  # the answer waited longer than its token lives
        if over or claimed.row.secret_version == seen_version:
            await self._send(claimed, confirming=confirming)

    async def _send(self, claimed: Claimed, *, confirming: bool) -> None:
        row = claimed.row
        require_usable(row)
        if not confirming and row.refresh_not_before_at is not None and row.refresh_not_before_at > claimed.now:
            raise wait_for(row.refresh_not_before_at, claimed.now)
        try:
            prepared = await self._prepared(row, claimed.now)
        except (ProviderUnavailable, UpstreamInvalid, EgressDenied) as error:
            await self._outcomes.fail(claimed, Failure("not_sent", "not_sent"))
            raise _as_provider_error(error, row) from None
        answered = await self._answered(claimed, prepared)
        journal = await self._journal.keep(claimed.lease, prepared.token, answered)
        await self._journal.settle(claimed, journal)

    async def _prepared(self, row: Connection, at: float) -> _Prepared:
        """Gather all that a refresh needs, so that nothing but the network can fail once the attempt is written."""
        configured = await self._integrations.configured(row.integration, variables=row.variables)
        require_pinned(row, configured)
        value = await self._stored.open(row)
        key = renewal_key(value)
        if key is None:
            raise ReauthorizationRequired
        client = await self._client(row, configured)
        redirect_uri = self._integrations.redirect_uri(row.integration)
        requests = requests_for(Renewal(row, value, configured, client, redirect_uri, at))
        sent = SentToken(self._audit.digest(key), sha256_hex(key))
        return _Prepared(client, requests, self._outcomes.oauth2_of(row), sent, configured.config.timeout_seconds)

    async def _client(self, row: Connection, configured: Configured) -> Client:
        """Return the client that takes part in a renewal: the integration's, unless a token is minted without it."""
        minting = minting_of(configured.provider, row.credential_type)
        if minting is not None and not minting.uses_client:
            return Client(configured.row.client_id, (), "none")
        require_same_client(row, configured)
        trial = self._trials.get(row.id)
        return await self._integrations.client(configured, first=trial.secret_id if trial is not None else None)

    async def _answered(self, claimed: Claimed, prepared: _Prepared) -> Answered:
        """Write the attempt, then send; a failure is recorded and raised in a caller's terms."""
        lease, row = claimed.lease, claimed.row
        lasts_seconds = prepared.timeout_seconds + self._lease_seconds
        deadline = self._monotonic() + prepared.timeout_seconds  # read first: the lease outlives every sender
        await self._database.transaction(
            lambda session: write_attempt(session, lease, prepared.token, lasts_seconds=lasts_seconds)
        )
        started = self._monotonic()
        log.info("refresh.sent", connection_id=row.id, fence=lease.fence, unknown_outcomes=row.unknown_outcomes)
        try:
            heard = await self._ask_provider(prepared, deadline)
        except (NotSent, EgressDenied, InternalError) as error:
            await self._outcomes.fail(claimed, Failure("not_sent", "not_sent"))
            raise _as_provider_error(error, row) from None
        except (OutcomeUnknown, UpstreamInvalid) as error:
            await self._outcomes.fail(claimed, Failure("unknown", "outcome_unknown"))
            raise _as_provider_error(error, row) from None
        elapsed_ms = round((self._monotonic() - started) * 1000)
        self._judge_trial(row, prepared.client, heard)
        log.info("refresh.answered", connection_id=row.id, status=heard.answer.status, ms=elapsed_ms)
        return Answered(heard.answer, self._monotonic())

    def _judge_trial(self, row: Connection, client: Client, heard: Heard) -> None:
        trial = self._trials.get(row.id)
        if trial is not None and client.secret_ids[:1] == (trial.secret_id,):
            trial.refused = heard.refused > 0
            trial.taken = heard.taken and not trial.refused

    async def _ask_provider(self, prepared: _Prepared, deadline: float) -> Heard:
        """Send with each client secret in turn, until one is not refused; all before the ``deadline``."""

        async def send(request: Outgoing) -> Incoming:
            left_seconds = deadline - self._monotonic()
            if left_seconds <= 0:  # this process slept: the lease may be another's soon
                raise NotSent("The time for this refresh is over")
            return await self._egress.send(request, timeout_seconds=left_seconds)

        return await self._integrations.ask(prepared.oauth2, prepared.client, prepared.requests, send)


def _as_provider_error(error: BrokerError, row: Connection) -> BrokerError:
    """Return the error in a caller's terms, and whether it shows that the provider serves nobody.

    Not answering does. Not being reached does where all connections go to the same hosts; a host of its own may be gone.
    """
    if isinstance(error, OutcomeUnknown):
        told = UpstreamTimeout() if error.timed_out else error
        told.provider_in_trouble = True
        return told
    if isinstance(error, ProviderUnavailable) and not row.variables:
        error.provider_in_trouble = True
    return error
