"""Idempotency-Key: the second request of the same caller, key and body does nothing and gets the first one's answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from sqlmodel import col, select

from broker.api.requests import Idempotency
from broker.models import IdempotentAnswer, SystemKey
from broker.vault.system_keys import SystemKeys, insert_key
from tests.flows.api_calls import check_problem, import_body, imported, unused
from tests.flows.rig import Rig

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def posted(rig: Rig, path: str, body: Any, key: str, **kwargs: Any) -> Any:
    return await rig.call("POST", path, body, Idempotency_Key=key, **kwargs)


async def aged(rig: Rig, seconds: float) -> None:
    """Make every kept answer that much older."""
    older = sa.update(IdempotentAnswer).values(created_at=IdempotentAnswer.created_at - seconds)
    await rig.parts.database.transaction(lambda session: session.execute(older))


async def listed(rig: Rig, subject: str) -> list[Any]:
    return list((await rig.call("GET", f"/v1/connections?subject={subject}")).json()["data"])


async def test_the_same_request_again_gets_the_same_answer_and_acts_once(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    body = import_body(subject)
    first, second = [await posted(shared, "/v1/connections", body, key) for _ in range(2)]
    assert (first.status_code, first.text) == (second.status_code, second.text) == (201, first.text)
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert second.headers["cache-control"] == "no-store"
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(await listed(shared, subject)) == 1


async def test_another_body_path_or_query_under_the_same_key_is_a_conflict(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    assert (await posted(shared, "/v1/connections", import_body(subject), key)).status_code == 201
    check_problem(await posted(shared, "/v1/connections", import_body(subject), key), 409, "idempotency_conflict")
    check_problem(await posted(shared, "/v1/sessions", {"subject": "a"}, key), 409, "idempotency_conflict")
    assert len(await listed(shared, subject)) == 1


async def test_a_key_belongs_to_its_caller(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    other = await shared.caller({"integrations": ["*"], "may": ["connect", "read"]})
    body = import_body(subject)
    ids = set()
    for caller_key in (shared.admin_key, other):
        answer = await shared.call("POST", "/v1/connections", body, key=caller_key, Idempotency_Key=key)
        ids.add(answer.json()["id"])
    assert len(ids) == 2


async def test_an_answer_that_shows_a_secret_once_is_not_kept(shared: Rig) -> None:
    requests = [
        ("/v1/sessions", {"subject": "a"}, "token"),
        ("/v1/callers", {"name": "x", "roles": ["service"]}, "key"),
        (f"/v1/connections/{(await shared.connected(unused('acme:')))['id']}/reconnect", None, "token"),
    ]
    caller = await shared.call("POST", "/v1/callers", {"name": "y", "roles": ["service"]})
    requests.append((f"/v1/callers/{caller.json()['id']}/keys", None, "key"))
    for path, body, secret in requests:
        key = unused("key")
        first = await posted(shared, path, body, key)
        assert first.status_code == 201, first.text
        problem = check_problem(await posted(shared, path, body, key), 409, "idempotency_conflict")
        assert problem["made_id"] == first.json()["id"]
        kept = await shared.parts.database.read(lambda session: list(session.exec(select(IdempotentAnswer))))
        assert first.json()[secret] not in repr(kept), path


async def test_a_hand_out_is_not_kept_and_may_be_repeated(shared: Rig) -> None:
    connection, key = await imported(shared, unused("acme:")), unused("key")
    answers = [await posted(shared, f"/v1/connections/{connection['id']}/token", None, key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    found = await shared.call(
        "POST", "/v1/token", {"integration": "sandbox", "subject": connection["subject"]}, Idempotency_Key=key
    )
    assert found.status_code == 200, "nothing is left of the key"


async def test_an_error_is_not_kept(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    check_problem(await posted(shared, "/v1/connections", {"subject": 1}, key), 400, "invalid_request")
    check_problem(
        await posted(shared, "/v1/connections", {**import_body(subject), "integration": "absent"}, key),
        404,
        "not_found",
    )
    assert (await posted(shared, "/v1/connections", import_body(subject), key)).status_code == 201


async def test_of_many_at_once_one_acts_and_the_others_wait_their_turn(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    body = import_body(subject)
    answers = await asyncio.gather(*(posted(shared, "/v1/connections", body, key) for _ in range(8)))
    good = [answer for answer in answers if answer.status_code == 201]
    assert good
    assert len({answer.json()["id"] for answer in good}) == 1
    for answer in answers:
        if answer.status_code != 201:
            check_problem(answer, 409, "conflict")
    assert len(await listed(shared, subject)) == 1


async def test_a_key_is_forgotten_after_a_day(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    body = import_body(subject)
    first = await posted(shared, "/v1/connections", body, key)
    await aged(shared, 86_000)
    assert (await posted(shared, "/v1/connections", body, key)).json() == first.json()
    await aged(shared, 500)
    assert (await posted(shared, "/v1/connections", body, key)).json()["id"] != first.json()["id"]


async def test_a_claim_that_a_crash_left_behind_holds_for_three_minutes(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    body = import_body(subject)
    first = await posted(shared, "/v1/connections", body, key)
    cut_off = (
        sa.update(IdempotentAnswer).where(col(IdempotentAnswer.answer) == first.text).values(status=None, answer=None)
    )
    await shared.parts.database.transaction(lambda session: session.execute(cut_off))
    check_problem(await posted(shared, "/v1/connections", body, key), 409, "conflict")
    check_problem(await posted(shared, "/v1/connections", {**body, "subject": "x"}, key), 409, "idempotency_conflict")
    await aged(shared, 200)
    assert (await posted(shared, "/v1/connections", body, key)).status_code == 201


@pytest.mark.parametrize("key", ["", "a" * 256, "two words", "tab\tbed"])
async def test_a_key_that_is_none_is_400(shared: Rig, key: str) -> None:
    check_problem(await posted(shared, "/v1/sessions", {"subject": "a"}, key), 400, "invalid_request")


async def test_two_keys_are_400_and_other_methods_have_none(shared: Rig) -> None:
    auth = ("Authorization", f"Bearer {shared.admin_key}")
    headers = [auth, ("Idempotency-Key", "one-key"), ("Idempotency-Key", "two-key")]
    check_problem(
        await shared.backend.post("/v1/sessions", json={"subject": "a"}, headers=headers), 400, "invalid_request"
    )
    assert (await shared.backend.get("/v1/providers", headers=headers)).status_code == 200


async def test_what_is_stored_tells_nothing_of_the_request(shared: Rig) -> None:
    body = import_body(unused("acme:"))
    body["credentials"]["access_token"] = "CANARY-idempotent"
    assert (await posted(shared, "/v1/connections", body, unused("key"))).status_code == 201
    kept = await shared.parts.database.read(lambda session: list(session.exec(select(IdempotentAnswer))))
    assert "CANARY" not in repr(kept)
    keyed = shared.parts.session_keys.current.id
    assert all(row.request_digest.startswith(f"{keyed}:") for row in kept), "a plain hash of a password can be guessed"


async def session_key(rig: Rig, key_id: str, state: str) -> None:
    """Move a session key to another state, as a rotation does."""
    change = sa.update(SystemKey).where(col(SystemKey.id) == key_id).values(state=state)
    await rig.parts.database.transaction(lambda session: session.execute(change))


async def rotated(rig: Rig) -> str:
    """Rotate the session key in another process, which this one knows nothing of yet; return the old one's id."""
    keys = rig.parts.session_keys
    old, fresh = keys.current.id, keys.new_row("current")
    await session_key(rig, old, "previous")
    await rig.parts.database.transaction(lambda session: insert_key(session, fresh))
    return old


async def test_a_request_is_known_again_after_the_session_key_was_rotated(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    body = import_body(subject)
    first = await posted(shared, "/v1/connections", body, key)
    old = await rotated(shared)
    assert (await posted(shared, "/v1/connections", body, key)).text == first.text
    await shared.parts.session_keys.refresh()
    assert shared.parts.session_keys.current.id != old
    assert (await posted(shared, "/v1/connections", body, key)).text == first.text
    check_problem(await posted(shared, "/v1/connections", {**body, "subject": "x"}, key), 409, "idempotency_conflict")
    assert len(await listed(shared, subject)) == 1


async def test_what_another_process_made_under_a_newer_session_key_is_known(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    body = import_body(subject)
    here = SystemKeys(shared.parts.database, shared.parts.sealer, "session")
    await here.load()
    behind = Idempotency(not_reached, shared.parts.database, here)  # a process that does not know of the rotation yet
    await rotated(shared)
    await shared.parts.session_keys.refresh()
    assert (await posted(shared, "/v1/connections", body, key)).status_code == 201
    (kept,) = await shared.parts.database.read(
        lambda session: list(
            session.exec(select(IdempotentAnswer).order_by(col(IdempotentAnswer.created_at).desc()).limit(1))
        )
    )
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    request = b"\n".join([b"/v1/connections", b"", content])
    assert here.get(kept.request_digest.partition(":")[0]) is None
    assert await behind._is_same(request, kept.request_digest)
    assert not await behind._is_same(request + b" ", kept.request_digest)


async def not_reached(scope: Any, receive: Any, send: Any) -> None:
    """Stand for the routes, which a repeated request does not reach."""
    raise AssertionError


async def test_a_session_key_that_is_gone_is_a_conflict_and_no_second_action(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    body = import_body(subject)
    await posted(shared, "/v1/connections", body, key)
    old = await rotated(shared)
    await session_key(shared, old, "retired")
    await shared.parts.session_keys.refresh()
    check_problem(await posted(shared, "/v1/connections", body, key), 409, "idempotency_conflict")
    assert len(await listed(shared, subject)) == 1


async def sent_and_left(rig: Rig, content: bytes) -> None:
    """Send bytes on a socket of our own and hang up at once."""
    where = urlsplit(rig.base)
    _, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(content)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def request(rig: Rig, body: bytes, key: str, length: int) -> bytes:
    lines = ["POST /v1/connections HTTP/1.1", "Host: broker.test", f"Authorization: Bearer {rig.admin_key}"]
    lines += ["Content-Type: application/json", f"Content-Length: {length}", f"Idempotency-Key: {key}", "", ""]
    return "\r\n".join(lines).encode() + body


async def test_a_client_that_leaves_before_its_answer_finds_it_kept(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    body = json.dumps(import_body(subject)).encode()
    await sent_and_left(shared, request(shared, body, key, len(body)))
    async with asyncio.timeout(5):
        while not await listed(shared, subject):  # noqa: ASYNC110 - what is waited for is far away
            await asyncio.sleep(0.02)
    headers = {
        "Authorization": f"Bearer {shared.admin_key}",
        "Idempotency-Key": key,
        "Content-Type": "application/json",
    }
    async with asyncio.timeout(5):
        while (again := await shared.backend.post("/v1/connections", content=body, headers=headers)).status_code == 409:  # noqa: ASYNC110 - far away
            await asyncio.sleep(0.02)
    assert again.headers["idempotent-replayed"] == "true"
    assert len(await listed(shared, subject)) == 1


async def test_a_client_that_leaves_in_the_middle_of_its_body_did_nothing(shared: Rig) -> None:
    subject, key = unused("acme:"), unused("key")
    body = json.dumps(import_body(subject)).encode()
    await sent_and_left(shared, request(shared, body[:-5], key, len(body)))
    await asyncio.sleep(0.1)
    assert await listed(shared, subject) == []
    kept = await shared.parts.database.read(lambda session: session.exec(select(IdempotentAnswer)).all())
    assert not [row for row in kept if row.status is None]
