"""Several choices: side by side in a stream, together in a whole reply, and over together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest
from openai.types.chat import ChatCompletion as OpenAICompletion
from openai.types.chat import ChatCompletionChunk as OpenAIChunk

from cortex.hookspecs import Sampling
from cortex.neuron.text.chat import TextChat
from cortex.neuron.text.choices import collect, side_by_side
from cortex.testing.scripted import ByteCodec, ScriptedEngine
from cortex.wire.chat import ChatChunk, ChatRequest, Timings, convert, to_plain
from cortex.wire.errors import CortexError
from cortex.wire.node import Limit

WIDE = Limit(context=4096, input=4096, output=4096)
WORDS = ("one", "second", "third!")


def request(**fields: Any) -> ChatRequest:
    fields = {"n": 3, "seed": 10, "stream": True} | fields
    return convert(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "h"}], **fields})


def by_seed(ids: Sequence[int], sampling: Sampling) -> list[list[int]]:
    """Each choice says another word, so that none can be taken for another."""
    assert sampling.seed is not None
    return [[byte] for byte in WORDS[sampling.seed - 10].encode()]


def chat(engine: ScriptedEngine, asked: ChatRequest) -> AsyncGenerator[ChatChunk, None]:
    return TextChat(engine, ByteCodec(), WIDE, "m").chat("r", asked)


@pytest.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() <= {*before, asyncio.current_task()}


# --- a stream -------------------------------------------------------------------------------------


async def test_choices_are_streamed_side_by_side_each_with_role_text_and_end() -> None:
    engine = ScriptedEngine(by_seed)
    chunks = [chunk async for chunk in chat(engine, request())]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    for index, word in enumerate(WORDS):
        own = [choice for choice in choices if choice.index == index]
        assert "".join(str(choice.delta.content or "") for choice in own[:-1]) == word
        assert [choice.delta.role == "assistant" for choice in own] == [True] + [False] * (len(own) - 1)
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert {choice.index for choice in choices[:4]} == {0, 1, 2}, "none waits for another's end"
    assert {chunk.id for chunk in chunks} == {"chatcmpl-r"}
    assert [isinstance(chunk.timings, Timings) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert engine.finished == ["r", "r", "r"]
    for chunk in chunks:
        OpenAIChunk.model_validate(to_plain(chunk))


async def test_each_choice_is_a_sequence_of_the_same_prompt_with_a_seed_of_its_own() -> None:
    engine = ScriptedEngine(by_seed)
    await collect(chat(engine, request(temperature=0.5)))
    assert [(id, sampling.seed) for id, _, sampling in engine.prompts] == [("r", 10), ("r", 11), ("r", 12)]
    assert len({(tuple(ids), sampling.temperature) for _, ids, sampling in engine.prompts}) == 1


async def test_the_usage_chunk_closes_the_stream_and_counts_the_prompt_once() -> None:
    asked = request(stream_options={"include_usage": True})
    *others, last = [chunk async for chunk in chat(ScriptedEngine(by_seed), asked)]
    said = sum(map(len, WORDS))
    assert (last.choices, to_plain(last)["usage"]) == (
        [],
        {"prompt_tokens": 20, "completion_tokens": said, "total_tokens": 20 + said},
    )
    assert isinstance(last.timings, Timings)
    assert not any("usage" in to_plain(chunk) or "timings" in to_plain(chunk) for chunk in others)


async def test_a_choice_that_ends_leaves_the_others_alone() -> None:
    engine, gate = ScriptedEngine(by_seed), asyncio.Event()

    async def hold(request_id: str, step: int) -> None:
        if step >= 2:
            await gate.wait()

    engine.before_step = hold
    stream = chat(engine, request(stop="ne"))
    async for chunk in stream:
        if chunk.choices[0].finish_reason:
            break
        if len(engine.waiting) == 3:
            gate.set()
    assert chunk.choices[0].index == 0
    assert engine.cancelled == ["r"], "its stop string ended its sequence"
    rest = [choice async for chunk in stream for choice in chunk.choices]
    assert [choice.index for choice in rest if choice.finish_reason] == [1, 2]


# --- a whole reply --------------------------------------------------------------------------------


async def test_a_whole_reply_has_its_choices_in_order() -> None:
    engine = ScriptedEngine(lambda ids, sampling: reversed_lengths(sampling))
    engine.cached_tokens = 7
    reply = await collect(chat(engine, request(stream=None)))
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [choice.message.content for choice in reply.choices] == ["xxx", "xx", "x"], "the last ended first"
    plain = to_plain(reply)
    assert plain["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": 6,
        "total_tokens": 26,
        "prompt_tokens_details": {"cached_tokens": 7},
    }
    assert plain["timings"]["prefill_ms"] == 10.0
    OpenAICompletion.model_validate(plain)


def reversed_lengths(sampling: Sampling) -> list[list[int]]:
    assert sampling.seed is not None
    return [[ord("x")]] * (13 - sampling.seed)


async def test_choices_of_one_end_for_reasons_of_their_own() -> None:
    reply = await collect(chat(ScriptedEngine(by_seed), request(max_tokens=4, stream=None)))
    assert [choice.finish_reason for choice in reply.choices] == ["stop", "length", "length"]
    assert [choice.message.content for choice in reply.choices] == ["one", "seco", "thir"]


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
async def test_closing_the_stream_ends_every_sequence(steps: int) -> None:
    engine = ScriptedEngine("a long reply")
    stream = chat(engine, request())
    for _ in range(steps):
        await anext(stream)
    await stream.aclose()
    assert (engine.cancelled, engine.running) == (["r"] * 3, [])


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_ends_every_sequence_in_prefill_and_in_decode(step: int, stream: bool) -> None:
    engine, never = ScriptedEngine("a long reply"), asyncio.Event()

    async def hold(request_id: str, number: int) -> None:
        if number == step:
            await never.wait()

    engine.before_step = hold
    waiting = asyncio.ensure_future(collect(chat(engine, request(stream=stream))))
    await engine.until(lambda: engine.steps == 3 * step and engine.waiting == ["r"] * 3)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (engine.cancelled, engine.running, engine.steps) == (["r"] * 3, [], 3 * step)


async def test_an_engine_that_dies_is_one_error_of_the_reply() -> None:
    engine = ScriptedEngine("Hi")
    stream = chat(engine, request())
    await anext(stream)
    engine.kill("out of memory")
    with pytest.raises(CortexError, match="out of memory"):
        async for _ in stream:
            pass
    assert engine.running == []


async def test_one_choice_that_fails_cancels_the_others() -> None:
    engine = ScriptedEngine("a long reply")
    fails = iter([False, True, False])

    async def fail(request_id: str, step: int) -> None:
        if step == 0 and next(fails):
            raise CortexError("no room")
        if step > 2:
            await asyncio.Event().wait()

    engine.before_step = fail
    with pytest.raises(CortexError, match="no room"):
        await collect(chat(engine, request()))
    assert (engine.running, engine.cancelled) == ([], ["r", "r"])


# --- side by side ---------------------------------------------------------------------------------


class Source:
    """Gives its items as they are taken and remembers how it ended."""

    def __init__(self, *items: object) -> None:
        self.given = 0
        self.closed = False
        self._items = items

    async def items(self) -> AsyncGenerator[object, None]:
        try:
            for item in self._items:
                if isinstance(item, Exception):
                    raise item
                self.given += 1
                yield item
        finally:
            await asyncio.sleep(0)
            self.closed = True


async def test_items_of_every_kind_pass_unchanged() -> None:
    odd = [None, (1,), [], 0]
    sources = [Source(*odd), Source(), Source(*odd)]
    got = [item async for item in side_by_side([source.items() for source in sources])]
    assert sorted(map(repr, got)) == sorted(map(repr, odd * 2))
    assert all(source.closed for source in sources)


async def test_no_source_runs_ahead_of_who_takes_its_items() -> None:
    sources = [Source(*range(1000)) for _ in range(3)]
    stream = side_by_side([source.items() for source in sources])
    for taken in range(1, 30):
        await anext(stream)
        for _ in range(10):
            await asyncio.sleep(0)
        assert sum(source.given for source in sources) <= taken + 1 + len(sources)
    await stream.aclose()
    assert all(source.closed for source in sources)


async def test_the_first_failure_is_the_one_that_is_told_and_every_source_is_closed() -> None:
    sources = [Source(1, ValueError("first")), Source(*range(1000)), Source(2, 3, 4, 5, ValueError("later"))]
    with pytest.raises(ValueError, match="first"):
        async for _ in side_by_side([source.items() for source in sources]):
            pass
    assert all(source.closed for source in sources)
