"""Sections 4 and 6 of the list of threats: redirects, and answers that leak, keep, blow up or could mean two things."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable
from urllib.parse import quote

import pytest
import pytest_asyncio

from tests.flows.proxy_rig import (
    CANARY,
    EVIL,
    GOOD,
    OK,
    PATH,
    Answer,
    Heard,
    Rig,
    Sink,
    answered,
    hang_up,
    proxy_rig,
    resident_bytes,
    values_of,
    written,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
MIB = 1024 * 1024
SLACK_BYTES = 32 * MIB


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give one process for the file."""
    async with proxy_rig(tmp_path_factory.mktemp("answers")) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def rig(whole: Rig) -> AsyncIterator[Rig]:
    """Give the rig for one row, and look at what the row left."""
    await whole.mark()
    yield whole
    await whole.expect_nothing_left()


# --- R1, R2: redirects


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"]
)
@pytest.mark.parametrize(
    "location",
    [
        f"https://{EVIL}/",
        f"//{EVIL}/x",
        f"https:{EVIL}",
        f"https://{GOOD}@{EVIL}/",
        f"http://{GOOD}/",
        "/\\evil.test",
        "https://",
    ],
)
async def test_r1_a_redirect_to_elsewhere_is_not_followed_and_not_told(rig: Rig, status: str, location: str) -> None:
    port = rig.good.address[1]
    rig.good.answer = answered(f"Location: {location.replace(EVIL, f'{EVIL}:{port}')}", body=b"moved", status=status)
    heard = await rig.send(rig.request())
    assert (heard.status, heard.body) == (int(status[:3]), b"moved")
    assert "location" not in heard.fields
    assert (len(rig.asked()), rig.dialled("evil"), rig.dialled("meta")) == (1, 0, 0)


POINTERS = {
    "absolute": ("Location", "https://{good}/repos/acme/new?a=%2F#b", "{proxy}/repos/acme/new?a=%2F#b"),
    "of a path": ("Location", "/repos/acme/new", "{proxy}/repos/acme/new"),
    "relative": ("Location", "gadgets?page=2", "{proxy}/repos/acme/gadgets?page=2"),
    "of the content": ("Content-Location", "https://{good}/repos/acme/new", "{proxy}/repos/acme/new"),
    "by links": (
        "Link",
        '<https://{good}/repos/acme/x?page=2>; rel="next", <https://evil.test/>; rel="last"',
        '<{proxy}/repos/acme/x?page=2>; rel="next"',
    ),
    "by a refresh": ("Refresh", "5; url=https://{good}/repos/acme/new", "5;url={proxy}/repos/acme/new"),
}


@pytest.mark.parametrize(("name", "given", "told"), POINTERS.values(), ids=POINTERS)
async def test_r1_what_points_at_the_connections_host_points_at_the_proxy(
    rig: Rig, name: str, given: str, told: str
) -> None:
    rig.good.answer = answered(f"{name}: {given.format(good=f'{GOOD}:{rig.good.address[1]}')}", status="302 Found")
    heard = await rig.send(rig.request())
    assert heard.fields[name.lower()] == told.format(proxy=f"http://127.0.0.1:{rig.port}/proxy/{rig.connection_id}")
    assert len(rig.asked()) == 1


@pytest.mark.parametrize(
    "field", [f"Refresh: 0; url=https://{EVIL}/", f"Content-Location: //{EVIL}/", f"Link: <https://{EVIL}/>; rel=next"]
)
async def test_r1_other_pointers_to_elsewhere_are_dropped(rig: Rig, field: str) -> None:
    rig.good.answer = answered(field, body=b"ok")
    heard = await rig.send(rig.request())
    assert (heard.status, heard.body) == (200, b"ok")
    assert EVIL not in heard.head.decode()


@pytest.mark.parametrize("status", ["307 Temporary Redirect", "308 Permanent Redirect"])
@pytest.mark.parametrize("host", [EVIL, GOOD])
async def test_r2_a_body_is_never_sent_again_to_where_a_redirect_points(rig: Rig, status: str, host: str) -> None:
    rig.good.answer = answered(f"Location: https://{host}:{rig.good.address[1]}/repos/acme/new", status=status)
    heard = await rig.send(rig.request(method="POST", body=b'{"secret": "of the body"}'))
    assert heard.status == int(status[:3])
    (seen,) = rig.asked()
    assert seen.endswith(b'{"secret": "of the body"}')
    assert (rig.asked("evil"), rig.dialled("evil")) == ([], 0)


# --- S1: an upstream that echoes the credential


def _base64(shift: int) -> bytes:
    return base64.b64encode(b"x" * shift + CANARY.encode() + b"tail")


ECHOED = {
    "plain": CANARY.encode(),
    "with its scheme": f"Bearer {CANARY}".encode(),
    "base64": _base64(0),
    "base64, shifted by one": _base64(1),
    "base64, shifted by two": _base64(2),
    "base64 for URLs": base64.urlsafe_b64encode(f"x:{CANARY}".encode()),
    "percent-encoded": quote(CANARY, safe="").encode(),
    "percent-encoded in lower case": quote(CANARY, safe="").replace("%2F", "%2f").replace("%2B", "%2b").encode(),
    "hexadecimal": CANARY.encode().hex().encode(),
    "hexadecimal in capitals": CANARY.encode().hex().upper().encode(),
    "JSON": json.dumps(CANARY).encode(),
    "JSON with escaped slashes": json.dumps(CANARY).replace("/", "\\/").encode(),
    "HTML": CANARY.replace("/", "&#x2F;").encode(),
    "twice": f"{CANARY}{CANARY}".encode(),
}


def _json(text: bytes) -> bytes:
    return b'{"headers": {"x": "' + text + b'"}, "more": 1}'


def _page(text: bytes) -> bytes:
    return b"<html><body><h1>500</h1><pre>Authorization: " + text + b"</pre></body></html>"


def _chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in pieces if one) + b"0\r\n\r\n"


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("text", ECHOED.values(), ids=ECHOED)
@pytest.mark.parametrize("shape", [_json, _page])
async def test_s1_an_echo_in_a_body_is_replaced_by_as_many_bytes(
    rig: Rig, text: bytes, shape: Callable[[bytes], bytes]
) -> None:
    body, status = shape(text), "200 OK" if shape is _json else "500 Internal Server Error"
    rig.good.answer = answered("Content-Type: text/plain", body=body, status=status)
    heard = await rig.send(rig.request("X-Broker-Retries: 0"))
    assert heard.status == int(status[:3])
    assert len(heard.body) == len(body)
    assert heard.body != body
    begin, _, end = shape(b"\0").partition(b"\0")
    assert heard.body.startswith(begin)
    assert heard.body.endswith(end)


@pytest.mark.parametrize("text", ECHOED.values(), ids=ECHOED)
async def test_s1_an_echo_in_a_field_is_replaced(rig: Rig, text: bytes) -> None:
    given = text.decode()
    rig.good.answer = answered(f"X-Echo: a {given} b", f"ETag: {given}", "X-Other: 1", body=b"ok")
    heard = await rig.send(rig.request())
    assert (heard.status, heard.fields["x-other"]) == (200, "1")
    assert len(heard.fields["x-echo"]) == len(f"a {given} b")
    assert heard.fields["x-echo"] != f"a {given} b"


async def test_s1_an_echo_in_a_pointer_is_replaced_or_dropped(rig: Rig) -> None:
    place = f"https://{GOOD}:{rig.good.address[1]}/repos/acme/x?token={quote(CANARY, safe='')}"
    rig.good.answer = answered(f"Location: {place}", f'Link: <{place}>; rel="next"', status="302 Found")
    heard = await rig.send(rig.request())
    assert heard.status == 302


@pytest.mark.parametrize("status", [f"200 {CANARY}", f"500 Bearer {CANARY}"])
async def test_s1_an_echo_in_the_status_line_does_not_pass(rig: Rig, status: str) -> None:
    rig.good.answer = answered(body=b"ok", status=status)
    heard = await rig.send(rig.request("X-Broker-Retries: 0"))
    assert (heard.status, heard.body) == (int(status[:3]), b"ok")


async def test_s1_an_echo_in_a_trailer_or_a_chunk_extension_does_not_pass(rig: Rig) -> None:
    rig.good.answer = CHUNKED + f'3;a="{CANARY}"\r\nabc\r\n0\r\nX-Echo: {CANARY}\r\n\r\n'.encode()
    assert (await rig.send(rig.request())).body == b"abc"


@pytest.mark.parametrize("text", [ECHOED["plain"], ECHOED["base64, shifted by one"], ECHOED["percent-encoded"]])
async def test_s1_an_echo_split_over_two_chunks_is_found_wherever_it_is_cut(rig: Rig, text: bytes) -> None:
    for at in range(1, len(text), 5):
        pieces = (b"before " + text[:at], text[at:] + b" after")
        rig.good.answer = written(
            CHUNKED, *(b"%x\r\n%b\r\n" % (len(one), one) for one in pieces), b"0\r\n\r\n", pause_seconds=0.004
        )
        heard = await rig.send(rig.request())
        assert heard.whole
        assert len(heard.body) == len(b"before " + text + b" after")
        assert heard.body.startswith(b"before ")
        assert heard.body.endswith(b" after")


async def test_s1_an_echo_byte_by_byte_is_found(rig: Rig) -> None:
    body = f"a {CANARY} b {CANARY[:-1]} c".encode()
    rig.good.answer = CHUNKED + _chunked(*(bytes([byte]) for byte in body))
    heard = await rig.send(rig.request())
    assert heard.body == f"a {'*' * len(CANARY)} b {CANARY[:-1]} c".encode()


CODED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZIP", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "two members": ("gzip", lambda body: gzip.compress(body[:20]) + gzip.compress(body[20:])),
}


@pytest.mark.parametrize(("coding", "code"), CODED.values(), ids=CODED)
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_s1_an_echo_in_a_coded_answer_is_decoded_and_found(
    rig: Rig, coding: str, code: Callable[[bytes], bytes], framing: str
) -> None:
    coded = code(_json(CANARY.encode()))
    if framing == "length":
        rig.good.answer = answered(f"Content-Encoding: {coding}", "ETag: x", body=coded)
    else:
        head = CHUNKED.replace(b"\r\n\r\n", f"\r\nContent-Encoding: {coding}\r\n\r\n".encode())
        rig.good.answer = head + _chunked(coded[:11], coded[11:])
    heard = await rig.send(rig.request("Accept-Encoding: gzip"))
    assert heard.body == _json(b"*" * len(CANARY))
    assert not {"content-encoding", "etag"} & heard.fields.keys()
    assert values_of(rig.asked()[0], "accept-encoding") == ["identity"]


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "br, gzip", "aws-chunked", "x"])
async def test_s1_a_coding_that_cannot_be_looked_into_fails(rig: Rig, coding: str) -> None:
    rig.good.answer = answered(f"Content-Encoding: {coding}", body=_json(CANARY.encode()))
    expect_failed(await rig.send(rig.request()))


async def test_s1_an_answer_without_a_credential_is_not_touched(rig: Rig) -> None:
    body = bytes(range(256)) * 40 + CANARY[:-1].encode()
    rig.good.answer = answered("X-Hint: Bearer", "Content-Type: application/octet-stream", body=body)
    heard = await rig.send(rig.request())
    assert (heard.body, heard.fields["x-hint"]) == (body, "Bearer")


async def test_s1_events_are_not_held_back(rig: Rig) -> None:
    """The sink sends its second event only when the first has reached the caller."""
    arrived = asyncio.Event()

    async def events(_sink: Sink, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED.replace(b"text/plain", b"text/event-stream") + b"9\r\ndata: 1\n\n\r\n")
        async with asyncio.timeout(10):
            await arrived.wait()
        writer.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")

    rig.good.answer = events
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(rig.request())
    async with asyncio.timeout(10):
        first = await reader.readuntil(b"data: 1\n\n")
        arrived.set()
        rest = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    assert b"text/event-stream" in first
    assert b"data: 2\n\n" in rest


async def test_s1_a_head_does_not_wait_for_the_first_piece_of_its_body(rig: Rig) -> None:
    """The sink sends its first event only when the head has reached the caller."""
    arrived = asyncio.Event()

    async def events(_sink: Sink, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED.replace(b"text/plain", b"text/event-stream"))
        async with asyncio.timeout(10):
            await arrived.wait()
        writer.write(b"9\r\ndata: 1\n\n\r\n0\r\n\r\n")

    rig.good.answer = events
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(rig.request())
    async with asyncio.timeout(10):
        assert b"text/event-stream" in await reader.readuntil(b"\r\n\r\n")
        arrived.set()
        assert b"data: 1\n\n" in await reader.read(-1)
    writer.close()
    await writer.wait_closed()


# --- S2: cookies


async def test_s2_a_cookie_is_neither_passed_on_nor_kept(rig: Rig) -> None:
    rig.good.answer = answered("Set-Cookie: sid=T1; Path=/", "set-cookie: a=b", "Set-Cookie2: c=d", body=b"{}")
    first = await rig.send(rig.request())
    assert not {"set-cookie", "set-cookie2"} & first.fields.keys()
    other = await rig.connection("gh", token="a-second-token-of-nobody", subject="acme:43")
    second = await rig.send(rig.request(target=f"/proxy/{other}{PATH}"))
    third = await rig.send(rig.request())
    assert (first.status, second.status, third.status) == (200, 200, 200)
    assert not any(b"cookie" in request.lower() for request in rig.asked())
    assert len(rig.asked()) == 3


HOP = (
    "Connection: keep-alive, X-Hop",
    "X-Hop: 1",
    "Keep-Alive: timeout=9",
    "Proxy-Authenticate: Basic",
    "Upgrade: h2c",
)
OURS = (
    "X-Broker-Error: forged",
    "X-Broker-Attempts: 99",
    "Access-Control-Allow-Origin: *",
    "X-Accel-Redirect: /secret",
)
MORE = ("Strict-Transport-Security: max-age=9", 'Alt-Svc: h3=":443"', 'Clear-Site-Data: "*"', "X-Sendfile: /etc/passwd")


async def test_s2_fields_about_the_hop_the_origin_or_us_are_not_passed_on(rig: Rig) -> None:
    rig.good.answer = answered(
        *HOP, *OURS, *MORE, "X-Request-Id: theirs", "Date: Thu, 01 Jan 1970 00:00:00 GMT", body=b"ok"
    )
    heard = await rig.send(rig.request())
    dropped = {one.partition(":")[0].lower() for one in (*HOP, *OURS, *MORE)} - {"connection", "x-broker-attempts"}
    assert not dropped & heard.fields.keys()
    assert heard.fields["x-broker-attempts"] == "1"
    assert heard.fields["x-request-id"] == "theirs"
    assert heard.fields["date"] == "Thu, 01 Jan 1970 00:00:00 GMT"
    assert heard.fields["connection"] == "close"  # what this caller asked for


# --- S3: bombs


def expect_failed(heard: Heard, code: str = "upstream_invalid") -> None:
    """FAIL: a 502 with a body that the broker made; one that went wrong in the middle must not look whole."""
    assert (heard.status, heard.code) == (502, code), heard.raw[:2000]
    assert heard.whole
    assert json.loads(heard.body)["code"] == code


async def test_s3_a_bomb_of_gzip_is_defused_in_bounded_memory(rig: Rig) -> None:
    coder, zeros = zlib.compressobj(9, zlib.DEFLATED, 31), bytes(MIB)
    bomb = b"".join(coder.compress(zeros) for _ in range(200)) + coder.flush()
    assert len(bomb) < 300_000
    rig.good.answer = answered("Content-Encoding: gzip", body=bomb)
    before = resident_bytes(rig.pid)
    heard = await rig.send(rig.request())
    assert not heard.whole or heard.code == "upstream_invalid"
    assert len(heard.raw) < 200 * MIB
    assert resident_bytes(rig.pid) - before < SLACK_BYTES
    assert (await rig.outcome())[1] == "upstream_invalid"
    await expect_not_reused(rig)


async def test_s3_a_large_coded_answer_that_is_no_bomb_passes_in_bounded_memory(rig: Rig) -> None:
    body = b"".join(b"%d," % (number * 7919 % 100_003) for number in range(20_000)) * 300
    rig.good.answer = answered("Content-Encoding: gzip", body=gzip.compress(body, 1))
    before = resident_bytes(rig.pid)
    heard = await rig.send(rig.request())
    assert heard.whole
    assert heard.body == body
    assert resident_bytes(rig.pid) - before < SLACK_BYTES


@pytest.mark.parametrize("coding", [", ".join(["gzip"] * 20), ", ".join(["gzip"] * 2000)])
async def test_s3_nested_codings_fail(rig: Rig, coding: str) -> None:
    body = b"x"
    for _ in range(20):
        body = gzip.compress(body)
    rig.good.answer = answered(f"Content-Encoding: {coding}", body=body)
    expect_failed(await rig.send(rig.request()))


async def test_s3_nested_codings_in_fields_of_their_own_fail(rig: Rig) -> None:
    rig.good.answer = answered(*["Content-Encoding: gzip"] * 20, body=gzip.compress(b"x"))
    expect_failed(await rig.send(rig.request()))


BROKEN = {
    "no gzip at all": b'{"plain": "JSON"}',
    "a cut": gzip.compress(b"x" * 1000)[:-9],
    "a wrong sum": gzip.compress(b"x" * 1000)[:-8] + bytes(8),
    "more behind its end": gzip.compress(b"x" * 1000) + b"behind",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
async def test_s3_what_is_not_of_its_coding_never_looks_whole(rig: Rig, body: bytes) -> None:
    rig.good.answer = answered("Content-Encoding: gzip", body=body)
    heard = await rig.send(rig.request())
    assert not heard.whole or heard.code == "upstream_invalid"
    assert (await rig.outcome())[1] == "upstream_invalid"


async def test_s3_an_endless_head_fails(rig: Rig) -> None:
    rig.good.answer = written(b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"a" * 70_000, pause_seconds=0.2)
    expect_failed(await rig.send(rig.request("X-Broker-Retries: 0")), "provider_unavailable")


# --- S4: framing of answers

MALFORMED = {
    "both lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "two equal lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "two lengths in a field": b"HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nabc",
    "a length with a sign": b"HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nabc",
    "a hexadecimal length": b"HTTP/1.1 200 OK\r\nContent-Length: 0x3\r\n\r\nabc",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc",
    "identity, chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "chunked twice": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "a vertical tab": b"HTTP/1.1 200 OK\r\nTransfer-Encoding:\x0bchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc",
    "one bare line feed": b"HTTP/1.1 200 OK\r\nX-A: 1\nContent-Length: 3\r\n\r\nabc",
    "a bare carriage return": b"HTTP/1.1 200 OK\r\nX-A: 1\rX-B: 2\r\nContent-Length: 3\r\n\r\nabc",
    "a folded field": b"HTTP/1.1 200 OK\r\nX-A: 1\r\n 2\r\nContent-Length: 3\r\n\r\nabc",
    "a folded coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "a NUL": b"HTTP/1.1 200 OK\r\nX-A: 1\x002\r\nContent-Length: 3\r\n\r\nabc",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 3\r\n\r\nabc",
    "a space in a name": b"HTTP/1.1 200 OK\r\nX A: 1\r\nContent-Length: 3\r\n\r\nabc",
    "no colon": b"HTTP/1.1 200 OK\r\nXabc\r\nContent-Length: 3\r\n\r\nabc",
    "no number": b"HTTP/1.1 OK\r\nContent-Length: 3\r\n\r\nabc",
    "another version": b"HTTP/2.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nabc",
    "nothing": b"",
}
CUT_LATER = {
    "a length that is too long": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
    "chunks without an end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "a chunk that is too short": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc\r\n0\r\n\r\n",
    "a chunk with a sign": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n",
    "a chunk with 0x": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
    "a chunk that ends in a line feed": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\n0\n\n",
    "a chunk of more than it says": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
    "a chunk beyond 64 bits": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n0\r\n\r\n",
}
ADDED_LATER = {
    "a length that is too short": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcpoison",
    "an answer to nobody": answered(body=b"abc") + answered(body=b"poison"),
    "bytes behind the last chunk": CHUNKED + _chunked(b"abc") + answered(body=b"poison"),
    "an answer in chunks behind the last chunk": (CHUNKED + _chunked(b"abc")) + (CHUNKED + _chunked(b"poison")),
    "chunks behind the last chunk": CHUNKED + _chunked(b"abc") + _chunked(b"poison"),
    "a body for 204": b"HTTP/1.1 204 No Content\r\nContent-Length: 6\r\n\r\npoison",
    "a body for 304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\npoison",
}


async def expect_not_reused(rig: Rig) -> None:
    """Check that the last request's connection is closed, and that the next call gets its own answer on another one."""
    before = rig.good.via[-1]
    rig.good.answer = OK
    heard = await rig.send(rig.request())
    assert (heard.status, heard.body) == (200, OK.partition(b"\r\n\r\n")[2])
    assert rig.good.via[-1] != before
    async with asyncio.timeout(10):
        while before not in rig.good.ended:  # noqa: ASYNC110 - another process closes it
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED)
async def test_s4_a_head_of_two_meanings_fails_and_its_connection_is_closed(rig: Rig, answer: bytes) -> None:
    rig.good.answer = written(answer, close=not answer or answer.startswith(b"SSH"))
    heard = await rig.send(rig.request("X-Broker-Retries: 0"))
    expect_failed(heard, "provider_unavailable")
    assert b"abc" not in heard.body.partition(b"request_id")[0]
    await expect_not_reused(rig)


@pytest.mark.parametrize("answer", CUT_LATER.values(), ids=CUT_LATER)
async def test_s4_a_body_that_is_cut_or_malformed_never_looks_whole(rig: Rig, answer: bytes) -> None:
    rig.good.answer = written(answer)
    heard = await rig.send(rig.request("X-Broker-Retries: 0"))
    assert heard.closed
    assert not heard.whole or heard.status == 502, heard.raw
    assert (await rig.outcome())[1] == "provider_unavailable"
    await expect_not_reused(rig)


@pytest.mark.parametrize("answer", ADDED_LATER.values(), ids=ADDED_LATER)
async def test_s4_bytes_behind_an_answer_are_nobodys_answer(rig: Rig, answer: bytes) -> None:
    rig.good.answer = answer
    heard = await rig.send(rig.request())
    assert heard.status in {200, 204, 304}
    assert b"poison" not in heard.raw
    assert heard.body in {b"abc", b""}
    await expect_not_reused(rig)


@pytest.mark.parametrize("answer", [answered(body=b"poison"), CHUNKED + _chunked(b"poison")], ids=["length", "chunks"])
async def test_s4_a_body_for_head_is_nobodys_answer(rig: Rig, answer: bytes) -> None:
    rig.good.answer = answer
    heard = await rig.send(rig.request(method="HEAD", key=rig.wide_key))
    assert (heard.status, heard.body) == (200, b"")
    assert b"poison" not in heard.raw
    await expect_not_reused(rig)


async def test_s4_answers_are_not_mixed_up_while_connections_turn_bad(rig: Rig) -> None:
    """Each caller gets the answer to its own path, or an error, never another's."""

    async def own(sink: Sink, writer: asyncio.StreamWriter) -> None:
        path = sink.requests[-1].split(b" ")[1]
        number = int(path.rpartition(b"/")[2])
        await asyncio.sleep(0.002 * (number % 5))
        answer = answered(body=path)
        kinds = (
            answer,
            answer + answered(body=b"poison"),
            answer[:-3],
            CHUNKED + _chunked(path) + answered(body=b"poison"),
        )
        writer.write(kinds[number % 4])
        if number % 4 == 2:
            writer.close()

    rig.good.answer = own
    heard = await asyncio.gather(
        *(rig.send(rig.request("X-Broker-Retries: 0", path=f"/repos/acme/{number}")) for number in range(120))
    )
    for number, one in enumerate(heard):
        assert b"poison" not in one.raw
        if number % 4 == 2:
            assert not one.whole or one.status == 502
        else:
            assert (one.status, one.body) == (200, f"/repos/acme/{number}".encode())


async def test_s4_what_comes_late_behind_an_answer_is_nobodys_either(rig: Rig) -> None:
    read, sent = asyncio.Event(), asyncio.Event()

    async def twice(_sink: Sink, writer: asyncio.StreamWriter) -> None:
        writer.write(answered(body=b"abc"))
        async with asyncio.timeout(10):
            await read.wait()
        writer.write(answered(body=b"poison"))
        await writer.drain()
        sent.set()

    rig.good.answer = twice
    assert (await rig.send(rig.request())).body == b"abc"
    read.set()
    async with asyncio.timeout(10):
        await sent.wait()
    await expect_not_reused(rig)


async def test_s4_an_upstream_that_hangs_up_fails_and_a_post_is_not_sent_twice(rig: Rig) -> None:
    rig.good.answer = hang_up
    heard = await rig.send(rig.request(method="POST", body=b"{}"))
    expect_failed(heard, "provider_unavailable")
    assert len(rig.asked()) == 1
    await expect_not_reused(rig)


async def test_s4_an_upstream_that_says_nothing_times_out(rig: Rig) -> None:
    async def nothing(_sink: Sink, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0)

    rig.good.answer = nothing
    heard = await rig.send(rig.request("X-Broker-Timeout-Ms: 300", "X-Broker-Retries: 0"))
    assert (heard.status, heard.code) == (504, "upstream_timeout"), heard.raw
    await expect_not_reused(rig)


FRAMED: dict[str, tuple[Answer, bytes]] = {
    "a length": (answered(body=b"abc"), b"abc"),
    "no body": (answered(), b""),
    "chunks": (CHUNKED + _chunked(b"a", b"bc"), b"abc"),
    "chunks with extensions and trailers": (CHUNKED + b"3;x=y\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n", b"abc"),
    "the end of the connection": (written(b"HTTP/1.1 200 OK\r\n\r\nabc"), b"abc"),
    "HTTP/1.0": (written(b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc"), b"abc"),
    "an interim answer": (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + answered(body=b"abc"), b"abc"),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
    "a letter beyond ASCII": (answered("X-Name: x", body=b"abc").replace(b": x", b": caf\xe9"), b"abc"),
    "byte by byte": (
        written(*(bytes([one]) for one in answered(body=b"abc")), pause_seconds=0.001, close=False),
        b"abc",
    ),
}


@pytest.mark.parametrize(("answer", "body"), FRAMED.values(), ids=FRAMED)
async def test_s4_an_answer_of_one_meaning_is_framed_anew(rig: Rig, answer: Answer, body: bytes) -> None:
    rig.good.answer = answer
    heard = await rig.send(rig.request())
    assert (heard.status, heard.body) == (200, body)
    assert heard.whole
    assert "x-trailer" not in heard.fields


@pytest.mark.parametrize(("answer", "body"), FRAMED.values(), ids=FRAMED)
async def test_s4_a_caller_of_http_1_0_gets_no_chunks(rig: Rig, answer: Answer, body: bytes) -> None:
    rig.good.answer = answer
    heard = await rig.send(rig.request().replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1))
    assert heard.status == 200
    assert "transfer-encoding" not in heard.fields
    assert heard.raw.endswith(b"\r\n\r\n" + body)
    assert heard.closed
