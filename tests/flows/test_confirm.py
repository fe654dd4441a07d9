"""The confirm: who consented is who is logged in, or nothing is ever handed out."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.cli.running import OPERATOR
from broker.database import now
from broker.demo.sandbox import Fault
from broker.models import Connection, Flow, SealedSecret
from broker.oauth.confirm import Confirm, Confirmations, Newcomer, keeps_refresh_token
from providers.spec import Secret
from tests.flows.rig import APP, Rig, eventually, landed
from tests.flows.shared import (
    audited,
    bearer,
    browser_of,
    connected,
    flow,
    is_error,
    opened_rig,
    person,
    rewritten,
    row,
    rows,
    stored,
    subject,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


def code_of(answer: httpx2.Response) -> tuple[int, str]:
    """Return the status and the problem's code."""
    return answer.status_code, answer.json().get("code", "")


async def nothing_is_handed_out(rig: Rig, connection_id: str, *owners: str) -> None:
    """Assert that no route and no role yields a token of a pending connection."""
    assert code_of(await rig.token(connection_id)) == (409, "confirmation_required")
    assert code_of(await rig.token(connection_id, force_refresh=True)) == (409, "confirmation_required")
    for owner in owners:
        found = await rig.call("POST", "/v1/token", {"integration": "sandbox", "subject": owner})
        assert found.status_code in {404, 409}, found.text
        assert found.status_code == 404 or found.json().get("connection_id") != connection_id
    shown = await rig.call("GET", f"/v1/connections/{connection_id}")
    assert shown.json()["status"] == "pending"


async def secrets_of(rig: Rig, connection_id: str) -> int:
    """Return how many versions of a connection's secret the store holds."""
    return sum(found.owner == f"connections/{connection_id}" for found in await rows(rig, SealedSecret))


# C0


async def test_c0_a_start_link_that_a_victim_completes_yields_nothing_to_any_role(shared: Rig) -> None:
    attacker, victim = subject(), subject()
    session = await shared.session(attacker, return_to=APP)
    came = landed(await flow(shared, user=person(), session=session["token"]))
    service = await shared.caller({"integrations": ["*"], "may": ["token", "read", "proxy", "events", "manage"]})
    await nothing_is_handed_out(shared, came["connection_id"], attacker, victim)
    answer = await shared.call("POST", f"/v1/connections/{came['connection_id']}/token", {}, key=service)
    assert answer.status_code in {403, 404, 409}, answer.text
    assert "access_token" not in answer.text


async def test_c0_the_victims_app_confirms_with_its_own_user_and_the_flow_burns(shared: Rig) -> None:
    attacker, victim = subject(), subject()
    session = await shared.session(attacker, return_to=APP)
    came = landed(await flow(shared, user=person(), session=session["token"]))
    assert code_of(await shared.confirm(came, victim)) == (409, "subject_mismatch")
    assert code_of(await shared.confirm(came, attacker)) == (409, "confirm_invalid")
    assert (await shared.call("GET", f"/v1/connections/{came['connection_id']}")).status_code == 404
    assert (await shared.token(came["connection_id"])).status_code == 404
    assert await secrets_of(shared, came["connection_id"]) == 0
    assert (await audited(shared, "connection.discarded", came["connection_id"]))[0].detail[
        "reason"
    ] == "subject_mismatch"


@pytest.mark.parametrize(
    "expected", [f"{APP}?n=victim", f"{APP}?n=attacker ", f"{APP}?n=attackeR", f"{APP}?n=attacker&", APP, ""]
)
async def test_c0_a_forwarded_final_url_burns_because_the_victims_app_expects_its_own_users_return_to(
    shared: Rig, expected: str
) -> None:
    came = landed(await flow(shared, user=person(), return_to=f"{APP}?n=attacker"))
    assert code_of(await shared.confirm(came, subject(), return_to=expected)) == (409, "subject_mismatch")
    right = await shared.confirm(came, subject(), return_to=f"{APP}?n=attacker")
    assert code_of(right) == (409, "confirm_invalid")
    assert await secrets_of(shared, came["connection_id"]) == 0


async def test_c0_a_flow_with_neither_session_nor_return_to_is_confirmed_by_no_caller(shared: Rig) -> None:
    browser = browser_of(shared)
    page = await flow(shared, browser, user=person(), return_to=None)
    found = re.search(r"confirm (con_\w+) .*?--code (\S+)", page.text, re.DOTALL)
    assert found is not None
    came = {"connection_id": found[1], "confirm": found[2]}
    for _ in range(2):  # nothing was changed
        assert code_of(await shared.confirm(came, subject())) == (400, "invalid_request")
    await nothing_is_handed_out(shared, came["connection_id"])
    wanted = Confirm(found[1], found[2], subject(), None)
    confirmed = await shared.parts.confirmations.confirm(wanted, OPERATOR, without_return_to=True)
    assert (confirmed.id, confirmed.status) == (found[1], "active")


async def test_a_burnt_flow_names_the_caller_who_tried(shared: Rig) -> None:
    came = landed(await flow(shared, user=person()))
    assert code_of(await shared.confirm(came, subject(), return_to=f"{APP}?x")) == (409, "subject_mismatch")
    (record,) = await audited(shared, "connection.discarded", came["connection_id"])
    assert record.actor.startswith("clr_")


async def test_c0_an_active_connection_of_the_victims_account_lives_through_a_burnt_flow(shared: Rig) -> None:
    victim, account = subject(), person()
    connection = await connected(shared, victim, account)
    token = await bearer(shared, connection["id"])
    session = await shared.session(subject(), return_to=APP)
    came = landed(await flow(shared, user=account, session=session["token"]))
    assert code_of(await shared.confirm(came, victim)) == (409, "subject_mismatch")
    assert await bearer(shared, connection["id"]) == token
    assert (await shared.whoami(token)).status_code == 200
    (disposed,) = await audited(shared, "connection.disposed", came["connection_id"])
    assert disposed.detail["revocation"] == "skipped_shared_grant"


# Grant, code, subject: in this order


async def test_a_wrong_code_changes_nothing_and_does_not_burn(shared: Rig) -> None:
    owner = subject()
    came = landed(await flow(shared, user=person()))
    good = came["confirm"]
    for spoilt in ("x", good[:-1], good + "A", good.swapcase(), "é" * 43, good.replace(good[0], "_", 1) + "."):
        for fields in ({"return_to": APP}, {"return_to": "http://evil.test"}, {}):
            answer = await shared.confirm({**came, "confirm": spoilt}, owner, **fields)
            assert code_of(answer) == (409, "confirm_invalid")
    other = landed(await flow(shared, user=person()))
    assert code_of(await shared.confirm({**came, "confirm": other["confirm"]}, owner, return_to=APP)) == (
        409,
        "confirm_invalid",
    )
    assert (await shared.confirm(came, owner, return_to=APP)).status_code == 200


async def test_a_right_code_without_return_to_is_a_400_and_changes_nothing(shared: Rig) -> None:
    came = landed(await flow(shared, user=person()))
    assert code_of(await shared.confirm(came, subject())) == (400, "invalid_request")
    await nothing_is_handed_out(shared, came["connection_id"])
    assert (await shared.confirm(came, subject(), return_to=APP)).status_code == 200


async def test_a_caller_outside_its_grants_learns_nothing_and_cannot_burn(shared: Rig) -> None:
    came = landed(await flow(shared, user=person()))
    inside = await shared.caller({"integrations": ["sandbox"], "may": ["connect"], "subjects": ["acme:*"]})
    outside = await shared.caller({"integrations": ["other"], "may": ["connect"]})
    reader = await shared.caller({"integrations": ["sandbox"], "may": ["read"]})
    body = {"code": came["confirm"], "subject": subject(), "return_to": "http://wrong.test"}
    path = f"/v1/connections/{came['connection_id']}/confirm"
    absent = await shared.call("POST", "/v1/connections/con_" + "a" * 26 + "/confirm", body, key=outside)
    refused = await shared.call("POST", path, body, key=outside)
    assert code_of(refused) == code_of(absent) == (404, "not_found")
    assert refused.json()["detail"] == absent.json()["detail"]
    assert code_of(await shared.call("POST", path, body, key=reader)) == (403, "forbidden")
    assert code_of(await shared.call("POST", path, {**body, "subject": "evil:1"}, key=inside)) == (404, "not_found")
    good = await shared.call("POST", path, {**body, "return_to": APP}, key=inside)
    assert good.status_code == 200, good.text


async def test_a_code_is_valid_for_120_seconds(shared: Rig) -> None:
    came = landed(await flow(shared, user=person()))
    (found,) = [one for one in await rows(shared, Flow) if one.connection_id == came["connection_id"]]
    assert found.confirm_until is not None
    assert found.consumed_at is not None
    assert 119 < found.confirm_until - found.consumed_at < 135
    await rewritten(shared, Flow, found.id, confirm_until=found.consumed_at - 1)
    assert code_of(await shared.confirm(came, subject(), return_to=APP)) == (409, "confirm_invalid")


async def test_a_confirm_of_what_was_imported_or_never_was_is_refused(shared: Rig) -> None:
    body = {"integration": "sandbox", "subject": subject(), "credentials": {"type": "oauth2", "access_token": "x" * 20}}
    imported = await shared.call("POST", "/v1/connections", body)
    assert imported.status_code == 201, imported.text
    came = {"connection_id": imported.json()["id"], "confirm": "x"}
    assert code_of(await shared.confirm(came, subject())) == (409, "confirm_invalid")
    assert code_of(await shared.confirm({**came, "connection_id": "con_" + "z" * 26}, subject())) == (404, "not_found")


async def test_a_pending_connection_that_was_deleted_cannot_be_confirmed(shared: Rig) -> None:
    came = landed(await flow(shared, user=person()))
    gone = await shared.call("DELETE", f"/v1/connections/{came['connection_id']}")
    assert gone.json()["revocation"] == "revoked"
    answer = await shared.confirm(came, subject(), return_to=APP)
    assert answer.status_code in {404, 409}, answer.text


# Repeats and races


async def test_fifty_equal_confirms_of_one_caller_all_get_the_same_connection(shared: Rig) -> None:
    owner = subject()
    came = landed(await flow(shared, user=person()))
    answers = await asyncio.gather(*(shared.confirm(came, owner, return_to=APP) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(await audited(shared, "connection.confirmed", came["connection_id"])) == 1


async def test_fifty_equal_confirms_that_merge_all_get_the_survivor(shared: Rig) -> None:
    owner, account = subject(), person()
    old = await connected(shared, owner, account)
    came = landed(await flow(shared, user=account))
    answers = await asyncio.gather(*(shared.confirm(came, owner, return_to=APP) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["id"] for answer in answers} == {old["id"]}
    assert code_of(await shared.call("GET", f"/v1/connections/{came['connection_id']}")) == (404, "not_found")
    again = await shared.confirm(came, owner, return_to=APP)
    assert (again.status_code, again.json()["id"]) == (200, old["id"])


async def test_of_two_callers_one_wins_and_the_other_is_refused(shared: Rig) -> None:
    owner = subject()
    came = landed(await flow(shared, user=person()))
    body = {"code": came["confirm"], "subject": owner, "return_to": APP}
    path = f"/v1/connections/{came['connection_id']}/confirm"
    keys = [await shared.caller({"integrations": ["*"], "may": ["connect"]}) for _ in range(2)]
    answers = await asyncio.gather(*(shared.call("POST", path, body, key=keys[n % 2]) for n in range(20)))
    by_caller = [{code_of(answer) for answer in answers[n::2]} for n in range(2)]
    assert sorted(by_caller, key=repr) == [{(200, "")}, {(409, "confirm_invalid")}]


async def test_a_repeat_with_another_body_or_after_120_seconds_is_refused(shared: Rig) -> None:
    owner = subject()
    came = landed(await flow(shared, user=person()))
    assert (await shared.confirm(came, owner, return_to=APP)).status_code == 200
    assert code_of(await shared.confirm(came, subject(), return_to=APP)) == (409, "confirm_invalid")
    assert code_of(await shared.confirm({**came, "confirm": "x"}, owner, return_to=APP)) == (409, "confirm_invalid")
    (found,) = [one for one in await rows(shared, Flow) if one.connection_id == came["connection_id"]]
    await rewritten(shared, Flow, found.id, confirmed_at=1.0)
    assert code_of(await shared.confirm(came, owner, return_to=APP)) == (409, "confirm_invalid")
    assert (await shared.token(came["connection_id"])).status_code == 200


async def test_a_repeat_does_not_bring_back_a_connection_that_was_deleted_since(shared: Rig) -> None:
    owner = subject()
    came = landed(await flow(shared, user=person()))
    assert (await shared.confirm(came, owner, return_to=APP)).status_code == 200
    await shared.call("DELETE", f"/v1/connections/{came['connection_id']}")
    assert code_of(await shared.confirm(came, owner, return_to=APP)) == (404, "not_found")


async def test_races_end_the_same_way_on_postgresql(tmp_path: Path, postgres_url: str) -> None:
    async with opened_rig(tmp_path, database_url=postgres_url) as rig:
        for _ in range(2):  # makes a connection, then merges into it
            browser = browser_of(rig)
            url = await rig.consent(await rig.begin(browser), user="ada")
            callbacks = await asyncio.gather(*(browser.get(url) for _ in range(20)))
            assert len({answer.headers["location"] for answer in callbacks}) == 1
            came = landed(callbacks[0])
            answers = await asyncio.gather(*(rig.confirm(came, return_to=APP) for _ in range(20)))
            assert {answer.status_code for answer in answers} == {200}
            assert len({answer.json()["id"] for answer in answers}) == 1
        assert rig.sandbox.state.counters.exchanges == 2
        assert [one.status for one in await rows(rig, Connection)] == ["active"]


async def test_two_flows_of_one_account_confirmed_at_once_end_in_one_connection(shared: Rig) -> None:
    owner, account = subject(), person()
    flows = [landed(await flow(shared, user=account)) for _ in range(4)]
    answers = await asyncio.gather(*(shared.confirm(came, owner, return_to=APP) for came in flows))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    found = [one for one in await rows(shared, Connection) if one.subject == owner]
    assert [one.status for one in found] == ["active"]
    assert (await shared.whoami(await bearer(shared, found[0].id))).status_code == 200


async def test_a_confirm_and_the_sweeper_do_not_both_win(shared: Rig) -> None:
    for _ in range(4):
        came = landed(await flow(shared, user=person()))
        confirm = asyncio.create_task(shared.confirm(came, subject(), return_to=APP))
        await rewritten(shared, Connection, came["connection_id"], pending_until=1.0)
        await asyncio.gather(*(shared.parts.confirmations.sweep() for _ in range(3)))
        answer, found = await confirm, await row(shared, came["connection_id"])
        if answer.status_code == 200:
            assert found is not None
            assert found.status == "active"
            assert (await shared.token(found.id)).status_code == 200
        else:
            assert code_of(answer) == (409, "confirm_invalid")
            assert found is None
            assert await secrets_of(shared, came["connection_id"]) == 0


# After confirm_seconds


async def swept(tmp_path: Path, kills: str, other_owner: str | None) -> dict[str, Any]:
    """Leave a flow unconfirmed for `confirm_seconds`; return what became of everything."""
    async with opened_rig(tmp_path, worker=True) as rig:
        rig.sandbox.state.configure(revocation_kills=kills)
        await rig.call("PATCH", "/v1/integrations/sandbox", {"config": {"confirm_seconds": 1}})
        active = await connected(rig, other_owner, "ada") if other_owner else None
        token = await bearer(rig, active["id"]) if active else None
        came = landed(await flow(rig, user="ada"))
        pending = came["connection_id"]
        _, value = await rig.parts.vault.get(f"connections/{pending}")

        async def disposed() -> Any:
            return await audited(rig, "connection.disposed", pending)

        (record,) = await eventually(disposed)
        assert await secrets_of(rig, pending) == 0
        assert await row(rig, pending) is None
        assert (await rig.call("GET", f"/v1/connections/{pending}")).status_code == 404
        assert code_of(await rig.confirm(came, return_to=APP)) == (409, "confirm_invalid")
        return {
            "revocation": record.detail["revocation"],
            "pending_token": (await rig.whoami(value["access_token"])).status_code,
            "active_token": (await rig.whoami(token)).status_code if token else None,
            "handed_out": (await rig.token(active["id"])).status_code if active else None,
        }


async def test_an_unconfirmed_flow_is_revoked_and_its_secret_destroyed(tmp_path: Path) -> None:
    assert await swept(tmp_path, "grant", None) == {
        "revocation": "revoked",
        "pending_token": 401,
        "active_token": None,
        "handed_out": None,
    }


async def test_an_unconfirmed_flow_is_not_revoked_where_an_active_connection_would_die_with_it(tmp_path: Path) -> None:
    assert await swept(tmp_path, "user", "acme:42") == {
        "revocation": "skipped_shared_grant",
        "pending_token": 200,
        "active_token": 200,
        "handed_out": 200,
    }


async def test_a_provider_that_is_down_does_not_keep_the_secret_alive(shared: Rig) -> None:
    came = landed(await flow(shared, user=person()))
    await rewritten(shared, Connection, came["connection_id"], pending_until=1.0)
    shared.sandbox.state.add_fault("drop_request", endpoint="revoke")
    assert await shared.parts.confirmations.sweep() == 1
    assert await secrets_of(shared, came["connection_id"]) == 0
    (record,) = await audited(shared, "connection.disposed", came["connection_id"])
    assert record.detail["revocation"] == "failed"
    assert await shared.parts.confirmations.sweep() == 0


# Merge and reconnect


async def test_the_same_account_again_updates_and_another_account_is_another_connection(shared: Rig) -> None:
    owner, account = subject(), person()
    first = await connected(shared, owner, account)
    old_token = await bearer(shared, first["id"])
    again = await connected(shared, owner, account)
    other = await connected(shared, owner, person())
    assert again["id"] == first["id"] != other["id"]
    new_token = await bearer(shared, first["id"])
    assert new_token != old_token
    assert (await shared.whoami(new_token)).json()["account"]["id"] == f"user-{account}"
    assert (await connected(shared, subject(), account))["id"] != first["id"]


@pytest.mark.parametrize(
    ("old", "kept"),
    [
        ({}, True),
        ({"status": "frozen"}, True),
        ({"status": "reauthorization_required"}, False),
        ({"status": "revoked"}, False),
        ({"refreshable": False}, False),
        ({"account_id": None}, False),
        ({"account_id": "eve"}, False),
        ({"client_id": "another"}, False),
        ({"pins": {"token": "https://evil.test", "revoke": "https://id.test"}}, False),
        ({"pins": {"token": "https://id.test", "revoke": "https://evil.test"}}, False),
        ({"pins": {"token": "https://id.test"}}, False),
        ({"pins": {"token": "https://id.test", "revoke": "https://id.test", "refresh": "https://evil.test"}}, False),
        ({"pins": {"token": "https://id.test", "revoke": "https://id.test", "refresh": "https://id.test"}}, True),
        ({"pins": {"token": "https://id.test", "revoke": "https://id.test", "api:": "https://evil.test"}}, False),
        ({"pins": {"token": "https://id.test", "revoke": "https://id.test", "api:old": "https://old.test"}}, True),
    ],
)
async def test_an_old_refresh_token_is_kept_only_where_it_is_the_same_grant_and_goes_to_the_same_places(
    old: dict[str, Any], *, kept: bool
) -> None:
    pins = {"token": "https://id.test", "revoke": "https://id.test"}
    made = {"status": "active", "refreshable": True, "account_id": "ada", "client_id": "app", "pins": pins, **old}
    existing = Connection(id="con_x", integration="i", provider="p", created_at=0.0, **made)
    newcomer = Newcomer("ada", "app", {**pins, "api:": "https://api.test"})
    assert keeps_refresh_token(existing, newcomer) is kept


async def test_a_merge_that_was_cut_off_may_be_tried_again_after_a_minute(shared: Rig) -> None:
    owner, account = subject(), person()
    old = await connected(shared, owner, account)
    came = landed(await flow(shared, user=account))
    (found,) = [one for one in await rows(shared, Flow) if one.connection_id == came["connection_id"]]
    at = await shared.parts.database.read(now)
    await rewritten(shared, Flow, found.id, confirm_claimed_at=at)
    assert code_of(await shared.confirm(came, owner, return_to=APP)) == (409, "confirm_invalid")
    await rewritten(shared, Connection, came["connection_id"], pending_until=1.0)
    await shared.parts.confirmations.sweep()
    assert await row(shared, came["connection_id"]) is not None
    await rewritten(shared, Connection, came["connection_id"], pending_until=at + 100)
    await rewritten(shared, Flow, found.id, confirm_claimed_at=at - 61)
    assert (await shared.confirm(came, owner, return_to=APP)).json()["id"] == old["id"]


async def test_a_merge_whose_secret_is_gone_leaves_the_old_connection_and_gives_its_claim_back(shared: Rig) -> None:
    owner, account = subject(), person()
    old = await connected(shared, owner, account)
    token = await bearer(shared, old["id"])
    came = landed(await flow(shared, user=account))
    await shared.parts.vault.destroy(f"connections/{came['connection_id']}")
    assert code_of(await shared.confirm(came, owner, return_to=APP)) == (409, "confirm_invalid")
    assert await bearer(shared, old["id"]) == token
    (found,) = [one for one in await rows(shared, Flow) if one.connection_id == came["connection_id"]]
    assert found.confirm_claimed_at is None
    assert found.confirmed_at is None


@pytest.mark.parametrize("theirs", [{"subject": "somebody else"}, {"account_id": "another account"}])
async def test_a_reconnect_never_writes_into_a_connection_that_is_not_the_one_it_was_made_for(
    shared: Rig, theirs: dict[str, str]
) -> None:
    owner, account = subject(), person()
    connection = await connected(shared, owner, account)
    token = await bearer(shared, connection["id"])
    came = landed(await reconnect(shared, connection["id"], account))
    await rewritten(shared, Connection, connection["id"], **theirs)
    assert code_of(await shared.confirm(came, owner)) == (409, "conflict")
    assert await bearer(shared, connection["id"]) == token


async def test_a_merge_without_a_refresh_token_keeps_the_old_one(shared: Rig) -> None:
    owner, account = subject(), person()
    first = await connected(shared, owner, account)
    _, before = await shared.parts.vault.get(f"connections/{first['id']}")
    shared.sandbox.state.configure(refresh_tokens="never")
    try:
        assert (await connected(shared, owner, account))["id"] == first["id"]
    finally:
        shared.sandbox.state.configure(refresh_tokens="always")
    _, after = await shared.parts.vault.get(f"connections/{first['id']}")
    assert after["refresh_token"] == before["refresh_token"]
    assert after["access_token"] != before["access_token"]
    refreshed = await shared.token(first["id"], force_refresh=True)
    assert (await shared.whoami(refreshed.json()["access_token"])).status_code == 200


async def test_an_old_refresh_token_of_an_unknown_account_or_another_client_is_not_kept(shared: Rig) -> None:
    account = person()
    planted = {"type": "oauth2", "access_token": "old-access", "refresh_token": "old-refresh"}
    for fields in ({}, {"account": {"id": f"user-{account}"}}):
        owner = subject()
        body = {"integration": "sandbox", "subject": owner, "credentials": planted, **fields}
        imported = (await shared.call("POST", "/v1/connections", body)).json()
        if fields:
            await rewritten(shared, Connection, imported["id"], client_id="another")
        made = await shared.call("POST", f"/v1/connections/{imported['id']}/reconnect", {"return_to": APP})
        shared.sandbox.state.configure(refresh_tokens="never")
        try:
            came = landed(await flow(shared, user=account, session=made.json()["token"]))
        finally:
            shared.sandbox.state.configure(refresh_tokens="always")
        assert (await shared.confirm(came, owner)).json()["id"] == imported["id"]
        _, value = await shared.parts.vault.get(f"connections/{imported['id']}")
        assert "refresh_token" not in value
        assert code_of(await shared.token(imported["id"], force_refresh=True)) == (409, "not_refreshable")


async def reconnect(rig: Rig, connection_id: str, user: str) -> httpx2.Response:
    """Run a reconnect's flow as `user`; return the broker's answer to the callback."""
    made = await rig.call("POST", f"/v1/connections/{connection_id}/reconnect", {"return_to": APP})
    assert made.status_code == 201, made.text
    return await flow(rig, user=user, session=made.json()["token"])


async def test_a_reconnect_with_another_account_is_refused_and_the_old_one_untouched(shared: Rig) -> None:
    owner, account = subject(), person()
    connection = await connected(shared, owner, account)
    token, before = await bearer(shared, connection["id"]), await stored(shared)
    assert is_error(await reconnect(shared, connection["id"], person()), "account_mismatch")
    assert await stored(shared) == before
    assert await bearer(shared, connection["id"]) == token
    assert (await shared.whoami(token)).json()["account"]["id"] == f"user-{account}"


async def test_a_reconnect_is_no_way_around_the_confirm_of_a_pending_connection(shared: Rig) -> None:
    owner, account = subject(), person()
    session = await shared.session(owner, return_to=APP)
    came = landed(await flow(shared, user=account, session=session["token"]))
    made = await shared.call("POST", f"/v1/connections/{came['connection_id']}/reconnect", {"return_to": APP})
    if made.status_code == 201:
        assert is_error(await flow(shared, user=account, session=made.json()["token"]), "session_expired")
    else:
        assert made.status_code in {400, 409}, made.text
    await nothing_is_handed_out(shared, came["connection_id"], owner)


async def test_a_reconnect_makes_a_dead_connection_active_again(shared: Rig) -> None:
    owner, account = subject(), person()
    connection = await connected(shared, owner, account)
    shared.sandbox.state.kill_account(account)
    assert code_of(await shared.token(connection["id"], force_refresh=True))[1] == "reauthorization_required"
    came = landed(await reconnect(shared, connection["id"], account))
    answer = await shared.confirm(came, owner)
    assert (answer.json()["id"], answer.json()["status"]) == (connection["id"], "active")
    assert (await shared.whoami(await bearer(shared, connection["id"]))).status_code == 200
    shared.sandbox.state.add_fault(Fault(kind="answer", status=400, body={"error": "invalid_grant"}))
    again = await shared.token(connection["id"], force_refresh=True)
    assert again.status_code == 200, "one refusal of the new grant is not believed either"


async def test_a_flow_does_not_replace_a_key_of_the_same_account(shared: Rig) -> None:
    owner, account = subject(), person()
    connection = await connected(shared, owner, account)
    await rewritten(shared, Connection, connection["id"], credential_type="api_key")
    token, before = await bearer(shared, connection["id"]), await secrets_of(shared, connection["id"])
    came = landed(await flow(shared, user=account))
    answer = await shared.confirm(came, owner, return_to=APP)
    assert code_of(answer) == (409, "conflict")
    assert "delete that first" in answer.json()["detail"]
    assert (await bearer(shared, connection["id"]), await secrets_of(shared, connection["id"])) == (token, before)
    assert (await shared.call("DELETE", f"/v1/connections/{connection['id']}")).status_code == 200
    assert (await shared.confirm(came, owner, return_to=APP)).status_code == 200


async def test_a_reconnect_needs_the_confirm_of_its_own_subject(shared: Rig) -> None:
    owner, account = subject(), person()
    connection = await connected(shared, owner, account)
    token = await bearer(shared, connection["id"])
    came = landed(await reconnect(shared, connection["id"], account))
    assert await bearer(shared, connection["id"]) == token
    assert code_of(await shared.confirm(came, subject())) == (409, "subject_mismatch")
    assert await bearer(shared, connection["id"]) == token


async def test_a_reconnect_does_not_bring_old_tags_back(shared: Rig) -> None:
    owner, account = subject(), person()
    session = await shared.session(owner, return_to=APP, tags={"team": "blue"})
    came = landed(await flow(shared, user=account, session=session["token"]))
    connection = (await shared.confirm(came, owner)).json()
    came = landed(await reconnect(shared, connection["id"], account))
    await shared.call("PATCH", f"/v1/connections/{connection['id']}", {"tags": {"team": "red"}})
    assert (await shared.confirm(came, owner)).json()["tags"] == {"team": "red"}


async def test_a_reconnect_of_a_connection_that_is_gone_meanwhile_is_refused(shared: Rig) -> None:
    owner, account = subject(), person()
    connection = await connected(shared, owner, account)
    made = await shared.call("POST", f"/v1/connections/{connection['id']}/reconnect", {"return_to": APP})
    came = landed(await reconnect(shared, connection["id"], account))
    await shared.call("DELETE", f"/v1/connections/{connection['id']}?revoke=false")
    answer = await shared.confirm(came, owner)
    assert code_of(answer) == (409, "conflict")
    assert is_error(await flow(shared, user=account, session=made.json()["token"]), "session_expired")


async def test_a_connection_without_a_known_account_cannot_become_one_that_is_connected_already(shared: Rig) -> None:
    owner, account = subject(), person()
    token = await bearer(shared, (await connected(shared, owner, account))["id"])
    body = {"integration": "sandbox", "subject": owner, "credentials": {"type": "oauth2", "access_token": "imported"}}
    imported = (await shared.call("POST", "/v1/connections", body)).json()
    assert is_error(await reconnect(shared, imported["id"], account), "account_mismatch")
    early = landed(await reconnect(shared, imported["id"], other := person()))
    late = await connected(shared, owner, other)
    before = await secrets_of(shared, imported["id"])
    for _ in range(4):  # every write to the vault would push out an older version
        assert code_of(await shared.confirm(early, owner)) == (409, "conflict")
    assert await secrets_of(shared, imported["id"]) == before
    assert await bearer(shared, imported["id"]) == "imported"
    assert (await shared.whoami(await bearer(shared, late["id"]))).status_code == 200
    assert (await shared.whoami(token)).status_code == 200


async def test_a_frozen_connection_stays_frozen_whoever_connects_again(shared: Rig) -> None:
    owner, account = subject(), person()
    connection = await connected(shared, owner, account)
    await rewritten(shared, Connection, connection["id"], status="frozen", status_reason="incident 7")
    again = await connected(shared, owner, account)
    assert (again["id"], again["status"], again["status_reason"]) == (connection["id"], "frozen", "incident 7")
    assert code_of(await shared.token(connection["id"])) == (409, "connection_frozen")


async def test_a_merge_does_not_move_a_secret_of_which_the_caller_may_not_write(shared: Rig) -> None:
    owner, account = subject(), person()
    session = await shared.session(owner, return_to=APP, tags={"team": "red"})
    came = landed(await flow(shared, user=account, session=session["token"]))
    theirs = (await shared.confirm(came, owner)).json()
    token = await bearer(shared, theirs["id"])
    blue = await shared.caller({"integrations": ["*"], "may": ["connect", "token", "read"], "tags": {"team": "blue"}})
    minted = await shared.call("POST", "/v1/sessions", _session(owner, "blue"), key=blue)
    came = landed(await flow(shared, user=account, session=minted.json()["token"]))
    path, body = f"/v1/connections/{came['connection_id']}/confirm", {"code": came["confirm"], "subject": owner}
    answer = await shared.call("POST", path, body, key=blue)
    assert answer.status_code in {403, 404}, answer.text
    shown = (await shared.call("GET", f"/v1/connections/{theirs['id']}")).json()
    assert shown["tags"] == {"team": "red"}
    assert await bearer(shared, theirs["id"]) == token
    assert (await shared.call("POST", f"/v1/connections/{theirs['id']}/token", {}, key=blue)).status_code == 404


def _session(owner: str, team: str) -> dict[str, Any]:
    return {"subject": owner, "return_to": APP, "tags": {"team": team}}


# Where an integration gives up the confirm for flows with a session


async def at_once(rig: Rig) -> str:
    """Configure an integration whose session-bound flows need no confirm; return its name."""
    name = "atonce"
    if not any(one["name"] == name for one in (await rig.call("GET", "/v1/integrations")).json()["data"]):
        await rig.integration(name, config={"confirm": "without_session"})
        rig.sandbox.state.add_client("at-once", [], [f"{rig.base}/oauth/{name}/callback"], auth_methods=["none"])
        changes = {"client_id": "at-once", "config": {"client_auth": "none"}}
        assert (await rig.call("PATCH", f"/v1/integrations/{name}", changes)).status_code == 200
    return name


async def test_without_session_only_an_admin_may_give_up_the_confirm(shared: Rig) -> None:
    operator = await shared.caller(roles=("operator",))
    change = {"config": {"confirm": "without_session"}}
    assert code_of(await shared.call("PATCH", "/v1/integrations/sandbox", change, key=operator)) == (403, "forbidden")


async def test_without_session_a_session_bound_flow_is_active_at_once_and_others_are_not(shared: Rig) -> None:
    name, owner, account = await at_once(shared), subject(), person()
    session = await shared.session(owner, integrations=[name], return_to=APP)
    came = landed(await flow(shared, user=account, integration=name, session=session["token"]))
    assert "confirm" not in came
    assert (await shared.token(came["connection_id"])).status_code == 200
    again = landed(await flow(shared, user=account, integration=name, session=await _token(shared, owner, name)))
    assert again["connection_id"] == came["connection_id"]
    bare = landed(await flow(shared, user=account, integration=name))
    assert code_of(await shared.token(bare["connection_id"])) == (409, "confirmation_required")


async def _token(rig: Rig, owner: str, name: str, **fields: Any) -> str:
    return str((await rig.session(owner, integrations=[name], return_to=APP, **fields))["token"])


async def test_without_session_a_merge_that_would_change_tags_still_needs_a_confirm(shared: Rig) -> None:
    name, owner, account = await at_once(shared), subject(), person()
    first = landed(
        await flow(
            shared, user=account, integration=name, session=await _token(shared, owner, name, tags={"team": "red"})
        )
    )
    token = await bearer(shared, first["connection_id"])
    session = await _token(shared, owner, name, tags={"team": "blue"})
    came = landed(await flow(shared, user=account, integration=name, session=session))
    assert came["connection_id"] != first["connection_id"]
    assert code_of(await shared.token(came["connection_id"])) == (409, "confirmation_required")
    assert await bearer(shared, first["connection_id"]) == token
    assert (await shared.confirm(came, owner)).json()["id"] == first["connection_id"]


async def test_without_session_a_flow_whose_minter_lost_the_grant_meanwhile_is_not_active_at_once(shared: Rig) -> None:
    name, browser = await at_once(shared), browser_of(shared)
    grants = [{"integrations": [name], "may": ["connect"]}]
    body = {"name": "app", "roles": ["service"], "grants": grants}
    made = (await shared.call("POST", "/v1/callers", body)).json()
    wanted = {"subject": subject(), "return_to": APP}
    session = (await shared.call("POST", "/v1/sessions", wanted, key=made["key"])).json()
    callback = await shared.consent(await shared.begin(browser, name, session=session["token"]), user=person())
    assert (await shared.call("DELETE", f"/v1/callers/{made['id']}")).status_code == 204
    came = landed(await browser.get(callback))
    await nothing_is_handed_out(shared, came["connection_id"])


async def test_a_browser_that_is_nobody_sees_no_code_of_another(shared: Rig) -> None:
    browser = browser_of(shared)
    came = await flow(shared, browser, user=person())
    stranger = await browser_of(shared).get(f"/oauth/sandbox/callback?state={landed(came)['confirm']}")
    assert stranger.status_code == 400


class SlowVault:
    """A remote vault that takes its time to read, until told."""

    def __init__(self, vault: Any) -> None:
        """Stand before the true one."""
        self.vault, self.reading, self.go_on = vault, asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        """Pass everything else on."""
        return getattr(self.vault, name)

    async def get(self, owner: str, version: int | None = None, *, sealed: bytes | None = None) -> Any:
        """Wait, then read."""
        self.reading.set()
        await self.go_on.wait()
        return await self.vault.get(owner, version, sealed=sealed)


@pytest.mark.parametrize(
    ("meanwhile", "status", "after"),
    [
        ({"tags": {"team": "red"}}, 403, {"tags": {"team": "red"}, "status": "active"}),
        ({"status": "frozen", "status_reason": "incident"}, 200, {"status": "frozen", "status_reason": "incident"}),
        ({"status": "revoked"}, 409, {"status": "revoked"}),
        ({"deleted_at": 1.0}, 409, {"deleted_at": 1.0}),
    ],
)
async def test_a_merge_is_judged_by_what_the_connection_has_become_meanwhile(
    shared: Rig, meanwhile: dict[str, Any], status: int, after: dict[str, Any]
) -> None:
    owner, account = subject(), person()
    key = await shared.caller({"integrations": ["sandbox"], "may": ["connect"], "tags": {"team": "blue"}})

    async def finished() -> dict[str, str]:
        session = await shared.session(owner, return_to=APP, tags={"team": "blue"})
        return landed(await flow(shared, user=account, session=session["token"]))

    existing = (await shared.confirm(await finished(), owner)).json()
    came = await finished()
    parts = shared.parts
    slow = SlowVault(parts.vault)
    confirmations = Confirmations(parts.database, slow, parts.credentials, parts.audit, parts.callers.standing)
    wanted = Confirm(came["connection_id"], came["confirm"], owner, None)
    principal = await parts.callers.identify(Secret(key))
    task = asyncio.create_task(confirmations.confirm(wanted, principal))
    await slow.reading.wait()
    await rewritten(shared, Connection, existing["id"], **meanwhile)
    slow.go_on.set()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    assert getattr(result, "status", 200) in {status, "frozen"}
    found = await row(shared, existing["id"])
    assert {name: getattr(found, name) for name in after} == after
    (left,) = [one for one in await rows(shared, Flow) if one.connection_id == came["connection_id"]]
    assert (left.confirmed_at is not None) == (status == 200)
    assert status == 200 or left.confirm_claimed_at is None  # it may be tried again at once
