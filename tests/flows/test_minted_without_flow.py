"""Tokens of providers that mint but have no OAuth flow: the address for tokens is one of their named hosts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.fakes import Reply, Seen, listening
from tests.flows.rig import Rig
from tests.flows.shared import opened_rig, subject
from tests.providers.keys import RSA_PEM, opened

pytestmark = pytest.mark.asyncio(loop_scope="module")
EMAIL = "push@acme.iam.gserviceaccount.com"
KEY = {"type": "service_account", "private_key_id": "k1", "private_key": RSA_PEM, "client_email": EMAIL}
WAYS: list[tuple[str, dict[str, Any], str]] = [
    ("fcm", {"type": "service_account", "key": KEY}, "assertion"),
    ("twilio", {"type": "client_credentials"}, "client_secret"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give one broker to the whole file."""
    async with opened_rig(tmp_path_factory.mktemp("minted-without-flow")) as made:
        yield made


def mint(seen: Seen) -> Reply:
    """Answer as a token endpoint, strict about the proof."""
    form = seen.form
    if "assertion" in form:
        good = opened(form["assertion"])[1]["iss"] == EMAIL
    else:
        good = (form["client_id"], form["client_secret"]) == ("client-1", "the-secret")
    if (seen.method, seen.path, good) != ("POST", "/tokens/token", True):
        return 401, {"error": "invalid_client"}
    return 200, {"access_token": "minted-1", "token_type": "Bearer", "expires_in": 3600}


@pytest.mark.parametrize(("provider", "credentials", "proof"), WAYS, ids=[way[0] for way in WAYS])
async def test_an_import_mints_at_the_host_for_tokens(
    rig: Rig, provider: str, credentials: dict[str, Any], proof: str
) -> None:
    async with listening(mint) as fake:
        name = subject().replace(":", "-")
        body = {"name": name, "provider": provider, "config": {"hosts": {"oauth": f"{fake.base}/tokens"}}}
        if proof == "client_secret":
            body.update({"client_id": "client-1", "client_secret": "the-secret"})
        made = await rig.call("POST", "/v1/integrations", body)
        assert made.status_code == 201, made.text
        wanted = {"integration": name, "subject": subject(), "credentials": credentials}
        came = await rig.call("POST", "/v1/connections", wanted)
        assert came.status_code == 201, came.text
        assert fake.seen == []
        answer = await rig.token(came.json()["id"])
        assert answer.status_code == 200, answer.text
        assert answer.json()["access_token"] == "minted-1"
        assert [proof in seen.form for seen in fake.seen] == [True]
