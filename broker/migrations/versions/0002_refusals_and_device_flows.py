"""Refusals that wait to be confirmed, device flows, and an audit whose records cost less to write."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand only: the previous version of the code keeps working on this schema."""
    op.add_column("connections", sa.Column("refusals", sa.Integer(), nullable=False, server_default="0"))
    op.create_table(
        "device_flows",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("flow_id", sa.String(), nullable=False),
        sa.Column("integration", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("status_reason", sa.String(), nullable=True),
        sa.Column("sealed_device_code", sa.LargeBinary(), nullable=True),
        sa.Column("user_code", sa.String(), nullable=False),
        sa.Column("verification_uri", sa.String(), nullable=False),
        sa.Column("verification_uri_complete", sa.String(), nullable=True),
        sa.Column("interval_seconds", sa.Float(53), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("poll_at", sa.Float(53), nullable=False),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
        sa.Column("connection_id", sa.String(), nullable=True),
    )
    op.create_index("ix_device_flows_status", "device_flows", ["status"])
    op.create_index("ix_device_flows_poll_at", "device_flows", ["poll_at"])
    # Kept in order for every hand-out, they cost more than its record; searches walk the records from the newest on.
    for column in ("at", "action", "actor", "connection_id", "integration", "subject"):
        op.drop_index(f"ix_audit_records_{column}", "audit_records")
    not_handed_out = sa.text("action <> 'connection.token'")
    op.create_index(
        "ix_audit_records_rare",
        "audit_records",
        ["action", "number"],
        sqlite_where=not_handed_out,
        postgresql_where=not_handed_out,
    )
