"""Nothing that is logged or counted shows a secret, whichever way it takes; and what is useful is still there."""

from __future__ import annotations

import asyncio
import base64
import enum
import io
import json
import logging
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry

from broker.database import opened
from broker.errors import DatabaseUnavailable, NotFound
from broker.settings import Secret, Settings, load_settings
from broker.telemetry import HIDDEN, LONGEST_TEXT, access_line, configure_logging, masked, new_metrics, render, shown
from providers.spec import ProviderAnswerError
from providers.spec import Secret as ProviderSecret

CANARY = "CANARY9f3e41c07"
PRODUCTION = Settings(public_url="https://broker.test", keyring=Secret("k1:AAAA"))
DEVELOPMENT = Settings(env="development")
CREDENTIALS = [
    f"brk_abc123_{CANARY}",
    f"ghp_{CANARY}",
    f"gho_{CANARY}",
    f"ghu_{CANARY}",
    f"ghs_{CANARY}",
    f"ghr_{CANARY}",
    f"xoxb-1-{CANARY}",
    f"sk_live_{CANARY}",
    f"whsec_{CANARY}",
    f"GOCSPX-{CANARY}",
    f"ya29.{CANARY}",
    f"1//0{CANARY}",
    f"eyJhbGciOiJub25lIn0.{CANARY}.",
    f"eyJhbGciOiJub25lIn0.a.{CANARY}",
    f"eyJlbmMiOiJ4In0.a.b.c.{CANARY}",
    f"Authorization: Bearer {CANARY}",
    f"authorization: bearer {CANARY}",
    f"Basic {CANARY}==",
    f"https://app.test/callback?code={CANARY}&x=1",
    f"/callback?x=1&state={CANARY}",
    f"/connect?session={CANARY}",
    f"https://app.test/#access_token={CANARY}",
    f"postgresql://user:{CANARY}@db/broker",
    f'{{"refresh_token": "{CANARY}"}}',
    f"client_secret={CANARY}",
    f"{{'password': '{CANARY}'}}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----",
]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Give the process its logging back after each test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(params=[PRODUCTION, DEVELOPMENT], ids=["production", "development"])
def output(request: pytest.FixtureRequest) -> io.StringIO:
    """Set up logging for one environment or the other; give the place where it ends."""
    stream = io.StringIO()
    configure_logging(request.param, stream=stream)
    return stream


@pytest.fixture
def lines() -> Callable[[], list[dict[str, Any]]]:
    """Set up logging for production; give a function that returns the lines so far."""
    stream = io.StringIO()
    configure_logging(PRODUCTION, stream=stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def _forms(secret: str) -> list[str]:
    raw = secret.encode()
    return [secret, raw.hex(), *(base64.b64encode(b" " * pad + raw)[4:-4].decode() for pad in range(3))]


def _shows(output: io.StringIO) -> list[str]:
    return [form for form in _forms(CANARY) if form in output.getvalue()]


# --- the fields of an event -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("token", "access_token", "refreshToken", "client_secret", "password", "Authorization", "Set-Cookie", "code"),
        *("code_verifier", "state", "api_key", "X-API-Key", "APIKey", "keyring", "tokens", "token_value"),
        "raw_secret_text",
    ],
)
@pytest.mark.parametrize("value", [CANARY, CANARY.encode(), [CANARY], {"x": CANARY}, 123456789])
def test_a_field_named_like_a_secret_is_hidden(output: io.StringIO, name: str, value: object) -> None:
    structlog.get_logger().info("something", **{name: value})
    assert _shows(output) == []
    assert "123456789" not in output.getvalue()
    assert HIDDEN in output.getvalue()


@pytest.mark.parametrize(
    "name",
    ["key_id", "token_type", "status", "token_sha256", "state_digest", "keyboard", "codec", "secretary", "route"],
)
def test_a_field_that_only_mentions_a_secret_is_shown(lines: Callable[[], list[dict[str, Any]]], name: str) -> None:
    structlog.get_logger().info("something", **{name: "plain"})
    assert lines()[0][name] == "plain"


@pytest.mark.parametrize(("value", "expected"), [(None, None), (True, True), ("not_found", "not_found"), ("x", HIDDEN)])
def test_an_error_code_is_no_secret_code(
    lines: Callable[[], list[dict[str, Any]]], value: object, expected: object
) -> None:
    structlog.get_logger().info("something", code=value)
    assert lines()[0]["code"] == expected


@pytest.mark.parametrize(
    "secret", [Secret(CANARY), ProviderSecret(CANARY), DEVELOPMENT.model_copy(update={"keyring": 1})]
)
def test_a_secret_prints_as_such(output: io.StringIO, secret: object) -> None:
    structlog.get_logger().info("something", about=secret, nested={"deep": [secret, (secret,)]})
    assert _shows(output) == []


@pytest.mark.parametrize("text", CREDENTIALS)
def test_what_looks_like_a_credential_is_hidden_inside_text(output: io.StringIO, text: str) -> None:
    log = structlog.get_logger()
    log.info(text)
    log.info("something", about=f"before {text} after", nested={"deep": [{"er": text}]}, keyed={text: 1})
    logging.getLogger("somebody").warning(text)
    assert _shows(output) == []


@given(before=st.text(max_size=30), after=st.text(max_size=30), credential=st.sampled_from(CREDENTIALS))
@settings(max_examples=300, deadline=None)
def test_no_neighbourhood_brings_a_credential_through(before: str, after: str, credential: str) -> None:
    assert CANARY not in masked(f"{before} {credential} {after}")


@pytest.mark.parametrize(
    "text",
    ["refresh.failed", "GET /v1/connections/con_abc", "a token was refreshed", "https://x.test/a?page=2", "key k1"],
)
def test_plain_text_is_left_alone(text: str) -> None:
    assert masked(text) == text


def test_long_text_is_cut_and_half_a_credential_with_it() -> None:
    text = "word " * (LONGEST_TEXT // 5 - 1) + f"gh{'p'}_{CANARY}"
    assert "ghp" not in masked(text)
    assert len(masked("x " * 100_000)) <= LONGEST_TEXT + 1


def test_a_line_is_one_line_whatever_is_in_it(output: io.StringIO) -> None:
    structlog.get_logger().info("one\ntwo\x1b[31m\r\x85\u2028three", also="four\nfive")
    assert len(output.getvalue().splitlines()) == 1


class _Thing:
    def __init__(self) -> None:
        self.token = CANARY

    def __repr__(self) -> str:
        return CANARY

    __str__ = __repr__


class _Colour(enum.Enum):
    RED = "red"


class _Number(enum.IntEnum):
    ONE = 1


def test_an_object_is_named_and_not_printed(output: io.StringIO) -> None:
    structlog.get_logger().info(
        "something", thing=_Thing(), data=CANARY.encode(), nested=[{"thing": _Thing()}, {_Thing()}]
    )
    assert _shows(output) == []
    assert "<_Thing>" in output.getvalue()
    assert "<bytes>" in output.getvalue()


def test_plain_values_are_shown() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    values = [1, 1.5, None, "x", Path("/p"), moment, ip_address("10.0.0.1"), uuid.UUID(int=1), _Colour.RED, _Number.ONE]
    assert shown(values)[:5] == [1, 1.5, None, "x", "/p"]
    assert shown(values)[5:8] == [str(moment), "10.0.0.1", "00000000-0000-0000-0000-000000000001"]
    assert shown(values)[8:] == ["_Colour.RED", "1"]


def test_a_bottomless_value_ends() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert "…" in json.dumps(shown(endless), ensure_ascii=False)


# --- exceptions -----------------------------------------------------------------------------------------------------------


def _raise_with_canary() -> None:
    local = CANARY
    try:
        dict[str, int]()[local]
    except KeyError as error:
        raise ValueError(f"bad {local}", local) from error


def test_an_exceptions_text_does_not_pass(output: io.StringIO) -> None:
    log = structlog.get_logger()
    try:
        _raise_with_canary()
    except ValueError as error:
        log.exception("caught")
        log.warning("caught", exc_info=error)
        log.warning("caught", exc_info=sys.exc_info())
        log.warning("caught", error=error, nested=[error])
        logging.getLogger("somebody").exception("caught")
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n", exc_info=error)
    assert _shows(output) == []
    assert "ValueError" in output.getvalue()
    assert "KeyError" in output.getvalue()
    assert "test_telemetry.py" in output.getvalue()


def test_an_exception_tells_where_it_was_raised(lines: Callable[[], list[dict[str, Any]]]) -> None:
    try:
        _raise_with_canary()
    except ValueError:
        structlog.get_logger().exception("caught")
    told = lines()[0]["exception"]
    assert told[0] == "ValueError"
    assert told[2].endswith("_raise_with_canary")
    assert "KeyError" in told


def test_an_error_of_ours_says_its_text(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log = structlog.get_logger()
    for error in (NotFound("the row is gone"), ProviderAnswerError("the answer is not JSON")):
        log.error("failed", error=error, exc_info=error)
    assert [line["error"] for line in lines()] == [
        "NotFound: the row is gone",
        "ProviderAnswerError: the answer is not JSON",
    ]


def test_groups_and_hidden_contexts(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log = structlog.get_logger()
    log.error("failed", exc_info=ExceptionGroup(CANARY, [ValueError(CANARY), NotFound("gone")]))
    try:
        try:
            dict[str, int]()[CANARY]
        except KeyError:
            raise NotFound from None
    except NotFound:
        log.exception("failed")
    assert lines()[0]["exception"] == ["ExceptionGroup", "  of which ValueError", "  of which NotFound: gone"]
    assert "KeyError" not in lines()[1]["exception"]


def test_an_exception_that_is_not_there_is_no_trouble(lines: Callable[[], list[dict[str, Any]]]) -> None:
    structlog.get_logger().error("failed", exc_info=True)
    assert "exception" not in lines()[0]


async def test_a_database_error_says_what_the_driver_meant(
    lines: Callable[[], list[dict[str, Any]]], empty_sqlite_url: str
) -> None:
    async with opened(empty_sqlite_url, migrate=False) as database:
        try:
            await database.transaction(
                lambda session: session.execute(sa.text("DELETE FROM x WHERE y = :y"), {"y": CANARY})
            )
        except DatabaseUnavailable:
            structlog.get_logger().exception("failed")
    told = lines()[0]["exception"]
    assert "DriverFault: OperationalError SQLITE_ERROR" in told
    assert CANARY not in json.dumps(told)


# --- the standard library -------------------------------------------------------------------------------------------------


def test_arguments_of_other_libraries_are_believed_only_when_they_are_numbers(output: io.StringIO) -> None:
    root = logging.getLogger()
    root.handlers[:] = [one for one in root.handlers if type(one).__module__ == "broker.telemetry"]  # pytest's raise
    log = logging.getLogger("some.client")
    log.warning("token %s has %d bytes", CANARY, 12)
    log.warning("%(who)s sent %(count)d", {"who": CANARY, "count": 34})
    log.warning("%s", _Thing())
    log.warning(_Thing())
    log.warning("wrong %d", CANARY)
    log.warning("too many", CANARY)  # noqa: PLE1205 - the mistake is the point
    log.warning("", extra={"token": CANARY})
    log.warning(f"first line\nsecond {CANARY}")  # noqa: G004 - as asyncio does
    assert _shows(output) == []
    text = output.getvalue()
    assert "token … has 12 bytes" in text
    assert "… sent 34" in text
    assert "wrong %d" in text
    assert len(text.splitlines()) == 8


def test_the_server_may_say_where_it_listens(lines: Callable[[], list[dict[str, Any]]]) -> None:
    logging.getLogger("uvicorn.error").info("Uvicorn running on %s://%s:%d", "http", "127.0.0.1", 8000)
    line = lines()[0]
    assert line["event"] == "Uvicorn running on http://127.0.0.1:8000"
    assert (line["logger"], line["level"]) == ("uvicorn.error", "info")


def test_lines_with_whole_urls_are_not_written(output: io.StringIO) -> None:
    for name in ("uvicorn.access", "httpx2", "httpcore2.connection", "httpx", "sqlalchemy.engine.Engine"):
        logging.getLogger(name).info('"GET /oauth/x/callback?code=%s HTTP/1.1" 200', CANARY)
    assert output.getvalue() == ""


async def test_a_task_whose_error_nobody_fetched_does_not_tell_it(output: io.StringIO) -> None:
    async def fail() -> None:
        raise ValueError(CANARY)

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_exception_handler(
        {"message": "Task exception was never retrieved", "task": task, "exception": task.exception(), "what": CANARY}
    )
    assert "Task exception was never retrieved" in output.getvalue()
    assert _shows(output) == []


def test_handlers_that_the_server_brought_are_removed_and_others_stay() -> None:
    stream, own, other = io.StringIO(), logging.StreamHandler(io.StringIO()), logging.NullHandler()
    logging.getLogger("uvicorn").addHandler(own)
    logging.getLogger().addHandler(own)
    logging.getLogger().addHandler(other)
    configure_logging(PRODUCTION, stream=stream)
    configure_logging(PRODUCTION, stream=stream)
    logging.getLogger("uvicorn").warning("once")
    assert own.stream.getvalue() == ""
    assert other in logging.getLogger().handlers
    assert len(stream.getvalue().splitlines()) == 1


def test_a_message_that_cannot_be_formatted_is_not_printed_either(
    output: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(dict[str, str]):
        def items(self) -> Any:
            raise RuntimeError(CANARY)

    logging.getLogger("somebody").warning("%(x)s", Broken(x=CANARY))
    assert "log.unprintable" in output.getvalue()
    assert CANARY not in output.getvalue() + "".join(capsys.readouterr())


def test_a_broken_stream_fails_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    configure_logging(PRODUCTION, stream=stream)
    stream.close()
    structlog.get_logger().info("something")
    logging.getLogger("somebody").warning("something %s", CANARY)
    assert capsys.readouterr() == ("", "")


# --- the shape of a line --------------------------------------------------------------------------------------------------


def test_a_line_has_time_level_and_the_requests_context(lines: Callable[[], list[dict[str, Any]]]) -> None:
    with structlog.contextvars.bound_contextvars(request_id="req_1", connection_id="con_1"):
        structlog.get_logger().warning("refresh.failed", failures=2)
        logging.getLogger("somebody").warning("hello")
    own, foreign = lines()
    assert datetime.fromisoformat(own.pop("at")).tzinfo == UTC
    assert own == {
        "event": "refresh.failed",
        "level": "warning",
        "failures": 2,
        "request_id": "req_1",
        "connection_id": "con_1",
    }
    assert (foreign["event"], foreign["logger"], foreign["request_id"]) == ("hello", "somebody", "req_1")


async def test_an_access_line_is_what_the_processors_would_have_made(lines: Callable[[], list[dict[str, Any]]]) -> None:
    fields = {"method": "POST", "route": "/v1/connections/{connection_id}/token", "status": 200, "ms": 1.2}
    structlog.get_logger().info("http", **fields, request_id="req_1234567")
    access_line("POST", "/v1/connections/{connection_id}/token", 200, 0.00123, "req_1234567")
    access_line("BREW", "/v1/connections/{connection_id}/token", 200, 0.00123, "req_1234567")  # goes by the processors
    await asyncio.sleep(0)
    expected = {**fields, "event": "http", "level": "info", "request_id": "req_1234567"}
    found = {(line["method"], index): line for index, line in enumerate(lines())}
    assert sorted(method for method, _ in found) == ["BREW", "POST", "POST"]
    for (method, _), line in found.items():
        assert datetime.fromisoformat(line.pop("at")).utcoffset() == timedelta(0)
        assert line == {**expected, "method": method}


async def test_an_access_line_names_the_trace_that_its_request_belongs_to(
    lines: Callable[[], list[dict[str, Any]]],
) -> None:
    access_line("GET", "/v1/providers", 200, 0.1, "req_1234567", trace_id="0af7651916cd43dd8448eb211c80319c")
    access_line("BREW", "/v1/providers", 200, 0.1, "req_1234567", trace_id="0af7651916cd43dd8448eb211c80319c")
    await asyncio.sleep(0)
    assert [line["trace_id"] for line in lines()] == ["0af7651916cd43dd8448eb211c80319c"] * 2


@pytest.mark.parametrize("request_id", ["req_0123456789abcdef0123456789", f"brk_abc_{CANARY}", f"gho_{CANARY}{CANARY}"])
async def test_a_request_id_that_is_a_credential_does_not_pass(output: io.StringIO, request_id: str) -> None:
    access_line("GET", "/v1/providers", 200, 0.1, request_id)
    await asyncio.sleep(0)
    assert "http" in output.getvalue()
    assert not _shows(output)


async def test_access_lines_of_one_round_are_written_at_its_end_and_in_order(
    lines: Callable[[], list[dict[str, Any]]],
) -> None:
    for number in range(3):
        access_line("GET", "/v1/providers", 200 + number, 0.1, "req_1234567")
    assert lines() == []
    structlog.get_logger().info("between")
    access_line("GET", "/v1/providers", 299, 0.1, "req_1234567")
    assert [line.get("status") for line in lines()] == [200, 201, 202, None]
    await asyncio.sleep(0)
    assert lines()[-1]["status"] == 299


async def test_a_quiet_command_writes_no_access_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(PRODUCTION, quiet=True)
    access_line("GET", "/v1/providers", 200, 0.1, "req_1234567")
    await asyncio.sleep(0)
    assert capsys.readouterr().err == ""


def test_development_is_read_by_people() -> None:
    stream = io.StringIO()
    configure_logging(DEVELOPMENT, stream=stream)
    structlog.get_logger().info("refresh.done", connection_id="con_1")
    assert "refresh.done" in stream.getvalue()
    assert "connection_id=con_1" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_commands_are_quiet_but_warn(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(PRODUCTION, quiet=True)
    structlog.get_logger().info("refresh.done")
    logging.getLogger("alembic.runtime.migration").info("Running upgrade")
    structlog.get_logger().warning("refresh.failed")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [json.loads(line)["event"] for line in captured.err.splitlines()] == ["refresh.failed"]


async def test_a_migration_is_logged_and_a_look_at_the_schema_is_not(empty_sqlite_url: str) -> None:
    stream = io.StringIO()
    configure_logging(PRODUCTION, stream=stream)
    async with opened(empty_sqlite_url) as database:
        await database.schema_revision()
    told = [json.loads(line)["event"].split(" ")[:2] for line in stream.getvalue().splitlines()]
    assert told
    assert all(words == ["Running", "upgrade"] for words in told)


# --- metrics --------------------------------------------------------------------------------------------------------------


def test_metrics_count_in_a_registry_of_their_own() -> None:
    metrics, others = new_metrics(), new_metrics(CollectorRegistry())
    metrics.http_request("/v1/connections/{id}", "GET", 200, 0.02)
    metrics.http_request("/v1/connections/{id}", "GET", 204, 0.02)
    metrics.http_request("/v1/connections/{id}", "GET", 503, 3)
    metrics.refresh_outcome("oidc", "ok")
    metrics.handout("connection_frozen")
    metrics.audit_failure()
    metrics.flow("oidc", "connected")
    text = render(metrics).decode()
    for line in (
        'broker_http_requests_total{method="GET",route="/v1/connections/{id}",status="2xx"} 2.0',
        'broker_http_requests_total{method="GET",route="/v1/connections/{id}",status="5xx"} 1.0',
        'broker_http_request_seconds_bucket{le="0.025",method="GET",route="/v1/connections/{id}"} 2.0',
        'broker_refreshes_total{outcome="ok",provider="oidc"} 1.0',
        'broker_handouts_total{outcome="connection_frozen"} 1.0',
        "broker_audit_failures_total 1.0",
        'broker_flows_total{outcome="connected",provider="oidc"} 1.0',
    ):
        assert line in text.splitlines()
    assert "oidc" not in render(others).decode()
    assert not [family for family in REGISTRY.collect() if family.name.startswith("broker")]


def test_a_made_up_method_is_no_label_of_its_own() -> None:
    metrics = new_metrics()
    for number in range(100):
        metrics.http_request("unknown", f"{CANARY}{number}", 405, 0.001)
    text = render(metrics).decode()
    assert CANARY not in text
    assert 'broker_http_requests_total{method="other",route="unknown",status="4xx"} 100.0' in text


def test_settings_can_be_logged_whole(output: io.StringIO, tmp_path: Path) -> None:
    environ = {
        "BROKER_ENV": "development",
        "BROKER_DATABASE_URL": f"postgresql://u:{CANARY}@h/d",
        "BROKER_KEYRING": CANARY,
        "BROKER_ADMIN_KEY": CANARY,
        "X_CLIENT_SECRET": CANARY,
    }
    found = load_settings(environ, directory=tmp_path)
    structlog.get_logger().info("start", settings=found, text=repr(found), fields=found.model_dump())
    assert _shows(output) == []


def test_python_warnings_are_not_taken_over(output: io.StringIO) -> None:
    with pytest.warns(UserWarning, match="still a warning"):
        warnings.warn("still a warning", stacklevel=1)
    assert output.getvalue() == ""
