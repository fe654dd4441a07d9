"""The first tables: everything of ``broker.models`` at the first version; no column holds a secret in the clear."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # on SQLite an integer key is the row id


def upgrade() -> None:
    """Expand only: the previous version of the code keeps working on this schema."""
    _integrations()
    _client_secrets()
    _sessions()
    _flows()
    _connections()
    _connections_indexes()
    _refresh_leases()
    _refresh_attempts()
    _refresh_journal()
    _sealed_secrets()
    _data_keys()
    _key_checks()
    _system_keys()
    _callers()
    _caller_keys()
    _audit_records()
    _audit_head()
    _audit_checkpoints()
    _idempotent_answers()
    _integration_logs()


def _integrations() -> None:
    op.create_table(
        "integrations",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("provider", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("client_id", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("testing_until", sa.Float(53), nullable=True),
        sa.Column("test_error", sa.String(), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("updated_at", sa.Float(53), nullable=False),
    )


def _client_secrets() -> None:
    op.create_table(
        "client_secrets",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("integration", sa.String(), nullable=False, index=True),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("value_digest", sa.String(), nullable=False),
        sa.Column("last_used_at", sa.Float(53), nullable=True),
        sa.Column("refused_at", sa.Float(53), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )


def _sessions() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("token_digest", sa.String(), nullable=False, index=True),
        sa.Column("cookie_digest", sa.String(), nullable=True),
        sa.Column("caller_id", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("integrations", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("return_to", sa.String(), nullable=True),
        sa.Column("scopes", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("variables", sa.JSON(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("reconnects", sa.String(), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False, index=True),
    )


def _flows() -> None:
    op.create_table(
        "flows",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("integration", sa.String(), nullable=False),
        sa.Column("state_digest", sa.String(), nullable=False, unique=True),
        sa.Column("cookie_name", sa.String(), nullable=False),
        sa.Column("cookie_digest", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=True),
        sa.Column("reconnects", sa.String(), nullable=True),
        sa.Column("return_to", sa.String(), nullable=True),
        sa.Column("redirect_uri", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("variables", sa.JSON(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("consent_forced", sa.Boolean(), nullable=False),
        sa.Column("sealed_verifier", sa.LargeBinary(), nullable=True),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False, index=True),
        sa.Column("consumed_at", sa.Float(53), nullable=True),
        sa.Column("sealed_outcome", sa.LargeBinary(), nullable=True),
        sa.Column("outcome_until", sa.Float(53), nullable=True),
        sa.Column("connection_id", sa.String(), nullable=True, index=True),
        sa.Column("subject", sa.String(), nullable=True),
        sa.Column("confirm_digest", sa.String(), nullable=True),
        sa.Column("confirm_until", sa.Float(53), nullable=True),
        sa.Column("confirm_claimed_at", sa.Float(53), nullable=True),
        sa.Column("confirmed_at", sa.Float(53), nullable=True),
        sa.Column("confirmed_by", sa.String(), nullable=True),
        sa.Column("confirm_body_digest", sa.String(), nullable=True),
        sa.Column("surviving_id", sa.String(), nullable=True),
        sa.Column("burnt_at", sa.Float(53), nullable=True),
    )


def _connections() -> None:
    op.create_table(
        "connections",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("integration", sa.String(), nullable=False),
        sa.Column("provider", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=True),
        sa.Column("account_id", sa.String(), nullable=True),
        sa.Column("account_name", sa.String(), nullable=True),
        sa.Column("account_email", sa.String(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("status_reason", sa.String(), nullable=True),
        sa.Column("credential_type", sa.String(), nullable=False),
        sa.Column("client_id", sa.String(), nullable=False),
        sa.Column("pins", sa.JSON(), nullable=False),
        sa.Column("variables", sa.JSON(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("missing_scopes", sa.JSON(), nullable=False),
        sa.Column("secret_version", sa.Integer(), nullable=False),
        sa.Column("refreshable", sa.Boolean(), nullable=False),
        sa.Column("token_expires_at", sa.Float(53), nullable=True, index=True),
        sa.Column("refresh_expires_at", sa.Float(53), nullable=True),
        sa.Column("refreshed_at", sa.Float(53), nullable=True),
        sa.Column("refresh_failures", sa.Integer(), nullable=False),
        sa.Column("refresh_not_before_at", sa.Float(53), nullable=True),
        sa.Column("unknown_outcomes", sa.Integer(), nullable=False),
        sa.Column("last_used_at", sa.Float(53), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("flow_id", sa.String(), nullable=True),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("pending_until", sa.Float(53), nullable=True, index=True),
        sa.Column("revoke_on_delete", sa.Boolean(), nullable=False),
        sa.Column("deleted_at", sa.Float(53), nullable=True),
    )


def _connections_indexes() -> None:
    live = sa.text("deleted_at IS NULL")
    op.create_index(
        "ix_connections_created", "connections", ["created_at", "id"], sqlite_where=live, postgresql_where=live
    )
    gone = sa.text("deleted_at IS NOT NULL")
    op.create_index(
        "ix_connections_deleted_at", "connections", ["deleted_at"], sqlite_where=gone, postgresql_where=gone
    )
    for name in ("integration", "subject", "status"):
        op.create_index(f"ix_connections_{name}", "connections", [name, "created_at", "id"])
    where = sa.text("status <> 'pending' AND deleted_at IS NULL")
    op.create_index(
        "uq_connections_account",
        "connections",
        ["integration", "subject", "account_id"],
        unique=True,
        sqlite_where=where,
        postgresql_where=where,
    )


def _refresh_leases() -> None:
    op.create_table(
        "refresh_leases",
        sa.Column("connection_id", sa.String(), primary_key=True),
        sa.Column("owner", sa.String(), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
    )


def _refresh_attempts() -> None:
    op.create_table(
        "refresh_attempts",
        sa.Column("connection_id", sa.String(), primary_key=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("token_digest", sa.String(), nullable=False),
        sa.Column("sent_at", sa.Float(53), nullable=False),
    )


def _refresh_journal() -> None:
    op.create_table(
        "refresh_journal",
        sa.Column("connection_id", sa.String(), primary_key=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("token_digest", sa.String(), nullable=False),
        sa.Column("sealed_answer", sa.LargeBinary(), nullable=False),
        sa.Column("received_at", sa.Float(53), nullable=False),
    )


def _sealed_secrets() -> None:
    op.create_table(
        "sealed_secrets",
        sa.Column("owner", sa.String(), primary_key=True),
        sa.Column("version", sa.Integer(), primary_key=True),
        sa.Column("key_id", sa.String(), nullable=False, index=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )


def _data_keys() -> None:
    op.create_table(
        "data_keys",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("wrapped_by", sa.String(), nullable=False, index=True),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.Column("current", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )


def _key_checks() -> None:
    op.create_table(
        "key_checks",
        sa.Column("key_id", sa.String(), primary_key=True),
        sa.Column("check_value", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )


def _system_keys() -> None:
    op.create_table(
        "system_keys",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("purpose", sa.String(), nullable=False, index=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("sealed_key", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
    where = sa.text("state = 'current'")
    op.create_index(
        "uq_system_keys_current", "system_keys", ["purpose"], unique=True, sqlite_where=where, postgresql_where=where
    )


def _callers() -> None:
    op.create_table(
        "callers",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("roles", sa.JSON(), nullable=False),
        sa.Column("grants", sa.JSON(), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )


def _caller_keys() -> None:
    op.create_table(
        "caller_keys",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("caller_id", sa.String(), nullable=False, index=True),
        sa.Column("key_digest", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("last_used_at", sa.Float(53), nullable=True),
        sa.Column("expires_at", sa.Float(53), nullable=True),
        sa.Column("revoked_at", sa.Float(53), nullable=True),
    )


def _audit_records() -> None:
    op.create_table(
        "audit_records",
        sa.Column("number", COUNT, primary_key=True, autoincrement=False),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("at", sa.Float(53), nullable=False, index=True),
        sa.Column("action", sa.String(), nullable=False, index=True),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False, index=True),
        sa.Column("connection_id", sa.String(), nullable=True, index=True),
        sa.Column("integration", sa.String(), nullable=True, index=True),
        sa.Column("subject", sa.String(), nullable=True, index=True),
        sa.Column("subject_digest", sa.String(), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("chain", sa.String(), nullable=False),
    )


def _audit_head() -> None:
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("count", COUNT, nullable=False),
        sa.Column("chain", sa.String(), nullable=False),
        sa.Column("mac", sa.String(), nullable=False),
    )


def _audit_checkpoints() -> None:
    op.create_table(
        "audit_checkpoints",
        sa.Column("count", COUNT, primary_key=True, autoincrement=False),
        sa.Column("chain", sa.String(), nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("signature", sa.String(), nullable=False),
    )


def _idempotent_answers() -> None:
    op.create_table(
        "idempotent_answers",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("caller_id", sa.String(), nullable=False),
        sa.Column("key_digest", sa.String(), nullable=False),
        sa.Column("request_digest", sa.String(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("made_id", sa.String(), nullable=True),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False, index=True),
        sa.UniqueConstraint("caller_id", "key_digest"),
    )


def _integration_logs() -> None:
    op.create_table(
        "integration_logs",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("integration", sa.String(), nullable=False, index=True),
        sa.Column("at", sa.Float(53), nullable=False, index=True),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("duration_ms", sa.Float(53), nullable=True),
    )
