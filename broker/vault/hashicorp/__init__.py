"""HashiCorp Vault or OpenBao: a session with the server, the vault over KV version 2, and Transit for the data keys."""

from __future__ import annotations

from broker.vault.hashicorp.kv import HashicorpVault
from broker.vault.hashicorp.session import Session, new_session
from broker.vault.hashicorp.transit import Transit, TransitBeforeKeyring

__all__ = ["HashicorpVault", "Session", "Transit", "TransitBeforeKeyring", "new_session"]
