"""Byte streams to an upstream: the seam at which tests put in-memory ones, and TCP with TLS.

Knows nothing of HTTP. A protocol of our own in place of asyncio's StreamReader and StreamWriter: it
hands over all that a socket read delivered without a second buffer.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, cast

READ_AHEAD: Final = 256 * 1024
"""Bytes that may wait for a slow reader before the socket is left alone."""


class Stream(Protocol):
    """Bytes both ways. One reader at a time."""

    async def read(self) -> bytes:
        """All that has come, at least a byte; b"" at the end. Raises OSError if the connection broke."""

    def write(self, *data: bytes) -> None:
        """Hand over for sending. Raises OSError if the stream is closed: then nothing was sent."""

    def unsent(self) -> int:
        """Bytes that were handed over and wait for the peer to take them."""

    def quiet(self) -> bool:
        """True if nothing has come that nobody has read, the peer's end included."""

    def close(self) -> None:
        """At once, whatever is under way: a read that waits ends."""


Connect = Callable[[str, int, ssl.SSLContext | None], Awaitable[Stream]]
"""Opens a stream to host and port, in TLS if there is a context. Raises OSError."""


class TcpStream(asyncio.Protocol):
    """A Stream over an asyncio transport."""

    def __init__(self) -> None:
        self._received: list[bytes] = []
        self._size = 0
        self._paused = False
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._poll = select.poll()
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        self._size += len(data)
        if self._size > READ_AHEAD and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._error = exc
        self._wake()

    async def read(self) -> bytes:
        if not self._received and not self._ended:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if not self._received:
            if self._error is not None:
                raise _as_os_error(self._error)
            return b""
        data = self._received[0] if len(self._received) == 1 else b"".join(self._received)
        self._received, self._size = [], 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    def write(self, *data: bytes) -> None:
        if self._ended or self._transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        for part in data:
            self._transport.write(part)

    def unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    def quiet(self) -> bool:
        if self._ended or self._received or self._transport.is_closing():
            return False
        # The event loop may not have looked at the socket yet: ask the kernel.
        return not self._poll.poll(0)

    def close(self) -> None:
        self._ended = True
        self._transport.abort()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def open_tcp(host: str, port: int, context: ssl.SSLContext | None) -> Stream:
    """The Connect of real life."""
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(TcpStream, host, port, ssl=context)
    return stream


def _as_os_error(error: Exception) -> OSError:
    return error if isinstance(error, OSError) else OSError(str(error) or type(error).__name__)
