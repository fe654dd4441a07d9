"""Configured providers: their effective endpoints, their client secrets (several live at once), import and export.

An integration is a provider's file plus overrides. Endpoints that ``issuer`` discovers are cached for an hour; single URLs
in ``config`` win over discovered ones, and both over the provider's file. Changing an endpoint never moves a credential:
connections pin the origins they were made with (``origins_of``), and only a rebind moves the pins.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import re
import time
import tomllib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker.audit import Audit, Entry
from broker.database import Database, now
from broker.egress import Egress
from broker.errors import (
    BrokerError,
    Conflict,
    FieldError,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    ProviderUnavailable,
    SecretStoreUnavailable,
    UpstreamInvalid,
    UpstreamTimeout,
)
from broker.integrations import client_secrets
from broker.integrations.client_secrets import (
    SecretUse,
    as_tried,
    canary_of,
    end_canary,
    is_run_by,
    new_canary,
    newest_first,
)
from broker.integrations.client_secrets import secret_owner as secret_owner
from broker.integrations.config import (
    ENDPOINT_FIELDS,
    NAME_PATTERN,
    Endpoints,
    IntegrationConfig,
    endpoint_fields,
    endpoint_templates,
    filled,
    filled_endpoints,
    has_endpoints,
    key_problem,
    known_variables,
    merge_patch,
    parse_config,
    scope_problems,
    signs_with_its_secret,
    variables_in,
)
from broker.models import (
    AuditRecord,
    CallLatest,
    CallLine,
    CallMinute,
    ClientSecret,
    Connection,
    Integration,
    IntegrationLog,
    Rotation,
    new_id,
)
from broker.policy import Principal
from broker.settings import Settings, SettingsError
from broker.token_endpoint import Client, Heard, discovery_url, first_not_refused, parse_discovery
from broker.vault import SecretNotFound, SecretUnreadable, Vault
from providers.spec import Incoming, OAuth2, Outgoing, Provider, Secret

DISCOVERY_SECONDS = 3600.0
REFETCH_SECONDS = 10.0
FAILED_SECONDS = 15.0
DISCOVERY_WAIT_SECONDS = 2.0
TEST_SECONDS = 120.0
MOST_SECRETS = 10
MOST_INTEGRATIONS = 10_000
MOST_TIMED = 10_000
MOST_KEPT = 1_000
NO_PROVIDER = "the integration's provider is not in this version's catalog"
RESERVED_NAMES = frozenset({"export", "import"})
Status = Literal["configuring", "testing", "active", "inactive", "error"]
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Configured:
    """An integration ready for use: ``endpoints`` are ``templates`` with the known ``variables`` put in."""

    row: Integration
    provider: Provider
    config: IntegrationConfig
    endpoints: Endpoints
    templates: Endpoints
    variables: Mapping[str, str]

    @property
    def oauth2(self) -> OAuth2:
        """The provider's OAuth dialogue (InvalidRequest when it has none)."""
        if self.provider.oauth2 is None:
            raise InvalidRequest("this provider has no OAuth flow")
        return self.provider.oauth2


@dataclass(frozen=True, slots=True)
class Figures:
    """What lines about an integration add up to; ``timed`` of them took ``sum_ms`` together."""

    total: int
    failures: int
    sum_ms: float
    timed: int
    durations_ms: Sequence[float]
    last_at: float | None


@dataclass(frozen=True, slots=True)
class _Kept:
    """An integration as it was built once, and what it was built from. ``bare``: without the discovery that it needs."""

    version: tuple[float | None, float | None]
    discovery: tuple[float, Mapping[str, Any]] | None
    configured: Configured
    bare: asyncio.Task[Configured] | None = None


def _issuer_of(configured: Configured) -> str:
    return filled(configured.config.issuer or "", configured.variables)


def _is_fresh(known: tuple[float, Mapping[str, Any]]) -> bool:
    return time.monotonic() - known[0] < DISCOVERY_SECONDS


def status_of(row: Integration, *, known: bool = True, has_secret: bool, needs_client: bool, at: float) -> Status:
    """Return the read-only status (pure). ``known``: the provider is in the catalog."""
    if not row.enabled:
        return "inactive"
    if not known:
        return "error"
    if needs_client and not (row.client_id and has_secret):
        return "configuring"
    if row.testing_until is not None and row.testing_until > at:
        return "testing"
    return "error" if row.test_error else "active"


@dataclass(frozen=True, slots=True)
class Draft:
    """What may be said of an integration from outside; None leaves a value as it is."""

    name: str
    provider: str | None = None
    description: str | None = None
    client_id: str | None = None
    client_secret: Secret | None = None
    scopes: Sequence[str] | None = None
    config: Mapping[str, Any] | None = None
    enabled: bool | None = None


@dataclass(frozen=True, slots=True)
class View:
    """An integration as it is shown: never with a secret. ``secret_ids`` are those of the live client secrets."""

    row: Integration
    status: Status
    secret_ids: tuple[str, ...]
    status_reason: str | None = None


class Integrations:
    """All configured providers. Methods may run at once and on several replicas."""

    def __init__(
        self,
        database: Database,
        vault: Vault,
        egress: Egress,
        audit: Audit,
        catalog: Mapping[str, Provider],
        settings: Settings,
    ) -> None:
        """Keep the parts; nothing is read or dialled yet."""
        self._database = database
        self._vault = vault
        self._egress = egress
        self._audit = audit
        self._settings = settings
        self.catalog = catalog
        self._discovered: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self._refetched_at: dict[str, float] = {}
        self._fetching: dict[str, asyncio.Lock] = {}
        self._failed: dict[str, tuple[float, BrokerError]] = {}
        self._kept: dict[str, _Kept] = {}
        self._secret_use = SecretUse(database)

    async def aclose(self) -> None:
        """Write what is still to be written of when client secrets were used."""
        await self._secret_use.aclose()

    # Reading

    async def get(self, name: str) -> View:
        """Return one integration (NotFound)."""
        views = await self._views([name])
        if not views:
            raise NotFound
        return views[0]

    async def page(self, *, limit: int, before: tuple[float, str] | None = None) -> list[View]:
        """Return the newest integrations first, after the cursor position ``before``."""

        def work(session: Session) -> list[str]:
            query = select(Integration.name).order_by(col(Integration.created_at).desc(), col(Integration.name).desc())
            if before is not None:
                query = query.where(sa.tuple_(col(Integration.created_at), col(Integration.name)) < before)
            return list(session.exec(query.limit(limit)))

        return await self._views(await self._database.read(work))

    async def every(self) -> list[View]:
        """Return all integrations, newest first."""
        return await self.page(limit=MOST_INTEGRATIONS)

    async def _views(self, names: Sequence[str]) -> list[View]:
        def work(session: Session) -> list[View]:
            at = now(session)
            rows = {row.name: row for row in session.exec(select(Integration).where(col(Integration.name).in_(names)))}
            secrets: dict[str, list[str]] = {}
            found = select(ClientSecret).where(
                col(ClientSecret.integration).in_(names), col(ClientSecret.state) == "live"
            )
            for secret in session.exec(newest_first(found)):
                secrets.setdefault(secret.integration, []).append(secret.id)
            return [self._view(rows[name], secrets.get(name, []), at) for name in names if name in rows]

        return await self._database.read(work)

    def _view(self, row: Integration, secret_ids: list[str], at: float) -> View:
        provider = self.catalog.get(row.provider)
        needs_client = provider is not None and provider.oauth2 is not None
        public = row.config.get("client_auth") == "none"
        known, has_secret = provider is not None, bool(secret_ids) or public
        status = status_of(row, known=known, has_secret=has_secret, needs_client=needs_client, at=at)
        return View(row, status, tuple(secret_ids), row.test_error if known else NO_PROVIDER)

    async def configured(
        self, name: str, *, endpoints: Endpoints | None = None, variables: Mapping[str, str] | None = None
    ) -> Configured:
        """Return an integration with its endpoints, discovering them if need be, or with the given ones.

        ``variables``: those of the connection or flow that it is for. What needs others is not among the endpoints.
        Raises NotFound; Conflict when its provider is no longer in the catalog; ProviderUnavailable or UpstreamInvalid
        when discovery fails.
        """
        return await self._build(name, variables, endpoints=endpoints)

    async def _build(
        self,
        name: str,
        variables: Mapping[str, str] | None,
        *,
        endpoints: Endpoints | None = None,
        discover: bool = True,
    ) -> Configured:
        row = await self._database.read(lambda session: session.get(Integration, name))
        if row is None:
            raise NotFound
        if row.provider not in self.catalog:
            raise Conflict(NO_PROVIDER)
        provider = self.catalog[row.provider]
        config = IntegrationConfig.model_validate(row.config)
        known = known_variables(provider, config, variables)
        templates = endpoints or await self._templates(provider, config, known, discover=discover)
        return Configured(row, provider, config, endpoints or filled_endpoints(templates, known), templates, known)

    def with_variables(self, configured: Configured, variables: Mapping[str, str]) -> Configured:
        """Return the same integration for a connection that has other variables. Not for an issuer that has one."""
        known = known_variables(configured.provider, configured.config, variables)
        endpoints = filled_endpoints(configured.templates, known)
        return replace(configured, endpoints=endpoints, variables=known)

    async def configured_at(
        self, name: str, version: tuple[float | None, float | None], variables: Mapping[str, str]
    ) -> Configured:
        """As ``configured``, for a hand-out: from memory if it is still what ``version`` (created_at, updated_at) names.

        The version has to be read from the database for this call. What comes is shared: do not change it. It spares a
        query and the parsing of the configuration, together half a millisecond of each hand-out.

        A live token needs no discovery. Where none was had yet and none comes within ``DISCOVERY_WAIT_SECONDS``, the
        endpoints are only those that need none: a connection's pins are then judged by what the configuration itself says.
        That is refused (with what discovery raises) where endpoints were changed since the last rebind, or nobody knows: only
        today's origins can tell there. For nothing that is sent to a provider: whoever does that asks ``configured``.
        """
        if not variables:
            return await self._kept_at(name, version)
        configured = await self._kept_at(name, version)
        if variables_in(configured.config.issuer or ""):
            return (await self._soon(name, variables))[0]
        return self.with_variables(configured, variables)

    async def _kept_at(self, name: str, version: tuple[float | None, float | None]) -> Configured:
        kept = self._kept.get(name)
        if kept is not None and kept.version == version and self._still_holds(kept):
            return kept.configured
        configured, bare = await self._soon(name, {})
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        row, discovery = configured.row, self._discovered.get(_issuer_of(configured))
        self._kept[name] = _Kept((row.created_at, row.updated_at), discovery, configured, bare)
        return configured

    async def _soon(
        self, name: str, variables: Mapping[str, str]
    ) -> tuple[Configured, asyncio.Task[Configured] | None]:
        """Return ``configured``, or the same without discovery where that fails or takes long, with what still asks."""
        asking = asyncio.create_task(self.configured(name, variables=variables))
        asking.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved, whoever waits
        await asyncio.wait({asking}, timeout=DISCOVERY_WAIT_SECONDS)
        failure = asking.exception() if asking.done() else UpstreamTimeout("the discovery document does not come")
        if not isinstance(failure, (ProviderUnavailable, UpstreamInvalid, UpstreamTimeout)):
            return asking.result(), None
        bare = await self._build(name, variables, discover=False)
        if _moved_since_rebind(bare.row):
            raise failure
        return bare, asking

    def _still_holds(self, kept: _Kept) -> bool:
        """Return whether its discovered document, if it needs one, is the current one, or no newer can be had just now."""
        issuer = _issuer_of(kept.configured)
        known = self._discovered.get(issuer)
        if kept.bare is not None and known is None and kept.bare.done():
            return self._failed_lately(issuer) is not None
        return kept.discovery is known and (
            known is None or _is_fresh(known) or self._failed_lately(issuer) is not None
        )

    def is_stale(self, configured: Configured) -> bool:
        """Return whether its endpoints were discovered over an hour ago, and no newer document came since."""
        known = self._discovered.get(_issuer_of(configured))
        return known is not None and not _is_fresh(known)

    def _failed_lately(self, url: str) -> BrokerError | None:
        failed = self._failed.get(url)
        return failed[1] if failed is not None and time.monotonic() - failed[0] < FAILED_SECONDS else None

    async def _templates(
        self, provider: Provider, config: IntegrationConfig, variables: Mapping[str, str], *, discover: bool
    ) -> Endpoints:
        discovered: Mapping[str, Any] = {}
        issuer = filled(config.issuer or "", variables)
        if discover and issuer and provider.oauth2 is not None and provider.oauth2.discovery:
            discovered = await self._discover(issuer)
        return endpoint_templates(provider, config, discovered)

    async def _discover(self, issuer: str) -> Mapping[str, Any]:
        """Return the discovery document; an old one while no newer can be had, so that live tokens go on being served.

        Who comes while an old one is fetched anew does not wait for that.
        """
        known = self._discovered.get(issuer)
        if known is None:
            return await self._fetched_discovery(issuer)
        fetching = self._fetching.get(issuer)
        if _is_fresh(known) or (fetching is not None and fetching.locked()):
            return known[1]
        failed_before = self._failed_lately(issuer)
        try:
            return await self._fetched_discovery(issuer)
        except BrokerError as error:
            if failed_before is None:
                log.warning("discovery.stale", issuer=issuer, code=error.code)
            return known[1]

    async def _fetched_discovery(self, issuer: str) -> Mapping[str, Any]:
        async def fetch() -> Mapping[str, Any]:
            document = await self._egress.get_json(discovery_url(issuer))
            try:
                return parse_discovery(document, issuer=issuer, development=self._settings.development)
            except ValueError:
                raise UpstreamInvalid("the provider's discovery document is not valid") from None

        return await self._fetched(issuer, fetch)

    async def _fetched(self, url: str, fetch: Callable[[], Awaitable[Mapping[str, Any]]]) -> Mapping[str, Any]:
        """Fetch a document, one at a time for a URL; who waited takes what came, and a failure stands for 15 seconds.

        Anybody may begin a flow: a provider that is dead must not keep a dial and a resolver's thread for each of them.
        """
        asked_at = time.monotonic()
        async with self._fetching.setdefault(url, asyncio.Lock()):
            failed = self._failed_lately(url)
            if failed is not None:
                raise copy.copy(failed)
            known = self._discovered.get(url)
            if known is not None and known[0] > asked_at:
                return known[1]
            try:
                document = await fetch()
            except BrokerError as error:
                self._failed[url] = (time.monotonic(), copy.copy(error))
                raise
            self._discovered[url] = (time.monotonic(), document)
            return document

    async def jwks(self, url: str, *, again: bool = False) -> Mapping[str, Any]:
        """Return a provider's signing keys, fetched at most once an hour; ``again``: and anew, every 10 seconds at most."""
        known = self._discovered.get(url)
        if known is not None and _is_fresh(known):
            refetched_at = self._refetched_at.get(url)
            if not again or (refetched_at is not None and time.monotonic() - refetched_at < REFETCH_SECONDS):
                return known[1]
        if again:
            self._refetched_at[url] = time.monotonic()

        async def fetch() -> Mapping[str, Any]:
            document = await self._egress.get_json(url)
            if not isinstance(document, Mapping) or not isinstance(document.get("keys"), list):
                raise UpstreamInvalid("the provider's keys are not valid")
            return document

        return await self._fetched(url, fetch)

    async def client(
        self, configured: Configured, *, only: Collection[str] | None = None, first: str | None = None
    ) -> Client:
        """Return the OAuth client with its live secrets in the order in which they are tried.

        That is newest first, but last what was refused lately. ``only``: just those of these ids. ``first``: in front of
        them this one, which may be a candidate, unless it is gone.
        """
        name = configured.row.name

        def work(session: Session) -> list[str]:
            found = select(ClientSecret.id).where(ClientSecret.integration == name, ClientSecret.state == "live")
            live = [one for one in session.exec(as_tried(found)) if (only is None or one in only) and one != first]
            named = session.get(ClientSecret, first) if first is not None else None
            return [named.id, *live] if named is not None and named.integration == name else live

        ids = await self._database.read(work)
        secrets = [await self._client_secret(name, secret_id) for secret_id in ids]
        return Client(configured.row.client_id, tuple(secrets), configured.endpoints.client_auth, tuple(ids))

    async def ask(
        self,
        oauth2: OAuth2,
        client: Client,
        requests: Sequence[Outgoing],
        send: Callable[[Outgoing], Awaitable[Incoming]],
    ) -> Heard:
        """Send the requests of ``client.requests`` until one is not refused, and note which secrets were, behind the call.

        What ``send`` raises passes.
        """
        heard = await first_not_refused(oauth2, requests, send)
        taken = client.secret_ids[heard.refused : heard.refused + 1] if heard.taken else ()
        self._secret_use.note(taken=taken, refused=client.secret_ids[: heard.refused])
        return heard

    async def _client_secret(self, name: str, secret_id: str) -> Secret:
        try:
            _, value = await self._vault.get(secret_owner(name, secret_id), 1)
        except (SecretNotFound, SecretUnreadable):
            raise SecretStoreUnavailable("the integration's client secret cannot be read") from None
        return Secret(value["client_secret"])

    # Writing

    async def create(self, draft: Draft, actor: Principal | None) -> View:
        """Make an integration (InvalidRequest, Conflict when the name is taken). ``actor`` None: the system itself.

        Forbidden: only an admin may override endpoints of a provider that has its own, or give a name that was deleted
        once endpoints anew.
        """
        self.check(draft, actor)
        provider = self.catalog[draft.provider or ""]
        stored = await self._stored(draft.name, draft.client_secret)

        def work(session: Session) -> None:
            _require_unused(session, draft, actor)
            at = now(session)
            row = Integration(
                name=draft.name,
                provider=provider.name,
                description=draft.description or "",
                client_id=draft.client_id or "",
                scopes=list(draft.scopes if draft.scopes is not None else default_scopes(provider)),
                config=merge_patch({}, draft.config or {}),
                enabled=True if draft.enabled is None else draft.enabled,
                created_at=at,
                updated_at=at,
                rebound_at=at,
            )
            session.add(row)
            session.flush()
            created = _entry("integration.created", actor, draft.name, provider=provider.name)
            self._audit.append(session, created, *self._added(session, stored, draft.client_secret, actor)[1])

        try:
            await self._database.transaction(work)
        except Forbidden:
            await self._discard(draft.name, stored)
            raise
        except IntegrityError:
            await self._discard(draft.name, stored)
            raise Conflict("an integration of this name exists") from None
        return await self.get(draft.name)

    def check(self, draft: Draft, actor: Principal | None) -> None:
        """Raise what stands against making this integration: InvalidRequest by field, Forbidden.

        Whether the name was used before is not checked here.
        """
        config = merge_patch({}, draft.config or {})
        self._checked(draft, config)
        _require_admin(actor, before={}, after=config)
        if draft.client_secret is not None:
            _require_usable(self.catalog[draft.provider or ""], config, draft.client_secret)
        if has_endpoints(self.catalog[draft.provider or ""]):
            _require_admin_for_endpoints(actor, before={}, after=config)

    async def check_change(self, draft: Draft, row: Integration | None, actor: Principal) -> None:
        """Raise what stands against making a whole integration, or against making ``row`` equal to it."""
        if row is None:
            self.check(draft, actor)
            await self._database.read(lambda session: _require_unused(session, draft, actor))
            return
        config = merge_patch({}, draft.config or {})
        if draft.provider != row.provider:
            raise InvalidRequest(errors=[FieldError("/provider", "cannot be changed")])
        self._checked(draft, config)
        _require_admin(actor, before=row.config, after=config)
        _require_admin_for_endpoints(actor, before=row.config, after=config)
        await self._fitting_ids(row, config)

    def require_usable(self, draft: Draft, values: Sequence[Secret]) -> None:
        """Raise InvalidRequest when a secret cannot be a client secret of this (whole, checked) integration."""
        for value in values:
            _require_usable(self.catalog[draft.provider or ""], draft.config or {}, value)

    async def _fitting_ids(self, row: Integration, config: Mapping[str, Any]) -> frozenset[str] | None:
        """Return the ids of the live client secrets if from now on they are used in another way, and can be (InvalidRequest).

        A private key is never to become a secret that is sent. None where nothing changes in that.
        """
        provider = self.catalog.get(row.provider)
        if provider is None or not _is_used_otherwise(provider, before=row.config, after=config):
            return None
        signs, live = signs_with_its_secret(provider, config), await self.secrets(row.name)
        problems = [key_problem(await self._client_secret(row.name, one.id), signs=signs) for one in live]
        if (problem := next(filter(None, problems), None)) is not None:
            what = "cannot sign" if signs else "cannot be sent"
            detail = f"a live client secret {what} ({problem}): delete it first"
            raise InvalidRequest(errors=[FieldError("/config/client_auth", detail)])
        return frozenset(one.id for one in live)

    def _checked(self, draft: Draft, config: Mapping[str, Any]) -> None:
        problems = list(scope_problems(draft.scopes)) if draft.scopes is not None else []
        if not re.fullmatch(NAME_PATTERN, draft.name) or draft.name in RESERVED_NAMES:
            problems.append(FieldError("/name", "must be 1 to 63 of a-z, 0-9, _ and -, and not a reserved word"))
        provider = self.catalog.get(draft.provider or "")
        if provider is None:
            problems.append(FieldError("/provider", "is not in the catalog"))
        elif not provider.credential_types:
            problems.append(FieldError("/provider", "has no credentials to keep: make a webhook source of it"))
        if problems or provider is None:
            raise InvalidRequest(errors=problems)
        parse_config(config, provider, development=self._settings.development)

    async def update(self, draft: Draft, actor: Principal | None) -> View:
        """Change the given fields (RFC 7396 for ``config``). Endpoints of an existing integration need an admin.

        Raises NotFound, InvalidRequest, Forbidden. A client secret that is live already is not added again.
        """
        seen = (await self.get(draft.name)).row
        fitting = await self._fitting_ids(seen, merge_patch(seen.config, draft.config or {}))
        stored = await self._stored(draft.name, draft.client_secret)
        changed = {
            name: value
            for name in ("description", "client_id", "scopes", "enabled")
            if (value := getattr(draft, name)) is not None
        }

        def work(session: Session) -> ClientSecret | None:
            row = self._changeable(session, draft)
            before, config = dict(row.config), merge_patch(row.config, draft.config or {})
            self._checked(replace(draft, provider=row.provider), config)
            _require_admin(actor, before=before, after=config)
            _require_admin_for_endpoints(actor, before=before, after=config)
            self._require_keys(session, row, config, fitting, draft.client_secret)
            for name, value in {**changed, "config": config, "updated_at": now(session), "test_error": None}.items():
                setattr(row, name, value)
            moved = [name for name in ENDPOINT_FIELDS if before.get(name) != config.get(name)]
            if moved:
                row.endpoints_changed_at = max(row.updated_at, row.rebound_at or 0.0)
            session.flush()
            fields = sorted([*changed, *(["config"] if config != before else [])])
            updated = _entry("integration.updated", actor, draft.name, fields=fields, endpoints_changed=moved)
            secret, added = self._added(session, stored, draft.client_secret, actor)
            self._audit.append(session, updated, *added)
            return secret

        await self._added_or_discarded(draft.name, stored, work)
        return await self.get(draft.name)

    def _require_keys(
        self,
        session: Session,
        row: Integration,
        config: Mapping[str, Any],
        fitting: frozenset[str] | None,
        added: Secret | None,
    ) -> None:
        """Raise what stands against the client secrets' use; ``fitting`` are those that were looked at beforehand."""
        provider = self.catalog[row.provider]
        if added is not None:
            _require_usable(provider, config, added)
        if _is_used_otherwise(provider, before=row.config, after=config):
            live = session.exec(select(ClientSecret.id).where(ClientSecret.integration == row.name))
            if fitting is None or not fitting >= set(live):
                raise Conflict("the client secrets were changed meanwhile; try again")

    def _changeable(self, session: Session, draft: Draft) -> Integration:
        row = session.get(Integration, draft.name, with_for_update=True)
        if row is None:
            raise NotFound
        if draft.provider is not None and draft.provider != row.provider:
            raise InvalidRequest(errors=[FieldError("/provider", "cannot be changed")])
        return row

    async def delete(self, name: str, actor: Principal | None) -> None:
        """Remove an integration that has no connections any more (Conflict otherwise) and its secrets."""

        def work(session: Session) -> list[str]:
            if session.get(Integration, name, with_for_update=True) is None:
                raise NotFound
            held = session.exec(select(Connection.id).where(Connection.integration == name).limit(1)).first()
            if held is not None:
                raise Conflict("the integration still has connections; delete or revoke them first")
            held_secrets = list(session.exec(select(ClientSecret.id).where(ClientSecret.integration == name)))
            for secret_id in held_secrets:
                end_canary(session, secret_id, "failed", "deleted")
            for table in (ClientSecret, IntegrationLog, CallMinute, CallLatest, CallLine):
                session.execute(sa.delete(table).where(col(table.integration) == name))
            session.execute(sa.delete(Integration).where(col(Integration.name) == name))
            self._audit.append(session, _entry("integration.deleted", actor, name))
            return held_secrets

        for secret_id in await self._database.transaction(work):
            await self._vault.destroy(secret_owner(name, secret_id))

    # Client secrets: first into the vault, then the row that names it; a crash between leaves what is swept a day later

    async def add_secret(
        self, name: str, value: Secret, actor: Principal | None, *, source: str = "api", canary: int | None = None
    ) -> ClientSecret:
        """Make a further client secret live, as the newest; return its row (NotFound, Conflict for too many).

        One that is there already is not added again: its row is returned, a candidate made live. With ``canary`` the new one
        is a candidate instead, which nothing uses but the refreshes of so many connections; then it goes live, or away
        (``broker.client_secrets``). Conflict while another candidate is being tried; InvalidRequest without a dialogue.
        """
        await self.get(name)
        stored = await self._stored(name, value, source=source, state="live" if canary is None else "candidate")

        def work(session: Session) -> ClientSecret | None:
            row = session.get(Integration, name, with_for_update=True)
            if row is None:
                raise NotFound
            if row.provider in self.catalog:
                _require_usable(self.catalog[row.provider], row.config, value)
            if canary is not None and not self._has_dialogue(row):
                raise InvalidRequest(errors=[FieldError("/canary", "needs a provider with an OAuth dialogue")])
            secret, added = self._added(session, stored, value, actor, canary=canary)
            self._audit.append(session, *added)
            return secret

        secret = await self._added_or_discarded(name, stored, work)
        if secret is None:
            raise InternalError
        return secret

    def _has_dialogue(self, row: Integration) -> bool:
        provider = self.catalog.get(row.provider)
        return provider is not None and provider.oauth2 is not None

    async def _stored(
        self, name: str, value: Secret | None, *, source: str = "api", state: str = "live"
    ) -> ClientSecret | None:
        """Put a client secret into the vault; return the row that will name it."""
        if value is None:
            return None
        secret_id = new_id("key")
        await self._vault.put(secret_owner(name, secret_id), {"client_secret": value.reveal()}, expected_version=0)
        digest = self._audit.digest(value.reveal())
        return ClientSecret(
            id=secret_id, integration=name, source=source, value_digest=digest, state=state, created_at=0.0
        )

    def _added(
        self,
        session: Session,
        stored: ClientSecret | None,
        value: Secret | None,
        actor: Principal | None,
        *,
        canary: int | None = None,
    ) -> tuple[ClientSecret | None, tuple[Entry, ...]]:
        """Insert a stored secret unless it is there; return its row and what the audit is to hold (integration locked)."""
        if stored is None or value is None:
            return None, ()
        name, digests = stored.integration, self._audit.digests(value.reveal())
        held = list(session.exec(select(ClientSecret).where(ClientSecret.integration == name)))
        same = next((row for row in held if row.value_digest in digests), None)
        if same is not None:
            return same, _promoted(session, same, actor, "by_hand") if canary is None else ()
        if canary is not None and any(row.state == "candidate" for row in held):
            raise Conflict("another client secret is being tried; promote or delete it first")
        if len(held) >= MOST_SECRETS and stored.source == "api":
            raise Conflict(f"there are {MOST_SECRETS} client secrets; delete one first")
        row = ClientSecret(**{**stored.model_dump(), "created_at": now(session)})
        session.add(row)
        session.flush()
        more = {} if canary is None else {"canary": canary}
        if canary is not None:
            new_canary(session, row, canary, actor.caller_id if actor is not None else None)
        return row, (_entry("integration.secret_added", actor, name, secret_id=row.id, **more),)

    async def _added_or_discarded(
        self, name: str, stored: ClientSecret | None, work: Callable[[Session], ClientSecret | None]
    ) -> ClientSecret | None:
        """Run a transaction that returns the value's row; ``stored`` is destroyed where certainly no row names it."""
        try:
            row = await self._database.transaction(work)
        except (NotFound, InvalidRequest, Forbidden, Conflict):
            await self._discard(name, stored)
            raise
        if stored is not None and (row is None or row.id != stored.id):
            await self._discard(name, stored)
        return row

    async def _discard(self, name: str, stored: ClientSecret | None) -> None:
        if stored is not None:
            await self._vault.destroy(secret_owner(name, stored.id))

    async def secret_values(self, name: str) -> list[Secret]:
        """Return the live client secrets themselves, newest first, for a sealed export."""
        return [await self._client_secret(name, row.id) for row in await self.secrets(name) if row.state == "live"]

    async def secrets(self, name: str) -> list[ClientSecret]:
        """Return the client secrets' rows, live ones and a candidate, newest first (NotFound): no values."""
        await self.get(name)
        found = select(ClientSecret).where(ClientSecret.integration == name)
        return await self._database.read(lambda session: list(session.exec(newest_first(found))))

    async def canary(self, secret_id: str) -> Rotation | None:
        """Return how the canary of a client secret stands or ended, None where there was none."""
        return await self._database.read(lambda session: canary_of(session, secret_id))

    async def promote_secret(self, name: str, secret_id: str, actor: Principal | None) -> ClientSecret:
        """Make a candidate live and end its canary; return its row (NotFound). One that is live is tried first again."""

        def work(session: Session) -> ClientSecret:
            row = _secret_of(session, name, secret_id)
            self._audit.append(session, *_promoted(session, row, actor, "by_hand"))
            return row

        return await self._database.transaction(work)

    async def promote_proven(self, name: str, secret_id: str, *, owner: str, reason: str) -> bool:
        """Make a candidate live whose canary proved it; return whether that was done (NotFound).

        It is not when the canary was paused or ended meanwhile, or ``owner`` has no longer its lease.
        """

        def work(session: Session) -> bool:
            row = _secret_of(session, name, secret_id)
            if not is_run_by(session, secret_id, owner):
                return False
            self._audit.append(session, *_promoted(session, row, None, reason))
            return True

        return await self._database.transaction(work)

    async def delete_secret(self, name: str, secret_id: str, actor: Principal | None) -> None:
        """Take a client secret out of use and destroy it (NotFound); this ends its canary."""

        def work(session: Session) -> None:
            session.delete(_secret_of(session, name, secret_id))
            end_canary(session, secret_id, "failed", "deleted")
            session.flush()
            self._audit.append(session, _entry("integration.secret_deleted", actor, name, secret_id=secret_id))

        await self._database.transaction(work)
        await self._vault.destroy(secret_owner(name, secret_id))

    async def roll_back_secret(self, name: str, secret_id: str, *, owner: str, reason: str) -> bool:
        """Remove a candidate whose canary failed, and destroy it; return whether that was done.

        It is not when it is live by now or gone, the canary was paused or ended meanwhile, or ``owner`` has no longer its
        lease.
        """

        def work(session: Session) -> bool:
            row = session.get(ClientSecret, secret_id, with_for_update=True)
            if row is None or row.integration != name or row.state != "candidate":
                return False
            if not is_run_by(session, secret_id, owner):
                return False
            session.delete(row)
            end_canary(session, secret_id, "failed", reason)
            session.flush()
            rolled_back = _entry("integration.secret_rolled_back", None, name, secret_id=secret_id, reason=reason)
            self._audit.append(session, replace(rolled_back, outcome="failed"))
            return True

        if not await self._database.transaction(work):
            return False
        await self._vault.destroy(secret_owner(name, secret_id))
        return True

    async def sweep_unreferenced(self, *, older_than_seconds: float = 86_400.0, at: float | None = None) -> int:
        """Destroy client secrets that no row names, left by a crash between vault and row; return how many.

        ``at``: the time to count from, by default the database's now.
        """
        return await client_secrets.sweep_unreferenced(
            self._database, self._vault, older_than_seconds=older_than_seconds, at=at
        )

    async def note_export(self, actor: Principal | None) -> None:
        """Record durably that all client secrets leave, sealed (AuditUnavailable: then they must not)."""
        await self._audit.record(_entry("integration.exported", actor, None))

    # Pinning

    async def rebind(self, name: str, actor: Principal) -> int:
        """Pin all connections of an integration to its endpoints and its client as they are now; return how many moved.

        Raises Forbidden, NotFound, what discovery raises, and Conflict when the endpoints change meanwhile.
        """
        if "admin" not in actor.roles:
            raise Forbidden("only an admin may change where credentials go")
        configured, pins = await self.configured(name), await self._pins(name)

        def work(session: Session) -> int:
            _mark_rebound(session, configured.row)
            rows = list(session.exec(select(Connection).where(Connection.integration == name)))
            client_id, moved = configured.row.client_id, 0
            for row in rows:
                origins = pins.get(_key_of(row.variables), row.pins)  # one that came meanwhile is pinned already
                if (row.pins, row.client_id) != (origins, client_id):
                    row.pins, row.client_id, moved = dict(origins), client_id, moved + 1
            session.flush()
            self._audit.append(session, _entry("integration.rebound", actor, name, connections=moved))
            return moved

        return await self._database.transaction(work)

    async def _pins(self, name: str) -> dict[str, dict[str, str]]:
        """Return the origins of today for each set of variables that connections of an integration have."""
        held = select(Connection.variables).where(Connection.integration == name)
        found = await self._database.read(lambda session: {_key_of(one): one for one in session.exec(held)})
        configured, pins = await self.configured(name), {}
        for key, variables in found.items():
            if variables_in(configured.config.issuer or ""):
                mine = await self.configured(name, variables=variables)
            else:
                mine = self.with_variables(configured, variables)
            pins[key] = mine.endpoints.origins
        return pins

    # Start-up

    async def create_from_settings(self) -> None:
        """Create what the environment and the integrations file name, if absent; take ids and secrets from there.

        Raises SettingsError. Several replicas may do it at once.
        """
        for provider in self.catalog.values():
            draft = self._from_environment(provider)
            if draft is not None:
                await self._ensure(draft, source="environment", setting=f"{provider.env_prefix}_CLIENT_ID")
        if self._settings.integrations_file is not None:
            for draft in parse_file(self._settings.integrations_file):
                await self._ensure(draft, source="file", setting="BROKER_INTEGRATIONS_FILE")

    def _from_environment(self, provider: Provider) -> Draft | None:
        if provider.env_prefix is None:
            return None
        names = [f"{provider.env_prefix}_CLIENT_ID", f"{provider.env_prefix}_CLIENT_SECRET"]
        client_id, client_secret = map(self._settings.provider_credentials.get, names)
        if client_id and client_secret:
            return Draft(provider.name, provider.name, client_id=client_id, client_secret=Secret(client_secret))
        if client_id or client_secret:
            log.warning("settings.half_a_client", names=names)
        return None

    async def _ensure(self, draft: Draft, *, source: str, setting: str) -> None:
        try:
            view = await self.get(draft.name)
        except NotFound:
            await self._create_once(draft, setting)
            view = await self.get(draft.name)
        if view.row.provider != draft.provider:  # else its secret would go to another provider's endpoints
            raise SettingsError(f"{setting}: the integration {draft.name} exists and belongs to another provider")
        if draft.client_secret is not None and not await self._may_take(view, draft):
            raise SettingsError(
                f"{setting}: the integration {draft.name} has other endpoints than the settings say; its client secret "
                "would go there. An admin puts them right through the API"
            )
        if draft.client_id and view.row.client_id != draft.client_id:
            await self.update(Draft(draft.name, client_id=draft.client_id), None)
        if draft.client_secret is not None:
            try:
                await self.add_secret(draft.name, draft.client_secret, None, source=source)
            except InvalidRequest as error:
                raise SettingsError(f"{setting}: integration {draft.name}: {_told(error)}") from None

    async def _may_take(self, view: View, draft: Draft) -> bool:
        """Whether a secret of the settings would go where the settings say, or is live there already."""
        if endpoint_fields(view.row.config) == endpoint_fields(draft.config or {}):
            return True
        digests = self._audit.digests(draft.client_secret.reveal()) if draft.client_secret is not None else ()
        return any(row.value_digest in digests for row in await self.secrets(draft.name) if row.state == "live")

    async def _create_once(self, draft: Draft, setting: str) -> None:
        try:
            await self.create(replace(draft, client_secret=None), None)
        except Conflict:
            return  # another replica was first
        except InvalidRequest as error:
            raise SettingsError(f"{setting}: integration {draft.name}: {_told(error)}") from None

    # Testing

    def redirect_uri(self, name: str) -> str:
        """Return the callback address that is to be registered at the provider."""
        return f"{self._settings.public_url}/oauth/{name}/callback"

    async def begin_test(self, name: str) -> None:
        """Show the status ``testing`` for at most two minutes (NotFound). What failed lately is tried anew."""
        await self.get(name)
        self._failed.clear()
        mine = sa.update(Integration).where(col(Integration.name) == name)
        await self._database.transaction(
            lambda session: session.execute(mine.values(testing_until=now(session) + TEST_SECONDS))
        )

    async def end_test(self, name: str, problem: str | None) -> None:
        """Keep the verdict: None for a pass, else our own words for what is wrong."""
        mine = sa.update(Integration).where(col(Integration.name) == name)
        await self._database.transaction(
            lambda session: session.execute(mine.values(testing_until=None, test_error=problem))
        )

    # What happened lately

    async def note(
        self, name: str, *, action: str, text: str, level: str = "info", duration_ms: float | None = None
    ) -> None:
        """Keep a line for ``…/logs`` and ``…/metrics``. ``text`` is ours: no secret, no upstream text."""

        def work(session: Session) -> None:
            session.add(
                IntegrationLog(
                    integration=name, at=now(session), level=level, action=action, text=text, duration_ms=duration_ms
                )
            )

        await self._database.transaction(work)

    async def logs(
        self, name: str, *, limit: int, level: str | None, text: str | None, before: tuple[float, int] | None = None
    ) -> list[IntegrationLog]:
        """Return recent lines, newest first, by level and by a part of their text, before (at, id) (NotFound)."""
        await self.get(name)
        query = select(IntegrationLog).where(IntegrationLog.integration == name)
        if level is not None:
            query = query.where(IntegrationLog.level == level)
        if text is not None:
            query = query.where(col(IntegrationLog.text).contains(text, autoescape=True))
        if before is not None:
            at, line_id = before
            same = (col(IntegrationLog.at) == at) & (col(IntegrationLog.id) < line_id)
            query = query.where((col(IntegrationLog.at) < at) | same)
        query = query.order_by(col(IntegrationLog.at).desc(), col(IntegrationLog.id).desc()).limit(limit)
        return await self._database.read(lambda session: list(session.exec(query)))

    async def figures(self, name: str, *, window_seconds: float) -> Figures:
        """Return what the lines of all replicas in the last ``window_seconds`` add up to (NotFound).

        The durations are those of the newest ``MOST_TIMED`` lines that have one.
        """
        await self.get(name)

        def work(session: Session) -> Figures:
            fitting = (col(IntegrationLog.integration) == name, col(IntegrationLog.at) >= now(session) - window_seconds)
            failed = sa.func.sum(sa.case((col(IntegrationLog.level) == "error", 1), else_=0))
            duration, last = col(IntegrationLog.duration_ms), sa.func.max(IntegrationLog.at)
            sums = sa.select(sa.func.count(), failed, sa.func.sum(duration), sa.func.count(duration), last)
            total, failures, sum_ms, timed, last_at = session.execute(sums.where(*fitting)).one()
            newest = sa.select(duration).where(*fitting, duration.is_not(None)).order_by(col(IntegrationLog.id).desc())
            durations = session.execute(newest.limit(MOST_TIMED)).scalars().all()
            return Figures(total, failures or 0, sum_ms or 0.0, timed, durations, last_at)

        return await self._database.read(work)


def parse_file(path: Path) -> list[Draft]:
    """Read ``BROKER_INTEGRATIONS_FILE``: JSON or TOML with ``integrations = [{name, provider, …}]`` (SettingsError)."""
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        return drafts_from(document["integrations"])
    except InvalidRequest as error:
        problem = _told(error)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        problem = "must be JSON or TOML with a list of integrations"
    raise SettingsError(f"BROKER_INTEGRATIONS_FILE: {problem}")


def drafts_from(items: object) -> list[Draft]:
    """Return the Drafts of a document's list (InvalidRequest points at each wrong entry). Values are not checked further."""
    if not isinstance(items, list) or len(items) > MOST_INTEGRATIONS:
        raise InvalidRequest(errors=[FieldError("/integrations", "must be a list of integrations")])
    problems = [problem for at, item in enumerate(items) for problem in _entry_problems(item, f"/integrations/{at}")]
    if not problems and len({item["name"] for item in items}) < len(items):
        problems = [FieldError("/integrations", "holds one name twice")]
    if problems:
        raise InvalidRequest(errors=problems)
    return [Draft(**{**item, "client_secret": _secret_or_none(item.get("client_secret"))}) for item in items]


def _secret_or_none(value: str | None) -> Secret | None:
    return Secret(value) if value else None


def _entry_problems(item: object, pointer: str) -> list[FieldError]:
    if not isinstance(item, dict) or item.keys() - _ENTRY_TYPES.keys():
        return [FieldError(pointer, "must be an object of " + ", ".join(_ENTRY_TYPES))]
    problems = [FieldError(f"{pointer}/{name}", "is required") for name in ("name", "provider") if name not in item]
    for name, kind in _ENTRY_TYPES.items():
        if name in item and not isinstance(item[name], kind):
            problems.append(FieldError(f"{pointer}/{name}", f"must be {_SAID[kind]}"))
    return problems


_ENTRY_TYPES: Mapping[str, type] = {
    **dict.fromkeys(("name", "provider", "description", "client_id", "client_secret"), str),
    "scopes": list,
    "config": dict,
    "enabled": bool,
}
_SAID: Mapping[type, str] = {str: "a string", list: "a list of strings", dict: "an object", bool: "true or false"}


def default_scopes(provider: Provider | None) -> tuple[str, ...]:
    """Return the scopes that an integration of this provider asks for by itself."""
    return provider.oauth2.default_scopes if provider is not None and provider.oauth2 is not None else ()


def _require_unused(session: Session, draft: Draft, actor: Principal | None) -> None:
    """Raise Forbidden when an operator gives a name that was deleted once endpoints of their own.

    Callers' grants, sessions and links still name it, and who holds them relies on where it led.
    """
    if not endpoint_fields(draft.config or {}):
        return
    once = select(AuditRecord.number).where(
        AuditRecord.action == "integration.deleted",
        sa.func.coalesce(AuditRecord.integration, "") == draft.name,  # no index: the few of that action are searched
    )
    if session.exec(once.limit(1)).first() is not None:
        _require_admin_for_endpoints(actor, before={}, after=draft.config or {})


def _moved_since_rebind(row: Integration) -> bool:
    """Whether endpoints were changed since all connections were pinned to them, by a rebind or as there were none (pure).

    True too where that is not known: the row was made before it was written down.
    """
    if row.rebound_at is None:
        return True
    return row.endpoints_changed_at is not None and row.endpoints_changed_at >= row.rebound_at


def _mark_rebound(session: Session, seen: Integration) -> None:
    """Write, in the transaction that pins them, that connections are pinned to the endpoints that were ``seen`` (Conflict)."""
    row = session.get(Integration, seen.name, with_for_update=True)
    if row is None:
        raise NotFound
    if endpoint_fields(row.config) != endpoint_fields(seen.config):
        raise Conflict("the endpoints were changed meanwhile; try again")
    at, changed_at = now(session), row.endpoints_changed_at
    # never at the same moment, nor before it when a clock was set back: a change at the moment of a rebind counts as after it
    row.rebound_at = at if changed_at is None else max(at, math.nextafter(changed_at, math.inf))


def _require_admin_for_endpoints(
    actor: Principal | None, *, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    if actor is not None and "admin" not in actor.roles and endpoint_fields(before) != endpoint_fields(after):
        raise Forbidden("only an admin may change where credentials go")


def _is_used_otherwise(provider: Provider, *, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a change lets the client secrets sign, or sends them, that did not before; discovery is not looked at."""
    signs = signs_with_its_secret(provider, after)
    if signs:
        return not signs_with_its_secret(provider, before)
    return before.get("client_auth") != after.get("client_auth")


def _require_usable(provider: Provider, config: Mapping[str, Any], secret: Secret) -> None:
    """Raise InvalidRequest for a client secret that would have to sign, and cannot."""
    problem = key_problem(secret) if signs_with_its_secret(provider, config) else None
    if problem is not None:
        raise InvalidRequest(errors=[FieldError("/client_secret", problem)])


def _require_admin(actor: Principal | None, *, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    if actor is None or "admin" in actor.roles:
        return
    weaker_session = before.get("require_session", False) and not after.get("require_session", False)
    if weaker_session or after.get("confirm", "always") != before.get("confirm", "always"):
        raise Forbidden("only an admin may change what protects the flows")


def _key_of(variables: Mapping[str, str]) -> str:
    return json.dumps(variables, sort_keys=True)


def _secret_of(session: Session, name: str, secret_id: str) -> ClientSecret:
    row = session.get(ClientSecret, secret_id, with_for_update=True)
    if row is None or row.integration != name:
        raise NotFound
    return row


def _promoted(session: Session, row: ClientSecret, actor: Principal | None, reason: str) -> tuple[Entry, ...]:
    """Make a client secret live, if it is a candidate, and let it be tried in its turn; return what the audit is to hold."""
    row.refused_at, was = None, row.state
    row.state = "live"
    session.flush()
    if was == "live":
        return ()
    end_canary(session, row.id, "done", reason)
    return (_entry("integration.secret_promoted", actor, row.integration, secret_id=row.id, reason=reason),)


def _told(error: InvalidRequest) -> str:
    return ", ".join(f"{item.pointer} {item.detail}" for item in error.errors) or error.detail


def _entry(action: str, actor: Principal | None, name: str | None, **detail: Any) -> Entry:  # noqa: ANN401 - JSON values
    return Entry(action=action, actor=actor.caller_id if actor else "system", integration=name, detail=detail)
