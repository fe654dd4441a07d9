"""Secrets in a real HashiCorp Vault: the contract on KV and on sealed rows under Transit, and what the policy file allows."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.database import Database
from broker.errors import SecretStoreUnavailable
from broker.settings import Settings, SettingsError
from broker.vault import SecretNotFound, SecretUnreadable, Vault, VaultConflict, open_server, open_vault, open_wrapping
from broker.vault.hashicorp import HashicorpVault, Session, Transit
from broker.vault.keyring import open_sealer
from tests.broker.vault.vault_contract import CONTRACT, an_owner
from tests.real.vault import VaultServer

pytestmark = pytest.mark.real

Law = Callable[[Vault], Awaitable[None]]
each_law = pytest.mark.parametrize("check_law", CONTRACT, ids=lambda check: str(check.__name__).removeprefix("check_"))
NO_DATABASE: Any = None  # the store on KV needs none


@asynccontextmanager
async def a_session(settings: Settings) -> AsyncIterator[Session]:
    """Open and close a session, as the process does."""
    server = await open_server(settings)
    assert server is not None
    try:
        yield server
    finally:
        await server.aclose()


@pytest.fixture
async def session(vault_server: VaultServer, tmp_path: Path) -> AsyncIterator[Session]:
    async with a_session(vault_server.settings(tmp_path)) as opened:
        yield opened


@pytest.fixture
def vault(session: Session) -> Vault:
    """Return the store itself, which counts versions as KV does."""
    return HashicorpVault(session, mount="secret", prefix="broker")


@each_law
async def test_key_value_version_2_keeps_the_contract(vault: Vault, check_law: Law) -> None:
    await check_law(vault)


@each_law
async def test_the_store_as_it_is_opened_keeps_the_contract(
    session: Session, vault_server: VaultServer, tmp_path: Path, check_law: Law
) -> None:
    await check_law(await open_vault(vault_server.settings(tmp_path), NO_DATABASE, NO_DATABASE, session))


@each_law
async def test_sealed_rows_under_transit_keep_the_contract(
    vault_server: VaultServer, tmp_path: Path, database: Database, check_law: Law
) -> None:
    settings = vault_server.settings(tmp_path, vault="local", vault_transit_key="broker")
    async with a_session(settings) as server:
        sealer = await open_sealer(database, await open_wrapping(settings, server))
        await check_law(await open_vault(settings, database, sealer, server))


# What is stored


async def test_every_path_demands_check_and_set_and_keeps_at_least_three_versions(
    vault: Vault, vault_server: VaultServer
) -> None:
    owner = an_owner()
    await vault.put(owner, {"n": 1}, expected_version=0)
    told = vault_server.admin("GET", f"secret/metadata/broker/{owner}")["data"]
    assert told["cas_required"] is True
    assert told["max_versions"] >= 3


async def test_a_destroyed_owner_leaves_nothing_in_vault(vault: Vault, vault_server: VaultServer) -> None:
    owner = an_owner()
    for n in range(3):
        await vault.put(owner, {"n": n}, expected_version=n)
    await vault.destroy(owner)
    with vault_server._http() as http:
        assert http.get(f"secret/metadata/broker/{owner}").status_code == 404
        assert http.get(f"secret/data/broker/{owner}?version=1").status_code == 404


async def test_a_secret_that_somebody_copied_to_another_path_does_not_open_there(
    vault: Vault, vault_server: VaultServer
) -> None:
    one, other = an_owner(), an_owner()
    await vault.put(one, {"access_token": "of one"}, expected_version=0)
    copied = vault_server.admin("GET", f"secret/data/broker/{one}")["data"]["data"]
    vault_server.admin("POST", f"secret/data/broker/{other}", {"data": copied})
    with pytest.raises(SecretUnreadable):
        await vault.get(other)
    assert await vault.get(one) == (1, {"access_token": "of one"})


@pytest.mark.parametrize("written", [{}, {"access_token": "x"}, {"owner": "o", "value": "{}"}, {"value": 7}])
async def test_what_the_broker_did_not_write_does_not_open(
    vault: Vault, vault_server: VaultServer, written: dict[str, Any]
) -> None:
    owner = an_owner()
    vault_server.admin("POST", f"secret/data/broker/{owner}", {"data": written})
    with pytest.raises(SecretUnreadable):
        await vault.get(owner)


async def test_a_version_that_an_operator_deleted_is_not_found_and_the_next_one_still_follows(
    vault: Vault, vault_server: VaultServer
) -> None:
    owner = an_owner()
    await vault.put(owner, {"n": 0}, expected_version=0)
    await vault.put(owner, {"n": 1}, expected_version=1)
    vault_server.admin("POST", f"secret/delete/broker/{owner}", {"versions": [2]})
    vault_server.admin("PUT", f"secret/destroy/broker/{owner}", {"versions": [1]})
    for version in (None, 1, 2):
        with pytest.raises(SecretNotFound):
            await vault.get(owner, version)
    with pytest.raises(VaultConflict) as conflict:
        await vault.put(owner, {"n": 2}, expected_version=0)
    assert conflict.value.current == 2
    assert await vault.put(owner, {"n": 2}, expected_version=2) == 3


async def test_a_path_that_never_got_a_version_is_listed_so_that_the_sweeper_finds_it(
    vault: Vault, vault_server: VaultServer
) -> None:
    owner = an_owner()
    vault_server.admin("POST", f"secret/metadata/broker/{owner}", {"cas_required": True})
    assert owner in dict(await vault.owners("connections/"))
    await vault.destroy(owner)
    assert owner not in dict(await vault.owners("connections/"))


@pytest.mark.parametrize("value", [{"n": float("nan")}, {"n": object()}])
async def test_what_is_no_json_is_refused_before_anything_is_sent(vault: Vault, value: dict[str, Any]) -> None:
    owner = an_owner()
    with pytest.raises((ValueError, TypeError)):
        await vault.put(owner, value, expected_version=0)
    assert owner not in dict(await vault.owners(owner))


# The mount


async def refusal_of_mount(vault_server: VaultServer, place: Path, mount: str, *, token: str | None = None) -> str:
    settings = vault_server.settings(place, vault_mount=mount, token=token or vault_server.root_token)
    async with a_session(settings) as server:
        with pytest.raises(SettingsError) as refused:
            await open_vault(settings, NO_DATABASE, NO_DATABASE, server)
    return str(refused.value)


async def test_an_engine_of_version_1_is_refused_by_name(vault_server: VaultServer, tmp_path: Path) -> None:
    vault_server.admin("POST", "sys/mounts/kv-old", {"type": "kv", "options": {"version": "1"}})
    told = await refusal_of_mount(vault_server, tmp_path, "kv-old")
    assert told == "BROKER_VAULT_MOUNT: the engine there is not KV version 2"


async def test_a_mount_that_is_not_there_is_refused_by_name(vault_server: VaultServer, tmp_path: Path) -> None:
    assert await refusal_of_mount(vault_server, tmp_path, "nowhere") == "BROKER_VAULT_MOUNT: there is no engine"


async def test_a_mount_that_deletes_versions_by_itself_is_refused(vault_server: VaultServer, tmp_path: Path) -> None:
    vault_server.admin("POST", "sys/mounts/kv-short", {"type": "kv", "options": {"version": "2"}})
    vault_server.wait_for_kv("kv-short")
    vault_server.admin("POST", "kv-short/config", {"delete_version_after": "1h"})
    assert "delete_version_after" in await refusal_of_mount(vault_server, tmp_path, "kv-short")


# The policy


async def test_outside_of_the_policy_nothing_is_read_written_or_listed(
    session: Session, vault_server: VaultServer
) -> None:
    vault_server.admin("POST", "secret/data/other/app", {"data": {"password": "x"}})
    outside = HashicorpVault(session, mount="secret", prefix="other")
    asked: list[Callable[[], Awaitable[Any]]] = [
        lambda: outside.get("app"),
        lambda: outside.put("app", {}, expected_version=1),
        lambda: outside.put("more", {}, expected_version=0),
        lambda: outside.destroy("app"),
        lambda: outside.owners(""),
        lambda: Transit(session, mount="transit", key="other").reload(),
        lambda: Transit(session, mount="transit", key="other").wrap("dk_1", bytes(32)),
    ]
    for ask in asked:
        with pytest.raises(SecretStoreUnavailable, match="policy does not allow"):
            await ask()
    assert vault_server.admin("GET", "secret/data/other/app")["data"]["data"] == {"password": "x"}


async def test_a_policy_without_the_mounts_configuration_is_enough(vault_server: VaultServer, tmp_path: Path) -> None:
    rules = """
path "secret/+/broker/*" { capabilities = ["create", "read", "update", "delete", "list"] }
path "auth/token/lookup-self" { capabilities = ["read"] }
"""
    vault_server.admin("PUT", "sys/policies/acl/narrower", {"policy": rules})
    settings = vault_server.settings(tmp_path, token=vault_server.token(policies=("narrower",)))
    async with a_session(settings) as server:
        vault = await open_vault(settings, NO_DATABASE, NO_DATABASE, server)
        owner = an_owner()
        assert await vault.put(owner, {"n": 0}, expected_version=0) == 1
        assert [one for one, _ in await vault.owners(owner)] == [owner]


# Transit


@pytest.fixture
async def transit(session: Session) -> Transit:
    found = Transit(session, mount="transit", key="broker")
    await found.reload()
    return found


async def test_a_data_key_opens_under_its_own_id_and_its_own_version_only(transit: Transit) -> None:
    key = secrets.token_bytes(32)
    wrapped_by, wrapped = await transit.wrap("dk_1", key)
    assert wrapped_by == transit.newest_id
    assert key not in wrapped
    assert await transit.unwrap(wrapped_by, "dk_1", wrapped) == key
    wrong = [
        (wrapped_by, "dk_2", wrapped),
        ("transit:broker:v999", "dk_1", wrapped),
        ("transit:other:v1", "dk_1", wrapped),
        (wrapped_by, "dk_1", wrapped[:-8] + b"AAAAAAA="),
        (wrapped_by, "dk_1", b""),
        (wrapped_by, "dk_1", b"vault:v1:AAAA"),
    ]
    for one in wrong:
        with pytest.raises(SecretUnreadable):
            await transit.unwrap(*one)


async def test_a_rotated_key_wraps_what_is_new_and_opens_what_is_old_until_it_is_retired(
    transit: Transit, vault_server: VaultServer
) -> None:
    key = secrets.token_bytes(32)
    old, wrapped = await transit.wrap("dk_1", key)
    before = transit.ids
    new = await transit.rotate()
    assert transit.ids == (new, *before)
    assert (await transit.wrap("dk_2", key))[0] == new
    assert transit.check_value(old) == transit.check_value(new) == ""
    assert await transit.unwrap(old, "dk_1", wrapped) == key
    rewrapped_by, rewrapped = await transit.rewrap(old, "dk_1", wrapped)
    assert (rewrapped_by, await transit.unwrap(new, "dk_1", rewrapped)) == (new, key)
    vault_server.admin("POST", "transit/keys/broker/config", {"min_decryption_version": int(new.rpartition("v")[2])})
    assert await transit.reload()
    assert transit.ids == (new,)
    assert transit.check_value(old) is None
    with pytest.raises(SecretUnreadable):
        await transit.unwrap(old, "dk_1", wrapped)


async def test_a_key_that_is_not_there_is_refused_and_not_made(
    vault_server: VaultServer, tmp_path: Path, session: Session
) -> None:
    settings = vault_server.settings(tmp_path, vault_transit_key="absent", token=vault_server.root_token)
    async with a_session(settings) as server:
        with pytest.raises(SettingsError, match="BROKER_VAULT_TRANSIT_KEY: there is no such key"):
            await open_wrapping(settings, server)
    assert "absent" not in vault_server.admin("GET", "transit/keys?list=true")["data"]["keys"]


@pytest.mark.parametrize("options", [{"type": "rsa-2048"}, {"type": "aes256-gcm96", "derived": True}])
async def test_a_key_that_cannot_bind_an_id_is_refused(
    vault_server: VaultServer, tmp_path: Path, options: dict[str, Any]
) -> None:
    name = f"unfit-{options['type']}"
    vault_server.admin("POST", f"transit/keys/{name}", options)
    settings = vault_server.settings(tmp_path, vault_transit_key=name, token=vault_server.root_token)
    async with a_session(settings) as server:
        with pytest.raises(SettingsError, match="the key must be of type"):
            await open_wrapping(settings, server)


async def test_data_keys_of_the_keyring_open_after_transit_was_switched_on(
    vault_server: VaultServer, tmp_path: Path, database: Database
) -> None:
    before = Settings(env="development", data_dir=tmp_path)
    old = await open_sealer(database, await open_wrapping(before, None))
    sealed = old.seal(b"kept", owner="o", purpose="p", version=1)
    settings = vault_server.settings(tmp_path, vault="local", vault_transit_key="broker")
    async with a_session(settings) as server:
        wrapping = await open_wrapping(settings, server)
        assert wrapping.newest_id.startswith("transit:broker:v")
        sealer = await open_sealer(database, wrapping)
        assert sealer.open(sealed, owner="o", purpose="p", version=1) == b"kept"
