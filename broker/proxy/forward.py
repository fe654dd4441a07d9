"""One proxied call, from the request as it came in to the answer's head: who may, the limits, the credential, the attempts.

Claim → act → record: what is read (the connection, the caller) is read in short queries; the intent is durable before the
credential leaves; the call is made with nothing open; its outcome is recorded behind it. The signer is the last one to
touch a request, and signs each attempt anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from broker import policy
from broker.audit import Audit, Entry
from broker.callers import Callers
from broker.credentials import Credentials, Lent
from broker.credentials.in_use import InUse
from broker.credentials.last_use import LastUse
from broker.credentials.snapshots import Snapshot
from broker.credentials.usable import require_usable
from broker.egress import NoRoom, NotSent, OutcomeUnknown, UploadStalled
from broker.egress.calls import Calls, WireAnswer
from broker.errors import (
    AuditUnavailable,
    BrokerError,
    Forbidden,
    InvalidRequest,
    Overloaded,
    ProviderUnavailable,
    UpgradeUnsupported,
    UpstreamTimeout,
)
from broker.integrations import Integrations
from broker.limits import Breakers, Rate, Rates
from broker.policy import CallDecision, Principal, Target
from broker.proxy.disguised import also_asked, strictest
from broker.proxy.heads import Head, Heads
from broker.proxy.outcomes import CallOutcome, Outcomes
from broker.proxy.outgoing import loan_of, material_of, signed
from broker.proxy.planning import Plan, Plans
from broker.proxy.retrying import (
    RetryBudget,
    RetryRule,
    Seen,
    Standing,
    delay_seconds,
    is_repeatable,
    next_step,
)
from broker.proxy.scrub import Forms, forms_of
from broker.proxy.target import joined
from broker.proxy.underway import Inbound, Loan, Ready, Underway
from broker.refresh import Ask
from broker.tracing import Span, Tracing
from providers.rates import observed

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 120.0
FAIR_SHARE = 0.9  # of the integration's time: what went by before the attempt is not the caller's doing
FAIR_SECONDS = 1.0  # with less time than this, that no connection came in it says nothing of an upstream
RECHECK_SECONDS = 0.3
CALLER_WAIT_SECONDS = 1.0
MOST_KEYS = 10_000
RATE_READ_SECONDS = 1.0
FORGET_SECONDS = 10.0
WENT_WELL = Seen(200)
NOT_SECRET = frozenset({"username", "region", "access_key_id"})  # answers tell them for good reasons


@dataclass(frozen=True, slots=True)
class Bounds:
    """What holds calls back: counted rates, breakers, and the rate of each caller (None: there is none)."""

    rates: Rates
    breakers: Breakers
    caller_rate: Rate | None


class Forwarding:
    """Makes proxied calls. One for a process; calls may run at once."""

    def __init__(
        self,
        callers: Callers,
        integrations: Integrations,
        credentials: Credentials,
        in_use: InUse,
        calls: Calls,
        bounds: Bounds,
        audit: Audit,
        outcomes: Outcomes,
        last_use: LastUse,
        tracing: Tracing,
        key_headers: Sequence[str],
        keep_seconds: float,
    ) -> None:
        """Keep the parts. ``key_headers``: those in which a caller key may stand besides.

        ``keep_seconds``: how long opened credentials may be in memory, 0 for no longer than a call; a moment is enough here.
        """
        self._callers = callers
        self._integrations = integrations
        self._credentials = credentials
        self._in_use = in_use
        self._calls = calls
        self._bounds = bounds
        self._audit = audit
        self._outcomes = outcomes
        self._last_use = last_use
        self._key_headers = tuple(key_headers)
        self._key_names = frozenset(name.encode() for name in key_headers)
        self._tracing = tracing
        self._plans = Plans()
        self._heads = Heads()
        self._keep_seconds = min(keep_seconds, FORGET_SECONDS)
        self._ready: dict[tuple[str, str], Ready] = {}
        self._forgetting: asyncio.TimerHandle | None = None
        self._budget = RetryBudget()
        self._forms: dict[tuple[str, str], Forms] = {}
        self._read_at: dict[str, float] = {}
        self._resting: set[str] = set()  # connections whose provider asked them to rest, at some time
        self._refused: set[str] = set()  # digests of credentials that were refused right after their renewal

    # Who, what, and whether they may

    async def head(self, headers: Sequence[tuple[bytes, bytes]], peer: str | None) -> Head:
        """Return what is known of a request by its fields: who calls (Unauthenticated), believed for a moment."""
        mark, changes = self._heads.mark(headers, peer), self._callers.changes
        known = self._heads.known(mark, changes)
        return known if known is not None else self._heads.keep(mark, await self.identify(headers, peer), changes)

    async def identify(self, headers: Sequence[tuple[bytes, bytes]], peer: str | None) -> Principal:
        """Return who calls; the key may also stand where the vendors' own credentials do (Unauthenticated)."""
        return await self._callers.authenticate(headers, peer=peer, extra_headers=self._key_headers, sigv4=True)

    async def note_refused(self, principal: Principal, method: str, reason: str) -> None:
        """Record a request of a known caller that is none: its target could be read in two ways, or its fields could."""
        detail = {"method": method, "refused": reason}
        await self._note(Entry("connection.proxy", principal.caller_id, outcome="denied", detail=detail))

    async def admit(self, inbound: Inbound, head: Head) -> Underway:
        """Return the call, if it may be made: nothing has been sent, and no limit was counted.

        Raises NotFound and Forbidden as policy says (recorded), what stands against using the connection, OriginChanged,
        InvalidRequest for fields that cannot go on, UpgradeUnsupported.
        """
        looked_at, target = time.monotonic(), inbound.target
        wanted = head.asked(inbound.headers)
        if wanted.upgrade:
            raise UpgradeUnsupported
        row = await self._in_use.current(target.connection_id)
        decision = await self._require_call(inbound, head.principal, row)
        ready = self._ready.get((row.id, target.host))
        if ready is None or ready.row is not row:
            ready = await self._made_ready(row, target.host)
        plan = ready.plan
        return Underway(
            inbound=inbound,
            principal=head.principal,
            row=row,
            ready=ready,
            upstream=joined(plan.base_url, target),
            asked=wanted,
            fields=head.fields(inbound.headers, plan, self._shown),
            span=self._span(inbound, row),
            deadline=looked_at + (wanted.timeout_seconds or plan.timeout_seconds),
            looked_at=looked_at,
            observed=decision.denial if decision.would_be_denied else None,
        )

    async def _made_ready(self, row: Snapshot, host: str) -> Ready:
        require_usable(row)
        configured = await self._integrations.configured_at(row.integration, row.integration_version, row.variables)
        ready = Ready(row, configured, self._plans.of(configured, row, host))
        if self._keep_seconds > 0:
            self._ready[row.id, host] = ready
            if self._forgetting is None:
                self._forgetting = asyncio.get_running_loop().call_later(self._keep_seconds, self._forget)
        return ready

    def _forget(self) -> None:
        """Let go of the opened credentials: they are for the calls of a moment."""
        self._forgetting = None
        self._ready.clear()
        self._forms.clear()

    def _shown(self, headers: Sequence[tuple[bytes, bytes]]) -> tuple[list[bytes], frozenset[bytes]]:
        """Return what a caller showed of itself, which must not go on wherever else it stands, and where that may stand."""
        return [text.encode() for text in self._callers.shown(headers, self._key_headers)], self._key_names

    def _span(self, inbound: Inbound, row: Snapshot) -> Span:
        span = self._tracing.server_span(inbound.headers, inbound.method)
        if self._tracing.exporting:
            for name, value in (("integration", row.integration), ("connection_id", row.id)):
                span.note(f"broker.{name}", value)
        return span

    async def _require_call(self, inbound: Inbound, principal: Principal, row: Snapshot) -> CallDecision:
        target = Target(row.integration, row.subject, row.tags)
        called, method = inbound.target, inbound.method
        decision = policy.allowed_call(principal, target, method=method, host=called.host, raw_path=called.path)
        provider = self._integrations.catalog.get(row.provider)
        if provider is not None and (provider.method_params or provider.path_headers):
            more = also_asked(called, inbound.headers, provider)
            judged = [
                policy.allowed_call(principal, target, method=one, host=called.host, raw_path=path)
                for one, path in more
            ]
            decision = strictest([decision, *judged])
        if decision.permitted:
            return decision
        await self._note(self._entry(inbound, principal, row, outcome="denied", refused=str(decision.denial)))
        policy.require(principal, "proxy", target)
        raise Forbidden("no grant of this caller allows this call")

    async def _note(self, entry: Entry) -> None:
        # an audit that fails must not tell "outside" from "absent"
        with contextlib.suppress(AuditUnavailable):
            await self._audit.record(entry)

    def _entry(self, inbound: Inbound, principal: Principal, row: Snapshot, *, outcome: str, **detail: object) -> Entry:
        """Return a record; the path, which may name a person, stands in it as a keyed digest only."""
        path = self._audit.digest(inbound.target.path.decode("latin-1"))
        return Entry(
            action="connection.proxy",
            actor=principal.caller_id,
            outcome=outcome,
            connection_id=row.id,
            integration=row.integration,
            subject=row.subject,
            detail={"method": inbound.method, "host": inbound.target.host, "path": path, **detail},
        )

    # Making the call

    async def answer(self, call: Underway) -> WireAnswer:
        """Make the call and return the answer to pass on, which the caller closes.

        Raises RateLimited, CircuitOpen, what stands against the credential, AuditUnavailable, EgressDenied, and where no
        answer came ProviderUnavailable or UpstreamTimeout: those say whether the call may have been received.
        """
        await self._take_turn(call)
        call.loan = call.ready.loan or await self._lend(call.ready, Ask())
        await self._record_intent(call)
        self._budget.earn(call.row.integration)
        while True:
            seen, answer, failure = await self._attempt(call)
            if answer is None:
                if not await self._goes_again(call, seen, None):
                    raise _told(failure, perhaps_received=call.perhaps_received)
                continue
            try:
                if answer.status < 400 or not await self._goes_again(call, seen, answer):
                    return answer
            except BaseException:
                await answer.aclose()
                raise

    async def _goes_again(self, call: Underway, seen: Seen, answer: WireAnswer | None) -> bool:
        """Say whether the call is made once more; all that has to happen before is done then, and ``answer`` is closed."""
        step = next_step(seen, self._standing(call), self._rule(call))
        pause_seconds = self._pause_seconds(call, seen) if step == "repeat" else 0.0
        if step == "give" or pause_seconds is None or (step == "renew" and not await self._renew(call)):
            return False
        if answer is not None:
            await answer.aclose()  # first: it would hold its connection for as long as the pause
        if step == "repeat":
            await asyncio.sleep(pause_seconds)
            await self._take_integrations_turn(call)
        return True

    async def _lend(self, ready: Ready, ask: Ask) -> Loan:
        """Open the credential, renewed if ``ask`` or its age wants it."""
        lent = await self._credentials.lend(ready.row, ready.configured, ask, ready.row.at)
        loan = Loan(lent, self._audit.digest(lent.marker), self._forms_of(lent, ready))
        if self._keep_seconds > 0:
            ready.loan = loan
        return loan

    def _forms_of(self, lent: Lent, ready: Ready) -> Forms:
        """Return what an answer must not have, from memory for some seconds: making it takes up to a millisecond."""
        key = (ready.row.id, lent.marker)
        known = self._forms.get(key)
        if known is None:
            hidden = lent.fields.keys() - NOT_SECRET or lent.fields.keys()  # a key may stand as a user name
            texts = [lent.fields[name].reveal() for name in hidden]
            if ready.plan.signer.secrets is not None:
                texts += ready.plan.signer.secrets(material_of(lent, ready))
            known = forms_of(texts)
            if self._keep_seconds > 0:
                self._forms[key] = known
        return known

    async def _take_turn(self, call: Underway) -> None:
        """Wait for the caller's and the integration's turn, within the call's deadline."""
        caller = call.principal.caller_id
        if self._bounds.caller_rate is not None:
            wait = min(_left(call), CALLER_WAIT_SECONDS)
            await self._bounds.rates.take(
                f"caller {caller}", self._bounds.caller_rate, caller=caller, wait_seconds=wait
            )
        await self._take_integrations_turn(call)

    async def _take_integrations_turn(self, call: Underway) -> None:
        """As each attempt does: where the provider told this connection to rest, that is waited for first."""
        caller, rates = call.principal.caller_id, self._bounds.rates
        if call.row.id in self._resting:
            await rates.take(f"{call.plan.key} {call.row.id}", None, caller=caller, wait_seconds=_left(call))
        await rates.take(call.plan.key, call.plan.rate, caller=caller, wait_seconds=_left(call))

    async def _record_intent(self, call: Underway) -> None:
        detail: dict[str, object] = {"token": loan_of(call).digest}
        if call.asked.reason:
            detail["reason"] = call.asked.reason
        if call.observed is not None:
            detail["would_be_denied"] = call.observed
        entry = self._entry(call.inbound, call.principal, call.row, outcome="intent", **detail)
        call.intents.append(await self._audit.record(entry))
        self._last_use.note(call.row, call.row.at)

    async def _attempt(self, call: Underway) -> tuple[Seen, WireAnswer | None, BrokerError | None]:
        """Make one attempt; return what it shows, and its answer or why there is none."""
        await self._look_again(call)
        leave = self._bounds.breakers.enter(call.plan.key, call.plan.breaker)
        with leave:
            call.attempts += 1
            began = time.monotonic()
            method, authority = call.inbound.method, call.upstream.authority.decode("ascii")
            span = self._tracing.client_span(call.span, call.attempts, authority, method)
            try:
                answer = await self._send(call, span)
            except UploadStalled:
                span.end(None, error=InvalidRequest.code)
                call.perhaps_received = True
                raise InvalidRequest("the body did not come in time; what came of it was sent on") from None
            except NoRoom:
                span.end(None, error=Overloaded.code)
                raise Overloaded("Too many calls to this provider are under way") from None
            except (NotSent, OutcomeUnknown) as error:
                call.perhaps_received |= isinstance(error, OutcomeUnknown)
                if _is_the_upstreams(error, call.deadline - began, call.plan):
                    leave.failed()
                span.end(None, error=error.code)
                return Seen(None, sent=not isinstance(error, NotSent)), None, error
            except BaseException:
                span.end(None, error="not_made")
                raise
            finally:
                call.upstream_seconds = time.monotonic() - began
            call.perhaps_received = True
            span.end(answer.status)
            if answer.status >= 500 and call.plan.counts_errors:
                leave.failed()
            else:
                leave.succeeded()
        return self._seen(call, answer), answer, None

    async def _send(self, call: Underway, span: Span) -> WireAnswer:
        left = call.deadline - time.monotonic()
        if left <= 0:
            raise NotSent("The call's time was over before it was made")
        return await self._calls.open(
            signed(call, span.traceparent_out()),
            connect_seconds=min(CONNECT_SECONDS, left),
            headers_seconds=left,
            idle_seconds=IDLE_SECONDS,
        )

    def _seen(self, call: Underway, answer: WireAnswer) -> Seen:
        """Return what an answer shows; of those that went well, how many calls are left is read once a second."""
        call.status, now = answer.status, time.monotonic()
        if answer.status == 401 and call.renewed:
            self._note_refused(loan_of(call).lent.marker)
        if answer.status < 400:
            if now - self._read_at.get(call.plan.key, 0.0) < RATE_READ_SECONDS:
                return WENT_WELL
            if len(self._read_at) >= MOST_KEYS:
                self._read_at.clear()
            self._read_at[call.plan.key] = now
        told = observed(call.ready.configured.provider.rate_headers, answer.status, answer.headers, time.time())
        if told.remaining is not None:
            call.rate_remaining = told.remaining
        if told.limited and told.rest_seconds:
            self._rest(call, told.rest_seconds)
        return Seen(answer.status, limited=told.limited, rest_seconds=told.rest_seconds)

    def _rest(self, call: Underway, seconds: float) -> None:
        """Hold later calls back: this connection's, or all, where the provider counts for the whole app."""
        limits = call.ready.configured.provider.rate_headers
        if limits is not None and limits.shared:
            self._bounds.rates.pause(call.plan.key, seconds)
            return
        if len(self._resting) >= MOST_KEYS:
            self._resting.clear()
        self._resting.add(call.row.id)
        self._bounds.rates.pause(f"{call.plan.key} {call.row.id}", seconds)

    # Once more

    def _rule(self, call: Underway) -> RetryRule:
        retries = call.asked.retries
        return call.plan.retry if retries is None else replace(call.plan.retry, attempts=retries + 1)

    def _standing(self, call: Underway) -> Standing:
        return Standing(
            attempts=call.attempts,
            repeatable=is_repeatable(call.inbound.method, has_key=call.asked.idempotency_key),
            replayable=call.inbound.body is None or isinstance(call.inbound.body, bytes),
            renewable=call.row.refreshable and not call.renewed and loan_of(call).lent.marker not in self._refused,
            left_seconds=call.deadline - time.monotonic(),
        )

    async def _renew(self, call: Underway) -> bool:
        """Renew the credential that was refused, and record that the new one is about to leave; False: there is none."""
        call.renewed = True
        before = loan_of(call).lent.marker
        try:
            ready = replace(call.ready, row=await self._in_use.anew(call.row.id), loan=None)
            loan = await self._lend(ready, Ask(not_token_sha256=before))
            call.row = await self._in_use.anew(call.row.id)
        except BrokerError:
            return False  # what the upstream said is passed on
        if loan.lent.marker == before:
            return False
        call.ready, call.loan = ready, loan
        await self._record_intent(call)
        return True

    def _note_refused(self, marker: str) -> None:
        """Remember that a credential was refused although it had just been renewed: that is not what is wrong.

        Else every call to a place that always says 401 would renew it, and each of that ends the one before.
        """
        if len(self._refused) >= MOST_KEYS:
            self._refused.clear()
        self._refused.add(marker)

    def _pause_seconds(self, call: Underway, seen: Seen) -> float | None:
        """Return how long to wait before a further attempt; None when that is too long, or there were too many already."""
        rule = self._rule(call)
        seconds = delay_seconds(seen, call.attempts, rule, random_share=random.random())  # noqa: S311 - jitter
        if seconds > rule.max_delay_seconds or time.monotonic() + seconds >= call.deadline:
            return None
        return seconds if self._budget.spend(call.row.integration) else None

    async def _look_again(self, call: Underway) -> None:
        """Find out once more who calls and whether they may, where the last look is too old to send a credential on."""
        if time.monotonic() - call.looked_at < RECHECK_SECONDS:
            return
        call.looked_at = time.monotonic()
        call.principal = await self.identify(call.inbound.headers, call.inbound.peer)
        await self.require_still(call, await self._in_use.current(call.row.id))

    async def require_still(self, call: Underway, row: Snapshot) -> None:
        """Raise what stands against the call going on with the connection as it is now."""
        require_usable(row)
        await self._require_call(call.inbound, call.principal, row)
        call.row = row

    # Afterwards

    def finished(self, call: Underway, code: str | None, seconds: float) -> None:
        """Note what the call came to; in the audit nothing of a call whose intent was not recorded."""
        call.span.end(call.status if code is None else None, error=code)
        ms = round(seconds * 1000)
        for intent_id in call.intents:  # a renewed credential had one of its own
            self._outcomes.note(CallOutcome(intent_id, call.status, code, call.attempts, ms))


def _left(call: Underway) -> float:
    return max(0.0, call.deadline - time.monotonic())


def _is_the_upstreams(failure: NotSent | OutcomeUnknown, granted_seconds: float, plan: Plan) -> bool:
    """Say whether a failure tells of the upstream: else callers that grant little time could open everybody's breaker."""
    if isinstance(failure, OutcomeUnknown) and failure.timed_out:
        return granted_seconds >= FAIR_SHARE * plan.timeout_seconds
    return isinstance(failure, OutcomeUnknown) or granted_seconds >= FAIR_SECONDS


def _told(failure: BrokerError | None, *, perhaps_received: bool) -> BrokerError:
    """Return what the caller is told where no answer came; ``perhaps_received``: by any of its attempts. Always said."""
    unknown = perhaps_received
    timed_out = isinstance(failure, OutcomeUnknown) and failure.timed_out
    said = failure.detail if failure is not None else "The provider did not answer"
    if unknown:
        said += "; whether it received the call is not known"
    error: BrokerError = UpstreamTimeout(said) if timed_out else ProviderUnavailable(said)
    error.members = {"outcome": "unknown" if unknown else "not_sent"}
    return error
