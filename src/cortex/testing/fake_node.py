"""A neuron that runs no model: speaks the neuron API and answers chats by a script.

For tests of whatever talks to nodes. Time passes only where the test holds a gate shut.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import msgspec

from cortex import __version__
from cortex.web.asgi import EventStream, Request, Response, json_response
from cortex.web.service import Route, Service
from cortex.wire import sse
from cortex.wire.chat import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    ReplyMessage,
    Usage,
    decode,
    encode,
)
from cortex.wire.errors import CortexError, Internal, to_bytes
from cortex.wire.node import (
    Discovery,
    Health,
    Limit,
    LoadEvent,
    LoadReply,
    ModelLoad,
    ModelReport,
    Version,
)


class FakeNode:
    """`app` is the ASGI application. Everything a test may want to steer or see is a plain attribute."""

    def __init__(self, models: Iterable[str] = ("m",), *, words: Sequence[str] = ("Hel", "lo")) -> None:
        self.reports: dict[str, ModelReport] = {}
        for model in models:
            self.add(model)
        self.words: Sequence[str] = words
        self.prompt_tokens = 3
        self.gate: asyncio.Semaphore | None = None
        """Where set, every word, and then the end, waits until the test has released it."""
        self.refusal: CortexError | None = None
        """Where set, chats are refused with it before anything is sent."""
        self.break_after: int | None = None
        """Where set, the stream ends without its end after so many words."""
        self.garbage: bytes | None = None
        """Where set, this is the body of every answer."""
        self.silent: set[str] = set()
        """Paths that are never answered."""
        self.broken: set[str] = set()
        """Paths that answer 500."""
        self.lists_requests = True
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.orders: list[tuple[str, bytes]] = []
        self.on_order: Callable[[], object] = lambda: None
        """Called when a load or an unload has come in: what it does to the node."""
        self.running: list[str] = []
        self.cancelled: list[str] = []
        self.arrived = asyncio.Event()
        """Set when a chat has come in."""
        self.left = asyncio.Event()
        """Set when a chat was cancelled."""
        self.app = Service(
            [
                Route("GET", "/models", self._models),
                Route("GET", "/health", self._health),
                Route("GET", "/discovery", self._discovery),
                Route("GET", "/version", self._version),
                Route("POST", "/models/load", self._order),
                Route("POST", "/models/unload", self._order),
                Route("POST", "/v1/chat/completions", self._chat),
            ],
            name="fake-node",
        )

    def add(self, model: str, **fields: object) -> None:
        known = {"harness": "fake", "limit": Limit(context=4096, input=4096, output=4096)}
        self.reports[model] = msgspec.convert({"id": model, **known, **fields}, ModelReport)

    async def _models(self, request: Request) -> Response:
        return await self._answer(request, list(self.reports.values()))

    async def _health(self, request: Request) -> Response:
        loads = [ModelLoad(id=model) for model in self.reports]
        requests = self.running if self.lists_requests else []
        return await self._answer(request, Health(models=loads, requests=requests))

    async def _discovery(self, request: Request) -> Response:
        return await self._answer(request, Discovery(hostname="fake", os="Linux", harnesses=["fake"]))

    async def _version(self, request: Request) -> Response:
        return await self._answer(request, Version(package_version=__version__))

    async def _order(self, request: Request) -> Response | EventStream:
        self.orders.append((request.path, await request.body()))
        self.on_order()
        if self.refusal is not None:
            raise self.refusal
        if "text/event-stream" in request.headers.get("accept", ""):
            return EventStream(self._loaded(), fail=lambda error: sse.encode(to_bytes(error)))
        return await self._answer(request, LoadReply(status="loaded"))

    async def _loaded(self) -> AsyncIterator[bytes]:
        yield sse.encode(msgspec.json.encode(LoadEvent(event="loaded")), event="loaded")

    async def _answer(self, request: Request, value: object) -> Response:
        if request.path in self.silent:
            await asyncio.Event().wait()
        if request.path in self.broken:
            raise Internal("broken on purpose")
        return json_response(value) if self.garbage is None else Response(self.garbage)

    async def _chat(self, request: Request) -> Response | EventStream:
        body = await request.body()
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.arrived.set()
        if self.refusal is not None:
            raise self.refusal
        call = decode(ChatRequest, body)
        if call.stream:
            usage = bool(call.stream_options and call.stream_options.include_usage)
            events = self._events(request.id, call.model, usage)
            return EventStream(events, fail=lambda error: sse.encode(to_bytes(error)))
        spoken = [word async for word in self._speak(request.id)]
        if self.garbage is not None:
            return Response(self.garbage)
        message = ReplyMessage(content="".join(spoken))
        choice = Choice(message=message, finish_reason="stop")
        counted = self._usage(len(spoken))
        return Response(
            encode(ChatCompletion(id=request.id, model=call.model, choices=[choice], usage=counted))
        )

    async def _speak(self, request_id: str) -> AsyncIterator[str]:
        self.running.append(request_id)
        try:
            for word in self.words:
                if self.gate is not None:
                    await self.gate.acquire()
                yield word
            if self.gate is not None:
                await self.gate.acquire()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request_id)
            self.left.set()
            raise
        finally:
            self.running.remove(request_id)

    async def _events(self, request_id: str, model: str, usage: bool) -> AsyncIterator[bytes]:
        spoken = 0
        async for word in self._speak(request_id):
            if self.garbage is not None:
                yield self.garbage
                return
            if spoken == self.break_after:
                return
            spoken += 1
            yield self._event(ChunkChoice(delta=Delta(content=word)), request_id, model)
        yield self._event(ChunkChoice(finish_reason="stop"), request_id, model)
        if usage:
            chunk = ChatChunk(id=request_id, model=model, choices=[], usage=self._usage(spoken))
            yield sse.encode(encode(chunk))
        yield sse.DONE

    def _event(self, choice: ChunkChoice, request_id: str, model: str) -> bytes:
        return sse.encode(encode(ChatChunk(id=request_id, model=model, choices=[choice])))

    def _usage(self, completion: int) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion,
            total_tokens=self.prompt_tokens + completion,
        )
