"""Anthropic's SDK: an answer whole and as events, and a list over pages."""

from __future__ import annotations

from typing import Any


def main(names: dict[str, Any]) -> dict[str, Any]:
    """Return what the calls came to."""
    client = names["client"]
    messages = [{"role": "user", "content": "Say hello"}]
    asked: dict[str, Any] = {"model": "model-1", "max_tokens": 16, "messages": messages}
    with client.messages.stream(**asked) as stream:
        streamed = list(stream.text_stream)
    return {
        "whole": client.messages.create(**asked).content[0].text,
        "streamed": streamed,
        "models": [one.id for one in client.models.list(limit=2)],
    }
