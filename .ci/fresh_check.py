"""Runs the README's commands in a fresh clone, as a stranger's machine would: `python .ci/fresh_check.py [--working-tree]`.

The clone lies outside the tree, the home directory is empty, the path holds `python3.11` and `make` and nothing else, and of
the environment only the settings of pip and TLS are kept. `make demo` must end within two minutes, and no test may be skipped.
Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT_PREFIXES = ("PIP_", "SSL_CERT_")
KEPT_NAMES = ("REQUESTS_CA_BUNDLE",)
TIMEOUT_SECONDS = {"make demo": 120}
DEFAULT_TIMEOUT_SECONDS = 2700
CLOSING_LINE = re.compile(r"^=* ?(?:\d+ \w+(?:, )?)+ in [\d.]+s.*$")


def main(arguments: list[str]) -> int:
    """Return 0 when every command ended well, in time, and without a skipped test."""
    if arguments not in ([], ["--working-tree"]):
        print("usage: python .ci/fresh_check.py [--working-tree]", file=sys.stderr)
        return 2
    commands = readme_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="fresh-check-") as directory:
        place = Path(directory)
        place.chmod(0o755)  # PostgreSQL, started by root as another user, has to reach its files
        tree = _clone(place / "tree", working_tree=bool(arguments))
        environment = _bare_environment(place)
        problems = [problem for command in commands for problem in _run(command, tree, environment)]
    for problem in problems:
        print(f"fresh-check: {problem}")
    print("fresh-check:", "FAILED" if problems else "ok")
    return 1 if problems else 0


def readme_commands(readme: str) -> list[str]:
    """Return the commands that the README tells a newcomer to run: `make …` lines of its first shell block."""
    block = re.search(r"^```sh\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    commands = re.findall(r"^(make [a-z-]+)\b", block.group(1), re.MULTILINE) if block else []
    if commands != ["make demo", "make test"]:
        message = "README.md's first ```sh block must hold `make demo` and `make test`, in this order"
        raise SystemExit(message)
    return commands


def _clone(tree: Path, *, working_tree: bool) -> Path:
    if not working_tree:
        _git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(tree))
        return tree
    listed = _git("-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout  # noqa: S603, S607


def _bare_environment(place: Path) -> dict[str, str]:
    home, path = place / "home", place / "bin"
    home.mkdir()
    path.mkdir()
    make = shutil.which("make")
    if make is None:
        raise SystemExit("make is not on the path")
    (path / "make").symlink_to(make)
    (path / "python3.11").symlink_to(os.path.realpath(sys.executable))
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root: for root, the wheel that ships it makes a user for it
        useradd = shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin")
        (path / "useradd").symlink_to(useradd or "/usr/sbin/useradd")
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT_PREFIXES) or name in KEPT_NAMES}
    return {**kept, "PATH": str(path), "HOME": str(home)}


def _run(command: str, tree: Path, environment: dict[str, str]) -> list[str]:
    """Run one command, show what it prints, and return what is wrong with how it went."""
    limit_seconds = TIMEOUT_SECONDS.get(command, DEFAULT_TIMEOUT_SECONDS)
    print(f"fresh-check: {command}", flush=True)
    started = time.monotonic()
    status, lines = _watch(command, tree, environment, limit_seconds)
    print(f"fresh-check: {command} took {time.monotonic() - started:.0f} s (limit {limit_seconds} s)", flush=True)
    problems = [] if status == 0 else [f"{command} ended with status {status}"]
    closing = [line for line in lines if CLOSING_LINE.fullmatch(line)]
    if command == "make test" and not closing:
        problems.append("pytest printed no closing line")
    problems.extend(f"tests were skipped: {line.strip('= ')}" for line in closing if " skipped" in line)
    return problems


def _watch(command: str, tree: Path, environment: dict[str, str], limit_seconds: float) -> tuple[int, list[str]]:
    make = f"{environment['PATH']}/make"
    process = subprocess.Popen(  # noqa: S603 - a make target from our own README
        [make, *command.split()[1:]],
        cwd=tree,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None  # noqa: S101 - for the type checker
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, limit_seconds)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    status = process.wait()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return status, lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
