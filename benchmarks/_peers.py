"""Brings what proxy.py and webhooks.py compare with: Envoy and mitmproxy from PyPI, nginx and webhook from Debian.

Envoy and mitmproxy get a virtual environment of their own, `.venv-peers`, by the hashes in `peers/requirements.lock`
(refreshed by `uv pip compile --universal --python-version 3.11 --generate-hashes` from `requirements.in` beside it). nginx is
the one that is installed, else Debian's package is unpacked into `.cache`, without installing it; so is webhook. Go, from the
PATH, builds `wire/`. What is there is not made again. Run it by itself: `python benchmarks/_peers.py`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _shipped

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOCK = HERE / "peers" / "requirements.lock"
VENV = ROOT / ".venv-peers"
STAMP = VENV / ".stamp"
ENVOY, MITMDUMP = VENV / "bin" / "envoy", VENV / "bin" / "mitmdump"
CACHE = ROOT / ".cache" / "peers"
DEBIAN = {"nginx": "usr/sbin/nginx", "webhook": "usr/bin/webhook"}
WIRE = CACHE / "wire"


def main() -> int:
    """Make all of it ready; return 0, or 1 after saying what is missing."""
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        _python_packages()
        for name in DEBIAN:
            _from_debian(name)
        _shipped.main()
        _run("go", "build", "-trimpath", "-o", WIRE, ".", place=HERE / "wire")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"the peers of the benchmark could not be made ready: {error}", file=sys.stderr)
        return 1
    return 0


def debian(name: str) -> Path:
    """Return where a program of ``DEBIAN`` is, or will be."""
    installed = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return Path(installed) if installed else CACHE / DEBIAN[name]


def mitmdump() -> list[str]:
    """Return the beginning of mitmproxy's command line, on the Python that the broker is measured on."""
    if _shipped.python() == sys.executable:
        return [str(MITMDUMP)]
    start = f"import sys; sys.path.insert(0, {str(_shipped.PEERS)!r}); from mitmproxy.tools.main import mitmdump; mitmdump()"
    return [_shipped.python(), "-c", start]


def _python_packages() -> None:
    wanted = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}\n".encode() + LOCK.read_bytes()).hexdigest()
    if STAMP.exists() and STAMP.read_text(encoding="ascii") == wanted:
        return
    uv = Path(sys.executable).parent / "uv"
    print(f"Making {VENV.name} ready from {LOCK.relative_to(ROOT)} …", flush=True)
    _run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, VENV)
    _run(uv, "pip", "sync", "--quiet", "--require-hashes", "--python", VENV / "bin" / "python", LOCK)
    STAMP.write_text(wanted, encoding="ascii")


def _from_debian(name: str) -> None:
    if debian(name).exists():
        return
    print(f"Unpacking Debian's {name} …", flush=True)
    try:
        _run("apt-get", "-qq", "download", name)
    except subprocess.CalledProcessError:  # no lists of packages, or old ones
        _run("apt-get", "-qq", "update")
        _run("apt-get", "-qq", "download", name)
    _run("dpkg", "-x", next(CACHE.glob(f"{name}_*.deb")), CACHE)


def _run(*command: str | Path, place: Path = CACHE) -> None:
    subprocess.run(command, check=True, cwd=place)  # noqa: S603 - the commands stand here


if __name__ == "__main__":
    sys.exit(main())
