"""Which addresses may be dialled, and how a URL is read: pure rules, without a socket."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal, TypeAlias

import idna

from broker.settings import Network

Address: TypeAlias = IPv4Address | IPv6Address
AddressKind: TypeAlias = Literal["public", "loopback", "private", "link_local", "metadata", "multicast", "reserved"]

# --- Which addresses may be dialled: our own table, because ``is_global`` changes between Python versions and is true for
# 168.63.129.16. Source: IANA's special-purpose registries (RFC 6890) and the clouds' documentation. First match wins.

_METADATA: Final = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254",  # AWS, Azure, Google, OpenStack, Oracle, DigitalOcean
        "169.254.169.253",  # AWS: DNS of the VPC
        "169.254.170.2",  # AWS: credentials of ECS tasks
        "169.254.170.23",  # AWS: EKS pod identity
        "169.254.42.42",  # Scaleway
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure: WireServer, a public address
        "192.0.0.192",  # Oracle
        "fd00:ec2::254",  # AWS
        "fd00:ec2::253",
        "fd00:ec2::23",
        "fd20:ce::254",  # Google
        "fd00:c1::a9fe:a9fe",  # Oracle
        "fd00:42::42",  # Scaleway
        "fe80::a9fe:a9fe",  # OpenStack
    )
)
_TABLE: Final[tuple[tuple[str, AddressKind], ...]] = (
    ("0.0.0.0/8", "reserved"),  # "this host": Linux connects to itself
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "private"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link_local"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "reserved"),
    ("192.0.2.0/24", "reserved"),
    ("192.31.196.0/24", "reserved"),
    ("192.52.193.0/24", "reserved"),
    ("192.88.99.0/24", "reserved"),
    ("192.168.0.0/16", "private"),
    ("192.175.48.0/24", "reserved"),
    ("198.18.0.0/15", "reserved"),
    ("198.51.100.0/24", "reserved"),
    ("203.0.113.0/24", "reserved"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
    ("0.0.0.0/0", "public"),
    ("::1/128", "loopback"),
    ("fc00::/7", "private"),
    ("fec0::/10", "private"),
    ("fe80::/10", "link_local"),
    ("ff00::/8", "multicast"),
    ("2001::/23", "reserved"),  # Teredo, ORCHID, benchmarking, protocol assignments
    ("2001:db8::/32", "reserved"),
    ("2620:4f:8000::/48", "reserved"),
    ("3fff::/20", "reserved"),
    ("2000::/3", "public"),
    ("::/0", "reserved"),
)
_SPECIAL: Final = tuple((ipaddress.ip_network(text), kind) for text, kind in _TABLE)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64: Final = ipaddress.IPv6Network("64:ff9b:1::/48")
_SIX_TO_FOUR: Final = ipaddress.IPv6Network("2002::/16")
_TEREDO: Final = ipaddress.IPv6Network("2001::/32")
_LOW_32_BITS: Final = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96")))


def classify(address: Address) -> AddressKind:
    """Say what kind of network ``address`` is in, by our own table. Pure.

    An IPv4-mapped address is judged as the IPv4 address. One that a translator or a relay turns into an IPv4 address
    (NAT64's well-known prefix, 6to4) has that address's kind, except that the far side's loopback is not ours: reserved.
    """
    address = _unmapped(address)
    if address in _METADATA:
        return "metadata"
    if isinstance(address, IPv6Address) and (address in _NAT64 or address in _SIX_TO_FOUR):
        kind = classify(_embedded(address)[0])
        return "reserved" if kind == "loopback" else kind
    return next(kind for network, kind in _SPECIAL if address in network)


def may_dial(address: Address, *, development: bool, allow: Sequence[Network]) -> bool:
    """Say whether a connection to ``address`` may be opened. Pure.

    Public: yes. Loopback: in development. Anything else: only inside a network of ``allow``, and where the address carries
    an IPv4 address (NAT64, 6to4, Teredo, compatible, translated), that one too must be public or in ``allow``. A metadata
    address opens only to an exception that names exactly it, so that ``fd00::/8`` does not open AWS's. The local-use NAT64
    prefix (RFC 8215) never does: where it keeps the IPv4 address is the operator's secret.
    """
    address = _unmapped(address)
    kind = classify(address)
    if kind == "public" or (kind == "loopback" and development):
        return True
    if address in _LOCAL_NAT64:
        return False
    if kind == "metadata" and _embedded(address) == ():
        return any(network.num_addresses == 1 and address in network for network in allow)
    return any(address in network for network in allow) and all(
        may_dial(inner, development=False, allow=allow) for inner in _embedded(address)
    )


def may_dial_unencrypted(address: Address, allow: Sequence[Network]) -> bool:
    """Say whether http may be spoken with ``address``, given that it may be dialled: loopback, or in ``allow``. Pure."""
    address = _unmapped(address)
    return classify(address) == "loopback" or any(address in network for network in allow)


def _unmapped(address: Address) -> Address:
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _embedded(address: Address) -> tuple[IPv4Address, ...]:
    if not isinstance(address, IPv6Address) or address == ipaddress.IPv6Address("::1"):
        return ()
    bits = int(address)
    if address in _SIX_TO_FOUR:
        return (IPv4Address(bits >> 80 & 0xFFFFFFFF),)
    if address in _TEREDO:
        return (IPv4Address(bits >> 64 & 0xFFFFFFFF), IPv4Address(~bits & 0xFFFFFFFF))
    if any(address in network for network in _LOW_32_BITS):
        return (IPv4Address(bits & 0xFFFFFFFF),)
    return ()


# --- Reading a URL: one strict grammar, so that no second parser can see another host in it.

_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::(?P<port>[1-9][0-9]{0,4}))?"
    r'(?P<target>[/?][!"$-\[\]-~]*)?',
    re.ASCII | re.IGNORECASE,
)
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Target:
    """An http(s) URL taken apart; ``host`` is lower case, an IPv6 address without its brackets, ``port`` always given."""

    scheme: str
    host: str
    port: int
    path_and_query: str = field(repr=False)

    @property
    def authority(self) -> str:
        """``host[:port]`` without the default port, as ``Host`` wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """``scheme://host[:port]``, see ``origin_of``."""
        return f"{self.scheme}://{self.authority}"


def origin_of(url: str) -> str:
    """Return ``scheme://host[:port]`` of an absolute http(s) URL: lower case, without the default port. Pure.

    ``ValueError``, which does not quote the URL, for anything that two parsers could read in two ways: user information, an
    empty host, a backslash, white space, a fragment, any non-ASCII letter, a malformed A-label, a trailing dot, or a host
    that looks like a number without being a canonical address (2130706433, 0x7f000001, 127.1). Whether the address behind
    the host may be dialled is not checked here.
    """
    return target_of(url).origin


def target_of(url: str) -> Target:
    """Take apart a URL of the form that ``origin_of`` allows; ``ValueError``, which does not quote it, for others. Pure."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("not an absolute http(s) URL in its plain form")
    scheme = match["scheme"].lower()
    port = int(match["port"]) if match["port"] else _DEFAULT_PORTS[scheme]
    if port > 65535:
        raise ValueError("the port is out of range")
    rest = match["target"] or "/"
    return Target(scheme, _host(match["host"].lower()), port, rest if rest.startswith("/") else f"/{rest}")


def _host(host: str) -> str:
    if host.startswith("["):
        try:
            return str(IPv6Address(host[1:-1]))
        except ValueError:
            raise ValueError("the host is not an IPv6 address") from None
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("the host is not a plain name")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise ValueError("the host looks like a number") from None
    for label in labels:
        if label.startswith("xn--"):
            _check_a_label(label)
    return host


def _check_a_label(label: str) -> None:
    try:
        idna.ulabel(label)
    except idna.IDNAError:
        raise ValueError("the host has a malformed A-label") from None
