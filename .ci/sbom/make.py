"""Writes the SBOM (CycloneDX) and the licence list of what the runtime lock names: `python .ci/sbom/make.py <folder>`.

`cyclonedx-py` reads names, versions and hashes from the lock. Licences come from the metadata of the packages as they are
installed in the environment that runs this (it holds every line of the runtime lock that fits this platform); the document is
checked against the schema after they are in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ROOT / ".venv-sbom" / "bin"
LOCK = ROOT / "requirements.lock"
SPEC = "1.6"
ELSEWHERE = "not installed on this platform"
VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
problem = JsonStrictValidator(SchemaVersion.from_version(sys.argv[1])).validate_str(sys.stdin.read())
sys.exit(f"the document is not valid: {problem}" if problem is not None else 0)
"""


def main(arguments: list[str]) -> int:
    """Write `sbom.cdx.json` and `licences.txt` into a folder; status 1 for a package whose licence is not known."""
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    document = listed()
    lines = [(str(one["name"]), str(one["version"])) for one in document["components"]]
    licences = {(name, version): licence_of(name, version, lines) for name, version in lines}
    for one in document["components"]:
        add_licence(one, licences[one["name"], one["version"]])
    text = json.dumps(document, indent=2) + "\n"
    subprocess.run([TOOLS / "python", "-c", VALIDATE, SPEC], input=text, text=True, check=True)  # noqa: S603 - ours
    (folder / "sbom.cdx.json").write_text(text, encoding="utf-8")
    shown = [f"{name} {version}: {told or 'unknown'}" for (name, version), told in sorted(licences.items())]
    (folder / "licences.txt").write_text("\n".join(shown) + "\n", encoding="utf-8")
    unknown = [line for line in shown if line.endswith(": unknown")]
    print("\n".join([f"{len(shown)} components, in {folder}/sbom.cdx.json and {folder}/licences.txt", *unknown]))
    return 1 if unknown else 0


def listed() -> dict[str, Any]:
    """Return what `cyclonedx-py` makes of the lock, the same for the same lock."""
    options = [
        "--pyproject",
        str(ROOT / "pyproject.toml"),
        "--output-reproducible",
        "--spec-version",
        SPEC,
        "--short-PURLs",
    ]
    command = [str(TOOLS / "cyclonedx-py"), "requirements", *options, str(LOCK)]
    made = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - ours
    document: dict[str, Any] = json.loads(made.stdout)
    for one in document["components"]:  # which index the package came from is a matter of the machine
        one["externalReferences"] = [hashed(ref) for ref in one.get("externalReferences", ()) if ref.get("hashes")]
    return document


def hashed(reference: dict[str, Any]) -> dict[str, Any]:
    """Return a reference that says what the package's files hash to, and not where they lie."""
    return {"type": "distribution", "url": "requirements.lock", "hashes": reference["hashes"]}


def licence_of(name: str, version: str, lines: Sequence[tuple[str, str]]) -> str:
    """Return the licence by the installed package's metadata, as SPDX where it is (PEP 639); empty where it is not known.

    The lock may have a second line of the same name, for other interpreters. What is installed has to be one of them.
    """
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return ELSEWHERE
    if (name, found.version) not in lines:
        raise SystemExit(
            f"{name} is installed as {found.version}, which the lock does not name: make clean, then again"
        )
    if found.version != version:
        return ELSEWHERE
    said = found.metadata.json
    classifiers = [one.rpartition(" :: ")[2] for one in said.get("classifier", ()) if one.startswith("License ::")]
    written = str(said.get("license", "")).strip().partition("\n")[0]
    return str(said.get("license_expression", "")) or ", ".join(classifiers) or written[:80]


def add_licence(component: dict[str, Any], told: str) -> None:
    """Put the licence into a component of the document, by its name: what metadata calls it need not be SPDX."""
    if told and told != ELSEWHERE:
        component["licenses"] = [{"license": {"name": told}}]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
