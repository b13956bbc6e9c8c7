"""The token table, and the output projection of models that tie the two. Knows no vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.placement import Placement, empty, placed


class Embedding(nn.Module):
    """[T] ids -> fp32 [T, width]; the table is kept in fp16 where matrices are 16-bit."""

    def __init__(self, vocabulary: int, width: int, placement: Placement) -> None:
        super().__init__()
        self._placement = placement
        self.weight = empty(vocabulary, width, dtype=placement.table)
        self.nbytes = vocabulary * width * placement.table.itemsize

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight = placed(tensors["weight"], self._placement)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(torch.float32)

    def project(self, x: Tensor) -> Tensor:
        """Logits against the table itself: [T, width] -> [T, vocabulary]."""
        return F.linear(x, self.weight.to(x.dtype))
