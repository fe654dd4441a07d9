"""Keys and rotations through HTTP and the command line: who may, what is shown, and that callers notice nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlmodel import select

from broker.app import running_worker
from broker.models import DataKey, SystemKey
from tests.flows.api_calls import check_problem, grant, imported
from tests.flows.rig import Rig, eventually
from tests.flows.shared import audited, bearer, rows

CLASSES = ["encryption", "data", "webhook-signing", "jwt-signing", "session", "audit"]
SHOWN = {
    *("id", "class", "state", "step", "old_key", "new_key", "total", "done", "failed", "detail"),
    *("created_by", "created_at", "updated_at", "ended_at"),
}


async def started(rig: Rig, key_class: str) -> dict[str, Any]:
    answer = await rig.call("POST", f"/v1/keys/{key_class}/rotate")
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def over(rig: Rig, rotation_id: str) -> dict[str, Any]:
    """Wait until a rotation is over."""

    async def look() -> dict[str, Any] | None:
        shown: dict[str, Any] = (await rig.call("GET", f"/v1/rotations/{rotation_id}")).json()
        return shown if shown["state"] in {"done", "failed"} else None

    return dict(await eventually(look, seconds=30))


async def test_the_worker_rotates_data_keys_while_tokens_are_handed_out(rig: Rig) -> None:
    connections = [(await imported(rig, f"acme:{number}"))["id"] for number in range(5)]
    tokens = {one: await bearer(rig, one) for one in connections}
    served, stopped = 0, asyncio.Event()

    async def serve() -> None:
        nonlocal served
        while not stopped.is_set():
            for one in connections:
                assert await bearer(rig, one) == tokens[one]
                served += 1

    serving = asyncio.create_task(serve())
    async with running_worker(rig.parts):
        rotation = await started(rig, "data")
        assert (rotation["state"], rotation["class"], {*rotation}) == ("running", "data", SHOWN)
        done = await over(rig, rotation["id"])
    stopped.set()
    await serving
    assert (done["state"], done["failed"], done["done"]) == ("done", 0, done["total"])
    assert done["ended_at"] is not None
    assert not {"pass", "clean_at"} & done["detail"].keys()
    assert served > 10
    keys = {row.id: row for row in await rows(rig, DataKey)}
    assert keys[done["old_key"]].retired_at is not None
    (data,) = [one for one in (await rig.call("GET", "/v1/keys")).json()["data"] if one["class"] == "data"]
    assert [(key["id"], key["state"]) for key in data["keys"]] == [
        (done["new_key"], "current"),
        (done["old_key"], "retired"),
    ]
    assert data["keys"][0]["sealed"] == sum(data["keys"][0]["places"].values()) > len(connections)
    assert [row.action for row in await audited(rig, "rotation.done")] == ["rotation.done"]


async def test_every_class_is_listed_and_no_key_is_shown(rig: Rig) -> None:
    answer = await rig.call("GET", "/v1/keys")
    assert answer.status_code == 200
    assert [one["class"] for one in answer.json()["data"]] == CLASSES
    for one in answer.json()["data"]:
        assert [key["state"] for key in one["keys"]] == ["current"], one
        assert one["rotation"] is None
    for row in await rows(rig, SystemKey):
        assert row.sealed_key.hex() not in answer.text
    first = (await rig.call("GET", "/v1/keys?limit=4")).json()
    rest = (await rig.call("GET", f"/v1/keys?limit=4&cursor={first['next_cursor']}")).json()
    assert [one["class"] for one in (*first["data"], *rest["data"])] == CLASSES
    assert rest["next_cursor"] is None


async def test_a_dry_run_answers_with_a_plan_and_begins_nothing(rig: Rig) -> None:
    await imported(rig, "acme:1")
    answer = await rig.call("POST", "/v1/keys/data/rotate", {"dry_run": True})
    assert answer.status_code == 200
    plan = answer.json()
    assert (plan["id"], plan["state"]) == (None, "planned")
    assert plan["total"] == sum(plan["detail"]["places"].values()) > 0
    assert plan["detail"]["waiting_for"] == []
    assert (await rig.call("GET", "/v1/rotations")).json() == {"data": [], "next_cursor": None}


async def test_one_rotation_of_a_class_at_a_time_and_the_refusal_names_it(rig: Rig) -> None:
    first = await started(rig, "session")
    again = await rig.call("POST", "/v1/keys/session/rotate", {})
    assert check_problem(again, 409, "conflict")["made_id"] == first["id"]
    second = await started(rig, "audit")
    listed = (await rig.call("GET", "/v1/rotations?limit=1")).json()
    assert [one["id"] for one in listed["data"]] == [second["id"]]
    rest = (await rig.call("GET", f"/v1/rotations?cursor={listed['next_cursor']}")).json()
    assert [one["id"] for one in rest["data"]] == [first["id"]]
    check_problem(await rig.call("POST", "/v1/keys/encryption/rotate"), 409, "conflict")
    check_problem(await rig.call("POST", "/v1/keys/nothing/rotate"), 404, "not_found")
    check_problem(await rig.call("GET", f"/v1/rotations/rot_{'a' * 26}"), 404, "not_found")
    check_problem(await rig.call("POST", "/v1/keys/data/rotate", {"force": True}), 400, "invalid_request", "/force")


async def test_a_paused_rotation_stands_still_until_it_is_resumed(rig: Rig) -> None:
    rotation = await started(rig, "webhook-signing")
    path = f"/v1/rotations/{rotation['id']}"
    paused = await rig.call("POST", f"{path}/pause")
    assert (paused.status_code, paused.json()["state"]) == (200, "paused")
    async with running_worker(rig.parts):
        other = await started(rig, "session")
        assert (await over(rig, other["id"]))["state"] == "done", "the worker had its turn"
        assert (await rig.call("GET", path)).json()["step"] == "publish"
        resumed = await rig.call("POST", f"{path}/resume", {})
        assert (resumed.status_code, resumed.json()["state"]) == (200, "running")
        assert (await over(rig, rotation["id"]))["detail"]["retire_at"] is not None
    check_problem(await rig.call("POST", f"{path}/pause"), 409, "conflict")
    check_problem(await rig.call("POST", f"{path}/resume", {"abandon_unreadable": True}), 409, "conflict")
    (record,) = await audited(rig, "rotation.paused")
    assert record.detail["class"] == "webhook-signing"


@pytest.mark.parametrize(
    ("role", "may"), [("security", True), ("operator", False), ("auditor", False), ("service", False)]
)
async def test_keys_are_for_the_security_team(rig: Rig, role: str, may: bool) -> None:  # noqa: FBT001
    grants = [grant("read")] if role == "service" else []
    key = await rig.caller(*grants, roles=(role,))
    rotation = await started(rig, "session")
    calls = [
        ("GET", "/v1/keys", 200),
        ("POST", "/v1/keys/audit/rotate", 201),
        ("GET", "/v1/rotations", 200),
        ("GET", f"/v1/rotations/{rotation['id']}", 200),
        ("POST", f"/v1/rotations/{rotation['id']}/pause", 200),
        ("POST", f"/v1/rotations/{rotation['id']}/resume", 200),
    ]
    for method, path, status in calls:
        answer = await rig.call(method, path, key=key)
        assert answer.status_code == (status if may else 403), (path, answer.text)


async def test_the_audit_verifies_across_a_rotation_of_every_class(rig: Rig) -> None:
    async with running_worker(rig.parts):
        for key_class in ("data", "audit", "session", "jwt-signing"):
            rotation = await started(rig, key_class)
            assert (await over(rig, rotation["id"]))["state"] == "done"
            await rig.parts.replicas.beat()
            await imported(rig, f"acme:{key_class}")
    assert (await rig.call("GET", "/v1/audit/verify")).json()["ok"] is True
    states = [
        row.state
        for row in await rig.parts.database.read(
            lambda session: session.exec(select(SystemKey).where(SystemKey.purpose == "audit")).all()
        )
    ]
    assert sorted(states) == ["current", "previous"]
