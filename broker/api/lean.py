"""A POST route that serves its requests itself: for the hand-outs, which the framework's own way would make twice as dear.

Building a request object, resolving dependencies and signatures and making a response object cost 110 µs of the 210 that a
hand-out took with them. The route stays in the router, its callers in ``Authentication`` and ``Idempotency``, its errors in
the application's handlers, and its declared shape in the OpenAPI document; the same functions as for other routes decide
what a strict request is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.routes import HTTPRoute
from litestar.types import Middleware, Receive, Scope, Send

from broker.api.requests import (
    FAILED,
    MAX_BODY_BYTES,
    PATH_PART,
    Shape,
    peer_of,
    query_problems,
    read_body,
    require_path_parts,
    strict_request,
)
from broker.callers import Callers
from broker.errors import InvalidRequest, Overloaded, PayloadTooLarge
from broker.limits import Room
from broker.listening import Exchange, Lane

PASSED_BY = 2  # middlewares: Authentication and Idempotency
_PLAIN_HOST = re.compile(rb"[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?")
_FIELDS = ((b"content-type", b"application/json"), (b"cache-control", b"no-store"))
_LINES = b"".join(b"%b: %b\r\n" % one for one in _FIELDS)
_encode = msgspec.json.Encoder().encode


class LeanRoute(HTTPRouteHandler):
    """The route of an async function that returns JSON data and takes only what is listed here, by these names.

    Path parameters; ``data``, the decoded body (left out for an empty one, if it has a default); ``scope``; ``principal``;
    and parts of the application (``app.Parts``) by their names. No query parameters. The answer is 200 and never cached.
    A guard besides ``strict_request``, which this stands in for, is refused when the application is made, as is a third
    middleware: ``ExpressLane`` passes it by.
    """

    _of: Any = None  # whose parts ``_fixed`` are
    _fixed: Mapping[str, Any] = MappingProxyType({})

    def resolve_middleware(self) -> list[Middleware]:
        """Return the framework's list with this route's own way as the innermost, which calls nothing further."""
        if any(guard is not strict_request for guard in self.resolve_guards()):
            raise RuntimeError("a lean route would pass by a guard")
        outer = super().resolve_middleware()
        if len(outer) > PASSED_BY:
            raise RuntimeError("a lean route would pass by a middleware")
        return [lambda app: self._serve, *outer]  # noqa: ARG005 - it takes the place of the app

    @cached_property
    def _shape(self) -> Shape:
        field = self.parsed_data_field
        return Shape(None if field is None else field.annotation, optional=field is None or field.is_optional)

    @cached_property
    def _parts(self) -> tuple[str, ...]:
        return tuple({*self.parsed_fn_signature.parameters} & {*self.resolve_dependencies()} - {"principal"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        require_path_parts(scope["path_params"])
        body = await self.answer(scope, receive)
        if body is not None:
            await _send_json(send, body)

    async def answer(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the answer to a request whose caller is known, None when the client left in the middle of its body.

        Whether the parts of its path can be ids was looked at before. Raises what is wrong with the request, and what the
        function raises.
        """
        arguments: dict[str, Any] = dict(scope["path_params"])
        if scope["query_string"] and (problems := query_problems(scope["query_string"], ())):
            raise InvalidRequest(errors=problems)
        kind, length = _head_of_body(scope)
        if length > MAX_BODY_BYTES:
            raise PayloadTooLarge
        body = await read_body(receive)
        if body is None:
            return None
        if body or not self._shape.optional:
            arguments["data"] = self._shape.decoded(body, kind)
        return _encode(await self.fn(**arguments, **self._given(scope)))

    def _given(self, scope: Scope) -> dict[str, Any]:
        parts = scope["litestar_app"].state["parts"]
        if self._of is not parts:
            self._of, self._fixed = parts, {name: getattr(parts, name) for name in self._parts}
        return {**self._fixed, "principal": scope["state"]["principal"], "scope": scope}


def lean_post(path: str, *, responses: Mapping[int, ResponseSpec]) -> LeanRoute:
    """Return the decorator of a POST route as ``LeanRoute`` says."""
    return LeanRoute(path, http_method="POST", status_code=200, responses=responses)


_Found: TypeAlias = tuple[LeanRoute, str, dict[str, Any]]  # a route, its path's template, and what the path names


class ExpressLane:
    """Takes ordinary requests to lean routes past the router and the middleware, which cost 13 µs of the 100 of a hand-out.

    Ordinary: a POST to exactly such a path, with a plain Host and no Idempotency-Key. All else goes the framework's way,
    and so do those that fail, with their error, so that every error is answered in one place.
    """

    def __init__(self, app: Litestar, callers: Callers, room: Room) -> None:
        """Wrap the application; its lean routes must stand behind ``Authentication`` by ``callers``."""
        self._app = app
        self._callers = callers
        self._room = room
        self._routes = [
            (_pattern_of(route.path_format), route.path_format, handler)
            for route in app.routes
            if isinstance(route, HTTPRoute)
            for handler in route.route_handlers
            if isinstance(handler, LeanRoute)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        found = None
        if scope.get("method") == "POST" and not scope.get("root_path") and _is_ordinary(scope["headers"]):
            found = self._route_of(scope["path"])
        if found is None:
            await self._app(scope, receive, send)
            return
        body = await self._served(found, scope, receive, send)
        if body is not None:
            await _send_json(send, body)

    def lane(self, method: bytes, target: bytes, fields: Sequence[tuple[bytes, bytes]]) -> Lane | None:
        """Return what serves an ordinary request at a server of ours; it raises Overloaded where there is no room."""
        if method != b"POST" or b"%" in target or not _is_ordinary(fields):
            return None
        found = self._route_of(target.partition(b"?")[0].decode("latin-1"))
        return None if found is None else lambda exchange: self._serve(found, exchange)

    async def _serve(self, found: _Found, exchange: Exchange) -> None:
        scope: Any = exchange.scope
        self._room.enter()
        try:
            body = await self._served(found, scope, exchange.receive, exchange.send)  # type: ignore[arg-type] # the same
            if body is not None:
                await exchange.answer(200, _LINES, body)
        finally:
            self._room.leave()

    async def _served(self, found: _Found, scope: Scope, receive: Receive, send: Send) -> bytes | None:
        """Return the answer, None where there is nobody to answer any more, or the application did it."""
        route, scope["path_template"], scope["path_params"] = found
        scope["app"] = scope["litestar_app"] = self._app
        try:
            principal = await self._callers.authenticate(scope["headers"], peer=peer_of(scope))
            scope["state"]["principal"] = principal
            with self._room.place(principal.caller_id):
                return await route.answer(scope, receive)
        except Overloaded:
            raise  # answered outside, cheaply
        except Exception as error:  # noqa: BLE001 - raised again where errors are answered
            scope["state"][FAILED] = error
            await self._app(scope, receive, send)
            return None

    def _route_of(self, path: str) -> _Found | None:
        """Return the lean route of a path, with what the router would put into the scope."""
        for pattern, template, handler in self._routes:
            found = pattern.fullmatch(path)
            if found is not None:
                return handler, template, found.groupdict()
        return None


def _pattern_of(path_format: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", rf"(?P<\1>{PATH_PART})", re.escape(path_format)))


def _is_ordinary(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    for name, value in headers:
        if name == b"idempotency-key" or (name == b"host" and _PLAIN_HOST.fullmatch(value) is None):
            return False
    return True


def _head_of_body(scope: Scope) -> tuple[str, int]:
    """Return what a request says of its body: the first Content-Type, JSON where there is none, and the length."""
    kind, length = None, 0
    for name, value in scope["headers"]:
        if name == b"content-type" and kind is None:
            kind = value.decode("latin-1")
        elif name == b"content-length":
            length = int(value)
    return "application/json" if kind is None else kind, length


async def _send_json(send: Send, body: bytes) -> None:
    """Send an answer that nobody may keep."""
    headers = [*_FIELDS, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
