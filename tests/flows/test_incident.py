"""Incident mode through HTTP: freeze, lift, revoke in bulk, and the erasure of a person."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import pytest
import sqlalchemy as sa
from sqlmodel import col

from broker.connections import RECHECK_SECONDS, Asking, Connections
from broker.errors import Conflict, ConnectionFrozen
from broker.imports import Import
from broker.models import Connection, Revocation, RevocationResult, SealedSecret
from broker.oauth.confirm import Confirm, Confirmations
from broker.policy import Principal
from broker.refresh import Ask
from providers.spec import Secret
from tests.flows.api_calls import check_problem, grant, imported, unused
from tests.flows.rig import APP, Rig, eventually, landed
from tests.flows.shared import audited, connected, flow, person, rewritten, row, rows, subject

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def started(rig: Rig, action: str, selector: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    answer = await rig.call(
        "POST", "/v1/revocations", {"action": action, "selector": selector, "reason": "leak", **fields}
    )
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def through(rig: Rig, revocation_id: str) -> dict[str, Any]:
    """Do what the worker does until a revocation is through; return it."""

    async def over() -> Any:
        await rig.parts.revocations.advance()
        shown = (await rig.call("GET", f"/v1/revocations/{revocation_id}")).json()
        return shown if shown["state"] in {"done", "lifted"} else None

    return dict(await eventually(over))


async def status(rig: Rig, connection_id: str) -> tuple[str, str | None]:
    shown = (await rig.call("GET", f"/v1/connections/{connection_id}")).json()
    return shown["status"], shown["status_reason"]


# What is selected


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"selector": {}}, "/selector"),
        ({"selector": {"all": False}}, "/selector/all"),
        ({"selector": {"all": True, "subject": "x"}}, "/selector/all"),
        ({"selector": {"tag": "nocolon"}}, "/selector/tag"),
        ({"selector": {"issued_before": "yesterday"}}, "/selector/issued_before"),
        ({"selector": {"subject": None}}, "/selector/subject"),
        ({"selector": {"provider": "x"}}, "/selector/provider"),
        ({"selector": {"subject": "x"}, "action": "delete"}, "/action"),
        ({"selector": {"subject": "x"}, "reason": ""}, "/reason"),
        ({"selector": {"subject": "x"}, "force": True}, "/force"),
    ],
)
async def test_a_selector_that_is_empty_or_unknown_is_refused(
    shared: Rig, body: Mapping[str, Any], pointer: str
) -> None:
    sent = {"action": "freeze", "reason": "leak", **body}
    check_problem(await shared.call("POST", "/v1/revocations", sent), 400, "invalid_request", pointer)


async def test_only_admin_and_security_stop_and_lift_and_an_auditor_may_look(shared: Rig) -> None:
    made = await imported(shared, subject())
    body = {"action": "freeze", "selector": {"subject": made["subject"]}, "reason": "leak", "dry_run": True}
    wanted = {"security": 200, "auditor": 403, "operator": 403, "service": 403}
    for role, expected in wanted.items():
        given = [grant("read", "manage", "token")] if role == "service" else []
        key = await shared.caller(*given, roles=(role,))
        assert (await shared.call("POST", "/v1/revocations", body, key=key)).status_code == expected, role
        assert (await shared.call("DELETE", "/v1/revocations/rev_x", key=key)).status_code in {403, 404}
        erasing = await shared.call("DELETE", f"/v1/subjects/{subject()}", key=key)
        assert erasing.status_code == (202 if role == "security" else 403)
        looking = await shared.call("GET", "/v1/revocations", key=key)
        assert looking.status_code == (200 if role in {"security", "auditor"} else 403)


async def test_a_reason_that_names_the_subject_is_refused_since_the_audit_keeps_it_for_ever(shared: Rig) -> None:
    body = {"action": "freeze", "selector": {"subject": "acme:zoe"}, "reason": "ask acme:zoe, please"}
    check_problem(await shared.call("POST", "/v1/revocations", body), 400, "invalid_request", "/reason")
    assert (await shared.call("POST", "/v1/revocations", {**body, "reason": "ask acme:zoeva"})).status_code == 201


async def test_a_dry_run_counts_and_changes_nothing(shared: Rig) -> None:
    who = subject()
    made = [await imported(shared, who) for _ in range(2)]
    body = {"action": "revoke", "selector": {"subject": who}, "reason": "leak", "dry_run": True}
    answer = await shared.call("POST", "/v1/revocations", body)
    assert (answer.status_code, answer.json()) == (
        200,
        {"action": "revoke", "dry_run": True, "total": 2, "by_integration": {"sandbox": 2}},
    )
    assert [await status(shared, one["id"]) for one in made] == [("active", None)] * 2


async def test_the_parts_of_a_selector_all_have_to_fit(shared: Rig) -> None:
    who, team = subject(), unused("team")
    tagged = await imported(shared, who, tags={"team": team})
    scoped = {"type": "oauth2", "access_token": unused("token-"), "scopes": ["mail.read"]}
    other = await imported(shared, who, credentials=scoped)
    third = await imported(shared, subject(), tags={"team": team})

    async def meant(**selector: Any) -> int:
        body = {"action": "freeze", "selector": selector, "reason": "leak", "dry_run": True}
        return int((await shared.call("POST", "/v1/revocations", body)).json()["total"])

    assert await meant(subject=who) == 2
    assert await meant(tag=f"team:{team}") == 2
    assert await meant(subject=who, tag=f"team:{team}") == 1
    assert await meant(subject=who, scope="mail.read") == 1
    assert await meant(subject=who, scope="mail") == 0
    assert await meant(subject=who, integration="other") == 0
    assert await meant(subject=who, issued_before="2020-01-01T00:00:00Z") == 0
    assert await meant(subject=who, issued_before="2099-01-01T00:00:00Z") == 2
    frozen = await started(shared, "freeze", {"subject": who, "tag": f"team:{team}"})
    assert frozen["selector"] == {"subject": who, "tag": f"team:{team}"}
    assert (await status(shared, tagged["id"]))[0] == "frozen"
    assert [(await status(shared, one["id"]))[0] for one in (other, third)] == ["active", "active"]


# Freezing


async def test_a_frozen_connection_hands_out_nothing_until_the_freeze_is_lifted(shared: Rig) -> None:
    made = await connected(shared, subject(), person())
    frozen = await started(shared, "freeze", {"subject": made["subject"]})
    assert frozen["total"] == 1
    check_problem(await shared.token(made["id"]), 409, "connection_frozen")
    assert await status(shared, made["id"]) == ("frozen", frozen["id"])
    shown = await through(shared, frozen["id"])
    assert (shown["state"], shown["counts"], shown["done"]) == ("done", {"frozen": 1}, 1)
    assert [(one["connection_id"], one["status_before"], one["result"]) for one in shown["results"]] == [
        (made["id"], "active", "frozen")
    ]
    assert (await shared.call("DELETE", f"/v1/revocations/{frozen['id']}")).status_code == 200
    assert await status(shared, made["id"]) == ("active", None)
    assert (await shared.token(made["id"])).status_code == 200
    assert (await through(shared, frozen["id"]))["counts"] == {"lifted": 1}
    check_problem(await shared.call("DELETE", f"/v1/revocations/{frozen['id']}"), 409, "conflict")
    check_problem(await shared.call("DELETE", "/v1/revocations/rev_absent"), 404, "not_found")


class Until:
    """A part of the broker of which one method gives its first answer only after something else has happened."""

    def __init__(self, part: Any, name: str, happens: Callable[[], Awaitable[Any]]) -> None:
        """Stand before the true one."""
        self.part, self.name, self.happens = part, name, happens
        self.came: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        """Pass everything else on."""
        true = getattr(self.part, name)
        if name != self.name:
            return true

        async def held(*args: Any, **options: Any) -> Any:
            answer = await true(*args, **options)
            if not self.came:
                self.came.append(None)
                self.came[0] = await self.happens()
            return answer

        return held


def connections_with(rig: Rig, **others: Any) -> Connections:
    """Return connections on the rig's own parts, but for those that are named."""
    names = ("database", "vault", "credentials", "integrations", "audit", "metrics")
    return Connections(*(others.get(name, getattr(rig.parts, name)) for name in names))


async def admin(rig: Rig) -> Principal:
    return await rig.parts.callers.identify(Secret(rig.admin_key))


@pytest.mark.parametrize("by", ["id", "subject"])
async def test_a_freeze_counts_from_before_the_first_read_however_slow_its_answer(shared: Rig, by: str) -> None:
    made = await imported(shared, subject())

    async def frozen_meanwhile() -> None:
        await started(shared, "freeze", {"subject": made["subject"]})
        await asyncio.sleep(RECHECK_SECONDS + 0.1)

    slow = Until(shared.parts.database, "query", frozen_meanwhile)
    connections, asking = connections_with(shared, database=slow), Asking(await admin(shared), lambda: admin(shared))
    asked = {
        "id": lambda: connections.token(made["id"], Ask(), asking),
        "subject": lambda: connections.token_for("sandbox", made["subject"], Ask(), asking),
    }
    with pytest.raises(ConnectionFrozen):
        await asked[by]()
    assert slow.came
    assert not await audited(shared, "connection.token", made["id"])


async def test_a_test_of_the_integration_does_not_use_what_was_frozen_before_its_call(shared: Rig) -> None:
    made = await connected(shared, subject(), person())  # the newest one
    frozen = Until(shared.parts.audit, "record", lambda: started(shared, "freeze", {"subject": made["subject"]}))
    connections = connections_with(shared, audit=frozen)
    before = len(shared.sandbox.state.visits)
    check = await connections.identity_check("sandbox", shared.parts.egress, await admin(shared))
    assert check == {"name": "identity", "ok": False, "detail": ConnectionFrozen().detail}
    assert await status(shared, made["id"]) == ("frozen", frozen.came[0]["id"])
    assert len(await audited(shared, "integration.tested", made["id"])) == 1
    assert len(shared.sandbox.state.visits) == before


async def test_what_two_freezes_hold_stays_frozen_until_both_are_lifted(shared: Rig) -> None:
    for first_lifted in (0, 1):
        made = await imported(shared, subject())
        await rewritten(shared, Connection, made["id"], status="reauthorization_required", status_reason="before")
        both = [await started(shared, "freeze", {"subject": made["subject"]}) for _ in range(2)]
        await shared.call("DELETE", f"/v1/revocations/{both[first_lifted]['id']}")
        assert await status(shared, made["id"]) == ("frozen", both[1 - first_lifted]["id"])
        assert (await through(shared, both[first_lifted]["id"]))["counts"] == {"still_frozen": 1}
        await shared.call("DELETE", f"/v1/revocations/{both[1 - first_lifted]['id']}")
        assert await status(shared, made["id"]) == ("reauthorization_required", "before")


async def test_a_lift_leaves_alone_what_was_revoked_or_deleted_meanwhile(shared: Rig) -> None:
    who = subject()
    one, two = await imported(shared, who, tags={"a": "b"}), await imported(shared, who)
    frozen = await started(shared, "freeze", {"subject": who})
    await started(shared, "revoke", {"subject": who, "tag": "a:b"})
    await shared.call("DELETE", f"/v1/connections/{two['id']}?revoke=false")
    await shared.call("DELETE", f"/v1/revocations/{frozen['id']}")
    assert (await status(shared, one["id"]))[0] == "revoked"
    assert (await through(shared, frozen["id"]))["counts"] == {"skipped": 2}


async def test_what_becomes_usable_during_a_freeze_is_frozen_and_lifted_with_it(shared: Rig) -> None:
    who, login = subject(), person()
    came = landed(await flow(shared, user=login))
    frozen = await started(shared, "freeze", {"subject": who})
    confirmed = (await shared.confirm(came, who, return_to=APP)).json()
    brought = await imported(shared, who)
    assert [one["status"] for one in (confirmed, brought)] == ["frozen", "frozen"]
    check_problem(await shared.token(brought["id"]), 409, "connection_frozen")
    again = landed(await flow(shared, user=login))
    merged = (await shared.confirm(again, who, return_to=APP)).json()
    assert (merged["id"], merged["status"]) == (confirmed["id"], "frozen")
    await shared.call("DELETE", f"/v1/revocations/{frozen['id']}")
    for one in (confirmed, brought):
        assert await status(shared, one["id"]) == ("active", None)
        assert [record.detail["revocation_id"] for record in await audited(shared, "connection.frozen", one["id"])] == [
            frozen["id"]
        ]
    assert (await imported(shared, who))["status"] == "active"


async def test_a_consent_during_a_freeze_is_what_counts_after_it(shared: Rig) -> None:
    who, login = subject(), person()
    made = await connected(shared, who, login)
    await rewritten(shared, Connection, made["id"], status="reauthorization_required", status_reason="invalid_grant")
    frozen = await started(shared, "freeze", {"subject": who})
    assert (await connected(shared, who, login))["status"] == "frozen"
    await shared.call("DELETE", f"/v1/revocations/{frozen['id']}")
    assert await status(shared, made["id"]) == ("active", None)


async def test_the_audit_proves_who_stopped_what_and_names_the_person_only_where_it_can_be_erased(shared: Rig) -> None:
    who = subject()
    made = [await imported(shared, who) for _ in range(3)]
    frozen = await started(shared, "freeze", {"subject": who})
    await through(shared, frozen["id"])
    (one,) = [r for r in await audited(shared, "revocation.started") if r.detail["revocation_id"] == frozen["id"]]
    assert (one.subject, one.detail["total"], one.detail["reason"]) == (who, 3, "leak")
    assert one.detail["selected_by"] == ["subject"]
    assert one.detail["selector"] == shared.parts.audit.digest(f'{{"subject": "{who}"}}')
    assert who not in str(one.detail)
    for connection in made:
        (record,) = await audited(shared, "connection.frozen", connection["id"])
        assert (record.actor, record.subject) == (one.actor, who)
    assert (await shared.parts.audit.verify()).ok


# Revoking


async def test_revoked_connections_are_dead_at_once_then_at_the_provider_and_in_the_vault(shared: Rig) -> None:
    who = subject()
    made = await connected(shared, who, person())
    token = (await shared.token(made["id"])).json()["access_token"]
    key = await imported(shared, who, credentials={"type": "oauth2", "access_token": unused("token-")})
    revoked = await started(shared, "revoke", {"subject": who})
    check_problem(await shared.token(made["id"]), 409, "connection_revoked")
    assert (await shared.whoami(token)).status_code == 200, "the provider comes after the stop"
    shown = await through(shared, revoked["id"])
    assert (shown["total"], shown["done"], shown["failed"]) == (2, 2, 0)
    assert (await shared.whoami(token)).status_code == 401
    assert {one["connection_id"]: one["result"] for one in shown["results"]}[made["id"]] == "revoked"
    for one in (made, key):
        assert await status(shared, one["id"]) == ("revoked", revoked["id"])
        owners = {secret.owner for secret in await rows(shared, SealedSecret)}
        assert f"connections/{one['id']}" not in owners
        assert len(await audited(shared, "connection.revoked", one["id"])) == 1
        assert len(await audited(shared, "connection.revocation", one["id"])) == 1
    assert (await shared.call("DELETE", f"/v1/connections/{made['id']}")).json()["revocation"] == "skipped"


async def test_a_revoked_connection_works_again_after_a_new_consent(shared: Rig) -> None:
    who, login = subject(), person()
    made = await connected(shared, who, login)
    revoked = await started(shared, "revoke", {"subject": who})
    waiting = landed(await flow(shared, user=login))
    check_problem(await shared.confirm(waiting, who, return_to=APP), 409, "conflict")
    await through(shared, revoked["id"])
    assert (await connected(shared, who, login))["id"] == made["id"]
    handed_out = await shared.token(made["id"])
    assert handed_out.status_code == 200
    assert (await shared.whoami(handed_out.json()["access_token"])).status_code == 200


def revoked_behind_the_put(rig: Rig, who: str) -> Until:
    """Return credentials where a revocation begins when the vault has a new secret, before the row names it."""
    return Until(rig.parts.credentials, "put", lambda: started(rig, "revoke", {"subject": who}))


async def revoked_for_good(rig: Rig, connection_id: str, revocation: Mapping[str, Any]) -> None:
    """Check that a revocation, once through, has ended a connection, whose secret is gone."""
    shown = await through(rig, revocation["id"])
    assert {one["connection_id"]: one["detail"] for one in shown["results"]}[connection_id] != "in_use_again"
    check_problem(await rig.token(connection_id), 409, "connection_revoked")
    assert f"connections/{connection_id}" not in {secret.owner for secret in await rows(rig, SealedSecret)}


async def test_an_import_does_not_evade_a_revocation_that_begins_while_it_writes(shared: Rig) -> None:
    who, account = subject(), unused("account-")
    made = await imported(shared, who, account=account)
    await rewritten(shared, Connection, made["id"], status="revoked")  # as a revocation that failed leaves it
    revoking = revoked_behind_the_put(shared, who)
    again = Import("sandbox", who, {"type": "oauth2", "access_token": unused("token-")}, {"id": account})
    with pytest.raises(Conflict):
        await connections_with(shared, credentials=revoking).import_(again, await admin(shared))
    await revoked_for_good(shared, made["id"], revoking.came[0])


async def test_a_confirm_does_not_evade_a_revocation_that_begins_while_it_writes(shared: Rig) -> None:
    who, login = subject(), person()
    made = await connected(shared, who, login)
    await rewritten(shared, Connection, made["id"], status="revoked")
    came = landed(await flow(shared, user=login))
    parts, revoking = shared.parts, revoked_behind_the_put(shared, who)
    confirmations = Confirmations(
        parts.database, parts.vault, cast("Any", revoking), parts.audit, parts.callers.standing
    )
    with pytest.raises(Conflict):
        await confirmations.confirm(Confirm(came["connection_id"], came["confirm"], who, APP), await admin(shared))
    await revoked_for_good(shared, made["id"], revoking.came[0])


async def test_a_pending_connection_is_revoked_and_gone(shared: Rig) -> None:
    who = subject()
    session = await shared.session(who)
    came = landed(await flow(shared, user=person(), session=session["token"]))
    assert came["connection_id"]
    revoked = await started(shared, "revoke", {"subject": who})
    assert revoked["total"] == 1
    assert (await shared.confirm(came, who)).status_code in {404, 409}
    assert (await through(shared, revoked["id"]))["counts"] == {"revoked": 1}
    assert await row(shared, came["connection_id"]) is None


async def test_a_provider_that_is_down_is_asked_again_and_in_the_end_it_is_said_that_it_failed(shared: Rig) -> None:
    made = await connected(shared, subject(), person())
    await rewritten(shared, Connection, made["id"], client_id="another")  # never sent to another client's grant
    revoked = await started(shared, "revoke", {"subject": made["subject"]})
    for attempt in range(1, 7):
        await shared.parts.revocations.advance()
        shown = (await shared.call("GET", f"/v1/revocations/{revoked['id']}")).json()
        assert shown["results"][0]["attempts"] == attempt
        again = sa.update(RevocationResult).where(RevocationResult.revocation_id == revoked["id"])
        await shared.parts.database.transaction(
            lambda session, again=again: session.execute(again.values(not_before_at=0.0))  # type: ignore[misc]
        )
        shared.parts.revocations._ending._lanes.clear()
    assert (shown["failed"], shown["counts"]) == (1, {"failed": 1})
    assert shown["results"][0]["detail"] == "origin_changed"
    assert await status(shared, made["id"]) == ("revoked", revoked["id"])
    await rewritten(shared, Connection, made["id"], client_id=(await rows_client(shared)))
    again_revoked = await started(shared, "revoke", {"subject": made["subject"]})
    assert (await through(shared, again_revoked["id"]))["counts"] == {"revoked": 1}, "its secret was kept for this"


async def rows_client(rig: Rig) -> str:
    return str((await rig.call("GET", "/v1/integrations/sandbox")).json()["client_id"])


async def down(rig: Rig, connection_id: str) -> None:
    """Let the provider be out of reach for this connection: nothing is sent to another client's grant."""
    await rewritten(rig, Connection, connection_id, client_id="another")


async def up_again(rig: Rig, connection_id: str) -> None:
    await rewritten(rig, Connection, connection_id, client_id=await rows_client(rig))


async def time_passes(rig: Rig, revocation_id: str) -> None:
    """Let the time be over until the next try, and the settling of an erasure."""
    again = sa.update(RevocationResult).where(col(RevocationResult.revocation_id) == revocation_id)
    await rig.parts.database.transaction(lambda session: session.execute(again.values(not_before_at=0.0)))
    await rewritten(rig, Revocation, revocation_id, created_at=0.0)
    rig.parts.revocations._ending._lanes.clear()


async def has_secret(rig: Rig, connection_id: str) -> bool:
    return f"connections/{connection_id}" in {secret.owner for secret in await rows(rig, SealedSecret)}


async def ended_with_its_row(rig: Rig, kind: str) -> tuple[str, str]:
    """Erase a person, or revoke what waits for its confirm, while the provider is down; return connection and job."""
    who = subject()
    if kind == "erasure":
        made = (await connected(rig, who, person()))["id"]
        await down(rig, made)
        return made, (await rig.call("DELETE", f"/v1/subjects/{who}")).json()["id"]
    session = await rig.session(who)
    made = landed(await flow(rig, user=person(), session=session["token"]))["connection_id"]
    await down(rig, made)
    return made, (await started(rig, "revoke", {"subject": who}))["id"]


@pytest.mark.parametrize("kind", ["erasure", "pending"])
async def test_the_secret_of_a_deleted_connection_stays_until_its_provider_has_answered(shared: Rig, kind: str) -> None:
    made, job = await ended_with_its_row(shared, kind)
    await shared.parts.revocations.advance()
    await rewritten(shared, Connection, made, deleted_at=1.0)
    assert made not in await shared.parts.credentials.left_behind(older_than_seconds=60.0)
    assert await shared.parts.credentials.dispose(made) == "skipped"
    assert await has_secret(shared, made)
    shown = (await shared.call("GET", f"/v1/revocations/{job}")).json()
    assert [(one["result"], one["attempts"]) for one in shown["results"]] == [("pending", 1)]
    await up_again(shared, made)
    await time_passes(shared, job)
    assert (await through(shared, job))["counts"] == {"revoked": 1}
    assert not await has_secret(shared, made)
    assert await row(shared, made) is None


@pytest.mark.parametrize("kind", ["erasure", "pending"])
async def test_a_deleted_connection_is_gone_after_the_last_try_too(shared: Rig, kind: str) -> None:
    made, job = await ended_with_its_row(shared, kind)
    for attempt in range(1, 7):
        assert await has_secret(shared, made), attempt
        await time_passes(shared, job)
        await shared.parts.revocations.advance()
    shown = await through(shared, job)
    assert (shown["state"], shown["failed"]) == ("done", 1)
    assert [(one["result"], one["attempts"], one["detail"]) for one in shown["results"]] == [
        ("failed", 6, "origin_changed")
    ]
    assert not await has_secret(shared, made)
    assert await row(shared, made) is None


async def test_a_delete_does_not_keep_a_revocation_from_the_provider(shared: Rig) -> None:
    made = await connected(shared, subject(), person())
    token = (await shared.token(made["id"])).json()["access_token"]
    revoked = await started(shared, "revoke", {"subject": made["subject"]})
    deleted = await shared.call("DELETE", f"/v1/connections/{made['id']}?revoke=false")
    assert (deleted.status_code, deleted.json()["revocation"]) == (200, "skipped")
    assert (await through(shared, revoked["id"]))["counts"] == {"revoked": 1}
    assert (await shared.whoami(token)).status_code == 401
    assert await row(shared, made["id"]) is None


async def test_what_the_provider_said_before_a_crash_is_not_asked_again(shared: Rig) -> None:
    made = await connected(shared, subject(), person())
    revoked = await started(shared, "revoke", {"subject": made["subject"]})
    known = sa.update(RevocationResult).where(RevocationResult.revocation_id == revoked["id"])
    await shared.parts.database.transaction(lambda session: session.execute(known.values(detail="revoked")))
    await shared.parts.vault.destroy(f"connections/{made['id']}")
    before = len(shared.sandbox.state.visits)
    assert (await through(shared, revoked["id"]))["counts"] == {"revoked": 1}
    assert len(shared.sandbox.state.visits) == before


async def test_a_list_is_newest_first_and_results_come_in_pages(shared: Rig) -> None:
    who = subject()
    made = sorted([(await imported(shared, who))["id"] for _ in range(3)])
    frozen = await started(shared, "freeze", {"subject": who})
    assert (await shared.call("GET", "/v1/revocations?limit=1")).json()["data"][0]["id"] == frozen["id"]
    first = (await shared.call("GET", f"/v1/revocations/{frozen['id']}?limit=2")).json()
    rest = (await shared.call("GET", f"/v1/revocations/{frozen['id']}?cursor={first['next_cursor']}")).json()
    assert [one["connection_id"] for one in first["results"] + rest["results"]] == made
    assert rest["next_cursor"] is None
    assert (await shared.call("GET", f"/v1/revocations/{frozen['id']}?result=failed")).json()["results"] == []
    path = f"/v1/revocations/{frozen['id']}?result=maybe"
    check_problem(await shared.call("GET", path), 400, "invalid_request", "?result")


# Erasing a person


async def everything(rig: Rig) -> dict[str, str]:
    """Return the whole content of every table as text."""
    names = await rig.parts.database.read(lambda session: sa.inspect(session.connection()).get_table_names())

    def work(session: Any) -> dict[str, str]:
        found = {name: session.execute(sa.text(f'SELECT * FROM "{name}"')).all() for name in names}  # noqa: S608 - our own
        return {name: "\n".join(repr(tuple(one)) for one in table) for name, table in found.items()}

    return await rig.parts.database.read(work)


async def test_after_an_erasure_no_row_of_any_table_holds_the_name(shared: Rig) -> None:
    who = f"{subject()}/zoë?{unused('x')}"
    made = await connected(shared, who, person())
    token = (await shared.token(made["id"])).json()["access_token"]
    body = {
        "integration": "sandbox",
        "subject": who,
        "credentials": {"type": "oauth2", "access_token": unused("token-")},
    }
    kept = await shared.call("POST", "/v1/connections", body, Idempotency_Key=unused("key"))
    assert kept.status_code == 201
    frozen = await started(shared, "freeze", {"subject": who})
    await rewritten(shared, Revocation, frozen["id"], reason=f"about {who} only")
    session = await shared.session(who)
    landed(await flow(shared, user=person(), session=session["token"]))
    assert {name for name, text in (await everything(shared)).items() if who in text} >= {
        *("connections", "sessions", "flows", "audit_records", "idempotent_answers", "revocations")
    }
    quoted = who.replace("/", "%2F").replace("?", "%3F").replace("ë", "%C3%AB")
    answer = await shared.call("DELETE", f"/v1/subjects/{quoted}")
    assert (answer.status_code, answer.json()["total"], answer.json()["callers"]) == (202, 3, [])
    assert (await shared.token(made["id"])).status_code == 404
    job = answer.json()["id"]
    assert (await shared.call("DELETE", f"/v1/subjects/{quoted}")).json()["id"] == job, "it runs already"
    for _ in range(3):
        await shared.parts.revocations.advance()
    assert (await shared.call("GET", f"/v1/revocations/{job}")).json()["state"] == "running", "others may still write"
    await rewritten(shared, Revocation, job, created_at=0.0)
    done = await through(shared, job)
    assert (done["state"], done["selector"], sum(done["counts"].values())) == ("done", {}, 3)
    assert (await shared.whoami(token)).status_code == 401
    assert [name for name, text in (await everything(shared)).items() if who in text] == []
    assert [row.owner for row in await rows(shared, SealedSecret) if made["id"] in row.owner] == []
    assert (await shared.parts.audit.verify()).ok


async def test_an_erasure_leaves_other_people_alone_and_names_callers_that_grant_it(shared: Rig) -> None:
    who = subject()
    mine, other = await imported(shared, who), await imported(shared, f"{who}0")
    await shared.caller(grant("read", subjects=[who]))
    answer = (await shared.call("DELETE", f"/v1/subjects/{who}?revoke=false")).json()
    assert len(answer["callers"]) == 1
    await rewritten(shared, Revocation, answer["id"], created_at=0.0)
    assert (await through(shared, answer["id"]))["counts"] == {"skipped": 1}
    assert await row(shared, mine["id"]) is None
    assert (await shared.call("GET", f"/v1/connections/{other['id']}")).json()["subject"] == f"{who}0"


async def test_a_second_erasure_takes_what_came_since_into_the_job_that_runs(shared: Rig) -> None:
    who = subject()
    first = await connected(shared, who, person())
    await down(shared, first["id"])
    job = (await shared.call("DELETE", f"/v1/subjects/{who}?revoke=false")).json()["id"]
    second = await connected(shared, who, person())
    token = (await shared.token(second["id"])).json()["access_token"]
    await shared.session(who)
    await time_passes(shared, job)
    as_looked_at = await shared.parts.revocations.get(job)
    again = (await shared.call("DELETE", f"/v1/subjects/{who}")).json()
    assert (again["id"], again["total"]) == (job, 2)
    assert (await shared.token(second["id"])).status_code == 404
    assert who not in (await everything(shared))["sessions"]
    await shared.parts.revocations.work_on(as_looked_at)
    shown = (await shared.call("GET", f"/v1/revocations/{job}")).json()
    assert shown["state"] == "running", "it settles anew, for a worker too that had looked before"
    await time_passes(shared, job)
    done = await through(shared, job)
    assert {one["connection_id"]: one["result"] for one in done["results"]} == {
        first["id"]: "skipped",
        second["id"]: "revoked",
    }
    assert (await shared.whoami(token)).status_code == 401
    assert [name for name, text in (await everything(shared)).items() if f"'{who}'" in text] == []
