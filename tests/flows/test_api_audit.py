"""The audit over HTTP: search, keys, export and verify, each on record with who asked."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from broker.audit import check_export
from broker.audit.sinks import DEADLINE_SECONDS
from broker.models import AuditRecord
from tests.flows.api_calls import check_problem, imported
from tests.flows.rig import Rig, open_rig
from tests.flows.shared import audited, rows

pytestmark = pytest.mark.asyncio(loop_scope="module")

READS = {
    "/v1/audit?action=nothing": "audit.searched",
    "/v1/audit/verify": "audit.verified",
    "/v1/audit/export": "audit.exported",
}


async def caller_with(rig: Rig, role: str) -> dict[str, Any]:
    """Return a new caller with its key."""
    answer = await rig.call("POST", "/v1/callers", {"name": "reader", "roles": [role]})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("path", READS)
async def test_who_reads_the_audit_is_in_it(shared: Rig, path: str) -> None:
    made = await caller_with(shared, "auditor")
    assert (await shared.call("GET", path, key=made["key"])).status_code == 200
    assert [record.action for record in await audited(shared, READS[path]) if record.actor == made["id"]] == [
        READS[path]
    ]


async def test_a_search_for_a_person_is_on_record_without_the_person(shared: Rig) -> None:
    made = await caller_with(shared, "auditor")
    await shared.call("GET", "/v1/audit?subject=acme:somebody&limit=3", key=made["key"])
    [record] = [one for one in await audited(shared, "audit.searched") if one.actor == made["id"]]
    digest = shared.parts.audit.subject_digest("acme:somebody")
    assert record.detail == {"filters": ["subject"], "subject_digest": digest, "records": 0}
    assert record.subject is None


async def test_only_readers_of_the_audit_get_keys_and_exports(shared: Rig) -> None:
    made = await caller_with(shared, "operator")
    for path in ("/v1/audit/keys", "/v1/audit/export"):
        check_problem(await shared.call("GET", path, key=made["key"]), 403, "forbidden")
    denied = [record for record in await audited(shared, "audit.exported") if record.actor == made["id"]]
    assert [record.outcome for record in denied] == ["denied"]
    check_problem(await shared.call("GET", "/v1/audit/export?since=now"), 400, "invalid_request", "?since")


async def test_an_export_checks_with_the_keys_that_the_api_gives(shared: Rig) -> None:
    await imported(shared, "acme:1")
    listed = (await shared.call("GET", "/v1/audit/keys")).json()
    assert listed["next_cursor"] is None
    keys = {one["key_id"]: one["public_key"] for one in listed["data"]}
    answer = await shared.call("GET", "/v1/audit/export")
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert answer.headers["cache-control"] == "no-store"
    lines = [line + b"\n" for line in answer.content.split(b"\n")[:-1]]
    found = check_export(lines, keys)
    assert found.ok
    assert found.count == len(lines) - 2 > 1
    assert json.loads(lines[1])["number"] == 1
    later = await shared.call("GET", "/v1/audit/export?since=2999-01-01T00:00:00Z")
    assert len(later.content.splitlines()) == 2


async def test_a_chain_that_cannot_be_written_on_can_still_be_looked_at(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder: Path = tmp_path_factory.mktemp("audit")
    async with open_rig(folder) as rig:
        await imported(rig, "acme:1")
        await rig.parts.database.transaction(
            lambda session: session.execute(sa.text("UPDATE audit_head SET mac = 'x'"))
        )
        before = len(await rows(rig, AuditRecord))
        verdict = (await rig.call("GET", "/v1/audit/verify")).json()
        assert verdict["problem"] == "head_forged"
        assert len((await rig.call("GET", "/v1/audit?limit=200")).json()["data"]) == before
        assert (await rig.call("GET", "/v1/audit/export")).status_code == 200
        assert len(await rows(rig, AuditRecord)) == before
        assert await rig.parts.audit.accept(by="olga", reason="a test") is not None
        accepted = (await rig.call("GET", "/v1/audit/verify")).json()
        assert (accepted["ok"], accepted["accepted"][0]["reason"]) == (True, "a test")


async def test_an_edited_record_is_named_in_the_seal_of_an_export(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder: Path = tmp_path_factory.mktemp("audit")
    async with open_rig(folder) as rig:
        await imported(rig, "acme:1")
        await rig.parts.database.transaction(
            lambda session: session.execute(sa.text("UPDATE audit_records SET action = 'x.y' WHERE number = 2"))
        )
        answer = await rig.call("GET", "/v1/audit/export")
        seal = json.loads(answer.content.splitlines()[-1])["seal"]
        assert (seal["complete"], seal["break"]) == (False, {"problem": "edited", "number": 2})


async def test_a_place_of_checkpoints_that_became_a_pipe_holds_up_nobody(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder: Path = tmp_path_factory.mktemp("audit")
    pipe = folder / "points"
    async with open_rig(folder, audit_checkpoints=(f"file:{pipe}",)) as rig:
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        async with asyncio.timeout(DEADLINE_SECONDS + 5):
            check_problem(await rig.call("GET", "/v1/audit/verify"), 503, "audit_unavailable")
        assert (await rig.call("GET", "/v1/audit?limit=1")).status_code == 200
