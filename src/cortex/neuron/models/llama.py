"""The llama family: Llama up to 3.3, SmolLM and SmolLM2, and Mistral, which adds a window to every layer.

Says where in a GGUF or Hugging Face checkpoint each parameter comes from; reads no files.
Reference: modeling_llama.py and modeling_mistral.py of transformers.
"""

from __future__ import annotations

from cortex.neuron.models.decoder import Decoder, dense_layer
from cortex.neuron.models.naming import Layout, Sources, dense_sources
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.nn.placement import Placement, Share


def build(shape: ModelShape, placement: Placement) -> Decoder:
    return Decoder(shape, placement, dense_layer)


def sources(shape: ModelShape, kind: str, share: Share) -> Sources:
    """Of every parameter, in a checkpoint of `kind`. GGUF's llama files have their pairs interleaved."""
    return dense_sources(Layout(shape, kind, share, paired=kind == "gguf"))
