"""Section 3 of the list of threats: the name is allowed, its address is not, and caller and auditor are told so.

The guard itself is tested beside ``broker.egress``; here names lead to bad addresses under a whole broker.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from tests.broker.test_egress import Authority
from tests.commands import free_port
from tests.flows.proxy_rig import (
    CANARY,
    GOOD,
    PATH,
    Heard,
    Rig,
    answered,
    begin,
    broker_process,
    injected,
    proxy_rig,
    sink,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADDRESSES = {
    "d1-aws": "169.254.169.254",
    "d1-aws-ecs": "169.254.170.2",
    "d1-aws-v6": "fd00:ec2::254",
    "d1-alibaba": "100.100.100.200",
    "d1-azure": "168.63.129.16",
    "d1-oracle": "192.0.0.192",
    "d2-this-host": "0.0.0.0",  # noqa: S104 - an answer, not a bind
    "d2-this-host-v6": "::",
    "d2-this-network": "0.1.2.3",
    "d4-private-10": "10.0.0.1",
    "d4-private-172": "172.16.0.1",
    "d4-private-192": "192.168.1.1",
    "d4-shared": "100.64.0.1",
    "d4-link-local": "169.254.1.1",
    "d4-link-local-v6": "fe80::1",
    "d4-unique-local": "fc00::1",
    "d4-multicast": "224.0.0.1",
    "d4-broadcast": "255.255.255.255",
    "d4-documentation": "203.0.113.1",
    "d5-mapped": "::ffff:169.254.169.254",
    "d5-mapped-private": "::ffff:10.0.0.1",
    "d5-translated": "::ffff:0:7f00:1",
    "d5-compatible": "::127.0.0.1",
    "d5-nat64": "64:ff9b::a9fe:a9fe",
    "d5-local-nat64": "64:ff9b:1::a9fe:a9fe",
    "d5-6to4": "2002:a9fe:a9fe::1",
    "d5-teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
}
MIXED = {
    "d6-good-then-metadata": ("127.0.0.1", "169.254.169.254"),
    "d6-metadata-then-good": ("169.254.169.254", "127.0.0.1"),
    "d6-good-then-private": ("127.0.0.1", "10.0.0.1"),
    "d6-good-then-mapped": ("127.0.0.1", "::ffff:169.254.169.254"),
}


def pins() -> str:
    """Return what the broker is told to find under each name."""
    one = [f"{name}.test:{{port}}:{address}" for name, address in ADDRESSES.items()]
    return ",".join([*one, *(f"{name}.test:{{port}}:{address}" for name, both in MIXED.items() for address in both)])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give one process for the file, which finds a bad address under many names."""
    async with proxy_rig(tmp_path_factory.mktemp("addresses"), more_pins=pins()) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def rig(whole: Rig) -> AsyncIterator[Rig]:
    """Give the rig for one row, and look at what the row left."""
    await whole.mark()
    yield whole
    await whole.expect_nothing_left()


async def expect_egress_denied(rig: Rig, heard: Heard) -> None:
    """DENY: nothing was dialled, the caller is told why, and the record of the call says it too."""
    assert (heard.status, heard.code) == (403, "egress_denied"), heard.raw
    assert json.loads(heard.body)["code"] == "egress_denied"
    assert not any(address in heard.body.decode() for address in ADDRESSES.values() if len(address) > 4)
    rig.expect_untouched()
    assert await rig.outcome() == (None, "egress_denied", 1)


@pytest.mark.parametrize("name", [*ADDRESSES, *MIXED])
async def test_a_name_with_a_bad_address_is_not_dialled(rig: Rig, name: str) -> None:
    await rig.integration(name, f"https://{name}.test:{rig.good.address[1]}")
    connection = await rig.connection(name)
    method = "POST" if "private" in name else "GET"
    request = rig.request(target=f"/proxy/{connection}{PATH}", key=rig.wide_key, method=method, body=b"{}")
    await expect_egress_denied(rig, await rig.send(request))


# --- D2 and D3 where loopback is not for development: names and literals


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def production(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give a broker in production, where 127.0.0.9 alone is excepted, and a server that listens on all of loopback."""
    place = tmp_path_factory.mktemp("production")
    authority, port = Authority(place), free_port()
    given = {
        "BROKER_KEYRING": "k1:" + "QUJD" * 10 + "QUI=",
        "BROKER_PUBLIC_URL": "https://broker.example.test",
        "BROKER_EGRESS_CA_FILE": str(authority.file),
        "BROKER_EGRESS_ALLOW": "127.0.0.9/32",
        "BROKER_RETURN_TO": "https://app.example.test/**",
    }
    async with AsyncExitStack() as stack:
        sinks = {
            name: await stack.enter_async_context(sink(name, host, port, authority.context("localhost")))
            for name, host in {"good": "127.0.0.9", "one": "127.0.0.1", "two": "127.1.2.3"}.items()
        }
        rig = await stack.enter_async_context(broker_process(place, sinks, given))
        rig.wide_key = rig.caller_key = await rig.caller({"integrations": ["*"], "may": ["proxy"]})
        yield rig


LOCAL = {
    "D2 loopback": "https://127.0.0.1",
    "D2 another loopback": "https://127.1.2.3",
    "D2 loopback of IPv6": "https://[::1]",
    "D2 mapped": "https://[::ffff:127.0.0.1]",
    "D2 this host": "https://0.0.0.0",
    "D2 localhost": "https://localhost",
    "D1 metadata": "https://169.254.169.254",
}


@pytest.mark.parametrize("base", LOCAL.values(), ids=LOCAL)
async def test_in_production_no_address_of_this_machine_is_dialled(production: Rig, base: str) -> None:
    rig, name = production, f"i{list(LOCAL.values()).index(base)}"
    await rig.mark()
    await rig.integration(name, f"{base}:{rig.good.address[1]}")
    connection = await rig.connection(name)
    await expect_egress_denied(rig, await rig.send(rig.request(target=f"/proxy/{connection}{PATH}")))


async def test_in_production_an_excepted_address_is_dialled_and_its_certificate_looked_at(production: Rig) -> None:
    rig = production
    await rig.mark()
    await rig.integration("excepted", f"https://127.0.0.9:{rig.good.address[1]}")
    connection = await rig.connection("excepted")
    heard = await rig.send(rig.request("X-Broker-Retries: 0", target=f"/proxy/{connection}{PATH}"))
    assert (heard.status, heard.code) == (502, "provider_unavailable"), heard.raw
    assert b"certificate" in heard.body
    assert (rig.dialled("good"), rig.asked("good")) == (1, [])
    assert (rig.dialled("one"), rig.dialled("two")) == (0, 0)


async def test_u12_in_production_http_is_not_spoken(production: Rig) -> None:
    body = {"name": "plain", "provider": "github", "client_id": "c", "client_secret": "not-a-canary"}
    refused = {**body, "config": {"api_base_url": f"http://127.0.0.9:{production.good.address[1]}"}}
    assert (await production.call("POST", "/v1/integrations", refused, status=400))["code"] == "invalid_request"


# --- D7: the name's address changes


RESOLVER = '''
"""A broker whose machine's resolver answers for one name by a script: each lookup takes a line, the last one for ever."""

import pathlib
import socket
import sys

script, asked = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
original = socket.getaddrinfo


def getaddrinfo(host, port, *args, **kwargs):
    if host != "api.good.test":
        return original(host, port, *args, **kwargs)
    lines = script.read_text().splitlines()
    with asked.open("a+") as log:
        log.seek(0)
        count = len(log.readlines())
        log.write("asked\\n")
    answers = lines[min(count, len(lines) - 1)].split()
    return [row for answer in answers for row in original(answer, port, type=socket.SOCK_STREAM)]


socket.getaddrinfo = getaddrinfo
sys.argv = ["broker", *sys.argv[3:]]
from broker.cli import main

main()
'''


class Rebinding:
    """A rig, and what its resolver says."""

    def __init__(self, rig: Rig, script: Path, asked: Path) -> None:
        """Keep the files through which the process is told and heard."""
        self.rig = rig
        self._script = script
        self._asked = asked

    def answers(self, *lines: str) -> None:
        """Let the next lookups be answered so."""
        self._script.write_text("\n".join(lines))
        self._asked.write_text("")

    @property
    def lookups(self) -> int:
        """How many lookups there were."""
        return len(self._asked.read_text().splitlines())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rebound(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rebinding]:
    """Give a broker whose resolver answers by a script."""
    place = tmp_path_factory.mktemp("rebinding")
    (place / "resolving.py").write_text(RESOLVER)
    authority, port = Authority(place), free_port()
    given = {"BROKER_ENV": "development", "BROKER_EGRESS_CA_FILE": str(authority.file)}
    script, asked = place / "script", place / "asked"
    command = (sys.executable, str(place / "resolving.py"), str(script), str(asked))
    async with AsyncExitStack() as stack:
        sinks = {
            name: await stack.enter_async_context(sink(name, host, port, authority.context(GOOD)))
            for name, host in {"good": "127.0.0.1", "evil": "127.0.0.2", "meta": "127.0.0.3"}.items()
        }
        rig = await stack.enter_async_context(broker_process(place, sinks, given, command))
        found = Rebinding(rig, script, asked)
        found.answers("127.0.0.1")
        await rig.integration("gh", f"https://{GOOD}:{port}")
        rig.connection_id = await rig.connection("gh")
        rig.caller_key = rig.wide_key = await rig.caller({"integrations": ["gh"], "may": ["proxy"]})
        await begin(rig)
        yield found


CLOSING = answered("Connection: close", body=b"{}")


@pytest_asyncio.fixture(loop_scope="module")
async def rebinding(rebound: Rebinding) -> AsyncIterator[Rebinding]:
    """Give it without a kept connection, for one row."""
    rig = rebound.rig
    rig.good.answer = CLOSING
    assert (await rig.send(rig.request())).status == 200
    await rig.mark()
    yield rebound
    rebound.answers("127.0.0.1")
    await rig.expect_nothing_left()


async def test_d7_each_dial_makes_one_lookup_and_goes_to_what_it_said(rebinding: Rebinding) -> None:
    rig = rebinding.rig
    rebinding.answers("127.0.0.1", "127.0.0.2")
    assert (await rig.send(rig.request())).status == 200
    assert (rebinding.lookups, rig.dialled("good"), rig.dialled("evil")) == (1, 1, 0)
    assert injected(rig.asked()[0]) == [f"Bearer {CANARY}"]


async def test_d7_a_name_that_is_bound_again_is_checked_again(rebinding: Rebinding) -> None:
    rig = rebinding.rig
    rebinding.answers("127.0.0.1", "169.254.169.254")
    assert (await rig.send(rig.request())).status == 200
    await rig.mark()
    await expect_egress_denied(rig, await rig.send(rig.request()))
    assert rebinding.lookups == 2


async def test_d7_a_name_that_is_bound_again_between_two_attempts_is_checked_for_the_second(
    rebinding: Rebinding,
) -> None:
    rig = rebinding.rig
    rebinding.answers("127.0.0.1", "127.0.0.1 169.254.169.254")
    rig.good.answer = answered("Connection: close", status="503 Service Unavailable")
    heard = await rig.send(rig.request("X-Broker-Retries: 2"))
    assert (heard.status, heard.code) == (403, "egress_denied"), heard.raw
    assert (rebinding.lookups, len(rig.asked()), rig.dialled()) == (2, 1, 1)
    assert await rig.outcome() == (503, "egress_denied", 2)


async def test_d7_a_kept_connection_is_not_dialled_anew(rebinding: Rebinding) -> None:
    rig = rebinding.rig
    rebinding.answers("127.0.0.1", "169.254.169.254")
    rig.good.answer = answered(body=b"{}")
    for _ in range(3):
        assert (await rig.send(rig.request())).status == 200
    assert (rebinding.lookups, rig.dialled(), len(rig.asked())) == (1, 1, 3)
