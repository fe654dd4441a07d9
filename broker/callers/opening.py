"""Makes the parts of ``callers`` out of the settings, the database and the keys, and closes them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from broker.audit import Audit
from broker.callers import Callers, CertificateHeader
from broker.callers.exchange import Exchange
from broker.callers.issuers import open_issuers
from broker.callers.rows import RowMacs, open_rows
from broker.callers.standing import Standing
from broker.callers.tokens import Tokens
from broker.callers.trust import load_trust
from broker.callers.upkeep import Upkeep
from broker.database import Database
from broker.egress import Egress
from broker.settings import Settings
from broker.telemetry import Metrics
from broker.vault.keyring import Sealer
from broker.vault.system_keys import SystemKeys


@dataclass(frozen=True, slots=True)
class CallerParts:
    """The callers, the worker's part, and the keys of rows, which every process has to read again while it runs."""

    callers: Callers
    upkeep: Upkeep
    row_keys: SystemKeys


@contextlib.asynccontextmanager
async def open_callers(
    settings: Settings,
    database: Database,
    sealer: Sealer,
    signing_keys: SystemKeys,
    audit: Audit,
    egress: Egress,
    metrics: Metrics,
) -> AsyncIterator[CallerParts]:
    """Open the parts; close them before ``egress`` and the database. ``signing_keys``: of ``jwt-signing``, loaded.

    Raises SettingsError for a wrong ``BROKER_TRUSTED_ISSUERS_FILE``, and what ``open_rows`` raises.
    """
    trust = load_trust(settings)
    row_keys = await open_rows(database, sealer, audit)
    rows = RowMacs(row_keys)
    standing = Standing(rows, trust, on_forgery=metrics.caller_row_forged)
    issuers, own_egress = open_issuers(trust, settings, egress)
    exchange = Exchange(signing_keys, issuer=settings.public_url, seconds=settings.token_exchange_seconds)
    tokens = Tokens(database, audit, standing, issuers, exchange)
    callers = Callers(database, audit, rows, standing, tokens, certificates=_certificates(settings))
    upkeep = Upkeep(
        database, audit, rows, on_next_end=metrics.caller_key_ends, retention_days=settings.audit_retention_days
    )
    try:
        yield CallerParts(callers, upkeep, row_keys)
    finally:
        await callers.aclose()
        for one in own_egress:
            await one.aclose()


def _certificates(settings: Settings) -> CertificateHeader | None:
    if settings.mtls_header is None:
        return None
    return CertificateHeader(settings.mtls_header.encode(), settings.trusted_proxies)
