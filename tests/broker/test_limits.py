"""Limits for client addresses, and which address a client has behind proxies."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import RateLimited
from broker.limits import AddressLimiter, client_address, limited_as

TRUSTED = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))


async def allowed(limiter: AddressLimiter, group: str, address: str, calls: int) -> int:
    """Return how many of ``calls`` pass."""
    passed = 0
    for _ in range(calls):
        try:
            await limiter.check(group, address)
        except RateLimited:
            continue
        passed += 1
    return passed


async def test_calls_over_the_rate_are_refused_and_told_when_to_come_again() -> None:
    limiter = AddressLimiter({"start": "3/minute"})
    assert await allowed(limiter, "start", "192.0.2.1", 10) == 3
    with pytest.raises(RateLimited) as refused:
        await limiter.check("start", "192.0.2.1")
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
    assert "192.0.2.1" not in f"{refused.value!r}"


async def test_groups_and_addresses_are_counted_apart() -> None:
    limiter = AddressLimiter({"start": "2/minute", "callback": "1/minute"})
    assert await allowed(limiter, "start", "192.0.2.1", 5) == 2
    assert await allowed(limiter, "start", "192.0.2.2", 5) == 2
    assert await allowed(limiter, "callback", "192.0.2.1", 5) == 1


async def test_calls_at_once_do_not_slip_through() -> None:
    limiter = AddressLimiter({"start": "5/minute"})
    results = await asyncio.gather(*(allowed(limiter, "start", "192.0.2.1", 1) for _ in range(50)))
    assert sum(results) == 5


async def test_an_ipv6_client_is_its_64() -> None:
    limiter = AddressLimiter({"start": "2/minute"})
    assert await allowed(limiter, "start", "2001:db8:0:1::1", 1) == 1
    assert await allowed(limiter, "start", "2001:db8:0:1:ffff:ffff:ffff:ffff", 5) == 1
    assert await allowed(limiter, "start", "2001:db8:0:2::1", 1) == 1


async def test_the_window_moves_on_and_old_entries_leave_the_memory() -> None:
    limiter = AddressLimiter({"start": "1/second"})
    for n in range(50):
        await limiter.check("start", f"192.0.2.{n}")
    assert await allowed(limiter, "start", "192.0.2.1", 1) == 0
    await asyncio.sleep(1.1)
    for _ in range(20):  # the store's clean-up runs as calls come in
        await allowed(limiter, "start", "192.0.2.250", 1)
        await asyncio.sleep(0.01)
    assert await allowed(limiter, "start", "192.0.2.1", 1) == 1
    assert len(vars(limiter._windows.storage)["events"]) < 5


async def test_a_group_without_a_rate_and_a_rate_without_sense_are_defects() -> None:
    with pytest.raises(KeyError):
        await AddressLimiter({}).check("start", "192.0.2.1")
    with pytest.raises(ValueError, match="parse"):
        AddressLimiter({"start": "many"})


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("unix", "unix"),
        ("", ""),
    ],
)
def test_what_is_counted_for_an_address(address: str, key: str) -> None:
    assert limited_as(address) == key


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("192.0.2.1", None, "192.0.2.1"),
        ("192.0.2.1", "198.51.100.7", "192.0.2.1"),
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "6.6.6.6, 198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "6.6.6.6, 198.51.100.7, 10.0.0.2", "198.51.100.7"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", "6.6.6.6, nonsense, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "6.6.6.6, nonsense", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7,", "10.0.0.1"),
        ("10.0.0.1", "6.6.6.6,,10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "198.51.100.7:4711", "198.51.100.7"),
        ("10.0.0.1", "[2001:db8::1]:4711", "2001:db8::1"),
        ("10.0.0.1", "[2001:db8::1]", "2001:db8::1"),
        ("10.0.0.1", "2001:DB8::1", "2001:db8::1"),
        ("10.0.0.1", "[nonsense]:1", "10.0.0.1"),
        ("10.0.0.1", "fe80::1%eth0", "10.0.0.1"),
        ("10.0.0.1", "1.2.3", "10.0.0.1"),
        ("::ffff:10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("fd00::1", "::ffff:198.51.100.7", "198.51.100.7"),
        ("unix", "198.51.100.7", "unix"),
        ("", "198.51.100.7", ""),
    ],
)
def test_the_client_is_found_behind_trusted_proxies_only(peer: str, forwarded_for: str | None, client: str) -> None:
    assert client_address(peer, forwarded_for, TRUSTED) == client


def test_without_trusted_proxies_the_header_counts_for_nothing() -> None:
    assert client_address("10.0.0.1", "198.51.100.7", ()) == "10.0.0.1"


@given(st.text(max_size=40), st.ip_addresses(v=4))
def test_whatever_a_stranger_writes_in_front_changes_nothing(written: str, stranger: ipaddress.IPv4Address) -> None:
    if any(stranger in network for network in TRUSTED):
        return
    assert client_address("10.0.0.1", f"{written},{stranger}", TRUSTED) == str(stranger)
