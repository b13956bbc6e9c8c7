"""The node with a real torch model in real worker processes: what a user would lose if these broke."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from cortex.config import AdmissionSection, HarnessSection, NeuronConfig, TorchSection
from cortex.neuron.app import Neuron, build_neuron
from cortex.neuron.torch_engine import TorchFactory
from cortex.testing import AsgiClient, AsgiReply
from cortex.testing.asgi_client import AsgiExchange

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_warm_server")]

BUDGET_MB = 2000
MEMORY_MB = 600


class LastingFactory(TorchFactory):
    """Its warm server outlives the node, so that the next test need not import torch again."""

    async def stop(self) -> None:
        pass


class RealNode:
    """A node in this process, its workers in theirs."""

    def __init__(self, models_dir: Path, **more: Any) -> None:
        config = NeuronConfig(
            models_dir=str(models_dir),
            memory_limit_mb=BUDGET_MB,
            harness=HarnessSection(torch=TorchSection(threads=1)),
            **more,
        )
        self.neuron: Neuron = build_neuron(config, factories={"torch": LastingFactory()})
        self.client = AsgiClient(self.neuron.app)

    async def load(self, model_id: str = "tiny", **more: Any) -> AsgiReply:
        order = {"model_id": model_id, "source": "tiny", "memory_mb": MEMORY_MB, **more}
        return await self.client.post("/models/load", json=order)

    async def unload(self, model_id: str = "tiny") -> None:
        reply = await self.client.post("/models/unload", json={"model_id": model_id})
        assert reply.status == 200, reply.body

    def ask(self, text: str = "Hi", *, model: str = "tiny", **more: Any) -> AsgiExchange:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **more}
        return self.client.open("POST", "/v1/chat/completions", json=body)

    async def chat(self, text: str = "Hi", **more: Any) -> Any:
        async with self.ask(text, **{"max_tokens": 5, **more}) as exchange:
            reply = await exchange.reply()
            assert reply.status == 200, reply.body
            return reply.json()

    async def status(self, model_id: str = "tiny") -> str:
        reports = (await self.client.get("/models")).json()
        return str({report["id"]: report["status"] for report in reports}.get(model_id))

    async def report(self, model_id: str = "tiny") -> Any:
        (report,) = [one for one in (await self.client.get("/models")).json() if one["id"] == model_id]
        return report

    async def health(self, model_id: str = "tiny") -> Any:
        """What /health says of a loaded model."""
        models = (await self.client.get("/health")).json()["models"]
        (found,) = [one for one in models if one["id"] == model_id]
        return found

    async def until_status(self, status: str) -> None:
        async with asyncio.timeout(10):
            while await self.status() != status:
                await asyncio.sleep(0.01)


def warm_server() -> psutil.Process:
    found = [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]
    return found[0]


def workers() -> list[psutil.Process]:
    return [child for child in warm_server().children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
async def node(models_dir: Path, request: pytest.FixtureRequest) -> AsyncIterator[RealNode]:
    """With `tiny` loaded; a test may add to its configuration with `indirect` parameters."""
    node = RealNode(models_dir, **getattr(request, "param", {}))
    await node.neuron.start()
    assert (await node.load()).status == 200
    yield node
    assert (await node.client.get("/health")).json()["requests"] == []
    await node.neuron.stop()
    assert workers() == []
    assert (await node.client.get("/health")).json()["ledger"] == []


async def test_a_loaded_model_answers_and_unloading_ends_its_process(node: RealNode) -> None:
    (worker,) = workers()
    reply = await node.chat()
    assert reply["usage"]["completion_tokens"] == 5
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["timings"]["prefill_ms"] > 0
    again = await node.chat()
    assert (again["choices"], again["model"]) == (reply["choices"], reply["model"])
    cached = [one["usage"].pop("prompt_tokens_details")["cached_tokens"] for one in (reply, again)]
    assert again["usage"] == reply["usage"]
    assert cached == [0, reply["usage"]["prompt_tokens"] - 1], "all but the last token, which is computed"
    await node.unload()
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert await node.status() == "unloaded"


async def test_streamed_and_whole_replies_say_the_same(node: RealNode) -> None:
    whole = await node.chat(max_tokens=40)
    async with node.ask(stream=True, max_tokens=40) as exchange:
        body = (await exchange.reply()).body
    parts = [msgspec.json.decode(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == whole["choices"][0]["message"]["content"] != ""


async def test_a_killed_worker_fails_its_request_and_the_next_one_brings_it_back(node: RealNode) -> None:
    (worker,) = workers()
    async with node.ask(stream=True, max_tokens=8000) as exchange:
        await exchange.chunk()
        worker.kill()
        body = (await exchange.reply()).body
    assert b"engine_ended" in body
    assert b"SIGKILL" in body
    assert body.endswith(b"data: [DONE]\n\n")
    await node.until_status("failed")
    await node.chat()
    assert [other.pid for other in workers()] != [worker.pid]


async def test_a_worker_killed_before_the_first_token_is_a_503(node: RealNode) -> None:
    (worker,) = workers()
    async with node.ask("x" * 7000, stream=True) as exchange:
        worker.suspend()
        worker.kill()
        reply = await exchange.reply()
    assert (reply.status, reply.json()["error"]["code"]) == (503, "engine_ended")
    assert "retry-after" in reply.headers


async def test_the_node_outlives_its_warm_server(node: RealNode) -> None:
    (worker,), server = workers(), warm_server()
    server.kill()
    await node.until_status("failed")
    await node.chat()
    assert warm_server().pid != server.pid
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


async def test_two_models_over_the_budget_are_refused_and_disturb_nothing(node: RealNode) -> None:
    async with node.ask(stream=True, max_tokens=500) as exchange:
        await exchange.chunk()
        reply = await node.load("second", memory_mb=BUDGET_MB - MEMORY_MB + 1)
        assert reply.status == 409
        (row,) = reply.json()["error"]["ledger"]
        assert row["granted"] == [{"model_id": "tiny", "bytes": MEMORY_MB * 2**20}]
        assert len(workers()) == 1
        assert (await exchange.reply()).body.endswith(b"[DONE]\n\n")
    assert (await node.load("second")).status == 200
    assert len(workers()) == 2
    assert (await node.chat(model="second"))["model"] == "second"


async def test_a_broken_checkpoint_is_refused_and_disturbs_nothing(node: RealNode, models_dir: Path) -> None:
    broken = models_dir / "broken"
    shutil.copytree(models_dir / "tiny", broken)
    try:
        with (broken / "model.safetensors").open("r+b") as weights:
            weights.truncate(5000)
        reply = await node.load("broken", source="broken")
        assert (reply.status, reply.json()["error"]["code"]) == (503, "load_failed")
        assert "model.safetensors" in reply.json()["error"]["message"]
        (broken / "tokenizer.json").unlink()
        (broken / "model.safetensors").write_bytes((models_dir / "tiny" / "model.safetensors").read_bytes())
        reply = await node.load("broken", source="broken")
        assert "tokenizer.json" in reply.json()["error"]["message"]
    finally:
        shutil.rmtree(broken)
    await node.chat()
    assert len(workers()) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_client_that_leaves_frees_the_engine_at_once(
    node: RealNode, stream: bool, phase: str
) -> None:
    """The next request hardly waits, though what was abandoned had seconds of work left."""
    text = "x" * 7500 if phase == "prefill" else "Hi"
    async with node.ask(text, stream=stream, max_tokens=600 if phase == "prefill" else 8000) as exchange:
        if phase == "decode" and stream:
            await exchange.chunk()
        else:
            (worker,) = workers()
            before = sum(worker.cpu_times()[:2])
            while sum(worker.cpu_times()[:2]) < before + (0.01 if phase == "prefill" else 0.1):
                await asyncio.sleep(0.001)
        exchange.disconnect()
    assert (await node.client.get("/health")).json()["requests"] == []
    assert (await node.chat())["timings"]["queue_ms"] < 500


ONE_AT_A_TIME = {"admission": AdmissionSection(max_running=1)}


@pytest.mark.parametrize("node", [ONE_AT_A_TIME], indirect=True)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_the_line_is_in_it_no_more(node: RealNode, stream: bool) -> None:
    async with node.ask(stream=True, max_tokens=8000) as running:
        await running.chunk()
        async with node.ask(stream=stream) as waiting, node.ask("next", max_tokens=5) as last:
            while (await node.health())["queue_depth"] < 2:
                await asyncio.sleep(0.005)
            waiting.disconnect()
            await waiting.ended()
            async with asyncio.timeout(5):  # what is said of the line is as old as the last step
                while (await node.health())["queue_depth"] > 1:
                    await asyncio.sleep(0.001)
            running.disconnect()
            await running.ended()
            reply = (await last.reply()).json()
    assert reply["usage"]["completion_tokens"] == 5
    health = await node.health()
    assert (health["in_flight"], health["queue_depth"], health["cache_usage_ratio"]) == (0, 0, 0.0)


async def test_eight_at_once_are_answered_as_each_alone(node: RealNode) -> None:
    def said(reply: Any) -> Any:
        return reply["choices"], reply["usage"]["completion_tokens"]

    questions = [f"{index}: " + "once upon a time " * (4 * index) for index in range(8)]
    options: list[dict[str, Any]] = [{}, {"temperature": 1, "seed": 3}, {"frequency_penalty": 1}, {"n": 1}]
    asked = [(question, {"max_tokens": 30, **options[index % 4]}) for index, question in enumerate(questions)]
    alone = [said(await node.chat(question, **more)) for question, more in asked]
    together = await asyncio.gather(*(node.chat(question, **more) for question, more in asked))
    assert [said(reply) for reply in together] == alone
    assert together[7]["usage"]["prompt_tokens_details"]["cached_tokens"] > 400


async def test_a_worker_killed_under_load_fails_every_request_clearly(node: RealNode) -> None:
    """Eight run, half of them streams, and two wait."""
    (worker,) = workers()
    exchanges = [node.ask(f"{index}", stream=index % 2 == 0, max_tokens=8000) for index in range(10)]
    for index in (0, 2, 4, 6):
        await exchanges[index].chunk()
    worker.kill()
    replies = await asyncio.gather(*(exchange.reply() for exchange in exchanges))
    for index, reply in enumerate(replies):
        assert b"engine_ended" in reply.body
        assert b"SIGKILL" in reply.body
        if index in (0, 2, 4, 6):
            assert reply.body.count(b"[DONE]") == 1
        else:
            assert (reply.status, reply.json()["error"]["code"]) == (503, "engine_ended")
    for exchange in exchanges:
        await exchange.ended()
    assert await node.status() == "failed"
    await node.chat()
    assert [other.pid for other in workers()] != [worker.pid]


async def test_weights_that_are_not_numbers_are_reported_and_not_tried_again_at_once(
    node: RealNode, models_dir: Path
) -> None:
    spoilt = models_dir / "spoilt"
    shutil.copytree(models_dir / "tiny", spoilt)
    try:
        weights = load_file(spoilt / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][:, 3] = float("nan")
        save_file(weights, spoilt / "model.safetensors")
        assert (await node.load("spoilt", source="spoilt")).status == 200
        for _ in range(2):  # the first death of a model that ran is forgiven
            async with node.ask(model="spoilt") as exchange:
                reply = await exchange.reply()
            assert reply.status == 500
            assert "values that are not numbers" in reply.json()["error"]["message"]
            async with asyncio.timeout(10):
                while (await node.report("spoilt"))["status"] != "failed":
                    await asyncio.sleep(0.005)
            servable = (await node.report("spoilt"))["servable"]
            assert (servable["ok"], servable["reason"]) == (False, "failed")
            assert "the weights may be damaged" in servable["detail"]
        async with node.ask(model="spoilt") as exchange:
            reply = await exchange.reply()
        assert (reply.status, reply.json()["error"]["code"]) == (503, "load_failed")
        assert "retry-after" in reply.headers
        await node.unload("spoilt")
    finally:
        shutil.rmtree(spoilt)
    await node.chat()
    assert len(workers()) == 1


async def test_a_client_that_stops_reading_slows_down_nobody_but_itself(node: RealNode) -> None:
    whole = await node.chat("slow", max_tokens=400)
    async with node.ask("slow", stream=True, max_tokens=400) as slow:
        await slow.chunk()
        slow.stall()
        others = await asyncio.gather(*(node.chat(f"{index}", max_tokens=300) for index in range(6)))
        assert [other["usage"]["completion_tokens"] for other in others] == [300] * 6
        assert not slow.done
        slow.resume()
        body = (await slow.reply()).body
    text = "".join(
        msgspec.json.decode(line[6:])["choices"][0]["delta"].get("content", "")
        for line in body.splitlines()
        if line.startswith(b"data: {") and b'"content"' in line
    )
    assert whole["choices"][0]["message"]["content"].endswith(text)
    assert body.endswith(b"[DONE]\n\n")


async def test_the_threads_of_a_node_are_divided_among_its_models_while_they_work(node: RealNode) -> None:
    """What each gets is `loading`'s business; here, that a worker takes the order in its stride."""
    async with node.ask(stream=True, max_tokens=600) as exchange:
        await exchange.chunk()
        assert (await node.load("second")).status == 200
        await node.unload("second")
        assert (await exchange.reply()).body.endswith(b"[DONE]\n\n")


@pytest.mark.timeout(60)
async def test_twenty_loads_leave_no_memory_behind(node: RealNode) -> None:
    def resident() -> int:
        """Bytes that are the processes' own; pages of libraries count or not, as others map them too."""
        pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
        lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    async def cycle() -> int:
        assert (await node.load()).status == 200
        await node.chat()
        await node.unload()
        return resident()

    for _ in range(2):
        first = await cycle()
    for _ in range(20):
        last = await cycle()
    assert last <= first * 1.05, f"{first / 2**20:.1f} MB became {last / 2**20:.1f} MB"


PROGRAM = """
import asyncio, sys
from cortex.config import NeuronConfig
from cortex.neuron.app import build_neuron
from cortex.testing import AsgiClient

async def main():
    neuron = build_neuron(NeuronConfig(models_dir={models_dir!r}))
    await neuron.start()
    client = AsgiClient(neuron.app)
    order = {{"model_id": "tiny", "tensor_parallel": 2}}
    assert (await client.post("/models/load", json=order)).status == 200
    messages = [{{"role": "user", "content": "Hi"}}]
    body = {{"model": "tiny", "max_tokens": 8000, "stream": True, "messages": messages}}
    async with client.open("POST", "/v1/chat/completions", json=body) as exchange:
        await exchange.chunk()
        print("busy", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_node_that_is_killed_at_work_leaves_no_process(models_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "node.py").write_text(PROGRAM.format(models_dir=str(models_dir)))
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, str(tmp_path / "node.py")),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert program.stdout is not None
    assert await program.stdout.readline() == b"busy\n"
    started = psutil.Process(program.pid).children(recursive=True)
    assert len(started) == 4, "resource tracker, warm server, two ranks"
    program.send_signal(signal.SIGKILL)
    await program.wait()
    _, remaining = await asyncio.to_thread(psutil.wait_procs, started, 10)
    assert not remaining
