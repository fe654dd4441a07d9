"""`kill -9` at random moments against a broker that takes in webhooks and the worker that delivers them."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.models import WebhookDelivery, WebhookEvent
from tests.crash.campaign import Forks, Process
from tests.crash.processes import Site
from tests.crash.webhook_parties import Provider, Receiver

SENDERS = 32
MOST_LATER_SECONDS = 0.02  # at which a kill falls after the count that was drawn for it
SETTLED_SECONDS = 0.1  # in which what a dead process had sent to the database's server took effect, or did not
VICTIMS = {"serve": 9, "worker": 9, "both": 2}
REST_SECONDS = {True: 300.0, False: 60.0}  # by patience
OPEN = ("pending", "delivering", "retrying")


def show(line: str) -> None:
    """Print at once, also to who waits for a long run."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass
class Kill:
    """One kill and where it fell. ``in_flight``: requests that it left without an answer."""

    number: int
    victim: str
    begun: int
    in_flight: int = 0
    under_way: frozenset[tuple[str, str]] = frozenset()  # (event, claim) of the deliveries that the worker had claimed


@dataclass
class Stored:
    """What the database holds at the end, by event id."""

    nonces: dict[str, str]
    deliveries: dict[str, list[str]]  # the states of its deliveries


@dataclass
class WebhookCampaign:
    """Posts events in slices; in each, at a random point of it, something is killed while the others go on."""

    site: Site
    forks: Forks
    provider: Provider
    receiver: Receiver
    patient: bool  # leases of the dead end by themselves; else time is moved on for them
    kills: list[Kill] = field(default_factory=list)
    serving: Process | None = None
    working: Process | None = None

    async def start(self) -> None:
        """Start both processes."""
        self.serving, self.working = await self.forks.fork("--no-worker"), await self.forks.fork_worker()
        self.provider.port = self.serving.port

    async def run(self, events: int, kills: int) -> None:
        """Post that many while that many are killed; return once everything that is stored was delivered."""
        chance = random.Random(self.provider.seed)  # noqa: S311 - repeatable, not secret
        for number in range(kills):
            count = events * (number + 1) // kills - events * number // kills
            victim = chance.choices(list(VICTIMS), list(VICTIMS.values()))[0]
            at, later = self.provider.begun + chance.randrange(count), chance.uniform(0, MOST_LATER_SECONDS)
            async with asyncio.TaskGroup() as group:
                group.create_task(self.provider.post(count, senders=SENDERS))
                group.create_task(self._kill_at(at, later, Kill(number + 1, victim, 0)))
        await self._come_to_rest()

    async def _kill_at(self, begun: int, later_seconds: float, kill: Kill) -> None:
        while self.provider.begun <= begun:  # noqa: ASYNC110 - the senders count, they signal nothing
            await asyncio.sleep(0.001)
        await asyncio.sleep(later_seconds)
        lost = sum(one.unanswered for one in self.provider.posted.values())
        kill.begun = self.provider.begun
        dead = [
            one for one, name in ((self.serving, "serve"), (self.working, "worker")) if kill.victim in {name, "both"}
        ]
        for one in dead:
            assert one is not None
            one.signal(signal.SIGKILL)
        for one in dead:
            assert one is not None
            await one.ended()
        if self.working in dead:
            await asyncio.sleep(SETTLED_SECONDS)
            kill.under_way = await self._under_way() - self.cut_off()
        await self._replace(dead)
        kill.in_flight = sum(one.unanswered for one in self.provider.posted.values()) - lost
        self.kills.append(kill)
        self._write(kill)

    def _write(self, kill: Kill) -> None:
        fell = f"{kill.in_flight} requests unanswered, {len(kill.under_way)} deliveries under way"
        show(f"kill {kill.number}: {kill.victim} at {kill.begun} events begun: {fell}")

    async def _replace(self, dead: Sequence[Process | None]) -> None:
        if self.serving in dead:
            self.serving = await self.forks.fork("--no-worker")
            self.provider.port = self.serving.port
        if self.working in dead:
            self.working = await self.forks.fork_worker()

    async def _under_way(self) -> frozenset[tuple[str, str]]:
        """Return what workers, all of them dead, had claimed and not recorded."""
        claimed = select(WebhookDelivery.event_id, WebhookDelivery.claim).where(
            col(WebhookDelivery.state) == "delivering", col(WebhookDelivery.claim).is_not(None)
        )
        rows = await self.site.parts.database.read(lambda session: list(session.exec(claimed)))
        return frozenset((event_id, str(claim)) for event_id, claim in rows)

    def cut_off(self) -> frozenset[tuple[str, str]]:
        """Return what was under way at any kill: (event, claim)."""
        return frozenset(claim for kill in self.kills for claim in kill.under_way)

    # The end

    async def _come_to_rest(self) -> None:
        """Wait until no delivery is open."""
        ends_at = time.monotonic() + REST_SECONDS[self.patient]
        while await self._open():
            assert time.monotonic() < ends_at, "deliveries stay open"
            if not self.patient:
                await self._end_leases()
            await asyncio.sleep(0.2)

    async def _open(self) -> int:
        waiting = sa.select(sa.func.count()).where(col(WebhookDelivery.state).in_(OPEN))
        return int(await self.site.parts.database.read(lambda session: session.execute(waiting).scalar_one()))

    async def _end_leases(self) -> None:
        """Move time on for what the dead had claimed; a claim of a living worker is another one."""
        claims = {claim for _, claim in self.cut_off()}
        of_the_dead = col(WebhookDelivery.state) == "delivering", col(WebhookDelivery.claim).in_(claims)
        over = sa.update(WebhookDelivery).where(*of_the_dead).values(due_at=0.0)
        await self.site.parts.database.transaction(lambda session: session.execute(over))

    async def stored(self) -> Stored:
        """Return what the database holds."""

        def work(session: Session) -> Stored:
            events = session.exec(select(WebhookEvent.id, WebhookEvent.provider_event_id)).all()
            states: dict[str, list[str]] = defaultdict(list)
            for event_id, state in session.exec(select(WebhookDelivery.event_id, WebhookDelivery.state)):
                states[event_id].append(state)
            return Stored({event_id: str(nonce) for event_id, nonce in events}, dict(states))

        return await self.site.parts.database.read(work)
