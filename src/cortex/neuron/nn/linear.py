"""A linear layer in one of two forms: fp32, or 16-bit weights with fp32 activations.

On CPUs the 16-bit form is FBGEMM's `linear_dynamic_fp16`: weights packed once, nothing but their
rounding to fp16 is lost, and half the bytes are streamed. Knows nothing of what it projects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.packing import packed_bytes
from cortex.neuron.nn.placement import Placement, empty, placed


class Linear(nn.Module):
    """y = x Wᵀ + b: [T, inputs] -> [T, outputs], fp32."""

    def __init__(self, inputs: int, outputs: int, placement: Placement, *, bias: bool = False) -> None:
        super().__init__()
        self._placement = placement
        kept = torch.float32 if placement.prepacked else placement.matrix
        self.weight: nn.Parameter | None = empty(outputs, inputs, dtype=kept)
        self.bias: nn.Parameter | None = empty(outputs) if bias else None
        self.packed: Any = None
        plain = outputs * inputs * placement.matrix.itemsize
        matrix = packed_bytes(inputs, outputs) if placement.prepacked else plain
        self.nbytes = matrix + (4 * outputs if bias else 0)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes `weight` and, with a bias, `bias` from the host; fp32 where they are to be packed."""
        weight, bias = tensors["weight"], tensors.get("bias")
        if self._placement.prepacked:
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
            self.weight = self.bias = None
            return
        self.weight = placed(weight, self._placement)
        self.bias = None if bias is None else placed(bias, self._placement)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return _linear_fp16(x, self.packed)
        assert self.weight is not None
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def _linear_fp16(x: Tensor, packed: Any) -> Tensor:
    product: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, packed)
    return product
