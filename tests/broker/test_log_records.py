"""Log lines reach a real OTLP collector over a socket, hidden as on standard error; a collector in trouble costs lines only."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource

from broker.app import Served
from broker.settings import Secret, Settings, load_settings
from broker.telemetry import HIDDEN, access_line, configure_logging, new_metrics, render
from broker.tracing.log_records import CLOSE_SECONDS, record
from broker.tracing.logs import sending_logs
from tests.collector import Collector, attributes, collecting
from tests.commands import logging_as_before, running
from tests.flows.rig import eventually
from tests.flows.test_api_health import lived

CANARY = "CANARY9f3e41c07"
PRODUCTION = Settings(public_url="https://broker.test", keyring=Secret("k1:AAAA"))
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
NEVER = "600000"


class Lost(Counter[str]):
    """Counts what was lost, by why."""

    def note(self, why: str, count: int) -> None:
        """Count it."""
        self[why] += count


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Run a collector on a real socket, and name it in the environment."""
    with collecting() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        yield found


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Set up logging as in production; give the place where its lines end."""
    place = io.StringIO()
    with logging_as_before():
        configure_logging(PRODUCTION, stream=place)
        yield place


def written(stream: io.StringIO) -> list[dict[str, Any]]:
    """Return the lines so far."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def bodies(collector: Collector) -> list[str]:
    """Return the events of the records so far."""
    return [one.body.string_value for one in collector.records()]


async def test_a_line_reaches_the_collector_with_its_time_severity_fields_and_trace(
    collector: Collector, stream: io.StringIO
) -> None:
    async with sending_logs(PRODUCTION, Lost().note):
        structlog.get_logger().warning(
            "refresh.failed", failures=2, left=None, late=True, seconds=0.5, trace_id=TRACE, span_id=SPAN
        )
        structlog.get_logger().info("plain", trace_id="no trace", names=["a", "b"], more={"a": 1})
        began = time.monotonic()
    assert time.monotonic() - began < CLOSE_SECONDS / 2
    assert [path for path, _ in collector.received] == ["/v1/logs"]
    told, plain = collector.records()
    assert (told.body.string_value, told.severity_text, told.severity_number) == ("refresh.failed", "warning", 13)
    assert (told.trace_id.hex(), told.span_id.hex()) == (TRACE, SPAN)
    assert attributes(told) == {"failures": 2, "left": None, "late": True, "seconds": 0.5}
    assert (plain.trace_id, plain.span_id, plain.severity_number) == (b"", b"", 9)
    of_plain = attributes(plain)
    assert of_plain["trace_id"] == "no trace"
    assert [one.string_value for one in of_plain["names"].values] == ["a", "b"]
    assert [(pair.key, pair.value.int_value) for pair in of_plain["more"].values] == [("a", 1)]
    for line, sent in zip(written(stream), (told, plain), strict=True):
        moment = datetime.fromtimestamp(sent.time_unix_nano // 1000 / 1_000_000, UTC)
        assert moment == datetime.fromisoformat(line["at"])
    about = attributes(collector.received[0][1].resource_logs[0].resource)
    assert (about["service.name"], about["deployment.environment.name"]) == ("broker", "production")


async def test_the_line_that_ends_a_request_is_sent_as_it_is_written(collector: Collector, stream: io.StringIO) -> None:
    async with sending_logs(PRODUCTION, Lost().note):
        access_line("POST", "/v1/connections/{connection_id}/token", 200, 0.00123, "req_1234567", trace_id=TRACE)
        access_line("GET", "/v1/providers", 404, 0.1, f"gho_{CANARY}{CANARY}")
        access_line("BREW", "/v1/providers", 404, 0.1, "req_1234567")  # goes by the processors
        await asyncio.sleep(0)
    lines = {line["method"]: line for line in written(stream)}
    assert len(lines) == 3
    for sent in collector.records():
        fields = attributes(sent)
        line = lines[fields["method"]]
        assert (sent.body.string_value, sent.severity_text) == (line.pop("event"), line.pop("level"))
        assert sent.trace_id.hex() == line.pop("trace_id", "")
        assert datetime.fromtimestamp(sent.time_unix_nano // 1000 / 1_000_000, UTC) == datetime.fromisoformat(
            line.pop("at")
        )
        assert fields == line
    assert CANARY not in stream.getvalue() + str(collector.records())


async def test_what_is_hidden_in_a_line_is_hidden_in_its_record(collector: Collector, stream: io.StringIO) -> None:
    async with sending_logs(PRODUCTION, Lost().note):
        log = structlog.get_logger()
        log.error("odd", access_token=CANARY, note=f"Bearer {CANARY}", more={"password": CANARY}, what=Secret(CANARY))
        text = f"token={CANARY}"
        log.info(text, **{f"gho_{CANARY}{CANARY}": 1})
        logging.getLogger("somebody").warning("connects with %s %d", CANARY, 7)
        try:
            json.loads(CANARY)
        except ValueError:
            log.exception("failed")
    odd, *_, foreign, failed = collector.records()
    assert attributes(odd)["access_token"] == HIDDEN
    assert (foreign.body.string_value, attributes(foreign)["logger"]) == ("connects with … 7", "somebody")
    assert failed.severity_number == 17
    assert attributes(failed)["exception"].values[0].string_value == "JSONDecodeError"
    sent = [one.SerializeToString() for _, one in collector.received]
    assert len(collector.records()) == len(written(stream)) == 4
    assert CANARY.encode() not in b"".join(sent)


@pytest.mark.parametrize("trouble", ["hangs", "fails", "is gone"])
async def test_a_collector_in_trouble_disturbs_no_line_and_not_the_end(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, trouble: str
) -> None:
    if trouble == "hangs":
        collector.hang.clear()
    elif trouble == "fails":
        collector.status = 400
    else:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://127.0.0.1:1/v1/logs")
    lost, began = Lost(), time.monotonic()
    async with asyncio.timeout(10), sending_logs(PRODUCTION, lost.note):
        for number in range(3000):
            access_line("GET", "/v1/providers", 200, 0.1, f"req_{number:07}")
        assert time.monotonic() - began < 2
        await asyncio.sleep(0)
    lines = written(stream)
    assert sum(line["event"] == "http" for line in lines) == 3000
    unsent = [line["lines"] for line in lines if line["event"] == "logs.not_sent"]
    assert lost["queue_full"] > 0 or trouble == "fails"  # that one answers fast enough, perhaps
    assert lost["not_taken"] > 0 or unsent


async def test_what_finds_no_room_is_counted_and_the_rest_arrives(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO
) -> None:
    monkeypatch.setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "10")
    monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", NEVER)
    collector.hang.clear()
    counters = new_metrics()
    async with sending_logs(PRODUCTION, counters.log_lines_lost):
        log = structlog.get_logger()
        for number in range(10):  # as many as wait at most are a batch: it goes at once
            log.info("first", number=number)
        assert await asyncio.to_thread(collector.arrived.wait, 10)
        for number in range(30):
            log.info("then", number=number)
        collector.hang.set()
    sent = [(one.body.string_value, attributes(one)["number"]) for one in collector.records()]
    assert sent == [*(("first", number) for number in range(10)), *(("then", number) for number in range(10))]
    assert len(written(stream)) == 40
    assert b'broker_log_lines_unsent_total{why="queue_full"} 20.0' in render(counters)


async def test_lines_go_after_a_while_without_any_more_of_them(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO
) -> None:
    monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "none")  # no number: as if it were not set
    async with sending_logs(PRODUCTION, Lost().note):
        structlog.get_logger().info("one")
        await eventually(lambda: asyncio.to_thread(bodies, collector))
        assert bodies(collector) == ["one"]
    assert [line["event"] for line in written(stream)] == ["one"]


async def test_what_is_said_of_the_collector_itself_is_not_sent_to_it(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO
) -> None:
    monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "20")
    collector.status = 400
    lost = Lost()

    async def is_lost() -> bool:
        return lost["not_taken"] == 1

    async with sending_logs(PRODUCTION, lost.note):
        structlog.get_logger().info("one")
        await eventually(is_lost)
        collector.status = 200
        structlog.get_logger().info("two")
    assert bodies(collector) == ["one", "two"]
    said = [line["event"] for line in written(stream)]
    assert any(event.startswith("Failed to export") for event in said)
    assert lost == {"not_taken": 1}


@pytest.mark.parametrize(
    ("variables", "sends"),
    [
        ({}, True),
        ({"OTEL_LOGS_EXPORTER": "otlp"}, True),
        ({"OTEL_LOGS_EXPORTER": "none"}, False),
        ({"OTEL_LOGS_EXPORTER": "console"}, False),
        ({"OTEL_TRACES_EXPORTER": "none"}, True),
        ({"OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
async def test_the_standard_variables_say_whether_lines_are_sent(
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    stream: io.StringIO,
    variables: dict[str, str],
    sends: bool,  # noqa: FBT001 - a case
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    async with sending_logs(PRODUCTION, Lost().note):
        structlog.get_logger().info("one")
        assert ("log-records" in {thread.name for thread in threading.enumerate()}) == sends
    structlog.get_logger().info("after the end")
    assert bodies(collector) == (["one"] if sends else [])
    assert len(written(stream)) == 2


JSON_DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["event", "level", "trace_id", "span_id", "status"]) | st.text(st.characters())


@settings(deadline=None)
@example({"event": 2**64, "least": -(2**63), "more": [2**63], "\ud800": "\ud800"})
@given(st.dictionaries(FIELDS, JSON_DATA | st.sampled_from([TRACE, SPAN, "0" * 32, "info"]), max_size=6))
def test_whatever_a_line_holds_its_record_can_be_sent(event: dict[str, Any]) -> None:
    made = record({**event, "at": "2026-11-22T03:00:00.123456Z"})
    encoded = encode_logs([ReadableLogRecord(made, Resource({}))]).SerializeToString()
    assert encoded
    names = {name.encode("utf-8", "replace").decode() for name in event}
    assert set(made.attributes or {}) <= names
    assert names - set(made.attributes or {}) <= {"event", "level", "trace_id", "span_id", "at"}
    assert made.timestamp == 1_795_316_400_123_456_000


def test_a_line_without_a_moment_is_sent_without_one() -> None:
    assert [record(event).timestamp for event in ({"event": "one"}, {"event": "one", "at": "noon"})] == [None, None]


# --- processes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "until", "told"),
    [({}, "lifespan.startup.complete", "http"), ({"admin_key": "brk_wrong"}, "never", "start.failed")],
)
async def test_a_served_process_sends_its_lines_before_it_says_that_it_ended(
    collector: Collector, stream: io.StringIO, tmp_path: Path, given: dict[str, str], until: str, told: str
) -> None:
    settings = load_settings({}, directory=tmp_path, env="development", data_dir=tmp_path, **given)
    said = await lived(Served(settings, with_worker=True), until=until)
    assert said[-1]["type"] in {"lifespan.shutdown.complete", "lifespan.startup.failed"}
    assert told in bodies(collector)
    assert told in {line["event"] for line in written(stream)}


async def test_the_worker_sends_its_lines(collector: Collector, tmp_path: Path) -> None:
    variables = {"BROKER_ENV": "development", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    soon = {"OTEL_BLRP_SCHEDULE_DELAY": "20"}
    command = (sys.executable, "-m", "broker", "worker")

    async def has_started() -> bool:
        return "worker.started" in bodies(collector)

    with running(*command, place=tmp_path, variables={**variables, **soon}) as process:
        await eventually(has_started, seconds=30)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
