"""Every class of keys is replaced while two processes serve on PostgreSQL with Vault: no request fails, nothing is left."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from broker.demo.sandbox import SandboxOptions
from broker.imports import Import
from broker.models import rfc3339
from tests.crash.processes import ADMIN, Site, open_site, serve
from tests.real.steady_load import SteadyLoad, ask
from tests.real.vault import VaultServer

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
CONNECTIONS = 800  # each may be forced to refresh every 30 s: 22 a second
ROTATION_SECONDS = 90.0
SETTLED_SECONDS = 4.0
STORES: dict[str, dict[str, Any]] = {
    "kv": {"vault": "hashicorp"},
    "transit": {"vault": "local", "vault_transit_key": "broker"},
}
KEYRING_CLASSES = ("data", "encryption", "audit", "session", "jwt-signing", "webhook-signing")


@contextlib.asynccontextmanager
async def loaded_site(
    vault_server: VaultServer, place: Path, database_url: str, store: str
) -> AsyncIterator[tuple[Site, SteadyLoad, Sequence[Path]]]:
    """Serve from two processes with that store; all connections hold live tokens, the load has not begun."""
    token = vault_server.token(period="1h")
    make = partial(vault_server.settings, token=token, **STORES[store])
    more = {f"BROKER_{name.upper()}": value for name, value in STORES[store].items()}
    more |= {"VAULT_ADDR": vault_server.address, "VAULT_TOKEN": token}
    logs = place / "one.log", place / "two.log"
    options = SandboxOptions(mode="grace", grace_seconds=86_400)
    async with open_site(place, database_url, options, make) as site:
        ids = [await import_live(site, f"user{number}") for number in range(CONNECTIONS)]
        async with serve(site, logs[0], **more) as one, serve(site, logs[1], **more) as two:
            load = SteadyLoad([one, two], site.admin_key, ids)
            yield site, load, logs


async def import_live(site: Site, login: str) -> str:
    """Import a new grant of the user, whose access token is good for an hour; return the connection's id."""
    minted = site.sandbox.state.mint(login, "openid")
    credentials = {"type": "oauth2", "access_token": minted["access_token"], "refresh_token": minted["refresh_token"]}
    wanted = Import("sandbox", f"acme:{login}", {**credentials, "expires_at": rfc3339(time.time() + 3600)})
    return (await site.parts.connections.import_(wanted, ADMIN)).id


def new_key_first(site: Site) -> str:
    """Put a new key-encryption key before the others of the file that all processes read; return its id."""
    path = site.settings.data_dir / "keyring"
    key_id = f"k{secrets.token_hex(4)}"
    line = f"{key_id}:{base64.b64encode(os.urandom(32)).decode()}\n"
    replacement = path.with_suffix(".new")
    replacement.touch(mode=0o600)
    replacement.write_text(line + path.read_text())
    replacement.rename(path)
    return key_id


async def begin(load: SteadyLoad, key_class: str) -> str:
    """Begin a rotation."""
    return str((await ask(load.ports[0], load.key, "POST", f"/v1/keys/{key_class}/rotate", {}))["id"])


async def finished(load: SteadyLoad, rotation_id: str) -> dict[str, Any]:
    """Wait until a rotation is over; it must have ended well."""
    ends_at = time.monotonic() + ROTATION_SECONDS
    while True:
        row: dict[str, Any] = await ask(load.ports[-1], load.key, "GET", f"/v1/rotations/{rotation_id}")
        if row["state"] != "running":
            break
        assert time.monotonic() < ends_at, row
        await asyncio.sleep(0.25)
    assert row["state"] == "done", row
    return row


async def keys_of(load: SteadyLoad, key_class: str) -> list[dict[str, Any]]:
    """Return the keys of a class, as operators see them."""
    report = await ask(load.ports[0], load.key, "GET", "/v1/keys")
    return next(one["keys"] for one in report["data"] if one["class"] == key_class)


async def require_nothing_left(load: SteadyLoad, row: dict[str, Any]) -> None:
    """Fail unless the new key is the current one and nothing is under any other."""
    keys = await keys_of(load, row["class"])
    assert [key["id"] for key in keys if key["state"] == "current"] == [row["new_key"]], keys
    left = {key["id"]: key["sealed"] for key in keys if key["state"] != "current" and key["sealed"]}
    assert left == {}, left
    if row["class"] in {"data", "encryption"}:
        assert {key["state"] for key in keys if key["id"] == row["old_key"]} <= {"retired"}, keys


async def replace_caller_key(load: SteadyLoad) -> None:
    """Give the caller a second key, use it from now on, revoke the first."""
    (caller,) = (await ask(load.ports[0], load.key, "GET", "/v1/callers"))["data"]
    old_id = caller["keys"][0]["id"]
    load.key = (await ask(load.ports[0], load.key, "POST", f"/v1/callers/{caller['id']}/keys", {}))["key"]
    await asyncio.sleep(1.0)
    await ask(load.ports[0], load.key, "DELETE", f"/v1/callers/{caller['id']}/keys/{old_id}")


def classes_of(store: str) -> Sequence[str]:
    """Return the classes to rotate, those whose rotation needs a new key in the keyring included."""
    return KEYRING_CLASSES if store == "kv" else ("encryption", "data")


@pytest.mark.parametrize("store", [*STORES])
async def test_every_class_of_keys_is_replaced_under_load_without_a_failed_request(
    vault_server: VaultServer, tmp_path: Path, postgres_url: str, store: str
) -> None:
    async with loaded_site(vault_server, tmp_path, postgres_url, store) as (site, load, _):
        seconds: dict[str, float] = {}
        async with load.running():
            await asyncio.sleep(SETTLED_SECONDS)
            for key_class in classes_of(store):
                if key_class == "encryption" and store == "kv":
                    new_key_first(site)
                began = time.monotonic()
                row = await finished(load, await begin(load, key_class))
                seconds[key_class] = round(time.monotonic() - began, 1)
                await require_nothing_left(load, row)
            await replace_caller_key(load)
            await asyncio.sleep(SETTLED_SECONDS)
        told = f"{load.rate('hand-out'):.0f} hand-outs and {load.rate('refresh'):.0f} refreshes a second"
        sys.stdout.write(f"\n{store}: {told}, seconds a class: {seconds}, failures: {load.failures[:20]}\n")
        assert load.failures == []
        assert load.cut == 0
        assert load.rate("hand-out") >= 200
        assert load.rate("refresh") >= 20
        counters = site.sandbox.state.counters
        assert (counters.reuse_alarms, counters.concurrent_senders) == (0, 0)
        assert (await site.parts.audit.verify()).ok
