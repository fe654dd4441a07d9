"""Moves secrets from one store to another while the broker serves: copies and verifies, and keeps both while replicas change.

The three steps, each of which may be repeated, broken off, or taken back (``docs/decisions/0009-moving-between-stores.md``):

1. every replica on the old store: ``migrate`` copies what is there;
2. replica by replica to both (``MovingVault``): what is written goes to both; ``migrate`` finds what was written before;
3. replica by replica to the new store alone; ``destroy_source`` ends the copies in the old one.

Version numbers stay what they are, because rows name them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlmodel import Session, select

from broker.database import Database, now
from broker.errors import SecretStoreUnavailable
from broker.models import ClientSecret, Connection
from broker.vault import SecretNotFound, SecretUnreadable, Store, Vault, VaultConflict

KEPT_VERSIONS = 3
TRIES = 4
MOST_PASSES = 5
AT_ONCE = 16
BATCH = 500
UNNAMED_SECONDS = 86_400.0  # as old as what the sweeper takes: between vault and row pass seconds
Verdict = Literal["equal", "behind", "gone", "unnamed", "differs", "missing", "unreadable"]
Content = tuple[int, dict[str, Any]]


# While replicas change from one store to the other


@dataclass(frozen=True, slots=True)
class MovingVault:
    """``Vault`` over the store that is moved to and the one that is moved from.

    A version is written to ``old`` first and then to ``new``: so replicas that know only ``old`` read all that is written
    here, two writers are told apart by ``old`` as before, and going back loses nothing. Where ``old`` was left behind (a
    replica that knows only ``new`` has written), ``new`` decides alone. A version is read from ``new``, and from ``old``
    where ``new`` says that it has none; a store that fails is no such answer, and raises. A crash between the two writes
    leaves a version in ``old`` only, which is read from there and found by ``migrate``.
    """

    new: Store
    old: Store

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """See ``Vault``. Both stores have to be there."""
        await self.put_as(owner, value, expected_version=expected_version, version=expected_version + 1)
        return expected_version + 1

    async def put_as(self, owner: str, value: Mapping[str, Any], *, expected_version: int, version: int) -> None:
        """See ``Store``; otherwise as ``put``."""
        in_old = await self._put_old(owner, value, expected_version, version)
        for _ in range(TRIES):
            with contextlib.suppress(_Raced):
                return await self._put_new(owner, value, expected_version, version, in_old=in_old)
        raise SecretStoreUnavailable("others keep writing this secret")

    async def _put_old(self, owner: str, value: Mapping[str, Any], expected: int, version: int) -> bool:
        """Return whether it was written; not where ``old`` was left behind (VaultConflict where it is ahead)."""
        try:
            await self.old.put_as(owner, value, expected_version=expected, version=version)
        except VaultConflict as conflict:
            if conflict.current > expected:
                raise
            return False
        return True

    async def _put_new(
        self, owner: str, value: Mapping[str, Any], expected: int, version: int, *, in_old: bool
    ) -> None:
        try:
            return await self.new.put_as(owner, value, expected_version=expected, version=version)
        except VaultConflict as conflict:
            newest = conflict.current
        if newest > expected:
            if newest == version and in_old and await self._moved_meanwhile(owner, newest, value):
                return None
            raise VaultConflict(newest)
        if not in_old:
            raise VaultConflict(newest)
        try:
            newest = await _carry(self.old, self.new, owner, after=newest, until=expected)
            return await self.new.put_as(owner, value, expected_version=newest, version=version)
        except VaultConflict:
            raise _Raced from None

    async def _moved_meanwhile(self, owner: str, version: int, value: Mapping[str, Any]) -> bool:
        """Whether ``migrate`` has taken over just what was written to ``old`` a moment ago."""
        try:
            return (await self.new.get(owner, version))[1] == value
        except (SecretNotFound, SecretUnreadable):
            return False

    def ahead(self, connection: sa.Connection, wanted: Sequence[tuple[str, int]]) -> Sequence[bytes | None]:
        """See ``Vault``. What ``new`` gives."""
        return self.new.ahead(connection, wanted)

    async def get(self, owner: str, version: int | None = None, *, sealed: bytes | None = None) -> Content:
        """See ``Vault``."""
        if version is None:
            return await self._newest(owner)
        with contextlib.suppress(SecretNotFound):
            return await self.new.get(owner, version, sealed=sealed)
        with contextlib.suppress(SecretNotFound):
            return await self.old.get(owner, version)
        return await self.new.get(owner, version)  # it may have been moved between the two looks

    async def _newest(self, owner: str) -> Content:
        found = await asyncio.gather(*(_newest_of(store, owner) for store in (self.new, self.old)))
        held = [one for one in found if one is not None]
        if not held:
            raise SecretNotFound("there is no such secret")
        return max(held, key=lambda one: one[0])  # the first of equals: that of ``new``

    async def destroy(self, owner: str) -> None:
        """See ``Vault``. ``old`` first: a move that runs looks there last, and destroys what it has just copied."""
        try:
            await self.old.destroy(owner)
        finally:
            await self.new.destroy(owner)

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        """See ``Vault``."""
        both = [*await self.old.owners(prefix), *await self.new.owners(prefix)]
        newest_at: dict[str, float] = {}
        for owner, at in both:
            newest_at[owner] = max(at, newest_at.get(owner, at))
        return sorted(newest_at.items())


class _Raced(Exception):
    """The new store was written to while a version was put there."""


async def _newest_of(store: Vault, owner: str) -> Content | None:
    try:
        return await store.get(owner)
    except SecretNotFound:
        return None


async def _carry(source: Vault, target: Store, owner: str, *, after: int, until: int) -> int:
    """Copy the versions that a store keeps, from ``after`` on, oldest first; return the newest that ``target`` has then.

    What does not open is left out. Raises VaultConflict when ``target``'s newest version was not ``after``.
    """
    for version in range(max(after, until - KEPT_VERSIONS) + 1, until + 1):
        try:
            _, value = await source.get(owner, version)
        except (SecretNotFound, SecretUnreadable):
            continue
        await target.put_as(owner, value, expected_version=after, version=version)
        after = version
    return after


# Moving


@dataclass(frozen=True, slots=True)
class Held:
    """What a store has of an owner: the number of the newest version (0: none), and the versions that were looked at.

    A value of None does not open.
    """

    newest: int
    values: Mapping[int, Mapping[str, Any] | None] = field(repr=False)


def judge(named: int | None, source: Held, target: Held) -> Verdict:
    """Say how far a secret has been moved (pure). ``named``: the version that a row names, 0 where no row has to.

    None: no row names it.

    ``equal``: what the row names and the source's newest version are in the target as they are in the source, or the target
    has moved on and has what the row names. ``behind``: the target lacks what can be copied.
    """
    if source.newest == 0:
        return "gone"
    if named is None:
        return "unnamed"
    if target.newest < source.newest:
        return "behind"
    counts = {named or source.newest, *({source.newest} if target.newest == source.newest else ())}
    verdicts = {_judge_version(version, source, target) for version in counts}
    problems: tuple[Verdict, ...] = ("unreadable", "differs", "missing")
    return next((problem for problem in problems if problem in verdicts), "equal")


class Seen(NamedTuple):
    """What a look at both stores came to: the verdict, and the newest version in each."""

    verdict: Verdict
    source: int
    target: int


def _judge_version(version: int, source: Held, target: Held) -> Verdict:
    if version not in target.values:
        return "missing"
    if target.values[version] is None:
        return "unreadable"
    if version not in source.values:
        return "equal"
    return "equal" if source.values[version] == target.values[version] else "differs"


async def _look(store: Vault, owner: str, versions: Collection[int] = ()) -> Held:
    try:
        newest, value = await store.get(owner)
    except SecretNotFound:
        return Held(0, {})
    values: dict[int, Mapping[str, Any] | None] = {newest: value}
    for version in sorted({*versions} - {newest, 0}):
        with contextlib.suppress(SecretNotFound):
            values[version] = await _opened(store, owner, version)
    return Held(newest, values)


async def _opened(store: Vault, owner: str, version: int) -> Mapping[str, Any] | None:
    try:
        return (await store.get(owner, version))[1]
    except SecretUnreadable:
        return None


@dataclass
class Pass:
    """What one walk over all secrets of the source came to. ``problems``: owner → why it could not be moved.

    ``unnamed`` are no longer or not yet any row's, and stay where they are. ``verified`` is what was found equal, or made so.
    """

    total: int
    number: int = 1
    copied: int = 0
    gone: int = 0
    unnamed: list[str] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """How many secrets were looked at so far."""
        return len(self.verified) + self.gone + len(self.unnamed) + len(self.problems)

    @property
    def found_nothing_new(self) -> bool:
        """Whether every secret was in the target before, as it is in the source."""
        return not (self.copied or self.problems)


Progress = Callable[[Pass], None]


@dataclass(frozen=True, slots=True)
class Move:
    """A move of every secret that a row of ``database`` names, from ``source`` to ``target``.

    Both may be in use meanwhile. It keeps no state of its own: started again after a crash, it passes over what is equal on
    both sides. Several may run at once. ``target_unused``: no replica reads the target yet, so what it has otherwise than the
    source is left from an earlier attempt, and is made anew.
    """

    database: Database
    source: Vault
    target: Store
    target_unused: bool = False

    async def passes(self, told: Progress, *, dry_run: bool = False) -> Pass:
        """Walk until a walk finds nothing new, ``MOST_PASSES`` times at most; return the last one.

        ``told`` is called after each secret. ``dry_run``: one walk that writes nothing; ``copied`` is what would be.
        Raises SecretStoreUnavailable and DatabaseUnavailable: what was copied stays.
        """
        for number in range(1, MOST_PASSES + 1):
            last = await self._pass(told, number, dry_run=dry_run)
            if dry_run or last.found_nothing_new:
                break
        return last

    async def _pass(self, told: Progress, number: int, *, dry_run: bool) -> Pass:
        listed = [owner for owner, _ in await self.source.owners("")]
        walk = Pass(total=len(listed), number=number)
        waiting = iter(listed)
        while batch := list(islice(waiting, BATCH)):
            named = await self._named(batch)
            await _at_once(batch, partial(self._move, named, walk, told, dry_run=dry_run))
        return walk

    async def _named(self, owners: Sequence[str]) -> dict[str, int]:
        return await self.database.read(lambda session: named_versions(session, owners))

    async def _move(self, named: Mapping[str, int], walk: Pass, told: Progress, owner: str, *, dry_run: bool) -> None:
        verdict, copied = await self._settled(owner, named.get(owner), dry_run=dry_run)
        walk.copied += copied
        if verdict == "gone":
            walk.gone += 1
        elif verdict == "unnamed":
            walk.unnamed.append(owner)
        elif verdict == "equal" or copied:
            walk.verified.append(owner)
        else:
            walk.problems[owner] = verdict
        told(walk)

    async def _settled(self, owner: str, named: int | None, *, dry_run: bool) -> tuple[Verdict, bool]:
        """Copy what is to be copied of one secret; return how it stands then, read back from both, and whether any was.

        The row may move on at any moment: what is wrong has to stay wrong after new looks.
        """
        seen = await self._seen(owner, named)
        if dry_run:
            return seen.verdict, seen.verdict == "behind"
        copied = False
        for tried in range(TRIES):
            if seen.verdict in {"equal", "unnamed"}:
                break
            if seen.verdict in {"differs", "missing"} and tried and self.target_unused:
                await self.target.destroy(owner)
                seen = Seen("behind", seen.source, 0)
            if seen.verdict == "behind":
                copied |= await self._copied(owner, seen)
            named = (await self._named([owner])).get(owner)
            seen = await self._seen(owner, named)
            if seen.verdict == "gone" and named is None:  # deleted, perhaps while it was copied
                await self.target.destroy(owner)
                break
        return seen.verdict, copied and seen.verdict == "equal"

    async def _seen(self, owner: str, named: int | None) -> Seen:
        try:
            source = await _look(self.source, owner, {named or 0})
            target = await _look(self.target, owner, {named or 0, source.newest})
        except SecretUnreadable:
            return Seen("unreadable", 0, 0)
        return Seen(judge(named, source, target), source.newest, target.newest)

    async def _copied(self, owner: str, seen: Seen) -> bool:
        try:
            return await _carry(self.source, self.target, owner, after=seen.target, until=seen.source) > seen.target
        except VaultConflict:  # a replica has written there meanwhile: the next look tells
            return False

    async def destroy_source(self, verified: Iterable[str], unnamed: Iterable[str]) -> int:
        """Destroy in the source what a whole pass found equal, and what no row has named for a day; return how many.

        Nobody may write to the source any more, nor read from it.
        """
        at = await self.database.read(now)
        left = {*unnamed}
        old = [owner for owner, made_at in await self.source.owners("") if made_at < at - UNNAMED_SECONDS]
        doomed = [*verified, *(owner for owner in old if owner in left)]
        await _at_once(doomed, self.source.destroy)
        return len(doomed)


async def _at_once(owners: Sequence[str], work: Callable[[str], Any]) -> None:
    """Run the work for each owner, ``AT_ONCE`` at a time; the first failure ends the others and is raised."""
    waiting = iter(owners)

    async def lane() -> None:
        for owner in waiting:
            await work(owner)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(lane())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def named_versions(session: Session, owners: Sequence[str]) -> dict[str, int]:
    """Return the version that each owner's row names; an owner whose row is not there is left out.

    A connection's row names one, or none that is left (a revocation has destroyed it: 0, or the last number, negative); a
    client secret has only its first.
    0 for what belongs to no kind of row that is known.
    """
    ids = {owner: owner.rpartition("/")[2] for owner in owners}
    connections = dict(_rows(session, select(Connection.id, Connection.secret_version), ids.values()))
    secrets = {
        f"integrations/{integration}/{secret_id}"
        for secret_id, integration in _rows(session, select(ClientSecret.id, ClientSecret.integration), ids.values())
    }
    named: dict[str, int] = {}
    for owner, row_id in ids.items():
        if owner.startswith("connections/"):
            named.update({owner: connections[row_id]} if connections.get(row_id, 0) > 0 else {})
        elif owner.startswith("integrations/"):
            named.update({owner: 1} if owner in secrets else {})
        else:
            named[owner] = 0
    return named


def _rows(session: Session, query: Any, ids: Collection[str]) -> Sequence[Any]:  # noqa: ANN401 - a select of two columns
    key = next(iter(query.selected_columns))
    return list(session.execute(query.where(key.in_(ids))))
