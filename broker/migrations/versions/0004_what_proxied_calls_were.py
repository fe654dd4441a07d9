"""Figures by the minute and recent lines of proxied calls."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand only: the previous version of the code keeps working on this schema.

    The index of the audit is made in place: on PostgreSQL records wait while it is built (one pass over the table). CREATE
    INDEX CONCURRENTLY cannot be used: the transaction would have to end first, and with it the lock that keeps other
    migrations out; and with a lock of a session it would wait for the snapshot of every process that waits for that lock.
    """
    op.create_table(
        "call_minutes",
        sa.Column("integration", sa.String(), primary_key=True),
        sa.Column("at", _count(), primary_key=True, autoincrement=False),
        sa.Column("part", sa.String(), primary_key=True),
        sa.Column("amount", _count(), nullable=False),
    )
    op.create_table(
        "call_latest",
        sa.Column("integration", sa.String(), primary_key=True),
        sa.Column("last_at", sa.Float(53), nullable=False),
        sa.Column("rate_remaining", sa.BigInteger(), nullable=True),
        sa.Column("rate_at", sa.Float(53), nullable=False),
    )
    op.create_table(
        "call_lines",
        sa.Column("id", _count(), primary_key=True),
        sa.Column("integration", sa.String(), nullable=False),
        sa.Column("at", sa.Float(53), nullable=False, index=True),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("connection_id", sa.String(), nullable=False, index=True),
        *(
            sa.Column(name, sa.String(), nullable=False)
            for name in ("caller_id", "request_id", "method", "host", "path")
        ),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("code", sa.String(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.Float(53), nullable=False) for name in ("upstream_ms", "total_ms")),
        *(sa.Column(name, _count(), nullable=False) for name in ("bytes_out", "bytes_in")),
    )
    op.create_index("ix_call_lines_of", "call_lines", ["integration", "at", "id"])
    # To keep the calls' records in this index too would cost each of them 12 µs.
    op.drop_index("ix_audit_records_rare", "audit_records")
    rare = sa.text("action <> 'connection.token' AND action <> 'connection.proxy'")
    op.create_index(
        "ix_audit_records_rare", "audit_records", ["action", "number"], sqlite_where=rare, postgresql_where=rare
    )


def _count() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")
