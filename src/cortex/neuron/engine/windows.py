"""Keys and values of layers with a window: a slot of rows for each running sequence, and windows kept on the
host.

However long a sequence becomes, such layers hold a window of it and what is computed now. Whoever plans the
steps owns the slots. Knows no sequences and no model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cortex.neuron.engine.cache import HOST, LayerRuns, copy_pieces, reserved
from cortex.neuron.nn.plan import NearSlots, Segment, StateCopy


class WindowPool:
    """`working` slots on the device and, numbered on from them, `kept` windows on the host, of all `layers`.

    A rank has its share of the heads. Memory of the host is taken as rows are first written to.
    """

    def __init__(
        self,
        sizes: NearSlots,
        layers: int,
        working: int,
        kept: int,
        kv_heads: int,
        width: int,
        device: torch.device,
    ) -> None:
        self.sizes = sizes
        self._working = working
        self._slots = reserved((layers, 2, kv_heads, working * sizes.rows, width), device)
        self._kept = reserved((kept, layers, 2, kv_heads, sizes.window, width), HOST, at_once=True)
        self.stored = (self._slots, self._kept)
        self.nbytes = sum(part.nbytes for part in self.stored)
        self.layers = [LayerRuns(layer, near=True) for layer in self._slots.unbind()]

    def copy(self, copies: Iterable[StateCopy]) -> None:
        """Windows of every layer, one order after the other."""
        for copy in copies:
            copy_pieces(self._at(copy.target, copy.tokens), self._at(copy.source, copy.tokens))

    def begin(self, segments: Iterable[Segment]) -> None:
        """Of a sequence that begins another stretch, the window behind it moves to where its slot begins."""
        window, stride = self.sizes.window, self.sizes.stride
        for part in segments:
            if self.sizes.begins(part.start):
                behind = min(window, part.start)
                source = self.sizes.end(part.slot, part.start) - behind
                target = part.slot * self.sizes.rows + window - behind
                for at in range(0, behind, stride):  # further than this they would overlap
                    count = min(stride, behind - at)
                    rows = self._slots.narrow(3, source + at, count)
                    self._slots.narrow(3, target + at, count).copy_(rows)

    def _at(self, slot: int, tokens: int) -> tuple[Tensor, ...]:
        """What a slot holds of the window after so many tokens: of each layer's keys and values, head by
        head, [n, width].
        """
        count = min(self.sizes.window, tokens)
        if slot < self._working:
            rows = self._slots.narrow(3, self.sizes.end(slot, tokens) - count, count)
        else:
            rows = self._kept.select(0, slot - self._working).narrow(3, self.sizes.window - count, count)
        return rows.flatten(0, 2).unbind()
