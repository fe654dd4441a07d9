"""A server on loopback that plays a ``Behaviour``: strict, and it says in a sentence what a client did wrong."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, unquote_plus, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

from providers import PLACEHOLDER, URL_FIELDS
from providers.spec import OAuth2, Provider
from tests.fakes import Fake, Reply, Seen, listening
from tests.providers.behaviour import Answer, Behaviour, Call

FORM, JSON = "application/x-www-form-urlencoded", "application/json"
CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
DISCOVERED = {
    "issuer": "issuer",
    "authorize_url": "authorization_endpoint",
    "token_url": "token_endpoint",
    "jwks_url": "jwks_uri",
    "revoke_url": "revocation_endpoint",
    "device_url": "device_authorization_endpoint",
    "userinfo_url": "userinfo_endpoint",
}


class Wrong(Exception):
    """What a client did that this provider would not take; the sentence fails the test."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass
class Code:
    """What an authorization request asked for, until its code is used."""

    challenge: str | None
    nonce: str | None
    used: bool = False


@dataclass
class Like:
    """A provider at work, with one grant at most. ``counts`` says how often what happened; ``complaints`` should stay empty.

    ``secrets`` are the client's good ones, the first signs callbacks. ``busy``: the token endpoint has no time.
    """

    behaviour: Behaviour
    provider: Provider
    redirect_uri: str
    base: str
    client_id: str = "like-client"
    secrets: list[str] = field(default_factory=lambda: ["like-secret-1"])
    busy: bool = False
    complaints: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    newest: dict[str, set[str]] = field(default_factory=lambda: {"access": set(), "refresh": set()})
    live: set[str] = field(default_factory=set)
    _known: set[str] = field(default_factory=set)
    _dead: set[str] = field(default_factory=set)
    _codes: dict[str, Code] = field(default_factory=dict)
    _cores: dict[str, str] = field(default_factory=dict)

    # Where it is

    @property
    def oauth2(self) -> OAuth2:
        """The provider's dialogue."""
        assert self.provider.oauth2 is not None
        return self.provider.oauth2

    def url(self, name: str) -> str:
        """Return where the provider has something, as documented, else as its file says; ``""`` for nowhere."""
        return self.behaviour.urls.get(name) or str(getattr(self.oauth2, name))

    def local(self, url: str) -> str:
        """Return where this server has what the provider has at ``url``."""
        return f"{self.base}/{url.removeprefix('https://')}" if url else ""

    def config(self) -> dict[str, Any]:
        """Return the ``config`` of an integration that moves every address of the provider's file to this server."""
        hosts = {name: self.local(url) for name, url in self.provider.hosts.items()}
        named = {name: str(getattr(self.oauth2, name)) or self.behaviour.urls.get(name, "") for name in URL_FIELDS}
        urls = {name: self.local(url) for name, url in named.items() if url}
        if self.oauth2.discovery:
            urls = {"issuer": urls["issuer"]}
        if "" in hosts:
            urls["api_base_url"] = hosts.pop("")
        public = {"client_auth": "none"} if self.behaviour.client_auth == "none" else {}
        return {**urls, **public, **({"hosts": hosts} if hosts else {})}

    def filled(self, text: str) -> str:
        """Put the variables of this account, and the client's id, into a URL or a text."""
        known = {variable.name: variable.default for variable in self.provider.variables}
        known.update({**self.behaviour.variables, **self.behaviour.given, "client_id": self.client_id})
        return PLACEHOLDER.sub(lambda found: known.get(found[1]) or found[0], text)

    def _path(self, url: str) -> str:
        return urlsplit(self.local(self.filled(url))).path

    # What tests do to it

    def end_grant(self) -> None:
        """Let the user take the consent back: no token is live any more."""
        self._dead |= self.live
        self.live.clear()

    # Serving

    def answer(self, seen: Seen) -> Reply:
        """Answer one request; what is wrong with it is kept as a complaint."""
        try:
            if any(secret in unquote_plus(seen.target) for secret in (*self.secrets, *self._known)):
                raise Wrong(f"a secret stands in the URL of {seen.path}")  # noqa: TRY301 - one way out for all
            return self._routed(seen)
        except Wrong as wrong:
            self.complaints.append(f"{self.behaviour.provider}: {wrong}")
            return wrong.status, {"error": "invalid_request"}

    def _routed(self, seen: Seen) -> Reply:
        if seen.path == self._path(self.url("authorize_url")):
            return self._authorize(seen)
        if seen.path in {self._path(self.url("token_url")), self._path(self.url("refresh_url") or "https://none.test")}:
            return self._token(seen)
        if self.url("jwks_url") and seen.path == self._path(self.url("jwks_url")):
            return 200, {"keys": [{**signing_key().as_dict(private=False), "use": "sig", "alg": "RS256"}]}
        well_known = f"{self._path(self.url('issuer')).rstrip('/')}/.well-known/openid-configuration"
        if self.oauth2.discovery and seen.path == well_known:
            named = {theirs: self.local(self.filled(self.url(ours))) for ours, theirs in DISCOVERED.items()}
            methods = {"token_endpoint_auth_methods_supported": [self.behaviour.client_auth]}
            return 200, {**{name: url for name, url in named.items() if url}, **methods}
        return self._called(seen)

    # Authorization endpoint

    def _authorize(self, seen: Seen) -> Reply:
        pairs = parse_qsl(urlsplit(seen.target).query, keep_blank_values=True)
        asked = dict(pairs)
        if seen.method != "GET":
            raise Wrong("the authorization request is no GET", 405)
        if len(asked) < len(pairs):
            raise Wrong("a parameter of the authorization request comes twice")
        for problem in self._asked_problems(asked):
            raise Wrong(f"the authorization request {problem}")
        code = f"code-{secrets.token_urlsafe(16)}"
        self._codes[code] = Code(asked.get("code_challenge"), asked.get("nonce"))
        added = {name: self.local(text) if name == "iss" else text for name, text in self.behaviour.callback.items()}
        came = {"code": code, "state": asked["state"], **added}
        if self.behaviour.signs_callback:
            signed = "&".join(f"{name}={came[name]}" for name in sorted(came)).encode()
            came["hmac"] = hmac.new(self.secrets[0].encode(), signed, hashlib.sha256).hexdigest()
        self.counts["authorize"] += 1
        return 302, b"", {"Location": f"{self.redirect_uri}?{urlencode(came)}"}

    def _asked_problems(self, asked: Mapping[str, str]) -> Iterator[str]:
        known, scopes = self.behaviour, self.behaviour.scope_separator.join(self.behaviour.asked_scopes)
        wanted = {"response_type": "code", known.client_id_param: self.client_id, "redirect_uri": self.redirect_uri}
        wanted.update({known.scope_param: scopes} if known.scope_param and scopes else {})
        wanted.update({name: self.filled(text) for name, text in known.authorize_needs.items()})
        for name, value in wanted.items():
            if asked.get(name) != value:
                yield f"must have {name}={value}, and has {asked.get(name)}"
        if "client_id" in asked and "client_id" not in wanted:
            yield "has a client_id, which has another name here"
        if "scope" in asked and "scope" not in wanted:
            yield "has a scope, which this provider does not take there"
        if not asked.get("state"):
            yield "has no state"
        challenge = (asked.get("code_challenge"), asked.get("code_challenge_method"))
        if known.pkce == "checked" and not (CHALLENGE.fullmatch(challenge[0] or "") and challenge[1] == "S256"):
            yield "lacks PKCE with S256"
        if known.pkce == "refused" and challenge != (None, None):
            yield "has PKCE, which this provider refuses"

    # Token endpoint

    def _token(self, seen: Seen) -> Reply:
        known = self.behaviour
        if seen.method != "POST" or "?" in seen.target:
            raise Wrong("a request for tokens is no POST, or has a query", 405)
        members = _members(seen, {"form": FORM, "json": JSON}[known.token_format])
        for name, value in known.token_headers.items():
            if seen.headers.get(name.lower()) != value:
                raise Wrong(f"a request for tokens lacks the header {name}: {value}")
        rest = {name: value for name, value in members.items() if name not in {known.client_id_param, "client_secret"}}
        grant_type = rest.pop("grant_type", None)
        home = self.url("refresh_url") if grant_type == "refresh_token" else ""
        if seen.path != self._path(home or self.url("token_url")):
            raise Wrong(f"{grant_type} goes to another address")
        if not self._proven(seen, members):
            self.counts["client refused"] += 1
            return self._said(known.refused_client)
        if grant_type == "authorization_code":
            return self._exchange(rest)
        if grant_type == "refresh_token":
            return self._refresh(rest)
        raise Wrong(f"the grant type {grant_type} is unknown")

    def _proven(self, seen: Seen, members: Mapping[str, Any]) -> bool:
        """Whether the client is the right one; Wrong when it proves itself in another way than this provider takes."""
        kind, basic, id_name = self.behaviour.client_auth, _basic(seen), self.behaviour.client_id_param
        in_body = {name for name in (id_name, "client_secret") if name in members}
        fitting: dict[str, set[str]] = {
            "client_secret_basic": set(),
            "client_secret_post": {id_name, "client_secret"},
            "none": {id_name},
        }
        if in_body != fitting[kind] or (basic is not None) != (kind == "client_secret_basic"):
            raise Wrong(f"the client has to prove itself by {kind}, once", 401)
        if kind == "none":
            return bool(members[id_name] == self.client_id)
        given_id, given = basic or (members[id_name], members["client_secret"])
        if given_id != self.client_id:
            raise Wrong("the client id is another one", 401)
        return given in self.secrets

    def _exchange(self, rest: dict[str, Any]) -> Reply:
        known = self.behaviour
        code = self._codes.get(str(rest.pop("code", "")))
        if code is None or code.used:
            raise Wrong("the code is unknown, or was used before")
        if rest.pop("redirect_uri", None) != self.redirect_uri:
            raise Wrong("the exchange has another redirect_uri than the authorization request")
        verifier = rest.pop("code_verifier", None)
        if known.pkce == "refused" and verifier is not None:
            raise Wrong("the exchange has a PKCE verifier, which this provider refuses")
        if known.pkce == "checked" and (not isinstance(verifier, str) or challenge_of(verifier) != code.challenge):
            raise Wrong("the PKCE verifier does not fit the challenge")
        self._require(rest, known.exchange_needs, "the exchange")
        code.used = True
        self.counts["exchange"] += 1
        return 200, self._issued(known.code_answer, code.nonce)

    def _refresh(self, rest: dict[str, Any]) -> Reply:
        known = self.behaviour
        token = rest.pop("refresh_token", None)
        if token not in self._known:
            raise Wrong("the refresh token was never given out")
        redirect_uri = {"redirect_uri": self.redirect_uri} if known.refresh_repeats_redirect_uri else {}
        self._require(rest, {**known.refresh_needs, **redirect_uri}, "the refresh")
        if self.busy:
            self.counts["busy"] += 1
            return self._said(known.busy)
        if token in self._dead:
            self.counts["dead"] += 1
            return self._said(known.dead)
        if token not in self.live:
            raise Wrong("the refresh token was used before")
        assert known.refresh_answer is not None
        if known.rotates:
            self.live -= self.newest["refresh"]
            self._cores.pop("refresh", None)
        if known.ends_access:
            self.live -= self.newest["access"]
        self.counts["refresh"] += 1
        return 200, self._issued(known.refresh_answer, None)

    def _require(self, rest: Mapping[str, Any], needs: Mapping[str, str], what: str) -> None:
        wanted = {name: self.filled(value) for name, value in needs.items()}
        for name in sorted({*rest, *wanted}):
            if rest.get(name) != wanted.get(name):
                raise Wrong(f"{what} must have {name}={wanted.get(name)}, and has {rest.get(name)}")

    def _issued(self, template: Mapping[str, Any], nonce: str | None) -> Any:
        """Return an answer with fresh tokens in it, which are live from now on."""
        fresh = {"refresh": secrets.token_urlsafe(24), **self._cores, "access": secrets.token_urlsafe(24)}
        cores = self._cores = {name: fresh[name] for name in ("access", "refresh")}
        cores = {**cores, "in_30_days": (datetime.now(UTC) + timedelta(days=30)).strftime("%Y-%m-%dT%H:%M:%SZ")}
        if "{id_token}" in json.dumps(template):
            cores = {**cores, "id_token": self._id_token(nonce)}
        for kind in ("access", "refresh"):
            made = {put_in(text, cores) for text in _texts(template) if f"{{{kind}}}" in text}
            self.newest[kind] = made or (set() if kind == "access" else self.newest[kind])
            self.live |= made
            self._known |= made
        return _replaced(template, cores)

    def _id_token(self, nonce: str | None) -> str:
        now, key = int(time.time()), signing_key()
        claims: dict[str, Any] = {
            "iss": self.url("issuer"),
            "sub": self.behaviour.account_id,
            "aud": self.client_id,
            "iat": now,
        }
        claims.update({"exp": now + 3600, **({"nonce": nonce} if nonce else {}), **self.behaviour.claims})
        claims["iss"] = self.local(self.filled(claims["iss"]))
        return jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)

    # API calls

    def _called(self, seen: Seen) -> Reply:
        here = [call for call in self.behaviour.calls if self._path(call.url) == seen.path]
        if not here:
            raise Wrong(f"there is nothing at {seen.method} {seen.path}", 404)
        problems = {at: list(self._call_problems(call, seen)) for at, call in enumerate(here)}
        best = min(problems, key=lambda at: len(problems[at]))
        if problems[best]:
            raise Wrong(f"{seen.method} {seen.path} {problems[best][0]}", 401 if "bearer" in problems[best][0] else 400)
        call = here[best]
        self.counts["kill" if call.kills else "call"] += 1
        reply = self._said(call.answer)
        if call.kills:
            self.end_grant()
        return reply

    def _call_problems(self, call: Call, seen: Seen) -> Iterator[str]:
        if seen.method != call.method:
            yield f"has to be a {call.method}"
        query = [sorted(parse_qsl(urlsplit(self.filled(url)).query)) for url in (call.url, seen.target)]
        if query[0] != query[1]:
            yield "has another query"
        sent = seen.headers.get("authorization", "")
        if call.bearer and (not sent.startswith("Bearer ") or sent[7:] not in self.live & self.newest["access"]):
            yield "has no live bearer token"
        if call.basic and _basic(seen) not in {(self.client_id, secret) for secret in self.secrets}:
            yield "lacks the client's Basic credentials"
        headers = {name.lower(): value for name, value in call.headers.items()}
        if sent and not call.bearer and not call.basic and "authorization" not in headers:
            yield "has an Authorization that it should not have"
        for name, value in headers.items():
            if seen.headers.get(name) not in self._meant(value):
                yield f"lacks the header {name}: {value}"
        members = _members(seen, seen.headers.get("content-type", "")) if call.needs else {}
        for name, value in call.needs.items():
            if _as_text(members.get(name)) not in self._meant(value):
                yield f"lacks the member {name}={value}"

    def _meant(self, text: str) -> set[str]:
        """Return every text that a template may stand for."""
        text = self.filled(text)
        kind = next((kind for kind in ("access", "refresh") if f"{{{kind}}}" in text), None)
        if "{client_secret}" in text:
            return {text.replace("{client_secret}", secret) for secret in self.secrets}
        if kind is None:
            return {text}
        with_beginning = put_in(
            text, self._cores
        )  # "Bearer {access}" and "Bearer gho_{access}" both mean the whole token
        whole = {text.replace(f"{{{kind}}}", token) for token in self.newest[kind]}
        return whole | {with_beginning for token in self.newest[kind] if token in with_beginning}

    def _said(self, answer: Answer) -> Reply:
        tokens = {kind: next(iter(held), "") for kind, held in self.newest.items()}
        body = answer.body.encode() if isinstance(answer.body, str) else _replaced(answer.body, tokens)
        return answer.status, b"" if body is None else body, answer.headers


@functools.cache
def signing_key() -> RSAKey:
    """Return the key that signs ID tokens, made once."""
    return RSAKey.generate_key(2048, parameters={"kid": "like"})


def challenge_of(verifier: str) -> str:
    """Return the S256 challenge of a verifier (RFC 7636 4.2)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


def put_in(text: str, cores: Mapping[str, str]) -> str:
    """Put tokens into a template."""
    return PLACEHOLDER.sub(lambda found: cores.get(found[1], found[0]), text)


def _replaced(template: Any, cores: Mapping[str, str]) -> Any:
    if isinstance(template, str):
        return put_in(template, cores)
    if isinstance(template, Mapping):
        return {name: _replaced(value, cores) for name, value in template.items()}
    return [_replaced(value, cores) for value in template] if isinstance(template, list | tuple) else template


def _texts(template: Any) -> Iterator[str]:
    if isinstance(template, str):
        yield template
    elif isinstance(template, Mapping | list | tuple):
        for value in template.values() if isinstance(template, Mapping) else template:
            yield from _texts(value)


def _members(seen: Seen, kind: str) -> dict[str, Any]:
    sent = seen.headers.get("content-type", "").partition(";")[0].strip()
    if sent != kind.partition(";")[0].strip() or sent not in {FORM, JSON}:
        raise Wrong(
            f"{seen.method} {seen.path} has to be {kind or 'a form or JSON'}, and is {sent or 'of no type'}", 415
        )
    if sent == FORM:
        pairs = parse_qsl(seen.body.decode(), keep_blank_values=True)
        if len(dict(pairs)) < len(pairs):
            raise Wrong(f"a member of {seen.path} comes twice")
        return dict(pairs)
    found = json.loads(seen.body)
    if not isinstance(found, dict):
        raise Wrong(f"{seen.path} takes an object")
    return found


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _basic(seen: Seen) -> tuple[str, str] | None:
    scheme, _, encoded = seen.headers.get("authorization", "").partition(" ")
    if scheme != "Basic":
        return None
    client_id, _, secret = base64.b64decode(encoded).decode().partition(":")
    return unquote_plus(client_id), unquote_plus(secret)


@asynccontextmanager
async def playing(behaviour: Behaviour, provider: Provider, redirect_uri: str) -> AsyncIterator[Like]:
    """Serve a behaviour on a free port."""
    likes: list[Like] = []

    def answer(seen: Seen) -> Reply:
        return likes[0].answer(seen)

    fake: Fake
    async with listening(answer) as fake:
        likes.append(Like(behaviour, provider, redirect_uri, fake.base))
        yield likes[0]
