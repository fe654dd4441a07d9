"""The canary of a client secret: a candidate refreshes a few connections before it goes live, or goes away.

A canary is a row of ``rotations`` of the class ``client-secret``, made with the candidate. Any process may do its next part,
one at a time by a lease: try the candidate with the connection that was used most lately, in front of the live secrets, so
that a connection suffers nothing by a wrong one. The first refusal of the client ends it. What else goes wrong says nothing
of the secret: another connection is tried, later on if the provider is in trouble. What a part came to counts only while
nobody paused the canary: a paused one neither promotes nor rolls back.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.credentials import Credentials
from broker.database import Database, now
from broker.egress import Egress
from broker.errors import (
    BrokerError,
    Conflict,
    DatabaseUnavailable,
    NotFound,
    ProviderUnavailable,
    SecretStoreUnavailable,
    UpstreamInvalid,
    UpstreamTimeout,
)
from broker.integrations import Configured, Integrations
from broker.integrations.client_secrets import KEY_CLASS, end_canary
from broker.integrations.probe import proof_of
from broker.models import ClientSecret, Connection, Integration, Rotation
from providers.spec import Provider

LEASE_SECONDS = 90.0  # longer than a refresh lasts, its waiting for another process included
GIVE_UP_SECONDS = 900.0
LONGEST_PAUSE_SECONDS = 60.0
AT_ONCE = 10  # connections a claim, so that a process that stops is not waited for long
MOST_TRIED = 500
TROUBLE = (ProviderUnavailable, UpstreamTimeout, UpstreamInvalid, SecretStoreUnavailable, DatabaseUnavailable)
Move = Literal["try", "wait", "probe", "promote", "roll_back"]
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Standing:
    """How a canary stands: the connections to try next, whether others have to wait first, and how old it is."""

    total: int
    done: int
    next: Sequence[Connection]
    waiting: bool
    age_seconds: float


def next_move(standing: Standing) -> Move:
    """Return what is to be done next (pure).

    Enough successes are proof, as are fewer when no connection is left; without any connection a made-up code has to do.
    """
    if standing.done >= standing.total:
        return "promote"
    if standing.age_seconds > GIVE_UP_SECONDS:
        return "roll_back"
    if standing.next:
        return "try"
    if standing.waiting:
        return "wait"
    return "promote" if standing.done else "probe"


def pause_seconds(waits: int) -> float:
    """Return how long to wait after trouble at the provider that was seen so many times before (pure)."""
    return min(2.0 ** min(waits, 10), LONGEST_PAUSE_SECONDS)


class Canaries:
    """Carries canaries on. Any number of processes may: a lease decides."""

    def __init__(
        self, database: Database, integrations: Integrations, credentials: Credentials, egress: Egress
    ) -> None:
        """Keep the parts."""
        self._database = database
        self._integrations = integrations
        self._credentials = credentials
        self._egress = egress
        self._owner = secrets.token_hex(8)

    async def run_due(self) -> int:
        """Do the next part of every canary that is nobody's now; return how many. A failure of one stops no other."""
        found = await self._database.read(_due)
        for rotation_id in found:
            try:
                await self._run(rotation_id)
            except BrokerError as error:
                log.warning("canary.failed", rotation_id=rotation_id, code=error.code)
                await self._pause(rotation_id, error.code)
        return len(found)

    async def _run(self, rotation_id: str) -> None:
        for _ in range(AT_ONCE):
            rotation = await self._database.transaction(lambda session: _claim(session, rotation_id, self._owner))
            if rotation is None or not await self._moved(rotation):
                return
        await self._database.transaction(lambda session: _release(session, rotation_id, self._owner))

    async def _moved(self, rotation: Rotation) -> bool:
        """Make one move; return whether another may follow at once."""
        standing = await self._standing(rotation)
        move = next_move(standing)
        if move == "try":
            return await self._tried(rotation, standing.next[0])
        if move == "wait":
            await self._pause(rotation.id, rotation.detail.get("trouble"))
        elif move == "probe":
            await self._probed(rotation)
        elif move == "promote":
            await self._promote(rotation, "proven" if standing.done >= standing.total else "proven_by_fewer")
        else:
            await self._roll_back(rotation, rotation.detail.get("trouble") or "timed_out")
        return False

    async def _standing(self, rotation: Rotation) -> Standing:
        name, tried = rotation.detail["integration"], rotation.detail.get("tried", [])
        catalog = self._integrations.catalog

        def work(session: Session) -> Standing:
            at, row = now(session), session.get(Integration, name)
            if row is None:
                raise NotFound
            fitting = [*_renewed_by_client(row, catalog.get(row.provider)), col(Connection.id).not_in(tried)]
            waits = col(Connection.refresh_not_before_at)
            free = select(Connection).where(*fitting, waits.is_(None) | (waits <= at))
            free = free.order_by(sa.func.coalesce(Connection.last_used_at, 0.0).desc(), col(Connection.id)).limit(1)
            following = list(session.exec(free)) if len(tried) < MOST_TRIED else []
            later = session.exec(select(Connection.id).where(*fitting, waits > at).limit(1)).first()
            return Standing(rotation.total, rotation.done, following, later is not None, at - rotation.created_at)

        return await self._database.read(work)

    # Moves

    async def _tried(self, rotation: Rotation, row: Connection) -> bool:
        try:
            tried = await self._credentials.try_client_secret(row, str(rotation.new_key))
        except TROUBLE as error:
            await self._pause(rotation.id, error.code)
            return False
        except BrokerError as error:
            log.info("canary.unproven", rotation_id=rotation.id, connection_id=row.id, code=error.code)
            return await self._count(rotation, row, failed=1)
        if tried == "refused":
            await self._roll_back(rotation, "client_refused")
            return False
        return await self._count(rotation, row, done=1) if tried == "taken" else True

    async def _probed(self, rotation: Rotation) -> None:
        configured = await self._integrations.configured(rotation.detail["integration"])
        proof = await self._proof(configured, str(rotation.new_key))
        if proof == "proved":
            await self._promote(rotation, "proven_by_test")
        elif proof == "refused":
            await self._roll_back(rotation, "client_refused")
        else:
            await self._pause(rotation.id, "upstream_invalid")

    async def _proof(self, configured: Configured, secret_id: str) -> Literal["proved", "refused", "odd"]:
        if not configured.endpoints.urls["token_url"]:
            return "odd"
        client = await self._integrations.client(configured, only=(), first=secret_id)
        if not client.secrets:
            return "odd"  # deleted a moment ago, and the canary with it
        return await proof_of(self._integrations, self._egress, configured, client.secrets[0])

    async def _promote(self, rotation: Rotation, reason: str) -> None:
        name, secret_id = rotation.detail["integration"], str(rotation.new_key)
        if not await self._integrations.promote_proven(name, secret_id, owner=self._owner, reason=reason):
            await self._let_go(rotation)
            return
        log.info("canary.promoted", rotation_id=rotation.id, integration=name, secret_id=secret_id, reason=reason)
        await self._note(name, "info", f"a new client secret went live: {reason}")

    async def _roll_back(self, rotation: Rotation, reason: str) -> None:
        name, secret_id = rotation.detail["integration"], str(rotation.new_key)
        if not await self._integrations.roll_back_secret(name, secret_id, owner=self._owner, reason=reason):
            await self._let_go(rotation)
            return
        log.warning("canary.rolled_back", rotation_id=rotation.id, integration=name, secret_id=secret_id, reason=reason)
        await self._note(name, "error", f"a new client secret was rolled back: {reason}")

    async def _let_go(self, rotation: Rotation) -> None:
        """Give back the lease of a canary that somebody paused meanwhile: who resumes it need not wait for its end."""
        await self._database.transaction(lambda session: _release(session, rotation.id, self._owner))

    async def _note(self, name: str, level: str, text: str) -> None:
        await self._integrations.note(name, action="client_secret", level=level, text=text)

    # Records

    async def _count(self, rotation: Rotation, row: Connection, *, done: int = 0, failed: int = 0) -> bool:
        """Record what a connection came to; return whether the canary is still ours, and running."""

        def work(session: Session) -> bool:
            current = _held(session, rotation.id, self._owner)
            if current is None:
                return False
            current.done, current.failed = current.done + done, current.failed + failed
            current.detail = {**_untroubled(current.detail), "tried": [*current.detail.get("tried", []), row.id]}
            current.updated_at = now(session)
            session.flush()
            return current.state == "running"

        return await self._database.transaction(work)

    async def _pause(self, rotation_id: str, trouble: str | None) -> None:
        """Keep the lease, idle, for as long as is to be waited: nobody claims it before."""

        def work(session: Session) -> None:
            current = _held(session, rotation_id, self._owner)
            if current is None:
                return
            at, waits = now(session), current.detail.get("waits", 0)
            current.lease_expires_at = at + pause_seconds(waits)
            current.detail = {**current.detail, "waits": waits + 1, **({"trouble": trouble} if trouble else {})}
            current.updated_at = at
            session.flush()

        await self._database.transaction(work)


def _untroubled(detail: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in detail.items() if name not in {"waits", "trouble"}}


def _renewed_by_client(row: Integration, provider: Provider | None) -> list[sa.ColumnElement[bool]]:
    """Return the conditions of a connection whose renewal proves the integration's client as it is now (Conflict)."""
    if provider is None:
        raise Conflict("the integration's provider is not in this version's catalog")
    without_client = [name for name, minting in provider.minting.items() if not minting.uses_client]
    return [
        col(Connection.integration) == row.name,
        col(Connection.client_id) == row.client_id,
        col(Connection.status) == "active",
        col(Connection.refreshable).is_(True),
        col(Connection.deleted_at).is_(None),
        col(Connection.credential_type).not_in(without_client),
    ]


def _free(at: float) -> sa.ColumnElement[bool]:
    return col(Rotation.lease_owner).is_(None) | (col(Rotation.lease_expires_at) < at)


def _due(session: Session) -> list[str]:
    query = select(Rotation.id).where(Rotation.key_class == KEY_CLASS, Rotation.state == "running")
    return list(session.exec(query.where(_free(now(session))).order_by(col(Rotation.created_at))))


def _claim(session: Session, rotation_id: str, owner: str) -> Rotation | None:
    """Take or prolong the lease of a canary that runs; None when it is another's, or over."""
    at = now(session)
    mine = sa.update(Rotation).where(
        col(Rotation.id) == rotation_id,
        col(Rotation.state) == "running",
        _free(at) | (col(Rotation.lease_owner) == owner),
    )
    claimed = session.execute(mine.values(lease_owner=owner, lease_expires_at=at + LEASE_SECONDS))
    if claimed.rowcount != 1:  # type: ignore[attr-defined]
        return None
    rotation = session.get_one(Rotation, rotation_id, populate_existing=True)
    secret = session.get(ClientSecret, rotation.new_key)
    if secret is not None and secret.state == "candidate":
        return rotation
    # It was over already, and somebody resumed it: there is nothing left to try.
    end_canary(session, str(rotation.new_key), "done" if secret is not None else "failed", "over")
    return None


def _held(session: Session, rotation_id: str, owner: str) -> Rotation | None:
    """Return the row, locked, while the lease is ours and the canary not over."""
    row = session.get(Rotation, rotation_id, with_for_update=True)
    return row if row is not None and row.lease_owner == owner and row.ended_at is None else None


def _release(session: Session, rotation_id: str, owner: str) -> None:
    row = _held(session, rotation_id, owner)
    if row is not None:
        row.lease_owner = None
        session.flush()
