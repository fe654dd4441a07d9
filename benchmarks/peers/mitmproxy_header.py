"""The peer: mitmproxy's way to put a credential in."""

from __future__ import annotations

from typing import Any


def request(flow: Any) -> None:  # noqa: ANN401 - an HTTPFlow; mitmproxy is installed for itself only
    """Set the header."""
    flow.request.headers["Authorization"] = "Bearer tok_peer"
