"""Where parameters live, in which form, and which share of them: the one decision behind a load's options.

Knows no layer; layers ask it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Dtype = Literal["packed16", "int8", "int4", "float32"]


class Share(NamedTuple):
    """This rank's part of a model that several ranks hold together."""

    rank: int = 0
    world: int = 1

    def of(self, size: int, unit: int = 1) -> tuple[int, int]:
        """The rows [start, stop) of `size` that are this rank's, in whole units of `unit` rows.

        Where there are fewer units than ranks, neighbouring ranks have the same one.
        """
        first = self.rank * (size // unit) // self.world
        return first * unit, (first + self.divide(size // unit)) * unit

    def divide(self, size: int) -> int:
        """A rank's part of `size` units; whoever planned the load has made sure that it can be divided."""
        return max(1, size // self.world)

    def spread(self, size: int) -> tuple[int, int]:
        """The rows [start, stop) of `size` that are this rank's where the parts may differ by one."""
        return self.rank * size // self.world, (self.rank + 1) * size // self.world


class Placement(NamedTuple):
    """`packed16`, `int8` and `int4` keep matrices in 16, 8 and 4 bits and everything else in fp32; `float32`
    keeps and computes fp32. There is no `int4` on CPUs.

    CUDA is written for and unverified on hardware; `packed16` is plain fp16 there, in products too.
    """

    device: torch.device
    dtype: Dtype
    share: Share = Share()

    @property
    def table(self) -> torch.dtype:
        """What tables that are looked up in are kept in."""
        return torch.float32 if self.dtype == "float32" else torch.float16

    @property
    def packed(self) -> bool:
        """Matrices of linear layers go into a kernel's own layout, which nothing else can read."""
        return self.dtype != "float32" and self.device.type == "cpu"

    @property
    def quantised(self) -> bool:
        """Matrices of linear layers are quantised on their way to the device."""
        return self.dtype in ("int8", "int4") and self.device.type != "cpu"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """A parameter on the meta device. Its dtype is the one in which the loader hands it over."""
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def placed(host: torch.Tensor, placement: Placement) -> torch.nn.Parameter:
    return torch.nn.Parameter(host.to(placement.device), requires_grad=False)
