"""Proxied calls through HTTP, the rest: names below a domain, where a key may stand, odd bodies, waits, and what is away."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa

from broker.proxy.routes import SIGNED_BODY_BYTES
from providers.sigv4 import sigv4
from providers.spec import Aws, Provider, Variable
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.test_proxy import TOKEN, closed, connect, proxied, records
from tests.flows.upstream import ApiServer, Got, api_server, reply

QUICK = {"retry": {"initial_delay_seconds": 0.01}}
DOMAIN = "proxy.test"


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with api_server() as server:
        yield server


class Client:
    """A client on a raw socket, which says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Return the status and the fields of the next answer."""
        line, *rest = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
        return int(line.split()[1]), dict(one.lower().split(": ", 1) for one in rest)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return the next answer, whose length is known."""
        status, fields = await self.head()
        return status, fields, await self.reader.readexactly(int(fields.get("content-length", "0")))


@contextlib.asynccontextmanager
async def client_of(rig: Rig) -> AsyncIterator[Client]:
    host, port = rig.base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(10):
            yield Client(reader, writer)
    finally:
        writer.close()


def head_of(rig: Rig, connection: str, *fields: str, method: str = "POST", path: str = "/things") -> bytes:
    """Return a request's head."""
    lines = (f"{method} /proxy/{connection}{path} HTTP/1.1", "Host: broker", f"Authorization: Bearer {rig.admin_key}")
    return "\r\n".join((*lines, *fields, "", "")).encode()


async def refused(answer: httpx2.Response, status: int, code: str) -> None:
    """Check that this is the broker's own answer."""
    assert (answer.status_code, answer.headers.get("x-broker-error")) == (status, code), answer.text
    assert answer.json()["code"] == code


# --- names below a domain


@pytest.fixture
async def domain(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, proxy_domain=DOMAIN) as made:
        yield made


async def hosted(rig: Rig, name: str, path: str = "/things", **headers: str) -> httpx2.Response:
    """Call by the name of a connection, below the domain."""
    sent = {"Host": f"{name}.{DOMAIN}", "Authorization": f"Bearer {rig.admin_key}", **headers}
    return await rig.backend.get(path, headers=sent)


async def test_a_connection_has_a_name_below_the_domain(domain: Rig, api: ApiServer) -> None:
    connection = await connect(domain, api, config={"hosts": {"files": f"{api.base}/files"}})
    name = connection.replace("_", "-")
    assert (await hosted(domain, name, "/a%2Fb?q=1")).status_code == 200
    assert (api.last.target, api.last.field("authorization")) == ("/base/a%2Fb?q=1", f"Bearer {TOKEN}")
    assert api.last.field("host") == api.base.removeprefix("http://")
    assert (await hosted(domain, name.upper())).status_code == 200
    assert (await hosted(domain, f"{name}--files", "/x")).status_code == 200
    assert api.last.target == "/files/x"
    for path in ("/health/live", "/v1/connections", f"/proxy/{connection}/x"):
        assert (await hosted(domain, name, path)).status_code == 200
        assert api.last.target == f"/base{path}", "the whole name is the connection's"
    assert (await domain.backend.get("/health/live")).status_code == 200
    assert (await proxied(domain, connection)).status_code == 200, "the other form goes on"


async def test_links_are_rewritten_to_the_form_of_the_call(domain: Rig, api: ApiServer) -> None:
    connection = await connect(domain, api)
    api.replies(reply(link=f'<{api.base}/base/things?page=2>; rel="next"', location="/base/new"))
    name, port = connection.replace("_", "-"), domain.base.rpartition(":")[2]
    answer = await hosted(domain, name)
    assert answer.headers["link"] == f'<http://{name}.{DOMAIN}:{port}/things?page=2>; rel="next"'
    assert answer.headers["location"] == f"http://{name}.{DOMAIN}:{port}/new"
    answer = await proxied(domain, connection)
    assert answer.headers["location"] == f"{domain.base}/proxy/{connection}/new"


async def test_names_that_lead_nowhere_are_refused_and_nothing_goes_out(domain: Rig, api: ApiServer) -> None:
    connection = await connect(domain, api)
    name = connection.replace("_", "-")
    await refused(await hosted(domain, "con-" + "0" * 26), 404, "not_found")
    await refused(await hosted(domain, f"{name}--uploads"), 404, "not_found")
    for other in ("www", f"x.{name}", f"{name}--", connection):
        await refused(await hosted(domain, other), 400, "invalid_request")
    await refused(await hosted(domain, name, Authorization="Bearer none"), 401, "unauthenticated")
    async with client_of(domain) as client:
        lines = (f"Host: {name}.{DOMAIN}", "Host: broker", f"Authorization: Bearer {domain.admin_key}")
        await client.say("\r\n".join(("GET /things HTTP/1.1", *lines, "", "")).encode())
        assert (await client.head())[0] == 400
    assert api.got == []


async def test_without_the_setting_a_name_is_nothing_special(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    answer = await hosted(rig, connection.replace("_", "-"), "/health/live")
    assert answer.json() != {"ok": True}
    assert api.got == []


# --- where a key may stand


def in_basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"any:{key}".encode()).decode()


def in_sigv4(key: str) -> str:
    scope = "20261121/eu-west-1/s3/aws4_request"
    return f"AWS4-HMAC-SHA256 Credential={key}/{scope}, SignedHeaders=host;x-amz-date, Signature={'0' * 64}"


PLACES: list[Callable[[str], dict[str, str]]] = [
    lambda key: {"X-API-Key": key},
    lambda key: {"PRIVATE-TOKEN": key},
    lambda key: {"Authorization": f"token {key}"},
    lambda key: {"Authorization": in_basic(key)},
    lambda key: {"Authorization": in_sigv4(key)},
    lambda key: {"Authorization": f"Bearer {key}", "X-API-Key": key},
]


@pytest.mark.parametrize("place", PLACES)
async def test_a_key_may_stand_where_an_sdk_puts_its_credential(
    rig: Rig, api: ApiServer, place: Callable[[str], dict[str, str]]
) -> None:
    connection = await connect(rig, api)
    key = await rig.caller({"integrations": ["acme"], "may": ["proxy"]})
    answer = await rig.backend.get(f"/proxy/{connection}/things", headers=place(key))
    assert answer.status_code == 200, answer.text
    assert api.last.field("authorization") == f"Bearer {TOKEN}"
    secret = key.rpartition("_")[2]
    assert all(secret not in value for _, value in api.last.headers)
    assert all(in_basic(key) != value for _, value in api.last.headers)
    two = {**place(key), "PRIVATE-TOKEN" if "X-API-Key" in place(key) else "X-API-Key": rig.admin_key}
    answer = await rig.backend.get(f"/proxy/{connection}/things", headers=two)
    assert answer.status_code == 400, "two keys that differ"
    assert len(api.got) == 1


# --- bodies that are signed


async def signed_connection(rig: Rig, api: ApiServer) -> str:
    """Connect to a provider whose calls are signed over their whole body."""
    name = "signed"
    provider = Provider(
        name,
        name,
        "https://signed.test",
        aws=Aws(),
        signers={"aws": sigv4("made")},
        hosts={"": api.base},
        variables=(Variable("region", "[a-z0-9-]+", "eu-west-1"),),
    )
    rig.parts.integrations.catalog = {**rig.parts.integrations.catalog, name: provider}
    made = await rig.call("POST", "/v1/integrations", {"name": name, "provider": name})
    assert made.status_code == 201, made.text
    given = {
        "type": "aws",
        "access_key_id": "AKIA0123456789ABCDEF",
        "secret_access_key": "s" * 40,
        "region": "eu-west-1",
    }
    body = {"integration": name, "subject": "acme:1", "credentials": given, "account": {"id": "1"}}
    made = await rig.call("POST", "/v1/connections", body)
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def in_pieces(body: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    for at in range(0, len(body), size):
        yield body[at : at + size]


async def test_a_body_that_is_signed_is_read_whole_and_bounded(rig: Rig, api: ApiServer) -> None:
    connection = await signed_connection(rig, api)
    body = bytes(range(256)) * (SIGNED_BODY_BYTES // 256)
    assert (await proxied(rig, connection, method="POST", content=in_pieces(body, 2**20))).status_code == 200
    assert api.last.body == body
    assert api.last.field("content-length") == str(len(body))
    assert (api.last.field("authorization") or "").startswith("AWS4-HMAC-SHA256 Credential=AKIA0123456789ABCDEF/")
    assert api.last.field("transfer-encoding") is None
    for content in (body + b"x", in_pieces(body + b"x", 2**20)):
        answer = await proxied(rig, connection, method="POST", content=content)
        await refused(answer, 413, "payload_too_large")
    assert len(api.got) == 1
    assert (await proxied(rig, connection)).status_code == 200, "a call without a body is signed too"
    assert "Signature=" in (api.last.field("authorization") or "")


async def test_each_attempt_is_signed_anew(rig: Rig, api: ApiServer) -> None:
    connection = await signed_connection(rig, api)
    api.replies(reply(503, retry_after="1"), reply())
    assert (await proxied(rig, connection, method="PUT", content=b"x")).status_code == 200
    first, second = (one.field("x-amz-date") for one in api.got)
    assert first != second, "a second later"
    assert api.got[0].field("authorization") != api.got[1].field("authorization")


# --- how much


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, proxy_most_bytes=100_000) as made:
        yield made


async def test_a_body_that_is_too_long_is_refused_or_cut_on_its_way_out(narrow: Rig, api: ApiServer) -> None:
    connection = await connect(narrow, api)
    assert (await proxied(narrow, connection, method="POST", content=b"x" * 100_000)).status_code == 200
    answer = await proxied(narrow, connection, method="POST", content=b"x" * 100_001)
    await refused(answer, 413, "payload_too_large")
    assert len(api.got) == 1
    answer = await proxied(narrow, connection, method="POST", content=in_pieces(b"x" * 100_001))
    await refused(answer, 413, "payload_too_large")
    assert api.answered == 1, "the rest never came"
    await eventually(lambda: closed(api))


async def test_an_answer_that_is_too_long_is_refused_or_cut(narrow: Rig, api: ApiServer) -> None:
    connection = await connect(narrow, api)
    api.replies(reply(200, b"x" * 100_000))
    assert len((await proxied(narrow, connection)).content) == 100_000
    api.replies(reply(200, b"x" * 100_001))
    await refused(await proxied(narrow, connection), 502, "upstream_invalid")
    chunk = b"c350\r\n" + b"x" * 50_000 + b"\r\n"
    api.replies(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + 3 * chunk + b"0\r\n\r\n")
    with pytest.raises(httpx2.RemoteProtocolError):
        await proxied(narrow, connection)
    await eventually(lambda: closed(api))
    api.replies(reply())
    assert (await proxied(narrow, connection)).status_code == 200


# --- uploads


async def test_an_upload_reaches_the_api_as_it_comes(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    api.reads_bodies = False
    arrived: asyncio.Queue[bytes] = asyncio.Queue()

    async def read_slowly(_: Got, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while size := int(await reader.readline(), 16):
            await arrived.put(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readline()
        writer.write(reply(201))

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(5):
            piece = b"piece %d" % number
            yield piece
            assert await asyncio.wait_for(arrived.get(), 2) == piece, "before the next one was sent"
            await asyncio.sleep(0.05)

    api.answer = read_slowly
    assert (await proxied(rig, connection, method="POST", content=pieces())).status_code == 201


@pytest.mark.parametrize(("length", "begun"), [(1000, 0), (3_000_000, 1)])
async def test_an_upload_that_breaks_off_never_arrives_as_a_whole(
    rig: Rig, api: ApiServer, length: int, begun: int
) -> None:
    connection = await connect(rig, api)
    async with client_of(rig) as client:
        await client.say(head_of(rig, connection, f"Content-Length: {length}") + b"x" * (length // 2))

        async def came() -> bool:
            return len(api.got) == begun

        await eventually(came)
    await eventually(lambda: closed(api))
    assert (len(api.got), api.answered) == (begun, 0)
    assert (await proxied(rig, connection)).status_code == 200


async def test_what_follows_a_body_is_no_part_of_it(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    hello = head_of(rig, connection, "Content-Length: 5") + b"hello"
    async with client_of(rig) as client:
        await client.say(hello + head_of(rig, connection, "Content-Length: 4", path="/next") + b"more")
        assert [(await client.answer())[0] for _ in range(2)] == [200, 200]
    assert [(one.target, one.body) for one in api.got] == [("/base/things", b"hello"), ("/base/next", b"more")]
    async with client_of(rig) as client:
        await client.say(hello + b", and more\r\n\r\n")
        await client.reader.read()  # to its end: what follows is no request
    assert {one.body for one in api.got[2:]} <= {b"hello"}


async def test_an_answer_amid_the_upload_is_passed_on_and_the_connection_not_used_again(
    rig: Rig, api: ApiServer
) -> None:
    connection = await connect(rig, api)
    api.reads_bodies = False
    api.replies(reply(403, b'{"no": "thanks"}'))
    async with client_of(rig) as client:
        await client.say(head_of(rig, connection, "Content-Length: 3000000") + b"x" * 10_000)
        status, _, body = await client.answer()
        assert (status, body) == (403, b'{"no": "thanks"}')
        await eventually(lambda: closed(api))
    api.reads_bodies = True
    api.replies(reply())
    assert (await proxied(rig, connection)).status_code == 200


async def test_trailers_and_extensions_of_an_upload_are_dropped(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    async with client_of(rig) as client:
        head = head_of(rig, connection, "Transfer-Encoding: chunked", "Trailer: X-Sum")
        await client.say(head + b"5;a=b\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")
        assert (await client.answer())[0] == 200
        await client.say(head_of(rig, connection, method="GET"))
        assert (await client.answer())[0] == 200, "the connection goes on"
    assert [one.body for one in api.got] == [b"hello", b""]
    assert api.got[0].field("trailer") is None


async def test_who_expects_100_is_told_to_go_on(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    async with client_of(rig) as client:
        await client.say(head_of(rig, connection, "Content-Length: 5", "Expect: 100-continue"))
        assert (await client.head())[0] == 100
        await client.say(b"hello")
        assert (await client.answer())[0] == 200
    assert (api.last.body, api.last.field("expect")) == (b"hello", None)


# --- answers


BODILESS = [
    ("HEAD", reply(200, b"", content_length="1234"), 200, "1234"),
    ("HEAD", b"HTTP/1.1 200 OK\r\netag: x\r\n\r\n", 200, None),
    ("HEAD", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", 200, None),
    ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204, None),
    ("DELETE", b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", 204, None),
    ("GET", b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\n\r\n', 304, None),
    ("GET", b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\ncontent-length: 77\r\n\r\n', 304, None),
    ("GET", reply(200, b""), 200, "0"),
]


@pytest.mark.parametrize(("method", "said", "status", "length"), BODILESS)
async def test_an_answer_without_a_body_leaves_the_connection_in_step(
    rig: Rig, api: ApiServer, method: str, said: bytes, status: int, length: str | None
) -> None:
    connection = await connect(rig, api)
    api.replies(said, reply(200, b"next"))
    async with client_of(rig) as client:
        await client.say(head_of(rig, connection, method=method))
        got, fields = await client.head()
        assert (got, fields.get("content-length")) == (status, length)
        await client.say(head_of(rig, connection, method="GET"))
        got, _, body = await client.answer()
        assert (got, body) == (200, b"next")
    assert len(api.got) == 2


async def test_interim_answers_and_trailers_are_not_the_answer(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n"
    chunked = (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n6\r\n, all!\r\n0\r\nx-sum: 1\r\n\r\n"
    )
    api.replies(interim + chunked)
    for _ in range(2):
        answer = await proxied(rig, connection)
        assert (answer.status_code, answer.content) == (200, b"hello, all!")
        assert {"x-sum", "link"}.isdisjoint(answer.headers)
    assert api.open_connections == 1, "it was kept"


async def test_a_packed_stream_is_unpacked_as_it_comes(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    go_on = asyncio.Event()

    async def events(_: Got, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        packer = zlib.compressobj(wbits=31)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\nconnection: close\r\n\r\n")
        writer.write(packer.compress(b"data: one\n\n") + packer.flush(zlib.Z_SYNC_FLUSH))
        await go_on.wait()
        writer.write(packer.compress(b"data: two\n\n") + packer.flush())
        await writer.drain()
        writer.close()

    api.answer = events
    headers = {"Authorization": f"Bearer {rig.admin_key}"}
    async with rig.backend.stream("GET", f"/proxy/{connection}/events", headers=headers) as stream:
        assert "content-encoding" not in stream.headers
        pieces = stream.aiter_raw()
        async with asyncio.timeout(5):
            assert await anext(pieces) == b"data: one\n\n"
            go_on.set()
            assert [piece async for piece in pieces] == [b"data: two\n\n"]


async def test_a_frozen_stream_ends_though_its_client_does_not_read(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)

    async def flood(_: Got, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x" * 65_536)
            await writer.drain()

    api.answer = flood
    async with client_of(rig) as client:
        await client.say(head_of(rig, connection, method="GET"))
        assert (await client.head())[0] == 200
        await asyncio.sleep(0.3)  # until every buffer is full
        frozen = {"action": "freeze", "selector": {"subject": "acme:1"}, "reason": "drill"}
        assert (await rig.call("POST", "/v1/revocations", frozen)).status_code == 201
        async with asyncio.timeout(1.0):
            await eventually(lambda: closed(api))


# --- once more


async def test_a_short_retry_after_is_waited_for(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api, config=QUICK)
    api.replies(reply(429, retry_after="1"), reply())
    began = time.monotonic()
    answer = await proxied(rig, connection)
    assert (answer.status_code, answer.headers["x-broker-attempts"]) == (200, "2")
    assert 1.0 <= time.monotonic() - began < 3.0


async def test_a_provider_that_says_too_many_pauses_the_calls_of_all_and_of_no_other_integration(
    rig: Rig, api: ApiServer
) -> None:
    connection, other = await connect(rig, api), await connect(rig, api, name="other")
    api.replies(reply(429, retry_after="30"), reply())
    answer = await proxied(rig, connection, headers={"X-Broker-Retries": "0"})
    assert (answer.status_code, answer.headers.get("x-broker-error")) == (429, None)
    service = await rig.caller({"integrations": ["acme"], "may": ["proxy"]})
    for key in (rig.admin_key, service):
        answer = await proxied(rig, connection, key=key, headers={"X-Broker-Timeout-Ms": "200"})
        await refused(answer, 429, "rate_limited")
        assert 25 <= int(answer.headers["retry-after"]) <= 31
    assert len(api.got) == 1
    assert (await proxied(rig, other)).status_code == 200


async def hang_up(_: Got, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def test_a_get_that_was_never_answered_is_made_again(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api, config=QUICK)

    async def first_time(got: Got, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if got.number == 0:
            await hang_up(got, reader, writer)
        else:
            writer.write(reply())

    api.answer = first_time
    answer = await proxied(rig, connection)
    assert (answer.status_code, answer.headers["x-broker-attempts"]) == (200, "2")
    api.answer = hang_up
    answer = await proxied(rig, connection, headers={"X-Broker-Retries": "2"})
    await refused(answer, 502, "provider_unavailable")
    assert (answer.json()["outcome"], answer.headers["x-broker-attempts"]) == ("unknown", "3")


async def test_an_attempt_that_was_perhaps_received_is_told_of_whatever_came_of_the_next(
    rig: Rig, api: ApiServer
) -> None:
    async with api_server() as dying:
        connection = await connect(rig, dying, config={"retry": {"max_attempts": 2}})
        dying.replies(reply(503, retry_after="1", connection="close"))
        call = asyncio.create_task(proxied(rig, connection, method="PUT", content=b"x"))

        async def sent() -> bool:
            return len(dying.got) == 1

        await eventually(sent)
        await asyncio.sleep(0.2)  # its answer arrives
    answer = await call
    await refused(answer, 502, "provider_unavailable")
    assert (answer.headers["x-broker-attempts"], answer.json()["outcome"]) == ("2", "unknown")


async def test_callers_that_grant_no_time_do_not_stop_the_others(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)

    async def slow(_: Got, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        writer.write(reply())

    api.answer = slow
    hasty = {"X-Broker-Timeout-Ms": "20", "X-Broker-Retries": "0"}
    answers = [await proxied(rig, connection, method="POST", headers=hasty) for _ in range(25)]
    assert {answer.status_code for answer in answers} <= {502, 504}
    assert {answer.json()["outcome"] for answer in answers} <= {"unknown", "not_sent"}
    assert (await proxied(rig, connection)).status_code == 200


async def test_an_api_that_is_silent_for_as_long_as_the_integration_says_is_left_alone(
    rig: Rig, api: ApiServer
) -> None:
    breaker = {"failure_threshold": 2, "recovery_seconds": 30.0, "window_seconds": 30.0}
    connection = await connect(rig, api, config={"timeout_seconds": 1.0, "circuit_breaker": breaker})

    async def say_nothing(_: Got, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    api.answer = say_nothing
    answers = await asyncio.gather(*(proxied(rig, connection, method="POST") for _ in range(2)))
    for answer in answers:
        await refused(answer, 504, "upstream_timeout")
    await refused(await proxied(rig, connection), 503, "circuit_open")
    assert len(api.got) == 2


async def test_an_api_that_hangs_up_on_everybody_is_left_alone(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api)
    api.answer = hang_up
    for _ in range(20):
        answer = await proxied(rig, connection, method="POST", headers={"X-Broker-Timeout-Ms": "900"})
        await refused(answer, 502, "provider_unavailable")
    await refused(await proxied(rig, connection), 503, "circuit_open")
    assert len(api.got) == 20


async def test_retries_run_out_when_everything_fails(rig: Rig, api: ApiServer) -> None:
    connection = await connect(rig, api, config=QUICK)
    other = await connect(rig, api, name="other", config=QUICK)
    api.replies(reply(503))
    answers = [await proxied(rig, connection, headers={"X-Broker-Retries": "5"}) for _ in range(10)]
    attempts = [int(answer.headers["x-broker-attempts"]) for answer in answers]
    assert attempts[:4] == [6, 6, 6, 6]
    assert sum(attempts) <= 10 + 20 + 0.2 * 10
    assert attempts[-3:].count(1) >= 2
    assert (await proxied(rig, other)).headers["x-broker-attempts"] == "3", "another integration has its own"


async def test_one_call_at_a_time_probes_an_api_that_failed(rig: Rig, api: ApiServer) -> None:
    breaker = {"failure_threshold": 1, "recovery_seconds": 0.2, "window_seconds": 10.0}
    connection = await connect(rig, api, config={"circuit_breaker": breaker})
    api.replies(reply(500))
    assert (await proxied(rig, connection)).status_code == 500
    await asyncio.sleep(0.25)
    go_on = asyncio.Event()

    async def slow(_: Got, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        writer.write(reply())

    api.answer = slow
    calls = [asyncio.create_task(proxied(rig, connection)) for _ in range(5)]
    done, waiting = await asyncio.wait(calls, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    while len(done) < 4:
        more, waiting = await asyncio.wait(waiting, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert more
        done |= more
    for one in done:
        await refused(one.result(), 503, "circuit_open")
    assert len(api.got) == 2, "the one that failed and one probe"
    go_on.set()
    assert [one.result().status_code for one in (await asyncio.wait(waiting, timeout=5))[0]] == [200]
    answers = await asyncio.gather(*(proxied(rig, connection) for _ in range(3)))
    assert [answer.status_code for answer in answers] == [200, 200, 200]


async def test_a_caller_is_held_to_its_calls_a_second_and_no_other_caller(tmp_path: Path, api: ApiServer) -> None:
    async with open_rig(tmp_path, caller_calls_per_second=2) as rig:
        connection = await connect(rig, api)
        service = await rig.caller({"integrations": ["acme"], "may": ["proxy"]})
        patience = {"X-Broker-Timeout-Ms": "200"}
        answers = [await proxied(rig, connection, key=service, headers=patience) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        await refused(answers[2], 429, "rate_limited")
        assert int(answers[2].headers["retry-after"]) >= 1
        assert (await proxied(rig, connection, headers=patience)).status_code == 200
        assert len(api.got) == 3
        await asyncio.sleep(1.0)
        assert (await proxied(rig, connection, key=service, headers=patience)).status_code == 200


# --- what is taken away or is away, on both databases


@pytest.fixture
async def both(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    """Give a broker on each of the databases, which keeps no secret in memory."""
    async with open_rig(tmp_path, database_url=database_url, secret_cache_seconds=0) as made:
        yield made


async def execute(rig: Rig, statement: str) -> None:
    await rig.parts.database.transaction(lambda session: session.execute(sa.text(statement)))


@pytest.mark.parametrize("what", ["freeze", "delete", "grant"])
async def test_what_is_taken_away_between_two_attempts_is_not_sent_again(both: Rig, api: ApiServer, what: str) -> None:
    rig = both
    connection = await connect(rig, api)
    grant = {"integrations": ["acme"], "may": ["proxy"]}
    made = (await rig.call("POST", "/v1/callers", {"name": "app", "roles": ["service"], "grants": [grant]})).json()
    api.replies(reply(503, retry_after="1"), reply())
    call = asyncio.create_task(proxied(rig, connection, key=made["key"]))

    async def sent() -> bool:
        return len(api.got) == 1

    await eventually(sent)
    frozen = {"action": "freeze", "selector": {"subject": "acme:1"}, "reason": "drill"}
    taken = {
        "freeze": lambda: rig.call("POST", "/v1/revocations", frozen),
        "delete": lambda: rig.call("DELETE", f"/v1/connections/{connection}"),
        "grant": lambda: rig.call("PATCH", f"/v1/callers/{made['id']}", {"grants": [{**grant, "paths": ["/other"]}]}),
    }
    assert (await taken[what]()).status_code in {200, 201, 204}
    status, code = {"freeze": (409, "connection_frozen"), "delete": (404, "not_found"), "grant": (403, "forbidden")}[
        what
    ]
    await refused(await call, status, code)
    assert len(api.got) == 1


AWAY = {
    "audit_records": (503, "audit_unavailable"),
    "sealed_secrets": (503, "secret_store_unavailable"),
    "connections": (503, "database_unavailable"),
}


@pytest.mark.parametrize("table", AWAY)
async def test_without_what_is_needed_nothing_is_sent_and_it_heals(both: Rig, api: ApiServer, table: str) -> None:
    connection = await connect(both, api)
    assert (await proxied(both, connection)).status_code == 200
    await asyncio.sleep(0.5)  # what was looked up is believed for a moment
    await execute(both, f"ALTER TABLE {table} RENAME TO gone")
    for method in ("GET", "POST"):
        answer = await proxied(both, connection, method=method)
        await refused(answer, *AWAY[table])
        assert TOKEN not in answer.text
    assert len(api.got) == 1
    await execute(both, f"ALTER TABLE gone RENAME TO {table}")
    assert (await proxied(both, connection)).status_code == 200


async def test_a_refused_token_is_renewed_for_many_calls_at_once_with_one_refresh(both: Rig, api: ApiServer) -> None:
    rig = both
    config = {"issuer": rig.sandbox.issuer, "api_base_url": api.base}
    assert (await rig.call("PATCH", "/v1/integrations/sandbox", {"config": config})).status_code == 200
    connection = (await rig.connected())["id"]
    old: set[str | None] = set()

    async def refuse_the_old(got: Got, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = got.field("authorization")
        if not old:
            old.add(sent)
        writer.write(reply(401 if sent in old else 200))

    api.answer = refuse_the_old
    answers = await asyncio.gather(*(proxied(rig, connection) for _ in range(10)))
    assert {answer.status_code for answer in answers} == {200}
    assert rig.sandbox.state.counters.refreshes == 1


async def test_calls_and_their_records_are_the_same_on_both_databases(both: Rig, api: ApiServer) -> None:
    connection = await connect(both, api, config=QUICK)
    body = bytes(range(256)) * 100
    api.replies(reply(502), reply(201, body))
    answer = await proxied(both, connection, method="PUT", content=body)
    assert (answer.status_code, answer.content) == (201, body)
    assert [one.body for one in api.got] == [body, body]
    intent = (await records(both, "connection.proxy"))[0]
    outcome = (await eventually(lambda: records(both, "connection.proxy_outcomes")))[0]
    assert [call.split()[:4] for call in outcome.detail["calls"]] == [[intent.id, "201", "-", "2"]]
    used = (await both.call("GET", f"/v1/connections/{connection}")).json()
    assert used["last_used_at"] is not None


async def test_the_hash_of_a_signed_body_is_that_of_what_arrived(both: Rig, api: ApiServer) -> None:
    connection = await signed_connection(both, api)
    assert (await proxied(both, connection, method="POST", content=in_pieces(b"hello", 2))).status_code == 200
    told = api.last.field("x-amz-content-sha256")
    assert told in {None, hashlib.sha256(b"hello").hexdigest()}
    assert api.last.body == b"hello"
