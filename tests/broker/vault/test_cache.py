"""A vault before a vault: what it keeps, for how long, and that nobody can change it or bring it back."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest
import sqlalchemy as sa

from broker.database import opened
from broker.errors import SecretStoreUnavailable
from broker.vault import SecretNotFound, SecretUnreadable, Vault, VaultConflict
from broker.vault.cache import ENTRY_BYTES, MOST_BYTES, CachedVault
from broker.vault.keyring import Keyring, open_sealer, parse_keys
from broker.vault.sealed_rows import SealedRows
from tests.broker.vault.vault_contract import CONTRACT


class Store:
    """A store in memory that counts reads and can be made to wait or to fail."""

    def __init__(self) -> None:
        self.values: dict[str, list[dict[str, Any]]] = {}
        self.reads = 0
        self.read_ahead = 0
        self.gate: asyncio.Event | None = None
        self.down = False

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        await self.put_as(owner, value, expected_version=expected_version, version=expected_version + 1)
        return expected_version + 1

    async def put_as(self, owner: str, value: Mapping[str, Any], *, expected_version: int, version: int) -> None:
        versions = self.values.setdefault(owner, [])
        if len(versions) != expected_version:
            raise VaultConflict(len(versions))
        versions += [{}] * (version - 1 - len(versions)) + [dict(value)]

    def ahead(self, connection: sa.Connection, wanted: Sequence[tuple[str, int]]) -> Sequence[bytes | None]:
        del connection
        self.read_ahead += len(wanted)
        return [b"%d" % version for _, version in wanted]

    async def get(
        self, owner: str, version: int | None = None, *, sealed: bytes | None = None
    ) -> tuple[int, dict[str, Any]]:
        assert sealed in {None, b"%d" % (version or 0)}
        self.reads += 1
        versions = self.values.get(owner, [])
        number = version or len(versions)
        if not 0 < number <= len(versions):
            raise SecretNotFound
        found = dict(versions[number - 1])
        if self.gate is not None:
            await self.gate.wait()
        return number, found

    async def destroy(self, owner: str) -> None:
        if self.down:
            raise SecretStoreUnavailable
        await asyncio.sleep(0)
        self.values.pop(owner, None)

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        return [(owner, 0.0) for owner in self.values if owner.startswith(prefix)]


NOWHERE: Any = object()  # a database connection that is not used


class Clock:
    """A monotonic clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


async def cached(*, seconds: float = 30.0) -> tuple[Store, CachedVault, Clock]:
    store, clock = Store(), Clock()
    vault = CachedVault(store, seconds=seconds, timer=clock)
    await vault.put("o", {"a": [1], "b": {"c": 2}}, expected_version=0)
    return store, vault, clock


@pytest.mark.parametrize("check_law", CONTRACT)
async def test_a_cached_vault_keeps_the_contract(
    sqlite_url: str, check_law: Callable[[Vault], Awaitable[None]]
) -> None:
    keyring = Keyring(parse_keys(f"k:{base64.b64encode(bytes(32)).decode()}", setting="BROKER_KEYRING"))
    async with opened(sqlite_url, migrate=False) as database:
        rows = SealedRows(database, await open_sealer(database, keyring))
        await check_law(CachedVault(rows, seconds=30))


async def test_an_exact_version_comes_from_memory_until_its_time_is_over() -> None:
    store, vault, clock = await cached()
    for _ in range(3):
        assert await vault.get("o", 1) == (1, {"a": [1], "b": {"c": 2}})
    assert store.reads == 1
    clock.now += 31
    await vault.get("o", 1)
    assert store.reads == 2


async def test_the_newest_version_is_always_asked_for() -> None:
    store, vault, _ = await cached()
    await vault.get("o", 1)
    await vault.put("o", {"a": 2}, expected_version=1)
    assert await vault.get("o") == (2, {"a": 2})
    assert await vault.get("o", 2) == (2, {"a": 2})
    assert await vault.get("o", 1) == (1, {"a": [1], "b": {"c": 2}})
    assert store.reads == 3


async def test_zero_seconds_keep_nothing() -> None:
    store, vault, _ = await cached(seconds=0)
    for _ in range(3):
        await vault.get("o", 1)
    assert store.reads == 3
    assert not len(vault._opened)


async def test_what_was_handed_out_can_be_changed_without_changing_what_is_kept() -> None:
    _, vault, _ = await cached()
    for _ in range(3):  # first the store's own answer, then copies of what is kept
        _, value = await vault.get("o", 1)
        assert value == {"a": [1], "b": {"c": 2}}
        value["a"].append(9)
        value["b"]["c"] = 9
        value["d"] = 9


async def test_what_is_in_memory_is_not_read_ahead() -> None:
    store, vault, clock = await cached()
    assert vault.ahead(NOWHERE, [("o", 1), ("p", 2)]) == [b"1", b"2"]
    await vault.get("o", 1, sealed=b"1")
    assert vault.ahead(NOWHERE, [("p", 2), ("o", 1), ("o", 2)]) == [b"2", None, b"2"]
    assert vault.ahead(NOWHERE, [("o", 1)]) == [None]
    assert store.read_ahead == 4
    clock.now += 31
    assert vault.ahead(NOWHERE, [("o", 1)]) == [b"1"]


async def test_what_was_read_ahead_of_a_destroy_is_worth_nothing_after_it(sqlite_url: str) -> None:
    keyring = Keyring(parse_keys(f"k:{base64.b64encode(bytes(32)).decode()}", setting="BROKER_KEYRING"))
    async with opened(sqlite_url, migrate=False) as database:
        vault = CachedVault(SealedRows(database, await open_sealer(database, keyring)), seconds=30)
        for owner in ("connections/con_a", "connections/con_b"):
            await vault.put(owner, {"a": owner}, expected_version=0)
        wanted = [("connections/con_a", 1), ("connections/con_b", 1)]
        first, second = await database.query(lambda one: vault.ahead(one, wanted))
        await vault.destroy("connections/con_a")
        with pytest.raises(SecretNotFound):
            await vault.get("connections/con_a", 1, sealed=first)
        assert await vault.get("connections/con_b", 1, sealed=second) == (1, {"a": "connections/con_b"})
        with pytest.raises(SecretUnreadable):
            await CachedVault(vault, seconds=0).get("connections/con_c", 1, sealed=second)


async def test_an_owner_that_is_written_again_is_read_ahead_again_but_not_what_was_destroyed(sqlite_url: str) -> None:
    keyring = Keyring(parse_keys(f"k:{base64.b64encode(bytes(32)).decode()}", setting="BROKER_KEYRING"))
    owner = "connections/con_a"
    async with opened(sqlite_url, migrate=False) as database:
        rows = SealedRows(database, await open_sealer(database, keyring))
        vault = CachedVault(rows, seconds=0)
        await vault.put(owner, {"a": "old"}, expected_version=0)
        [old] = await database.query(lambda one: vault.ahead(one, [(owner, 1)]))
        await vault.destroy(owner)
        await vault.put_as(owner, {"a": "new"}, expected_version=0, version=2)
        [new] = await database.query(lambda one: vault.ahead(one, [(owner, 2)]))
        with pytest.raises(SecretNotFound):
            await vault.get(owner, 1, sealed=old)
        await rows.destroy(owner)  # so that only what was read ahead can answer
        assert await vault.get(owner, 2, sealed=new) == (2, {"a": "new"})
        await vault.destroy(owner)
        with pytest.raises(SecretNotFound):
            await vault.get(owner, 2, sealed=new)


async def test_a_version_under_a_chosen_number_goes_through_to_the_store() -> None:
    store, vault, _ = await cached()
    await vault.put_as("o", {"a": 5}, expected_version=1, version=5)
    assert await vault.get("o") == (5, {"a": 5})
    with pytest.raises(VaultConflict):
        await vault.put_as("o", {"a": 7}, expected_version=1, version=7)
    assert len(store.values["o"]) == 5


async def test_a_destroyed_secret_is_gone_at_once() -> None:
    _, vault, _ = await cached()
    await vault.get("o", 1)
    await vault.destroy("o")
    with pytest.raises(SecretNotFound):
        await vault.get("o", 1)


async def test_a_read_under_way_does_not_bring_a_destroyed_secret_back() -> None:
    store, vault, _ = await cached()
    store.gate = asyncio.Event()
    reading = asyncio.create_task(vault.get("o", 1))
    await asyncio.sleep(0)
    await vault.destroy("o")
    store.gate.set()
    await reading
    with pytest.raises(SecretNotFound):
        await vault.get("o", 1)


async def test_after_a_clear_every_secret_is_read_anew() -> None:
    store, vault, _ = await cached()
    await vault.get("o", 1)
    await vault.get("o", 1)
    assert store.reads == 1
    vault.clear()
    assert await vault.get("o", 1) == (1, store.values["o"][0])
    assert store.reads == 2


async def test_a_read_under_way_keeps_nothing_past_a_clear() -> None:
    store, vault, _ = await cached()
    store.gate = asyncio.Event()
    reading = asyncio.create_task(vault.get("o", 1))
    await asyncio.sleep(0)
    vault.clear()
    store.gate.set()
    await reading
    await vault.get("o", 1)
    assert store.reads == 2


async def test_a_destroy_that_fails_has_dropped_the_secret_from_memory_all_the_same() -> None:
    store, vault, _ = await cached()
    await vault.get("o", 1)
    store.down = True
    with contextlib.suppress(SecretStoreUnavailable):
        await vault.destroy("o")
    await vault.get("o", 1)
    assert store.reads == 2


async def test_one_entry_can_be_forgotten() -> None:
    store, vault, _ = await cached()
    await vault.get("o", 1)
    vault.forget("o", 2)
    await vault.get("o", 1)
    assert store.reads == 1
    vault.forget("o", 1)
    vault.forget("nobody", 1)
    await vault.get("o", 1)
    assert store.reads == 2


async def test_memory_is_bounded() -> None:
    store, vault, _ = await cached()
    size = 100_000
    fit = MOST_BYTES // (size + ENTRY_BYTES)
    for number in range(fit + 10):
        store.values[f"o{number}"] = [{"a": "b" * size}]
        await vault.get(f"o{number}", 1)
    assert fit - 2 <= len(vault._opened) <= fit
    reads = store.reads
    await vault.get(f"o{fit + 9}", 1)
    assert store.reads == reads  # the newest stayed
    await vault.get("o0", 1)
    assert store.reads == reads + 1


async def test_what_was_let_go_of_makes_room_again() -> None:
    store, vault, _ = await cached()
    store.values["large"] = [{"a": "b" * (MOST_BYTES // 2)}]
    for _ in range(5):
        await vault.get("large", 1)
        vault.forget("large", 1)
    await vault.get("large", 1)
    vault.clear()
    store.values["other"] = [{"a": "b" * (MOST_BYTES // 2)}]
    await vault.get("other", 1)
    assert [*vault._opened] == ["other"]
    assert vault._bytes <= MOST_BYTES // 2 + 1_000


async def test_a_value_that_is_larger_than_all_room_is_not_kept() -> None:
    store, vault, _ = await cached()
    store.values["huge"] = [{"a": "b" * MOST_BYTES}]
    assert await vault.get("huge", 1) == (1, {"a": "b" * MOST_BYTES})
    assert not vault._opened


async def test_owners_come_from_the_store() -> None:
    _, vault, _ = await cached()
    assert await vault.owners("") == [("o", 0.0)]
