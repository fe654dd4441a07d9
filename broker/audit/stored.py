"""Reading rows back as they were written: what an attacker left in them comes back as text."""

from __future__ import annotations

from typing import Any

from broker.audit.chain import Row, canonical, strict_json


def parsed_row(row: Row) -> dict[str, Any]:
    """Return a stored row with its detail as JSON; with all as text where we would not have written it so. Pure."""
    try:
        parsed = {**row, "detail": strict_json(row["detail"])}
        canonical(parsed).encode()
    except (TypeError, ValueError, RecursionError):
        return {name: value if isinstance(value, int | None) else str(value) for name, value in row.items()}
    return parsed
