"""More is asked than can be served: some are told at once to come later, others are served, and the process stays alive."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import pytest

from broker.app import create_app
from broker.demo.sandbox import SandboxOptions
from broker.limits import Room
from broker.limits.doors import MOST_BROWSERS
from tests.crash.processes import Wire, connected
from tests.flows.api_calls import check_problem, grant, imported
from tests.flows.rig import Rig, eventually, open_rig, reserved_socket, serving
from tests.flows.shared import person, subject
from tests.flows.upstream import Got, api_server, reply

AT_ONCE_SECONDS = 1.0  # a refusal takes milliseconds; the machine may be busy


@dataclass
class Crowded:
    """A broker with a small room for `/v1`."""

    rig: Rig
    room: Room
    port: int
    http: httpx2.AsyncClient

    async def ask(self, method: str, path: str, key: str, body: Any = None) -> httpx2.Response:
        """Call with a caller's key."""
        headers = {"Authorization": f"Bearer {key}"}
        return await self.http.request(method, path, json=body, headers=headers)

    async def hold(self, stack: contextlib.AsyncExitStack, key: str, count: int) -> Sequence[Wire]:
        """Begin requests of a caller whose bodies do not come yet, one after the other."""
        wires = []
        for _ in range(count):
            above = functools.partial(self._is_above, self.room.busy)
            wires.append(wire := await stack.enter_async_context(connected(self.port)))
            wire.writer.write(begun("/v1/sessions", key))
            await eventually(above)
        return wires

    async def _is_above(self, count: int) -> bool:
        return self.room.busy > count


def begun(path: str, key: str = "", **fields: str) -> bytes:
    """Return a request's head that promises a body."""
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    head = f"POST {path} HTTP/1.1\r\nHost: broker\r\nAuthorization: Bearer {key}\r\n{more}"
    return f"{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n".encode()


@contextlib.asynccontextmanager
async def crowded(rig: Rig, room: Room) -> AsyncIterator[Crowded]:
    """Serve the rig's parts once more, with this room."""
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(reserved_socket())
        port = listener.getsockname()[1]
        await stack.enter_async_context(serving(create_app(rig.parts, room=room), listener))
        base = f"http://127.0.0.1:{port}"
        http = await stack.enter_async_context(httpx2.AsyncClient(base_url=base, trust_env=False, timeout=60))
        yield Crowded(rig, room, port, http)


def check_refused(answer: httpx2.Response, began: float) -> None:
    """Fail unless this is an early refusal that says when to come again."""
    assert time.monotonic() - began < AT_ONCE_SECONDS
    check_problem(answer, 503, "overloaded")
    assert 2 <= int(answer.headers["retry-after"]) <= 4
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_caller_with_all_its_share_is_told_at_once_and_another_is_served(shared: Rig) -> None:
    noisy, quiet = [await shared.caller(grant("token")) for _ in range(2)]
    connection_id = (await imported(shared, subject()))["id"]
    async with crowded(shared, Room(100, 6, burst_seconds=0)) as broker, contextlib.AsyncExitStack() as stack:
        wires = await broker.hold(stack, noisy, 4)
        for method, path in (("POST", f"/v1/connections/{connection_id}/token"), ("GET", "/v1/connections")):
            began = time.monotonic()
            check_refused(await broker.ask(method, path, noisy, {} if method == "POST" else None), began)
        assert (await broker.ask("POST", f"/v1/connections/{connection_id}/token", quiet, {})).status_code == 200
        assert (await broker.ask("GET", "/v1/connections", quiet)).status_code == 200
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert (await broker.http.get(path)).status_code == 200
        for wire in wires:
            assert (await wire.ask(b"{}"))[0] == 400
        assert (await broker.ask("POST", f"/v1/connections/{connection_id}/token", noisy, {})).status_code == 200
        assert (broker.room.inside, broker.room.busy) == (0, 0)


@pytest.mark.asyncio(loop_scope="module")
async def test_what_comes_before_the_caller_is_known_is_bounded_too(shared: Rig) -> None:
    async with crowded(shared, Room(3)) as broker, contextlib.AsyncExitStack() as stack:
        await broker.hold(stack, shared.admin_key, 2)
        third = await broker.hold(stack, await shared.caller(), 1)
        began = time.monotonic()
        check_refused(await broker.ask("POST", "/v1/token-exchange", "brk_no_key", {}), began)
        check_refused(await broker.ask("GET", "/v1/connections", "brk_no_key"), began)
        assert (await broker.http.get("/health/live")).status_code == 200
        assert (await third[0].ask(b"{}"))[0] in {400, 403}
        assert (await broker.ask("GET", "/v1/connections", "brk_no_key")).status_code == 401


async def test_waiting_for_a_refresh_overloads_nobody(tmp_path: Any) -> None:
    async with open_rig(tmp_path, options=SandboxOptions(latency_seconds=1.0)) as rig:
        connection_id = (await rig.connected())["id"]
        async with crowded(rig, Room(100, 3, burst_seconds=0)) as broker:
            asking = []
            for number in range(12):
                path = f"/v1/connections/{connection_id}/token"
                asking.append(asyncio.create_task(broker.ask("POST", path, rig.admin_key, {"force_refresh": True})))
                await eventually(functools.partial(waits, broker.room, number + 1))
            answers = [answer.status_code for answer in await asyncio.gather(*asking)]
            assert answers == [200] * 12
            assert (broker.room.inside, broker.room.busy) == (0, 0)


async def waits(room: Room, count: int) -> bool:
    """Whether so many are inside and none is worked on."""
    return (room.inside, room.busy) == (count, 0)


@pytest.mark.asyncio(loop_scope="module")
async def test_browsers_at_one_address_leave_room_for_others(shared: Rig) -> None:
    share = MOST_BROWSERS * 2 // 3 + 1
    port = int(shared.base.rpartition(":")[2])
    async with contextlib.AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connected(port)) for _ in range(share)]
        for wire in wires:
            wire.writer.write(begun("/connect/disconnect", Accept="text/html", X_Forwarded_For="192.0.2.7"))
        flooded, other = [{"X-Forwarded-For": f"192.0.2.{last}", "Accept": "text/html"} for last in (7, 8)]

        async def refused() -> bool:
            return (await shared.backend.get("/connect", headers=flooded)).status_code == 503

        await eventually(refused)
        page = await shared.backend.get("/connect", headers=flooded)
        assert page.headers["content-type"].startswith("text/html")
        assert "overloaded" in page.text
        assert 2 <= int(page.headers["retry-after"]) <= 4
        as_json = {**flooded, "Accept": "application/json"}
        check_problem(await shared.backend.get("/connect", headers=as_json), 503, "overloaded")
        assert (await shared.backend.get("/connect", headers=other)).status_code == 400
        assert (await shared.backend.get("/health/live")).status_code == 200


@pytest.mark.asyncio(loop_scope="module")
async def test_two_callers_with_many_proxied_calls_leave_places_for_a_third(shared: Rig) -> None:
    assert shared.parts.proxy is not None
    small = replace(shared, parts=replace(shared.parts, proxy=replace(shared.parts.proxy, most_calls=12)))
    going = asyncio.Event()

    async def later(_: Got, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await going.wait()
        writer.write(reply())
        await writer.drain()

    async with api_server() as api, crowded(small, Room(100)) as broker:
        config = {"issuer": shared.sandbox.issuer, "api_base_url": api.base}
        name = person()
        await shared.integration(name, config=config)
        body = {
            "integration": name,
            "subject": subject(),
            "credentials": {"type": "oauth2", "access_token": "at-1234567890"},
        }
        connection_id = (await shared.call("POST", "/v1/connections", body)).json()["id"]
        keys = [await shared.caller(grant("proxy", integrations=(name,))) for _ in range(3)]

        async def call(key: str) -> httpx2.Response:
            return await broker.ask("GET", f"/proxy/{connection_id}/x", key)

        api.answer = later
        calls = [asyncio.create_task(call(key)) for key in (*[keys[0]] * 9, *[keys[1]] * 9)]

        async def settled() -> bool:
            return sum(one.done() for one in calls) + len(api.got) == len(calls)

        await eventually(settled)
        assert len(api.got) < 12
        third = asyncio.create_task(call(keys[2]))
        going.set()
        assert (await third).status_code == 200
        answers = [await one for one in calls]
        assert {answer.status_code for answer in answers} == {200, 503}
        assert {answer.headers.get("x-broker-error") for answer in answers if answer.status_code == 503} == {
            "overloaded"
        }
