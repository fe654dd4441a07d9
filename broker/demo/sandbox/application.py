"""The sandbox as an ASGI application: routes a request, records it, and lets it go wrong where a fault says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Final, TypeAlias
from urllib.parse import parse_qsl, urlsplit

import jinja2

from broker.demo.sandbox.authority import Server
from broker.demo.sandbox.options import GRANT_TYPES, EndpointName, Visit
from broker.demo.sandbox.state import LOGIN, SandboxState, sha256
from broker.demo.sandbox.wire import (
    DROP,
    Answer,
    Channel,
    Message,
    Receive,
    Request,
    Send,
    basic_credentials,
    bearer_token,
    inflict,
    read_request,
    refusal,
)

SETTLE_SECONDS: Final = 0.005  # a caller that hung up and called again is not two callers; its hang-up may arrive late
RECORDED: Final = frozenset({"authorize", "token", "revoke"})
PRESENTED: Mapping[str, str] = {"authorization_code": "code", "refresh_token": "refresh_token", "revoke": "token"}
PROMPTS: Final = frozenset({"none", "login", "consent", "select_account", "login consent", "select_account consent"})


class Sandbox:
    """The ASGI application: ``state`` to look at and to steer, ``issuer`` as the base of every URL."""

    def __init__(self, state: SandboxState, routes: Routes, control: Routes) -> None:
        self.state = state
        self.server = Server(state)
        self._routes = routes
        self._control = control
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
        steered = self._control.get(request.path) if self.state.options.control else None
        methods = self._routes.get(request.path) or steered
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
            if before is not None and visit.answered:
                visit.error, visit.status = before.error, before.status
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
        visit.answered, visit.status = True, answer.status

    def _date_header(self) -> str:
        second = int(self.state.clock() + self.state.options.date_skew_seconds)
        if self._date[0] != second:
            self._date = (second, formatdate(second, usegmt=True))
        return self._date[1]


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


Handler: TypeAlias = Callable[[Sandbox, Request], Answer]


@dataclass(frozen=True, slots=True)
class Route:
    """What answers at a path and method, and the endpoint name that faults and the log use."""

    endpoint: EndpointName
    handle: Handler


Routes: TypeAlias = Mapping[str, Mapping[str, Route]]
