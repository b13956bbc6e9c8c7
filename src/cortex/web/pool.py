"""A pool of client connections: per origin a bounded number, reused while they are fresh.

A request is sent a second time, on another connection, only where nothing of it can have been
processed: when a reused connection turns out to be closed before the request is handed to it. Once
bytes are on their way a failure is the caller's to judge. Does not know what is asked or of whom.
"""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import SplitResult, urlsplit

import h11

from cortex.web.client import ConnectFailed, Connection, Patience, Reply
from cortex.web.idle import CallLater, Clock, Handle, loop_call_later
from cortex.web.stream import Connect, open_tcp
from cortex.wire.errors import Internal, NodeLost

KEEPALIVE_EXPIRY: Final = 4.0
"""Seconds. Shorter than any server in common use keeps an idle connection (uvicorn: 5)."""

_PORTS: Final = {"http": 80, "https": 443}
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class _Host:
    """What the pool holds for one origin. `used` counts slots: connecting, busy, or just granted."""

    def __init__(self, origin: str, url: SplitResult) -> None:
        self.origin = origin
        self.name = url.hostname or ""
        self.port = url.port or _PORTS[url.scheme]
        self.tls = url.scheme == "https"
        self.used = 0
        self.busy: set[Connection] = set()
        self.idle: deque[Connection] = deque()
        self.waiters: deque[asyncio.Future[None]] = deque()

    def __repr__(self) -> str:
        connecting = self.used - len(self.busy)
        return (
            f"{self.origin} busy={len(self.busy)} connecting={connecting} "
            f"idle={len(self.idle)} waiting={len(self.waiters)}"
        )


class Pool:
    """An HTTP client. At most `per_host` connections to one origin; further requests wait in line.

    `idle_timeout` is the longest silence of an upstream, before and within its reply, in seconds;
    `keepalive_expiry` how long an unused connection is kept. Cancelling a request at any point, or a
    failure, closes its connection and frees its place.
    """

    def __init__(
        self,
        *,
        connect: Connect = open_tcp,
        per_host: int = 256,
        connect_timeout: float = 5.0,
        idle_timeout: float = 300.0,
        keepalive_expiry: float = KEEPALIVE_EXPIRY,
        tls: ssl.SSLContext | None = None,
        clock: Clock = time.monotonic,
        call_later: CallLater = loop_call_later,
    ) -> None:
        self._connect = connect
        self._per_host = per_host
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._keepalive_expiry = keepalive_expiry
        self._tls = tls
        self._clock = clock
        self._call_later = call_later
        self._hosts: dict[str, _Host] = {}
        self._sweeper: Handle | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"Pool({', '.join(map(repr, self._hosts.values()))})"

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        idle_timeout: float | None = None,
        is_alive: Callable[[], bool] | None = None,
    ) -> Reply:
        """Send one request and wait for the head of its reply. Close the Reply, or use `async with`.

        `is_alive` is asked after every `idle_timeout` of silence: while it is true, silence is work.

        Raises ConnectFailed if nothing was sent, NodeLost if the connection broke or the answer is no
        HTTP, UpstreamTimeout after `idle_timeout` seconds of silence.
        """
        origin, parts = _origin(url)
        request = _head(method, parts, headers, len(body))
        host = self._hosts.get(origin)
        if host is None:
            host = self._hosts[origin] = _Host(origin, parts)
        limit = self._idle_timeout if idle_timeout is None else idle_timeout
        connection = await self._send(host, request, body, Patience(limit, is_alive))
        try:
            head = await connection.head()
        except BaseException:
            self._release(host, connection)
            raise
        return Reply(head, connection, lambda done: self._release(host, done))

    def abort(self, origin_url: str, reason: str) -> None:
        """Break every connection to that origin: who reads from one gets NodeLost with `reason`."""
        origin, _ = _origin(origin_url)
        if (host := self._hosts.get(origin)) is not None:
            for connection in host.busy:
                connection.abort(NodeLost(reason))
            self._drop_idle(host)

    async def aclose(self) -> None:
        """Break all connections and refuse further requests."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for host in list(self._hosts.values()):
            self.abort(host.origin, _was_closed().message)
            for waiter in host.waiters:
                if not waiter.done():
                    waiter.set_exception(_was_closed())

    async def _send(self, host: _Host, request: h11.Request, body: bytes, patience: Patience) -> Connection:
        await self._take_slot(host)
        try:
            while host.idle:
                connection = host.idle.pop()
                if self._fresh(connection):
                    try:
                        connection.send(request, body, patience)
                    except OSError:
                        connection.close()
                        continue
                    host.busy.add(connection)
                    return connection
                connection.close()
            connection = await self._open(host)
            try:
                connection.send(request, body, patience)
            except OSError as error:
                connection.close()
                raise ConnectFailed(f"{host.origin} closed the connection at once: {error}.") from None
        except BaseException:
            self._free_slot(host)
            raise
        host.busy.add(connection)
        return connection

    def _fresh(self, connection: Connection) -> bool:
        return self._clock() - connection.idle_since < self._keepalive_expiry and connection.quiet()

    def _is_closed(self) -> bool:
        """It may become true at any await, which a type checker does not see in the attribute."""
        return self._closed

    async def _open(self, host: _Host) -> Connection:
        if self._is_closed():
            raise _was_closed()
        if host.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            async with asyncio.timeout(self._connect_timeout):
                stream = await self._connect(host.name, host.port, self._tls if host.tls else None)
        except TimeoutError:
            raise ConnectFailed(
                f"No connection to {host.origin} within {self._connect_timeout:g} s."
            ) from None
        except (OSError, UnicodeError) as error:
            raise ConnectFailed(f"Cannot connect to {host.origin}: {_cause(error)}.") from None
        if self._is_closed():
            stream.close()
            raise _was_closed()
        return Connection(stream, host.origin, clock=self._clock, call_later=self._call_later)

    def _release(self, host: _Host, connection: Connection) -> None:
        host.busy.discard(connection)
        if connection.recycle():
            connection.idle_since = self._clock()
            host.idle.append(connection)
            if self._sweeper is None:
                self._sweeper = self._call_later(self._keepalive_expiry, self._sweep)
        else:
            connection.close()
        self._free_slot(host)

    async def _take_slot(self, host: _Host) -> None:
        if host.used < self._per_host:
            host.used += 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        host.waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                # The slot was granted in the same moment: pass it on.
                self._free_slot(host)
            elif waiter in host.waiters:
                host.waiters.remove(waiter)
            self._forget(host)
            raise

    def _free_slot(self, host: _Host) -> None:
        while host.waiters:
            waiter = host.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        host.used -= 1
        self._forget(host)

    def _forget(self, host: _Host) -> None:
        if not host.used and not host.idle and not host.waiters:
            self._hosts.pop(host.origin, None)

    def _drop_idle(self, host: _Host) -> None:
        while host.idle:
            host.idle.popleft().close()
        self._forget(host)

    def _sweep(self) -> None:
        """Close what has been idle too long; look again while anything is idle."""
        self._sweeper = None
        now = self._clock()
        oldest = now
        for host in list(self._hosts.values()):
            while host.idle and now - host.idle[0].idle_since >= self._keepalive_expiry:
                host.idle.popleft().close()
            if host.idle:
                oldest = min(oldest, host.idle[0].idle_since)
            self._forget(host)
        if any(host.idle for host in self._hosts.values()):
            self._sweeper = self._call_later(oldest + self._keepalive_expiry - now, self._sweep)


@functools.lru_cache(maxsize=256)
def _origin(url: str) -> tuple[str, SplitResult]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in _PORTS or not parts.hostname or port == -1:
        raise Internal(f"{url!r} is no http or https URL.")
    return f"{parts.scheme}://{parts.netloc}", parts


def _head(method: str, url: SplitResult, headers: Sequence[tuple[str, str]], size: int) -> h11.Request:
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    names = {name.lower() for name, _ in headers}
    fields = [*headers]
    if "host" not in names:
        fields.insert(0, ("host", url.netloc.rpartition("@")[2]))
    if (size or method in _WITH_BODY) and not names & {"content-length", "transfer-encoding"}:
        fields.append(("content-length", str(size)))
    try:
        return h11.Request(method=method, target=target, headers=fields)
    except (h11.LocalProtocolError, UnicodeError) as error:
        raise Internal(f"{method} {url.geturl()!r} cannot be sent: {error}.") from None


def _was_closed() -> ConnectFailed:
    return ConnectFailed("This client has been closed.")


def _cause(error: OSError | UnicodeError) -> str:
    """The system's words where it has some: asyncio's name the address, which stands there already."""
    if isinstance(error, ssl.SSLError) or not isinstance(error, OSError):
        return str(error)
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
