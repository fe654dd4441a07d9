"""What an answer says of how much a client may still call: ``Retry-After`` and the provider's own fields; pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from providers.spec import RateHeaders, ResetFormat

TOO_MANY = 429
NUMBER = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,9})?")
DURATION = re.compile(r"(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
USED_OF = re.compile(r"(?:[a-z-]+=)?([0-9]{1,15})/([0-9]{1,15})")
LONGEST_VALUE = 64


@dataclass(frozen=True, slots=True)
class Observed:
    """What an answer tells, untrusted: a provider may say any number, so whoever rests caps it.

    ``limited``: the answer means "too many". ``remaining``: calls that are left, 0 at least. ``rest_seconds``: how long not to
    call, 0 at least; None where the answer says nothing of it. Whoever means to repeat the call obeys it whatever the status.
    """

    limited: bool
    remaining: int | None = None
    rest_seconds: float | None = None


def observed(
    rate_headers: RateHeaders | None, status: int, headers: Iterable[tuple[bytes, bytes]], at: float
) -> Observed:
    """Read an answer. ``at``: now, seconds since 1970. What cannot be read counts as absent; never raises.

    ``Retry-After`` (RFC 9110 10.2.3) goes before the provider's own field, which counts only where nothing is left.
    """
    told = rate_headers or RateHeaders()
    held = {name.lower(): value for name, value in reversed(tuple(headers))}  # of several the first one counts
    limited = _limited(told, status, held)
    remaining = _remaining(told, held)
    rest = _retry_after(_text(held, "retry-after"), at)
    if rest is None and (limited or remaining == 0):
        rest = _reset(told, held, at)
    return Observed(limited, remaining, rest)


def _text(held: Mapping[bytes, bytes], name: str) -> str:
    """Return the value of a field, empty where there is none."""
    return held.get(name.encode(), b"").decode("latin-1").strip()


def _limited(told: RateHeaders, status: int, held: Mapping[bytes, bytes]) -> bool:
    if status == TOO_MANY:
        return True
    if status not in told.statuses:
        return False
    signs = told.statuses[status]
    return not signs or any(
        name.encode() in held and value.lower() in {"", _text(held, name).lower()} for name, value in signs
    )


def _remaining(told: RateHeaders, held: Mapping[bytes, bytes]) -> int | None:
    for name in told.remaining:
        text = _text(held, name)
        number, used = _number(text), USED_OF.fullmatch(text)
        if used is not None:
            number = float(int(used[2]) - int(used[1]))
        if number is not None:
            return max(int(number), 0)
    return None


def _reset(told: RateHeaders, held: Mapping[bytes, bytes], at: float) -> float | None:
    for name in told.reset:
        seconds = READERS[told.reset_format](_text(held, name), at)
        if seconds is not None:
            return max(seconds, 0.0)
    return None


def _retry_after(text: str, at: float) -> float | None:
    if not text:
        return None
    number = _number(text)
    seconds = number if number is not None else _until_http_date(text, at)
    return None if seconds is None else max(seconds, 0.0)


def _number(text: str) -> float | None:
    return float(text) if NUMBER.fullmatch(text) else None


def _seconds(text: str, at: float) -> float | None:
    del at
    return _number(text)


def _until_epoch(text: str, at: float) -> float | None:
    number = _number(text)
    return None if number is None else number - at


def _until_epoch_ms(text: str, at: float) -> float | None:
    number = _number(text)
    return None if number is None else number / 1000 - at


def _duration(text: str, at: float) -> float | None:
    """Read such as ``6m0s``, ``1.5s`` or ``20ms``."""
    del at
    parts = DURATION.findall(text) if len(text) <= LONGEST_VALUE else []
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * UNIT_SECONDS[unit] for number, unit in parts)


def _until_http_date(text: str, at: float) -> float | None:
    return _until(parsedate_to_datetime, text, at)


def _until_rfc3339(text: str, at: float) -> float | None:
    return _until(datetime.fromisoformat, text, at) if "T" in text.upper() else None


def _until(read: Callable[[str], datetime], text: str, at: float) -> float | None:
    if len(text) > LONGEST_VALUE:
        return None
    try:
        moment = read(text)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp() - at
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


READERS: Mapping[ResetFormat, Callable[[str, float], float | None]] = {
    "seconds": _seconds,
    "epoch": _until_epoch,
    "epoch_ms": _until_epoch_ms,
    "duration": _duration,
    "http_date": _until_http_date,
    "rfc3339": _until_rfc3339,
}
