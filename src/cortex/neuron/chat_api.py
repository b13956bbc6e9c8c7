"""POST /v1/chat/completions of a node: a lease on the model, its text side, and bytes.

Knows HTTP and the conversation's shape; rendering, limits and stop strings are `text`'s.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Final

import msgspec

from cortex.neuron.metered_engine import MeteredEngine
from cortex.neuron.metrics import NeuronMetrics
from cortex.neuron.resident import Served
from cortex.neuron.residents import Residents
from cortex.neuron.text.aside import Aside
from cortex.neuron.text.chat import TextChat
from cortex.neuron.text.choices import collect
from cortex.neuron.text.sampling import wanted_choices
from cortex.web.asgi import EventStream, Request, Response
from cortex.wire import sse
from cortex.wire.chat import ChatChunk, ChatRequest, decode
from cortex.wire.errors import CortexError, to_bytes
from cortex.wire.node import CALLER_HEADER

_COMMENT: Final = sse.comment("keep-alive")
_encoder: Final = msgspec.json.Encoder()


class ChatApi:
    def __init__(
        self,
        residents: Residents,
        metrics: NeuronMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._residents = residents
        self._metrics = metrics
        self._clock = clock
        self._wall = wall
        self._aside = Aside()

    async def handle(self, request: Request) -> Response | EventStream:
        """Raises BadRequest and what a lease on the model raises; a stream does before its first byte."""
        try:
            wanted = decode(ChatRequest, await request.body())
            if self._residents.report(wanted.model) is not None:
                request.log["model"] = wanted.model
            if not wanted.stream:
                return await self._whole(request, wanted)
        except CortexError as error:
            self._metrics.refused(error.code)
            raise

        def begin() -> None:
            """Only now signs of life may go out: before the first token nothing commits to a status."""
            stream.keep_alive = _keep_alive

        stream = EventStream(self._events(request, wanted, begin), fail=_last_words)
        return stream

    async def _whole(self, request: Request, wanted: ChatRequest) -> Response:
        async with self._lease(request, wanted) as served:
            reply = await collect(self._chunks(request, wanted, served))
        return Response(_encoder.encode(reply))

    async def _events(
        self, request: Request, wanted: ChatRequest, begin: Callable[[], None]
    ) -> AsyncGenerator[bytes, None]:
        begun = False
        try:
            async with (
                self._lease(request, wanted) as served,
                aclosing(self._chunks(request, wanted, served)) as chunks,
            ):
                async for chunk in chunks:
                    if not begun:
                        begun = True
                        begin()
                    yield b"data: " + _encoder.encode(chunk) + b"\n\n"
        except CortexError as error:
            if not begun:
                self._metrics.refused(error.code)
            raise
        yield sse.DONE

    def _lease(self, request: Request, wanted: ChatRequest) -> AbstractAsyncContextManager[Served]:
        """A place in line for each reply of the request. Raises BadRequest if it asks for too many."""
        places = wanted_choices(wanted)
        return self._residents.lease(wanted.model, request.id, caller=_caller(request), places=places)

    def _chunks(
        self, request: Request, wanted: ChatRequest, served: Served
    ) -> AsyncGenerator[ChatChunk, None]:
        model_id = served.plan.order.model_id
        engine = MeteredEngine(
            served.model.engine, model_id, self._metrics, started=request.started, clock=self._clock
        )
        codec, limit = served.model.codec, served.plan.limit
        chat = TextChat(engine, codec, limit, model_id, self._wall, self._clock, self._aside)
        return chat.chat(request.id, wanted)


def _caller(request: Request) -> str:
    """Whom a gateway asks for; without one, the address at the other end."""
    named = request.headers.get(CALLER_HEADER)
    return named or (request.client[0] if request.client else "")


def _keep_alive() -> bytes:
    return _COMMENT


def _last_words(error: CortexError) -> bytes:
    """An error event, and the end without which some clients wait on."""
    return sse.encode(to_bytes(error)) + sse.DONE
