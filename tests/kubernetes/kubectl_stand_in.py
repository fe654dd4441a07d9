"""What stands in for `kubectl` where a page's commands are run: the real one, but for `exec`, which needs a kubelet.

What `exec` would run in a pod runs on this machine, with the settings of the walk, if the cluster has what it names.
"""

from __future__ import annotations

import subprocess
import sys


def main(kubectl: str, arguments: list[str]) -> int:
    """Run one command by the real program ``kubectl``; return its status."""
    command: list[str] = []
    if "exec" in arguments:
        at, end = arguments.index("exec"), arguments.index("--")
        arguments, command = [*arguments[:at], "get", "--output=name", *arguments[at + 1 : end]], arguments[end + 1 :]
    status = subprocess.run([kubectl, *arguments], check=False).returncode  # noqa: S603 - the page's own command
    return status or (subprocess.run(command, check=False).returncode if command else 0)  # noqa: S603 - the same


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
