"""Steps that set out before anybody has read what the last one has sampled."""

from __future__ import annotations

import inspect
import random
import socket
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cortex.hookspecs import Sampling
from cortex.neuron.engine.blocks import BlockPool
from cortex.neuron.engine.channel import Channel
from cortex.neuron.engine.checkpoints import StateBooks
from cortex.neuron.engine.loading import DRAFTING, make_scheduler, runs_ahead
from cortex.neuron.engine.loop import Loop
from cortex.neuron.engine.messages import (
    Cancel,
    Generate,
    Load,
    Order,
    Output,
    Step,
    Unframer,
    decode_report,
    frame,
)
from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.planning import Scheduled
from cortex.neuron.engine.ranks import Ranks
from cortex.neuron.engine.sampler import CANDIDATES, Row, choose
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.engine.sequence import Sequence, Tally
from cortex.neuron.models.reading import read_shape
from cortex.neuron.nn.placement import Share
from cortex.neuron.nn.plan import Segment, StepPlan
from cortex.neuron.weights.checkpoint import open_checkpoint

STOP, SIZE, VOCAB = 9, 4, 100


def made(*, blocks: int = 64, context: int = 64, **settings: Any) -> Scheduler:
    settings = {"drafting": 0, "max_running": 4, **settings}
    pool, pace = BlockPool(blocks, SIZE), Pace(64, 6, 1000)
    return Scheduler(pool, context=context, pace=pace, vocab=VOCAB, clock=lambda: 0.0, **settings)


def order(key: int, length: int = 3, max_tokens: int = 20, **sampling: Any) -> Generate:
    settings = Sampling(max_tokens=max_tokens, temperature=0, stop_ids=(STOP,), **sampling)
    return Generate(key=key, request_id=f"r{key}", ids=[10 + key % 40] * length, sampling=settings)


def scheduled(scheduler: Scheduler) -> Scheduled:
    found = scheduler.schedule()
    assert found is not None
    return found


def complete(scheduler: Scheduler, step: Scheduled, *tokens: int) -> list[Output]:
    outputs = scheduler.complete(step, [(token, None) for token in tokens])
    scheduler.took(step, 0.01)
    return outputs


def under_way(scheduler: Scheduler, *orders: Generate) -> Scheduled:
    """A step in which all of them decode."""
    for each in orders:
        assert scheduler.add(each) is None
    for _ in range(2):
        complete(scheduler, scheduled(scheduler), *[50] * len(orders))
    return scheduled(scheduler)


def follow(scheduler: Scheduler, step: Scheduled) -> Scheduled:
    found = scheduler.follow(step)
    assert found is not None
    return found


def test_the_next_step_computes_the_token_after_the_one_that_nobody_has_read() -> None:
    scheduler = made()
    first = under_way(scheduler, order(1), order(2, length=5))
    second = follow(scheduler, first)
    assert first.plan.segments == [
        Segment(4, 1, [(0, 5)]),
        Segment(6, 1, [(first.plan.segments[1].runs[0][0], 7)]),
    ]
    assert [(part.start, part.length) for part in second.plan.segments] == [(5, 1), (7, 1)]
    assert (second.plan.follows, second.plan.wanted, len(second.plan.ids)) == ([0, 1], [0, 1], 2)
    assert (second.ahead, second.decoding, second.rows) == (1, 2, 2)
    assert [output.ids for output in complete(scheduler, first, 51, 52)] == [[51], [52]]
    third = follow(scheduler, second)
    assert [output.ids for output in complete(scheduler, second, 61, 62)] == [[61], [62]]
    assert [part.start for part in third.plan.segments] == [6, 8]
    complete(scheduler, third, 71, 72)
    normal = scheduled(scheduler)
    assert (normal.plan.ids, normal.plan.follows, normal.ahead) == ([71, 72], [], 0)
    assert [part.start for part in normal.plan.segments] == [7, 9]


def test_a_prompt_that_is_through_goes_on_the_same_way() -> None:
    scheduler = made()
    scheduler.add(order(1, length=5))
    prompt = scheduled(scheduler)
    second = follow(scheduler, prompt)
    assert (second.plan.segments[0].start, second.plan.follows) == (5, [0])


def test_what_was_computed_of_somebody_who_had_ended_is_nobodys() -> None:
    scheduler = made()
    first = under_way(scheduler, order(1), order(2), order(3))
    second = follow(scheduler, first)
    ended, *others = complete(scheduler, first, STOP, 51, 52)
    assert (ended.key, ended.finish, len(others)) == (1, "stop", 2)
    scheduler.cancel(2)
    third = follow(scheduler, second)
    assert (len(third.plan.segments), third.plan.follows) == (1, [2]), "who is left keeps its row"
    assert [(output.key, output.ids) for output in complete(scheduler, second, 66, 77, 53)] == [(3, [53])]
    assert [(output.key, output.ids) for output in complete(scheduler, third, STOP)] == [(3, [])]
    assert scheduler.take_counts().wasted == 2
    assert scheduler.idle
    assert scheduler.pool.held == 0
    known = scheduler.pool.match([11] * 3 + [50] * 2 + [66] * 9)
    assert known.tokens(SIZE) == 5, "what came after its end is not known of it"


def test_nobody_is_computed_beyond_its_length() -> None:
    scheduler = made(context=16)
    first = under_way(scheduler, order(1, max_tokens=3), order(2, max_tokens=4), order(3, length=13))
    second = follow(scheduler, first)
    assert [sequence.key for sequence in second.sequences] == [2]
    assert [output.finish for output in complete(scheduler, first, 51, 52, 53)] == ["length", None, "length"]
    assert scheduler.follow(second) is None, "all that there is ends with it"
    (output,) = complete(scheduler, second, 54)
    assert (output.key, output.finish) == (2, "length")
    assert scheduler.take_counts().wasted == 0


def test_whoever_may_start_is_waited_for_and_whoever_may_not_is_not() -> None:
    scheduler = made(max_running=2)
    first = under_way(scheduler, order(1), order(2))
    scheduler.add(order(3))
    second = follow(scheduler, first)
    complete(scheduler, first, STOP, 51)
    assert scheduler.follow(second) is None
    complete(scheduler, second, 77, 52)
    assert scheduler.schedule() is not None
    assert {sequence.key for sequence in scheduler._running} == {2, 3}


@pytest.mark.parametrize(
    "sampling", [{"repetition_penalty": 1.2}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}]
)
def test_what_depends_on_the_last_token_is_waited_for(sampling: dict[str, Any]) -> None:
    scheduler = made()
    assert scheduler.follow(under_way(scheduler, order(1), order(2, **sampling))) is None


def test_states_and_prompts_are_waited_for() -> None:
    scheduler = made(states=StateBooks(4, 0, block=SIZE))
    assert scheduler.follow(under_way(scheduler, order(1), order(2))) is None, "a state cannot forget a token"
    scheduler = made()
    complete(scheduler, under_way(scheduler, order(1)), 51)
    scheduler.add(order(2, length=60))
    began = scheduled(scheduler)
    assert {sequence.key for sequence in began.sequences} == {1}
    assert scheduler.follow(began) is None, "the prompt's turn comes"


def test_a_sequence_alone_is_waited_for_where_it_may_have_drafts() -> None:
    scheduler = made(drafting=1)
    first = under_way(scheduler, order(1))
    (sequence,) = first.sequences
    assert scheduler.follow(first) is None
    sequence.drafter._resumes = 99
    assert scheduler.follow(first) is not None, "drafts rest"


def test_a_full_block_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cortex.neuron.engine.scheduler.AHEAD", 1)
    monkeypatch.setattr("cortex.neuron.engine.scheduler.PART", 10**6)
    scheduler = made()
    step = under_way(scheduler, order(1))
    followed = 0
    for _ in range(12):
        (sequence,) = scheduler._running
        room = len(sequence.blocks) * SIZE - len(sequence.tokens)
        following = scheduler.follow(step)
        assert (following is not None) == (room > 0)
        followed += following is not None
        complete(scheduler, step, 51)
        step = following or scheduled(scheduler)
    assert followed in range(6, 12)


def test_random_traffic_with_steps_ahead_loses_nothing_and_nobody() -> None:
    """Who comes, ends, is cancelled or given way, in whatever phase; and steps that break."""
    chance = random.Random(1)
    scheduler = made(blocks=22, max_running=4)
    open_, ended, ahead, broken = set[int](), list[int](), 0, 0
    key, flight = 0, None
    while key < 400 or not scheduler.idle or flight is not None:
        if key < 400 and chance.random() < 0.2:
            key += 1
            scheduler.add(order(key, chance.randrange(1, 30), chance.randrange(1, 30), reserve=2))
            open_.add(key)
        if open_ and chance.random() < 0.05:
            gone = chance.choice(sorted(open_))
            scheduler.cancel(gone)
            open_.discard(gone)
            ended.append(gone)
        step = flight or scheduler.schedule()
        flight = None
        if step is None:
            continue
        flight = scheduler.follow(step)
        ahead += flight is not None
        if chance.random() < 0.02:
            broken += 1
            outputs = scheduler.fail(step, "broken")
        else:
            tokens = [STOP if chance.random() < 0.05 else 50 for _ in range(step.rows)]
            outputs = complete(scheduler, step, *tokens)
        for output in outputs:
            assert output.key in open_, "it has ended"
            if output.finish or output.error:
                open_.discard(output.key)
                ended.append(output.key)
        scheduler.pool.check([sequence.blocks for sequence in scheduler._running])
        running = [*scheduler._running, *scheduler._waiting]
        assert {sequence.key for sequence in running} == open_
    assert sorted(ended) == [*range(1, 401)]
    counts = scheduler.take_counts()
    assert min(ahead, 10 * counts.wasted, 10 * broken, 10 * counts.preempted) > 100
    assert scheduler.pool.held == 0


# --- in the loop ----------------------------------------------------------------------------------


class ScriptedRunner:
    """A sequence says the number of its tokens so far; each plan and what it follows are written down. At a
    step of so many, an error or what the node has to say."""

    def __init__(self, node: socket.socket, at: int, happens: Exception | Order | None) -> None:
        self.device = torch.device("cpu")
        self.most_threads: int | None = None
        self.seen: list[tuple[StepPlan, list[int] | None]] = []
        self._node, self._at, self._happens = node, at, happens

    def logits(self, plan: StepPlan, sampled: Tensor | None = None) -> Tensor:
        self.seen.append((plan, None if sampled is None else sampled.tolist()))
        if len(self.seen) == self._at:
            if isinstance(self._happens, Exception):
                raise self._happens
            if self._happens is not None:
                self._node.sendall(frame(self._happens))
        logits = torch.zeros(len(plan.wanted), VOCAB)
        for row, part in enumerate(plan.segments):
            logits[row, part.end] = 1.0
        return logits


def served(
    *orders: Order, run_ahead: bool = True, at: int = 0, happens: Exception | Order | None = None
) -> tuple[list[Step], ScriptedRunner]:
    """What a loop says that finds these orders, until it has nothing more to do."""
    ours, theirs = socket.socketpair()
    with ours:
        runner = ScriptedRunner(ours, at, happens)
        scheduler = made()
        with theirs, pytest.MonkeyPatch.context() as patch:
            loop = Loop(
                Channel(theirs),
                runner,  # type: ignore[arg-type]
                scheduler,
                Ranks(Share()),
                lambda: 0.0,
                run_ahead=run_ahead,
            )
            ours.sendall(b"".join(map(frame, orders)))
            patch.setattr(Channel, "next", _end_if_none(Channel.next))
            with pytest.raises(EndOfOrders):
                loop.run()
        data = b"".join(iter(lambda: ours.recv(65536), b""))
    assert scheduler.pool.held == 0
    reports = [decode_report(body) for body in Unframer().feed(data)]
    return [report for report in reports if isinstance(report, Step)], runner


class EndOfOrders(Exception):
    pass


def _end_if_none(take: Any) -> Any:
    def take_or_end(channel: Channel) -> Order:
        channel.check()
        if not channel._orders:
            raise EndOfOrders
        found: Order = take(channel)
        return found

    return take_or_end


def replies(steps: list[Step]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for output in [output for step in steps for output in step.outputs]:
        found.setdefault(output.key, []).extend(output.ids)
    return found


def test_steps_set_out_before_the_last_one_is_told_of_and_say_the_same() -> None:
    orders: list[Order] = [order(1, max_tokens=5), order(2, length=6, max_tokens=9)]
    steps, runner = served(*orders)
    told = replies(steps)
    assert told == {1: [3, 4, 5, 6, 7], 2: [6, 7, 8]}, "the second one ends at token 9, which is a stop"
    plain, plainly = served(*orders, run_ahead=False)
    assert replies(plain) == told
    assert all(sampled is None for _, sampled in plainly.seen)
    following = [(plan, sampled) for plan, sampled in runner.seen if plan.follows]
    assert len(following) >= 4
    assert following[0][1] == [3, 6], "what the prompts' step has sampled, and nobody has read"
    done = [step.done for step in steps if step.done]
    assert sum(each.decode_tokens for each in done) == 4 + 3, (
        "a token of somebody who has ended counts as none"
    )
    assert sum(each.decode_tokens for each in (step.done for step in plain) if each) == 4 + 3


def test_a_step_ahead_that_breaks_fails_those_in_it_and_the_loop_goes_on() -> None:
    steps, _ = served(order(1), order(2), at=3, happens=ValueError("surprise"))
    outputs = [output for step in steps for output in step.outputs]
    assert [output.key for output in outputs if output.error] == [1, 2]
    assert all("surprise" in str(output.error) for output in outputs if output.error)
    assert replies(steps) == {1: [3, 4], 2: [3, 4]}, "what was read before"


def test_a_cancel_reaches_a_sequence_whose_step_is_on_its_way() -> None:
    """It comes while the third token is computed; the second one is told then."""
    orders = order(1, max_tokens=50), order(2, max_tokens=5)
    steps, runner = served(*orders, at=3, happens=Cancel(key=1))
    assert replies(steps) == {1: [3, 4], 2: [3, 4, 5, 6, 7]}
    assert [len(plan.segments) for plan, _ in runner.seen] == [2, 2, 2, 1, 1]


AHEAD = {"cuda_run_ahead": True}


@pytest.mark.parametrize(
    ("kind", "changes", "ahead", "drafting"),
    [
        ("llama", {"options": AHEAD}, True, 1),
        ("llama", {"options": {**AHEAD, "prompt_lookup": False}}, True, 0),
        ("llama", {}, False, 6),
        ("llama", {"options": AHEAD, "world": 2}, False, 6),
        ("llama", {"options": AHEAD, "device": "cpu"}, False, DRAFTING),
        ("llama", {"options": {"prompt_lookup": False}}, False, 0),
        ("gemma3_text", {"options": AHEAD, "windowed": True}, False, 6),
        ("qwen3_moe", {"options": AHEAD}, False, 6),
        ("qwen3_5_text", {"options": AHEAD}, False, 0),
    ],
)
def test_who_runs_ahead_and_how_many_may_have_drafts(
    make_tiny: Any, kind: str, changes: dict[str, Any], ahead: bool, drafting: int
) -> None:
    settings = {"device": "GPU-a", "max_running": 6, "context": 64, "cache_tokens": 512, **changes}
    load = Load(path="", dtype="packed16", prefill_chunk=64, threads=1, **settings)
    with open_checkpoint(make_tiny(kind).directory) as checkpoint:
        shape = read_shape(checkpoint)
    assert runs_ahead(load, shape) is ahead
    assert make_scheduler(load, shape)._drafting == drafting


# --- on a device that is not there ----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.0, "top_k": CANDIDATES[0] + 1, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.9, "logprobs": 3, "logit_bias": {3: 1.0}},
    ],
    ids=str,
)
def test_a_gpu_chooses_without_the_host_reading_anything(settings: dict[str, Any]) -> None:
    """Reading a number of a fake tensor is an error. Nobody waits, as where steps run ahead."""
    device = torch.device("cuda", 0)
    tally = Tally([])
    rows = [
        Row(Sampling(max_tokens=1, stop_ids=(STOP,), **each), 2**63, tally.ids, tally.counts, withhold=True)
        for each in (settings, {"temperature": 0.0}, settings)
    ]
    with FakeTensorMode():
        choosing = inspect.unwrap(choose)  # inference mode has no devices that are not there
        chosen = choosing(torch.empty(3, 2 * CANDIDATES[1], device=device), rows, waits=False)
    assert (chosen.tokens.shape, chosen.tokens.dtype) == ((3,), torch.int64)
    assert chosen.tokens.device == device


def test_the_number_for_the_token_after_next_is_the_next_ones_then() -> None:
    """The number for the token after one that nobody has read is the sequence's next but one."""
    sequence = Sequence(order(1), 0.0)
    second = sequence.draw(1)
    sequence.append(50, 0.0)
    assert sequence.draw(0) == second
