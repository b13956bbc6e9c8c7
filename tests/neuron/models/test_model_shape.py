from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cortex.neuron.models import registry
from cortex.neuron.models.reading import read_shape
from cortex.neuron.models.shape import Llama3Scaling, ModelShape, Rope
from cortex.neuron.nn.placement import Share
from cortex.neuron.weights.checkpoint import Checkpoint
from cortex.neuron.weights.layout import TensorInfo
from cortex.wire.errors import LoadFailed

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
}
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50000.0,
}


def tensor(name: str, *shape: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, dtype, shape, Path("/m/file"), 0, 0)


def huggingface(*tensors: TensorInfo, **changes: Any) -> Checkpoint:
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    found = {t.name: t for t in (tensor("lm_head.weight", 1000, 64), *tensors)}
    return Checkpoint("safetensors", Path("/m/dir"), config["model_type"], found, config=config)


def gguf(*tensors: TensorInfo, **changes: Any) -> Checkpoint:
    spelled = {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    metadata = {key: value for key, value in {**METADATA, **spelled}.items() if value is not ...}
    found = {t.name: t for t in (tensor("token_embd.weight", 1000, 64), *tensors)}
    return Checkpoint("gguf", Path("/m/file"), "llama", found, metadata=metadata)


def test_both_formats_give_the_same_shape() -> None:
    shape = read_shape(huggingface())
    assert shape == read_shape(gguf(tensor("output.weight", 1000, 64)))
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (2, 64, 8, 2, 8)
    assert (shape.intermediate, shape.vocab, shape.max_position) == (128, 1000, 512)
    assert (shape.rope, shape.norm_eps, shape.tied) == (Rope(50000.0), 1e-5, False)
    assert (shape.qkv_bias, shape.output_bias, shape.mlp_bias) == (False, False, False)


def test_costs_follow_from_the_shape() -> None:
    shape = read_shape(huggingface())
    matrices = 2 * (64 * (64 + 16 + 16) + 64 * 64 + 3 * 64 * 128) + 2 * 1000 * 64
    vectors = 2 * 2 * 64 + 64
    assert shape.weight_bytes("float32") == 4 * (matrices + vectors)
    assert shape.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    of_layers = matrices - 2 * 1000 * 64
    assert shape.even_context == of_layers / (2 * 2 * 8 * 8), "multiplications of each token with each key"


def test_16_bit_matrices_are_padded_to_512_inputs_and_16_outputs() -> None:
    """Here, where rows are short, FBGEMM's form is the larger one of the two that it may become."""
    shape = read_shape(huggingface())
    layer = 512 * (96 + 64 + 256 + 64)
    expected = 2 * (1000 * 64 + 512 * 1008 + 2 * layer) + 4 * (2 * 2 * 64 + 64)
    assert shape.weight_bytes("packed16") == expected


def test_8_bit_matrices_are_padded_to_512_inputs_and_48_outputs() -> None:
    """24 bytes an output are scales and sums; the head is 1000 outputs, fused qkv 96, gate and up 256."""
    shape = read_shape(huggingface())
    layer = (512 + 24) * (96 + 96 + 288 + 96)
    expected = 2 * 1000 * 64 + (512 + 24) * 1008 + 2 * layer + 4 * (2 * 2 * 64 + 64)
    assert shape.weight_bytes("int8") == expected


def test_16_bits_of_wide_matrices_take_what_two_planes_take() -> None:
    """With whole blocks of inputs, planes and their scales are the larger form."""
    shape = read_shape(huggingface(hidden_size=1024, intermediate_size=2048, head_dim=64))
    pairs = [(1024, 12 * 64), (8 * 64, 1024), (1024, 2 * 2048), (2048, 1024)]
    layer = sum(2 * (inputs + 16) * outputs for inputs, outputs in pairs)
    head = 2 * (1024 + 16) * 1024
    expected = 2 * 1000 * 1024 + head + 2 * layer + 4 * (2 * 2 * 1024 + 1024)
    assert shape.weight_bytes("packed16") == expected


def test_a_tied_table_is_kept_once_in_full_and_twice_packed() -> None:
    tied = read_shape(gguf())
    untied = read_shape(gguf(tensor("output.weight", 1000, 64)))
    assert tied.tied
    assert untied.weight_bytes("float32") - tied.weight_bytes("float32") == 4 * 1000 * 64
    assert untied.weight_bytes("packed16") == tied.weight_bytes("packed16")


def test_biases_are_what_architecture_flags_and_tensors_say() -> None:
    qwen = read_shape(huggingface(model_type="qwen2"))
    assert (qwen.qkv_bias, qwen.output_bias, qwen.mlp_bias) == (True, False, False)
    flagged = read_shape(huggingface(attention_bias=True, mlp_bias=True))
    assert (flagged.qkv_bias, flagged.output_bias, flagged.mlp_bias) == (True, True, True)
    present = read_shape(gguf(tensor("blk.0.attn_q.bias", 64)))
    assert (present.qkv_bias, present.output_bias, present.mlp_bias) == (True, False, False)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "llama3", "rope_theta": 50000.0, **LLAMA3}},
    ],
)
def test_rope_is_read_in_the_old_and_the_new_style(changes: dict[str, Any]) -> None:
    assert read_shape(huggingface(**changes)).rope == Rope(50000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))


def test_a_scaling_in_the_old_style_goes_before_parameters_in_the_new_one() -> None:
    """Model cards tell people to add it, and transformers takes it."""
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}
    both |= {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert read_shape(huggingface(**both)).rope == Rope(50000.0, factor=4.0)
    nested = {
        kind: {"rope_type": "default", "rope_theta": 3.0} for kind in ("full_attention", "sliding_attention")
    }
    both |= {"rope_parameters": nested, "model_type": "gemma3_text", "sliding_window": 8}
    shape = read_shape(huggingface(**both))
    assert (shape.rope, shape.local_rope) == (Rope(3.0, factor=4.0), Rope(3.0))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scale_linear": 4.0}, 4.0),
        ({"rope__scale_linear": 4.0, "rope__scaling__factor": 2.0}, 2.0),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, 1.0),
        ({"rope__scaling__type": "linear"}, 1.0),
    ],
)
def test_a_factor_in_a_gguf_file_scales_linearly_unless_it_says_otherwise(
    changes: dict[str, Any], factor: float
) -> None:
    """As llama.cpp has it; the lone key is that of older converters."""
    assert read_shape(gguf(**changes)).rope == Rope(50000.0, factor=factor)


@pytest.mark.parametrize(
    ("kind", "context"),
    [("llama", 2048), ("mistral", 131072), ("qwen2", 32768), ("qwen3", 32768), ("qwen3_5_text", 32768)],
)
def test_a_context_that_is_left_out_is_the_family_s(kind: str, context: int) -> None:
    sizes = HYBRID if kind == "qwen3_5_text" else {}
    changes = {**sizes, "model_type": kind, "max_position_embeddings": ...}
    assert read_shape(huggingface(**changes)).max_position == context


def test_sizes_of_a_delta_net_that_are_left_out_are_the_family_s() -> None:
    delta = read_shape(huggingface(model_type="qwen3_5_text", num_hidden_layers=4)).delta
    assert delta is not None
    assert (delta.key_heads, delta.value_heads, delta.kernel) == (16, 32, 4)
    assert (delta.key_width, delta.value_width) == (128, 128)


def test_a_scaling_without_the_context_before_it_takes_the_model_s() -> None:
    rope = {**LLAMA3, "rope_type": "llama3", "original_max_position_embeddings": None}
    assert read_shape(huggingface(rope_scaling=rope)).rope.llama3 == Llama3Scaling(8.0, 1.0, 4.0, 512)


def test_silu_has_another_name() -> None:
    assert read_shape(huggingface(hidden_act="swish")).activation == "silu"


HYBRID = {
    "model_type": "qwen3_5_text",
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def test_a_model_whose_layers_all_have_windows_pays_for_no_context() -> None:
    assert read_shape(huggingface(model_type="mistral", sliding_window=8)).even_context == float("inf")


def test_costs_follow_from_the_kinds_of_layers() -> None:
    """Three layers of four have a state instead of keys and values, and matrices of other sizes."""
    shape = read_shape(huggingface(**HYBRID))
    assert shape.kinds == ("delta", "delta", "delta", "full")
    assert (shape.attention_layers, shape.delta_layers) == ((3,), (0, 1, 2))
    assert shape.kv_bytes_per_token == 2 * 2 * 16 * 4
    channels, values = 2 * 2 * 8 + 4 * 12, 4 * 12
    assert shape.state_bytes == 3 * 4 * (channels * 3 + 4 * 8 * 12)
    delta = 64 * (channels + values) + values * 64 + 4 * (2 * 64 + 3) + 4 * channels + 12
    attention = 64 * (2 * 8 + 2 * 2) * 16 + 8 * 16 * 64 + 10 * 16
    rest = 4 * (3 * 64 * 128 + 2 * 64) + 64 + 2 * 1000 * 64
    assert shape.weight_bytes("float32") == 4 * (3 * delta + attention + rest)
    met = 3 * (64 * (channels + values) + values * 64)
    met += 64 * (2 * 8 + 2 * 2) * 16 + 8 * 16 * 64 + 4 * 3 * 64 * 128
    assert shape.even_context == met / (2 * 8 * 16), "one layer of four attends"


def test_experts_cost_each_and_their_router_is_fp32_in_every_form() -> None:
    sizes = {**EXPERTS, "model_type": "qwen3_moe", "head_dim": 8, "mlp_only_layers": [1]}
    shape, dense = read_shape(huggingface(**sizes)), read_shape(huggingface(model_type="qwen3", head_dim=8))
    assert (shape.dense_layers, shape.has_experts(0), shape.has_experts(1)) == ((1,), True, False)
    more = 5 * 3 * 64 * 48 + 5 * 64 - 3 * 64 * 128
    assert shape.weight_bytes("float32") - dense.weight_bytes("float32") == 4 * more
    packed = 5 * (2 * 512 * 96 + 2 * 512 * 64) + 4 * 5 * 64 - (2 * 512 * 256 + 2 * 512 * 64)
    assert shape.weight_bytes("packed16") - dense.weight_bytes("packed16") == packed
    met = 3 * 64 * (2 * 48 - 128)
    assert shape.even_context - dense.even_context == met / (2 * 2 * 8 * 8), "a token meets two of five"


@pytest.mark.parametrize(
    ("changes", "window", "kinds"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, 8, ("sliding", "sliding")),
        ({"model_type": "mistral"}, 4096, ("sliding", "sliding")),
        ({"model_type": "mistral", "sliding_window": None}, None, ()),
        ({"model_type": "llama", "sliding_window": 8}, None, ()),
        ({"model_type": "qwen2", "sliding_window": 8}, None, ()),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, None, ()),
        (
            {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            8,
            ("full", "sliding"),
        ),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, None, ()),
        (
            {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2},
            8,
            ("sliding", "full"),
        ),
        ({"model_type": "gemma3_text", "sliding_window": 8}, 8, ("sliding", "sliding")),
    ],
)
def test_windows_are_where_the_family_uses_them(
    changes: dict[str, Any], window: int | None, kinds: tuple[str, ...]
) -> None:
    shape = read_shape(huggingface(**changes))
    assert (shape.window, shape.kinds) == (window, kinds)


def test_a_part_of_the_head_is_rotated_where_the_family_says_so() -> None:
    """A quarter, unless the file says otherwise, at the top or with the other rope parameters."""
    assert read_shape(huggingface(**HYBRID)).rotary_dim == 4
    assert read_shape(huggingface(**HYBRID, partial_rotary_factor=0.5)).rotary_dim == 8
    parameters = {"rope_theta": 1e7, "partial_rotary_factor": 0.75, "mrope_section": [1, 1, 1]}
    shape = read_shape(huggingface(**HYBRID, rope_parameters=parameters))
    assert (shape.rotary_dim, shape.rope) == (12, Rope(1e7))


def test_of_a_model_that_sees_the_outer_flag_ties_the_head() -> None:
    """And what its text part says of itself does not count."""
    text = {key: value for key, value in {**CONFIG, **HYBRID}.items() if key != "model_type"}

    def read(**config: Any) -> ModelShape:
        whole = {"model_type": "qwen3_5", "text_config": text, **config}
        return read_shape(Checkpoint("safetensors", Path("/m/dir"), "qwen3_5", {}, config=whole))

    assert read(tie_word_embeddings=True).tied
    text["tie_word_embeddings"] = True
    with pytest.raises(LoadFailed, match="ties no embeddings"):
        read(tie_word_embeddings=False)


def test_sparse_files_of_gemma_mean_what_its_configuration_assumes() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {"model_type": "gemma3", "text_config": text}
    shape = read_shape(Checkpoint("safetensors", Path("/m/dir"), "gemma3", {}, config=config))
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) == (8, 4, 256, 262208)
    assert (shape.rope, shape.local_rope) == (Rope(1e6, factor=8.0), Rope(1e4))
    assert (shape.query_scale, shape.tied, shape.kinds.count("full")) == (1 / 16, True, 5)


def other(architecture: str, *tensors: TensorInfo, **changes: Any) -> Checkpoint:
    """A GGUF file like `gguf`'s of another architecture."""
    plain = gguf(tensor("output.weight", 1000, 64), *tensors, **changes)
    metadata = {key.replace("llama.", f"{architecture}."): value for key, value in plain.metadata.items()}
    return Checkpoint("gguf", Path("/m/file"), architecture, plain.tensors, metadata=metadata)


HYBRID_GGUF = {
    "block_count": 4,
    "attention__key_length": 16,
    "ssm__time_step_rank": 4,
    "ssm__group_count": 2,
    "ssm__state_size": 8,
    "ssm__inner_size": 48,
    "ssm__conv_kernel": 4,
}


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(8, [0, 0, 0, 2]), ([8] * 4, [2] * 4), ([0, 0, 0, 8], [2, 0, 2, 2, 2])]
)
def test_sizes_may_come_layer_by_layer(heads: Any, kv_heads: list[int]) -> None:
    """With 0 where a layer has no such thing, and with the blocks that are no part of the model."""
    sizes = {"attention__head_count": heads, "attention__head_count_kv": kv_heads}
    whole = read_shape(other("qwen35", **HYBRID_GGUF))
    assert read_shape(other("qwen35", **HYBRID_GGUF, **sizes, feed_forward_length=[128] * 4)) == whole
    with pytest.raises(LoadFailed, match="not one size that all 1 of 4 layers have"):
        read_shape(other("qwen35", **HYBRID_GGUF, attention__head_count_kv=[2, 2, 2, 0]))


def test_older_files_of_qwen3_next_have_their_projections_in_one_tensor() -> None:
    for joined, name in ((True, "ssm_in"), (False, "attn_qkv")):
        shape = read_shape(other("qwen3next", tensor(f"blk.0.{name}.weight", 1, 64), **HYBRID_GGUF))
        sources = registry.family("qwen3next").sources(shape, "gguf", Share())
        assert sources["layers.0.attention.projection.weight"][0].tensor == f"blk.0.{name}.weight"
        assert shape.delta is not None
        assert (shape.delta.joined_qkvz, shape.delta.joined_ba) == (joined, True)


def test_a_second_rope_is_for_layers_with_a_window_alone() -> None:
    """A Gemma without any has one, as far as the model is concerned, and can be computed with it."""
    changes = {"model_type": "gemma3_text", "sliding_window": 8}
    assert read_shape(huggingface(**changes)).local_rope == Rope(1e4)
    assert read_shape(huggingface(**changes, layer_types=["full_attention"] * 2)).local_rope is None
    assert read_shape(other("gemma3", attention__sliding_window=8)).local_rope == Rope(1e4)
    assert read_shape(other("gemma3")).local_rope is None


def test_tensors_that_no_model_here_uses_may_be_stored_as_they_like() -> None:
    """An eye, and what predicts further tokens."""
    read_shape(huggingface(tensor("mtp.layers.0.mlp.up_proj.weight", 2, 2, dtype="F8_E4M3")))
    read_shape(huggingface(tensor("model.visual.blocks.0.weight", 2, 2, dtype="F8_E4M3")))
    read_shape(gguf(tensor("blk.2.attn_q.weight", 64, 64, dtype="IQ3_XXS")))
    with pytest.raises(LoadFailed, match=r"blk\.1\.attn_q\.weight is stored as IQ3_XXS"):
        read_shape(gguf(tensor("blk.1.attn_q.weight", 64, 64, dtype="IQ3_XXS")))


def test_how_experts_are_stored_is_what_the_model_s_own_layers_say() -> None:
    sizes = {**EXPERTS, "model_type": "qwen3_5_moe_text", "num_hidden_layers": 4, **HYBRID}
    sizes |= {"model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 8}
    fused = "mlp.experts.gate_up_proj"
    for name, stored in (("mtp.layers.0.", "each"), ("model.layers.0.", "fused")):
        experts = read_shape(huggingface(tensor(name + fused, 5, 96, 64), **sizes)).experts
        assert experts is not None
        assert experts.stored == stored


def test_what_is_not_packed_takes_no_more_than_its_numbers() -> None:
    """On CUDA: fp16 with a tied table once; 8 bits and a scale for each output, beside a table of its own."""
    tied = read_shape(gguf())
    matrices = [(64, 96), (64, 64), (64, 256), (128, 64)] * 2
    plain = 1000 * 64 + sum(inputs * outputs for inputs, outputs in matrices)
    vectors = 4 * (2 * 2 * 64 + 64)
    assert tied.weight_bytes("packed16", packs=False) == 2 * plain + vectors
    eight = sum((inputs + 4) * outputs for inputs, outputs in [*matrices, (64, 1000)])
    assert tied.weight_bytes("int8", packs=False) == 2 * 1000 * 64 + eight + vectors
    untied = read_shape(gguf(tensor("output.weight", 1000, 64)))
    assert untied.weight_bytes("packed16", packs=False) == 2 * (plain + 1000 * 64) + vectors


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        (huggingface(model_type="mamba"), "architecture mamba; supported are llama, mistral, "),
        (
            huggingface(rope_scaling={"rope_type": "su"}),
            "the rope type 'su' (default, linear, llama3 and yarn",
        ),
        (huggingface(rope_scaling={"rope_type": "llama3"}), "lacks factor"),
        (huggingface(rope_scaling=3), "rope_scaling in config.json is 3, not an object"),
        (huggingface(partial_rotary_factor=0.5), "a part of the head"),
        (huggingface(**{**HYBRID, "layer_types": ["conv"] * 4}), "the layer type 'conv'"),
        (huggingface(**{**HYBRID, "layer_types": ["full_attention"]}), "one for each of 4 layers"),
        (huggingface(**{**HYBRID, "num_hidden_layers": 3}), "none of its layers has keys"),
        (huggingface(layer_types=["linear_attention", "full_attention"]), "linear attention in llama"),
        (huggingface(**HYBRID, output_gate_type="sigmoid"), "the output gate 'sigmoid'"),
        (huggingface(**{**HYBRID, "linear_num_value_heads": 3}), "3 value heads cannot share 2 key heads"),
        (
            huggingface(**{**HYBRID, "linear_conv_kernel_dim": 0}),
            "conv_kernel_dim is 0; it must be at least 1",
        ),
        (huggingface(**{**EXPERTS, "num_experts_per_tok": 6}, model_type="qwen3_moe"), "6 of 5 experts"),
        (huggingface(model_type="mistral", sliding_window=0), "sliding_window is 0"),
        (huggingface(model_type="gemma3_text", use_bidirectional_attention=True), "bidirectional"),
        (huggingface(hidden_act="gelu"), "the activation 'gelu'"),
        (huggingface(hidden_act=["silu"]), "the activation ['silu']"),
        (huggingface(layer_types=[[], {}]), "the layer type []"),
        (huggingface(hidden_size=-64), "hidden_size is -64; it must be at least 1"),
        (
            huggingface(max_position_embeddings=2**31),
            "max_position_embeddings is 2147483648; it must be at m",
        ),
        (huggingface(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; it must be at most 4096"),
        (huggingface(num_hidden_layers=10**9, layer_types=[]), "num_hidden_layers is 1000000000"),
        (huggingface(num_attention_heads=10**9), "num_attention_heads is 1000000000"),
        (huggingface(**{**EXPERTS, "num_experts": 10**9}, model_type="qwen3_moe"), "num_experts is 10000000"),
        (huggingface(hidden_size=2**30, intermediate_size=2**30), "it takes 5.07e+19 bytes"),
        (huggingface(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
        (huggingface(rope_theta=0), "rope_theta is 0.0; it must be more than 0"),
        (huggingface(rope_scaling={"rope_type": "linear", "factor": 0.0}), "factor is 0.0"),
        (huggingface(model_type="gemma3_text", query_pre_attn_scalar=0), "query_pre_attn_scalar is 0.0"),
        (huggingface(model_type="gemma3_text", final_logit_softcapping=0), "final_logit_softcapping is 0.0"),
        (
            huggingface(model_type="gemma3_text", rope_parameters={"full_attention": 3}),
            "full_attention in the",
        ),
        (gguf(block_count=2**31), "llama.block_count is 2147483648; it must be at most 4096"),
        (gguf(nextn_predict_layers=2), "llama.nextn_predict_layers is 2; it must be at most 1"),
        (gguf(attention__head_count=2**31), "head_count is 2147483648"),
        (gguf(embedding_length=-64), "embedding_length is -64"),
        (gguf(rope__freq_base=float("inf")), "freq_base is inf"),
        (huggingface(hidden_size=...), "config.json lacks hidden_size"),
        (huggingface(hidden_size="64"), "hidden_size is '64'"),
        (huggingface(num_hidden_layers=True), "num_hidden_layers is True"),
        (huggingface(num_hidden_layers=0), "layers is 0"),
        (huggingface(vocab_size=10**400), "which is no such number"),
        (huggingface(num_attention_heads=0), "heads is 0"),
        (huggingface(num_key_value_heads=3), "8 heads cannot share 3 KV heads"),
        (huggingface(head_dim=7), "of a head width of 7, 7 cannot be rotated"),
        (huggingface(tensor("model.norm.weight", 64, dtype="F8_E4M3")), "norm.weight is stored as F8_E4M3"),
        (
            Checkpoint("safetensors", Path("/m/dir"), "llama", {}, config=CONFIG),
            "lacks tensor lm_head.weight",
        ),
        (
            Checkpoint("gguf", Path("/m/file"), "llama", {}, metadata=METADATA),
            "lacks tensor token_embd.weight",
        ),
        (gguf(block_count=...), "the metadata lacks llama.block_count"),
        (gguf(expert_count=8), "a mixture of experts"),
        (gguf(rope__scaling__type="su"), "the rope scaling 'su' (none, linear and yarn are)"),
        (gguf(rope__dimension_count=4), "a part of the head"),
        (gguf(attention__value_length=16), "a value width"),
        (gguf(attention__head_count=[8, 4]), "head_count is [8, 4], not one size that all 2 of 2 layers"),
        (gguf(attention__head_count_kv=[0, 2]), "head_count_kv is [0, 2], not one size"),
        (gguf(feed_forward_length=[128]), "feed_forward_length is [128], not one size"),
        (gguf(feed_forward_length=[[1], "x"]), "feed_forward_length is [[1], 'x'], not one size"),
        (gguf(tensor("rope_freqs.weight", 3)), "rope_freqs.weight is not fp32 of 4 pairs"),
        (gguf(tensor("blk.0.attn_q.weight", 64, 64, dtype="IQ2_XS")), "stored as IQ2_XS"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(checkpoint: Checkpoint, said: str) -> None:
    with pytest.raises(LoadFailed) as caught:
        read_shape(checkpoint)
    assert said in caught.value.message
    assert "/m/" in caught.value.message


def test_sizes_are_read_without_torch() -> None:
    script = "import sys, cortex.neuron.models.reading; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
