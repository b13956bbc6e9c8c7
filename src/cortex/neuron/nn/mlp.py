"""The gated feed-forward block, gate and up projection fused. Knows nothing of layers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.linear import Linear
from cortex.neuron.nn.parallel import sum_over_ranks
from cortex.neuron.nn.placement import Placement


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, SwiGLU and GEGLU): [T, hidden] -> [T, hidden].

    Of several ranks each has its share of the intermediate width; only the first adds down's bias.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        placement: Placement,
        *,
        bias: bool = False,
        activation: Literal["silu", "gelu_tanh"] = "silu",
    ) -> None:
        super().__init__()
        self._share = placement.share
        self._intermediate = placement.share.divide(intermediate)
        self._is_silu = activation == "silu"
        self.gate_up = Linear(hidden, 2 * self._intermediate, placement, bias=bias)
        self.down = Linear(self._intermediate, hidden, placement, bias=bias and placement.share.rank == 0)

    def forward(self, x: Tensor) -> Tensor:
        return sum_over_ranks(self.part(x), self._share)

    def part(self, x: Tensor) -> Tensor:
        """What this rank's share of the intermediate width adds to the output."""
        both = self.gate_up(x)
        gate = both.narrow(1, 0, self._intermediate)
        gated = F.silu(gate) if self._is_silu else F.gelu(gate, approximate="tanh")
        gated.mul_(both.narrow(1, self._intermediate, self._intermediate))
        down: Tensor = self.down(gated)
        return down
