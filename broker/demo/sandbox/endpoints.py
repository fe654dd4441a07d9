"""The sandbox's endpoints: consent, tokens, revocation, metadata, and the API that tokens are for."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from authlib.oauth2.rfc6749 import OAuth2Error

from broker.demo.sandbox.application import Route, Routes, Sandbox
from broker.demo.sandbox.authority import WireRequest, identity_claims
from broker.demo.sandbox.options import CLIENT_AUTH, DEFAULT_LOGIN, GRANT_TYPES
from broker.demo.sandbox.state import AccessToken, SandboxState, User
from broker.demo.sandbox.wire import Answer, Request, bearer_token, json_answer, refusal

PAGE_HEADERS: Final = (
    ("content-type", "text/html; charset=utf-8"),
    ("cache-control", "no-store"),
    ("referrer-policy", "no-referrer"),
    (
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    ),
)


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


ECHO: Mapping[str, Route] = dict.fromkeys(("GET", "POST", "PUT", "PATCH", "DELETE"), Route("api", api_echo))
ROUTES: Routes = {
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
