"""A provider's API on a raw socket: keeps every request byte for byte, and answers what the test says, well-formed or not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Got:
    """One request: its target and fields as they stood on the wire, names in lower case, and its body without chunks."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    number: int = 0

    def field(self, name: str) -> str | None:
        """Return the one value of a field; None without one, AssertionError for several."""
        found = [value for key, value in self.headers if key == name]
        assert len(found) < 2, f"{name} came {len(found)} times"
        return found[0] if found else None


Answer = Callable[[Got, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class ApiServer:
    """The server: what it got, and how it answers from now on."""

    base: str = ""
    got: list[Got] = field(default_factory=list)
    answer: Answer | None = None
    reads_bodies: bool = True
    open_connections: int = 0
    answered: int = 0

    def replies(self, *answers: bytes) -> None:
        """Answer with these bytes in turn, the last one again and again."""
        begun = len(self.got)

        async def reply(got: Got, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(answers[min(got.number - begun, len(answers) - 1)])
            await writer.drain()

        self.answer = reply

    @property
    def last(self) -> Got:
        """The newest request."""
        return self.got[-1]


def reply(status: int = 200, body: bytes = b'{"ok": true}', **headers: str) -> bytes:
    """Return a whole answer; ``_`` in a field's name is ``-``."""
    fields = {"content-type": "application/json", "content-length": str(len(body))}
    fields.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + body


@asynccontextmanager
async def api_server() -> AsyncIterator[ApiServer]:
    """Serve on loopback; it answers ``{"ok": true}`` until it is told otherwise."""
    api = ApiServer()
    api.replies(reply())
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        api.open_connections += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await _serve_one(api, reader, writer):
                    continue
        finally:
            api.open_connections -= 1
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    api.base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield api
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _serve_one(api: ApiServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return False
    line, *rest = head.rstrip("\r\n").split("\r\n")
    method, target, _ = line.split(" ", 2)
    headers = [(name.lower(), value.strip(" ")) for name, _, value in (one.partition(":") for one in rest)]
    got = Got(method, target, headers, number=len(api.got))
    api.got.append(got)
    if api.reads_bodies:
        got.body = await _body(got, reader)
    assert api.answer is not None
    await api.answer(got, reader, writer)
    api.answered += 1
    return not writer.is_closing()


async def _body(got: Got, reader: asyncio.StreamReader) -> bytes:
    if got.field("transfer-encoding") == "chunked":
        pieces = []
        while size := int((await reader.readline()).strip(), 16):
            pieces.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readline()
        return b"".join(pieces)
    return await reader.readexactly(int(got.field("content-length") or 0))
