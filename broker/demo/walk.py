"""The guided run behind `broker demo`: takes every step in order over real HTTP and says what happened."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.text import Text

from broker.demo.browser import NoConsentPage
from broker.demo.clicking import open_app, things_to_click
from broker.demo.sandbox import SandboxOptions
from broker.demo.stage import ANY_PORTS, FIXED_PORTS, Stage, open_stage
from broker.demo.steps import STEPS, StepFailed, Walk

PATIENCE_SECONDS = 60.0
LOG_LINES_SHOWN = 15
DEMO_OPTIONS = SandboxOptions(
    access_dies_on_refresh=True
)  # as at GitHub: so the demo can show that the old one is dead
SPOKEN = str.maketrans({"→": "->", "…": "...", "·": "-", "“": '"', "”": '"', "✓": "ok", "✗": "not ok"})


async def run_demo(*, keep_serving: bool, options: SandboxOptions | None = None, out: TextIO | None = None) -> int:
    """Walk the whole way and print each step; return 0 if every one held, else 1.

    ``keep_serving``: leave everything running afterwards, with addresses to click, until SIGINT or SIGTERM. ``options``
    change how the sandbox behaves. A signal during the walk ends it with 1. Needs the main thread.
    """
    narrator = Narrator(out or sys.stdout)
    ports = FIXED_PORTS if keep_serving else ANY_PORTS
    with _stop_signal() as stop:
        async with open_stage(ports=ports, options=options or DEMO_OPTIONS) as stage:
            walk = Walk(stage)
            held = await _walk_until(stop, walk, narrator)
            if held and keep_serving:
                await _serve_until(stop, walk, narrator)
    return 0 if held else 1


@contextlib.contextmanager
def _stop_signal() -> Iterator[asyncio.Event]:
    """Give an event that SIGINT and SIGTERM set."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _walk_until(stop: asyncio.Event, walk: Walk, narrator: Narrator) -> bool:
    """Walk; return whether every step held. A stop on the way ends it."""
    walking = asyncio.create_task(take_steps(walk, narrator))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({walking, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if walking.done():
            return walking.result()
        narrator.say("Stopped on the way.")
        return False
    finally:
        for task in (walking, stopping):
            task.cancel()
        await asyncio.gather(walking, stopping, return_exceptions=True)
        await walk.aclose()


async def _serve_until(stop: asyncio.Event, walk: Walk, narrator: Narrator) -> None:
    async with open_app(walk.stage, walk.app_key) as app:
        narrator.say(await things_to_click(app))
        await stop.wait()
    narrator.say("Stopped; nothing is left of it.")


async def take_steps(walk: Walk, narrator: Narrator) -> bool:
    """Take every step, telling each; return whether all held. The first one that does not ends the walk."""
    narrator.open(walk.stage)
    started = time.monotonic()
    for number, step in enumerate(STEPS, 1):
        narrator.announce(number, step.section, step.title)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                narrator.saw(await step.act(walk))
        except (StepFailed, NoConsentPage) as error:
            narrator.failed(number, str(error), walk.stage)
            return False
        except Exception as error:  # noqa: BLE001 - whatever it was, the step did not hold; its text may hold anything
            narrator.failed(number, f"{type(error).__name__} was raised", walk.stage)
            return False
    narrator.close(len(STEPS), time.monotonic() - started)
    return True


class Narrator:
    """Tells the walk line by line; in colour on a terminal, plain when piped."""

    def __init__(self, out: TextIO) -> None:
        """Write to ``out``."""
        self._console = Console(file=out, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._plain = "utf" not in (getattr(out, "encoding", None) or "utf-8").lower()

    def say(self, text: str, style: str = "") -> None:
        """Print lines as they are, each uncut."""
        self._console.print(Text(text.translate(SPOKEN) if self._plain else text, style), soft_wrap=True)

    def open(self, stage: Stage) -> None:
        """Introduce the walk."""
        self.say("The whole way of a credential, on this machine alone: no account anywhere is needed.", "bold")
        self.say(f"  broker    {stage.base}   new, on embedded defaults, its data in a temporary folder")
        self.say(f"  provider  {stage.sandbox.issuer}   a sandbox: a real OAuth server with made-up people")

    def announce(self, number: int, section: str, title: str) -> None:
        """Say what happens now."""
        if section:
            self.say(f"\n{section}", "bold cyan")
        self.say(f"{number:>2}. {title}")

    def saw(self, text: str) -> None:
        """Say what came of it."""
        self.say(f"    → {text}", "green")

    def failed(self, number: int, why: str, stage: Stage) -> None:
        """Say that a step did not hold, with the end of the broker's log."""
        self.say(f"    ✗ step {number} did not hold: {why}", "bold red")
        lines = stage.log_file.read_text(encoding="utf-8").splitlines()[-LOG_LINES_SHOWN:]
        self.say("\n".join(["\nThe end of the broker's log:", *(f"  {line}" for line in lines)]))

    def close(self, steps: int, seconds: float) -> None:
        """Say that all is well."""
        self.say(f"\nAll {steps} steps held, in {seconds:.1f} s.", "bold green")
