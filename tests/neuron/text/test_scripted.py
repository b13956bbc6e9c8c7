"""The scripted engine keeps its word: what tests of other parts rely on."""

from __future__ import annotations

import asyncio

import pluggy
import pytest

from cortex.hookspecs import (
    CortexHooks,
    EngineFactory,
    EngineStep,
    LoadOrder,
    Sampling,
    TokenBatch,
    TokenLogprobs,
)
from cortex.testing.scripted import ByteCodec, ScriptedEngine, ScriptedFactory
from cortex.wire.errors import Internal, LoadFailed
from cortex.wire.node import Progress

ORDER = LoadOrder(model_id="m", path="/nowhere")


async def run(engine: ScriptedEngine, sampling: Sampling, request_id: str = "r") -> list[TokenBatch]:
    return [batch async for batch in engine.generate(request_id, [1, 2], sampling)]


async def test_a_text_is_replayed_byte_by_byte() -> None:
    batches = await run(ScriptedEngine("ab"), Sampling(max_tokens=9))
    assert [batch.ids for batch in batches] == [[97], [98], []]
    assert [batch.finish for batch in batches] == [None, None, "stop"]
    assert [batch.timings is None for batch in batches] == [True, True, False]


async def test_a_script_sees_the_prompt_and_ends_at_a_stop_id() -> None:
    engine = ScriptedEngine(lambda ids, sampling: [[*ids, 7], [8, 257, 9], [10]])
    batches = await run(engine, Sampling(max_tokens=9, stop_ids=(257,)))
    assert [batch.ids for batch in batches] == [[1, 2, 7], [8]]
    assert batches[-1].finish == "stop"


async def test_max_tokens_cuts_a_reply() -> None:
    batches = await run(ScriptedEngine(lambda ids, sampling: [[1, 2], [3, 4]]), Sampling(max_tokens=3))
    assert [batch.ids for batch in batches] == [[1, 2], [3]]
    assert batches[-1].finish == "length"


async def test_the_first_batch_tells_what_was_cached() -> None:
    engine = ScriptedEngine("ab")
    engine.cached_tokens = 5
    assert [batch.cached_tokens for batch in await run(engine, Sampling(max_tokens=9))] == [5, None, None]


async def test_each_token_has_log_probabilities_where_they_are_wanted() -> None:
    batches = await run(ScriptedEngine("a"), Sampling(max_tokens=9, logprobs=2))
    assert [batch.logprobs for batch in batches] == [[TokenLogprobs(97, -0.5, [(97, -0.5), (98, -1.5)])], []]
    assert (await run(ScriptedEngine("a"), Sampling(max_tokens=9)))[0].logprobs is None


async def test_sequences_run_side_by_side_and_are_counted() -> None:
    engine, go = ScriptedEngine("ab"), asyncio.Event()
    engine.before_step = lambda request_id, step: go.wait()
    replies = [asyncio.ensure_future(run(engine, Sampling(max_tokens=9), id)) for id in ("x", "y")]
    await engine.until(lambda: len(engine.waiting) == 2)
    assert engine.running == ["x", "y"]
    go.set()
    await asyncio.gather(*replies)
    assert sorted(engine.finished) == ["x", "y"]
    assert engine.running == engine.waiting == engine.cancelled == []
    assert engine.steps == 6


async def test_a_hook_that_fails_fails_the_sequence() -> None:
    engine = ScriptedEngine("ab")

    async def fail(request_id: str, step: int) -> None:
        raise LoadFailed("as the test wants it")

    engine.before_step = fail
    with pytest.raises(LoadFailed, match="as the test wants it"):
        await run(engine, Sampling(max_tokens=9))
    assert engine.running == engine.cancelled == []


async def test_death_reaches_sequences_that_a_hook_holds() -> None:
    engine, never = ScriptedEngine("ab"), asyncio.Event()
    engine.before_step = lambda request_id, step: never.wait()
    reply = asyncio.ensure_future(run(engine, Sampling(max_tokens=9)))
    await engine.until(lambda: engine.waiting == ["r"])
    engine.kill("no power")
    with pytest.raises(Internal, match="no power"):
        await reply
    assert await engine.died() == "no power"
    with pytest.raises(Internal, match="no power"):
        await run(engine, Sampling(max_tokens=9))


def test_the_codec_is_its_own_inverse_and_knows_its_special_tokens() -> None:
    codec = ByteCodec()
    prompt = codec.render([{"role": "user", "content": "é"}], add_generation_prompt=True)
    ids = codec.encode(prompt)
    assert ids == [256, *"user\né".encode(), 257, *b"\n", 256, *b"assistant\n"]
    detokenizer = codec.detokenizer()
    text = "".join(detokenizer.feed([id]) for id in ids) + detokenizer.flush()
    assert text == "user\né\nassistant\n"
    assert b"".join(map(codec.token_bytes, ids)) == prompt.encode()
    assert [codec.token_bytes(id) for id in (-1, 258)] == [b"", b""]


async def test_a_factory_loads_with_progress_and_unloads() -> None:
    factory, seen = ScriptedFactory(), list[Progress]()
    plan = factory.plan(ORDER)
    assert plan.bytes_per_device == {"cpu": 64 * 2**20}
    assert factory.plan(LoadOrder(model_id="m", path="", memory_bytes=5)).bytes_per_device == {"cpu": 5}
    model = await factory.load(plan, seen.append)
    assert [progress.done for progress in seen] == [0, 64 * 2**20]
    assert factory.live == [model]
    await model.close()
    assert factory.live == []
    assert await model.died() == "it was unloaded"


async def test_a_model_tells_those_who_watch_of_its_steps() -> None:
    factory, seen = ScriptedFactory(), list[EngineStep]()
    await factory.load(factory.plan(ORDER), lambda progress: None)
    (model,) = factory.models
    model.report_step(EngineStep(decode_tokens=1))
    model.watch(seen.append)
    model.report_step(EngineStep(decode_tokens=2))
    assert seen == [EngineStep(decode_tokens=2)]


async def test_a_load_waits_for_its_hook_and_can_be_cancelled() -> None:
    factory, never, begun = ScriptedFactory(), asyncio.Event(), list[Progress]()
    factory.before_load = lambda plan: never.wait()
    load = asyncio.ensure_future(factory.load(factory.plan(ORDER), begun.append))
    await asyncio.sleep(0)
    assert factory.loading == ["m"]
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert (factory.loading, factory.cancelled_loads, factory.models) == ([], ["m"], [])


async def test_a_load_fails_where_the_test_wants_it() -> None:
    factory = ScriptedFactory()
    factory.refusal = LoadFailed("the disk is gone")
    with pytest.raises(LoadFailed, match="the disk is gone"):
        await factory.load(factory.plan(ORDER), lambda progress: None)
    assert factory.models == []


def test_a_factory_registers_itself() -> None:
    manager = pluggy.PluginManager("cortex")
    manager.add_hookspecs(CortexHooks)
    factory, registered = ScriptedFactory(), list[EngineFactory]()
    manager.register(factory)
    manager.check_pending()
    manager.hook.cortex_register_engines(register=registered.append)
    assert registered == [factory]
    assert factory.name == "scripted"
