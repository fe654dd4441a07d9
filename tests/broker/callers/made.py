"""Callers as the broker opens them, over a test's database, with keys and clocks of the test's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlmodel import Session, select

from broker.audit import Audit
from broker.callers import Callers, CertificateHeader
from broker.callers.exchange import Exchange
from broker.callers.issuers import Issuers
from broker.callers.rows import RowMacs, open_rows
from broker.callers.standing import Standing
from broker.callers.tokens import Tokens
from broker.callers.trust import Issuer, Trust
from broker.database import Database, PostgresDatabase, SqliteDatabase
from broker.egress import Egress
from broker.models import Caller, CallerKey
from broker.vault.keyring import KeyEncryptionKey, Keyring, Sealer, open_sealer
from broker.vault.system_keys import SystemKeys

T = TypeVar("T")
PUBLIC_URL = "https://broker.test"
AnyDatabase = SqliteDatabase | PostgresDatabase


def no_egress(issuer: Issuer) -> Egress:
    """Refuse to make a client: the test has no issuer."""
    raise AssertionError(issuer)


async def sealer_of(database: Database) -> Sealer:
    """Return the sealer of a test's database; every call opens the same keys."""
    return await open_sealer(database, Keyring([KeyEncryptionKey("k1", bytes(range(32)))]))


async def row_macs(database: Database, audit: Audit) -> RowMacs:
    """Return what signs the rows, as a process makes it when it starts."""
    return RowMacs(await open_rows(database, await sealer_of(database), audit))


async def made_callers(
    database: Database,
    audit: Audit,
    *,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
    trust: Trust | None = None,
    egress_of: Callable[[Issuer], Egress] = no_egress,
    certificates: CertificateHeader | None = None,
    seconds: int = 900,
    over: Database | None = None,
    on_forgery: Callable[[], None] | None = None,
) -> Callers:
    """Return one replica's callers; they ask ``over`` instead of the database, where it is given."""
    trust = trust or Trust()
    rows = await row_macs(database, audit)
    signing = SystemKeys(database, await sealer_of(database), "jwt-signing")
    await signing.load()
    standing = Standing(rows, trust, on_forgery=on_forgery)
    issuers = Issuers(trust, egress_of, clock=clock)
    exchange = Exchange(signing, issuer=PUBLIC_URL, seconds=seconds)
    tokens = Tokens(over or database, audit, standing, issuers, exchange, wall_clock=wall_clock)
    return Callers(over or database, audit, rows, standing, tokens, certificates=certificates, clock=clock)


async def resigned(database: Database, audit: Audit, statement: sa.Update) -> None:
    """Change rows of callers as a broker would: with MACs that fit."""
    macs = await row_macs(database, audit)

    def work(session: Session) -> None:
        session.execute(statement)
        session.expire_all()
        rows: Sequence[Any] = [*session.exec(select(Caller)), *session.exec(select(CallerKey))]
        for row in rows:
            macs.sign(row)
            session.add(row)

    await database.transaction(work)
