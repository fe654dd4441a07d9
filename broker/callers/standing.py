"""What a caller may do now: read from its rows, if those are genuine, or from the rule that let it in."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import structlog
from sqlmodel import Session, col, select

from broker.callers.exchange import Exchanged
from broker.callers.keys import ParsedKey
from broker.callers.narrowing import both, own_grants
from broker.callers.rows import Row, RowMacs
from broker.callers.trust import Trust
from broker.database import now
from broker.errors import InvalidRequest
from broker.models import Caller, CallerKey
from broker.policy import ROLES, Grant, Principal, Role, parse_grants

LAST_USED_SECONDS: Final = 60.0
MOST_REPORTED: Final = 1000
_NO_DIGEST = "0" * 64
log = structlog.get_logger()


class Standing:
    """Looks up callers inside a session of the database. Calls may run at once.

    A row without a MAC, or with a wrong one, was not written by a broker with the keyring: it is nobody, logged once, and
    told to ``on_forgery`` each time.
    """

    def __init__(self, rows: RowMacs, trust: Trust, *, on_forgery: Callable[[], None] | None = None) -> None:
        """Keep the parts."""
        self._rows = rows
        self._trust = trust
        self._on_forgery = on_forgery
        self._reported: set[str] = set()

    def by_key(self, session: Session, parsed: ParsedKey) -> tuple[Principal, bool] | None:
        """Return the principal of a key, and whether the key's last use should be written; None for a key that is none."""
        moment = now(session)
        found = self._live(session, parsed.key_id, parsed.digest, moment)
        if found is None:
            return None
        key, caller = found
        return principal_of(caller, key_id=key.id), _is_stale(key, moment)

    def holder(self, session: Session, key_id: str) -> tuple[Principal, bool] | None:
        """Do what ``by_key`` does for a key that was shown before, and is not shown again: only its id is known."""
        moment = now(session)
        found = self._live(session, key_id, None, moment)
        return None if found is None else (principal_of(found[1], key_id=key_id), _is_stale(found[0], moment))

    def _live(
        self, session: Session, key_id: str, key_digest: str | None, moment: float
    ) -> tuple[CallerKey, Caller] | None:
        """Return a key and its caller, if both are genuine and live; ``key_digest`` None: the key itself is not shown."""
        query = select(CallerKey, Caller).join(Caller, col(Caller.id) == col(CallerKey.caller_id))
        row = session.exec(query.where(CallerKey.id == key_id)).first()
        stored = row[0].key_digest if row else _NO_DIGEST
        same = hmac.compare_digest(stored.encode(), (stored if key_digest is None else key_digest).encode())
        if row is None or not same:
            return None
        key, caller = row
        if not is_live(key, moment) or not is_ahead(caller.expires_at, moment):
            return None
        return (key, caller) if self.is_genuine(key) and self.is_genuine(caller) else None

    def of(self, session: Session, caller_id: str) -> Principal | None:
        """Return what a caller may do now, whoever asks; None when it is gone, expired, or has no live key any more.

        A caller by rule stands as long as the rule does: whether its issuer would still sign for it cannot be asked.
        """
        caller = session.get(Caller, caller_id)
        if caller is None:
            return self._trust.caller(caller_id)
        return principal_of(caller, key_id="") if self.has_live_key(session, caller) else None

    def has_live_key(self, session: Session, caller: Caller) -> bool:
        """Return whether somebody can still call as this caller: it and one of its keys are genuine and live."""
        moment = now(session)
        if not is_ahead(caller.expires_at, moment) or not self.is_genuine(caller):
            return False
        keys = session.exec(select(CallerKey).where(CallerKey.caller_id == caller.id)).all()
        return any(is_live(key, moment) and self.is_genuine(key) for key in keys)

    def by_exchanged(self, session: Session, told: Exchanged) -> Principal | None:
        """Return whom a token of ours stands for, with what it and the caller's grants of now both allow; else None."""
        moment = now(session)
        if told.ends_at <= moment:
            return None
        caller = self._behind(session, told, moment)
        if caller is None or caller.caller_id != told.caller_id:
            return None
        grants = narrowed(caller, told.grants)
        return replace(caller, roles=frozenset({"service"}), grants=grants, key_id=told.token_id)

    def _behind(self, session: Session, told: Exchanged, moment: float) -> Principal | None:
        """Return the caller behind a token of ours, if its key is live, or if today's rules still let its subject in."""
        if told.key_id is not None:
            found = self._live(session, told.key_id, None, moment)
            return principal_of(found[1], key_id="") if found is not None else None
        if told.subject is None or told.claims_mark is None:
            return None
        return self._trust.caller_of_subject(told.caller_id, told.subject, told.claims_mark)

    def is_genuine(self, row: Row) -> bool:
        """Return whether a holder of the keyring wrote the row; another one is reported."""
        genuine = self._rows.is_genuine(row)
        if not genuine:
            self._report(row)
        return genuine

    def _report(self, row: Row) -> None:
        if self._on_forgery is not None:
            self._on_forgery()
        if row.id not in self._reported and len(self._reported) < MOST_REPORTED:
            self._reported.add(row.id)
            log.critical("caller.row_forged", table=type(row).__tablename__, row_id=row.id)


def narrowed(caller: Principal, wanted: Iterable[Grant] | None) -> tuple[Grant, ...]:
    """Return what ``wanted`` (None: all) and the caller's own grants both allow. An admin has to say what (none: nothing)."""
    own = own_grants(caller)
    if own is None and wanted is None:
        return ()
    return both(own, None if wanted is None else tuple(wanted))


def principal_of(caller: Caller, *, key_id: str) -> Principal:
    """Return the principal of a row; roles and grants that this version does not know allow nothing."""
    grants = tuple(_readable(caller.grants))
    return Principal(caller.id, caller.name, frozenset(_known_roles(caller.roles)), grants, key_id)


def _known_roles(stored: Iterable[str]) -> Iterator[Role]:
    return (role for role in ROLES if role in stored)


def _readable(stored: Iterable[Mapping[str, Any]]) -> Iterator[Grant]:
    # a grant that a newer version wrote may restrict in a way that this one does not know: it allows nothing here
    for raw in stored:
        with contextlib.suppress(InvalidRequest):
            yield from parse_grants([raw])


def _is_stale(key: CallerKey, moment: float) -> bool:
    return key.last_used_at is None or moment - key.last_used_at >= LAST_USED_SECONDS


def is_live(key: CallerKey, moment: float) -> bool:
    """Return whether a key is neither revoked nor expired."""
    return key.revoked_at is None and is_ahead(key.expires_at, moment)


def is_ahead(expires_at: float | None, moment: float) -> bool:
    """Return whether an expiry, None for never, is still to come."""
    return expires_at is None or moment < expires_at
