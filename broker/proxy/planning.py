"""Pure: what is the same for every call to one host of an integration with one type of credential, worked out once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from broker.credentials.snapshots import Snapshot
from broker.errors import NotFound, OriginChanged
from broker.integrations import Configured
from broker.integrations.config import CircuitBreakerConfig, RateLimitConfig, RetryConfig, filled, variables_in
from broker.limits import BreakerRule, Rate
from broker.proxy.retrying import RetryRule
from providers.signing import signer_of
from providers.spec import Signer

CALL_SECONDS = 60.0  # where neither the caller nor the integration says another: models think for longer than ten
TRACE_FIELDS = frozenset({b"traceparent", b"tracestate"})  # each attempt has its own
# Without a rule of its own an integration is paused only when nothing gets through.
DEFAULT_BREAKER = BreakerRule(failure_threshold=20, window_seconds=10.0, recovery_seconds=5.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """How calls of one integration to one of its hosts are made. ``companions``: name → (value, whether it is forced).

    ``key``: what limits and breakers count by, the integration at this origin.
    """

    base_url: str
    key: str
    signer: Signer
    owned: frozenset[bytes]
    companions: Mapping[bytes, tuple[bytes, bool]]
    rate: Rate | None
    breaker: BreakerRule
    counts_errors: bool
    retry: RetryRule
    timeout_seconds: float


def plan_of(configured: Configured, row: Snapshot, host: str) -> Plan:
    """Return the plan for a connection's calls to a named host.

    NotFound: the integration has no host of that name, or none for this type of credential; OriginChanged: the connection
    was not made for where it is now.
    """
    name = f"api:{host}"
    if host not in configured.endpoints.hosts:
        raise NotFound("this integration has no such host")
    if row.pins.get(name) != configured.endpoints.origins.get(name):
        raise OriginChanged
    signer = signer_of(configured.provider, row.credential_type, host)
    if signer is None:
        raise NotFound("this integration has no such host for this credential")
    config = configured.config
    return Plan(
        base_url=configured.endpoints.hosts[host],
        key=f"{row.integration} {row.pins[name]}",
        signer=signer,
        owned=frozenset(one.encode() for one in signer.headers) | TRACE_FIELDS,
        companions=_companions(configured, row),
        rate=_rate(config.rate_limit),
        breaker=_breaker(config.circuit_breaker),
        counts_errors=config.circuit_breaker is not None,
        retry=_retry(config.retry),
        timeout_seconds=config.timeout_seconds if "timeout_seconds" in config.model_fields_set else CALL_SECONDS,
    )


def _companions(configured: Configured, row: Snapshot) -> dict[bytes, tuple[bytes, bool]]:
    """Return the provider's fields with this connection's values; one whose variable is not known is left out."""
    known = {**configured.variables, "client_id": row.client_id}
    return {
        name.lower().encode(): (filled(value, known).encode(), bool(variables_in(value)))
        for name, value in configured.provider.headers.items()
        if variables_in(value) <= known.keys()
    }


def _rate(config: RateLimitConfig | None) -> Rate | None:
    return None if config is None else Rate(config.max_requests, config.window_seconds, config.strategy)


def _breaker(config: CircuitBreakerConfig | None) -> BreakerRule:
    if config is None:
        return DEFAULT_BREAKER
    return BreakerRule(config.failure_threshold, config.window_seconds, config.recovery_seconds)


def _retry(config: RetryConfig | None) -> RetryRule:
    if config is None:
        return RetryRule()
    delays = (config.initial_delay_seconds, config.max_delay_seconds)
    return RetryRule(config.max_attempts, config.backoff == "exponential", *delays, frozenset(config.retry_on))


class Plans:
    """The plans that were made, by what they depend on. Calls may run at once."""

    MOST = 4_096

    def __init__(self) -> None:
        """Begin with none."""
        self._known: dict[tuple[object, ...], Plan] = {}

    def of(self, configured: Configured, row: Snapshot, host: str) -> Plan:
        """As ``plan_of``, from memory where the integration's version, the variables and the pin are what it was made of."""
        key = (row.integration, row.integration_version, host, row.credential_type, row.client_id)
        parts = (*key, tuple(row.variables.items()), row.pins.get(f"api:{host}"))
        known = self._known.get(parts)
        if known is None:
            known = plan_of(configured, row, host)
            if len(self._known) >= self.MOST:
                self._known.clear()
            self._known[parts] = known
        return known
