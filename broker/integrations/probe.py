"""Makes the real calls that prove or disprove an integration's configuration."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal

from broker.egress import Egress
from broker.errors import BrokerError
from broker.integrations import Configured, Integrations
from broker.token_endpoint import Client, TokenRefusal, exchange_request, new_verifier, parse_answer
from providers.spec import Secret


async def probe(integrations: Integrations, egress: Egress, name: str) -> dict[str, Any]:
    """Return ``{ok, checks: [{name, ok, detail}]}`` and keep the verdict as the integration's status (NotFound).

    Discovery and JWKS where there are any, then the token endpoint with a made-up code: "invalid grant" proves the client's
    credentials, "client refused" disproves them. Details are ours and hold no upstream text.
    """
    await integrations.begin_test(name)
    started = time.monotonic()
    checks = await _checks(integrations, egress, name)
    problem = next((check["detail"] for check in checks if not check["ok"]), None)
    await integrations.end_test(name, problem)
    await integrations.note(
        name,
        action="test",
        level="error" if problem else "info",
        text=problem or "the test passed",
        duration_ms=(time.monotonic() - started) * 1000,
    )
    return {"ok": problem is None, "checks": checks}


async def _checks(integrations: Integrations, egress: Egress, name: str) -> list[dict[str, Any]]:
    try:
        configured = await integrations.configured(name)
    except BrokerError as error:
        return [_check("discovery", error.detail)]
    stale = "does not answer; the endpoints are those that were discovered before"
    checks = [_check("discovery", stale if integrations.is_stale(configured) else None)]
    jwks_url = configured.endpoints.urls["jwks_url"]
    if jwks_url and configured.oauth2.openid:
        checks.append(await _jwks(integrations, jwks_url))
    if configured.provider.oauth2 is not None:
        checks.append(await _client(integrations, egress, configured))
    return checks


async def _jwks(integrations: Integrations, url: str) -> dict[str, Any]:
    try:
        await integrations.jwks(url)
    except BrokerError as error:
        return _check("jwks", error.detail)
    return _check("jwks", None)


async def _client(integrations: Integrations, egress: Egress, configured: Configured) -> dict[str, Any]:
    try:
        client = await integrations.client(configured)
        if not client.client_id:
            return _check("client", "the client id is missing")
        if not configured.endpoints.urls["token_url"]:
            return _check(
                "client", "the token endpoint has a variable that neither a default nor config.variables fills"
            )
        proof = await proof_of(integrations, egress, configured, client.secrets[0] if client.secrets else None)
    except BrokerError as error:
        return _check("client", error.detail)
    return _check("client", _SAID[proof])


async def proof_of(
    integrations: Integrations, egress: Egress, configured: Configured, secret: Secret | None
) -> Literal["proved", "refused", "odd"]:
    """Send a made-up code with this client secret to the token endpoint; return what the answer says of the secret.

    ``proved``: the code was refused, not the client. Raises NotSent when the client cannot prove itself, and what a request
    that found no answer raises. There has to be a token endpoint.
    """
    client = Client(configured.row.client_id, (secret,) if secret is not None else (), configured.endpoints.client_auth)
    request = exchange_request(
        configured.oauth2,
        token_url=configured.endpoints.urls["token_url"],
        client=client,
        secret=secret,
        code=Secret(f"made-up-{secrets.token_hex(8)}"),
        redirect_uri=integrations.redirect_uri(configured.row.name),
        verifier=new_verifier(),
        now=time.time(),
    )
    answer = await egress.send(request, timeout_seconds=configured.config.timeout_seconds)
    parsed = parse_answer(configured.oauth2, answer, received_at=0.0)
    outcome = parsed.outcome if isinstance(parsed, TokenRefusal) else "invalid"
    return "proved" if outcome == "permanent" else "refused" if outcome == "client_refused" else "odd"


_SAID: Mapping[str, str | None] = {
    "proved": None,
    "refused": "the provider refused the client id or secret",
    "odd": "the token endpoint answered something else than a refusal of the made-up code",
}


def _check(name: str, problem: str | None) -> dict[str, Any]:
    return {"name": name, "ok": problem is None, "detail": problem or "fine"}
