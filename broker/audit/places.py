"""Where signed checkpoints go besides the database: a file, standard output, or the secret store."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence
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

    async def write(self, line: str, count: int) -> None:  # noqa: ARG002 - a file takes every line
        """See ``CheckpointPlace``. A write that hangs is given up after a deadline, and those after it are refused."""
        await self._writer.write(line, DEADLINE_SECONDS)

    async def batches(self) -> AsyncGenerator[Sequence[Any]]:
        """See ``CheckpointPlace``; a file that is not there yet holds nothing.

        A line that is not whole JSON was cut while it was written, and is passed over.
        """
        if self._path is None:
            return
        try:
            with self._path.open("rb") as file:
                lines = iter(partial(file.readline, LONGEST_LINE), b"")
                while chunk := await asyncio.to_thread(lambda: list(itertools.islice(lines, BATCH))):
                    yield list(_parsed(chunk))
        except FileNotFoundError:
            return
        except OSError as error:
            raise AuditUnavailable(UNREADABLE) from error


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
