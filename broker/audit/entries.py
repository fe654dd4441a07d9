"""What the audit is told: an entry is refused unless it can be stored and will verify later."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

OUTCOMES = frozenset({"ok", "denied", "intent", "failed"})
DEEPEST_DETAIL = 16
_SIMPLE = frozenset({str, bool, type(None)})

_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
_ACTION = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


@lru_cache(maxsize=1024)
def _is_action(text: str) -> bool:
    return _ACTION.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Entry:
    """What happened. Never holds a secret: a credential appears only as ``Audit.digest``.

    ``actor``: a caller id, ``browser``, ``worker``, ``cli`` or ``system``. ``detail`` is JSON (a copy is kept) without
    personal names: the chain covers it for ever, only ``subject`` can be erased. ``ValueError`` for an action that is not
    dotted lower case, an unknown outcome, text with NUL or lone surrogates (PostgreSQL keeps neither), and for a detail
    that would not come back from JSON as it went in: NaN, keys that are no strings, bytes, integers over 64 bits.
    """

    action: str
    actor: str
    outcome: str = "ok"
    connection_id: str | None = None
    integration: str | None = None
    subject: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what could not be stored or verified later."""
        if not _is_action(self.action):
            raise ValueError("an audit action is dotted lower case")
        if self.outcome not in OUTCOMES:
            raise ValueError("an audit outcome is ok, denied, intent or failed")
        texts = [self.actor, *filter(None, (self.connection_id, self.integration, self.subject))]
        if _is_flat(self.detail) and _are_plain([*texts, *self.detail, *filter(_is_text, self.detail.values())]):
            object.__setattr__(self, "detail", dict(self.detail))  # nearly all: a third of the time of looking at each
            return
        for text in texts:
            _plain_text(text)
        if not isinstance(self.detail, dict | Mapping):
            raise ValueError("an audit detail is a map")  # noqa: TRY004 - one kind of refusal for one kind of mistake
        object.__setattr__(self, "detail", _plain(self.detail, DEEPEST_DETAIL))


def _is_flat(detail: object) -> bool:
    return type(detail) is dict and all(type(value) in _SIMPLE for value in detail.values())


def _is_text(value: object) -> bool:
    return type(value) is str


def _are_plain(texts: Sequence[Any]) -> bool:
    """Whether all of these are texts of ASCII without NUL, found out at once; False may be wrong."""
    try:
        together = "".join(texts)
    except TypeError:
        return False
    return together.isascii() and "\x00" not in together


def _plain(value: object, depth: int) -> Any:  # noqa: ANN401 - JSON is any shape
    """Return a copy made of JSON's own types; ``ValueError`` when it would not come back the same."""
    if depth < 0:
        raise ValueError("an audit detail is nested too deeply")
    kind = type(value)
    if kind is str:
        return _plain_text(value)
    if kind is int:
        return _plain_number(value)
    if value is None or kind is bool:
        return value
    if isinstance(value, dict | Mapping):  # a dict is found at once, any other map takes a search
        return {_plain_text(key): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value]
    return _plain_text(value) if isinstance(value, str) else _plain_number(value)


def _plain_text(value: object) -> str:
    if type(value) is str and value.isascii() and "\x00" not in value:
        return value  # most are: a third of the time of the search
    if not isinstance(value, str) or _UNSTORABLE.search(value):
        raise ValueError("an audit entry takes text without NUL and lone surrogates")
    return str(value)


def _plain_number(value: object) -> int | float:
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise ValueError("an audit detail holds only what JSON can hold")
