"""The demo's stage: a sandbox provider and a broker on loopback ports, with nothing of the user's environment in them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import uvicorn

from broker.app import create_app, open_parts, running_worker
from broker.callers import mint_key
from broker.demo.sandbox import Sandbox, SandboxOptions, serve_sandbox
from broker.settings import Settings, load_settings
from broker.telemetry import configure_logging

INTEGRATION = "sandbox"
LANDING = "/connected"
FIXED_PORTS = (8000, 8001, 8002)  # broker, sandbox, app: for people, who like to find them again
ANY_PORTS = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Stage:
    """What the demo plays on. ``app`` is the origin of the application, which has users and a backend."""

    base: str
    app: str
    app_listener: socket.socket
    data_dir: Path
    sandbox: Sandbox
    admin_key: str = field(repr=False)
    http: httpx2.AsyncClient

    @property
    def log_file(self) -> Path:
        """Where the broker logs to."""
        return self.data_dir / "broker.log"

    @property
    def return_to(self) -> str:
        """The application's page at which flows end."""
        return f"{self.app}{LANDING}"

    async def call(self, method: str, path: str, key: str, body: Any = None) -> httpx2.Response:  # noqa: ANN401 - JSON
        """Call the broker's API as a backend does, with a caller key."""
        headers = {"Authorization": f"Bearer {key}"}
        return await self.http.request(method, f"{self.base}{path}", json=body, headers=headers)

    async def whoami(self, access_token: str) -> httpx2.Response:
        """Call the provider's API with an access token."""
        return await self.http.get(f"{self.sandbox.issuer}/api/me", headers={"Authorization": f"Bearer {access_token}"})


@contextlib.asynccontextmanager
async def open_stage(*, ports: tuple[int, int, int] = ANY_PORTS, options: SandboxOptions) -> AsyncIterator[Stage]:
    """Start both in this event loop, on ``ports`` (broker, sandbox, app) where they are free; all is gone at the end.

    The data directory is a temporary one, and the broker's log goes to a file in it.
    """
    async with contextlib.AsyncExitStack() as stack:
        data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-demo-")))
        broker_listener, app_listener = (stack.enter_context(listening(port)) for port in (ports[0], ports[2]))
        base, app = map(origin_of, (broker_listener, app_listener))
        options = msgspec.structs.replace(options, redirect_uris=(f"{base}/oauth/{INTEGRATION}/callback",))
        sandbox = await stack.enter_async_context(serve_sandbox(options, port=free_port(ports[1])))
        admin_key = mint_key()[1].reveal()
        settings = demo_settings(data_dir, base, app, admin_key)
        log = stack.enter_context((data_dir / "broker.log").open("w", encoding="utf-8"))
        configure_logging(settings, stream=log)
        parts = await stack.enter_async_context(open_parts(settings))
        await stack.enter_async_context(running_worker(parts))
        await stack.enter_async_context(serving(create_app(parts), broker_listener))
        http = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False, timeout=30))
        yield Stage(base, app, app_listener, data_dir, sandbox, admin_key, http)


def demo_settings(data_dir: Path, base: str, app: str, admin_key: str) -> Settings:
    """Return development settings; neither the environment nor a file of the working directory gets into them."""
    return load_settings(
        {}, directory=data_dir, env="development", data_dir=data_dir, public_url=base,
        return_to=f"{app}/**", admin_key=admin_key,
    )  # fmt: skip


# Sockets and servers


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """Give a listening loopback socket on ``port``, or on a free one when that is taken; closed afterwards."""
    try:
        bound = _bound(port)
    except OSError:
        bound = _bound(0)
    with contextlib.closing(bound) as listener:
        listener.listen(1024)  # now: two sockets that are only bound may hold the same port
        yield listener


def _bound(port: int) -> socket.socket:
    # The protocol has to be named: asyncio sets TCP_NODELAY only then, and without it an answer takes 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError:
        listener.close()
        raise
    return listener


def free_port(port: int) -> int:
    """Return ``port`` when nobody listens there, else 0."""
    with listening(port) as listener:
        return port if listener.getsockname()[1] == port else 0


def origin_of(listener: socket.socket) -> str:
    """Return the address of a listening socket as an origin."""
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to whoever runs the loop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: Any, listener: socket.socket) -> AsyncIterator[None]:  # noqa: ANN401 - an ASGI application
    """Serve an application on a socket inside this event loop until the block ends."""
    config = uvicorn.Config(
        app, http="httptools", access_log=False, log_config=None, lifespan="off", server_header=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has a flag, no event
            await asyncio.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        await task
