"""Serves the sandbox on real sockets, in a running loop or as a command, with connections that can be dropped."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
import uvicorn
import uvloop
from joserfc.jwk import RSAKey
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from broker.demo.sandbox.application import Sandbox
from broker.demo.sandbox.control import CONTROL
from broker.demo.sandbox.endpoints import ROUTES
from broker.demo.sandbox.options import SandboxOptions
from broker.demo.sandbox.state import SandboxState, is_loopback
from broker.demo.sandbox.wire import DROP


class DroppableProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which hands the application a way to hang up, and logs no request line (codes stand in them)."""

    def __init__(self, config: uvicorn.Config, server_state: ServerState) -> None:
        super().__init__(config, server_state, {})
        self.access_log = False

    def on_message_begin(self) -> None:
        """Offer the way out in the request's scope."""
        super().on_message_begin()
        self.scope["extensions"] = {DROP: self.drop}  # type: ignore[dict-item]  # ours is a function

    def drop(self, reset: bool) -> None:  # noqa: FBT001 - called through ASGI
        """Close after what was written; by RST instead of FIN if asked for."""
        if reset:
            # Works on every event loop: options belong to the connection, so a duplicate of its descriptor will do.
            with socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno())) as twin:
                twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.close()


def create_sandbox(
    options: SandboxOptions,
    *,
    clock: Callable[[], float] = time.time,
    signing_key: RSAKey | None = None,
) -> Sandbox:
    """Return the ASGI application; ``options.issuer`` must be its base URL. ``serve_sandbox`` does that and more."""
    if not options.issuer:
        raise ValueError("the sandbox must know its issuer")
    return Sandbox(SandboxState(options, clock=clock, signing_key=signing_key), ROUTES, CONTROL)


@contextlib.asynccontextmanager
async def serve_sandbox(
    options: SandboxOptions | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    clock: Callable[[], float] = time.time,
    signing_key: RSAKey | None = None,
) -> AsyncIterator[Sandbox]:
    """Serve on the running loop until the block ends; the issuer is ``http://host:port`` unless the options name one.

    Port 0 takes a free one. At the end connections are cut and requests under way are ended. ValueError for a control API
    that others than this machine could reach.
    """
    options = options or SandboxOptions()
    if options.control and not is_loopback(host):
        raise ValueError("the control API is for loopback only")
    with contextlib.closing(listen(host, port)) as listening:
        shown = f"[{host}]" if ":" in host else host
        issuer = options.issuer or f"http://{shown}:{listening.getsockname()[1]}"
        sandbox = create_sandbox(msgspec.structs.replace(options, issuer=issuer), clock=clock, signing_key=signing_key)
        serving = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(protocol_factory(sandbox, serving), sock=listening, backlog=1024)
        try:
            yield sandbox
        finally:
            server.close()
            await _end(serving)
            await server.wait_closed()


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket; OSError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol has to be named: asyncio sets TCP_NODELAY only then, and without it an answer takes 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening


def protocol_factory(sandbox: Sandbox, serving: ServerState) -> Callable[[], asyncio.Protocol]:
    """Return what makes a connection's protocol; logging stays as it is, no header is added but the sandbox's own."""
    config = uvicorn.Config(
        sandbox,
        log_config=None,
        lifespan="off",
        ws="none",
        interface="asgi3",
        proxy_headers=False,
        timeout_keep_alive=300,
    )
    config.load()
    return lambda: DroppableProtocol(config, serving)


async def _end(serving: ServerState) -> None:
    for connection in list(serving.connections):
        connection.transport.abort()
    if serving.tasks:  # each sees its caller hang up and ends by itself
        await asyncio.wait(serving.tasks, timeout=5)


async def run_sandbox(host: str, port: int, options: SandboxOptions) -> None:
    """Serve until SIGINT or SIGTERM, after printing where."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    try:
        async with serve_sandbox(options, host=host, port=port) as sandbox:
            sys.stdout.write(f"sandbox provider: {sandbox.issuer}\n")
            sys.stdout.flush()
            await stopped.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m broker.demo.sandbox``."""
    parser = argparse.ArgumentParser(prog="python -m broker.demo.sandbox", description="A made-up OAuth provider.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument(
        "--mode", choices=["strict", "grace", "static"], default="strict", help="what used refresh tokens do"
    )
    parser.add_argument("--access-token-seconds", type=int, default=3600)
    parser.add_argument("--redirect-uri", action="append", default=[], help="of the demo client; may be repeated")
    parser.add_argument("--auto-consent", action="store_true", help="redirect at once instead of showing the page")
    parser.add_argument("--control", action="store_true", help="open /_control, for tests")
    chosen = parser.parse_args(arguments)
    options = SandboxOptions(
        mode=chosen.mode,
        access_token_seconds=chosen.access_token_seconds,
        redirect_uris=tuple(chosen.redirect_uri) or SandboxOptions().redirect_uris,
        auto_consent=chosen.auto_consent,
        control=chosen.control,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_sandbox(chosen.host, chosen.port, options))
