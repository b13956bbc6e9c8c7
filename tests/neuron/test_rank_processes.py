"""A model on several ranks through the node: real processes that load, answer, die and end together."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cortex.config import HarnessSection, NeuronConfig, TorchSection
from cortex.hookspecs import LoadOrder
from cortex.neuron.app import Neuron, build_neuron
from cortex.neuron.engine import entry
from cortex.neuron.engine.messages import Load
from cortex.neuron.processes import WarmServer
from cortex.neuron.rank_group import RankGroup
from cortex.neuron.torch_engine import WORKER, TorchFactory
from cortex.testing import AsgiClient, AsgiReply
from cortex.testing.asgi_client import AsgiExchange
from cortex.wire.errors import LoadFailed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_warm_server")]


class LastingFactory(TorchFactory):
    """Its warm server outlives the node, so that the next test need not import torch again."""

    async def stop(self) -> None:
        pass


class RankedNode:
    """A node in this process, its workers in theirs."""

    def __init__(self, models_dir: Path, watchdog_s: float) -> None:
        config = NeuronConfig(
            models_dir=str(models_dir),
            memory_limit_mb=4000,
            harness=HarnessSection(torch=TorchSection(threads=1)),
        )
        factory = LastingFactory(options={"watchdog_s": watchdog_s})
        self.neuron: Neuron = build_neuron(config, factories={"torch": factory})
        self.client = AsgiClient(self.neuron.app)

    async def load(self, ranks: int = 2, source: str = "tiny", **more: Any) -> AsgiReply:
        order = {"model_id": "m", "source": source, "tensor_parallel": ranks, "dtype": "float32", **more}
        return await self.client.post("/models/load", json=order)

    async def unload(self) -> None:
        assert (await self.client.post("/models/unload", json={"model_id": "m"})).status == 200

    def ask(self, **more: Any) -> AsgiExchange:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, **more}
        return self.client.open("POST", "/v1/chat/completions", json=body)

    async def chat(self) -> Any:
        async with self.ask(max_tokens=40) as exchange:
            reply = await exchange.reply()
            assert reply.status == 200, reply.body
            return reply.json()["choices"]

    async def report(self) -> Any:
        (report,) = (await self.client.get("/models")).json()
        return report

    async def until_status(self, status: str) -> None:
        async with asyncio.timeout(10):
            while (await self.report())["status"] != status:
                await asyncio.sleep(0.01)


def processes() -> list[psutil.Process]:
    """The workers, rank by rank, dead ones that nobody has reaped included."""
    (server,) = [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]
    return sorted(server.children(), key=lambda child: child.pid)


@pytest.fixture
async def node(models_dir: Path, request: pytest.FixtureRequest) -> AsyncIterator[RankedNode]:
    """With a watchdog of a minute, or of as many seconds as an `indirect` parameter says."""
    node = RankedNode(models_dir, getattr(request, "param", 60.0))
    await node.neuron.start()
    yield node
    assert (await node.client.get("/health")).json()["requests"] == []
    await node.neuron.stop()
    assert processes() == []
    assert (await node.client.get("/health")).json()["ledger"] == []


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("many", [2, pytest.param(4, marks=pytest.mark.long)])
async def test_ranks_say_what_one_says_and_leave_nothing(node: RankedNode, many: int) -> None:
    said, sizes, left = [], [], []
    for ranks in (1, many):
        reply = await node.load(ranks)
        assert reply.status == 200, reply.body
        assert len(processes()) == ranks
        sizes.append((await node.report())["bytes_per_device"]["cpu"])
        said.append(await node.chat())
        await node.unload()
        assert processes() == []
        left.append(descriptors())
    assert said[0] == said[1]
    assert said[0][0]["message"]["content"]
    assert sizes[0] < sizes[1] < many * sizes[0]
    assert left[0] == left[1]


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_that_is_killed_ends_all_and_the_next_load_works(node: RankedNode, rank: int) -> None:
    assert (await node.load()).status == 200
    said = await node.chat()
    old = processes()
    async with node.ask(stream=True, max_tokens=8000) as exchange:
        await exchange.chunk()
        old[rank].kill()
        async with asyncio.timeout(10):  # the death is seen, not waited out
            body = (await exchange.reply()).body
    assert b"engine_ended" in body
    assert f"lost rank {rank} of 2, which was killed (SIGKILL".encode() in body
    assert body.endswith(b"data: [DONE]\n\n")
    await node.until_status("failed")
    assert processes() == []
    assert await node.chat() == said
    assert len(processes()) == 2


async def test_a_rank_that_is_killed_while_all_rest_ends_all(node: RankedNode) -> None:
    assert (await node.load()).status == 200
    processes()[1].kill()
    await node.until_status("failed")
    assert "lost rank 1 of 2" in (await node.report())["servable"]["detail"]
    assert processes() == []


@pytest.mark.parametrize("node", [1.0], indirect=True)
@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (1, "waited for another rank in vain"),
        (0, "lost a rank of 2, which did not take part: rank 1 waited"),
    ],
)
async def test_a_rank_that_hangs_is_waited_for_as_long_as_the_watchdog_says(
    node: RankedNode, rank: int, words: str
) -> None:
    assert (await node.load()).status == 200
    async with node.ask(stream=True, max_tokens=8000) as exchange:
        await exchange.chunk()
        processes()[rank].suspend()
        body = (await exchange.reply()).body
    assert b"engine_ended" in body
    assert words.encode() in body
    await node.until_status("failed")
    assert processes() == []


@pytest.mark.parametrize("node", [0.05], indirect=True)
async def test_a_rank_0_that_hangs_while_all_rest_is_noticed_by_the_node(node: RankedNode) -> None:
    """The others wait for it with all patience, and rightly: for all that they know there is no work."""
    assert (await node.load()).status == 200
    processes()[0].suspend()
    async with node.ask(max_tokens=8) as exchange:
        reply = await exchange.reply()
    assert (reply.status, reply.json()["error"]["code"]) == (503, "engine_ended")
    assert "made no step for 0.5 s" in reply.json()["error"]["message"]
    assert processes() == []


async def test_what_cannot_be_divided_is_refused_with_the_numbers(node: RankedNode) -> None:
    for ranks, words in ((3, "2 KV heads"), (8, "4 heads cannot be divided among 8 ranks")):
        reply = await node.load(ranks)
        assert reply.status == 400
        assert words in reply.json()["error"]["message"]
    assert processes() == []


async def test_broken_weights_are_refused_and_the_next_load_works(node: RankedNode, models_dir: Path) -> None:
    broken = models_dir / "broken-for-ranks"
    shutil.copytree(models_dir / "tiny", broken)
    try:
        with (broken / "model.safetensors").open("r+b") as weights:
            weights.truncate(5000)
        reply = await node.load(source=broken.name)
    finally:
        shutil.rmtree(broken)
    assert (reply.status, reply.json()["error"]["code"]) == (503, "load_failed")
    assert processes() == []
    assert (await node.load()).status == 200


# --- the ranks without a node ---------------------------------------------------------------------


def order(models_dir: Path, **changes: Any) -> Load:
    order: dict[str, Any] = {
        "path": str(models_dir / "tiny"),
        "dtype": "float32",
        "device": "cpu",
        "context": 256,
        "cache_tokens": 256,
        "prefill_chunk": 16,
        "threads": 1,
    }
    return Load(**{**order, **changes})


@pytest.fixture
async def group() -> AsyncIterator[RankGroup]:
    group = await RankGroup.start(WarmServer([WORKER], entry.main), ("cpu", "cpu"), 1)
    yield group
    await group.close()
    assert processes() == []


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_that_dies_in_a_load_fails_it_and_is_named(
    group: RankGroup, models_dir: Path, rank: int
) -> None:
    processes()[rank].kill()
    with pytest.raises(LoadFailed, match=f"Rank {rank} of 2: The worker was killed .SIGKILL"):
        await group.load(order(models_dir), ("cpu", "cpu"), lambda progress: None)


async def test_what_ranks_refuse_is_told_with_the_ranks_name(group: RankGroup, models_dir: Path) -> None:
    with pytest.raises(LoadFailed, match=r"Rank [01] of 2: The dtype 'int3' is unknown"):
        await group.load(order(models_dir, dtype="int3"), ("cpu", "cpu"), lambda progress: None)


async def test_a_load_that_is_cancelled_leaves_nothing(models_dir: Path) -> None:
    factory = LastingFactory()
    plan = factory.plan(LoadOrder(model_id="m", path=str(models_dir / "tiny"), devices=("cpu",) * 2))
    begun = asyncio.Event()
    load = asyncio.create_task(factory.load(plan, lambda progress: begun.set()))
    await begun.wait()
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert processes() == []


async def test_a_hybrid_on_ranks_says_what_one_says_and_goes_on_from_a_kept_state(
    node: RankedNode, models_dir: Path, make_tiny: Callable[..., Any]
) -> None:
    """A random model with the tokenizer of the tiny one; turns begin with the same block of tokens."""
    hybrid = models_dir / "hybrid"
    others = shutil.ignore_patterns("*.safetensors*", "config.json")
    shutil.copytree(models_dir / "tiny", hybrid, ignore=others)
    shutil.copytree(make_tiny("qwen3_5_text", vocab_size=258).directory, hybrid, dirs_exist_ok=True)
    turns = [{"role": "user", "content": "Hi"}]
    more = [*turns, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go on"}]
    said = []
    for ranks in (1, 2):
        assert (await node.load(ranks, source="hybrid")).status == 200
        for messages, known in ((turns, 0), (more, 16)):
            async with node.ask(messages=messages, max_tokens=30) as exchange:
                reply = (await exchange.reply()).json()
            assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == known
            said.append(reply["choices"])
        await node.unload()
    assert said[:2] == said[2:]
