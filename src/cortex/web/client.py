"""HTTP/1.1 as a client: one connection, one request on it at a time, and the reply to it.

Foreign failures (the socket's, h11's) end here and become NodeLost or UpstreamTimeout that name the
origin. Does not know about pools: whoever owns the connection says where it goes after a reply.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import Final

import h11
import msgspec

from cortex.web.body import BodyReader, MalformedBody, body_reader
from cortex.web.idle import CallLater, Clock, IdleTimer
from cortex.web.stream import Stream
from cortex.wire.errors import CortexError, NodeLost, UpstreamTimeout

MAX_HEAD: Final = 64 * 1024
"""Bytes of status line and headers that an upstream may send."""

_VERSION: Final = b"HTTP/"
READ_LIMIT: Final = 64 * 2**20


class ConnectFailed(NodeLost):
    """No connection came about: nothing was sent, so another node may be asked."""

    default_code = "connect_failed"


class Patience(msgspec.Struct, frozen=True):
    """How long silence is borne: `limit` seconds, and on as long as `is_alive` says so."""

    limit: float
    is_alive: Callable[[], bool] | None = None


class Connection:
    """A connection to `origin`. After any error it can only be closed."""

    def __init__(self, stream: Stream, origin: str, *, clock: Clock, call_later: CallLater) -> None:
        self.origin = origin
        self.complete = False
        self.idle_since = 0.0
        self._stream = stream
        self._idle = IdleTimer(0.0, self._expired, clock, call_later)
        self._is_alive: Callable[[], bool] | None = None
        self._body: BodyReader | None = None
        self._arrived = b""
        self._keep = False
        self._unsent = 0
        self._broken: CortexError | None = None

    def quiet(self) -> bool:
        """True if the peer has neither closed the connection nor sent what nobody asked for."""
        return self._broken is None and self._stream.quiet()

    def send(self, request: h11.Request, body: bytes, patience: Patience) -> None:
        """Hand over a whole request. Raises OSError if the connection is closed and nothing was sent."""
        self.complete = False
        self._idle.limit = patience.limit
        self._is_alive = patience.is_alive
        # Only heads go through h11, so one of its connections serves one request.
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        head = self._h11.send(request) or b""
        self._method = request.method.decode()
        if body and any(name == b"transfer-encoding" for name, _ in request.headers):
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        if len(body) <= MAX_HEAD:
            self._stream.write(head + body)
        else:
            self._stream.write(head, body)

    async def head(self) -> h11.Response:
        """Status and headers of the reply; informational replies before it are passed over."""
        first = True
        while True:
            event = self._next_event()
            if event is h11.NEED_DATA:
                data = await self._read()
                if first:
                    self._check_beginning(data)
                    first = False
                self._h11.receive_data(data)
            elif isinstance(event, h11.Response):
                self._arrived = self._h11.trailing_data[0]
                return event

    def expect(self, status: int, headers: Mapping[str, str], *, http_version: bytes) -> None:
        """How the body will come, after the head that announced it."""
        self._body = body_reader(self._method, status, headers)
        self.complete = self._body.complete
        closing = "close" in headers.get("connection", "").lower()
        self._keep = http_version == b"1.1" and self._body.delimited and not closing

    async def body(self) -> bytes:
        """Body data that came with one socket read; b"" once the body is `complete`."""
        reader = self._body
        assert reader is not None
        payload = b""
        while not self.complete and not payload:
            if self._broken is not None:
                raise self._broken
            data, self._arrived = self._arrived or await self._read(), b""
            try:
                if data:
                    payload = reader.feed(data)
                else:
                    reader.end()
            except MalformedBody as error:
                raise NodeLost(f"{self.origin} broke off its answer, or sent no HTTP: {error}.") from None
            self.complete = reader.complete
            self._keep = self._keep and not reader.surplus
        return payload

    def recycle(self) -> bool:
        """Make ready for the next request; False if the connection cannot be used again."""
        self._idle.close()
        trusted = self.complete and self._keep and not (self._arrived or self._broken)
        return trusted and not self._stream.unsent()

    def abort(self, error: CortexError) -> None:
        """Break the connection: whoever reads from it, now or later, gets `error`."""
        self._broken = self._broken or error
        self.close()

    def close(self) -> None:
        self._idle.close()
        self._stream.close()

    def _check_beginning(self, data: bytes) -> None:
        """A peer of another kind may say a line and wait: h11 would wait for the end of the headers."""
        if not data:
            raise NodeLost(f"{self.origin} closed the connection without an answer.")
        if not data.startswith(_VERSION[: len(data)]):
            raise NodeLost(f"{self.origin} sent no HTTP: its answer begins with {data[:24]!r}.")

    def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            raise NodeLost(f"{self.origin} broke off its answer, or sent no HTTP: {error}.") from None

    async def _read(self) -> bytes:
        self._unsent = self._stream.unsent()
        self._idle.begin()
        try:
            data = await self._stream.read()
        except OSError as error:
            raise self._broken or NodeLost(f"The connection to {self.origin} broke: {error}.") from None
        finally:
            self._idle.end()
        if self._broken is not None:
            raise self._broken
        return data

    def _expired(self) -> None:
        unsent = self._stream.unsent()
        if unsent < self._unsent:
            # A long request is still on its way: that is progress too.
            self._unsent = unsent
            self._idle.begin()
            return
        if self._is_alive is not None and self._is_alive():
            self._idle.begin()
            return
        self.abort(UpstreamTimeout(f"{self.origin} was silent for {self._idle.limit:g} s."))


class Reply:
    """A reply whose head has come. An async context manager: leaving it gives the connection back.

    A connection whose body was read to its end is used again, any other is closed.
    """

    def __init__(
        self, head: h11.Response, connection: Connection, release: Callable[[Connection], None]
    ) -> None:
        self.status = head.status_code
        self.headers: dict[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(list(head.headers))
        }
        connection.expect(head.status_code, self.headers, http_version=head.http_version)
        self._connection: Connection | None = connection
        self._release = release

    async def __aenter__(self) -> Reply:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body, once: all that one socket read delivered is one item.

        Raises NodeLost if the body is cut or the connection aborted, UpstreamTimeout after silence.
        """
        while (connection := self._connection) is not None:
            data = await connection.body()
            if connection.complete:
                self._give_back()
            if data:
                yield data

    async def read(self, limit: int = READ_LIMIT) -> bytes:
        """The whole body. Raises NodeLost over `limit` bytes, else as `chunks`."""
        parts: list[bytes] = []
        size = 0
        async for data in self.chunks():
            size += len(data)
            if size > limit:
                raise NodeLost(f"The answer is larger than {limit} bytes.", code="reply_too_large")
            parts.append(data)
        return b"".join(parts)

    async def aclose(self) -> None:
        self._give_back()

    def _give_back(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._release(connection)
