"""Authlib's server half over the sandbox's state: what an authorization server decides.

Authlib has no types, so each class that extends one of its own is "Any" to mypy: hence the ignores.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from authlib.oauth2.rfc6749 import AuthorizationServer, InvalidRequestError, InvalidScopeError, OAuth2Request
from authlib.oauth2.rfc6749.grants import AuthorizationCodeGrant, ClientCredentialsGrant, RefreshTokenGrant
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc7009 import RevocationEndpoint
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oauth2.rfc9207 import IssuerParameter
from joserfc import jwt

from broker.demo.sandbox.options import CLIENT_AUTH, Fault
from broker.demo.sandbox.state import (
    AccessToken,
    AuthorizationCode,
    Client,
    Grant,
    RefreshToken,
    SandboxState,
    TokenAnswer,
    User,
    Verdict,
    sha256,
)
from broker.demo.sandbox.wire import Answer, Request, basic_credentials, json_answer

S256_CHALLENGE: Final = re.compile(r"[A-Za-z0-9_-]{43}")


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
