"""The main job, end to end: connect an account, keep it sealed, hand out a fresh token."""

from __future__ import annotations

from tests.flows.rig import APP, Rig


async def test_a_user_connects_an_account_and_a_backend_gets_a_token_that_the_api_accepts(rig: Rig) -> None:
    connection = await rig.connected()
    assert connection["status"] == "active"
    assert connection["account"]["name"] == "Ada Lovelace"

    answer = await rig.token(connection["id"])
    assert answer.status_code == 200, answer.text
    token = answer.json()
    assert token["stale"] is False
    assert answer.headers["cache-control"] == "no-store"
    assert "refresh_token" not in token
    me = await rig.whoami(token["access_token"])
    assert me.status_code == 200, me.text


async def test_a_forced_refresh_hands_out_a_new_token_and_the_connection_stays_alive(rig: Rig) -> None:
    connection = await rig.connected()
    before = (await rig.token(connection["id"])).json()
    after = await rig.token(connection["id"], force_refresh=True)
    assert after.status_code == 200, after.text
    assert after.json()["access_token"] != before["access_token"]
    assert (await rig.whoami(after.json()["access_token"])).status_code == 200
    assert rig.sandbox.state.counters.reuse_alarms == 0


async def test_a_session_bound_flow_is_confirmed_with_the_sessions_subject(rig: Rig) -> None:
    session = await rig.session("acme:7", return_to=APP)
    came = await rig.flow(session=session["token"])
    answer = await rig.confirm(came, "acme:7")
    assert answer.status_code == 200, answer.text
    assert answer.json()["subject"] == "acme:7"
