"""What is around the broker: its settings, the parts that it needs, the clocks, and the processes that are alive."""

from __future__ import annotations

import time
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from broker import __version__
from broker.app import Parts, database_of
from broker.cli.doctor.findings import Finding
from broker.database import head_revision, now, older_revisions
from broker.health import readiness
from broker.replicas import live
from broker.settings import Settings

NOTED_SKEW_SECONDS: Final = 5.0
REDIS_SECONDS: Final = 2.0
PARTS: Final = {
    "database": "see BROKER_DATABASE_URL in docs/settings.md, and docs/disasters.md when it is lost",
    "clock_skew": "let both machines take the time from the same source (NTP)",
    "vault": "see the last table of docs/vault.md, and docs/disasters.md when it is lost",
    "audit": "nothing is handed out until this works; look at `broker audit verify`",
}


async def schema(settings: Settings) -> Finding:
    """Say which schema the database has; nothing is migrated (DatabaseUnavailable)."""
    database = database_of(settings)
    try:
        revision = await database.schema_revision()
    finally:
        await database.aclose()
    if revision in older_revisions():
        detail = f"is at {revision}, this version needs {head_revision()}: `broker migrate`"
        return Finding("schema", "failed", detail, "run `broker migrate`, then ask again")
    newer = revision != head_revision()
    return Finding("schema", "ok", f"is at {revision}" + (", which is newer than this version" if newer else ""))


def configuration(settings: Settings) -> list[Finding]:
    """Judge settings that are valid and yet not what production should have (pure)."""
    if settings.development:
        return [Finding("configuration", "ok", "BROKER_ENV=development: plain http and loopback are allowed")]
    found = [Finding("configuration", "warning", detail, advice) for detail, advice in _weak_spots(settings)]
    return found or [Finding("configuration", "ok", "BROKER_ENV=production, and nothing that weakens it")]


def _weak_spots(settings: Settings) -> list[tuple[str, str]]:
    found = []
    if {"public", "admin"} <= set(settings.routes):
        what = (
            "BROKER_ROUTES has public and admin on one listener: /metrics and /schema answer everybody who reaches it"
        )
        found.append((what, "serve strangers from processes with BROKER_ROUTES=public"))
    if settings.admin_key is not None:
        what = "BROKER_ADMIN_KEY is set: a key that may do everything stands in the environment"
        found.append((what, "make an administrator with `broker callers add`, then remove it"))
    if not settings.audit_checkpoints:
        what = "BROKER_AUDIT_CHECKPOINTS is empty: whoever puts back an older database is not noticed"
        found.append((what, "name a place that the database's writer cannot reach"))
    if settings.vault_fallback is not None:
        what = "BROKER_VAULT_FALLBACK is set: secrets are in two stores"
        found.append((what, "finish the move, docs/vault.md"))
    return found


async def ready(parts: Parts) -> list[Finding]:
    """Ask everything that readiness asks."""
    failing = await readiness(parts.database, parts.vault, parts.audit)
    return [
        Finding(name, "failed", failing[name], advice) if name in failing else Finding(name, "ok", "works")
        for name, advice in PARTS.items()
    ]


async def clock(parts: Parts) -> list[Finding]:
    """Compare the database's clock with this machine's; SQLite has none of its own (DatabaseUnavailable)."""
    before = time.time()
    there = await parts.database.read(now)
    seconds = there - (before + time.time()) / 2
    if abs(seconds) > NOTED_SKEW_SECONDS:
        detail = f"the database's clock is {seconds:+.0f} s from this machine's"
        return [Finding("clock", "warning", detail, PARTS["clock_skew"])]
    return [Finding("clock", "ok", f"the database's is within {NOTED_SKEW_SECONDS:.0f} s of this machine's")]


async def redis(parts: Parts) -> list[Finding]:
    """Ask Redis, where it is configured; its address is shown nowhere."""
    if parts.settings.redis_url is None:
        return [Finding("redis", "ok", "is not used: each process counts rates for itself")]
    client = Redis.from_url(
        parts.settings.redis_url.reveal(),
        retry=Retry(NoBackoff(), 0),
        socket_timeout=REDIS_SECONDS,
        socket_connect_timeout=REDIS_SECONDS,
    )
    try:
        await client.execute_command("PING")  # type: ignore[no-untyped-call]
    except (RedisError, OSError):
        advice = "each process counts rates for itself until it answers; see BROKER_REDIS_URL in docs/settings.md"
        return [Finding("redis", "failed", "does not answer", advice)]
    finally:
        await client.aclose()
    return [Finding("redis", "ok", "answers")]


async def processes(parts: Parts) -> list[Finding]:
    """Name the processes that are alive, and tell when they are of several versions (DatabaseUnavailable)."""
    running = await parts.database.read(live)
    if not running:
        return [Finding("processes", "warning", "none is running", "start `broker serve`")]
    found = [
        Finding("processes", "ok", f"{one.id}: {one.kind} on {one.host}, version {one.version}") for one in running
    ]
    others = sorted({one.version for one in running} - {__version__})
    if others:
        detail = f"this is version {__version__}, and there are processes of {', '.join(others)}"
        found.append(Finding("processes", "warning", detail, "finish the upgrade, before any key is rotated"))
    return found
