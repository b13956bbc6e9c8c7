"""The shape of a checkpoint's model, or a refusal that names what no family here computes.

Knows the two formats by their readers, and no torch.
"""

from __future__ import annotations

from cortex.neuron.models.from_config import shape_from_config
from cortex.neuron.models.from_gguf import shape_from_gguf
from cortex.neuron.models.registry import FAMILIES
from cortex.neuron.models.shape import DeltaShape, ModelShape
from cortex.neuron.weights.checkpoint import Checkpoint
from cortex.neuron.weights.layout import READABLE
from cortex.wire.errors import LoadFailed


def read_shape(checkpoint: Checkpoint) -> ModelShape:
    """Raises LoadFailed: an architecture, rope kind or option that is not supported, or a bad number."""
    if checkpoint.architecture not in FAMILIES:
        raise LoadFailed(
            f"{checkpoint.path} has the architecture {checkpoint.architecture}; "
            f"supported are {', '.join(FAMILIES)}."
        )
    shape = shape_from_gguf(checkpoint) if checkpoint.kind == "gguf" else shape_from_config(checkpoint)
    _check(shape, checkpoint)
    return shape


def _check(shape: ModelShape, checkpoint: Checkpoint) -> None:
    positive = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "max_position")
    for name in positive:
        if getattr(shape, name) < 1:
            raise LoadFailed(f"{checkpoint.path}: {name} is {getattr(shape, name)}; it must be at least 1.")
    if shape.heads % shape.kv_heads:
        raise LoadFailed(f"{checkpoint.path}: {shape.heads} heads cannot share {shape.kv_heads} KV heads.")
    if shape.head_dim % 2 or shape.rotary % 2 or shape.rotary > shape.head_dim:
        raise LoadFailed(
            f"{checkpoint.path}: of a head width of {shape.head_dim}, {shape.rotary} "
            "cannot be rotated in pairs."
        )
    if not shape.attention_layers:
        raise LoadFailed(f"{checkpoint.path}: none of its layers has keys and values; one is needed.")
    if shape.delta is not None:
        _check_delta(shape.delta, checkpoint)
    experts = shape.experts
    if experts is not None and not (0 < experts.active <= experts.count and experts.intermediate > 0):
        raise LoadFailed(
            f"{checkpoint.path}: {experts.active} of {experts.count} experts of {experts.intermediate} "
            "elements cannot be active."
        )
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith(".weight") and tensor.dtype not in READABLE:
            raise LoadFailed(
                f"{tensor.file}: tensor {tensor.name} is stored as {tensor.dtype}; "
                f"{', '.join(READABLE)} can be read."
            )


def _check_delta(sizes: DeltaShape, checkpoint: Checkpoint) -> None:
    for name in ("key_heads", "value_heads", "key_width", "value_width", "kernel"):
        if getattr(sizes, name) < 1:
            raise LoadFailed(
                f"{checkpoint.path}: the delta {name} is {getattr(sizes, name)}; it must be at least 1."
            )
    if sizes.value_heads % sizes.key_heads:
        raise LoadFailed(
            f"{checkpoint.path}: {sizes.value_heads} value heads cannot share {sizes.key_heads} key heads."
        )
