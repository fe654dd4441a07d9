"""What the sandbox knows: users, clients, grants, tokens, and what each of them is worth right now."""

from __future__ import annotations

import hashlib
import ipaddress
import random
import re
import secrets
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import msgspec
from joserfc.jwk import RSAKey

from broker.demo.sandbox.options import (
    CLIENT_AUTH,
    DEMO_CLIENT_ID,
    DEMO_CLIENT_SECRET,
    Counters,
    Fault,
    SandboxOptions,
    Visit,
    fault,
)
from providers.spec import Secret

LOGIN: Final = re.compile(r"[A-Za-z0-9._@+-]{1,64}")


def sha256(value: str) -> str:
    """Return the lower-case hex SHA-256 by which the log and the state know a token or code."""
    return hashlib.sha256(value.encode()).hexdigest()


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
        self.chance = random.Random()  # noqa: S311 - of faults; a test puts a seeded one here
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
            if fits and found.grant_type in {None, grant_type} and self.chance.random() < found.share:
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
