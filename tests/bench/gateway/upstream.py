"""An instant upstream that costs next to nothing: every reply is bytes that were made at start-up.

Answers as a neuron (/health, /discovery, /version, /models), as an OpenAI server (/v1/models) and to
chats in the three kinds of `exchange`. Knows only as much HTTP as well-behaved gateways send.
Run as `python -m gateway.upstream PORT`; ends with its parent or on SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Final, cast

import uvloop

from . import exchange
from .exchange import Kind

_LENGTH: Final = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"transfer-encoding:[^\r]*chunked", re.IGNORECASE)
_LAST_CHUNK: Final = b"0\r\n\r\n"
_STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def _reply(value: object) -> bytes:
    return _whole(json.dumps(value).encode())


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_DEVICE: Final = {"index": 0, "uuid": "cpu-0", "name": "bench", "vram_total_mb": 1024, "kind": "cpu"}
_LIMIT: Final = {"context": 8192, "input": 8192, "output": 8192}
_REPORT: Final = {
    "id": exchange.MODEL,
    "harness": "bench",
    "status": "loaded",
    "devices": ["cpu-0"],
    "loaded_at": 1750000000.0,
    "capabilities": ["chat"],
    "limit": _LIMIT,
    "servable": {"ok": True},
}
_CARD: Final = {"id": exchange.MODEL, "object": "model", "created": 1750000000, "owned_by": "bench"}
_PAGES: Final = {
    b"/health": _reply({"uptime_secs": 1.0, "devices": [], "models": [{"id": exchange.MODEL}]}),
    b"/discovery": _reply(
        {"hostname": "bench", "os": "linux", "devices": [_DEVICE], "harnesses": ["bench"], "wire_version": 1}
    ),
    b"/version": _reply({"package_version": "0", "wire_version": 1}),
    b"/models": _reply([_REPORT]),
    b"/v1/models": _reply({"object": "list", "data": [_CARD]}),
}
_NOT_FOUND: Final = _whole(b'{"error":{"message":"not found"}}', b"404 Not Found")
_COMPLETION: Final = _whole(exchange.completion())
_STREAMS: Final = {usage: [_chunk(event) for event in exchange.events(usage)] for usage in (False, True)}
_BURSTS: Final = {usage: _STREAM_HEAD + b"".join(c) + _LAST_CHUNK for usage, c in _STREAMS.items()}


class Upstream(asyncio.Protocol):
    """One connection of a gateway; requests on it come one after another."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.loop = asyncio.get_running_loop()
        self.buffer = b""
        self.timer: asyncio.TimerHandle | None = None

    def connection_lost(self, error: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer = self.buffer + data if self.buffer else data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head, rest = self.buffer[:end], self.buffer[end + 4 :]
        length = _LENGTH.search(head)
        if length is not None:
            if len(rest) < int(length[1]):
                return
        elif _CHUNKED.search(head) and not rest.endswith(_LAST_CHUNK):
            return
        self.buffer = b""
        self.answer(head, rest)

    def answer(self, head: bytes, body: bytes) -> None:
        path = head.split(b" ", 2)[1].partition(b"?")[0]
        if path != b"/v1/chat/completions":
            self.transport.write(_PAGES.get(path, _NOT_FOUND))
            return
        kind = exchange.asked_kind(body)
        if kind is Kind.PLAIN:
            self.transport.write(_COMPLETION)
        elif kind is Kind.BURST:
            self.transport.write(_BURSTS[exchange.wants_usage(body)])
        else:
            self.transport.write(_STREAM_HEAD)
            self.pace(_STREAMS[exchange.wants_usage(body)], 0, self.loop.time())

    def pace(self, chunks: list[bytes], index: int, started: float) -> None:
        """Send one event and set the clock for the next; the last goes together with `[DONE]`."""
        if index == len(chunks) - 2:
            self.transport.write(chunks[index] + chunks[index + 1] + _LAST_CHUNK)
            return
        self.transport.write(chunks[index])
        due = started + (index + 1) * exchange.PACE
        self.timer = self.loop.call_at(due, self.pace, chunks, index + 1, started)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
