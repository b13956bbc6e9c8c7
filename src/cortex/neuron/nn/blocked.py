"""Writes int8 weights straight into the memory of oneDNN's packed matrices, where their layout is known.

oneDNN's own reorder into this layout is its slowest generic one, 3.5 ns a weight. So it packs only the first
matrix of a shape; if that is byte for byte what is expected here, others are written into copies of it.
Layout: BA16a64b4a of oneDNN's dnnl_types.h, followed by what zero points of activations would take.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

TILE: Final = 64
"""Inputs and outputs of a block; both dimensions are padded to whole ones."""
FOUR: Final = 4
"""Inputs of one output that lie side by side."""
MOST: Final = 2**27
"""Weights of the largest matrix that is looked into: beyond are output heads, and a model has one."""


class BlockedMatrix:
    """The memory of one packed matrix [outputs, inputs]."""

    def __init__(self, packed: Tensor, outputs: int, inputs: int) -> None:
        self.packed = packed
        self._inputs = inputs
        self._padding = -inputs % TILE
        tiles = -(-outputs // TILE), (inputs + self._padding) // TILE
        memory = _memory(packed)
        size = tiles[0] * tiles[1] * TILE * TILE
        # Per tile of outputs and tile of inputs: 16 runs of inputs, each four of them for 64 outputs.
        self._tiles = memory[:size].view(torch.int32).view(*tiles, TILE // FOUR, TILE)
        self._sums = memory[size : size + 4 * TILE * tiles[0]].view(torch.int32)

    def put(self, first: int, weight: Tensor) -> None:
        """int8 [n, inputs], contiguous, as outputs `first` and on."""
        for tile, outputs, block in self._blocks(first, weight):
            self._tiles[tile, :, :, outputs].copy_(block)
        self._sums[first : first + len(weight)] = weight.sum(1, dtype=torch.int32).neg_()

    def holds(self, weight: Tensor) -> bool:
        """Whether the memory is what putting int8 [outputs, inputs] would make it."""
        for tile, outputs, block in self._blocks(0, weight):
            if not torch.equal(self._tiles[tile, :, :, outputs], block):
                return False
        return torch.equal(self._sums[: len(weight)], weight.sum(1, dtype=torch.int32).neg_())

    def _blocks(self, first: int, weight: Tensor) -> list[tuple[int, slice, Tensor]]:
        if self._padding:
            weight = torch.nn.functional.pad(weight, (0, self._padding))
        words = weight.view(torch.int32).view(len(weight), -1, TILE // FOUR)
        found = []
        for tile in range(first // TILE, -(-(first + len(weight)) // TILE)):
            start = tile * TILE
            low, high = max(first, start), min(first + len(weight), start + TILE)
            block = words[low - first : high - first].permute(1, 2, 0)
            found.append((tile, slice(low - start, high - start), block))
        return found


def known(packed: Tensor, weight: Tensor) -> bool:
    """Whether `packed`, which oneDNN made from int8 `weight`, is laid out as this module expects."""
    outputs, inputs = weight.shape
    tiles = -(-outputs // TILE), -(-inputs // TILE)
    expected = tiles[0] * TILE * (tiles[1] * TILE + 4)
    if weight.numel() > MOST or torch.ops.mkldnn._nbytes(packed) != expected:
        return False
    return BlockedMatrix(packed, outputs, inputs).holds(weight.contiguous())


def _memory(packed: Tensor) -> Tensor:
    """The bytes behind an opaque tensor, which must outlive them, as int8."""
    size = int(torch.ops.mkldnn._nbytes(packed))
    address = int(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer((ctypes.c_int8 * size).from_address(address), dtype=torch.int8)
