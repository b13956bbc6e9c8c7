"""Puts a step together: who decodes, whose prompt goes along with that, which layers a long one passes.

Owns the chunk of a long prompt that is on its way through the layers. Knows neither blocks nor who may run.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.sequence import Sequence
from cortex.neuron.nn.plan import Copy, Segment, StepPlan, parts

SHORT: Final = 4
"""Prompts of at most a chunk divided by this go before longer ones."""
HALF: Final = 0.5
"""Of the time for prefill, what short prompts may take while a long one is on its way."""


class Scheduled(NamedTuple):
    """A plan and whom it is for."""

    plan: StepPlan
    sequences: list[Sequence]
    """All that have a part in the step. The first `decoding` decode, one token each."""
    ends: list[tuple[Sequence, int]]
    """How many tokens of whom the cache holds after it, where that changes."""
    sampled: list[Sequence]
    """Of each row of logits."""
    decoding: int
    prefill: int
    """Tokens of prompts that the step completes."""
    beside: float
    """Work, as `Pace` counts it, of prompts in the pass of those who decode."""
    apart: float
    """Work of the chunk that goes through `plan.layers` layers."""


class _Way(NamedTuple):
    """A chunk of a long prompt on its way through the layers."""

    sequence: Sequence
    length: int
    passed: int
    """Layers behind it."""


class Planner:
    """At this pace, with a cache in blocks of `size` tokens."""

    def __init__(self, pace: Pace, size: int) -> None:
        self._pace = pace
        self._size = size
        self._way: _Way | None = None

    def drop(self, sequence: Sequence) -> bool:
        """No later step has a part for the sequence. Whether a chunk of it was on its way: of its states,
        those of some layers have seen more than the others then.
        """
        under_way = self._way is not None and self._way.sequence is sequence
        if under_way:
            self._way = None
        return under_way

    def plan(self, running: list[Sequence], copies: list[Copy], states: list[Copy], now: float) -> Scheduled:
        """A step of the sequences that run, one at least, after these copies."""
        decoding = [sequence for sequence in running if sequence.in_decode]
        prompts = [sequence for sequence in running if not sequence.in_decode]
        if self._way is not None:
            prompts.remove(self._way.sequence)
        together, chunk = _Pass(self._size, now), _Pass(self._size, now)
        for sequence in decoding:
            together.add(sequence, sequence.missing)
        count = len(decoding)
        left = self._pace.spare(count)
        if not decoding:
            self._fill(together, prompts)
        elif self._pace.knows(count):
            left = self._share(together, chunk, prompts, left)
        prefill = len(together.ids) - count
        layers, apart = 0, 0.0
        if self._way is not None:
            sequence, length, passed = self._way
            apart = self._pace.work(length, sequence.cached)
            layers = self._pace.layers - passed
            if decoding:
                layers = min(layers, self._pace.passes(left, apart))
            together.sequences.append(sequence)
            self._way = _Way(sequence, length, passed + layers)
            if passed + layers == self._pace.layers:
                self._way = None
                prefill += length
                together.ends.append((sequence, sequence.cached + length))
                if length == sequence.missing:
                    together.sampled.append(sequence)
        own = StepPlan(chunk.ids, chunk.segments, chunk.wanted) if chunk.ids else None
        plan = StepPlan(
            together.ids, together.segments, together.wanted, copies, states, chunk=own, layers=layers
        )
        work = self._pace.work_beside if decoding else self._pace.work
        beside = sum(work(part.length, part.start) for part in together.segments[count:])
        return Scheduled(
            plan, together.sequences, together.ends, together.sampled, count, prefill, beside, apart
        )

    def _fill(self, together: _Pass, prompts: list[Sequence]) -> None:
        """Nobody decodes: prompts get all that a step takes, short ones first."""
        most = self._pace.most
        for sequence in sorted(prompts, key=lambda prompt: prompt.piece > most // SHORT):
            length = min(sequence.piece, most - len(together.ids))
            if length:
                together.add(sequence, length)

    def _share(self, together: _Pass, chunk: _Pass, prompts: list[Sequence], seconds: float) -> float:
        """Prompts that are short enough go along with those who decode, and of the others the first one sets
        out on a way of its own. What is left of the seconds for prefill.
        """
        left = seconds if self._way is None else HALF * seconds
        kept = seconds - left
        for sequence in prompts:
            cost = self._pace.beside(self._pace.work_beside(sequence.piece, sequence.cached))
            if cost is not None and cost <= left:
                left -= cost
                together.add(sequence, sequence.piece)
            elif self._way is None:
                length = self._pace.chunk(seconds, sequence.piece, sequence.cached)
                chunk.add(sequence, length)
                self._way = _Way(sequence, length, 0)
        return left + kept


class _Pass:
    """Tokens that go through the model together, and whose they are."""

    def __init__(self, size: int, now: float) -> None:
        self._size = size
        self._now = now
        self.ids: list[int] = []
        self.segments: list[Segment] = []
        self.wanted: list[int] = []
        self.sequences: list[Sequence] = []
        self.ends: list[tuple[Sequence, int]] = []
        self.sampled: list[Sequence] = []

    def add(self, sequence: Sequence, length: int) -> None:
        """So many of the tokens that are missing."""
        sequence.start(self._now)
        start, end = sequence.cached, sequence.cached + length
        self.ids += sequence.tokens[start:end]
        self.segments.append(Segment(start, length, parts(sequence.runs(self._size), 0, end), sequence.slot))
        self.sequences.append(sequence)
        self.ends.append((sequence, end))
        if length == sequence.missing:
            self.wanted.append(len(self.ids) - 1)
            self.sampled.append(sequence)
