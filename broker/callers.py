"""Find out who is calling: keys, where they may stand in a request, and the callers that they belong to.

A key is ``brk_<id>_<secret><checksum>``: 26 characters that name its row, 43 of base62 (256 random bits), 6 of CRC-32 in
base62. The checksum tells a typo or a look-alike from a key without the database; it protects nothing. Only SHA-256 of
the whole key is stored. An answer from the database is believed for half a second, so that a revoked key, or a role or
grant taken away, is dead on every replica within one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import re
import secrets
import string
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.audit import Audit, Entry
from broker.database import Database, now
from broker.errors import Conflict, DatabaseUnavailable, FieldError, InvalidRequest, NotFound, Unauthenticated
from broker.models import Caller, CallerKey, epoch_of, new_id
from broker.policy import ROLES, Grant, Principal, Role, grant_json, parse_grants, parse_roles
from broker.settings import SettingsError
from providers.spec import Secret

T = TypeVar("T")

KEY_PREFIX: Final = "brk_"
CACHE_SECONDS: Final = 0.5
CACHE_ENTRIES: Final = 4096
LAST_USED_SECONDS: Final = 60.0
LIVE_KEYS: Final = 2
MAX_NAME: Final = 200
YEAR_10000: Final = 253_402_300_800.0
CALLERS_LOCK: Final = 0x43414C4C  # "CALL": one change of callers at a time on PostgreSQL

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SECRET_LENGTH, _CHECKSUM_LENGTH = 43, 6
_KEY = re.compile(r"(brk_([a-z0-9]{26})_[0-9A-Za-z]{43})([0-9A-Za-z]{6})")
_NO_DIGEST = "0" * 64
_BARE: Final = frozenset({b"x-api-key"})
_ID = re.compile(r"(clr|key)_[a-z0-9]{26}")


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A well-formed key: the id of its row and the SHA-256 of all of it, in hex. Says nothing about who it belongs to."""

    key_id: str
    digest: str


def mint_key() -> tuple[str, Secret]:
    """Return the id (``key_…``) and the text of a fresh key with 256 random bits."""
    key_id = new_id("key")
    secret = "".join(secrets.choice(_BASE62) for _ in range(_SECRET_LENGTH))
    body = f"{KEY_PREFIX}{key_id.removeprefix('key_')}_{secret}"
    return key_id, Secret(body + _checksum(body))


def parse_key(text: str) -> ParsedKey | None:
    """Return what a whole key says, or None when its form or its checksum is wrong. No look-up is made."""
    found = _KEY.fullmatch(text)
    if found is None or not hmac.compare_digest(_checksum(found[1]), found[3]):
        return None
    return ParsedKey(f"key_{found[2]}", _digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = []
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_BASE62))
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))


def presented_keys(
    headers: Iterable[tuple[bytes, bytes]], *, extra_headers: Sequence[str] = (), sigv4: bool = False
) -> list[str]:
    """Return the caller key of a request, as a list of none or one; it is neither checked nor known to be one.

    Looked at are ``Authorization`` (Bearer, token, Basic's user and password) and ``X-API-Key``; for the proxy also
    ``extra_headers``, bare or in a scheme, and with ``sigv4`` the ``Credential=`` of an AWS signature (which is not
    checked). Whatever does not begin with ``brk_`` is no key. Raises ``InvalidRequest`` for two different ones.
    """
    bare = {*_BARE, *(name.lower().encode("latin-1") for name in extra_headers)} if extra_headers else _BARE
    found: dict[str, None] = {}
    for raw_name, raw_value in headers:
        name = raw_name.lower()
        if name != b"authorization" and name not in bare:
            continue
        value = raw_value.decode("latin-1").strip(" \t")
        candidates = [value] if name in bare else []
        candidates += _in_scheme(value, sigv4=sigv4)
        found.update((text, None) for text in candidates if text.startswith(KEY_PREFIX))
    if len(found) > 1:
        raise InvalidRequest("Two different caller keys were sent")
    return list(found)


def _in_scheme(value: str, *, sigv4: bool) -> list[str]:
    scheme, _, rest = value.partition(" ")
    scheme, rest = scheme.lower(), rest.strip(" \t")
    if scheme in {"bearer", "token"}:
        return [rest]
    if scheme == "basic":
        return _basic_pair(rest)
    if sigv4 and scheme.startswith("aws4-"):
        return re.findall(r"(?:^|[,\s])Credential=([^/,\s]+)/", rest)
    return []


def _basic_pair(encoded: str) -> list[str]:
    try:
        decoded = base64.b64decode(encoded, validate=True).decode("latin-1")
    except (binascii.Error, ValueError):
        return []
    user, _, password = decoded.partition(":")
    return [user, password]


@dataclass(frozen=True, slots=True)
class _Known:
    principal: Principal
    asked_at: float


class Callers:
    """The callers and their keys. Calls may run at once, on every replica; close it before the database.

    Every change and its audit record are one transaction: ``AuditUnavailable`` from any of them (a copy of the record
    besides the database may fail after the commit, see ``Audit.append``: then the change stands). ``actor`` is the id of
    the caller who asks, or ``cli``.
    """

    def __init__(self, database: Database, audit: Audit, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Keep the parts; ``clock`` counts seconds and measures the age of what is remembered."""
        self._database = database
        self._audit = audit
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._changes = 0
        self._touching: dict[str, asyncio.Task[None]] = {}

    async def authenticate(
        self, headers: Iterable[tuple[bytes, bytes]], *, extra_headers: Sequence[str] = (), sigv4: bool = False
    ) -> Principal:
        """Return who sent a request with these headers (see ``presented_keys`` for the arguments).

        Raises ``InvalidRequest`` for two different keys, else ``Unauthenticated``, which is the same for no key and for
        one that is malformed, unknown, expired or revoked.
        """
        keys = presented_keys(headers, extra_headers=extra_headers, sigv4=sigv4)
        if not keys:
            raise Unauthenticated
        return await self.identify(Secret(keys[0]))

    async def identify(self, key: Secret) -> Principal:
        """Return whose key this is; ``Unauthenticated`` as in ``authenticate``, ``DatabaseUnavailable`` when unknowable."""
        asked_at = self._clock()
        known = self._known.get(_digest(key.reveal()))  # first: whose digest is known needs no other look
        if known is not None and asked_at - known.asked_at < CACHE_SECONDS:
            return known.principal
        parsed = parse_key(key.reveal())
        if parsed is None:
            raise Unauthenticated
        changes = self._changes
        found = await self._database.read(lambda session: _look_up(session, parsed))
        if found is None:
            self._known.pop(parsed.digest, None)
            raise Unauthenticated
        principal, use_is_stale = found
        if changes == self._changes:  # else what was read may be older than a change made here meanwhile
            self._remember(parsed.digest, _Known(principal, asked_at))
        if use_is_stale:
            self._note_use(principal.key_id)
        return principal

    def _remember(self, digest: str, known: _Known) -> None:
        if len(self._known) >= CACHE_ENTRIES:
            self._known.clear()
        self._known[digest] = known

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
        """Finish writing when keys were last used."""
        await asyncio.gather(*self._touching.values())

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
        fields = _checked({"name": name, "roles": roles, "grants": grants, "expires_at": expires_at})
        key_id, key = mint_key()

        def change(session: Session, moment: float) -> tuple[Caller, Entry]:
            caller = Caller(id=new_id("clr"), created_at=moment, **fields)
            session.add(caller)
            session.add(_key_row(caller.id, key_id, key, moment))
            return caller, _entry("caller.created", actor, caller.id, key_id=key_id, **_summary(fields))

        return await self._change(change), key

    async def update(self, caller_id: str, patch: Mapping[str, Any], *, actor: str) -> Caller:
        """Apply a merge patch (RFC 7396) of ``name, roles, grants, expires_at``; return the caller as it is now.

        Roles and grants are replaced whole. Raises ``InvalidRequest``, ``NotFound``, or ``Conflict`` for the last admin.
        """
        fields = _checked(patch)

        def change(session: Session, _moment: float) -> tuple[Caller, Entry]:
            caller = _caller(session, caller_id)
            for name, value in fields.items():
                setattr(caller, name, value)
            session.add(caller)
            return caller, _entry("caller.updated", actor, caller_id, **_summary(fields))

        return await self._change(change)

    async def delete(self, caller_id: str, *, actor: str) -> None:
        """Delete a caller and its keys. Raises ``NotFound``, or ``Conflict`` for the last admin."""

        def change(session: Session, _moment: float) -> tuple[None, Entry]:
            caller = _caller(session, caller_id)
            session.execute(sa.delete(CallerKey).where(col(CallerKey.caller_id) == caller_id))
            session.delete(caller)
            return None, _entry("caller.deleted", actor, caller_id)

        await self._change(change)

    async def add_key(
        self, caller_id: str, *, actor: str, expires_at: str | float | None = None
    ) -> tuple[CallerKey, Secret]:
        """Make another key for a caller; return its row and, for the only time, the key.

        Raises ``NotFound``, ``InvalidRequest``, or ``Conflict`` when the caller has two live keys already.
        """
        fields = _checked({"expires_at": expires_at})
        key_id, key = mint_key()

        def change(session: Session, moment: float) -> tuple[CallerKey, Entry]:
            _caller(session, caller_id)
            held = session.exec(select(CallerKey).where(CallerKey.caller_id == caller_id)).all()
            if sum(_is_live(one, moment) for one in held) >= LIVE_KEYS:
                raise Conflict("This caller has two live keys; revoke one first")
            row = _key_row(caller_id, key_id, key, moment, expires_at=fields["expires_at"])
            session.add(row)
            return row, _entry("caller.key_added", actor, caller_id, key_id=key_id)

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
            session.add(key)
            return None, _entry("caller.key_revoked", actor, caller_id, key_id=key_id)

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
            if _has_live_admin(session, moment):
                return False, None
            if session.get(CallerKey, parsed.key_id) is not None:
                raise SettingsError(
                    "BROKER_ADMIN_KEY: was used before and is dead; `broker callers key` prints another"
                )
            fields: dict[str, Any] = {"roles": ["admin"], "grants": []}
            caller = Caller(id=new_id("clr"), name="admin", created_at=moment, **fields)
            session.add(caller)
            session.add(_key_row(caller.id, parsed.key_id, key, moment))
            return True, _entry("caller.created", "system", caller.id, key_id=parsed.key_id, **_summary(fields))

        return await self._change(change)

    async def _change(self, change: Callable[[Session, float], tuple[T, Entry | None]]) -> T:
        """Run ``change`` while nobody else changes callers; ``Conflict`` if it would take away the last live admin."""

        def work(session: Session) -> T:
            _lock_callers(session)
            moment = now(session)
            had_admin = _has_live_admin(session, moment)
            result, entry = change(session, moment)
            session.flush()
            if had_admin and not _has_live_admin(session, moment):
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


def _lock_callers(session: Session) -> None:
    # two admins that remove each other at once must not both succeed; SQLite has one writer anyway
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": CALLERS_LOCK})


def _has_live_admin(session: Session, moment: float) -> bool:
    admins = {
        caller.id
        for caller in session.exec(select(Caller)).all()
        if "admin" in caller.roles and _is_ahead(caller.expires_at, moment)
    }
    keys = session.exec(select(CallerKey).where(col(CallerKey.caller_id).in_(admins))).all()
    return any(_is_live(key, moment) for key in keys)


def _look_up(session: Session, parsed: ParsedKey) -> tuple[Principal, bool] | None:
    """Return the principal and whether its key's last use should be written, or None."""
    query = select(CallerKey, Caller).join(Caller, col(Caller.id) == col(CallerKey.caller_id))
    row = session.exec(query.where(CallerKey.id == parsed.key_id)).first()
    same = hmac.compare_digest(row[0].key_digest if row else _NO_DIGEST, parsed.digest)
    if row is None or not same:
        return None
    key, caller = row
    moment = now(session)
    if not _is_live(key, moment) or not _is_ahead(caller.expires_at, moment):
        return None
    return _principal(caller, key_id=key.id), key.last_used_at is None or moment - key.last_used_at >= LAST_USED_SECONDS


def standing(session: Session, caller_id: str) -> Principal | None:
    """Return what a caller may do now, whoever asks; None when it is gone, expired, or has no live key any more."""
    caller = session.get(Caller, caller_id)
    keys = session.exec(select(CallerKey).where(CallerKey.caller_id == caller_id)).all()
    moment = now(session)
    if caller is None or not _is_ahead(caller.expires_at, moment) or not any(_is_live(key, moment) for key in keys):
        return None
    return _principal(caller, key_id="")


def _principal(caller: Caller, *, key_id: str) -> Principal:
    grants = tuple(_readable(caller.grants))
    return Principal(caller.id, caller.name, frozenset(_known_roles(caller.roles)), grants, key_id)


def _known_roles(stored: Iterable[str]) -> Iterator[Role]:
    return (role for role in ROLES if role in stored)


def _readable(stored: Iterable[Mapping[str, Any]]) -> Iterator[Grant]:
    # a grant that a newer version wrote may restrict in a way that this one does not know: it allows nothing here
    for raw in stored:
        with contextlib.suppress(InvalidRequest):
            yield from parse_grants([raw])


def _is_live(key: CallerKey, moment: float) -> bool:
    return key.revoked_at is None and _is_ahead(key.expires_at, moment)


def _is_ahead(expires_at: float | None, moment: float) -> bool:
    return expires_at is None or moment < expires_at


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


def _key_row(caller_id: str, key_id: str, key: Secret, moment: float, *, expires_at: float | None = None) -> CallerKey:
    digest = hashlib.sha256(key.reveal().encode()).hexdigest()
    return CallerKey(id=key_id, caller_id=caller_id, key_digest=digest, created_at=moment, expires_at=expires_at)


def _checked(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns of ``Caller`` from fields of the contract; ``InvalidRequest`` names every wrong one."""
    fields: dict[str, Any] = {}
    problems: list[FieldError] = []
    if not set(raw) <= set(_FIELDS):
        problems.append(FieldError("", "has a field that is not known; known: " + ", ".join(_FIELDS)))
    for name, check in _FIELDS.items():
        try:
            if name in raw:
                fields[name] = check(raw[name])
        except InvalidRequest as refused:
            problems += refused.errors
    if problems:
        raise InvalidRequest(errors=problems)
    return fields


def _checked_name(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_NAME or not value.isprintable():
        raise InvalidRequest(errors=[FieldError("/name", f"must be 1 to {MAX_NAME} printable characters")])
    return value


def _checked_expiry(value: object) -> float | None:
    if value is None:
        return None
    seconds = epoch_of(value) if isinstance(value, str) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < YEAR_10000:
        raise InvalidRequest(
            errors=[FieldError("/expires_at", "must be an RFC 3339 time from 1970 on, or null for none")]
        )
    return float(seconds)


_FIELDS: Final[Mapping[str, Callable[[Any], object]]] = {
    "name": _checked_name,
    "roles": lambda value: list(parse_roles(value)),
    "grants": lambda value: [grant_json(grant) for grant in parse_grants(value)],
    "expires_at": _checked_expiry,
}


def _summary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the audit keeps of changed fields. Subjects and tags stay out: a person must be erasable."""
    kept = {name: fields[name] for name in ("roles", "expires_at") if name in fields}
    if "grants" in fields:
        kept["grants"] = [
            {name: grant[name] for name in ("integrations", "may", "mode")}
            | {"restricted_by": sorted({*grant} - {"integrations", "may", "mode"})}
            for grant in fields["grants"]
        ]
    return {"fields": sorted(fields), **kept}
