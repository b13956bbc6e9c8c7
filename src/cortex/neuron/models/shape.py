"""The sizes of a model, read from GGUF metadata or config.json into one form, and what they cost.

Refuses by name what no family here computes. Knows no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from cortex.neuron.models.registry import FAMILIES
from cortex.neuron.nn.packing import most_bytes
from cortex.neuron.weights.checkpoint import CONFIG, Checkpoint
from cortex.neuron.weights.layout import READABLE
from cortex.wire.errors import LoadFailed

FREQUENCY_FACTORS: Final = "rope_freqs.weight"
"""The tensor in which GGUF files carry Llama 3.1's rope scaling: a divisor for each pair."""

MOST_LAYERS: Final = 4096
"""Thirty times the deepest published model's; every layer is built before its weights are looked for."""
MOST: Final = 2**53
"""No size of a model comes near it, and every number below it is exact as an integer and as a float."""


class Llama3Scaling(msgspec.Struct, frozen=True):
    factor: float
    low_factor: float
    high_factor: float
    original_context: int


class Rope(msgspec.Struct, frozen=True):
    """`divisors` divide the inverse frequencies pair by pair; empty for none."""

    theta: float
    llama3: Llama3Scaling | None = None
    divisors: tuple[float, ...] = ()


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder of the llama kind. Sizes are elements, `max_position` tokens."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position: int
    rope: Rope
    norm_eps: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    def weight_bytes(self, dtype: str) -> int:
        """Most bytes of the loaded weights on one device, `dtype` as in `messages.Load`."""
        table = self.vocab * self.hidden
        if dtype != "float32":
            # Packed matrices cannot be looked up in, so a tied table is there twice.
            matrices = 2 * table + most_bytes(self.hidden, self.vocab, dtype)
            matrices += self.layers * sum(most_bytes(*sizes, dtype) for sizes in self._linears)
        else:
            matrices = 4 * table * (1 if self.tied else 2)
            matrices += 4 * self.layers * sum(inputs * outputs for inputs, outputs in self._linears)
        vectors = 2 * self.hidden
        vectors += self._qkv_rows * self.qkv_bias + self.hidden * self.output_bias
        vectors += (2 * self.intermediate + self.hidden) * self.mlp_bias
        return matrices + 4 * (self.layers * vectors + self.hidden)

    @property
    def _qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def _linears(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a layer's matrices, fused as the model has them."""
        return (
            (self.hidden, self._qkv_rows),
            (self.heads * self.head_dim, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """fp32 keys and values of every layer."""
        return 4 * 2 * self.layers * self.kv_heads * self.head_dim


def read_shape(checkpoint: Checkpoint) -> ModelShape:
    """Raises LoadFailed: an architecture, rope kind or option that is not supported, or a bad number."""
    if checkpoint.architecture not in FAMILIES:
        raise LoadFailed(
            f"{checkpoint.path} has the architecture {checkpoint.architecture}; "
            f"supported are {', '.join(FAMILIES)}."
        )
    shape = _from_gguf(checkpoint) if checkpoint.kind == "gguf" else _from_config(checkpoint)
    _check(shape, checkpoint)
    return shape


def _check(shape: ModelShape, checkpoint: Checkpoint) -> None:
    positive = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "max_position")
    for name in positive:
        if getattr(shape, name) < 1:
            raise LoadFailed(f"{checkpoint.path}: {name} is {getattr(shape, name)}; it must be at least 1.")
    if shape.layers > MOST_LAYERS:
        raise LoadFailed(f"{checkpoint.path}: {shape.layers} layers are more than {MOST_LAYERS}.")
    if shape.heads % shape.kv_heads:
        raise LoadFailed(f"{checkpoint.path}: {shape.heads} heads cannot share {shape.kv_heads} KV heads.")
    if shape.head_dim % 2:
        raise LoadFailed(f"{checkpoint.path}: a head width of {shape.head_dim} is odd.")
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith(".weight") and tensor.dtype not in READABLE:
            raise LoadFailed(
                f"{tensor.file}: tensor {tensor.name} is stored as {tensor.dtype}; "
                f"{', '.join(READABLE)} can be read."
            )


class _Fields:
    """Typed look-ups in a configuration, with errors that name the key."""

    def __init__(self, checkpoint: Checkpoint, values: Mapping[str, Any], prefix: str, where: str) -> None:
        self._path = checkpoint.path
        self._values = values
        self._prefix = prefix
        self._where = where

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._number(key, int, default))

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._number(key, (int, float), default))

    def flag(self, key: str) -> bool:
        return bool(self._values.get(self._prefix + key))

    def __contains__(self, key: str) -> bool:
        return self._values.get(self._prefix + key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(self._prefix + key)
        return default if value is None else value

    def refuse(self, what: str) -> LoadFailed:
        return LoadFailed(f"{self._path}: {what} is not supported.")

    def _number(self, key: str, kind: Any, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise LoadFailed(f"{self._path}: {self._where} lacks {self._prefix}{key}.")
        if isinstance(value, bool) or not isinstance(value, kind) or not abs(value) < MOST:
            raise LoadFailed(f"{self._path}: {self._prefix}{key} is {value!r}, which is no such number.")
        return value


def _from_gguf(checkpoint: Checkpoint) -> ModelShape:
    """Keys as in ggml's docs/gguf.md, section Models."""
    fields = _Fields(checkpoint, checkpoint.metadata, f"{checkpoint.architecture}.", "the metadata")
    tensors = checkpoint.tensors
    heads = fields.integer("attention.head_count")
    hidden = fields.integer("embedding_length")
    width = fields.integer("attention.key_length", hidden // max(1, heads))
    if fields.integer("expert_count", 0):
        raise fields.refuse("a mixture of experts")
    if fields.integer("attention.value_length", width) != width:
        raise fields.refuse("a value width that differs from the key width")
    if fields.integer("rope.dimension_count", width) != width:
        raise fields.refuse("a rotary embedding of a part of the head")
    scaling = fields.get("rope.scaling.type", "none")
    if scaling != "none":
        raise fields.refuse(f"the rope scaling {scaling!r}")
    table = tensors.get("token_embd.weight")
    if table is None:
        raise LoadFailed(f"{checkpoint.path} lacks tensor token_embd.weight.")
    return ModelShape(
        architecture=checkpoint.architecture,
        layers=fields.integer("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=width,
        intermediate=fields.integer("feed_forward_length"),
        vocab=table.shape[0],
        max_position=fields.integer("context_length"),
        rope=Rope(fields.number("rope.freq_base", 10000.0), divisors=_frequency_factors(checkpoint, width)),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
    )


def _frequency_factors(checkpoint: Checkpoint, width: int) -> tuple[float, ...]:
    tensor = checkpoint.tensors.get(FREQUENCY_FACTORS)
    if tensor is None:
        return ()
    if tensor.dtype != "F32" or tensor.shape != (width // 2,):
        raise LoadFailed(f"{checkpoint.path}: tensor {tensor.name} is not fp32 of {width // 2} pairs.")
    return struct.unpack(f"<{width // 2}f", checkpoint.rows(tensor.name, 0, tensor.rows))


def _from_config(checkpoint: Checkpoint) -> ModelShape:
    """Keys as in transformers' LlamaConfig and Qwen2Config, old and new style."""
    fields = _Fields(checkpoint, checkpoint.config, "", CONFIG)
    is_qwen2 = checkpoint.architecture == "qwen2"
    if "quantization_config" in fields:
        method = fields.get("quantization_config")
        name = method.get("quant_method", "unnamed") if isinstance(method, dict) else method
        raise fields.refuse(f"the quantization {name!r}")
    if fields.get("hidden_act", "silu") != "silu":
        raise fields.refuse(f"the activation {fields.get('hidden_act')!r}")
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    tied = "lm_head.weight" not in checkpoint.tensors
    if tied and not fields.flag("tie_word_embeddings"):
        raise LoadFailed(f"{checkpoint.path} lacks tensor lm_head.weight, and {CONFIG} ties no embeddings.")
    longest = fields.integer("max_position_embeddings")
    if fields.flag("use_sliding_window") and "sliding_window" in fields:
        longest = min(longest, fields.integer("sliding_window"))  # up to there no window shows
    return ModelShape(
        architecture=checkpoint.architecture,
        layers=fields.integer("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // max(1, heads)),
        intermediate=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
        max_position=longest,
        rope=_rope(checkpoint, fields),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied=tied,
        qkv_bias=is_qwen2 or fields.flag("attention_bias"),
        output_bias=not is_qwen2 and fields.flag("attention_bias"),
        mlp_bias=not is_qwen2 and fields.flag("mlp_bias"),
    )


def _rope(checkpoint: Checkpoint, fields: _Fields) -> Rope:
    plain = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(plain, dict):
        raise LoadFailed(f"{checkpoint.path}: the rope parameters in {CONFIG} are {plain!r}, not an object.")
    theta = plain.get("rope_theta", fields.get("rope_theta", 10000.0))
    rope = _Fields(checkpoint, {**plain, "rope_theta": theta}, "", f"the rope parameters of {CONFIG}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise fields.refuse("a rotary embedding of a part of the head")
    if kind == "default":
        return Rope(rope.number("rope_theta"))
    if kind != "llama3":
        raise fields.refuse(f"the rope type {kind!r} (default and llama3 are)")
    return Rope(
        rope.number("rope_theta"),
        Llama3Scaling(
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.integer("original_max_position_embeddings"),
        ),
    )
