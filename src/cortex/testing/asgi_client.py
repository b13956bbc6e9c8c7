"""Drives an ASGI app in process, message by message, as a server and a client would.

Chunks are there as soon as the app has sent them, and the client can leave or stop reading at any
point. As with a real server, `send` never raises when the client has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import unquote

import msgspec

from cortex.web.asgi import ASGIApp, Message, Scope

Headers = Mapping[str, str]


class AsgiReply(msgspec.Struct):
    """A reply that has ended. `chunks` are the bodies of the single sends that were not empty."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class AsgiClient:
    """A client of one app; `headers` go with every request, `peer` is the address it comes from."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        headers: Headers | None = None,
        peer: tuple[str, int] | None = ("127.0.0.1", 40000),
    ) -> None:
        self.app = app
        self.headers = dict(headers or {})
        self.peer = peer

    async def get(self, path: str, *, headers: Headers | None = None) -> AsgiReply:
        return await self.request("GET", path, headers=headers)

    async def post(
        self, path: str, *, json: Any = None, body: bytes = b"", headers: Headers | None = None
    ) -> AsgiReply:
        return await self.request("POST", path, json=json, body=body, headers=headers)

    async def request(
        self, method: str, path: str, *, json: Any = None, body: bytes = b"", headers: Headers | None = None
    ) -> AsgiReply:
        """One request to its end."""
        async with self.open(method, path, json=json, body=body, headers=headers) as exchange:
            return await exchange.reply()

    def open(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        body: bytes | None = b"",
        headers: Headers | None = None,
    ) -> AsgiExchange:
        """A request that the test leads step by step. With `body` None the test sends the body itself."""
        sent = {**self.headers, **(headers or {})}
        if json is not None:
            body = msgspec.json.encode(json)
            sent.setdefault("content-type", "application/json")
        if body:
            sent.setdefault("content-length", str(len(body)))
        raw_path, _, query = path.partition("?")
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.1"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(raw_path),
            "raw_path": raw_path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in sent.items()],
            "client": self.peer,
            "server": ("127.0.0.1", 80),
        }
        exchange = AsgiExchange(self.app, scope)
        if body is not None:
            exchange.send_body(body, more=False)
        return exchange


class AsgiExchange:
    """One request under way. As a context manager: leaving it is the client's leaving."""

    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        self.disconnected = False
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._outbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self._reading = asyncio.Event()
        self._reading.set()
        self._head: tuple[int, dict[str, str]] | None = None
        self._over = False
        self._app = asyncio.get_running_loop().create_task(self._run(app, scope))

    async def __aenter__(self) -> AsgiExchange:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()
        self.resume()
        await self.ended()

    def send_body(self, data: bytes, *, more: bool) -> None:
        self._inbox.put_nowait({"type": "http.request", "body": data, "more_body": more})

    @property
    def done(self) -> bool:
        """The app is done with this request."""
        return self._app.done()

    def cancel(self) -> None:
        """The server gives up: it cancels the app."""
        self._app.cancel()

    def disconnect(self) -> None:
        """The client leaves, now."""
        if not self.disconnected:
            self.disconnected = True
            self._inbox.put_nowait({"type": "http.disconnect"})

    def stall(self) -> None:
        """The client stops reading: the app's next send does not return until `resume`."""
        self._reading.clear()

    def resume(self) -> None:
        self._reading.set()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers, as soon as the app has sent them. Of a repeated header the first value."""
        if self._head is None:
            message = await self._next()
            if message is None:
                raise AssertionError("the app ended without a reply")
            headers = {name.decode(): value.decode("latin-1") for name, value in reversed(message["headers"])}
            self._head = message["status"], headers
        return self._head

    async def chunk(self) -> bytes | None:
        """The body of the next send that is not empty; None once the reply is complete or cut."""
        await self.head()
        while not self._over:
            message = await self._next()
            if message is None:
                break
            self._over = not message.get("more_body", False)
            if message.get("body"):
                return bytes(message["body"])
        return None

    async def chunks(self) -> AsyncIterator[bytes]:
        while (chunk := await self.chunk()) is not None:
            yield chunk

    async def reply(self) -> AsgiReply:
        """All of the reply, once it is complete. Raises AssertionError if it is cut."""
        status, headers = await self.head()
        chunks = [chunk async for chunk in self.chunks()]
        if not self._over:
            raise AssertionError(f"the app ended in the middle of its reply: {chunks!r}")
        return AsgiReply(status, headers, chunks)

    async def ended(self) -> None:
        """Waits until the app is done with this request; raises what the app raised."""
        await asyncio.shield(self._app)

    async def _next(self) -> Message | None:
        message = await self._outbox.get()
        if message is None:
            self._outbox.put_nowait(None)
        return message

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._inbox.get, self._send)
        finally:
            self._outbox.put_nowait(None)

    async def _send(self, message: Message) -> None:
        await self._reading.wait()
        if self.disconnected:
            return
        self._outbox.put_nowait(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            # Servers say so too once a reply is complete, and this send may return later.
            self._inbox.put_nowait({"type": "http.disconnect"})
            for _ in range(3):
                await asyncio.sleep(0)
