"""`broker doctor`: look at everything that can be looked at from here, and say what is wrong with it and what to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict

from broker.app import Parts, open_parts
from broker.cli.doctor import secrets, surroundings, upkeep
from broker.cli.doctor.findings import Finding
from broker.cli.running import Json, fail, guarded, quiet_settings, require_database, show_rows
from broker.errors import BrokerError

COLUMNS = ["check", "state", "detail", "advice"]
Check = Callable[[Parts], Awaitable[list[Finding]]]


def doctor(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Look for what is wrong.

    Checks the settings, the schema, everything that the broker needs to reach, the clocks, the audit chain, every sealed
    value and what names it, the ages of keys, webhooks and the running processes; each finding says what to do. Every sealed
    value is opened, so it takes a while where there are many; nothing is changed. Ends with status 1 when a check failed;
    warnings do not count.
    """
    findings = guarded(lambda: asyncio.run(_examined()))
    show_rows([asdict(one) for one in findings], COLUMNS, as_json=as_json)
    failed = [one.check for one in findings if one.state == "failed"]
    if failed:
        fail(f"{len(failed)} checks failed: {', '.join(dict.fromkeys(failed))}")


async def _examined() -> list[Finding]:
    settings = quiet_settings()
    await require_database(settings)
    first = [*surroundings.configuration(settings), await surroundings.schema(settings)]
    if first[-1].state == "failed":
        return first  # opening the parts would bring it to this version's
    async with open_parts(settings) as parts:
        return [*first, *[finding async for finding in _findings(parts)]]


async def _findings(parts: Parts) -> AsyncIterator[Finding]:
    checks: Sequence[tuple[str, Check]] = (
        ("ready", surroundings.ready),
        ("clock", surroundings.clock),
        ("redis", surroundings.redis),
        ("audit", upkeep.audit),
        ("secrets", secrets.unreadable),
        ("connections", secrets.of_connections),
        ("webhook_secrets", secrets.of_webhooks),
        ("keys", upkeep.keys),
        ("callers", upkeep.callers),
        ("integrations", upkeep.integrations),
        ("webhooks", upkeep.webhooks),
        ("processes", surroundings.processes),
    )
    for name, check in checks:
        try:
            found = await check(parts)
        except BrokerError as error:
            advice = "mend what it needs first, and ask again"
            found = [Finding(name, "failed", f"cannot be checked: {error.detail}", advice)]
        for finding in found:
            yield finding
