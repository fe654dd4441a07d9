"""What goes wrong with a real Vault: each time `secret_store_unavailable` in bounded time, and it heals by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.errors import SecretStoreUnavailable
from broker.vault import SecretNotFound, Vault, VaultConflict, open_server
from broker.vault.hashicorp import HashicorpVault, Session, Transit
from broker.vault.hashicorp.session import DEADLINE_SECONDS
from tests.broker.vault.vault_contract import an_owner
from tests.fakes import Fake, Reply, Seen, listening
from tests.real.vault import Toxic, VaultServer, toxic_proxy

pytestmark = pytest.mark.real

BOUND_SECONDS = DEADLINE_SECONDS + 1.0  # this machine is shared


@pytest.fixture
def server(vault_server: VaultServer) -> Iterator[VaultServer]:
    """Give the Vault, and put it back afterwards as it has to be."""
    yield vault_server
    if vault_server.process is None:
        vault_server.start()
    vault_server.unseal()


@pytest.fixture
async def toxic(server: VaultServer) -> AsyncIterator[Toxic]:
    async with toxic_proxy(server) as proxy:
        yield proxy


@pytest.fixture
async def session(server: VaultServer, toxic: Toxic, tmp_path: Path) -> AsyncIterator[Session]:
    opened = await open_server(server.settings(tmp_path, address=toxic.address))
    assert opened is not None
    yield opened
    await opened.aclose()


@pytest.fixture
def vault(session: Session) -> Vault:
    return HashicorpVault(session, mount="secret", prefix="broker")


async def stored(vault: Vault) -> str:
    owner = an_owner()
    await vault.put(owner, {"access_token": "kept"}, expected_version=0)
    return owner


async def expect_unavailable(ask: Callable[[], Awaitable[Any]], *, why: str | None = None) -> None:
    """Expect the one error, in time."""
    started = time.monotonic()
    with pytest.raises(SecretStoreUnavailable, match=why):
        await ask()
    assert time.monotonic() - started < BOUND_SECONDS


async def expect_every_use_to_fail(vault: Vault, session: Session, owner: str, *, why: str | None = None) -> None:
    transit = Transit(session, mount="transit", key="broker")
    uses: list[Callable[[], Awaitable[Any]]] = [
        lambda: vault.get(owner),
        lambda: vault.get(owner, 1),
        lambda: vault.put(owner, {}, expected_version=1),
        lambda: vault.put(an_owner(), {}, expected_version=0),
        lambda: vault.destroy(owner),
        lambda: vault.owners("connections/"),
        lambda: transit.wrap("dk_1", bytes(32)),
        lambda: transit.unwrap("transit:broker:v1", "dk_1", b"vault:v1:" + b"A" * 80),
        transit.reload,
        transit.rotate,
    ]
    for use in uses:
        await expect_unavailable(use, why=why)


async def test_sealed_and_unsealed(server: VaultServer, vault: Vault, session: Session) -> None:
    owner = await stored(vault)
    server.seal()
    await expect_every_use_to_fail(vault, session, owner, why="is sealed")
    server.unseal()
    assert await vault.get(owner) == (1, {"access_token": "kept"})


async def test_stopped_and_started_again(server: VaultServer, vault: Vault, session: Session) -> None:
    owner = await stored(vault)
    server.stop()
    await expect_every_use_to_fail(vault, session, owner)
    server.start()
    await expect_unavailable(lambda: vault.get(owner), why="is sealed")
    server.unseal()
    assert await vault.get(owner) == (1, {"access_token": "kept"})
    assert await vault.put(owner, {"access_token": "next"}, expected_version=1) == 2


async def test_a_restart_between_two_reads_is_not_noticed(server: VaultServer, vault: Vault) -> None:
    owner = await stored(vault)
    await asyncio.gather(
        *(vault.get(owner) for _ in range(20))
    )  # connections that are kept, and then closed by the server
    server.stop()
    server.start()
    server.unseal()
    assert await asyncio.gather(*(vault.get(owner) for _ in range(20))) == [(1, {"access_token": "kept"})] * 20


async def test_connections_that_are_reset_between_two_reads_are_not_noticed(vault: Vault, toxic: Toxic) -> None:
    owner = await stored(vault)
    for _ in range(3):
        toxic.cut()
        assert await vault.get(owner) == (1, {"access_token": "kept"})


async def test_too_slow_and_fast_again(vault: Vault, session: Session, toxic: Toxic) -> None:
    owner = await stored(vault)
    toxic.delay_seconds = 30
    started = time.monotonic()
    asked = [vault.get(owner), vault.put(owner, {}, expected_version=1), vault.owners("connections/")]
    asked += [vault.get(owner) for _ in range(100)]  # more than there are places: those who wait are in time too
    failures = await asyncio.gather(*asked, return_exceptions=True)
    assert time.monotonic() - started < BOUND_SECONDS
    assert {type(one) for one in failures} == {SecretStoreUnavailable}
    toxic.delay_seconds = 0
    assert (await vault.get(owner))[1] in ({"access_token": "kept"}, {})  # nobody knows what became of the put


async def test_slow_but_in_time_is_fine(vault: Vault, toxic: Toxic) -> None:
    owner = await stored(vault)
    toxic.delay_seconds = 0.5
    assert await vault.get(owner) == (1, {"access_token": "kept"})


async def test_a_cancelled_call_leaves_its_place_to_others(vault: Vault, toxic: Toxic) -> None:
    owner = await stored(vault)
    toxic.delay_seconds = 30
    for _ in range(3):
        tasks = [asyncio.create_task(vault.get(owner)) for _ in range(40)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*tasks, return_exceptions=True)
        )
    toxic.delay_seconds = 0
    assert len(await asyncio.gather(*(vault.get(owner) for _ in range(100)))) == 100


async def test_a_writer_who_lost_is_told_the_version_and_its_value_is_not_kept(vault: Vault) -> None:
    owner = await stored(vault)
    assert await vault.put(owner, {"access_token": "winner"}, expected_version=1) == 2
    with pytest.raises(VaultConflict) as conflict:
        await vault.put(owner, {"access_token": "loser"}, expected_version=1)
    assert conflict.value.current == 2
    assert await vault.get(owner) == (2, {"access_token": "winner"})


async def test_at_start_a_server_that_is_not_there_is_waited_for(server: VaultServer, tmp_path: Path) -> None:
    settings = server.settings(tmp_path)
    server.stop()
    session = await open_server(settings)
    assert session is not None
    vault = HashicorpVault(session, mount="secret", prefix="broker")
    await expect_unavailable(lambda: vault.get("connections/x"))
    server.start()
    server.unseal()
    with pytest.raises(SecretNotFound):
        await vault.get("connections/x")
    await session.aclose()


# A node that answers, but is not the one to ask. The one Vault of these tests has no standby, so a server plays it.


def as_vault_once_alive(state: dict[str, Reply]) -> Callable[[Seen], Reply]:
    """Answer as Vault where ``state`` has no ``reply``, and with that otherwise."""

    def answer(seen: Seen) -> Reply:
        if "reply" in state:
            return state["reply"]
        if seen.path == "/v1/auth/token/lookup-self":
            return 200, {"data": {"ttl": 0, "renewable": False}}
        if seen.path.endswith("/config"):
            return 200, {"data": {"max_versions": 0, "delete_version_after": "0s"}}
        return 404, {"errors": []}

    return answer


def settings_of(place: Path, address: str, **more: str) -> Any:
    (place / ".env").write_text("".join(f"{name}={value}\n" for name, value in more.items()))
    return VaultServer(place, 0).settings(place, address=address, token="hvs.of-the-test")


STANDBY: dict[str, Reply] = {
    "redirects": (307, {"errors": []}, {"Location": "http://127.0.0.1:9/v1/secret"}),
    "standby": (429, {"initialized": True, "sealed": False, "standby": True}),
    "rate limit": (429, {"errors": ["request path: rate limit quota exceeded"]}),
    "recovery secondary": (472, {"initialized": True}),
    "performance standby": (473, {"initialized": True}),
    "no leader": (500, {"errors": ["local node not active but active cluster node not found"]}),
    "a load balancer without a Vault": (503, b"<html>Service Unavailable</html>"),
    "a proxy's own 404": (404, b"<html>Not Found</html>"),
    "no JSON": (200, b"<html>Please log in</html>"),
    "no object": (200, []),
    "not initialized": (501, {"errors": ["Vault is not initialized"]}),
    "engine is upgrading": (400, {"errors": ["Upgrading from non-versioned to versioned data."]}),
}


@pytest.mark.parametrize("case", STANDBY)
async def test_a_node_that_cannot_serve(tmp_path: Path, case: str) -> None:
    state: dict[str, Reply] = {}
    async with listening(as_vault_once_alive(state)) as fake:
        session = await open_server(settings_of(tmp_path, fake.base))
        assert session is not None
        vault = HashicorpVault(session, mount="secret", prefix="broker")
        state["reply"] = STANDBY[case]
        await expect_unavailable(lambda: vault.get("connections/x", 1))
        await expect_unavailable(lambda: vault.put("connections/x", {}, expected_version=1))
        del state["reply"]
        with pytest.raises(SecretNotFound):
            await vault.get("connections/x", 1)
        await session.aclose()


async def test_the_namespace_goes_with_every_request_and_no_environment_variable_redirects_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:9")
    async with listening(as_vault_once_alive({})) as fake:
        session = await open_server(settings_of(tmp_path, fake.base, VAULT_NAMESPACE="teams/payments"))
        assert session is not None
        with pytest.raises(SecretNotFound):
            await HashicorpVault(session, mount="secret", prefix="broker").get("connections/x")
        await session.aclose()
    check_headers(fake)


def check_headers(fake: Fake) -> None:
    assert len(fake.seen) >= 3
    for seen in fake.seen:
        assert seen.headers["x-vault-namespace"] == "teams/payments"
        assert seen.headers["x-vault-token"] == "hvs.of-the-test"
        assert seen.headers["x-vault-request"] == "true"
        assert "cookie" not in seen.headers
