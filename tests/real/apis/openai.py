"""The part of OpenAI's API that its SDK is run against.

Sources: https://platform.openai.com/docs/api-reference (chat, models, files).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message
from email.policy import HTTP
from typing import Any

from tests.real.far_side import Answer, Seen, said

REFUSAL = said(
    401,
    {"error": {"message": "Incorrect API key provided.", "type": "invalid_request_error", "code": "invalid_api_key"}},
)
WORDS = ("Hel", "lo", " wörld")
PATIENCE_SECONDS = 20.0
MODEL = {"id": "model-1", "object": "model", "created": 1, "owned_by": "tests"}


def parts_of(seen: Seen) -> dict[str, Message]:
    """Return the parts of a multipart/form-data body by their names."""
    head = f"content-type: {seen.one('content-type')}\r\n\r\n".encode()
    message = message_from_bytes(head + seen.body, policy=HTTP)
    assert message.is_multipart(), seen.one("content-type")
    return {str(part.get_param("name", header="content-disposition")): part for part in message.iter_parts()}


def bytes_of(part: Message) -> bytes:
    """Return what a part holds."""
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload


@dataclass
class OpenAI:
    """Chat completions, models and files. A stream goes on only when a model was asked for after its first event."""

    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    first_event_came: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, seen: Seen) -> Answer:  # noqa: PLR0911 - a table of routes
        """Answer one request."""
        match (seen.method, *seen.path.removeprefix("/v1/").split("/")):
            case ("POST", "chat", "completions"):
                return self._chat(json.loads(seen.body))
            case ("GET", "models"):
                return said(200, {"object": "list", "data": [MODEL, {**MODEL, "id": "model-2"}]})
            case ("GET", "models", "model-1"):
                self.first_event_came.set()
                return said(200, MODEL)
            case ("POST", "files"):
                return self._upload(seen)
            case ("GET", "files"):
                return self._list(seen.query)
            case ("GET", "files", name, "content") if name in self.files:
                return Answer(200, self.files[name][1], [("content-type", "application/octet-stream")])
        return said(404, {"error": {"message": f"Invalid URL ({seen.method} {seen.path})"}})

    def _chat(self, asked: dict[str, Any]) -> Answer:
        common = {"id": "chatcmpl-1", "created": 1, "model": asked["model"]}
        if asked.get("stream"):
            return Answer(200, self._events(common), [("content-type", "text/event-stream; charset=utf-8")])
        message = {"role": "assistant", "content": "".join(WORDS)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return said(200, {**common, "object": "chat.completion", "choices": [choice]})

    async def _events(self, common: dict[str, Any]) -> AsyncIterator[bytes]:
        for number, word in enumerate(WORDS):
            if number == 1:
                await asyncio.wait_for(self.first_event_came.wait(), PATIENCE_SECONDS)
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            event = {**common, "object": "chat.completion.chunk", "choices": [choice]}
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    def _upload(self, seen: Seen) -> Answer:
        parts = parts_of(seen)
        assert bytes_of(parts["purpose"]) == b"batch"
        name = f"file-{len(self.files) + 1}"
        self.files[name] = (parts["file"].get_filename() or "", bytes_of(parts["file"]))
        return said(200, self._file(name))

    def _file(self, name: str) -> dict[str, Any]:
        filename, content = self.files[name]
        sizes = {"bytes": len(content), "created_at": 1, "status": "processed"}
        return {"id": name, "object": "file", "filename": filename, "purpose": "batch", **sizes}

    def _list(self, query: dict[str, str]) -> Answer:
        names = sorted(self.files)
        start = names.index(query["after"]) + 1 if "after" in query else 0
        end = start + int(query.get("limit", "10000"))
        data = [self._file(name) for name in names[start:end]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return said(200, {"object": "list", "data": data, "has_more": end < len(names), **ends})
