"""Follows the events of a running broker, and posts each to an application, signed as a delivery is."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlencode

from broker.cli.remote import Answer, NoAnswer, Remote
from broker.cli.running import Refused
from broker.webhooks.configured import Receiver, Rule
from broker.webhooks.matching import EventBody, wants
from broker.webhooks.signing import Fields, Sent, fields_of
from providers.spec import Secret

IDLE_SECONDS: Final = 45.0  # the broker says something every 15
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0
BEFORE_ALL: Final = f"evt_{'0' * 26}"  # no event has it, so everything that is kept comes after it
COMES_BACK: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
NOT_PASSED: Final = frozenset(
    {b"host", b"content-length", b"content-type", b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding"}
    | {b"upgrade", b"expect", b"accept-encoding", b"authorization", b"cookie", b"forwarded", b"via", b"x-real-ip"}
)
OURS: Final = (b"webhook-", b"x-broker-", b"x-forwarded-", b"proxy-")


@dataclass(frozen=True, slots=True)
class Broker:
    """A running broker: its address, and the key of a caller that may have events."""

    remote: Remote
    base: str
    key: Secret = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """The fields of each request."""
        return {"authorization": f"Bearer {self.key.reveal()}"}

    async def get(self, path: str) -> Answer:
        """Ask for JSON. Raises ``NoAnswer``."""
        fields = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        return await self.remote.send("GET", self.base + path, fields)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events: all that fit. ``types``: globs as in a subscription."""

    source_id: str | None
    types: Sequence[str]

    @property
    def query(self) -> str:
        """What the broker itself narrows the stream by."""
        parts = {"source_id": self.source_id, "type": self.types[0] if len(self.types) == 1 else None}
        given = {name: value for name, value in parts.items() if value is not None}
        return f"?{urlencode(given)}" if given else ""

    def fits(self, event_type: str) -> bool:
        """Return whether an event of this type is one of them."""
        rule = Rule("", tuple(self.types), None, {}, None)
        return not self.types or wants(rule, event_type, None, EventBody(b"", None))


async def follow(broker: Broker, wanted: Wanted, lost: Callable[[str], None]) -> AsyncGenerator[dict[str, Any]]:
    """Yield what the stream tells of each event from now on, without end and without a gap.

    A stream that breaks is opened again behind the last event that was yielded; ``lost`` is told why, each time. Raises
    ``Refused`` for an answer that another try does not change.
    """
    last_id, pause = None, FIRST_PAUSE_SECONDS
    while True:
        try:
            last_id = last_id or await _newest(broker)
            async with aclosing(_told(broker, wanted, last_id)) as events:
                async for event in events:
                    if wanted.fits(str(event["type"])):
                        yield event
                    last_id, pause = str(event["id"]), FIRST_PAUSE_SECONDS
            why = "the broker ended the stream"
        except NoAnswer as failure:
            why = str(failure)
        lost(f"{why}; again in {pause:g} s")
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


async def _newest(broker: Broker) -> str:
    """Return the id of the newest event that has its place in the order; what comes is whatever follows it."""
    cursor: str | None = ""
    while cursor is not None:  # pages may begin with many that wait for their place, and be short for who may see few
        page = json.loads(_taken(await broker.get(f"/v1/events?limit=200{cursor}")).body)
        placed = [event["id"] for event in page["data"] if event["number"] is not None]
        if placed:
            return str(placed[0])
        following = page.get("next_cursor")
        cursor = None if following is None else f"&{urlencode({'cursor': following})}"
    return BEFORE_ALL


async def _told(broker: Broker, wanted: Wanted, last_id: str) -> AsyncGenerator[dict[str, Any]]:
    headers = {**broker.headers, "accept": "text/event-stream", "last-event-id": last_id}
    url = f"{broker.base}/v1/events/stream{wanted.query}"
    async with broker.remote.stream(url, headers, idle_seconds=IDLE_SECONDS) as stream:
        if stream.status != 200:
            _taken(Answer(stream.status, b"".join([piece async for piece in stream.pieces])))
        async for data in messages(stream.pieces):
            yield json.loads(data)


def _taken(answer: Answer) -> Answer:
    """Return a good answer. Raises ``NoAnswer`` for one that another try may change, ``Refused`` for any other."""
    if answer.status == 200:
        return answer
    if answer.status in COMES_BACK:
        raise NoAnswer(f"the broker answered {answer.status}")
    raise Refused(f"the broker answered {answer.status} {answer.shown}")


async def messages(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Yield the data of each message of an event stream (WHATWG HTML, 9.2.6), however it is cut into pieces.

    Comments and all other fields are passed over. Lines end by LF or CRLF, as the broker writes them.
    """
    rest, data = b"", list[bytes]()
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in (one.removesuffix(b"\r") for one in lines):
            if line.startswith(b"data:"):
                data.append(line.removeprefix(b"data:").removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data).decode()
                data.clear()


@dataclass(frozen=True, slots=True)
class Forwarding:
    """Where events go, and the secret that signs them."""

    url: str
    secret: Secret = field(repr=False)

    def fields(self, event: dict[str, Any], body: bytes, *, at: int) -> Fields:
        """Return the fields of a delivery, and with them those of the provider that say something of the event. Pure."""
        sent = Sent(
            event["id"],
            event["type"],
            event["source_id"],
            event["connection_id"],
            event["provider_event_id"],
            event["content_type"],
            replay=False,
        )
        receiver = Receiver("", self.url, "v1", (self.secret,), None, 1, 30.0, None)
        theirs = ((name.lower().encode(), value.encode()) for name, value in event["headers"])
        kept = tuple(pair for pair in theirs if pair[0] not in NOT_PASSED and not pair[0].startswith(OURS))
        return (*fields_of(sent, receiver, (), body, at=at), *kept)


async def forwarded(broker: Broker, event_id: str, to: Forwarding) -> dict[str, Any]:
    """Fetch an event and post it on; return what came of it. Raises ``Refused`` where the key may not have bodies."""
    began = time.monotonic()
    try:
        answer = await broker.get(f"/v1/events/{event_id}")
        if answer.status == 404:
            return {"status": None, "error": "the event is gone"}
        event = json.loads(_taken(answer).body)
        if event["body"] is None:
            raise Refused("this key may not have the bodies of events")
        body = base64.b64decode(event["body"])
        posted = await broker.remote.send("POST", to.url, to.fields(event, body, at=int(time.time())), body)
    except NoAnswer as failure:
        return {"status": None, "error": str(failure)}
    return {"status": posted.status, "milliseconds": round((time.monotonic() - began) * 1000)}
