"""Configured providers: their effective endpoints, their client secrets (several live at once), import and export.

An integration is a provider's file plus overrides. Endpoints that ``issuer`` discovers are cached for an hour; single URLs
in ``config`` win over discovered ones, and both over the provider's file. Changing an endpoint never moves a credential:
connections pin the origins they were made with (``origins_of``), and only a rebind moves the pins.
"""

from __future__ import annotations

import json
import re
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker.audit import Audit, Entry
from broker.database import Database, now
from broker.egress import Egress
from broker.errors import (
    Conflict,
    FieldError,
    Forbidden,
    InvalidRequest,
    NotFound,
    SecretStoreUnavailable,
    UpstreamInvalid,
)
from broker.integrations.config import (
    ENDPOINT_FIELDS,
    NAME_PATTERN,
    Endpoints,
    IntegrationConfig,
    merge_patch,
    parse_config,
    static_endpoints,
)
from broker.models import ClientSecret, Connection, Integration, IntegrationLog, new_id
from broker.policy import Principal
from broker.settings import Settings, SettingsError
from broker.token_endpoint import Client, discovery_url, parse_discovery
from broker.vault import SecretNotFound, SecretUnreadable, Vault
from providers.spec import OAuth2, Provider, Secret

DISCOVERY_SECONDS = 3600.0
TEST_SECONDS = 120.0
RESERVED_NAMES = frozenset({"export", "import"})
Status = Literal["configuring", "testing", "active", "inactive", "error"]


@dataclass(frozen=True, slots=True)
class Configured:
    """An integration ready for use."""

    row: Integration
    provider: Provider
    config: IntegrationConfig
    endpoints: Endpoints

    @property
    def oauth2(self) -> OAuth2:
        """The provider's OAuth dialogue (InvalidRequest when it has none)."""
        if self.provider.oauth2 is None:
            raise InvalidRequest("this provider has no OAuth flow")
        return self.provider.oauth2


def secret_owner(integration: str, secret_id: str) -> str:
    """Return where a client secret lives in the vault."""
    return f"integrations/{integration}/{secret_id}"


def status_of(row: Integration, *, has_secret: bool, needs_client: bool, at: float) -> Status:
    """Return the read-only status (pure)."""
    if not row.enabled:
        return "inactive"
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
    """An integration as it is shown: never with a secret."""

    row: Integration
    status: Status
    secret_ids: tuple[str, ...]


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

    # Reading

    async def get(self, name: str) -> View:
        """Return one integration (NotFound)."""
        return (await self._views([name]))[0]

    async def page(self, *, limit: int, before: tuple[float, str] | None = None) -> list[View]:
        """Return the newest integrations first, after the cursor position ``before``."""

        def work(session: Session) -> list[str]:
            query = select(Integration.name).order_by(col(Integration.created_at).desc(), col(Integration.name).desc())
            if before is not None:
                query = query.where(sa.tuple_(col(Integration.created_at), col(Integration.name)) < before)
            return list(session.exec(query.limit(limit)))

        return await self._views(await self._database.read(work))

    async def _views(self, names: Sequence[str]) -> list[View]:
        def work(session: Session) -> list[View]:
            at = now(session)
            rows = {row.name: row for row in session.exec(select(Integration).where(col(Integration.name).in_(names)))}
            secrets: dict[str, list[str]] = {}
            found = select(ClientSecret).where(col(ClientSecret.integration).in_(names))
            for secret in session.exec(found.order_by(col(ClientSecret.created_at).desc())):
                secrets.setdefault(secret.integration, []).append(secret.id)
            return [self._view(rows[name], secrets.get(name, []), at) for name in names if name in rows]

        views = await self._database.read(work)
        if len(views) < len(names):
            raise NotFound
        return views

    def _view(self, row: Integration, secret_ids: list[str], at: float) -> View:
        provider = self.catalog.get(row.provider)
        needs_client = provider is not None and provider.oauth2 is not None
        public = row.config.get("client_auth") == "none"
        status = status_of(row, has_secret=bool(secret_ids) or public, needs_client=needs_client, at=at)
        return View(row, status, tuple(secret_ids))

    async def configured(self, name: str) -> Configured:
        """Return an integration with its endpoints, discovering them if need be.

        Raises NotFound; ProviderUnavailable or UpstreamInvalid when discovery fails.
        """
        row = await self._database.read(lambda session: session.get(Integration, name))
        if row is None or row.provider not in self.catalog:
            raise NotFound
        provider = self.catalog[row.provider]
        config = IntegrationConfig.model_validate(row.config)
        return Configured(row, provider, config, await self._endpoints(provider, config))

    async def _endpoints(self, provider: Provider, config: IntegrationConfig) -> Endpoints:
        discovered: Mapping[str, Any] = {}
        if config.issuer and provider.oauth2 is not None and provider.oauth2.discovery:
            discovered = await self._discover(config.issuer)
        return static_endpoints(provider, config, discovered)

    async def _discover(self, issuer: str) -> Mapping[str, Any]:
        known = self._discovered.get(issuer)
        if known is not None and time.monotonic() - known[0] < DISCOVERY_SECONDS:
            return known[1]
        document = await self._egress.get_json(discovery_url(issuer))
        try:
            found = parse_discovery(document, issuer=issuer, development=self._settings.development)
        except ValueError:
            raise UpstreamInvalid("the provider's discovery document is not valid") from None
        self._discovered[issuer] = (time.monotonic(), found)
        return found

    async def jwks(self, url: str, *, again: bool = False) -> Mapping[str, Any]:
        """Return a provider's signing keys, fetched at most once an hour, or ``again`` at most every 10 seconds."""
        known = self._discovered.get(url)
        oldest = 10.0 if again else DISCOVERY_SECONDS
        if known is not None and time.monotonic() - known[0] < oldest:
            return known[1]
        document = await self._egress.get_json(url)
        if not isinstance(document, Mapping) or not isinstance(document.get("keys"), list):
            raise UpstreamInvalid("the provider's keys are not valid")
        self._discovered[url] = (time.monotonic(), document)
        return document

    async def client(self, configured: Configured) -> Client:
        """Return the OAuth client with its live secrets, newest first."""
        name = configured.row.name

        def work(session: Session) -> list[str]:
            found = select(ClientSecret.id).where(ClientSecret.integration == name)
            return list(session.exec(found.order_by(col(ClientSecret.created_at).desc())))

        secrets = [await self._client_secret(name, secret_id) for secret_id in await self._database.read(work)]
        return Client(configured.row.client_id, tuple(secrets), configured.endpoints.client_auth)

    async def _client_secret(self, name: str, secret_id: str) -> Secret:
        try:
            _, value = await self._vault.get(secret_owner(name, secret_id), 1)
        except (SecretNotFound, SecretUnreadable):
            raise SecretStoreUnavailable("the integration's client secret cannot be read") from None
        return Secret(value["client_secret"])

    # Writing

    async def create(self, draft: Draft, actor: Principal | None) -> View:
        """Make an integration (InvalidRequest, Conflict when the name is taken). ``actor`` None: the system itself."""
        provider = self._checked(draft)
        row_config = dict(draft.config or {})
        self._require_admin(actor, before={}, after=row_config, has_connections=False)
        scopes = list(draft.scopes if draft.scopes is not None else _default_scopes(provider))

        def work(session: Session) -> None:
            at = now(session)
            row = Integration(
                name=draft.name,
                provider=provider.name,
                description=draft.description or "",
                client_id=draft.client_id or "",
                scopes=scopes,
                config=row_config,
                enabled=True if draft.enabled is None else draft.enabled,
                created_at=at,
                updated_at=at,
            )
            session.add(row)
            session.flush()
            self._audit.append(session, _entry("integration.created", actor, draft.name, provider=provider.name))

        try:
            await self._database.transaction(work)
        except IntegrityError:
            raise Conflict("an integration of this name exists") from None
        if draft.client_secret is not None:
            await self.add_secret(draft.name, draft.client_secret, actor)
        return await self.get(draft.name)

    def _checked(self, draft: Draft) -> Provider:
        if not re.fullmatch(NAME_PATTERN, draft.name) or draft.name in RESERVED_NAMES:
            raise InvalidRequest(errors=[FieldError("/name", "must be 1 to 63 of a-z, 0-9, _ and -")])
        provider = self.catalog.get(draft.provider or "")
        if provider is None:
            raise InvalidRequest(errors=[FieldError("/provider", "is not in the catalog")])
        parse_config(draft.config or {}, provider, development=self._settings.development)
        return provider

    def _require_admin(
        self, actor: Principal | None, *, before: Mapping[str, Any], after: Mapping[str, Any], has_connections: bool
    ) -> None:
        if actor is None or "admin" in actor.roles:
            return
        if after.get("confirm", "always") != before.get("confirm", "always"):
            raise Forbidden("only an admin may change what protects the flows")
        moved = any(before.get(name) != after.get(name) for name in ENDPOINT_FIELDS)
        if moved and (before or has_connections):
            raise Forbidden("only an admin may change where credentials go")

    async def update(self, draft: Draft, actor: Principal | None) -> View:
        """Change the given fields (RFC 7396 for ``config``). Endpoints of an existing integration need an admin."""
        current = (await self.get(draft.name)).row
        config = merge_patch(current.config, draft.config) if draft.config is not None else current.config
        self._checked(replace(draft, provider=current.provider, config=config))
        if draft.provider is not None and draft.provider != current.provider:
            raise InvalidRequest(errors=[FieldError("/provider", "cannot be changed")])
        self._require_admin(actor, before=current.config, after=config, has_connections=True)
        changed = {
            name: value
            for name in ("description", "client_id", "scopes", "enabled")
            if (value := getattr(draft, name)) is not None
        }

        def work(session: Session) -> None:
            values = {**changed, "config": config, "updated_at": now(session), "test_error": None}
            session.execute(sa.update(Integration).where(col(Integration.name) == draft.name).values(**values))
            moved = [name for name in ENDPOINT_FIELDS if current.config.get(name) != config.get(name)]
            fields = sorted([*changed, *(["config"] if config != current.config else [])])
            self._audit.append(
                session, _entry("integration.updated", actor, draft.name, fields=fields, endpoints_changed=moved)
            )

        await self._database.transaction(work)
        if draft.client_secret is not None:
            await self.add_secret(draft.name, draft.client_secret, actor)
        return await self.get(draft.name)

    async def delete(self, name: str, actor: Principal | None) -> None:
        """Remove an integration that has no connections any more (Conflict otherwise) and its secrets."""
        view = await self.get(name)

        def work(session: Session) -> None:
            held = session.exec(select(Connection.id).where(Connection.integration == name).limit(1)).first()
            if held is not None:
                raise Conflict("the integration still has connections; delete or revoke them first")
            session.execute(sa.delete(ClientSecret).where(col(ClientSecret.integration) == name))
            session.execute(sa.delete(Integration).where(col(Integration.name) == name))
            self._audit.append(session, _entry("integration.deleted", actor, name))

        await self._database.transaction(work)
        for secret_id in view.secret_ids:
            await self._vault.destroy(secret_owner(name, secret_id))

    # Client secrets

    async def add_secret(self, name: str, value: Secret, actor: Principal | None, *, source: str = "api") -> str:
        """Make a further client secret live, as the newest; return its id. Secret first, then the row that names it."""
        secret_id = new_id("key")
        await self._vault.put(secret_owner(name, secret_id), {"client_secret": value.reveal()}, expected_version=0)

        def work(session: Session) -> None:
            if session.get(Integration, name) is None:
                raise NotFound
            session.add(
                ClientSecret(
                    id=secret_id,
                    integration=name,
                    source=source,
                    value_digest=self._audit.digest(value.reveal()),
                    created_at=now(session),
                )
            )
            session.flush()
            self._audit.append(session, _entry("integration.secret_added", actor, name, secret_id=secret_id))

        await self._database.transaction(work)
        return secret_id

    async def add_secret_once(self, name: str, value: Secret, actor: Principal | None, *, source: str) -> None:
        """Make a client secret live unless it is already."""
        digest = self._audit.digest(value.reveal())
        if digest not in {row.value_digest for row in await self.secrets(name)}:
            await self.add_secret(name, value, actor, source=source)

    async def secret_values(self, name: str) -> list[Secret]:
        """Return the live client secrets themselves, newest first, for a sealed export."""
        return [await self._client_secret(name, row.id) for row in await self.secrets(name)]

    async def secrets(self, name: str) -> list[ClientSecret]:
        """Return the live client secrets' rows, newest first (NotFound): ids and times, no values."""
        await self.get(name)
        found = select(ClientSecret).where(ClientSecret.integration == name)
        return await self._database.read(
            lambda session: list(session.exec(found.order_by(col(ClientSecret.created_at).desc())))
        )

    async def delete_secret(self, name: str, secret_id: str, actor: Principal | None) -> None:
        """Take a client secret out of use and destroy it (NotFound)."""

        def work(session: Session) -> None:
            row = session.get(ClientSecret, secret_id)
            if row is None or row.integration != name:
                raise NotFound
            session.delete(row)
            session.flush()
            self._audit.append(session, _entry("integration.secret_deleted", actor, name, secret_id=secret_id))

        await self._database.transaction(work)
        await self._vault.destroy(secret_owner(name, secret_id))

    # Pinning

    async def rebind(self, name: str, actor: Principal) -> int:
        """Pin all connections of an integration to its endpoints as they are now; return how many moved."""
        if "admin" not in actor.roles:
            raise Forbidden("only an admin may change where credentials go")
        configured = await self.configured(name)
        origins = configured.endpoints.origins

        def work(session: Session) -> int:
            rows = list(session.exec(select(Connection).where(Connection.integration == name)))
            moved = [row for row in rows if row.pins != origins]
            for row in moved:
                row.pins = dict(origins)
            session.flush()
            self._audit.append(session, _entry("integration.rebound", actor, name, connections=len(moved)))
            return len(moved)

        return await self._database.transaction(work)

    # Start-up

    async def create_from_settings(self) -> None:
        """Create what the environment and the integrations file name, if absent; take ids and secrets from there."""
        for provider in self.catalog.values():
            await self._from_environment(provider)
        if self._settings.integrations_file is not None:
            for draft in parse_file(self._settings.integrations_file):
                await self._ensure(draft, source="file")

    async def _from_environment(self, provider: Provider) -> None:
        credentials = self._settings.provider_credentials
        client_id = credentials.get(f"{provider.env_prefix}_CLIENT_ID")
        client_secret = credentials.get(f"{provider.env_prefix}_CLIENT_SECRET")
        if provider.env_prefix and client_id and client_secret:
            draft = Draft(provider.name, provider.name, client_id=client_id, client_secret=Secret(client_secret))
            await self._ensure(draft, source="environment")

    async def _ensure(self, draft: Draft, *, source: str) -> None:
        try:
            view = await self.get(draft.name)
        except NotFound:
            await self._create_once(draft)
            view = await self.get(draft.name)
        if draft.client_id and view.row.client_id != draft.client_id:
            await self.update(Draft(draft.name, client_id=draft.client_id), None)
        if draft.client_secret is not None:
            await self.add_secret_once(draft.name, draft.client_secret, None, source=source)

    async def _create_once(self, draft: Draft) -> None:
        try:
            await self.create(replace(draft, client_secret=None), None)
        except Conflict:
            return  # another replica was first
        except InvalidRequest as error:
            fields = ", ".join(f"{item.pointer} {item.detail}" for item in error.errors)
            raise SettingsError(f"BROKER_INTEGRATIONS_FILE: integration {draft.name}: {fields}") from None

    # Testing

    def redirect_uri(self, name: str) -> str:
        """Return the callback address that is to be registered at the provider."""
        return f"{self._settings.public_url}/oauth/{name}/callback"

    async def begin_test(self, name: str) -> None:
        """Show the status ``testing`` for at most two minutes (NotFound)."""
        await self.get(name)
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

    async def logs(self, name: str, *, limit: int, level: str | None, text: str | None) -> list[IntegrationLog]:
        """Return recent lines, newest first, by level and by a part of their text (NotFound)."""
        await self.get(name)
        query = select(IntegrationLog).where(IntegrationLog.integration == name)
        if level is not None:
            query = query.where(IntegrationLog.level == level)
        if text is not None:
            query = query.where(col(IntegrationLog.text).contains(text, autoescape=True))
        query = query.order_by(col(IntegrationLog.id).desc()).limit(limit)
        return await self._database.read(lambda session: list(session.exec(query)))

    async def metrics(self, name: str, *, window_seconds: float) -> dict[str, Any]:
        """Return totals over all replicas in the last ``window_seconds`` (NotFound)."""
        await self.get(name)

        def work(session: Session) -> list[IntegrationLog]:
            since = now(session) - window_seconds
            query = select(IntegrationLog).where(IntegrationLog.integration == name, col(IntegrationLog.at) >= since)
            return list(session.exec(query.order_by(col(IntegrationLog.id).desc()).limit(100_000)))

        return summary(await self._database.read(work))


def summary(lines: Sequence[IntegrationLog]) -> dict[str, Any]:
    """Return total, success rate, mean and 95th percentile latency and last activity of log lines (pure)."""
    timed = sorted(line.duration_ms for line in lines if line.duration_ms is not None)
    good = sum(1 for line in lines if line.level != "error")
    return {
        "total": len(lines),
        "success_rate": good / len(lines) if lines else None,
        "mean_latency_ms": sum(timed) / len(timed) if timed else None,
        "p95_latency_ms": timed[min(len(timed) - 1, int(len(timed) * 0.95))] if timed else None,
        "last_activity_at": max((line.at for line in lines), default=None),
    }


def parse_file(path: Path) -> list[Draft]:
    """Read ``BROKER_INTEGRATIONS_FILE``: JSON or TOML with ``integrations = [{name, provider, …}]`` (SettingsError)."""
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        return [draft_from(item) for item in document["integrations"]]
    except (OSError, ValueError, KeyError, TypeError, InvalidRequest):
        raise SettingsError("BROKER_INTEGRATIONS_FILE: must be JSON or TOML with a list of integrations") from None


def draft_from(item: Mapping[str, Any]) -> Draft:
    """Return a Draft from a document's entry (InvalidRequest names an unknown field)."""
    known = {"name", "provider", "description", "client_id", "client_secret", "scopes", "config", "enabled"}
    unknown = sorted(item.keys() - known)
    if unknown or not isinstance(item.get("name"), str):
        raise InvalidRequest(errors=[FieldError(f"/{name}", "is not a field") for name in unknown or ["name"]])
    secret = item.get("client_secret")
    return Draft(**{**item, "client_secret": Secret(secret) if secret else None})


def _default_scopes(provider: Provider) -> tuple[str, ...]:
    return provider.oauth2.default_scopes if provider.oauth2 is not None else ()


def _entry(action: str, actor: Principal | None, name: str, **detail: Any) -> Entry:  # noqa: ANN401 - JSON values
    return Entry(action=action, actor=actor.caller_id if actor else "system", integration=name, detail=detail)
