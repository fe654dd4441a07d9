"""Where signed checkpoints go besides the database: a file, standard output, or the secret store."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import stat
import threading
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from broker.audit.chain import strict_json
from broker.audit.records import BATCH
from broker.audit.sinks import DEADLINE_SECONDS, Writer, places_of
from broker.errors import AuditUnavailable, BrokerError
from broker.vault import SecretNotFound, SecretUnreadable, Vault, VaultConflict

LONGEST_LINE = 4_096
UNREADABLE = "A place of audit checkpoints could not be read"


class CheckpointPlace(Protocol):
    """A place that the database's writer should not reach. Both raise ``AuditUnavailable`` in bounded time."""

    async def write(self, line: str, count: int) -> None:
        """Keep the checkpoint over ``count`` records durably; ``line`` ends with a line feed."""

    def batches(self) -> AsyncGenerator[Sequence[Any]]:
        """Read back what is there, unchecked; nothing where nothing can be read back."""


def checkpoint_places(names: Sequence[str], vault: Vault | None) -> list[CheckpointPlace]:
    """Return the places of ``BROKER_AUDIT_CHECKPOINTS`` (``ValueError`` for what is none, or ``vault:`` without a store)."""
    places: list[CheckpointPlace] = []
    for name in dict.fromkeys(names):
        if name.startswith("vault:"):
            owner = name.removeprefix("vault:")
            if vault is None or not owner:
                raise ValueError("an audit place in the vault is vault:<path>, and needs a store")
            places.append(InVault(vault, owner))
        else:
            places.extend(map(InFile, places_of([name])))
    return places


class InFile:
    """A file with a checkpoint a line, or standard output (which cannot be read back)."""

    def __init__(self, path: Path | None) -> None:
        """Keep the path; None: standard output."""
        self._path = path
        self._writer = Writer(path)
        self._hanging: _Reading | None = None  # the last one that was given up

    async def write(self, line: str, count: int) -> None:  # noqa: ARG002 - a file takes every line
        """See ``CheckpointPlace``. A write that hangs is given up after a deadline, and those after it are refused."""
        await self._writer.write(line, DEADLINE_SECONDS)

    async def batches(self) -> AsyncGenerator[Sequence[Any]]:
        """See ``CheckpointPlace``; a file that is not there yet holds nothing, and nothing is read back from a device.

        A line that is not whole JSON was cut while it was written, and is passed over. A read that hangs is given up after a
        deadline for each batch, and those after it are refused until it ends.
        """
        if self._path is None:
            return
        if self._hanging is not None and self._hanging.is_alive:
            raise AuditUnavailable(UNREADABLE)
        reading = _Reading(self._path)
        try:
            while chunk := await reading.chunk():
                yield list(_parsed(chunk))
        except FileNotFoundError:
            return
        except OSError as error:
            self._hanging = reading if isinstance(error, TimeoutError) else None
            raise AuditUnavailable(UNREADABLE) from error
        finally:
            reading.end()


class _Reading:
    """Reads a file in batches of lines on a thread of its own, which opens and closes it: one that hangs holds up nobody.

    The thread is a daemon, as the ``Writer``'s is, and none of the event loop's own: those others need.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._asked: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Future[list[bytes]]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="audit-place", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def chunk(self) -> list[bytes]:
        """Return the next lines, none at the end. Raises OSError; TimeoutError, which is one, after the deadline."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[bytes]] = loop.create_future()
        self._asked.put((loop, done))
        return await asyncio.wait_for(done, DEADLINE_SECONDS)

    def end(self) -> None:
        """Let the thread close the file and end, as soon as it can."""
        self._asked.put(None)

    def _run(self) -> None:
        with contextlib.closing(_chunks(self._path)) as chunks, contextlib.suppress(RuntimeError):  # a closed loop
            while (asked := self._asked.get()) is not None:
                loop, done = asked
                try:
                    found: list[bytes] | OSError = next(chunks, [])
                except OSError as error:
                    found = error
                loop.call_soon_threadsafe(_answer, done, found)


def _answer(done: asyncio.Future[list[bytes]], found: list[bytes] | OSError) -> None:
    if done.done():
        return  # nobody waits any more
    if isinstance(found, OSError):
        done.set_exception(found)
    else:
        done.set_result(found)


def _chunks(path: Path) -> Generator[list[bytes]]:
    """Yield the lines of a regular file, none of a device; OSError for anything else. May block, but not for a pipe."""
    with open(path, "rb", opener=_opened_at_once) as file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISCHR(mode):
            return
        if not stat.S_ISREG(mode):
            raise OSError("an audit file is a regular file or a device")
        lines = iter(partial(file.readline, LONGEST_LINE), b"")
        while chunk := list(itertools.islice(lines, BATCH)):
            yield chunk


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


class InVault:
    """The newest checkpoint as a secret of its own; the store's versions keep a few before it."""

    def __init__(self, vault: Vault, owner: str) -> None:
        """Keep the store and the path."""
        self._vault = vault
        self._owner = owner

    async def write(self, line: str, count: int) -> None:
        """See ``CheckpointPlace``; an older checkpoint than the one that is there is not written."""
        try:
            version, newest = await self._newest()
            if newest < count:
                value = {"count": count, "line": line.strip()}
                with contextlib.suppress(VaultConflict):  # another process has just written one, which is as good
                    await self._vault.put(self._owner, value, expected_version=version)
        except BrokerError as error:
            raise AuditUnavailable("A place of audit checkpoints could not be written") from error

    async def _newest(self) -> tuple[int, int]:
        """Return (version, count) of what is there; what does not open counts nothing."""
        try:
            version, value = await self._vault.get(self._owner)
        except SecretNotFound:
            return 0, 0
        except SecretUnreadable:
            raise AuditUnavailable(UNREADABLE) from None
        count = value.get("count")
        return version, count if isinstance(count, int) else 0

    async def batches(self) -> AsyncGenerator[Sequence[Any]]:
        """See ``CheckpointPlace``."""
        try:
            _, value = await self._vault.get(self._owner)
        except SecretNotFound:
            return
        except (BrokerError, SecretUnreadable) as error:
            raise AuditUnavailable(UNREADABLE) from error
        yield list(_parsed([str(value.get("line")).encode("utf-8", "replace")]))


def _parsed(lines: Sequence[bytes]) -> Iterator[Any]:
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            yield strict_json(line)
