"""The shape of a checkpoint's model, or a refusal that names what no family here computes.

Knows the two formats by their readers, and no torch.
"""

from __future__ import annotations

from typing import Final

from cortex.neuron.models.from_config import shape_from_config
from cortex.neuron.models.from_gguf import shape_from_gguf
from cortex.neuron.models.names import GGUF, hugging_face
from cortex.neuron.models.registry import FAMILIES
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.weights.checkpoint import Checkpoint
from cortex.neuron.weights.scaling import check_readable
from cortex.wire.errors import LoadFailed

MOST_BYTES: Final = 2**53
"""Of weights and one context. Sizes that are possible one by one may be none together."""


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
    """The readers know each number; this is about what they are together."""
    if shape.heads % shape.kv_heads:
        raise LoadFailed(f"{checkpoint.path}: {shape.heads} heads cannot share {shape.kv_heads} KV heads.")
    if shape.head_dim % 2 or shape.rotary % 2 or shape.rotary > shape.head_dim:
        raise LoadFailed(
            f"{checkpoint.path}: of a head width of {shape.head_dim}, {shape.rotary} "
            "cannot be rotated in pairs."
        )
    if not shape.attention_layers:
        raise LoadFailed(f"{checkpoint.path}: none of its layers has keys and values; one is needed.")
    delta, experts = shape.delta, shape.experts
    if delta is not None and delta.value_heads % delta.key_heads:
        raise LoadFailed(
            f"{checkpoint.path}: {delta.value_heads} value heads cannot share {delta.key_heads} key heads."
        )
    if experts is not None and experts.active > experts.count:
        raise LoadFailed(
            f"{checkpoint.path}: {experts.active} of {experts.count} experts cannot be active at a time."
        )
    nbytes = shape.weight_bytes("float32") + shape.max_position * shape.kv_bytes_per_token + shape.state_bytes
    if nbytes > MOST_BYTES:
        raise LoadFailed(f"{checkpoint.path}: with its sizes it takes {nbytes:.3g} bytes; none does.")
    _check_stored(shape, checkpoint)


def _check_stored(shape: ModelShape, checkpoint: Checkpoint) -> None:
    """Whether the model's own tensors can be read; what else there is may be stored as it likes."""
    names = GGUF if checkpoint.kind == "gguf" else hugging_face(shape.prefix)
    before, after = names.layer.split("{}")
    layers = {str(index) for index in range(shape.layers)}
    frame = {f"{name}.weight" for name in (names.embedding, names.norm, names.head)}
    for tensor in checkpoint.tensors.values():
        index = tensor.name.removeprefix(before).partition(after)[0]
        is_ours = tensor.name in frame or (tensor.name.startswith(before) and index in layers)
        if is_ours and tensor.name.endswith((".weight", "_proj")):  # the latter are stacks of experts
            check_readable(tensor)
