"""What one step of the engine computes: ragged packed tokens of any number of sequences.

Plain numbers, made by the scheduler on rank 0 and small enough to send to the other ranks. Knows no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

NO_SLOT: Final = -1
Run = tuple[int, int]
"""Consecutive rows of the cache: the first one, and how many."""


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive tokens of one sequence: the first one's position, how many, and where the cache has the
    sequence's tokens, from its beginning to the end of this segment. `slot` is where its state is, in models
    with layers that have one.
    """

    start: int
    length: int
    runs: list[Run]
    slot: int = NO_SLOT

    @property
    def end(self) -> int:
        """Tokens of the sequence that the cache holds once the segment is computed."""
        return self.start + self.length

    @property
    def last_row(self) -> int:
        """Where the cache has the segment's last token."""
        first, count = self.runs[-1]
        return first + count - 1

    def pages(self, page: int) -> list[int]:
        """The pages of `page` rows in which the sequence lies, where runs are made of whole pages."""
        return [row // page for first, count in self.runs for row in range(first, first + count, page)]


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """Rows of the cache to copy before anything is computed."""

    source: int
    target: int
    count: int


class StateCopy(msgspec.Struct, frozen=True, array_like=True):
    """The state after `tokens` tokens, to copy from one slot to another before anything is computed."""

    source: int
    target: int
    tokens: int


class NearSlots(NamedTuple):
    """Where layers with a window have a sequence: in a slot of rows of its own, which hold one stretch of
    `stride` tokens and before it the last `window` tokens that came before the stretch.

    A segment lies in one stretch. Before the first token of the next one is computed, the window that it has
    behind it moves to the beginning of the slot: a sequence always lies in one piece.
    """

    window: int
    stride: int

    @property
    def rows(self) -> int:
        """Of a slot."""
        return self.window + self.stride

    def origin(self, slot: int, position: int) -> int:
        """The row that the sequence's first token has, or would have, while `position` is computed."""
        return slot * self.rows + self.window - position // self.stride * self.stride

    def end(self, slot: int, tokens: int) -> int:
        """The row after the last of `tokens` tokens, as that was computed."""
        return self.origin(slot, tokens - 1) + tokens

    def begins(self, position: int) -> bool:
        """Whether a segment that starts there is the first of another stretch than the first one."""
        return position > 0 and position % self.stride == 0


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """`ids` are all segments' tokens one after the other; `wanted` are the rows whose logits count, in their
    order. `copies` are of the cache, `states` of slots; a sequence whose first token is among the ids has no
    state yet.

    A step may instead have a chunk of a long prompt pass `layers` layers: a new one, its `chunk`, from the
    first layer on, or the one that is on its way. Its logits come once it is through.

    One that `follows` is made before anybody knows what the step before it has sampled: its ids are those
    tokens, of these rows of it, and the ones that it says are of no meaning.
    """

    ids: list[int]
    segments: list[Segment]
    wanted: list[int]
    copies: list[Copy] = []
    states: list[StateCopy] = []
    chunk: StepPlan | None = None
    layers: int = 0
    follows: list[int] = []

    @property
    def positions(self) -> list[int]:
        return [position for part in self.segments for position in range(part.start, part.end)]

    def asked(self) -> StepPlan:
        """The wanted rows alone, to look at what the cache has once all are stored in it."""
        found: list[Segment] = []
        wanted = self.wanted
        rows = first = 0
        for part in self.segments:
            rows += part.length
            last = bisect_left(wanted, rows, first)
            for start, length in _stretches(row + part.end - rows for row in wanted[first:last]):
                runs = parts(part.runs, 0, start + length)
                found.append(Segment(start, length, runs, part.slot))
            first = last
        return StepPlan([self.ids[row] for row in wanted], found, [*range(len(wanted))])


def _stretches(numbers: Iterable[int]) -> list[Run]:
    """The first of those that follow each other, and how many do."""
    found: list[Run] = []
    for number in numbers:
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def parts(runs: list[Run], start: int, end: int) -> list[Run]:
    """The rows of the tokens [start, end) of a sequence that lies in `runs`."""
    found = []
    at = 0
    for first, count in runs:
        low, high = max(start, at), min(end, at + count)
        if low < high:
            found.append((first + low - at, high - low))
        at += count
    return found
