"""The packed forms of a weight matrix on CPUs, and which kernel of stock torch multiplies by each.

`HalfMatrix` is FBGEMM's fp16. `IntegerMatrix` is fixed-point: weights are one or two planes of 8 bits with
a scale for each output, activations two planes with a scale for each row, and the sums are exact integers.
So a row's result never depends on its batch mates. Knows nothing of layers.
"""

from __future__ import annotations

import functools
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from cortex.neuron.nn.packing import integer_bytes, packed_bytes

# Tensors, as a number would be made into one at every call.
_TINY: Final = torch.tensor(1e-30)
"""Keeps the scale of a row of zeros from being zero."""
_HALF: Final = torch.tensor(128.0)
_HALF_BIT: Final = torch.tensor(128, dtype=torch.int16)
FEW_WEIGHTS: Final = 5_000_000
"""Up to so many, splitting and joining two planes costs a decode step more than their product saves."""


class Matrix(Protocol):
    """Made once from fp32 [outputs, inputs] and, for some layers, a bias [outputs]."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """fp32 [T, inputs] -> fp32 [T, outputs]."""


class HalfMatrix:
    """Weights rounded to fp16, everything else fp32: FBGEMM's `linear_dynamic_fp16`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        sums = weight.sum(1)
        if not sums.isfinite().all():  # FBGEMM would clamp such weights, and hide that they are damaged
            bias = (torch.zeros_like(sums) if bias is None else bias) + sums * 0
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self.nbytes = packed_bytes(*reversed(weight.shape))

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, self._packed)
        return product


class IntegerKernel(Protocol):
    """Exact products of small integers. `base` is what a step of the upper plane of activations is worth."""

    base: int

    def pack(self, weight: Tensor, scale: Tensor) -> Any:
        """From int8 [outputs, inputs] and fp32 [outputs]."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [T, inputs] as lower rows, then upper rows [2T, inputs], and the scale of each row [T, 1]."""

    def multiply(self, rows: Tensor, packed: Any) -> Tensor:
        """Rows as from `split`, any number of them, times the weights and their scale: fp32."""


class OneDnn:
    """oneDNN's int8 product, on CPUs with VNNI or AMX. A plane holds [-128, 127]."""

    base = 256

    def pack(self, weight: Tensor, scale: Tensor) -> Any:
        return (
            torch.ops.onednn.qlinear_prepack(weight, None),
            scale,
            torch.zeros(scale.shape, dtype=torch.int64),
        )

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, inputs = x.shape
        scale = torch.add(_TINY, x.abs().amax(-1, True), alpha=1 / (127 * 256))
        number = x.div(scale).add_(_HALF).round_().to(torch.int16)
        # The upper byte of number + 128 is the upper plane; of the lower byte, 128 is taken off again.
        planes = number.bitwise_xor_(_HALF_BIT).view(torch.int8)
        apart = planes.as_strided((2, rows, inputs), (1, 2 * inputs, 2))
        return apart.reshape(2 * rows, inputs), scale

    def multiply(self, rows: Tensor, packed: Any) -> Tensor:
        weight, scale, zero = packed
        product: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            rows, 1.0, 0, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product


class Fbgemm:
    """FBGEMM's int8 product, for CPUs with AVX2 alone. A plane holds [-63, 63]: one bit less than its
    kernels take, as those add two products in 16 bits.
    """

    base = 127

    def pack(self, weight: Tensor, scale: Tensor) -> Any:
        zero = torch.zeros(scale.shape, dtype=torch.int64)
        tensor = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(tensor, None)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.add(_TINY, x.abs().amax(-1, True), alpha=1 / (63 * 127 + 63))
        number = x.div(scale).round_()
        upper = number.mul(1 / 127).round_()
        return torch.cat((number.sub_(upper, alpha=127), upper)), scale

    def multiply(self, rows: Tensor, packed: Any) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows, 1.0, 64, packed
        )
        return product


class IntegerMatrix:
    """`planes` 1 keeps weights in 8 bits, 2 in 16; each output has a scale of its own.

    With x = s·(base·u + l) and w = t·(256·h + m) the product is s·t·(256·(base·hu + hl) + base·mu + ml). All
    four products come out of one call: the planes of the weights are one matrix, upper outputs first, those
    of the activations one batch.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, planes: int, kernel: IntegerKernel) -> None:
        self._kernel = kernel
        self._bias = bias
        self._outputs = weight.shape[0] if planes == 2 else None
        most = 127 if planes == 1 else 127 * 256
        scale = weight.abs().amax(1).div_(most).clamp_min_(1e-30)
        number = weight.div(scale.unsqueeze(1)).round_()
        if planes == 2:
            upper = number.add(128).div_(256).floor_()
            number = torch.cat((upper, number.sub_(upper, alpha=256)))
            scale = torch.cat((scale * 256, scale))
        self._packed = kernel.pack(number.to(torch.int8), scale)
        self.nbytes = integer_bytes(weight.shape[1], weight.shape[0], planes)

    def __call__(self, x: Tensor) -> Tensor:
        kernel = self._kernel
        rows, scale = kernel.split(x)
        count = x.shape[0]
        both = kernel.multiply(rows, self._packed)
        product = both.narrow(0, 0, count).add_(both.narrow(0, count, count), alpha=kernel.base)
        if self._outputs is None:
            product.mul_(scale)
        else:
            upper, lower = (product.narrow(1, at, self._outputs) for at in (0, self._outputs))
            product = torch.add(upper, lower).mul_(scale)
        return product if self._bias is None else product.add_(self._bias)


@functools.cache
def integer_kernel() -> IntegerKernel:
    """The faster one that this CPU has."""
    has_onednn = "onednn" in torch.backends.quantized.supported_engines
    return OneDnn() if has_onednn and torch.cpu._is_vnni_supported() else Fbgemm()


@functools.cache
def has_matrix_unit() -> bool:
    """With AMX, four integer products are several times faster than one in fp32."""
    return torch.cpu._is_amx_tile_supported() and isinstance(integer_kernel(), OneDnn)


def pack(weight: Tensor, bias: Tensor | None, dtype: str) -> Matrix:
    """The matrix in the form that `dtype` (`packed16` or `int8`) means on this CPU."""
    if dtype == "int8":
        return IntegerMatrix(weight, bias, 1, integer_kernel())
    if has_matrix_unit() and weight.numel() > FEW_WEIGHTS:
        return IntegerMatrix(weight, bias, 2, integer_kernel())
    return HalfMatrix(weight, bias)
