"""Where a kill fell, by what is durable: the rows that the dead left, the sandbox's log, and one that the database keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlmodel import Session

from broker.audit import Audit
from broker.credentials import sha256_hex
from broker.database import Database
from broker.demo.sandbox import SandboxState, Visit

Event = Literal["claim", "attempt", "journal", "store"]
EVENTS: Sequence[Event] = ("claim", "attempt", "journal", "store")

Stage = Literal[
    "idle",
    "claim → attempt",
    "attempt → send",
    "send → commit",
    "commit → journal",
    "journal → vault",
    "vault → row",
    "row → release",
    "failure → release",
]
SEND_TO_JOURNAL: frozenset[Stage] = frozenset({"send → commit", "commit → journal"})

# The database notes each claim, attempt, journal entry and new version in the transaction that makes it, so that the log
# holds what was committed and nothing else.
_NOTED: Mapping[Event, tuple[str, str, str]] = {  # the table, when, and (connection, fence, owner, digest, at)
    "claim": ("refresh_leases", "NEW.owner IS NOT NULL", "NEW.connection_id, NEW.fence, NEW.owner, NULL, NULL"),
    "attempt": ("refresh_attempts", "TRUE", "NEW.connection_id, NEW.fence, NULL, NEW.token_digest, NEW.sent_at"),
    "journal": ("refresh_journal", "TRUE", "NEW.connection_id, NEW.fence, NULL, NEW.token_digest, NEW.received_at"),
    "store": ("connections", "TRUE", "NEW.id, NULL, NULL, NULL, NULL"),
}
_CHANGED = {
    "claim": "NEW.fence <> OLD.fence",
    "attempt": "NEW.fence <> OLD.fence",
    "journal": "NEW.fence <> OLD.fence",
    "store": "NEW.secret_version <> OLD.secret_version",
}
_LOG = """CREATE TABLE crash_log (number {serial}, event TEXT NOT NULL, connection_id TEXT NOT NULL, fence INTEGER,
 owner TEXT, token_digest TEXT, at DOUBLE PRECISION)"""
_INSERT = "INSERT INTO crash_log (event, connection_id, fence, owner, token_digest, at) VALUES ('{event}', {values});"


async def keep_log(database: Database) -> None:
    """Let the database log what happens to refreshes from now on; for a database of this test's own."""
    statements = list(_sqlite_log() if database.dialect == "sqlite" else _postgresql_log())

    def work(session: Session) -> None:
        for statement in statements:
            session.connection().exec_driver_sql(statement)

    await database.transaction(work)


def _sqlite_log() -> Sequence[str]:
    statements = [_LOG.format(serial="INTEGER PRIMARY KEY AUTOINCREMENT")]
    for event, (table, when, values) in _NOTED.items():
        act = f"BEGIN {_INSERT.format(event=event, values=values)} END"
        head = f"CREATE TRIGGER crash_{event}"
        if event != "store":
            statements.append(f"{head}_made AFTER INSERT ON {table} WHEN {when} {act}")
        statements.append(f"{head} AFTER UPDATE ON {table} WHEN {when} AND {_CHANGED[event]} {act}")
    return statements


def _postgresql_log() -> Sequence[str]:
    statements = [_LOG.format(serial="BIGINT PRIMARY KEY GENERATED ALWAYS AS IDENTITY")]
    for event, (table, when, values) in _NOTED.items():
        body = f"BEGIN {_INSERT.format(event=event, values=values)} RETURN NULL; END"
        statements.append(f"CREATE FUNCTION crash_{event}() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")
        act = f"FOR EACH ROW WHEN ({{}}) EXECUTE FUNCTION crash_{event}()"
        if event != "store":
            statements.append(f"CREATE TRIGGER crash_{event}_made AFTER INSERT ON {table} {act.format(when)}")
        both = f"{when} AND {_CHANGED[event]}"
        statements.append(f"CREATE TRIGGER crash_{event} AFTER UPDATE ON {table} {act.format(both)}")
    return statements


@dataclass(frozen=True)
class Noted:
    """One line of the database's own log."""

    number: int
    event: Event
    connection_id: str
    fence: int | None
    owner: str | None
    token_digest: str | None
    at: float | None


async def noted(database: Database, *, after: int = 0) -> list[Noted]:
    """Return the log's lines after that number."""
    query = sa.text("SELECT * FROM crash_log WHERE number > :after ORDER BY number").bindparams(after=after)
    return await database.read(lambda session: [Noted(*row) for row in session.execute(query)])


@dataclass(frozen=True)
class Held:
    """A lease of the dead and what lies beside it. ``attempt_digest``: of its own attempt; ``stored``: in its time."""

    connection_id: str
    fence: int
    attempt_digest: str | None
    sent_at: float | None
    journalled: bool
    in_vault: bool
    stored: bool
    attempted: bool


_HELD = sa.text(
    """
    SELECT l.connection_id, l.fence, a.token_digest, a.sent_at, j.connection_id IS NOT NULL,
     EXISTS (SELECT 1 FROM sealed_secrets s WHERE s.owner = 'connections/' || c.id AND s.version > c.secret_version),
     EXISTS (SELECT 1 FROM crash_log s WHERE s.event = 'store' AND s.connection_id = c.id AND s.number > claimed.number),
     EXISTS (SELECT 1 FROM crash_log t WHERE t.event = 'attempt' AND t.connection_id = c.id AND t.fence = l.fence)
    FROM refresh_leases l JOIN connections c ON c.id = l.connection_id
    JOIN crash_log claimed ON claimed.event = 'claim' AND claimed.connection_id = c.id AND claimed.fence = l.fence
    LEFT JOIN refresh_attempts a ON a.connection_id = c.id AND a.fence = l.fence
    LEFT JOIN refresh_journal j ON j.connection_id = c.id
    WHERE l.owner = :owner
    """
)


async def held_by(database: Database, owner: str) -> list[Held]:
    """Return the leases that a process holds, or held when it died."""
    query = _HELD.bindparams(owner=owner)
    return await database.read(
        lambda session: [Held(*row[:4], *map(bool, row[4:])) for row in session.execute(query)],
    )


def stage_of(held: Held, sent: Sequence[Visit]) -> Stage:
    """Say how far a refresh had come. ``sent``: the visits of the token of its attempt, since it was written (pure)."""
    if held.journalled:
        return "vault → row" if held.in_vault else "journal → vault"
    if held.attempt_digest is None:
        if held.stored:
            return "row → release"
        return "failure → release" if held.attempted else "claim → attempt"
    if not sent:
        return "attempt → send"
    committed = any(visit.outcome == "committed" for visit in sent)
    return "commit → journal" if committed else "send → commit"


class SandboxLog:
    """The sandbox's log, joined with ours by the refresh tokens' digests: theirs are bare, ours are keyed."""

    def __init__(self, state: SandboxState, audit: Audit) -> None:
        self._state = state
        self._audit = audit
        self._read = 0
        self._keyed: dict[str, str] = {}  # bare digest → keyed digest
        self.by_keyed: dict[str, list[Visit]] = defaultdict(list)
        self.by_account: dict[str, list[Visit]] = defaultdict(list)

    def knows(self, refresh_token: str) -> None:
        """Learn how both logs name a token."""
        self._keyed[sha256_hex(refresh_token)] = self._audit.digest(refresh_token)

    def read(self) -> None:
        """Take in what came since."""
        fresh: list[Visit] = []
        for visit in reversed(self._state.visits):
            if visit.number <= self._read:
                break
            fresh.append(visit)
        for visit in reversed(fresh):
            self._read = visit.number
            if visit.grant_type == "refresh_token" and visit.account is not None and visit.presented is not None:
                self._learn(visit)
                self.by_keyed[self._keyed[visit.presented]].append(visit)
                self.by_account[visit.account].append(visit)

    def _learn(self, visit: Visit) -> None:
        """See to it that the visit's token is known: it came in the answer to an earlier one of the account."""
        if visit.presented in self._keyed:
            return
        for earlier in self.by_account[str(visit.account)]:
            successor = self._state.refresh_tokens[str(earlier.presented)].successor
            if successor is not None:
                self.knows(successor["refresh_token"])

    def since(self, keyed_digest: str | None, at: float | None) -> list[Visit]:
        """Return when a token, by its keyed digest, was sent from that time on."""
        self.read()
        return [visit for visit in self.by_keyed.get(keyed_digest or "", ()) if visit.at >= (at or 0)]

    def committed_without_journal(self, log: Sequence[Noted]) -> set[str]:
        """Return the accounts with a refresh that the sandbox committed and whose answer no journal of ours holds.

        A visit is joined with the last attempt before it of the same token, and that with its journal by the fence.
        """
        self.read()
        attempts: dict[str, list[Noted]] = defaultdict(list)
        for one in log:
            if one.event == "attempt":
                attempts[str(one.token_digest)].append(one)
        journalled = {(one.connection_id, one.fence) for one in log if one.event == "journal"}
        found = set()
        for digest, visits in self.by_keyed.items():
            for visit in visits:
                if visit.outcome == "committed":
                    sent = max(
                        (one for one in attempts[digest] if (one.at or 0) <= visit.at), key=lambda one: one.number
                    )
                    found |= set() if (sent.connection_id, sent.fence) in journalled else {str(visit.account)}
        return found
