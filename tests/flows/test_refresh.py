"""Refreshing through real HTTP: once however many ask, and never a lost connection that could have been kept."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import random
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from sqlmodel import Session
from structlog.testing import capture_logs

from broker.app import open_parts
from broker.credentials import Credentials, LeaseLost, bearer_of, require_lease, secret_owner
from broker.database import now
from broker.demo.sandbox import DEMO_CLIENT_ID, DEMO_CLIENT_SECRET, Fault
from broker.errors import BrokerError, NotFound, UpstreamTimeout
from broker.models import ClientSecret, RefreshJournal
from broker.refresh import Ask
from broker.vault import Store
from providers.spec import Refresh, Secret
from tests.flows.rig import Rig, eventually, open_rig, reserved_socket
from tests.flows.time_passes import (
    audited,
    behaves,
    ends_in,
    fresh,
    lease_is_over,
    left_over,
    row_of,
    set_row,
    wait_is_over,
)

ROTATES_WITH_GRACE = Refresh(rotates=True, grace_seconds=30)
STATIC = Refresh(rotates=False)
NOTHING_LEFT = (False, False, False)


@pytest.fixture
async def either_rig(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    """Give a rig on SQLite and one on PostgreSQL."""
    async with open_rig(tmp_path, database_url=database_url) as made:
        yield made


async def expired(rig: Rig, **options: Any) -> str:
    """Return a connection whose access token is over."""
    connection = await rig.connected()
    rig.sandbox.state.configure(**options)
    await ends_in(rig.parts.database, connection["id"], -1)
    return str(connection["id"])


def refreshes(rig: Rig) -> int:
    return rig.sandbox.state.counters.refreshes


def sent(rig: Rig) -> list[str | None]:
    """Return the digest of each refresh token that the sandbox was sent."""
    return [visit.presented for visit in rig.sandbox.state.token_requests() if visit.grant_type == "refresh_token"]


def alarms(rig: Rig) -> tuple[int, int]:
    counters = rig.sandbox.state.counters
    return counters.reuse_alarms, counters.concurrent_senders


async def given_up(rig: Rig, connection_id: str) -> str | None:
    """Return the reason for which consent is needed again; it was audited once."""
    row = await row_of(rig.parts.database, connection_id)
    assert row.status == "reauthorization_required"
    assert await audited(rig.parts.database, "connection.reauthorization_required") == [{"reason": row.status_reason}]
    return row.status_reason


# --- once, however many ask --------------------------------------------------------------------------------------------


async def test_fifty_callers_at_once_cause_one_refresh_and_all_get_the_newest_token(either_rig: Rig) -> None:
    connection_id = await expired(either_rig, latency_seconds=0.1)
    answers = await asyncio.gather(*(either_rig.token(connection_id) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["access_token"] for answer in answers}) == 1
    assert refreshes(either_rig) == 1
    assert (await either_rig.whoami(answers[0].json()["access_token"])).status_code == 200
    assert await left_over(either_rig.parts.database, connection_id) == NOTHING_LEFT


async def test_two_processes_on_one_database_refresh_once_between_them(either_rig: Rig) -> None:
    connection_id = await expired(either_rig, latency_seconds=0.2)
    async with open_parts(either_rig.parts.settings) as other:
        handouts = await asyncio.gather(
            *(fresh(parts, connection_id) for _ in range(25) for parts in (either_rig.parts, other))
        )
    assert len({handout.access_token for handout in handouts}) == 1
    assert not any(handout.stale for handout in handouts)
    assert refreshes(either_rig) == 1
    assert alarms(either_rig) == (0, 0)


async def test_a_refresh_goes_on_when_its_caller_hangs_up(rig: Rig) -> None:
    connection_id = await expired(rig, latency_seconds=0.3)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(rig.token(connection_id), 0.15)
    await eventually(lambda: refreshed(rig, connection_id))
    assert (await rig.token(connection_id)).status_code == 200
    assert refreshes(rig) == 1


async def refreshed(rig: Rig, connection_id: str) -> bool:
    return (await row_of(rig.parts.database, connection_id)).refreshed_at is not None


async def test_closing_the_process_finishes_the_refresh_under_way_and_gives_the_lease_back(
    rig: Rig,
) -> None:
    connection_id = await expired(rig, latency_seconds=0.3)
    async with open_parts(rig.parts.settings) as leaving:
        caller = asyncio.create_task(fresh(leaving, connection_id))
        await eventually(lambda: _arrived(rig))
    assert (await caller).stale is False
    assert await refreshed(rig, connection_id)
    assert await left_over(rig.parts.database, connection_id) == NOTHING_LEFT


async def _arrived(rig: Rig) -> bool:
    return bool(sent(rig))


async def test_who_only_waits_for_another_process_does_not_delay_a_stop(rig: Rig) -> None:
    connection_id = await expired(rig)
    async with rig.parts.credentials.holding(connection_id):
        async with open_parts(rig.parts.settings) as leaving:
            waiting = asyncio.create_task(fresh(leaving, connection_id))
            await asyncio.sleep(0.1)
        with pytest.raises(UpstreamTimeout):
            await waiting
    assert refreshes(rig) == 0


async def test_a_caller_does_not_wait_for_another_process_for_ever(rig: Rig) -> None:
    connection_id = await expired(rig)
    impatient = another_process(rig, wait_seconds=0.2)
    async with rig.parts.credentials.holding(connection_id):
        with pytest.raises(UpstreamTimeout):
            await impatient.refresh(await row_of(rig.parts.database, connection_id))
        with pytest.raises(UpstreamTimeout):
            async with impatient.holding(connection_id):
                pytest.fail("held by two")


def another_process(rig: Rig, vault: Store | None = None, **seconds: Any) -> Credentials:
    parts = rig.parts
    return Credentials(
        parts.database,
        vault or parts.vault,
        parts.sealer,
        parts.egress,
        parts.integrations,
        parts.audit,
        parts.metrics,
        **seconds,
    )


# --- rotation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["strict", "grace", "static"])
async def test_a_connection_survives_many_refreshes_in_each_rotation_mode(rig: Rig, mode: str) -> None:
    connection_id = await expired(rig, mode=mode, access_dies_on_refresh=True)
    for _ in range(4):
        token = (await rig.token(connection_id)).json()["access_token"]
        assert (await rig.whoami(token)).status_code == 200
        await ends_in(rig.parts.database, connection_id, -1)
    assert (refreshes(rig), alarms(rig)) == (4, (0, 0))
    assert len(set(sent(rig))) == (1 if mode == "static" else 4)
    assert (await row_of(rig.parts.database, connection_id)).refreshable is True


async def test_where_the_old_refresh_token_may_not_be_kept_an_answer_without_one_ends_refreshing(rig: Rig) -> None:
    behaves(rig.parts, Refresh(keep_old=False))
    connection_id = await expired(rig, mode="static")
    assert (await rig.token(connection_id)).status_code == 200
    assert (await row_of(rig.parts.database, connection_id)).refreshable is False
    await ends_in(rig.parts.database, connection_id, -1)
    assert (await rig.token(connection_id)).json()["code"] == "reauthorization_required"
    assert refreshes(rig) == 1


# --- what the provider answers ------------------------------------------------------------------------------------------

TOKEN_LIKE = {"access_token": "evil-access", "refresh_token": "evil-refresh", "token_type": "Bearer", "expires_in": 60}
ANSWERS = [
    pytest.param(200, body, "upstream_invalid", id=f"T1-{number}")
    for number, body in enumerate([{}, {"access_token": 123}, '""', "null", [], '"text"', "true", "<html>", "{"])
] + [
    pytest.param(429, {"message": "slow"}, "provider_unavailable", id="T2-429"),
    pytest.param(500, TOKEN_LIKE, "provider_unavailable", id="T2-500"),
    pytest.param(503, TOKEN_LIKE, "provider_unavailable", id="T2-503"),
    pytest.param(400, TOKEN_LIKE, "upstream_invalid", id="T2-400"),
    pytest.param(302, TOKEN_LIKE, "upstream_invalid", id="redirect"),
    pytest.param(400, {"error": "invalid_request"}, "upstream_invalid", id="invalid_request"),
]


async def test_whatever_is_no_token_is_not_stored_and_the_connection_stays(rig: Rig) -> None:
    """Go through all answers on one connection: each leaves it as it was."""
    connection_id = await expired(rig)
    before = await row_of(rig.parts.database, connection_id)
    for case in ANSWERS:
        status, body, code = case.values
        assert isinstance(status, int)
        rig.sandbox.state.add_fault(Fault(kind="answer", status=status, body=body))
        await set_row(rig.parts.database, connection_id, refresh_not_before_at=None, unknown_outcomes=0)
        answer = await rig.token(connection_id)
        assert answer.json()["code"] == code, case.id
        row = await row_of(rig.parts.database, connection_id)
        assert (row.status, row.secret_version) == ("active", before.secret_version), case.id
        assert row.refresh_not_before_at is not None, case.id
        assert await left_over(rig.parts.database, connection_id) == NOTHING_LEFT, case.id
    await wait_is_over(rig.parts.database, connection_id)
    assert (await rig.token(connection_id)).status_code == 200
    row = await row_of(rig.parts.database, connection_id)
    assert (row.status_reason, row.refresh_failures, row.unknown_outcomes) == (None, 0, 0)


async def test_retry_after_is_honoured(rig: Rig) -> None:
    connection_id = await expired(rig)
    rig.sandbox.state.add_fault(Fault(kind="answer", status=429, headers={"Retry-After": "120"}))
    answers = [await rig.token(connection_id) for _ in range(3)]
    assert {answer.json()["code"] for answer in answers} == {"provider_unavailable"}
    assert all(119 <= int(answer.headers["retry-after"]) <= 123 for answer in answers)
    assert len(sent(rig)) == 1


async def test_a_refused_client_secret_is_followed_by_the_next_and_when_none_is_left_nothing_is_killed(
    rig: Rig,
) -> None:
    connection_id = await expired(rig)
    integrations = rig.parts.integrations
    await integrations.add_secret("sandbox", Secret("a-new-secret-that-the-provider-does-not-know-yet"), None)
    assert (await rig.token(connection_id)).status_code == 200
    assert len(sent(rig)) == 2, "the newest first, then the one before"
    rig.sandbox.state.add_client(DEMO_CLIENT_ID, [Secret("something else")], rig.sandbox.state.options.redirect_uris)
    await ends_in(rig.parts.database, connection_id, -1)
    answer = await rig.token(connection_id)
    assert (answer.status_code, answer.json()["code"]) == (502, "upstream_invalid")
    row = await row_of(rig.parts.database, connection_id)
    assert (row.status, row.status_reason, row.unknown_outcomes) == ("active", "invalid_client", 0)
    rig.sandbox.state.add_client(DEMO_CLIENT_ID, [Secret(DEMO_CLIENT_SECRET)], rig.sandbox.state.options.redirect_uris)
    await wait_is_over(rig.parts.database, connection_id)
    assert (await rig.token(connection_id)).status_code == 200
    assert alarms(rig) == (0, 0)


async def test_a_refused_connection_is_not_an_attempt(rig: Rig) -> None:
    with reserved_socket() as nobody_listens:
        url = f"http://127.0.0.1:{nobody_listens.getsockname()[1]}/token"
        await rig.integration("closed", config={"token_url": url})
        credentials = {
            "type": "oauth2",
            "access_token": "a",
            "refresh_token": "r",
            "expires_at": "2020-01-01T00:00:00Z",
        }
        body = {"integration": "closed", "subject": "acme:1", "credentials": credentials}
        connection_id = (await rig.call("POST", "/v1/connections", body)).json()["id"]
        for _ in range(5):
            assert (await rig.token(connection_id)).json()["code"] == "provider_unavailable"
            await wait_is_over(rig.parts.database, connection_id)
    row = await row_of(rig.parts.database, connection_id)
    assert (row.status, row.status_reason, row.unknown_outcomes) == ("active", "not_sent", 0)
    assert await left_over(rig.parts.database, connection_id) == NOTHING_LEFT


async def test_a_request_that_egress_refuses_to_make_is_not_an_attempt(rig: Rig) -> None:
    connection_id = await expired(rig)
    known = rig.parts.integrations.catalog["oidc"]
    assert known.oauth2 is not None
    object.__setattr__(known.oauth2, "token_headers", {"X-Bad": "a\nb"})
    try:
        assert (await rig.token(connection_id)).json()["code"] == "internal_error"
    finally:
        object.__setattr__(known.oauth2, "token_headers", {})
    row = await row_of(rig.parts.database, connection_id)
    assert (row.status_reason, row.unknown_outcomes) == ("not_sent", 0)
    await wait_is_over(rig.parts.database, connection_id)
    assert (await rig.token(connection_id)).status_code == 200


# --- outcomes that nobody knows -----------------------------------------------------------------------------------------

LOST_ANSWERS = [
    Fault(kind="drop", commit=True),
    Fault(kind="drop", commit=True, reset=True),
    Fault(kind="cut", commit=True),
]


@pytest.mark.parametrize("lost", LOST_ANSWERS, ids=["drop", "reset", "cut"])
async def test_a_lost_answer_of_a_strict_provider_ends_in_a_consent_that_names_its_reason(
    rig: Rig, lost: Fault
) -> None:
    connection_id = await expired(rig, mode="strict")
    rig.sandbox.state.add_fault(lost)
    assert (await rig.token(connection_id)).json()["code"] == "provider_unavailable"
    assert (await row_of(rig.parts.database, connection_id)).unknown_outcomes == 1
    answer = await rig.token(connection_id)
    assert answer.json()["code"] == "reauthorization_required"
    assert await given_up(rig, connection_id) == "refresh_outcome_unknown"
    assert len(sent(rig)) == 3  # the lost one, the refused one, and once more to be sure


@pytest.mark.parametrize(("mode", "refresh"), [("grace", ROTATES_WITH_GRACE), ("static", STATIC)])
async def test_a_lost_answer_heals_where_the_same_token_answers_again(rig: Rig, mode: str, refresh: Refresh) -> None:
    behaves(rig.parts, refresh)
    connection = await rig.connected()
    rig.sandbox.state.configure(mode=mode)
    rig.sandbox.state.add_fault("drop_answer")
    await ends_in(rig.parts.database, connection["id"], 60)
    assert (await rig.token(connection["id"])).json()["stale"] is True
    healed = (await rig.token(connection["id"])).json()
    assert healed["stale"] is False, "sent again at once, with the live token still at hand"
    assert (await rig.whoami(healed["access_token"])).status_code == 200
    assert alarms(rig) == (0, 0)


async def test_where_reuse_kills_the_grant_the_live_access_token_is_used_up_first(rig: Rig) -> None:
    connection = await rig.connected()
    rig.sandbox.state.add_fault("drop_answer")
    await ends_in(rig.parts.database, connection["id"], 60)
    for _ in range(3):
        answer = (await rig.token(connection["id"])).json()
        assert answer["stale"] is True
        assert (await rig.whoami(answer["access_token"])).status_code == 200
    row = await row_of(rig.parts.database, connection["id"])
    assert row.refresh_not_before_at == row.token_expires_at
    assert (len(sent(rig)), row.status) == (1, "active")


async def test_a_rotating_provider_is_sent_the_same_token_at_most_three_times_again(rig: Rig) -> None:
    connection_id = await expired(rig)
    rig.sandbox.state.add_fault("drop_request", times=None)
    for _ in range(6):
        await rig.token(connection_id)
        await wait_is_over(rig.parts.database, connection_id)
    assert len(sent(rig)) == 4
    assert await given_up(rig, connection_id) == "refresh_outcome_unknown"
    assert rig.sandbox.state.counters.reuse_alarms == 0


async def test_a_provider_that_does_not_rotate_is_asked_for_ever(rig: Rig) -> None:
    behaves(rig.parts, STATIC)
    connection_id = await expired(rig, mode="static")
    rig.sandbox.state.add_fault("drop_request", times=8)
    for _ in range(8):
        assert (await rig.token(connection_id)).json()["code"] == "provider_unavailable"
        await wait_is_over(rig.parts.database, connection_id)
    assert (await rig.token(connection_id)).status_code == 200


async def test_a_silent_provider_is_a_time_out_and_heals(rig: Rig) -> None:
    await rig.integration("other", config={"timeout_seconds": 1})
    minted = rig.sandbox.state.mint("ada", "openid")
    credentials = {
        **{name: minted[name] for name in ("access_token", "refresh_token")},
        "type": "oauth2",
        "expires_at": "2020-01-01T00:00:00Z",
    }
    body = {"integration": "other", "subject": "acme:1", "credentials": credentials}
    connection_id = (await rig.call("POST", "/v1/connections", body)).json()["id"]
    rig.sandbox.state.add_fault(Fault(kind="stall", seconds=30))
    answer = await rig.token(connection_id)
    assert (answer.status_code, answer.json()["code"]) == (504, "upstream_timeout")
    assert (await rig.token(connection_id)).status_code == 200, "the provider never saw the first one to its end"
    assert alarms(rig) == (0, 0)


# --- leases that end too soon -------------------------------------------------------------------------------------------


async def test_a_late_holder_writes_nothing_and_its_callers_get_the_newest_token(rig: Rig) -> None:
    behaves(rig.parts, ROTATES_WITH_GRACE)
    connection_id = await expired(rig, mode="grace")
    rig.sandbox.state.add_fault(Fault(kind="stall", seconds=1.0, commit=True))
    late = asyncio.create_task(rig.token(connection_id))
    await eventually(lambda: _arrived(rig))
    await lease_is_over(rig.parts.database, connection_id)
    async with open_parts(rig.parts.settings) as other:
        with capture_logs() as lines:
            newest = await fresh(other, connection_id)
            answer = await late
    assert "refresh.lease_lost" in [line["event"] for line in lines]
    assert answer.status_code == 200
    assert answer.json()["access_token"] == newest.access_token.reveal()
    assert (await row_of(rig.parts.database, connection_id)).secret_version == 2
    assert await left_over(rig.parts.database, connection_id) == NOTHING_LEFT


async def test_who_held_too_long_is_refused_by_a_named_error(rig: Rig) -> None:
    connection = await rig.connected()
    slow = another_process(rig, lease_seconds=0.05)
    async with slow.holding(connection["id"]) as claimed:
        await asyncio.sleep(0.1)
        assert (await rig.token(connection["id"], force_refresh=True)).status_code == 200

        def work(session: Session) -> None:
            require_lease(session, claimed.lease)

        with pytest.raises(LeaseLost) as refused:
            await rig.parts.database.transaction(work)
    assert isinstance(refused.value, BrokerError)
    assert (refused.value.status, refused.value.code) == (409, "conflict")


async def test_a_freeze_during_a_refresh_stays_and_the_new_token_is_kept(rig: Rig) -> None:
    connection_id = await expired(rig)
    rig.sandbox.state.add_fault(Fault(kind="stall", seconds=0.3, commit=True))
    caller = asyncio.create_task(rig.token(connection_id))
    await eventually(lambda: _arrived(rig))
    await set_row(rig.parts.database, connection_id, status="frozen", status_reason="incident 7")
    assert (await caller).json()["code"] == "connection_frozen"
    row = await row_of(rig.parts.database, connection_id)
    assert (row.status, row.status_reason, row.secret_version) == ("frozen", "incident 7", 2)
    await set_row(rig.parts.database, connection_id, status="active")
    assert (await rig.token(connection_id)).status_code == 200


async def test_a_freeze_is_not_turned_into_a_need_for_consent(rig: Rig) -> None:
    connection_id = await expired(rig)
    rig.sandbox.state.add_fault(Fault(kind="stall", seconds=0.3))
    rig.sandbox.state.kill_account("ada")
    caller = asyncio.create_task(rig.token(connection_id))
    await eventually(lambda: _arrived(rig))
    await set_row(rig.parts.database, connection_id, status="frozen")
    assert (await caller).json()["code"] in {"connection_frozen", "reauthorization_required"}
    assert (await row_of(rig.parts.database, connection_id)).status == "frozen"
    assert await audited(rig.parts.database, "connection.reauthorization_required") == []


# --- journals that a crash left ----------------------------------------------------------------------------------------


async def crashed_after_journal(rig: Rig, connection_id: str) -> None:
    """Refresh up to the journal and no further: the database refuses the row that comes after it."""
    before = await row_of(rig.parts.database, connection_id)
    await rig.parts.database.transaction(lambda session: session.execute(_refuse_writes()))
    with capture_logs():  # a long one
        await rig.token(connection_id)
    await rig.parts.database.transaction(lambda session: session.execute(_allow_writes()))
    assert (await row_of(rig.parts.database, connection_id)).secret_version == before.secret_version
    assert (await left_over(rig.parts.database, connection_id))[1] is True


def _refuse_writes() -> sa.TextClause:
    return sa.text(
        "CREATE TRIGGER no_row BEFORE UPDATE OF secret_version ON connections BEGIN SELECT RAISE(FAIL, 'disk'); END"
    )


def _allow_writes() -> sa.TextClause:
    return sa.text("DROP TRIGGER no_row")


async def test_a_journal_is_replayed_by_the_next_caller_without_asking_the_provider(rig: Rig) -> None:
    connection_id = await expired(rig)
    await crashed_after_journal(rig, connection_id)
    answer = await rig.token(connection_id)
    assert answer.status_code == 200
    assert (await rig.whoami(answer.json()["access_token"])).status_code == 200
    assert (refreshes(rig), alarms(rig)) == (1, (0, 0))
    assert await left_over(rig.parts.database, connection_id) == NOTHING_LEFT


async def test_crashes_between_vault_and_row_never_drop_the_version_that_the_row_names(rig: Rig) -> None:
    connection_id = await expired(rig)
    for _ in range(5):  # each replay stops at the row again
        await crashed_after_journal(rig, connection_id)
        row = await row_of(rig.parts.database, connection_id)
        assert await rig.parts.vault.get(secret_owner(connection_id), row.secret_version)
    assert (await rig.token(connection_id)).status_code == 200
    assert refreshes(rig) == 1


async def test_a_journal_whose_token_is_over_by_now_is_replayed_and_refreshed_once_more(rig: Rig) -> None:
    connection_id = await expired(rig)
    await crashed_after_journal(rig, connection_id)

    def work(session: Session) -> None:
        journal = session.get(RefreshJournal, connection_id)
        assert journal is not None
        journal.received_at -= 86_400

    await rig.parts.database.transaction(work)
    answer = await rig.token(connection_id)
    assert (await rig.whoami(answer.json()["access_token"])).status_code == 200
    assert (refreshes(rig), alarms(rig)) == (2, (0, 0))


async def test_a_journal_is_dropped_when_a_new_consent_replaced_its_refresh_token(rig: Rig) -> None:
    connection_id = await expired(rig)
    await crashed_after_journal(rig, connection_id)
    minted = rig.sandbox.state.mint("ada", "openid")
    value = {"type": "oauth2", "access_token": minted["access_token"], "refresh_token": minted["refresh_token"]}
    row = await row_of(rig.parts.database, connection_id)
    version = await rig.parts.credentials.put(connection_id, value, expected_version=row.secret_version)
    await set_row(rig.parts.database, connection_id, secret_version=version, token_expires_at=None)
    await rig.parts.credentials.settle(connection_id)
    assert await left_over(rig.parts.database, connection_id) == NOTHING_LEFT
    assert (await rig.token(connection_id)).json()["access_token"] == minted["access_token"]


async def test_an_unreadable_journal_is_a_named_error_and_does_not_stop_a_deletion(rig: Rig) -> None:
    connection_id = await expired(rig)
    await crashed_after_journal(rig, connection_id)

    def work(session: Session) -> None:
        journal = session.get(RefreshJournal, connection_id)
        assert journal is not None
        journal.sealed_answer = journal.sealed_answer[:-1] + bytes([journal.sealed_answer[-1] ^ 1])

    await rig.parts.database.transaction(work)
    answer = await rig.token(connection_id)
    assert (answer.status_code, answer.json()["code"]) == (503, "secret_store_unavailable")
    assert (await rig.call("DELETE", f"/v1/connections/{connection_id}")).status_code == 200


# --- what is told ---------------------------------------------------------------------------------------------------------


def spellings(secret: str) -> list[str]:
    raw = secret.encode()
    return [
        secret,
        quote(secret),
        raw.hex(),
        base64.b64encode(raw).decode().rstrip("="),
        hashlib.sha256(raw).hexdigest(),
    ]


async def test_the_log_tells_the_story_of_a_refresh_without_a_secret(rig: Rig) -> None:
    connection_id = await expired(rig)
    owner = secret_owner(connection_id)
    with capture_logs() as lines:
        rig.sandbox.state.add_fault("fail")
        await rig.token(connection_id)
        await wait_is_over(rig.parts.database, connection_id)
        await rig.token(connection_id)
    story = [line["event"] for line in lines if line["event"].startswith("refresh.")]
    assert story == [
        "refresh.sent",
        "refresh.answered",
        "refresh.failed",
        "refresh.sent",
        "refresh.answered",
        "refresh.stored",
    ]
    assert all(line["connection_id"] == connection_id for line in lines if line["event"].startswith("refresh."))
    text = json.dumps(lines, default=repr)
    for version in (1, 2):
        _, value = await rig.parts.vault.get(owner, version)
        for name in ("access_token", "refresh_token"):
            assert not [spelling for spelling in spellings(value[name]) if spelling in text]
    assert not [spelling for spelling in spellings(DEMO_CLIENT_SECRET) if spelling in text]


# --- the store and the database fail --------------------------------------------------------------------------------------


async def test_an_answer_is_kept_in_memory_until_the_database_takes_it(rig: Rig) -> None:
    connection_id = await expired(rig, latency_seconds=0.2)
    path = rig.parts.settings.data_dir / "broker.db"
    caller = asyncio.create_task(rig.token(connection_id))
    await eventually(lambda: _arrived(rig))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as locked:
        locked.execute("BEGIN IMMEDIATE")
        await asyncio.sleep(5.6)  # longer than a writer waits for the lock
        locked.execute("ROLLBACK")
    answer = await caller
    assert answer.status_code == 200
    assert (await rig.whoami(answer.json()["access_token"])).status_code == 200
    assert (refreshes(rig), alarms(rig)) == (1, (0, 0))


class CrashingVault:
    """The rig's vault, which lets the process crash before or after its n-th write."""

    def __init__(self, vault: Store, crash_at: int, *, after: bool) -> None:
        self._vault, self._left, self._after = vault, crash_at, after

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        self._left -= 1
        if self._left == 0 and not self._after:
            raise Crash
        version = await self._vault.put(owner, value, expected_version=expected_version)
        if self._left == 0:
            raise Crash
        return version

    async def put_as(self, owner: str, value: Mapping[str, Any], *, expected_version: int, version: int) -> None:
        await self._vault.put_as(owner, value, expected_version=expected_version, version=version)

    def ahead(self, connection: sa.Connection, wanted: Sequence[tuple[str, int]]) -> Sequence[bytes | None]:
        return self._vault.ahead(connection, wanted)

    async def get(
        self, owner: str, version: int | None = None, *, sealed: bytes | None = None
    ) -> tuple[int, dict[str, Any]]:
        return await self._vault.get(owner, version, sealed=sealed)

    async def destroy(self, owner: str) -> None:
        await self._vault.destroy(owner)

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        return await self._vault.owners(prefix)


class Crash(Exception):
    """The process is gone."""


async def test_whatever_crashes_come_one_after_the_other_the_version_that_the_row_names_can_be_read(rig: Rig) -> None:
    """Law: different writers crash at each write of ``put``, and before the row; the pinned content never changes."""
    connection = await rig.connected()
    connection_id, parts = connection["id"], rig.parts
    pinned = (await parts.vault.get(secret_owner(connection_id), 1))[1]
    chance = random.Random(20_262)  # noqa: S311 - repeatable, not secret
    for number in range(60):
        vault = CrashingVault(parts.vault, chance.randint(1, 4), after=chance.random() < 0.5)
        writer = another_process(rig, vault=vault)
        row = await row_of(parts.database, connection_id)
        with contextlib.suppress(Crash):
            value = {"type": "oauth2", "access_token": f"a{chance.randint(0, 2)}"}
            version = await writer.put(connection_id, value, expected_version=row.secret_version)
            assert await parts.vault.get(secret_owner(connection_id), version) == (version, value), number
        row = await row_of(parts.database, connection_id)
        assert (await parts.vault.get(secret_owner(connection_id), row.secret_version))[1] == pinned, number
    assert (await rig.token(connection_id)).json()["access_token"] == pinned["access_token"]


async def test_a_version_that_moved_without_a_new_token_is_refreshed_once_more(rig: Rig) -> None:
    connection_id = await expired(rig, latency_seconds=0.1)
    follower = asyncio.create_task(rig.token(connection_id))
    await eventually(lambda: _arrived(rig))
    assert (await follower).status_code == 200
    async with rig.parts.credentials.holding(connection_id) as claimed:
        await ends_in(rig.parts.database, connection_id, -1)
        waiting = asyncio.create_task(rig.token(connection_id))
        await asyncio.sleep(0.1)
        await rig.parts.vault.put(
            secret_owner(connection_id), {"type": "oauth2", "access_token": "x"}, expected_version=2
        )
        _, now_named = await rig.parts.vault.get(secret_owner(connection_id), 2)
        await rig.parts.vault.put(secret_owner(connection_id), now_named, expected_version=3)
        await set_row(rig.parts.database, connection_id, secret_version=4)
        assert claimed.row.secret_version == 2
    answer = await waiting
    assert answer.status_code == 200
    assert (await rig.whoami(answer.json()["access_token"])).status_code == 200
    assert refreshes(rig) == 2


async def test_a_secret_that_is_gone_is_a_named_error(rig: Rig) -> None:
    connection = await rig.connected()
    await set_row(rig.parts.database, connection["id"], secret_version=9)
    answer = await rig.token(connection["id"])
    assert (answer.status_code, answer.json()["code"]) == (503, "secret_store_unavailable")


async def test_without_a_client_secret_nothing_is_sent_and_nothing_is_lost(rig: Rig) -> None:
    connection_id = await expired(rig)
    await rig.parts.database.transaction(lambda session: session.execute(sa.delete(ClientSecret)))
    answer = await rig.token(connection_id)
    assert (answer.status_code, answer.json()["code"]) == (502, "provider_unavailable")
    row = await row_of(rig.parts.database, connection_id)
    assert (row.status, row.status_reason, row.unknown_outcomes) == ("active", "not_sent", 0)
    assert sent(rig) == []


async def test_settling_leaves_a_live_lease_and_a_connection_that_is_gone_alone(rig: Rig) -> None:
    connection = await rig.connected()
    async with rig.parts.credentials.holding(connection["id"]):
        await another_process(rig).settle(connection["id"])
    await rig.parts.credentials.settle("con_gone")
    assert await left_over(rig.parts.database, connection["id"]) == NOTHING_LEFT
    with pytest.raises(NotFound):
        await rig.parts.credentials.claim("con_gone")


async def test_an_answer_that_narrows_the_scopes_and_names_an_end_is_believed(rig: Rig) -> None:
    connection_id = await expired(rig, refresh_token_seconds=86_400)
    body = {
        "access_token": "a2",
        "refresh_token": "r2",
        "token_type": "Bearer",
        "expires_in": 60,
        "scope": "openid",
        "refresh_token_expires_in": 7200,
    }
    rig.sandbox.state.add_fault(Fault(kind="answer", status=200, body=body))
    answer = (await rig.token(connection_id)).json()
    assert (answer["access_token"], answer["scopes"]) == ("a2", ["openid"])
    row = await row_of(rig.parts.database, connection_id)
    at = await rig.parts.database.read(now)
    assert row.refresh_expires_at is not None
    assert row.token_expires_at is not None
    assert 7100 < row.refresh_expires_at - at <= 7200
    assert 50 < row.token_expires_at - at <= 60


async def test_a_basic_pair_is_handed_out_encoded() -> None:
    value = {"type": "basic", "username": "ada", "password": "p:w"}
    assert base64.b64decode(bearer_of(value)) == b"ada:p:w"


async def test_a_live_token_is_not_withheld_while_another_process_holds_the_lease(rig: Rig) -> None:
    connection = await rig.connected()
    await ends_in(rig.parts.database, connection["id"], 50)
    other = another_process(rig, live_wait_seconds=0.1)
    row = await row_of(rig.parts.database, connection["id"])
    configured = await rig.parts.integrations.configured("sandbox")
    async with rig.parts.credentials.holding(connection["id"]):
        handout = await other.fresh(row, configured, Ask(min_ttl_seconds=300), await rig.parts.database.read(now))
        assert handout.stale is True
    await eventually(lambda: refreshed(rig, connection["id"]))
    await other.aclose()
    assert refreshes(rig) == 1, "its refresh went on without the caller"
