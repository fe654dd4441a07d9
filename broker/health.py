"""Is every part that this process needs in working order? Each failing part is named, with what to do."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable

from sqlmodel import Session

from broker.audit import Audit
from broker.database import Database, now, older_revisions
from broker.errors import BrokerError
from broker.vault import SecretNotFound, SecretUnreadable, Vault

PROBED_OWNER = "health/probe"
PATIENCE_SECONDS = 3.0
MOST_SKEW_SECONDS = 300.0
BELIEVED_SECONDS = 1.0


async def readiness(database: Database, vault: Vault, audit: Audit) -> dict[str, str]:
    """Return what fails by part, in our words; empty when all is well. Takes ``PATIENCE_SECONDS`` at most.

    ``database`` (answers, takes writes, has this version's schema or a newer one: migrations only
    expand, so that old replicas go on while new ones come), ``clock_skew`` (its clock against ours), ``vault`` and
    ``audit``. Nothing is written.
    """
    checks: dict[str, Callable[[], Awaitable[str | None]]] = {
        "database": lambda: _database(database),
        "clock_skew": lambda: _clock(database),
        "vault": lambda: _vault(vault),
        "audit": lambda: _audit(audit),
    }
    verdicts = await asyncio.gather(*map(_bounded, checks.values()))
    return {name: verdict for name, verdict in zip(checks, verdicts, strict=True) if verdict is not None}


def cached_readiness(database: Database, vault: Vault, audit: Audit) -> Callable[[], Awaitable[dict[str, str]]]:
    """Return ``readiness`` with a memory of a second: anybody may ask, and an answer takes the write lock."""
    asking, known = asyncio.Lock(), [(-math.inf, dict[str, str]())]

    async def verdict() -> dict[str, str]:
        async with asking:
            if time.monotonic() - known[0][0] >= BELIEVED_SECONDS:
                known[0] = (time.monotonic(), await readiness(database, vault, audit))
            return known[0][1]

    return verdict


@functools.cache
def _older_revisions() -> frozenset[str]:
    return older_revisions()


async def _bounded(check: Callable[[], Awaitable[str | None]]) -> str | None:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await check()
    except TimeoutError:
        return "does not answer in time"
    except BrokerError as error:
        return error.detail


async def _database(database: Database) -> str | None:
    revision = await database.schema_revision()
    if revision is None or revision in _older_revisions():
        return "the schema is older than this version's; run `broker migrate`"
    await database.transaction(_nothing)
    return None


def _nothing(session: Session) -> None:
    """Take the write lock that every write needs, and give it back."""
    session.connection()


async def _clock(database: Database) -> str | None:
    try:
        skew_seconds = abs(await database.read(now) - time.time())
    except BrokerError:
        return None  # the database's own line says it
    return (
        None if skew_seconds < MOST_SKEW_SECONDS else "this machine's clock and the database's differ by over 5 minutes"
    )


async def _vault(vault: Vault) -> str | None:
    try:
        await vault.get(PROBED_OWNER)
    except SecretNotFound:
        return None  # the store answered: there is no such secret, and there should be none
    except SecretUnreadable:
        return "the store answers with what does not open"
    return None


async def _audit(audit: Audit) -> str | None:
    await audit.search(limit=1)
    return None
