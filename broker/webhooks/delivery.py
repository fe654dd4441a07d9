"""Takes what is due from the queue, has it posted to its subscriber, and records what came of it, while a worker runs.

Each subscription has a lane of its own. A lane begins at most ``max_concurrent`` attempts at once and ``max_per_second``;
after repeated failures its breaker holds it, so that no attempt is burnt, and one at a time probes. ``max_concurrent`` counts
for each process with a worker, ``max_per_second`` for all of them where Redis is configured.

A subscriber's answer is its status: of its body a little is read, to keep the connection, and nothing is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

import structlog

from broker.database import Database, GroupWriter
from broker.egress import NoRoom
from broker.errors import (
    BrokerError,
    CircuitOpen,
    DatabaseUnavailable,
    RateLimited,
    SecretStoreUnavailable,
)
from broker.limits import BreakerRule, Breakers, Pass, Rates
from broker.models import new_id
from broker.telemetry import Metrics
from broker.vault import SecretUnreadable
from broker.webhooks.backoff import Attempt, Next, asked_seconds, in_trouble, next_of
from broker.webhooks.configured import Receiver
from broker.webhooks.lanes import NOTHING, Bounds, Lane, Load, may_start
from broker.webhooks.queue import (
    Disable,
    Outcome,
    Taken,
    claim,
    ends_a_turn,
    extend,
    last_number,
    record,
    soonest,
)
from broker.webhooks.sending import Sending

LEASE_SECONDS: Final = 30.0
BEAT_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.1  # for what other processes store
LOOK_SECONDS: Final = 1.0  # for what else may have become due: a retry by hand, a subscription that is active again
GRACE_SECONDS: Final = 10.0
BUSY_SECONDS: Final = 0.01
PAUSE_SECONDS: Final = 60.0  # the longest that a subscriber's Retry-After holds its whole lane
POSTPONED_SECONDS: Final = 10.0  # what cannot be opened or signed now
RECORD_AGAIN_SECONDS: Final = (0.2, 1.0, 3.0)
RULE: Final = BreakerRule(failure_threshold=5, window_seconds=60.0, recovery_seconds=30.0)
log = structlog.get_logger()


class Delivery:
    """The deliveries of one process. Any number of processes may run it: claims decide who acts. One event loop."""

    def __init__(
        self,
        database: Database,
        receivers: Callable[[], Awaitable[Mapping[str, Receiver]]],
        sending: Sending,
        rates: Rates,
        metrics: Metrics,
        disable: Disable,
        *,
        bounds: Bounds | None = None,
        lease_seconds: float = LEASE_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        random_share: Callable[[], float] = random.random,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the parts; nothing runs yet.

        ``receivers``: the active subscriptions by id. ``disable``: see ``queue.record``. ``random_share`` spreads retries;
        ``monotonic`` is the clock of durations.
        """
        self._database = database
        self._receivers = receivers
        self._sending = sending
        self._rates = rates
        self._metrics = metrics
        self._monotonic = monotonic
        self._breakers = Breakers(clock=monotonic)
        self._bounds = bounds or Bounds()
        self._lease_seconds = lease_seconds
        self._grace_seconds = grace_seconds
        self._random_share = random_share
        self._records: GroupWriter[Outcome, bool] = GroupWriter(database, partial(record, disable=disable))
        self._lanes: dict[str, Lane] = {}
        self._active = 0
        self._under_way = NOTHING
        self._starved: set[Lane] = set()
        self._held: dict[str, Taken] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._clock_offset = 0.0  # from this machine's monotonic clock to the database's
        self._running = False
        self._awake = asyncio.Event()
        self._stopping = asyncio.Event()

    # --- Its life.

    def wake(self) -> None:
        """Look at once: this process has put something into the queue. Does nothing where no worker runs."""
        self._awake.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run beside whatever else this process does; at the end stop in an orderly way, for good.

        A second worker of the same process has nothing to do here.
        """
        if self._running:
            yield
            return
        self._running = True
        task = asyncio.create_task(self.run(), context=contextvars.Context())
        try:
            yield
        finally:
            self.stop()
            await task

    def stop(self) -> None:
        """End soon: what is under way is finished within the grace time, everything else given back."""
        self._stopping.set()
        self._awake.set()

    async def run(self) -> None:
        """Deliver until ``stop``. What fails is logged and tried again."""
        beside = [asyncio.create_task(self._watch()), asyncio.create_task(self._beat())]
        try:
            while not self._stopping.is_set():
                await self._turn()
            await self._finish()
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await self._records.aclose()

    async def _turn(self) -> None:
        """Look once, and rest until there is a reason to look again."""
        self._awake.clear()
        pause = LOOK_SECONDS
        try:
            pause = await self._round()
        except BrokerError as error:
            log.warning("delivery.paused", code=error.code)
        except Exception:
            log.exception("delivery.defect")
        if not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._awake.wait(), pause)

    async def _finish(self) -> None:
        feeding = [lane.feeding for lane in self._lanes.values() if lane.feeding is not None]
        for task in feeding:
            task.cancel()
        await asyncio.gather(*feeding, return_exceptions=True)
        self._give_back([taken for lane in self._lanes.values() for taken in lane.waiting])
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._grace_seconds)
        late = list(self._tasks)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await self._record([Outcome(taken, None) for taken in self._held.values()])

    # --- Looking and claiming.

    async def _round(self) -> float:
        """Claim what is due for every lane that can take it; return after how many seconds to look again at the latest."""
        await self._take_receivers()
        began = self._monotonic()
        room = {one: free for one, lane in self._lanes.items() if (free := lane.wants(began)) > 0}
        for lane in self._lanes.values():
            lane.hungry = lane.subscription_id not in room
        if not room:
            return self._rest_seconds(began, math.inf)
        at, due = await self._database.query(partial(soonest, subscription_ids=list(room)))
        wanted = {one: room[one] for one, due_at in due.items() if due_at <= at}
        if not wanted or self._stopping.is_set():
            later = min((due_at - at for due_at in due.values()), default=math.inf)
            return self._rest_seconds(began, later)
        found = await self._claim(wanted)
        return 0.0 if found else BUSY_SECONDS  # what others hold locked is theirs in a moment

    def _rest_seconds(self, began: float, due_in: float) -> float:
        opening = [lane.held_until - began for lane in self._lanes.values() if lane.held_until > began]
        return max(0.0, min(LOOK_SECONDS, due_in, *opening))

    async def _take_receivers(self) -> None:
        receivers = await self._receivers()
        self._active = len(receivers)
        for subscription_id, lane in list(self._lanes.items()):
            lane.take(receivers.get(subscription_id))
            if lane.receiver is None:
                lane.changed.set()
                if lane.idle:
                    del self._lanes[subscription_id]
        for subscription_id in receivers.keys() - self._lanes.keys():
            self._lanes[subscription_id] = Lane(subscription_id, receivers[subscription_id])

    async def _claim(self, wanted: Mapping[str, int]) -> int:
        began = self._monotonic()
        work = partial(claim, wanted=wanted, claim_id=new_id("clm"), lease_seconds=self._lease_seconds)
        found = await self._database.transaction(work)
        if self._monotonic() - began > self._lease_seconds / 2:  # too late to begin anything with it
            log.warning("delivery.claim_late", deliveries=len(found))
            return 0
        for taken in found:
            self._clock_offset = taken.taken_at - self._monotonic()
            self._held[taken.id] = taken
            self._lanes[taken.subscription_id].waiting.append(taken)
        for subscription_id in {taken.subscription_id for taken in found}:
            self._feed(self._lanes[subscription_id])
        return len(found)

    def _feed(self, lane: Lane) -> None:
        if lane.feeding is None or lane.feeding.done():
            lane.feeding = asyncio.create_task(self._begin_all(lane), context=contextvars.Context())

    async def _watch(self) -> None:
        """Notice what other processes store, by the number of the newest event."""
        known = -1
        while True:
            try:
                number = await self._database.query(last_number)
            except BrokerError:
                number = known  # the next round says so
            if number != known:
                known = number
                self._awake.set()
            await asyncio.sleep(POLL_SECONDS)

    async def _beat(self) -> None:
        """Keep the leases of what is held here."""
        while True:
            await asyncio.sleep(self._lease_seconds / (LEASE_SECONDS / BEAT_SECONDS))
            held = {one: taken.claim for one, taken in self._held.items()}
            if not held:
                continue
            try:
                kept = await self._database.transaction(partial(extend, held=held, lease_seconds=self._lease_seconds))
            except BrokerError as error:
                log.warning("delivery.beat_failed", code=error.code, deliveries=len(held))
            else:
                log.debug("delivery.beat", held=len(held), kept=kept)

    # --- A lane at work.

    async def _begin_all(self, lane: Lane) -> None:
        """Begin what waits in a lane, as fast as its subscriber, its breaker and the process's bounds allow."""
        try:
            while lane.waiting and lane.receiver is not None and self._monotonic() >= lane.held_until:
                if lane.rate is not None and not await self._rate_allows(lane):
                    break
                await self._room(lane, lane.waiting[0].size or 0)
                if lane.receiver is None or not self._begin(lane, lane.receiver):
                    break
        except Exception:
            log.exception("delivery.defect", subscription_id=lane.subscription_id)
            lane.hold(self._monotonic() + LOOK_SECONDS)
        self._give_back(lane.waiting)
        lane.waiting.clear()

    async def _rate_allows(self, lane: Lane) -> bool:
        try:
            await self._rates.take(f"webhooks:{lane.subscription_id}", lane.rate, caller="", wait_seconds=PAUSE_SECONDS)
        except RateLimited as error:
            lane.hold(self._monotonic() + float(error.headers["Retry-After"]))
            return False
        return True

    async def _room(self, lane: Lane, size: int) -> None:
        while lane.receiver is not None and (lane.full or not self._may_start(lane, size)):
            lane.changed.clear()
            if not lane.full:
                self._starved.add(lane)  # whoever ends makes room for it
            await lane.changed.wait()
            self._starved.discard(lane)

    def _may_start(self, lane: Lane, size: int) -> bool:
        return may_start(lane.under_way, self._under_way, size, self._active, self._bounds)

    def _begin(self, lane: Lane, receiver: Receiver) -> bool:
        """Begin the first that waits, unless the breaker holds the lane."""
        try:
            leave = self._breakers.enter(lane.subscription_id, RULE)
        except CircuitOpen as error:
            lane.hold(self._monotonic() + float(error.headers["Retry-After"]))
            return False
        taken = lane.waiting.popleft()
        lane.probing = leave.is_probe
        size = taken.size or 0
        lane.began(size)
        self._under_way = Load(self._under_way.attempts + 1, self._under_way.body_bytes + size)
        task = asyncio.create_task(self._deliver(lane, receiver, taken, leave))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return not lane.probing

    async def _deliver(self, lane: Lane, receiver: Receiver, taken: Taken, leave: Pass) -> None:
        try:
            with leave:
                outcome = await self._attempted(lane, receiver, taken, leave)
        finally:
            self._over(lane, taken, leave)
        await self._record([outcome])
        if ends_a_turn(outcome):
            self._awake.set()  # the next one in its line is due since the record

    def _over(self, lane: Lane, taken: Taken, leave: Pass) -> None:
        size = taken.size or 0
        self._under_way = Load(self._under_way.attempts - 1, self._under_way.body_bytes - size)
        if leave.is_probe:
            lane.probing = False
            self._awake.set()
        lane.ended(size)
        for one in self._starved:
            one.changed.set()
        if lane.hungry and lane.wants(self._monotonic()) > 0:
            self._awake.set()

    def _give_back(self, waiting: Sequence[Taken]) -> None:
        if waiting:
            task = asyncio.create_task(self._record([Outcome(taken, None) for taken in waiting]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # --- One attempt.

    async def _attempted(self, lane: Lane, receiver: Receiver, taken: Taken, leave: Pass) -> Outcome:
        try:
            request = await self._sending.request(receiver, taken.event_id, replay=taken.replay)
        except (SecretStoreUnavailable, SecretUnreadable, ValueError) as error:
            log.warning("delivery.postponed", delivery_id=taken.id, error=type(error).__name__)
            return Outcome(taken, None, delay_seconds=POSTPONED_SECONDS)
        except DatabaseUnavailable:
            return Outcome(taken, None, delay_seconds=LOOK_SECONDS)
        except Exception:  # else the heartbeat would keep it here, unsent, for as long as this process lives
            log.exception("delivery.defect", delivery_id=taken.id)
            return Outcome(taken, None, delay_seconds=POSTPONED_SECONDS)
        if request is None:
            return Outcome(taken, Next("dead", reason="event_erased"))
        began = self._monotonic()
        at = began + self._clock_offset
        if taken.attempts == 0:
            self._metrics.webhook_first_attempt(max(0.0, at - taken.created_at))
        try:
            attempt = await self._sending.post(request, receiver.timeout_seconds)
        except NoRoom:  # our own crowd: it says nothing of the subscriber
            return Outcome(taken, None, delay_seconds=LOOK_SECONDS)
        except Exception:  # it may have arrived, so it counts as an attempt
            log.exception("delivery.defect", delivery_id=taken.id)
            attempt = Attempt(None, "defect")
        return self._judged(lane, taken, leave, attempt, at, self._monotonic() - began)

    def _judged(self, lane: Lane, taken: Taken, leave: Pass, attempt: Attempt, at: float, seconds: float) -> Outcome:
        then = next_of(attempt, taken.attempts + 1, random_share=self._random_share())
        if in_trouble(attempt):
            leave.failed()
        else:
            leave.succeeded()
        asked = asked_seconds(attempt)
        if asked:
            lane.hold(self._monotonic() + min(asked, PAUSE_SECONDS))
        self._metrics.webhook_attempt(then.state, seconds)
        tried = {"at": at, "status": attempt.status, "error": attempt.error, "ms": round(seconds * 1000)}
        if then.state != "delivered":
            names = {"delivery_id": taken.id, "subscription_id": taken.subscription_id, "event_id": taken.event_id}
            what = {"status": attempt.status, "error": attempt.error, "attempts": taken.attempts + 1}
            log.warning("delivery.failed", **names, **what, state=then.state, again_in=round(then.delay_seconds))
        return Outcome(taken, then, tried)

    # --- Recording.

    async def _record(self, outcomes: Sequence[Outcome]) -> None:
        """Write outcomes; what cannot be written in some seconds is left to the end of its lease, and comes twice."""
        for pause in (*RECORD_AGAIN_SECONDS, None):
            results = await asyncio.gather(*map(self._records.submit, outcomes), return_exceptions=True)
            outcomes = [one for one, result in zip(outcomes, results, strict=True) if not self._recorded(one, result)]
            if not outcomes or pause is None or self._stopping.is_set():
                break
            await asyncio.sleep(pause)
        for one in outcomes:
            log.warning("delivery.not_recorded", delivery_id=one.taken.id)
            self._let_go(one.taken)

    def _recorded(self, outcome: Outcome, result: object) -> bool:
        """Say whether that is settled: written, or nobody's to write any more."""
        if isinstance(result, DatabaseUnavailable):
            return False
        if isinstance(result, BaseException):
            log.error("delivery.defect", exc_info=result)
            return False
        if not result:
            log.info("delivery.claim_lost", delivery_id=outcome.taken.id)
        self._let_go(outcome.taken)
        return True

    def _let_go(self, taken: Taken) -> None:
        if self._held.get(taken.id) is taken:
            del self._held[taken.id]
