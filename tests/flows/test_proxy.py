"""Proxied calls through HTTP: what goes out, what comes back, who may, and what happens when something breaks in between."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from broker.models import AuditRecord
from broker.proxy.underway import Underway
from tests.flows.rig import Rig, eventually
from tests.flows.upstream import ApiServer, Got, api_server, reply

TOKEN = "CANARY-token-0123456789-abcdef"


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with api_server() as server:
        yield server


async def connect(rig: Rig, api: ApiServer, *, name: str = "acme", config: Any = None, **credentials: Any) -> str:
    """Configure an integration at the API server, and import a credential; return the connection's id."""
    config = {"issuer": rig.sandbox.issuer, "api_base_url": f"{api.base}/base", **(config or {})}
    await rig.integration(name, config=config)
    given = {"type": "oauth2", "access_token": TOKEN, **credentials}
    body = {"integration": name, "subject": "acme:1", "credentials": given}
    made = await rig.call("POST", "/v1/connections", body)
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def proxied(
    rig: Rig, connection: str, path: str = "/things", method: str = "GET", **more: Any
) -> httpx2.Response:
    """Make a proxied call as the admin."""
    headers = {"Authorization": f"Bearer {more.pop('key', None) or rig.admin_key}", **more.pop("headers", {})}
    return await rig.backend.request(method, f"/proxy/{connection}{path}", headers=headers, **more)


async def records(rig: Rig, action: str) -> list[AuditRecord]:
    query = sa.select(AuditRecord).where(sa.column("action") == action).order_by(sa.column("number"))
    return await rig.parts.database.read(lambda session: list(session.scalars(query)))


async def test_a_call_reaches_the_api_with_the_credential_and_without_the_callers(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    answer = await proxied(
        rig,
        connection,
        "/a%2Fb/c?q=a+b%20c&q=",
        headers={"Cookie": "a=b", "X-Forwarded-For": "1.2.3.4", "X-Mine": "yes"},
    )
    assert (answer.status_code, answer.json()) == (200, {"ok": True})
    got = api.last
    assert (got.method, got.target) == ("GET", "/base/a%2Fb/c?q=a+b%20c&q=")
    assert got.field("authorization") == f"Bearer {TOKEN}"
    assert got.field("host") == api.base.removeprefix("http://")
    assert got.field("x-mine") == "yes"
    assert got.field("accept-encoding") == "identity"
    assert {"cookie", "x-forwarded-for"}.isdisjoint(name for name, _ in got.headers)
    assert rig.admin_key not in str(got.headers)
    assert answer.headers["x-broker-attempts"] == "1"
    assert int(answer.headers["x-broker-upstream-ms"]) >= 0
    assert "x-broker-error" not in answer.headers


async def test_the_upstreams_own_request_id_and_date_pass_and_ours_stands_beside_them(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    api.replies(reply(x_request_id="theirs-1", date="Sat, 21 Nov 2026 00:00:00 GMT"))
    answer = await proxied(rig, connection, headers={"X-Request-Id": "mine-12345678"})
    assert answer.headers.get_list("x-request-id") == ["theirs-1"]
    assert answer.headers["x-broker-request-id"] == "mine-12345678"
    assert answer.headers.get_list("date") == ["Sat, 21 Nov 2026 00:00:00 GMT"]


async def test_cookies_cors_and_framing_of_the_upstream_do_not_pass(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    api.replies(
        reply(set_cookie="sid=1", access_control_allow_origin="*", x_kept="yes", connection="x-gone", x_gone="1")
    )
    answer = await proxied(rig, connection)
    assert answer.headers["x-kept"] == "yes"
    assert {"set-cookie", "access-control-allow-origin", "x-gone"}.isdisjoint(answer.headers)


async def test_the_intent_is_recorded_before_and_the_outcome_behind(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    seen: list[int] = []

    async def look(got: Got, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(len(await records(rig, "connection.proxy")))
        writer.write(reply(201))

    api.answer = look
    await proxied(rig, connection, headers={"X-Broker-Reason": "nightly sync"})
    assert seen == [1], "the intent was durable when the call arrived"
    intent = (await records(rig, "connection.proxy"))[0]
    assert (intent.outcome, intent.connection_id, intent.detail["reason"]) == ("intent", connection, "nightly sync")
    assert "/things" not in json.dumps(intent.detail), "a path may name a person"
    outcome = (await eventually(lambda: records(rig, "connection.proxy_outcomes")))[0]
    assert [call.split()[:4] for call in outcome.detail["calls"]] == [[intent.id, "201", "-", "1"]]


async def test_a_service_reaches_only_what_its_grant_says(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    grant = {"integrations": ["acme"], "may": ["proxy"], "methods": ["GET"], "paths": ["/things/**"]}
    key = await rig.caller(grant)
    assert (await proxied(rig, connection, "/things/1", key=key)).status_code == 200
    for method, path in [("POST", "/things/1"), ("GET", "/others/1"), ("GET", "/things/../others")]:
        answer = await httpx_raw(rig, method, f"/proxy/{connection}{path}", key)
        assert answer in {400, 403}, (method, path)
    foreign = await rig.caller({"integrations": ["else"], "may": ["proxy"]})
    assert (await proxied(rig, connection, "/things/1", key=foreign)).status_code == 404
    assert len(api.got) == 1
    denied = [one for one in await records(rig, "connection.proxy") if one.outcome == "denied"]
    assert len(denied) == 4


async def httpx_raw(rig: Rig, method: str, target: str, key: str) -> int:
    """Send a request line as it is; return the answer's status."""
    host = rig.base.removeprefix("http://")
    reader, writer = await asyncio.open_connection(*host.split(":"))
    writer.write(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


async def test_a_method_in_a_parameter_and_a_path_in_a_field_are_judged_like_the_request_line(
    rig: Rig, api: ApiServer
) -> None:
    catalog = rig.parts.integrations.catalog
    quirky = replace(catalog["oidc"], method_params=("method",), path_headers=("x-copy-source",))
    rig.parts.integrations.catalog = {**catalog, "oidc": quirky}
    connection = await connect(rig, api)
    key = await rig.caller(
        {"integrations": ["acme"], "may": ["proxy"], "methods": ["POST", "GET"], "paths": ["/mine/**"]}
    )
    for query in ("", "?a=1", "?method=get"):
        assert (await proxied(rig, connection, f"/mine/x{query}", "POST", key=key)).status_code == 200
    for query in ("?method=delete", "?a=1&Met%68od=DELETE"):
        assert (await proxied(rig, connection, f"/mine/x{query}", "POST", key=key)).status_code == 403
    for source, status in [
        ("/mine/y?versionId=1", 200),
        ("mine/y", 200),
        ("/theirs/secret", 403),
        ("/mine/../theirs", 403),
    ]:
        answer = await proxied(rig, connection, "/mine/x", "POST", key=key, headers={"X-Copy-Source": source})
        assert answer.status_code == status, source


async def test_a_grant_in_the_mode_observe_lets_pass_and_says_so(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    key = await rig.caller({"integrations": ["acme"], "may": ["proxy"], "paths": ["/other"], "mode": "observe"})
    assert (await proxied(rig, connection, key=key)).status_code == 200
    assert (await records(rig, "connection.proxy"))[0].detail["would_be_denied"] == "path"


async def test_a_body_goes_out_byte_for_byte_small_or_streamed(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    small, large = b"\x00\xff" * 50, bytes(range(256)) * 20_000
    assert (await proxied(rig, connection, method="POST", content=small)).status_code == 200
    assert (api.last.body, api.last.field("content-length")) == (small, "100")
    assert (await proxied(rig, connection, method="PUT", content=large)).status_code == 200
    assert (api.last.body, api.last.field("content-length")) == (large, str(len(large)))

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(small), 10):
            yield small[at : at + 10]

    assert (await proxied(rig, connection, method="POST", content=pieces())).status_code == 200
    assert (api.last.body, api.last.field("transfer-encoding")) == (small, "chunked")
    assert (await proxied(rig, connection, method="POST")).status_code == 200
    assert api.last.field("content-length") == "0"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "OPTIONS"])
async def test_an_idempotent_call_is_made_again_after_a_503(rig: Rig, api: ApiServer, method: str) -> None:
    connection = await connect(rig, api, config={"retry": {"initial_delay_seconds": 0.01}})
    api.replies(reply(503), reply(200, b"" if method == "HEAD" else b"{}"))
    answer = await proxied(rig, connection, method=method)
    assert (answer.status_code, answer.headers["x-broker-attempts"]) == (200, "2")


async def test_a_post_is_made_again_only_with_an_idempotency_key(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api, config={"retry": {"initial_delay_seconds": 0.01}})
    api.replies(reply(503), reply(200))
    assert (await proxied(rig, connection, method="POST", content=b"{}")).status_code == 503
    api.replies(reply(503), reply(200))
    answer = await proxied(rig, connection, method="POST", content=b"{}", headers={"Idempotency-Key": "k-1"})
    assert (answer.status_code, answer.headers["x-broker-attempts"]) == (200, "2")
    assert api.last.field("idempotency-key") == "k-1"


async def test_a_post_that_was_sent_and_not_answered_is_said_to_be_unknown(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)

    async def hang_up(_: Got, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    api.answer = hang_up
    answer = await proxied(rig, connection, method="POST", content=b"{}")
    assert (answer.status_code, answer.headers["x-broker-error"]) == (502, "provider_unavailable")
    assert answer.json()["outcome"] == "unknown"
    assert len(api.got) == 1
    gone = await connect(rig, ApiServer(base="http://127.0.0.1:1"), name="gone")
    answer = await proxied(rig, gone, method="POST", content=b"{}")
    assert (answer.status_code, answer.json()["outcome"]) == (502, "not_sent")


async def test_retries_are_as_many_as_the_caller_says_and_no_longer_than_it_waits(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api, config={"retry": {"initial_delay_seconds": 0.01}})
    api.replies(reply(502))
    assert (await proxied(rig, connection, headers={"X-Broker-Retries": "0"})).headers["x-broker-attempts"] == "1"
    assert (await proxied(rig, connection, headers={"X-Broker-Retries": "4"})).headers["x-broker-attempts"] == "5"
    api.replies(reply(429, retry_after="20"))
    answer = await proxied(rig, connection, headers={"X-Broker-Timeout-Ms": "2000"})
    assert (answer.status_code, answer.headers["x-broker-attempts"], answer.headers["retry-after"]) == (429, "1", "20")


async def test_a_silent_upstream_ends_the_call_at_its_deadline(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)

    async def say_nothing(_: Got, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    api.answer = say_nothing
    answer = await proxied(rig, connection, headers={"X-Broker-Timeout-Ms": "300"})
    assert (answer.status_code, answer.json()["code"]) == (504, "upstream_timeout")
    await eventually(lambda: closed(api))


async def closed(api: ApiServer) -> bool:
    return api.open_connections == 0


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_refused_token_is_renewed_and_the_call_made_once_more(rig: Rig, api: ApiServer, method: str) -> None:
    config = {"issuer": rig.sandbox.issuer, "api_base_url": api.base}
    assert (await rig.call("PATCH", "/v1/integrations/sandbox", {"config": config})).status_code == 200
    connection = (await rig.connected())["id"]
    api.replies(reply(401), reply(200))
    answer = await proxied(rig, connection, method=method, content=b"" if method == "GET" else b"{}")
    assert (answer.status_code, answer.headers["x-broker-attempts"]) == (200, "2")
    old, new = (got.field("authorization") for got in api.got)
    assert old != new
    assert new == f"Bearer {(await rig.token(connection)).json()['access_token']}"
    assert rig.sandbox.state.counters.refreshes == 1
    intents = await records(rig, "connection.proxy")
    assert len({one.detail["token"] for one in intents}) == 2, "each credential was recorded before it left"
    api.replies(reply(401))
    assert (await proxied(rig, connection)).status_code == 401, (
        "no second refresh so soon: what the API says is passed on"
    )
    assert rig.sandbox.state.counters.refreshes == 1


async def test_a_401_without_a_way_to_renew_is_passed_on(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    api.replies(reply(401, b'{"no": 1}'))
    answer = await proxied(rig, connection, method="POST", content=b"x")
    assert (answer.status_code, answer.json(), answer.headers["x-broker-attempts"]) == (401, {"no": 1}, "1")


async def drained(pieces: AsyncIterator[bytes]) -> None:
    """Read on; TimeoutError where the stream goes on for longer than a freeze may take."""
    async with asyncio.timeout(1.0):
        async for _ in pieces:
            continue


async def test_a_frozen_connection_is_refused_and_its_open_stream_ends_within_a_second(
    rig: Rig, api: ApiServer
) -> None:
    connection = await connect(rig, api)

    async def forever(_: Got, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"7\r\ndata: 1\r\n")
                await writer.drain()
                await asyncio.sleep(0.02)

    api.answer = forever
    headers = {"Authorization": f"Bearer {rig.admin_key}"}
    async with rig.backend.stream("GET", f"/proxy/{connection}/events", headers=headers) as stream:
        pieces = stream.aiter_raw()
        assert await anext(pieces)
        frozen = await rig.call(
            "POST", "/v1/revocations", {"action": "freeze", "selector": {"all": True}, "reason": "drill"}
        )
        assert frozen.status_code == 201, frozen.text
        with pytest.raises(httpx2.RemoteProtocolError):
            await drained(pieces)
    await eventually(lambda: closed(api))
    api.replies(reply())
    answer = await proxied(rig, connection)
    assert (answer.status_code, answer.json()["code"]) == (409, "connection_frozen")


async def test_events_come_without_delay_and_a_client_that_leaves_ends_the_upstream(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    go_on = asyncio.Event()

    async def events(_: Got, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: one\n\n")
        await go_on.wait()
        writer.write(b"data: two\n\n")
        await reader.read()

    api.answer = events
    headers = {"Authorization": f"Bearer {rig.admin_key}"}
    async with rig.backend.stream("GET", f"/proxy/{connection}/events", headers=headers) as stream:
        pieces = stream.aiter_raw()
        async with asyncio.timeout(2):
            assert await anext(pieces) == b"data: one\n\n"
            go_on.set()
            assert await anext(pieces) == b"data: two\n\n"
    await eventually(lambda: closed(api))


async def test_the_head_of_a_stream_comes_before_its_first_event(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)

    async def head_only(_: Got, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        await reader.read()

    api.answer = head_only
    headers = {"Authorization": f"Bearer {rig.admin_key}"}
    async with asyncio.timeout(2):
        async with rig.backend.stream("GET", f"/proxy/{connection}/events", headers=headers) as stream:
            assert stream.status_code == 200


async def test_a_call_that_is_over_is_let_go_of_at_once(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    gc.collect()
    gc.disable()
    try:
        for method in ("GET", "POST", "GET"):
            assert (
                await proxied(rig, connection, method=method, content=b"" if method == "GET" else b"x")
            ).status_code == 200
        left = [one for one in gc.get_objects() if isinstance(one, Underway)]
        assert left == [], "a cycle keeps a whole call until the collector comes: slow, and it holds what was sent"
    finally:
        gc.enable()


async def test_an_echoed_credential_does_not_reach_the_caller(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    body = json.dumps({"you sent": f"Bearer {TOKEN}"}).encode()
    packed = gzip.compress(body)
    api.replies(reply(200, body, x_echo=TOKEN), reply(200, packed, content_encoding="gzip"), reply(500, body))
    for _ in range(3):
        answer = await proxied(rig, connection, headers={"X-Broker-Retries": "0"})
        assert TOKEN not in answer.text + str(answer.headers)
        assert len(answer.content) == len(body)
    assert "content-encoding" not in answer.headers


async def test_pages_are_followed_through_the_broker(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    api.replies(reply(link=f'<{api.base}/base/things?page=2>; rel="next", <https://evil.test/x>; rel="last"'))
    answer = await proxied(rig, connection)
    assert answer.headers["link"] == f'<{rig.base}/proxy/{connection}/things?page=2>; rel="next"'
    api.replies(reply(302, b"", location="https://evil.test/x"))
    answer = await proxied(rig, connection)
    assert (answer.status_code, answer.headers.get("location")) == (302, None)


async def test_what_is_no_call_is_refused_by_name(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    answer = await proxied(rig, connection, headers=upgrade)
    assert (answer.status_code, answer.json()["code"]) == (501, "upgrade_unsupported")
    assert (await proxied(rig, connection, headers={"X-Broker-Retries": "9"})).status_code == 400
    assert (await rig.backend.get(f"/proxy/{connection}/things")).status_code == 401
    assert (await proxied(rig, "con_" + "0" * 26)).status_code == 404
    assert (await proxied(rig, f"{connection}:uploads")).status_code == 404
    assert (await proxied(rig, connection, method="TRACE")).status_code in {400, 405}
    assert api.got == []


async def test_an_integrations_rate_limit_holds_calls_back(rig: Rig, api: ApiServer) -> None:
    limit = {"rate_limit": {"max_requests": 2, "window_seconds": 30.0}}
    connection = await connect(rig, api, config=limit)
    answers = [await proxied(rig, connection, headers={"X-Broker-Timeout-Ms": "200"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert int(answers[2].headers["retry-after"]) >= 1
    assert len(api.got) == 2


async def test_the_breaker_opens_and_one_probe_closes_it(rig: Rig, api: ApiServer) -> None:
    breaker = {"failure_threshold": 2, "recovery_seconds": 0.2, "window_seconds": 10.0}
    connection = await connect(rig, api, config={"circuit_breaker": breaker})
    api.replies(reply(500))
    for _ in range(2):
        assert (await proxied(rig, connection)).status_code == 500
    answer = await proxied(rig, connection)
    assert (answer.status_code, answer.json()["code"]) == (503, "circuit_open")
    assert len(api.got) == 2
    api.replies(reply())
    await asyncio.sleep(0.25)
    assert (await proxied(rig, connection)).status_code == 200


async def test_a_connection_that_was_made_for_another_origin_is_not_used(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    async with api_server() as other:
        change = {"config": {"issuer": rig.sandbox.issuer, "api_base_url": other.base}}
        assert (await rig.call("PATCH", "/v1/integrations/acme", change)).status_code == 200
        answer = await proxied(rig, connection)
        assert (answer.status_code, answer.json()["code"]) == (409, "origin_changed")
        assert other.got == api.got == []


async def test_a_cut_answer_is_cut_for_the_caller_too(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)

    async def cut(_: Got, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nbegun")
        await writer.drain()
        writer.close()

    api.answer = cut
    with pytest.raises(httpx2.RemoteProtocolError):
        await proxied(rig, connection)


async def test_nobody_is_left_after_clients_vanish_at_random(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    host, port = rig.base.removeprefix("http://").split(":")
    request = f"GET /proxy/{connection}/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {rig.admin_key}\r\n\r\n".encode()

    async def slow(_: Got, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        writer.write(reply())

    api.answer = slow
    for number in range(40):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(request)
            await asyncio.sleep(0.003 * (number % 20))
    await eventually(lambda: quiet(rig))


async def quiet(rig: Rig) -> bool:
    running = [task for task in asyncio.all_tasks() if "_Exchange" in repr(task) or "run_asgi" in repr(task)]
    return not running
