"""The gated feed-forward block, gate and up projection fused. Knows nothing of layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.linear import Linear
from cortex.neuron.nn.parallel import sum_over_ranks
from cortex.neuron.nn.placement import Placement


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU): [T, hidden] -> [T, hidden].

    Of several ranks each has its share of the intermediate width; only the first adds down's bias.
    """

    def __init__(self, hidden: int, intermediate: int, placement: Placement, *, bias: bool) -> None:
        super().__init__()
        self._share = placement.share
        self._intermediate = placement.share.divide(intermediate)
        self.gate_up = Linear(hidden, 2 * self._intermediate, placement, bias=bias)
        self.down = Linear(self._intermediate, hidden, placement, bias=bias and placement.share.rank == 0)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        gated = F.silu(both.narrow(1, 0, self._intermediate))
        gated.mul_(both.narrow(1, self._intermediate, self._intermediate))
        return sum_over_ranks(self.down(gated), self._share)
