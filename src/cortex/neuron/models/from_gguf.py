"""The shape of a model from the metadata of a GGUF file, and from which tensors are there.

Keys as in ggml's docs/gguf.md, section Models, and in gguf-py's constants.py. Knows no torch.
"""

from __future__ import annotations

import struct
from typing import Final

from cortex.neuron.models.fields import Fields
from cortex.neuron.models.shape import ModelShape, Rope
from cortex.neuron.weights.checkpoint import Checkpoint
from cortex.wire.errors import LoadFailed

FREQUENCY_FACTORS: Final = "rope_freqs.weight"
"""The tensor in which GGUF files carry Llama 3.1's rope scaling: a divisor for each pair."""


def shape_from_gguf(checkpoint: Checkpoint) -> ModelShape:
    """Raises LoadFailed."""
    fields = Fields(checkpoint.path, checkpoint.metadata, f"{checkpoint.architecture}.", "the metadata")
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
