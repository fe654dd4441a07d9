"""Lets requests into the room of their data plane; who finds none is told to come later, before anything is done for it.

Health, metrics and the OpenAPI document have no room: they answer also when nothing else can. Proxied calls and webhooks
bound themselves, by what they hold.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from broker.errors import Overloaded
from broker.limits.room import Room

MOST_REQUESTS: Final = 8_000  # under way, of which most wait for a refresh: 15 KiB each
MOST_BUSY: Final = 300  # a caller alone has 200: 25 ms of work where 8,000 hand-outs a second are served
MOST_BROWSERS: Final = 200
API: Final = "/v1/"
BROWSER: Final = ("/oauth/", "/connect")

App = Callable[[Any, Any, Any], Awaitable[None]]


class Doors:
    """Stands in front of an application's routes.

    ``api``: the room of ``/v1``; whoever knows the caller takes a place in it. Browsers are told apart by their address.
    """

    def __init__(
        self,
        app: App,
        api: Room,
        address_of: Callable[[Any], str],
        refuse: Callable[[Any, Any, Overloaded], Awaitable[None]],
    ) -> None:
        """``address_of`` finds a client's address in a scope; ``refuse`` answers (scope, send, error)."""
        self._app = app
        self._api = api
        self._browsers = Room(MOST_BROWSERS)
        self._address_of = address_of
        self._refuse = refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI's own shapes
        """Serve one request. An Overloaded from within is answered here too: the framework's way costs as much as serving."""
        path = scope["path"]
        try:
            if path.startswith(API):
                self._api.enter()
                try:
                    await self._app(scope, receive, send)
                finally:
                    self._api.leave()
            elif path.startswith(BROWSER):
                await self._browser(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except Overloaded as error:
            await self._refuse(scope, send, error)

    async def _browser(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401
        self._browsers.enter()
        try:
            with self._browsers.place(self._address_of(scope)):
                await self._app(scope, receive, send)
        finally:
            self._browsers.leave()
