"""The demo's application, for people with a browser: a page that connects, confirms, uses and disconnects an account."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlsplit

import jinja2

from broker.demo.sandbox.wire import Message, Receive, Request, Send, read_request
from broker.demo.stage import INTEGRATION, LANDING, Stage, serving
from broker.demo.steps import code_of, shortened

YOU = "notes:you"
SESSION_SECONDS = 86_400
HEADERS = (
    (b"content-type", b"text/html; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),  # the address of the callback page holds the confirm code
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
)


@dataclass(frozen=True, slots=True)
class Shown:
    """What the application answers: a page with a message, or a redirect."""

    title: str = ""
    told: str = ""
    facts: Mapping[str, str] | None = None
    offer: Mapping[str, str] | None = None
    location: str = ""
    status: int = 200


Handler: TypeAlias = Callable[["App", Mapping[str, str]], Awaitable[Shown]]


class App:
    """An application of one user, who is always logged in: its pages and its backend in one ASGI application."""

    def __init__(self, stage: Stage, key: str) -> None:
        """Call the broker with ``key``."""
        self.stage = stage
        self._key = key
        self._pages = jinja2.Environment(
            loader=jinja2.PackageLoader("broker.demo"),
            autoescape=True,
            trim_blocks=True,
            undefined=jinja2.StrictUndefined,
        )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request."""
        request = await read_request(scope, receive)
        if request is None:
            return
        shown = await self._shown(request)
        body = b"" if shown.location else (await self._page(shown)).encode()
        moved = [(b"location", shown.location.encode())] if shown.location else []
        status = 303 if shown.location else shown.status
        headers = [*HEADERS, *moved, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _shown(self, request: Request) -> Shown:
        handle = PAGES.get((request.method, request.path))
        if handle is None:
            return Shown("There is no such page", status=404)
        if request.headers.get("host") != urlsplit(self.stage.app).netloc or not _own(request):
            return Shown("This request came from elsewhere", status=403)
        source = request.query if request.method == "GET" else request.body.decode("latin-1")
        return await handle(self, dict(parse_qsl(source)))

    async def _page(self, shown: Shown) -> str:
        listed = await self.call("GET", f"/v1/connections?subject={YOU}")
        rows = [row for row in listed["data"] if row["status"] != "pending"]
        return self._pages.get_template("app.html").render(shown=shown, connections=rows, user=YOU)

    async def call(self, method: str, path: str, body: Any = None) -> Mapping[str, Any]:  # noqa: ANN401 - JSON
        """Call the broker; return its JSON, with ``refused`` (status and code) where it refused."""
        answer = await self.stage.call(method, path, self._key, body)
        if answer.is_error:
            return {"refused": f"{answer.status_code} {code_of(answer)}", "data": []}
        return dict(answer.json())

    async def session(self) -> Mapping[str, Any]:
        """Mint a session for the user."""
        wanted = {
            "subject": YOU,
            "integrations": [INTEGRATION],
            "return_to": self.stage.return_to,
            "expires_in": SESSION_SECONDS,
        }
        return await self.call("POST", "/v1/sessions", wanted)


def _own(request: Request) -> bool:
    """Whether a form was sent by this application's own page; any page may be linked to."""
    return request.method == "GET" or request.headers.get("sec-fetch-site", "same-origin") == "same-origin"


async def _home(_app: App, _sent: Mapping[str, str]) -> Shown:
    return Shown("Your notes, and the accounts they may use")


async def _connect(app: App, _sent: Mapping[str, str]) -> Shown:
    made = await app.session()
    return Shown(location=made["start_urls"][INTEGRATION])


async def _choose(app: App, _sent: Mapping[str, str]) -> Shown:
    return Shown(location=(await app.session())["connect_url"])


async def _came_back(_app: App, sent: Mapping[str, str]) -> Shown:
    if sent.get("status") != "connected":
        return Shown("Nothing was connected", "This is what the broker sent back:", facts=dict(sent))
    facts = {**sent, **({"confirm": shortened(sent["confirm"])} if "confirm" in sent else {})}
    told = "This is what the broker sent back. Your backend now confirms, within two minutes, that it was you."
    offer = {name: sent[name] for name in ("connection_id", "confirm") if name in sent}
    return Shown("You are back from the provider", told, facts=facts, offer=offer)


async def _confirm(app: App, sent: Mapping[str, str]) -> Shown:
    path = f"/v1/connections/{_id(sent)}/confirm"
    done = await app.call("POST", path, {"code": sent.get("confirm", ""), "subject": YOU})
    if "refused" in done:
        return Shown("The broker did not take the confirmation", facts={"answer": done["refused"]})
    facts = {"connection": done["id"], "status": done["status"], "account": done["account"]["name"]}
    return Shown("Connected", "The connection is yours now.", facts=facts)


async def _use(app: App, sent: Mapping[str, str]) -> Shown:
    wanted = {"force_refresh": True} if "refresh" in sent else {}
    got = await app.call("POST", f"/v1/connections/{_id(sent)}/token", wanted)
    if "refused" in got:
        return Shown("The broker gave no token", facts={"answer": got["refused"]})
    answer = await app.stage.whoami(got["access_token"])
    facts = {
        "token": shortened(got["access_token"]),
        "until": got["expires_at"],
        "API": f"{answer.status_code} {answer.text}",
    }
    return Shown(
        "The provider's API answered", "Your backend asked for a token and called the API with it.", facts=facts
    )


async def _disconnect(app: App, sent: Mapping[str, str]) -> Shown:
    gone = await app.call("DELETE", f"/v1/connections/{_id(sent)}")
    return Shown("Disconnected", facts={"revocation": gone.get("revocation", gone.get("refused", ""))})


def _id(sent: Mapping[str, str]) -> str:
    given = sent.get("connection_id", "")
    return given if given.replace("_", "").isalnum() else "none"


PAGES: Mapping[tuple[str, str], Handler] = {
    ("GET", "/"): _home,
    ("GET", "/connect"): _connect,
    ("GET", "/choose"): _choose,
    ("GET", LANDING): _came_back,
    ("POST", "/confirm"): _confirm,
    ("POST", "/use"): _use,
    ("POST", "/disconnect"): _disconnect,
}


@contextlib.asynccontextmanager
async def open_app(stage: Stage, key: str) -> AsyncIterator[App]:
    """Serve the application on the stage's own port until the block ends."""
    app = App(stage, key)
    async with serving(app, stage.app_listener):
        yield app


async def things_to_click(app: App) -> str:
    """Return the addresses to click, and the command that confirms a flow without an application."""
    stage = app.stage
    start, choose = await app.session(), await app.session()
    settings = {"BROKER_ENV": "development", "BROKER_DATA_DIR": str(stage.data_dir), "BROKER_PUBLIC_URL": stage.base}
    command = f"{' '.join(f'{name}={shlex.quote(value)}' for name, value in settings.items())} {_this_command()}"
    return f"""
Everything keeps running until Ctrl-C. To click:

  an application      {stage.app}/
                      a page that connects, confirms, uses and disconnects: the easiest way in
  a start link        {start["start_urls"][INTEGRATION]}
                      straight to the consent page; the first browser that opens it owns it
  the connect page    {choose["connect_url"]}
                      the broker's own list of what can be connected
  without an app      {stage.base}/oauth/{INTEGRATION}/start
                      ends on a page with a connection's id and a code; confirm it in another terminal with

  {command} connections confirm CONNECTION --code CODE --subject {YOU}
"""


def _this_command() -> str:
    called = Path(sys.argv[0])
    return str(called) if called.name == "broker" else f"{shlex.quote(sys.executable)} -m broker"
