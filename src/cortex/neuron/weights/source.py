"""From which rows of which tensors a parameter is made: how a model declares its layout.

Fused projections, shards of a tensor and re-ordered rotary rows are all such declarations; the
loader carries them out. Knows no torch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Change = Literal["", "one_plus", "minus_exp"]
"""What is done to the numbers: nothing; 1 + w, for norms that are stored around zero; -exp(w)."""


class Piece(msgspec.Struct, frozen=True):
    """Rows [start, stop) of one tensor (all by default); a row of a vector is one element.

    `columns` are those that are taken of each row, (start, stop), all by default.
    `pairs` is 0, or the rows of one attention head whose rotary halves are stored one after the
    other: of each head, row i and row i + pairs/2 then become rows 2i and 2i + 1.
    `of` is how many rows the tensor must have in all, or columns where `columns` takes some of them; None
    says that whatever is there will do.
    A tensor of more than two dimensions has as rows all that its last dimension has not.
    """

    tensor: str
    start: int = 0
    stop: int | None = None
    pairs: int = 0
    columns: tuple[int, int] | None = None
    change: Change = ""
    of: int | None = None


Source = tuple[Piece, ...]
"""The pieces of one parameter, top row first."""


def whole(tensor: str) -> Source:
    return (Piece(tensor),)
