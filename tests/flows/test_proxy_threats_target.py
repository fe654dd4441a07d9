"""Sections 1 and 2 of the list of threats: where a call may go is decided on raw bytes, and exactly those bytes go out.

Each refused target is tried by a caller who may do everything too: it is refused for what it is, not for want of a grant.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.flows.proxy_rig import CANARY, EVIL, GOOD, PATH, Rig, expect_denied, expect_passed, injected, proxy_rig

pytestmark = pytest.mark.asyncio(loop_scope="module")
DOMAIN = "proxy.example.test"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give one process for the file, which serves connections under names of their own too."""
    async with proxy_rig(tmp_path_factory.mktemp("target"), BROKER_PROXY_DOMAIN=DOMAIN) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def rig(whole: Rig) -> AsyncIterator[Rig]:
    """Give the rig for one row, and look at what the row left."""
    await whole.mark()
    yield whole
    await whole.expect_nothing_left()


async def expect_refused_for_all(rig: Rig, path: str | bytes) -> None:
    """DENY for the caller of the grant and for one who may do everything; both times with a record."""
    tail = path if isinstance(path, bytes) else path.encode("latin-1")
    for key in (rig.caller_key, rig.wide_key):
        target = f"/proxy/{rig.connection_id}".encode() + tail
        await expect_denied(rig, rig.request(target=target, key=key))
        await rig.mark()


# --- Section 1: target and URL

ELSEWHERE = {
    "U1 an absolute URL": f"/https://{EVIL}/x",
    "U1 one in capitals": f"/HTTPS://{EVIL}/x",
    "U1 one with its slashes encoded": f"/https:%2F%2F{EVIL}/x",
    "U1 one wholly encoded": f"/https%3A%2F%2F{EVIL}%2Fx",
    "U1 one encoded twice": f"/https%253A%252F%252F{EVIL}%252Fx",
    "U3 two slashes": f"//{EVIL}/x",
    "U3 three slashes": f"///{EVIL}/x",
    "U3 backslashes": f"/\\\\{EVIL}/x",
    "U3 a backslash": f"/\\{EVIL}/x",
    "U3 encoded slashes": f"/%2F%2F{EVIL}",
    "U3 an encoded slash after the slash": f"/%2f{EVIL}/x",
    "U3 slashes encoded twice": f"/%252F%252F{EVIL}",
    "U3 encoded backslashes": f"/%5c%5c{EVIL}",
    "U3 a parameter between the slashes": f"/;/{EVIL}/x",
    "U12 http": f"/http://{GOOD}/",
    "U12 file": "/file:///etc/passwd",
    "U12 ftp": f"/ftp://{EVIL}/x",
    "U12 gopher": f"/gopher://{EVIL}/x",
    "U12 ws": f"/ws://{EVIL}/x",
    "U12 no slashes": f"/HTTPS:{GOOD}",
    "U12 no host": "/https:///x",
}


@pytest.mark.parametrize("path", ELSEWHERE.values(), ids=ELSEWHERE)
async def test_a_path_that_could_be_a_url_goes_nowhere(rig: Rig, path: str) -> None:
    await expect_refused_for_all(rig, path)


async def test_u1_a_url_in_the_query_is_not_a_place_to_go(rig: Rig) -> None:
    target = f"/proxy/{rig.connection_id}?url=https://{EVIL}/"
    await expect_denied(rig, rig.request(target=target), status=403, code="forbidden", refused="path")
    await rig.mark()
    line = f"GET {PATH}?url=https://{EVIL}/&next=//{EVIL}"
    await expect_passed(rig, rig.request(path=f"{PATH}?url=https://{EVIL}/&next=//{EVIL}"), line.encode())


@pytest.mark.parametrize("url", [f"http://{EVIL}", "http://127.0.0.1", f"HTTPS://{GOOD}", "http://"])
async def test_u2_an_absolute_form_target_is_refused_at_the_edge(rig: Rig, url: str) -> None:
    target = f"{url}/proxy/{rig.connection_id}{PATH}"
    await expect_denied(rig, rig.request(target=target), refused=None)


@pytest.mark.parametrize("target", [f"{EVIL}:443", f"{GOOD}:443", "*"])
async def test_u2_a_target_that_is_no_path_is_refused_at_the_edge(rig: Rig, target: str) -> None:
    for method in ("GET", "OPTIONS", "CONNECT"):
        await expect_denied(rig, rig.request(target=target, method=method), refused=None)


@pytest.mark.parametrize(
    "target", ["/proxy/{}@evil.test/x", "/proxy/u:p@{}/x", "/proxy/{}:@evil.test/x", "/proxy/{}:u:p/x"]
)
async def test_u4_user_information_beside_the_connection_is_refused(rig: Rig, target: str) -> None:
    await expect_denied(rig, rig.request(target=target.format(rig.connection_id), key=rig.wide_key))


@pytest.mark.parametrize(
    "host", [EVIL, f"{GOOD}.{EVIL}", "2130706433", "0x7f000001", "127.1", "%00", "evil", "UPLOADS"]
)
async def test_u4_a_host_that_the_integration_has_not_is_no_host(rig: Rig, host: str) -> None:
    for key in (rig.caller_key, rig.wide_key):
        heard = await rig.send(rig.request(target=f"/proxy/{rig.connection_id}:{host}{PATH}", key=key))
        assert heard.status in {400, 403, 404}
        assert heard.code in {"invalid_request", "forbidden", "not_found"}
        rig.expect_untouched()
        (record,) = await rig.records()
        assert (record["outcome"], record["detail"]["refused"] in {"host", "invalid_request"}) == ("denied", True)
        await rig.mark()


async def test_u4_an_at_sign_in_the_path_is_a_letter_like_others(rig: Rig) -> None:
    path = f"/repos/acme/@{EVIL}/u:p@x"
    await expect_passed(rig, rig.request(path=path), f"GET {path}".encode())


BASE_URLS = {
    "U4 a host before an at sign": f"https://{GOOD}@{EVIL}/",
    "U4 user and password": f"https://u:p@{GOOD}/",
    "U4 an empty user": f"https://@{GOOD}/",
    "U5 a backslash in the host": f"https://{GOOD}\\.{EVIL}/",
    "U5 a backslash before an at sign": f"https://{EVIL}\\@{GOOD}/",
    "U5 an encoded slash in the host": f"https://{EVIL}%2F.{GOOD}/",
    "U5 a tab in the host": f"https://{GOOD}\t.{EVIL}/",
    "U8 a trailing dot": f"https://{GOOD}./",
    "U8 a trailing dot and a port": f"https://{GOOD}.:443/",
    "U9 an ideographic full stop": "https://api\u3002good\u3002test/",
    "U9 a fullwidth letter": "https://\uff41pi.good.test/",
    "U9 a Cyrillic letter": "https://api.g\u043e\u043ed.test/",
    "U9 a malformed A-label": "https://xn--a-ecp.xn--.test/",
    "U9 a zero-width joiner": "https://api\u200d.good.test/",
    "U9 a soft hyphen": "https://api.go\u00adod.test/",
    "U12 file": "file:///etc/passwd",
    "U12 ftp": f"ftp://{GOOD}/",
    "U12 gopher": f"gopher://{GOOD}/",
    "U12 ws": f"ws://{GOOD}/",
    "U12 no slashes": f"HTTPS:{GOOD}",
    "U12 no host": "https:///x",
    "U12 no scheme": f"//{GOOD}/",
    "U12 a fragment": f"https://{GOOD}/#{EVIL}",
    "D3 a decimal address": "https://2130706433/",
    "D3 a hexadecimal address": "https://0x7f000001/",
    "D3 an octal address": "https://0177.0.0.1/",
    "D3 a short address": "https://127.1/",
    "D3 zero": "https://0/",
    "D3 a number as the last label": "https://evil.1/",
    "D3 a zone": "https://[fe80::1%25eth0]/",
}


@pytest.mark.parametrize("url", BASE_URLS.values(), ids=BASE_URLS)
async def test_a_base_url_that_two_parsers_read_in_two_ways_cannot_be_configured(rig: Rig, url: str) -> None:
    body = {"name": "odd", "provider": "github", "client_id": "c", "client_secret": "not-a-canary"}
    for config in ({"api_base_url": url}, {"hosts": {"uploads": url}}):
        refused = await rig.call("POST", "/v1/integrations", {**body, "config": config}, status=400)
        assert refused["code"] == "invalid_request"
        assert url not in str(refused)
    rig.expect_untouched()


async def test_u8_a_host_in_capitals_is_the_same_host(rig: Rig) -> None:
    port = rig.good.address[1]
    await rig.integration("capitals", f"HTTPS://API.GOOD.TEST:{port}")
    connection = await rig.connection("capitals")
    heard = await rig.send(rig.request(target=f"/proxy/{connection}{PATH}", key=rig.wide_key))
    assert heard.status == 200
    (seen,) = rig.asked()
    assert f"\r\nhost: {GOOD}:{port}\r\n".encode() in seen.lower()
    assert injected(seen) == [f"Bearer {CANARY}"]


# --- Section 2: path and query. The grant's paths are /repos/acme/**

PATHS = {
    "P1 dots": "/repos/acme/../../user",
    "P1 a dot before the dots": "/repos/acme/./../secret",
    "P1 dots that come back": "/repos/acme/../acme/widgets",
    "P1 dots at the end": "/repos/acme/widgets/..",
    "P1 a dot at the end": "/repos/acme/.",
    "P1 dots at once": "/../repos/acme/widgets",
    "P1 dots with a parameter": "/repos/acme/..;x=1/user",
    "P2 encoded dots": "/repos/acme/%2e%2e/%2e%2e/user",
    "P2 the first dot encoded": "/repos/acme/%2E./user",
    "P2 the second dot encoded": "/repos/acme/.%2e/user",
    "P2 one encoded dot": "/repos/acme/%2e/user",
    "P2 encoded dots with an encoded parameter": "/repos/acme/%2e%2e%3bx/user",
    "P3 an encoded slash after dots": "/repos/acme/..%2f..%2fuser",
    "P3 an encoded backslash after dots": "/repos/acme/..%5c..%5cuser",
    "P3 an encoded backslash": "/repos/acme/a%5cb",
    "P3 a backslash": "/repos/acme\\..\\..\\user",
    "P3 encoded twice": "/repos/acme/%252e%252e%252fuser",
    "P3 encoded three times": "/repos/acme/%25252e%25252e%25252fuser",
    "P3 a backslash encoded twice": "/repos/acme/..%255cuser",
    "P3 overlong dots": "/repos/acme/%c0%ae%c0%ae/user",
    "P3 overlong dots of three bytes": "/repos/acme/%e0%80%ae%e0%80%ae/user",
    "P3 an overlong slash": "/repos/acme/..%c0%afuser",
    "P3 overlong, encoded twice": "/repos/acme/%25c0%25ae%25c0%25ae/user",
    "P3 percent-u": "/repos/acme/%u002e%u002e/user",
    "P8 NUL": "/repos/acme/a%00b",
    "P8 NUL encoded twice": "/repos/acme/a%2500b",
    "P8 a new field": "/repos/acme/a%0d%0aX-Evil:1",
    "P8 a line feed": "/repos/acme/a%0ab",
    "P8 a line feed encoded twice": "/repos/acme/a%250ab",
    "P8 DEL": "/repos/acme/a%7fb",
    "P8 no UTF-8": "/repos/acme/%ff",
    "P8 half a letter": "/repos/acme/caf%C3",
    "P8 no digits": "/repos/acme/%zz",
    "P8 a lone percent sign": "/repos/acme/%",
    "P8 one digit": "/repos/acme/%2",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
async def test_a_path_that_could_be_another_one_is_refused_not_repaired(rig: Rig, path: str) -> None:
    await expect_refused_for_all(rig, path)


async def test_p8_bytes_beyond_ascii_and_controls_are_refused_raw(rig: Rig) -> None:
    for byte in (*range(33), 0x7F, *range(0x80, 0x100)):
        for target in (b"/repos/acme/a%bb" % bytes([byte]), b"/repos/acme/a?q=%bb" % bytes([byte])):
            heard = await rig.send(rig.request(target=f"/proxy/{rig.connection_id}".encode() + target))
            assert heard.status == 400, (byte, heard.raw)
            assert heard.raw.count(b"HTTP/1.1 ") == 1
    rig.expect_untouched()


@pytest.mark.parametrize(
    "path", ["/user", "/", "", "/repos/acme", "/repos/acmes/x", "/repos/ACME/x", "/repos//acme/x", "/repos%2Facme/x"]
)
async def test_p1_a_plain_path_outside_of_the_grant_is_forbidden(rig: Rig, path: str) -> None:
    await expect_denied(rig, rig.request(path=path), status=403, code="forbidden", refused="path")


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "PROPFIND"])
async def test_a_method_outside_of_the_grant_is_forbidden(rig: Rig, method: str) -> None:
    heard = await rig.send(rig.request(method=method))
    assert (heard.status, heard.code) == (403, "forbidden")
    rig.expect_untouched()
    assert [one["detail"]["refused"] for one in await rig.records()] == ["method"]


async def test_trace_is_refused_at_the_edge(rig: Rig) -> None:
    await expect_denied(rig, rig.request(method="TRACE", key=rig.wide_key), refused=None)


PLAIN = {
    "an encoded slash": "/repos/acme/a%2Fb",
    "an encoded slash in lower case": "/repos/acme/a%2fb",
    "letters beyond ASCII": "/repos/acme/caf%C3%A9",
    "a query": "/repos/acme/x?q=a+b%20c&q=",
    "an empty query": "/repos/acme/x?",
    "question marks": "/repos/acme/x?a?b=c/d?e",
    "a query that means nothing to us": "/repos/acme/x?a=../../%2e%2e&b=%0d%0a&c=%zz&d=%ff&e=//evil.test",
    "a slash at the end": "/repos/acme/x/",
    "an empty segment": "/repos/acme/a//b",
    "letters that need no encoding": "/repos/acme/@me:1;v=2,3",
    "all letters of a path": "/repos/acme/-._~!$&'()*+,;=:@",
    "three dots": "/repos/acme/...",
    "dots in a name": "/repos/acme/..a/b../.git/a..b",
    "an encoded letter": "/repos/acme/%61",
    "an encoded percent sign": "/repos/acme/100%25",
    "an encoded question mark and hash": "/repos/acme/a%3Fb%23c",
    "a colon in the first segment below": "/repos/acme/urn:isbn:1",
}


@pytest.mark.parametrize("path", PLAIN.values(), ids=PLAIN)
async def test_a_plain_target_goes_out_byte_for_byte(rig: Rig, path: str) -> None:
    await expect_passed(rig, rig.request(path=path), f"GET {path}".encode())


async def test_a_body_goes_out_byte_for_byte(rig: Rig) -> None:
    body = bytes(range(256)) * 3
    _, seen = await expect_passed(rig, rig.request(method="POST", body=body), f"POST {PATH}".encode())
    assert seen.partition(b"\r\n\r\n")[2] == body


# --- The same where the connection stands in the host's name: there every path is the upstream's, and none is ours


def hosted(rig: Rig, target: str | bytes, *, host: str = "{name}.{domain}", key: str = "") -> bytes:
    """Return a request to the connection's own host name."""
    given = host.format(name=rig.connection_id.replace("_", "-"), domain=DOMAIN)
    request = rig.request(target=target, key=key or rig.wide_key)
    return request.replace(f"Host: 127.0.0.1:{rig.port}".encode(), f"Host: {given}".encode())


OURS = ["/v1/connections", "/metrics", "/health/live", "/connect", "/oauth/gh/start", "/proxy/{id}/repos/acme/x", "/"]


@pytest.mark.parametrize("path", [*OURS, *PLAIN.values()])
async def test_under_the_connections_own_name_every_path_is_the_upstreams(rig: Rig, path: str) -> None:
    given = path.replace("{id}", rig.connection_id)
    await expect_passed(rig, hosted(rig, given), f"GET {given}".encode())


@pytest.mark.parametrize("path", [*ELSEWHERE.values(), *PATHS.values()], ids=[*ELSEWHERE, *PATHS])
async def test_under_the_connections_own_name_the_same_paths_are_refused(rig: Rig, path: str) -> None:
    await expect_denied(rig, hosted(rig, path))


async def test_under_the_connections_own_name_the_grants_paths_count(rig: Rig) -> None:
    await expect_denied(rig, hosted(rig, "/user", key=rig.caller_key), status=403, code="forbidden", refused="path")


@pytest.mark.parametrize(
    "host", ["evil.{domain}", "{name}--.{domain}", "x.{name}.{domain}", "{name}--a--b--.{domain}", "con_x.{domain}"]
)
async def test_a_name_below_the_domain_that_is_no_connection_is_refused(rig: Rig, host: str) -> None:
    await expect_denied(rig, hosted(rig, PATH, host=host))


@pytest.mark.parametrize(
    "host",
    ["{name}@{domain}", "{name}.{domain}@evil.test", "{name}.{domain}/x", "{name}.{domain}, x", "{name}.{domain}:x"],
)
async def test_u4_an_odd_host_is_refused_at_the_edge(rig: Rig, host: str) -> None:
    await expect_denied(rig, hosted(rig, PATH, host=host), refused=None)


@pytest.mark.parametrize(
    "host", ["{name}.evil{domain}", "{name}.{domain}.evil.test", "{domain}", "{name}", "{name}.{domain}."]
)
async def test_a_name_that_is_not_below_the_domain_leads_to_our_own_routes(rig: Rig, host: str) -> None:
    heard = await rig.send(hosted(rig, PATH, host=host))
    assert heard.status == 404, heard.raw
    rig.expect_untouched()


async def test_u2_absolute_form_does_not_choose_the_connection(rig: Rig) -> None:
    url = f"http://{rig.connection_id.replace('_', '-')}.{DOMAIN}{PATH}"
    await expect_denied(rig, rig.request(target=url, key=rig.wide_key), refused=None)


async def test_u8_a_host_name_in_capitals_with_a_port_is_the_same_name(rig: Rig) -> None:
    upper = f"{rig.connection_id.replace('_', '-')}.{DOMAIN}:8000".upper()
    await expect_passed(rig, hosted(rig, PATH, host=upper), f"GET {PATH}".encode())
