"""Where lines go besides the database: files and standard output, written durably or not at all."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from sqlalchemy.util.concurrency import await_, in_greenlet

from broker.errors import AuditUnavailable

Place: TypeAlias = Path | None  # None: standard output

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
    return tuple(places)


def write_lines(places: Sequence[Place], lines: str) -> None:
    """Write whole lines to every place, durably; ``AuditUnavailable`` when one of them does not take them. May block."""
    try:
        for place in places:
            if place is None:
                sys.stdout.write(lines)
                sys.stdout.flush()
            else:
                _append_durably(place, lines.encode())
    except (OSError, ValueError) as error:  # ValueError: a closed stream
        raise AuditUnavailable("An audit sink could not be written") from error


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


@dataclass(slots=True)
class Copies:
    """The lines of one transaction for the other sinks, written after its commit, and how that went."""

    places: tuple[Place, ...]
    lines: list[str] = field(default_factory=list)
    error: AuditUnavailable | None = None

    def write(self) -> None:
        """Write; keep the failure. On PostgreSQL this is called on the event loop, which must not wait for a disk."""
        lines = "".join(self.lines)
        try:
            if in_greenlet():
                await_(asyncio.to_thread(write_lines, self.places, lines))
            else:
                write_lines(self.places, lines)
        except AuditUnavailable as error:
            self.error = error
