"""Where a tensor lies in its file and how its elements are stored.

One vocabulary for GGUF and safetensors, with the checks that both need: every tensor inside its
file, none over another. Knows no torch and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from cortex.wire.errors import LoadFailed

BLOCKS: Final[dict[str, tuple[int, int]]] = {
    "F64": (1, 8),
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "I64": (1, 8),
    "I32": (1, 4),
    "I16": (1, 2),
    "I8": (1, 1),
    "U64": (1, 8),
    "U32": (1, 4),
    "U16": (1, 2),
    "U8": (1, 1),
    "BOOL": (1, 1),
    "F8_E4M3": (1, 1),
    "F8_E5M2": (1, 1),
    "F8_E8M0": (1, 1),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q8_1": (32, 40),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ3_XXS": (256, 98),
    "IQ1_S": (256, 50),
    "IQ4_NL": (32, 18),
    "IQ3_S": (256, 110),
    "IQ2_S": (256, 82),
    "IQ4_XS": (256, 136),
    "IQ1_M": (256, 56),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
    "Q1_0": (128, 18),
}
"""Elements and bytes of one storage block of each element type (ggml.h, safetensors' format page)."""

READABLE: Final = (
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
)
"""Element types that `weights.dequant` turns into numbers."""
FP8: Final = "F8_E4M3"
"""Numbers of this type are a weight only with their scales."""


class TensorInfo(msgspec.Struct, frozen=True):
    """A tensor in a file. `shape` is outermost dimension first; `offset` and `nbytes` are of the file.

    `scales` are those that `weights.scaling` has found for it; they may not fit, which it checks as well.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    scales: Scales | None = None

    @property
    def columns(self) -> int:
        """Elements of a row; a row of a vector is one element."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.columns if self.columns else 0

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0

    @property
    def height(self) -> int:
        """Rows of each matrix, where the tensor is a stack of them; else all."""
        return self.shape[-2] if len(self.shape) > 1 else self.rows


class Scales(msgspec.Struct, frozen=True):
    """What a tensor's numbers are multiplied by: a number for each block of `rows` by `columns`.

    They begin anew in each of the scaled tensor's matrices, of `height` rows, where the last ones may be
    partial. A line of `tensor`, which has the scales, is for one row of blocks.
    """

    tensor: TensorInfo
    rows: int
    columns: int
    height: int

    def line(self, row: Any) -> Any:
        """The one for a row of the scaled tensor: of an integer, or of many in a torch tensor."""
        return row // self.height * -(-self.height // self.rows) + row % self.height // self.rows

    def lines(self, start: int, stop: int) -> range:
        """Those that rows [start, stop) need."""
        return range(self.line(start), self.line(stop - 1) + 1) if start < stop else range(0)

    def blocks(self, start: int, stop: int) -> range:
        """Of a line, those that columns [start, stop) need."""
        return range(start // self.columns, -(-stop // self.columns))


def stored_bytes(dtype: str, elements: int) -> int:
    """Bytes that `elements` take; they must be whole blocks."""
    per_block, block_bytes = BLOCKS[dtype]
    return elements // per_block * block_bytes


def damaged(path: Path, what: str) -> LoadFailed:
    return LoadFailed(f"{path}: {what}. The file is damaged or incomplete; fetch it again.")


def check_extents(path: Path, tensors: Iterable[TensorInfo], size: int) -> None:
    """Raises LoadFailed if a tensor reaches over the end of the file or into another tensor."""
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset + tensor.nbytes > size:
            raise damaged(
                path,
                f"tensor {tensor.name} ends at byte {tensor.offset + tensor.nbytes}, the file at byte {size}",
            )
        if tensor.offset < end:
            raise damaged(path, f"tensor {tensor.name} overlaps tensor {before}")
        end, before = tensor.offset + tensor.nbytes, tensor.name
