"""Shows what this process counted of proxied calls to Prometheus, when it asks: a call itself pays nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from broker.activity.tallies import BOUNDS_MS, Tally

MOST_NAMES = 200
OTHER = "other"
STATES = {"closed": 0, "half_open": 1, "open": 2}
_EVERY = 4  # buckets that double


class Exposition(Collector):
    """The metric families of proxied calls, by integration: ``MOST_NAMES`` names, the others together as ``other``.

    ``tallies``, ``in_flight`` and ``breakers`` give the figures as they are now, by the integration's name.
    """

    def __init__(
        self,
        tallies: Callable[[], Mapping[str, Tally]],
        in_flight: Callable[[], Mapping[str, int]],
        breakers: Callable[[], Mapping[str, str]],
    ) -> None:
        """Keep what gives the figures."""
        self._tallies, self._in_flight, self._breakers = tallies, in_flight, breakers
        self._names: set[str] = set()

    def _shown(self, name: str) -> str:
        if name not in self._names and len(self._names) < MOST_NAMES:
            self._names.add(name)
        return name if name in self._names else OTHER

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        by_name: dict[str, Tally] = {}
        for name, tally in self._tallies().items():
            by_name.setdefault(self._shown(name), Tally()).merge(tally)
        yield from _counters(by_name)
        yield _durations(by_name)
        yield from _last_values(by_name)
        running: dict[str, int] = {}
        for name, count in self._in_flight().items():
            running[self._shown(name)] = running.get(self._shown(name), 0) + count
        yield _gauge("broker_proxy_in_flight", "Proxied calls that are under way", running)
        states: dict[str, int] = {}
        for name, state in self._breakers().items():
            states[self._shown(name)] = max(states.get(self._shown(name), 0), STATES[state])
        yield _gauge("broker_proxy_breaker_state", "0 closed, 1 half open, 2 open: the worst of its hosts", states)


def _counters(by_name: Mapping[str, Tally]) -> Iterator[Metric]:
    calls = CounterMetricFamily(
        "broker_proxy_calls", "Proxied calls by what the caller got", labels=("integration", "outcome")
    )
    errors = CounterMetricFamily(
        "broker_proxy_errors", "Proxied calls that the broker answered itself", labels=("integration", "code")
    )
    retries = CounterMetricFamily("broker_proxy_retries", "Attempts after the first", labels=("integration",))
    moved = CounterMetricFamily(
        "broker_proxy_bytes", "Bytes of bodies, out to the upstream and in from it", labels=("integration", "direction")
    )
    for name, tally in by_name.items():
        for outcome, count in tally.outcomes.items():
            if count:
                calls.add_metric((name, outcome), count)
        for code, count in tally.codes.items():
            errors.add_metric((name, code), count)
        retries.add_metric((name,), tally.retries)
        moved.add_metric((name, "out"), tally.bytes_out)
        moved.add_metric((name, "in"), tally.bytes_in)
    yield from (calls, errors, retries, moved)


def _durations(by_name: Mapping[str, Tally]) -> Metric:
    seconds = HistogramMetricFamily(
        "broker_proxy_seconds", "Time until a proxied call was over", labels=("integration",)
    )
    for name, tally in by_name.items():
        buckets, below = [], 0
        for bucket, bound in enumerate(BOUNDS_MS):
            below += tally.durations[bucket]
            if bucket % _EVERY == 0:
                buckets.append((str(bound / 1000), float(below)))
        buckets.append(("+Inf", float(tally.calls)))
        seconds.add_metric((name,), buckets, tally.microseconds / 1e6)
    return seconds


def _last_values(by_name: Mapping[str, Tally]) -> Iterator[Metric]:
    left = {name: tally.rate_remaining for name, tally in by_name.items() if tally.rate_remaining is not None}
    yield _gauge("broker_proxy_rate_remaining", "What the upstream last said is left of its limit", left)
    last = {name: tally.last_at for name, tally in by_name.items()}
    yield _gauge("broker_proxy_last_activity_timestamp_seconds", "When the last proxied call ended", last)


def _gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=("integration",))
    for label, value in values.items():
        family.add_metric((label,), value)
    return family
