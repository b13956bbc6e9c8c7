"""Few numbers on their way to a device and back, without waiting for what it computes meanwhile.

That takes memory of the host that no page is ever moved of, which is asked for only where there is a CUDA
device: there it is unverified on hardware. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of these numbers; they are there once the device comes to what is asked of it next."""
    if not _is_there(device):
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class ToHost:
    """A tensor on its way to the host. Whoever reads it waits for it, and not for what the device was asked
    to do after it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensor = tensor
        if _is_there(tensor.device):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor = host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[Any]:
        """Its numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[Any] = self._tensor.tolist()
        return numbers


def _is_there(device: torch.device) -> bool:
    """Whether it works by itself, beside the host: not so in tests, where CUDA devices are only imagined."""
    return device.type == "cuda" and torch.cuda.is_available()
