"""What stands in for `docker` where a page's commands are run: Podman, with the image that `make image` has built.

Differences, each because this machine has no Docker engine: `build` takes the image that is there; a published port is the
machine's own, at which the broker is told to listen; the health check has no timer. Everything else goes to Podman as it is.
"""

from __future__ import annotations

import re
import sys

from tests.real.containers import IMAGE, podman

PUBLISHED = re.compile(r"127[.]0[.]0[.]1:(\d+):8000")


def main(arguments: list[str]) -> int:
    """Run one command; return its status."""
    if arguments[:2] == ["build", "--tag"] and arguments[3:] == ["."]:
        arguments = ["tag", IMAGE, arguments[2]]
    elif arguments[0] == "run":
        arguments = ["run", "--no-healthcheck", "--pull=never", *_on_this_machine(arguments[1:])]
    done = podman(*arguments, check=False)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


def _on_this_machine(arguments: list[str]) -> list[str]:
    """Return the arguments of `run` with the machine's network in place of a published port, and none without one."""
    if "--publish" not in arguments:
        return ["--network=none", *arguments]
    at = arguments.index("--publish")
    published = PUBLISHED.fullmatch(arguments[at + 1])
    assert published is not None, arguments
    return ["--network=host", *arguments[:at], *arguments[at + 2 :], "serve", "--port", published[1]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
