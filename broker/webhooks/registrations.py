"""The rows of hooks at providers: what a source wants, who acts on it now, what came of it; and when it is looked at again.

``state``: *wanted* and *failed* hooks are still to be made, an *active* one is there, an *unwanted* one is to be removed, and
*gone* says that nothing will be done any more, for the reason ``error``. A removed one leaves no row. ``detail`` holds what the
hook is made from (``asked``), why (``why``), its address as it was sent (``url``; without one nothing was ever sent), how
long before its end it is renewed (``renew_early_seconds``), and what the provider's file needs to find it again (``hook``). Of
one source only one row is acted on at a time: a hook that is made and one that is removed may be the same at the provider.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from broker.database import now
from broker.models import Connection, WebhookRegistration, WebhookSource, new_id
from providers.spec import Registered, Registration

LEASE_SECONDS: Final = 120.0  # longer than acting takes: a refresh under way, the provider twice, the audit
CHECK_SECONDS: Final = 86_400.0
OVERLAP_SECONDS: Final = 60.0
PAUSES_SECONDS: Final = (15.0, 60.0, 300.0, 1800.0, 7200.0, 21_600.0)
SLOW_SECONDS: Final = 3600.0  # after what does not mend itself
MOST_REMOVALS: Final = 12  # about two days
JITTER: Final = 0.2
OPEN: Final = ("wanted", "failed", "active", "unwanted")
Why = Literal["first", "renewal", "repair", "changed"]


@dataclass(frozen=True, slots=True)
class Claimed:
    """A registration that this process acts on, as it was when it was claimed ``at``; ``url`` is the hook's address.

    ``others``: the provider's ids of this source's other hooks that are to stay.
    """

    id: str
    claim: str
    source_id: str
    connection_id: str
    state: str
    remote_id: str | None
    detail: Mapping[str, Any]
    attempts: int
    expires_at: float | None
    at: float
    url: str
    others: frozenset[str] = frozenset()

    @property
    def provider(self) -> str:
        """The provider's name."""
        return str(self.detail["asked"]["provider"])

    @property
    def registered(self) -> Registered | None:
        """The hook as the provider has it, None as long as no answer told."""
        return (
            None if self.remote_id is None else Registered(self.remote_id, self.expires_at, self.detail.get("hook", {}))
        )

    @property
    def ends_soon(self) -> bool:
        """Whether the next hook is to be made now, because the lease of this one ends."""
        return self.expires_at is not None and self.at >= self.expires_at - self.detail["renew_early_seconds"]


# --- Pure.


def checked_settings(registration: Registration, given: Mapping[str, str]) -> dict[str, str]:
    """Return what a source says of its hook, when it can be; ``ValueError`` (its text may be shown) otherwise."""
    known = {setting.name: setting for setting in registration.settings}
    if not given.keys() <= known.keys():
        raise ValueError(f"knows only {', '.join(sorted(known))}")
    for name, setting in known.items():
        if name in given and not re.fullmatch(setting.pattern, given[name]):
            raise ValueError(f"{name} is not of its form: {setting.help}")
        if setting.needed and name not in given:
            raise ValueError(f"{name} is missing: {setting.help}")
    if registration.check_settings is not None:
        registration.check_settings(given)
    return dict(given)


def pause_seconds(attempts: int, *, mends_itself: bool, random_share: float) -> float:
    """Return how long to wait after the ``attempts``-th failure in a row (1 is the first).

    ``mends_itself``: a provider that does not answer, as opposed to a permission that somebody has to give.
    ``random_share``: uniform in [0, 1), spreads by ±20 %.
    """
    pause = PAUSES_SECONDS[min(attempts, len(PAUSES_SECONDS)) - 1]
    return (pause if mends_itself else max(pause, SLOW_SECONDS)) * (1 - JITTER + 2 * JITTER * random_share)


def next_look(at: float, to_renew_in: float | None, *, random_share: float) -> float:
    """Return when an active hook is looked at again: in about a day, and when it is to be renewed. Seconds and times."""
    in_a_day = CHECK_SECONDS * (1 - JITTER + 2 * JITTER * random_share)
    return at + (in_a_day if to_renew_in is None else min(in_a_day, max(0.0, to_renew_in)))


def renew_early_seconds(lease_seconds: float, renew_before_seconds: float) -> float:
    """Return how long before the end of a lease the next hook is made: a short lease is renewed when half of it is over."""
    return min(renew_before_seconds, lease_seconds / 2)


# --- What a source wants; in the transaction that writes it.


def want(session: Session, source: WebhookSource, registration: Registration | None) -> bool:
    """Make the registrations agree with a source as it was written: its hook is made anew (True), kept, or removed.

    ``registration``: of its kind of webhook; ``checked_settings`` and ``connection_problem`` have been asked.
    """
    asked = (
        _asked(source) if registration is not None and source.register_at_provider and source.connection_id else None
    )
    standing = False
    for row in _of_source(session, source.id):
        if row.state in {"unwanted", "gone"}:
            continue
        if asked is not None and row.connection_id == source.connection_id and row.detail["asked"] == asked:
            standing = True
        else:
            _let_go(session, row)
    if asked is None or source.connection_id is None or standing:
        session.flush()
        return False
    _add(session, source.id, source.connection_id, asked, "first")
    session.flush()
    return True


def unwant(session: Session, source_id: str) -> None:
    """Have every hook of a source removed: it is deleted."""
    for row in _of_source(session, source_id):
        if row.state == "gone":
            session.delete(row)
        elif row.state != "unwanted":
            _let_go(session, row)
    session.flush()


def make_again(session: Session, source_id: str) -> None:
    """Have the provider told anew: the source has another newest secret. Not for one whose provider brings the secret."""
    for row in _of_source(session, source_id):
        if row.state in {"active", "failed"}:
            row.state, row.detail = "wanted", {**row.detail, "why": "changed"}
            row.due_at = row.due_at if row.claim is not None else now(session)
    session.flush()


def connection_problem(session: Session, connection_id: str, provider: str) -> str | None:
    """Return why a hook of this provider cannot be made with that connection, None when it can."""
    row = session.get(Connection, connection_id)
    if row is None or row.deleted_at is not None or row.status in {"pending", "revoked"}:
        return "there is no such connection that can be used"
    return None if row.provider == provider else "the connection is one of another provider"


def shown(session: Session, source_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return for each source with a hook what is known of it: of several the one that is active, else the newest."""
    query = select(WebhookRegistration).where(
        col(WebhookRegistration.source_id).in_(source_ids), col(WebhookRegistration.state) != "unwanted"
    )
    found: dict[str, WebhookRegistration] = {}
    for row in session.exec(query.order_by(col(WebhookRegistration.created_at), col(WebhookRegistration.id))):
        if row.source_id not in found or row.state == "active" or found[row.source_id].state != "active":
            found[row.source_id] = row
    return {
        source_id: {
            "state": row.state,
            "error": row.error,
            "remote_id": row.remote_id,
            "expires_at": row.expires_at,
            "checked_at": row.checked_at,
        }
        for source_id, row in found.items()
    }


def _asked(source: WebhookSource) -> dict[str, Any]:
    return {
        "provider": source.provider,
        "kind": source.kind,
        "public_url": source.config.get("public_url"),
        "settings": dict(source.config.get("registration", {})),
    }


def _of_source(session: Session, source_id: str) -> list[WebhookRegistration]:
    query = select(WebhookRegistration).where(WebhookRegistration.source_id == source_id)
    in_order = query.order_by(col(WebhookRegistration.id)).with_for_update()  # so that two never wait for each other
    return list(session.exec(in_order.execution_options(populate_existing=True)))


def _add(session: Session, source_id: str, connection_id: str, asked: Mapping[str, Any], why: Why) -> None:
    at = now(session)
    row = WebhookRegistration(
        id=new_id("reg"),
        source_id=source_id,
        connection_id=connection_id,
        detail={"asked": dict(asked), "why": why},
        due_at=at,
        created_at=at,
    )
    session.add(row)


def _let_go(session: Session, row: WebhookRegistration, *, after_seconds: float = 0.0) -> None:
    """Have a hook removed, once whoever acts on it now is through; a row without one goes at once."""
    if "url" not in row.detail and row.claim is None:
        session.delete(row)
        return
    row.state, row.error, row.attempts = "unwanted", None, 0
    row.due_at = row.due_at if row.claim is not None else now(session) + after_seconds


# --- Claim.


def is_due(session: Session) -> bool:
    """Return whether there is anything to claim."""
    return session.exec(_due(now(session)).limit(1)).first() is not None


def _due(at: float) -> SelectOfScalar[str]:
    """Return the query for the sources with something due, the longest waiting first."""
    due = (col(WebhookRegistration.due_at) <= at, col(WebhookRegistration.state).in_(OPEN))
    return select(WebhookRegistration.source_id).where(*due).order_by(col(WebhookRegistration.due_at))


def claim_due(session: Session, public_url: str, limit: int) -> list[Claimed]:
    """Take what is due, for ``LEASE_SECONDS``; another process takes what this one does not record by then."""
    at = now(session)
    ids = set(session.exec(_due(at).limit(limit)))
    locked = select(WebhookRegistration).where(col(WebhookRegistration.source_id).in_(ids))
    rows = session.exec(locked.order_by(col(WebhookRegistration.id)).with_for_update()).all() if ids else []
    by_source = (_next_of([row for row in rows if row.source_id == source_id], at) for source_id in sorted(ids))
    return [_claim(session, row, public_url, at) for row in by_source if row is not None]


def _next_of(rows: Sequence[WebhookRegistration], at: float) -> WebhookRegistration | None:
    """Return the row of a source to act on: making before removing; None while another one is acted on."""
    if any(row.claim is not None and row.due_at > at for row in rows):
        return None
    due = [row for row in rows if row.due_at <= at and row.state in OPEN]
    return min(due, key=lambda row: (row.state == "unwanted", row.due_at, row.id), default=None)


def claim_of(session: Session, connection_id: str, public_url: str, *, force: bool) -> list[Claimed] | None:
    """Take every open registration of a connection that is about to end; None while somebody acts on one.

    ``force``: take also that one; what its holder records then is refused.
    """
    at = now(session)
    mine = (WebhookRegistration.connection_id == connection_id, col(WebhookRegistration.state).in_(OPEN))
    query = select(WebhookRegistration).where(*mine).order_by(col(WebhookRegistration.id))
    rows = session.exec(query.with_for_update()).all()
    if not force and any(row.claim is not None and row.due_at > at for row in rows):
        return None
    return [_claim(session, row, public_url, at) for row in rows]


def _claim(session: Session, row: WebhookRegistration, public_url: str, at: float) -> Claimed:
    was_sent = "url" in row.detail
    url = row.detail.get("url") or row.detail["asked"]["public_url"] or f"{public_url}/webhooks/{row.source_id}"
    row.claim, row.due_at = new_id("clm"), at + LEASE_SECONDS
    if not was_sent and row.state in {"wanted", "failed"}:
        row.detail = {**row.detail, "url": url}
    session.flush()
    return Claimed(
        id=row.id,
        claim=row.claim,
        source_id=row.source_id,
        connection_id=row.connection_id,
        state=row.state,
        remote_id=row.remote_id,
        detail=row.detail,
        attempts=row.attempts,
        expires_at=row.expires_at,
        at=at,
        url=url,
        others=_others(session, row),
    )


def _others(session: Session, row: WebhookRegistration) -> frozenset[str]:
    rows = [one for one in _of_source(session, row.source_id) if one.id != row.id]
    standing = [one.remote_id for one in rows if one.state not in {"unwanted", "gone"}]
    return frozenset(remote_id for remote_id in standing if remote_id is not None)


# --- Record. Each returns whether the claim still held; otherwise nothing is written.


def held(session: Session, claimed: Claimed) -> WebhookRegistration | None:
    """Return the row while the claim is this one, locked with the source's others: whoever changes the source takes all."""
    rows = (row for row in _of_source(session, claimed.source_id) if row.id == claimed.id)
    return next((row for row in rows if row.claim == claimed.claim), None)


def record_made(
    session: Session, claimed: Claimed, made: Registered, renew_before_seconds: float, random_share: float
) -> WebhookRegistration | None:
    """Write down a hook that is there; what it follows is removed a moment later. Return its row, None without the claim.

    Where nobody wants it any more it stays unwanted, and is removed next.
    """
    row = held(session, claimed)
    if row is None:
        return None
    at = now(session)
    row.remote_id, row.expires_at, row.checked_at = made.remote_id, made.expires_at, at
    early = 0.0 if made.expires_at is None else renew_early_seconds(made.expires_at - at, renew_before_seconds)
    row.detail = {**row.detail, "hook": dict(made.detail), "renew_early_seconds": early}
    row.claim, row.error, row.attempts = None, None, 0
    if row.state == "unwanted":
        row.due_at = at
        session.flush()
        return row
    row.state = "active"
    row.due_at = next_look(at, _to_renew_in(row, at), random_share=random_share)
    for other in _of_source(session, row.source_id):
        if other.id != row.id and other.state not in {"gone", "unwanted"}:
            _let_go(session, other, after_seconds=OVERLAP_SECONDS)
    session.flush()
    return row


def _to_renew_in(row: WebhookRegistration, at: float) -> float | None:
    return None if row.expires_at is None else row.expires_at - row.detail["renew_early_seconds"] - at


def record_checked(session: Session, claimed: Claimed, *, well: bool, random_share: float) -> bool:
    """Write down a look at an active hook; one that is not as it was made is made again at once."""
    row = held(session, claimed)
    if row is None:
        return False
    row.claim, row.error, row.attempts, row.checked_at = None, None, 0, now(session)
    row.due_at = next_look(row.checked_at, _to_renew_in(row, row.checked_at), random_share=random_share)
    if not well and row.state == "active":
        row.state, row.error, row.due_at = "wanted", "gone_at_provider", row.checked_at
        row.detail = {**row.detail, "why": "repair"}
    elif row.state != "active":
        row.due_at = row.checked_at
    session.flush()
    return True


def record_failed(session: Session, claimed: Claimed, error: str, pause: float, *, for_good: bool = False) -> bool:
    """Write down why it did not work, and when to try again. ``for_good``: never, since the connection is gone."""
    row = held(session, claimed)
    if row is None:
        return False
    at = now(session)
    row.claim, row.error, row.attempts, row.due_at = None, error, row.attempts + 1, at + pause
    if row.state == "unwanted":
        for_good = for_good or row.attempts >= MOST_REMOVALS
        row.error = "left_at_provider" if for_good else error
    elif row.state == "wanted":
        row.state = "failed"
    if for_good:
        _close(session, row)
    session.flush()
    return True


def record_removed(session: Session, claimed: Claimed) -> bool:
    """Forget a hook that is there no more."""
    row = held(session, claimed)
    if row is not None:
        session.delete(row)
        session.flush()
    return row is not None


def record_ended(session: Session, claimed: Claimed, error: str) -> bool:
    """Say that nothing more is done about this one, and why: its connection is over."""
    row = held(session, claimed)
    if row is None:
        return False
    row.claim, row.error = None, error
    _close(session, row)
    session.flush()
    return True


def _close(session: Session, row: WebhookRegistration) -> None:
    if session.get(WebhookSource, row.source_id) is None:
        session.delete(row)
    else:
        row.state = "gone"


def renew(session: Session, claimed: Claimed) -> bool:
    """Have the next hook made beside an active one whose lease ends soon; this one is removed when that is there.

    One that has ended by itself needs no removal, and goes.
    """
    row = held(session, claimed)
    if row is None:
        return False
    at, ends_at = now(session), row.expires_at or 0.0
    row.claim, row.due_at = None, max(ends_at, at) + 1.0
    if row.state != "active":  # nobody wants it any more
        row.due_at = at
        session.flush()
        return True
    others = [one for one in _of_source(session, row.source_id) if one.id != row.id]
    if not any(one.state in {"wanted", "failed", "active"} for one in others):
        _add(session, row.source_id, row.connection_id, row.detail["asked"], "renewal")
    if ends_at <= at:
        session.delete(row)
    session.flush()
    return True
