"""Secrets and the rows that name them: what does not open, what is named and not there, what is there and named by nobody."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Final

from sqlmodel import Session, col, select

from broker.app import Parts
from broker.cli.doctor.findings import Finding, bounded
from broker.database import now
from broker.models import Connection, WebhookSecret, WebhookSource, WebhookSubscription
from broker.vault.scan import find_misnamed, find_unreadable
from broker.webhooks.secrets import PREFIX, SETTINGS_PREFIX, settings_owner, vault_owner

OF_CONNECTIONS: Final = "connections/"
SWEPT_SECONDS: Final = 2 * 86_400.0  # the worker destroys after one day what no row names
BATCH: Final = 500
RECONNECT: Final = "restore it (docs/backup-and-restore.md), or connect the account again"
Named = dict[str, str]  # the vault's owner -> how its row is told


async def unreadable(parts: Parts) -> list[Finding]:
    """Open every sealed value of the database (what ``Sealer.refresh`` raises)."""
    found = await find_unreadable(parts.database, parts.sealer)
    told = [f"{one.owner} version {one.version} ({one.place}) {one.why}" for one in found]
    return bounded(
        [Finding("secrets", "failed", detail, RECONNECT) for detail in told],
        otherwise=Finding("secrets", "ok", "every sealed value opens"),
    )


async def of_connections(parts: Parts) -> list[Finding]:
    """Find connections that name no secret, or an older one than the newest, and secrets that no connection names.

    Raises SecretStoreUnavailable, DatabaseUnavailable. Versions are compared where secrets are sealed rows; in a store of its
    own it would be a call for each.
    """
    is_local = parts.settings.vault == "local"
    found = await _misnamed(parts) if is_local else await _lost(parts)
    fine = "names the newest version of its secret" if is_local else "has its secret"
    found += await _unnamed(parts)
    return bounded(found, otherwise=Finding("connections", "ok", f"every connection {fine}"))


async def _misnamed(parts: Parts) -> list[Finding]:
    findings = []
    for one in sorted(await find_misnamed(parts.database), key=lambda one: not one.lost):
        stored = "there is none" if one.stored is None else f"the newest is {one.stored}"
        hint = "" if one.lost else ": a crash left it, or somebody put the row back"
        detail = f"{one.connection_id} names version {one.version} of its secret, {stored}{hint}"
        advice = RECONNECT if one.lost else "ask again in a minute; if it stays, somebody wrote the row: look who can"
        findings.append(Finding("connections", "failed" if one.lost else "warning", detail, advice))
    return findings


async def _lost(parts: Parts) -> list[Finding]:
    named = await parts.database.read(naming_connections)
    stored = {owner for owner, _ in await parts.vault.owners(OF_CONNECTIONS)}
    missing = sorted(set(named) - stored)
    still = await parts.database.read(partial(naming_connections, only=missing)) if missing else set()
    return [
        Finding("connections", "failed", f"{one.removeprefix(OF_CONNECTIONS)} has no secret in the store", RECONNECT)
        for one in sorted(still)
    ]


def naming_connections(session: Session, *, only: Sequence[str] | None = None) -> set[str]:
    """Return the vault's owners that connections name, of all or of these."""
    query = select(Connection.id).where(col(Connection.secret_version) > 0)
    if only is None:
        return {OF_CONNECTIONS + one for one in session.exec(query.where(col(Connection.deleted_at).is_(None)))}
    found: set[str] = set()
    for start in range(0, len(only), BATCH):
        ids = [one.removeprefix(OF_CONNECTIONS) for one in only[start : start + BATCH]]
        alive = query.where(col(Connection.id).in_(ids), col(Connection.deleted_at).is_(None))
        found |= {OF_CONNECTIONS + one for one in session.exec(alive)}
    return found


async def _unnamed(parts: Parts) -> list[Finding]:
    """Find secrets that the sweeper should have destroyed; one of a connection that is being deleted is not meant."""
    stored = await parts.vault.owners(OF_CONNECTIONS)
    known, at = await parts.database.read(_any_connection)
    old = [owner for owner, made_at in stored if made_at < at - SWEPT_SECONDS and owner not in known]
    detail = "is the secret of no connection, for more than two days"
    advice = "a worker destroys it within the hour: see that one runs, and what it logs as worker.failed"
    return [Finding("connections", "warning", f"{owner} {detail}", advice) for owner in old]


def _any_connection(session: Session) -> tuple[Collection[str], float]:
    ids = session.exec(select(Connection.id).where(col(Connection.secret_version) > 0))
    return {OF_CONNECTIONS + one for one in ids}, now(session)


async def of_webhooks(parts: Parts) -> list[Finding]:
    """Find webhook sources and subscriptions whose secret is not in the vault (SecretStoreUnavailable, DatabaseUnavailable)."""
    named = await parts.database.read(naming_webhooks)
    stored = {owner for prefix in (PREFIX, SETTINGS_PREFIX) for owner, _ in await parts.vault.owners(prefix)}
    missing = {owner: told for owner, told in named.items() if owner not in stored}
    if missing:  # what was rotated meanwhile is no finding
        again = await parts.database.read(naming_webhooks)
        missing = {owner: told for owner, told in missing.items() if owner in again}
    advice = "give or make a new secret: PATCH or …/secrets of a source, …/rotate-secret of a subscription"
    found = [Finding("webhook_secrets", "failed", told, advice) for told in missing.values()]
    found += [Finding("webhook_secrets", "failed", told, advice) for told in await parts.database.read(_unsigned)]
    ok = Finding("webhook_secrets", "ok", "every source and subscription has its secrets")
    return bounded(found, otherwise=ok)


def naming_webhooks(session: Session) -> Named:
    """Return the vault's owners that live webhook secrets and the settings of sources are under."""
    at = now(session)
    live = col(WebhookSecret.expires_at).is_(None) | (col(WebhookSecret.expires_at) > at)
    rows = session.exec(select(WebhookSecret).where(live).order_by(col(WebhookSecret.id)))
    named = {vault_owner(row.id): f"{row.owner_id} has no value for its secret {row.id}" for row in rows}
    sources = session.exec(select(WebhookSource).where(col(WebhookSource.settings_version) > 0))
    of_settings = {
        settings_owner(row.id, row.settings_version): f"{row.id} lacks its secret settings" for row in sources
    }
    return {**named, **of_settings}


def _unsigned(session: Session) -> list[str]:
    """Tell of active subscriptions that have no secret to sign with."""
    owning = select(WebhookSecret.owner_id)
    query = select(WebhookSubscription.id).where(
        col(WebhookSubscription.active),
        WebhookSubscription.signature == "v1",
        col(WebhookSubscription.id).not_in(owning),
    )
    return [f"{one} is active and has no secret to sign with" for one in session.exec(query)]
