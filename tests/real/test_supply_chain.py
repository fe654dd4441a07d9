"""What the broker is made of is listed to the last line of the lock; an audit that could ask about nothing says so."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.commands import ROOT, environment, free_port

pytestmark = pytest.mark.real
LOCK = ROOT / "requirements.lock"
PINS = set(re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", LOCK.read_text("utf-8"), re.MULTILINE))


def script(name: str) -> ModuleType:
    """Load one of the scripts beside the tree, for its pure parts."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / "sbom" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str, place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    if not (ROOT / ".venv-sbom" / ".ready").exists():
        pytest.fail("the tools are not there: run `make test-real`", pytrace=False)
    command = [sys.executable, str(ROOT / ".ci" / "sbom" / f"{name}.py"), *arguments]
    given = environment(place, **variables)
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=120)  # noqa: S603 - ours


def test_the_sbom_has_every_line_of_the_lock_with_its_hashes_and_each_licence_is_known(tmp_path: Path) -> None:
    done = run("make", str(tmp_path), place=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads((tmp_path / "sbom.cdx.json").read_text("utf-8"))
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert {(one["name"], one["version"]) for one in document["components"]} == PINS
    for one in document["components"]:
        assert [ref["hashes"][0]["alg"] for ref in one["externalReferences"] if ref["hashes"]], one["name"]
    licences = dict(line.split(": ", 1) for line in (tmp_path / "licences.txt").read_text("utf-8").splitlines())
    assert licences.keys() == {f"{name} {version}" for name, version in PINS}
    assert [name for name, told in licences.items() if told == "unknown"] == []
    again = tmp_path / "again"
    assert run("make", str(again), place=tmp_path).returncode == 0
    assert (again / "sbom.cdx.json").read_text("utf-8") == (tmp_path / "sbom.cdx.json").read_text("utf-8")


def test_an_audit_that_reaches_nobody_fails_and_says_that_nothing_was_audited(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    done = run("audit", str(LOCK), place=tmp_path, HTTPS_PROXY=nobody, HTTP_PROXY=nobody, ALL_PROXY=nobody)
    assert done.returncode == 1
    assert "nothing was audited" in done.stdout


LINES = "one==1.0 \\\n    --hash=sha256:00\nTwo_b==2.0 \\\n    --hash=sha256:00\nwin==3 ; sys_platform == 'win32' \\\n"


@pytest.mark.parametrize(
    ("answered", "status", "problems"),
    [
        ({"one": [], "two-b": []}, 0, []),
        ({"one": []}, 0, ["two-b 2.0 was not audited"]),
        ({}, 0, ["one 1.0 was not audited", "two-b 2.0 was not audited"]),
        ({"one": ["CVE-1"], "two-b": []}, 1, ["one 1.0 has CVE-1, mended in 1.1"]),
        ({"one": [], "two-b": []}, 1, ["pip-audit ended with status 1"]),
    ],
)
def test_what_was_not_asked_about_is_a_failure_like_a_hole(answered: Any, status: int, problems: list[str]) -> None:
    audit = script("audit")
    wanted = audit.lines_of(LINES)
    assert wanted == {"one": "1.0", "two-b": "2.0"}
    told = [
        {"name": name, "version": wanted[name], "vulns": [{"id": hole, "fix_versions": ["1.1"]} for hole in holes]}
        for name, holes in answered.items()
    ]
    assert audit.judged(wanted, {"dependencies": told}, status) == problems


def test_what_pip_audit_skipped_was_not_audited_and_an_empty_lock_is_no_success() -> None:
    audit = script("audit")
    skipped = {"dependencies": [{"name": "one", "skip_reason": "not found"}]}
    assert audit.judged({"one": "1.0"}, skipped, 0) == ["one 1.0 was not audited"]
    assert audit.judged({}, {"dependencies": []}, 0) == ["there is nothing in it"]
