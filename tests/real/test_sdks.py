"""The vendors' own SDKs, unchanged: with the lines that the providers' page shows they work through a `broker serve`.

Each exercise runs twice: straight to the far side with the real credential, which shows that far side and exercise are
right, and through the broker with a caller key. The far side lets the connection's credential pass and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import ssl
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from broker.callers import mint_key
from tests.broker.test_egress import Authority
from tests.commands import ROOT, running
from tests.flows.rig import reserved_socket
from tests.real.apis import anthropic, drive, gitlab, openai, s3, sigv4
from tests.real.apis.openai import bytes_of, parts_of
from tests.real.far_side import Answer, Check, FarSide, Handler, Seen, address_of, bearer, far_side, handing_on, said
from tests.real.parts import DECOY_LOGIN, HERE, NODE, answers, emulate, free_port, require_installed

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

PYTHON = ROOT / ".venv-sdks" / "bin" / "python"
SDKS = HERE / "sdks"
PAGE = ROOT / "docs" / "providers.md"
ADDRESS_IN_PAGE = "https://broker.example.com/proxy/con_…"
HOSTED_IN_PAGE = "https://con-….proxy.example.com"
DOMAIN = "proxy.test"
HOSTS = ["", "files", "uploads"]
EXERCISE_SECONDS = 60.0
WAYS = ("straight", "through the broker")
REPOSITORIES = [f"rocket{number:02}" for number in range(35)]  # a page of GitHub's holds 30
HEALTH = {"github": "/versions", "slack": "/", "stripe": "/v1/customers"}
CUSTOMERS = [f"cus_{number}" for number in range(5)]
CHANNELS = ["launches", "landings", "fuel", "rockets"]
SECRET_FIELDS = {"access_token", "api_key", "secret_access_key", "session_token"}
TAKEN_OFF = frozenset({"cookie", "forwarded", "via", "proxy-authorization", "x-real-ip"})
AWS_KEY = sigv4.Key(
    "AKIAFARSIDE000000001", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "eu-west-1", session_token="FwoGZXIvYXdzE+/="
)


def snippet(provider: str, language: str, address: str = ADDRESS_IN_PAGE) -> str:
    """Return the example in that language of a provider's section that has this address; there is exactly one."""
    (section,) = re.findall(rf"^## {provider}\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if address in block)
    return str(found)


@dataclass(frozen=True)
class Came:
    """What an exercise came to: its base URL, what it returned, and which other addresses it tried to reach."""

    base: str
    returned: dict[str, Any]
    elsewhere: list[str]


@dataclass(frozen=True)
class Site:
    """A `broker serve` process, with an app's caller key that may make calls and import connections."""

    base: str
    admin_key: str = field(repr=False)
    service_key: str = field(repr=False)
    place: Path
    secrets: list[str] = field(default_factory=list, repr=False)

    async def ask(self, path: str, body: Mapping[str, Any], key: str) -> dict[str, Any]:
        """POST to ``/v1``; the answer has to be 201."""
        async with httpx2.AsyncClient(base_url=self.base, trust_env=False, timeout=30) as http:
            answer = await http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def connection(
        self, provider: str, api_base_url: str, hosts: Mapping[str, str], credentials: Mapping[str, Any]
    ) -> str:
        """Import a credential for an integration whose API is at these addresses; return the connection's id."""
        self.secrets.extend(credentials[name] for name in SECRET_FIELDS & credentials.keys())
        name = f"{provider.replace('_', '-')}-{os.urandom(4).hex()}"
        client = {"client_id": "client", "client_secret": "client-secret"} if credentials["type"] == "oauth2" else {}
        config = {"api_base_url": api_base_url, "hosts": hosts}
        await self.ask(
            "/v1/integrations", {"name": name, "provider": provider, "config": config, **client}, self.admin_key
        )
        body = {"integration": name, "subject": "acme:42", "credentials": credentials}
        made = await self.ask("/v1/connections", body, self.service_key)
        assert made["status"] == "active"
        return str(made["id"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Run `broker serve` until the module ends; what it logged and stored must hold no credential in the clear."""
    place, port, admin_key = tmp_path_factory.mktemp("broker"), free_port(), mint_key()[1].reveal()
    base = f"http://127.0.0.1:{port}"
    variables = {"BROKER_ENV": "development", "BROKER_DATA_DIR": str(place), "BROKER_PUBLIC_URL": base}
    variables |= {"BROKER_ADMIN_KEY": admin_key, "BROKER_PROXY_DOMAIN": DOMAIN}
    log = place / "broker.log"
    command = f'exec "{sys.executable}" -m broker serve --port {port} >"{log}" 2>&1'
    with running("/bin/sh", "-c", command, place=place, variables=variables) as process:
        while not answers(f"{base}/health/live"):
            assert process.poll() is None, log.read_text()
        grant = {"integrations": ["*"], "may": ["connect", "proxy", "read"], "subjects": ["acme:*"], "hosts": HOSTS}
        body = {"name": "app", "roles": ["service"], "grants": [grant]}
        made = httpx2.post(f"{base}/v1/callers", json=body, headers={"Authorization": f"Bearer {admin_key}"})
        assert made.status_code == 201, made.text
        site = Site(base, admin_key, made.json()["key"], place)
        yield site
    check_nothing_in_the_clear(site)


def check_nothing_in_the_clear(site: Site) -> None:
    """Check that no file that the broker left, its log among them, holds a credential or a caller key."""
    files = [path.read_bytes() for path in site.place.rglob("*") if path.is_file()]
    assert len(files) > 2
    for secret in (site.service_key, *site.secrets):
        assert not any(secret.encode() in content for content in files)


@dataclass(frozen=True)
class Vendor:
    """How a connection to a far side is made: the provider, the addresses of its API and named hosts, the credential.

    ``key``: what the SDK is given when it talks to the far side itself.
    """

    provider: str
    api_base_url: str
    credentials: Mapping[str, Any] = field(repr=False)
    key: str = field(repr=False)
    hosts: Mapping[str, str] = field(default_factory=dict)


async def reached(way: str, site: Site, vendor: Vendor) -> tuple[str, str]:
    """Return the base URL and the key that an SDK gets on the way given; a connection is made for it."""
    if way == "straight":
        return vendor.api_base_url, vendor.key
    connection = await site.connection(vendor.provider, vendor.api_base_url, vendor.hosts, vendor.credentials)
    return f"{site.base}/proxy/{connection}", site.service_key


async def run(
    provider: str,
    exercise: str,
    base: str,
    key: str,
    place: Path,
    *,
    language: str = "python",
    allowed: tuple[str, ...] = (),
    instead: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Came:
    """Run the page's snippet with this base URL and key, and an exercise with what it made.

    ``allowed``: addresses besides the base URL's that may be connected to; ``instead``: what of the
    snippet is replaced before the address; ``environment``: more variables.
    """
    text = snippet(provider, language, HOSTED_IN_PAGE if DOMAIN in base else ADDRESS_IN_PAGE)
    for old, new in {**(instead or {}), ADDRESS_IN_PAGE: base, HOSTED_IN_PAGE: base}.items():
        text = text.replace(old, new)
    variables = {"BROKER_KEY": key, **(environment or {})}
    return await run_text(text, exercise, base, place, language, allowed, variables)


async def run_text(
    text: str,
    exercise: str,
    base: str,
    place: Path,
    language: str,
    allowed: Sequence[str],
    environment: Mapping[str, str],
) -> Came:
    """Run a text in that language, and an exercise with what it made, in a process that reaches no other address."""
    require_installed()
    if not PYTHON.exists():
        pytest.fail("the SDKs are not installed (.venv-sdks is missing): run `make test-real`", pytrace=False)
    if language == "js":
        file, text = place / "snippet.mjs", f"{text}\nexport {{ octokit }};\n"
        (place / "node_modules").symlink_to(HERE / "node_modules")
        command: tuple[Path, Path] = (NODE, SDKS / "run.mjs")
    else:
        file, command = place / "snippet.py", (PYTHON, SDKS / "run.py")
    file.write_text(text, encoding="utf-8")
    plain = {"PATH": "/usr/bin:/bin", "HOME": str(place), "LANG": "C.UTF-8", "DOMAIN": DOMAIN}
    return Came(
        base=base,
        **json.loads(
            await _output((*command, file, exercise, urlsplit(base).netloc, *allowed), plain | {**environment}, place)
        ),
    )


async def _output(arguments: Sequence[str | Path], environment: Mapping[str, str], place: Path) -> str:
    """Return what a process printed; its end has to be a good one."""
    process = await asyncio.create_subprocess_exec(*arguments, env=environment, cwd=place, stdout=PIPE, stderr=PIPE)
    try:
        out, err = await asyncio.wait_for(process.communicate(), EXERCISE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0, err.decode()[-4000:]
    return out.decode()


def check_far_side(side: FarSide, site: Site, came: Came, *, hosts: Sequence[str] = ()) -> None:
    """Check that it saw the connection's credential only: no caller key, no cookie, nothing that tells of the broker.

    ``hosts``: what ``Host`` may be besides its own address.
    """
    assert side.seen
    assert came.elsewhere == [], "something besides the base URL was called"
    assert [(seen.method, seen.path, seen.fields) for seen in side.refused] == []
    unwanted = TAKEN_OFF - ({"cookie"} if came.base.startswith(side.base) else set())  # some SDKs keep cookies
    for seen in side.seen:
        assert b"brk_" not in seen.raw
        assert site.service_key.encode() not in seen.raw
        assert seen.one("host") in {urlsplit(side.base).netloc, *hosts}
        assert seen.one("user-agent")
        names = {name.decode() for name, _ in seen.fields}
        assert not names & unwanted
        assert not [name for name in names if name.startswith(("x-broker-", "x-forwarded-"))]


@contextlib.asynccontextmanager
async def over_tls(port: int, authority: Authority, name: str = "localhost") -> AsyncIterator[str]:
    """Put TLS before a port, as in front of a broker in production; give the new address, at that name."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while piece := await reader.read(65_536):
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=authority.context(name)) as server:
        yield f"https://{name}:{server.sockets[0].getsockname()[1]}"


# GitHub


@contextlib.asynccontextmanager
async def a_github(make_directory: Callable[[str], Path]) -> AsyncIterator[tuple[FarSide, Vendor]]:
    token = "ghp_" + os.urandom(18).hex()
    users = [{"login": DECOY_LOGIN}, {"login": "ada", "name": "Ada Lovelace", "email": "ada@github.test"}]
    repos = [{"owner": "ada", "name": name} for name in ["rocket", *REPOSITORIES]]
    known = {token: {"login": "ada", "scopes": ["repo", "user"]}}
    refusal = said(401, {"message": "Bad credentials", "status": "401"})

    def either(seen: Seen) -> bool:  # GitHub's own words for the same thing; the broker says Bearer
        return seen.all_of("authorization") in ([f"Bearer {token}"], [f"token {token}"])

    async with fronted("github", {"users": users, "repos": repos}, either, refusal, make_directory, known) as side:
        uploads = {"uploads": side.base}
        yield side, Vendor("github", side.base, {"type": "api_key", "api_key": token}, token, uploads)


@contextlib.asynccontextmanager
async def fronted(
    service: str,
    seed: Mapping[str, object],
    check: Check,
    refusal: Answer,
    make_directory: Callable[[str], Path],
    tokens: Mapping[str, object] | None = None,
    open_paths: tuple[str, ...] = (),
) -> AsyncIterator[FarSide]:
    """Run a far side before one of emulate's services, which would believe any token."""
    with (
        reserved_socket() as listener,
        emulate(
            service,
            seed,
            make_directory=make_directory,
            health_path=HEALTH[service],
            tokens=tokens,
            seen_as=address_of(listener),
        ) as target,
    ):
        async with (
            handing_on(target) as hand_on,
            far_side(lambda _: hand_on, check=check, refusal=refusal, open_paths=open_paths, listener=listener) as side,
        ):
            yield side


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "language"), [("pygithub", "python"), ("octokit", "js")])
async def test_githubs_sdks_list_over_two_pages_and_write(
    way: str, name: str, language: str, site: Site, make_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    async with a_github(make_directory) as (side, vendor):
        base, key = await reached(way, site, vendor)
        uploads = {"UPLOADS": vendor.hosts["uploads"] if way == "straight" else f"{base}:uploads"}
        came = await run("github", name, base, key, tmp_path, language=language, environment=uploads)
    check_far_side(side, site, came)
    assert came.returned["login"] == "ada"
    assert sorted(came.returned["repositories"]) == sorted(f"ada/{one}" for one in ["rocket", *REPOSITORIES])
    assert (came.returned["issue"], came.returned["titles"]) == (1, ["Too heavy"])
    assert name == "pygithub" or came.returned["uploaded"] == ["plan.txt", 10]
    assert name == "octokit" or came.returned["follows_bodies"] is (way == "straight")  # as the page says of it
    listed = [seen for seen in side.seen if seen.path == "/user/repos"]
    assert [seen.query.get("page", "1") for seen in listed] == ["1", "2"]
    for seen in side.seen:
        assert seen.one("x-github-api-version") or way == "straight"  # PyGithub sends none, the broker adds it


# Stripe


@pytest.mark.parametrize("way", WAYS)
async def test_stripes_sdk_creates_idempotently_and_lists_over_pages(
    way: str, site: Site, make_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    key = "sk_test_" + os.urandom(16).hex()
    seed = {"customers": [{"id": one, "email": f"{one}@example.com"} for one in CUSTOMERS]}
    refusal = said(401, {"error": {"type": "invalid_request_error", "message": "Invalid API Key provided"}})
    async with fronted("stripe", seed, bearer(key), refusal, make_directory) as side:
        side.handler = with_files(side.handler)
        vendor = Vendor("stripe", side.base, {"type": "api_key", "api_key": key}, key, {"files": f"{side.base}/upload"})
        instead = {f"{ADDRESS_IN_PAGE}:files": vendor.hosts["files"]} if way == "straight" else {}
        came = await run("stripe", "stripe", *await reached(way, site, vendor), tmp_path, instead=instead)
    check_far_side(side, site, came)
    assert came.returned["email"] == "ada@example.com"
    listed = came.returned["listed"]
    assert {*CUSTOMERS, came.returned["made"]} <= set(listed)
    assert len(set(listed)) == len(listed) == 7  # emulate has one of its own
    created = [seen for seen in side.seen if seen.method == "POST"]
    assert [seen.path for seen in created] == ["/v1/customers", "/upload/v1/files"]
    assert created[0].one("idempotency-key") == "order-42"
    assert came.returned["file"] == f"file with {len(b'evidence')} bytes"
    assert len([seen for seen in side.seen if (seen.method, seen.path) == ("GET", "/v1/customers")]) == 4
    assert all(seen.one("stripe-version") for seen in side.seen)


def with_files(handler: Handler) -> Handler:
    """Return a handler that takes files besides, at an address of their own."""

    async def answer(seen: Seen) -> Answer:
        if seen.path != "/upload/v1/files":
            return await handler(seen)
        content = bytes_of(parts_of(seen)["file"])
        return said(200, {"id": f"file with {len(content)} bytes", "object": "file"})

    return answer


# Slack


@pytest.mark.parametrize("way", WAYS)
async def test_slacks_sdk_lists_by_cursor_and_uploads_without_showing_its_key(
    way: str, site: Site, make_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    token = "xoxb-" + os.urandom(16).hex()
    seed = {
        "users": [{"name": DECOY_LOGIN}, {"name": "ada", "real_name": "Ada Lovelace"}],
        "channels": [{"name": name} for name in CHANNELS],
        "tokens": [{"token": token, "user": "ada", "type": "bot"}],
    }
    refusal = said(200, {"ok": False, "error": "invalid_auth"})
    uploads = ("/upload/v1/",)
    async with fronted("slack", seed, bearer(token), refusal, make_directory, open_paths=uploads) as side:
        vendor = Vendor("slack", f"{side.base}/api", {"type": "api_key", "api_key": token}, token)
        base, key = await reached(way, site, vendor)
        came = await run("slack", "slack", base, key, tmp_path, allowed=(urlsplit(side.base).netloc,))
    check_far_side(side, site, came)
    assert came.returned["user"] == "ada"
    assert set(CHANNELS) <= set(came.returned["channels"])
    assert (came.returned["text"], came.returned["file"]) == ("Lift-off ✓", "Plan")
    assert len([seen for seen in side.seen if seen.path == "/api/conversations.list"]) >= 2
    (upload,) = (seen for seen in side.seen if seen.path.startswith(uploads))
    assert b"T minus 10" in upload.body
    assert upload.all_of("authorization") == []


# OpenAI


@pytest.mark.parametrize("way", WAYS)
async def test_openais_sdk_streams_event_by_event_lists_and_uploads(way: str, site: Site, tmp_path: Path) -> None:
    key = "sk-proj-" + os.urandom(24).hex()
    async with far_side(lambda _: openai.OpenAI(), check=bearer(key), refusal=openai.REFUSAL) as side:
        vendor = Vendor("openai", f"{side.base}/v1", {"type": "api_key", "api_key": key}, key)
        came = await run("openai", "openai", *await reached(way, site, vendor), tmp_path)
    check_far_side(side, site, came)
    names = [f"file-{number}" for number in range(1, 6)]
    assert came.returned == {
        "whole": "Hello wörld",
        "streamed": ["Hel", "lo", " wörld"],
        "models": ["model-1", "model-2"],
        "made": names,
        "files": names,
        "content_is_right": True,
    }
    listed = [seen.query.get("after") for seen in side.seen if (seen.method, seen.path) == ("GET", "/v1/files")]
    assert listed == [None, "file-2", "file-4"]


# Anthropic


@pytest.mark.parametrize("way", WAYS)
async def test_anthropics_sdk_is_given_the_key_in_the_field_that_the_provider_names(
    way: str, site: Site, tmp_path: Path
) -> None:
    key = "sk-ant-" + os.urandom(24).hex()

    def check(seen: Seen) -> bool:  # this SDK says Bearer by itself, which the API takes too
        pair = (seen.all_of("x-api-key"), seen.all_of("authorization"))
        return pair == ([key], []) if way != "straight" else pair == ([], [f"Bearer {key}"])

    async with far_side(lambda _: anthropic.anthropic, check=check, refusal=anthropic.REFUSAL) as side:
        vendor = Vendor("anthropic", side.base, {"type": "api_key", "api_key": key}, key)
        came = await run("anthropic", "anthropic", *await reached(way, site, vendor), tmp_path)
    check_far_side(side, site, came)
    models = [f"model-{number}" for number in range(5)]
    assert came.returned == {"whole": "Hello wörld", "streamed": ["Hel", "lo", " wörld"], "models": models}
    listed = [seen.query.get("after_id") for seen in side.seen if seen.path == "/v1/models"]
    assert listed == [None, "model-1", "model-3"]


# GitLab


@pytest.mark.parametrize(
    ("way", "argument", "kind"),
    [
        ("straight", "private_token", "api_key"),
        ("through the broker", "private_token", "api_key"),
        ("through the broker", "private_token", "oauth2"),  # the caller's key stands in another field than the token
        ("through the broker", "oauth_token", "api_key"),
        ("through the broker", "job_token", "oauth2"),
    ],
)
async def test_gitlabs_sdk_lists_both_ways_finds_a_project_by_path_and_uploads(
    way: str, argument: str, kind: str, site: Site, tmp_path: Path
) -> None:
    token = "glpat-" + os.urandom(10).hex()
    async with far_side(gitlab.GitLab, check=gitlab_check(token, kind), refusal=gitlab.REFUSAL) as side:
        credentials = {"type": kind, "access_token" if kind == "oauth2" else "api_key": token}
        base, key = await reached(way, site, Vendor("gitlab", side.base, credentials, token))
        came = await run("gitlab", "gitlab", base, key, tmp_path, instead={"private_token=": f"{argument}="})
    check_far_side(side, site, came)
    assert came.returned == {
        "user": "ada",
        "project": "acme/rockets",
        "upload": "[plan.txt](/uploads/1/plan.txt)",
        "issue": 4,
        "keyset": [f"acme/rocket{number}" for number in range(1, 6)],
        "by_number": [1, 2, 3, 4],
    }
    assert isinstance(side.handler, gitlab.GitLab)
    assert side.handler.uploads == [b"T minus 10" * 1000]


def gitlab_check(token: str, kind: str = "api_key") -> Check:
    """Return a check for the token in the field for its kind, and nothing in the other ones."""
    own, others = ("private-token", "authorization") if kind == "api_key" else ("authorization", "private-token")
    value = token if kind == "api_key" else f"Bearer {token}"
    return lambda seen: seen.all_of(own) == [value] and not (seen.all_of(others) or seen.all_of("job-token"))


@pytest.mark.parametrize("way", WAYS)
async def test_a_page_on_another_host_is_not_named_so_the_callers_key_does_not_go_there(
    way: str, site: Site, tmp_path: Path
) -> None:
    token = "glpat-" + os.urandom(10).hex()
    elsewhere = f"127.0.0.1:{free_port()}"

    def make(base: str) -> gitlab.GitLab:
        return gitlab.GitLab(base, f"http://{elsewhere}")

    async with far_side(make, check=gitlab_check(token), refusal=gitlab.REFUSAL) as side:
        vendor = Vendor("gitlab", side.base, {"type": "api_key", "api_key": token}, token)
        came = await run("gitlab", "gitlab_elsewhere", *await reached(way, site, vendor), tmp_path)
    check_far_side(side, site, replace(came, elsewhere=[]))
    assert came.returned["items"] == [1]
    if way == "straight":  # the control: an SDK that is told of another host does go there, key and all
        assert (set(came.elsewhere), came.returned["failed"]) == ({elsewhere}, True)
    else:
        assert (came.elsewhere, came.returned["failed"]) == ([], False)


# Google Drive


@pytest.mark.parametrize("way", WAYS)
async def test_googles_sdk_uploads_in_chunks_to_the_session_that_it_was_told(
    way: str, site: Site, tmp_path: Path
) -> None:
    async with a_drive() as (side, vendor):
        base, key = await reached(way, site, vendor)
        came = await run("google", "drive", base, key, tmp_path)
    check_far_side(side, site, came)
    check_uploaded(side, came, base)


async def test_googles_sdk_works_by_a_host_name_where_it_drops_the_path_of_its_endpoint(
    site: Site, tmp_path: Path
) -> None:
    async with a_drive() as (side, vendor), contextlib.AsyncExitStack() as stack:
        proxied, key = await reached("through the broker", site, vendor)
        port, connection = urlsplit(proxied).port or 0, proxied.rpartition("/")[2]
        name = f"{connection.replace('_', '-')}.{DOMAIN}"
        authority = Authority(tmp_path)
        base = await stack.enter_async_context(over_tls(port, authority, name))
        allowed = (f"127.0.0.1:{urlsplit(base).port}", f"127.0.0.1:{port}")
        more = {"HTTPLIB2_CA_CERTS": str(authority.file)}
        came = await run("google", "drive", base, key, tmp_path, allowed=allowed, environment=more)
    check_far_side(side, site, came)
    check_uploaded(side, came, f"http://{name}:{port}")  # the scheme and port of BROKER_PUBLIC_URL


@contextlib.asynccontextmanager
async def a_drive() -> AsyncIterator[tuple[FarSide, Vendor]]:
    token = "ya29." + os.urandom(24).hex()
    expires_at = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    credentials = {"type": "oauth2", "access_token": token, "expires_at": expires_at, "scopes": ["openid"]}
    async with far_side(drive.Drive, check=bearer(token), refusal=drive.REFUSAL) as side:
        yield side, Vendor("google", side.base, credentials, token)


def check_uploaded(side: FarSide, came: Came, base: str) -> None:
    """Check what the exercise returned and that its chunks came; the session's address begins with ``base``."""
    assert came.returned.pop("upload_uri").startswith(f"{base}/upload/drive/v3/files?")
    assert came.returned == {
        "chunks": 3,
        "listed": [["note 0", "note 1"], ["note 2", "large"]],
        "content_is_right": True,
    }
    chunks = [seen for seen in side.seen if seen.method == "PUT"]
    assert [len(seen.body) for seen in chunks] == [262_144, 262_144, 115_712]
    assert {seen.query["upload_id"] for seen in chunks} == {"session-1"}


# S3


@pytest.mark.parametrize("scheme", ["http", "https"])  # over TLS boto3 sends checksums in a trailer (aws-chunked)
@pytest.mark.parametrize("way", WAYS)
async def test_boto3_stores_fetches_and_lists_and_uploads_in_parts(
    way: str, scheme: str, site: Site, tmp_path: Path
) -> None:
    credentials = {
        "type": "aws",
        "access_key_id": AWS_KEY.access_key_id,
        "secret_access_key": AWS_KEY.secret_access_key,
        "session_token": AWS_KEY.session_token,
        "region": AWS_KEY.region,
    }
    real = f'"{AWS_KEY.secret_access_key}", aws_session_token="{AWS_KEY.session_token}"'
    async with contextlib.AsyncExitStack() as stack:
        side = await stack.enter_async_context(far_side(lambda _: s3.S3(), check=aws_check, refusal=s3.REFUSAL))
        vendor = Vendor("aws_s3", side.base, credentials, AWS_KEY.access_key_id)
        base, key = await reached(way, site, vendor)
        more: dict[str, str] = {}
        if scheme == "https":
            authority = Authority(tmp_path)
            inner = urlsplit(base)
            base = await stack.enter_async_context(over_tls(inner.port or 0, authority)) + inner.path
            more = {"AWS_CA_BUNDLE": str(authority.file)}
        ports = urlsplit(base).port
        instead = {'"unused"': real} if way == "straight" else {}  # the broker needs none of the caller
        allowed = (f"127.0.0.1:{ports}", f"::1:{ports}")
        came = await run("aws_s3", "s3", base, key, tmp_path, allowed=allowed, instead=instead, environment=more)
    check_far_side(side, site, came, hosts=(urlsplit(base).netloc,) if way == "straight" else ())
    check_stored(side, came)
    trailers = [seen.path for seen in side.seen if seen.one("x-amz-content-sha256") == sigv4.TRAILER]
    assert bool(trailers) is (scheme == "https")


def aws_check(seen: Seen) -> bool:
    """Check that the signature is right, recomputed with the connection's secret."""
    return sigv4.fault(seen, AWS_KEY) == ""


def check_stored(side: FarSide, came: Came) -> None:
    assert came.returned == {
        "small": "small",
        "metadata": {"crew": "two"},
        "by_hand": hashlib.sha256(b"p" * 5 * 1024 * 1024 + b"the rest").hexdigest(),
        "large_is_right": True,
        "pages": [["a folder/ü+ %41~(1)'!*;:@=&$,.txt", "by-hand.bin"], ["large.bin"]],
        "slice": "00010203",
    }
    parts = [(seen.path, seen.query["partNumber"]) for seen in side.seen if "partNumber" in seen.query]
    assert sorted(parts) == sorted((f"/rockets/{name}.bin", part) for name in ("by-hand", "large") for part in "12")


# The house rules of this folder


def test_the_sdks_lock_holds_hashes_and_names_no_host() -> None:
    lock = (SDKS / "requirements.lock").read_text()
    pinned = re.findall(r"^([a-z0-9-]+)==\S+ .*\\\n    --hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE)
    assert len(pinned) == len(re.findall(r"^[a-zA-Z]", lock, re.MULTILINE))
    wanted = re.findall(r"^[A-Za-z]\S+", (SDKS / "requirements.in").read_text(), re.MULTILINE)
    assert {name.lower() for name in wanted} <= set(pinned)
    assert "://" not in lock


@pytest.mark.parametrize("language", ["python", "js"])
async def test_an_sdk_that_calls_another_host_is_stopped_and_found(language: str, tmp_path: Path) -> None:
    other = f"127.0.0.1:{free_port()}"
    text = "const octokit = 1;" if language == "js" else "client = 1"
    environment = {"ELSEWHERE": f"http://{other}/"}
    came = await run_text(text, "elsewhere", "http://127.0.0.1:1", tmp_path, language, (), environment)
    assert (came.returned, set(came.elsewhere)) == ({"went_through": False}, {other})
