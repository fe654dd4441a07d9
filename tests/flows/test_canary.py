"""No secret is where it must not be: every one that a whole run made is searched in everything that it left behind.

The broker is a real process; a relay between it and the provider writes down what crossed the wire, so that secrets which
nobody outside ever sees (verifier, authorization code, refresh token, client secret) are known to the search too.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import httpx2
import pytest

from broker.callers import mint_key
from broker.demo.sandbox import DEMO_CLIENT_ID, DEMO_CLIENT_SECRET, SandboxOptions, serve_sandbox
from tests.flows.rig import APP, Browser, landed, reserved_socket

SHORTEST = 16
WIRE_SECRETS = re.compile(
    rb"(?:code_verifier|refresh_token|access_token|id_token|code|client_secret|token|state|nonce)"
    rb'(?:=|"\s*:\s*")([A-Za-z0-9._~%+/=-]{16,})'
)
OAUTH_WORDS = {"authorization_code", "refresh_token", "access_token"}


class Relay:
    """Passes bytes both ways between the broker and the provider, and keeps them."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self.seen = bytearray()
        self.upstream = ("", 0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection until either side ends it."""
        up_reader, up_writer = await asyncio.open_connection(*self.upstream)
        await asyncio.gather(self._copy(reader, up_writer), self._copy(up_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65_536):
                self.seen += chunk
                writer.write(chunk)
                await writer.drain()
        writer.close()

    def secrets(self) -> set[str]:
        """Return every secret value that crossed the wire."""
        found = {value.decode() for value in WIRE_SECRETS.findall(bytes(self.seen))}
        for header in re.findall(rb"(?i)authorization: basic ([A-Za-z0-9+/=]+)", bytes(self.seen)):
            found.add(base64.b64decode(header).decode().partition(":")[2])
        return {value for value in found if value not in OAUTH_WORDS}


def forms(secret: str) -> Iterator[bytes]:
    """Yield how a secret may be written: plain, URL-, hex-, JSON- and base64-encoded at each alignment."""
    raw = secret.encode()
    yield raw
    yield quote(secret, safe="").encode()
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    yield json.dumps(secret).strip('"').encode()
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            middle = encode(b"x" * shift + raw)[4 if shift else 0 :].rstrip(b"=")
            yield middle[:-2]


def expect_absent(secrets: dict[str, str], places: dict[str, bytes]) -> None:
    """Fail with the name of the secret and the place, never with the secret."""
    found = [
        f"{name} in {place}"
        for place, content in places.items()
        for name, secret in secrets.items()
        if any(form in content for form in forms(secret))
    ]
    assert not found, found


@contextlib.asynccontextmanager
async def broker_process(data_dir: Path, port: int, admin_key: str) -> AsyncIterator[Path]:
    """Run `broker serve` for real; its log goes to a file."""
    environment = {
        "PATH": os.environ["PATH"],
        "BROKER_ENV": "development",
        "BROKER_DATA_DIR": str(data_dir),
        "BROKER_PUBLIC_URL": f"http://127.0.0.1:{port}",
        "BROKER_ADMIN_KEY": admin_key,
        "BROKER_RETURN_TO": "http://127.0.0.1:7777/app/**",
        "BROKER_AUDIT_SINKS": f"database,stdout,file:{data_dir / 'audit.jsonl'}",
        "BROKER_AUDIT_CHECKPOINTS": f"file:{data_dir / 'checkpoints.jsonl'}",
    }
    log = data_dir / "broker.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "broker", "serve", "--port", str(port)),
            stdout=output,
            stderr=output,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        try:
            await _until_ready(f"http://127.0.0.1:{port}", process)
            yield log
        finally:
            if process.returncode is None:
                process.terminate()
            assert await asyncio.wait_for(process.wait(), 30) == 0, log.read_text()[-2000:]


async def _until_ready(base: str, process: asyncio.subprocess.Process) -> None:
    async with httpx2.AsyncClient(base_url=base, trust_env=False) as http, asyncio.timeout(30):
        while process.returncode is None:
            with contextlib.suppress(httpx2.TransportError):
                if (await http.get("/health/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.1)
    pytest.fail("the broker ended at start")


class Run:
    """One whole run: what was secret in it, and every answer that must hold none of it."""

    def __init__(self, base: str, admin_key: str) -> None:
        """Begin with the admin key as the only secret."""
        self.base = base
        self.secrets = {"admin key": admin_key}
        self.places: dict[str, bytes] = {}
        self.http = httpx2.AsyncClient(base_url=base, trust_env=False, timeout=30)

    async def call(self, method: str, path: str, body: Any = None, *, key: str | None = None) -> httpx2.Response:
        """Call the API."""
        headers = {"Authorization": f"Bearer {key or self.secrets['admin key']}"}
        return await self.http.request(method, path, json=body, headers=headers)

    async def look(self, method: str, path: str, body: Any = None) -> None:
        """Keep an answer, headers too, in which no secret may be."""
        answer = await self.call(method, path, body)
        head = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
        self.places[f"{method} {path.split('?', 1)[0]} → {answer.status_code}"] = head.encode() + answer.content

    async def connect(self, issuer: str) -> dict[str, Any]:
        """Configure, mint, start, consent, come back, confirm; note every secret on the way."""
        config = {"issuer": issuer}
        await self.call(
            "POST",
            "/v1/integrations",
            {
                "name": "sandbox",
                "provider": "oidc",
                "client_id": DEMO_CLIENT_ID,
                "client_secret": DEMO_CLIENT_SECRET,
                "scopes": ["openid", "profile", "email", "offline_access"],
                "config": config,
            },
        )
        grant = {"integrations": ["*"], "may": ["connect", "read", "token", "manage"]}
        made = await self.call("POST", "/v1/callers", {"name": "app", "roles": ["service"], "grants": [grant]})
        self.secrets["caller key"] = made.json()["key"]
        session = (await self.call("POST", "/v1/sessions", {"subject": "acme:42", "return_to": APP})).json()
        self.secrets["session token"] = session["token"]
        return await self._walk(session["token"])

    async def _walk(self, session: str) -> dict[str, Any]:
        browser = Browser(self.base)
        claimed = await browser.get(f"/oauth/sandbox/start?session={session}")
        started = await browser.get(claimed.headers["location"])
        authorize = started.headers["location"]
        self.secrets["state"] = dict(parse_qsl(urlsplit(authorize).query))["state"]
        async with httpx2.AsyncClient(trust_env=False) as http:
            back = (await http.get(authorize, headers={"X-Sandbox-Decision": "allow"})).headers["location"]
        self.secrets["code"] = dict(parse_qsl(urlsplit(back).query))["code"]
        came = landed(await browser.get(back))
        self.secrets["confirm code"] = came["confirm"]
        self.secrets.update({f"cookie {name}": str(value) for name, value in browser.http.cookies.items()})
        await browser.http.aclose()
        confirm = {"code": came["confirm"], "subject": "acme:42"}
        answer = await self.call("POST", f"/v1/connections/{came['connection_id']}/confirm", confirm)
        assert answer.status_code == 200, answer.text
        self.places["confirm's answer"] = answer.content
        return dict(answer.json())


async def provoke_errors(run: Run, connection_id: str) -> None:
    """Send secrets where they do not belong, and look at every kind of answer."""
    secrets = run.secrets
    await run.look("POST", f"/v1/connections/{connection_id}/confirm", {"code": secrets["code"], "subject": "x"})
    await run.look("POST", f"/v1/connections/{connection_id}/token", {"min_ttl": secrets["code"]})
    await run.look("POST", f"/v1/connections/{connection_id}/token", {"min_ttl": -1, "x": secrets["state"]})
    await run.look("GET", f"/v1/connections?cursor={secrets['state']}")
    await run.look(
        "GET", f"/oauth/sandbox/callback?state={secrets['state']}&code={secrets['code']}&error=access_denied"
    )
    await run.look("GET", f"/oauth/sandbox/start?session={secrets['session token']}")
    await run.look("GET", f"/nowhere?token={secrets['session token']}")
    await run.look("POST", "/v1/integrations", {"name": "x", "provider": "oidc", "config": {"issuer": secrets["code"]}})
    for path in (
        *("/metrics", "/schema/openapi.json", "/health/ready", "/v1/connections", "/v1/integrations", "/v1/callers"),
        *("/v1/audit", "/v1/audit/verify", "/v1/integrations/sandbox/logs", "/v1/integrations/export"),
        *("/v1/integrations/sandbox/client-secrets", f"/v1/connections/{connection_id}", "/v1/providers/oidc"),
    ):
        await run.look("GET", path)


async def test_no_secret_is_in_logs_errors_answers_metrics_schema_or_the_raw_database(tmp_path: Path) -> None:
    relay = Relay()
    relay_server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    issuer = f"http://127.0.0.1:{relay_server.sockets[0].getsockname()[1]}"
    with reserved_socket() as mine, reserved_socket() as providers:
        port, relay.upstream = mine.getsockname()[1], providers.getsockname()
    admin_key = mint_key()[1].reveal()
    options = SandboxOptions(issuer=issuer, redirect_uris=(f"http://127.0.0.1:{port}/oauth/sandbox/callback",))
    run = Run(f"http://127.0.0.1:{port}", admin_key)
    serving = serve_sandbox(options, port=relay.upstream[1])
    async with serving as sandbox, broker_process(tmp_path, port, admin_key) as log:
        connection = await run.connect(issuer)
        bodies: list[dict[str, bool]] = [{}, {"force_refresh": True}]
        for body in bodies:
            answer = await run.call("POST", f"/v1/connections/{connection['id']}/token", body)
            assert answer.status_code == 200, answer.text
            run.secrets[f"handed out {len(run.secrets)}"] = answer.json()["access_token"]
        imported = {"type": "oauth2", "access_token": "CANARY-imported-5d1c8a7e"}
        run.secrets["imported token"] = imported["access_token"]
        wanted = {"integration": "sandbox", "subject": "acme:43", "credentials": imported}
        await run.look("POST", "/v1/connections", wanted)
        await provoke_errors(run, connection["id"])
        sandbox.state.kill_account("ada")  # a refresh that fails is logged too
        refused = {"not_token_sha256": hashlib.sha256(answer.json()["access_token"].encode()).hexdigest()}
        await run.look("POST", f"/v1/connections/{connection['id']}/token", refused)
        await run.look("DELETE", f"/v1/connections/{connection['id']}")
        run.places["log"] = log.read_bytes()
    await run.http.aclose()
    relay_server.close()
    run.secrets.update({f"wire {index}": value for index, value in enumerate(sorted(relay.secrets()))})
    run.places.update(files_below(tmp_path))
    expect_the_search_to_have_teeth(run, log)
    expect_absent(run.secrets, run.places)


def files_below(directory: Path) -> dict[str, bytes]:
    """Return what a run left on disk; the keyring is the one file that is secret by itself."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "keyring"]
    return {path.name: path.read_bytes() for path in paths}


def expect_the_search_to_have_teeth(run: Run, log: Path) -> None:
    """Prove that secrets of each kind were collected, and that the search finds one where there is one."""
    assert len([name for name in run.secrets if name.startswith("wire")]) >= 5
    assert any(name.startswith("cookie") for name in run.secrets)
    assert all(len(secret) >= SHORTEST for secret in run.secrets.values())
    assert {"broker.db", "audit.jsonl", "broker.log"} <= run.places.keys()
    assert b"refresh" in log.read_bytes()
    for form in forms(run.secrets["confirm code"]):
        with pytest.raises(AssertionError, match="confirm code in planted"):
            expect_absent(run.secrets, {"planted": b"before " + form + b" after"})
