"""The states of recurrent layers: a slot for each running sequence, and host memory for checkpoints of them.

Whoever plans the steps owns the slots. Knows no sequences and no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cortex.neuron.engine.cache import HOST, copy_pieces, reserved
from cortex.neuron.models.shape import DeltaShape
from cortex.neuron.nn.placement import Share
from cortex.neuron.nn.plan import Segment, StateCopy


class LayerSlots(NamedTuple):
    """One layer's states, a `LayerState`."""

    conv: Tensor
    memory: Tensor


class StatePool:
    """`working` slots on the device and, numbered on from them, `kept` ones on the host, of `layers` layers.

    A rank has its share of the heads. Host memory is taken as slots are first written to.
    """

    def __init__(
        self, sizes: DeltaShape, layers: int, working: int, kept: int, device: torch.device, share: Share
    ) -> None:
        # A token's channels lie side by side, as the projection gives them.
        conv = (sizes.kernel - 1, share.divide(sizes.channels))
        memory = (share.divide(sizes.value_heads), sizes.key_width, sizes.value_width)
        self._working = working
        # Slots come first where they are copied, so that a checkpoint lies in one piece.
        self._slots = [torch.zeros(layers, working, *size, device=device) for size in (conv, memory)]
        self._kept = [reserved((kept, layers, *size), HOST, at_once=True) for size in (conv, memory)]
        self.stored = (*self._slots, *self._kept)
        self.nbytes = sum(part.nbytes for part in self.stored)
        self.layers = [
            LayerSlots(conv.transpose(1, 2), memory) for conv, memory in zip(*self._slots, strict=True)
        ]

    def copy(self, copies: Iterable[StateCopy]) -> None:
        """States of every layer, one order after the other."""
        for copy in copies:
            for which in range(2):
                copy_pieces(self._at(which, copy.target), self._at(which, copy.source))

    def begin(self, segments: Iterable[Segment]) -> None:
        """Sequences whose first token is in the step have nothing behind them."""
        for part in segments:
            if not part.start:
                for which in range(2):
                    self._at(which, part.slot).zero_()

    def _at(self, which: int, slot: int) -> Tensor:
        """A slot's convolutions (0) or memories (1), [layers, ...]."""
        if slot < self._working:
            return self._slots[which].select(1, slot)
        return self._kept[which].select(0, slot - self._working)
