"""`broker serve` that tells how many tasks it has: `python -m tests.crash.counted FILE serve …`, then SIGUSR1."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from types import FrameType

from broker.cli import main

PAUSE = "Event.wait"


def tell(place: Path) -> None:
    """Write, at each SIGUSR1, the names of the running tasks' coroutines into a file, a line for each.

    Pauses of background work are left out: they come and go.
    """

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        names = (getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks() if not task.done())
        draft = place.with_suffix(".new")
        draft.write_text("\n".join(sorted(name for name in names if name != PAUSE)), encoding="utf-8")
        draft.replace(place)

    signal.signal(signal.SIGUSR1, on_signal)


if __name__ == "__main__":
    tell(Path(sys.argv.pop(1)))
    main()
