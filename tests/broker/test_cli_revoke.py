"""`broker revoke` on a database of its own, without a broker that runs."""

from __future__ import annotations

import json
from pathlib import Path

import sqlalchemy as sa
from sqlmodel import Session

from broker.models import Connection, Integration
from tests.commands import Done, broker


def test_the_command_freezes_lifts_and_revokes_and_asks_first(tmp_path: Path, sqlite_template: bytes) -> None:
    (tmp_path / "broker.db").write_bytes(sqlite_template)
    variables = {
        "BROKER_ENV": "development",
        "BROKER_DATA_DIR": str(tmp_path),
        "BROKER_DATABASE_URL": f"sqlite:///{tmp_path / 'broker.db'}",
    }

    def revoke(*arguments: str) -> Done:
        return broker("revoke", *arguments, place=tmp_path, **variables)

    put_connections(tmp_path / "broker.db", "con_a", "con_b")
    counted = revoke("--action", "freeze", "--integration", "sandbox", "--dry-run", "--json")
    assert json.loads(counted.out)["total"] == 2, counted.err
    unasked = revoke("--action", "freeze", "--subject", "con_a", "--reason", "x")
    assert (unasked.status, "--yes" in unasked.err) == (1, True)
    frozen = json.loads(revoke("--action", "freeze", "--subject", "con_a", "--reason", "x", "--yes", "--json").out)
    assert (frozen["state"], frozen["counts"]) == ("done", {"frozen": 1})
    lifted = json.loads(revoke("lift", frozen["id"], "--json").out)
    assert lifted["state"] == "lifted"
    ended = revoke("--action", "revoke", "--all", "--reason", "x", "--yes")
    assert ended.status == 0, ended.err
    assert "unsupported" in ended.out
    assert revoke("--action", "revoke", "--reason", "x", "--yes").status == 1, "an empty selector"
    assert revoke("--action", "revoke", "--all", "--subject", "x", "--reason", "x", "--yes").status == 1
    assert revoke("--action", "delete", "--all", "--reason", "x").status == 2
    assert revoke("--all").status == 2


def put_connections(path: Path, *ids: str) -> None:
    """Write connections with a key that no provider can revoke."""
    rows = [
        Connection(
            id=one,
            integration="sandbox",
            provider="oidc",
            subject=one,
            status="active",
            credential_type="api_key",
            secret_version=1,
            created_at=1.0,
        )
        for one in ids
    ]
    integration = Integration(name="sandbox", provider="oidc", client_id="x", created_at=1.0, updated_at=1.0)
    integration.config = {"issuer": "https://id.example.com", "token_url": "https://id.example.com/token"}
    with sa.create_engine(f"sqlite:///{path}").connect() as connection, Session(connection) as session:
        session.add_all([*rows, integration])
        session.flush()
        connection.commit()
