"""Decides who starts, who runs and who must give way, and takes in what each step has computed.

Owns the sequences and their blocks. Pure: no torch, no socket, the clock is given. A sequence is waiting, or
running (then it has blocks and is in plans), or gone; preemption takes a running one back to the head of the
line, from where it is computed anew, its known blocks excepted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

from cortex.neuron.engine.blocks import BlockPool, Match, breaks
from cortex.neuron.engine.checkpoints import StateBooks
from cortex.neuron.engine.counts import Counts
from cortex.neuron.engine.line import Awaited, Line
from cortex.neuron.engine.messages import Generate, Output
from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.planning import Planner, Scheduled
from cortex.neuron.engine.sequence import Sampled, Sequence, fault
from cortex.neuron.nn.plan import NO_SLOT, Copy

AHEAD: Final = 256
"""Tokens of its reserve for which a sequence gets blocks at once, so that they lie together. The rest is only
promised: known blocks stay known until it is really needed."""
PART: Final = 4
"""Of the blocks that are vacant a sequence may get so large a part ahead, for the same reason, and of those
that are available so large a part is taken for a while to move a sequence together."""
MOST_RUNS: Final = 2
"""A sequence that lies in more runs than this is moved together, before it starts or when it grows: each run
is looked at by itself in every layer of every step."""


class Scheduler:
    """`context` is the tokens that a sequence may have, `vocab` the first id that is no token, `max_running`
    how many sequences run at a time.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        context: int,
        pace: Pace,
        vocab: int,
        clock: Callable[[], float],
        max_running: int = 8,
        max_wait_s: float | None = None,
        states: StateBooks | None = None,
        drafting: int = 8,
    ) -> None:
        """`states` has a slot for each that may run, for models with states. Where `drafting` sequences or
        fewer decode, they compute tokens that they are likely to say next along with their newest ones: not
        for recurrent layers, whose states cannot forget a wrong token. Raises ValueError if the pool cannot
        hold one context.
        """
        if pool.blocks < pool.count_for(context):
            raise ValueError(f"{pool.blocks} blocks of {pool.size} tokens cannot hold {context} tokens")
        self.pool = pool
        self.states = states or StateBooks()
        pool.on_forget = self.states.forget
        self._planner = Planner(pace, pool.size)
        self.counts = Counts()
        self._context = context
        self._vocab = vocab
        self._clock = clock
        self._max_running = max_running
        self._drafting = drafting
        self._waiting = Line(clock, max_wait_s)
        self._running: list[Sequence] = []
        self._copies: list[Copy] = []

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def take_counts(self) -> Counts:
        counts, self.counts = self.counts, Counts()
        return counts

    # --- orders ---

    def add(self, order: Generate) -> Output | None:
        """Queue a sequence; an output if it cannot be run, which says why."""
        reason = fault(order, self._context, self._vocab)
        if reason:
            return Output(key=order.key, ids=[], error=reason, code="invalid")
        self._waiting.add(Sequence(order, self._clock()))
        return None

    def cancel(self, key: int) -> None:
        """Forget a sequence in whatever phase; it is in no later plan. Unknown keys are ignored."""
        self._waiting.drop(key)
        for sequence in self._running:
            if sequence.key == key:
                self._release(sequence)
                break

    def expired(self) -> list[Output]:
        """Ends the sequences that have waited too long to start."""
        late = self._waiting.take_late()
        message = f"it waited {self._waiting.max_wait or 0:g} s and could not start"
        return [Output(key=s.key, ids=[], error=message, code="busy") for s in late]

    # --- a step ---

    def schedule(self) -> Scheduled | None:
        """The next step, or None if there is nothing to do."""
        self._admit()
        self._make_room()
        if not self._running:
            return None
        self._draft()
        copies, self._copies = self._copies, []
        return self._planner.plan(self._running, copies, self.states.take_copies(), self._clock())

    def follow(self, scheduled: Scheduled) -> Scheduled | None:
        """The step after the last one, which is `scheduled`, before what that has sampled is completed: one
        more of decode. None where that must be known first.
        """
        somebody_may_start = bool(self._waiting) and len(self._running) < self._max_running
        if somebody_may_start or self.states.active:
            return None
        may_draft = len(self._running) <= self._drafting
        if may_draft and not all(each.drafter.rests(len(each.tokens) + 1) for each in self._running):
            return None
        return self._planner.follow(scheduled, self._running, self._context, self._clock())

    def _draft(self) -> None:
        """Those who decode get drafts: the weights are read for them anyway."""
        running = self._running
        if 0 < len(running) <= self._drafting:
            most = self._planner.longest_draft(running)
            for sequence in running if most else ():
                sequence.make_draft(min(len(sequence.blocks) * self.pool.size, self._context - 1), most)

    def took(self, scheduled: Scheduled, seconds: float) -> None:
        """The step has taken so long."""
        self._planner.took(scheduled, seconds)

    def complete(self, scheduled: Scheduled, sampled: list[Sampled]) -> list[Output]:
        """The step was computed: `sampled` are the tokens of its wanted rows. Those of sequences that do
        not run any more are nobody's. Raises ValueError if there are more or fewer of them.
        """
        if len(sampled) != scheduled.rows:
            raise ValueError(f"{len(sampled)} tokens came for {scheduled.rows} rows")
        for sequence, end in scheduled.ends:
            if not sequence.blocks:
                continue
            sequence.cached = end
            self._learn(sequence)
            if sequence.marks and sequence.marks[0] == sequence.cached:
                sequence.marks.pop(0)
                self.states.keep(sequence.slot, sequence.blocks[sequence.known - 1], sequence.cached)
        now = self._clock()
        price = self._planner.draft_price(scheduled.decoding)
        rows = iter(sampled)
        outputs = []
        for sequence in scheduled.sampled:
            own = list(itertools.islice(rows, 1 + len(sequence.draft)))
            if sequence.blocks:
                outputs.append(self._accept(sequence, own, price, now))
            else:
                self.counts.wasted += len(own)
        return outputs

    def fail(self, scheduled: Scheduled, message: str) -> list[Output]:
        """The step broke: every sequence in it ends with `message`.

        Nobody knows what of its copies and writes has happened, so the others are computed anew.
        """
        outputs = self.give_up(scheduled, message)
        for sequence in reversed(self._running.copy()):
            self._preempt(sequence)
        self.pool.forget_idle()
        return outputs

    def give_up(self, scheduled: Scheduled, message: str) -> list[Output]:
        """The same where nothing can be computed any more. Others learn it from the end of the engine."""
        failed = [sequence for sequence in scheduled.sequences if sequence.blocks]
        for sequence in failed:
            self._release(sequence)
        return [Output(key=sequence.key, ids=[], error=message) for sequence in failed]

    # --- who runs ---

    def _admit(self) -> None:
        """Start those in line for whom there is room, in order. One whose prompt begins with what another
        one is computing right now lets others pass: soon that will be in the cache.
        """
        while len(self._running) < self._max_running:
            sequence = self._waiting.next()
            if sequence is None:
                break
            match = self.states.usable(self.pool.match(sequence.tokens))
            awaited = self._awaited(sequence, match)
            if awaited is not None:
                self._waiting.hold(sequence, awaited)
            elif self._begin(sequence, match):
                self._waiting.starts(sequence)
            else:
                break

    def _awaited(self, sequence: Sequence, match: Match) -> Awaited | None:
        """What a running prefill is about to add to what the cache knows of the prompt, a block at least. A
        short prompt waits for no long one that is not even under way.
        """
        if not self.pool.caching:
            return None
        size = self.pool.size
        known = match.tokens(size)
        is_short = self._planner.is_short(sequence.missing - known)
        prompts = [other for other in self._running if other.missing > 1]
        for other in prompts:
            if is_short and other is not prompts[0] and not self._planner.is_short(other.missing):
                continue
            # The end of the block that the other one computes now, and of one that is news to us.
            ends = range(max(known + size, (other.cached // size + 1) * size), self._context, size)
            # Those are of use only where a state is kept too, if there are states.
            news = [mark for mark in other.marks if mark > known] if self.states.active else ends
            alike = sequence.begins_like(other, news[0]) if news else 0
            if alike:
                return Awaited(other, max(end for end in news if end <= alike))
        return None

    def _begin(self, sequence: Sequence, match: Match) -> bool:
        """Hold what is known of the prompt, and take blocks for the rest. False if there is no room."""
        pool = self.pool
        total = pool.count_for(sequence.needs(self._context, pool.size))
        room = self._room(total, match)
        if match.partial is not None and room < pool.idle_in([match.partial]):
            match = self.states.usable(Match(match.chain, None, 0))
            room = self._room(total, match)
        if room < 0:
            return False
        chain, partial = match.chain, match.partial
        pool.hold(chain)
        if partial is not None:
            pool.hold([partial])  # so that taking blocks does not forget it before it is copied
        wanted = min(total, pool.count_for(len(sequence.tokens)) + self._ahead())
        sequence.blocks = [*chain, *pool.take(wanted - len(chain), after=chain[-1] if chain else None)]
        sequence.promised = total - wanted
        sequence.reserved = total
        sequence.known = len(chain)
        sequence.cached = len(chain) * pool.size
        sequence.blocks_changed()
        self._move_together(sequence)
        if partial is not None:
            target = sequence.blocks[len(chain)].place * pool.size
            self._copies.append(Copy(partial.place * pool.size, target, match.shared))
            sequence.cached += match.shared
            pool.release([partial])
        if self.states.active:
            sequence.slot = self.states.begin(match)
            sequence.stride = self.states.stride
        if self.states.active and pool.caching:
            prompt = sequence.tokens[: sequence.prompt_length]
            sequence.marks = self.states.marks(prompt, sequence.sampling.stop_ids, sequence.cached)
        if not sequence.has_started:
            sequence.hit = sequence.cached
        self._running.append(sequence)
        return True

    def _room(self, total: int, match: Match) -> int:
        """Blocks left over if a sequence holds what is known of it, and so many in all."""
        promised = sum(other.promised for other in self._running)
        return self.pool.available - promised - total + len(match.chain) - self.pool.idle_in(match.chain)

    def _move_together(self, sequence: Sequence) -> None:
        """Turns of a conversation and growth leave blocks scattered, and attention wants them in a row: where
        nobody else holds them, they are copied to lie together, and stand there for all from now on. No
        chunk of the sequence may be on its way.
        """
        pool, size = self.pool, self.pool.size
        if len(sequence.runs(size)) <= MOST_RUNS:
            return
        # Whoever holds a block holds those before it too, so the ones held by nobody else come last.
        own = [block for block in sequence.blocks if block.holders == 1]
        if not breaks(own) or max(pool.vacant, pool.available // PART) < len(own):
            return
        moved = pool.take(len(own))
        if breaks(moved) >= breaks(own):
            pool.release(moved)  # the room that there is lies no less scattered
            return
        first = (len(sequence.blocks) - len(own)) * size
        for start, block, spare in zip(itertools.count(first, size), own, moved, strict=False):
            if start < sequence.cached:
                count = min(size, sequence.cached - start)
                self._copies.append(Copy(block.place * size, spare.place * size, count))
            block.place, spare.place = spare.place, block.place
        pool.release(moved)
        sequence.blocks_changed()

    def _ahead(self) -> int:
        """Blocks that a sequence gets beyond what it needs now: more where blocks are vacant."""
        return max(self.pool.count_for(AHEAD), self.pool.vacant // PART)

    def _make_room(self) -> None:
        """Give every running sequence blocks for what it may compute next; where there are none left, of
        those that have outgrown their reserve the one that started last gives way.
        """
        for sequence in list(self._running):
            if sequence not in self._running:
                continue
            while sequence.blocks and len(sequence.tokens) > len(sequence.blocks) * self.pool.size:
                if not self._grow(sequence):
                    self._preempt([other for other in self._running if self._has_outgrown(other)][-1])

    def _has_outgrown(self, sequence: Sequence) -> bool:
        """It needs more than was set aside for it, as the one has that finds no room."""
        return self.pool.count_for(len(sequence.tokens)) > sequence.reserved

    def _grow(self, sequence: Sequence) -> bool:
        pool = self.pool
        others = sum(other.promised for other in self._running if other is not sequence)
        room = pool.available - others
        if room < 1:
            return False
        # Those that have outgrown what was promised leave most of the room to others.
        wanted = min(room, self._ahead(), sequence.promised or max(1, room // PART))
        sequence.blocks += pool.take(wanted, after=sequence.blocks[-1])
        sequence.promised = max(0, sequence.promised - wanted)
        sequence.blocks_changed()
        self._move_together(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.counts.preempted += 1
        self._release(sequence)
        sequence.cached = sequence.known = 0
        self._waiting.put_first(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give its blocks back; what it has computed of a block's beginning stays known too."""
        self._running.remove(sequence)
        keep_state = not self._planner.drop(sequence)
        pool = self.pool
        rest = sequence.cached - sequence.known * pool.size
        if pool.caching and 0 < rest < pool.size:
            tokens = tuple(sequence.tokens[sequence.known * pool.size : sequence.cached])
            parent = sequence.blocks[sequence.known - 1] if sequence.known else None
            sequence.blocks[sequence.known] = pool.learn(sequence.blocks[sequence.known], parent, tokens)
        if pool.caching and sequence.cached and keep_state:
            last = sequence.blocks[pool.count_for(sequence.cached) - 1]
            self.states.leave(sequence.slot, last, sequence.cached)
        else:
            self.states.end(sequence.slot)
        sequence.slot, sequence.marks = NO_SLOT, []
        pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.promised = 0
        sequence.blocks_changed()

    def _learn(self, sequence: Sequence) -> None:
        """Blocks that the step has filled become known."""
        pool = self.pool
        while pool.caching and (sequence.known + 1) * pool.size <= sequence.cached:
            at = sequence.known
            tokens = tuple(sequence.tokens[at * pool.size : (at + 1) * pool.size])
            known = pool.learn(sequence.blocks[at], sequence.blocks[at - 1] if at else None, tokens)
            if known is not sequence.blocks[at]:
                sequence.blocks[at] = known
                sequence.blocks_changed()
            sequence.known += 1

    # --- what comes out ---

    def _accept(self, sequence: Sequence, rows: list[Sampled], price: float, now: float) -> Output:
        drafted, hit, sequence.hit = len(sequence.draft), sequence.hit, None
        if hit is not None:
            self.counts.queried += sequence.prompt_length
            self.counts.hit += hit
        said = sequence.take(rows, self._context, now)
        if drafted:
            sequence.drafter.judge(drafted, said.accepted, price, len(sequence.tokens))
            self.counts.drafted += drafted
            self.counts.accepted += said.accepted
            self._learn(sequence)
        if said.finish is not None:
            self._release(sequence)
        return Output(
            key=sequence.key,
            ids=said.ids,
            finish=said.finish,
            timings=None if said.finish is None else sequence.timings(now),
            cached_tokens=hit,
            logprobs=said.logprobs or None,
        )
