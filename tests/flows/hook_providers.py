"""APIs at which hooks are made, on loopback and strict: what they keep, whom they let in, and answers that get lost."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from tests.fakes import Fake, Reply, Seen, listening
from tests.flows.rig import Rig

NOT_FOUND: Reply = (404, {"message": "Not Found"})


@dataclass
class HookApi:
    """What the three have in common: the tokens that are let in, and a switch for what goes wrong next.

    ``lose_next``: the next writing request is done, and its answer lost. ``refuse``: each request is answered so. ``during``:
    called while a writing request is under way.
    """

    tokens: set[str]
    fake: Fake = field(default_factory=lambda: Fake(""))
    hooks: dict[str, dict[str, Any]] = field(default_factory=dict)
    lose_next: bool = False
    refuse: Reply | None = None
    made: int = 0
    revoked: list[int] = field(default_factory=list)

    def answer(self, seen: Seen) -> Reply:
        """Answer a request, after everything that is the same for all of them."""
        token = seen.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in self.tokens:
            return 401, {"error": {"message": "Bad credentials"}}
        if self.refuse is not None:
            return self.refuse
        reply = self.reply(seen)
        if self.lose_next and seen.method != "GET":
            self.lose_next = False
            raise ConnectionResetError
        return reply

    def reply(self, seen: Seen) -> Reply:
        """Do what is asked."""
        raise NotImplementedError

    @property
    def lines(self) -> list[str]:
        """Method and path of every request."""
        return [f"{one.method} {one.path}" for one in self.fake.seen]


@dataclass
class FakeHub(HookApi):
    """Repository hooks as GitHub's API has them."""

    def reply(self, seen: Seen) -> Reply:
        """List, make, change, show and delete; two with the same address are refused, as there."""
        if seen.path == "/applications/hub/token" and seen.method == "DELETE":
            return self.reply_to_revocation(seen)
        found = re.fullmatch(r"/repos/acme/widgets/hooks(?:/([0-9]+))?", seen.path)
        if found is None:
            return NOT_FOUND
        if found[1] is None:
            return (200, list(self.hooks.values())) if seen.method == "GET" else self._make(json.loads(seen.body))
        if found[1] not in self.hooks:
            return NOT_FOUND
        if seen.method == "DELETE":
            del self.hooks[found[1]]
            return 204, b""
        if seen.method == "PATCH":
            self.hooks[found[1]].update(json.loads(seen.body))
        return 200, self.hooks[found[1]]

    def reply_to_revocation(self, seen: Seen) -> Reply:
        """Revoke a token; how many hooks there were then is kept."""
        del seen
        self.revoked.append(len(self.hooks))
        return 204, b""

    def _make(self, body: dict[str, Any]) -> Reply:
        assert body["name"] == "web"
        if any(one["config"]["url"] == body["config"]["url"] for one in self.hooks.values()):
            return 422, {
                "message": "Validation Failed",
                "errors": [{"message": "Hook already exists on this repository"}],
            }
        self.made += 1
        hook = {"type": "Repository", "id": self.made, **body}
        self.hooks[str(self.made)] = hook
        return 201, hook


@dataclass
class FakeStripe(HookApi):
    """Webhook endpoints as Stripe's API has them: each brings a secret, once."""

    def reply(self, seen: Seen) -> Reply:
        """List, make, show and delete."""
        found = re.fullmatch(r"/v1/webhook_endpoints(?:/(we_[0-9]+))?", seen.path)
        if found is None:
            return NOT_FOUND
        if found[1] is None:
            return (
                (200, {"data": list(self.hooks.values())}) if seen.method == "GET" else self._make(seen.body.decode())
            )
        if found[1] not in self.hooks:
            return NOT_FOUND
        if seen.method == "DELETE":
            del self.hooks[found[1]]
            return 200, {"id": found[1], "deleted": True}
        return 200, self.hooks[found[1]]

    def secret_of(self, number: int) -> str:
        """Return what the endpoint of this number signs with."""
        return f"whsec_{number:032d}"

    def _make(self, body: str) -> Reply:
        form = parse_qsl(body)
        self.made += 1
        events = [value for name, value in form if name == "enabled_events[]"]
        hook = {"id": f"we_{self.made}", "url": dict(form)["url"], "enabled_events": events, "status": "enabled"}
        self.hooks[f"we_{self.made}"] = hook
        return 200, {**hook, "secret": self.secret_of(self.made)}


@dataclass
class FakeGoogle(HookApi):
    """Channels as Calendar's API has them: nobody can list them, and an id is used once."""

    used: set[str] = field(default_factory=set)
    seconds: float = 604_800.0
    refreshed: int = 0

    def answer(self, seen: Seen) -> Reply:
        """Answer the token endpoint too, which takes no bearer token."""
        if seen.path == "/token":
            self.refreshed += 1
            self.tokens = {f"ya29.refreshed-{self.refreshed}"}
            return 200, {"access_token": f"ya29.refreshed-{self.refreshed}", "token_type": "Bearer", "expires_in": 3599}
        return super().answer(seen)

    def reply(self, seen: Seen) -> Reply:
        """Open and stop."""
        body = json.loads(seen.body)
        if seen.path == "/calendar/v3/channels/stop":
            assert body["resourceId"] == "the-resource"
            return (204, b"") if self.hooks.pop(body["id"], None) is not None else NOT_FOUND
        assert seen.path == "/calendar/v3/calendars/primary/events/watch"
        if body["id"] in self.used:
            return 400, {"error": {"errors": [{"reason": "channelIdNotUnique"}], "code": 400}}
        self.used.add(body["id"])
        self.made += 1
        until_ms = min(int(body["expiration"]), int((time.time() + self.seconds) * 1000))
        self.hooks[body["id"]] = body
        return 200, {"id": body["id"], "resourceId": "the-resource", "expiration": str(until_ms)}


@asynccontextmanager
async def serving_hooks(api: HookApi) -> AsyncIterator[HookApi]:
    """Serve it until the end of the block."""
    async with listening(api.answer) as fake:
        api.fake = fake
        yield api


async def connect(rig: Rig, api: HookApi, provider: str, credentials: dict[str, Any]) -> str:
    """Configure the provider with its API here, and import a connection; return its id."""
    urls = {"api_base_url": api.fake.base, "token_url": f"{api.fake.base}/token"}
    client = {"client_id": "hub", "client_secret": "hub-secret"}
    body = {"name": provider, "provider": provider, **client, "config": urls}
    made = await rig.call("POST", "/v1/integrations", body)
    assert made.status_code == 201, made.text
    imported = {"integration": provider, "subject": "acme:42", "credentials": credentials}
    connection = await rig.call("POST", "/v1/connections", imported)
    assert connection.status_code == 201, connection.text
    return str(connection.json()["id"])


@dataclass
class Made:
    """A source that is registered, and the way to look at it."""

    rig: Rig
    id: str
    url: str
    answer: dict[str, Any]

    async def registration(self) -> dict[str, Any] | None:
        """Return what the source shows of its hook."""
        shown = await self.rig.call("GET", f"/v1/webhook-sources/{self.id}")
        found = shown.json()["registration"]
        return None if found is None else dict(found)

    async def state(self) -> tuple[str, str | None] | None:
        """Return state and error of its hook."""
        found = await self.registration()
        return None if found is None else (found["state"], found["error"])


async def registered_source(rig: Rig, provider: str, connection_id: str, registration: dict[str, str]) -> Made:
    """Make a source that is to be registered at the provider; nothing has been sent yet."""
    body = {"name": f"{provider}-events", "provider": provider, "register": True, "connection_id": connection_id}
    made = await rig.call("POST", "/v1/webhook-sources", {**body, "config": {"registration": registration}})
    assert made.status_code == 201, made.text
    return Made(rig, made.json()["id"], made.json()["url"], dict(made.json()))


async def run_until_idle(rig: Rig, most: int = 20) -> int:
    """Let the worker's job act until nothing is due; return how many times it acted."""
    acted = 0
    for _ in range(most):
        done = await rig.parts.webhooks.registering.run_due()
        if not done:
            return acted
        acted += done
    raise AssertionError("there is always something due")


Factory = Callable[[], HookApi]
