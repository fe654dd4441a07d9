"""How long each class of keys has had its current one: for the metrics and the doctor."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.database import now
from broker.models import ClientSecret, DataKey, KeyCheck, SystemKey

CLIENT_SECRETS: Final = "client-secrets"


def key_ages(session: Session) -> dict[str, float]:
    """Return, by class, for how many seconds its current key has been in use; a class without one is left out.

    ``encryption``: since the key that wraps the current data key was first seen. ``client-secrets``: of the integration whose
    newest client secret is the oldest. Reads a few rows, but for one of each client secret.
    """
    began = {**_encryption(session), **_data(session), **_system(session), **_client_secrets(session)}
    at = now(session)
    return {name: max(0.0, at - since) for name, since in sorted(began.items())}


def _encryption(session: Session) -> dict[str, float]:
    wrapping = select(DataKey.wrapped_by).where(col(DataKey.current))
    query = select(KeyCheck.created_at).where(col(KeyCheck.key_id).in_(wrapping))
    found = list(session.exec(query))
    return {"encryption": min(found)} if found else {}


def _data(session: Session) -> dict[str, float]:
    rows = session.exec(select(DataKey).where(col(DataKey.current), col(DataKey.retired_at).is_(None)))
    found = [row.activated_at or row.created_at for row in rows]
    return {"data": min(found)} if found else {}


def _system(session: Session) -> dict[str, float]:
    rows = session.exec(select(SystemKey).where(SystemKey.state == "current"))
    return {row.purpose: row.activated_at or row.created_at for row in rows}


def _client_secrets(session: Session) -> dict[str, float]:
    newest = sa.func.max(col(ClientSecret.created_at)).label("newest")
    each = sa.select(newest).group_by(col(ClientSecret.integration)).subquery()
    oldest = session.execute(sa.select(sa.func.min(each.c.newest))).scalar_one()
    return {} if oldest is None else {CLIENT_SECRETS: oldest}
