"""Chat over a token engine: a request in, chunks of a chat completion out.

Renders, encodes, checks limits, generates, turns ids into text, minds stop strings, counts. Knows no
HTTP and no model: those are behind the Codec and the TokenEngine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from cortex.hookspecs import Codec, Sampling, TokenEngine
from cortex.neuron.text.conversation import plain_messages, plain_tools
from cortex.neuron.text.reply import Chunks, Reply
from cortex.neuron.text.sampling import refuse_unsupported, sampling, stop_strings
from cortex.wire.chat import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ReplyMessage,
    Timings,
    Usage,
)
from cortex.wire.errors import BadRequest, ContextTooLong, Internal
from cortex.wire.node import Limit

_OFF_LOOP: Final = 8192
"""Characters; a longer prompt is encoded in a thread, as it takes milliseconds."""
_MOST_CHARS_PER_TOKEN: Final = 128
"""No whole prompt comes near this, so one with more characters cannot fit and is not even encoded."""
_RESERVED: Final = frozenset({"self", "messages", "tools", "documents", "add_generation_prompt"})


class TextChat:
    """Chat completions of one loaded model.

    `clock` is the time of day in seconds (for `created`), `timer` a monotonic one (for timings that the
    engine did not report, as when a stop string ended the reply).
    """

    def __init__(
        self,
        engine: TokenEngine,
        codec: Codec,
        limit: Limit,
        model_id: str,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._limit = limit
        self._model_id = model_id
        self._clock = clock
        self._timer = timer

    async def chat(self, request_id: str, request: ChatRequest) -> AsyncGenerator[ChatChunk, None]:
        """The reply, chunk by chunk; nothing comes before the first token.

        The first chunk carries the role, the last but one or last the finish reason. The usage chunk comes
        last where `stream_options.include_usage` asks for it, and always for a request that does not
        stream, so that `collect` finds it. Timings are on the last chunk. Closing the iterator ends the
        engine's sequence.

        Raises BadRequest (ContextTooLong with `max` and `prompt_tokens`) before any work, and what the
        engine raises.
        """
        refuse_unsupported(request)
        reply = Reply(self._codec, stop_strings(request), self._timer)
        wish = sampling(request, self._codec.defaults, self._codec.stop_ids)
        ids = await self._encode(request)
        chunks = Chunks(request_id, self._model_id, int(self._clock()))
        reply.begin(len(ids))
        async with _closing(self._engine.generate(request_id, ids, self._fit(wish, len(ids)))) as batches:
            async for batch in batches:
                text = reply.take(batch)
                if reply.finish is not None:
                    break
                if text or not chunks.started:
                    yield chunks.text(text)
        if reply.finish is None:
            raise Internal("The engine ended the reply without saying why. Send the request again.")
        if text or not chunks.started:
            yield chunks.text(text)
        asked = bool(request.stream_options and request.stream_options.include_usage)
        if asked or not request.stream:
            yield chunks.finish(reply.finish)
            yield chunks.usage(reply.usage(), reply.timings())
        else:
            yield chunks.finish(reply.finish, reply.timings())

    async def count(self, request: ChatRequest) -> int:
        """Tokens of the rendered prompt. Raises BadRequest."""
        return len(await self._encode(request))

    async def _encode(self, request: ChatRequest) -> list[int]:
        variables = request.chat_template_kwargs or {}
        reserved = _RESERVED & variables.keys()
        if reserved:
            names = ", ".join(sorted(reserved))
            raise BadRequest(f"chat_template_kwargs cannot set {names}.", param="chat_template_kwargs")
        # A client that forbids tools gets a prompt without them.
        tools = None if request.tool_choice == "none" else plain_tools(request.tools)
        text = self._codec.render(
            plain_messages(request), tools=tools, add_generation_prompt=True, **variables
        )
        longest = self._limit.input or self._limit.context
        if longest and len(text) > longest * _MOST_CHARS_PER_TOKEN:
            raise self._too_long(len(text) // _MOST_CHARS_PER_TOKEN, "more than ")
        if len(text) < _OFF_LOOP:
            return self._codec.encode(text)
        return await asyncio.to_thread(self._codec.encode, text)

    def _fit(self, wish: Sampling, prompt_tokens: int) -> Sampling:
        """`wish` with as many tokens as fit. Raises ContextTooLong if the prompt leaves no room for one."""
        limit = self._limit
        if limit.input and prompt_tokens > limit.input:
            raise self._too_long(prompt_tokens)
        room = [wish.max_tokens]
        if limit.output:
            room.append(limit.output)
        if limit.context:
            room.append(limit.context - prompt_tokens)
        if min(room) < 1:
            raise self._too_long(prompt_tokens)
        return msgspec.structs.replace(wish, max_tokens=min(room))

    def _too_long(self, prompt_tokens: int, about: str = "") -> ContextTooLong:
        context, longest = self._limit.context, self._limit.input
        if longest and (not context or longest < context):
            bound = f"this model's longest prompt is {longest} tokens"
        else:
            longest = context - 1
            bound = f"this model's maximum context length is {context} tokens, reply included"
        return ContextTooLong(
            f"The prompt has {about}{prompt_tokens} tokens, but {bound}. Shorten the messages.",
            param="messages",
            details={"max": longest, "prompt_tokens": prompt_tokens},
        )


async def collect(chunks: AsyncIterator[ChatChunk]) -> ChatCompletion:
    """The whole reply as one object; closes `chunks`. Raises what they raise."""
    reply = ChatCompletion()
    choice = Choice(message=ReplyMessage(content=""))
    texts: list[str] = []
    async with _closing(chunks):
        async for chunk in chunks:
            reply.id, reply.created, reply.model = chunk.id, chunk.created, chunk.model
            for part in chunk.choices:
                if isinstance(part.delta.content, str):
                    texts.append(part.delta.content)
                choice.finish_reason = part.finish_reason or choice.finish_reason
            if isinstance(chunk.usage, Usage):
                reply.usage = chunk.usage
            if isinstance(chunk.timings, Timings):
                reply.timings = chunk.timings
    choice.message.content = "".join(texts)
    reply.choices = [choice]
    return reply


@asynccontextmanager
async def _closing(source: AsyncIterator[Any]) -> AsyncIterator[AsyncIterator[Any]]:
    """As contextlib.aclosing, for iterators that may have nothing to close."""
    try:
        yield source
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
