"""How often a client address may call: moving windows in this process's memory for the routes that browsers use."""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network

from limits import parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from broker.errors import RateLimited
from broker.settings import Network

_WITH_PORT = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<v4>[0-9.]+))(?::[0-9]{1,5})?")


class AddressLimiter:
    """Counts calls for each (group, client address); an IPv6 client is its /64, because it may choose within it.

    ``rates`` maps a group of routes to a rate such as ``120/minute`` (``ValueError`` for anything else). Calls may run at
    once. Memory holds what was allowed within the longest window: the store drops older entries as calls come in. Each
    process counts for itself.
    """

    def __init__(self, rates: Mapping[str, str]) -> None:
        """Start with nothing counted."""
        self._rates = {group: parse(rate) for group, rate in rates.items()}
        self._windows = MovingWindowRateLimiter(MemoryStorage())

    async def check(self, group: str, address: str) -> None:
        """Count one call, or raise ``RateLimited`` with the seconds until the oldest one leaves the window.

        ``address`` is what ``client_address`` returned. A refused call is not counted. ``KeyError`` for a group without a
        rate: a defect of ours.
        """
        rate, key = self._rates[group], limited_as(address)
        if await self._windows.hit(rate, group, key):
            return
        window = await self._windows.get_window_stats(rate, group, key)
        raise RateLimited(retry_after_seconds=math.ceil(window.reset_time - time.time()))


def limited_as(address: str) -> str:
    """Return what is counted for ``address``: an IPv4 address itself, an IPv6 address's /64, any other text as it is."""
    found = _address(address)
    if isinstance(found, IPv6Address):
        return str(IPv6Network((int(found) >> 64 << 64, 64)))
    return address if found is None else str(found)


def client_address(peer: str, forwarded_for: str | None, trusted: Sequence[Network]) -> str:
    """Return the address of the client behind the proxies that we trust, for limits and audit only. Pure.

    Walks ``forwarded_for`` (all ``X-Forwarded-For`` fields joined by commas) from the right for as long as the address at
    hand is a trusted proxy. An entry that is no address ends the walk at the last trusted one: what stands left of it was
    not vouched for. An entry may carry a port. Without a trusted ``peer`` the header counts for nothing.
    """
    at_hand = _address(peer)
    if at_hand is None:
        return peer
    for entry in reversed((forwarded_for or "").split(",")):
        behind = _entry(entry.strip())
        if behind is None or not any(at_hand in network for network in trusted):
            break
        at_hand = behind
    return str(at_hand)


def _entry(text: str) -> IPv4Address | IPv6Address | None:
    match = _WITH_PORT.fullmatch(text)
    return _address((match["v6"] or match["v4"]) if match else text)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Read an address, an IPv4-mapped one as IPv4; None for anything else and for one with a zone."""
    try:
        found = ipaddress.ip_address("" if "%" in text else text)
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found
