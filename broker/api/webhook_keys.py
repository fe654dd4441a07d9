"""``GET /.well-known/webhook-keys.json``: the public keys of the deliveries that the broker signs with ``v1a``."""

from __future__ import annotations

from litestar import Response, Router, get
from litestar.di import NamedDependency

from broker.api import answers
from broker.webhooks.signing_keys import SigningKeys

MAX_AGE_SECONDS = 60


@get("/.well-known/webhook-keys.json", tags=["webhooks"])
async def webhook_keys(signing_keys: NamedDependency[SigningKeys]) -> Response[answers.WebhookKeys]:
    """List the keys that sign deliveries next, now and before, in the form of Standard Webhooks."""
    keys = [answers.WebhookKey(id=key.id, state=key.state, key=key.text) for key in signing_keys.public()]
    return Response(answers.WebhookKeys(keys=keys), headers={"Cache-Control": f"public, max-age={MAX_AGE_SECONDS}"})


def routes() -> Router:
    """Return the route."""
    return Router(path="/", route_handlers=[webhook_keys])
