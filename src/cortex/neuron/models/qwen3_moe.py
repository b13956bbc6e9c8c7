"""Qwen3 with a mixture of experts in all or in some of its layers.

Says where in a GGUF or Hugging Face checkpoint each parameter comes from; reads no files.
Reference: modeling_qwen3_moe.py of transformers.
"""

from __future__ import annotations

from cortex.neuron.models.decoder import Decoder, attention_layer
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.models.sources import Layout, Sources, attention_sources
from cortex.neuron.nn.placement import Placement, Share


def build(shape: ModelShape, placement: Placement) -> Decoder:
    return Decoder(shape, placement, attention_layer)


def sources(shape: ModelShape, kind: str, share: Share) -> Sources:
    """Of every parameter, in a checkpoint of `kind`."""
    return attention_sources(Layout(shape, kind, share))
