"""A worker's deliveries over real sockets: a queue, subscribers that are raw servers, and what they saw."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session, col

from broker.database import Database
from broker.egress import Resolve
from broker.limits import Rates
from broker.models import WebhookSubscription
from broker.settings import Settings
from broker.telemetry import Metrics, new_metrics
from broker.vault.keyring import KeyEncryptionKey, Keyring, Sealer, open_sealer
from broker.webhooks.configured import Receiver
from broker.webhooks.delivery import Delivery
from broker.webhooks.sending import Sending, calls_of
from broker.webhooks.signing import V1aKey, v1a_keys
from providers.spec import Secret
from tests.broker.webhooks.deliveries import states

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OLD_SECRET = "whsec_RdvaYFYUXuIFuEbvZHwMfYFhUf7aMYjYcmM24+Aj40c="
KEYS = [v1a_keys(b"a" * 32), v1a_keys(b"b" * 32)]


def receiver(subscription_id: str, url: str, *secrets: str, **changes: Any) -> Receiver:
    """Return a subscriber as deliveries see it."""
    fields: dict[str, Any] = {
        "signature": "v1",
        "secrets": [Secret(one) for one in secrets or (SECRET,)],
        "max_per_second": None,
        "max_concurrent": 16,
        "timeout_seconds": 15.0,
        "failing_since": None,
        **changes,
    }
    return Receiver(subscription_id, url, **fields)


@dataclass
class Worker:
    """One process's deliveries; ``receivers`` are who is active."""

    database: Database
    delivery: Delivery
    sealer: Sealer
    metrics: Metrics
    receivers: dict[str, Receiver] = field(default_factory=dict)
    disabled: list[tuple[str, str]] = field(default_factory=list)

    def active(self, subscription_id: str, url: str, *secrets: str, **changes: Any) -> None:
        """Let a subscription be delivered to from now on."""
        self.receivers[subscription_id] = receiver(subscription_id, url, *secrets, **changes)

    async def current(self) -> Mapping[str, Receiver]:
        """Return who is active, as the subscriptions do."""
        return self.receivers

    def disable(self, session: Session, subscription_id: str, reason: str) -> None:
        """Disable as the subscriptions do."""
        self.disabled.append((subscription_id, reason))
        self.receivers.pop(subscription_id, None)
        of = col(WebhookSubscription.id) == subscription_id
        session.execute(sa.update(WebhookSubscription).where(of).values(active=False, disabled_reason=reason))

    async def until(self, done: Callable[[list[str]], bool], *subscription_ids: str) -> list[str]:
        """Wait until the deliveries' states fit; return them."""
        async with asyncio.timeout(20):
            while not done(found := await states(self.database, *subscription_ids)):
                self.delivery.wake()
                await asyncio.sleep(0.01)
        return found

    async def all_delivered(self, *subscription_ids: str) -> None:
        """Wait until every delivery has arrived."""
        await self.until(lambda found: set(found) == {"delivered"}, *subscription_ids)


@contextlib.asynccontextmanager
async def worker(
    database: Database,
    settings: Settings | None = None,
    *,
    resolve: Resolve | None = None,
    keys: Callable[[], list[V1aKey]] = lambda: KEYS,
    idle: bool = False,
    **options: Any,
) -> AsyncIterator[Worker]:
    """Run the deliveries of one process, or with ``idle`` only make them."""
    sealer = await open_sealer(database, Keyring([KeyEncryptionKey("k1", b"k" * 32)]))
    calls = calls_of(settings or Settings(env="development"), resolve=resolve)
    sending, rates, metrics = Sending(database, sealer, keys, calls), Rates(), new_metrics()
    made: list[Worker] = []
    options = {"random_share": lambda: 0.5, **options}
    delivery = Delivery(
        database,
        lambda: made[0].current(),  # noqa: PLW0108 - it is made below
        sending,
        rates,
        metrics,
        lambda session, one, reason: made[0].disable(session, one, reason),  # noqa: PLW0108
        **options,
    )
    made.append(Worker(database, delivery, sealer, metrics))
    try:
        if idle:
            yield made[0]
        else:
            async with delivery.running():
                yield made[0]
    finally:
        await sending.aclose()
        await rates.aclose()
        await calls.aclose()
