"""The peer: a raw ASGI application that checks GitHub's signature over the body and answers; it keeps nothing."""

from __future__ import annotations

import gc
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

HOOKS = json.loads(Path(__file__).with_name("hooks.json").read_text(encoding="ascii"))
SECRET = HOOKS[0]["trigger-rule"]["match"]["secret"].encode()
FIELD = b"x-hub-signature-256"
Message = MutableMapping[str, Any]


async def app(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    """Answer 202 where the signature is right, else 401; GET is answered at once, so that one can wait for the start."""
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    right = scope["method"] == "GET" or _is_signed(scope, await _body(receive))
    status, body = (202, b'{"accepted":true}') if right else (401, b'{"accepted":false}')
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
    await receive()
    gc.collect()
    gc.freeze()  # as the broker does after start-up
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


async def _body(receive: Callable[[], Awaitable[Message]]) -> bytes:
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


def _is_signed(scope: Message, body: bytes) -> bool:
    given = next((value for name, value in scope["headers"] if name == FIELD), b"")
    return hmac.compare_digest(given, b"sha256=" + hmac.digest(SECRET, body, hashlib.sha256).hex().encode())
