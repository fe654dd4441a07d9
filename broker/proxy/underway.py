"""A proxied call's values: the request as it came in, the connection made ready for it, and how far the call has come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from broker.credentials import Lent
from broker.credentials.snapshots import Snapshot
from broker.egress.calls import Fields
from broker.integrations import Configured
from broker.policy import Principal
from broker.proxy.fields import Asked
from broker.proxy.planning import Plan
from broker.proxy.scrub import Forms
from broker.proxy.target import CallTarget, Upstream
from broker.tracing import Span


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


@dataclass(frozen=True, slots=True)
class Loan:
    """One opened credential, and what belongs to exactly it: its digest for the audit, its spellings for the scrubber."""

    lent: Lent = field(repr=False)
    digest: str
    forms: Forms = field(repr=False)


@dataclass(slots=True, eq=False)
class Ready:
    """A connection made ready for calls to one of its hosts: good for as long as ``row`` is what is known of it.

    ``loan``: what the newest call took, for the next one. A call that runs keeps its own.
    """

    row: Snapshot
    configured: Configured
    plan: Plan
    loan: Loan | None = field(default=None, repr=False)


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
    loan: Loan | None = field(default=None, repr=False)
    intents: list[str] = field(default_factory=list)
    attempts: int = 0
    perhaps_received: bool = False
    renewed: bool = False
    upstream_seconds: float = 0.0
    status: int | None = None
    rate_remaining: int | None = None

    @property
    def plan(self) -> Plan:
        """How calls to this host are made."""
        return self.ready.plan
