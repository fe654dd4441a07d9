"""The two far sides of webhooks: senders that post signed pushes at full speed, and a receiver that believes nobody.

Both know HMAC from the standard library only: what the broker verifies and signs is checked by code that is not the broker's.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import httpx2

from tests.crash.processes import Wire, connected

HOOK_SECRET = "It's a Secret to Everybody"  # GitHub's own example
EVENT_TYPE = "github.push"
TOLERANCE_SECONDS = 300.0
PATIENCE_SECONDS = 60.0  # of a sender, for one answer, and of anybody for a process to come back
FORGED = 0.01  # of what is posted is an attacker's
AGAIN = 0.5  # of what got no answer is posted once more
TWICE = 0.03  # of what was acknowledged, too: a sender that did not hear it


# --- the sender


def push_body(nonce: str, *, more_commits: int = 3) -> bytes:
    """Return a push as GitHub tells it, about 2 kB by default, with the nonce in it."""
    author = {"name": "Mona Lisa", "email": "mona@example.com", "username": "mona"}
    commits = [
        {
            "id": hashlib.sha1(f"{nonce}{number}".encode(), usedforsecurity=False).hexdigest(),
            "message": f"Change {number}: weiß, “quoted”",
            "timestamp": "2026-11-21T10:00:00+01:00",
            "author": author,
            "added": [f"src/part_{number}/new.py"],
            "removed": [],
            "modified": [f"src/part_{number}/old.py", "README.md"],
        }
        for number in range(more_commits + 1)
    ]
    repository = {"id": 186853002, "full_name": "octo/hello", "owner": author, "private": False, "topics": ["x"] * 40}
    push = {"ref": "refs/heads/main", "after": nonce, "repository": repository, "commits": commits, "forced": False}
    return json.dumps(push, ensure_ascii=False).encode()


def push_request(target: str, nonce: str, body: bytes, secret: str = HOOK_SECRET) -> bytes:
    """Return the whole request, as GitHub's hook sends it."""
    digest = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    head = (
        f"POST {target} HTTP/1.1\r\nHost: broker\r\nUser-Agent: GitHub-Hookshot/044aadd\r\nContent-Type: application/json\r\n"
        f"X-GitHub-Event: push\r\nX-GitHub-Delivery: {nonce}\r\nX-Hub-Signature-256: sha256={digest}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass
class Posted:
    """One event at its sender. ``event_ids``: of every 2xx; ``unanswered``: how often a process died over it."""

    body: bytes
    event_ids: list[str] = field(default_factory=list)
    acknowledged_at: float | None = None
    duplicates: int = 0
    unanswered: int = 0
    refused: list[int] = field(default_factory=list)


@dataclass
class Provider:
    """Posts events, each with an id and a body of its own. ``port``: where the broker serves now; a killed one moves."""

    target: str
    seed: str
    port: int = 0
    posted: dict[str, Posted] = field(default_factory=dict)  # by nonce
    forged: dict[str, int] = field(default_factory=dict)  # nonce → status
    begun: int = 0
    answered: int = 0

    async def post(self, count: int, *, senders: int) -> None:
        """Post that many, from several kept connections at once, each as fast as it is answered."""
        left = iter(range(count))
        async with asyncio.TaskGroup() as group:
            for _ in range(senders):
                group.create_task(self._send(left))

    async def _send(self, left: Iterator[int]) -> None:
        async with Line(self) as line:
            for _ in left:
                self.begun += 1
                chance = random.Random(f"{self.seed} {self.begun}")  # noqa: S311 - repeatable, not secret
                nonce = str(uuid.UUID(int=chance.getrandbits(128), version=4))
                if chance.random() < FORGED:
                    await self._forge(line, nonce)
                    continue
                one = self.posted[nonce] = Posted(push_body(nonce))
                if chance.random() < (TWICE if await self._attempt(line, nonce, one) else AGAIN):
                    await self._attempt(line, nonce, one, until_answered=True)

    async def _forge(self, line: Line, nonce: str) -> None:
        request = push_request(self.target, nonce, push_body(nonce), secret="not the secret")
        while nonce not in self.forged:
            answer = await line.ask(request)
            if answer is not None:
                self.forged[nonce] = answer[0]

    async def _attempt(self, line: Line, nonce: str, one: Posted, *, until_answered: bool = False) -> bool:
        """Post it; return whether there was an answer. A 503 says that it was not taken: it is posted again."""
        request = push_request(self.target, nonce, one.body)
        while True:
            answer = await line.ask(request)
            if answer is None:
                one.unanswered += 1
                if not until_answered:
                    return False
                continue
            self.answered += 1
            status, body = answer
            if 200 <= status < 300:
                said = json.loads(body)
                one.event_ids.append(said["event_id"])
                one.duplicates += bool(said["duplicate"])
                one.acknowledged_at = one.acknowledged_at or time.monotonic()
                return True
            one.refused.append(status)
            if status != 503:
                return True
            await asyncio.sleep(0.2)


class Line:
    """A kept connection to wherever the broker serves; made anew when its process died."""

    def __init__(self, provider: Provider) -> None:
        """Connect at the first request."""
        self._provider = provider
        self._open = contextlib.AsyncExitStack()
        self._wire: Wire | None = None

    async def __aenter__(self) -> Self:
        """Begin unconnected."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Hang up."""
        await self._open.aclose()

    async def ask(self, request: bytes) -> tuple[int, bytes] | None:
        """Return the answer, or None where the process died over it. One that is not there is waited for first."""
        wire = self._wire or await self._connect()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await wire.ask(request)
        except (OSError, EOFError):
            await self._open.aclose()
            self._wire = None
            return None

    async def _connect(self) -> Wire:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    self._wire = await self._open.enter_async_context(connected(self._provider.port))
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    return self._wire


# --- the receiver


@dataclass(frozen=True)
class Arrival:
    """One delivery as it came. ``problem``: why nobody should believe it, "" for none."""

    event_id: str
    nonce: str
    body: bytes
    at: float
    path: str
    headers: Mapping[str, str]
    problem: str


def problem_of(headers: Sequence[tuple[str, str]], body: bytes, secret: str) -> str:
    """Say what is wrong with a delivery's signature (Standard Webhooks 1.0, v1), "" for nothing."""
    named = dict(headers)
    if len(named) != len(headers):
        return "a header came twice"
    missing = {"webhook-id", "webhook-timestamp", "webhook-signature"} - named.keys()
    if missing:
        return f"unsigned: no {', '.join(sorted(missing))}"
    if abs(time.time() - int(named["webhook-timestamp"])) > TOLERANCE_SECONDS:
        return "the timestamp is far away"
    signed = f"{named['webhook-id']}.{named['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    right = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return "" if right in named["webhook-signature"].split(" ") else "the signature is wrong"


Answer = Callable[[Arrival], Awaitable[int]]  # the status to answer with


async def accepts(_: Arrival) -> int:
    """Take it."""
    return 204


@dataclass
class Receiver:
    """A service that takes deliveries. ``secrets``: by path, told once the subscription is made."""

    url: str = ""
    secrets: dict[str, str] = field(default_factory=dict)
    arrivals: list[Arrival] = field(default_factory=list)
    answer: Answer = accepts

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer requests of one connection until it ends."""
        try:
            while True:
                status = await self._take(reader)
                writer.write(f"HTTP/1.1 {status} Whatever\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
        except (OSError, EOFError):
            pass  # the client left
        finally:
            writer.close()

    async def _take(self, reader: asyncio.StreamReader) -> int:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        body = await reader.readexactly(int(dict(headers)["content-length"]))
        path = first.split(" ")[1]
        problem = problem_of(headers, body, self.secrets[path])
        nonce = json.loads(body)["after"] if not problem else ""
        named = dict(headers)
        arrival = Arrival(named.get("webhook-id", ""), nonce, body, time.monotonic(), path, named, problem)
        self.arrivals.append(arrival)
        return await self.answer(arrival)


@contextlib.asynccontextmanager
async def open_receiver(answer: Answer = accepts) -> AsyncIterator[Receiver]:
    """Serve a receiver on a loopback port."""
    receiver = Receiver(answer=answer)
    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        with contextlib.suppress(asyncio.CancelledError):  # the end: asyncio complains of a handler that was cancelled
            await receiver.serve(reader, writer)
        connections.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield receiver
    finally:
        server.close()
        left = list(connections)
        for task in left:
            task.cancel()
        await asyncio.gather(*left)


# --- setting both up, through the API


@contextlib.asynccontextmanager
async def operator(port: int, key: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Give a client of the broker's API with an operator's key."""
    headers = {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False) as client:
        yield client


async def made(client: httpx2.AsyncClient, path: str, body: Mapping[str, object]) -> dict[str, str]:
    """Create something; return what the API says."""
    answer = await client.post(path, json=body, timeout=60)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def make_source(client: httpx2.AsyncClient) -> str:
    """Create a source of GitHub's; return the target of its requests."""
    source = await made(client, "/v1/webhook-sources", {"name": "hooks", "provider": "github", "secret": HOOK_SECRET})
    return f"/webhooks/{source['id']}"


async def subscribe(client: httpx2.AsyncClient, receiver: Receiver, path: str, **more: object) -> str:
    """Subscribe a path of the receiver to pushes; return the subscription's id."""
    body = {"url": receiver.url + path, "event_types": [EVENT_TYPE], **more}
    subscription = await made(client, "/v1/subscriptions", body)
    receiver.secrets[path] = subscription["secret"]
    return subscription["id"]
