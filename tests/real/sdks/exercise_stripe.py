"""Stripe's SDK: two creates under one idempotency key, a list over pages, and an upload to its address for files."""

from __future__ import annotations

import io
from typing import Any


def main(names: dict[str, Any]) -> dict[str, Any]:
    """Return what the calls came to."""
    customers = names["client"].v1.customers
    made = customers.create({"email": "ada@example.com", "name": "Ada"}, {"idempotency_key": "order-42"})
    file = names["client"].v1.files.create({"purpose": "dispute_evidence", "file": io.BytesIO(b"evidence")})
    return {
        "file": file.id,
        "made": made.id,
        "email": customers.retrieve(made.id).email,
        "listed": [one.id for one in customers.list({"limit": 2}).auto_paging_iter()],
    }
