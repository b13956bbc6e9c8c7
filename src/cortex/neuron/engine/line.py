"""The sequences that wait to start, in order: who is next, who is held back for what, who waited too long.

Pure; the clock is given. Knows neither blocks nor how many may run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from cortex.neuron.engine.sequence import Sequence


class Awaited(NamedTuple):
    """Tokens that a running sequence is about to compute; one in line begins with the same ones."""

    by: Sequence
    until: int

    @property
    def is_coming(self) -> bool:
        return bool(self.by.blocks) and self.by.cached < self.until


class Line:
    """A wait counts from when a sequence came, or from when it was held back no more. One whose request has
    another choice that runs already may wait as long as that takes: half of a reply is nobody's.
    """

    def __init__(self, clock: Callable[[], float], max_wait: float | None) -> None:
        """`max_wait` seconds; None for as long as it takes."""
        self._clock = clock
        self.max_wait: Final = max_wait
        self._waiting: deque[Sequence] = deque()
        self._since: dict[Sequence, float] = {}
        """Of those whose wait counts."""
        self._held: dict[Sequence, Awaited] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)
        self._since[sequence] = self._clock()

    def put_first(self, sequence: Sequence) -> None:
        """One that has run, and goes on as soon as there is room."""
        self._waiting.appendleft(sequence)

    def next(self) -> Sequence | None:
        """The first one that is not held back; it stays in line."""
        self._let_go()
        return next((sequence for sequence in self._waiting if sequence not in self._held), None)

    def hold(self, sequence: Sequence, awaited: Awaited) -> None:
        """It lets others pass until that is there, or does not come any more."""
        self._held[sequence] = awaited

    def starts(self, sequence: Sequence) -> None:
        self._leave(sequence)
        for other in self._waiting:
            if other.request_id == sequence.request_id:
                self._since.pop(other, None)

    def drop(self, key: int) -> None:
        for sequence in self._waiting:
            if sequence.key == key:
                self._leave(sequence)
                break

    def take_late(self) -> list[Sequence]:
        """Those that have waited too long, who leave."""
        if self.max_wait is None or not self._waiting:
            return []
        self._let_go()
        oldest = self._clock() - self.max_wait
        late = [
            sequence
            for sequence in self._waiting
            if sequence not in self._held and self._since.get(sequence, oldest) < oldest
        ]
        for sequence in late:
            self._leave(sequence)
        return late

    def _leave(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._since.pop(sequence, None)
        self._held.pop(sequence, None)

    def _let_go(self) -> None:
        """Those whose awaited tokens are there, or will not come; now their wait counts."""
        for sequence in [one for one, awaited in self._held.items() if not awaited.is_coming]:
            del self._held[sequence]
            if sequence in self._since:
                self._since[sequence] = self._clock()
