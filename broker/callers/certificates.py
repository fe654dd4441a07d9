"""The identity of a client certificate, as a proxy in front of the broker tells it in a header (pure).

The header counts only from a proxy of ``BROKER_TRUSTED_PROXIES``, which must have verified the certificate and must replace
whatever its own client sent in that header. From anybody else it is an attempt to be somebody, and refused.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Final

from broker.errors import InvalidRequest, Unauthenticated
from broker.settings import Network

XFCC: Final = b"x-forwarded-client-cert"
_PAIR: Final = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^;,"]*)')
_LONGEST: Final = 255


def told_certificate(
    headers: Iterable[tuple[bytes, bytes]], *, header: bytes, peer: str | None, trusted: Sequence[Network]
) -> str | None:
    """Return what a trusted proxy tells of the client's certificate, None when it tells nothing; see ``identity_of``.

    ``header`` in lower case; ``peer`` is the address of the TCP connection, None where there is none. Raises
    ``InvalidRequest`` for a header from anybody but a trusted proxy, and for several.
    """
    values = [value for name, value in headers if name.lower() == header]
    if not values:
        return None
    if not _is_trusted(peer, trusted):
        raise InvalidRequest("Only a trusted proxy may tell a client certificate")
    if len(values) > 1:
        raise InvalidRequest("Several client certificates were told")
    return values[0].decode("latin-1").strip(" \t") or None


def identity_of(told: str, *, header: bytes) -> str:
    """Return the identity: the one URI of an ``x-forwarded-client-cert``, of another header the whole value.

    Raises ``Unauthenticated`` for a value that does not name exactly one identity.
    """
    identity = _uri_of(told) if header == XFCC else told
    if identity is None or not 0 < len(identity) <= _LONGEST or not (identity.isascii() and identity.isprintable()):
        raise Unauthenticated
    return identity


def _is_trusted(peer: str | None, trusted: Sequence[Network]) -> bool:
    try:
        address = ipaddress.ip_address(peer or "")
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in trusted)


def _uri_of(text: str) -> str | None:
    """Return the URI of an Envoy-style value; None unless it is one element, well-formed, with exactly one URI."""
    pairs, at = [], 0
    while found := _PAIR.match(text, at):
        pairs.append((found[1].lower(), found[2]))
        at = found.end()
        if at == len(text):
            break
        if text[at] != ";":  # a comma: certificates of several hops, of which one would have to be chosen
            return None
        at += 1
    uris = [value for name, value in pairs if name == "uri"]
    if at != len(text) or text.endswith(";") or len(uris) != 1:
        return None
    (value,) = uris
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
