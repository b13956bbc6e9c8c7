"""The load: keep-alive connections that ask again as soon as an answer is complete, for a set time.

Every answer is checked; only whole ones are counted. Raw protocols on uvloop, so that the load itself
costs a fraction of what any gateway does. Knows the exchange, and of a gateway only its port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final, cast

from . import exchange
from .exchange import Kind
from .reply import Reply

_PATIENCE: Final = 60.0
"""Seconds that the answers still under way at the end of a window may take."""
_MOST_FAULTS: Final = 20
"""Faults after which a window is given up."""


@dataclass
class Window:
    """What one stretch of load found. Times in seconds, one entry a whole answer."""

    kind: Kind
    whole: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Until the first event, streamed answers only."""
    faults: list[str] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One TCP connection, one question at a time."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.reply: Reply | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes) -> asyncio.Future[Reply]:
        self.reply = Reply()
        self.first_event = 0.0
        self.answer: asyncio.Future[Reply] = self.loop.create_future()
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        if self.reply is None or self.answer.done():
            return
        if not self.first_event and b"data:" in data:
            self.first_event = perf_counter()
        try:
            if self.reply.feed(data):
                self.answer.set_result(self.reply)
        except ValueError as error:
            self.answer.set_exception(ConnectionError(f"not an HTTP reply: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.reply is not None and not self.answer.done():
            self.answer.set_exception(ConnectionError("the connection broke in the middle of an answer"))


class _Client:
    """Asks one question after another; opens a new connection when the server closed the last one."""

    def __init__(self, port: int, request: bytes, window: Window) -> None:
        self.port, self.request, self.window = port, request, window
        self.loop = asyncio.get_running_loop()
        self.connection: _Connection | None = None

    async def run(self, until: float, after: float = 0.0, every: float = 0.0) -> None:
        """Ask at least once, and until the loop's clock says `until`.

        A question follows `every` seconds after the last one, or at once if the answer took longer.
        """
        if after:
            await asyncio.sleep(after)
        due = self.loop.time()
        while len(self.window.faults) < _MOST_FAULTS:
            try:
                await self.ask()
            except OSError as error:
                self.window.faults.append(str(error))
                self.close()
            due = max(due + every, self.loop.time())
            if due >= until:
                return
            if every:
                await asyncio.sleep(due - self.loop.time())

    async def ask(self) -> None:
        connection = self.connection
        if connection is None or connection.lost:
            _, connection = await self.loop.create_connection(_Connection, "127.0.0.1", self.port)
            self.connection = connection
        asked = perf_counter()
        reply = await connection.ask(self.request)
        took = perf_counter() - asked
        if reply.closes:
            self.close()
        fault = exchange.fault(self.window.kind, reply.status, reply.body)
        if fault:
            self.window.faults.append(fault)
            return
        self.window.whole.append(took)
        if connection.first_event:
            self.window.first.append(connection.first_event - asked)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.transport.close()
            self.connection = None


async def apply(
    port: int,
    kind: Kind,
    connections: int,
    seconds: float,
    every: float = 0.0,
    mark: Callable[[], None] = lambda: None,
) -> Window:
    """Load `port` for `seconds`, each connection asking `every` so many seconds, and return what came back.

    `mark` is called when every connection is open and has had one answer, before the first counted
    question. Faults of the uncounted answers count all the same.
    """
    window = Window(kind)
    request = _request(port, kind)
    clients = [_Client(port, request, window) for _ in range(connections)]
    now = asyncio.get_running_loop().time
    try:
        await _together(clients, 0.0, 0.0)
        window.whole.clear()
        window.first.clear()
        mark()
        await _together(clients, now() + seconds, every)
    except TimeoutError:
        window.faults.append(f"answers were missing {_PATIENCE:.0f} s after the last question")
    finally:
        for client in clients:
            client.close()
    return window


async def _together(clients: list[_Client], until: float, every: float) -> None:
    """Run all clients. They start spread over one pace, so that they are not in lockstep."""
    loop = asyncio.get_running_loop()
    step = (every or exchange.PACE) / len(clients)
    async with asyncio.timeout_at(max(until, loop.time()) + _PATIENCE), asyncio.TaskGroup() as group:
        for number, client in enumerate(clients):
            group.create_task(client.run(until, number * step, every))


def _request(port: int, kind: Kind) -> bytes:
    body = exchange.request_body(kind)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\naccept: */*\r\n"
        f"authorization: Bearer bench\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
