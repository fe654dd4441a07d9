"""Runs one exercise with the client that a page's snippet makes, in a process that can reach one address only.

Arguments: the snippet's file, the exercise's name, then the addresses (``host:port``) that may be connected to. Prints a
JSON object: what the exercise returned, and each other address that something tried to reach. Names of the domain in
``DOMAIN`` are this machine, as a wildcard record would say.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import socket
import sys
from typing import Any


def know_domain(domain: str) -> None:
    """Let every name of a domain be this machine, for what looks names up and for what connects to names."""
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def known(host: Any) -> Any:
        return "127.0.0.1" if str(host).endswith(f".{domain}") else host

    def getaddrinfo(host: Any, *arguments: Any, **named: Any) -> Any:
        return look_up(known(host), *arguments, **named)

    def connect_known(self: socket.socket, address: Any) -> None:
        connect(self, (known(address[0]), *address[1:]) if isinstance(address, tuple) else address)

    socket.getaddrinfo = getaddrinfo
    socket.socket.connect = connect_known  # type: ignore[assignment, method-assign]


def main(snippet: str, exercise: str, *allowed: str) -> None:
    """Run the exercise; an attempt to reach another address fails there and is told."""
    elsewhere: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "socket.connect" or not isinstance(arguments[1], tuple):
            return
        address = f"{arguments[1][0]}:{arguments[1][1]}"
        if address not in allowed:
            elsewhere.append(address)
            raise ConnectionRefusedError(f"{address} is not the broker")

    sys.addaudithook(watch)
    know_domain(os.environ["DOMAIN"])
    names = runpy.run_path(snippet)
    returned = importlib.import_module(f"exercise_{exercise}").main(names)
    sys.stdout.write(json.dumps({"returned": returned, "elsewhere": elsewhere}))


if __name__ == "__main__":
    main(*sys.argv[1:])
