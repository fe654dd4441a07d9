"""The outbound client against real sockets on 127.0.0.1: what it dials, what it sends, what it accepts, what it says."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gzip
import ipaddress
import logging
import socket
import ssl
import string
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.egress import (
    MAX_CONNECTIONS_PER_HOST,
    AddressGuard,
    Egress,
    NotSent,
    OutcomeUnknown,
    classify,
    may_dial,
    origin_of,
)
from broker.egress.dialing import system_resolver
from broker.errors import EgressDenied, InternalError, ProviderUnavailable, UpstreamInvalid
from broker.settings import Secret, Settings, SettingsError
from providers.spec import Incoming, Outgoing, ProviderAnswerError

CANARY = "CANARY-9f3e"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
ip = ipaddress.ip_address
net = ipaddress.ip_network


# --- the other side of the wire


class Upstream:
    """A raw server: keeps the bytes of each request and the local address each connection came to."""

    def __init__(self, answer: bytes | Callable[[Upstream, asyncio.StreamWriter], Awaitable[None]] = OK) -> None:
        self.answer = answer
        self.requests: list[bytes] = []
        self.dialled: list[str] = []
        self.closed = 0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._changed.clear()
            await self._changed.wait()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.dialled.append(writer.get_extra_info("sockname")[0])
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
                await self._serve(reader, writer)
        finally:
            self.closed += 1
            self._changed.set()
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        self.requests.append(head + await reader.readexactly(length))
        self._changed.set()
        if callable(self.answer):
            await self.answer(self, writer)
        else:
            writer.write(self.answer)
            await writer.drain()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@contextlib.asynccontextmanager
async def serving(
    upstream: Upstream, *, tls: ssl.SSLContext | None = None, hosts: Sequence[str] = ("127.0.0.1",)
) -> AsyncIterator[Upstream]:
    async with contextlib.AsyncExitStack() as stack:
        for host in hosts:
            server = await asyncio.start_server(upstream.handle, host, upstream.port, ssl=tls)
            stack.callback(server.close)
            upstream.port = server.sockets[0].getsockname()[1]
        yield upstream
        await upstream.stop()


async def nothing(_upstream: Upstream, _writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Authority:
    """A certificate authority of its own that signs server certificates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test CA")])
        self.file = folder / "ca.pem"
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        mine = self._builder(self._name, self._key).add_extension(constraints, critical=True)
        signed = mine.add_extension(usage, critical=True).sign(self._key, hashes.SHA256())
        self.file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        today = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        day = dt.timedelta(days=1)
        return builder.not_valid_before(today - day).not_valid_after(today + day)

    def context(self, name: str) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        builder = self._builder(x509.Name([]), key).add_extension(names, critical=True)
        signed = builder.sign(self._key, hashes.SHA256())
        file = self._folder / f"{name}.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + signed.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


# --- our side


class Resolver:
    """Answers each lookup with the next line of a script (the last one for ever) and counts."""

    def __init__(self, *script: list[str] | Exception) -> None:
        self.script = script
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        answer = self.script[min(len(self.asked), len(self.script) - 1)]
        self.asked.append((host, port))
        if isinstance(answer, Exception):
            raise answer
        return answer


def development(**overrides: Any) -> Settings:
    return Settings(env="development", **overrides)


def production(**overrides: Any) -> Settings:
    return Settings(public_url="https://broker.test", keyring=Secret("k1:AAAA"), **overrides)


@contextlib.asynccontextmanager
async def egress_of(
    configured: Settings, resolve: Callable[[str, int], Awaitable[list[str]]] | None = None
) -> AsyncIterator[Egress]:
    egress = Egress(configured, resolve=resolve)
    try:
        yield egress
    finally:
        await egress.aclose()


@contextlib.asynccontextmanager
async def plain(
    answer: bytes | Callable[[Upstream, asyncio.StreamWriter], Awaitable[None]] = OK,
) -> AsyncIterator[tuple[Egress, Upstream, str]]:
    """Serve http on 127.0.0.1 under the name api.good.test; give egress, upstream and the URL's origin."""
    async with serving(Upstream(answer)) as upstream, egress_of(development(), Resolver(["127.0.0.1"])) as egress:
        yield egress, upstream, f"http://api.good.test:{upstream.port}"


def assert_says_nothing(error: BaseException, *secrets: str) -> None:
    """Check that no foreign error stands behind it and that no way to print it shows a secret."""
    assert error.__cause__ is None
    assert error.__context__ is None
    shown = f"{error} {error!r} {vars(error)} {''.join(traceback.format_exception_only(error))}"
    for secret in (CANARY, *secrets):
        assert secret not in shown


# --- addresses: D1, D2, D5


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("169.254.169.254", "metadata"),
        ("169.254.170.2", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("100.100.100.200", "metadata"),
        ("168.63.129.16", "metadata"),
        ("192.0.0.192", "metadata"),
        ("0.0.0.0", "reserved"),  # noqa: S104 - an answer, not a bind
        ("0.1.2.3", "reserved"),
        ("::", "reserved"),
        ("10.0.0.1", "private"),
        ("100.64.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.0.1", "private"),
        ("fc00::1", "private"),
        ("fec0::1", "private"),
        ("169.254.0.1", "link_local"),
        ("fe80::1", "link_local"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "reserved"),
        ("198.18.0.1", "reserved"),
        ("2001:db8::1", "reserved"),
        ("3fff::1", "reserved"),
        ("100::1", "reserved"),
        ("::ffff:169.254.169.254", "metadata"),
        ("::ffff:10.0.0.1", "private"),
        ("::ffff:0:7f00:1", "reserved"),
        ("::127.0.0.1", "reserved"),
        ("::8.8.8.8", "reserved"),
        ("64:ff9b::a9fe:a9fe", "metadata"),
        ("64:ff9b::7f00:1", "reserved"),
        ("64:ff9b:1::a9fe:a9fe", "reserved"),
        ("64:ff9b:1::808:808", "reserved"),
        ("2002:a9fe:a9fe::1", "metadata"),
        ("2002:7f00:1::1", "reserved"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "reserved"),
    ],
)
def test_an_address_that_is_not_public_is_refused_in_both_environments(text: str, kind: str) -> None:
    assert classify(ip(text)) == kind
    assert not may_dial(ip(text), development=False, allow=())
    assert not may_dial(ip(text), development=True, allow=())


@pytest.mark.parametrize("text", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_for_development(text: str) -> None:
    assert classify(ip(text)) == "loopback"
    assert not may_dial(ip(text), development=False, allow=())
    assert may_dial(ip(text), development=True, allow=())


@pytest.mark.parametrize(
    "text",
    [
        "8.8.8.8",
        "140.82.121.3",
        "2606:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::1",
        "172.32.0.1",
    ],
)
def test_a_public_address_may_be_dialled(text: str) -> None:
    assert classify(ip(text)) == "public"
    assert may_dial(ip(text), development=False, allow=())


@pytest.mark.parametrize(
    ("text", "allow", "opens"),
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "192.168.0.0/16", False),
        ("127.0.0.1", "127.0.0.0/8", True),
        ("fd12::1", "fd12::/16", True),
        ("10.1.2.3", "::/0", False),
        ("::ffff:10.1.2.3", "10.0.0.0/8", True),
        ("::ffff:10.1.2.3", "::ffff:0:0/96", False),
        ("::127.0.0.1", "::/0", False),
        ("::8.8.8.8", "::/96", True),
        ("::ffff:0:7f00:1", "::/0", False),
        ("64:ff9b::a9fe:a9fe", "64:ff9b::/96", False),
        ("64:ff9b::a00:1", "64:ff9b::/96", False),
        ("64:ff9b::a00:1", "64:ff9b::/96,10.0.0.0/8", True),
        ("64:ff9b::a00:1", "10.0.0.0/8", False),
        ("64:ff9b:1::808:808", "::/0", False),
        ("2002:a9fe:a9fe::1", "2002::/16", False),
        ("2002:a00:1::1", "2002::/16,10.0.0.0/8", True),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001::/32", False),  # client 192.0.2.45
        ("2001:0:4136:e378:8000:63bf:f7f7:f7f7", "2001::/32", True),  # client 8.8.8.8
        ("2001:0:7f00:1:8000:63bf:f7f7:f7f7", "2001::/32", False),  # server 127.0.0.1
        ("169.254.169.254", "169.254.0.0/16", False),
        ("169.254.169.254", "0.0.0.0/0", False),
        ("169.254.169.254", "169.254.169.254/32", True),
        ("fd00:ec2::254", "fd00::/8", False),
        ("fd00:ec2::254", "fd00:ec2::254/128", True),
    ],
)
def test_an_exception_opens_its_own_network_and_no_address_that_hides_in_it(text: str, allow: str, opens: bool) -> None:  # noqa: FBT001 - the table's last column
    networks = tuple(net(part) for part in allow.split(","))
    assert may_dial(ip(text), development=False, allow=networks) is opens


@given(st.ip_addresses())
@settings(max_examples=500)
def test_whatever_may_be_dialled_is_global_for_the_standard_library_too(address: Any) -> None:
    if may_dial(address, development=False, allow=()):
        assert (getattr(address, "ipv4_mapped", None) or address).is_global
    else:
        assert classify(address) != "public"


# --- URLs: U4, U5, U8, U9, U12, D3


@pytest.mark.parametrize(
    "url",
    [
        "https://api.good.test@evil.test/",
        "https://u:p@api.good.test/",
        "https://api.good.test\\.evil.test/",
        "https://evil.test\\@api.good.test/",
        "https://api.good.test/\\evil",
        "https://api.good.test.",
        "https://api.good.test./x",
        "https://api..good.test",
        "https://.test",
        "https://api。good。test",
        "https://ａpi.good.test",  # noqa: RUF001 - the point of it
        "https://api.gооd.test",  # noqa: RUF001 - the point of it
        "https://api.good\u200d.test",
        "https://xn--.test",
        "https://xn--zzzzzzzz.test",
        "https://api.xn--a-ecp",
        "file:///etc/passwd",
        "ftp://api.good.test/",
        "gopher://api.good.test/",
        "ws://api.good.test/",
        "wss://api.good.test/",
        "HTTPS:api.good.test",
        "https:/api.good.test",
        "https:///x",
        "https://",
        "//api.good.test/",
        "api.good.test",
        "",
        "https://:443/",
        "https://api.good.test:/",
        "https://api.good.test:0/",
        "https://api.good.test:0443/",
        "https://api.good.test:65536/",
        "https://api.good.test:+443/",
        "https://api.good.test:44३/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.1/",
        "https://0177.0.0.1/",
        "https://127.1/",
        "https://0/",
        "https://1.2.3.4.5/",
        "https://api.good.0x/",
        "https://api.good.1/",
        "https://256.1.1.1/",
        "https://[::1/",
        "https://[]/",
        "https://[1.2.3.4]/",
        "https://[fe80::1%25eth0]/",
        "https://api_good.test/",
        "https://-api.good.test/",
        "https://api-.good.test/",
        f"https://{'a' * 64}.test/",
        f"https://{'a.' * 127}test/",
        "https://api.good.test/a b",
        "https://api.good.test/\r\nX: 1",
        "https://api.good.test/\n",
        " https://api.good.test/",
        "https://api.good.test/é",
        "https://api.good.test/#part",
        "https://api.good.test/\x00",
        "https://api.good.te\u017ft/",  # a long s folds to s when case is ignored in Unicode
    ],
)
def test_a_url_that_two_parsers_could_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"host|URL|port") as refused:
        origin_of(url)
    assert url == "" or url not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://api.good.test", "https://api.good.test"),
        ("HTTPS://API.Good.Test:443/X?y=%2F..", "https://api.good.test"),
        ("http://api.good.test:80/", "http://api.good.test"),
        ("http://api.good.test:443/", "http://api.good.test:443"),
        ("https://api.good.test:8443?x", "https://api.good.test:8443"),
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1"),
        ("https://[0:0::1]:65535/", "https://[::1]:65535"),
        ("https://[::FFFF:1.2.3.4]", "https://[::ffff:102:304]"),
        ("https://xn--bcher-kva.test", "https://xn--bcher-kva.test"),
        ("https://r3---sn.test/a%2Fb/...;v=2,3@x:y", "https://r3---sn.test"),
    ],
)
def test_an_origin_is_lower_case_and_has_no_default_port(url: str, origin: str) -> None:
    assert origin_of(url) == origin
    assert origin_of(origin) == origin


@given(st.text(alphabet=string.ascii_letters + string.digits + "./:@\\[]%-_?#xX \t。ａ", max_size=30))  # noqa: RUF001 - the point of it
@settings(max_examples=300)
def test_what_is_accepted_means_the_same_host_to_another_parser(tail: str) -> None:
    try:
        origin = origin_of(f"https://{tail}")
    except ValueError:
        return
    assert origin_of(origin) == origin
    other = urlsplit(f"https://{tail}")
    if not tail.startswith("["):
        assert urlsplit(origin).hostname == other.hostname
    assert other.username is None
    assert (urlsplit(origin).port or 443) == (other.port or 443)


# --- what goes out, what comes back


async def test_the_exact_request_goes_out_and_the_answer_comes_back() -> None:
    answer = b"HTTP/1.1 418 Odd\r\nX-A: 1\r\nx-a: 2\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\ntea!"
    async with plain(answer) as (egress, upstream, origin):
        request = Outgoing("POST", f"{origin}/a%2Fb/../c?q=a+b%20c&q=", {"Authorization": "Bearer x"}, b"k=v")
        incoming = await egress.send(request)
    host = origin.removeprefix("http://").encode()
    assert upstream.requests == [
        b"POST /a%2Fb/../c?q=a+b%20c&q= HTTP/1.1\r\nHost: " + host + b"\r\nAuthorization: Bearer x\r\n"
        b"Accept-Encoding: identity\r\nConnection: close\r\nUser-Agent: credential-broker\r\nContent-Length: 3\r\n\r\nk=v"
    ]
    assert (incoming.status, incoming.body) == (418, b"tea!")
    assert incoming.headers == {"x-a": "1, 2", "content-type": "text/plain", "content-length": "4"}


async def test_a_get_has_no_body_and_may_name_its_own_user_agent() -> None:
    async with plain() as (egress, upstream, origin):
        await egress.send(Outgoing("GET", f"{origin}?x=1", {"user-agent": "mine"}))
        await egress.send(Outgoing("POST", origin))
    assert upstream.requests[0].startswith(b"GET /?x=1 HTTP/1.1\r\n")
    assert b"content-length" not in upstream.requests[0].lower()
    assert upstream.requests[0].lower().count(b"user-agent") == 1
    assert b"Content-Length: 0\r\n" in upstream.requests[1]


async def test_each_request_has_a_connection_of_its_own() -> None:
    async with plain() as (egress, upstream, origin):
        for _ in range(3):
            await egress.send(Outgoing("GET", origin))
        assert len(upstream.dialled) == 3


async def test_a_chunked_answer_an_interim_answer_and_an_empty_answer_are_read() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    async with plain(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + chunked) as (egress, _, origin):
        assert (await egress.send(Outgoing("GET", origin))).body == b"abc"
    async with plain(b"HTTP/1.1 204 None\r\nContent-Encoding: gzip\r\n\r\n") as (egress, _, origin):
        assert (await egress.send(Outgoing("DELETE", origin))).body == b""
    async with plain(b"HTTP/1.0 200 OK\r\n\r\nuntil the end") as (egress, _, origin):
        assert (await egress.send(Outgoing("GET", origin))).body == b"until the end"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_returned_and_its_target_sees_nothing(status: int) -> None:
    async with serving(Upstream()) as evil:
        location = f"http://127.0.0.1:{evil.port}/"
        moved = f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
        async with plain(moved) as (egress, upstream, origin):
            incoming = await egress.send(Outgoing("POST", origin, {"X-Api-Key": CANARY}, CANARY.encode()))
            assert (incoming.status, incoming.headers["location"]) == (status, location)
            assert len(upstream.requests) == 1
        assert evil.dialled == []


async def test_a_cookie_is_neither_kept_nor_sent_nor_shown() -> None:
    cookie = b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=T1; Path=/\r\nContent-Length: 0\r\n\r\n"
    async with plain(cookie) as (egress, upstream, origin):
        first = await egress.send(Outgoing("GET", origin))
        await egress.send(Outgoing("GET", origin))
    assert first.headers == {"content-length": "0"}
    assert b"cookie" not in b"".join(upstream.requests).lower()


@pytest.mark.parametrize("coding", [b"gzip", b"br", b"identity, gzip", b"gzip, " * 19 + b"gzip", b"GZIP"])
async def test_a_coded_answer_is_refused_unopened(coding: bytes) -> None:
    bomb = gzip.compress(b"\0" * 5_000_000)
    answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: %b\r\nContent-Length: %d\r\n\r\n" % (coding, len(bomb)) + bomb
    async with plain(answer) as (egress, _, origin):
        with pytest.raises(UpstreamInvalid):
            await egress.send(Outgoing("GET", origin))


async def test_identity_is_no_coding() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: Identity\r\nContent-Length: 1\r\n\r\nx"
    async with plain(answer) as (egress, _, origin):
        assert (await egress.send(Outgoing("GET", origin))).body == b"x"


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_an_answer_over_the_limit_is_cut_off_however_it_is_framed(framing: str) -> None:
    heads = {"length": b"Content-Length: 99999999\r\n", "chunked": b"Transfer-Encoding: chunked\r\n", "close": b""}

    async def endless(_upstream: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + heads[framing] + b"\r\n")
        while True:
            writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n" if framing == "chunked" else b"x" * 1024)
            await writer.drain()

    async with plain(endless) as (egress, upstream, origin):
        with pytest.raises(UpstreamInvalid):
            await egress.send(Outgoing("GET", origin), max_bytes=100_000)
        await upstream.until(lambda: upstream.closed == 1)  # the connection is closed, not drained


async def test_an_answer_of_exactly_the_limit_passes() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789"
    async with plain(answer) as (egress, _, origin):
        assert (await egress.send(Outgoing("GET", origin), max_bytes=10)).body == b"0123456789"
        with pytest.raises(UpstreamInvalid):
            await egress.send(Outgoing("GET", origin), max_bytes=9)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + CANARY.encode() + b"\0\r\n\r\n{}",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
        CANARY.encode() + b"\r\n\r\n",
    ],
)
async def test_after_a_cut_or_malformed_answer_nobody_knows_the_outcome(answer: bytes) -> None:
    async with plain(answer) as (egress, upstream, origin):
        with pytest.raises(OutcomeUnknown) as unknown:
            await egress.send(Outgoing("POST", f"{origin}/?code={CANARY}", {"X-Key": CANARY}, CANARY.encode()))
        assert len(upstream.requests) == 1
    assert not unknown.value.timed_out
    assert (unknown.value.status, unknown.value.code) == (502, "provider_unavailable")
    assert_says_nothing(unknown.value, "api.good.test")


async def test_a_reset_after_the_request_leaves_the_outcome_unknown() -> None:
    async def reset(_upstream: Upstream, writer: asyncio.StreamWriter) -> None:
        linger = b"\1\0\0\0\0\0\0\0"
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async with plain(reset) as (egress, _, origin):
        with pytest.raises(OutcomeUnknown) as unknown:
            await egress.send(Outgoing("POST", origin, {}, b"x"))
    assert_says_nothing(unknown.value)


# --- time


async def test_a_server_that_drips_meets_one_deadline_for_the_whole_answer() -> None:
    async def drip(_upstream: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with plain(drip) as (egress, _, origin):
        started = time.monotonic()
        with pytest.raises(OutcomeUnknown) as unknown:
            await egress.send(Outgoing("GET", origin), timeout_seconds=0.3)
    assert 0.25 < time.monotonic() - started < 2
    assert unknown.value.timed_out
    assert_says_nothing(unknown.value)


async def test_endless_interim_answers_meet_the_deadline_too() -> None:
    async def interim(_upstream: Upstream, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with plain(interim) as (egress, _, origin):
        with pytest.raises(OutcomeUnknown) as unknown:
            await egress.send(Outgoing("GET", origin), timeout_seconds=0.2)
    assert unknown.value.timed_out


async def test_a_server_that_never_answers_is_a_time_out_and_the_connection_is_closed() -> None:
    async with plain(nothing) as (egress, upstream, origin):
        with pytest.raises(OutcomeUnknown) as unknown:
            await egress.send(Outgoing("POST", origin), timeout_seconds=0.1)
        assert unknown.value.timed_out
        upstream.answer = OK
        assert (await egress.send(Outgoing("POST", origin))).status == 200


async def test_a_name_server_that_hangs_is_not_sent() -> None:
    async def hang(_host: str, _port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    async with egress_of(development(), hang) as egress:
        with pytest.raises(NotSent) as not_sent:
            await egress.send(Outgoing("POST", "https://api.good.test/"), timeout_seconds=0.1)
        assert_says_nothing(not_sent.value, "good")
    guard = AddressGuard(development=True, allow=(), resolve=hang, dns_seconds=0.05)
    with pytest.raises(TimeoutError):
        await guard.addresses("api.good.test", 443, encrypted=True)


async def test_a_handshake_that_hangs_is_not_sent() -> None:
    released = asyncio.Event()

    async def mute(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with egress_of(development(), Resolver(["127.0.0.1"])) as egress:
        with pytest.raises(NotSent) as not_sent:
            await egress.send(Outgoing("POST", f"https://api.good.test:{port}/"), timeout_seconds=0.2)
    released.set()
    server.close()
    assert "TLS" in not_sent.value.detail
    assert_says_nothing(not_sent.value)


async def test_a_cancelled_request_closes_its_connection_and_frees_its_slot() -> None:
    async with plain(nothing) as (egress, upstream, origin):
        for _ in range(3):
            task = asyncio.create_task(egress.send(Outgoing("GET", origin)))
            await upstream.until(lambda: len(upstream.requests) == 1)
            upstream.requests.clear()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        upstream.answer = OK
        assert (await egress.send(Outgoing("GET", origin))).status == 200


async def test_a_host_that_stalls_takes_its_own_slots_only() -> None:
    async with plain(nothing) as (egress, stalled, origin), serving(Upstream()) as well:
        sends = [egress.send(Outgoing("GET", origin), timeout_seconds=0.8) for _ in range(MAX_CONNECTIONS_PER_HOST)]
        served = [asyncio.create_task(send) for send in sends]
        await stalled.until(lambda: len(stalled.requests) == MAX_CONNECTIONS_PER_HOST)
        late = [egress.send(Outgoing("GET", origin), timeout_seconds=0.1) for _ in range(10)]
        for result in await asyncio.gather(*late, return_exceptions=True):
            assert isinstance(result, NotSent)
            assert result.detail == "Too many requests are waiting for this provider"
        assert len(stalled.dialled) == MAX_CONNECTIONS_PER_HOST
        assert (await egress.send(Outgoing("GET", f"http://api.good.test:{well.port}"))).status == 200
        results = await asyncio.gather(*served, return_exceptions=True)
        assert all(isinstance(result, OutcomeUnknown) for result in results)
        stalled.answer = OK
        assert (await egress.send(Outgoing("GET", origin))).status == 200


# --- DNS: D1 to D7


@pytest.mark.parametrize(
    "answer",
    [
        ["169.254.169.254"],
        ["fd00:ec2::254"],
        ["0.0.0.0"],  # noqa: S104 - an answer, not a bind
        ["::"],
        ["127.0.0.1", "169.254.169.254"],
        ["10.0.0.1", "127.0.0.1"],
        ["::ffff:169.254.169.254"],
        ["64:ff9b::a9fe:a9fe"],
        ["2002:a9fe:a9fe::1"],
        ["fe80::1%eth0"],
        ["2130706433"],
        ["localhost"],
        [""],
    ],
)
async def test_one_bad_address_refuses_the_whole_answer(answer: list[str]) -> None:
    async with serving(Upstream()) as upstream, egress_of(development(), Resolver(answer)) as egress:
        with pytest.raises(EgressDenied) as denied:
            await egress.send(Outgoing("GET", f"https://api.good.test:{upstream.port}/?{CANARY}"))
        assert upstream.dialled == []
    assert_says_nothing(denied.value, "good", "169.254")


@pytest.mark.parametrize("url", ["https://169.254.169.254/", "https://[::ffff:a9fe:a9fe]/", "https://10.0.0.1/"])
async def test_a_literal_is_judged_without_asking_anyone(url: str) -> None:
    resolver = Resolver(["127.0.0.1"])
    async with egress_of(development(), resolver) as egress:
        with pytest.raises(EgressDenied):
            await egress.send(Outgoing("GET", url))
    assert resolver.asked == []


@pytest.mark.parametrize(
    "url", ["https://2130706433/", "https://u:p@api.good.test/", "file:///etc/passwd", f"x{CANARY}"]
)
async def test_a_url_out_of_form_is_denied_before_anything_is_asked(url: str) -> None:
    resolver = Resolver(["127.0.0.1"])
    async with egress_of(development(), resolver) as egress:
        with pytest.raises(EgressDenied) as denied:
            await egress.send(Outgoing("GET", url))
    assert resolver.asked == []
    assert_says_nothing(denied.value)


async def test_each_request_resolves_once_and_a_rebinding_is_caught() -> None:
    resolver = Resolver(["127.0.0.1"], ["169.254.169.254"], ["127.0.0.1"])
    async with serving(Upstream()) as upstream, egress_of(development(), resolver) as egress:
        url = f"http://api.good.test:{upstream.port}/"
        await egress.send(Outgoing("GET", url))
        with pytest.raises(EgressDenied):
            await egress.send(Outgoing("GET", url))
        await egress.send(Outgoing("GET", url))
        assert upstream.dialled == ["127.0.0.1", "127.0.0.1"]
    assert resolver.asked == [("api.good.test", upstream.port)] * 3


async def test_the_next_address_is_tried_when_one_refuses() -> None:
    resolver = Resolver(["127.0.0.2", "127.0.0.3", "::1", "127.0.0.1"])
    async with serving(Upstream()) as upstream, egress_of(development(), resolver) as egress:
        await egress.send(Outgoing("GET", f"http://api.good.test:{upstream.port}/"))
        assert upstream.dialled == ["127.0.0.1"]
    assert len(resolver.asked) == 1


async def test_a_name_without_an_address_and_a_failing_lookup_are_not_sent() -> None:
    resolver = Resolver([], socket.gaierror(-2, f"Name {CANARY} not known"))
    async with egress_of(development(), resolver) as egress:
        for _ in range(2):
            with pytest.raises(NotSent) as not_sent:
                await egress.send(Outgoing("GET", "https://api.good.test/"))
            assert_says_nothing(not_sent.value, "good")
            assert "name" in not_sent.value.detail


async def test_the_system_resolver_knows_localhost() -> None:
    async with serving(Upstream()) as upstream, egress_of(development()) as egress:
        assert (await egress.send(Outgoing("GET", f"http://localhost:{upstream.port}/"))).status == 200
        assert (await egress.send(Outgoing("GET", f"http://127.0.0.1:{upstream.port}/"))).status == 200
        await egress.aclose()
        with pytest.raises(NotSent):
            await egress.send(Outgoing("GET", f"http://localhost:{upstream.port}/"))


class SlowNames(ThreadPoolExecutor):
    """Threads in which the names of one zone do not resolve until they are let go; any other name is this machine."""

    def __init__(self) -> None:
        super().__init__(64)
        self.released = threading.Event()

    def submit(self, _fn: Any, /, *args: Any, **_kwargs: Any) -> Any:
        return super().submit(self.answer, args[0])

    def answer(self, host: str) -> list[Any]:
        if host.startswith("hanging"):
            self.released.wait(30)
        return [(0, 0, 0, "", ("127.0.0.1", 0))]


async def test_a_name_that_hangs_has_eight_threads_at_most_and_fails_fast_when_all_of_them_hang() -> None:
    threads = SlowNames()
    resolve = system_resolver(threads)
    asked: list[asyncio.Future[list[str]]] = [asyncio.ensure_future(resolve("hanging.test", 443)) for _ in range(100)]
    await asyncio.sleep(0.05)
    assert await resolve("good.test", 443) == ["127.0.0.1"]
    for one in asked:
        one.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    with pytest.raises(NotSent) as refused:
        await resolve("hanging.test", 443)
    assert_says_nothing(refused.value, "hanging")
    assert await resolve("good.test", 443) == ["127.0.0.1"]
    threads.released.set()
    await asyncio.sleep(0.2)
    assert await resolve("hanging.test", 443) == ["127.0.0.1"], "it recovers with its name server"
    threads.shutdown()


async def test_many_lookups_of_a_good_name_at_once_wait_for_each_other() -> None:
    threads = SlowNames()
    resolve = system_resolver(threads)
    assert await asyncio.gather(*(resolve("good.test", 443) for _ in range(50))) == [["127.0.0.1"]] * 50
    threads.shutdown()


async def test_an_ipv6_literal_keeps_its_brackets_in_host() -> None:
    async with serving(Upstream(), hosts=["::1"]) as upstream, egress_of(development()) as egress:
        await egress.send(Outgoing("GET", f"http://[0::1]:{upstream.port}/"))
    assert f"Host: [::1]:{upstream.port}\r\n".encode() in upstream.requests[0]


async def test_a_name_can_be_pinned_to_an_address_in_development() -> None:
    async with serving(Upstream()) as upstream:
        pins = f"API.good.test:{upstream.port}:127.0.0.1,six.test:443:[::1],meta.test:80:169.254.169.254"
        resolver = Resolver([])
        async with egress_of(development(egress_resolve=pins), resolver) as egress:
            await egress.send(Outgoing("GET", f"http://api.good.test:{upstream.port}/"))
            with pytest.raises(EgressDenied):
                await egress.send(Outgoing("GET", "http://meta.test/"))
            assert [str(a) for a in await egress.guard.addresses("six.test", 443, encrypted=True)] == ["::1"]
    assert resolver.asked == []


async def test_addresses_are_capped_and_their_families_alternate() -> None:
    found = ["2606:4700::1", "2606:4700::2", "2606:4700::1", "8.8.8.8", *(f"8.8.4.{n}" for n in range(20))]
    async with egress_of(production(), Resolver(found)) as egress:
        addresses = await egress.guard.addresses("api.good.test", 443, encrypted=True)
    assert [str(a) for a in addresses[:4]] == ["2606:4700::1", "8.8.8.8", "2606:4700::2", "8.8.4.0"]
    assert len(addresses) == 8


async def test_production_speaks_https_only_and_not_to_loopback() -> None:
    resolver = Resolver(["127.0.0.1"])
    async with serving(Upstream()) as upstream:
        async with egress_of(production(egress_allow="127.0.0.0/8"), resolver) as egress:
            with pytest.raises(EgressDenied):
                await egress.send(Outgoing("GET", f"http://api.good.test:{upstream.port}/"))
            assert resolver.asked == []
        async with egress_of(production(), resolver) as egress:
            with pytest.raises(EgressDenied):
                await egress.send(Outgoing("GET", f"https://api.good.test:{upstream.port}/"))
        assert upstream.dialled == []


@pytest.mark.parametrize(("address", "passes"), [("8.8.8.8", False), ("10.0.0.1", True), ("127.0.0.1", True)])
async def test_http_in_development_stays_on_loopback_and_excepted_networks(address: str, passes: bool) -> None:  # noqa: FBT001 - the table's last column
    async with egress_of(development(egress_allow="10.0.0.0/8"), Resolver([address])) as egress:
        if passes:
            assert await egress.guard.addresses("api.good.test", 80, encrypted=False) == (ip(address),)
        else:
            with pytest.raises(EgressDenied):
                await egress.guard.addresses("api.good.test", 80, encrypted=False)
        assert await egress.guard.addresses("api.good.test", 443, encrypted=True) == (ip(address),)


ALLOWED = ("127.0.0.1", "127.0.0.2", "127.0.0.5")  # nobody listens on the last
OUTSIDE = ("127.0.1.1", "10.0.0.1", "169.254.169.254", "::ffff:127.0.1.1", "nonsense")  # something listens on the first


@given(st.lists(st.lists(st.sampled_from(ALLOWED * 3 + OUTSIDE), max_size=4), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_each_address_dialled_was_allowed_in_that_same_dial(script: list[list[str]]) -> None:
    asyncio.run(_play(script))


class Sink(Upstream):
    """Notes where it was reached and hangs up."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # noqa: ARG002 - overrides
        writer.close()


async def _play(script: list[list[str]]) -> None:
    """Law 3: production, so that loopback is open by exception only, and what listens outside of it would tell."""
    resolver = Resolver(*script)
    async with (
        serving(Sink(), hosts=["127.0.0.1", "127.0.0.2", "127.0.1.1"]) as sink,
        egress_of(production(egress_allow="127.0.0.0/29"), resolver) as egress,
    ):
        for turn, answer in enumerate(script):
            sink.dialled.clear()
            with pytest.raises(ProviderUnavailable if set(answer) <= set(ALLOWED) else EgressDenied):
                await egress.send(Outgoing("POST", f"https://api.good.test:{sink.port}/"))
            assert len(resolver.asked) == turn + 1
            listening = [address for address in answer if address in {"127.0.0.1", "127.0.0.2"}]
            assert sink.dialled == (listening[:1] if set(answer) <= set(ALLOWED) else [])


# --- TLS


async def test_https_verifies_the_name_against_the_configured_authority(authority: Authority) -> None:
    resolver = Resolver(["127.0.0.1"])
    async with serving(Upstream(), tls=authority.context("api.good.test")) as upstream:
        trusting = production(egress_ca_file=authority.file, egress_allow="127.0.0.1/32")
        async with egress_of(trusting, resolver) as egress:
            assert (await egress.send(Outgoing("GET", f"https://api.good.test:{upstream.port}/"))).status == 200
            with pytest.raises(NotSent) as not_sent:
                await egress.send(Outgoing("POST", f"https://other.good.test:{upstream.port}/", {}, CANARY.encode()))
        assert "certificate" in not_sent.value.detail
        assert_says_nothing(not_sent.value, "good")
        assert len(upstream.requests) == 1


async def test_an_unknown_authority_is_not_sent_and_the_variables_change_nothing(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.log"
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    monkeypatch.setenv("SSL_CERT_DIR", str(authority.file.parent))
    monkeypatch.setenv("SSLKEYLOGFILE", str(keys))
    async with serving(Upstream(), tls=authority.context("api.good.test")) as upstream:
        async with egress_of(development(), Resolver(["127.0.0.1"])) as egress:
            with pytest.raises(NotSent):
                await egress.send(Outgoing("GET", f"https://api.good.test:{upstream.port}/"))
        async with egress_of(development(egress_ca_file=authority.file), Resolver(["127.0.0.1"])) as egress:
            await egress.send(Outgoing("GET", f"https://api.good.test:{upstream.port}/"))
        assert len(upstream.requests) == 1
    assert not keys.exists()


async def test_tls_1_1_is_not_spoken(authority: Authority) -> None:
    old = authority.context("api.good.test")
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with (
        serving(Upstream(), tls=old) as upstream,
        egress_of(development(egress_ca_file=authority.file), Resolver(["127.0.0.1"])) as egress,
    ):
        with pytest.raises(NotSent) as not_sent:
            await egress.send(Outgoing("GET", f"https://api.good.test:{upstream.port}/"))
        assert upstream.requests == []
    assert "TLS" in not_sent.value.detail


async def test_a_plain_server_behind_an_https_url_is_not_sent() -> None:
    async with plain(b"HTTP/1.1 400 Bad\r\n\r\n") as (egress, _, origin):
        with pytest.raises(NotSent):
            await egress.send(Outgoing("GET", origin.replace("http:", "https:")), timeout_seconds=0.5)


def _serve_over_tls_once(listener: socket.socket, context: ssl.SSLContext, answer: bytes, *, proper_end: bool) -> None:
    connection, _ = listener.accept()
    with context.wrap_socket(connection, server_side=True) as secured:
        secured.recv(65536)
        secured.sendall(answer)
        if proper_end:
            with contextlib.suppress(OSError):
                secured.unwrap()


@pytest.mark.parametrize("proper_end", [True, False])
async def test_an_answer_that_ends_with_the_connection_needs_a_proper_end_of_tls(
    authority: Authority,
    proper_end: bool,  # noqa: FBT001 - a table of two rows
) -> None:
    context = authority.context("api.good.test")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answer = b"HTTP/1.1 200 OK\r\n\r\naccess_token=abc"
        arguments = (listener, context, answer)
        thread = threading.Thread(target=_serve_over_tls_once, args=arguments, kwargs={"proper_end": proper_end})
        thread.start()
        async with egress_of(development(egress_ca_file=authority.file), Resolver(["127.0.0.1"])) as egress:
            sending = egress.send(Outgoing("GET", f"https://api.good.test:{listener.getsockname()[1]}/"))
            if proper_end:
                assert (await sending).body == b"access_token=abc"
            else:
                with pytest.raises(OutcomeUnknown) as unknown:
                    await sending
                assert_says_nothing(unknown.value)
        await asyncio.to_thread(thread.join)


@pytest.mark.parametrize("content", [None, b"no certificates"])
def test_a_bad_authority_file_stops_the_start_by_name(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match="BROKER_EGRESS_CA_FILE"):
        Egress(development(egress_ca_file=file))


# --- E1, logs, what a request may say


async def test_proxy_variables_and_netrc_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with serving(Upstream()) as evil:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{evil.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
        (tmp_path / ".netrc").write_text(
            f"machine api.good.test login u password {CANARY}\ndefault login u password p\n"
        )
        async with plain() as (egress, upstream, origin):
            assert (await egress.send(Outgoing("GET", origin))).status == 200
            assert b"authorization" not in upstream.requests[0].lower()
            with pytest.raises(NotSent):
                await egress.send(Outgoing("GET", f"https://api.good.test:{free_port()}/"))
        assert evil.dialled == []


async def test_nothing_of_a_request_or_an_answer_reaches_the_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answer = f"HTTP/1.1 302 Found\r\nLocation: https://x.test/?code={CANARY}\r\nContent-Length: 0\r\n\r\n".encode()
    async with plain(answer) as (egress, upstream, origin):
        request = Outgoing("POST", f"{origin}/?code={CANARY}", {"Authorization": CANARY}, CANARY.encode())
        await egress.send(request)
        upstream.answer = CANARY.encode()
        with pytest.raises(OutcomeUnknown):
            await egress.send(request)
    assert CANARY not in caplog.text
    assert not [record for record in caplog.records if record.name.startswith(("httpx", "httpcore"))]


@pytest.mark.parametrize(
    "bad",
    [
        {"headers": {"X-Key": f"{CANARY}\r\nX-Evil: 1"}},
        {"headers": {"X-Key": f"{CANARY}\n"}},
        {"headers": {"X-Key": f"{CANARY}\0"}},
        {"headers": {"X-Key": f" {CANARY}"}},
        {"headers": {"X-Key": f"{CANARY}é"}},
        {"headers": {"X Key": "1"}},
        {"headers": {"X-Key:": "1"}},
        {"headers": {":authority": "evil.test"}},
        {"headers": {"": "1"}},
        {"headers": {"X-Key": "1", "x-key": "2"}},
        {"headers": {"Host": "evil.test"}},
        {"headers": {"host": "evil.test"}},
        {"headers": {"Cookie": "a=b"}},
        {"headers": {"Transfer-Encoding": "chunked"}},
        {"headers": {"Content-Length": "3"}},
        {"headers": {"Accept-Encoding": "gzip"}},
        {"headers": {"Connection": "keep-alive"}},
        {"method": "CONNECT"},
        {"method": "TRACE"},
        {"method": "get"},
        {"method": f"GET /{CANARY} HTTP/1.1\r\nX:"},
    ],
)
async def test_a_malformed_request_is_not_sent_and_not_quoted(bad: dict[str, Any]) -> None:
    async with plain() as (egress, upstream, origin):
        with pytest.raises(InternalError) as refused:
            await egress.send(Outgoing(**{"method": "POST", "url": origin, **bad}))
        assert upstream.dialled == []
    assert_says_nothing(refused.value)


async def test_a_refused_connection_is_not_sent() -> None:
    async with egress_of(development(), Resolver(["127.0.0.1"])) as egress:
        with pytest.raises(NotSent) as not_sent:
            await egress.send(Outgoing("POST", f"http://api.good.test:{free_port()}/?{CANARY}"))
    assert (not_sent.value.status, not_sent.value.code) == (502, "provider_unavailable")
    assert_says_nothing(not_sent.value, "127.0.0.1", "good")


# --- dialogues


async def test_a_dialogue_is_driven_to_its_value() -> None:
    async with plain() as (egress, upstream, origin):

        def dialogue() -> Generator[Outgoing, Incoming, int]:
            first = yield Outgoing("GET", f"{origin}/1")
            second = yield Outgoing("GET", f"{origin}/2")
            return first.status + second.status

        assert await egress.converse(dialogue(), origins=[f"{origin}/some/path"]) == 400
    assert [request.split()[1] for request in upstream.requests] == [b"/1", b"/2"]


async def test_a_dialogue_without_a_request_needs_no_origin() -> None:
    def dialogue() -> Generator[Outgoing, Incoming, str]:
        return "known already"
        yield

    async with egress_of(development(), Resolver([])) as egress:
        assert await egress.converse(dialogue(), origins=[]) == "known already"


async def test_a_dialogue_is_kept_to_its_origins_and_closed() -> None:
    closed = []

    def dialogue(url: str) -> Generator[Outgoing, Incoming, None]:
        try:
            yield Outgoing("GET", url)
        finally:
            closed.append(url)

    async with plain() as (egress, upstream, origin):
        urls = [f"https://api.good.test:{upstream.port}/", "https://u@evil.test/", origin.replace("api.", "evil.")]
        for url in urls:
            with pytest.raises(EgressDenied):
                await egress.converse(dialogue(url), origins=[origin])
        with pytest.raises(EgressDenied):
            await egress.converse(dialogue(origin), origins=[])
        with pytest.raises(EgressDenied):
            await egress.converse(dialogue(origin), origins=["not a URL"])
        assert upstream.dialled == []
    assert closed == [*urls, origin]  # one that never began has nothing to close


async def test_a_dialogue_may_make_five_requests_and_no_sixth() -> None:
    def dialogue(count: int) -> Generator[Outgoing, Incoming, str]:
        for _ in range(count):
            yield Outgoing("GET", origin)
        return "done"

    async with plain() as (egress, upstream, origin):
        assert await egress.converse(dialogue(5), origins=[origin]) == "done"
        upstream.requests.clear()
        with pytest.raises(UpstreamInvalid):
            await egress.converse(dialogue(6), origins=[origin])
        assert len(upstream.requests) == 5


async def test_a_refused_answer_is_told_in_our_words_only() -> None:
    def dialogue() -> Generator[Outgoing, Incoming, None]:
        answer = yield Outgoing("GET", origin)
        answer.json()

    def silent() -> Generator[Outgoing, Incoming, None]:
        yield Outgoing("GET", origin)
        raise ProviderAnswerError

    body = f"HTTP/1.1 200 OK\r\nContent-Length: {len(CANARY)}\r\n\r\n{CANARY}".encode()
    async with plain(body) as (egress, _, origin):
        with pytest.raises(UpstreamInvalid) as refused:
            await egress.converse(dialogue(), origins=[origin])
        assert_says_nothing(refused.value)
        assert refused.value.detail == "the answer is not JSON"
        with pytest.raises(UpstreamInvalid):
            await egress.converse(silent(), origins=[origin])


async def test_after_an_answered_request_a_dialogue_is_never_not_sent() -> None:
    def dialogue(*urls: str) -> Generator[Outgoing, Incoming, None]:
        for url in urls:
            yield Outgoing("POST", url)

    async with plain() as (egress, _, origin):
        nobody = f"http://api.good.test:{free_port()}"
        origins = [origin, nobody]
        with pytest.raises(NotSent):
            await egress.converse(dialogue(nobody), origins=origins)
        with pytest.raises(OutcomeUnknown) as unknown:
            await egress.converse(dialogue(origin, nobody), origins=origins)
    assert_says_nothing(unknown.value)


async def test_a_dialogue_has_one_deadline() -> None:
    async def slow(_upstream: Upstream, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.15)
        writer.write(OK)

    def dialogue() -> Generator[Outgoing, Incoming, None]:
        for _ in range(5):
            yield Outgoing("GET", origin)

    async with plain(slow) as (egress, upstream, origin):
        with pytest.raises(OutcomeUnknown):
            await egress.converse(dialogue(), origins=[origin], timeout_seconds=0.4)
        assert len(upstream.requests) <= 3


# --- documents


def _answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


async def test_a_document_is_fetched_as_json() -> None:
    async with plain(_answer(200, b'{"issuer": "x"}')) as (egress, upstream, origin):
        assert await egress.get_json(f"{origin}/.well-known/openid-configuration") == {"issuer": "x"}
    # as Kubernetes serves its keys: it answers 406 to who asks for plain JSON alone
    assert b"\r\nAccept: application/json, application/jwk-set+json\r\n" in upstream.requests[0]


async def test_a_document_is_asked_for_again_after_passing_trouble() -> None:
    script = [_answer(503, b""), b"", _answer(200, b"[1]")]

    async def next_of(_upstream: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(script.pop(0))

    async with plain(next_of) as (egress, upstream, origin):
        assert await egress.get_json(origin) == [1]
        assert len(upstream.requests) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_document_that_stays_unavailable_is_given_up_after_three_tries(status: int) -> None:
    async with plain(_answer(status, CANARY.encode())) as (egress, upstream, origin):
        with pytest.raises(ProviderUnavailable) as gone:
            await egress.get_json(origin)
        assert len(upstream.requests) == 3
    assert CANARY not in f"{gone.value!r}"


async def test_a_document_server_that_is_away_is_not_sent() -> None:
    resolver = Resolver(["127.0.0.1"])
    async with egress_of(development(), resolver) as egress:
        with pytest.raises(NotSent):
            await egress.get_json(f"http://api.good.test:{free_port()}/")
    assert len(resolver.asked) == 3


async def test_the_tries_for_a_document_share_one_deadline() -> None:
    async with plain(nothing) as (egress, upstream, origin):
        started = time.monotonic()
        with pytest.raises(ProviderUnavailable):
            await egress.get_json(origin, timeout_seconds=0.3)
        assert time.monotonic() - started < 1
        assert len(upstream.requests) <= 2


@pytest.mark.parametrize(
    "answer",
    [
        _answer(404, b"{}"),
        _answer(301, b"{}"),
        _answer(201, b"{}"),
        _answer(200, CANARY.encode()),
        _answer(200, b"\xff{}"),
        _answer(200, b"[" * 100_000),
        _answer(200, b""),
        _answer(200, b'"' + b"x" * 2_000_000 + b'"'),
    ],
)
async def test_what_is_not_the_document_is_refused_at_once(answer: bytes) -> None:
    async with plain(answer) as (egress, upstream, origin):
        with pytest.raises(UpstreamInvalid) as refused:
            await egress.get_json(origin)
        assert len(upstream.requests) == 1
    assert CANARY not in f"{refused.value!r}{refused.value.__context__!r}"


async def test_a_denied_document_is_not_asked_for_again() -> None:
    resolver = Resolver(["169.254.169.254"])
    async with egress_of(development(), resolver) as egress:
        with pytest.raises(EgressDenied):
            await egress.get_json("https://api.good.test/")
    assert len(resolver.asked) == 1
