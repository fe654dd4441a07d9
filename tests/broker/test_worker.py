"""The background jobs over a whole broker: what they do by themselves, and that one failure stops nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import SQLModel, col, func, select
from structlog.testing import capture_logs

from broker.app import new_worker, open_parts, running_worker
from broker.background_refresh import BackgroundRefresh
from broker.credentials import Credentials, secret_owner
from broker.database import Database, now
from broker.demo.sandbox import Fault
from broker.errors import DatabaseUnavailable, NotFound
from broker.models import (
    BrowserSession,
    Connection,
    DeviceFlow,
    Flow,
    IdempotentAnswer,
    IntegrationLog,
    SealedSecret,
    new_id,
)
from broker.vault import SecretNotFound
from broker.worker import Job, Worker
from providers.spec import Refresh
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.time_passes import audited, behaves, ends_in, left_over, row_of, set_row

DAY = 86_400.0


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as made:
        yield made


def worker_of(rig: Rig) -> Worker:
    return new_worker(rig.parts)


async def used(rig: Rig, *, left_seconds: float, user: str = "ada") -> str:
    """Return a connection that was made an hour ago, was used a moment ago, and whose token ends soon."""
    connection = await rig.connected(user=user)
    at = await rig.parts.database.read(now)
    await set_row(rig.parts.database, connection["id"], created_at=at - 3600, last_used_at=at)
    await ends_in(rig.parts.database, connection["id"], left_seconds)
    return str(connection["id"])


async def add(database: Database, *rows: SQLModel) -> None:
    await database.transaction(lambda session: session.add_all(rows))


async def count(database: Database, table: type[SQLModel]) -> int:
    return await database.read(lambda session: session.exec(select(func.count()).select_from(table)).one())


# --- refreshing -------------------------------------------------------------------------------------------------------------


async def test_a_connection_in_use_is_refreshed_before_its_token_ends(tmp_path: Path) -> None:
    async with open_rig(tmp_path, worker=True) as rig:
        connection_id = await used(rig, left_seconds=100)

        async def refreshed() -> bool:
            return rig.sandbox.state.counters.refreshes == 1

        await eventually(refreshed)
        assert (await rig.token(connection_id)).json()["stale"] is False
        assert rig.sandbox.state.counters.refreshes == 1, "the caller did not have to wait"


async def test_what_is_not_due_is_left_alone(rig: Rig) -> None:
    database = rig.parts.database
    idle = await used(rig, left_seconds=100, user="ada")
    await set_row(database, idle, last_used_at=await database.read(now) - 8 * DAY)
    await used(rig, left_seconds=1000, user="grace")
    frozen = await used(rig, left_seconds=100, user="frozen")
    await set_row(database, frozen, status="frozen")
    waiting = await used(rig, left_seconds=100, user="waiting")
    await set_row(database, waiting, refresh_not_before_at=await database.read(now) + 60)
    gone = await used(rig, left_seconds=100, user="gone")
    await set_row(database, gone, deleted_at=await database.read(now))
    assert await worker_of(rig).refreshing.refresh_due() == 0
    assert rig.sandbox.state.counters.refreshes == 0


async def test_a_token_that_lives_a_minute_is_not_refreshed_all_the_time(rig: Rig) -> None:
    connection_id = await used(rig, left_seconds=50)
    await set_row(rig.parts.database, connection_id, created_at=await rig.parts.database.read(now) - 10)
    assert await worker_of(rig).refreshing.refresh_due() == 0


@pytest.mark.parametrize(("age_days", "refreshed"), [(10, False), (25, True)])
async def test_an_idle_connection_is_refreshed_only_before_its_refresh_token_dies_of_idleness(
    rig: Rig,
    age_days: float,
    refreshed: bool,  # noqa: FBT001
) -> None:
    behaves(rig.parts, Refresh(idle_seconds=int(30 * DAY), sliding=False))
    database = rig.parts.database
    connection_id = await used(rig, left_seconds=3000)
    at = await database.read(now)
    await set_row(database, connection_id, last_used_at=None, created_at=at - age_days * DAY)
    assert await worker_of(rig).refreshing.refresh_due() == int(refreshed)
    assert rig.sandbox.state.counters.refreshes == int(refreshed)


async def test_a_refresh_token_with_an_end_that_moves_is_refreshed_in_time(rig: Rig) -> None:
    database = rig.parts.database
    connection_id = await used(rig, left_seconds=3000)
    at = await database.read(now)
    await set_row(database, connection_id, created_at=at - 9 * DAY, refresh_expires_at=at + DAY)
    assert await worker_of(rig).refreshing.refresh_due() == 1
    assert await worker_of(rig).refreshing.refresh_due() == 0


async def test_one_that_nothing_can_be_done_for_rests_and_does_not_keep_the_others(rig: Rig) -> None:
    database = rig.parts.database
    moved = await used(rig, left_seconds=10, user="ada")
    await set_row(database, moved, pins={"token": "https://elsewhere.test"})
    fine = await used(rig, left_seconds=100, user="grace")
    worker = worker_of(rig)
    assert await worker.refreshing.refresh_due() == 2
    assert (await row_of(database, fine)).refreshed_at is not None
    assert await worker.refreshing.refresh_due() == 0, "it rests"
    worker.refreshing._resting = dict.fromkeys(worker.refreshing._resting, time.monotonic())
    assert await worker.refreshing.refresh_due() == 1


async def test_more_than_a_page_is_refreshed_in_one_go(rig: Rig) -> None:
    at = await rig.parts.database.read(now)
    fields: dict[str, Any] = {
        "integration": "sandbox",
        "provider": "oidc",
        "status": "active",
        "refreshable": True,
        "secret_version": 1,
        "last_used_at": at,
        "created_at": at - 3600,
    }
    rows = [
        Connection(id=new_id("con"), subject=f"s{number}", token_expires_at=at + number // 50, **fields)
        for number in range(230)
    ]
    await add(rig.parts.database, *rows)
    assert await worker_of(rig).refreshing.refresh_due() == 230
    assert rig.sandbox.state.counters.refreshes == 0, "their pins are not there"


# --- after a crash ----------------------------------------------------------------------------------------------------------


async def test_a_deletion_that_was_cut_off_is_finished(rig: Rig) -> None:
    database = rig.parts.database
    connection = await rig.connected()
    connection_id = connection["id"]
    token = (await rig.token(connection_id)).json()["access_token"]
    await set_row(database, connection_id, deleted_at=await database.read(now) - 61)
    await worker_of(rig).finish_cut_off()
    with pytest.raises(NotFound):
        await rig.parts.credentials.claim(connection_id)
    with pytest.raises(SecretNotFound):
        await rig.parts.vault.get(secret_owner(connection_id))
    assert (await rig.whoami(token)).status_code == 401
    assert await audited(database, "connection.disposed") == [{"revocation": "revoked"}]


async def test_a_deletion_that_fails_does_not_stop_the_next(rig: Rig) -> None:
    database = rig.parts.database
    ids = [(await rig.connected(user=user))["id"] for user in ("ada", "grace")]
    for connection_id in ids:
        await set_row(database, connection_id, deleted_at=await database.read(now) - 61)
    impatient = Credentials(
        database,
        rig.parts.vault,
        rig.parts.sealer,
        rig.parts.egress,
        rig.parts.integrations,
        rig.parts.audit,
        rig.parts.metrics,
        wait_seconds=0.1,
    )
    worker = new_worker(replace(rig.parts, credentials=impatient))
    async with rig.parts.credentials.holding(ids[0]):
        with capture_logs() as lines:
            await worker.finish_cut_off()
    failed = [(line["event"], line["connection_id"], line["code"]) for line in lines if "job" in line]
    assert failed == [("worker.failed", ids[0], "upstream_timeout")]
    assert await impatient.left_behind(older_than_seconds=60) == [ids[0]]


async def test_secrets_that_no_row_names_are_swept_after_a_day(rig: Rig) -> None:
    connection = await rig.connected()
    orphan = secret_owner(new_id("con"))
    await rig.parts.vault.put(orphan, {"access_token": "x"}, expected_version=0)
    at = await rig.parts.database.read(now)
    sweep = rig.parts.credentials.sweep_unreferenced
    assert await sweep() == 0
    assert await sweep(at=at + DAY - 10) == 0
    assert await sweep(at=at + DAY + 10) == 1
    with pytest.raises(SecretNotFound):
        await rig.parts.vault.get(orphan)
    assert (await rig.token(connection["id"])).status_code == 200
    assert await count(rig.parts.database, SealedSecret) == 2, "the connection's and the client secret"


async def test_what_is_left_of_a_secret_that_was_destroyed_is_swept_unless_a_new_one_is_being_written(rig: Rig) -> None:
    connection, other = await rig.connected(), await rig.connected("acme:7", "bob")
    for name, version in ((connection["id"], -1), (other["id"], 0)):
        emptied = (
            sa.update(Connection).where(col(Connection.id) == name).values(status="revoked", secret_version=version)
        )
        await rig.parts.database.transaction(lambda session, emptied=emptied: session.execute(emptied))  # type: ignore[misc]
    at = await rig.parts.database.read(now)
    sweep = rig.parts.credentials.sweep_unreferenced
    assert await sweep(at=at + DAY - 10) == 0
    async with rig.parts.credentials.holding(connection["id"]):
        assert await sweep(at=at + DAY + 10) == 1, "an import writes to the other one"
    await rig.parts.vault.get(secret_owner(connection["id"]))
    assert await sweep(at=at + DAY + 10) == 1
    assert await count(rig.parts.database, SealedSecret) == 1, "the client secret"


# --- tidying ------------------------------------------------------------------------------------------------------------------


async def test_what_serves_nobody_any_more_is_deleted(rig: Rig) -> None:
    database = rig.parts.database
    at = await database.read(now)
    await add(database, *(row for age in (0.5 * DAY, 8 * DAY) for row in tidied(at - age)))
    pending = await rig.flow()
    await database.transaction(
        lambda session: session.execute(
            sa.update(Flow)
            .where(col(Flow.connection_id) == pending["connection_id"])
            .values(expires_at=at - 8 * DAY, outcome_until=at - 1)
        )
    )
    await worker_of(rig).forget_old()
    for table in (BrowserSession, DeviceFlow, IdempotentAnswer, IntegrationLog):
        rows = [row for row in await everything(database, table) if "test" in row.model_dump_json()]
        assert len(rows) == 1, table
    flows = await everything(database, Flow)
    assert len(flows) == 2, "a recent one, and the old one whose connection is still pending"
    assert [flow.sealed_outcome for flow in flows] == [None, None]


async def everything(database: Database, table: type[Any]) -> Sequence[Any]:
    return await database.read(lambda session: list(session.exec(select(table))))


def tidied(at: float) -> list[SQLModel]:
    mark = f"test-{at}"
    return [
        Flow(
            id=new_id("flo"),
            integration="test",
            state_digest=mark,
            cookie_name="c",
            cookie_digest="d",
            redirect_uri="",
            created_at=at,
            expires_at=at,
            sealed_outcome=b"x",
            outcome_until=at,
        ),
        BrowserSession(id=new_id("ses"), token_digest=mark, caller_id="c", subject="s", created_at=at, expires_at=at),
        DeviceFlow(
            id=new_id("dev"),
            flow_id=mark,
            integration="test",
            subject="s",
            user_code="c",
            verification_uri="u",
            interval_seconds=5.0,
            poll_at=at,
            created_at=at,
            expires_at=at,
        ),
        IdempotentAnswer(id=new_id("ida"), caller_id="c", key_digest=mark, request_digest="r", created_at=at),
        IntegrationLog(integration="test", at=at, level="info", action="a", text="t"),
    ]


# --- the loop ---------------------------------------------------------------------------------------------------------------


class Failing(Worker):
    """A worker with two jobs that always fail and one that counts."""

    rounds = 0

    @property
    def jobs(self) -> Sequence[Job]:
        return ((0.01, self.named), (0.01, self.defect), (0.01, self.fine))

    async def named(self) -> None:
        raise DatabaseUnavailable

    async def defect(self) -> None:
        raise ZeroDivisionError

    async def fine(self) -> None:
        self.rounds += 1


async def test_a_job_that_fails_is_logged_and_stops_nothing(rig: Rig) -> None:
    parts = rig.parts
    refreshing = BackgroundRefresh(parts.credentials, parts.metrics, per_minute=60)
    worker = Failing(
        parts.database, parts.credentials, parts.confirmations, parts.device_flows, refreshing, parts.audit
    )
    with capture_logs() as lines:
        running = asyncio.create_task(worker.run())

        async def enough() -> bool:
            return worker.rounds >= 5

        await eventually(enough)
        worker.stop()
        await running
    events = {(line["event"], line["job"]) for line in lines}
    assert events == {("worker.failed", "named"), ("worker.defect", "defect")}


async def test_stopping_does_not_wait_for_a_slow_provider_and_closing_finishes_the_refresh(rig: Rig) -> None:
    connection_id = await used(rig, left_seconds=100)
    rig.sandbox.state.add_fault(Fault(kind="stall", seconds=1.0, commit=True))
    async with open_parts(rig.parts.settings) as parts:
        async with running_worker(parts):

            async def sent() -> bool:
                return bool([seen for seen in rig.sandbox.state.token_requests() if seen.grant_type == "refresh_token"])

            await eventually(sent)
            stopping_at = time.monotonic()
        assert time.monotonic() - stopping_at < 0.8
        assert (await row_of(rig.parts.database, connection_id)).refreshed_at is None
    assert (await row_of(rig.parts.database, connection_id)).refreshed_at is not None
    assert await left_over(rig.parts.database, connection_id) == (False, False, False)


async def test_a_stopped_worker_begins_nothing(rig: Rig) -> None:
    connection_id = await used(rig, left_seconds=100)
    await set_row(rig.parts.database, connection_id, deleted_at=1.0)
    worker = worker_of(rig)
    worker.stop()
    assert await worker.refreshing.refresh_due() == 0
    await worker.finish_cut_off()
    await worker.run()
    assert (await row_of(rig.parts.database, connection_id)).deleted_at == 1.0
