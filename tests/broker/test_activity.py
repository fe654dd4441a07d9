"""What proxied calls add up to: tallies, percentiles, rows that several processes share, lines, and Prometheus' text."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlmodel import Session, select

from broker.activity import Activity, CallDone, Tally, percentile, shown, stored, sweep
from broker.activity.exposing import MOST_NAMES
from broker.activity.sampling import MOST_INTEGRATIONS, MOST_LINES, Sample
from broker.activity.tallies import BOUNDS_MS
from broker.database import Database, now, open_database
from broker.errors import DatabaseUnavailable
from broker.models import CallLatest, CallLine, CallMinute, Connection, Integration
from broker.telemetry import Metrics, new_metrics, render

DONE = CallDone(
    integration="shop",
    provider="oidc",
    host="api.shop.test",
    method="GET",
    path="/orders/7",
    connection_id="con_a",
    caller_id="clr_a",
    request_id="req_a",
    status=200,
    code=None,
    attempts=1,
    upstream_seconds=0.010,
    total_seconds=0.012,
    bytes_out=10,
    bytes_in=1000,
)
FAILED = DONE._replace(status=None, code="upstream_timeout", attempts=3)


async def _integration(database: Database) -> None:
    def work(session: Session) -> None:
        at = now(session)
        session.add(Integration(name="shop", provider="oidc", created_at=at, updated_at=at))

    await database.transaction(work)


async def _connection(database: Database) -> None:
    await _integration(database)

    def work(session: Session) -> None:
        session.add(
            Connection(id="con_a", integration="shop", provider="oidc", status="active", created_at=now(session))
        )

    await database.transaction(work)


async def _written(database: Database, *calls: CallDone) -> None:
    """Write calls as a process of its own does."""
    activity = Activity(database, new_metrics())
    for done in calls:
        activity.note(done)
    await activity.aclose()


async def _lines(database: Database) -> list[CallLine]:
    return await database.read(lambda session: list(session.exec(select(CallLine).order_by(CallLine.id))))  # type: ignore[arg-type]


# --- tallies and percentiles ------------------------------------------------------------------------------------------------

CALLS = st.builds(
    lambda status, code, attempts, seconds: DONE._replace(
        status=status, code=code, attempts=attempts, total_seconds=seconds, rate_remaining=attempts
    ),
    st.one_of(st.none(), st.integers(0, 999)),
    st.one_of(st.none(), st.sampled_from(["rate_limited", "circuit_open"])),
    st.integers(0, 5),
    st.floats(0, 500),
)


@settings(deadline=None)
@given(st.lists(CALLS, max_size=30), st.integers(0, 30))
def test_tallies_add_up_however_calls_are_spread_over_processes(calls: list[CallDone], border: int) -> None:
    whole, one, other, summed = Tally(), Tally(), Tally(), Tally()
    for number, done in enumerate(calls):
        whole.add(done, float(number + 1))
        (one if number < border else other).add(done, float(number + 1))
    for part in (one, other):
        summed.merge(part)
    assert summed.parts() == whole.parts()
    assert (summed.calls, summed.last_at) == (len(calls), float(len(calls)))
    assert summed.rate_remaining == whole.rate_remaining
    assert summed.failures == sum(done.failed for done in calls)


@settings(deadline=None)
@given(st.floats(0.3, 100_000))
def test_a_duration_is_known_to_a_tenth(milliseconds: float) -> None:
    tally = Tally()
    tally.add(DONE._replace(total_seconds=milliseconds / 1000), 1.0)
    [(shown_ms, count)] = tally.weighed_ms()
    assert count == 1
    assert shown_ms == pytest.approx(milliseconds, rel=0.1)


def test_what_is_longer_than_the_last_bucket_still_counts() -> None:
    tally = Tally()
    tally.add(DONE._replace(total_seconds=1000.0), 1.0)
    assert list(tally.weighed_ms()) == [(BOUNDS_MS[-1], 1)]


def test_parts_of_a_later_version_are_passed_over() -> None:
    tally = Tally()
    tally.absorb({"2xx": 1, "retries": 2, "of_tomorrow": 5, "6xx": 1})
    assert tally.parts() == {"2xx": 1, "retries": 2}


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_a_percentile_was_measured_and_that_share_is_no_longer(values: list[float], share: float) -> None:
    found = percentile([(value, 1) for value in values], share)
    assert found is not None
    assert found in values
    assert sum(one <= found for one in values) >= share * len(values)
    assert sum(one >= found for one in values) > (1 - share) * len(values) - 1e-9
    assert percentile([(value, 3) for value in values], share) in values


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 0.95) is None


@pytest.mark.parametrize(
    ("done", "outcome", "level", "text"),
    [
        (DONE, "2xx", "info", "GET api.shop.test/orders/7 200"),
        (DONE._replace(status=302), "3xx", "info", "GET api.shop.test/orders/7 302"),
        (DONE._replace(status=404), "4xx", "warning", "GET api.shop.test/orders/7 404"),
        (DONE._replace(status=503), "5xx", "error", "GET api.shop.test/orders/7 503"),
        (FAILED, "broker", "error", "GET api.shop.test/orders/7 upstream_timeout"),
        (DONE._replace(code="rate_limited"), "broker", "error", "GET api.shop.test/orders/7 rate_limited"),
        (DONE._replace(status=None), "none", "warning", "GET api.shop.test/orders/7 no answer"),
    ],
)
async def test_a_call_has_a_class_a_level_and_a_line(
    database: Database, done: CallDone, outcome: str, level: str, text: str
) -> None:
    await _connection(database)
    await _written(database, done)
    [line] = await _lines(database)
    assert (done.outcome, line.level, shown(line)) == (outcome, level, text)
    activity = Activity(database, new_metrics())
    assert [one.id for one in await activity.lines("shop", limit=5, text=text[-6:])] == [line.id]


# --- rows -------------------------------------------------------------------------------------------------------------------


async def test_several_processes_add_to_the_same_figures(database_url: str) -> None:
    others = [open_database(database_url) for _ in range(3)]
    await _integration(others[0])
    await asyncio.gather(*(_written(one, *[DONE] * 20, FAILED, DONE._replace(rate_remaining=7)) for one in others))
    found = await Activity(others[0], new_metrics()).figures("shop", window_seconds=3600)
    assert (found.calls, found.failures, found.retries, found.outcomes["2xx"]) == (66, 3, 6, 63)
    assert found.codes == {"upstream_timeout": 3}
    assert (found.bytes_in, found.rate_remaining) == (66_000, 7)
    assert percentile(found.weighed_ms(), 0.5) == pytest.approx(12, rel=0.1)
    for one in others:
        await one.aclose()


async def test_an_older_value_does_not_replace_what_is_left_of_a_limit(database: Database) -> None:
    await _integration(database)
    for at, left in ((200.0, 5), (100.0, 9), (300.0, None)):
        activity = Activity(database, new_metrics(), clock=lambda at=at: at)  # type: ignore[misc]
        activity.note(DONE._replace(rate_remaining=left))
        await activity.aclose()
    row = await database.read(lambda session: session.get(CallLatest, "shop"))
    assert row is not None
    assert (row.last_at, row.rate_remaining, row.rate_at) == (300.0, 5, 200.0)


async def test_calls_are_written_within_two_seconds(database: Database) -> None:
    await _connection(database)
    activity = Activity(database, new_metrics())
    activity.note(DONE)
    async with asyncio.timeout(5):
        while not await _lines(database):  # noqa: ASYNC110 - what is waited for stands in the database
            await asyncio.sleep(0.1)
    await activity.aclose()
    assert (await activity.figures("shop", window_seconds=60)).calls == 1


class _Away:
    """A database that answers nobody."""

    async def transaction(self, _work: object) -> None:
        raise DatabaseUnavailable


async def test_figures_of_a_database_that_is_away_are_written_later(database: Database) -> None:
    await _integration(database)
    activity = Activity(_Away(), new_metrics())  # type: ignore[arg-type]
    activity.note(DONE)
    await activity.aclose()
    activity._database = database
    activity.note(DONE)
    await activity.aclose()
    assert (await activity.figures("shop", window_seconds=60)).calls == 2


async def test_of_many_calls_the_errors_and_the_newest_have_lines(database: Database) -> None:
    await _connection(database)
    calls = [DONE._replace(request_id=f"req_{number}") for number in range(500)]
    await _written(database, *[FAILED] * 30, *calls)
    lines = await _lines(database)
    assert len(lines) == 200
    assert sum(line.code == "upstream_timeout" for line in lines) == 30
    assert {line.request_id for line in lines if line.code is None} == {f"req_{number}" for number in range(330, 500)}


async def test_a_path_is_cut_and_a_connection_that_is_gone_leaves_no_line(database: Database) -> None:
    await _connection(database)
    await _written(database, DONE._replace(path="/" + "a" * 500), DONE._replace(connection_id="con_gone"))
    [line] = await _lines(database)
    assert (len(line.path), line.connection_id) == (200, "con_a")
    await database.transaction(lambda session: session.execute(sa.update(Connection).values(deleted_at=now(session))))
    await _written(database, DONE)
    assert len(await _lines(database)) == 1


async def test_an_integration_that_is_gone_leaves_no_figures_to_a_later_one_of_its_name(database: Database) -> None:
    await _integration(database)
    await _written(database, DONE, DONE._replace(integration="gone", rate_remaining=7))
    activity = Activity(database, new_metrics())
    assert (await activity.figures("shop", window_seconds=60)).calls == 1
    found = await activity.figures("gone", window_seconds=60)
    assert (found.calls, found.last_at, found.rate_remaining) == (0, 0.0, None)


async def test_the_upstream_s_mean_counts_the_calls_that_were_sent(database: Database) -> None:
    await _integration(database)
    refused = DONE._replace(status=None, code="rate_limited", attempts=0, upstream_seconds=0.0)
    await _written(database, DONE, DONE._replace(upstream_seconds=0.030, attempts=2), *[refused] * 8)
    found = await Activity(database, new_metrics()).figures("shop", window_seconds=60)
    assert found.mean_upstream_ms == pytest.approx(20)
    assert Tally().mean_upstream_ms is None


# --- which calls have a line ------------------------------------------------------------------------------------------------


def _sampled(*calls: CallDone) -> list[CallDone]:
    sample = Sample()
    for at, done in enumerate(calls):
        sample.add(float(at), done)
    lines = sample.take()
    assert [at for at, _ in lines] == sorted(at for at, _ in lines)
    assert sample.take() == []
    return [done for _, done in lines]


def test_an_integration_s_404s_push_out_nobody_else_s_lines() -> None:
    quiet = [DONE._replace(integration="quiet", status=status) for status in (200, 404, 503)]
    found = _sampled(*quiet, *[DONE._replace(status=404)] * 5000)
    assert [done for done in found if done.integration == "quiet"] == quiet
    assert len(found) == MOST_LINES


def test_errors_come_before_4xx_and_those_before_others() -> None:
    kinds = [FAILED, DONE._replace(status=503), DONE._replace(status=404), DONE]
    found = _sampled(*(done for done in kinds for _ in range(90)))
    assert [found.count(done) for done in kinds] == [90, 90, 20, 0]
    assert all(done.level != "info" for done in found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 250), st.sampled_from([200, 404, 500]), st.integers(1, 300)), max_size=60))
def test_a_sample_is_bounded_and_every_integration_has_its_share(groups: list[tuple[int, int, int]]) -> None:
    calls = [DONE._replace(integration=f"i{number}", status=status) for number, status, n in groups for _ in range(n)]
    found = _sampled(*calls)
    assert len(found) <= MOST_LINES
    names = list(dict.fromkeys(done.integration for done in calls))[:MOST_INTEGRATIONS]
    for name in names:
        own = [done for done in calls if done.integration == name]
        shown_of_it = [done for done in found if done.integration == name]
        assert len(shown_of_it) >= min(len(own), MOST_LINES // (len(names) + 1))
        if any(done.level == "error" for done in own):
            assert any(done.level == "error" for done in shown_of_it)


def test_more_integrations_than_are_kept_apart_share_one_place() -> None:
    found = _sampled(*(DONE._replace(integration=f"i{number}") for number in range(MOST_INTEGRATIONS + 50)))
    assert len(found) == MOST_INTEGRATIONS + 50
    flood = [DONE._replace(integration=f"i{number}") for number in range(MOST_INTEGRATIONS + 5000)]
    assert {done.integration for done in flood[:MOST_INTEGRATIONS]} <= {done.integration for done in _sampled(*flood)}


# --- the sweep --------------------------------------------------------------------------------------------------------------


async def _amounts(database: Database) -> dict[tuple[int, str], int]:
    found = await database.read(lambda session: list(session.exec(select(CallMinute))))
    return {(row.at, row.part): row.amount for row in found}


async def test_old_minutes_are_put_together_by_the_hour_and_nothing_is_lost_or_doubled(database_url: str) -> None:
    databases = [open_database(database_url) for _ in range(2)]
    at = await databases[0].read(lambda session: int(now(session)))
    hour = (at - 4 * 3600) // 3600 * 3600
    minutes = {hour: 1, hour + 60: 2, hour + 3540: 4, at // 60 * 60: 8, (at - 9 * 86_400) // 60 * 60: 16}

    def fill(session: Session) -> None:
        session.add_all(
            CallMinute(integration="shop", at=minute, part="2xx", amount=n) for minute, n in minutes.items()
        )

    await databases[0].transaction(fill)
    await asyncio.gather(*(sweep(one) for one in databases), *(sweep(one) for one in databases))
    assert await _amounts(databases[0]) == {(hour, "2xx"): 7, (at // 60 * 60, "2xx"): 8}
    activity = Activity(databases[0], new_metrics())
    assert (await activity.figures("shop", window_seconds=5 * 3600)).calls == 15
    assert (await activity.figures("shop", window_seconds=3600)).calls == 8
    for one in databases:
        await one.aclose()


async def test_lines_are_kept_for_a_week_and_no_more_than_ten_thousand(database: Database) -> None:
    at = await database.read(now)
    await _integration(database)
    await _written(database, DONE)
    rows = [stored._row(at - number, DONE) for number in range(stored.KEPT_LINES + 5, 0, -1)]
    old = stored._row(at - 8 * 86_400, DONE)
    await database.transaction(lambda session: session.execute(sa.insert(CallLine), [old, *rows]))
    await sweep(database)
    lines = await _lines(database)
    assert len(lines) == stored.KEPT_LINES
    assert lines[-1].at == pytest.approx(at - 1)


# --- Prometheus -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def metrics() -> Metrics:
    return new_metrics()


async def test_prometheus_sees_written_and_waiting_calls_without_ids(database: Database, metrics: Metrics) -> None:
    states = {("shop", "a:443"): "closed", "shop b:443": "open", ("other", "c"): "half_open"}
    activity = Activity(database, metrics, breaker_states=lambda: states, clock=lambda: 1234.5)  # type: ignore[arg-type,return-value]
    activity.note(DONE)
    await activity.aclose()
    activity.note(FAILED)
    activity.note(DONE._replace(rate_remaining=9))
    activity.entered("shop")
    text = render(metrics).decode()
    for line in (
        'broker_proxy_calls_total{integration="shop",outcome="2xx"} 2.0',
        'broker_proxy_calls_total{integration="shop",outcome="broker"} 1.0',
        'broker_proxy_errors_total{code="upstream_timeout",integration="shop"} 1.0',
        'broker_proxy_retries_total{integration="shop"} 2.0',
        'broker_proxy_bytes_total{direction="in",integration="shop"} 3000.0',
        'broker_proxy_seconds_bucket{integration="shop",le="0.016"} 3.0',
        'broker_proxy_seconds_bucket{integration="shop",le="0.008"} 0.0',
        'broker_proxy_seconds_count{integration="shop"} 3.0',
        'broker_proxy_in_flight{integration="shop"} 1.0',
        'broker_proxy_breaker_state{integration="shop"} 2.0',
        'broker_proxy_breaker_state{integration="other"} 1.0',
        'broker_proxy_rate_remaining{integration="shop"} 9.0',
        'broker_proxy_last_activity_timestamp_seconds{integration="shop"} 1234.5',
    ):
        assert line in text or _swapped(line) in text, line
    assert "con_a" not in text
    assert activity.breaker_state("shop") == "open"
    assert activity.breaker_state("unknown") == "closed"
    activity.left("shop")
    assert 'broker_proxy_in_flight{integration="shop"} 0.0' in render(metrics).decode()
    await activity.aclose()


def _swapped(line: str) -> str:
    """Return the same sample with its two labels the other way round."""
    name, _, rest = line.partition("{")
    labels, _, value = rest.partition("}")
    return f"{name}{{{','.join(reversed(labels.split(',')))}}}{value}"


async def test_more_than_200_integrations_share_a_label(database: Database, metrics: Metrics) -> None:
    activity = Activity(database, metrics)
    for number in range(MOST_NAMES + 20):
        activity.note(DONE._replace(integration=f"i{number}"))
    text = render(metrics).decode()
    assert 'broker_proxy_calls_total{integration="other",outcome="2xx"} 20.0' in text
    assert text.count("broker_proxy_calls_total{") == MOST_NAMES + 1
    await activity.aclose()
