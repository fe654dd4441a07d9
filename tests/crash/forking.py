"""Imports the broker once and forks one for each line on standard input, a log and the command: ready in a moment.

Writes the process's id for each. The forked process runs the command's own code; it ends by signals only.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys

import broker.app
import broker.cli.processes

__all__ = ["broker"]


def become_broker(log: str, *command: str) -> None:
    """Run the command, such as `serve --port 8000`, in this process, which was just forked."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with open(log, "ab") as file, open(os.devnull, "rb") as nothing:  # noqa: PTH123 - descriptors are what is needed
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    random.seed()  # else every process would draw the same
    sys.argv = ["broker", *command]
    from broker.cli import main  # noqa: PLC0415 - only in the forked process

    main()


def keep_forking() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are gone at once
    gc.freeze()
    for line in sys.stdin:
        log, *command = line.split()
        process_id = os.fork()
        if process_id == 0:
            become_broker(log, *command)
            os._exit(1)
        sys.stdout.write(f"{process_id}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    keep_forking()
