from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cortex.config import (
    AdmissionSection,
    ConfigError,
    DefaultModel,
    HarnessSection,
    NeuronConfig,
    PrefixCacheSection,
    TorchSection,
)
from cortex.neuron.app import build_neuron
from cortex.neuron.hardware import CPU, Hardware, Reading
from cortex.neuron.monitor import Monitor
from cortex.testing import AsgiClient
from cortex.testing.scripted import ScriptedFactory
from cortex.wire import sse
from cortex.wire.errors import BadRequest

FILES = {"/proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 8388608 kB\n"}


def hardware() -> Hardware:
    return Hardware(nvml=None, read=FILES.get, affinity=2)


def test_the_node_imports_no_torch() -> None:
    script = "import sys, cortex.neuron.app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(sys.path)})


async def test_default_models_load_beside_the_requests(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").touch()
    factory = ScriptedFactory()
    gate = asyncio.Event()
    factory.before_load = lambda plan: gate.wait()
    config = NeuronConfig(
        models_dir=str(tmp_path),
        default_models=(
            DefaultModel(model_id="first", source="weights.gguf", memory_mb=10),
            DefaultModel(model_id="second", source="absent"),
        ),
    )
    neuron = build_neuron(config, factories={"scripted": factory}, hardware=hardware())
    client = AsgiClient(neuron.app)
    assert factory.started is False
    await neuron.start()
    assert factory.started
    while not factory.loading:
        await asyncio.sleep(0)
    activation = (await client.get("/health")).json()["activation"]
    assert (activation["state"], activation["in_progress"]) == ("pre_warming", ["first"])
    gate.set()
    while activation["state"] != "ready":
        await asyncio.sleep(0)
        activation = (await client.get("/health")).json()["activation"]
    assert activation["completed"] == ["first"]
    assert "no model 'absent'" in activation["failed"][0]["error"]
    statuses = {report["id"]: report["status"] for report in (await client.get("/models")).json()}
    assert statuses == {"first": "loaded", "second": "failed"}
    await neuron.stop()
    assert factory.stopped
    assert not factory.live


async def test_stopping_midway_through_a_default_load_ends_it(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    factory = ScriptedFactory()
    factory.before_load = lambda plan: asyncio.Event().wait()
    config = NeuronConfig(models_dir=str(tmp_path), default_models=(DefaultModel(model_id="m"),))
    neuron = build_neuron(config, factories={"scripted": factory}, hardware=hardware())
    await neuron.start()
    while not factory.loading:
        await asyncio.sleep(0)
    await neuron.stop()
    assert factory.cancelled_loads == ["m"]


async def test_a_node_that_ends_answers_for_what_still_runs(node: Any) -> None:
    """A gateway that took it for gone would break the streams that it lets end."""
    engine = await node.load()
    gate = asyncio.Semaphore(1)
    engine.before_step = lambda request_id, step: gate.acquire()
    async with node.ask(stream=True) as exchange:
        await exchange.chunk()
        node.neuron.drain()
        for path in ("/health", "/models"):
            assert (await node.client.get(path)).status == 200
        for reply in (await node.chat(), await node.client.post("/models/load", json={"model_id": "n"})):
            assert (reply.status, reply.json()["error"]["code"]) == (503, "stopping")
            assert reply.headers["retry-after"] == "15"
        engine.before_step = None
        gate.release()
        assert (await exchange.reply()).body.endswith(b"data: [DONE]\n\n")


async def test_what_outlives_the_end_of_a_node_is_cut_with_words(node: Any) -> None:
    engine = await node.load()
    gate = asyncio.Semaphore(1)
    engine.before_step = lambda request_id, step: gate.acquire()
    async with node.ask(stream=True) as streamed, node.ask() as whole:
        first = await streamed.chunk()
        node.neuron.drain()
        node.neuron.cut()
        last = sse.Decoder().feed((await streamed.reply()).body)
        reply = await whole.reply()
    assert first is not None
    assert b'"code":"stopping"' in last[-2].data
    assert last[-1].data == b"[DONE]"
    assert (reply.status, reply.json()["error"]["code"]) == (503, "stopping")
    assert len(engine.cancelled) == 2
    await node.nothing_left()


async def test_stopping_without_a_start_is_fine(tmp_path: Path) -> None:
    factory = ScriptedFactory()
    await build_neuron(
        NeuronConfig(models_dir=str(tmp_path)), factories={"scripted": factory}, hardware=hardware()
    ).stop()
    assert factory.stopped


async def test_the_configuration_reaches_its_parts(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    config = NeuronConfig(
        models_dir=str(tmp_path),
        sources=("pypi",),
        node_token="secret",
        body_limit_mb=1,
        memory_limit_mb=200,
        admission=AdmissionSection(max_running=2, max_waiting=3),
    )
    neuron = build_neuron(config, factories={"scripted": ScriptedFactory()}, hardware=hardware())
    client = AsgiClient(neuron.app, headers={"authorization": "Bearer secret"})
    health = (await client.get("/health")).json()
    assert health["devices"][0]["budget_bytes"] == 200 * 2**20
    reply = await client.post("/models/load", json={"model_id": "m"})
    assert (reply.status, reply.json()["error"]["param"]) == (403, "source")
    assert (await client.post("/models/load", body=b"x" * (2**20 + 1))).status == 413
    assert (await AsgiClient(neuron.app).get("/models")).status == 401
    await neuron.stop()


@pytest.mark.parametrize(("seconds", "limit"), [(0.0, None), (2.5, 2.5)])
async def test_the_engine_is_told_what_a_model_may_do(
    tmp_path: Path, seconds: float, limit: float | None
) -> None:
    (tmp_path / "m.gguf").touch()
    config = NeuronConfig(
        models_dir=str(tmp_path),
        admission=AdmissionSection(max_running=2, max_waiting=1, max_wait_s=seconds, max_per_caller=2),
        prefix_cache=PrefixCacheSection(enabled=False),
    )
    factory = ScriptedFactory()
    neuron = build_neuron(config, factories={"scripted": factory}, hardware=hardware())
    client = AsgiClient(neuron.app)
    assert (await client.post("/models/load", json={"model_id": "m"})).status == 200
    (load,) = (await client.get("/health")).json()["models"]
    assert (load["max_in_flight"], load["max_queue_depth"]) == (2, 1)
    order = factory.models[0].plan.order
    assert (order.max_running, order.max_wait_s, order.prefix_cache) == (2, limit, False)
    await neuron.stop()


async def test_the_budget_leaves_a_floor_to_the_rest_of_the_machine(tmp_path: Path) -> None:
    neuron = build_neuron(
        NeuronConfig(models_dir=str(tmp_path)), factories={"s": ScriptedFactory()}, hardware=hardware()
    )
    health = (await AsgiClient(neuron.app).get("/health")).json()
    assert health["devices"][0]["budget_bytes"] == 7 * 2**30


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"sources": ("local", "ftp")}, "sources: there is no kind of reference 'ftp'"),
        ({"harness": HarnessSection(torch=TorchSection(dtype="bf17"))}, "harness.torch.dtype: expected"),
        (
            {"harness": HarnessSection(torch=TorchSection(dtype="int4"))},
            "harness.torch.dtype: int4 exists on GPUs only, of which this node has none",
        ),
    ],
)
def test_values_that_mean_nothing_are_refused_at_start(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_neuron(NeuronConfig(**config), hardware=hardware())


def test_a_default_model_for_an_absent_engine_is_refused_at_start() -> None:
    config = NeuronConfig(default_models=(DefaultModel(model_id="m", harness="candle"),))
    with pytest.raises(BadRequest, match="no engine 'candle'; it has torch"):
        build_neuron(config, hardware=hardware())


async def test_readings_stay_when_a_device_cannot_be_read() -> None:
    answers: list[Any] = [{CPU: Reading(used_bytes=1, free_bytes=2)}, OSError("gone")]
    turns: asyncio.Queue[None] = asyncio.Queue()
    slept = asyncio.Event()

    def read() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(seconds: float) -> None:
        slept.set()
        await turns.get()

    monitor = Monitor(read, sleep=sleep)
    running = asyncio.create_task(monitor.run())
    for _ in range(2):
        await slept.wait()
        slept.clear()
        assert monitor.readings[CPU].free_bytes == 2
        turns.put_nowait(None)
        if not answers:
            break
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
