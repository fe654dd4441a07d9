"""Webhooks with senders and receivers that no one here wrote: emulate's GitHub and Stripe, and the vendors' own libraries.

What they send arrives verified and is delivered to the byte; what the broker delivers, their libraries verify; what their
libraries sign, the broker takes; and the samples that the broker signs, their libraries take.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.app import create_app, open_parts, running_worker
from broker.callers import mint_key
from providers import load_catalog
from providers.receiving import sign_sample
from providers.spec import Sample, Secret
from tests.commands import ROOT
from tests.flows.rig import eventually, reserved_socket, serving, settings_for
from tests.real.far_side import Answer, FarSide, Seen, address_of, far_side
from tests.real.parts import HERE, NODE, emulate, require_installed

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

PYTHON = ROOT / ".venv-sdks" / "bin" / "python"
SDKS = HERE / "sdks"
PAGE = (ROOT / "docs" / "webhooks.md").read_text("utf-8")
BODY = '{"id": "evt_1",  "type": "rocket.launched", "stage": "Zündung ✓"}'
STANDARD_SECRET = "whsec_" + base64.b64encode(b"a secret of 32 bytes, in base64.").decode()


@dataclass(frozen=True)
class Site:
    """A broker with a worker, and an application that its deliveries reach."""

    base: str
    http: httpx2.AsyncClient
    app: FarSide
    admin_key: str = field(repr=False)

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """Call ``/v1`` as the operator; return what a good answer says."""
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        answer = await self.http.request(method, path, json=body, headers=headers)
        assert answer.is_success, answer.text
        return answer.json()

    async def source(self, provider: str, **fields: Any) -> dict[str, Any]:
        """Make a source; return it with its secret."""
        name = f"{provider.replace('_', '-')}-{secrets.token_hex(4)}"
        return dict(await self.call("POST", "/v1/webhook-sources", {"name": name, "provider": provider, **fields}))

    async def subscription(self, *types: str, **fields: Any) -> dict[str, Any]:
        """Subscribe the application; return the subscription with its secret."""
        body = {"url": f"{self.app.base}/hooks", "event_types": list(types), **fields}
        return dict(await self.call("POST", "/v1/subscriptions", body))

    async def delivered(self, event_type: str) -> Seen:
        """Wait for the delivery of an event of that type."""

        async def arrived() -> Seen | None:
            found = (seen for seen in self.app.seen if seen.one("x-broker-event-type") == event_type)
            return next(found, None)

        found = await eventually(arrived, seconds=30)
        assert isinstance(found, Seen)
        return found


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """Run both on loopback."""
    admin_key = mint_key()[1].reveal()
    with reserved_socket() as listener:
        base = address_of(listener)
        async with (
            open_parts(settings_for(tmp_path, base, admin_key=admin_key)) as parts,
            serving(create_app(parts), listener),
            running_worker(parts),
            httpx2.AsyncClient(base_url=base, trust_env=False, timeout=30) as http,
            application() as app,
        ):
            yield Site(base, http, app, admin_key)


@asynccontextmanager
async def application() -> AsyncIterator[FarSide]:
    async def take(_: Seen) -> Answer:
        return Answer(204)

    async with far_side(lambda _: take, check=lambda _: True, refusal=Answer(500)) as app:
        yield app


# Real senders


async def test_emulates_github_posts_a_push_that_arrives_verified_and_is_delivered_to_the_byte(
    site: Site, make_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    made, subscribed = await site.source("github"), await site.subscription("github.push")
    token = "ghp_" + secrets.token_hex(18)
    seed = {"users": [{"login": "ada"}], "repos": [{"owner": "ada", "name": "rocket", "auto_init": True}]}
    known = {token: {"login": "ada", "scopes": ["repo", "admin:repo_hook"]}}
    with emulate("github", seed, make_directory=make_directory, health_path="/versions", tokens=known) as base:
        async with httpx2.AsyncClient(
            base_url=base, headers={"Authorization": f"token {token}"}, trust_env=False
        ) as http:
            hook = {"url": made["url"], "secret": made["secret"], "content_type": "json"}
            hooked = await http.post("/repos/ada/rocket/hooks", json={"config": hook, "events": ["push"]})
            assert hooked.status_code == 201, hooked.text
            file = {"message": "Lift-off", "content": base64.b64encode(b"T minus 10").decode()}
            answer = await http.put("/repos/ada/rocket/contents/plan.txt", json=file)
            assert answer.status_code == 201, answer.text
            seen = await site.delivered("github.push")  # it posts once it has answered
    payload = json.loads(seen.body)
    assert (payload["repository"]["full_name"], payload["sender"]["login"]) == ("ada/rocket", "ada")
    await check_stored(site, seen, made)
    assert await taken_by_the_page(tmp_path, [order(seen, subscribed["secret"])]) == [[True], [True]]


async def test_emulates_stripe_posts_an_event_that_arrives_verified_and_is_delivered_to_the_byte(
    site: Site, make_directory: Callable[[str], Path]
) -> None:
    secret = "whsec_" + secrets.token_hex(16)
    made = await site.source("stripe", secret=secret)
    await site.subscription("stripe.customer.*")
    seed = {"webhooks": [{"url": made["url"], "events": ["*"], "secret": secret}]}
    with emulate("stripe", seed, make_directory=make_directory, health_path="/v1/customers") as base:
        headers = {"Authorization": "Bearer sk_test_ada"}
        async with httpx2.AsyncClient(base_url=base, headers=headers, trust_env=False) as http:
            answer = await http.post("/v1/customers", data={"email": "ada@example.com"})
            assert answer.status_code == 200, answer.text
    seen = await site.delivered("stripe.customer.created")
    assert json.loads(seen.body)["data"]["object"]["email"] == "ada@example.com"
    await check_stored(site, seen, made)


async def check_stored(site: Site, seen: Seen, source: Mapping[str, Any]) -> None:
    """Check that a delivery is the event that the source's history has, to the byte, with the body proven."""
    event = await site.call("GET", f"/v1/events/{seen.one('webhook-id')}")
    assert (event["source_id"], base64.b64decode(event["body"])) == (source["id"], seen.body)
    assert "body" in event["verdict"]["covers"]
    assert await site.call("GET", f"/v1/webhook-sources/{source['id']}/rejections") == {"data": [], "next_cursor": None}


# The libraries verify what is delivered


async def test_the_standards_libraries_verify_what_is_delivered_with_the_pages_lines(
    site: Site, tmp_path: Path
) -> None:
    made, subscribed = (
        await site.source("generic_hmac", config={"settings": {"header": "X-Sig"}}),
        await site.subscription("**"),
    )
    seen = await brought(site, made)
    right = order(seen, subscribed["secret"])
    changed = order(replace(seen, body=seen.body + b" "), subscribed["secret"])
    other = order(seen, STANDARD_SECRET)
    assert await taken_by_the_page(tmp_path, [right, changed, other]) == [[True, False, False]] * 2
    asked = [
        {"library": name, "action": "verify", "secret": secret, "body": body, "headers": fields_of(seen)}
        for name in ("standardwebhooks", "svix")
        for secret, body in (
            (subscribed["secret"], seen.body.decode()),
            (subscribed["secret"], seen.body.decode() + " "),
            (STANDARD_SECRET, seen.body.decode()),
        )
    ]
    refused = {"refused": "WebhookVerificationError"}
    assert await libraries(asked) == [True, refused, refused] * 2


async def test_while_two_secrets_are_live_the_libraries_take_either(site: Site, tmp_path: Path) -> None:
    made, subscribed = (
        await site.source("generic_hmac", config={"settings": {"header": "X-Sig"}}),
        await site.subscription("**"),
    )
    path = f"/v1/subscriptions/{subscribed['id']}/rotate-secret"
    rotated = await site.call("POST", path, {"overlap_seconds": 600})
    seen = await brought(site, made)
    orders = [order(seen, secret) for secret in (subscribed["secret"], rotated["secret"])]
    assert await taken_by_the_page(tmp_path, orders) == [[True, True]] * 2


async def test_a_signature_without_a_shared_secret_is_verified_with_the_pages_lines(site: Site, tmp_path: Path) -> None:
    made = await site.source("generic_hmac", config={"settings": {"header": "X-Sig"}})
    subscribed = await site.subscription("**", signature="v1a")
    (key, *_) = subscribed["public_keys"]
    seen = await brought(site, made)
    changed = replace(seen, body=seen.body + b" ")
    other = "whpk_" + base64.b64encode(bytes(32)).decode()
    orders = [order(seen, key), order(changed, key), order(seen, other)]
    snippet = page_block("python", "verified_v1a")
    outcome = await piped([PYTHON, SDKS / "verify_webhooks.py"], snippet, tmp_path / "v1a.py", orders)
    assert outcome == [True, False, False]


async def brought(site: Site, made: Mapping[str, Any]) -> Seen:
    """Bring an event to a source of the generic kind; return its delivery."""
    webhook = load_catalog()["generic_hmac"].webhooks[""]
    assert webhook.configure is not None
    sample = Sample("rocket.launched", made["url"], time.time(), "1", BODY.encode())
    request = sign_sample(webhook.configure({"header": "X-Sig"}), sample, Secret(made["secret"]))
    answer = await site.http.post(made["url"], headers=list(request.headers), content=request.body)
    assert answer.status_code == 202, answer.text
    seen = await site.delivered("generic_hmac.unknown")
    assert seen.body == BODY.encode()
    return seen


# The libraries sign what is received, and take the samples


SENDERS: dict[str, tuple[str, str, dict[str, str]]] = {  # library: provider, secret, what else its sender says
    "octokit": ("github", "it's a secret", {"x-github-event": "push", "x-github-delivery": "1"}),
    "stripe": ("stripe", "whsec_it_is_no_base64", {}),
    "standardwebhooks": ("standard_webhooks", STANDARD_SECRET, {}),
    "svix": ("svix", STANDARD_SECRET, {}),
}


async def test_what_the_libraries_sign_is_taken_and_one_byte_more_is_not(site: Site) -> None:
    orders = [
        {"library": name, "action": "sign", "secret": secret, "body": BODY, "id": "msg_1"}
        for name, (_, secret, _) in SENDERS.items()
    ]
    signed = dict(zip(SENDERS, await libraries(orders), strict=True))
    for name, (provider, secret, said) in SENDERS.items():
        made = await site.source(provider, secret=secret)
        fields = {**signed[name], **said, "content-type": "application/json"}
        for body, expected in ((BODY, 202), (f"{BODY} ", 401)):
            answer = await site.http.post(made["url"], headers=fields, content=body.encode())
            assert answer.status_code in ({200, 202} if expected == 202 else {401}), (name, answer.text)


async def test_the_libraries_take_the_samples_that_are_signed_here() -> None:
    catalog = load_catalog()
    sample, orders = Sample("push", "https://hooks.example.com/", time.time(), "msg_1", BODY.encode()), []
    for name, (provider, secret, _) in SENDERS.items():
        request = sign_sample(catalog[provider].webhooks[""], sample, Secret(secret))
        headers = {key.decode(): value.decode() for key, value in request.headers}
        asked = {"library": name, "action": "verify", "secret": secret, "headers": headers}
        orders += [{**asked, "body": body} for body in (BODY, f"{BODY} ")]
    outcomes = await libraries(orders)
    assert outcomes[::2] == [True] * len(SENDERS)
    assert not any(outcome is True for outcome in outcomes[1::2])


# Running them


def fields_of(seen: Seen) -> dict[str, str]:
    """Return the fields of a request by name."""
    return {name.decode(): value.decode("latin-1") for name, value in seen.fields}


def order(seen: Seen, secret: str) -> dict[str, Any]:
    """Return a delivery as the page's lines are given it."""
    return {"secret": secret, "body": base64.b64encode(seen.body).decode(), "headers": fields_of(seen)}


def page_block(language: str, name: str) -> str:
    """Return the one example of the guide in that language that defines a function of this name."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if re.search(rf"(def|function) {name}\(", block))
    return str(found)


async def taken_by_the_page(place: Path, orders: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return what the page's lines in Python and in JavaScript say of deliveries."""
    modules = place / "node_modules"
    if not modules.exists():
        modules.symlink_to(HERE / "node_modules")
    python = piped([PYTHON, SDKS / "verify_webhooks.py"], page_block("python", "verified"), place / "lines.py", orders)
    javascript = piped([NODE, SDKS / "verify_webhooks.mjs"], page_block("js", "verified"), place / "lines.mjs", orders)
    return [await python, await javascript]


async def libraries(orders: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the libraries' answers."""
    return await _answers([NODE, SDKS / "webhooks.mjs"], orders)


async def piped(command: Sequence[Path], snippet: str, file: Path, orders: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Write a snippet to a file and return what a program with it says of deliveries."""
    await asyncio.to_thread(file.write_text, snippet, "utf-8")
    return await _answers([*command, file], orders)


async def _answers(command: Sequence[Path], orders: Sequence[Mapping[str, Any]]) -> list[Any]:
    require_installed()
    if not PYTHON.exists():
        pytest.fail("the libraries are not installed (.venv-sdks is missing): run `make test-real`", pytrace=False)
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd="/")
    out, err = await asyncio.wait_for(process.communicate(json.dumps(orders).encode()), 60)
    assert process.returncode == 0, err.decode()[-4000:]
    return list(json.loads(out))
