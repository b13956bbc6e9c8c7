"""Decides what each step computes: admits waiting sequences, decodes, prefills in chunks, finishes.

Owns the sequences and the cache slots. Pure: no torch, no socket, the clock is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from cortex.neuron.engine.messages import Generate, Output
from cortex.neuron.engine.sequence import Sequence
from cortex.neuron.nn.plan import Segment, StepPlan


class Scheduled(NamedTuple):
    """A plan, the sequence of each of its segments, and the sequence of each of its wanted rows."""

    plan: StepPlan
    sequences: list[Sequence]
    sampled: list[Sequence]


class Scheduler:
    """Decode comes before prefill; at most `prefill_chunk` prompt tokens go into one step.

    `context` is the tokens that a slot holds, `vocab` the first id that is no token.
    """

    def __init__(
        self, *, slots: int, context: int, prefill_chunk: int, vocab: int, clock: Callable[[], float]
    ) -> None:
        self._free = list(range(slots))
        self._context = context
        self._prefill_chunk = prefill_chunk
        self._vocab = vocab
        self._clock = clock
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, order: Generate) -> Output | None:
        """Queue a sequence; an output if it cannot be run, which says why."""
        fault = self._fault(order)
        if fault:
            return Output(key=order.key, ids=[], error=fault)
        self._waiting.append(Sequence(order, self._clock()))
        return None

    def cancel(self, key: int) -> None:
        """Forget a sequence in whatever phase; it is in no later plan. Unknown keys are ignored."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.key != key)
        for sequence in self._running:
            if sequence.key == key:
                self._release(sequence)
                break

    def schedule(self) -> Scheduled | None:
        """The next step, or None if there is nothing to do."""
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._running.append(sequence)
        now = self._clock()
        ids: list[int] = []
        segments: list[Segment] = []
        wanted: list[int] = []
        chosen: list[Sequence] = []
        sampled: list[Sequence] = []
        budget = self._prefill_chunk
        for sequence in sorted(self._running, key=lambda sequence: not sequence.in_decode):
            length = sequence.missing if sequence.in_decode else min(sequence.missing, budget)
            if not length or sequence.slot is None:
                continue
            budget -= 0 if sequence.in_decode else length
            sequence.start(now)
            ids += sequence.tokens[sequence.cached : sequence.cached + length]
            segments.append(Segment(sequence.slot, sequence.cached, length))
            chosen.append(sequence)
            if length == sequence.missing:
                wanted.append(len(ids) - 1)
                sampled.append(sequence)
        return Scheduled(StepPlan(ids, segments, wanted), chosen, sampled) if chosen else None

    def complete(self, scheduled: Scheduled, tokens: list[int | None]) -> list[Output]:
        """The step was computed: `tokens` are those of its wanted rows, None where sampling failed."""
        for sequence, segment in zip(scheduled.sequences, scheduled.plan.segments, strict=True):
            sequence.cached = segment.end
        now = self._clock()
        return [
            self._accept(sequence, token, now)
            for sequence, token in zip(scheduled.sampled, tokens, strict=True)
        ]

    def fail(self, scheduled: Scheduled, message: str) -> list[Output]:
        """The step broke: every sequence in it ends with `message`."""
        for sequence in scheduled.sequences:
            self._release(sequence)
        return [Output(key=sequence.key, ids=[], error=message) for sequence in scheduled.sequences]

    def fail_all(self, message: str) -> list[Output]:
        """Nothing can be computed any more: every sequence, waiting ones included, ends."""
        ended = [*self._running, *self._waiting]
        for sequence in list(self._running):
            self._release(sequence)
        self._waiting.clear()
        return [Output(key=sequence.key, ids=[], error=message) for sequence in ended]

    def _accept(self, sequence: Sequence, token: int | None, now: float) -> Output:
        if token is None:
            self._release(sequence)
            message = "The model computed values that are not numbers; the weights may be damaged."
            return Output(key=sequence.key, ids=[], error=message)
        if token in sequence.sampling.stop_ids:
            self._release(sequence)
            sequence.mark_sampled(now)
            return Output(key=sequence.key, ids=[], finish="stop", timings=sequence.timings(now))
        sequence.append(token, now)
        if sequence.generated < sequence.sampling.max_tokens and len(sequence.tokens) < self._context:
            return Output(key=sequence.key, ids=[token])
        self._release(sequence)
        return Output(key=sequence.key, ids=[token], finish="length", timings=sequence.timings(now))

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        if sequence.slot is not None:
            self._free.append(sequence.slot)
            sequence.slot = None

    def _fault(self, order: Generate) -> str | None:
        if not order.ids:
            return "The prompt is empty; at least one token is needed."
        if len(order.ids) >= self._context:
            return f"The prompt has {len(order.ids)} tokens; the context of {self._context} leaves no room."
        if min(order.ids) < 0 or max(order.ids) >= self._vocab:
            return f"The prompt holds ids outside the model's {self._vocab} tokens."
        if order.sampling.max_tokens < 1:
            return f"max_tokens is {order.sampling.max_tokens}; at least 1 is needed."
        return None
