"""Takes one HTTP reply off a connection: enough of HTTP/1.1 to know that it ended, as cheaply as can be.

The body is put together only once the reply looks finished. Knows nothing of what the body says.
"""

from __future__ import annotations

import re
from typing import Final

_LENGTH: Final = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding:[^\r]*chunked", re.IGNORECASE)
_CLOSES: Final = re.compile(rb"\r\nconnection:\s*close", re.IGNORECASE)
_LAST_CHUNK: Final = b"0\r\n\r\n"


class Reply:
    """Feed it what the socket delivers until it says that the reply is complete."""

    def __init__(self) -> None:
        self.status = 0
        self.closes = False
        self.body = b""
        self._raw = bytearray()
        self._start = 0
        self._length: int | None = None

    def feed(self, data: bytes) -> bool:
        """True once the reply is whole; `body` is then set, without transfer coding."""
        self._raw += data
        if not self._start and not self._read_head():
            return False
        if self._length is not None:
            if len(self._raw) < self._start + self._length:
                return False
            self.body = bytes(self._raw[self._start :])
            return True
        if not self._raw.endswith(_LAST_CHUNK):
            return False
        return self._join_chunks()

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._raw[: end + 2])
        self._start = end + 4
        self.status = int(head[9:12])
        self.closes = _CLOSES.search(head) is not None
        length = _LENGTH.search(head)
        if length is not None:
            self._length = int(length[1])
        elif not _CHUNKED.search(head):
            raise ValueError("a reply with neither content-length nor chunks")
        return True

    def _join_chunks(self) -> bool:
        """Join the chunks; False if the end was not the last chunk but data that looks like it."""
        raw, at = bytes(self._raw), self._start
        parts: list[bytes] = []
        while (end := raw.find(b"\r\n", at)) >= 0:
            size = int(raw[at:end].partition(b";")[0], 16)
            if size == 0:
                self.body = b"".join(parts)
                return True
            parts.append(raw[end + 2 : end + 2 + size])
            at = end + size + 4
        return False
