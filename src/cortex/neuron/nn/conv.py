"""A causal depthwise convolution over time, carried on from step to step. Knows nothing of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.placement import Placement, empty, placed

BLOCK: Final = 64
"""Tokens that are convolved together: few enough for the caches, enough to hide the calls."""


class CausalConv(nn.Module):
    """y[t] = silu(Σ_j w[j] x[t - kernel + 1 + j]) of each channel, fp32; x before the step is the `past`:
    the last kernel - 1 inputs, oldest first, which change in place.
    """

    def __init__(self, channels: int, kernel: int, placement: Placement) -> None:
        super().__init__()
        self._placement = placement
        self._kernel = kernel
        self.weight = empty(channels, kernel)
        self.nbytes = 4 * channels * kernel

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight = placed(tensors["weight"].t().contiguous(), self._placement)

    def rows(self, x: Tensor, past: Tensor, slots: Tensor) -> Tensor:
        """One token of each of n sequences, [n, channels] -> [n, channels]; past is [slots, channels,
        kernel - 1].
        """
        before = past.index_select(0, slots)
        window = torch.cat((before.transpose(1, 2), x.unsqueeze(1)), 1)
        past.index_copy_(0, slots, window.narrow(1, 1, self._kernel - 1).transpose(1, 2))
        return F.silu((window * self.weight).sum(1), inplace=True)

    def span(self, x: Tensor, past: Tensor) -> Tensor:
        """Tokens of one sequence, [T, channels] -> [T, channels]; past is [channels, kernel - 1]."""
        rows, before = x.shape[0], self._kernel - 1
        border = torch.cat((past.t(), x.narrow(0, 0, min(rows, before))))
        found = x.new_empty(x.shape)
        self._convolve(border, found.narrow(0, 0, min(rows, before)))
        for first in range(before, rows, BLOCK):
            count = min(BLOCK, rows - first)
            self._convolve(x.narrow(0, first - before, count + before), found.narrow(0, first, count))
        latest = x if rows >= before else border
        past.copy_(latest.narrow(0, latest.shape[0] - before, before).t())
        return found

    def _convolve(self, inputs: Tensor, found: Tensor) -> None:
        """From T + kernel - 1 rows to T."""
        rows = found.shape[0]
        first, *others = self.weight.unbind(0)
        torch.mul(inputs.narrow(0, 0, rows), first, out=found)
        for at, weight in enumerate(others, 1):
            found.addcmul_(inputs.narrow(0, at, rows), weight)
        F.silu(found, inplace=True)
