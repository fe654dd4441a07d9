"""Hundreds of kills during refreshes: nothing is lost but what only the killed process knew, and that is named as such.

Strict on SQLite, grace on PostgreSQL. The normal run lasts half a minute each; ``TEST_LONG=1`` goes through 300 rounds.
``TEST_SEED`` repeats a run's choices, as far as the machine's timing lets it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from broker.demo.sandbox import SandboxOptions
from tests.crash.campaign import Account, Campaign, open_forks
from tests.crash.evidence import noted
from tests.crash.processes import open_site
from tests.flows.time_passes import audited, left_over, row_of

LONG = os.environ.get("TEST_LONG") == "1"
ROUNDS, SECONDS = (300, 3600.0) if LONG else (300, 20.0)
SEED = os.environ.get("TEST_SEED", "20261121")
LEAST_SHARE = 50 / 300  # of the kills between send and journal
FEW = 10  # rounds, of which no share is asked


@pytest.mark.timeout(5400)
@pytest.mark.parametrize(("mode", "url"), [("strict", "sqlite_url"), ("grace", "postgres_url")])
async def test_kills_at_any_moment_lose_nothing_that_was_not_lost_on_the_wire(
    tmp_path: Path, mode: str, url: str, request: pytest.FixtureRequest
) -> None:
    options = SandboxOptions(mode=mode, grace_seconds=86_400)  # type: ignore[arg-type]
    began = time.monotonic()
    async with open_site(tmp_path, request.getfixturevalue(url), options, timeout_seconds=2) as site:
        async with open_forks(site) as forks:
            campaign = Campaign(site, forks, f"{SEED} {mode}", patient=LONG)
            await campaign.run(rounds=ROUNDS, seconds=SECONDS)
            spent = campaign.sandbox_log.committed_without_journal(await noted(site.parts.database))
            lost = {account.login for account in campaign.accounts if await is_lost(campaign, account)}
            report(campaign, mode, lost, time.monotonic() - began)
            for account in campaign.accounts:
                await check(campaign, account, lost=account.login in lost)
        counters, figures = site.sandbox.state.counters, campaign.figures
        assert counters.concurrent_senders == 0
        assert lost == (spent if mode == "strict" else set())
        assert counters.reuse_alarms == len(lost)
        assert len(await audited(site.parts.database, "connection.reauthorization_required")) == len(lost)
        assert figures.rounds < FEW or figures.between_send_and_journal >= LEAST_SHARE * figures.rounds
        assert figures.refused_late >= figures.stopped
        assert (await site.parts.audit.verify()).ok


async def is_lost(campaign: Campaign, account: Account) -> bool:
    row = await row_of(campaign.site.parts.database, account.connection_id)
    return row.status != "active"


async def check(campaign: Campaign, account: Account, *, lost: bool) -> None:
    """Each connection hands out the sandbox's newest token, or says why it cannot; and nothing of a refresh is left."""
    database, state = campaign.site.parts.database, campaign.site.sandbox.state
    status, said = await campaign.final_answer(account)
    assert (await left_over(database, account.connection_id))[:2] == (False, False)
    if lost:
        row = await row_of(database, account.connection_id)
        assert (row.status, row.status_reason) == ("reauthorization_required", "refresh_outcome_unknown")
        assert (status, json.loads(said)["code"]) == (409, "reauthorization_required")
        return
    assert status == 200, said
    issued = [visit.issued_access for visit in campaign.sandbox_log.by_account[account.login] if visit.issued_access]
    assert said == issued[-1], "the newest token is handed out"
    assert said in state.access_tokens, "and it lives"


def report(campaign: Campaign, mode: str, lost: set[str], seconds: float) -> None:
    """Print where each kill fell, and what came of all of them."""
    figures, counters = campaign.figures, campaign.site.sandbox.state.counters
    lines = [f"-- crash run, {mode}, seed {SEED}: {figures.rounds} kills in {seconds:.0f} s"]
    lines += [f"{stage:18s} kills {figures.kills[stage]:4d}   refreshes {figures.refreshes[stage]:5d}"
              for stage in figures.kills]  # fmt: skip
    lines.append(
        f"between send and journal: {figures.between_send_and_journal} kills; connections {len(campaign.accounts)},"
        f" refreshes {counters.refreshes}, replays {counters.replays}, lost {len(lost)},"
        f" two senders at once {counters.concurrent_senders}, reuse alarms {counters.reuse_alarms};"
        f" frozen {figures.stopped} (late writes refused {figures.refused_late}), terminated {figures.terminated}"
    )
    sys.stdout.write("\n".join([*lines, ""]))
