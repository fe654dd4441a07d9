"""Runs the command line as processes of their own, which see nothing of this machine's environment."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("COVERAGE_",)
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


def environment(place: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a command that lives in ``place``: its home is there, and this tree is importable.

    A variable that is given as an empty text is left out.
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    plain = {"PATH": path, "HOME": str(place), "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    return {name: value for name, value in {**kept, **plain, **variables}.items() if value}


def run(*command: str, place: Path, given: str = "", **variables: str) -> Done:
    """Run a command to its end in ``place`` with ``given`` as its standard input."""
    ended = subprocess.run(  # noqa: S603 - a command of a test
        command,
        cwd=place,
        env=environment(place, **variables),
        input=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return Done(ended.returncode, ended.stdout, ended.stderr)


def broker(*arguments: str, place: Path, given: str = "", **variables: str) -> Done:
    """Run ``python -m broker`` to its end."""
    return run(sys.executable, "-m", "broker", *arguments, place=place, given=given, **variables)


@contextmanager
def running(*command: str, place: Path, variables: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Give a running process with its output as one stream; it and its children are killed at the end if need be."""
    process = subprocess.Popen(  # noqa: S603 - a command of a test
        command,
        cwd=place,
        env=environment(place, **(variables or {})),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_SECONDS)


@contextmanager
def logging_as_before() -> Iterator[None]:
    """Give this process its logging back: commands that run inside it set up their own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()
        root.handlers[:] = handlers
        root.setLevel(level)


def free_port() -> int:
    """Return a port that nobody listens on now, for a process that has to be told one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
