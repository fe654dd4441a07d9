"""The part of Anthropic's API that its SDK is run against.

Sources: https://docs.anthropic.com/en/api/messages, https://docs.anthropic.com/en/api/messages-streaming,
https://docs.anthropic.com/en/api/models-list, https://docs.anthropic.com/en/api/versioning.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

from tests.real.far_side import Answer, Seen, said

REFUSAL = said(
    401, {"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"}, "request_id": "r"}
)
WORDS = ("Hel", "lo", " wörld")
MODELS = [{"type": "model", "id": f"model-{number}", "display_name": "", "created_at": ""} for number in range(5)]
USAGE = {"input_tokens": 1, "output_tokens": 3}


async def anthropic(seen: Seen) -> Answer:
    """Answer one request, which has to name the version of the API."""
    if not re.fullmatch(r"20\d\d-\d\d-\d\d", seen.one("anthropic-version")):
        message = "anthropic-version: header is required"
        return said(400, {"type": "error", "error": {"type": "invalid_request_error", "message": message}})
    if (seen.method, seen.path) == ("GET", "/v1/models"):
        return _models(seen.query)
    asked = json.loads(seen.body)
    if asked.get("stream"):
        return Answer(200, _events(), [("content-type", "text/event-stream; charset=utf-8")])
    return said(200, _message([{"type": "text", "text": "".join(WORDS)}]))


def _message(content: list[dict[str, str]]) -> dict[str, Any]:
    ends = {"stop_reason": "end_turn", "stop_sequence": None, "usage": USAGE}
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": "model-1", "content": content, **ends}


async def _events() -> AsyncIterator[bytes]:
    yield _event({"type": "message_start", "message": _message([])})
    yield _event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    for word in WORDS:
        yield _event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}})
    yield _event({"type": "content_block_stop", "index": 0})
    yield _event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}})
    yield _event({"type": "message_stop"})


def _event(value: dict[str, Any]) -> bytes:
    return f"event: {value['type']}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _models(query: dict[str, str]) -> Answer:
    names = [one["id"] for one in MODELS]
    start = names.index(query["after_id"]) + 1 if "after_id" in query else 0
    page = MODELS[start : start + int(query.get("limit", "20"))]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"], "has_more": page[-1] != MODELS[-1]}
    return said(200, {"data": page, **ends})
