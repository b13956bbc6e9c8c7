"""Several choices of one reply: side by side in a stream, and put together in a whole reply.

Knows the wire's chunks and nothing of how they are made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from cortex.wire.chat import (
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    ContentLogprob,
    Logprobs,
    ReplyMessage,
    Timings,
    Usage,
)

T = TypeVar("T")


async def side_by_side(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What all sources give, as it comes.

    Each source runs in a task of its own and goes on once what it gave is next in line to be taken.
    However this ends, by its end, by the first source that fails, by closing or cancelling it, every
    source is closed and every task is over then.

    Raises what the first source raises that fails.
    """
    queue: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue(maxsize=1)
    tasks = [asyncio.create_task(_pump(source, queue)) for source in sources]
    try:
        running = len(tasks)
        while running:
            match await queue.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case (item,):
                    yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _pump(source: AsyncGenerator[T, None], queue: asyncio.Queue[tuple[T] | Exception | None]) -> None:
    last: Exception | None = None
    try:
        async with aclosing(source):
            async for item in source:
                await queue.put((item,))
    except Exception as error:
        last = error
    await queue.put(last)


async def collect(chunks: AsyncIterator[ChatChunk]) -> ChatCompletion:
    """The whole reply as one object, its choices by index; closes `chunks`. Raises what they raise."""
    reply = ChatCompletion()
    choices: dict[int, _Gathered] = {}
    async with closing(chunks):
        async for chunk in chunks:
            reply.id, reply.created, reply.model = chunk.id, chunk.created, chunk.model
            for part in chunk.choices:
                choices.setdefault(part.index, _Gathered()).add(part)
            if isinstance(chunk.usage, Usage):
                reply.usage = chunk.usage
            if isinstance(chunk.timings, Timings):
                reply.timings = chunk.timings
    reply.choices = [choices[index].choice(index) for index in sorted(choices)]
    return reply


class _Gathered:
    """What the chunks of one choice said."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._logprobs: list[ContentLogprob] | None = None
        self._finish: str | None = None

    def add(self, part: ChunkChoice) -> None:
        if isinstance(part.delta.content, str):
            self._texts.append(part.delta.content)
        if part.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += part.logprobs.content or ()
        self._finish = part.finish_reason or self._finish

    def choice(self, index: int) -> Choice:
        return Choice(
            index=index,
            message=ReplyMessage(content="".join(self._texts)),
            logprobs=None if self._logprobs is None else Logprobs(content=self._logprobs),
            finish_reason=self._finish,
        )


@asynccontextmanager
async def closing(source: AsyncIterator[Any]) -> AsyncIterator[AsyncIterator[Any]]:
    """As contextlib.aclosing, for iterators that may have nothing to close."""
    try:
        yield source
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
