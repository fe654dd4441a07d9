"""The only place that makes outbound clients: one guarded, bounded connection for each request to a provider.

What holds for every request that leaves here:

* A name is resolved once for each connection, every address of the answer must be one that may be dialled, and exactly one
  of those addresses is dialled. The name stays in ``Host``, in SNI and in the check of the certificate.
* https with TLS 1.2 or newer; http only in development and only to loopback or an excepted address.
* No redirect is followed, no cookie is kept, no environment variable is read, no coded (compressed) body is accepted.
* One deadline covers the waiting for a slot, DNS, connecting, TLS, sending and the whole answer.
* Whether a failed request left or not is known from the first byte written, not guessed from an exception's type.

A connection serves one request and is closed. Keeping it would save a handshake, but a server may close an idle connection
in the moment in which the next request is written, and then nobody knows whether a refresh token was spent. Control-plane
calls are few; knowing is worth more. It also makes "each request re-checks its address" true by construction.
"""

from __future__ import annotations

from broker.egress.addresses import Address, AddressKind, classify, may_dial, origin_of
from broker.egress.client import MAX_CONNECTIONS_PER_HOST, Egress
from broker.egress.dialing import AddressGuard, NotSent, OutcomeUnknown, Resolve

__all__ = [
    "MAX_CONNECTIONS_PER_HOST",
    "Address",
    "AddressGuard",
    "AddressKind",
    "Egress",
    "NotSent",
    "OutcomeUnknown",
    "Resolve",
    "classify",
    "may_dial",
    "origin_of",
]
