"""What the steps of an engine become in /metrics and /health."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from cortex.hookspecs import EngineStep
from cortex.neuron.metrics import NeuronMetrics

STEP = EngineStep(
    seconds=0.003,
    prefill_tokens=100,
    decode_tokens=4,
    running=5,
    waiting=2,
    cache_used_tokens=300,
    cache_total_tokens=1200,
    prefix_queried_tokens=160,
    prefix_hit_tokens=60,
    preemptions=1,
    draft_tokens=7,
    accepted_draft_tokens=3,
)
GAUGES = ("neuron_requests_running", "neuron_requests_waiting", "neuron_cache_usage_ratio")


async def samples(node: Any, *names: str) -> list[str | None]:
    return [await node.sample(f'{name}{{model="m"}}') for name in names]


async def test_steps_are_counted(node: Any) -> None:
    await node.load()
    (model,) = node.factory.models
    model.report_step(STEP)
    model.report_step(STEP)
    names = (
        "neuron_prefill_tokens_total",
        "neuron_decode_tokens_total",
        "neuron_prefix_cache_queried_tokens_total",
        "neuron_prefix_cache_hit_tokens_total",
        "neuron_preemptions_total",
        "neuron_draft_tokens_total",
        "neuron_accepted_draft_tokens_total",
        "neuron_step_seconds_count",
    )
    assert await samples(node, *names) == ["200", "8", "320", "120", "2", "14", "6", "2.0"]
    bucket = 'neuron_step_seconds_bucket{{le="{}",model="m"}}'
    assert await node.sample(bucket.format(0.002)) == "0.0"
    assert await node.sample(bucket.format(0.004)) == "2.0"
    assert await samples(node, *GAUGES) == ["0", "0", "0.0"], "no request is there, whatever it says"


async def test_who_runs_and_who_waits_is_the_engines_word(node: Any) -> None:
    engine = await node.load()
    gate = asyncio.Event()
    engine.before_step = lambda request_id, step: gate.wait()
    asked = [asyncio.create_task(node.chat()) for _ in range(7)]
    await engine.until(lambda: len(engine.waiting) == 7)
    assert await samples(node, *GAUGES) == ["7", "0", None]
    node.factory.models[0].report_step(STEP)
    assert await samples(node, *GAUGES) == ["5", "2", "0.25"]
    (load,) = (await node.client.get("/health")).json()["models"]
    assert (load["in_flight"], load["queue_depth"], load["cache_usage_ratio"]) == (5, 2, 0.25)
    gate.set()
    assert {(await task).status for task in asked} == {200}


async def test_gauges_leave_with_their_model_and_counters_stay(node: Any) -> None:
    await node.load()
    (model,) = node.factory.models
    model.report_step(STEP)
    await node.client.post("/models/unload", json={"model_id": "m"})
    model.report_step(STEP)
    assert await samples(node, *GAUGES, "neuron_decode_tokens_total") == [None, None, None, "4"]
    await node.load()
    assert await samples(node, *GAUGES) == ["0", "0", None]


def test_a_step_costs_microseconds() -> None:
    metrics = NeuronMetrics()
    metrics.step("m", STEP)
    best = min(_timed(metrics) for _ in range(20))
    assert best < 100e-6, "a thousand of them a second take less than a tenth of a core"


def _timed(metrics: NeuronMetrics) -> float:
    started = time.perf_counter()
    for _ in range(50):
        metrics.step("m", STEP)
    return (time.perf_counter() - started) / 50
