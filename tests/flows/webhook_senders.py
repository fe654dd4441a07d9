"""What sends webhooks in tests: raw requests on a socket, signed as the providers do, and looks at what became of them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from sqlmodel import SQLModel, col, select

from broker.models import WebhookDelivery, WebhookEvent, WebhookRejection, WebhookSeen
from tests.flows.rig import Rig

SECRET = "It's a Secret to Everybody"
PUSH = json.dumps({"ref": "refs/heads/main", "repository": {"id": 7, "full_name": "acme/app"}}).encode()
Fields = Sequence[tuple[str, str]]
_numbers = itertools.count(1)


@dataclass
class Answered:
    """An answer as it stood on the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def github_fields(body: bytes, *, secret: str = SECRET, event: str = "push", delivery: str | None = None) -> Fields:
    """Return the fields that GitHub sends with a body."""
    digest = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return [
        ("Content-Type", "application/json"),
        ("User-Agent", "GitHub-Hookshot/0123456"),
        ("X-GitHub-Event", event),
        ("X-GitHub-Delivery", delivery or f"delivery-{next(_numbers)}"),
        ("X-Hub-Signature-256", f"sha256={digest}"),
    ]


def with_field(fields: Fields, name: str, *values: str) -> Fields:
    """Return fields with a name's values replaced by these, in order."""
    kept = [(one, value) for one, value in fields if one.lower() != name.lower()]
    return [*kept, *((name, value) for value in values)]


async def exchange(rig: Rig, raw: bytes) -> Answered:
    """Send bytes as they are on a connection of their own, and read one answer."""
    place = urlsplit(rig.base)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        writer.write(raw)
        async with asyncio.timeout(30):
            return await read_answer(reader)
    finally:
        writer.close()
        await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader) -> Answered:
    """Read one answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answered(int(head[0].split()[1]), headers, body)


def raw_request(target: str, fields: Fields, body: bytes, *, method: str = "POST") -> bytes:
    """Return a request as bytes, with its length."""
    lines = [f"{method} {target} HTTP/1.1", "Host: broker.test", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode("latin-1") + body


async def post(rig: Rig, target: str, fields: Fields, body: bytes, *, method: str = "POST") -> Answered:
    """Send a request to a path of the broker."""
    return await exchange(rig, raw_request(target, fields, body, method=method))


async def new_source(rig: Rig, provider: str = "github", *, secret: str | None = SECRET, **fields: Any) -> str:
    """Make a source and return its id."""
    made = await rig.call(
        "POST",
        "/v1/webhook-sources",
        {"name": f"source-{next(_numbers)}", "provider": provider, "secret": secret, **fields},
    )
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def new_subscription(rig: Rig, *event_types: str, **fields: Any) -> str:
    """Make a subscription to an address where nobody listens, and return its id."""
    body = {"url": "http://127.0.0.1:9/hooks", "event_types": list(event_types), **fields}
    made = await rig.call("POST", "/v1/subscriptions", body)
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def rows(rig: Rig, table: type[SQLModel], **equal: Any) -> list[Any]:
    """Return the rows of a table that have these values."""
    query = select(table).where(*(getattr(table, name) == value for name, value in equal.items()))
    return await rig.parts.database.read(lambda session: list(session.exec(query)))


async def events_of(rig: Rig, source_id: str) -> list[WebhookEvent]:
    """Return a source's events in their order."""
    query = select(WebhookEvent).where(WebhookEvent.source_id == source_id).order_by(col(WebhookEvent.number))
    return await rig.parts.database.read(lambda session: list(session.exec(query)))


async def deliveries_of(rig: Rig, event_id: str) -> list[WebhookDelivery]:
    """Return an event's deliveries."""
    return await rows(rig, WebhookDelivery, event_id=event_id)


async def seen_of(rig: Rig, source_id: str) -> list[WebhookSeen]:
    """Return what tells twins of a source's events."""
    return await rows(rig, WebhookSeen, source_id=source_id)


async def rejections_of(rig: Rig, source_id: str) -> list[WebhookRejection]:
    """Return what a source's log has."""
    return await rows(rig, WebhookRejection, source_id=source_id)


async def execute(rig: Rig, statement: str) -> None:
    """Change the database behind the broker's back."""
    await rig.parts.database.transaction(lambda session: session.execute(sa.text(statement)))
