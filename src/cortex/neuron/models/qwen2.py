"""Qwen 2 and 2.5: a llama with biases at queries, keys and values, and maybe a window in its upper layers.

Says where in a GGUF or Hugging Face checkpoint each parameter comes from; reads no files.
Reference: modeling_qwen2.py of transformers.
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
