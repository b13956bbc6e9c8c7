"""A mixture of experts: a router that chooses a few gated MLPs for each token, and one that all tokens take.

Only experts that some token of the step has chosen run, each on its tokens at once. Knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.mlp import GatedMLP
from cortex.neuron.nn.parallel import sum_over_ranks
from cortex.neuron.nn.placement import Placement, Share, empty, placed


class ExpertSizes(NamedTuple):
    """`experts` of the width `intermediate`, `active` of them for each token. `normalised`: a token's
    weights sum to 1. `shared` is the width of the expert that all tokens take, 0 for none; its gate's weight
    comes as a vector if `flat_gate`."""

    hidden: int
    experts: int
    active: int
    intermediate: int
    normalised: bool
    shared: int = 0
    flat_gate: bool = False


class Projection(nn.Module):
    """x Wᵀ, whatever form other matrices have: fp32 [T, hidden] -> fp32 [T, outputs]. With `flat`, the weight
    of the one output comes as a vector. With `double` it is computed in fp64: once rounded, the product is
    then the same in whichever order it was summed, for all practical purposes."""

    def __init__(
        self, hidden: int, outputs: int, placement: Placement, *, flat: bool = False, double: bool = False
    ) -> None:
        super().__init__()
        self._placement = placement
        self._shape = (outputs, hidden)
        self._dtype = torch.float64 if double else torch.float32
        self.weight = empty(hidden) if flat else empty(outputs, hidden)
        self.nbytes = self._dtype.itemsize * hidden * outputs

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight = placed(tensors["weight"].view(self._shape).to(self._dtype), self._placement)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self._dtype), self.weight).to(x.dtype)


class Experts(nn.Module):
    """Σ p_e expert_e(x) over the `active` largest of p = softmax(router(x)) (Shazeer et al. 2017, without
    noise), and where there is a shared expert, sigmoid(shared_gate(x)) shared(x) (Qwen2-MoE): [T, hidden] ->
    [T, hidden].

    Of several ranks each has its share of the experts by index, and of the shared one's intermediate width.
    Each routes for itself, perhaps with another number of threads, and all must choose the same: hence their
    routers' fp64, which one rank has no use for.
    """

    def __init__(self, sizes: ExpertSizes, placement: Placement) -> None:
        super().__init__()
        self._share = placement.share
        self._sizes = sizes
        self._first, last = placement.share.of(sizes.experts)
        alone = placement._replace(share=Share())
        together = placement.share.world > 1
        self.router = Projection(sizes.hidden, sizes.experts, placement, double=together)
        count = last - self._first
        self._experts = tuple(GatedMLP(sizes.hidden, sizes.intermediate, alone) for _ in range(count))
        self.experts = nn.ModuleList(self._experts)
        self.shared = GatedMLP(sizes.hidden, sizes.shared, placement) if sizes.shared else None
        self.shared_gate = (
            Projection(sizes.hidden, 1, placement, flat=sizes.flat_gate) if sizes.shared else None
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(self._sizes.active)
        if self._sizes.normalised:
            weights = weights / weights.sum(-1, True)
        if self.shared is None or self.shared_gate is None:
            total = torch.zeros_like(x)
        else:
            total = self.shared.part(x).mul_(torch.sigmoid(self.shared_gate(x)))
        if x.shape[0] == 1:
            for expert, scale in self._of_one(weights, chosen):
                total.add_(expert.part(x).mul_(scale))
        else:
            for expert, rows, scales in self._of_many(weights, chosen):
                total.index_add_(0, rows, expert.part(x.index_select(0, rows)).mul_(scales))
        return sum_over_ranks(total, self._share)

    def _of_one(self, weights: Tensor, chosen: Tensor) -> list[tuple[GatedMLP, float]]:
        """The same as `_of_many` for one row, with less to do."""
        choices = sorted(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))
        own = range(self._first, self._first + len(self._experts))
        return [(self._experts[index - self._first], weight) for index, weight in choices if index in own]

    def _of_many(self, weights: Tensor, chosen: Tensor) -> list[tuple[GatedMLP, Tensor, Tensor]]:
        """This rank's experts that were chosen, in their order; the rows that did; their weights [n, 1]."""
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        rows = order.div(self._sizes.active, rounding_mode="floor")
        scales = weights.flatten().index_select(0, order).unsqueeze(1)
        counts = torch.bincount(flat, minlength=self._sizes.experts).tolist()
        at = sum(counts[: self._first])
        found = []
        for expert, count in zip(self._experts, counts[self._first :], strict=False):
            if count:
                found.append((expert, rows.narrow(0, at, count), scales.narrow(0, at, count)))
            at += count
        return found
