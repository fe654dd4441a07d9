"""What a refresh came to, written to the row in one fenced transaction: a new token, a failure, or a loss."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col

from broker.announcing import announce_connection
from broker.audit import Audit, Entry
from broker.credentials.leases import Claimed, Lease, LeaseLost, require_lease
from broker.credentials.renewals import dialogue_of, renewable, renewed_value
from broker.credentials.stored_secrets import Overtaken, StoredSecrets
from broker.database import Database, now
from broker.integrations import Integrations
from broker.integrations.config import own_variables
from broker.models import Connection, RefreshAttempt, RefreshJournal
from broker.refresh import Failure, Tally, Verdict, after_attempt, refresh_ends_at
from broker.telemetry import Metrics
from broker.token_endpoint import TokenAnswer, granted_scopes
from providers.spec import OAuth2

log = structlog.get_logger()


class Outcomes:
    """Records how attempts ended. LeaseLost when the fence moved on: then nothing is written."""

    def __init__(
        self,
        database: Database,
        stored: StoredSecrets,
        integrations: Integrations,
        audit: Audit,
        metrics: Metrics,
        *,
        confirm_seconds: float,
    ) -> None:
        """Keep the parts; the seconds are those of ``Credentials``."""
        self._database = database
        self._stored = stored
        self._integrations = integrations
        self._audit = audit
        self._metrics = metrics
        self._confirm_seconds = confirm_seconds

    def oauth2_of(self, row: Connection) -> OAuth2:
        """Return the rules by which an answer to a renewal of this connection is judged."""
        return dialogue_of(self._integrations.catalog.get(row.provider), row.credential_type)

    async def store(
        self, claimed: Claimed, answer: TokenAnswer, *, received_at: float, old_value: Mapping[str, Any]
    ) -> None:
        """Put a new token into the vault, then let the row name it. ``old_value``: the secret that was renewed."""
        row, oauth2 = claimed.row, self.oauth2_of(claimed.row)
        value = renewed_value(old_value, answer, received_at=received_at, keep_old=oauth2.refresh.keep_old)
        try:
            version = await self._stored.put(row.id, value, expected_version=row.secret_version)
        except Overtaken:
            raise LeaseLost from None  # whoever overtook us did the same work
        changes = {
            **_changes(oauth2, row, answer, received_at=received_at),
            "secret_version": version,
            "refreshable": renewable(value),
            "variables": {
                **row.variables,
                **self._said(row, answer),
            },  # the pins stay: what moved is ``origin_changed``
        }
        changes.update({"refresh_expires_at": None} if "refresh_token" not in value else {})
        await self._record(claimed.lease, changes, system_entry("connection.refreshed", row, version=version))
        self._metrics.refresh_outcome(row.provider, "ok")
        late_seconds = None if row.token_expires_at is None else round(received_at - row.token_expires_at, 1)
        log.info(
            "refresh.stored",
            **_story(claimed),
            version=version,
            rotated=value.get("refresh_token") != old_value.get("refresh_token"),
            expires_in=None if answer.expires_at is None else round(answer.expires_at - received_at),
            after_expiry_seconds=late_seconds,  # negative: in time
            after_failures=row.refresh_failures,
        )
        if answer.odd:
            log.warning("refresh.odd_answer", connection_id=row.id, provider=row.provider, members=list(answer.odd))
        if not renewable(value):
            log.warning("refresh.no_refresh_token", connection_id=row.id, provider=row.provider)

    def _said(self, row: Connection, answer: TokenAnswer) -> dict[str, str]:
        provider = self._integrations.catalog.get(row.provider)
        return own_variables(provider, answer.variables) if provider is not None else {}

    async def drop(self, lease: Lease) -> None:
        """Forget an attempt whose answer is of no use any more; the row stays as it is."""
        await self._record(lease, {})

    async def fail(self, claimed: Claimed, failure: Failure) -> Verdict:
        """Record a failed attempt: when to try again, or that only the user can help."""

        def work(session: Session) -> Verdict:
            return self.judge(session, _finished(session, claimed.lease), failure, now(session))

        verdict = await self._database.transaction(work)
        self.tell(claimed, verdict, cut_off=False)
        return verdict

    def judge(self, session: Session, row: Connection, failure: Failure, at: float) -> Verdict:
        """Write what follows from a failure to the (locked) row; a loss is audited, once."""
        verdict = after_attempt(
            self.oauth2_of(row).refresh,
            failure,
            Tally(row.refresh_failures, row.unknown_outcomes, row.refresh_not_before_at, row.refusals),
            expires_at=row.token_expires_at,
            now=at,
            random_share=random.random(),  # noqa: S311 - spreading, not secrecy
            confirm_seconds=self._confirm_seconds,
        )
        tally = verdict.tally
        row.refresh_failures, row.unknown_outcomes, row.refusals = (
            tally.failures,
            tally.unknown_outcomes,
            tally.refusals,
        )
        row.refresh_not_before_at = tally.not_before_at
        entries: list[Entry] = []
        if row.status == "active":  # what is frozen or revoked stays so
            row.status_reason = verdict.reason
            if verdict.lost:
                row.status = "reauthorization_required"
                entries = [system_entry("connection.reauthorization_required", row, reason=verdict.reason)]
                announce_connection(session, "reauthorization_required", row)
        session.flush()
        self._audit.append(session, *entries)
        return verdict

    def tell(self, claimed: Claimed, verdict: Verdict, *, cut_off: bool) -> None:
        """Count and log a failure, once its transaction is through. ``cut_off``: a crash left it."""
        outcome = "lost" if verdict.lost else verdict.reason
        self._metrics.refresh_outcome(claimed.row.provider, outcome)
        log.warning(
            "refresh.lost" if verdict.lost else "refresh.failed",
            **_story(claimed),
            reason=verdict.reason,
            cut_off=cut_off,
            failures=verdict.tally.failures,
            unknown_outcomes=verdict.tally.unknown_outcomes,
            refusals=verdict.tally.refusals,
            again_at=verdict.tally.not_before_at,
        )

    async def _record(self, lease: Lease, changes: Mapping[str, Any], *entries: Entry) -> None:
        def work(session: Session) -> None:
            row = _finished(session, lease)
            for name, value in changes.items():
                setattr(row, name, value)
            if changes and row.status == "active":
                row.status_reason = None
            session.flush()
            self._audit.append(session, *entries)

        await self._database.transaction(work)


def _story(claimed: Claimed) -> dict[str, Any]:
    """Return what every line about one refresh has, so that its lines can be found together."""
    row = claimed.row
    return {
        "connection_id": row.id,
        "integration": row.integration,
        "provider": row.provider,
        "fence": claimed.lease.fence,
    }


def system_entry(action: str, row: Connection, **detail: Any) -> Entry:  # noqa: ANN401 - JSON values
    """Return the audit record of something that the broker did by itself."""
    return Entry(
        action=action,
        actor="system",
        connection_id=row.id,
        integration=row.integration,
        subject=row.subject,
        detail=detail,
    )


def _changes(oauth2: OAuth2, row: Connection, answer: TokenAnswer, *, received_at: float) -> dict[str, Any]:
    """Return what a token answer changes in the row (pure)."""
    changes: dict[str, Any] = {
        "token_expires_at": answer.expires_at,
        "refreshed_at": received_at,
        "refresh_failures": 0,
        "refresh_not_before_at": None,
        "unknown_outcomes": 0,
        "refusals": 0,
    }
    if answer.scopes is not None:
        changes["scopes"] = list(granted_scopes(oauth2, row.scopes, answer))
    changes["refresh_expires_at"] = refresh_ends_at(
        oauth2.refresh, answer.refresh_expires_at, received_at=received_at, before=row.refresh_expires_at
    )
    return changes


def _finished(session: Session, lease: Lease) -> Connection:
    """End an attempt: check the lease, forget attempt and journal, and return the locked row."""
    require_lease(session, lease)
    for table in (RefreshAttempt, RefreshJournal):
        session.execute(sa.delete(table).where(col(table.connection_id) == lease.connection_id))
    row = session.get(Connection, lease.connection_id, with_for_update=True)
    if row is None:
        raise LeaseLost
    return row
