"""`broker doctor`: look at everything that can be looked at from here, and say what is wrong with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

from sqlmodel import col, select

from broker.app import Parts, database_of, open_parts
from broker.cli.running import Json, fail, guarded, quiet_settings, require_database, show_rows
from broker.database import head_revision, older_revisions
from broker.errors import BrokerError
from broker.health import readiness
from broker.models import Integration
from broker.replicas import live
from broker.settings import Settings
from broker.vault.scan import find_misnamed, find_unreadable

MOST_NAMED = 50  # of one kind; a damaged table would else be printed whole


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check came to. ``state``: ok, warning (works, but somebody should look) or failed."""

    check: str
    state: str
    detail: str


def doctor(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Look for what is wrong.

    Checks the schema, the database's clock, the vault, the audit chain, every sealed value and what names it, the
    integrations' settings and the running processes. Every sealed value is opened, so it takes a while where there are many;
    nothing is changed. Ends with status 1 when a check failed; warnings do not count.
    """
    findings = guarded(lambda: asyncio.run(_examined()))
    show_rows([asdict(one) for one in findings], ["check", "state", "detail"], as_json=as_json)
    failed = [one.check for one in findings if one.state == "failed"]
    if failed:
        fail(f"{len(failed)} checks failed: {', '.join(dict.fromkeys(failed))}")


async def _examined() -> list[Finding]:
    settings = quiet_settings()
    await require_database(settings)
    schema = await _schema(settings)
    if schema.state == "failed":
        return [schema]  # opening the parts would bring it to this version's
    async with open_parts(settings) as parts:
        return [schema, *[finding async for finding in _findings(parts)]]


async def _schema(settings: Settings) -> Finding:
    database = database_of(settings)
    try:
        revision = await database.schema_revision()
    finally:
        await database.aclose()
    if revision in older_revisions():
        return Finding("schema", "failed", f"is at {revision}, this version needs {head_revision()}: `broker migrate`")
    newer = revision != head_revision()
    return Finding("schema", "ok", f"is at {revision}" + (", which is newer than this version" if newer else ""))


async def _findings(parts: Parts) -> AsyncIterator[Finding]:
    checks: Sequence[tuple[str, Callable[[Parts], Awaitable[list[Finding]]]]] = (
        ("ready", _ready),
        ("audit", _audit),
        ("secrets", _secrets),
        ("connections", _connections),
        ("integrations", _integrations),
        ("processes", _processes),
    )
    for name, check in checks:
        try:
            found = await check(parts)
        except BrokerError as error:
            found = [Finding(name, "failed", f"cannot be checked: {error.detail}")]
        for finding in found:
            yield finding


async def _ready(parts: Parts) -> list[Finding]:
    failing = await readiness(parts.database, parts.vault, parts.audit)
    names = ("database", "clock_skew", "vault", "audit")
    return [Finding(one, "failed" if one in failing else "ok", failing.get(one, "works")) for one in names]


async def _audit(parts: Parts) -> list[Finding]:
    verdict = await parts.audit.verify()
    if verdict.ok:
        return [Finding("audit", "ok", f"the chain is whole, {verdict.count} records")]
    return [Finding("audit", "failed", f"the chain is broken ({verdict.problem}): see `broker audit verify`")]


async def _secrets(parts: Parts) -> list[Finding]:
    found = await find_unreadable(parts.database, parts.sealer)
    findings = [
        Finding("secrets", "failed", f"{one.owner} version {one.version} ({one.place}) {one.why}")
        for one in found[:MOST_NAMED]
    ]
    return _and_the_rest(findings, "secrets", len(found)) or [Finding("secrets", "ok", "every sealed value opens")]


async def _connections(parts: Parts) -> list[Finding]:
    if parts.settings.vault != "local":
        return []  # their secrets are elsewhere, and a look at each would be a call
    found = sorted(await find_misnamed(parts.database), key=lambda one: not one.lost)
    findings = []
    for one in found[:MOST_NAMED]:
        stored = "there is none" if one.stored is None else f"the newest is {one.stored}"
        hint = "" if one.lost else ": a crash left it, or somebody put the row back"
        detail = f"{one.connection_id} names version {one.version} of its secret, {stored}{hint}"
        findings.append(Finding("connections", "failed" if one.lost else "warning", detail))
    ok = Finding("connections", "ok", "every connection names the newest version of its secret")
    return _and_the_rest(findings, "connections", len(found)) or [ok]


def _and_the_rest(findings: list[Finding], check: str, count: int) -> list[Finding]:
    more = count - len(findings)
    return [*findings, Finding(check, "warning", f"and {more} more")] if more else findings


async def _integrations(parts: Parts) -> list[Finding]:
    query = select(Integration).order_by(col(Integration.name))
    rows = await parts.database.read(lambda session: session.exec(query).all())
    unsafe = [row.name for row in rows if row.config.get("confirm") == "without_session"]
    why = "makes connections of a session active at once: a forwarded link connects a stranger's account"
    return [Finding("integrations", "warning", f"{name} {why}") for name in unsafe] or [
        Finding("integrations", "ok", "every connection needs its confirm")
    ]


async def _processes(parts: Parts) -> list[Finding]:
    running = await parts.database.read(live)
    if not running:
        return [Finding("processes", "warning", "none is running")]
    return [Finding("processes", "ok", f"{one.id}: {one.kind} on {one.host}, version {one.version}") for one in running]
