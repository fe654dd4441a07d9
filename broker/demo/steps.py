"""The steps of the guided run: each acts through real HTTP, checks what came of it, and returns what was seen."""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2

from broker.demo.browser import Browser, redirect_of
from broker.demo.events import SENDER, an_application, is_genuine, signed_event
from broker.demo.sandbox import DEMO_CLIENT_ID, DEMO_CLIENT_SECRET
from broker.demo.stage import INTEGRATION, Stage

SUBJECT = "notes:ada"
SHOWN_CHARACTERS = 8
SCOPES = ["openid", "profile", "email", "offline_access", "read"]
NARROW_GRANT = {
    "integrations": [INTEGRATION],
    "subjects": ["notes:*"],
    "may": ["connect", "read", "token", "manage"],
}


class StepFailed(Exception):
    """A step did not come out as it must; the text says how and holds no secret."""


@dataclass(slots=True)
class Walk:
    """What one step leaves to the next. ``secrets``: everything that must be found nowhere."""

    stage: Stage
    browsers: dict[str, Browser] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    app_key: str = field(default="", repr=False)
    start_url: str = field(default="", repr=False)
    authorize_url: str = field(default="", repr=False)
    callback_url: str = field(default="", repr=False)
    connection_id: str = ""

    def browser(self, person: str) -> Browser:
        """Return the browser of a person, the same one each time."""
        return self.browsers.setdefault(person, Browser())

    def keep(self, name: str, secret: str) -> str:
        """Remember a secret, so that its absence can be shown; return it."""
        self.secrets[name] = secret
        return secret

    async def aclose(self) -> None:
        """Close the browsers."""
        for browser in self.browsers.values():
            await browser.aclose()

    async def app(self, method: str, path: str, body: Any = None) -> httpx2.Response:  # noqa: ANN401 - JSON
        """Call the broker as the application's backend."""
        return await self.stage.call(method, path, self.app_key, body)

    async def admin(self, method: str, path: str, body: Any = None) -> httpx2.Response:  # noqa: ANN401 - JSON
        """Call the broker as its operator."""
        return await self.stage.call(method, path, self.stage.admin_key, body)

    async def ask_token(self, **body: Any) -> httpx2.Response:  # noqa: ANN401 - JSON
        """Ask for a token of Ada's connection."""
        return await self.app("POST", f"/v1/connections/{self.connection_id}/token", body)

    async def confirm(self, came: Mapping[str, str], subject: str) -> httpx2.Response:
        """Confirm what a flow brought back, as the application does for whoever is logged in."""
        path = f"/v1/connections/{came['connection_id']}/confirm"
        return await self.app("POST", path, {"code": came["confirm"], "subject": subject})

    async def new_session(self, subject: str) -> dict[str, Any]:
        """Mint a session for one of the application's users."""
        body = {"subject": subject, "integrations": [INTEGRATION], "return_to": self.stage.return_to}
        made = expect(await self.app("POST", "/v1/sessions", body), 201)
        self.keep(f"session of {subject}", made["token"])
        return made


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happens. ``act`` raises ``StepFailed`` when it does not come out as it must."""

    section: str
    title: str
    act: Callable[[Walk], Awaitable[str]]


# What is expected, and how it is shown


def shortened(secret: str) -> str:
    """Return the beginning of a secret: enough to tell two apart, not enough to use one."""
    return f"{secret[:SHOWN_CHARACTERS]}…"


def expect(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """Return an answer's JSON object, when its status is the expected one."""
    if answer.status_code != status:
        raise StepFailed(f"{what_it_was(answer)} came where {status} was expected")
    body = answer.json()
    return body if isinstance(body, dict) else {}


def expect_refusal(answer: httpx2.Response, status: int, code: str) -> str:
    """Return a refusal in words, when it is the expected one."""
    require(answer.status_code == status and code_of(answer) == code, f"{what_it_was(answer)} came, not {code}")
    return f"{status} {code}"


def require(holds: object, otherwise: str) -> None:
    """Raise ``StepFailed`` with a text when something does not hold."""
    if not holds:
        raise StepFailed(otherwise)


def what_it_was(answer: httpx2.Response) -> str:
    """Return status and error code of an answer; its text may hold anything."""
    return f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {code_of(answer)}".strip()


def code_of(answer: httpx2.Response) -> str:
    """Return the stable code of one of the broker's refusals, from JSON or from its error page."""
    if "json" in answer.headers.get("content-type", ""):
        body = answer.json()
        code = body.get("code", "") if isinstance(body, dict) else ""
    else:
        found = re.search(r"<code>([a-z_]+)</code>", answer.text)
        code = found[1] if found else ""
    return str(code)


def query_of(url: str) -> dict[str, str]:
    """Return the parameters of an address."""
    return dict(parse_qsl(urlsplit(url).query))


def required_redirect(answer: httpx2.Response, where: str) -> str:
    """Return where an answer redirects to; it has to begin with ``where``."""
    target = redirect_of(answer) or ""
    require(target.startswith(where), f"{what_it_was(answer)}: the browser was not sent to {where}")
    return target


# Setting up


async def be_ready(walk: Walk) -> str:
    """See that every part of the broker works."""
    ready = expect(await walk.stage.http.get(f"{walk.stage.base}/health/ready"), 200)
    key = walk.keep("admin key", walk.stage.admin_key)
    return f"GET /health/ready: 200 {ready['status']}; the operator's key is {shortened(key)}"


async def configure(walk: Walk) -> str:
    """Make the sandbox an integration."""
    body = {
        "name": INTEGRATION,
        "provider": "oidc",
        "client_id": DEMO_CLIENT_ID,
        "client_secret": walk.keep("client secret", DEMO_CLIENT_SECRET),
        "scopes": SCOPES,
        "config": {"issuer": walk.stage.sandbox.issuer},
    }
    made = expect(await walk.admin("POST", "/v1/integrations", body), 201)
    require("client_secret" not in made, "the answer shows the client secret")
    return f"POST /v1/integrations: 201, status {made['status']}; the client secret is sealed and never shown again"


async def try_configuration(walk: Walk) -> str:
    """Prove the configuration by real calls."""
    verdict = expect(await walk.admin("POST", f"/v1/integrations/{INTEGRATION}/test"), 200)
    require(verdict["ok"], "the integration's test did not pass")
    checks = ", ".join(check["name"] for check in verdict["checks"])
    return f"POST …/test: {checks}: fine, and the provider knows the client"


async def make_caller(walk: Walk) -> str:
    """Give the application a caller key that reaches its own users only."""
    body = {"name": "notes app", "roles": ["service"], "grants": [NARROW_GRANT]}
    made = expect(await walk.admin("POST", "/v1/callers", body), 201)
    walk.app_key = walk.keep("caller key", made["key"])
    elsewhere = {"subject": "payroll:ada", "integrations": [INTEGRATION]}
    refused = expect_refusal(await walk.app("POST", "/v1/sessions", elsewhere), 404, "not_found")
    return f"its key is {shortened(walk.app_key)}, shown once; for a subject of another app it gets {refused}"


# Connecting


async def mint_session(walk: Walk) -> str:
    """Mint a session for Ada."""
    made = await walk.new_session(SUBJECT)
    walk.start_url = made["start_urls"][INTEGRATION]
    return f"POST /v1/sessions: 201 {made['id']}; start link …/oauth/{INTEGRATION}/start?session={shortened(made['token'])}"


async def open_start_link(walk: Walk) -> str:
    """Open the start link in Ada's browser."""
    walk.authorize_url = await to_provider(walk, "ada", walk.start_url)
    asked = query_of(walk.authorize_url)
    require(asked.get("code_challenge_method") == "S256", "the request to the provider has no PKCE")
    require(asked.get("state") and asked.get("nonce"), "the request to the provider has no state or nonce")
    return "the token left the URL (303), then 302 to the provider with PKCE S256, a state and a nonce"


async def to_provider(walk: Walk, person: str, start_url: str) -> str:
    """Open a start link in somebody's browser; return the provider's address to which it leads."""
    answer = await walk.browser(person).follow(start_url)
    return required_redirect(answer, f"{walk.stage.sandbox.issuer}/authorize")


async def consent(walk: Walk) -> str:
    """Let Ada press Allow on the provider's page."""
    callback = f"{walk.stage.base}/oauth/{INTEGRATION}/callback"
    walk.callback_url = await walk.browser("ada").allow(walk.authorize_url, "ada")
    require(walk.callback_url.startswith(f"{callback}?"), "the provider sent the browser elsewhere")
    came = query_of(walk.callback_url)
    code = walk.keep("authorization code", came.get("code", ""))
    return f"the page asks for {', '.join(SCOPES)}; Allow sends her back with code={shortened(code)} and iss"


async def come_back(walk: Walk) -> str:
    """Let the broker exchange the code."""
    came = await landed(walk, "ada", walk.callback_url)
    walk.connection_id = came["connection_id"]
    code = walk.keep("confirm code", came["confirm"])
    return (
        f"303 to the app's page with connection_id={walk.connection_id} and confirm={shortened(code)}; no token in it"
    )


async def landed(walk: Walk, person: str, callback_url: str) -> dict[str, str]:
    """Open a callback; return what came back to the application."""
    target = required_redirect(await walk.browser(person).open(callback_url), walk.stage.return_to)
    came = query_of(target)
    require(came.get("status") == "connected" and came.get("confirm"), "the flow did not end in a connection")
    return came


async def ask_too_early(walk: Walk) -> str:
    """Ask for the token of a pending connection, with both keys."""
    path = f"/v1/connections/{walk.connection_id}/token"
    refused = [
        expect_refusal(answer, 409, "confirmation_required")
        for answer in (await walk.app("POST", path, {}), await walk.admin("POST", path, {}))
    ]
    return f"POST …/token: {refused[0]}, to the app and to the admin alike"


async def confirm(walk: Walk) -> str:
    """Confirm for Ada."""
    came = {"connection_id": walk.connection_id, "confirm": walk.secrets["confirm code"]}
    row = expect(await walk.confirm(came, SUBJECT), 200)
    require(row["status"] == "active", "the connection is not active")
    require(row["account"]["name"] == "Ada Lovelace", "the connection has another account")
    return f"POST …/confirm: 200, status {row['status']}, account {row['account']['name']}, subject {row['subject']}"


# Using


async def get_token(walk: Walk) -> str:
    """Get an access token."""
    got = expect(await walk.ask_token(), 200)
    require("refresh_token" not in got, "a refresh token was handed out")
    token = walk.keep("access token", got["access_token"])
    return f"POST …/token: 200 {shortened(token)} until {got['expires_at']}; the refresh token never leaves the broker"


async def call_api(walk: Walk) -> str:
    """Use it."""
    return f"GET /api/me: {await who_is(walk, walk.secrets['access token'])}"


async def who_is(walk: Walk, token: str) -> str:
    """Say whom the provider's API takes the token for; it must be Ada."""
    me = expect(await walk.stage.whoami(token), 200)
    require(me["account"]["name"] == "Ada Lovelace", "the API names another account")
    return f"200 {me['account']['name']}, call number {me['calls']}"


async def force_refresh(walk: Walk) -> str:
    """Make the broker refresh now."""
    got = expect(await walk.ask_token(force_refresh=True), 200)
    token = walk.keep("second access token", got["access_token"])
    require(token != walk.secrets["access token"], "the token is still the old one")
    counted = walk.stage.sandbox.state.counters
    require(counted.refreshes == 1, f"the provider saw {counted.refreshes} refreshes")
    require(counted.reuse_alarms == 0, "the provider saw a used refresh token")
    return f"POST …/token {{force_refresh: true}}: 200 {shortened(token)}; the provider saw one refresh, and no reuse"


async def call_again(walk: Walk) -> str:
    """Use the new token; the old one is dead where the provider says so."""
    seen = f"with the new token {await who_is(walk, walk.secrets['second access token'])}"
    if not walk.stage.sandbox.state.options.access_dies_on_refresh:
        return seen
    old = await walk.stage.whoami(walk.secrets["access token"])
    require(old.status_code == 401, "the API still takes the old token")
    return f"{seen}; with the old one {old.status_code}"


# Attacks


async def forward_callback(walk: Walk) -> str:
    """Mallory consents as himself and sends his callback to Grace."""
    start = f"{walk.stage.base}/oauth/{INTEGRATION}/start?return_to={walk.stage.return_to}"
    callback = await walk.browser("mallory").allow(await to_provider(walk, "mallory", start), "mallory")
    walk.keep("Mallory's authorization code", query_of(callback)["code"])
    refused = expect_refusal(await walk.browser("grace").open(callback), 400, "state_invalid")
    return f"{refused}: his flow is bound to his browser's cookie, and hers does not have it"


async def forward_start_link(walk: Walk) -> str:
    """Mallory sends his own start link to Grace, who consents; the application confirms for Grace."""
    session = await walk.new_session("notes:mallory")
    asked = await to_provider(walk, "grace", session["start_urls"][INTEGRATION])
    came = await landed(walk, "grace", await walk.browser("grace").allow(asked, "grace"))
    walk.keep("Grace's confirm code", came["confirm"])
    refused = expect_refusal(await walk.confirm(came, "notes:grace"), 409, "subject_mismatch")
    burnt = expect_refusal(await walk.confirm(came, "notes:mallory"), 409, "confirm_invalid")
    require(walk.stage.sandbox.state.counters.revocations, "the burnt flow was not revoked at the provider")
    return f"{refused}; the flow is burnt and revoked at the provider: for Mallory it is now {burnt}"


async def ask_as_another(walk: Walk) -> str:
    """Let another application ask for Ada's token."""
    grant = {**NARROW_GRANT, "subjects": ["payroll:*"]}
    body = {"name": "payroll app", "roles": ["service"], "grants": [grant]}
    made = expect(await walk.admin("POST", "/v1/callers", body), 201)
    key = walk.keep("other caller key", made["key"])
    answer = await walk.stage.call("POST", f"/v1/connections/{walk.connection_id}/token", key, {})
    return f"{expect_refusal(answer, 404, 'not_found')}: outside its grants the connection does not exist"


# Events


async def receive_event(walk: Walk) -> str:
    """Let a provider post an event, and somebody without the secret another one; see what reaches the application."""
    async with an_application() as (url, arrivals):
        source = expect(await walk.admin("POST", "/v1/webhook-sources", {"name": "notes", "provider": SENDER}), 201)
        wanted = {"url": url, "event_types": [f"{SENDER}.**"]}
        subscription = expect(await walk.admin("POST", "/v1/subscriptions", wanted), 201)
        sent = signed_event(source["url"], walk.keep("source secret", source["secret"]))
        forged = await walk.stage.http.post(sent.url, headers=list(sent.headers), content=sent.body + b" ")
        require(forged.status_code == 401, f"{what_it_was(forged)} came where a forged event is refused")
        expect(await walk.stage.http.post(sent.url, headers=list(sent.headers), content=sent.body), 202)
        delivery = await arrivals.get()
    require(delivery.body == sent.body, "the delivery is not the event to the byte")
    signed = is_genuine(delivery, walk.keep("signing secret", subscription["secret"]))
    require(signed, "the delivery is not signed with the subscription's secret")
    return f"202 once it was stored; {len(sent.body)} bytes reach the app as they came, signed; with one byte more: 401"


# Afterwards


async def verify_audit(walk: Walk) -> str:
    """Verify the audit chain, and show what it says of the connection."""
    verdict = expect(await walk.admin("GET", "/v1/audit/verify"), 200)
    require(verdict["ok"], "the audit chain does not verify")
    found = expect(await walk.admin("GET", f"/v1/audit?connection_id={walk.connection_id}"), 200)
    story = [record["action"].removeprefix("connection.") for record in reversed(found["data"])]
    require({"pending", "confirmed", "token"} <= set(story), "the chain lacks what happened")
    return f"{verdict['count']} records, unbroken; of this connection: {', '.join(story)}"


async def search_files(walk: Walk) -> str:
    """Look for every secret of this run in every file of the broker: database, write-ahead log, log."""
    files = {path: path.read_bytes() for path in sorted(walk.stage.data_dir.rglob("*")) if path.is_file()}
    require(any(path.name == "broker.db" for path in files), "there is no database file")
    needles = {form: name for name, secret in walk.secrets.items() for form in forms_of(secret)}
    for path, content in files.items():
        for form, name in needles.items():
            require(form not in content, f"the {name} stands in {path.name}")
        require(re.search(rb"srt_[\w-]{43}", content) is None, f"a refresh token stands in {path.name}")
    size = sum(map(len, files.values())) // 1024
    names = ", ".join(path.name for path in files if not shows_nothing(path))
    return f"{size} kB in {names}: none of {len(walk.secrets)} secrets, plain, hex or base64, and no refresh token"


def forms_of(secret: str) -> list[bytes]:
    """Return the forms in which a secret could have leaked."""
    raw = secret.encode()
    return [raw, raw.hex().encode(), base64.b64encode(raw).rstrip(b"="), base64.urlsafe_b64encode(raw).rstrip(b"=")]


def shows_nothing(path: Path) -> bool:
    """Whether a file is of no interest to a reader."""
    return path.name.endswith("-shm")


async def revoke(walk: Walk) -> str:
    """Delete the connection, which revokes it at the provider."""
    gone = expect(await walk.app("DELETE", f"/v1/connections/{walk.connection_id}"), 200)
    require(gone["revocation"] == "revoked", f"the revocation at the provider was {gone['revocation']}")
    dead = await walk.stage.whoami(walk.secrets["second access token"])
    require(dead.status_code == 401, "the API still takes the token")
    refused = expect_refusal(await walk.ask_token(), 404, "not_found")
    return f"DELETE: 200, revocation {gone['revocation']}; the API answers the token {dead.status_code}, the broker {refused}"


STEPS = (
    Step("Setting up, as an operator", "The broker runs on embedded defaults. Is every part of it working?", be_ready),
    Step("", "The operator tells the broker of a provider, with the app's client id and secret there.", configure),
    Step("", "A test makes the real calls that prove this configuration.", try_configuration),
    Step("", "The notes app gets a caller key that reaches the users of the notes app and nobody else.", make_caller),
    Step(
        "Connecting Ada's account", "Ada clicks “connect”: the app's backend asks for a session for her.", mint_session
    ),
    Step("", "Her browser opens the start link.", open_start_link),
    Step("", "The provider asks her, and she allows it.", consent),
    Step("", "Her browser comes back; the broker checks cookie, state and iss, and exchanges the code.", come_back),
    Step("", "Nobody has confirmed yet who consented. Would anybody get the token already?", ask_too_early),
    Step("", "The app's backend confirms: it was Ada, who is logged in here.", confirm),
    Step("Using it", "The app needs to act in Ada's account: it asks for a token.", get_token),
    Step("", "It calls the provider's API with the token.", call_api),
    Step("", "The app wants a new token at once; the broker refreshes.", force_refresh),
    Step("", "Which of the two tokens does the API take now?", call_again),
    Step(
        "Events",
        "The provider posts an event to the broker, which delivers it to the app; then one that is forged.",
        receive_event,
    ),
    Step(
        "Attacks that fail",
        "Mallory consents as himself and has Grace open his callback, to plant his account in hers.",
        forward_callback,
    ),
    Step(
        "", "Mallory sends Grace his own start link; she consents, and the app confirms for Grace.", forward_start_link
    ),
    Step("", "Another app, with a key of its own, asks for Ada's token.", ask_as_another),
    Step(
        "Afterwards",
        "An auditor verifies the chain, in which a token's record was durable before the token left.",
        verify_audit,
    ),
    Step("", "Somebody searches every file of the broker for the secrets of this run.", search_files),
    Step("", "Ada disconnects: the app deletes the connection.", revoke),
)
