"""The vocabulary of every rotation: its steps, what a key class must be able to do, and the pure decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlmodel import Session

from broker import replicas
from broker.models import Replica, Rotation

PUBLISH, ACKNOWLEDGE, SWITCH, REWRITE, FLOOR = "publish", "acknowledge", "switch", "rewrite", "floor"

Record = Callable[[Session, Rotation], "str | None"]
"""What an ``act`` leaves to be written, in one transaction that holds the rotation's row and has checked its lease.

Changes the row, and whatever else belongs to the step; returns the last part of an audit action when there is something to
tell (``switched``), None otherwise. May run on another thread, and twice when the database asks for it.
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rotation would do: the keys that would go, the one that would come (None: made at the start), and how much."""

    old_keys: Sequence[str]
    new_key: str | None
    places: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many values would be written anew."""
        return sum(self.places.values())


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key as the coverage report shows it. ``state``: next, current, previous or retired; times in epoch seconds.

    ``places``: how many values are under it, by where they are; None where nothing is sealed with keys of that class.
    """

    id: str
    state: str
    created_at: float | None
    activated_at: float | None
    retire_at: float | None
    retired_at: float | None = None
    places: Mapping[str, int] | None = None


class KeyClass(Protocol):
    """One class of keys: what its rotation does at each step. Calls may run at once, in many processes."""

    name: str
    steps: tuple[str, ...]

    async def plan(self) -> Plan:
        """Return what a rotation that began now would do. Raises ``Conflict`` when there is nothing to rotate to."""

    async def act(self, rotation: Rotation) -> Record:
        """Do the part of the current step that needs no transaction, in bounded time; return what has to be written.

        Nothing durable is changed by it that may not be done twice. Raises a ``BrokerError`` when it cannot be done now.
        """

    async def rows(self) -> list[KeyRow]:
        """Return every key of the class, newest first, with what is under it."""


def step_after(steps: Sequence[str], step: str) -> str | None:
    """Return the step that follows, None after the last (pure)."""
    following = steps.index(step) + 1
    return steps[following] if following < len(steps) else None


def go_on(rotation: Rotation, steps: Sequence[str]) -> None:
    """Move the row to its next step, or end it; nobody is waited for any more."""
    following = step_after(steps, rotation.step)
    rotation.detail = without(rotation.detail, "waiting_for")
    if following is None:
        rotation.state = "done"
    else:
        rotation.step = following
        rotation.position = None


def acknowledged(key_class: str, steps: Sequence[str]) -> Record:
    """Return the record of the step that waits until every live replica has the new key; who lacks it is named."""

    def record(session: Session, rotation: Rotation) -> str | None:
        waiting = replicas.lacking(session, key_class, str(rotation.new_key))
        if not waiting:
            go_on(rotation, steps)
            return "acknowledged"
        rotation.detail = {**rotation.detail, "waiting_for": named(waiting)}
        return None

    return record


def named(waiting: Sequence[Replica]) -> list[str]:
    """Return how an operator finds these processes: what they run, on which machine, and their id."""
    return [f"{one.kind} on {one.host or 'unknown host'} ({one.id})" for one in waiting]


def without(detail: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return a copy without these (the column is compared by identity, so a change needs a new object)."""
    return {name: value for name, value in detail.items() if name not in names}
