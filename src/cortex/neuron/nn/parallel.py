"""Tensor parallelism between the ranks of a model: the one collective that layers need.

Without ranks nothing happens. Knows no layers and not how ranks found each other.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from cortex.neuron.nn.placement import Share


def sum_over_ranks(partial: Tensor, share: Share) -> Tensor:
    """The sum of every rank's `partial`, in place: after a layer that was split along its inputs."""
    if share.world > 1:
        dist.all_reduce(partial)
    return partial
