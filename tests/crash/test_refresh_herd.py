"""A thousand connections are over at once and thousands of callers ask two processes together: one refresh for each."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from broker.credentials import sha256_hex
from broker.demo.sandbox import SandboxOptions
from tests.crash.processes import ask_all_at_once, import_expired, open_site, serve, token_of, token_request

CONNECTIONS, CALLERS = 1000, 8
LOGINS = [f"user{number}" for number in range(CONNECTIONS)]
PROVIDER_SECONDS = 0.2


@pytest.mark.timeout(240)
async def test_a_thousand_connections_are_refreshed_once_each_and_every_caller_gets_the_newest_token(
    database_url: str, tmp_path: Path
) -> None:
    options = SandboxOptions(mode="strict", latency_seconds=PROVIDER_SECONDS)
    async with open_site(tmp_path, database_url, options) as site:
        ids = await asyncio.gather(*(import_expired(site, login) for login in LOGINS))
        async with serve(site, tmp_path / "one.log") as one, serve(site, tmp_path / "two.log") as two:
            asked = [
                (login, ((one, two)[caller % 2], token_request(site, connection_id)))
                for caller in range(CALLERS)
                for login, connection_id in zip(LOGINS, ids, strict=True)
            ]
            answers = await ask_all_at_once([request for _, request in asked])
        counters, visits = site.sandbox.state.counters, site.sandbox.state.token_requests()
        assert len(visits) == counters.refreshes == CONNECTIONS
        assert (counters.reuse_alarms, counters.concurrent_senders) == (0, 0)
        newest = {visit.account: visit.issued_access for visit in visits}
        handed_out = [(login, sha256_hex(token_of(answer))) for (login, _), answer in zip(asked, answers, strict=True)]
        assert [(login, newest[login]) for login in LOGINS] * CALLERS == handed_out
