"""Files that hang, as on a network disk that is gone: whoever reads or writes one is held up for a deadline at most."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import Any

import pytest

from broker.audit.places import InFile
from broker.audit.sinks import DEADLINE_SECONDS, Writer
from broker.errors import AuditUnavailable

LINE = '{"a":1}\n'


class HangingPath(PosixPath):
    """A path that whoever opens it waits for until ``free`` is set."""

    free: threading.Event

    def __fspath__(self) -> str:
        assert threading.current_thread() is not threading.main_thread(), "this would freeze the event loop"
        assert self.free.wait(60)
        return super().__fspath__()


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[HangingPath]:
    (tmp_path / "points").write_text(LINE)
    path = HangingPath(tmp_path / "points")
    path.free = threading.Event()
    yield path
    path.free.set()


async def read(place: InFile) -> list[Any]:
    return [line async for batch in place.batches() for line in batch]


def readers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "audit-place"]


async def healed(place: InFile) -> list[Any]:
    """Return what can be read once reading is no longer refused."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await read(place)
            except AuditUnavailable:
                await asyncio.sleep(0.01)


async def test_a_read_that_hangs_costs_a_deadline_once_and_one_thread_of_its_own(hanging: HangingPath) -> None:
    place = InFile(hanging)
    before = len(readers())
    async with asyncio.timeout(DEADLINE_SECONDS + 5):
        with pytest.raises(AuditUnavailable):
            await read(place)
    async with asyncio.timeout(DEADLINE_SECONDS / 2):
        for _ in range(100):
            with pytest.raises(AuditUnavailable):
                await read(place)
    [thread] = readers()[before:]
    assert thread.daemon
    hanging.free.set()
    assert await healed(place) == [{"a": 1}]
    thread.join(10)
    assert not thread.is_alive()


async def test_a_write_that_hangs_refuses_those_after_it_at_once_and_loses_none_once_it_heals(
    hanging: HangingPath,
) -> None:
    writer = Writer(hanging)
    with pytest.raises(AuditUnavailable):
        await writer.write(LINE, 0.05)
    async with asyncio.timeout(10):
        for _ in range(1_000):
            with pytest.raises(AuditUnavailable):
                await writer.write(LINE, 60)
        hanging.free.set()
        while True:
            try:
                await writer.write('{"b":2}\n', 60)
                break
            except AuditUnavailable:
                await asyncio.sleep(0.01)
    assert await read(InFile(hanging)) == [{"a": 1}, {"a": 1}, {"b": 2}]


async def test_a_reader_that_stops_in_the_middle_leaves_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "points"
    path.write_text(LINE * 3_000)
    before = set(readers())
    batches = InFile(path).batches()
    assert len(await anext(batches)) == 1_000
    [thread] = set(readers()) - before
    await batches.aclose()
    thread.join(10)
    assert not thread.is_alive()
    assert len(await read(InFile(path))) == 3_000


async def test_nothing_is_read_back_from_a_device(tmp_path: Path) -> None:
    assert await read(InFile(Path("/dev/null"))) == []
    assert await read(InFile(tmp_path / "none")) == []
