"""Several real processes write one audit chain at once, and one of them is killed: nothing that was acknowledged is missing.

The normal run takes a few seconds a database. ``TEST_LONG=1`` makes the writers work for a full minute.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import Session

from broker.audit import Audit, Entry, Verification, open_audit
from broker.database import Database, opened
from broker.models import AuditRecord
from broker.settings import Secret, Settings
from broker.vault.keyring import load_keyring, open_sealer

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0 if os.environ.get("TEST_LONG") == "1" else 3.0
SEED = 20_260
RECORDS: sa.Table = AuditRecord.__table__  # type: ignore[attr-defined]


def the_settings(place: Path) -> Settings:
    keyring = Secret("k1:" + base64.b64encode(bytes(32)).decode())
    return Settings(env="development", keyring=keyring, audit_checkpoints=(f"file:{place}",))


async def the_audit(database: Database, place: Path) -> Audit:
    """Start as the service does: processes race for the first data key, the root key and the head."""
    settings = the_settings(place)
    return await open_audit(database, await open_sealer(database, load_keyring(settings)), settings)


# --- a writing process -----------------------------------------------------------------------------------------------------


async def keep_writing(url: str, place: str, name: str, seconds: float) -> None:
    """Write in every way there is; tell each entry (its ``n``) on standard output once it is acknowledged."""
    chance = random.Random(f"{SEED} {name}")  # noqa: S311 - repeatable, not secret
    loop = asyncio.get_running_loop()
    end, count = loop.time() + seconds, 0
    async with opened(url, migrate=False) as database:
        audit = await the_audit(database, Path(place))
        while loop.time() < end:
            batch = list(range(count, count := count + chance.randint(1, 20)))
            write = chance.choice([record_all, append_all])
            await write(audit, database, [Entry("test.wrote", name, detail={"n": number}) for number in batch])
            sys.stdout.write("".join(f"{number}\n" for number in batch))
            sys.stdout.flush()
            await audit.checkpoint(force=chance.random() < 0.05)
        await audit.aclose()


async def record_all(audit: Audit, _database: Database, entries: Sequence[Entry]) -> None:
    await asyncio.gather(*map(audit.record, entries))


async def append_all(audit: Audit, database: Database, entries: Sequence[Entry]) -> None:
    await database.transaction(lambda session: audit.append(session, *entries))


async def run_writer(url: str, place: Path, name: str, *, kill_after_seconds: float | None = None) -> set[int]:
    """Run a writer in a process of its own; return what it said was acknowledged."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, url, str(place), name, str(SECONDS)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment, cwd=ROOT)
    reading = asyncio.create_task(process.communicate())
    if kill_after_seconds is not None:
        await asyncio.sleep(kill_after_seconds)
        process.kill()
    output, _ = await reading
    assert process.returncode == (0 if kill_after_seconds is None else -signal.SIGKILL)
    return {int(line) for line in output.decode().splitlines(keepends=True) if line.endswith("\n")}


# --- the tests --------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
async def test_processes_that_write_at_once_leave_one_whole_chain_and_every_attack_on_it_is_named(
    database_url: str, tmp_path: Path
) -> None:
    place = tmp_path / "checkpoints"
    one, two, killed = await asyncio.gather(
        run_writer(database_url, place, "one"),
        run_writer(database_url, place, "two"),
        run_writer(database_url, place, "killed", kill_after_seconds=SECONDS * 0.75),
    )
    async with opened(database_url, migrate=False) as database:
        audit = await the_audit(database, place)
        written = await database.read(written_by)
        assert (written["one"], written["two"]) == (sorted(one), sorted(two)), "each once, and nothing else"
        assert killed <= set(written.get("killed", [])), "what was acknowledged is there, kill or no kill"
        assert len(one) > 100
        assert len(two) > 100
        found = await audit.verify()
        assert found.ok
        assert found.count == sum(map(len, written.values()))
        assert found.checked_checkpoints > 2
        for attack in (edit, remove, swap, cut):
            await check_attack(audit, database, attack, found)


def written_by(session: Session) -> dict[str, list[int]]:
    """Return, for each writer, the sorted ``n`` of its records."""
    written: dict[str, list[int]] = {}
    for actor, detail in session.connection().execute(sa.select(RECORDS.c.actor, RECORDS.c.detail)):
        written.setdefault(actor, []).append(detail["n"])
    return {actor: sorted(numbers) for actor, numbers in written.items()}


Attack = Callable[[Session, int, int], tuple[str, int]]


def edit(session: Session, number: int, _last: int) -> tuple[str, int]:
    execute(session, sa.update(RECORDS).where(RECORDS.c.number == number).values(actor="nobody"))
    return "edited", number


def remove(session: Session, number: int, last: int) -> tuple[str, int]:
    """Remove one and close the gap."""
    execute(session, sa.delete(RECORDS).where(RECORDS.c.number == number))
    execute(session, sa.update(RECORDS).where(RECORDS.c.number > number).values(number=RECORDS.c.number + last))
    execute(session, sa.update(RECORDS).where(RECORDS.c.number > last).values(number=RECORDS.c.number - last - 1))
    return "removed", number


def swap(session: Session, number: int, last: int) -> tuple[str, int]:
    for old, new in ((number, 0), (last, number), (0, last)):
        execute(session, sa.update(RECORDS).where(RECORDS.c.number == old).values(number=new))
    return "reordered", number


def cut(session: Session, number: int, _last: int) -> tuple[str, int]:
    execute(session, sa.delete(RECORDS).where(RECORDS.c.number >= number))
    return "cut_tail", number


def execute(session: Session, statement: sa.Executable) -> None:
    session.connection().execute(statement)


async def check_attack(audit: Audit, database: Database, attack: Attack, before: Verification) -> None:
    """Do it at a random record, see it named, and put everything back."""
    number = random.Random(f"{SEED} {attack.__name__}").randrange(1, before.count)  # noqa: S311 - repeatable, not secret
    kept = await database.read(lambda session: list(session.connection().execute(sa.select(RECORDS)).mappings()))
    named = await database.transaction(lambda session: attack(session, number, before.count))
    found = await audit.verify()
    assert (found.problem, found.first_broken, found.count) == (*named, number - 1)
    await database.transaction(lambda session: put_back(session, [dict(row) for row in kept]))
    assert await audit.verify() == before


def put_back(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    execute(session, sa.delete(RECORDS))
    session.connection().execute(sa.insert(RECORDS), rows)


if __name__ == "__main__":
    asyncio.run(keep_writing(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))
