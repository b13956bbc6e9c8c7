"""What a module is filled from: host tensors by name, whole or, where it suits, some rows at a time.

A matrix that is packed row by row never needs to exist in fp32. Knows no files; the loader offers rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor


class Rows(Protocol):
    """A tensor, or what can be sliced like one along its first dimension."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Tensor:
        """These rows, read and converted now."""


@runtime_checkable
class RowSource(Protocol):
    """A mapping of tensors that can also be read in part."""

    def rows(self, name: str) -> Rows: ...


def rows(tensors: Mapping[str, Tensor], name: str) -> Rows:
    """A parameter by the part of its rows where `tensors` has that, else the tensor itself."""
    return tensors.rows(name) if isinstance(tensors, RowSource) else tensors[name]
