"""The client for one server of the operator's own (Vault): kept connections, bounded in number, time and size."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import httpcore2
import httpx2

from broker.settings import SettingsError
from providers.spec import Incoming

IDLE_SECONDS: Final = 30.0
MAX_ANSWER_BYTES: Final = 64 * 1024**2  # a list of a million names


class Unreachable(Exception):
    """There is no whole answer: refused, reset, too slow, no valid certificate. Whether the request arrived is unknown."""


class InternalClient:
    """Sends requests to the one origin that it was made for. Calls may run at once; ``aclose`` ends it.

    The origin comes from the operator's settings, so its address is not guarded: a Vault is in the private network. What
    holds for providers holds here too: no redirect is followed, no cookie is kept, no variable of the environment is read,
    no coded body is accepted, TLS is 1.2 or newer. Unlike there, connections are kept.
    """

    def __init__(self, origin: str, *, ca_file: Path | None, setting: str, connections: int) -> None:
        """``origin``: ``https://host:port``. ``ca_file``: authorities in place of the system's, named by ``setting``.

        The caller keeps to ``connections`` requests at once: the pool's own queue is slow when it is long.
        Raises ``SettingsError`` when the file cannot be read; connects nowhere.
        """
        self._origin = origin
        self._host = origin.partition("://")[2]
        tls = httpx2.create_ssl_context(trust_env=False) if ca_file is None else _only(ca_file, setting)
        tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=IDLE_SECONDS,
        )
        logging.getLogger("httpcore2").setLevel(logging.WARNING)  # it logs headers at DEBUG

    async def send(
        self, method: str, target: str, *, headers: Mapping[str, str], body: bytes = b"", timeout_seconds: float
    ) -> Incoming:
        """Send one request, ``target`` being path and query, and return the whole answer, whatever its status.

        A GET that breaks without a time-out is sent a second time: a kept connection may have been closed by a server that
        was restarted. Raises ``Unreachable``.
        """
        own = {"Host": self._host, "Accept-Encoding": "identity", "Content-Length": str(len(body))}
        fields = [*own.items(), *headers.items()]
        request = httpcore2.Request(method, self._origin + target, headers=fields, content=body)
        try:
            async with asyncio.timeout(timeout_seconds):
                if method == "GET":
                    with contextlib.suppress(httpcore2.NetworkError, httpcore2.RemoteProtocolError):
                        return await self._exchange(request)
                return await self._exchange(request)
        except Unreachable:
            raise
        except Exception as error:  # noqa: BLE001 - whatever broke beneath, there is no answer
            failure = Unreachable(type(error).__name__)
        raise failure  # outside of the except block: the context of a library's error can quote headers

    async def _exchange(self, request: httpcore2.Request) -> Incoming:
        response = await self._pool.handle_async_request(request)
        try:
            body = bytearray()
            async for chunk in response.aiter_stream():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise Unreachable("the answer is too large")
        finally:
            await response.aclose()
        return Incoming(response.status, {}, bytes(body))

    async def aclose(self) -> None:
        """Close every connection; requests under way break."""
        await self._pool.aclose()


def _only(ca_file: Path, setting: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=str(ca_file))
    except OSError:
        raise SettingsError(f"{setting}: cannot be read as certificates in PEM form") from None
    return context
