"""Log lines to an OpenTelemetry collector, beside standard error; without one nothing is loaded and nothing done."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping

from broker.settings import Settings
from broker.telemetry import lines_taken
from broker.tracing.collector import wanted


@contextlib.asynccontextmanager
async def sending_logs(
    settings: Settings, lost: Callable[[str, int], None], environ: Mapping[str, str] | None = None
) -> AsyncIterator[None]:
    """Send this process's log lines over OTLP/HTTP while the block runs, where the environment names a collector for logs.

    Logging is configured already. Lines wait in a bounded queue for a thread of their own; what a slow or absent collector
    does not take is lost, never waited for: ``lost(why, count)`` counts it, in any thread. At the end what is left is sent,
    within five seconds. ``environ`` stands in for the process's environment where it decides whether there is a collector;
    the SDK reads its variables from the process.
    """
    environ = os.environ if environ is None else environ
    if not wanted(environ, "LOGS"):
        yield
        return
    from broker.tracing.log_records import Sending  # noqa: PLC0415 - the SDK costs half a second and 20 MB

    sending = Sending(settings, environ, lost)
    try:
        with lines_taken(sending.take):
            yield
    finally:
        await sending.aclose()
