"""Secrets move between stores while both are used: version numbers stay, nothing is lost, what is not there is refused."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from broker.database import Database, open_database
from broker.errors import SecretStoreUnavailable
from broker.models import ClientSecret, Connection, SealedSecret, new_id
from broker.settings import Settings
from broker.vault import SecretNotFound, SecretUnreadable, Store, Vault, VaultConflict, open_vault
from broker.vault.hashicorp import new_session
from broker.vault.keyring import Keyring, open_sealer, parse_keys
from broker.vault.moving import Held, Move, MovingVault, Pass, judge, named_versions
from broker.vault.numbering import NUMBER, Numbered
from broker.vault.sealed_rows import SealedRows
from tests.broker.vault.vault_contract import CONTRACT, an_owner
from tests.commands import broker, running

KEYRING = "kek-1:" + base64.b64encode(bytes(range(32))).decode()
ROWS = SealedSecret.__table__  # type: ignore[attr-defined]
Check = Callable[[Vault], Awaitable[None]]


async def opened_rows(url: str) -> SealedRows:
    database = open_database(url)
    await database.migrate()
    return SealedRows(database, await open_sealer(database, Keyring(parse_keys(KEYRING, setting="BROKER_KEYRING"))))


@pytest.fixture
async def old(database: Database, database_url: str) -> AsyncIterator[SealedRows]:
    """Give the store that is moved from; the rows that name its secrets are in the same database, ``database``."""
    store = await opened_rows(database_url)
    yield store
    await store.database.aclose()


@pytest.fixture
async def rows(tmp_path: Path) -> AsyncIterator[SealedRows]:
    """Give a second store in a database of its own."""
    store = await opened_rows(f"sqlite:///{tmp_path / 'other.db'}")
    yield store
    await store.database.aclose()


@pytest.fixture(params=["its own numbers", "numbers beside the value"])
def new(rows: SealedRows, request: pytest.FixtureRequest) -> Store:
    """Return the store that is moved to: one that can be told a number, and one that counts by itself, as KV v2 does."""
    return rows if request.param == "its own numbers" else Numbered(rows)


@pytest.fixture
def both(new: Store, old: SealedRows) -> MovingVault:
    return MovingVault(new, old)


@pytest.fixture
def move(database: Database, old: SealedRows, new: Store) -> Move:
    return Move(database, old, new)


async def name(database: Database, *owners: str, version: int = 1) -> None:
    """Make rows that name these owners' secrets."""
    made = [
        Connection(
            id=owner.removeprefix("connections/"),
            integration="x",
            provider="x",
            status="active",
            account_id=owner,
            secret_version=version,
            created_at=1.0,
        )
        for owner in owners
    ]
    await database.transaction(lambda session: session.add_all(made))


async def renamed(database: Database, owner: str, version: int) -> None:
    change = sa.update(Connection).where(sa.column("id") == owner.removeprefix("connections/"))
    await database.transaction(lambda session: session.execute(change.values(secret_version=version)) and None)


async def filled(vault: Vault, owner: str, *, until: int, since: int = 0) -> None:
    for version in range(since, until):
        await vault.put(owner, {"n": version + 1}, expected_version=version)


async def kept(vault: Vault, owner: str, until: int = 20) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for version in range(1, until):
        try:
            found[version] = (await vault.get(owner, version))[1]
        except SecretNotFound:
            continue
    return found


def quiet(_: Pass) -> None:
    """Tell nobody."""


# --- a store that counts by itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_law", CONTRACT, ids=lambda check: str(check.__name__).removeprefix("check_"))
async def test_a_numbered_store_keeps_the_contract(rows: SealedRows, check_law: Check) -> None:
    await check_law(Numbered(rows))


async def test_a_numbered_store_goes_on_from_the_number_that_it_was_given(rows: SealedRows) -> None:
    vault, owner = Numbered(rows), an_owner()
    await vault.put_as(owner, {"n": 8760}, expected_version=0, version=8760)
    assert await vault.put(owner, {"n": 8761}, expected_version=8760) == 8761
    await vault.put_as(owner, {"n": 8765}, expected_version=8761, version=8765)
    assert await kept(rows, owner) == {
        1: {"n": 8760, NUMBER: 8760},
        2: {"n": 8761, NUMBER: 8761},
        3: {"n": 8765, NUMBER: 8765},
    }
    for version in (8760, 8761, 8765):
        assert await vault.get(owner, version) == (version, {"n": version})
    assert await vault.get(owner) == (8765, {"n": 8765})
    for version in (0, 1, 2, 3, 8759, 8762, 8764, 8766):
        with pytest.raises(SecretNotFound):
            await vault.get(owner, version)
    for expected in (0, 3, 8761, 8766):
        with pytest.raises(VaultConflict) as conflict:
            await vault.put(owner, {"n": "wrong"}, expected_version=expected)
        assert conflict.value.current == 8765


async def test_a_secret_that_was_never_moved_is_stored_as_it_is(rows: SealedRows) -> None:
    vault, owner = Numbered(rows), an_owner()
    await filled(vault, owner, until=2)
    assert await kept(rows, owner) == {1: {"n": 1}, 2: {"n": 2}}


@pytest.mark.parametrize("number", ["7", 0, -1, None, 1.5])
async def test_a_number_that_cannot_be_does_not_open(rows: SealedRows, number: object) -> None:
    vault, owner = Numbered(rows), an_owner()
    await rows.put(owner, {"n": 1, NUMBER: number}, expected_version=0)
    with pytest.raises(SecretUnreadable):
        await vault.get(owner, 1)
    with pytest.raises(SecretStoreUnavailable):
        await vault.put(owner, {"n": 2}, expected_version=1)


async def test_of_writers_at_once_to_a_numbered_store_one_wins(rows: SealedRows) -> None:
    vault, owner = Numbered(rows), an_owner()
    await vault.put_as(owner, {"n": 500}, expected_version=0, version=500)
    puts = [vault.put(owner, {"writer": n}, expected_version=500) for n in range(8)]
    results = await asyncio.gather(*puts, return_exceptions=True)
    assert sorted(str(result) for result in results) == ["501"] + ["the secret is at version 501"] * 7


# --- both at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_law", CONTRACT, ids=lambda check: str(check.__name__).removeprefix("check_"))
async def test_two_stores_together_keep_the_contract(both: MovingVault, check_law: Check) -> None:
    await check_law(both)


async def test_what_is_written_is_in_both_under_the_same_number(both: MovingVault, old: SealedRows, new: Store) -> None:
    owner = an_owner()
    await filled(old, owner, until=7)
    assert await both.put(owner, {"n": 8}, expected_version=7) == 8
    assert await old.get(owner) == await new.get(owner) == (8, {"n": 8})
    assert await new.get(owner, 7) == (7, {"n": 7})  # which the row names until it names 8


async def test_what_is_written_after_a_destroy_goes_on_with_its_numbers_in_both(
    both: MovingVault, old: SealedRows, new: Store
) -> None:
    owner = an_owner()
    await filled(both, owner, until=2)
    await both.destroy(owner)
    await both.put_as(owner, {"n": 3}, expected_version=0, version=3)
    assert await kept(old, owner) == await kept(new, owner) == {3: {"n": 3}}
    with pytest.raises(VaultConflict) as conflict:  # a replay finds its own value there
        await both.put_as(owner, {"n": 3}, expected_version=0, version=3)
    assert conflict.value.current == 3
    assert await both.put(owner, {"n": 4}, expected_version=3) == 4
    assert await kept(old, owner) == await kept(new, owner) == {3: {"n": 3}, 4: {"n": 4}}


async def test_a_number_that_goes_on_after_a_destroy_is_moved_as_it_is(move: Move, database: Database) -> None:
    owner, gone = an_owner(), an_owner()
    for one in (owner, gone):
        await filled(move.source, one, until=1)
        await move.source.destroy(one)
        source: Any = move.source
        await source.put_as(one, {"n": 7}, expected_version=0, version=7)
    await name(database, owner, version=7)
    await name(database, gone, version=-6)  # a crash left what no row names
    last = await move.passes(quiet)
    assert (last.verified, last.unnamed, last.problems) == ([owner], [gone], {})
    assert await kept(move.target, owner) == {7: {"n": 7}}


async def test_a_version_is_read_from_the_new_store_first(both: MovingVault, old: SealedRows, new: Store) -> None:
    owner = an_owner()
    await old.put(owner, {"from": "old"}, expected_version=0)
    assert await both.get(owner, 1) == (1, {"from": "old"})
    await new.put(owner, {"from": "new"}, expected_version=0)
    assert await both.get(owner, 1) == await both.get(owner) == (1, {"from": "new"})


async def test_a_replica_that_knows_only_the_old_store_wins_and_loses_as_ever(
    both: MovingVault, old: SealedRows
) -> None:
    owner = an_owner()
    await filled(both, owner, until=3)
    assert await old.put(owner, {"by": "the old one"}, expected_version=3) == 4
    with pytest.raises(VaultConflict) as conflict:
        await both.put(owner, {"by": "both"}, expected_version=3)
    assert conflict.value.current == 4
    assert await both.get(owner, 4) == await both.get(owner) == (4, {"by": "the old one"})
    assert await both.put(owner, {"n": 5}, expected_version=4) == 5
    assert await both.new.get(owner, 4) == (4, {"by": "the old one"})
    with pytest.raises(VaultConflict):
        await old.put(owner, {"n": 5}, expected_version=4)


async def test_a_replica_that_knows_only_the_new_store_wins_too(both: MovingVault, old: SealedRows, new: Store) -> None:
    owner = an_owner()
    await filled(both, owner, until=3)
    assert await new.put(owner, {"by": "the new one"}, expected_version=3) == 4
    with pytest.raises(VaultConflict) as conflict:
        await both.put(owner, {"by": "both"}, expected_version=3)
    assert conflict.value.current == 4
    assert await both.get(owner, 4) == (4, {"by": "the new one"})
    assert await new.put(owner, {"n": 5}, expected_version=4) == 5
    assert await new.put(owner, {"n": 6}, expected_version=5) == 6
    assert await both.put(owner, {"n": 7}, expected_version=6) == 7
    assert (await old.get(owner))[0] == 4  # it was left behind, and stays there


async def test_a_version_that_only_the_new_store_has_is_not_found_in_the_old_one(
    both: MovingVault, old: SealedRows
) -> None:
    owner = an_owner()
    await filled(both, owner, until=1)
    await both.new.put(owner, {"n": 2}, expected_version=1)
    with pytest.raises(SecretNotFound):
        await old.get(owner, 2)


async def test_a_crash_between_the_two_writes_loses_nothing(both: MovingVault, old: SealedRows) -> None:
    owner = an_owner()
    await filled(both, owner, until=2)
    await old.put(owner, {"n": 3}, expected_version=2)  # and then the process was gone
    assert await both.get(owner, 3) == (3, {"n": 3})
    with pytest.raises(VaultConflict) as conflict:  # a replay finds its own value there
        await both.put(owner, {"n": 3}, expected_version=2)
    assert conflict.value.current == 3
    assert await both.put(owner, {"n": 4}, expected_version=3) == 4
    assert await kept(both.new, owner) == {2: {"n": 2}, 3: {"n": 3}, 4: {"n": 4}}


async def test_a_damaged_old_version_does_not_keep_the_next_one_out(
    both: MovingVault, old: SealedRows, new: Store
) -> None:
    owner = an_owner()
    await filled(old, owner, until=2)
    damage = sa.update(ROWS).where(ROWS.c.owner == owner, ROWS.c.version == 2).values(sealed=b"damage")
    await old.database.transaction(lambda session: session.execute(damage) and None)
    assert await both.put(owner, {"n": 3}, expected_version=2) == 3
    assert await new.get(owner, 3) == (3, {"n": 3})


async def test_a_store_that_fails_is_not_taken_for_one_without_the_secret(both: MovingVault, rows: SealedRows) -> None:
    owner = an_owner()
    await filled(both, owner, until=1)
    await rows.database.transaction(lambda session: session.execute(sa.text("DROP TABLE sealed_secrets")) and None)
    attempts = (both.get(owner, 1), both.get(owner), both.put(owner, {}, expected_version=1), both.destroy(owner))
    for attempt in attempts:
        with pytest.raises(SecretStoreUnavailable):
            await attempt


async def test_what_only_one_store_has_is_listed_and_destroyed(both: MovingVault, old: SealedRows, new: Store) -> None:
    first, second = an_owner(), an_owner()
    await filled(old, first, until=1)
    await filled(new, second, until=1)
    assert {owner for owner, _ in await both.owners("connections/")} == {first, second}
    for owner in (first, second):
        await both.destroy(owner)
    assert await old.owners("") == await new.owners("") == []


# --- judging ----------------------------------------------------------------------------------------------------------


def held(*versions: int, **values: Any) -> Held:
    return Held(
        max(versions, default=0), {version: {"n": version} for version in versions} | values.get("otherwise", {})
    )


@pytest.mark.parametrize(
    ("named", "source", "target", "verdict"),
    [
        (3, held(2, 3), held(2, 3), "equal"),
        (2, held(2, 3), held(2, 3), "equal"),
        (None, held(3), held(), "unnamed"),
        (None, held(), held(3), "gone"),
        (3, held(), held(3), "gone"),
        (3, held(3), held(), "behind"),
        (3, held(3), held(2), "behind"),
        (3, held(3), held(3, otherwise={3: {"n": "other"}}), "differs"),
        (2, held(2, 3), held(2, 3, otherwise={3: {"n": "other"}}), "differs"),
        (5, held(3), held(4, 5), "equal"),
        (4, held(4), held(4, 5), "equal"),
        (5, held(4), held(4, 5, otherwise={4: {"n": "lost the race"}}), "equal"),
        (4, held(4), held(4, 5, otherwise={4: {"n": "other"}}), "differs"),
        (2, held(2, 3), held(3), "missing"),
        (9, held(3), held(3), "missing"),
        (3, held(3), held(3, otherwise={3: None}), "unreadable"),
        (0, held(3), held(3), "equal"),
        (0, held(3), held(3, otherwise={3: {}}), "differs"),
    ],
)
def test_verdicts(named: int | None, source: Held, target: Held, verdict: str) -> None:
    assert judge(named, source, target) == verdict


@given(
    st.dictionaries(st.integers(1, 5), st.integers(0, 1), max_size=3),
    st.dictionaries(st.integers(1, 5), st.integers(0, 1), max_size=3),
    st.integers(1, 5),
)
def test_equal_means_that_the_named_version_is_in_the_target_as_it_was(
    source: dict[int, int], target: dict[int, int], named: int
) -> None:
    def side(values: dict[int, int]) -> Held:
        return Held(max(values, default=0), {version: {"v": value} for version, value in values.items()})

    if judge(named, side(source), side(target)) == "equal":
        assert named in target
        assert source.get(named, target[named]) == target[named]
        assert max(target) >= max(source)


# --- moving -----------------------------------------------------------------------------------------------------------


async def test_every_kept_version_is_moved_under_its_number(move: Move, database: Database) -> None:
    owners = {an_owner(): until for until in (1, 2, 3, 7)}
    for owner, until in owners.items():
        await filled(move.source, owner, until=until)
        await name(database, owner, version=until)
    last = await move.passes(quiet)
    assert (last.number, last.total, last.copied, last.problems) == (2, 4, 0, {})
    assert sorted(last.verified) == sorted(owners)
    for owner, until in owners.items():
        wanted = {version: {"n": version} for version in range(max(1, until - 2), until + 1)}
        assert await kept(move.target, owner) == await kept(move.source, owner) == wanted
        assert await move.target.put(owner, {"n": until + 1}, expected_version=until) == until + 1


async def test_client_secrets_and_what_belongs_to_no_known_row_are_moved_too(move: Move, database: Database) -> None:
    key = ClientSecret(id=new_id("key"), integration="gh", value_digest="x", created_at=1.0)
    mine, foreign = f"integrations/gh/{key.id}", "webhooks/src_1/whk_1"
    await database.transaction(lambda session: session.add(ClientSecret(**key.model_dump())))
    for owner in (mine, foreign, "integrations/other/" + key.id):
        await move.source.put(owner, {"client_secret": owner}, expected_version=0)
    last = await move.passes(quiet)
    assert sorted(last.verified) == [mine, foreign]
    assert last.unnamed == ["integrations/other/" + key.id]
    for owner in (mine, foreign):
        assert await move.target.get(owner, 1) == (1, {"client_secret": owner})


async def test_what_no_row_names_stays_where_it_is(move: Move, database: Database) -> None:
    nobodys, revoked = an_owner(), an_owner()
    for owner in (nobodys, revoked):
        await filled(move.source, owner, until=1)
    await name(database, revoked, version=0)
    last = await move.passes(quiet)
    assert sorted(last.unnamed) == sorted([nobodys, revoked])
    assert await move.target.owners("") == []


async def test_a_second_run_passes_over_what_is_equal(move: Move, database: Database) -> None:
    owners = [an_owner() for _ in range(40)]
    for owner in owners:
        await filled(move.source, owner, until=1)
    await name(database, *owners)
    seen: list[tuple[int, int, int]] = []
    await move.passes(lambda walk: seen.append((walk.number, walk.done, walk.copied)))
    assert (seen[39], seen[-1]) == ((1, 40, 40), (2, 40, 0))
    again = await move.passes(quiet)
    assert (again.number, again.copied, len(again.verified)) == (1, 0, 40)


async def test_a_dry_run_says_what_would_be_copied_and_writes_nothing(move: Move, database: Database) -> None:
    owner = an_owner()
    await filled(move.source, owner, until=2)
    await name(database, owner, version=2)
    last = await move.passes(quiet, dry_run=True)
    assert (last.copied, last.verified, last.problems) == (1, [owner], {})
    assert await move.target.owners("") == []


async def test_later_versions_follow_in_the_next_run(move: Move, database: Database) -> None:
    owner = an_owner()
    await filled(move.source, owner, until=2)
    await name(database, owner, version=2)
    await move.passes(quiet)
    await filled(move.source, owner, until=9, since=2)
    await renamed(database, owner, 9)
    last = await move.passes(quiet)
    assert last.problems == {}
    assert [(await move.target.get(owner, version))[1] for version in (7, 8, 9)] == [{"n": 7}, {"n": 8}, {"n": 9}]


async def test_what_does_not_open_or_differs_is_named_and_harms_no_other(move: Move, database: Database) -> None:
    damaged, differing, fine = an_owner(), an_owner(), an_owner()
    for owner in (damaged, differing, fine):
        await filled(move.source, owner, until=1)
    await move.target.put(differing, {"n": "other"}, expected_version=0)
    await name(database, damaged, differing, fine)
    damage = sa.update(ROWS).where(ROWS.c.owner == damaged).values(sealed=b"damage")
    await database.transaction(lambda session: session.execute(damage) and None)
    last = await move.passes(quiet)
    assert last.problems == {damaged: "unreadable", differing: "differs"}
    assert last.verified == [fine]
    assert not last.found_nothing_new


async def test_what_an_earlier_attempt_left_is_made_anew_while_nobody_reads_it(
    database: Database, old: SealedRows, new: Store
) -> None:
    owner = an_owner()
    await filled(old, owner, until=2)
    await filled(new, owner, until=4)  # the same owner, from before its credential was revoked and connected again
    await new.put(owner, {"n": "old"}, expected_version=4)
    await old.put(owner, {"n": "fresh"}, expected_version=2)
    await name(database, owner, version=3)
    assert (await Move(database, old, new).passes(quiet)).problems == {owner: "differs"}
    last = await Move(database, old, new, target_unused=True).passes(quiet)
    assert last.problems == {}
    assert await new.get(owner) == (3, {"n": "fresh"})


async def test_a_secret_that_is_deleted_while_it_is_copied_is_gone_from_both(
    database: Database, old: SealedRows, new: Store
) -> None:
    owner = an_owner()

    @dataclass(frozen=True)
    class Deleting:
        """The new store, and a user who deletes the connection while its secret is on its way there."""

        store: Store
        deleted: asyncio.Event = field(default_factory=asyncio.Event)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.store, attribute)

        async def put_as(self, owner: str, value: Any, *, expected_version: int, version: int) -> None:
            if not self.deleted.is_set():
                self.deleted.set()
                gone = sa.delete(Connection).where(sa.column("id") == owner.removeprefix("connections/"))
                await MovingVault(self.store, old).destroy(owner)
                await database.transaction(lambda session: session.execute(gone) and None)
            await self.store.put_as(owner, value, expected_version=expected_version, version=version)

    await filled(old, owner, until=2)
    await name(database, owner, version=2)
    target: Any = Deleting(new)
    last = await Move(database, old, target).passes(quiet)
    assert target.deleted.is_set()
    assert (last.gone, last.verified) == (0, []) or (last.gone, last.verified) == (1, [])
    assert await new.owners("") == []


async def test_two_moves_at_once_do_not_disturb_each_other(move: Move, database: Database) -> None:
    owners = [an_owner() for _ in range(30)]
    for owner in owners:
        await filled(move.source, owner, until=2)
    await name(database, *owners, version=2)
    both = await asyncio.gather(move.passes(quiet), move.passes(quiet))
    assert [last.problems for last in both] == [{}, {}]
    assert all([await kept(move.target, owner) == {1: {"n": 1}, 2: {"n": 2}} for owner in owners])


async def test_another_move_whose_source_is_being_emptied_destroys_nothing_in_the_target(
    move: Move, database: Database
) -> None:
    owner = an_owner()
    await filled(move.source, owner, until=1)
    await name(database, owner)
    await move.passes(quiet)
    named = await database.read(lambda session: named_versions(session, [owner]))
    await move.source.destroy(owner)
    verdict, _ = await move._settled(owner, named[owner], dry_run=False)
    assert verdict == "gone"
    assert await move.target.get(owner, 1) == (1, {"n": 1})


# --- the whole way, with replicas that change one by one ----------------------------------------------------------------


async def write(vault: Vault, database: Database, owner: str, version: int) -> int:
    """Do what a refresh does: the next version, then the row."""
    version = await vault.put(owner, {"n": version + 1}, expected_version=version)
    await renamed(database, owner, version)
    return version


async def test_replicas_change_one_by_one_and_every_read_is_answered(
    database: Database, old: SealedRows, new: Store
) -> None:
    owners = {an_owner(): 1 for _ in range(12)}
    for owner in owners:
        await filled(old, owner, until=1)
    await name(database, *owners)
    together = MovingVault(new, old)
    stages: list[list[Vault]] = [[old, old], [old, together], [together, together], [together, new], [new, new]]
    for replicas in stages:
        move = Move(database, old, new, target_unused=replicas == [old, old])
        walking = asyncio.create_task(move.passes(quiet))
        for _ in range(3):
            for number, owner in enumerate(owners):
                owners[owner] = await write(replicas[number % 2], database, owner, owners[owner])
                readers = [one for one in replicas if one is not old or new not in replicas]
                for reader in readers:
                    assert await reader.get(owner, owners[owner]) == (owners[owner], {"n": owners[owner]})
        assert (await walking).problems == {}
        last = await move.passes(quiet)
        assert (last.problems, len(last.verified)) == ({}, 12)
    assert set(owners.values()) == {16}
    assert await move.destroy_source(last.verified, last.unnamed) == 12
    assert await old.owners("") == []
    assert [await new.get(owner, 16) for owner in owners] == [(16, {"n": 16})] * 12


async def test_only_what_nobody_named_for_a_day_is_destroyed_unmoved(move: Move, database: Database) -> None:
    fresh, aged = an_owner(), an_owner()
    for owner in (fresh, aged):
        await filled(move.source, owner, until=1)
    age = sa.update(ROWS).where(ROWS.c.owner == aged).values(created_at=1.0)
    await database.transaction(lambda session: session.execute(age) and None)
    last = await move.passes(quiet)
    assert await move.destroy_source(last.verified, last.unnamed) == 1
    assert [owner for owner, _ in await move.source.owners("")] == [fresh]


# --- kill -9 ------------------------------------------------------------------------------------------------------------

CHILD = """
    import asyncio, sys
    from broker.vault.moving import Move
    from tests.broker.vault.test_moving import opened_rows

    async def main():
        source, target = await opened_rows(sys.argv[1]), await opened_rows(sys.argv[2])
        move = Move(source.database, source, target)
        last = await move.passes(lambda walk: print(walk.number, walk.done, walk.copied, flush=True))
        print("end", last.number, last.copied, len(last.verified), last.problems, flush=True)

    asyncio.run(main())
"""


@contextmanager
def moving_process(place: Path, *urls: str) -> Iterator[Any]:
    with running(sys.executable, "-c", textwrap.dedent(CHILD), *urls, place=place) as process:
        yield process


async def test_a_move_that_is_killed_goes_on_where_it_was(
    database: Database, old: SealedRows, rows: SealedRows, database_url: str, tmp_path: Path
) -> None:
    owners = [an_owner() for _ in range(200)]
    for owner in owners:
        await filled(old, owner, until=2)
    await name(database, *owners, version=2)
    urls = (database_url, f"sqlite:///{tmp_path / 'other.db'}")
    copied = 0
    for stop_after in (20, 60):
        with moving_process(tmp_path, *urls) as process:
            while copied < stop_after:
                copied = max(copied, int((await asyncio.to_thread(process.stdout.readline)).split()[1]))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        copied = len(await rows.owners(""))
        assert stop_after <= copied < 200
    with moving_process(tmp_path, *urls) as process:
        said, _ = await asyncio.to_thread(process.communicate)
    assert said.splitlines()[-1] == "end 2 0 200 {}"
    first_pass = [line.split() for line in said.splitlines() if line.startswith("1 ")]
    assert int(first_pass[-1][2]) <= 200 - copied + 16  # only what was not there yet, and what was under way
    for owner in owners:
        assert await kept(rows, owner) == {1: {"n": 1}, 2: {"n": 2}}


# --- the command, where it refuses; tests/real has it where it works ------------------------------------------------------

VAULT_HERE = {"VAULT_ADDR": "http://127.0.0.1:9", "VAULT_TOKEN": "x"}


@pytest.mark.parametrize(
    ("arguments", "variables", "status", "says"),
    [
        (("local", "elsewhere"), {}, 2, "must be one of local, hashicorp"),
        (("local", "local"), {}, 2, "must be another store than --from"),
        (("local", "hashicorp", "--dry-run", "--delete-source"), {}, 2, "excludes --dry-run"),
        (("local", "hashicorp"), {}, 1, "VAULT_ADDR"),
        (("local", "hashicorp", "--delete-source"), VAULT_HERE, 1, "BROKER_VAULT=hashicorp alone"),
        (
            ("local", "hashicorp", "--delete-source"),
            {**VAULT_HERE, "BROKER_VAULT": "hashicorp", "BROKER_VAULT_FALLBACK": "local"},
            1,
            "BROKER_VAULT=hashicorp alone",
        ),
        (("local", "hashicorp"), {"BROKER_VAULT_FALLBACK": "local"}, 1, "BROKER_VAULT_FALLBACK must name another"),
    ],
)
def test_the_command_says_what_it_cannot_do(
    sqlite_url: str, tmp_path: Path, arguments: tuple[str, ...], variables: dict[str, str], status: int, says: str
) -> None:
    options = ("--from", arguments[0], "--to", *arguments[1:])
    given = {"BROKER_ENV": "development", "BROKER_DATABASE_URL": sqlite_url, "COLUMNS": "200", **variables}
    done = broker("vault", "migrate", *options, place=tmp_path, **given)
    assert (done.status, done.out) == (status, "")
    assert says in done.err


async def test_the_fallback_of_the_settings_is_a_store_behind_the_store(old: SealedRows) -> None:
    moving = Settings(
        env="development",
        vault="local",
        vault_fallback="hashicorp",
        vault_variables={"VAULT_ADDR": "http://127.0.0.1:9", "VAULT_TOKEN": "x"},
    )
    server = new_session(moving)
    vault = await open_vault(moving, old.database, old.sealer, server)
    assert isinstance(vault, MovingVault)
    assert isinstance(vault.old, Numbered)
    owner = an_owner()
    await filled(old, owner, until=1)
    assert await vault.get(owner, 1) == (1, {"n": 1})
    with pytest.raises(SecretStoreUnavailable):
        await vault.get(owner, 2)  # the fallback cannot be asked: that is not the same as having none
    await server.aclose()
