"""The authorization-code flow of one browser: start, callback, and the pending connection that a confirm must follow.

``start`` writes a row and returns where to send the browser. ``finish`` checks everything that can be checked without the
provider, consumes the flow by one conditional update, exchanges the code, verifies who consented, and leaves a *pending*
connection with a one-time confirm code. The row's sealed outcome answers a duplicate of the same browser for 120 s.
PKCE S256 always (RFC 7636), state bound to a cookie, ``iss`` checked (RFC 9207), nonce with OpenID Connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.audit import Audit, Entry
from broker.credentials import oauth_value, secret_owner
from broker.database import Database, now
from broker.egress import Egress
from broker.errors import (
    BrokerError,
    EgressDenied,
    FlowError,
    NotFound,
    ProviderUnavailable,
    RateLimited,
    UpstreamInvalid,
)
from broker.integrations import Configured, Integrations
from broker.integrations.config import Endpoints
from broker.models import BrowserSession, Connection, Flow, new_id
from broker.oauth.browser import new_cookie_value
from broker.oauth.confirm import Confirmations, Newcomer, keeps_refresh_token
from broker.oauth.identity import IdentityInvalid, UnknownKey, plain_account, verify_id_token
from broker.oauth.return_to import allowed_return_to
from broker.sessions import digest, same_digest
from broker.settings import Settings
from broker.token_endpoint import (
    TokenAnswer,
    TokenRefusal,
    authorize_url,
    challenge,
    exchange_request,
    granted_scopes,
    missing_scopes,
    new_verifier,
    parse_answer,
)
from broker.vault import SecretUnreadable, Vault
from broker.vault.keyring import Sealer
from providers.spec import Account, Credential, Dialogue, Secret

FLOW_SECONDS = 600.0
OUTCOME_SECONDS = 120.0
CONFIRM_CODE_SECONDS = 120.0
WAIT_FOR_TWIN_SECONDS = 60.0
NEVER_REDIRECTED = frozenset({"return_to_invalid", "state_invalid", "session_bound"})  # what belongs to somebody else
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Start:
    """What a browser brings to ``/oauth/{integration}/start``; ``session`` is one that this browser owns, or None."""

    integration: str
    return_to: str | None
    session: BrowserSession | None
    address: str


@dataclass(frozen=True, slots=True)
class Started:
    """Where to send the browser, and the cookie that binds the flow to it."""

    url: str
    cookie_name: str
    cookie_value: Secret


@dataclass(frozen=True, slots=True)
class Callback:
    """What a browser brings back: parameters as received (duplicates kept) and its flow cookies by name."""

    integration: str
    parameters: Sequence[tuple[str, str]]
    cookies: Mapping[str, str]

    def one(self, name: str) -> str | None:
        """Return a parameter; a repeated one is refused (FlowError ``state_invalid``)."""
        values = [value for key, value in self.parameters if key == name]
        if len(values) > 1:
            raise FlowError("state_invalid")
        return values[0] if values else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a flow ended: ``url`` to go to next, or, without any return_to, what the built-in page shows."""

    url: str | None
    error: str | None = None
    connection_id: str | None = None
    confirm_code: Secret | None = None
    missing_scopes: tuple[str, ...] = ()
    again: bool = False


class Flows:
    """Runs flows. Methods may run at once on every replica; the database decides who acts."""

    def __init__(
        self,
        database: Database,
        vault: Vault,
        sealer: Sealer,
        egress: Egress,
        integrations: Integrations,
        confirmations: Confirmations,
        audit: Audit,
        settings: Settings,
    ) -> None:
        """Keep the parts."""
        self._database = database
        self._vault = vault
        self._sealer = sealer
        self._egress = egress
        self._integrations = integrations
        self._confirmations = confirmations
        self._audit = audit
        self._settings = settings

    # Start

    async def start(self, wanted: Start) -> Started:
        """Write the flow and return the provider's authorize URL (FlowError, NotFound)."""
        return_to = self._return_to(wanted.return_to, wanted.session)
        configured = await self._startable(wanted)
        cookie = new_cookie_value()
        row = _new_flow(wanted, configured, return_to, cookie, self._settings)
        return Started(await self._begin(row, configured), row.cookie_name, cookie)

    def way_back(
        self, error: FlowError | RateLimited, return_to: str | None, session: BrowserSession | None
    ) -> str | None:
        """Return where a start that failed sends the browser: its allowed ``return_to`` with the error's code.

        None where a page is shown instead: there is no ``return_to``, it is not on the list, or the link is of another
        browser. ``session`` is one that this browser owns.
        """
        code = error.flow_code if isinstance(error, FlowError) else error.code
        if code in NEVER_REDIRECTED:
            return None
        try:
            allowed = self._return_to(return_to, session)
        except FlowError:
            return None
        return None if allowed is None else with_query(allowed, {"status": "error", "error": code})

    def _return_to(self, asked: str | None, session: BrowserSession | None) -> str | None:
        if asked is None and session is not None:
            asked = session.return_to
        if asked is None:
            return self._settings.default_return_to
        if not allowed_return_to(asked, self._settings.return_to, development=self._settings.development):
            raise FlowError("return_to_invalid")
        return asked

    async def _startable(self, wanted: Start) -> Configured:
        view = await self._integrations.get(wanted.integration)
        if view.status in {"inactive", "configuring"}:
            raise FlowError("integration_disabled")
        session = wanted.session
        if session is not None and session.integrations is not None and wanted.integration not in session.integrations:
            raise FlowError("session_required", "This session is for other integrations.")
        try:
            configured = await self._integrations.configured(wanted.integration)
        except (ProviderUnavailable, UpstreamInvalid, EgressDenied):
            raise FlowError("provider_unavailable") from None
        if not _has_flow(configured):
            raise FlowError("integration_disabled")
        if configured.config.require_session and session is None:
            raise FlowError("session_required")
        if session is not None and session.scopes and not _scopes_to_ask(session, configured):
            raise FlowError("session_expired")  # asking for no scope would get the provider's default ones
        return configured

    async def _begin(self, row: Flow, configured: Configured, *, forget: Flow | None = None) -> str:
        """Store a new flow with its sealed verifier and nonce; return where the browser goes."""
        state, verifier, nonce = secrets.token_urlsafe(32), new_verifier(), secrets.token_urlsafe(32)
        row.state_digest = digest(state)
        sealed = json.dumps({"verifier": verifier.reveal(), "nonce": nonce}).encode()
        row.sealed_verifier = self._sealer.seal(sealed, owner=row.id, purpose="verifier", version=1)
        url = authorize_url(
            configured.oauth2,
            authorize_url=row.plan["authorize_url"],
            client_id=row.plan["client_id"],
            redirect_uri=row.redirect_uri,
            scopes=row.scopes,
            state=state,
            verifier_challenge=challenge(verifier),
            nonce=nonce if _openid(configured, row.scopes) else None,
            extra=_extra_params(row, configured),
        )
        outcome = None if forget is None else self._sealed_outcome(forget, Outcome(url, again=True))

        def work(session: Session) -> None:
            at = now(session)
            row.created_at, row.expires_at = at, at + FLOW_SECONDS
            session.add(row)
            if forget is not None:
                session.execute(_outcome_update(forget.id, outcome, at))

        await self._database.transaction(work)
        return url

    # Callback

    async def finish(self, callback: Callback) -> Outcome:
        """Finish a flow: return where the browser goes, or raise FlowError for a page.

        A page, and nothing changed, for what does not belong to this browser: unknown or foreign state, missing cookie,
        repeated parameters. Everything after that ends at ``return_to``. The exchange happens once.
        """
        came = {name: callback.one(name) for name in ("state", "iss", "error", "code")}
        flow = await self._find(came["state"], callback)
        if flow.consumed_at is not None or not await self._consume(flow):
            return await self._twin(flow)
        outcome = await self._ended(flow, iss=came["iss"], error=came["error"], code=came["code"])
        if not outcome.again:
            await self._keep_outcome(flow, outcome)
        return outcome

    async def _ended(self, flow: Flow, *, iss: str | None, error: str | None, code: str | None) -> Outcome:
        """Run a consumed flow to its end, whatever that is."""
        try:
            _refuse(flow, iss=iss, error=error, code=code)
            return await self._exchange(flow, await self._as_planned(flow), code or "")
        except FlowError as failure:
            return _failed(flow, failure.flow_code)
        except BrokerError as failure:
            log.warning("flow.failed", flow_id=flow.id, integration=flow.integration, error=failure.code)
            return _failed(flow, "provider_unavailable")

    async def _find(self, state: str | None, callback: Callback) -> Flow:
        if not state:
            raise FlowError("state_invalid")
        query = select(Flow).where(Flow.state_digest == digest(state))
        flow = await self._database.read(lambda session: session.exec(query).one_or_none())
        if flow is None or flow.integration != callback.integration:
            raise FlowError("state_invalid")
        if not same_digest(callback.cookies.get(flow.cookie_name), flow.cookie_digest):
            raise FlowError("state_invalid")
        return flow

    async def _as_planned(self, flow: Flow) -> Configured:
        """Return the integration with the endpoints as they were at start, whatever was changed since.

        Nothing is discovered, so an issuer that was changed meanwhile is not even asked. FlowError when the integration
        was switched off, removed, or made anew for another provider.
        """
        plan = flow.plan
        endpoints = Endpoints(plan["urls"], plan["hosts"], plan["issuer"], plan["client_auth"], plan["iss_required"])
        try:
            configured = await self._integrations.configured(flow.integration, endpoints=endpoints)
        except NotFound:
            raise FlowError("integration_disabled") from None
        if not configured.row.enabled or configured.provider.name != plan["provider"] or not _has_flow(configured):
            raise FlowError("integration_disabled")
        return configured

    async def _consume(self, flow: Flow) -> bool:
        """One conditional update lets one callback act."""

        def work(session: Session) -> bool:
            at = now(session)
            mine = (
                sa.update(Flow)
                .where(col(Flow.id) == flow.id, col(Flow.consumed_at).is_(None))
                .values(consumed_at=at, outcome_until=at + OUTCOME_SECONDS)
            )
            return bool(session.execute(mine).rowcount == 1)  # type: ignore[attr-defined]

        return await self._database.transaction(work)

    async def _twin(self, flow: Flow) -> Outcome:
        """Wait for what the first callback of this browser came to, and answer the same."""
        deadline, pause_seconds = time.monotonic() + WAIT_FOR_TWIN_SECONDS, 0.05
        while time.monotonic() < deadline:
            row, at = await self._database.read(lambda session: (session.get(Flow, flow.id), now(session)))
            if row is None or row.outcome_until is None or row.outcome_until < at:
                raise FlowError("state_expired")
            if row.sealed_outcome is not None:
                return await self._opened_outcome(row)
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(0.5, pause_seconds * 1.3)
        raise FlowError("provider_unavailable")

    def _sealed_outcome(self, flow: Flow, outcome: Outcome) -> bytes:
        code = outcome.confirm_code.reveal() if outcome.confirm_code is not None else None
        body = [outcome.url, outcome.error, outcome.connection_id, code, outcome.missing_scopes, outcome.again]
        return self._sealer.seal(json.dumps(body).encode(), owner=flow.id, purpose="outcome", version=1)

    async def _opened_outcome(self, flow: Flow) -> Outcome:
        opened = await self._opened(flow, flow.sealed_outcome, "outcome")
        url, error, connection_id, code, missing, again = json.loads(opened)
        return Outcome(url, error, connection_id, Secret(code) if code else None, tuple(missing), again)

    async def _opened(self, flow: Flow, sealed: bytes | None, purpose: str) -> bytes:
        try:
            return await self._sealer.open_fresh(
                self._database, sealed or b"", owner=flow.id, purpose=purpose, version=1
            )
        except SecretUnreadable:
            raise FlowError("state_invalid") from None

    async def _keep_outcome(self, flow: Flow, outcome: Outcome) -> None:
        sealed = self._sealed_outcome(flow, outcome)

        def work(session: Session) -> None:
            session.execute(_outcome_update(flow.id, sealed, now(session)))
            if outcome.error is not None:
                self._audit.append(session, _entry("flow.failed", flow, outcome="failed", error=outcome.error))

        await self._database.transaction(work)
        if outcome.error is not None:
            await self._integrations.note(
                flow.integration, action="flow", level="error", text=f"a flow ended with {outcome.error}"
            )

    # Exchange

    async def _exchange(self, flow: Flow, configured: Configured, code: str) -> Outcome:
        if flow.expires_at < await self._database.read(now):
            raise FlowError("state_expired")
        sealed = json.loads(await self._opened(flow, flow.sealed_verifier, "verifier"))
        answer, received_at = await self._token(flow, configured, code, Secret(sealed["verifier"]))
        account = await self._account(flow, configured, answer, sealed["nonce"])
        if answer.refresh_token is None and configured.oauth2.refresh.expected:
            url = await self._ask_for_consent(flow, configured, account)
            if url is not None:
                return Outcome(url, again=True)
        await self._require_same_account(flow, account)
        return await self._leave_pending(flow, configured, answer, account, received_at)

    async def _token(
        self, flow: Flow, configured: Configured, code: str, verifier: Secret
    ) -> tuple[TokenAnswer, float]:
        """Exchange the code once per live client secret, newest first, until one is not refused."""
        client = replace(await self._integrations.client(configured), client_id=flow.plan["client_id"])
        parsed: TokenAnswer | TokenRefusal | None = None
        received_at = 0.0
        started = time.monotonic()
        for secret in client.secrets or (None,):
            request = exchange_request(
                configured.oauth2,
                token_url=configured.endpoints.urls["token_url"],
                client=client,
                secret=secret,
                code=Secret(code),
                redirect_uri=flow.redirect_uri,
                verifier=verifier,
            )
            try:
                answer = await self._egress.send(request, timeout_seconds=configured.config.timeout_seconds)
            except UpstreamInvalid:
                raise FlowError("exchange_failed") from None
            received_at = await self._database.read(now)
            parsed = parse_answer(configured.oauth2, answer, received_at=received_at)
            if not (isinstance(parsed, TokenRefusal) and parsed.outcome == "client_refused"):
                break
        await self._note_exchange(flow, parsed, started)
        if isinstance(parsed, TokenAnswer):
            return parsed, received_at
        transient = parsed is not None and parsed.outcome == "transient"
        raise FlowError("provider_unavailable" if transient else "exchange_failed")

    async def _note_exchange(self, flow: Flow, parsed: TokenAnswer | TokenRefusal | None, started: float) -> None:
        failed = not isinstance(parsed, TokenAnswer)
        text = f"the code was refused: {parsed.error}" if isinstance(parsed, TokenRefusal) else "the code was exchanged"
        level = "error" if failed else "info"
        elapsed = (time.monotonic() - started) * 1000
        with contextlib.suppress(BrokerError):  # a log line less is better than a token that came and is lost
            await self._integrations.note(
                flow.integration, action="exchange", level=level, text=text, duration_ms=elapsed
            )

    async def _account(self, flow: Flow, configured: Configured, answer: TokenAnswer, nonce: str) -> Account | None:
        """Return who consented: from the verified ID token, else from the provider's own identity call."""
        account: Account | None = None
        if _openid(configured, flow.scopes):
            if answer.id_token is None:
                raise FlowError("identity_invalid")
            account = await self._verified(flow, configured, answer.id_token, nonce)
        identify = configured.provider.identify
        if identify is None or (account is not None and account.name and account.email):
            return account
        try:
            asked = await self._asked(identify(_credential(flow, configured, answer)), configured)
        except FlowError:
            if account is not None:
                return account  # the ID token is proof enough; a name or an address is not worth the flow
            raise
        if account is None:
            return asked
        if asked.id != account.id:
            raise FlowError("identity_invalid")  # OpenID Connect Core 5.3.2: sub must be the same
        return Account(account.id, account.name or asked.name, account.email or asked.email)

    async def _asked(self, dialogue: Dialogue[Account], configured: Configured) -> Account:
        """Return what the provider's API says about the owner of the token (FlowError)."""
        try:
            origins = set(configured.endpoints.origins.values())
            return plain_account(await self._egress.converse(dialogue, origins=origins))
        except (UpstreamInvalid, IdentityInvalid):
            raise FlowError("identity_invalid") from None
        except BrokerError:
            raise FlowError("provider_unavailable") from None

    async def _verified(self, flow: Flow, configured: Configured, id_token: Secret, nonce: str) -> Account:
        oauth2, issuer = configured.oauth2, configured.endpoints.issuer
        issuers = (issuer, *(oauth2.issuer_aliases if issuer == oauth2.issuer else ()))
        at = await self._database.read(now)
        for attempt in range(2):
            jwks = await self._jwks(configured, again=attempt == 1)
            try:
                return verify_id_token(
                    id_token, jwks=jwks, issuers=issuers, client_id=flow.plan["client_id"], nonce=nonce, now=at
                )
            except UnknownKey:
                continue  # the provider may have rotated its keys since we fetched them
            except IdentityInvalid as error:
                log.warning("flow.identity_invalid", flow_id=flow.id, integration=flow.integration, why=str(error))
                raise FlowError("identity_invalid") from None
        raise FlowError("identity_invalid")

    async def _jwks(self, configured: Configured, *, again: bool) -> Mapping[str, Any]:
        return await self._integrations.jwks(configured.endpoints.urls["jwks_url"], again=again)

    async def _ask_for_consent(self, flow: Flow, configured: Configured, account: Account | None) -> str | None:
        """Return where to ask for consent again, once, when no refresh token came although this kind of app gets one.

        None when an existing connection of the same subject and account has one, which the confirm will keep.
        """
        if flow.subject is not None and account is not None:
            same = select(Connection).where(
                Connection.integration == flow.integration,
                Connection.subject == flow.subject,
                Connection.account_id == account.id,
                Connection.status != "pending",
                col(Connection.deleted_at).is_(None),
            )
            old = await self._database.read(lambda session: session.exec(same).first())
            coming = Newcomer(account.id, flow.plan["client_id"], configured.endpoints.origins)
            if old is not None and keeps_refresh_token(old, coming):
                return None
        if flow.consent_forced:
            raise FlowError("refresh_token_missing")
        return await self._begin(_again(flow), configured, forget=flow)

    async def _require_same_account(self, flow: Flow, account: Account | None) -> None:
        if flow.reconnects is None:
            return
        account_id = account.id if account is not None else None
        others = select(Connection.id).where(
            Connection.integration == flow.integration,
            Connection.subject == flow.subject,
            Connection.account_id == account_id,
            Connection.id != flow.reconnects,
            Connection.status != "pending",
            col(Connection.deleted_at).is_(None),
        )

        def work(session: Session) -> tuple[Connection | None, str | None]:
            return session.get(Connection, flow.reconnects), session.exec(others).first() if account_id else None

        old, other = await self._database.read(work)
        if old is None or old.deleted_at is not None or old.status == "pending":
            raise FlowError("session_expired")
        if old.account_id != account_id and (old.account_id is not None or other is not None):
            raise FlowError("account_mismatch")

    async def _leave_pending(
        self,
        flow: Flow,
        configured: Configured,
        answer: TokenAnswer,
        account: Account | None,
        received_at: float,
    ) -> Outcome:
        """Store the tokens, then the pending row that names their version, then hand out the confirm code."""
        pending, code = _pending(flow, configured, answer, account), Secret(secrets.token_urlsafe(32))
        connection_id = pending.id
        value = oauth_value(answer, received_at=received_at)
        version = await self._vault.put(secret_owner(connection_id), value, expected_version=0)
        pending.secret_version, pending.refreshable = version, "refresh_token" in value

        def work(session: Session) -> None:
            at = now(session)
            pending.created_at, pending.pending_until = at, at + configured.config.confirm_seconds
            session.add(pending)
            changes = {
                "connection_id": connection_id,
                "confirm_digest": digest(code.reveal()),
                "confirm_until": at + CONFIRM_CODE_SECONDS,
            }
            session.execute(sa.update(Flow).where(col(Flow.id) == flow.id).values(**changes))
            self._audit.append(session, _entry("connection.pending", flow, connection_id=connection_id))

        await self._database.transaction(work)
        at_once = configured.config.confirm == "without_session"
        survivor = await self._confirmations.activate_at_once(flow, pending) if at_once else None
        if survivor is not None:
            return _connected(flow, survivor.id, None, pending.missing_scopes)
        return _connected(flow, connection_id, code, pending.missing_scopes)


# Pure parts


def cookie_name(flow_id: str, *, development: bool) -> str:
    """Return the name of a flow's cookie; ``__Host-`` pins it to this host, https and the root path."""
    return f"{'' if development else '__Host-'}brk_f_{flow_id.removeprefix('flw_')}"


def _new_flow(wanted: Start, configured: Configured, return_to: str | None, cookie: Secret, settings: Settings) -> Flow:
    """Return a flow that lacks its state, verifier and times."""
    session, endpoints, flow_id = wanted.session, configured.endpoints, new_id("flw")
    return Flow(
        id=flow_id,
        state_digest="",
        cookie_name=cookie_name(flow_id, development=settings.development),
        cookie_digest=digest(cookie.reveal()),
        integration=wanted.integration,
        session_id=session.id if session is not None else None,
        subject=session.subject if session is not None else None,
        reconnects=session.reconnects if session is not None else None,
        return_to=return_to,
        redirect_uri=f"{settings.public_url}/oauth/{wanted.integration}/callback",
        scopes=_scopes_to_ask(session, configured),
        variables=dict(session.variables) if session is not None else {},
        tags=dict(session.tags) if session is not None else {},
        plan={
            "provider": configured.provider.name,
            "authorize_url": endpoints.urls["authorize_url"],
            "urls": dict(endpoints.urls),
            "hosts": dict(endpoints.hosts),
            "issuer": endpoints.issuer,
            "client_auth": endpoints.client_auth,
            "iss_required": endpoints.iss_required,
            "client_id": configured.row.client_id,
        },
        address=wanted.address,
    )


def _again(flow: Flow) -> Flow:
    """Return a second flow of the same browser that forces consent; it shares the first one's cookie."""
    copied = ("integration", "session_id", "subject", "reconnects", "return_to", "redirect_uri", "scopes", "variables")
    more = ("tags", "plan", "address", "cookie_name", "cookie_digest")
    kept: dict[str, Any] = {name: getattr(flow, name) for name in (*copied, *more)}
    return Flow(id=new_id("flw"), state_digest="", consent_forced=True, **kept)


def _extra_params(flow: Flow, configured: Configured) -> dict[str, str]:
    """Return what is asked besides the protocol's own: the provider's file, and above it the integration, have their way.

    OpenID Connect Core 11: ``offline_access`` counts only where consent is asked for; strict servers drop it silently.
    """
    oauth2 = configured.oauth2
    offline = _openid(configured, flow.scopes) and "offline_access" in flow.scopes
    first = oauth2.consent_params if offline else {}
    last = oauth2.consent_params if flow.consent_forced else {}
    return {**first, **oauth2.authorize_params, **configured.config.authorize_params, **last}


def _scopes_to_ask(session: BrowserSession | None, configured: Configured) -> list[str]:
    """Return the session's scopes as far as the integration still has them; without any, the integration's."""
    if session is None or session.scopes is None:
        return list(configured.row.scopes)
    return [scope for scope in session.scopes if scope in configured.row.scopes]


def _has_flow(configured: Configured) -> bool:
    """Whether there is all that a flow needs: single URLs in ``config`` may leave some out."""
    urls = configured.endpoints.urls
    needed = ["authorize_url", "token_url"]
    if _openid(configured, configured.row.scopes):
        needed.append("jwks_url")
    return configured.provider.oauth2 is not None and all(urls.get(name) for name in needed)


def _openid(configured: Configured, scopes: Sequence[str]) -> bool:
    oauth2 = configured.provider.oauth2
    return oauth2 is not None and oauth2.openid and "openid" in scopes


def _refuse(flow: Flow, *, iss: str | None, error: str | None, code: str | None) -> None:
    """Raise what stands against going on, judged by what was configured at start (RFC 9207 2.4)."""
    expected = flow.plan["issuer"]
    if (iss is None and flow.plan["iss_required"]) or (iss is not None and expected and iss != expected):
        raise FlowError("issuer_mismatch")
    if error is not None:
        known = {"access_denied": "access_denied", "temporarily_unavailable": "provider_unavailable"}
        raise FlowError(known.get(error, "provider_error"))
    if not code:
        raise FlowError("provider_error")


def _failed(flow: Flow, code: str) -> Outcome:
    if flow.return_to is None:
        return Outcome(None, error=code)
    return Outcome(with_query(flow.return_to, {"status": "error", "error": code}), error=code)


def _connected(flow: Flow, connection_id: str, code: Secret | None, missing: Sequence[str]) -> Outcome:
    if flow.return_to is None:
        return Outcome(None, connection_id=connection_id, confirm_code=code, missing_scopes=tuple(missing))
    added = {"status": "connected", "connection_id": connection_id}
    if code is not None:
        added["confirm"] = code.reveal()
    if missing:
        added["missing_scopes"] = " ".join(missing)
    return Outcome(with_query(flow.return_to, added), connection_id=connection_id, confirm_code=code)


def with_query(url: str, added: Mapping[str, str]) -> str:
    """Return ``url`` with parameters behind its own query, which is kept byte for byte."""
    parts = urlsplit(url)
    query = "&".join(filter(None, [parts.query, urlencode(added)]))
    return urlunsplit(parts._replace(query=query))


def _pending(flow: Flow, configured: Configured, answer: TokenAnswer, account: Account | None) -> Connection:
    granted = granted_scopes(configured.oauth2, flow.scopes, answer)
    return Connection(
        id=new_id("con"),
        integration=flow.integration,
        provider=configured.provider.name,
        subject=flow.subject,
        account_id=account.id if account is not None else None,
        account_name=account.name if account is not None else None,
        account_email=account.email if account is not None else None,
        status="pending",
        client_id=flow.plan["client_id"],
        pins=configured.endpoints.origins,
        variables=flow.variables,
        scopes=list(granted),
        missing_scopes=list(missing_scopes(configured.oauth2, flow.scopes, answer.scopes)),
        token_expires_at=answer.expires_at,
        refresh_expires_at=answer.refresh_expires_at,
        tags=flow.tags,
        flow_id=flow.id,
    )


def _credential(flow: Flow, configured: Configured, answer: TokenAnswer) -> Credential:
    return Credential(
        client_id=flow.plan["client_id"],
        client_secret=None,
        access_token=answer.access_token,
        refresh_token=answer.refresh_token,
        urls=configured.endpoints.urls,
        hosts=configured.endpoints.hosts,
        client_auth=configured.endpoints.client_auth,
    )


def _outcome_update(flow_id: str, sealed: bytes | None, at: float) -> sa.Update:
    """Return the update that keeps an outcome; the verifier goes with it: it has been used."""
    changes = {"sealed_outcome": sealed, "sealed_verifier": None, "outcome_until": at + OUTCOME_SECONDS}
    return sa.update(Flow).where(col(Flow.id) == flow_id).values(**changes)


def _entry(action: str, flow: Flow, *, outcome: str = "ok", connection_id: str | None = None, **detail: Any) -> Entry:  # noqa: ANN401 - JSON values
    return Entry(
        action=action,
        actor="browser",
        outcome=outcome,
        connection_id=connection_id,
        integration=flow.integration,
        subject=flow.subject,
        detail={"flow_id": flow.id, "address": flow.address, **detail},
    )
