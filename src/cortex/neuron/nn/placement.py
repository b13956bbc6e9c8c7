"""Where parameters live and in which form: the one decision behind `dtype` and `device`.

Knows no layer; layers ask it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Dtype = Literal["float32", "packed16"]


class Placement(NamedTuple):
    """`packed16` keeps matrices in fp16 and computes in fp32; `float32` keeps and computes fp32.

    CUDA is written for and unverified on hardware.
    """

    device: torch.device
    dtype: Dtype

    @property
    def matrix(self) -> torch.dtype:
        """What a matrix is kept in."""
        return torch.float16 if self.dtype == "packed16" else torch.float32

    @property
    def prepacked(self) -> bool:
        """Matrices of linear layers go into FBGEMM's own layout, which nothing else can read."""
        return self.dtype == "packed16" and self.device.type == "cpu"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """A parameter on the meta device. Its dtype is the one in which the loader hands it over."""
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def placed(host: torch.Tensor, placement: Placement) -> torch.nn.Parameter:
    return torch.nn.Parameter(host.to(placement.device), requires_grad=False)
