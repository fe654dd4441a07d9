"""How a flow ends: the refusal or the pending connection, where that sends the browser, and what a duplicate is told.

Pure: no I/O and no clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit, urlunsplit

import sqlalchemy as sa
from sqlmodel import col

from broker.errors import FlowError
from broker.integrations import Configured
from broker.integrations.config import Endpoints
from broker.models import Connection, Flow, new_id
from broker.refresh import refresh_ends_at
from broker.token_endpoint import TokenAnswer, granted_scopes, missing_scopes
from providers.spec import Account, Secret

OUTCOME_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a flow ended: ``url`` to go to next, or, without any return_to, what the built-in page shows.

    ``again``: the flow goes on, ``url`` asks the provider for consent once more.
    """

    url: str | None
    error: str | None = None
    connection_id: str | None = None
    confirm_code: Secret | None = None
    missing_scopes: tuple[str, ...] = ()
    again: bool = False

    def packed(self) -> bytes:
        """Return the outcome with its confirm code, to be sealed."""
        code = self.confirm_code.reveal() if self.confirm_code is not None else None
        return json.dumps([self.url, self.error, self.connection_id, code, self.missing_scopes, self.again]).encode()

    @classmethod
    def unpacked(cls, packed: bytes) -> Outcome:
        """Return what ``packed`` was made of."""
        url, error, connection_id, code, missing, again = json.loads(packed)
        return cls(url, error, connection_id, Secret(code) if code else None, tuple(missing), again)


def refuse(planned: Endpoints, *, iss: str | None, error: str | None, code: str | None) -> None:
    """Raise what stands against going on (FlowError), judged by what was configured at start (RFC 9207 2.4)."""
    if (iss is None and planned.iss_required) or (iss is not None and planned.issuer and iss != planned.issuer):
        raise FlowError("issuer_mismatch")
    if error is not None:
        known = {"access_denied": "access_denied", "temporarily_unavailable": "provider_unavailable"}
        raise FlowError(known.get(error, "provider_error"))
    if not code:
        raise FlowError("provider_error")


def failed_outcome(flow: Flow, code: str) -> Outcome:
    """Return the end of a flow with an error."""
    return Outcome(None if flow.return_to is None else error_url(flow.return_to, code), error=code)


def connected_outcome(flow: Flow, connection_id: str, code: Secret | None, missing: Sequence[str]) -> Outcome:
    """Return the end of a flow with a connection; ``code`` is None where it is confirmed already."""
    if flow.return_to is None:
        return Outcome(None, connection_id=connection_id, confirm_code=code, missing_scopes=tuple(missing))
    added = {"status": "connected", "connection_id": connection_id}
    if code is not None:
        added["confirm"] = code.reveal()
    if missing:
        added["missing_scopes"] = " ".join(missing)
    return Outcome(with_query(flow.return_to, added), connection_id=connection_id, confirm_code=code)


def pending_connection(
    flow: Flow,
    configured: Configured,
    answer: TokenAnswer,
    account: Account | None,
    learned: Mapping[str, str],
    *,
    received_at: float,
) -> Connection:
    """Return the row of what came of a flow; it lacks its times and its secret's version (pure).

    ``configured`` and ``learned`` are what is known in the end: they become its pins and its variables.
    """
    granted, refresh = granted_scopes(configured.oauth2, flow.scopes, answer), configured.oauth2.refresh
    ends_at = refresh_ends_at(refresh, answer.refresh_expires_at, received_at=received_at, before=None)
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
        variables={**flow.variables, **learned},
        scopes=list(granted),
        missing_scopes=list(missing_scopes(configured.oauth2, flow.scopes, answer.scopes)),
        token_expires_at=answer.expires_at,
        refresh_expires_at=ends_at if answer.refresh_token is not None else None,
        tags=flow.tags,
        flow_id=flow.id,
    )


def error_url(return_to: str, code: str) -> str:
    """Return where a flow that failed sends the browser."""
    return with_query(return_to, {"status": "error", "error": code})


def with_query(url: str, added: Mapping[str, str]) -> str:
    """Return ``url`` with parameters behind its own query, which is kept byte for byte."""
    parts = urlsplit(url)
    query = "&".join(filter(None, [parts.query, urlencode(added)]))
    return urlunsplit(parts._replace(query=query))


def outcome_update(flow_id: str, sealed: bytes | None, at: float) -> sa.Update:
    """Return the update that keeps an outcome; the verifier goes with it: it has been used."""
    changes = {"sealed_outcome": sealed, "sealed_verifier": None, "outcome_until": at + OUTCOME_SECONDS}
    return sa.update(Flow).where(col(Flow.id) == flow_id).values(**changes)
