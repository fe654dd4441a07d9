"""Tracing: the trace context is passed on strictly, and spans reach a real OTLP collector over a socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.trace import TraceState

from broker.settings import Settings
from broker.tracing import Tracing, trace_context
from broker.tracing.context import trace_state
from tests.collector import Collector, attributes, collecting

PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SETTINGS = Settings(env="development")
CALLER_KEY = "brk_" + "a" * 26 + "_" + "B" * 49


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Run a collector on a real socket, and name it in the environment."""
    with collecting() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        yield found


# --- what comes in is passed on, strictly -----------------------------------------------------------------------------------


def test_without_a_collector_a_well_formed_context_goes_on_as_it_came() -> None:
    tracing = Tracing(SETTINGS, {})
    headers = [(b"host", b"h"), (b"traceparent", PARENT), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")]
    span = tracing.server_span(headers, "GET")
    expected = ((b"traceparent", PARENT), (b"tracestate", b"a=1,b=2"))
    assert span.traceparent_out() == expected
    attempt = tracing.client_span(span, 1, "api.test", "GET")
    attempt.note("x", 1)
    attempt.end(200)
    assert attempt.traceparent_out() == expected
    assert not tracing.exporting


@pytest.mark.parametrize(
    "parents",
    [
        [],
        [PARENT, PARENT],
        [PARENT.upper()],
        [PARENT + b"-00"],
        [b"ff" + PARENT[2:]],
        [b"01" + PARENT[2:]],
        [PARENT[:-1]],
        [b" " + PARENT],
        [PARENT + b"\n"],
        [b"00-" + b"0" * 32 + PARENT[35:]],
        [PARENT[:36] + b"0" * 16 + b"-01"],
        [b"00-x"],
        [b""],
    ],
)
def test_a_context_that_is_not_well_formed_is_dropped_with_its_state(parents: list[bytes]) -> None:
    headers = [*((b"traceparent", one) for one in parents), (b"tracestate", b"a=1")]
    assert Tracing(SETTINGS, {}).server_span(headers).traceparent_out() == ()


MALFORMED_STATES = [
    *(b"", b"a=\r\nX: 1", b"a=\xff", b"a=" + b"1" * 511, b"nonsense", b"A=1", b"a=", b"a=1=2", b"a= ", b"=1", b"a =1"),
    *(
        b"a=1,b",
        b"a=1,a=2",
        b"1a=1",
        b"@a=1",
        b"a@1=1",
        b"a@" + b"b" * 15 + b"=1",
        b"k" * 257 + b"=1",
        b"a=" + b"1" * 257,
    ),
    *(b",".join(b"k%d=1" % number for number in range(33)), b" , ,", b"a=1\x00", b"a=1;\tb"),
    *(b"v=" + CALLER_KEY.encode(), b"a=1,b=x" + CALLER_KEY.encode() + b"x"),
]


@pytest.mark.parametrize("state", MALFORMED_STATES)
def test_a_state_that_is_not_well_formed_or_holds_a_caller_key_is_dropped_alone(state: bytes) -> None:
    headers = [(b"traceparent", PARENT), (b"tracestate", state)]
    assert Tracing(SETTINGS, {}).server_span(headers).traceparent_out() == ((b"traceparent", PARENT),)


@pytest.mark.parametrize(
    ("given", "out"),
    [
        (b"a=1 , \tb=2,,", b"a=1,b=2"),
        (b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        (b"fw529a3039@dt=FfAAAAE,0_-*/@s-*/=b;;a:x y", b"fw529a3039@dt=FfAAAAE,0_-*/@s-*/=b;;a:x y"),
        (b"k=" + b"v" * 256 + b",l=1", b"k=" + b"v" * 256 + b",l=1"),
        (b",".join(b"k%d=1" % number for number in range(32)), b",".join(b"k%d=1" % number for number in range(32))),
    ],
)
def test_a_well_formed_state_goes_on(given: bytes, out: bytes) -> None:
    headers = [(b"traceparent", PARENT), (b"tracestate", given)]
    fields = Tracing(SETTINGS, {}).server_span(headers).traceparent_out()
    assert fields == ((b"traceparent", PARENT), (b"tracestate", out))


@pytest.mark.parametrize(
    ("nominated", "names"),
    [
        (b"tracestate", [b"traceparent"]),
        (b"close, TraceState ", [b"traceparent"]),
        (b"x,traceparent", []),
        (b"x", None),
    ],
)
def test_what_is_nominated_for_this_hop_does_not_go_on(nominated: bytes, names: list[bytes] | None) -> None:
    headers = [(b"traceparent", PARENT), (b"tracestate", b"a=1"), (b"connection", b"te"), (b"connection", nominated)]
    fields = Tracing(SETTINGS, {}).server_span(headers).traceparent_out()
    assert [name for name, _ in fields] == ([b"traceparent", b"tracestate"] if names is None else names)


async def test_the_sdk_never_logs_what_a_caller_sent(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    tracing = Tracing(SETTINGS)
    for state in MALFORMED_STATES:
        span = tracing.server_span([(b"traceparent", PARENT), (b"tracestate", state)], "GET")
        assert [name for name, _ in span.traceparent_out()] == [b"traceparent"]
        span.end(200)
    await tracing.aclose()
    assert caplog.text == ""
    assert collector.received


MEMBERS = st.lists(
    st.tuples(
        st.from_regex(r"[a-z][_0-9a-z*/-]{0,9}|[a-z0-9][_0-9a-z*/-]{0,9}@[a-z][_0-9a-z*/-]{0,4}", fullmatch=True),
        st.from_regex(r"[ -+\--<>-~]{0,9}[!-+\--<>-~]", fullmatch=True),
    ),
    max_size=12,
    unique_by=lambda member: member[0],
)


@settings(deadline=None)
@given(st.one_of(MEMBERS.map(lambda some: ",".join("=".join(one) for one in some)), st.text("ab=,@ 1A\t", max_size=30)))
def test_a_state_that_goes_on_is_one_that_the_sdk_takes_whole(given_state: str) -> None:
    kept = trace_state(given_state.encode())
    assert TraceState.from_header([given_state]).to_header().encode() == kept


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([b"traceparent", b"tracestate"]), st.one_of(st.binary(max_size=60), st.just(PARENT)))
    )
)
def test_whatever_comes_in_what_goes_on_can_stand_in_a_header(headers: list[tuple[bytes, bytes]]) -> None:
    context = trace_context(headers)
    for name, value in context.fields() if context is not None else ():
        assert name in {b"traceparent", b"tracestate"}
        assert all(byte == 9 or 32 <= byte < 127 for byte in value)


# --- spans at a collector ---------------------------------------------------------------------------------------------------


async def test_spans_from_the_caller_over_the_broker_to_the_upstream_reach_the_collector(collector: Collector) -> None:
    tracing = Tracing(SETTINGS)
    server = tracing.server_span([(b"traceparent", PARENT), (b"tracestate", b"vendor=x")], "POST")
    server.note("broker.integration", "shop")
    client = tracing.client_span(server, 2, "api.shop.test:8443", "POST")
    [(_, parent_out), state_out] = client.traceparent_out()
    client.end(503)
    server.end(502, error="provider_unavailable")
    server.end(200)
    await tracing.aclose()
    assert [path for path, _ in collector.received] == ["/v1/traces"]
    spans = collector.spans()
    of_server, of_client = spans["2"], spans["3"]
    assert of_server.trace_id == of_client.trace_id == bytes.fromhex(PARENT[3:35].decode())
    assert of_server.parent_span_id == bytes.fromhex(PARENT[36:52].decode())
    assert of_client.parent_span_id == of_server.span_id
    assert parent_out == b"00-%s-%s-01" % (PARENT[3:35], of_client.span_id.hex().encode())
    assert state_out == (b"tracestate", b"vendor=x")
    assert attributes(of_server) == {
        "http.request.method": "POST",
        "http.route": "/proxy/{connection}",
        "broker.integration": "shop",
        "http.response.status_code": 502,
        "error.type": "provider_unavailable",
    }
    assert attributes(of_client) == {
        "http.request.method": "POST",
        "server.address": "api.shop.test",
        "server.port": 8443,
        "http.request.resend_count": 1,
        "http.response.status_code": 503,
        "error.type": "503",
    }
    assert (of_server.name, of_client.name) == ("POST /proxy/{connection}", "POST")
    assert of_server.status.code == of_client.status.code == 2
    about = attributes(collector.received[0][1].resource_spans[0].resource)
    assert (about["service.name"], about["deployment.environment.name"]) == ("broker", "development")


async def test_a_call_without_a_context_begins_a_trace_and_an_unsampled_one_stays_so(collector: Collector) -> None:
    tracing = Tracing(SETTINGS)
    begun = tracing.server_span([], "BREW")
    begun.end(404)
    unsampled = tracing.server_span([(b"traceparent", PARENT[:-1] + b"0")], "GET")
    [(_, parent_out)] = tracing.client_span(unsampled, 1, "[::1]:80", "GET").traceparent_out()
    unsampled.end(200)
    await tracing.aclose()
    assert parent_out.startswith(PARENT[:36])
    assert parent_out.endswith(b"-00")
    spans = [span for _, one in collector.received for span in one.resource_spans[0].scope_spans[0].spans]
    assert [(span.name, span.parent_span_id, span.status.code) for span in spans] == [
        ("HTTP /proxy/{connection}", b"", 0)
    ]
    assert attributes(spans[0])["http.request.method"] == "_OTHER"


async def test_a_service_may_have_a_name_of_its_own(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gate")
    tracing = Tracing(SETTINGS)
    tracing.server_span([], "GET").end(200)
    await tracing.aclose()
    about = attributes(collector.received[0][1].resource_spans[0].resource)
    assert about["service.name"] == "gate"


@pytest.mark.parametrize("trouble", ["hangs", "fails", "is gone"])
async def test_a_collector_in_trouble_disturbs_no_request_and_not_the_end(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    if trouble == "hangs":
        collector.hang.clear()
    elif trouble == "fails":
        collector.status = 500
    else:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    tracing, began = Tracing(SETTINGS), time.monotonic()
    for _ in range(1000):
        span = tracing.server_span([], "GET")
        tracing.client_span(span, 1, "api.test", "GET").end(200)
        span.end(200)
    assert time.monotonic() - began < 8  # a hanging collector would hold each of them for longer
    await asyncio.wait_for(tracing.aclose(), 8)


def test_a_switched_off_sdk_only_passes_on() -> None:
    off = {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    assert not Tracing(SETTINGS, off).exporting


@pytest.mark.parametrize(
    ("exporters", "exporting"),
    [("none", False), (" None ", False), ("console", False), ("otlp", True), ("", True), ("console, OTLP", True)],
)
async def test_an_exporter_other_than_otlp_sends_nothing(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, exporters: str, *, exporting: bool
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", exporters)
    tracing = Tracing(SETTINGS)
    tracing.server_span([], "GET").end(200)
    await tracing.aclose()
    assert (tracing.exporting, bool(collector.received)) == (exporting, exporting)
