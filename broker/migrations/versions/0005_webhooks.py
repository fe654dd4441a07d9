"""Webhooks: sources, subscriptions, events, what was seen, the queue of deliveries, rejections, registrations."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand only: the previous version of the code keeps working on this schema."""
    _configured()
    _events()
    _deliveries()
    _beside()
    op.add_column("connections", sa.Column("granted_at", sa.Float(53), nullable=True))
    op.create_index("ix_connections_account", "connections", ["provider", "account_id"])
    if op.get_bind().dialect.name == "postgresql":
        # What providers post is JSON that PostgreSQL would compress on its way in: more dear than the bytes are.
        op.execute("ALTER TABLE webhook_events ALTER COLUMN body SET STORAGE EXTERNAL")
        op.execute("ALTER TABLE webhook_events ALTER COLUMN sealed_body SET STORAGE EXTERNAL")


def _configured() -> None:
    op.create_table(
        "webhook_state", sa.Column("id", sa.Integer(), primary_key=True), _count("number"), _count("revision")
    )
    op.execute("INSERT INTO webhook_state (id, number, revision) VALUES (1, 0, 0)")
    op.create_table(
        "webhook_sources",
        _id(),
        sa.Column("name", sa.String(), nullable=False, unique=True),
        *(sa.Column(name, sa.String(), nullable=False) for name in ("provider", "kind")),
        sa.Column("connection_id", sa.String(), nullable=True, index=True),
        sa.Column("register_at_provider", sa.Boolean(), nullable=False),
        _time("tolerance_seconds"),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("settings_version", sa.Integer(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=True),
        *(_time(name, nullable=False) for name in ("created_at", "updated_at")),
    )
    op.create_table(
        "webhook_subscriptions",
        _id(),
        *(sa.Column(name, sa.String(), nullable=False) for name in ("url", "description")),
        sa.Column("event_types", sa.JSON(), nullable=False),
        sa.Column("source_id", sa.String(), nullable=True),
        sa.Column("filter", sa.JSON(), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("order_key", sa.String(), nullable=True),
        sa.Column("signature", sa.String(), nullable=False),
        _time("max_per_second"),
        sa.Column("max_concurrent", sa.Integer(), nullable=False),
        _time("timeout_seconds", nullable=False),
        _time("failing_since"),
        *(sa.Column(name, sa.String(), nullable=True) for name in ("disabled_reason", "created_by")),
        *(_time(name, nullable=False) for name in ("created_at", "updated_at")),
    )
    op.create_table(
        "webhook_secrets",
        _id(),
        sa.Column("owner_id", sa.String(), nullable=False, index=True),
        *(sa.Column(name, sa.String(), nullable=False) for name in ("origin", "value_digest")),
        sa.Column("created_by", sa.String(), nullable=True),
        _time("created_at", nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=True, index=True),
        _time("last_used_at"),
    )


def _events() -> None:
    op.create_table(
        "webhook_events",
        _id(),
        sa.Column("number", _integer(), nullable=True, unique=True),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("source_id", sa.String(), nullable=True),
        sa.Column("provider", sa.String(), nullable=False),
        *(sa.Column(name, sa.String(), nullable=True) for name in ("connection_id", "account_id")),
        sa.Column("parked", sa.Boolean(), nullable=False),
        sa.Column("provider_event_id", sa.String(), nullable=True),
        sa.Column("verdict", sa.JSON(), nullable=False),
        _time("received_at", nullable=False),
        sa.Column("content_type", sa.String(), nullable=True),
        sa.Column("headers", sa.JSON(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.LargeBinary(), nullable=True) for name in ("sealed_body", "body")),
    )
    op.create_index("ix_webhook_events_source", "webhook_events", ["source_id", "number"])
    _partial("ix_webhook_events_connection", "webhook_events", ["connection_id", "number"], "connection_id IS NOT NULL")
    _partial("ix_webhook_events_waiting", "webhook_events", ["parked", "received_at"], "number IS NULL")
    op.create_table(
        "webhook_seen",
        *(sa.Column(name, sa.String(), primary_key=True) for name in ("source_id", "digest")),
        sa.Column("event_id", sa.String(), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False, index=True),
        sqlite_with_rowid=False,
    )


def _deliveries() -> None:
    op.create_table(
        "webhook_deliveries",
        _id(),
        *(sa.Column(name, sa.String(), nullable=False) for name in ("subscription_id", "event_id")),
        _count("number"),
        sa.Column("order_key", sa.String(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        _time("due_at", nullable=False),
        sa.Column("claim", sa.String(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("replay", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("tries", sa.JSON(), nullable=False),
        _time("created_at", nullable=False),
        _time("ended_at"),
    )
    table, unfinished = "webhook_deliveries", "state NOT IN ('delivered', 'dead')"
    _partial("ix_webhook_deliveries_open", table, ["subscription_id", "due_at", "id"], unfinished)
    of_key = ["subscription_id", "order_key", "number"]
    _partial("ix_webhook_deliveries_ordered", table, of_key, f"order_key IS NOT NULL AND {unfinished}")
    _partial("ix_webhook_deliveries_dead", table, ["subscription_id", "id"], "state = 'dead'")
    op.create_index("ix_webhook_deliveries_event", table, ["event_id"])


def _beside() -> None:
    op.create_table(
        "webhook_rejections",
        sa.Column("id", _integer(), primary_key=True),
        sa.Column("source_id", sa.String(), nullable=False),
        _time("at", nullable=False),
        *(sa.Column(name, sa.String(), nullable=False) for name in ("step", "method")),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("address", sa.String(), nullable=True),
        sa.Column("count", sa.Integer(), nullable=False),
    )
    op.create_index("ix_webhook_rejections_of", "webhook_rejections", ["source_id", "id"])
    op.create_table(
        "webhook_registrations",
        _id(),
        *(sa.Column(name, sa.String(), nullable=False, index=True) for name in ("source_id", "connection_id")),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("remote_id", sa.String(), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.Float(53), nullable=False, index=True),
        sa.Column("claim", sa.String(), nullable=True),
        _time("expires_at"),
        _time("created_at", nullable=False),
        _time("checked_at"),
    )


def _partial(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def _id() -> sa.Column[str]:
    return sa.Column("id", sa.String(), primary_key=True)


def _time(name: str, *, nullable: bool = True) -> sa.Column[float]:
    return sa.Column(name, sa.Float(53), nullable=nullable)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, _integer(), nullable=False)


def _integer() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")
