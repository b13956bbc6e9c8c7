"""Weights in 8 and 4 bits on CUDA devices, made while a model is loaded, and torch's kernels for them.

Only weights are quantised: activations stay fp32, or bf16 where the kernel of 4 bits wants them. Written for
CUDA and unverified on hardware; what the numbers become is the same on every device. Knows nothing of layers.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from cortex.neuron.nn.matrix import Matrix
from cortex.neuron.nn.packing import GROUP, INT4_INPUTS, INT4_OUTPUTS, round_up

FEW_ROWS: Final = 16
"""Up to here the kernel of 8 bits is used, which reads the weights once for so many rows."""
PART: Final = 2**24
"""Weights that are worked on at a time: quantised on the host, or turned into fp32 on the device."""
MIDDLE: Final = 8
"""The code of 4 bits, of 0 to 15, that stands for a group's zero point."""


class Int8Matrix:
    """8 bits with a scale for each output: w = s q. Up to FEW_ROWS rows go through `_weight_int8pack_mm`,
    more through fp32 products with parts of the weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
        codes, scale = quantised8(weight)
        self._codes, self._scales = codes.to(device), scale.to(device)
        self._bias = None if bias is None else bias.to(device)
        self.nbytes = codes.nbytes + scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= FEW_ROWS:
            product = torch._weight_int8pack_mm(x.contiguous(), self._codes, self._scales)
        else:
            step = max(1, PART // x.shape[1])
            parts = [F.linear(x, codes.to(x.dtype)) for codes in torch.split(self._codes, step)]
            product = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).mul_(self._scales)
        return product if self._bias is None else product.add_(self._bias)


class Int4Matrix:
    """4 bits in groups of inputs with a scale and a zero point, bf16: w = s (q - 8) + z. The product is
    `_weight_int4pack_mm`, in bf16; it takes whole tiles, so `outputs` may be filled up.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device, group: int) -> None:
        self._outputs, inputs = weight.shape
        self._group = group
        missing = round_up(self._outputs, INT4_OUTPUTS) - self._outputs
        codes, scales = quantised4(F.pad(weight, (0, 0, 0, missing)) if missing else weight, group)
        tiles = next(count for count in (8, 4, 2) if inputs % (16 * count) == 0)
        self._codes = torch._convert_weight_to_int4pack(pairs(codes).to(device), tiles)
        self._scales = scales.to(device)
        self._bias = None if bias is None else bias.to(device)
        self.nbytes = codes.numel() // 2 + scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.to(torch.bfloat16).contiguous()
        product = torch._weight_int4pack_mm(rows, self._codes, self._group, self._scales)
        product = product.narrow(1, 0, self._outputs).to(x.dtype)
        return product if self._bias is None else product.add_(self._bias)


def quantise(weight: Tensor, bias: Tensor | None, dtype: str, device: torch.device) -> Matrix:
    """From fp32 [outputs, inputs] on the host. `int4` takes 8 bits where 32 does not divide the inputs."""
    inputs = weight.shape[1]
    if dtype == "int4" and inputs % INT4_INPUTS == 0:
        return Int4Matrix(weight, bias, device, GROUP if inputs % GROUP == 0 else INT4_INPUTS)
    return Int8Matrix(weight, bias, device)


def quantised8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [outputs, inputs] and fp32 [outputs]; no weight is off by more than half of its scale."""
    scale = weight.abs().amax(1).div_(127).clamp_min_(1e-30)
    parts = zip(_parts(weight), _parts(scale.unsqueeze(1), weight.shape[1]), strict=True)
    return torch.cat([rows.div(by).round_().to(torch.int8) for rows, by in parts]), scale


def quantised4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """uint8 [outputs, inputs] of 0 to 15, and bf16 [inputs / group, outputs, 2], scale and zero point.

    Both are rounded first and the codes chosen for what they then are, so a weight is off by half of its
    scale and what the rounding moved the ends of its group's range by.
    """
    found = [_grouped(rows.view(rows.shape[0], -1, group)) for rows in _parts(weight)]
    codes, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes.view(weight.shape), scales.transpose(0, 1).contiguous()


def _grouped(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of [outputs, groups, group]: codes, and scales and zero points [outputs, groups, 2]."""
    low, high = weight.aminmax(dim=-1, keepdim=True)
    scale = (high - low).div_(15).clamp_min_(1e-30).to(torch.bfloat16)
    zero = torch.add(low, scale, alpha=MIDDLE).to(torch.bfloat16)
    codes = (weight - zero.float()).div_(scale.float()).round_().add_(MIDDLE).clamp_(0, 15)
    return codes.to(torch.uint8), torch.cat((scale, zero), -1)


def pairs(codes: Tensor) -> Tensor:
    """Two codes in a byte, the first one in the upper half: [outputs, inputs] -> [outputs, inputs / 2]."""
    return codes[:, ::2].bitwise_left_shift(4).bitwise_or_(codes[:, 1::2])


def _parts(weight: Tensor, inputs: int | None = None) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, PART // (inputs or weight.shape[1])))
