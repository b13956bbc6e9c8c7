"""Server-sent events, both ways: an incremental, size-bounded decoder and an encoder. No I/O.

The decoder loses nothing: what it has given as `raw` and what is still `pending` are, one after the
other, exactly the bytes that went in. It knows the framing only, not what the data of an event means.
Format: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from cortex.wire.errors import NodeLost

MAX_EVENT: Final = 16 * 2**20
"""Bytes of one event, framing included."""

DONE: Final = b"data: [DONE]\n\n"
"""How an OpenAI stream says that it is complete."""

_BOM: Final = b"\xef\xbb\xbf"
_BLANK_LINE: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
"""The end of a line and an empty line after it. Atomic: a CR LF must never count as two line ends."""


class Event(msgspec.Struct):
    """What stands between two blank lines.

    `raw` is every byte of it, the blank line included. A block without data (comments, a lone `retry`,
    a surplus blank line) is an Event too, with `data` empty: it is there to be passed on, not to be read.
    """

    data: bytes
    event: str = ""
    id: str = ""
    raw: bytes = b""


class Decoder:
    """Bytes in, events out. The events do not depend on how the bytes were cut.

    An event that ends in a lone CR is held until the next byte, which may be the LF of that CR; `close`
    gives it when no byte will come.
    """

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self._max_event = max_event
        self._parts: list[bytes] = []
        self._size = 0
        self._tail = b""
        self._first = True

    @property
    def pending(self) -> bytes:
        """What came after the last event: the beginning of one that is not complete."""
        return b"".join(self._parts)

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that `chunk` completes. Raises NodeLost if one exceeds the size limit."""
        if not self._parts:
            return self._split(chunk)
        # A long event comes in many pieces: join them once, when its end has come.
        seam = self._tail + chunk
        if not (_BLANK_LINE.search(seam) if b"\r" in seam else b"\n\n" in seam):
            self._keep(chunk)
            return []
        self._parts.append(chunk)
        return self._split(b"".join(self._parts))

    def close(self) -> list[Event]:
        """No more bytes will come. An event that was held for its LF is given; the rest stays pending."""
        rest = self.pending
        if not rest.endswith(b"\r") or not (match := _BLANK_LINE.search(rest)):
            return []
        self._hold(b"")
        return [self._event(rest, match.start())]

    def _split(self, data: bytes) -> list[Event]:
        if b"\r" not in data and len(data) <= self._max_event and not (self._first and data[:1] == _BOM[:1]):
            *blocks, rest = data.split(b"\n\n")
            self._hold(rest)
            self._first = self._first and not blocks
            return [
                Event(block[6:], "", "", block + b"\n\n")
                if block[:6] == b"data: " and b"\n" not in block
                else _parse(block, block + b"\n\n")
                for block in blocks
            ]
        events, start = [], 0
        for match in _BLANK_LINE.finditer(data):
            if match.end() == len(data) and data.endswith(b"\r"):
                break
            events.append(self._event(data[start : match.end()], match.start() - start))
            start = match.end()
        self._hold(data[start:])
        return events

    def _hold(self, rest: bytes) -> None:
        self._parts, self._size, self._tail = [], 0, b""
        if rest:
            self._keep(rest)

    def _keep(self, rest: bytes) -> None:
        self._size += len(rest)
        self._check(self._size)
        self._parts.append(rest)
        # Two bytes tell whether a blank line may lie across the next seam: it holds two line ends even
        # if it has begun before them.
        self._tail = (self._tail + rest)[-2:]

    def _check(self, size: int) -> None:
        if size > self._max_event:
            raise NodeLost(
                f"The node sent an event of more than {self._max_event} bytes.", code="event_too_large"
            )

    def _event(self, raw: bytes, end: int) -> Event:
        """`end` is where the blank line begins, the end of the last line included."""
        self._check(len(raw))
        begin = 0
        if self._first:
            self._first = False
            begin = len(_BOM) if raw.startswith(_BOM) else 0
        return _parse(raw[begin:end], raw)


def _parse(block: bytes, raw: bytes) -> Event:
    data: list[bytes] = []
    event = Event(b"", raw=raw)
    for line in block.splitlines():
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            event.event = value.decode("utf-8", "replace")
        elif name == b"id" and b"\0" not in value:
            event.id = value.decode("utf-8", "replace")
    event.data = b"\n".join(data)
    return event


def encode(data: bytes, event: str = "", id: str = "") -> bytes:
    """One event. Every kind of line end in `data` separates lines, which a reader joins with LF.

    Raises ValueError if `event` or `id` holds a line end or NUL, which no reader could tell apart.
    """
    if b"\n" in data or b"\r" in data:
        # A line end at the very end has an empty line after it, which splitlines drops.
        lines = (data + b"x").splitlines()
        lines[-1] = lines[-1][:-1]
        body = b"".join(b"data: %b\n" % line for line in lines)
    else:
        body = b"data: %b\n" % data
    return _field("event", event) + _field("id", id) + body + b"\n"


def comment(text: str) -> bytes:
    """A comment: shows that the connection lives, and means nothing to a reader."""
    return b"".join(b": %b\n" % line for line in text.encode().splitlines() or [b""]) + b"\n"


def _field(name: str, value: str) -> bytes:
    if not value:
        return b""
    if any(bad in value for bad in "\r\n\0"):
        raise ValueError(f"the {name} of a server-sent event cannot hold line ends or NUL: {value!r}")
    return f"{name}: {value}\n".encode()
