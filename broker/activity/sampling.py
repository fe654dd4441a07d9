"""Which calls of a flush get a line: a bounded sample in which every integration has its share, and errors come first."""

from __future__ import annotations

from collections import deque
from itertools import chain, zip_longest

from broker.activity.tallies import CallDone

MOST_LINES = 200
MOST_INTEGRATIONS = 100
REST = ""  # no integration is called that
LEVELS = ("error", "warning", "info")  # 5xx and our own errors, then 4xx and who left, then what went well
Line = tuple[float, CallDone]


class Sample:
    """Keeps ``MOST_LINES`` of each level for each of ``MOST_INTEGRATIONS``; what further ones did shares one more place."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._kept: dict[str, dict[str, deque[Line]]] = {}

    def add(self, at: float, done: CallDone) -> None:
        """Keep a call that ended at ``at``; an older one of its kind may be forgotten for it."""
        known = done.integration in self._kept or len(self._kept) < MOST_INTEGRATIONS
        levels = self._kept.setdefault(done.integration if known else REST, {})
        lines = levels.get(done.level)
        if lines is None:
            lines = levels[done.level] = deque(maxlen=MOST_LINES)
        lines.append((at, done))

    def take(self) -> list[Line]:
        """Return at most ``MOST_LINES`` in the order of their ends, and forget all.

        The integrations take turns, so that none pushes out another's; each gives its errors first, and the newest first
        of each level. What does not fit in the last turn is what matters least.
        """
        by_worth = [
            chain.from_iterable([reversed(levels.get(level, ())) for level in LEVELS]) for levels in self._kept.values()
        ]
        self._kept = {}
        chosen: list[Line] = []
        for turn in zip_longest(*by_worth):
            lines = sorted((line for line in turn if line is not None), key=lambda one: LEVELS.index(one[1].level))
            chosen += lines[: MOST_LINES - len(chosen)]
            if len(chosen) >= MOST_LINES:
                break
        return sorted(chosen, key=lambda line: line[0])
