"""Builds the HashiCorp Vault that tests run against: `python .ci/vault/build.py [--where]`, standard library and Go only.

The sources come from the Go module proxy, by the hashes in `go.sum` beside this file: Vault 1.14.1 is the last version under
MPL-2.0, and what we use of it is what OpenBao shares. The binary (180 MB) is kept outside of the tree, in
`$XDG_CACHE_HOME/credential-broker` or `~/.cache/credential-broker`, under a name made from the two module files: a change
of them builds anew, everything else takes what is there. It takes four minutes on two cores, once. Safe to start
twice at once (the second waits). `--where` prints the path and builds nothing. Go's own settings (`GOPROXY`, `GOFLAGS`,
`GOMODCACHE` …) reach Go untouched.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("go.mod", "go.sum")
PACKAGE = "github.com/hashicorp/vault"


def main(arguments: list[str]) -> int:
    """Make the binary ready; return 0, or 1 after saying on standard error what went wrong."""
    if arguments not in ([], ["--where"]):
        print("usage: python .ci/vault/build.py [--where]", file=sys.stderr)
        return 2
    place = binary()
    if arguments:
        print(place)
        return 0
    if shutil.which("go") is None and not place.exists():
        print("Go is needed (1.21 or newer fetches the one that go.mod asks for)", file=sys.stderr)
        return 1
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return 0 if place.exists() else _build(place)


def binary() -> Path:
    """Return where the binary is, or will be."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()[:16]
    return Path(cache).expanduser() / "credential-broker" / f"vault-{digest}"


def _build(place: Path) -> int:
    """Build beside the place and then move it there, so that what stands there is always whole."""
    print("Building HashiCorp Vault for the tests (about four minutes, once) …", flush=True)
    draft = place.with_suffix(".new")
    command = ("go", "build", "-trimpath", "-mod=readonly", "-ldflags=-s -w", "-o", draft, PACKAGE)
    status = subprocess.run(command, cwd=HERE, check=False).returncode  # noqa: S603 - the command stands here
    if status != 0:
        print("Vault could not be built", file=sys.stderr)
        return 1
    draft.replace(place)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
