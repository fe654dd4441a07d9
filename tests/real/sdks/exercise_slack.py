"""Slack's SDK: who the token is, a list by cursors, a message, an upload to the address that Slack names."""

from __future__ import annotations

from typing import Any


def main(names: dict[str, Any]) -> dict[str, Any]:
    """Return what the calls came to."""
    client = names["client"]
    channels = [one for page in client.conversations_list(limit=2) for one in page["channels"]]
    (room,) = (one["id"] for one in channels if one["name"] == "rockets")
    message = client.chat_postMessage(channel=room, text="Lift-off ✓")
    file = client.files_upload_v2(channel=room, filename="plan.txt", content="T minus 10", title="Plan")["file"]
    return {
        "user": client.auth_test()["user"],
        "channels": [one["name"] for one in channels],
        "text": message["message"]["text"],
        "file": file["title"],
    }
