"""Secrets move between sealed rows and a real Vault's KV: killed, in both directions, and while others write."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlmodel import Session

from broker.app import Parts, create_app, open_parts
from broker.models import Connection, new_id
from broker.settings import Settings
from broker.vault import Vault, open_server, open_store, open_vault
from broker.vault.moving import Move, MovingVault
from broker.vault.sealed_rows import SealedRows
from broker.vault.timed import TimedVault
from tests.broker.vault.test_moving import KEYRING, filled, name, opened_rows, quiet, renamed
from tests.broker.vault.vault_contract import CONTRACT, an_owner
from tests.commands import broker, running
from tests.flows.rig import Rig, open_rig, reserved_socket, serving
from tests.real.vault import VaultServer

pytestmark = pytest.mark.real
SECRETS = 240


@pytest.fixture
async def old(sqlite_url: str) -> AsyncIterator[SealedRows]:
    store = await opened_rows(sqlite_url)
    yield store
    await store.database.aclose()


@pytest.fixture
def settings(vault_server: VaultServer, tmp_path: Path) -> Settings:
    """Return settings for a place in KV where nobody else is."""
    return vault_server.settings(tmp_path, vault_prefix=f"broker/{new_id('move')}", vault_fallback="local")


@asynccontextmanager
async def both_of(settings: Settings, old: SealedRows) -> AsyncIterator[MovingVault]:
    server = await open_server(settings)
    assert server is not None
    opened = await open_vault(settings, old.database, old.sealer, server)
    assert isinstance(opened, MovingVault)
    try:
        yield opened
    finally:
        await server.aclose()


def variables_of(settings: Settings, url: str, **more: str) -> dict[str, str]:
    """Return the environment of a command with these settings, which are those of a replica that was not restarted yet."""
    return {
        "BROKER_ENV": "development",
        "BROKER_DATABASE_URL": url,
        "BROKER_KEYRING": KEYRING,
        "BROKER_VAULT_PREFIX": settings.vault_prefix,
        **settings.vault_variables,
        **more,
    }


@pytest.mark.parametrize("check_law", CONTRACT, ids=lambda check: str(check.__name__).removeprefix("check_"))
@pytest.mark.parametrize("way", ["to KV", "from KV"])
async def test_sealed_rows_and_kv_together_keep_the_contract(
    settings: Settings, old: SealedRows, way: str, check_law: Callable[[Vault], Awaitable[None]]
) -> None:
    async with both_of(settings, old) as both:
        await check_law(both if way == "to KV" else MovingVault(old, both.new))


async def test_a_secret_of_a_high_version_keeps_its_number_there_and_back(
    settings: Settings, old: SealedRows, sqlite_url: str
) -> None:
    owner = an_owner()
    for version in (8758, 8759, 8760):
        before = 0 if version == 8758 else version - 1
        await old.put_as(owner, {"n": version}, expected_version=before, version=version)
    await name(old.database, owner, version=8760)
    async with both_of(settings, old) as both:
        assert (await Move(old.database, old, both.new).passes(quiet)).problems == {}
        await old.destroy(owner)
        assert [(await both.get(owner, version))[1]["n"] for version in (8758, 8759, 8760)] == [8758, 8759, 8760]
        assert await both.new.put(owner, {"n": 8761}, expected_version=8760) == 8761
        await renamed(old.database, owner, 8761)
        assert (await Move(old.database, both.new, old).passes(quiet)).problems == {}
    assert await old.get(owner) == (8761, {"n": 8761})
    assert await old.get(owner, 8760) == (8760, {"n": 8760})


async def test_the_command_is_killed_and_goes_on_while_replicas_write(
    settings: Settings, old: SealedRows, sqlite_url: str, tmp_path: Path
) -> None:
    versions = {an_owner(): 1 + number % 3 for number in range(SECRETS)}
    for owner, version in versions.items():
        await filled(old, owner, until=version)
        await name(old.database, owner, version=version)
    arguments = ("-m", "broker", "vault", "migrate", "--from", "local", "--to", "hashicorp", "--json")
    variables = variables_of(settings, sqlite_url)
    stop = asyncio.Event()
    async with both_of(settings, old) as both:
        replicas: tuple[Vault, ...] = (old, both)

        async def write_on() -> int:
            """Renew one secret after the other, by a replica that was restarted and one that was not, until told to stop."""
            writes = 0
            while not stop.is_set():
                owner = list(versions)[(writes * 7) % SECRETS]
                versions[owner] = await replicas[writes % 2].put(
                    owner, {"n": versions[owner] + 1}, expected_version=versions[owner]
                )
                await renamed(old.database, owner, versions[owner])
                for replica in replicas:
                    assert await replica.get(owner, versions[owner]) == (versions[owner], {"n": versions[owner]})
                writes += 1
                await asyncio.sleep(0.02)
            return writes

        writer = asyncio.create_task(write_on())
        for stop_after in (40, 120):
            with running(sys.executable, *arguments, place=tmp_path, variables=variables) as process:
                done = 0
                while done < stop_after:
                    done = int(json.loads(await asyncio.to_thread(process.stdout.readline))["done"])  # type: ignore[union-attr]
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        moved = await asyncio.to_thread(broker, *arguments[2:], place=tmp_path, **variables)
        stop.set()
        writes = await writer
        assert moved.status == 0, moved.err
        assert json.loads(moved.out.splitlines()[-1])["left"] == 0
        last = await Move(old.database, old, both.new).passes(quiet)
        assert (last.problems, len(last.verified), writes > 20) == ({}, SECRETS, True)
        for owner, version in versions.items():
            assert await both.new.get(owner, version) == await old.get(owner, version) == (version, {"n": version})


async def test_the_command_tells_machines_and_deletes_last(
    settings: Settings, old: SealedRows, sqlite_url: str, tmp_path: Path
) -> None:
    owner = an_owner()
    await filled(old, owner, until=2)
    await name(old.database, owner, version=2)

    def migrate(*more: str, **variables: str) -> tuple[int, list[dict[str, Any]], str]:
        arguments = ("vault", "migrate", "--from", "local", "--to", "hashicorp", "--json", *more)
        done = broker(*arguments, place=tmp_path, **variables_of(settings, sqlite_url, **variables))
        return done.status, [json.loads(line) for line in done.out.splitlines()], done.err

    status, lines, err = migrate()
    assert (status, err) == (0, "")
    assert lines[0] == {"pass": 1, "total": 1, "done": 1, "copied": 1}
    assert lines[-1] == {
        "from": "local",
        "to": "hashicorp",
        "dry_run": False,
        "passes": 2,
        "total": 1,
        "copied": 1,
        "equal": 1,
        "unnamed": 0,
        "left": 0,
        "complete": True,
        "destroyed": None,
        "problems": {},
    }
    await old.put(owner, {"n": 3}, expected_version=2)
    async with both_of(settings, old) as both:
        await both.new.put(owner, {"n": "other"}, expected_version=2)
    await renamed(old.database, owner, 3)
    status, lines, err = migrate("--delete-source", BROKER_VAULT="hashicorp")
    assert (status, lines[-1]["problems"], lines[-1]["destroyed"]) == (1, {owner: "differs"}, None)
    assert await old.get(owner, 3) == (3, {"n": 3})
    status, lines, err = migrate()  # nobody reads Vault yet, as far as these settings say: what is there is made anew
    assert (status, lines[-1]["complete"]) == (0, True)
    status, lines, err = migrate("--delete-source", BROKER_VAULT="hashicorp")
    assert (status, lines[-1]["destroyed"]) == (0, 1)
    assert await old.owners("") == []
    async with both_of(settings, old) as both:
        assert await both.new.get(owner, 3) == (3, {"n": 3})
        server = await open_server(settings)
        store = await open_store(settings, "hashicorp", old.database, old.sealer, server)
        assert [one for one, _ in await store.owners("connections/")] == [owner]
        assert server is not None
        await server.aclose()


# --- the whole broker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replica:
    """One more broker over a rig's database, with a store of its own choice."""

    rig: Rig
    parts: Parts
    http: httpx2.AsyncClient

    async def token(self, connection_id: str) -> httpx2.Response:
        """Ask this replica for a token."""
        headers = {"Authorization": f"Bearer {self.rig.admin_key}"}
        return await self.http.post(f"/v1/connections/{connection_id}/token", json={}, headers=headers)

    async def row(self, connection_id: str) -> Connection:
        """Return the connection's row."""

        def work(session: Session) -> Connection:
            return session.get_one(Connection, connection_id)

        return await self.parts.database.read(work)


@asynccontextmanager
async def replica(rig: Rig, server: VaultServer, prefix: str, **stores: str | None) -> AsyncIterator[Replica]:
    variables = {"VAULT_ADDR": server.address, "VAULT_TOKEN": server.token()}
    changes = {"vault_prefix": prefix, "vault_variables": variables, "admin_key": None, **stores}
    settings = rig.parts.settings.model_copy(update=changes)
    async with open_parts(settings, confirm_seconds=0.05) as parts:
        with reserved_socket() as listener:
            base = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with (
                serving(create_app(parts), listener),
                httpx2.AsyncClient(base_url=base, trust_env=False, timeout=60) as http,
            ):
                yield Replica(rig, parts, http)


async def test_every_replica_hands_out_every_renewed_token_at_every_stage(
    vault_server: VaultServer, sqlite_url: str, tmp_path: Path
) -> None:
    store = partial(replica, server=vault_server, prefix=f"broker/{new_id('move')}")
    async with (
        open_rig(tmp_path, database_url=sqlite_url, secret_cache_seconds=0) as rig,
        store(rig, vault="local") as old,
        store(rig, vault="hashicorp", vault_fallback="local") as both,
        store(rig, vault="hashicorp") as new,
    ):
        ids = [(await rig.connected(f"acme:{user}", user))["id"] for user in ("ada", "grace")]
        move = Move(rig.parts.database, both_vault(both).old, both_vault(both).new)
        for replicas in ((old, old), (old, both), (both, both), (both, new), (new, new)):
            for connection_id in ids:
                for one in replicas:
                    before = await one.row(connection_id)
                    await one.parts.credentials.refresh(before)
                    assert (await one.row(connection_id)).secret_version == before.secret_version + 1
                    answers = [await other.token(connection_id) for other in replicas]
                    tokens = {answer.json().get("access_token") for answer in answers}
                    assert [answer.status_code for answer in answers] == [200, 200], answers[-1].text
                    assert len(tokens) == 1
                    assert (await rig.whoami(tokens.pop())).status_code == 200
            assert (await move.passes(quiet)).problems == {}
        refused = await old.token(ids[0])  # it was never restarted, although others know only the new store
        assert (refused.status_code, refused.json()["code"]) == (503, "secret_store_unavailable")
        assert (await new.token(ids[0])).status_code == 200


def both_vault(replica: Replica) -> MovingVault:
    vault: Any = replica.parts.vault
    assert isinstance(vault._vault, TimedVault)
    assert isinstance(vault._vault._vault, MovingVault)
    return vault._vault._vault
