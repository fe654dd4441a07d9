"""A process that never saw the discovery document: live tokens are handed out all the same, and nothing is sent anywhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from broker.app import create_app, open_parts
from broker.demo.sandbox import Fault
from broker.integrations import DISCOVERY_WAIT_SECONDS
from broker.models import AuditRecord, Integration
from tests.flows.api_calls import check_problem
from tests.flows.rig import Rig, open_rig, reserved_socket, serving
from tests.flows.time_passes import ends_in


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as made:
        yield made


@asynccontextmanager
async def fresh_process(rig: Rig) -> AsyncIterator[Rig]:
    """Serve the same broker from parts that have just been opened, so nothing is remembered of the provider."""
    with reserved_socket() as listener:
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with (
            open_parts(rig.parts.settings) as parts,
            serving(create_app(parts), listener),
            httpx2.AsyncClient(base_url=base, trust_env=False, timeout=60) as backend,
        ):
            yield Rig(base, parts, rig.sandbox, rig.admin_key, backend)


def issuer_fails(rig: Rig) -> None:
    rig.sandbox.state.add_fault("fail", endpoint="discovery", times=None)


async def test_a_live_token_is_handed_out_while_the_issuer_is_down(rig: Rig) -> None:
    connection = await rig.connected()
    issuer_fails(rig)
    async with fresh_process(rig) as fresh:
        for _ in range(2):
            answer = await fresh.token(connection["id"])
            assert answer.status_code == 200, answer.text
            assert answer.json()["stale"] is False
            assert (await rig.whoami(answer.json()["access_token"])).status_code == 200


async def test_an_issuer_that_hangs_holds_a_hand_out_up_for_a_moment_and_the_next_not_at_all(rig: Rig) -> None:
    connection = await rig.connected()
    rig.sandbox.state.add_fault(Fault(kind="stall", endpoint="discovery", seconds=8, times=None))
    async with fresh_process(rig) as fresh:
        took: list[float] = []
        for _ in range(2):
            began = monotonic()
            assert (await fresh.token(connection["id"])).status_code == 200
            took.append(monotonic() - began)
        assert took[0] < DISCOVERY_WAIT_SECONDS + 2
        assert took[1] < DISCOVERY_WAIT_SECONDS / 2


async def test_a_token_that_is_over_is_not_renewed_without_discovery_and_is_once_it_is_back(rig: Rig) -> None:
    connection = await rig.connected()
    await ends_in(rig.parts.database, connection["id"], -5)
    issuer_fails(rig)
    rig.sandbox.state.clear_log()
    async with fresh_process(rig) as fresh:
        check_problem(await fresh.token(connection["id"]), 502, "provider_unavailable")
        assert rig.sandbox.state.token_requests() == [], "nothing is sent to an address that is not known"


async def test_pins_are_judged_as_ever_once_the_issuer_is_back(rig: Rig) -> None:
    connection = await rig.connected()
    issuer_fails(rig)
    async with fresh_process(rig) as fresh:
        assert (await fresh.token(connection["id"])).status_code == 200
        rig.sandbox.state.clear_faults()
        await moved(fresh, {"token_url": "http://127.0.0.1:9/token"})
        check_problem(await fresh.token(connection["id"]), 502, "provider_unavailable")
        await fresh.call("POST", "/v1/integrations/sandbox/test")  # asks the issuer anew, which is up again
        check_problem(await fresh.token(connection["id"]), 409, "origin_changed")


async def test_where_endpoints_were_changed_since_the_last_rebind_nothing_leaves_without_discovery(rig: Rig) -> None:
    connection = await rig.connected()
    await moved(rig, {"authorize_url": "https://elsewhere.test/authorize"})
    issuer_fails(rig)
    async with fresh_process(rig) as fresh:
        check_problem(await fresh.token(connection["id"]), 502, "provider_unavailable")
    rig.sandbox.state.clear_faults()
    assert (await rig.call("POST", "/v1/integrations/sandbox/rebind")).status_code == 200
    await patched(rig, {"description": "tells nothing of endpoints"})
    issuer_fails(rig)
    async with fresh_process(rig) as fresh:
        assert (await fresh.token(connection["id"])).status_code == 200


async def test_that_endpoints_were_changed_is_known_when_the_audit_has_forgotten_it(rig: Rig) -> None:
    connection = await rig.connected()
    await moved(rig, {"authorize_url": "https://elsewhere.test/authorize"})
    issuer_fails(rig)
    async with fresh_process(rig) as fresh:
        # what retention leaves, of a year in which nothing else was changed
        await rig.parts.database.transaction(lambda session: session.execute(sa.delete(AuditRecord)))
        check_problem(await fresh.token(connection["id"]), 502, "provider_unavailable")


async def test_an_integration_of_which_nobody_knows_counts_as_moved_until_its_next_rebind(rig: Rig) -> None:
    connection = await rig.connected()
    unknown = sa.update(Integration).values(rebound_at=None, endpoints_changed_at=None)
    await rig.parts.database.transaction(lambda session: session.execute(unknown))
    issuer_fails(rig)
    async with fresh_process(rig) as fresh:
        check_problem(await fresh.token(connection["id"]), 502, "provider_unavailable")
    assert (await rig.call("POST", "/v1/integrations/sandbox/rebind")).status_code == 200
    async with fresh_process(rig) as fresh:
        assert (await fresh.token(connection["id"])).status_code == 200


async def test_a_change_after_a_rebind_counts_and_a_rebind_after_a_change_whatever_the_clock_says(rig: Rig) -> None:
    connection = await rig.connected()
    future = sa.update(Integration).values(rebound_at=4e9)  # by a clock that was set back since
    await rig.parts.database.transaction(lambda session: session.execute(future))
    await moved(rig, {"authorize_url": "https://elsewhere.test/authorize"})
    issuer_fails(rig)
    async with fresh_process(rig) as fresh:
        check_problem(await fresh.token(connection["id"]), 502, "provider_unavailable")
    assert (await rig.call("POST", "/v1/integrations/sandbox/rebind")).status_code == 200
    async with fresh_process(rig) as fresh:
        assert (await fresh.token(connection["id"])).status_code == 200


async def moved(rig: Rig, config: dict[str, Any]) -> None:
    await patched(rig, {"config": config})


async def patched(rig: Rig, body: dict[str, Any]) -> None:
    answer = await rig.call("PATCH", "/v1/integrations/sandbox", body)
    assert answer.status_code == 200, answer.text
