"""The only place that makes outbound clients: guarded, bounded ways out to the providers.

What holds for every request that leaves here:

* A name is resolved once for each connection, every address of the answer must be one that may be dialled, and exactly one
  of those addresses is dialled. The name stays in SNI and in the check of the certificate.
* https with TLS 1.2 or newer; http only in development and only to loopback or an excepted address.
* No redirect is followed, no cookie is kept, no environment variable is read.
* Whether a failed request left or not is known from the first byte written, not guessed from an exception's type.

There are two ways out. ``Egress`` is for the broker's own few calls (token endpoints, discovery, key sets): one deadline
covers the waiting for a slot, DNS, connecting, TLS, sending and the whole answer; no coded (compressed) body is accepted.
Its connection serves one request and is closed. Keeping it would save a handshake, but a server may close an idle connection
in the moment in which the next request is written, and then nobody knows whether a refresh token was spent. Knowing is worth
more there. It also makes "each request re-checks its address" true by construction.

``Calls`` is for the proxied calls, which are many: its connections are kept and every dial is checked; what may not be sent
twice takes only a connection that was in use within two seconds, and "perhaps sent" is said where it is so. Bodies stream
both ways, byte for byte. ``docs/decisions/0015-the-client-of-proxied-calls.md`` says why it is ours.
"""

from __future__ import annotations

from broker.egress.addresses import Address, AddressKind, classify, may_dial, origin_of
from broker.egress.calls import Calls, UploadStalled, WireAnswer, WireRequest
from broker.egress.client import MAX_CONNECTIONS_PER_HOST, Egress
from broker.egress.dialing import AddressGuard, NoRoom, NotSent, OutcomeUnknown, Resolve

__all__ = [
    "MAX_CONNECTIONS_PER_HOST",
    "Address",
    "AddressGuard",
    "AddressKind",
    "Calls",
    "Egress",
    "NoRoom",
    "NotSent",
    "OutcomeUnknown",
    "Resolve",
    "UploadStalled",
    "WireAnswer",
    "WireRequest",
    "classify",
    "may_dial",
    "origin_of",
]
