"""Schemathesis against a `broker serve` on SQLite and on PostgreSQL: every route of the OpenAPI document, every check.

The document is the promise: no 500, no status, header, media type or body that it does not name; what it says is wrong is
refused. `tests/real/schemathesis/schemathesis.toml` says what is asked, and why a check looks away where it does.
The proxy, the addresses of webhook sources and the pages under `/connect/disconnect` are not in the document: they pass on
what others wrote, or are for browsers. `TEST_EXAMPLES` makes the run longer (and `TEST_SEED` another one).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tomllib
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.callers import mint_key
from broker.demo.sandbox import DEMO_CLIENT_ID, DEMO_CLIENT_SECRET, SandboxOptions, serve_sandbox
from tests.commands import ROOT, environment, running
from tests.fakes import listening
from tests.flows.test_device import Provider
from tests.flows.webhook_senders import PUSH, SECRET, github_fields
from tests.real.parts import HERE, answers, free_port

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

COMMAND = ROOT / ".venv-schemathesis" / "bin" / "st"
CONFIGURATION = HERE / "schemathesis" / "schemathesis.toml"
EXAMPLES = int(os.environ.get("TEST_EXAMPLES", "3"))
SEED = os.environ.get("TEST_SEED", "8")
KEY_CLASSES = ["encryption", "data", "webhook-signing", "jwt-signing", "session", "audit"]


class Backend:
    """Calls `/v1` as admin, and keeps the ids of what it made, by the name that the document has for them."""

    def __init__(self, base: str, key: str) -> None:
        self.http = httpx2.AsyncClient(
            base_url=base, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=60
        )
        self.ids: dict[str, list[str]] = {}

    async def made(self, path: str, body: Mapping[str, Any] | None = None, *, status: int = 201) -> dict[str, Any]:
        answer = await self.http.post(path, json=body)
        assert answer.status_code == status, f"{path}: {answer.text}"
        return dict(answer.json())

    async def listed(self, path: str, least: int) -> list[str]:
        """Return the ids of a list as soon as it has so many."""
        async with asyncio.timeout(30):
            while len(found := (await self.http.get(path)).json()["data"]) < least:  # noqa: ASYNC110 - a worker makes them
                await asyncio.sleep(0.05)
        return [str(one["id"]) for one in found]

    def keep(self, **ids: str) -> None:
        for name, value in ids.items():
            self.ids.setdefault(name, []).append(value)


@asynccontextmanager
async def broker_and_sandbox(place: Path, database_url: str) -> AsyncIterator[tuple[str, str, str]]:
    """Run `broker serve` and a provider; give the broker's address, its admin key and the provider's issuer."""
    port, key = free_port(), mint_key()[1].reveal()
    base, log = f"http://127.0.0.1:{port}", place / "broker.log"
    variables = {"BROKER_ENV": "development", "BROKER_DATA_DIR": str(place / "data"), "BROKER_PUBLIC_URL": base}
    variables |= {"BROKER_DATABASE_URL": database_url, "BROKER_ADMIN_KEY": key}
    command = f'exec "{sys.executable}" -m broker serve --port {port} >"{log}" 2>&1'
    options = SandboxOptions(redirect_uris=(f"{base}/oauth/sandbox/callback",))
    async with serve_sandbox(options) as sandbox:
        with running("/bin/sh", "-c", command, place=place, variables=variables) as process:
            while not answers(f"{base}/health/live"):
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.05)
            yield base, key, sandbox.issuer
            assert process.poll() is None, log.read_text()[-5000:]


async def device_flow(backend: Backend, television: str) -> None:
    """Start a device flow at a provider that has one."""
    names = ("authorize", "token", "jwks", "device", "userinfo")
    config = {f"{name}_url": f"{television}/{name}" for name in names}
    await backend.made(
        "/v1/integrations",
        {"name": "tv", "provider": "oidc", "client_id": "tv", "client_secret": "tv-secret", "config": config},
    )
    flow = await backend.made("/v1/device-flows", {"integration": "tv", "subject": "acme:42"})
    backend.keep(name="tv", integration="tv", device_id=flow["id"])


async def something_of_everything(backend: Backend, issuer: str, television: str) -> None:
    """Make one or more of each thing that the API knows, so that requests meet things that are there."""
    backend.keep(name="github", integration="nothing")
    for name in ("sandbox", "spare"):
        client = {"client_id": DEMO_CLIENT_ID, "client_secret": DEMO_CLIENT_SECRET}
        body = {"name": name, "provider": "oidc", "config": {"issuer": issuer}, **client}
        await backend.made("/v1/integrations", body)
        added = await backend.made(f"/v1/integrations/{name}/client-secrets", {"client_secret": f"another-of-{name}"})
        backend.keep(name=name, integration=name, secret_id=added["id"])
    for number in range(6):
        credentials = {"type": "oauth2", "access_token": f"token-{number}"}
        body = {"integration": "sandbox", "subject": f"acme:{number}", "credentials": credentials}
        backend.keep(connection_id=(await backend.made("/v1/connections", body))["id"])
        caller = await backend.made("/v1/callers", {"name": f"app-{number}", "roles": ["service"]})
        backend.keep(caller_id=caller["id"], key_id=caller["keys"][0]["id"])
    await device_flow(backend, television)
    freeze = {"action": "freeze", "selector": {"subject": "acme:5"}, "reason": "a test"}
    backend.keep(revocation_id=(await backend.made("/v1/revocations", freeze))["id"])
    backend.keep(rotation_id=(await backend.made("/v1/keys/session/rotate"))["id"])
    backend.ids["key_class"] = KEY_CLASSES
    await webhooks(backend, issuer)


async def webhooks(backend: Backend, issuer: str) -> None:
    """Make sources and subscriptions, and send events that are delivered to nowhere."""
    for number in range(3):
        body = {"name": f"hooks-{number}", "provider": "github", "secret": SECRET}
        source = await backend.made("/v1/webhook-sources", body)
        wanted = {"url": f"{issuer}/nowhere", "event_types": ["**"], "source_id": source["id"]}
        subscription = await backend.made("/v1/subscriptions", wanted)
        backend.keep(source_id=source["id"], subscription_id=subscription["id"], secret_id=source["secrets"][0]["id"])
        for _ in range(3):
            fields = github_fields(PUSH, secret=SECRET)
            answer = await backend.http.post(source["url"], content=PUSH, headers=dict(fields))
            assert answer.status_code in {200, 202}, answer.text
        refused = await backend.http.post(source["url"], content=PUSH)
        assert refused.status_code == 401
    backend.ids["event_id"] = await backend.listed("/v1/events", 9)
    backend.ids["delivery_id"] = await backend.listed("/v1/deliveries", 3)


def written_configuration(place: Path, ids: Mapping[str, list[str]]) -> Path:
    """Write the configuration with the ids of what was made; every dictionary that it names has to be there."""
    text = CONFIGURATION.read_text("utf-8")
    named = {one["dictionary"] for one in tomllib.loads(text)["parameters"].values()}
    assert named == ids.keys()
    text += (
        f"\n[generation]\nmax-examples = {EXAMPLES}\n\n[phases.stateful.generation]\nmax-examples = {8 * EXAMPLES}\n"
    )
    for name, values in ids.items():
        text += f"\n[dictionaries.{name}]\nvalues = {json.dumps(values)}\n"
    path = place / "schemathesis.toml"
    path.write_text(text, "utf-8")
    return path


async def fuzzed(base: str, key: str, configuration: Path, place: Path) -> tuple[int, str, dict[str, Any]]:
    """Run Schemathesis; return its exit status, what it printed, and its report."""
    if not COMMAND.exists():
        pytest.fail(
            "Schemathesis is not installed (.venv-schemathesis is missing): run `make test-real`", pytrace=False
        )
    report = place / "report.json"
    arguments = ["--config-file", str(configuration), "run", f"{base}/schema/openapi.json", "--no-color"]
    arguments += ["--seed", SEED, "--generation-database", "none"]
    arguments += ["--report-json-path", str(report)]
    variables = environment(place, BROKER_ADMIN_KEY=key, PATH=f"{COMMAND.parent}:/usr/bin:/bin", PYTHONPATH="")
    process = await asyncio.create_subprocess_exec(
        COMMAND, *arguments, cwd=place, env=variables, stdin=asyncio.subprocess.DEVNULL, stdout=PIPE, stderr=STDOUT
    )
    out, _ = await process.communicate()
    status = await process.wait()
    return status, out.decode(), json.loads(report.read_text()) if report.exists() else {}


async def test_every_answer_of_every_route_is_one_that_the_document_names(database_url: str, tmp_path: Path) -> None:
    async with (
        broker_and_sandbox(tmp_path, database_url) as (base, key, issuer),
        listening(Provider().answer) as television,
    ):
        backend = Backend(base, key)
        async with backend.http:
            await something_of_everything(backend, issuer, television.base)
            document = (await backend.http.get("/schema/openapi.json")).json()
            status, out, report = await fuzzed(base, key, written_configuration(tmp_path, backend.ids), tmp_path)
            assert status == 0, out
            assert (await backend.http.get("/v1/callers")).status_code == 200  # it was an admin until the end
    operations = sum(len(methods) for methods in document["paths"].values())
    assert {report["operations"][name] for name in ("total", "selected", "tested")} == {operations}
    assert [report["phases"][name]["status"] for name in ("coverage", "fuzzing", "stateful")] == ["success"] * 3
    assert (report["complete"], report["errors"], report["failures"]) == (True, [], [])
    assert "request.defect" not in (tmp_path / "broker.log").read_text()
