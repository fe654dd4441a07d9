"""Makes the parts of the proxy, and closes them in order: no new looks, the last outcomes, then the connections."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from broker.activity import Activity
from broker.audit import Audit
from broker.callers import Callers
from broker.credentials import Credentials
from broker.credentials.in_use import InUse
from broker.credentials.last_use import LastUse
from broker.database import Database
from broker.egress import Calls
from broker.integrations import Integrations
from broker.limits import Breakers, Rates, rate_per_second
from broker.proxy.forward import Bounds, Forwarding
from broker.proxy.outcomes import Outcomes
from broker.proxy.routes import MOST_CALLS, App, ProxyRoute
from broker.settings import Settings
from broker.telemetry import Metrics
from broker.tracing import Tracing
from providers.spec import Provider


@dataclass(frozen=True, slots=True)
class ProxyParts:
    """What serves proxied calls in this process."""

    forwarding: Forwarding
    in_use: InUse
    activity: Activity
    settings: Settings
    most_calls: int = MOST_CALLS  # at once

    def before(self, app: App) -> ProxyRoute:
        """Return the application with the proxy's route in front of it."""
        return ProxyRoute(
            app,
            self.forwarding,
            self.in_use,
            self.activity,
            public_url=self.settings.public_url,
            proxy_domain=self.settings.proxy_domain,
            most_bytes=self.settings.proxy_most_bytes,
            most_calls=self.most_calls,
        )


@contextlib.asynccontextmanager
async def open_proxy(
    settings: Settings,
    database: Database,
    callers: Callers,
    integrations: Integrations,
    credentials: Credentials,
    audit: Audit,
    metrics: Metrics,
) -> AsyncIterator[ProxyParts]:
    """Open the proxy; at the end, what is noted is written and every connection closed."""
    async with contextlib.AsyncExitStack() as stack:
        calls, tracing, bounds = Calls(settings), Tracing(settings), _bounds(settings, metrics)
        outcomes, last_use = Outcomes(audit), LastUse(database)
        in_use = InUse(database, credentials.snapshots)
        activity = Activity(database, metrics, breaker_states=bounds.breakers.states)
        for part in (tracing, calls, bounds.rates, outcomes, last_use, activity, in_use):  # closed from the last one on
            stack.push_async_callback(part.aclose)
        forwarding = Forwarding(
            callers,
            integrations,
            credentials,
            in_use,
            calls,
            bounds,
            audit,
            outcomes,
            last_use,
            tracing,
            key_headers(integrations.catalog),
            settings.secret_cache_seconds,
        )
        yield ProxyParts(forwarding, in_use, activity, settings)


def _bounds(settings: Settings, metrics: Metrics) -> Bounds:
    redis_url = settings.redis_url.reveal() if settings.redis_url is not None else None
    rates = Rates(redis_url, on_store_failure=metrics.rate_store_failure)
    return Bounds(rates, Breakers(), rate_per_second(settings.caller_calls_per_second))


def key_headers(catalog: Mapping[str, Provider]) -> list[str]:
    """Return the headers in which vendors' SDKs send their credential, and so may send a caller key instead."""
    return sorted(
        {
            header
            for provider in catalog.values()
            for signer in provider.signers.values()
            if signer is not None
            for header in signer.headers
            if header != "authorization"
        }
    )
