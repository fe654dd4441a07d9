"""Servers on loopback that behave like a provider, or only listen: they remember what reached them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Reply = tuple[int, Any] | tuple[int, Any, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that reached a fake: header names in lower case, the body as sent, the target as it stood on the line."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    target: str = ""

    @property
    def form(self) -> dict[str, str]:
        """The fields of a form-encoded body."""
        return dict(parse_qsl(self.body.decode(), keep_blank_values=True))


@dataclass
class Fake:
    """A listening fake: its base URL, how many connections were opened, and the requests that came."""

    base: str
    connections: int = 0
    seen: list[Seen] = field(default_factory=list)


@asynccontextmanager
async def listening(answer: Callable[[Seen], Reply] | None = None) -> AsyncIterator[Fake]:
    """Serve `answer` (status, JSON document or bytes, headers) on a free port; without one every request gets a 500."""
    fake = Fake("")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fake.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            seen = await _read(reader)
            fake.seen.append(seen)
            writer.write(_written(*(answer(seen) if answer is not None else (500, {}))))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    fake.base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield fake


async def _read(reader: asyncio.StreamReader) -> Seen:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *fields = head.strip().split("\r\n")
    method, target, _ = line.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    parts = urlsplit(target)
    return Seen(method, parts.path, dict(parse_qsl(parts.query)), headers, body, target)


def _written(status: int, document: Any, headers: Mapping[str, str] | None = None) -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    fields = ("Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close")
    more = [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([f"HTTP/1.1 {status} Status", *fields, *more, "", ""]).encode() + body
