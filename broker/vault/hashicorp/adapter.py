"""hvac over an asynchronous client: its API classes return whatever the adapter's ``request`` returns, here an awaitable."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol
from urllib.parse import urlencode

import hvac.adapters

from broker.settings import Secret
from providers.spec import Incoming, ProviderAnswerError

REQUEST_SECONDS = 4.0


class Send(Protocol):
    """What ``InternalClient.send`` does."""

    def __call__(
        self, method: str, target: str, *, headers: Mapping[str, str], body: bytes = b"", timeout_seconds: float
    ) -> Awaitable[Incoming]:
        """Send one request."""


class Refused(Exception):
    """The server answered with no success. ``reasons`` are its words, None when the answer is not one of Vault's.

    The words name paths, never a value; they are for decisions, and are not shown.
    """

    def __init__(self, status: int, reasons: tuple[str, ...] | None) -> None:
        """Keep both."""
        self.status = status
        self.reasons = reasons
        super().__init__(f"status {status}")

    @property
    def nothing_there(self) -> bool:
        """Whether Vault says that the path holds nothing. A path that no engine serves, or a proxy's 404, is another thing."""
        return self.status == 404 and self.reasons == ()

    def says(self, words: str) -> bool:
        """Whether Vault's words contain these."""
        return any(words in reason for reason in self.reasons or ())


class Adapter(hvac.adapters.Adapter):  # type: ignore[misc] # hvac has no types
    """Sends hvac's requests with one token, or none. Every method of an hvac API class then has to be awaited.

    They return Vault's JSON object, empty where it sends none, and raise ``Refused`` or ``Unreachable``. Methods of hvac that
    look at what the adapter returned do not work (``kv.v2.patch`` and a few more).
    """

    def __init__(self, send: Send, *, namespace: str | None, token: Secret | None = None) -> None:
        """Keep what every request carries. hvac's own ``__init__`` would make a synchronous session."""
        self._send = send
        self._namespace = namespace
        self._token = token

    def with_token(self, token: Secret) -> Adapter:
        """Return the same with another token."""
        return Adapter(self._send, namespace=self._namespace, token=token)

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        raise_exception: bool = True,  # noqa: ARG002, FBT001, FBT002 - hvac's signature
        **kwargs: Any,  # noqa: ANN401 - hvac passes what `requests` would take
    ) -> dict[str, Any]:
        """Send one request of hvac's; see the class."""
        query = {name: value for name, value in kwargs.get("params", {}).items() if value is not None}
        if method == "list":  # a method that some proxies refuse; Vault takes this for the same
            method, query = "get", {**query, "list": "true"}
        target = f"{url}?{urlencode(query)}" if query else url
        content = kwargs.get("json")
        body = b"" if content is None else json.dumps(content, separators=(",", ":")).encode()
        fields = {**(headers or {}), **self._headers()}
        answer = await self._send(method.upper(), target, headers=fields, body=body, timeout_seconds=REQUEST_SECONDS)
        return _document(answer)

    def _headers(self) -> dict[str, str]:
        found = {"X-Vault-Request": "true"}  # agents ask for it, against requests that a page forged
        if self._namespace is not None:
            found["X-Vault-Namespace"] = self._namespace
        if self._token is not None:
            found["X-Vault-Token"] = self._token.reveal()
        return found

    def login(self, url: str, use_token: bool = True, **kwargs: Any) -> Any:  # noqa: ANN401, ARG002, FBT001, FBT002 - hvac's
        """Send a login. hvac would look at the answer here, which is not there yet."""
        return self.post(url, **kwargs)

    def get_login_token(self, response: Mapping[str, Any]) -> str:
        """Return the token of a login's answer."""
        return str(response["auth"]["client_token"])


def _document(answer: Incoming) -> dict[str, Any]:
    """Return the JSON object of a success; ``Refused`` for everything else, also for a success that is not Vault's."""
    if answer.status == 204:
        return {}
    found: Any = None
    with contextlib.suppress(ProviderAnswerError):
        found = answer.json()
    if answer.status == 200 and isinstance(found, dict):
        return found
    raise Refused(answer.status, _reasons(found))


def _reasons(found: Any) -> tuple[str, ...] | None:  # noqa: ANN401 - JSON is any shape until it is checked
    if not isinstance(found, dict):
        return None
    told = found.get("errors", () if "data" in found else None)
    return tuple(map(str, told)) if isinstance(told, list | tuple) else None
