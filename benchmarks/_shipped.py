"""The Python that the container image has: what is measured is what is shipped, not how somebody built an interpreter.

The image stands on Debian's Python 3.13, which is compiled with its profile and across its files. A machine's own may be
neither (pyenv's is not by default), which makes every Python program a third slower, and only those: beside a proxy in C++ or
Go that is no comparison. So where a peer is compiled (proxy.py, webhooks.py) all Python runs on it, the peers too; where both
sides are Python (tokens.py) both run on the environment's own, as they always did.

It comes from the files of `.ci/image/engine.py base`, and lies in `.cache/peers`, with the broker's locked packages. Where it
cannot be made (no Debian, no root), the environment's own Python is used, and a benchmark says so. By itself:
`python benchmarks/_shipped.py`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".cache" / "peers" / "shipped"
SYSTEM, PACKAGES, PEERS, PYTHON = PLACE / "system", PLACE / "packages", PLACE / "peers", PLACE / "python"
STAMP = PLACE / ".stamp"
BASE = ROOT / ".cache" / "image" / "base.tar"
LOCKS = {PACKAGES: ROOT / "requirements.lock", PEERS: ROOT / "benchmarks" / "peers" / "requirements.lock"}
VERSION = "3.13"
WANTED = ("usr/lib/", "usr/bin/python3", "usr/share/zoneinfo/", "lib64", "lib")


def main() -> int:
    """Make it ready; return 0 also where that is not possible here, after saying so."""
    wanted = hashlib.sha256(b"".join([VERSION.encode(), *(lock.read_bytes() for lock in LOCKS.values())])).hexdigest()
    if STAMP.exists() and STAMP.read_text(encoding="ascii") == wanted and PYTHON.exists():
        return 0
    try:
        subprocess.run([sys.executable, ROOT / ".ci" / "image" / "engine.py", "base"], check=True)  # noqa: S603 - ours
        _unpack()
        for place, lock in LOCKS.items():
            _install(place, lock)
        _write_starter()
        subprocess.run([PYTHON, "-c", "import uvloop, cryptography, broker"], check=True, cwd=ROOT)  # noqa: S603 - ours
    except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        print(
            f"the image's Python could not be made ready here, so this machine's is measured: {error}", file=sys.stderr
        )
        STAMP.unlink(missing_ok=True)
        return 0
    STAMP.write_text(wanted, encoding="ascii")
    return 0


def python() -> str:
    """Return the program to run Python with; where it lies says which it is."""
    return str(PYTHON) if STAMP.exists() else sys.executable


def described() -> str:
    """Return what a benchmark says of it."""
    version = subprocess.run([python(), "--version"], check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603 - ours
    return f"{version}, the image's" if STAMP.exists() else f"{version}, this machine's own: not the image's"


def _unpack() -> None:
    SYSTEM.mkdir(parents=True, exist_ok=True)
    with tarfile.open(BASE) as base:
        members = [one for one in base if one.name.removeprefix("./").startswith(WANTED) and not one.isdev()]
        base.extractall(SYSTEM, members, filter="tar")


def _install(place: Path, lock: Path) -> None:
    """Install what a lock names, for that Python; uv, of our own environment, needs no other to do it."""
    uv = Path(sys.executable).parent / "uv"
    how = ("--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--python-version", VERSION)
    print(f"Bringing the packages of {lock.relative_to(ROOT)} for the image's Python …", flush=True)
    subprocess.run([uv, "pip", "install", *how, "--target", place, "-r", lock], check=True)  # noqa: S603 - ours


def _write_starter() -> None:
    """Write the program that starts it, by the loader and with the libraries of its own system."""
    (loader,) = (SYSTEM / "usr" / "lib").glob("*-linux-gnu/ld-linux-*.so.*")
    PYTHON.write_text(
        "#!/bin/sh\n"
        f'export PYTHONHOME="{SYSTEM}/usr" PYTHONPATH="$PYTHONPATH:{PACKAGES}"\n'
        f'exec "{loader}" --library-path "{loader.parent}" --argv0 "{PYTHON}" "{SYSTEM}/usr/bin/python{VERSION}" "$@"\n'
    )
    PYTHON.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main())
