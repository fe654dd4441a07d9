"""Revoke at the provider what a connection holds, unless another would die with it, and finish its deletion."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.audit import Audit
from broker.credentials.claims import Claims
from broker.credentials.freezes import being_ended
from broker.credentials.leases import Lease, require_lease
from broker.credentials.outcomes import system_entry
from broker.credentials.stored_secrets import StoredSecrets
from broker.credentials.usable import require_pinned, require_same_client
from broker.database import Database, now
from broker.egress import Egress
from broker.errors import BrokerError, SecretStoreUnavailable
from broker.integrations import Configured, Integrations
from broker.models import CallLine, Connection, RefreshAttempt, RefreshJournal, RefreshLease
from providers.spec import Credential, Secret

Revoked = Literal["revoked", "unsupported", "failed", "skipped", "skipped_shared_grant"]
log = structlog.get_logger()


class SecretLost(SecretStoreUnavailable):
    """The store answers, but what it has of this connection does not open: no outage, so waiting does not help."""


class Revoking:
    """Revokes credentials and removes deleted connections."""

    def __init__(
        self,
        database: Database,
        stored: StoredSecrets,
        egress: Egress,
        integrations: Integrations,
        audit: Audit,
        claims: Claims,
    ) -> None:
        """Keep the parts. ``before_the_end``: see ``Credentials.do_before_the_end``."""
        self.before_the_end: Callable[[Connection], Awaitable[None]] = _nothing
        self._database = database
        self._stored = stored
        self._egress = egress
        self._integrations = integrations
        self._audit = audit
        self._claims = claims

    async def at_provider(self, row: Connection) -> Revoked:
        """Revoke what the connection holds, unless another would die with it. See ``Credentials.revoke_at_provider``."""
        if row.secret_version > 0:
            await self.before_the_end(row)
        return await self._revoke(row)

    async def _revoke(self, row: Connection) -> Revoked:
        provider = self._integrations.catalog.get(row.provider)
        revocation = provider.oauth2.revocation if provider is not None and provider.oauth2 is not None else None
        if row.credential_type != "oauth2" or (provider is not None and revocation is None):
            return "unsupported"  # known without asking anybody for the integration's addresses
        configured = await self._integrations.configured(row.integration, variables=row.variables)
        if revocation is None:
            return "failed"  # the provider's file is gone
        require_pinned(row, configured)
        require_same_client(row, configured)
        credential = await self._credential(row, configured)
        kills = revocation.kills_with_refresh if credential.refresh_token is not None else revocation.kills
        if kills in {"grant", "project"} and await self._shared(row, project=kills == "project"):
            return "skipped_shared_grant"
        done = await self._egress.converse(revocation.dialogue(credential), origins=set(row.pins.values()))
        return "revoked" if done else "failed"

    async def dispose(self, connection_id: str, *, known: Revoked | None = None) -> Revoked:
        """Finish the deletion of a row marked ``deleted_at``. See ``Credentials.dispose``."""
        async with self._claims.holding(connection_id) as claimed:
            if known is None and await self._database.read(lambda session: _is_being_ended(session, connection_id)):
                return "skipped"
            if claimed.row.secret_version > 0:
                await self.before_the_end(claimed.row)
            result = known or await self._revoke_deleted(claimed.row)
            await self._stored.destroy(connection_id)
            await self._remove(claimed.row, claimed.lease, result)
        return result

    async def _revoke_deleted(self, row: Connection) -> Revoked:
        if not row.revoke_on_delete or row.secret_version <= 0:  # a revocation has destroyed it already
            return "skipped"
        try:
            return await self._revoke(row)
        except BrokerError:
            return "failed"

    async def _remove(self, row: Connection, lease: Lease, result: Revoked) -> None:
        """Remove the row and all that hangs on it, the lease too (LeaseLost: then nothing is removed)."""

        def work(session: Session) -> None:
            require_lease(session, lease)
            for table in (RefreshAttempt, RefreshJournal, RefreshLease):
                session.execute(sa.delete(table).where(col(table.connection_id) == row.id))
            session.execute(sa.delete(Connection).where(col(Connection.id) == row.id))
            # after the row: from now on no process writes further lines of it (``activity.stored.add_lines``)
            session.execute(sa.delete(CallLine).where(col(CallLine.connection_id) == row.id))
            self._audit.append(session, system_entry("connection.disposed", row, revocation=result))

        await self._database.transaction(work)

    async def _credential(self, row: Connection, configured: Configured) -> Credential:
        value = await self._stored.content(row.id, row.secret_version)
        if value is None:
            log.critical("credential.unreadable", connection_id=row.id, secret_version=row.secret_version)
            raise SecretLost("the secret of this connection cannot be opened")
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
            variables=configured.variables,
            at=await self._database.read(now),
        )

    async def _shared(self, row: Connection, *, project: bool) -> bool:
        query = select(Connection.id).where(*_dies_with(row, project=project)).limit(1)
        return await self._database.read(lambda session: session.exec(query).first() is not None)


async def _nothing(row: Connection) -> None:
    """Undo nothing: nobody has made anything with this connection's credential."""


def _is_being_ended(session: Session, connection_id: str) -> bool:
    return bool(session.execute(sa.select(being_ended(connection_id))).scalar_one())


def _dies_with(row: Connection, *, project: bool) -> list[sa.ColumnElement[bool]]:
    """Return the conditions of another live connection of the same account that would die with this one's grant.

    Only a flow proves an account: what an import says of its account could keep a stranger's grant alive. Where the account
    of either is unknown, the same subject is taken for the same account. ``project``: the provider ends what was granted to
    the client's whole project, in which any of its integrations may be.
    """
    shared = (col(Connection.subject) == row.subject) & (col(Connection.status) != "pending")
    if row.account_id is not None:
        proven = (col(Connection.account_id) == row.account_id) & col(Connection.flow_id).is_not(None)
        shared = proven | (shared & col(Connection.account_id).is_(None))
    same = [
        shared,
        col(Connection.id) != row.id,
        col(Connection.deleted_at).is_(None),
        col(Connection.status) != "revoked",
    ]
    if project:
        return [*same, col(Connection.provider) == row.provider]
    return [*same, col(Connection.integration) == row.integration, col(Connection.client_id) == row.client_id]
