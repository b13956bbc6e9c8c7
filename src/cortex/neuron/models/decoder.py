"""What all families have in common: token table, layers, norm, head, and the layer that most of them share.

A family says which layers there are. Knows no files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cortex.neuron.models.shape import ModelShape, Rope
from cortex.neuron.nn.attention import Attention, AttentionSizes
from cortex.neuron.nn.embedding import Embedding, Head
from cortex.neuron.nn.mlp import GatedMLP
from cortex.neuron.nn.moe import Experts, ExpertSizes
from cortex.neuron.nn.norm import RMSNorm
from cortex.neuron.nn.placement import Placement
from cortex.neuron.nn.rotary import inverse_frequencies, llama3_scaled, rotations, yarn_frequencies
from cortex.neuron.nn.step import Asked, Step, chosen


@dataclass(slots=True)
class Pass:
    """A step on its way through the layers: hidden [T, hidden], and how many layers are behind it."""

    step: Step
    rotations: list[Tensor]
    """Those of each layer's rope."""
    hidden: Tensor
    passed: int = 0


class Decoder(nn.Module):
    """[T] packed tokens -> fp32 logits [wanted, vocab], at once or some layers at a time.

    `layer` makes the layer of an index: called with hidden [T, hidden], the rotations of its heads, the step
    and its cache, it gives the next hidden; the last one, called with the rows that are asked for besides,
    gives only those.
    """

    def __init__(
        self,
        shape: ModelShape,
        placement: Placement,
        layer: Callable[[ModelShape, Placement, int], nn.Module],
    ) -> None:
        super().__init__()
        self._shape = shape
        self._local = [shape.local_rope is not None and kind == "sliding" for kind in shape.kinds]
        self._frequencies: list[tuple[Tensor, float]] = []
        self.embedding = Embedding(shape.vocab, shape.hidden, placement)
        self.layers = nn.ModuleList(layer(shape, placement, index) for index in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps, placement)
        shared = shape.tied and not (placement.packed or placement.quantised)
        self.head = None if shared else Head(shape.hidden, shape.vocab, placement)

    def forward(self, step: Step, caches: Sequence[Any]) -> Tensor:
        """`caches` has the KV cache of each layer, or the state of one that has a state."""
        way = self.begin(step)
        self.advance(way, caches, self._shape.layers)
        return self.end(way)

    def begin(self, step: Step) -> Pass:
        """Before the first layer."""
        hidden: Tensor = self.embedding(step.ids)
        if self._shape.embedding_scale is not None:
            hidden.mul_(self._shape.embedding_scale)
        return Pass(step, self._rotations(step), hidden)

    def advance(self, way: Pass, caches: Sequence[Any], layers: int) -> None:
        """Through the next so many layers, of those that are left."""
        end = min(way.passed + layers, self._shape.layers)
        every = zip(self.layers, way.rotations, caches, strict=True)
        for layer, rotation, cache in itertools.islice(every, way.passed, end):
            way.passed += 1
            asked = way.step.asked if way.passed == self._shape.layers else None
            way.hidden = layer(way.hidden, rotation, way.step, cache, asked)

    def end(self, way: Pass) -> Tensor:
        """After the last layer: fp32 logits [wanted, vocab]."""
        hidden = way.hidden
        if not hidden.shape[0]:
            return hidden.new_empty(0, self._shape.vocab)
        hidden = self.norm(hidden)
        logits: Tensor = self.embedding.project(hidden) if self.head is None else self.head(hidden)
        cap = self._shape.logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _rotations(self, step: Step) -> list[Tensor]:
        """For each layer, those of its rope."""
        shape = self._shape
        if not self._frequencies:
            ropes = [shape.rope] if shape.local_rope is None else [shape.rope, shape.local_rope]
            device = step.positions.device
            self._frequencies = [
                (frequencies(rope, shape.rotary).to(device), rope.attention) for rope in ropes
            ]
        every = [rotations(step.positions, *of_rope) for of_rope in self._frequencies]
        if len(every) == 1:
            return every * shape.layers
        return [every[local] for local in self._local]


def frequencies(rope: Rope, width: int) -> Tensor:
    """Radians a token for each pair of the `width` rotated elements of a head."""
    if rope.yarn is not None:
        yarn = rope.yarn
        plain = yarn_frequencies(
            width, rope.theta, yarn.factor, yarn.original_context, yarn.fast, yarn.slow, yarn.truncate
        )
    else:
        plain = inverse_frequencies(width, rope.theta) / rope.factor
    if rope.llama3 is not None:
        scaling = rope.llama3
        return llama3_scaled(
            plain, scaling.factor, scaling.low_factor, scaling.high_factor, scaling.original_context
        )
    return plain / torch.tensor(rope.divisors) if rope.divisors else plain


class PreNormLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the layer of Llama and its descendants."""

    def __init__(self, shape: ModelShape, placement: Placement, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden, shape.norm_eps, placement)
        self.attention = attention
        self.mlp_norm = RMSNorm(shape.hidden, shape.norm_eps, placement)
        self.mlp = mlp

    def forward(
        self, hidden: Tensor, rotation: Tensor, step: Step, cache: Any, asked: Asked | None = None
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], or [asked, hidden]."""
        attended = self.attend(self.attention_norm(hidden), rotation, step, cache, asked)
        if not attended.shape[0]:
            return attended
        hidden = chosen(hidden, asked) + attended
        return hidden.add_(self.mlp(self.mlp_norm(hidden)))

    def attend(self, x: Tensor, rotation: Tensor, step: Step, cache: Any, asked: Asked | None) -> Tensor:
        attended: Tensor = self.attention(x, rotation, step, cache, asked)
        return attended


def attention_layer(shape: ModelShape, placement: Placement, index: int) -> PreNormLayer:
    """With attention, and with experts where the layer has them."""
    return PreNormLayer(shape, placement, attention(shape, placement), mlp(shape, placement, index))


def attention(shape: ModelShape, placement: Placement) -> Attention:
    sizes = AttentionSizes(
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        width=shape.head_dim,
        rotary=shape.rotary,
        qkv_bias=shape.qkv_bias,
        output_bias=shape.output_bias,
        norm_eps=shape.norm_eps if shape.qk_norm else None,
        gated=shape.gated,
        scale=shape.query_scale,
    )
    return Attention(sizes, placement)


def mlp(shape: ModelShape, placement: Placement, index: int) -> GatedMLP | Experts:
    """Of the layer with this index."""
    experts = shape.experts
    if experts is None or not shape.has_experts(index):
        return GatedMLP(
            shape.hidden, shape.intermediate, placement, bias=shape.mlp_bias, activation=shape.activation
        )
    sizes = ExpertSizes(
        hidden=shape.hidden,
        experts=experts.count,
        active=experts.active,
        intermediate=experts.intermediate,
        normalised=experts.normalised,
        shared=experts.shared_intermediate,
        flat_gate=experts.flat_gate,
    )
    return Experts(sizes, placement)
