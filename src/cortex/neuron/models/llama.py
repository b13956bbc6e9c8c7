"""The llama family: llama itself, and qwen2, which adds biases to queries, keys and values.

The tree, and where in a GGUF or Hugging Face checkpoint each parameter comes from. Knows no files.
Reference: modeling_llama.py and modeling_qwen2.py of transformers; rotary pairs are interleaved here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from cortex.neuron.models.shape import ModelShape, Rope
from cortex.neuron.nn.attention import Attention, LayerCache
from cortex.neuron.nn.embedding import Embedding
from cortex.neuron.nn.linear import Linear
from cortex.neuron.nn.mlp import GatedMLP
from cortex.neuron.nn.norm import RMSNorm
from cortex.neuron.nn.placement import Placement, Share
from cortex.neuron.nn.rotary import inverse_frequencies, llama3_scaled, rotations
from cortex.neuron.nn.step import Step
from cortex.neuron.weights.source import Piece, Source, whole


class Layer(nn.Module):
    def __init__(self, shape: ModelShape, placement: Placement) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden, shape.norm_eps, placement)
        self.attention = Attention(
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            placement,
            qkv_bias=shape.qkv_bias,
            output_bias=shape.output_bias,
        )
        self.mlp_norm = RMSNorm(shape.hidden, shape.norm_eps, placement)
        self.mlp = GatedMLP(shape.hidden, shape.intermediate, placement, bias=shape.mlp_bias)

    def forward(self, hidden: Tensor, rotation: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotation, step, cache)
        return hidden.add_(self.mlp(self.mlp_norm(hidden)))


class Llama(nn.Module):
    """[T] packed tokens -> fp32 logits [wanted, vocab]."""

    def __init__(self, shape: ModelShape, placement: Placement) -> None:
        super().__init__()
        self._rope = shape.rope
        self._head_dim = shape.head_dim
        self._vocab = shape.vocab
        self._frequencies: Tensor | None = None
        self.embedding = Embedding(shape.vocab, shape.hidden, placement)
        self.layers = nn.ModuleList(Layer(shape, placement) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps, placement)
        shared = shape.tied and not placement.packed
        self.head = None if shared else Linear(shape.hidden, shape.vocab, placement)

    def forward(self, step: Step, caches: Sequence[LayerCache]) -> Tensor:
        if self._frequencies is None:
            self._frequencies = frequencies(self._rope, self._head_dim).to(step.positions.device)
        rotation = rotations(step.positions, self._frequencies)
        hidden: Tensor = self.embedding(step.ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, rotation, step, cache)
        if step.wanted is not None:
            hidden = hidden.index_select(0, step.wanted)
        if not hidden.shape[0]:
            return hidden.new_empty(0, self._vocab)
        hidden = self.norm(hidden)
        logits: Tensor = self.embedding.project(hidden) if self.head is None else self.head(hidden)
        return logits


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    plain = inverse_frequencies(head_dim, rope.theta)
    if rope.llama3 is not None:
        scaling = rope.llama3
        return llama3_scaled(
            plain, scaling.factor, scaling.low_factor, scaling.high_factor, scaling.original_context
        )
    return plain / torch.tensor(rope.divisors) if rope.divisors else plain


def build(shape: ModelShape, placement: Placement) -> Llama:
    return Llama(shape, placement)


class _Names(NamedTuple):
    """How a checkpoint format calls the tensors of this family; `layer` takes the layer's index."""

    embedding: str
    norm: str
    head: str
    layer: str
    attention_norm: str
    qkv: tuple[str, str, str]
    output: str
    mlp_norm: str
    gate_up: tuple[str, str]
    down: str


_HUGGING_FACE: Final = _Names(
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    layer="model.layers.{}.",
    attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate_up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)
_GGUF: Final = _Names(
    embedding="token_embd",
    norm="output_norm",
    head="output",
    layer="blk.{}.",
    attention_norm="attn_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    output="attn_output",
    mlp_norm="ffn_norm",
    gate_up=("ffn_gate", "ffn_up"),
    down="ffn_down",
)


def sources(shape: ModelShape, kind: str, share: Share) -> dict[str, Source]:
    """Of every parameter, in a checkpoint of `kind`. GGUF's llama files have their pairs interleaved.

    A rank has its share of the heads and of the intermediate width; table and head are whole on every rank.
    """
    names = _GGUF if kind == "gguf" else _HUGGING_FACE
    pairs = 0 if kind == "gguf" and shape.architecture == "llama" else shape.head_dim
    found = {
        "embedding.weight": whole(f"{names.embedding}.weight"),
        "norm.weight": whole(f"{names.norm}.weight"),
        "head.weight": whole(f"{names.embedding if shape.tied else names.head}.weight"),
    }
    queries = share.of(shape.heads * shape.head_dim, shape.head_dim)
    keys = share.of(shape.kv_heads * shape.head_dim, shape.head_dim)
    inner = share.of(shape.intermediate)
    for index in range(shape.layers):
        here, there = f"layers.{index}.", names.layer.format(index)
        found[f"{here}attention_norm.weight"] = whole(f"{there}{names.attention_norm}.weight")
        found[f"{here}mlp_norm.weight"] = whole(f"{there}{names.mlp_norm}.weight")
        for part in ("weight", "bias"):
            q, k, v = (f"{there}{name}.{part}" for name in names.qkv)
            gate, up = (f"{there}{name}.{part}" for name in names.gate_up)
            found[f"{here}attention.qkv.{part}"] = (
                Piece(q, *queries, pairs=pairs),
                Piece(k, *keys, pairs=pairs),
                Piece(v, *keys),
            )
            found[f"{here}mlp.gate_up.{part}"] = (Piece(gate, *inner), Piece(up, *inner))
        found[f"{here}attention.output.weight"] = (Piece(f"{there}{names.output}.weight", columns=queries),)
        found[f"{here}mlp.down.weight"] = (Piece(f"{there}{names.down}.weight", columns=inner),)
        found[f"{here}attention.output.bias"] = whole(f"{there}{names.output}.bias")
        found[f"{here}mlp.down.bias"] = whole(f"{there}{names.down}.bias")
    return found
