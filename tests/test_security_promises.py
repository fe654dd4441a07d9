"""Every promise of SECURITY.md names the tests that prove it, and these tests exist."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.commands import ROOT

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
BESIDES = {
    "a refresh token is used by one process at a time",
    "a crash loses nothing",
    "If an audit record cannot be written, nothing is handed out",
}


def promises(page: str) -> set[str]:
    """Return what the table says that somebody is kept from."""
    section = page.partition("## What is protected, and how")[2].partition("### The tests")[0]
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|[^|]*\|$", section, re.MULTILINE)
    return {row.strip() for row in rows} - {"is kept from what", "---"}


def proofs(page: str) -> dict[str, list[tuple[str, str]]]:
    """Return, by promise, (file, test) of each test that is named for it."""
    section = page.partition("### The tests that prove it")[2].partition("\n## ")[0]
    items = re.findall(r"^- \*\*(.+?)\*\*:(.*?)(?=^- |\Z)", section, re.MULTILINE | re.DOTALL)
    return {promise.replace("\n  ", " "): NAMED.findall(text) for promise, text in items}


@cache
def functions_of(path: str) -> set[str]:
    """Return the names of a file's test functions."""
    file = ROOT / path
    if not file.is_file():
        return set()
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def missing(page: str) -> list[str]:
    """Return the tests that a page names and that are not there."""
    return [f"{path}::{name}" for path, name in NAMED.findall(page) if name not in functions_of(path)]


def test_every_promise_names_a_test_and_every_proof_is_one_of_a_promise() -> None:
    assert len(promises(PAGE)) >= 11
    assert promises(PAGE) | BESIDES == proofs(PAGE).keys()
    assert [promise for promise, tests in proofs(PAGE).items() if not tests] == []


def test_the_promises_beside_the_table_stand_in_the_page() -> None:
    text = " ".join(PAGE.partition("### The tests")[0].split())
    assert [promise for promise in BESIDES if promise not in text] == []


def test_every_test_that_the_page_names_exists() -> None:
    assert len(NAMED.findall(PAGE)) >= 25
    assert missing(PAGE) == []


@pytest.mark.parametrize("name", ["tests/test_rules.py::test_no_such_test", "tests/no_such_file.py::test_x"])
def test_a_test_that_is_gone_would_be_noticed(name: str) -> None:
    assert missing(f"see `{name}`") == [name]
