"""What a check of the doctor comes to, and how many of a kind are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

MOST_NAMED: Final = 50  # of one kind; a damaged table would else be printed whole
State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check came to. ``state``: ok, warning (works, but somebody should look) or failed.

    ``advice``: what to do about it, empty where nothing is to be done. Neither text holds a secret.
    """

    check: str
    state: State
    detail: str
    advice: str = ""


def bounded(found: Sequence[Finding], *, otherwise: Finding) -> list[Finding]:
    """Return the first ``MOST_NAMED`` findings and how many more there are, or ``otherwise`` where there is none (pure)."""
    shown, more = list(found[:MOST_NAMED]), len(found) - MOST_NAMED
    if more > 0:
        shown.append(Finding(otherwise.check, "warning", f"and {more} more", "mend the ones above, and ask again"))
    return shown or [otherwise]
