"""The account of a pass over everything that is under the old keys: what was rewritten, what does not open, what follows."""

from __future__ import annotations

from collections.abc import Sequence

from broker.models import Rotation
from broker.rotation.steps import FLOOR, REWRITE

MOST_NAMED = 20  # of what does not open, in a rotation's detail
NONE_YET = {"rewritten": 0, "unreadable": 0}


def begin_pass(rotation: Rotation) -> None:
    """Go back to the first value. What does not open is counted anew: it may have been repaired or deleted."""
    rotation.step, rotation.position, rotation.failed = REWRITE, None, 0
    rotation.detail = {**rotation.detail, "pass": NONE_YET, "unreadable": []}


def count_batch(rotation: Rotation, moved: int, unreadable: Sequence[str]) -> None:
    """Add what a batch came to; the first few of what does not open are named."""
    account = rotation.detail.get("pass", NONE_YET)
    failed = account["unreadable"] + len(unreadable)
    names = [*rotation.detail.get("unreadable", ()), *unreadable][:MOST_NAMED]
    account = {"rewritten": account["rewritten"] + moved, "unreadable": failed}
    rotation.detail = {**rotation.detail, "pass": account, "unreadable": names}
    rotation.done, rotation.failed = rotation.done + moved, failed
    rotation.total = max(rotation.total, rotation.done)


def end_pass(rotation: Rotation, left: int) -> None:
    """Decide what follows a pass that left so many values under the old keys."""
    account = rotation.detail.get("pass", NONE_YET)
    following = after_pass(left=left, rewritten=account["rewritten"], unreadable=account["unreadable"])
    if following == FLOOR or (following == "failed" and rotation.detail.get("abandon_unreadable")):
        rotation.step, rotation.position = FLOOR, None
    elif following == REWRITE:
        begin_pass(rotation)
    else:
        rotation.state = "failed"
        rotation.detail = {**rotation.detail, "reason": f"{left} under the old key cannot be opened"}


def after_pass(*, left: int, rewritten: int, unreadable: int) -> str:
    """Return what follows a pass over every place that left ``left`` values under the old keys (pure).

    ``floor``: none. ``rewrite``: another pass, for writers that still used the old key meanwhile. ``failed``: the rest does
    not open and the pass moved nothing, so another one would not either.
    """
    if left == 0:
        return FLOOR
    return "failed" if unreadable and not rewritten else REWRITE
