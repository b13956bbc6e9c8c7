from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import msgspec
import pytest

from cortex.neuron.text.aside import SLOW_S
from cortex.testing.clock import settle
from cortex.wire.chat import ChatChunk, ChatCompletion, Usage
from cortex.wire.errors import Internal
from cortex.wire.sse import Decoder

ITL = 'neuron_inter_token_latency_seconds_{}{{model="m"}}'
TTFT = 'neuron_time_to_first_token_seconds_{}{{model="m"}}'


def data_of(body: bytes) -> list[bytes]:
    return [event.data for event in Decoder().feed(body) if event.data]


def chunks_of(body: bytes) -> list[ChatChunk]:
    data = data_of(body)
    assert data[-1] == b"[DONE]"
    return [msgspec.json.decode(each, type=ChatChunk) for each in data[:-1]]


async def test_a_whole_reply(node: Any) -> None:
    await node.load()
    reply = await node.chat()
    completion = msgspec.json.decode(reply.body, type=ChatCompletion)
    assert reply.status == 200
    assert completion.model == "m"
    assert completion.choices[0].message.content == "Hello there."
    assert completion.choices[0].finish_reason == "stop"
    assert isinstance(completion.usage, Usage)
    assert completion.usage.completion_tokens == len("Hello there.")
    await node.nothing_left()


async def test_a_streamed_reply(node: Any) -> None:
    await node.load()
    reply = await node.chat(stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(reply.body)
    assert "".join(str(c.choices[0].delta.content or "") for c in chunks[:-2]) == "Hello there."
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert isinstance(chunks[-1].usage, Usage)
    assert {chunk.model for chunk in chunks} == {"m"}


async def test_tokens_are_sent_as_they_come_and_none_before_the_first(node: Any) -> None:
    engine = await node.load()
    gate = asyncio.Semaphore(0)
    engine.before_step = lambda request_id, step: gate.acquire()
    async with node.ask(stream=True) as exchange:
        await engine.until(lambda: engine.waiting)
        await node.clock.advance(60)
        head = asyncio.create_task(exchange.head())
        await settle()
        assert not head.done(), "headers wait for the first token: until then the status is open"
        gate.release()
        assert (await head)[0] == 200
        first = await exchange.chunk()
        assert first.startswith(b"data: ")
        assert b'"H"' in first
        await node.clock.advance(10)
        assert (await exchange.chunk()).startswith(b": ")
        engine.before_step = None
        gate.release()
        await exchange.reply()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_has_a_real_status(node: Any, stream: bool) -> None:
    engine = await node.load()
    engine.kill("was killed by SIGKILL")
    await settle()
    node.factory.refusal = Internal("broken")
    reply = await node.chat(stream=stream)
    assert reply.status == 500
    assert reply.json()["error"]["message"] == "broken"
    assert await node.sample('neuron_refusals_total{reason="internal_error"}') == "1"
    await node.nothing_left()


async def test_an_error_after_the_first_token_ends_the_stream_in_its_shape(node: Any) -> None:
    engine = await node.load()
    gate = asyncio.Semaphore(1)
    engine.before_step = lambda request_id, step: gate.acquire()
    async with node.ask(stream=True) as exchange:
        await exchange.chunk()
        engine.kill("was killed by SIGKILL")
        *_, error, done = data_of((await exchange.reply()).body)
    assert "was killed by SIGKILL" in msgspec.json.decode(error)["error"]["message"]
    assert done == b"[DONE]"
    assert await node.sample('neuron_refusals_total{reason="internal_error"}') is None
    await node.nothing_left()


@pytest.mark.parametrize("stream", [True, False])
async def test_several_choices_are_one_request(node: Any, stream: bool) -> None:
    engine = await node.load()
    reply = await node.chat(stream=stream, n=3)
    assert reply.status == 200
    if stream:
        chunks = chunks_of(reply.body)
        assert sorted(c.choices[0].index for c in chunks if c.choices[0].finish_reason) == [0, 1, 2]
    else:
        choices = msgspec.json.decode(reply.body, type=ChatCompletion).choices
        assert [choice.message.content for choice in choices] == ["Hello there."] * 3
    prompt, said = len(engine.prompts[0][1]), 3 * len("Hello there.")
    assert await node.sample('neuron_prompt_tokens_total{model="m"}') == str(prompt)
    assert await node.sample('neuron_generation_tokens_total{model="m"}') == str(said)
    assert await node.sample(TTFT.format("count")) == "1.0"
    assert len(engine.finished) == 3
    await node.nothing_left()


@pytest.mark.parametrize("n", [0, 17, 10**9])
@pytest.mark.parametrize("stream", [True, False])
async def test_too_many_choices_are_400_however_many(node: Any, n: int, stream: bool) -> None:
    engine = await node.load()
    reply = await node.chat(stream=stream, n=n)
    assert (reply.status, reply.json()["error"]["param"]) == (400, "n")
    assert engine.prompts == []
    await node.nothing_left()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_every_choice(node: Any, stream: bool) -> None:
    engine = await node.load()
    gate = asyncio.Semaphore(5)
    engine.before_step = lambda request_id, number: gate.acquire()
    async with node.ask(stream=stream, n=3) as exchange:
        await engine.until(lambda: engine.steps == 5 and len(engine.waiting) == 3)
        exchange.disconnect()
        await engine.until(lambda: len(engine.cancelled) == 3)
        assert engine.steps == 5
    await node.nothing_left()
    assert engine.running == []


async def test_log_probabilities_reach_the_client(node: Any) -> None:
    await node.load()
    reply = await node.chat(logprobs=True, top_logprobs=2)
    (choice,) = reply.json()["choices"]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "Hello there."
    assert choice["logprobs"]["content"][0]["top_logprobs"][1] == {
        "token": "I",
        "logprob": -1.5,
        "bytes": [73],
    }


async def test_a_model_that_is_not_loaded_is_404_and_tells_what_is(node: Any) -> None:
    await node.load("n")
    for stream in (True, False):
        reply = await node.chat("m", stream=stream)
        assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")
        assert "loaded: n" in reply.json()["error"]["message"]
    assert await node.sample('neuron_refusals_total{reason="model_not_found"}') == "2"


async def test_a_full_line_is_503_with_the_numbers(tmp_path: Any, node: Any) -> None:
    engine = await node.load()
    gate = asyncio.Event()
    engine.before_step = lambda request_id, step: gate.wait()
    waiting = [asyncio.create_task(node.chat()) for _ in range(40)]
    await engine.until(lambda: len(engine.waiting) == 40)
    assert await node.sample('neuron_requests_running{model="m"}') == "8"
    assert await node.sample('neuron_requests_waiting{model="m"}') == "32"
    reply = await node.chat()
    assert (reply.status, reply.json()["error"]["max_waiting"]) == (503, 32)
    assert int(reply.headers["retry-after"]) >= 1
    gate.set()
    assert {(await task).status for task in waiting} == {200}
    await node.nothing_left()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages[0].role"),
        ({"model": 5}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"top_p": 7}, "top_p"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_bad_parameters_are_400_by_name(
    node: Any, change: dict[str, Any], param: str, stream: bool
) -> None:
    await node.load()
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": stream, **change}
    reply = await node.client.post("/v1/chat/completions", json=body)
    assert (reply.status, reply.json()["error"]["param"]) == (400, param)
    await node.nothing_left()


async def test_a_prompt_that_is_too_long_is_400_with_the_limit(node: Any) -> None:
    await node.load()
    reply = await node.chat(text="x" * 5000)
    assert (reply.status, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert reply.json()["error"]["max"] <= 4096


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("step", [0, 3])
async def test_a_client_that_leaves_stops_the_sequence(node: Any, stream: bool, step: int) -> None:
    engine = await node.load()
    gate = asyncio.Semaphore(step)
    engine.before_step = lambda request_id, number: gate.acquire()
    async with node.ask(stream=stream) as exchange:
        await engine.until(lambda: engine.steps == step and bool(engine.waiting))
        exchange.disconnect()
        await engine.until(lambda: engine.cancelled)
        assert engine.steps == step
    await node.nothing_left()
    assert engine.running == []


async def test_a_client_that_leaves_the_wait_for_a_reload_ends_it(node: Any) -> None:
    engine = await node.load()
    engine.kill("was killed")
    await settle()
    node.hold_loads()
    async with node.ask():
        while not node.factory.loading:
            await asyncio.sleep(0)
        assert len((await node.client.get("/health")).json()["requests"]) == 1
    assert node.factory.cancelled_loads == ["m"]
    await node.nothing_left()


async def test_the_next_request_mends_a_dead_engine(node: Any) -> None:
    engine = await node.load()
    engine.kill("was killed")
    await settle()
    (report,) = (await node.client.get("/models")).json()
    assert (report["status"], report["servable"]["reason"]) == ("failed", "failed")
    assert (await node.chat()).status == 200
    assert node.engines["m"] is not engine


async def test_tokens_and_times_are_counted(node: Any) -> None:
    engine = await node.load()

    async def tick(request_id: str, step: int) -> None:
        await node.clock.advance(0.5 if step == 0 else 0.03)

    engine.before_step = tick
    await node.chat(stream=True)
    await node.chat()
    prompt = 2 * len(engine.prompts[0][1])
    assert await node.sample('neuron_prompt_tokens_total{model="m"}') == str(prompt)
    assert await node.sample('neuron_generation_tokens_total{model="m"}') == str(2 * len("Hello there."))
    assert await node.sample(TTFT.format("count")) == "2.0"
    assert await node.sample(TTFT.format("sum")) == "1.0"
    assert await node.sample(ITL.format("count")) == "2.0"
    assert await node.sample('neuron_inter_token_latency_seconds_bucket{le="0.025",model="m"}') == "0.0"
    assert await node.sample('neuron_inter_token_latency_seconds_bucket{le="0.05",model="m"}') == "2.0"
    assert await node.sample("neuron_models_loaded") == "1"
    assert await node.sample('neuron_load_seconds_count{model="m"}') == "1.0"


async def test_request_ids_reach_the_engine(node: Any) -> None:
    engine = await node.load()
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    reply = await node.client.post("/v1/chat/completions", json=body, headers={"x-request-id": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1"
    assert engine.prompts[0][0] == "abc-1"


async def test_a_template_that_was_slow_once_holds_up_the_event_loop_no_more(node: Any) -> None:
    """It is a stranger's program, and may take seconds for each prompt, however short."""
    await node.load()
    threads = []

    def render(messages: Any, **variables: Any) -> str:
        threads.append(threading.current_thread() is threading.main_thread())
        began = time.thread_time()
        while time.thread_time() - began <= SLOW_S:
            pass
        return "prompt"

    node.factory.codec.render = render
    for _ in range(2):
        assert (await node.chat()).status == 200
    assert threads == [True, False]
