"""Grouped-query self-attention over a KV cache, with fused query, key and value projection.

Knows no cache layout: a cache stores what it is given and attends. Holds no request state.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cortex.neuron.nn.linear import Linear
from cortex.neuron.nn.norm import HeadNorm
from cortex.neuron.nn.parallel import sum_over_ranks
from cortex.neuron.nn.placement import Placement
from cortex.neuron.nn.rotary import rotate_
from cortex.neuron.nn.step import Asked, Step, chosen


class LayerCache(Protocol):
    """Keys and values of one layer, for every sequence."""

    def write(self, step: Step, keys_values: Tensor) -> None:
        """Store fp32 [T, 2, kv_heads, width] in the rows of the step."""

    def attend(self, step: Step, queries: Tensor, keys_values: Tensor) -> Tensor:
        """Causal attention of fp32 [T, heads, width] to all that the step's sequences have stored, of which
        `keys_values` are the step's own: [T, heads * width]."""


class AttentionSizes(NamedTuple):
    """`rotary` elements of each head's `width` are rotated. With `norm_eps` every head of queries and keys is
    normalised before that. `gated`: the sigmoid of a gate as wide as the queries multiplies the output.
    `scale` stands for 1 / sqrt(width) if it is not None.
    """

    hidden: int
    heads: int
    kv_heads: int
    width: int
    rotary: int
    qkv_bias: bool = False
    output_bias: bool = False
    norm_eps: float | None = None
    gated: bool = False
    scale: float | None = None


class Attention(nn.Module):
    """softmax(Q Kᵀ / sqrt(width)) V (Vaswani et al. 2017), key and value heads shared by groups.

    The projection's rows are heads of queries, keys, values, and gates if there are any. Of several ranks
    each has its share of the heads; only the first adds the output's bias.
    """

    def __init__(self, sizes: AttentionSizes, placement: Placement) -> None:
        super().__init__()
        self._share = placement.share
        self._heads = placement.share.divide(sizes.heads)
        self._kv_heads = placement.share.divide(sizes.kv_heads)
        self._gates = self._heads if sizes.gated else 0
        self._all_heads = self._heads + 2 * self._kv_heads + self._gates
        self._width = sizes.width
        # Caches divide by sqrt(width).
        self._factor = 1.0 if sizes.scale is None else sizes.scale * math.sqrt(sizes.width)
        has_bias = sizes.output_bias and placement.share.rank == 0
        self.qkv = Linear(sizes.hidden, self._all_heads * sizes.width, placement, bias=sizes.qkv_bias)
        self.output = Linear(self._heads * sizes.width, sizes.hidden, placement, bias=has_bias)
        self.norm = (
            None
            if sizes.norm_eps is None
            else HeadNorm(self._heads, self._kv_heads, sizes.width, sizes.norm_eps, placement)
        )

    def forward(
        self, x: Tensor, rotation: Tensor, step: Step, cache: LayerCache, asked: Asked | None = None
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], or [asked, hidden]; the cache has keys and values of all then."""
        projected = self.qkv(x).view(x.shape[0], self._all_heads, self._width)
        queries_keys = projected.narrow(1, 0, self._heads + self._kv_heads)
        if self.norm is not None:
            self.norm.normalize_(queries_keys)
        rotate_(queries_keys, rotation)
        keys_values = self._keys_values(projected)
        cache.write(step, keys_values)
        if asked is not None:
            if asked.step is None:
                return x.new_empty(0, x.shape[1])
            step, projected = asked.step, chosen(projected, asked)
            keys_values = self._keys_values(projected)
        queries = projected.narrow(1, 0, self._heads)
        if self._factor != 1.0:
            queries.mul_(self._factor)
        attended = cache.attend(step, queries, keys_values)
        if self._gates:
            gates = projected.narrow(1, self._all_heads - self._gates, self._gates)
            attended = attended.mul_(torch.sigmoid(gates).flatten(1))
        return sum_over_ranks(self.output(attended), self._share)

    def _keys_values(self, projected: Tensor) -> Tensor:
        """[T, 2, kv_heads, width]."""
        both = projected.narrow(1, self._heads, 2 * self._kv_heads)
        return both.view(-1, 2, self._kv_heads, self._width)
