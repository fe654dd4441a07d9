"""Section 7 of the list of threats: what stands in the process's environment and home changes nothing of where calls go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from tests.broker.test_egress import Authority
from tests.flows.proxy_rig import CANARY, EVIL, PATH, Rig, expect_passed, proxy_rig, values_of

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "FTP_PROXY")


@dataclass
class Snare:
    """A rig whose process was started with all the variables, and what came of them."""

    rig: Rig
    place: Path
    came: list[bytes] = field(default_factory=list)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Snare]:
    """Give a process in whose environment everything points at a listener, and at other authorities."""
    place, came = tmp_path_factory.mktemp("environment"), []
    other = tmp_path_factory.mktemp("other")
    authority = Authority(other)

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.read(1000))
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    proxy = f"http://u:p@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    (place / ".netrc").write_text(
        "machine api.good.test login u password of-netrc\ndefault login u password of-netrc\n"
    )
    (place / ".netrc").chmod(0o600)
    variables = {
        **dict.fromkeys(PROXY_VARIABLES, proxy),
        "NO_PROXY": EVIL,
        "no_proxy": EVIL,
        "NETRC": str(place / ".netrc"),
        "SSL_CERT_FILE": str(authority.file),
        "SSL_CERT_DIR": str(other),
        "REQUESTS_CA_BUNDLE": str(authority.file),
        "CURL_CA_BUNDLE": str(authority.file),
        "SSLKEYLOGFILE": str(place / "keys.log"),
        "LOCALDOMAIN": EVIL,
        "HOSTALIASES": str(place / "aliases"),
    }
    (place / "aliases").write_text(f"api {EVIL}\n")
    async with server, proxy_rig(place, **variables) as rig:
        yield Snare(rig, place, came)


@pytest_asyncio.fixture(loop_scope="module")
async def snare(whole: Snare) -> AsyncIterator[Snare]:
    """Give it for one row, and look at what the row left."""
    await whole.rig.mark()
    yield whole
    await whole.rig.expect_nothing_left()
    assert whole.came == []


async def test_e1_calls_go_straight_to_where_policy_says(snare: Snare) -> None:
    _, seen = await expect_passed(snare.rig, snare.rig.request(), f"GET {PATH}".encode())
    assert seen.startswith(b"GET /repos/")
    assert values_of(seen, "authorization") == [f"Bearer {CANARY}"]
    assert not values_of(seen, "proxy-authorization")
    assert b"of-netrc" not in seen


async def test_e1_a_password_of_netrc_is_never_sent(snare: Snare) -> None:
    rig = snare.rig
    for key in (rig.caller_key, rig.wide_key):
        await rig.send(rig.request(method="POST", body=b"{}", key=key))
    assert len(rig.asked()) == 2
    assert not any(b"of-netrc" in seen or b"Basic" in seen for seen in rig.asked())


async def test_e1_only_the_authorities_of_the_setting_count(snare: Snare) -> None:
    """The variable's authority signed nothing here: calls that work show that it did not take the setting's place."""
    rig = snare.rig
    assert (await rig.send(rig.request())).status == 200
    port = rig.good.address[1]
    await rig.integration("other", f"https://127.0.0.1:{port}")
    connection = await rig.connection("other")
    heard = await rig.send(rig.request("X-Broker-Retries: 0", target=f"/proxy/{connection}{PATH}", key=rig.wide_key))
    assert (heard.status, heard.code) == (502, "provider_unavailable")
    assert b"certificate" in heard.body


async def test_e1_no_keys_of_connections_are_written(snare: Snare) -> None:
    assert (await snare.rig.send(snare.rig.request())).status == 200
    assert not (snare.place / "keys.log").exists()
