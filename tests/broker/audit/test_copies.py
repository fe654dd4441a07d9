"""Sinks besides the database: one that hangs costs a deadline once, and in the end no copy lacks a record."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from broker.audit import Audit, Verification
from broker.audit.sinks import DEADLINE_SECONDS
from broker.database import Database
from broker.errors import AuditUnavailable
from tests.broker.test_audit import CHECKPOINTS, an_audit, entry, execute, lines_of, rows_of, until_healed, write


class FullPipe:
    """A standard output that nobody reads: whoever writes to it waits until ``drain``."""

    def __init__(self) -> None:
        self.reading, writing = os.pipe()
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writing, b"\n" * 4096):
                pass
        os.set_blocking(writing, True)
        self.stream = os.fdopen(writing, "w")
        self.text = b""
        self._thread = threading.Thread(target=self._read, daemon=True)

    def drain(self) -> None:
        self._thread.start()

    def _read(self) -> None:
        while part := os.read(self.reading, 65_536):
            self.text += part

    def close(self) -> list[int]:
        """Return the numbers of the records that came through."""
        self.stream.close()
        self._thread.join()
        os.close(self.reading)
        return [line.get("number", 0) for line in map(json.loads, self.text.split())]


@contextlib.contextmanager
def full_pipe() -> Iterator[FullPipe]:
    full = FullPipe()
    with contextlib.redirect_stdout(full.stream), structlog.testing.capture_logs():
        yield full


async def test_a_sink_that_hangs_costs_one_deadline_and_gets_everything_later(
    database: Database, tmp_path: Path
) -> None:
    with full_pipe() as pipe:
        path = tmp_path / "audit.jsonl"
        audit = an_audit(database, sinks=["database", "stdout", f"file:{path}"])
        began = time.monotonic()
        await asyncio.gather(*(audit.record(entry(number)) for number in range(5)))
        first_seconds = time.monotonic() - began
        began = time.monotonic()
        for number in range(20):
            await audit.record(entry(number))
        await write(audit, database, entry(21))
        rest_seconds = time.monotonic() - began
        assert DEADLINE_SECONDS * 0.9 < first_seconds < DEADLINE_SECONDS + 3
        assert rest_seconds < DEADLINE_SECONDS, "once"
        assert audit.failing_copies == 1
        pipe.drain()
        await until_healed(audit)
        await audit.record(entry(22))
        await audit.aclose()
        numbers = pipe.close()
        assert list(dict.fromkeys(numbers)) == list(range(1, 28)), "each at least once, in order"
        assert [line["number"] for line in lines_of(path)] == list(range(1, 28)), "the other one never failed"


async def test_a_transaction_waits_for_no_copy(database: Database) -> None:
    with full_pipe() as pipe:
        audit = an_audit(database, sinks=["database", "stdout"])
        began = time.monotonic()
        for number in range(3):
            await write(audit, database, entry(number))
        assert time.monotonic() - began < DEADLINE_SECONDS
        pipe.drain()
        await audit.aclose()
        assert list(dict.fromkeys(pipe.close())) == [1, 2, 3]


async def test_an_audit_that_is_closed_while_a_sink_hangs_closes_in_time_and_says_what_is_lacking(
    database: Database,
) -> None:
    with full_pipe() as pipe:
        audit = an_audit(database, sinks=["database", "stdout"])
        await audit.record(entry())
        with structlog.testing.capture_logs() as told:
            async with asyncio.timeout(DEADLINE_SECONDS + 5):
                await audit.aclose()
        assert [(line["event"], line["lacks"]) for line in told] == [("audit.copy_incomplete", [(1, 1)])]
        pipe.drain()
        pipe.close()


async def test_without_the_database_there_is_no_sink(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = an_audit(database, sinks=["database", f"file:{path}"])
    await execute(database, "ALTER TABLE audit_records RENAME TO gone")
    with pytest.raises(AuditUnavailable):
        await audit.record(entry())
    await execute(database, "ALTER TABLE gone RENAME TO audit_records")
    await audit.record(entry())
    await audit.aclose()
    assert [line["number"] for line in lines_of(path)] == [1]


async def test_two_processes_that_share_a_file_lose_nothing_of_it(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audits = [an_audit(database, sinks=["database", f"file:{path}"]) for _ in range(2)]
    path.mkdir()
    for number in range(6):
        await audits[number % 2].record(entry(number))
    path.rmdir()
    for audit in audits:
        await until_healed(audit)
        await audit.aclose()
    assert {line["number"] for line in lines_of(path)} == {1, 2, 3, 4, 5, 6}


async def paid(audit: Audit) -> None:
    """Take checkpoints until every place has what it is owed: on a busy machine one that was freed is slow at first."""
    async with asyncio.timeout(DEADLINE_SECONDS + 5):
        while True:
            with contextlib.suppress(AuditUnavailable):
                await audit.checkpoint()
                return
            await asyncio.sleep(0.05)


async def test_a_place_of_checkpoints_that_hangs_costs_a_deadline_and_holds_up_no_other(
    database: Database, tmp_path: Path
) -> None:
    with full_pipe() as pipe:
        place = tmp_path / "checkpoints"
        audit = an_audit(database, places=["stdout", f"file:{place}"])
        await audit.record(entry())
        async with asyncio.timeout(DEADLINE_SECONDS + 5):
            with pytest.raises(AuditUnavailable):
                await audit.checkpoint()
        assert len(lines_of(place)) == len(await rows_of(database, CHECKPOINTS)) == 1
        pipe.drain()
        await paid(audit)  # nothing new: the one place gets what it is owed
        assert len(lines_of(place)) == 1
        assert await audit.verify() == Verification(ok=True, count=1, checked_checkpoints=2)
        assert pipe.close(), "what was late came through, twice perhaps"


async def test_a_copy_that_catches_up_survives_what_an_attacker_left_in_a_row(
    database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    audit = an_audit(database, sinks=["database", f"file:{path}"])
    path.mkdir()
    await audit.record(entry(subject="acme:1"))
    await execute(database, "UPDATE audit_records SET detail = '[1, 1e999]'")
    path.rmdir()
    await until_healed(audit)
    [line] = lines_of(path)
    assert (line["number"], line["detail"]) == (1, "[1, 1e999]")
    assert "subject" not in line
    await audit.aclose()
