"""Gemma 3, text: most layers see a window only, with a rope of their own; what blocks give is normalised too.

Norms are stored around zero. Says where in a GGUF or Hugging Face checkpoint each parameter comes from; reads
no files. Reference: modeling_gemma3.py of transformers.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from cortex.neuron.models.decoder import Decoder, attention, mlp
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.models.sources import Layout, Sources
from cortex.neuron.nn.norm import RMSNorm
from cortex.neuron.nn.placement import Placement, Share
from cortex.neuron.nn.step import Asked, Step, chosen


class Layer(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, shape: ModelShape, placement: Placement, index: int) -> None:
        super().__init__()
        norms = (RMSNorm(shape.hidden, shape.norm_eps, placement) for _ in range(4))
        self.attention_norm, self.attended_norm, self.mlp_norm, self.result_norm = norms
        self.attention = attention(shape, placement)
        self.mlp = mlp(shape, placement, index)

    def forward(
        self, hidden: Tensor, rotation: Tensor, step: Step, cache: Any, asked: Asked | None = None
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], or [asked, hidden]."""
        attended: Tensor = self.attention(self.attention_norm(hidden), rotation, step, cache, asked)
        if not attended.shape[0]:
            return attended
        hidden = chosen(hidden, asked) + self.attended_norm(attended)
        return hidden.add_(self.result_norm(self.mlp(self.mlp_norm(hidden))))


class _Norms(NamedTuple):
    attention: str
    attended: str
    mlp: str
    result: str


_HUGGING_FACE: Final = _Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_GGUF: Final = _Norms("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")


def build(shape: ModelShape, placement: Placement) -> Decoder:
    return Decoder(shape, placement, Layer)


def sources(shape: ModelShape, kind: str, share: Share) -> Sources:
    """Of every parameter, in a checkpoint of `kind`."""
    layout = Layout(shape, kind, share, zero_centred=True)
    norms = _GGUF if layout.is_gguf else _HUGGING_FACE
    found = layout.frame()
    for index in range(shape.layers):
        found |= layout.attention(index) | layout.mlp(index)
        for name, tensor in zip(norms._fields, norms, strict=True):
            found[f"layers.{index}.{name}_norm.weight"] = layout.norm(layout.layer(index) + tensor)
    return found
