"""Chat over a scripted engine: chunks, limits, stop strings, usage, timings, cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion as OpenAICompletion

from cortex.hookspecs import SamplingDefaults
from cortex.neuron.text.chat import TextChat
from cortex.neuron.text.choices import collect
from cortex.testing.scripted import ByteCodec, ScriptedEngine
from cortex.wire.chat import ChatChunk, ChatCompletion, ChatRequest, convert, to_plain
from cortex.wire.errors import BadRequest, ContextTooLong, CortexError, Internal
from cortex.wire.node import Limit

WIDE = Limit(context=4096, input=4096, output=4096)
PROMPT = [256, *b"user\nh", 257, *b"\n", 256, *b"assistant\n"]


class Clock:
    """Moves by one second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def request(content: Any = "h", **fields: Any) -> ChatRequest:
    return convert(
        ChatRequest, {"model": "alias", "messages": [{"role": "user", "content": content}], **fields}
    )


def chat_of(
    engine: ScriptedEngine, limit: Limit = WIDE, defaults: SamplingDefaults | None = None
) -> TextChat:
    return TextChat(engine, ByteCodec(defaults), limit, "model", clock=lambda: 1700000000.5, timer=Clock())


async def chunks_of(engine: ScriptedEngine, asked: ChatRequest, limit: Limit = WIDE) -> list[ChatChunk]:
    return [chunk async for chunk in chat_of(engine, limit).chat("r1", asked)]


async def whole(engine: ScriptedEngine, asked: ChatRequest, limit: Limit = WIDE) -> ChatCompletion:
    return await collect(chat_of(engine, limit).chat("r1", asked))


def text_of(chunks: Sequence[ChatChunk]) -> str:
    found = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    return "".join(text for text in found if isinstance(text, str))


# --- the shape of a reply -------------------------------------------------------------------------


async def test_a_streamed_reply_has_the_shape_that_clients_expect() -> None:
    chunks = await chunks_of(ScriptedEngine("Hi!"), request(stream=True))
    shared = {"id": "chatcmpl-r1", "object": "chat.completion.chunk", "created": 1700000000, "model": "model"}
    plain = [to_plain(chunk) for chunk in chunks]
    assert all(chunk.items() >= shared.items() for chunk in plain)
    choice = {"index": 0, "logprobs": None}
    assert [chunk["choices"] for chunk in plain] == [
        [{**choice, "delta": {"role": "assistant", "content": "H"}, "finish_reason": None}],
        [{**choice, "delta": {"content": "i"}, "finish_reason": None}],
        [{**choice, "delta": {"content": "!"}, "finish_reason": None}],
        [{**choice, "delta": {}, "finish_reason": "stop"}],
    ]
    assert all("usage" not in chunk for chunk in plain)
    assert ["timings" in chunk for chunk in plain] == [False, False, False, True]


async def test_usage_comes_last_where_it_was_asked_for() -> None:
    asked = request(stream=True, stream_options={"include_usage": True})
    *others, finish, last = await chunks_of(ScriptedEngine("Hi!"), asked)
    assert last.choices == []
    assert to_plain(last)["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 3,
        "total_tokens": 23,
    }
    assert [choice.finish_reason for choice in finish.choices] == ["stop"]
    plain = [to_plain(chunk) for chunk in (*others, finish)]
    assert not any("usage" in chunk or "timings" in chunk for chunk in plain)
    assert to_plain(last)["timings"] == {
        "queue_ms": 1.0,
        "prefill_ms": 10.0,
        "decode_ms": 20.0,
        "prompt_per_second": 2000.0,
        "predicted_per_second": 100.0,
    }


async def test_a_whole_reply_has_message_usage_and_timings() -> None:
    reply = to_plain(await whole(ScriptedEngine("Grüße 🙂"), request()))
    assert reply["object"] == "chat.completion"
    assert (reply["id"], reply["created"], reply["model"]) == ("chatcmpl-r1", 1700000000, "model")
    message = {"role": "assistant", "content": "Grüße 🙂"}
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    size = len("Grüße 🙂".encode())
    assert reply["usage"] == {"prompt_tokens": 20, "completion_tokens": size, "total_tokens": 20 + size}
    assert reply["timings"]["prefill_ms"] == 10.0


async def test_an_empty_reply_is_a_reply() -> None:
    chunks = await chunks_of(ScriptedEngine(""), request(stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].finish_reason is None] == [
        "assistant"
    ]
    reply = await whole(ScriptedEngine(""), request())
    assert reply.choices[0].message.content == ""
    assert to_plain(reply)["usage"]["completion_tokens"] == 0


async def test_a_reply_without_request_id_gets_one_of_its_own() -> None:
    chat = chat_of(ScriptedEngine("x"))
    ids = {(await collect(chat.chat("", request()))).id for _ in range(3)}
    assert len(ids) == 3
    assert all(id.startswith("chatcmpl-") and len(id) > 20 for id in ids)


async def test_no_chunk_comes_before_the_first_token() -> None:
    engine, prefilled = ScriptedEngine("Hi"), asyncio.Event()
    engine.before_step = lambda request_id, step: prefilled.wait()
    first = asyncio.ensure_future(anext(chat_of(engine).chat("r1", request(stream=True))))
    await engine.until(lambda: engine.waiting == ["r1"])
    assert not first.done()
    prefilled.set()
    assert (await first).choices[0].delta.content == "H"


@given(st.text(max_size=20), st.lists(st.integers(0, 60), max_size=8))
async def test_chunks_hold_whole_characters_however_tokens_fall(text: str, cuts: list[int]) -> None:
    data = list(text.encode("utf-8", "replace"))
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    steps = [data[begin:end] for begin, end in pairwise(edges)]
    chunks = await chunks_of(ScriptedEngine(lambda ids, sampling: steps), request(stream=True))
    assert text_of(chunks) == bytes(data).decode()
    assert all(text_of([chunk]) or chunk in (chunks[0], chunks[-1]) for chunk in chunks)


# --- what reaches the engine ----------------------------------------------------------------------


async def test_the_engine_gets_the_rendered_prompt_and_the_sampling() -> None:
    engine = ScriptedEngine("x")
    await whole(engine, request(temperature=0.5, top_k=3, seed=1, max_tokens=9))
    (request_id, ids, sampling) = engine.prompts[0]
    assert (request_id, ids) == ("r1", PROMPT)
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_tokens) == (0.5, 3, 1, 9)
    assert sampling.stop_ids == (257,)


async def test_the_model_s_defaults_fill_what_the_request_leaves_open() -> None:
    engine = ScriptedEngine("x")
    chat = chat_of(engine, defaults=SamplingDefaults(temperature=0.25, top_p=0.5))
    await collect(chat.chat("r1", request(top_p=0.75)))
    assert (engine.prompts[0][2].temperature, engine.prompts[0][2].top_p) == (0.25, 0.75)


class Recorder(ByteCodec):
    """Remembers what a template would have been given."""

    def render(self, messages: Any, **variables: Any) -> str:
        self.variables = variables
        return super().render(messages, **variables)


async def test_the_template_gets_tools_and_the_client_s_variables() -> None:
    codec = Recorder()
    chat = TextChat(ScriptedEngine("x"), codec, WIDE, "model")
    tool = {"type": "function", "function": {"name": "f"}}
    asked = request(tools=[tool], chat_template_kwargs={"enable_thinking": False})
    await collect(chat.chat("r1", asked))
    assert codec.variables == {"tools": [tool], "add_generation_prompt": True, "enable_thinking": False}
    await collect(chat.chat("r1", request(tools=[tool], tool_choice="none")))
    assert codec.variables == {"tools": None, "add_generation_prompt": True}


@pytest.mark.parametrize("name", ["self", "messages", "tools", "documents", "add_generation_prompt"])
async def test_the_client_cannot_replace_the_template_s_own_variables(name: str) -> None:
    with pytest.raises(BadRequest, match=name) as refusal:
        await whole(ScriptedEngine(), request(chat_template_kwargs={name: 1}))
    assert refusal.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("fields", "at_once"),
    [
        ({}, True),
        ({"content": "x" * 10_000}, False),
        ({"content": [{"type": "text", "text": "x" * 5000}] * 2}, False),
        ({"messages": [{"role": "user", "content": "x"}] * 200}, False),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 20}, False),
    ],
    ids=["short", "long", "long in parts", "many messages", "many tools"],
)
async def test_a_long_conversation_is_rendered_and_encoded_beside_the_event_loop(
    fields: dict[str, Any], at_once: bool
) -> None:
    threads = []

    class Noting(ByteCodec):
        def render(self, messages: Any, **variables: Any) -> str:
            threads.append(threading.current_thread())
            return super().render(messages, **variables)

        def encode(self, text: str) -> list[int]:
            threads.append(threading.current_thread())
            return super().encode(text)

    chat = TextChat(ScriptedEngine("x"), Noting(), Limit(context=100_000), "model")
    await collect(chat.chat("r1", request(**fields)))
    assert [thread is threading.main_thread() for thread in threads] == [at_once] * 2


async def test_a_long_prompt_is_encoded_like_a_short_one() -> None:
    engine = ScriptedEngine("x")
    await whole(engine, request("é" * 10_000), Limit(context=100_000))
    assert len(engine.prompts[0][1]) == len(PROMPT) - 1 + 20_000


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "wanted", "given"),
    [
        (Limit(context=100, input=100, output=100), None, 80),
        (Limit(context=100, input=100, output=100), 30, 30),
        (Limit(context=100, input=100, output=100), 32000, 80),
        (Limit(context=100, input=90, output=10), None, 10),
        (Limit(context=21), 5, 1),
        (Limit(output=7), None, 7),
        (Limit(), 32000, 32000),
    ],
)
async def test_the_reply_is_as_long_as_wanted_and_as_fits(limit: Limit, wanted: Any, given: int) -> None:
    engine = ScriptedEngine("x")
    await whole(engine, request(max_tokens=wanted), limit)
    assert engine.prompts[0][2].max_tokens == given


@pytest.mark.parametrize(
    ("limit", "wanted", "reserve"),
    [(WIDE, None, 512), (Limit(context=100), None, 80), (WIDE, 4000, None), (Limit(context=100), 4000, None)],
)
async def test_only_a_length_that_nobody_said_is_set_aside_in_part(
    limit: Limit, wanted: Any, reserve: Any
) -> None:
    engine = ScriptedEngine("x")
    await whole(engine, request(max_tokens=wanted), limit)
    assert engine.prompts[0][2].reserve == reserve


@pytest.mark.parametrize(
    ("limit", "longest"),
    [
        (Limit(context=20, input=20, output=20), 19),
        (Limit(context=10), 9),
        (Limit(context=100, input=19), 19),
        (Limit(input=5), 5),
    ],
)
async def test_a_prompt_that_leaves_no_room_is_refused_before_any_work(limit: Limit, longest: int) -> None:
    engine = ScriptedEngine()
    with pytest.raises(ContextTooLong, match="20 tokens") as refusal:
        await whole(engine, request(), limit)
    assert refusal.value.details == {"max": longest, "prompt_tokens": 20}
    assert (refusal.value.status, refusal.value.param) == (400, "messages")
    assert engine.prompts == []


async def test_the_refusal_says_what_clients_look_for() -> None:
    with pytest.raises(ContextTooLong, match="maximum context length is 20 tokens"):
        await whole(ScriptedEngine(), request(), Limit(context=20))


async def test_a_prompt_far_too_long_is_not_even_encoded() -> None:
    class Unused(ByteCodec):
        def encode(self, text: str) -> list[int]:
            raise AssertionError("it was encoded")

    chat = TextChat(ScriptedEngine(), Unused(), Limit(context=20), "model")
    with pytest.raises(ContextTooLong, match="more than") as refusal:
        await collect(chat.chat("r1", request("x" * 100_000)))
    assert refusal.value.details["prompt_tokens"] > 20


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 3},
        {"n": 17},
        {"stop": ""},
        {"max_tokens": 0},
        {"messages": []},
        {"chat_template_kwargs": {"messages": []}},
    ],
)
async def test_a_bad_parameter_is_refused_before_any_work(fields: dict[str, Any]) -> None:
    engine = ScriptedEngine()
    with pytest.raises(BadRequest):
        await chunks_of(engine, request(**({"stream": True} | fields)))
    assert engine.prompts == []


async def test_the_length_limit_is_the_finish_reason() -> None:
    reply = await whole(ScriptedEngine("Hello"), request(max_tokens=2))
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("He", "length")


async def test_half_a_character_at_the_end_is_shown_as_one_that_is_missing() -> None:
    reply = await whole(ScriptedEngine("a🙂"), request(max_tokens=3))
    assert reply.choices[0].message.content == "a\ufffd"


async def test_tokens_of_a_prompt_are_counted() -> None:
    assert await chat_of(ScriptedEngine()).count(request()) == 20


# --- cached prompt tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [0, 16])
@pytest.mark.parametrize("stop", [None, "H", "!"])
async def test_cached_prompt_tokens_are_told_wherever_the_reply_ends(cached: int, stop: str | None) -> None:
    engine = ScriptedEngine("Hi!")
    engine.cached_tokens = cached
    reply = to_plain(await whole(engine, request(stop=stop)))
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
    assert reply["usage"]["prompt_tokens"] == 20
    OpenAICompletion.model_validate(reply)
    asked = request(stop=stop, stream=True, stream_options={"include_usage": True})
    last = to_plain((await chunks_of(engine, asked))[-1])
    assert last["usage"] == reply["usage"]


async def test_the_rate_of_prefill_counts_only_what_was_computed() -> None:
    engine = ScriptedEngine("Hi!")
    engine.cached_tokens = 15
    assert to_plain(await whole(engine, request()))["timings"]["prompt_per_second"] == 500.0


# --- stop strings ---------------------------------------------------------------------------------


async def test_a_stop_string_ends_the_reply_and_the_sequence_at_once() -> None:
    engine = ScriptedEngine("one STOP two")
    stream = chat_of(engine).chat("r1", request(stream=True, stop=["never", "STOP"]))
    chunks = []
    async for chunk in stream:
        chunks.append(chunk)
        if chunk.choices[0].finish_reason is not None:
            assert engine.cancelled == ["r1"]
    assert text_of(chunks) == "one "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert engine.steps == len("one STOP")


async def test_a_reply_that_a_stop_string_ended_has_counts_and_times() -> None:
    reply = to_plain(await whole(ScriptedEngine("ab!"), request(stop="b")))
    assert reply["usage"]["completion_tokens"] == 2
    # The clock moves one second at the beginning and at each token.
    assert reply["timings"] == {
        "queue_ms": 0.0,
        "prefill_ms": 1000.0,
        "decode_ms": 1000.0,
        "prompt_per_second": 20.0,
        "predicted_per_second": 1.0,
    }


async def test_tokens_that_came_along_behind_a_stop_string_do_not_count() -> None:
    """An engine may give several at once."""
    engine = ScriptedEngine(lambda ids, sampling: [b"a", b"bXYZcd"])
    reply = await whole(engine, request(stop="XY"))
    assert reply.choices[0].message.content == "ab"
    assert to_plain(reply)["usage"]["completion_tokens"] == 4
    reply = await whole(engine, request(stop="never"))
    assert reply.choices[0].message.content == "abXYZcd"
    assert to_plain(reply)["usage"]["completion_tokens"] == 7


async def test_what_only_looked_like_a_stop_string_comes_out_at_the_end() -> None:
    reply = await whole(ScriptedEngine("one STO"), request(stop="STOP"))
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("one STO", "stop")


async def test_a_stop_string_in_the_last_tokens_wins_over_length() -> None:
    reply = await whole(ScriptedEngine("abc"), request(stop="b", max_tokens=2))
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("a", "stop")


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
async def test_closing_the_stream_ends_the_sequence_within_one_step(steps: int) -> None:
    engine = ScriptedEngine("a long reply")
    stream = chat_of(engine).chat("r1", request(stream=True))
    for _ in range(steps):
        await anext(stream)
    await stream.aclose()
    assert (engine.cancelled, engine.running, engine.steps) == (["r1"], [], steps)


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_ends_the_sequence_in_prefill_and_in_decode(step: int, stream: bool) -> None:
    engine, never = ScriptedEngine("a long reply"), asyncio.Event()

    async def hold(request_id: str, number: int) -> None:
        if number == step:
            await never.wait()

    engine.before_step = hold
    asked = request(stream=stream)
    waiting = asyncio.ensure_future(whole(engine, asked))
    await engine.until(lambda: engine.steps == step and engine.waiting == ["r1"])
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (engine.cancelled, engine.running, engine.steps) == (["r1"], [], step)


async def test_a_reply_that_was_read_to_its_end_cancels_nothing() -> None:
    engine = ScriptedEngine("Hi")
    await whole(engine, request())
    assert (engine.finished, engine.cancelled, engine.running) == (["r1"], [], [])


async def test_an_engine_that_dies_is_an_error_of_the_reply() -> None:
    engine = ScriptedEngine("Hi")
    stream = chat_of(engine).chat("r1", request(stream=True))
    await anext(stream)
    engine.kill("out of memory")
    with pytest.raises(CortexError, match="out of memory"):
        await anext(stream)
    assert engine.running == []


async def test_an_engine_that_falls_silent_is_an_error() -> None:
    class Silent:
        async def generate(self, request_id: str, ids: Any, sampling: Any) -> Any:
            return
            yield

    chat = TextChat(Silent(), ByteCodec(), WIDE, "model")
    with pytest.raises(Internal, match="without saying why"):
        await collect(chat.chat("r1", request()))
