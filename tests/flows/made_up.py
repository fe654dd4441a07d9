"""A made-up provider with everything that its addresses can hold, and the server that plays it."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

from broker.models import Connection
from providers.minting import client_credentials, require_text, token_request
from providers.sigv4 import sigv4
from providers.spec import (
    Account,
    ApiKey,
    Aws,
    Credential,
    Dialogue,
    Minter,
    Minting,
    OAuth2,
    Outgoing,
    Provider,
    Refresh,
    Revocation,
    Secret,
    Variable,
)
from tests.fakes import Fake, Reply, Seen, listening
from tests.flows.rig import APP, Rig
from tests.flows.shared import browser_of, parameters, row

NAME = "made_up"
SHOP = "acme"
_numbers = itertools.count(1)


def signature(pairs: Sequence[tuple[str, str]], secret: str) -> str:
    """Return what the provider signs a callback with."""
    text = urlencode(sorted((name, value) for name, value in pairs if name != "hmac"))
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def verify_callback(received: Sequence[tuple[str, str]], client_secret: Secret) -> bool:
    """Compare the signature; stumbles, as a careless file would, over a callback that has none."""
    return hmac.compare_digest(dict(received)["hmac"], signature(received, client_secret.reveal()))


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask the instance who it is."""
    assert credential.access_token is not None
    bearer = {"Authorization": f"Bearer {credential.access_token.reveal()}"}
    answer = yield Outgoing("GET", f"{credential.hosts['']}/me?shop={credential.variables['shop']}", bearer)
    said = answer.json()
    return Account(said["id"], variables={"site": said["site"]} if said["site"] else {})


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke at the shop."""
    answer = yield Outgoing("POST", credential.urls["revoke_url"])
    return answer.status == 200


def read_robot(given: Mapping[str, Any]) -> Mapping[str, str]:
    """Take a number and a key that may be an object or JSON text."""
    key = json.loads(given["key"]) if isinstance(given["key"], str) else given["key"]
    return {"number": require_text(given.get("number"), r"[0-9]{1,9}", "the number"), "secret": str(key["secret"])}


def ask_as_robot(minter: Minter) -> Outgoing:
    """Ask for a token with the robot's own secret."""
    if not minter.scopes:
        raise ValueError("a robot needs scopes")
    url = minter.credential.urls["token_url"]
    body = {"robot": minter.material["number"].reveal(), "key": minter.material["secret"].reveal()}
    return Outgoing("POST", url, {"Content-Type": "application/x-www-form-urlencoded"}, urlencode(body).encode())


def made_up(base: str) -> Provider:
    """Return the provider, at home at ``base``; an instance is a port of this machine."""
    return Provider(
        name=NAME,
        title="Made up",
        docs_url="https://made-up.test",
        oauth2=OAuth2(
            authorize_url=f"{base}/{{shop}}/authorize",
            token_url=f"{base}/{{region}}/{{shop}}/token",
            revoke_url=f"{base}/{{shop}}/revoke",
            pkce=False,
            callback_variables={"shop": "shop", "cell": "cell"},
            token_variables={"instance": "instance"},
            verify_callback=verify_callback,
            refresh=Refresh(rotates=False),
            revocation=Revocation(revoke),
        ),
        api_key=ApiKey(),
        aws=Aws(),
        signers={"aws": sigv4("made")},
        minting={
            "client_credentials": client_credentials(fields={"audience": False}),
            "robot": Minting(
                "Robot",
                ask_as_robot,
                {"number": True, "key": True},
                read=read_robot,
                account=lambda kept: Account(f"robot-{kept['number']}", "A robot"),
            ),
            "astray": Minting("Astray", lambda _: Outgoing("POST", "http://127.0.0.1:9/token")),
            "lost": Minting("Lost", lambda minter: token_request(minter, {"it": minter.material["it"].reveal()})),
        },
        hosts={"": "http://127.0.0.1:{instance}", "site": f"{base}/sites/{{site}}", "cell": f"{base}/cells/{{cell}}"},
        variables=(
            Variable("shop", r"[a-z]{1,20}", SHOP, learned=True),
            Variable("instance", r"[0-9]{4,5}", "8443", learned=True),
            Variable("site", r"[a-z0-9-]{1,20}", "site-1", learned=True),
            Variable("cell", r"[a-z0-9]{1,9}", "c1", learned=True),
            Variable("region", r"[a-z]{2}", "eu", default="eu"),
        ),
        identify=identify,
    )


@dataclass
class World:
    """The provider at work. ``instance`` and ``site``: where it says that the account is; ``extra`` goes into token answers."""

    rig: Rig
    fake: Fake
    integration: str = NAME
    secret: str = "made-up-secret"
    account: str = "account-1"
    instance: str = ""
    site: str = "site-1"
    extra: dict[str, Any] = field(default_factory=dict)

    def answer(self, seen: Seen) -> Reply:
        """Answer as the provider: tokens, who it is, revocation."""
        if seen.path.endswith("/token"):
            token = {"access_token": f"at-{next(_numbers)}", "expires_in": 3600, "refresh_token": "rt-1"}
            minted = {} if "code" in seen.form or "refresh_token" in seen.form else {"refresh_token": None}
            return 200, {**token, **minted, "instance": self.instance, **self.extra}
        if seen.path == "/me":
            return 200, {"id": self.account, "site": self.site}
        return 200, {}

    def calls(self, end: str) -> list[Seen]:
        """Return the requests for paths that end so."""
        return [seen for seen in self.fake.seen if seen.path.endswith(end)]

    async def configure(self, **changes: Any) -> None:
        """Make an integration of a name of its own."""
        self.integration = f"made-{next(_numbers)}"
        body = {"name": self.integration, "provider": NAME, "client_id": "made-up-client", "scopes": ["read", "write"]}
        made = await self.rig.call("POST", "/v1/integrations", {**body, "client_secret": self.secret, **changes})
        assert made.status_code == 201, made.text

    async def session(self, owner: str, **variables: str) -> str:
        """Mint a session; return its token."""
        made = await self.rig.session(owner, integrations=[self.integration], return_to=APP, variables=variables)
        return str(made["token"])

    async def begin(self, token: str | None) -> tuple[Any, str]:
        """Start a flow; return the browser and where it was sent."""
        browser = browser_of(self.rig)
        return browser, await self.rig.begin(browser, self.integration, session=token)

    def callback(self, url: str, *, secret: str | None = None, **changes: str) -> str:
        """Return the callback that the provider answers an authorization request with."""
        asked = parameters(url)
        pairs = {"code": "code-1", "state": asked["state"], "shop": urlsplit(url).path.split("/")[1], **changes}
        signed = {**pairs, "hmac": signature(list(pairs.items()), secret or self.secret)}
        return f"{asked['redirect_uri']}?{urlencode(signed)}"

    async def flow(self, owner: str, token: str | None = None, **variables: str) -> Any:
        """Run a flow; return the answer to the callback."""
        session = token or await self.session(owner, **{"shop": SHOP, **variables})
        browser, url = await self.begin(session)
        return await browser.get(self.callback(url))

    async def connected(self, owner: str, token: str | None = None, **variables: str) -> dict[str, Any]:
        """Return a confirmed connection."""
        answer = await self.flow(owner, token, **variables)
        came = parameters(answer.headers["location"])
        assert came["status"] == "connected", came
        confirmed = await self.rig.confirm(came, owner)
        assert confirmed.status_code == 200, confirmed.text
        return dict(confirmed.json())

    async def row(self, connection_id: str) -> Connection:
        """Return a connection's row."""
        found = await row(self.rig, connection_id)
        assert found is not None
        return found


@asynccontextmanager
async def playing(rig: Rig) -> AsyncIterator[World]:
    """Serve the made-up provider and put it into the catalog of the broker."""
    worlds: list[World] = []
    async with listening(lambda seen: worlds[0].answer(seen)) as fake:  # noqa: PLW0108 - there is none yet
        world = World(rig, fake, instance=str(urlsplit(fake.base).port))
        worlds.append(world)
        rig.parts.integrations.catalog = {**rig.parts.integrations.catalog, NAME: made_up(fake.base)}
        await world.configure()
        yield world
