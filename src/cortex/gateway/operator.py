"""What an operator asks of single nodes through the gateway: load and unload, forwarded as they are.

Decides nothing: the node does, and its answer passes through, after a look at what has become of the node.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Final

from cortex.gateway.fleet import Fleet, Node
from cortex.web.asgi import EventStream, Request, Response
from cortex.web.client import Reply
from cortex.wire import sse
from cortex.wire.errors import UnknownRoute, from_reply, to_bytes

LOAD_IDLE_TIMEOUT_S: Final = 1800.0
"""A load that is asked for without progress events says nothing until it is done."""

LAST_EVENTS: Final = ("loaded", "error")
"""How a load with progress events ends, see LoadEvent."""


class Operator:
    def __init__(self, fleet: Fleet, look: Callable[[Node], Awaitable[None]]) -> None:
        """`look` polls a node: whoever hears that an order is done may act on it with the next request."""
        self._fleet = fleet
        self._look = look

    async def load(self, request: Request) -> Response | EventStream:
        return await self._forward(request, "/models/load")

    async def unload(self, request: Request) -> Response | EventStream:
        return await self._forward(request, "/models/unload")

    async def _forward(self, request: Request, path: str) -> Response | EventStream:
        """Raises UnknownRoute for a node that is not in the configuration, NodeLost if it is away."""
        node = self._node(request.params["node"])
        body = await request.body()
        accept = request.headers.get("accept", "application/json")
        reply = await node.client.forward(path, body, accept, LOAD_IDLE_TIMEOUT_S)
        if reply.headers.get("content-type", "").startswith("text/event-stream"):
            events = _events(reply, partial(self._look, node))
            return EventStream(events, fail=lambda error: sse.encode(to_bytes(error)))
        async with reply:
            answer = await reply.read()
        await self._look(node)
        if reply.status >= 400:
            raise from_reply(reply.status, answer, reply.headers.get("retry-after"))
        return Response(answer, reply.status)

    def _node(self, name: str) -> Node:
        node = self._fleet.nodes.get(name)
        if node is None:
            known = ", ".join(sorted(self._fleet.nodes)) or "none"
            raise UnknownRoute(f"There is no node {name!r}; the configuration has: {known}.")
        return node


async def _events(reply: Reply, look: Callable[[], Awaitable[None]]) -> AsyncGenerator[bytes, None]:
    """Whole events only, so that an error at the end cannot fuse with half a one; a look before the last."""
    decoder = sse.Decoder()
    async with reply, aclosing(reply.chunks()) as chunks:
        async for chunk in chunks:
            events = decoder.feed(chunk)
            if any(event.event in LAST_EVENTS for event in events):
                await look()
            if data := b"".join(event.raw for event in events):
                yield data
