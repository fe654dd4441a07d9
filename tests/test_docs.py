"""The docs name what there is: every error code, setting and provider, and nothing that does not exist.

Each check is: what the code has == what a page has. To cover another kind of thing, add one line to ``PAGES`` with the
page, the pattern of its headings or rows, and the function that lists what the code has.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer
from litestar import Router

import broker.oauth.routes
import broker.web.console.routes
import broker.web.routes
from broker.app import create_app, open_parts
from broker.cli import main
from broker.errors import FLOW_CODES, BrokerError, FlowError, all_codes
from broker.settings import Settings, load_settings
from providers import load_catalog

ROOT = Path(__file__).resolve().parent.parent
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NOT_SET_BY_NAME = {"provider_credentials", "vault_variables"}


@dataclass(frozen=True)
class Page:
    """A page that has to name everything of one kind: ``pattern`` finds the names, ``existing`` lists the things."""

    path: str
    pattern: str
    existing: Callable[[], set[str]]


def _settings() -> set[str]:
    return {f"BROKER_{name.upper()}" for name in Settings.model_fields if name not in NOT_SET_BY_NAME}


def _client_credentials() -> set[str]:
    prefixes = {provider.env_prefix for provider in load_catalog().values()} - {None}
    return {f"{prefix}_{part}" for prefix in prefixes for part in ("CLIENT_ID", "CLIENT_SECRET")}


def _make_targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*?[^\\])$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return set(phony.replace("\\\n", " ").split())


SCHEMA = "/schema/openapi.json"


@functools.cache
def _served_document() -> dict[str, Any]:
    """Return the OpenAPI document as a broker with all groups of routes serves it."""

    async def fetch(place: Path) -> dict[str, Any]:
        settings = load_settings({}, directory=place, env="development", data_dir=place)
        async with open_parts(settings) as parts:
            transport = httpx2.ASGITransport(app=create_app(parts))  # type: ignore[arg-type] # an ASGI application
            async with httpx2.AsyncClient(transport=transport, base_url="http://broker") as http:
                return dict((await http.get(SCHEMA)).raise_for_status().json())

    with tempfile.TemporaryDirectory() as place:
        return asyncio.run(fetch(Path(place)))


def _browser_routes() -> set[str]:
    """Return what the browser's routers serve, also what the document leaves out. HEAD and OPTIONS go without saying."""
    browser = (broker.oauth.routes, broker.web.routes, broker.web.console.routes)
    routers: list[Router] = [one.routes() for one in browser]
    return {
        f"{method} {re.sub(r':[a-z]+}', '}', path)}"
        for router in routers
        for path, handlers in router.route_handler_method_map.items()
        for method in {*handlers} - {"HEAD", "OPTIONS"}
    }


def _routes() -> set[str]:
    paths = _served_document()["paths"].items()
    served = {f"{method.upper()} {path}" for path, methods in paths for method in methods if method != "head"}
    return served | _browser_routes() | {f"GET {SCHEMA}"}


def _parameters() -> set[str]:
    paths = _served_document()["paths"].values()
    operations = [operation for methods in paths for operation in methods.values()]
    return {one["name"] for operation in operations for one in operation.get("parameters", ()) if one["in"] == "query"}


def _leaves(command: Any, *names: str) -> Iterator[tuple[str, Any]]:
    for name, child in getattr(command, "commands", {}).items():
        yield from _leaves(child, *names, name)
    if names and getattr(command, "invoke_without_command", True):  # a group that does something by itself, or no group
        yield " ".join(["broker", *names]), command


def _command_tree() -> dict[str, Any]:
    return dict(_leaves(typer.main.get_command(main)))


def _options(command: Any) -> set[str]:
    return {
        " ".join([one.opts[0], *([one.metavar] if one.metavar else [])])
        if one.opts[0].startswith("--")
        else str(one.metavar)
        for one in command.params
    }


def _metrics() -> set[str]:
    """Return what `/metrics` may show, whether or not it has a value yet."""

    async def collect(place: Path) -> set[str]:
        settings = load_settings({}, directory=place, env="development", data_dir=place)
        async with open_parts(settings) as parts:
            return {
                f"{one.name}_total" if one.type == "counter" else one.name for one in parts.metrics.registry.collect()
            }

    with tempfile.TemporaryDirectory() as place:
        return {name for name in asyncio.run(collect(Path(place))) if name.startswith("broker_")}


PAGES = {
    "error codes": Page("docs/errors.md", r"^## (\S+)$", lambda: set(all_codes())),
    "settings": Page("docs/settings.md", r"^### (BROKER_\S+)$", _settings),
    "client credentials": Page("docs/settings.md", r"`([A-Z][A-Z0-9_]*_CLIENT_(?:ID|SECRET))`", _client_credentials),
    "providers": Page("docs/providers.md", r"^## (\S+)$", lambda: set(load_catalog())),
    "routes": Page("docs/api.md", r"^\| `([A-Z]+ /\S*)` \|", _routes),
    "metrics": Page("docs/observability.md", r"^\| `(broker_\w+)` \|", _metrics),
    "commands": Page("docs/cli.md", r"^## (broker .+)$", lambda: set(_command_tree())),
}


def named(pattern: str, text: str) -> set[str]:
    """Return the names that a page's text has by this pattern."""
    return set(re.findall(pattern, text, re.MULTILINE))


@pytest.mark.parametrize("kind", PAGES)
def test_everything_that_exists_is_documented(kind: str) -> None:
    page = PAGES[kind]
    assert page.existing() - named(page.pattern, (ROOT / page.path).read_text("utf-8")) == set()


@pytest.mark.parametrize("kind", PAGES)
def test_nothing_is_documented_that_does_not_exist(kind: str) -> None:
    page = PAGES[kind]
    assert named(page.pattern, (ROOT / page.path).read_text("utf-8")) - page.existing() == set()


@pytest.mark.parametrize("kind", PAGES)
def test_an_emptied_page_would_be_noticed(kind: str) -> None:
    assert PAGES[kind].existing() - named(PAGES[kind].pattern, "# Nothing here\n")


@pytest.mark.parametrize("name", _command_tree())
def test_a_command_is_documented_with_its_options_and_no_others(name: str) -> None:
    text = re.split(r"^# ", _sections("docs/cli.md")[name], flags=re.MULTILINE)[0]
    assert named(r"^\| `([^`]+)` \|", text) == _options(_command_tree()[name])


def test_every_query_parameter_is_named_in_the_page_of_the_api() -> None:
    rows = "".join(re.findall(r"^\| `[A-Z]+ /.*$", (ROOT / "docs/api.md").read_text("utf-8"), re.MULTILINE))
    assert {name for name in _parameters() if not re.search(rf"`\??{name}\b", rows)} == set()


def test_the_api_page_names_every_field_of_a_body() -> None:
    page = (ROOT / "docs/api.md").read_text("utf-8")
    shapes = _served_document()["components"]["schemas"].items()
    fields = {field for shape, schema in shapes if shape.endswith("Body") for field in schema.get("properties", ())}
    assert {field for field in fields if not re.search(rf"`{field}\b", page)} == set()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_python_example_is_python(path: Path) -> None:
    for example in re.findall(r"^```python\n(.*?)^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        assert ast.parse(example).body


def _sections(path: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", (ROOT / path).read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _statuses() -> dict[str, int]:
    found: dict[str, int] = {}
    waiting: list[type[BrokerError]] = [BrokerError]
    while waiting:
        kind = waiting.pop()
        waiting.extend(kind.__subclasses__())
        if kind is not FlowError:
            found[kind.code] = kind.status
    return found


def test_every_error_section_gives_the_status_that_is_sent() -> None:
    sections = _sections("docs/errors.md")
    documented = {code: re.match(r"\s*Status (\d{3})\b", sections[code]) for code in _statuses()}
    assert {code: int(match[1]) if match else None for code, match in documented.items()} == _statuses()


def test_no_flow_code_without_a_status_of_its_own_claims_one() -> None:
    only_flow = set(FLOW_CODES) - set(_statuses())
    sections = _sections("docs/errors.md")
    assert [code for code in only_flow if re.match(r"\s*Status \d", sections[code])] == []


def test_every_error_section_says_what_to_do() -> None:
    assert [code for code, text in _sections("docs/errors.md").items() if "*What to do:*" not in text] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_files_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_make_command_in_the_docs_is_a_target(path: Path) -> None:
    text = path.read_text("utf-8")
    fenced = "\n".join(re.findall(r"^```.*?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    commands = re.findall(r"`make ([a-z0-9-]+)", text) + re.findall(r"^make ([a-z0-9-]+)", fenced, re.MULTILINE)
    assert set(commands) <= _make_targets()


def test_the_readme_names_the_two_commands_that_ci_takes_from_it() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    (block, *_) = re.findall(r"^```sh\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^make ([a-z-]+)", block, re.MULTILINE) == ["demo", "test"]


# Shell commands: who runs them. An ```sh block is walked through whole; in a ```console block each command stands by itself.

WALKED = {  # page -> the file that runs all its ```sh blocks
    "README.md": ".ci/fresh_check.py",
    "docs/backup-and-restore.md": "tests/test_operating_guides.py",
    "docs/callers.md": "tests/test_single_commands.py",
    "docs/console.md": "tests/test_single_commands.py",
    "docs/deploy-docker.md": "tests/real/test_image.py",
    "docs/deploy-kubernetes.md": "tests/kubernetes/test_guide.py",
    "docs/disasters.md": "tests/test_operating_guides.py",
    "docs/quickstart.md": "tests/test_quickstart.py",
    "docs/runbooks.md": "tests/kubernetes/test_guide.py",
    "docs/vault.md": "tests/real/test_vault_guide.py",
    "docs/webhooks.md": "tests/test_webhooks_guide.py",
}
SINGLE = {  # how a command begins -> the file that runs it, and what in that file shows it
    "make demo": (".ci/fresh_check.py", "make demo"),
    "sh compose/make-secrets.sh": ("tests/real/test_compose.py", "deploy-docker.md"),
    "curl --fail http://127.0.0.1:8000/health/ready": ("tests/real/test_compose.py", "deploy-docker.md"),
    "docker compose exec": ("tests/real/test_compose.py", "deploy-docker.md"),
    "broker webhooks listen": ("tests/broker/cli/test_webhooks_commands.py", "webhooks.md"),
    "python -c 'import base64, secrets;": ("tests/test_single_commands.py", "quickstart.md"),
    "chmod 600 keyring": ("tests/test_single_commands.py", "quickstart.md"),
    "export BROKER_KEYRING_FILE": ("tests/test_single_commands.py", "quickstart.md"),
}
NOT_RUN = {  # how a command begins -> why nothing runs it
    "docker compose up": "needs Docker's engine and upstream images; test_compose.py brings up the same model without them",
    "cd credential-broker": "goes to the reader's own copy of this tree",
    'export PATH="$PWD/.venv/bin:$PATH"': "the walk of the page has `broker` on its path already",
    "export GITHUB_CLIENT_ID": "needs an OAuth app at GitHub",
    "broker serve": "with that app; without it the walk of the page runs it",
    "broker integrations test github": "asks GitHub about that app",
    "CAME_BACK=": "is what a person's browser shows after GitHub's page",
}
PROGRAMS = r"(?:\$ |(?:broker|curl|docker|git|helm|kubectl|make|pip|psql|python3?|sh|vault) )"


def _fences(path: Path) -> list[tuple[str, str]]:
    """Return a page's fenced blocks, each with its language, however far it is indented."""
    found = re.findall(r"^ *```([^`\n]*)\n(.*?)^ *```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, re.sub(r"^ +(?=\$ )", "", text, flags=re.MULTILINE)) for language, text in found]


def test_every_page_with_shell_blocks_is_walked_through_by_a_test() -> None:
    with_blocks = {path for path in DOCS if any(language == "sh" for language, _ in _fences(path))}
    assert {path.relative_to(ROOT).as_posix() for path in with_blocks} == set(WALKED)
    for page, runner in WALKED.items():
        code = (ROOT / runner).read_text("utf-8")
        assert re.search(rf"\b{re.escape(Path(page).stem)}\b", code), f"{runner} does not name {page}"
        assert re.search(r"\b(walk|readme_commands)\b", code), f"{runner} runs no blocks"
        assert "```sh" in code, f"{runner} does not take the blocks from the page"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_shell_command_stands_only_where_a_test_finds_it(path: Path) -> None:
    indented = re.findall(r"^ +```sh$", path.read_text("utf-8"), re.MULTILINE)
    elsewhere = [text for language, text in _fences(path) if language not in {"sh", "console", "python"}]
    assert indented == []
    assert [line for text in elsewhere for line in text.splitlines() if re.match(PROGRAMS, line)] == []


def test_every_single_command_is_run_or_has_a_reason_why_not() -> None:
    texts = [text for path in DOCS for language, text in _fences(path) if language == "console"]
    commands = [line[2:] for text in texts for line in text.splitlines() if line.startswith("$ ")]
    known = {**SINGLE, **NOT_RUN}
    assert [one for one in commands if not one.startswith(tuple(known))] == []
    assert [one for one in known if not any(command.startswith(one) for command in commands)] == []
    for runner, mark in SINGLE.values():
        assert mark in (ROOT / runner).read_text("utf-8"), f"{runner} does not run what stands with {mark}"


def _layers() -> list[set[str]]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = document["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one.get("containers") == ["broker"]]
    return [set(re.findall(r"\w+", layer)) for layer in layers]


def test_the_picture_of_the_layers_is_the_one_that_is_checked() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (picture,) = re.findall(r"^```\n( +__main__\n.*?)^ +─", text, re.MULTILINE | re.DOTALL)
    assert [set(re.findall(r"\w+", line)) for line in picture.splitlines()] == _layers()
