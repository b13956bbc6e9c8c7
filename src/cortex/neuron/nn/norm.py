"""RMSNorm in fp32, of rows and of heads. Knows nothing of what it normalises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.placement import Placement, empty, placed

FEW_ROWS: Final = 8
"""Up to here the overhead of calls decides, and `layer_norm` of (x, -x) is the cheaper one on CPUs."""


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * w over the last dimension (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self._placement = placement
        self._few = FEW_ROWS if placement.device.type == "cpu" else 0
        self._doubled: Tensor | None = None
        self._width = width
        self._eps = eps
        self.weight = empty(width)
        self.nbytes = 4 * width

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight = placed(tensors["weight"], self._placement)
        self._doubled = torch.cat((self.weight, self.weight))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > self._few:
            return F.rms_norm(x, (self._width,), self.weight, self._eps)
        # (x, -x) has mean 0, so its variance is the mean of squares: layer_norm computes an RMS norm.
        mirrored = torch.cat((x, -x), dim=-1)
        both = torch.layer_norm(mirrored, (2 * self._width,), self._doubled, None, self._eps)
        return both.narrow(1, 0, self._width)


class HeadNorm(nn.Module):
    """RMSNorm of every head of queries, by one weight, and of every head of keys, by another.

    The parameter is both weights one after the other; filled, it has a row for each head.
    """

    def __init__(self, heads: int, kv_heads: int, width: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self._placement = placement
        self._heads = (heads, kv_heads)
        self._eps = eps
        self.weight = empty(2 * width)
        self.nbytes = 4 * (heads + kv_heads) * width

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        both = tensors["weight"].chunk(2)
        rows = [weight.expand(count, -1) for weight, count in zip(both, self._heads, strict=True)]
        self.weight = placed(torch.cat(rows), self._placement)

    def normalize_(self, heads: Tensor) -> None:
        """fp32 [T, heads + kv_heads, width], in place."""
        scale = heads.square().mean(-1, True).add_(self._eps).rsqrt_()
        heads.mul_(scale).mul_(self.weight)
