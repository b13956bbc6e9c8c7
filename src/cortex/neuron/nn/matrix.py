"""The packed forms of a weight matrix on CPUs, and which kernel of stock torch multiplies by each.

`HalfMatrix` is FBGEMM's fp16. `IntegerMatrix` is fixed-point: weights are one or two planes of 8 bits with
a scale for each output, activations two planes with a scale for each row, and the sums are exact integers.
So a row's result never depends on its batch mates. Knows nothing of layers.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from cortex.neuron.nn import blocked
from cortex.neuron.nn.blocked import TILE
from cortex.neuron.nn.filling import Rows
from cortex.neuron.nn.packing import INT8_OUTPUTS, fbgemm_bytes, onednn_bytes, packed_bytes, round_up
from cortex.neuron.nn.staging import STAGING

# Tensors, as a number would be made into one at every call.
_MIDDLE: Final = torch.tensor(128.0 * 256 + 128 + 0.5)
"""What makes both planes of a number bytes with 128 added, once it is cut off after the point."""
_SIGNS: Final = torch.tensor(128 * 256 + 128, dtype=torch.int32)
FEW_WEIGHTS: Final = 5_000_000
"""Up to so many, splitting and joining two planes costs a decode step more than their product saves."""
WHOLE: Final = math.lcm(TILE, INT8_OUTPUTS)
"""Outputs of whole blocks of each integer kernel: parts of so many leave none half empty."""
RUN: Final = 2**19
"""Weights that are packed at a time: few enough for the caches with all that is made of them on the way."""
PART: Final = 2**25
"""More weights than this are packed as several matrices, so that what is made on the way stays small, all
threads of a load have work, and of an integer kernel's own slow packing there is one part."""


class Matrix(Protocol):
    """Made once from fp32 [outputs, inputs] and, for some layers, a bias [outputs]."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """fp32 [T, inputs] -> fp32 [T, outputs]."""


class HalfMatrix:
    """Weights rounded to fp16, everything else fp32: FBGEMM's `linear_dynamic_fp16`."""

    def __init__(self, rows: Rows, bias: Tensor | None) -> None:
        outputs, inputs = rows.shape
        self.nbytes = packed_bytes(inputs, outputs)
        step = max(1, RUN // inputs)
        with STAGING.take(outputs, inputs) as weight:  # of its own, as FBGEMM bounds weights in place
            for at in range(0, outputs, step):
                weight[at : at + step] = rows[at : at + step]
            sums = weight.sum(1)
            if not sums.isfinite().all():  # FBGEMM would clamp such weights, and hide that they are damaged
                bias = (torch.zeros_like(sums) if bias is None else bias) + sums * 0
            self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, self._packed)
        return product


class Packing(Protocol):
    """A matrix of an integer kernel in the making."""

    def put(self, first: int, weight: Tensor) -> None:
        """int8 [n, inputs] as outputs `first` and on."""

    def finish(self, scale: Tensor) -> Any:
        """The packed matrix, once every output was put, with its fp32 [outputs]."""


class IntegerKernel(Protocol):
    """Exact products of small integers. `base` is what a step of the upper plane of activations is worth,
    `steps` how many steps of the lower one the largest activation of a row has.
    """

    base: int
    steps: int

    def nbytes(self, inputs: int, outputs: int) -> int:
        """Bytes of a packed matrix [outputs, inputs]."""

    def begin(self, outputs: int, inputs: int) -> Packing:
        """An empty matrix."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [T, inputs] as lower rows, then upper rows [2T, inputs], and each row's largest one [T, 1]."""

    def multiply(self, rows: Tensor, packed: Any) -> Tensor:
        """Rows as from `split`, any number of them, times the weights and their scale: fp32."""


class _Collected:
    """Keeps the weights as they are until all are there."""

    def __init__(self, outputs: int, inputs: int, pack: Callable[[Tensor, Tensor], Any]) -> None:
        self._weight = torch.empty(outputs, inputs, dtype=torch.int8)
        self._pack = pack

    def put(self, first: int, weight: Tensor) -> None:
        self._weight[first : first + len(weight)] = weight

    def finish(self, scale: Tensor) -> Any:
        return self._pack(self._weight, scale)


class _Placed(blocked.BlockedMatrix):
    def finish(self, scale: Tensor) -> Any:
        return _onednn_operands(self.packed, scale)


class OneDnn:
    """oneDNN's int8 product, on CPUs with AMX. A plane holds [-128, 127].

    Others multiply signed activations by packed weights in oneDNN's reference code, a thousand times slower.
    """

    base = 256
    steps = 127 * 256
    nbytes = staticmethod(onednn_bytes)

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[int, int], Tensor] = WeakValueDictionary()
        """By shape a packed matrix, somewhere in use, whose layout `blocked` can write."""

    def begin(self, outputs: int, inputs: int) -> Packing:
        alike = self._known.get((outputs, inputs))
        if alike is None:
            return _Collected(outputs, inputs, self.pack)
        return _Placed(alike.clone(), outputs, inputs)

    def pack(self, weight: Tensor, scale: Tensor) -> Any:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        if blocked.known(packed, weight):
            outputs, inputs = weight.shape
            self._known[outputs, inputs] = packed
        return _onednn_operands(packed, scale)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, inputs = x.shape
        peak = x.abs().amax(-1, True)
        # A row of zeros becomes whatever NaN is as an integer, which its peak then multiplies by zero.
        number = torch.add(_MIDDLE, x.div(peak), alpha=self.steps).to(torch.int32).bitwise_xor_(_SIGNS)
        planes = number.view(torch.int8).as_strided((2, rows, inputs), (1, 4 * inputs, 4))
        return planes.reshape(2 * rows, inputs), peak

    def multiply(self, rows: Tensor, packed: Any) -> Tensor:
        weight, scale, zero = packed
        product: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            rows, 1.0, 0, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product


def _onednn_operands(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return packed, scale, torch.zeros(scale.shape, dtype=torch.int64)


class Fbgemm:
    """FBGEMM's int8 product, on all other CPUs. A plane holds [-most, most].

    With VNNI that is 127. Without, its kernels add two products in 16 bits, and there it is 63: one bit less
    than they take. Unlike oneDNN's, which keeps up with it on many rows, it reads cold weights as fast as
    memory gives them, so that one row takes two thirds of the time.
    """

    nbytes = staticmethod(fbgemm_bytes)

    def __init__(self, most: int) -> None:
        # Deprecated, yet all that its kernels take.
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        self._zero = most + 1
        self.base = 2 * most
        self.steps = most * self.base
        self._factors = torch.tensor([self.steps, most], dtype=torch.float32).view(2, 1, 1)
        """What makes a row's largest number all steps of both planes, and all of the upper one."""

    def begin(self, outputs: int, inputs: int) -> Packing:
        return _Collected(outputs, inputs, self.pack)

    def pack(self, weight: Tensor, scale: Tensor) -> Any:
        zero = torch.zeros(scale.shape, dtype=torch.int64)
        tensor = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(tensor, None)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In fp32, as its kernel rounds: so the lower plane is left with its fractions."""
        rows, inputs = x.shape
        peak = x.abs().amax(-1, True)
        # A row of zeros becomes whatever NaN is as an integer, which its peak then multiplies by zero.
        planes = x * (self._factors / peak)
        lower, upper = planes.unbind()
        lower.sub_(upper.round_(), alpha=self.base)
        return planes.view(2 * rows, inputs), peak

    def multiply(self, rows: Tensor, packed: Any) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(
            rows, 1.0, self._zero, packed
        )
        return product


class _FixedPoint:
    """Turns runs of fp32 rows into planes of int8 [planes, rows, inputs], upper plane first."""

    def __init__(self, planes: int, rows: int, step: int, inputs: int) -> None:
        self.planes = torch.empty(planes, rows, inputs, dtype=torch.int8)
        self._number = torch.empty(min(rows, step), inputs)
        self._both = torch.empty(min(rows, step), inputs, dtype=torch.int16)

    def write(self, run: Tensor, at: int) -> Tensor:
        """fp32 [n, inputs] into the planes' rows `at` and on; gives their scales, fp32 [n]."""
        count = len(run)
        place = slice(at, at + count)
        largest = torch.maximum(run.amax(1), run.amin(1).neg_())
        scale = largest.div_(127 if len(self.planes) == 1 else 127 * 256).clamp_min_(1e-30)
        number = torch.div(run, scale.unsqueeze(1), out=self._number[:count]).round_()
        if len(self.planes) == 1:
            self.planes[0, place] = number
            return scale
        both = self._both[:count].copy_(number)
        self.planes[1, place] = both  # of 16 bits the lower eight
        self.planes[0, place] = both.add_(128).bitwise_right_shift_(8)
        return scale


class IntegerMatrix:
    """`planes` 1 keeps weights in 8 bits, 2 in 16; each output has a scale of its own.

    With x = s·(base·u + l) and w = t·(256·h + m) the product is s·t·(256·(base·hu + hl) + base·mu + ml). All
    four products come out of one call: the planes of the weights are one matrix, upper outputs first, those
    of the activations one batch.
    """

    def __init__(self, weight: Rows, bias: Tensor | None, planes: int, kernel: IntegerKernel) -> None:
        outputs, inputs = weight.shape
        self._kernel = kernel
        self._bias = bias
        self._outputs = outputs if planes == 2 else None
        packing = kernel.begin(planes * outputs, inputs)
        scale = torch.empty(outputs)
        step = max(1, RUN // inputs)
        group = max(TILE, step // TILE * TILE)
        fixed = _FixedPoint(planes, group, step, inputs)
        for first in range(0, outputs, group):
            count = min(group, outputs - first)
            for at in range(0, count, step):
                run = weight[first + at : first + min(count, at + step)]
                scale[first + at : first + at + len(run)] = fixed.write(run, at)
            for plane in range(planes):
                packing.put(plane * outputs + first, fixed.planes[plane, :count])
        scale /= kernel.steps  # so that a row's largest number alone brings its product back
        self._packed = packing.finish(scale if planes == 1 else torch.cat((scale * 256, scale)))
        self.nbytes = kernel.nbytes(inputs, planes * outputs)

    def __call__(self, x: Tensor) -> Tensor:
        kernel = self._kernel
        rows, peak = kernel.split(x)
        count = x.shape[0]
        both = kernel.multiply(rows, self._packed)
        product = both.narrow(0, 0, count).add_(both.narrow(0, count, count), alpha=kernel.base)
        if self._outputs is None:
            product.mul_(peak)
        else:
            upper, lower = (product.narrow(1, at, self._outputs) for at in (0, self._outputs))
            product = torch.add(upper, lower).mul_(peak)
        return product if self._bias is None else product.add_(self._bias)


@functools.cache
def integer_kernel() -> IntegerKernel:
    """The one that suits this CPU."""
    if has_matrix_unit():
        return OneDnn()
    return Fbgemm(127 if torch.cpu._is_vnni_supported() else 63)


@functools.cache
def has_matrix_unit() -> bool:
    """AMX, which the system must let this process use: with it, four integer products are several times
    faster than one in fp32.
    """
    has_onednn = "onednn" in torch.backends.quantized.supported_engines
    return has_onednn and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


class StackedMatrix:
    """Parts of a large matrix, each with outputs of its own."""

    def __init__(self, parts: Sequence[Matrix]) -> None:
        self._parts = parts
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self._parts], 1)


class _Slice:
    """Some rows of rows."""

    def __init__(self, rows: Rows, first: int, last: int) -> None:
        self._rows = rows
        self._first = first
        self.shape = (last - first, *rows.shape[1:])

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        return self._rows[self._first + start : self._first + stop]


def pack(weight: Rows, bias: Tensor | None, dtype: str) -> Matrix:
    """The matrix in the form that `dtype` (`packed16` or `int8`) means on this CPU."""
    outputs, inputs = weight.shape
    planes = _planes(outputs, inputs, dtype)
    step = _part_outputs(outputs, inputs)
    if step == outputs:
        return _matrix(weight, bias, planes)
    edges = [*range(0, outputs, step), outputs]
    return StackedMatrix(
        [
            _matrix(_Slice(weight, first, last), None if bias is None else bias[first:last], planes)
            for first, last in itertools.pairwise(edges)
        ]
    )


def _matrix(weight: Rows, bias: Tensor | None, planes: int) -> Matrix:
    return IntegerMatrix(weight, bias, planes, integer_kernel()) if planes else HalfMatrix(weight, bias)


def _part_outputs(outputs: int, inputs: int) -> int:
    """Outputs of each part but the last one, which may have fewer."""
    parts = max(1, -(-outputs * inputs // PART))
    return min(outputs, round_up(-(-outputs // parts), WHOLE))


def staged_bytes(outputs: int, inputs: int, dtype: str) -> int:
    """Most bytes that `pack` takes on the way, beside the finished matrix."""
    planes = _planes(outputs, inputs, dtype)
    outputs = _part_outputs(outputs, inputs)
    if not planes:
        return 4 * outputs * inputs
    copies = 1 if isinstance(integer_kernel(), OneDnn) else 2  # FBGEMM packs from a copy
    return copies * planes * outputs * inputs


def _planes(outputs: int, inputs: int, dtype: str) -> int:
    """Of an integer matrix; 0 for one of fp16."""
    if dtype == "int8":
        return 1
    return 2 if has_matrix_unit() and outputs * inputs > FEW_WEIGHTS else 0
