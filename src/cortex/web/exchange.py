"""The ASGI side of one request: its body in, its reply out, and a watch for the client leaving.

A server's `send` neither raises when the client has left nor returns when the client stops reading;
so leaving is noticed by waiting on `receive` beside the work, and a client that neither takes nor
gives anything for `stall_s` seconds counts as gone. Knows nothing of routes or of what is sent.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

from cortex.web.asgi import Message, Receive, Send
from cortex.web.idle import CallLater, Clock, IdleTimer
from cortex.wire.errors import CortexError, TooLarge

STALL_S: Final = 60.0
"""Seconds for which a client may neither give nor take anything."""

_LINGER: Final = 4
"""How many times the cap is read and thrown away of a body that was refused."""


class ClientGone(Exception):
    """There is nobody left to answer. Never leaves `cortex.web`."""


class Exchange:
    """Owns the channel to one client while the request is handled by the current task.

    Used as a context manager around the handling. When the client goes, or the work is cut, that task is
    cancelled; the context manager takes these cancellations back, and only these.
    """

    def __init__(
        self, receive: Receive, send: Send, *, cap: int, clock: Clock, call_later: CallLater
    ) -> None:
        self.started = False
        self.gone = False
        self.status = 0
        self.sent = 0
        self._receive = receive
        self._send = send
        self._cap = cap
        self._body: bytes | None = None
        self._finishing = False
        self._idle = IdleTimer(STALL_S, self._leave, clock, call_later)
        self._watcher: asyncio.Task[None] | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._cancels = 0
        """Of the task, by us, that were not taken back yet."""
        self._cut: CortexError | None = None

    def __enter__(self) -> Exchange:
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task else 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._idle.close()
        if self._watcher is not None:
            self._watcher.cancel()
        if kind is not asyncio.CancelledError:
            self._take_back(self._cancels)
            return kind is ClientGone
        return self._cancels > 0 and self._take_back(self._cancels)

    async def body(self) -> bytes:
        """The whole request body. Raises TooLarge over the cap, ClientGone if it never ends."""
        if self._body is None:
            parts: list[bytes] = []
            size = 0
            more = True
            while more:
                part, more = await self._part()
                if part:
                    size += len(part)
                    if size > self._cap:
                        raise too_large(self._cap)
                    parts.append(part)
            self._body = parts[0] if len(parts) == 1 else b"".join(parts)
        return self._body

    def watch(self) -> None:
        """From now on the client's leaving cancels the task. The body must have been read."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def cut(self, error: CortexError) -> bool:
        """Cancel the work although the client is there, which is to hear `error` in its stead.

        False where it comes too late: the client has gone, or has the end of its reply.
        """
        if self.gone or self._finishing or self._cut is not None or self._task is None:
            return False
        self._cut = error
        self._cancel()
        return True

    def words_of(self, cancelled: asyncio.CancelledError) -> CortexError:
        """What `cut` wants told, which the task may go on to tell. Raises a cancellation by anybody else."""
        if self._cut is None or self.gone or self._cancels != 1 or not self._take_back(1):
            raise cancelled
        return self._cut

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.started = True
        await self._put({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Returns when the server has taken `data`, which may wait for a slow client."""
        await self._put({"type": "http.response.body", "body": data, "more_body": True})
        self.sent += len(data)

    async def finish(self, data: bytes = b"") -> None:
        """The last bytes of the reply. From here on the client may go."""
        if self._body is None:
            if not await self._linger(data):
                return
            data = b""
        self._finishing = True
        await self._put({"type": "http.response.body", "body": data, "more_body": False})
        self.sent += len(data)

    async def _linger(self, data: bytes) -> bool:
        """Answer a request whose body was not read, and read on for a while; False if the client left.

        A server that stops reading resets the connection, and the client, still busy sending, may
        never see why. What is thrown away is bounded, in bytes and in time.
        """
        await self.write(data)
        self._idle.begin()
        size, more = 0, True
        while more and size <= _LINGER * self._cap:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return False
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        if more:
            # A server may wait until somebody has taken what it read before it lets go.
            self._finishing = True
            self.watch()
        return True

    async def _part(self) -> tuple[bytes, bool]:
        self._idle.begin()
        message = await self._receive()
        self._idle.end()
        if message["type"] == "http.disconnect":
            self.gone = True
            raise ClientGone
        return message.get("body", b""), message.get("more_body", False)

    async def _put(self, message: Message) -> None:
        if self.gone:
            raise ClientGone
        self._idle.begin()
        try:
            await self._send(message)
        except OSError:
            self.gone = True
            raise ClientGone from None
        self._idle.end()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._finishing:
            self._leave()

    def _leave(self) -> None:
        if not self.gone and self._task is not None:
            self.gone = True
            self._cancel()

    def _cancel(self) -> None:
        assert self._task is not None
        self._cancels += 1
        self._task.cancel()

    def _take_back(self, cancels: int) -> bool:
        """Take back so many cancellations of ours; False if somebody else has cancelled the task as well."""
        if self._task is None:
            return True
        for _ in range(cancels):
            self._task.uncancel()
        self._cancels -= cancels
        return self._task.cancelling() <= self._cancelling


def too_large(cap: int) -> TooLarge:
    return TooLarge(f"The request body is larger than {cap} bytes, which is the most that is accepted here.")
