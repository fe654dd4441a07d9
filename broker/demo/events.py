"""What the guided run needs to show webhooks: a sender's signed event, and an application that takes deliveries."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from broker.demo.stage import listening, origin_of, serving
from providers import load_catalog
from providers.receiving import sign_sample, verify
from providers.spec import Received, Sample, Secret, SourceKeys, Verified

SENDER = "standard_webhooks"  # the scheme of many senders, and of the broker's own deliveries
BODY = b'{"type": "note.shared",  "note": {"id": 7, "by": "ada"}}'


def signed_event(url: str, secret: str) -> Received:
    """Return an event as a sender posts it to a source."""
    webhook = load_catalog()[SENDER].webhooks[""]
    return sign_sample(webhook, Sample("note.shared", url, time.time(), "msg_1", BODY), Secret(secret))


def is_genuine(delivery: Received, secret: str) -> bool:
    """Whether a delivery is signed with a subscription's secret, as an application finds it out."""
    keys = SourceKeys((Secret(secret),), time.time())
    try:
        next(verify(SENDER, load_catalog()[SENDER].webhooks[""], delivery, keys))
    except StopIteration as done:
        return isinstance(done.value, Verified)
    return False


@contextlib.asynccontextmanager
async def an_application() -> AsyncIterator[tuple[str, asyncio.Queue[Received]]]:
    """Run an application that answers every delivery with 204; give its address, and what arrives."""
    arrivals: asyncio.Queue[Received] = asyncio.Queue()

    async def take(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI
        pieces, more = [], True
        while more:
            message = await receive()
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        arrivals.put_nowait(Received(scope["method"], "", tuple(map(tuple, scope["headers"])), b"".join(pieces)))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with listening(0) as listener:
        async with serving(take, listener):
            yield f"{origin_of(listener)}/hooks", arrivals
