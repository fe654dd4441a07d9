"""The way to servers that the person at the command line names: a running broker, and an application of their own."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

import httpx2

from broker.cli.running import Refused

CONNECT_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 30.0
SHOWN_BYTES: Final = 2000


class NoAnswer(Exception):
    """Nobody answered in full; the text says what happened, and quotes nothing that was sent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said; ``body`` whole."""

    status: int
    body: bytes = field(repr=False)

    @property
    def shown(self) -> str:
        """The beginning of the body as text, for a person."""
        return self.body[:SHOWN_BYTES].decode("utf-8", "replace").strip()


class Remote:
    """Sends requests to URLs that a person named. No redirect is followed, no cookie kept, no proxy variable read.

    Addresses are not guarded: whoever types them can reach them anyway. ``SSL_CERT_FILE`` names an authority of one's own.
    """

    def __init__(self) -> None:
        """Connect nowhere."""
        timeout = httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        self._http = httpx2.AsyncClient(
            verify=httpx2.create_ssl_context(), trust_env=False, follow_redirects=False, timeout=timeout
        )

    async def send(
        self, method: str, url: str, headers: Sequence[tuple[bytes, bytes]] = (), body: bytes | None = None
    ) -> Answer:
        """Send one request and return the whole answer, whatever its status. Raises ``NoAnswer``."""
        self._http.cookies.clear()
        with _said_plainly(url):
            answer = await self._http.request(method, url, headers=list(headers), content=body)
        return Answer(answer.status_code, answer.content)

    @contextlib.asynccontextmanager
    async def stream(self, url: str, headers: Mapping[str, str], *, idle_seconds: float) -> AsyncIterator[Stream]:
        """Open a GET whose answer goes on; it ends when nothing comes for ``idle_seconds``. Raises ``NoAnswer``."""
        timeout = httpx2.Timeout(idle_seconds, connect=CONNECT_SECONDS)
        with _said_plainly(url):
            async with self._http.stream("GET", url, headers=dict(headers), timeout=timeout) as answer:
                yield Stream(answer.status_code, answer.aiter_bytes())

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer that goes on."""

    status: int
    pieces: AsyncIterator[bytes] = field(repr=False)


@contextlib.contextmanager
def _said_plainly(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, ssl.SSLError, UnicodeError) as error:
        failure = NoAnswer(f"{_origin(url)} did not answer ({type(error).__name__})")
    else:
        return
    raise failure  # outside of the except block: a library's error can quote what was sent


def checked_url(text: str, option: str) -> str:
    """Return an http or https URL without credentials or fragment, as it was given; ``Refused`` for anything else."""
    try:
        parts = urlsplit(text)
        known = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    if not known or parts.username is not None or parts.fragment or not text.isascii() or " " in text:
        raise Refused(f"{option} takes an address such as http://localhost:3000")
    return text


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
