"""The cache accounting under any traffic: scheduler and pool together, the contents of every row traced.

Nothing is computed. Instead every row of the cache holds the tokens up to and including its own, as a model
would have put them there; a segment must find exactly its sequence's beginning in the rows that it reads, or
a copy, a shared block, a preemption or an eviction has mixed contents. The same with states: a slot holds the
tokens that its state has seen.
"""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cortex.hookspecs import Sampling
from cortex.neuron.engine import pace, scheduler
from cortex.neuron.engine.blocks import BlockPool, common
from cortex.neuron.engine.checkpoints import StateBooks
from cortex.neuron.engine.messages import Generate, Output
from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.planning import Scheduled
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.engine.sequence import Sequence
from cortex.neuron.nn.plan import NO_SLOT, Segment, StepPlan

VOCAB, STOP = 50, 7
SPEAKERS = 12
"""More sequences than this are not open at a time."""
GARBAGE = (-1,)
LAYERS = 3


@pytest.fixture(autouse=True)
def blocks_are_promised_for_most_of_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "AHEAD", 8)


@pytest.fixture(autouse=True)
def chunks_of_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "ROUND", 1)
    monkeypatch.setattr(pace, "FIRST", 5)


class Way(NamedTuple):
    """A chunk on its way through the layers, and how many are behind it."""

    sequence: Sequence
    plan: StepPlan
    passed: int


class World:
    """A scheduler, the rows of its cache, and what every sequence has come to."""

    def __init__(
        self,
        *,
        size: int,
        context: int,
        spare: int,
        caching: bool,
        chunk: int,
        running: int,
        wait: float | None,
        kept: int | None = None,
        stride: int | None = None,
    ) -> None:
        """`kept` is how many checkpoints of states there may be on the host, None for a model without states;
        `stride` of how many tokens a segment may hold a multiple only at its end, if not None.
        """
        self.now = 0.0
        self.pool = BlockPool(-(-context // size) + spare, size, caching=caching)
        self.context = context
        self.stride = None if kept is None else stride
        self.most = running
        self.made = Scheduler(
            self.pool,
            context=context,
            pace=Pace(chunk, LAYERS, 40),
            vocab=VOCAB,
            clock=lambda: self.now,
            max_running=running,
            max_wait_s=wait,
            drafting=8 if kept is None else 0,
            states=None if kept is None else StateBooks(running, kept, block=size, apart=4, stride=stride),
        )
        self.slots: dict[int, tuple[int, ...]] = {}
        self.resumed = 0
        """Sequences that have begun with the state of a checkpoint."""
        self.rows: dict[int, tuple[int, ...]] = {}
        self.open: dict[int, Sequence] = {}
        self.ended: set[int] = set()
        self.histories: list[list[int]] = [[]]
        """Tokens of sequences that have ended: prompts begin with them, as those of conversations do."""
        self.keys = 0
        self.preempted = self.finished = self.copied = self.hits = self.drafted = self.accepted = 0
        self.way: Way | None = None
        self.layered = self.given_up = 0
        """Chunks that went through the layers in several steps, and that never came through."""
        self.chance = random.Random(chunk)
        """Of how long things take."""

    # --- what can happen ---

    def add(self, prompt: list[int], max_tokens: int, reserve: int | None) -> None:
        self.keys += 1
        ids = prompt[: self.context - 1] or [1]
        settings = Sampling(max_tokens=max_tokens, reserve=reserve, stop_ids=(STOP,))
        assert self.made.add(Generate(key=self.keys, request_id="r", ids=ids, sampling=settings)) is None
        self.open[self.keys] = list(self.made._waiting)[-1]

    def cancel(self, key: int) -> None:
        self.made.cancel(key)
        self.end(key)
        assert all(sequence.key != key for sequence in [*self.made._running, *self.made._waiting])

    def wait(self, seconds: float) -> None:
        """Time passes; those that have not started for too long are told so."""
        self.now += seconds
        for output in self.made.expired():
            assert output.code == "busy"
            assert not self.open[output.key].has_started
            self.end(output.key)

    def step(self, tokens: list[int], *, breaks: bool = False) -> None:
        """One step, whose wanted rows give `tokens`, repeated as needed; or which breaks."""
        waiting, running = list(self.made._waiting), list(self.made._running)
        scheduled = self.made.schedule()
        self.check_turns(waiting, running)
        if scheduled is None:
            assert self.made.idle, "nothing is computed, and somebody waits"
            return
        changed = self.compute(scheduled)
        if breaks:
            self.rows |= dict.fromkeys(changed, GARBAGE)
            self.slots = dict.fromkeys(self.slots, GARBAGE)
            outputs = self.made.fail(scheduled, "broken")
            assert [output.key for output in outputs] == [sequence.key for sequence in scheduled.sequences]
            assert not self.made._running
        else:
            chosen = [tokens[index % len(tokens)] for index in range(scheduled.rows)]
            drafted = [(*sequence.draft, None) for sequence in scheduled.sampled]
            for index, token in enumerate(itertools.chain(*drafted)):
                if token is not None and self.chance.random() < 0.6:
                    chosen[index] = token
            outputs = self.made.complete(scheduled, [(token, None) for token in chosen])
            slow, layers = self.chance.random(), scheduled.plan.layers
            spent = slow / 100 * scheduled.work * layers if layers else (1 + slow) / 100
            self.made.took(scheduled, spent if layers else spent + slow / 50 * scheduled.work)
        self.take(outputs)
        counts = self.made.take_counts()
        self.hits += counts.hit
        assert counts.hit <= counts.queried
        assert counts.accepted <= counts.drafted
        self.drafted += counts.drafted
        self.accepted += counts.accepted

    # --- what must hold ---

    def compute(self, scheduled: Scheduled) -> set[int]:
        """What the runner would do: copies in their order, then all writes, then all reads. The rows that
        have changed.
        """
        plan = scheduled.plan
        changed: set[int] = set()
        for copy in plan.copies:
            moved = [self.rows.get(copy.source + index) for index in range(copy.count)]
            for index, content in enumerate(moved):
                assert content is not None, "a row is copied that holds nothing"
                self.rows[copy.target + index] = content
                changed.add(copy.target + index)
            self.copied += 1
        for copy in plan.states:
            state = self.slots[copy.source]
            assert len(state) == copy.tokens or state == GARBAGE, "a state has seen something else"
            self.slots[copy.target] = state
            self.resumed += copy.target < self.most
        written: dict[int, tuple[int, ...]] = {}
        ids = iter(plan.ids)
        pairs = [] if plan.layers else list(zip(scheduled.sequences, plan.segments, strict=True))
        for sequence, segment in pairs:
            assert self.open[sequence.key] is sequence
            assert segment.length >= 1
            rows = rows_of(segment)
            assert len(set(rows)) == len(rows) == segment.end <= self.context
            computed = [*sequence.tokens, *sequence.draft]
            for position in range(segment.start, segment.end):
                assert next(ids) == computed[position]
                assert rows[position] not in written, "two sequences write one row"
                written[rows[position]] = tuple(computed[: position + 1])
        assert next(ids, None) is None
        self.rows |= written
        self.see(plan, pairs)
        through = self.pass_layers(scheduled, written)
        ends = [(sequence.key, segment.end - len(sequence.draft)) for sequence, segment in [*pairs, *through]]
        assert ends == [(sequence.key, end) for sequence, end in scheduled.ends]
        for sequence, segment in [*pairs, *through]:
            computed = [*sequence.tokens, *sequence.draft]
            for position, row in enumerate(rows_of(segment)):
                assert self.rows.get(row) == tuple(computed[: position + 1]), "contents are mixed"
        return changed | set(written)

    def pass_layers(
        self, scheduled: Scheduled, written: dict[int, tuple[int, ...]]
    ) -> list[tuple[Sequence, Segment]]:
        """A chunk goes on through its layers: each of them writes its rows, of which nobody else has any, and
        its slot is neither the one state nor the other until it is through.
        """
        plan = scheduled.plan
        if not plan.layers:
            assert plan.chunk is None
            assert len(scheduled.sequences) == len(plan.segments)
            live = self.made._planner._way
            if self.way is not None and live is not None and live.passed:
                assert live.sequence is self.way.sequence
                (segment,) = self.way.plan.segments
                assert not set(rows_of(segment)[segment.start :]) & set(written), (
                    "two sequences write one row"
                )
            return []
        assert not plan.ids
        if plan.chunk is not None:
            self.given_up += self.way is not None
            self.way = Way(scheduled.sequences[0], plan.chunk, 0)
        assert self.way is not None
        sequence, chunk, passed = self.way
        (segment,) = chunk.segments
        assert scheduled.sequences == [sequence]
        assert sequence is self.open[sequence.key]
        assert chunk.ids == sequence.tokens[segment.start : segment.end]
        own = rows_of(segment)[segment.start :]
        if not passed:
            self.see(chunk, [(sequence, segment)])
        passing = tuple(sequence.tokens[: segment.end])
        passed += plan.layers
        assert passed <= LAYERS
        if passed < LAYERS:
            self.way = Way(sequence, chunk, passed)
            self.rows |= dict.fromkeys(own, GARBAGE)
            written |= dict.fromkeys(own, GARBAGE)
            self.slots[segment.slot] = GARBAGE
            return []
        self.way = None
        self.layered += plan.layers < LAYERS
        written |= {row: passing[: position + 1] for position, row in enumerate(own, segment.start)}
        self.rows |= written
        self.slots[segment.slot] = passing
        return [(sequence, segment)]

    def see(self, plan: StepPlan, pairs: list[tuple[Sequence, Segment]]) -> None:
        """What states go through where a pass begins."""
        for sequence, segment in pairs:
            assert segment.slot == sequence.slot
            if self.made.states.active:
                assert 0 <= segment.slot < self.most
                if self.stride is not None:
                    assert segment.start // self.stride == (segment.end - 1) // self.stride
                seen = self.slots[segment.slot] if segment.start else ()
                assert seen == tuple(sequence.tokens[: segment.start]), "a state is of something else"
                self.slots[segment.slot] = tuple(sequence.tokens[: segment.end])

    def check_turns(self, waiting: list[Sequence], running: list[Sequence]) -> None:
        """First come, first served, but for those whose prompt begins with what is being computed; and
        whoever was made to give way had outgrown what it was promised.
        """
        for sequence in self.made._waiting:
            if sequence in running:
                self.preempted += 1
                assert self.pool.count_for(len(sequence.tokens)) > sequence.reserved
        still = [sequence for sequence in waiting if sequence in self.made._waiting]
        assert [sequence for sequence in self.made._waiting if sequence in still] == still
        started = [sequence for sequence in self.made._running if sequence not in running]
        if started:
            for passed in waiting[: waiting.index(started[-1])]:
                if passed not in started:
                    ahead = max(common(passed.tokens, other.tokens) for other in [*running, *started])
                    assert ahead >= self.pool.size, "it was passed, and nobody computes its beginning"
                    assert self.pool.caching

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            sequence = self.open[output.key]
            assert sequence.generated <= sequence.sampling.max_tokens
            if output.finish or output.error:
                assert len(output.ids) >= (output.finish == "length")
                self.histories = [*self.histories[-5:], list(sequence.tokens)]
                self.finished += output.finish is not None
                self.end(output.key)
            else:
                assert output.ids
                assert sequence.tokens[-len(output.ids) :] == output.ids

    def end(self, key: int) -> None:
        assert key not in self.ended, "a sequence has ended twice"
        self.ended.add(key)
        del self.open[key]

    def check(self) -> None:
        """The books, between two steps."""
        made, pool = self.made, self.pool
        everyone = [*made._running, *made._waiting]
        assert sorted(sequence.key for sequence in everyone) == sorted(self.open)
        assert made.running <= self.most
        pool.check([sequence.blocks for sequence in made._running])
        assert not any(sequence.blocks or sequence.promised for sequence in made._waiting)
        assert sum(sequence.promised for sequence in made._running) <= pool.available
        known = list(pool._walk(pool._root))
        made.states.check([s.slot for s in made._running if made.states.active], known)
        assert all(sequence.slot == NO_SLOT for sequence in made._waiting)
        held = {block.place for sequence in made._running for block in sequence.blocks}
        assert len(held) == pool.held
        if made.idle:
            assert pool.held == 0

    def drain(self) -> None:
        """Whatever is open comes to its end by itself."""
        for _ in range(10_000):
            if self.made.idle:
                break
            self.step([STOP])
            self.check()
        assert not self.open
        assert self.pool.held == 0


def rows_of(segment: Segment) -> list[int]:
    return [first + index for first, count in segment.runs for index in range(count)]


SHAPES: dict[str, Any] = {
    "size": st.sampled_from([1, 2, 4, 16]),
    "context": st.sampled_from([16, 40, 64]),
    "spare": st.integers(0, 40),
    "caching": st.sampled_from([True, True, True, False]),
    "chunk": st.sampled_from([1, 3, 8, 64]),
    "running": st.sampled_from([1, 3, 8]),
    "wait": st.sampled_from([None, 30.0]),
    "kept": st.sampled_from([None, None, 0, 1, 3, 30]),
    "stride": st.sampled_from([None, 1, 7, 16]),
}


class Traffic(RuleBasedStateMachine):
    @initialize(**SHAPES)
    def begin(self, **shape: Any) -> None:
        self.world = World(**shape)

    @rule(
        history=st.integers(0, 5),
        kept=st.integers(0, 64),
        new=st.lists(st.integers(0, VOCAB - 1), max_size=20),
        max_tokens=st.integers(1, 40),
        reserve=st.sampled_from([None, 1, 3, 0]),
        times=st.sampled_from([1, 1, 1, 4]),
    )
    def add(
        self, history: int, kept: int, new: list[int], max_tokens: int, reserve: int | None, times: int
    ) -> None:
        known = self.world.histories[history % len(self.world.histories)]
        for _ in range(times):
            if len(self.world.open) < SPEAKERS:
                self.world.add(known[:kept] + new, max_tokens, reserve)

    @rule(which=st.integers(0, SPEAKERS))
    def cancel(self, which: int) -> None:
        if self.world.open:
            self.world.cancel(list(self.world.open)[which % len(self.world.open)])

    @rule()
    def cancel_what_is_unknown(self) -> None:
        self.world.made.cancel(10**6)

    @rule(seconds=st.sampled_from([1.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @rule(tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4), times=st.integers(1, 8))
    def step(self, tokens: list[int], times: int) -> None:
        for _ in range(times):
            self.world.step(tokens)
            self.world.check()

    @rule()
    def break_a_step(self) -> None:
        self.world.step([STOP], breaks=True)

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestTraffic = Traffic.TestCase
TestTraffic.settings = hypothesis.settings(max_examples=100, stateful_step_count=100)
TestTraffic.pytestmark = [pytest.mark.slow]


def walk(seed: int, steps: int, words: int = VOCAB, **shape: Any) -> World:
    """Seeded traffic: prompts that begin like earlier ones, cancels, failures, time that passes. All tokens
    are among the first `words`.
    """
    chance = random.Random(seed)
    world = World(**shape)
    for _ in range(steps):
        what = chance.random()
        if what < 0.3 and len(world.open) < SPEAKERS:
            known = chance.choice(world.histories)
            new = [chance.randrange(words) for _ in range(chance.randrange(12))]
            max_tokens = chance.randrange(1, 40)
            reserve = chance.choice([None, min(max_tokens, 3)])
            world.add(known[: chance.randrange(len(known) + 1)] + new, max_tokens, reserve)
        elif what < 0.35 and world.open:
            world.cancel(chance.choice(list(world.open)))
        world.wait(1.0)
        world.step([chance.randrange(words) for _ in range(4)], breaks=chance.random() < 0.02)
        world.check()
    world.drain()
    assert world.ended == set(range(1, world.keys + 1))
    return world


@pytest.mark.slow
def test_ten_thousand_steps_of_random_traffic_mix_nothing_and_lose_nothing() -> None:
    world = walk(1, 10_000, size=4, context=64, spare=20, caching=True, chunk=8, running=8, wait=None)
    assert world.finished > 250
    assert min(5 * world.preempted, world.copied, world.hits) > 100, "the walk has seen all that there is"
    assert min(world.layered, 10 * world.given_up) > 100


@pytest.mark.slow
@pytest.mark.parametrize(("size", "spare"), [(4, 4), (1, 0), (16, 3)])
def test_drafts_that_are_half_right_leave_nothing_wrong_behind(size: int, spare: int) -> None:
    shape: dict[str, Any] = {"context": 64, "chunk": 8, "running": 1, "wait": None, "caching": True}
    world = walk(size, 4000, words=3, size=size, spare=spare, **shape)
    assert world.accepted > 200
    assert world.drafted - world.accepted > 200
    assert min(world.finished, world.hits) > 50


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("spare", [0, 30])
def test_random_traffic_over_caches_of_other_shapes(size: int, caching: bool, spare: int) -> None:
    world = walk(
        size, 4000, size=size, context=40, spare=spare // size, caching=caching, chunk=3, running=3, wait=50.0
    )
    assert world.finished > 20
    assert caching or not world.hits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kept", "spare", "stride"),
    [(4, 6, 20, None), (4, 40, 44, 24), (2, 3, 0, None), (16, 12, 8, 7), (4, 0, 20, 16)],
)
def test_random_traffic_with_states_resumes_from_what_they_have_seen(
    size: int, kept: int, spare: int, stride: int | None
) -> None:
    world = walk(
        kept,
        12000,
        size=size,
        context=64,
        spare=spare,
        caching=True,
        chunk=8,
        running=8,
        wait=None,
        kept=kept,
        stride=stride,
    )
    assert world.finished > 150
    assert min(30 * world.preempted, world.hits) > 40
    assert world.resumed > 20
    assert min(world.layered, world.given_up) > 10
