"""A proxied call as it goes out: the signer is the last one to touch it, and each attempt is signed anew."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator

from broker.credentials import Lent
from broker.egress.calls import Fields, WireRequest
from broker.errors import InternalError, InvalidRequest
from broker.proxy.retrying import is_repeatable
from broker.proxy.underway import Loan, Ready, Underway
from providers.signing import without_params
from providers.spec import Call, Material, Signed


def signed(call: Underway, trace: Fields) -> WireRequest:
    """Return the request as it goes out; nothing touches it after the signer. ``trace``: this attempt's own fields.

    InvalidRequest, in the signer's words, for a call that cannot be signed.
    """
    inbound, upstream = call.inbound, call.upstream
    signer = call.plan.signer
    body = inbound.body if isinstance(inbound.body, bytes) else None
    if signer.whole_body and inbound.body is None:
        body = b""
    query = inbound.target.query
    if query and signer.params:
        query = without_params(query, signer.params)
    to_sign = Call(
        method=inbound.method,
        scheme=upstream.scheme,
        authority=upstream.authority.decode("ascii"),
        path=upstream.path,
        query=query or b"",
        headers=(*call.fields, *trace) if trace else call.fields,
        body=body,
    )
    try:
        added = signer.sign(to_sign, material_of(loan_of(call).lent, call.ready))
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return _wire(call, to_sign.headers, added, query)


def loan_of(call: Underway) -> Loan:
    """Return the opened credential of a call that has one by now."""
    if call.loan is None:
        raise InternalError  # never: a defect of ours must not send a call without a credential
    return call.loan


def material_of(lent: Lent, ready: Ready) -> Material:
    """Return what the signer may use."""
    return Material(
        fields=lent.fields,
        variables=ready.configured.variables,
        client_id=ready.row.client_id,
        now=time.time(),
        unique=secrets.token_hex(16),
    )


def _wire(call: Underway, fields: Fields, signed: Signed, query: bytes | None) -> WireRequest:
    """Return the request line, fields and body as they stand on the wire."""
    inbound, upstream = call.inbound, call.upstream
    query = signed.query if signed.query is not None else query
    standing = is_repeatable(inbound.method, has_key=call.asked.idempotency_key)
    body = signed.body if signed.body is not None else inbound.body
    if signed.rewriter is not None:
        body = _rewritten(inbound.body, signed)
    return WireRequest(
        scheme=upstream.scheme,
        host=upstream.host,
        port=upstream.port,
        method=inbound.method.encode(),
        target=upstream.path if query is None else upstream.path + b"?" + query,
        headers=((b"host", upstream.authority), *fields, *signed.headers),
        body=body,
        length=None if body is None or isinstance(body, bytes) else inbound.length,
        idempotent=standing,
    )


async def _rewritten(body: bytes | AsyncIterator[bytes] | None, signed: Signed) -> AsyncIterator[bytes]:
    rewriter = signed.rewriter
    if rewriter is None:
        return
    try:
        if isinstance(body, bytes):
            yield rewriter.feed(body)
        elif body is not None:
            async for chunk in body:
                yield rewriter.feed(chunk)
        yield rewriter.finish()
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
