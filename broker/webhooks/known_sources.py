"""The sources as requests to them need them: read once, with opened secrets, and believed until something changed."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa
import structlog
from sqlmodel import col

from broker.database import Database, GroupReader, clock
from broker.errors import Overloaded
from broker.models import WebhookSecret, WebhookSource
from broker.webhooks.configured import Source, SourceSecret
from broker.webhooks.revision import MOST_HELD_SECONDS, Revision
from broker.webhooks.secrets import Secrets
from broker.webhooks.source_config import ID, seals
from providers.receiving import configured
from providers.spec import Provider, Secret

MOST_KEPT: Final = 10_000
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Read:
    """A source's row and its live secrets, newest first, as the database had them at its time ``at``."""

    row: WebhookSource
    secrets: Sequence[tuple[str, float | None]]
    at: float


@dataclass(frozen=True, slots=True)
class _Held:
    """What is believed while ``revision`` is the current one and ``until`` is not over. ``broken``: nobody can use it."""

    revision: int
    until: float
    source: Source | None = field(repr=False)
    broken: bool = False

    def usable(self) -> Source | None:
        if self.broken:
            raise Overloaded("The source cannot be used now")
        return self.source


class KnownSources:
    """One for a process; calls may run at once."""

    def __init__(
        self,
        database: Database,
        secrets: Secrets,
        revision: Revision,
        catalog: Mapping[str, Provider],
        *,
        cache_seconds: float,
    ) -> None:
        """Keep the parts. Opened secrets are kept for ``cache_seconds``, and 5 seconds at most, before they are asked for."""
        self._reader: GroupReader[str, _Read | None] = GroupReader(database, _read)
        self._secrets = secrets
        self._revision = revision
        self._catalog = catalog
        self._held_seconds = min(cache_seconds, MOST_HELD_SECONDS)
        self._held: dict[str, _Held] = {}
        self._loading: dict[tuple[str, int], asyncio.Task[_Held]] = {}

    async def known(self, source_id: str) -> Source | None:
        """Return a source, None for one that is not there.

        Raises DatabaseUnavailable, SecretStoreUnavailable; Overloaded for a source that its provider's file no longer
        configures: what it would check is not known.
        """
        if not ID.fullmatch(source_id):
            return None
        revision = await self._revision.current()
        held = self._held.get(source_id)
        if held is None or held.revision != revision or self._revision.monotonic() >= held.until:
            held = await self._shared(source_id, revision)
        return held.usable()

    async def _shared(self, source_id: str, revision: int) -> _Held:
        """Read a source, once for all who ask meanwhile; it was read after the revision, so it is not older."""
        key = (source_id, revision)
        task = self._loading.get(key)
        if task is None:
            # A context of its own: what is logged belongs to no request.
            task = asyncio.create_task(self._load(source_id, revision), context=contextvars.Context())
            self._loading[key] = task
            task.add_done_callback(lambda done: self._loading.pop(key) and (done.cancelled() or done.exception()))
        return await asyncio.shield(task)

    async def _load(self, source_id: str, revision: int) -> _Held:
        began = self._revision.monotonic()
        read = await self._reader.submit(source_id)
        held = _Held(revision, math.inf, None) if read is None else await self._opened(read, revision, began)
        before = self._held.pop(source_id, None)
        if before is not None and before.revision > revision:
            self._held[source_id] = before
        elif read is not None:  # one that is absent is asked for each time: a stranger's ids drive nothing out
            if len(self._held) >= MOST_KEPT:
                self._held.clear()
            self._held[source_id] = held
        return held

    async def _opened(self, read: _Read, revision: int, began: float) -> _Held:
        row = read.row
        opened = [SourceSecret(one, await self._secrets.open(one)) for one, _ in read.secrets]
        hidden = await self._secrets.open_settings(row.id, row.settings_version)
        ends = [ends_at - read.at for _, ends_at in read.secrets if ends_at is not None]
        until = began + min([self._held_seconds, *ends])
        try:
            source = source_of(row, opened, hidden, self._catalog)
        except ValueError as error:
            reason = str(error)  # of the provider's file, without a value
            log.warning("webhook_source.unusable", source_id=row.id, provider=row.provider, reason=reason)
            return _Held(revision, until, None, broken=True)
        return _Held(revision, until, source)


def source_of(
    row: WebhookSource, secrets: Sequence[SourceSecret], hidden: Mapping[str, Secret], catalog: Mapping[str, Provider]
) -> Source:
    """Return a source as requests to it need it; ``hidden``: its secret settings.

    ``ValueError`` (its text may be logged) where its provider's file does not know it, or refuses its settings.
    """
    provider = catalog.get(row.provider)
    declared = provider.webhooks.get(row.kind) if provider is not None else None
    if declared is None:
        raise ValueError("the provider's file has no such kind of webhook")
    settings = {**{name: Secret(value) for name, value in row.config.get("settings", {}).items()}, **hidden}
    webhook = configured(declared, {name: value.reveal() for name, value in settings.items()})
    return Source(
        id=row.id,
        name=row.name,
        provider=row.provider,
        kind=row.kind,
        webhook=webhook,
        secrets=tuple(secrets),
        settings=settings,
        tolerance_seconds=row.tolerance_seconds,
        public_url=row.config.get("public_url"),
        connection_id=row.connection_id,
        seal=seals(row.config.get("seal"), webhook),
        park_unmatched=bool(row.config.get("park_unmatched")),
        enabled=row.enabled,
        integration=row.config.get("integration"),
    )


def _read(connection: sa.Connection, source_ids: Sequence[str]) -> Sequence[_Read | None]:
    wanted = {*source_ids}
    sources = sa.select(sa.inspect(WebhookSource).local_table, clock(connection)).where(
        col(WebhookSource.id).in_(wanted)
    )
    found = {row.id: (WebhookSource(**row._mapping), row[-1]) for row in connection.execute(sources)}  # noqa: SLF001
    held: dict[str, list[tuple[str, float | None]]] = {one: [] for one in found}
    secrets = sa.select(col(WebhookSecret.owner_id), col(WebhookSecret.id), col(WebhookSecret.expires_at)).where(
        col(WebhookSecret.owner_id).in_(found.keys())
    )
    newest_first = secrets.order_by(col(WebhookSecret.created_at).desc(), col(WebhookSecret.id).desc())
    for owner_id, secret_id, ends_at in connection.execute(newest_first):
        if ends_at is None or ends_at > found[owner_id][1]:
            held[owner_id].append((secret_id, ends_at))
    return [_Read(found[one][0], held[one], found[one][1]) if one in found else None for one in source_ids]
