"""The broker's own keys of ``v1a`` signatures, as they stand in the rotation of the root keys ``webhook-signing``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from broker.vault.system_keys import RootKey, SystemKeys
from broker.webhooks.signing import V1aKey, v1a_keys


@dataclass(frozen=True, slots=True)
class PublicKey:
    """What receivers verify with. ``text``: ``whpk_…`` (Standard Webhooks); ``state``: next, current or previous."""

    id: str
    state: str
    text: str


class SigningKeys:
    """Sign for every subscription that asked for ``v1a``, whose receivers need no secret. Calls may run at once."""

    def __init__(self, keys: SystemKeys) -> None:
        """Take the root keys, loaded, and refreshed by somebody else."""
        self._keys = keys
        self._derived: dict[str, V1aKey] = {}

    def signing(self) -> Sequence[V1aKey]:
        """Return the keys that sign: the current one, then the previous ones (SecretStoreUnavailable without a current one).

        The next one does not: it is published first.
        """
        previous = [key for key in self._keys.all if key.state == "previous"]
        return [self._of(key) for key in (self._keys.current, *previous)]

    def public(self) -> Sequence[PublicKey]:
        """Return the keys that receivers should know: next, current, previous."""
        return [PublicKey(key.id, key.state, self._of(key).public) for key in self._keys.all]

    def _of(self, key: RootKey) -> V1aKey:
        if key.id not in self._derived:
            self._derived[key.id] = v1a_keys(key.root)
        return self._derived[key.id]
