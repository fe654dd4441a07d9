"""The sandbox provider: a real OAuth 2.0 and OpenID Connect server with an API, in memory, that can be told to misbehave.

Made for ``make demo`` and for tests of whatever talks to a provider: it is strict where the RFCs are (PKCE S256 always, exact
redirect URIs, single-use codes, ``iss`` in every answer to the browser), rotates refresh tokens in three ways, fails on
demand, and remembers what it saw (digests, never a secret). Authlib's server half decides, joserfc signs, this file keeps
the state and speaks HTTP. Handlers are synchronous, so each request is decided at one instant. Nothing here is for
production: anyone who reaches it may consent as anyone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import ipaddress
import os
import re
import secrets
import signal
import socket
import struct
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import parse_qsl, unquote_plus, urlencode, urlsplit, urlunsplit

import jinja2
import msgspec
import uvicorn
import uvloop
from authlib.oauth2.rfc6749 import (
    AuthorizationServer,
    InvalidRequestError,
    InvalidScopeError,
    OAuth2Error,
    OAuth2Request,
)
from authlib.oauth2.rfc6749.grants import AuthorizationCodeGrant, ClientCredentialsGrant, RefreshTokenGrant
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc7009 import RevocationEndpoint
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oauth2.rfc9207 import IssuerParameter
from joserfc import jwt
from joserfc.jwk import RSAKey
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from providers.spec import Secret

DEMO_CLIENT_ID: Final = "sandbox-demo"
DEMO_CLIENT_SECRET: Final = "sandbox-demo-secret"  # noqa: S105 - opens nothing but the sandbox, and is documented
DEFAULT_LOGIN: Final = "ada"
CLIENT_AUTH: Final = ("client_secret_basic", "client_secret_post", "none")
LARGEST_BODY: Final = 1 << 20
SETTLE_SECONDS: Final = 0.005  # a caller that hung up and called again is not two callers; its hang-up may arrive late
LOGIN: Final = re.compile(r"[A-Za-z0-9._@+-]{1,64}")
S256_CHALLENGE: Final = re.compile(r"[A-Za-z0-9_-]{43}")

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Mode = Literal["strict", "grace", "static"]
EndpointName = Literal["authorize", "token", "revoke", "userinfo", "api", "jwks", "discovery", "control"]


def sha256(value: str) -> str:
    """Return the lower-case hex SHA-256 by which the log and the state know a token or code."""
    return hashlib.sha256(value.encode()).hexdigest()


# What can be set, and what can be made to go wrong ---------------------------------------------------------------------


class SandboxOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the sandbox behaves; all but ``issuer`` and ``control`` can be changed while it runs.

    ``mode``: what a used refresh token does. ``strict``: kills its grant and counts an alarm. ``grace``: answers again with
    the same successor for ``grace_seconds``, as long as that successor was not used itself; then as strict. ``static``:
    is not replaced, and the answer has no refresh token. ``refresh_tokens``: who gets one: every consent; as at Google the
    first consent of a user and each with ``prompt=consent``; only the latter; nobody. ``revocation_kills``: the token alone;
    a refresh token's whole grant (RFC 7009); every grant of that user and client. ``latency_seconds`` lies between the commit
    and the answer of the token endpoint. ``echo_credentials`` lets ``/api/echo`` show the Authorization header.
    """

    issuer: str = ""
    mode: Mode = "strict"
    grace_seconds: float = 30
    access_token_seconds: int = 3600
    refresh_token_seconds: int | None = None
    code_seconds: float = 60
    access_dies_on_refresh: bool = False
    refresh_tokens: Literal["always", "like_google", "prompt_consent", "never"] = "always"
    revocation_kills: Literal["token", "grant", "user"] = "grant"
    scopes: tuple[str, ...] = ("openid", "profile", "email", "offline_access", "read", "write")
    redirect_uris: tuple[str, ...] = ("http://127.0.0.1:8000/oauth/sandbox/callback",)
    latency_seconds: float = 0
    date_skew_seconds: float = 0
    auto_consent: bool = False
    control: bool = False
    echo_credentials: bool = False
    log_length: int = 200_000


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to misbehave, for the next ``times`` requests that fit (None: until cleared).

    ``commit`` says when: False before the request has any effect, True after it took effect and before its answer leaves.
    ``answer`` sends ``status`` and ``body`` (text as it is, anything else as JSON) instead of the true answer. ``stall`` waits
    ``seconds`` first (a caller that hangs up meanwhile ends it). ``drop`` closes the connection without a byte
    (``reset``: by RST). ``cut`` sends the true answer's headers and half of its body. ``id_token`` changes ``claims`` (null
    removes one) or breaks the signature. ``callback`` changes ``parameters`` of the redirect (null removes one).
    ``account`` and ``grant_type`` narrow it. Of several faults the oldest that fits is used.
    """

    kind: Literal["answer", "stall", "drop", "cut", "id_token", "callback"]
    endpoint: EndpointName = "token"
    times: int | None = 1
    account: str | None = None
    grant_type: str | None = None
    commit: bool = False
    seconds: float = 0
    status: int = 500
    body: Any = ""
    headers: dict[str, str] = {}
    reset: bool = False
    claims: dict[str, Any] = {}
    bad_signature: bool = False
    parameters: dict[str, str | None] = {}


FAULTS: Mapping[str, Fault] = {
    "fail": Fault(kind="answer", status=503, body={"error": "temporarily_unavailable"}),
    "invalid_client": Fault(kind="answer", status=401, body={"error": "invalid_client"}),
    "invalid_grant": Fault(kind="answer", status=400, body={"error": "invalid_grant"}),
    "garbage": Fault(kind="answer", status=200, body="<html>not JSON</html>", headers={"content-type": "text/html"}),
    "drop_request": Fault(kind="drop"),
    "drop_answer": Fault(kind="drop", commit=True),
    "cut_answer": Fault(kind="cut", commit=True),
    "wrong_iss": Fault(kind="callback", endpoint="authorize", parameters={"iss": "https://other-issuer.test"}),
    "missing_iss": Fault(kind="callback", endpoint="authorize", parameters={"iss": None}),
    "wrong_nonce": Fault(kind="id_token", grant_type="authorization_code", claims={"nonce": "not-the-nonce"}),
    "bad_signature": Fault(kind="id_token", grant_type="authorization_code", bad_signature=True),
}


def fault(preset: str, **changes: Any) -> Fault:  # noqa: ANN401 - checked against Fault's own types
    """Return a named fault with changes, such as ``fault("fail", times=3, account="ada")``; ValueError when it is not one."""
    if preset not in FAULTS:
        raise ValueError("there is no such fault")
    return msgspec.convert({**msgspec.structs.asdict(FAULTS[preset]), **changes}, Fault)


class Visit(msgspec.Struct, kw_only=True):
    """What the sandbox remembers of one request to ``/authorize``, ``/token`` or ``/revoke``; digests, never a secret.

    ``outcome``: ``pending`` while it is worked on, ``shown`` for a consent page, ``committed`` when it took effect,
    ``refused`` when it was answered by an error, ``dropped`` when it was ended without effect. ``answered``: whether the
    answer that belongs to the outcome was written to the caller's connection. ``replayed``: a grace period's repeated
    answer. ``presented`` is the SHA-256 of the code, refresh token or other token that was sent in.
    """

    number: int
    at: float
    endpoint: str
    grant_type: str | None = None
    client_id: str | None = None
    account: str | None = None
    presented: str | None = None
    outcome: Literal["pending", "shown", "committed", "refused", "dropped"] = "pending"
    error: str | None = None
    answered: bool = False
    replayed: bool = False
    fault: str | None = None
    issued_access: str | None = None
    issued_refresh: str | None = None
    prompt: str | None = None
    scopes: tuple[str, ...] = ()


class Counters(msgspec.Struct):
    """What happened since the start. ``refreshes`` counts committed ones without ``replays``."""

    authorizations: int = 0
    exchanges: int = 0
    refreshes: int = 0
    replays: int = 0
    client_credentials: int = 0
    reuse_alarms: int = 0
    code_reuses: int = 0
    concurrent_senders: int = 0
    revocations: int = 0
    api_calls: int = 0
    api_refusals: int = 0


# What it knows: users, clients, grants, tokens ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class User:
    """A made-up person; ``id`` is stable and never the e-mail address."""

    login: str
    name: str

    @property
    def id(self) -> str:
        """The subject of ID tokens."""
        return f"user-{self.login}"

    @property
    def email(self) -> str:
        """An address in a reserved domain."""
        return self.login if "@" in self.login else f"{self.login}@sandbox.test"


@dataclass(frozen=True, slots=True)
class Client:
    """A registered client, in the shape that Authlib asks for; several secrets may be live at once."""

    client_id: str
    client_secrets: tuple[Secret, ...]
    redirect_uris: tuple[str, ...]
    auth_methods: tuple[str, ...]
    default_scope: str

    def get_default_redirect_uri(self) -> None:
        """None: the redirect URI must always be sent."""

    def get_allowed_scope(self, scope: str | None) -> str:
        """Return the scope without repetitions, or the client's default when none was asked for."""
        return " ".join(dict.fromkeys((scope or self.default_scope).split()))

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        """Whether it is registered, byte for byte."""
        return redirect_uri in self.redirect_uris

    def check_client_secret(self, client_secret: str) -> bool:
        """Whether it is one of the live ones, in constant time."""
        return sum(known == Secret(client_secret) for known in self.client_secrets) > 0

    def check_endpoint_auth_method(self, method: str, _endpoint: str) -> bool:
        """Whether the client registered this way to authenticate."""
        return method in self.auth_methods

    def check_response_type(self, response_type: str) -> bool:
        """Only codes are given out."""
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        """``client_credentials`` is for those who have credentials."""
        return grant_type != "client_credentials" or "none" not in self.auth_methods


@dataclass(slots=True)
class Grant:
    """One consent of one user (None: the client for itself) and all that was issued for it."""

    client_id: str
    login: str | None
    alive: bool = True
    access: deque[AccessToken] = field(default_factory=deque, repr=False)
    newest_refresh_sha256: str | None = None


@dataclass(slots=True)
class AccessToken:
    """An access token, known by its digest."""

    digest: str
    grant: Grant
    scope: str
    expires_at: float
    revoked: bool = False

    def check_client(self, client: Client) -> bool:
        """Whether it was issued to this client."""
        return self.grant.client_id == client.client_id


@dataclass(slots=True)
class RefreshToken:
    """A refresh token, known by its digest; ``successor`` is the answer that replaced it."""

    digest: str
    grant: Grant
    scope: str
    expires_at: float | None
    used_at: float | None = None
    revoked: bool = False
    successor: TokenAnswer | None = field(default=None, repr=False)

    def check_client(self, client: Client) -> bool:
        """Whether it was issued to this client."""
        return self.grant.client_id == client.client_id

    def get_scope(self) -> str:
        """Return what was granted."""
        return self.scope


@dataclass(slots=True)
class AuthorizationCode:
    """A code on its way, known by its digest, in the shape that Authlib asks for."""

    grant: Grant
    redirect_uri: str
    scope: str
    nonce: str | None
    code_challenge: str
    with_refresh_token: bool
    expires_at: float
    used: bool = False
    code_challenge_method: str = "S256"

    def get_redirect_uri(self) -> str:
        """Where the code was sent to."""
        return self.redirect_uri

    def get_scope(self) -> str:
        """Return what the user left ticked."""
        return self.scope


class TokenAnswer(dict[str, Any]):
    """A token endpoint's answer that cannot print itself: Authlib logs ``%r`` of it at debug level."""

    def __repr__(self) -> str:
        return "TokenAnswer(…)"


Verdict = Literal["rotate", "keep", "replay", "reuse", "dead"]


def judge_refresh_token(token: RefreshToken, options: SandboxOptions, *, successor_used: bool, now: float) -> Verdict:
    """Decide what presenting this token means now; ``options`` are today's, whatever the token was issued under."""
    if not token.grant.alive or token.revoked or (token.expires_at is not None and token.expires_at <= now):
        return "dead"
    if token.used_at is None:
        return "keep" if options.mode == "static" else "rotate"
    if options.mode == "grace" and not successor_used and now < token.used_at + options.grace_seconds:
        return "replay"
    return "reuse"


class SandboxState:
    """All that the sandbox knows and saw. Not for several threads; every method acts at one instant."""

    def __init__(
        self,
        options: SandboxOptions,
        *,
        clock: Callable[[], float] = time.time,
        signing_key: RSAKey | None = None,
    ) -> None:
        """Know Ada, Grace and the demo client; a signing key is made when one is first needed."""
        self.options = options
        self.clock = clock
        self.counters = Counters()
        self.visits: deque[Visit] = deque(maxlen=options.log_length)
        self.users = {"ada": User("ada", "Ada Lovelace"), "grace": User("grace", "Grace Hopper")}
        self.clients: dict[str, Client] = {}
        self.faults: list[Fault] = []
        self.codes: dict[str, AuthorizationCode] = {}
        self.access_tokens: dict[str, AccessToken] = {}
        self.refresh_tokens: dict[str, RefreshToken] = {}
        self.grants: defaultdict[str, list[Grant]] = defaultdict(list)  # by login
        self.api_calls: Counter[str] = Counter()
        self._keys: list[RSAKey] = [signing_key] if signing_key else []
        self._consented: set[tuple[str, str]] = set()
        self._visits_seen = 0
        self.add_client(DEMO_CLIENT_ID, [Secret(DEMO_CLIENT_SECRET)], options.redirect_uris)

    def add_client(
        self,
        client_id: str,
        client_secrets: Sequence[Secret],
        redirect_uris: Sequence[str],
        *,
        auth_methods: Sequence[str] = ("client_secret_basic", "client_secret_post"),
        default_scope: str = "read",
    ) -> Client:
        """Register a client, or replace the one of that id (its tokens live on).

        Raises ValueError for a redirect URI that is neither https nor http on loopback, for an unknown way to authenticate,
        and for secrets that contradict it.
        """
        if not all(map(is_safe_redirect, redirect_uris)):
            raise ValueError("a redirect URI must be https, or http on loopback, without a fragment")
        if not set(auth_methods) <= set(CLIENT_AUTH) or ("none" in auth_methods) is not (not client_secrets):
            raise ValueError("unknown client authentication, or secrets that do not fit it")
        client = Client(client_id, tuple(client_secrets), tuple(redirect_uris), tuple(auth_methods), default_scope)
        self.clients[client_id] = client
        return client

    def user(self, login: str) -> User | None:
        """Return the user of this login; any well-formed login is somebody. None for another."""
        if login not in self.users and LOGIN.fullmatch(login):
            self.users[login] = User(login, re.sub(r"[._@+-]+", " ", login.partition("@")[0]).strip().title() or login)
        return self.users.get(login)

    def configure(self, **changes: Any) -> None:  # noqa: ANN401 - checked against SandboxOptions' own types
        """Change options while running (ValueError names what is wrong); ``issuer`` and ``control`` stay as they are."""
        if {"issuer", "control", "log_length"} & changes.keys():
            raise ValueError("issuer, control and log_length are fixed at start")
        self.options = msgspec.convert({**msgspec.structs.asdict(self.options), **changes}, SandboxOptions)

    def add_fault(self, wanted: Fault | str, **changes: Any) -> None:  # noqa: ANN401 - as ``fault`` takes them
        """Misbehave from now on: a ``Fault``, or the name of a preset with changes."""
        self.faults.append(wanted if isinstance(wanted, Fault) else fault(wanted, **changes))

    def clear_faults(self) -> None:
        """Behave again."""
        self.faults.clear()

    def take_fault(self, endpoint: str, account: str | None, grant_type: str | None) -> Fault | None:
        """Return the oldest fault that fits and use it up once."""
        for place, found in enumerate(self.faults):
            fits = found.endpoint == endpoint and found.account in {None, account}
            if fits and found.grant_type in {None, grant_type}:
                if found.times is not None and found.times <= 1:
                    del self.faults[place]
                elif found.times is not None:
                    self.faults[place] = msgspec.structs.replace(found, times=found.times - 1)
                return found
        return None

    def note(self, endpoint: str) -> Visit:
        """Begin the record of a request, in order of arrival."""
        self._visits_seen += 1
        visit = Visit(number=self._visits_seen, at=self.clock(), endpoint=endpoint)
        self.visits.append(visit)
        return visit

    def token_requests(self, account: str | None = None) -> list[Visit]:
        """Return what ``/token`` saw, oldest first; of one account if named."""
        return [seen for seen in self.visits if seen.endpoint == "token" and account in {None, seen.account}]

    def clear_log(self) -> None:
        """Forget what was seen and begin to count anew; numbers go on."""
        self.visits.clear()
        self.counters = Counters()

    # Grants and tokens

    def wants_refresh_token(self, client_id: str, login: str, prompt: str | None) -> bool:
        """Decide whether this consent brings a refresh token, and remember that it took place."""
        first = (client_id, login) not in self._consented
        self._consented.add((client_id, login))
        asked = "consent" in (prompt or "").split()
        rules = {"always": True, "like_google": first or asked, "prompt_consent": asked, "never": False}
        return rules[self.options.refresh_tokens]

    def new_answer(self, scope: str, *, with_refresh_token: bool) -> TokenAnswer:
        """Make fresh random tokens; nothing is live before ``remember``."""
        answer = TokenAnswer(
            access_token=f"sat_{secrets.token_urlsafe(32)}",
            token_type="Bearer",  # noqa: S106 - not a password
            expires_in=self.options.access_token_seconds,
            scope=scope,
        )
        if with_refresh_token:
            answer["refresh_token"] = f"srt_{secrets.token_urlsafe(32)}"
            if self.options.refresh_token_seconds is not None:
                answer["refresh_token_expires_in"] = self.options.refresh_token_seconds
        return answer

    def remember(self, grant: Grant, answer: TokenAnswer, *, granted_scope: str) -> None:
        """Make the answer's tokens live. ``granted_scope``: the grant's, which a narrowed refresh does not lose."""
        now = self.clock()
        while grant.access and grant.access[0].expires_at <= now:
            self.access_tokens.pop(grant.access.popleft().digest, None)
        access = AccessToken(sha256(answer["access_token"]), grant, answer["scope"], now + answer["expires_in"])
        grant.access.append(access)
        self.access_tokens[access.digest] = access
        if "refresh_token" not in answer:
            return
        lifetime = self.options.refresh_token_seconds
        digest = sha256(answer["refresh_token"])
        expires_at = None if lifetime is None else now + lifetime
        self.refresh_tokens[digest] = RefreshToken(digest, grant, granted_scope, expires_at)
        grant.newest_refresh_sha256 = digest

    def mint(self, login: str, scope: str = "read", *, client_id: str = DEMO_CLIENT_ID) -> TokenAnswer:
        """Return a token answer as if ``login`` had consented: thousands of accounts without a browser.

        Raises ValueError for a malformed login or an unknown client.
        """
        if self.user(login) is None or client_id not in self.clients:
            raise ValueError("no such user or client")
        grant = Grant(client_id, login)
        self.grants[login].append(grant)
        answer = self.new_answer(scope, with_refresh_token=self.wants_refresh_token(client_id, login, None))
        self.remember(grant, answer, granted_scope=scope)
        return answer

    def verdict(self, token: RefreshToken) -> Verdict:
        """Judge a presented refresh token; see ``judge_refresh_token``."""
        following = token.successor["refresh_token"] if token.successor else ""
        successor = self.refresh_tokens.get(sha256(following))
        used = successor is not None and successor.used_at is not None
        return judge_refresh_token(token, self.options, successor_used=used, now=self.clock())

    def kill_access(self, grant: Grant) -> None:
        """Make every access token of the grant dead."""
        for access in grant.access:
            self.access_tokens.pop(access.digest, None)
        grant.access.clear()

    def kill(self, grant: Grant) -> None:
        """Make the grant and all of its tokens dead."""
        grant.alive = False
        self.kill_access(grant)
        self._consented.discard((grant.client_id, grant.login or ""))

    def kill_account(self, login: str, *, client_id: str | None = None) -> int:
        """Kill every live grant of the user (and client, if named): what the provider's settings page does. Count them."""
        chosen = [grant for grant in self.grants[login] if grant.alive and client_id in {None, grant.client_id}]
        for grant in chosen:
            self.kill(grant)
        return len(chosen)

    def live(self, access_token: str) -> AccessToken | None:
        """Return the token if the API takes it now."""
        token = self.access_tokens.get(sha256(access_token))
        return token if token and not token.revoked and token.expires_at > self.clock() else None

    def newest_refresh_sha256(self, login: str) -> str | None:
        """Return the digest of the refresh token to send next for the user's newest live grant that has one."""
        digests = [grant.newest_refresh_sha256 for grant in self.grants[login] if grant.alive]
        return next((digest for digest in reversed(digests) if digest is not None), None)

    # Keys

    @property
    def keys(self) -> Sequence[RSAKey]:
        """The published keys, the signing one first."""
        if not self._keys:
            self.rotate_keys()
        return self._keys

    def rotate_keys(self, *, keep_old: bool = True) -> str:
        """Sign with a new key from now on; without ``keep_old`` the JWKS forgets the others. Return the new key id."""
        key_id = f"sandbox-{secrets.token_hex(4)}"
        key = RSAKey.generate_key(2048, {"kid": key_id, "use": "sig", "alg": "RS256"})
        self._keys = [key, *self._keys] if keep_old else [key]
        return key_id


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_safe_redirect(uri: str) -> bool:
    """Whether a redirect URI may be registered: https, or http on loopback; no fragment (RFC 6749 3.1.2, RFC 8252 7.3)."""
    parts = urlsplit(uri)
    secure = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    return secure and bool(parts.hostname) and "#" not in uri


# Authlib's half ---------------------------------------------------------------------------------------------------------
# Authlib has no types, so each class that extends one of its own is "Any" to mypy: hence the ignores.


@dataclass(slots=True)
class Answer:
    """What goes back over the wire. ``document`` is the JSON body, if it is one."""

    status: int
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)
    location: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(slots=True)
class Request:
    """One HTTP request, read whole. ``parameters`` are the query at ``/authorize``, else the form."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    malformed: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)
    visit: Visit = field(default_factory=lambda: Visit(number=0, at=0, endpoint=""))
    fault: Fault | None = None


class WireRequest(OAuth2Request):  # type: ignore[misc]
    """A request as Authlib wants it; what the user decided and what is to go wrong travel along."""

    def __init__(self, request: Request) -> None:
        # Authlib judges the URL's transport; who runs the sandbox decides that here, so it always sees https.
        super().__init__(request.method, f"https://sandbox.invalid{request.path}", headers=request.headers)
        self.payload = BasicOAuth2Payload(request.parameters)
        self.wire = request
        self.granted: tuple[str, ...] | None = None

    @property
    def form(self) -> Mapping[str, str]:
        """The body's fields."""
        return self.wire.parameters


class Pkce(CodeChallenge):  # type: ignore[misc]
    """PKCE for every client, S256 only: Authlib's own check lets confidential clients go without (RFC 7636, RFC 9700 2.1.1)."""

    SUPPORTED_CODE_CHALLENGE_METHOD = ("S256",)

    def validate_code_challenge(self, grant: Any, redirect_uri: str) -> None:  # noqa: ANN401 - Authlib's grant
        """Refuse an authorization request without an S256 challenge."""
        sent = grant.request.payload.data
        if sent.get("code_challenge_method") != "S256" or not S256_CHALLENGE.fullmatch(sent.get("code_challenge", "")):
            raise InvalidRequestError("PKCE with S256 is required", redirect_uri=redirect_uri)


class CodeGrant(AuthorizationCodeGrant):  # type: ignore[misc]
    """Authorization codes: single use, bound to client, redirect URI and challenge (RFC 6749 4.1)."""

    TOKEN_ENDPOINT_AUTH_METHODS = CLIENT_AUTH

    def generate_authorization_code(self) -> str:
        """Return a new code."""
        return f"sac_{secrets.token_urlsafe(32)}"

    def save_authorization_code(self, code: str, request: WireRequest) -> None:
        """Remember what was consented to; unticked scopes are gone from here on."""
        state: SandboxState = self.server.state
        sent = request.payload.data
        client_id, login = request.client.client_id, request.user.login
        kept = request.scope.split() if request.granted is None else request.granted
        grant = Grant(client_id, login)
        state.codes[sha256(code)] = AuthorizationCode(
            grant=grant,
            redirect_uri=sent["redirect_uri"],
            scope=" ".join(kept),
            nonce=sent.get("nonce"),
            code_challenge=sent["code_challenge"],
            with_refresh_token=state.wants_refresh_token(client_id, login, sent.get("prompt")),
            expires_at=state.clock() + state.options.code_seconds,
        )
        state.grants[login].append(grant)

    def query_authorization_code(self, code: str, client: Client) -> AuthorizationCode | None:
        """Return a live code of this client; one that was used before kills what came of it (RFC 6749 4.1.2)."""
        state: SandboxState = self.server.state
        found = state.codes.get(sha256(code))
        if found is None or found.grant.client_id != client.client_id:
            return None
        if found.used:
            state.counters.code_reuses += 1
            state.kill(found.grant)
            return None
        return found if found.grant.alive and found.expires_at > state.clock() else None

    def delete_authorization_code(self, authorization_code: AuthorizationCode) -> None:
        """Mark it as used: only a code that is remembered can betray its reuse."""
        authorization_code.used = True
        self.server.state.counters.exchanges += 1

    def authenticate_user(self, authorization_code: AuthorizationCode) -> User | None:
        """Return who consented."""
        state: SandboxState = self.server.state
        return state.users.get(authorization_code.grant.login or "")

    def generate_token(self, **details: Any) -> TokenAnswer:  # noqa: ANN401 - passed on
        """Leave the refresh token out where this consent brings none."""
        details["include_refresh_token"] = self.request.authorization_code.with_refresh_token
        answer: TokenAnswer = super().generate_token(**details)
        return answer

    def save_token(self, token: TokenAnswer) -> None:
        """Make the tokens live; add the ID token (OpenID Connect Core 3.1.3.3)."""
        code: AuthorizationCode = self.request.authorization_code
        state: SandboxState = self.server.state
        state.remember(code.grant, token, granted_scope=code.scope)
        if "openid" in code.scope.split():
            token["id_token"] = sign_id_token(state, code, self.request.user, self.request.wire.fault)


class RefreshGrant(RefreshTokenGrant):  # type: ignore[misc]
    """Refreshing in the mode of the day (RFC 6749 6, RFC 9700 4.14)."""

    TOKEN_ENDPOINT_AUTH_METHODS = CLIENT_AUTH
    verdict: Verdict = "dead"

    def authenticate_refresh_token(self, refresh_token: str) -> RefreshToken | None:
        """Return the token if it answers; a reused one kills its grant. Another client's token is left alone."""
        state: SandboxState = self.server.state
        found = state.refresh_tokens.get(sha256(refresh_token))
        if found is None or not found.check_client(self.request.client):
            return None
        self.verdict = state.verdict(found)
        if self.verdict == "reuse":
            state.counters.reuse_alarms += 1
            state.kill(found.grant)
        return found if self.verdict in {"rotate", "keep", "replay"} else None

    def authenticate_user(self, refresh_token: RefreshToken) -> User | None:
        """Return whose grant it is."""
        state: SandboxState = self.server.state
        return state.users.get(refresh_token.grant.login or "")

    def create_token_response(self) -> tuple[int, TokenAnswer, list[tuple[str, str]]]:
        """Answer a replay with the successor that it had; everything else as Authlib does."""
        state: SandboxState = self.server.state
        if self.verdict == "replay":
            state.counters.replays += 1
            self.request.wire.visit.replayed = True
            return 200, self.request.refresh_token.successor, self.TOKEN_RESPONSE_HEADER
        response: tuple[int, TokenAnswer, list[tuple[str, str]]] = super().create_token_response()
        state.counters.refreshes += 1
        return response

    def generate_token(self, **details: Any) -> TokenAnswer:  # noqa: ANN401 - passed on
        """Give a static refresh token no successor."""
        details["include_refresh_token"] = self.verdict == "rotate"
        answer: TokenAnswer = super().generate_token(**details)
        return answer

    def save_token(self, token: TokenAnswer) -> None:
        """Make the new tokens live; the old access token goes first where it dies on refresh."""
        state: SandboxState = self.server.state
        old: RefreshToken = self.request.refresh_token
        if state.options.access_dies_on_refresh:
            state.kill_access(old.grant)
        state.remember(old.grant, token, granted_scope=old.scope)
        if self.verdict == "rotate":
            old.successor = token

    def revoke_old_credential(self, refresh_token: RefreshToken) -> None:
        """Mark a rotated token as used; it stays known, so that its reuse shows."""
        if self.verdict == "rotate":
            refresh_token.used_at = self.server.state.clock()


class ClientGrant(ClientCredentialsGrant):  # type: ignore[misc]
    """The client for itself (RFC 6749 4.4)."""

    TOKEN_ENDPOINT_AUTH_METHODS = CLIENT_AUTH

    def save_token(self, token: TokenAnswer) -> None:
        """Make it live; each one is a grant of its own."""
        state: SandboxState = self.server.state
        state.counters.client_credentials += 1
        state.remember(Grant(self.request.client.client_id, None), token, granted_scope=token["scope"])


class Revocation(RevocationEndpoint):  # type: ignore[misc]
    """RFC 7009: an unknown token is revoked already; what dies with a known one is an option."""

    CLIENT_AUTH_METHODS = CLIENT_AUTH

    def query_token(self, token_string: str, _token_type_hint: str | None) -> AccessToken | RefreshToken | None:
        """Find it, whatever the hint says."""
        state: SandboxState = self.server.state
        digest = sha256(token_string)
        return state.refresh_tokens.get(digest) or state.access_tokens.get(digest)

    def revoke_token(self, token: AccessToken | RefreshToken, _request: object) -> None:
        """Kill the token and what the options say goes with it."""
        state: SandboxState = self.server.state
        state.counters.revocations += 1
        token.revoked = True
        if state.options.revocation_kills == "user" and token.grant.login:
            state.kill_account(token.grant.login, client_id=token.grant.client_id)
        elif state.options.revocation_kills == "grant" and isinstance(token, RefreshToken):
            state.kill(token.grant)


class Issuer(IssuerParameter):  # type: ignore[misc]
    """Puts ``iss`` into every redirect to a client, errors included (RFC 9207)."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self(server)

    def get_issuer(self) -> str:
        """Return what the metadata says too."""
        return self._server.state.options.issuer


class Server(AuthorizationServer):  # type: ignore[misc]
    """Authlib's authorization server over the sandbox's state."""

    def __init__(self, state: SandboxState) -> None:
        super().__init__()
        self.state = state
        self.issuer_parameter = Issuer(self)
        self.register_token_generator("default", self._new_answer)
        self.register_client_auth_method("client_secret_basic", basic_client)
        self.register_grant(CodeGrant, [Pkce(required=True)])
        self.register_grant(RefreshGrant)
        self.register_grant(ClientGrant)
        self.register_endpoint(Revocation)

    def _new_answer(
        self, *, scope: str | None, client: Client, include_refresh_token: bool, **_: object
    ) -> TokenAnswer:
        return self.state.new_answer(client.get_allowed_scope(scope), with_refresh_token=include_refresh_token)

    def query_client(self, client_id: str) -> Client | None:
        """Find a registered client."""
        return self.state.clients.get(client_id)

    def validate_requested_scope(self, scope: str | None) -> None:
        """Refuse scopes that the sandbox does not know."""
        if not set((scope or "").split()) <= set(self.state.options.scopes):
            raise InvalidScopeError

    def create_oauth2_request(self, request: Request | WireRequest) -> WireRequest:
        """Wrap ours."""
        return request if isinstance(request, WireRequest) else WireRequest(request)

    def send_signal(self, name: str, *args: object, **kwargs: object) -> None:
        """Nobody listens."""

    def handle_response(self, status: int, body: Any, headers: Sequence[tuple[str, str]]) -> Answer:  # noqa: ANN401 - a dict or ""
        """Turn Authlib's triple into an answer."""
        location = dict(headers).get("Location")
        if location is not None:
            return Answer(status, location=location)
        return json_answer(body, status, headers)

    def refuse_authorization(self, error: Any) -> Answer:  # noqa: ANN401 - Authlib's OAuth2Error
        """Send the browser back with the error and ``iss``, if the redirect URI was found good; else say so on a page."""
        if not error.redirect_uri:
            return Answer(400, document={"error": error.error})
        answer: Answer = self.handle_error_response(None, error)
        self.issuer_parameter.add_issuer_parameter(self, answer)
        return answer


def basic_credentials(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Read HTTP Basic, both parts form-encoded (RFC 6749 2.3.1; Authlib leaves ``+`` as it is). None for anything else."""
    scheme, _, encoded = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        client_id, _, client_secret = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return unquote_plus(client_id), unquote_plus(client_secret)


def basic_client(query_client: Callable[[str], Client | None], request: WireRequest) -> Client | None:
    """Authenticate a client by HTTP Basic."""
    client_id, client_secret = basic_credentials(request.headers) or ("", "")
    client = query_client(client_id)
    return client if client and client.check_client_secret(client_secret) else None


def sign_id_token(state: SandboxState, code: AuthorizationCode, user: User, wanted: Fault | None) -> str:
    """Return the ID token of an exchange, RS256 with the newest key, spoilt if a fault says so."""
    now = int(state.clock())
    claims: dict[str, Any] = {
        "iss": state.options.issuer,
        "sub": user.id,
        "aud": code.grant.client_id,
        "iat": now,
        "exp": now + 3600,
        **identity_claims(user, code.scope.split()),
    }
    if code.nonce is not None:
        claims["nonce"] = code.nonce
    spoilt = wanted if wanted is not None and wanted.kind == "id_token" else None
    if spoilt is not None:
        claims = {name: value for name, value in {**claims, **spoilt.claims}.items() if value is not None}
    key = state.keys[0]
    signed = jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)
    if spoilt is None or not spoilt.bad_signature:
        return signed
    head, signature = signed.rsplit(".", 1)
    return f"{head}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"


def identity_claims(user: User, scopes: Sequence[str]) -> dict[str, Any]:
    """Return what these scopes say about a user (OpenID Connect Core 5.4)."""
    profile = {"name": user.name, "preferred_username": user.login} if "profile" in scopes else {}
    email = {"email": user.email, "email_verified": True} if "email" in scopes else {}
    return {**profile, **email}


# HTTP: endpoints ------------------------------------------------------------------------------------------------------


def json_answer(document: Any, status: int = 200, headers: Sequence[tuple[str, str]] = ()) -> Answer:  # noqa: ANN401 - any JSON
    """Make an answer of JSON that nobody stores."""
    known = [*headers] or [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
    kept = document if isinstance(document, dict) else {}
    return Answer(status, msgspec.json.encode(document), known, document=kept)


def refusal(status: int, error: str, *headers: tuple[str, str]) -> Answer:
    """Make an error answer in the manner of OAuth; the code is ours, never input."""
    return json_answer({"error": error}, status, [("Content-Type", "application/json"), *headers])


class Sandbox:
    """The ASGI application: ``state`` to look at and to steer, ``issuer`` as the base of every URL."""

    def __init__(self, state: SandboxState) -> None:
        self.state = state
        self.server = Server(state)
        loader = jinja2.PackageLoader("broker.demo")
        self.pages = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
        )
        self._senders: dict[str, list[Channel]] = {}
        self._date = (0, "")

    @property
    def issuer(self) -> str:
        """The issuer identifier; no slash at its end."""
        return self.state.options.issuer

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request; ``drop`` and ``cut`` need the connection, which ``serve_sandbox`` hands in."""
        if scope["type"] != "http":
            raise RuntimeError("the sandbox speaks HTTP only")
        channel = Channel(receive, send, scope.get("extensions", {}).get(DROP), self._date_header)
        request = await read_request(scope, receive)
        if request is None:
            await channel.answer(refusal(413, "payload_too_large"))  # reaches only those who are still there
            return
        methods = ROUTES.get(request.path) or (CONTROL.get(request.path) if self.state.options.control else None)
        if methods is None:
            await channel.answer(refusal(404, "not_found"))
            return
        route = methods.get(request.method)
        if route is None:
            await channel.answer(refusal(405, "method_not_allowed", ("Allow", ", ".join(methods))))
            return
        await self._serve(route, request, channel)

    async def _serve(self, route: Route, request: Request, channel: Channel) -> None:
        read_parameters(route.endpoint, request)
        visit = request.visit = describe(self.state, route.endpoint, request)
        request.fault = self.state.take_fault(route.endpoint, visit.account, visit.grant_type)
        visit.fault = request.fault.kind if request.fault else None
        key = visit.presented if visit.grant_type == "refresh_token" else None
        if key is None:
            await self._answer(route, request, channel)
            return
        others = self._senders.setdefault(key, [])
        try:
            await self._notice(others, channel)
            await self._answer(route, request, channel)
        finally:
            others.remove(channel)
            if not others:
                self._senders.pop(key, None)

    async def _notice(self, others: list[Channel], channel: Channel) -> None:
        """Count a second sender of a refresh token while a first one is being served, both still on the line.

        A sender that hung up and sent again may be seen in either order; who hangs up at once is not counted.
        """
        earlier = tuple(others)
        others.append(channel)
        if earlier and await channel.stays(SETTLE_SECONDS):
            self.state.counters.concurrent_senders += any(not other.gone for other in earlier)

    async def _answer(self, route: Route, request: Request, channel: Channel) -> None:
        wanted, visit = request.fault, request.visit
        before = wanted if wanted and not wanted.commit else None
        if channel.gone or (before and not await inflict(before, channel)):
            visit.answered = before is not None and before.kind == "answer" and not channel.gone
            visit.outcome = "refused" if visit.answered else "dropped"
            return
        answer = route.handle(self, request)
        settle(visit, answer)
        latency = self.state.options.latency_seconds if route.endpoint == "token" else 0
        if not await channel.stays(latency) or (wanted and wanted.commit and not await inflict(wanted, channel)):
            return
        if wanted and wanted.kind == "cut":
            await channel.cut(answer)
            return
        await channel.answer(answer)
        visit.answered = True

    def _date_header(self) -> str:
        second = int(self.state.clock() + self.state.options.date_skew_seconds)
        if self._date[0] != second:
            self._date = (second, formatdate(second, usegmt=True))
        return self._date[1]


class Channel:
    """The caller's connection for one request. ``gone`` once the caller was seen to hang up."""

    def __init__(
        self, receive: Receive, send: Send, drop: Callable[[bool], None] | None, date: Callable[[], str]
    ) -> None:
        self.gone = False
        self._receive = receive
        self._send = send
        self._drop = drop
        self._date = date

    async def stays(self, seconds: float) -> bool:
        """Wait; False as soon as the caller hangs up."""
        if seconds <= 0:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hang_up()
        return not self.gone

    async def answer(self, answer: Answer) -> None:
        """Send the whole answer."""
        await self._begin(answer)
        await self._send({"type": "http.response.body", "body": answer.body})

    async def cut(self, answer: Answer) -> None:
        """Send all headers and half of the body, then hang up."""
        await self._begin(answer)
        half = answer.body[: len(answer.body) // 2]
        await self._send({"type": "http.response.body", "body": half, "more_body": True})
        await self.drop(reset=False)

    async def drop(self, *, reset: bool) -> None:
        """Hang up. RuntimeError under a server that does not hand its connection in (see ``DroppableProtocol``)."""
        if self._drop is None:
            raise RuntimeError("this server cannot drop a connection: use serve_sandbox")
        self._drop(reset)
        await self._hang_up()  # an application that returns without an answer would be given one by the server

    async def _begin(self, answer: Answer) -> None:
        headers = [*answer.headers, ("content-length", str(len(answer.body))), ("date", self._date())]
        if answer.location is not None:
            headers.append(("location", answer.location))
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": answer.status, "headers": raw})

    async def _hang_up(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass  # what is left of the request
        self.gone = True


async def inflict(wanted: Fault, channel: Channel) -> bool:
    """Do what the fault says at this point; True when the request goes on as usual."""
    if wanted.kind == "stall":
        return await channel.stays(wanted.seconds)
    if wanted.kind == "drop":
        await channel.drop(reset=wanted.reset)
        return False
    if wanted.kind == "answer":
        body = wanted.body.encode() if isinstance(wanted.body, str) else msgspec.json.encode(wanted.body)
        headers = {
            "content-type": "application/json",
            **{name.lower(): value for name, value in wanted.headers.items()},
        }
        await channel.answer(Answer(wanted.status, body, list(headers.items())))
        return False
    return True


async def read_request(scope: Message, receive: Receive) -> Request | None:
    """Read the request whole; None when it is too large or its sender left before its end: half a request has no effect."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY or message["type"] == "http.disconnect":
            return None
        if not message.get("more_body"):
            break
    names = [name.decode("latin-1") for name, _ in scope["headers"]]
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    query = scope["query_string"].decode("latin-1")
    return Request(scope["method"], scope["path"], query, headers, bytes(body), names.count("authorization") > 1)


def read_parameters(endpoint: EndpointName, request: Request) -> None:
    """Fill in the OAuth parameters and whether they break RFC 6749 3.1 and 3.2 (form-encoded, none twice)."""
    if endpoint not in RECORDED:
        return
    source = request.query if endpoint == "authorize" else request.body.decode("latin-1")
    pairs = parse_qsl(source, keep_blank_values=True)
    request.parameters = {name: value for name, value in pairs if value}  # an empty one counts as left out (3.1)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    coded = endpoint == "authorize" or content_type == "application/x-www-form-urlencoded"
    two_ways = "authorization" in request.headers and "client_secret" in request.parameters
    request.malformed = request.malformed or not coded or len(dict(pairs)) != len(pairs) or two_ways


def describe(state: SandboxState, endpoint: EndpointName, request: Request) -> Visit:
    """Begin the record of a request: who it claims to be for, and the digest of what it presents."""
    if endpoint not in RECORDED:
        token = state.access_tokens.get(sha256(bearer_token(request) or ""))
        return Visit(number=0, at=0, endpoint=endpoint, account=token.grant.login if token else None)
    sent = request.parameters
    visit = state.note(endpoint)
    visit.client_id = claimed_client(state, request)
    visit.grant_type = sent["grant_type"] if sent.get("grant_type") in GRANT_TYPES else None
    visit.prompt = sent["prompt"] if sent.get("prompt") in PROMPTS else None
    presented = sent.get(PRESENTED.get(visit.grant_type or endpoint, ""))
    if presented is not None:
        visit.presented = sha256(presented)
        tables = (state.refresh_tokens, state.codes, state.access_tokens)
        known = next((table[visit.presented] for table in tables if visit.presented in table), None)
        visit.account = known.grant.login if known else None
    elif endpoint == "authorize":
        visit.account = sent.get("login_hint") if LOGIN.fullmatch(sent.get("login_hint", "")) else None
    return visit


def claimed_client(state: SandboxState, request: Request) -> str | None:
    """Return the client id that the request names, if it is registered: a log of strangers' text is nobody's."""
    basic = basic_credentials(request.headers)
    named = basic[0] if basic else request.parameters.get("client_id", "")
    return named if named in state.clients else None


def settle(visit: Visit, answer: Answer) -> None:
    """Complete the record with what was decided."""
    location = dict(parse_qsl(urlsplit(answer.location or "").query))
    visit.error = answer.document.get("error") or location.get("error")
    if visit.error is not None:
        visit.outcome = "refused"
        return
    visit.outcome = "shown" if visit.endpoint == "authorize" and answer.location is None else "committed"
    if "access_token" in answer.document:
        visit.scopes = tuple(answer.document["scope"].split())
        visit.issued_access = sha256(answer.document["access_token"])
    if "refresh_token" in answer.document:
        visit.issued_refresh = sha256(answer.document["refresh_token"])


def authorize(sandbox: Sandbox, request: Request) -> Answer:
    """Show the consent page, or act on what was decided there, by header (``X-Sandbox-Decision``) or by ``auto_consent``."""
    answer = consent(sandbox, request)
    if answer.location is None:
        error = answer.document.get("error")
        if error is not None:
            answer.body = sandbox.pages.get_template("refused.html").render(error=error).encode()
        answer.headers = [*PAGE_HEADERS]
        return answer
    if request.fault is not None and request.fault.kind == "callback":
        answer.location = changed_query(answer.location, request.fault.parameters)
    sandbox.state.counters.authorizations += "code" in dict(parse_qsl(urlsplit(answer.location).query))
    answer.headers = [("cache-control", "no-store"), ("referrer-policy", "no-referrer")]
    return answer


def consent(sandbox: Sandbox, request: Request) -> Answer:
    """Decide an authorization request: a redirect, a page to show, or an error that no redirect may carry."""
    if request.malformed:
        return Answer(400, document={"error": "invalid_request"})
    try:
        grant = sandbox.server.get_consent_grant(request)
    except OAuth2Error as error:
        return sandbox.server.refuse_authorization(error)
    except ValueError:  # Authlib quotes input in its texts, and refuses to when a character does not belong in one
        return Answer(400, document={"error": "invalid_request"})
    choice = read_choice(sandbox.state, request, grant.request.scope.split())
    user = sandbox.state.user(choice.login)
    if user is None or choice.decision not in {"allow", "deny", None}:
        return Answer(400, document={"error": "invalid_request"})
    if choice.decision is None:
        return consent_page(sandbox, request, grant.request, user)
    request.visit.account, request.visit.scopes = user.login, choice.granted
    grant.request.granted = choice.granted
    allowed = user if choice.decision == "allow" and choice.granted else None
    answer: Answer = sandbox.server.create_authorization_response(grant.request, grant_user=allowed, grant=grant)
    return answer


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user decided; ``decision`` is None while nothing is decided."""

    decision: str | None
    login: str
    granted: tuple[str, ...]


def read_choice(state: SandboxState, request: Request, asked: Sequence[str]) -> Choice:
    """Read the decision from the submitted page, else from headers, else from ``auto_consent``."""
    hinted = request.parameters.get("login_hint", DEFAULT_LOGIN)
    if request.method == "POST":
        form = parse_qsl(request.body.decode("latin-1"))
        ticked = {value for name, value in form if name == "granted"}
        chosen = dict(form)
        granted = tuple(scope for scope in asked if scope in ticked)
        return Choice(chosen.get("decision", ""), chosen.get("user", hinted), granted)
    decision = request.headers.get("x-sandbox-decision", "allow" if state.options.auto_consent else None)
    wanted = request.headers.get("x-sandbox-scopes")
    return Choice(decision, hinted, tuple(scope for scope in asked if wanted is None or scope in wanted.split()))


def consent_page(sandbox: Sandbox, request: Request, asked: WireRequest, chosen: User) -> Answer:
    """Return the page with the made-up users and a box for each scope."""
    people = dict.fromkeys([sandbox.state.users["ada"], sandbox.state.users["grace"], chosen])
    page = sandbox.pages.get_template("consent.html").render(
        client_id=asked.client.client_id,
        query=urlencode(request.parameters),
        users=list(people),
        chosen=chosen.login,
        scopes=asked.scope.split(),
    )
    return Answer(200, page.encode())


def changed_query(url: str, parameters: Mapping[str, str | None]) -> str:
    """Return the URL with query parameters replaced or, where None, removed."""
    parts = urlsplit(url)
    changed = {**dict(parse_qsl(parts.query, keep_blank_values=True)), **parameters}
    return urlunsplit(
        parts._replace(query=urlencode({name: value for name, value in changed.items() if value is not None}))
    )


def token(sandbox: Sandbox, request: Request) -> Answer:
    """Exchange, refresh, or issue to the client itself (RFC 6749 3.2)."""
    if request.malformed:
        return refusal(400, "invalid_request")
    answer: Answer = sandbox.server.create_token_response(request)
    return answer


def revoke(sandbox: Sandbox, request: Request) -> Answer:
    """Revoke a token (RFC 7009)."""
    if request.malformed:
        return refusal(400, "invalid_request")
    answer: Answer = sandbox.server.create_endpoint_response("revocation", request)
    return answer


def metadata(sandbox: Sandbox, _request: Request) -> Answer:
    """Describe the server (RFC 8414, OpenID Connect Discovery)."""
    issuer = sandbox.issuer
    return json_answer(
        {
            "issuer": issuer,
            "authorization_endpoint": f"{issuer}/authorize",
            "token_endpoint": f"{issuer}/token",
            "userinfo_endpoint": f"{issuer}/userinfo",
            "jwks_uri": f"{issuer}/jwks",
            "revocation_endpoint": f"{issuer}/revoke",
            "scopes_supported": sandbox.state.options.scopes,
            "response_types_supported": ["code"],
            "response_modes_supported": ["query"],
            "grant_types_supported": GRANT_TYPES,
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "token_endpoint_auth_methods_supported": CLIENT_AUTH,
            "revocation_endpoint_auth_methods_supported": CLIENT_AUTH,
            "code_challenge_methods_supported": ["S256"],
            "claims_supported": ["sub", "name", "preferred_username", "email", "email_verified"],
            "authorization_response_iss_parameter_supported": True,
        }
    )


def jwks(sandbox: Sandbox, _request: Request) -> Answer:
    """Publish the public keys."""
    return json_answer({"keys": [key.as_dict(private=False) for key in sandbox.state.keys]})


def bearer_token(request: Request) -> str | None:
    """Return the token of the Authorization header (RFC 6750 2.1), the only place where one is looked for."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return value if scheme.lower() == "bearer" and value else None


def caller(sandbox: Sandbox, request: Request) -> AccessToken | Answer:
    """Return the live token of an API request, or the refusal (RFC 6750 3)."""
    challenge = 'Bearer realm="sandbox"'
    presented = bearer_token(request)
    found = sandbox.state.live(presented) if presented and not request.malformed else None
    if found is not None:
        sandbox.state.counters.api_calls += 1
        return found
    sandbox.state.counters.api_refusals += 1
    if request.malformed:
        return refusal(400, "invalid_request", ("WWW-Authenticate", f'{challenge}, error="invalid_request"'))
    if presented is None:
        return refusal(401, "missing_token", ("WWW-Authenticate", challenge))
    return refusal(401, "invalid_token", ("WWW-Authenticate", f'{challenge}, error="invalid_token"'))


def userinfo(sandbox: Sandbox, request: Request) -> Answer:
    """Say who the user is (OpenID Connect Core 5.3)."""
    found = caller(sandbox, request)
    if isinstance(found, Answer):
        return found
    user = sandbox.state.users.get(found.grant.login or "")
    if user is None or "openid" not in found.scope.split():
        challenge = 'Bearer realm="sandbox", error="insufficient_scope", scope="openid"'
        return refusal(403, "insufficient_scope", ("WWW-Authenticate", challenge))
    return json_answer({"sub": user.id, **identity_claims(user, found.scope.split())})


def api_me(sandbox: Sandbox, request: Request) -> Answer:
    """Name the account that a token acts for, and count the call."""
    found = caller(sandbox, request)
    if isinstance(found, Answer):
        return found
    user = sandbox.state.users.get(found.grant.login or "")
    name = user.login if user else f"client:{found.grant.client_id}"
    sandbox.state.api_calls[name] += 1
    account = {"id": user.id, "login": user.login, "name": user.name, "email": user.email} if user else None
    return json_answer(
        {
            "account": account,
            "client_id": found.grant.client_id,
            "scopes": found.scope.split(),
            "calls": sandbox.state.api_calls[name],
        }
    )


def api_echo(sandbox: Sandbox, request: Request) -> Answer:
    """Say what arrived: the Authorization header as a digest, unless ``echo_credentials`` asks for a careless API."""
    found = caller(sandbox, request)
    if isinstance(found, Answer):
        return found
    headers = dict(request.headers)
    if not sandbox.state.options.echo_credentials:
        del headers["authorization"]
    return json_answer(
        {
            "method": request.method,
            "path": request.path,
            "query": request.query,
            "headers": headers,
            "body": base64.b64encode(request.body).decode(),
            "access_token_sha256": found.digest,
        }
    )


# HTTP: control, for tests in another process -----------------------------------------------------------------------------


def show_log(sandbox: Sandbox, request: Request) -> Answer:
    """Return counters and what was seen, oldest first; ``?after=<number>`` skips what is known already."""
    asked = dict(parse_qsl(request.query)).get("after", "0")
    after = int(asked) if asked.isdecimal() else 0
    seen = [visit for visit in sandbox.state.visits if visit.number > after]
    return json_answer({"counters": sandbox.state.counters, "requests": seen})


def clear_log(sandbox: Sandbox, _request: Request) -> Answer:
    """Forget what was seen."""
    sandbox.state.clear_log()
    return json_answer({})


def show_faults(sandbox: Sandbox, _request: Request) -> Answer:
    """List what will go wrong, and the presets' names."""
    return json_answer({"faults": sandbox.state.faults, "presets": list(FAULTS)})


def clear_faults(sandbox: Sandbox, _request: Request) -> Answer:
    """Behave again."""
    sandbox.state.clear_faults()
    return json_answer({})


def steer(act: Callable[[SandboxState, dict[str, Any]], object]) -> Handler:
    """Make a handler of a function over the state and a JSON object; what it refuses is a 400 with the reason."""

    def handle(sandbox: Sandbox, request: Request) -> Answer:
        try:
            sent = msgspec.json.decode(request.body or b"{}", type=dict[str, Any])
            return json_answer(act(sandbox.state, sent) or {})
        except (ValueError, TypeError, KeyError) as error:
            return json_answer({"error": "invalid_request", "reason": str(error)}, 400)

    return handle


def add_fault(state: SandboxState, sent: dict[str, Any]) -> None:
    """``{"preset": "fail", …changes}``, or a whole ``Fault``."""
    preset = sent.pop("preset", None)
    state.add_fault(fault(preset, **sent) if preset is not None else msgspec.convert(sent, Fault))


def add_client(state: SandboxState, sent: dict[str, Any]) -> None:
    """``{client_id, client_secrets, redirect_uris, auth_methods?, default_scope?}``."""
    sent["client_secrets"] = [Secret(value) for value in sent["client_secrets"]]
    state.add_client(**sent)


def change_options(state: SandboxState, sent: dict[str, Any]) -> dict[str, Any]:
    """Any ``SandboxOptions`` but the fixed ones; return them all."""
    state.configure(**sent)
    return msgspec.structs.asdict(state.options)


Handler: TypeAlias = Callable[[Sandbox, Request], Answer]


@dataclass(frozen=True, slots=True)
class Route:
    """What answers at a path and method, and the endpoint name that faults and the log use."""

    endpoint: EndpointName
    handle: Handler


def control(act: Callable[[SandboxState, dict[str, Any]], object]) -> Route:
    """Route to a steering function."""
    return Route("control", steer(act))


RECORDED: Final = frozenset({"authorize", "token", "revoke"})
GRANT_TYPES: Final = ("authorization_code", "refresh_token", "client_credentials")
PRESENTED: Mapping[str, str] = {"authorization_code": "code", "refresh_token": "refresh_token", "revoke": "token"}
PROMPTS: Final = frozenset({"none", "login", "consent", "select_account", "login consent", "select_account consent"})
PAGE_HEADERS: Final = (
    ("content-type", "text/html; charset=utf-8"),
    ("cache-control", "no-store"),
    ("referrer-policy", "no-referrer"),
    (
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    ),
)
ECHO: Mapping[str, Route] = dict.fromkeys(("GET", "POST", "PUT", "PATCH", "DELETE"), Route("api", api_echo))
ROUTES: Mapping[str, Mapping[str, Route]] = {
    "/.well-known/openid-configuration": {"GET": Route("discovery", metadata)},
    "/.well-known/oauth-authorization-server": {"GET": Route("discovery", metadata)},
    "/jwks": {"GET": Route("jwks", jwks)},
    "/authorize": {"GET": Route("authorize", authorize), "POST": Route("authorize", authorize)},
    "/token": {"POST": Route("token", token)},
    "/revoke": {"POST": Route("revoke", revoke)},
    "/userinfo": {"GET": Route("userinfo", userinfo), "POST": Route("userinfo", userinfo)},
    "/api/me": {"GET": Route("api", api_me)},
    "/api/echo": ECHO,
}
CONTROL: Mapping[str, Mapping[str, Route]] = {
    "/_control/log": {"GET": Route("control", show_log), "DELETE": Route("control", clear_log)},
    "/_control/faults": {
        "GET": Route("control", show_faults),
        "POST": control(add_fault),
        "DELETE": Route("control", clear_faults),
    },
    "/_control/options": {"PATCH": control(change_options)},
    "/_control/clients": {"POST": control(add_client)},
    "/_control/keys": {"POST": control(lambda state, sent: {"kid": state.rotate_keys(**sent)})},
    "/_control/mint": {"POST": control(lambda state, sent: state.mint(**sent))},
    "/_control/kill": {"POST": control(lambda state, sent: {"killed": state.kill_account(**sent)})},
}

# Serving --------------------------------------------------------------------------------------------------------------

DROP: Final = "sandbox.drop"  # our own ASGI extension: a function that hangs up


class DroppableProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which hands the application a way to hang up, and logs no request line (codes stand in them)."""

    def __init__(self, config: uvicorn.Config, server_state: ServerState) -> None:
        super().__init__(config, server_state, {})
        self.access_log = False

    def on_message_begin(self) -> None:
        """Offer the way out in the request's scope."""
        super().on_message_begin()
        self.scope["extensions"] = {DROP: self.drop}  # type: ignore[dict-item]  # ours is a function

    def drop(self, reset: bool) -> None:  # noqa: FBT001 - called through ASGI
        """Close after what was written; by RST instead of FIN if asked for."""
        if reset:
            # Works on every event loop: options belong to the connection, so a duplicate of its descriptor will do.
            with socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno())) as twin:
                twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.close()


def create_sandbox(
    options: SandboxOptions,
    *,
    clock: Callable[[], float] = time.time,
    signing_key: RSAKey | None = None,
) -> Sandbox:
    """Return the ASGI application; ``options.issuer`` must be its base URL. ``serve_sandbox`` does that and more."""
    if not options.issuer:
        raise ValueError("the sandbox must know its issuer")
    return Sandbox(SandboxState(options, clock=clock, signing_key=signing_key))


@contextlib.asynccontextmanager
async def serve_sandbox(
    options: SandboxOptions | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    clock: Callable[[], float] = time.time,
    signing_key: RSAKey | None = None,
) -> AsyncIterator[Sandbox]:
    """Serve on the running loop until the block ends; the issuer is ``http://host:port`` unless the options name one.

    Port 0 takes a free one. At the end connections are cut and requests under way are ended. ValueError for a control API
    that others than this machine could reach.
    """
    options = options or SandboxOptions()
    if options.control and not is_loopback(host):
        raise ValueError("the control API is for loopback only")
    with contextlib.closing(listen(host, port)) as listening:
        shown = f"[{host}]" if ":" in host else host
        issuer = options.issuer or f"http://{shown}:{listening.getsockname()[1]}"
        sandbox = create_sandbox(msgspec.structs.replace(options, issuer=issuer), clock=clock, signing_key=signing_key)
        serving = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(protocol_factory(sandbox, serving), sock=listening, backlog=1024)
        try:
            yield sandbox
        finally:
            server.close()
            await _end(serving)
            await server.wait_closed()


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket; OSError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol has to be named: asyncio sets TCP_NODELAY only then, and without it an answer takes 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening


def protocol_factory(sandbox: Sandbox, serving: ServerState) -> Callable[[], asyncio.Protocol]:
    """Return what makes a connection's protocol; logging stays as it is, no header is added but the sandbox's own."""
    config = uvicorn.Config(
        sandbox,
        log_config=None,
        lifespan="off",
        ws="none",
        interface="asgi3",
        proxy_headers=False,
        timeout_keep_alive=300,
    )
    config.load()
    return lambda: DroppableProtocol(config, serving)


async def _end(serving: ServerState) -> None:
    for connection in list(serving.connections):
        connection.transport.abort()
    if serving.tasks:  # each sees its caller hang up and ends by itself
        await asyncio.wait(serving.tasks, timeout=5)


async def run_sandbox(host: str, port: int, options: SandboxOptions) -> None:
    """Serve until SIGINT or SIGTERM, after printing where."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    try:
        async with serve_sandbox(options, host=host, port=port) as sandbox:
            sys.stdout.write(f"sandbox provider: {sandbox.issuer}\n")
            sys.stdout.flush()
            await stopped.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m broker.demo.sandbox``."""
    parser = argparse.ArgumentParser(prog="python -m broker.demo.sandbox", description="A made-up OAuth provider.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument(
        "--mode", choices=["strict", "grace", "static"], default="strict", help="what used refresh tokens do"
    )
    parser.add_argument("--access-token-seconds", type=int, default=3600)
    parser.add_argument("--redirect-uri", action="append", default=[], help="of the demo client; may be repeated")
    parser.add_argument("--auto-consent", action="store_true", help="redirect at once instead of showing the page")
    parser.add_argument("--control", action="store_true", help="open /_control, for tests")
    chosen = parser.parse_args(arguments)
    options = SandboxOptions(
        mode=chosen.mode,
        access_token_seconds=chosen.access_token_seconds,
        redirect_uris=tuple(chosen.redirect_uri) or SandboxOptions().redirect_uris,
        auto_consent=chosen.auto_consent,
        control=chosen.control,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_sandbox(chosen.host, chosen.port, options))


if __name__ == "__main__":
    main()
