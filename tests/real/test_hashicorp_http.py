"""The broker over a real Vault, through HTTP: secrets in KV, data keys under Transit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.flows.rig import open_rig
from tests.real.vault import VaultServer

pytestmark = pytest.mark.real

BOUND_SECONDS = 8.0  # for two calls


@pytest.fixture
def server(vault_server: VaultServer) -> Iterator[VaultServer]:
    """Give the Vault, and unseal it afterwards."""
    yield vault_server
    vault_server.unseal()


async def test_a_sealed_vault_shows_in_readiness_and_in_hand_outs_and_both_heal(
    server: VaultServer, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(f"VAULT_ADDR={server.address}\nVAULT_TOKEN={server.token()}\n")
    settings: dict[str, Any] = {"vault": "hashicorp", "vault_transit_key": "broker", "secret_cache_seconds": 0}
    async with open_rig(tmp_path, **settings) as rig:
        connection = await rig.connected()
        assert (await rig.token(connection["id"])).status_code == 200
        server.seal()
        refused, ready = await asked_in_time(rig, connection["id"])
        assert (refused.status_code, refused.json()["code"]) == (503, "secret_store_unavailable")
        assert (ready.status_code, ready.json()["failing"]) == (503, {"vault": "The secret store is sealed"})
        server.unseal()
        assert (await rig.token(connection["id"])).status_code == 200
        await asyncio.sleep(1.1)  # readiness is believed for a second
        assert (await rig.backend.get("/health/ready")).status_code == 200


async def asked_in_time(rig: Any, connection_id: str) -> tuple[httpx2.Response, httpx2.Response]:
    await asyncio.sleep(1.1)  # readiness is believed for a second
    started = time.monotonic()
    answers = await rig.token(connection_id), await rig.backend.get("/health/ready")
    assert time.monotonic() - started < BOUND_SECONDS
    return answers
