"""Is every part that this process needs in working order? Each failing part is named, with what to do."""

from __future__ import annotations

from broker.database import Database, head_revision
from broker.errors import BrokerError
from broker.vault import SecretNotFound, SecretUnreadable, Vault

PROBED_OWNER = "health/probe"


async def readiness(database: Database, vault: Vault) -> dict[str, str]:
    """Return what fails by part; empty when all is well. Bounded by the parts' own time limits."""
    failing: dict[str, str] = {}
    try:
        revision = await database.schema_revision()
        if revision != head_revision():
            failing["database"] = "the schema is not this version's; run `broker migrate`"
    except BrokerError as error:
        failing["database"] = error.detail
    try:
        await vault.get(PROBED_OWNER)
    except SecretNotFound:
        pass  # the store answered: there is no such secret, and there should be none
    except (BrokerError, SecretUnreadable) as error:
        failing["vault"] = str(error)
    return failing
