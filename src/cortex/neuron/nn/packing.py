"""How much memory matrices take, packed or not. Knows no torch, so that loads can be planned with it.

Sources: PackedGemmMatrixB in FBGEMM's FbgemmPackMatrixB.h (blocks of 512 inputs by 16 outputs, all of them
whole and in memory; in int8 by up to 48 outputs, PackingTraits-inl.h); oneDNN's blocked int8 layouts, of 64
inputs by up to 64 outputs; torch's int4mm.cu.
"""

from __future__ import annotations

from typing import Final

BLOCK_INPUTS: Final = 512
BLOCK_OUTPUTS: Final = 16
INT8_OUTPUTS: Final = 48
TILE: Final = 64
INT4_INPUTS: Final = 32
INT4_OUTPUTS: Final = 8
GROUP: Final = 64
"""Inputs that share a scale in 4 bits; INT4_INPUTS where it does not divide them."""


def packed_bytes(inputs: int, outputs: int) -> int:
    """Bytes of one fp16 weight [outputs, inputs]; a width that is no multiple of 512 costs up to it."""
    return 2 * round_up(inputs, BLOCK_INPUTS) * round_up(outputs, BLOCK_OUTPUTS)


def onednn_bytes(inputs: int, outputs: int) -> int:
    """Bytes of one int8 weight [outputs, inputs] with its scales, zero points and sums."""
    return (round_up(inputs, TILE) + 16) * round_up(outputs, TILE)


def fbgemm_bytes(inputs: int, outputs: int) -> int:
    """The same; a width that is no multiple of 512 costs up to it here too."""
    return (round_up(inputs, BLOCK_INPUTS) + 24) * round_up(outputs, INT8_OUTPUTS)


def int4_bytes(inputs: int, outputs: int) -> int:
    """Bytes of one weight [outputs, inputs] in 4 bits, with a scale and a zero point of 16 for each group."""
    groups = inputs // (GROUP if inputs % GROUP == 0 else INT4_INPUTS)
    return round_up(outputs, INT4_OUTPUTS) * (inputs // 2 + 4 * groups)


def most_bytes(inputs: int, outputs: int, dtype: str) -> int:
    """Bytes of a weight in the form that `dtype` means, whichever kernel the worker will take."""
    if dtype == "int4" and inputs % INT4_INPUTS == 0:
        return int4_bytes(inputs, outputs)
    if dtype in ("int8", "int4"):
        return max(onednn_bytes(inputs, outputs), fbgemm_bytes(inputs, outputs))
    return max(packed_bytes(inputs, outputs), onednn_bytes(inputs, 2 * outputs))  # its two planes


def device_bytes(inputs: int, outputs: int, dtype: str) -> int:
    """The same where nothing is packed for a CPU: fp16, or what `nn.quant` makes."""
    if dtype == "packed16":
        return 2 * inputs * outputs
    if dtype == "int4" and inputs % INT4_INPUTS == 0:
        return int4_bytes(inputs, outputs)
    return (inputs + 4) * outputs


def round_up(size: int, block: int) -> int:
    return -(-size // block) * block
