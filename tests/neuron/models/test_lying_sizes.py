"""Configurations that lie: whatever a number says, a load is planned or refused by name, in little memory.

Plans are made in the node's own process, so what a file claims may cost it nothing.
"""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest

from cortex.hookspecs import LoadOrder
from cortex.neuron.torch_engine import TorchFactory
from cortex.wire.errors import BadRequest, LoadFailed

MOST_BYTES = 2**23
HIDDEN, VOCAB = 64, 96
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
HYBRID = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**CONFIG, **EXPERTS, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    "qwen3_next": {**CONFIG, **EXPERTS, **HYBRID, "shared_expert_intermediate_size": 32},
    "gemma3_text": {
        **CONFIG,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 30.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
PLAIN = {
    "block_count": 4,
    "context_length": 512,
    "embedding_length": HIDDEN,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 16,
}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 128,
    "rope.scaling.yarn_beta_fast": 16.0,
    "rope.scaling.yarn_beta_slow": 0.5,
    "rope.scaling.yarn_log_multiplier": 1.0,
    "rope.scaling.attn_factor": 1.5,
}
MIXTURE = {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 48}
METADATA: dict[str, dict[str, Any]] = {
    "qwen3moe": {**PLAIN, **MIXTURE, **YARN, "nextn_predict_layers": 1},
    "qwen35moe": {
        **PLAIN,
        **MIXTURE,
        "expert_shared_feed_forward_length": 32,
        "full_attention_interval": 4,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 8,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 48,
    },
    "gemma3": {**PLAIN, "attention.sliding_window": 8, "attention.sliding_window_pattern": 2},
}
LIES: list[Any] = [0, -1, 1, 3, 7, 2**20, 10**9, 2**31 - 1, 2**32, 2**53, 2**63, 0.0, -0.5, 1e-30, 1e300]
LIES += [None, True, "", "x", [], [3], [[]], ["x"], [0] * 4, [2] * 4, [10**9] * 4]
ONLY_JSON: list[Any] = [10**400, -(2**70), {}, {"a": 1}, {"rope_type": [], "factor": 0}]
ONLY_GGUF: list[Any] = [float("nan"), float("inf"), [float("nan")] * 4]


def lies(chance: random.Random, more: list[Any]) -> list[Any]:
    """Some of them each time; which ones is the same in every run."""
    return [*chance.sample([*LIES, *more], 9), 10**9, chance.randrange(2**31)]


def planned(path: Path) -> bool:
    """Whether a load could be planned. What is neither a plan nor our refusal fails the test."""
    order = LoadOrder(model_id="m", path=str(path))
    try:
        plan = TorchFactory().plan(order)
    except (LoadFailed, BadRequest) as refused:
        assert str(path.parent) in refused.message
        return False
    assert plan.detail.cache_tokens > 0
    assert all(0 < size < 2**63 for size in plan.bytes_per_device.values())
    return True


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < MOST_BYTES


@pytest.mark.parametrize("family", CONFIGS)
def test_any_value_of_a_configuration_may_lie(family: str, tmp_path: Path) -> None:
    header = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [1, 1], "data_offsets": [0, 2]}}
    encoded = json.dumps(header).encode()
    content = struct.pack("<Q", len(encoded)) + encoded + bytes(2)
    (tmp_path / "model.safetensors").write_bytes(content)

    def plan(config: dict[str, Any]) -> bool:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **config}))
        return planned(tmp_path)

    truth, chance = CONFIGS[family], random.Random(family)
    assert plan(truth)
    refused = sum(not plan({**truth, key: lie}) for key in truth for lie in lies(chance, ONLY_JSON))
    assert refused > 5 * len(truth)
    for _ in range(40):
        keys = chance.sample(sorted(truth), 3)
        plan({**truth, **{key: chance.choice([2**20, 10**6, 2**31 - 1]) for key in keys}})


def kind_of(value: Any) -> gguf.GGUFValueType:
    kinds = gguf.GGUFValueType
    match value:
        case bool():
            return kinds.BOOL
        case int():
            return kinds.INT32 if -(2**31) <= value < 2**31 else kinds.UINT64
        case float():
            return kinds.FLOAT64
        case str():
            return kinds.STRING
    return kinds.ARRAY


def write(path: Path, architecture: str, metadata: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is None or value == [] or value == [[]]:  # the writer writes no empty lists
            continue
        inner = kind_of(value[0]) if isinstance(value, list) else None
        writer.add_key_value(f"{architecture}.{key}", value, kind_of(value), sub_type=inner)
    writer.add_tensor("token_embd.weight", numpy.zeros((VOCAB, HIDDEN), numpy.float32))
    if architecture == "qwen35moe":
        writer.add_tensor("blk.0.ffn_gate_inp_shexp.weight", numpy.zeros(HIDDEN, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", METADATA)
def test_any_value_of_gguf_metadata_may_lie(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def plan(metadata: dict[str, Any]) -> bool:
        write(path, architecture, metadata)
        return planned(path)

    truth, chance = METADATA[architecture], random.Random(architecture)
    assert plan(truth)
    refused = sum(not plan({**truth, key: lie}) for key in truth for lie in lies(chance, ONLY_GGUF))
    assert refused > 5 * len(truth)
    for _ in range(40):
        keys = chance.sample(sorted(truth), 3)
        plan({**truth, **{key: chance.choice([2**20, 10**6, 2**31 - 1]) for key in keys}})
