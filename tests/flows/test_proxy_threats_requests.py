"""Section 5 of the list of threats: what of a caller's fields and framing goes on, and what is no request at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.broker.test_listening import FRAMING, HEADS
from tests.flows.proxy_rig import (
    CANARY,
    EVIL,
    GOOD,
    PATH,
    Heard,
    Rig,
    expect_denied,
    expect_passed,
    injected,
    proxy_rig,
    values_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
INJECTED = [f"Bearer {CANARY}"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give one process for the file."""
    async with proxy_rig(tmp_path_factory.mktemp("requests")) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def rig(whole: Rig) -> AsyncIterator[Rig]:
    """Give the rig for one row, and look at what the row left."""
    await whole.mark()
    yield whole
    await whole.expect_nothing_left()


def keyed(rig: Rig, *fields: str | bytes, method: str = "GET", body: bytes = b"", start: str = "") -> bytes:
    """Return a request whose caller key stands in X-API-Key, with exactly these other fields and a Host."""
    line = start or f"{method} /proxy/{rig.connection_id}{PATH} HTTP/1.1"
    head = [line, f"Host: 127.0.0.1:{rig.port}", f"X-API-Key: {rig.caller_key}", *fields]
    head += [f"Content-Length: {len(body)}"] if body else []
    parts = [one if isinstance(one, bytes) else one.encode("latin-1") for one in head]
    return b"\r\n".join([*parts, b"", b""]) + body


def names_of(request: bytes) -> list[str]:
    """Return the names of a request's fields in lower case, in order."""
    return [
        line.partition(":")[0].lower() for line in request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    ]


# --- H1: the caller's own credentials

H1 = {
    "nothing else": (),
    "another credential": ("Authorization: Bearer of-the-caller-1234",),
    "in lower case": ("authorization: Bearer of-the-caller-1234",),
    "in capitals": ("AUTHORIZATION: Bearer of-the-caller-1234",),
    "twice": ("Authorization: Bearer of-the-caller-1234", "authorization: Basic b2YtdGhlLWNhbGxlci0xMjM0"),
    "of another scheme": ("Authorization: Basic b2YtdGhlLWNhbGxlci0xMjM0",),
    "empty": ("Authorization:",),
    "a cookie": ("Cookie: sid=of-the-caller-1234", "cookie: a=of-the-caller-1234"),
    "for a proxy": ("Proxy-Authorization: Basic b2YtdGhlLWNhbGxlci0xMjM0", "Proxy-Connection: keep-alive"),
    "an underscore": ("Authorization_: of-the-caller-1234", "X_API_Key: of-the-caller-1234"),
    "the first of two keys that are one": ("Authorization: Bearer {key}",),
}


@pytest.mark.parametrize("fields", H1.values(), ids=H1)
async def test_h1_none_of_the_callers_credentials_goes_on(rig: Rig, fields: tuple[str, ...]) -> None:
    given = [one.replace("{key}", rig.caller_key) for one in fields]
    heard, seen = await expect_passed(rig, keyed(rig, *given, "X-Mine: 1", "Connection: close"), f"GET {PATH}".encode())
    assert heard.status == 200
    assert b"of-the-caller" not in seen
    assert b"b2YtdGhlLWNhbGxlci0xMjM0" not in seen
    assert not {"cookie", "proxy-authorization", "proxy-connection", "x-api-key"} & {*names_of(seen)}
    assert values_of(seen, "x-mine") == ["1"]


async def test_h1_a_space_after_the_name_is_refused_at_the_edge(rig: Rig) -> None:
    await expect_denied(rig, keyed(rig, "Authorization : Bearer x"), refused=None)


async def test_h1_two_different_keys_are_refused(rig: Rig) -> None:
    heard = await rig.send(keyed(rig, f"Authorization: Bearer {rig.wide_key}", "Connection: close"))
    assert (heard.status, heard.code) == (400, "invalid_request")
    rig.expect_untouched()


@pytest.mark.parametrize("field", ["", "Authorization: Bearer nobody", "Authorization: Bearer {canary}"])
async def test_h1_without_a_key_of_ours_nothing_happens_and_nothing_is_chained(rig: Rig, field: str) -> None:
    line = f"GET /proxy/{rig.connection_id}{PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    given = field.replace("{canary}", "a-token-of-another-kind")
    heard = await rig.send(f"{line}{given}\r\n\r\n".encode() if given else f"{line}\r\n".encode())
    assert (heard.status, heard.code) == (401, "unauthenticated")
    assert "www-authenticate" in heard.fields
    rig.expect_untouched()
    assert await rig.records() == []


# --- H2: what Connection names

H2 = {
    "the credential": ("Connection: close, Authorization",),
    "the credential in capitals": ("Connection: AUTHORIZATION", "Connection: close"),
    "another field": ("Connection: close, X-Hop", "X-Hop: 1"),
    "the caller key": ("Connection: X-Api-Key, close",),
    "the host": ("Connection: close, Host",),
    "a companion": ("Connection: close, User-Agent, X-GitHub-Api-Version, Accept-Encoding",),
    "an ordinary field and itself": ("Connection: close, connection, X-Hop", "X-Hop: 1", "Keep-Alive: timeout=5"),
    "what it must not": ("Connection: close, te", "TE: trailers", "Trailer: X-A"),
}


@pytest.mark.parametrize("fields", H2.values(), ids=H2)
async def test_h2_what_connection_names_goes_and_what_policy_makes_stays(rig: Rig, fields: tuple[str, ...]) -> None:
    _, seen = await expect_passed(rig, keyed(rig, *fields), f"GET {PATH}".encode())
    assert not {"x-hop", "connection", "keep-alive", "te", "trailer"} & {*names_of(seen)}
    assert values_of(seen, "host") == [f"{GOOD}:{rig.good.address[1]}"]
    assert len(values_of(seen, "user-agent")) == 1
    assert values_of(seen, "accept-encoding") == ["identity"]


@pytest.mark.parametrize("named", ["Content-Length", "Transfer-Encoding", "Content-Type"])
async def test_h2_a_body_keeps_its_framing_whatever_connection_names(rig: Rig, named: str) -> None:
    request = keyed(rig, f"Connection: close, {named}", "Content-Type: text/plain", method="POST", body=b"abc")
    _, seen = await expect_passed(rig, request, f"POST {PATH}".encode())
    assert seen.endswith(b"\r\n\r\nabc")
    assert values_of(seen, "content-length") == ["3"]


# --- H4: Host, and what says that it was another


@pytest.mark.parametrize("row", [row for row in HEADS if "Host" in row])
async def test_h4_a_bad_host_is_refused_at_the_edge(rig: Rig, row: str) -> None:
    given = HEADS[row].split(b"\r\n")[1:-2]
    version = "HTTP/1.0" if "1.0" in row else "HTTP/1.1"
    head = [f"GET /proxy/{rig.connection_id}{PATH} {version}".encode(), *given]
    head += [f"Authorization: Bearer {rig.caller_key}".encode(), b"", b""]
    await expect_denied(rig, b"\r\n".join(head), refused=None)


FORWARDED = (
    *(f"X-Forwarded-Host: {EVIL}", f"Forwarded: host={EVIL};for=1.2.3.4", "X-Forwarded-For: 127.0.0.1"),
    *("X-Forwarded-Proto: http", "X-Forwarded-Port: 80", "X-Forwarded-Prefix: /x", "X-Real-IP: 127.0.0.1"),
    *(f"X-Original-URL: https://{EVIL}/", "X-Rewrite-URL: /user", f"X-Host: {EVIL}", f"X-Original-Host: {EVIL}"),
    *(f"X_Forwarded_Host: {EVIL}", "Via: 1.1 x", "Max-Forwards: 3", "X-Client-IP: 1.2.3.4"),
)


async def test_h4_the_upstreams_host_is_the_policys_whatever_the_caller_says(rig: Rig) -> None:
    request = keyed(rig, *FORWARDED, "Connection: close").replace(
        f"Host: 127.0.0.1:{rig.port}".encode(), b"Host: evil.test"
    )
    _, seen = await expect_passed(rig, request, f"GET {PATH}".encode())
    assert values_of(seen, "host") == [f"{GOOD}:{rig.good.address[1]}"]
    assert EVIL.encode() not in seen
    dropped = {one.partition(":")[0].lower() for one in FORWARDED}
    assert not dropped & {*names_of(seen)}


@pytest.mark.parametrize("name", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"])
async def test_h4_another_method_in_a_field_is_refused(rig: Rig, name: str) -> None:
    await expect_denied(rig, keyed(rig, f"{name}: DELETE", "Connection: close", method="POST"))


# --- H5: names and values


@pytest.mark.parametrize("row", [row for row in HEADS if "value" in row or "name" in row or row == "no colon"])
async def test_h5_what_is_no_field_is_refused_at_the_edge(rig: Rig, row: str) -> None:
    given = HEADS[row].split(b"\r\n", 2)[2]
    await expect_denied(rig, keyed(rig)[:-2] + given, refused=None)


H5_DENIED = {
    "a letter beyond ASCII": "X-A: caf\xe9",
    "UTF-8": "X-A: caf\xc3\xa9",
    "a tab": "X-A: a\tb",
    "a letter beyond ASCII in a dropped field": "Cookie: caf\xe9",
}


@pytest.mark.parametrize("field", H5_DENIED.values(), ids=H5_DENIED)
async def test_h5_a_value_that_is_not_plain_is_refused(rig: Rig, field: str) -> None:
    await expect_denied(rig, keyed(rig, field, "Connection: close"))


@pytest.mark.parametrize(
    "field", ["X_A: 1", "_: 1", "X-GitHub_Api-Version: 1", "Content_Length: 3", "Transfer_Encoding: chunked"]
)
async def test_h5_a_name_with_an_underscore_is_dropped(rig: Rig, field: str) -> None:
    _, seen = await expect_passed(rig, keyed(rig, field, "Connection: close"), f"GET {PATH}".encode())
    assert not any("_" in name for name in names_of(seen))


async def test_h5_plain_fields_go_out_as_they_are_and_in_order(rig: Rig) -> None:
    fields = (
        "X-A: 1",
        "X-B:  two words",
        "x-a: 2",
        "X-Empty:",
        "X-Odd!#$%&'*+.^`|~: \"'(),/:;<=>?@[]{}\\",
        "Accept: */*",
    )
    _, seen = await expect_passed(rig, keyed(rig, *fields, "Connection: close"), f"GET {PATH}".encode())
    for name in ("x-a", "x-b", "x-empty", "x-odd!#$%&'*+.^`|~", "accept"):
        assert name in names_of(seen)
    assert values_of(seen, "x-a") == ["1", "2"]
    assert values_of(seen, "x-b") == ["two words"]
    assert values_of(seen, "x-empty") == [""]
    assert values_of(seen, "x-odd!#$%&'*+.^`|~") == ["\"'(),/:;<=>?@[]{}\\"]


# --- H6: framing

WHILE_IT_RUNS = {row for row in FRAMING if row.startswith("a chunk")}


def posted(rig: Rig, row: str) -> bytes:
    """Return the row's request to the connection, with the caller's key."""
    line, _, rest = FRAMING[row].partition(b"\r\n")
    version = line.rpartition(b" ")[2].decode()
    return keyed(rig, start=f"POST /proxy/{rig.connection_id}{PATH} {version}")[:-2] + rest.partition(b"\r\n")[2]


def smuggled(rig: Rig) -> bytes:
    """Return a request that would be another one's body, or behind its end."""
    return rig.request(path="/repos/acme/smuggled")


@pytest.mark.parametrize("row", [row for row in FRAMING if row not in WHILE_IT_RUNS])
async def test_h6_framing_of_two_meanings_is_refused_and_the_connection_closed(rig: Rig, row: str) -> None:
    heard = await rig.send(posted(rig, row) + smuggled(rig))
    expect_refused(heard)
    rig.expect_untouched()
    assert await rig.records() == []


@pytest.mark.parametrize("row", sorted(WHILE_IT_RUNS))
async def test_h6_a_malformed_chunk_ends_the_request_and_no_whole_one_reaches_the_upstream(rig: Rig, row: str) -> None:
    heard = await rig.send(posted(rig, row), smuggled(rig), pause_seconds=0.05)
    expect_refused(heard)
    assert rig.asked() == rig.asked("evil") == []


async def test_h6_a_chunk_that_turns_bad_later_ends_the_request_on_both_sides(rig: Rig) -> None:
    head = keyed(rig, "Transfer-Encoding: chunked", method="POST")
    heard = await rig.send(head + b"3\r\nabc\r\n", b"+3\r\nabc\r\n0\r\n\r\n" + smuggled(rig), pause_seconds=0.3)
    assert heard.closed
    assert heard.raw.count(b"HTTP/1.1 ") <= 1
    assert heard.status in {0, 400}
    assert rig.asked() == []
    await rig.expect_sockets()


def expect_refused(heard: Heard) -> None:
    """Check for one answer, a 400 of ours, and the end of the connection."""
    assert (heard.status, heard.code) == (400, "invalid_request"), heard.raw
    assert heard.raw.count(b"HTTP/1.1 ") == 1
    assert heard.closed


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "foo"])
@pytest.mark.parametrize("framing", ["Content-Length: 60", "Transfer-Encoding: chunked"])
async def test_h6_the_body_of_a_request_for_an_upgrade_is_not_the_next_request(
    rig: Rig, upgrade: str, framing: str
) -> None:
    head = keyed(rig, "Connection: Upgrade", f"Upgrade: {upgrade}", framing, method="POST")
    heard = await rig.send(head, smuggled(rig), pause_seconds=0.1)
    assert (heard.status, heard.code) == (501, "upgrade_unsupported"), heard.raw
    assert heard.raw.count(b"HTTP/1.1 ") == 1
    assert heard.closed
    rig.expect_untouched()


async def test_h6_a_websocket_is_not_made(rig: Rig) -> None:
    fields = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    heard = await rig.send(keyed(rig, *fields, "Sec-WebSocket-Version: 13"), smuggled(rig), pause_seconds=0.1)
    assert (heard.status, heard.code) == (501, "upgrade_unsupported"), heard.raw
    assert heard.closed
    rig.expect_untouched()


async def test_h6_an_offer_of_http_2_is_passed_over(rig: Rig) -> None:
    fields = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    _, seen = await expect_passed(rig, keyed(rig, *fields) + smuggled(rig), f"GET {PATH}".encode())
    assert not {"upgrade", "http2-settings", "connection"} & {*names_of(seen)}


FRAMED = {
    "a length": (("Content-Length: 3",), b"abc"),
    "a length with zeros": (("Content-Length: 003",), b"abc"),
    "chunks": (("Transfer-Encoding: chunked",), b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"),
    "chunks in capitals": (("TRANSFER-ENCODING: CHUNKED",), b"03\r\nabc\r\n0\r\n\r\n"),
    "chunks with extensions": (("Transfer-Encoding: chunked",), b'1;a=b\r\na\r\n2;c="d"\r\nbc\r\n0\r\n\r\n'),
    "chunks with trailers": (
        ("Transfer-Encoding: chunked",),
        b"3\r\nabc\r\n0\r\nAuthorization: x\r\nX-Evil: 1\r\n\r\n",
    ),
}


@pytest.mark.parametrize(("fields", "body"), FRAMED.values(), ids=FRAMED)
async def test_h6_a_body_of_one_meaning_arrives_as_it_is(rig: Rig, fields: tuple[str, ...], body: bytes) -> None:
    heard = await rig.send(keyed(rig, *fields, "Connection: close", method="POST") + body)
    assert heard.status == 200, heard.raw
    (seen,) = rig.asked()
    assert injected(seen) == INJECTED
    assert not {"x-evil", "trailer"} & {*names_of(seen)}
    framing = (values_of(seen, "content-length"), values_of(seen, "transfer-encoding"))
    rest = seen.partition(b"\r\n\r\n")[2]
    assert (framing, rest) == ((["3"], []), b"abc") or (framing == ([], ["chunked"]) and unchunked(rest) == b"abc")


def unchunked(rest: bytes) -> bytes:
    """Return the body that chunks without extensions and trailers make."""
    body = b""
    while True:
        line, _, rest = rest.partition(b"\r\n")
        size = int(line, 16)
        if not size:
            assert rest == b"\r\n"
            return body
        body, rest = body + rest[:size], rest[size + 2 :]


async def test_h6_requests_one_after_the_other_on_a_connection_stay_apart(rig: Rig) -> None:
    first = rig.request(method="POST", body=b"first", close=False)
    heard = await rig.send(first + rig.request(path="/repos/acme/second"))
    assert heard.raw.count(b"HTTP/1.1 200 ") == 2
    assert [seen.partition(b" HTTP/")[0] for seen in rig.asked()] == [
        f"POST {PATH}".encode(),
        b"GET /repos/acme/second",
    ]
    assert rig.asked()[0].endswith(b"\r\n\r\nfirst")


async def test_h6_a_refused_request_behind_a_good_one_does_not_answer_it(rig: Rig) -> None:
    heard = await rig.send(rig.request(close=False) + keyed(rig, "Transfer-Encoding: identity, chunked", method="POST"))
    assert heard.closed
    assert heard.raw.count(b"HTTP/1.1 ") <= 1
    assert heard.status in {0, 200}


@pytest.mark.parametrize(
    ("framing", "body"),
    [
        ("Content-Length: 9", b"abc"),
        ("Content-Length: 9000000", b"abc"),
        ("Transfer-Encoding: chunked", b"3\r\nabc\r\n"),
    ],
)
async def test_h6_a_body_that_is_cut_is_no_request_to_the_upstream(rig: Rig, framing: str, body: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(keyed(rig, framing, method="POST") + body)
    await writer.drain()
    await asyncio.sleep(0.1)  # so that one which is streamed is under way
    writer.close()
    await writer.wait_closed()
    await rig.expect_sockets()
    assert rig.asked() == []
    assert reader.at_eof()


async def test_h6_what_stands_behind_a_body_is_the_next_request(rig: Rig) -> None:
    first = keyed(rig, "Content-Length: 3", method="POST")
    heard = await rig.send(first + b"abcGARBAGE\r\n\r\n")
    assert heard.closed
    assert [seen[-3:] for seen in rig.asked()] in ([], [b"abc"])
    assert heard.raw.count(b"HTTP/1.1 ") <= 1


async def test_h6_a_caller_may_wait_for_the_go_ahead_and_the_upstream_is_not_asked_for_one(rig: Rig) -> None:
    head = keyed(rig, "Expect: 100-continue", "Content-Length: 3", "Connection: close", method="POST")
    heard = await rig.send(head, b"abc", pause_seconds=0.1)
    assert heard.raw.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
    (seen,) = rig.asked()
    assert "expect" not in names_of(seen)
    assert seen.endswith(b"\r\n\r\nabc")


async def test_h6_what_is_refused_before_anybody_is_known_is_counted(rig: Rig) -> None:
    before = await refusals(rig)
    for row in ("both lengths", "identity, chunked", "two lengths"):
        expect_refused(await rig.send(posted(rig, row)))
    expect_refused(await rig.send(b"GARBAGE\r\n\r\n"))
    assert await refusals(rig) == before + 4
    assert await rig.records() == []


async def refusals(rig: Rig) -> float:
    """Return how many requests were refused at the edge, by the process's own figures."""
    text = (await rig.api.get("/metrics")).text
    counted = 'broker_http_requests_total{method="other",route="refused",status="4xx"} '
    return sum(float(line.removeprefix(counted)) for line in text.splitlines() if line.startswith(counted))
