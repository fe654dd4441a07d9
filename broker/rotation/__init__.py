"""Replacing keys while everybody works: one engine for every class of keys, which any process may drive.

The order that loses nothing: publish the new key → every live replica acknowledges it → switch → rewrite what is under the
old one → look again → floor. The floor is one transaction that locks the old key's row, counts what is left under it
everywhere, and retires it only when nothing is; whoever seals something locks that row too, so no write under the old key can
come after. Each step is claim (a lease in the row, by the database's clock) → act → record, with the work and its progress in
one transaction: a process that is killed anywhere costs the repetition of one batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker import replicas
from broker.audit import Audit, Entry
from broker.database import Database, now
from broker.errors import BrokerError, Conflict, NotFound
from broker.models import Rotation, new_id
from broker.rotation.data import DataKeys
from broker.rotation.retired import REVIVED, SHREDDED, Act
from broker.rotation.steps import REWRITE, KeyClass, KeyRow, Plan, Record, named, without
from broker.rotation.system import retire_due

__all__ = ["ClassReport", "KeyRow", "Rotations"]

ACTIVE = ("running", "paused", "failed")  # a failed one is repaired and resumed: a second would leave its rest behind
LEASE_SECONDS = 10.0
TURN_SECONDS = 0.5
ROTATIONS_LOCK = 0x524F5441  # "ROTA": one start at a time on PostgreSQL
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ClassReport:
    """The coverage of one class: its keys, newest first, and the rotation that is not over (None: there is none)."""

    key_class: str
    keys: Sequence[KeyRow]
    rotation_id: str | None


class Rotations:
    """Starts, drives, pauses and shows rotations. Calls may run at once, in many processes: the lease lets one act."""

    def __init__(
        self, database: Database, audit: Audit, classes: Sequence[KeyClass], *, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        """Keep the parts. A step takes far less than ``lease_seconds``, or another process repeats it."""
        self._database = database
        self._audit = audit
        self._classes = {one.name: one for one in classes}
        self._lease_seconds = lease_seconds

    # Starting and stopping

    async def start(self, key_class: str, *, actor: str, dry_run: bool = False) -> Rotation:
        """Begin a rotation; ``advance`` does the work. ``dry_run``: return what it would be, state ``planned``, stored nowhere.

        Raises ``NotFound`` for a class that is not known, ``Conflict`` when one of this class is not over (its id is the
        problem's ``made_id``) or there is no new key to rotate to, ``DatabaseUnavailable``, ``AuditUnavailable``.
        """
        kind = self._class(key_class)
        plan = await kind.plan()
        if dry_run:
            return await self._database.read(lambda session: _planned(session, kind, plan))

        def work(session: Session) -> Rotation:
            _lock_starts(session)
            _refuse_second(session, key_class)
            row = _new_rotation(kind, plan)
            row.created_by, row.created_at = actor, now(session)
            row.updated_at = row.created_at
            session.add(row)
            self._audit.append(session, _entry("started", row, actor))
            return row

        return await self._database.transaction(work)

    async def pause(self, rotation_id: str, *, actor: str) -> Rotation:
        """Stop before the next batch: once this returns, nothing of the rotation changes any more.

        Pausing what is paused changes nothing. Raises ``NotFound``, ``Conflict`` when it is over, as ``start`` else.
        """

        def change(row: Rotation) -> bool:
            if row.state not in {"running", "paused"}:
                raise Conflict(f"the rotation is {row.state}")
            changed, row.state = row.state != "paused", "paused"
            return changed

        return await self._change(rotation_id, change, "paused", actor)

    async def resume(self, rotation_id: str, *, actor: str, abandon_unreadable: bool = False) -> Rotation:
        """Let a paused or failed rotation go on; a failed one looks at everything that is left once more.

        ``abandon_unreadable``: retire the old key although values under it do not open. They are lost for good then, a
        backup of the row alone would not bring them back; values that do open are never abandoned. Raises as ``pause``, and
        ``Conflict`` where there is nothing that may be abandoned: a data key that does not open takes all its values along.
        """

        def change(row: Rotation) -> bool:
            if row.state == "done" or (row.state == "failed" and row.key_class not in self._classes):
                raise Conflict(f"the rotation is {row.state}")  # a canary that failed has taken its secret along
            if abandon_unreadable and row.key_class != "data":
                raise Conflict("only values under data keys can be abandoned")
            if row.state == "failed":
                row.step, row.position, row.failed, row.ended_at = REWRITE, None, 0, None
                row.detail = without(row.detail, "reason", "unreadable", "pass")
            if abandon_unreadable:
                row.detail = {**row.detail, "abandon_unreadable": True}
            changed, row.state = row.state != "running" or abandon_unreadable, "running"
            return changed

        return await self._change(rotation_id, change, "resumed", actor)

    async def _change(self, rotation_id: str, change: Callable[[Rotation], bool], action: str, actor: str) -> Rotation:
        def work(session: Session) -> Rotation:
            row = _locked(session, rotation_id)
            if change(row):
                row.updated_at = now(session)
                session.add(row)
                self._audit.append(session, _entry(action, row, actor))
            return row

        return await self._database.transaction(work)

    # Going on

    async def advance(self, rotation_id: str, *, actor: str = "worker") -> Rotation:
        """Do one bounded piece of work and return the row as it is then; unchanged where there is nothing to do now.

        That is so while another process has the lease, while it is not running, and while a replica is waited for. What
        cannot be done now is raised (``SecretStoreUnavailable`` and so on), stands in the row's ``detail`` as ``trouble``, and
        is tried again by the next call. Raises ``NotFound``, ``DatabaseUnavailable``, ``AuditUnavailable``.
        """
        owner = new_id("own")
        row = await self._database.transaction(lambda session: self._claimed(session, rotation_id, owner))
        if row.lease_owner != owner:
            return row
        try:
            record = await self._class(row.key_class).act(row)
            return await self._database.transaction(
                lambda session: self._recorded(session, rotation_id, owner, record, actor)
            )
        except BrokerError as error:
            await self._give_back(rotation_id, owner, str(error))
            raise
        except Exception:
            await self._give_back(rotation_id, owner, "internal_error")
            raise

    def _claimed(self, session: Session, rotation_id: str, owner: str) -> Rotation:
        row = _locked(session, rotation_id)
        at = now(session)
        if row.key_class not in self._classes:
            return row  # a canary of a client secret, which has a runner of its own
        if row.state == "running" and (row.lease_owner is None or (row.lease_expires_at or 0.0) <= at):
            row.lease_owner, row.lease_expires_at = owner, at + self._lease_seconds
            session.add(row)
        return row

    def _recorded(self, session: Session, rotation_id: str, owner: str, record: Record, actor: str) -> Rotation:
        """Write what a step came to, unless the lease was lost or somebody paused it meanwhile: then nothing of it counts."""
        row = _locked(session, rotation_id)
        if row.lease_owner != owner:
            return row
        row.lease_owner = row.lease_expires_at = None
        session.add(row)
        if row.state != "running":
            return row
        row.detail = without(row.detail, "trouble")
        event = record(session, row)
        row.updated_at = now(session)
        events = [event] if event is not None else []
        if row.state != "running":
            row.ended_at = row.updated_at
            events.append(row.state)
        if events:
            self._audit.append(session, *(_entry(one, row, actor) for one in events))
        return row

    async def _give_back(self, rotation_id: str, owner: str, trouble: str) -> None:
        """Let the next one act at once, and say what went wrong; if even that fails, the lease ends by itself."""

        def work(session: Session) -> None:
            row = _locked(session, rotation_id)
            if row.lease_owner == owner:
                row.lease_owner = row.lease_expires_at = None
                row.detail = {**row.detail, "trouble": trouble}
                session.add(row)

        with contextlib.suppress(BrokerError):
            await self._database.transaction(work)

    async def move(self) -> None:
        """Do a turn's work for every rotation that is running, several batches each; the worker's job, about every second.

        Half of the time at most is spent, so that what callers want comes between. One that fails stops no other.
        """
        for row in await self._database.read(lambda session: _running(session, list(self._classes))):
            try:
                await self._turn(row)
            except BrokerError as error:
                log.warning("rotation.waits", rotation_id=row.id, key_class=row.key_class, code=error.code)
            except Exception:
                log.exception("worker.defect", job="rotation", rotation_id=row.id)

    async def _turn(self, row: Rotation) -> None:
        until, before = time.monotonic() + TURN_SECONDS, progress(row)
        while time.monotonic() < until:
            row = await self.advance(row.id)
            if row.state != "running" or progress(row) == before:
                return
            before = progress(row)
            await asyncio.sleep(0)

    async def retire_due(self) -> int:
        """Destroy previous root keys and retired data keys whose time has come; return how many. The worker's job.

        A retired data key that something readable is under is live again instead, is logged as critical and audited: nothing
        is lost, but somebody writes who does not ask the floor.
        """

        def work(session: Session) -> int:
            retired = retire_due(session)
            if retired:
                entries = (Entry("key.retired", "worker", detail={"class": one, "key": key}) for one, key in retired)
                self._audit.append(session, *entries)
            return len(retired)

        destroyed = await self._database.transaction(work)
        for kind in self._classes.values():
            if isinstance(kind, DataKeys):
                destroyed += sum([await self._settled(act) for act in await kind.retired()])
        return destroyed

    async def _settled(self, act: Act) -> bool:
        """Do what a retired data key needs; return whether it was shredded."""

        def work(session: Session) -> Entry | None:
            entry = act(session)
            if entry is not None:
                self._audit.append(session, entry)
            return entry

        entry = await self._database.transaction(work)
        if entry is not None and entry.action == REVIVED:
            log.critical(REVIVED, key=entry.detail["key"], values=entry.detail["values"])
        return entry is not None and entry.action == SHREDDED

    # Reading

    async def get(self, rotation_id: str) -> Rotation:
        """Return one rotation (NotFound)."""
        row = await self._database.read(lambda session: session.get(Rotation, rotation_id))
        if row is None:
            raise NotFound
        return row

    async def page(self, *, limit: int, before: tuple[float, str] | None = None) -> list[Rotation]:
        """Return up to ``limit`` rotations, newest first, those after ``before``: (created_at, id) of the last one seen."""
        query = select(Rotation).order_by(col(Rotation.created_at).desc(), col(Rotation.id).desc()).limit(limit)
        if before is not None:
            position = sa.tuple_(*map(sa.literal, before))
            query = query.where(sa.tuple_(col(Rotation.created_at), col(Rotation.id)) < position)
        return await self._database.read(lambda session: list(session.exec(query)))

    async def active(self, key_class: str) -> Rotation | None:
        """Return the rotation of a class that is not over (NotFound for an unknown class)."""
        self._class(key_class)
        return await self._database.read(lambda session: _active(session, key_class))

    async def report(self) -> list[ClassReport]:
        """Return what each class's keys cover. Counts every sealed value: not for hot paths."""
        found = []
        for name, kind in self._classes.items():
            active = await self.active(name)
            found.append(ClassReport(name, await kind.rows(), active.id if active is not None else None))
        return found

    def _class(self, key_class: str) -> KeyClass:
        if key_class not in self._classes:
            raise NotFound
        return self._classes[key_class]


def progress(row: Rotation) -> tuple[Any, ...]:
    """Return what changes whenever a rotation gets on."""
    return row.state, row.step, row.position, row.done, row.failed


def _new_rotation(kind: KeyClass, plan: Plan) -> Rotation:
    return Rotation(
        id=new_id("rot"),
        key_class=kind.name,
        step=kind.steps[0],
        old_key=plan.old_keys[0] if plan.old_keys else None,
        new_key=plan.new_key,
        total=plan.total,
        detail={"old_keys": list(plan.old_keys)},
    )


def _planned(session: Session, kind: KeyClass, plan: Plan) -> Rotation:
    """Return a rotation that is not stored; ``waiting_for``: who would hold it up now, of those that are alive."""
    row = _new_rotation(kind, plan)
    row.id, row.state, row.created_at = "", "planned", now(session)
    row.updated_at = row.created_at
    lacking = replicas.lacking(session, kind.name, plan.new_key) if plan.new_key is not None else ()
    row.detail = {**row.detail, "places": dict(plan.places), "waiting_for": named(lacking)}
    return row


def _lock_starts(session: Session) -> None:
    if session.get_bind().dialect.name == "postgresql":  # SQLite's write transactions run one at a time anyway
        session.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": ROTATIONS_LOCK})


def _active(session: Session, key_class: str) -> Rotation | None:
    query = select(Rotation).where(Rotation.key_class == key_class, col(Rotation.state).in_(ACTIVE))
    return session.exec(query).first()


def _refuse_second(session: Session, key_class: str) -> None:
    found = _active(session, key_class)
    if found is not None:
        error = Conflict(f"the rotation {found.id} of this class is {found.state}; it has to end first")
        error.members = {"made_id": found.id}
        raise error


def _locked(session: Session, rotation_id: str) -> Rotation:
    row = session.get(Rotation, rotation_id, with_for_update=True)
    if row is None:
        raise NotFound
    return row


def _running(session: Session, key_classes: Sequence[str]) -> list[Rotation]:
    query = select(Rotation).where(Rotation.state == "running", col(Rotation.key_class).in_(key_classes))
    return list(session.exec(query.order_by(col(Rotation.created_at))))


def _entry(action: str, row: Rotation, actor: str) -> Entry:
    detail: dict[str, Any] = {"rotation": row.id, "class": row.key_class, "step": row.step}
    detail |= {"old_keys": row.detail.get("old_keys", []), "new_key": row.new_key}
    detail |= {"total": row.total, "done": row.done, "failed": row.failed}
    detail |= {name: row.detail[name] for name in ("reason", "abandon_unreadable") if name in row.detail}
    return Entry(f"rotation.{action}", actor, outcome="failed" if action == "failed" else "ok", detail=detail)
