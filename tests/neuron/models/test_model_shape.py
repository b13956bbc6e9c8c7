from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cortex.neuron.models.shape import Llama3Scaling, Rope, read_shape
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


def test_16_bit_matrices_are_padded_to_512_inputs_and_16_outputs() -> None:
    """Here, where rows are short, FBGEMM's form is the larger one of the two that it may become."""
    shape = read_shape(huggingface())
    layer = 512 * (96 + 64 + 256 + 64)
    expected = 2 * (1000 * 64 + 512 * 1008 + 2 * layer) + 4 * (2 * 2 * 64 + 64)
    assert shape.weight_bytes("packed16") == expected


def test_8_bit_matrices_are_padded_to_64_inputs_and_outputs() -> None:
    """16 bytes an output are scales and sums; the head is 1000 outputs, fused qkv 96, gate and up 256."""
    shape = read_shape(huggingface())
    layer = (64 + 16) * (128 + 64 + 256) + (128 + 16) * 64
    expected = 2 * 1000 * 64 + (64 + 16) * 1024 + 2 * layer + 4 * (2 * 2 * 64 + 64)
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


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        (huggingface(model_type="mamba"), "architecture mamba; supported are llama, qwen2"),
        (huggingface(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "the rope type 'yarn'"),
        (huggingface(rope_scaling={"rope_type": "llama3"}), "lacks factor"),
        (huggingface(rope_scaling=3), "are 3, not an object"),
        (huggingface(partial_rotary_factor=0.5), "a part of the head"),
        (huggingface(quantization_config={"quant_method": "awq"}), "the quantization 'awq'"),
        (huggingface(hidden_act="gelu"), "the activation 'gelu'"),
        (huggingface(hidden_size=...), "config.json lacks hidden_size"),
        (huggingface(hidden_size="64"), "hidden_size is '64'"),
        (huggingface(num_hidden_layers=True), "num_hidden_layers is True"),
        (huggingface(num_hidden_layers=0), "layers is 0"),
        (huggingface(num_hidden_layers=2**31), "2147483648 layers are more than 4096"),
        (huggingface(vocab_size=10**400), "which is no such number"),
        (huggingface(rms_norm_eps=float("nan")), "rms_norm_eps is nan, which is no such number"),
        (huggingface(num_attention_heads=0), "heads is 0"),
        (huggingface(num_key_value_heads=3), "8 heads cannot share 3 KV heads"),
        (huggingface(head_dim=7), "head width of 7 is odd"),
        (huggingface(tensor("x.weight", 2, 2, dtype="F8_E4M3")), "tensor x.weight is stored as F8_E4M3"),
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
        (gguf(rope__scaling__type="yarn"), "the rope scaling 'yarn'"),
        (gguf(rope__dimension_count=4), "a part of the head"),
        (gguf(attention__value_length=16), "a value width"),
        (gguf(attention__head_count=[8, 8]), "head_count is [8, 8]"),
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
    script = "import sys, cortex.neuron.models.shape; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
