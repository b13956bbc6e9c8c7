"""An ASGI application over a route table: the border where errors become replies.

Owns what is the same for every request: HEAD, OPTIONS and CORS, the body cap, the request id, the log
line, and the end of the work when the client leaves. Does not know what any route does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

from cortex.web.access_log import AccessLog
from cortex.web.asgi import EventStream, HeaderList, Receive, Request, Response, Scope, Send
from cortex.web.exchange import ClientGone, Exchange, too_large
from cortex.web.heartbeat import Heartbeat
from cortex.web.idle import CallLater, Clock, loop_call_later
from cortex.web.routing import (
    RenderError,
    Route,
    Router,
    canonical_error,
    choose,
    methods,
    spokesman,
)
from cortex.wire.errors import CortexError, Internal, MethodNotAllowed

__all__ = ["BODY_CAP", "Guard", "Route", "Service"]

BODY_CAP: Final = 64 * 2**20
KEEP_ALIVE_S: Final = 10.0
"""Silence after which a stream that has keep-alives sends one."""
Guard = Callable[[Request, Route | None], None]
"""Raises CortexError to refuse a request; the route is the one whose shape the refusal gets."""

_log: Final = logging.getLogger("cortex.web")


class Service:
    """An ASGI app (http and lifespan). Routes are tried in their order; `guard` stands before all of them.

    A client that leaves, or takes nothing for a minute, ends the work on its request: CancelledError in
    the handler or in the source of its EventStream, which is closed. `cut` ends it in the same way, but the
    client is told. `name` ends the access logger's name.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        *,
        name: str,
        clock: Clock = time.monotonic,
        call_later: CallLater = loop_call_later,
        body_cap: int = BODY_CAP,
        render_error: RenderError = canonical_error,
        guard: Guard | None = None,
    ) -> None:
        self._router = Router(routes)
        self._clock = clock
        self._call_later = call_later
        self._cap = body_cap
        self._render_error = render_error
        self._guard = guard
        self._access = AccessLog(name)
        self._open: dict[Exchange, Request] = {}

    def cut(self, error: CortexError) -> None:
        """End all work that is under way. Who waits for a reply gets `error`; a stream ends with it."""
        for exchange, request in self._open.items():
            if exchange.cut(error):
                request.cut = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(receive, send, cap=self._cap, clock=self._clock, call_later=self._call_later)
        request = Request(scope, self._clock(), exchange.body)
        outcome = "aborted"
        self._open[exchange] = request
        try:
            with exchange:
                outcome = await self._answer(request, exchange)
            if exchange.gone:
                outcome = "client_gone"
        finally:
            del self._open[exchange]
            seconds = self._clock() - request.started
            self._access.request(
                request, status=exchange.status, sent=exchange.sent, seconds=seconds, outcome=outcome
            )

    async def _answer(self, request: Request, exchange: Exchange) -> str:
        """Handles one request to its end and tells how it ended."""
        there = self._router.at(request)
        if request.method == "OPTIONS" and there:
            return await self._reply(request, exchange, _preflight(request, methods(there)))
        spoken_for = spokesman(request, there)
        render = spoken_for.render_error if spoken_for else self._render_error
        try:
            if self._guard is not None:
                self._guard(request, spoken_for)
            route, request.params = choose(request, there)
            request.routine = route.routine
            await self._take_body(request, exchange)
            exchange.watch()
            reply = await route.handler(request)
            if isinstance(reply, EventStream):
                return await self._stream(request, exchange, reply)
        except ClientGone:
            raise
        except (Exception, asyncio.CancelledError) as error:
            known = self._told(error, exchange, request)
            if exchange.started:
                # Half a reply is out: leaving it unfinished makes the server cut the connection.
                return "failed"
            reply = _refusal(render, known)
        return await self._reply(request, exchange, reply)

    async def _take_body(self, request: Request, exchange: Exchange) -> None:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._cap:
            raise too_large(self._cap)
        await exchange.body()

    async def _reply(self, request: Request, exchange: Exchange, reply: Response) -> str:
        headers = [*reply.headers]
        if reply.content_type is not None:
            headers.append(("content-type", reply.content_type))
        if reply.status != 204:
            headers.append(("content-length", str(len(reply.body))))
        await exchange.start(reply.status, _head(request, headers))
        await exchange.finish(b"" if request.method == "HEAD" else reply.body)
        return "ok" if reply.status < 400 else "refused" if reply.status < 500 else "failed"

    async def _stream(self, request: Request, exchange: Exchange, reply: EventStream) -> str:
        head = _head(request, [*reply.headers, ("content-type", reply.content_type), *_UNBUFFERED])

        async def put(data: bytes) -> None:
            if not exchange.started:
                await exchange.start(200, head)
            if request.method != "HEAD":
                await exchange.write(data)

        async def beat() -> None:
            if reply.keep_alive is not None:
                await put(reply.keep_alive())

        heartbeat = Heartbeat(KEEP_ALIVE_S, beat, self._clock, self._call_later)
        outcome = "ok"
        try:
            await _pump(reply, heartbeat, put, once=request.method == "HEAD")
        except ClientGone:
            raise
        except (Exception, asyncio.CancelledError) as error:
            known = self._told(error, exchange, request)
            await heartbeat.end()
            if not exchange.started:
                raise known from None
            outcome = "failed"
            await exchange.write(reply.fail(known))
        finally:
            await heartbeat.close()
            await _close(reply.source)
        if not exchange.started:
            await exchange.start(200, head)
        await exchange.finish()
        return outcome

    def _told(
        self, error: Exception | asyncio.CancelledError, exchange: Exchange, request: Request
    ) -> CortexError:
        """What the client hears of an error. Raises a cancellation that is none of ours."""
        if isinstance(error, CortexError):
            return error
        if isinstance(error, asyncio.CancelledError):
            return exchange.words_of(error)
        _log.exception("request %s: %s %r failed", request.id, request.method, request.path)
        return Internal(f"Something went wrong here; the log has it under request id {request.id}.")


async def _pump(
    reply: EventStream, heartbeat: Heartbeat, put: Callable[[bytes], Awaitable[None]], *, once: bool
) -> None:
    """Every item of the source goes out as it comes; signs of life, where wanted, while none does.

    With `once` the first item is the last: enough to know the status.
    """
    if reply.keep_alive is not None:
        heartbeat.begin()
    async for data in reply.source:
        await heartbeat.end()
        if data:
            await put(data)
            if once:
                return
        if reply.keep_alive is not None:
            heartbeat.begin()


_UNBUFFERED: Final = [("cache-control", "no-cache"), ("x-accel-buffering", "no")]
_PREFLIGHT_AGE: Final = "86400"


def _refusal(render: RenderError, error: CortexError) -> Response:
    status, headers, body = render(error)
    if isinstance(error, MethodNotAllowed) and "allow" in error.details:
        headers = [*headers, ("allow", str(error.details["allow"]))]
    has_type = any(name.lower() == "content-type" for name, _ in headers)
    return Response(body, status, headers, None if has_type else "application/json")


def _preflight(request: Request, allow: list[str]) -> Response:
    methods = ", ".join(allow)
    headers = [
        ("allow", methods),
        ("access-control-allow-methods", methods),
        ("access-control-allow-headers", request.headers.get("access-control-request-headers", "*")),
        ("access-control-max-age", _PREFLIGHT_AGE),
    ]
    return Response(b"", 204, headers, None)


def _head(request: Request, headers: HeaderList) -> list[tuple[bytes, bytes]]:
    head = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    head.append((b"x-request-id", request.id.encode()))
    if "origin" in request.headers:
        head.append((b"access-control-allow-origin", b"*"))
        head.append((b"access-control-expose-headers", b"*"))
    return head


async def _close(source: AsyncIterator[bytes]) -> None:
    aclose = getattr(source, "aclose", None)
    if aclose is not None:
        await aclose()


async def _lifespan(receive: Receive, send: Send) -> None:
    """Start-up and shutdown belong to whoever composes the program; here they are only agreed to."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
