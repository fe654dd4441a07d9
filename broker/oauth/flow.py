"""The authorization-code flow of one browser: start, callback, and the pending connection that a confirm must follow.

``start`` writes a row and returns where to send the browser. ``finish`` checks everything that can be checked without the
provider, consumes the flow by one conditional update, exchanges the code, verifies who consented, and leaves a *pending*
connection with a one-time confirm code. The row's sealed outcome answers a duplicate of the same browser for 120 s.
PKCE S256 (RFC 7636) unless the provider's file forbids it, state bound to a cookie, ``iss`` checked (RFC 9207), nonce with
OpenID Connect.

Beside it: ``plan`` (pure: what is asked for), ``exchange`` (the provider is asked), ``outcome`` (pure: how it ends).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    ProviderUnavailable,
    RateLimited,
    UpstreamInvalid,
)
from broker.integrations import Configured, Integrations
from broker.models import BrowserSession, Connection, Flow
from broker.oauth.browser import new_cookie_value
from broker.oauth.confirm import Confirmations, Newcomer, keeps_refresh_token
from broker.oauth.exchange import Exchange, Identified
from broker.oauth.outcome import (
    OUTCOME_SECONDS,
    Outcome,
    connected_outcome,
    error_url,
    failed_outcome,
    outcome_update,
    pending_connection,
    refuse,
)
from broker.oauth.plan import (
    Start,
    extra_params,
    has_flow,
    lacks_variables,
    learned_from,
    new_flow,
    planned_endpoints,
    scopes_to_ask,
    second_flow,
    speaks_openid,
)
from broker.oauth.return_to import allowed_return_to
from broker.sessions import digest, same_digest
from broker.settings import Settings
from broker.telemetry import Metrics
from broker.token_endpoint import Client, TokenAnswer, authorize_url, challenge, new_verifier
from broker.vault import SecretUnreadable, Vault
from broker.vault.keyring import Seal, Sealer
from providers.spec import Account, Secret

__all__ = [
    "CONFIRM_CODE_SECONDS",
    "FLOW_SECONDS",
    "OUTCOME_SECONDS",
    "Callback",
    "Flows",
    "Outcome",
    "Start",
    "Started",
]

FLOW_SECONDS = 600.0
CONFIRM_CODE_SECONDS = 120.0
WAIT_FOR_TWIN_SECONDS = 60.0
NEVER_REDIRECTED = frozenset({"return_to_invalid", "state_invalid", "session_bound"})  # what belongs to somebody else
log = structlog.get_logger()


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
class Brought:
    """What an exchange is made with: the code, its verifier, the nonce, and the variables that the callback named."""

    code: Secret
    verifier: Secret
    nonce: str
    learned: Mapping[str, str]


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
        metrics: Metrics,
    ) -> None:
        """Keep the parts."""
        self._database = database
        self._vault = vault
        self._sealer = sealer
        self._integrations = integrations
        self._exchange = Exchange(database, egress, integrations)
        self._confirmations = confirmations
        self._audit = audit
        self._settings = settings
        self._metrics = metrics

    # Start

    async def start(self, wanted: Start) -> Started:
        """Write the flow and return the provider's authorize URL (FlowError, NotFound)."""
        return_to = self._return_to(wanted.return_to, wanted.session)
        configured, secret_ids = await self._startable(wanted)
        cookie = new_cookie_value()
        row = new_flow(
            wanted,
            configured,
            self._settings,
            secret_ids=secret_ids,
            return_to=return_to,
            cookie_digest=digest(cookie.reveal()),
        )
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
        return None if allowed is None else error_url(allowed, code)

    def _return_to(self, asked: str | None, session: BrowserSession | None) -> str | None:
        if asked is None and session is not None:
            asked = session.return_to
        if asked is None:
            return self._settings.default_return_to
        if not allowed_return_to(asked, self._settings.return_to, development=self._settings.development):
            raise FlowError("return_to_invalid")
        return asked

    async def _startable(self, wanted: Start) -> tuple[Configured, Sequence[str]]:
        """Return what the flow begins with: the integration and the ids of its live client secrets (FlowError)."""
        view = await self._integrations.get(wanted.integration)
        if view.status in {"inactive", "configuring"}:
            raise FlowError("integration_disabled")
        session = wanted.session
        if session is not None and session.integrations is not None and wanted.integration not in session.integrations:
            raise FlowError("session_required", "This session is for other integrations.")
        try:
            given = session.variables if session is not None else None
            configured = await self._integrations.configured(wanted.integration, variables=given)
        except (ProviderUnavailable, UpstreamInvalid, EgressDenied):
            raise FlowError("provider_unavailable") from None
        if lacks_variables(configured):
            raise FlowError("session_required", "This link does not say which account's address it is for.")
        if not has_flow(configured):
            raise FlowError("integration_disabled")
        if configured.config.require_session and session is None:
            raise FlowError("session_required")
        if session is not None and session.scopes and not scopes_to_ask(session, configured):
            raise FlowError("session_expired")  # asking for no scope would get the provider's default ones
        return configured, view.secret_ids

    async def _begin(self, row: Flow, configured: Configured, *, forget: Flow | None = None) -> str:
        """Store a new flow with its sealed verifier and nonce; return where the browser goes."""
        state, verifier, nonce = secrets.token_urlsafe(32), new_verifier(), secrets.token_urlsafe(32)
        row.state_digest = digest(state)
        kept = json.dumps({"verifier": verifier.reveal(), "nonce": nonce}).encode()
        url = authorize_url(
            configured.oauth2,
            authorize_url=row.plan["authorize_url"],
            client_id=row.plan["client_id"],
            redirect_uri=row.redirect_uri,
            scopes=row.scopes,
            state=state,
            verifier_challenge=challenge(verifier),
            nonce=nonce if speaks_openid(configured, row.scopes) else None,
            extra=extra_params(row, configured),
        )

        def work(session: Session, seal: Seal) -> None:
            at = now(session)
            row.created_at, row.expires_at = at, at + FLOW_SECONDS
            row.sealed_verifier = seal(kept, owner=row.id, purpose="verifier", version=1)
            session.add(row)
            if forget is not None:
                session.execute(outcome_update(forget.id, _sealed(seal, forget, Outcome(url, again=True)), at))

        await self._sealer.write(self._database, work)
        return url

    # Callback

    async def finish(self, callback: Callback) -> Outcome:
        """Finish a flow: return where the browser goes, or raise FlowError for a page.

        A page, and nothing changed, for what does not belong to this browser or this flow: unknown or foreign state,
        missing cookie, repeated parameters, a signature that no live client secret made, another account's address than
        the flow was started for. Everything after that ends at ``return_to``. The exchange happens once.
        """
        came = {name: callback.one(name) for name in ("state", "iss", "error", "code")}
        flow = await self._find(came["state"], callback)
        learned = await self._vetted(flow, callback)
        if flow.consumed_at is not None or not await self._consume(flow):
            return await self._twin(flow)
        outcome, reached = await self._ended(flow, came, learned)
        if not outcome.again:
            await self._keep_outcome(flow, outcome, told=reached or flow.session_id is not None)
            self._metrics.flow(flow.plan["provider"], outcome.error or "connected")
        return outcome

    async def _vetted(self, flow: Flow, callback: Callback) -> dict[str, str]:
        """Return the variables that the callback brings, once its signature is checked where there is one (FlowError)."""
        provider = self._integrations.catalog.get(flow.plan["provider"])
        oauth2 = provider.oauth2 if provider is not None else None
        if provider is None or oauth2 is None:
            return {}  # the flow ends, and says so, where it was started from
        came = {name: callback.one(parameter) for name, parameter in oauth2.callback_variables.items()}
        try:
            learned = learned_from(flow, provider, came)
        except ValueError:
            raise FlowError("state_invalid") from None
        if oauth2.verify_callback is not None:
            configured = await self._exchange.as_planned(flow, learned)
            client = await self._exchange.client(flow, configured, learned)
            if not any(_signed(oauth2.verify_callback, callback.parameters, secret) for secret in client.secrets):
                log.warning("flow.callback_not_signed", flow_id=flow.id, integration=flow.integration)
                raise FlowError("state_invalid")
        return learned

    async def _ended(
        self, flow: Flow, came: Mapping[str, str | None], learned: Mapping[str, str]
    ) -> tuple[Outcome, bool]:
        """Run a consumed flow to its end, whatever that is; return also whether it reached the exchange."""
        reached = False
        try:
            refuse(planned_endpoints(flow, learned), iss=came["iss"], error=came["error"], code=came["code"])
            configured = await self._exchange.as_planned(flow, learned)
            sealed = await self._verifier(flow)
            client = await self._exchange.client(flow, configured, learned)
            brought = Brought(Secret(came["code"] or ""), Secret(sealed["verifier"]), sealed["nonce"], learned)
            reached = True
            return await self._exchanged(flow, configured, client, brought), reached
        except FlowError as failure:
            return failed_outcome(flow, failure.flow_code), reached
        except BrokerError as failure:
            log.warning("flow.failed", flow_id=flow.id, integration=flow.integration, error=failure.code)
            return failed_outcome(flow, "provider_unavailable"), reached

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

    async def _verifier(self, flow: Flow) -> Mapping[str, str]:
        """Return the opened verifier and nonce of a flow that is still in time (FlowError)."""
        if flow.expires_at < await self._database.read(now):
            raise FlowError("state_expired")
        return dict(json.loads(await self._opened(flow, flow.sealed_verifier, "verifier")))

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
                return Outcome.unpacked(await self._opened(row, row.sealed_outcome, "outcome"))
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(0.5, pause_seconds * 1.3)
        raise FlowError("provider_unavailable")

    async def _opened(self, flow: Flow, sealed: bytes | None, purpose: str) -> bytes:
        try:
            return await self._sealer.open_fresh(
                self._database, sealed or b"", owner=flow.id, purpose=purpose, version=1
            )
        except SecretUnreadable:
            raise FlowError("state_invalid") from None

    async def _keep_outcome(self, flow: Flow, outcome: Outcome, *, told: bool) -> None:
        """Keep what a duplicate gets. A failure that is not ``told`` is anybody's: logged, but no record in the chain."""

        def work(session: Session, seal: Seal) -> None:
            session.execute(outcome_update(flow.id, _sealed(seal, flow, outcome), now(session)))
            if outcome.error is not None and told:
                self._audit.append(session, _entry("flow.failed", flow, outcome="failed", error=outcome.error))

        await self._sealer.write(self._database, work)
        if outcome.error is not None and not told:
            log.info("flow.refused", flow_id=flow.id, integration=flow.integration, error=outcome.error)
        elif outcome.error is not None:
            await self._integrations.note(
                flow.integration, action="flow", level="error", text=f"a flow ended with {outcome.error}"
            )

    # What comes of it

    async def _exchanged(self, flow: Flow, configured: Configured, client: Client, brought: Brought) -> Outcome:
        answer, received_at = await self._exchange.tokens(
            flow, configured, client, code=brought.code, verifier=brought.verifier
        )
        known = await self._exchange.identified(flow, configured, answer, brought.nonce, brought.learned)
        if answer.refresh_token is None and configured.oauth2.refresh.expected:
            url = await self._ask_for_consent(flow, known.configured, known.account)
            if url is not None:
                return Outcome(url, again=True)
        await self._require_same_account(flow, known.account)
        return await self._leave_pending(flow, known, answer, received_at)

    async def _ask_for_consent(self, flow: Flow, configured: Configured, account: Account | None) -> str | None:
        """Return where to ask for consent again, once, when no refresh token came although this kind of app gets one.

        None when an existing connection of the same subject and account has one, which the confirm will keep.
        """
        if flow.subject is not None and account is not None:
            same = select(Connection).where(*_of_account(flow, account.id))
            old = await self._database.read(lambda session: session.exec(same).first())
            coming = Newcomer(account.id, flow.plan["client_id"], configured.endpoints.origins)
            if old is not None and keeps_refresh_token(old, coming):
                return None
        if flow.consent_forced:
            raise FlowError("refresh_token_missing")
        return await self._begin(second_flow(flow), configured, forget=flow)

    async def _require_same_account(self, flow: Flow, account: Account | None) -> None:
        """Raise FlowError when a reconnect brought an account that its connection cannot take."""
        if flow.reconnects is None:
            return
        account_id = account.id if account is not None else None
        others = select(Connection.id).where(*_of_account(flow, account_id), Connection.id != flow.reconnects)

        def work(session: Session) -> tuple[Connection | None, str | None]:
            return session.get(Connection, flow.reconnects), session.exec(others).first() if account_id else None

        old, other = await self._database.read(work)
        if old is None or old.deleted_at is not None or old.status == "pending":
            raise FlowError("session_expired")
        if old.account_id != account_id and (old.account_id is not None or other is not None):
            raise FlowError("account_mismatch")

    async def _leave_pending(self, flow: Flow, known: Identified, answer: TokenAnswer, received_at: float) -> Outcome:
        """Store the tokens, then the pending row that names their version, then hand out the confirm code."""
        configured, code = known.configured, Secret(secrets.token_urlsafe(32))
        pending = pending_connection(flow, configured, answer, known.account, known.learned, received_at=received_at)
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
            return connected_outcome(flow, survivor.id, None, pending.missing_scopes)
        return connected_outcome(flow, connection_id, code, pending.missing_scopes)


def _sealed(seal: Seal, flow: Flow, outcome: Outcome) -> bytes:
    return seal(outcome.packed(), owner=flow.id, purpose="outcome", version=1)


def _signed(
    verify: Callable[[Sequence[tuple[str, str]], Secret], bool], received: Sequence[tuple[str, str]], secret: Secret
) -> bool:
    try:
        return verify(received, secret)
    except Exception:  # noqa: BLE001 - a provider's function stumbled over the parameters: whatever it raises, they are not signed
        return False


def _of_account(flow: Flow, account_id: str | None) -> list[sa.ColumnElement[bool]]:
    """Return the conditions of a connection that the flow's subject has with that account already."""
    return [
        col(Connection.integration) == flow.integration,
        col(Connection.subject) == flow.subject,
        col(Connection.account_id) == account_id,
        col(Connection.status) != "pending",
        col(Connection.deleted_at).is_(None),
    ]


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
