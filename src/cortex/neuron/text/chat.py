"""Chat over a token engine: a request in, chunks of a chat completion out.

Renders, encodes, checks limits, generates one or several choices, turns ids into text, minds stop strings,
counts. Knows no HTTP and no model: those are behind the Codec and the TokenEngine.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Final

import msgspec

from cortex.hookspecs import Codec, Sampling, TokenEngine
from cortex.neuron.text.aside import Aside
from cortex.neuron.text.choices import closing, side_by_side
from cortex.neuron.text.conversation import characters, plain_messages, plain_tools
from cortex.neuron.text.reply import Chunks, Reply, usage
from cortex.neuron.text.sampling import of_choice, refuse_unsupported, sampling, stop_strings, wanted_choices
from cortex.wire.chat import ChatChunk, ChatRequest
from cortex.wire.errors import BadRequest, ContextTooLong, Internal
from cortex.wire.node import Limit

_MOST_CHARS_PER_TOKEN: Final = 128
"""No whole prompt comes near this, so one with more characters cannot fit and is not even encoded."""
_RESERVED: Final = frozenset({"self", "messages", "tools", "documents", "add_generation_prompt"})


class TextChat:
    """Chat completions of one loaded model.

    `clock` is the time of day in seconds (for `created`), `timer` a monotonic one (for timings that the
    engine did not report, as when a stop string ended the reply). `aside` is where prompts are made.
    """

    def __init__(
        self,
        engine: TokenEngine,
        codec: Codec,
        limit: Limit,
        model_id: str,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
        aside: Aside | None = None,
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._limit = limit
        self._model_id = model_id
        self._clock = clock
        self._timer = timer
        self._aside = aside or Aside()

    async def chat(self, request_id: str, request: ChatRequest) -> AsyncGenerator[ChatChunk, None]:
        """The reply, chunk by chunk; nothing comes before the first token.

        The first chunk of each choice carries the role, its last one the finish reason; chunks of several
        choices come mixed. The usage chunk comes last where `stream_options.include_usage` asks for it,
        and always for a request that does not stream, so that `collect` finds it. Timings are on the last
        chunk, those of the choice that ended last. Closing the iterator ends the engine's sequences.

        Raises BadRequest (ContextTooLong with `max` and `prompt_tokens`) before any work, and what the
        engine raises.
        """
        refuse_unsupported(request)
        stops, count = stop_strings(request), wanted_choices(request)
        wish = sampling(request, self._codec)
        ids = await self._encode(request)
        order = self._fit(wish, len(ids))
        replies = self._replies(request_id, count, stops, order, len(ids))
        sources = [
            self._say(request_id, ids, of_choice(order, index), reply) for index, reply in enumerate(replies)
        ]
        asked = request.stream_options and request.stream_options.include_usage
        with_usage = bool(asked) or not request.stream
        running, last = len(replies), replies[0]
        async with closing(sources[0] if running == 1 else side_by_side(sources)) as chunks:
            async for chunk in chunks:
                (choice,) = chunk.choices
                if choice.finish_reason is not None:
                    running, last = running - 1, replies[choice.index]
                    if not running and not with_usage:
                        chunk.timings = last.timings()
                yield chunk
        if with_usage:
            yield last.usage_chunk(usage(replies))

    async def count(self, request: ChatRequest) -> int:
        """Tokens of the rendered prompt. Raises BadRequest."""
        return len(await self._encode(request))

    def _replies(
        self, request_id: str, count: int, stops: tuple[str, ...], order: Sampling, prompt_tokens: int
    ) -> list[Reply]:
        reply_id = f"chatcmpl-{request_id or secrets.token_hex(12)}"
        created = int(self._clock())
        return [
            Reply(
                Chunks(reply_id, self._model_id, created, index),
                self._codec,
                stops,
                self._timer,
                prompt_tokens=prompt_tokens,
                logprobs=order.logprobs is not None,
            )
            for index in range(count)
        ]

    async def _say(
        self, request_id: str, ids: Sequence[int], order: Sampling, reply: Reply
    ) -> AsyncGenerator[ChatChunk, None]:
        """The chunks of one choice; its sequence is over before the last of them comes."""
        chunk = None
        async with closing(self._engine.generate(request_id, ids, order)) as batches:
            async for batch in batches:
                chunk = reply.take(batch)
                if reply.finish is not None:
                    break
                if chunk is not None:
                    yield chunk
        if reply.finish is None:
            raise Internal("The engine ended the reply without saying why. Send the request again.")
        if chunk is not None:
            yield chunk
        yield reply.last_chunk()

    async def _encode(self, request: ChatRequest) -> list[int]:
        reserved = _RESERVED & (request.chat_template_kwargs or {}).keys()
        if reserved:
            names = ", ".join(sorted(reserved))
            raise BadRequest(f"chat_template_kwargs cannot set {names}.", param="chat_template_kwargs")
        return await self._aside.run(self._model_id, characters(request), partial(self._prompt, request))

    def _prompt(self, request: ChatRequest) -> list[int]:
        """The ids of the conversation. Takes a while if that is long, and seconds where a template is bad."""
        # A client that forbids tools gets a prompt without them.
        tools = None if request.tool_choice == "none" else plain_tools(request.tools)
        variables = request.chat_template_kwargs or {}
        text = self._codec.render(
            plain_messages(request), tools=tools, add_generation_prompt=True, **variables
        )
        longest = self._limit.input or self._limit.context
        if longest and len(text) > longest * _MOST_CHARS_PER_TOKEN:
            raise self._too_long(len(text) // _MOST_CHARS_PER_TOKEN, "more than ")
        return self._codec.encode(text)

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
        most = min(room)
        reserve = None if wish.reserve is None else min(wish.reserve, most)
        return msgspec.structs.replace(wish, max_tokens=most, reserve=reserve)

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
