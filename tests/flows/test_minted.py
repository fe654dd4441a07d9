"""Tokens that are minted without a user, through real HTTP: imported once, minted when asked for, and shared until they end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_plus

import httpx2
import pytest
import pytest_asyncio
from joserfc.errors import JoseError
from structlog.testing import capture_logs

from broker.background_refresh import BackgroundRefresh
from broker.database import now
from broker.models import epoch_of
from tests.fakes import Fake, Reply, Seen, listening
from tests.flows.rig import Rig
from tests.flows.shared import opened_rig, subject
from tests.flows.time_passes import ends_in, row_of, set_row, wait_is_over
from tests.providers.keys import RSA_JWK, RSA_PEM, opened

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECRET = "the-client-secret-CANARY"
HOUR_SECONDS = 3600
GOOGLE_TOKEN_URL = "https://oauth2.googleapis.com/token"
EMAIL = "robot@my-project.iam.gserviceaccount.com"
KEY = {
    "type": "service_account",
    "project_id": "my-project",
    "private_key_id": "0123456789abcdef",
    "private_key": RSA_PEM,
    "client_email": EMAIL,
    "token_uri": "https://evil.example.test/token",
}
GITHUB_APP = {"app_id": "Iv23liABCDEFGHIJKLMN", "installation_id": "27776345", "private_key": RSA_PEM}


@dataclass
class Mint:
    """Three providers that mint, on one port: strict about the proof, and each token comes once.

    ``secrets`` are the client's good ones. ``key_deleted``: the key was taken away. ``suspended``: for now.
    """

    secrets: set[str] = field(default_factory=lambda: {SECRET})
    key_deleted: bool = False
    suspended: bool = False
    minted: list[str] = field(default_factory=list)

    def answer(self, seen: Seen) -> Reply:
        """Answer one request as the provider whose address it is."""
        assert "CANARY" not in unquote_plus(seen.target)
        routes = {"/oidc/token": self._client, "/google/token": self._service_account}
        routes["/github/app/installations/27776345/access_tokens"] = self._installation
        return (
            routes[seen.path](seen)
            if seen.method == "POST" and seen.path in routes
            else (404, {"message": "Not Found"})
        )

    def _client(self, seen: Seen) -> Reply:
        form = dict(seen.form)
        if (form.pop("client_id", None), form.pop("client_secret", None)) not in {
            ("client-1", one) for one in self.secrets
        }:
            return 401, {"error": "invalid_client"}
        assert form == {"grant_type": "client_credentials", "scope": "orders:read stock", "audience": "orders-api"}
        return 200, {"access_token": self._new("at-"), "token_type": "Bearer", "expires_in": HOUR_SECONDS}

    def _service_account(self, seen: Seen) -> Reply:
        form = seen.form
        assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
        claims = self._proof(form["assertion"])
        if claims is None:
            return 400, {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
        assert (claims["iss"], claims["aud"], claims["scope"]) == (EMAIL, GOOGLE_TOKEN_URL, "a b")
        return 200, {"access_token": self._new("ya29."), "token_type": "Bearer", "expires_in": HOUR_SECONDS}

    def _installation(self, seen: Seen) -> Reply:
        claims = self._proof(seen.headers["authorization"].removeprefix("Bearer "))
        if claims is None:
            return 401, {
                "message": "A JSON web token could not be decoded",
                "documentation_url": "https://docs.github.com/rest",
            }
        assert claims["iss"] == GITHUB_APP["app_id"]
        assert claims["exp"] - claims["iat"] <= 600
        if self.suspended:
            return 403, {"message": "This installation has been suspended"}
        ends = datetime.fromtimestamp(int(time.time()) + HOUR_SECONDS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return 201, {"token": self._new("ghs_" + "x.-_" * 120), "expires_at": ends, "permissions": {"issues": "write"}}

    def _proof(self, assertion: str) -> dict[str, Any] | None:
        """Return the claims of a good assertion; None where its key is not accepted any more."""
        try:
            _, claims = opened(assertion)
        except (JoseError, ValueError):
            return None
        assert claims["iat"] - 90 <= time.time() < claims["exp"] <= claims["iat"] + HOUR_SECONDS
        return None if self.key_deleted else claims

    def _new(self, start: str) -> str:
        self.minted.append(f"{start}{len(self.minted) + 1}")
        return self.minted[-1]


@dataclass(frozen=True)
class Kind:
    """One way to mint: the integration and the import, and how it ends."""

    name: str
    provider: str
    credentials: Mapping[str, Any]
    account: str | None
    reason: str = ""
    client: bool = False


CLIENT = Kind(
    "client credentials",
    "oidc",
    {"type": "client_credentials", "scopes": ["orders:read", "stock"], "audience": "orders-api"},
    None,
    client=True,
)
SERVICE_ACCOUNT = Kind(
    "service account",
    "google",
    {"type": "service_account", "key": KEY, "scopes": ["a", "b"]},
    EMAIL,
    reason="invalid_grant",
)
INSTALLATION = Kind(
    "installation", "github", {"type": "github_app", **GITHUB_APP}, "installation:27776345", reason="app_key_refused"
)
KINDS = [CLIENT, SERVICE_ACCOUNT, INSTALLATION]
SIGNING = [SERVICE_ACCOUNT, INSTALLATION]


def config_of(kind: Kind, base: str) -> dict[str, Any]:
    """Return where the fake plays this provider."""
    if kind.provider == "github":
        return {"api_base_url": f"{base}/github"}
    urls = {
        name: f"{base}/{kind.provider}/{name.removesuffix('_url')}"
        for name in ("authorize_url", "token_url", "jwks_url")
    }
    return {**urls, "client_auth": "client_secret_post"}


@dataclass
class Imported:
    """A minted connection and the provider behind it."""

    rig: Rig
    mint: Mint
    fake: Fake
    integration: str
    connection: dict[str, Any]

    @property
    def id(self) -> str:
        """The connection's id."""
        return str(self.connection["id"])

    async def token(self, **body: Any) -> httpx2.Response:
        """Ask for a token."""
        return await self.rig.token(self.id, **body)

    async def fresh(self) -> dict[str, Any]:
        """Ask for a token and get one."""
        answer = await self.token()
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def shown(self) -> dict[str, Any]:
        """Return the connection as it is now."""
        return dict((await self.rig.call("GET", f"/v1/connections/{self.id}")).json())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give one broker to the whole file."""
    async with opened_rig(tmp_path_factory.mktemp("minted")) as made:
        yield made


@asynccontextmanager
async def imported(rig: Rig, kind: Kind, *, newest_secret: str = SECRET) -> AsyncIterator[Imported]:
    """Play a provider, configure it, and import a credential that mints there."""
    mint, name = Mint(), subject().replace(":", "-")
    async with listening(mint.answer) as fake:
        body = {"name": name, "provider": kind.provider, "client_id": "client-1", "config": config_of(kind, fake.base)}
        body.update({"client_secret": SECRET, "scopes": kind.credentials["scopes"]} if kind.client else {})
        made = await rig.call("POST", "/v1/integrations", body)
        assert made.status_code == 201, made.text
        if newest_secret != SECRET:
            more = await rig.call("POST", f"/v1/integrations/{name}/client-secrets", {"client_secret": newest_secret})
            assert more.status_code == 201, more.text
        wanted = {"integration": name, "subject": subject(), "credentials": dict(kind.credentials)}
        came = await rig.call("POST", "/v1/connections", wanted)
        assert came.status_code == 201, came.text
        yield Imported(rig, mint, fake, name, came.json())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_an_import_asks_nobody_and_the_first_hand_out_mints_a_token_that_all_share(rig: Rig, kind: Kind) -> None:
    async with imported(rig, kind) as made:
        assert (made.connection["status"], made.fake.seen) == ("active", [])
        assert made.connection["account"]["id"] == kind.account
        first = await made.fresh()
        assert [first["access_token"]] == made.mint.minted
        assert first["token_type"] == "Bearer"
        ends_at = epoch_of(first["expires_at"])
        assert ends_at is not None
        assert abs(ends_at - time.time() - HOUR_SECONDS) < 10
        assert await made.fresh() == first
        assert len(made.fake.seen) == 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_a_token_that_ended_is_minted_anew_as_often_as_it_ends(rig: Rig, kind: Kind) -> None:
    async with imported(rig, kind) as made:
        seen = [(await made.fresh())["access_token"]]
        for _ in range(2):
            await ends_in(rig.parts.database, made.id, -1)
            seen.append((await made.fresh())["access_token"])
        assert seen == made.mint.minted
        assert len(set(seen)) == len(made.fake.seen) == 3


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_ten_callers_at_once_cause_one_call(rig: Rig, kind: Kind) -> None:
    async with imported(rig, kind) as made:
        answers = await asyncio.gather(*(made.token() for _ in range(10)))
        assert {answer.status_code for answer in answers} == {200}
        assert [{answer.json()["access_token"] for answer in answers}] == [set(made.mint.minted)]
        assert len(made.fake.seen) == 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_a_caller_whose_token_was_refused_gets_another(rig: Rig, kind: Kind) -> None:
    async with imported(rig, kind) as made:
        first = (await made.fresh())["access_token"]
        await set_row(rig.parts.database, made.id, refreshed_at=time.time() - 60)
        answer = await made.token(not_token_sha256=hashlib.sha256(first.encode()).hexdigest())
        assert answer.status_code == 200, answer.text
        assert [first, answer.json()["access_token"]] == made.mint.minted


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_the_worker_mints_for_a_connection_in_use_before_its_token_ends(rig: Rig, kind: Kind) -> None:
    async with imported(rig, kind) as made:
        first = (await made.fresh())["access_token"]
        database, at = rig.parts.database, await rig.parts.database.read(now)
        in_use = {"token_expires_at": at + 100, "last_used_at": at, "refreshed_at": at - 3500, "created_at": at - 3500}
        await set_row(database, made.id, **in_use)
        background = BackgroundRefresh(rig.parts.credentials, rig.parts.metrics, per_minute=1000)
        await background.refresh_due()
        assert len(made.mint.minted) == 2
        answer = await made.fresh()
        assert (answer["access_token"], answer["stale"]) == (made.mint.minted[1], False)
        assert answer["access_token"] != first
        assert len(made.fake.seen) == 2, "the caller did not have to wait"


@pytest.mark.parametrize("kind", SIGNING, ids=lambda kind: kind.name)
async def test_a_key_that_was_deleted_needs_another_import_once_the_provider_said_so_twice(
    rig: Rig, kind: Kind
) -> None:
    async with imported(rig, kind) as made:
        await made.fresh()
        made.mint.key_deleted = True
        await ends_in(rig.parts.database, made.id, -1)
        for _ in range(2):
            answer = await made.token()
            assert (answer.status_code, answer.json()["code"]) == (409, "reauthorization_required")
            assert len(made.fake.seen) == 3
        row = await row_of(rig.parts.database, made.id)
        assert (row.status, row.status_reason) == ("reauthorization_required", kind.reason)
        assert (await made.shown())["status"] == "reauthorization_required"


async def test_a_suspended_installation_comes_back_as_it_was(rig: Rig) -> None:
    async with imported(rig, INSTALLATION) as made:
        made.mint.suspended = True
        answer = await made.token()
        assert (answer.status_code, answer.json()["code"]) == (502, "provider_unavailable")
        assert (await made.shown())["status"] == "active"
        made.mint.suspended = False
        await wait_is_over(rig.parts.database, made.id)
        assert [(await made.fresh())["access_token"]] == made.mint.minted


async def test_a_refused_client_secret_is_followed_by_the_next_and_with_none_left_the_connection_lives(
    rig: Rig,
) -> None:
    async with imported(rig, CLIENT, newest_secret="not-yet-at-the-provider") as made:
        assert [(await made.fresh())["access_token"]] == made.mint.minted
        tried = [seen.form["client_secret"] for seen in made.fake.seen]
        assert tried == ["not-yet-at-the-provider", SECRET]
        made.mint.secrets = set()
        await ends_in(rig.parts.database, made.id, -1)
        assert (await made.token()).status_code == 502
        assert (await made.shown())["status"] == "active"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (SERVICE_ACCOUNT, {"key": "CANARY"}),
        (SERVICE_ACCOUNT, {"key": {**KEY, "type": "authorized_user", "refresh_token": "CANARY"}}),
        (SERVICE_ACCOUNT, {"key": {**KEY, "private_key": "CANARY"}}),
        (INSTALLATION, {"private_key": "CANARY"}),
        (INSTALLATION, {"installation_id": "CANARY"}),
        (INSTALLATION, {"surplus": "CANARY"}),
        (CLIENT, {"audience": ["CANARY"]}),
        (CLIENT, {"scopes": ["CANARY"]}),  # the integration's client may not ask for it
    ],
)
async def test_an_import_that_cannot_be_right_is_refused_and_not_quoted(
    rig: Rig, kind: Kind, changes: dict[str, Any]
) -> None:
    async with imported(rig, kind) as made:
        wanted = {"integration": made.integration, "subject": subject(), "credentials": {**kind.credentials, **changes}}
        answer = await rig.call("POST", "/v1/connections", wanted)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
        assert "CANARY" not in answer.text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_what_mints_is_never_shown_logged_or_stored_in_the_open(rig: Rig, kind: Kind) -> None:
    with capture_logs() as logs:
        async with imported(rig, kind) as made:
            await made.fresh()
            shown = json.dumps([await made.shown(), made.connection, [repr(line) for line in logs]])
            row = repr(await row_of(rig.parts.database, made.id))
    for secret in (SECRET, RSA_PEM.split("\n")[5], RSA_JWK["d"][:20], *made.mint.minted):
        assert secret not in shown + row
