"""Step plans on their way from rank 0 to the ranks that compute with it, over torch.distributed.

Rank 0 alone reads, schedules and samples; the others execute what they are sent. Knows bytes and plans,
neither the model nor where orders come from.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Final

import msgspec
import torch
import torch.distributed as dist

from cortex.neuron.nn.placement import Share
from cortex.neuron.nn.plan import StepPlan

HEAD: Final = 4096
"""Bytes of the first message: the length, and as much of the plan as fits; most plans do."""
_LENGTH: Final = 8
WATCHDOG_S: Final = 60.0
"""A collective that hangs for so long ends the rank, and with it the model."""

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(StepPlan)


def join(share: Share, meeting: str, *, device: torch.device) -> None:
    """Meet the other ranks at `meeting`, an address such as tcp://127.0.0.1:4711 or file:///tmp/x."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=meeting,
        rank=share.rank,
        world_size=share.world,
        timeout=datetime.timedelta(seconds=WATCHDOG_S),
    )


def leave() -> None:
    dist.destroy_process_group()


class Ranks:
    """The way to the other ranks of a model; with none, plans go nowhere."""

    def __init__(self, share: Share, device: torch.device) -> None:
        self._share = share
        self._device = device

    @property
    def others(self) -> int:
        return self._share.world - 1

    def tell(self, plan: StepPlan) -> None:
        """From rank 0: what all compute next."""
        if self.others:
            self._send(_encoder.encode(plan))

    def end(self) -> None:
        """From rank 0: there are no more plans."""
        if self.others:
            self._send(b"")

    def plans(self) -> Iterator[StepPlan]:
        """On the other ranks: plan after plan until the end."""
        while body := self._receive():
            yield _decoder.decode(body)

    def _send(self, body: bytes) -> None:
        data = torch.frombuffer(bytearray(len(body).to_bytes(_LENGTH, "little") + body), dtype=torch.uint8)
        head = torch.zeros(HEAD, dtype=torch.uint8)
        first = data[:HEAD]
        head[: len(first)] = first
        dist.broadcast(head.to(self._device), 0)
        if len(data) > HEAD:
            dist.broadcast(data[HEAD:].to(self._device), 0)

    def _receive(self) -> bytes:
        head = torch.zeros(HEAD, dtype=torch.uint8, device=self._device)
        dist.broadcast(head, 0)
        known = bytes(head.tolist())
        end = _LENGTH + int.from_bytes(known[:_LENGTH], "little")
        if end > HEAD:
            rest = torch.zeros(end - HEAD, dtype=torch.uint8, device=self._device)
            dist.broadcast(rest, 0)
            known += bytes(rest.tolist())
        return known[_LENGTH:end]
