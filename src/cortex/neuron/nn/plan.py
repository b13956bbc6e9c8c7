"""What one step of the engine computes: ragged packed tokens of any number of sequences.

Plain numbers, made by the scheduler and small enough to send to other ranks. Knows no torch.
"""

from __future__ import annotations

import msgspec


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive tokens of one sequence: its cache slot, the first one's position, how many."""

    slot: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """Tokens of the sequence that the cache holds once the segment is computed."""
        return self.start + self.length


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """`ids` are all segments' tokens one after the other; `wanted` are the rows whose logits count."""

    ids: list[int]
    segments: list[Segment]
    wanted: list[int]

    @property
    def positions(self) -> list[int]:
        return [position for part in self.segments for position in range(part.start, part.end)]
