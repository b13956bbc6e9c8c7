"""The gated feed-forward block, gate and up projection fused. Knows nothing of layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cortex.neuron.nn.linear import Linear
from cortex.neuron.nn.placement import Placement


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU): [T, hidden] -> [T, hidden]."""

    def __init__(self, hidden: int, intermediate: int, placement: Placement, *, bias: bool) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * intermediate, placement, bias=bias)
        self.down = Linear(intermediate, hidden, placement, bias=bias)
        self._intermediate = intermediate

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        gated = F.silu(both.narrow(1, 0, self._intermediate))
        gated.mul_(both.narrow(1, self._intermediate, self._intermediate))
        return self.down(gated)  # type: ignore[no-any-return]
