"""Puts steps together: who decodes, whose prompt goes along with that, which layers a long prompt passes.

Owns the chunk of a long prompt that is on its way through the layers. Knows neither blocks nor who may run.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.sequence import Sequence
from cortex.neuron.nn.plan import Copy, Segment, StateCopy, StepPlan, parts

SHORT: Final = 4
"""Prompts of at most a chunk divided by this go before longer ones."""
YOUNG: Final = 3
"""As long as no reply has more tokens than this, and no prompt is long, prompts go along as if nobody
decoded. Requests that come together begin together then: shared out, the prompts of those that missed the
first step would keep the others in steps of half a batch, each of which reads all weights. It costs a reply a
long gap or two after its first token, and nobody's reply is ready later."""
FIRST_PART: Final = 0.6
"""Of the layers that a chunk is expected to pass in its turn, those that it passes first: what they have
really taken says how many more it may."""
HALF: Final = 0.5
"""Of the time for prefill, what short prompts may take while a long one is on its way."""


class Scheduled(NamedTuple):
    """A plan and whom it is for."""

    plan: StepPlan
    sequences: list[Sequence]
    """All that have a part in the step. The first `decoding` decode, one token each and their drafts."""
    ends: list[tuple[Sequence, int]]
    """How many tokens of whom the cache holds after it, where that changes."""
    sampled: list[Sequence]
    """Whose rows of logits there are: one of each, and one after each token of its draft."""
    decoding: int
    prefill: int
    """Tokens of prompts that the step completes."""
    work: float
    """Of prompts, as `Pace` counts it."""

    @property
    def ahead(self) -> int:
        """Tokens of each sequence that had been sampled and that nobody had read when the step was made."""
        return 1 if self.plan.follows else 0

    @property
    def rows(self) -> int:
        """Of logits, until the step is completed."""
        return sum(1 + len(sequence.draft) for sequence in self.sampled)


class _Way(NamedTuple):
    """A chunk of a long prompt on its way through the layers."""

    sequence: Sequence
    length: int
    work: float
    passed: int = 0
    """Layers behind it."""


class Planner:
    """At this pace, with a cache in blocks of `size` tokens.

    A step in which sequences decode takes turns with steps in which a long prompt's chunk passes some layers:
    how many, goes by the time that the former has taken, and after the first of them by what is left of it.
    """

    def __init__(self, pace: Pace, size: int) -> None:
        self._pace = pace
        self._size = size
        self._way: _Way | None = None
        self._others: tuple[int, float] | None = None
        """The last step of the others: how many decoded, and what it took in seconds."""
        self._spent: float | None = None
        """Seconds that a chunk has taken since then, if it has had its turn."""
        self._was_short = False
        """Whether the last prompt that set out on a way of its own was a short one."""

    def drop(self, sequence: Sequence) -> bool:
        """No later step has a part for the sequence. Whether a chunk of it was on its way: of its states,
        those of some layers have seen more than the others then.
        """
        way = self._way
        if way is None or way.sequence is not sequence:
            return False
        self._way = None
        return way.passed > 0

    def plan(
        self, running: list[Sequence], copies: list[Copy], states: list[StateCopy], now: float
    ) -> Scheduled:
        """A step of the sequences that run, one at least, after these copies."""
        decoding = [sequence for sequence in running if sequence.in_decode]
        prompts = [sequence for sequence in running if not sequence.in_decode]
        after_a_chunk = self._way is None and self._spent is not None
        if after_a_chunk and decoding and not self._begin_together(decoding, prompts):
            self._go_on(prompts, len(decoding))
        way = self._way
        if way is not None:
            layers = self._next_layers(way, running, len(decoding))
            if layers:
                return self._on_the_way(way, layers, copies, states, now)
            prompts.remove(way.sequence)
        making = _Pass(self._size, now)
        for sequence in decoding:
            making.add(sequence, sequence.missing)
        if not decoding or self._begin_together(decoding, prompts):
            self._fill(making, prompts)
        elif self._pace.knows(len(decoding)):
            self._share(making, prompts, len(decoding))
        plan = StepPlan(making.ids, making.segments, making.wanted, copies, states)
        count = len(decoding)
        of_one = self._pace.work_beside if decoding else self._pace.work
        work = sum(of_one(part.length, part.start) for part in plan.segments[count:])
        prefill = sum(part.length for part in plan.segments[count:])
        return Scheduled(plan, making.sequences, making.ends, making.sampled, count, prefill, work)

    def follow(
        self, scheduled: Scheduled, running: list[Sequence], context: int, now: float
    ) -> Scheduled | None:
        """The step after `scheduled`, before anybody has read what that has sampled: all that run decode once
        more, but for those that end by their length. None if what is sampled decides what comes next, if a
        sequence needs room, or if some are not in `scheduled`.
        """
        row_of = {sequence: row for row, sequence in enumerate(scheduled.sampled)}
        if self._way is not None or scheduled.rows != len(row_of):
            return None
        making = _Pass(self._size, now)
        for sequence in running:
            room = len(sequence.blocks) * self._size - len(sequence.tokens)
            if sequence not in row_of or sequence.tally is not None or room < 1:
                return None
            if not sequence.is_full(context, 1):
                making.follow(sequence, row_of[sequence])
        if not making.ids:
            return None
        plan = StepPlan(making.ids, making.segments, making.wanted, follows=making.follows)
        return Scheduled(plan, making.sequences, making.ends, making.sampled, len(making.ids), 0, 0.0)

    def is_short(self, tokens: int) -> bool:
        """Whether a prompt with so many to compute goes before longer ones."""
        return tokens <= self._pace.most // SHORT

    def longest_draft(self, running: list[Sequence]) -> int:
        """Tokens that those who run may compute along with the newest one of each: 0 where somebody's prompt
        is computed, or what they take without drafts is not known, for those who join them.
        """
        if self._way is not None or not all(sequence.in_decode for sequence in running):
            return 0
        return self._pace.longest_draft(len(running)) if self._pace.knows(len(running)) else 0

    def draft_price(self, decoding: int) -> float:
        """Of each token of a draft, in tokens that so many could have had in its time."""
        return self._pace.draft_price(decoding)

    def took(self, scheduled: Scheduled, seconds: float) -> None:
        """The step has taken so long; the next ones go by that."""
        drafted = len(scheduled.plan.wanted) - len(scheduled.sampled)
        if drafted > 0:
            self._pace.drafted(scheduled.decoding, drafted, seconds)
            return
        layers = scheduled.plan.layers
        if layers:
            # Of the last layer hardly anything is computed: there only rows go on whose logits are asked for.
            self._pace.passed(scheduled.work, max(1, layers - 1) if scheduled.prefill else layers, seconds)
            self._spent = (self._spent or 0.0) + seconds
        else:
            turns = self._way is not None and self._way.passed > 0
            self._pace.made(scheduled.decoding, scheduled.work, seconds, alone=not turns)
            self._others, self._spent = (scheduled.decoding, seconds), None

    def _next_layers(self, way: _Way, running: list[Sequence], decoding: int) -> int:
        """How many layers the chunk passes in this step, none if it is the others' turn. That is all that are
        left if nobody waits for them.
        """
        left = self._pace.layers - way.passed
        if running == [way.sequence]:
            return left
        if self._others is None:
            return 0
        begins = self._spent is None
        if not decoding:
            return left if begins else 0
        seconds = self._pace.left(*self._others) - (self._spent or 0.0)
        if begins:
            layers = max(1, self._pace.passes(FIRST_PART * seconds, way.work))
        else:
            layers = self._pace.passes(seconds, way.work)
        # The last one costs so little that it goes along with the one before it.
        return left if layers and layers >= left - 1 else layers

    def _go_on(self, prompts: list[Sequence], decoding: int) -> None:
        """After a chunk's last layer what is left of its turn is for the next one, unless it is the turn
        of a prompt that goes along with those who decode if nobody is on the way.
        """
        seconds = self._pace.spare(decoding)
        for sequence in self._in_turn(prompts):
            cost = self._cost_beside(sequence)
            if cost is None or cost > seconds:
                self._set_out(sequence, seconds)
                return
            if cost > HALF * seconds:
                return

    def _in_turn(self, prompts: list[Sequence]) -> list[Sequence]:
        """Short ones first, as they would wait for all of a long one that came before them; but every second
        chunk goes to who came first, so that many short ones do not stop it.
        """
        if self._was_short:
            return prompts
        return self._short_first(prompts)

    def _short_first(self, prompts: list[Sequence]) -> list[Sequence]:
        return sorted(prompts, key=lambda prompt: not self.is_short(prompt.piece))

    def _set_out(self, sequence: Sequence, seconds: float) -> None:
        """A chunk of its prompt, for which there are so many seconds in each turn."""
        self._was_short = self.is_short(sequence.piece)
        length = self._pace.chunk(seconds, sequence.piece, sequence.cached)
        self._way = _Way(sequence, length, self._pace.work(length, sequence.cached))

    def _cost_beside(self, sequence: Sequence) -> float | None:
        """Seconds of its prompt in the pass of those who decode."""
        return self._pace.beside(self._pace.work_beside(sequence.piece, sequence.cached))

    def _on_the_way(
        self, way: _Way, layers: int, copies: list[Copy], states: list[StateCopy], now: float
    ) -> Scheduled:
        """The chunk passes its next layers."""
        sequence, length, work, passed = way
        chunk = None
        if not passed:
            making = _Pass(self._size, now)
            making.add(sequence, length)
            chunk = StepPlan(making.ids, making.segments, making.wanted)
        plan = StepPlan([], [], [], copies, states, chunk, layers)
        passed += layers
        if passed < self._pace.layers:
            self._way = way._replace(passed=passed)
            return Scheduled(plan, [sequence], [], [], 0, 0, work)
        self._way = None
        sampled = [sequence] if length == sequence.missing else []
        return Scheduled(plan, [sequence], [(sequence, sequence.cached + length)], sampled, 0, length, work)

    def _begin_together(self, decoding: list[Sequence], prompts: list[Sequence]) -> bool:
        """Whether those who decode have only just begun, and all prompts are short: a long one would be
        passed over for as long as short replies begin and end.
        """
        if self._way is not None or any(sequence.generated > YOUNG for sequence in decoding):
            return False
        return all(self.is_short(sequence.piece) for sequence in prompts)

    def _fill(self, making: _Pass, prompts: list[Sequence]) -> None:
        """Prompts get all that a step takes, short ones first."""
        most = self._pace.most
        for sequence in self._short_first(prompts):
            length = min(sequence.piece, most - len(making.ids))
            if length > 0:
                making.add(sequence, length)

    def _share(self, making: _Pass, prompts: list[Sequence], decoding: int) -> None:
        """Prompts that are short enough go along with those who decode, and of the others the first one sets
        out on a way of its own.
        """
        seconds = self._pace.spare(decoding)
        left = seconds if self._way is None else HALF * seconds
        room = self._pace.most
        for sequence in self._in_turn(prompts):
            cost = self._cost_beside(sequence)
            if cost is not None and cost <= left and sequence.piece <= room:
                left -= cost
                room -= sequence.piece
                making.add(sequence, sequence.piece)
            elif self._way is None:
                if len(making.segments) == decoding:
                    self._pace.doubt(sequence.piece)
                self._set_out(sequence, seconds)
                left = min(left, HALF * seconds)


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
        self.follows: list[int] = []

    def add(self, sequence: Sequence, length: int) -> None:
        """So many of the tokens that are missing, and after all of them its draft."""
        sequence.start(self._now)
        start, end = sequence.cached, sequence.cached + length
        self.ids += sequence.tokens[start:end]
        self.ends.append((sequence, end))
        if length == sequence.missing:
            self.ids += sequence.draft
            length += len(sequence.draft)
            self.wanted += range(len(self.ids) - 1 - len(sequence.draft), len(self.ids))
            self.sampled.append(sequence)
        self._append(sequence, start, length)

    def follow(self, sequence: Sequence, row: int) -> None:
        """The token that comes after those that are known, sampled in this row of the step before."""
        self.follows.append(row)
        self.ids.append(0)
        self._append(sequence, len(sequence.tokens), 1)
        self.wanted.append(len(self.ids) - 1)
        self.sampled.append(sequence)
        self.ends.append((sequence, len(sequence.tokens) + 1))

    def _append(self, sequence: Sequence, start: int, length: int) -> None:
        runs = parts(sequence.runs(self._size), 0, start + length)
        self.segments.append(Segment(start, length, runs, sequence.slot))
        self.sequences.append(sequence)
