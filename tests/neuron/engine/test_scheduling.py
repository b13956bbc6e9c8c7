from __future__ import annotations

from typing import Any

import pytest

from cortex.hookspecs import EngineTimings, Sampling, TokenLogprobs
from cortex.neuron.engine.blocks import BlockPool
from cortex.neuron.engine.messages import Generate, Output
from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.planning import Scheduled
from cortex.neuron.engine.scheduler import MOST_RUNS, Scheduler
from cortex.neuron.engine.sequence import Sampled, Sequence
from cortex.neuron.nn.plan import Segment

STOP = 9
SIZE = 4
LAYERS = 6


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scheduler(
    clock: Clock | None = None, *, blocks: int = 32, size: int = SIZE, caching: bool = True, **changes: Any
) -> Scheduler:
    settings = {"context": 32, "vocab": 100, "drafting": 0, **changes}
    pace = Pace(settings.pop("prefill_chunk", 4), LAYERS, 1000)
    return Scheduler(BlockPool(blocks, size, caching=caching), **settings, pace=pace, clock=clock or Clock())


def order(
    key: int, length: int = 3, max_tokens: int = 4, *, ids: list[int] | None = None, **sampling: Any
) -> Generate:
    """A prompt that begins like no other key's, unless `ids` are given."""
    if ids is None:
        ids = [(10 + key + index) % 100 for index in range(length)]
    settings = Sampling(max_tokens=max_tokens, stop_ids=(STOP,), **sampling)
    return Generate(key=key, request_id=f"r{key}", ids=ids, sampling=settings)


def planned(made: Scheduler) -> Scheduled:
    scheduled = made.schedule()
    assert scheduled is not None
    return scheduled


def keys(scheduled: Scheduled) -> list[int]:
    return [sequence.key for sequence in scheduled.sequences]


def said(*tokens: int) -> list[Sampled]:
    return [(token, None) for token in tokens]


def step(made: Scheduler, token: int = 50) -> list[Output]:
    """One whole step in which every sampled row gives `token`."""
    scheduled = planned(made)
    outputs = made.complete(scheduled, said(*[token] * len(scheduled.sampled)))
    made.took(scheduled, cost(scheduled))
    return outputs


def cost(scheduled: Scheduled) -> float:
    """Seconds of a step in which decode takes 10 ms, and a prompt's work 1 ms in all layers."""
    if scheduled.plan.layers:
        return 0.001 * scheduled.work * scheduled.plan.layers / LAYERS
    return 0.010 + 0.001 * scheduled.work


def finish(made: Scheduler, token: int = STOP) -> None:
    while not made.idle:
        step(made, token)


# --- one sequence ---


def test_a_prompt_is_computed_in_chunks_and_only_its_last_row_is_sampled() -> None:
    made = scheduler()
    assert made.add(order(1, length=10)) is None
    for start, length, wanted in [(0, 4, []), (4, 4, []), (8, 2, [1])]:
        scheduled = planned(made)
        assert scheduled.plan.ids == list(range(11 + start, 11 + start + length))
        assert scheduled.plan.segments == [Segment(start, length, [(0, start + length)])]
        assert scheduled.plan.positions == list(range(start, start + length))
        assert scheduled.plan.wanted == wanted
        assert (scheduled.decoding, scheduled.prefill) == (0, length)
        outputs = made.complete(scheduled, said(*[50] * len(wanted)))
    assert outputs == [Output(key=1, ids=[50], cached_tokens=0)]
    decode = planned(made)
    assert (decode.plan.ids, decode.plan.segments, decode.plan.wanted) == (
        [50],
        [Segment(10, 1, [(0, 11)])],
        [0],
    )
    assert (decode.decoding, decode.prefill) == (1, 0)


def test_a_stop_id_ends_the_sequence_and_is_not_given_out() -> None:
    made = scheduler()
    made.add(order(1))
    step(made)
    (output,) = step(made, STOP)
    assert (output.ids, output.finish) == ([], "stop")
    assert made.idle
    assert made.schedule() is None


def test_max_tokens_end_the_sequence_with_its_last_token() -> None:
    made = scheduler()
    made.add(order(1, max_tokens=2))
    step(made)
    (output,) = step(made, 51)
    assert (output.ids, output.finish) == ([51], "length")
    assert made.idle


def test_a_full_context_ends_the_sequence() -> None:
    made = scheduler(context=5)
    made.add(order(1, length=3, max_tokens=100))
    assert step(made)[0].finish is None
    (output,) = step(made, 51)
    assert (output.ids, output.finish) == ([51], "length")


def test_times_are_split_into_queue_prefill_and_decode() -> None:
    clock = Clock()
    made = scheduler(clock)
    made.add(order(1, length=6, max_tokens=2))
    clock.now = 1.0
    scheduled = planned(made)
    clock.now = 1.5
    made.complete(scheduled, [])
    scheduled = planned(made)
    clock.now = 3.0
    assert made.complete(scheduled, said(50))[0].timings is None
    scheduled = planned(made)
    clock.now = 3.25
    (output,) = made.complete(scheduled, said(51))
    assert output.timings == EngineTimings(queue_ms=1000.0, prefill_ms=2000.0, decode_ms=250.0)


def test_what_was_asked_about_a_token_goes_out_with_it_but_not_with_a_stop_id() -> None:
    made = scheduler()
    made.add(order(1, logprobs=1))
    told = TokenLogprobs(50, -0.5, [(50, -0.5)])
    assert made.complete(planned(made), [(50, told)])[0].logprobs == [told]
    assert made.complete(planned(made), [(STOP, told)])[0].logprobs is None


def test_the_last_token_brings_what_was_asked_about_it() -> None:
    made = scheduler()
    made.add(order(1, max_tokens=1, logprobs=0))
    told = TokenLogprobs(50, -0.5, [])
    (output,) = made.complete(planned(made), [(50, told)])
    assert (output.logprobs, output.finish, output.cached_tokens) == ([told], "length", 0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (order(1, length=0), "The prompt is empty"),
        (order(1, length=32), "The prompt has 32 tokens; the context of 32"),
        (order(1, max_tokens=0), "max_tokens is 0"),
        (Generate(key=1, request_id="r", ids=[3, 100], sampling=Sampling(max_tokens=1)), "100 tokens"),
        (Generate(key=1, request_id="r", ids=[-1], sampling=Sampling(max_tokens=1)), "100 tokens"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(bad: Generate, words: str) -> None:
    made = scheduler()
    refused = made.add(bad)
    assert refused is not None
    assert refused.error is not None
    assert words in refused.error
    assert refused.code == "invalid"
    assert made.idle


def test_a_pool_that_cannot_hold_one_context_is_refused() -> None:
    with pytest.raises(ValueError, match="7 blocks of 4 tokens cannot hold 32 tokens"):
        scheduler(blocks=7)


# --- many sequences ---


def test_a_waiting_sequence_gets_the_place_that_is_left() -> None:
    made = scheduler(max_running=1)
    made.add(order(1, max_tokens=1))
    made.add(order(2))
    first = planned(made)
    assert keys(first) == [1]
    assert (made.running, made.waiting) == (1, 1)
    made.complete(first, said(50))
    assert keys(planned(made)) == [2]


def test_no_more_run_than_may_and_all_come_to_their_turn() -> None:
    made = scheduler(max_running=3, prefill_chunk=64)
    for key in range(1, 8):
        made.add(order(key, max_tokens=2))
    seen = []
    while not made.idle:
        scheduled = planned(made)
        assert len(scheduled.sequences) == made.running <= 3
        seen += [key for key in keys(scheduled) if key not in seen]
        made.complete(scheduled, said(*[50] * len(scheduled.sampled)))
    assert seen == list(range(1, 8)), "first come, first served"


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["waiting", "prefill", "decode"])
def test_a_cancelled_sequence_is_in_no_later_step(steps: int) -> None:
    made = scheduler()
    made.add(order(1, length=6, max_tokens=20))
    for _ in range(steps):
        step(made)
    made.cancel(1)
    assert made.idle
    assert made.pool.held == 0
    assert made.schedule() is None
    made.cancel(1)  # a second time, as when it had finished
    made.add(order(2))
    assert [(part.start, part.length) for part in planned(made).plan.segments] == [(0, 3)]


def test_a_sequence_that_has_waited_too_long_is_told_that_it_is_busy() -> None:
    clock = Clock()
    made = scheduler(clock, max_running=1, max_wait_s=5.0)
    made.add(order(1, max_tokens=20))
    step(made)
    made.add(order(2))
    clock.now = 3.0
    made.add(order(3))
    clock.now = 5.0
    assert made.expired() == []
    clock.now = 5.5
    (late,) = made.expired()
    assert (late.key, late.code, late.ids) == (2, "busy", [])
    assert late.error == "it waited 5 s and could not start"
    assert (made.running, made.waiting) == (1, 1), "who runs has started, and who came later still may"


def test_whoever_has_started_does_not_expire_even_if_it_had_to_give_way() -> None:
    clock = Clock()
    made = scheduler(clock, blocks=8, max_wait_s=5.0)
    for key in (1, 2):
        made.add(order(key, length=3, max_tokens=28, reserve=1))
    while not made.counts.preempted:
        step(made)
    clock.now = 100.0
    assert made.waiting == 1
    assert made.expired() == []


def test_whoever_is_held_back_by_the_engine_does_not_expire_for_that() -> None:
    clock = Clock()
    made = scheduler(clock, context=64, prefill_chunk=4, max_wait_s=5.0)
    prompt = list(range(20, 60))
    made.add(order(1, ids=prompt))
    step(made)
    made.add(order(2, ids=[*prompt, 61]))
    step(made)
    clock.now = 100.0
    assert made.waiting == 1
    assert made.expired() == []
    while made.waiting:
        assert made.expired() == [], "its own wait begins when what it waits for is there"
        step(made)


def test_a_short_prompt_waits_for_no_long_one_that_is_not_under_way() -> None:
    made = scheduler(context=128, prefill_chunk=32, blocks=96)
    head = list(range(20, 30))
    made.add(order(1, ids=[5] * 90))
    step(made)
    made.add(order(2, ids=[*head, *[6] * 60]))
    step(made)
    made.add(order(3, ids=[*head, 7]))
    step(made)
    assert [sequence.key for sequence in made._running] == [1, 2], "it begins like one that is long itself"
    made.add(order(4, ids=[*head[:5], 8, 8]))
    made.schedule()
    assert [sequence.key for sequence in made._running] == [1, 2, 4]


def test_who_is_held_back_is_not_looked_up_again_until_what_it_awaits_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = scheduler(context=64, prefill_chunk=4)
    prompt = list(range(20, 60))
    made.add(order(1, ids=prompt))
    step(made)
    made.add(order(2, ids=[*prompt[:30], 61]))
    looked_up: list[int] = []
    match = made.pool.match
    monkeypatch.setattr(made.pool, "match", lambda tokens: looked_up.append(len(tokens)) or match(tokens))
    steps = 0
    while made.waiting:
        step(made)
        steps += 1
    assert len(looked_up) < steps + 2


def test_a_prompt_that_was_admitted_twice_before_its_first_token_is_queried_once() -> None:
    made = scheduler(context=64, prefill_chunk=4)
    made.add(order(1, ids=list(range(20, 32)), max_tokens=1))
    scheduled = planned(made)
    made.add(order(2, ids=list(range(40, 52)), max_tokens=1))
    made._admit()
    made.fail(scheduled, "it broke")
    while made.running or made.waiting:
        step(made)
    assert made.take_counts().queried == 12


# --- what fails ---


def test_a_broken_step_fails_the_sequences_in_it_only() -> None:
    made = scheduler(max_running=1)
    made.add(order(1))
    made.add(order(2))
    assert made.fail(planned(made), "why") == [Output(key=1, ids=[], error="why")]
    assert keys(planned(made)) == [2]


def test_those_who_were_not_in_a_broken_step_are_computed_anew() -> None:
    """Its copies and writes may have happened or not, so nothing of the cache is believed any more."""
    made = scheduler(prefill_chunk=6)
    made.add(order(1, length=6, max_tokens=20))
    step(made)  # the first one decodes; its next step is full of the two prompts
    made.add(order(2, ids=[60] * 12))
    made.add(order(3, ids=[70] * 12))
    for _ in range(2):
        assert [output.key for output in step(made)] == [1], "the two prompts are too long to go along"
    scheduled = planned(made)
    assert keys(scheduled) == [2], "which passes some layers; the third one comes after it"
    assert [output.key for output in made.fail(scheduled, "why")] == [2]
    scheduled = planned(made)
    assert keys(scheduled) == [1]
    assert scheduled.plan.segments[0].start == 0, "it computes its reply's beginning anew"
    assert made.pool.idle == 0


def test_a_lost_device_fails_the_sequences_in_its_step_and_says_nothing_of_the_others() -> None:
    made = scheduler(max_running=1)
    made.add(order(1))
    made.add(order(2))
    assert [output.key for output in made.give_up(planned(made), "why")] == [1]
    assert made.take_counts().preempted == 0
    assert made.pool.held == 0


# --- the prefix cache ---


def test_a_prompt_that_was_seen_before_is_not_computed_again() -> None:
    made = scheduler(context=64, prefill_chunk=64)
    prompt = list(range(20, 37))
    made.add(order(1, ids=prompt))
    finish(made)
    made.add(order(2, ids=[*prompt, 60, 61]))
    scheduled = planned(made)
    assert [(part.start, part.length) for part in scheduled.plan.segments] == [(17, 2)]
    assert [(copy.count) for copy in scheduled.plan.copies] == [1], "the block that they share in part"
    (output,) = made.complete(scheduled, said(50))
    assert output.cached_tokens == 17
    assert step(made)[0].cached_tokens is None, "it is told once"
    counts = made.take_counts()
    assert (counts.queried, counts.hit) == (17 + 19, 17)
    assert made.take_counts().queried == 0


def test_the_last_token_of_a_known_prompt_is_computed_all_the_same() -> None:
    made = scheduler(context=64, prefill_chunk=64)
    prompt = list(range(20, 36))
    for key in (1, 2):
        made.add(order(key, ids=prompt))
        scheduled = planned(made)
        made.complete(scheduled, said(STOP))
    assert [(part.start, part.length) for part in scheduled.plan.segments] == [(15, 1)]


def test_a_reply_is_known_to_the_turn_that_follows_it() -> None:
    made = scheduler(context=64, prefill_chunk=64)
    made.add(order(1, ids=[20] * 6, max_tokens=6))
    finish(made, 50)
    made.add(order(2, ids=[20] * 6 + [50] * 6 + [30] * 4))
    scheduled = planned(made)
    assert scheduled.plan.segments[0].start == 11, "all but the last sampled token, which nobody computed"


def test_whoever_shares_a_block_only_reads_it() -> None:
    made = scheduler(context=64, prefill_chunk=64)
    prompt = list(range(20, 29))
    made.add(order(1, ids=prompt, max_tokens=20))
    step(made)
    step(made)
    made.add(order(2, ids=[*prompt[:8], 70]))
    scheduled = planned(made)
    assert scheduled.plan.segments[0].runs[0] == (0, 11)
    _, second = scheduled.plan.segments
    assert second.start == 8
    assert second.runs[0] == (0, 8)
    assert made.pool.held == 8 - 2 + 4, "two blocks are held twice"


def test_eight_who_begin_alike_compute_the_beginning_once() -> None:
    made = scheduler(blocks=200, size=16, context=256, prefill_chunk=64)
    shared = [(3 * index) % 90 for index in range(160)]
    for key in range(8):
        made.add(order(key, ids=[*shared, 90 + key], max_tokens=3))
    computed = 0
    hits = {}
    while not made.idle:
        scheduled = planned(made)
        computed += scheduled.prefill
        for output in made.complete(scheduled, said(*[50] * len(scheduled.sampled))):
            hits.setdefault(output.key, output.cached_tokens)
    assert computed == 160 + 8
    assert hits == {0: 0, **dict.fromkeys(range(1, 8), 160)}


def test_only_those_are_held_back_whose_beginning_is_being_computed() -> None:
    made = scheduler(context=64, prefill_chunk=4)
    long = list(range(20, 40))
    made.add(order(1, ids=long))
    made.add(order(2, ids=[*long[:10], 60, 61]))
    made.add(order(3, ids=[70, 71]))
    step(made)
    assert [sequence.key for sequence in made._running] == [1, 3]
    for _ in range(2):
        step(made)
    assert not made._waiting, "what it shares in whole blocks is known after two chunks"


def test_without_a_cache_nobody_is_held_back_and_nothing_is_counted_as_known() -> None:
    made = scheduler(context=64, prefill_chunk=64, caching=False)
    for key in (1, 2):
        made.add(order(key, ids=list(range(20, 40))))
    scheduled = planned(made)
    assert [part.length for part in scheduled.plan.segments] == [20, 20]
    assert [output.cached_tokens for output in made.complete(scheduled, said(50, 50))] == [0, 0]
    assert made.take_counts().hit == 0
    finish(made)
    assert made.pool.idle == 0


def test_a_conversation_of_many_turns_beside_others_lies_in_few_runs() -> None:
    """Each turn's blocks are taken where there is room just then, between those of others."""
    made = scheduler(blocks=1500, context=1000, prefill_chunk=1000, max_running=8)
    history: list[int] = []
    most = moved = 0
    for turn in range(12):
        history += [20 + turn] * 30
        key = 100 + turn
        made.add(order(key, ids=list(history), max_tokens=8))
        made.add(order(turn, ids=[60 + turn] * 40, max_tokens=400))  # one that stays
        made.add(order(50 + turn, ids=[40 + turn] * 21, max_tokens=3))  # and one that goes
        while any(sequence.key == key for sequence in [*made._running, *made._waiting]):
            scheduled = planned(made)
            moved += sum(copy.count == SIZE for copy in scheduled.plan.copies)
            for sequence, segment in zip(scheduled.sequences, scheduled.plan.segments, strict=True):
                if sequence.key == key:
                    most = max(most, len(segment.runs))
            made.complete(scheduled, said(*[50] * len(scheduled.sampled)))
        history += [50] * 7
        if turn % 3 == 2:
            made.cancel(turn - 1)
    assert most <= MOST_RUNS
    assert 0 < moved < 12 * len(history) / SIZE / 2, "now and then, and not in every turn"
    counts = made.take_counts()
    assert counts.preempted == 0
    assert counts.hit > counts.queried / 2


@pytest.mark.parametrize("reserve", [None, 512], ids=["said", "unsaid"])
@pytest.mark.parametrize("known", [0, 1], ids=["empty", "full"])
def test_long_replies_side_by_side_lie_in_few_runs(reserve: int | None, known: int) -> None:
    """In an empty cache and in one that is full of what earlier sequences have left."""
    made = scheduler(blocks=1024, size=16, context=8192, prefill_chunk=512)
    for key in range(100, 100 + 20 * known):
        made.add(order(key, ids=[key - 60] * 1000, max_tokens=4))
    finish(made)
    assert made.pool.vacant < 300 if known else made.pool.vacant == 1024
    for key in range(4):
        made.add(order(key, length=100, max_tokens=2000, reserve=reserve))
    most: list[int] = []
    while not made.idle:
        scheduled = planned(made)
        most.append(max(len(segment.runs) for segment in scheduled.plan.segments))
        made.complete(scheduled, said(*[50] * len(scheduled.sampled)))
        made.took(scheduled, cost(scheduled))
    assert max(most) <= (4 if known else MOST_RUNS)
    assert sum(most) / len(most) <= (2.5 if known else MOST_RUNS)
    assert made.counts.preempted == 0


# --- room ---


def test_memory_for_the_whole_request_is_set_aside_before_it_starts() -> None:
    made = scheduler(blocks=10)
    for key in (1, 2):
        made.add(order(key, length=3, max_tokens=20))  # six blocks each
    assert keys(planned(made)) == [1]
    assert (made.running, made.waiting) == (1, 1)
    finish(made)
    assert made.counts.preempted == 0


def test_a_smaller_reserve_lets_more_start_and_whoever_came_last_gives_way() -> None:
    made = scheduler(blocks=10)
    for key in (1, 2):
        made.add(order(key, length=3, max_tokens=20, reserve=2))
    texts: dict[int, list[int]] = {1: [], 2: []}
    gave_way: set[int] = set()
    token = 50
    while not made.idle:
        scheduled = planned(made)
        gave_way |= {sequence.key for sequence in made._waiting}
        token = 10 + (token + 1) % 80
        for output in made.complete(scheduled, said(*[token] * len(scheduled.sampled))):
            texts[output.key] += output.ids
        made.took(scheduled, cost(scheduled))
    assert gave_way == {2}
    assert made.counts.preempted == 1
    assert [len(text) for text in texts.values()] == [20, 20]


def test_whoever_stays_within_its_reserve_is_never_made_to_give_way() -> None:
    made = scheduler(blocks=10)
    made.add(order(1, length=3, max_tokens=28, reserve=1))
    made.add(order(2, length=3, max_tokens=20))  # comes last, and has all that it may need
    finished = []
    while not made.idle:
        finished += [output.key for output in step(made) if output.finish]
    assert finished == [2, 1]
    assert made.counts.preempted >= 1


def test_a_sequence_that_gave_way_goes_on_where_it_was() -> None:
    made = scheduler(blocks=8, prefill_chunk=64)
    for key in (1, 2):
        made.add(order(key, length=3, max_tokens=26, reserve=1))
    lengths: dict[int, int] = {1: 0, 2: 0}
    sequences: dict[int, Sequence] = {}
    hits = []
    while not made.idle:
        scheduled = planned(made)
        sequences |= {sequence.key: sequence for sequence in scheduled.sequences}
        for output in made.complete(scheduled, said(*range(50, 50 + len(scheduled.sampled)))):
            lengths[output.key] += len(output.ids)
            hits.append((output.key, output.cached_tokens))
    assert made.counts.preempted > 0
    assert lengths == {1: 26, 2: 26}
    assert [sequence.generated for sequence in sequences.values()] == [26, 26]
    assert [hit for hit in hits if hit[1] is not None] == [(1, 0), (2, 0)], "what it found again is no hit"
    assert made.counts.hit == 0
