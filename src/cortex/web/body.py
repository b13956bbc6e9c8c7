"""The body of an HTTP/1.1 response as it comes in: bytes of the wire in, payload out. No I/O.

h11 reads heads; bodies are read here because a streamed reply is one HTTP chunk an event, and those
are what a gateway spends its time on. Framing after RFC 9112, section 6; whether a head contradicts
itself is h11's to find.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Protocol

MAX_LINE: Final = 8 * 1024
"""Bytes of a chunk's size line, or of a trailer line."""
MAX_TRAILERS: Final = 100

_SIZE: Final = re.compile(rb"([0-9a-fA-F]{1,16})[ \t]*(?:;[^\r\n]*)?")
_WITHOUT_BODY: Final = frozenset({204, 304})


class MalformedBody(ValueError):
    """The bytes are no body of this framing; the message says why."""


class BodyReader(Protocol):
    """`complete` once the body has ended; `delimited` if its end shows without the connection's end;
    `surplus` if there were bytes after it.
    """

    complete: bool
    delimited: bool
    surplus: bool

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Raises MalformedBody."""

    def end(self) -> None:
        """The connection has ended. Raises MalformedBody if the body has not."""


def body_reader(method: str, status: int, headers: Mapping[str, str]) -> BodyReader:
    """For the response to a request with `method`; header names in lower case."""
    if method == "HEAD" or status in _WITHOUT_BODY:
        return SizedBody(0)
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return ChunkedBody()
    if "content-length" in headers:
        return SizedBody(int(headers["content-length"]))
    return OpenBody()


class SizedBody:
    """So many bytes."""

    delimited = True

    def __init__(self, size: int) -> None:
        self._left = size
        self.complete = size == 0
        self.surplus = False

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._left:
            data, self.surplus = data[: self._left], True
        self._left -= len(data)
        self.complete = not self._left
        return data

    def end(self) -> None:
        if not self.complete:
            raise MalformedBody(f"the connection ended {self._left} bytes before the end of the body")


class OpenBody:
    """Everything until the connection ends."""

    delimited = False
    surplus = False

    def __init__(self) -> None:
        self.complete = False

    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> None:
        self.complete = True


class ChunkedBody:
    """Transfer-Encoding: chunked. Extensions and trailers are read over."""

    delimited = True

    def __init__(self) -> None:
        self.complete = self.surplus = False
        self._rest = b""
        """An unfinished line, or the unfinished end of a chunk."""
        self._left = 0
        """Of the chunk that is being read, its CR LF included."""
        self._trailers = -1
        """Lines after the last chunk; -1 before it."""

    def feed(self, data: bytes) -> bytes:
        if self._rest:
            data, self._rest = self._rest + data, b""
        payload: list[bytes] = []
        at = 0
        while at < len(data) and not self.complete:
            if self._left > 2 or (self._left and len(data) - at >= 2):
                at = self._read_chunk(data, at, payload)
            elif self._left:
                break
            else:
                line_end = data.find(b"\r\n", at, at + MAX_LINE)
                if line_end < 0:
                    if len(data) - at >= MAX_LINE:
                        raise MalformedBody("a line of the chunked body does not end")
                    break
                self._read_line(data, at, line_end)
                at = line_end + 2
        self._rest = data[at:]
        self.surplus = self.complete and bool(self._rest)
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def end(self) -> None:
        if not self.complete:
            raise MalformedBody("the connection ended before the last chunk")

    def _read_chunk(self, data: bytes, at: int, payload: list[bytes]) -> int:
        """What there is of the current chunk, and its CR LF once all of it is there."""
        available = min(self._left - 2, len(data) - at)
        if available:
            payload.append(data[at : at + available])
            at += available
            self._left -= available
        if self._left == 2 and len(data) - at >= 2:
            if data[at : at + 2] != b"\r\n":
                raise MalformedBody("a chunk is longer than its size says")
            at += 2
            self._left = 0
        return at

    def _read_line(self, data: bytes, at: int, line_end: int) -> None:
        """The size line of the next chunk, or a line after the last one."""
        if self._trailers >= 0:
            self._trailers += 1
            if self._trailers > MAX_TRAILERS:
                raise MalformedBody("there are too many trailers")
            self.complete = at == line_end
            return
        match = _SIZE.fullmatch(data, at, line_end)
        if match is None:
            raise MalformedBody(f"{data[at : min(line_end, at + 40)]!r} is no size of a chunk")
        size = int(match[1], 16)
        if size:
            self._left = size + 2
        else:
            self._trailers = 0
