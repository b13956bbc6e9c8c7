"""A network in memory: ASGI apps behind the client's connect seam, and hosts that can be killed.

Bytes cross it as HTTP/1.1, parsed and made by h11 on both sides, so that what runs over it is the
client that runs over sockets. Streams are bounded: a reader that stops makes the writer wait.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote, urlsplit

import h11

from cortex.web.asgi import ASGIApp, Message, Scope

BUFFER: Final = 64 * 1024
_log: Final = logging.getLogger("cortex.testing")


class MemoryNetwork:
    """Maps `http://host:port` to apps; calling it opens a connection, as `Pool(connect=...)` wants.

    `kill` does to a host what SIGKILL does: its handlers are cancelled, its connections are reset, new
    ones are refused. `hang` makes it accept connections and do nothing. `revive` ends both.
    """

    def __init__(self, apps: Mapping[str, ASGIApp]) -> None:
        self._hosts = {_address(origin): _MemoryHost(app) for origin, app in apps.items()}

    async def __call__(self, host: str, port: int, context: ssl.SSLContext | None) -> MemoryStream:
        found = self._hosts.get((host, port))
        if found is None or found.killed:
            raise ConnectionRefusedError(111, "Connection refused")
        return found.accept()

    def kill(self, origin: str) -> None:
        host = self._hosts[_address(origin)]
        host.killed = True
        host.reset()

    def hang(self, origin: str) -> None:
        self._hosts[_address(origin)].awake.clear()

    def revive(self, origin: str, app: ASGIApp | None = None) -> None:
        """The host is there again, with `app` if one is given."""
        host = self._hosts[_address(origin)]
        host.killed = False
        host.app = app or host.app
        host.awake.set()

    def connections(self, origin: str) -> int:
        """How many connections the host has open."""
        return len(self._hosts[_address(origin)].open)

    async def aclose(self) -> None:
        """Kill every host and wait for what ran on it."""
        tasks = [task for host in self._hosts.values() for task in host.open]
        for host in self._hosts.values():
            host.killed = True
            host.reset()
        await asyncio.gather(*tasks, return_exceptions=True)


def memory_connect(apps: Mapping[str, ASGIApp]) -> MemoryNetwork:
    """A `Connect` that reaches the given apps, by origin, and refuses every other address."""
    return MemoryNetwork(apps)


class _MemoryHost:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.killed = False
        self.awake = asyncio.Event()
        self.awake.set()
        self.open: dict[asyncio.Task[None], MemoryStream] = {}
        self._ports = 40000

    def accept(self) -> MemoryStream:
        near, far = memory_pair()
        self._ports += 1
        server = _Server(self.app, far, self._ports, self.awake)
        task = asyncio.get_running_loop().create_task(server.run())
        self.open[task] = far
        task.add_done_callback(lambda done: self.open.pop(done, None))
        return near

    def reset(self) -> None:
        while self.open:
            task, stream = self.open.popitem()
            stream.reset()
            task.cancel()


class _Pipe:
    """Bytes one way."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.size = 0
        self.ended = False
        self.broken = False
        self.changed = asyncio.Event()

    def end(self, *, broken: bool = False) -> None:
        self.ended = True
        self.broken = self.broken or broken
        self.changed.set()


class MemoryStream:
    """One end of a connection in memory; fits `cortex.web.stream.Stream`."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    async def read(self) -> bytes:
        pipe = self._incoming
        while not pipe.data and not pipe.ended:
            pipe.changed.clear()
            await pipe.changed.wait()
        if pipe.broken:
            raise ConnectionResetError(104, "Connection reset by peer")
        data = b"".join(pipe.data)
        pipe.data, pipe.size = [], 0
        pipe.changed.set()
        return data

    def write(self, *data: bytes) -> None:
        if self._outgoing.ended:
            raise ConnectionResetError(104, "Connection reset by peer")
        if any(data):
            self._outgoing.data.extend(data)
            self._outgoing.size += sum(map(len, data))
            self._outgoing.changed.set()

    async def drained(self) -> None:
        """Returns when the other end has read enough for more to be written."""
        pipe = self._outgoing
        while pipe.size > BUFFER and not pipe.ended:
            pipe.changed.clear()
            await pipe.changed.wait()

    def unsent(self) -> int:
        return self._outgoing.size

    def quiet(self) -> bool:
        return not self._incoming.data and not self._incoming.ended

    def close(self) -> None:
        self._incoming.end()
        self._outgoing.end()

    def reset(self) -> None:
        """Break both directions: what was on its way is lost."""
        self._incoming.end(broken=True)
        self._outgoing.end(broken=True)


def memory_pair() -> tuple[MemoryStream, MemoryStream]:
    """The two ends of a connection."""
    there, back = _Pipe(), _Pipe()
    return MemoryStream(back, there), MemoryStream(there, back)


class _Server:
    """Serves one connection: one request after the other, as a real server would."""

    def __init__(self, app: ASGIApp, stream: MemoryStream, port: int, awake: asyncio.Event) -> None:
        self._app = app
        self._awake = awake
        self._stream = stream
        self._port = port
        self._h11 = h11.Connection(h11.SERVER)
        self._body_read = False
        self._left = False

    async def run(self) -> None:
        try:
            while (request := await self._event()) is not None:
                if not isinstance(request, h11.Request):
                    break
                await self._awake.wait()
                self._body_read = False
                await self._handle(request)
                self._h11.start_next_cycle()
        except (h11.ProtocolError, OSError):
            # As a real server: the connection ends, which the client notices.
            pass
        finally:
            self._stream.close()

    async def _handle(self, request: h11.Request) -> None:
        try:
            await self._app(_scope(request, self._port), self._receive, self._send)
        except Exception:
            _log.exception("the app failed")
            if self._h11.our_state is h11.SEND_RESPONSE:
                await self._send({"type": "http.response.start", "status": 500, "headers": []})
                await self._send({"type": "http.response.body"})

    async def _event(self) -> h11.Event | None:
        """The next event of the client; None if it left."""
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            try:
                data = await self._stream.read()
            except OSError:
                return None
            self._h11.receive_data(data)
            if not data and self._h11.their_state is not h11.SEND_BODY:
                return None
        return event if isinstance(event, h11.Event) else None

    async def _receive(self) -> Message:
        if not self._body_read and not self._left:
            try:
                event = await self._event()
            except h11.RemoteProtocolError:
                event = None
            if isinstance(event, h11.Data):
                return {"type": "http.request", "body": bytes(event.data), "more_body": True}
            if isinstance(event, h11.EndOfMessage):
                self._body_read = True
                return {"type": "http.request", "body": b"", "more_body": False}
            self._left = True
        while not self._left and self._h11.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY):
            try:
                data = await self._stream.read()
            except OSError:
                data = b""
            self._left = not data
            if data:
                self._h11.receive_data(data)
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
            self._put(h11.Response(status_code=message["status"], headers=headers))
            return
        if message.get("body"):
            self._put(h11.Data(data=message["body"]))
        if not message.get("more_body", False):
            self._put(h11.EndOfMessage())
        await self._stream.drained()

    def _put(self, event: h11.Event) -> None:
        data = self._h11.send(event)
        try:
            self._stream.write(data or b"")
        except OSError:
            # The client has left; a server's send does not say so.
            self._left = True


def _address(origin: str) -> tuple[str, int]:
    url = urlsplit(origin)
    return url.hostname or "", url.port or {"https": 443}.get(url.scheme, 80)


def _scope(request: h11.Request, port: int) -> Scope:
    raw_path, _, query = request.target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.1"},
        "http_version": request.http_version.decode(),
        "method": request.method.decode(),
        "scheme": "http",
        "path": unquote(raw_path.decode("latin-1")),
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": list(request.headers),
        "client": ("127.0.0.1", port),
        "server": ("127.0.0.1", 80),
    }
