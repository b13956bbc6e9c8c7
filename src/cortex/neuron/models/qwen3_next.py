"""Qwen3-Next: Gated DeltaNet with gated attention at every fourth layer, and experts with a shared one.

Says where in a GGUF or Hugging Face checkpoint each parameter comes from; reads no files.
Reference: modeling_qwen3_next.py of transformers.
"""

from __future__ import annotations

from cortex.neuron.models.decoder import Decoder
from cortex.neuron.models.hybrid import hybrid_layer, hybrid_sources
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.models.sources import Sources
from cortex.neuron.nn.placement import Placement, Share


def build(shape: ModelShape, placement: Placement) -> Decoder:
    return Decoder(shape, placement, hybrid_layer)


def sources(shape: ModelShape, kind: str, share: Share) -> Sources:
    """Of every parameter, in a checkpoint of `kind`."""
    return hybrid_sources(shape, kind, share)
