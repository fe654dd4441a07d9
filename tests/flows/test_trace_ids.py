"""Lines of a request name the trace that it belongs to, where the caller says one in a form that is believed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from broker.settings import Secret, Settings
from broker.telemetry import configure_logging
from tests.commands import logging_as_before
from tests.flows.rig import open_rig

PRODUCTION = Settings(public_url="https://broker.test", keyring=Secret("k:" + "A" * 43 + "="))
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", TRACE),
        ("00-nonsense-01", None),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", None),
    ],
)
async def test_a_lines_trace_is_the_callers_or_none(tmp_path: Path, sent: str, told: str | None) -> None:
    stream = io.StringIO()
    async with open_rig(tmp_path) as rig:
        with logging_as_before():
            configure_logging(PRODUCTION, stream=stream)
            await rig.call("GET", "/v1/providers", traceparent=sent)
            await rig.call("GET", "/v1/callers")
    lines = {one["route"]: one for one in map(json.loads, stream.getvalue().splitlines()) if one["event"] == "http"}
    assert lines["/v1/providers"].get("trace_id") == told
    assert "trace_id" not in lines["/v1/callers"]
