"""Makes verified events durable: raw bytes, what was proven, what tells their twins, and their deliveries, in one transaction.

``keep`` returns only after the commit, so an acknowledgement never tells of something that may still be lost.
"""

from __future__ import annotations

import functools
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import msgspec

from broker.database import Database, GroupWriter, SqliteDatabase
from broker.errors import DatabaseUnavailable
from broker.models import new_ordered_ids
from broker.vault.floor import KeyRetired
from broker.vault.keyring import Sealer
from broker.webhooks.attributing import Attribution
from broker.webhooks.configured import Source
from broker.webhooks.fanning_out import ToFanOut
from broker.webhooks.matching import EventBody
from broker.webhooks.receivers import Rules
from broker.webhooks.storing import TRIES, Arrived, Columns, Stored, store, store_plainly
from providers.spec import Received, Verified

SEALED_PURPOSE: Final = "event"
SEALED_VERSION: Final = 1
STORE_SECONDS: Final = 10.0  # longer than the database waits for a lock; providers wait 10 s or more for an answer
LARGEST_GROUP: Final = 128
DAY_SECONDS: Final = 86_400.0
# A copy with a signed time is refused once its window is over; what comes later is a provider's own retry, and no provider
# tries for longer than this. Without a time that is judged, a copy is good for ever.
SEEN_SECONDS_FRESH: Final = 30 * DAY_SECONDS
SEEN_SECONDS: Final = 400 * DAY_SECONDS
LONGEST_CONTENT_TYPE: Final = 255
# Fields that belong to the connection or to proxies on the way, and those whose names say that they hold a credential.
NOT_KEPT: Final = re.compile(
    rb"host|connection|keep-alive|te|trailer|transfer-encoding|upgrade|expect|content-length|via|forwarded|x-forwarded-.*"
    rb"|x-real-ip|proxy-.*|.*(?:auth|cookie|token|secret|signature|password|credential|api-?key|session).*"
)


Attribute = Callable[[Source, Received, Verified], Awaitable[Attribution]]


async def of_source(source: Source, received: Received, verified: Verified) -> Attribution:
    """Return the connection that the source belongs to, if it does to one: what is known without looking into the event."""
    del received, verified
    return Attribution(source.connection_id)


class Inbox:
    """Stores events of all sources, in groups. One for a process; calls may run at once."""

    def __init__(
        self,
        database: Database,
        sealer: Sealer,
        rules: Rules,
        *,
        attribute: Attribute = of_source,
        on_stored: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Keep the parts. ``attribute``: says whose an event is, by its type too. ``clock``: what new ids sort by.

        ``on_stored``: called after a commit that made deliveries.
        """
        self._database = database
        self._sqlite = database if isinstance(database, SqliteDatabase) else None
        self._sealer = sealer
        self._rules = rules
        self._attribute = attribute
        self._on_stored = on_stored
        self._clock = clock
        self._writer: GroupWriter[Arrived, Stored] = GroupWriter(
            database,
            partial(store, rules=rules),
            largest=LARGEST_GROUP,
            patience_seconds=STORE_SECONDS,
            shortcut=None if self._sqlite is None else self._store_plainly,
        )

    async def keep(self, source: Source, received: Received, verified: Verified) -> Stored:
        """Store an event and return what became of it, once that is committed; a twin of a stored one is not stored.

        Raises DatabaseUnavailable when it could not be made durable in time (it may still be, and the sender's next try is
        then its twin), SecretStoreUnavailable when its body could not be sealed.
        """
        body = EventBody(received.body, content_type_of(received))
        attribution = await self._attribute(source, received, verified)
        arrived = self._arrived(source, received, verified, body, attribution)
        try:
            stored = await self._stored(arrived)
        except KeyRetired:  # this process did not know yet
            await self._sealer.refresh(self._database)
            stored = await self._stored(self._arrived(source, received, verified, body, attribution))
        if stored.deliveries:
            self._on_stored()
        return stored

    async def _stored(self, arrived: Arrived) -> Stored:
        try:
            return await self._writer.submit(arrived)
        except TimeoutError:
            raise DatabaseUnavailable from None

    def _arrived(
        self, source: Source, received: Received, verified: Verified, body: EventBody, attribution: Attribution
    ) -> Arrived:
        event_id = new_ordered_ids("evt", 1, self._clock())[0]
        sealed, sealed_under = None, None
        if source.seal:
            sealed = self._sealer.seal(received.body, owner=event_id, purpose=SEALED_PURPOSE, version=SEALED_VERSION)
            sealed_under = Sealer.key_id_of(sealed)
        columns = Columns(
            id=event_id,
            type=verified.event_type,
            source_id=source.id,
            provider=source.provider,
            connection_id=attribution.connection_id,
            account_id=attribution.account_id,
            parked=attribution.parked,
            provider_event_id=verified.delivery_id,
            verdict=_verdict(source, verified),
            content_type=content_type_of(received),
            headers=kept_headers(received, source.webhook.scheme.carries),
            size=len(received.body),
            sealed_body=sealed,
            body=None if source.seal else received.body,
        )
        return Arrived(
            columns,
            ToFanOut(event_id, verified.event_type, source.id, body),
            seen_as(source, verified),
            sealed_under,
            waits=attribution.parked or attribution.lifecycle,
        )

    async def _store_plainly(self, arrived: Sequence[Arrived]) -> Sequence[Stored]:
        """Store a group on SQLite's own connection; where the rules changed they are read first."""
        if self._sqlite is None:
            raise DatabaseUnavailable
        for _ in range(TRIES):
            work = partial(store_plainly, arrived=arrived, rules=self._rules)
            stored = await self._sqlite.plain_transaction(work)
            if stored is not None:
                return stored
            await self._sqlite.read(self._rules.current)
        raise DatabaseUnavailable("Subscriptions change too often to store an event now")

    async def aclose(self) -> None:
        """Store what is still waiting, then return."""
        await self._writer.aclose()


# --- What of a request is kept: pure.


def seen_as(source: Source, verified: Verified) -> list[tuple[str, float]]:
    """Return what tells an event's twins, each with the seconds for which that is kept; nothing that a sender may choose.

    A signed delivery id, by its SHA-256; and the digest of the signed bytes.
    """
    window = (
        source.tolerance_seconds if source.tolerance_seconds is not None else source.webhook.scheme.tolerance_seconds
    )
    # A time may lie ahead by a window, and is good for one more.
    seconds = SEEN_SECONDS_FRESH + 2 * window if verified.fresh and window is not None else SEEN_SECONDS
    seen = []
    if verified.delivery_id_signed and verified.delivery_id is not None:
        seen.append((f"id:{hashlib.sha256(verified.delivery_id.encode()).hexdigest()}", seconds))
    if verified.signed_digest is not None:
        seen.append((f"bytes:{verified.signed_digest.hex()}", seconds))
    return seen


def kept_headers(received: Received, carries: Sequence[str]) -> str:
    """Return the fields that are kept, in order, as a JSON list of [name, value]; no credential, signature or cookie."""
    own = frozenset(name.encode() for name in carries)
    kept = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in received.headers
        if name not in own and _is_kept(name)
    ]
    return msgspec.json.encode(kept).decode()


@functools.lru_cache(maxsize=1024)
def _is_kept(name: bytes) -> bool:
    return NOT_KEPT.fullmatch(name) is None


def content_type_of(received: Received) -> str | None:
    """Return the first Content-Type, None where there is none or an absurd one."""
    for name, value in received.headers:
        if name == b"content-type":
            return value.decode("latin-1") if len(value) <= LONGEST_CONTENT_TYPE else None
    return None


def _verdict(source: Source, verified: Verified) -> str:
    """Return what was proven, as JSON."""
    index = verified.secret_index
    said = {
        "covers": _sorted(verified.covers),
        "event_type_signed": verified.event_type_signed,
        "delivery_id_signed": verified.delivery_id_signed,
        "secret_id": None if index is None else source.secrets[index].id,
        "signed_at": verified.signed_at,
        "fresh": verified.fresh,
    }
    return msgspec.json.encode(said).decode()


@functools.lru_cache(maxsize=256)
def _sorted(covers: frozenset[str]) -> tuple[str, ...]:
    return tuple(sorted(covers))
