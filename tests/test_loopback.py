"""The guard of ``conftest``: no test reaches beyond loopback, not even by asking a resolver."""

from __future__ import annotations

import asyncio
import socket

import pytest

BEYOND = ("192.0.2.1", 9)  # TEST-NET-1, RFC 5737


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, BEYOND), (socket.AF_INET6, ("2001:db8::1", 9))])
def test_a_connection_beyond_loopback_is_refused_and_remembered(
    family: socket.AddressFamily, address: tuple[str, int], traffic_stays_on_loopback: list[str]
) -> None:
    with socket.socket(family) as stray, pytest.raises(PermissionError, match="beyond loopback"):
        stray.connect(address)
    assert traffic_stays_on_loopback == ["socket.connect"]
    traffic_stays_on_loopback.clear()


def test_a_datagram_and_a_lookup_beyond_loopback_are_refused(traffic_stays_on_loopback: list[str]) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as stray, pytest.raises(PermissionError):
        stray.sendto(b"x", BEYOND)
    with pytest.raises(PermissionError):
        socket.getaddrinfo("provider.test", 443)
    assert traffic_stays_on_loopback == ["socket.sendto", "socket.getaddrinfo"]
    traffic_stays_on_loopback.clear()


async def test_asyncio_is_guarded_too(traffic_stays_on_loopback: list[str]) -> None:
    with pytest.raises(PermissionError):
        await asyncio.open_connection(*BEYOND)
    assert traffic_stays_on_loopback == ["socket.connect"]
    traffic_stays_on_loopback.clear()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost"])
async def test_loopback_is_free(host: str, traffic_stays_on_loopback: list[str]) -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "0.0.0.0", 0) as server:  # noqa: S104 - all of loopback
        reader, writer = await asyncio.open_connection(host, server.sockets[0].getsockname()[1], family=socket.AF_INET)
        assert await reader.read() == b"hello"
        writer.close()
        await writer.wait_closed()
    assert traffic_stays_on_loopback == []
