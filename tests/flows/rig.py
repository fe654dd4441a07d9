"""A broker and the sandbox provider on real sockets, and a browser and a backend that talk to them over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx2
import msgspec
import uvicorn

from broker.app import Parts, create_app, open_parts, running_worker
from broker.callers import mint_key
from broker.demo.sandbox import DEMO_CLIENT_ID, DEMO_CLIENT_SECRET, Sandbox, SandboxOptions, serve_sandbox
from broker.listening import BoundedHttp
from broker.settings import Settings, load_settings

APP = "http://127.0.0.1:7777/app/connected"


def reserved_socket() -> socket.socket:
    """Return a bound loopback socket; the protocol is named, or asyncio leaves TCP_NODELAY off."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    return listener


def settings_for(data_dir: Path, public_url: str, **overrides: Any) -> Settings:
    """Return development settings that nothing of this machine's environment gets into."""
    given: dict[str, Any] = {
        "env": "development",
        "data_dir": data_dir,
        "public_url": public_url,
        "return_to": "http://127.0.0.1:7777/app/**",
        **overrides,
    }
    return load_settings({}, directory=data_dir, **given)


@asynccontextmanager
async def serving(app: Any, listener: socket.socket) -> AsyncIterator[None]:
    """Serve an application on a bound socket inside this event loop, as `broker serve` does."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=BoundedHttp,
            access_log=False,
            log_config=None,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
        )
    )
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined] # the test owns them
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110 - uvicorn has a flag, no event
        await asyncio.sleep(0.005)
    try:
        yield
    finally:
        server.should_exit = True
        await task


class Browser:
    """A browser: keeps cookies for the broker, follows nothing by itself."""

    def __init__(self, base: str) -> None:
        """Begin with an empty cookie jar."""
        self.http = httpx2.AsyncClient(base_url=base, trust_env=False, timeout=60)

    async def get(self, url: str, **headers: str) -> httpx2.Response:
        """Open a page the way a person's click does."""
        return await self.http.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Rig:
    """Everything a flow test touches."""

    base: str
    parts: Parts
    sandbox: Sandbox
    admin_key: str
    backend: httpx2.AsyncClient
    browsers: list[Browser] = field(default_factory=list)

    def browser(self) -> Browser:
        """Return a fresh browser."""
        made = Browser(self.base)
        self.browsers.append(made)
        return made

    async def close_browsers(self) -> None:
        """Close every browser that was opened."""
        for browser in self.browsers:
            await browser.http.aclose()

    async def call(self, method: str, path: str, body: Any = None, *, key: str | None = None, **headers: str) -> Any:
        """Call `/v1` with a caller key (the admin's by default)."""
        sent = {"Authorization": f"Bearer {key or self.admin_key}"}
        sent.update({name.replace("_", "-"): value for name, value in headers.items()})
        return await self.backend.request(method, path, json=body, headers=sent)

    async def caller(self, *grants: Mapping[str, Any], roles: tuple[str, ...] = ("service",)) -> str:
        """Make a caller and return its key."""
        made = await self.call("POST", "/v1/callers", {"name": "app", "roles": list(roles), "grants": list(grants)})
        assert made.status_code == 201, made.text
        return str(made.json()["key"])

    async def integration(self, name: str = "sandbox", **changes: Any) -> None:
        """Configure the sandbox as an integration of the generic provider."""
        config = {"issuer": self.sandbox.issuer, **changes.pop("config", {})}
        body = {
            "name": name,
            "provider": "oidc",
            "client_id": DEMO_CLIENT_ID,
            "client_secret": DEMO_CLIENT_SECRET,
            "scopes": ["openid", "profile", "email", "offline_access"],
            "config": config,
            **changes,
        }
        made = await self.call("POST", "/v1/integrations", body)
        assert made.status_code == 201, made.text

    async def session(self, subject: str = "acme:42", **fields: Any) -> dict[str, Any]:
        """Mint a session."""
        made = await self.call("POST", "/v1/sessions", {"subject": subject, **fields})
        assert made.status_code == 201, made.text
        return dict(made.json())

    async def begin(
        self, browser: Browser, integration: str = "sandbox", *, session: str | None = None, return_to: str | None = APP
    ) -> str:
        """Open the start link; return the provider's authorize URL."""
        query = {name: value for name, value in {"return_to": return_to, "session": session}.items() if value}
        answer = await browser.get(f"/oauth/{integration}/start?{urlencode(query)}")
        if answer.status_code == 303:  # the session's token was taken out of the URL
            answer = await browser.get(answer.headers["location"])
        assert answer.status_code == 302, answer.text
        return str(answer.headers["location"])

    async def consent(
        self, authorize_url: str, *, user: str = "ada", decision: str = "allow", scopes: str | None = None
    ) -> str:
        """Consent at the provider as ``user``; return the callback URL."""
        headers = {"X-Sandbox-Decision": decision, **({"X-Sandbox-Scopes": scopes} if scopes is not None else {})}
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as http:
            answer = await http.get(f"{authorize_url}&login_hint={user}", headers=headers)
        assert answer.status_code in {302, 303}, answer.text
        return str(answer.headers["location"])

    async def flow(
        self,
        browser: Browser | None = None,
        *,
        session: str | None = None,
        return_to: str | None = APP,
        user: str = "ada",
    ) -> dict[str, str]:
        """Run start, consent and callback; return the parameters that came back to the app."""
        browser = browser or self.browser()
        url = await self.begin(browser, session=session, return_to=return_to)
        answer = await browser.get(await self.consent(url, user=user))
        assert answer.status_code == 303, answer.text
        return landed(answer)

    async def confirm(self, came: Mapping[str, str], subject: str = "acme:42", **fields: Any) -> httpx2.Response:
        """Confirm what a flow brought back, without a session: the return_to is the proof."""
        body = {"code": came["confirm"], "subject": subject, **fields}
        return await self.call("POST", f"/v1/connections/{came['connection_id']}/confirm", body)  # type: ignore[no-any-return]

    async def connected(self, subject: str = "acme:42", user: str = "ada") -> dict[str, Any]:
        """Return an active connection that went the whole way."""
        came = await self.flow(user=user)
        answer = await self.confirm(came, subject, return_to=APP)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def token(self, connection_id: str, **body: Any) -> httpx2.Response:
        """Ask for a fresh token."""
        return await self.call("POST", f"/v1/connections/{connection_id}/token", body)  # type: ignore[no-any-return]

    async def whoami(self, access_token: str) -> httpx2.Response:
        """Call the provider's API with a token."""
        async with httpx2.AsyncClient(trust_env=False) as http:
            return await http.get(f"{self.sandbox.issuer}/api/me", headers={"Authorization": f"Bearer {access_token}"})


def landed(answer: httpx2.Response) -> dict[str, str]:
    """Return the query that a redirect brings to the app."""
    return dict(parse_qsl(urlsplit(str(answer.headers["location"])).query))


async def eventually(check: Callable[[], Any], *, seconds: float = 10.0) -> Any:
    """Poll an async check until it is true; the last value is returned, a timeout fails the test."""
    async with asyncio.timeout(seconds):
        while not (found := await check()):  # noqa: ASYNC110 - what is waited for is far away
            await asyncio.sleep(0.05)
    return found


@asynccontextmanager
async def open_rig(
    data_dir: Path,
    *,
    database_url: str = "",
    worker: bool = False,
    options: SandboxOptions | None = None,
    **overrides: Any,
) -> AsyncIterator[Rig]:
    """Start the sandbox and a broker; the integration ``sandbox`` is configured."""
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(reserved_socket())
        yield await _opened(stack, listener, data_dir, database_url, worker, options, overrides)


async def _opened(  # what open_rig was given, on an open stack
    stack: contextlib.AsyncExitStack,
    listener: socket.socket,
    data_dir: Path,
    database_url: str,
    worker: bool,  # noqa: FBT001 - passed through
    options: SandboxOptions | None,
    overrides: Mapping[str, Any],
) -> Rig:
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    admin_key = mint_key()[1].reveal()
    settings = settings_for(data_dir, base, database_url=database_url, admin_key=admin_key, **overrides)
    callbacks = (f"{base}/oauth/sandbox/callback", f"{base}/oauth/other/callback")
    options = msgspec.structs.replace(options or SandboxOptions(), redirect_uris=callbacks)
    sandbox = await stack.enter_async_context(serve_sandbox(options))
    parts = await stack.enter_async_context(open_parts(settings, confirm_seconds=0.05))
    await stack.enter_async_context(serving(create_app(parts), listener))
    backend = await stack.enter_async_context(httpx2.AsyncClient(base_url=base, trust_env=False, timeout=60))
    rig = Rig(base, parts, sandbox, admin_key, backend)
    stack.push_async_callback(rig.close_browsers)
    await rig.integration()
    if worker:
        await stack.enter_async_context(running_worker(parts))
    return rig
