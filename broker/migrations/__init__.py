"""Schema migrations; `broker.database` runs them."""
