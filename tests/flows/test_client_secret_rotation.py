"""Client secrets that change at the provider: canaries, promotion, rollback, the order in which they are tried, the sweep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import col

from broker.app import running_worker
from broker.client_secrets import GIVE_UP_SECONDS, Canaries, Standing, next_move, pause_seconds
from broker.database import now
from broker.demo.sandbox import DEMO_CLIENT_ID, DEMO_CLIENT_SECRET, Fault
from broker.integrations.client_secrets import SecretUse
from broker.models import Connection, Rotation
from broker.vault import SecretNotFound
from providers.spec import Secret
from tests.flows.api_calls import check_problem
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.time_passes import audited, row_of, set_row, wait_is_over

OLD, NEW = DEMO_CLIENT_SECRET, "the-new-secret"
PATH = "/v1/integrations/sandbox/client-secrets"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as made:
        yield made


def provider_takes(rig: Rig, *secrets: str) -> None:
    """Let the provider know exactly these secrets of our client from now on."""
    state = rig.sandbox.state
    state.add_client(DEMO_CLIENT_ID, [Secret(one) for one in secrets], state.clients[DEMO_CLIENT_ID].redirect_uris)


async def add(rig: Rig, secret: str = NEW, **fields: Any) -> dict[str, Any]:
    answer = await rig.call("POST", PATH, {"client_secret": secret, **fields})
    assert answer.status_code == 201, answer.text
    assert secret not in answer.text
    return dict(answer.json())


async def listed(rig: Rig) -> list[dict[str, Any]]:
    return list((await rig.call("GET", PATH)).json()["data"])


async def states(rig: Rig) -> list[str]:
    return [one["state"] for one in await listed(rig)]


async def people(rig: Rig, *users: str) -> dict[str, str]:
    """Return connections by user, used in the order of their names: the last one most lately."""
    ids = {user: (await rig.connected(f"acme:{user}", user))["id"] for user in users}
    for age, user in enumerate(reversed(users)):
        await set_row(rig.parts.database, ids[user], last_used_at=1_000_000.0 - age)
    rig.sandbox.state.clear_log()
    return ids


async def canary_of(rig: Rig, secret: dict[str, Any]) -> Rotation:
    found = await rig.parts.integrations.canary(secret["id"])
    assert found is not None
    assert found.id == secret["rotation_id"]
    return found


async def set_rotation(rig: Rig, rotation_id: str, **values: Any) -> None:
    change = sa.update(Rotation).where(col(Rotation.id) == rotation_id).values(**values)
    await rig.parts.database.transaction(lambda session: session.execute(change))


async def pause_is_over(rig: Rig, secret: dict[str, Any]) -> None:
    """Let the time pass that a canary waits, and that connections whose refresh failed wait."""
    await set_rotation(rig, secret["rotation_id"], lease_expires_at=0.0)
    change = sa.update(Connection).values(refresh_not_before_at=0.0)
    await rig.parts.database.transaction(lambda session: session.execute(change))


async def is_gone(rig: Rig, secret_id: str) -> bool:
    try:
        await rig.parts.vault.get(f"integrations/sandbox/{secret_id}", 1)
    except SecretNotFound:
        return True
    return False


def asked(rig: Rig, user: str | None = None) -> list[str | None]:
    """Return how the token endpoint answered each refresh: None for tokens."""
    return [visit.error for visit in rig.sandbox.state.token_requests(user)]


async def test_a_candidate_is_used_by_its_canary_only_and_goes_live_when_enough_connections_took_it(rig: Rig) -> None:
    ids = await people(rig, "ada", "ben", "cleo")
    provider_takes(rig, NEW)
    secret = await add(rig, canary=2)
    assert secret["state"] == "candidate"
    check_problem(await rig.token(ids["ada"], force_refresh=True), 502, "upstream_invalid")
    assert asked(rig) == ["invalid_client"], "no ordinary refresh tries a candidate, even when nothing else is left"
    await wait_is_over(rig.parts.database, ids["ada"])
    shown = (await rig.call("GET", "/v1/integrations/sandbox")).json()
    assert (shown["client_secrets"], shown["status"]) == (1, "active")
    assert await rig.parts.canaries.run_due() == 1
    assert [visit.account for visit in rig.sandbox.state.token_requests()][1:] == ["cleo", "ben"], "the last used first"
    assert await states(rig) == ["live", "live"]
    canary = await canary_of(rig, secret)
    assert (canary.state, canary.done, canary.failed, canary.detail["reason"]) == ("done", 2, 0, "proven")
    assert canary.ended_at is not None
    assert (await rig.token(ids["ada"], force_refresh=True)).status_code == 200
    assert [one["reason"] for one in await audited(rig.parts.database, "integration.secret_promoted")] == ["proven"]
    assert await rig.parts.canaries.run_due() == 0


async def test_a_candidate_that_is_refused_goes_at_once_and_the_connection_notices_nothing(rig: Rig) -> None:
    ids = await people(rig, "ada", "ben")
    before = (await rig.token(ids["ben"])).json()["access_token"]
    secret = await add(rig, canary=2)
    await rig.parts.canaries.run_due()
    assert asked(rig, None) == ["invalid_client", None], "the live secret followed in the same refresh"
    assert await states(rig) == ["live"]
    assert await is_gone(rig, secret["id"])
    canary = await canary_of(rig, secret)
    assert (canary.state, canary.done, canary.detail["reason"]) == ("failed", 0, "client_refused")
    row = await row_of(rig.parts.database, ids["ben"])
    assert (row.status, row.status_reason, row.refresh_failures, row.refresh_not_before_at) == ("active", None, 0, None)
    after = (await rig.token(ids["ben"])).json()
    assert after["access_token"] != before
    assert after["stale"] is False
    (told,) = await audited(rig.parts.database, "integration.secret_rolled_back")
    assert told == {"secret_id": secret["id"], "reason": "client_refused"}
    lines = (await rig.call("GET", "/v1/integrations/sandbox/logs?level=error")).json()["data"]
    assert "rolled back: client_refused" in lines[0]["text"]


async def test_fewer_connections_than_wanted_are_enough_when_all_of_them_took_it(rig: Rig) -> None:
    await people(rig, "ada")
    provider_takes(rig, OLD, NEW)
    secret = await add(rig, canary=100)
    await rig.parts.canaries.run_due()
    canary = await canary_of(rig, secret)
    assert (canary.state, canary.done, canary.total) == ("done", 1, 100)
    assert canary.detail["reason"] == "proven_by_fewer"


@pytest.mark.parametrize(
    ("known", "state", "reason"), [(NEW, "done", "proven_by_test"), (OLD, "failed", "client_refused")]
)
async def test_without_connections_a_made_up_code_proves_or_disproves_it(
    rig: Rig, known: str, state: str, reason: str
) -> None:
    provider_takes(rig, known)
    secret = await add(rig, canary=3)
    await rig.parts.canaries.run_due()
    canary = await canary_of(rig, secret)
    assert (canary.state, canary.detail["reason"]) == (state, reason)
    assert await is_gone(rig, secret["id"]) is (state == "failed")


async def test_a_connection_whose_own_grant_is_dead_counts_for_nothing_and_another_is_tried(rig: Rig) -> None:
    ids = await people(rig, "ada", "ben")
    provider_takes(rig, OLD, NEW)
    rig.sandbox.state.kill_account("ben")
    secret = await add(rig, canary=1)
    await rig.parts.canaries.run_due()
    canary = await canary_of(rig, secret)
    assert (canary.state, canary.done, canary.failed, canary.detail["reason"]) == ("done", 1, 1, "proven")
    assert (await row_of(rig.parts.database, ids["ben"])).status == "reauthorization_required"
    assert (await row_of(rig.parts.database, ids["ada"])).status == "active"


async def test_a_provider_in_trouble_says_nothing_of_the_secret_and_is_asked_again_later(rig: Rig) -> None:
    await people(rig, "ada", "ben")
    provider_takes(rig, OLD, NEW)
    rig.sandbox.state.add_fault("fail", times=1)
    secret = await add(rig, canary=2)
    await rig.parts.canaries.run_due()
    assert len(asked(rig)) == 1, "it does not go on to the next connection at once"
    assert (await canary_of(rig, secret)).detail["trouble"] == "provider_unavailable"
    assert await rig.parts.canaries.run_due() == 0, "it waits"
    await pause_is_over(rig, secret)
    await rig.parts.canaries.run_due()
    canary = await canary_of(rig, secret)
    assert (canary.state, canary.done, canary.failed) == ("done", 2, 0)
    assert "trouble" not in canary.detail


async def test_a_provider_that_stays_in_trouble_ends_in_a_rollback_with_the_reason(rig: Rig) -> None:
    await people(rig, "ada")
    provider_takes(rig, OLD, NEW)
    rig.sandbox.state.add_fault("fail", times=None)
    secret = await add(rig, canary=1)
    await rig.parts.canaries.run_due()
    at = await rig.parts.database.read(now)
    await set_rotation(rig, secret["rotation_id"], created_at=at - GIVE_UP_SECONDS - 1)
    await pause_is_over(rig, secret)
    await rig.parts.canaries.run_due()
    canary = await canary_of(rig, secret)
    assert (canary.state, canary.detail["reason"]) == ("failed", "provider_unavailable")
    assert await states(rig) == ["live"]
    assert await is_gone(rig, secret["id"])


async def test_a_person_may_promote_a_candidate_or_delete_it_and_that_ends_its_canary(rig: Rig) -> None:
    secret = await add(rig, canary=5)
    security = await rig.caller(roles=("security",))
    promoted = await rig.call("POST", f"{PATH}/{secret['id']}/promote", key=security)
    assert (promoted.status_code, promoted.json()["state"]) == (200, "live")
    canary = await canary_of(rig, secret)
    assert (canary.state, canary.detail["reason"]) == ("done", "by_hand")
    other = await add(rig, "a-third", canary=5)
    assert (await rig.call("DELETE", f"{PATH}/{other['id']}")).status_code == 204
    canary = await canary_of(rig, other)
    assert (canary.state, canary.detail["reason"]) == ("failed", "deleted")
    assert await is_gone(rig, other["id"])
    assert await rig.parts.canaries.run_due() == 0
    check_problem(await rig.call("POST", f"{PATH}/{other['id']}/promote"), 404, "not_found")
    auditor = await rig.caller(roles=("auditor",))
    check_problem(await rig.call("POST", f"{PATH}/{secret['id']}/promote", key=auditor), 403, "forbidden")


async def test_one_candidate_at_a_time_and_the_same_value_without_a_canary_promotes_it(rig: Rig) -> None:
    secret = await add(rig, canary=1)
    again = await add(rig, canary=1)
    assert again["id"] == secret["id"]
    refused = await rig.call("POST", PATH, {"client_secret": "another", "canary": 1})
    check_problem(refused, 409, "conflict")
    assert (await add(rig))["id"] == secret["id"]
    assert await states(rig) == ["live", "live"]
    assert (await canary_of(rig, secret)).state == "done"
    owners = await rig.parts.vault.owners("integrations/sandbox/")
    assert len(owners) == 2, "what was put into the vault in vain is destroyed"


async def test_the_same_value_is_known_again_after_the_audits_key_was_rotated(rig: Rig) -> None:
    (first,) = await listed(rig)
    async with running_worker(rig.parts):
        rotation = (await rig.call("POST", "/v1/keys/audit/rotate")).json()

        async def over() -> bool:
            return bool((await rig.call("GET", f"/v1/rotations/{rotation['id']}")).json()["state"] == "done")

        await eventually(over, seconds=30)
    await rig.parts.replicas.beat()
    await rig.call("PATCH", "/v1/integrations/sandbox", {"description": "recorded under the new key"})
    (row,) = await rig.parts.integrations.secrets("sandbox")
    assert row.value_digest != rig.parts.audit.digest(OLD), "another key makes digests now"
    assert (await add(rig, OLD))["id"] == first["id"]
    assert (await rig.call("PATCH", "/v1/integrations/sandbox", {"client_secret": OLD})).status_code == 200
    assert [one["id"] for one in await listed(rig)] == [first["id"]]


async def test_of_a_secret_that_was_taken_and_at_once_refused_both_moments_are_kept(rig: Rig) -> None:
    (held,) = await listed(rig)
    use = SecretUse(rig.parts.database)
    use.note(taken=[held["id"]], refused=[])
    await asyncio.sleep(0.01)
    use.note(taken=[], refused=[held["id"]])
    await use.aclose()  # in one batch
    (row,) = await rig.parts.integrations.secrets("sandbox")
    assert row.last_used_at is not None
    assert row.refused_at is not None
    assert row.refused_at > row.last_used_at


@pytest.mark.parametrize("canary", [0, 101, "5", 1.5])
async def test_a_canary_is_a_number_from_1_to_100(rig: Rig, canary: Any) -> None:
    refused = await rig.call("POST", PATH, {"client_secret": NEW, "canary": canary})
    check_problem(refused, 400, "invalid_request", "/canary")
    assert await states(rig) == ["live"]


async def test_what_a_crash_left_is_taken_up_when_its_lease_is_over_and_nothing_is_tried_twice(rig: Rig) -> None:
    ids = await people(rig, "ada", "ben", "cleo")
    provider_takes(rig, OLD, NEW)
    secret = await add(rig, canary=3)
    at = await rig.parts.database.read(now)
    so_far = {"integration": "sandbox", "tried": [ids["cleo"]]}
    left = {"lease_owner": "crashed", "lease_expires_at": at + 60, "done": 1, "detail": so_far}
    await set_rotation(rig, secret["rotation_id"], **left)
    assert await rig.parts.canaries.run_due() == 0
    assert asked(rig) == []
    await set_rotation(rig, secret["rotation_id"], lease_expires_at=at - 1)
    await rig.parts.canaries.run_due()
    assert [visit.account for visit in rig.sandbox.state.token_requests()] == ["ben", "ada"]
    assert (await canary_of(rig, secret)).state == "done"


async def test_of_several_processes_one_works_at_a_canary(rig: Rig) -> None:
    await people(rig, "ada", "ben", "cleo")
    provider_takes(rig, OLD, NEW)
    secret = await add(rig, canary=2)
    parts = rig.parts
    many = [Canaries(parts.database, parts.integrations, parts.credentials, parts.egress) for _ in range(4)]
    await asyncio.gather(*(one.run_due() for one in many))
    canary = await canary_of(rig, secret)
    assert (canary.state, canary.done) == ("done", 2)
    assert asked(rig) == [None, None]


async def test_canaries_end_the_same_way_on_postgresql(tmp_path: Path, postgres_url: str) -> None:
    async with open_rig(tmp_path, database_url=postgres_url) as rig:
        await people(rig, "ada", "ben", "cleo")
        refused = await add(rig, canary=2)
        await rig.parts.canaries.run_due()
        assert (await canary_of(rig, refused)).detail["reason"] == "client_refused"
        provider_takes(rig, OLD, NEW)
        rig.sandbox.state.clear_log()
        secret, parts = await add(rig, canary=2), rig.parts
        many = [Canaries(parts.database, parts.integrations, parts.credentials, parts.egress) for _ in range(4)]
        await asyncio.gather(*(one.run_due() for one in many))
        canary = await canary_of(rig, secret)
        assert (canary.state, canary.done) == ("done", 2)
        assert asked(rig) == [None, None]
        provider_takes(rig, OLD)
        made = await rig.connected("acme:dora", "dora")
        assert (await rig.token(made["id"], force_refresh=True)).status_code == 200

        async def noted() -> Any:
            return (await listed(rig))[0]["refused_at"]

        await eventually(noted)
        configured = await parts.integrations.configured("sandbox")
        assert (await parts.integrations.client(configured)).secret_ids[-1] == secret["id"]


async def test_a_paused_canary_rests_and_goes_on_when_it_is_resumed(rig: Rig) -> None:
    await people(rig, "ada")
    provider_takes(rig, OLD, NEW)
    secret = await add(rig, canary=1)
    path = f"/v1/rotations/{secret['rotation_id']}"
    assert (await rig.call("POST", f"{path}/pause")).json()["state"] == "paused"
    await rig.parts.rotations.move()
    assert await rig.parts.canaries.run_due() == 0
    assert asked(rig) == []
    assert (await rig.call("POST", f"{path}/resume")).json()["state"] == "running"
    await rig.parts.rotations.move()
    await rig.parts.canaries.run_due()
    assert (await rig.call("GET", path)).json()["state"] == "done"
    assert await states(rig) == ["live", "live"]


async def paused_while_it_asks(rig: Rig, secret: dict[str, Any]) -> str:
    """Let a canary ask the provider, which is slow, and pause it meanwhile; return the path of its rotation."""
    path = f"/v1/rotations/{secret['rotation_id']}"
    rig.sandbox.state.add_fault(Fault(kind="stall", seconds=1.5))
    asking = asyncio.create_task(rig.parts.canaries.run_due())

    async def under_way() -> bool:
        return (await canary_of(rig, secret)).lease_owner is not None

    await eventually(under_way)
    assert (await rig.call("POST", f"{path}/pause")).json()["state"] == "paused"
    assert not asking.done(), "it was paused before the provider answered"
    await asking
    assert (await rig.call("GET", path)).json()["state"] == "paused"
    return path


@pytest.mark.parametrize(("known", "after"), [(NEW, ["live", "live"]), (OLD, ["live"])])
@pytest.mark.parametrize("users", [(), ("ada", "ben")], ids=["made-up code", "connections"])
async def test_a_canary_that_is_paused_while_the_provider_answers_neither_promotes_nor_rolls_back(
    rig: Rig, known: str, after: list[str], users: tuple[str, ...]
) -> None:
    await people(rig, *users)
    provider_takes(rig, known)
    secret = await add(rig, canary=1)
    path = await paused_while_it_asks(rig, secret)
    assert await states(rig) == ["candidate", "live"]
    assert not await is_gone(rig, secret["id"])
    lines = (await rig.call("GET", "/v1/integrations/sandbox/logs")).json()["data"]
    assert not [line for line in lines if "client secret" in line["text"]]
    await rig.call("POST", f"{path}/resume")
    await set_rotation(rig, secret["rotation_id"], lease_expires_at=0.0)
    await rig.parts.canaries.run_due()
    assert await states(rig) == after


async def test_a_canary_whose_lease_another_process_took_changes_nothing(rig: Rig) -> None:
    secret, integrations = await add(rig, canary=1), rig.parts.integrations
    await set_rotation(rig, secret["rotation_id"], lease_owner="another", lease_expires_at=1e12)
    for done in (
        await integrations.promote_proven("sandbox", secret["id"], owner="me", reason="proven"),
        await integrations.roll_back_secret("sandbox", secret["id"], owner="me", reason="timed_out"),
    ):
        assert not done
    assert await states(rig) == ["candidate", "live"]
    assert await integrations.promote_proven("sandbox", secret["id"], owner="another", reason="proven")
    assert await states(rig) == ["live", "live"]


async def test_a_canary_does_not_say_which_connections_it_tried(rig: Rig) -> None:
    ids = await people(rig, "ada", "ben")
    provider_takes(rig, OLD, NEW)
    secret = await add(rig, canary=2)
    await rig.parts.canaries.run_due()
    assert set((await canary_of(rig, secret)).detail["tried"]) == set(ids.values())
    for path in ("/v1/rotations", f"/v1/rotations/{secret['rotation_id']}"):
        answer = await rig.call("GET", path)
        assert answer.status_code == 200
        assert not [one for one in ids.values() if one in answer.text]


async def test_a_canary_that_is_over_cannot_be_resumed_to_anything(rig: Rig) -> None:
    secret = await add(rig, canary=1)
    await rig.parts.canaries.run_due()
    assert (await canary_of(rig, secret)).state == "failed"
    resumed = await rig.call("POST", f"/v1/rotations/{secret['rotation_id']}/resume")
    assert resumed.status_code in {200, 409}, resumed.text
    await rig.parts.rotations.move()
    await rig.parts.canaries.run_due()
    shown = (await rig.call("GET", f"/v1/rotations/{secret['rotation_id']}")).json()
    assert (shown["state"], shown["class"], shown["ended_at"] is not None) == ("failed", "client-secret", True)
    assert await states(rig) == ["live"]


async def test_the_worker_carries_canaries_on_by_itself(rig: Rig) -> None:
    await people(rig, "ada", "ben")
    provider_takes(rig, OLD, NEW)
    secret = await add(rig, canary=2)

    async def over() -> bool:
        return (await canary_of(rig, secret)).state == "done"

    async with running_worker(rig.parts):
        await eventually(over)
    assert await states(rig) == ["live", "live"]


async def test_an_integration_that_is_deleted_takes_its_candidate_along(rig: Rig) -> None:
    secret = await add(rig, canary=1)
    assert (await rig.call("DELETE", "/v1/integrations/sandbox")).status_code == 204
    assert (await canary_of(rig, secret)).state == "failed"
    assert await rig.parts.vault.owners("integrations/") == []
    assert await rig.parts.canaries.run_due() == 0


async def test_a_candidate_neither_counts_as_configured_nor_leaves_in_an_export(rig: Rig) -> None:
    body = {"name": "bare", "provider": "oidc", "client_id": "c", "config": {"issuer": rig.sandbox.issuer}}
    assert (await rig.call("POST", "/v1/integrations", body)).status_code == 201
    made = await rig.call("POST", "/v1/integrations/bare/client-secrets", {"client_secret": NEW, "canary": 1})
    assert made.status_code == 201
    assert (await rig.call("GET", "/v1/integrations/bare")).json()["status"] == "configuring"
    assert await rig.parts.integrations.secret_values("bare") == []


# The order of live secrets


async def test_a_refused_secret_is_tried_last_and_it_shows_which_one_the_provider_takes(rig: Rig) -> None:
    ids = await people(rig, "ada", "ben", "cleo")
    new = await add(rig)
    assert new["state"] == "live"
    assert (await rig.token(ids["ada"], force_refresh=True)).status_code == 200
    assert asked(rig) == ["invalid_client", None]

    async def noted() -> Any:
        newest, oldest = await listed(rig)
        return (newest, oldest) if newest["refused_at"] and oldest["last_used_at"] else None

    newest, oldest = await eventually(noted)
    assert (newest["last_used_at"], oldest["refused_at"]) == (None, None)
    assert (await rig.token(ids["ben"], force_refresh=True)).status_code == 200
    assert asked(rig) == ["invalid_client", None, None], "the one that works is tried first from now on"
    provider_takes(rig, NEW)
    assert (await rig.token(ids["cleo"], force_refresh=True)).status_code == 200
    assert asked(rig)[3:] == ["invalid_client", None], "and the other one is still tried"
    assert [one["id"] for one in await listed(rig)] == [new["id"], oldest["id"]], "shown newest first all the same"


async def test_promoting_a_live_secret_puts_it_back_in_front(rig: Rig) -> None:
    ids = await people(rig, "ada", "ben")
    new = await add(rig)
    assert (await rig.token(ids["ada"], force_refresh=True)).status_code == 200

    async def noted() -> Any:
        return (await listed(rig))[0]["refused_at"]

    await eventually(noted)
    provider_takes(rig, OLD, NEW)
    answer = await rig.call("POST", f"{PATH}/{new['id']}/promote")
    assert answer.json()["refused_at"] is None
    configured = await rig.parts.integrations.configured("sandbox")
    assert (await rig.parts.integrations.client(configured)).secret_ids[0] == new["id"]


# What no row names


async def test_client_secrets_that_no_row_names_are_swept_after_a_day(rig: Rig) -> None:
    live = (await listed(rig))[0]["id"]
    orphan = "integrations/sandbox/key_orphan"
    moved = f"integrations/other/{live}"
    for owner in (orphan, moved):
        await rig.parts.vault.put(owner, {"client_secret": "nobody's"}, expected_version=0)
    at = await rig.parts.database.read(now)
    assert await rig.parts.credentials.sweep_unreferenced(at=at + 3600) == 0
    assert await rig.parts.credentials.sweep_unreferenced(at=at + 90_000) == 2
    assert [owner for owner, _ in await rig.parts.vault.owners("integrations/")] == [f"integrations/sandbox/{live}"]


# The decision


ROW = Connection(id="con_1", integration="sandbox", provider="oidc", status="active", created_at=0.0)


@pytest.mark.parametrize(
    ("standing", "move"),
    [
        (Standing(2, 2, [ROW], waiting=False, age_seconds=0), "promote"),
        (Standing(2, 1, [ROW], waiting=True, age_seconds=0), "try"),
        (Standing(2, 1, [], waiting=True, age_seconds=0), "wait"),
        (Standing(2, 1, [], waiting=False, age_seconds=0), "promote"),
        (Standing(2, 0, [], waiting=False, age_seconds=0), "probe"),
        (Standing(2, 1, [ROW], waiting=False, age_seconds=GIVE_UP_SECONDS + 1), "roll_back"),
        (Standing(2, 2, [], waiting=False, age_seconds=GIVE_UP_SECONDS + 1), "promote"),
    ],
)
def test_the_next_move_follows_from_how_the_canary_stands(standing: Standing, move: str) -> None:
    assert next_move(standing) == move


def test_pauses_double_up_to_a_minute() -> None:
    assert [pause_seconds(waits) for waits in (0, 1, 2, 5, 6, 10_000)] == [1, 2, 4, 32, 60, 60]
