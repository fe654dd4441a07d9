"""The contract of every vault, as checks that each implementation's tests run; all of it can be said in KV v2 with cas.

A test module gives a fixture ``vault`` and runs ``CONTRACT`` over it. The checks use owners of their own, so that the
store may be shared and need not be empty, and ask nothing about versions that are older than the newest three.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from broker.models import new_id
from broker.vault import SecretNotFound, Vault, VaultConflict

CLOCKS_MAY_DIFFER_SECONDS = 300
VALUE: dict[str, Any] = {
    "access_token": 't-äö\u2028\U0001f511 "quoted" \\ \n',
    "expires_at": 1_764_000_000.25,
    "uses": 2**53 + 1,
    "negative": -1,
    "live": True,
    "nothing": None,
    "scopes": ["repo", "read:org"],
    "": "an empty name",
}


def an_owner() -> str:
    """Return an owner that nobody else has."""
    return f"connections/{new_id('con')}"


async def check_a_value_comes_back_as_it_was(vault: Vault) -> None:
    owner = an_owner()
    assert await vault.put(owner, VALUE, expected_version=0) == 1
    assert await vault.get(owner) == (1, VALUE)
    assert await vault.get(owner, 1) == (1, VALUE)


async def check_a_large_value_comes_back_as_it_was(vault: Vault) -> None:
    owner, value = an_owner(), {"private_key": "0123456789abcdef" * 8192}
    await vault.put(owner, value, expected_version=0)
    assert await vault.get(owner) == (1, value)


async def check_versions_grow_by_one_and_none_means_the_newest(vault: Vault) -> None:
    owner = an_owner()
    versions = [await vault.put(owner, {"n": n}, expected_version=n) for n in range(5)]
    assert versions == [1, 2, 3, 4, 5]
    assert await vault.get(owner) == (5, {"n": 4})


async def check_the_newest_three_versions_are_kept(vault: Vault) -> None:
    owner = an_owner()
    for n in range(5):
        await vault.put(owner, {"n": n}, expected_version=n)
    assert [await vault.get(owner, version) for version in (3, 4, 5)] == [(3, {"n": 2}), (4, {"n": 3}), (5, {"n": 4})]


async def check_an_unknown_owner_has_no_secret(vault: Vault) -> None:
    owner = an_owner()
    with pytest.raises(SecretNotFound):
        await vault.get(owner)
    with pytest.raises(SecretNotFound):
        await vault.get(owner, 1)


async def check_versions_that_never_were_are_not_found(vault: Vault) -> None:
    owner = an_owner()
    await vault.put(owner, {"n": 0}, expected_version=0)
    for version in (0, 2, 1000):  # version 0 is the trap: KV v2 takes it for "the newest"
        with pytest.raises(SecretNotFound):
            await vault.get(owner, version)


async def check_a_writer_that_expects_another_version_conflicts_and_changes_nothing(vault: Vault) -> None:
    owner = an_owner()
    await vault.put(owner, {"n": 0}, expected_version=0)
    await vault.put(owner, {"n": 1}, expected_version=1)
    for expected in (0, 1, 3):
        with pytest.raises(VaultConflict) as conflict:
            await vault.put(owner, {"n": "wrong"}, expected_version=expected)
        assert conflict.value.current == 2
    assert await vault.get(owner) == (2, {"n": 1})
    assert await vault.get(owner, 1) == (1, {"n": 0})


async def check_an_absent_owner_conflicts_with_every_version_but_0(vault: Vault) -> None:
    owner = an_owner()
    with pytest.raises(VaultConflict) as conflict:
        await vault.put(owner, {"n": 0}, expected_version=1)
    assert conflict.value.current == 0
    with pytest.raises(SecretNotFound):
        await vault.get(owner)


async def check_of_writers_at_once_exactly_one_wins(vault: Vault) -> None:
    owner = an_owner()
    for expected in (0, 1):
        attempts = [vault.put(owner, {"writer": n}, expected_version=expected) for n in range(8)]
        results = await asyncio.gather(*attempts, return_exceptions=True)
        winners = [n for n, result in enumerate(results) if result == expected + 1]
        assert len(winners) == 1
        assert all(isinstance(one, VaultConflict) for n, one in enumerate(results) if n not in winners), results
        assert await vault.get(owner) == (expected + 1, {"writer": winners[0]})


async def check_destroy_takes_every_version_and_nobody_elses(vault: Vault) -> None:
    owner = an_owner()
    neighbours = (f"{owner}b", f"{owner}/below", an_owner())
    for one in (owner, *neighbours):
        await vault.put(one, {"of": one}, expected_version=0)
        await vault.put(one, {"of": one}, expected_version=1)
    await vault.destroy(owner)
    for version in (None, 1, 2):
        with pytest.raises(SecretNotFound):
            await vault.get(owner, version)
    assert [await vault.get(one) for one in neighbours] == [(2, {"of": one}) for one in neighbours]


async def check_destroying_what_is_not_there_is_fine(vault: Vault) -> None:
    owner = an_owner()
    await vault.destroy(owner)
    await vault.put(owner, VALUE, expected_version=0)
    await vault.destroy(owner)
    await vault.destroy(owner)
    assert owner not in dict(await vault.owners(owner))


async def check_after_destroy_the_owner_is_new(vault: Vault) -> None:
    owner = an_owner()
    await vault.put(owner, {"n": 0}, expected_version=0)
    await vault.put(owner, {"n": 1}, expected_version=1)
    await vault.destroy(owner)
    with pytest.raises(VaultConflict) as conflict:
        await vault.put(owner, {"n": 2}, expected_version=2)
    assert conflict.value.current == 0
    assert await vault.put(owner, {"n": 3}, expected_version=0) == 1
    assert await vault.get(owner) == (1, {"n": 3})


async def check_owners_lists_what_begins_with_the_prefix_exactly(vault: Vault) -> None:
    root = f"{new_id('list')}_x"  # the underscore stands for any character where a prefix is taken for a pattern
    inside = {f"{root}/one", f"{root}/two", f"{root}/two/below"}
    outside = {f"{root[:-2]}-x/one", f"{root[:-1]}X/one", f"{root}y", root}
    for owner in inside | outside:
        await vault.put(owner, {"of": owner}, expected_version=0)
    listed = [owner for owner, _ in await vault.owners(f"{root}/")]
    assert sorted(listed) == sorted(inside)
    assert {owner for owner, _ in await vault.owners(f"{root}/tw")} == {f"{root}/two", f"{root}/two/below"}
    assert await vault.owners(f"{root}/%") == []
    assert await vault.owners(f"{root}/none/") == []


async def check_owners_gives_the_time_of_the_newest_version(vault: Vault) -> None:
    owner = an_owner()
    await vault.put(owner, {"n": 0}, expected_version=0)
    first = dict(await vault.owners(owner))[owner]
    await asyncio.sleep(0.02)
    await vault.put(owner, {"n": 1}, expected_version=1)
    second = dict(await vault.owners(owner))[owner]
    assert abs(first - time.time()) < CLOCKS_MAY_DIFFER_SECONDS
    assert first < second


async def check_what_the_caller_does_to_its_values_does_not_reach_the_store(vault: Vault) -> None:
    owner, value = an_owner(), {"scopes": ["repo"]}
    await vault.put(owner, value, expected_version=0)
    value["scopes"].append("admin")
    _, read = await vault.get(owner, 1)
    read["more"] = True
    assert await vault.get(owner, 1) == (1, {"scopes": ["repo"]})


CONTRACT: list[Callable[[Vault], Awaitable[None]]] = [
    check for name, check in list(globals().items()) if name.startswith("check_")
]
