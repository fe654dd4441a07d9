"""The peer: one async Litestar route that returns JSON of a token's shape, and does nothing else."""

from __future__ import annotations

import gc
from typing import Any

from litestar import Litestar, get

ANSWER = {"access_token": "x" * 40, "token_type": "Bearer", "expires_at": None, "scopes": [], "stale": False}


@get("/token")
async def token() -> dict[str, Any]:
    """Answer."""
    return ANSWER


async def settle() -> None:
    """Do as the broker does after start-up."""
    gc.collect()
    gc.freeze()


app = Litestar([token], openapi_config=None, logging_config=None, on_startup=[settle])
