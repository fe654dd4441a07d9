"""A process that is told to end does so quickly, whoever waits in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path

from broker.demo.sandbox import SandboxOptions
from tests.crash.processes import connected, import_expired, open_site, serve, token_request


async def test_who_waits_for_a_dead_processs_lease_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    """A caller waits here until somebody else's lease is over, which takes longer than Kubernetes waits by default."""
    async with open_site(tmp_path, "", SandboxOptions()) as site:
        connection_id = await import_expired(site, "ada")
        assert await site.parts.credentials.claim(connection_id) is not None  # and never given back
        async with contextlib.AsyncExitStack() as afterwards:
            async with serve(site, tmp_path / "one.log") as port:
                wire = await afterwards.enter_async_context(connected(port))
                asking = asyncio.create_task(wire.ask(token_request(site, connection_id)))
                await asyncio.sleep(1.0)
                assert not asking.done()
                stopping_at = time.monotonic()
            assert time.monotonic() - stopping_at < 10.0
            status, body = await asking
        assert (status, json.loads(body)["code"]) == (504, "upstream_timeout")
