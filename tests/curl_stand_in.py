"""Does what the pages ask of curl, for machines that have none: `make test` needs nothing but Python and make."""

from __future__ import annotations

import argparse
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import quote_plus, urlsplit

HTTP_ERROR, NO_CONNECTION, WRONG_USE = 22, 7, 2  # curl's own numbers


def main() -> int:
    """Send one request to loopback and print the answer."""
    asked = _asked()
    if urlsplit(asked.url).hostname != "127.0.0.1":
        return WRONG_USE
    for tries_left in range(asked.retry, -1, -1):
        try:
            status, body = _sent(asked)
        except OSError:
            if tries_left and asked.retry_connrefused:
                time.sleep(asked.retry_delay)
                continue
            return NO_CONNECTION
        failed = status >= 400 and (asked.fail or asked.fail_with_body)
        if not (failed and asked.fail):
            sys.stdout.buffer.write(body)
        return HTTP_ERROR if failed else 0
    return NO_CONNECTION


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("-s", "--silent", action="store_true")
    for flag in ("--show-error", "--fail", "--fail-with-body", "--retry-connrefused"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--retry", type=int, default=0)
    parser.add_argument("--retry-delay", type=float, default=1)
    parser.add_argument("-X", dest="method")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-d", dest="parts", action="append", default=[])
    parser.add_argument("--data-urlencode", dest="parts", action="append", type=_encoded)
    parser.add_argument("url")
    return parser.parse_args()


def _encoded(field: str) -> str:
    """Return `name=value` with the value percent-encoded."""
    name, _, value = field.partition("=")
    return f"{name}={quote_plus(value)}"


def _sent(asked: argparse.Namespace) -> tuple[int, bytes]:
    """Return status and body; OSError when nobody is there."""
    body = "&".join(asked.parts).encode() if asked.parts else None
    method = asked.method or ("GET" if body is None else "POST")
    request = urllib.request.Request(asked.url, body, method=method)  # noqa: S310 - loopback, checked above
    for header in asked.headers:
        name, _, value = header.partition(":")
        request.add_header(name, value.strip())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


if __name__ == "__main__":
    sys.exit(main())
