"""python-gitlab on a list whose second page is said to be on another host; what it does with its key is watched."""

from __future__ import annotations

from typing import Any


def main(names: dict[str, Any]) -> dict[str, Any]:
    """Return the items that came, and whether the walk ended in an error."""
    items = names["gitlab"].broadcastmessages.list(iterator=True)
    got: list[int] = []
    failed = False
    try:
        got.extend(one.id for one in items)
    except OSError:
        failed = True
    return {"items": got, "failed": failed}
