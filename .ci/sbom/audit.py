"""Asks a database of known holes about every line of the locks: `python .ci/sbom/audit.py <lock> …`.

`pip-audit` can end with "no known vulnerabilities" when it could ask about nothing. So what it answered is counted against the
lock, and a line that it says nothing of, or passed over, is a failure like a hole. It needs the internet, and is no part of CI.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PIP_AUDIT = ROOT / ".venv-sbom" / "bin" / "pip-audit"
PATIENCE_SECONDS = 600


def main(arguments: list[str]) -> int:
    """Audit each lock; status 1 for a hole, for a line that was not asked about, and when nobody answered."""
    problems = [f"{lock}: {problem}" for lock in arguments for problem in audited(Path(lock))]
    print("\n".join(problems) or f"every line of {', '.join(arguments)} was asked about, and no hole is known")
    return 1 if problems else 0


def audited(lock: Path) -> list[str]:
    """Return what is wrong with one lock, or with the audit of it."""
    command = [
        str(PIP_AUDIT),
        "--strict",
        "--disable-pip",
        "--require-hashes",
        "--progress-spinner",
        "off",
        "--format",
        "json",
    ]
    try:
        ended = subprocess.run(  # noqa: S603 - ours
            [*command, "--requirement", str(lock)],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        answer = json.loads(ended.stdout)
    except subprocess.TimeoutExpired:
        return ["the database of holes did not answer in time: nothing was audited"]
    except ValueError:
        why = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return [f"nothing was audited: {why[0][:300]}"]
    return judged(lines_of(lock.read_text(encoding="utf-8")), answer, ended.returncode)


def lines_of(lock: str) -> dict[str, str]:
    """Return the versions that a lock names, but of lines that are for other platforms or interpreters (pure)."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)( ;)?", lock, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version, conditional in found if not conditional}


def judged(wanted: Mapping[str, str], answer: Mapping[str, Any], status: int) -> list[str]:
    """Return the holes, and what was not asked about, in the answer of `pip-audit --format json` (pure)."""
    asked = {one["name"]: one for one in answer.get("dependencies", ()) if "skip_reason" not in one}
    holes = [
        f"{name} {one['version']} has {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'no version yet'}"
        for name, one in sorted(asked.items())
        for hole in one["vulns"]
    ]
    unasked = [f"{name} {version} was not audited" for name, version in sorted(wanted.items()) if name not in asked]
    unexplained = [] if status == 0 or holes or unasked else [f"pip-audit ended with status {status}"]
    return [*holes, *unasked, *unexplained, *([] if wanted else ["there is nothing in it"])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
