"""Keys that are replaced step by step, replicas that say which they have, revocations in bulk, an audit that may be cut."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand only: the previous version of the code keeps working on this schema."""
    _new_columns()
    _replicas_and_rotations()
    _revocations()
    op.create_table(
        "audit_floor",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("number", _count(), nullable=False),
        sa.Column("chain", sa.String(), nullable=False),
        sa.Column("mac", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("cut_at", sa.Float(53), nullable=False),
    )


def _new_columns() -> None:
    # "rebound_at" stays unknown: an integration of before counts as moved until its next rebind
    for column in ("endpoints_changed_at", "rebound_at"):
        op.add_column("integrations", sa.Column(column, sa.Float(53), nullable=True))
    op.add_column("client_secrets", sa.Column("state", sa.String(), nullable=False, server_default="live"))
    op.create_index("ix_sealed_secrets_under", "sealed_secrets", ["key_id", "owner", "version"])
    op.drop_index("ix_sealed_secrets_key_id", table_name="sealed_secrets")
    for column in ("activated_at", "retired_at"):
        op.add_column("data_keys", sa.Column(column, sa.Float(53), nullable=True))
    op.add_column("key_checks", sa.Column("retired_at", sa.Float(53), nullable=True))
    for column in ("activated_at", "retire_at"):
        op.add_column("system_keys", sa.Column(column, sa.Float(53), nullable=True))
    op.execute("UPDATE data_keys SET activated_at = created_at")
    op.execute("UPDATE system_keys SET activated_at = created_at")
    op.add_column("callers", sa.Column("mac", sa.String(), nullable=True))
    op.add_column("caller_keys", sa.Column("warned_at", sa.Float(53), nullable=True))
    op.add_column("caller_keys", sa.Column("mac", sa.String(), nullable=True))


def _replicas_and_rotations() -> None:
    op.create_table(
        "replicas",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("keys", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.Float(53), nullable=False),
        sa.Column("seen_at", sa.Float(53), nullable=False),
    )
    op.create_index("ix_replicas_seen_at", "replicas", ["seen_at"])
    op.create_table(
        "rotations",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("key_class", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("step", sa.String(), nullable=False),
        sa.Column("old_key", sa.String(), nullable=True),
        sa.Column("new_key", sa.String(), nullable=True),
        *(sa.Column(name, _count(), nullable=False) for name in ("total", "done", "failed")),
        sa.Column("position", sa.String(), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("updated_at", sa.Float(53), nullable=False),
        sa.Column("ended_at", sa.Float(53), nullable=True),
        sa.Column("lease_owner", sa.String(), nullable=True),
        sa.Column("lease_expires_at", sa.Float(53), nullable=True),
    )
    op.create_index("ix_rotations_key_class", "rotations", ["key_class"])
    op.create_index("ix_rotations_state", "rotations", ["state"])


def _revocations() -> None:
    op.create_table(
        "revocations",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("selector", sa.JSON(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        *(sa.Column(name, _count(), nullable=False) for name in ("total", "done", "failed")),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("ended_at", sa.Float(53), nullable=True),
        sa.Column("lease_owner", sa.String(), nullable=True),
        sa.Column("lease_expires_at", sa.Float(53), nullable=True),
    )
    op.create_index("ix_revocations_state", "revocations", ["state"])
    op.create_index("ix_revocations_created_at", "revocations", ["created_at"])
    op.create_table(
        "revocation_results",
        sa.Column("revocation_id", sa.String(), primary_key=True),
        sa.Column("connection_id", sa.String(), primary_key=True),
        sa.Column("status_before", sa.String(), nullable=False),
        sa.Column("status_reason_before", sa.String(), nullable=True),
        sa.Column("result", sa.String(), nullable=False),
        sa.Column("detail", sa.String(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before_at", sa.Float(53), nullable=True),
        sa.Column("at", sa.Float(53), nullable=True),
    )
    op.create_index("ix_revocation_results_open", "revocation_results", ["revocation_id", "result", "connection_id"])


def _count() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")
