"""Which connection an event belongs to, by the account that it names; and the events that wait for one.

An account that one connection has is that connection's. Where several have it, such as two subjects who connected the same
shop, the event is nobody's: it keeps the account's id, and whoever may see events of no connection sees it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlmodel import Session, col

from broker.database import Database, GroupReader
from broker.models import Connection, WebhookEvent
from broker.webhooks.configured import Source
from providers.spec import Received
from providers.webhook_accounts import account_of, ended_by
from providers.webhook_places import Body

BELIEVED_SECONDS: Final = 2.0
MOST_KEPT: Final = 10_000
MOST_RELEASED: Final = 200  # accounts at once
LIVE: Final = (col(Connection.status).not_in(("pending", "revoked")), col(Connection.deleted_at).is_(None))
Key = tuple[str, str]  # a provider, and an account's id there


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

    async def of(self, source: Source, received: Received, event_type: str) -> Attribution:
        """Return whose a verified event is. A source that names its connection has the last word (DatabaseUnavailable)."""
        webhook = source.webhook
        if not webhook.account and not webhook.lifecycle:
            return NOBODYS if source.connection_id is None else Attribution(source.connection_id)
        body = Body(received.body)
        account_id = account_of(webhook, received, body)
        ended = ended_by(webhook, event_type, received, body)
        if account_id is None and ended is not None and len(ended.accounts) == 1:
            account_id = ended.accounts[0]
        if source.connection_id is not None or account_id is None:
            return Attribution(source.connection_id, account_id, lifecycle=ended is not None)
        found = await self._known((source.provider, account_id))
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
        columns = (col(Connection.provider), col(Connection.account_id))
        one = sa.func.min(col(Connection.id))
        query = sa.select(*columns, one, sa.func.max(col(Connection.id))).where(sa.tuple_(*columns).in_(exact), *LIVE)
        for provider, account_id, first, last in connection.execute(query.group_by(*columns)):
            found[provider, str(account_id)] = (first,) if first == last else (first, last)
    return [found.get(key, ()) for key in keys]


def _beginning_so(connection: sa.Connection, key: Key) -> Sequence[str]:
    query = sa.select(col(Connection.id)).where(col(Connection.provider) == key[0], account_is(key[1]), *LIVE)
    return tuple(connection.execute(query.limit(2)).scalars())


def account_is(account_id: str) -> sa.ColumnElement[bool]:
    """Return the condition that a connection is of this account, or of one that begins so (``*`` at the end)."""
    if not account_id.endswith("*"):
        return col(Connection.account_id) == account_id
    begin = account_id[:-1]
    return sa.func.substr(col(Connection.account_id), 1, len(begin)) == begin  # no collation has a say in it


# Parked events


_PARKED: Final = (col(WebhookEvent.number).is_(None), col(WebhookEvent.parked) == sa.true())


def release(session: Session, event_ids: Sequence[str]) -> int:
    """Let parked events go, whoever they belong to, in the caller's transaction; return how many. The worker sends them."""
    freed = sa.update(WebhookEvent).where(col(WebhookEvent.id).in_(event_ids), *_PARKED).values(parked=False)
    return int(session.execute(freed).rowcount)  # type: ignore[attr-defined]


def awaited(connection: sa.Connection) -> list[tuple[Key, Sequence[str]]]:
    """Return the accounts that parked events wait for and that have a connection by now, with its id, or two."""
    query = sa.select(col(WebhookEvent.provider), col(WebhookEvent.account_id)).where(
        *_PARKED, col(WebhookEvent.account_id).is_not(None)
    )
    keys: list[Key] = [(provider, str(account_id)) for provider, account_id in connection.execute(query.distinct())]
    pairs: list[tuple[Key, Sequence[str]]] = []
    for start in range(0, len(keys), MOST_RELEASED):
        some = keys[start : start + MOST_RELEASED]
        pairs += [(key, ids) for key, ids in zip(some, connections_of(connection, some), strict=True) if ids]
    return pairs


def release_awaited(session: Session, matched: Sequence[tuple[Key, Sequence[str]]]) -> int:
    """Let the parked events of these accounts go, each to its connection where it is the only one; return how many."""
    count = 0
    for (provider, account_id), ids in matched:
        mine = (col(WebhookEvent.provider) == provider, col(WebhookEvent.account_id) == account_id)
        owner = ids[0] if len(ids) == 1 else None
        freed = sa.update(WebhookEvent).where(*_PARKED, *mine).values(parked=False, connection_id=owner)
        count += int(session.execute(freed).rowcount)  # type: ignore[attr-defined]
    return count
