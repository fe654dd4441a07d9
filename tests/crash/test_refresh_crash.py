"""A process that refreshes is killed by SIGKILL at chosen moments: the newest token, or a named reason.

Random moments, hundreds of them, are in ``test_kill_campaign.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog

from broker.app import new_worker, open_parts
from broker.demo.sandbox import Fault, SandboxOptions
from broker.errors import BrokerError
from broker.models import RefreshLease
from providers.spec import Refresh
from tests.flows.rig import Rig, eventually, open_rig, settings_for
from tests.flows.time_passes import behaves, fresh, left_over, row_of, set_row, wait_is_over

ROOT = Path(__file__).resolve().parents[2]
TRIES = 4


# --- the process that is killed ---------------------------------------------------------------------------------------------


async def keep_refreshing(data_dir: str, base: str, database_url: str, grace_seconds: str, ids: list[str]) -> None:
    """Ask for a token of every connection, again and again; say when it begins."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    settings = settings_for(Path(data_dir), base, database_url=database_url)
    async with open_parts(settings) as parts:
        behaves(parts, Refresh(grace_seconds=int(grace_seconds)))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            await asyncio.gather(*(fresh(parts, connection_id) for connection_id in ids), return_exceptions=True)
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def refreshing(rig: Rig, ids: list[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run such a process; it is killed at the end of the block at the latest."""
    settings = rig.parts.settings
    oauth2 = rig.parts.integrations.catalog["oidc"].oauth2
    assert oauth2 is not None
    given = [str(settings.data_dir), rig.base, settings.effective_database_url, str(oauth2.refresh.grace_seconds)]
    command = [sys.executable, __file__, *given, *ids]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        await process.communicate()


async def later(rig: Rig) -> None:
    """Let the time pass after which the leases of the dead end."""
    over = sa.update(RefreshLease).values(expires_at=0.0)
    await rig.parts.database.transaction(lambda session: session.execute(over))


async def restarted(rig: Rig) -> None:
    """Do what the worker of a fresh process does first."""
    await later(rig)
    async with open_parts(rig.parts.settings) as parts:
        await new_worker(parts).finish_cut_off()


async def imported(rig: Rig, login: str) -> str:
    minted = rig.sandbox.state.mint(login, "openid")
    tokens = {name: minted[name] for name in ("access_token", "refresh_token")}
    credentials = {"type": "oauth2", **tokens, "expires_at": "2020-01-01T00:00:00Z"}
    body = {"integration": "sandbox", "subject": f"acme:{login}", "credentials": credentials}
    made = await rig.call("POST", "/v1/connections", body)
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def is_alive(rig: Rig, connection_id: str) -> bool:
    """Whether a fresh token comes, and the provider's API takes it.

    The second one counts: a provider's grace period repeats its first answer, whose token may be over by now.
    """
    try:
        for _ in range(2):
            await wait_is_over(rig.parts.database, connection_id)
            handout = await fresh(rig.parts, connection_id)
    except BrokerError:
        return False
    return (await rig.whoami(handout.access_token.reveal())).status_code == 200


# --- chosen moments ----------------------------------------------------------------------------------------------------------


async def killed_when(rig: Rig, connection_id: str, seen: Callable[[], Any]) -> None:
    async with refreshing(rig, [connection_id]) as process:
        await eventually(seen)
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("mode", ["strict", "grace"])
async def test_killed_before_the_provider_acted_the_same_token_is_sent_again(tmp_path: Path, mode: str) -> None:
    async with open_rig(tmp_path, options=SandboxOptions(mode=mode)) as rig:  # type: ignore[arg-type]
        connection_id = await imported(rig, "ada")
        rig.sandbox.state.add_fault(Fault(kind="stall", seconds=30))
        await killed_when(rig, connection_id, lambda: arrived(rig))
        assert (await left_over(rig.parts.database, connection_id))[0] is True
        await restarted(rig)
        assert (await row_of(rig.parts.database, connection_id)).unknown_outcomes == 1
        assert await is_alive(rig, connection_id)
        assert rig.sandbox.state.counters.reuse_alarms == 0
        assert rig.sandbox.state.counters.concurrent_senders == 0


async def arrived(rig: Rig) -> bool:
    return bool(rig.sandbox.state.token_requests())


async def committed(rig: Rig) -> bool:
    return rig.sandbox.state.counters.refreshes > 0


@pytest.mark.parametrize("mode", ["strict", "grace"])
async def test_killed_between_answer_and_journal(tmp_path: Path, mode: str) -> None:
    async with open_rig(tmp_path, options=SandboxOptions(mode=mode)) as rig:  # type: ignore[arg-type]
        behaves(rig.parts, Refresh(grace_seconds=30 if mode == "grace" else 0))
        connection_id = await imported(rig, "ada")
        rig.sandbox.state.configure(latency_seconds=30)
        await killed_when(rig, connection_id, lambda: committed(rig))
        rig.sandbox.state.configure(latency_seconds=0)
        await restarted(rig)
        assert await is_alive(rig, connection_id) is (mode == "grace")
        row = await row_of(rig.parts.database, connection_id)
        expected = ("active", None) if mode == "grace" else ("reauthorization_required", "refresh_outcome_unknown")
        assert (row.status, row.status_reason) == expected


WINDOWS = {
    "after the journal": "SELECT count(*) FROM refresh_journal, connections c WHERE c.secret_version = 1"
    " AND NOT EXISTS (SELECT 1 FROM sealed_secrets WHERE owner = 'connections/' || c.id AND version > 1)",
    "after the vault": "SELECT count(*) FROM sealed_secrets s, connections c"
    " WHERE s.owner = 'connections/' || c.id AND s.version = 2 AND c.secret_version = 1",
    "after the row": "SELECT count(*) FROM connections c, refresh_leases l"
    " WHERE c.secret_version = 2 AND l.connection_id = c.id AND l.owner IS NOT NULL",
}


@pytest.mark.parametrize("window", WINDOWS)
async def test_killed_once_the_answer_is_durable_nothing_is_lost(tmp_path: Path, window: str) -> None:
    async with open_rig(tmp_path, options=SandboxOptions(mode="strict")) as rig:
        for number in range(TRIES):
            connection_id = await imported(rig, f"user{number}")
            stopped = await killed_in(rig, connection_id, WINDOWS[window])
            await restarted(rig)
            row = await row_of(rig.parts.database, connection_id)
            assert row.secret_version >= 2
            assert (await left_over(rig.parts.database, connection_id))[:2] == (False, False)
            handout = await fresh(rig.parts, connection_id)
            assert (await rig.whoami(handout.access_token.reveal())).status_code == 200
            assert rig.sandbox.state.counters.reuse_alarms == 0
            if stopped:
                return
            await set_row(rig.parts.database, connection_id, secret_version=9)  # out of the next try's way
        pytest.fail("the window was missed each time")


async def killed_in(rig: Rig, connection_id: str, condition: str) -> bool:
    """Stop the process where ``condition`` holds, by taking the only write lock; say whether that moment was caught."""
    path = str(rig.parts.settings.data_dir / "broker.db")
    async with refreshing(rig, [connection_id]) as process:
        return await asyncio.to_thread(catch, path, condition, process)


def catch(path: str, condition: str, process: asyncio.subprocess.Process) -> bool:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as database:
        for _ in range(400_000):
            try:
                database.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                continue
            caught = database.execute(condition).fetchone()[0] > 0
            if caught:
                process.send_signal(signal.SIGKILL)
            database.execute("ROLLBACK")
            if caught:
                return True
    return False


if __name__ == "__main__":
    asyncio.run(keep_refreshing(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:]))
