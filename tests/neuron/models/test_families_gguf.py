"""Every family against transformers, read from GGUF files that are written as llama.cpp's converter does it.

Names of tensors are gguf-py's own; what else the converter does is in conversion/ of llama.cpp.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf import GGUFWriter, quants
from torch import Tensor

pytestmark = pytest.mark.slow

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 2.0,
    "beta_slow": 0.02,
}
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama": ("llama", {}, 1e-4),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, 1e-4),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, 1e-4),
    "qwen2": ("qwen2", {}, 1e-4),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}, 1e-4),
    "qwen3": ("qwen3", {}, 3e-4),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}, 1e-3),
    "llama-yarn": ("llama", {"rope_parameters": YARN}, 1e-4),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}, 3e-4),
    "qwen3_5-yarn": ("qwen3_5_text", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, 1e-3),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16, "final_logit_softcapping": 4.0}, 3e-4),
    "qwen3_next": ("qwen3_next", {}, 1e-3),
    "qwen3_5": ("qwen3_5_text", {}, 1e-3),
    "qwen3_5-tied": ("qwen3_5_text", {"tie_word_embeddings": True, "linear_num_key_heads": 3}, 1e-3),
    "qwen3_5_moe": ("qwen3_5_moe_text", {}, 1e-3),
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "qwen3_next": gguf.MODEL_ARCH.QWEN3NEXT,
    "qwen3_5_text": gguf.MODEL_ARCH.QWEN35,
    "qwen3_5_moe_text": gguf.MODEL_ARCH.QWEN35MOE,
}
IDS = torch.randint(0, 199, (150,), generator=torch.Generator().manual_seed(1)).tolist()
Q8_0 = gguf.GGMLQuantizationType.Q8_0
Stored = Iterator[tuple[str, Tensor]]


def write_gguf(
    tiny: Any,
    path: Path,
    factors: list[float] | None = None,
    *,
    mtp: bool = False,
    newer: bool = False,
    packed: bool = False,
) -> None:
    """`mtp`: with a block behind the others that predicts further tokens. `newer`: with gate and up of
    experts in one tensor, and the gate of the shared one as a vector. `packed`: with experts in Q8_0."""
    config = tiny.model.config
    architecture = ARCHITECTURES[config.model_type]
    blocks = config.num_hidden_layers + mtp
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    write_metadata(writer, config, blocks)
    if mtp:
        writer.add_nextn_predict_layers(1)
        writer.add_tensor(f"blk.{blocks - 1}.nextn.eh_proj.weight", numpy.ones((4, 4), numpy.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", numpy.array(factors, dtype=numpy.float32))
    names = gguf.get_tensor_name_map(architecture, blocks)
    for name, values in tiny.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        whole = newer and name.endswith("experts.gate_up_proj")
        for converted, numbers in [(name, values)] if whole else convert(name, values, config):
            if newer and converted.endswith("shared_expert_gate.weight"):
                numbers = numbers[0]
            stored = names.get_name(converted, try_suffixes=(".weight", ".bias"))
            assert stored is not None, converted
            stored = f"{stored}.weight" if whole else stored
            plain = numbers.contiguous().numpy()
            if packed and "_exps" in stored:
                writer.add_tensor(stored, quants.quantize(plain, Q8_0), raw_dtype=Q8_0)
            else:
                writer.add_tensor(stored, plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_metadata(writer: GGUFWriter, config: Any, blocks: int) -> None:
    rope = config.rope_parameters
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    if hasattr(config, "intermediate_size"):
        writer.add_feed_forward_length(config.intermediate_size)
    if hasattr(config, "num_experts"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if hasattr(config, "linear_num_value_heads"):
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
        writer.add_full_attention_interval(config.num_hidden_layers)
        writer.add_rope_dimension_count(int(width * rope["partial_rotary_factor"]))


def convert(name: str, values: Tensor, config: Any) -> Stored:
    """The tensors that one of transformers' becomes, by transformers' older names, which gguf-py knows."""
    kind = config.model_type
    if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        values = values.view(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
    if kind not in ("llama", "qwen2", "qwen3", "qwen3_moe") and name.endswith("norm.weight"):
        values = values if "linear_attn" in name else values + 1
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        gate, up = values.chunk(2, 1)
        yield from ((f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up))
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", values
    elif "linear_attn" in name:
        yield from convert_delta(name, values, config)
    else:
        yield name, values


def convert_delta(name: str, values: Tensor, config: Any) -> Stored:
    """Qwen3-Next's tensors are taken apart, Qwen 3.5's have their value heads in another order."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    width, values_width = config.linear_key_head_dim, config.linear_value_head_dim
    all_keys = keys * width
    if name.endswith("A_log"):
        values = -values.exp()
    elif name.endswith("dt_bias"):
        name = name.replace("dt_bias", "dt_proj.bias")
    elif "conv1d" in name:
        values = values.squeeze()
    if "in_proj_qkvz" in name:
        group = heads // keys * values_width
        parts = values.view(keys, -1, values.shape[1]).split([width, width, group, group], 1)
        q, k, v, z = (part.reshape(-1, values.shape[1]) for part in parts)
        yield name.replace("qkvz", "qkv"), torch.cat((q, k, v))
        yield name.replace("qkvz", "z"), z
        return
    if config.model_type != "qwen3_next":

        def tiled(part: Tensor, each: int) -> Tensor:
            return part.view(keys, heads // keys, each, -1).transpose(0, 1).reshape(part.shape)

        if "qkv" in name or "conv1d" in name:
            values = torch.cat((values[: 2 * all_keys], tiled(values[2 * all_keys :], values_width)))
        elif "in_proj_z" in name:
            values = tiled(values, values_width)
        elif "out_proj" in name:
            values = tiled(values.t().contiguous(), values_width).t()
        elif "norm" not in name:
            values = tiled(values, 1)
    yield name, values


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_of_the_same_model_computes_the_same(
    case: str, make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    kind, options, most = CASES[case]
    tiny = make_tiny(kind, **options)
    write_gguf(tiny, tmp_path / "tiny.gguf")
    found = computing(tmp_path / "tiny.gguf").in_chunks(IDS, [97] + 20 * [1] + [33])
    assert (found.log_softmax(-1) - tiny.logits(IDS).log_softmax(-1)).abs().max() <= most


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_of_a_gguf_file_may_be_larger_than_its_metadata_say(
    case: str,
    make_tiny: Callable[..., Any],
    unnoticed_sizes: Callable[[Path, int], set[tuple[str, int]]],
    tmp_path: Path,
) -> None:
    kind, options, _ = CASES[case]
    write_gguf(make_tiny(kind, **options), tmp_path / "tiny.gguf", newer=kind == "qwen3_5_moe_text")
    ranks = 1 if "linear_num_key_heads" in options else 2
    assert unnoticed_sizes(tmp_path / "tiny.gguf", ranks) == set()


def test_the_block_that_predicts_further_tokens_is_left_out(
    make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    tiny = make_tiny("qwen3_5_text")
    write_gguf(tiny, tmp_path / "plain.gguf")
    write_gguf(tiny, tmp_path / "more.gguf", mtp=True)
    plain, more = (computing(tmp_path / f"{name}.gguf") for name in ("plain", "more"))
    assert more.shape == plain.shape
    assert torch.equal(more.in_chunks(IDS, [150]), plain.in_chunks(IDS, [150]))


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe_text"])
def test_experts_may_be_stored_in_two_ways(
    kind: str, make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    tiny = make_tiny(kind)
    write_gguf(tiny, tmp_path / "older.gguf")
    write_gguf(tiny, tmp_path / "newer.gguf", newer=True)
    older, newer = (computing(tmp_path / f"{name}.gguf") for name in ("older", "newer"))
    assert (older.shape.experts.stored, newer.shape.experts.stored) == ("stacked", "fused")
    assert torch.equal(older.in_chunks(IDS, [150]), newer.in_chunks(IDS, [150]))


def test_experts_may_be_quantised(make_tiny: Callable[..., Any], computing: Any, tmp_path: Path) -> None:
    """To values that the reference has too."""
    tiny = make_tiny("qwen3_moe", hidden_size=64, moe_intermediate_size=32, norm_topk_prob=True)
    tiny = tiny._replace(model=copy.deepcopy(tiny.model))
    changed = 0.0
    for name, parameter in tiny.model.named_parameters():
        if ".experts." in name:
            quantised = quants.quantize(parameter.numpy(force=True), Q8_0)
            rounded = torch.from_numpy(quants.dequantize(quantised, Q8_0))
            changed += float((parameter.detach() - rounded).abs().max())
            parameter.data.copy_(rounded)
    assert changed > 0.01
    write_gguf(tiny, tmp_path / "tiny.gguf", packed=True)
    found = computing(tmp_path / "tiny.gguf").in_chunks(IDS, [150])
    assert (found.log_softmax(-1) - tiny.logits(IDS).log_softmax(-1)).abs().max() <= 1e-3


def test_frequency_factors_divide_the_frequencies(
    make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    """Factors of 4 for all pairs are positions divided by 4, which transformers calls linear scaling."""
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    tiny = make_tiny("llama", rope_parameters=rope)
    write_gguf(tiny, tmp_path / "tiny.gguf", factors=[4.0] * 4)
    found = computing(tmp_path / "tiny.gguf").in_chunks(IDS, [150])
    assert (found - tiny.logits(IDS)).abs().max() <= 1e-4
