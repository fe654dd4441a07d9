"""Runs the broker's image by Podman, as `.ci/image/engine.py` brings both; `make image` has to have been run."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / ".ci" / "image" / "engine.py"
IMAGE = "localhost/broker:dev"
START_SECONDS = 60.0
CONFINED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--memory=256m", "--tmpfs=/tmp")


def podman(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Podman and return what it said; a status that is not 0 fails the test, unless it is asked about."""
    command = [sys.executable, ENGINE, "podman", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_SECONDS)  # noqa: S603 - ours
    assert done.returncode == 0 or not check, (arguments, done.returncode, done.stdout, done.stderr)
    return done


def image_config() -> dict[str, Any]:
    """Return what the image says of itself; fail, and never skip, when it has not been built."""
    shown = podman("image", "inspect", IMAGE, check=False)
    if shown.returncode != 0:
        pytest.fail(f"the image is not built: run `make image` ({shown.stderr.strip()})", pytrace=False)
    return dict(json.loads(shown.stdout)[0])


@dataclass(frozen=True, slots=True)
class Container:
    """A container of one test."""

    name: str

    def run(self, *command: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in it, without a shell; its status is for the caller to look at."""
        return podman("exec", *([f"--user={user}"] if user else []), self.name, *command, check=False)

    def python(self, program: str, *arguments: str) -> str:
        """Run a Python program in it and return what it printed; a failure fails the test."""
        done = self.run("python", "-c", program, *arguments)
        assert done.returncode == 0, (program, done.stdout, done.stderr)
        return done.stdout

    def log(self) -> str:
        """Return everything that it has printed."""
        done = podman("logs", self.name, check=False)
        return done.stdout + done.stderr

    def wait_until_healthy(self, check: Sequence[str]) -> None:
        """Wait until the image's own health check passes (AssertionError with its log)."""
        deadline = time.monotonic() + START_SECONDS
        while self.run(*check).returncode != 0:
            state = podman("inspect", "--format={{.State.Running}}", self.name).stdout.strip()
            assert state == "true", self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)

    def stop(self) -> tuple[int, float]:
        """Send SIGTERM; return the exit status and after how many seconds it ended (137: it had to be killed)."""
        begun = time.monotonic()
        podman("stop", "--time=40", self.name)
        took = time.monotonic() - begun
        return int(podman("inspect", "--format={{.State.ExitCode}}", self.name).stdout), took


@contextlib.contextmanager
def container(*arguments: str, command: Sequence[str] = (), image: str = IMAGE) -> Iterator[Container]:
    """Run a container, by itself with its entrypoint and nothing else, until the block ends.

    Without a timer of systemd, Podman cannot run a health check by itself: `wait_until_healthy` does.
    """
    one = Container(f"test-{secrets.token_hex(6)}")
    podman("run", "--detach", f"--name={one.name}", "--no-healthcheck", "--pull=never", *arguments, image, *command)
    try:
        yield one
    finally:
        podman("rm", "--force", "--time=0", "--volumes", one.name)


def health_check() -> list[str]:
    """Return the command of the image's HEALTHCHECK; it runs without a shell."""
    kind, *command = image_config()["Healthcheck"]["Test"]
    assert kind == "CMD"
    return list(command)
