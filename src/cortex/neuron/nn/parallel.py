"""Tensor parallelism between the ranks of a model: the collectives that layers need.

Without ranks nothing happens. Knows no layers and not how ranks found each other.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cortex.neuron.nn.placement import Share

_GONE: Final = ("closed by peer", "reset by peer", "broken pipe", "end of file", "exiting prematurely")
_SILENT: Final = ("timed out", "wait timeout", "timeout caused pair closure")
"""What gloo and NCCL say of a rank that has ended, and of one that does not take part."""

_waits: Final[list[datetime.timedelta]] = []


class RankGone(Exception):
    """Another rank of the model has ended: what all compute together cannot be had any more."""


class RankSilent(RankGone):
    """Another rank does not take part for longer than the watchdog allows. The text follows "it"."""


def be_patient(*seconds: float) -> None:
    """From now on collectives on the CPU wait so long for other ranks, one wait after the other: what was
    stopped as a whole, with the clock going on, has a second one to go on in. Without any they wait as long
    as the process group says.
    """
    _waits[:] = [datetime.timedelta(seconds=wait) for wait in seconds]


def sum_over_ranks(partial: Tensor, share: Share) -> Tensor:
    """The sum of every rank's `partial`, in place: after a layer that was split along its inputs.

    Raises RankGone, RankSilent, RuntimeError.
    """
    if share.world > 1:
        with others_watched():
            if partial.device.type == "cpu":
                _complete(dist.all_reduce(partial, async_op=True))
            else:
                dist.all_reduce(partial)
    return partial


def join_columns(part: Tensor, columns: int, share: Share) -> Tensor:
    """After a layer that was split along its outputs, `Share.spread` over the ranks: on rank 0 all of them,
    [T, columns]; on the others their own `part`, [T, own].

    Raises RankGone, RankSilent, RuntimeError.
    """
    if share.world == 1:
        return part
    own = [share._replace(rank=rank).spread(columns) for rank in range(share.world)]
    widest = max(stop - start for start, stop in own)
    part = F.pad(part, (0, widest - part.shape[1]))
    parts = None if share.rank else [torch.empty_like(part) for _ in own]
    with others_watched():
        if part.device.type == "cpu":
            _complete(dist.gather(part, parts, async_op=True))
        else:
            dist.gather(part, parts)
    if parts is None:
        return part
    return torch.cat([one[:, : stop - start] for one, (start, stop) in zip(parts, own, strict=True)], 1)


@contextlib.contextmanager
def others_watched() -> Iterator[None]:
    """What torch.distributed says inside of the end or the silence of another rank is raised as RankGone or
    RankSilent. Every other RuntimeError is the failure of this rank.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error).lower()
        if any(words in said for words in _GONE):
            raise RankGone(str(error)) from error
        if any(words in said for words in _SILENT):
            raise RankSilent("waited for another rank in vain") from error
        raise


def _complete(work: dist.Work | None) -> None:
    assert work is not None, "of no group"
    for wait in _waits[:-1]:
        try:
            work.wait(wait)
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                raise
        else:
            return
    work.wait(*_waits[-1:])
