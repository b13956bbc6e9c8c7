"""What tests of the web layer share: a service around one handler, and a pool over scripted streams."""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence

import pytest

from cortex.testing import AsgiClient, ManualClock
from cortex.web.asgi import Handler
from cortex.web.pool import Pool
from cortex.web.service import Route, Service


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def serving(clock: ManualClock) -> Callable[..., AsgiClient]:
    """A client of a service that answers POST and GET / with the given handler."""

    def make(handler: Handler, **options: object) -> AsgiClient:
        routes = [Route("POST", "/", handler), Route("GET", "/", handler)]
        service = Service(routes, name="test", clock=clock, call_later=clock.call_later, **options)
        return AsgiClient(service)

    return make


class ScriptedStream:
    """A byte stream that delivers what the test says: bytes, b"" for the end, or an OSError.

    `answers` come one for each write. `taken` is whether the peer takes what is written, `noisy` whether
    the peer has closed or said something unasked.
    """

    def __init__(self, *reads: bytes | OSError, answers: Sequence[bytes] = ()) -> None:
        self.written = b""
        self.writes = 0
        self.answers = deque(answers)
        self.taken = True
        self.noisy = False
        self.closed = False
        self._reads = deque(reads)
        self._changed = asyncio.Event()

    def feed(self, *reads: bytes | OSError) -> None:
        self._reads.extend(reads)
        self._changed.set()

    async def read(self) -> bytes:
        while not self._reads and not self.closed:
            self._changed.clear()
            await self._changed.wait()
        if self.closed:
            raise ConnectionAbortedError("closed from this side")
        found = self._reads.popleft()
        if isinstance(found, OSError):
            raise found
        return found

    def write(self, *data: bytes) -> None:
        if self.closed:
            raise ConnectionResetError("closed")
        self.written += b"".join(data)
        self.writes += 1
        if self.answers:
            self.feed(self.answers.popleft())

    def unsent(self) -> int:
        return 0 if self.taken else len(self.written)

    def quiet(self) -> bool:
        return not self.noisy and not self._reads and not self.closed

    def close(self) -> None:
        self.closed = True
        self._changed.set()


class ScriptedNetwork:
    """A `Connect` whose connections are the given streams, in turn; an exception refuses one."""

    def __init__(self, *streams: ScriptedStream | BaseException) -> None:
        self.streams = list(streams)
        self.opened: list[tuple[str, int, bool]] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, host: str, port: int, context: ssl.SSLContext | None) -> ScriptedStream:
        self.opened.append((host, port, context is not None))
        if self.gate is not None:
            await self.gate.wait()
        found = self.streams[len(self.opened) - 1]
        if isinstance(found, BaseException):
            raise found
        return found


@pytest.fixture
def stream() -> type[ScriptedStream]:
    return ScriptedStream


@pytest.fixture
def pool_over(clock: ManualClock) -> Callable[..., Pool]:
    """A pool over the given scripted streams, on the test's clock."""

    def make(*streams: ScriptedStream | BaseException, **options: object) -> Pool:
        network = ScriptedNetwork(*streams)
        pool = Pool(connect=network, clock=clock, call_later=clock.call_later, **options)
        pool.network = network
        return pool

    return make
