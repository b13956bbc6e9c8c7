"""YaRN: what files say of it and what comes of that, against transformers and llama.cpp's formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from cortex.neuron.models.decoder import frequencies
from cortex.neuron.models.reading import read_shape
from cortex.neuron.models.shape import ModelShape, Rope, YarnScaling
from cortex.neuron.nn.rotary import rotations
from cortex.neuron.weights.checkpoint import Checkpoint
from cortex.neuron.weights.layout import TensorInfo
from cortex.wire.errors import LoadFailed

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
METADATA: dict[str, Any] = {
    "block_count": 2,
    "context_length": 32768,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1000000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def huggingface(rope: dict[str, Any], kind: str = "llama", **config: Any) -> ModelShape:
    said = {"model_type": kind, "rope_scaling": rope, "max_position_embeddings": 32768, **SIZES, **config}
    return read_shape(Checkpoint("safetensors", Path("/m/dir"), kind, {}, config=said))


def gguf(architecture: str = "qwen2", **changes: Any) -> ModelShape:
    said = {**METADATA, **{f"rope.scaling.{key}": value for key, value in changes.items()}}
    metadata = {f"{architecture}.{key}": value for key, value in said.items() if value is not None}
    table = TensorInfo("token_embd.weight", "F32", (100, 64), Path("/m/file"), 0, 0)
    return read_shape(
        Checkpoint("gguf", Path("/m/file"), architecture, {table.name: table}, metadata=metadata)
    )


# --- frequencies and what multiplies them ---------------------------------------------------------


@given(
    width=some.sampled_from([8, 64, 96, 128, 256]),
    part=some.sampled_from([1.0, 0.25, 0.5]),
    theta=some.floats(1.5, 1e8),
    factor=some.floats(0.25, 100),
    original=some.integers(1, 2**20),
    slow=some.floats(1e-3, 4),
    wider=some.floats(1.001, 100),
    truncate=some.booleans(),
    more=some.fixed_dictionaries(
        {},
        optional={
            "attention_factor": some.floats(0.5, 2),
            "mscale": some.sampled_from([0, 0.707, 1.0]),
            "mscale_all_dim": some.sampled_from([0, 0.8, 1.0]),
        },
    ),
)
def test_frequencies_and_attention_are_those_of_transformers_to_the_bit(
    width: int,
    part: float,
    theta: float,
    factor: float,
    original: int,
    slow: float,
    wider: float,
    truncate: bool,
    more: dict[str, float],
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "truncate": truncate}
    rope |= {"original_max_position_embeddings": original, "beta_slow": slow, "beta_fast": slow * wider}
    rope |= {"partial_rotary_factor": part, **more}
    config = LlamaConfig(head_dim=width, rope_parameters=dict(rope), max_position_embeddings=32768)
    expected, attention = ROPE_INIT_FUNCTIONS["yarn"](config)
    shape = huggingface(rope, "llama" if part == 1 else "qwen3_5_text", head_dim=width)
    assert shape.rotary == int(width * part)
    assert torch.equal(frequencies(shape.rope, shape.rotary), expected)
    assert shape.rope.attention == attention


def test_what_is_left_out_is_what_transformers_takes() -> None:
    rope = huggingface({"type": "yarn", "factor": 4.0}).rope
    assert rope.yarn == YarnScaling(4.0, 32768, fast=32.0, slow=1.0, truncate=True)
    assert rope.attention == pytest.approx(0.1 * math.log(4.0) + 1)


def test_cosines_and_sines_are_those_of_transformers_to_the_bit() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = torch.tensor([0, 1, 700, 32768, 131071])
    config = LlamaConfig(head_dim=64, rope_parameters={**YARN, "rope_theta": 1e6})
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions.unsqueeze(0))
    rope = huggingface({**YARN, "rope_theta": 1e6}).rope
    found = rotations(positions, frequencies(rope, 64), rope.attention).squeeze(1)
    assert torch.equal(found.real, cos[0, :, :32])
    assert torch.equal(found.imag, sin[0, :, :32])


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@pytest.mark.parametrize("outside", [None, 64])
@pytest.mark.parametrize("inside", [None, 32])
def test_the_original_context_is_found_where_transformers_finds_it(
    kind: str, outside: int | None, inside: int | None
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    key, rope = "original_max_position_embeddings", {"rope_type": kind, "factor": 4.0}
    rope |= {} if kind == "yarn" else {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {} if inside is None else {key: inside}
    config = {"max_position_embeddings": 256, **({} if outside is None else {key: outside})}
    expected = LlamaRotaryEmbedding(LlamaConfig(**config, head_dim=16, rope_scaling=dict(rope))).inv_freq
    assert torch.equal(frequencies(huggingface(rope, **config).rope, 16), expected)


@pytest.mark.parametrize(
    ("changes", "factor", "attention"),
    [
        ({}, 4.0, 0.1 * math.log(4.0) + 1),
        ({"original_context_length": 8192}, 4.0, 0.1 * math.log(4.0) + 1),
        ({"factor": None}, 1.0, 1.0),
        ({"factor": 0.5}, 0.5, 1.0),
        ({"yarn_beta_fast": 16.0, "yarn_beta_slow": 0.25}, 4.0, 0.1 * math.log(4.0) + 1),
        ({"yarn_ext_factor": 1.0, "yarn_attn_factor": 7.0}, 4.0, 0.1 * math.log(4.0) + 1),
        ({"yarn_ext_factor": -1.0, "attn_factor": 1.5}, 4.0, 1.5 * (0.1 * math.log(4.0) + 1)),
        ({"yarn_log_multiplier": 1.0}, 4.0, 1.0),
        ({"yarn_log_multiplier": 0.5}, 4.0, (0.1 * math.log(4.0) + 1) / (0.05 * math.log(4.0) + 1)),
    ],
)
def test_metadata_mean_what_llama_cpp_computes(
    changes: dict[str, Any], factor: float, attention: float
) -> None:
    """It mixes the two angles of each pair, the earlier ones with more of what is not stretched."""
    width, theta, pairs = 128, METADATA["rope.freq_base"], torch.arange(64, dtype=torch.float64)

    def bound(key: str, turns: float) -> float:
        context = changes.get("original_context_length", 32768)
        return width * math.log(context / (changes.get(key, turns) * 2 * math.pi)) / (2 * math.log(theta))

    low, high = math.floor(bound("yarn_beta_fast", 32.0)), math.ceil(bound("yarn_beta_slow", 1.0))
    mix = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    plain = theta ** -(2 * pairs / width)
    rope = gguf(**changes).rope
    expected = plain / factor * (1 - mix) + plain * mix
    assert torch.allclose(frequencies(rope, width).double(), expected, rtol=1e-6)
    assert rope.attention == pytest.approx(attention)


def test_factors_of_a_gguf_file_count_whatever_the_scaling() -> None:
    """Those of pairs too, which llama.cpp divides angles by before it scales them."""
    table = TensorInfo("token_embd.weight", "F32", (100, 64), Path("/m/file"), 0, 0)
    metadata = {f"gemma3.{key}": value for key, value in METADATA.items()}
    metadata |= {"gemma3.rope.scaling.attn_factor": 1.5, "gemma3.attention.sliding_window": 8}
    for scaling, attention in (("none", 1.5), ("linear", 1.5), ("yarn", 1.5 * (0.1 * math.log(4.0) + 1))):
        said = {**metadata, "gemma3.rope.scaling.type": scaling}
        found = {table.name: table}
        shape = read_shape(Checkpoint("gguf", Path("/m/file"), "gemma3", found, metadata=said))
        assert shape.rope.attention == pytest.approx(attention)
        assert shape.local_rope == Rope(1e4, attention=1.5)
    yarn = Rope(1e6, yarn=YarnScaling(4.0, 32768))
    divided = Rope(1e6, yarn=YarnScaling(4.0, 32768), divisors=(1.0, 2.0, 4.0, 8.0))
    assert torch.equal(frequencies(divided, 8), frequencies(yarn, 8) / torch.tensor([1.0, 2.0, 4.0, 8.0]))


# --- the context ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "stated", "context"),
    [
        (YARN, 32768, 131072),  # Qwen 2.5, as its card says
        (YARN, 40960, 131072),  # Qwen3
        (YARN, 131072, 131072),  # with what it has now
        (YARN, 262144, 262144),
        ({"rope_type": "yarn", "factor": 4.0}, 32768, 131072),
        ({"rope_type": "yarn", "original_max_position_embeddings": 8192}, 32768, 32768),
        ({**YARN, "factor": None}, 131072, 131072),
        ({**YARN, "factor": 0.5}, 32768, 32768),
        ({"rope_type": "linear", "factor": 4.0}, 32768, 32768),
    ],
)
def test_a_context_is_stretched_once(rope: dict[str, Any], stated: int, context: int) -> None:
    assert huggingface(rope, max_position_embeddings=stated).max_position == context


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 131072),
        ({"original_context_length": 8192}, 32768),
        ({"original_context_length": 32768}, 131072),
        ({"type": "linear"}, 32768),
    ],
)
def test_so_is_that_of_a_gguf_file(changes: dict[str, Any], context: int) -> None:
    assert gguf(**changes).max_position == context


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factor": 0}, "factor is 0.0; it must be more than"),
        ({"factor": -4.0}, "factor is -4.0; it must be more than"),
        ({"factor": float("nan")}, "factor is nan, which is no such number"),
        ({"factor": "4"}, "factor is '4'"),
        ({"factor": 1e9}, "factor is 1000000000.0; it must be at most 65536"),
        ({"factor": None, "original_max_position_embeddings": None}, "config.json lacks factor"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0; it must be at le"),
        ({"original_max_position_embeddings": 1.5}, "original_max_position_embeddings is 1.5"),
        ({"beta_fast": 2.0, "beta_slow": 2.0}, "beta_fast is 2.0; it must be more than 2"),
        ({"beta_slow": 40.0}, "beta_fast is 32.0; it must be more than 40"),
        ({"beta_slow": 0}, "beta_slow is 0.0; it must be more than"),
        ({"attention_factor": 0.0}, "attention_factor is 0.0; it must be more than"),
        ({"mscale": -1.0, "mscale_all_dim": 1.0}, "mscale is -1.0; it must be more than 0"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; it must be more than 1"),
        ({"llama_4_scaling_beta": 0.1}, "queries by their position (llama_4_scaling_beta) is not supported"),
        ({"rope_type": "dynamic"}, "'dynamic', whose angles change with the length of the text, is not su"),
        ({"rope_type": "longrope"}, "'longrope', whose angles change with the length of the text, is not s"),
    ],
)
def test_a_bad_number_in_a_configuration_is_refused_by_its_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LoadFailed) as caught:
        huggingface({**YARN, **changes})
    assert said in caught.value.message
    assert "/m/dir" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factor": 0.0}, "qwen2.rope.scaling.factor is 0.0; it must be more than"),
        ({"factor": float("nan")}, "qwen2.rope.scaling.factor is nan"),
        ({"factor": 1e9}, "qwen2.rope.scaling.factor is 1000000000.0; it must be at most 65536"),
        ({"original_context_length": 0}, "qwen2.rope.scaling.original_context_length is 0"),
        ({"attn_factor": 0.0}, "qwen2.rope.scaling.attn_factor is 0.0"),
        ({"yarn_beta_slow": 32.0}, "qwen2.rope.scaling.yarn_beta_fast is 32.0; it must be more than 32"),
        ({"yarn_beta_slow": -1.0}, "qwen2.rope.scaling.yarn_beta_slow is -1.0"),
        ({"yarn_log_multiplier": -1.0}, "qwen2.rope.scaling.yarn_log_multiplier is -1.0"),
        ({"yarn_ext_factor": 0.5}, "a YaRN extrapolation factor of 0.5 is not supported"),
        ({"type": "longrope"}, "'longrope', whose angles change with the length of the text, is not suppor"),
    ],
)
def test_a_bad_number_in_metadata_is_refused_by_its_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LoadFailed) as caught:
        gguf(**changes)
    assert said in caught.value.message
    assert "/m/file" in caught.value.message


def test_a_base_of_1_has_no_pair_that_turns_slower() -> None:
    metadata = {f"llama.{key}": value for key, value in {**METADATA, "rope.freq_base": 1.0}.items()}
    table = TensorInfo("token_embd.weight", "F32", (100, 64), Path("/m/file"), 0, 0)
    with pytest.raises(LoadFailed, match=r"llama\.rope\.freq_base is 1\.0; it must be more than 1"):
        read_shape(Checkpoint("gguf", Path("/m/file"), "llama", {table.name: table}, metadata=metadata))


# --- whole models ---------------------------------------------------------------------------------

IDS = torch.randint(0, 199, (150,), generator=torch.Generator().manual_seed(2)).tolist()
TINY = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_slow": 0.02}
FULL = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rope", "most"),
    [
        ("llama", {**TINY, "beta_fast": 2.0}, 1e-4),
        ("llama", {**TINY, "attention_factor": 0.75, "truncate": False}, 1e-4),
        ("mistral", {**TINY, "mscale": 1.0, "mscale_all_dim": 0.5}, 3e-4),
        ("qwen2", {**TINY, "beta_fast": 2.0}, 1e-4),
        ("qwen3", {**TINY, "beta_fast": 2.0}, 3e-4),
        ("qwen3_moe", {**TINY, "beta_fast": 2.0}, 1e-3),
        ("qwen3_next", {**TINY, "partial_rotary_factor": 0.5}, 1e-3),
        ("qwen3_5_text", {**TINY, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}, 1e-3),
        ("gemma3_text", {"full_attention": FULL, "sliding_attention": {"rope_type": "default"}}, 3e-4),
    ],
)
def test_a_model_with_it_is_that_of_transformers(
    kind: str, rope: dict[str, Any], most: float, make_tiny: Callable[..., Any], computing: Any
) -> None:
    """Five times beyond the original context, in one chunk, in several, and token by token."""
    if kind != "gemma3_text":
        rope = {"rope_theta": 10000.0, **rope}
    tiny = make_tiny(kind, rope_parameters=rope)
    expected = tiny.logits(IDS).log_softmax(-1)
    made = computing(tiny.directory)
    assert made.shape.rope.yarn is not None
    assert made.shape.max_position == 256
    for chunks in ([150], [64, 1, 60] + 25 * [1]):
        found = made.in_chunks(IDS, chunks).log_softmax(-1)
        assert (found - expected).abs().max() <= most
    plain = make_tiny(kind).logits(IDS).log_softmax(-1)
    assert (plain - expected).abs().max() > 0.1, "with another rope it would be another model"
