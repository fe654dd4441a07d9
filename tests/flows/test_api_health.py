"""Health, metrics, the OpenAPI document, and the groups of routes that a process serves."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from broker.app import Served, create_app, open_parts
from broker.callers import mint_key
from broker.health import readiness
from broker.settings import load_settings
from tests.flows.rig import Rig, open_rig

pytestmark = pytest.mark.asyncio(loop_scope="module")

# The contract's routes as far as this version builds them.
ROUTES = {
    *("POST /v1/sessions", "GET /v1/connections", "POST /v1/connections", "POST /v1/connections/{id}/confirm"),
    *("GET /v1/connections/{id}", "PATCH /v1/connections/{id}", "DELETE /v1/connections/{id}"),
    *("POST /v1/connections/{id}/token", "POST /v1/token", "POST /v1/connections/{id}/reconnect"),
    *("GET /v1/integrations", "POST /v1/integrations", "GET /v1/integrations/{id}", "PATCH /v1/integrations/{id}"),
    *("DELETE /v1/integrations/{id}", "POST /v1/integrations/{id}/test", "GET /v1/integrations/{id}/metrics"),
    *("GET /v1/integrations/{id}/logs", "POST /v1/integrations/{id}/rebind"),
    *("GET /v1/integrations/export", "POST /v1/integrations/import", "POST /v1/integrations/{id}/client-secrets"),
    *("GET /v1/integrations/{id}/client-secrets", "DELETE /v1/integrations/{id}/client-secrets/{id}"),
    *("GET /v1/providers", "GET /v1/providers/{id}", "GET /v1/callers", "POST /v1/callers", "GET /v1/callers/{id}"),
    *("PATCH /v1/callers/{id}", "DELETE /v1/callers/{id}", "POST /v1/callers/{id}/keys"),
    "POST /v1/token-exchange",
    *("POST /v1/device-flows", "GET /v1/device-flows/{id}"),
    *("DELETE /v1/callers/{id}/keys/{id}", "GET /v1/audit", "GET /v1/audit/verify"),
    *("GET /v1/audit/keys", "GET /v1/audit/export"),
    *("GET /v1/keys", "POST /v1/keys/{id}/rotate", "GET /v1/rotations", "GET /v1/rotations/{id}"),
    *("POST /v1/rotations/{id}/pause", "POST /v1/rotations/{id}/resume"),
    *("POST /v1/revocations", "GET /v1/revocations", "GET /v1/revocations/{id}", "DELETE /v1/revocations/{id}"),
    *("DELETE /v1/subjects/{id}", "POST /v1/integrations/{id}/client-secrets/{id}/promote"),
    *("GET /v1/webhook-sources", "POST /v1/webhook-sources", "GET /v1/webhook-sources/{id}"),
    *("PATCH /v1/webhook-sources/{id}", "DELETE /v1/webhook-sources/{id}", "GET /v1/webhook-sources/{id}/rejections"),
    *("GET /v1/webhook-sources/{id}/secrets", "POST /v1/webhook-sources/{id}/secrets"),
    *("DELETE /v1/webhook-sources/{id}/secrets/{id}", "GET /v1/subscriptions", "POST /v1/subscriptions"),
    *("GET /v1/subscriptions/{id}", "PATCH /v1/subscriptions/{id}", "DELETE /v1/subscriptions/{id}"),
    *("POST /v1/subscriptions/{id}/rotate-secret", "POST /v1/subscriptions/{id}/recover"),
    *("GET /v1/events", "GET /v1/events/stream", "GET /v1/events/{id}", "POST /v1/events/{id}/replay"),
    *("GET /v1/deliveries", "GET /v1/deliveries/{id}", "POST /v1/deliveries/{id}/retry", "POST /v1/deliveries/replay"),
}


async def ready(rig: Rig) -> Any:
    """Ask a process that just began and so remembers no verdict."""
    transport = httpx2.ASGITransport(app=create_app(rig.parts))  # type: ignore[arg-type] # an ASGI application
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
        return await http.get("/health/ready")


async def execute(rig: Rig, *statements: str) -> None:
    for statement in statements:
        await run(rig, sa.text(statement))


async def run(rig: Rig, statement: sa.Executable) -> None:
    await rig.parts.database.transaction(lambda session: session.execute(statement))


async def test_a_process_is_live_and_ready_when_all_parts_are(shared: Rig) -> None:
    assert (await shared.backend.get("/health/live")).json() == {"status": "live"}
    answer = await ready(shared)
    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "failing": {}})
    assert answer.headers["cache-control"] == "no-store"


BREAKS = [
    ("audit", "ALTER TABLE audit_records RENAME TO gone", "ALTER TABLE gone RENAME TO audit_records"),
    ("vault", "ALTER TABLE sealed_secrets RENAME TO gone", "ALTER TABLE gone RENAME TO sealed_secrets"),
    ("database", "UPDATE alembic_version SET version_num = '0001'", "UPDATE alembic_version SET version_num = '{}'"),
    ("database", "ALTER TABLE alembic_version RENAME TO gone", "ALTER TABLE gone RENAME TO alembic_version"),
]


async def test_each_failing_part_is_named_and_heals(tmp_path: Path, database_url: str) -> None:
    async with open_rig(tmp_path, database_url=database_url) as rig:
        revision = await rig.parts.database.schema_revision()
        for part, broken, mended in BREAKS:
            await execute(rig, broken)
            answer = await ready(rig)
            assert answer.status_code == 503
            assert answer.json()["status"] == "not_ready"
            assert list(answer.json()["failing"]) == [part], (broken, answer.json())
            assert (await rig.backend.get("/health/live")).status_code == 200
            await execute(rig, mended.format(revision))
            assert (await ready(rig)).status_code == 200


async def test_a_replica_stays_ready_when_a_newer_one_has_migrated(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await execute(rig, "UPDATE alembic_version SET version_num = '9999'")
        assert (await ready(rig)).json() == {"status": "ready", "failing": {}}


async def test_a_verdict_is_believed_for_a_second(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:

        async def asked() -> int:
            return int((await rig.backend.get("/health/ready")).status_code)

        assert await asyncio.gather(*(asked() for _ in range(20))) == [200] * 20
        await execute(rig, BREAKS[0][1])
        assert await asked() == 200
        await asyncio.sleep(1.05)
        assert await asked() == 503


async def test_a_secret_where_none_should_be_that_does_not_open_is_named(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await execute(
            rig,
            "INSERT INTO sealed_secrets (owner, version, key_id, sealed, created_at) VALUES ('health/probe', 1, 'x', x'00', 0)",
        )
        assert list((await ready(rig)).json()["failing"]) == ["vault"]


async def test_a_database_that_others_hold_locked_is_named_in_bounded_time(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        holder = sa.create_engine(f"sqlite:///{tmp_path / 'broker.db'}", isolation_level="AUTOCOMMIT")
        with holder.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            began = time.monotonic()
            answer = await ready(rig)
            assert time.monotonic() - began < 4
            assert list(answer.json()["failing"]) == ["database"]
            connection.exec_driver_sql("ROLLBACK")
        holder.dispose()
        for _ in range(100):
            if (await ready(rig)).status_code == 200:
                return
        raise AssertionError("it did not heal")


async def test_a_closed_database_fails_every_part_that_needs_it(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.parts.database.aclose()
        failing = await readiness(rig.parts.database, rig.parts.vault, rig.parts.audit)
        assert set(failing) == {"database", "vault", "audit"}


async def test_metrics_are_in_the_exposition_format_and_name_no_person(shared: Rig) -> None:
    await shared.call("GET", "/v1/connections?subject=acme-canary")
    answer = await shared.backend.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert any(line.startswith("# TYPE ") for line in lines)
    assert all(line.startswith("#") or line.rsplit(" ", 1)[1] for line in lines if line)
    assert "canary" not in answer.text


# OpenAPI


async def document(rig: Rig) -> dict[str, Any]:
    answer = await rig.backend.get("/schema/openapi.json")
    assert answer.status_code == 200
    return dict(answer.json())


def operations(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the operations by method and path, every parameter named id."""
    shown = {}
    for path, item in found["paths"].items():
        bare = "/".join("{id}" if part.startswith("{") else part for part in path.split("/"))
        for method, operation in item.items():
            if method in {"get", "post", "patch", "put", "delete"}:
                shown[f"{method.upper()} {bare}"] = operation
    return shown


async def test_the_document_holds_every_route_once_and_no_other(shared: Rig) -> None:
    found = await document(shared)
    assert found["openapi"].startswith("3.1.")
    shown = operations(found)
    assert {name for name in shown if " /v1" in name} == ROUTES
    ids = [operation["operationId"] for operation in shown.values()]
    assert len(ids) == len(set(ids))


async def test_every_route_documents_its_errors_as_problems_and_asks_for_a_caller_key(shared: Rig) -> None:
    found = await document(shared)
    scheme = found["components"]["securitySchemes"]["callerKey"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for name, operation in operations(found).items():
        if " /v1" not in name:
            continue
        shown_in_body = name == "POST /v1/token-exchange"
        assert operation.get("security", []) == ([] if shown_in_body else [{"callerKey": []}]), name
        errors = {status: answer for status, answer in operation["responses"].items() if int(status) >= 400}
        assert {"400", "401", "500", "503"} <= errors.keys(), name
        anything_goes = name == "DELETE /v1/subjects/{id}"  # a person of whom nothing is here is erased too
        assert "{id}" not in name or "404" in errors or anything_goes, name
        assert "requestBody" not in operation or {"413", "415"} <= errors.keys(), name
        for status, answer in errors.items():
            schema = answer["content"]["application/problem+json"]["schema"]
            assert schema["$ref"].endswith("Problem"), (name, status)


async def test_every_reference_of_the_document_leads_somewhere(shared: Rig) -> None:
    found = await document(shared)

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(target := value.get("$ref"), str):
                here: Any = found
                for part in target.removeprefix("#/").split("/"):
                    here = here[part]
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(found)
    assert {"title", "version"} <= found["info"].keys()
    assert all(item.startswith("/") for item in found["paths"])


async def test_parameters_that_come_from_inside_are_not_documented(shared: Rig) -> None:
    for name, operation in operations(await document(shared)).items():
        names = {parameter["name"] for parameter in operation.get("parameters", [])}
        assert not names & {"principal", "connections", "integrations", "settings", "callers"}, name


# Groups of routes


GROUPS = {
    "public": ["/oauth/absent/start", "/connect"],
    "private": ["/v1/providers"],
    "admin": ["/metrics", "/schema/openapi.json"],
}


@pytest.mark.parametrize("group", list(GROUPS))
async def test_a_process_serves_its_group_and_health_alone(tmp_path: Path, group: str) -> None:
    key = mint_key()[1].reveal()
    given = {"env": "development", "data_dir": tmp_path, "routes": group, "admin_key": key}
    async with open_parts(load_settings({}, directory=tmp_path, **given)) as parts:
        transport = httpx2.ASGITransport(app=create_app(parts))  # type: ignore[arg-type] # an ASGI application
        http = httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
        assert (await http.get("/health/live")).status_code == 200
        assert (await http.get("/health/ready")).status_code == 200
        for other, paths in GROUPS.items():
            for path in paths:
                answer = await http.get(path, headers={"Authorization": f"Bearer {key}", "Accept": "application/json"})
                if other == group:
                    assert answer.status_code in {200, 400} or (other == "public" and "absent" in path), (
                        path,
                        answer.text,
                    )
                else:
                    assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), path


# The life of a process


async def lived(app: Served, *, until: str) -> list[dict[str, Any]]:
    """Run the lifespan protocol as a server does; return what the application said."""
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    said: list[dict[str, Any]] = []

    async def receive() -> Any:
        return await events.get()

    async def send(message: Any) -> None:
        said.append(message)
        if message["type"] == until:
            transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type] # an ASGI application
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
                assert (await http.get("/health/ready")).json() == {"status": "ready", "failing": {}}
            events.put_nowait({"type": "lifespan.shutdown"})

    events.put_nowait({"type": "lifespan.startup"})
    scope: Any = {"type": "lifespan", "asgi": {"version": "3.0"}}
    await app(scope, receive, send)
    gc.unfreeze()  # what a process does at its start is not meant for the rest of the tests
    return said


@pytest.mark.parametrize("with_worker", [True, False])
async def test_a_process_opens_its_parts_serves_and_closes_them(tmp_path: Path, with_worker: bool) -> None:  # noqa: FBT001 - a case
    settings = load_settings({}, directory=tmp_path, env="development", data_dir=tmp_path)
    said = await lived(Served(settings, with_worker=with_worker), until="lifespan.startup.complete")
    assert [message["type"] for message in said] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_start_that_fails_names_the_setting(tmp_path: Path) -> None:
    settings = load_settings({}, directory=tmp_path, env="development", data_dir=tmp_path, admin_key="brk_wrong")
    (said,) = await lived(Served(settings, with_worker=False), until="never")
    assert said["type"] == "lifespan.startup.failed"
    assert "BROKER_ADMIN_KEY" in said["message"]
    assert "brk_wrong" not in said["message"]


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_ours(shared: Rig) -> None:
    def counted(status: str) -> float:
        labels = {"route": "/connect/disconnect", "method": "POST", "status": status}
        return float(shared.parts.metrics.registry.get_sample_value("broker_http_requests_total", labels) or 0)

    before = counted("4xx"), counted("5xx")
    host, port = shared.base.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /connect/disconnect HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 50\r\n"
    writer.write(f"{head}Content-Type: application/x-www-form-urlencoded\r\n\r\nsession=".encode())
    await writer.drain()
    writer.close()
    async with asyncio.timeout(10):
        while (counted("4xx"), counted("5xx")) == before:  # noqa: ASYNC110 - a metric has no event
            await asyncio.sleep(0.02)
    assert (counted("4xx"), counted("5xx")) == (before[0] + 1, before[1])
