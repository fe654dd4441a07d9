"""The chain's arithmetic, pure: a record's canonical form, its link to the one before, and the keys that make both."""

from __future__ import annotations

import functools
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Row: TypeAlias = Mapping[str, Any]

KEY_BYTES = 32
GENESIS = "0" * 64  # the link before the first record
COVERED = (
    "id", "at", "action", "outcome", "actor", "connection_id", "integration", "subject_digest", "detail", "key_id"
)  # fmt: skip

canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
# An eighth of the cost, and the same text for all of these; not for numbers with a fraction that are very large or small.
_encode_own = msgspec.json.Encoder(order="sorted").encode
_ALIKE = frozenset({str, int, bool, type(None)})


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Keys:
    """What is derived from one root key: no key serves two purposes. Cannot print itself."""

    id: str
    digest: bytes
    subject: bytes
    chain: bytes
    head: bytes
    floor: bytes
    signer: Ed25519PrivateKey
    public_key: str  # the signer's: 32 bytes (RFC 8032) as hex

    def link(self, previous: str, row: Row) -> str:
        """Return the link of ``row`` after ``previous``. ``ValueError`` or ``TypeError`` when the row is not JSON."""
        covered = canonical({name: row[name] for name in COVERED})
        return mac(self.chain, f"{previous}{covered}")  # a genuine ``previous`` has 64 characters: nothing to confuse

    def link_own(self, previous: str, row: Row) -> str:
        """Return what ``link`` returns, for a row that we are about to write: of an ``Entry``, with today's time."""
        covered = {name: row[name] for name in COVERED}
        if not all(type(value) in _ALIKE for value in row["detail"].values()):
            return self.link(previous, row)
        return mac(self.chain, f"{previous}{_encode_own(covered).decode()}")

    def head_mac(self, count: int, chain: str) -> str:
        """Return what proves that we wrote this head."""
        return mac(self.head, f"{count}:{chain}")

    def floor_mac(self, number: int, chain: str) -> str:
        """Return what proves that we let the chain begin behind this record."""
        return mac(self.floor, f"{number}:{chain}")

    def subject_digest(self, subject: str) -> str:
        """Return what stands for ``subject`` in the records."""
        return _subject_mac(self.subject, subject)


def keys_of(root: bytes) -> Keys:
    """Derive the keys of one root key (``ValueError`` unless it has 32 bytes)."""
    if len(root) != KEY_BYTES:
        raise ValueError("an audit root key has 32 bytes")
    signer = Ed25519PrivateKey.from_private_bytes(_derived(root, "checkpoint"))
    return Keys(
        id=f"audit-{_derived(root, 'key id').hex()[:16]}",
        digest=_derived(root, "digest"),
        subject=_derived(root, "subject"),
        chain=_derived(root, "chain"),
        head=_derived(root, "head"),
        floor=_derived(root, "floor"),
        signer=signer,
        public_key=signer.public_key().public_bytes_raw().hex(),
    )


def _derived(root: bytes, name: str) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=f"broker audit {name}".encode()).derive(root)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class KeySet:
    """All the keys that there are and have been: the current ones write, any of them verify. Cannot print itself."""

    current: Keys
    by_id: Mapping[str, Keys]

    def link_of(self, row: Row, previous: str) -> str | None:
        """Return the link that a stored row (``detail`` as text) should have after ``previous``.

        None when the row is nothing that we wrote: of a key that we do not have, or not JSON.
        """
        keys = self.by_id.get(row["key_id"])
        if keys is None:
            return None
        try:
            return keys.link(previous, {**row, "detail": strict_json(row["detail"])})
        except (TypeError, ValueError, RecursionError):
            return None

    def wrote_head(self, count: int, chain: str, found_mac: object) -> bool:
        """Whether one of our keys made this head's MAC."""
        return any(same(found_mac, keys.head_mac(count, chain)) for keys in self.by_id.values())

    def wrote_floor(self, number: int, chain: str, found_mac: object) -> bool:
        """Whether one of our keys made this floor's MAC."""
        return any(same(found_mac, keys.floor_mac(number, chain)) for keys in self.by_id.values())


def key_set(current: bytes, previous: Sequence[bytes]) -> KeySet:
    """Return the keys of the current root key and of earlier ones (``ValueError`` as ``keys_of``)."""
    first = keys_of(current)
    return KeySet(first, {keys.id: keys for keys in (first, *map(keys_of, previous))})


def key_set_of(current: Keys, others: Sequence[Keys]) -> KeySet:
    """Return these keys, of which the first writes."""
    return KeySet(current, {keys.id: keys for keys in (current, *others)})


def mac(key: bytes, text: str) -> str:
    """Return HMAC-SHA256 as hex; also of text that an attacker put there, lone surrogates and all."""
    keyed = _keyed(key).copy()
    keyed.update(text.encode("utf-8", "surrogatepass"))
    return str(keyed.hexdigest())


_subject_mac = functools.lru_cache(4_096)(mac)  # one subject's calls come close together


@functools.lru_cache(64)
def _keyed(key: bytes) -> Any:  # noqa: ANN401 - OpenSSL's object, without the standard library's around it where there is one
    """Return the state after the key, which is most of the work for texts as short as ours: 1.0 µs instead of 1.7.

    Besides, ``hmac.digest`` lets go of the interpreter's lock, which then changes threads three times for each record.
    """
    keyed = hmac.new(key, digestmod="sha256")
    return getattr(keyed, "_hmac", None) or keyed


def same(one: object, other: object) -> bool:
    """Compare in constant time, as text; whatever was found in the database may be compared."""
    return hmac.compare_digest(str(one).encode("utf-8", "replace"), str(other).encode("utf-8", "replace"))


def strict_json(text: str | bytes) -> Any:  # noqa: ANN401 - JSON is any shape
    """Read JSON; ``ValueError`` also for a key that occurs twice: readers would differ on which one counts."""
    return _decoder.decode(text) if isinstance(text, str) else json.loads(text, object_pairs_hook=_unambiguous)


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


_decoder = json.JSONDecoder(object_pairs_hook=_unambiguous)  # to make one for each text costs as much as to read it
