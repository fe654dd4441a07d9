"""A client certificate counts only as a trusted proxy tells it, and only as exactly one identity."""

from __future__ import annotations

import ipaddress

import pytest

from broker.callers.certificates import identity_of, told_certificate
from broker.errors import InvalidRequest, Unauthenticated

TRUSTED = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))
XFCC = b"x-forwarded-client-cert"
SPIFFE = "spiffe://prod/ns/mail/sa/sender"


def told(*values: str, header: bytes = XFCC, peer: str | None = "10.1.2.3") -> str | None:
    headers = [(b"host", b"broker"), *((header.title(), value.encode("latin-1")) for value in values)]
    value = told_certificate(headers, header=header, peer=peer, trusted=TRUSTED)
    return identity_of(value, header=header) if value is not None else None


@pytest.mark.parametrize(
    "value",
    [
        f"URI={SPIFFE}",
        f"By=spiffe://prod/proxy;Hash=ab12;URI={SPIFFE}",
        f'By=x;Subject="CN=a,O=\\"b;c\\"";URI={SPIFFE};DNS=a.example;DNS=b.example',
        f'uri="{SPIFFE}"',
    ],
)
def test_the_uri_of_the_one_certificate_is_the_identity(value: str) -> None:
    assert told(value) == SPIFFE


@pytest.mark.parametrize(
    "value",
    [
        f"URI={SPIFFE},URI=spiffe://prod/ns/x/sa/admin",
        f"URI=spiffe://evil;URI={SPIFFE}",
        "By=x;Hash=y",
        "URI=",
        "URI",
        f"URI={SPIFFE};",
        f'Subject="CN=a;URI={SPIFFE}',
        f'Subject="CN=a";URI="{SPIFFE}',
        f"URI={SPIFFE} x\xe9",
        "URI=" + "s" * 300,
    ],
)
def test_what_does_not_name_exactly_one_identity_is_refused(value: str) -> None:
    with pytest.raises(Unauthenticated):
        told(value)


def test_a_uri_in_a_quoted_subject_is_not_the_identity() -> None:
    assert told(f'Subject="CN=a;URI=spiffe://evil/";URI={SPIFFE}') == SPIFFE


@pytest.mark.parametrize("peer", ["192.0.2.1", "127.0.0.1", "::1", "", None, "10.0.0.1x", "::ffff:192.0.2.1"])
def test_from_anybody_else_it_is_an_attempt_to_be_somebody(peer: str | None) -> None:
    with pytest.raises(InvalidRequest) as refused:
        told(f"URI={SPIFFE}", peer=peer)
    assert SPIFFE not in str(refused.value)


@pytest.mark.parametrize("peer", ["10.255.255.255", "fd00::1", "::ffff:10.0.0.1"])
def test_every_trusted_proxy_may_tell(peer: str) -> None:
    assert told(f"URI={SPIFFE}", peer=peer) == SPIFFE


def test_the_header_twice_is_refused_even_with_the_same_value() -> None:
    with pytest.raises(InvalidRequest):
        told(f"URI={SPIFFE}", f"URI={SPIFFE}")


def test_no_header_and_an_empty_one_tell_nothing() -> None:
    assert told() is None
    assert told("  ") is None
    assert told(peer="192.0.2.1") is None


def test_another_header_holds_the_identity_as_it_is() -> None:
    assert told("CN=sender,O=Acme", header=b"ssl-client-subject-dn") == "CN=sender,O=Acme"
