"""``GET /.well-known/jwks.json``: the public keys of the tokens that the broker signs."""

from __future__ import annotations

from typing import Any, TypedDict

from litestar import Response, Router, get
from litestar.di import NamedDependency

from broker.callers import Callers

MAX_AGE_SECONDS = 60


class KeySet(TypedDict):
    """A set of keys (RFC 7517)."""

    keys: list[dict[str, Any]]


@get("/.well-known/jwks.json", tags=["callers"])
async def jwks(callers: NamedDependency[Callers]) -> Response[KeySet]:
    """List the keys that sign tokens next, now and before (RFC 7517)."""
    body: KeySet = {"keys": callers.tokens.exchange.public_keys()}
    return Response(body, headers={"Cache-Control": f"public, max-age={MAX_AGE_SECONDS}"})


def routes() -> Router:
    """Return the route."""
    return Router(path="/", route_handlers=[jwks])
