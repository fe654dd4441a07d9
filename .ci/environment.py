"""Brings `.venv` to what a lock file says: `python .ci/environment.py runtime|dev`, standard library only.

Safe to start twice at once (the second waits), and after an interruption (a half-made `.venv` is made anew). It does nothing
when the lock, `pyproject.toml`, the interpreter and the place of the tree are those of the last run. pip's own settings
(`PIP_*`, `SSL_CERT_FILE`, `/etc/pip.conf`, …) reach pip untouched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCKS = {"runtime": ROOT / "requirements.lock", "dev": ROOT / "requirements-dev.lock"}
COVERED_BY = {"runtime": ("runtime", "dev"), "dev": ("dev",)}  # the dev lock holds every line of the runtime lock
UNFINISHED = VENV / ".unfinished"
OLDEST_PYTHON = (3, 11)


def main(arguments: list[str]) -> int:
    """Make the environment ready; return 0, or 1 after saying on standard error what went wrong."""
    if len(arguments) != 1 or arguments[0] not in LOCKS:
        return _refuse(f"usage: python .ci/environment.py {'|'.join(LOCKS)}")
    if sys.version_info < OLDEST_PYTHON:
        return _refuse("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 …")
    with _only_one():
        try:
            _make_ready(arguments[0])
        except subprocess.CalledProcessError as error:
            return _refuse(f"this step failed (status {error.returncode}): {' '.join(map(str, error.cmd))}")
    return 0


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Hold a lock on this very file: it is there before `.venv` is, and the lock ends with the process."""
    with Path(__file__).open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make_ready(kind: str) -> None:
    usable = _usable()
    if usable and any(_stamp(one).exists() and _stamp(one).read_text() == _wanted(one) for one in COVERED_BY[kind]):
        return
    print(f"Making .venv ready from {LOCKS[kind].name} (the first time takes about a minute) …", flush=True)
    if not usable:
        _run(sys.executable, "-m", "venv", "--clear", VENV)
    UNFINISHED.touch()
    lock = ("--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", LOCKS[kind])
    _pip(*lock)
    _pip("--no-deps", "--no-build-isolation", "--no-index", "-e", ROOT)
    _stamp(kind).write_text(_wanted(kind))
    UNFINISHED.unlink()


def _usable() -> bool:
    """Whether `.venv` was left in order, still works, and is of the Python that was asked for."""
    python = VENV / "bin" / "python"
    if UNFINISHED.exists() or not python.exists():
        return False
    question = "import pip, sys; print(sys.version_info[:2], sys.prefix)"
    answer = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    return answer.stdout.strip() == f"{sys.version_info[:2]} {VENV}"


def _stamp(kind: str) -> Path:
    return VENV / f".stamp-{kind}"


def _wanted(kind: str) -> str:
    digest = hashlib.sha256(f"{ROOT}\n".encode())  # an environment does not survive being moved
    digest.update(LOCKS[kind].read_bytes())
    digest.update((ROOT / "pyproject.toml").read_bytes())
    return digest.hexdigest()


def _pip(*arguments: str | Path) -> None:
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check")
    _run(VENV / "bin" / "python", "-m", "pip", "install", *quiet, *arguments)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, cwd=ROOT)  # noqa: S603 - only commands that stand in this file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
