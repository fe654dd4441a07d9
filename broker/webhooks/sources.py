"""Webhook sources: where providers post, how each request is proven, and with which secrets.

Every change is one transaction, with its audit entry and the number by which the other processes learn of it. What is secret
goes into the vault before it, and what no row names any more leaves the vault after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker.audit import Audit, Entry
from broker.database import Database, now
from broker.errors import Conflict, FieldError, Forbidden, InvalidRequest, NotFound
from broker.models import Connection, WebhookRejection, WebhookSecret, WebhookSource, new_id
from broker.policy import Principal, Target, allowed
from broker.settings import Settings
from broker.vault import Vault
from broker.webhooks import secrets as kept
from broker.webhooks.configured import Source
from broker.webhooks.known_sources import KnownSources
from broker.webhooks.registrations import shown
from broker.webhooks.revision import Revision, changed
from broker.webhooks.secrets import CERTAIN, LastUsed, Origin, Secrets
from broker.webhooks.source_config import (
    Plan,
    Status,
    checked_fields,
    checked_secret,
    generated_secret,
    kept_config,
    learns,
    may_generate,
    merged_config,
    planned,
    status_of,
    webhook_of,
)
from providers.spec import Provider, Secret, Webhook

MOST_SECRETS: Final = 10
CHANGED: Final = "the source was changed meanwhile; try again"
NOT_THEIRS: Final = (
    "a hook is made with the connection's token: that takes an admin, or a grant that may have the token"
)


class Registrar(Protocol):
    """What has hooks made and removed at providers. Both run in the transaction of the change, and only write rows."""

    def want(self, session: Session, source: WebhookSource) -> bool:
        """Ask for a hook (InvalidRequest where the provider's file or the source's connection has none).

        Return whether it is made, or made anew: False where one stands that is as the source says.
        """

    def unwant(self, session: Session, source_id: str) -> None:
        """Have the source's hooks removed, if it has any."""

    def make_again(self, session: Session, source: WebhookSource) -> None:
        """Have the provider told of the source's newest secret, if it has a hook that is told one."""


@dataclass(frozen=True, slots=True)
class SourceDraft:
    """A new source as it was asked for. ``generate``: make a secret where none is given, if that is worth something."""

    name: str
    provider: str
    secret: Secret | None = None
    generate: bool = True
    connection_id: str | None = None
    register: bool = False
    tolerance_seconds: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class SourceView:
    """A source as it is shown: never with a secret. ``webhook`` None: the provider's file does not configure it.

    ``hook``: what is known of its hook at the provider, if it has one.
    """

    row: WebhookSource
    secrets: Sequence[WebhookSecret]
    status: Status
    status_reason: str | None
    webhook: Webhook | None
    url: str
    hook: Mapping[str, Any] | None = None


class Sources:
    """All sources. One for a process; calls may run at once, and on several replicas."""

    def __init__(
        self,
        database: Database,
        vault: Vault,
        audit: Audit,
        catalog: Mapping[str, Provider],
        settings: Settings,
        *,
        revision: Revision,
        registrar: Registrar | None = None,
    ) -> None:
        """Keep the parts; nothing is read yet. ``registrar`` None: no hooks are made at providers."""
        self._database = database
        self._audit = audit
        self._settings = settings
        self._registrar = registrar
        self._revision = revision
        self._secrets = Secrets(database, vault, audit)
        self._used = LastUsed(database)
        self._known = KnownSources(
            database, self._secrets, revision, catalog, cache_seconds=settings.secret_cache_seconds
        )
        self.catalog = catalog

    async def aclose(self) -> None:
        """Write what is still to be written of when secrets were used."""
        await self._used.aclose()

    # Of requests that providers send

    async def known(self, source_id: str) -> Source | None:
        """Return a source as it was at most half a second ago, with its opened secrets; None for one that is not there.

        Whether it is enabled is not checked. Raises DatabaseUnavailable, SecretStoreUnavailable; Overloaded for a source that
        its provider's file no longer configures: what it would check is not known.
        """
        return await self._known.known(source_id)

    def note_used(self, secret_id: str) -> None:
        """Remember that a request was proven with this secret; it is written behind the call."""
        self._used.note(secret_id)

    async def learn(self, source: Source, secret: Secret) -> bool:
        """Keep a secret that a handshake brought; return whether it is the source's now.

        Of two that come at once one is kept. A source that has a secret learns none, but an equal one is fine: the provider
        asks again where the answer was lost. InvalidRequest for what can be no secret. Raises SecretStoreUnavailable,
        DatabaseUnavailable.
        """
        checked_secret(source.webhook, secret)
        stored = await self._secrets.store(secret, source.id, "learned", None)

        def work(session: Session) -> WebhookSecret:
            _locked(session, source.id)
            held = kept.live(session, [source.id])
            if held:
                same = self._secrets.same(session, source.id, secret)
                return same or held[0]
            row = kept.insert(session, stored)
            self._record(session, "secret_learned", None, source.id, secret_id=row.id)
            return row

        row = await self._secrets.written(stored, work)
        if row.id == stored.id:
            self._revision.forget()
            return True
        return self._secrets.is_of(row, secret)

    async def expire_secrets(self) -> int:
        """Remove the secrets of sources and subscriptions whose time is over; return how many. For the worker."""
        return await self._secrets.expire()

    # Reading

    async def get(self, source_id: str) -> SourceView:
        """Return one source (NotFound)."""

        def work(session: Session) -> SourceView:
            row = session.get(WebhookSource, source_id)
            if row is None:
                raise NotFound
            return self._view(row, kept.live(session, [source_id]), shown(session, [source_id]))

        return await self._database.read(work)

    async def page(self, *, limit: int, before: tuple[float, str] | None = None) -> list[SourceView]:
        """Return the newest sources first, after the cursor position ``before``."""

        def work(session: Session) -> list[SourceView]:
            query = select(WebhookSource)
            if before is not None:
                query = query.where(sa.tuple_(col(WebhookSource.created_at), col(WebhookSource.id)) < before)
            newest_first = query.order_by(col(WebhookSource.created_at).desc(), col(WebhookSource.id).desc())
            rows = list(session.exec(newest_first.limit(limit)))
            ids = [row.id for row in rows]
            secrets, hooks = kept.live(session, ids), shown(session, ids)
            return [self._view(row, [one for one in secrets if one.owner_id == row.id], hooks) for row in rows]

        return await self._database.read(work)

    async def rejections(self, source_id: str, *, limit: int, before: int | None) -> list[WebhookRejection]:
        """Return what the source refused, newest first, from the one before the id ``before`` on (NotFound)."""

        def work(session: Session) -> list[WebhookRejection]:
            if session.get(WebhookSource, source_id) is None:
                raise NotFound
            query = select(WebhookRejection).where(WebhookRejection.source_id == source_id)
            if before is not None:
                query = query.where(col(WebhookRejection.id) < before)
            return list(session.exec(query.order_by(col(WebhookRejection.id).desc()).limit(limit)))

        return await self._database.read(work)

    def _view(
        self, row: WebhookSource, secrets: Sequence[WebhookSecret], hooks: Mapping[str, Mapping[str, Any]]
    ) -> SourceView:
        url = row.config.get("public_url") or f"{self._settings.public_url}/webhooks/{row.id}"
        webhook = webhook_of(row, self.catalog)
        status, reason = status_of(row, webhook, has_secret=bool(secrets))
        return SourceView(row, secrets, status, reason, webhook, url, hooks.get(row.id))

    # Writing

    async def create(self, draft: SourceDraft, actor: Principal) -> tuple[SourceView, Secret | None]:
        """Make a source; return it, with the secret if one was made here, to be shown once.

        InvalidRequest names each field that is wrong; Conflict when the name is taken; NotFound never.
        """
        plan = self._planned(draft.provider, draft.config)
        checked_fields(name=draft.name, tolerance_seconds=draft.tolerance_seconds)
        value, generated = self._first_secret(draft, plan.webhook)
        source_id = new_id("src")
        stored = await self._stored(value, source_id, "generated" if generated else "given", actor)
        version = await self._secrets.store_settings(source_id, plan.hidden)

        def work(session: Session) -> None:
            at = now(session)
            row = WebhookSource(
                id=source_id,
                name=draft.name,
                provider=draft.provider,
                kind=plan.config.kind,
                connection_id=draft.connection_id,
                register_at_provider=draft.register,
                tolerance_seconds=draft.tolerance_seconds,
                config=kept_config(plan),
                settings_version=version,
                enabled=draft.enabled,
                created_by=actor.caller_id,
                created_at=at,
                updated_at=at,
            )
            session.add(row)
            session.flush()
            if stored is not None:
                kept.insert(session, stored)
            self._linked(session, row, actor)
            self._record(session, "created", actor, source_id, provider=row.provider, register=row.register_at_provider)

        try:
            await self._secrets.written(stored, work)
        except CERTAIN as error:
            await self._secrets.destroy_settings(source_id, version)
            raise _name_taken(error) from None
        self._revision.forget()
        return await self.get(source_id), value if generated else None

    def _planned(self, provider_name: str, config: Mapping[str, Any]) -> Plan:
        provider = self.catalog.get(provider_name)
        if provider is None or not provider.webhooks:
            detail = "is not in the catalog" if provider is None else "has no webhooks"
            raise InvalidRequest(errors=[FieldError("/provider", detail)])
        return planned(provider, config, development=self._settings.development)

    def _first_secret(self, draft: SourceDraft, webhook: Webhook) -> tuple[Secret | None, bool]:
        """Return the secret to begin with, and whether it was made here."""
        if draft.secret is not None:
            checked_secret(webhook, draft.secret)
            return draft.secret, False
        brought = draft.register and webhook.registration is not None and webhook.registration.brings_secret
        if not draft.generate or brought or learns(webhook) or not may_generate(webhook):
            return None, False
        return generated_secret(webhook), True

    async def update(self, source_id: str, changes: Mapping[str, Any], actor: Principal) -> SourceView:
        """Change the given fields: ``name, connection_id, register, tolerance_seconds, enabled`` and ``config`` (RFC 7396).

        Raises NotFound, InvalidRequest, Conflict (also when somebody else changed it meanwhile). Provider and kind stay.
        """
        seen = (await self.get(source_id)).row
        hidden = await self._secrets.open_settings(source_id, seen.settings_version)
        plan = self._planned(seen.provider, merged_config(seen, hidden, changes.get("config", {})))
        if plan.config.kind != seen.kind:
            raise InvalidRequest(errors=[FieldError("/config/kind", "cannot be changed")])
        checked_fields(name=changes.get("name"), tolerance_seconds=changes.get("tolerance_seconds"))
        version = seen.settings_version
        if plan.hidden != hidden:
            version = await self._secrets.store_settings(source_id, plan.hidden)
        fields = {name: value for name, value in changes.items() if name not in {"config", "register"}}
        if "register" in changes:
            fields["register_at_provider"] = changes["register"]

        def work(session: Session) -> None:
            row = _locked(session, source_id)
            if (row.updated_at, row.settings_version) != (seen.updated_at, seen.settings_version):
                raise Conflict(CHANGED)
            at = max(now(session), row.updated_at + 0.001)  # so that a change is never overlooked
            for name, value in {**fields, "config": kept_config(plan), "settings_version": version}.items():
                setattr(row, name, value)
            row.updated_at = at
            session.flush()
            if {"register", "connection_id", "config"} & changes.keys():
                self._linked(session, row, actor)
            self._record(session, "updated", actor, source_id, fields=sorted(changes))

        replaced = version != seen.settings_version
        try:
            await self._database.transaction(work)
        except CERTAIN as error:
            await self._secrets.destroy_settings(source_id, version if replaced else 0)
            raise _name_taken(error) from None
        await self._secrets.destroy_settings(source_id, seen.settings_version if replaced else 0)
        self._revision.forget()
        return await self.get(source_id)

    def _linked(self, session: Session, row: WebhookSource, actor: Principal) -> None:
        """Check the source's connection, and have its hook made, or removed, at the provider.

        A hook is made with the connection's credential and tells what the account has to an address that the source names:
        Forbidden for who could not have the token itself.
        """
        connection = session.get(Connection, row.connection_id) if row.connection_id is not None else None
        if row.connection_id is not None and (
            connection is None or connection.deleted_at is not None or connection.status == "pending"
        ):
            raise InvalidRequest(errors=[FieldError("/connection_id", "is no connection")])
        if not row.register_at_provider:
            if self._registrar is not None:
                self._registrar.unwant(session, row.id)
            return
        if connection is None:
            raise InvalidRequest(errors=[FieldError("/connection_id", "is needed to register at the provider")])
        webhook = webhook_of(row, self.catalog)
        if self._registrar is None or webhook is None or webhook.registration is None:
            raise InvalidRequest(errors=[FieldError("/register", "this kind of source is registered by hand")])
        target = Target(connection.integration, connection.subject, connection.tags)
        if self._registrar.want(session, row) and not allowed(actor, "token", target):
            raise Forbidden(NOT_THEIRS)

    async def delete(self, source_id: str, actor: Principal) -> None:
        """Remove a source, its secrets and its log of rejections (NotFound). Its events stay, and can be replayed."""

        def work(session: Session) -> tuple[list[str], int]:
            row = _locked(session, source_id)
            if self._registrar is not None:
                self._registrar.unwant(session, source_id)
            ids = kept.take_all(session, source_id)
            session.execute(sa.delete(WebhookRejection).where(col(WebhookRejection.source_id) == source_id))
            session.execute(sa.delete(WebhookSource).where(col(WebhookSource.id) == source_id))
            self._record(session, "deleted", actor, source_id)
            return ids, row.settings_version

        ids, settings_version = await self._database.transaction(work)
        self._revision.forget()
        await self._secrets.destroy(ids)
        await self._secrets.destroy_settings(source_id, settings_version)

    # Secrets

    async def add_secret(
        self, source_id: str, value: Secret | None, actor: Principal, *, expires_old_in: float | None = None
    ) -> tuple[WebhookSecret, Secret | None]:
        """Make a further secret live; return its row, and the secret where none was given and one was made.

        One that is live already is not added again. ``expires_old_in``: how many seconds the others still count; None: until
        they are deleted. Raises NotFound, InvalidRequest, Conflict for too many.
        """
        webhook = (await self.get(source_id)).webhook
        if webhook is None:
            raise Conflict("the provider's file does not configure this source any more")
        given = value is not None
        if value is None:
            if not may_generate(webhook):
                raise InvalidRequest(errors=[FieldError("/secret", "is required: only the provider can make it")])
            value = generated_secret(webhook)
        checked_secret(webhook, value)
        stored = await self._secrets.store(value, source_id, "given" if given else "generated", actor.caller_id)

        def work(session: Session) -> WebhookSecret:
            source = _locked(session, source_id)
            row = self._secrets.same(session, source_id, value)
            if row is None:
                if len(kept.live(session, [source_id])) >= MOST_SECRETS:
                    raise Conflict(f"there are {MOST_SECRETS} secrets; delete one first")
                row = kept.insert(session, stored)
            if expires_old_in is not None:
                row.expires_at = None
                kept.end_others(session, row, expires_old_in)
            self._told(session, source)
            self._record(session, "secret_added", actor, source_id, secret_id=row.id, expires_old_in=expires_old_in)
            return row

        row = await self._secrets.written(stored, work)
        self._revision.forget()
        return row, None if given else value

    async def delete_secret(self, source_id: str, secret_id: str, actor: Principal) -> None:
        """Take a secret out of use and destroy it (NotFound)."""

        def work(session: Session) -> None:
            source = _locked(session, source_id)
            row = session.get(WebhookSecret, secret_id)
            if row is None or row.owner_id != source_id:
                raise NotFound
            session.delete(row)
            session.flush()
            self._told(session, source)
            self._record(session, "secret_deleted", actor, source_id, secret_id=secret_id)

        await self._database.transaction(work)
        self._revision.forget()
        await self._secrets.destroy([secret_id])

    def _told(self, session: Session, source: WebhookSource) -> None:
        if self._registrar is not None and source.register_at_provider:
            self._registrar.make_again(session, source)

    async def _stored(
        self, value: Secret | None, owner_id: str, origin: Origin, actor: Principal
    ) -> WebhookSecret | None:
        return None if value is None else await self._secrets.store(value, owner_id, origin, actor.caller_id)

    def _record(self, session: Session, what: str, actor: Principal | None, source_id: str, **detail: Any) -> None:  # noqa: ANN401 - JSON values
        """Write the audit entry, and the number by which others learn of the change: the last statements, which lock."""
        by = actor.caller_id if actor is not None else "system"
        self._audit.append(session, Entry(f"webhook_source.{what}", by, detail={"source_id": source_id, **detail}))
        changed(session)


def _locked(session: Session, source_id: str) -> WebhookSource:
    row = session.get(WebhookSource, source_id, with_for_update=True)
    if row is None:
        raise NotFound
    return row


def _name_taken(error: Exception) -> Exception:
    return Conflict("a source of this name exists") if isinstance(error, IntegrityError) else error
