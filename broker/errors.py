"""Every error that the broker says to the outside: its status, its stable code and a safe message.

The tree, one line a branch (the status stands behind the name):

    BrokerError
    ├── InvalidRequest 400          ├── ReturnToInvalid 400 (browser)
    ├── Unauthenticated 401         ├── SessionBound, SessionExpired, … (see ``oauth.flow``)
    ├── Forbidden 403               ├── EgressDenied 403
    ├── NotFound 404                ├── MethodNotAllowed 405
    ├── Conflict 409 and its kinds  ├── PayloadTooLarge 413, UnsupportedMediaType 415
    ├── RateLimited 429             ├── InternalError 500, UpgradeUnsupported 501
    ├── ProviderUnavailable, UpstreamInvalid 502
    ├── CircuitOpen, SecretStoreUnavailable, AuditUnavailable, Overloaded, DatabaseUnavailable 503
    └── UpstreamTimeout 504

A message (``detail``) is written by us and never quotes input, an upstream's text or a secret.
Foreign exceptions are translated into one of these where they enter; ``app`` alone makes the response (RFC 9457).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class FieldError:
    """One field that was refused: ``pointer`` is a JSON Pointer into the body or ``?name`` for a query parameter."""

    pointer: str
    detail: str


class BrokerError(Exception):
    """The root: anything that is answered as problem+json. ``str()`` is the safe detail, never a secret."""

    provider_in_trouble: bool | None = (
        None  # of a refresh: whether it shows that nobody is served; None: it shows nothing
    )

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        detail: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[FieldError] = (),
    ) -> None:
        """Keep a detail written by us, response headers and, for a refused body, its fields.

        ``members`` are further members of the problem document (RFC 9457 3.2).
        """
        self.detail = detail or self.title
        self.headers = dict(headers or {})
        self.errors = tuple(errors)
        self.members: dict[str, str] = {}
        super().__init__(self.detail)


class InternalError(BrokerError):
    """A defect of ours; the detail stays general and the log has the request id."""


class InvalidRequest(BrokerError):
    """The request is malformed: an unknown field, a wrong type, a value out of range."""

    status, code, title = 400, "invalid_request", "The request is not valid"


class Unauthenticated(BrokerError):
    """No caller key, or one that is unknown, expired or revoked."""

    status, code, title = 401, "unauthenticated", "A valid caller key is required"

    def __init__(self, detail: str | None = None) -> None:
        """Add the challenge that RFC 9110 11.6.1 asks for."""
        super().__init__(detail, headers={"WWW-Authenticate": 'Bearer realm="broker"'})


class Forbidden(BrokerError):
    """The thing is inside the caller's grants, the action is not."""

    status, code, title = 403, "forbidden", "This caller may not do that"


class EgressDenied(BrokerError):
    """The address that a configured name resolved to is not one we may dial."""

    status, code, title = 403, "egress_denied", "The target address is not allowed"


class NotFound(BrokerError):
    """Absent, or outside the caller's grants: the answer is the same."""

    status, code, title = 404, "not_found", "There is no such thing here"


class MethodNotAllowed(BrokerError):
    """The route exists, the method does not."""

    status, code, title = 405, "method_not_allowed", "This method is not allowed here"


class Conflict(BrokerError):
    """The state of the thing does not allow the action."""

    status, code, title = 409, "conflict", "The current state does not allow this"


class IdempotencyConflict(Conflict):
    """The Idempotency-Key was used with another body, or its answer showed a secret and is not kept."""

    code, title = "idempotency_conflict", "This Idempotency-Key was used before"

    def __init__(self, detail: str | None = None, *, made_id: str | None = None) -> None:
        """Name what the first request made, where its answer is not kept (problem member ``made_id``)."""
        super().__init__(detail)
        if made_id is not None:
            self.members = {"made_id": made_id}


class ConfirmationRequired(Conflict):
    """The connection is pending: nobody has confirmed who consented."""

    code, title = "confirmation_required", "The connection is not confirmed yet"


class ConfirmInvalid(Conflict):
    """The one-time code is wrong, used, or too old. Nothing was changed."""

    code, title = "confirm_invalid", "The confirmation code is not valid"


class SubjectMismatch(Conflict):
    """The right code with another subject or return_to: the flow is burnt."""

    code, title = "subject_mismatch", "The flow belongs to another user"


class ReauthorizationRequired(Conflict):
    """The provider no longer accepts the credential: the user has to consent again."""

    code, title = "reauthorization_required", "The user has to connect the account again"

    def __init__(self, detail: str | None = None, *, status_reason: str | None = None) -> None:
        """Say why, as the connection does, and what helps."""
        super().__init__(
            detail
            or "the provider no longer accepts this credential: send the user through a reconnect, or import anew"
        )
        self.members = {"status_reason": status_reason} if status_reason is not None else {}


class ConnectionFrozen(Conflict):
    """Frozen by a security team."""

    code, title = "connection_frozen", "The connection is frozen"


class ConnectionRevoked(Conflict):
    """Revoked; a reconnect makes it usable again."""

    code, title = "connection_revoked", "The connection is revoked"


class OriginChanged(Conflict):
    """The integration's endpoints moved to another origin since the connection was made."""

    code, title = "origin_changed", "The integration's endpoints changed since this connection was made"


class NotRefreshable(Conflict):
    """The credential cannot be refreshed: there is no refresh token and no grant to mint one."""

    code, title = "not_refreshable", "This credential cannot be refreshed"


class AmbiguousConnection(Conflict):
    """Several connections fit (integration, subject)."""

    code, title = "ambiguous_connection", "Several connections fit; name one by its id"


class PayloadTooLarge(BrokerError):
    """The body is over the limit."""

    status, code, title = 413, "payload_too_large", "The body is too large"


class UnsupportedMediaType(BrokerError):
    """Only JSON is read."""

    status, code, title = 415, "unsupported_media_type", "Only application/json is read"


class RateLimited(BrokerError):
    """Too many; ``retry_after_seconds`` says when to come again."""

    status, code, title = 429, "rate_limited", "Too many requests"

    def __init__(self, detail: str | None = None, *, retry_after_seconds: int = 1) -> None:
        """Add Retry-After (whole seconds, at least 1)."""
        super().__init__(detail, headers={"Retry-After": str(max(1, retry_after_seconds))})


class UpgradeUnsupported(BrokerError):
    """WebSocket and other upgrades."""

    status, code, title = 501, "upgrade_unsupported", "Connection upgrades are not supported"


class ProviderUnavailable(BrokerError):
    """The provider did not answer, or answered that it cannot now. Try later."""

    status, code, title = 502, "provider_unavailable", "The provider is not available"
    pause_seconds: float | None = None  # how long it asked everybody to stay away


class UpstreamInvalid(BrokerError):
    """The provider's answer breaks its protocol; nothing of it was kept."""

    status, code, title = 502, "upstream_invalid", "The provider's answer is not valid"


class CircuitOpen(BrokerError):
    """The breaker for this host is open."""

    status, code, title = 503, "circuit_open", "The provider failed repeatedly; calls are paused"


class SecretStoreUnavailable(BrokerError):
    """The vault is sealed, gone, too slow, or holds something that does not open."""

    status, code, title = 503, "secret_store_unavailable", "The secret store is not available"


class AuditUnavailable(BrokerError):
    """No durable audit record, so no credential."""

    status, code, title = 503, "audit_unavailable", "The audit record could not be written"


class DatabaseUnavailable(BrokerError):
    """The database is locked, full, gone or too slow. Nothing was written; it heals without a restart."""

    status, code, title = 503, "database_unavailable", "The database is not available"

    def __init__(self, detail: str | None = None) -> None:
        """Add Retry-After."""
        super().__init__(detail, headers={"Retry-After": "1"})


class Overloaded(BrokerError):
    """More than can be served now; Retry-After is set."""

    status, code, title = 503, "overloaded", "The broker cannot serve this now"

    def __init__(self, detail: str | None = None, *, retry_after_seconds: int = 1) -> None:
        """Add Retry-After (whole seconds, at least 1)."""
        super().__init__(detail, headers={"Retry-After": str(max(1, retry_after_seconds))})


class UpstreamTimeout(BrokerError):
    """The provider did not answer in time."""

    status, code, title = 504, "upstream_timeout", "The provider did not answer in time"


class FlowError(BrokerError):
    """A browser flow that ends without a connection: a page, or ``status=error&error=<code>`` at ``return_to``.

    ``code`` is one of ``FLOW_CODES``; the class is one for all of them because only the code and text differ.
    """

    status = 400

    def __init__(self, flow_code: str, detail: str | None = None) -> None:
        """Take one of ``FLOW_CODES`` (KeyError for any other: a defect of ours)."""
        self.flow_code = flow_code
        super().__init__(detail or FLOW_CODES[flow_code])


FLOW_CODES: Mapping[str, str] = {
    "access_denied": "You, or the provider on your behalf, refused the access that was asked for.",
    "provider_error": "The provider reported an error.",
    "session_required": "This link needs a session. Please start again from the application.",
    "session_expired": "This session is over. Please start again from the application.",
    "session_bound": "This link was opened in another browser. Please start again from the application.",
    "state_invalid": "This page does not belong to a flow of this browser. Please start again from the application.",
    "state_expired": "This took too long. Please start again from the application.",
    "issuer_mismatch": "The answer did not come from the expected provider.",
    "exchange_failed": "The provider did not accept the authorization code.",
    "identity_invalid": "The provider's statement about the account is not valid.",
    "account_mismatch": "This is another account than the one that is to be reconnected.",
    "refresh_token_missing": "The provider gave no lasting access although it was asked for.",
    "provider_unavailable": "The provider is not available. Please try again later.",
    "integration_disabled": "This integration is switched off or not configured.",
    "return_to_invalid": "The address to return to is not on the list.",
    "rate_limited": "Too many attempts. Please wait a moment.",
}


def problem_of(error: BrokerError, request_id: str) -> dict[str, Any]:
    """Return an error as the members of an RFC 9457 problem document."""
    flow = isinstance(error, FlowError)
    code = error.flow_code if isinstance(error, FlowError) else error.code
    body: dict[str, Any] = {
        "type": f"urn:broker:error:{code}",
        "title": "The flow cannot go on" if flow else error.title,
        "status": error.status,
        "detail": error.detail,
        "code": code,
        "request_id": request_id,
        **error.members,
    }
    if error.errors:
        body["errors"] = [asdict(item) for item in error.errors]
    return body


def all_codes() -> frozenset[str]:
    """Every stable code that an answer can carry; ``docs/errors.md`` has a section for each (checked by a test)."""
    found: set[str] = set(FLOW_CODES)
    waiting: list[type[BrokerError]] = [BrokerError]
    while waiting:
        kind = waiting.pop()
        waiting.extend(kind.__subclasses__())
        if kind is not FlowError:
            found.add(kind.code)
    return frozenset(found)
