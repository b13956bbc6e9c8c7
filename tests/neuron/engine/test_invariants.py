"""What a sequence says does not depend on how the engine came to compute it.

Scheduler, runner and sampler are driven in this process with tiny random models. Every sequence's tokens and
the logits that they were sampled from are compared with those of the same sequence alone, in one piece, in an
empty cache. Rows of the cache that nobody has written are NaN, so that reading one shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor

from cortex.hookspecs import Sampling
from cortex.neuron.engine import loop
from cortex.neuron.engine.blocks import BlockPool
from cortex.neuron.engine.checkpoints import StateBooks
from cortex.neuron.engine.drafts import Drafter
from cortex.neuron.engine.loading import BLOCK
from cortex.neuron.engine.messages import Generate
from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.planning import Scheduled
from cortex.neuron.engine.runner import Runner, load_runner
from cortex.neuron.engine.sampler import Chosen
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.nn import matrix
from cortex.neuron.nn.placement import Dtype, Placement

pytestmark = pytest.mark.slow

CONTEXT, ROWS, KEPT = 256, 4096, 12


class Case(NamedTuple):
    """A tiny model, the form of its weights, and by how much logits may differ.

    In fp32 the order of sums changes with the number of rows, and with it the last bits. The packed forms
    multiply each row by itself, but what they multiply went through attention, whose sums are fp32 too and
    change their order with how a sequence lies in the cache; and a value that such a bit moves over the
    border of a 16-bit step moves by the whole step, so their logits may differ by what those steps amount
    to. Greedy choices may then differ where two tokens are as likely but for that.
    """

    kind: str
    options: dict[str, Any]
    form: Dtype
    tolerance: float
    stride: int | None = None
    """Layers with a window have slots of their own, and stretches of so many tokens there."""


RECURRENT: dict[Dtype, float] = {"float32": 5e-4, "packed16": 3e-3, "int8": 5e-3}
"""Where a state carries such bits on: in fp32 transformers differs by as much from its own fp64 run."""
TOLERANCES: dict[Dtype, float] = {"float32": 1e-4, "packed16": 3e-3, "int8": 3e-3}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 3},
    "gemma3_text": {"num_hidden_layers": 2, "sliding_window": 20},
    "gemma3_text in slots": {"num_hidden_layers": 2, "sliding_window": 20},
    "mistral in slots": {"num_hidden_layers": 2, "sliding_window": 10},
    "qwen3_moe": {"num_hidden_layers": 2},
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
}
"""Kinds that transformers makes, and what is changed in their configuration: with full attention, windows,
windows in slots, beside full attention and alone, experts, recurrent layers, and the last two together."""
STRIDES = {"gemma3_text in slots": 24, "mistral in slots": 7}
LONG = {"qwen2", "qwen3_moe", "qwen3_5_text", "mistral in slots"}
"""Those of which others have everything too."""
CASES = [
    pytest.param(
        Case(
            name.split()[0],
            options,
            form,
            RECURRENT[form] if "3_5" in name else tolerance,
            STRIDES.get(name),
        ),
        id=f"{name}-{form}",
        # Forms differ in what multiplies, the same for all kinds; int8 is one plane where packed16 has two.
        marks=[pytest.mark.long]
        if name in LONG or form == "int8" or (name != "llama" and form != "float32")
        else [],
    )
    for name, options in MODELS.items()
    for form, tolerance in TOLERANCES.items()
]


class Told(NamedTuple):
    """What became of a sequence."""

    tokens: list[int]
    logits: list[Tensor]
    cached: int


class Flight(NamedTuple):
    """A step that was computed and is not read yet."""

    scheduled: Scheduled
    rows: Tensor
    chosen: Chosen | None


class Engine:
    """The worker's loop without a worker: each step is taken by hand."""

    def __init__(
        self, runner: Runner, *, rows: int = ROWS, chunk: int = 512, run_ahead: bool = False, **settings: Any
    ) -> None:
        self._runner = runner
        self._run_ahead = run_ahead
        self._flight: Flight | None = None
        caching = settings.pop("caching", True)
        stride = runner._near.stride if runner._near else None
        settings.setdefault("drafting", 8 if runner.shape.delta is None else 0)
        self.pace = Pace(chunk, runner.shape.layers, runner.shape.even_context)
        self.scheduler = Scheduler(
            BlockPool(rows // BLOCK, BLOCK, caching=caching),
            context=CONTEXT,
            pace=self.pace,
            vocab=runner.shape.vocab,
            clock=lambda: 0.0,
            states=StateBooks(8, KEPT, block=BLOCK, stride=stride) if runner._pools else None,
            **settings,
        )
        self.told: dict[int, Told] = {}
        self.open: set[int] = set()
        self.moved = self.layered = self.drafted = self.ahead = 0
        """Blocks that were copied whole, steps in which a chunk passed some layers, tokens of drafts, and
        steps that set out before the last one was read."""
        runner._cache._stored.fill_(float("nan"))
        for stored in [part for pool in runner._pools for part in pool.stored]:
            stored.fill_(float("nan"))

    def add(self, order: Generate) -> None:
        assert self.scheduler.add(order) is None
        self.told[order.key] = Told([], [], 0)
        self.open.add(order.key)

    def cancel(self, key: int) -> None:
        self.scheduler.cancel(key)
        self.open.discard(key)

    def step(self) -> None:
        flight = self._flight
        if flight is None:
            scheduled = self.scheduler.schedule()
            if scheduled is None:
                assert not self.open
                return
            flight = self._launch(scheduled)
        self._flight = None
        if self._run_ahead and flight.chosen is not None:
            following = self.scheduler.follow(flight.scheduled)
            if following is not None:
                self.ahead += 1
                self._flight = self._launch(following, flight.chosen.tokens)
        self._land(flight)

    def _launch(self, scheduled: Scheduled, sampled: Tensor | None = None) -> Flight:
        self.moved += sum(copy.count == BLOCK for copy in scheduled.plan.copies)
        logits = self._runner.logits(scheduled.plan, sampled)
        self.layered += scheduled.plan.layers > 0
        rows = logits.clone()
        return Flight(scheduled, rows, loop._choose(logits, scheduled))

    def _land(self, flight: Flight) -> None:
        scheduled = flight.scheduled
        sampled = loop._read(flight.chosen)
        assert sampled is not None, "a row of the cache was read that nobody has written"
        counts = [1 + len(sequence.draft) for sequence in scheduled.sampled]
        rows = flight.rows.split(counts) if counts else []
        own_rows = {sequence.key: own for sequence, own in zip(scheduled.sampled, rows, strict=True)}
        for output in self.scheduler.complete(scheduled, sampled):
            told, own = self.told[output.key], own_rows[output.key]
            told.logits.extend(own[: len(output.ids) + (output.finish == "stop")])
            told.tokens.extend(output.ids)
            self.drafted += len(own) - 1
            if output.cached_tokens:
                self.told[output.key] = told._replace(cached=output.cached_tokens)
            if output.finish:
                self.open.discard(output.key)
        # As if a token of a prompt took as long as all who decode: each layer of a chunk gets its own step.
        layers = scheduled.plan.layers
        work = scheduled.work * (layers / self._runner.shape.layers if layers else 1)
        self.scheduler.took(scheduled, work if layers else 1.0 + work)

    def run(self, *orders: Generate) -> list[Told]:
        for order in orders:
            self.add(order)
        while self.open:
            self.step()
        assert self.scheduler.pool.held == 0
        return [self.told[order.key] for order in orders]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def load(case: Case, make_tiny: Callable[..., Any]) -> Callable[[], Runner]:
    placement = Placement(torch.device("cpu"), case.form)
    directory = make_tiny(case.kind, **case.options).directory

    def load() -> Runner:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matrix, "FEW_WEIGHTS", 0)  # the tiny model takes the form of large matrices
            return load_runner(
                directory,
                placement,
                cache_rows=ROWS,
                report=lambda done, total: None,
                working=8,
                kept=KEPT,
                stride=case.stride,
            )

    return load


@pytest.fixture(scope="module")
def runner(load: Callable[[], Runner]) -> Runner:
    return load()


@pytest.fixture(scope="module")
def alone(load: Callable[[], Runner]) -> Callable[[Generate], Told]:
    """A sequence by itself, in a cache of its own; found once for each."""
    runner = load()
    known: dict[bytes, Told] = {}

    def run(order: Generate) -> Told:
        key = msgspec.msgpack.encode((order.ids, msgspec.structs.replace(order.sampling, reserve=None)))
        if key not in known:
            (known[key],) = Engine(runner, caching=False, drafting=0).run(order)
        return known[key]

    return run


def prompt(seed: int, length: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(199) for _ in range(length)]


def order(key: int, ids: Sequence[int], max_tokens: int = 12, **sampling: Any) -> Generate:
    settings = Sampling(max_tokens=max_tokens, **{"temperature": 0.0, **sampling})
    return Generate(key=key, request_id=f"r{key}", ids=list(ids), sampling=settings)


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9, "seed": 5},
    {"repetition_penalty": 1.3},
    {"temperature": 1.3, "top_k": 20, "seed": 6, "frequency_penalty": 0.5},
    {},
    {"temperature": 0.7, "min_p": 0.02, "seed": 7},
    {"presence_penalty": 1.0, "logit_bias": {3: 4.0}},
    {"stop_ids": tuple(range(0, 199, 9)), "min_tokens": 6},
]


def eight() -> list[Generate]:
    """Eight prompts of all lengths with settings of all kinds."""
    return [
        order(1 + index, prompt(index, length), **MIXED[index])
        for index, length in enumerate((40, 3, 90, 17, 64, 1, 33, 130))
    ]


def same(found: Told, wanted: Told, case: Case) -> bool:
    """Whether all tokens are the same; the logits of what was chosen from the same beginning always are.

    In the packed forms a choice may differ where it hung on less than the tolerance (with a temperature,
    where the drawn number lies between two tokens), and what follows it then follows something else.
    """
    for index, (row, right) in enumerate(zip(found.logits, wanted.logits, strict=False)):
        assert (row - right).abs().max() <= case.tolerance, f"token {index}"
        if found.tokens[: index + 1] != wanted.tokens[: index + 1]:
            assert case.form != "float32", f"token {index} differs"
            return False
    assert found.tokens == wanted.tokens
    assert len(found.logits) == len(wanted.logits)
    return True


def all_same(found: Sequence[Told], wanted: Sequence[Told], case: Case) -> None:
    agreeing = [same(one, other, case) for one, other in zip(found, wanted, strict=True)]
    assert sum(agreeing) >= len(agreeing) / 2, "choices that hang on a rounding are few"


@pytest.mark.parametrize("seed", range(2))
def test_alone_is_in_a_batch_whose_others_join_leave_and_are_cancelled(
    case: Case, runner: Runner, alone: Callable[[Generate], Told], seed: int
) -> None:
    chance = random.Random(seed)
    engine = Engine(runner, chunk=chance.choice([16, 64, 512]))
    mine = eight()
    chance.shuffle(mine)
    others = 1000
    waiting = list(mine)
    while waiting or engine.open & {each.key for each in mine}:
        if waiting and chance.random() < 0.4:
            engine.add(waiting.pop())
        if chance.random() < 0.4:
            others += 1
            beginning = chance.choice(mine).ids[: chance.randrange(60)]
            ids = [*beginning, *prompt(others, chance.randrange(1, 40))]
            engine.add(order(others, ids, chance.randrange(1, 30), temperature=1.0))
        strangers = [key for key in engine.open if key > 1000]
        if strangers and (chance.random() < 0.4 or len(strangers) > 4):
            engine.cancel(chance.choice(strangers))
        # What steps have cost changes how much of a prompt goes into the next one.
        engine.pace.made(1 + chance.randrange(3), chance.choice([0, 30]), chance.random())
        engine.pace.passed(10, 1, chance.random())
        engine.step()
    assert others > 1004
    assert engine.layered
    all_same([engine.told[each.key] for each in mine], [alone(each) for each in mine], case)


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_chunks_of_any_size_are_one_piece(
    case: Case, runner: Runner, alone: Callable[[Generate], Told], chunk: int
) -> None:
    mine = eight()[:5]
    told = Engine(runner, chunk=chunk, max_running=2, caching=False).run(*mine)
    all_same(told, [alone(each) for each in mine], case)


def test_a_known_beginning_is_a_computed_one(
    case: Case, runner: Runner, alone: Callable[[Generate], Told]
) -> None:
    """A conversation that grows by its own replies; another branch of it; a prompt that is known whole."""
    engine = Engine(runner, chunk=64)
    ids = prompt(50, 45)
    found, wanted = [], []
    for turn in range(4):
        question = order(10 + turn, ids, 9, **MIXED[turn])
        (told,) = engine.run(question)
        assert bool(told.cached) == bool(turn)
        assert told.cached >= len(ids) - 8 if turn else True, "all but the question is known"
        found.append(told)
        wanted.append(alone(question))
        ids = [*ids, *told.tokens, *prompt(60 + turn, 7)]
    branch = order(20, [*ids[:70], *prompt(70, 20)])
    again = order(21, branch.ids)
    # A state is kept where a conversation is likely to go on, and not where this one happens to branch.
    known = (32, 32) if runner._pools else (70, 89)
    for question, cached in zip((branch, again), known, strict=True):
        (told,) = engine.run(question)
        assert told.cached == cached
        found.append(told)
        wanted.append(alone(question))
    all_same(found, wanted, case)


def test_eight_who_share_a_beginning_at_once_are_eight_who_do_not(
    case: Case, runner: Runner, alone: Callable[[Generate], Told]
) -> None:
    shared = prompt(80, 100)
    mine = [order(key, [*shared[: 100 - 7 * key], *prompt(key, 5)]) for key in range(1, 9)]
    engine = Engine(runner, chunk=32)
    found = engine.run(*mine)
    assert engine.scheduler.counts.hit > (100 if runner._pools else 300)
    all_same(found, [alone(each) for each in mine], case)


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_and_resumed_is_undisturbed(
    case: Case, runner: Runner, alone: Callable[[Generate], Told], caching: bool
) -> None:
    mine = [
        order(each.key, each.ids[:45], 60, reserve=1, **MIXED[index]) for index, each in enumerate(eight())
    ]
    engine = Engine(runner, rows=CONTEXT, caching=caching, drafting=0)
    found = engine.run(*mine)
    assert engine.scheduler.counts.preempted >= 2
    all_same(found, [alone(each) for each in mine], case)


def test_blocks_that_are_moved_together_keep_what_they_hold(
    case: Case, runner: Runner, alone: Callable[[Generate], Told]
) -> None:
    engine = Engine(runner, chunk=64, rows=CONTEXT * 3)
    ids = prompt(90, 30)
    found, wanted = [], []
    for turn in range(6):
        question = order(100 + turn, ids, 6)
        engine.add(order(200 + turn, prompt(turn, 20), 30))
        engine.add(question)
        while question.key in engine.open:
            engine.step()
        found.append(engine.told[question.key])
        wanted.append(alone(question))
        ids = [*ids, *engine.told[question.key].tokens, *prompt(95 + turn, 18)]
    assert engine.moved > 5
    all_same(found, wanted, case)


def test_drafts_change_nothing(
    case: Case, runner: Runner, alone: Callable[[Generate], Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any drafts, right ones and wrong ones: of what was said without them, now and then something else."""
    chance = random.Random(1)
    mine = [order(1 + index, prompt(index, 20 + 9 * index), 40, **MIXED[index]) for index in (0, 1, 4, 5)]
    wanted = [alone(each) for each in mine]
    engine = Engine(runner)
    texts = [[*each.ids, *told.tokens] for each, told in zip(mine, wanted, strict=True)]

    def propose(drafter: Drafter, tokens: list[int], most: int) -> list[int]:
        (saying,) = [text for text in texts if text[:20] == tokens[:20]]
        draft = saying[len(tokens) : len(tokens) + min(most, chance.randint(0, 5))]
        return [token if chance.random() < 0.8 else 0 for token in draft]

    monkeypatch.setattr(Drafter, "propose", propose)
    one_by_one = [told for each in mine for told in engine.run(each)]
    drafted = engine.drafted
    again = [msgspec.structs.replace(each, key=100 + each.key) for each in mine]
    together = engine.run(*again)
    counts = engine.scheduler.take_counts()
    if runner.shape.delta is not None:
        assert not engine.drafted, "what a state has seen cannot be taken back"
    else:
        assert engine.drafted == counts.drafted > counts.accepted > 40
        assert engine.drafted > drafted + 20 > 40
    all_same(one_by_one, wanted, case)
    all_same(together, wanted, case)


def test_a_seed_says_the_same_whatever_the_batch(case: Case, runner: Runner) -> None:
    def seeded(key: int, seed: int) -> Generate:
        return order(key, prompt(1, 20), 20, temperature=1.2, seed=seed)

    seeds = range(6)
    alone = [Engine(runner).run(seeded(1, seed))[0] for seed in seeds]
    others = [order(key, prompt(key, 3 * key), 25, temperature=1.0) for key in range(10, 16)]
    mine = [seeded(seed + 1, seed) for seed in seeds]
    told = Engine(runner, chunk=16).run(*others[:3], *mine[:3], *others[3:], *mine[3:])
    all_same([*told[3:6], *told[9:]], alone, case)
    assert len({tuple(one.tokens) for one in alone}) == len(seeds), "each seed says something else"


def test_steps_that_set_out_before_the_last_one_is_read_change_nothing(
    case: Case, runner: Runner, alone: Callable[[Generate], Told]
) -> None:
    """Beside others who come, go and end; what was computed of somebody who had ended is nobody's."""
    chance = random.Random(4)
    engine = Engine(runner, chunk=64, run_ahead=True, max_running=6, drafting=1)
    settings = [MIXED[index] for index in (0, 1, 5, 7)] + [{"temperature": 0.8, "top_k": 9, "seed": 8}]
    mine = [order(1 + index, prompt(index, 30), 90, **each) for index, each in enumerate(settings)]
    if runner._pools:
        engine.run(*mine[:2])
        assert not engine.ahead, "what a state has seen cannot be taken back"
        return
    waiting, others, wasted = list(mine), 100, 0
    while waiting or engine.open & {each.key for each in mine}:
        if waiting and chance.random() < 0.2:
            engine.add(waiting.pop())
        strangers = [key for key in engine.open if key > 100]
        if len(strangers) < 3 and chance.random() < 0.1:
            others += 1
            often = tuple(range(0, 199, 7))
            engine.add(order(others, prompt(others, 9), 60, temperature=1.0, seed=others, stop_ids=often))
        elif strangers and chance.random() < 0.1:
            engine.cancel(chance.choice(strangers))
        engine.step()
        wasted += engine.scheduler.take_counts().wasted
    assert engine.ahead > 20
    assert wasted
    all_same([engine.told[each.key] for each in mine], [alone(each) for each in mine], case)
