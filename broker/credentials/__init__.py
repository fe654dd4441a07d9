"""The only reader of a connection's secret: store, hand out fresh (refresh once however many ask), revoke, mark.

``Credentials`` is the face and holds the contracts; the work is in the files beside it, each of which imports only from
those above it::

    snapshots · last_use         what a hand-out reads of a row, and what it leaves on it; both in groups
    usable · stored_secrets      the row as it stands; the secret in the vault
    in_use                       the rows of proxied calls and open streams, as they were a moment ago
    freezes                      whom a freeze or revocation means, and what becomes usable while one lasts
    leases · watching            one writer at a time, and one query for all who wait for another process's
    renewals                     pure: the requests that renew a credential, and what is kept of the answer
    outcomes                     what a refresh came to, on the row
    journal                      the attempt, and the provider's raw answer
    claims                       claim, wait, hold, settle what a crash left
    refreshing                   one refresh, from the claim to the release
    handing_out · revoking · upkeep · lifecycle

A refresh is claim → attempt → act → journal → compare-and-set → release. The lease has an owner and a fencing number; a
late holder's write is refused. docs/decisions/0006-refresh.md says why.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import sqlalchemy as sa

from broker.audit import Audit
from broker.credentials.claims import Claims
from broker.credentials.handing_out import HandingOut, Handout, Lent
from broker.credentials.journal import Journal
from broker.credentials.leases import Claimed, Lease, LeaseLost, require_lease
from broker.credentials.lifecycle import GrantOver, Marking
from broker.credentials.outcomes import Outcomes
from broker.credentials.refreshing import Refreshing, Tried
from broker.credentials.revoking import Revoked, Revoking, SecretLost
from broker.credentials.snapshots import Snapshot, find_snapshots
from broker.credentials.stored_secrets import (
    StoredSecrets,
    bearer_of,
    destroyed_version,
    oauth_value,
    secret_owner,
    sha256_hex,
)
from broker.credentials.upkeep import Backlog, Upkeep
from broker.credentials.usable import Standing
from broker.database import Database
from broker.egress import Egress
from broker.integrations import Configured, Integrations
from broker.models import Connection
from broker.refresh import CONFIRM_SECONDS, Ask
from broker.telemetry import Metrics
from broker.vault import Store
from broker.vault.keyring import Sealer

__all__ = [
    "Backlog",
    "Claimed",
    "Credentials",
    "GrantOver",
    "Handout",
    "Lease",
    "LeaseLost",
    "Lent",
    "Revoked",
    "SecretLost",
    "Tried",
    "bearer_of",
    "destroyed_version",
    "oauth_value",
    "require_lease",
    "secret_owner",
    "sha256_hex",
]

LEASE_SECONDS = 30.0
WAIT_SECONDS = 40.0
LIVE_WAIT_SECONDS = 5.0
JOURNAL_SECONDS = 60.0


class Credentials:
    """Secrets of connections. Every method may run at once, in many tasks, processes and replicas."""

    def __init__(  # noqa: PLR0913 - its parts, then its paces, by name
        self,
        database: Database,
        vault: Store,
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
        confirm_seconds: float = CONFIRM_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Join the parts. ``lease_seconds``: how long a lease outlives what its holder is known to do.

        ``wait_seconds``: how long a caller waits for a refresh, its own or another's; ``live_wait_seconds``: and how long
        while there is a live token to serve. ``journal_seconds``: how long an answer is kept in memory while the database
        does not take it. ``confirm_seconds``: between a first refusal that would end the grant and asking once more.
        ``monotonic``: the clock of durations; for tests. Not the loop's: that one stands still while a callback runs.
        """
        stored = StoredSecrets(database, vault)
        outcomes = Outcomes(database, stored, integrations, audit, metrics, confirm_seconds=confirm_seconds)
        journal = Journal(database, stored, sealer, outcomes, keep_seconds=journal_seconds, monotonic=monotonic)
        paces: dict[str, Any] = {"lease_seconds": lease_seconds, "wait_seconds": wait_seconds, "monotonic": monotonic}
        claims = Claims(database, outcomes, journal, **paces)
        parts = (database, stored, egress, integrations, audit, claims, journal, outcomes)
        refreshing = Refreshing(*parts, **paces, confirm_seconds=confirm_seconds)
        self._wait_seconds = wait_seconds
        self._stored = stored
        self._claims = claims
        self._refreshing = refreshing
        self._handing_out = HandingOut(
            database, stored, refreshing, wait_seconds=wait_seconds, live_wait_seconds=live_wait_seconds
        )
        self._revoking = Revoking(database, stored, egress, integrations, audit, claims)
        self._upkeep = Upkeep(database, vault, integrations, claims)
        self._marking = Marking(database, audit)

    # Handing out

    def snapshots(self, connection: sa.Connection, ids: Sequence[str]) -> list[Snapshot | None]:
        """Return what ``fresh`` needs of these connections, None for each that there is not; a deleted one is there."""
        return find_snapshots(connection, ids, self._stored.ahead)

    async def fresh(self, row: Standing, configured: Configured, ask: Ask, at: float) -> Handout:
        """Return a token that fits ``ask``, refreshing at most once; concurrent callers share one refresh.

        ``row`` was read at ``at`` (the database's clock) and is checked here for status and pinned origins. Raises those
        refusals, ``decide``'s, and ProviderUnavailable, UpstreamTimeout or UpstreamInvalid when a needed refresh fails.
        """
        return await self._handing_out.fresh(row, configured, ask, at)

    async def lend(self, row: Standing, configured: Configured, ask: Ask, at: float) -> Lent:
        """As ``fresh``, but return the opened credential of any type, for a call that this process makes itself."""
        return await self._handing_out.lend(row, configured, ask, at)

    async def lend_last(self, row: Connection, configured: Configured) -> Lent:
        """As ``lend``, of a row that is being deleted or revoked, for what has to be undone with it before: never refreshed.

        Whether the row may be used is not looked at. Raises OriginChanged, SecretStoreUnavailable, ProviderUnavailable.
        """
        return await self._handing_out.lend_last(row, configured)

    async def refresh(self, row: Connection) -> None:
        """Refresh now unless somebody else just did; for the worker. Raises as ``fresh`` does."""
        await self._refreshing.once(row.id, row.secret_version, self._wait_seconds)

    async def try_client_secret(self, row: Connection, secret_id: str) -> Tried:
        """Refresh now with this client secret, a candidate, in front of the live ones; return what the provider made of it.

        ``refused``: then the live ones were used, so the connection suffers nothing by it. ``not_sent``: somebody else just
        refreshed it. Raises as ``fresh`` does; then nothing is known of the secret.
        """
        return await self._refreshing.trying(row, secret_id)

    # Writing otherwise

    async def claim(self, connection_id: str) -> Claimed | None:
        """Take the lease if nobody holds it; None otherwise (NotFound for no such connection).

        An attempt without a journal is what a crash between sending and journalling leaves: it is counted here as an
        unknown outcome, and when the same token may be sent again is written to the row.
        """
        return await self._claims.claim(connection_id)

    def holding(self, connection_id: str) -> AbstractAsyncContextManager[Claimed]:
        """Hold a connection's lease for a block that writes its secret otherwise (merge, delete, revoke).

        Waits for a refresh under way; a journal left behind is settled first, or left when it cannot be: it is for one
        refresh token, and dropped later if that one is gone. Raises UpstreamTimeout, NotFound, LeaseLost.
        """
        return self._claims.holding(connection_id)

    async def put(self, connection_id: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """Write the next version of a secret under the lease; return it, for the row to name.

        ``expected_version`` is the one that the row names, or -n where n was the last one and is destroyed: numbers go on
        behind it. A newer one that a crash left is no obstacle: it is taken if it
        holds this value, else the row names it first, made a copy of what it names now. Raises SecretStoreUnavailable.
        """
        return await self._stored.put(connection_id, value, expected_version=expected_version)

    async def destroy(self, connection_id: str) -> None:
        """Destroy every version of a connection's secret."""
        await self._stored.destroy(connection_id)

    # Ending

    def do_before_the_end(self, act: Callable[[Connection], Awaitable[None]]) -> None:
        """Have ``act`` undo what was made at a provider with a connection's credential, before that is revoked or destroyed.

        Called once, at the start. ``act`` is bounded in time, may be repeated, and raises only what ``dispose`` raises.
        """
        self._revoking.before_the_end = act

    async def before_the_end(self, row: Connection) -> None:
        """Undo what was made with the credential of a connection that is about to be deleted, while it may still be used."""
        await self._revoking.before_the_end(row)

    async def revoke_at_provider(self, row: Connection) -> Revoked:
        """Revoke what the connection holds at its provider; for the holder of its lease. Nothing is written.

        ``failed``: the provider did not confirm. Raises what the provider's calls raise, OriginChanged,
        SecretStoreUnavailable, and of that SecretLost where the store answers and the secret does not open.
        """
        return await self._revoking.at_provider(row)

    async def dispose(self, connection_id: str, *, known: Revoked | None = None) -> Revoked:
        """Finish the deletion of a row marked ``deleted_at``: revoke, destroy the secret, remove the row.

        ``known``: what the provider said already, or that it is not to be asked. Without it a row that a revocation or an
        erasure still has to end is left alone (``skipped``): it needs the secret, and removes the row.

        May be repeated after a crash at any point. Raises SecretStoreUnavailable, DatabaseUnavailable, UpstreamTimeout,
        LeaseLost: then the row stays marked and the worker tries again.
        """
        return await self._revoking.dispose(connection_id, known=known)

    async def mark_ended(self, over: GrantOver) -> list[str]:
        """Mark the connections whose grant is over by their provider's word; return their ids. They yield nothing any more.

        Not those that were granted later, nor any where several clients may be meant and nothing says which.
        A refresh under way changes nothing about it. May be repeated: what is marked already is not marked again. Raises
        DatabaseUnavailable, AuditUnavailable.
        """
        return await self._marking.mark_ended(over)

    # For the worker

    async def due(
        self, integration: str, *, idle: bool = False, limit: int, after: tuple[float, str] | None = None
    ) -> list[Connection]:
        """Return connections of an integration to refresh now: used ones whose token ends soon (or ended today).

        ``idle``: instead those whose refresh token would die of not being used. In the order of the tokens' ends and ids;
        ``after`` is the (end or 0, id) of the last one of the page before.
        """
        return await self._upkeep.due(integration, idle=idle, limit=limit, after=after)

    async def backlog(self) -> list[Backlog]:
        """Return for each integration with connections in use that are due how many there are, and how late."""
        return await self._upkeep.backlog()

    async def idle_integrations(self) -> list[str]:
        """Return the integrations that have refresh tokens which would die of idleness. Reads every connection: be rare."""
        return await self._upkeep.idle_integrations()

    async def left_behind(self, *, older_than_seconds: float) -> list[str]:
        """Return connections whose deletion a crash cut off, a hundred at most; not those that a revocation has to end."""
        return await self._upkeep.left_behind(older_than_seconds=older_than_seconds)

    async def unsettled(self, *, limit: int = 1000) -> list[str]:
        """Return connections whose refresh was cut off by a crash: a journal or an attempt without a live lease."""
        return await self._upkeep.unsettled(limit=limit)

    async def settle(self, connection_id: str) -> None:
        """Finish what a crash left of one connection: replay its journal, or count its unknown outcome.

        Does not wait for a live lease: its holder does the same. Raises DatabaseUnavailable.
        """
        await self._claims.settle(connection_id)

    async def sweep_unreferenced(self, *, older_than_seconds: float = 86_400.0, at: float | None = None) -> int:
        """Destroy secrets that no row names, left by a crash between vault and row or by a move; return how many.

        ``at``: the time to count from, by default the database's now.
        """
        return await self._upkeep.sweep_unreferenced(older_than_seconds=older_than_seconds, at=at)

    def stop_waiting(self) -> None:
        """Let those who wait for another process's refresh end at once: this process is about to stop."""
        self._claims.stop_waiting()

    async def aclose(self) -> None:
        """Finish the refreshes under way (each ends within its time limit) and give their leases back.

        Those that only wait for another process end at once.
        """
        self._claims.stop_waiting()
        await self._refreshing.finish()
