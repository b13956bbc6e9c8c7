"""Tensor parallelism between the ranks of a model: the collectives that layers need.

Without ranks nothing happens. Knows no layers and not how ranks found each other.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from cortex.neuron.nn.placement import Share


class RankGone(Exception):
    """Another rank of the model has ended: what all compute together cannot be had any more."""


class RankSilent(RankGone):
    """Another rank does not take part for longer than the watchdog allows. The text follows "it"."""


def sum_over_ranks(partial: Tensor, share: Share) -> Tensor:
    """The sum of every rank's `partial`, in place: after a layer that was split along its inputs.

    Raises RankGone, RankSilent.
    """
    if share.world > 1:
        try:
            dist.all_reduce(partial)
        except RuntimeError as error:
            raise lost(error) from error
    return partial


def lost(error: RuntimeError) -> RankGone:
    """What an error of torch.distributed means."""
    if "timed out" in str(error).lower():
        return RankSilent("waited for another rank in vain")
    return RankGone(str(error))
