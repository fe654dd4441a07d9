"""Device flows (RFC 8628): a backend asks for a code, the user types it in elsewhere, the worker polls for the token.

The connection is active at once: whoever types the code decides whose account it is, so a code that is sent to a stranger
is a way to phish (docs/api.md says so). Every poll is claimed by moving the row's ``poll_at`` ahead, so that of several
workers one polls; what came of it is stored like any flow's: vault, then a pending row, then activation or a merge.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col

from broker import policy
from broker.audit import Audit, Entry
from broker.credentials import oauth_value, secret_owner
from broker.database import Database, now
from broker.egress import Egress
from broker.errors import (
    BrokerError,
    Conflict,
    FieldError,
    FlowError,
    InvalidRequest,
    NotFound,
    ProviderUnavailable,
    UpstreamInvalid,
)
from broker.integrations import MOST_SECRETS, Configured, Integrations
from broker.integrations.config import IntegrationConfig, contradictions, fits
from broker.models import Connection, DeviceFlow, Flow, Integration, new_id
from broker.oauth.confirm import Confirmations, OtherType
from broker.oauth.exchange import Exchange
from broker.oauth.outcome import pending_connection
from broker.oauth.plan import Start, new_flow
from broker.policy import Principal, Target
from broker.sessions import Standing, digest
from broker.settings import Settings
from broker.telemetry import Metrics
from broker.token_endpoint import (
    DeviceAnswer,
    TokenAnswer,
    TokenRefusal,
    device_request,
    device_token_request,
    parse_answer,
    parse_device_answer,
)
from broker.vault import SecretUnreadable, Vault
from broker.vault.keyring import Seal, Sealer
from providers.spec import Provider, Secret

AT_ONCE = 200
AT_ONCE_FOR_ONE = 20  # integration: one whose provider hangs keeps nobody else waiting
REQUESTS_BESIDES = 4  # of a poll: for who the account is
SLOW_DOWN_SECONDS = 5.0  # RFC 8628 3.5
LONGEST_PAUSE_SECONDS = 60.0
KEEP_PENDING_SECONDS = 600.0
LONGEST_LIFE_SECONDS = 3600.0
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a backend asks for; ``scopes`` None: the integration's."""

    integration: str
    subject: str
    scopes: Sequence[str] | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pace:
    """When to poll again: after the interval, and twice as long for each poll in a row that found no answer."""

    interval_seconds: float
    failures: int

    @property
    def pause_seconds(self) -> float:
        """How long to wait before the next poll, a minute at most unless the provider wants more."""
        longest = max(LONGEST_PAUSE_SECONDS, self.interval_seconds)
        return min(self.interval_seconds * 2.0 ** min(self.failures, 6), longest)


def after_refusal(refusal: TokenRefusal, *, interval_seconds: float, failures: int) -> Pace | str:
    """Return when to poll again, or the status in which the flow ends (RFC 8628 3.5); pure."""
    if refusal.error == "authorization_pending":
        return Pace(interval_seconds, 0)
    if refusal.error == "slow_down":
        return Pace(interval_seconds + SLOW_DOWN_SECONDS, 0)
    if refusal.outcome == "transient":
        return Pace(interval_seconds, failures + 1)
    return {"access_denied": "denied", "expired_token": "expired", "token_expired": "expired"}.get(
        refusal.error, "failed"
    )


class DeviceFlows:
    """Starts, shows and polls device flows. Methods may run at once on every replica."""

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
        standing: Standing,
    ) -> None:
        """Keep the parts; ``standing`` says what a caller may do now."""
        self._standing = standing
        self._database = database
        self._vault = vault
        self._sealer = sealer
        self._egress = egress
        self._integrations = integrations
        self._exchange = Exchange(database, egress, integrations)
        self._confirmations = confirmations
        self._audit = audit
        self._settings = settings
        self._metrics = metrics
        self._running: dict[asyncio.Task[None], str] = {}  # polls, by integration

    async def start(self, wanted: Wanted, principal: Principal) -> DeviceFlow:
        """Ask the provider for a code and return what the user needs.

        Raises NotFound or Forbidden by the caller's grants, InvalidRequest for scopes outside the integration's and for a
        provider without device flow, and ProviderUnavailable, UpstreamInvalid, UpstreamTimeout for the provider.
        """
        policy.require(principal, "connect", Target(wanted.integration, wanted.subject, {}))
        configured, flow = await self._planned(wanted)
        answer = await self._codes(configured, flow)
        row = _device_row(flow, answer, principal)

        def work(session: Session, seal: Seal) -> None:
            at = now(session)
            code = answer.device_code.reveal().encode()
            row.sealed_device_code = seal(code, owner=row.id, purpose="device", version=1)
            expires_at = at + min(answer.lifetime_seconds, LONGEST_LIFE_SECONDS)
            flow.created_at = flow.consumed_at = at  # no callback can act on it
            flow.expires_at, row.expires_at = expires_at, expires_at
            row.created_at, row.poll_at = at, at + row.interval_seconds
            session.add_all([flow, row])
            session.flush()
            self._audit.append(session, _entry("device.started", row, principal.caller_id))

        await self._sealer.write(self._database, work)
        return row

    async def get(self, device_id: str, principal: Principal) -> DeviceFlow:
        """Return a device flow (NotFound outside the caller's grants, Forbidden)."""
        row = await self._database.read(lambda session: session.get(DeviceFlow, device_id))
        if row is None:
            raise NotFound
        policy.require(principal, "connect", Target(row.integration, row.subject, {}))
        return row

    async def _planned(self, wanted: Wanted) -> tuple[Configured, Flow]:
        view = await self._integrations.get(wanted.integration)
        _require_fitting(wanted.variables, self._integrations.catalog.get(view.row.provider), view.row.config)
        configured = await self._integrations.configured(wanted.integration, variables=wanted.variables)
        urls = configured.endpoints.urls
        if view.status in {"inactive", "configuring"} or not (urls.get("device_url") and urls.get("token_url")):
            raise InvalidRequest(errors=[FieldError("/integration", "is switched off, or has no device flow")])
        if wanted.scopes is not None and not set(wanted.scopes) <= set(configured.row.scopes):
            raise InvalidRequest(errors=[FieldError("/scopes", "must lie within the scopes of the integration")])
        start = Start(wanted.integration, None, None, "")
        flow = new_flow(start, configured, self._settings, secret_ids=view.secret_ids, return_to=None, cookie_digest="")
        flow.state_digest = digest(secrets.token_urlsafe(32))  # unique, and known to nobody
        flow.subject, flow.variables = wanted.subject, dict(wanted.variables)
        flow.scopes = list(configured.row.scopes if wanted.scopes is None else wanted.scopes)
        return configured, flow

    async def _codes(self, configured: Configured, flow: Flow) -> DeviceAnswer:
        client = await self._integrations.client(configured)
        at = await self._database.read(now)
        oauth2, url = configured.oauth2, configured.endpoints.urls["device_url"]
        requests = client.requests(
            lambda secret: device_request(
                oauth2, device_url=url, client=client, secret=secret, scopes=flow.scopes, now=at
            )
        )
        heard = await self._integrations.ask(oauth2, client, requests, self._exchange.sender(configured))
        parsed = parse_device_answer(oauth2, heard.answer, received_at=at, development=self._settings.development)
        if isinstance(parsed, DeviceAnswer):
            return parsed
        await self._note(flow.integration, f"a device flow was refused: {parsed.error}")
        if parsed.outcome == "transient":
            raise ProviderUnavailable
        raise UpstreamInvalid("the provider refused to start a device flow: see the integration's log")

    async def _note(self, integration: str, text: str) -> None:
        await self._integrations.note(integration, action="device", level="error", text=text)

    # Polling, for the worker

    async def poll_due(self) -> int:
        """Poll the device flows that are due, once; return how many were claimed. A failure of one stops no other."""
        begun = await self._begin()
        await asyncio.gather(*begun)
        return len(begun)

    async def begin_polls(self) -> None:
        """Begin the polls that are due, some at once for each integration, and wait for none."""
        await self._begin()

    async def finish(self) -> None:
        """Wait until no poll runs: an answer may hold a token that comes only once."""
        while self._running:
            await asyncio.wait(set(self._running))

    async def _begin(self) -> list[asyncio.Task[None]]:
        begun: list[asyncio.Task[None]] = []
        for device_id, integration in await self._database.read(_due):
            mine = sum(name == integration for name in self._running.values())
            if (
                mine < AT_ONCE_FOR_ONE
                and len(self._running) < AT_ONCE
                and (claimed := await self._claim(device_id)) is not None
            ):
                task = asyncio.create_task(self._polled(*claimed))
                self._running[task] = integration
                task.add_done_callback(self._over)
                begun.append(task)
        return begun

    def _over(self, done: asyncio.Task[None]) -> None:
        integration = self._running.pop(done)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("worker.failed", job="device_polls", integration=integration, exc_info=error)

    async def _claim(self, device_id: str) -> tuple[DeviceFlow, Flow] | None:
        """Take a poll by moving it ahead by more than it may last; None when another worker was faster, or it is over."""

        def work(session: Session) -> tuple[DeviceFlow, Flow | None] | None:
            at = now(session)
            mine = sa.update(DeviceFlow).where(
                col(DeviceFlow.id) == device_id, col(DeviceFlow.status) == "pending", col(DeviceFlow.poll_at) <= at
            )
            if session.execute(mine.values(poll_at=at + LONGEST_PAUSE_SECONDS)).rowcount != 1:  # type: ignore[attr-defined]
                return None
            row = session.get(DeviceFlow, device_id, populate_existing=True)
            if row is None:
                return None
            flow = session.get(Flow, row.flow_id)
            if flow is None or (row.expires_at <= at and row.connection_id is None):
                self._ended(session, row, "expired", None)
            else:
                row.poll_at = at + _lasts_seconds(session.get(Integration, row.integration))
                session.flush()
            return row, flow

        claimed = await self._database.transaction(work)
        if claimed is None:
            return None
        row, flow = claimed
        if flow is not None and row.status == "pending":
            return row, flow
        if flow is not None:
            self._metrics.flow(flow.plan["provider"], row.status)
        return None

    async def _polled(self, row: DeviceFlow, flow: Flow) -> None:
        try:
            await self._poll(row, flow)
        except FlowError as error:
            await self._end(row, flow, "failed", error.flow_code)
        except OtherType:
            await self._end(row, flow, "failed", "other_credential_type")
        except BrokerError as error:  # nobody answered, or our own database: back off (RFC 8628 3.5)
            log.warning("device.poll_failed", device_id=row.id, integration=row.integration, code=error.code)
            await self._wait(row, Pace(row.interval_seconds, row.failures + 1))
        except Exception:
            log.exception("device.defect", device_id=row.id)

    async def _poll(self, row: DeviceFlow, flow: Flow) -> None:
        if row.connection_id is not None:  # the token is here; only the activation had to wait
            await self._activate(row, flow)
            return
        configured = await self._exchange.as_planned(flow)
        answer, received_at = await self._asked(row, flow, configured)
        if isinstance(answer, TokenAnswer):
            await self._store(row, flow, configured, answer, received_at)
            return
        following = after_refusal(answer, interval_seconds=row.interval_seconds, failures=row.failures)
        if isinstance(following, Pace):
            await self._wait(row, following)
        else:
            await self._end(row, flow, following, answer.error)

    async def _asked(
        self, row: DeviceFlow, flow: Flow, configured: Configured
    ) -> tuple[TokenAnswer | TokenRefusal, float]:
        client = await self._exchange.client(flow, configured)
        oauth2, url = configured.oauth2, configured.endpoints.urls["token_url"]
        code, at = await self._opened(row), await self._database.read(now)
        requests = client.requests(
            lambda secret: device_token_request(
                oauth2, token_url=url, client=client, secret=secret, device_code=code, now=at
            )
        )
        heard = await self._integrations.ask(oauth2, client, requests, self._exchange.sender(configured))
        received_at = await self._database.read(now)
        return parse_answer(oauth2, heard.answer, received_at=received_at), received_at

    async def _opened(self, row: DeviceFlow) -> Secret:
        try:
            opened = await self._sealer.open_fresh(
                self._database, row.sealed_device_code or b"", owner=row.id, purpose="device", version=1
            )
        except SecretUnreadable:
            raise FlowError("state_invalid") from None
        return Secret(opened.decode())

    async def _wait(self, row: DeviceFlow, pace: Pace) -> None:
        def work(session: Session) -> None:
            poll_at = now(session) + pace.pause_seconds
            changes = {"interval_seconds": pace.interval_seconds, "failures": pace.failures, "poll_at": poll_at}
            session.execute(sa.update(DeviceFlow).where(col(DeviceFlow.id) == row.id).values(**changes))

        await self._database.transaction(work)

    # What comes of it

    async def _store(
        self, row: DeviceFlow, flow: Flow, configured: Configured, answer: TokenAnswer, received_at: float
    ) -> None:
        """Store the token and a pending connection, then activate it.

        The code is spent: after a crash before the row is written the user has to begin anew, as in a browser's flow.
        """
        known = await self._exchange.identified(flow, configured, answer, None)
        pending = pending_connection(
            flow, known.configured, answer, known.account, known.learned, received_at=received_at
        )
        value = oauth_value(answer, received_at=received_at)
        pending.secret_version = await self._vault.put(secret_owner(pending.id), value, expected_version=0)
        pending.refreshable = "refresh_token" in value

        def work(session: Session) -> None:
            at = now(session)
            pending.created_at, pending.pending_until = at, at + KEEP_PENDING_SECONDS
            session.add(pending)
            session.execute(sa.update(Flow).where(col(Flow.id) == flow.id).values(connection_id=pending.id))
            session.execute(
                sa.update(DeviceFlow)
                .where(col(DeviceFlow.id) == row.id)
                .values(connection_id=pending.id, sealed_device_code=None)
            )
            session.flush()
            self._audit.append(session, _entry("connection.pending", row, "worker", connection_id=pending.id))

        await self._database.transaction(work)
        row.connection_id = pending.id
        await self._activate(row, flow)

    async def _activate(self, row: DeviceFlow, flow: Flow) -> None:
        """Make the pending connection active, or merge it, in the name of the caller who started the flow.

        A conflict (its account's connection is busy) is tried again; FlowError when the caller may no longer do this, or the
        pending connection is gone. What was activated before a crash, or by another worker, is only recorded.
        """
        current, pending, principal = await self._database.read(
            lambda session: (
                session.get(Flow, flow.id),
                session.get(Connection, row.connection_id),
                self._standing(session, row.created_by or ""),
            )
        )
        if current is not None and current.confirmed_at is not None:
            await self._end(row, flow, "connected", None, connection_id=current.surviving_id)
            return
        target = Target(row.integration, row.subject, {})
        if pending is None or principal is None or not policy.allowed(principal, "connect", target):
            raise FlowError("access_denied")
        try:
            survivor = await self._confirmations.activate_device(flow, pending, principal)
        except FlowError:
            await self._require_over(flow.id)
            raise
        await self._end(row, flow, "connected", None, connection_id=survivor.id)

    async def _require_over(self, flow_id: str) -> None:
        """Raise Conflict where another worker has activated a flow meanwhile, or a claim that a crash left is in the way."""
        flow = await self._database.read(lambda session: session.get(Flow, flow_id))
        if flow is not None and (flow.confirmed_at is not None or (flow.confirm_claimed_at and flow.burnt_at is None)):
            raise Conflict("the connection is being activated")

    async def _end(
        self, row: DeviceFlow, flow: Flow, status: str, reason: str | None, *, connection_id: str | None = None
    ) -> None:
        def work(session: Session) -> bool:
            current = session.get(DeviceFlow, row.id)
            if current is None or current.status != "pending":
                return False
            current.connection_id = connection_id
            self._ended(session, current, status, reason)
            return True

        if await self._database.transaction(work):
            self._metrics.flow(flow.plan["provider"], status)

    def _ended(self, session: Session, row: DeviceFlow, status: str, reason: str | None) -> None:
        row.status, row.status_reason, row.sealed_device_code = status, reason, None
        session.flush()
        outcome = "ok" if status == "connected" else "failed"
        detail = {"reason": reason} if reason is not None else {}
        self._audit.append(session, _entry(f"device.{status}", row, "worker", outcome=outcome, **detail))


def _due(session: Session) -> list[tuple[str, str]]:
    """Return device flows to poll now with their integrations, of each the first few, so that none hides another's."""
    place = sa.func.row_number().over(partition_by=col(DeviceFlow.integration), order_by=col(DeviceFlow.poll_at))
    due = (
        sa.select(col(DeviceFlow.id), col(DeviceFlow.integration), place.label("place"))
        .where(col(DeviceFlow.status) == "pending", col(DeviceFlow.poll_at) <= now(session))
        .subquery()
    )
    first = sa.select(due.c.id, due.c.integration).where(due.c.place <= AT_ONCE_FOR_ONE).order_by(due.c.place)
    return [(device_id, integration) for device_id, integration in session.execute(first.limit(AT_ONCE))]


def _lasts_seconds(integration: Integration | None) -> float:
    """Return for how long a poll may last: its time limit for each client secret and for each request after the token."""
    if integration is None:
        return LONGEST_PAUSE_SECONDS
    timeout_seconds: float = integration.config.get("timeout_seconds", IntegrationConfig().timeout_seconds)
    return LONGEST_PAUSE_SECONDS + timeout_seconds * (MOST_SECRETS + REQUESTS_BESIDES)


def _require_fitting(given: Mapping[str, str], provider: Provider | None, config: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for variables that are unknown, do not fit, or are settled: they become part of a host."""
    declared = {variable.name: variable for variable in provider.variables} if provider is not None else {}
    for name, value in given.items():
        if name not in declared:
            raise InvalidRequest(errors=[FieldError("/variables", "names one that is not used here")])
        if not fits(declared[name], value):
            raise InvalidRequest(errors=[FieldError(f"/variables/{name}", f"must look like {declared[name].example}")])
    if problems := contradictions(config, given):
        raise InvalidRequest(errors=problems)


def _device_row(flow: Flow, answer: DeviceAnswer, principal: Principal) -> DeviceFlow:
    return DeviceFlow(
        id=new_id("dev"),
        flow_id=flow.id,
        integration=flow.integration,
        subject=flow.subject or "",
        user_code=answer.user_code,
        verification_uri=answer.verification_uri,
        verification_uri_complete=answer.verification_uri_complete,
        interval_seconds=answer.interval_seconds,
        created_by=principal.caller_id,
    )


def _entry(
    action: str,
    row: DeviceFlow,
    actor: str,
    *,
    outcome: str = "ok",
    connection_id: str | None = None,
    **detail: Any,  # noqa: ANN401 - JSON values
) -> Entry:
    return Entry(
        action=action,
        actor=actor,
        outcome=outcome,
        connection_id=connection_id or row.connection_id,
        integration=row.integration,
        subject=row.subject,
        detail={"device_id": row.id, **detail},
    )
