"""One proxied call, from the request as it came in to the answer's head: who may, the limits, the credential, the attempts.

Claim → act → record: what is read (the connection, the caller) is read in short queries; the intent is durable before the
credential leaves; the call is made with nothing open; its outcome is recorded behind it. The signer is the last one to
touch a request, and signs each attempt anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import unquote_plus

from broker import policy
from broker.audit import Audit, Entry
from broker.callers import Callers
from broker.credentials import Credentials, Lent
from broker.credentials.in_use import InUse
from broker.credentials.last_use import LastUse
from broker.credentials.snapshots import Snapshot
from broker.credentials.usable import require_usable
from broker.egress import NotSent, OutcomeUnknown, UploadStalled
from broker.egress.calls import Calls, Fields, WireAnswer, WireRequest
from broker.errors import (
    AuditUnavailable,
    BrokerError,
    Forbidden,
    InternalError,
    InvalidRequest,
    ProviderUnavailable,
    UpgradeUnsupported,
    UpstreamTimeout,
)
from broker.integrations import Configured, Integrations
from broker.limits import Breakers, Rate, Rates
from broker.policy import CallDecision, Principal, Target
from broker.proxy.fields import Asked
from broker.proxy.heads import Head, Heads
from broker.proxy.outcomes import CallOutcome, Outcomes
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
from broker.proxy.target import CallTarget, Upstream, joined
from broker.refresh import Ask
from broker.tracing import Span, Tracing
from providers.rates import observed
from providers.spec import Call, Material, Signed

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 120.0
RECHECK_SECONDS = 0.3
CALLER_WAIT_SECONDS = 1.0
MOST_KEYS = 10_000
RATE_READ_SECONDS = 1.0
FORGET_SECONDS = 10.0
WENT_WELL = Seen(200)
NOT_SECRET = frozenset({"username", "region", "access_key_id"})  # answers tell them for good reasons


@dataclass(slots=True)
class Inbound:
    """A request as it came in. ``body``: all of it, or its pieces, or None; ``length``: of pieces, where it is known.

    The body is put in when the call was let in.
    """

    method: str
    target: CallTarget
    headers: Sequence[tuple[bytes, bytes]] = field(repr=False)
    peer: str | None
    request_id: str
    body: bytes | AsyncIterator[bytes] | None = field(default=None, repr=False)
    length: int | None = None


@dataclass(slots=True, eq=False)
class Ready:
    """A connection made ready for calls to one of its hosts: good for as long as ``row`` is what is known of it.

    ``lent``, with its digest for the audit and its forms for the scrubber, is there once a call has needed it.
    """

    row: Snapshot
    configured: Configured
    plan: Plan
    lent: Lent | None = field(default=None, repr=False)
    digest: str = ""
    forms: Forms | None = field(default=None, repr=False)


@dataclass(slots=True)
class Underway:
    """A call that was let in, as far as it has come."""

    inbound: Inbound
    principal: Principal
    row: Snapshot
    ready: Ready
    upstream: Upstream
    asked: Asked
    fields: Fields = field(repr=False)
    span: Span = field(repr=False)
    deadline: float
    looked_at: float
    observed: str | None = None
    intent_id: str | None = None
    attempts: int = 0
    renewed: bool = False
    upstream_seconds: float = 0.0
    status: int | None = None
    rate_remaining: int | None = None

    @property
    def plan(self) -> Plan:
        """How calls to this host are made."""
        return self.ready.plan


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
        self._tracing = tracing
        self._plans = Plans()
        self._heads = Heads()
        self._keep_seconds = min(keep_seconds, FORGET_SECONDS)
        self._ready: dict[tuple[str, str], Ready] = {}
        self._forgetting: asyncio.TimerHandle | None = None
        self._budget = RetryBudget()
        self._forms: dict[tuple[str, str], Forms] = {}
        self._read_at: dict[str, float] = {}

    # Who, what, and whether they may

    async def head(self, headers: Sequence[tuple[bytes, bytes]], peer: str | None) -> Head:
        """Return what is known of a request by its fields: who calls (Unauthenticated), believed for a moment."""
        mark = self._heads.mark(headers, peer)
        known = self._heads.known(mark)
        return known if known is not None else self._heads.keep(mark, await self.identify(headers, peer))

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
            fields=head.fields(inbound.headers, plan, owned=plan.owned, companions=plan.companions),
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

    def _span(self, inbound: Inbound, row: Snapshot) -> Span:
        span = self._tracing.server_span(inbound.headers, inbound.method)
        if self._tracing.exporting:
            for name, value in (("integration", row.integration), ("connection_id", row.id)):
                span.note(f"broker.{name}", value)
        return span

    async def _require_call(self, inbound: Inbound, principal: Principal, row: Snapshot) -> CallDecision:
        target = Target(row.integration, row.subject, row.tags)
        called = inbound.target
        decision = policy.allowed_call(principal, target, method=inbound.method, host=called.host, raw_path=called.path)
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
        if call.ready.lent is None:
            await self._lend(call.ready, Ask())
        await self._record_intent(call)
        self._budget.earn(call.row.integration)
        while True:
            seen, answer, failure = await self._attempt(call)
            if answer is not None and answer.status < 400:
                return answer
            step = next_step(seen, self._standing(call), self._rule(call))
            if step == "renew" and answer is not None:
                step = "repeat" if await self._renew(call) else "give"
            elif step == "repeat":
                step = "repeat" if await self._wait(call, seen) else "give"
            if step == "give":
                if answer is None:
                    raise _told(failure)
                return answer
            if answer is not None:
                await answer.aclose()

    async def _lend(self, ready: Ready, ask: Ask) -> None:
        """Open the credential, renewed if ``ask`` or its age wants it."""
        ready.lent = await self._credentials.lend(ready.row, ready.configured, ask, ready.row.at)
        ready.digest = self._audit.digest(ready.lent.marker)

    async def _take_turn(self, call: Underway) -> None:
        """Wait for the caller's and the integration's turn, within the call's deadline."""
        caller = call.principal.caller_id
        left = max(0.0, call.deadline - time.monotonic())
        if self._bounds.caller_rate is not None:
            wait = min(left, CALLER_WAIT_SECONDS)
            await self._bounds.rates.take(
                f"caller {caller}", self._bounds.caller_rate, caller=caller, wait_seconds=wait
            )
            left = max(0.0, call.deadline - time.monotonic())
        await self._bounds.rates.take(call.plan.key, call.plan.rate, caller=caller, wait_seconds=left)

    async def _record_intent(self, call: Underway) -> None:
        detail: dict[str, object] = {"token": call.ready.digest}
        if call.asked.reason:
            detail["reason"] = call.asked.reason
        if call.observed is not None:
            detail["would_be_denied"] = call.observed
        entry = self._entry(call.inbound, call.principal, call.row, outcome="intent", **detail)
        call.intent_id = await self._audit.record(entry)
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
                raise InvalidRequest("the body did not come in time; what came of it was sent on") from None
            except (NotSent, OutcomeUnknown) as error:
                leave.failed()
                span.end(None, error=error.code)
                return Seen(None, sent=not isinstance(error, NotSent)), None, error
            finally:
                call.upstream_seconds = time.monotonic() - began
            span.end(answer.status)
            if answer.status >= 500 and call.plan.counts_errors:
                leave.failed()
            else:
                leave.succeeded()
        return self._seen(call, answer), answer, None

    async def _send(self, call: Underway, span: Span) -> WireAnswer:
        left = call.deadline - time.monotonic()
        if left <= 0:
            raise OutcomeUnknown("the call's time was over before it was made", timed_out=True)
        return await self._calls.open(
            self._signed(call, span.traceparent_out()),
            connect_seconds=min(CONNECT_SECONDS, left),
            headers_seconds=left,
            idle_seconds=IDLE_SECONDS,
        )

    def _signed(self, call: Underway, trace: Fields) -> WireRequest:
        """Return the request as it goes out; nothing touches it after the signer."""
        inbound, upstream = call.inbound, call.upstream
        signer = call.plan.signer
        body = inbound.body if isinstance(inbound.body, bytes) else None
        if signer.whole_body and inbound.body is None:
            body = b""
        query = _without_params(inbound.target.query, signer.params)
        to_sign = Call(
            method=inbound.method,
            scheme=upstream.scheme,
            authority=upstream.authority.decode("ascii"),
            path=upstream.path,
            query=query or b"",
            headers=(*call.fields, *trace) if trace else call.fields,
            body=body,
        )
        try:
            signed = signer.sign(to_sign, _material(call))
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        return _wire(call, to_sign.headers, signed, query)

    def _seen(self, call: Underway, answer: WireAnswer) -> Seen:
        """Return what an answer shows; of those that went well, how many calls are left is read once a second."""
        call.status, now = answer.status, time.monotonic()
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
            self._bounds.rates.pause(call.plan.key, told.rest_seconds)
        return Seen(answer.status, limited=told.limited, rest_seconds=told.rest_seconds)

    # Once more

    def _rule(self, call: Underway) -> RetryRule:
        retries = call.asked.retries
        return call.plan.retry if retries is None else replace(call.plan.retry, attempts=retries + 1)

    def _standing(self, call: Underway) -> Standing:
        return Standing(
            attempts=call.attempts,
            repeatable=is_repeatable(call.inbound.method, has_key=call.asked.idempotency_key),
            replayable=call.inbound.body is None or isinstance(call.inbound.body, bytes),
            renewable=call.row.refreshable and not call.renewed,
            left_seconds=call.deadline - time.monotonic(),
        )

    async def _renew(self, call: Underway) -> bool:
        """Renew the credential that was refused, and record that the new one is about to leave; False: there is none."""
        call.renewed = True
        before = _lent(call).marker
        try:
            ready = replace(call.ready, row=await self._in_use.anew(call.row.id), lent=None, forms=None)
            await self._lend(ready, Ask(not_token_sha256=before))
            call.row = await self._in_use.anew(call.row.id)
        except BrokerError:
            return False  # what the upstream said is passed on
        call.ready = ready
        if _lent(call).marker == before:
            return False
        await self._record_intent(call)
        return True

    async def _wait(self, call: Underway, seen: Seen) -> bool:
        """Wait before a further attempt; False when that would take too long, or there were too many already."""
        rule = self._rule(call)
        seconds = delay_seconds(seen, call.attempts, rule, random_share=random.random())  # noqa: S311 - jitter
        if seconds > rule.max_delay_seconds or time.monotonic() + seconds >= call.deadline:
            return False
        if not self._budget.spend(call.row.integration):
            return False
        await asyncio.sleep(seconds)
        return True

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

    def forms(self, call: Underway) -> Forms:
        """Return the forms of this call's credential that an answer must not have; kept while it is the same one."""
        ready = call.ready
        if ready.forms is None:
            ready.forms = self._known_forms(call)
        return ready.forms

    def _known_forms(self, call: Underway) -> Forms:
        lent = _lent(call)
        key = (call.row.id, lent.marker)
        known = self._forms.get(key)
        if known is None:
            texts = [one.reveal() for name, one in lent.fields.items() if name not in NOT_SECRET]
            if call.plan.signer.secrets is not None:
                texts += call.plan.signer.secrets(_material(call))
            known = forms_of(texts)
            if self._keep_seconds > 0:
                self._forms[key] = known
        return known

    def finished(self, call: Underway, code: str | None, seconds: float) -> None:
        """Note what the call came to; in the audit nothing of a call whose intent was not recorded."""
        call.span.end(call.status if code is None else None, error=code)
        if call.intent_id is not None:
            ms = round(seconds * 1000)
            self._outcomes.note(CallOutcome(call.intent_id, call.status, code, call.attempts, ms))


def _lent(call: Underway) -> Lent:
    if call.ready.lent is None:
        raise InternalError  # never: a defect of ours must not send a call without a credential
    return call.ready.lent


def _material(call: Underway) -> Material:
    return Material(
        fields=_lent(call).fields,
        variables=call.ready.configured.variables,
        client_id=call.row.client_id,
        now=time.time(),
        unique=secrets.token_hex(16),
    )


def _wire(call: Underway, fields: Fields, signed: Signed, query: bytes | None) -> WireRequest:
    """Return the request line, fields and body as they stand on the wire."""
    inbound, upstream = call.inbound, call.upstream
    query = signed.query if signed.query is not None else query
    standing = is_repeatable(inbound.method, has_key=call.asked.idempotency_key)
    body = signed.body if signed.body is not None else inbound.body
    if signed.rewriter is not None:
        body = _rewritten(inbound.body, signed)
    return WireRequest(
        scheme=upstream.scheme,
        host=upstream.host,
        port=upstream.port,
        method=inbound.method.encode(),
        target=upstream.path if query is None else upstream.path + b"?" + query,
        headers=((b"host", upstream.authority), *fields, *signed.headers),
        body=body,
        length=inbound.length,
        idempotent=standing,
    )


async def _rewritten(body: bytes | AsyncIterator[bytes] | None, signed: Signed) -> AsyncIterator[bytes]:
    rewriter = signed.rewriter
    if rewriter is None:
        return
    try:
        if isinstance(body, bytes):
            yield rewriter.feed(body)
        elif body is not None:
            async for chunk in body:
                yield rewriter.feed(chunk)
        yield rewriter.finish()
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def _without_params(query: bytes | None, params: Sequence[str]) -> bytes | None:
    """Return the query without the parameters that the signer owns, however their names are written."""
    if not params or not query:
        return query
    kept = [one for one in query.split(b"&") if unquote_plus(one.partition(b"=")[0].decode("latin-1")) not in params]
    return b"&".join(kept)


def _told(failure: BrokerError | None) -> BrokerError:
    """Return what the caller is told where no answer came; whether the call may have been received is always said."""
    unknown = isinstance(failure, OutcomeUnknown)
    timed_out = isinstance(failure, OutcomeUnknown) and failure.timed_out
    said = failure.detail if failure is not None else "The provider did not answer"
    if unknown:
        said += "; whether it received the call is not known"
    error: BrokerError = UpstreamTimeout(said) if timed_out else ProviderUnavailable(said)
    error.members = {"outcome": "unknown" if unknown else "not_sent"}
    return error
