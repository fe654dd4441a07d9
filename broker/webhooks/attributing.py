"""Which connection an event belongs to, by the account that it names; and the events that wait for one.

An account that one connection has is that connection's; of the source's integration, where it names one. Where several have it,
such as two subjects who connected the same shop, the event is nobody's: it keeps the account's id, and whoever may see events
of no connection sees it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlmodel import Session, col

from broker.database import Database, GroupReader
from broker.models import Connection, WebhookEvent, WebhookSource
from broker.webhooks.configured import Source
from providers.spec import Received, Verified
from providers.webhook_accounts import account_of, ended_by
from providers.webhook_places import Body

BELIEVED_SECONDS: Final = 2.0
MOST_KEPT: Final = 10_000
MOST_RELEASED: Final = 200  # accounts at once
LIVE: Final = (col(Connection.status).not_in(("pending", "revoked")), col(Connection.deleted_at).is_(None))
Key = tuple[
    str, str, str | None
]  # a provider, an account's id there, and the integration that alone counts, if one does
Parked = tuple[str, str, str | None]  # a provider, an account's id there, and the source of the events


@dataclass(frozen=True, slots=True)
class Attribution:
    """Whose an event is. ``parked``: it waits for a connection of its account.

    ``lifecycle``: it says that what an account granted is over. The worker acts on that before it fans the event out, so it is
    stored without a number.
    """

    connection_id: str | None = None
    account_id: str | None = None
    parked: bool = False
    lifecycle: bool = False


NOBODYS: Final = Attribution()


class Attributing:
    """Finds the connections of events. Calls may run at once; what was found is believed for ``BELIEVED_SECONDS``."""

    def __init__(self, database: Database, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Keep the parts. ``monotonic``: the clock of ages."""
        self._reader: GroupReader[Key, Sequence[str]] = GroupReader(database, connections_of)
        self._monotonic = monotonic
        self._held: dict[Key, tuple[float, Sequence[str]]] = {}

    async def of(self, source: Source, received: Received, verified: Verified) -> Attribution:
        """Return whose a verified event is. A source that names its connection has the last word (DatabaseUnavailable)."""
        webhook = source.webhook
        if not webhook.account and not webhook.lifecycle:
            return NOBODYS if source.connection_id is None else Attribution(source.connection_id)
        body = Body(received.body) if verified.body is None else verified.body
        account_id = account_of(webhook, received, body)
        ended = ended_by(webhook, verified.event_type, received, body)
        if account_id is None and ended is not None and len(ended.accounts) == 1:
            account_id = ended.accounts[0]
        if source.connection_id is not None or account_id is None:
            return Attribution(source.connection_id, account_id, lifecycle=ended is not None)
        found = await self._known((source.provider, account_id, source.integration))
        return Attribution(
            found[0] if len(found) == 1 else None,
            account_id,
            parked=source.park_unmatched and not found and ended is None,
            lifecycle=ended is not None,
        )

    async def _known(self, key: Key) -> Sequence[str]:
        at = self._monotonic()
        held = self._held.get(key)
        if held is not None and at < held[0]:
            return held[1]
        found = await self._reader.submit(key)
        if len(self._held) >= MOST_KEPT:
            self._held.clear()
        if found:  # an account without a connection is about to get one, more often than not
            self._held[key] = (at + BELIEVED_SECONDS, found)
        return found


def connections_of(connection: sa.Connection, keys: Sequence[Key]) -> list[Sequence[str]]:
    """Return for each account the ids of its live connections, two at most: one is the owner, two are too many."""
    wanted = {*keys}
    exact = {key for key in wanted if not key[1].endswith("*")}
    found: dict[Key, Sequence[str]] = {key: _beginning_so(connection, key) for key in wanted - exact}
    if exact:
        held = _of_accounts(connection, {key[:2] for key in exact})
        found |= {key: _ids(held.get(key[:2], {}), key[2]) for key in exact}
    return [found.get(key, ()) for key in keys]


def _of_accounts(
    connection: sa.Connection, accounts: Collection[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, tuple[str, str]]]:
    """Return by account and integration the first and the last of the live connections' ids."""
    columns = (col(Connection.provider), col(Connection.account_id))
    ids = (sa.func.min(col(Connection.id)), sa.func.max(col(Connection.id)))
    of_integration = (*columns, col(Connection.integration))
    query = sa.select(*of_integration, *ids).where(sa.tuple_(*columns).in_(accounts), *LIVE)
    held: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for provider, account_id, integration, first, last in connection.execute(query.group_by(*of_integration)):
        held.setdefault((provider, str(account_id)), {})[integration] = (first, last)
    return held


def _ids(held: Mapping[str, tuple[str, str]], integration: str | None) -> tuple[str, ...]:
    ids = {one for name, pair in held.items() if integration in {None, name} for one in pair}
    return tuple(sorted(ids)[:2])


def _beginning_so(connection: sa.Connection, key: Key) -> Sequence[str]:
    query = sa.select(col(Connection.id)).where(col(Connection.provider) == key[0], account_is(key[1]), *LIVE)
    if key[2] is not None:
        query = query.where(col(Connection.integration) == key[2])
    if (
        connection.dialect.name == "sqlite"
    ):  # it compares bytes, so its index has them together; its reads hold up the loop
        begin = key[1][:-1]
        query = query.where(
            col(Connection.account_id) >= begin, col(Connection.account_id) < begin + chr(sys.maxunicode)
        )
    return tuple(connection.execute(query.limit(2)).scalars())


def account_is(account_id: str) -> sa.ColumnElement[bool]:
    """Return the condition that a connection is of this account, or of one that begins so (``*`` at the end)."""
    if not account_id.endswith("*"):
        return col(Connection.account_id) == account_id
    begin = account_id[:-1]
    return sa.func.substr(col(Connection.account_id), 1, len(begin)) == begin  # no collation has a say in it


def account_is_one_of(account_ids: Collection[str]) -> sa.ColumnElement[bool]:
    """Return the condition that a connection is of one of these accounts, ever so many of them (SQLite bears 1000 ORs)."""
    exact = [one for one in account_ids if not one.endswith("*")]
    begins = (account_is(one) for one in account_ids if one.endswith("*"))
    return sa.or_(col(Connection.account_id).in_(exact), *begins)


# Parked events


_PARKED: Final = (col(WebhookEvent.number).is_(None), col(WebhookEvent.parked) == sa.true())


def release(session: Session, event_ids: Sequence[str]) -> int:
    """Let parked events go, whoever they belong to, in the caller's transaction; return how many. The worker sends them."""
    freed = sa.update(WebhookEvent).where(col(WebhookEvent.id).in_(event_ids), *_PARKED).values(parked=False)
    return int(session.execute(freed).rowcount)  # type: ignore[attr-defined]


def awaited(connection: sa.Connection) -> list[tuple[Parked, Sequence[str]]]:
    """Return what parked events wait for that has a connection by now, with its id, or two."""
    query = sa.select(col(WebhookEvent.provider), col(WebhookEvent.account_id), col(WebhookEvent.source_id))
    rows = connection.execute(query.where(*_PARKED, col(WebhookEvent.account_id).is_not(None)).distinct())
    parked: list[Parked] = [(provider, str(account_id), source_id) for provider, account_id, source_id in rows]
    within = _integrations(connection, {one[2] for one in parked if one[2] is not None})
    pairs: list[tuple[Parked, Sequence[str]]] = []
    for start in range(0, len(parked), MOST_RELEASED):
        some = parked[start : start + MOST_RELEASED]
        keys = [(provider, account_id, within.get(source_id or "")) for provider, account_id, source_id in some]
        pairs += [(one, ids) for one, ids in zip(some, connections_of(connection, keys), strict=True) if ids]
    return pairs


def _integrations(connection: sa.Connection, source_ids: Collection[str]) -> dict[str, str | None]:
    query = sa.select(col(WebhookSource.id), col(WebhookSource.config)).where(col(WebhookSource.id).in_(source_ids))
    return {source_id: config.get("integration") for source_id, config in connection.execute(query)}


def release_awaited(session: Session, matched: Sequence[tuple[Parked, Sequence[str]]]) -> int:
    """Let these parked events go, each to its connection where it is the only one; return how many."""
    count = 0
    for (provider, account_id, source_id), ids in matched:
        mine = [col(WebhookEvent.provider) == provider, col(WebhookEvent.account_id) == account_id]
        mine.append(col(WebhookEvent.source_id) == source_id)
        owner = ids[0] if len(ids) == 1 else None
        freed = sa.update(WebhookEvent).where(*_PARKED, *mine).values(parked=False, connection_id=owner)
        count += int(session.execute(freed).rowcount)  # type: ignore[attr-defined]
    return count
