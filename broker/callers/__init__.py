"""Find out who is calling, by a key, a token or a certificate, and keep the callers and their keys.

What was found is believed for half a second (a trusted issuer's token, which has its own end, for up to a minute), so that a
revoked key, or a role or grant taken away, is dead on every replica within one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.audit import Audit, Entry
from broker.callers.certificates import identity_of, told_certificate
from broker.callers.exchange import Exchanged
from broker.callers.fields import MAX_NAME, checked_fields, summary
from broker.callers.keys import KEY_PREFIX, ParsedKey, digest, key_row, mint_key, parse_key, presented_keys
from broker.callers.rows import Row, RowMacs, lock_callers, mark_of
from broker.callers.standing import LAST_USED_SECONDS, Standing, is_live
from broker.callers.tokens import Believed, Tokens
from broker.database import Database, now
from broker.errors import Conflict, DatabaseUnavailable, InvalidRequest, NotFound, Unauthenticated
from broker.models import Caller, CallerKey, new_id
from broker.policy import Grant, Principal
from broker.settings import Network, SettingsError
from providers.spec import Secret

__all__ = [
    "CACHE_ENTRIES",
    "MAX_NAME",
    "Callers",
    "CertificateHeader",
    "ParsedKey",
    "mint_key",
    "parse_key",
    "presented_keys",
]

T = TypeVar("T")
Change = Callable[[Session, float], tuple[T, Entry | None]]

CACHE_SECONDS: Final = 0.5
CACHE_ENTRIES: Final = 4096
LIVE_KEYS: Final = 2

_ID = re.compile(r"(clr|key)_[a-z0-9]{26}")


@dataclass(frozen=True, slots=True)
class CertificateHeader:
    """The header (in lower case) in which proxies of these networks tell the client's certificate."""

    name: bytes
    trusted: Sequence[Network]


@dataclass(frozen=True, slots=True)
class _Known:
    principal: Principal
    until: float


class Callers:
    """The callers and their keys. Calls may run at once, on every replica; close it before the database.

    Every change and its audit record are one transaction: ``AuditUnavailable`` from any of them (a copy of the record
    besides the database may fail after the commit, see ``Audit.append``: then the change stands). ``actor`` is the id of
    the caller who asks, or ``cli``. A row that is not genuine (see ``rows``) is nobody's: it is not changed, only deleted.
    """

    def __init__(
        self,
        database: Database,
        audit: Audit,
        rows: RowMacs,
        standing: Standing,
        tokens: Tokens,
        *,
        certificates: CertificateHeader | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the parts; ``clock`` counts seconds and measures the age of what is remembered."""
        self.tokens = tokens
        self._database = database
        self._audit = audit
        self._rows = rows
        self._standing = standing
        self._certificates = certificates
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._changes = 0
        self._touching: dict[str, asyncio.Task[None]] = {}

    @property
    def changes(self) -> int:
        """How often something was changed here: what is remembered of callers elsewhere holds for one number of it."""
        return self._changes

    async def authenticate(
        self,
        given: Iterable[tuple[bytes, bytes]],
        *,
        peer: str | None = None,
        extra_headers: Sequence[str] = (),
        sigv4: bool = False,
    ) -> Principal:
        """Return who sent a request with these headers (see ``presented_keys``) over a connection from ``peer``.

        Raises ``InvalidRequest`` for two different keys and for a client certificate that no trusted proxy tells, else
        ``Unauthenticated``, which is the same for no key and for one that is malformed, unknown, expired or revoked.
        A certificate counts only where nothing else is shown.
        """
        headers = given if isinstance(given, list) else list(given)
        told = None
        if (expected := self._certificates) is not None:
            told = told_certificate(headers, header=expected.name, peer=peer, trusted=expected.trusted)
        keys = presented_keys(headers, extra_headers=extra_headers, sigv4=sigv4, is_token=self._is_token)
        if keys:
            return await self.identify(Secret(keys[0]))
        if expected is None or told is None or any(name.lower() == b"authorization" for name, _ in headers):
            raise Unauthenticated
        return await self.tokens.certified(identity_of(told, header=expected.name))

    def shown(self, headers: Iterable[tuple[bytes, bytes]], extra_headers: Sequence[str]) -> list[str]:
        """Return the key or token that ``authenticate`` finds in these fields, ``sigv4`` among them: none or one."""
        return presented_keys(headers, extra_headers=extra_headers, sigv4=True, is_token=self._is_token)

    def _is_token(self, text: str) -> bool:
        return digest(text) in self._known or self.tokens.are_ours(text)

    async def identify(self, key: Secret) -> Principal:
        """Return whose key or token this is; ``Unauthenticated`` as in ``authenticate``.

        ``DatabaseUnavailable`` when it cannot be known, and what else ``Tokens.identify`` raises.
        """
        asked_at, text = self._clock(), key.reveal()
        mark = digest(text)
        known = self._known.get(mark)  # first: whose digest is known needs no other look
        if known is not None and asked_at < known.until:
            return known.principal
        changes = self._changes
        try:
            found = await self._asked(text)
        except Unauthenticated:
            self._known.pop(mark, None)
            raise
        if changes == self._changes:  # else what was read may be older than a change made here meanwhile
            self._remember(mark, _Known(found.principal, asked_at + found.seconds))
        return found.principal

    async def _asked(self, text: str) -> Believed:
        if not text.startswith(KEY_PREFIX):
            return await self.tokens.identify(text)
        parsed = parse_key(text)
        if parsed is None:
            raise Unauthenticated
        found = await self._database.read(lambda session: self._standing.by_key(session, parsed))
        if found is None:
            raise Unauthenticated
        principal, use_is_stale = found
        if use_is_stale:
            self._note_use(principal.key_id)
        return Believed(principal, CACHE_SECONDS)

    def _remember(self, mark: str, known: _Known) -> None:
        if len(self._known) >= CACHE_ENTRIES:
            self._known.clear()
        self._known[mark] = known

    async def exchange(self, shown: Secret, wanted: Sequence[Grant] | None) -> tuple[Secret, Exchanged]:
        """Return a short-lived token of ours for the key or the issuer's token ``shown``, and what it says.

        Looked up anew, never out of memory. Raises ``InvalidRequest`` for a token that was itself exchanged,
        ``Unauthenticated``, and what ``Tokens.exchanged`` raises.
        """
        found = await self._asked(shown.reveal())
        if found.principal.key_id.startswith("tok_"):
            raise InvalidRequest("A token that was exchanged is not exchanged again; use the key that it was made with")
        return await self.tokens.exchanged(found.principal, wanted, found.verified)

    def standing(self, session: Session, caller_id: str) -> Principal | None:
        """Return what a caller may do now, whoever asks; None when it is gone, expired, or has no live key any more."""
        return self._standing.of(session, caller_id)

    async def holder(self, key_id: str) -> Principal:
        """Return whose key this is, looked up anew; it was shown before, and only its id is known now (Unauthenticated)."""
        found = await self._database.read(lambda session: self._standing.holder(session, key_id))
        if found is None:
            raise Unauthenticated
        principal, use_is_stale = found
        if use_is_stale:
            self._note_use(key_id)
        return principal

    def is_genuine(self, row: Row) -> bool:
        """Return whether a holder of the keyring wrote this row."""
        return self._rows.is_genuine(row)

    def _note_use(self, key_id: str) -> None:
        if key_id not in self._touching:
            task = asyncio.create_task(self._write_use(key_id))
            self._touching[key_id] = task
            task.add_done_callback(lambda _: self._touching.pop(key_id, None))

    async def _write_use(self, key_id: str) -> None:
        # best effort: whoever uses a key must not fail because its last use could not be written
        with contextlib.suppress(DatabaseUnavailable):
            await self._database.transaction(lambda session: _mark_used(session, key_id))

    async def aclose(self) -> None:
        """Finish writing when keys were last used; end the verifying of tokens."""
        await asyncio.gather(*self._touching.values())
        await self.tokens.aclose()

    async def get(self, caller_id: str) -> Caller:
        """Return one caller; raises ``NotFound``."""
        return await self._database.read(lambda session: _caller(session, caller_id))

    async def page(self, *, limit: int, before: tuple[float, str] | None = None) -> list[Caller]:
        """Return up to ``limit`` callers, newest first, those after ``before``: (created_at, id) of the last one seen."""
        query = select(Caller).order_by(col(Caller.created_at).desc(), col(Caller.id).desc()).limit(limit)
        if before is not None:
            query = query.where(sa.tuple_(col(Caller.created_at), col(Caller.id)) < sa.tuple_(*map(sa.literal, before)))
        return await self._database.read(lambda session: list(session.exec(query).all()))

    async def keys_of(self, caller_ids: Iterable[str]) -> dict[str, list[CallerKey]]:
        """Return the keys of each caller, revoked and expired ones too, newest first; an empty list for none."""
        keys: dict[str, list[CallerKey]] = {caller_id: [] for caller_id in caller_ids}
        query = select(CallerKey).where(col(CallerKey.caller_id).in_(list(keys)))
        query = query.order_by(col(CallerKey.created_at).desc(), col(CallerKey.id).desc())
        for key in await self._database.read(lambda session: session.exec(query).all()):
            keys[key.caller_id].append(key)
        return keys

    async def add(
        self,
        name: str,
        roles: Sequence[str],
        grants: Sequence[Mapping[str, Any]] = (),
        expires_at: str | float | None = None,
        *,
        actor: str,
    ) -> tuple[Caller, Secret]:
        """Make a caller and its first key; return both, the key for the only time.

        ``grants`` are JSON objects, ``expires_at`` is RFC 3339 or seconds since 1970 UTC. Raises
        ``InvalidRequest`` with a pointer for each wrong field. Whether who asks may give such roles is the route's question.
        """
        fields = checked_fields({"name": name, "roles": roles, "grants": grants, "expires_at": expires_at})
        key_id, key = mint_key()

        def change(session: Session, moment: float) -> tuple[Caller, Entry]:
            caller = Caller(id=new_id("clr"), created_at=moment, **fields)
            rows = self._signed(session, caller, key_row(caller.id, key_id, key, moment))
            return caller, _entry("caller.created", actor, caller.id, key_id=key_id, rows=rows, **summary(fields))

        return await self._change(change), key

    async def update(self, caller_id: str, patch: Mapping[str, Any], *, actor: str) -> Caller:
        """Apply a merge patch (RFC 7396) of ``name, roles, grants, expires_at``; return the caller as it is now.

        Roles and grants are replaced whole. Raises ``InvalidRequest``, ``NotFound``, or ``Conflict`` for the last admin.
        """
        fields = checked_fields(patch)

        def change(session: Session, _moment: float) -> tuple[Caller, Entry]:
            caller = self._genuine_caller(session, caller_id)
            for name, value in fields.items():
                setattr(caller, name, value)
            rows = self._signed(session, caller)
            return caller, _entry("caller.updated", actor, caller_id, rows=rows, **summary(fields))

        return await self._change(change)

    async def delete(self, caller_id: str, *, actor: str) -> None:
        """Delete a caller and its keys. Raises ``NotFound``, or ``Conflict`` for the last admin."""

        def change(session: Session, _moment: float) -> tuple[None, Entry]:
            caller = _caller(session, caller_id)
            keys = session.exec(select(CallerKey.id).where(CallerKey.caller_id == caller_id)).all()
            session.execute(sa.delete(CallerKey).where(col(CallerKey.caller_id) == caller_id))
            session.delete(caller)
            return None, _entry("caller.deleted", actor, caller_id, rows=dict.fromkeys([caller_id, *keys]))

        await self._change(change)

    async def add_key(
        self, caller_id: str, *, actor: str, expires_at: str | float | None = None
    ) -> tuple[CallerKey, Secret]:
        """Make another key for a caller; return its row and, for the only time, the key.

        Raises ``NotFound``, ``InvalidRequest``, or ``Conflict`` when the caller has two live keys already.
        """
        fields = checked_fields({"expires_at": expires_at})
        key_id, key = mint_key()

        def change(session: Session, moment: float) -> tuple[CallerKey, Entry]:
            self._genuine_caller(session, caller_id)
            held = session.exec(select(CallerKey).where(CallerKey.caller_id == caller_id)).all()
            if sum(is_live(one, moment) for one in held) >= LIVE_KEYS:
                raise Conflict("This caller has two live keys; revoke one first")
            row = key_row(caller_id, key_id, key, moment, expires_at=fields["expires_at"])
            rows = self._signed(session, row)
            return row, _entry("caller.key_added", actor, caller_id, key_id=key_id, rows=rows)

        return await self._change(change), key

    async def revoke_key(self, caller_id: str, key_id: str, *, actor: str) -> None:
        """Revoke a key: here at once, on other replicas within a second. One that is revoked already stays so.

        Raises ``NotFound`` for a key that this caller does not have, ``Conflict`` for the last key of the last admin.
        """

        def change(session: Session, moment: float) -> tuple[None, Entry | None]:
            key = session.get(CallerKey, key_id) if _ID.fullmatch(key_id) else None
            if key is None or key.caller_id != caller_id:
                raise NotFound
            if key.revoked_at is not None:
                return None, None
            key.revoked_at = moment
            rows = self._signed(session, key)
            return None, _entry("caller.key_revoked", actor, caller_id, key_id=key_id, rows=rows)

        await self._change(change)

    async def ensure_admin(self, key: Secret) -> bool:
        """Make the first admin caller with this key while there is no live one; return whether it was made.

        Raises ``SettingsError`` naming ``BROKER_ADMIN_KEY`` when it is not a whole key, or one that was used before and
        may not be revived.
        """
        parsed = parse_key(key.reveal())
        if parsed is None:
            raise SettingsError("BROKER_ADMIN_KEY: must be a whole brk_ key, as `broker callers key` prints it")

        def change(session: Session, moment: float) -> tuple[bool, Entry | None]:
            if self._has_live_admin(session):
                return False, None
            if session.get(CallerKey, parsed.key_id) is not None:
                raise SettingsError(
                    "BROKER_ADMIN_KEY: was used before and is dead; `broker callers key` prints another"
                )
            fields: dict[str, Any] = {"roles": ["admin"], "grants": []}
            caller = Caller(id=new_id("clr"), name="admin", created_at=moment, **fields)
            rows = self._signed(session, caller, key_row(caller.id, parsed.key_id, key, moment))
            told = {"key_id": parsed.key_id, "rows": rows, **summary(fields)}
            return True, _entry("caller.created", "system", caller.id, **told)

        return await self._change(change)

    def _signed(self, session: Session, *rows: Row) -> dict[str, str | None]:
        """Sign rows as they are now and write them; return what the audit keeps of their MACs, by their ids."""
        for row in rows:
            self._rows.sign(row)
            session.add(row)
        return {row.id: mark_of(row) for row in rows}

    def _genuine_caller(self, session: Session, caller_id: str) -> Caller:
        """Return a caller that may be changed: to sign a forged one would make it genuine (NotFound, Conflict)."""
        caller = _caller(session, caller_id)
        if not self._standing.is_genuine(caller):
            raise Conflict("This caller was not written by the broker, and is refused; delete it")
        return caller

    def _has_live_admin(self, session: Session) -> bool:
        admins = [caller for caller in session.exec(select(Caller)).all() if "admin" in caller.roles]
        return any(self._standing.has_live_key(session, caller) for caller in admins)

    async def _change(self, change: Change[T]) -> T:
        """Run ``change`` while nobody else changes callers; ``Conflict`` if it would take away the last live admin."""

        def work(session: Session) -> T:
            lock_callers(session)
            had_admin = self._has_live_admin(session)
            result, entry = change(session, now(session))
            session.flush()
            if had_admin and not self._has_live_admin(session):
                raise Conflict("This would leave the broker without an admin")
            if entry is not None:
                self._audit.append(session, entry)
            return result

        try:
            return await self._database.transaction(work)
        finally:
            self._changes += 1
            self._known.clear()


def _entry(action: str, actor: str, caller_id: str, **detail: object) -> Entry:
    return Entry(action=action, actor=actor, detail={"caller_id": caller_id, **detail})


def _mark_used(session: Session, key_id: str) -> None:
    moment = now(session)
    unmarked = sa.or_(col(CallerKey.last_used_at).is_(None), col(CallerKey.last_used_at) <= moment - LAST_USED_SECONDS)
    session.execute(
        sa.update(CallerKey).where(col(CallerKey.id) == key_id, unmarked).values(last_used_at=moment),
        execution_options={"synchronize_session": False},
    )


def _caller(session: Session, caller_id: str) -> Caller:
    # what is no id never reaches the database: PostgreSQL fails on a NUL instead of finding nothing
    caller = session.get(Caller, caller_id) if _ID.fullmatch(caller_id) else None
    if caller is None:
        raise NotFound
    return caller
