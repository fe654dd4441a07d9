"""What an answer says of limits: every format, the statuses that mean too many, and junk that means nothing."""

from __future__ import annotations

import math
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers import load_catalog
from providers.rates import Observed, observed
from providers.spec import RateHeaders, ResetFormat

AT = 1_700_000_000.0
PLAIN = RateHeaders(remaining=("x-left", "x-left-today"), reset=("x-reset", "x-reset-2"))


def told(rates: RateHeaders | None, status: int = 200, **fields: str) -> Observed:
    headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    return observed(rates, status, headers, AT)


@pytest.mark.parametrize("rates", [None, RateHeaders(), PLAIN])
def test_429_means_too_many_everywhere_and_success_does_not(rates: RateHeaders | None) -> None:
    assert told(rates, 429) == Observed(limited=True)
    assert told(rates) == Observed(limited=False)
    assert told(rates, 403) == Observed(limited=False)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("-5", 0.0),
        (formatdate(AT + 90, usegmt=True), 90.0),
        (formatdate(AT - 90, usegmt=True), 0.0),
        ("soon", None),
        ("", None),
        ("1e9", None),
        ("9" * 40, None),
        ("Wed, 99 Foo 2026 99:99:99 GMT", None),
        ("x" * 10_000, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, seconds: float | None) -> None:
    assert told(None, 503, Retry_After=text).rest_seconds == seconds


@pytest.mark.parametrize(
    ("form", "text", "seconds"),
    [
        ("seconds", "30", 30.0),
        ("seconds", "-1", 0.0),
        ("epoch", "1700000060", 60.0),
        ("epoch", "1699999999", 0.0),
        ("epoch_ms", "1700000060500", 60.5),
        ("duration", "6m0s", 360.0),
        ("duration", "1s", 1.0),
        ("duration", "20ms", 0.02),
        ("duration", "1h2m3.5s", 3723.5),
        ("duration", "1d", 86_400.0),
        ("duration", "-1s", 0.0),
        ("http_date", formatdate(AT + 5, usegmt=True), 5.0),
        ("rfc3339", "2023-11-14T22:13:30Z", 10.0),
        ("rfc3339", "2023-11-14T23:13:30+01:00", 10.0),
        ("rfc3339", "2023-11-14", None),
        ("seconds", "6m0s", None),
        ("epoch", "tomorrow", None),
        ("duration", "6 minutes", None),
        ("duration", "", None),
        ("http_date", "1700000060", None),
        ("rfc3339", "T", None),
    ],
)
def test_the_field_of_a_provider_is_read_in_its_format(form: ResetFormat, text: str, seconds: float | None) -> None:
    rates = RateHeaders(reset=("x-reset",), reset_format=form)
    rest = told(rates, 429, X_Reset=text).rest_seconds
    assert rest == seconds if seconds is None else math.isclose(rest or 0.0, seconds, abs_tol=1e-3)


def test_a_reset_counts_only_where_nothing_is_left_and_after_retry_after() -> None:
    assert told(PLAIN, 200, x_left="5", x_reset="30") == Observed(limited=False, remaining=5)
    assert told(PLAIN, 200, x_left="0", x_reset="30") == Observed(limited=False, remaining=0, rest_seconds=30.0)
    assert told(PLAIN, 429, x_left="5", x_reset="30") == Observed(limited=True, remaining=5, rest_seconds=30.0)
    assert told(PLAIN, 429, x_reset="30", retry_after="7").rest_seconds == 7.0
    assert told(PLAIN, 429, x_reset="30", retry_after="soon").rest_seconds == 30.0


def test_the_first_field_that_can_be_read_counts() -> None:
    assert told(PLAIN, 200, x_left="junk", x_left_today="9").remaining == 9
    assert told(PLAIN, 200, x_left="3", x_left_today="9").remaining == 3
    assert told(PLAIN, 429, x_reset="junk", x_reset_2="4").rest_seconds == 4.0


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("12", 12),
        ("-3", 0),
        ("598.0", 598),
        ("32/40", 8),
        ("41/40", 0),
        ("api-usage=18/5000", 4982),
        ("a/b", None),
        ("", None),
    ],
)
def test_what_remains_is_a_number_or_what_was_used_of_a_limit(text: str, left: int | None) -> None:
    assert told(PLAIN, 200, x_left=text).remaining == left


def test_a_status_that_means_too_many_by_itself_or_by_a_field() -> None:
    rates = RateHeaders(
        statuses={503: (), 403: (("retry-after", ""), ("x-left", "0")), 400: (("x-error", "Too-Many"),)}
    )
    assert told(rates, 503).limited
    assert told(rates, 403, Retry_After="5") == Observed(limited=True, rest_seconds=5.0)
    assert told(rates, 403, X_Left="0").limited
    assert not told(rates, 403, X_Left="1").limited
    assert not told(rates, 403).limited
    assert told(rates, 400, x_error="too-many").limited
    assert not told(rates, 400).limited
    assert not told(rates, 500).limited


def test_the_403_of_a_vendor_that_limits_by_it_is_told_from_a_missing_permission() -> None:
    rates = load_catalog()["github"].rate_headers
    assert told(rates, 403, X_RateLimit_Remaining="0", X_RateLimit_Reset="1700000030") == Observed(
        limited=True, remaining=0, rest_seconds=30.0
    )
    assert told(rates, 403, Retry_After="60") == Observed(limited=True, rest_seconds=60.0)
    assert told(rates, 403, X_RateLimit_Remaining="4999") == Observed(limited=False, remaining=4999)


@given(
    st.sampled_from([200, 403, 429, 503]),
    st.dictionaries(st.sampled_from(["retry-after", "x-left", "x-reset", "x-reset-2"]), st.binary(max_size=30)),
    st.sampled_from(["seconds", "epoch", "epoch_ms", "duration", "http_date", "rfc3339"]),
)
def test_no_answer_is_misread_into_less_than_nothing(status: int, fields: dict[str, bytes], form: ResetFormat) -> None:
    rates = RateHeaders(("x-left",), ("x-reset", "x-reset-2"), form)
    seen = observed(rates, status, [(name.encode(), value) for name, value in fields.items()], AT)
    assert seen.rest_seconds is None or (seen.rest_seconds >= 0 and math.isfinite(seen.rest_seconds))
    assert seen.remaining is None or seen.remaining >= 0
