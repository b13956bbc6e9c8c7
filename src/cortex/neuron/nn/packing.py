"""How much memory packed matrices take. Knows no torch, so that loads can be planned with it.

Sources: PackedGemmMatrixB in FBGEMM's FbgemmPackMatrixB.h (blocks of 512 inputs by 16 outputs, all of them
whole and in memory); oneDNN's blocked int8 layouts, of 64 inputs by up to 64 outputs.
"""

from __future__ import annotations

from typing import Final

BLOCK_INPUTS: Final = 512
BLOCK_OUTPUTS: Final = 16
TILE: Final = 64


def packed_bytes(inputs: int, outputs: int) -> int:
    """Bytes of one fp16 weight [outputs, inputs]; a width that is no multiple of 512 costs up to it."""
    return 2 * _up(inputs, BLOCK_INPUTS) * _up(outputs, BLOCK_OUTPUTS)


def integer_bytes(inputs: int, outputs: int, planes: int) -> int:
    """Bytes of one fixed-point weight [outputs, inputs] with its scales, zero points and sums."""
    return planes * (_up(inputs, TILE) + 16) * _up(outputs, TILE)


def most_bytes(inputs: int, outputs: int, dtype: str) -> int:
    """Bytes of a weight in the form that `dtype` means, whichever kernel the worker's CPU will take."""
    if dtype == "int8":
        return integer_bytes(inputs, outputs, 1)
    return max(packed_bytes(inputs, outputs), integer_bytes(inputs, outputs, 2))


def _up(size: int, block: int) -> int:
    return -(-size // block) * block
