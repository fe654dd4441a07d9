"""The docs name what there is: every error code, setting and provider, and nothing that does not exist.

Each check is: what the code has == what a page has. To cover another kind of thing (routes, commands), add one line to
``PAGES`` with the page, the pattern of its headings or rows, and the function that lists what the code has.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from broker.errors import FLOW_CODES, BrokerError, FlowError, all_codes
from broker.settings import Settings
from providers import load_catalog

ROOT = Path(__file__).resolve().parent.parent
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NOT_SET_BY_NAME = {"provider_credentials"}


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


# Still to come: routes (docs/api.md against the app's routes) and commands (docs/cli.md against the command tree).
PAGES = {
    "error codes": Page("docs/errors.md", r"^## (\S+)$", lambda: set(all_codes())),
    "settings": Page("docs/settings.md", r"^### (BROKER_\S+)$", _settings),
    "client credentials": Page("docs/settings.md", r"`([A-Z]+_CLIENT_(?:ID|SECRET))`", _client_credentials),
    "providers": Page("docs/providers.md", r"^## (\S+)$", lambda: set(load_catalog())),
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


def _sections(path: str) -> dict[str, str]:
    parts = re.split(r"^## (\S+)$", (ROOT / path).read_text("utf-8"), flags=re.MULTILINE)
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
    commands = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)", fenced, re.MULTILINE)
    assert set(commands) <= _make_targets()


def test_the_readme_names_the_two_commands_that_ci_takes_from_it() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    (block, *_) = re.findall(r"^```sh\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^make ([a-z-]+)", block, re.MULTILINE) == ["demo", "test"]


def _layers() -> list[set[str]]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = document["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one.get("containers") == ["broker"]]
    return [set(re.findall(r"\w+", layer)) for layer in layers]


def test_the_picture_of_the_layers_is_the_one_that_is_checked() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (picture,) = re.findall(r"^```\n( +__main__\n.*?)^ +─", text, re.MULTILINE | re.DOTALL)
    assert [set(re.findall(r"\w+", line)) for line in picture.splitlines()] == _layers()
