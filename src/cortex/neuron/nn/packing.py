"""How much memory FBGEMM's packed 16-bit matrices take. Knows no torch, so that loads can be planned with it.

Source: PackedGemmMatrixB in FBGEMM's FbgemmPackMatrixB.h: blocks of 512 inputs by 16 outputs, all of
them whole and in memory.
"""

from __future__ import annotations

from typing import Final

BLOCK_INPUTS: Final = 512
BLOCK_OUTPUTS: Final = 16


def packed_bytes(inputs: int, outputs: int) -> int:
    """Bytes of one packed weight [outputs, inputs]; a width that is no multiple of 512 costs up to it."""
    return 2 * _up(inputs, BLOCK_INPUTS) * _up(outputs, BLOCK_OUTPUTS)


def _up(size: int, block: int) -> int:
    return -(-size // block) * block
