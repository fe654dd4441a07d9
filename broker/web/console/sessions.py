"""Who is logged in at the console: a signed cookie says whose key was shown, a row how long that still counts.

The key itself is kept nowhere. The cookie is ``<root key>.<session>.<caller key>.<MAC>`` under the root keys of purpose
``session``, which every replica has: who can write to the database alone cannot make one. The row ends it: 30 minutes after
the last request, twelve hours after the first, at log-out, and with the caller key, which is looked up at each request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final

import sqlalchemy as sa
from sqlmodel import Session, col

from broker.audit import Audit, Entry
from broker.callers import Callers, parse_key
from broker.database import Database, now
from broker.errors import Unauthenticated
from broker.models import ConsoleSession, new_id
from broker.policy import Principal
from broker.vault.keyring import derive_key
from broker.vault.system_keys import RootKey, SystemKeys
from providers.spec import Secret

IDLE_SECONDS: Final = 1800.0
LONGEST_SECONDS: Final = 12 * 3600.0
TOUCH_SECONDS: Final = 30.0  # so often at most a request is written down: the idle time is that much too short
COOKIE = re.compile(r"((key_[a-z0-9]{26})\.(cns_[a-z0-9]{26})\.(key_[a-z0-9]{26}))\.([0-9a-f]{64})")


class ConsoleSessions:
    """Begins, continues and ends sessions of the console. Calls may run at once on every replica."""

    def __init__(self, database: Database, audit: Audit, callers: Callers, keys: SystemKeys) -> None:
        """Keep the parts; ``keys`` (loaded) sign the cookies, and a retired one ends those that it signed."""
        self._database = database
        self._audit = audit
        self._callers = callers
        self._keys = keys

    async def begin(self, caller_key: Secret) -> Secret:
        """Return the cookie for who holds this caller key, after an audit record (AuditUnavailable).

        Unauthenticated for what is no live caller key; a token is none, although the API takes it.
        """
        if parse_key(caller_key.reveal()) is None:
            raise Unauthenticated
        principal = await self._callers.identify(caller_key)
        session_id, signed_by = new_id("cns"), self._keys.current

        def work(session: Session) -> None:
            at = now(session)
            session.add(ConsoleSession(id=session_id, created_at=at, expires_at=at + IDLE_SECONDS))
            self._audit.append(session, _entry("console.logged_in", principal, session_id))

        await self._database.transaction(work)
        told = f"{signed_by.id}.{session_id}.{principal.key_id}"
        return Secret(f"{told}.{_mac(signed_by, told)}")

    async def resume(self, cookie: str) -> Principal:
        """Return who is logged in, with the roles and grants of now, and count the 30 minutes anew (Unauthenticated).

        A session whose caller key is dead is over for good.
        """
        session_id, key_id = await self._signed(cookie)
        row, at = await self._database.read(lambda session: (session.get(ConsoleSession, session_id), now(session)))
        if row is None or not at < min(row.expires_at, row.created_at + LONGEST_SECONDS):
            raise Unauthenticated
        try:
            principal = await self._callers.holder(key_id)
        except Unauthenticated:
            await self._forget(session_id)
            raise
        if row.expires_at - at < IDLE_SECONDS - TOUCH_SECONDS:
            await self._touch(session_id)
        return principal

    async def end(self, cookie: str, principal: Principal) -> None:
        """End a session that ``resume`` took, after an audit record (AuditUnavailable: then it goes on)."""
        session_id, _ = await self._signed(cookie)

        def work(session: Session) -> None:
            session.execute(sa.delete(ConsoleSession).where(col(ConsoleSession.id) == session_id))
            self._audit.append(session, _entry("console.logged_out", principal, session_id))

        await self._database.transaction(work)

    async def _signed(self, cookie: str) -> tuple[str, str]:
        """Return the ids of session and caller key that a cookie of ours names (Unauthenticated for any other)."""
        match = COOKIE.fullmatch(cookie)
        if match is None:
            raise Unauthenticated
        told, root_id, session_id, key_id, mac = match.groups()
        root = self._keys.get(root_id)
        if root is None:
            await self._keys.refresh()  # another replica may have rotated a moment ago
            root = self._keys.get(root_id)
        if root is None or not hmac.compare_digest(_mac(root, told), mac):
            raise Unauthenticated
        return session_id, key_id

    async def _touch(self, session_id: str) -> None:
        def work(session: Session) -> None:
            at = now(session)
            still = (col(ConsoleSession.id) == session_id, col(ConsoleSession.expires_at) > at)
            session.execute(sa.update(ConsoleSession).where(*still).values(expires_at=at + IDLE_SECONDS))

        await self._database.transaction(work)

    async def _forget(self, session_id: str) -> None:
        gone = sa.delete(ConsoleSession).where(col(ConsoleSession.id) == session_id)
        await self._database.transaction(lambda session: session.execute(gone))


def _mac(root: RootKey, told: str) -> str:
    return hmac.new(derive_key(root.root, "console"), told.encode(), hashlib.sha256).hexdigest()


def _entry(action: str, principal: Principal, session_id: str) -> Entry:
    return Entry(action, principal.caller_id, detail={"session_id": session_id, "key_id": principal.key_id})
