"""Gated DeltaNet: linear attention whose state is a memory that each token decays, corrects and reads.

Where attention has a cache of keys and values, it has a state of fixed size for each sequence. Knows no
scheduler: which rows of a step are whose, and in which slots the states lie, the step says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.conv import CausalConv
from cortex.neuron.nn.delta_rule import Heads, recur, scan
from cortex.neuron.nn.linear import Linear
from cortex.neuron.nn.parallel import sum_over_ranks
from cortex.neuron.nn.placement import Placement, empty, placed
from cortex.neuron.nn.step import Asked, Step, chosen


class LayerState(Protocol):
    """The states of one layer, fp32, a slot for each sequence. A sequence starts with zeros."""

    @property
    def conv(self) -> Tensor:
        """The convolution's last inputs, oldest first: [slots, channels, kernel - 1]."""

    @property
    def memory(self) -> Tensor:
        """[slots, value_heads, key_width, value_width]."""


class Gates(nn.Module):
    """beta = sigmoid(b), how much of a value is taken over, and log_decay = a softplus(alpha + dt_bias), with
    b|alpha a projection of x and a = -exp(A_log): [T, hidden] -> twice [T, heads].

    All of it stays fp32 whatever form matrices have: it is small, and its errors pile up in the state.
    """

    def __init__(self, hidden: int, heads: int, placement: Placement) -> None:
        super().__init__()
        self._placement = placement
        self._heads = heads
        self._bias: Tensor | None = None
        self.weight = empty(2 * heads, hidden)
        self.a = empty(heads)
        self.dt_bias = empty(heads)
        self.nbytes = 4 * heads * (2 * hidden + 3)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight, self.a, self.dt_bias = (
            placed(tensors[name], self._placement) for name in ("weight", "a", "dt_bias")
        )
        self._bias = torch.cat((torch.zeros_like(self.dt_bias), self.dt_bias))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, alpha = torch.split(F.linear(x, self.weight, self._bias), self._heads, 1)
        return b.sigmoid(), F.softplus(alpha).mul_(self.a)


class GatedNorm(nn.Module):
    """silu(gate) * w * x / sqrt(mean(x²) + eps) over each head, fp32: [T, heads, width], gate and result
    [T, heads * width].
    """

    def __init__(self, width: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self._placement = placement
        self._width = width
        self._eps = eps
        self.weight = empty(width)
        self.nbytes = 4 * width

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight = placed(tensors["weight"], self._placement)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        normal = F.rms_norm(x, (self._width,), self.weight, self._eps)
        return F.silu(gate).mul_(normal.flatten(1))


class GatedDeltaNet(nn.Module):
    """Yang, Kautz and Hatamizadeh 2024, as in Qwen3-Next and Qwen3.5: [T, hidden] -> [T, hidden].

    The projection gives q|k|v|z; q|k|v go through the convolution, z gates the normalised outcome. Of
    several ranks each has its share of the key heads and of the value heads that go with them.
    """

    def __init__(
        self,
        hidden: int,
        placement: Placement,
        *,
        key_heads: int,
        value_heads: int,
        key_width: int,
        value_width: int,
        kernel: int,
        tiled: bool,
        eps: float,
    ) -> None:
        super().__init__()
        share = self._share = placement.share
        self._key_heads, self._value_heads = share.divide(key_heads), share.divide(value_heads)
        groups = value_heads // key_heads
        self._heads = Heads(self._key_heads, groups, tiled)
        self._key_width, self._value_width = key_width, value_width
        self._keys, self._values = self._key_heads * key_width, self._value_heads * value_width
        channels = self._channels = 2 * self._keys + self._values
        self.projection = Linear(hidden, channels + self._values, placement)
        self.gates = Gates(hidden, self._value_heads, placement)
        self.conv = CausalConv(channels, kernel, placement)
        # Queries are to be divided by the root of their width, and the outcome is linear in them: the norm
        # takes that out again, but for its eps.
        self.norm = GatedNorm(value_width, eps * key_width, placement)
        blocks = groups if tiled and share.world > 1 else 1
        self.output = OutputLinear(self._values, hidden, placement, blocks)

    def forward(self, x: Tensor, step: Step, state: LayerState, asked: Asked | None = None) -> Tensor:
        """[T, hidden] -> [T, hidden], or [asked, hidden]; the states have seen all then."""
        states = step.states
        assert states is not None
        projected = self.projection(x)
        mixed, gate = torch.split(projected, [self._channels, self._values], 1)
        beta, log_decay = self.gates(x)
        if states.in_order and states.rows is not None and not states.spans:
            found = self._rows(mixed, beta, log_decay, state, states.slots)
        elif states.rows is None and len(states.spans) == 1:
            found = self._span(mixed, beta, log_decay, state, states.spans[0].slot)
        else:
            found = x.new_empty(x.shape[0], self._value_heads, self._value_width)
            if states.rows is not None:
                own_mixed, *own_gates = (x.index_select(0, states.rows) for x in (mixed, beta, log_decay))
                read = self._rows(own_mixed, own_gates[0], own_gates[1], state, states.slots)
                found.index_copy_(0, states.rows, read)
            for span in states.spans:
                own_mixed, *own_gates = (
                    x.narrow(0, span.first, span.last - span.first) for x in (mixed, beta, log_decay)
                )
                read = self._span(own_mixed, own_gates[0], own_gates[1], state, span.slot)
                found.narrow(0, span.first, span.last - span.first).copy_(read)
        if asked is not None:
            if asked.step is None:
                return x.new_empty(0, x.shape[1])
            found, gate = chosen(found, asked), chosen(gate, asked)
        return sum_over_ranks(self.output(self.norm(found, gate)), self._share)

    def _rows(
        self, mixed: Tensor, beta: Tensor, log_decay: Tensor, state: LayerState, slots: Tensor | None
    ) -> Tensor:
        assert slots is not None
        queries_keys, values = self._split(self.conv.rows(mixed, state.conv, slots))
        return recur(self._heads, queries_keys, values, beta, log_decay, state.memory, slots)

    def _span(self, mixed: Tensor, beta: Tensor, log_decay: Tensor, state: LayerState, slot: int) -> Tensor:
        queries_keys, values = self._split(self.conv.span(mixed, state.conv.select(0, slot)))
        return scan(self._heads, queries_keys, values, beta, log_decay, state.memory.select(0, slot))

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """[T, channels] -> [T, 2, key_heads, key_width] and [T, value_heads, value_width]."""
        rows = mixed.shape[0]
        queries_keys, values = torch.split(mixed, [2 * self._keys, self._values], 1)
        return (
            queries_keys.view(rows, 2, self._key_heads, self._key_width),
            values.view(rows, self._value_heads, self._value_width),
        )


class OutputLinear(Linear):
    """A linear layer whose weight may come in several blocks of columns, one below the other: pieces of
    tensors are joined by their rows, and a rank's value heads need not lie together (see `Heads.tiled`).
    """

    def __init__(self, inputs: int, outputs: int, placement: Placement, blocks: int) -> None:
        super().__init__(inputs, outputs, placement)
        self._blocks = blocks
        if blocks > 1 and self.weight is not None:
            self.weight = empty(blocks * outputs, inputs // blocks, dtype=self.weight.dtype)
            # As it is read and as it is joined; what packing takes then is less than the former.
            self.staged = 2 * self.weight.nbytes

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        if self._blocks > 1:
            tensors = {"weight": torch.cat(tensors["weight"].chunk(self._blocks), 1)}
        super().fill(tensors)
