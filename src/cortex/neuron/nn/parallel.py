"""Tensor parallelism between the ranks of a model: the collectives that layers need.

Without ranks nothing happens. Knows no layers and not how ranks found each other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

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


def join_columns(part: Tensor, columns: int, share: Share) -> Tensor:
    """After a layer that was split along its outputs, `Share.spread` over the ranks: on rank 0 all of them,
    [T, columns]; on the others their own `part`, [T, own].

    Raises RankGone, RankSilent.
    """
    if share.world == 1:
        return part
    own = [share._replace(rank=rank).spread(columns) for rank in range(share.world)]
    widest = max(stop - start for start, stop in own)
    part = F.pad(part, (0, widest - part.shape[1]))
    parts = None if share.rank else [torch.empty_like(part) for _ in own]
    try:
        dist.gather(part, parts)
    except RuntimeError as error:
        raise lost(error) from error
    if parts is None:
        return part
    return torch.cat([one[:, : stop - start] for one, (start, stop) in zip(parts, own, strict=True)], 1)


def lost(error: RuntimeError) -> RankGone:
    """What an error of torch.distributed means."""
    if "timed out" in str(error).lower():
        return RankSilent("waited for another rank in vain")
    return RankGone(str(error))
