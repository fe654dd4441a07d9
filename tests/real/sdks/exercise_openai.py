"""OpenAI's SDK: an answer whole and as events, lists over pages, an upload and a download."""

from __future__ import annotations

from typing import Any


def main(names: dict[str, Any]) -> dict[str, Any]:
    """Return what the calls came to."""
    client = names["client"]
    asked: dict[str, Any] = {"model": "model-1", "messages": [{"role": "user", "content": "Say hello"}]}
    whole = client.chat.completions.create(**asked)
    streamed: list[str] = []
    for event in client.chat.completions.create(**asked, stream=True):
        if not streamed:
            client.models.retrieve("model-1")  # the far side holds the other events back until it has seen this call
        streamed.append(event.choices[0].delta.content or "")
    made = [client.files.create(file=(f"{name}.jsonl", name.encode() * 50_000), purpose="batch") for name in "abcde"]
    return {
        "whole": whole.choices[0].message.content,
        "streamed": streamed,
        "models": [one.id for one in client.models.list()],
        "made": [one.id for one in made],
        "files": [one.id for one in client.files.list(limit=2)],
        "content_is_right": client.files.content(made[1].id).read() == b"b" * 50_000,
    }
