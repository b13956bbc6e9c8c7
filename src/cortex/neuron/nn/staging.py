"""The memory in which weights lie on their way into a packed form, kept from one matrix for the next.

To fetch its pages from the system for each matrix anew costs a load as much as dequantising does. Knows
nothing of matrices.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Staging:
    """Of all that is free one piece is kept: those who load take turns, and each finds it. For any number of
    threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Tensor | None = None

    @contextmanager
    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """A tensor with whatever is in it, on the host, to be forgotten at the end."""
        size = torch.Size(shape).numel() * dtype.itemsize
        piece = self._free(size)
        if piece is None:
            piece = torch.empty(size, dtype=torch.uint8)
        try:
            yield piece[:size].view(dtype).view(shape)
        finally:
            self._keep(piece)

    def _free(self, size: int) -> Tensor | None:
        """What was kept, if it is large enough; if not, it goes before there is another one."""
        with self._lock:
            piece, self._kept = self._kept, None
        return None if piece is None or piece.nbytes < size else piece

    def _keep(self, piece: Tensor) -> None:
        with self._lock:
            if self._kept is None or self._kept.nbytes < piece.nbytes:
                self._kept = piece

    @property
    def kept_bytes(self) -> int:
        with self._lock:
            return 0 if self._kept is None else self._kept.nbytes

    def release(self) -> None:
        """Frees what is kept."""
        with self._lock:
            self._kept = None


STAGING = Staging()
"""Of this process, which loads one model at a time."""
