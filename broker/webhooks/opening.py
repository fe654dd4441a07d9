"""Makes the parts of webhooks, and closes them in order: no new requests, what is noted is written."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from broker.audit import Audit
from broker.callers import Callers
from broker.credentials import Credentials
from broker.database import Database
from broker.egress import Egress
from broker.integrations import Integrations
from broker.limits import Rates
from broker.settings import Settings
from broker.telemetry import Metrics
from broker.vault import Store
from broker.vault.keyring import Sealer
from broker.vault.system_keys import SystemKeys
from broker.webhooks.attributing import Attributing
from broker.webhooks.backlog import EVERY_SECONDS, measure
from broker.webhooks.delivery import Delivery
from broker.webhooks.history import History
from broker.webhooks.inbox import Inbox
from broker.webhooks.registering import Registering
from broker.webhooks.rejections import Rejections
from broker.webhooks.replaying import Replaying
from broker.webhooks.retention import Retention
from broker.webhooks.revision import Revision
from broker.webhooks.routes import App, WebhookRoute
from broker.webhooks.secrets import Secrets
from broker.webhooks.secrets import sweep_unreferenced as sweep_secrets
from broker.webhooks.sending import Sending, calls_of
from broker.webhooks.signing_keys import SigningKeys
from broker.webhooks.sources import Sources
from broker.webhooks.streaming import EventFeed
from broker.webhooks.subscriptions import Rules, Subscriptions
from broker.webhooks.verification import Verification
from broker.webhooks.waiting import Waiting

WAITING_SECONDS = 0.25
Job = tuple[float, Callable[[], Awaitable[object]]]  # a worker's: its pace in seconds, and what it does


@dataclass(frozen=True, slots=True)
class Given:
    """The process's parts that webhooks are made of. ``signing_keys``: the root keys of what is signed by ``v1a``."""

    settings: Settings
    database: Database
    audit: Audit
    egress: Egress
    metrics: Metrics
    sealer: Sealer
    vault: Store
    callers: Callers
    integrations: Integrations
    credentials: Credentials
    signing_keys: SystemKeys


@dataclass(frozen=True, slots=True)
class TakingIn:
    """What serves the requests that providers send."""

    sources: Sources
    verification: Verification
    inbox: Inbox
    rejections: Rejections
    settings: Settings
    metrics: Metrics

    def before(self, app: App) -> WebhookRoute:
        """Return the application with the route of the sources in front of it."""
        return WebhookRoute(
            app, self.sources, self.verification, self.inbox, self.rejections, self.settings, self.metrics
        )


@dataclass(frozen=True, slots=True)
class WebhookParts:
    """What takes events in, keeps, and delivers them in this process."""

    settings: Settings
    taking_in: TakingIn
    sources: Sources
    subscriptions: Subscriptions
    rules: Rules
    signing_keys: SigningKeys
    history: History
    replaying: Replaying
    event_feed: EventFeed
    registering: Registering
    delivery: Delivery
    jobs: Sequence[Job]


@contextlib.asynccontextmanager
async def open_webhooks(given: Given) -> AsyncIterator[WebhookParts]:
    """Open the parts of webhooks; at the end they are closed from the last one on."""
    database, settings = given.database, given.settings
    async with contextlib.AsyncExitStack() as stack:
        revision = Revision(database)
        of_configured = (database, given.vault, given.audit)
        registering = _registering(given)
        catalog = given.integrations.catalog
        sources = Sources(*of_configured, catalog, settings, revision=revision, registrar=registering)
        stack.push_async_callback(sources.aclose)
        keys = SigningKeys(given.signing_keys)
        subscriptions = Subscriptions(*of_configured, settings, revision=revision, signing_keys=keys)
        history = History(database, given.sealer, given.audit)
        event_feed = EventFeed(database)
        stack.push_async_callback(event_feed.aclose)
        rules = Rules()
        waiting = Waiting(database, history, rules, given.credentials, catalog)
        jobs = _jobs(given, waiting, sources, subscriptions, registering)
        delivery = await stack.enter_async_context(_delivery(given, subscriptions, keys))

        def on_stored() -> None:
            event_feed.wake()
            delivery.wake()

        taking_in = await stack.enter_async_context(_taking_in(given, sources, rules, on_stored=on_stored))
        of_events = (taking_in, sources, subscriptions, rules, keys)
        yield WebhookParts(
            settings,
            *of_events,
            history,
            Replaying(database, history, given.audit, wake=delivery.wake),
            event_feed,
            registering,
            delivery,
            jobs,
        )


def _jobs(
    given: Given, waiting: Waiting, sources: Sources, subscriptions: Subscriptions, registering: Registering
) -> tuple[Job, ...]:
    """Return what a worker does beside delivering, each with its pace in seconds."""
    database, settings = given.database, given.settings
    retention = Retention(database, days=settings.event_retention_days, count=settings.event_retention_count)
    return (
        (WAITING_SECONDS, waiting.fan_out_waiting),
        (2.0, waiting.release_parked),
        (60.0, retention.sweep),
        (60.0, sources.expire_secrets),
        (60.0, subscriptions.end_orphaned),
        (3600.0, functools.partial(sweep_secrets, database, given.vault, older_than_seconds=86_400.0)),
        (2.0, registering.run_due),
        (EVERY_SECONDS, functools.partial(measure, database, given.metrics)),
    )


@contextlib.asynccontextmanager
async def _delivery(given: Given, subscriptions: Subscriptions, keys: SigningKeys) -> AsyncIterator[Delivery]:
    """Open what delivers; it runs where a worker does. At the end its connections are closed."""
    settings, metrics = given.settings, given.metrics
    redis_url = settings.redis_url.reveal() if settings.redis_url is not None else None
    rates = Rates(redis_url, on_store_failure=metrics.rate_store_failure)
    calls = calls_of(settings)
    sending = Sending(given.database, given.sealer, keys.signing, calls)
    of_subscriptions = (subscriptions.receivers, sending, rates, metrics, subscriptions.disable)
    try:
        yield Delivery(given.database, *of_subscriptions)
    finally:
        await sending.aclose()
        await rates.aclose()
        await calls.aclose()


def _registering(given: Given) -> Registering:
    """Make what has hooks at providers; before a connection ends, its hooks are removed with its credential."""
    registering = Registering(
        given.database,
        Secrets(given.database, given.vault, given.audit),
        given.egress,
        given.integrations,
        given.credentials,
        given.audit,
        given.settings.public_url,
    )
    given.credentials.do_before_the_end(registering.leave)
    return registering


@contextlib.asynccontextmanager
async def _taking_in(
    given: Given, sources: Sources, rules: Rules, *, on_stored: Callable[[], None]
) -> AsyncIterator[TakingIn]:
    """Open what serves providers' requests. ``on_stored``: wakes who delivers."""
    attributing = Attributing(given.database)
    inbox = Inbox(given.database, given.sealer, rules, attribute=attributing.of, on_stored=on_stored)
    rejections = Rejections(given.database, given.metrics)
    try:
        yield TakingIn(sources, Verification(given.egress), inbox, rejections, given.settings, given.metrics)
    finally:
        await inbox.aclose()
        await rejections.aclose()
