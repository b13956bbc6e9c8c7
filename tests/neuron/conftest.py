"""A whole node in process: real routes, residents and ledger, with scripted engines instead of workers.

And tiny random models: one for the node itself, and any that transformers makes.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from cortex.config import NeuronConfig
from cortex.hookspecs import LoadOrder
from cortex.neuron.app import Neuron, build_neuron
from cortex.neuron.hardware import Hardware
from cortex.neuron.torch_engine import TorchFactory
from cortex.testing import AsgiClient, AsgiExchange, AsgiReply, ManualClock
from cortex.testing.scripted import ScriptedEngine, ScriptedFactory

FILES = {
    "/proc/meminfo": "MemTotal: 4194304 kB\nMemAvailable: 4194304 kB\n",
    "/proc/cpuinfo": "model name : Test CPU\n",
    "/proc/stat": "cpu 10 0 10 80 0 0 0 0\n",
}


@pytest.fixture(scope="session", autouse=True)
def one_thread_each() -> None:
    """Of torch, where several test processes share the cores: threads that wait for each other while others
    have the cores make a step several times as long.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


class ScriptedNode:
    """The node under test, its client, and the engine of every model by its id."""

    def __init__(self, models_dir: Path, **config: Any) -> None:
        self.clock = ManualClock()
        self.engines: dict[str, ScriptedEngine] = {}
        self.factory = ScriptedFactory(self._make_engine)
        for name in ("m", "n", "org/name"):
            (models_dir / name).parent.mkdir(exist_ok=True)
            (models_dir / f"{name}.gguf").touch()
        self.neuron: Neuron = build_neuron(
            NeuronConfig(models_dir=str(models_dir), **config),
            factories={"scripted": self.factory},
            hardware=Hardware(nvml=None, read=FILES.get, affinity=2),
            clock=self.clock,
            call_later=self.clock.call_later,
            wall=lambda: self.clock.now + 1e9,
        )
        self.client = AsgiClient(self.neuron.app)

    def _make_engine(self, order: LoadOrder) -> ScriptedEngine:
        engine = self.engines[order.model_id] = ScriptedEngine()
        return engine

    async def load(self, model_id: str = "m", **more: Any) -> ScriptedEngine:
        reply = await self.client.post("/models/load", json={"model_id": model_id, **more})
        assert reply.status == 200, reply.body
        return self.engines[model_id]

    def hold_loads(self) -> asyncio.Event:
        """Loads wait in their middle until the event is set."""
        gate = asyncio.Event()
        self.factory.before_load = lambda plan: gate.wait()
        return gate

    async def sample(self, metric: str) -> str | None:
        """The value of one series of /metrics, as it is written."""
        text = (await self.client.get("/metrics")).body.decode()
        found = [line for line in text.splitlines() if line.startswith(metric + " ")]
        return found[0].rpartition(" ")[2] if found else None

    def ask(self, model: str = "m", text: str = "Hi", **more: Any) -> AsgiExchange:
        """A chat request that the test leads step by step."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        return self.client.open("POST", "/v1/chat/completions", json=body)

    async def chat(self, model: str = "m", **more: Any) -> AsgiReply:
        async with self.ask(model, **more) as exchange:
            return await exchange.reply()

    async def nothing_left(self) -> None:
        """All counters of requests in flight are at zero."""
        health = (await self.client.get("/health")).json()
        assert health["requests"] == []
        assert all(load["in_flight"] == load["queue_depth"] == 0 for load in health["models"])


@pytest.fixture
def make_node(tmp_path: Path) -> Callable[..., ScriptedNode]:
    """For a node with a configuration of its own, which the test starts and stops."""
    return functools.partial(ScriptedNode, tmp_path)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[ScriptedNode]:
    node = ScriptedNode(tmp_path)
    await node.neuron.start()
    yield node
    await node.neuron.stop()
    assert not node.factory.live
    assert node.factory.stopped


@pytest.fixture(scope="module")
def own_warm_server() -> Iterator[None]:
    """For modules with real workers: one that another module left has something else preloaded."""
    asyncio.run(TorchFactory().stop())
    yield
    asyncio.run(TorchFactory().stop())


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
LAYERS, HIDDEN, HEADS, KV_HEADS, WIDTH, INTERMEDIATE, CONTEXT = 2, 32, 4, 2, 8, 64, 8192


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with `tiny`: a random llama that speaks in bytes and never ends by itself."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "tiny")
    return folder


def write_tiny_model(folder: Path) -> None:
    """Safetensors, configuration, tokenizer and chat template of a tiny llama."""
    folder.mkdir()
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE})
    )
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_tiny_weights(tokenizer.get_vocab_size()), folder / "model.safetensors")


def _tiny_weights(vocab: int) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocab, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (vocab, HIDDEN),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}."
        shapes |= {
            f"{layer}input_layernorm": (HIDDEN,),
            f"{layer}post_attention_layernorm": (HIDDEN,),
            f"{layer}self_attn.q_proj": (HEADS * WIDTH, HIDDEN),
            f"{layer}self_attn.k_proj": (KV_HEADS * WIDTH, HIDDEN),
            f"{layer}self_attn.v_proj": (KV_HEADS * WIDTH, HIDDEN),
            f"{layer}self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
            f"{layer}mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            f"{layer}mlp.up_proj": (INTERMEDIATE, HIDDEN),
            f"{layer}mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
    chance = np.random.default_rng(11)
    weights = {
        f"{name}.weight": chance.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()
    }
    weights["lm_head.weight"][-2:] = 0  # so special tokens are never the likeliest
    return weights


# --- tiny models of every family ------------------------------------------------------------------


class Tiny(NamedTuple):
    """A model of transformers, and where it lies as sharded safetensors with config.json."""

    directory: Path
    model: Any

    def logits(self, ids: list[int]) -> Any:
        """The reference's, fp32 [len(ids), vocabulary]."""
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0]


SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
DELTA = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "num_attention_heads": 4,
    "head_dim": 16,
}
SHARED = {"shared_expert_intermediate_size": 56}
SIZES_OF: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 16, "sliding_window": 24, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": 40},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "qwen3_next": {**DELTA, **EXPERTS, **SHARED},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS, **SHARED},
}
"""By kind, what is other or more."""


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """Random models by the name that transformers' configurations have for the kind; each made once."""
    made: dict[str, Tiny] = {}

    def make(kind: str, **options: Any) -> Tiny:
        key = repr((kind, sorted(options.items())))
        if key not in made:
            sizes = {**SIZES, **SIZES_OF.get(kind, {}), **options}
            made[key] = write_tiny(tmp_path_factory.mktemp(kind), kind, sizes)
        return made[key]

    return make


def write_tiny(directory: Path, kind: str, sizes: dict[str, Any]) -> Tiny:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    randomize(model)
    model.save_pretrained(directory, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return Tiny(directory, model)


def randomize(model: Any) -> None:
    """What transformers begins with at zero or one, where mistakes would not show."""
    import torch

    zero_centred = model.config.get_text_config().model_type.startswith(("gemma3", "qwen3_next", "qwen3_5"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                around = 0.0 if zero_centred and "linear_attn" not in name else 1.0
                parameter.uniform_(around - 0.5, around + 0.5)
            elif name.endswith("A_log"):
                parameter.uniform_(-2, 2)
            elif name.endswith(("bias", ".gate.weight")):
                parameter.normal_(0, 0.5)
