"""The token table and the output projection, which a model may tie to it. Knows no vocabulary.

Of several ranks each has its rows of both: what it lacks of the table it takes from the sum over all, and
rank 0 gets the logits of all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.linear import Linear, product
from cortex.neuron.nn.parallel import join_columns, sum_over_ranks
from cortex.neuron.nn.placement import Placement, empty, placed


class Embedding(nn.Module):
    """[T] ids -> fp32 [T, width]; the table is kept in fp16 where matrices are 16-bit."""

    def __init__(self, vocabulary: int, width: int, placement: Placement) -> None:
        super().__init__()
        self._placement = placement
        self._vocabulary = vocabulary
        self._first, stop = placement.share.spread(vocabulary)
        self._rows = stop - self._first
        self.weight = empty(self._rows, width, dtype=placement.table)
        self.nbytes = self._rows * width * placement.table.itemsize

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight = placed(tensors["weight"], self._placement)

    def forward(self, ids: Tensor) -> Tensor:
        share = self._placement.share
        if share.world == 1:
            return F.embedding(ids, self.weight).to(torch.float32)
        own = ids - self._first
        missing = (own < 0) | (own >= self._rows)
        found = F.embedding(own.masked_fill_(missing, 0), self.weight).to(torch.float32)
        return sum_over_ranks(found.masked_fill_(missing.unsqueeze(1), 0.0), share)

    def project(self, x: Tensor) -> Tensor:
        """Logits against the table itself: [T, width] -> [T, vocabulary], see `join_columns`."""
        return join_columns(product(x, self.weight), self._vocabulary, self._placement.share)


class Head(nn.Module):
    """Logits: fp32 [T, width] -> fp32 [T, vocabulary], see `join_columns`."""

    def __init__(self, width: int, vocabulary: int, placement: Placement) -> None:
        super().__init__()
        self._share = placement.share
        self._vocabulary = vocabulary
        start, stop = placement.share.spread(vocabulary)
        self.rows = Linear(width, stop - start, placement)

    def forward(self, x: Tensor) -> Tensor:
        return join_columns(self.rows(x), self._vocabulary, self._share)
