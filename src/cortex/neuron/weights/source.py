"""From which rows of which tensors a parameter is made: how a model declares its layout.

Fused projections, shards of a tensor and re-ordered rotary rows are all such declarations; the
loader carries them out. Knows no torch.
"""

from __future__ import annotations

import msgspec


class Piece(msgspec.Struct, frozen=True):
    """Rows [start, stop) of one tensor (all by default); a row of a vector is one element.

    `columns` are those that are taken of each row, (start, stop), all by default.
    `pairs` is 0, or the rows of one attention head whose rotary halves are stored one after the
    other: of each head, row i and row i + pairs/2 then become rows 2i and 2i + 1.
    """

    tensor: str
    start: int = 0
    stop: int | None = None
    pairs: int = 0
    columns: tuple[int, int] | None = None


Source = tuple[Piece, ...]
"""The pieces of one parameter, top row first."""


def whole(tensor: str) -> Source:
    return (Piece(tensor),)
