"""The secrets of webhook sources and subscriptions: rows that say when and whence, and values that only the vault has.

A value goes into the vault before the row that names it, and leaves it after: a crash in between leaves what no row names,
which is swept a day later, and never a row without its value.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import secrets as random_numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, Literal, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from broker.audit import Audit
from broker.database import Database, now
from broker.errors import BrokerError, Conflict, Forbidden, InvalidRequest, NotFound, SecretStoreUnavailable
from broker.models import WebhookSecret, WebhookSource, new_id
from broker.vault import SecretNotFound, SecretUnreadable, Vault
from providers.spec import Secret

PREFIX: Final = "webhook_secrets/"
SETTINGS_PREFIX: Final = "webhook_settings/"
NOTED_SECONDS: Final = 60.0
EVERY_SECONDS: Final = 0.25
MOST_KNOWN: Final = 10_000
BATCH: Final = 500
# Nothing was written when one of these is raised.
CERTAIN: Final = (NotFound, InvalidRequest, Forbidden, Conflict, IntegrityError)
T = TypeVar("T")
Origin = Literal["given", "generated", "learned", "rotated"]
log = structlog.get_logger()


def vault_owner(secret_id: str) -> str:
    """Return where a secret's value lives in the vault, as its version 1."""
    return PREFIX + secret_id


def settings_owner(source_id: str, number: int) -> str:
    """Return where secret settings of a source live in the vault; ``number`` is the one that its row names."""
    return f"{SETTINGS_PREFIX}{source_id}/{number}"


class Secrets:
    """Keeps and opens values. Calls may run at once."""

    def __init__(self, database: Database, vault: Vault, audit: Audit) -> None:
        """Keep the parts; ``audit`` makes the keyed digests by which a secret that is given twice is known."""
        self._database = database
        self._vault = vault
        self._audit = audit

    async def store(self, value: Secret, owner_id: str, origin: Origin, created_by: str | None) -> WebhookSecret:
        """Put a value into the vault; return the row that will name it, not in the database yet (SecretStoreUnavailable)."""
        row = WebhookSecret(
            id=new_id("key"),
            owner_id=owner_id,
            origin=origin,
            value_digest=self._audit.digest(value.reveal()),
            created_by=created_by,
            created_at=0.0,
        )
        await self._vault.put(vault_owner(row.id), {"value": value.reveal()}, expected_version=0)
        return row

    async def open(self, secret_id: str) -> Secret:
        """Return a value (SecretStoreUnavailable, also when it is not there or does not open)."""
        try:
            _, held = await self._vault.get(vault_owner(secret_id), 1)
        except (SecretNotFound, SecretUnreadable):
            raise SecretStoreUnavailable("a webhook secret cannot be read") from None
        return Secret(str(held["value"]))

    async def written(self, stored: WebhookSecret | None, work: Callable[[Session], T]) -> T:
        """Run the transaction that inserts a stored value's row; the value is destroyed where certainly no row names it.

        What ``work`` raises passes. When it returns another row of a secret, that one stands for the value.
        """
        ids = [] if stored is None else [stored.id]
        try:
            made = await self._database.transaction(work)
        except CERTAIN:
            await self.destroy(ids)
            raise
        if isinstance(made, WebhookSecret) and made.id not in ids:
            await self.destroy(ids)
        return made

    async def destroy(self, secret_ids: Iterable[str]) -> None:
        """Destroy values whose rows are gone. What fails is logged, and left to ``sweep_unreferenced``."""
        for secret_id in secret_ids:
            try:
                await self._vault.destroy(vault_owner(secret_id))
            except BrokerError as error:
                log.warning("webhook_secret.left", secret_id=secret_id, code=error.code)

    async def open_settings(self, source_id: str, number: int) -> dict[str, Secret]:
        """Return the secret settings that a source's row names by ``number``; 0: it has none (SecretStoreUnavailable)."""
        if number == 0:
            return {}
        try:
            _, held = await self._vault.get(settings_owner(source_id, number), 1)
        except (SecretNotFound, SecretUnreadable):
            raise SecretStoreUnavailable("a webhook source's settings cannot be read") from None
        return {name: Secret(str(value)) for name, value in held.items()}

    async def store_settings(self, source_id: str, values: Mapping[str, Secret]) -> int:
        """Put secret settings of a source into the vault; return the number for its row, 0 for none of them.

        The number is random, so that of two that write at once neither harms the other (SecretStoreUnavailable).
        """
        if not values:
            return 0
        number = 1 + random_numbers.randbelow(2**31 - 1)
        opened = {name: value.reveal() for name, value in values.items()}
        await self._vault.put(settings_owner(source_id, number), opened, expected_version=0)
        return number

    async def destroy_settings(self, source_id: str, number: int) -> None:
        """Destroy secret settings that no row names any more; what fails is logged, and left to the sweep."""
        if number == 0:
            return
        try:
            await self._vault.destroy(settings_owner(source_id, number))
        except BrokerError as error:
            log.warning("webhook_settings.left", source_id=source_id, code=error.code)

    def same(self, session: Session, owner_id: str, value: Secret) -> WebhookSecret | None:
        """Return the owner's live row of an equal value, if it has one."""
        return next((row for row in live(session, [owner_id]) if self.is_of(row, value)), None)

    def is_of(self, row: WebhookSecret, value: Secret) -> bool:
        """Return whether a row is that of an equal value."""
        return row.value_digest in self._audit.digests(value.reveal())

    async def expire(self) -> int:
        """Remove the secrets whose time is over; return how many. Any process may, at any time."""

        def work(session: Session) -> list[str]:
            over = select(WebhookSecret.id).where(col(WebhookSecret.expires_at) <= now(session)).limit(BATCH)
            ids = list(session.exec(over))
            session.execute(sa.delete(WebhookSecret).where(col(WebhookSecret.id).in_(ids)))
            return ids

        ids = await self._database.transaction(work)
        await self.destroy(ids)
        return len(ids)


def insert(session: Session, row: WebhookSecret) -> WebhookSecret:
    """Insert the row of a value that the vault has."""
    made = WebhookSecret(**{**row.model_dump(), "created_at": now(session)})
    session.add(made)
    session.flush()
    return made


def live(session: Session, owner_ids: Sequence[str]) -> list[WebhookSecret]:
    """Return the rows that count now, newest first."""
    query = select(WebhookSecret).where(
        col(WebhookSecret.owner_id).in_(owner_ids),
        col(WebhookSecret.expires_at).is_(None) | (col(WebhookSecret.expires_at) > now(session)),
    )
    return list(session.exec(query.order_by(col(WebhookSecret.created_at).desc(), col(WebhookSecret.id).desc())))


def end_others(session: Session, newest: WebhookSecret, seconds: float) -> None:
    """Let the owner's other secrets count for so many seconds more at most."""
    ends_at = now(session) + seconds
    for row in live(session, [newest.owner_id]):
        if row.id != newest.id and (row.expires_at is None or row.expires_at > ends_at):
            row.expires_at = ends_at
    session.flush()


def take_all(session: Session, owner_id: str) -> list[str]:
    """Delete every row of an owner; return the ids, whose values are to be destroyed after the commit."""
    ids = list(session.exec(select(WebhookSecret.id).where(WebhookSecret.owner_id == owner_id)))
    session.execute(sa.delete(WebhookSecret).where(col(WebhookSecret.owner_id) == owner_id))
    return ids


async def sweep_unreferenced(
    database: Database, vault: Vault, *, older_than_seconds: float, at: float | None = None
) -> int:
    """Destroy values in the vault that no row names, left by a crash between vault and row; return how many.

    ``at``: the time to count from, by default the database's now. Raises SecretStoreUnavailable, DatabaseUnavailable.
    """
    now_at = await database.read(now) if at is None else at
    swept = 0
    for prefix, named in ((PREFIX, _named_secrets), (SETTINGS_PREFIX, _named_settings)):
        found = await vault.owners(prefix)
        old = [owner for owner, made_at in found if made_at < now_at - older_than_seconds]
        for start in range(0, len(old), BATCH):
            some = old[start : start + BATCH]
            known = await database.read(partial(named, owners=some))
            for owner in set(some) - known:
                await vault.destroy(owner)
                swept += 1
    if swept:
        log.warning("webhook_secret.swept", count=swept)
    return swept


def _named_secrets(session: Session, *, owners: Sequence[str]) -> set[str]:
    ids = [owner.removeprefix(PREFIX) for owner in owners]
    return {vault_owner(one) for one in session.exec(select(WebhookSecret.id).where(col(WebhookSecret.id).in_(ids)))}


def _named_settings(session: Session, *, owners: Sequence[str]) -> set[str]:
    ids = {owner.removeprefix(SETTINGS_PREFIX).partition("/")[0] for owner in owners}
    found = session.exec(select(WebhookSource).where(col(WebhookSource.id).in_(ids)))
    return {settings_owner(row.id, row.settings_version) for row in found}


class LastUsed:
    """Writes when a secret was last the one that matched, behind the call and once a minute each at most.

    It tells an operator when an old secret is no longer used, so it may be lost: with the process, and when the database is
    not available. The next use makes up for it.
    """

    def __init__(self, database: Database) -> None:
        """Begin with nothing noted."""
        self._database = database
        self._noted: dict[str, float] = {}
        self._written_at: dict[str, float] = {}
        self._writing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def note(self, secret_id: str) -> None:
        """Remember that this secret matched just now."""
        at, written_at = time.monotonic(), self._written_at.get(secret_id)
        if self._closing.is_set() or (written_at is not None and at - written_at < NOTED_SECONDS):
            return
        if len(self._written_at) >= MOST_KNOWN:
            self._written_at.clear()
        self._written_at[secret_id] = self._noted[secret_id] = at
        if self._writing is None or self._writing.done():
            # A context of its own: what is logged belongs to no request.
            self._writing = asyncio.create_task(self._write(), context=contextvars.Context())

    async def _write(self) -> None:
        while self._noted:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), EVERY_SECONDS)
            batch, self._noted = self._noted, {}
            try:
                await self._database.transaction(partial(_mark, noted=batch))
            except BrokerError as error:
                log.warning("webhook_secret.use_lost", secrets=len(batch), code=error.code)

    async def aclose(self) -> None:
        """Write what is noted, then return."""
        self._closing.set()
        if self._writing is not None:
            await asyncio.wait({self._writing})


def _mark(session: Session, *, noted: Mapping[str, float]) -> None:
    at, monotonic = now(session), time.monotonic()
    for secret_id, noted_at in sorted(noted.items()):  # in one order: two replicas do not lock each other out
        changed = sa.update(WebhookSecret).where(col(WebhookSecret.id) == secret_id)
        session.execute(changed.values(last_used_at=at - (monotonic - noted_at)))
