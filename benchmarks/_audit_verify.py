"""How long `audit verify` takes, and how much memory: `python benchmarks/_audit_verify.py [records]`, else 1,000,000.

Run by hand, on a machine with nothing else to do. Last line: JSON with seconds, time of the core and growth of memory.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from broker.audit import Audit, Entry
from broker.database import opened

AT_ONCE = 1_000


def entries(audit: Audit) -> list[Entry]:
    """Return what hand-outs of a day look like, a thousand of them."""
    detail = {"token": audit.digest("a token"), "expires_at": 1_790_000_000.5, "reason": "nightly sync"}
    ids = {"connection_id": "con_" + "b" * 26, "integration": "github"}
    return [
        Entry("connection.token", "clr_" + "a" * 26, subject=f"acme:{number}", detail=detail, **ids)
        for number in range(AT_ONCE)
    ]


async def measure(count: int, folder: Path) -> dict[str, float]:
    """Write so many records, and verify them."""
    async with opened(f"sqlite:///{folder / 'audit.db'}") as database:
        audit = Audit(database, bytes(32), sinks=["database"], checkpoints=[])
        group = entries(audit)
        for _ in range(count // AT_ONCE):
            await database.transaction(lambda session: audit.append(session, *group))
            await audit.checkpoint()
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, cpu_began = time.perf_counter(), time.process_time()
        found = await audit.verify()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
        await audit.aclose()
    if not found.ok or found.count != count:
        raise SystemExit(f"the chain does not verify: {found}")
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "us_of_the_core_each": cpu_seconds / count * 1e6}
    return {"records": count, "grown_mib": grown_kib // 1024} | {name: round(one, 1) for name, one in figures.items()}


def main() -> None:
    """Print the figures."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(json.dumps({"benchmark": "audit_verify", **asyncio.run(measure(count, Path(folder)))}) + "\n")


if __name__ == "__main__":
    main()
