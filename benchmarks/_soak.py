"""Half an hour of the steady mixed load: resident memory, open files, threads and table sizes have to stay flat.

`make soak-mixed`, or `_soak.py SECONDS`. Three web replicas and two workers on PostgreSQL and Vault as in `rolling.py`. Samples
are taken twenty times; after the first third, in which caches fill, nothing may grow: medians of the last third against those
of the second. Tables of history (the audit, events, their ids, deliveries) grow by design until their retention; all others may
not. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from _mixed import Mixed, directories, open_mixed, say, shown
from _servers import Server, postgres_server
from sqlmodel import Session, SQLModel

from broker.telemetry import configure_logging
from tests.crash.campaign import Process
from tests.real.vault import VaultServer, running_vault

SECONDS, SAMPLES = 1800.0, 20
MOST_MEMORY_GROWTH, MOST_MORE_FILES, MOST_MORE_ROWS = 1.05, 8, 50
HISTORY = {"audit_records", "audit_checkpoints", "webhook_events", "webhook_deliveries", "webhook_seen"}


@dataclass(frozen=True)
class Sample:
    """What was found at one moment. By process, and by table."""

    at_seconds: float
    memory_bytes: Sequence[int]
    files: Sequence[int]
    threads: Sequence[int]
    rows: dict[str, int]


async def sample(mixed: Mixed, at_seconds: float) -> Sample:
    """Look."""
    return Sample(
        at_seconds,
        [Server(0, one.pid).memory_bytes() for one in mixed.processes],
        [_count(one, "fd") for one in mixed.processes],
        [_count(one, "task") for one in mixed.processes],
        await mixed.site.parts.database.read(_rows),
    )


def _count(process: Process, what: str) -> int:
    return len(list(Path(f"/proc/{process.pid}/{what}").iterdir()))


def _rows(session: Session) -> dict[str, int]:
    count = sa.func.count
    tables = SQLModel.metadata.tables.values()
    return {one.name: int(session.execute(sa.select(count()).select_from(one)).scalar_one()) for one in tables}


def show(one: Sample) -> None:
    """Print a line."""
    mib = " ".join(f"{each / 2**20:4.0f}" for each in one.memory_bytes)
    files = " ".join(f"{each:3d}" for each in one.files)
    threads = " ".join(map(str, one.threads))
    say(f"{one.at_seconds:5.0f} s  MiB {mib}  files {files}  threads {threads}  rows {sum(one.rows.values()):,}")


def grown(samples: Sequence[Sample]) -> tuple[dict[str, float], list[str]]:
    """Return the figures, and what is not flat: the last third against the second one."""
    third = len(samples) // 3
    second, last = samples[third : 2 * third], samples[2 * third :]

    def median(part: Sequence[Sample], name: str, number: int) -> float:
        return float(statistics.median(getattr(one, name)[number] for one in part))

    processes = range(len(samples[0].memory_bytes))
    memory = max(median(last, "memory_bytes", one) / median(second, "memory_bytes", one) for one in processes)
    files = max(median(last, "files", one) - median(second, "files", one) for one in processes)
    threads = max(median(last, "threads", one) - median(second, "threads", one) for one in processes)
    rows = {name: last[-1].rows[name] - second[0].rows[name] for name in last[-1].rows if name not in HISTORY}
    most = max(rows, key=lambda name: rows[name])
    say(
        f"the table without history that grew most: {most}, by {rows[most]} rows; history: {_of_history(second[0], last[-1])}"
    )
    figures = {"memory": round(memory, 3), "files": files, "threads": threads, "rows": rows[most]}
    wrong = [f"memory grew by {memory:.3f}"] if memory > MOST_MEMORY_GROWTH else []
    wrong += [f"{files} more files"] if files > MOST_MORE_FILES else []
    wrong += [f"{threads} more threads"] if threads > MOST_MORE_FILES else []
    return figures, wrong + ([f"{most} grew by {rows[most]} rows"] if rows[most] > MOST_MORE_ROWS else [])


def _of_history(before: Sample, after: Sample) -> str:
    return str(shown({name: after.rows[name] - before.rows[name] for name in sorted(HISTORY & after.rows.keys())}))


async def run(place: Path, database_url: str, vault: VaultServer, seconds: float) -> list[str]:
    """Run everything; return what is wrong."""
    async with open_mixed(place, database_url, vault) as mixed:
        configure_logging(
            mixed.site.settings.model_copy(update={"env": "production"}), stream=(place / "own.log").open("w")
        )
        samples, began = [], time.monotonic()
        async with mixed.load.running():
            for number in range(1, SAMPLES + 1):
                await asyncio.sleep(max(0.0, began + number * seconds / SAMPLES - time.monotonic()))
                samples.append(await sample(mixed, time.monotonic() - began))
                show(samples[-1])
        figures, wrong = grown(samples)
        missing, failed = await mixed.all_delivered(60), mixed.load.wrong_in("warm")
        answers = sum(mixed.load.answers.values())
        say(
            f"{answers:,} answers; not as wished: {shown(failed)}; {len(mixed.load.acknowledged):,} events, lost {len(missing)}"
        )
        more = {"answers": answers, "failed": sum(failed.values()), "events_lost": len(missing)}
        say(json.dumps({"benchmark": "soak", "seconds": seconds, "counts": {**figures, **more}}))
        return wrong + [f"{name}: {more[name]}" for name in ("failed", "events_lost") if more[name]]


def main() -> None:
    """Run for as many seconds as the first argument says; exit with what is wrong."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    with tempfile.TemporaryDirectory(prefix="broker-soak-") as folder, postgres_server() as postgres:
        place = Path(folder)
        with running_vault(directories(place)) as vault:
            wrong = asyncio.run(run(place, postgres.database("soak"), vault, seconds))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
