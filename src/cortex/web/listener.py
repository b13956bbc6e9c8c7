"""Serves one ASGI app on one listening socket with hypercorn's HTTP, and drains it in the end.

hypercorn's own `serve` keeps the socket of a client that has closed a kept connection until the
keep-alive time has run out, and lets a connection's timeout reach the event loop as a crash; so
accepting and ending connections are done here, around hypercorn's class for one connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final, cast

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import AsyncioSingleTask, WorkerContext
from hypercorn.config import Config
from hypercorn.events import Event, RawData, Updated
from hypercorn.typing import ASGIFramework

from cortex.web.asgi import ASGIApp
from cortex.web.idle import IdleTimer, loop_call_later

KEEP_ALIVE_S: Final = 75.0
"""How long an idle client connection is kept: longer than clients' pools keep theirs."""

BACKLOG: Final = 1024
_MAX_HEAD: Final = 64 * 1024
_LAST_WORDS_S: Final = 1.0
"""For what was cut, to tell its client so."""
_FINAL_HEAD: Final = (b"HTTP/1.1 2", b"HTTP/1.1 3", b"HTTP/1.1 4", b"HTTP/1.1 5")

_log: Final = logging.getLogger("cortex.web")


async def listen(
    sock: socket.socket,
    app: ASGIApp,
    stop: asyncio.Event,
    drain_s: float,
    *,
    lingers: bool = False,
    cut: Callable[[], None] | None = None,
) -> None:
    """Accept connections until `stop`; then close the idle ones, and give the others `drain_s` seconds.

    With `lingers` new connections are accepted, and served, for as long as those others take. When the time
    is over `cut` is called, which makes the app end what it still works on; what that says goes out.
    """
    config, serving = _config(), Serving()
    wrapped = ASGIWrapper(cast(ASGIFramework, app))
    connections: dict[asyncio.Task[Any], asyncio.WriteTransport] = {}
    late_serving = Serving()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        connections[task] = writer.transport
        task.add_done_callback(connections.pop)
        try:
            shared = late_serving if stop.is_set() else serving
            await ServedConnection(wrapped, config, shared, reader, writer)
        except (OSError, BaseExceptionGroup) as error:
            if not _only_lost(error):
                raise
            _log.debug("a client's connection broke: %r", error)
        except asyncio.CancelledError:
            # Only draining does this, and this task has nobody above it but asyncio's streams, which
            # take a cancelled handler for a crash.
            writer.transport.abort()

    server = await asyncio.start_server(serve, sock=sock, backlog=BACKLOG)
    try:
        await stop.wait()
    finally:
        if not lingers:
            server.close()
        await serving.end()
        try:
            async with asyncio.timeout(drain_s):
                await _ended(connections)
                server.close()
                await late_serving.end()
                await _ended(connections)
        except TimeoutError:
            server.close()
            await late_serving.end()
            if cut is not None:
                cut()
                await _ended(connections, _LAST_WORDS_S)
        for task, transport in connections.items():
            task.cancel()
            transport.abort()  # else what its client does not take would be waited for
        await asyncio.gather(*connections, return_exceptions=True)


async def _ended(tasks: Collection[asyncio.Task[Any]], within: float | None = None) -> None:
    """Returns when all that there are now have ended, or so many seconds are over."""
    if tasks:
        await asyncio.wait(list(tasks), timeout=within)


class Serving(WorkerContext):
    """What the connections of one socket share. Those in `idle` wait for a next request."""

    def __init__(self) -> None:
        super().__init__(None)
        self.idle: set[IdleWatch] = set()

    async def end(self) -> None:
        """Idle connections close now, the others after the request that is under way."""
        await self.terminated.set()
        for watch in list(self.idle):
            watch.expire()


class IdleWatch:
    """Ends a connection that has waited too long for its next request, or waits for one in the end.

    Takes the place of hypercorn's `idle_task`, which makes and cancels two tasks for every request.
    """

    def __init__(self, serving: Serving, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._serving = serving
        self._end = end
        self._timer = IdleTimer(KEEP_ALIVE_S, self.expire, time.monotonic, loop_call_later)
        self._ending: asyncio.Task[None] | None = None

    async def restart(self, task_group: object, action: object) -> None:
        """hypercorn says: no request is under way."""
        if self._serving.terminated.is_set():
            self.expire()
        else:
            self._serving.idle.add(self)
            self._timer.begin()

    async def stop(self) -> None:
        """hypercorn says: a request has begun, or the connection has ended."""
        self._serving.idle.discard(self)
        self._timer.end()

    def expire(self) -> None:
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())

    async def close(self) -> None:
        """The connection is over."""
        self._timer.close()
        if self._ending is not None:
            await asyncio.gather(self._ending, return_exceptions=True)


class ServedConnection(TCPServer):
    """hypercorn's connection, ended when the client has ended it, and with fewer writes and tasks."""

    _held = b""

    def __init__(
        self,
        app: ASGIWrapper,
        config: Config,
        serving: Serving,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        super().__init__(app, asyncio.get_running_loop(), config, serving, {}, reader, writer)
        self._idle = IdleWatch(serving, self._initiate_server_close)
        self.idle_task = cast(AsyncioSingleTask, self._idle)

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            await self._idle.close()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            if event.data.startswith(_FINAL_HEAD) and not self._held:
                # The first bytes of the body follow at once; together they are one write.
                self._held = event.data
                return
            event, self._held = RawData(self._held + event.data), b""
            await super().protocol_send(event)
        elif not (isinstance(event, Updated) and event.idle and self.reader.at_eof()):
            await super().protocol_send(event)

    async def _read_data(self) -> None:
        await super()._read_data()
        # The client sends no more: there is no next request to wait for.
        await self.idle_task.stop()


def _config() -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = _log_of_hypercorn()
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.keep_alive_max_requests = 1_000_000
    config.h11_max_incomplete_size = _MAX_HEAD
    return config


def _log_of_hypercorn() -> logging.Logger:
    """Its warnings and errors go where ours go; that it runs, others say."""
    logger = logging.getLogger("cortex.web.hypercorn")
    logger.setLevel(logging.WARNING)
    return logger


def _only_lost(error: BaseException) -> bool:
    """True if nothing but the connection failed."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_only_lost, error.exceptions))
    return isinstance(error, OSError)
