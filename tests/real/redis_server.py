"""A real Redis for a test: the one that is installed, else Debian's packages, unpacked into `.cache` without installing them.

`python tests/real/redis_server.py` brings it (`make test-real` does); what is there is not brought again.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent.parent / ".cache" / "redis"
PACKAGES = ("redis-server", "redis-tools", "libjemalloc2", "liblua5.1-0", "liblzf1", "lua-bitop", "lua-cjson")
UNPACKED = CACHE / "usr" / "bin" / "redis-server"
START_SECONDS = 10.0


def binary() -> Path:
    """Return where Redis is, or will be."""
    installed = shutil.which("redis-server")
    return Path(installed) if installed else UNPACKED


def bring() -> int:
    """Unpack Debian's packages where Redis is not there yet; CalledProcessError when they cannot be had."""
    if binary().exists():
        return 0
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        _run("apt-get", "-qq", "download", *PACKAGES)
    except subprocess.CalledProcessError:  # no lists of packages, or old ones
        _run("apt-get", "-qq", "update")
        _run("apt-get", "-qq", "download", *PACKAGES)
    for package in sorted(CACHE.glob("*.deb")):
        _run("dpkg", "-x", package, CACHE)
    return 0


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, cwd=CACHE)  # noqa: S603 - the commands stand here


class RedisServer:
    """A Redis on a port of this machine that a test may kill and start again. It keeps nothing on disk."""

    def __init__(self, directory: Path) -> None:
        """Choose a free port; `start` starts it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and return when it answers (TimeoutError)."""
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self._directory, "save": "", "appendonly": "no"}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with (self._directory / "redis.log").open("ab") as output:
            command = [str(binary()), *arguments]
            self._process = subprocess.Popen(command, env=_environment(), stdout=output)  # noqa: S603 - our own
        until = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > until:
                raise TimeoutError("Redis did not start")
            time.sleep(0.02)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16) == b"+PONG\r\n"
        except OSError:
            return False


def _environment() -> Mapping[str, str]:
    libraries = [str(path.parent) for path in CACHE.glob("usr/lib/*/libjemalloc.so.2")]
    return {"LD_LIBRARY_PATH": os.pathsep.join(libraries)} if libraries else {}


if __name__ == "__main__":
    sys.exit(bring())
