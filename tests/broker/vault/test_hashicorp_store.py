"""The store on KV, Transit and the logins, against a server that behaves like Vault; `tests/real` has the real one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker.database import Database
from broker.egress.internal import InternalClient, Unreachable
from broker.errors import SecretStoreUnavailable
from broker.settings import Settings, SettingsError
from broker.vault import SecretNotFound, SecretUnreadable, Vault, open_server, open_vault, open_wrapping
from broker.vault.hashicorp import HashicorpVault, Session, Transit, TransitBeforeKeyring
from broker.vault.keyring import open_sealer
from tests.broker.vault.fake_vault import DENIED, NOT_FOUND, FakeVault, fake_vault, refused
from tests.broker.vault.vault_contract import CONTRACT, an_owner
from tests.fakes import Reply

NO_DATABASE: Any = None


@pytest.fixture
async def fake() -> AsyncIterator[FakeVault]:
    async with fake_vault() as server:
        yield server


@asynccontextmanager
async def a_session(settings: Settings) -> AsyncIterator[Session]:
    session = await open_server(settings)
    assert session is not None
    try:
        yield session
    finally:
        await session.aclose()


@pytest.fixture
async def session(fake: FakeVault, tmp_path: Path) -> AsyncIterator[Session]:
    async with a_session(fake.settings(tmp_path)) as opened:
        yield opened


@pytest.fixture
def vault(session: Session) -> Vault:
    return HashicorpVault(session, mount="secret", prefix="broker")


async def check_serves(session: Session) -> None:
    with pytest.raises(SecretNotFound):
        await HashicorpVault(session, mount="secret", prefix="broker").get("connections/none")


async def check_refuses(session: Session, *, why: str | None = None) -> None:
    with pytest.raises(SecretStoreUnavailable, match=why):
        await HashicorpVault(session, mount="secret", prefix="broker").get("connections/none")


@pytest.mark.parametrize("check_law", CONTRACT, ids=lambda check: str(check.__name__).removeprefix("check_"))
async def test_key_value_version_2_keeps_the_contract(
    vault: Vault, check_law: Callable[[Vault], Awaitable[None]]
) -> None:
    await check_law(vault)


# The store


async def test_paths_demand_check_and_set_and_everything_carries_the_token(vault: Vault, fake: FakeVault) -> None:
    owner = an_owner()
    await vault.put(owner, {"n": 1}, expected_version=0)
    kept = fake.paths[f"broker/{owner}"]
    assert (kept.settings["cas_required"], kept.settings["max_versions"]) == (True, 3)
    assert kept.versions[1] == {"owner": owner, "value": '{"n":1}'}
    assert {seen.headers["x-vault-token"] for seen in fake.seen} == {*fake.tokens}
    assert vault.ahead(NO_DATABASE, [(owner, 1), (owner, 2)]) == [None, None]


@pytest.mark.parametrize(
    "written", [None, [], {"owner": "x", "value": "{}"}, {"owner": 1}, {"value": "{}"}, {"owner": "o", "value": "["}]
)
async def test_what_the_broker_did_not_write_does_not_open(vault: Vault, fake: FakeVault, written: Any) -> None:
    await vault.put("o", {"n": 1}, expected_version=0)
    fake.paths["broker/o"].versions[1] = written
    with pytest.raises(SecretUnreadable):
        await vault.get("o")


@pytest.mark.parametrize("text", ["[]", "7", "null", "{", ""])
async def test_a_text_that_is_no_object_does_not_open(vault: Vault, fake: FakeVault, text: str) -> None:
    await vault.put("o", {"n": 1}, expected_version=0)
    fake.paths["broker/o"].versions[1] = {"owner": "o", "value": text}
    with pytest.raises(SecretUnreadable):
        await vault.get("o")


ELSEWHERE: list[Callable[[Vault], Awaitable[Any]]] = [
    lambda vault: vault.get("o"),
    lambda vault: vault.get("o", 1),
    lambda vault: vault.put("o", {}, expected_version=0),
    lambda vault: vault.put("o", {}, expected_version=1),
    lambda vault: vault.destroy("o"),
    lambda vault: vault.owners(""),
]
TROUBLE: dict[str, tuple[Reply, str]] = {
    "sealed": (refused(503, "Vault is sealed"), "is sealed"),
    "standby": ((307, {}, {"Location": "http://127.0.0.1:9/"}), "standby"),
    "busy": (refused(429, "rate limit quota exceeded"), "overloaded"),
    "policy": (DENIED, "policy does not allow"),
    "other": (refused(500, "internal error"), "cannot serve"),
    "not mounted": (refused(404, "no handler for route"), "nothing mounted"),
    "not Vault": ((200, b"<html>"), "cannot serve"),
    "strange": (refused(400, "Upgrading from non-versioned to versioned data"), "does not take this request"),
}


@pytest.mark.parametrize("case", TROUBLE)
async def test_trouble_has_one_error_for_every_use_and_is_over_when_it_is_over(
    vault: Vault, fake: FakeVault, case: str
) -> None:
    await vault.put("o", {"n": 1}, expected_version=0)
    reply, why = TROUBLE[case]
    fake.instead = lambda seen: reply if "/secret/" in seen.path else None
    for use in ELSEWHERE:
        with pytest.raises(SecretStoreUnavailable, match=why):
            await use(vault)
    fake.instead = lambda _: None
    assert await vault.get("o", 1) == (1, {"n": 1})


async def test_a_sweep_that_breaks_off_says_so(vault: Vault, fake: FakeVault) -> None:
    for n in range(20):
        await vault.put(f"connections/{n}", {}, expected_version=0)
    fake.instead = lambda seen: refused(500, "x") if seen.path.endswith("metadata/broker/connections/7") else None
    with pytest.raises(SecretStoreUnavailable):
        await vault.owners("connections/")


async def test_an_owner_that_is_destroyed_during_a_listing_is_left_out(vault: Vault, fake: FakeVault) -> None:
    for name in ("a", "b"):
        await vault.put(f"connections/{name}", {}, expected_version=0)
    fake.instead = lambda seen: NOT_FOUND if seen.path.endswith("metadata/broker/connections/a") else None
    assert [owner for owner, _ in await vault.owners("")] == ["connections/b"]


# The mount


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "the engine there is not KV version 2"),
        ({"password": "x"}, "the engine there is not KV version 2"),
        ({"max_versions": 0, "delete_version_after": "3600s"}, "delete_version_after is set there"),
    ],
)
async def test_an_unfit_mount_is_refused_at_start_and_later(
    fake: FakeVault, session: Session, tmp_path: Path, config: dict[str, Any] | None, told: str
) -> None:
    fake.config = config
    with pytest.raises(SettingsError, match=f"BROKER_VAULT_MOUNT: {told}"):
        await open_vault(fake.settings(tmp_path), NO_DATABASE, NO_DATABASE, session)
    await check_refuses(session, why=told)


async def test_a_mount_that_is_not_there_is_refused(fake: FakeVault, session: Session, tmp_path: Path) -> None:
    settings = fake.settings(tmp_path, vault_mount="nowhere")
    with pytest.raises(SettingsError, match="BROKER_VAULT_MOUNT: there is no engine"):
        await open_vault(settings, NO_DATABASE, NO_DATABASE, session)


async def test_a_configuration_that_may_not_be_read_is_taken_for_a_yes(
    fake: FakeVault, session: Session, tmp_path: Path
) -> None:
    fake.instead = lambda seen: DENIED if seen.path.endswith("/config") else None
    vault = await open_vault(fake.settings(tmp_path), NO_DATABASE, NO_DATABASE, session)
    assert await vault.put("o", {}, expected_version=0) == 1


async def test_a_store_that_cannot_be_asked_at_start_opens_and_is_checked_later(
    fake: FakeVault, tmp_path: Path
) -> None:
    fake.instead = lambda _: refused(503, "Vault is sealed")
    with capture_logs() as lines:
        async with a_session(fake.settings(tmp_path)) as session:
            await open_vault(fake.settings(tmp_path), NO_DATABASE, NO_DATABASE, session)
            await check_refuses(session, why="is sealed")
            fake.instead = lambda _: None
            await check_serves(session)
    assert [line["event"] for line in lines] == ["vault.not_available_at_start", "vault.logged_in"]


async def test_a_store_without_its_server_is_refused(fake: FakeVault, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="BROKER_VAULT"):
        await open_vault(fake.settings(tmp_path), NO_DATABASE, NO_DATABASE, None)
    assert await open_server(Settings(env="development")) is None


# Tokens


async def test_a_policy_that_refuses_costs_no_login(fake: FakeVault, tmp_path: Path) -> None:
    fake.secret_ids = {"s"}
    settings = fake.settings(tmp_path, vault_auth="approle", vault_role_id="role", vault_secret_id="s")
    async with a_session(settings) as session:
        fake.instead = lambda seen: DENIED if "/secret/data" in seen.path else None
        for _ in range(5):
            await check_refuses(session, why="policy")
        assert fake.logins == 1
        fake.instead = lambda _: None
        fake.tokens.clear()
        await asyncio.gather(*(check_serves(session) for _ in range(20)))
        assert fake.logins == 2
    assert fake.tokens == {}, "revoked at the end"


async def test_a_new_token_that_is_refused_too_is_not_replaced_again(fake: FakeVault, tmp_path: Path) -> None:
    fake.secret_ids = {"s"}
    settings = fake.settings(tmp_path, vault_auth="approle", vault_role_id="role", vault_secret_id="s")
    async with a_session(settings) as session:
        fake.tokens.clear()
        fake.instead = lambda seen: DENIED if "/secret/data" in seen.path else None
        await check_refuses(session, why="policy")
        assert fake.logins == 2


async def test_a_login_that_is_refused_is_not_repeated_for_a_second(fake: FakeVault, tmp_path: Path) -> None:
    fake.secret_ids = {"s"}
    settings = fake.settings(tmp_path, vault_auth="approle", vault_role_id="role", vault_secret_id="s")
    async with a_session(settings) as session:
        fake.tokens.clear()
        fake.secret_ids = set()
        with capture_logs() as lines:
            for _ in range(10):
                await check_refuses(session, why="does not let the broker in")
        assert [line["event"] for line in lines] == ["vault.login_refused"]
        fake.secret_ids = {"s"}
        await asyncio.sleep(1.1)
        await check_serves(session)


@pytest.mark.parametrize("reply", [(200, {}), (200, {"auth": {}}), (200, {"auth": {"client_token": "x"}}), (200, b"<")])
async def test_a_login_that_is_answered_with_nonsense_is_none(fake: FakeVault, tmp_path: Path, reply: Reply) -> None:
    fake.secret_ids = {"s"}
    settings = fake.settings(tmp_path, vault_auth="approle", vault_role_id="role", vault_secret_id="s")
    fake.instead = lambda seen: reply if seen.path.endswith("login") else None
    async with a_session(settings) as session:
        await check_refuses(session)
        fake.instead = lambda _: None
        await check_serves(session)


async def test_what_a_token_tells_of_itself_may_be_nonsense(fake: FakeVault, tmp_path: Path) -> None:
    settings = fake.settings(tmp_path, token="hvs.CANARY")
    fake.tokens["hvs.CANARY"] = {}
    async with a_session(settings) as session:
        await check_refuses(session, why="does not answer")


async def test_a_refused_token_refuses_the_start_by_name(fake: FakeVault, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^VAULT_TOKEN: Vault refuses this login$"):
        await open_server(fake.settings(tmp_path, token="hvs.CANARY"))


async def renewed(fake: FakeVault) -> None:
    while not any(seen.path.endswith("renew-self") for seen in fake.seen):  # noqa: ASYNC110 - of the other side
        await asyncio.sleep(0.01)


async def logged_in_again(fake: FakeVault, times: int) -> None:
    while fake.logins < times:  # noqa: ASYNC110 - of the other side
        await asyncio.sleep(0.01)


async def test_a_token_is_renewed_until_little_is_given_and_then_replaced(fake: FakeVault, tmp_path: Path) -> None:
    fake.secret_ids = {"s"}
    fake.lease = {"lease_duration": 1, "renewable": True}
    fake.renewals = [1, 0]
    settings = fake.settings(tmp_path, vault_auth="approle", vault_role_id="role", vault_secret_id="s")
    async with a_session(settings), asyncio.timeout(10):
        await logged_in_again(fake, 2)
        assert fake.renewals == []


@pytest.mark.parametrize("reply", [refused(403, "x"), refused(503, "Vault is sealed"), (200, b"<html>"), (200, {})])
async def test_a_renewal_that_fails_ends_in_a_login(fake: FakeVault, tmp_path: Path, reply: Reply) -> None:
    fake.secret_ids = {"s"}
    fake.lease = {"lease_duration": 1, "renewable": True}
    fake.instead = lambda seen: reply if seen.path.endswith("renew-self") else None
    settings = fake.settings(tmp_path, vault_auth="approle", vault_role_id="role", vault_secret_id="s")
    async with a_session(settings), asyncio.timeout(10):
        await logged_in_again(fake, 2)
        await renewed(fake)
        assert len(fake.tokens) == 2


async def test_a_token_that_cannot_be_renewed_is_replaced_before_it_ends(fake: FakeVault, tmp_path: Path) -> None:
    fake.secret_ids = {"s"}
    fake.lease = {"lease_duration": 1, "renewable": False}
    settings = fake.settings(tmp_path, vault_auth="approle", vault_role_id="role", vault_secret_id="s")
    started = time.monotonic()
    async with a_session(settings), asyncio.timeout(10):
        await logged_in_again(fake, 2)
    assert time.monotonic() - started > 0.5
    assert not any(seen.path.endswith("renew-self") for seen in fake.seen)


async def test_that_a_given_token_will_end_is_said(fake: FakeVault, tmp_path: Path) -> None:
    with capture_logs() as lines:
        async with a_session(fake.settings(tmp_path, token=fake.new_token(ttl=60))) as session:
            await check_serves(session)
    assert ("vault.token_ends", "warning") in [(line["event"], line["log_level"]) for line in lines]
    assert len(fake.tokens) == 1, "it is not ours to revoke"


# Other ways to log in


async def test_a_wrapped_secret_id_serves_for_later_logins(fake: FakeVault, tmp_path: Path) -> None:
    fake.secret_ids, fake.wrapped = {"s"}, {"w": ("auth/approle/role/any/secret-id", "s")}
    given = {"vault_auth": "approle", "vault_role_id": "role", "vault_secret_id": "w", "vault_secret_id_wrapped": True}
    async with a_session(fake.settings(tmp_path, **given)) as session:
        fake.tokens.clear()
        await check_serves(session)
    with capture_logs() as lines, pytest.raises(SettingsError, match="BROKER_VAULT_SECRET_ID: the wrapping token"):
        await open_server(fake.settings(tmp_path, **given))
    assert "critical" in [line["log_level"] for line in lines]


async def test_a_wrapping_token_of_another_origin_is_not_opened(fake: FakeVault, tmp_path: Path) -> None:
    fake.secret_ids, fake.wrapped = {"s"}, {"w": ("sys/wrapping/wrap", "s")}
    given = {"vault_auth": "approle", "vault_role_id": "role", "vault_secret_id": "w", "vault_secret_id_wrapped": True}
    with pytest.raises(SettingsError, match="holds no secret id"):
        await open_server(fake.settings(tmp_path, **given))
    assert fake.wrapped


async def test_a_sealed_vault_leaves_the_wrapping_token_for_later(fake: FakeVault, tmp_path: Path) -> None:
    fake.secret_ids, fake.wrapped = {"s"}, {"w": ("auth/approle/role/any/secret-id", "s")}
    given = {"vault_auth": "approle", "vault_role_id": "role", "vault_secret_id": "w", "vault_secret_id_wrapped": True}
    fake.instead = lambda _: refused(503, "Vault is sealed")
    async with a_session(fake.settings(tmp_path, **given)) as session:
        await check_refuses(session)
        fake.instead = lambda _: None
        await check_serves(session)


async def test_files_are_read_for_each_login(fake: FakeVault, tmp_path: Path) -> None:
    fake.pods = {"jwt-1"}
    file = tmp_path / "token"
    given = {"vault_auth": "kubernetes", "vault_kubernetes_role": "broker", "vault_kubernetes_token_file": file}
    settings = fake.settings(tmp_path, **given)
    with pytest.raises(SettingsError, match="BROKER_VAULT_KUBERNETES_TOKEN_FILE: cannot be read"):
        await open_server(settings)
    file.write_text("jwt-1\n")
    async with a_session(settings) as session:
        fake.tokens.clear()
        fake.pods = {"jwt-2"}
        file.write_text("jwt-2")
        await check_serves(session)


# Transit


async def transit_of(session: Session) -> Transit:
    found = Transit(session, mount="transit", key="broker")
    await found.reload()
    return found


async def test_transit_wraps_for_one_id_and_goes_through_its_versions(fake: FakeVault, session: Session) -> None:
    transit = await transit_of(session)
    old, wrapped = await transit.wrap("dk_1", bytes(32))
    assert (old, transit.newest_id, transit.ids) == ("transit:broker:v1",) * 2 + (("transit:broker:v1",),)
    assert await transit.unwrap(old, "dk_1", wrapped) == bytes(32)
    assert await transit.rotate() == "transit:broker:v2"
    assert await transit.rewrap(old, "dk_1", wrapped) != (old, wrapped)
    fake.oldest = 2
    assert await transit.reload()
    assert not await transit.reload()
    assert (transit.check_value(old), transit.check_value("transit:broker:v2")) == (None, "")
    assert repr(transit) == "Transit(transit:broker:v2)"
    wrong: list[tuple[str, str, Any]] = [
        (old, "dk_1", wrapped),
        ("transit:broker:v2", "dk_1", wrapped),
        (old, "dk_1", "vault:v1:text"),
        (old, "dk_1", b"vault:v1:x"),
    ]
    for one in wrong:
        with pytest.raises(SecretUnreadable):
            await transit.unwrap(*one)
    for_another = await transit.wrap("dk_2", bytes(32))
    with pytest.raises(SecretUnreadable):
        await transit.unwrap(for_another[0], "dk_1", for_another[1])


@pytest.mark.parametrize(
    ("change", "told"),
    [({"key": "absent"}, "there is no such key"), ({"mount": "nowhere"}, "there is no such key")],
)
async def test_a_transit_key_that_is_not_there_is_refused(session: Session, change: dict[str, str], told: str) -> None:
    with pytest.raises(SettingsError, match=f"BROKER_VAULT_TRANSIT_KEY: {told}"):
        await Transit(session, **{"mount": "transit", "key": "broker", **change}).reload()


async def test_a_transit_key_of_another_kind_is_refused(fake: FakeVault, session: Session) -> None:
    fake.kind = "rsa-4096"
    with pytest.raises(SettingsError, match="must be of type"):
        await transit_of(session)


@pytest.mark.parametrize("reply", [refused(400, "x"), (200, {"data": {}}), (200, {"data": {"ciphertext": "x"}})])
async def test_transit_that_does_not_wrap_is_unavailable(fake: FakeVault, session: Session, reply: Reply) -> None:
    transit = await transit_of(session)
    wrapped_by, wrapped = await transit.wrap("dk_1", bytes(32))
    fake.instead = lambda seen: reply if "/transit/" in seen.path else None
    with pytest.raises(SecretStoreUnavailable):
        await transit.wrap("dk_1", bytes(32))
    with pytest.raises(SecretUnreadable):
        await transit.unwrap(wrapped_by, "dk_1", wrapped)


async def test_transit_that_may_not_rotate_or_is_sealed_says_so(fake: FakeVault, session: Session) -> None:
    transit = await transit_of(session)
    fake.instead = lambda seen: refused(400, "x") if seen.path.endswith("rotate") else None
    with pytest.raises(SecretStoreUnavailable, match="does not rotate"):
        await transit.rotate()
    fake.instead = lambda _: refused(503, "Vault is sealed")
    with pytest.raises(SecretStoreUnavailable, match="is sealed"):
        await transit.reload()


async def test_after_the_keyring_transit_wraps_and_both_open(
    fake: FakeVault, session: Session, tmp_path: Path, database: Database
) -> None:
    settings = fake.settings(tmp_path, vault_transit_key="broker")
    assert isinstance(await open_wrapping(settings, session), Transit)
    before = await open_wrapping(Settings(env="development", data_dir=tmp_path), None)
    sealed = (await open_sealer(database, before)).seal(b"kept", owner="o", purpose="p", version=1)
    wrapping = await open_wrapping(settings, session)
    assert isinstance(wrapping, TransitBeforeKeyring)
    assert wrapping.ids == ("transit:broker:v1", *before.ids)
    assert repr(wrapping) == f"TransitBeforeKeyring({', '.join(wrapping.ids)})"
    assert (await open_sealer(database, wrapping)).open(sealed, owner="o", purpose="p", version=1) == b"kept"
    assert await wrapping.rotate() == wrapping.newest_id == "transit:broker:v2"
    assert not await wrapping.reload()
    key_id, wrapped = await wrapping.wrap("dk_1", bytes(32))
    assert (key_id, await wrapping.unwrap(key_id, "dk_1", wrapped)) == ("transit:broker:v2", bytes(32))
    assert wrapping.check_value(before.newest_id) == before.check_value(before.newest_id)


# The client


async def test_an_answer_that_never_comes_is_given_up_in_time() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        gone.set()

    gone = asyncio.Event()
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    client = InternalClient(address_of(server), ca_file=None, setting="X", connections=1)
    async with server:
        started = time.monotonic()
        with pytest.raises(Unreachable, match="TimeoutError"):
            await client.send("GET", "/", headers={}, timeout_seconds=0.3)
        assert time.monotonic() - started < 2
        await client.aclose()
        await gone.wait()


async def test_a_get_is_sent_again_when_the_connection_breaks_and_a_post_is_not() -> None:
    came: list[bytes] = []

    async def hangs_up_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.readuntil(b"\r\n\r\n"))
        if len(came) > 1:
            writer.write(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(hangs_up_first, "127.0.0.1", 0)
    client = InternalClient(address_of(server), ca_file=None, setting="X", connections=1)
    async with server:
        assert (await client.send("GET", "/x", headers={}, timeout_seconds=5)).status == 204
        assert len(came) == 2
        came.clear()
        with pytest.raises(Unreachable):
            await client.send("POST", "/x", headers={}, timeout_seconds=5)
        assert len(came) == 1
        await client.aclose()


def address_of(server: asyncio.Server) -> str:
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_a_file_without_authorities_is_refused_by_name(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path):
        with pytest.raises(SettingsError, match=r"^VAULT_CACERT: cannot be read"):
            InternalClient("https://vault.test", ca_file=file, setting="VAULT_CACERT", connections=1)
