"""What became of proxied calls, written to the audit behind them and in groups.

The intent is durable before a credential leaves and names everything that is to be proven: who, whose connection, where to.
What it came to is worth a record too, but not one each: the outcomes of a fraction of a second share one record, which names
their intents. An intent without an outcome says that a process ended in between: then it is unknown.
"""

from __future__ import annotations

import asyncio
import contextvars
from dataclasses import dataclass

import structlog

from broker.audit import Audit, Entry
from broker.errors import AuditUnavailable

ACTION = "connection.proxy_outcomes"
EVERY_SECONDS = 0.25
AT_ONCE = 200
MOST_WAITING = 20_000
RETRY_SECONDS = 2.0
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """What one call came to. ``status``: the upstream's, None without an answer. ``code``: our error's, None without one."""

    intent_id: str
    status: int | None
    code: str | None
    attempts: int
    ms: int


class Outcomes:
    """One for a process. ``note`` never waits; what cannot be written is tried again, and counted where there is too much."""

    def __init__(self, audit: Audit) -> None:
        """Begin with nothing noted."""
        self._audit = audit
        self._noted: list[CallOutcome] = []
        self._writing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def note(self, outcome: CallOutcome) -> None:
        """Remember an outcome; it is written within a second while the audit is well."""
        if len(self._noted) >= MOST_WAITING:
            log.warning("audit.outcome_lost", intent_id=outcome.intent_id)
            return
        self._noted.append(outcome)
        if self._writing is None or self._writing.done():
            # A context of its own: what is logged belongs to no request.
            self._writing = asyncio.create_task(self._write(), context=contextvars.Context())

    async def _write(self) -> None:
        while self._noted:
            if len(self._noted) < AT_ONCE:
                await self._pause(EVERY_SECONDS)
            batch = self._noted[:AT_ONCE]
            try:
                await self._audit.record(_entry(batch))
            except AuditUnavailable:
                if self._closing.is_set():
                    log.warning("audit.outcomes_lost", calls=len(self._noted))
                    return
                await self._pause(RETRY_SECONDS)
                continue
            del self._noted[: len(batch)]

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return

    async def aclose(self) -> None:
        """Write what is noted, then return."""
        self._closing.set()
        if self._writing is not None:
            await asyncio.wait({self._writing})


def _entry(batch: list[CallOutcome]) -> Entry:
    """Return one record for all. A line each, ``intent status code attempts ms`` and ``-`` for what there is not.

    As text, because checking, linking and storing five values of each would cost a twentieth of a call.
    """
    lines = [f"{one.intent_id} {one.status or '-'} {one.code or '-'} {one.attempts} {one.ms}" for one in batch]
    return Entry(action=ACTION, actor="system", detail={"calls": lines})
