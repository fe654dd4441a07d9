"""A steady load of hand-outs and refreshes on broker processes, at a pace, that remembers every answer that was none."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.crash.processes import Wire, connected

LANES = 12  # connections for each kind of request
FORCED_REFRESH = {"force_refresh": True}


@dataclass
class SteadyLoad:
    """What is sent, how fast, and what came of it. ``key`` may be replaced while it runs."""

    ports: list[int]
    key: str
    ids: Sequence[str]
    hand_outs_per_second: float = 220.0
    refreshes_per_second: float = 22.0
    answered: dict[str, int] = field(default_factory=lambda: {"hand-out": 0, "refresh": 0})
    cut: int = 0  # requests whose process was killed under them
    failures: list[tuple[str, str, int, str]] = field(default_factory=list)
    seconds: float = 0.0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send until the block ends."""
        began = time.monotonic()
        stopping = asyncio.Event()
        lanes = [
            asyncio.create_task(self._lane("hand-out", {}, self.hand_outs_per_second, number, stopping))
            for number in range(LANES)
        ]
        lanes += [
            asyncio.create_task(self._lane("refresh", FORCED_REFRESH, self.refreshes_per_second, number, stopping))
            for number in range(LANES)
        ]
        try:
            yield
        finally:
            stopping.set()
            await asyncio.gather(*lanes)
            self.seconds += time.monotonic() - began

    async def _lane(
        self, kind: str, body: Mapping[str, Any], per_second: float, number: int, stopping: asyncio.Event
    ) -> None:
        """Ask one thing after the other, each at its time; a lane that fell behind catches up."""
        ids = itertools.cycle(self.ids[number::LANES])
        due = time.monotonic() + number / per_second
        turns = itertools.count(number)
        while not stopping.is_set():
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async with connected(self.ports[next(turns) % len(self.ports)]) as wire:
                    due = await self._asked(wire, kind, body, ids, due, LANES / per_second, stopping)
                    continue
            self.cut += 1
            await asyncio.sleep(0.05)

    async def _asked(
        self,
        wire: Wire,
        kind: str,
        body: Mapping[str, Any],
        ids: Iterator[str],
        due: float,
        pace_seconds: float,
        stopping: asyncio.Event,
    ) -> float:
        for connection_id in ids:
            if stopping.is_set():
                break
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += pace_seconds
            status, answer = await wire.ask(self._request(connection_id, body))
            self.answered[kind] += 1
            if status != 200:
                self.failures.append((kind, connection_id, status, answer[:300].decode(errors="replace")))
        return due

    def _request(self, connection_id: str, body: Mapping[str, Any]) -> bytes:
        return request("POST", f"/v1/connections/{connection_id}/token", self.key, body)

    def rate(self, kind: str) -> float:
        """Return how many were answered a second."""
        return self.answered[kind] / self.seconds


def request(method: str, path: str, key: str, body: Mapping[str, Any] | None = None) -> bytes:
    """Return a whole request with a JSON body, or none."""
    content = b"" if body is None else json.dumps(body).encode()
    kind = "" if body is None else "Content-Type: application/json\r\n"
    head = f"{method} {path} HTTP/1.1\r\nHost: broker\r\nAuthorization: Bearer {key}\r\n{kind}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def ask(port: int, key: str, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """Send one request on a connection of its own; return the JSON of a 2xx answer, fail for others."""
    async with connected(port) as wire:
        status, answer = await wire.ask(request(method, path, key, body))
    assert 200 <= status < 300, (method, path, status, answer)
    return json.loads(answer) if answer else None
