"""Sources and subscriptions as a process opens them, over a test's database, and what they ask of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from broker.audit import Audit
from broker.database import PostgresDatabase, SqliteDatabase
from broker.policy import Principal
from broker.settings import Settings, load_settings
from broker.vault.cache import CachedVault
from broker.vault.keyring import KeyEncryptionKey, Keyring, Sealer, open_sealer
from broker.vault.sealed_rows import SealedRows
from broker.vault.system_keys import SystemKeys
from broker.webhooks.revision import Revision
from broker.webhooks.signing_keys import SigningKeys
from broker.webhooks.sources import SourceDraft, Sources
from broker.webhooks.subscriptions import SubscriptionDraft, Subscriptions
from providers import load_catalog

AnyDatabase = SqliteDatabase | PostgresDatabase
OPERATOR = Principal(caller_id="clr_1", name="test", roles=frozenset({"operator"}), grants=(), key_id="key_1")


class Process:
    """One process's sources and subscriptions; ``clock`` is its monotonic one."""

    def __init__(
        self, database: AnyDatabase, sealer: Sealer, keys: SystemKeys, settings: Settings, clock: Callable[[], float]
    ) -> None:
        """Open them; nothing is read yet."""
        self.database = database
        self.vault = CachedVault(SealedRows(database, sealer), seconds=settings.secret_cache_seconds, timer=clock)
        self.audit = Audit(database, bytes(32), sinks=("database",), checkpoints=())
        self.revision = Revision(database, monotonic=clock)
        of_all = (database, self.vault, self.audit)
        self.sources = Sources(*of_all, load_catalog(), settings, revision=self.revision)
        signing = SigningKeys(keys)
        self.subscriptions = Subscriptions(*of_all, settings, revision=self.revision, signing_keys=signing)

    async def source(self, **fields: Any) -> tuple[str, str | None]:
        """Make a source; return its id and the secret that was made."""
        draft = SourceDraft(**{"name": f"hooks-{time.monotonic_ns()}", "provider": "github", **fields})
        view, made = await self.sources.create(draft, OPERATOR)
        return view.row.id, made.reveal() if made is not None else None

    async def subscription(self, *event_types: str, **fields: Any) -> str:
        """Make a subscription; return its id."""
        draft = SubscriptionDraft("https://receiver.test/in", event_types or ("**",), **fields)
        return (await self.subscriptions.create(draft, OPERATOR))[0].row.id


async def process(
    database: AnyDatabase, folder: Path, *, clock: Callable[[], float] = time.monotonic, **settings: Any
) -> Process:
    """Return a process's parts over the test's database."""
    sealer = await open_sealer(database, Keyring([KeyEncryptionKey("k1", bytes(range(32)))]))
    keys = SystemKeys(database, sealer, "webhook-signing")
    await keys.load()
    loaded = load_settings({}, directory=folder, env="development", data_dir=folder, **settings)
    return Process(database, sealer, keys, loaded, clock)


@contextmanager
def counting(database: AnyDatabase) -> Iterator[list[str]]:
    """Give the list of what is asked of the database for reading, while the block lasts."""
    reader: Any = database._reader
    engine, asked = getattr(reader, "sync_engine", reader), list[str]()

    def note(_c: object, _u: object, statement: str, *_more: object) -> None:
        asked.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
