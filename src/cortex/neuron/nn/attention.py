"""Grouped-query self-attention over a KV cache, with fused query, key and value projection.

Knows no cache layout: a cache stores what it is given and attends. Holds no request state.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from cortex.neuron.nn.linear import Linear
from cortex.neuron.nn.parallel import sum_over_ranks
from cortex.neuron.nn.placement import Placement
from cortex.neuron.nn.rotary import rotate_
from cortex.neuron.nn.step import Step


class LayerCache(Protocol):
    """Keys and values of one layer, for every sequence."""

    def write(self, step: Step, keys_values: Tensor) -> None:
        """Store fp32 [T, 2, kv_heads, width] in the rows of the step."""

    def attend(self, step: Step, queries: Tensor, keys_values: Tensor) -> Tensor:
        """Causal attention of fp32 [T, heads, width] to all that the step's sequences have stored, of which
        `keys_values` are the step's own: [T, heads * width]."""


class Attention(nn.Module):
    """softmax(Q Kᵀ / sqrt(width)) V (Vaswani et al. 2017), key and value heads shared by groups.

    Of several ranks each has its share of the heads; only the first adds the output's bias.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        width: int,
        placement: Placement,
        *,
        qkv_bias: bool,
        output_bias: bool,
    ) -> None:
        super().__init__()
        self._share = placement.share
        self._heads = placement.share.divide(heads)
        self._kv_heads = placement.share.divide(kv_heads)
        self._all_heads = self._heads + 2 * self._kv_heads
        self._width = width
        self.qkv = Linear(hidden, self._all_heads * width, placement, bias=qkv_bias)
        self.output = Linear(
            self._heads * width, hidden, placement, bias=output_bias and placement.share.rank == 0
        )

    def forward(self, x: Tensor, rotation: Tensor, step: Step, cache: LayerCache) -> Tensor:
        rows = x.shape[0]
        projected = self.qkv(x).view(rows, self._all_heads, self._width)
        rotate_(projected.narrow(1, 0, self._heads + self._kv_heads), rotation)
        keys_values = projected.narrow(1, self._heads, 2 * self._kv_heads)
        keys_values = keys_values.view(rows, 2, self._kv_heads, self._width)
        cache.write(step, keys_values)
        attended = cache.attend(step, projected.narrow(1, 0, self._heads), keys_values)
        return sum_over_ranks(self.output(attended), self._share)
