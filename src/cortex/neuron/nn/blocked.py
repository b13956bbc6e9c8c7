"""Writes int8 weights straight into the memory of oneDNN's packed matrices, where their layout is known.

oneDNN's own reorder into this layout is its slowest generic one, 3.5 ns a weight. So it packs only the first
matrix of a shape; if that is byte for byte what is expected here, and differs enough within itself for that
to mean something, others are written into copies of it. Knows neither scales nor products.
Layout: BA16a64b4a of oneDNN's dnnl_types.h, followed by what zero points of activations would take.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

TILE: Final = 64
"""Inputs and outputs of a block; both dimensions are padded to whole ones."""
FOUR: Final = 4
"""Inputs of one output that lie side by side."""
SAMPLE: Final = 128
"""Outputs by which is judged whether a matrix would look another way in another layout."""


class BlockedMatrix:
    """The memory of one packed matrix [outputs, inputs]."""

    def __init__(self, packed: Tensor, outputs: int, inputs: int) -> None:
        self.packed = packed
        self._padding = -inputs % TILE
        tiles = -(-outputs // TILE), (inputs + self._padding) // TILE
        memory = _memory(packed)
        size = tiles[0] * tiles[1] * TILE * TILE
        # Per tile of outputs and tile of inputs: 16 runs of inputs, each four of them for 64 outputs.
        self._tiles = memory[:size].view(torch.int32).view(*tiles, TILE // FOUR, TILE)
        self._sums = memory[size : size + 4 * TILE * tiles[0]].view(torch.int32)

    def put(self, first: int, weight: Tensor) -> None:
        """int8 [n, inputs], contiguous, as outputs `first` and on."""
        for tiles, outputs, block in self._blocks(first, weight):
            self._tiles[tiles, :, :, outputs].copy_(block)
        torch.neg(weight.sum(1, dtype=torch.int32), out=self._sums[first : first + len(weight)])

    def holds(self, weight: Tensor) -> bool:
        """Whether the memory is what putting int8 [outputs, inputs] would make it."""
        for first in range(0, len(weight), TILE):
            for tiles, outputs, block in self._blocks(first, weight[first : first + TILE]):
                if not torch.equal(self._tiles[tiles, :, :, outputs], block):
                    return False
        return torch.equal(self._sums[: len(weight)], weight.sum(1, dtype=torch.int32).neg_())

    def _blocks(self, first: int, weight: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Tiles of outputs, outputs within each, and what belongs there [tiles, inputs / 64, 16, outputs]."""
        if self._padding:
            weight = torch.nn.functional.pad(weight, (0, self._padding))
        words = weight.view(torch.int32).view(len(weight), -1, TILE // FOUR)
        last = first + len(weight)
        whole = range(-(-first // TILE), last // TILE)
        if whole:
            inner = words[whole.start * TILE - first : whole.stop * TILE - first]
            block = inner.view(len(whole), TILE, *inner.shape[1:]).permute(0, 2, 3, 1)
            yield slice(whole.start, whole.stop), slice(0, TILE), block
        for tile in {first // TILE, last // TILE} - set(whole):
            start = tile * TILE
            low, high = max(first, start), min(last, start + TILE)
            if low < high:
                block = words[low - first : high - first].permute(1, 2, 0).unsqueeze(0)
                yield slice(tile, tile + 1), slice(low - start, high - start), block


def known(packed: Tensor, weight: Tensor) -> bool:
    """Whether `packed`, which oneDNN made from int8 `weight`, is laid out as this module expects. False too
    for a weight that would look alike in other layouts.
    """
    outputs, inputs = weight.shape
    tiles = -(-outputs // TILE), -(-inputs // TILE)
    expected = tiles[0] * TILE * (tiles[1] * TILE + 4)
    if torch.ops.mkldnn._nbytes(packed) != expected:
        return False
    return tells_places_apart(weight) and BlockedMatrix(packed, outputs, inputs).holds(weight.contiguous())


def tells_places_apart(weight: Tensor) -> bool:
    """Whether most of what a layout moves about differs: the inputs of a word, and the words, of outputs that
    are spread over an int8 matrix.
    """
    outputs, inputs = weight.shape
    some = weight[torch.linspace(0, outputs - 1, min(outputs, SAMPLE)).long()]
    words = torch.nn.functional.pad(some, (0, -inputs % FOUR)).view(torch.int32)
    ordered = words.flatten().sort().values
    distinct = 1 + int(ordered[1:].ne(ordered[:-1]).sum())
    neighbours = some[:, 1:].ne(some[:, :-1])
    return 2 * distinct > words.numel() and 2 * int(neighbours.sum()) >= neighbours.numel()


def _memory(packed: Tensor) -> Tensor:
    """The bytes behind an opaque tensor, which must outlive them, as int8."""
    size = int(torch.ops.mkldnn._nbytes(packed))
    address = int(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer((ctypes.c_int8 * size).from_address(address), dtype=torch.int8)
