"""Figures and lines of an integration through HTTP: proxied calls of all processes beside flows and tests."""

from __future__ import annotations

from typing import Any

import pytest

from broker.activity import Activity, CallDone
from broker.limits import BreakerRule
from broker.models import CallLatest, CallLine, CallMinute
from broker.telemetry import new_metrics
from tests.flows.api_calls import check_problem, imported, unused
from tests.flows.rig import Rig
from tests.flows.shared import rows, subject

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def _called(rig: Rig, integration: str, connection_id: str, *, times: int = 1, **fields: Any) -> None:
    """Write calls as another process would."""
    activity = Activity(rig.parts.database, new_metrics())
    plain: dict[str, Any] = {
        "provider": "oidc",
        "host": "api.test",
        "method": "GET",
        "path": "/people/ada",
        "caller_id": "clr_a",
        "request_id": "req_a",
        "status": 200,
        "code": None,
        "attempts": 1,
        "bytes_out": 5,
        "bytes_in": 50,
        "upstream_seconds": 0.008,
        "total_seconds": 0.010,
    }
    for _ in range(times):
        activity.note(CallDone(**{**plain, "integration": integration, "connection_id": connection_id, **fields}))
    await activity.aclose()


async def _made(rig: Rig) -> tuple[str, str]:
    """Return a new integration's name and a connection of it."""
    name = unused("calls-")
    await rig.integration(name)
    return name, (await imported(rig, subject(), integration=name))["id"]


async def _figures(rig: Rig, name: str, window: str = "1h") -> dict[str, Any]:
    answer = await rig.call("GET", f"/v1/integrations/{name}/metrics?window={window}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def _lines(rig: Rig, name: str, query: str = "") -> list[dict[str, Any]]:
    answer = await rig.call("GET", f"/v1/integrations/{name}/logs{query}")
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


async def test_calls_of_all_processes_and_lines_are_one_figure(shared: Rig) -> None:
    name, connection_id = await _made(shared)
    nothing = await _figures(shared, name)
    assert (nothing["calls"], nothing["outcomes"], nothing["breaker_state"]) == (0, {}, "closed")
    await _called(shared, name, connection_id, times=8, rate_remaining=41)
    await _called(shared, name, connection_id, times=1, status=500, attempts=3, total_seconds=1.0)
    await _called(shared, name, connection_id, times=1, status=None, code="upstream_timeout", total_seconds=2.0)
    found = await _figures(shared, name)
    assert (found["total"], found["calls"], found["retries"]) == (10, 10, 2)
    assert (found["success_rate"], found["error_rate"]) == (0.8, 0.2)
    assert (found["outcomes"], found["errors"]) == ({"2xx": 8, "5xx": 1, "broker": 1}, {"upstream_timeout": 1})
    assert found["mean_latency_ms"] == pytest.approx((8 * 10 + 1000 + 2000) / 10)
    assert found["mean_upstream_latency_ms"] == pytest.approx(8)
    for field, expected in (("p50_latency_ms", 10), ("p95_latency_ms", 2000), ("p99_latency_ms", 2000)):
        assert found[field] == pytest.approx(expected, rel=0.1), field
    assert (found["bytes_in"], found["bytes_out"], found["rate_limit_remaining"]) == (500, 50, 41)
    assert found["last_activity_at"].endswith("Z")
    await shared.parts.integrations.note(name, action="test", text="good", duration_ms=10.0)
    assert (await _figures(shared, name))["total"] == 11


async def test_an_open_breaker_shows(shared: Rig) -> None:
    name, _ = await _made(shared)
    assert shared.parts.proxy is not None
    leave = shared.parts.proxy.forwarding._bounds.breakers.enter(f"{name} api.test", BreakerRule(1, 60, 60))
    leave.failed()
    assert (await _figures(shared, name))["breaker_state"] == "open"


async def test_lines_of_calls_and_others_come_newest_first_page_by_page(shared: Rig) -> None:
    name, connection_id = await _made(shared)
    for number in range(3):
        await _called(shared, name, connection_id, times=2, request_id=f"req_{number}")
        await shared.parts.integrations.note(name, action="test", text=f"line {number}")
    whole = await _lines(shared, name)
    assert [line["action"] for line in whole] == ["test", "call", "call"] * 3
    assert whole[0]["text"] == "line 2"
    paged, cursor = [], ""
    while True:
        answer = (await shared.call("GET", f"/v1/integrations/{name}/logs?limit=2{cursor}")).json()
        paged += answer["data"]
        if answer["next_cursor"] is None:
            break
        cursor = f"&cursor={answer['next_cursor']}"
    assert paged == whole


async def test_a_line_says_what_the_call_was(shared: Rig) -> None:
    name, connection_id = await _made(shared)
    await _called(shared, name, connection_id, status=404, attempts=2)
    await _called(shared, name, connection_id, status=None, code="circuit_open", attempts=0, path="/100%_sure")
    [broken, missing] = await _lines(shared, name)
    assert missing == {
        "at": missing["at"],
        "level": "warning",
        "action": "call",
        "text": "GET api.test/people/ada 404",
        "connection_id": connection_id,
        "caller_id": "clr_a",
        "request_id": "req_a",
        "status": 404,
        "code": None,
        "attempts": 2,
        "duration_ms": 10.0,
        "upstream_ms": 8.0,
        "bytes_out": 5,
        "bytes_in": 50,
    }
    assert (broken["level"], broken["text"]) == ("error", "GET api.test/100%_sure circuit_open")
    assert await _lines(shared, name, "?level=error") == [broken]
    assert await _lines(shared, name, "?text=100%25_s") == [broken]
    assert await _lines(shared, name, "?text=ada%20404") == [missing]
    assert await _lines(shared, name, "?text=%25d") == []


@pytest.mark.parametrize("window", ["5m", "90m", "1h", "168h", "7d"])
async def test_a_window_is_minutes_hours_or_days(shared: Rig, window: str) -> None:
    name, connection_id = await _made(shared)
    await _called(shared, name, connection_id)
    assert (await _figures(shared, name, window))["calls"] == 1


@pytest.mark.parametrize("window", ["", "0m", "8d", "169h", "1", "h", "-1h", "1.5h", "1w", "99999999999h", "%D9%A1h"])
async def test_another_window_is_refused(shared: Rig, window: str) -> None:
    name, _ = await _made(shared)
    answer = await shared.call("GET", f"/v1/integrations/{name}/metrics?window={window}")
    check_problem(answer, 400, "invalid_request", "?window")


@pytest.mark.parametrize("text", ["a" * 201, "a" * 60_000, "%25" * 201, "a%00"])
async def test_a_text_that_is_too_long_to_look_for_is_refused(shared: Rig, text: str) -> None:
    name, connection_id = await _made(shared)
    answer = await shared.call("GET", f"/v1/integrations/{name}/logs?text={text}")
    check_problem(answer, 400, "invalid_request", "?text")
    await _called(shared, name, connection_id, path="/" + "%25" * 100)
    assert await _lines(shared, name, f"?text={'%2525' * 60}") != []
    assert await _lines(shared, name, f"?text={'%25' * 200}") == []


async def test_an_integration_that_was_deleted_meanwhile_leaves_nothing_to_the_next_of_its_name(shared: Rig) -> None:
    name, connection_id = await _made(shared)
    assert (await shared.call("DELETE", f"/v1/connections/{connection_id}?revoke=false")).status_code == 200
    assert (await shared.call("DELETE", f"/v1/integrations/{name}")).status_code == 204
    await _called(shared, name, connection_id, rate_remaining=5)  # what another process had not written yet
    await shared.integration(name)
    found = await _figures(shared, name)
    assert (found["calls"], found["rate_limit_remaining"], found["mean_upstream_latency_ms"]) == (0, None, None)


async def test_a_cursor_of_another_list_is_refused(shared: Rig) -> None:
    name, _ = await _made(shared)
    cursor = (await shared.call("GET", "/v1/integrations?limit=1")).json()["next_cursor"]
    answer = await shared.call("GET", f"/v1/integrations/{name}/logs?cursor={cursor}")
    check_problem(answer, 400, "invalid_request", "?cursor")


async def test_an_absent_integration_has_neither(shared: Rig) -> None:
    for route in ("metrics", "logs"):
        check_problem(await shared.call("GET", f"/v1/integrations/absent/{route}"), 404, "not_found")


async def test_the_lines_of_a_connection_go_with_it_and_an_integration_takes_all(shared: Rig) -> None:
    name, connection_id = await _made(shared)
    other = (await imported(shared, subject(), integration=name))["id"]
    for one in (connection_id, other):
        await _called(shared, name, one)
    assert (await shared.call("DELETE", f"/v1/connections/{connection_id}?revoke=false")).status_code == 200
    await _called(shared, name, connection_id)  # one that was under way
    assert {line["connection_id"] for line in await _lines(shared, name)} == {other}
    assert (await _figures(shared, name))["calls"] == 3
    assert (await shared.call("DELETE", f"/v1/connections/{other}?revoke=false")).status_code == 200
    assert (await shared.call("DELETE", f"/v1/integrations/{name}")).status_code == 204
    for table in (CallLine, CallMinute, CallLatest):
        assert not [row for row in await rows(shared, table) if row.integration == name]  # type: ignore[attr-defined]


async def test_erasing_a_person_takes_the_lines_at_once(shared: Rig) -> None:
    name = unused("calls-")
    await shared.integration(name)
    person = subject()
    connection_id = (await imported(shared, person, integration=name))["id"]
    await _called(shared, name, connection_id)
    assert len(await _lines(shared, name)) == 1
    answer = await shared.call("DELETE", f"/v1/subjects/{person}?revoke=false")
    assert answer.status_code < 300, answer.text
    assert await _lines(shared, name) == []
