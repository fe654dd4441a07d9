"""Clients that prove themselves by signing (``private_key_jwt``): their secret is a key, from the first day to each request."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from broker.settings import SettingsError
from tests.fakes import Fake, Reply, Seen, listening
from tests.flows.api_calls import check_problem, unused
from tests.flows.rig import APP, Rig, open_rig
from tests.flows.shared import browser_of, parameters, start

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = ECKey.generate_key("P-256")
PEM = KEY.as_pem(private=True).decode()
OTHER = ECKey.generate_key("P-256").as_pem(private=True).decode()
PUBLIC = KEY.as_pem(private=False).decode()
SIGNS = {"client_auth": "private_key_jwt"}


async def make(rig: Rig, *, config: dict[str, Any], secret: str | None) -> tuple[str, Any]:
    """Ask for an integration of the generic provider; return its name and the answer."""
    name = unused("signing-")
    urls = {"issuer": rig.sandbox.issuer, **config}
    body = {"name": name, "provider": "oidc", "client_id": "signer", "config": urls}
    return name, await rig.call(
        "POST", "/v1/integrations", body if secret is None else {**body, "client_secret": secret}
    )


async def add(rig: Rig, name: str, secret: str) -> Any:
    """Add a client secret."""
    return await rig.call("POST", f"/v1/integrations/{name}/client-secrets", {"client_secret": secret})


async def secret_ids(rig: Rig, name: str) -> list[str]:
    """Return the ids of the live client secrets."""
    listed = await rig.call("GET", f"/v1/integrations/{name}/client-secrets")
    return [one["id"] for one in listed.json()["data"]]


@pytest.mark.parametrize("secret", ["CANARY-no-key", PUBLIC])
async def test_a_client_secret_that_cannot_sign_is_refused_wherever_it_comes(shared: Rig, secret: str) -> None:
    name, refused = await make(shared, config=SIGNS, secret=secret)
    check_problem(refused, 400, "invalid_request", "/client_secret")
    assert secret not in refused.text
    assert (await shared.call("GET", f"/v1/integrations/{name}")).status_code == 404
    name, made = await make(shared, config=SIGNS, secret=PEM)
    assert made.status_code == 201, made.text
    check_problem(await add(shared, name, secret), 400, "invalid_request", "/client_secret")
    patched = await shared.call("PATCH", f"/v1/integrations/{name}", {"client_secret": secret})
    check_problem(patched, 400, "invalid_request", "/client_secret")
    assert (await add(shared, name, OTHER)).status_code == 201
    assert len(await secret_ids(shared, name)) == 2


async def test_a_change_to_signing_is_refused_while_a_live_secret_cannot_sign(shared: Rig) -> None:
    name, made = await make(shared, config={}, secret="a-plain-secret")
    assert made.status_code == 201
    path = f"/v1/integrations/{name}"
    check_problem(await shared.call("PATCH", path, {"config": SIGNS}), 400, "invalid_request", "/config/client_auth")
    both = await shared.call("PATCH", path, {"config": SIGNS, "client_secret": PEM})
    check_problem(both, 400, "invalid_request", "/config/client_auth")
    (plain,) = await secret_ids(shared, name)
    assert (await add(shared, name, PEM)).status_code == 201
    await shared.call("DELETE", f"{path}/client-secrets/{plain}")
    assert (await shared.call("PATCH", path, {"config": SIGNS})).status_code == 200
    (key,) = await secret_ids(shared, name)
    await shared.call("DELETE", f"{path}/client-secrets/{key}")
    assert (await shared.call("PATCH", path, {"config": {"client_auth": None}})).status_code == 200
    assert (await add(shared, name, "a-plain-secret")).status_code == 201


@pytest.mark.parametrize("before", ["private_key_jwt", None])
@pytest.mark.parametrize("key", [PEM, json.dumps(KEY.as_dict(private=True))])
async def test_a_private_key_never_becomes_a_secret_that_is_sent(shared: Rig, before: str | None, key: str) -> None:
    name, made = await make(shared, config={"client_auth": before}, secret=key)
    assert made.status_code == 201, made.text
    operator = await shared.caller(roles=("operator",))
    for after in sorted({"client_secret_basic", "client_secret_post"}) + ([None] if before else []):
        patch = {"config": {"client_auth": after}}
        answer = await shared.call("PATCH", f"/v1/integrations/{name}", patch, key=operator)
        check_problem(answer, 400, "invalid_request", "/config/client_auth")
        assert key[:30] not in answer.text


async def test_a_document_is_refused_before_anything_is_written_when_its_key_cannot_sign(shared: Rig) -> None:
    name, made = await make(shared, config={}, secret="a-plain-secret")
    assert made.status_code == 201
    passphrase = {"X_Broker_Passphrase": "a long passphrase"}
    document = (await shared.call("GET", "/v1/integrations/export", **passphrase)).json()
    document["integrations"] = [one for one in document["integrations"] if one["name"] == name]
    document["integrations"][0]["config"] |= SIGNS
    whole = await shared.call("POST", "/v1/integrations/import", document, **passphrase)
    assert whole.status_code == 400, whole.text
    shown = (await shared.call("GET", f"/v1/integrations/{name}")).json()
    assert "client_auth" not in shown["config"]


@asynccontextmanager
async def signing_provider(seen_at: list[Seen], method: str = "private_key_jwt") -> AsyncIterator[Fake]:
    """Serve an issuer that takes nothing but ``private_key_jwt``, or says that it takes another."""
    fakes: list[Fake] = []

    def answer(seen: Seen) -> Reply:
        base = fakes[0].base
        if seen.path == "/.well-known/openid-configuration":
            named = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "jwks"}
            urls = {name: f"{base}/{path}" for name, path in named.items()}
            return 200, {"issuer": base, **urls, "token_endpoint_auth_methods_supported": [method]}
        if seen.path == "/jwks":
            return 200, {"keys": []}
        seen_at.append(seen)
        good = signed(seen, f"{base}/token")
        if seen.form.get("grant_type") == "client_credentials":
            return (200, {"access_token": "minted", "expires_in": 600}) if good else (401, {"error": "invalid_client"})
        return 400, {"error": "invalid_grant" if good else "invalid_client"}

    async with listening(answer) as fake:
        fakes.append(fake)
        yield fake


def signed(seen: Seen, audience: str) -> bool:
    """Whether a request for tokens proves the client by its key, and sends no secret."""
    claims = jwt.decode(seen.form["client_assertion"], KEY, algorithms=["ES256"]).claims
    assert (claims["iss"], claims["sub"], claims["aud"]) == ("signer", "signer", audience)
    assert seen.form["client_assertion_type"] == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
    return "client_secret" not in seen.form and "authorization" not in seen.headers


async def test_an_issuer_that_takes_nothing_else_is_found_out_by_discovery_and_by_the_test(shared: Rig) -> None:
    asked: list[Seen] = []
    async with signing_provider(asked) as fake:
        name, made = await make(shared, config={"issuer": fake.base}, secret=PEM)
        assert made.status_code == 201, made.text
        verdict = (await shared.call("POST", f"/v1/integrations/{name}/test")).json()
        assert (verdict["ok"], len(asked)) == (True, 1)
        body = {"integration": name, "subject": "acme:1", "credentials": {"type": "client_credentials", "scopes": []}}
        connection = (await shared.call("POST", "/v1/connections", body)).json()
        assert (await shared.token(connection["id"])).json()["access_token"] == "minted"
        browser = browser_of(shared)
        url = (await start(browser, name, return_to=APP)).headers["location"]
        came = await browser.get(f"/oauth/{name}/callback?code=c&state={parameters(url)['state']}")
        assert parameters(came.headers["location"])["error"] == "exchange_failed"
        assert asked[-1].form["code"] == "c"


async def test_a_secret_that_discovery_shows_to_be_no_key_is_named_by_the_test_and_refused_by_an_import(
    shared: Rig,
) -> None:
    asked: list[Seen] = []
    async with signing_provider(asked) as fake:
        name, _ = await make(shared, config={"issuer": fake.base}, secret="CANARY-plain")
        verdict = await shared.call("POST", f"/v1/integrations/{name}/test")
        assert verdict.json()["ok"] is False
        assert "private key" in verdict.json()["checks"][-1]["detail"]
        body = {"integration": name, "subject": "acme:1", "credentials": {"type": "client_credentials"}}
        refused = await shared.call("POST", "/v1/connections", body)
        check_problem(refused, 400, "invalid_request", "/credentials")
        assert "CANARY" not in verdict.text + refused.text
        assert asked == []


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
async def test_an_issuer_that_says_it_wants_a_secret_never_gets_the_key(shared: Rig, method: str) -> None:
    asked: list[Seen] = []
    async with signing_provider(asked, method) as fake:
        name, made = await make(shared, config={"issuer": fake.base}, secret=PEM)
        assert made.status_code == 201, made.text
        old = {"type": "oauth2", "access_token": "a", "refresh_token": "r", "expires_at": "2020-01-01T00:00:00Z"}
        body = {"integration": name, "subject": "acme:1", "credentials": old}
        connection = (await shared.call("POST", "/v1/connections", body)).json()
        assert (await shared.token(connection["id"])).status_code == 502
        assert asked == []


async def test_settings_whose_client_secret_cannot_sign_stop_the_start_and_are_named(tmp_path: Path) -> None:
    one = {"name": "signing", "provider": "oidc", "client_id": "c", "client_secret": "CANARY-plain"}
    config = {"issuer": "https://id.test", **SIGNS}
    file = tmp_path / "integrations.json"
    file.write_text(json.dumps({"integrations": [{**one, "config": config}]}))
    with pytest.raises(SettingsError) as refused:
        async with open_rig(tmp_path, integrations_file=file):
            pass
    assert "BROKER_INTEGRATIONS_FILE: integration signing: /client_secret" in str(refused.value)
    assert "CANARY" not in str(refused.value)
