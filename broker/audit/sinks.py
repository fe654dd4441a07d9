"""Where lines go besides the database: files and standard output, each written by a thread of its own."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import stat
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from broker.errors import AuditUnavailable

Place: TypeAlias = Path | None  # None: standard output

DEADLINE_SECONDS = 2.0
NOT_WRITTEN = "An audit sink could not be written"

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode  # ASCII: any stream has it


def places_of(names: Sequence[str]) -> tuple[Place, ...]:
    """Return the places besides the database: a path for ``file:…``, None for ``stdout``. ``ValueError`` for others."""
    places: list[Place] = []
    for name in names:
        kind, _, path = name.partition(":")
        if name not in {"database", "stdout"} and (kind != "file" or not path):
            raise ValueError("an audit place is database, stdout or file:<path>")
        if name != "database":
            places.append(Path(path) if path else None)
    return tuple(dict.fromkeys(places))


class Writer:
    """Writes to one place, in order, on a thread of its own: a place that hangs (a dead NFS, a full pipe) holds up nobody.

    Use it from one event loop. The thread is a daemon: one that hangs for ever does not keep the process alive.
    """

    def __init__(self, place: Place) -> None:
        """Begin nothing: the thread starts with the first line."""
        self._place = place
        self._waiting: queue.SimpleQueue[tuple[int, str, asyncio.AbstractEventLoop, asyncio.Future[None]]] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None
        self._round = 0
        self._begun = 0
        self._given_up = 0  # how many had begun when some were last given up
        self._ended = 0  # the thread's own count

    def begin(self, lines: str) -> asyncio.Future[None]:
        """Write whole lines, durably, after those before; the future fails with ``AuditUnavailable`` where that fails."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="audit-sink", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._begun += 1
        self._waiting.put((self._round, lines, loop, done))
        return done

    async def write(self, lines: str, deadline_seconds: float) -> None:
        """As ``begin``, and wait for it: ``AuditUnavailable`` also after the deadline. The lines may be written later.

        Refused at once while a write that was given up still hangs: what is tried again meanwhile must not pile up behind it.
        """
        if self._ended < self._given_up:
            raise AuditUnavailable(NOT_WRITTEN)
        try:
            await asyncio.wait_for(self.begin(lines), deadline_seconds)
        except TimeoutError:
            self.give_up()
            raise AuditUnavailable(NOT_WRITTEN) from None

    def give_up(self) -> None:
        """Drop what waits behind the write that is under way, so that nothing is written out of order later."""
        self._round += 1
        self._given_up = self._begun

    def _run(self) -> None:
        while True:
            number, lines, loop, done = self._waiting.get()
            failure = None
            if number == self._round:
                try:
                    write_lines(self._place, lines)
                except (OSError, ValueError) as error:  # ValueError: a closed stream
                    failure = AuditUnavailable(NOT_WRITTEN)
                    failure.__cause__ = error
            else:
                failure = AuditUnavailable(NOT_WRITTEN)
            self._ended += 1
            try:
                loop.call_soon_threadsafe(_end, done, failure)
            except RuntimeError:  # the loop is closed: nobody waits any more
                continue


def _end(done: asyncio.Future[None], failure: Exception | None) -> None:
    if done.done():
        return
    if failure is None:
        done.set_result(None)
    else:
        done.set_exception(failure)


def write_lines(place: Place, lines: str) -> None:
    """Write whole lines to a place, durably; raises OSError or ValueError when it does not take them. May block."""
    if place is None:
        sys.stdout.write(lines)
        sys.stdout.flush()
    else:
        _append_durably(place, lines.encode())


def _append_durably(path: Path, data: bytes) -> None:
    """Append to a file (made 0600) and sync it. Opened anew each time: it may have been rotated, or have healed.

    A regular file or a device: a pipe could swallow the lines, and opening one could block for ever.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    file = os.open(path, flags, 0o600)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            _write_device(file, status.st_mode, data)
            return
        if status.st_size and os.pread(file, 1, status.st_size - 1) != b"\n":
            data = b"\n" + data  # a write that was cut (full disk, crash) must not spoil this line too
        _write_all(file, data)
        os.fsync(file)
    finally:
        os.close(file)
    if not status.st_size:
        _sync_directory(path.parent)


def _write_device(file: int, mode: int, data: bytes) -> None:
    if not stat.S_ISCHR(mode):
        raise OSError("an audit file is a regular file or a device")
    _write_all(file, data)


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def line_of(row: Mapping[str, Any]) -> str:
    """Return a record or a checkpoint as a line. A subject stays out: an erasure could not reach it here."""
    return _encode({name: value for name, value in row.items() if name != "subject"}) + "\n"
