"""A backend's session for one user: minted with a token, owned by the first browser that navigates to it.

The token travels once in a URL and is answered by a redirect to the same URL with the public id, which is worth nothing
without the cookie of the browser that owns the session. Only digests of token and cookie are stored.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlmodel import Session, col

from broker import policy
from broker.audit import Audit, Entry
from broker.database import Database, now
from broker.errors import FlowError, NotFound
from broker.models import BrowserSession, new_id
from broker.policy import Principal, Target
from providers.spec import Secret

Standing = Callable[[Session, str], Principal | None]  # ``Callers.standing``
TOKEN_PATTERN = re.compile(r"bst_([a-z0-9]{26})_([A-Za-z0-9_-]{43})")
ID_PATTERN = re.compile(r"ses_[a-z0-9]{26}")
MIN_SECONDS, MAX_SECONDS = 60, 86_400


def digest(secret: str) -> str:
    """Return the SHA-256 of a secret with at least 256 random bits, in hex: what is stored instead of it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def same_digest(secret: str | None, stored: str | None) -> bool:
    """Compare in constant time; None on either side is never the same."""
    return secret is not None and stored is not None and hmac.compare_digest(digest(secret), stored)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a backend asks a session for."""

    subject: str
    integrations: Sequence[str] | None = None
    return_to: str | None = None
    scopes: Sequence[str] | None = None
    variables: Mapping[str, str] | None = None
    tags: Mapping[str, str] | None = None
    expires_in: int = 600
    reconnects: str | None = None


class Sessions:
    """Mints sessions and lets one browser own each. Calls may run at once on every replica."""

    def __init__(self, database: Database, audit: Audit, standing: Standing) -> None:
        """Keep the parts; ``standing`` says what a caller may do now."""
        self._database = database
        self._audit = audit
        self._standing = standing

    async def mint(self, wanted: Wanted, principal: Principal) -> tuple[BrowserSession, Secret]:
        """Make a session and return its row and its token, shown once.

        Not checked here: grants, return_to and that the integrations exist; the caller has done it.
        """
        bare_id = new_id("ses")
        token = Secret(f"bst_{bare_id.removeprefix('ses_')}_{secrets.token_urlsafe(32)}")

        def work(session: Session) -> BrowserSession:
            at = now(session)
            row = BrowserSession(
                id=bare_id,
                token_digest=digest(token.reveal()),
                caller_id=principal.caller_id,
                subject=wanted.subject,
                integrations=list(wanted.integrations) if wanted.integrations is not None else None,
                return_to=wanted.return_to,
                scopes=list(wanted.scopes) if wanted.scopes is not None else None,
                variables=dict(wanted.variables or {}),
                tags=dict(wanted.tags or {}),
                reconnects=wanted.reconnects,
                created_at=at,
                expires_at=at + wanted.expires_in,
            )
            session.add(row)
            session.flush()
            self._audit.append(session, _entry(row, principal))
            return row

        return await self._database.transaction(work), token

    async def claim(self, token: str, cookie: str | None) -> tuple[BrowserSession, Secret | None]:
        """Let the browser that navigated here own the session; return it and, for a new owner, the cookie to set.

        ``cookie`` is what the browser already holds for this session. Raises FlowError ``session_expired`` for an
        unknown or old token and ``session_bound`` for another browser. One conditional update decides between two.
        """
        match = TOKEN_PATTERN.fullmatch(token)
        row = await self._live("ses_" + match[1]) if match else None
        if row is None or not same_digest(token, row.token_digest):
            raise FlowError("session_expired")
        if row.cookie_digest is not None:
            if not same_digest(cookie, row.cookie_digest):
                raise FlowError("session_bound")
            return row, None
        fresh = Secret(secrets.token_urlsafe(32))
        if not await self._own(row.id, digest(fresh.reveal())):
            raise FlowError("session_bound")
        return row, fresh

    async def _own(self, session_id: str, cookie_digest: str) -> bool:
        def work(session: Session) -> bool:
            mine = (
                sa.update(BrowserSession)
                .where(col(BrowserSession.id) == session_id, col(BrowserSession.cookie_digest).is_(None))
                .values(cookie_digest=cookie_digest)
            )
            return bool(session.execute(mine).rowcount == 1)  # type: ignore[attr-defined]

        return await self._database.transaction(work)

    async def owned(self, session_id: str, cookie: str | None) -> BrowserSession:
        """Return the session behind a public id for the browser that owns it (FlowError otherwise)."""
        row = await self._live(session_id) if ID_PATTERN.fullmatch(session_id) else None
        if row is None:
            raise FlowError("session_expired")
        if not same_digest(cookie, row.cookie_digest):
            raise FlowError("session_bound")
        return row

    async def _live(self, session_id: str) -> BrowserSession | None:
        live = await self._database.read(lambda session: live_session(session, session_id, self._standing))
        return live[0] if live is not None else None

    async def minter(self, row: BrowserSession) -> Principal:
        """Return who minted a session, with the grants of now (FlowError ``session_expired`` when it may nothing more)."""
        live = await self._database.read(lambda session: live_session(session, row.id, self._standing))
        if live is None:
            raise FlowError("session_expired")
        return live[1]

    async def get(self, session_id: str) -> BrowserSession:
        """Return a session's row, live or not (NotFound)."""
        row = await self._database.read(lambda session: session.get(BrowserSession, session_id))
        if row is None:
            raise NotFound
        return row


def live_session(session: Session, session_id: str, standing: Standing) -> tuple[BrowserSession, Principal] | None:
    """Return a session that is not over, with the integrations that its minter may connect now, and the minter.

    None also when the minter is gone, expired or without a live key, or may connect none of them any more: a session is
    never worth more than who made it. The row is a copy; what it says of integrations is not to be written back.
    """
    row = session.get(BrowserSession, session_id)
    if row is None or row.expires_at <= now(session):
        return None
    minter = standing(session, row.caller_id)
    if minter is None:
        return None
    names = row.integrations or ()
    reach = [name for name in names if policy.allowed(minter, "connect", Target(name, row.subject, row.tags))]
    return (BrowserSession(**{**row.model_dump(), "integrations": reach}), minter) if reach else None


def _entry(row: BrowserSession, principal: Principal) -> Entry:
    return Entry(
        action="session.created",
        actor=principal.caller_id,
        subject=row.subject,
        connection_id=row.reconnects,
        detail={"session_id": row.id, "integrations": row.integrations},
    )
