"""A linear layer: plain, packed for the CPU or quantised for the device. Knows not what it projects."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.filling import rows
from cortex.neuron.nn.matrix import Matrix, pack, staged_bytes
from cortex.neuron.nn.placement import Placement, empty, placed
from cortex.neuron.nn.quant import quantise


class Linear(nn.Module):
    """y = x Wᵀ + b: fp32 [T, inputs] -> fp32 [T, outputs]."""

    def __init__(self, inputs: int, outputs: int, placement: Placement, *, bias: bool = False) -> None:
        super().__init__()
        self._placement = placement
        kept = torch.float32 if placement.packed or placement.quantised else placement.table
        self.weight: nn.Parameter | None = empty(outputs, inputs, dtype=kept)
        self.bias: nn.Parameter | None = empty(outputs) if bias else None
        self.matrix: Matrix | None = None
        self.nbytes = 0
        """Bytes of the filled layer."""
        self.staged = staged_bytes(outputs, inputs, placement.dtype) if placement.packed else None
        """Bytes that filling takes on the way; None for those of the parameters."""

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes `weight` and, with a bias, `bias` from the host; fp32 where they change their form."""
        bias = tensors.get("bias")
        placement = self._placement
        self.nbytes = 0 if bias is None else bias.nbytes
        if placement.packed or placement.quantised:
            if placement.packed:
                matrix = pack(rows(tensors, "weight"), bias, placement.dtype)
            else:
                matrix = quantise(tensors["weight"], bias, placement.dtype, placement.device)
            self.nbytes += matrix.nbytes
            self.matrix = matrix
            self.weight = self.bias = None
            return
        weight = tensors["weight"]
        self.weight = placed(weight, placement)
        self.bias = None if bias is None else placed(bias, placement)
        self.nbytes += weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        if self.matrix is not None:
            return self.matrix(x)
        assert self.weight is not None
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: fp32 [T, inputs] -> fp32 [T, outputs]. A weight in fp16 stays as it is, x is rounded.

    Rows are brought to at most 1 before and back afterwards: fp16 ends at 65504, and what some models compute
    goes beyond it.
    """
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    scale = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
    found = F.linear((x / scale).to(weight.dtype), weight).to(x.dtype).mul_(scale)
    return found if bias is None else found.add_(bias)
