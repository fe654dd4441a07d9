"""Calls another host, which has to be stopped and told."""

from __future__ import annotations

import os
import urllib.request
from typing import Any


def main(_: dict[str, Any]) -> dict[str, Any]:
    """Return whether the call went through."""
    try:
        urllib.request.urlopen(os.environ["ELSEWHERE"])  # noqa: S310 - an address of the test
    except OSError:
        return {"went_through": False}
    return {"went_through": True}
