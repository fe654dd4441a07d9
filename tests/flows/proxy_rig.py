"""A broker as a process with raw sockets before it and raw TLS servers behind it: what the list of threats is tried on.

Nothing here repairs anything: a row's request is bytes, and what reached a sink is bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from broker.callers import mint_key
from tests.broker.test_egress import Authority
from tests.commands import environment, free_port
from tests.flows.test_canary import expect_absent, files_below

CANARY = "CANARY-9f3e27d1/c4b8+a6e0~5f71"  # an encoder changes three of its characters
GOOD, EVIL, META = "api.good.test", "evil.test", "meta.test"
PATH = "/repos/acme/widgets"
PATIENCE_SECONDS = 20.0
DEFECTS = (b"defect", b"Traceback", b"ASGI", b"never retrieved", b"was destroyed", b"internal_error")  # in a log
OK = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"id": 12345}'

Answer = bytes | Callable[["Sink", asyncio.StreamWriter], Awaitable[None]]


class Sink:
    """A TLS server that keeps the bytes of every request, and answers with given bytes on a connection that it keeps.

    ``connections`` counts before TLS begins, ``requests`` are whole ones.
    """

    def __init__(self, name: str, tls: ssl.SSLContext) -> None:
        """Begin with nothing seen and the ordinary answer."""
        self.name = name
        self._tls = tls
        self.address = ("", 0)
        self.answer: Answer = OK
        self.requests: list[bytes] = []
        self.via: list[int] = []  # for each request the number of its connection
        self.ended: set[int] = set()
        self.connections = 0
        self.open = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection until either side ends it."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections = number = self.connections + 1
        self.open += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, asyncio.CancelledError, OSError, ssl.SSLError):
                await writer.start_tls(self._tls, ssl_handshake_timeout=10)
                while not writer.is_closing():
                    await self._one(reader, writer, number)
        finally:
            self.open -= 1
            self.ended.add(number)
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.requests.append(await whole_request(reader))
        self.via.append(number)
        if callable(self.answer):
            await self.answer(self, writer)
        else:
            writer.write(self.answer)
            await writer.drain()

    async def stop(self) -> None:
        """End all connections."""
        for task in list(self._tasks):
            task.cancel()
            await task


async def whole_request(reader: asyncio.StreamReader) -> bytes:
    """Return the bytes of one request, as they stood on the wire."""
    head = await reader.readuntil(b"\r\n\r\n")
    lowered = head.lower()
    if b"\r\ntransfer-encoding: chunked\r\n" in lowered:
        return head + await _chunks(reader)
    found = re.search(rb"\r\ncontent-length: ([0-9]+)\r\n", lowered)
    return head + (await reader.readexactly(int(found[1])) if found else b"")


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    seen = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        seen += line + (chunk := await reader.readexactly(int(line, 16) + 2))
        if chunk == b"\r\n":
            return seen


async def hang_up(_sink: Sink, writer: asyncio.StreamWriter) -> None:
    """Answer nothing and close."""
    writer.close()


def written(*pieces: bytes, pause_seconds: float = 0.02, close: bool = True) -> Answer:
    """Return an answer that comes in pieces, and ends the connection unless told otherwise."""

    async def answer(_sink: Sink, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_seconds)
        if close:
            writer.close()

    return answer


def answered(*fields: str, body: bytes = b"", status: str = "200 OK") -> bytes:
    """Return a whole answer with its length."""
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}", "", ""]).encode() + body


@dataclass(frozen=True)
class Heard:
    """What the broker answered: the first answer taken apart, and all bytes that came."""

    raw: bytes = field(repr=False)
    closed: bool = True

    @property
    def status(self) -> int:
        """The status, 0 without an answer."""
        return int(self.raw[9:12]) if self.raw.startswith(b"HTTP/1.1 ") else 0

    @property
    def head(self) -> bytes:
        """Status line and fields."""
        return self.raw.partition(b"\r\n\r\n")[0]

    @property
    def fields(self) -> dict[str, str]:
        """The fields, names in lower case; of repeated ones the values, each on a line."""
        found: dict[str, str] = {}
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            name, _, value = line.partition(":")
            key = name.lower()
            found[key] = f"{found[key]}\n{value.strip()}" if key in found else value.strip()
        return found

    @property
    def body(self) -> bytes:
        """The body without its framing, as far as it came."""
        rest = self.raw.partition(b"\r\n\r\n")[2]
        if self.fields.get("transfer-encoding") != "chunked":
            return rest
        pieces, at = [], 0
        while (end := rest.find(b"\r\n", at)) > at:
            size = int(rest[at:end], 16)
            pieces.append(rest[end + 2 : end + 2 + size])
            at = end + 4 + size
        return b"".join(pieces)

    @property
    def whole(self) -> bool:
        """Whether the answer came to its end, by its own framing."""
        rest = self.raw.partition(b"\r\n\r\n")[2]
        if self.fields.get("transfer-encoding") == "chunked":
            return rest.endswith(b"0\r\n\r\n")
        return "content-length" in self.fields and len(rest) == int(self.fields["content-length"])

    @property
    def code(self) -> str:
        """The broker's own error, ``""`` for an upstream's answer."""
        return self.fields.get("x-broker-error", "")


@dataclass
class Rig:
    """Everything a row touches. ``mark`` before it, ``expect_nothing_left`` after it."""

    port: int
    pid: int
    place: Path
    admin_key: str
    sinks: dict[str, Sink]
    api: httpx2.AsyncClient
    caller_key: str = ""
    wide_key: str = ""
    connection_id: str = ""
    heard: list[bytes] = field(default_factory=list)
    sockets: int = 0
    _number: int = 0
    _dialled: dict[str, int] = field(default_factory=dict)
    _asked: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> Sink:
        """The server that the connection is for."""
        return self.sinks["good"]

    # The administrator's side

    async def call(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """Call `/v1` as the administrator; return the document."""
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        answer = await self.api.request(method, path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def integration(self, name: str, base_url: str, **config: Any) -> None:
        """Configure an integration whose API is at a URL."""
        body = {"name": name, "provider": "github", "client_id": "c", "client_secret": "not-a-canary"}
        await self.call(
            "POST", "/v1/integrations", {**body, "config": {"api_base_url": base_url, **config}}, status=201
        )

    async def connection(self, integration: str, token: str = CANARY, subject: str = "acme:42") -> str:
        """Import a connection; return its id."""
        credentials = {"type": "oauth2", "access_token": token}
        body = {"integration": integration, "subject": subject, "credentials": credentials}
        return str((await self.call("POST", "/v1/connections", body, status=201))["id"])

    async def caller(self, *grants: Mapping[str, Any]) -> str:
        """Make a caller; return its key."""
        body = {"name": "app", "roles": ["service"], "grants": list(grants)}
        return str((await self.call("POST", "/v1/callers", body, status=201))["key"])

    async def records(self) -> list[dict[str, Any]]:
        """Return the records of proxied calls since the mark, oldest first."""
        return await self._audited("connection.proxy")

    async def outcome(self) -> tuple[int | None, str | None, int]:
        """Return status, error and attempts of the one call since the mark; outcomes are written in groups, a little later."""
        (intent,) = [one["id"] for one in await self.records() if one["outcome"] == "intent"]
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                groups = await self._audited("connection.proxy_outcomes")
                for line in (one for group in groups for one in group["detail"]["calls"]):
                    found, status, code, attempts, _ = line.split()
                    if found == intent:
                        told = None if status == "-" else int(status), None if code == "-" else code
                        return *told, int(attempts)
                await asyncio.sleep(0.05)

    async def _audited(self, action: str) -> list[dict[str, Any]]:
        found = (await self.call("GET", f"/v1/audit?limit=100&action={action}"))["data"]
        return [one for one in reversed(found) if one["number"] > self._number]

    # The caller's side

    def request(
        self,
        *fields: str | bytes,
        method: str = "GET",
        path: str = PATH,
        body: bytes = b"",
        target: str | bytes | None = None,
        key: str = "",
        close: bool = True,
    ) -> bytes:
        """Return a request to the connection. ``target``: all of the request target; ``key``: another caller's."""
        where = f"/proxy/{self.connection_id}{path}" if target is None else target
        head = [f"Host: 127.0.0.1:{self.port}", f"Authorization: Bearer {key or self.caller_key}", *fields]
        head += [f"Content-Length: {len(body)}"] if body else []
        head += ["Connection: close"] if close else []
        line = b" ".join([method.encode(), _bytes(where), b"HTTP/1.1"])
        return b"\r\n".join([line, *map(_bytes, head), b"", b""]) + body

    async def send(
        self, *pieces: bytes, patience_seconds: float = PATIENCE_SECONDS, pause_seconds: float = 0.0
    ) -> Heard:
        """Send bytes to the broker on a connection of their own; return all that it says until it hangs up."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**26)
        raw, closed = bytearray(), False
        try:
            with contextlib.suppress(ConnectionError, TimeoutError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause_seconds)
                async with asyncio.timeout(patience_seconds):
                    while chunk := await reader.read(2**18):
                        raw += chunk
                    closed = True
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self.heard.append(bytes(raw))
        return Heard(bytes(raw), closed)

    # Before and after a row

    async def mark(self) -> None:
        """Begin a row: note where the audit and the sinks stand."""
        newest = (await self.call("GET", "/v1/audit?limit=1"))["data"]
        self._number = newest[0]["number"] if newest else 0
        self._dialled = {name: sink.connections for name, sink in self.sinks.items()}
        self._asked = {name: len(sink.requests) for name, sink in self.sinks.items()}
        self.heard.clear()

    def asked(self, name: str = "good") -> list[bytes]:
        """Return the requests that reached a sink since the mark."""
        return self.sinks[name].requests[self._asked[name] :]

    def dialled(self, name: str = "good") -> int:
        """Return how many connections a sink accepted since the mark."""
        return self.sinks[name].connections - self._dialled[name]

    def expect_untouched(self) -> None:
        """Fail if any sink accepted a connection or got a request since the mark."""
        touched = {name: (self.dialled(name), self.asked(name)) for name in self.sinks}
        assert all(found == (0, []) for found in touched.values()), touched

    async def expect_nothing_left(self) -> None:
        """End a row: no secret anywhere, the next good request works, no socket stays."""
        await self._expect_no_secret()
        self.good.answer = OK
        path = f"/repos/acme/after-{self.good.connections}-{len(self.good.requests)}"  # the row's own may still be on its way
        heard = await self.send(self.request(path=path))
        assert heard.status == 200, heard.raw
        assert heard.body == OK.partition(b"\r\n\r\n")[2]
        (request,) = [one for one in self.good.requests if one.startswith(f"GET {path} HTTP/1.1\r\n".encode())]
        assert injected(request) == [f"Bearer {CANARY}"]
        await self.expect_sockets()

    async def _expect_no_secret(self) -> None:
        metrics = (await self.api.get("/metrics")).content
        places = {"answers": b"\n".join(self.heard), "metrics": metrics, **files_below(self.place)}
        assert {"broker.db", "broker.log", "audit.jsonl"} <= places.keys()
        assert not [mark for mark in DEFECTS if mark in places["broker.log"]]
        keys = {"caller key": self.caller_key, "wide caller key": self.wide_key}
        await asyncio.to_thread(expect_absent, {"credential": CANARY, **keys}, places)
        sent = [request for sink in self.sinks.values() for request in sink.requests]
        assert not any(key.encode() in request for request in sent for key in keys.values())

    async def expect_sockets(self) -> None:
        """Fail unless the process has only the sockets that it had at first, but for those that a sink still has open."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.own_sockets() != self.sockets:  # noqa: ASYNC110 - another process closes them
                await asyncio.sleep(0.02)

    def own_sockets(self) -> int:
        """Return how many sockets the process has, without those to the sinks and the administrator's."""
        return sockets_of(self.pid) - sum(sink.open for sink in self.sinks.values())


def sockets_of(pid: int) -> int:
    """Return how many sockets a process has open."""
    found = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found += str(Path(entry.path).readlink()).startswith("socket:")
    return found


def resident_bytes(pid: int) -> int:
    """Return the most memory that a process ever had, in bytes."""
    found = re.search(r"VmHWM:\s+([0-9]+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def injected(request: bytes) -> list[str]:
    """Return all values of ``Authorization`` in a request, whatever its name's case."""
    return values_of(request, "authorization")


def values_of(request: bytes, name: str) -> list[str]:
    """Return all values of a field in a request, whatever its name's case."""
    lines = request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    pairs = [line.partition(":") for line in lines]
    return [value.strip() for found, _, value in pairs if found.strip().lower() == name]


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")


GRANT = {"integrations": ["gh"], "may": ["proxy"], "methods": ["GET", "POST"], "paths": ["/repos/acme/**"]}


@asynccontextmanager
async def proxy_rig(place: Path, **variables: str) -> AsyncIterator[Rig]:
    """Start sinks and a broker in development, with integration, connection and callers. ``variables``: of its environment."""
    async with contextlib.AsyncExitStack() as stack:
        authority = Authority(place)
        port = free_port()
        sinks = {
            "good": await stack.enter_async_context(sink("good", "127.0.0.1", port, authority.context(GOOD))),
            "evil": await stack.enter_async_context(sink("evil", "127.0.0.2", port, authority.context(EVIL))),
            "meta": await stack.enter_async_context(sink("meta", "127.0.0.3", port, authority.context(META))),
        }
        pins = [f"{name}:{port}:{sinks[one].address[0]}" for one, name in named().items()]
        given = {
            "BROKER_ENV": "development",
            "BROKER_EGRESS_CA_FILE": str(authority.file),
            "BROKER_EGRESS_RESOLVE": ",".join([*pins, *filter(None, [variables.pop("more_pins", "")])]).replace(
                "{port}", str(port)
            ),
            **variables,
        }
        rig = await stack.enter_async_context(broker_process(place, sinks, given))
        await rig.integration("gh", f"https://{GOOD}:{port}")
        rig.connection_id = await rig.connection("gh")
        rig.caller_key = await rig.caller(GRANT)
        rig.wide_key = await rig.caller({"integrations": ["*"], "may": ["proxy"]})
        await begin(rig)
        yield rig


def named() -> dict[str, str]:
    """Return the name that each sink has a certificate for."""
    return {"good": GOOD, "evil": EVIL, "meta": META}


async def begin(rig: Rig) -> None:
    """Make a good call and count the sockets that the process has then."""
    heard = await rig.send(rig.request())
    assert heard.status == 200, heard.raw
    await asyncio.sleep(0.1)
    rig.sockets = rig.own_sockets()


@asynccontextmanager
async def sink(name: str, host: str, port: int, tls: ssl.SSLContext) -> AsyncIterator[Sink]:
    """Serve a sink at an address."""
    made = Sink(name, tls)
    server = await asyncio.start_server(made.serve, host, port)
    made.address = server.sockets[0].getsockname()[:2]
    try:
        yield made
    finally:
        server.close()
        await made.stop()


@asynccontextmanager
async def broker_process(
    place: Path, sinks: dict[str, Sink], given: Mapping[str, str], command: Sequence[str] = ()
) -> AsyncIterator[Rig]:
    """Run `broker serve` with log, database and copy of the audit below ``place``. ``command``: what stands for `broker`."""
    port, admin_key, data = free_port(), mint_key()[1].reveal(), place / "data"
    data.mkdir()
    variables = {
        "BROKER_DATA_DIR": str(data),
        "BROKER_PUBLIC_URL": f"http://127.0.0.1:{port}",
        "BROKER_ADMIN_KEY": admin_key,
        "BROKER_AUDIT_SINKS": f"database,file:{data / 'audit.jsonl'}",
        **given,
    }
    command = (*(command or (sys.executable, "-m", "broker")), "serve", "--port", str(port))
    with (data / "broker.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment(place, **variables), cwd=place, stdout=log, stderr=log
        )
    try:
        # a connection for each call: the process's sockets are counted
        limits = httpx2.Limits(max_keepalive_connections=0)
        base = f"http://127.0.0.1:{port}"
        async with httpx2.AsyncClient(base_url=base, trust_env=False, timeout=30, limits=limits) as api:
            await _until_ready(api, process, data / "broker.log")
            yield Rig(port, process.pid, data, admin_key, sinks, api)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 40) == 0, (data / "broker.log").read_text()[-3000:]


async def _until_ready(api: httpx2.AsyncClient, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(60):
        while True:
            assert process.returncode is None, await asyncio.to_thread(log.read_text)
            with contextlib.suppress(httpx2.TransportError):
                if (await api.get("/health/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.05)


# What rows say


async def expect_denied(
    rig: Rig,
    request: bytes | Iterable[bytes],
    *,
    code: str = "invalid_request",
    status: int = 400,
    refused: str | None = "invalid_request",
) -> Heard:
    """DENY: a 4xx of ours, no sink touched, one record with the reason ``refused`` (None: refused at the edge, no record)."""
    heard = await rig.send(*([request] if isinstance(request, bytes) else request))
    assert (heard.status, heard.code) == (status, code), heard.raw
    assert heard.whole
    assert json.loads(heard.body)["code"] == code
    rig.expect_untouched()
    records = await rig.records()
    if refused is None:
        assert records == []
    else:
        assert [(one["outcome"], one["detail"]["refused"]) for one in records] == [("denied", refused)]
    return heard


async def expect_passed(rig: Rig, request: bytes, line: bytes) -> tuple[Heard, bytes]:
    """OK: the good sink saw exactly this request line, with the credential, once; return the answer and the request."""
    heard = await rig.send(request)
    assert heard.status == 200, heard.raw
    (seen,) = rig.asked()
    assert seen.partition(b"\r\n")[0] == line + b" HTTP/1.1"
    assert injected(seen) == [f"Bearer {CANARY}"]
    assert rig.asked("evil") == rig.asked("meta") == []
    return heard, seen
