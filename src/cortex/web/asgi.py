"""One HTTP request and its reply as handlers see them, and the ASGI types underneath.

Knows nothing of routes, of sending, or of who asks; `service.py` puts these to work.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

import msgspec

from cortex.wire.errors import CortexError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

HeaderList = Sequence[tuple[str, str]]

MAX_REQUEST_ID: Final = 128


class Request:
    """One HTTP request. `id` is the client's `x-request-id` if that is sane, else a new one.

    `started` is the time of arrival on the service's clock; `log` takes extra fields for the one log
    line of this request. `cut` is the error with which the server has ended the work on it, if it has: what
    is cancelled otherwise is so because the client has left.
    """

    __slots__ = (
        "_read",
        "client",
        "cut",
        "headers",
        "id",
        "log",
        "method",
        "params",
        "path",
        "query",
        "raw_path",
        "routine",
        "started",
    )

    def __init__(self, scope: Scope, started: float, read: Callable[[], Awaitable[bytes]]) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        raw_path: bytes | None = scope.get("raw_path")
        self.raw_path = None if raw_path is None else raw_path.decode("latin-1")
        # Later entries of a dict win, the first value of a header should: so backwards.
        self.headers: dict[str, str] = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in reversed(list(scope["headers"]))
        }
        self.params: dict[str, str] = {}
        self.query: dict[str, str] = _query(scope.get("query_string", b""))
        peer = scope.get("client")
        self.client: tuple[str, int] | None = (str(peer[0]), int(peer[1] or 0)) if peer else None
        self.id = _sane_id(self.headers.get("x-request-id")) or os.urandom(16).hex()
        self.started = started
        self.routine = False
        self.log: dict[str, object] = {}
        self.cut: CortexError | None = None
        self._read = read

    @property
    def segments(self) -> list[str]:
        """The path cut at its slashes, then decoded: an encoded slash stays inside its segment."""
        if self.raw_path is None:
            return self.path.split("/")
        return [unquote(segment) for segment in self.raw_path.split("/")]

    async def body(self) -> bytes:
        """The whole body, read once. Raises TooLarge over the service's cap."""
        return await self._read()


class Response:
    """A whole reply. `content_type` None leaves the header out."""

    __slots__ = ("body", "content_type", "headers", "status")

    def __init__(
        self,
        body: bytes = b"",
        status: int = 200,
        headers: HeaderList = (),
        content_type: str | None = "application/json",
    ) -> None:
        self.body = body
        self.status = status
        self.headers = headers
        self.content_type = content_type


def json_response(value: object, status: int = 200, headers: HeaderList = ()) -> Response:
    return Response(msgspec.json.encode(value), status, headers)


class EventStream:
    """A reply that is sent while it is made; the only way to stream.

    `source` yields ready bytes, whole events, each of which is sent at once as it is. Headers go out
    with the first bytes: a CortexError before them becomes a reply with a real error status; after
    them `fail(error)` gives the last bytes. Where `keep_alive` is given, its bytes are sent whenever the
    source has been silent for 10 s, which may be what sends the headers.

    `source` is started and closed in every case; when the client leaves it meets CancelledError where
    it waits, or GeneratorExit at its `yield`.
    """

    __slots__ = ("content_type", "fail", "headers", "keep_alive", "source")

    def __init__(
        self,
        source: AsyncIterator[bytes],
        *,
        headers: HeaderList = (),
        fail: Callable[[CortexError], bytes],
        keep_alive: Callable[[], bytes] | None = None,
        content_type: str = "text/event-stream",
    ) -> None:
        self.source = source
        self.keep_alive = keep_alive
        self.headers = headers
        self.fail = fail
        self.content_type = content_type


Handler = Callable[[Request], Awaitable[Response | EventStream]]


def _query(raw: bytes) -> dict[str, str]:
    if not raw:
        return {}
    return dict(reversed(parse_qsl(raw.decode("latin-1"), keep_blank_values=True)))


def _sane_id(value: str | None) -> str | None:
    if (
        value
        and len(value) <= MAX_REQUEST_ID
        and value.isascii()
        and value.isprintable()
        and " " not in value
    ):
        return value
    return None
