"""What families have in common that mix layers of attention with layers of Gated DeltaNet.

Norms are stored around zero, but for the one inside a DeltaNet. Knows no files.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cortex.neuron.models.decoder import PreNormLayer, attention_layer, mlp
from cortex.neuron.models.delta_sources import delta_sources
from cortex.neuron.models.shape import DeltaShape, ModelShape
from cortex.neuron.models.sources import Layout, Sources
from cortex.neuron.nn.delta import GatedDeltaNet
from cortex.neuron.nn.placement import Placement, Share
from cortex.neuron.nn.step import Asked, Step


class DeltaLayer(PreNormLayer):
    """With a state instead of a cache, and no rotations."""

    def attend(self, x: Tensor, rotation: Tensor, step: Step, cache: Any, asked: Asked | None) -> Tensor:
        attended: Tensor = self.attention(x, step, cache, asked)
        return attended


def hybrid_layer(shape: ModelShape, placement: Placement, index: int) -> PreNormLayer:
    """Of the kind that the shape has at this index."""
    if shape.delta is None or shape.kind(index) != "delta":
        return attention_layer(shape, placement, index)
    return DeltaLayer(
        shape, placement, _delta_net(shape, shape.delta, placement), mlp(shape, placement, index)
    )


def _delta_net(shape: ModelShape, sizes: DeltaShape, placement: Placement) -> GatedDeltaNet:
    return GatedDeltaNet(
        shape.hidden,
        placement,
        key_heads=sizes.key_heads,
        value_heads=sizes.value_heads,
        key_width=sizes.key_width,
        value_width=sizes.value_width,
        kernel=sizes.kernel,
        tiled=sizes.tiled,
        eps=shape.norm_eps,
    )


def hybrid_sources(shape: ModelShape, kind: str, share: Share) -> Sources:
    """Of every parameter of a `Decoder` of hybrid layers."""
    layout = Layout(shape, kind, share, zero_centred=True)
    found = layout.frame()
    for index in range(shape.layers):
        here, there = f"layers.{index}.", layout.layer(index)
        found |= layout.pre_norms(index) | layout.mlp(index)
        if layout.is_gguf:
            found[f"{here}mlp_norm.weight"] = layout.norm(f"{there}post_attention_norm")
        if shape.delta is None or shape.kind(index) != "delta":
            found |= layout.attention(index)
            continue
        prefix = there if layout.is_gguf else f"{there}linear_attn."
        delta = delta_sources(prefix, kind, shape.delta, share)
        found |= {f"{here}attention.{name}": source for name, source in delta.items()}
    return found
